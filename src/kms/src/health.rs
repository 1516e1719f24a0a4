//! Whether the server is alive (`/healthz`) and able to answer machines (`/readyz`), and the listener on which it tells that
//! and its metrics (`--metrics-listen`).

use std::{fmt::Write as _, sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    Method, Response, StatusCode,
    body::Incoming,
    header::{CONNECTION, CONTENT_TYPE, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::{sleep, timeout},
};

use crate::{metrics::Metrics, store::Store};

/// Those who look after the server are few.
const MAX_READERS: usize = 16;

/// How long one may take to ask and to read.
const READER_TIMEOUT: Duration = Duration::from_secs(10);

/// What the server's health depends on.
#[derive(Debug)]
pub(crate) struct Health {
    store: Arc<Store>,
}

impl Health {
    pub(crate) fn new(store: Arc<Store>) -> Self {
        Self { store }
    }

    pub(crate) fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// Why machines cannot be answered, or what they are answered from.
    fn ready(&self) -> Result<String, String> {
        let status = self.store.status();
        if !status.readable {
            return Err(
                "the store directory cannot be read: answers come from what was read before\n"
                    .to_owned(),
            );
        }
        let mut text = format!("ready: {} volumes, {} secrets", status.volumes, status.secrets);
        if status.unreadable_files > 0 {
            let _ = write!(text, ", {} files with mistakes", status.unreadable_files);
        }
        text.push('\n');
        Ok(text)
    }
}

/// The answer to a request about health, if it is one.
pub(crate) fn answer(
    method: &Method,
    path: &str,
    health: &Health,
) -> Option<Response<Full<Bytes>>> {
    let read = method == Method::GET || method == Method::HEAD;
    match path {
        "/healthz" | "/readyz" if !read => {
            Some(text(StatusCode::METHOD_NOT_ALLOWED, "this is read with GET\n"))
        }
        "/healthz" => Some(text(StatusCode::OK, "alive\n")),
        "/readyz" => Some(match health.ready() {
            Ok(why) => text(StatusCode::OK, why),
            Err(why) => text(StatusCode::SERVICE_UNAVAILABLE, why),
        }),
        _ => None,
    }
}

/// A plain answer, the last on its connection.
pub(crate) fn text(status: StatusCode, text: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(text.into()));
    *response.status_mut() = status;
    let kind = HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    response
}

/// Answers on the metrics listener for ever.
pub(crate) async fn serve(listener: TcpListener, health: Arc<Health>, metrics: Arc<Metrics>) {
    let readers = Arc::new(Semaphore::new(MAX_READERS));
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                log::error!("accepting a connection for metrics failed: {error}");
                sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Ok(place) = readers.clone().try_acquire_owned() else { continue };
        let (health, metrics) = (health.clone(), metrics.clone());
        tokio::spawn(async move {
            let _place = place;
            // Whether it was read is the reader's business.
            let _ = timeout(READER_TIMEOUT, reader(stream, &health, &metrics)).await;
        });
    }
}

async fn reader(stream: TcpStream, health: &Health, metrics: &Metrics) -> hyper::Result<()> {
    let service = service_fn(|request: hyper::Request<Incoming>| {
        let (method, path) = (request.method(), request.uri().path());
        let response = answer(method, path, health).unwrap_or_else(|| match path {
            "/metrics" if method == Method::GET => {
                text(StatusCode::OK, metrics.render(&health.store.status()))
            }
            _ => text(StatusCode::NOT_FOUND, "here are /metrics, /healthz and /readyz\n"),
        });
        std::future::ready(Ok::<_, std::convert::Infallible>(response))
    });
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(READER_TIMEOUT)
        .max_buf_size(8 * 1024)
        .serve_connection(TokioIo::new(stream), service)
        .await
}
