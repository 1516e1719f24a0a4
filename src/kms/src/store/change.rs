//! A change of the store: what is added, exchanged and removed, in whose file.

use std::{
    fs::File,
    path::{Path, PathBuf},
    sync::{Arc, MutexGuard},
    thread,
    time::Duration,
};

use latchkey_wire::manifest::{self, ObjectName, SEALED_VOLUME, SECRET, SealedVolume, Secret};
use zeroize::Zeroizing;

use super::{
    CreateError, EditError, Store,
    file::{self, NewFile, Read},
    files::Files,
    snapshot::{ReadSecret, Snapshot},
};

/// Longest name of an object. With a namespace (63), the suffix and two dots it stays below the 255 bytes of a file name.
const MAX_NAME: usize = 180;

/// How long a file must stay the same before a change of it is made from what it says now.
const SETTLED: Duration = Duration::from_millis(100);

/// A change of the store in progress: everybody else's waits until it is dropped.
pub(crate) struct Change<'a> {
    pub(super) store: &'a Store,
    pub(super) files: MutexGuard<'a, Files>,
    pub(super) _alone: Option<File>,
}

impl std::fmt::Debug for Change<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Change of {:?}", self.store)
    }
}

/// Files that are to be written; no one else is held up by it.
pub(crate) struct Prepared {
    pub(super) files: Vec<NewFile>,
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
        self.add(file)
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
        self.add(file)
    }

    fn add(&mut self, file: NewFile) -> Result<(), CreateError> {
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

/// The rule for names of Kubernetes objects (RFC 1123 subdomain), which also makes them harmless as file names.
fn is_object_name(name: &str, longest: usize) -> bool {
    let alphanumeric = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    name.len() <= longest
        && name.as_bytes().first().is_some_and(alphanumeric)
        && name.as_bytes().last().is_some_and(alphanumeric)
        && name.bytes().all(|byte| alphanumeric(&byte) || byte == b'-' || byte == b'.')
}
