//! Listening, admission, TLS, HTTP, the exchange, orderly stop.
//!
//! A connection serves one request. Each phase has its own deadline (TLS handshake, HTTP head, each message), what is read
//! in each has a largest size, and connections have a largest number, of an address and of all ([`crate::places`]).

mod frugal;
mod http;

use std::{
    future::Future,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    time::{sleep, timeout},
};

use crate::{
    audit::{Audit, Event},
    exchange::{self, Settings},
    health::Health,
    limits::{Limits, Source},
    metrics::{Drop, Metrics},
    notify,
    places::Places,
    quiet::Quiet,
    tls::Tls,
    visit::Visit,
};
use frugal::Frugal;

/// Pause after an error of `accept` that is not about one connection (no file descriptors left).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Most bytes that a TLS handshake may bring: a genuine one has some 600, with post-quantum shares some 2,000. Without
/// this a peer could make the TLS library hold one message of 64 KiB.
const MAX_HANDSHAKE: usize = 16 * 1024;

/// What the server needs to serve a connection.
#[derive(Debug)]
pub(crate) struct Server {
    pub(crate) health: Arc<Health>,
    pub(crate) tls: Option<Arc<Tls>>,
    pub(crate) limits: Arc<Limits>,
    pub(crate) places: Arc<Places>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) settings: Settings,
    pub(crate) handshake_timeout: Duration,
    pub(crate) stop_timeout: Duration,
    pub(crate) audit: Option<Audit>,
    pub(crate) quiet: Lines,
}

/// Lines that strangers can cause.
#[derive(Debug, Default)]
pub(crate) struct Lines {
    turned_away: Quiet,
    silent: Quiet,
    made_place: Quiet,
    tls: Quiet,
    tls_timeout: Quiet,
    http: Quiet,
    refused: Quiet,
    limited: Quiet,
}

impl Server {
    /// Serves until `stop`, then lets running exchanges finish for a bounded time.
    pub(crate) async fn run(
        self: Arc<Self>,
        listener: TcpListener,
        stop: impl Future<Output = &'static str>,
    ) {
        tokio::pin!(stop);
        let signal = loop {
            tokio::select! {
                signal = &mut stop => break signal,
                accepted = listener.accept() => match accepted {
                    Ok((stream, peer)) => self.admit(stream, peer),
                    Err(error) => {
                        log::error!("accepting a connection failed: {error}");
                        sleep(ACCEPT_PAUSE).await;
                    }
                },
            }
        };
        drop(listener);
        notify::stopping();
        self.record(|| Event::ServerStopped { signal });
        log::info!("{signal}: stopping, {} connections are still open", self.places.open());
        if timeout(self.stop_timeout, self.places.empty()).await.is_err() {
            log::warn!(
                "stopped with {} connections still open after {} s",
                self.places.open(),
                self.stop_timeout.as_secs()
            );
        }
    }

    fn record(&self, event: impl FnOnce() -> Event) {
        if let Some(audit) = &self.audit {
            audit.record(event());
        }
    }

    fn admit(self: &Arc<Self>, stream: TcpStream, peer: SocketAddr) {
        self.metrics.connection();
        let source = Source::of(peer.ip());
        let Some(place) = self.places.take(source) else {
            self.metrics.dropped(Drop::Full);
            self.quiet.turned_away.warn(format_args!(
                "peer={peer} turned away: --max-connections or --max-connections-per-address are open, all of machines that have proved themselves"
            ));
            return;
        };
        let visit = Visit::new(source, self.limits.clone(), place);
        let server = self.clone();
        tokio::spawn(async move { server.connection(stream, peer, &visit).await });
    }

    async fn connection(&self, stream: TcpStream, peer: SocketAddr, visit: &Visit) {
        tokio::select! {
            () = visit.must_go() => {
                self.metrics.dropped(Drop::Crowded);
                self.quiet.made_place.warn(format_args!(
                    "peer={peer} closed to make place: too many connections are open, {} has the most that have not proved anything",
                    visit.source()
                ));
            }
            () = self.begin(stream, peer, visit) => {}
        }
    }

    /// Waits for the first byte: a peer that says nothing costs as little as can be. What comes then has a future of its
    /// own for each phase, so that no connection holds the room of a phase it is not in.
    async fn begin(&self, stream: TcpStream, peer: SocketAddr, visit: &Visit) {
        match timeout(self.handshake_timeout, stream.peek(&mut [0])).await {
            Ok(Ok(1..)) => Box::pin(self.encrypted(stream, peer, visit)).await,
            // Somebody looked whether the port is open.
            Ok(Ok(0) | Err(_)) => self.metrics.dropped(Drop::Silent),
            Err(_) => {
                self.metrics.dropped(Drop::Silent);
                self.quiet.silent.warn(format_args!("peer={peer} said nothing in time"));
            }
        }
    }

    async fn encrypted(&self, stream: TcpStream, peer: SocketAddr, visit: &Visit) {
        if let Err(error) = stream.set_nodelay(true) {
            log::debug!("peer={peer} TCP_NODELAY: {error}");
        }
        let Some(tls) = &self.tls else {
            return self.http(stream, peer, visit).await;
        };
        if let Err(too_many) = self.limits.handshake(visit.source()) {
            self.metrics.limited("handshake");
            self.metrics.dropped(Drop::Limited);
            self.quiet.limited.warn(format_args!("peer={peer} closed before TLS: {too_many}"));
            return;
        }
        let stream = Frugal::new(stream, MAX_HANDSHAKE);
        match timeout(self.handshake_timeout, tls.acceptor().accept(stream)).await {
            Ok(Ok(mut stream)) => {
                stream.get_mut().0.no_longer();
                self.http(stream, peer, visit).await;
            }
            Ok(Err(error)) => {
                self.metrics.dropped(Drop::Tls);
                self.quiet.tls.warn(format_args!("peer={peer} TLS handshake failed: {error}"));
            }
            Err(_) => {
                self.metrics.dropped(Drop::Tls);
                self.quiet
                    .tls_timeout
                    .warn(format_args!("peer={peer} TLS handshake took too long"));
            }
        }
    }

    async fn http<S>(&self, stream: S, peer: SocketAddr, visit: &Visit)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let begun = Instant::now();
        match Box::pin(http::serve(self, stream, peer, visit)).await {
            Ok(Some((socket, request))) => {
                let socket = TokioIo::new(socket);
                let store = self.health.store();
                let (report, peer) =
                    exchange::run(socket, request, visit, store, &self.settings).await;
                report.log();
                self.record(|| Event::from(&report));
                self.metrics.request(&report, begun.elapsed());
                peer.close().await;
            }
            Ok(None) => {}
            Err(error) => {
                self.metrics.dropped(Drop::Http);
                self.quiet.http.warn(format_args!("peer={peer} HTTP request not served: {error}"));
            }
        }
    }
}
