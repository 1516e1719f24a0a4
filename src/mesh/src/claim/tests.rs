//! What is decided from what is known, one case each.

use super::*;

const MESH: &str = "fd10::/16";
const BUCKET: &str = "b";

fn key(n: u8) -> PrivateKey {
    PrivateKey::new(&[n; 32])
}

fn cidr(text: &str) -> Cidr {
    text.parse().unwrap()
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

fn fixed(n: u8, own: &str) -> Wanted {
    wanted(n, AddressFrom::Fixed(cidr(own)))
}

/// The record of node `n` for `own`, as its agent writes it.
fn entry(n: u8, own: &str, revision: u64) -> Entry {
    let own = cidr(own);
    let member = wanted(n, AddressFrom::Key).member(own, None).unwrap();
    let value = member.to_signed_json(BUCKET, key(n).as_bytes());
    Entry { key: key_of(&own), value: value.into(), revision }
}

/// The same as an Ikto agent writes it.
fn unsigned(n: u8, own: &str, revision: u64) -> Entry {
    let mut member = wanted(n, AddressFrom::Key).member(cidr(own), None).unwrap();
    member.extension = None;
    Entry { key: key_of(&cidr(own)), value: member.to_json().into(), revision }
}

fn members(n: u8, entries: Vec<Entry>) -> Members {
    let mut members = Members::new(crate::members::Rules {
        bucket: BUCKET.into(),
        mesh: cidr(MESH),
        own: key(n).public(),
        signatures: latchkey_wire::member::SignaturePolicy::Prefer,
        strict: true,
    });
    members.replace(entries);
    members
}

fn decided(wanted: &Wanted, entries: Vec<Entry>) -> Step {
    with(wanted, entries, None, &BTreeSet::new())
}

fn with(
    wanted: &Wanted,
    entries: Vec<Entry>,
    held: Option<Cidr>,
    undeletable: &BTreeSet<String>,
) -> Step {
    let n = (1..=9).find(|n| key(*n).public() == wanted.public_key).unwrap();
    let members = members(n, entries);
    let known = Known { members: &members, carried: None, held, undeletable, verified: None };
    decide(wanted, &known).unwrap()
}

fn candidate(n: u8, index: usize) -> String {
    let address = candidates(&cidr(MESH), key(n).public()).unwrap().nth(index).unwrap().1;
    Cidr::host(address).to_string()
}

/// `(own range, what was expected)`, and nothing of the record itself.
fn write_of(step: &Step) -> Option<(String, Expected)> {
    match step {
        Step::Write { own, expected, .. } => Some((own.to_string(), *expected)),
        _ => None,
    }
}

const OWN: &str = "fd10:aaaa:1::/48";

#[test]
fn nothing_there_is_written_on_the_condition_that_nothing_is_there() {
    let step = decided(&fixed(1, OWN), vec![]);
    assert_eq!(write_of(&step), Some((OWN.into(), Expected::Absent)));
}

#[test]
fn an_equal_record_stands_and_is_not_written() {
    let stands = Step::Stands { own: cidr(OWN), revision: 7 };
    assert_eq!(decided(&fixed(1, OWN), vec![entry(1, OWN, 7)]), stands);
}

#[test]
fn a_record_that_says_something_else_is_written_with_its_revision() {
    let there = || vec![entry(1, OWN, 7)];
    let changes: [fn(&mut Wanted); 4] = [
        |wanted| wanted.name = "other".into(),
        |wanted| wanted.wg_port = 1,
        |wanted| wanted.advertised.as_mut().unwrap().address = [192, 0, 2, 99].into(),
        |wanted| wanted.advertised.as_mut().unwrap().name = Some("a.example".into()),
    ];
    for change in changes {
        let mut wanted = fixed(1, OWN);
        change(&mut wanted);
        let step = decided(&wanted, there());
        assert_eq!(write_of(&step), Some((OWN.into(), Expected::Revision(7))), "{wanted:?}");
    }
}

#[test]
fn what_an_ikto_agent_wrote_for_this_node_gets_a_signature() {
    let step = decided(&fixed(1, OWN), vec![unsigned(1, OWN, 7)]);
    assert_eq!(write_of(&step), Some((OWN.into(), Expected::Revision(7))));
}

#[test]
fn a_signature_for_another_bucket_is_none() {
    let other = Wanted { bucket: "other".into(), ..fixed(1, OWN) };
    let step = decided(&other, vec![entry(1, OWN, 7)]);
    assert_eq!(write_of(&step), Some((OWN.into(), Expected::Revision(7))));
}

#[test]
fn as_long_as_the_own_endpoint_is_not_known_a_record_stays_and_none_is_written() {
    let unknown = Wanted { advertised: None, ..fixed(1, OWN) };
    assert_eq!(decided(&unknown, vec![]), Step::NotKnown { own: cidr(OWN) });
    let stands = Step::Stands { own: cidr(OWN), revision: 7 };
    assert_eq!(decided(&unknown, vec![entry(1, OWN, 7)]), stands);
    let renamed = Wanted { name: "other".into(), ..unknown };
    let Step::Write { member, .. } = decided(&renamed, vec![entry(1, OWN, 7)]) else { panic!() };
    assert_eq!((&*member.name, &*member.advertise_address), ("other", "192.0.2.1"));
}

#[test]
fn a_fixed_address_is_taken_by_whoever_has_it_or_a_part_of_it() {
    let cases = [
        entry(2, OWN, 3),
        unsigned(2, OWN, 3),
        entry(2, "fd10:aaaa:1::7/48", 3), // other host bits: another key, and the same prefix
        entry(2, "fd10:aaaa:1::1/128", 3),
        entry(2, "fd10:aaaa::/32", 3),
    ];
    for there in cases {
        let by = Taker { key: there.key.clone(), public_key: Some(key(2).public()) };
        let taken = Step::Taken { range: cidr(OWN), by };
        assert_eq!(decided(&fixed(1, OWN), vec![there.clone()]), taken, "{there:?}");
    }
}

#[test]
fn what_cannot_be_read_is_not_written_over() {
    for value in ["", "{}", "private_cidr"] {
        let there = Entry { key: key_of(&cidr(OWN)), value: value.into(), revision: 3 };
        let by = Taker { key: there.key.clone(), public_key: None };
        let taken = Step::Taken { range: cidr(OWN), by };
        assert_eq!(decided(&fixed(1, OWN), vec![there]), taken, "{value:?}");
    }
}

#[test]
fn records_that_do_not_count_take_no_prefix_but_their_own_key() {
    // Outside of the mesh, and everything there is.
    for range in ["fd11::/16", "::/0"] {
        let step = decided(&fixed(1, OWN), vec![entry(2, range, 3)]);
        assert_eq!(write_of(&step), Some((OWN.into(), Expected::Absent)), "{range}");
    }
}

#[test]
fn from_the_key_the_first_free_candidate_is_taken() {
    let wanted = wanted(1, AddressFrom::Key);
    let [first, second, third] = [0, 1, 2].map(|index| candidate(1, index));
    let absent = |own: &String| Some((own.clone(), Expected::Absent));
    assert_eq!(write_of(&decided(&wanted, vec![])), absent(&first));
    assert_eq!(write_of(&decided(&wanted, vec![entry(2, &first, 1)])), absent(&second));
    let both = vec![entry(2, &first, 1), unsigned(3, &second, 2)];
    assert_eq!(write_of(&decided(&wanted, both)), absent(&third));
}

#[test]
fn an_address_once_taken_stays_even_if_a_better_one_is_free() {
    let wanted = wanted(1, AddressFrom::Key);
    let second = candidate(1, 1);
    // It has its record there.
    let stands = Step::Stands { own: cidr(&second), revision: 4 };
    assert_eq!(decided(&wanted, vec![entry(1, &second, 4)]), stands);
    // Or it knows that it had.
    let step = with(&wanted, vec![], Some(cidr(&second)), &BTreeSet::new());
    assert_eq!(write_of(&step), Some((second, Expected::Absent)));
}

#[test]
fn an_address_that_does_not_follow_from_the_key_is_not_held() {
    let wanted = wanted(1, AddressFrom::Key);
    let step = with(&wanted, vec![], Some(cidr("fd10::77/128")), &BTreeSet::new());
    assert_eq!(write_of(&step), Some((candidate(1, 0), Expected::Absent)));
}

#[test]
fn whoever_wrote_later_gives_its_record_up() {
    let first = candidate(1, 0);
    let there = || {
        vec![entry(2, &format!("{}/64", first.trim_end_matches("/128")), 3), entry(1, &first, 4)]
    };
    let lost = Step::Delete { key: key_of(&cidr(&first)), revision: 4, why: Why::Lost };
    assert_eq!(decided(&wanted(1, AddressFrom::Key), there()), lost);
    assert_eq!(decided(&fixed(1, &first), there()), lost);
    // Where that is not permitted, there is still the next address.
    let undeletable = BTreeSet::from([key_of(&cidr(&first))]);
    let step = with(&wanted(1, AddressFrom::Key), there(), None, &undeletable);
    assert!(write_of(&step).is_none_or(|(own, _)| own != first), "{step:?}");
}

#[test]
fn whoever_wrote_earlier_stays() {
    let there = vec![entry(1, OWN, 3), entry(2, "fd10:aaaa:1::7/48", 4)];
    assert_eq!(decided(&fixed(1, OWN), there), Step::Stands { own: cidr(OWN), revision: 3 });
}

#[test]
fn own_records_under_other_keys_are_deleted_once_the_own_one_stands() {
    let (old, new) = ("fd10:aaaa:1::/48", "fd10:bbbb:2::/48");
    let step = decided(&fixed(1, new), vec![entry(1, old, 3)]);
    assert_eq!(write_of(&step), Some((new.into(), Expected::Absent)), "first the new one");
    let there = || vec![entry(1, old, 3), entry(1, new, 4)];
    let stale = Step::Delete { key: key_of(&cidr(old)), revision: 3, why: Why::Stale };
    assert_eq!(decided(&fixed(1, new), there()), stale);
    let undeletable = BTreeSet::from([key_of(&cidr(old))]);
    let step = with(&fixed(1, new), there(), None, &undeletable);
    assert_eq!(step, Step::Stands { own: cidr(new), revision: 4 });
}

#[test]
fn the_addresses_of_those_who_may_come_back_are_left_to_them() {
    let wanted = wanted(1, AddressFrom::Key);
    let (members, carried) = (members(1, vec![]), members(1, vec![entry(2, &candidate(1, 0), 9)]));
    let none = BTreeSet::new();
    let known = |held| Known {
        members: &members,
        carried: Some(&carried),
        held,
        undeletable: &none,
        verified: None,
    };
    let step = decide(&wanted, &known(None)).unwrap();
    assert_eq!(write_of(&step), Some((candidate(1, 1), Expected::Absent)));
    // But not where nothing else is left.
    let small = Wanted { mesh: cidr("fd10::/126"), ..wanted };
    let carried = vec![entry(2, "fd10::1/128", 8), entry(3, "fd10::2/128", 9)];
    let carried = self::members(1, carried);
    let known = Known { carried: Some(&carried), ..known(None) };
    assert!(write_of(&decide(&small, &known).unwrap()).is_some());
}

/// Two host bits make two addresses.
#[test]
fn in_a_mesh_that_is_full_nothing_can_be_done() {
    let wanted = Wanted { mesh: cidr("fd10::/126"), ..wanted(1, AddressFrom::Key) };
    let there = vec![entry(2, "fd10::1/128", 1), entry(3, "fd10::2/128", 2)];
    assert!(matches!(decided(&wanted, there), Step::Taken { .. }));
}
