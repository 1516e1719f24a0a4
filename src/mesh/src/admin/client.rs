//! The client's side: one question, one answer, and a deadline on both.

use std::future::Future;
use std::io;
use std::path::Path;
use std::sync::Once;
use std::task::{Context, Poll};
use std::time::Duration;

use http::uri::PathAndQuery;
use http::{Request, Response, Uri};
use hyper::body::Incoming;
use hyper::client::conn::http2::{SendRequest, handshake};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::UnixStream;
use tokio::time::timeout;
use tonic::body::Body;
use tonic::client::Grpc;
use tonic_prost::ProstCodec;

use super::message::{NODE_INFO, NodeInfo, VIEW, ViewResponse};
use crate::error::{Error, Result};
use crate::view::View;

const DEADLINE: Duration = Duration::from_secs(10);
/// A View of the 20,000 members that are kept at most has less than a fifth of it.
const MAX_ANSWER: usize = 64 << 20;
/// Nobody looks at it.
const AUTHORITY: &str = "http://latchkey";

/// What the agent at this socket publishes of itself, and the peers it knows. Ikto's agent answers it as well. Not to be called
/// from within an event loop.
///
/// # Errors
/// [`Error::NoAgent`] if none listens there, [`Error::Agent`] if it does not answer as it should.
pub fn node_info(socket: &Path) -> Result<NodeInfo> {
    block_on(call(socket, NODE_INFO))
}

/// All that the agent at this socket knows; otherwise as [`node_info`].
pub fn view(socket: &Path) -> Result<View> {
    block_on(fetch_view(socket))
}

/// The same for whoever has an event loop.
pub async fn fetch_view(socket: &Path) -> Result<View> {
    let response: ViewResponse = call(socket, VIEW).await?;
    serde_json::from_slice(&response.json).map_err(|error| Error::Agent {
        path: socket.into(),
        reason: format!("its answer is not understood: {error}"),
    })
}

fn block_on<T>(answer: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime
        .map_err(|source| Error::Kernel { action: "start the event loop".into(), source })?
        .block_on(answer)
}

pub(super) async fn call<M>(socket: &Path, method: &'static str) -> Result<M>
where
    M: prost::Message + Default + 'static,
{
    timeout(DEADLINE, ask(socket, method)).await.unwrap_or_else(|_| {
        let reason = format!("no answer within {} s", DEADLINE.as_secs());
        Err(Error::Agent { path: socket.into(), reason })
    })
}

async fn ask<M>(socket: &Path, method: &'static str) -> Result<M>
where
    M: prost::Message + Default + 'static,
{
    let failed = |reason: String| Error::Agent { path: socket.into(), reason };
    let stream = UnixStream::connect(socket).await.map_err(|error| not_there(socket, error))?;
    warn_of_stranger(socket, &stream);
    let (sender, connection) = handshake(TokioExecutor::new(), TokioIo::new(stream))
        .await
        .map_err(|error| failed(error.to_string()))?;
    // Ends when the sender is dropped, or with the event loop.
    tokio::spawn(connection);
    let mut client = Grpc::with_origin(Connection(sender), Uri::from_static(AUTHORITY))
        .max_decoding_message_size(MAX_ANSWER);
    client.ready().await.map_err(|error| failed(error.to_string()))?;
    let request = tonic::Request::new(());
    let path = PathAndQuery::from_static(method);
    let response = client.unary(request, path, ProstCodec::<(), M>::default()).await;
    response.map(tonic::Response::into_inner).map_err(|status| failed(explain(&status)))
}

/// In /tmp anybody can have an agent. What it says is shown all the same: Ikto may run as a user of its own.
fn warn_of_stranger(socket: &Path, stream: &UnixStream) {
    static ONCE: Once = Once::new();
    let own = nix::unistd::geteuid().as_raw();
    if let Ok(peer) = stream.peer_cred()
        && ![0, own].contains(&peer.uid())
    {
        let (path, user) = (socket.display(), peer.uid());
        ONCE.call_once(|| log::warn!("what answers on {path} runs as user {user}, not as root"));
    }
}

fn not_there(socket: &Path, source: io::Error) -> Error {
    match source.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
            Error::NoAgent { path: socket.into(), source }
        }
        io::ErrorKind::PermissionDenied => {
            Error::NotPermitted { action: format!("connect to {}", socket.display()) }
        }
        _ => Error::Agent { path: socket.into(), reason: source.to_string() },
    }
}

fn explain(status: &tonic::Status) -> String {
    match status.code() {
        tonic::Code::Unimplemented => "it does not know the method; is it Ikto's agent?".into(),
        code => format!("{code}: {}", crate::terminal::printable(status.message())),
    }
}

/// hyper's client, as tonic wants it.
struct Connection(SendRequest<Body>);

impl tower_service::Service<Request<Body>> for Connection {
    type Response = Response<Incoming>;
    type Error = hyper::Error;
    type Future =
        std::pin::Pin<Box<dyn Future<Output = Result<Response<Incoming>, hyper::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), hyper::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        Box::pin(self.0.send_request(request))
    }
}
