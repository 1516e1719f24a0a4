//! A WebSocket (RFC 6455) to the key server in which nothing can take for ever: every look-up, connect,
//! read and write has a deadline.
//!
//! Servers are reached directly. `HTTP_PROXY` and its kin are not looked at, other than by upstream's client: an
//! initramfs has no such variables.

mod stream;
pub mod tls;

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use latchkey_config::Challenger;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, StreamOwned};
use tungstenite::HandshakeError;
use tungstenite::client::IntoClientRequest;
use tungstenite::http::{HeaderName, HeaderValue, Uri};
use tungstenite::protocol::WebSocketConfig;

use crate::BootError;
use crate::exchange::{ExchangeError, Stage};
use crate::resolver::files::Files;
use crate::resolver::{is_local, multicast, resolve};

pub use stream::Socket;
pub(crate) use stream::Stream;
use stream::Timed;

/// One address gets this long to accept. Upstream's whole dial has 10 s.
const CONNECT: Duration = Duration::from_secs(5);

/// Where the key server is, and whom to believe that it is it.
#[derive(Clone, Debug)]
pub struct Endpoint {
    host: String,
    port: u16,
    /// Host and port as the URL writes them: what goes into the `Host` header, however the server is found.
    written: String,
    /// Path prefix without a slash at its end: a server may be behind `https://host/challenge`.
    prefix: String,
    tls: Option<Arc<ClientConfig>>,
    /// Found by multicast alone, which says the port as well.
    mdns: bool,
    files: Files,
}

impl Endpoint {
    /// Reads a `challenger_server` URL (http, https, ws, wss) and the PEM certificates to trust
    /// beside the system's.
    ///
    /// # Errors
    /// [`ExchangeError::Url`], [`ExchangeError::Certificate`].
    pub fn new(url: &str, certificate: Option<&str>) -> Result<Self, ExchangeError> {
        let mut endpoint = Self::plain(url)?;
        if is_secure(url)? {
            endpoint.tls = Some(tls::config(certificate)?);
        }
        Ok(endpoint)
    }

    /// The servers of a configuration, in its order.
    ///
    /// # Errors
    /// As [`Endpoint::new`]; [`BootError::Setting`] for `mdns` without a name to look for.
    pub fn all(settings: &Challenger) -> Result<Vec<Self>, BootError> {
        let mut all = Vec::new();
        let mut config = None;
        for url in &settings.servers {
            let mut endpoint = Self::plain(url)?;
            endpoint.mdns = settings.mdns && is_local(&endpoint.host);
            if is_secure(url)? {
                // One for all: a system trusts some 140 authorities, and they are long to read.
                let shared = match config.take() {
                    Some(shared) => shared,
                    None => tls::config(settings.certificate.as_deref())?,
                };
                endpoint.tls = Some(Arc::clone(&shared));
                config = Some(shared);
            }
            all.push(endpoint);
        }
        if settings.mdns && !all.iter().any(|endpoint| endpoint.mdns) {
            return Err(BootError::Setting(
                "kcrypt.challenger.mdns finds hosts that end in .local, and challenger_server names none: write challenger_server: https://NAME.local".into(),
            ));
        }
        Ok(all)
    }

    fn plain(url: &str) -> Result<Self, ExchangeError> {
        let bad = |why: &str| ExchangeError::Url { url: url.to_owned(), why: why.to_owned() };
        let uri: Uri = url.parse().map_err(|error| bad(&format!("{error}")))?;
        let host =
            uri.host().filter(|host| !host.is_empty()).ok_or_else(|| bad("it has no host"))?;
        let written = match uri.port_u16() {
            Some(port) => format!("{host}:{port}"),
            None => host.to_owned(),
        };
        Ok(Self {
            host: host.trim_start_matches('[').trim_end_matches(']').to_owned(),
            port: uri.port_u16().unwrap_or(if is_secure(url)? { 443 } else { 80 }),
            written,
            prefix: uri.path().trim_end_matches('/').to_owned(),
            tls: None,
            mdns: false,
            files: Files::default(),
        })
    }

    /// `host:port`, for messages.
    #[must_use]
    pub fn authority(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }

    /// Whether the URL wants TLS.
    #[must_use]
    pub fn is_secure(&self) -> bool {
        self.tls.is_some()
    }

    /// Whether a packet to the server would leave the machine now. A host name counts as reachable
    /// once anything is, because its addresses are not known before a resolver is reached.
    #[must_use]
    pub fn has_route(&self) -> bool {
        if let Ok(address) = self.host.parse() {
            return routed(SocketAddr::new(address, self.port));
        }
        if is_local(&self.host) && multicast::has_link() {
            return true;
        }
        // The documentation prefixes: every default route covers them, and no packet is sent.
        let anywhere = ["192.0.2.1:9", "[2001:db8::1]:9"];
        anywhere.iter().filter_map(|address| address.parse().ok()).any(routed)
            || self.files.name_service().servers.into_iter().any(routed)
            || self
                .files
                .in_hosts(&self.host)
                .into_iter()
                .any(|address| routed(SocketAddr::new(address, self.port)))
    }

    /// Where the server can be reached, in the order in which to try.
    ///
    /// # Errors
    /// [`ExchangeError::Network`] with [`Stage::Resolve`].
    pub fn addresses(&self, deadline: Instant) -> Result<Vec<SocketAddr>, ExchangeError> {
        let found = resolve(&self.files, &self.host, self.port, self.mdns, deadline);
        found.map_err(|error| self.failed(Stage::Resolve, error))
    }

    /// Connects to `address`, does TLS where the URL says so, and upgrades to a WebSocket on `path`. `connected`
    /// is told of the connection as soon as it is there.
    ///
    /// # Errors
    /// [`ExchangeError::Network`] with the stage that failed, [`ExchangeError::Status`].
    pub fn open(
        &self,
        address: SocketAddr,
        path: &str,
        headers: &[(&'static str, String)],
        deadline: Instant,
        connected: impl FnOnce(&TcpStream),
    ) -> Result<Socket, ExchangeError> {
        let tcp = self.connect(address, deadline)?;
        connected(&tcp.stream);
        let stream = self.secured(tcp)?;
        let scheme = if self.tls.is_some() { "wss" } else { "ws" };
        let url = format!("{scheme}://{}{}{path}", self.written, self.prefix);
        let malformed = |error: &dyn std::fmt::Display| ExchangeError::Url {
            url: url.clone(),
            why: error.to_string(),
        };
        let mut request = url.as_str().into_client_request().map_err(|error| malformed(&error))?;
        for (name, value) in headers {
            let value = HeaderValue::from_str(value).map_err(|error| malformed(&error))?;
            request.headers_mut().insert(HeaderName::from_static(name), value);
        }
        let limits = WebSocketConfig::default()
            .max_message_size(Some(latchkey_wire::MAX_MESSAGE))
            .max_frame_size(Some(latchkey_wire::MAX_MESSAGE));
        match tungstenite::client::client_with_config(request, stream, Some(limits)) {
            Ok((socket, _)) => Ok(Socket(socket)),
            Err(HandshakeError::Failure(error)) => {
                Err(ExchangeError::of_websocket(Stage::Upgrade, &self.authority(), error))
            }
            Err(HandshakeError::Interrupted(_)) => {
                Err(self.failed(Stage::Upgrade, io::ErrorKind::TimedOut.into()))
            }
        }
    }

    /// Connects to one address after the other, and does TLS where the URL says so. Every read and write on it
    /// has a deadline.
    ///
    /// # Errors
    /// [`ExchangeError::Network`] with the stage that failed.
    pub(crate) fn stream(&self, deadline: Instant) -> Result<Stream, ExchangeError> {
        let mut last = self.failed(Stage::Connect, io::ErrorKind::TimedOut.into());
        for address in self.addresses(deadline)? {
            match self.connect(address, deadline) {
                Ok(tcp) => return self.secured(tcp),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    fn connect(&self, address: SocketAddr, deadline: Instant) -> Result<Timed, ExchangeError> {
        let failed = |error| {
            log::debug!("connecting to {address}: {error}");
            self.failed(Stage::Connect, error)
        };
        let left = deadline.saturating_duration_since(Instant::now()).min(CONNECT);
        if left.is_zero() {
            return Err(failed(io::ErrorKind::TimedOut.into()));
        }
        let stream = TcpStream::connect_timeout(&address, left).map_err(failed)?;
        // Each message waits for the answer to the one before.
        if let Err(error) = stream.set_nodelay(true) {
            log::debug!("TCP_NODELAY on {address}: {error}");
        }
        Ok(Timed { stream, deadline })
    }

    fn secured(&self, tcp: Timed) -> Result<Stream, ExchangeError> {
        let Some(config) = &self.tls else { return Ok(Stream::Plain(tcp)) };
        let failed = |error| self.failed(Stage::Tls, error);
        // The name of the URL, whatever address it was found at; without the dot that marks it as absolute.
        let host = self.host.strip_suffix('.').unwrap_or(&self.host).to_owned();
        let name = ServerName::try_from(host).map_err(|error| ExchangeError::Url {
            url: self.authority(),
            why: error.to_string(),
        })?;
        let connection = ClientConnection::new(Arc::clone(config), name)
            .map_err(|error| failed(io::Error::other(error)))?;
        let mut stream = StreamOwned::new(connection, tcp);
        while stream.conn.is_handshaking() {
            stream.conn.complete_io(&mut stream.sock).map_err(failed)?;
        }
        Ok(Stream::Tls(Box::new(stream)))
    }

    fn failed(&self, stage: Stage, error: io::Error) -> ExchangeError {
        ExchangeError::Network { stage, server: self.authority(), error }
    }
}

fn is_secure(url: &str) -> Result<bool, ExchangeError> {
    let scheme = url.split_once("://").map(|(scheme, _)| scheme.to_ascii_lowercase());
    match scheme.as_deref() {
        Some("http" | "ws") => Ok(false),
        Some("https" | "wss") => Ok(true),
        _ => Err(ExchangeError::Url {
            url: url.to_owned(),
            why: "it must begin with http://, https://, ws:// or wss://".into(),
        }),
    }
}

/// A UDP socket sends nothing when it is connected; the kernel only looks for a route.
fn routed(address: SocketAddr) -> bool {
    let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    std::net::UdpSocket::bind(any).and_then(|socket| socket.connect(address)).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_url_is_scheme_host_port_and_prefix() {
        for (url, authority, written, prefix) in [
            ("http://10.0.2.2:8082", "10.0.2.2:8082", "10.0.2.2:8082", ""),
            ("http://kms.example/", "kms.example:80", "kms.example", ""),
            ("ws://kms.example/challenge/", "kms.example:80", "kms.example", "/challenge"),
            ("http://[fd00::1]:99", "[fd00::1]:99", "[fd00::1]:99", ""),
        ] {
            let endpoint = Endpoint::new(url, None).unwrap();
            assert_eq!(
                (endpoint.authority().as_str(), endpoint.written.as_str(), &*endpoint.prefix),
                (authority, written, prefix),
                "{url}"
            );
        }
        for url in ["", "kms.example", "ftp://kms.example", "http://", "/getPass", "http://a b"] {
            assert!(matches!(Endpoint::new(url, None), Err(ExchangeError::Url { .. })), "{url}");
        }
    }

    #[test]
    fn a_certificate_that_is_none_is_refused_before_anything_is_dialled() {
        for pem in ["", "no pem", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
        {
            let error = Endpoint::new("https://kms.example", Some(pem)).unwrap_err();
            assert!(matches!(error, ExchangeError::Certificate { .. }), "{pem:?}: {error}");
        }
    }
}
