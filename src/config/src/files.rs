//! Which files are cloud-config: protocols/kcrypt.md §10.2.

use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::error::ConfigError;
use crate::keys;

/// Files of this size and more are not read, as Kairos does.
pub(crate) const MAX_FILE_BYTES: usize = 2 * 1024 * 1024;
/// The header has to stand in one of the first so many lines.
const HEADER_LINES: usize = 10;
const HEADERS: [&[u8]; 3] = [b"#cloud-config", b"#kairos-config", b"#node-config"];
/// Directory entries looked at below one directory; an /oem has a handful.
const MAX_ENTRIES: usize = 10_000;
const MAX_DEPTH: usize = 32;

/// One file that says it is cloud-config.
#[derive(Debug)]
pub(crate) struct Source {
    pub(crate) path: PathBuf,
    pub(crate) text: String,
}

/// Whether anything stands in `dir`, by somebody whose files are read.
#[must_use]
pub fn is_populated(dir: &Path) -> bool {
    let has_entries = || fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_some());
    is_trustworthy(dir).unwrap_or(true) && has_entries()
}

/// The cloud-config files below `dir` in lexical order; none if there is no such directory.
pub(crate) fn read_all(dir: &Path) -> Result<Vec<Source>, ConfigError> {
    let mut sources = Vec::new();
    if !is_trustworthy(dir)? {
        log::warn!(
            "{}: not read, because others than root may have written it; it is in a directory for everybody",
            dir.display()
        );
        return Ok(sources);
    }
    let mut entries = 0;
    walk(dir, MAX_DEPTH, &mut entries, &mut sources)?;
    Ok(sources)
}

/// Below /tmp anybody can make a directory of any name. What is there counts if root or whoever we run as made it, and
/// nobody else can write to it.
fn is_trustworthy(dir: &Path) -> Result<bool, ConfigError> {
    const OTHERS_WRITE: u32 = 0o022;
    const STICKY: u32 = 0o1000;
    let metadata = match fs::symlink_metadata(dir) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(true),
        metadata => metadata.map_err(|e| unreadable(dir, e))?,
    };
    let for_everybody = dir
        .parent()
        .and_then(|parent| fs::metadata(parent).ok())
        .is_some_and(|parent| parent.mode() & STICKY != 0);
    let ourselves = fs::metadata("/proc/self").map_or(0, |process| process.uid());
    Ok(!for_everybody
        || metadata.is_dir()
            && metadata.mode() & OTHERS_WRITE == 0
            && [0, ourselves].contains(&metadata.uid()))
}

fn walk(
    dir: &Path,
    depth: usize,
    entries: &mut usize,
    sources: &mut Vec<Source>,
) -> Result<(), ConfigError> {
    let too_much = |what, limit| ConfigError::TooMuch { path: dir.to_owned(), what, limit };
    let depth = depth.checked_sub(1).ok_or_else(|| too_much("nested too deep", MAX_DEPTH))?;
    for path in children(dir)? {
        *entries = entries.saturating_add(1);
        if *entries > MAX_ENTRIES {
            return Err(too_much("too many files", MAX_ENTRIES));
        }
        // Not following links here: a link to a directory may lead anywhere, also back up.
        let kind = fs::symlink_metadata(&path).map_err(|e| unreadable(&path, e))?.file_type();
        if kind.is_dir() {
            walk(&path, depth, entries, sources)?;
        } else if is_yaml(&path) {
            sources.extend(read(path)?);
        }
    }
    Ok(())
}

fn children(dir: &Path) -> Result<Vec<PathBuf>, ConfigError> {
    let entries = match fs::read_dir(dir) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(|e| unreadable(dir, e))?,
    };
    let paths: Result<Vec<PathBuf>, _> =
        entries.take(MAX_ENTRIES + 1).map(|entry| entry.map(|entry| entry.path())).collect();
    let mut paths = paths.map_err(|e| unreadable(dir, e))?;
    paths.sort();
    Ok(paths)
}

fn is_yaml(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "yml" || extension == "yaml")
}

/// The text of a cloud-config file; nothing for a file that is none, is too large or no regular file.
fn read(path: PathBuf) -> Result<Option<Source>, ConfigError> {
    // Before opening, since opening a FIFO would wait for ever.
    let metadata = fs::metadata(&path).map_err(|e| unreadable(&path, e))?;
    if !metadata.is_file() {
        return Ok(None);
    }
    let mut bytes = Vec::new();
    File::open(&path)
        .and_then(|file| file.take(MAX_FILE_BYTES as u64).read_to_end(&mut bytes))
        .map_err(|e| unreadable(&path, e))?;
    if bytes.len() < MAX_FILE_BYTES {
        return Source::of_bytes(path, bytes);
    }
    if has_header(&bytes) {
        refuse_ours(&path, &bytes)?;
        log::warn!(
            "{}: not read, {MAX_FILE_BYTES} bytes or more; Kairos does not read it either",
            path.display()
        );
    }
    Ok(None)
}

/// What is too large is nobody's configuration, but somebody may have meant it to be ours.
fn refuse_ours(path: &Path, bytes: &[u8]) -> Result<(), ConfigError> {
    let ours = |line: &[u8]| {
        keys::names_in("").find(|key| {
            line.strip_prefix(key.as_bytes())
                .is_some_and(|rest| rest.trim_ascii_start().starts_with(b":"))
        })
    };
    // `install` is in every installer's file, and most of it is none of our business.
    let found = (1..)
        .zip(bytes.split(|byte| *byte == b'\n'))
        .find_map(|(line, text)| ours(text).filter(|key| *key != "install").map(|key| (line, key)));
    match found {
        Some((line, key)) => {
            Err(ConfigError::TooLarge { path: path.to_owned(), line, key, limit: MAX_FILE_BYTES })
        }
        None => Ok(()),
    }
}

impl Source {
    /// Nothing if no header says that it is cloud-config.
    pub(crate) fn of_bytes(path: PathBuf, bytes: Vec<u8>) -> Result<Option<Self>, ConfigError> {
        if !has_header(&bytes) {
            return Ok(None);
        }
        match String::from_utf8(bytes) {
            Ok(text) => Ok(Some(Self { path, text })),
            Err(e) => {
                let valid = e.as_bytes().get(..e.utf8_error().valid_up_to()).unwrap_or_default();
                let line = valid.iter().filter(|byte| **byte == b'\n').count().saturating_add(1);
                Err(ConfigError::Syntax { path, line, column: 1, message: "not UTF-8".to_owned() })
            }
        }
    }
}

fn has_header(bytes: &[u8]) -> bool {
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    bytes
        .split(|byte| *byte == b'\n')
        .take(HEADER_LINES)
        .any(|line| HEADERS.contains(&line.trim_ascii_end()))
}

fn unreadable(path: &Path, source: std::io::Error) -> ConfigError {
    ConfigError::Unreadable { path: path.to_owned(), source }
}
