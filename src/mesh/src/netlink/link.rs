//! Links and addresses by rtnetlink(7): what `ip link` and `ip address` do.

use std::io;
use std::net::IpAddr;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::address::{AddressAttribute, AddressMessage, AddressScope};
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;

use super::Netlink;
use crate::address::DeviceAddress;

/// The driver's name of a WireGuard link, and of one that a program carries.
pub(crate) const WIREGUARD: &str = "wireguard";
pub(crate) const TUN: &str = "tun";

pub(crate) struct Links(Netlink);

/// A link as the kernel has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Link {
    pub(crate) index: u32,
    /// The driver, such as `wireguard` or `dummy`; empty for hardware.
    pub(crate) kind: String,
    pub(crate) mtu: u32,
    pub(crate) up: bool,
}

impl Links {
    pub(crate) fn open() -> io::Result<Self> {
        let netlink = Netlink::open(NETLINK_ROUTE)?;
        // Then a dump of addresses can be asked for one link's alone.
        netlink.socket.set_netlink_get_strict_chk(true)?;
        Ok(Self(netlink))
    }

    pub(crate) fn get(&mut self, name: &str) -> io::Result<Option<Link>> {
        let mut request = LinkMessage::default();
        request.attributes.push(LinkAttribute::IfName(name.into()));
        let answers = match self.0.request(&RouteNetlinkMessage::GetLink(request), 0) {
            Err(error) if error.raw_os_error() == Some(nix::libc::ENODEV) => return Ok(None),
            answers => answers?,
        };
        Ok(answers.into_iter().find_map(|answer| match answer {
            RouteNetlinkMessage::NewLink(link) => Some(Link::from(link)),
            _ => None,
        }))
    }

    /// Makes a WireGuard link. The kernel loads the module if need be, whatever the caller's
    /// capabilities are.
    pub(crate) fn create_wireguard(&mut self, name: &str, mtu: u32) -> io::Result<()> {
        let mut request = LinkMessage::default();
        request.attributes = vec![
            LinkAttribute::IfName(name.into()),
            LinkAttribute::Mtu(mtu),
            LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Wireguard)]),
        ];
        self.0.request(&RouteNetlinkMessage::NewLink(request), NLM_F_CREATE | NLM_F_EXCL).map(drop)
    }

    pub(crate) fn delete(&mut self, index: u32) -> io::Result<()> {
        let mut request = LinkMessage::default();
        request.header.index = index;
        self.0.request(&RouteNetlinkMessage::DelLink(request), 0).map(drop)
    }

    pub(crate) fn set_mtu(&mut self, index: u32, mtu: u32) -> io::Result<()> {
        let mut request = LinkMessage::default();
        request.header.index = index;
        request.attributes.push(LinkAttribute::Mtu(mtu));
        self.0.request(&RouteNetlinkMessage::SetLink(request), 0).map(drop)
    }

    pub(crate) fn set_up(&mut self, index: u32) -> io::Result<()> {
        let mut request = LinkMessage::default();
        request.header.index = index;
        request.header.flags = LinkFlags::Up;
        request.header.change_mask = LinkFlags::Up; // without it the other flags would be cleared
        self.0.request(&RouteNetlinkMessage::SetLink(request), 0).map(drop)
    }

    /// The addresses of one link, without the link-local ones, which are the kernel's business.
    pub(crate) fn addresses(&mut self, index: u32) -> io::Result<Vec<DeviceAddress>> {
        let mut request = AddressMessage::default();
        request.header.index = index;
        let answers = self.0.request(&RouteNetlinkMessage::GetAddress(request), NLM_F_DUMP)?;
        Ok(answers
            .into_iter()
            .filter_map(|answer| match answer {
                RouteNetlinkMessage::NewAddress(address) if address.header.index == index => {
                    device_address(&address)
                }
                _ => None,
            })
            .collect())
    }

    pub(crate) fn add_address(&mut self, index: u32, address: DeviceAddress) -> io::Result<()> {
        let message = RouteNetlinkMessage::NewAddress(address_message(index, address));
        self.0.request(&message, NLM_F_CREATE | NLM_F_REPLACE).map(drop)
    }

    pub(crate) fn remove_address(&mut self, index: u32, address: DeviceAddress) -> io::Result<()> {
        self.0
            .request(&RouteNetlinkMessage::DelAddress(address_message(index, address)), 0)
            .map(drop)
    }
}

impl From<LinkMessage> for Link {
    fn from(message: LinkMessage) -> Self {
        let mut link = Self {
            index: message.header.index,
            kind: String::new(),
            mtu: 0,
            up: message.header.flags.contains(LinkFlags::Up),
        };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::Mtu(mtu) => link.mtu = mtu,
                LinkAttribute::LinkInfo(infos) => {
                    link.kind = infos.into_iter().find_map(kind).unwrap_or_default();
                }
                _ => {}
            }
        }
        link
    }
}

fn kind(info: LinkInfo) -> Option<String> {
    match info {
        LinkInfo::Kind(kind) => Some(kind.to_string()),
        _ => None,
    }
}

fn device_address(message: &AddressMessage) -> Option<DeviceAddress> {
    if message.header.scope == AddressScope::Link {
        return None;
    }
    let address = own_address(message)?;
    Some(DeviceAddress { address, prefix_length: message.header.prefix_len })
}

/// `Local` is the own address; only `Address` is there where the two are the same in IPv6.
pub(super) fn own_address(message: &AddressMessage) -> Option<IpAddr> {
    let own = |attribute: &AddressAttribute| match attribute {
        AddressAttribute::Local(address) => Some(*address),
        _ => None,
    };
    let either = |attribute: &AddressAttribute| match attribute {
        AddressAttribute::Address(address) => Some(*address),
        _ => None,
    };
    let attributes = &message.attributes;
    attributes.iter().find_map(own).or_else(|| attributes.iter().find_map(either))
}

fn address_message(
    index: u32,
    DeviceAddress { address, prefix_length }: DeviceAddress,
) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.index = index;
    message.header.prefix_len = prefix_length;
    message.header.family = match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    };
    // Both: with only one of them the kernel makes a point-to-point address out of it.
    message.attributes = vec![AddressAttribute::Local(address), AddressAttribute::Address(address)];
    message
}
