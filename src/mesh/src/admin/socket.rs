//! The socket's file: who may have it, when an old one is taken away, and by whom.

use std::fs::{self, DirBuilder, File, TryLockError};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, MetadataExt as _};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket,
};
use nix::sys::stat::{Mode, fchmod};

use super::SERVICE_SOCKET;
use crate::error::{Error, Result};

/// How long another agent may take to bind a socket in the same directory.
const LOCK: Duration = Duration::from_secs(5);

/// A socket that listens. Its file is removed when it is dropped, if it is still the one that was made.
#[derive(Debug)]
pub(super) struct Bound {
    pub(super) listener: UnixListener,
    file: OwnFile,
}

#[derive(Debug)]
struct OwnFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl Bound {
    /// Takes away a socket on which nobody answers. Nothing else is ever removed: not the socket of an agent that runs, not a
    /// file of another type, not what a symbolic link leads to.
    pub(super) fn new(path: &Path) -> Result<Self> {
        let directory = directory(path)?;
        // Two agents that start at once and find the same dead socket would else remove each other's.
        let _lock = lock(&directory);
        make_room(path)?;
        let refused = |source| failed("make the socket", path, source);
        let address = UnixAddr::new(path).map_err(|errno| refused(errno.into()))?;
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let unbound = || -> nix::Result<_> {
            let file = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
            // Before it has a name, so that nobody finds it open: the file gets the mode of the socket (unix(7) does not say
            // so, net/unix/af_unix.c does).
            fchmod(&file, Mode::S_IRUSR | Mode::S_IWUSR)?;
            bind(file.as_raw_fd(), &address)?;
            listen(&file, Backlog::MAXALLOWABLE)?;
            Ok(file)
        };
        let listener = UnixListener::from(unbound().map_err(|errno| refused(errno.into()))?);
        let made = fs::symlink_metadata(path).map_err(refused)?;
        let file = OwnFile { path: path.into(), device: made.dev(), inode: made.ino() };
        Ok(Self { listener, file })
    }

    /// The file is removed when the second half is dropped.
    pub(super) fn into_parts(self) -> (UnixListener, impl Send + Sync + use<>) {
        (self.listener, self.file)
    }
}

impl Drop for OwnFile {
    fn drop(&mut self) {
        let still_ours =
            |file: &fs::Metadata| (file.dev(), file.ino()) == (self.device, self.inode);
        if fs::symlink_metadata(&self.path).is_ok_and(|file| still_ours(&file))
            && let Err(error) = fs::remove_file(&self.path)
        {
            log::warn!("cannot remove the socket {}: {error}", self.path.display());
        }
    }
}

/// The directory, which must be none where anybody may take the socket away and put his own in its place.
fn directory(path: &Path) -> Result<PathBuf> {
    let directory = match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => Path::new("/"),
    };
    if Path::new(SERVICE_SOCKET).parent() == Some(directory) {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(directory);
        made.map_err(|source| failed("make the directory", directory, source))?;
    }
    let metadata = fs::metadata(directory)
        .map_err(|source| failed("look at the socket's directory", directory, source))?;
    const WRITABLE_BY_ALL: u32 = 0o002;
    const STICKY: u32 = 0o1000;
    if metadata.mode() & WRITABLE_BY_ALL != 0 && metadata.mode() & STICKY == 0 {
        return Err(Error::UnsafeDirectory { path: directory.into() });
    }
    Ok(directory.into())
}

/// `None` if it cannot be had: in /tmp anybody can hold it, and that must keep no agent from its work.
fn lock(directory: &Path) -> Option<File> {
    let opened = File::open(directory).ok()?;
    let until = Instant::now() + LOCK;
    loop {
        match opened.try_lock() {
            Ok(()) => return Some(opened),
            Err(TryLockError::WouldBlock) if Instant::now() < until => {
                sleep(Duration::from_millis(20));
            }
            Err(_) => return None,
        }
    }
}

fn make_room(path: &Path) -> Result<()> {
    let found = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        found => found.map_err(|source| failed("look at", path, source))?,
    };
    if !found.file_type().is_socket() {
        return Err(Error::NotASocket { path: path.into() });
    }
    match answers(path) {
        Ok(true) => Err(Error::SocketTaken { path: path.into(), owner: found.uid() }),
        Ok(false) => match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(failed("remove the dead socket", path, error))
            }
            _ => Ok(()),
        },
        Err(source) => Err(failed("try the socket", path, source)),
    }
}

/// Whether a process listens. Nothing is sent.
fn answers(path: &Path) -> io::Result<bool> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let probe = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    match connect(probe.as_raw_fd(), &UnixAddr::new(path)?) {
        // EAGAIN: its queue is full. EPROTOTYPE: it is a socket for datagrams, and in use.
        Ok(()) | Err(Errno::EAGAIN | Errno::EPROTOTYPE) => Ok(true),
        Err(Errno::ECONNREFUSED | Errno::ENOENT) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

fn failed(action: &'static str, path: &Path, source: io::Error) -> Error {
    match source.kind() {
        io::ErrorKind::PermissionDenied => {
            Error::NotPermitted { action: format!("{action} {}", path.display()) }
        }
        _ => Error::File { action, path: path.into(), source },
    }
}
