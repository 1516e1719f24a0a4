//! What one record has to be.

use latchkey_wire::member::{Extension, Member, SignaturePolicy, key_of};

use super::world::{self, Node, rules};
use super::*;

const HOME: &str = "fd10:aaaa:1::7/48";

fn base() -> Member {
    A.at(HOME).member()
}

/// The one peer there is, or why there is none.
fn judged(rules: Rules, entry: Entry) -> Result<MemberPeer, String> {
    let mut members = Members::new(rules);
    members.put(entry);
    match members.problems().pop() {
        Some(problem) => Err(problem.reason),
        None => Ok(members.peers().values().next().unwrap().clone()),
    }
}

fn strictly(member: &Member) -> Result<MemberPeer, String> {
    judged(rules(), world::entry(member, 1))
}

#[test]
fn endpoints_are_addresses_or_names_or_none() {
    let address = |text: &str| Some(Endpoint::Address(text.parse().unwrap()));
    let name = |host: &str| Some(Endpoint::Name { host: host.into(), port: 51820 });
    let named =
        |name: &str| Some(Extension { advertise_name: Some(name.into()), ..Extension::default() });
    let cases = [
        ("10.99.1.2", None, 51820, address("10.99.1.2:51820")),
        ("2001:db8::5", None, 51820, address("[2001:db8::5]:51820")),
        ("2001:DB8:0::5", None, 51820, address("[2001:db8::5]:51820")),
        ("::ffff:10.99.1.2", None, 51820, address("10.99.1.2:51820")),
        ("127.0.0.1", None, 1, address("127.0.0.1:1")),
        ("node.example.org", None, 51820, name("node.example.org")),
        ("node.example.org.", None, 51820, name("node.example.org.")),
        ("NODE-1", None, 51820, name("NODE-1")),
        ("a_b.local", None, 51820, name("a_b.local")),
        ("10.99.1.2", named("node.example.org"), 51820, name("node.example.org")),
        ("10.99.1.2", None, 0, None),
        ("node.example.org", None, 0, None),
        ("10.99.1.2", named("node.example.org"), 0, None),
    ];
    for (advertise_address, extension, wg_port, endpoint) in cases {
        let member =
            Member { advertise_address: advertise_address.into(), extension, wg_port, ..base() };
        let peer = strictly(&member).unwrap();
        assert_eq!(peer.endpoint, endpoint, "{member:?}");
        assert_eq!((peer.advertise_address.as_str(), peer.wg_port), (advertise_address, wg_port));
    }
}

#[test]
fn what_is_no_endpoint_is_a_problem() {
    let label = "a".repeat(64);
    for (advertise_address, reason) in [
        ("", "neither"),
        ("fe80::1%eth0", "neither"),
        ("[2001:db8::5]", "neither"),
        ("10.99.1.2:51820", "neither"),
        ("10.99.1", "neither"),
        ("010.99.1.2", "neither"),
        ("0x0a630102", "neither"),
        ("3232235777", "neither"),
        ("a b", "neither"),
        ("a..b", "neither"),
        (".", "neither"),
        ("-a.b", "neither"),
        ("a/b", "neither"),
        ("a\u{1b}[2J", "neither"),
        ("ä.example.org", "neither"),
        (&label, "neither"),
        ("0.0.0.0", "nobody"),
        ("::", "nobody"),
        ("::ffff:0.0.0.0", "nobody"),
        ("224.0.0.1", "nobody"),
        ("ff02::1", "nobody"),
        ("255.255.255.255", "nobody"),
        ("fd10:aaaa:1::9", "in its own fd10:aaaa:1::/48"),
    ] {
        let member = Member { advertise_address: advertise_address.into(), ..base() };
        let refused = strictly(&member).expect_err(advertise_address);
        assert!(refused.contains(reason), "{advertise_address:?}: {refused}");
        assert!(!refused.contains('\u{1b}'), "{refused}");
    }
    let elsewhere_in_the_mesh = Member { advertise_address: "fd10:ffff::1".into(), ..base() };
    assert!(strictly(&elsewhere_in_the_mesh).is_ok());
    let extension = Extension { advertise_name: Some("a b".into()), ..Extension::default() };
    let refused = strictly(&Member { extension: Some(extension), ..base() }).unwrap_err();
    assert!(refused.contains("no DNS name"), "{refused}");
}

#[test]
fn a_record_stands_in_the_mesh_and_under_its_own_key() {
    let lax = || Rules { strict: false, ..rules() };
    for (allowed_ip, reason) in [
        ("fd11::/48", "not in the mesh"),
        ("fd00::/8", "not in the mesh"),
        ("10.0.0.0/24", "not in the mesh"),
        ("2000::/3", "not in the mesh"),
    ] {
        let entry = A.at(allowed_ip).entry(1);
        let refused = judged(rules(), entry.clone()).expect_err(allowed_ip);
        assert!(refused.contains(reason), "{allowed_ip}: {refused}");
        assert_eq!(judged(lax(), entry).unwrap().allowed_ips, [cidr(allowed_ip).masked()].into());
    }
    for everything in ["::/0", "fd10::/0", "0.0.0.0/0"] {
        for rules in [rules(), lax()] {
            let refused = judged(rules, A.at(everything).entry(1)).expect_err(everything);
            assert!(refused.contains("everything there is"), "{refused}");
        }
    }
    let good = A.at(HOME).entry(1);
    assert!(judged(rules(), good.clone()).is_ok());
    // Masked, with another length, of another's prefix, none at all.
    for key in [
        key_of(&cidr("fd10:aaaa:1::/48")),
        key_of(&cidr("fd10:aaaa:1::7/64")),
        key_of(&cidr("fd10:bbbb:1::/48")),
        "peers.x".into(),
        String::new(),
    ] {
        let entry = Entry { key, ..good.clone() };
        let refused = judged(rules(), entry.clone()).unwrap_err();
        assert!(refused.contains("another key"), "{refused}");
        assert!(judged(lax(), entry).is_ok());
    }
    // In capitals, under the key of the form that it has for all.
    let value = String::from_utf8(good.value.to_vec()).unwrap().replace("fd10:", "FD10:");
    let entry = Entry { value: value.into(), ..good };
    assert!(judged(rules(), entry).is_ok());
}

#[test]
fn an_ipv4_mesh_is_as_good() {
    let rules = Rules { mesh: cidr("10.64.0.0/12"), ..rules() };
    let peer = judged(rules.clone(), A.at("10.70.172.9/24").entry(1)).unwrap();
    assert_eq!(peer.allowed_ips, [cidr("10.70.172.0/24")].into());
    for (allowed_ip, advertise_address) in [
        ("10.63.0.0/24", "10.99.1.2"),
        ("fd10::/48", "10.99.1.2"),
        ("10.70.172.0/24", "10.70.172.1"),
    ] {
        let member =
            Member { advertise_address: advertise_address.into(), ..A.at(allowed_ip).member() };
        assert!(judged(rules.clone(), world::entry(&member, 1)).is_err(), "{allowed_ip}");
    }
}

#[test]
fn signatures_by_policy() {
    let signed = A.at(HOME).signed_entry(1);
    let text = String::from_utf8(signed.value.to_vec()).unwrap();
    let forged = Entry { value: text.replace("node-1", "node-2").into(), ..signed.clone() };
    let unsigned = A.at(HOME).entry(1);
    use SignaturePolicy::{Ignore, Prefer, Require};
    for (policy, entry, expected) in [
        (Require, &signed, Ok(true)),
        (Require, &unsigned, Err("not signed")),
        (Require, &forged, Err("signature is not one")),
        (Prefer, &signed, Ok(true)),
        (Prefer, &unsigned, Ok(false)),
        (Prefer, &forged, Err("signature is not one")),
        (Ignore, &signed, Ok(false)),
        (Ignore, &unsigned, Ok(false)),
        (Ignore, &forged, Ok(false)),
    ] {
        let rules = Rules { signatures: policy, ..rules() };
        match (judged(rules, entry.clone()), expected) {
            (Ok(peer), Ok(signed)) => assert_eq!(peer.signed, signed, "{policy:?}"),
            (Err(reason), Err(expected)) => assert!(reason.contains(expected), "{reason}"),
            (judged, expected) => panic!("{policy:?}: {judged:?}, not {expected:?}"),
        }
    }
    // Another bucket's.
    let rules = Rules { bucket: "other".into(), ..rules() };
    assert!(judged(rules, signed).is_err());
}

/// A signature made for one key is worth nothing under another, also where keys are not looked at.
#[test]
fn a_signed_record_cannot_be_copied() {
    let signed = A.at(HOME).signed_entry(1);
    let rules = Rules { strict: false, ..rules() };
    let copied = Entry { key: "peers.copy".into(), ..signed };
    assert!(judged(rules, copied).unwrap_err().contains("copied it from elsewhere"));
}

#[test]
fn capabilities_come_through() {
    let extension = Extension { capabilities: vec!["attest.v1".into()], ..Extension::default() };
    let member = Member { extension: Some(extension), ..base() };
    assert_eq!(strictly(&member).unwrap().capabilities, ["attest.v1"]);
    assert_eq!(strictly(&base()).unwrap().capabilities, [""; 0]);
}

/// One that cannot be read stands alone with that.
#[test]
fn a_bad_record_stops_no_other() {
    let mut members = Members::new(rules());
    let bad = ["", "null", "{}", "[", "{\"public_key\":7}", "\u{0}"];
    let mut entries: Vec<Entry> = bad
        .iter()
        .zip(10..)
        .map(|(value, revision)| Entry {
            key: format!("peers.{revision}"),
            value: (*value).into(),
            revision,
        })
        .collect();
    entries.push(A.at(HOME).entry(1));
    entries.push(Node(2).at("fd10:bbbb:1::/48").entry(2));
    members.replace(entries);
    assert_eq!(members.peers().len(), 2);
    assert_eq!(members.problems().len(), bad.len());
}
