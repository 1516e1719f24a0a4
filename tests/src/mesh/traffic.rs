//! Traffic over the overlay: a host that sends back what it gets, and a numbered stream that shows what was lost.

use std::{
    collections::BTreeSet,
    io::{ErrorKind, Read, Write},
    net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use super::{PATIENCE, namespace::Namespace};
use crate::error::{Doing, Error, Result};

/// The port of RFC 862.
const ECHO: u16 = 7;
/// How often the threads look whether they are still wanted.
const LOOK: Duration = Duration::from_millis(100);
/// More than any tunnel's MTU, so that segments of full length travel too.
const TCP_BYTES: usize = 64 << 10;

/// Sends back what comes by UDP and TCP, on every address of a host, until dropped.
#[derive(Debug)]
pub(super) struct Echo {
    wanted: Arc<AtomicBool>,
}

impl Echo {
    pub(super) fn start(host: &Namespace) -> Result<Self> {
        let any = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), ECHO);
        let open = || UdpSocket::bind(any).and_then(|udp| Ok((udp, TcpListener::bind(any)?)));
        let (udp, tcp) = host.within(open)?.doing(|| "listen in a host".into())?;
        udp.set_read_timeout(Some(LOOK)).doing(|| "listen in a host".into())?;
        tcp.set_nonblocking(true).doing(|| "listen in a host".into())?;
        let wanted = Arc::new(AtomicBool::new(true));
        let (on_udp, on_tcp) = (wanted.clone(), wanted.clone());
        thread::spawn(move || {
            let mut packet = [0; 2048];
            while on_udp.load(Ordering::Relaxed) {
                if let Ok((length, from)) = udp.recv_from(&mut packet) {
                    // Who sent it counts what does not come back.
                    let _ = udp.send_to(packet.get(..length).unwrap_or_default(), from);
                }
            }
        });
        thread::spawn(move || {
            while on_tcp.load(Ordering::Relaxed) {
                match tcp.accept() {
                    Ok((client, _)) => drop(thread::spawn(move || send_back(client))),
                    Err(_) => thread::sleep(LOOK),
                }
            }
        });
        Ok(Self { wanted })
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.wanted.store(false, Ordering::Relaxed);
    }
}

fn send_back(mut client: TcpStream) -> std::io::Result<()> {
    client.set_nonblocking(false)?;
    client.set_read_timeout(Some(PATIENCE))?;
    client.set_write_timeout(Some(PATIENCE))?;
    let mut buffer = [0; 16 << 10];
    loop {
        match client.read(&mut buffer)? {
            0 => return Ok(()),
            length => client.write_all(buffer.get(..length).unwrap_or_default())?,
        }
    }
}

/// One packet there and back within this time.
pub(super) fn answers(from: &Namespace, to: IpAddr, within: Duration) -> Result<bool> {
    let (socket, to) = socket_towards(from, to)?;
    let deadline = Instant::now() + within;
    let mut number = 0u64;
    while Instant::now() < deadline {
        number += 1;
        // Without a route or a handshake there is an error at once, which may pass.
        if socket.send_to(&number.to_be_bytes(), to).is_err() {
            thread::sleep(LOOK);
        } else if numbers(&socket).is_some() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// TCP there and back, in segments of full length.
pub(super) fn carries_tcp(from: &Namespace, to: IpAddr) -> Result<()> {
    let what = || format!("send {TCP_BYTES} bytes over TCP to {to} and back");
    let address = SocketAddr::new(to, ECHO);
    let stream = from.within(|| TcpStream::connect_timeout(&address, PATIENCE))?.doing(what)?;
    stream.set_read_timeout(Some(PATIENCE)).doing(what)?;
    stream.set_write_timeout(Some(PATIENCE)).doing(what)?;
    let sent: Vec<u8> = (0..TCP_BYTES).map(|n| (n % 251) as u8).collect();
    let mut back = vec![0; sent.len()];
    let (mut reader, mut writer) = (&stream, &stream);
    let (wrote, read) = thread::scope(|scope| {
        let writing = scope.spawn(|| writer.write_all(&sent));
        let read = reader.read_exact(&mut back);
        (writing.join(), read)
    });
    wrote.unwrap_or(Err(ErrorKind::Other.into())).and(read).doing(what)?;
    if back == sent { Ok(()) } else { Err(Error::Setup(format!("{to} sent back other bytes"))) }
}

/// Numbered packets there and back, 50 in a second, until it is finished.
#[derive(Debug)]
pub struct Stream {
    wanted: Arc<AtomicBool>,
    returned: Arc<AtomicU64>,
    thread: Option<JoinHandle<Count>>,
}

/// What became of a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Count {
    pub sent: u64,
    /// The numbers that never came back.
    pub lost: BTreeSet<u64>,
    /// The longest time in which nothing came back.
    pub longest_gap: Duration,
}

impl Stream {
    pub fn start(from: &Namespace, to: IpAddr) -> Result<Self> {
        let (socket, to) = socket_towards(from, to)?;
        socket
            .set_read_timeout(Some(Duration::from_millis(10)))
            .doing(|| "set a socket's patience".into())?;
        let wanted = Arc::new(AtomicBool::new(true));
        let returned = Arc::new(AtomicU64::new(0));
        let (going, counted) = (wanted.clone(), returned.clone());
        let thread = thread::spawn(move || run(&socket, to, &going, &counted));
        Ok(Self { wanted, returned, thread: Some(thread) })
    }

    /// Waits until `count` more packets have come back: that traffic flows at this moment.
    pub fn flows(&self, count: u64) -> Result<()> {
        let until = self.returned.load(Ordering::Relaxed) + count;
        super::eventually(&format!("{count} packets of a stream come back"), || {
            Ok((self.returned.load(Ordering::Relaxed) >= until).then_some(()))
        })
    }

    /// Ends it, after the last packet has had its time to return.
    pub fn finish(mut self) -> Result<Count> {
        self.wanted.store(false, Ordering::Relaxed);
        let failed = || Error::Setup("the thread of a stream panicked".into());
        self.thread.take().ok_or_else(failed)?.join().map_err(|_| failed())
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.wanted.store(false, Ordering::Relaxed);
    }
}

fn run(socket: &UdpSocket, to: SocketAddr, wanted: &AtomicBool, returned: &AtomicU64) -> Count {
    const PACE: Duration = Duration::from_millis(20);
    let mut missing = BTreeSet::new();
    let (mut next, mut longest_gap, mut last) = (0u64, Duration::ZERO, Instant::now());
    let mut take = |missing: &mut BTreeSet<u64>| {
        if let Some(number) = numbers(socket)
            && missing.remove(&number)
        {
            returned.fetch_add(1, Ordering::Relaxed);
            longest_gap = longest_gap.max(last.elapsed());
            last = Instant::now();
        }
    };
    let mut due = Instant::now();
    while wanted.load(Ordering::Relaxed) {
        if Instant::now() >= due {
            due += PACE;
            // One that could not even be sent was lost.
            let _ = socket.send_to(&next.to_be_bytes(), to);
            missing.insert(next);
            next += 1;
        }
        take(&mut missing);
    }
    let deadline = Instant::now() + Duration::from_secs(3);
    while !missing.is_empty() && Instant::now() < deadline {
        take(&mut missing);
    }
    Count { sent: next, lost: missing, longest_gap }
}

/// A socket in a host and where it is to send to. Not connected: it lives through times without a route.
fn socket_towards(from: &Namespace, to: IpAddr) -> Result<(UdpSocket, SocketAddr)> {
    let what = || format!("open a socket towards {to}");
    let socket = from.within(|| UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)))?.doing(what)?;
    let to = match to {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    };
    socket.set_read_timeout(Some(Duration::from_millis(300))).doing(what)?;
    Ok((socket, SocketAddr::new(to.into(), ECHO)))
}

/// The number in the next packet, if one comes in time.
fn numbers(socket: &UdpSocket) -> Option<u64> {
    let mut packet = [0; 8];
    let length = socket.recv(&mut packet).ok()?;
    (length == packet.len()).then(|| u64::from_be_bytes(packet))
}
