//! Whatever comes, in whatever order: what is known is what a look at the newest record of each key says.

use latchkey_wire::member::{Extension, Signature, read};
use proptest::prelude::*;
use proptest::sample::{Index, select};

use super::world::{BUCKET, Node, rules};
use super::*;

/// Prefixes that lie in each other and beside each other, two that differ in their host bits alone, and some that may not be.
const PREFIXES: [&str; 12] = [
    "fd10:a::/32",
    "fd10:a:1::/48",
    "fd10:a:1::1/48",
    "fd10:a:1:1::/64",
    "fd10:a:1:1::7/128",
    "fd10:a:2::/48",
    "fd10:b::/32",
    "fd10:b:1::/48",
    "fd10:c::1/128",
    "fd10::/16",
    "fd11::/48",
    "fd10::/0",
];
const NODES: u8 = 5;

/// What happens to one key. Its revision is its place in the history.
#[derive(Debug, Clone)]
pub(super) enum Event {
    Put { key: String, value: Vec<u8> },
    Delete { key: String },
}

impl Event {
    fn key(&self) -> &str {
        match self {
            Self::Put { key, .. } | Self::Delete { key } => key,
        }
    }

    fn entry(&self, revision: u64) -> Option<Entry> {
        match self {
            Self::Put { key, value } => {
                Some(Entry { key: key.clone(), value: value.clone().into(), revision })
            }
            Self::Delete { .. } => None,
        }
    }

    pub(super) fn happen(&self, revision: u64, members: &mut Members) -> bool {
        match (self, self.entry(revision)) {
            (_, Some(entry)) => members.put(entry),
            (event, None) => members.delete(event.key(), revision),
        }
    }
}

pub(super) fn any_event() -> impl Strategy<Value = Event> {
    let node = (0..NODES).prop_map(Node);
    let good =
        (node, select(&PREFIXES[..]), 0..3u8, 0..8u8).prop_map(|(node, prefix, place, kind)| {
            let home = node.at(prefix);
            let member = Member {
                advertise_address: format!("10.99.{place}.{}", node.0),
                wg_port: if kind == 7 { 0 } else { 51820 },
                ..home.member()
            };
            let key = key_of(&member.allowed_ip);
            let signed = Member { extension: Some(Extension::default()), ..member.clone() };
            match kind {
                // Signed by the node, and by somebody else.
                0..3 => put(key, signed.to_signed_json(BUCKET, node.private_key().as_bytes())),
                3 => put(key, signed.to_signed_json(BUCKET, Node(9).private_key().as_bytes())),
                // Under the key of another prefix.
                4 => put(key_of(&cidr("fd10:c::1/128")), member.to_json()),
                _ => put(key, member.to_json()),
            }
        });
    let delete =
        select(&PREFIXES[..]).prop_map(|prefix| Event::Delete { key: key_of(&cidr(prefix)) });
    let junk =
        select(&PREFIXES[..]).prop_map(|prefix| put(key_of(&cidr(prefix)), "{\"name\":".into()));
    prop_oneof![8 => good, 3 => delete, 1 => junk]
}

fn put(key: String, value: String) -> Event {
    Event::Put { key, value: value.into() }
}

pub(super) fn any_rules() -> impl Strategy<Value = Rules> {
    use SignaturePolicy::{Ignore, Prefer, Require};
    (select(vec![Prefer, Prefer, Ignore, Require]), any::<bool>())
        .prop_map(|(signatures, strict)| Rules { signatures, strict, ..rules() })
}

/// The newest record of each key, of a history numbered from 1.
pub(super) fn remaining(history: &[Event]) -> Vec<Entry> {
    let mut last = BTreeMap::new();
    for (event, revision) in history.iter().zip(1..) {
        last.insert(event.key(), (event, revision));
    }
    last.into_values().filter_map(|(event, revision)| event.entry(revision)).collect()
}

/// All that can be asked.
#[derive(Debug, PartialEq)]
struct Answers {
    peers: BTreeMap<PublicKey, MemberPeer>,
    problems: Vec<Problem>,
    entries: Vec<Entry>,
    own: Vec<Entry>,
    views: Vec<MemberView>,
    taken: Vec<Option<Holder>>,
}

fn answers(members: &Members) -> Answers {
    Answers {
        peers: members.peers().clone(),
        problems: members.problems(),
        entries: members.entries(),
        own: members.own().into_iter().cloned().collect(),
        views: members.views(),
        taken: PREFIXES.iter().map(|prefix| members.taken(&cidr(prefix))).collect(),
    }
}

fn fresh(rules: &Rules, entries: Vec<Entry>) -> Members {
    let mut members = Members::new(rules.clone());
    members.replace(entries);
    members
}

/// The definition, read aloud: every pair is looked at. Who counts, by key.
fn counting_by_definition(
    rules: &Rules,
    entries: &[Entry],
) -> BTreeMap<String, (PublicKey, Cidr, u64)> {
    let mut valid: Vec<(bool, u64, &str, PublicKey, Cidr)> = entries
        .iter()
        .filter_map(|entry| {
            let (member, signature) = read(BUCKET, &entry.key, &entry.value).ok()?;
            let signed = match (rules.signatures, signature) {
                (SignaturePolicy::Ignore, _) => false,
                (_, Signature::Invalid) | (SignaturePolicy::Require, Signature::Absent) => {
                    return None;
                }
                (_, signature) => signature == Signature::Valid,
            };
            let range = member.allowed_ip.masked();
            let stands = rules.mesh.covers(&range) && key_of(&member.allowed_ip) == entry.key;
            let usable = range.length() > 0 && (stands || !rules.strict);
            let behind = rules.signatures == SignaturePolicy::Prefer && !signed;
            let node = PublicKey::new(member.public_key);
            usable.then_some((behind, entry.revision, entry.key.as_str(), node, range))
        })
        .collect();
    valid.sort();
    let mut counting: BTreeMap<String, (PublicKey, Cidr, u64)> = BTreeMap::new();
    for (_, revision, key, node, range) in valid {
        if counting.values().all(|(other, taken, _)| *other == node || !taken.overlaps(&range)) {
            counting.insert(key.into(), (node, range, revision));
        }
    }
    counting
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(192) })]

    #[test]
    fn who_counts_is_who_counts_by_definition(
        rules in any_rules(),
        history in prop::collection::vec(any_event(), 0..24),
    ) {
        let entries = remaining(&history);
        let counting = counting_by_definition(&rules, &entries);
        let members = fresh(&rules, entries.clone());
        let mut prefixes: BTreeMap<PublicKey, BTreeSet<Cidr>> = BTreeMap::new();
        for (node, range, _) in counting.values().filter(|(node, ..)| *node != rules.own) {
            prefixes.entry(*node).or_default().insert(*range);
        }
        let found: BTreeMap<PublicKey, BTreeSet<Cidr>> =
            members.peers().iter().map(|(node, peer)| (*node, peer.allowed_ips.clone())).collect();
        prop_assert_eq!(found, prefixes);
        let refused: BTreeSet<String> = members.problems().into_iter().map(|problem| problem.key).collect();
        let others: BTreeSet<String> =
            entries.iter().map(|entry| entry.key.clone()).filter(|key| !counting.contains_key(key)).collect();
        prop_assert_eq!(refused, others);
        for range in PREFIXES.map(cidr) {
            let taken = counting.values().any(|(node, other, _)| *node != rules.own && other.overlaps(&range));
            prop_assert_eq!(members.taken(&range).is_some(), taken);
        }
    }

    /// In the order of their revisions, shuffled, again and again, with snapshots of whatever moment in between.
    #[test]
    fn any_order_ends_alike(
        rules in any_rules(),
        history in prop::collection::vec(any_event(), 0..24),
        order in prop::collection::vec((any::<Index>(), 0..12u8), 0..40),
    ) {
        let expected = answers(&fresh(&rules, remaining(&history)));
        let happen = |members: &mut Members, at: usize| history[at].happen(at as u64 + 1, members);

        let mut one_by_one = Members::new(rules.clone());
        for at in 0..history.len() {
            let before = one_by_one.peers().clone();
            let changed = happen(&mut one_by_one, at);
            prop_assert_eq!(changed, *one_by_one.peers() != before);
            prop_assert_eq!(answers(&one_by_one), answers(&fresh(&rules, remaining(&history[..=at]))));
        }
        prop_assert_eq!(&answers(&one_by_one), &expected);

        let mut shuffled = Members::new(rules.clone());
        if !history.is_empty() {
            for (at, _) in &order {
                happen(&mut shuffled, at.index(history.len()));
            }
            // What did not come so far, and much that did.
            for at in (0..history.len()).rev() {
                happen(&mut shuffled, at);
            }
        }
        prop_assert_eq!(&answers(&shuffled), &expected);

        let mut replaced = one_by_one;
        for (at, kind) in &order {
            let snapshot = remaining(&history[..at.index(history.len() + 1)]);
            let before = replaced.peers().clone();
            let reversed = snapshot.iter().rev().chain(&snapshot).cloned().collect();
            let changed = replaced.replace(if *kind < 6 { snapshot.clone() } else { reversed });
            prop_assert_eq!(changed, *replaced.peers() != before);
            prop_assert_eq!(answers(&replaced), answers(&fresh(&rules, snapshot)));
        }
        replaced.replace(remaining(&history));
        prop_assert_eq!(&answers(&replaced), &expected);
        prop_assert!(!replaced.replace(remaining(&history)), "the same again is no change");
    }
}
