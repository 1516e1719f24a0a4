//! A NATS JetStream key-value bucket as registry (protocols/ikto-kilo.md §1.4 to §1.7, NATS ADR-8).
//!
//! * [`link`]: the connection, kept for ever
//! * [`follow`]: all records, and what changes
//! * here: single reads and writes

mod api;
mod backoff;
mod bucket;
mod follow;
mod link;
mod login;
mod reason;
mod tls;

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_nats::{HeaderMap, StatusCode};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use log::warn;
use serde::Deserialize;
use tokio::sync::{mpsc, watch};
use tokio::time::{sleep, timeout};

pub use bucket::{BucketOptions, BucketState, create_bucket};

use self::api::{ApiError, Refusal, StreamInfo, code};
use self::backoff::Backoff;
use self::link::{Link, Session, Unanswered};
use super::{Entry, Event, Expected, Registry, RegistryError, Watch};
use crate::error::{Error, Result};
use crate::settings::RegistrySettings;

/// Longest wait for one answer.
const ANSWER: Duration = Duration::from_secs(5);
/// Longest wait for a read or a write with all its attempts.
const OPERATION: Duration = Duration::from_secs(12);
/// Longest wait for the first attempt to connect.
const FIRST_CONNECTION: Duration = Duration::from_secs(20);
/// Events on their way to a receiver that is busy. One that is busier still gets a new snapshot later.
const EVENTS: usize = 256;

/// A registry; clones share one connection, which ends with the last of them and of their watches.
#[derive(Debug, Clone)]
pub struct Nats {
    bucket: Arc<Bucket>,
    link: watch::Receiver<Link>,
}

#[derive(Debug)]
pub struct NatsWatch {
    events: mpsc::Receiver<Event>,
}

/// The bucket, and what is known of it.
#[derive(Debug)]
struct Bucket {
    name: String,
    /// Servers and bucket, for a person.
    described: String,
    seen: Mutex<Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    /// Whether any of the servers answers reads, as this was last said.
    allow_direct: Option<bool>,
    /// The bucket of whose limits has been warned, by its time of creation.
    warned: Option<String>,
}

/// Why something cannot be done now.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Trouble {
    NotPermitted {
        action: String,
        answer: String,
    },
    NoBucket {
        bucket: String,
        server: String,
    },
    /// Asked, and no answer.
    Silent {
        what: String,
        server: String,
    },
    Refused(ApiError),
    Other(String),
}

impl Nats {
    /// Begins to connect, and goes on until it succeeds. To be called in a tokio runtime.
    ///
    /// # Errors
    /// Only what no waiting will mend: credentials, certificates and keys that cannot be read or understood.
    pub fn connect(settings: RegistrySettings) -> Result<Self> {
        login::options(&settings)
            .map_err(|login::Unusable { what, reason }| Error::RegistrySettings { what, reason })?;
        // For the library's own TLS, where nothing is configured and the server wants it. Fails if there is one already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let servers: Vec<_> = settings.servers.iter().map(ToString::to_string).collect();
        let bucket = Bucket {
            described: format!("{}, bucket {}", servers.join(", "), settings.bucket),
            name: settings.bucket.clone(),
            seen: Mutex::default(),
        };
        Ok(Self { bucket: Arc::new(bucket), link: link::open(Arc::new(settings)) })
    }

    /// The connection, once the first attempt is over.
    async fn session(&self, action: &str) -> Result<Arc<Session>, RegistryError> {
        let away =
            |reason: &str| RegistryError::Away { action: action.into(), reason: reason.into() };
        let mut link = self.link.clone();
        let known = link.wait_for(|link| !matches!(link, Link::Connecting));
        match timeout(FIRST_CONNECTION, known).await {
            Ok(Ok(link)) => match &*link {
                Link::Up(session) => Ok(Arc::clone(session)),
                Link::Away(why) => Err(away(why)),
                Link::Connecting => Err(away("not connected yet")),
            },
            _ => Err(away("not connected yet")),
        }
    }

    async fn within<T>(
        &self,
        action: &str,
        doing: impl Future<Output = Result<T, RegistryError>>,
    ) -> Result<T, RegistryError> {
        timeout(OPERATION, doing).await.unwrap_or_else(|_| {
            let reason = format!("no answer within {} s", OPERATION.as_secs());
            Err(RegistryError::Away { action: action.into(), reason })
        })
    }
}

impl Registry for Nats {
    type Watch = NatsWatch;

    fn watch(&self) -> NatsWatch {
        let (sender, events) = mpsc::channel(EVENTS);
        tokio::spawn(follow::follow(Arc::clone(&self.bucket), self.link.clone(), sender));
        NatsWatch { events }
    }

    async fn get(&self, key: &str) -> Result<Option<Entry>, RegistryError> {
        let action = format!("read {key}");
        let session = self.session(&action).await?;
        self.within(&action, async {
            let newest = self.bucket.newest(&session, key).await;
            let newest = newest.map_err(|trouble| trouble.while_doing(&action))?;
            Ok(newest.and_then(Newest::entry))
        })
        .await
    }

    async fn put(&self, key: &str, value: Bytes, expected: Expected) -> Result<u64, RegistryError> {
        let action = format!("write {key}");
        let session = self.session(&action).await?;
        let write = Write { bucket: &self.bucket, session: &session, key, action: &action };
        self.within(&action, write.put(value, expected)).await
    }

    async fn delete(&self, key: &str, revision: u64) -> Result<(), RegistryError> {
        let action = format!("delete {key}");
        let session = self.session(&action).await?;
        let write = Write { bucket: &self.bucket, session: &session, key, action: &action };
        self.within(&action, write.delete(revision)).await
    }

    fn describe(&self) -> String {
        self.bucket.described.clone()
    }
}

impl Watch for NatsWatch {
    async fn next(&mut self) -> Event {
        match self.events.recv().await {
            Some(event) => event,
            // The task that follows ends only with its receiver, or with the runtime.
            None => std::future::pending().await,
        }
    }
}

/// The newest message of a key.
struct Newest {
    key: String,
    revision: u64,
    /// None: the mark of a deleted key.
    value: Option<Bytes>,
}

impl Newest {
    fn entry(self) -> Option<Entry> {
        let Self { key, revision, value } = self;
        Some(Entry { key, value: value?, revision })
    }
}

impl Bucket {
    /// Asks the API; `action` is what for, as in "not permitted to …".
    async fn ask<T: for<'de> Deserialize<'de>>(
        &self,
        session: &Session,
        action: &str,
        subject: &str,
        payload: Bytes,
    ) -> Result<T, Trouble> {
        let answer = session.request(subject, None, payload, ANSWER).await;
        let message = answer.map_err(|unanswered| self.unanswered(unanswered, session, action))?;
        api::answer(&message.payload).map_err(|refusal| self.refused(refusal, session))
    }

    fn unanswered(&self, unanswered: Unanswered, session: &Session, action: &str) -> Trouble {
        match unanswered {
            Unanswered::NotPermitted(answer) => {
                Trouble::NotPermitted { action: action.into(), answer: reason::bounded(&answer) }
            }
            Unanswered::NoResponders => Trouble::Other(format!(
                "JetStream does not answer at {}: it is not enabled there (jetstream {{}} in nats-server's configuration), \
                 or has no leader",
                session.server()
            )),
            Unanswered::TimedOut => {
                Trouble::Silent { what: action.into(), server: session.server().into() }
            }
            Unanswered::Lost(why) => Trouble::Other(why),
        }
    }

    fn refused(&self, refusal: Refusal, session: &Session) -> Trouble {
        match refusal {
            Refusal::Api(error) => match error.err_code {
                code::STREAM_NOT_FOUND => {
                    Trouble::NoBucket { bucket: self.name.clone(), server: session.server().into() }
                }
                code::NOT_ENABLED | code::NOT_ENABLED_FOR_ACCOUNT => Trouble::Other(format!(
                    "JetStream is not enabled at {}, or not for this node's account: {}",
                    session.server(),
                    reason::bounded(&error.description)
                )),
                _ => Trouble::Refused(error),
            },
            Refusal::NotUnderstood(why) => {
                Trouble::Other(format!("{} gives an answer that is none: {why}", session.server()))
            }
        }
    }

    async fn info(&self, session: &Session) -> Result<StreamInfo, Trouble> {
        let subject = format!("$JS.API.STREAM.INFO.KV_{}", self.name);
        let action = format!("look at bucket {}", self.name);
        let info = self.ask::<StreamInfo>(session, &action, &subject, Bytes::new()).await;
        // To one that is gone a direct read would go unanswered.
        let direct = info.as_ref().ok().map(|info| info.config.allow_direct);
        self.seen(|seen| seen.allow_direct = direct);
        info
    }

    fn seen<T>(&self, look: impl FnOnce(&mut Seen) -> T) -> T {
        look(&mut self.seen.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Says once what will go wrong with a bucket that was made in another way.
    fn warn_of_limits(&self, stream: &StreamInfo) {
        let first = self.seen(|seen| seen.warned.replace(stream.created.clone()))
            != Some(stream.created.clone());
        if first && stream.config.max_age > 0 {
            warn!(
                "registry: records in bucket {} expire after {} s, those of live members, too: nodes write theirs when they \
                 start, no more often; take the TTL off (nats stream edit KV_{} --max-age=0)",
                self.name,
                stream.config.max_age / 1_000_000_000,
                self.name
            );
        }
    }

    /// The newest message of a key, deleted or not.
    async fn newest(&self, session: &Session, key: &str) -> Result<Option<Newest>, Trouble> {
        let direct = match self.seen(|seen| seen.allow_direct) {
            Some(direct) => direct,
            None => self.info(session).await?.config.allow_direct,
        };
        if !direct {
            return self.newest_from_leader(session, key).await;
        }
        let subject = format!("$JS.API.DIRECT.GET.KV_{0}.$KV.{0}.{key}", self.name);
        let message = match session.request(&subject, None, Bytes::new(), ANSWER).await {
            Ok(message) => message,
            // The bucket is gone, or is another one by now that does not allow this.
            Err(other @ (Unanswered::NoResponders | Unanswered::TimedOut)) => {
                return match self.info(session).await?.config.allow_direct {
                    true => Err(self.unanswered(other, session, &format!("read {key}"))),
                    false => self.newest_from_leader(session, key).await,
                };
            }
            Err(other) => return Err(self.unanswered(other, session, &format!("read {key}"))),
        };
        match message.status {
            None | Some(StatusCode::OK) => {}
            Some(StatusCode::NOT_FOUND) => return Ok(None),
            Some(status) => {
                let description = message.description.unwrap_or_default();
                return Err(Trouble::Other(format!(
                    "{} answers {status} {}",
                    session.server(),
                    reason::bounded(&description)
                )));
            }
        }
        let headers = message.headers.unwrap_or_default();
        let revision = headers.get("Nats-Sequence").and_then(|value| value.as_str().parse().ok());
        let Some(revision) = revision else {
            return Err(Trouble::Other(format!(
                "{} gives a value without revision",
                session.server()
            )));
        };
        let deleted = headers.get(api::OPERATION).is_some();
        let value = (!deleted).then(|| follow::bounded(&message.payload));
        Ok(Some(Newest { key: key.to_owned(), revision, value }))
    }

    /// The same where only the leader may be asked.
    async fn newest_from_leader(
        &self,
        session: &Session,
        key: &str,
    ) -> Result<Option<Newest>, Trouble> {
        let subject = format!("$JS.API.STREAM.MSG.GET.KV_{}", self.name);
        let question =
            serde_json::json!({ "last_by_subj": format!("$KV.{}.{key}", self.name) }).to_string();
        let action = format!("read {key}");
        let answer = self.ask(session, &action, &subject, question.into()).await;
        let stored: api::StoredMessage = match answer {
            Ok(stored) => stored,
            Err(Trouble::Refused(error)) if error.err_code == code::NO_MESSAGE => return Ok(None),
            Err(trouble) => return Err(trouble),
        };
        let decode = |text: &str| BASE64_STANDARD.decode(text).unwrap_or_default();
        let headers = decode(&stored.message.hdrs);
        let headers = String::from_utf8_lossy(&headers);
        let deleted = headers.lines().any(|line| line.starts_with(api::OPERATION));
        let value = (!deleted).then(|| follow::bounded(&decode(&stored.message.data)));
        Ok(Some(Newest { key: key.to_owned(), revision: stored.message.seq, value }))
    }
}

/// A write of one key on one connection.
struct Write<'a> {
    bucket: &'a Bucket,
    session: &'a Session,
    key: &'a str,
    action: &'a str,
}

/// How an attempt to write ended without success.
enum Failed {
    /// Another revision is the newest.
    Revision,
    Trouble(Trouble),
}

impl Write<'_> {
    async fn put(&self, value: Bytes, expected: Expected) -> Result<u64, RegistryError> {
        let sequence = match expected {
            Expected::Absent => 0,
            Expected::Revision(revision) => revision,
        };
        let result = match self.publish(None, value.clone(), sequence).await {
            Err(Failed::Revision) => {
                let newest = self.newest().await?;
                match newest {
                    // An earlier attempt of ours whose answer was lost.
                    Some(Newest { value: Some(there), revision, .. }) if there == value => {
                        return Ok(revision);
                    }
                    Some(Newest { value: None, revision, .. }) if expected == Expected::Absent => {
                        self.publish(None, value, revision).await
                    }
                    _ => Err(Failed::Revision),
                }
            }
            other => other,
        };
        self.outcome(result)
    }

    async fn delete(&self, revision: u64) -> Result<(), RegistryError> {
        let result = self.publish(Some("DEL"), Bytes::new(), revision).await;
        if matches!(result, Err(Failed::Revision)) {
            let newest = self.newest().await?;
            if newest.is_none_or(|newest| newest.value.is_none()) {
                return Ok(());
            }
        }
        self.outcome(result).map(drop)
    }

    async fn newest(&self) -> Result<Option<Newest>, RegistryError> {
        let newest = self.bucket.newest(self.session, self.key).await;
        newest.map_err(|trouble| trouble.while_doing(self.action))
    }

    fn outcome(&self, result: Result<u64, Failed>) -> Result<u64, RegistryError> {
        result.map_err(|failed| match failed {
            Failed::Revision => RegistryError::LostRace { key: self.key.into() },
            Failed::Trouble(trouble) => trouble.while_doing(self.action),
        })
    }

    /// Asks again while a cluster looks for a leader: with the same expectation, it is written once at most.
    async fn publish(
        &self,
        operation: Option<&str>,
        value: Bytes,
        newest: u64,
    ) -> Result<u64, Failed> {
        let subject = format!("$KV.{}.{}", self.bucket.name, self.key);
        let mut headers = HeaderMap::new();
        headers.insert(api::EXPECTED, newest.to_string());
        if let Some(operation) = operation {
            headers.insert(api::OPERATION, operation);
        }
        let mut backoff = Backoff::new(Duration::from_millis(100));
        loop {
            let sent =
                self.session.request(&subject, Some(headers.clone()), value.clone(), ANSWER).await;
            match sent {
                Ok(answer) => return self.acknowledged(&answer.payload),
                Err(Unanswered::TimedOut) => {}
                Err(Unanswered::NoResponders) => {
                    // Without a bucket, nobody listens either.
                    let info = self.bucket.info(self.session).await;
                    if let Err(
                        trouble @ (Trouble::NoBucket { .. } | Trouble::NotPermitted { .. }),
                    ) = info
                    {
                        return Err(Failed::Trouble(trouble));
                    }
                }
                Err(other) => {
                    let trouble = self.bucket.unanswered(other, self.session, self.action);
                    return Err(Failed::Trouble(trouble));
                }
            }
            sleep(backoff.next()).await;
        }
    }

    fn acknowledged(&self, payload: &[u8]) -> Result<u64, Failed> {
        match api::answer::<api::PubAck>(payload) {
            Ok(ack) => Ok(ack.seq),
            Err(Refusal::Api(error)) if error.err_code == code::WRONG_LAST_SEQUENCE => {
                Err(Failed::Revision)
            }
            Err(refusal) => Err(Failed::Trouble(self.bucket.refused(refusal, self.session))),
        }
    }
}

impl Trouble {
    fn while_doing(self, action: &str) -> RegistryError {
        match self {
            Self::NotPermitted { action, answer } => RegistryError::NotPermitted { action, answer },
            Self::NoBucket { bucket, server } => RegistryError::NoBucket { bucket, server },
            other => RegistryError::Away { action: action.into(), reason: other.to_string() },
        }
    }
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotPermitted { .. } | Self::NoBucket { .. } => {
                write!(f, "{}", self.clone().while_doing(""))
            }
            Self::Silent { what, server } => {
                write!(
                    f,
                    "{server} does not answer when asked to {what}; has its JetStream a leader?"
                )
            }
            Self::Refused(error) => {
                let text = reason::bounded(&error.description);
                write!(f, "refused: {text} (JetStream error {})", error.err_code)
            }
            Self::Other(why) => f.write_str(why),
        }
    }
}
