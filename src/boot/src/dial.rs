//! A WebSocket (RFC 6455) to the key server in which nothing can take for ever: every address is
//! tried, and every connect, read and write has a deadline.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use tungstenite::client::IntoClientRequest;
use tungstenite::http::{HeaderName, HeaderValue, Uri};
use tungstenite::protocol::WebSocketConfig;
use tungstenite::{HandshakeError, Message, WebSocket};

use crate::exchange::{ExchangeError, Stage};

/// One address gets this long to accept. Upstream's whole dial has 10 s.
const CONNECT: Duration = Duration::from_secs(5);
/// A server is silent for at most this long: it reads a directory and does one RSA operation.
const SILENCE: Duration = Duration::from_secs(20);
/// What a system trusts; Kairos adds `certificate` to it.
const SYSTEM_ROOTS: &str = "/etc/ssl/certs/ca-certificates.crt";

/// Where the key server is, and whom to believe that it is it.
#[derive(Clone, Debug)]
pub struct Endpoint {
    host: String,
    port: u16,
    /// Path prefix without a slash at its end: a server may be behind `https://host/challenge`.
    prefix: String,
    tls: Option<Arc<ClientConfig>>,
}

/// An open WebSocket.
pub struct Socket(WebSocket<Stream>);

impl std::fmt::Debug for Socket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Socket")
    }
}

impl Endpoint {
    /// Reads a `challenger_server` URL (http, https, ws, wss) and the PEM certificates to trust
    /// beside the system's.
    ///
    /// # Errors
    /// [`ExchangeError::Url`], [`ExchangeError::Certificate`].
    pub fn new(url: &str, certificate: Option<&str>) -> Result<Self, ExchangeError> {
        let bad = |why: &str| ExchangeError::Url { url: url.to_owned(), why: why.to_owned() };
        let uri: Uri = url.parse().map_err(|error| bad(&format!("{error}")))?;
        let secure = match uri.scheme_str() {
            Some("http" | "ws") => false,
            Some("https" | "wss") => true,
            _ => return Err(bad("it must begin with http://, https://, ws:// or wss://")),
        };
        let host =
            uri.host().filter(|host| !host.is_empty()).ok_or_else(|| bad("it has no host"))?;
        Ok(Self {
            host: host.trim_start_matches('[').trim_end_matches(']').to_owned(),
            port: uri.port_u16().unwrap_or(if secure { 443 } else { 80 }),
            prefix: uri.path().trim_end_matches('/').to_owned(),
            tls: if secure { Some(tls_config(certificate)?) } else { None },
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

    /// Whether a packet to the server would leave the machine now. A host name counts as reachable
    /// once anything is, because its addresses are not known before a resolver is reached.
    #[must_use]
    pub fn has_route(&self) -> bool {
        match self.host.parse() {
            Ok(address) => routed(SocketAddr::new(address, self.port)),
            // The documentation prefixes: every default route covers them, and no packet is sent.
            Err(_) => {
                ["192.0.2.1:9", "[2001:db8::1]:9"]
                    .iter()
                    .filter_map(|address| address.parse().ok())
                    .any(routed)
                    || self.addresses().is_ok()
            }
        }
    }

    fn addresses(&self) -> Result<Vec<SocketAddr>, ExchangeError> {
        let failed = |error: io::Error| ExchangeError::Network {
            stage: Stage::Resolve,
            server: self.authority(),
            error,
        };
        let found: Vec<_> =
            (self.host.as_str(), self.port).to_socket_addrs().map_err(failed)?.collect();
        if found.is_empty() {
            return Err(failed(io::ErrorKind::NotFound.into()));
        }
        Ok(found)
    }

    /// Connects, does TLS where the URL says so, and upgrades to a WebSocket on `path`.
    ///
    /// # Errors
    /// [`ExchangeError::Network`] with the stage that failed, [`ExchangeError::Status`].
    pub fn open(
        &self,
        path: &str,
        headers: &[(&'static str, String)],
        deadline: Instant,
    ) -> Result<Socket, ExchangeError> {
        let stream = self.stream(deadline)?;
        let scheme = if self.tls.is_some() { "wss" } else { "ws" };
        let url = format!("{scheme}://{}{}{path}", self.authority(), self.prefix);
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
            Err(HandshakeError::Interrupted(_)) => Err(ExchangeError::Network {
                stage: Stage::Upgrade,
                server: self.authority(),
                error: io::ErrorKind::TimedOut.into(),
            }),
        }
    }

    /// Connects, and does TLS where the URL says so. Every read and write on it has a deadline.
    ///
    /// # Errors
    /// [`ExchangeError::Network`] with the stage that failed.
    pub(crate) fn stream(&self, deadline: Instant) -> Result<Stream, ExchangeError> {
        let tcp = self.connect(deadline)?;
        Ok(match &self.tls {
            None => Stream::Plain(tcp),
            Some(config) => Stream::Tls(Box::new(self.handshake(config, tcp)?)),
        })
    }

    fn connect(&self, deadline: Instant) -> Result<Timed, ExchangeError> {
        let mut last = io::Error::from(io::ErrorKind::TimedOut);
        for address in self.addresses()? {
            let left = deadline.saturating_duration_since(Instant::now()).min(CONNECT);
            if left.is_zero() {
                break;
            }
            match TcpStream::connect_timeout(&address, left) {
                Ok(stream) => {
                    // Each message waits for the answer to the one before.
                    if let Err(error) = stream.set_nodelay(true) {
                        log::debug!("TCP_NODELAY on {address}: {error}");
                    }
                    return Ok(Timed { stream, deadline });
                }
                Err(error) => {
                    log::debug!("connecting to {address}: {error}");
                    last = error;
                }
            }
        }
        Err(ExchangeError::Network { stage: Stage::Connect, server: self.authority(), error: last })
    }

    fn handshake(
        &self,
        config: &Arc<ClientConfig>,
        tcp: Timed,
    ) -> Result<StreamOwned<ClientConnection, Timed>, ExchangeError> {
        let failed =
            |error| ExchangeError::Network { stage: Stage::Tls, server: self.authority(), error };
        let name = ServerName::try_from(self.host.clone()).map_err(|error| ExchangeError::Url {
            url: self.authority(),
            why: error.to_string(),
        })?;
        let connection = ClientConnection::new(Arc::clone(config), name)
            .map_err(|error| failed(io::Error::other(error)))?;
        let mut stream = StreamOwned::new(connection, tcp);
        while stream.conn.is_handshaking() {
            stream.conn.complete_io(&mut stream.sock).map_err(failed)?;
        }
        Ok(stream)
    }
}

/// A UDP socket sends nothing when it is connected; the kernel only looks for a route.
fn routed(address: SocketAddr) -> bool {
    let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    std::net::UdpSocket::bind(any).and_then(|socket| socket.connect(address)).is_ok()
}

fn tls_config(certificate: Option<&str>) -> Result<Arc<ClientConfig>, ExchangeError> {
    let bad = |why: String| ExchangeError::Certificate { why };
    let mut roots = RootCertStore::empty();
    if let Ok(pem) = std::fs::read(SYSTEM_ROOTS) {
        let system = CertificateDer::pem_slice_iter(&pem).filter_map(Result::ok);
        roots.add_parsable_certificates(system);
    }
    if let Some(pem) = certificate {
        let own: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
        let own = own.map_err(|error| bad(format!("{error:?}")))?;
        if own.is_empty() {
            return Err(bad("there is no PEM block of type CERTIFICATE in it".into()));
        }
        for certificate in own {
            roots.add(certificate).map_err(|error| bad(error.to_string()))?;
        }
    }
    if roots.is_empty() {
        return Err(bad(format!(
            "the server's URL wants TLS, and there is neither `certificate` nor {SYSTEM_ROOTS}"
        )));
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| bad(error.to_string()))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Arc::new(config))
}

impl Socket {
    /// The next message, whatever frame type it came in.
    ///
    /// # Errors
    /// [`ExchangeError::Network`] when the server is silent, [`ExchangeError::Closed`] when it
    /// hangs up, which is how it refuses to authenticate.
    pub fn read(&mut self, server: &str) -> Result<Vec<u8>, ExchangeError> {
        loop {
            match self.0.read() {
                Ok(Message::Text(text)) => return Ok(text.as_bytes().to_vec()),
                Ok(Message::Binary(bytes)) => return Ok(bytes.to_vec()),
                Ok(Message::Close(_)) => {
                    return Err(ExchangeError::Closed { server: server.into() });
                }
                Ok(_) => {}
                Err(error) => {
                    return Err(ExchangeError::of_websocket(Stage::Answer, server, error));
                }
            }
        }
    }

    /// # Errors
    /// As [`Socket::read`].
    pub fn send(&mut self, message: Message, server: &str) -> Result<(), ExchangeError> {
        self.0
            .send(message)
            .map_err(|error| ExchangeError::of_websocket(Stage::Answer, server, error))
    }
}

/// A connection with or without TLS.
pub(crate) enum Stream {
    Plain(Timed),
    Tls(Box<StreamOwned<ClientConnection, Timed>>),
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.read(buffer),
            Self::Tls(stream) => stream.read(buffer),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.write(buffer),
            Self::Tls(stream) => stream.write(buffer),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(stream) => stream.flush(),
            Self::Tls(stream) => stream.flush(),
        }
    }
}

/// A TCP stream on which each read and write ends by itself: after [`SILENCE`], and at the deadline.
#[derive(Debug)]
pub(crate) struct Timed {
    stream: TcpStream,
    deadline: Instant,
}

impl Timed {
    fn patience(&self) -> io::Result<Option<Duration>> {
        let left = self.deadline.saturating_duration_since(Instant::now()).min(SILENCE);
        if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(Some(left)) }
    }
}

impl Read for Timed {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(self.patience()?)?;
        self.stream.read(buffer).map_err(timed_out)
    }
}

impl Write for Timed {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(self.patience()?)?;
        self.stream.write(buffer).map_err(timed_out)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

/// A blocking socket says "would block" when its time-out passes.
fn timed_out(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::WouldBlock => io::ErrorKind::TimedOut.into(),
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_url_is_scheme_host_port_and_prefix() {
        for (url, authority, prefix) in [
            ("http://10.0.2.2:8082", "10.0.2.2:8082", ""),
            ("http://kms.example/", "kms.example:80", ""),
            ("ws://kms.example/challenge/", "kms.example:80", "/challenge"),
            ("http://[fd00::1]:99", "[fd00::1]:99", ""),
        ] {
            let endpoint = Endpoint::new(url, None).unwrap();
            assert_eq!(
                (endpoint.authority().as_str(), endpoint.prefix.as_str()),
                (authority, prefix),
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
