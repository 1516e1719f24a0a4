//! What can go wrong in `latchkey`, and the exit code of each kind.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use latchkey_config::ConfigError;
use latchkey_wire::member::Cidr;

use crate::registry::RegistryError;

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The registry is away, refuses, or is not what it should be.
pub const EXIT_REGISTRY: u8 = 66;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Config(#[from] ConfigError),

    #[error(
        "no mesh is configured: the cloud-config has no latchkey.mesh; write one (network, \
         prefix) to join a mesh"
    )]
    NotConfigured,

    #[error(
        "the prefix {mesh} is no mesh: take a length of 1 to 30 (IPv4) or 1 to 126 \
         (IPv6), so that there is room for addresses beside all zeros and all ones"
    )]
    MeshPrefix { mesh: Cidr },

    #[error("{}: {reason}", path.display())]
    Ikto { path: PathBuf, reason: String },

    #[error("{argument}: {reason}")]
    Argument { argument: &'static str, reason: String },

    #[error("the system has no random numbers: {source}")]
    Random { source: getrandom::Error },

    #[error("cannot say where others reach this node: {reason}")]
    Advertise { reason: String },

    #[error("not a WireGuard public key: it is 32 bytes in base64")]
    PublicKey,

    #[error(
        "{path} is no WireGuard private key: 32 bytes in base64, as `wg genkey` prints them, and \
         nothing else"
    )]
    BadKeyFile { path: PathBuf },

    #[error(
        "the mesh address {range} is taken: {key} in the registry is the record of {holder}; give \
         this node another address, or delete that record if its node is gone"
    )]
    AddressTaken { range: Cidr, key: String, holder: String },

    #[error("this machine has no mesh identity: {reason}")]
    NoIdentity { reason: String },

    #[error(
        "the mesh identity in {path} is not usable: {reason}; it is made anew at each boot, so \
         reboot"
    )]
    BadIdentity { path: PathBuf, reason: String },

    #[error(
        "{path} cannot be understood: {reason}; was it written by another version of \
         kcrypt-discovery-challenger?"
    )]
    BadTimeline { path: PathBuf, reason: String },

    #[error(
        "the mesh identity was made for network {handed_over:?}, but latchkey.mesh.network is \
         {configured:?}: the key of one network is never used in another; reboot to get the key \
         of {configured:?}"
    )]
    OtherNetwork { handed_over: String, configured: String },

    #[error("cannot {action} {path}: {source}")]
    File { action: &'static str, path: PathBuf, source: io::Error },

    #[error("cannot {action}: not permitted; run it as root (the device needs CAP_NET_ADMIN)")]
    NotPermitted { action: String },

    #[error(
        "cannot {action}: this kernel has no WireGuard ({source}), and {userspace}; install the \
         wireguard kernel module and load it (modprobe wireguard), or install wireguard-go"
    )]
    NoWireGuard { action: String, source: io::Error, userspace: String },

    #[error(
        "interface {interface} exists, but is {kind}, not a WireGuard device; give \
         latchkey.mesh.interface another name, or remove it (ip link delete {interface})"
    )]
    NotWireGuard { interface: String, kind: String },

    #[error(
        "WireGuard port {port} is taken by another program; free it or change latchkey.mesh.port"
    )]
    PortTaken { port: u16 },

    #[error("cannot give {interface} the address {address}: {source}{}", family_hint(.address))]
    Address { interface: String, address: IpAddr, source: io::Error },

    #[error("an agent is running; stop it first (systemctl stop latchkey)")]
    AgentRunning,

    #[error(
        "an agent answers on {path} (the socket's owner is user {owner}); stop it, or give this one another socket \
         (--socket)"
    )]
    SocketTaken { path: PathBuf, owner: u32 },

    #[error("{path} exists and is no socket; remove it, or give the agent another path (--socket)")]
    NotASocket { path: PathBuf },

    #[error(
        "the socket cannot be in {path}: anybody may remove it there and put another in its place; take another \
         directory (--socket), or set this one's sticky bit (chmod +t)"
    )]
    UnsafeDirectory { path: PathBuf },

    #[error(
        "no agent answers on {path}: {source}; is it running (systemctl status latchkey), and is that its socket \
         (--socket)?"
    )]
    NoAgent { path: PathBuf, source: io::Error },

    #[error("the agent on {path} cannot be asked: {reason}")]
    Agent { path: PathBuf, reason: String },

    #[error(
        "cannot serve metrics on {address}: {source}; give --metrics or latchkey.mesh.metrics another address"
    )]
    Metrics { address: SocketAddr, source: io::Error },

    #[error("cannot {action}: {source}")]
    Kernel { action: String, source: io::Error },

    #[error("cannot write the answer: {0}")]
    Output(#[source] io::Error),

    #[error("cannot put the answer into JSON: {0}")]
    Json(#[from] serde_json::Error),

    #[error("no registry is configured; write latchkey.mesh.registry")]
    NoRegistry,

    #[error(transparent)]
    Registry(#[from] RegistryError),

    #[error("the registry's {what} is not usable: {reason}")]
    RegistrySettings { what: String, reason: String },

    #[error("cannot tell systemd about the state of the service over $NOTIFY_SOCKET: {source}")]
    Notify { source: io::Error },
}

impl Error {
    /// The exit code of the program. The numbers below 60 mean the same as in
    /// kcrypt-discovery-challenger.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::PublicKey
            | Self::File { .. }
            | Self::BadTimeline { .. }
            | Self::AgentRunning
            | Self::Random { .. }
            | Self::SocketTaken { .. }
            | Self::NotASocket { .. }
            | Self::UnsafeDirectory { .. }
            | Self::NoAgent { .. }
            | Self::Agent { .. }
            | Self::Metrics { .. }
            | Self::Output(_)
            | Self::Json(_)
            | Self::Notify { .. } => 1,
            Self::Argument { .. } => 2,
            Self::Config(_)
            | Self::Ikto { .. }
            | Self::BadKeyFile { .. }
            | Self::NotConfigured
            | Self::NoRegistry
            | Self::MeshPrefix { .. }
            | Self::OtherNetwork { .. }
            | Self::RegistrySettings { .. } => 10,
            Self::NoIdentity { .. } | Self::BadIdentity { .. } => 50,
            Self::NotPermitted { .. } => 60,
            Self::NoWireGuard { .. } => 61,
            Self::NotWireGuard { .. } => 62,
            Self::PortTaken { .. } => 63,
            Self::Address { .. } | Self::Advertise { .. } | Self::Kernel { .. } => 64,
            Self::AddressTaken { .. } => 65,
            Self::Registry(_) => EXIT_REGISTRY,
        }
    }
}

fn family_hint(address: &IpAddr) -> &'static str {
    if address.is_ipv6() {
        "; is IPv6 switched off (net.ipv6.conf.all.disable_ipv6, ipv6.disable=1)?"
    } else {
        ""
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Scripts and units rely on them; `latchkey(8)` is the one place where they are told.
    #[test]
    fn exit_codes_are_documented() {
        let source = || io::Error::from(io::ErrorKind::NotFound);
        let (path, text) = (|| PathBuf::from("/x"), String::new);
        let help = crate::cli::command().get_after_help().unwrap().to_string();
        for (error, code) in [
            (Error::AgentRunning, 1),
            (Error::NoAgent { path: path(), source: source() }, 1),
            (Error::Argument { argument: "-x", reason: text() }, 2),
            (Error::NotConfigured, 10),
            (Error::Ikto { path: path(), reason: text() }, 10),
            (Error::NoIdentity { reason: text() }, 50),
            (Error::NotPermitted { action: text() }, 60),
            (Error::NoWireGuard { action: text(), source: source(), userspace: text() }, 61),
            (Error::NotWireGuard { interface: text(), kind: text() }, 62),
            (Error::PortTaken { port: 1 }, 63),
            (Error::Kernel { action: text(), source: source() }, 64),
            (
                Error::AddressTaken {
                    range: "fd10::/48".parse().unwrap(),
                    key: text(),
                    holder: text(),
                },
                65,
            ),
            (RegistryError::LostRace { key: text() }.into(), 66),
        ] {
            assert_eq!(error.exit_code(), code, "{error}");
            assert!(help.lines().any(|line| line.starts_with(&format!("{code:4}  "))), "{code}");
        }
    }
}
