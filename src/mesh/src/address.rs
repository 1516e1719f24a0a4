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

use latchkey_wire::member::Cidr;
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::key::PublicKey;

const DOMAIN: &[u8] = b"latchkey mesh address v1\0";

/// Fewer host bits leave nothing beside all zeros and all ones, so a /31, /32, /127 or /128 is no
/// mesh.
const MIN_HOST_BITS: u32 = 2;

/// Draws for one node. Even with two host bits one in two is usable; in a mesh with half of its
/// addresses taken, this many misses in a row do not happen.
const MAX_DRAWS: u32 = 256;

/// An address as a device carries it: the node's own address with the mask of the whole mesh, so
/// that the kernel's connected route sends the mesh into the device (protocols/ikto-kilo.md §1.8).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DeviceAddress {
    pub address: IpAddr,
    pub prefix_length: u8,
}

impl DeviceAddress {
    pub fn new(own: &Cidr, mesh: &Cidr) -> Self {
        Self { address: own.address(), prefix_length: mesh.length() }
    }
}

/// The addresses that `public_key` may take in `mesh`, best first, each with its candidate number.
/// At least one, and not without end. Where the mesh is small, one may come twice.
///
/// # Errors
/// [`Error::MeshPrefix`] if fewer than two host bits are left in `mesh`, or if it is everything
/// there is: its connected route would be the default route.
pub fn candidates(
    mesh: &Cidr,
    public_key: PublicKey,
) -> Result<impl Iterator<Item = (u32, IpAddr)> + use<>> {
    let mesh = mesh.masked();
    if mesh.length() == 0 || host_bits(&mesh) < MIN_HOST_BITS {
        return Err(Error::MeshPrefix { mesh });
    }
    Ok((0..MAX_DRAWS).filter_map(move |n| Some((n, candidate(&mesh, public_key, n)?))))
}

fn host_bits(mesh: &Cidr) -> u32 {
    let bits: u32 = if mesh.address().is_ipv4() { 32 } else { 128 };
    bits.saturating_sub(mesh.length().into())
}

/// Candidate `n`, or `None` if its host part is all zeros or all ones.
fn candidate(mesh: &Cidr, public_key: PublicKey, n: u32) -> Option<IpAddr> {
    let host_bits = host_bits(mesh);
    let host = leading_bits(digest(mesh, public_key, n), host_bits);
    let all_ones = leading_bits([0xff; 32], host_bits);
    (host != 0 && host != all_ones).then(|| with_host_part(mesh.address(), host))
}

fn digest(mesh: &Cidr, public_key: PublicKey, n: u32) -> [u8; 32] {
    let hash = Sha256::new().chain_update(DOMAIN).chain_update(public_key.as_bytes());
    let hash = match mesh.address() {
        IpAddr::V4(v4) => hash.chain_update(v4.octets()),
        IpAddr::V6(v6) => hash.chain_update(v6.octets()),
    };
    hash.chain_update([mesh.length()]).chain_update(n.to_be_bytes()).finalize().into()
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
