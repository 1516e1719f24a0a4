//! A chain of JSON lines: each holds the hash of the one before it.
//!
//! ```text
//! {"seq":1,"time":"2026-11-21T10:00:00.000Z","event":"…",…,"prev":"<64 hex>","hash":"<64 hex>"}
//! ```
//!
//! `hash` is SHA-256 of the line's bytes without `,"hash":"…"` (so that the brace that ends the line follows `prev`), `prev` the
//! `hash` of the line before, 64 zeros in a first line. A changed, removed, added or moved line breaks the chain at that place. What
//! was cut off at the *end* no chain shows by itself: compare its last number and hash, which the server logs whenever it starts
//! and stops, with `latchkey-kms audit verify --contains`.

use std::{
    fmt,
    fs::{File, OpenOptions},
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    time::SystemTime,
};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{Event, Timed};
use crate::time;

/// Longest line; ours have less than 3 KB.
pub(super) const MAX_LINE: usize = 16 * 1024;

/// `,"hash":"` and `"}` around 64 digits.
const HASH_BEGINS: &str = ",\"hash\":\"";
const HASH_ENDS: &str = "\"}";

/// Where a chain ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Head {
    pub(crate) seq: u64,
    pub(crate) hash: String,
}

impl Default for Head {
    /// Before the first line.
    fn default() -> Self {
        Self { seq: 0, hash: "0".repeat(64) }
    }
}

#[derive(Serialize)]
struct Line<'a> {
    seq: u64,
    time: String,
    #[serde(flatten)]
    event: &'a Event,
    prev: &'a str,
}

/// What the chain hangs on in a line.
#[derive(Deserialize)]
pub(super) struct Link {
    pub(super) seq: u64,
    pub(super) time: String,
    pub(super) prev: String,
}

/// Makes the line that follows, and moves the head to it.
fn forge(head: &mut Head, time: SystemTime, event: &Event) -> io::Result<String> {
    let seq = head.seq + 1;
    let line = Line { seq, time: time::rfc3339_millis(time), event, prev: &head.hash };
    let body = serde_json::to_string(&line)?;
    let hash = hash(&body);
    let open = body.strip_suffix('}').unwrap_or(&body);
    let line = format!("{open}{HASH_BEGINS}{hash}{HASH_ENDS}\n");
    *head = Head { seq, hash };
    Ok(line)
}

fn hash(body: &str) -> String {
    Sha256::digest(body).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Checks a line by itself, without its line feed: its links and its own hash.
pub(super) fn check(line: &str) -> Result<(Link, String), &'static str> {
    let (open, end) = line.rsplit_once(HASH_BEGINS).ok_or("it has no hash at its end")?;
    let written = end.strip_suffix(HASH_ENDS).filter(|hash| hash.len() == 64);
    let written = written.ok_or("it has no hash at its end")?;
    if hash(&format!("{open}}}")) != written {
        return Err("its hash does not fit its content");
    }
    let link = serde_json::from_str(line).map_err(|_| "it is no line of an audit log")?;
    Ok((link, written.to_owned()))
}

/// A chain that is added to.
#[derive(Debug)]
pub(crate) struct Chain {
    path: PathBuf,
    head: Head,
    /// The file that has the head at its end: device, inode, size.
    file: Option<(u64, u64, u64)>,
}

impl fmt::Display for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ends with {}:{}", self.path.display(), self.head.seq, self.head.hash)
    }
}

impl Chain {
    pub(crate) fn new(path: PathBuf) -> Self {
        Self { path, head: Head::default(), file: None }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Adds lines durably, wherever the chain ends now; all or none. Gives back the number of the last.
    pub(crate) fn append(&mut self, events: &[Timed]) -> io::Result<u64> {
        let mut options = OpenOptions::new();
        let mut file = options.read(true).append(true).create(true).mode(0o600).open(&self.path)?;
        file.lock()?; // until it is closed
        let (mut head, torn) = self.end_of(&mut file)?;
        let before = file.metadata()?.len();
        let mut text = String::new();
        if torn > 0 {
            let event = Event::TornLineRemoved { bytes: torn };
            text += &forge(&mut head, SystemTime::now(), &event)?;
        }
        for (time, event) in events {
            text += &forge(&mut head, *time, event)?;
        }
        if let Err(error) = file.write_all(text.as_bytes()).and_then(|()| file.sync_data()) {
            file.set_len(before)?;
            return Err(error);
        }
        self.head = head;
        self.file = Some(identity(&file)?);
        Ok(self.head.seq)
    }

    /// Where the chain in this file ends; a half line at its end is cut off, and its length given back.
    fn end_of(&self, file: &mut File) -> io::Result<(Head, u64)> {
        let now = identity(file)?;
        if self.file == Some(now) {
            return Ok((self.head.clone(), 0));
        }
        if now.2 == 0 {
            // A new file. If there was another before, the chain goes on in this one.
            File::open(
                self.path
                    .parent()
                    .filter(|path| !path.as_os_str().is_empty())
                    .unwrap_or(Path::new(".")),
            )?
            .sync_all()?;
            return Ok((self.head.clone(), 0));
        }
        let tail = read_tail(file, now.2)?;
        let whole = tail.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
        let torn = tail.len().saturating_sub(whole) as u64;
        if whole == 0 && now.2 > tail.len() as u64 {
            return Err(io::Error::other("its last line is longer than any of an audit log"));
        }
        let head = match last_line(tail.get(..whole).unwrap_or_default()) {
            None => self.head.clone(),
            Some(line) => {
                let (link, hash) = check(&line).map_err(|why| {
                    io::Error::other(format!(
                        "its last line cannot be continued: {why}; look with `latchkey-kms audit verify`, and move the file away"
                    ))
                })?;
                Head { seq: link.seq, hash }
            }
        };
        if torn > 0 {
            file.set_len(now.2 - torn)?;
        }
        Ok((head, torn))
    }
}

fn identity(file: &File) -> io::Result<(u64, u64, u64)> {
    let metadata = file.metadata()?;
    Ok((metadata.dev(), metadata.ino(), metadata.len()))
}

fn read_tail(file: &mut File, size: u64) -> io::Result<Vec<u8>> {
    let most = 2 * MAX_LINE as u64;
    file.seek(SeekFrom::Start(size.saturating_sub(most)))?;
    let mut tail = Vec::new();
    file.take(most).read_to_end(&mut tail)?;
    Ok(tail)
}

/// The last of whole lines.
fn last_line(lines: &[u8]) -> Option<String> {
    let lines = lines.strip_suffix(b"\n")?;
    let line = lines.rsplit(|&byte| byte == b'\n').next()?;
    Some(String::from_utf8_lossy(line).into_owned())
}
