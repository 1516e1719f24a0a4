//! What the store holds at one moment: volumes by TPM hash and Secrets by name, immutable and shared.

use std::{
    collections::{BTreeSet, HashMap},
    path::PathBuf,
    sync::Arc,
};

use latchkey_wire::{
    manifest::{Manifests, SealedVolume, Secret},
    pubhash::Pubhash,
};

/// Namespace and name.
type Name = (String, String);

/// All objects of all files.
#[derive(Debug, Default)]
pub(crate) struct Snapshot {
    files: Vec<Arc<Manifests>>,
    /// Every place a volume of this hash is at.
    volumes: HashMap<Pubhash, Vec<Place>>,
    /// Volumes that are defined twice and differently.
    conflicting_volumes: BTreeSet<Name>,
    secrets: HashMap<Name, Option<Place>>,
    /// Which volumes and labels come to a Secret by the default name.
    default_users: HashMap<Name, BTreeSet<(String, String)>>,
    /// Text of the files that cannot be read now; `None` if not even that is known.
    unreadable: Vec<Option<Arc<zeroize::Zeroizing<String>>>>,
}

/// File and position in it.
#[derive(Debug, Clone, Copy)]
struct Place {
    file: usize,
    at: usize,
}

/// What is known about a Secret.
#[derive(Debug)]
pub(crate) enum ReadSecret<'a> {
    /// It is there.
    Found(&'a Secret),
    /// It is not there.
    Absent,
    /// It is defined twice and differently, or a file that cannot be read mentions it.
    Untold(&'static str),
}

/// A file that was read, in order of its name.
pub(crate) struct Source {
    pub(crate) path: PathBuf,
    pub(crate) manifests: Arc<Manifests>,
    /// Set while the file's present content cannot be read; the text if it is text.
    pub(crate) unreadable: Option<Option<Arc<zeroize::Zeroizing<String>>>>,
}

impl Snapshot {
    /// Merges the files. Gives back what an operator must hear about.
    pub(crate) fn build(sources: &[Source]) -> (Self, Vec<String>) {
        let mut snapshot = Self {
            files: sources.iter().map(|source| source.manifests.clone()).collect(),
            ..Self::default()
        };
        snapshot.unreadable =
            sources.iter().filter_map(|source| source.unreadable.clone()).collect();
        let mut complaints = Vec::new();
        let mut named: HashMap<Name, Place> = HashMap::new();
        for (file, source) in sources.iter().enumerate() {
            for (at, volume) in source.manifests.volumes.iter().enumerate() {
                snapshot.add_volume(
                    volume,
                    Place { file, at },
                    &mut named,
                    sources,
                    &mut complaints,
                );
            }
            for (at, secret) in source.manifests.secrets.iter().enumerate() {
                snapshot.add_secret(secret, Place { file, at }, sources, &mut complaints);
            }
        }
        (snapshot, complaints)
    }

    fn add_volume(
        &mut self,
        volume: &SealedVolume,
        place: Place,
        named: &mut HashMap<Name, Place>,
        sources: &[Source],
        complaints: &mut Vec<String>,
    ) {
        let name = (volume.metadata.namespace().to_owned(), volume.metadata.name.clone());
        if let Some(first) = named.get(&name) {
            if self.volume(*first) == Some(volume) {
                return;
            }
            complaints.push(format!(
                "SealedVolume {}/{} is in {} and, differently, in {}: neither is used",
                name.0,
                name.1,
                shown(sources, first.file),
                shown(sources, place.file)
            ));
            self.conflicting_volumes.insert(name);
        } else {
            for partition in &volume.spec.partitions {
                if partition.secret.as_ref().is_none_or(|secret| secret.name.is_empty()) {
                    let secret = (name.0.clone(), volume.secret_name(partition));
                    self.default_users
                        .entry(secret)
                        .or_default()
                        .insert((name.1.clone(), partition.label.clone()));
                }
            }
            named.insert(name, place);
        }
        if let Ok(pubhash) = volume.pubhash() {
            self.volumes.entry(pubhash).or_default().push(place);
        }
    }

    fn add_secret(
        &mut self,
        secret: &Secret,
        place: Place,
        sources: &[Source],
        complaints: &mut Vec<String>,
    ) {
        let name = (secret.metadata.namespace().to_owned(), secret.metadata.name.clone());
        match self.secrets.get(&name) {
            None => {
                self.secrets.insert(name, Some(place));
            }
            Some(Some(first))
                if self.secret_at(*first).is_some_and(|first| first.data == secret.data) => {}
            Some(first) => {
                let first = first.map_or_else(
                    || "two other files".to_owned(),
                    |first| shown(sources, first.file),
                );
                complaints.push(format!(
                    "Secret {}/{} is in {first} and, differently, in {}: neither is used",
                    name.0,
                    name.1,
                    shown(sources, place.file)
                ));
                self.secrets.insert(name, None);
            }
        }
    }

    fn volume(&self, place: Place) -> Option<&SealedVolume> {
        self.files.get(place.file)?.volumes.get(place.at)
    }

    fn secret_at(&self, place: Place) -> Option<&Secret> {
        self.files.get(place.file)?.secrets.get(place.at)
    }

    /// All volumes of a machine, in the order of the files.
    pub(crate) fn volumes(&self, pubhash: &Pubhash) -> Vec<&SealedVolume> {
        self.volumes
            .get(pubhash)
            .into_iter()
            .flatten()
            .filter_map(|place| self.volume(*place))
            .collect()
    }

    /// Whether a volume is defined twice and differently.
    pub(crate) fn is_conflicting(&self, volume: &SealedVolume) -> bool {
        !self.conflicting_volumes.is_empty()
            && self
                .conflicting_volumes
                .contains(&(volume.metadata.namespace().to_owned(), volume.metadata.name.clone()))
    }

    /// Whether two partitions come to the same Secret by the default name `<volume>-<label>`, which is ambiguous:
    /// volume `a-b` with label `c` and volume `a` with label `b-c`.
    pub(crate) fn is_shared_by_default(&self, namespace: &str, name: &str) -> bool {
        self.default_users
            .get(&(namespace.to_owned(), name.to_owned()))
            .is_some_and(|users| users.len() > 1)
    }

    /// The Secret of this name.
    pub(crate) fn secret(&self, namespace: &str, name: &str) -> ReadSecret<'_> {
        match self.secrets.get(&(namespace.to_owned(), name.to_owned())) {
            Some(Some(place)) => {
                self.secret_at(*place).map_or(ReadSecret::Absent, ReadSecret::Found)
            }
            Some(None) => ReadSecret::Untold("it is defined twice and differently"),
            None if self.may_hold(name) => {
                ReadSecret::Untold("a file that cannot be read mentions it")
            }
            None => ReadSecret::Absent,
        }
    }

    fn may_hold(&self, name: &str) -> bool {
        self.unreadable.iter().any(|text| text.as_ref().is_none_or(|text| text.contains(name)))
    }

    pub(crate) fn unreadable_files(&self) -> usize {
        self.unreadable.len()
    }

    /// Volumes and Secrets, for the log.
    pub(crate) fn counts(&self) -> (usize, usize) {
        (self.volumes.values().map(Vec::len).sum(), self.secrets.len())
    }
}

fn shown(sources: &[Source], file: usize) -> String {
    sources.get(file).map(|source| source.path.display().to_string()).unwrap_or_default()
}
