//! A program that ends with its owner: killed, by its own process id, when dropped.

use std::{
    io::Write,
    process::{Child, ChildStdin, Command, ExitStatus},
    time::{Duration, Instant},
};

use crate::error::{Doing, Result};

/// A running child process.
#[derive(Debug)]
pub struct Running {
    child: Child,
    input: Option<ChildStdin>,
}

impl Running {
    /// Starts the command. It dies with the thread that calls this, even when that is killed and `Drop` never runs.
    pub fn start(command: &Command, set_up: impl FnOnce(&mut Command)) -> Result<(Self, Pipes)> {
        let mut wrapped = Command::new("setpriv");
        wrapped
            .args(["--pdeathsig", "KILL", "--"])
            .arg(command.get_program())
            .args(command.get_args());
        for (name, value) in command.get_envs() {
            if let Some(value) = value {
                wrapped.env(name, value);
            }
        }
        set_up(&mut wrapped);
        let mut child = wrapped.spawn().doing(|| format!("start {:?}", command.get_program()))?;
        let pipes = Pipes { stdout: child.stdout.take(), stderr: child.stderr.take() };
        let input = child.stdin.take();
        Ok((Self { child, input }, pipes))
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Writes to the program's standard input.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        match &mut self.input {
            Some(input) => input
                .write_all(bytes)
                .and_then(|()| input.flush())
                .doing(|| "type into the machine".into()),
            None => Ok(()),
        }
    }

    /// Whether it ended by itself within this time.
    pub fn ended_within(&mut self, timeout: Duration) -> Result<bool> {
        self.status_within(timeout).map(|status| status.is_some())
    }

    /// How it ended, if it did within this time.
    pub fn status_within(&mut self, timeout: Duration) -> Result<Option<ExitStatus>> {
        let deadline = Instant::now() + timeout;
        loop {
            let status = self.child.try_wait().doing(|| "look after a child process".into())?;
            if status.is_some() || Instant::now() >= deadline {
                return Ok(status);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The output pipes of a child, those that were asked for.
#[derive(Debug)]
pub struct Pipes {
    pub stdout: Option<std::process::ChildStdout>,
    pub stderr: Option<std::process::ChildStderr>,
}
