//! What the store holds at one moment: volumes by TPM hash and by name, Secrets by name. Files come and go one by one, so
//! that a change costs what the changed file holds, however many others there are.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::Path,
    sync::Arc,
};

use latchkey_wire::{
    manifest::{self, Manifests, Partition, SEALED_VOLUME, SECRET, SealedVolume, Secret},
    pubhash::Pubhash,
};
use zeroize::Zeroizing;

/// Namespace and name.
pub(super) type Name = (String, String);

/// Kind and name of an object.
pub(super) type ObjectKey = (&'static str, Name);

/// What a file that cannot be read now says; `None` if not even that is known.
pub(super) type Unreadable = Option<Arc<Zeroizing<String>>>;

/// All objects of all files.
#[derive(Debug, Default)]
pub(crate) struct Snapshot {
    volumes: BTreeMap<Name, Vec<Place>>,
    /// Every place a volume of this hash is at.
    machines: HashMap<Pubhash, Vec<Place>>,
    secrets: HashMap<Name, Vec<Place>>,
    /// Which partitions come to a Secret, under any of the names it is looked up by.
    users: HashMap<Name, Vec<User>>,
    unreadable: BTreeMap<Arc<Path>, Unreadable>,
    /// What files say now that have just been changed, and perhaps not to the end: what they held before is in use still.
    unsettled: BTreeMap<Arc<Path>, Unreadable>,
    files: usize,
    volume_places: usize,
}

/// File and position in it.
#[derive(Debug, Clone)]
struct Place {
    path: Arc<Path>,
    file: Arc<Manifests>,
    at: usize,
}

impl Place {
    fn volume(&self) -> Option<&SealedVolume> {
        self.file.volumes.get(self.at)
    }

    fn secret(&self) -> Option<&Secret> {
        self.file.secrets.get(self.at)
    }
}

/// A partition that comes to a Secret.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct User {
    volume: String,
    /// Without `_LUKS`.
    label: String,
    /// By `<volume>-<label>`, which is ambiguous: volume `a-b` with label `c` and volume `a` with label `b-c`.
    by_default: bool,
    /// Whether generation 1 looks for it under this name.
    by_generation_1: bool,
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

impl Snapshot {
    /// Adds what a file holds.
    pub(super) fn add(
        &mut self,
        path: &Arc<Path>,
        file: &Arc<Manifests>,
        unreadable: Option<Unreadable>,
    ) {
        let place = |at| Place { path: path.clone(), file: file.clone(), at };
        for (at, volume) in file.volumes.iter().enumerate() {
            put(self.volumes.entry(name_of(&volume.metadata)).or_default(), place(at));
            if let Ok(pubhash) = volume.pubhash() {
                put(self.machines.entry(pubhash).or_default(), place(at));
                self.volume_places += 1;
            }
            for (secret, user) in users(volume) {
                self.users.entry(secret).or_default().push(user);
            }
        }
        for (at, secret) in file.secrets.iter().enumerate() {
            put(self.secrets.entry(name_of(&secret.metadata)).or_default(), place(at));
        }
        if let Some(unreadable) = unreadable {
            self.unreadable.insert(path.clone(), unreadable);
        }
        self.files += 1;
    }

    /// Notes that a file has just been changed, or, with `None`, that its content is the one in use.
    pub(super) fn mark(&mut self, path: &Arc<Path>, text: Option<Unreadable>) {
        match text {
            Some(text) => drop(self.unsettled.insert(path.clone(), text)),
            None => drop(self.unsettled.remove(path)),
        }
    }

    /// Takes out what a file held: the same as was added.
    pub(super) fn remove(&mut self, path: &Arc<Path>, file: &Manifests) {
        for volume in &file.volumes {
            let name = name_of(&volume.metadata);
            if let Some(places) = self.volumes.get_mut(&name) {
                places.retain(|place| place.path != *path);
                if places.is_empty() {
                    self.volumes.remove(&name);
                }
            }
            if let Ok(pubhash) = volume.pubhash() {
                self.volume_places -= 1;
                if let Some(places) = self.machines.get_mut(&pubhash) {
                    places.retain(|place| place.path != *path);
                    if places.is_empty() {
                        self.machines.remove(&pubhash);
                    }
                }
            }
            for (secret, user) in users(volume) {
                self.forget_user(secret, &user);
            }
        }
        for secret in &file.secrets {
            let name = name_of(&secret.metadata);
            if let Some(places) = self.secrets.get_mut(&name) {
                places.retain(|place| place.path != *path);
                if places.is_empty() {
                    self.secrets.remove(&name);
                }
            }
        }
        self.unreadable.remove(path);
        self.files -= 1;
    }

    fn forget_user(&mut self, secret: Name, user: &User) {
        let Some(users) = self.users.get_mut(&secret) else { return };
        if let Some(at) = users.iter().position(|other| other == user) {
            users.swap_remove(at);
        }
        if users.is_empty() {
            self.users.remove(&secret);
        }
    }

    /// What an operator must hear about each object of a file: that others of the same name differ.
    pub(super) fn complaints(&self, file: &Manifests) -> BTreeMap<ObjectKey, Option<String>> {
        let volumes = file.volumes.iter().map(|volume| {
            let name = name_of(&volume.metadata);
            let pair = self.volumes.get(&name).and_then(|places| differing(places, same_volume));
            ((SEALED_VOLUME, name.clone()), pair.map(|pair| twice(SEALED_VOLUME, &name, pair)))
        });
        let secrets = file.secrets.iter().map(|secret| {
            let name = name_of(&secret.metadata);
            let pair = self.secrets.get(&name).and_then(|places| differing(places, same_data));
            ((SECRET, name.clone()), pair.map(|pair| twice(SECRET, &name, pair)))
        });
        volumes.chain(secrets).collect()
    }

    /// All volumes of a machine, in the order of the files.
    pub(crate) fn volumes(&self, pubhash: &Pubhash) -> Vec<&SealedVolume> {
        let mut volumes: Vec<&SealedVolume> = Vec::new();
        for volume in self.machines.get(pubhash).into_iter().flatten().filter_map(Place::volume) {
            if !volumes.contains(&volume) {
                volumes.push(volume);
            }
        }
        volumes
    }

    /// Every volume with the file it is in, by namespace and name.
    pub(crate) fn all_volumes(&self) -> impl Iterator<Item = (&Path, &SealedVolume)> {
        self.volumes.values().flatten().filter_map(|place| Some((&*place.path, place.volume()?)))
    }

    /// The volume of this name, if there is one and it is not defined twice and differently.
    pub(crate) fn volume(&self, namespace: &str, name: &str) -> Option<&SealedVolume> {
        let places = self.volumes.get(&(namespace.to_owned(), name.to_owned()))?;
        if differing(places, same_volume).is_some() {
            return None;
        }
        places.first()?.volume()
    }

    /// Whether a volume is defined twice and differently.
    pub(crate) fn is_conflicting(&self, volume: &SealedVolume) -> bool {
        self.volumes
            .get(&name_of(&volume.metadata))
            .is_some_and(|places| differing(places, same_volume).is_some())
    }

    /// Whether a name is taken by a volume, or may be by one in a file that cannot be read.
    pub(crate) fn is_volume_name_taken(&self, namespace: &str, name: &str) -> bool {
        self.volumes.contains_key(&(namespace.to_owned(), name.to_owned()))
            || mentions(&self.unreadable, name)
            || self.is_unsettled(name)
    }

    /// Whether a file that cannot be read, or has just been changed, may be about this machine.
    pub(crate) fn may_know(&self, pubhash: &Pubhash) -> bool {
        self.unreadable.values().chain(self.unsettled.values()).any(|text| {
            text.as_ref().is_none_or(|text| {
                text.as_bytes()
                    .windows(pubhash.as_str().len())
                    .any(|window| window.eq_ignore_ascii_case(pubhash.as_str().as_bytes()))
            })
        })
    }

    /// The files an object is in.
    pub(super) fn paths(&self, object: &manifest::ObjectName<'_>) -> Vec<Arc<Path>> {
        let name = (object.namespace.to_owned(), object.name.to_owned());
        let places = match object.kind {
            SECRET => self.secrets.get(&name),
            _ => self.volumes.get(&name),
        };
        let mut paths: Vec<Arc<Path>> =
            places.into_iter().flatten().map(|place| place.path.clone()).collect();
        paths.dedup();
        paths
    }

    /// Whether two partitions come to the same Secret by the default name of generation 1.
    pub(crate) fn is_shared_by_default(&self, namespace: &str, name: &str) -> bool {
        let by_default = |user: &&User| user.by_default && user.by_generation_1;
        self.users_of(namespace, name).filter(by_default).collect::<BTreeSet<_>>().len() > 1
    }

    /// Whether another partition than this one comes to the Secret.
    pub(crate) fn has_other_user(
        &self,
        (namespace, secret): (&str, &str),
        volume: &str,
        label: &str,
    ) -> bool {
        let label = manifest::plain_label(label);
        self.users_of(namespace, secret).any(|user| user.volume != volume || user.label != label)
    }

    fn users_of(&self, namespace: &str, secret: &str) -> impl Iterator<Item = &User> {
        self.users.get(&(namespace.to_owned(), secret.to_owned())).into_iter().flatten()
    }

    /// The Secret of this name.
    pub(crate) fn secret(&self, namespace: &str, name: &str) -> ReadSecret<'_> {
        match self.secrets.get(&(namespace.to_owned(), name.to_owned())) {
            Some(places) if differing(places, same_data).is_some() => {
                ReadSecret::Untold("it is defined twice and differently")
            }
            Some(places) => {
                places.first().and_then(Place::secret).map_or(ReadSecret::Absent, ReadSecret::Found)
            }
            None if mentions(&self.unreadable, name) => {
                ReadSecret::Untold("a file that cannot be read mentions it")
            }
            None if self.is_unsettled(name) => {
                ReadSecret::Untold("a file that has just been changed mentions it")
            }
            None => ReadSecret::Absent,
        }
    }

    /// Whether a file that has just been changed mentions a name.
    pub(super) fn is_unsettled(&self, name: &str) -> bool {
        mentions(&self.unsettled, name)
    }

    pub(crate) fn unreadable_files(&self) -> usize {
        self.unreadable.len()
    }

    /// Volumes, Secrets and files, for the log.
    pub(crate) fn counts(&self) -> (usize, usize, usize) {
        (self.volume_places, self.secrets.len(), self.files)
    }
}

fn mentions(files: &BTreeMap<Arc<Path>, Unreadable>, name: &str) -> bool {
    files.values().any(|text| text.as_ref().is_none_or(|text| text.contains(name)))
}

fn name_of(metadata: &manifest::Metadata) -> Name {
    (metadata.namespace().to_owned(), metadata.name.clone())
}

/// In the order of the files, so that what counts first does not hang on the order in which they were read.
fn put(places: &mut Vec<Place>, place: Place) {
    let at = places.partition_point(|other| (&other.path, other.at) <= (&place.path, place.at));
    places.insert(at, place);
}

fn same_volume(a: &Place, b: &Place) -> bool {
    a.volume() == b.volume()
}

/// Secrets are the same if they hold the same for the same machine.
fn same_data(a: &Place, b: &Place) -> bool {
    a.secret().map(|secret| &secret.data) == b.secret().map(|secret| &secret.data)
}

fn differing(places: &[Place], same: impl Fn(&Place, &Place) -> bool) -> Option<(&Place, &Place)> {
    let (first, others) = places.split_first()?;
    others.iter().find(|other| !same(first, other)).map(|other| (first, other))
}

fn twice(kind: &str, (namespace, name): &Name, (first, other): (&Place, &Place)) -> String {
    format!(
        "{kind} {namespace}/{name} is in {} and, differently, in {}: neither is used",
        first.path.display(),
        other.path.display()
    )
}

/// The Secrets a volume's partitions come to.
fn users(volume: &SealedVolume) -> impl Iterator<Item = (Name, User)> {
    volume.spec.partitions.iter().flat_map(move |partition| {
        let first = volume.secret_name(partition);
        secret_names(volume, partition).into_iter().map(move |name| {
            let user = User {
                volume: volume.metadata.name.clone(),
                label: manifest::plain_label(&partition.label).to_owned(),
                by_default: partition.secret.as_ref().is_none_or(|secret| secret.name.is_empty()),
                by_generation_1: name == first,
            };
            ((volume.metadata.namespace().to_owned(), name), user)
        })
    })
}

/// The names under which a partition's Secret is looked up: as it is written, as generation 1 and as generation 2 make it.
pub(crate) fn secret_names(volume: &SealedVolume, partition: &Partition) -> BTreeSet<String> {
    let written = match partition.secret.as_ref().map(|secret| secret.name.as_str()) {
        Some(name) if !name.is_empty() => name.to_owned(),
        _ => format!("{}-{}", volume.metadata.name, partition.label),
    };
    BTreeSet::from([manifest::kube_name(&written), manifest::safe_kube_name(&written), written])
}
