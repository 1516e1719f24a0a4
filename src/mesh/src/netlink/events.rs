//! Changes of one interface and its addresses, and of the default routes, as rtnetlink(7) announces
//! them. That something changed is all that is taken from them: what it is now, the next look will
//! tell, and so a lost announcement does no harm either.

use std::io;

use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkMessage};
use netlink_packet_route::route::{RouteAttribute, RouteType};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use nix::libc;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::{BUFFER_SIZE, padded};

/// Of the routes only the default ones count: with them the own address changes, and where the peers
/// are. The many of a busy host are no reason to look; the next tick will.
const GROUPS: i32 = libc::RTMGRP_LINK
    | libc::RTMGRP_IPV4_IFADDR
    | libc::RTMGRP_IPV6_IFADDR
    | libc::RTMGRP_IPV4_ROUTE
    | RTMGRP_IPV6_ROUTE;

/// linux/rtnetlink.h.
const RTMGRP_IPV6_ROUTE: i32 = 0x400;

pub(crate) struct Events(AsyncFd<Socket>);

/// The interface whose events count: all the others of a busy host, containers say, do not.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Watched<'a> {
    pub(crate) name: &'a str,
    /// The number it has now. Made again, it has another, but then its name is announced too.
    pub(crate) index: u32,
}

impl Events {
    /// Needs the runtime.
    pub(crate) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind(&SocketAddr::new(0, GROUPS as u32))?;
        socket.set_non_blocking(true)?;
        // SAFETY: a Socket owns its descriptor, closes it when dropped and not before, and never
        // has another one. It is moved into the AsyncFd, which is only used by reference.
        #[allow(unsafe_code)]
        let registered = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) };
        registered.map(Self).map_err(io::Error::from)
    }

    /// Waits for the next change of the interface.
    pub(crate) async fn next(&self, watched: Watched<'_>) -> io::Result<()> {
        loop {
            let mut ready = self.0.readable().await?;
            match ready.try_io(|socket| receive(socket.get_ref(), watched)) {
                Ok(Ok(true)) => return Ok(()),
                Ok(Err(error)) => return Err(error),
                Ok(Ok(false)) | Err(_) => {}
            }
        }
    }

    /// Passes over what is waiting to be read.
    pub(crate) fn skip(&self, watched: Watched<'_>) -> io::Result<()> {
        loop {
            match receive(self.0.get_ref(), watched) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                received => received.map(drop)?,
            }
        }
    }
}

/// Reads one datagram; whether it concerns the interface.
fn receive(socket: &Socket, watched: Watched<'_>) -> io::Result<bool> {
    let mut buffer = Vec::with_capacity(BUFFER_SIZE);
    match socket.recv(&mut buffer, 0) {
        // Some were lost, of which interface nobody knows.
        Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => return Ok(true),
        received => received?,
    };
    let mut rest = buffer.as_slice();
    while !rest.is_empty() {
        // What cannot be read may well concern it.
        let Ok(message) = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest) else {
            return Ok(true);
        };
        if watched.concerned_by(&message.payload) {
            return Ok(true);
        }
        rest = rest.get(padded(message.header.length)..).unwrap_or_default();
    }
    Ok(false)
}

impl Watched<'_> {
    fn concerned_by(self, payload: &NetlinkPayload<RouteNetlinkMessage>) -> bool {
        let NetlinkPayload::InnerMessage(message) = payload else { return false };
        match message {
            RouteNetlinkMessage::NewLink(link) | RouteNetlinkMessage::DelLink(link) => {
                link.header.index == self.index || self.is_name_of(link)
            }
            RouteNetlinkMessage::NewAddress(address) | RouteNetlinkMessage::DelAddress(address) => {
                address.header.index == self.index
            }
            RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route) => {
                route.header.destination_prefix_length == 0
                    && route.header.kind == RouteType::Unicast
                    && !route.attributes.contains(&RouteAttribute::Oif(self.index))
            }
            _ => false,
        }
    }

    fn is_name_of(self, link: &LinkMessage) -> bool {
        let name = |attribute: &LinkAttribute| match attribute {
            LinkAttribute::IfName(name) => name == self.name,
            _ => false,
        };
        link.attributes.iter().any(name)
    }
}

#[cfg(test)]
mod tests {
    use netlink_packet_route::address::AddressMessage;
    use netlink_packet_route::route::RouteMessage;

    use super::*;

    const WATCHED: Watched<'_> = Watched { name: "wg-latchkey", index: 7 };

    fn link(index: u32, name: &str) -> LinkMessage {
        let mut link = LinkMessage::default();
        link.header.index = index;
        link.attributes = vec![LinkAttribute::Mtu(1420), LinkAttribute::IfName(name.into())];
        link
    }

    fn route(length: u8, index: u32) -> RouteMessage {
        let mut route = RouteMessage::default();
        route.header.destination_prefix_length = length;
        route.header.kind = RouteType::Unicast;
        route.attributes = vec![RouteAttribute::Oif(index)];
        route
    }

    fn address(index: u32) -> AddressMessage {
        let mut address = AddressMessage::default();
        address.header.index = index;
        address
    }

    #[test]
    fn only_the_own_interface_and_the_default_routes_count() {
        use RouteNetlinkMessage::{DelAddress, DelLink, DelRoute, NewAddress, NewLink, NewRoute};
        let cases = [
            (NewLink(link(7, "wg-latchkey")), true),
            (DelLink(link(7, "wg-latchkey")), true),
            (NewLink(link(7, "renamed")), true),
            (NewLink(link(8, "wg-latchkey")), true), // made again
            (NewLink(link(8, "veth0")), false),
            (DelLink(link(8, "wg-latchkey2")), false),
            (NewAddress(address(7)), true),
            (DelAddress(address(7)), true),
            (NewAddress(address(8)), false),
            (NewRoute(route(0, 8)), true),
            (DelRoute(route(0, 8)), true),
            (NewRoute(route(0, 7)), false),
            (NewRoute(route(24, 8)), false),
            (DelRoute(route(16, 7)), false),
        ];
        for (message, counts) in cases {
            let payload = NetlinkPayload::InnerMessage(message);
            assert_eq!(WATCHED.concerned_by(&payload), counts, "{payload:?}");
        }
    }
}
