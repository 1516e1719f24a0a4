use proptest::collection::{btree_map, btree_set, vec};
use proptest::prelude::*;

use super::super::{Actual, plan as whole_plan, settle as whole_settle};
use super::*;
use crate::address::DeviceAddress;

fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)
}

fn key(n: u8) -> PublicKey {
    PublicKey::new([n; 32])
}

fn ips(texts: &[&str]) -> BTreeSet<Cidr> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

fn at(n: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, n], 51820))
}

/// Should be at `endpoint`; 0 is nowhere.
fn wanted(endpoint: u8, allowed_ips: &[&str]) -> DesiredPeer {
    DesiredPeer {
        endpoint: (endpoint > 0).then(|| at(endpoint)),
        allowed_ips: ips(allowed_ips),
        keepalive: 0,
    }
}

/// Is there, and was heard of `age` seconds ago.
fn present(endpoint: u8, allowed_ips: &[&str], age: Option<u64>) -> Peer {
    Peer {
        endpoint: (endpoint > 0).then(|| at(endpoint)),
        allowed_ips: ips(allowed_ips),
        last_handshake: age.map(|age| now() - Duration::from_secs(age)),
        ..Peer::default()
    }
}

fn desired(peers: &[(u8, DesiredPeer)]) -> Desired {
    Desired {
        public_key: key(200),
        port: 1,
        mtu: 1420,
        address: Some(DeviceAddress { address: "fd10::1".parse().unwrap(), prefix_length: 16 }),
        peers: peers.iter().map(|(n, peer)| (key(*n), peer.clone())).collect(),
    }
}

fn planned(desired: &Desired, actual: &[(u8, Peer)], memory: &Memory) -> Vec<String> {
    let actual = actual.iter().map(|(n, peer)| (key(*n), peer.clone())).collect();
    let mut changes = Vec::new();
    plan(&mut changes, desired, &actual, memory, now());
    let text = changes.iter().map(|change| match change {
        Change::SetPeer(change) => {
            let n = change.public_key.as_bytes()[0].to_string();
            change.to_string().replace(&change.public_key.to_string(), &n)
        }
        Change::RemovePeer(key) => format!("remove {}", key.as_bytes()[0]),
        other => panic!("{other}"),
    });
    text.collect()
}

#[test]
fn the_least_is_said_of_each_peer() {
    const A: &str = "10.1.0.0/24";
    const B: &str = "10.2.0.0/24";
    const C: &str = "10.3.0.0/24";
    type Case<'a> = (&'a str, &'a [(u8, DesiredPeer)], &'a [(u8, Peer)], &'a [&'a str]);
    let cases: &[Case<'_>] = &[
        ("equal", &[(1, wanted(1, &[A]))], &[(1, present(1, &[A], None))], &[]),
        (
            "new",
            &[(1, wanted(1, &[A, B])), (2, wanted(0, &[]))],
            &[],
            &[
                "add the peer 1, endpoint 192.0.2.1:51820, allowed 10.1.0.0/24 and 1 more",
                "add the peer 2",
            ],
        ),
        ("foreign", &[], &[(1, present(1, &[A], Some(1)))], &["remove 1"]),
        (
            "keepalive",
            &[(1, DesiredPeer { keepalive: 25, ..wanted(1, &[A]) })],
            &[(1, present(1, &[A], None))],
            &["change the peer 1, keepalive 25 s"],
        ),
        (
            "one more allowed IP",
            &[(1, wanted(1, &[A, B]))],
            &[(1, present(1, &[A], None))],
            &["change the peer 1, allowed 10.2.0.0/24"],
        ),
        (
            "one that is nobody's any more",
            &[(1, wanted(1, &[A]))],
            &[(1, present(1, &[A, B], None))],
            &["change the peer 1, allowed only 10.1.0.0/24"],
        ),
        (
            "the only one goes",
            &[(1, wanted(1, &[]))],
            &[(1, present(1, &[A], None))],
            &["change the peer 1, nothing allowed"],
        ),
        (
            "one moves to a later key",
            &[(1, wanted(1, &[])), (2, wanted(2, &[A, B]))],
            &[(1, present(1, &[A], None)), (2, present(2, &[B], None))],
            &["change the peer 2, allowed 10.1.0.0/24"],
        ),
        (
            "one moves to an earlier key",
            &[(1, wanted(1, &[A, B])), (2, wanted(2, &[]))],
            &[(1, present(1, &[A], None)), (2, present(2, &[B], None))],
            &["change the peer 1, allowed 10.2.0.0/24"],
        ),
        (
            "one moves, another one goes: what stays is named, what moves is not",
            &[(1, wanted(1, &[C])), (2, wanted(2, &[A]))],
            &[(1, present(1, &[A, B, C], None)), (2, present(2, &[], None))],
            &[
                "change the peer 1, allowed only 10.3.0.0/24",
                "change the peer 2, allowed 10.1.0.0/24",
            ],
        ),
        (
            "a node has a new key: it has its addresses before the old one goes",
            &[(2, wanted(1, &[A]))],
            &[(1, present(1, &[A], Some(1)))],
            &["add the peer 2, endpoint 192.0.2.1:51820, allowed 10.1.0.0/24", "remove 1"],
        ),
        (
            "what two want gets the lower key, and the other goes without",
            &[(1, wanted(1, &[A])), (2, wanted(2, &[A]))],
            &[(1, present(1, &[], None)), (2, present(2, &[A], None))],
            &["change the peer 1, allowed 10.1.0.0/24"],
        ),
        (
            "host bits are nothing",
            &[(1, wanted(1, &["10.1.0.9/24", "10.1.0.8/24"]))],
            &[(1, present(1, &[A], None))],
            &[],
        ),
        (
            "ourselves",
            &[(200, wanted(1, &[A])), (201, wanted(2, &[A]))],
            &[(200, present(1, &[B], None)), (201, present(2, &[A], None))],
            &["remove 200"],
        ),
    ];
    for (what, peers, actual, expected) in cases {
        assert_eq!(planned(&desired(peers), actual, &Memory::default()), *expected, "{what}");
    }
}

#[test]
fn an_endpoint_is_set_if_there_is_none_or_the_record_is_newer_or_nobody_answers_there() {
    // What the device has, how long ago the last handshake was, what we set last; and the record
    // says 1.
    let cases = [
        ("none so far", 0, None, None, true),
        ("none so far, although alive", 0, Some(1), Some(1), true),
        ("as the record says", 1, None, None, false),
        ("roamed and alive", 9, Some(179), Some(1), false),
        ("roamed and alive, agent started anew", 9, Some(179), None, false),
        ("roamed and gone quiet", 9, Some(180), Some(1), true),
        ("roamed and gone quiet, agent started anew", 9, Some(180), None, true),
        ("set by somebody, never heard of", 9, None, Some(1), true),
        ("the record has changed", 9, Some(1), Some(9), true),
        (
            "the record has changed, and the peer has roamed from the former",
            9,
            Some(1),
            Some(8),
            true,
        ),
    ];
    for (what, has, age, last_set, set) in cases {
        let mut memory = Memory::default();
        if let Some(last) = last_set {
            memory.note(&desired(&[(1, wanted(last, &[]))]), |_| false);
        }
        let changes =
            planned(&desired(&[(1, wanted(1, &[]))]), &[(1, present(has, &[], age))], &memory);
        let expected =
            if set { vec!["change the peer 1, endpoint 192.0.2.1:51820"] } else { vec![] };
        assert_eq!(changes, expected, "{what}");
    }
}

#[test]
fn a_record_without_endpoint_leaves_the_device_its_own() {
    let desired = desired(&[(1, wanted(0, &[]))]);
    assert_eq!(planned(&desired, &[(1, present(9, &[], None))], &Memory::default()), [""; 0]);
}

#[test]
fn a_handshake_of_the_future_speaks_for_the_peer() {
    let mut peer = present(9, &[], None);
    peer.last_handshake = Some(now() + Duration::from_secs(3600));
    let desired = desired(&[(1, wanted(1, &[]))]);
    assert_eq!(planned(&desired, &[(1, peer)], &Memory::default()), [""; 0]);
}

#[test]
fn an_ipv4_endpoint_in_ipv6_is_ipv4() {
    let mut mapped = wanted(1, &[]);
    mapped.endpoint = Some("[::ffff:192.0.2.1]:51820".parse().unwrap());
    let desired = desired(&[(1, mapped)]);
    assert_eq!(planned(&desired, &[(1, present(1, &[], None))], &Memory::default()), [""; 0]);
    let added = planned(&desired, &[], &Memory::default());
    assert_eq!(added, ["add the peer 1, endpoint 192.0.2.1:51820"]);
}

#[test]
fn the_memory_is_of_the_peers_there_are_and_not_of_refused_ones() {
    let mut memory = Memory::default();
    memory.note(&desired(&[(1, wanted(1, &[])), (2, wanted(2, &[]))]), |peer| *peer == key(2));
    assert_eq!(memory.0, BTreeMap::from([(key(1), at(1))]));
    memory.note(&desired(&[(3, wanted(0, &[]))]), |_| false);
    assert_eq!(memory, Memory::default());
}

/// WireGuard as its documents describe it, and as both implementations do it.
#[derive(Debug, Clone, Default, PartialEq)]
struct Model {
    peers: BTreeMap<PublicKey, Peer>,
    /// Peers that were there and have been removed: their sessions are lost.
    removed: Vec<PublicKey>,
}

impl Model {
    fn apply(&mut self, change: &Change) {
        match change {
            Change::SetPeer(change) => {
                if change.replace_allowed_ips {
                    self.peers.entry(change.public_key).or_default().allowed_ips.clear();
                }
                for ip in &change.allowed_ips {
                    assert_eq!(*ip, ip.masked());
                    for peer in self.peers.values_mut() {
                        peer.allowed_ips.remove(ip);
                    }
                }
                let peer = self.peers.entry(change.public_key).or_default();
                peer.endpoint = change.endpoint.or(peer.endpoint);
                peer.persistent_keepalive = change.keepalive.unwrap_or(peer.persistent_keepalive);
                peer.allowed_ips.extend(&change.allowed_ips);
            }
            Change::RemovePeer(key) => {
                self.peers.remove(key);
                self.removed.push(*key);
            }
            other => panic!("{other}"),
        }
    }
}

/// Few keys, prefixes and places, so that there is much to collide.
fn some_ips() -> impl Strategy<Value = BTreeSet<Cidr>> {
    btree_set((0..6u8, 24..26u8), 0..4).prop_map(|ips| {
        let cidr = |(n, length)| Cidr::new([10, n, 0, 7].into(), length).unwrap();
        ips.into_iter().map(cidr).collect()
    })
}

prop_compose! {
    fn some_wanted()(endpoint in 0..4u8, allowed_ips in some_ips(), keepalive in 0..2u16) -> DesiredPeer {
        DesiredPeer { allowed_ips, keepalive, ..wanted(endpoint, &[]) }
    }
}

prop_compose! {
    fn some_present()(
        endpoint in 0..4u8,
        allowed_ips in some_ips(),
        age in proptest::option::of(0..400u64),
        keepalive in 0..2u16,
    ) -> Peer {
        Peer { allowed_ips, persistent_keepalive: keepalive, ..present(endpoint, &[], age) }
    }
}

fn some_desired() -> impl Strategy<Value = Desired> {
    btree_map(0..6u8, some_wanted(), 0..6).prop_map(|peers| {
        // Key 5 is the device's own.
        let peers: Vec<_> = peers.into_iter().collect();
        Desired { public_key: key(5), ..desired(&peers) }
    })
}

/// What a device may have: each allowed IP belongs to one peer, and is masked.
fn some_device() -> impl Strategy<Value = BTreeMap<PublicKey, Peer>> {
    btree_map(0..5u8, some_present(), 0..6).prop_map(|peers| {
        let mut taken = BTreeSet::new();
        let mut own = |peer: Peer| Peer {
            allowed_ips: peer
                .allowed_ips
                .iter()
                .map(Cidr::masked)
                .filter(|ip| taken.insert(*ip))
                .collect(),
            ..peer
        };
        peers.into_iter().map(|(n, peer)| (key(n), own(peer))).collect()
    })
}

proptest! {
    /// Whatever the device has and whatever should be, round after round.
    #[test]
    fn after_one_round_nothing_is_left_to_do(
        device in some_device(),
        rounds in vec(some_desired(), 1..5),
    ) {
        let mut model = Model { peers: device, removed: Vec::new() };
        let mut memory = Memory::default();
        for desired in rounds {
            let before = model.clone();
            model.removed.clear();
            let mut changes = Vec::new();
            plan(&mut changes, &desired, &model.peers, &memory, now());
            changes.iter().for_each(|change| model.apply(change));
            // Foreign peers are gone, and no others, and none was removed and made again.
            let expected: Vec<_> = wanted_peers(&desired).map(|(key, _)| *key).collect();
            prop_assert_eq!(model.peers.keys().copied().collect::<Vec<_>>(), expected);
            prop_assert!(model.removed.iter().all(|key| !model.peers.contains_key(key)));
            // Each wanted allowed IP is somebody's who wants it, and there are no others.
            for (key, peer) in wanted_peers(&desired) {
                let present = &model.peers[key];
                prop_assert_eq!(peer.keepalive, present.persistent_keepalive);
                for ip in peer.allowed_ips.iter().map(Cidr::masked) {
                    prop_assert!(model.peers.values().any(|peer| peer.allowed_ips.contains(&ip)));
                }
                for ip in &present.allowed_ips {
                    prop_assert!(peer.allowed_ips.iter().any(|wanted| wanted.masked() == *ip));
                }
                // One that is heard of where it is, and whose record says the same as before, is
                // left there.
                if let Some(former) = before.peers.get(key)
                    && former.endpoint.is_some()
                    && former.is_alive(now())
                    && memory.0.get(key).is_none_or(|last| Some(*last) == peer.endpoint)
                {
                    prop_assert_eq!(former.endpoint, present.endpoint);
                }
            }
            // What we believe to be there is there.
            let (mut actual, mut believed) = (Actual::created(1420), before.peers);
            whole_settle(&mut actual, &mut believed, &desired, &changes);
            prop_assert_eq!(&believed, &model.peers);

            memory.note(&desired, |_| false);
            let mut again = Vec::new();
            plan(&mut again, &desired, &model.peers, &memory, now());
            prop_assert_eq!(again, []);
        }
    }

    /// The order in which the device hears of its peers within a round makes no difference: one
    /// message may be refused and said again later.
    #[test]
    fn peers_may_be_set_in_any_order(device in some_device(), desired in some_desired()) {
        let mut changes = Vec::new();
        plan(&mut changes, &desired, &device, &Memory::default(), now());
        let mut there = Model { peers: device, removed: Vec::new() };
        let mut back = there.clone();
        let (set, removed): (Vec<_>, Vec<_>) =
            changes.into_iter().partition(|change| matches!(change, Change::SetPeer(_)));
        set.iter().chain(&removed).for_each(|change| there.apply(change));
        set.iter().rev().chain(&removed).for_each(|change| back.apply(change));
        prop_assert_eq!(there.peers, back.peers);
    }

    #[test]
    fn a_parked_device_keeps_its_peers(device in some_device(), desired in some_desired()) {
        let parked = Desired { address: None, ..desired };
        let actual = Actual { up: true, ..Actual::created(1420) };
        let changes = whole_plan(&parked, Some(&actual), &device, &Memory::default(), now());
        prop_assert!(!changes.iter().any(Change::is_about_peers));
    }
}
