//! Asking a person for a recovery passphrase while the automatic way is tried.
//!
//! In a systemd initramfs through systemd's password agents, so that a boot splash or a remote
//! agent can answer; elsewhere on the console itself. Neither blocks: the owner polls
//! [`Prompt::fd`] and calls [`Prompt::answer`] when there is something to read.

mod agent;
mod console;
mod stdin;

use std::os::fd::BorrowedFd;

use zeroize::Zeroizing;

use agent::AgentPrompt;
use console::ConsolePrompt;
pub(crate) use console::shown as shown_on_console;
pub use stdin::from_stdin;

/// Longest passphrase read, as in libcryptsetup.
const MAX_PASSPHRASE: usize = 512;

/// A question that is open until it is dropped.
#[derive(Debug)]
pub enum Prompt {
    Agent(AgentPrompt),
    Console(ConsolePrompt),
}

impl Prompt {
    /// Asks. `None` where there is nobody to ask; the reason is logged.
    #[must_use]
    pub fn open(message: &str, id: &str) -> Option<Self> {
        let opened = if agent::is_served() {
            AgentPrompt::open(message, id).map(Self::Agent)
        } else {
            ConsolePrompt::open(message).map(Self::Console)
        };
        opened
            .inspect_err(|error| log::warn!("no prompt for the recovery passphrase: {error}"))
            .ok()
    }

    /// What to poll for input.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Agent(prompt) => prompt.fd(),
            Self::Console(prompt) => prompt.fd(),
        }
    }

    /// What was typed, once a whole line is there. `Ok(None)` means wait for more.
    ///
    /// # Errors
    /// When the console or the agent is gone; the prompt is of no more use.
    pub fn answer(&mut self) -> std::io::Result<Option<Zeroizing<Vec<u8>>>> {
        match self {
            Self::Agent(prompt) => prompt.answer(),
            Self::Console(prompt) => prompt.answer(),
        }
    }

    /// Asks for something else. What was typed on the console and not finished stays.
    ///
    /// # Errors
    /// As [`Prompt::answer`].
    pub fn change(&mut self, message: &str) -> std::io::Result<()> {
        match self {
            Self::Agent(prompt) => prompt.change(message),
            Self::Console(prompt) => {
                prompt.change(message);
                Ok(())
            }
        }
    }

    /// Asks again after a wrong answer.
    ///
    /// # Errors
    /// As [`Prompt::answer`].
    pub fn again(&mut self) -> std::io::Result<()> {
        match self {
            Self::Agent(prompt) => prompt.again(),
            Self::Console(prompt) => {
                prompt.again();
                Ok(())
            }
        }
    }
}
