//! One HTTP request (RFC 9112): the upgrade to a WebSocket (RFC 6455 §4.2), or an answer.

use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::{Mutex, PoisonError},
};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    Method, Response, StatusCode,
    body::Incoming,
    header::{
        AUTHORIZATION, CONNECTION, HOST, HeaderMap, HeaderName, HeaderValue, ORIGIN, RETRY_AFTER,
        SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_VERSION, UPGRADE,
    },
    server::conn::http1,
    service::service_fn,
    upgrade::{OnUpgrade, Upgraded},
};
use hyper_util::rt::{TokioIo, TokioTimer};
use latchkey_wire::v1;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::timeout,
};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use super::Server;
use crate::{
    exchange::{Claim, Endpoint, Request},
    health,
    limits::TooMany,
    matching::Facts,
    visit::Visit,
};

/// Largest HTTP head: the token (16 KiB at most) and what proxies add.
const MAX_HEAD: usize = 24 * 1024;

type Answer = Response<Full<Bytes>>;

/// Serves the request: the WebSocket with what was asked for, or nothing if it was answered.
pub(super) async fn serve<S>(
    server: &Server,
    stream: S,
    peer: SocketAddr,
    visit: &Visit,
) -> hyper::Result<Option<(Upgraded, Request)>>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let opened = Mutex::new(None);
    let service = service_fn(|mut request| {
        let answer = match server.open(&request, peer, visit) {
            Ok((asked, response)) => {
                let upgrade: OnUpgrade = hyper::upgrade::on(&mut request);
                *opened.lock().unwrap_or_else(PoisonError::into_inner) = Some((upgrade, asked));
                response
            }
            Err(answer) => *answer,
        };
        server.metrics.answered(answer.status());
        std::future::ready(Ok::<_, Infallible>(answer))
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(server.handshake_timeout)
        .max_buf_size(MAX_HEAD)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    // The head has its own deadline; this one is for peers that do not read their answer.
    match timeout(server.handshake_timeout * 2, connection).await {
        Ok(served) => served?,
        Err(_) => return Ok(None),
    }
    let opened = opened.into_inner().unwrap_or_else(PoisonError::into_inner);
    match opened {
        Some((upgrade, asked)) => Ok(Some((upgrade.await?, asked))),
        None => Ok(None),
    }
}

impl Server {
    /// What a request asks for, with the answer that opens the WebSocket; or the answer that does not.
    fn open(
        &self,
        request: &hyper::Request<Incoming>,
        peer: SocketAddr,
        visit: &Visit,
    ) -> Result<(Request, Answer), Box<Answer>> {
        if let Some(answer) = health::answer(request.method(), request.uri().path(), &self.health) {
            return Err(Box::new(answer));
        }
        let (endpoint, key) = accept_key(request).map_err(|refusal| {
            self.quiet.refused.warn(format_args!(
                "peer={peer} {:?} {:?} refused: {}",
                request.method(),
                request.uri().path(),
                refusal.text
            ));
            Box::new(refusal.response())
        })?;
        let limited = |too_many: TooMany| {
            self.metrics.limited(too_many.whose);
            self.quiet.limited.warn(format_args!("peer={peer} {endpoint} refused: {too_many}"));
            Box::new(busy(&too_many))
        };
        visit.asks().map_err(limited)?;
        let authorization = request.headers().get(AUTHORIZATION);
        let authorization = authorization.map(HeaderValue::as_bytes).unwrap_or_default();
        let claim = (endpoint != Endpoint::Attestation).then(|| Claim::read(authorization));
        if let Some(Ok(claim)) = &claim {
            visit.claims(&claim.pubhash()).map_err(limited)?;
        }
        let mut response = Answer::default();
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        let headers = response.headers_mut();
        headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
        headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
        headers.insert(SEC_WEBSOCKET_ACCEPT, key);
        Ok((Request { peer, endpoint, claim, facts: facts(request.headers()) }, response))
    }
}

/// 429, with the time to wait.
fn busy(too_many: &TooMany) -> Answer {
    let mut response = Refusal::new(StatusCode::TOO_MANY_REQUESTS, "too many requests").response();
    response.headers_mut().insert(RETRY_AFTER, too_many.retry_after().into());
    response
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

    fn response(&self) -> Answer {
        let mut response = health::text(self.status, format!("{}\n", self.text));
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
