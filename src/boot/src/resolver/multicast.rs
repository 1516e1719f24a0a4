//! mDNS (RFC 6762) and DNS-SD (RFC 6763): finding `NAME.local`, and the `_kcrypt._tcp` service on it, by
//! asking everybody on the link (`protocols/kcrypt.md` §10.6).
//!
//! A packet is lost now and then, so the query is repeated until the time is up, on every interface and over
//! both families. Nothing here is authenticated: whoever answers first is asked first, and it is TLS that tells
//! who it is.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use latchkey_wire::dns::{Data, Kind, Name, Response, multicast_query};
use nix::net::if_::{InterfaceFlags, if_nametoindex};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrIn, SockaddrIn6, bind, setsockopt, socket, sockopt,
};

const GROUP_V4: Ipv4Addr = Ipv4Addr::new(224, 0, 0, 251);
const GROUP_V6: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 0xfb);
const PORT: u16 = 5353;
/// What the key server's responder announces.
pub const SERVICE: &str = "_kcrypt._tcp.local";

/// The first repetition; each further pause is twice as long, up to the second of these.
const REPEAT: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(4));
/// Once there is an address, this long for more of them.
const MORE: Duration = Duration::from_millis(100);
/// A host that answers but announces no service is taken with the URL's port after this long.
const SERVICE_PATIENCE: Duration = Duration::from_millis(1500);
/// RFC 6762 §17.
const DATAGRAM: usize = 9000;
const MAX_INTERFACES: usize = 16;
/// Most that is remembered of what strangers announce.
const MAX_KNOWN: usize = 64;

/// What is looked for.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// A name that ends in `.local`.
    pub host: &'a Name,
    /// The port where no service says another.
    pub port: u16,
    /// Whether a [`SERVICE`] on the host may say which port it has.
    pub service: bool,
}

/// An interface that is up and takes multicast, for one family.
#[derive(Clone, Debug)]
struct Link {
    name: String,
    index: u32,
    /// An address of it, for IPv4.
    v4: Option<Ipv4Addr>,
}

impl Link {
    fn is_as(&self, other: &Self) -> bool {
        self.index == other.index && self.v4.is_some() == other.v4.is_some()
    }
}

/// Whether there is any interface to ask on.
#[must_use]
pub fn has_link() -> bool {
    !links().is_empty()
}

fn links() -> Vec<Link> {
    let all = match nix::ifaddrs::getifaddrs() {
        Ok(all) => all,
        Err(errno) => {
            log::debug!("listing the interfaces: {errno}");
            return Vec::new();
        }
    };
    let wanted =
        InterfaceFlags::IFF_UP | InterfaceFlags::IFF_MULTICAST | InterfaceFlags::IFF_RUNNING;
    let mut links: Vec<Link> = Vec::new();
    for interface in all.filter(|interface| interface.flags.contains(wanted)) {
        let Some(address) = interface.address else { continue };
        let v4 = address.as_sockaddr_in().map(SockaddrIn::ip);
        if v4.is_none() && address.as_sockaddr_in6().is_none() {
            continue;
        }
        let Ok(index) = if_nametoindex(interface.interface_name.as_str()) else { continue };
        let link = Link { name: interface.interface_name, index, v4 };
        if links.len() < 2 * MAX_INTERFACES && !links.iter().any(|known| known.is_as(&link)) {
            links.push(link);
        }
    }
    links
}

/// The addresses of the wanted host, with the port of its service.
///
/// # Errors
/// `TimedOut` when nobody answers before `until`.
pub fn find(wanted: Wanted<'_>, until: Instant) -> io::Result<Vec<SocketAddr>> {
    let service = Name::new(SERVICE).map_err(io::Error::other)?;
    let mut known = Known::default();
    let mut ears: Vec<Ear> = Vec::new();
    let (mut due, mut pause, mut round) = (Instant::now(), REPEAT.0, 0_u32);
    loop {
        let now = Instant::now();
        if let Some((found, since)) = known.verdict(wanted)
            && now >= (since + MORE).min(until)
        {
            return Ok(found);
        }
        if now >= until {
            let found = known.addresses(wanted.port);
            let asked: Vec<_> = ears.iter().map(|ear| ear.link.name.as_str()).collect();
            let asked: BTreeSet<_> = asked.into_iter().collect();
            let asked: Vec<_> = asked.into_iter().collect();
            let why = match asked.as_slice() {
                [] => "no interface is up to ask by mDNS on".into(),
                on => format!("nobody answered to mDNS on {}", on.join(", ")),
            };
            return if found.is_empty() {
                Err(io::Error::new(io::ErrorKind::TimedOut, why))
            } else {
                Ok(found)
            };
        }
        if now >= due || known.has_news() {
            // Interfaces come up while we wait.
            listen_on_new(&mut ears);
            let questions = known.questions(wanted, &service);
            // Every other time as an ordinary query, for responders that only know those.
            let query = multicast_query(&questions, round % 2 == 0);
            for ear in ears.iter().filter(|ear| ear.is_voice) {
                ear.say(&query);
            }
            (due, round) = (now + pause, round + 1);
            pause = (pause * 2).min(REPEAT.1);
        }
        let next = known.verdict(wanted).map(|(_, since)| since + MORE);
        let next = next.into_iter().chain([due, until, known.patience_ends()]).min();
        hear(&ears, next.unwrap_or(until), |response, link| {
            known.learn(response, wanted, &service, link);
        });
    }
}

fn listen_on_new(ears: &mut Vec<Ear>) {
    for link in links() {
        if ears.iter().any(|ear| ear.link.is_as(&link)) {
            continue;
        }
        for is_voice in [true, false] {
            match Ear::new(&link, is_voice) {
                Ok(ear) => ears.push(ear),
                Err(error) => log::debug!("mDNS on {}: {error}", link.name),
            }
        }
    }
}

/// A socket of one interface and one family: a voice with a port of its own, that is answered alone (RFC 6762
/// §6.7), or one that hears what is said to everybody.
struct Ear {
    link: Link,
    is_voice: bool,
    socket: UdpSocket,
}

impl Ear {
    fn new(link: &Link, is_voice: bool) -> io::Result<Self> {
        let family = if link.v4.is_some() { AddressFamily::Inet } else { AddressFamily::Inet6 };
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd: OwnedFd = socket(family, SockType::Datagram, flags, None)?;
        setsockopt(&fd, sockopt::BindToDevice, &link.name.clone().into())?;
        let port = if is_voice { 0 } else { PORT };
        if !is_voice {
            // A responder may run on this machine.
            setsockopt(&fd, sockopt::ReuseAddr, &true)?;
            setsockopt(&fd, sockopt::ReusePort, &true)?;
        }
        let raw = std::os::fd::AsRawFd::as_raw_fd(&fd);
        if link.v4.is_some() {
            bind(raw, &SockaddrIn::new(0, 0, 0, 0, port))?;
        } else {
            setsockopt(&fd, sockopt::Ipv6V6Only, &true)?;
            let any = SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, port, 0, 0);
            bind(raw, &SockaddrIn6::from(any))?;
        }
        let socket = UdpSocket::from(fd);
        match link.v4 {
            _ if is_voice => {}
            Some(address) => socket.join_multicast_v4(&GROUP_V4, &address)?,
            None => socket.join_multicast_v6(&GROUP_V6, link.index)?,
        }
        Ok(Self { link: link.clone(), is_voice, socket })
    }

    fn say(&self, query: &[u8]) {
        let group: SocketAddr = if self.link.v4.is_some() {
            (GROUP_V4, PORT).into()
        } else {
            SocketAddrV6::new(GROUP_V6, PORT, 0, self.link.index).into()
        };
        if let Err(error) = self.socket.send_to(query, group) {
            log::debug!("mDNS on {}: {error}", self.link.name);
        }
    }
}

fn hear(ears: &[Ear], until: Instant, mut learn: impl FnMut(&Response, u32)) {
    let left = until.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
    let mut fds: Vec<_> =
        ears.iter().map(|ear| PollFd::new(ear.socket.as_fd(), PollFlags::POLLIN)).collect();
    let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
    if let Err(errno) = poll(&mut fds, timeout) {
        log::debug!("poll: {errno}");
    }
    let mut buffer = [0; DATAGRAM];
    for ear in ears {
        // A flood must not keep us from the others.
        for _ in 0..16 {
            let Ok((length, from)) = ear.socket.recv_from(&mut buffer) else { break };
            // RFC 6762 §6: a responder sends from this port, and nobody without its privilege can.
            if from.port() != PORT {
                continue;
            }
            match Response::parse(buffer.get(..length).unwrap_or_default()) {
                Ok(response) => learn(&response, ear.link.index),
                Err(error) => log::debug!("mDNS from {from}: {error}"),
            }
        }
    }
}

/// What has been heard so far.
#[derive(Debug, Default)]
struct Known {
    /// The host's, each with the interface it was heard on.
    addresses: Vec<(IpAddr, u32)>,
    /// Instances of the service; the port of those that are on the host.
    services: Vec<(Name, Option<u16>)>,
    /// Instances that were named.
    instances: Vec<Name>,
    asked: usize,
    first: Option<Instant>,
}

/// Each thing once, and not more of them than [`MAX_KNOWN`].
fn remember<T: PartialEq>(known: &mut Vec<T>, one: T) {
    if known.len() < MAX_KNOWN && !known.contains(&one) {
        known.push(one);
    }
}

impl Known {
    /// Takes what a response says of the wanted host and of services, heard on the interface with this number.
    fn learn(&mut self, response: &Response, wanted: Wanted<'_>, service: &Name, link: u32) {
        if response.rcode != 0 {
            return;
        }
        for record in response.records.iter().filter(|record| record.ttl > 0) {
            match &record.data {
                Data::Address(address) if record.name == *wanted.host => {
                    remember(&mut self.addresses, (*address, link));
                }
                Data::Service { port, target } if record.name.is_below(service) => {
                    let on_host = (target == wanted.host).then_some(*port);
                    remember(&mut self.services, (record.name.clone(), on_host));
                }
                Data::Pointer(instance) if instance.is_below(service) => {
                    remember(&mut self.instances, instance.clone());
                }
                _ => {}
            }
        }
    }

    /// Whether a service was named that has not been asked about yet.
    fn has_news(&self) -> bool {
        self.instances.len() > self.asked
    }

    fn questions<'a>(&'a mut self, wanted: Wanted<'a>, service: &'a Name) -> Vec<(&'a Name, Kind)> {
        self.asked = self.instances.len();
        let mut questions = vec![(wanted.host, Kind::A), (wanted.host, Kind::Aaaa)];
        if wanted.service {
            questions.insert(0, (service, Kind::Ptr));
            let is_known = |instance: &Name| self.services.iter().any(|(of, _)| of == instance);
            let open = self.instances.iter().filter(|instance| !is_known(instance));
            questions.extend(open.take(8).map(|instance| (instance, Kind::Srv)));
        }
        questions
    }

    /// The host's addresses, and since when they are known; nothing while its service may still follow.
    fn verdict(&mut self, wanted: Wanted<'_>) -> Option<(Vec<SocketAddr>, Instant)> {
        if self.addresses(wanted.port).is_empty() {
            return None;
        }
        let since = *self.first.get_or_insert_with(Instant::now);
        if !wanted.service {
            return Some((self.addresses(wanted.port), since));
        }
        let ports: BTreeSet<u16> = self.services.iter().filter_map(|(_, port)| *port).collect();
        if ports.is_empty() {
            let found = self.addresses(wanted.port);
            return (since.elapsed() >= SERVICE_PATIENCE).then_some((found, since));
        }
        let found = ports.into_iter().flat_map(|port| self.addresses(port));
        Some((found.collect(), since))
    }

    /// When a host without a service is taken as it is.
    fn patience_ends(&self) -> Instant {
        let now = Instant::now();
        let ends = self.first.map(|first| first + SERVICE_PATIENCE);
        ends.filter(|ends| *ends > now).unwrap_or(now + REPEAT.1)
    }

    fn addresses(&self, port: u16) -> Vec<SocketAddr> {
        let mut found = Vec::new();
        for (address, link) in &self.addresses {
            let address = match address {
                // Such an address means something on its link only.
                IpAddr::V6(v6) if v6.is_unicast_link_local() => {
                    SocketAddrV6::new(*v6, port, 0, *link).into()
                }
                address => SocketAddr::new(*address, port),
            };
            if !found.contains(&address) {
                found.push(address);
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use latchkey_wire::dns::Record;

    use super::*;

    fn name(text: &str) -> Name {
        Name::new(text).unwrap()
    }

    fn response(records: Vec<(&str, u32, Data)>) -> Response {
        let record = |(of, ttl, data)| Record { name: name(of), ttl, data };
        let records = records.into_iter().map(record).collect();
        Response { id: 0, truncated: false, rcode: 0, questions: Vec::new(), records }
    }

    fn address(text: &str) -> Data {
        Data::Address(text.parse().unwrap())
    }

    fn service(port: u16, host: &str) -> Data {
        Data::Service { port, target: name(host) }
    }

    fn wanted(host: &Name, service: bool) -> Wanted<'_> {
        Wanted { host, port: 80, service }
    }

    #[test]
    fn a_service_says_the_port_of_its_own_host_only() {
        let (host, kind) = (name("KMS.local"), name(SERVICE));
        let wanted = wanted(&host, true);
        let mut known = Known::default();
        let first = response(vec![
            ("other._kcrypt._tcp.local", 9, service(1, "other.local")),
            ("x._http._tcp.local", 9, service(2, "kms.local")),
            ("gone._kcrypt._tcp.local", 0, service(3, "kms.local")),
            ("kms.local", 9, address("10.0.0.1")),
        ]);
        known.learn(&first, wanted, &kind, 1);
        assert!(known.verdict(wanted).is_none(), "the service may still follow");
        let second = response(vec![("a._kcrypt._tcp.local", 9, service(8082, "Kms.Local"))]);
        known.learn(&second, wanted, &kind, 1);
        let (found, _) = known.verdict(wanted).unwrap();
        assert_eq!(found, ["10.0.0.1:8082".parse().unwrap()]);
    }

    #[test]
    fn an_address_of_the_link_keeps_the_link_it_was_heard_on() {
        let host = name("kms.local");
        let mut known = Known::default();
        let records = vec![
            ("kms.local", 9, address("fe80::1")),
            ("kms.local", 9, address("fd00::1")),
            ("kms.local", 9, address("fd00::1")),
            ("sms.local", 9, address("fd00::2")),
        ];
        known.learn(&response(records), wanted(&host, false), &name(SERVICE), 7);
        let (found, _) = known.verdict(wanted(&host, false)).unwrap();
        let link = SocketAddrV6::new("fe80::1".parse().unwrap(), 80, 0, 7);
        assert_eq!(found, [link.into(), "[fd00::1]:80".parse().unwrap()]);
    }

    #[test]
    fn an_instance_without_a_place_is_asked_for_it() {
        let (host, kind) = (name("kms.local"), name(SERVICE));
        let wanted = wanted(&host, true);
        let mut known = Known::default();
        assert_eq!(known.questions(wanted, &kind).len(), 3);
        assert!(!known.has_news());
        let instance = name("a._kcrypt._tcp.local");
        let pointer = response(vec![(SERVICE, 9, Data::Pointer(instance.clone()))]);
        known.learn(&pointer, wanted, &kind, 1);
        assert!(known.has_news());
        assert!(known.questions(wanted, &kind).contains(&(&instance, Kind::Srv)));
        assert!(!known.has_news());
    }

    #[test]
    fn what_strangers_announce_is_bounded_and_does_not_crowd_out_the_host() {
        let (host, kind) = (name("kms.local"), name(SERVICE));
        let wanted = wanted(&host, false);
        let mut known = Known::default();
        let many = |of: fn(u32) -> String| -> Vec<Response> {
            let is = |number| format!("10.0.{}.{}", number / 250, number % 250);
            (0..1000).map(|number| response(vec![(&of(number), 9, address(&is(number)))])).collect()
        };
        for response in many(|number| format!("n{number}.local")) {
            known.learn(&response, wanted, &kind, 1);
        }
        assert!(known.verdict(wanted).is_none());
        for response in many(|_| "kms.local".to_owned()) {
            known.learn(&response, wanted, &kind, 1);
        }
        assert_eq!(known.verdict(wanted).unwrap().0.len(), MAX_KNOWN);
    }
}
