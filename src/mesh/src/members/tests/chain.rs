//! From records to a device, all of it but the device: what happened before does not show in the end, and nobody is removed
//! who is a member.

use std::time::SystemTime;

use proptest::prelude::*;

use super::order::{Event, any_event, any_rules, remaining};
use super::*;
use crate::address::DeviceAddress;
use crate::plan::{Actual, Change, Desired, DesiredPeer, Memory, Peer, plan};

/// A WireGuard device: an allowed IP is of one peer, the one that it was given last.
#[derive(Debug, Clone, Default)]
struct Model {
    actual: Option<Actual>,
    peers: BTreeMap<PublicKey, Session>,
    /// Sessions begun so far.
    sessions: u64,
}

/// A peer, as long as it is not removed.
#[derive(Debug, Clone, PartialEq)]
struct Session {
    number: u64,
    peer: Peer,
}

impl Model {
    fn apply(&mut self, change: &Change) {
        let actual = self.actual.get_or_insert_with(|| Actual::created(0));
        match change {
            Change::Create { mtu } => actual.mtu = *mtu,
            Change::SetKey { public_key } => actual.public_key = Some(*public_key),
            Change::SetPort(port) => actual.port = *port,
            Change::SetMtu(mtu) => actual.mtu = *mtu,
            Change::AddAddress(address) => actual.addresses.push(*address),
            Change::RemoveAddress(address) => actual.addresses.retain(|other| other != address),
            Change::SetUp => actual.up = true,
            Change::RemovePeer(key) => drop(self.peers.remove(key)),
            Change::SetPeer(change) => {
                for (other, session) in &mut self.peers {
                    if *other != change.public_key {
                        session.peer.allowed_ips.retain(|ip| !change.allowed_ips.contains(ip));
                    }
                }
                self.sessions += 1;
                let number = self.sessions;
                let session = self
                    .peers
                    .entry(change.public_key)
                    .or_insert_with(|| Session { number, peer: Peer::default() });
                assert_eq!(session.number == number, change.new, "{change}");
                let peer = &mut session.peer;
                if change.replace_allowed_ips {
                    peer.allowed_ips.clear();
                }
                peer.allowed_ips.extend(&change.allowed_ips);
                peer.endpoint = change.endpoint.or(peer.endpoint);
                peer.persistent_keepalive = change.keepalive.unwrap_or(peer.persistent_keepalive);
            }
        }
    }

    fn peers(&self) -> BTreeMap<PublicKey, Peer> {
        self.peers.iter().map(|(key, session)| (*key, session.peer.clone())).collect()
    }
}

/// What an agent does of it all, without anything to wait for.
struct Chain {
    members: Members,
    memory: Memory,
    model: Model,
}

impl Chain {
    fn new(rules: &Rules) -> Self {
        let members = Members::new(rules.clone());
        Self { members, memory: Memory::default(), model: Model::default() }
    }

    fn desired(&self) -> Desired {
        let peer = |peer: &MemberPeer| DesiredPeer {
            endpoint: match peer.endpoint {
                Some(Endpoint::Address(address)) => Some(address),
                _ => None,
            },
            allowed_ips: peer.allowed_ips.clone(),
            keepalive: 25,
        };
        Desired {
            public_key: self.members.rules().own,
            port: 51820,
            mtu: 1420,
            address: Some(DeviceAddress {
                address: "fd10:d::1".parse().unwrap(),
                prefix_length: 16,
            }),
            peers: self.members.peers().iter().map(|(key, member)| (*key, peer(member))).collect(),
        }
    }

    /// One round. Every session goes on whose peer was and is a member.
    fn reconcile(&mut self) {
        let before = self.model.clone();
        let desired = self.desired();
        let peers = self.model.peers();
        let now = SystemTime::UNIX_EPOCH;
        let changes = plan(&desired, self.model.actual.as_ref(), &peers, &self.memory, now);
        // Sent one after the other: no step in between may cost a member its session either.
        for change in &changes {
            self.model.apply(change);
            for (key, session) in &before.peers {
                if desired.peers.contains_key(key) {
                    assert_eq!(
                        self.model.peers.get(key).map(|now| now.number),
                        Some(session.number)
                    );
                }
            }
        }
        self.memory.note(&desired, |_| false);
        let again =
            plan(&desired, self.model.actual.as_ref(), &self.model.peers(), &self.memory, now);
        assert_eq!(again, [], "an equal device is not touched");
    }

    /// Without what only who was there can know: endpoints of peers that have none of their own any more are kept.
    fn device(&self) -> (Option<Actual>, BTreeMap<PublicKey, Peer>) {
        let dialled = |key: &PublicKey| self.members.peers()[key].endpoint.is_some();
        let mut peers = self.model.peers();
        peers
            .iter_mut()
            .filter(|(key, _)| !dialled(key))
            .for_each(|(_, peer)| peer.endpoint = None);
        (self.model.actual.clone(), peers)
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(128) })]

    #[test]
    fn any_history_ends_in_the_device_of_a_fresh_start(
        rules in any_rules(),
        history in prop::collection::vec((any_event(), 0..10u8), 0..40),
    ) {
        let events: Vec<Event> = history.iter().map(|(event, _)| event.clone()).collect();
        let mut lived = Chain::new(&rules);
        // A snapshot says nothing of what is deleted, and nothing older comes after it: a watch keeps its order.
        let mut snapshot = 0;
        for (at, (event, then)) in history.iter().enumerate() {
            event.happen(at as u64 + 1, &mut lived.members);
            match then {
                // Several records in one round.
                0..3 => {}
                // The registry was away and is back.
                3 => {
                    lived.members.replace(remaining(&events[..=at]));
                    snapshot = at + 1;
                    lived.reconcile();
                }
                // The agent was killed: it knows nothing, the device is as it was.
                4 => {
                    lived.memory = Memory::default();
                    lived.members = Members::new(rules.clone());
                    lived.members.replace(remaining(&events[..=at]));
                    snapshot = at + 1;
                    lived.reconcile();
                }
                // Old news.
                5 => {
                    let old = (at / 2).max(snapshot);
                    history[old].0.happen(old as u64 + 1, &mut lived.members);
                    lived.reconcile();
                }
                _ => lived.reconcile(),
            }
        }
        lived.reconcile();
        let mut fresh = Chain::new(&rules);
        fresh.members.replace(remaining(&events));
        fresh.reconcile();
        prop_assert_eq!(lived.device(), fresh.device());
        let wanted: BTreeMap<_, _> =
            fresh.members.peers().iter().map(|(key, peer)| (*key, peer.allowed_ips.clone())).collect();
        let had: BTreeMap<_, _> =
            lived.model.peers().into_iter().map(|(key, peer)| (key, peer.allowed_ips)).collect();
        prop_assert_eq!(had, wanted);
    }
}
