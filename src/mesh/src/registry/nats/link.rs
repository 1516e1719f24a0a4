//! The connection: made, watched over, and made again for ever.
//!
//! One client of the library lives as long as one connection. The library could reconnect by itself, but then it says of a
//! failure its kind only (`IO error`), keeps credentials and certificates as it first read them, lets requests that were under
//! way wait for their whole time, and never comes back if it panics over what a server says.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use async_nats::{
    Client, Event, HeaderMap, Message, Request, RequestErrorKind, ServerAddr, ServerInfo,
};
use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use log::debug;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader};
use tokio::net::{TcpStream, lookup_host};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

use super::backoff::{Backoff, up_to};
use super::login::{self, Unusable};
use super::reason;
use crate::settings::{RegistrySettings, Server, Tls};

/// The library's limit for one address.
const CONNECT: Duration = Duration::from_secs(5);
/// For all of a server's addresses, with DNS and TLS.
const CONNECT_ALL: Duration = Duration::from_secs(15);
/// A silent connection is asked for a sign of life; two go unanswered and it is given up. Heartbeats count as signs.
const PING: Duration = Duration::from_secs(10);
/// A connection that held so long begins anew with short waits.
const STABLE: Duration = Duration::from_secs(60);
/// Between one server of a cluster and the next.
const NEXT_SERVER: Duration = Duration::from_millis(100);
/// Messages that the library keeps for a subscription and else drops: all records, as it may receive them in one go. The server's
/// flow control holds their bytes to 32 MiB.
const CAPACITY: usize = 32_768;
/// Servers known from others of the cluster.
const MAX_DISCOVERED: usize = 32;
/// Refusals of the server that are remembered.
const MAX_VIOLATIONS: usize = 32;
/// Longest inbound growth between two looks without a message coming of it.
const MAX_UNREAD: u64 = 32 << 20;
const LOOK: Duration = Duration::from_secs(5);

/// Addresses of one name that are tried.
const MAX_ADDRESSES: usize = 8;
/// Between one address of a server and the next.
const NEXT_ADDRESS: Duration = Duration::from_millis(250);
/// Longest first line of a server: INFO with the addresses of a large cluster.
const MAX_INFO: u64 = 64 << 10;

/// Where the connection stands.
#[derive(Debug, Clone)]
pub(super) enum Link {
    /// The first attempt is not over.
    Connecting,
    Away(Arc<str>),
    Up(Arc<Session>),
}

/// One connection.
pub(super) struct Session {
    client: Client,
    server: String,
    /// Why it is over.
    over: watch::Sender<Option<Arc<str>>>,
    violations: watch::Sender<Violations>,
}

/// What the server refused on this connection, in its words, numbered.
#[derive(Debug, Default)]
struct Violations {
    count: u64,
    texts: VecDeque<(u64, Arc<str>)>,
}

/// Why a request has no answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Unanswered {
    /// The server's words.
    NotPermitted(String),
    /// Nobody listens on that subject.
    NoResponders,
    TimedOut,
    /// The connection is gone, or the request could not be sent.
    Lost(String),
}

/// Starts to connect; ends when all receivers are dropped.
pub(super) fn open(settings: Arc<RegistrySettings>) -> watch::Receiver<Link> {
    let (sender, receiver) = watch::channel(Link::Connecting);
    tokio::spawn(async move {
        let closed = sender.clone();
        tokio::select! {
            () = closed.closed() => {}
            () = keep(&settings, &sender) => {}
        }
    });
    receiver
}

async fn keep(settings: &Arc<RegistrySettings>, link: &watch::Sender<Link>) {
    let mut backoff = Backoff::new(Duration::from_millis(250));
    let mut discovered: Vec<Server> = Vec::new();
    let mut servers = shuffled(&settings.servers);
    // Those that were NATS servers when last met.
    let mut known: Vec<Server> = Vec::new();
    loop {
        let mut reasons: Vec<String> = Vec::new();
        for (n, server) in servers.iter().enumerate() {
            if n > 0 {
                sleep(up_to(NEXT_SERVER)).await;
            }
            match connect(settings, server, known.contains(server)).await {
                Ok((session, mut events)) => {
                    if !known.contains(server) {
                        known.push(server.clone());
                    }
                    remember(&mut discovered, &session.client.server_info(), server, settings);
                    debug!("registry: connected to {server}");
                    let session = Arc::new(session);
                    let since = Instant::now();
                    link.send_replace(Link::Up(Arc::clone(&session)));
                    let why = session.serve(&mut events).await;
                    session.end(&why);
                    debug!("registry: {why}");
                    link.send_replace(Link::Away(why.as_str().into()));
                    reasons.clear();
                    if since.elapsed() >= STABLE {
                        backoff.reset();
                    }
                    break;
                }
                Err(NotConnected { reason, met }) => {
                    debug!("registry: {reason}");
                    if met {
                        known.retain(|known| known != server);
                    }
                    if !reasons.contains(&reason) {
                        reasons.push(reason);
                    }
                }
            }
        }
        if !reasons.is_empty() {
            away(link, &reasons.join("; "));
        }
        sleep(backoff.next()).await;
        servers = shuffled(&settings.servers);
        servers.extend(shuffled(&discovered));
    }
}

/// Says why, if that is news.
fn away(link: &watch::Sender<Link>, why: &str) {
    link.send_if_modified(|link| {
        let news = !matches!(link, Link::Away(known) if known.as_ref() == why);
        if news {
            debug!("registry: {why}");
            *link = Link::Away(why.into());
        }
        news
    });
}

/// A fleet must not turn to one server of a cluster.
fn shuffled(servers: &[Server]) -> Vec<Server> {
    let mut keyed: Vec<_> = servers
        .iter()
        .map(|server| (getrandom::u32().unwrap_or_default(), server.clone()))
        .collect();
    keyed.sort_by_key(|(key, _)| *key);
    keyed.into_iter().map(|(_, server)| server).collect()
}

/// The other servers of the cluster, by what this one says. They come after the configured ones.
///
/// It says so before TLS begins, where others can put in a word: servers that they name count only if the certificate of a
/// configured authority tells them from impostors.
fn remember(
    discovered: &mut Vec<Server>,
    info: &ServerInfo,
    from: &Server,
    settings: &RegistrySettings,
) {
    let tls = from.tls || info.tls_required || settings.tls != Tls::default();
    if tls && settings.tls.ca.is_none() {
        return;
    }
    let found = info.connect_urls.iter().take(MAX_DISCOVERED).filter_map(|url| {
        let (host, port) = url.rsplit_once(':')?;
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let usable = !host.is_empty() && host.len() < 256;
        usable.then_some(Server { host: host.to_owned(), port: port.parse().ok()?, tls })
    });
    let found: Vec<_> = found.collect();
    if !found.is_empty() {
        *discovered = found;
    }
}

struct NotConnected {
    reason: String,
    /// Something was there, and may be something else than it was.
    met: bool,
}

impl From<String> for NotConnected {
    fn from(reason: String) -> Self {
        Self { reason, met: true }
    }
}

/// Listens to how a stranger begins, as the library would keep whatever comes until there is a line end: a NATS server speaks
/// first, and says INFO.
async fn probe(server: &Server) -> Result<(), String> {
    let found = timeout(CONNECT, lookup_host((server.host.as_str(), server.port))).await;
    let Ok(Ok(addresses)) = found else {
        // The library says it better.
        return Ok(());
    };
    let addresses: Vec<SocketAddr> = addresses.take(MAX_ADDRESSES).collect();
    match timeout(CONNECT, listen_to(&addresses)).await {
        Ok(Ok(line)) if line.is_empty() => Err(format!("{server} closes the connection at once")),
        Ok(Ok(line)) if is_info(&line) => Ok(()),
        Ok(Ok(line)) => {
            let line = String::from_utf8_lossy(&line);
            let begins: String = reason::bounded(&line).chars().take(40).collect();
            Err(format!("{server} is no NATS server: it says {begins:?}"))
        }
        // Again, the library says it better.
        Ok(Err(_)) => Ok(()),
        Err(_) => Err(format!("{server} does not answer")),
    }
}

/// The first line of any of a server's addresses; one that says INFO is preferred. An error if there is none.
async fn listen_to(addresses: &[SocketAddr]) -> io::Result<Vec<u8>> {
    let mut attempts = FuturesUnordered::new();
    for (n, address) in (0_u32..).zip(addresses) {
        attempts.push(async move {
            // One that works is not disturbed by the others.
            sleep(NEXT_ADDRESS * n).await;
            let connected = TcpStream::connect(address).await?;
            let mut line = Vec::new();
            BufReader::new(connected.take(MAX_INFO)).read_until(b'\n', &mut line).await?;
            Ok(line)
        });
    }
    let mut last = Err(io::ErrorKind::NotFound.into());
    while let Some(heard) = attempts.next().await {
        match heard {
            Ok(line) if is_info(&line) => return Ok(line),
            Ok(line) => last = Ok(line),
            Err(error) if last.is_err() => last = Err(error),
            Err(_) => {}
        }
    }
    last
}

fn is_info(line: &[u8]) -> bool {
    line.starts_with(b"INFO ") && line.ends_with(b"\n")
}

/// One attempt with one server.
async fn connect(
    settings: &Arc<RegistrySettings>,
    server: &Server,
    known: bool,
) -> Result<(Session, mpsc::Receiver<Event>), NotConnected> {
    if !known {
        probe(server).await?;
    }
    let address: ServerAddr = server.to_string().parse().map_err(|_| {
        format!("{server} is no address of a server; it is written nats://host:port")
    })?;
    let options = {
        // Reads files.
        let settings = Arc::clone(settings);
        let read = tokio::task::spawn_blocking(move || login::options(&settings));
        let read = read.await.map_err(|error| format!("cannot read the credentials: {error}"))?;
        read.map_err(|Unusable { what, reason }| format!("the {what} cannot be used: {reason}"))?
    };
    let (sender, events) = mpsc::channel(128);
    let options = options
        .name("latchkey")
        .connection_timeout(CONNECT)
        .ping_interval(PING)
        .subscription_capacity(CAPACITY)
        .ignore_discovered_servers()
        // The least that can be asked for: none is "no limit".
        .max_reconnects(1)
        .event_callback(move |event| {
            let sender = sender.clone();
            async move {
                let _ = sender.send(event).await;
            }
        });
    // In a task of its own, as the library panics over some of what a server may say (`-ERR` and nothing else).
    let attempt = Attempt(tokio::spawn(options.connect(address)));
    let client = match timeout(CONNECT_ALL, attempt).await {
        Ok(Ok(Ok(client))) => client,
        Ok(Ok(Err(error))) => {
            let reason = reason::of(&error, server, settings);
            return Err(NotConnected { reason, met: !reason::unmet(&error) });
        }
        Ok(Err(_)) => {
            return Err(format!("{server} is no NATS server: it says what none would say").into());
        }
        Err(_) => return Err(format!("{server} does not answer").into()),
    };
    // From here on the library has nowhere to reconnect to: nobody can listen on port 0. It then gives up at once.
    if let Ok(nowhere) = "nats://127.0.0.1:0".parse::<ServerAddr>() {
        let _ = timeout(CONNECT, client.set_server_pool(nowhere)).await;
    }
    let session = Session {
        client,
        server: server.to_string(),
        over: watch::Sender::new(None),
        violations: watch::Sender::default(),
    };
    Ok((session, events))
}

/// A task that ends with whoever waits for it.
struct Attempt<T>(JoinHandle<T>);

impl<T> Future for Attempt<T> {
    type Output = Result<T, tokio::task::JoinError>;

    fn poll(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Self::Output> {
        std::pin::Pin::new(&mut self.0).poll(context)
    }
}

impl<T> Drop for Attempt<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Session {
    /// Until the connection is over: why.
    async fn serve(&self, events: &mut mpsc::Receiver<Event>) -> String {
        let mut last_words = None;
        let mut over = self.over.subscribe();
        let mut look = tokio::time::interval(LOOK);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut before = self.received();
        loop {
            let event = tokio::select! {
                event = events.recv() => event,
                why = over.wait_for(Option::is_some) => {
                    let why = why.ok().and_then(|why| why.clone());
                    return why.map_or_else(String::new, |why| why.to_string());
                }
                _ = look.tick() => {
                    let now = self.received();
                    if now.messages == before.messages && now.bytes > before.bytes + MAX_UNREAD {
                        return format!("{} sends more than any message of a mesh has", self.server);
                    }
                    before = now;
                    continue;
                }
            };
            match event {
                Some(Event::ServerError(error)) => {
                    let text = reason::said(&error);
                    if text.to_lowercase().starts_with("permissions violation") {
                        debug!("registry: {text}");
                        self.violations.send_modify(|violations| violations.add(&text));
                    } else {
                        last_words = Some(text);
                    }
                }
                Some(Event::Disconnected | Event::Closed) | None => {
                    return match last_words {
                        Some(words) => format!("{} closed the connection: {words}", self.server),
                        None => format!("the connection to {} is lost", self.server),
                    };
                }
                // That the library connects nowhere, and what is noticed where it matters: a slow consumer by its gap.
                Some(_) => {}
            }
        }
    }

    fn received(&self) -> Received {
        let statistics = self.client.statistics();
        Received {
            bytes: statistics.in_bytes.load(Ordering::Relaxed),
            messages: statistics.in_messages.load(Ordering::Relaxed),
        }
    }

    /// How many bytes have come: a number that grows while the server lives.
    pub(super) fn bytes(&self) -> u64 {
        self.received().bytes
    }

    pub(super) fn client(&self) -> &Client {
        &self.client
    }

    pub(super) fn server(&self) -> &str {
        &self.server
    }

    /// Gives the connection up, so that another is made.
    pub(super) fn end(&self, why: &str) {
        self.over.send_if_modified(|over| {
            let first = over.is_none();
            over.get_or_insert_with(|| why.into());
            first
        });
    }

    /// Waits until the connection is over: why.
    pub(super) async fn lost(&self) -> Arc<str> {
        let mut over = self.over.subscribe();
        let why = over.wait_for(Option::is_some).await;
        why.ok().and_then(|why| why.clone()).unwrap_or_else(|| "the connection is lost".into())
    }

    /// Asks, for at most `within`.
    pub(super) async fn request(
        &self,
        subject: &str,
        headers: Option<HeaderMap>,
        payload: Bytes,
        within: Duration,
    ) -> Result<Message, Unanswered> {
        let from = self.violations.borrow().count;
        let mut request = Request::new().payload(payload).timeout(Some(within));
        if let Some(headers) = headers {
            request = request.headers(headers);
        }
        let answer = self.client.send_request(subject.to_owned(), request);
        tokio::select! {
            // What the server answered, if it answered.
            biased;
            answer = answer => answer.map_err(|error| match error.kind() {
                RequestErrorKind::NoResponders => Unanswered::NoResponders,
                RequestErrorKind::TimedOut => Unanswered::TimedOut,
                _ => Unanswered::Lost(error.to_string()),
            }),
            text = self.violation(subject, from) => Err(Unanswered::NotPermitted(text)),
            why = self.lost() => Err(Unanswered::Lost(why.to_string())),
        }
    }

    /// Waits until the server refuses this subject, from the refusal with this number on, or that it is answered at all.
    async fn violation(&self, subject: &str, from: u64) -> String {
        let subject = format!("\"{subject}\"");
        self.violation_like(|number, text| {
            (number >= from && text.contains(&subject))
                || text.contains("Subscription to \"_INBOX.")
        })
        .await
    }

    /// Waits until the server refuses anything that begins so.
    pub(super) async fn violation_below(&self, subject: &str) -> String {
        let subject = format!("\"{subject}");
        self.violation_like(|_, text| text.contains(&subject)).await
    }

    async fn violation_like(&self, concerns: impl Fn(u64, &str) -> bool) -> String {
        let mut violations = self.violations.subscribe();
        loop {
            let found = {
                let violations = violations.borrow_and_update();
                let found = violations.texts.iter().find(|(number, text)| concerns(*number, text));
                found.map(|(_, text)| text.to_string())
            };
            match found {
                Some(text) => return text,
                // It lives as long as this.
                None => drop(violations.changed().await),
            }
        }
    }
}

struct Received {
    bytes: u64,
    messages: u64,
}

impl Violations {
    fn add(&mut self, text: &str) {
        self.texts.push_back((self.count, text.into()));
        self.count += 1;
        if self.texts.len() > MAX_VIOLATIONS {
            self.texts.pop_front();
        }
    }
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").field("server", &self.server).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::{Login, Pem};
    use tokio::io::AsyncWriteExt as _;

    #[tokio::test]
    async fn an_address_that_is_silent_does_not_keep_the_next_from_being_heard() {
        let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let speaking = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let closed = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addresses =
            [&closed, &silent, &speaking].map(|listener| listener.local_addr().unwrap());
        drop(closed);
        tokio::spawn(async move {
            let (mut stream, _) = speaking.accept().await.unwrap();
            stream.write_all(b"INFO {}\r\n").await.unwrap();
        });
        assert_eq!(listen_to(&addresses).await.unwrap(), b"INFO {}\r\n");
        assert!(listen_to(&addresses[..1]).await.is_err());
    }

    #[test]
    fn servers_that_anybody_may_have_named_do_not_count() {
        let server = |tls| Server { host: "a.example".into(), port: 4222, tls };
        let ca = Tls { ca: Some(Pem::File("ca.pem".into())), ..Tls::default() };
        let urls = ["b.example:4223", "[fd00::1]:4222", "nonsense", ":1", "c.example:99999"];
        let named = |tls: bool, tls_required: bool, settings: &Tls| {
            let settings = RegistrySettings {
                servers: vec![server(tls)],
                bucket: "b".into(),
                login: Login::None,
                tls: settings.clone(),
            };
            let connect_urls = urls.iter().map(ToString::to_string).collect();
            let info = ServerInfo { tls_required, connect_urls, ..ServerInfo::default() };
            let mut discovered = Vec::new();
            remember(&mut discovered, &info, &server(tls), &settings);
            discovered.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        let none: [&str; 0] = [];
        assert_eq!(named(true, true, &Tls::default()), none);
        assert_eq!(named(false, true, &Tls::default()), none);
        let plain = ["nats://b.example:4223", "nats://[fd00::1]:4222"];
        assert_eq!(named(false, false, &Tls::default()), plain);
        // And TLS where there was TLS.
        assert_eq!(named(false, true, &ca), ["tls://b.example:4223", "tls://[fd00::1]:4222"]);
    }
}
