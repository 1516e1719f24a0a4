use super::*;
use crate::handover::HandOver;

const NOW: u64 = 1_700_000_000;

fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(NOW)
}

fn up() -> Status {
    Status {
        version: VERSION,
        network: "fleet-a".into(),
        prefix: "fd10::/16".into(),
        interface: "wg-latchkey".into(),
        device: Some(DeviceStatus {
            public_key: Some("hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=".into()),
            addresses: vec!["fd10::7/16".into()],
            listen_port: 51820,
            mtu: 1420,
            up: true,
        }),
        identity: IdentityStatus::Taken {
            public_key: "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=".into(),
            network: "fleet-a".into(),
            volume: "uuid".into(),
            taken_at_ms: 4_021,
        },
        boot: Some(BootStatus { outcome: Outcome::Unlocked, mode: Mode::Offline, reason: None }),
        peers: vec![],
    }
}

fn without_mesh() -> Status {
    Status {
        device: None,
        identity: IdentityStatus::Missing { reason: "opened by hand".into() },
        boot: Some(BootStatus {
            outcome: Outcome::Recovery,
            mode: Mode::Online,
            reason: Some("quarantined".into()),
        }),
        ..up()
    }
}

fn peer() -> PeerStatus {
    PeerStatus {
        public_key: "WzPYRHCzki0WlvHTleeBt8ig6hXKZ9N5PXpt/DxIIkE=".into(),
        endpoint: Some("[2001:db8::1]:51820".into()),
        allowed_ips: vec!["fd10::8/128".into(), "10.0.0.0/24".into()],
        latest_handshake: Some(NOW - 3723),
        received_bytes: 1240,
        sent_bytes: 3 << 20,
        persistent_keepalive: 25,
    }
}

#[test]
fn a_node_that_is_up() {
    assert!(up().is_up());
    assert_eq!(
        up().to_text(now()),
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
        without_mesh().to_text(now()),
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
    let text = Status { peers: vec![peer(), silent], ..up() }.to_text(now());
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
    assert!(with(|device| device.up = false).to_text(now()).contains("  state: down\n"));
    let keyless = with(|device| device.public_key = None);
    assert!(!keyless.is_up());
    assert!(!keyless.to_text(now()).contains("key:"));
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
    let json: serde_json::Value = serde_json::from_str(&without_mesh().to_json().unwrap()).unwrap();
    assert_eq!(json.pointer("/device"), Some(&serde_json::Value::Null));
    assert_eq!(json.pointer("/identity/state"), Some(&"missing".into()));
    assert_eq!(json.pointer("/identity/reason"), Some(&"opened by hand".into()));
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
    let mesh = Mesh {
        interface: "wg-none".into(),
        ..Mesh::new("fleet-a".into(), "fd10::/16".parse().unwrap())
    };
    let status = Status::read(&mesh, &HandOver::at(run.path())).unwrap();
    assert!(!status.is_up());
    assert!(status.to_text(now()).contains("identity: none: nothing was unlocked by Latchkey"));
}
