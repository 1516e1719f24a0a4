//! Routes and addresses of the whole host by rtnetlink(7): what `ip route get` and `ip address` show.

use std::io;
use std::net::IpAddr;

use netlink_packet_core::NLM_F_DUMP;
use netlink_packet_route::address::AddressScope;
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteType};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use nix::libc;

use super::Netlink;
use super::link::{Links, own_address};

pub(crate) struct Routes {
    netlink: Netlink,
    links: Links,
}

impl Routes {
    pub(crate) fn open() -> io::Result<Self> {
        let netlink = Netlink::open(NETLINK_ROUTE)?;
        netlink.socket.set_netlink_get_strict_chk(true)?;
        Ok(Self { netlink, links: Links::open()? })
    }

    /// The source address that the kernel would take.
    pub(crate) fn source(
        &mut self,
        destination: Option<IpAddr>,
        without: &str,
    ) -> io::Result<Option<IpAddr>> {
        let without = self.links.get(without)?.map_or(0, |link| link.index);
        match destination {
            Some(destination) => self.source_towards(destination, without),
            None => Ok(None),
        }
    }

    fn source_towards(&mut self, destination: IpAddr, without: u32) -> io::Result<Option<IpAddr>> {
        let mut request = RouteMessage::default();
        request.header.address_family = family(destination);
        request.header.destination_prefix_length = if destination.is_ipv4() { 32 } else { 128 };
        request.attributes.push(RouteAttribute::Destination(destination.into()));
        let answers = match self.netlink.request(&RouteNetlinkMessage::GetRoute(request), 0) {
            Err(error) if is_no_way(&error) => return Ok(None),
            answers => answers?,
        };
        Ok(answers.into_iter().find_map(|answer| match answer {
            RouteNetlinkMessage::NewRoute(route)
                if matches!(route.header.kind, RouteType::Unicast | RouteType::Local)
                    && !route.attributes.contains(&RouteAttribute::Oif(without)) =>
            {
                route.attributes.iter().find_map(|attribute| match attribute {
                    RouteAttribute::PrefSource(address) => ip(address),
                    _ => None,
                })
            }
            _ => None,
        }))
    }

    pub(crate) fn address_of(&mut self, interface: &str) -> io::Result<Option<IpAddr>> {
        let Some(link) = self.links.get(interface)? else { return Ok(None) };
        let mut addresses: Vec<IpAddr> =
            self.links.addresses(link.index)?.into_iter().map(|own| own.address).collect();
        addresses.sort_by_key(IpAddr::is_ipv6);
        Ok(addresses.into_iter().next())
    }

    pub(crate) fn is_local(&mut self, address: IpAddr) -> io::Result<bool> {
        let request = RouteNetlinkMessage::GetAddress(Default::default());
        let answers = self.netlink.request(&request, NLM_F_DUMP)?;
        Ok(answers.iter().any(|answer| match answer {
            RouteNetlinkMessage::NewAddress(message) => {
                message.header.scope != AddressScope::Link && own_address(message) == Some(address)
            }
            _ => false,
        }))
    }
}

fn is_no_way(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ENETUNREACH | libc::EHOSTUNREACH | libc::EACCES | libc::EINVAL)
    )
}

fn family(address: IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(v4) => Some((*v4).into()),
        RouteAddress::Inet6(v6) => Some((*v6).into()),
        _ => None,
    }
}
