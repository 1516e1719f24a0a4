//! Listening, limits, HTTP and the upgrade to a WebSocket (RFC 6455 §4.2), orderly stop.
//!
//! A connection serves one request. Each phase has its own deadline (TLS handshake, HTTP head, each message), the head and
//! each message a largest size, and all connections together a largest number.

use std::{convert::Infallible, future::Future, net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    Method, Response, StatusCode,
    body::Incoming,
    header::{
        AUTHORIZATION, CONNECTION, HOST, HeaderMap, HeaderName, HeaderValue, ORIGIN,
        SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_VERSION, UPGRADE,
    },
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use latchkey_wire::v1;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{sleep, timeout},
};
use tokio_rustls::TlsAcceptor;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use crate::{
    exchange::{self, Endpoint, Request},
    matching::Facts,
    store::Store,
};

/// Largest HTTP head: the token (16 KiB at most) and what proxies add.
const MAX_HEAD: usize = 24 * 1024;

/// Pause after an error of `accept` that is not about one connection (no file descriptors left).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What the server needs to serve a connection.
#[derive(Clone)]
pub(crate) struct Server {
    pub(crate) store: Arc<Store>,
    pub(crate) tls: Option<TlsAcceptor>,
    pub(crate) max_connections: u32,
    pub(crate) handshake_timeout: Duration,
    pub(crate) message_timeout: Duration,
    pub(crate) stop_timeout: Duration,
}

impl Server {
    /// Serves until `stop`, then lets running exchanges finish for a bounded time.
    pub(crate) async fn run(self, listener: TcpListener, stop: impl Future<Output = &'static str>) {
        let places = Arc::new(Semaphore::new(self.max_connections as usize));
        tokio::pin!(stop);
        let signal = loop {
            tokio::select! {
                signal = &mut stop => break signal,
                accepted = listener.accept() => match accepted {
                    Ok((stream, peer)) => self.admit(stream, peer, &places),
                    Err(error) => {
                        log::error!("accepting a connection failed: {error}");
                        sleep(ACCEPT_PAUSE).await;
                    }
                },
            }
        };
        drop(listener);
        let running = self.max_connections as usize - places.available_permits();
        log::info!("{signal}: stopping, {running} connections are still open");
        if timeout(self.stop_timeout, places.acquire_many(self.max_connections)).await.is_err() {
            let left = self.max_connections as usize - places.available_permits();
            log::warn!(
                "stopped with {left} connections still open after {} s",
                self.stop_timeout.as_secs()
            );
        }
    }

    fn admit(&self, stream: TcpStream, peer: SocketAddr, places: &Arc<Semaphore>) {
        let Ok(place) = places.clone().try_acquire_owned() else {
            log::warn!(
                "peer={peer} turned away: {} connections are open, the most --max-connections allows",
                self.max_connections
            );
            return;
        };
        let server = self.clone();
        tokio::spawn(async move { server.connection(stream, peer, Arc::new(place)).await });
    }

    async fn connection(
        self,
        stream: TcpStream,
        peer: SocketAddr,
        place: Arc<OwnedSemaphorePermit>,
    ) {
        if let Err(error) = stream.set_nodelay(true) {
            log::debug!("peer={peer} TCP_NODELAY: {error}");
        }
        let Some(tls) = self.tls.clone() else {
            return self.http(stream, peer, place).await;
        };
        match timeout(self.handshake_timeout, tls.accept(stream)).await {
            Ok(Ok(stream)) => self.http(stream, peer, place).await,
            Ok(Err(error)) => log::warn!("peer={peer} TLS handshake failed: {error}"),
            Err(_) => log::warn!("peer={peer} TLS handshake took too long"),
        }
    }

    async fn http<S>(self, stream: S, peer: SocketAddr, place: Arc<OwnedSemaphorePermit>)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let handshake_timeout = self.handshake_timeout;
        let service = service_fn(move |request| {
            let (server, place) = (self.clone(), place.clone());
            async move { Ok::<_, Infallible>(server.answer(request, peer, place)) }
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(handshake_timeout)
            .max_buf_size(MAX_HEAD)
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades();
        if let Err(error) = connection.await {
            log::warn!("peer={peer} HTTP request not served: {error}");
        }
    }

    /// Answers the HTTP request; a WebSocket's exchange goes on by itself and keeps the connection's place.
    fn answer(
        self,
        mut request: hyper::Request<Incoming>,
        peer: SocketAddr,
        place: Arc<OwnedSemaphorePermit>,
    ) -> Response<Full<Bytes>> {
        let accept = match accept_key(&request) {
            Ok((endpoint, key)) => (endpoint, key),
            Err(refusal) => {
                log::warn!(
                    "peer={peer} {:?} {:?} refused: {}",
                    request.method(),
                    request.uri().path(),
                    refusal.text
                );
                return refusal.response();
            }
        };
        let (endpoint, key) = accept;
        let upgrade = hyper::upgrade::on(&mut request);
        let request = Request {
            peer,
            endpoint,
            authorization: request
                .headers()
                .get(AUTHORIZATION)
                .map(|value| value.as_bytes().to_vec())
                .unwrap_or_default(),
            facts: facts(request.headers()),
        };
        tokio::spawn(async move {
            let _place = place;
            match timeout(self.handshake_timeout, upgrade).await {
                Ok(Ok(stream)) => {
                    exchange::run(TokioIo::new(stream), &request, self.store, self.message_timeout)
                        .await
                }
                Ok(Err(error)) => log::warn!("peer={peer} WebSocket not opened: {error}"),
                Err(_) => log::warn!("peer={peer} WebSocket not opened in time"),
            }
        });
        let mut response = Response::new(Full::default());
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        let headers = response.headers_mut();
        headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
        headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
        headers.insert(SEC_WEBSOCKET_ACCEPT, key);
        response
    }
}

/// Why a request is no WebSocket of ours.
struct Refusal {
    status: StatusCode,
    text: &'static str,
}

impl Refusal {
    fn new(status: StatusCode, text: &'static str) -> Self {
        Self { status, text }
    }

    fn response(&self) -> Response<Full<Bytes>> {
        let mut response = Response::new(Full::from(format!("{}\n", self.text)));
        *response.status_mut() = self.status;
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        if self.status == StatusCode::UPGRADE_REQUIRED {
            response.headers_mut().insert(SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"));
        }
        response
    }
}

/// Checks the opening handshake (RFC 6455 §4.2.1) and computes the answer to its key.
fn accept_key(request: &hyper::Request<Incoming>) -> Result<(Endpoint, HeaderValue), Refusal> {
    let headers = request.headers();
    let endpoint = Endpoint::of_path(request.uri().path())
        .ok_or(Refusal::new(StatusCode::NOT_FOUND, "404 page not found"))?;
    if request.method() != Method::GET {
        return Err(Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "a WebSocket is opened with GET"));
    }
    if !has_token(headers, &CONNECTION, "upgrade") || !has_token(headers, &UPGRADE, "websocket") {
        return Err(Refusal::new(
            StatusCode::BAD_REQUEST,
            "this path is a WebSocket: the request does not ask for one",
        ));
    }
    if !has_token(headers, &SEC_WEBSOCKET_VERSION, "13") {
        return Err(Refusal::new(
            StatusCode::UPGRADE_REQUIRED,
            "only WebSocket version 13 is spoken",
        ));
    }
    if !same_origin(headers) {
        return Err(Refusal::new(
            StatusCode::FORBIDDEN,
            "requests of web pages of other hosts are not served",
        ));
    }
    headers
        .get(SEC_WEBSOCKET_KEY)
        .filter(|key| key.len() == 24)
        .and_then(|key| HeaderValue::from_str(&derive_accept_key(key.as_bytes())).ok())
        .map(|key| (endpoint, key))
        .ok_or(Refusal::new(
            StatusCode::BAD_REQUEST,
            "Sec-WebSocket-Key is missing or not 16 bytes in base64",
        ))
}

/// Whether a header's comma-separated values hold `token`.
fn has_token(headers: &HeaderMap, name: &HeaderName, token: &str) -> bool {
    headers
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|value| value.trim().eq_ignore_ascii_case(token))
}

/// As Go's server: no Origin, or one whose host is the request's Host. Machines send none; browsers must not be led here.
fn same_origin(headers: &HeaderMap) -> bool {
    let Some(origin) = headers.get(ORIGIN) else { return true };
    let host = origin
        .to_str()
        .ok()
        .and_then(|origin| origin.split_once("://"))
        .map(|(_, host)| host.trim_end_matches('/'));
    let wanted = headers.get(HOST).and_then(|host| host.to_str().ok());
    matches!((host, wanted), (Some(host), Some(wanted)) if host.eq_ignore_ascii_case(wanted))
}

fn facts(headers: &HeaderMap) -> Facts {
    let text = |name: &str| {
        headers
            .get(name)
            .and_then(|value| std::str::from_utf8(value.as_bytes()).ok())
            .unwrap_or_default()
    };
    Facts::new(text(v1::HEADER_LABEL), text(v1::HEADER_UUID), text(v1::HEADER_NAME))
}
