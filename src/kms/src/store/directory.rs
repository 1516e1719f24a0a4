//! The directory: reading it, noticing what changes, and letting one change at a time be made (see the layout in the parent
//! module).

use std::{
    collections::BTreeMap,
    fs::{self, File, TryLockError},
    io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use latchkey_wire::{
    manifest::{Manifests, SealedVolume, Secret},
    pubhash::Pubhash,
};

use tokio::sync::{Semaphore, SemaphorePermit};

use super::{
    Change, CreateError, EditError, Prepared, Status, file,
    files::{Files, Take},
    snapshot::{ObjectKey, Snapshot},
    watch::{Changed, Watch},
};

/// How long a change waits for another program's change of the same store.
const LOCK_PATIENCE: Duration = Duration::from_secs(10);
const LOCK_PAUSE: Duration = Duration::from_millis(5);

/// How many requests write at once: enough to keep a disk busy, which makes many small writes durable in one go.
const WRITERS: usize = 32;

/// Turns that machines have, by the first two digits of their hash.
const MACHINE_TURNS: usize = 256;

/// A directory of manifests.
pub(crate) struct Store {
    pub(super) directory: PathBuf,
    files: Mutex<Files>,
    snapshot: RwLock<Snapshot>,
    /// How often the snapshot was changed, and whether the directory could be read at the last look.
    generation: AtomicU64,
    readable: AtomicBool,
    turns: Semaphore,
    machine_turns: [tokio::sync::Mutex<()>; MACHINE_TURNS],
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Store({})", self.directory.display())
    }
}

impl Store {
    /// Opens a directory and reads it. Mistakes in files are logged; that the directory cannot be read is an error.
    pub(crate) fn open(directory: &Path) -> io::Result<Self> {
        let directory = directory.canonicalize()?;
        fs::read_dir(&directory)?;
        let store = Self {
            directory,
            files: Mutex::default(),
            snapshot: RwLock::default(),
            generation: AtomicU64::new(0),
            readable: AtomicBool::new(true),
            turns: Semaphore::new(WRITERS),
            machine_turns: [const { tokio::sync::Mutex::const_new(()) }; MACHINE_TURNS],
        };
        let mut files = store.lock();
        files.watch = Watch::start(&store.directory);
        store.refresh(&mut files, Take::All);
        store.publish(&mut files);
        if files.known.is_empty() {
            store.log_counts();
        }
        drop(files);
        Ok(store)
    }

    /// Removes what a crash left half-written. For the server alone: it would take what it is writing from under it.
    pub(crate) fn remove_leftovers(&self) {
        file::remove_leftovers(&self.directory);
    }

    /// Looks for changes and takes those that have settled.
    pub(crate) fn poll(&self) {
        let mut files = self.lock();
        self.refresh(&mut files, Take::Settled);
        self.publish(&mut files);
    }

    /// Looks something up in what the store holds now. Changes wait meanwhile, so this must be short.
    pub(crate) fn read<T>(&self, look_up: impl FnOnce(&Snapshot) -> T) -> T {
        look_up(&self.snapshot.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// How it is. Never waits for the file system.
    pub(crate) fn status(&self) -> Status {
        let ((volumes, secrets, _), unreadable_files) =
            self.read(|snapshot| (snapshot.counts(), snapshot.unreadable_files()));
        Status {
            generation: self.generation.load(Ordering::Relaxed),
            readable: self.readable.load(Ordering::Relaxed),
            volumes,
            secrets,
            unreadable_files,
        }
    }

    /// Begins to change the store. There is one at a time, in this program and among all that use this store.
    ///
    /// What others have written since the last poll may be half of what they mean, so it is not used yet; but nothing is
    /// made that it mentions.
    pub(crate) fn change(&self) -> Result<Change<'_>, EditError> {
        let mut files = self.lock();
        let alone = lock_directory(&self.directory)
            .map_err(|source| EditError::Io { path: self.directory.clone(), source })?;
        self.mark_changed(&mut files);
        Ok(Change { store: self, files, _alone: alone })
    }

    /// Waits until the store can be changed without many threads waiting for each other.
    pub(crate) async fn turn(&self) -> Option<SemaphorePermit<'_>> {
        self.turns.acquire().await.ok() // it is never closed
    }

    /// Waits until no other request of the same machine is served: what one of them has written counts for the next when it
    /// is durable, not before. (Some machines share a turn.)
    pub(crate) async fn turn_of(
        &self,
        machine: &Pubhash,
    ) -> Option<tokio::sync::MutexGuard<'_, ()>> {
        let digits =
            machine.as_str().get(..2).and_then(|digits| usize::from_str_radix(digits, 16).ok());
        match self.machine_turns.get(digits.unwrap_or_default()) {
            Some(turn) => Some(turn.lock().await),
            None => None,
        }
    }

    /// Writes what [`Change::prepare`] has prepared, beside whatever else is being written. If a name was taken meanwhile, by
    /// another program or a machine whose hash begins alike, it fails, and the next request finds that.
    pub(crate) fn write(&self, prepared: &Prepared) -> Result<(), EditError> {
        let written = file::write_new(&self.directory, &prepared.files);
        let mut files = self.lock();
        for file in &prepared.files {
            files.own.remove(&file.path);
            if written.is_ok() {
                files.take_own(&file.path);
            }
        }
        self.publish(&mut files);
        written.map_err(|source| EditError::Io {
            path: prepared.files.first().map(|file| file.path.clone()).unwrap_or_default(),
            source,
        })
    }

    /// Adds a Secret durably, or says why not. Never changes an existing one.
    pub(crate) fn create(&self, secret: &Secret) -> Result<(), CreateError> {
        self.change()?.create_secret(secret)
    }

    /// Changes one volume in the file it is in; whether there was anything to change. See [`Change::edit_volume`].
    pub(crate) fn edit_volume(
        &self,
        namespace: &str,
        name: &str,
        edit: impl FnOnce(&mut SealedVolume),
    ) -> Result<bool, EditError> {
        self.change()?.edit_volume(namespace, name, edit)
    }

    fn lock(&self) -> MutexGuard<'_, Files> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Marks all that has changed, as far as the system has told of it.
    fn mark_changed(&self, files: &mut Files) {
        let paths: Vec<PathBuf> =
            match files.watch.as_ref().map_or(Changed::Anything, Watch::changed) {
                Changed::Names(names) => names
                    .iter()
                    .filter(|name| file::is_manifest(name))
                    .map(|name| self.directory.join(name))
                    .collect(),
                Changed::Anything => {
                    files.watch = Watch::start(&self.directory);
                    file::manifest_paths(&self.directory).unwrap_or_default() // the poll tells of that
                }
            };
        let marks: Vec<_> = paths.iter().filter_map(|path| files.mark(path)).collect();
        if marks.is_empty() {
            return;
        }
        let mut snapshot = self.snapshot.write().unwrap_or_else(PoisonError::into_inner);
        for (path, text) in marks {
            snapshot.mark(&path, Some(text));
        }
    }

    /// Reads what has changed in the whole directory.
    fn refresh(&self, files: &mut Files, take: Take) {
        let paths = match file::manifest_paths(&self.directory) {
            Ok(paths) => paths,
            Err(error) => {
                self.readable.store(false, Ordering::Relaxed);
                if !std::mem::replace(&mut files.lost, true) {
                    log::error!(
                        "store {}: cannot be read: {error}; everything known from it stays valid",
                        self.directory.display()
                    );
                }
                return;
            }
        };
        self.readable.store(true, Ordering::Relaxed);
        if std::mem::take(&mut files.lost) {
            log::info!("store {}: can be read again", self.directory.display());
            files.watch = Watch::start(&self.directory);
        }
        let gone: Vec<Arc<Path>> = files
            .known
            .keys()
            .filter(|path| paths.binary_search_by(|there| (**there).cmp(path)).is_err())
            .cloned()
            .collect();
        for path in gone {
            // Some editors rename a file and then write it anew: it is gone when it is at two polls.
            match files.known.get_mut(&path) {
                Some(known) if known.seen.is_some() => known.seen = None,
                _ => files.forget(&path),
            }
        }
        let is_gone = |path: &&Arc<Path>| {
            !files.known.contains_key(*path)
                && paths.binary_search_by(|there| (**there).cmp(path)).is_err()
        };
        let gone: Vec<Arc<Path>> = files.marked.iter().filter(is_gone).cloned().collect();
        files.settled.extend(gone);
        for path in paths {
            files.look(&path, take);
        }
    }

    /// Brings the snapshot up to date and tells of it.
    pub(super) fn publish(&self, files: &mut Files) {
        let stale = std::mem::take(&mut files.stale);
        let settled = std::mem::take(&mut files.settled);
        if stale.is_empty() && settled.is_empty() {
            return;
        }
        let mut snapshot = self.snapshot.write().unwrap_or_else(PoisonError::into_inner);
        for path in settled {
            files.marked.remove(&path);
            snapshot.mark(&path, None);
        }
        if stale.is_empty() {
            return;
        }
        for (path, old) in &stale {
            if let Some(old) = old {
                snapshot.remove(path, old);
            }
        }
        let mut touched: Vec<&Manifests> = stale.values().flatten().map(AsRef::as_ref).collect();
        for known in stale.keys().filter_map(|path| Some((path, files.known.get(path)?))) {
            let (path, known) = known;
            snapshot.add(path, &known.good, known.unreadable.clone());
            touched.push(&known.good);
        }
        let complaints: BTreeMap<ObjectKey, Option<String>> =
            touched.into_iter().flat_map(|file| snapshot.complaints(file)).collect();
        drop(snapshot);
        files.complain(complaints);
        self.log_counts();
    }

    fn log_counts(&self) {
        self.generation.fetch_add(1, Ordering::Relaxed);
        let (volumes, secrets, files) = self.read(Snapshot::counts);
        log::info!(
            "store {}: {volumes} volumes, {secrets} secrets in {files} files",
            self.directory.display()
        );
    }
}

/// Locks the directory against other programs that change it (flock(2)); `None` where the file system has no locks.
fn lock_directory(directory: &Path) -> io::Result<Option<File>> {
    let file = File::open(directory)?;
    let end = Instant::now() + LOCK_PATIENCE;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(Some(file)),
            Err(TryLockError::WouldBlock) if Instant::now() < end => thread::sleep(LOCK_PAUSE),
            Err(TryLockError::WouldBlock) => {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    "another program has been changing it for 10 seconds",
                ));
            }
            Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Unsupported => {
                return Ok(None);
            }
            Err(TryLockError::Error(error)) => return Err(error),
        }
    }
}
