//! The way to the others, as the kernel's routes tell it (rtnetlink(7)): which of our addresses they
//! see, and how large a packet may be. Nothing is sent to anyone.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::net::{IpAddr, Ipv6Addr};

use latchkey_wire::member::Cidr;

use crate::error::{Error, Result};
use crate::netlink::link::Links;
use crate::netlink::route::{Route, Routes};

/// What WireGuard takes off a path at most: 40 (IPv6) + 8 (UDP) + 32 (its own header and tag).
pub const OVERHEAD: u32 = 80;

/// What IPv6 demands of every link (RFC 8200 §5).
pub const MIN_MTU: u32 = 1280;

const MAX_MTU: u32 = 65_535 - OVERHEAD;

/// Where no route says anything.
const ETHERNET_MTU: u32 = 1500;

/// The MTU of a device whose peers are at `endpoints`: of the ways there, and of the default routes,
/// the narrowest decides. The device itself, `interface`, is no way.
pub fn mtu(endpoints: impl IntoIterator<Item = IpAddr>, interface: &str) -> Result<u32> {
    asked("read the routes to the peers", |routes| {
        let own = own_link(interface)?;
        let ways = Ways::new(&routes.all()?, &routes.link_mtus()?, own);
        Ok(ways.mtu(endpoints))
    })
}

/// The address from which this host reaches `destination`; without one, the default route, IPv4
/// before IPv6. None if there is no way, or only the one through `interface`, the mesh's own.
pub fn own_address_towards(destination: Option<IpAddr>, interface: &str) -> Result<Option<IpAddr>> {
    asked("find the own address", |routes| {
        let own = own_link(interface)?;
        match destination {
            Some(destination) => source_towards(routes, destination, own),
            None => source_by_default(routes, own),
        }
    })
}

/// The first global address of an interface, IPv4 before IPv6; none if it has none, or does not
/// exist. Temporary IPv6 addresses do not count.
pub fn interface_address(interface: &str) -> Result<Option<IpAddr>> {
    asked("read the addresses of the interface", |routes| {
        let Some(link) = own_link(interface)? else { return Ok(None) };
        let found = routes.addresses()?.into_iter().find(|address| address.link == link);
        Ok(found.map(|found| found.address))
    })
}

/// Whether an address is one of this host.
pub fn is_local(address: IpAddr) -> Result<bool> {
    asked("look for the address among the own ones", |routes| {
        Ok(routes.way(address)?.is_some_and(|way| way.is_local))
    })
}

fn asked<T>(action: &str, ask: impl FnOnce(&mut Routes) -> io::Result<T>) -> Result<T> {
    Routes::open()
        .and_then(|mut routes| ask(&mut routes))
        .map_err(|source| Error::Kernel { action: action.into(), source })
}

fn own_link(interface: &str) -> io::Result<Option<u32>> {
    Ok(Links::open()?.get(interface)?.map(|link| link.index))
}

fn source_towards(
    routes: &mut Routes,
    destination: IpAddr,
    own: Option<u32>,
) -> io::Result<Option<IpAddr>> {
    let way = routes.way(destination)?.filter(|way| Some(way.link) != own);
    // It may be here: then others know this host by that address.
    let source = way.and_then(|way| if way.is_local { Some(destination) } else { way.source });
    Ok(source.filter(|source| is_known_elsewhere(*source)))
}

fn source_by_default(routes: &mut Routes, own: Option<u32>) -> io::Result<Option<IpAddr>> {
    let mut defaults = routes.all()?;
    defaults.retain(|route| {
        route.destination.length() == 0
            && route.table == TABLE_MAIN
            && !route.links.iter().all(|link| Some(*link) == own)
    });
    defaults.sort_by_key(|route| (route.destination.address().is_ipv6(), route.priority));
    let addresses = routes.addresses()?;
    for route in defaults {
        let family = route.destination.address().is_ipv6();
        let source = match (route.source, route.gateway) {
            (Some(source), _) => Some(source),
            (None, Some(gateway)) if !is_link_local(gateway) => {
                source_towards(routes, gateway, own)?
            }
            _ => None,
        };
        let of_the_link = || {
            let is_there =
                |address: IpAddr, link| route.links.contains(&link) && address.is_ipv6() == family;
            addresses.iter().find(|found| is_there(found.address, found.link))
        };
        if let Some(source) = source.or_else(|| of_the_link().map(|found| found.address)) {
            return Ok(Some(source));
        }
    }
    Ok(None)
}

/// Where routes are put if nothing else is said.
const TABLE_MAIN: u32 = 254;

fn is_known_elsewhere(address: IpAddr) -> bool {
    !address.is_loopback() && !address.is_unspecified() && !is_link_local(address)
}

fn is_link_local(address: IpAddr) -> bool {
    matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local())
}

/// How large a packet may be, by destination.
struct Ways {
    by_destination: HashMap<Cidr, u32>,
    /// The lengths of the prefixes there are, the longest first.
    lengths: Vec<u8>,
}

impl Ways {
    fn new(routes: &[Route], link_mtus: &HashMap<u32, u32>, own: Option<u32>) -> Self {
        // Of one table, the route with the lowest priority number is taken. Which table is asked
        // depends on rules; so of several tables, the narrowest way counts.
        let mut best: HashMap<(Cidr, u32), &Route> = HashMap::new();
        let usable = |route: &&Route| route.links.iter().any(|link| Some(*link) != own);
        for route in routes.iter().filter(usable) {
            best.entry((route.destination.masked(), route.table))
                .and_modify(|best| {
                    if route.priority < best.priority {
                        *best = route;
                    }
                })
                .or_insert(route);
        }
        let mut by_destination = HashMap::new();
        for ((destination, _), route) in best {
            let links = route.links.iter().filter(|link| Some(**link) != own);
            let narrowest = links.filter_map(|link| link_mtus.get(link)).chain(&route.mtu).min();
            if let Some(mtu) = narrowest {
                by_destination
                    .entry(destination)
                    .and_modify(|known: &mut u32| *known = (*known).min(*mtu))
                    .or_insert(*mtu);
            }
        }
        let lengths: BTreeSet<u8> = by_destination.keys().map(Cidr::length).collect();
        Self { by_destination, lengths: lengths.into_iter().rev().collect() }
    }

    fn towards(&self, destination: IpAddr) -> Option<u32> {
        self.lengths.iter().find_map(|length| {
            let prefix = Cidr::new(destination, *length)?.masked();
            self.by_destination.get(&prefix).copied()
        })
    }

    fn mtu(&self, endpoints: impl IntoIterator<Item = IpAddr>) -> u32 {
        let everywhere: [IpAddr; 2] = [[0; 4].into(), Ipv6Addr::UNSPECIFIED.into()];
        let defaults = everywhere
            .into_iter()
            .filter_map(|everywhere| self.by_destination.get(&Cidr::new(everywhere, 0)?).copied());
        let narrowest = endpoints
            .into_iter()
            .filter_map(|endpoint| self.towards(endpoint.to_canonical()))
            .chain(defaults)
            .min();
        narrowest.unwrap_or(ETHERNET_MTU).saturating_sub(OVERHEAD).clamp(MIN_MTU, MAX_MTU)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ETH: u32 = 2;
    const JUMBO: u32 = 3;
    const TUNNEL: u32 = 4;
    const OWN: u32 = 5;

    fn route(destination: &str, link: u32) -> Route {
        Route {
            destination: destination.parse().unwrap(),
            table: TABLE_MAIN,
            priority: 0,
            links: vec![link],
            mtu: None,
            gateway: None,
            source: None,
        }
    }

    fn mtu(routes: &[Route], endpoints: &[&str]) -> u32 {
        let mtus = HashMap::from([(ETH, 1500), (JUMBO, 9000), (TUNNEL, 1400), (OWN, 1420)]);
        let endpoints = endpoints.iter().map(|endpoint| endpoint.parse().unwrap());
        Ways::new(routes, &mtus, Some(OWN)).mtu(endpoints)
    }

    #[test]
    fn the_narrowest_way_decides() {
        let default = || route("0.0.0.0/0", ETH);
        let with_mtu = |mtu| Route { mtu: Some(mtu), ..default() };
        let cases: &[(&str, &[Route], &[&str], u32)] = &[
            ("no route at all", &[], &["192.0.2.1"], 1420),
            ("the default route", &[default()], &[], 1420),
            ("a route's own MTU", &[with_mtu(1450)], &[], 1370),
            ("a route's own MTU, wider than the link", &[with_mtu(9000)], &[], 1420),
            ("IPv6's", &[default(), route("::/0", TUNNEL)], &[], 1320),
            (
                "a peer behind a tunnel",
                &[default(), route("10.0.0.0/8", TUNNEL)],
                &["192.0.2.1", "10.1.2.3"],
                1320,
            ),
            ("no peer there", &[default(), route("10.0.0.0/8", TUNNEL)], &["192.0.2.1"], 1420),
            (
                "the longest prefix",
                &[route("10.0.0.0/8", TUNNEL), route("10.1.0.0/16", JUMBO)],
                &["10.1.2.3"],
                8920,
            ),
            ("jumbo frames alone", &[route("10.0.0.0/8", JUMBO)], &["10.1.2.3"], 8920),
            ("not through the mesh itself", &[route("10.0.0.0/8", OWN)], &["10.1.2.3"], 1420),
            (
                "not through the mesh itself, but where it would go without",
                &[route("fd10::/16", OWN), route("::/0", JUMBO)],
                &["fd10::1"],
                8920,
            ),
            (
                "the lower metric",
                &[
                    Route { priority: 600, ..route("0.0.0.0/0", TUNNEL) },
                    Route { priority: 100, ..default() },
                ],
                &[],
                1420,
            ),
            (
                "of two tables, the narrower",
                &[Route { table: 52, ..route("10.0.0.0/8", TUNNEL) }, route("10.0.0.0/8", ETH)],
                &["10.1.2.3"],
                1320,
            ),
            (
                "spread over two links",
                &[Route { links: vec![JUMBO, ETH], ..route("10.0.0.0/8", 0) }],
                &["10.1.2.3"],
                1420,
            ),
            ("never below what IPv6 needs", &[with_mtu(576)], &[], 1280),
            ("IPv4 in IPv6", &[default(), route("10.0.0.0/8", TUNNEL)], &["::ffff:10.1.2.3"], 1320),
        ];
        for (what, routes, endpoints, expected) in cases {
            assert_eq!(mtu(routes, endpoints), *expected, "{what}");
        }
    }
}
