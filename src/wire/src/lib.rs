//! The formats both ends of Latchkey share: bytes in, types out, and back (`protocols/kcrypt.md`).
//!
//! No I/O, no clock, no TPM, no async runtime. Whatever is parsed here came from a stranger: every parser is
//! bounded ([`MAX_MESSAGE`] unless it says otherwise) and strict, trailing bytes are an error, and no error text
//! repeats a value that could be a secret.
//!
//! The feature `server` adds what only the key server needs: RSA (attestation keys, quotes, credentials) and the
//! YAML manifests. The program of the initramfs is built without it, and without `member`, which is the mesh agent's.

pub mod attest;
pub mod credential;
pub mod dns;
pub mod ek;
mod error;
mod go_json;
pub mod identity;
#[cfg(feature = "manifest")]
pub mod manifest;
#[cfg(feature = "member")]
pub mod member;
pub mod pem;
pub mod plugin;
pub mod pubhash;
pub mod quote;
pub mod release;
pub mod timeline;
mod tpm_bytes;
pub mod v1;
pub mod v2;

pub use error::{Error, Result};

/// Longest message of any protocol here, in bytes. A genuine one has at most about 5 KB (a token with a
/// certificate); `protocols/kcrypt.md` §14 calls 64 KiB ample.
pub const MAX_MESSAGE: usize = 64 * 1024;
