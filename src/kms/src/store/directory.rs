//! Reading the directory, noticing changes, adding Secrets (see the layout in the parent module).

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs::{self, File, OpenOptions},
    hash::{DefaultHasher, Hash, Hasher},
    io::{self, Read as _, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use latchkey_wire::manifest::{self, Manifests, Secret};
use nix::fcntl::OFlag;
use zeroize::Zeroizing;

use super::{
    CreateError, Status,
    snapshot::{ReadSecret, Snapshot, Source},
};

/// How our half-written files begin.
const TEMPORARY: &str = ".latchkey-new-";

/// A file whose last change is younger than this when it is first read may change again without looking different
/// (same size, same tick of the file system's clock), so it is read once more.
const YOUNG: Duration = Duration::from_secs(2);

/// Longest name of a Secret. With a namespace (63), the suffix and two dots it stays below the 255 bytes of a file name.
const MAX_NAME: usize = 180;

/// A directory of manifests.
pub(crate) struct Store {
    directory: PathBuf,
    files: Mutex<Files>,
    snapshot: RwLock<Arc<Snapshot>>,
    /// How often a snapshot was made, and whether the directory could be read at the last look.
    generation: AtomicU64,
    readable: AtomicBool,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Store({})", self.directory.display())
    }
}

/// What is known about each file, by path.
#[derive(Default)]
struct Files {
    known: BTreeMap<PathBuf, Known>,
    /// The directory itself could not be read at the last poll.
    lost: bool,
    /// Contradictions between files that the log has already.
    complaints: Vec<String>,
}

#[derive(Default)]
struct Known {
    /// How the file looked when it was read; `None` to read it again.
    read: Option<Stamp>,
    /// How it looked at the last poll.
    seen: Option<Stamp>,
    /// Fingerprint of the content that was read last, so that reading the same again is no news.
    content: Option<u64>,
    /// What it held when it could last be read.
    good: Arc<Manifests>,
    /// Set while it cannot be read.
    unreadable: Option<Option<Arc<Zeroizing<String>>>>,
}

/// How a file looks from outside.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
}

impl Stamp {
    fn of(metadata: &fs::Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        }
    }

    fn is_young(self) -> bool {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let modified = Duration::from_secs(self.modified.0.try_into().unwrap_or_default());
        now < modified + YOUNG
    }
}

/// Which changes to take.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Take {
    /// What has stayed the same since the last poll.
    Settled,
    /// Everything, at once.
    All,
}

impl Store {
    /// Opens a directory and reads it. Mistakes in files are logged; that the directory cannot be read is an error.
    pub(crate) fn open(directory: &Path) -> io::Result<Self> {
        let directory = directory.canonicalize()?;
        fs::read_dir(&directory)?;
        remove_leftovers(&directory);
        let store = Self {
            directory,
            files: Mutex::default(),
            snapshot: RwLock::default(),
            generation: AtomicU64::new(0),
            readable: AtomicBool::new(true),
        };
        let mut files = store.lock();
        store.refresh(&mut files, Take::All);
        store.publish(&mut files);
        drop(files);
        Ok(store)
    }

    /// Looks for changes and takes those that have settled.
    pub(crate) fn poll(&self) {
        let mut files = self.lock();
        if self.refresh(&mut files, Take::Settled) {
            self.publish(&mut files);
        }
    }

    /// What the store holds now.
    pub(crate) fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshot.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How it is. Never waits for the file system.
    pub(crate) fn status(&self) -> Status {
        let snapshot = self.snapshot();
        let (volumes, secrets) = snapshot.counts();
        Status {
            generation: self.generation.load(Ordering::Relaxed),
            readable: self.readable.load(Ordering::Relaxed),
            volumes,
            secrets,
            unreadable_files: snapshot.unreadable_files(),
        }
    }

    /// Adds a Secret durably, or says why not. Never changes an existing one.
    pub(crate) fn create(&self, secret: &Secret) -> Result<(), CreateError> {
        let (namespace, name) = (secret.metadata.namespace(), secret.metadata.name.as_str());
        if !is_object_name(name, MAX_NAME)
            || !is_object_name(namespace, 63)
            || namespace.contains('.')
        {
            return Err(CreateError::Name(name.to_owned()));
        }
        let mut files = self.lock();
        if self.refresh(&mut files, Take::All) {
            self.publish(&mut files);
        }
        match self.snapshot().secret(namespace, name) {
            ReadSecret::Found(_) => return Err(CreateError::Exists),
            ReadSecret::Untold(_) => return Err(CreateError::Unknown),
            ReadSecret::Absent => {}
        }
        let path = self.directory.join(format!("{namespace}.{name}.secret.yaml"));
        write_new(&self.directory, &path, secret.to_yaml().as_bytes())
            .map_err(|source| CreateError::Io { path: path.clone(), source })?;
        files.take(&path);
        self.publish(&mut files);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Files> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads what has changed; whether anything has.
    fn refresh(&self, files: &mut Files, take: Take) -> bool {
        let paths = match manifest_paths(&self.directory) {
            Ok(paths) => paths,
            Err(error) => {
                self.readable.store(false, Ordering::Relaxed);
                if !std::mem::replace(&mut files.lost, true) {
                    log::error!(
                        "store {}: cannot be read: {error}; everything known from it stays valid",
                        self.directory.display()
                    );
                }
                return false;
            }
        };
        self.readable.store(true, Ordering::Relaxed);
        if std::mem::take(&mut files.lost) {
            log::info!("store {}: can be read again", self.directory.display());
        }
        let mut changed = false;
        let gone: Vec<PathBuf> =
            files.known.keys().filter(|path| !paths.contains(path)).cloned().collect();
        for path in gone {
            log::info!("store: {}: is gone, and what it held with it", path.display());
            files.known.remove(&path);
            changed = true;
        }
        for path in paths {
            changed |= files.look(&path, take);
        }
        changed
    }

    fn publish(&self, files: &mut Files) {
        let sources: Vec<Source> = files
            .known
            .iter()
            .map(|(path, known)| Source {
                path: path.clone(),
                manifests: known.good.clone(),
                unreadable: known.unreadable.clone(),
            })
            .collect();
        let (snapshot, complaints) = Snapshot::build(&sources);
        for complaint in complaints.iter().filter(|complaint| !files.complaints.contains(complaint))
        {
            log::error!("store: {complaint}");
        }
        files.complaints = complaints;
        let (volumes, secrets) = snapshot.counts();
        log::info!(
            "store {}: {volumes} volumes, {secrets} secrets in {} files",
            self.directory.display(),
            sources.len()
        );
        self.generation.fetch_add(1, Ordering::Relaxed);
        *self.snapshot.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(snapshot);
    }
}

impl Files {
    /// Reads a file if it has changed; whether it was read.
    fn look(&mut self, path: &Path, take: Take) -> bool {
        let stamp = fs::metadata(path).ok().map(|metadata| Stamp::of(&metadata));
        if let Some(known) = self.known.get_mut(path) {
            if stamp.is_some() && known.read == stamp {
                return false;
            }
            let settled = known.seen == stamp;
            known.seen = stamp;
            if take == Take::Settled && !settled {
                return false;
            }
        } else if take == Take::Settled {
            // New: remember how it looks, take it at the next poll if it still looks so.
            self.known.insert(path.to_owned(), Known { seen: stamp, ..Known::default() });
            return false;
        }
        self.take(path)
    }

    /// Reads a file as it is now; whether what is known about it has changed.
    fn take(&mut self, path: &Path) -> bool {
        let known = self.known.entry(path.to_owned()).or_default();
        match read_file(path) {
            Ok(read) => {
                known.seen = Some(read.stamp);
                known.read = (!read.stamp.is_young()).then_some(read.stamp);
                known.accept(path, read)
            }
            Err(error) => {
                let news = !matches!(known.unreadable, Some(None));
                if news {
                    log::error!(
                        "store: {}: cannot be read: {error}; {}",
                        path.display(),
                        known.consequence()
                    );
                }
                known.unreadable = Some(None);
                known.read = None;
                known.content = None;
                news
            }
        }
    }
}

impl Known {
    /// What it means that the file cannot be read, in words.
    fn consequence(&self) -> &'static str {
        if self.good.volumes.is_empty() && self.good.secrets.is_empty() {
            "nothing of it is used"
        } else {
            "what it held before stays valid"
        }
    }

    /// Takes the content of the file; whether it is another than before.
    fn accept(&mut self, path: &Path, read: Read) -> bool {
        let content = fingerprint(&read.text);
        if self.content.replace(content) == Some(content) {
            return false;
        }
        match manifest::parse(&read.text) {
            Ok(manifests) => {
                for warning in &manifests.warnings {
                    log::warn!("store: {}: {warning}", path.display());
                }
                if !manifests.secrets.is_empty() && read.mode & 0o007 != 0 {
                    log::warn!(
                        "store: {}: holds Secrets and is open to every user; chmod 0600 it",
                        path.display()
                    );
                }
                if self.unreadable.take().is_some() {
                    log::info!("store: {}: is valid again", path.display());
                }
                self.good = Arc::new(manifests);
            }
            Err(error) => {
                log::error!("store: {}: {error}; {}", path.display(), self.consequence());
                self.unreadable = Some(Some(Arc::new(read.text)));
            }
        }
        true
    }
}

fn fingerprint(text: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    hasher.finish()
}

/// The manifests' paths, in order.
fn manifest_paths(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let hidden = path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
        let yaml =
            path.extension().is_some_and(|extension| extension == "yaml" || extension == "yml");
        if yaml && !hidden && !path.is_dir() {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

/// A file as it was when it was read.
struct Read {
    stamp: Stamp,
    mode: u32,
    text: Zeroizing<String>,
}

/// Reads a file of bounded size.
fn read_file(path: &Path) -> io::Result<Read> {
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
    Ok(Read { stamp: Stamp::of(&metadata), mode: metadata.mode(), text: Zeroizing::new(text) })
}

/// Writes a new file that is complete and durable when it appears, or fails if the name is taken.
fn write_new(directory: &Path, path: &Path, content: &[u8]) -> io::Result<()> {
    let mut random = [0; 8];
    getrandom::fill(&mut random).map_err(io::Error::other)?;
    let temporary = directory.join(format!("{TEMPORARY}{:016x}", u64::from_ne_bytes(random)));
    let written = write_and_link(&temporary, path, content);
    let removed = fs::remove_file(&temporary);
    written?;
    if let Err(error) = removed {
        log::warn!("store: {}: cannot be removed: {error}", temporary.display());
    }
    File::open(directory)?.sync_all()
}

fn write_and_link(temporary: &Path, path: &Path, content: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(temporary)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::hard_link(temporary, path)
}

/// Files that a crash left half-written. They never counted: nothing was promised about them.
fn remove_leftovers(directory: &Path) {
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

/// The rule for names of Kubernetes objects (RFC 1123 subdomain), which also makes them harmless as file names.
fn is_object_name(name: &str, longest: usize) -> bool {
    let alphanumeric = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    name.len() <= longest
        && name.as_bytes().first().is_some_and(alphanumeric)
        && name.as_bytes().last().is_some_and(alphanumeric)
        && name.bytes().all(|byte| alphanumeric(&byte) || byte == b'-' || byte == b'.')
}
