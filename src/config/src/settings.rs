//! The keys this project reads, and how files that set them are merged: protocols/kcrypt.md §10.1, §10.2.
//!
//! Only known keys are merged, one by one, so that whatever others write elsewhere cannot be in the way. A file's own
//! faults are found in that file, also where a later file would win.

use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use crate::error::{ConfigError, Place};
use crate::files::Source;
use crate::value::{Fault, Kind, Setting};
use crate::yaml::{self, Entry, Node};

/// A mapping we read from.
struct Branch {
    path: &'static str,
    /// Whose keys: ours, where an unknown key is an error; or shared with others, where only a near miss is.
    ours: bool,
}

const BRANCHES: [Branch; 6] = [
    Branch { path: "", ours: false },
    Branch { path: "kcrypt", ours: false },
    Branch { path: "kcrypt.challenger", ours: true },
    Branch { path: "install", ours: false },
    Branch { path: "latchkey", ours: true },
    Branch { path: "latchkey.mesh", ours: true },
];

const LEAVES: [(&str, Kind); 18] = [
    ("kcrypt.challenger.challenger_server", Kind::Servers),
    ("kcrypt.challenger.mdns", Kind::Flag),
    ("kcrypt.challenger.certificate", Kind::Certificate),
    ("kcrypt.challenger.nv_index", Kind::NvIndex),
    ("kcrypt.challenger.c_index", Kind::Persistent),
    ("kcrypt.challenger.tpm_device", Kind::TpmDevice),
    ("kcrypt.nv_index", Kind::NvIndex),
    ("kcrypt.c_index", Kind::Persistent),
    ("kcrypt.tpm_device", Kind::TpmDevice),
    ("install.encrypted_partitions", Kind::Labels),
    ("latchkey.deadline", Kind::Duration),
    ("latchkey.protocol", Kind::Protocol),
    ("latchkey.pcrs", Kind::Pcrs),
    ("latchkey.mapper", Kind::Mapper),
    ("latchkey.mesh.network", Kind::Network),
    ("latchkey.mesh.prefix", Kind::Prefix),
    ("latchkey.mesh.port", Kind::Port),
    ("latchkey.mesh.interface", Kind::Interface),
];

/// Edits (insert, delete, replace, swap) that still look like a typing error in a mapping shared with others.
const NEAR: usize = 2;
/// At the top, where cloud-init, Kairos and everybody else have their keys, only a single one does.
const NEAR_AT_TOP: usize = 1;

/// Settings by dotted key, each with the place that set it last.
#[derive(Debug, Default)]
pub(crate) struct Settings {
    leaves: BTreeMap<&'static str, (Setting, Place)>,
    mesh: Option<Place>,
}

impl Settings {
    /// Merges one file over what is there.
    pub(crate) fn add(&mut self, source: &Source) -> Result<(), ConfigError> {
        let file = Arc::new(source.path.clone());
        let documents = yaml::parse(&source.text, &source.path, &|key| concerns_us(key))?;
        let mut documents = documents.iter();
        if let Some(root) = documents.next() {
            self.branch("", root, &Place { file: Arc::clone(&file), line: root.line })?;
        }
        documents.try_for_each(|root| ignored_document(root, &file))
    }

    pub(crate) fn get(&self, key: &str) -> Option<(&Setting, &Place)> {
        self.leaves.get(key).map(|(setting, place)| (setting, place))
    }

    /// Where the mesh was asked for, be it with an empty mapping.
    pub(crate) fn mesh(&self) -> Option<&Place> {
        self.mesh.as_ref()
    }

    fn branch(
        &mut self,
        path: &'static str,
        node: &Node,
        place: &Place,
    ) -> Result<(), ConfigError> {
        if node.is_null() {
            self.clear(path, place);
            return Ok(());
        }
        let wrong_type = |expected| ConfigError::WrongType {
            place: place.clone(),
            key: if path.is_empty() { "the whole file".to_owned() } else { path.to_owned() },
            expected,
            found: node.kind(),
        };
        let entries = yaml::entries(node).ok_or_else(|| wrong_type("a mapping of keys"))?;
        if path == "latchkey.mesh" {
            self.mesh = Some(place.clone());
        }
        for (index, entry) in entries.iter().enumerate() {
            let place = Place { file: Arc::clone(&place.file), line: entry.line };
            let Some(name) = &entry.key else {
                refuse_unknown(path, "?", entry, &place)?;
                continue;
            };
            let full = join(path, name);
            let branch = BRANCHES.iter().find(|branch| branch.path == full);
            let leaf = LEAVES.iter().find(|(leaf, _)| *leaf == full);
            if branch.is_none() && leaf.is_none() {
                refuse_unknown(path, name, entry, &place)?;
                continue;
            }
            if entries.iter().take(index).any(|earlier| earlier.key.as_ref() == Some(name)) {
                return Err(ConfigError::Duplicate { place, key: full });
            }
            match (branch, leaf) {
                (Some(branch), _) => self.branch(branch.path, &entry.value, &place)?,
                (None, Some((leaf, kind))) => self.leaf(leaf, *kind, &entry.value, place)?,
                (None, None) => {}
            }
        }
        Ok(())
    }

    fn leaf(
        &mut self,
        key: &'static str,
        kind: Kind,
        node: &Rc<Node>,
        place: Place,
    ) -> Result<(), ConfigError> {
        if node.is_null() {
            self.clear(key, &place);
            return Ok(());
        }
        let setting = kind.read(node).map_err(|fault| match fault {
            Fault::WrongType { expected } => ConfigError::WrongType {
                place: place.clone(),
                key: key.to_owned(),
                expected,
                found: node.kind(),
            },
            Fault::Invalid(why) => {
                ConfigError::Invalid { place: place.clone(), key: key.to_owned(), why }
            }
        })?;
        let merged = match (self.leaves.remove(key), setting) {
            (Some((Setting::List(mut known), _)), Setting::List(more)) => {
                unite(&mut known, more);
                Setting::List(known)
            }
            (Some((Setting::Pcrs(mut known), _)), Setting::Pcrs(more)) => {
                known.extend(more);
                known.sort_unstable();
                known.dedup();
                Setting::Pcrs(known)
            }
            (Some((known @ (Setting::List(_) | Setting::Text(_)), first)), setting)
                if known.kind() != setting.kind() =>
            {
                return Err(ConfigError::Merge {
                    key: key.to_owned(),
                    first,
                    known: known.kind(),
                    second: place,
                    found: setting.kind(),
                });
            }
            (_, Setting::List(texts)) => {
                let mut once = Vec::new();
                unite(&mut once, texts);
                Setting::List(once)
            }
            (_, setting) => setting,
        };
        self.leaves.insert(key, (merged, place));
        Ok(())
    }

    /// An explicit null takes away what earlier files said (protocols/kcrypt.md §10.2).
    fn clear(&mut self, path: &str, place: &Place) {
        let below = |key: &str| {
            path.is_empty()
                || key
                    .strip_prefix(path)
                    .is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        };
        // A file of comments only is a null at the top. It says nothing, so it clears nothing.
        if path.is_empty() {
            return;
        }
        let before = self.leaves.len();
        self.leaves.retain(|key, _| !below(key));
        if below("latchkey.mesh") {
            self.mesh = None;
        }
        if self.leaves.len() < before {
            log::warn!("{place}: {path} is empty here and clears what earlier files say");
        }
    }
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}

fn unite(known: &mut Vec<String>, more: Vec<String>) {
    for text in more {
        if !known.contains(&text) {
            known.push(text);
        }
    }
}

/// The names that may stand in a mapping.
fn names_in(path: &str) -> impl Iterator<Item = &'static str> {
    let keys = BRANCHES.iter().map(|branch| branch.path).chain(LEAVES.iter().map(|(key, _)| *key));
    keys.filter(|key| !key.is_empty()).filter_map(move |key| match key.rsplit_once('.') {
        Some((parent, name)) => (parent == path).then_some(name),
        None => path.is_empty().then_some(key),
    })
}

fn nearest(path: &str, name: &str) -> Option<(&'static str, usize)> {
    let flat = |name: &str| name.to_lowercase().replace(['-', '_', ' '], "");
    names_in(path)
        .map(|known| {
            let distance = strsim::osa_distance(known, name);
            // A difference in case and hyphens only is the likeliest typing error of all.
            (known, if flat(known) == flat(name) { distance.min(1) } else { distance })
        })
        .min_by_key(|(_, distance)| *distance)
}

fn refuse_unknown(
    path: &'static str,
    name: &str,
    entry: &Entry,
    place: &Place,
) -> Result<(), ConfigError> {
    let ours = BRANCHES.iter().any(|branch| branch.path == path && branch.ours);
    let limit = match path {
        "" if entry.value.kind() != "a mapping" => return Ok(()),
        "" => NEAR_AT_TOP,
        _ => NEAR,
    };
    let near =
        nearest(path, name).filter(|(_, distance)| *distance <= limit).map(|(known, _)| known);
    // Half a name (`server`) is worth a suggestion, but is no near miss in a mapping of others.
    let part = || names_in(path).find(|known| ours && name.len() > 3 && known.contains(name));
    let nearest = near.or_else(part).map(|known| join(path, known));
    if ours || nearest.is_some() {
        return Err(ConfigError::UnknownKey {
            place: place.clone(),
            key: join(path, name),
            nearest,
        });
    }
    Ok(())
}

/// Whether a top-level key is ours or may have been meant to be.
fn concerns_us(key: &str) -> bool {
    nearest("", key).is_some_and(|(_, distance)| distance <= NEAR_AT_TOP)
}

/// Kairos reads the first document of a file only; settings in another would be silently without effect.
fn ignored_document(root: &Node, file: &Arc<std::path::PathBuf>) -> Result<(), ConfigError> {
    let ours = |name: &&str| names_in("").any(|known| known == *name);
    let entries = yaml::entries(root).unwrap_or_default();
    let found = entries.iter().find_map(|entry| {
        entry.key.as_deref().filter(ours).map(|key| (key.to_owned(), entry.line))
    });
    match found {
        Some((key, line)) => {
            Err(ConfigError::SecondDocument { place: Place { file: Arc::clone(file), line }, key })
        }
        None => Ok(()),
    }
}

/// Directory of the file a place is in.
pub(crate) fn directory(place: &Place) -> &Path {
    place.file.parent().unwrap_or(Path::new("/"))
}
