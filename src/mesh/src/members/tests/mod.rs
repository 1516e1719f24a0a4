mod chain;
mod order;
mod rules;
mod world;

use latchkey_wire::member::{Extension, Member, key_of};

use super::*;
use world::{Node, rules as default_rules};

fn members() -> Members {
    Members::new(default_rules())
}

fn cidr(text: &str) -> Cidr {
    text.parse().unwrap()
}

fn ranges(members: &Members, node: Node) -> Vec<String> {
    members
        .peers()
        .get(&node.public_key())
        .map_or_else(Vec::new, |peer| peer.allowed_ips.iter().map(Cidr::to_string).collect())
}

fn problems(members: &Members) -> Vec<(String, u64)> {
    members.problems().into_iter().map(|problem| (problem.key, problem.revision)).collect()
}

const A: Node = Node(1);
const B: Node = Node(2);
const OWN: Node = Node(0);

#[test]
fn a_node_is_the_union_of_its_records_and_a_stale_one_takes_only_its_own_prefix_along() {
    let mut members = members();
    let old = A.at("fd10:aaaa:1::/48").entry(1);
    assert!(members.put(old.clone()));
    let new =
        Member { advertise_address: "10.99.1.9".into(), ..A.at("fd10:bbbb:1::7/48").member() };
    assert!(members.put(world::entry(&new, 2)));
    assert_eq!(ranges(&members, A), ["fd10:aaaa:1::/48", "fd10:bbbb:1::/48"]);
    let [view] = members.views().try_into().unwrap();
    assert_eq!(view.allowed_ips, ["fd10:aaaa:1::/48", "fd10:bbbb:1::7/48"]);
    assert_eq!((view.advertise_address.as_str(), view.revision), ("10.99.1.9", 2));
    assert!(members.delete(&old.key, 3));
    assert_eq!(ranges(&members, A), ["fd10:bbbb:1::/48"]);
    assert_eq!(members.problems(), []);
    // Written again, it is no change but of the revision.
    let before = members.peers().clone();
    assert!(members.put(world::entry(&new, 4)));
    let peer = &members.peers()[&A.public_key()];
    assert_eq!(MemberPeer { revision: 2, ..peer.clone() }, before[&A.public_key()]);
}

#[test]
fn a_key_that_gets_another_owner_leaves_nothing_of_the_former() {
    let mut members = members();
    members.put(A.at("fd10:aaaa:1::/48").entry(1));
    assert!(members.put(B.at("fd10:aaaa:1::/48").entry(2)));
    assert_eq!(members.peers().keys().collect::<Vec<_>>(), [&B.public_key()]);
}

#[test]
fn old_revisions_undo_nothing() {
    let mut members = members();
    let (first, second) = (A.at("fd10:aaaa:1::/48").entry(1), A.at("fd10:aaaa:1::/48").entry(5));
    assert!(members.put(second.clone()));
    assert!(!members.put(first.clone()));
    assert!(!members.delete(&first.key, 4));
    assert_eq!(members.get(&second.key), Some(&second));
    assert!(members.delete(&first.key, 6));
    assert!(!members.delete(&first.key, 5));
    assert!(!members.put(second));
    assert!(members.put(A.at("fd10:aaaa:1::/48").entry(7)));
    // Never heard of, and still remembered.
    assert!(!members.delete("peers.x", 9));
    assert!(!members.put(Entry { key: "peers.x".into(), value: Default::default(), revision: 8 }));
    assert_eq!(members.problems(), []);
    // A snapshot is all there is: of a bucket made anew the revisions begin again.
    assert!(members.replace(vec![first]));
    assert!(members.replace(vec![B.at("fd10:aaaa:1::/48").entry(1)]));
    assert!(members.put(A.at("fd10:aaaa:1::/48").entry(2)));
}

#[test]
fn deletions_are_remembered_but_not_without_bound() {
    let mut members = members();
    for revision in 1..=MAX_DELETED as u64 + 1 {
        members.delete(&format!("peers.{revision}"), revision);
    }
    assert!(members.deleted.len() <= MAX_DELETED);
    let late = |number: u64| Entry {
        key: format!("peers.{number}"),
        value: Default::default(),
        revision: number - 1,
    };
    members.put(late(MAX_DELETED as u64));
    assert_eq!(members.problems(), [], "the newest are kept");
}

#[test]
fn of_overlapping_prefixes_of_different_nodes_the_older_record_counts() {
    for (one, other) in [
        ("fd10:a:b::1/48", "fd10:a:b::2/48"),
        ("fd10:a:b::/48", "fd10:a:b:c::/64"),
        ("fd10:a:b:c::/64", "fd10:a:b::/48"),
        ("fd10:a:b::1/128", "fd10:a::/32"),
    ] {
        let (first, second) = (A.at(one).entry(1), B.at(other).entry(2));
        for order in [[&first, &second], [&second, &first]] {
            let mut members = members();
            order.into_iter().for_each(|entry| {
                assert!(members.put(entry.clone()) || !members.problems().is_empty())
            });
            assert_eq!(ranges(&members, A), [cidr(one).masked().to_string()]);
            assert_eq!(ranges(&members, B), [""; 0]);
            let [problem] = members.problems().try_into().unwrap();
            assert_eq!((problem.key.as_str(), problem.revision), (second.key.as_str(), 2));
            assert!(problem.reason.contains(&A.public_key().to_string()), "{}", problem.reason);
            // What was in the way goes, and the other comes forward.
            assert!(members.delete(&first.key, 3));
            assert_eq!(ranges(&members, B), [cidr(other).masked().to_string()]);
            assert_eq!(members.problems(), []);
        }
    }
}

#[test]
fn who_is_in_nobodys_way_who_counts_counts() {
    // B's is behind A's and so is not in the way of C's.
    let mut members = members();
    members.put(A.at("fd10:a:1::/48").entry(1));
    members.put(B.at("fd10:a::/32").entry(2));
    let c = Node(3);
    members.put(c.at("fd10:a:2::/48").entry(3));
    assert_eq!(ranges(&members, c), ["fd10:a:2::/48"]);
    assert_eq!(problems(&members), [(key_of(&cidr("fd10:a::/32")), 2)]);
    // Without A's, B's counts, and C's is behind it.
    assert!(members.delete(&key_of(&cidr("fd10:a:1::/48")), 4));
    assert_eq!(ranges(&members, B), ["fd10:a::/32"]);
    assert_eq!(ranges(&members, c), [""; 0]);
    assert_eq!(problems(&members), [(key_of(&cidr("fd10:a:2::/48")), 3)]);
}

#[test]
fn a_nodes_own_prefixes_may_overlap() {
    let mut members = members();
    members.put(A.at("fd10:a::/32").entry(1));
    members.put(A.at("fd10:a:b::1/48").entry(2));
    members.put(A.at("fd10:a:b::2/48").entry(3));
    assert_eq!(ranges(&members, A), ["fd10:a::/32", "fd10:a:b::/48"]);
    assert_eq!(members.problems(), []);
    members.delete(&key_of(&cidr("fd10:a:b::1/48")), 4);
    assert_eq!(ranges(&members, A), ["fd10:a::/32", "fd10:a:b::/48"]);
}

#[test]
fn we_are_no_peer_of_ours_but_hold_our_prefix() {
    let mut members = members();
    let own = OWN.at("fd10:aaaa:1::/48").entry(1);
    assert!(!members.put(own.clone()));
    assert!(!members.put(A.at("fd10:aaaa:1::1/48").entry(2)));
    assert_eq!(members.peers().len(), 0);
    assert_eq!(members.problems().len(), 1);
    assert_eq!(members.own(), [&own]);
    assert_eq!(members.taken(&cidr("fd10:aaaa:1::/48")), None);
    assert!(members.delete(&own.key, 3));
    let holder = members.taken(&cidr("fd10:aaaa:1::9/128")).unwrap();
    assert_eq!((holder.public_key, holder.revision), (A.public_key(), 2));
    assert_eq!(members.own(), [&own; 0]);
    // Also one that does not count, and one that is refused.
    members.put(OWN.at("fd10:aaaa:1::7/48").entry(4));
    members.put(OWN.at("fd11::/48").entry(5));
    assert_eq!(members.own().len(), 2);
    assert_eq!(members.problems().len(), 2);
    assert_eq!(members.taken(&cidr("fd10:aaaa:1::/48")).unwrap().revision, 2);
}

#[test]
fn a_prefix_is_taken_by_what_is_around_it_and_by_what_is_in_it() {
    let mut members = members();
    members.put(A.at("fd10:a:b::1/48").entry(1));
    for (range, taken) in [
        ("fd10:a:b::/48", true),
        ("fd10:a:b::9/48", true),
        ("fd10:a:b::1/128", true),
        ("fd10:a:b:ffff::/64", true),
        ("fd10:a::/32", true),
        ("fd10::/16", true),
        ("::/0", true),
        ("fd10:a:c::/48", false),
        ("fd10:a:a:ffff:ffff:ffff:ffff:ffff/128", false),
        ("0.0.0.0/0", false),
    ] {
        assert_eq!(members.taken(&cidr(range)).is_some(), taken, "{range}");
    }
    // A problem takes nothing.
    members.put(B.at("fd10:a::/32").entry(2));
    assert_eq!(members.taken(&cidr("fd10:a:c::/48")), None);
}

#[test]
fn views_are_in_order_of_names() {
    let mut members = members();
    for (node, name) in [(A, "b"), (B, "a"), (Node(3), "a")] {
        let member =
            Member { name: name.into(), ..node.at(&format!("fd10:{}::/48", node.0)).member() };
        members.put(world::entry(&member, u64::from(node.0)));
    }
    let views = members.views();
    let names: Vec<_> = views.iter().map(|view| view.name.as_str()).collect();
    assert_eq!(names, ["a", "a", "b"]);
    assert!(views[0].public_key < views[1].public_key);
}

#[test]
fn one_entry_of_each_key_is_kept_and_of_a_monster_not_the_value() {
    let mut members = members();
    let good = A.at("fd10:aaaa:1::/48").entry(3);
    let monster = Entry { key: "peers.x".into(), value: vec![b' '; 1 << 20].into(), revision: 2 };
    let junk = Entry { key: "peers.y".into(), value: "junk".into(), revision: 4 };
    let older = Entry { revision: 1, ..good.clone() };
    members.replace(vec![good.clone(), monster.clone(), junk.clone(), older]);
    let kept = Entry { value: Default::default(), ..monster };
    assert_eq!(members.entries(), [good, kept, junk]);
    let reasons: Vec<_> = members.problems().into_iter().map(|problem| problem.reason).collect();
    assert!(reasons[0].contains("too long") && reasons[1].contains("JSON"), "{reasons:?}");
}

/// Signatures stand above age: whoever can write to the registry cannot take a signed member's place.
#[test]
fn signed_before_unsigned_and_then_by_age() {
    let mut members = members();
    let range = "fd10:aaaa:1::1/48";
    members.put(B.at("fd10:aaaa:1::2/48").entry(1));
    members.put(A.at(range).signed_entry(2));
    assert_eq!(ranges(&members, A), ["fd10:aaaa:1::/48"]);
    assert_eq!(ranges(&members, B), [""; 0]);
    // Of two signed ones the older.
    members.put(Node(3).at("fd10:aaaa:1::3/48").signed_entry(3));
    assert_eq!(ranges(&members, A), ["fd10:aaaa:1::/48"]);
    assert_eq!(members.problems().len(), 2);
    // Where signatures are not looked at, age alone.
    let mut ignoring =
        Members::new(Rules { signatures: SignaturePolicy::Ignore, ..default_rules() });
    ignoring.replace(members.entries());
    assert_eq!(ranges(&ignoring, B), ["fd10:aaaa:1::/48"]);
    assert!(!ignoring.peers()[&B.public_key()].signed);
}

/// An unsigned record with a signing node's key adds a prefix that nobody has, and tells nothing about the node.
#[test]
fn a_signed_record_tells_where_a_node_is() {
    let mut members = members();
    members.put(A.at("fd10:aaaa:1::/48").signed_entry(1));
    let elsewhere =
        Member { advertise_address: "6.6.6.6".into(), ..A.at("fd10:bbbb:1::/48").member() };
    members.put(world::entry(&elsewhere, 2));
    let peer = &members.peers()[&A.public_key()];
    assert_eq!(
        (peer.advertise_address.as_str(), peer.signed, peer.revision),
        ("10.99.0.1", true, 1)
    );
    assert_eq!(peer.allowed_ips.len(), 2);
    let moved = Member { extension: Some(Extension::default()), ..elsewhere };
    members.put(world::signed_entry(&moved, &A, 3));
    assert_eq!(members.peers()[&A.public_key()].advertise_address, "6.6.6.6");
}
