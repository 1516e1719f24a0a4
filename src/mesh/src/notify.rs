//! What a service tells systemd (sd_notify(3)): one datagram of `KEY=value` lines to
//! `$NOTIFY_SOCKET`.

use std::env;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

use crate::error::{Error, Result};
use crate::terminal::printable;

/// Says nothing, to nobody, when the program was not started by systemd.
#[derive(Debug)]
pub(crate) struct Notify(Option<(UnixDatagram, SocketAddr)>);

impl Notify {
    pub(crate) fn from_env() -> Result<Self> {
        let Some(name) = env::var_os("NOTIFY_SOCKET") else { return Ok(Self(None)) };
        let bytes = name.as_encoded_bytes();
        let address = match bytes.strip_prefix(b"@") {
            Some(abstract_name) => SocketAddr::from_abstract_name(abstract_name),
            None => SocketAddr::from_pathname(&name),
        };
        let socket = UnixDatagram::unbound();
        address
            .and_then(|address| Ok(Self(Some((socket?, address)))))
            .map_err(|source| Error::Notify { source })
    }

    /// The service does its work from now on.
    pub(crate) fn ready(&self, status: &str) -> Result<()> {
        self.send(&format!("READY=1\nSTATUS={}", printable(status)))
    }

    /// One line for `systemctl status`. A reason that others have worded must not begin a further one: `MAINPID=` is one, too.
    pub(crate) fn status(&self, status: &str) -> Result<()> {
        self.send(&format!("STATUS={}", printable(status)))
    }

    /// The configuration is being read again; [`Notify::ready`] ends that (`Type=notify-reload`).
    pub(crate) fn reloading(&self) -> Result<()> {
        let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from);
        self.send(&format!("RELOADING=1\nMONOTONIC_USEC={}", now.as_micros()))
    }

    /// Not ready yet, but on the way: do not give up before so much more time is over.
    pub(crate) fn extend(&self, by: Duration) -> Result<()> {
        self.send(&format!("EXTEND_TIMEOUT_USEC={}", by.as_micros()))
    }

    pub(crate) fn alive(&self) -> Result<()> {
        self.send("WATCHDOG=1")
    }

    pub(crate) fn stopping(&self) -> Result<()> {
        self.send("STOPPING=1")
    }

    fn send(&self, state: &str) -> Result<()> {
        let Some((socket, address)) = &self.0 else { return Ok(()) };
        socket
            .send_to_addr(state.as_bytes(), address)
            .map(drop)
            .map_err(|source: io::Error| Error::Notify { source })
    }
}

/// How often systemd wants to hear that the service is alive (`WatchdogSec=`).
pub(crate) fn watchdog_interval() -> Option<Duration> {
    let microseconds =
        env::var("WATCHDOG_USEC").ok()?.parse().ok().filter(|microseconds| *microseconds > 0)?;
    Some(Duration::from_micros(microseconds))
}
