use std::path::Path;

use latchkey_config::Local;

use super::*;

fn settings(mesh: &str) -> Settings {
    let text = format!("#cloud-config\nlatchkey: {{mesh: {{network: fleet-a, {mesh}}}}}\n");
    let local = Local::of_bytes(vec![("/oem/90.yaml".into(), text.into())], "").unwrap();
    from_cloud_config(&local.membership().unwrap().unwrap()).unwrap()
}

#[test]
fn a_network_and_a_prefix_are_enough() {
    let settings = settings("prefix: 'fd10::/16'");
    assert_eq!(settings.name, host_name());
    assert!(!settings.name.is_empty());
    assert_eq!(
        Settings { name: String::new(), ..settings },
        Settings {
            name: String::new(),
            mesh: "fd10::/16".parse().unwrap(),
            address: AddressFrom::Key,
            key: KeyFrom::HandOver { network: "fleet-a".into() },
            advertise: Advertise::Route,
            interface: "wg-latchkey".into(),
            port: 51820,
            keepalive: Keepalive::Auto,
            mtu: None,
            registry: None,
            signatures: SignaturePolicy::Prefer,
            strict_records: true,
            metrics: None,
            cache: "/var/lib/latchkey/mesh-fleet-a.json".into(),
            socket: "/run/latchkey/agent/admin.sock".into(),
        }
    );
}

#[test]
fn everything_that_is_configured_arrives() {
    let settings = settings(
        "prefix: 10.64.0.0/10, name: node-17, port: 51821, interface: wg-fleet, keepalive: 15, mtu: 1380, \
         signatures: require, metrics: '127.0.0.1:9586', advertise_interface: eth1, \
         registry: 'tls://edge:s%40crat@nats.example.org', bucket: fleet-a, registry_ca: /oem/ca.pem",
    );
    assert_eq!((settings.name.as_str(), settings.port), ("node-17", 51821));
    assert_eq!((settings.interface.as_str(), settings.mtu), ("wg-fleet", Some(1380)));
    assert_eq!(settings.keepalive, Keepalive::Every(15));
    assert_eq!(settings.signatures, SignaturePolicy::Require);
    assert_eq!(settings.metrics, Some("127.0.0.1:9586".parse().unwrap()));
    assert_eq!(settings.advertise, Advertise::Interface("eth1".into()));
    let shown = format!("{settings:?}");
    assert!(!shown.contains("crat"), "{shown}");
    let registry = settings.registry.unwrap();
    assert_eq!(registry.servers[0].to_string(), "tls://nats.example.org:4222");
    assert_eq!(registry.bucket, "fleet-a");
    assert_eq!(
        registry.login,
        Login::Password { user: "edge".into(), password: Secret::new("s@crat") }
    );
    assert_eq!(registry.tls.ca, Some(Pem::File(Path::new("/oem/ca.pem").into())));
}
