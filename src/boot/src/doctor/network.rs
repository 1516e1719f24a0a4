//! The network, as far as a key server is to be reached over it: links, addresses, routes, name servers.

use std::collections::BTreeMap;
use std::fs;
use std::net::IpAddr;
use std::path::Path;

use latchkey_config::Config;
use nix::ifaddrs::getifaddrs;

use super::report::Report;
use crate::dial::Endpoint;
use crate::resolver::files::Files;
use crate::{BootError, resolver};

/// No network.
const CODE: u8 = 20;
const NEED_NET: &str = "in the initramfs only rd.neednet=1 on the kernel command line brings it up";

pub(super) fn check(report: &mut Report<'_>, config: &Config) -> Result<(), BootError> {
    if config.challenger.servers.is_empty() {
        return report.ok("network", "not needed: the TPM alone unlocks");
    }
    let links = links();
    if links.is_empty() {
        return report.fail(
            CODE,
            "network",
            "the kernel has no network interface",
            "is the driver of the card in the initramfs?",
        );
    }
    let addresses = addresses();
    for link in &links {
        let what = format!("link {}", link.name);
        match addresses.get(&link.name) {
            _ if !link.has_carrier => {
                report.warn(what, link.state(), "is the cable in, and the port open?")?
            }
            None => report.warn(what, "up, and has no address", NEED_NET)?,
            Some(addresses) => report.ok(what, addresses.join(", "))?,
        }
    }
    if addresses.is_empty() {
        report.fail(
            CODE,
            "addresses",
            "none but those of the links themselves",
            format!("did DHCP answer? {NEED_NET}"),
        )?;
    }
    check_routes(report)?;
    check_name_servers(report, config)
}

struct Link {
    name: String,
    has_carrier: bool,
    operstate: String,
}

impl Link {
    fn state(&self) -> String {
        format!("no carrier ({})", self.operstate)
    }
}

/// The interfaces that may lead somewhere.
fn links() -> Vec<Link> {
    let Ok(entries) = fs::read_dir("/sys/class/net") else { return Vec::new() };
    let mut links: Vec<_> = entries
        .flatten()
        .filter(|entry| entry.path().join("address").exists())
        .map(|entry| {
            let read = |file: &str| {
                let text = fs::read_to_string(entry.path().join(file)).unwrap_or_default();
                text.trim().to_owned()
            };
            Link {
                name: entry.file_name().to_string_lossy().into_owned(),
                has_carrier: read("carrier") == "1",
                operstate: read("operstate"),
            }
        })
        .filter(|link| link.name != "lo")
        .collect();
    links.sort_by(|first, second| first.name.cmp(&second.name));
    links
}

/// What each interface is reachable at from beyond its link.
fn addresses() -> BTreeMap<String, Vec<String>> {
    let mut all: BTreeMap<_, Vec<_>> = BTreeMap::new();
    let Ok(found) = getifaddrs() else { return all };
    for interface in found {
        let Some(address) = interface.address else { continue };
        let ip: Option<IpAddr> = match (address.as_sockaddr_in(), address.as_sockaddr_in6()) {
            (Some(v4), _) => Some(v4.ip().into()),
            (_, Some(v6)) => Some(v6.ip().into()),
            _ => None,
        };
        if let Some(ip) = ip.filter(|ip| !is_local(ip)) {
            all.entry(interface.interface_name).or_default().push(ip.to_string());
        }
    }
    all
}

fn is_local(ip: &IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_loopback() || ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_loopback() || ip.is_unicast_link_local(),
    }
}

fn check_routes(report: &mut Report<'_>) -> Result<(), BootError> {
    let mut gateways = Vec::new();
    let v4 = fs::read_to_string("/proc/net/route").unwrap_or_default();
    // Interface, destination, …, mask as the eighth.
    if v4.lines().skip(1).any(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        fields.get(1) == Some(&"00000000") && fields.get(7) == Some(&"00000000")
    }) {
        gateways.push("IPv4");
    }
    let v6 = fs::read_to_string("/proc/net/ipv6_route").unwrap_or_default();
    // Destination, its length, …, interface as the last; `lo` has the one that rejects.
    if v6.lines().any(|line| {
        line.starts_with("00000000000000000000000000000000 00") && !line.ends_with(" lo")
    }) {
        gateways.push("IPv6");
    }
    if gateways.is_empty() {
        return report.warn(
            "default route",
            "none",
            "only servers on the machine's own networks can be reached; does DHCP name a router?",
        );
    }
    report.ok("default route", gateways.join(" and "))
}

fn check_name_servers(report: &mut Report<'_>, config: &Config) -> Result<(), BootError> {
    let hosts: Vec<_> = config.challenger.servers.iter().filter_map(|url| host(url)).collect();
    let named =
        hosts.iter().any(|host| host.parse::<IpAddr>().is_err() && !resolver::is_local(host));
    let servers = Files::default().name_service().servers;
    if servers.is_empty() && named {
        return report.warn(
            "name servers",
            "none, neither in /etc/resolv.conf nor by DHCP",
            "give challenger_server an address, or a second server by address",
        );
    }
    if servers.is_empty() {
        return report.ok("name servers", "none, and none is needed");
    }
    let servers: Vec<_> = servers.iter().map(|server| server.ip().to_string()).collect();
    report.ok("name servers", servers.join(", "))
}

fn host(url: &str) -> Option<String> {
    // The certificate is of no interest here.
    let authority = Endpoint::new(&insecure(url), None).ok()?.authority();
    let (host, _) = authority.rsplit_once(':')?;
    Some(host.trim_start_matches('[').trim_end_matches(']').to_owned())
}

fn insecure(url: &str) -> String {
    let (_, rest) = url.split_once("://").unwrap_or_default();
    format!("http://{rest}")
}

/// Whether this runs where the disk is not open yet.
pub(super) fn is_initramfs() -> bool {
    Path::new("/etc/initrd-release").exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_of_a_url_is_what_a_resolver_is_asked_for() {
        for (url, expected) in [
            ("https://kms.example:8082/x", "kms.example"),
            ("wss://[fd00::1]", "fd00::1"),
            ("http://10.0.2.2:1", "10.0.2.2"),
        ] {
            assert_eq!(host(url).as_deref(), Some(expected));
        }
    }
}
