//! WireGuard devices by generic netlink: family `wireguard`, version 1
//! (include/uapi/linux/wireguard.h), what wg(8) speaks.

use std::io;
use std::net::IpAddr;
use std::time::{Duration, SystemTime};

use latchkey_wire::member::Cidr;
use netlink_packet_core::{Emitable, NLM_F_DUMP, NetlinkHeader};
use netlink_packet_generic::GenlMessage;
use netlink_packet_generic::ctrl::nlas::GenlCtrlAttrs;
use netlink_packet_generic::ctrl::{GenlCtrl, GenlCtrlCmd};
use netlink_packet_wireguard::{
    WireguardAddressFamily, WireguardAllowedIp, WireguardAllowedIpAttr, WireguardAttribute,
    WireguardCmd, WireguardMessage, WireguardPeer, WireguardPeerAttribute, WireguardPeerFlags,
};
use netlink_sys::protocols::NETLINK_GENERIC;
use zeroize::Zeroize;

use super::Netlink;
use crate::device::tunnel::{self, Tunnel};
use crate::key::{PrivateKey, PublicKey};
use crate::plan::{Change, PeerChange};

const FAMILY: &str = "wireguard";

/// Of the peers in one message. The kernel takes up to 64 KiB, the length of an attribute.
const BATCH_SIZE: usize = 32 << 10;

/// Allowed IPs in one part of a peer: at most 40 bytes each.
const MAX_ALLOWED_IPS: usize = 512;

pub(crate) struct WireGuard {
    netlink: Netlink,
    family: u16,
    /// Bytes of requests that change something.
    pub(crate) sent: u64,
}

/// One message about some peers, or parts of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Batch {
    peers: Vec<(PublicKey, WireguardPeer)>,
}

impl WireGuard {
    /// # Errors
    /// `NotFound` if the kernel has no WireGuard.
    pub(crate) fn open() -> io::Result<Self> {
        let mut netlink = Netlink::open(NETLINK_GENERIC)?;
        let request = GenlCtrl {
            cmd: GenlCtrlCmd::GetFamily,
            nlas: vec![GenlCtrlAttrs::FamilyName(FAMILY.into())],
        };
        let answers = netlink.request(&GenlMessage::from_payload(request), 0)?;
        let family = answers.iter().flat_map(|answer| &answer.payload.nlas).find_map(|attribute| {
            match attribute {
                GenlCtrlAttrs::FamilyId(id) => Some(*id),
                _ => None,
            }
        });
        let family = family.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        Ok(Self { netlink, family, sent: 0 })
    }

    /// # Errors
    /// `PermissionDenied` without CAP_NET_ADMIN: the answer has the private key in it.
    pub(crate) fn get(&mut self, index: u32) -> io::Result<Tunnel> {
        let request =
            self.message(WireguardCmd::GetDevice, vec![WireguardAttribute::IfIndex(index)]);
        let answers = self.netlink.request(&request, NLM_F_DUMP)?;
        let mut device = Tunnel::default();
        for mut answer in answers {
            answer.payload.attributes.iter_mut().for_each(|attribute| device.take(attribute));
        }
        Ok(device)
    }

    /// Sets what is given, in one message; the rest and all peers stay as they are.
    pub(crate) fn set(
        &mut self,
        index: u32,
        key: Option<&PrivateKey>,
        port: Option<u16>,
    ) -> io::Result<()> {
        let mut attributes = vec![WireguardAttribute::IfIndex(index)];
        attributes.extend(key.map(|key| WireguardAttribute::PrivateKey(*key.as_bytes())));
        attributes.extend(port.map(WireguardAttribute::ListenPort));
        let mut request = self.message(WireguardCmd::SetDevice, attributes);
        let before = self.netlink.sent;
        let result = self.netlink.request(&request, 0).map(drop);
        self.sent += self.netlink.sent - before;
        for attribute in &mut request.payload.attributes {
            if let WireguardAttribute::PrivateKey(bytes) = attribute {
                bytes.zeroize();
            }
        }
        result
    }

    /// As few messages as need be, the changes in their order.
    pub(crate) fn batches(&self, changes: &[Change]) -> Vec<Batch> {
        batches(changes)
    }

    pub(crate) fn send(&mut self, index: u32, batch: &Batch) -> io::Result<()> {
        let request = self.message(WireguardCmd::SetDevice, batch.attributes(index));
        let before = self.netlink.sent;
        let result = self.netlink.request(&request, 0).map(drop);
        self.sent += self.netlink.sent - before;
        result
    }

    fn message(
        &self,
        cmd: WireguardCmd,
        attributes: Vec<WireguardAttribute>,
    ) -> GenlMessage<WireguardMessage> {
        let mut message = GenlMessage::from_payload(WireguardMessage { cmd, attributes });
        message.set_resolved_family_id(self.family);
        message
    }
}

impl Tunnel {
    /// Takes what an answer says, and wipes the keys in it.
    fn take(&mut self, attribute: &mut WireguardAttribute) {
        match attribute {
            WireguardAttribute::PrivateKey(bytes) => {
                self.private_key = (*bytes != [0; 32]).then(|| PrivateKey::new(bytes));
                bytes.zeroize();
            }
            WireguardAttribute::PublicKey(bytes) => {
                self.public_key = Some(PublicKey::new(*bytes));
            }
            WireguardAttribute::ListenPort(port) => self.port = *port,
            WireguardAttribute::Peers(peers) => {
                peers.iter_mut().for_each(|peer| self.take_peer(peer))
            }
            _ => {}
        }
    }

    /// A peer with many allowed addresses comes in several parts, each with its key; only the first
    /// part has the rest.
    fn take_peer(&mut self, WireguardPeer(attributes): &mut WireguardPeer) {
        let key = attributes.iter().find_map(|attribute| match attribute {
            WireguardPeerAttribute::PublicKey(key) => Some(PublicKey::new(*key)),
            _ => None,
        });
        let Some(key) = key else { return };
        let peer = self.peers.entry(key).or_default();
        for attribute in attributes {
            match attribute {
                WireguardPeerAttribute::PresharedKey(key) => key.zeroize(),
                WireguardPeerAttribute::Endpoint(endpoint) => peer.endpoint = Some(*endpoint),
                WireguardPeerAttribute::PersistentKeepalive(seconds) => {
                    peer.persistent_keepalive = *seconds
                }
                WireguardPeerAttribute::LastHandshake(time) => {
                    let seconds = u64::try_from(time.seconds).ok().filter(|seconds| *seconds > 0);
                    peer.last_handshake = seconds
                        .map(|seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds));
                }
                WireguardPeerAttribute::RxBytes(bytes) => peer.received_bytes = *bytes,
                WireguardPeerAttribute::TxBytes(bytes) => peer.sent_bytes = *bytes,
                WireguardPeerAttribute::AllowedIps(ips) => {
                    peer.allowed_ips.extend(ips.iter().filter_map(allowed_ip))
                }
                _ => {}
            }
        }
    }
}

/// Bytes of the requests that say what `changes` say of peers.
pub(crate) fn length(changes: &[Change]) -> usize {
    let length = |batch: &Batch| {
        let cmd = WireguardCmd::SetDevice;
        let message = WireguardMessage { cmd, attributes: batch.attributes(0) };
        NetlinkHeader::default().buffer_len() + GenlMessage::from_payload(message).buffer_len()
    };
    batches(changes).iter().map(length).sum()
}

impl Batch {
    fn attributes(&self, index: u32) -> Vec<WireguardAttribute> {
        let peers = self.peers.iter().map(|(_, peer)| peer.clone()).collect();
        vec![WireguardAttribute::IfIndex(index), WireguardAttribute::Peers(peers)]
    }
}

impl tunnel::Batch for Batch {
    fn parts(self) -> Vec<(PublicKey, Self)> {
        self.peers.into_iter().map(|peer| (peer.0, Self { peers: vec![peer] })).collect()
    }
}

fn batches(changes: &[Change]) -> Vec<Batch> {
    let mut batches: Vec<Batch> = Vec::new();
    let mut size = BATCH_SIZE;
    for (key, part) in changes.iter().flat_map(parts) {
        let part_size = part.buffer_len();
        if size + part_size > BATCH_SIZE {
            batches.push(Batch { peers: Vec::new() });
            size = 0;
        }
        size += part_size;
        if let Some(batch) = batches.last_mut() {
            batch.peers.push((key, part));
        }
    }
    batches
}

/// What to say of one peer. With more allowed IPs than fit, it is continued in further parts, which
/// have only its key and the next allowed IPs, and no flags: they are added to those before.
fn parts(change: &Change) -> Vec<(PublicKey, WireguardPeer)> {
    let (key, rest, ips) = match change {
        Change::SetPeer(change) => (
            change.public_key,
            said_once(change),
            change.allowed_ips.iter().copied().map(allowed_ip_of).collect(),
        ),
        Change::RemovePeer(key) => {
            (*key, vec![WireguardPeerAttribute::Flags(WireguardPeerFlags::RemoveMe)], Vec::new())
        }
        _ => return Vec::new(),
    };
    let part = |rest: Vec<WireguardPeerAttribute>, ips: &[WireguardAllowedIp]| {
        let mut attributes = vec![WireguardPeerAttribute::PublicKey(*key.as_bytes())];
        attributes.extend(rest);
        if !ips.is_empty() {
            attributes.push(WireguardPeerAttribute::AllowedIps(ips.to_vec()));
        }
        (key, WireguardPeer(attributes))
    };
    let mut chunks = ips.chunks(MAX_ALLOWED_IPS);
    let first = part(rest, chunks.next().unwrap_or_default());
    [first].into_iter().chain(chunks.map(|ips| part(Vec::new(), ips))).collect()
}

fn said_once(change: &PeerChange) -> Vec<WireguardPeerAttribute> {
    let mut attributes = Vec::new();
    if change.replace_allowed_ips {
        attributes.push(WireguardPeerAttribute::Flags(WireguardPeerFlags::ReplaceAllowedIps));
    }
    attributes.extend(change.endpoint.map(WireguardPeerAttribute::Endpoint));
    attributes.extend(change.keepalive.map(WireguardPeerAttribute::PersistentKeepalive));
    attributes
}

fn allowed_ip_of(ip: Cidr) -> WireguardAllowedIp {
    WireguardAllowedIp(vec![
        WireguardAllowedIpAttr::Family(match ip.address() {
            IpAddr::V4(_) => WireguardAddressFamily::Ipv4,
            IpAddr::V6(_) => WireguardAddressFamily::Ipv6,
        }),
        WireguardAllowedIpAttr::IpAddr(ip.address()),
        WireguardAllowedIpAttr::Cidr(ip.length()),
    ])
}

fn allowed_ip(WireguardAllowedIp(attributes): &WireguardAllowedIp) -> Option<Cidr> {
    let address = attributes.iter().find_map(|attribute| match attribute {
        WireguardAllowedIpAttr::IpAddr(address) => Some(*address),
        _ => None,
    })?;
    let length = attributes.iter().find_map(|attribute| match attribute {
        WireguardAllowedIpAttr::Cidr(length) => Some(*length),
        _ => None,
    })?;
    Cidr::new(address, length)
}

impl std::fmt::Debug for WireGuard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WireGuard").field("family", &self.family).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use crate::plan::Peer;
    use netlink_packet_wireguard::WireguardTimeSpec;

    use super::*;

    const KEY: [u8; 32] = [7; 32];

    fn ip(address: &str, length: u8) -> WireguardAllowedIp {
        WireguardAllowedIp(vec![
            WireguardAllowedIpAttr::IpAddr(address.parse().unwrap()),
            WireguardAllowedIpAttr::Cidr(length),
        ])
    }

    fn handshake(seconds: i64) -> WireguardPeerAttribute {
        WireguardPeerAttribute::LastHandshake(WireguardTimeSpec { seconds, nano_seconds: 0 })
    }

    #[test]
    fn a_peer_in_parts_is_one_peer() {
        let mut device = Tunnel::default();
        let first = vec![
            WireguardPeerAttribute::PublicKey(KEY),
            WireguardPeerAttribute::Endpoint("192.0.2.1:1".parse().unwrap()),
            handshake(9),
            WireguardPeerAttribute::RxBytes(3),
            WireguardPeerAttribute::TxBytes(4),
            WireguardPeerAttribute::PersistentKeepalive(25),
            WireguardPeerAttribute::AllowedIps(vec![ip("10.0.0.0", 24)]),
        ];
        let second = vec![
            WireguardPeerAttribute::PublicKey(KEY),
            WireguardPeerAttribute::AllowedIps(vec![ip("fd10::", 48)]),
        ];
        for part in [first, second] {
            device.take(&mut WireguardAttribute::Peers(vec![WireguardPeer(part)]));
        }
        let peer = Peer {
            endpoint: Some("192.0.2.1:1".parse().unwrap()),
            allowed_ips: ["10.0.0.0/24", "fd10::/48"].map(|ip| ip.parse().unwrap()).into(),
            last_handshake: Some(SystemTime::UNIX_EPOCH + Duration::from_secs(9)),
            received_bytes: 3,
            sent_bytes: 4,
            persistent_keepalive: 25,
        };
        assert_eq!(device.peers, BTreeMap::from([(PublicKey::new(KEY), peer)]));
    }

    /// The kernel says "never" with zeros.
    #[test]
    fn a_peer_that_was_never_heard_of_has_no_handshake() {
        let mut device = Tunnel::default();
        device.take_peer(&mut WireguardPeer(vec![
            WireguardPeerAttribute::PublicKey(KEY),
            handshake(0),
        ]));
        assert_eq!(device.peers.values().next().unwrap().last_handshake, None);
    }

    #[test]
    fn keys_are_taken_and_wiped() {
        let mut device = Tunnel::default();
        let mut answer = WireguardAttribute::PrivateKey(KEY);
        device.take(&mut answer);
        assert_eq!(device.private_key.unwrap().public(), PrivateKey::new(&KEY).public());
        assert_eq!(answer, WireguardAttribute::PrivateKey([0; 32]));
    }

    #[test]
    fn a_key_of_zeros_is_none() {
        let mut device = Tunnel::default();
        device.take(&mut WireguardAttribute::PrivateKey([0; 32]));
        assert!(device.private_key.is_none());
    }

    fn change(n: u16, ips: u16) -> Change {
        let mut key = KEY;
        key[..2].copy_from_slice(&n.to_be_bytes());
        let ip = |n: u16| {
            let [high, low] = n.to_be_bytes();
            Cidr::new([10, high, low, 0].into(), 24).unwrap()
        };
        Change::SetPeer(PeerChange {
            public_key: PublicKey::new(key),
            new: true,
            endpoint: Some("[2001:db8::1]:7".parse().unwrap()),
            keepalive: Some(25),
            allowed_ips: (0..ips).map(ip).collect(),
            replace_allowed_ips: true,
        })
    }

    fn is_said_once(attribute: &WireguardPeerAttribute) -> bool {
        matches!(
            attribute,
            WireguardPeerAttribute::Flags(_)
                | WireguardPeerAttribute::Endpoint(_)
                | WireguardPeerAttribute::PersistentKeepalive(_)
        )
    }

    #[test]
    fn many_peers_fit_one_message_and_none_is_too_long() {
        let changes: Vec<Change> = (0..5000).map(|n| change(n, 1)).collect();
        let batches = batches(&changes);
        assert!(batches.len() < 40, "{}", batches.len());
        let keys = batches.iter().flat_map(|batch| &batch.peers).map(|(key, _)| *key);
        assert!(keys.eq(changes.iter().map(|change| match change {
            Change::SetPeer(change) => change.public_key,
            other => panic!("{other}"),
        })));
        for batch in batches {
            let peers = batch.peers.into_iter().map(|(_, peer)| peer).collect();
            assert!(WireguardAttribute::Peers(peers).buffer_len() < usize::from(u16::MAX));
        }
    }

    /// Only the first part may have the flags: with "replace" in the second, the first would be lost.
    #[test]
    fn a_peer_that_is_too_long_is_continued() {
        let Change::SetPeer(wanted) = change(1, 3000) else { unreachable!() };
        let batches = batches(&[Change::SetPeer(wanted.clone())]);
        assert!(batches.len() > 1);
        let parts: Vec<_> = batches.iter().flat_map(|batch| &batch.peers).collect();
        assert_eq!(parts[0].1.iter().filter(|attribute| is_said_once(attribute)).count(), 3);
        assert!(!parts[1..].iter().any(|(_, part)| part.iter().any(is_said_once)));
        let mut read = Tunnel::default();
        for (_, part) in parts {
            read.take_peer(&mut part.clone());
        }
        assert_eq!(read.peers[&wanted.public_key].allowed_ips, wanted.allowed_ips);
        assert_eq!(read.peers.len(), 1);
    }

    #[test]
    fn a_peer_that_goes_is_named_with_nothing_but_the_flag() {
        let key = PublicKey::new(KEY);
        let expected = vec![
            WireguardPeerAttribute::PublicKey(KEY),
            WireguardPeerAttribute::Flags(WireguardPeerFlags::RemoveMe),
        ];
        let batch = Batch { peers: vec![(key, WireguardPeer(expected))] };
        assert_eq!(batches(&[Change::RemovePeer(key), Change::SetUp]), [batch]);
    }
}
