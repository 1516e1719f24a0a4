//! Reading the directory, noticing changes, and changing it (see the layout in the parent module).

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs::{self, File, TryLockError},
    hash::{DefaultHasher, Hash, Hasher},
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
    manifest::{self, Manifests, ObjectName, SEALED_VOLUME, SECRET, SealedVolume, Secret},
    pubhash::Pubhash,
};

use tokio::sync::{Semaphore, SemaphorePermit};
use zeroize::Zeroizing;

use super::{
    CreateError, EditError, Status,
    file::{self, NewFile, Read, Stamp},
    snapshot::{ObjectKey, ReadSecret, Snapshot, Unreadable},
    watch::{Changed, Watch},
};

/// Longest name of an object. With a namespace (63), the suffix and two dots it stays below the 255 bytes of a file name.
const MAX_NAME: usize = 180;

/// How long a change waits for another program's change of the same store.
const LOCK_PATIENCE: Duration = Duration::from_secs(10);
const LOCK_PAUSE: Duration = Duration::from_millis(5);

/// How long a file must stay the same before a change of it is made from what it says now.
const SETTLED: Duration = Duration::from_millis(100);

/// How many requests write at once: enough to keep a disk busy, which makes many small writes durable in one go.
const WRITERS: usize = 32;

/// Turns that machines have, by the first two digits of their hash.
const MACHINE_TURNS: usize = 256;

/// A directory of manifests.
pub(crate) struct Store {
    directory: PathBuf,
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

/// What is known about each file, by path.
#[derive(Default)]
struct Files {
    known: HashMap<Arc<Path>, Known>,
    /// What the snapshot holds of the files that have changed since it was made.
    stale: BTreeMap<Arc<Path>, Option<Arc<Manifests>>>,
    /// Files that have just been changed, and perhaps not to the end.
    marked: BTreeSet<Arc<Path>>,
    /// Marked files whose content is the one in use again.
    settled: Vec<Arc<Path>>,
    /// Files that this program is writing.
    own: BTreeSet<PathBuf>,
    watch: Option<Watch>,
    /// The directory itself could not be read at the last poll.
    lost: bool,
    /// Contradictions between files that the log has already.
    complaints: BTreeMap<ObjectKey, String>,
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
    unreadable: Option<Unreadable>,
    /// Whether it has been read at all, and so is in the snapshot.
    taken: bool,
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
    fn publish(&self, files: &mut Files) {
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

/// A change of the store in progress: everybody else's waits until it is dropped.
pub(crate) struct Change<'a> {
    store: &'a Store,
    files: MutexGuard<'a, Files>,
    _alone: Option<File>,
}

impl std::fmt::Debug for Change<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Change of {:?}", self.store)
    }
}

/// Files that are to be written; no one else is held up by it.
pub(crate) struct Prepared {
    files: Vec<NewFile>,
}

impl std::fmt::Debug for Prepared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.files.iter().map(|file| &file.path)).finish()
    }
}

impl Change<'_> {
    /// Looks something up in the store as it is now.
    pub(crate) fn read<T>(&self, look_up: impl FnOnce(&Snapshot) -> T) -> T {
        self.store.read(look_up)
    }

    /// Adds a Secret durably, or says why not. Never changes an existing one.
    pub(crate) fn create_secret(&mut self, secret: &Secret) -> Result<(), CreateError> {
        let file = self.new_secret(secret)?;
        let path = file.path.clone();
        file::write_new(&self.store.directory, &[file])
            .map_err(|source| EditError::Io { path: path.clone(), source })?;
        self.files.take_own(&path);
        self.store.publish(&mut self.files);
        Ok(())
    }

    /// Prepares to add a Secret, and a volume after it, once this change is over: see [`Store::write`].
    pub(crate) fn prepare(
        &mut self,
        secret: &Secret,
        volume: &SealedVolume,
    ) -> Result<Prepared, CreateError> {
        let files = vec![self.new_secret(secret)?, self.new_volume(volume)?];
        self.files.own.extend(files.iter().map(|file| file.path.clone()));
        Ok(Prepared { files })
    }

    /// Adds a volume durably, or says why not. Never changes an existing one.
    pub(crate) fn create_volume(&mut self, volume: &SealedVolume) -> Result<(), CreateError> {
        let file = self.new_volume(volume)?;
        let path = file.path.clone();
        file::write_new(&self.store.directory, &[file])
            .map_err(|source| EditError::Io { path: path.clone(), source })?;
        self.files.take_own(&path);
        self.store.publish(&mut self.files);
        Ok(())
    }

    fn new_secret(&self, secret: &Secret) -> Result<NewFile, CreateError> {
        let (namespace, name) = (secret.metadata.namespace(), secret.metadata.name.as_str());
        match self.read(|snapshot| match snapshot.secret(namespace, name) {
            ReadSecret::Found(_) => Some(CreateError::Exists(SECRET)),
            ReadSecret::Untold(_) if snapshot.is_unsettled(name) => Some(CreateError::Unsettled),
            ReadSecret::Untold(_) => Some(CreateError::Unknown),
            ReadSecret::Absent => None,
        }) {
            Some(error) => Err(error),
            None => self.new_file((namespace, name), "secret", &secret.to_yaml()),
        }
    }

    fn new_volume(&self, volume: &SealedVolume) -> Result<NewFile, CreateError> {
        let (namespace, name) = (volume.metadata.namespace(), volume.metadata.name.as_str());
        if self.read(|snapshot| snapshot.is_volume_name_taken(namespace, name)) {
            return Err(CreateError::Exists(SEALED_VOLUME));
        }
        let text = volume.to_yaml().map_err(EditError::Text)?;
        if !manifest::parse(&text).is_ok_and(|read| read.volumes == [volume.clone()]) {
            return Err(EditError::Unwritable(name.to_owned()).into());
        }
        self.new_file((namespace, name), "volume", &text)
    }

    fn new_file(
        &self,
        (namespace, name): (&str, &str),
        kind: &str,
        text: &str,
    ) -> Result<NewFile, CreateError> {
        if !is_object_name(name, MAX_NAME)
            || !is_object_name(namespace, 63)
            || namespace.contains('.')
        {
            return Err(CreateError::Name(name.to_owned()));
        }
        Ok(NewFile {
            path: self.store.directory.join(format!("{namespace}.{name}.{kind}.yaml")),
            content: Zeroizing::new(text.as_bytes().to_vec()),
        })
    }

    /// Changes the `spec` of one volume in the file it is in; whether there was anything to change. What else is in the file
    /// stays byte for byte. `edit` gets the volume as it is in the file now.
    pub(crate) fn edit_volume(
        &mut self,
        namespace: &str,
        name: &str,
        edit: impl FnOnce(&mut SealedVolume),
    ) -> Result<bool, EditError> {
        let object = ObjectName { kind: SEALED_VOLUME, namespace, name };
        let (path, read) = self.only_file(&object)?;
        let mut volume = self
            .read(|snapshot| snapshot.volume(namespace, name).cloned())
            .ok_or_else(|| EditError::Absent(object.to_string()))?;
        let before = volume.clone();
        edit(&mut volume);
        if volume == before {
            return Ok(false);
        }
        let text = manifest::replace_volume(&read.text, &volume)
            .map_err(|source| EditError::File { path: path.clone(), source })?;
        file::exchange(&path, &read, text.as_bytes())
            .map_err(|source| EditError::Io { path: path.clone(), source })?;
        self.changed(&object);
        Ok(true)
    }

    /// Changes one volume from what it was when that was decided.
    pub(crate) fn replace_volume(
        &mut self,
        from: &SealedVolume,
        to: SealedVolume,
    ) -> Result<(), EditError> {
        let mut is_same = false;
        let (namespace, name) = (from.metadata.namespace(), &from.metadata.name);
        self.edit_volume(namespace, name, |volume| {
            is_same = volume == from;
            if is_same {
                *volume = to;
            }
        })?;
        if is_same {
            Ok(())
        } else {
            Err(EditError::Moved(format!("SealedVolume {namespace}/{name}")))
        }
    }

    /// Takes one object out of the file it is in, and removes the file if it was the last.
    pub(crate) fn remove(&mut self, object: &ObjectName<'_>) -> Result<(), EditError> {
        let (path, read) = self.only_file(object)?;
        let left = manifest::remove(&read.text, object)
            .map_err(|source| EditError::File { path: path.clone(), source })?;
        match left {
            Some(left) => file::exchange(&path, &read, left.as_bytes()),
            None => file::remove(&path, &read),
        }
        .map_err(|source| EditError::Io { path: path.clone(), source })?;
        self.changed(object);
        Ok(())
    }

    /// The one file, behind symbolic links, that an object is in, as it is now.
    fn only_file(&mut self, object: &ObjectName<'_>) -> Result<(PathBuf, Read), EditError> {
        let paths = self.read(|snapshot| snapshot.paths(object));
        let mut real: Vec<PathBuf> = Vec::new();
        for path in &paths {
            let target = path
                .canonicalize()
                .map_err(|source| EditError::Io { path: path.to_path_buf(), source })?;
            if !real.contains(&target) {
                real.push(target);
            }
        }
        let path = match real.as_slice() {
            [] => return Err(EditError::Absent(object.to_string())),
            [only] => only.clone(),
            [first, second, ..] => {
                return Err(EditError::Twice {
                    object: object.to_string(),
                    first: first.clone(),
                    second: second.clone(),
                });
            }
        };
        let read =
            file::read(&path).map_err(|source| EditError::Io { path: path.clone(), source })?;
        let is_in_use = |path: &Arc<Path>| {
            self.files.known.get(path).is_some_and(|known| known.holds(&read.text))
        };
        if !paths.iter().all(is_in_use) {
            // Somebody has changed it since the last poll. It counts if it is not being written still.
            thread::sleep(SETTLED);
            let again =
                file::read(&path).map_err(|source| EditError::Io { path: path.clone(), source })?;
            if again.stamp != read.stamp || again.text != read.text {
                return Err(EditError::Busy(path));
            }
            paths.iter().for_each(|path| self.files.take(path));
            self.store.publish(&mut self.files);
        }
        Ok((path, read))
    }

    /// Takes the files an object was in as they are now.
    fn changed(&mut self, object: &ObjectName<'_>) {
        for path in self.read(|snapshot| snapshot.paths(object)) {
            if path.exists() {
                self.files.take_own(&path);
            } else {
                self.files.forget(&path);
            }
        }
        self.store.publish(&mut self.files);
    }
}

impl Files {
    /// Reads a file if it has changed.
    fn look(&mut self, path: &Path, take: Take) {
        let stamp = Stamp::at(path);
        if let Some(known) = self.known.get_mut(path) {
            if stamp.is_some() && known.read == stamp {
                return;
            }
            let settled = known.seen == stamp;
            known.seen = stamp;
            if take == Take::Settled && !settled {
                return;
            }
        } else if take == Take::Settled {
            // New: remember how it looks, take it at the next poll if it still looks so.
            self.known.insert(path.into(), Known { seen: stamp, ..Known::default() });
            return;
        }
        self.take(path);
    }

    /// Marks a file whose content is not the one in use, with that content.
    fn mark(&mut self, path: &Path) -> Option<(Arc<Path>, Unreadable)> {
        let known = self.known.get(path);
        let in_use =
            known.is_some_and(|known| known.read.is_some() && known.read == Stamp::at(path));
        if in_use || self.own.contains(path) {
            return None;
        }
        let text = match file::read(path) {
            Ok(read) if known.is_some_and(|known| known.holds(&read.text)) => return None,
            Ok(read) => Some(Arc::new(read.text)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return None, // the poll tells when it is gone
            Err(_) => None,
        };
        let path: Arc<Path> = path.into();
        self.marked.insert(path.clone());
        Some((path, text))
    }

    /// Drops a file that is gone.
    fn forget(&mut self, path: &Path) {
        let Some((path, known)) = self.known.remove_entry(path) else { return };
        if self.marked.contains(&path) {
            self.settled.push(path.clone());
        }
        if known.taken {
            log::info!("store: {}: is gone, and what it held with it", path.display());
            self.stale.entry(path).or_insert(Some(known.good));
        }
    }

    /// Reads a file as it is now.
    fn take(&mut self, path: &Path) {
        let path: Arc<Path> = path.into();
        let known = self.known.entry(path.clone()).or_default();
        let old = known.taken.then(|| known.good.clone());
        let news = match file::read(&path) {
            Ok(read) => {
                known.seen = Some(read.stamp);
                known.read = (!read.stamp.is_young()).then_some(read.stamp);
                known.accept(&path, read)
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
        };
        known.taken = true;
        if self.marked.contains(&path) {
            self.settled.push(path.clone());
        }
        if news {
            self.stale.entry(path).or_insert(old);
        }
    }

    /// Takes a file as this program has just written it.
    fn take_own(&mut self, path: &Path) {
        self.take(path);
        if let Some(known) = self.known.get_mut(path) {
            known.read = known.seen; // nobody else writes it in the same instant
        }
    }

    /// Logs contradictions that are new.
    fn complain(&mut self, complaints: BTreeMap<ObjectKey, Option<String>>) {
        for (object, complaint) in complaints {
            match complaint {
                None => drop(self.complaints.remove(&object)),
                Some(text) if self.complaints.get(&object) == Some(&text) => {}
                Some(text) => {
                    log::error!("store: {text}");
                    self.complaints.insert(object, text);
                }
            }
        }
    }
}

impl Known {
    /// Whether this is the content that was read last.
    fn holds(&self, text: &str) -> bool {
        self.content == Some(fingerprint(text))
    }

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

/// The rule for names of Kubernetes objects (RFC 1123 subdomain), which also makes them harmless as file names.
fn is_object_name(name: &str, longest: usize) -> bool {
    let alphanumeric = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    name.len() <= longest
        && name.as_bytes().first().is_some_and(alphanumeric)
        && name.as_bytes().last().is_some_and(alphanumeric)
        && name.bytes().all(|byte| alphanumeric(&byte) || byte == b'-' || byte == b'.')
}
