//! Following the bucket: everything there is, then what changes, and everything again after any gap.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_nats::{HeaderMap, Message, Subscriber};
use bytes::Bytes;
use futures_util::StreamExt as _;
use latchkey_wire::member::MAX_MEMBER;
use log::{debug, info, warn};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, timeout};

use super::api::{self, HEARTBEAT, OPERATION, Position};
use super::backoff::{Backoff, up_to};
use super::link::{Link, Session};
use super::{Bucket, Trouble};
use crate::registry::{Entry, Event};

/// More members than any mesh has; the newest beyond are left out.
const MAX_RECORDS: usize = 20_000;
/// Two heartbeats may be missed, and a moment more.
const SILENCE: Duration = Duration::from_millis(2 * 5_000 + 1_000);
/// Longest wait after a question that nobody answered, which has taken seconds already. A cluster may have given the consumer
/// to a server that it has just lost: it never answers then, and most likely does if asked once more.
const AFTER_SILENCE: Duration = Duration::from_secs(5);
/// A watch that went well for so long begins anew with short waits.
const STABLE: Duration = Duration::from_secs(60);

/// Follows the bucket until nobody receives.
pub(super) async fn follow(
    bucket: Arc<Bucket>,
    mut link: watch::Receiver<Link>,
    events: mpsc::Sender<Event>,
) {
    let closed = events.clone();
    tokio::select! {
        () = closed.closed() => {}
        _ = run(&bucket, &mut link, &events) => {}
    }
}

/// Nobody receives any more.
struct Unheard;

async fn run(
    bucket: &Bucket,
    link: &mut watch::Receiver<Link>,
    events: &mpsc::Sender<Event>,
) -> Result<(), Unheard> {
    let mut telling = Telling { events, away: None };
    // Nodes that lose their consumers at one moment do not all read at one moment.
    let mut backoff = Backoff::new(Duration::from_millis(500));
    loop {
        let current = link.borrow_and_update().clone();
        let session = match current {
            Link::Up(session) => session,
            Link::Away(why) => {
                telling.away(&why).await?;
                link.changed().await.map_err(|_| Unheard)?;
                continue;
            }
            Link::Connecting => {
                link.changed().await.map_err(|_| Unheard)?;
                continue;
            }
        };
        let mut followed = Followed::default();
        let end = tokio::select! {
            end = one(bucket, &session, &mut telling, &mut followed) => end?,
            why = session.lost() => End::Lost(why.to_string()),
        };
        if followed.since.is_some_and(|since| since.elapsed() >= STABLE) {
            backoff.reset();
        }
        match end {
            End::Lost(why) => {
                telling.away(&why).await?;
                link.changed().await.map_err(|_| Unheard)?;
            }
            // Whatever had been missed is in the next snapshot.
            End::Gap(why) => {
                info!("registry: reading everything again: {why}");
                sleep(backoff.next()).await;
            }
            End::Failed(trouble) => {
                telling.away(&trouble.to_string()).await?;
                let wait = match &trouble {
                    Trouble::Silent { .. } => up_to(AFTER_SILENCE),
                    _ => backoff.next(),
                };
                debug!("registry: {trouble}; again in {} ms", wait.as_millis());
                tokio::select! {
                    () = sleep(wait) => {}
                    _ = session.lost() => {}
                }
            }
        }
    }
}

/// How following on one consumer ended.
enum End {
    /// The connection is over.
    Lost(String),
    /// Something may have been missed.
    Gap(String),
    Failed(Trouble),
}

/// How far it came.
#[derive(Default)]
struct Followed {
    /// When the snapshot was complete.
    since: Option<Instant>,
}

/// Tells the receiver; of the registry's absence once.
struct Telling<'a> {
    events: &'a mpsc::Sender<Event>,
    away: Option<String>,
}

impl Telling<'_> {
    async fn away(&mut self, why: &str) -> Result<(), Unheard> {
        if self.away.as_deref() == Some(why) {
            return Ok(());
        }
        self.away = Some(why.to_owned());
        self.send(Event::Away { reason: why.to_owned() }).await
    }

    async fn tell(&mut self, event: Event) -> Result<(), Unheard> {
        self.away = None;
        self.send(event).await
    }

    async fn send(&self, event: Event) -> Result<(), Unheard> {
        self.events.send(event).await.map_err(|_| Unheard)
    }
}

/// One consumer, from its creation to its end.
async fn one(
    bucket: &Bucket,
    session: &Arc<Session>,
    telling: &mut Telling<'_>,
    followed: &mut Followed,
) -> Result<End, Unheard> {
    let mut consumer = match Consumer::create(bucket, session).await {
        Ok(consumer) => consumer,
        Err(end) => return Ok(end),
    };
    let (mut records, incarnation) = match consumer.read_all(bucket).await {
        Ok(all) => all,
        Err(end) => return Ok(end),
    };
    let entries = records.take();
    debug!("registry: {} records, bucket of {incarnation}", entries.len());
    telling.tell(Event::Snapshot { incarnation, entries }).await?;
    followed.since = Some(Instant::now());
    loop {
        match consumer.next(bucket).await {
            Ok(Some(change)) => {
                if let Some(event) = records.live(change) {
                    telling.tell(event).await?;
                }
            }
            // A heartbeat.
            Ok(None) => {}
            Err(end) => return Ok(end),
        }
    }
}

/// A message about one key.
struct Change {
    key: String,
    /// None: deleted.
    value: Option<Bytes>,
    revision: u64,
    pending: u64,
}

/// A push consumer of ours, all of whose messages came so far.
struct Consumer<'a> {
    session: &'a Session,
    messages: Subscriber,
    /// When the bucket was made.
    created: String,
    /// How many of what there was are still to come.
    pending: u64,
    /// The number of the last message.
    last: u64,
}

impl<'a> Consumer<'a> {
    async fn create(bucket: &Bucket, session: &'a Session) -> Result<Self, End> {
        let stream = bucket.info(session).await.map_err(End::Failed)?;
        bucket.warn_of_limits(&stream);
        let inbox = session.client().new_inbox();
        let messages = session
            .client()
            .subscribe(inbox.clone())
            .await
            .map_err(|error| End::Lost(error.to_string()))?;
        let name = format!("latchkey-{:016x}", getrandom::u64().unwrap_or_default());
        let (subject, request) = api::consumer(&bucket.name, &name, &inbox);
        let info: api::ConsumerInfo = bucket
            .ask(session, "read the records", &subject, request.into())
            .await
            .map_err(End::Failed)?;
        let created = stream.created;
        Ok(Self { session, messages, created, pending: info.num_pending, last: 0 })
    }

    /// All that was there when it was created, and what has changed meanwhile.
    async fn read_all(&mut self, bucket: &Bucket) -> Result<(Records, String), End> {
        let mut records = Records::default();
        while self.pending > 0 {
            match self.next(bucket).await? {
                Some(change) => {
                    self.pending = change.pending;
                    records.read(change);
                }
                // It has nothing more to send, whatever it had counted.
                None => break,
            }
        }
        records.warn();
        // The bucket could have been made anew between the question about it and the consumer.
        let now = bucket.info(self.session).await.map_err(End::Failed)?;
        if now.created != self.created {
            return Err(End::Gap("the bucket has just been made anew".into()));
        }
        Ok((records, self.created.clone()))
    }

    /// The next message; None for a heartbeat. An error when one was missed, or nothing comes any more.
    async fn next(&mut self, bucket: &Bucket) -> Result<Option<Change>, End> {
        loop {
            let message = tokio::select! {
                biased;
                message = timeout(SILENCE, self.messages.next()) => message,
                text = self.session.violation_below("$JS.FC.") => {
                    let action = "acknowledge records (publish to $JS.FC.>)".into();
                    return Err(End::Failed(Trouble::NotPermitted { action, answer: text }));
                }
            };
            let message = match message {
                Ok(Some(message)) => message,
                Ok(None) => return Err(End::Lost("the connection is lost".into())),
                Err(_) => return Err(self.silent(bucket).await),
            };
            if message.status.is_some() {
                if self.control(&message).await? {
                    return Ok(None);
                }
                continue;
            }
            let position = message.reply.as_ref().and_then(|reply| Position::read(reply));
            let Some(position) = position else {
                // Somebody else's message to our inbox; the consumer's are never so.
                debug!("registry: a message that no consumer sends");
                continue;
            };
            if position.consumer != self.last + 1 {
                return Err(End::Gap(format!(
                    "message {} came after message {}",
                    position.consumer, self.last
                )));
            }
            self.last = position.consumer;
            if let Some(change) = change(&bucket.name, message, position) {
                return Ok(Some(change));
            }
        }
    }

    /// A status message: whether it is a heartbeat with which all is well.
    async fn control(&self, message: &Message) -> Result<bool, End> {
        let status = message.status.map(|status| status.as_u16()).unwrap_or_default();
        let description = message.description.as_deref().unwrap_or_default();
        if status != 100 {
            return Err(End::Gap(format!(
                "the server ended the consumer ({status} {description})"
            )));
        }
        if let Some(reply) = &message.reply {
            // Flow control: what was sent before this has been taken.
            self.acknowledge(reply).await?;
            return Ok(false);
        }
        let headers = message.headers.as_ref();
        if let Some(stalled) = headers.and_then(|headers| headers.get("Nats-Consumer-Stalled")) {
            self.acknowledge(stalled.as_str()).await?;
            return Ok(false);
        }
        let last = headers.and_then(|headers| number(headers, "Nats-Last-Consumer"));
        match last {
            Some(last) if last != self.last => {
                Err(End::Gap(format!("{last} messages were sent, and {} came", self.last)))
            }
            _ => Ok(true),
        }
    }

    async fn acknowledge(&self, subject: &str) -> Result<(), End> {
        let sent = self.session.client().publish(subject.to_owned(), Bytes::new()).await;
        sent.map_err(|error| End::Lost(error.to_string()))
    }

    /// No heartbeat came: the consumer is gone, or the bucket, or the server, or the way to it.
    async fn silent(&self, bucket: &Bucket) -> End {
        let before = self.session.bytes();
        match bucket.info(self.session).await {
            Ok(stream) if stream.created != self.created => {
                End::Gap("the bucket was made anew".into())
            }
            Ok(_) => End::Gap("the consumer is gone: no heartbeat came".into()),
            Err(Trouble::Silent { .. }) if self.session.bytes() == before => {
                let why = format!("{} has gone silent", self.session.server());
                self.session.end(&why);
                End::Lost(why)
            }
            Err(trouble) => End::Failed(trouble),
        }
    }
}

/// Reads a consumer's message. None: not a key of ours.
fn change(bucket: &str, message: Message, position: Position) -> Option<Change> {
    let prefix = format!("$KV.{bucket}.");
    let key = message.subject.as_str().strip_prefix(&prefix)?.to_owned();
    let operation = message.headers.as_ref().and_then(|headers| headers.get(OPERATION));
    let value = operation.is_none().then(|| bounded(&message.payload));
    Some(Change { key, value, revision: position.stream, pending: position.pending })
}

/// A copy, as the library's payload keeps the whole buffer that it came in; and of a value that is too long, just enough to
/// be too long.
pub(super) fn bounded(value: &[u8]) -> Bytes {
    Bytes::copy_from_slice(value.get(..=MAX_MEMBER).unwrap_or(value))
}

fn number(headers: &HeaderMap, name: &str) -> Option<u64> {
    headers.get(name)?.as_str().parse().ok()
}

/// What is known of the bucket: the records until they are handed on, then their keys.
#[derive(Default)]
struct Records {
    entries: BTreeMap<String, Entry>,
    keys: HashSet<String>,
    left_out: u64,
}

impl Records {
    fn read(&mut self, change: Change) {
        let Change { key, value, revision, .. } = change;
        match value {
            Some(value) => {
                if self.entries.len() >= MAX_RECORDS && !self.entries.contains_key(&key) {
                    self.left_out += 1;
                    return;
                }
                self.entries.insert(key.clone(), Entry { key, value, revision });
            }
            None => {
                self.entries.remove(&key);
            }
        }
    }

    fn warn(&self) {
        if self.left_out > 0 {
            warn!(
                "registry: the bucket has more than {MAX_RECORDS} records; {} are left out",
                self.left_out
            );
        }
    }

    /// The entries, oldest first.
    fn take(&mut self) -> Vec<Entry> {
        let mut entries: Vec<Entry> = std::mem::take(&mut self.entries).into_values().collect();
        entries.sort_by_key(|entry| entry.revision);
        self.keys = entries.iter().map(|entry| entry.key.clone()).collect();
        entries
    }

    /// None: left out.
    fn live(&mut self, change: Change) -> Option<Event> {
        let Change { key, value, revision, .. } = change;
        let Some(value) = value else {
            self.keys.remove(&key);
            return Some(Event::Deleted { key, revision });
        };
        if !self.keys.contains(&key) {
            if self.keys.len() >= MAX_RECORDS {
                self.left_out += 1;
                self.warn();
                return None;
            }
            self.keys.insert(key.clone());
        }
        Some(Event::Put(Entry { key, value, revision }))
    }
}

impl fmt::Debug for Consumer<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Consumer").field("last", &self.last).finish_non_exhaustive()
    }
}

const _: () = assert!(SILENCE.as_millis() > 2 * HEARTBEAT.as_millis());

#[cfg(test)]
mod tests {
    use super::*;

    fn put(n: usize, revision: u64) -> Change {
        let value = Some(Bytes::from_static(b"x"));
        Change { key: format!("peers.{n}"), value, revision, pending: 0 }
    }

    #[test]
    fn records_beyond_the_bound_are_left_out_the_newest_first() {
        let mut records = Records::default();
        (0..MAX_RECORDS + 5).for_each(|n| records.read(put(n, n as u64)));
        // A known one may change, and so make room for none.
        records.read(put(0, 90_000));
        assert_eq!(records.left_out, 5);
        let entries = records.take();
        assert_eq!(entries.len(), MAX_RECORDS);
        assert_eq!(entries[0].revision, 1);
        assert_eq!(entries[MAX_RECORDS - 1].revision, 90_000);

        assert_eq!(records.live(put(MAX_RECORDS, 90_001)), None);
        assert!(records.live(put(7, 90_002)).is_some());
        let gone = Change { key: "peers.7".into(), value: None, revision: 90_003, pending: 0 };
        assert_eq!(
            records.live(gone),
            Some(Event::Deleted { key: "peers.7".into(), revision: 90_003 })
        );
        assert!(records.live(put(MAX_RECORDS, 90_004)).is_some(), "there is room now");
    }

    #[test]
    fn a_key_that_is_deleted_while_it_is_read_is_none() {
        let mut records = Records::default();
        records.read(put(1, 1));
        records.read(put(2, 2));
        records.read(Change { key: "peers.1".into(), value: None, revision: 3, pending: 0 });
        let keys: Vec<_> = records.take().into_iter().map(|entry| entry.key).collect();
        assert_eq!(keys, ["peers.2"]);
    }
}
