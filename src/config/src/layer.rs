//! What one file, one fetched document or the kernel command line says, by itself.
//!
//! Only the keys of [`crate::keys`] are read, one by one, so that whatever others write elsewhere cannot be in the way.
//! A source's own faults are found here, also where a later source would win.

use std::path::PathBuf;
use std::sync::Arc;

use crate::certificate;
use crate::error::{ConfigError, Place};
use crate::files::Source;
use crate::keys::{self, CERTIFICATE, CONFIG_URL, MESH, NEAR, NEAR_AT_TOP, join};
use crate::value::{Kind, Setting};
use crate::yaml::{self, Entry, Node};

/// One thing that a source says.
#[derive(Debug, Clone)]
pub(crate) struct Statement {
    /// A leaf's path; of a branch with [`Change::Clear`] and [`Change::Open`].
    pub(crate) key: &'static str,
    pub(crate) change: Change,
    pub(crate) place: Place,
}

#[derive(Debug, Clone)]
pub(crate) enum Change {
    Set(Setting),
    /// An explicit null takes away what earlier sources said (protocols/kcrypt.md §10.2).
    Clear,
    /// A mapping that means something by being there, be it empty.
    Open,
}

/// The statements of a source, in its order.
#[derive(Debug, Default)]
pub(crate) struct Layer {
    pub(crate) statements: Vec<Statement>,
    pub(crate) unknown_in_mesh: Vec<Unknown>,
}

/// A key of `latchkey.mesh` that nobody reads. An error to the agent. The initramfs only tells: it may be older than the
/// configuration, and the key that it does not know is no reason to leave the disk closed.
#[derive(Debug, Clone)]
pub(crate) struct Unknown {
    pub(crate) place: Place,
    pub(crate) key: String,
    pub(crate) nearest: Option<String>,
}

impl From<Unknown> for ConfigError {
    fn from(Unknown { place, key, nearest }: Unknown) -> Self {
        Self::UnknownKey { place, key, nearest }
    }
}

impl Layer {
    /// Reads one YAML file. Paths of certificates are looked up below `roots` as well.
    pub(crate) fn of_yaml(source: &Source, roots: &[PathBuf]) -> Result<Self, ConfigError> {
        let file = Arc::new(source.path.clone());
        let documents = yaml::parse(&source.text, &source.path, &keys::concerns_us)?;
        let mut layer = Self::default();
        let mut documents = documents.iter();
        if let Some(root) = documents.next() {
            layer.branch("", root, &Place { file: Arc::clone(&file), line: root.line })?;
        }
        documents.try_for_each(|root| ignored_document(root, &file))?;
        layer.read_certificates(roots)?;
        Ok(layer)
    }

    /// The URL that continues this source, if it names one.
    pub(crate) fn config_url(&self) -> Option<(&str, &Place)> {
        self.statements.iter().rev().find(|statement| statement.key == CONFIG_URL).and_then(
            |statement| match &statement.change {
                Change::Set(Setting::Text(url)) if !url.is_empty() => {
                    Some((url.as_str(), &statement.place))
                }
                _ => None,
            },
        )
    }

    fn branch(
        &mut self,
        path: &'static str,
        node: &Node,
        place: &Place,
    ) -> Result<(), ConfigError> {
        if node.is_null() {
            // A file of comments only is a null at the top. It says nothing, so it clears nothing.
            if !path.is_empty() {
                self.say(path, Change::Clear, place.clone());
            }
            return Ok(());
        }
        let wrong_type = |expected| ConfigError::WrongType {
            place: place.clone(),
            key: if path.is_empty() { "the whole file".to_owned() } else { path.to_owned() },
            expected,
            found: node.kind(),
        };
        let entries = yaml::entries(node).ok_or_else(|| wrong_type("a mapping of keys"))?;
        if path == MESH {
            self.say(path, Change::Open, place.clone());
        }
        for (index, entry) in entries.iter().enumerate() {
            let place = Place { file: Arc::clone(&place.file), line: entry.line };
            let Some(name) = &entry.key else {
                self.unknown(path, "?", entry, &place)?;
                continue;
            };
            let full = join(path, name);
            let (branch, leaf) = (keys::branch(&full), keys::leaf(&full));
            if branch.is_none() && leaf.is_none() {
                self.unknown(path, name, entry, &place)?;
                continue;
            }
            if entries.iter().take(index).any(|earlier| earlier.key.as_ref() == Some(name)) {
                return Err(ConfigError::Duplicate { place, key: full });
            }
            match (branch, leaf) {
                (Some(branch), _) => self.branch(branch.path, &entry.value, &place)?,
                (None, Some((leaf, kind))) => self.leaf(leaf, kind, &entry.value, place)?,
                (None, None) => {}
            }
        }
        Ok(())
    }

    fn unknown(
        &mut self,
        path: &'static str,
        name: &str,
        entry: &Entry,
        place: &Place,
    ) -> Result<(), ConfigError> {
        match unknown(path, name, entry, place) {
            Some(unknown) if path == MESH => self.unknown_in_mesh.push(unknown),
            Some(unknown) => return Err(unknown.into()),
            None => {}
        }
        Ok(())
    }

    pub(crate) fn leaf(
        &mut self,
        key: &'static str,
        kind: Kind,
        node: &Arc<Node>,
        place: Place,
    ) -> Result<(), ConfigError> {
        if node.is_null() {
            self.say(key, Change::Clear, place);
            return Ok(());
        }
        let setting = kind.read(node, &place).map_err(|fault| fault.at(key, node, &place))?;
        self.say(key, Change::Set(setting), place);
        Ok(())
    }

    fn say(&mut self, key: &'static str, change: Change, place: Place) {
        self.statements.push(Statement { key, change, place });
    }

    /// Puts PEM text where a path stands: later, the file system it is on may be gone.
    pub(crate) fn read_certificates(&mut self, roots: &[PathBuf]) -> Result<(), ConfigError> {
        for statement in &mut self.statements {
            if let (CERTIFICATE, Change::Set(Setting::Text(text))) =
                (statement.key, &mut statement.change)
                && !text.is_empty()
            {
                *text = certificate::pem(text, &statement.place, roots)?;
            }
        }
        Ok(())
    }
}

/// Nothing if the key is somebody else's.
fn unknown(path: &'static str, name: &str, entry: &Entry, place: &Place) -> Option<Unknown> {
    let ours = keys::branch(path).is_some_and(|branch| branch.ours);
    let near = keys::nearest(path, name).filter(|(known, distance)| match path {
        // At the top one that looks like ours is not even ours if it holds something else.
        "" => {
            *distance <= NEAR_AT_TOP
                && (entry.value.kind() == "a mapping") == keys::branch(known).is_some()
        }
        _ => *distance <= NEAR,
    });
    // Half a name (`server`) is worth a suggestion, but is no near miss in a mapping of others.
    let part = || keys::names_in(path).find(|known| ours && name.len() > 3 && known.contains(name));
    let nearest = near.map(|(known, _)| known).or_else(part).map(|known| join(path, known));
    let nearest = keys::of_ikto(path, name).map(str::to_owned).or(nearest);
    let key = join(path, name);
    (ours || nearest.is_some()).then(|| Unknown { place: place.clone(), key, nearest })
}

/// Kairos reads the first document of a file only; settings in another would be silently without effect.
fn ignored_document(root: &Node, file: &Arc<PathBuf>) -> Result<(), ConfigError> {
    let ours = |name: &&str| keys::names_in("").any(|known| known == *name);
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
