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

/// In this order records are looked at, each seeing only those before it. A revision is one of all keys; where a registry
/// is not that good, the key decides.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Turn {
    unsigned: bool,
    revision: u64,
    key: Arc<str>,
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
        self.settle(keys.iter().filter_map(|key| self.turn(key)).collect());
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
            self.peers.iter().map(|(node, peer)| peer.view(&self.ranges_of(*node))).collect();
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
        let mut nodes = BTreeSet::new();
        let mut unsettled = BTreeSet::new();
        nodes.extend(self.records.get(&key).and_then(Record::public_key));
        unsettled.extend(self.after(&key));
        self.leave(&key);
        match record {
            Some(record) => {
                nodes.extend(record.public_key());
                self.records.insert(Arc::clone(&key), record);
                self.enter(&key);
                unsettled.extend(self.after(&key));
                unsettled.extend(self.turn(&key));
            }
            None => drop(self.records.remove(&key)),
        }
        nodes.extend(self.settle(unsettled));
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

    /// When it is a record's turn; none if it is not valid.
    fn turn(&self, key: &Arc<str>) -> Option<Turn> {
        let record = self.records.get(key)?;
        let facts = record.valid()?;
        let unsigned = self.rules.signatures == SignaturePolicy::Prefer && !facts.signed;
        Some(Turn { unsigned, revision: record.revision(), key: Arc::clone(key) })
    }

    /// The records that overlap this one and whose turn is after its own: those that it is in the way of if it counts.
    fn after(&self, key: &Arc<str>) -> Vec<Turn> {
        let (Some(turn), Some(facts)) =
            (self.turn(key), self.records.get(key).and_then(Record::valid))
        else {
            return Vec::new();
        };
        let overlapping = self.overlapping(&facts.range).filter_map(|(_, key)| self.turn(key));
        overlapping.filter(|other| *other > turn).collect()
    }

    fn overlapping(&self, range: &Cidr) -> impl Iterator<Item = (Cidr, &Arc<str>)> {
        let ranges = self.ranges.covering(range).chain(self.ranges.within(range));
        ranges.flat_map(|(range, keys)| keys.iter().map(move |key| (range, key)))
    }

    /// Who is in the way of a valid record: of another node, before it, and counting.
    fn in_the_way(&self, turn: &Turn) -> Option<(Cidr, Holder)> {
        let record = self.records.get(&turn.key)?;
        let (range, node) = (record.valid()?.range, record.public_key()?);
        self.overlapping(&range).find_map(|(range, key)| {
            let other = self.records.get(key)?;
            let public_key = other.public_key().filter(|other| *other != node)?;
            other.counting()?;
            self.turn(key).filter(|other| other < turn)?;
            let holder = Holder { key: key.to_string(), public_key, revision: other.revision() };
            Some((range, holder))
        })
    }

    /// Decides in their turn who counts, of these and of those for whom that makes a difference. The nodes for which it
    /// made one.
    fn settle(&mut self, mut unsettled: BTreeSet<Turn>) -> BTreeSet<PublicKey> {
        let mut nodes = BTreeSet::new();
        while let Some(turn) = unsettled.pop_first() {
            let standing = match self.in_the_way(&turn) {
                None => Standing::Counts,
                Some((range, holder)) => Standing::Behind { range, holder },
            };
            let Some(record) = self.records.get_mut(&turn.key) else { continue };
            let changed = record.stand(standing);
            if changed {
                nodes.extend(record.public_key());
                unsettled.extend(self.after(&turn.key));
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
