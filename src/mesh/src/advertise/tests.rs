use std::process::Command;

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
    from_cloud_config(&local.membership().unwrap().unwrap()).unwrap()
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

/// Whether this is the test in a network of its own; if not, it is run there.
fn in_a_network_of_its_own(test: &str) -> bool {
    const MARK: &str = "LATCHKEY_TEST_NETWORK";
    if std::env::var_os(MARK).is_some() {
        return true;
    }
    let is_root = nix::unistd::geteuid().is_root();
    let status = Command::new("unshare")
        .args(["--net", "--mount", "--fork", "--kill-child"])
        .args(if is_root { [].as_slice() } else { &["--map-root-user"] })
        .arg("--")
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(MARK, "1")
        .status()
        .unwrap();
    assert!(status.success(), "{test}, in a network of its own");
    false
}

fn run_line(line: &str) {
    let mut words = line.split(' ');
    let status = Command::new(words.next().unwrap()).args(words).status().unwrap();
    assert!(status.success(), "{line}");
}

/// Two ways out, the second of them the default one; a third is the mesh's own.
#[test]
fn the_kernels_routes_and_the_names_of_the_host_are_asked() {
    let test = "advertise::tests::the_kernels_routes_and_the_names_of_the_host_are_asked";
    if !in_a_network_of_its_own(test) {
        return;
    }
    for line in [
        "ip link set lo up",
        "ip link add near type veth peer name far",
        "ip link add wan type veth peer name away",
        "ip link add wg-latchkey type veth peer name within",
        "ip address add 192.0.2.7/24 dev near",
        "ip address add fd00::7/64 dev near nodad",
        "ip address add 198.51.100.7/24 dev wan",
        "ip address add fd10:a::7/16 dev wg-latchkey nodad",
    ] {
        run_line(line);
    }
    for link in ["near", "far", "wan", "away", "wg-latchkey", "within"] {
        run_line(&format!("ip link set {link} up"));
    }
    run_line("ip route add default via 198.51.100.1 dev wan");
    let hosts = tempfile::NamedTempFile::new().unwrap();
    let names = "127.0.0.1 localhost\n203.0.113.7 node.test\nfd00::7 node.test\n203.0.113.8 nat.test\n192.0.2.9 nats.test\n";
    std::fs::write(hosts.path(), names).unwrap();
    run_line(&format!("mount --bind {} /etc/hosts", hosts.path().display()));

    // No name server but one on this host, which is not there: it says so at once.
    let resolver = tempfile::NamedTempFile::new().unwrap();
    run_line(&format!("mount --bind {} /etc/resolv.conf", resolver.path().display()));

    let to = |mesh: &str, known: Option<&str>| {
        let known = known.map(|known| Advertised { address: ip(known), name: None });
        let settings = settings(&format!("prefix: 'fd10::/16', {mesh}"));
        run(resolve(&settings, known.as_ref())).map(|advertised| advertised.address)
    };
    for (mesh, known, expected) in [
        // Towards the registry, by address or by name.
        ("registry: nats://192.0.2.9", None, "192.0.2.7"),
        ("registry: nats://nats.test", None, "192.0.2.7"),
        ("registry: 'nats://[fd00::9]'", None, "fd00::7"),
        ("registry: nats://203.0.113.1", None, "198.51.100.7"),
        // Several lead out by several ways: the first, or the one that it was.
        ("registry: [nats://203.0.113.1, nats://192.0.2.9]", None, "198.51.100.7"),
        ("registry: [nats://203.0.113.1, nats://192.0.2.9]", Some("192.0.2.7"), "192.0.2.7"),
        ("registry: [nats://203.0.113.1, nats://192.0.2.9]", Some("192.0.2.8"), "198.51.100.7"),
        // Nothing can be said of a way to this host, through the mesh, or to nobody knows where.
        ("registry: nats://127.0.0.1", None, "198.51.100.7"),
        ("registry: 'nats://[fd10:b::1]'", None, "198.51.100.7"),
        ("registry: nats://nats.invalid", None, "198.51.100.7"),
        ("registry: nats://nats.invalid", Some("192.0.2.7"), "192.0.2.7"),
        ("registry: nats://nats.invalid", Some("192.0.2.8"), "198.51.100.7"),
        ("port: 1", None, "198.51.100.7"),
        ("advertise_interface: near", None, "192.0.2.7"),
        ("advertise_interface: wan", None, "198.51.100.7"),
        // Of a name's addresses the own one; where none is, a NAT's.
        ("advertise_address: node.test", None, "fd00::7"),
        ("advertise_address: node.test", Some("203.0.113.7"), "203.0.113.7"),
        ("advertise_address: nat.test", None, "203.0.113.8"),
    ] {
        assert_eq!(to(mesh, known).unwrap(), ip(expected), "{mesh} {known:?}");
    }
    // The mesh's own device is no way.
    run_line("ip route replace default dev wg-latchkey");
    run_line("ip address flush dev wan");
    let lost = to("port: 1", None).unwrap_err();
    assert!(
        matches!(&lost, Error::Advertise { reason } if reason.contains("no default route")),
        "{lost}"
    );
}
