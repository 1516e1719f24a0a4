use std::time::Duration;

use latchkey_config::Local;

use super::text::{ago, short_ago};
use super::*;
use crate::error::Error;
use crate::handover::HandOver;
use crate::settings::from_cloud_config;
use crate::terminal::printable;
use crate::view::{RegistryState, View};

pub(super) const NOW: u64 = 1_700_000_000;

pub(super) fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(NOW)
}

pub(super) fn up() -> Status {
    Status {
        version: VERSION,
        network: Some("fleet-a".into()),
        prefix: "fd10::/16".into(),
        interface: "wg-latchkey".into(),
        device: Some(DeviceStatus {
            public_key: Some("hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=".into()),
            addresses: vec!["fd10::7/16".into()],
            listen_port: 51820,
            mtu: 1420,
            up: true,
            backend: "kernel",
        }),
        device_error: None,
        identity: Some(IdentityStatus::Taken {
            public_key: "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=".into(),
            network: "fleet-a".into(),
            volume: "uuid".into(),
            taken_at_ms: 4_021,
        }),
        boot: Some(BootStatus { outcome: Outcome::Unlocked, mode: Mode::Offline, reason: None }),
        agent: None,
        agent_error: None,
        peers: vec![],
    }
}

fn without_mesh() -> Status {
    Status {
        device: None,
        identity: Some(IdentityStatus::Missing { reason: "opened by hand".into() }),
        boot: Some(BootStatus {
            outcome: Outcome::Recovery,
            mode: Mode::Online,
            reason: Some("quarantined".into()),
        }),
        ..up()
    }
}

pub(super) fn peer() -> PeerStatus {
    PeerStatus {
        public_key: "WzPYRHCzki0WlvHTleeBt8ig6hXKZ9N5PXpt/DxIIkE=".into(),
        endpoint: Some("[2001:db8::1]:51820".into()),
        allowed_ips: vec!["fd10::8/128".into(), "10.0.0.0/24".into()],
        latest_handshake: Some(NOW - 3723),
        received_bytes: 1240,
        sent_bytes: 3 << 20,
        persistent_keepalive: 25,
        on_device: true,
        roamed: None,
        member: None,
    }
}

#[test]
fn a_node_that_is_up() {
    assert!(up().is_up());
    assert_eq!(
        up().to_text(Detail::Brief, now()),
        "\
interface: wg-latchkey
  network: fleet-a
  public key: hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=
  private key: (hidden)
  address: fd10::7/16
  listening port: 51820
  mtu: 1420
  state: up
  identity: taken 4.021 s after the kernel started; no copy is left
  boot: unlocked by the TPM

peers: none
"
    );
}

#[test]
fn a_node_without_identity() {
    assert!(!without_mesh().is_up());
    assert_eq!(
        without_mesh().to_text(Detail::Brief, now()),
        "\
interface: wg-latchkey
  network: fleet-a
  device: none
  identity: none: opened by hand
  boot: unlocked with the recovery passphrase (quarantined)

peers: none
"
    );
}

#[test]
fn peers_look_as_wg_shows_them() {
    let silent = PeerStatus {
        endpoint: None,
        allowed_ips: vec![],
        latest_handshake: None,
        received_bytes: 0,
        sent_bytes: 0,
        persistent_keepalive: 0,
        ..peer()
    };
    let text = Status { peers: vec![peer(), silent], ..up() }.to_text(Detail::Full, now());
    assert!(
        text.ends_with(
            "
peer: WzPYRHCzki0WlvHTleeBt8ig6hXKZ9N5PXpt/DxIIkE=
  endpoint: [2001:db8::1]:51820
  allowed ips: fd10::8/128, 10.0.0.0/24
  latest handshake: 1 hour, 2 minutes, 3 seconds ago
  transfer: 1.21 KiB received, 3.00 MiB sent
  persistent keepalive: every 25 seconds

peer: WzPYRHCzki0WlvHTleeBt8ig6hXKZ9N5PXpt/DxIIkE=
  allowed ips: (none)
"
        ),
        "{text}"
    );
}

#[test]
fn a_device_that_is_down_or_has_no_key_is_not_up() {
    let with = |change: fn(&mut DeviceStatus)| {
        let mut status = up();
        status.device.iter_mut().for_each(change);
        status
    };
    assert!(!with(|device| device.up = false).is_up());
    assert!(
        with(|device| device.up = false).to_text(Detail::Brief, now()).contains("  state: down\n")
    );
    let keyless = with(|device| device.public_key = None);
    assert!(!keyless.is_up());
    assert!(!keyless.to_text(Detail::Brief, now()).contains("key:"));
}

/// Scripts rely on these names.
#[test]
fn json_has_the_same() {
    let json: serde_json::Value =
        serde_json::from_str(&Status { peers: vec![peer()], ..up() }.to_json().unwrap()).unwrap();
    let expected = [
        ("/version", serde_json::json!(1)),
        ("/network", "fleet-a".into()),
        ("/prefix", "fd10::/16".into()),
        ("/interface", "wg-latchkey".into()),
        ("/device/public_key", "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=".into()),
        ("/device/addresses/0", "fd10::7/16".into()),
        ("/device/listen_port", 51820.into()),
        ("/device/mtu", 1420.into()),
        ("/device/up", true.into()),
        ("/identity/state", "taken".into()),
        ("/identity/taken_at_ms", 4021.into()),
        ("/boot/outcome", "unlocked".into()),
        ("/boot/mode", "offline".into()),
        ("/peers/0/endpoint", "[2001:db8::1]:51820".into()),
        ("/peers/0/allowed_ips/1", "10.0.0.0/24".into()),
        ("/peers/0/latest_handshake", (NOW - 3723).into()),
        ("/peers/0/received_bytes", 1240.into()),
        ("/peers/0/sent_bytes", (3 << 20).into()),
        ("/peers/0/persistent_keepalive", 25.into()),
    ];
    for (pointer, value) in expected {
        assert_eq!(json.pointer(pointer), Some(&value), "{pointer}");
    }
    let mut status = with_agent(Status { peers: of_all_kinds(), ..up() });
    status.agent_error = Some("why".into());
    let json: serde_json::Value = serde_json::from_str(&status.to_json().unwrap()).unwrap();
    let expected = [
        ("/device/backend", serde_json::json!("kernel")),
        ("/agent/node/name", "node-A".into()),
        ("/agent/node/allowed_ip", "fd10:aaaa:1::7/48".into()),
        ("/agent/registry/state", "joined".into()),
        ("/agent/registry/since", (NOW - 300).into()),
        ("/agent/registry/revision", 12.into()),
        ("/agent/problems", serde_json::json!([])),
        ("/agent/counters/repairs", 0.into()),
        ("/agent_error", "why".into()),
        ("/peers/0/on_device", false.into()),
        ("/peers/0/member/capabilities/0", "routes".into()),
        ("/peers/1/roamed", true.into()),
        ("/peers/1/member/name", "node-B".into()),
        ("/peers/1/member/signed", true.into()),
        ("/peers/4/member", serde_json::Value::Null),
    ];
    for (pointer, value) in expected {
        assert_eq!(json.pointer(pointer), Some(&value), "{pointer}");
    }
    let json: serde_json::Value = serde_json::from_str(&without_mesh().to_json().unwrap()).unwrap();
    assert_eq!(json.pointer("/device"), Some(&serde_json::Value::Null));
    assert_eq!(json.pointer("/identity/state"), Some(&"missing".into()));
    assert_eq!(json.pointer("/identity/reason"), Some(&"opened by hand".into()));
}

/// `docs/commands.md` names each key.
#[test]
fn all_of_the_json_is_documented() {
    fn keys(value: &serde_json::Value, found: &mut std::collections::BTreeSet<String>) {
        match value {
            serde_json::Value::Object(fields) => fields.iter().for_each(|(key, value)| {
                found.insert(key.clone());
                keys(value, found);
            }),
            serde_json::Value::Array(items) => items.iter().for_each(|item| keys(item, found)),
            _ => {}
        }
    }
    let documented = include_str!("../../../../docs/commands.md");
    let mut found = std::collections::BTreeSet::new();
    let identities = [
        IdentityStatus::Missing { reason: String::new() },
        IdentityStatus::File { path: "/key".into() },
    ];
    for identity in identities.into_iter().map(Some).chain([up().identity]) {
        let mut status = with_agent(Status { identity, peers: of_all_kinds(), ..without_mesh() });
        status.device = up().device;
        status.agent.as_mut().unwrap().problems.push(Problem::default());
        let json = status.to_json().unwrap();
        keys(&serde_json::from_str(&json).unwrap(), &mut found);
    }
    assert!(found.len() > 40, "{found:?}");
    let missing: Vec<_> = found
        .iter()
        .filter(|key| {
            !documented.contains(&format!("`{key}`")) && !documented.contains(&format!(".{key}`"))
        })
        .collect();
    assert_eq!(missing, [""; 0]);
}

#[test]
fn ages_and_sizes_read_as_in_wg() {
    let ages = [
        (0, "now"),
        (1, "1 second ago"),
        (60, "1 minute ago"),
        (3601, "1 hour, 1 second ago"),
        (172_800, "2 days ago"),
    ];
    for (seconds, text) in ages {
        assert_eq!(ago(Duration::from_secs(seconds)), text);
    }
    for (seconds, text) in
        [(0, "0s ago"), (59, "59s ago"), (60, "1m ago"), (7200, "2h ago"), (172_800, "2d ago")]
    {
        assert_eq!(short_ago(Duration::from_secs(seconds)), text);
    }
    let sizes = [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1 << 30, "1.00 GiB"),
        (5 << 40, "5.00 TiB"),
    ];
    for (bytes, text) in sizes {
        assert_eq!(size(bytes), text);
    }
}

/// Works on any host: the interface does not exist, and nothing was handed over.
#[test]
fn a_node_that_never_was_can_be_asked() {
    let run = tempfile::tempdir().unwrap();
    let config = "#cloud-config\nlatchkey: {mesh: {network: fleet-a, prefix: 'fd10::/16', interface: wg-none}}\n";
    let local = Local::of_bytes(vec![("/oem/90.yaml".into(), config.into())], "").unwrap();
    let settings = from_cloud_config(&local.membership().unwrap().unwrap()).unwrap();
    let hand_over = HandOver::at(run.path());
    let nobody = || {
        let source = std::io::ErrorKind::NotFound.into();
        Err(Error::NoAgent { path: "/nowhere".into(), source })
    };
    let status = Status::read(Some(&settings), nobody(), &hand_over).unwrap();
    assert!(!status.is_up());
    let text = status.to_text(Detail::Brief, now());
    assert!(text.contains("identity: none: nothing was unlocked by Latchkey"), "{text}");
    assert!(text.contains("  agent: no agent answers on /nowhere"), "{text}");
    assert!(matches!(Status::read(None, nobody(), &hand_over), Err(Error::NoAgent { .. })));

    // The socket alone is enough: what it says goes before what is configured.
    let mut view = View { node: node(), ..View::default() };
    view.node.interface = "wg-nil".into();
    let status = Status::read(None, Ok(view), &hand_over).unwrap();
    assert_eq!((status.interface.as_str(), status.prefix.as_str()), ("wg-nil", "fd10::/16"));
    assert_eq!((status.network, status.identity), (None, None));
}

fn node() -> Node {
    Node {
        name: "node-A".into(),
        public_key: "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=".into(),
        mesh: "fd10::/16".into(),
        allowed_ip: Some("fd10:aaaa:1::7/48".into()),
        advertise_address: "10.99.1.2".into(),
        wg_port: 51820,
        interface: "wg-latchkey".into(),
        ..Node::default()
    }
}

pub(super) fn with_agent(status: Status) -> Status {
    let registry = RegistryView {
        at: "nats://10.0.0.5:4222, bucket ikto-mesh".into(),
        state: RegistryState::Joined,
        reason: None,
        since: NOW - 300,
        revision: Some(12),
        from_cache: false,
    };
    let agent = AgentStatus {
        node: node(),
        registry: Some(registry),
        problems: vec![],
        counters: Counters::default(),
    };
    Status { agent: Some(agent), ..status }
}

pub(super) fn member(name: &str) -> MemberView {
    MemberView {
        name: name.into(),
        public_key: "WzPYRHCzki0WlvHTleeBt8ig6hXKZ9N5PXpt/DxIIkE=".into(),
        advertise_address: "192.0.2.1".into(),
        wg_port: 51820,
        allowed_ips: vec!["fd10::8/128".into()],
        signed: true,
        capabilities: vec![],
        revision: 7,
    }
}

#[test]
fn what_the_agent_knows_stands_beside_the_device() {
    let mut status = with_agent(up());
    assert_eq!(
        status.to_text(Detail::Brief, now()),
        "\
interface: wg-latchkey
  network: fleet-a
  name: node-A
  public key: hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=
  private key: (hidden)
  address: fd10::7/16
  listening port: 51820
  mtu: 1420
  state: up
  own range: fd10:aaaa:1::7/48
  advertised: 10.99.1.2:51820
  registry: joined for 5 minutes (nats://10.0.0.5:4222, bucket ikto-mesh, revision 12)
  identity: taken 4.021 s after the kernel started; no copy is left
  boot: unlocked by the TPM

peers: none
"
    );
    let agent = status.agent.as_mut().unwrap();
    agent.node.advertise_address = "2001:db8::1".into();
    agent.node.trouble = Some("cannot set it up".into());
    let registry = agent.registry.as_mut().unwrap();
    registry.state = RegistryState::Away;
    registry.reason = Some("connection refused".into());
    (registry.since, registry.revision, registry.from_cache) = (NOW - 1, None, true);
    status.device.as_mut().unwrap().backend = "userspace";
    let text = status.to_text(Detail::Brief, now());
    for line in [
        "  state: up (wireguard-go)\n",
        "  advertised: [2001:db8::1]:51820\n",
        "  registry: away for 1 second: connection refused (nats://10.0.0.5:4222, bucket ikto-mesh); \
         the members are those that were known last\n",
        "  trouble: cannot set it up\n",
    ] {
        assert!(text.contains(line), "{text}");
    }
    status.agent.as_mut().unwrap().registry = None;
    assert!(status.to_text(Detail::Brief, now()).contains("  registry: none is configured\n"));
}

fn of_all_kinds() -> Vec<PeerStatus> {
    let seen = PeerStatus {
        endpoint: Some("198.51.100.7:40001".into()),
        roamed: Some(true),
        member: Some(member("node-B")),
        ..peer()
    };
    let mut rude = member("a\u{1b}[2J\n\u{202e}");
    rude.allowed_ips = vec!["fd10:cccc::/48".into(), "fd10:dddd::/48".into()];
    rude.advertise_address = "evil\u{7}.example".into();
    rude.capabilities = vec!["routes".into(), "\u{9b}1m".into()];
    rude.signed = false;
    let absent = PeerStatus { member: Some(rude), ..PeerStatus::of_nothing("K".repeat(43) + "=") };
    let silent = PeerStatus {
        public_key: "S".repeat(43) + "=",
        endpoint: None,
        latest_handshake: None,
        received_bytes: 0,
        sent_bytes: 0,
        member: Some(MemberView { name: String::new(), ..member("") }),
        ..peer()
    };
    let nobody_s = PeerStatus { public_key: "F".repeat(43) + "=", allowed_ips: vec![], ..peer() };
    let long = PeerStatus { member: Some(member(&"ü".repeat(40))), ..peer() };
    vec![absent, seen, silent, long, nobody_s]
}

#[test]
fn a_peer_is_a_line() {
    let status = Status { peers: of_all_kinds(), ..up() };
    let text = status.to_text(Detail::Brief, now());
    let (_, table) = text.split_once("\n\n").unwrap();
    assert_eq!(
        table,
        "\
peers: 5
address            name                              endpoint                     handshake  received  sent
fd10:cccc::/48 +1  a\\u{1b}[2J\\n\\u{202e}              (not on the device)          never      0 B       0 B
fd10::8            node-B                            198.51.100.7:40001 (roamed)  1h ago     1.21 KiB  3.00 MiB
fd10::8            (SSSSSSSS…)                       -                            never      0 B       0 B
fd10::8            üüüüüüüüüüüüüüüüüüüüüüüüüüüüüüü…  [2001:db8::1]:51820          1h ago     1.21 KiB  3.00 MiB
-                  (FFFFFFFF…)                       [2001:db8::1]:51820          1h ago     1.21 KiB  3.00 MiB
"
    );
}

#[test]
fn a_device_that_cannot_be_read_is_not_taken_for_none() {
    let peers =
        vec![PeerStatus { member: Some(member("b")), ..PeerStatus::of_nothing("b".into()) }];
    let mut status = with_agent(Status { device: None, peers, ..up() });
    status.device_error = Some("cannot read the WireGuard device wg-latchkey: timed out".into());
    let brief = status.to_text(Detail::Brief, now());
    assert!(
        brief.contains("\n  device: cannot read the WireGuard device wg-latchkey: timed out\n"),
        "{brief}"
    );
    assert!(brief.ends_with("\nfd10::8  b     -         never      0 B       0 B\n"), "{brief}");
    assert!(!status.to_text(Detail::Full, now()).contains("does not have it"));
    assert!(!status.is_up());
}

#[test]
fn a_peer_is_a_block_when_all_is_to_be_shown() {
    let status = Status { peers: of_all_kinds(), ..up() };
    let text = status.to_text(Detail::Full, now());
    for block in [
        "
peer: KKKKKKKKKKKKKKKKKKKKKKKKKKKKKKKKKKKKKKKKKKK=
  name: a\\u{1b}[2J\\n\\u{202e}
  device: does not have it
  advertised: evil\\u{7}.example:51820
  record: fd10:cccc::/48, fd10:dddd::/48, revision 7, not signed, routes, \\u{9b}1m
",
        "
peer: WzPYRHCzki0WlvHTleeBt8ig6hXKZ9N5PXpt/DxIIkE=
  name: node-B
  endpoint: 198.51.100.7:40001
  allowed ips: fd10::8/128, 10.0.0.0/24
  latest handshake: 1 hour, 2 minutes, 3 seconds ago
  transfer: 1.21 KiB received, 3.00 MiB sent
  persistent keepalive: every 25 seconds
  advertised: 192.0.2.1:51820 (it has roamed)
  record: fd10::8/128, revision 7, signed
",
    ] {
        assert!(text.contains(block), "{text}");
    }
}

/// Whatever stands in records, files and answers: nothing of it reaches a terminal but as printed characters.
#[test]
fn nothing_obeyed_by_a_terminal_is_ever_written() {
    let rude = "x\u{1b}[31m\u{9b}\u{7}\r\n\u{202e}";
    let mut status = with_agent(Status { peers: of_all_kinds(), ..without_mesh() });
    status.interface = rude.into();
    status.agent_error = Some(rude.into());
    status.device_error = Some(rude.into());
    status.boot.as_mut().unwrap().reason = Some(rude.into());
    status.identity = Some(IdentityStatus::Missing { reason: rude.into() });
    let agent = status.agent.as_mut().unwrap();
    agent.node = Node {
        name: rude.into(),
        allowed_ip: Some(rude.into()),
        advertise_address: rude.into(),
        trouble: Some(rude.into()),
        ..node()
    };
    let registry = agent.registry.as_mut().unwrap();
    (registry.at, registry.reason) = (rude.into(), Some(rude.into()));
    agent.problems = vec![Problem { key: rude.into(), revision: 1, reason: rude.into() }];
    for peer in &mut status.peers {
        peer.public_key = rude.into();
        let Some(member) = &mut peer.member else { continue };
        member.name = rude.into();
        member.advertise_address = rude.into();
        member.allowed_ips = vec![rude.into(); 2];
        member.capabilities = vec![rude.into()];
    }
    for detail in [Detail::Brief, Detail::Full] {
        let text = status.to_text(detail, now());
        let told: Vec<_> = text.lines().filter(|line| printable(line) != **line).collect();
        assert_eq!(told, [""; 0]);
    }
}

#[test]
fn records_that_do_not_count_are_told_the_first_ten_of_them() {
    let mut status = with_agent(up());
    let problem = |number: u64| Problem {
        key: format!("peers.{number}"),
        revision: number,
        reason: "outside the mesh".into(),
    };
    status.agent.as_mut().unwrap().problems = (0..12).map(problem).collect();
    let text = status.to_text(Detail::Brief, now());
    assert!(
        text.contains(
            "\nrecords that do not count: 12\n  peers.0 (revision 0): outside the mesh\n"
        ),
        "{text}"
    );
    assert!(
        text.contains(
            "\n  peers.9 (revision 9): outside the mesh\n  and 2 more (--verbose shows them)\n"
        ),
        "{text}"
    );
    assert!(status.to_text(Detail::Full, now()).contains("  peers.11 (revision 11)"));
}

#[test]
fn device_and_records_are_brought_together_by_key() {
    let key = |byte| PublicKey::new([byte; 32]);
    let on_device = BTreeMap::from([
        (key(1), Peer { endpoint: Some("192.0.2.1:51820".parse().unwrap()), ..Peer::default() }),
        (key(2), Peer { endpoint: Some("192.0.2.1:51821".parse().unwrap()), ..Peer::default() }),
        (key(3), Peer { endpoint: Some("192.0.2.3:1".parse().unwrap()), ..Peer::default() }),
        (key(4), Peer::default()),
        (key(5), Peer { endpoint: Some("192.0.2.1:51820".parse().unwrap()), ..Peer::default() }),
    ]);
    let named = |byte, name| MemberView { public_key: key(byte).to_string(), ..member(name) };
    let by_name = MemberView { advertise_address: "b.example".into(), ..named(5, "e") };
    let members = vec![named(6, "a"), named(1, "d"), named(2, "b"), named(4, "c"), by_name];
    let merged = merge(on_device, members);
    let seen: Vec<_> = merged
        .iter()
        .map(|peer| {
            let name = peer.member.as_ref().map_or("-", |member| &member.name);
            (name, peer.on_device, peer.roamed)
        })
        .collect();
    assert_eq!(
        seen,
        [
            ("a", false, None),
            ("b", true, Some(true)),
            ("c", true, None),
            ("d", true, Some(false)),
            ("e", true, None),
            ("-", true, None),
        ]
    );
}

#[test]
fn thousands_of_peers_are_a_table_still() {
    let peers = (0..5000)
        .map(|number| PeerStatus { member: Some(member(&format!("node-{number}"))), ..peer() });
    let status = Status { peers: peers.collect(), ..up() };
    let text = status.to_text(Detail::Brief, now());
    let rows: Vec<_> = text.lines().filter(|line| line.starts_with("fd10::8 ")).collect();
    assert_eq!(rows.len(), 5000);
    let column = rows[0].find("[2001").unwrap();
    assert!(rows.iter().all(|row| row.find("[2001") == Some(column)));
}
