//! WireGuard devices by generic netlink: family `wireguard`, version 1
//! (include/uapi/linux/wireguard.h), what wg(8) speaks.

use std::collections::BTreeMap;
use std::io;
use std::time::{Duration, SystemTime};

use latchkey_wire::member::Cidr;
use netlink_packet_core::NLM_F_DUMP;
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
use crate::key::{PrivateKey, PublicKey};
use crate::plan::{Peer, PeerChange};

const FAMILY: &str = "wireguard";

pub(crate) struct WireGuard {
    netlink: Netlink,
    family: u16,
}

/// A WireGuard device as the kernel has it.
#[derive(Debug, Default)]
pub(crate) struct WireGuardDevice {
    /// None as long as no key was set.
    pub(crate) private_key: Option<PrivateKey>,
    pub(crate) public_key: Option<PublicKey>,
    /// 0 as long as none was set and the link is down.
    pub(crate) port: u16,
    pub(crate) peers: BTreeMap<PublicKey, Peer>,
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
        Ok(Self { netlink, family })
    }

    /// # Errors
    /// `PermissionDenied` without CAP_NET_ADMIN: the answer has the private key in it.
    pub(crate) fn get(&mut self, index: u32) -> io::Result<WireGuardDevice> {
        let request =
            self.message(WireguardCmd::GetDevice, vec![WireguardAttribute::IfIndex(index)]);
        let answers = self.netlink.request(&request, NLM_F_DUMP)?;
        let mut device = WireGuardDevice::default();
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
        let result = self.netlink.request(&request, 0).map(drop);
        for attribute in &mut request.payload.attributes {
            if let WireguardAttribute::PrivateKey(bytes) = attribute {
                bytes.zeroize();
            }
        }
        result
    }

    /// One peer at a time.
    pub(crate) fn set_peer(&mut self, index: u32, change: &PeerChange) -> io::Result<()> {
        let mut attributes = vec![WireguardPeerAttribute::PublicKey(*change.public_key.as_bytes())];
        if change.replace_allowed_ips {
            attributes.push(WireguardPeerAttribute::Flags(WireguardPeerFlags::ReplaceAllowedIps));
        }
        attributes.extend(change.endpoint.map(WireguardPeerAttribute::Endpoint));
        attributes.extend(change.keepalive.map(WireguardPeerAttribute::PersistentKeepalive));
        let ips = change.allowed_ips.iter().map(|ip| {
            WireguardAllowedIp(vec![
                WireguardAllowedIpAttr::Family(match ip.address() {
                    std::net::IpAddr::V4(_) => WireguardAddressFamily::Ipv4,
                    std::net::IpAddr::V6(_) => WireguardAddressFamily::Ipv6,
                }),
                WireguardAllowedIpAttr::IpAddr(ip.address()),
                WireguardAllowedIpAttr::Cidr(ip.length()),
            ])
        });
        attributes.push(WireguardPeerAttribute::AllowedIps(ips.collect()));
        self.set_peers(index, vec![WireguardPeer(attributes)])
    }

    pub(crate) fn remove_peer(&mut self, index: u32, key: &PublicKey) -> io::Result<()> {
        let attributes = vec![
            WireguardPeerAttribute::PublicKey(*key.as_bytes()),
            WireguardPeerAttribute::Flags(WireguardPeerFlags::RemoveMe),
        ];
        self.set_peers(index, vec![WireguardPeer(attributes)])
    }

    fn set_peers(&mut self, index: u32, peers: Vec<WireguardPeer>) -> io::Result<()> {
        let attributes = vec![WireguardAttribute::IfIndex(index), WireguardAttribute::Peers(peers)];
        let request = self.message(WireguardCmd::SetDevice, attributes);
        self.netlink.request(&request, 0).map(drop)
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

impl WireGuardDevice {
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

#[cfg(test)]
mod tests {
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
        let mut device = WireGuardDevice::default();
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
        let mut device = WireGuardDevice::default();
        device.take_peer(&mut WireguardPeer(vec![
            WireguardPeerAttribute::PublicKey(KEY),
            handshake(0),
        ]));
        assert_eq!(device.peers.values().next().unwrap().last_handshake, None);
    }

    #[test]
    fn keys_are_taken_and_wiped() {
        let mut device = WireGuardDevice::default();
        let mut answer = WireguardAttribute::PrivateKey(KEY);
        device.take(&mut answer);
        assert_eq!(device.private_key.unwrap().public(), PrivateKey::new(&KEY).public());
        assert_eq!(answer, WireguardAttribute::PrivateKey([0; 32]));
    }

    #[test]
    fn a_key_of_zeros_is_none() {
        let mut device = WireGuardDevice::default();
        device.take(&mut WireguardAttribute::PrivateKey([0; 32]));
        assert!(device.private_key.is_none());
    }
}
