//! Prometheus metrics of the agent, on request: `GET /metrics` in the text exposition format 0.0.4.
//!
//! Each peer has its series under its public key alone; what it is called, which anybody may change who may write the record,
//! stands in `latchkey_peer_info`, to be joined where it is wanted.

mod page;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::header::{ALLOW, CONNECTION, CONTENT_TYPE, HeaderValue};
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpStream;
use tokio::sync::{Mutex, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use crate::clients::Clients;
use crate::device::{Device, Peer};
use crate::error::{Error, Result};
use crate::key::PublicKey;
use crate::plan::Actual;
use crate::view::{RegistryState, View};

use page::Page;

/// Those who look after a mesh are few.
const READERS: usize = 16;
/// How long one may take to ask and to read.
const READER_TIMEOUT: Duration = Duration::from_secs(10);
/// However many ask: thousands of peers are not read from the kernel more often.
const FRESH: Duration = Duration::from_secs(1);
/// For the device, before the page is made without it.
const LOOK: Duration = Duration::from_secs(4);
const TEXT: HeaderValue = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");

/// The listener, before it answers.
#[derive(Debug)]
pub struct Server(TcpListener);

impl Server {
    /// # Errors
    /// [`Error::Metrics`]: the address is taken, or none of this host's.
    pub fn bind(address: SocketAddr) -> Result<Self> {
        let refused = |source| Error::Metrics { address, source };
        let listener = TcpListener::bind(address).map_err(refused)?;
        listener.set_nonblocking(true).map_err(refused)?;
        Ok(Self(listener))
    }

    /// Answers for ever.
    ///
    /// # Errors
    /// That the event loop does not take the socket.
    pub async fn serve(
        self,
        view: watch::Receiver<Arc<View>>,
        interface: String,
    ) -> Result<Infallible> {
        let listener = tokio::net::TcpListener::from_std(self.0).map_err(|source| {
            Error::Kernel { action: "wait for readers of the metrics".into(), source }
        })?;
        let source = Arc::new(Source { view, interface, last: Mutex::default() });
        let mut readers = Clients::new(READERS, READER_TIMEOUT);
        loop {
            let (stream, _) = readers.next(|context| listener.poll_accept(context)).await;
            readers.serve(talk(stream, source.clone()));
        }
    }
}

/// [`Server::bind`] and [`Server::serve`], for whoever need not know at once that the address is taken.
pub async fn serve(
    address: SocketAddr,
    view: watch::Receiver<Arc<View>>,
    interface: String,
) -> Result<Infallible> {
    Server::bind(address)?.serve(view, interface).await
}

async fn talk(stream: TcpStream, source: Arc<Source>) {
    let service = service_fn(|request| {
        let source = source.clone();
        async move { Ok::<_, Infallible>(answer(&request, &source).await) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(READER_TIMEOUT)
        .max_buf_size(8 * 1024)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(error) = served {
        log::debug!("a reader of the metrics: {error}");
    }
}

async fn answer(request: &Request<Incoming>, source: &Source) -> Response<Full<Bytes>> {
    let (status, text) = match (request.uri().path(), request.method()) {
        ("/metrics", &Method::GET) => (StatusCode::OK, source.page().await),
        ("/metrics", _) => {
            (StatusCode::METHOD_NOT_ALLOWED, Bytes::from_static(b"this is read with GET\n"))
        }
        _ => (StatusCode::NOT_FOUND, Bytes::from_static(b"here is /metrics\n")),
    };
    let mut response = Response::new(Full::new(text));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, TEXT);
    headers.insert(CONNECTION, HeaderValue::from_static("close"));
    if status == StatusCode::METHOD_NOT_ALLOWED {
        headers.insert(ALLOW, HeaderValue::from_static("GET"));
    }
    response
}

/// A device without its private key.
struct Seen {
    actual: Actual,
    peers: BTreeMap<PublicKey, Peer>,
}

impl Seen {
    fn look(interface: &str) -> Result<Option<Self>> {
        let snapshot = Device::open(interface)?.read()?;
        Ok(snapshot.map(|snapshot| Self { actual: snapshot.actual, peers: snapshot.peers }))
    }
}

/// Where the numbers are from, and what was made of them last.
struct Source {
    view: watch::Receiver<Arc<View>>,
    interface: String,
    last: Mutex<Last>,
}

#[derive(Default)]
struct Last {
    page: Option<(Instant, Bytes)>,
    /// One that took too long for an answer. There is never a second beside it.
    look: Option<JoinHandle<Result<Option<Seen>>>>,
}

impl Source {
    /// One at a time: others wait for the same page.
    async fn page(&self) -> Bytes {
        let mut last = self.last.lock().await;
        if let Some((made, page)) = &last.page
            && made.elapsed() < FRESH
        {
            return page.clone();
        }
        let device = match self.look(&mut last.look).await {
            Ok(device) => Some(device),
            Err(error) => {
                log::debug!("metrics without the device's: {error}");
                None
            }
        };
        let view = self.view.borrow().clone();
        let page = Bytes::from(render(&view, device.as_ref().map(Option::as_ref)));
        last.page = Some((Instant::now(), page.clone()));
        page
    }

    /// The kernel, or wireguard-go, takes its time over thousands of peers: the agent's loop does not wait for it, and who asks
    /// not for ever.
    async fn look(
        &self,
        pending: &mut Option<JoinHandle<Result<Option<Seen>>>>,
    ) -> Result<Option<Seen>> {
        let failed = |reason: io::Error| Error::Kernel {
            action: format!("look at {}", self.interface),
            source: reason,
        };
        // What it found is of then, not of now.
        if pending.as_ref().is_some_and(JoinHandle::is_finished) {
            *pending = None;
        }
        let interface = self.interface.clone();
        let look = pending
            .get_or_insert_with(|| tokio::task::spawn_blocking(move || Seen::look(&interface)));
        let looked =
            timeout(LOOK, look).await.map_err(|_| failed(io::ErrorKind::TimedOut.into()))?;
        *pending = None;
        looked.unwrap_or_else(|error| Err(failed(io::Error::other(error))))
    }
}

/// `device`: none if it cannot be read, and then none if there is none.
fn render(view: &View, device: Option<Option<&Seen>>) -> String {
    let peers = device.flatten().map_or(0, |seen| seen.peers.len());
    let mut page = Page::with_capacity(8 * 1024 + 512 * (peers + view.members.len()));
    about_node(&mut page, view);
    about_registry(&mut page, view);
    about_work(&mut page, view);
    about_device(&mut page, view, device);
    about_peers(&mut page, view, device.flatten());
    page.finish()
}

fn about_node(page: &mut Page, view: &View) {
    let node = &view.node;
    page.head("latchkey_build_info", "gauge", "Version of the agent");
    page.line("latchkey_build_info", &[("version", env!("CARGO_PKG_VERSION"))], 1);
    page.head("latchkey_node_info", "gauge", "Who this node is, as it publishes it");
    let labels = [
        ("name", node.name.as_str()),
        ("public_key", &node.public_key),
        ("allowed_ip", node.allowed_ip.as_deref().unwrap_or_default()),
        ("mesh", &node.mesh),
        ("interface", &node.interface),
        ("backend", &node.backend),
    ];
    page.line("latchkey_node_info", &labels, 1);
    for (name, help, milliseconds) in [
        (
            "latchkey_device_complete_boottime_seconds",
            "When the device was complete for the first time in this boot, after the kernel started",
            node.up_at_ms,
        ),
        (
            "latchkey_joined_boottime_seconds",
            "When the mesh was joined for the first time in this boot, after the kernel started",
            node.joined_at_ms,
        ),
    ] {
        if let Some(milliseconds) = milliseconds {
            page.one(name, "gauge", help, milliseconds as f64 / 1000.0);
        }
    }
}

fn about_registry(page: &mut Page, view: &View) {
    page.one("latchkey_members", "gauge", "Other members known", view.members.len());
    let help = "Records that do not count, and peers that the device does not take";
    page.one("latchkey_problems", "gauge", help, view.problems.len());
    let Some(registry) = &view.registry else { return };
    let name = "latchkey_registry_state";
    page.head(name, "gauge", "1 for the state that the agent is in, 0 for the others");
    for (state, word) in [
        (RegistryState::Away, "away"),
        (RegistryState::Refused, "refused"),
        (RegistryState::Joined, "joined"),
    ] {
        page.line(name, &[("state", word)], u8::from(registry.state == state));
    }
    page.one(
        "latchkey_registry_state_since_timestamp_seconds",
        "gauge",
        "When that state began",
        registry.since,
    );
    page.one(
        "latchkey_registry_from_cache",
        "gauge",
        "1 if the members are those that were known last, not those of the registry",
        u8::from(registry.from_cache),
    );
    if let Some(revision) = registry.revision {
        page.one("latchkey_registry_revision", "gauge", "Revision of the own record", revision);
    }
}

fn about_work(page: &mut Page, view: &View) {
    let counters = &view.counters;
    for (name, help, count) in [
        (
            "latchkey_registry_snapshots_total",
            "Times that the whole registry was read",
            counters.snapshots,
        ),
        (
            "latchkey_registry_updates_total",
            "Changes of the registry that came one by one",
            counters.updates,
        ),
        ("latchkey_registry_lost_total", "Times that the registry was lost", counters.lost),
        (
            "latchkey_device_repairs_total",
            "Rounds in which the device had to be changed",
            counters.repairs,
        ),
        ("latchkey_peers_set_total", "Peers added to the device or changed", counters.peers_set),
        ("latchkey_peers_removed_total", "Peers removed from the device", counters.peers_removed),
    ] {
        page.one(name, "counter", help, count);
    }
}

fn about_device(page: &mut Page, view: &View, device: Option<Option<&Seen>>) {
    let trouble = u8::from(view.node.trouble.is_some());
    page.one("latchkey_device_trouble", "gauge", "1 if the device is not as it should be", trouble);
    let readable = u8::from(device.is_some());
    page.one("latchkey_device_readable", "gauge", "1 if the device could be looked at", readable);
    let Some(device) = device else { return };
    let up = device.is_some_and(|device| device.actual.up && device.actual.public_key.is_some());
    let help = "1 if the device is there, has its key, and is up";
    page.one("latchkey_device_up", "gauge", help, u8::from(up));
    let Some(device) = device else { return };
    page.one("latchkey_device_mtu_bytes", "gauge", "MTU of the device", device.actual.mtu);
    page.one("latchkey_device_peers", "gauge", "Peers on the device", device.peers.len());
}

fn about_peers(page: &mut Page, view: &View, device: Option<&Seen>) {
    let members: BTreeMap<&str, _> =
        view.members.iter().map(|member| (member.public_key.as_str(), member)).collect();
    let name = "latchkey_peer_info";
    page.head(name, "gauge", "What the record of a member says");
    for (public_key, member) in &members {
        let ranges = member.allowed_ips.join(",");
        let labels = [
            ("public_key", *public_key),
            ("name", &member.name),
            ("allowed_ips", &ranges),
            ("advertise_address", &member.advertise_address),
            ("signed", if member.signed { "true" } else { "false" }),
        ];
        page.line(name, &labels, 1);
    }
    let Some(device) = device else { return };
    let peers: Vec<_> =
        device.peers.iter().map(|(public_key, peer)| (public_key.to_string(), peer)).collect();
    let name = "latchkey_peer_latest_handshake_timestamp_seconds";
    page.head(name, "gauge", "When the peer was last heard of; not there if it never was");
    for (public_key, peer) in &peers {
        let since_1970 = |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).ok();
        if let Some(handshake) = peer.last_handshake.and_then(since_1970) {
            page.line(name, &[("public_key", public_key)], handshake.as_secs());
        }
    }
    let name = "latchkey_peer_received_bytes_total";
    page.head(name, "counter", "Bytes from the peer since it is on the device");
    for (public_key, peer) in &peers {
        page.line(name, &[("public_key", public_key)], peer.received_bytes);
    }
    let name = "latchkey_peer_sent_bytes_total";
    page.head(name, "counter", "Bytes to the peer since it is on the device");
    for (public_key, peer) in &peers {
        page.line(name, &[("public_key", public_key)], peer.sent_bytes);
    }
}
