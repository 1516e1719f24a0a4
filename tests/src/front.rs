//! What stands before a key server, or in its place: a front that passes on one generation of the protocol only, servers
//! that say nothing, and the DNS server of a LAN.

use std::{
    io::{self, Read, Write},
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
};

use crate::error::{Doing, Result};

/// The endpoint of generation 2 (`protocols/kcrypt.md` §6.1).
const V2: &str = "/tpm-attestation";
/// Longer than any request's header: a v1 token with a certificate is 5 KiB.
const MAX_HEADER: usize = 64 << 10;

/// A key server of generation 1, to be moved to generation 2: passes requests on to a key server that speaks both, and
/// answers 404, as Go's does, to what its generation does not have. Its threads end with the test program.
#[derive(Debug)]
pub struct Front {
    port: u16,
    moved: Arc<AtomicBool>,
}

impl Front {
    /// Listens on the loopback before the key server at `port`.
    pub fn before(port: u16) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").doing(|| "listen".into())?;
        let own = listener.local_addr().doing(|| "find a free port".into())?.port();
        let moved = Arc::new(AtomicBool::new(false));
        let is_moved = moved.clone();
        thread::spawn(move || {
            for client in listener.incoming().map_while(io::Result::ok) {
                let is_moved = is_moved.clone();
                // What goes wrong here, the machine sees: that is what is tested.
                thread::spawn(move || pass_on(client, port, &is_moved));
            }
        });
        Ok(Self { port: own, moved })
    }

    /// The URL under which a machine under test reaches it.
    pub fn url(&self) -> String {
        format!("http://10.0.2.2:{}", self.port)
    }

    /// From now on it has generation 2 and no longer generation 1, as upstream's.
    pub fn move_to_v2(&self) {
        self.moved.store(true, Ordering::SeqCst);
    }
}

fn pass_on(mut client: TcpStream, port: u16, moved: &AtomicBool) -> io::Result<()> {
    let mut header = Vec::new();
    let mut byte = [0];
    while !header.ends_with(b"\r\n\r\n") && header.len() < MAX_HEADER {
        client.read_exact(&mut byte)?;
        header.extend_from_slice(&byte);
    }
    let request = String::from_utf8_lossy(&header).into_owned();
    let path = request.split(' ').nth(1).unwrap_or_default();
    if (path == V2) != moved.load(Ordering::SeqCst) {
        let body = "404 page not found\n";
        return write!(
            client,
            "HTTP/1.1 404 Not Found\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
    }
    let mut server = TcpStream::connect(("127.0.0.1", port))?;
    server.write_all(&header)?;
    let (mut from_client, mut to_server) = (client.try_clone()?, server.try_clone()?);
    thread::spawn(move || {
        let _ = io::copy(&mut from_client, &mut to_server);
        let _ = to_server.shutdown(Shutdown::Write);
    });
    let _ = io::copy(&mut server, &mut client);
    client.shutdown(Shutdown::Write)
}

/// A server that accepts and then says nothing, for as long as the test program runs.
#[derive(Debug)]
pub struct Stalling {
    address: SocketAddr,
    accepted: Arc<AtomicUsize>,
}

impl Stalling {
    pub fn start() -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").doing(|| "listen".into())?;
        let address = listener.local_addr().doing(|| "find a free port".into())?;
        let accepted = Arc::new(AtomicUsize::new(0));
        let count = accepted.clone();
        thread::spawn(move || {
            let mut held = Vec::new();
            for client in listener.incoming().map_while(io::Result::ok) {
                held.push(client);
                count.store(held.len(), Ordering::SeqCst);
            }
        });
        Ok(Self { address, accepted })
    }

    /// The URL under which a machine under test reaches it.
    pub fn url(&self) -> String {
        format!("http://10.0.2.2:{}", self.address.port())
    }

    /// How many connections it has accepted.
    pub fn accepted(&self) -> usize {
        self.accepted.load(Ordering::SeqCst)
    }
}

/// A DNS server (RFC 1035) for one name, or one that hears questions and answers none.
#[derive(Debug)]
pub struct Dns {
    heard: Arc<AtomicUsize>,
    address: Arc<Mutex<Ipv4Addr>>,
}

impl Dns {
    /// `socket` is bound to port 53 of where the machine asks.
    pub fn silent(socket: UdpSocket) -> Self {
        Self::serve(socket, Ipv4Addr::UNSPECIFIED, |_, _| None)
    }

    /// Gives `address` for `name`, and nothing for any other name or type.
    pub fn of(socket: UdpSocket, name: &str, address: Ipv4Addr) -> Self {
        let name = encoded(name);
        Self::serve(socket, address, move |question, now| Some(answer(question, &name, now)))
    }

    fn serve(
        socket: UdpSocket,
        address: Ipv4Addr,
        answer: impl Fn(&[u8], Ipv4Addr) -> Option<Vec<u8>> + Send + 'static,
    ) -> Self {
        let (heard, address) = (Arc::new(AtomicUsize::new(0)), Arc::new(Mutex::new(address)));
        let (count, current) = (heard.clone(), address.clone());
        thread::spawn(move || {
            let mut question = [0; 512];
            while let Ok((length, from)) = socket.recv_from(&mut question) {
                count.fetch_add(1, Ordering::SeqCst);
                let now = *current.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(answer) = answer(question.get(..length).unwrap_or_default(), now) {
                    // The machine asks again if this is lost.
                    let _ = socket.send_to(&answer, from);
                }
            }
        });
        Self { heard, address }
    }

    /// From now on the name means this address.
    pub fn change(&self, address: Ipv4Addr) {
        *self.address.lock().unwrap_or_else(PoisonError::into_inner) = address;
    }

    /// How many questions have come.
    pub fn heard(&self) -> usize {
        self.heard.load(Ordering::SeqCst)
    }
}

/// A name as in messages: each label after its length, and the root.
fn encoded(name: &str) -> Vec<u8> {
    let labels = name.split('.').flat_map(|l| [&[l.len() as u8], l.as_bytes()].concat());
    labels.chain([0]).collect()
}

/// The answer to the first question of a message, with one A record or none.
fn answer(message: &[u8], name: &[u8], address: Ipv4Addr) -> Vec<u8> {
    const HEADER: usize = 12;
    const A_IN: [u8; 4] = [0, 1, 0, 1];
    let questions = message.get(HEADER..).unwrap_or_default();
    let name_length = questions.iter().position(|&b| b == 0).map_or(0, |end| end + 1);
    let question = questions.get(..name_length + A_IN.len()).unwrap_or_default();
    let known = question == [name, &A_IN].concat().as_slice();
    let mut out = message.get(..2).unwrap_or_default().to_vec();
    // A response, recursion available; one question, one answer or none, nothing further.
    out.extend([0x81, 0x80, 0, 1, 0, u8::from(known), 0, 0, 0, 0]);
    out.extend(question);
    if known {
        // The question's name, type and class, for a minute, four bytes.
        out.extend([0xc0, 0x0c, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
        out.extend(address.octets());
    }
    out
}
