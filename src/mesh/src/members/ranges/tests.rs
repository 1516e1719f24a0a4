use proptest::prelude::*;

use super::*;

fn cidr(text: &str) -> Cidr {
    text.parse().unwrap()
}

#[test]
fn around_and_within() {
    let mut ranges: Ranges<u8> = Ranges::default();
    let all =
        ["fd10::/16", "fd10:a::/32", "fd10:a:b::/48", "fd10:c::/32", "0.0.0.0/0", "10.0.0.0/8"];
    for (text, number) in all.iter().zip(0..) {
        *ranges.entry(cidr(text)) = number;
    }
    let texts = |found: Vec<(Cidr, &u8)>| -> Vec<String> {
        found.into_iter().map(|(range, _)| range.to_string()).collect()
    };
    let covering = |text| texts(ranges.covering(&cidr(text)).collect());
    let within = |text| texts(ranges.within(&cidr(text)).collect());
    assert_eq!(covering("fd10:a:b::/48"), ["fd10::/16", "fd10:a::/32", "fd10:a:b::/48"]);
    assert_eq!(covering("fd10:a:b:c::/64"), ["fd10::/16", "fd10:a::/32", "fd10:a:b::/48"]);
    assert_eq!(covering("::/0"), [""; 0]);
    assert_eq!(covering("10.1.0.0/16"), ["0.0.0.0/0", "10.0.0.0/8"]);
    assert_eq!(within("fd10:a::/32"), ["fd10:a::/32", "fd10:a:b::/48"]);
    assert_eq!(within("fd10::/15"), ["fd10::/16", "fd10:a::/32", "fd10:a:b::/48", "fd10:c::/32"]);
    assert_eq!(within("::/0").len(), 4);
    assert_eq!(within("fd11::/16"), [""; 0]);
    ranges.remove(&cidr("fd10::/16"));
    ranges.remove(&cidr("fd10::/16"));
    assert_eq!(
        texts(ranges.covering(&cidr("fd10:a:b::/48")).collect()),
        ["fd10:a::/32", "fd10:a:b::/48"]
    );
    *ranges.entry(cidr("fd10:a::/32")) += 7;
    assert_eq!(ranges.within(&cidr("fd10:a::/32")).next(), Some((cidr("fd10:a::/32"), &8)));
}

/// Few bits, so that they meet.
fn any_range() -> impl Strategy<Value = Cidr> {
    let v4 = (0..256u32, 0..=8u8)
        .prop_map(|(bits, length)| Cidr::new(IpAddr::from((bits << 24).to_be_bytes()), length));
    let v6 = (0..256u128, 0..=8u8)
        .prop_map(|(bits, length)| Cidr::new(IpAddr::from((bits << 120).to_be_bytes()), length));
    prop_oneof![v4, v6].prop_map(|range| range.unwrap().masked())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn as_looking_at_each(
        put in prop::collection::vec(any_range(), 0..40),
        removed in prop::collection::vec(any_range(), 0..20),
        asked in any_range(),
    ) {
        let mut ranges: Ranges<usize> = Ranges::default();
        let mut plain = std::collections::BTreeMap::new();
        for (number, range) in put.iter().enumerate() {
            *ranges.entry(*range) = number;
            plain.insert(*range, number);
        }
        for range in &removed {
            ranges.remove(range);
            plain.remove(range);
        }
        let mut covering: Vec<_> =
            plain.iter().filter(|(range, _)| range.covers(&asked)).map(|(r, v)| (*r, v)).collect();
        covering.sort_by_key(|(range, _)| range.length());
        let within: Vec<_> =
            plain.iter().filter(|(range, _)| asked.covers(range)).map(|(r, v)| (*r, v)).collect();
        prop_assert_eq!(ranges.covering(&asked).collect::<Vec<_>>(), covering);
        prop_assert_eq!(ranges.within(&asked).collect::<Vec<_>>(), within);
    }
}
