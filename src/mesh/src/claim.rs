//! The claim: which record this node should have in the registry, and the one write that brings it nearer to that. Pure, but
//! for [`perform`].
//!
//! What is there is what the registry's watch says and nothing else. A write is made on the condition that nothing has changed
//! since (optimistic locking), and counts only once the watch has shown it: by then every earlier record has been
//! seen, one with another key in an overlapping range among them, which no lock on a key can keep away.
//!
//! Nobody else's record is ever written or deleted, readable or not.

use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use latchkey_wire::member::{self, Cidr, Extension, Member, Signature, cidr_of, key_of};
use tokio::time::timeout;

use crate::address::candidates;
use crate::advertise::Advertised;
use crate::error::{Error, Result};
use crate::key::{PrivateKey, PublicKey};
use crate::members::Members;
use crate::registry::{Entry, Expected, Registry, RegistryError};
use crate::settings::AddressFrom;

/// For one write and its answer.
const DEADLINE: Duration = Duration::from_secs(15);

/// What this node can do beyond an Ikto agent.
pub const CAPABILITIES: &[&str] = &[];

/// The record this node should have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    pub bucket: String,
    pub mesh: Cidr,
    pub address: AddressFrom,
    pub public_key: PublicKey,
    pub name: String,
    /// None: not known so far. A record that is there stays as it is then, and none is written.
    pub advertised: Option<Advertised>,
    pub wg_port: u16,
}

/// What has to be done next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Nothing: the record is there, under `own`'s key, and says what it should.
    Stands { own: Cidr, revision: u64 },
    /// Write this record for `own`.
    Write { own: Cidr, expected: Expected, member: Box<Member> },
    /// The same, but it is not known yet where others are to reach this node.
    NotKnown { own: Cidr },
    /// Delete this record, which is this node's too.
    Delete { key: String, revision: u64, why: Why },
    /// Nothing can be done: another node has `range`, or all that this node could take.
    Taken { range: Cidr, by: Taker },
}

impl Step {
    /// The range that a record is to be written for.
    pub fn range(&self) -> Option<Cidr> {
        match self {
            Self::Write { own, .. } => Some(*own),
            _ => None,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// Another node's earlier record has the range, or a part of it.
    Lost,
    /// This node has its record under another key.
    Stale,
}

/// Whose record is in the way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Taker {
    pub key: String,
    /// None: it cannot be read.
    pub public_key: Option<PublicKey>,
}

impl Wanted {
    /// What the record should say, as far as it is known; for the rest, what `there` says.
    fn member(&self, own: Cidr, there: Option<&Member>) -> Option<Member> {
        let (address, name) = match &self.advertised {
            Some(Advertised { address, name }) => (address.to_string(), name.clone()),
            None => {
                let extension = there?.extension.as_ref();
                let name = extension.and_then(|extension| extension.advertise_name.clone());
                (there?.advertise_address.clone(), name)
            }
        };
        Some(Member {
            name: self.name.clone(),
            public_key: *self.public_key.as_bytes(),
            advertise_address: address,
            allowed_ip: own,
            wg_port: self.wg_port,
            extension: Some(Extension {
                advertise_name: name,
                capabilities: CAPABILITIES.iter().map(ToString::to_string).collect(),
            }),
        })
    }

    /// None if `entry` says what it should, else what it should say. The signature need not be the same bytes each time.
    fn differs_from(&self, entry: &Entry, own: Cidr, verified: bool) -> Option<Member> {
        let there = member::read_unchecked(&entry.value).ok();
        let wanted = self.member(own, there.as_ref().map(|(member, _)| member))?;
        let (there, claim) = there?;
        let is_signed = || {
            let by = self.public_key.as_bytes();
            claim.check(&self.bucket, &entry.key, &entry.value, by) == Signature::Valid
        };
        (there != wanted || !(verified || is_signed())).then_some(wanted)
    }
}

/// What is known when a step is decided.
#[derive(Debug, Clone, Copy)]
pub struct Known<'a> {
    pub members: &'a Members,
    /// Those of whom the registry knows nothing any more, but who may come back: their addresses are not taken from them.
    pub carried: Option<&'a Members>,
    /// The range that this node has, or had when it ran last: kept, even if a better candidate has become free.
    pub held: Option<Cidr>,
    /// Keys of own records that cannot be deleted.
    pub undeletable: &'a BTreeSet<String>,
    /// The revision of an own record whose signature was found good before.
    pub verified: Option<u64>,
}

/// The next step.
///
/// # Errors
/// [`crate::error::Error::MeshPrefix`].
pub fn decide(wanted: &Wanted, known: &Known<'_>) -> Result<Step> {
    let own_records = known.members.own();
    let deletable = |entry: &&Entry| !known.undeletable.contains(&entry.key);
    let delete =
        |entry: &Entry, why| Step::Delete { key: entry.key.clone(), revision: entry.revision, why };
    let lost = |entry: &&Entry| cidr_of(&entry.key).is_some_and(|own| is_taken(known.members, own));
    if let Some(lost) = own_records.iter().copied().filter(deletable).find(lost) {
        return Ok(delete(lost, Why::Lost));
    }
    let own = match target(wanted, known)? {
        Ok(own) => own,
        Err((range, by)) => return Ok(Step::Taken { range, by }),
    };
    let key = key_of(&own);
    let Some(entry) = known.members.get(&key) else {
        return Ok(match wanted.member(own, None) {
            Some(member) => {
                Step::Write { own, expected: Expected::Absent, member: Box::new(member) }
            }
            None => Step::NotKnown { own },
        });
    };
    let revision = entry.revision;
    if let Some(member) = wanted.differs_from(entry, own, known.verified == Some(revision)) {
        let expected = Expected::Revision(revision);
        return Ok(Step::Write { own, expected, member: Box::new(member) });
    }
    let stale = own_records.iter().copied().filter(deletable).find(|entry| entry.key != key);
    Ok(stale.map_or(Step::Stands { own, revision }, |stale| delete(stale, Why::Stale)))
}

/// The range to have a record for, or who is in the way.
fn target(wanted: &Wanted, known: &Known<'_>) -> Result<Result<Cidr, (Cidr, Taker)>> {
    let free = |own: Cidr| match taker(wanted, known.members, own) {
        None => Ok(own),
        Some(by) => Err((own, by)),
    };
    match wanted.address {
        AddressFrom::Fixed(own) => Ok(free(own)),
        AddressFrom::Key => {
            let all = || -> Result<_> {
                let all = candidates(&wanted.mesh, wanted.public_key)?;
                Ok(all.map(|(_, address)| Cidr::host(address)))
            };
            // In this order, and each only if the one before is not free: every candidate has its price.
            let held =
                known.held.filter(|held| all().is_ok_and(|mut all| all.any(|own| own == *held)));
            let recorded = || {
                let own: BTreeSet<&str> =
                    known.members.own().iter().map(|entry| &*entry.key).collect();
                let has_record = |candidate: &Cidr| own.contains(&*key_of(candidate));
                if own.is_empty() { None } else { all().ok()?.find(has_record) }
            };
            let is_left_alone = |own: &Cidr| {
                Some(*own) == held || !known.carried.is_some_and(|carried| is_taken(carried, *own))
            };
            let mut in_the_way = None;
            let recorded = std::iter::once_with(recorded).flatten();
            for own in held.into_iter().chain(recorded).chain(all()?) {
                match free(own) {
                    Ok(own) if is_left_alone(&own) => return Ok(Ok(own)),
                    Ok(_) => {}
                    Err(taken) => {
                        in_the_way.get_or_insert(taken);
                    }
                }
            }
            // All are taken; or some only by those who may come back, and they have to yield.
            match (all()?.find(|own| free(*own).is_ok()), in_the_way) {
                (Some(own), _) => Ok(Ok(own)),
                (None, Some(taken)) => Ok(Err(taken)),
                (None, None) => Err(Error::MeshPrefix { mesh: wanted.mesh }),
            }
        }
    }
}

fn is_taken(members: &Members, own: Cidr) -> bool {
    members.taken(&own.masked()).is_some()
}

/// Whoever has `own`, or a part of it: a record under its key that is not this node's, whether it counts or not, or one that
/// counts and overlaps.
fn taker(wanted: &Wanted, members: &Members, own: Cidr) -> Option<Taker> {
    let key = key_of(&own);
    if let Some(entry) = members.get(&key) {
        let public_key = member::read_unchecked(&entry.value)
            .ok()
            .map(|(member, _)| PublicKey::new(member.public_key));
        if public_key != Some(wanted.public_key) {
            return Some(Taker { key, public_key });
        }
    }
    let holder = members.taken(&own.masked())?;
    Some(Taker { key: holder.key, public_key: Some(holder.public_key) })
}

/// A write, ready to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Write {
    Put { key: String, value: Bytes, expected: Expected },
    Delete { key: String, revision: u64 },
}

impl Write {
    /// What makes `step` so; `None` if there is nothing to write.
    pub fn of(step: &Step, bucket: &str, key: &PrivateKey) -> Option<Self> {
        match step {
            Step::Stands { .. } | Step::Taken { .. } | Step::NotKnown { .. } => None,
            Step::Write { own, expected, member } => {
                let value = member.to_signed_json(bucket, key.as_bytes());
                Some(Self::Put { key: key_of(own), value: value.into(), expected: *expected })
            }
            Step::Delete { key, revision, .. } => {
                Some(Self::Delete { key: key.clone(), revision: *revision })
            }
        }
    }
}

/// Makes the write. The revision is that of the record, or 0 where it was deleted.
pub async fn perform<R: Registry>(registry: R, write: Write) -> Result<u64, RegistryError> {
    let (action, written) = match write {
        Write::Put { key, value, expected } => {
            let action = format!("write {key}");
            (action, timeout(DEADLINE, registry.put(&key, value, expected)).await)
        }
        Write::Delete { key, revision } => {
            let action = format!("delete {key}");
            (
                action,
                timeout(DEADLINE, async { registry.delete(&key, revision).await.map(|()| 0) })
                    .await,
            )
        }
    };
    written.unwrap_or_else(|_| {
        let reason = format!("no answer within {} s", DEADLINE.as_secs());
        Err(RegistryError::Away { action, reason })
    })
}

impl fmt::Display for Taker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.public_key {
            Some(public_key) => write!(f, "{public_key}"),
            None => f.write_str("a node whose record cannot be read"),
        }
    }
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Lost => "another node's record was there first",
            Self::Stale => "this node has another address now",
        })
    }
}

#[cfg(test)]
pub(crate) mod memory;

#[cfg(test)]
mod tests;
