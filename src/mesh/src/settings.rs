//! What one agent is told to do, whoever says it: an `ikto.json` ([`crate::ikto`]) or the machine's cloud-config.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use latchkey_wire::member::{Cidr, SignaturePolicy};
use zeroize::Zeroizing;

use crate::error::{Error, Result};

#[derive(Debug, Clone)]
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

/// Where the others are told to reach this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Advertise {
    Address(IpAddr),
    /// Looked up now and then, here and by whoever knows [`latchkey_wire::member::Extension`].
    Name(String),
    /// The first global address of this interface.
    Interface(String),
    /// The address from which the host reaches the registry, or else its default route.
    Route,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Keepalive {
    /// [`DEFAULT_KEEPALIVE`] if the advertised address is none of this host's own, or a private one while peers advertise
    /// public ones: it is behind a NAT then. Otherwise off.
    #[default]
    Auto,
    Off,
    /// Seconds, 1 to 65535.
    Every(u16),
}

/// Seconds; what wg(8) suggests for NAT.
pub const DEFAULT_KEEPALIVE: u16 = 25;

/// A NATS JetStream key-value bucket.
#[derive(Debug, Clone)]
pub struct RegistrySettings {
    /// At least one.
    pub servers: Vec<Server>,
    /// `[A-Za-z0-9_-]+`.
    pub bucket: String,
    pub login: Login,
    pub tls: Tls,
}

/// A server's address, without user, password and token, so that it can be shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Server {
    pub host: String,
    pub port: u16,
    /// `tls://`.
    pub tls: bool,
}

/// Wiped when dropped, never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(pub Zeroizing<String>);

/// How the agent says who it is. In addition to a client certificate, if there is one.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Login {
    #[default]
    None,
    /// A `.creds` file: user JWT and seed. Read again at each connection.
    CredentialsFile(PathBuf),
    /// Its text.
    Credentials(Secret),
    Password {
        user: String,
        password: Secret,
    },
    Token(Secret),
}

/// TLS is used if a server is `tls://`, asks for it, or anything here is given.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Tls {
    /// In the place of the system's: PEM, a path or the text itself.
    pub ca: Option<Pem>,
    /// The client's certificate and key: both or none.
    pub certificate: Option<Pem>,
    pub key: Option<Pem>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Pem {
    File(PathBuf),
    Text(Secret),
}

/// What `latchkey.mesh` says.
///
/// # Errors
/// [`Error::MeshPrefix`].
pub fn from_cloud_config(mesh: &latchkey_config::Mesh) -> Result<Settings> {
    let prefix = mesh.prefix;
    Ok(Settings {
        name: String::new(),
        mesh: Cidr::new(prefix.network(), prefix.bits())
            .ok_or(Error::MeshPrefix { mesh: Cidr::host(prefix.network()) })?,
        address: AddressFrom::Key,
        key: KeyFrom::HandOver { network: mesh.network.clone() },
        advertise: Advertise::Route,
        interface: mesh.interface.clone(),
        port: mesh.port,
        keepalive: Keepalive::Auto,
        mtu: None,
        registry: None,
        signatures: SignaturePolicy::default(),
        strict_records: true,
        metrics: None,
        cache: format!("/var/lib/latchkey/mesh-{}.json", mesh.network).into(),
        socket: DEFAULT_SOCKET.into(),
    })
}

/// Where the admin service listens.
pub const DEFAULT_SOCKET: &str = "/run/latchkey/agent/admin.sock";

/// Likewise with an `ikto.json`: where `ikto info` looks for it.
pub const DEFAULT_IKTO_SOCKET: &str = "/tmp/ikto.sock";

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(hidden)")
    }
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls { "tls" } else { "nats" };
        if self.host.contains(':') {
            write!(f, "{scheme}://[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{scheme}://{}:{}", self.host, self.port)
        }
    }
}
