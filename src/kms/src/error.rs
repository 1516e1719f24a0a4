//! Why the program did not do what it was told, with the exit code for each.

use std::{io, net::SocketAddr, path::PathBuf, process::ExitCode};

use crate::{audit::verify::Broken, mdns::packet::NotLocal, volume};

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("store {}: {source}; --store must be a directory this user can read (and write, to enrol machines)", path.display())]
    Store { path: PathBuf, source: io::Error },
    #[error("listening on {address} failed: {source}; {} ({flag})", listen_advice(source))]
    Listen { address: SocketAddr, flag: &'static str, source: io::Error },
    #[error("TLS: reading {} failed: {reason}; it must be a PEM file with {wanted}", path.display())]
    TlsFile { path: PathBuf, reason: String, wanted: &'static str },
    #[error("TLS: certificate {} and key {} are not usable together: {reason}", cert.display(), key.display())]
    TlsPair { cert: PathBuf, key: PathBuf, reason: String },
    #[error("audit log {}: {source}", path.display())]
    Audit { path: PathBuf, source: io::Error },
    #[error("audit log {}: {source}", path.display())]
    Broken { path: PathBuf, source: Broken },
    #[error("{0}")]
    Volume(#[from] volume::Error),
    #[error("--mdns: {0}")]
    Mdns(#[from] NotLocal),
    #[error("{what} failed: {source}")]
    System { what: &'static str, source: io::Error },
}

fn listen_advice(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::AddrInUse => "another program has this port: stop it, or choose another",
        io::ErrorKind::PermissionDenied => {
            "ports below 1024 need CAP_NET_BIND_SERVICE: choose a higher one"
        }
        io::ErrorKind::AddrNotAvailable => {
            "this machine does not have this address: choose another"
        }
        _ => "choose another address",
    }
}

impl Error {
    /// Documented in `--help`.
    pub(crate) fn exit_code(&self) -> ExitCode {
        match self {
            Self::System { .. } => ExitCode::from(1),
            Self::Mdns(_) => ExitCode::from(2),
            Self::Store { .. } => ExitCode::from(3),
            Self::Listen { .. } => ExitCode::from(4),
            Self::TlsFile { .. } | Self::TlsPair { .. } => ExitCode::from(5),
            Self::Audit { .. } => ExitCode::from(6),
            Self::Broken { .. } => ExitCode::from(7),
            Self::Volume(volume::Error::NoneSuch(_) | volume::Error::Unclear(_)) => {
                ExitCode::from(8)
            }
            Self::Volume(_) => ExitCode::from(9),
        }
    }
}
