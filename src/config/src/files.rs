//! Which files are cloud-config: protocols/kcrypt.md §10.2.

use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use crate::error::ConfigError;

/// Files of this size and more are skipped, as Kairos does.
const MAX_FILE_BYTES: u64 = 2 * 1024 * 1024;
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

/// The cloud-config files below `dir` in lexical order; none if there is no such directory.
pub(crate) fn read_all(dir: &Path) -> Result<Vec<Source>, ConfigError> {
    let mut sources = Vec::new();
    let mut entries = 0;
    walk(dir, MAX_DEPTH, &mut entries, &mut sources)?;
    Ok(sources)
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
        .and_then(|file| file.take(MAX_FILE_BYTES).read_to_end(&mut bytes))
        .map_err(|e| unreadable(&path, e))?;
    if metadata.len().max(bytes.len() as u64) >= MAX_FILE_BYTES {
        log::warn!("{}: skipped, {MAX_FILE_BYTES} bytes or more", path.display());
        return Ok(None);
    }
    if !has_header(&bytes) {
        return Ok(None);
    }
    match String::from_utf8(bytes) {
        Ok(text) => Ok(Some(Source { path, text })),
        Err(e) => {
            let valid = e.as_bytes().get(..e.utf8_error().valid_up_to()).unwrap_or_default();
            let line = valid.iter().filter(|byte| **byte == b'\n').count().saturating_add(1);
            Err(ConfigError::Syntax { path, line, column: 1, message: "not UTF-8".to_owned() })
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
