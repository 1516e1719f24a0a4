//! Where the others are told to reach this node, and whether a NAT is in between.
//!
//! What is decided, is decided by functions of addresses; what has to be asked (names, routes, interfaces), by [`resolve`]
//! alone.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use latchkey_config::mesh::value::unreachable;
use latchkey_wire::member::Cidr;
use tokio::net::lookup_host;
use tokio::time::timeout;

use crate::error::{Error, Result};
use crate::path;
use crate::settings::{Advertise, DEFAULT_KEEPALIVE, Keepalive, RegistrySettings, Settings};

/// For one name. glibc asks each server twice, five seconds each, if nobody stops it.
const LOOKUP: Duration = Duration::from_secs(5);
/// Addresses of one name that are looked at; DNS servers answer with a handful.
const MAX_ADDRESSES: usize = 16;

/// What goes into the own record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Advertised {
    pub address: IpAddr,
    /// The name that it was found under, where [`Advertise::Name`] is configured.
    pub name: Option<String>,
}

/// Looks up what [`Settings::advertise`] says. `known` is what it was so far: it stays as long as it is one of the right
/// answers, so that a name with several addresses makes no record flap. Names are asked for with a deadline.
///
/// # Errors
/// [`Error::Advertise`], and [`Error::Kernel`] if the kernel does not answer. All of them may pass.
pub async fn resolve(settings: &Settings, known: Option<&Advertised>) -> Result<Advertised> {
    let known = known.map(|known| known.address);
    match &settings.advertise {
        Advertise::Address(address) => Ok(Advertised { address: *address, name: None }),
        Advertise::Interface(interface) => {
            let found = path::interface_address(interface)?.into_iter().collect();
            let address = choose(found, &settings.mesh, known).ok_or_else(|| Error::Advertise {
                reason: format!(
                    "interface {interface} is not there, or has no global address outside the mesh; give it one, \
                     or configure advertise_address"
                ),
            })?;
            Ok(Advertised { address, name: None })
        }
        Advertise::Name(name) => {
            let found = addresses(name).await.map_err(|reason| Error::Advertise { reason })?;
            let told = found.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            let found = own_first(found, |address| path::is_local(address).unwrap_or(false));
            let address = choose(found, &settings.mesh, known).ok_or_else(|| Error::Advertise {
                reason: format!("{name} is {told}, and nobody reaches this node by that; correct its DNS records"),
            })?;
            Ok(Advertised { address, name: Some(name.clone()) })
        }
        Advertise::Route => {
            let address = by_route(settings, known).await?;
            Ok(Advertised { address, name: None })
        }
    }
}

/// The source of what this host sends to its registry, or else on its default route.
async fn by_route(settings: &Settings, known: Option<IpAddr>) -> Result<IpAddr> {
    let (servers, all_known) = match &settings.registry {
        Some(registry) => servers(registry).await,
        None => (Vec::new(), true),
    };
    if !all_known
        && let Some(known) = known
        && path::is_local(known)?
    {
        // No name server, no news.
        return Ok(known);
    }
    let mut found = Vec::new();
    for server in servers.into_iter().filter(|server| is_usable(*server, &settings.mesh)) {
        found.extend(path::own_address_towards(Some(server), &settings.interface)?);
    }
    if let Some(address) = choose(found, &settings.mesh, known) {
        return Ok(address);
    }
    let found = path::own_address_towards(None, &settings.interface)?.into_iter().collect();
    choose(found, &settings.mesh, known).ok_or_else(|| Error::Advertise {
        reason: "there is no way to the registry and no default route, outside the mesh; configure advertise_address or \
                 advertise_interface, or see to the network"
            .into(),
    })
}

/// The addresses of the registry's servers, and whether all of their names could be looked up.
async fn servers(registry: &RegistrySettings) -> (Vec<IpAddr>, bool) {
    let mut found = Vec::new();
    let mut all_known = true;
    for server in &registry.servers {
        match addresses(&server.host).await {
            Ok(addresses) => found.extend(addresses),
            Err(reason) => {
                log::debug!("{server}: {reason}");
                all_known = false;
            }
        }
    }
    (found, all_known)
}

/// What a name leads to. A literal is itself.
async fn addresses(host: &str) -> Result<Vec<IpAddr>, String> {
    if let Ok(address) = host.parse() {
        return Ok(vec![address]);
    }
    match timeout(LOOKUP, lookup_host((host, 0))).await {
        Err(_) => {
            Err(format!("no name server has answered for {host} within {} s", LOOKUP.as_secs()))
        }
        Ok(Err(error)) => Err(format!("cannot look {host} up: {error}")),
        Ok(Ok(found)) => {
            Ok(found.take(MAX_ADDRESSES).map(|address| address.ip().to_canonical()).collect())
        }
    }
}

/// An address by which others can reach this node without the mesh.
fn is_usable(address: IpAddr, mesh: &Cidr) -> bool {
    unreachable(address).is_none() && !mesh.contains(address)
}

/// The one to advertise: what it was so far, else the first that is usable.
fn choose(found: Vec<IpAddr>, mesh: &Cidr, known: Option<IpAddr>) -> Option<IpAddr> {
    let usable: Vec<IpAddr> =
        found.into_iter().filter(|address| is_usable(*address, mesh)).collect();
    known.filter(|known| usable.contains(known)).or_else(|| usable.first().copied())
}

/// This host's own before a NAT's, then IPv4 before IPv6: Ikto's agents know but the one, and more of them have IPv4. The order
/// that the resolver gives is for talking to a name, and changes with each answer.
fn own_first(mut found: Vec<IpAddr>, is_own: impl Fn(IpAddr) -> bool) -> Vec<IpAddr> {
    found.sort_by_key(|address| (!is_own(*address), address.is_ipv6(), *address));
    found
}

/// Whether this host is behind a NAT: the advertised address is none of its own, or a private one while a peer of the same
/// family advertises a public one. `peers` are the addresses that the others advertise.
pub fn behind_nat(
    advertised: IpAddr,
    is_own: bool,
    peers: impl IntoIterator<Item = IpAddr>,
) -> bool {
    let public_elsewhere = |peer: IpAddr| {
        peer.is_ipv4() == advertised.is_ipv4() && unreachable(peer).is_none() && !is_private(peer)
    };
    !is_own || is_private(advertised) && peers.into_iter().any(public_elsewhere)
}

/// Seconds between keepalives; 0 is off.
pub fn keepalive(setting: Keepalive, behind_nat: bool) -> u16 {
    match setting {
        Keepalive::Auto if behind_nat => DEFAULT_KEEPALIVE,
        Keepalive::Auto | Keepalive::Off => 0,
        Keepalive::Every(seconds) => seconds,
    }
}

/// Not routed in the Internet: RFC 1918, RFC 6598 (a provider's NAT), RFC 3927, RFC 4193, RFC 4291 §2.5.6.
fn is_private(address: IpAddr) -> bool {
    const SHARED: (Ipv4Addr, u8) = (Ipv4Addr::new(100, 64, 0, 0), 10);
    match address.to_canonical() {
        IpAddr::V4(v4) => {
            let shared =
                Cidr::new(SHARED.0.into(), SHARED.1).is_some_and(|range| range.contains(v4.into()));
            v4.is_private() || v4.is_link_local() || shared
        }
        IpAddr::V6(v6) => Ipv6Addr::is_unique_local(&v6) || v6.is_unicast_link_local(),
    }
}

#[cfg(test)]
mod tests;
