//! A key on standard input: asked for without echo on a terminal, else what comes up to the first line feed or the end.

use std::fs::File;
use std::io::{IsTerminal, Read, Write, stderr, stdin};
use std::os::fd::AsFd;

use nix::sys::termios::{LocalFlags, SetArg, Termios, tcgetattr, tcsetattr};
use zeroize::Zeroizing;

use super::MAX_PASSPHRASE;
use crate::BootError;

/// One line of standard input, without its end.
///
/// # Errors
/// [`BootError::Usage`] for nothing and for more than 512 bytes; [`BootError::Io`].
pub fn from_stdin(message: &str) -> Result<Zeroizing<Vec<u8>>, BootError> {
    let fail = || BootError::io("read the key from stdin");
    let silent = Silent::ask(message).map_err(fail())?;
    let mut line = Zeroizing::new(Vec::new());
    line.reserve_exact(MAX_PASSPHRASE + 1);
    let mut byte = Zeroizing::new([0]);
    // Byte by byte, and not through the library's stdin, which would keep a copy in its buffer.
    let mut input = File::from(stdin().as_fd().try_clone_to_owned().map_err(fail())?);
    while line.len() <= MAX_PASSPHRASE && input.read(&mut *byte).map_err(fail())? == 1 {
        match *byte {
            [b'\n'] => break,
            [other] => line.push(other),
        }
    }
    drop(silent);
    if line.last() == Some(&b'\r') {
        line.pop();
    }
    match line.len() {
        1..=MAX_PASSPHRASE => Ok(line),
        0 => Err(BootError::Usage("there is no key on stdin".into())),
        _ => {
            Err(BootError::Usage(format!("what is on stdin is longer than {MAX_PASSPHRASE} bytes")))
        }
    }
}

/// A terminal that shows nothing of what is typed, until dropped.
struct Silent(Option<Termios>);

impl Silent {
    fn ask(message: &str) -> std::io::Result<Self> {
        if !stdin().is_terminal() {
            return Ok(Self(None));
        }
        stderr().write_all(message.as_bytes())?;
        let before = tcgetattr(stdin())?;
        let mut silent = before.clone();
        silent.local_flags.remove(LocalFlags::ECHO);
        tcsetattr(stdin(), SetArg::TCSAFLUSH, &silent)?;
        Ok(Self(Some(before)))
    }
}

impl Drop for Silent {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            let _ = tcsetattr(stdin(), SetArg::TCSAFLUSH, before);
            let _ = stderr().write_all(b"\n");
        }
    }
}
