//! Whether what stands in an `ikto.json` can be meant: every check that needs nothing but the file.

use std::net::IpAddr;
use std::path::PathBuf;

use latchkey_config::mesh::url::{self, ServerUrl};
use latchkey_config::mesh::value::shown;
use latchkey_config::mesh::{Advertise, Keepalive, Login, MAX_SERVERS, Server, value};
use latchkey_wire::member::{Cidr, SignaturePolicy};

use super::document::{Document, Fault, KEYS};

/// Longest label; Ikto knows no bound.
const MAX_NAME: usize = 1024;
/// IFNAMSIZ, with its NUL.
const MAX_DEVICE_NAME: usize = 15;

/// An `ikto.json` that can be meant; paths are not opened so far.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Checked {
    pub(crate) name: String,
    pub(crate) mesh: Cidr,
    pub(crate) address: Cidr,
    pub(crate) advertise: Advertise,
    pub(crate) interface: String,
    pub(crate) port: u16,
    pub(crate) key: PathBuf,
    pub(crate) credentials: Option<PathBuf>,
    pub(crate) servers: Vec<Server>,
    /// What is in the URL.
    pub(crate) login: Login,
    pub(crate) bucket: String,
    pub(crate) signatures: SignaturePolicy,
    pub(crate) strict: bool,
    pub(crate) keepalive: Keepalive,
    pub(crate) mtu: Option<u32>,
    pub(crate) ca: Option<PathBuf>,
    /// Certificate and key.
    pub(crate) client: Option<(PathBuf, PathBuf)>,
    /// What works and is hardly meant, each a sentence.
    pub(crate) warnings: Vec<String>,
}

/// Looks up an environment variable.
pub(crate) type Environment<'e> = &'e dyn Fn(&str) -> Option<String>;

type Checking<T> = Result<T, Fault>;

/// # Errors
/// The first key that is wrong.
pub(crate) fn check(document: &Document, environment: Environment<'_>) -> Checking<Checked> {
    let mut warnings: Vec<String> = document.unknown.iter().filter_map(|key| nearly(key)).collect();
    let mesh = mesh(&document.mesh_cidr)?;
    let address = address(document, &mesh)?;
    if address.length() == mesh.length() {
        warnings.push(format!(
            "subnet_prefix: {} is as long as mesh_cidr's, so this node owns all of the mesh",
            address.length()
        ));
    }
    let urls = urls(&document.nats_url)?;
    let path = |text: &str| (!text.is_empty()).then(|| PathBuf::from(expand(text, environment)));
    let checked = Checked {
        name: name(&document.name)?,
        mesh,
        address,
        advertise: advertise(&document.advertise_address, &mesh, &mut warnings)?,
        interface: device(&document.wg_dev_name)?,
        port: port(document.wg_port)?,
        key: key(&document.private_key_path)?,
        credentials: path(&document.nats_creds),
        login: url::login(&urls).map_err(|why| fault("nats_url", why))?,
        servers: urls.into_iter().map(|url| url.server).collect(),
        bucket: bucket(&document.nats_kv)?,
        signatures: signatures(&document.signatures)?,
        strict: document.strict.unwrap_or(true),
        keepalive: keepalive(document.persistent_keepalive)?,
        mtu: mtu(document.mtu)?,
        ca: path(&document.nats_ca),
        client: match (path(&document.nats_cert), path(&document.nats_key)) {
            (None, None) => None,
            (Some(certificate), Some(key)) => Some((certificate, key)),
            (Some(_), None) => return Err(fault("nats_cert", "needs nats_key as well")),
            (None, Some(_)) => return Err(fault("nats_key", "needs nats_cert as well")),
        },
        warnings,
    };
    Ok(checked)
}

fn fault(key: &'static str, why: impl Into<String>) -> Fault {
    Fault::Key { key, why: why.into() }
}

/// A key that is nearly one of ours, which Ikto passes over as any other.
fn nearly(written: &str) -> Option<String> {
    let (nearest, distance) = latchkey_config::nearest_of(KEYS.into_iter(), written)?;
    (distance <= 2)
        .then(|| format!("unknown key {} has no effect; did you mean {nearest}?", shown(written)))
}

fn name(text: &str) -> Checking<String> {
    if text.len() > MAX_NAME || text.chars().any(char::is_control) {
        let why = format!("more than {MAX_NAME} bytes, or a control character in it");
        return Err(fault("name", why));
    }
    Ok(text.to_owned())
}

fn mesh(text: &str) -> Checking<Cidr> {
    let wrong = |why: &str| {
        fault("mesh_cidr", format!("{why}; write the range of the whole mesh, as fd10::/16"))
    };
    if text.is_empty() {
        return Err(wrong("missing"));
    }
    // Go's net.ParseCIDR takes leading zeros in the length.
    let plain = match text.split_once('/') {
        Some((address, length)) if length.starts_with('0') && length.len() > 1 => {
            let digits = length.trim_start_matches('0');
            format!("{address}/{}", if digits.is_empty() { "0" } else { digits })
        }
        _ => text.to_owned(),
    };
    let mesh: Cidr =
        plain.parse().map_err(|_| wrong(&format!("{} is not ADDRESS/LENGTH", shown(text))))?;
    if mesh.length() == 0 {
        return Err(wrong(&format!(
            "{text} is every address there is, and its route the default route"
        )));
    }
    if mesh.length() == bits(mesh.address()) {
        return Err(wrong(&format!("{text} is one address")));
    }
    Ok(mesh.masked())
}

fn bits(address: IpAddr) -> u8 {
    Cidr::host(address).length()
}

/// The node's address with the length of the prefix that it owns.
fn address(document: &Document, mesh: &Cidr) -> Checking<Cidr> {
    const KEY: &str = "private_address";
    let text = &document.private_address;
    let wrong = |why: String| {
        fault(
            KEY,
            format!(
                "{why}; write this node's address in mesh_cidr {mesh} (`latchkey init` draws one)"
            ),
        )
    };
    if text.is_empty() {
        return Err(wrong("missing".into()));
    }
    let address: IpAddr =
        text.parse().map_err(|_| wrong(format!("{} is not an IP address", shown(text))))?;
    // As Ikto: in an IPv4 mesh the mapped form is the address itself.
    let address = if mesh.address().is_ipv4() { address.to_canonical() } else { address };
    if address.is_ipv4() != mesh.address().is_ipv4() {
        let family = |address: IpAddr| if address.is_ipv4() { "IPv4" } else { "IPv6" };
        return Err(wrong(format!(
            "{address} is {}, and the mesh is {}",
            family(address),
            family(mesh.address())
        )));
    }
    if !mesh.contains(address) {
        return Err(wrong(format!("{address} is not in the mesh")));
    }
    prefix(document.subnet_prefix, address, mesh)
}

fn prefix(length: i64, address: IpAddr, mesh: &Cidr) -> Checking<Cidr> {
    let wrong = |why: String| {
        let why = format!(
            "{why}; write the length of the range that this node owns, {} to {}",
            mesh.length().saturating_add(1),
            bits(address)
        );
        fault("subnet_prefix", why)
    };
    if length == 0 {
        return Err(wrong("missing, or 0, which is every address there is".into()));
    }
    let owned = u8::try_from(length).ok().and_then(|length| Cidr::new(address, length));
    match owned {
        Some(owned) if owned.length() >= mesh.length() => Ok(owned),
        Some(_) => Err(wrong(format!("{length} is wider than the mesh {mesh}"))),
        None => {
            Err(wrong(format!("{length} is no length of an address of {} bits", bits(address))))
        }
    }
}

fn advertise(text: &str, mesh: &Cidr, warnings: &mut Vec<String>) -> Checking<Advertise> {
    const KEY: &str = "advertise_address";
    if text.is_empty() {
        return Err(fault(
            KEY,
            "missing; write the IP address or the DNS name under which others reach this node",
        ));
    }
    if let Ok(address) = text.parse::<IpAddr>()
        && address.to_canonical().is_loopback()
    {
        warnings.push(format!("{KEY}: {address} is a loopback address: only this host reaches it"));
        return Ok(Advertise::Address(address.to_canonical()));
    }
    match value::advertise(text) {
        Ok(Advertise::Address(address)) => {
            if mesh.contains(address) {
                warnings.push(format!(
                    "{KEY}: {address} is inside the mesh {mesh}: only those reach it who have a route of its own to it"
                ));
            }
            Ok(Advertise::Address(address))
        }
        Ok(advertise) => Ok(advertise),
        Err(why) => Err(fault(KEY, why)),
    }
}

/// What the kernel takes (dev_valid_name).
fn device(text: &str) -> Checking<String> {
    let fits = (1..=MAX_DEVICE_NAME).contains(&text.len())
        && !matches!(text, "." | "..")
        && !text.chars().any(|c| c == '/' || c == ':' || c.is_whitespace() || c.is_control());
    if fits {
        Ok(text.to_owned())
    } else {
        let why = format!(
            "{} is no interface name: 1 to {MAX_DEVICE_NAME} bytes without `/`, `:` and white space, as wg-ikto",
            shown(text)
        );
        Err(fault("wg_dev_name", why))
    }
}

fn port(port: i64) -> Checking<u16> {
    match u16::try_from(port) {
        Ok(0) => Err(fault(
            "wg_port",
            "missing, or 0, under which nobody can dial this node; WireGuard's is 51820",
        )),
        Ok(port) => Ok(port),
        Err(_) => Err(fault("wg_port", format!("{port} is no port, 1 to 65535"))),
    }
}

fn key(text: &str) -> Checking<PathBuf> {
    if text.is_empty() {
        return Err(fault(
            "private_key_path",
            "missing; make a key (wg genkey, mode 0600) and write the path of its file",
        ));
    }
    Ok(PathBuf::from(text))
}

/// As Go's client: several with commas between them, with or without a scheme; without a host, this one.
fn urls(text: &str) -> Checking<Vec<ServerUrl>> {
    const KEY: &str = "nats_url";
    const THIS_HOST: Option<&str> = Some("localhost");
    let parse = |part: &str| {
        let url = if part.contains("://") { part.to_owned() } else { format!("nats://{part}") };
        url::parse(&zeroize::Zeroizing::new(url), THIS_HOST).map_err(|why| fault(KEY, why))
    };
    let parts: Vec<&str> = text.split(',').map(str::trim).filter(|part| !part.is_empty()).collect();
    if parts.len() > MAX_SERVERS {
        return Err(fault(KEY, format!("more than {MAX_SERVERS} servers")));
    }
    if parts.is_empty() {
        return Ok(vec![parse("nats://")?]);
    }
    parts.into_iter().map(parse).collect()
}

fn bucket(text: &str) -> Checking<String> {
    if text.is_empty() {
        return Err(fault("nats_kv", "missing; Ikto's customary bucket is ikto-mesh"));
    }
    value::bucket(text).map_err(|why| fault("nats_kv", why))
}

fn signatures(text: &str) -> Checking<SignaturePolicy> {
    match text {
        "" => Ok(SignaturePolicy::default()),
        "require" => Ok(SignaturePolicy::Require),
        "prefer" => Ok(SignaturePolicy::Prefer),
        "ignore" => Ok(SignaturePolicy::Ignore),
        _ => Err(fault(
            "signatures",
            format!("{} is neither require, prefer nor ignore", shown(text)),
        )),
    }
}

fn keepalive(seconds: Option<i64>) -> Checking<Keepalive> {
    match seconds.map(u16::try_from) {
        None => Ok(Keepalive::Auto),
        Some(Ok(0)) => Ok(Keepalive::Off),
        Some(Ok(seconds)) => Ok(Keepalive::Every(seconds)),
        Some(Err(_)) => Err(fault(
            "persistent_keepalive",
            "not a number of seconds, 0 to 65535; 0 is off, and without the key a node behind a NAT has 25",
        )),
    }
}

fn mtu(mtu: i64) -> Checking<Option<u32>> {
    if mtu == 0 {
        return Ok(None);
    }
    value::mtu(&mtu.to_string()).map(Some).map_err(|why| fault("mtu", why))
}

/// `$NAME`, `${NAME}` and a `~` in front, as Go's client takes them (`os.ExpandEnv`).
fn expand(text: &str, environment: Environment<'_>) -> String {
    let mut expanded = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('$') {
        expanded.push_str(before);
        let (name, after) = variable(after);
        match name {
            // A lone `$` stays, as in Go.
            None => expanded.push('$'),
            Some(name) => expanded.push_str(&environment(name).unwrap_or_default()),
        }
        rest = after;
    }
    expanded.push_str(rest);
    match expanded.strip_prefix('~') {
        Some(below) => {
            let home = environment("HOME").unwrap_or_default();
            format!("{}/{}", home.trim_end_matches('/'), below.trim_start_matches('/'))
        }
        None => expanded,
    }
}

/// The name that follows a `$`, and what is behind it. In braces anything, else letters, digits and `_`.
fn variable(text: &str) -> (Option<&str>, &str) {
    if let Some((name, after)) = text.strip_prefix('{').and_then(|inner| inner.split_once('}')) {
        return (Some(name), after);
    }
    let end = text.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(text.len());
    match text.split_at_checked(end) {
        Some((name, after)) if !name.is_empty() => (Some(name), after),
        _ => (None, text),
    }
}
