//! What has to change on a device's peers (wg(8), "cryptokey routing"): per peer the least that
//! makes it right, and never a peer that is removed and made again, which would cost its session.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fmt;
use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use latchkey_wire::member::Cidr;

use super::{Change, Desired};
use crate::key::PublicKey;

/// A session older than this is dead: WireGuard rejects its packets (`REJECT_AFTER_TIME`), and has
/// tried to make a new one since `REKEY_AFTER_TIME`, 120 s, if there was anything to send.
pub const HANDSHAKE_EXPIRES: Duration = Duration::from_secs(180);

/// A peer as it should be.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DesiredPeer {
    /// Where it says that it is. None: only it can begin.
    pub endpoint: Option<SocketAddr>,
    /// What two peers want gets the one with the lower key.
    pub allowed_ips: BTreeSet<Cidr>,
    /// Seconds; 0 is off.
    pub keepalive: u16,
}

/// A peer as it is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Peer {
    pub endpoint: Option<SocketAddr>,
    pub allowed_ips: BTreeSet<Cidr>,
    pub last_handshake: Option<SystemTime>,
    pub received_bytes: u64,
    pub sent_bytes: u64,
    /// Seconds; 0 is off.
    pub persistent_keepalive: u16,
}

/// What is to be said of one peer. The device keeps what is not mentioned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerChange {
    pub public_key: PublicKey,
    /// The device does not have it so far.
    pub new: bool,
    pub endpoint: Option<SocketAddr>,
    pub keepalive: Option<u16>,
    /// Beside those it has, or in their place. Whoever has one of them loses it by that.
    pub allowed_ips: BTreeSet<Cidr>,
    pub replace_allowed_ips: bool,
}

/// The endpoints that were last set, or found and left as they were. A peer may have roamed since:
/// then the device knows better than its record.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Memory(BTreeMap<PublicKey, SocketAddr>);

impl Memory {
    /// Takes note of a round that went well for all peers but the `refused` ones.
    pub fn note(&mut self, desired: &Desired, refused: impl Fn(&PublicKey) -> bool) {
        self.0.retain(|key, _| desired.peers.contains_key(key));
        for (key, peer) in &desired.peers {
            if let Some(endpoint) = peer.endpoint
                && !refused(key)
            {
                self.0.insert(*key, canonical(endpoint));
            }
        }
    }
}

/// Adds to `changes` what is to be done: first who is to have what, then who is to go.
pub(super) fn plan(
    changes: &mut Vec<Change>,
    desired: &Desired,
    actual: &BTreeMap<PublicKey, Peer>,
    memory: &Memory,
    now: SystemTime,
) {
    let different = different(desired, actual);
    let owners = owners(desired, &different);
    for Different { key, wanted, actual } in different {
        let change = match actual {
            None => Some(added(key, wanted, &owners)),
            Some(peer) => {
                let endpoint = endpoint(wanted, peer, memory.0.get(&key).copied(), now);
                changed(key, wanted, peer, endpoint, &owners)
            }
        };
        changes.extend(change.map(Change::SetPeer));
    }
    let foreign =
        actual.keys().filter(|key| !desired.peers.contains_key(key) || **key == desired.public_key);
    changes.extend(foreign.copied().map(Change::RemovePeer));
}

/// What the peers have once all `changes`, the whole plan, were applied.
pub(super) fn settle(peers: &mut BTreeMap<PublicKey, Peer>, desired: &Desired, changes: &[Change]) {
    // Who is to have other allowed IPs, or to lose some to another.
    let different = different(desired, peers);
    let owners = owners(desired, &different);
    let allowed_ips: Vec<_> = different
        .iter()
        .map(|Different { key, wanted, .. }| (*key, owned(*key, wanted, &owners).collect()))
        .collect();
    for (key, allowed_ips) in allowed_ips {
        peers.entry(key).or_default().allowed_ips = allowed_ips;
    }
    for change in changes {
        match change {
            Change::SetPeer(change) => {
                let peer = peers.entry(change.public_key).or_default();
                peer.endpoint = change.endpoint.or(peer.endpoint);
                peer.persistent_keepalive = change.keepalive.unwrap_or(peer.persistent_keepalive);
            }
            Change::RemovePeer(key) => drop(peers.remove(key)),
            _ => {}
        }
    }
}

/// A peer that is missing, or not as its record says. Nothing need be wrong with it: it may have
/// roamed.
struct Different<'a> {
    key: PublicKey,
    wanted: &'a DesiredPeer,
    actual: Option<&'a Peer>,
}

fn different<'a>(
    desired: &'a Desired,
    actual: &'a BTreeMap<PublicKey, Peer>,
) -> Vec<Different<'a>> {
    let is_as_wanted = |wanted: &DesiredPeer, peer: &Peer| {
        wanted.allowed_ips == peer.allowed_ips
            && wanted.keepalive == peer.persistent_keepalive
            && (wanted.endpoint.is_none() || wanted.endpoint == peer.endpoint)
    };
    wanted_peers(desired)
        .map(|(key, wanted)| Different { key: *key, wanted, actual: actual.get(key) })
        .filter(|peer| !peer.actual.is_some_and(|actual| is_as_wanted(peer.wanted, actual)))
        .collect()
}

/// Without ourselves: the kernel passes over a peer with the device's own key.
fn wanted_peers(desired: &Desired) -> impl Iterator<Item = (&PublicKey, &DesiredPeer)> {
    desired.peers.iter().filter(|(key, _)| **key != desired.public_key)
}

/// To whom the allowed IPs belong that `different` peers have or want. Each belongs to one peer,
/// and the device gives it to whom it was assigned last. So that one plan has one outcome, only one
/// peer is assigned it.
fn owners(desired: &Desired, different: &[Different<'_>]) -> HashMap<Cidr, PublicKey> {
    let in_question: HashSet<Cidr> = different
        .iter()
        .flat_map(|peer| {
            let wanted = peer.wanted.allowed_ips.iter().map(Cidr::masked);
            wanted.chain(peer.actual.iter().flat_map(|peer| &peer.allowed_ips).copied())
        })
        .collect();
    let mut owners = HashMap::new();
    if in_question.is_empty() {
        return owners;
    }
    for (key, peer) in wanted_peers(desired) {
        for ip in peer.allowed_ips.iter().map(Cidr::masked) {
            if in_question.contains(&ip) {
                owners.entry(ip).or_insert(*key);
            }
        }
    }
    owners
}

/// Those of the allowed IPs that are the peer's, masked.
fn owned(
    key: PublicKey,
    wanted: &DesiredPeer,
    owners: &HashMap<Cidr, PublicKey>,
) -> impl Iterator<Item = Cidr> {
    wanted.allowed_ips.iter().map(Cidr::masked).filter(move |ip| owners.get(ip) == Some(&key))
}

fn added(key: PublicKey, wanted: &DesiredPeer, owners: &HashMap<Cidr, PublicKey>) -> PeerChange {
    PeerChange {
        public_key: key,
        new: true,
        endpoint: wanted.endpoint.map(canonical),
        keepalive: (wanted.keepalive > 0).then_some(wanted.keepalive),
        allowed_ips: owned(key, wanted, owners).collect(),
        replace_allowed_ips: false,
    }
}

fn changed(
    key: PublicKey,
    wanted: &DesiredPeer,
    peer: &Peer,
    endpoint: Option<SocketAddr>,
    owners: &HashMap<Cidr, PublicKey>,
) -> Option<PeerChange> {
    let mut allowed_ips: BTreeSet<Cidr> = owned(key, wanted, owners).collect();
    // What another peer is assigned in this round goes by itself. Only the rest has to be swept
    // away, and that means to name all that stays.
    let replace_allowed_ips = peer.allowed_ips.iter().any(|ip| !owners.contains_key(ip));
    if !replace_allowed_ips {
        allowed_ips.retain(|ip| !peer.allowed_ips.contains(ip));
    }
    let keepalive = (peer.persistent_keepalive != wanted.keepalive).then_some(wanted.keepalive);
    let differs =
        endpoint.is_some() || keepalive.is_some() || replace_allowed_ips || !allowed_ips.is_empty();
    differs.then_some(PeerChange {
        public_key: key,
        new: false,
        endpoint,
        keepalive,
        allowed_ips,
        replace_allowed_ips,
    })
}

/// The endpoint to set, if any. Where the device has another one, that is either what the peer was
/// told to have before, or where it has roamed to: then its packets were authentic, and the device
/// is right as long as they keep coming.
fn endpoint(
    wanted: &DesiredPeer,
    peer: &Peer,
    last_set: Option<SocketAddr>,
    now: SystemTime,
) -> Option<SocketAddr> {
    let wanted = canonical(wanted.endpoint?);
    let set = match peer.endpoint.map(canonical) {
        None => true,
        Some(present) if present == wanted => false,
        Some(_) => last_set.is_some_and(|last| last != wanted) || !peer.is_alive(now),
    };
    set.then_some(wanted)
}

impl Peer {
    /// Whether it was heard of lately. A handshake of the future is one from before the clock was
    /// set back: nothing speaks against the peer then.
    pub fn is_alive(&self, now: SystemTime) -> bool {
        self.last_handshake.is_some_and(|last| {
            now.duration_since(last).is_ok_and(|age| age < HANDSHAKE_EXPIRES) || last > now
        })
    }
}

/// As every device reads it back: one that is IPv4 in IPv6 is IPv4.
fn canonical(endpoint: SocketAddr) -> SocketAddr {
    SocketAddr::new(endpoint.ip().to_canonical(), endpoint.port())
}

impl fmt::Display for PeerChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verb = if self.new { "add" } else { "change" };
        write!(f, "{verb} the peer {}", self.public_key)?;
        if let Some(endpoint) = self.endpoint {
            write!(f, ", endpoint {endpoint}")?;
        }
        if let Some(seconds) = self.keepalive {
            write!(f, ", keepalive {seconds} s")?;
        }
        let mut ips = self.allowed_ips.iter();
        if let Some(first) = ips.next() {
            let how = if self.replace_allowed_ips { "only " } else { "" };
            write!(f, ", allowed {how}{first}")?;
        } else if self.replace_allowed_ips {
            f.write_str(", nothing allowed")?;
        }
        match ips.len() {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

#[cfg(test)]
mod tests;
