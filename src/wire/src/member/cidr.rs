//! Addresses with the length of a prefix, and the registry's keys that are made of them (protocols/ikto-kilo.md §1.4).

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::fmt;
use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE;

/// What the keys of members begin with.
const PREFIX: &str = "peers.";

/// An address and the length of its prefix, host bits as they were written: `fd10:aaaa:1::7/48`.
///
/// Never an IPv4-mapped IPv6 address: Go writes `::ffff:1.2.3.4/120` as `1.2.3.4/120` and then cannot read it, and to
/// WireGuard it is neither.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Cidr {
    address: IpAddr,
    length: u8,
}

impl Cidr {
    /// `None` if `length` is more than the address has bits, or the address is an IPv4-mapped one.
    pub fn new(address: IpAddr, length: u8) -> Option<Self> {
        let fits = length <= bits(address) && address == address.to_canonical();
        fits.then_some(Self { address, length })
    }

    /// The whole address: /32 or /128. An IPv4-mapped one is taken for the IPv4 address that it is.
    pub fn host(address: IpAddr) -> Self {
        let address = address.to_canonical();
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

    /// Takes what Go's `ParseCIDR` takes but leading zeros of the length and IPv4-mapped addresses. No zones, no leading
    /// zeros in IPv4, as there.
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

/// The registry's key of the record of whoever owns `allowed_ip`: `peers.` and the base64url, padded, of its text as it was
/// written, host bits and length included.
pub fn key_of(allowed_ip: &Cidr) -> String {
    format!("{PREFIX}{}", URL_SAFE.encode(allowed_ip.to_string()))
}

/// What a key is made of; `None` if [`key_of`] makes no such key.
pub fn cidr_of(key: &str) -> Option<Cidr> {
    let text = URL_SAFE.decode(key.strip_prefix(PREFIX)?).ok()?;
    let cidr = std::str::from_utf8(&text).ok()?.parse().ok()?;
    (key_of(&cidr) == key).then_some(cidr)
}

#[cfg(test)]
mod tests;
