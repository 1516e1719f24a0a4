//! Routes, links and addresses of the whole host by rtnetlink(7): what `ip route` and `ip address`
//! show.

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;

use latchkey_wire::member::Cidr;
use netlink_packet_core::NLM_F_DUMP;
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope,
};
use netlink_packet_route::link::{LinkAttribute, LinkMessage};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use nix::libc;

use super::Netlink;
use super::link::own_address;

/// What belongs to this host itself (`ip route show table local`).
const TABLE_LOCAL: u32 = 255;

pub(crate) struct Routes(Netlink);

/// A way that packets may take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Route {
    pub(crate) destination: Cidr,
    pub(crate) table: u32,
    /// Of two routes of one table the lower one is taken.
    pub(crate) priority: u32,
    /// The links it goes out by; several, if the traffic is spread.
    pub(crate) links: Vec<u32>,
    /// What the route says itself.
    pub(crate) mtu: Option<u32>,
    pub(crate) gateway: Option<IpAddr>,
    pub(crate) source: Option<IpAddr>,
}

/// Where packets for one destination go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Way {
    pub(crate) link: u32,
    pub(crate) source: Option<IpAddr>,
    /// To this host itself.
    pub(crate) is_local: bool,
}

/// An address of this host that others may be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Address {
    pub(crate) link: u32,
    pub(crate) address: IpAddr,
}

impl Routes {
    pub(crate) fn open() -> io::Result<Self> {
        let netlink = Netlink::open(NETLINK_ROUTE)?;
        // Then a dump can be asked for some routes alone.
        netlink.socket.set_netlink_get_strict_chk(true)?;
        Ok(Self(netlink))
    }

    /// What the kernel would do with a packet; `None` if it has no way.
    pub(crate) fn way(&mut self, destination: IpAddr) -> io::Result<Option<Way>> {
        let mut request = RouteMessage::default();
        request.header.address_family = family(destination);
        request.header.destination_prefix_length = if destination.is_ipv4() { 32 } else { 128 };
        request.attributes.push(RouteAttribute::Destination(destination.into()));
        let answers = match self.0.request(&RouteNetlinkMessage::GetRoute(request), 0) {
            Err(error) if is_no_way(&error) => return Ok(None),
            answers => answers?,
        };
        Ok(answers.into_iter().find_map(|answer| match answer {
            RouteNetlinkMessage::NewRoute(route) => way(&route),
            _ => None,
        }))
    }

    /// All unicast routes of all tables, without those to this host itself.
    pub(crate) fn all(&mut self) -> io::Result<Vec<Route>> {
        let mut routes = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut request = RouteMessage::default();
            request.header.address_family = family;
            request.header.kind = RouteType::Unicast;
            let answers =
                self.0.dump(&RouteNetlinkMessage::GetRoute(request), |answer| match answer {
                    RouteNetlinkMessage::NewRoute(message) => route(&message),
                    _ => None,
                });
            match answers {
                Ok(answers) => routes.extend(answers),
                // Without IPv6.
                Err(error) if is_no_way(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(routes)
    }

    /// The MTU of each link, by its number.
    pub(crate) fn link_mtus(&mut self) -> io::Result<HashMap<u32, u32>> {
        let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
        let mtus = self.0.dump(&request, |answer| match answer {
            RouteNetlinkMessage::NewLink(link) => {
                link.attributes.iter().find_map(|attribute| match attribute {
                    LinkAttribute::Mtu(mtu) => Some((link.header.index, *mtu)),
                    _ => None,
                })
            }
            _ => None,
        })?;
        Ok(mtus.into_iter().collect())
    }

    /// This host's addresses that are known beyond one link and are there to stay, IPv4 before
    /// IPv6, else in the kernel's order.
    pub(crate) fn addresses(&mut self) -> io::Result<Vec<Address>> {
        let request = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        let mut addresses = self.0.dump(&request, |answer| match answer {
            RouteNetlinkMessage::NewAddress(message) if is_lasting(&message) => {
                let address = own_address(&message)?;
                Some(Address { link: message.header.index, address })
            }
            _ => None,
        })?;
        addresses.sort_by_key(|found| found.address.is_ipv6());
        Ok(addresses)
    }
}

impl Netlink {
    /// Asks for all there is and keeps what `keep` makes of it. An answer that cannot be understood
    /// is passed over: it is about something unusual, and one of many.
    fn dump<T>(
        &mut self,
        request: &RouteNetlinkMessage,
        mut keep: impl FnMut(RouteNetlinkMessage) -> Option<T>,
    ) -> io::Result<Vec<T>> {
        self.repeat(request, NLM_F_DUMP, |answer| Ok(answer.ok().and_then(&mut keep)))
    }
}

/// No route, or no such family of addresses.
fn is_no_way(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(
            libc::ENETUNREACH
                | libc::EHOSTUNREACH
                | libc::EACCES
                | libc::EINVAL
                | libc::EAFNOSUPPORT
                | libc::EOPNOTSUPP
        )
    )
}

fn way(route: &RouteMessage) -> Option<Way> {
    let is_local = route.header.kind == RouteType::Local;
    if !is_local && route.header.kind != RouteType::Unicast {
        return None;
    }
    let mut way = Way { link: 0, source: None, is_local };
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Oif(link) => way.link = *link,
            RouteAttribute::PrefSource(address) => way.source = ip(address),
            _ => {}
        }
    }
    Some(way)
}

fn route(message: &RouteMessage) -> Option<Route> {
    let RouteHeader { address_family, destination_prefix_length, table, kind, flags, .. } =
        message.header;
    // What the kernel has learned of single destinations comes and goes.
    if kind != RouteType::Unicast || flags.contains(RouteFlags::Cloned) {
        return None;
    }
    let everywhere: IpAddr = match address_family {
        AddressFamily::Inet => [0; 4].into(),
        AddressFamily::Inet6 => [0u8; 16].into(),
        _ => return None,
    };
    let mut route = Route {
        destination: Cidr::new(everywhere, destination_prefix_length)?,
        table: table.into(),
        priority: 0,
        links: Vec::new(),
        mtu: None,
        gateway: None,
        source: None,
    };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => {
                route.destination = Cidr::new(ip(address)?, destination_prefix_length)?;
            }
            RouteAttribute::Table(table) => route.table = *table,
            RouteAttribute::Priority(priority) => route.priority = *priority,
            RouteAttribute::Oif(link) => route.links.push(*link),
            RouteAttribute::MultiPath(hops) => {
                route.links.extend(hops.iter().map(|hop| hop.interface_index));
            }
            RouteAttribute::Metrics(metrics) => {
                route.mtu = metrics.iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(mtu) if *mtu > 0 => Some(*mtu),
                    _ => None,
                });
            }
            RouteAttribute::Gateway(address) => route.gateway = ip(address),
            RouteAttribute::PrefSource(address) => route.source = ip(address),
            _ => {}
        }
    }
    (route.table != TABLE_LOCAL).then_some(route)
}

fn is_lasting(message: &AddressMessage) -> bool {
    let passing = AddressFlags::Secondary // in IPv6: temporary (RFC 8981)
        | AddressFlags::Tentative
        | AddressFlags::Dadfailed
        | AddressFlags::Deprecated;
    let is_ipv6 = message.header.family == AddressFamily::Inet6;
    let flags = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Flags(flags) => Some(*flags),
        _ => None,
    });
    let flags = flags.unwrap_or(AddressFlags::from_bits_retain(
        AddressHeaderFlags::bits(&message.header.flags).into(),
    ));
    matches!(message.header.scope, AddressScope::Universe | AddressScope::Site)
        && !(is_ipv6 && flags.intersects(passing))
}

fn family(address: IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

pub(super) fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(v4) => Some((*v4).into()),
        RouteAddress::Inet6(v6) => Some((*v6).into()),
        _ => None,
    }
}
