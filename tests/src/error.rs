//! What can go wrong in the harness itself, or be found wrong in a machine under test.

use std::{fmt, io, path::Path, process::Command};

/// `Debug` is the message too, so that a test that returns it shows a person what happened.
#[derive(thiserror::Error)]
pub enum Error {
    #[error("cannot {what}: {source}")]
    Io { what: String, source: io::Error },
    #[error("`{command}` ended with {status}:\n{output}")]
    Tool { command: String, status: String, output: String },
    #[error("{who} did not say /{pattern}/ within {seconds} s; its last lines:\n{tail}")]
    Timeout { who: String, pattern: String, seconds: u64, tail: String },
    #[error("{who} ended without saying /{pattern}/; its last lines:\n{tail}")]
    Ended { who: String, pattern: String, tail: String },
    #[error("{who} still ran after {seconds} s; its last lines:\n{tail}")]
    StillRunning { who: String, seconds: u64, tail: String },
    #[error("the machine's report is not what it should be: {0}")]
    Report(String),
    #[error("{0}")]
    Setup(String),
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

pub type Result<T> = std::result::Result<T, Error>;

/// Names what was tried on an [`io::Error`].
pub trait Doing<T> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Doing<T> for io::Result<T> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::Io { what: what(), source })
    }
}

/// Runs a tool to its end; its standard output, or an error with all it said.
pub fn run(command: &mut Command) -> Result<String> {
    let shown = format!("{command:?}");
    let output = command.output().doing(|| format!("run {shown}"))?;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(stdout);
    }
    Err(Error::Tool {
        command: shown,
        status: output.status.to_string(),
        output: format!("{stdout}{}", String::from_utf8_lossy(&output.stderr)),
    })
}

pub fn write(path: &Path, bytes: impl AsRef<[u8]>) -> Result<()> {
    std::fs::write(path, bytes).doing(|| format!("write {}", path.display()))
}

pub fn create_dir(path: &Path) -> Result<()> {
    std::fs::create_dir_all(path).doing(|| format!("create {}", path.display()))
}
