//! `latchkey.mesh`: which mesh this machine has an identity in ([`Mesh`]), and what makes it a member there ([`Membership`]).
//!
//! The second is the agent's. It is read and checked when the agent asks for it: no disk stays closed because of a port for
//! metrics, and no code for it is in the initramfs. What is named by a path is not opened here at all.

pub mod url;
pub mod value;

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use zeroize::Zeroizing;

use crate::error::{ConfigError, Place};
use crate::keys::{
    ADVERTISE_ADDRESS, ADVERTISE_INTERFACE, BUCKET, CREDENTIALS, MESH, REGISTRY, REGISTRY_CA,
    REGISTRY_CERTIFICATE, REGISTRY_KEY,
};
use crate::layer::{Change, Statement};
use crate::prefix::Prefix;
use crate::settings::Settings;
use crate::value::{Setting, Unread};

/// WireGuard's customary port.
pub const DEFAULT_MESH_PORT: u16 = 51820;
pub const DEFAULT_MESH_INTERFACE: &str = "wg-latchkey";
/// Ikto's.
pub const DEFAULT_BUCKET: &str = "ikto-mesh";
/// A stream's name has 255 bytes at most (nats-server, JSMaxNameLen), and begins with `KV_`.
pub const MAX_BUCKET: usize = 252;
/// Each is tried in turn; nobody has more.
pub const MAX_SERVERS: usize = 16;

/// `latchkey.mesh`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mesh {
    /// 1 to 64 characters of `[A-Za-z0-9._-]`: separates the identities of one machine in several meshes.
    pub network: String,
    pub prefix: Prefix,
    pub port: u16,
    pub interface: String,
}

/// `latchkey.mesh`, all of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Membership {
    pub mesh: Mesh,
    /// None: the host's name.
    pub name: Option<String>,
    /// None: a device with no peers.
    pub registry: Option<Registry>,
    pub advertise: Advertise,
    pub keepalive: Keepalive,
    /// 1280 to 65455. None: what the path allows.
    pub mtu: Option<u32>,
    pub signatures: Signatures,
    pub metrics: Option<SocketAddr>,
}

/// Where the others are told to reach this node.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Advertise {
    Address(IpAddr),
    /// A DNS name, looked up now and then.
    Name(String),
    /// The first global address of this interface.
    Interface(String),
    /// The address from which the host reaches the registry, or else its default route.
    #[default]
    Route,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Keepalive {
    /// On if the node is behind a NAT: if the advertised address is none of this host's own, or a private one while peers
    /// advertise public ones.
    #[default]
    Auto,
    Off,
    /// Seconds, 1 to 65535.
    Every(u16),
}

/// Whether records of the registry must be signed by their node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Signatures {
    Require,
    #[default]
    Prefer,
    Ignore,
}

/// A NATS JetStream key-value bucket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Registry {
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
    /// A name or an address, IPv6 without brackets.
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

impl From<Mesh> for Membership {
    /// Of which nothing else is said.
    fn from(mesh: Mesh) -> Self {
        Self {
            mesh,
            name: None,
            registry: None,
            advertise: Advertise::default(),
            keepalive: Keepalive::default(),
            mtu: None,
            signatures: Signatures::default(),
            metrics: None,
        }
    }
}

impl Secret {
    #[must_use]
    pub fn new(text: &str) -> Self {
        Self(Zeroizing::new(text.to_owned()))
    }
}

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

pub(crate) fn of(settings: &Settings) -> Result<Option<Mesh>, ConfigError> {
    let Some(place) = settings.mesh() else { return Ok(None) };
    // What is missing may be there under a name with a typing error in it.
    let missing = |missing| match settings.unknown_in_mesh().first() {
        Some(unknown) => unknown.clone().into(),
        None => ConfigError::Missing { place: place.clone(), key: MESH.to_owned(), missing },
    };
    let Some(network) = text(settings, "latchkey.mesh.network") else {
        return Err(missing("latchkey.mesh.network"));
    };
    let Some((Setting::Prefix(prefix), _)) = settings.get("latchkey.mesh.prefix") else {
        return Err(missing("latchkey.mesh.prefix"));
    };
    Ok(Some(Mesh {
        network,
        prefix: *prefix,
        port: match settings.get("latchkey.mesh.port") {
            Some((Setting::Port(port), _)) => *port,
            _ => DEFAULT_MESH_PORT,
        },
        interface: text(settings, "latchkey.mesh.interface")
            .unwrap_or_else(|| DEFAULT_MESH_INTERFACE.to_owned()),
    }))
}

/// Reads what was left unread. Files of `roots` are told by the paths that they have there.
pub(crate) fn membership(
    settings: &Settings,
    roots: &[PathBuf],
) -> Result<Option<Membership>, ConfigError> {
    if let Some(unknown) = settings.unknown_in_mesh().first() {
        return Err(unknown.clone().into());
    }
    let Some(mesh) = of(settings)? else { return Ok(None) };
    let settings = &read(settings, roots)?;
    let mut membership = Membership::from(mesh);
    membership.name = text(settings, "latchkey.mesh.name");
    membership.registry = registry(settings)?;
    membership.advertise = advertise(settings, &membership.mesh)?;
    if let Some((Setting::Keepalive(keepalive), _)) = settings.get("latchkey.mesh.keepalive") {
        membership.keepalive = *keepalive;
    }
    if let Some((Setting::Mtu(mtu), _)) = settings.get("latchkey.mesh.mtu") {
        membership.mtu = Some(*mtu);
    }
    if let Some((Setting::Signatures(signatures), _)) = settings.get("latchkey.mesh.signatures") {
        membership.signatures = *signatures;
    }
    if let Some((Setting::Socket(address), _)) = settings.get("latchkey.mesh.metrics") {
        membership.metrics = Some(*address);
    }
    Ok(Some(membership))
}

/// The agent's settings, each value of each source read, and then merged as all are.
fn read(settings: &Settings, roots: &[PathBuf]) -> Result<Settings, ConfigError> {
    let mut read = Settings::default();
    for (key, kind, values) in settings.unread() {
        for Unread { node, place } in values {
            let mut setting = kind.read(node).map_err(|fault| fault.at(key, node, place))?;
            if let Setting::Pem(Some(Pem::File(path))) = &mut setting {
                *path = crate::certificate::located(path, place, roots);
            }
            read.apply(Statement { key, change: Change::Set(setting), place: place.clone() })?;
        }
    }
    Ok(read)
}

/// An empty text is how templates say "none".
fn text(settings: &Settings, key: &str) -> Option<String> {
    match settings.get(key) {
        Some((Setting::Text(text), _)) if !text.is_empty() => Some(text.clone()),
        _ => None,
    }
}

fn pem<'s>(settings: &'s Settings, key: &str) -> Option<(&'s Pem, &'s Place)> {
    match settings.get(key) {
        Some((Setting::Pem(Some(pem)), place)) => Some((pem, place)),
        _ => None,
    }
}

fn registry(settings: &Settings) -> Result<Option<Registry>, ConfigError> {
    let Some((Setting::Registry { urls, .. }, place)) = settings.get(REGISTRY) else {
        let of_a_registry = [CREDENTIALS, BUCKET, REGISTRY_CA, REGISTRY_CERTIFICATE, REGISTRY_KEY];
        let lonely = of_a_registry.iter().find_map(|key| Some((*key, settings.get(key)?.1)));
        return match lonely {
            Some((key, place)) => Err(needs(key, place, REGISTRY)),
            None => Ok(None),
        };
    };
    if urls.is_empty() {
        return Ok(None);
    }
    let login = match (pem(settings, CREDENTIALS), url::login(urls)) {
        (_, Err(why)) => return Err(invalid(REGISTRY, place, why)),
        (Some((_, second)), Ok(login)) if login != Login::None => {
            return Err(ConfigError::Conflict {
                first_key: format!("user, password or token in the URL of {REGISTRY}"),
                first: place.clone(),
                second_key: CREDENTIALS.to_owned(),
                second: second.clone(),
            });
        }
        (Some((Pem::File(path), _)), _) => Login::CredentialsFile(path.clone()),
        (Some((Pem::Text(text), _)), _) => Login::Credentials(text.clone()),
        (None, Ok(login)) => login,
    };
    let (certificate, key) = (pem(settings, REGISTRY_CERTIFICATE), pem(settings, REGISTRY_KEY));
    match (certificate, key) {
        (Some((_, place)), None) => return Err(needs(REGISTRY_CERTIFICATE, place, REGISTRY_KEY)),
        (None, Some((_, place))) => return Err(needs(REGISTRY_KEY, place, REGISTRY_CERTIFICATE)),
        _ => {}
    }
    Ok(Some(Registry {
        servers: urls.iter().map(|url| url.server.clone()).collect(),
        bucket: text(settings, BUCKET).unwrap_or_else(|| DEFAULT_BUCKET.to_owned()),
        login,
        tls: Tls {
            ca: pem(settings, REGISTRY_CA).map(|(pem, _)| pem.clone()),
            certificate: certificate.map(|(pem, _)| pem.clone()),
            key: key.map(|(pem, _)| pem.clone()),
        },
    }))
}

fn advertise(settings: &Settings, mesh: &Mesh) -> Result<Advertise, ConfigError> {
    let address = match settings.get(ADVERTISE_ADDRESS) {
        Some((Setting::Advertise(advertise), place)) => Some((advertise, place)),
        _ => None,
    };
    let interface = text(settings, ADVERTISE_INTERFACE).zip(settings.get(ADVERTISE_INTERFACE));
    match (address, interface) {
        (Some((_, first)), Some((_, (_, second)))) => Err(ConfigError::Conflict {
            first_key: ADVERTISE_ADDRESS.to_owned(),
            first: first.clone(),
            second_key: ADVERTISE_INTERFACE.to_owned(),
            second: second.clone(),
        }),
        (Some((Advertise::Address(address), place)), None) if mesh.prefix.contains(*address) => {
            let why = format!(
                "{address} is inside the mesh {}; write the address under which this machine is reached without it",
                mesh.prefix
            );
            Err(invalid(ADVERTISE_ADDRESS, place, why))
        }
        (Some((advertise, _)), None) => Ok(advertise.clone()),
        (None, Some((interface, (_, place)))) if interface == mesh.interface => {
            let why = format!(
                "{interface} is the mesh's own device; write the interface that leads to the others without it"
            );
            Err(invalid(ADVERTISE_INTERFACE, place, why))
        }
        (None, Some((interface, _))) => Ok(Advertise::Interface(interface)),
        (None, None) => Ok(Advertise::Route),
    }
}

fn needs(key: &str, place: &Place, missing: &'static str) -> ConfigError {
    ConfigError::Missing { place: place.clone(), key: key.to_owned(), missing }
}

fn invalid(key: &str, place: &Place, why: String) -> ConfigError {
    ConfigError::Invalid { place: place.clone(), key: key.to_owned(), why }
}
