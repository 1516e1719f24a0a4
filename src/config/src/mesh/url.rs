//! A NATS server's URL: `nats://` or `tls://`, perhaps with a user and a password or a token in it (RFC 3986 §3.2.1), which
//! no error repeats.

use std::net::Ipv6Addr;

use zeroize::Zeroizing;

use super::{Login, Secret, Server};

/// NATS'.
pub const DEFAULT_PORT: u16 = 4222;
const MAX_URL: usize = 4096;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerUrl {
    pub server: Server,
    /// None, password or token.
    pub login: Login,
}

/// Reads a URL with its scheme. `no_host` is meant where the URL names no host; where there is none either, that is an error.
///
/// # Errors
/// Says in words what is wrong, without any part of the URL: all of it may be a password that was not encoded.
pub fn parse(text: &str, no_host: Option<&str>) -> Result<ServerUrl, String> {
    const FORM: &str = "write nats://HOST:4222 or tls://HOST:4222";
    if text.len() > MAX_URL {
        return Err(format!("longer than {MAX_URL} bytes"));
    }
    if text.chars().any(|c| c.is_whitespace() || c.is_control()) {
        return Err(format!("there is white space in the URL; {FORM}"));
    }
    let (scheme, rest) =
        text.split_once("://").ok_or_else(|| format!("the URL has no scheme; {FORM}"))?;
    let tls = match scheme.to_ascii_lowercase().as_str() {
        "nats" => false,
        "tls" => true,
        "ws" | "wss" => {
            return Err(format!(
                "WebSocket (ws://, wss://) is not supported; {FORM}, with the port of NATS itself"
            ));
        }
        _ => return Err(format!("the URL's scheme is neither nats nor tls; {FORM}")),
    };
    let (authority, path) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
    if path.contains('@') {
        return Err(
            "a `/`, `?` or `#` in a user, password or token must be written %2F, %3F or %23".into(),
        );
    }
    if !matches!(path, "" | "/") {
        return Err(format!("the URL has a path, a query or a fragment; {FORM}"));
    }
    let (login, address) = match authority.rsplit_once('@') {
        Some((user, address)) => (login_of(user)?, address),
        None => (Login::None, authority),
    };
    let (host, port) = host_and_port(address)
        .ok_or_else(|| format!("what names the server is not HOST or HOST:PORT; {FORM}"))?;
    let host = match (host, no_host) {
        ("", Some(host)) => host,
        ("", None) => return Err(format!("the URL names no host; {FORM}")),
        (host, _) => host,
    };
    Ok(ServerUrl { server: Server { host: host.to_owned(), port, tls }, login })
}

/// The one login that some of these URLs have; the others take it, too.
///
/// # Errors
/// Says in words that they differ.
pub fn login(urls: &[ServerUrl]) -> Result<Login, String> {
    let mut logins = urls.iter().map(|url| &url.login).filter(|login| **login != Login::None);
    let first = logins.next().cloned().unwrap_or_default();
    if logins.any(|login| *login != first) {
        return Err("the URLs have different users, passwords or tokens; servers of one cluster \
                    take the same"
            .into());
    }
    Ok(first)
}

/// As Go's client takes it: a user without a password is a token.
fn login_of(user: &str) -> Result<Login, String> {
    let decoded = |text: &str| {
        decode(text).ok_or_else(|| {
            "a `%` in a user, password or token that is not followed by two hexadecimal digits, or what they encode is \
             not UTF-8; write a `%` itself as %25"
                .to_owned()
        })
    };
    Ok(match user.split_once(':') {
        Some((user, password)) => Login::Password {
            user: decoded(user)?.to_string(),
            password: Secret(decoded(password)?),
        },
        None if user.is_empty() => Login::None,
        None => Login::Token(Secret(decoded(user)?)),
    })
}

/// RFC 3986 §2.1.
fn decode(text: &str) -> Option<Zeroizing<String>> {
    // Room for all from the start: a vector that grows leaves copies behind.
    let mut decoded = Zeroizing::new(Vec::with_capacity(text.len()));
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            decoded.push(byte);
            continue;
        }
        let mut digit = || char::from(bytes.next()?).to_digit(16);
        decoded.push(u8::try_from(digit()? * 16 + digit()?).ok()?);
    }
    str::from_utf8(&decoded).ok().map(|text| Zeroizing::new(text.to_owned()))
}

/// `host`, `host:4222`, `host:`, `[::1]:4222`; the host may be empty.
fn host_and_port(text: &str) -> Option<(&str, u16)> {
    let (host, rest) = if let Some(inner) = text.strip_prefix('[') {
        let (address, rest) = inner.split_once(']')?;
        address.parse::<Ipv6Addr>().ok()?;
        (address, rest)
    } else {
        let (host, rest) = text.split_at(text.find(':').unwrap_or(text.len()));
        (host.is_empty() || crate::value::is_host(host)).then_some(())?;
        (host, rest)
    };
    let port = match rest.strip_prefix(':') {
        None if rest.is_empty() => return Some((host, DEFAULT_PORT)),
        None => return None,
        Some("") => return Some((host, DEFAULT_PORT)),
        Some(port) => port,
    };
    let digits = port.bytes().all(|byte| byte.is_ascii_digit());
    port.parse().ok().filter(|port| digits && *port != 0).map(|port| (host, port))
}
