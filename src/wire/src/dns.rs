//! DNS messages (RFC 1035 §4, RFC 2782, RFC 3596) as far as finding a key server takes: a query out, addresses and services in.
//!
//! For unicast DNS and for mDNS (RFC 6762) alike. What is parsed comes from whoever is on the network, before anything has been
//! authenticated: a message has a length, its records a number, and a compression pointer leads only backwards.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::{Error, Result};

/// Longest message of a TCP answer; over UDP without EDNS it has 512 bytes, over mDNS 9,000.
pub const MAX_DNS: usize = u16::MAX as usize;
/// Most records taken of one message. A service with a dozen addresses has about twenty.
const MAX_RECORDS: usize = 256;
/// Longest name, RFC 1035 §2.3.4.
const MAX_NAME: usize = 255;
/// Longest chain of aliases that is followed.
const MAX_ALIASES: usize = 8;

const CLASS_IN: u16 = 1;
/// Top bit of the class: in a query "answer by unicast", in a record "forget older ones" (RFC 6762 §5.4, §10.2).
const TOP_BIT: u16 = 0x8000;

const RESPONSE: u16 = 0x8000;
const OPCODE: u16 = 0x7800;
const TRUNCATED: u16 = 0x0200;
const RECURSION_DESIRED: u16 = 0x0100;
const RCODE: u16 = 0x000f;
/// The name does not exist.
pub const NX_DOMAIN: u8 = 3;

/// Record types, RFC 1035 §3.2.2, RFC 3596, RFC 2782.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Kind {
    A = 1,
    Ptr = 12,
    Aaaa = 28,
    Srv = 33,
}

const CNAME: u16 = 5;

/// A domain name: labels in wire form, ASCII letters in lower case, so that equal names have equal bytes.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Name(Vec<u8>);

impl Name {
    /// Reads a name as people write it. A dot at the end changes nothing.
    ///
    /// # Errors
    /// An empty name or label, a label of more than 63 bytes, a name of more than 253.
    pub fn new(text: &str) -> Result<Self> {
        let mut wire = Vec::with_capacity(text.len() + 2);
        for label in text.strip_suffix('.').unwrap_or(text).split('.') {
            let length = u8::try_from(label.len()).unwrap_or(u8::MAX);
            if !(1..=63).contains(&length) {
                return Err(malformed(wire.len(), "a label has 1 to 63 bytes"));
            }
            wire.push(length);
            wire.extend(label.bytes().map(|byte| byte.to_ascii_lowercase()));
        }
        wire.push(0);
        if wire.len() > MAX_NAME {
            return Err(malformed(wire.len(), "a name has at most 255 bytes"));
        }
        Ok(Self(wire))
    }

    /// Whether this name is `parent` with one label or more before it.
    #[must_use]
    pub fn is_below(&self, parent: &Self) -> bool {
        let mut rest = self.0.as_slice();
        while let Some((length, tail)) = rest.split_first().filter(|(length, _)| **length > 0) {
            rest = tail.get(usize::from(*length)..).unwrap_or_default();
            if rest == parent.0 {
                return true;
            }
        }
        false
    }
}

impl std::fmt::Display for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut rest = self.0.as_slice();
        while let Some((length, tail)) = rest.split_first().filter(|(length, _)| **length > 0) {
            let (label, tail) = tail.split_at_checked(usize::from(*length)).unwrap_or_default();
            write!(f, "{}.", label.escape_ascii())?;
            rest = tail;
        }
        Ok(())
    }
}

impl std::fmt::Debug for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self}")
    }
}

/// A query to a name server, which is to ask on for us.
#[must_use]
pub fn query(id: u16, name: &Name, kind: Kind) -> Vec<u8> {
    encode(id, RECURSION_DESIRED, CLASS_IN, &[(name, kind)])
}

/// A query to everybody on the link (RFC 6762 §5). `unicast` asks to be answered alone.
#[must_use]
pub fn multicast_query(questions: &[(&Name, Kind)], unicast: bool) -> Vec<u8> {
    encode(0, 0, if unicast { CLASS_IN | TOP_BIT } else { CLASS_IN }, questions)
}

fn encode(id: u16, flags: u16, class: u16, questions: &[(&Name, Kind)]) -> Vec<u8> {
    let count = u16::try_from(questions.len()).unwrap_or(u16::MAX);
    let mut out = Vec::with_capacity(12 + 64 * questions.len());
    for field in [id, flags, count, 0, 0, 0] {
        out.extend(field.to_be_bytes());
    }
    for (name, kind) in questions.iter().take(usize::from(count)) {
        out.extend(&name.0);
        out.extend((*kind as u16).to_be_bytes());
        out.extend(class.to_be_bytes());
    }
    out
}

/// What a record says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Data {
    Address(IpAddr),
    /// CNAME: the name is another name for this one.
    Alias(Name),
    Pointer(Name),
    Service {
        port: u16,
        target: Name,
    },
    /// Something nobody here has asked for.
    Other,
}

/// A resource record of class IN.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    pub name: Name,
    /// Seconds; mDNS takes a record back with 0.
    pub ttl: u32,
    pub data: Data,
}

/// A response: header, question, and the records of answer and additional section.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    pub id: u16,
    /// The rest did not fit into a datagram and is to be had by TCP.
    pub truncated: bool,
    pub rcode: u8,
    pub questions: Vec<(Name, u16)>,
    pub records: Vec<Record>,
}

/// What a response means for a question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    Found(Vec<IpAddr>),
    /// There is no such name, or it has no address of this kind.
    NotFound,
    /// The server could not tell; its RCODE.
    Failed(u8),
}

impl Response {
    /// Parses a response. Bytes after the last record are an error.
    ///
    /// # Errors
    /// [`Error::Structure`] with the offset, also for a query.
    pub fn parse(message: &[u8]) -> Result<Self> {
        if message.len() > MAX_DNS {
            return Err(Error::TooLong { what: "DNS message", limit: MAX_DNS, got: message.len() });
        }
        let mut reader = Reader { message, at: 0 };
        let (id, flags) = (reader.u16()?, reader.u16()?);
        let [questions, answers, authorities, additional] =
            [reader.u16()?, reader.u16()?, reader.u16()?, reader.u16()?].map(usize::from);
        if flags & RESPONSE == 0 || flags & OPCODE != 0 {
            return Err(malformed(2, "it is not a response to a query"));
        }
        if questions + answers + authorities + additional > MAX_RECORDS {
            return Err(malformed(4, "it has more than 256 records"));
        }
        let mut asked = Vec::new();
        for _ in 0..questions {
            let name = reader.name()?;
            let kind = reader.u16()?;
            reader.u16()?;
            asked.push((name, kind));
        }
        let mut records = Vec::new();
        for index in 0..answers + authorities + additional {
            let record = reader.record()?;
            let is_authority = (answers..answers + authorities).contains(&index);
            records.extend(record.filter(|_| !is_authority));
        }
        if reader.at != message.len() {
            return Err(malformed(reader.at, "there are bytes after its records"));
        }
        Ok(Self {
            id,
            truncated: flags & TRUNCATED != 0,
            rcode: u8::try_from(flags & RCODE).unwrap_or_default(),
            questions: asked,
            records,
        })
    }

    /// Whether this answers the query with this id and question, and not another one.
    #[must_use]
    pub fn answers(&self, id: u16, name: &Name, kind: Kind) -> bool {
        self.id == id
            && matches!(self.questions.as_slice(),
                [(asked, of)] if asked == name && *of == kind as u16)
    }

    /// The addresses of `name` and of what it is an alias for.
    #[must_use]
    pub fn addresses(&self, name: &Name) -> Outcome {
        match self.rcode {
            0 => {}
            NX_DOMAIN => return Outcome::NotFound,
            other => return Outcome::Failed(other),
        }
        let mut name = name;
        for _ in 0..MAX_ALIASES {
            let of_name = || self.records.iter().filter(|record| record.name == *name);
            let found: Vec<_> = of_name()
                .filter_map(|record| match record.data {
                    Data::Address(address) => Some(address),
                    _ => None,
                })
                .collect();
            if !found.is_empty() {
                return Outcome::Found(found);
            }
            let alias = of_name().find_map(|record| match &record.data {
                Data::Alias(target) => Some(target),
                _ => None,
            });
            match alias {
                Some(target) => name = target,
                None => break,
            }
        }
        Outcome::NotFound
    }
}

fn malformed(at: usize, reason: &'static str) -> Error {
    Error::Structure { what: "DNS message", at, reason }
}

struct Reader<'a> {
    message: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Result<&'a [u8]> {
        let bytes = self.at.checked_add(length).and_then(|end| self.message.get(self.at..end));
        let bytes = bytes.ok_or_else(|| malformed(self.at, "it ends early"))?;
        self.at += length;
        Ok(bytes)
    }

    fn u16(&mut self) -> Result<u16> {
        Ok(self.take(2)?.iter().fold(0, |number, byte| number << 8 | u16::from(*byte)))
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from(self.u16()?) << 16 | u32::from(self.u16()?))
    }

    /// A name, possibly compressed. Each pointer must lead before the part it ends, so that the way has an end.
    fn name(&mut self) -> Result<Name> {
        let mut wire = Vec::new();
        let mut part = self.at;
        let mut jumped = None;
        loop {
            let began = self.at;
            let length = usize::from(self.take(1)?.first().copied().unwrap_or_default());
            match length >> 6 {
                0 if length == 0 => break,
                0 => {
                    wire.push(u8::try_from(length).unwrap_or_default());
                    wire.extend(self.take(length)?.iter().map(u8::to_ascii_lowercase));
                    if wire.len() >= MAX_NAME {
                        return Err(malformed(began, "a name has more than 255 bytes"));
                    }
                }
                3 => {
                    self.at = began;
                    let target = usize::from(self.u16()? & 0x3fff);
                    if target >= part {
                        return Err(malformed(began, "a compression pointer leads forwards"));
                    }
                    jumped.get_or_insert(self.at);
                    (part, self.at) = (target, target);
                }
                _ => return Err(malformed(began, "a label is of no known kind")),
            }
        }
        self.at = jumped.unwrap_or(self.at);
        wire.push(0);
        Ok(Name(wire))
    }

    /// A record; nothing if it is of a class other than IN.
    fn record(&mut self) -> Result<Option<Record>> {
        let name = self.name()?;
        let (kind, class) = (self.u16()?, self.u16()?);
        let ttl = self.u32()?;
        let length = usize::from(self.u16()?);
        let began = self.at;
        let bytes = self.take(length)?;
        // A name in the data may point to anywhere before it, so the data is read in its place.
        self.at = began;
        let data = match kind {
            1 => Data::Address(IpAddr::V4(Ipv4Addr::from(self.fixed::<4>(bytes)?))),
            28 => Data::Address(IpAddr::V6(Ipv6Addr::from(self.fixed::<16>(bytes)?))),
            CNAME => Data::Alias(self.name()?),
            12 => Data::Pointer(self.name()?),
            33 => {
                self.take(4)?;
                Data::Service { port: self.u16()?, target: self.name()? }
            }
            _ => {
                self.take(length)?;
                Data::Other
            }
        };
        if self.at != began + length {
            return Err(malformed(began, "a record is not as long as it says"));
        }
        Ok((class & !TOP_BIT == CLASS_IN).then_some(Record { name, ttl, data }))
    }

    fn fixed<const N: usize>(&mut self, bytes: &[u8]) -> Result<[u8; N]> {
        let array =
            bytes.try_into().map_err(|_| malformed(self.at, "an address has another length"));
        self.at += bytes.len();
        array
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> Name {
        Name::new(text).unwrap()
    }

    /// Header with these counts, then `rest`.
    fn response(counts: [u16; 4], rest: &[u8]) -> Vec<u8> {
        let mut out = vec![0x12, 0x34, 0x81, 0x80];
        out.extend(counts.iter().flat_map(|count| count.to_be_bytes()));
        out.extend(rest);
        out
    }

    #[test]
    fn names_are_equal_in_any_case_and_with_or_without_the_last_dot() {
        assert_eq!(name("KMS.Example"), name("kms.example."));
        assert_eq!(name("KMS.Example").to_string(), "kms.example.");
        assert!(name("node._kcrypt._tcp.local").is_below(&name("_kcrypt._tcp.local")));
        for other in ["_kcrypt._tcp.local", "x_kcrypt._tcp.local", "local"] {
            assert!(!name(other).is_below(&name("_kcrypt._tcp.local")), "{other}");
        }
        let long = ["a".repeat(63), "b".repeat(63), "c".repeat(63), "d".repeat(63)].join(".");
        for bad in ["", ".", "a..b", &"a".repeat(64), &long] {
            assert!(Name::new(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_compressed_answer_with_an_alias_is_followed() {
        let rest = [
            b"\x03kms\x07example\x00\x00\x01\x00\x01".as_slice(),
            b"\xc0\x0c\x00\x05\x00\x01\x00\x00\x00\x3c\x00\x06\x03one\xc0\x10",
            b"\xc0\x29\x00\x01\x00\x01\x00\x00\x00\x3c\x00\x04\x0a\x00\x00\x01",
        ]
        .concat();
        let message = Response::parse(&response([1, 2, 0, 0], &rest)).unwrap();
        assert!(message.answers(0x1234, &name("KMS.example"), Kind::A));
        assert!(!message.answers(0x1234, &name("kms.example"), Kind::Aaaa));
        assert!(!message.answers(0x1235, &name("kms.example"), Kind::A));
        let found = Outcome::Found(vec![IpAddr::from([10, 0, 0, 1])]);
        assert_eq!(message.addresses(&name("kms.example")), found);
        assert_eq!(message.addresses(&name("other.example")), Outcome::NotFound);
    }

    #[test]
    fn what_a_stranger_may_send_is_refused() {
        let a = b"\x01a\x00\x00\x01\x00\x01\x00\x00\x00\x00\x00\x04\x01\x02\x03\x04".as_slice();
        assert!(Response::parse(&response([0, 1, 0, 0], a)).is_ok());
        let cases: &[(&str, Vec<u8>)] = &[
            ("nothing", Vec::new()),
            ("a query", query(1, &name("a"), Kind::A)),
            ("bytes left over", response([0, 1, 0, 0], &[a, b"x"].concat())),
            ("a record that is missing", response([0, 2, 0, 0], a)),
            ("65,535 records", response([0xffff; 4], a)),
            ("a pointer to itself", response([1, 0, 0, 0], b"\xc0\x0c\x00\x01\x00\x01")),
            ("a pointer forwards", response([1, 0, 0, 0], b"\xc0\x20\x00\x01\x00\x01")),
            (
                "a loop of two pointers",
                response([1, 0, 0, 0], b"\x01a\xc0\x10\xc0\x0c\x00\x01\x00\x01"),
            ),
            ("a label of the reserved kind", response([1, 0, 0, 0], b"\x80a\x00\x00\x01\x00\x01")),
            (
                "an address of three bytes",
                response([0, 1, 0, 0], b"\x00\x00\x01\x00\x01\x00\x00\x00\x00\x00\x03\x01\x02\x03"),
            ),
            (
                "a name longer than its record",
                response([0, 1, 0, 0], b"\x00\x00\x0c\x00\x01\x00\x00\x00\x00\x00\x01\x01a\x00"),
            ),
            ("a name without an end", response([1, 0, 0, 0], &[b"\x3f".as_slice(); 300].concat())),
        ];
        for (what, message) in cases {
            assert!(Response::parse(message).is_err(), "{what}");
        }
    }
}
