//! SIGTERM and SIGINT end the agent, SIGHUP has it read its configuration again.

use tokio::signal::unix::{SignalKind, signal};

use super::failed;
use crate::error::Result;

#[derive(Debug)]
pub(super) struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
    hangup: tokio::signal::unix::Signal,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Signal {
    Stop,
    Reload,
}

impl Signals {
    /// From here on they no longer end the process by themselves. Needs the runtime.
    pub(super) fn listen() -> Result<Self> {
        let on = |kind| signal(kind).map_err(|source| failed("wait for signals", source));
        Ok(Self {
            terminate: on(SignalKind::terminate())?,
            interrupt: on(SignalKind::interrupt())?,
            hangup: on(SignalKind::hangup())?,
        })
    }

    /// Cancel safe.
    pub(super) async fn next(&mut self) -> Signal {
        tokio::select! {
            _ = self.terminate.recv() => Signal::Stop,
            _ = self.interrupt.recv() => Signal::Stop,
            _ = self.hangup.recv() => Signal::Reload,
        }
    }
}
