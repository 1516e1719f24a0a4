//! systemd's password agent protocol, the side that asks: an ini file that names a datagram socket
//! (<https://systemd.io/PASSWORD_AGENTS/>).

use std::fs::{self, OpenOptions};
use std::io::{self, IoSliceMut, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};

use nix::sys::socket::{
    ControlMessageOwned, MsgFlags, UnixCredentials, recvmsg, setsockopt, sockopt::PassCred,
};
use zeroize::Zeroizing;

use super::MAX_PASSPHRASE;

const DIRECTORY: &str = "/run/systemd/ask-password";

/// Whether systemd runs here: what `sd_booted(3)` tests.
pub(super) fn is_served() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

/// A question in the directory that the agents watch.
#[derive(Debug)]
pub struct AgentPrompt {
    socket: UnixDatagram,
    socket_path: PathBuf,
    question: PathBuf,
    message: String,
    id: String,
    asked: u32,
}

impl AgentPrompt {
    pub(super) fn open(message: &str, id: &str) -> io::Result<Self> {
        fs::create_dir_all(DIRECTORY)?;
        let socket_path = Path::new(DIRECTORY).join(format!("sck.latchkey-{}", std::process::id()));
        let _ = fs::remove_file(&socket_path);
        let socket = UnixDatagram::bind(&socket_path)?;
        socket.set_nonblocking(true)?;
        setsockopt(&socket, PassCred, &true)?;
        let (message, id) = (message.to_owned(), id.to_owned());
        let question = PathBuf::new();
        let mut prompt = Self { socket, socket_path, question, message, id, asked: 0 };
        prompt.again()?;
        Ok(prompt)
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    pub(super) fn answer(&mut self) -> io::Result<Option<Zeroizing<Vec<u8>>>> {
        let mut buffer = Zeroizing::new([0; MAX_PASSPHRASE + 2]);
        let mut control = nix::cmsg_space!(UnixCredentials);
        let (length, from_root) = {
            let mut parts = [IoSliceMut::new(&mut *buffer)];
            let received = recvmsg::<()>(
                self.socket.as_raw_fd(),
                &mut parts,
                Some(&mut control),
                MsgFlags::MSG_DONTWAIT,
            );
            match received {
                Ok(message) => (
                    message.bytes,
                    message.cmsgs().is_ok_and(|mut all| all.any(|one| is_root(&one))),
                ),
                Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EINTR) => return Ok(None),
                Err(errno) => return Err(errno.into()),
            }
        };
        if !from_root {
            log::warn!("an answer to the passphrase prompt did not come from root; ignored");
            return Ok(None);
        }
        // "+" and the passphrase, NUL-terminated; "-" when the person gave up.
        match buffer.get(..length) {
            Some([b'+', typed @ ..]) => {
                let typed = typed.split(|byte| *byte == 0).next().unwrap_or_default();
                Ok(Some(Zeroizing::new(typed.to_vec())))
            }
            _ => {
                self.again()?;
                Ok(None)
            }
        }
    }

    pub(super) fn change(&mut self, message: &str) -> io::Result<()> {
        message.clone_into(&mut self.message);
        self.again()
    }

    fn text(&self) -> String {
        format!(
            "[Ask]\nPID={}\nSocket={}\nAcceptCached=0\nEcho=0\nNotAfter=0\nSilent=0\nMessage={}\nIcon=drive-harddisk\nId={}\n",
            std::process::id(),
            self.socket_path.display(),
            self.message,
            self.id
        )
    }

    /// A new file: an agent has answered the old one and looks at it no more.
    pub(super) fn again(&mut self) -> io::Result<()> {
        let _ = fs::remove_file(&self.question);
        self.asked += 1;
        let name = format!("latchkey-{}-{}", std::process::id(), self.asked);
        let temporary = Path::new(DIRECTORY).join(format!("tmp.{name}"));
        let mut file =
            OpenOptions::new().write(true).create_new(true).mode(0o644).open(&temporary)?;
        file.write_all(self.text().as_bytes())?;
        self.question = Path::new(DIRECTORY).join(format!("ask.{name}"));
        fs::rename(&temporary, &self.question)
    }
}

fn is_root(message: &ControlMessageOwned) -> bool {
    matches!(message, ControlMessageOwned::ScmCredentials(sender) if sender.uid() == 0)
}

/// Without the file the agents take the question off the screen.
impl Drop for AgentPrompt {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.question);
        let _ = fs::remove_file(&self.socket_path);
    }
}
