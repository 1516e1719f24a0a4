//! What the kernel command line configures: protocols/kcrypt.md §10.3.
//!
//! `kcrypt.challenger.mdns=true`, `kairos.config=kcrypt.challenger.mdns=true`, `kairos.config_url=https://…`. Every word
//! that is not ours is somebody else's, whatever it looks like; one that is nearly ours is a typing error.

use std::path::PathBuf;
use std::sync::Arc;

use crate::certificate;
use crate::cmdline::{CMDLINE, words};
use crate::error::{ConfigError, Place};
use crate::keys::{self, CONFIG_URL, LEAVES, NEAR};
use crate::layer::{Layer, Unknown};
use crate::mesh::value::{Content, Kind as Agent};
use crate::value::Kind;
use crate::yaml::{Node, Value};

/// Linux has 2 to 4 KiB for it (COMMAND_LINE_SIZE), and boot loaders not much more.
const MAX_BYTES: usize = 64 * 1024;
/// Kairos' words for a setting and for a URL, the older one of which may also name a file for another program.
const CONFIG: &str = "kairos.config";
const URLS: [&str; 2] = ["kairos.config_url", CONFIG_URL];
const OLD_URL: &str = "cos.setup";
/// Words of this project that are for the dracut module and for tests, not for here.
const FOR_OTHERS: [&str; 3] = ["latchkey.unlock", "latchkey.test", "latchkey.encrypt"];

impl Layer {
    /// Reads a kernel command line.
    pub(crate) fn of_cmdline(text: &str, roots: &[PathBuf]) -> Result<Self, ConfigError> {
        if text.len() > MAX_BYTES {
            let path = PathBuf::from(CMDLINE);
            return Err(ConfigError::TooMuch { path, what: "too long", limit: MAX_BYTES });
        }
        let place = Place { file: Arc::new(PathBuf::from(CMDLINE)), line: 1 };
        let mut layer = Self::default();
        for word in words(text) {
            refuse_swallowed(&word, &place)?;
            let word = match word.split_once('=') {
                Some((CONFIG, inner)) => inner,
                _ => &word,
            };
            let (key, value) = word.split_once('=').map_or((word, None), |(k, v)| (k, Some(v)));
            match setting(key, value) {
                Ok(Some((leaf, kind))) => {
                    layer.leaf(leaf, kind, &node(kind, value), place.clone())?;
                }
                Ok(None) => refuse_branch(key, &place)?,
                Err(nearest) => {
                    let (key, nearest) = (key.to_owned(), nearest.map(str::to_owned));
                    let unknown = Unknown { place: place.clone(), key, nearest };
                    if !keys::is_in_mesh(&unknown.key) {
                        return Err(unknown.into());
                    }
                    layer.unknown_in_mesh.push(unknown);
                }
            }
        }
        layer.read_certificates(roots)?;
        Ok(layer)
    }
}

/// The setting that a word makes; nothing if it is somebody else's, the key that was meant if it is a typing error.
fn setting(
    key: &str,
    value: Option<&str>,
) -> Result<Option<(&'static str, Kind)>, Option<&'static str>> {
    if URLS.contains(&key) {
        return Ok(Some((CONFIG_URL, Kind::ConfigUrl)));
    }
    if key == OLD_URL {
        let is_url = |value: &str| value.starts_with("http://") || value.starts_with("https://");
        return Ok(value.filter(|value| is_url(value)).map(|_| (CONFIG_URL, Kind::ConfigUrl)));
    }
    if let Some(leaf) = keys::leaf(key) {
        return Ok(Some(leaf));
    }
    if FOR_OTHERS.contains(&key) {
        return Ok(None);
    }
    let dotted = LEAVES.iter().map(|(leaf, _)| *leaf).filter(|leaf| leaf.contains('.'));
    let near = dotted
        .map(|leaf| (leaf, NEAR))
        .chain([(CONFIG, 1), (URLS[0], 1)])
        .find(|(known, limit)| keys::distance(known, key) <= *limit);
    if let Some((known, _)) = near {
        return Err(Some(known));
    }
    // Below what is ours alone nobody else has a word.
    let below = |path: &str| key.strip_prefix(path).is_some_and(|rest| rest.starts_with('.'));
    let ours = keys::BRANCHES.iter().filter(|branch| branch.ours && branch.path.contains('.'));
    if ours.map(|branch| branch.path).chain(LEAVES.iter().map(|(leaf, _)| *leaf)).any(below) {
        return Err(None);
    }
    Ok(None)
}

/// A quote that is closed somewhere later only takes what is between along, for the kernel as for us.
fn refuse_swallowed(word: &str, place: &Place) -> Result<(), ConfigError> {
    let inside = word.split_whitespace().skip(1).filter_map(|part| part.split_once('='));
    let ours = |key: &&str| key.contains('.') && keys::leaf(key).is_some() || URLS.contains(key);
    match inside.map(|(key, _)| key).find(ours) {
        Some(key) => Err(ConfigError::Invalid {
            place: place.clone(),
            key: key.to_owned(),
            why: "it is inside the quotes of another word; close them before it".to_owned(),
        }),
        None => Ok(()),
    }
}

/// A value where keys belong: `kcrypt.challenger=http://…`. A name without a dot may be anybody's.
fn refuse_branch(key: &str, place: &Place) -> Result<(), ConfigError> {
    match keys::branch(key) {
        Some(branch) if branch.path.contains('.') => Err(ConfigError::WrongType {
            place: place.clone(),
            key: key.to_owned(),
            expected: "a key below it",
            found: "a single value",
        }),
        _ => Ok(()),
    }
}

/// A word alone is true. Where a list belongs, commas are between its items.
fn node(kind: Kind, value: Option<&str>) -> Arc<Node> {
    let scalar = |text: &str, plain| {
        Arc::new(Node { value: Value::Scalar { text: text.to_owned(), plain }, line: 1 })
    };
    let Some(text) = value else { return scalar("true", true) };
    let items = || text.split(',').filter(|item| !item.is_empty());
    match kind {
        Kind::Certificate | Kind::Agent(Agent::Pem(Content::Certificates))
            if text.contains(certificate::BEGIN) =>
        {
            return scalar(&certificate::in_lines(text), false);
        }
        Kind::Labels | Kind::Pcrs => {}
        Kind::Servers | Kind::Agent(Agent::Registry) if items().count() > 1 => {}
        _ => return scalar(text, false),
    }
    let items = items().map(|item| scalar(item, false)).collect();
    Arc::new(Node { value: Value::Sequence(items), line: 1 })
}
