//! The admin service: gRPC over HTTP/2 on a unix socket, without TLS; who may connect is a matter of the file's mode.
//!
//! | method | |
//! |---|---|
//! | `/ikto.AdminService/NodeInfo` | Ikto's (protocols/ikto-kilo.md §1.9), so that `ikto info` reads our socket and `latchkey info` Ikto's |
//! | `/latchkey.v1.AdminService/View` | all the agent knows ([`crate::view::View`]) as JSON, for `latchkey status` |

mod client;
mod message;
mod server;
mod socket;
#[cfg(test)]
mod tests;

use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

pub use client::{fetch_view, node_info, view};
pub use message::{NodeInfo, Peer};
pub use server::Server;

/// Where Ikto's agent has it, and ours with an ikto.json.
pub const IKTO_SOCKET: &str = "/tmp/ikto.sock";
/// Where latchkey.service has it. The directory is its RuntimeDirectory=.
pub const SERVICE_SOCKET: &str = "/run/latchkey/agent/admin.sock";

/// The socket that `latchkey info` asks unless told otherwise: Ikto's place, or where there is none, the service's. In /tmp
/// anybody can put a socket, so one of a stranger is none.
pub fn default_socket() -> PathBuf {
    one_of(Path::new(IKTO_SOCKET), Path::new(SERVICE_SOCKET)).into()
}

fn one_of<'a>(ikto: &'a Path, service: &'a Path) -> &'a Path {
    let own = |owner: u32| owner == 0 || owner == nix::unistd::geteuid().as_raw();
    let usable = std::fs::symlink_metadata(ikto)
        .is_ok_and(|file| file.file_type().is_socket() && own(file.uid()));
    if usable || !service.exists() { ikto } else { service }
}
