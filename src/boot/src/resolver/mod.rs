//! From a host's name to its addresses without the C library, whose resolver needs plug-ins (nss_dns,
//! nss_mdns) that no initramfs has: /etc/hosts, unicast DNS, mDNS.

pub mod files;
pub mod multicast;
pub mod unicast;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use latchkey_wire::dns::Name;

use files::{Files, NameService};

/// One look-up; whoever wants to know for longer asks again.
const PATIENCE: Duration = Duration::from_secs(5);
/// A name server gets this long for a name in `.local`, which most of them know nothing of.
const LOCAL_PATIENCE: Duration = Duration::from_secs(1);
/// How often the files are looked at while no name server is in them.
const TICK: Duration = Duration::from_millis(100);

/// The addresses of `host` (a name, or an address as text), each with `port`; those of both families by turns, IPv6
/// first, as RFC 8305 §4 has it. The hosts file goes before everything. With `mdns` a name in `.local` is looked
/// for by multicast alone, and its service may name another port; else by unicast DNS, and then by multicast.
///
/// # Errors
/// Why there is none, `TimedOut` at the latest at `deadline`.
pub fn resolve(
    files: &Files,
    host: &str,
    port: u16,
    mdns: bool,
    deadline: Instant,
) -> io::Result<Vec<SocketAddr>> {
    if let Ok(address) = host.parse::<IpAddr>() {
        return Ok(vec![SocketAddr::new(address, port)]);
    }
    let with_port = |found: Vec<IpAddr>| {
        by_turns(found).into_iter().map(|address| SocketAddr::new(address, port)).collect()
    };
    let known = files.in_hosts(host);
    if !known.is_empty() {
        return Ok(with_port(known));
    }
    let until = deadline.min(Instant::now() + PATIENCE);
    let name = Name::new(host).map_err(|error| invalid(host, &error))?;
    if !is_local(host) {
        return by_unicast(files, host, until).map(with_port);
    }
    let wanted = multicast::Wanted { host: &name, port, service: mdns };
    if !mdns {
        match by_unicast(files, host, until.min(Instant::now() + LOCAL_PATIENCE)) {
            Ok(found) => return Ok(with_port(found)),
            Err(error) => log::debug!("{host}: {error}; asking by mDNS"),
        }
    }
    multicast::find(wanted, until)
}

/// Whether `host` is a name for mDNS, RFC 6762 §3.
#[must_use]
pub fn is_local(host: &str) -> bool {
    let host = host.strip_suffix('.').unwrap_or(host);
    host.rsplit_once('.').is_some_and(|(_, last)| last.eq_ignore_ascii_case("local"))
}

fn by_unicast(files: &Files, host: &str, until: Instant) -> io::Result<Vec<IpAddr>> {
    let service = await_name_service(files, until);
    let mut last = io::Error::new(
        io::ErrorKind::NotFound,
        "no name server is known: none in /etc/resolv.conf, and none by DHCP",
    );
    if service.servers.is_empty() {
        return Err(last);
    }
    for candidate in candidates(host, &service.search) {
        let name = Name::new(&candidate).map_err(|error| invalid(&candidate, &error))?;
        match unicast::lookup(&name, &service.servers, until) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => last = error,
            done => return done,
        }
    }
    Err(last)
}

/// DHCP may be about to say which.
fn await_name_service(files: &Files, until: Instant) -> NameService {
    loop {
        let service = files.name_service();
        let left = until.saturating_duration_since(Instant::now());
        if !service.servers.is_empty() || left.is_zero() {
            return service;
        }
        std::thread::sleep(left.min(TICK));
    }
}

/// A name without a dot is one of the search domains' first; one with a dot is absolute first.
fn candidates(host: &str, search: &[String]) -> Vec<String> {
    if host.ends_with('.') {
        return vec![host.to_owned()];
    }
    let mut all: Vec<_> = search.iter().map(|domain| format!("{host}.{domain}")).collect();
    let place = if host.contains('.') { 0 } else { all.len() };
    all.insert(place, host.to_owned());
    all.retain(|name| Name::new(name).is_ok());
    all
}

/// The families by turns, beginning with IPv6.
fn by_turns(found: Vec<IpAddr>) -> Vec<IpAddr> {
    let (v6, v4): (Vec<_>, Vec<_>) = found.into_iter().partition(IpAddr::is_ipv6);
    let length = v6.len().max(v4.len());
    let (mut v6, mut v4) = (v6.into_iter(), v4.into_iter());
    (0..length).flat_map(|_| [v6.next(), v4.next()]).flatten().collect()
}

fn invalid(host: &str, error: &latchkey_wire::Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, format!("{host} is no host name: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_a_dot_is_tried_as_it_is_first() {
        let search = ["lan".to_owned(), "example.".to_owned()];
        assert_eq!(candidates("kms", &search), ["kms.lan", "kms.example.", "kms"]);
        assert_eq!(candidates("kms.dc1", &search), ["kms.dc1", "kms.dc1.lan", "kms.dc1.example."]);
        assert_eq!(candidates("kms.", &search), ["kms."]);
    }

    #[test]
    fn families_take_turns() {
        let all: Vec<IpAddr> =
            ["10.0.0.1", "10.0.0.2", "fd00::1"].map(|text| text.parse().unwrap()).to_vec();
        let turns: Vec<_> = by_turns(all).iter().map(ToString::to_string).collect();
        assert_eq!(turns, ["fd00::1", "10.0.0.1", "10.0.0.2"]);
    }

    #[test]
    fn local_is_the_last_label() {
        for (host, local) in [
            ("kms.local", true),
            ("KMS.LOCAL.", true),
            ("local", false),
            ("a.local.example", false),
        ] {
            assert_eq!(is_local(host), local, "{host}");
        }
    }
}
