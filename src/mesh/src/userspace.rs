//! WireGuard in a program of its own, where the kernel has none: wireguard-go, which makes a tun
//! link and takes its configuration over a Unix socket
//! (<https://www.wireguard.com/xplatform/#cross-platform-userspace-implementation>).
//!
//! The program is not ours to end: it outlives the agent, as the kernel's device does. It ends by
//! itself when its link is deleted.

mod answer;
mod uapi;

pub(crate) use uapi::length;

use std::env;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;

use crate::device::tunnel::Tunnel;
use crate::key::PrivateKey;
use crate::plan::Change;
pub(crate) use uapi::Batch;

/// wg(8) and wireguard-go take the first; where `/var/run` is not `/run`, others take the second.
const DIRECTORIES: [&str; 2] = ["/var/run/wireguard", "/run/wireguard"];

const PROGRAM: &str = "wireguard-go";

/// A healthy program answers in milliseconds, and thousands of peers in less than a second.
const ANSWER_WITHIN: Duration = Duration::from_secs(15);

/// It takes about 20 ms.
const START_WITHIN: Duration = Duration::from_secs(15);

const POLL: Duration = Duration::from_millis(5);

/// Of what the program says when it cannot start.
const MAX_COMPLAINT: u64 = 16 << 10;

/// Where a program is to be reached that carries a device.
#[derive(Debug)]
pub(crate) struct Socket {
    path: PathBuf,
    sent: u64,
}

impl Socket {
    /// The socket of `interface` on which somebody listens.
    ///
    /// # Errors
    /// `PermissionDenied` if it is not for us.
    pub(crate) fn find(interface: &str) -> io::Result<Option<Self>> {
        for directory in DIRECTORIES {
            let path = Path::new(directory).join(format!("{interface}.sock"));
            let socket = Self { path, sent: 0 };
            match socket.connect() {
                Ok(_) => return Ok(Some(socket)),
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return Err(error),
                Err(_) => {}
            }
        }
        Ok(None)
    }

    pub(crate) fn answers(&self) -> bool {
        self.connect().is_ok()
    }

    /// Bytes of requests that change something.
    pub(crate) fn sent(&self) -> u64 {
        self.sent
    }

    pub(crate) fn get(&self) -> io::Result<Tunnel> {
        let mut stream = self.connect()?;
        stream.write_all(uapi::GET)?;
        uapi::read_tunnel(Bounded::new(&stream))
    }

    /// Sets what is given; the rest and all peers stay as they are.
    ///
    /// # Errors
    /// `EADDRINUSE` if another has the port: the program would find that out as soon as its link is
    /// up, and tell nobody.
    pub(crate) fn set(&mut self, key: Option<&PrivateKey>, port: Option<u16>) -> io::Result<()> {
        if let Some(port) = port {
            UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port))?;
        }
        self.tell(uapi::set_device(key, port).as_bytes())
    }

    pub(crate) fn batches(&self, changes: &[Change]) -> Vec<Batch> {
        uapi::batches(changes)
    }

    pub(crate) fn send(&mut self, batch: &Batch) -> io::Result<()> {
        self.tell(batch.text().as_bytes())
    }

    fn tell(&mut self, request: &[u8]) -> io::Result<()> {
        self.sent += request.len() as u64;
        let mut stream = self.connect()?;
        match stream.write_all(request) {
            // Refused half way; why is waiting to be read.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
            written => written?,
        }
        uapi::read_result(Bounded::new(&stream))
    }

    fn connect(&self) -> io::Result<UnixStream> {
        let socket: OwnedFd =
            socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        let within = TimeVal::new(ANSWER_WITHIN.as_secs() as i64, 0);
        // That of sending bounds connect(2), too, which waits while too many others are waiting.
        setsockopt(&socket.as_fd(), sockopt::SendTimeout, &within)?;
        setsockopt(&socket.as_fd(), sockopt::ReceiveTimeout, &within)?;
        connect(socket.as_raw_fd(), &UnixAddr::new(&self.path)?)?;
        Ok(UnixStream::from(socket))
    }
}

/// Reads from a stream, but not for longer than [`ANSWER_WITHIN`] in all.
struct Bounded<'a> {
    stream: &'a UnixStream,
    deadline: Instant,
}

impl<'a> Bounded<'a> {
    fn new(stream: &'a UnixStream) -> Self {
        Self { stream, deadline: Instant::now() + ANSWER_WITHIN }
    }
}

impl Read for Bounded<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if Instant::now() > self.deadline {
            return Err(io::ErrorKind::TimedOut.into());
        }
        match self.stream.read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                Err(io::ErrorKind::TimedOut.into())
            }
            read => read,
        }
    }
}

/// Starts wireguard-go for `interface` and returns once it answers. It puts itself into the
/// background as soon as its link and its socket are there.
///
/// # Errors
/// What to tell a person.
pub(crate) fn start(interface: &str) -> Result<(), String> {
    let deadline = Instant::now() + START_WITHIN;
    loop {
        match run(interface, deadline) {
            Ok(()) => break,
            // One of the same name whose link was deleted is still about to end.
            Err(Complaint::SocketInUse) if Instant::now() < deadline => sleep(10 * POLL),
            Err(complaint) => return Err(complaint.to_string()),
        }
    }
    // The first program has made link and socket; the one in the background, which it has started,
    // sets the link's MTU once more before it answers.
    while Instant::now() < deadline {
        let answers = |socket: Socket| socket.get().is_ok();
        if Socket::find(interface).is_ok_and(|socket| socket.is_some_and(answers)) {
            return Ok(());
        }
        sleep(POLL);
    }
    Err(format!(
        "{PROGRAM} was started, but does not answer on {interface}.sock in {}",
        DIRECTORIES.join(" or ")
    ))
}

/// What became of a start.
#[derive(Debug, thiserror::Error)]
enum Complaint {
    #[error("there is no program {PROGRAM}; install it (apt install wireguard-go)")]
    Missing,
    #[error("cannot run {PROGRAM}: {0}")]
    NotRun(io::Error),
    #[error("{PROGRAM} says that its socket is in use by another")]
    SocketInUse,
    #[error("{PROGRAM} ended with {status}: {reason}")]
    Ended { status: ExitStatus, reason: String },
    #[error("{PROGRAM} did not get into the background within {} s", START_WITHIN.as_secs())]
    Slow,
}

fn run(interface: &str, deadline: Instant) -> Result<(), Complaint> {
    let mut child = Command::new(PROGRAM)
        .arg(interface)
        // Nothing of the agent's environment is for it: not the credentials' directory, and not
        // systemd's sockets.
        .env_clear()
        .envs(env::var_os("PATH").map(|path| ("PATH", path)))
        .current_dir("/")
        // What a terminal sends to the agent is not meant for it: it outlives the agent.
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => Complaint::Missing,
            _ => Complaint::NotRun(error),
        })?;
    let status = match wait(&mut child, deadline) {
        Ok(Some(status)) => status,
        ended => {
            // It has not got so far as to leave something behind; and if it has, it is found.
            let _ = child.kill();
            let _ = child.wait();
            return Err(ended.map_or_else(Complaint::NotRun, |_| Complaint::Slow));
        }
    };
    if status.success() {
        return Ok(());
    }
    let mut complaint = Vec::new();
    if let Some(stderr) = child.stderr.take() {
        let _ = stderr.take(MAX_COMPLAINT).read_to_end(&mut complaint);
    }
    let complaint = String::from_utf8_lossy(&complaint);
    if complaint.contains("socket in use") {
        return Err(Complaint::SocketInUse);
    }
    // What comes before is a banner.
    let reason = complaint.lines().rev().find(|line| !line.trim().is_empty());
    Err(Complaint::Ended { status, reason: reason.unwrap_or("no reason given").into() })
}

fn wait(child: &mut Child, deadline: Instant) -> io::Result<Option<ExitStatus>> {
    loop {
        match child.try_wait()? {
            None if Instant::now() < deadline => sleep(POLL),
            ended => return Ok(ended),
        }
    }
}
