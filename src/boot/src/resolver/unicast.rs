//! A stub resolver (RFC 1035, RFC 3596): one name, both families, all name servers.
//!
//! The first name server has a small start before the second, and so on; a server that answers "no"
//! does not end the search while another may say yes. Each server has a socket of its own, connected,
//! so that the kernel drops what comes from elsewhere and reports a closed port.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use latchkey_wire::dns::{self, Kind, Name, Outcome, Response};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// How much earlier a name server is asked than the one after it.
const START: Duration = Duration::from_millis(250);
/// A query is repeated after this long, and then after twice as long as before.
const REPEAT: Duration = Duration::from_secs(1);
/// With addresses of one family, this long for the other (RFC 8305 §3 has 50 ms).
const OTHER_FAMILY: Duration = Duration::from_millis(50);
/// When one server says that there is no such name, the others have this long to know better.
const SECOND_OPINION: Duration = Duration::from_millis(750);
const TCP: Duration = Duration::from_secs(2);
/// Without EDNS a datagram has 512 bytes; some servers send more.
const DATAGRAM: usize = 4096;

const KINDS: [Kind; 2] = [Kind::Aaaa, Kind::A];

/// The addresses of `name`, IPv6 first.
///
/// # Errors
/// `NotFound` when the name has none, `TimedOut` when nobody said so before `until`, `Other` when all
/// servers failed.
pub fn lookup(name: &Name, servers: &[SocketAddr], until: Instant) -> io::Result<Vec<IpAddr>> {
    let began = Instant::now();
    let mut peers = Vec::new();
    let mut last = io::Error::new(io::ErrorKind::NotFound, "there is no name server yet");
    for address in servers {
        match Peer::new(*address, began + START * u32::try_from(peers.len()).unwrap_or(0)) {
            Ok(peer) => peers.push(peer),
            Err(error) => last = error,
        }
    }
    if peers.is_empty() {
        return Err(last);
    }
    let mut search = Search { name, peers, until, no_since: None, one_since: None };
    loop {
        if let Some(result) = search.verdict() {
            return result;
        }
        search.send_due();
        search.receive();
    }
}

struct Search<'a> {
    name: &'a Name,
    peers: Vec<Peer>,
    until: Instant,
    /// Since when a server has said no to everything, and since when one family is known.
    no_since: Option<Instant>,
    one_since: Option<Instant>,
}

/// A name server, and what it has said to each of [`KINDS`].
struct Peer {
    address: SocketAddr,
    socket: UdpSocket,
    ids: [u16; 2],
    said: [Option<Outcome>; 2],
    due: Instant,
    pause: Duration,
}

impl Peer {
    fn new(address: SocketAddr, due: Instant) -> io::Result<Self> {
        let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = UdpSocket::bind(any)?;
        socket.connect(address)?;
        socket.set_nonblocking(true)?;
        let mut random = [0; 4];
        getrandom::fill(&mut random).map_err(io::Error::from)?;
        let [a, b, c, d] = random;
        let ids = [u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d])];
        Ok(Self { address, socket, ids, said: [None, None], due, pause: REPEAT })
    }

    fn is_done(&self) -> bool {
        self.said.iter().all(Option::is_some)
    }

    fn fail(&mut self, error: &io::Error) {
        log::debug!("name server {}: {error}", self.address);
        for said in &mut self.said {
            said.get_or_insert(Outcome::Failed(0));
        }
    }

    fn send(&mut self, name: &Name) {
        for ((kind, id), said) in KINDS.iter().zip(self.ids).zip(self.said.clone()) {
            if said.is_none()
                && let Err(error) = self.socket.send(&dns::query(id, name, *kind))
            {
                return self.fail(&error);
            }
        }
        self.due = Instant::now() + self.pause;
        self.pause *= 2;
    }

    fn receive(&mut self, name: &Name, until: Instant) {
        let mut buffer = [0; DATAGRAM];
        // A flood must not keep us from the others.
        for _ in 0..16 {
            let length = match self.socket.recv(&mut buffer) {
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => return self.fail(&error),
            };
            match Response::parse(buffer.get(..length).unwrap_or_default()) {
                Ok(response) => self.take(&response, name, until),
                // A truncated answer may end in the middle of a record.
                Err(error) if buffer.get(2).is_some_and(|flags| flags & 2 != 0) => {
                    log::debug!("name server {}: {error}", self.address);
                    let [high, low] = [buffer[0], buffer[1]];
                    self.ask_by_tcp(u16::from_be_bytes([high, low]), name, until);
                }
                Err(error) => log::debug!("name server {}: {error}", self.address),
            }
        }
    }

    fn take(&mut self, response: &Response, name: &Name, until: Instant) {
        for (index, (kind, id)) in KINDS.into_iter().zip(self.ids).enumerate() {
            if !response.answers(id, name, kind) {
                continue;
            }
            if response.truncated {
                return self.ask_by_tcp(id, name, until);
            }
            if let Some(said) = self.said.get_mut(index) {
                said.get_or_insert(response.addresses(name));
            }
        }
    }

    fn ask_by_tcp(&mut self, id: u16, name: &Name, until: Instant) {
        for ((kind, of), said) in KINDS.iter().zip(self.ids).zip(&mut self.said) {
            if of == id && said.is_none() {
                let outcome = by_tcp(self.address, id, name, *kind, until);
                *said = Some(outcome.unwrap_or_else(|error| {
                    log::debug!("name server {} by TCP: {error}", self.address);
                    Outcome::Failed(0)
                }));
            }
        }
    }
}

impl Search<'_> {
    /// Whether it is known what came of it.
    fn verdict(&mut self) -> Option<io::Result<Vec<IpAddr>>> {
        let now = Instant::now();
        let of_kind = |index: usize| {
            self.peers.iter().find_map(move |peer| match peer.said.get(index) {
                Some(Some(Outcome::Found(found))) => Some(found.clone()),
                _ => None,
            })
        };
        let known = [of_kind(0), of_kind(1)];
        let found: Vec<IpAddr> = known.iter().flatten().flatten().copied().collect();
        let all_done = self.peers.iter().all(Peer::is_done);
        if !found.is_empty() {
            let since = *self.one_since.get_or_insert(now);
            // Whoever knows one family knows whether there is the other.
            let complete = known.iter().all(Option::is_some)
                || self.peers.iter().any(|peer| {
                    peer.is_done()
                        && peer.said.iter().any(|said| matches!(said, Some(Outcome::Found(_))))
                });
            let waited = now >= (since + OTHER_FAMILY).min(self.until);
            return (complete || all_done || waited).then_some(Ok(found));
        }
        let no = |peer: &Peer| peer.said.iter().all(|said| *said == Some(Outcome::NotFound));
        if self.peers.iter().any(no) {
            let since = *self.no_since.get_or_insert(now);
            if all_done || now >= (since + SECOND_OPINION).min(self.until) {
                let why = format!("no name server knows an address of {}", self.name);
                return Some(Err(io::Error::new(io::ErrorKind::NotFound, why)));
            }
        }
        let asked = || {
            let names: Vec<_> =
                self.peers.iter().map(|peer| peer.address.ip().to_string()).collect();
            names.join(", ")
        };
        if all_done {
            let why = format!("the name servers failed ({})", asked());
            return Some(Err(io::Error::other(why)));
        }
        (now >= self.until).then(|| {
            let why = format!("no answer of the name servers ({})", asked());
            Err(io::Error::new(io::ErrorKind::TimedOut, why))
        })
    }

    /// When those before it have all failed, a server need not wait for its turn.
    fn send_due(&mut self) {
        let now = Instant::now();
        let mut all_before_done = true;
        for peer in &mut self.peers {
            let first = peer.pause == REPEAT;
            if !peer.is_done() && (now >= peer.due || (first && all_before_done)) {
                peer.send(self.name);
            }
            all_before_done &= peer.is_done();
        }
    }

    fn receive(&mut self) {
        let open = || self.peers.iter().filter(|peer| !peer.is_done());
        let times = [
            Some(self.until),
            self.one_since.map(|since| since + OTHER_FAMILY),
            self.no_since.map(|since| since + SECOND_OPINION),
            open().map(|peer| peer.due).min(),
        ];
        let next = times.into_iter().flatten().min().unwrap_or(self.until);
        let left = next.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
        let mut fds: Vec<_> =
            open().map(|peer| PollFd::new(peer.socket.as_fd(), PollFlags::POLLIN)).collect();
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
        if let Err(errno) = poll(&mut fds, timeout) {
            log::debug!("poll: {errno}");
        }
        for peer in self.peers.iter_mut().filter(|peer| !peer.is_done()) {
            peer.receive(self.name, self.until);
        }
    }
}

/// The answer that did not fit into a datagram: RFC 7766, two bytes of length before each message.
fn by_tcp(
    server: SocketAddr,
    id: u16,
    name: &Name,
    kind: Kind,
    until: Instant,
) -> io::Result<Outcome> {
    let until = until.min(Instant::now() + TCP);
    let left = || {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(io::Error::from(io::ErrorKind::TimedOut)) } else { Ok(left) }
    };
    let mut stream = TcpStream::connect_timeout(&server, left()?)?;
    let query = dns::query(id, name, kind);
    let length = u16::try_from(query.len()).map_err(io::Error::other)?;
    stream.set_write_timeout(Some(left()?))?;
    stream.write_all(&[&length.to_be_bytes()[..], &query].concat())?;
    let mut answer = Vec::new();
    let mut wanted = 2;
    while answer.len() < wanted {
        let mut chunk = [0; DATAGRAM];
        stream.set_read_timeout(Some(left()?))?;
        let room = chunk.get_mut(..DATAGRAM.min(wanted - answer.len())).unwrap_or_default();
        let got = stream.read(room)?;
        if got == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        answer.extend(chunk.iter().take(got));
        if let (2, [high, low]) = (wanted, answer.as_slice()) {
            wanted += usize::from(u16::from_be_bytes([*high, *low]));
        }
    }
    let message = answer.get(2..).unwrap_or_default();
    let response = Response::parse(message).map_err(io::Error::other)?;
    if response.truncated || !response.answers(id, name, kind) {
        return Err(io::Error::other("it answers something else"));
    }
    Ok(response.addresses(name))
}
