//! `certificate`: PEM text (RFC 7468) written into the config, or the path of a PEM file.
//!
//! Kairos' own client takes text only and silently ignores a path (protocols/kcrypt.md §10.4); here both work, and
//! anything that is neither is an error.

use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::path::{Path, PathBuf};

use crate::cmdline::CMDLINE;
use crate::error::{ConfigError, Place};
use crate::keys::CERTIFICATE;

pub(crate) const BEGIN: &str = "-----BEGIN CERTIFICATE-----";
const END: &str = "-----END CERTIFICATE-----";
/// A whole distribution's bundle has about 220 KiB.
const MAX_BYTES: u64 = 1024 * 1024;

pub(crate) fn pem(value: &str, place: &Place, roots: &[PathBuf]) -> Result<String, ConfigError> {
    let invalid = |why: String| ConfigError::Invalid {
        place: place.clone(),
        key: CERTIFICATE.to_owned(),
        why,
    };
    if value.contains("-----BEGIN ") {
        check(value).map_err(|why| invalid(why.to_owned()))?;
        return Ok(value.to_owned());
    }
    let path = value.trim();
    if !path.starts_with('/') || path.contains('\n') {
        return Err(invalid(
            "neither PEM text (-----BEGIN CERTIFICATE-----) nor an absolute path".to_owned(),
        ));
    }
    let (path, bytes) = read_first(&candidates(path, place, roots))
        .map_err(|(path, e)| invalid(format!("cannot read {}: {e}", path.display())))?;
    let text = String::from_utf8(bytes)
        .map_err(|_| invalid(format!("{} is not PEM text", path.display())))?;
    check(&text).map_err(|why| invalid(format!("{}: {why}", path.display())))?;
    Ok(text)
}

/// PEM text that has been through one line, as on a command line: with spaces or `\n` for its line ends.
pub(crate) fn in_lines(text: &str) -> String {
    let text = text.replace("\\n", "\n");
    let apart = [BEGIN, END]
        .iter()
        .fold(text, |text, marker| text.replace(marker, &format!("\n{marker}\n")));
    let is_marker = |line: &&str| [BEGIN, END].contains(line);
    let lines = apart.lines().map(str::trim);
    lines.fold(String::new(), |pem, line| {
        let words = if is_marker(&line) { line.to_owned() } else { line.replace(' ', "\n") };
        if words.is_empty() { pem } else { pem + &words + "\n" }
    })
}

/// Where a file is that is not read here: the first of its places that there is, or else as it is written.
pub(crate) fn located(path: &Path, place: &Place, roots: &[PathBuf]) -> PathBuf {
    let candidates = path.to_str().map(|path| candidates(path, place, roots)).unwrap_or_default();
    match candidates.as_slice() {
        [] | [_] => path.to_owned(),
        several => several.iter().find(|path| path.exists()).cloned().unwrap_or(path.to_owned()),
    }
}

/// The path as written; and since the initramfs sees /oem under another name, the same file below the directory that the
/// setting was found in. The command line is in none of them, so there each directory counts.
fn candidates(path: &str, place: &Place, roots: &[PathBuf]) -> Vec<PathBuf> {
    let mut candidates = vec![PathBuf::from(path)];
    if let Some(below) = path.strip_prefix("/oem/") {
        let own = roots.iter().find(|root| place.file.starts_with(root));
        let all = roots.iter().filter(|_| own.is_none() && *place.file == *Path::new(CMDLINE));
        candidates.extend(own.into_iter().chain(all).map(|root| root.join(below)));
    }
    candidates
}

/// The first of the files that is there.
fn read_first(paths: &[PathBuf]) -> Result<(PathBuf, Vec<u8>), (PathBuf, io::Error)> {
    let mut absent = (PathBuf::new(), io::Error::from(ErrorKind::NotFound));
    for path in paths {
        match read(path) {
            Err(e) if e.kind() == ErrorKind::NotFound => absent = (path.clone(), e),
            Err(e) => return Err((path.clone(), e)),
            Ok(bytes) => return Ok((path.clone(), bytes)),
        }
    }
    Err((paths.first().cloned().unwrap_or_default(), absent.1))
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    if !std::fs::metadata(path)?.is_file() {
        return Err(io::Error::new(ErrorKind::InvalidInput, "not a regular file"));
    }
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(io::Error::new(ErrorKind::FileTooLarge, "more than 1 MiB"));
    }
    Ok(bytes)
}

/// One certificate at least, each begun and ended, of base64 characters, and no key. What is in it, TLS will judge.
pub(crate) fn check(text: &str) -> Result<(), &'static str> {
    let mut complete = 0_usize;
    let mut inside = false;
    for line in text.lines().map(str::trim) {
        match line {
            BEGIN if !inside => inside = true,
            END if inside => {
                inside = false;
                complete = complete.saturating_add(1);
            }
            BEGIN | END => return Err("certificates that are not each begun and ended"),
            _ if line.starts_with("-----BEGIN ") => {
                return Err("something else than certificates is in it; keys have no place here");
            }
            _ if inside
                && !line.bytes().all(|b| b.is_ascii_alphanumeric() || b"+/=".contains(&b)) =>
            {
                return Err("a certificate with characters that are not base64");
            }
            _ => {}
        }
    }
    match (complete, inside) {
        (0, false) => Err("no -----BEGIN CERTIFICATE----- on a line of its own"),
        (_, true) => Err("a certificate without -----END CERTIFICATE-----"),
        _ => Ok(()),
    }
}
