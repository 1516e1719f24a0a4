//! The values that keys below `latchkey.mesh` may have, each from its text.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use super::{Advertise, Keepalive, MAX_BUCKET, MAX_SERVERS, Pem, Secret, Signatures, url};
use crate::value::{Fault, MAX_PEM, Setting, bounded, interface, invalid, is_host, scalar, string};
use crate::yaml::{self, Node};

/// Longest label of a node, in bytes. A host's name has 64 at most.
pub const MAX_NAME: usize = 128;
/// IPv6 asks for it of every link (RFC 8200 §5).
const MIN_MTU: u32 = 1280;
/// What WireGuard leaves of the largest UDP packet: 65535 - 40 (IPv6) - 8 (UDP) - 32.
const MAX_MTU: u32 = 65_455;

type Value<T> = Result<T, String>;

/// What an agent's setting is, and with it what it must look like.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Kind {
    /// A label.
    Name,
    /// URL of a NATS server, or a list of them.
    Registry,
    Bucket,
    /// A path or the text itself.
    Pem(Content),
    AdvertiseAddress,
    Interface,
    Keepalive,
    Mtu,
    Signatures,
    /// An address and a port to listen on.
    Metrics,
}

impl Kind {
    pub(crate) fn read(self, node: &Node) -> Result<Setting, Fault> {
        match self {
            Self::Name => word(name(scalar(node, "a name")?), Setting::Text),
            Self::Registry => registry(node),
            Self::Bucket => word(bucket(scalar(node, "a name")?), Setting::Text),
            Self::Pem(content) => {
                let text = bounded(node, "PEM text or the path of a PEM file", MAX_PEM)?;
                word(pem(text, content), Setting::Pem)
            }
            Self::AdvertiseAddress => {
                word(advertise(string(node, "an IP address or a DNS name")?), Setting::Advertise)
            }
            Self::Interface => interface(string(node, "a name")?).map(Setting::Text),
            Self::Keepalive => {
                word(keepalive(scalar(node, "auto, off or seconds")?), Setting::Keepalive)
            }
            Self::Mtu => word(mtu(scalar(node, "a number of bytes")?), Setting::Mtu),
            Self::Signatures => {
                word(signatures(string(node, "require, prefer or ignore")?), Setting::Signatures)
            }
            Self::Metrics => {
                word(metrics(string(node, "ADDRESS:PORT, as 127.0.0.1:9586")?), Setting::Socket)
            }
        }
    }
}

fn word<T>(read: Value<T>, setting: impl Fn(T) -> Setting) -> Result<Setting, Fault> {
    read.map(setting).map_err(Fault::Invalid)
}

/// `""` alone: there is none.
fn registry(node: &Node) -> Result<Setting, Fault> {
    let server = |node: &Node| {
        url::parse(string(node, "a URL as tls://nats.example.org:4222")?, None)
            .map_err(Fault::Invalid)
    };
    match &node.value {
        yaml::Value::Sequence(items) if items.len() > MAX_SERVERS => {
            invalid(format!("more than {MAX_SERVERS} servers"))
        }
        yaml::Value::Sequence(items) => {
            let urls = items.iter().map(|item| server(item)).collect::<Result<_, _>>()?;
            Ok(Setting::Registry { urls, is_list: true })
        }
        yaml::Value::Scalar { text, .. } if text.is_empty() => {
            Ok(Setting::Registry { urls: Vec::new(), is_list: false })
        }
        _ => Ok(Setting::Registry { urls: vec![server(node)?], is_list: false }),
    }
}

/// What was written, for an error: quoted, and not without end.
#[must_use]
pub fn shown(text: &str) -> String {
    const LONGEST: usize = 64;
    match text.char_indices().nth(LONGEST).and_then(|(end, _)| text.get(..end)) {
        Some(start) => format!("{start:?}..."),
        None => format!("{text:?}"),
    }
}

pub(crate) fn name(text: &str) -> Value<String> {
    if text.len() > MAX_NAME || text.chars().any(char::is_control) {
        return Err(format!(
            "not a node's name: up to {MAX_NAME} bytes without control characters"
        ));
    }
    Ok(text.to_owned())
}

/// `[A-Za-z0-9_-]{1,252}`: the rule of NATS' libraries, and what is left of a stream's name.
///
/// # Errors
/// Says so in words.
pub fn bucket(text: &str) -> Value<String> {
    let fits = text.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-".contains(&b));
    if fits && (1..=MAX_BUCKET).contains(&text.len()) {
        Ok(text.to_owned())
    } else {
        Err(format!("not a bucket's name: 1 to {MAX_BUCKET} letters, digits, `_`, `-`"))
    }
}

/// An address or a DNS name under which others can reach a node.
///
/// # Errors
/// Says in words why nobody can.
pub fn advertise(text: &str) -> Value<Advertise> {
    if let Ok(address) = text.parse::<IpAddr>() {
        let address = address.to_canonical();
        return match unreachable(address) {
            Some(kind) => Err(format!(
                "{address} is {kind}; write the address under which others reach this machine"
            )),
            None => Ok(Advertise::Address(address)),
        };
    }
    if text.parse::<SocketAddr>().is_ok() || text.starts_with('[') {
        return Err(
            "an address with a port or in brackets; write the address alone, the port is that of WireGuard".into()
        );
    }
    let name = text.strip_suffix('.').unwrap_or(text);
    let last = name.rsplit('.').next().unwrap_or_default();
    if !is_host(text) || last.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(format!("{} is neither an IP address nor a DNS name", shown(text)));
    }
    if last.eq_ignore_ascii_case("localhost") {
        return Err(format!(
            "{} is each machine itself; write the name under which others reach this one",
            shown(text)
        ));
    }
    Ok(Advertise::Name(text.to_owned()))
}

/// What an address is that no other machine reaches this one by.
#[must_use]
pub fn unreachable(address: IpAddr) -> Option<&'static str> {
    match address {
        _ if address.is_unspecified() => Some("no address but all of a host's"),
        _ if address.is_loopback() => Some("a loopback address"),
        _ if address.is_multicast() => Some("a multicast address"),
        IpAddr::V4(v4) if v4.is_broadcast() => Some("the broadcast address"),
        IpAddr::V6(v6) if v6.is_unicast_link_local() => {
            Some("a link-local address, which means nothing without an interface")
        }
        _ => None,
    }
}

/// `auto`, `off` or seconds; 0 is off, as for wg(8).
pub(crate) fn keepalive(text: &str) -> Value<Keepalive> {
    match text {
        "auto" => Ok(Keepalive::Auto),
        "off" => Ok(Keepalive::Off),
        _ => match decimal(text).and_then(|seconds| u16::try_from(seconds).ok()) {
            Some(0) => Ok(Keepalive::Off),
            Some(seconds) => Ok(Keepalive::Every(seconds)),
            None => Err(format!("{} is neither auto nor off nor seconds, 1 to 65535", shown(text))),
        },
    }
}

/// 1280 to 65455.
///
/// # Errors
/// Says so in words.
pub fn mtu(text: &str) -> Value<u32> {
    match decimal(text) {
        Some(mtu @ MIN_MTU..=MAX_MTU) => Ok(mtu),
        _ => Err(format!("{} is no MTU of a mesh, {MIN_MTU} to {MAX_MTU}", shown(text))),
    }
}

fn decimal(text: &str) -> Option<u32> {
    let plain = !text.is_empty()
        && text.bytes().all(|byte| byte.is_ascii_digit())
        && (text == "0" || !text.starts_with('0'));
    text.parse().ok().filter(|_| plain)
}

pub(crate) fn signatures(text: &str) -> Value<Signatures> {
    match text {
        "require" => Ok(Signatures::Require),
        "prefer" => Ok(Signatures::Prefer),
        "ignore" => Ok(Signatures::Ignore),
        _ => Err(format!("{} is no policy for signatures: require, prefer or ignore", shown(text))),
    }
}

pub(crate) fn metrics(text: &str) -> Value<SocketAddr> {
    match text.parse::<SocketAddr>() {
        Ok(address) if address.port() != 0 => Ok(address),
        _ => Err(format!(
            "{} is not ADDRESS:PORT, as 127.0.0.1:9586, [::1]:9586 or, for everybody, [::]:9586",
            shown(text)
        )),
    }
}

/// What is in a PEM, and so what armour it must have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Content {
    /// User JWT and seed of NATS.
    Credentials,
    Certificates,
    PrivateKey,
}

/// A path as it is, or the text. Neither is in an error.
pub(crate) fn pem(text: &str, content: Content) -> Value<Option<Pem>> {
    let what = match content {
        Content::Credentials => "the text of a .creds file (-----BEGIN NATS USER JWT-----)",
        Content::Certificates => "PEM text (-----BEGIN CERTIFICATE-----)",
        Content::PrivateKey => "PEM text (-----BEGIN PRIVATE KEY-----)",
    };
    let neither = || format!("neither {what} nor an absolute path");
    if text.is_empty() {
        return Ok(None);
    }
    if !text.contains("-----BEGIN ") {
        let path = text.trim();
        if !path.starts_with('/') || path.chars().any(char::is_control) {
            return Err(neither());
        }
        return Ok(Some(Pem::File(PathBuf::from(path))));
    }
    let complete = match content {
        Content::Credentials => {
            armoured(text, |label| label == "NATS USER JWT") == Some(1)
                && armoured(text, |label| label == "USER NKEY SEED") == Some(1)
        }
        Content::Certificates => {
            crate::certificate::check(text)?;
            true
        }
        Content::PrivateKey => armoured(text, |label| label.ends_with("PRIVATE KEY")) == Some(1),
    };
    if !complete {
        return Err(format!("not complete: {what}, begun and ended on lines of their own, once"));
    }
    // NATS' libraries want a line end after the last line, which YAML's `|-` takes away.
    let end = if text.ends_with('\n') { "" } else { "\n" };
    Ok(Some(Pem::Text(Secret::new(&format!("{text}{end}")))))
}

/// How many blocks of a label stand in a text, each ended and not empty. `None`: one is not.
fn armoured(text: &str, wanted: impl Fn(&str) -> bool) -> Option<usize> {
    let mut count = 0_usize;
    let mut lines = text.lines().map(str::trim);
    while let Some(line) = lines.next() {
        let Some(label) = armour(line, "BEGIN ").filter(|label| wanted(label)) else { continue };
        let mut filled = false;
        loop {
            let line = lines.next()?;
            if armour(line, "END ").is_some_and(|end| end == label) {
                break;
            }
            filled |= !line.is_empty();
        }
        count = count.checked_add(filled.then_some(1)?)?;
    }
    Some(count)
}

/// The label of a line such as `-----BEGIN X-----`; NATS ends with `------END X------`.
fn armour<'l>(line: &'l str, side: &str) -> Option<&'l str> {
    let label = line.strip_prefix("-----")?.trim_matches('-').strip_prefix(side)?;
    line.ends_with("-----").then_some(label)
}
