//! The key server's mDNS responder, which hears whoever is on the link.
//!
//! Its file alone: the key server's crate would bring an async runtime and aws-lc along, all to be built once more for
//! libFuzzer.

use std::net::IpAddr;

use latchkey_wire::dns;

#[path = "../../../src/kms/src/mdns/packet.rs"]
#[allow(dead_code, unreachable_pub, missing_debug_implementations, reason = "as in its own crate")]
mod packet;

use packet::{Heard, MAX_PACKET, Service};

pub(crate) fn mdns(data: &[u8]) {
    let service = Service::new("kms.local", 8082).unwrap();
    let addresses: Vec<IpAddr> =
        ["192.0.2.7", "2001:db8::7"].map(|address| address.parse().unwrap()).into();
    for port in [5353, 40_000] {
        match service.hear(data, port, &addresses, &addresses) {
            Ok(Heard::ForAll(answer) | Heard::ForAsker(answer)) => only_ours(&answer),
            Ok(Heard::Conflict(address)) => assert!(!addresses.contains(&address)),
            Ok(Heard::Nothing) | Err(_) => {}
        }
    }
}

/// Whatever was asked: our client reads it, and it says nothing of others.
fn only_ours(answer: &[u8]) {
    assert!(answer.len() <= MAX_PACKET);
    let answer = dns::Response::parse(answer).unwrap();
    assert!(!answer.records.is_empty());
    for record in &answer.records {
        let name = record.name.to_string();
        let ours = [
            "kms.local.",
            "_kcrypt._tcp.local.",
            "kms._kcrypt._tcp.local.",
            "_services._dns-sd._udp.local.",
        ];
        assert!(ours.contains(&name.as_str()), "{name}");
    }
}
