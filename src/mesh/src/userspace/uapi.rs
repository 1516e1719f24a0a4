//! The configuration protocol of userspace WireGuard, from our side: what is asked, and what a device
//! is made of the answer.

use std::fmt::Write as _;
use std::io::{self, Read};
use std::time::{Duration, SystemTime};

use zeroize::Zeroizing;

use super::answer::{self, Item};
use crate::device::tunnel::{self, Tunnel};
use crate::key::{KEY_LENGTH, PrivateKey, PublicKey};
use crate::plan::{Change, PeerChange};

pub(super) const GET: &[u8] = b"get=1\n\n";
const SET: &str = "set=1\n";

/// From this size on the next peer begins another request.
const BATCH_SIZE: usize = 64 << 10;

/// Reads what a program answers to `get`.
pub(super) fn read_tunnel(from: impl Read) -> io::Result<Tunnel> {
    let mut tunnel = Tunnel::default();
    let mut current = None;
    answer::read(from, |item| take(&mut tunnel, &mut current, item))?;
    Ok(tunnel)
}

/// Reads what it answers to `set`.
pub(super) fn read_result(from: impl Read) -> io::Result<()> {
    answer::read(from, drop)
}

fn take(tunnel: &mut Tunnel, current: &mut Option<PublicKey>, item: Item) {
    match item {
        Item::PrivateKey(bytes) => {
            let key = (*bytes != [0; KEY_LENGTH]).then(|| PrivateKey::new(&bytes));
            tunnel.public_key = key.as_ref().map(PrivateKey::public);
            tunnel.private_key = key;
            return;
        }
        Item::ListenPort(port) => tunnel.port = port,
        Item::Peer(key) => {
            let key = PublicKey::new(key);
            tunnel.peers.entry(key).or_default();
            *current = Some(key);
        }
        _ => {}
    }
    let peer = current.as_ref().and_then(|key| tunnel.peers.get_mut(key));
    let Some(peer) = peer else { return };
    match item {
        Item::Endpoint(endpoint) => peer.endpoint = Some(endpoint),
        Item::AllowedIp(ip) => drop(peer.allowed_ips.insert(ip)),
        Item::Keepalive(seconds) => peer.persistent_keepalive = seconds,
        Item::LastHandshake(seconds) => {
            let time = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds));
            peer.last_handshake = time.filter(|_| seconds > 0);
        }
        Item::Received(bytes) => peer.received_bytes = bytes,
        Item::Sent(bytes) => peer.sent_bytes = bytes,
        Item::PrivateKey(_) | Item::ListenPort(_) | Item::Peer(_) => {}
    }
}

/// Key, port or both.
pub(super) fn set_device(key: Option<&PrivateKey>, port: Option<u16>) -> Zeroizing<String> {
    // As long as it gets, so that it never moves and leaves a copy of the key behind.
    let mut text = Zeroizing::new(String::with_capacity(256));
    text.push_str(SET);
    if let Some(key) = key {
        text.push_str("private_key=");
        push_hex(&mut text, key.as_bytes());
        text.push('\n');
    }
    if let Some(port) = port {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "listen_port={port}");
    }
    text.push('\n');
    text
}

/// One request about some peers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Batch {
    peers: Vec<(PublicKey, String)>,
}

/// As few requests as need be, the changes in their order.
pub(super) fn batches(changes: &[Change]) -> Vec<Batch> {
    let mut batches: Vec<Batch> = Vec::new();
    let mut size = BATCH_SIZE;
    for (key, text) in changes.iter().filter_map(peer_text) {
        if size >= BATCH_SIZE {
            batches.push(Batch { peers: Vec::new() });
            size = 0;
        }
        size += text.len();
        if let Some(batch) = batches.last_mut() {
            batch.peers.push((key, text));
        }
    }
    batches
}

/// Bytes of the requests that say what `changes` say of peers.
pub(crate) fn length(changes: &[Change]) -> usize {
    batches(changes).iter().map(|batch| batch.text().len()).sum()
}

impl Batch {
    pub(super) fn text(&self) -> String {
        let peers = self.peers.iter().map(|(_, text)| text.as_str());
        [SET].into_iter().chain(peers).chain(["\n"]).collect()
    }
}

impl tunnel::Batch for Batch {
    fn parts(self) -> Vec<(PublicKey, Self)> {
        self.peers.into_iter().map(|peer| (peer.0, Self { peers: vec![peer] })).collect()
    }
}

fn peer_text(change: &Change) -> Option<(PublicKey, String)> {
    let (key, rest) = match change {
        Change::SetPeer(change) => (change.public_key, set_peer(change)),
        Change::RemovePeer(key) => (*key, "remove=true\n".into()),
        _ => return None,
    };
    let mut text = String::from("public_key=");
    push_hex(&mut text, key.as_bytes());
    text.push('\n');
    text.push_str(&rest);
    Some((key, text))
}

fn set_peer(change: &PeerChange) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail.
    if let Some(endpoint) = change.endpoint {
        let _ = writeln!(text, "endpoint={endpoint}");
    }
    if let Some(seconds) = change.keepalive {
        let _ = writeln!(text, "persistent_keepalive_interval={seconds}");
    }
    if change.replace_allowed_ips {
        text.push_str("replace_allowed_ips=true\n");
    }
    for ip in &change.allowed_ips {
        let _ = writeln!(text, "allowed_ip={ip}");
    }
    text
}

fn push_hex(text: &mut String, bytes: &[u8]) {
    for byte in bytes {
        for nibble in [byte >> 4, byte & 15] {
            text.push(char::from_digit(nibble.into(), 16).unwrap_or_default());
        }
    }
}

#[cfg(test)]
mod tests;
