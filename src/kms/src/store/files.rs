//! What is known of each file of the store: how it looked, what it held, whether it is to be read again.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    hash::{DefaultHasher, Hash, Hasher},
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use latchkey_wire::manifest::{self, Manifests};

use super::{
    file::{self, Read, Stamp},
    snapshot::{ObjectKey, Unreadable},
    watch::Watch,
};

/// What is known about each file, by path.
#[derive(Default)]
pub(super) struct Files {
    pub(super) known: HashMap<Arc<Path>, Known>,
    /// What the snapshot holds of the files that have changed since it was made.
    pub(super) stale: BTreeMap<Arc<Path>, Option<Arc<Manifests>>>,
    /// Files that have just been changed, and perhaps not to the end.
    pub(super) marked: BTreeSet<Arc<Path>>,
    /// Marked files whose content is the one in use again.
    pub(super) settled: Vec<Arc<Path>>,
    /// Files that this program is writing.
    pub(super) own: BTreeSet<PathBuf>,
    pub(super) watch: Option<Watch>,
    /// The directory itself could not be read at the last poll.
    pub(super) lost: bool,
    /// Contradictions between files that the log has already.
    pub(super) complaints: BTreeMap<ObjectKey, String>,
}

#[derive(Default)]
pub(super) struct Known {
    /// How the file looked when it was read; `None` to read it again.
    pub(super) read: Option<Stamp>,
    /// How it looked at the last poll.
    pub(super) seen: Option<Stamp>,
    /// Fingerprint of the content that was read last, so that reading the same again is no news.
    pub(super) content: Option<u64>,
    /// What it held when it could last be read.
    pub(super) good: Arc<Manifests>,
    /// Set while it cannot be read.
    pub(super) unreadable: Option<Unreadable>,
    /// Whether it has been read at all, and so is in the snapshot.
    pub(super) taken: bool,
}

/// Which changes to take.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Take {
    /// What has stayed the same since the last poll.
    Settled,
    /// Everything, at once.
    All,
}

impl Files {
    /// Reads a file if it has changed.
    pub(super) fn look(&mut self, path: &Path, take: Take) {
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
    pub(super) fn mark(&mut self, path: &Path) -> Option<(Arc<Path>, Unreadable)> {
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
    pub(super) fn forget(&mut self, path: &Path) {
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
    pub(super) fn take(&mut self, path: &Path) {
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
    pub(super) fn take_own(&mut self, path: &Path) {
        self.take(path);
        if let Some(known) = self.known.get_mut(path) {
            known.read = known.seen; // nobody else writes it in the same instant
        }
    }

    /// Logs contradictions that are new.
    pub(super) fn complain(&mut self, complaints: BTreeMap<ObjectKey, Option<String>>) {
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
    pub(super) fn holds(&self, text: &str) -> bool {
        self.content == Some(fingerprint(text))
    }

    /// What it means that the file cannot be read, in words.
    pub(super) fn consequence(&self) -> &'static str {
        if self.good.volumes.is_empty() && self.good.secrets.is_empty() {
            "nothing of it is used"
        } else {
            "what it held before stays valid"
        }
    }

    /// Takes the content of the file; whether it is another than before.
    pub(super) fn accept(&mut self, path: &Path, read: Read) -> bool {
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
