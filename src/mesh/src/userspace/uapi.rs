//! The configuration protocol of userspace WireGuard: lines `key=value`, ended by an empty one.
//! Keys are in hexadecimal; peers follow one another, each beginning with its `public_key`.

use std::fmt::Write as _;
use std::io::{self, Read};
use std::net::SocketAddr;
use std::str::FromStr;
use std::time::{Duration, SystemTime};

use zeroize::{Zeroize, Zeroizing};

use crate::device::tunnel::{self, Tunnel};
use crate::key::{KEY_LENGTH, PrivateKey, PublicKey};
use crate::plan::{Change, Peer, PeerChange};

pub(super) const GET: &[u8] = b"get=1\n\n";
const SET: &str = "set=1\n";

/// The longest line that there is: a key, or an endpoint with a zone.
const MAX_LINE: usize = 1 << 10;

/// A peer takes some 400 bytes: this is room for 100,000.
const MAX_ANSWER: usize = 64 << 20;

const BUFFER_SIZE: usize = 32 << 10;

/// From this size on the next peer begins another request.
const BATCH_SIZE: usize = 64 << 10;

/// What a program answered to `get` or `set`.
#[derive(Debug, Default)]
pub struct Answer {
    tunnel: Tunnel,
    /// The peer that the next lines are about.
    current: Option<PublicKey>,
    errno: Option<i32>,
}

/// Reads one answer up to its empty line.
///
/// # Errors
/// `InvalidData` for what is no answer; the text has no value in it, which may be a key.
/// `UnexpectedEof` if it ends too early.
pub fn read_answer(mut from: impl Read) -> io::Result<Answer> {
    // The private key is in it; so it is one buffer that never moves.
    let mut buffer = Zeroizing::new(vec![0; BUFFER_SIZE]);
    let mut answer = Answer::default();
    let (mut filled, mut total) = (0, 0);
    loop {
        let free = buffer.get_mut(filled..).unwrap_or_default();
        let read = match from.read(free) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            read => read?,
        };
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        (filled, total) = (filled + read, total + read);
        if total > MAX_ANSWER {
            return Err(invalid("an answer of more than 64 MiB"));
        }
        let mut rest = buffer.get(..filled).unwrap_or_default();
        while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
            let (line, after) = rest.split_at(end);
            rest = after.get(1..).unwrap_or_default();
            if line.is_empty() {
                return answer.complete();
            }
            answer.line(line)?;
        }
        if rest.len() > MAX_LINE {
            return Err(invalid("a line of more than 1 KiB"));
        }
        let done = filled - rest.len();
        filled = rest.len();
        buffer.copy_within(done..done + filled, 0);
    }
}

impl Answer {
    /// What `get` was to bring.
    pub(super) fn into_tunnel(self) -> io::Result<Tunnel> {
        self.done()?;
        Ok(self.tunnel)
    }

    /// Whether what was asked for was done.
    ///
    /// # Errors
    /// The program's errno.
    pub fn done(&self) -> io::Result<()> {
        match self.errno {
            Some(0) => Ok(()),
            // Negative as in the kernel; some programs say it without the sign.
            Some(errno) => Err(io::Error::from_raw_os_error(errno.saturating_abs())),
            None => Err(invalid("an answer without errno")),
        }
    }

    /// The keys of the peers and their number of allowed IPs, for those who compare answers.
    pub fn peers(&self) -> impl Iterator<Item = (&PublicKey, &Peer)> {
        self.tunnel.peers.iter()
    }

    fn complete(self) -> io::Result<Self> {
        self.errno.is_some().then_some(self).ok_or_else(|| invalid("an answer without errno"))
    }

    fn line(&mut self, line: &[u8]) -> io::Result<()> {
        let (key, value) = std::str::from_utf8(line)
            .ok()
            .and_then(|line| line.split_once('='))
            .ok_or_else(|| invalid("a line that is not KEY=VALUE"))?;
        self.take(key, value).ok_or_else(|| invalid(&format!("a value of {key} that is none")))
    }

    /// `None` if the value is not one of this key's. Keys that we do not know are for others.
    fn take(&mut self, key: &str, value: &str) -> Option<()> {
        match key {
            "errno" => self.errno = Some(number(value)?),
            "private_key" => {
                let mut bytes = hex_key(value)?;
                let key = (*bytes != [0; KEY_LENGTH]).then(|| PrivateKey::new(&bytes));
                bytes.zeroize();
                self.tunnel.public_key = key.as_ref().map(PrivateKey::public);
                self.tunnel.private_key = key;
            }
            "listen_port" => self.tunnel.port = number(value)?,
            "public_key" => {
                let key = PublicKey::new(*hex_key(value)?);
                self.tunnel.peers.entry(key).or_default();
                self.current = Some(key);
            }
            "endpoint" => self.peer()?.endpoint = Some(endpoint(value)?),
            "allowed_ip" => drop(self.peer()?.allowed_ips.insert(number(value)?)),
            "persistent_keepalive_interval" => {
                self.peer()?.persistent_keepalive = number(value)?;
            }
            "rx_bytes" => self.peer()?.received_bytes = number(value)?,
            "tx_bytes" => self.peer()?.sent_bytes = number(value)?,
            // Seconds since 1970; "never" is 0.
            "last_handshake_time_sec" => {
                let seconds: u64 = number(value)?;
                let time = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds))?;
                self.peer()?.last_handshake = (seconds > 0).then_some(time);
            }
            _ => {}
        }
        Some(())
    }

    fn peer(&mut self) -> Option<&mut Peer> {
        self.tunnel.peers.get_mut(self.current.as_ref()?)
    }
}

/// Key, port or both.
pub(super) fn set_device(key: Option<&PrivateKey>, port: Option<u16>) -> Zeroizing<String> {
    // As long as it gets, so that it never moves and leaves a copy of the key behind.
    let mut text = Zeroizing::new(String::with_capacity(256));
    text.push_str(SET);
    if let Some(key) = key {
        text.push_str("private_key=");
        push_hex(&mut text, key.as_bytes());
        text.push('\n');
    }
    if let Some(port) = port {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "listen_port={port}");
    }
    text.push('\n');
    text
}

/// One request about some peers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Batch {
    peers: Vec<(PublicKey, String)>,
}

/// As few requests as need be, the changes in their order.
pub(super) fn batches(changes: &[Change]) -> Vec<Batch> {
    let mut batches: Vec<Batch> = Vec::new();
    let mut size = BATCH_SIZE;
    for (key, text) in changes.iter().filter_map(peer_text) {
        if size >= BATCH_SIZE {
            batches.push(Batch { peers: Vec::new() });
            size = 0;
        }
        size += text.len();
        if let Some(batch) = batches.last_mut() {
            batch.peers.push((key, text));
        }
    }
    batches
}

impl Batch {
    pub(super) fn text(&self) -> String {
        let peers = self.peers.iter().map(|(_, text)| text.as_str());
        [SET].into_iter().chain(peers).chain(["\n"]).collect()
    }
}

impl tunnel::Batch for Batch {
    fn parts(self) -> Vec<(PublicKey, Self)> {
        self.peers.into_iter().map(|peer| (peer.0, Self { peers: vec![peer] })).collect()
    }
}

fn peer_text(change: &Change) -> Option<(PublicKey, String)> {
    let (key, rest) = match change {
        Change::SetPeer(change) => (change.public_key, set_peer(change)),
        Change::RemovePeer(key) => (*key, "remove=true\n".into()),
        _ => return None,
    };
    let mut text = String::from("public_key=");
    push_hex(&mut text, key.as_bytes());
    text.push('\n');
    text.push_str(&rest);
    Some((key, text))
}

fn set_peer(change: &PeerChange) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail.
    if let Some(endpoint) = change.endpoint {
        let _ = writeln!(text, "endpoint={endpoint}");
    }
    if let Some(seconds) = change.keepalive {
        let _ = writeln!(text, "persistent_keepalive_interval={seconds}");
    }
    if change.replace_allowed_ips {
        text.push_str("replace_allowed_ips=true\n");
    }
    for ip in &change.allowed_ips {
        let _ = writeln!(text, "allowed_ip={ip}");
    }
    text
}

fn push_hex(text: &mut String, bytes: &[u8]) {
    for byte in bytes {
        for nibble in [byte >> 4, byte & 15] {
            text.push(char::from_digit(nibble.into(), 16).unwrap_or_default());
        }
    }
}

fn hex_key(text: &str) -> Option<Zeroizing<[u8; KEY_LENGTH]>> {
    let mut key = Zeroizing::new([0; KEY_LENGTH]);
    if text.len() != 2 * KEY_LENGTH {
        return None;
    }
    for (byte, digits) in key.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        for digit in digits {
            *byte = *byte << 4 | char::from(*digit).to_digit(16)? as u8;
        }
    }
    Some(key)
}

/// A link-local one has the name of an interface in it, `[fe80::1%eth0]:51820`, of which nothing
/// follows for us.
fn endpoint(text: &str) -> Option<SocketAddr> {
    let without_zone = || {
        let (address, rest) = text.split_once('%')?;
        let (_, port) = rest.split_once(']')?;
        number(&format!("{address}]{port}"))
    };
    number(text).or_else(without_zone)
}

fn number<T: FromStr>(text: &str) -> Option<T> {
    text.parse().ok()
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the WireGuard program sent {what}"))
}
