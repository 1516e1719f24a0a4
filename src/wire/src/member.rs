//! Records of the mesh's registry: who is a member, under which key, at which address (protocols/ikto-kilo.md §1.4).
//!
//! The first five fields are Ikto's, byte for byte; what follows them is ours, and ignored by agents that do not know it.
//! Whatever a machine has to prove before it counts as a member will stand here, in [`Extension`].

use std::fmt;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

/// Longest record read, in bytes. A genuine one has less than 500.
pub const MAX_MEMBER: usize = 16 * 1024;

/// An address and the length of its prefix, host bits as they were written: `fd10:aaaa:1::7/48`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Cidr {
    address: IpAddr,
    length: u8,
}

/// One record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// A label, nothing more; may be empty.
    pub name: String,
    /// WireGuard public key.
    pub public_key: [u8; 32],
    /// Where others reach the node: to Ikto an IP literal without port, to us a DNS name, too.
    pub advertise_address: String,
    /// The node's own address, with the length of the prefix it owns.
    pub allowed_ip: Cidr,
    /// 0: the node cannot be dialled.
    pub wg_port: u16,
    /// None in a record that an Ikto agent wrote.
    pub extension: Option<Extension>,
}

/// What our agents say beyond Ikto's five fields.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Extension {
    /// DNS name under which the node is reached, where `advertise_address` is but the address it had then.
    pub advertise_name: Option<String>,
    /// What the node can do beyond an Ikto agent, each `[a-z0-9.-]{1,64}`.
    pub capabilities: Vec<String>,
}

/// What the signature over a record is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signature {
    /// There is none: an Ikto agent wrote the record.
    Absent,
    /// Made with the private key of the record's own public key, for this bucket and this key.
    Valid,
    Invalid,
}

/// Whether records must be signed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SignaturePolicy {
    /// Unsigned records and records with a wrong signature are no members.
    Require,
    /// Unsigned ones count; of two records that are in each other's way the signed one counts. A wrong signature does not count.
    #[default]
    Prefer,
    /// Signatures are not looked at.
    Ignore,
}

impl Cidr {
    /// `None` if `length` is more than the address has bits.
    pub fn new(address: IpAddr, length: u8) -> Option<Self> {
        (length <= bits(address)).then_some(Self { address, length })
    }

    /// The whole address: /32 or /128.
    pub fn host(address: IpAddr) -> Self {
        Self { address, length: bits(address) }
    }

    pub fn address(&self) -> IpAddr {
        self.address
    }

    pub fn length(&self) -> u8 {
        self.length
    }

    /// The same with no host bits set, which is what WireGuard makes of it.
    pub fn masked(&self) -> Self {
        let address = match self.address {
            IpAddr::V4(v4) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(self.length)).unwrap_or(0);
                Ipv4Addr::from_bits(v4.to_bits() & mask).into()
            }
            IpAddr::V6(v6) => {
                let mask = u128::MAX.checked_shl(128 - u32::from(self.length)).unwrap_or(0);
                Ipv6Addr::from_bits(v6.to_bits() & mask).into()
            }
        };
        Self { address, length: self.length }
    }

    pub fn contains(&self, address: IpAddr) -> bool {
        Self { address, length: self.length.min(bits(address)) }.masked().address
            == self.masked().address
            && bits(address) == bits(self.address)
    }

    /// Whether all of `other` is in it.
    pub fn covers(&self, other: &Self) -> bool {
        self.length <= other.length && self.contains(other.address)
    }

    pub fn overlaps(&self, other: &Self) -> bool {
        self.covers(other) || other.covers(self)
    }
}

fn bits(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.length)
    }
}

impl FromStr for Cidr {
    type Err = NotCidr;

    /// Strict, as Go's: a decimal length without sign or leading zero.
    fn from_str(text: &str) -> Result<Self, NotCidr> {
        let (address, length) = text.split_once('/').ok_or(NotCidr)?;
        let plain = !length.is_empty()
            && length.bytes().all(|byte| byte.is_ascii_digit())
            && (length == "0" || !length.starts_with('0'));
        if !plain {
            return Err(NotCidr);
        }
        let length = length.parse().map_err(|_| NotCidr)?;
        Self::new(address.parse().map_err(|_| NotCidr)?, length).ok_or(NotCidr)
    }
}

/// Not an address, a slash and a length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a CIDR, such as fd10:aaaa:1::/48")]
pub struct NotCidr;
