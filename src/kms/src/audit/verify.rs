//! Whether an audit log is whole: every line's hash, and every line's link to the one before.

use std::{
    fmt,
    fs::File,
    io::{self, BufRead as _, BufReader, Read as _},
    path::Path,
};

use thiserror::Error;

use super::chain::{Head, MAX_LINE, check};

/// What a whole chain is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Whole {
    pub(crate) lines: u64,
    /// What the first line hangs on: the beginning, or the end of a file that was moved away.
    pub(crate) begins: Head,
    pub(crate) first_time: String,
    pub(crate) ends: Head,
    pub(crate) last_time: String,
}

impl fmt::Display for Whole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { lines, begins, first_time, ends, last_time } = self;
        writeln!(f, "whole: {lines} lines")?;
        writeln!(f, "first: {} of {first_time}", begins.seq + 1)?;
        if *begins != Head::default() {
            writeln!(f, "continues: {}:{}, the end of an older file", begins.seq, begins.hash)?;
        }
        write!(f, "last: {}:{} of {last_time}", ends.seq, ends.hash)
    }
}

/// Why a chain is not whole.
#[derive(Debug, Error)]
pub(crate) enum Broken {
    #[error("reading it failed: {0}")]
    Io(#[from] io::Error),
    #[error("it is empty")]
    Empty,
    #[error("line {line} breaks the chain: {why}")]
    Line { line: u64, why: String },
    #[error(
        "line {line} is cut off, {bytes} bytes of it are there: a crash did that, and the server mends it when it starts, or somebody cut the file"
    )]
    Torn { line: u64, bytes: usize },
    #[error(
        "it ends with {}:{} and has no line {}:{}: the end was cut off, or it is another chain",
        .ends.seq, .ends.hash, .wanted.seq, .wanted.hash
    )]
    Shorter { ends: Head, wanted: Head },
}

/// Reads a file to its end. `contains` is a line that must be in it.
pub(crate) fn verify(path: &Path, contains: Option<&Head>) -> Result<Whole, Broken> {
    let file = File::open(path)?;
    // A server may be writing: what is there when nobody writes is what is looked at.
    file.lock_shared()?;
    let size = file.metadata()?.len();
    file.unlock()?;
    let mut reader = BufReader::new(file.take(size));
    let mut whole: Option<Whole> = None;
    let mut seen = contains.is_none();
    let mut bytes = Vec::new();
    for line in 1.. {
        bytes.clear();
        let got = (&mut reader).take(MAX_LINE as u64).read_until(b'\n', &mut bytes)?;
        if got == 0 {
            break;
        }
        let breaks = |why: String| Broken::Line { line, why };
        let text = match bytes.strip_suffix(b"\n") {
            Some(text) => std::str::from_utf8(text).map_err(|_| breaks("it is not text".into()))?,
            None if got == MAX_LINE => return Err(breaks("it is too long".into())),
            None => return Err(Broken::Torn { line, bytes: got }),
        };
        let (link, hash) = check(text).map_err(|why| breaks(why.into()))?;
        let ends = Head { seq: link.seq, hash };
        seen |= contains == Some(&ends);
        match &mut whole {
            None => {
                let begins = Head { seq: link.seq.saturating_sub(1), hash: link.prev };
                seen |= contains == Some(&begins);
                whole = Some(Whole {
                    lines: 1,
                    begins,
                    first_time: link.time.clone(),
                    ends,
                    last_time: link.time,
                });
            }
            Some(whole) => {
                if link.prev != whole.ends.hash {
                    return Err(breaks("it does not follow the line before it".into()));
                }
                if link.seq != whole.ends.seq + 1 {
                    let (wanted, got) = (whole.ends.seq + 1, link.seq);
                    return Err(breaks(format!("its number is {got}, not {wanted}")));
                }
                whole.lines += 1;
                whole.ends = ends;
                whole.last_time = link.time;
            }
        }
    }
    let whole = whole.ok_or(Broken::Empty)?;
    match contains {
        Some(wanted) if !seen => Err(Broken::Shorter { ends: whole.ends, wanted: wanted.clone() }),
        _ => Ok(whole),
    }
}
