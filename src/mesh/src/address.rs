//! The mesh address of a node, derived from its WireGuard public key: the same key gives the same
//! address on every boot, without anyone to ask.
//!
//! Candidate `n` in prefix `P` keeps the network bits of `P`; its host bits are the leading bits of
//!
//! ```text
//! SHA-256("latchkey mesh address v1\0" ‖ public key (32) ‖ network address (4 or 16)
//!         ‖ prefix length (1) ‖ n (u32, big endian))
//! ```
//!
//! Candidates whose host part is all zeros or all ones are passed over: in IPv4 they are the network
//! and the broadcast address, in IPv6 the first is the subnet-router anycast address (RFC 4291
//! §2.6.1). Candidate 0 is a node's address unless another node holds it already; then the next one
//! is tried.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use latchkey_config::Prefix;
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::key::PublicKey;

const DOMAIN: &[u8] = b"latchkey mesh address v1\0";

/// Fewer host bits leave nothing beside all zeros and all ones, so a /31, /32, /127 or /128 is no
/// mesh.
const MIN_HOST_BITS: u8 = 2;

/// Even with two host bits one candidate in two is usable: this many misses in a row do not happen.
const MAX_FIRST_CANDIDATE: u32 = 256;

/// An address as a device carries it: the node's own address with the mask of the whole mesh, so
/// that the kernel's connected route sends the mesh into the device (protocols/ikto-kilo.md §1.8).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DeviceAddress {
    pub address: IpAddr,
    pub prefix_length: u8,
}

/// The addresses that `public_key` may take in `prefix`, best first, each with its candidate
/// number.
///
/// # Errors
/// [`Error::MeshPrefix`] if fewer than two host bits are left in `prefix`, or if it is everything
/// there is: its connected route would be the default route.
pub fn candidates(
    prefix: Prefix,
    public_key: PublicKey,
) -> Result<impl Iterator<Item = (u32, DeviceAddress)>> {
    if prefix.bits() == 0 || prefix.host_bits() < MIN_HOST_BITS {
        return Err(Error::MeshPrefix { prefix });
    }
    Ok((0..=u32::MAX).filter_map(move |n| Some((n, candidate(prefix, public_key, n)?))))
}

/// The address `public_key` takes if nobody else has it.
///
/// # Errors
/// As [`candidates`].
pub fn first_candidate(prefix: Prefix, public_key: PublicKey) -> Result<DeviceAddress> {
    candidates(prefix, public_key)?
        .take_while(|(n, _)| *n < MAX_FIRST_CANDIDATE)
        .map(|(_, address)| address)
        .next()
        .ok_or(Error::MeshPrefix { prefix })
}

/// Candidate `n`, or `None` if its host part is all zeros or all ones.
fn candidate(prefix: Prefix, public_key: PublicKey, n: u32) -> Option<DeviceAddress> {
    let host_bits = u32::from(prefix.host_bits());
    let host = leading_bits(digest(prefix, public_key, n), host_bits);
    let all_ones = leading_bits([0xff; 32], host_bits);
    (host != 0 && host != all_ones).then(|| DeviceAddress {
        address: with_host_part(prefix.network(), host),
        prefix_length: prefix.bits(),
    })
}

fn digest(prefix: Prefix, public_key: PublicKey, n: u32) -> [u8; 32] {
    let hash = Sha256::new().chain_update(DOMAIN).chain_update(public_key.as_bytes());
    let hash = match prefix.network() {
        IpAddr::V4(v4) => hash.chain_update(v4.octets()),
        IpAddr::V6(v6) => hash.chain_update(v6.octets()),
    };
    hash.chain_update([prefix.bits()]).chain_update(n.to_be_bytes()).finalize().into()
}

/// The first `bits` (1 to 128) of a digest as a number.
fn leading_bits(digest: [u8; 32], bits: u32) -> u128 {
    let first_half =
        digest.into_iter().take(16).fold(0u128, |number, byte| number << 8 | u128::from(byte));
    first_half >> 128u32.saturating_sub(bits)
}

/// `network` has no host bits set, and `host` fits into them: a number of `bits` bits, that is.
fn with_host_part(network: IpAddr, host: u128) -> IpAddr {
    match network {
        IpAddr::V4(v4) => Ipv4Addr::from_bits(v4.to_bits() | host as u32).into(),
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() | host).into(),
    }
}

impl fmt::Display for DeviceAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix_length)
    }
}

#[cfg(test)]
mod tests;
