//! The interfaces a responder answers on, and a socket for each.

use std::{
    collections::BTreeMap,
    fmt, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, UdpSocket},
};

use nix::{
    ifaddrs::getifaddrs,
    net::if_::{InterfaceFlags, if_nametoindex},
    sys::socket::SockaddrStorage,
};
use socket2::{Domain, InterfaceIndexOrAddress, Protocol, Socket, Type};

const PORT: u16 = 5353;
const GROUP_V4: Ipv4Addr = Ipv4Addr::new(224, 0, 0, 251);
const GROUP_V6: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 0xfb);

/// Most interfaces that are answered on: a host of containers may have thousands.
const MAX_LINKS: usize = 64;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Family {
    V4,
    V6,
}

impl Family {
    /// Where everybody on an interface is reached.
    pub(super) fn group(self, index: u32) -> SocketAddr {
        match self {
            Self::V4 => (GROUP_V4, PORT).into(),
            Self::V6 => SocketAddrV6::new(GROUP_V6, PORT, 0, index).into(),
        }
    }
}

/// An interface and a family.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Key {
    pub(super) name: String,
    pub(super) index: u32,
    pub(super) family: Family,
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let family = match self.family {
            Family::V4 => "IPv4",
            Family::V6 => "IPv6",
        };
        write!(f, "{} ({family})", self.name)
    }
}

/// What an interface has: addresses with their netmasks.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Link {
    networks: Vec<(IpAddr, IpAddr)>,
}

impl Link {
    /// The addresses to tell. An IPv6 address of the link alone is told if there is no other at all: clients that are
    /// told one do not know on which of their interfaces it is.
    pub(super) fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        let wide = self.networks.iter().any(|(address, _)| !is_of_link(*address));
        self.networks
            .iter()
            .map(|(address, _)| *address)
            .filter(move |address| !wide || !is_of_link(*address))
    }
}

fn is_of_link(address: IpAddr) -> bool {
    matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local())
}

/// Whether an address is one of the networks on an interface.
pub(super) fn on_link(link: &Link, from: IpAddr) -> bool {
    is_of_link(from)
        || link.networks.iter().any(|(address, mask)| match (address, mask, from) {
            (IpAddr::V4(address), IpAddr::V4(mask), IpAddr::V4(from)) => {
                address.to_bits() & mask.to_bits() == from.to_bits() & mask.to_bits()
            }
            (IpAddr::V6(address), IpAddr::V6(mask), IpAddr::V6(from)) => {
                address.to_bits() & mask.to_bits() == from.to_bits() & mask.to_bits()
            }
            _ => false,
        })
}

/// The interfaces that are up and take multicast. `only` is the one address that is listened on, if it is one.
pub(super) fn all(only: Option<IpAddr>) -> BTreeMap<Key, Link> {
    let interfaces = match getifaddrs() {
        Ok(interfaces) => interfaces,
        Err(error) => {
            log::warn!("mDNS: listing the interfaces failed: {error}");
            return BTreeMap::new();
        }
    };
    let wanted = InterfaceFlags::IFF_UP | InterfaceFlags::IFF_MULTICAST;
    let mut links: BTreeMap<String, Link> = BTreeMap::new();
    for interface in interfaces.filter(|interface| interface.flags.contains(wanted)) {
        let address = interface.address.as_ref().and_then(ip);
        let (Some(address), Some(mask)) = (address, interface.netmask.as_ref().and_then(ip)) else {
            continue;
        };
        if only.is_none_or(|only| only == address) {
            links.entry(interface.interface_name).or_default().networks.push((address, mask));
        }
    }
    let mut all = BTreeMap::new();
    for (name, link) in links.into_iter().take(MAX_LINKS) {
        let Ok(index) = if_nametoindex(name.as_str()) else { continue };
        let has = |v4: bool| link.networks.iter().any(|(address, _)| address.is_ipv4() == v4);
        for (family, there) in [(Family::V4, has(true)), (Family::V6, has(false))] {
            if there {
                all.insert(Key { name: name.clone(), index, family }, link.clone());
            }
        }
    }
    all
}

fn ip(address: &SockaddrStorage) -> Option<IpAddr> {
    let v4 = address.as_sockaddr_in().map(|v4| IpAddr::from(v4.ip()));
    v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::from(v6.ip())))
}

/// A socket that hears and speaks on one interface only.
pub(super) fn socket(key: &Key) -> io::Result<UdpSocket> {
    let domain = match key.family {
        Family::V4 => Domain::IPV4,
        Family::V6 => Domain::IPV6,
    };
    let socket = Socket::new(domain, Type::DGRAM, Some(Protocol::UDP))?;
    // Another responder may run here.
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.bind_device(Some(key.name.as_bytes()))?;
    socket.set_nonblocking(true)?;
    // RFC 6762 §11.
    match key.family {
        Family::V4 => {
            socket.set_multicast_ttl_v4(255)?;
            socket.set_ttl_v4(255)?;
            socket.bind(&SocketAddr::from((Ipv4Addr::UNSPECIFIED, PORT)).into())?;
            let index = InterfaceIndexOrAddress::Index(key.index);
            socket.join_multicast_v4_n(&GROUP_V4, &index)?;
        }
        Family::V6 => {
            socket.set_only_v6(true)?;
            socket.set_multicast_hops_v6(255)?;
            socket.set_unicast_hops_v6(255)?;
            socket.set_multicast_if_v6(key.index)?;
            socket.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, PORT)).into())?;
            socket.join_multicast_v6(&GROUP_V6, key.index)?;
        }
    }
    Ok(socket.into())
}
