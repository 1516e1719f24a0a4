//! A prompt on `/dev/console` that leaves the screen usable: what is typed is not shown, and a log
//! line that comes in between has the prompt below it again.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Mutex, PoisonError};

use nix::libc::{O_NOCTTY, O_NONBLOCK};
use nix::sys::termios::{FlushArg, LocalFlags, SetArg, Termios, tcflush, tcgetattr, tcsetattr};
use zeroize::{Zeroize, Zeroizing};

use super::MAX_PASSPHRASE;

/// The prompt that stands on the console now.
static SHOWN: Mutex<String> = Mutex::new(String::new());

/// What a log line has to put back after itself.
pub(crate) fn shown() -> String {
    SHOWN.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

fn set_shown(text: &str) {
    text.clone_into(&mut SHOWN.lock().unwrap_or_else(PoisonError::into_inner));
}

/// An open question on the console.
#[derive(Debug)]
pub struct ConsolePrompt {
    console: File,
    before: Option<Termios>,
    text: String,
    typed: Zeroizing<Vec<u8>>,
}

impl ConsolePrompt {
    pub(super) fn open(message: &str) -> io::Result<Self> {
        let console = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(O_NOCTTY | O_NONBLOCK)
            .open("/dev/console")?;
        // A console that is no terminal has no echo to switch off.
        let before = tcgetattr(&console).ok();
        if let Some(before) = &before {
            let mut silent = before.clone();
            silent.local_flags.remove(LocalFlags::ECHO | LocalFlags::ECHONL);
            silent.local_flags.insert(LocalFlags::ICANON);
            tcsetattr(&console, SetArg::TCSANOW, &silent)?;
            let _ = tcflush(&console, FlushArg::TCIFLUSH);
        }
        let mut typed = Zeroizing::new(Vec::new());
        typed.reserve_exact(MAX_PASSPHRASE + 1);
        let mut prompt = Self { console, before, text: format!("{message}: "), typed };
        prompt.again();
        Ok(prompt)
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.console.as_fd()
    }

    pub(super) fn answer(&mut self) -> io::Result<Option<Zeroizing<Vec<u8>>>> {
        let mut chunk = Zeroizing::new([0; 256]);
        let got = match self.console.read(&mut *chunk) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(got) => got,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(None),
            Err(error) => return Err(error),
        };
        for byte in chunk.iter().take(got) {
            match byte {
                b'\n' | b'\r' => {
                    let line = Zeroizing::new(self.typed.to_vec());
                    self.typed.zeroize();
                    return Ok(Some(line));
                }
                _ if self.typed.len() < MAX_PASSPHRASE => self.typed.push(*byte),
                _ => {}
            }
        }
        Ok(None)
    }

    pub(super) fn change(&mut self, message: &str) {
        self.text = format!("{message}: ");
        self.again();
    }

    pub(super) fn again(&mut self) {
        set_shown(&self.text);
        self.show(&format!("\r\n{}", self.text));
    }

    fn show(&mut self, text: &str) {
        if let Err(error) = self.console.write_all(text.as_bytes()) {
            log::debug!("writing to the console: {error}");
        }
    }
}

impl Drop for ConsolePrompt {
    fn drop(&mut self) {
        set_shown("");
        if let Some(before) = &self.before {
            let _ = tcsetattr(&self.console, SetArg::TCSANOW, before);
        }
        self.show("\r\n");
    }
}
