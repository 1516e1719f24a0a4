//! How a node becomes a member of a mesh and stays one: what is known of the members, whether the own record stands, and what to
//! do about it next. No I/O, and a clock that is passed in; the states are drawn in [`crate::agent`].

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use latchkey_wire::member::{Cidr, SignaturePolicy, key_of};

use crate::cache::Cached;
use crate::claim::{Known, Step, Wanted, decide};
use crate::error::{Error, Result};
use crate::key::PublicKey;
use crate::members::{MemberPeer, Members, Rules};
use crate::registry::{Entry, Event, Expected, RegistryError};
use crate::settings::AddressFrom;
use crate::view::{MemberView, Problem, RegistryState};

/// How long those who are not in a bucket that was made anew stay on the device: all of them have to write their records
/// again, and some of them look after it only now and then.
pub(super) const GRACE: Duration = Duration::from_secs(5 * 60);

/// By then the watch has shown what was written; if not, it is decided anew.
const SHOWN: Duration = Duration::from_secs(10);

/// Undisturbed for so long, a record is no longer fought over.
const CALM: Duration = Duration::from_secs(10 * 60);

/// From what to what the pauses grow.
const AFTER_LOSS: Pauses = Pauses { first: Duration::from_secs(2), last: Duration::from_secs(300) };
const AFTER_RACE: Pauses =
    Pauses { first: Duration::from_millis(500), last: Duration::from_secs(30) };
const AFTER_FAULT: Pauses = Pauses { first: Duration::from_secs(1), last: Duration::from_secs(30) };
const AFTER_REFUSAL: Pauses =
    Pauses { first: Duration::from_secs(60), last: Duration::from_secs(600) };

/// A whole fleet finds its bucket made anew at one moment, and writes at moments of its own.
const NEW_BUCKET: Duration = Duration::from_secs(3);

#[derive(Clone, Copy)]
struct Pauses {
    first: Duration,
    last: Duration,
}

impl Pauses {
    /// The `n`th pause, beginning with 0: somewhere in the upper half of what doubles each time.
    fn nth(self, n: u32, random: fn() -> f64) -> Duration {
        let whole = self.first.saturating_mul(1 << n.min(16)).min(self.last);
        whole.mul_f64(0.5 + random().clamp(0.0, 1.0) / 2.0)
    }
}

/// A number from 0 to 1.
pub(super) fn random() -> f64 {
    let mut bytes = [0; 4];
    // Without randomness all nodes wait equally long, which is no reason not to wait.
    getrandom::fill(&mut bytes)
        .map_or(0.5, |()| f64::from(u32::from_ne_bytes(bytes)) / f64::from(u32::MAX))
}

/// Where what is known of the members comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Nothing,
    Cache,
    Registry,
}

#[derive(Debug)]
pub(super) struct Joining {
    wanted: Wanted,
    members: Members,
    source: Source,
    incarnation: Option<String>,
    /// The members of the bucket before this one, until then.
    carried: Option<(Members, Instant)>,
    /// Why the registry is not there.
    away: Option<String>,
    /// What the device has, or had when this node ran last.
    held: Option<Cidr>,
    /// Whether `held` may be on the device: claimed, or taken from the cache because the registry is away.
    settled: bool,
    /// The revision of the own record, while it stands.
    revision: Option<u64>,
    /// That of an own record whose signature was found good.
    verified: Option<u64>,
    /// The record that stood last, and since when.
    stood: Option<(Cidr, Wanted, Instant)>,
    /// Why the own record does not stand, if it was tried.
    refused: Option<String>,
    /// What is being written.
    writing: Option<Step>,
    /// What was written, and until when the watch has time to show it.
    unseen: Option<(Step, u64, Instant)>,
    /// The step that waits, until when, and for what.
    due: Option<(Step, Instant, Waits)>,
    faults: u32,
    losses: u32,
    bucket_is_new: bool,
    undeletable: BTreeSet<String>,
    deleted: BTreeSet<String>,
    /// Whether the device may have to change.
    changed: bool,
    random: fn() -> f64,
}

/// Why a step is not made at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Waits {
    /// It failed: if there is news, the next step is another, and made at once.
    Failed,
    /// It is for a record that somebody has deleted or changed: whatever comes in between, there is a pause.
    Lost,
}

/// What to do, as far as the registry is concerned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Next {
    /// This, and tell what came of it ([`Joining::written`]).
    Write(Step),
    /// Nothing before then, or before the next event.
    Wait(Option<Instant>),
}

impl Joining {
    pub(super) fn new(wanted: Wanted, rules: Rules, cached: Option<Cached>) -> Self {
        let mut joining = Self {
            members: Members::new(rules),
            source: Source::Nothing,
            incarnation: None,
            carried: None,
            away: None,
            held: None,
            settled: false,
            revision: None,
            verified: None,
            stood: None,
            refused: None,
            writing: None,
            unseen: None,
            due: None,
            faults: 0,
            losses: 0,
            bucket_is_new: false,
            undeletable: BTreeSet::new(),
            deleted: BTreeSet::new(),
            changed: false,
            random,
            wanted,
        };
        if let Some(cached) = cached {
            joining.source = Source::Cache;
            joining.incarnation = Some(cached.incarnation);
            joining.held = cached.own.filter(|own| joining.may_hold(*own));
            joining.members.replace(cached.entries);
        }
        joining
    }

    fn may_hold(&self, own: Cidr) -> bool {
        match self.wanted.address {
            AddressFrom::Fixed(fixed) => own == fixed,
            AddressFrom::Key => self.wanted.mesh.contains(own.address()),
        }
    }

    /// The registry says something.
    pub(super) fn event(&mut self, event: Event, now: Instant) {
        match event {
            Event::Snapshot { incarnation, entries } => self.snapshot(incarnation, entries, now),
            Event::Put(entry) => {
                if let Some((carried, _)) = &mut self.carried {
                    self.changed |= carried.delete(&entry.key, u64::MAX);
                }
                self.changed |= self.members.put(entry);
            }
            Event::Deleted { key, revision } => {
                if let Some((carried, _)) = &mut self.carried {
                    self.changed |= carried.delete(&key, u64::MAX);
                }
                self.changed |= self.members.delete(&key, revision);
            }
            Event::Away { reason } => {
                self.away = Some(reason);
                self.unseen = None;
                self.due = None;
            }
        }
    }

    fn snapshot(&mut self, incarnation: String, entries: Vec<Entry>, now: Instant) {
        if self.incarnation.as_ref().is_some_and(|known| *known != incarnation) {
            self.carry(now);
        }
        if let Some((carried, _)) = &mut self.carried {
            for entry in &entries {
                carried.delete(&entry.key, u64::MAX);
            }
        }
        self.incarnation = Some(incarnation);
        self.source = Source::Registry;
        self.away = None;
        self.unseen = None;
        self.due = None;
        self.verified = None;
        self.members.replace(entries);
        self.changed = true;
    }

    /// What was known belongs to a bucket that is no more.
    fn carry(&mut self, now: Instant) {
        let mut entries: BTreeMap<String, Entry> = BTreeMap::new();
        let before = self.carried.take().map(|(carried, _)| carried.entries()).unwrap_or_default();
        for entry in before.into_iter().chain(self.members.entries()) {
            entries.insert(entry.key.clone(), entry);
        }
        let mut carried = Members::new(self.members.rules().clone());
        carried.replace(entries.into_values().collect());
        log::warn!(
            "registry: the bucket was made anew; the {} peers known from before stay for {} s, in which they have to write \
             their records again",
            carried.peers().len(),
            GRACE.as_secs()
        );
        self.bucket_is_new = true;
        self.carried = Some((carried, now + GRACE));
        // What was refused in the old bucket may be possible in this one.
        self.deleted.clear();
        self.undeletable.clear();
    }

    /// What is to be done now. Whether the device may have to change is told by [`Joining::address`] and [`Joining::peers`].
    ///
    /// # Errors
    /// [`Error::AddressTaken`] if the configured address is another node's and this node has none so far.
    pub(super) fn next(&mut self, now: Instant) -> Result<Next> {
        let grace = self.carried.as_ref().map(|(_, until)| *until);
        if grace.is_some_and(|until| until <= now) {
            self.carried = None;
            self.changed = true;
            return self.next(now);
        }
        if self.writing.is_some() || self.source != Source::Registry || self.away.is_some() {
            return Ok(Next::Wait(grace));
        }
        if let Some(until) = self.unseen_until(now) {
            return Ok(Next::Wait(earliest(grace, Some(until))));
        }
        let known = Known {
            members: &self.members,
            carried: self.carried.as_ref().map(|(carried, _)| carried),
            held: self.held,
            undeletable: &self.undeletable,
            verified: self.verified,
        };
        match decide(&self.wanted, &known)? {
            Step::Stands { own, revision } => {
                self.stands(own, revision, now);
                Ok(Next::Wait(grace))
            }
            Step::Taken { range, by } => {
                if let AddressFrom::Fixed(_) = self.wanted.address
                    && !self.settled
                {
                    let holder = by.to_string();
                    return Err(Error::AddressTaken { range, key: by.key, holder });
                }
                self.refuse(match self.wanted.address {
                    AddressFrom::Fixed(_) => format!("its address {range} is taken by {by}"),
                    AddressFrom::Key => format!(
                        "all addresses that its key may take are taken, {range} by {by}; is {} too small?",
                        self.wanted.mesh
                    ),
                });
                Ok(Next::Wait(grace))
            }
            Step::NotKnown { .. } => {
                self.refuse("it is not known yet where others are to reach this node".into());
                Ok(Next::Wait(grace))
            }
            Step::Delete { key, .. } if self.deleted.contains(&key) => {
                log::warn!(
                    "registry: {key} is there again, though this node has deleted it; does another node have the same key? It \
                     stays"
                );
                self.undeletable.insert(key);
                self.next(now)
            }
            step @ (Step::Write { .. } | Step::Delete { .. }) => {
                if let Step::Write { own, expected: Expected::Revision(_), .. } = &step {
                    // The range is this node's, whatever else the record says.
                    self.settle(*own);
                }
                Ok(self.when_due(step, now, grace))
            }
        }
    }

    fn unseen_until(&mut self, now: Instant) -> Option<Instant> {
        let (step, revision, until) = self.unseen.as_ref()?;
        let shown = match step {
            Step::Write { own, .. } => {
                self.members.get(&key_of(own)).is_some_and(|entry| entry.revision >= *revision)
            }
            Step::Delete { key, revision, .. } => {
                self.members.get(key).is_none_or(|entry| entry.revision != *revision)
            }
            Step::Stands { .. } | Step::Taken { .. } | Step::NotKnown { .. } => true,
        };
        if shown || *until <= now {
            self.unseen = None;
            return None;
        }
        Some(*until)
    }

    fn when_due(&mut self, step: Step, now: Instant, grace: Option<Instant>) -> Next {
        let (at, waits) = match &self.due {
            Some((waiting, at, Waits::Failed)) if *waiting == step => (*at, Waits::Failed),
            Some((waiting, at, Waits::Lost)) if waiting.range() == step.range() => {
                (*at, Waits::Lost)
            }
            _ => (now + self.pause_before(&step, now), Waits::Lost),
        };
        self.revision = None;
        if now < at {
            self.due = Some((step, at, waits));
            return Next::Wait(earliest(grace, Some(at)));
        }
        self.due = None;
        self.writing = Some(step.clone());
        Next::Write(step)
    }

    /// None before a first attempt and where this node itself wants something else than before.
    fn pause_before(&mut self, step: &Step, now: Instant) -> Duration {
        let stood_so = |(range, wanted, _): &&(Cidr, Wanted, Instant)| {
            Some(*range) == step.range() && *wanted == self.wanted
        };
        let Some((_, _, since)) = self.stood.as_ref().filter(stood_so) else {
            return Duration::ZERO;
        };
        if now.duration_since(*since) >= CALM {
            self.losses = 0;
        }
        if std::mem::take(&mut self.bucket_is_new) {
            self.refuse("the bucket was made anew; its record is about to be written again".into());
            return NEW_BUCKET.mul_f64((self.random)().clamp(0.0, 1.0));
        }
        let pause = AFTER_LOSS.nth(self.losses, self.random);
        self.losses = self.losses.saturating_add(1);
        self.refuse(format!(
            "its record was deleted or changed by somebody; it is written again in {} s",
            pause.as_secs_f32().round()
        ));
        pause
    }

    fn stands(&mut self, own: Cidr, revision: u64, now: Instant) {
        if self.revision.is_none() {
            log::info!("registry: this node is {own}, revision {revision}");
        }
        let stood_so = |(range, wanted, _): &(Cidr, Wanted, Instant)| {
            *range == own && *wanted == self.wanted && self.revision.is_some()
        };
        if !self.stood.as_ref().is_some_and(stood_so) {
            self.stood = Some((own, self.wanted.clone(), now));
        }
        self.due = None;
        self.settle(own);
        self.revision = Some(revision);
        self.verified = Some(revision);
        self.refused = None;
        self.bucket_is_new = false;
        self.faults = 0;
    }

    fn settle(&mut self, own: Cidr) {
        self.changed |= self.held != Some(own) || !self.settled;
        self.held = Some(own);
        self.settled = true;
    }

    fn refuse(&mut self, reason: String) {
        self.revision = None;
        if self.refused.as_ref() != Some(&reason) {
            log::warn!("registry: this node has no record: {reason}");
            self.refused = Some(reason);
        }
    }

    /// What came of the write that [`Joining::next`] asked for.
    pub(super) fn written(&mut self, result: Result<u64, RegistryError>, now: Instant) {
        let Some(step) = self.writing.take() else { return };
        if self.away.is_some() {
            return; // everything will be read anew
        }
        let pauses = match result {
            Ok(revision) => {
                if let Step::Delete { key, why, .. } = &step {
                    log::info!("registry: {key} is deleted: {why}");
                    self.deleted.insert(key.clone());
                }
                self.unseen = Some((step, revision, now + SHOWN));
                return;
            }
            Err(error) => self.failed(&step, &error),
        };
        if let Some(pauses) = pauses {
            let pause = pauses.nth(self.faults, self.random);
            self.faults = self.faults.saturating_add(1);
            self.due = Some((step, now + pause, Waits::Failed));
        }
    }

    /// None: the step will not be asked for again.
    fn failed(&mut self, step: &Step, error: &RegistryError) -> Option<Pauses> {
        match (step, error) {
            (Step::Delete { key, .. }, RegistryError::NotPermitted { .. }) => {
                log::warn!(
                    "registry: {key} stays, though it is this node's and of no use: {error}"
                );
                self.undeletable.insert(key.clone());
                None
            }
            (_, RegistryError::LostRace { .. }) => {
                log::info!("registry: {error}");
                Some(AFTER_RACE)
            }
            (_, RegistryError::NotPermitted { .. }) => {
                self.refuse(error.to_string());
                Some(AFTER_REFUSAL)
            }
            (_, RegistryError::NoBucket { .. } | RegistryError::Away { .. }) => {
                self.refuse(error.to_string());
                Some(AFTER_FAULT)
            }
        }
    }

    /// The registry does not answer: go on with what was known last. Whether there is anything.
    pub(super) fn settle_for_cache(&mut self) -> bool {
        if self.source != Source::Cache || self.held.is_none() {
            return false;
        }
        self.settled = true;
        self.changed = true;
        true
    }

    /// Whether the device may have to change since this was asked last.
    pub(super) fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    /// What the device should have; None as long as nothing is claimed, nor known from the cache.
    pub(super) fn address(&self) -> Option<Cidr> {
        self.held.filter(|_| self.settled)
    }

    pub(super) fn is_joined(&self) -> bool {
        self.revision.is_some()
    }

    /// Those that should be on the device: the members, and those of the bucket before, as long as nobody has taken their place.
    pub(super) fn peers(&self) -> impl Iterator<Item = (&PublicKey, &MemberPeer)> {
        let carried = self.carried.iter().flat_map(|(carried, _)| carried.peers());
        let own = self.held;
        self.members.peers().iter().chain(carried.filter(move |(public_key, peer)| {
            !self.members.peers().contains_key(public_key)
                && peer.allowed_ips.iter().all(|range| {
                    self.members.taken(range).is_none()
                        && own.is_none_or(|own| !own.overlaps(range))
                })
        }))
    }

    pub(super) fn member(&self, public_key: &PublicKey) -> Option<&MemberPeer> {
        let carried =
            || self.carried.as_ref().and_then(|(carried, _)| carried.peers().get(public_key));
        self.members.peers().get(public_key).or_else(carried)
    }

    pub(super) fn problems(&self) -> Vec<Problem> {
        self.members.problems()
    }

    pub(super) fn views(&self) -> Vec<MemberView> {
        self.members.views()
    }

    pub(super) fn revision(&self) -> Option<u64> {
        self.revision
    }

    pub(super) fn is_from_cache(&self) -> bool {
        self.source == Source::Cache
    }

    /// Whether everything was read, and nothing has been missed since.
    pub(super) fn is_current(&self) -> bool {
        self.source == Source::Registry && self.away.is_none()
    }

    pub(super) fn state(&self) -> (RegistryState, Option<String>) {
        if let Some(reason) = &self.away {
            return (RegistryState::Away, Some(reason.clone()));
        }
        match (self.source, self.revision, &self.refused) {
            (Source::Registry, Some(_), _) => (RegistryState::Joined, None),
            (Source::Registry, None, Some(reason)) => {
                (RegistryState::Refused, Some(reason.clone()))
            }
            (Source::Registry, None, None) => {
                (RegistryState::Refused, Some("its record is being written".into()))
            }
            (Source::Nothing | Source::Cache, ..) => {
                (RegistryState::Away, Some("not reached so far".into()))
            }
        }
    }

    /// What a later start should know. In the grace after a new bucket it is still the old one that counts, so that
    /// a restart in that time forgets nobody.
    pub(super) fn to_cache(&self) -> Option<Cached> {
        let incarnation = self.incarnation.clone()?;
        let entries = match &self.carried {
            None => self.members.entries(),
            Some((carried, _)) => {
                let both = carried.entries().into_iter().chain(self.members.entries());
                both.map(|entry| (entry.key.clone(), entry))
                    .collect::<BTreeMap<_, _>>()
                    .into_values()
                    .collect()
            }
        };
        let incarnation =
            if self.carried.is_some() { format!("before {incarnation}") } else { incarnation };
        Some(Cached { incarnation, own: self.held, entries })
    }

    /// This node wants its record to say something else.
    pub(super) fn want(&mut self, wanted: Wanted) {
        if self.wanted != wanted {
            self.wanted = wanted;
            self.due = None;
        }
    }

    pub(super) fn wanted(&self) -> &Wanted {
        &self.wanted
    }

    /// Records are judged by other rules from now on.
    pub(super) fn judge_by(&mut self, signatures: SignaturePolicy, strict: bool) {
        let rules = Rules { signatures, strict, ..self.members.rules().clone() };
        let rebuilt = |members: &Members| {
            let mut new = Members::new(rules.clone());
            new.replace(members.entries());
            new
        };
        self.members = rebuilt(&self.members);
        if let Some((carried, until)) = self.carried.take() {
            self.carried = Some((rebuilt(&carried), until));
        }
        self.changed = true;
    }

    /// Another registry, or another login to it: what was known stays until the new one is read.
    pub(super) fn registry_changed(&mut self, bucket: &str) {
        self.away = Some("the registry's settings have changed".into());
        self.writing = None;
        self.unseen = None;
        self.due = None;
        self.faults = 0;
        self.undeletable.clear();
        self.deleted.clear();
        if self.wanted.bucket != bucket {
            self.wanted.bucket = bucket.into();
            self.stood = None;
        }
    }
}

fn earliest(one: Option<Instant>, other: Option<Instant>) -> Option<Instant> {
    one.into_iter().chain(other).min()
}

#[cfg(test)]
mod tests;
