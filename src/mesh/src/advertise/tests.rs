use super::*;
use crate::settings::from_cloud_config;

fn ips(texts: &[&str]) -> Vec<IpAddr> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn settings(mesh: &str) -> Settings {
    let text = format!("#cloud-config\nlatchkey: {{mesh: {{network: n, {mesh}}}}}\n");
    let local =
        latchkey_config::Local::of_bytes(vec![("/oem/90.yaml".into(), text.into())], "").unwrap();
    from_cloud_config(&local.mesh().unwrap().unwrap()).unwrap()
}

fn run<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

#[test]
fn an_address_that_is_not_ones_own_is_a_nats() {
    for (advertised, is_own, peers, nat) in [
        // Public and on an interface: reached as it is.
        ("192.0.2.7", true, &[][..], false),
        ("192.0.2.7", true, &["198.51.100.1", "10.0.0.1"], false),
        // A router's, which forwards the port.
        ("192.0.2.7", false, &[], true),
        ("192.0.2.7", false, &["10.0.0.1"], true),
        // All in one private network: nothing is in between.
        ("10.0.0.7", true, &[], false),
        ("10.0.0.7", true, &["10.0.0.8", "192.168.1.9", "100.64.0.1", "169.254.1.1"], false),
        // Some are in the Internet, and this one is not.
        ("10.0.0.7", true, &["10.0.0.8", "198.51.100.1"], true),
        ("172.31.255.255", true, &["198.51.100.1"], true),
        ("172.32.0.0", true, &["198.51.100.1"], false),
        ("100.64.0.1", true, &["198.51.100.1"], true),
        ("100.127.255.255", true, &["198.51.100.1"], true),
        ("100.128.0.0", true, &["198.51.100.1"], false),
        ("169.254.7.7", true, &["198.51.100.1"], true),
        // Another family says nothing of this one's way.
        ("10.0.0.7", true, &["2001:db8::1"], false),
        ("fd00::7", true, &["198.51.100.1"], false),
        ("fd00::7", true, &["fd00::8"], false),
        ("fd00::7", true, &["2001:db8::1"], true),
        ("2001:db8::7", true, &["2001:db8::1", "fd00::8"], false),
        // What nobody reaches is no public address.
        ("10.0.0.7", true, &["127.0.0.1", "0.0.0.0", "224.0.0.1", "255.255.255.255"], false),
    ] {
        assert_eq!(
            behind_nat(ip(advertised), is_own, ips(peers)),
            nat,
            "{advertised} {is_own} {peers:?}"
        );
    }
}

#[test]
fn keepalive_is_as_told_or_for_a_nat() {
    for (setting, behind_nat, seconds) in [
        (Keepalive::Auto, false, 0),
        (Keepalive::Auto, true, 25),
        (Keepalive::Off, true, 0),
        (Keepalive::Every(7), false, 7),
        (Keepalive::Every(7), true, 7),
    ] {
        assert_eq!(keepalive(setting, behind_nat), seconds, "{setting:?} {behind_nat}");
    }
}

#[test]
fn the_known_address_stays_while_it_is_one_of_the_right_ones() {
    let mesh = "fd10::/16".parse().unwrap();
    for (found, known, chosen) in [
        (&["192.0.2.7", "192.0.2.8"][..], None, Some("192.0.2.7")),
        (&["192.0.2.7", "192.0.2.8"], Some("192.0.2.8"), Some("192.0.2.8")),
        (&["192.0.2.7", "192.0.2.8"], Some("192.0.2.9"), Some("192.0.2.7")),
        (&[], Some("192.0.2.9"), None),
        // Neither the mesh's own addresses nor what nobody reaches.
        (&["fd10:1::1", "127.0.0.1", "::1", "fe80::1", "0.0.0.0", "ff02::1"], None, None),
        (&["fd10:1::1", "2001:db8::1"], Some("fd10:1::1"), Some("2001:db8::1")),
    ] {
        assert_eq!(choose(ips(found), &mesh, known.map(ip)), chosen.map(ip), "{found:?} {known:?}");
    }
}

#[test]
fn of_a_names_addresses_the_own_ones_come_first_and_the_order_is_always_the_same() {
    let own = ["2001:db8::7", "10.0.0.7"].map(ip);
    let sorted = ips(&["10.0.0.7", "2001:db8::7", "192.0.2.1", "192.0.2.2", "2001:db8::1"]);
    let mut turned = sorted.clone();
    for _ in 0..sorted.len() {
        turned.rotate_left(1);
        assert_eq!(own_first(turned.clone(), |address| own.contains(&address)), sorted);
    }
}

#[test]
fn what_is_configured_as_an_address_is_advertised() {
    let settings = settings("prefix: 'fd10::/16', advertise_address: 192.0.2.7");
    let known = Advertised { address: ip("192.0.2.8"), name: None };
    let expected = Advertised { address: ip("192.0.2.7"), name: None };
    assert_eq!(run(resolve(&settings, Some(&known))).unwrap(), expected);
}

/// Reserved for this (RFC 6761 §6.4): it does not exist, whoever is asked.
#[test]
fn a_name_that_leads_nowhere_is_an_error_that_names_it() {
    let mut settings = settings("prefix: 'fd10::/16', advertise_address: node.invalid");
    let error = run(resolve(&settings, None)).unwrap_err();
    assert!(
        matches!(&error, Error::Advertise { reason } if reason.contains("node.invalid")),
        "{error}"
    );
    // Through /etc/hosts, as everywhere.
    settings.advertise = Advertise::Name("localhost".into());
    let error = run(resolve(&settings, None)).unwrap_err();
    assert!(error.to_string().contains("nobody reaches this node by that"), "{error}");
}

#[test]
fn an_interface_without_a_global_address_is_an_error_that_names_it() {
    for interface in ["lo", "latchkey-none"] {
        let settings = settings(&format!("prefix: 'fd10::/16', advertise_interface: {interface}"));
        let error = run(resolve(&settings, None)).unwrap_err();
        assert!(error.to_string().contains(interface), "{error}");
    }
}
