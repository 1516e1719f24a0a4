//! A registry in memory: as exact about revisions, deletions and permissions as the real one, and done at once.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;
use tokio::sync::mpsc;

use crate::registry::{Entry, Event, Expected, Registry, RegistryError, Watch};

#[derive(Debug, Clone, Default)]
pub(crate) struct Memory(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    incarnation: u32,
    revision: u64,
    records: BTreeMap<String, Entry>,
    watches: Vec<mpsc::UnboundedSender<Event>>,
    forbidden: BTreeSet<String>,
    writes: u32,
}

#[derive(Debug)]
pub(crate) struct MemoryWatch(mpsc::UnboundedReceiver<Event>);

impl Memory {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// Somebody writes, whatever is there. The revision.
    pub(crate) fn write(&self, key: &str, value: impl Into<Bytes>) -> u64 {
        self.state().write(key, value.into())
    }

    /// Somebody deletes, whatever is there.
    pub(crate) fn remove(&self, key: &str) {
        self.state().remove(key);
    }

    pub(crate) fn forbid(&self, key: &str) {
        self.state().forbidden.insert(key.into());
    }

    pub(crate) fn permit(&self, key: &str) {
        self.state().forbidden.remove(key);
    }

    /// The bucket is deleted and made anew.
    pub(crate) fn make_anew(&self) {
        let mut state = self.state();
        state.incarnation += 1;
        state.revision = 0;
        state.records.clear();
        state.snapshot();
    }

    /// A gap: everything is told anew.
    pub(crate) fn interrupt(&self) {
        self.state().snapshot();
    }

    pub(crate) fn lose(&self) {
        self.state().tell(&Event::Away { reason: "gone".into() });
    }

    pub(crate) fn entry(&self, key: &str) -> Option<Entry> {
        self.state().records.get(key).cloned()
    }

    pub(crate) fn keys(&self) -> Vec<String> {
        self.state().records.keys().cloned().collect()
    }

    /// Writes and deletions that somebody has tried through the trait.
    pub(crate) fn writes(&self) -> u32 {
        self.state().writes
    }
}

impl State {
    fn tell(&mut self, event: &Event) {
        self.watches.retain(|watch| watch.send(event.clone()).is_ok());
    }

    fn snapshot(&mut self) {
        let event = self.as_snapshot();
        self.tell(&event);
    }

    fn as_snapshot(&self) -> Event {
        Event::Snapshot {
            incarnation: self.incarnation.to_string(),
            entries: self.records.values().cloned().collect(),
        }
    }

    fn write(&mut self, key: &str, value: Bytes) -> u64 {
        self.revision += 1;
        let entry = Entry { key: key.into(), value, revision: self.revision };
        self.records.insert(key.into(), entry.clone());
        self.tell(&Event::Put(entry));
        self.revision
    }

    fn remove(&mut self, key: &str) {
        self.revision += 1;
        self.records.remove(key);
        self.tell(&Event::Deleted { key: key.into(), revision: self.revision });
    }

    fn check(&mut self, key: &str, expected: Expected) -> Result<(), RegistryError> {
        self.writes += 1;
        if self.forbidden.contains(key) {
            let answer = "Permissions Violation".into();
            return Err(RegistryError::NotPermitted { action: format!("write {key}"), answer });
        }
        let there = self.records.get(key).map(|entry| entry.revision);
        let as_expected = match expected {
            Expected::Absent => there.is_none(),
            Expected::Revision(revision) => there == Some(revision),
        };
        if as_expected { Ok(()) } else { Err(RegistryError::LostRace { key: key.into() }) }
    }
}

impl Registry for Memory {
    type Watch = MemoryWatch;

    fn watch(&self) -> MemoryWatch {
        let (sender, receiver) = mpsc::unbounded_channel();
        let mut state = self.state();
        sender.send(state.as_snapshot()).unwrap();
        state.watches.push(sender);
        MemoryWatch(receiver)
    }

    async fn get(&self, key: &str) -> Result<Option<Entry>, RegistryError> {
        Ok(self.entry(key))
    }

    async fn put(&self, key: &str, value: Bytes, expected: Expected) -> Result<u64, RegistryError> {
        let mut state = self.state();
        state.check(key, expected)?;
        Ok(state.write(key, value))
    }

    async fn delete(&self, key: &str, revision: u64) -> Result<(), RegistryError> {
        let mut state = self.state();
        state.check(key, Expected::Revision(revision))?;
        state.remove(key);
        Ok(())
    }

    fn describe(&self) -> String {
        "memory".into()
    }
}

impl Watch for MemoryWatch {
    async fn next(&mut self) -> Event {
        match self.0.recv().await {
            Some(event) => event,
            None => std::future::pending().await,
        }
    }
}
