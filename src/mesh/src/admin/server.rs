//! The agent's side. Nothing that comes in over the socket costs the agent more than what is bounded here.

use std::convert::Infallible;
use std::future::{Ready, ready};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use http::{Request, Response};
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tonic::Status;
use tonic::body::Body;
use tonic::server::{Grpc, UnaryService};
use tonic_prost::ProstCodec;

use super::message::{NODE_INFO, NodeInfo, VIEW, ViewResponse};
use super::socket::Bound;
use crate::clients::Clients;
use crate::error::{Error, Result};
use crate::view::View;

/// Connections at once.
const CONNECTIONS: usize = 16;
/// A client asks one thing. More than one at a time would only multiply the memory that its answers take.
const STREAMS: u32 = 1;
/// From its first byte to its last, however slowly a client reads.
const LIFE: Duration = Duration::from_secs(30);
/// Requests are empty; what is unknown in them is skipped.
const MAX_REQUEST: usize = 1024;
const MAX_HEADERS: u32 = 8 * 1024;
const MAX_FRAME: u32 = 16 * 1024;
const WINDOW: u32 = 64 * 1024 - 1;

/// The admin service, before it answers.
#[derive(Debug)]
pub struct Server(Bound);

impl Server {
    /// Makes the socket, for its owner alone. From here on clients can connect; they wait for [`Self::serve`].
    ///
    /// # Errors
    /// [`Error::SocketTaken`] if an agent answers there, [`Error::NotASocket`], [`Error::UnsafeDirectory`], or why it cannot
    /// be made.
    pub fn bind(path: &Path) -> Result<Self> {
        Bound::new(path).map(Self)
    }

    /// Answers for ever; dropped, it removes the socket.
    ///
    /// # Errors
    /// That the event loop does not take the socket.
    pub async fn serve(self, view: watch::Receiver<Arc<View>>) -> Result<Infallible> {
        let (listener, _file) = self.0.into_parts();
        let listener = UnixListener::from_std(listener).map_err(|source| Error::Kernel {
            action: "wait for clients of the admin socket".into(),
            source,
        })?;
        let mut clients = Clients::new(CONNECTIONS, LIFE);
        loop {
            let (stream, _) = clients.next(|context| listener.poll_accept(context)).await;
            clients.serve(talk(stream, view.clone()));
        }
    }
}

async fn talk(stream: UnixStream, view: watch::Receiver<Arc<View>>) {
    let mut http = http2::Builder::new(TokioExecutor::new());
    http.max_concurrent_streams(STREAMS)
        .max_header_list_size(MAX_HEADERS)
        .max_frame_size(MAX_FRAME)
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW);
    let service = service_fn(|request| {
        let view = view.borrow().clone();
        async move { Ok::<_, Infallible>(answer(request, &view).await) }
    });
    if let Err(error) = http.serve_connection(TokioIo::new(stream), service).await {
        log::debug!("a client of the admin socket: {error}");
    }
}

/// Whatever the authority: a Go client that dials by its own means sends any (protocols/ikto-kilo.md §1.9).
async fn answer(request: Request<Incoming>, view: &View) -> Response<Body> {
    match request.uri().path() {
        NODE_INFO => unary(request, NodeInfo::from(view)).await,
        VIEW => match serde_json::to_vec(view) {
            Ok(json) => unary(request, ViewResponse { json: json.into() }).await,
            Err(error) => Status::internal(error.to_string()).into_http(),
        },
        _ => Status::unimplemented("no such method").into_http(),
    }
}

async fn unary<M: prost::Message + 'static>(
    request: Request<Incoming>,
    message: M,
) -> Response<Body> {
    Grpc::new(ProstCodec::<M, ()>::default())
        .max_decoding_message_size(MAX_REQUEST)
        .unary(Answer(Some(message)), request)
        .await
}

/// What is answered once the request has been read.
struct Answer<M>(Option<M>);

impl<M: prost::Message + 'static> UnaryService<()> for Answer<M> {
    type Response = M;
    type Future = Ready<Result<tonic::Response<M>, Status>>;

    fn call(&mut self, _: tonic::Request<()>) -> Self::Future {
        let message = self.0.take().ok_or_else(|| Status::internal("asked twice"));
        ready(message.map(tonic::Response::new))
    }
}
