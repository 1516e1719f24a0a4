//! Records of the mesh's registry: who is a member, under which key, at which address (protocols/ikto-kilo.md §1.4).
//!
//! ```text
//! {"name":"a","public_key":"…","advertise_address":"10.99.1.2","allowed_ip":"fd10:aaaa:1::/48","wg_port":51820,
//!  "version":1,"advertise_name":"a.example.org","capabilities":["…"],"signature":"…"}
//! ```
//!
//! (in one line and without white space). The first five fields are Ikto's, byte for byte; what follows them is ours, and
//! ignored by agents that do not know it. Whatever a machine has to prove before it counts as a member will stand here, in
//! [`Extension`].
//!
//! The signature, base64 of 64 bytes, is by the WireGuard key of `public_key` ([`sign`]) over bucket, registry key and the
//! record's text as far as `,"signature":`, each after its length as a u64 in big endian; the context is
//! `latchkey member record v1`. So fields of the future are signed like those of today, nothing depends on how JSON could
//! be written otherwise, and a record that was copied to another key or another bucket is not a signed one there. It counts
//! only in this form, as the last field, and if no other field has its name.

mod cidr;
mod read;
mod write;
mod xeddsa;

pub use cidr::{Cidr, NotCidr, cidr_of, key_of};
pub use read::{Claim, read, read_unchecked};
pub use xeddsa::{sign, verify};

/// Longest record read, in bytes. A genuine one has less than 500.
pub const MAX_MEMBER: usize = 16 * 1024;

/// Longest name and longest advertised address, in bytes. A host's name has at most 64 (hostname(7)), a DNS name 253.
pub const MAX_NAME: usize = 1024;
pub const MAX_ADDRESS: usize = 255;
/// Most capabilities of a member, and the longest, in bytes.
pub const MAX_CAPABILITIES: usize = 32;
pub const MAX_CAPABILITY: usize = 64;

/// Version of [`Extension`].
pub(crate) const VERSION: u64 = 1;
/// What signatures over records are made for.
pub(crate) const CONTEXT: &str = "latchkey member record v1";

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

/// What a signature is over: bucket and key with their lengths before them, so that no two pairs run into one, and the
/// record's text as far as the signature.
fn signed_bytes(bucket: &str, key: &str, text: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(bucket.len() + key.len() + text.len() + 16);
    for part in [bucket.as_bytes(), key.as_bytes(), text] {
        bytes.extend((part.len() as u64).to_be_bytes());
        bytes.extend(part);
    }
    bytes
}

#[cfg(test)]
mod tests;
