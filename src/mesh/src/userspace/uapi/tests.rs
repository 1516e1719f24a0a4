use std::net::IpAddr;

use latchkey_wire::member::Cidr;

use super::*;
use crate::device::tunnel::Batch as _;

const A: &str = "0102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f20";
const B: &str = "ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff";

fn key_a() -> PublicKey {
    PublicKey::new(std::array::from_fn(|n| n as u8 + 1))
}

fn read(answer: &str) -> Result<Tunnel, String> {
    read_tunnel(answer.as_bytes()).map_err(|error| error.to_string())
}

#[test]
fn a_device_is_read_with_its_peers_and_what_we_do_not_know_is_passed_over() {
    let tunnel = read(&format!(
        "private_key={A}\nlisten_port=51820\nfwmark=1\npublic_key={A}\npreshared_key={B}\n\
         protocol_version=1\nendpoint=192.0.2.1:7\nlast_handshake_time_sec=9\n\
         last_handshake_time_nsec=5\ntx_bytes=4\nrx_bytes=3\npersistent_keepalive_interval=25\n\
         allowed_ip=10.0.0.0/24\nallowed_ip=fd10::/48\npublic_key={B}\n\
         endpoint=[fe80::1%eth0]:7\nlast_handshake_time_sec=0\nerrno=0\n\nthe next answer"
    ))
    .unwrap();
    let private_key = PrivateKey::new(key_a().as_bytes());
    assert_eq!((tunnel.public_key, tunnel.port), (Some(private_key.public()), 51820));
    let a = &tunnel.peers[&key_a()];
    assert_eq!(a.endpoint, Some("192.0.2.1:7".parse().unwrap()));
    assert_eq!(a.allowed_ips, ["10.0.0.0/24", "fd10::/48"].map(|ip| ip.parse().unwrap()).into());
    assert_eq!(a.last_handshake, Some(SystemTime::UNIX_EPOCH + Duration::from_secs(9)));
    assert_eq!((a.received_bytes, a.sent_bytes, a.persistent_keepalive), (3, 4, 25));
    let b = &tunnel.peers[&PublicKey::new([0xff; 32])];
    assert_eq!((b.endpoint, b.last_handshake), (Some("[fe80::1]:7".parse().unwrap()), None));
    assert_eq!(tunnel.peers.len(), 2);
}

#[test]
fn a_device_without_a_key_has_none() {
    let zeros = "0".repeat(64);
    for answer in ["errno=0\n\n".to_owned(), format!("private_key={zeros}\nerrno=0\n\n")] {
        let tunnel = read(&answer).unwrap();
        assert!(tunnel.private_key.is_none() && tunnel.public_key.is_none());
    }
}

#[test]
fn what_is_no_answer_is_refused_and_not_repeated() {
    let long = format!("{}=1\nerrno=0\n\n", "x".repeat(2000));
    let cases = [
        ("", "unexpected end of file"),
        ("listen_port=1\nerrno=0\n", "unexpected end of file"),
        ("listen_port=1\n\n", "the WireGuard program sent an answer without errno"),
        ("\n", "the WireGuard program sent an answer without errno"),
        ("listen_port\nerrno=0\n\n", "the WireGuard program sent a line that is not KEY=VALUE"),
        (
            "listen_port=x\nerrno=0\n\n",
            "the WireGuard program sent a value of listen_port that is none",
        ),
        (
            "private_key=abc\nerrno=0\n\n",
            "the WireGuard program sent a value of private_key that is none",
        ),
        (
            "allowed_ip=10.0.0.0/8\nerrno=0\n\n",
            "the WireGuard program sent something of a peer before the first peer",
        ),
        (&long, "the WireGuard program sent a line of more than 1 KiB"),
    ];
    for (answer, expected) in cases {
        assert_eq!(read(answer).unwrap_err(), expected, "{answer:?}");
    }
    let endless = std::io::Read::take(std::io::repeat(b'x'), 1 << 30);
    assert!(read_tunnel(endless).unwrap_err().to_string().contains("more than 1 KiB"));
}

#[test]
fn a_refusal_is_the_programs_errno() {
    for errno in ["-22", "22"] {
        let answer = format!("errno={errno}\n\n");
        assert_eq!(read_result(answer.as_bytes()).unwrap_err().raw_os_error(), Some(22));
    }
    assert!(read_result(b"errno=0\n\n".as_slice()).is_ok());
}

#[test]
fn key_and_port_are_told_together_or_alone() {
    let key = PrivateKey::new(&[0xff; 32]);
    let hex = format!("f8{}7f", "ff".repeat(30));
    let told = |key, port| set_device(key, port).to_string();
    assert_eq!(
        told(Some(&key), Some(51820)),
        format!("set=1\nprivate_key={hex}\nlisten_port=51820\n\n")
    );
    assert_eq!(told(None, Some(7)), "set=1\nlisten_port=7\n\n");
    assert!(set_device(Some(&key), Some(u16::MAX)).capacity() >= 256, "it has not grown");
}

fn change(n: u8, ips: u16) -> Change {
    let ip = |n| Cidr::new(IpAddr::from([10, (n >> 8) as u8, n as u8, 0]), 24).unwrap();
    Change::SetPeer(PeerChange {
        public_key: PublicKey::new([n; 32]),
        new: false,
        endpoint: Some("[2001:db8::1]:7".parse().unwrap()),
        keepalive: Some(25),
        allowed_ips: (0..ips).map(ip).collect(),
        replace_allowed_ips: true,
    })
}

#[test]
fn peers_are_told_in_their_order_and_each_with_what_changes() {
    let removed = PublicKey::new([2; 32]);
    let batches = batches(&[change(1, 1), Change::RemovePeer(removed), Change::SetUp]);
    let [batch] = batches.as_slice() else { panic!("{batches:?}") };
    assert_eq!(
        batch.text(),
        format!(
            "set=1\npublic_key={}\nendpoint=[2001:db8::1]:7\npersistent_keepalive_interval=25\n\
             replace_allowed_ips=true\nallowed_ip=10.0.0.0/24\npublic_key={}\nremove=true\n\n",
            "01".repeat(32),
            "02".repeat(32)
        )
    );
    let parts = batch.clone().parts();
    assert_eq!(parts.len(), 2);
    let (key, part) = &parts[1];
    let text = format!("set=1\npublic_key={}\nremove=true\n\n", "02".repeat(32));
    assert_eq!((*key, part.text()), (removed, text));
}

#[test]
fn a_request_does_not_grow_without_end() {
    let changes: Vec<Change> = (0..100).map(|n| change(n, 100)).collect();
    let batches = batches(&changes);
    assert!(batches.len() > 1);
    assert_eq!(batches.iter().map(|batch| batch.peers.len()).sum::<usize>(), 100);
    assert!(batches.iter().all(|batch| batch.text().len() < BATCH_SIZE + 4096));
}
