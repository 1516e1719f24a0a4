//! The last known members on disk, so that a machine finds its peers while the registry is away.
//!
//! ```text
//! latchkey mesh cache v1\n
//! SIGNATURE\n                      base64 of 64 bytes: XEdDSA by the node's key over all that follows
//! {"bucket":…,"incarnation":…,"own":…,"entries":[{"key":…,"revision":…,"value":base64},…]}\n
//! ```
//!
//! The node trusts what it wrote itself: a file that another key signed, that is of another bucket, or in which a byte differs
//! is no cache. There is no secret in it, and no private key: where the signature fits, the key was there already.

mod file;

use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use latchkey_wire::member::{Cidr, sign, verify};
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::key::PrivateKey;
use crate::registry::Entry;

/// Most records kept. The oldest are, if there are more: they are the ones that count where prefixes overlap.
pub const MAX_RECORDS: usize = 20_000;

/// Longest file, in bytes: 20,000 records of 1.5 KB.
pub const MAX_FILE: usize = 48 * 1024 * 1024;

const MAGIC: &str = "latchkey mesh cache v1";

/// Base64 of 64 bytes.
const SIGNATURE_TEXT: usize = 88;

/// What is kept.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Cached {
    /// Of the bucket: [`crate::registry::Event::Snapshot`].
    pub incarnation: String,
    /// The address that this node has claimed.
    pub own: Option<Cidr>,
    pub entries: Vec<Entry>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Body {
    bucket: String,
    incarnation: String,
    own: Option<String>,
    entries: Vec<BodyEntry>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct BodyEntry {
    key: String,
    revision: u64,
    value: String,
}

/// What was stored with this key for this bucket; `None`, and a word in the log, if there is nothing that can be used.
///
/// # Errors
/// [`crate::error::Error::File`] if there is something that cannot be read.
pub fn load(path: &Path, key: &PrivateKey, bucket: &str) -> Result<Option<Cached>> {
    let Some(bytes) = file::read(path)? else { return Ok(None) };
    match parse(&bytes, key, bucket) {
        Ok(cached) => Ok(Some(cached)),
        Err(reason) => {
            log::warn!(
                "{} is not used: {reason}; it is written anew as soon as the registry has been read",
                path.display()
            );
            Ok(None)
        }
    }
}

/// Stores all of it or, if the machine stops in between, leaves what was there. Waits for the disk.
///
/// # Errors
/// [`crate::error::Error::File`] if it cannot be written.
pub fn store(path: &Path, key: &PrivateKey, bucket: &str, cached: &Cached) -> Result<()> {
    file::write(path, &format(key, bucket, cached)?)
}

/// Reads the bytes of a file.
///
/// # Errors
/// Why they are not to be used, for a person.
pub fn parse(bytes: &[u8], key: &PrivateKey, bucket: &str) -> Result<Cached, &'static str> {
    const TORN: &str = "it is damaged, or no cache of this version";
    if bytes.len() > MAX_FILE {
        return Err("it is longer than a cache ever is");
    }
    let rest = bytes.strip_prefix(MAGIC.as_bytes()).and_then(|rest| rest.strip_prefix(b"\n"));
    let (signature, body) =
        rest.and_then(|rest| rest.split_at_checked(SIGNATURE_TEXT)).ok_or(TORN)?;
    let body = body.strip_prefix(b"\n").ok_or(TORN)?;
    let signature =
        STANDARD.decode(signature).ok().and_then(|bytes| bytes.try_into().ok()).ok_or(TORN)?;
    if !verify(MAGIC, body, key.public().as_bytes(), &signature) {
        return Err("it was not signed by this node's key, or changed since");
    }
    let body: Body = serde_json::from_slice(body).map_err(|_| TORN)?;
    if body.bucket != bucket {
        return Err("it is of another bucket");
    }
    if body.entries.len() > MAX_RECORDS {
        return Err("it has more records than a cache ever has");
    }
    let own = body.own.map(|text| text.parse()).transpose().map_err(|_| TORN)?;
    let entries = body.entries.into_iter().map(entry).collect::<Option<_>>().ok_or(TORN)?;
    Ok(Cached { incarnation: body.incarnation, own, entries })
}

fn entry(entry: BodyEntry) -> Option<Entry> {
    let value = Bytes::from(STANDARD.decode(entry.value).ok()?);
    Some(Entry { key: entry.key, value, revision: entry.revision })
}

/// The bytes of a file.
fn format(key: &PrivateKey, bucket: &str, cached: &Cached) -> Result<Vec<u8>> {
    let entries = bounded(&cached.entries);
    let body = Body {
        bucket: bucket.to_owned(),
        incarnation: cached.incarnation.clone(),
        own: cached.own.map(|own| own.to_string()),
        entries: entries
            .into_iter()
            .map(|entry| BodyEntry {
                key: entry.key.clone(),
                revision: entry.revision,
                value: STANDARD.encode(&entry.value),
            })
            .collect(),
    };
    let mut body = serde_json::to_vec(&body)?;
    body.push(b'\n');
    let signature = STANDARD.encode(sign(MAGIC, &body, key.as_bytes()));
    Ok([MAGIC.as_bytes(), b"\n", signature.as_bytes(), b"\n", &body].concat())
}

/// All of them, in their order; of too many the oldest.
fn bounded(all: &[Entry]) -> Vec<&Entry> {
    /// What a record has around key and value.
    const AROUND: usize = 64;
    const REST: usize = 4096;
    let length = |entry: &Entry| 6 * entry.key.len() + entry.value.len().div_ceil(3) * 4 + AROUND;
    let mut entries: Vec<&Entry> = all.iter().collect();
    let whole: usize = entries.iter().map(|entry| length(entry)).sum();
    if entries.len() <= MAX_RECORDS && whole <= MAX_FILE - REST {
        return entries;
    }
    entries.sort_by_key(|entry| entry.revision);
    let mut room = MAX_FILE - REST;
    let fits = entries.iter().take(MAX_RECORDS).take_while(|entry| {
        let left = room.checked_sub(length(entry));
        room = left.unwrap_or(0);
        left.is_some()
    });
    let kept = fits.count();
    log::warn!(
        "{} records are too many for the cache: the oldest {kept} are kept in it",
        all.len()
    );
    entries.truncate(kept);
    entries
}

#[cfg(test)]
mod tests;
