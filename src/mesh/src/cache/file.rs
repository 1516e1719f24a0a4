//! The file of the cache: read no further than it may be long, written beside and renamed.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::libc::{O_NOFOLLOW, O_NONBLOCK};

use super::MAX_FILE;
use crate::error::{Error, Result};

/// `None` if there is no such file.
pub(super) fn read(path: &Path) -> Result<Option<Vec<u8>>> {
    let failed = |source| Error::File { action: "read", path: path.into(), source };
    // A FIFO would be waited for.
    let opened = OpenOptions::new().read(true).custom_flags(O_NOFOLLOW | O_NONBLOCK).open(path);
    let file = match opened {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(failed)?,
    };
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(failed(io::Error::other("it is no ordinary file")));
    }
    let mut bytes = Vec::new();
    file.take(MAX_FILE as u64 + 1).read_to_end(&mut bytes).map_err(failed)?;
    Ok(Some(bytes))
}

pub(super) fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let directory = directory.unwrap_or(Path::new("."));
    let new = beside(path);
    let written = DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .and_then(|()| put(&new, bytes))
        .and_then(|()| fs::rename(&new, path))
        .and_then(|()| File::open(directory)?.sync_all());
    written.map_err(|source| {
        let _ = fs::remove_file(&new);
        Error::File { action: "write", path: path.into(), source }
    })
}

/// What a write that was cut short left behind is taken away first: a new file has the rights that it should have.
fn put(new: &Path, bytes: &[u8]) -> io::Result<()> {
    match fs::remove_file(new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(new)?;
    file.write_all(bytes)?;
    file.sync_all()
}

pub(super) fn beside(path: &Path) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(".new");
    name.into()
}
