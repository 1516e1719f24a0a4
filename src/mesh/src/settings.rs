//! What one agent is told to do, whoever says it: an `ikto.json` ([`crate::ikto`]) or the machine's cloud-config.

use std::net::SocketAddr;
use std::path::PathBuf;

use latchkey_config::Membership;
use latchkey_config::mesh::Signatures;
use latchkey_wire::member::{Cidr, SignaturePolicy};

pub use latchkey_config::mesh::{
    Advertise, Keepalive, Login, Pem, Registry as RegistrySettings, Secret, Server, Tls,
};

use crate::error::{Error, Result};

/// Where the admin service listens.
pub const DEFAULT_SOCKET: &str = "/run/latchkey/agent/admin.sock";
/// Likewise with an `ikto.json`: where `ikto info` looks for it.
pub const DEFAULT_IKTO_SOCKET: &str = "/tmp/ikto.sock";
/// Where the last known members are kept.
pub const STATE_DIRECTORY: &str = "/var/lib/latchkey";
/// Seconds; what wg(8) suggests for NAT.
pub const DEFAULT_KEEPALIVE: u16 = 25;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Published as it is; the host's name where nothing else is said.
    pub name: String,
    /// The whole mesh, host bits cleared.
    pub mesh: Cidr,
    pub address: AddressFrom,
    pub key: KeyFrom,
    pub advertise: Advertise,
    pub interface: String,
    pub port: u16,
    pub keepalive: Keepalive,
    /// None: what the path allows.
    pub mtu: Option<u32>,
    /// None: a device with no peers.
    pub registry: Option<RegistrySettings>,
    pub signatures: SignaturePolicy,
    /// Whether a record must lie in the mesh and stand under its own key. Ikto asks for neither.
    pub strict_records: bool,
    pub metrics: Option<SocketAddr>,
    /// Where the last known members are kept.
    pub cache: PathBuf,
    /// The admin service's socket.
    pub socket: PathBuf,
}

/// Where the node's mesh address comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AddressFrom {
    /// As configured, with the length of the prefix that the node owns. If it is taken, that is an error.
    Fixed(Cidr),
    /// From the public key ([`crate::address`]); if one is taken, the next. The node owns that one address.
    Key,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeyFrom {
    /// `private_key_path`: base64, white space around it ignored.
    File(PathBuf),
    /// The identity that the initramfs made for this network.
    HandOver { network: String },
}

/// What `latchkey.mesh` says.
///
/// # Errors
/// [`Error::MeshPrefix`] for a range without room for addresses.
pub fn from_cloud_config(membership: &Membership) -> Result<Settings> {
    let Membership { mesh, .. } = membership;
    let network = mesh.prefix.network();
    let range = Cidr::new(network, mesh.prefix.bits())
        .ok_or(Error::MeshPrefix { mesh: Cidr::host(network) })?;
    Ok(Settings {
        name: membership.name.clone().unwrap_or_else(host_name),
        mesh: range,
        address: AddressFrom::Key,
        key: KeyFrom::HandOver { network: mesh.network.clone() },
        advertise: membership.advertise.clone(),
        interface: mesh.interface.clone(),
        port: mesh.port,
        keepalive: membership.keepalive,
        mtu: membership.mtu,
        registry: membership.registry.clone(),
        signatures: policy(membership.signatures),
        strict_records: true,
        metrics: membership.metrics,
        cache: PathBuf::from(STATE_DIRECTORY).join(format!("mesh-{}.json", mesh.network)),
        socket: PathBuf::from(DEFAULT_SOCKET),
    })
}

pub(crate) fn policy(signatures: Signatures) -> SignaturePolicy {
    match signatures {
        Signatures::Require => SignaturePolicy::Require,
        Signatures::Prefer => SignaturePolicy::Prefer,
        Signatures::Ignore => SignaturePolicy::Ignore,
    }
}

/// Empty where the host has none, which is a label as any other.
fn host_name() -> String {
    const NOT_SET: &str = "(none)"; // CONFIG_DEFAULT_HOSTNAME
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    match name.trim() {
        NOT_SET => String::new(),
        name => name.to_owned(),
    }
}

#[cfg(test)]
mod tests;
