//! An address range in CIDR notation (RFC 4632 §3.1, RFC 4291 §2.3), without host bits.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

/// A network prefix: the mesh's addresses are taken from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Prefix {
    network: IpAddr,
    bits: u8,
}

impl Prefix {
    /// `network` must have no bit set below `bits`.
    ///
    /// # Errors
    /// Says in words what is wrong with the prefix.
    pub fn new(network: IpAddr, bits: u8) -> Result<Self, String> {
        let width = width(network);
        if bits > width {
            return Err(format!("/{bits} is longer than an address of {width} bits"));
        }
        let masked = mask(network, bits);
        if masked != network {
            return Err(format!(
                "{network}/{bits} has host bits set; the network is {masked}/{bits}"
            ));
        }
        Ok(Self { network, bits })
    }

    /// The first address of the range, all host bits zero.
    #[must_use]
    pub fn network(&self) -> IpAddr {
        self.network
    }

    /// Length of the network part: 0..=32 or 0..=128.
    #[must_use]
    pub fn bits(&self) -> u8 {
        self.bits
    }

    /// Number of bits a host may choose.
    #[must_use]
    pub fn host_bits(&self) -> u8 {
        width(self.network).saturating_sub(self.bits)
    }

    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        address.is_ipv4() == self.network.is_ipv4() && mask(address, self.bits) == self.network
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.bits)
    }
}

impl FromStr for Prefix {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let not_cidr = || format!("{text:?} is not of the form ADDRESS/LENGTH, as in fd10::/16");
        let (address, bits) = text.split_once('/').ok_or_else(not_cidr)?;
        if bits.is_empty() || !bits.bytes().all(|b| b.is_ascii_digit()) {
            return Err(not_cidr());
        }
        Self::new(address.parse().map_err(|_| not_cidr())?, bits.parse().map_err(|_| not_cidr())?)
    }
}

fn width(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

fn mask(address: IpAddr, bits: u8) -> IpAddr {
    match address {
        IpAddr::V4(a) => Ipv4Addr::from_bits(
            a.to_bits() & u32::MAX.checked_shl(32u32.saturating_sub(bits.into())).unwrap_or(0),
        )
        .into(),
        IpAddr::V6(a) => Ipv6Addr::from_bits(
            a.to_bits() & u128::MAX.checked_shl(128u32.saturating_sub(bits.into())).unwrap_or(0),
        )
        .into(),
    }
}

#[cfg(test)]
mod tests {
    use super::Prefix;

    #[test]
    fn a_prefix_is_an_address_and_a_length_without_host_bits() {
        for good in ["fd10::/16", "10.0.0.0/8", "0.0.0.0/0", "::/0", "192.0.2.1/32", "::1/128"] {
            assert_eq!(good.parse::<Prefix>().unwrap().to_string(), good);
        }
        for bad in [
            "fd10::1/16",
            "10.1.0.0/8",
            "10.0.0.0/33",
            "::/129",
            "10.0.0.0",
            "/8",
            "10.0.0.0/",
            "x/8",
            "10.0.0.0/+8",
            "10.0.0.0/8/8",
            "::/256",
        ] {
            assert!(bad.parse::<Prefix>().is_err(), "{bad}");
        }
        assert_eq!(
            "10.1.2.3/8".parse::<Prefix>().unwrap_err(),
            "10.1.2.3/8 has host bits set; the network is 10.0.0.0/8"
        );
    }

    #[test]
    fn it_contains_its_own_addresses_only() {
        let prefix: Prefix = "10.32.0.0/11".parse().unwrap();
        assert!(prefix.contains("10.63.255.255".parse().unwrap()));
        assert!(!prefix.contains("10.64.0.0".parse().unwrap()));
        assert!(!prefix.contains("::10.32.0.1".parse().unwrap()));
        assert_eq!(prefix.host_bits(), 21);
        assert!("0.0.0.0/0".parse::<Prefix>().unwrap().contains("255.1.2.3".parse().unwrap()));
    }
}
