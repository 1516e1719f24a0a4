//! One TPM 2.0 command out, one response in, over a device node or a socket.
//!
//! TCG TPM 2.0 Library Part 1 §18: a header of tag (u16), size (u32) and command or response code
//! (u32), all big-endian. The kernel's character device takes a command in one `write` and gives
//! its response in one `read`; a socket is a stream, so the header's size says where a response ends.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use zeroize::Zeroize;

use crate::TpmError;
use crate::device::Address;

/// The longest command or response of any TPM: `TPM2_MAX_COMMAND_SIZE`.
pub(crate) const MAX_MESSAGE: usize = 4096;
const HEADER: usize = 10;

/// RSA key generation is the slowest thing asked for: 1.6 to 7.5 s on discrete parts, half a minute
/// on the worst. A TPM that is silent for longer is gone.
const RESPONSE_DEADLINE: Duration = Duration::from_secs(90);

/// Warnings that mean "the command was not started, send the same bytes again" (Part 2 §6.6.3).
const RC_YIELDED: u32 = 0x908;
const RC_TESTING: u32 = 0x90a;
const RC_RETRY: u32 = 0x922;
/// 12 tries with a doubling pause from 5 ms, capped at 640 ms, come to about 4 s.
const MAX_TRIES: u32 = 12;

#[derive(Debug)]
enum Channel {
    Device(File),
    Unix(UnixStream),
    Tcp(TcpStream),
}

/// An open way to the TPM, and a record of the last exchange on it.
#[derive(Debug)]
pub(crate) struct Transport {
    channel: Channel,
    response: Vec<u8>,
    commands: u32,
    broken: bool,
}

impl Transport {
    pub(crate) fn open(address: &Address) -> Result<Self, TpmError> {
        let channel = match address {
            Address::Device(path) => {
                OpenOptions::new().read(true).write(true).open(path).map(Channel::Device)
            }
            Address::Unix(path) => UnixStream::connect(path).map(Channel::Unix),
            Address::Tcp(host, port) => {
                TcpStream::connect((host.as_str(), *port)).and_then(|stream| {
                    stream.set_nodelay(true)?;
                    Ok(Channel::Tcp(stream))
                })
            }
        };
        let channel = channel.map_err(|error| match error.raw_os_error() {
            Some(nix::libc::EBUSY) => TpmError::Busy { device: address.to_string() },
            _ if error.kind() == io::ErrorKind::NotFound => {
                TpmError::Missing { tried: address.to_string() }
            }
            _ => TpmError::Open { device: address.to_string(), error },
        })?;
        Ok(Self { channel, response: Vec::with_capacity(MAX_MESSAGE), commands: 0, broken: false })
    }

    /// Sends one command and waits for its response; resends what the TPM asks to be resent.
    pub(crate) fn transact(&mut self, command: &[u8]) -> io::Result<&[u8]> {
        let mut pause = Duration::from_millis(5);
        for attempt in 1.. {
            let exchanged = self.send(command).and_then(|()| self.receive());
            self.broken = exchanged.is_err();
            exchanged?;
            self.commands = self.commands.saturating_add(1);
            let code = self.response_code();
            if attempt == MAX_TRIES || !matches!(code, RC_YIELDED | RC_TESTING | RC_RETRY) {
                break;
            }
            log::debug!("the TPM asks for the command again (0x{code:03x}), try {attempt}");
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(640));
        }
        Ok(&self.response)
    }

    /// The response code of the last exchange; 0 is success.
    pub(crate) fn response_code(&self) -> u32 {
        be_u32(&self.response, 6).unwrap_or(0)
    }

    /// Whether the last exchange failed below the TPM's own protocol.
    pub(crate) fn is_broken(&self) -> bool {
        self.broken
    }

    /// The last response as it came, header included.
    pub(crate) fn response(&self) -> &[u8] {
        &self.response
    }

    /// How many commands went out, resent ones included.
    pub(crate) fn commands(&self) -> u32 {
        self.commands
    }

    fn send(&mut self, command: &[u8]) -> io::Result<()> {
        match &mut self.channel {
            Channel::Device(file) => {
                let sent = file.write(command)?;
                if sent == command.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
            }
            Channel::Unix(stream) => stream.write_all(command),
            Channel::Tcp(stream) => stream.write_all(command),
        }
    }

    fn receive(&mut self) -> io::Result<()> {
        let deadline = Instant::now() + RESPONSE_DEADLINE;
        self.response.zeroize();
        self.response.resize(MAX_MESSAGE, 0);
        let mut filled = 0;
        let mut wanted = HEADER;
        while filled < wanted {
            wait_readable(self.fd(), deadline)?;
            let Some(room) = self.response.get_mut(filled..) else { return Err(malformed()) };
            let got = match &mut self.channel {
                Channel::Device(file) => file.read(room)?,
                // A stream may hold no more than this response: only one command is ever under way.
                Channel::Unix(stream) => stream.read(room)?,
                Channel::Tcp(stream) => stream.read(room)?,
            };
            if got == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            filled += got;
            if filled >= HEADER {
                wanted = be_u32(&self.response, 2).ok_or_else(malformed)? as usize;
                if !(HEADER..=MAX_MESSAGE).contains(&wanted) || filled > wanted {
                    return Err(malformed());
                }
            }
        }
        self.response.truncate(filled);
        Ok(())
    }

    fn fd(&self) -> BorrowedFd<'_> {
        match &self.channel {
            Channel::Device(file) => file.as_fd(),
            Channel::Unix(stream) => stream.as_fd(),
            Channel::Tcp(stream) => stream.as_fd(),
        }
    }
}

impl Drop for Transport {
    fn drop(&mut self) {
        self.response.zeroize();
    }
}

fn wait_readable(fd: BorrowedFd<'_>, deadline: Instant) -> io::Result<()> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], timeout) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) => return Ok(()),
            Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

fn malformed() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the response's size field is wrong")
}

pub(crate) fn be_u32(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at.checked_add(4)?)?.try_into().ok().map(u32::from_be_bytes)
}
