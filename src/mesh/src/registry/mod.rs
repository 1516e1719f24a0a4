//! The registry: where the members of a mesh write their records and read those of the others.
//!
//! Implementations promise: what a [`Watch`] says is complete. It begins with a [`Event::Snapshot`], and after any gap
//! (connection lost, consumer lost, bucket made anew, a message missed) there is a new one. While the registry is away it says
//! so once ([`Event::Away`]) and goes on trying for ever, with jitter; nothing is ever taken for deleted because the
//! registry is silent.

pub mod nats;

use std::future::Future;

use bytes::Bytes;

/// One record as it is stored. The key is the registry's (`peers.<base64url>`), the value not yet looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub key: String,
    pub value: Bytes,
    /// Grows with each write to the registry, over all keys.
    pub revision: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Everything there is, in the place of all that was known. `incarnation` differs when the bucket was made anew:
    /// its revisions then begin at 1 again.
    Snapshot {
        incarnation: String,
        entries: Vec<Entry>,
    },
    Put(Entry),
    Deleted {
        key: String,
        revision: u64,
    },
    /// Not reachable, or not usable: why, for a person. Repeated only if the reason changes.
    Away {
        reason: String,
    },
}

/// What a write expects to find: optimistic locking.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expected {
    /// No such key, or a deleted one.
    Absent,
    Revision(u64),
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RegistryError {
    /// Somebody else has written in between.
    #[error("{key} has been changed by another node meanwhile")]
    LostRace { key: String },

    #[error(
        "the registry does not permit this node to {action} ({answer}); give its NATS user the permissions in docs/registry.md"
    )]
    NotPermitted { action: String, answer: String },

    #[error("there is no bucket {bucket} at {server}; create it (latchkey registry create)")]
    NoBucket { bucket: String, server: String },

    /// Anything that may pass.
    #[error("cannot {action}: {reason}")]
    Away { action: String, reason: String },
}

pub trait Registry: Clone + Send + Sync + 'static {
    type Watch: Watch;

    /// Starts to follow the registry, reachable or not.
    fn watch(&self) -> Self::Watch;

    /// The newest value of a key; `None` if there is none or it was deleted.
    fn get(&self, key: &str) -> impl Future<Output = Result<Option<Entry>, RegistryError>> + Send;

    /// Writes and returns the new revision.
    fn put(
        &self,
        key: &str,
        value: Bytes,
        expected: Expected,
    ) -> impl Future<Output = Result<u64, RegistryError>> + Send;

    /// Deletes the key if it still has this revision.
    fn delete(
        &self,
        key: &str,
        revision: u64,
    ) -> impl Future<Output = Result<(), RegistryError>> + Send;

    /// Where it is, for a person, without secrets: `nats://10.0.0.5:4222, bucket ikto-mesh`.
    fn describe(&self) -> String;
}

pub trait Watch: Send + 'static {
    /// The next event, however long it takes. Cancel safe.
    fn next(&mut self) -> impl Future<Output = Event> + Send;
}
