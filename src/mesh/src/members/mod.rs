//! Who is a member: the registry's records, judged one by one, against each other, and put together per public key. Pure.
//!
//! What is known is a function of the newest record of each key and of nothing else: not of the order in which records came,
//! nor of those that came before. One change costs what the records that it touches cost, not what all of them do.
//!
//! Of records of different nodes whose prefixes overlap one counts, the others are problems: in the order of their revisions,
//! oldest first, a record counts if it is in nobody's way who counts already. Under [`SignaturePolicy::Prefer`] all that are
//! signed come before all that are not, so that writing to the registry is not enough to take a signed member's address.

mod peer;
mod ranges;
mod record;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use latchkey_wire::member::{Cidr, SignaturePolicy};

pub use peer::{Endpoint, MemberPeer};

use crate::key::PublicKey;
use crate::registry::Entry;
use crate::view::{MemberView, Problem};
use ranges::Ranges;
use record::{Facts, Record, Standing};

/// Most deletions remembered, so that records older than they are stay deleted. Those that come late are moments late.
const MAX_DELETED: usize = 20_000;

/// What a record has to be to count.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules {
    /// Signatures are for one bucket.
    pub bucket: String,
    pub mesh: Cidr,
    /// This node's key: its records are no peers, but hold their prefixes as any other's.
    pub own: PublicKey,
    pub signatures: SignaturePolicy,
    /// Whether a record must lie in the mesh and stand under its own key.
    pub strict: bool,
}

/// Who has a prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// The registry's key.
    pub key: String,
    pub public_key: PublicKey,
    pub revision: u64,
}

#[derive(Debug)]
pub struct Members {
    rules: Rules,
    records: BTreeMap<Arc<str>, Record>,
    /// Revisions of deletions.
    deleted: BTreeMap<String, u64>,
    /// The valid records' keys, whether they count or not.
    ranges: Ranges<BTreeSet<Arc<str>>>,
    /// The readable records' keys, valid or not.
    nodes: BTreeMap<PublicKey, BTreeSet<Arc<str>>>,
    peers: BTreeMap<PublicKey, MemberPeer>,
}

impl Members {
    pub fn new(rules: Rules) -> Self {
        Self {
            rules,
            records: BTreeMap::new(),
            deleted: BTreeMap::new(),
            ranges: Ranges::default(),
            nodes: BTreeMap::new(),
            peers: BTreeMap::new(),
        }
    }

    pub fn rules(&self) -> &Rules {
        &self.rules
    }

    /// Everything there is, in the place of all that was known. Of several entries under one key the newest counts.
    /// Whether [`Members::peers`] is another now.
    pub fn replace(&mut self, entries: Vec<Entry>) -> bool {
        let mut known = std::mem::take(&mut self.records);
        let before = std::mem::take(&mut self.peers);
        *self = Self::new(self.rules.clone());
        for entry in entries {
            if self
                .records
                .get(entry.key.as_str())
                .is_some_and(|had| had.revision() >= entry.revision)
            {
                continue;
            }
            // A signature is dear to verify, and most records of a new snapshot are those of the last.
            let record = match known.remove(entry.key.as_str()) {
                Some(record) if record.is_of(&entry) => record.renewed(entry.revision),
                _ => Record::read(&self.rules, &entry),
            };
            self.records.insert(entry.key.as_str().into(), record);
        }
        let keys: Vec<Arc<str>> = self.records.keys().cloned().collect();
        keys.iter().for_each(|key| self.enter(key));
        self.settle(keys.into_iter().collect());
        self.gather(self.nodes.keys().copied().collect());
        self.peers != before
    }

    /// A record was written. Whether [`Members::peers`] is another now.
    pub fn put(&mut self, entry: Entry) -> bool {
        let known = self.records.get(entry.key.as_str()).map(Record::revision);
        let newest = known.max(self.deleted.get(&entry.key).copied());
        if newest.is_some_and(|newest| newest >= entry.revision) {
            return false;
        }
        self.deleted.remove(&entry.key);
        let known = self.records.get(entry.key.as_str());
        let record = match known.filter(|record| record.is_of(&entry)) {
            Some(record) => record.clone().renewed(entry.revision),
            None => Record::read(&self.rules, &entry),
        };
        self.exchange(entry.key.as_str().into(), Some(record))
    }

    /// A record was deleted. Whether [`Members::peers`] is another now.
    pub fn delete(&mut self, key: &str, revision: u64) -> bool {
        if self.records.get(key).is_some_and(|record| record.revision() > revision) {
            return false;
        }
        let newest = self.deleted.get(key).copied().max(Some(revision)).unwrap_or(revision);
        self.deleted.insert(key.to_owned(), newest);
        self.forget_deletions();
        self.exchange(key.into(), None)
    }

    /// The others, by public key.
    pub fn peers(&self) -> &BTreeMap<PublicKey, MemberPeer> {
        &self.peers
    }

    /// The records that do not count, and why, by key.
    pub fn problems(&self) -> Vec<Problem> {
        let problem = |(key, record): (&Arc<str>, &Record)| {
            let reason = record.problem()?;
            Some(Problem { key: key.to_string(), revision: record.revision(), reason })
        };
        self.records.iter().filter_map(problem).collect()
    }

    /// Who of the others has `range`, or a part of it, or more than it.
    pub fn taken(&self, range: &Cidr) -> Option<Holder> {
        let range = range.masked();
        let keys = self.ranges.covering(&range).chain(self.ranges.within(&range));
        keys.flat_map(|(_, keys)| keys).find_map(|key| {
            let record = self.records.get(key)?;
            let public_key = record.public_key().filter(|node| *node != self.rules.own)?;
            record.counting()?;
            Some(Holder { key: key.to_string(), public_key, revision: record.revision() })
        })
    }

    /// The records with our public key, under whatever key, whether they count or not.
    pub fn own(&self) -> Vec<&Entry> {
        let keys = self.nodes.get(&self.rules.own).into_iter().flatten();
        keys.filter_map(|key| self.get(key)).collect()
    }

    /// The value of a record that is too long to be one is not kept.
    pub fn get(&self, key: &str) -> Option<&Entry> {
        self.records.get(key).map(Record::entry)
    }

    /// All records, those that do not count among them, by key.
    pub fn entries(&self) -> Vec<Entry> {
        self.records.values().map(|record| record.entry().clone()).collect()
    }

    /// The others as they are shown, by name and then by key.
    pub fn views(&self) -> Vec<MemberView> {
        let mut views: Vec<MemberView> =
            self.peers.iter().map(|(node, peer)| peer.view(self.ranges_of(*node))).collect();
        views.sort_by(|a, b| (&a.name, &a.public_key).cmp(&(&b.name, &b.public_key)));
        views
    }

    fn ranges_of(&self, node: PublicKey) -> BTreeSet<Cidr> {
        self.counting_of(node).map(|(_, facts)| facts.allowed_ip).collect()
    }

    fn counting_of(&self, node: PublicKey) -> impl Iterator<Item = (u64, &Facts)> {
        let keys = self.nodes.get(&node).into_iter().flatten();
        keys.filter_map(|key| {
            let record = self.records.get(key)?;
            Some((record.revision(), record.counting()?))
        })
    }

    /// Puts one record in the place of another, and settles what either is in the way of.
    fn exchange(&mut self, key: Arc<str>, record: Option<Record>) -> bool {
        let mut touched = BTreeSet::from([Arc::clone(&key)]);
        let mut nodes = BTreeSet::new();
        let mut ranges = Vec::new();
        if let Some(before) = self.records.get(&key) {
            nodes.extend(before.public_key());
            ranges.extend(before.valid().map(|facts| facts.range));
        }
        // The widest prefix around the old one holds all that it was in the way of, also once it is gone.
        let mut widest: Vec<Cidr> = ranges.iter().map(|range| self.ranges.widest(range)).collect();
        self.leave(&key);
        match record {
            Some(record) => {
                nodes.extend(record.public_key());
                let range = record.valid().map(|facts| facts.range);
                self.records.insert(Arc::clone(&key), record);
                self.enter(&key);
                widest.extend(range.map(|range| self.ranges.widest(&range)));
            }
            None => drop(self.records.remove(&key)),
        }
        for range in widest {
            touched.extend(self.ranges.within(&range).flat_map(|(_, keys)| keys).cloned());
        }
        nodes.extend(self.settle(touched));
        self.gather(nodes)
    }

    fn enter(&mut self, key: &Arc<str>) {
        let Some(record) = self.records.get(key) else { return };
        if let Some(node) = record.public_key() {
            self.nodes.entry(node).or_default().insert(Arc::clone(key));
        }
        if let Some(facts) = record.valid() {
            self.ranges.entry(facts.range).insert(Arc::clone(key));
        }
    }

    fn leave(&mut self, key: &Arc<str>) {
        let Some(record) = self.records.get(key) else { return };
        if let Some(node) = record.public_key()
            && let Some(keys) = self.nodes.get_mut(&node)
        {
            keys.remove(key);
            if keys.is_empty() {
                self.nodes.remove(&node);
            }
        }
        if let Some(facts) = record.valid() {
            let keys = self.ranges.entry(facts.range);
            keys.remove(key);
            if keys.is_empty() {
                self.ranges.remove(&facts.range);
            }
        }
    }

    /// Which of the records under `keys` count, where nothing outside of `keys` is in the way of any of them. The nodes for
    /// which that is another answer than before.
    fn settle(&mut self, keys: BTreeSet<Arc<str>>) -> BTreeSet<PublicKey> {
        let prefer = self.rules.signatures == SignaturePolicy::Prefer;
        let mut order: Vec<(bool, u64, Arc<str>)> = keys
            .into_iter()
            .filter_map(|key| {
                let record = self.records.get(&key)?;
                let facts = record.valid()?;
                Some((prefer && !facts.signed, record.revision(), key))
            })
            .collect();
        order.sort_unstable();
        let mut counting: Ranges<Holder> = Ranges::default();
        let mut nodes = BTreeSet::new();
        for (_, revision, key) in order {
            let Some(record) = self.records.get_mut(&key) else { continue };
            let (Some(range), Some(node)) =
                (record.valid().map(|facts| facts.range), record.public_key())
            else {
                continue;
            };
            let in_the_way = counting
                .covering(&range)
                .chain(counting.within(&range))
                .find(|(_, holder)| holder.public_key != node)
                .map(|(range, holder)| (range, holder.clone()));
            if in_the_way.is_none() && counting.get(&range).is_none() {
                let holder = Holder { key: key.to_string(), public_key: node, revision };
                counting.insert(range, holder);
            }
            if record.stand(match in_the_way {
                None => Standing::Counts,
                Some((range, holder)) => Standing::Behind { range, holder },
            }) {
                nodes.insert(node);
            }
        }
        nodes
    }

    /// Puts these peers together anew. Whether one is another now.
    fn gather(&mut self, nodes: BTreeSet<PublicKey>) -> bool {
        let prefer = self.rules.signatures == SignaturePolicy::Prefer;
        let mut changed = false;
        for node in nodes {
            if node == self.rules.own {
                continue;
            }
            let records: Vec<(u64, &Facts)> = self.counting_of(node).collect();
            let peer = MemberPeer::of(node, &records, prefer);
            if self.peers.get(&node) != peer.as_ref() {
                changed = true;
                match peer {
                    Some(peer) => drop(self.peers.insert(node, peer)),
                    None => drop(self.peers.remove(&node)),
                }
            }
        }
        changed
    }

    fn forget_deletions(&mut self) {
        if self.deleted.len() <= MAX_DELETED {
            return;
        }
        let mut revisions: Vec<u64> = self.deleted.values().copied().collect();
        let (_, middle, _) = revisions.select_nth_unstable(MAX_DELETED / 2);
        let middle = *middle;
        self.deleted.retain(|_, revision| *revision > middle);
    }
}

#[cfg(test)]
mod tests;
