//! Files of the store: reading them whole, and writing them so that a crash or a reader at any moment finds the old content
//! or the new one.

use std::{
    ffi::OsStr,
    fs::{self, File, OpenOptions, Permissions},
    io::{self, Read as _, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown},
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use latchkey_wire::manifest;
use nix::fcntl::OFlag;
use zeroize::Zeroizing;

/// How our half-written files begin.
const TEMPORARY: &str = ".latchkey-new-";

/// A file whose last change is younger than this when it is first read may change again without looking different
/// (same size, same tick of the file system's clock), so it is read once more.
const YOUNG: Duration = Duration::from_secs(2);

/// How a file looks from outside.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
}

impl Stamp {
    /// `None` if there is no such file.
    pub(super) fn at(path: &Path) -> Option<Self> {
        fs::metadata(path).ok().map(|metadata| Self::of(&metadata))
    }

    fn of(metadata: &fs::Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        }
    }

    pub(super) fn is_young(self) -> bool {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let modified = Duration::from_secs(self.modified.0.try_into().unwrap_or_default());
        now < modified + YOUNG
    }
}

/// The manifests' paths, in order.
pub(super) fn manifest_paths(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.file_name().is_some_and(is_manifest) && !path.is_dir() {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

/// Whether a file of this name counts.
pub(super) fn is_manifest(name: &OsStr) -> bool {
    let extension = Path::new(name).extension();
    !name.as_encoded_bytes().starts_with(b".")
        && extension.is_some_and(|extension| extension == "yaml" || extension == "yml")
}

/// A file as it was when it was read.
pub(super) struct Read {
    pub(super) stamp: Stamp,
    pub(super) mode: u32,
    owner: (u32, u32),
    pub(super) text: Zeroizing<String>,
}

/// Reads a file of bounded size.
pub(super) fn read(path: &Path) -> io::Result<Read> {
    // Not blocking: somebody's FIFO with a fitting name must not stop the server.
    let file = OpenOptions::new().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::other("it is not a file"));
    }
    let room = usize::try_from(metadata.len()).unwrap_or_default().min(manifest::MAX_FILE) + 1;
    let mut bytes = Zeroizing::new(Vec::with_capacity(room));
    file.take(manifest::MAX_FILE as u64 + 1).read_to_end(&mut bytes)?;
    let text = String::from_utf8(std::mem::take(&mut *bytes))
        .map_err(|_| io::Error::other("it is not UTF-8 text"))?;
    Ok(Read {
        stamp: Stamp::of(&metadata),
        mode: metadata.mode(),
        owner: (metadata.uid(), metadata.gid()),
        text: Zeroizing::new(text),
    })
}

/// A file that is to be, and what it is to hold.
pub(super) struct NewFile {
    pub(super) path: PathBuf,
    pub(super) content: Zeroizing<Vec<u8>>,
}

/// Writes new files, mode 0600, that are complete and durable when they appear, one after the other; or fails at the first
/// whose name is taken.
pub(super) fn write_new(directory: &Path, files: &[NewFile]) -> io::Result<()> {
    let mut temporary = Vec::new();
    let written = files.iter().try_for_each(|file| {
        let path = temporary_in(directory)?;
        temporary.push(path.clone());
        write(&path, &file.content, None)
    });
    let linked = written.and_then(|()| {
        temporary.iter().zip(files).try_for_each(|(from, file)| fs::hard_link(from, &file.path))
    });
    for path in temporary {
        if let Err(error) = fs::remove_file(&path)
            && linked.is_ok()
        {
            log::warn!("store: {}: cannot be removed: {error}", path.display());
        }
    }
    linked?;
    sync_directory(directory)
}

/// Exchanges the content of a file that is as it was when `old` was read; owner and mode stay. If somebody has changed it
/// meanwhile, nothing is written: [`io::ErrorKind::ResourceBusy`].
pub(super) fn exchange(path: &Path, old: &Read, content: &[u8]) -> io::Result<()> {
    let directory = parent(path)?;
    let temporary = temporary_in(directory)?;
    let exchanged = write(&temporary, content, Some(old))
        .and_then(|()| unchanged(path, old))
        .and_then(|()| fs::rename(&temporary, path));
    if exchanged.is_err() {
        let _ = fs::remove_file(&temporary); // it may not be there; the first error counts
    }
    exchanged?;
    sync_directory(directory)
}

/// Removes a file that is as it was when `old` was read.
pub(super) fn remove(path: &Path, old: &Read) -> io::Result<()> {
    unchanged(path, old)?;
    fs::remove_file(path)?;
    sync_directory(parent(path)?)
}

fn unchanged(path: &Path, old: &Read) -> io::Result<()> {
    let now = read(path)?;
    if now.stamp == old.stamp && now.text == old.text {
        return Ok(());
    }
    Err(io::Error::new(io::ErrorKind::ResourceBusy, "somebody has changed it meanwhile"))
}

fn parent(path: &Path) -> io::Result<&Path> {
    path.parent().ok_or_else(|| io::Error::other("it is in no directory"))
}

fn temporary_in(directory: &Path) -> io::Result<PathBuf> {
    let mut random = [0; 8];
    getrandom::fill(&mut random).map_err(io::Error::other)?;
    Ok(directory.join(format!("{TEMPORARY}{:016x}", u64::from_ne_bytes(random))))
}

fn write(temporary: &Path, content: &[u8], like: Option<&Read>) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(temporary)?;
    file.write_all(content)?;
    if let Some(like) = like {
        let (user, group) = like.owner;
        let ours = file.metadata()?;
        if (ours.uid(), ours.gid()) != like.owner
            && let Err(error) = fchown(&file, Some(user), Some(group))
        {
            log::warn!("store: its owner {user}:{group} could not be kept: {error}");
        }
        file.set_permissions(Permissions::from_mode(like.mode & 0o777))?;
    }
    file.sync_all()
}

fn sync_directory(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

/// Files that a crash left half-written. They never counted: nothing was promised about them.
pub(super) fn remove_leftovers(directory: &Path) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if is_leftover(&entry.file_name()) {
            match fs::remove_file(entry.path()) {
                Ok(()) => log::info!(
                    "store: {}: removed, left half-written by a crash",
                    entry.path().display()
                ),
                Err(error) => {
                    log::warn!("store: {}: cannot be removed: {error}", entry.path().display())
                }
            }
        }
    }
}

fn is_leftover(name: &OsStr) -> bool {
    name.as_encoded_bytes().starts_with(TEMPORARY.as_bytes())
}
