//! What a program of userspace WireGuard answers: lines `KEY=VALUE`, the last of them `errno`, and an
//! empty one. Keys are in hexadecimal; peers follow one another, each beginning with its
//! `public_key`.
//!
//! Needs nothing of this crate, so that it is fuzzed alone.

use std::io::{self, Read};
use std::net::SocketAddr;
use std::str::FromStr;

use latchkey_wire::member::Cidr;
use zeroize::Zeroizing;

/// The longest line that there is: a key, or an endpoint with a zone.
const MAX_LINE: usize = 1 << 10;

/// A peer takes some 400 bytes: this is room for 100,000.
const MAX_ANSWER: usize = 64 << 20;

const BUFFER_SIZE: usize = 32 << 10;

pub(crate) const KEY_LENGTH: usize = 32;

/// What one line says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Item {
    PrivateKey(Zeroizing<[u8; KEY_LENGTH]>),
    ListenPort(u16),
    /// What follows is about the peer of this public key.
    Peer([u8; KEY_LENGTH]),
    Endpoint(SocketAddr),
    AllowedIp(Cidr),
    /// Seconds; 0 is off.
    Keepalive(u16),
    /// Seconds since 1970; 0 is never.
    LastHandshake(u64),
    Received(u64),
    Sent(u64),
}

/// Reads one answer up to its empty line.
///
/// # Errors
/// The program's errno. `InvalidData` for what is no answer; the text has no value in it, which may
/// be a key. `UnexpectedEof` if it ends too early.
pub(crate) fn read(mut from: impl Read, mut take: impl FnMut(Item)) -> io::Result<()> {
    // The private key is in it; so it is one buffer that never moves.
    let mut buffer = Zeroizing::new(vec![0; BUFFER_SIZE]);
    let (mut filled, mut total) = (0, 0);
    let mut state = State::default();
    loop {
        let read = match from.read(buffer.get_mut(filled..).unwrap_or_default()) {
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
                return state.result();
            }
            if let Some(item) = state.line(line)? {
                take(item);
            }
        }
        if rest.len() > MAX_LINE {
            return Err(too_long());
        }
        let done = filled - rest.len();
        filled = rest.len();
        buffer.copy_within(done..done + filled, 0);
    }
}

#[derive(Debug, Default)]
struct State {
    in_peer: bool,
    errno: Option<i32>,
}

impl State {
    fn result(&self) -> io::Result<()> {
        match self.errno {
            Some(0) => Ok(()),
            // Negative as in the kernel; some programs say it without the sign.
            Some(errno) => Err(io::Error::from_raw_os_error(errno.saturating_abs())),
            None => Err(invalid("an answer without errno")),
        }
    }

    fn line(&mut self, line: &[u8]) -> io::Result<Option<Item>> {
        if line.len() > MAX_LINE {
            return Err(too_long());
        }
        let (key, value) = std::str::from_utf8(line)
            .ok()
            .and_then(|line| line.split_once('='))
            .ok_or_else(|| invalid("a line that is not KEY=VALUE"))?;
        let wrong = || invalid(&format!("a value of {key} that is none"));
        let item = match key {
            "errno" => {
                self.errno = Some(value.parse().map_err(|_| wrong())?);
                return Ok(None);
            }
            "private_key" => Item::PrivateKey(key_of(value).ok_or_else(wrong)?),
            "listen_port" => Item::ListenPort(parse(value).ok_or_else(wrong)?),
            "public_key" => {
                self.in_peer = true;
                Item::Peer(*key_of(value).ok_or_else(wrong)?)
            }
            "endpoint" => Item::Endpoint(endpoint(value).ok_or_else(wrong)?),
            "allowed_ip" => Item::AllowedIp(parse(value).ok_or_else(wrong)?),
            "persistent_keepalive_interval" => Item::Keepalive(parse(value).ok_or_else(wrong)?),
            "last_handshake_time_sec" => Item::LastHandshake(parse(value).ok_or_else(wrong)?),
            "rx_bytes" => Item::Received(parse(value).ok_or_else(wrong)?),
            "tx_bytes" => Item::Sent(parse(value).ok_or_else(wrong)?),
            // For others.
            _ => return Ok(None),
        };
        let is_of_the_device = matches!(item, Item::PrivateKey(_) | Item::ListenPort(_));
        if !is_of_the_device && !self.in_peer {
            return Err(invalid("something of a peer before the first peer"));
        }
        Ok(Some(item))
    }
}

/// A link-local one has the name of an interface in it, `[fe80::1%eth0]:51820`, of which nothing
/// follows for us.
fn endpoint(text: &str) -> Option<SocketAddr> {
    let without_zone = || {
        let (address, rest) = text.split_once('%')?;
        let (_, port) = rest.split_once(']')?;
        parse(&format!("{address}]{port}"))
    };
    parse(text).or_else(without_zone)
}

fn key_of(text: &str) -> Option<Zeroizing<[u8; KEY_LENGTH]>> {
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

fn parse<T: FromStr>(text: &str) -> Option<T> {
    text.parse().ok()
}

fn too_long() -> io::Error {
    invalid("a line of more than 1 KiB")
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the WireGuard program sent {what}"))
}
