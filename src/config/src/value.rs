//! The values a setting may have: numbers, durations, addresses, names; each from one YAML node.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::error::{ConfigError, Place};
use crate::mesh::url::ServerUrl;
use crate::mesh::value as mesh;
use crate::mesh::{Advertise, Keepalive, Pem, Signatures};
use crate::prefix::Prefix;
use crate::yaml::{Node, Value};
use crate::{MapperNames, Protocol};

/// What a setting is, and with it what it must look like.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Kind {
    /// URL of a document that continues the one it stands in.
    ConfigUrl,
    /// URL of a key server, or a list of them.
    Servers,
    /// NV index: TPM 2.0 Library Part 2 §7.2, handle type 0x01.
    NvIndex,
    /// Persistent object: handle type 0x81.
    Persistent,
    TpmDevice,
    Certificate,
    Flag,
    Labels,
    Pcrs,
    Protocol,
    Mapper,
    Duration,
    Network,
    Prefix,
    Port,
    Interface,
    /// Of the mesh's agent, which reads it later.
    Agent(mesh::Kind),
}

/// No secret is shown by `{:?}`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Setting {
    Text(String),
    Handle(u32),
    Flag(bool),
    /// Of texts; a later file's is united with it.
    List(Vec<String>),
    Pcrs(Vec<u8>),
    Protocol(Protocol),
    Mapper(MapperNames),
    Duration(Duration),
    Prefix(Prefix),
    Port(u16),
    /// What each source says, in their order.
    Unread(Vec<Unread>),
    Registry {
        urls: Vec<ServerUrl>,
        is_list: bool,
    },
    Pem(Option<Pem>),
    Advertise(Advertise),
    Keepalive(Keepalive),
    Mtu(u32),
    Signatures(Signatures),
    Socket(SocketAddr),
}

impl Setting {
    /// What this is, for an error message.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::List(_) | Self::Pcrs(_) | Self::Registry { is_list: true, .. } => "a list",
            _ => "a single value",
        }
    }
}

/// A value that nobody has looked at.
#[derive(Clone)]
pub(crate) struct Unread {
    pub(crate) node: Arc<Node>,
    pub(crate) place: Place,
}

impl fmt::Debug for Unread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Unread({})", self.place)
    }
}

impl PartialEq for Unread {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.node, &other.node)
    }
}

impl Eq for Unread {}

/// Why a node is not the value it should be.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    WrongType { expected: &'static str },
    Invalid(String),
}

impl Fault {
    pub(crate) fn at(self, key: &str, node: &Node, place: &Place) -> ConfigError {
        let (place, key) = (place.clone(), key.to_owned());
        match self {
            Self::WrongType { expected } => {
                ConfigError::WrongType { place, key, expected, found: node.kind() }
            }
            Self::Invalid(why) => ConfigError::Invalid { place, key, why },
        }
    }
}

/// Shortest and longest total time for the automatic ways: one second to one day.
const DEADLINES: std::ops::RangeInclusive<Duration> =
    Duration::from_secs(1)..=Duration::from_secs(86_400);
/// A LUKS2 label field has 48 bytes with its NUL (LUKS2 on-disk format §2.1); ext4 has 16 without.
const MAX_LABEL: usize = 47;
const MAX_LABELS: usize = 64;
const MAX_TEXT: usize = 4096;
/// A whole distribution's bundle of certificates has about 220 KiB.
pub(crate) const MAX_PEM: usize = 1024 * 1024;
/// Each is asked at every boot; nobody has more.
const MAX_SERVERS: usize = 16;
/// PCRs 16 to 23 can be reset or extended at any time (TCG PC Client Platform TPM Profile 1.05 §4.6): they prove nothing.
const MAX_PCR: u8 = 15;

impl Kind {
    pub(crate) fn read(self, node: &Arc<Node>, place: &Place) -> Result<Setting, Fault> {
        match self {
            Self::ConfigUrl => config_url(string(node, "a URL")?).map(Setting::Text),
            Self::Servers => servers(node),
            Self::NvIndex => handle(node, 0x01, "NV index").map(Setting::Handle),
            Self::Persistent => handle(node, 0x81, "persistent").map(Setting::Handle),
            Self::TpmDevice => {
                tpm_device(string(node, "a path or a TCTI string")?).map(Setting::Text)
            }
            Self::Certificate => {
                Ok(Setting::Text(string(node, "PEM text or the path of a PEM file")?.to_owned()))
            }
            Self::Flag => flag(node).map(Setting::Flag),
            Self::Labels => labels(node).map(Setting::List),
            Self::Pcrs => pcrs(node).map(Setting::Pcrs),
            Self::Protocol => protocol(string(node, "auto, v1 or v2")?).map(Setting::Protocol),
            Self::Mapper => mapper(string(node, "label or partition")?).map(Setting::Mapper),
            Self::Duration => duration(node).map(Setting::Duration),
            Self::Network => network(string(node, "a name")?).map(Setting::Text),
            Self::Prefix => prefix(string(node, "a prefix as fd10::/16")?).map(Setting::Prefix),
            Self::Port => port(node).map(Setting::Port),
            Self::Interface => interface(string(node, "a name")?).map(Setting::Text),
            Self::Agent(_) => {
                let unread = Unread { node: Arc::clone(node), place: place.clone() };
                Ok(Setting::Unread(vec![unread]))
            }
        }
    }
}

pub(crate) fn invalid<T>(why: impl Into<String>) -> Result<T, Fault> {
    Err(Fault::Invalid(why.into()))
}

/// Any scalar, quoted or not, as its text.
pub(crate) fn scalar<'n>(node: &'n Node, expected: &'static str) -> Result<&'n str, Fault> {
    bounded(node, expected, if expected.contains("PEM") { MAX_PEM } else { MAX_TEXT })
}

pub(crate) fn bounded<'n>(
    node: &'n Node,
    expected: &'static str,
    limit: usize,
) -> Result<&'n str, Fault> {
    match &node.value {
        Value::Scalar { text, .. } if text.len() <= limit => Ok(text),
        Value::Scalar { .. } => invalid(format!("longer than {limit} bytes")),
        _ => Err(Fault::WrongType { expected }),
    }
}

/// A scalar that YAML takes for a string: a plain `true` or `12` is none.
pub(crate) fn string<'n>(node: &'n Node, expected: &'static str) -> Result<&'n str, Fault> {
    let text = scalar(node, expected)?;
    let typed = matches!(&node.value, Value::Scalar { plain: true, .. })
        && (node.is_null()
            || boolean(text).is_some()
            || number(text).is_some()
            || text.parse::<f64>().is_ok());
    if typed { Err(Fault::WrongType { expected }) } else { Ok(text) }
}

fn boolean(text: &str) -> Option<bool> {
    match text {
        "true" | "True" | "TRUE" => Some(true),
        "false" | "False" | "FALSE" => Some(false),
        _ => None,
    }
}

fn flag(node: &Node) -> Result<bool, Fault> {
    let expected = "true or false";
    boolean(scalar(node, expected)?).ok_or(Fault::WrongType { expected })
}

/// An unsigned number as Go's `ParseUint(s, 0, 32)` reads it: 0x…, 0o… or 0…, 0b…, decimal, `_` between digits or after
/// the prefix.
#[must_use]
pub fn number(text: &str) -> Option<u32> {
    let lower = text.to_ascii_lowercase();
    let (digits, radix) = if let Some(digits) = lower.strip_prefix("0x") {
        (digits, 16)
    } else if let Some(digits) = lower.strip_prefix("0o") {
        (digits, 8)
    } else if let Some(digits) = lower.strip_prefix("0b") {
        (digits, 2)
    } else if lower.len() > 1 && lower.starts_with('0') {
        (lower.strip_prefix('0').unwrap_or_default(), 8)
    } else if lower.starts_with('_') {
        return None;
    } else {
        (lower.as_str(), 10)
    };
    let misplaced = digits.ends_with('_') || digits.contains("__");
    let digits = digits.replace('_', "");
    // from_str_radix would take a sign.
    let clean = !misplaced && digits.chars().all(|c| c.is_digit(radix));
    if clean { u32::from_str_radix(&digits, radix).ok() } else { None }
}

fn handle(node: &Node, kind: u8, name: &str) -> Result<u32, Fault> {
    let text = scalar(node, "a TPM handle as 0x1500000")?;
    let Some(handle) = number(text) else {
        return invalid(format!("{text:?} is not a number of 32 bits (0x…, 0…, or decimal)"));
    };
    let [first, ..] = handle.to_be_bytes();
    if first == kind {
        Ok(handle)
    } else {
        invalid(format!(
            "{handle:#010x} is no {name} handle, these are {kind:#04x}000000 to {kind:#04x}ffffff"
        ))
    }
}

fn servers(node: &Node) -> Result<Setting, Fault> {
    let expected = "a URL or a list of URLs";
    let Value::Sequence(items) = &node.value else {
        return server(string(node, expected)?).map(Setting::Text);
    };
    if items.len() > MAX_SERVERS {
        return invalid(format!("more than {MAX_SERVERS} servers"));
    }
    let urls = items.iter().map(|item| match string(item, "a URL")? {
        "" => invalid("an empty text is no URL of a server"),
        text => server(text),
    });
    urls.collect::<Result<_, _>>().map(Setting::List)
}

fn server(text: &str) -> Result<String, Fault> {
    if text.is_empty() {
        return Ok(String::new());
    }
    url(text, &["http", "https", "ws", "wss"], "as in https://kms.example.org:8082")
}

/// Newer Kairos evaluates templates in it; here it is one that cannot be fetched.
fn config_url(text: &str) -> Result<String, Fault> {
    if text.is_empty() || text.contains("{{") {
        return Ok(text.to_owned());
    }
    url(text, &["http", "https"], "as in https://example.org/node.yaml")
}

/// A URL (RFC 3986) without user and fragment. What is wrong is told without the parts that may hold a secret.
fn url(text: &str, schemes: &[&str], form: &str) -> Result<String, Fault> {
    if text.chars().any(|c| c.is_whitespace() || c.is_control()) {
        return invalid(format!("there is white space in the URL; write one {form}"));
    }
    let Some((scheme, rest)) = text.split_once("://") else {
        let schemes = schemes.join(" or ");
        return invalid(format!("the URL has no scheme; write {schemes} in front {form}"));
    };
    if !schemes.contains(&scheme.to_ascii_lowercase().as_str()) {
        return invalid(format!(
            "the URL's scheme is none of {}; write one {form}",
            schemes.join(", ")
        ));
    }
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    if authority.contains('@') {
        return invalid("user and password in the URL are never sent; take them out");
    }
    if rest.contains('#') {
        return invalid("a URL that is asked for has no #fragment");
    }
    match host_and_port(authority) {
        Some(_) => Ok(text.to_owned()),
        None => invalid(format!("{authority:?} is not HOST or HOST:PORT, {form}")),
    }
}

/// Host and port of a URL's authority (RFC 3986 §3.2) without user.
fn host_and_port(authority: &str) -> Option<(&str, Option<u16>)> {
    let (host, rest) = if let Some(inner) = authority.strip_prefix('[') {
        let (address, rest) = inner.split_once(']')?;
        address.parse::<std::net::Ipv6Addr>().ok()?;
        (address, rest)
    } else {
        let end = authority.find(':').unwrap_or(authority.len());
        let (host, rest) = authority.split_at_checked(end)?;
        is_host(host).then_some(())?;
        (host, rest)
    };
    match rest.strip_prefix(':') {
        None if rest.is_empty() => Some((host, None)),
        None => None,
        Some(port) => {
            let digits = !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit());
            let port = port.parse().ok().filter(|port| digits && *port != 0)?;
            Some((host, Some(port)))
        }
    }
}

/// RFC 1123 §2.1, with the underscore that private zones use.
pub(crate) fn is_host(host: &str) -> bool {
    let host = host.strip_suffix('.').unwrap_or(host);
    host.len() <= 253
        && host.split('.').all(|label| {
            (1..=63).contains(&label.len())
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
        })
}

/// The host of a URL that `server` let pass.
pub(crate) fn host_of(url: &str) -> Option<&str> {
    let (_, rest) = url.split_once("://")?;
    host_and_port(rest.split(['/', '?']).next()?).map(|(host, _)| host)
}

fn tpm_device(text: &str) -> Result<String, Fault> {
    let is_tcti = text.split_once(':').is_some_and(|(name, _)| {
        !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    });
    if text.is_empty() || (text.starts_with('/') || is_tcti) && !text.chars().any(char::is_control)
    {
        Ok(text.to_owned())
    } else {
        invalid(format!(
            "{text:?} is neither an absolute path (/dev/tpmrm0) nor a TCTI string (device:/dev/tpmrm0)"
        ))
    }
}

fn labels(node: &Node) -> Result<Vec<String>, Fault> {
    let expected = "a list of partition labels";
    let Value::Sequence(items) = &node.value else { return Err(Fault::WrongType { expected }) };
    if items.len() > MAX_LABELS {
        return invalid(format!("more than {MAX_LABELS} labels"));
    }
    items.iter().map(|item| label(string(item, expected)?)).collect()
}

fn label(text: &str) -> Result<String, Fault> {
    // The label becomes the mapper's name, a file name in /dev/mapper.
    let fits = text.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b));
    if fits && (1..=MAX_LABEL).contains(&text.len()) && !text.starts_with('.') {
        Ok(text.to_owned())
    } else {
        invalid(format!(
            "{text:?} is no partition label: 1 to {MAX_LABEL} letters, digits, `_`, `-`, `.`"
        ))
    }
}

/// Numbers, or texts of numbers; in order, each once.
fn pcrs(node: &Node) -> Result<Vec<u8>, Fault> {
    let expected = "a list of PCR numbers as [0, 7, 11]";
    let Value::Sequence(items) = &node.value else { return Err(Fault::WrongType { expected }) };
    let number = |item: &std::sync::Arc<Node>| {
        let text = scalar(item, expected)?;
        let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        match text.parse() {
            Ok(pcr @ 0..=MAX_PCR) if digits => Ok(pcr),
            _ => invalid(format!("{text:?} is no PCR that can be relied on, 0 to {MAX_PCR}")),
        }
    };
    let pcrs = items.iter().map(number).collect::<Result<std::collections::BTreeSet<u8>, _>>()?;
    if pcrs.is_empty() {
        return invalid("a quote needs one PCR at least; the default is [0, 7, 11]");
    }
    Ok(pcrs.into_iter().collect())
}

fn protocol(text: &str) -> Result<Protocol, Fault> {
    match text {
        "auto" => Ok(Protocol::Auto),
        "v1" => Ok(Protocol::V1),
        "v2" => Ok(Protocol::V2),
        _ => invalid(format!("{text:?} is no protocol: auto, v1 or v2")),
    }
}

fn mapper(text: &str) -> Result<MapperNames, Fault> {
    match text {
        "label" => Ok(MapperNames::Label),
        "partition" => Ok(MapperNames::Partition),
        _ => invalid(format!("{text:?} names no mapping: label or partition")),
    }
}

/// `90`, `90s`, `2m`, `1m30s`, `1h`, `1500ms`.
fn duration(node: &Node) -> Result<Duration, Fault> {
    let text = scalar(node, "a duration as 120s, 2m or seconds")?;
    let Some(duration) = parse_duration(text) else {
        return invalid(format!(
            "{text:?} is not a duration as 120s, 2m, 1m30s or a number of seconds"
        ));
    };
    if DEADLINES.contains(&duration) {
        Ok(duration)
    } else {
        invalid(format!("{text:?} is out of range, 1s to 24h"))
    }
}

fn parse_duration(text: &str) -> Option<Duration> {
    if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) {
        return Some(Duration::from_secs(text.parse().ok()?));
    }
    let mut total = Duration::ZERO;
    let mut rest = text;
    while !rest.is_empty() {
        let (digits, after) = rest.split_at_checked(rest.find(|c: char| !c.is_ascii_digit())?)?;
        let end = after.find(|c: char| c.is_ascii_digit()).unwrap_or(after.len());
        let (unit, next) = after.split_at_checked(end)?;
        let count: u64 = digits.parse().ok()?;
        let part = match unit {
            "h" => Duration::from_secs(count.checked_mul(3600)?),
            "m" => Duration::from_secs(count.checked_mul(60)?),
            "s" => Duration::from_secs(count),
            "ms" => Duration::from_millis(count),
            _ => return None,
        };
        total = total.checked_add(part)?;
        rest = next;
    }
    (!text.is_empty()).then_some(total)
}

fn network(text: &str) -> Result<String, Fault> {
    let fits = text.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b));
    if fits && (1..=64).contains(&text.len()) {
        Ok(text.to_owned())
    } else {
        invalid(format!("{text:?} is no network name: 1 to 64 letters, digits, `_`, `-`, `.`"))
    }
}

fn prefix(text: &str) -> Result<Prefix, Fault> {
    let prefix: Prefix = text.parse().map_err(Fault::Invalid)?;
    // Two hosts at least; and a mesh that claims (nearly) all addresses takes the default route away.
    if prefix.host_bits() < 2 || prefix.bits() < 7 {
        return invalid(format!(
            "{prefix} is too {}",
            if prefix.bits() < 7 { "wide" } else { "narrow" }
        ));
    }
    Ok(prefix)
}

fn port(node: &Node) -> Result<u16, Fault> {
    let text = scalar(node, "a UDP port")?;
    match text.parse::<u16>() {
        Ok(port) if port != 0 && !text.starts_with(['+', '0']) => Ok(port),
        _ => invalid(format!("{text:?} is no port, 1 to 65535")),
    }
}

/// IFNAMSIZ is 16 with its NUL; the kernel (dev_valid_name) takes no `/`, `:` or space, and not `.` or `..`.
pub(crate) fn interface(text: &str) -> Result<String, Fault> {
    let fits = text.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-=+".contains(&b));
    if fits && (1..=15).contains(&text.len()) && text != "." && text != ".." {
        Ok(text.to_owned())
    } else {
        invalid(format!(
            "{text:?} is no interface name: 1 to 15 letters, digits, `_`, `-`, `.`, `=`, `+`"
        ))
    }
}
