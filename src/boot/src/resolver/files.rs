//! What the machine has been told about names: hosts(5), resolv.conf(5), and where the network's own
//! services keep what DHCP said.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::path::{Path, PathBuf};

/// Most name servers asked. glibc asks three.
const MAX_SERVERS: usize = 6;
const MAX_SEARCH: usize = 6;
/// A hosts file that blocks advertisements has a few megabytes, and no place here.
const MAX_FILE: u64 = 1 << 20;
const PORT: u16 = 53;

/// The files that are read, anew for each look-up: DHCP may be quicker or slower than we are.
#[derive(Clone, Debug)]
pub struct Files {
    pub hosts: PathBuf,
    /// In the format of resolv.conf(5). What several say is put together.
    pub resolv_conf: Vec<PathBuf>,
    /// systemd-networkd's, for an initramfs where nobody hands its name servers on.
    pub networkd_state: PathBuf,
}

impl Default for Files {
    fn default() -> Self {
        Self {
            hosts: "/etc/hosts".into(),
            resolv_conf: vec![
                "/etc/resolv.conf".into(),
                "/run/systemd/resolve/resolv.conf".into(),
                "/run/NetworkManager/resolv.conf".into(),
            ],
            networkd_state: "/run/systemd/netif/state".into(),
        }
    }
}

/// Whom to ask, and what to append to a name without a dot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NameService {
    pub servers: Vec<SocketAddr>,
    pub search: Vec<String>,
}

impl Files {
    /// The addresses that the hosts file has for `host`.
    #[must_use]
    pub fn in_hosts(&self, host: &str) -> Vec<IpAddr> {
        addresses_of(&read(&self.hosts), host)
    }

    /// What all files together say.
    #[must_use]
    pub fn name_service(&self) -> NameService {
        let mut service = NameService::default();
        for path in &self.resolv_conf {
            service.add_resolv_conf(&read(path));
        }
        service.add_networkd_state(&read(&self.networkd_state));
        service.servers = distinct(service.servers, MAX_SERVERS);
        service.search = distinct(service.search, MAX_SEARCH);
        service
    }
}

impl NameService {
    fn add_resolv_conf(&mut self, text: &str) {
        for line in text.lines() {
            let mut words = line.split_ascii_whitespace();
            match words.next() {
                Some("nameserver") => self.servers.extend(words.next().and_then(server)),
                Some("search" | "domain") => self.search.extend(words.map(str::to_owned)),
                _ => {}
            }
        }
    }

    /// `DNS=ADDRESS[:PORT][%INTERFACE][#NAME] …`, `DOMAINS=NAME …`.
    fn add_networkd_state(&mut self, text: &str) {
        for line in text.lines() {
            match line.split_once('=') {
                Some(("DNS", servers)) => {
                    let words = servers.split_ascii_whitespace();
                    let plain = words.filter_map(|word| word.split('#').next());
                    self.servers.extend(plain.filter_map(server));
                }
                Some(("DOMAINS", domains)) => {
                    self.search.extend(domains.split_ascii_whitespace().map(str::to_owned));
                }
                _ => {}
            }
        }
    }
}

/// A name server's address, of a link with `%` and the interface's name or number.
fn server(text: &str) -> Option<SocketAddr> {
    if let Ok(address) = text.parse::<SocketAddr>() {
        return Some(address);
    }
    if let Some((address, zone)) = text.split_once('%') {
        let address: Ipv6Addr = address.parse().ok()?;
        let by_name = || nix::net::if_::if_nametoindex(zone).ok();
        let scope = zone.parse().ok().or_else(by_name)?;
        return Some(SocketAddrV6::new(address, PORT, 0, scope).into());
    }
    Some(SocketAddr::new(text.parse().ok()?, PORT))
}

fn addresses_of(hosts: &str, host: &str) -> Vec<IpAddr> {
    let host = host.strip_suffix('.').unwrap_or(host);
    let mut found = Vec::new();
    for line in hosts.lines() {
        let mut words = line.split('#').next().unwrap_or_default().split_ascii_whitespace();
        let address: Option<IpAddr> = words.next().and_then(|word| word.parse().ok());
        found.extend(address.filter(|_| words.any(|name| name.eq_ignore_ascii_case(host))));
    }
    distinct(found, usize::MAX)
}

/// A file that is not there, or is not text, says nothing.
fn read(path: &Path) -> String {
    let length = std::fs::metadata(path).map_or(0, |meta| meta.len());
    if length > MAX_FILE {
        log::warn!("{} has {length} bytes and is not read", path.display());
        return String::new();
    }
    std::fs::read_to_string(path).unwrap_or_default()
}

fn distinct<T: Ord + Clone>(all: Vec<T>, most: usize) -> Vec<T> {
    let mut seen = BTreeSet::new();
    all.into_iter().filter(|one| seen.insert(one.clone())).take(most).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolv_conf_and_networkds_state_are_put_together() {
        let mut service = NameService::default();
        service.add_resolv_conf(
            "# by hand\nnameserver 10.0.0.1\nsearch one.example two.example\n nameserver\tfd00::53 \nnameserver nonsense\noptions ndots:2\n",
        );
        service.add_networkd_state(
            "ADDRESS_STATE=routable\nDNS=10.0.0.2 10.0.0.3:5300#dns.example fe80::1%lo\nDOMAINS=three.example\n",
        );
        let servers: Vec<_> = service.servers.iter().map(ToString::to_string).collect();
        assert_eq!(
            servers,
            ["10.0.0.1:53", "[fd00::53]:53", "10.0.0.2:53", "10.0.0.3:5300", "[fe80::1%1]:53"]
        );
        assert_eq!(service.search, ["one.example", "two.example", "three.example"]);
    }

    #[test]
    fn a_hosts_file_has_comments_aliases_and_both_families() {
        let hosts = "127.0.0.1 localhost\n10.0.0.7\tkms.example KMS # the key server\n#10.0.0.8 kms\nfd00::7 kms\nx kms\n";
        let found = addresses_of(hosts, "kms.");
        assert_eq!(found, ["10.0.0.7".parse::<IpAddr>().unwrap(), "fd00::7".parse().unwrap()]);
        assert!(addresses_of(hosts, "km").is_empty());
    }
}
