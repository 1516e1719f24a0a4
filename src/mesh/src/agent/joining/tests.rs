//! Nodes with a registry in memory and a clock that is moved by hand.

use futures_util::FutureExt as _;
use latchkey_wire::member::Member;

use super::*;
use crate::address::candidates;
use crate::advertise::Advertised;
use crate::claim::memory::{Memory, MemoryWatch};
use crate::claim::{Write, perform};
use crate::key::PrivateKey;
use crate::registry::{Registry as _, Watch as _};

const MESH: &str = "fd10::/16";
const BUCKET: &str = "b";
const OWN: &str = "fd10:aaaa:1::/48";

fn key(n: u8) -> PrivateKey {
    PrivateKey::new(&[n; 32])
}

fn cidr(text: &str) -> Cidr {
    text.parse().unwrap()
}

fn candidate(n: u8, index: usize) -> Cidr {
    let address = candidates(&cidr(MESH), key(n).public()).unwrap().nth(index).unwrap().1;
    Cidr::host(address)
}

fn wanted(n: u8, address: AddressFrom) -> Wanted {
    Wanted {
        bucket: BUCKET.into(),
        mesh: cidr(MESH),
        address,
        public_key: key(n).public(),
        name: format!("node-{n}"),
        advertised: Some(Advertised { address: [192, 0, 2, n].into(), name: None }),
        wg_port: 51820,
    }
}

struct Node {
    n: u8,
    joining: Joining,
    registry: Memory,
    watch: MemoryWatch,
    now: Instant,
}

impl Node {
    fn new(n: u8, address: AddressFrom, registry: &Memory) -> Self {
        Self::again(n, address, registry, None)
    }

    fn fixed(n: u8, own: &str, registry: &Memory) -> Self {
        Self::new(n, AddressFrom::Fixed(cidr(own)), registry)
    }

    fn again(n: u8, address: AddressFrom, registry: &Memory, cached: Option<Cached>) -> Self {
        let rules = Rules {
            bucket: BUCKET.into(),
            mesh: cidr(MESH),
            own: key(n).public(),
            signatures: SignaturePolicy::Prefer,
            strict: true,
        };
        let mut joining = Joining::new(wanted(n, address), rules, cached);
        joining.random = || 1.0; // pauses are as long as they get
        let (registry, watch) = (registry.clone(), registry.watch());
        Self { n, joining, registry, watch, now: Instant::now() }
    }

    /// Hears what there is to hear.
    fn hear(&mut self) {
        while let Some(event) = self.watch.next().now_or_never() {
            self.joining.event(event, self.now);
        }
    }

    fn next(&mut self) -> Result<Next> {
        self.joining.next(self.now)
    }

    fn write(&mut self, step: &Step) {
        let write = Write::of(step, BUCKET, &key(self.n)).unwrap();
        let written = perform(self.registry.clone(), write);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let written = runtime.block_on(written);
        self.joining.written(written, self.now);
    }

    /// Goes on until there is nothing to do but wait.
    fn settle(&mut self) -> Result<Option<Instant>> {
        for _ in 0..100 {
            self.hear();
            match self.next()? {
                Next::Wait(until) => return Ok(until),
                Next::Write(step) => self.write(&step),
            }
        }
        panic!("it writes for ever");
    }

    fn pass(&mut self, time: Duration) -> &mut Self {
        self.now += time;
        self
    }

    fn own(&self) -> Option<Cidr> {
        self.joining.address()
    }

    fn is_joined(&self) -> bool {
        self.joining.state().0 == RegistryState::Joined
    }

    fn peers(&self) -> Vec<u8> {
        let number = |public: &PublicKey| (1..=99).find(|n| key(*n).public() == *public).unwrap();
        let mut peers: Vec<u8> = self.joining.peers().map(|(key, _)| number(key)).collect();
        peers.sort_unstable();
        peers
    }
}

/// The record of node `n` for `own`.
fn record(n: u8, own: &str) -> (String, String) {
    let member = Member {
        name: String::new(),
        public_key: *key(n).public().as_bytes(),
        advertise_address: format!("192.0.2.{n}"),
        allowed_ip: cidr(own),
        wg_port: 51820,
        extension: Some(latchkey_wire::member::Extension::default()),
    };
    (key_of(&cidr(own)), member.to_signed_json(BUCKET, key(n).as_bytes()))
}

fn write(registry: &Memory, n: u8, own: &str) -> u64 {
    let (key, value) = record(n, own);
    registry.write(&key, value)
}

#[test]
fn a_node_joins_and_finds_its_record_when_it_comes_again() {
    let registry = Memory::default();
    write(&registry, 2, "fd10:bbbb:2::/48");
    let mut node = Node::fixed(1, OWN, &registry);
    assert_eq!((node.own(), node.is_joined()), (None, false));
    node.settle().unwrap();
    assert_eq!((node.own(), node.is_joined()), (Some(cidr(OWN)), true));
    assert_eq!(node.peers(), [2]);
    let revision = registry.entry(&key_of(&cidr(OWN))).unwrap().revision;

    let mut again = Node::fixed(1, OWN, &registry);
    again.settle().unwrap();
    assert!(again.is_joined());
    assert_eq!(registry.entry(&key_of(&cidr(OWN))).unwrap().revision, revision);
    assert_eq!(registry.writes(), 1);
}

#[test]
fn nothing_is_this_nodes_before_the_watch_has_shown_it() {
    let registry = Memory::default();
    let mut node = Node::fixed(1, OWN, &registry);
    node.hear();
    let Next::Write(step) = node.next().unwrap() else { panic!() };
    node.write(&step);
    assert!(matches!(node.next().unwrap(), Next::Wait(Some(_))));
    assert_eq!(node.own(), None);
    node.hear();
    node.next().unwrap();
    assert_eq!(node.own(), Some(cidr(OWN)));
}

#[test]
fn a_configured_address_that_is_taken_ends_the_agent_and_nothing_is_written() {
    for range in [OWN, "fd10:aaaa:1::7/48", "fd10:aaaa:1::1/128"] {
        let registry = Memory::default();
        write(&registry, 2, range);
        let mut node = Node::fixed(1, OWN, &registry);
        let error = node.settle().unwrap_err();
        assert!(matches!(error, Error::AddressTaken { .. }), "{error}");
        assert_eq!(error.exit_code(), 65);
        assert!(error.to_string().contains(&key(2).public().to_string()), "{error}");
        assert_eq!((node.own(), registry.writes()), (None, 0));
    }
}

/// Both see an empty bucket, both write: the lock is on two keys, the prefix is one.
#[test]
fn of_two_that_claim_overlapping_ranges_at_once_the_first_one_has_it() {
    let registry = Memory::default();
    let mut one = Node::fixed(1, "fd10:aaaa:1::1/48", &registry);
    let mut two = Node::fixed(2, "fd10:aaaa:1::2/48", &registry);
    let steps = [&mut one, &mut two].map(|node| {
        node.hear();
        node.next().unwrap()
    });
    let [Next::Write(first), Next::Write(second)] = steps else { panic!() };
    two.write(&second);
    one.write(&first);
    two.settle().unwrap();
    let error = one.settle().unwrap_err();
    assert!(matches!(error, Error::AddressTaken { .. }), "{error}");
    assert_eq!((one.own(), two.own()), (None, Some(cidr("fd10:aaaa:1::2/48"))));
    assert_eq!(registry.keys(), [key_of(&cidr("fd10:aaaa:1::2/48"))]);
}

#[test]
fn of_two_that_claim_one_key_at_once_one_takes_its_next_candidate() {
    let registry = Memory::default();
    let mut node = Node::new(1, AddressFrom::Key, &registry);
    node.hear();
    let Next::Write(step) = node.next().unwrap() else { panic!() };
    write(&registry, 2, &candidate(1, 0).to_string()); // meanwhile
    node.write(&step);
    node.settle().unwrap();
    assert_eq!(node.own(), Some(candidate(1, 1)));
    assert!(node.is_joined());
}

#[test]
fn an_address_once_taken_stays_after_a_restart() {
    let registry = Memory::default();
    write(&registry, 2, &candidate(1, 0).to_string());
    let mut node = Node::new(1, AddressFrom::Key, &registry);
    node.settle().unwrap();
    assert_eq!(node.own(), Some(candidate(1, 1)));
    // The first one becomes free, the own record goes, and this node was away meanwhile.
    let cached = node.joining.to_cache();
    registry.remove(&key_of(&candidate(1, 0)));
    registry.remove(&key_of(&candidate(1, 1)));
    let mut again = Node::again(1, AddressFrom::Key, &registry, cached);
    again.settle().unwrap();
    assert_eq!(again.own(), Some(candidate(1, 1)));
}

#[test]
fn a_record_that_was_deleted_is_written_again_after_pauses_that_double() {
    let registry = Memory::default();
    let mut node = Node::fixed(1, OWN, &registry);
    node.settle().unwrap();
    for seconds in [2, 4, 8, 16, 32, 64, 128, 256, 300, 300] {
        registry.remove(&key_of(&cidr(OWN)));
        let until = node.settle().unwrap().unwrap();
        assert_eq!(until - node.now, Duration::from_secs(seconds));
        let (state, reason) = node.joining.state();
        assert_eq!(state, RegistryState::Refused, "{reason:?}");
        assert_eq!(node.own(), Some(cidr(OWN)), "the device stays as it is");
        node.now = until;
        node.settle().unwrap();
        assert!(node.is_joined());
    }
    node.pass(CALM);
    registry.remove(&key_of(&cidr(OWN)));
    assert_eq!(node.settle().unwrap().unwrap() - node.now, Duration::from_secs(2), "forgotten");
}

/// Whatever comes in between: one that writes all the time is not answered all the time.
#[test]
fn a_pause_does_not_end_because_the_record_changes_again() {
    let registry = Memory::default();
    let mut node = Node::fixed(1, OWN, &registry);
    node.settle().unwrap();
    write(&registry, 1, OWN);
    let until = node.settle().unwrap().unwrap();
    for _ in 0..5 {
        write(&registry, 1, OWN);
        registry.remove(&key_of(&cidr(OWN)));
        assert_eq!(node.settle().unwrap(), Some(until));
    }
    node.now = until;
    node.settle().unwrap();
    assert!(node.is_joined());
}

/// Another agent with the same key, say.
#[test]
fn a_record_that_somebody_changes_is_not_fought_over_without_pauses() {
    let registry = Memory::default();
    let mut node = Node::fixed(1, OWN, &registry);
    node.settle().unwrap();
    let start = node.now;
    let mut writes = 0;
    while node.now < start + Duration::from_secs(3600) {
        write(&registry, 1, OWN);
        let before = registry.writes();
        let until = node.settle().unwrap();
        writes += registry.writes() - before;
        node.now = until.unwrap_or(node.now + Duration::from_secs(1));
        node.settle().unwrap();
    }
    assert!(writes + registry.writes() < 30, "{writes} {}", registry.writes());
}

#[test]
fn what_this_node_itself_wants_changed_is_written_at_once() {
    let registry = Memory::default();
    let mut node = Node::fixed(1, OWN, &registry);
    node.settle().unwrap();
    let renamed = Wanted { name: "other".into(), ..node.joining.wanted().clone() };
    node.joining.want(renamed);
    assert_eq!(node.settle().unwrap(), None);
    assert!(node.is_joined());
    let value = registry.entry(&key_of(&cidr(OWN))).unwrap().value;
    assert!(std::str::from_utf8(&value).unwrap().contains("other"));
}

#[test]
fn a_node_that_may_not_write_says_so_and_asks_again_slowly() {
    let registry = Memory::default();
    write(&registry, 2, "fd10:bbbb:2::/48");
    registry.forbid(&key_of(&cidr(OWN)));
    let mut node = Node::fixed(1, OWN, &registry);
    for seconds in [60, 120, 240, 480, 600, 600] {
        let until = node.settle().unwrap().unwrap();
        assert_eq!(until - node.now, Duration::from_secs(seconds));
        let (state, reason) = node.joining.state();
        assert_eq!(state, RegistryState::Refused);
        assert!(reason.unwrap().contains("does not permit"));
        assert_eq!(node.own(), None);
        node.now = until;
    }
    registry.permit(&key_of(&cidr(OWN)));
    node.settle().unwrap();
    assert!(node.is_joined());
}

/// Who was joined and then may no longer write goes on, as long as its record is there.
#[test]
fn a_record_that_may_not_be_changed_is_still_this_nodes() {
    let registry = Memory::default();
    write(&registry, 1, OWN); // with another name
    registry.forbid(&key_of(&cidr(OWN)));
    let mut node = Node::fixed(1, OWN, &registry);
    node.settle().unwrap();
    assert_eq!((node.own(), node.is_joined()), (Some(cidr(OWN)), false));
}

#[test]
fn own_records_of_former_times_are_deleted_or_left_if_that_is_not_permitted() {
    for permitted in [true, false] {
        let registry = Memory::default();
        let old = key_of(&cidr("fd10:cccc:3::/48"));
        write(&registry, 1, "fd10:cccc:3::/48");
        if !permitted {
            registry.forbid(&old);
        }
        let mut node = Node::fixed(1, OWN, &registry);
        assert_eq!(node.settle().unwrap(), None);
        assert!(node.is_joined());
        assert_eq!(registry.entry(&old).is_none(), permitted);
        let writes = registry.writes();
        node.pass(Duration::from_secs(3600)).settle().unwrap();
        assert_eq!(registry.writes(), writes, "asked once");
    }
}

/// As a node with a copy of the key does, say, that has another address.
#[test]
fn an_own_record_that_comes_back_is_deleted_once() {
    let registry = Memory::default();
    let mut node = Node::fixed(1, OWN, &registry);
    node.settle().unwrap();
    for there in [false, true, true] {
        write(&registry, 1, "fd10:cccc:3::/48");
        node.settle().unwrap();
        assert!(node.is_joined());
        assert_eq!(registry.entry(&key_of(&cidr("fd10:cccc:3::/48"))).is_some(), there);
    }
}

#[test]
fn what_is_missing_in_a_new_snapshot_of_the_same_bucket_was_deleted() {
    let registry = Memory::default();
    write(&registry, 2, "fd10:bbbb:2::/48");
    let mut node = Node::fixed(1, OWN, &registry);
    node.settle().unwrap();
    let deaf = std::mem::replace(&mut node.watch, registry.watch());
    drop(deaf);
    registry.remove(&key_of(&cidr("fd10:bbbb:2::/48")));
    registry.interrupt();
    node.settle().unwrap();
    assert_eq!(node.peers(), [0; 0]);
    assert!(node.is_joined());
}

#[test]
fn nothing_is_removed_because_the_registry_is_silent() {
    let registry = Memory::default();
    write(&registry, 2, "fd10:bbbb:2::/48");
    let mut node = Node::fixed(1, OWN, &registry);
    node.settle().unwrap();
    registry.lose();
    assert_eq!(node.settle().unwrap(), None);
    assert_eq!(node.joining.state(), (RegistryState::Away, Some("gone".into())));
    node.pass(Duration::from_secs(7 * 24 * 3600)).settle().unwrap();
    assert_eq!((node.own(), node.peers()), (Some(cidr(OWN)), vec![2]));
    registry.interrupt();
    node.settle().unwrap();
    assert!(node.is_joined());
}

#[test]
fn a_bucket_made_anew_says_nothing_of_those_who_have_not_written_to_it_yet() {
    let registry = Memory::default();
    for n in [2, 3, 4, 5, 7] {
        write(&registry, n, &format!("fd10:bbbb:{n}::/48"));
    }
    let mut node = Node::fixed(1, OWN, &registry);
    node.settle().unwrap();
    assert_eq!(node.peers(), [2, 3, 4, 5, 7]);

    registry.make_anew();
    let until = node.settle().unwrap().unwrap();
    assert!(until - node.now <= Duration::from_secs(3), "not all at once");
    assert_eq!(node.peers(), [2, 3, 4, 5, 7]);
    node.now = until;
    node.settle().unwrap();
    assert!(node.is_joined());

    write(&registry, 2, "fd10:bbbb:2::/48"); // comes again
    write(&registry, 6, "fd10:bbbb:3::/48"); // has 3's range now
    write(&registry, 4, "fd10:bbbb:4::/48");
    registry.remove(&key_of(&cidr("fd10:bbbb:4::/48"))); // is shut out
    registry.remove(&key_of(&cidr("fd10:bbbb:7::/48"))); // and this one before it came again
    node.settle().unwrap();
    assert_eq!(node.peers(), [2, 5, 6]);
    node.pass(GRACE - Duration::from_secs(10)).settle().unwrap();
    assert_eq!(node.peers(), [2, 5, 6]);
    node.joining.take_changed();
    node.pass(Duration::from_secs(10)).settle().unwrap();
    assert_eq!(node.peers(), [2, 6]);
    assert!(node.joining.take_changed());
}

#[test]
fn a_restart_while_the_fleet_comes_back_forgets_nobody() {
    let registry = Memory::default();
    write(&registry, 2, "fd10:bbbb:2::/48");
    write(&registry, 3, "fd10:bbbb:3::/48");
    let mut node = Node::fixed(1, OWN, &registry);
    node.settle().unwrap();
    let before = node.joining.to_cache();
    registry.make_anew();
    node.settle().unwrap();
    let address = AddressFrom::Fixed(cidr(OWN));
    for cached in [before, node.joining.to_cache()] {
        let mut again = Node::again(1, address, &registry, cached);
        again.settle().unwrap();
        assert_eq!(again.peers(), [2, 3]);
    }
    write(&registry, 2, "fd10:bbbb:2::/48");
    node.settle().unwrap();
    let mut again = Node::again(1, address, &registry, node.joining.to_cache());
    again.settle().unwrap();
    assert_eq!(again.peers(), [2, 3]);
    again.pass(GRACE).settle().unwrap();
    assert_eq!(again.peers(), [2]);
}

#[test]
fn without_a_registry_the_cache_says_who_this_node_is_and_who_the_others_are() {
    let registry = Memory::default();
    write(&registry, 2, "fd10:bbbb:2::/48");
    let mut node = Node::fixed(1, OWN, &registry);
    node.settle().unwrap();
    let cached = node.joining.to_cache();

    let address = AddressFrom::Fixed(cidr(OWN));
    let mut again = Node::again(1, address, &registry, cached.clone());
    assert_eq!(again.own(), None, "the registry is asked first");
    again.joining.event(Event::Away { reason: "gone".into() }, again.now);
    again.next().unwrap();
    assert!(again.joining.settle_for_cache());
    assert_eq!((again.own(), again.peers()), (Some(cidr(OWN)), vec![2]));
    assert_eq!(again.joining.state().0, RegistryState::Away);
    assert!(again.joining.is_from_cache());
    again.settle().unwrap(); // and there it is
    assert!(again.is_joined() && !again.joining.is_from_cache());

    // Of another address than the one configured now, it says nothing.
    let mut other = Node::again(1, AddressFrom::Fixed(cidr("fd10:1::/48")), &registry, cached);
    assert!(!other.joining.settle_for_cache());
    assert_eq!(other.own(), None);
}

/// A node that was up from its cache stays up, even if its address went to another meanwhile.
#[test]
fn a_node_that_is_up_does_not_end_because_its_address_is_taken() {
    let registry = Memory::default();
    let mut node = Node::fixed(1, OWN, &registry);
    node.settle().unwrap();
    let cached = node.joining.to_cache();
    write(&registry, 2, OWN);
    let address = AddressFrom::Fixed(cidr(OWN));
    let mut again = Node::again(1, address, &registry, cached);
    again.joining.settle_for_cache();
    again.settle().unwrap();
    assert_eq!(again.joining.state().0, RegistryState::Refused);
    assert_eq!(again.own(), Some(cidr(OWN)));
    registry.remove(&key_of(&cidr(OWN)));
    again.settle().unwrap();
    assert!(again.is_joined(), "as soon as it is free");
}

#[test]
fn without_an_answer_to_where_it_is_a_node_waits_and_then_writes() {
    let registry = Memory::default();
    let mut node = Node::fixed(1, OWN, &registry);
    let known = node.joining.wanted().clone();
    node.joining.want(Wanted { advertised: None, ..known.clone() });
    assert_eq!(node.settle().unwrap(), None);
    assert_eq!((node.own(), registry.writes()), (None, 0));
    node.joining.want(known);
    node.settle().unwrap();
    assert!(node.is_joined());
}
