//! A YAML 1.2 file as a tree with line numbers, of which only what this project reads is kept.
//!
//! Somebody else's parts of a cloud-config may hold anything that is valid YAML. They are skipped while parsing, so that
//! they cost no memory; only anchored nodes are kept, since an alias in our part may point to one. An alias shares the
//! node it names (`Arc`), so that nested aliases ("billion laughs") cost nothing.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use saphyr_parser::{Event, Parser, ScalarStyle, ScanError};

use crate::error::ConfigError;

/// Nodes kept of one file; a sensible configuration of ours has about twenty.
const MAX_NODES: usize = 10_000;
/// Nesting kept; ours is five deep at most. What is deeper is skipped.
const MAX_DEPTH: usize = 32;

#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) value: Value,
    /// Counted from 1.
    pub(crate) line: usize,
}

#[derive(Debug)]
pub(crate) enum Value {
    /// `plain`: neither quoted nor a block, so that it may be a number, a boolean or null.
    Scalar {
        text: String,
        plain: bool,
    },
    Sequence(Vec<Arc<Node>>),
    Mapping(Vec<Entry>),
    /// A scalar with a tag that only its own application understands (`!env X`).
    Tagged,
    /// Not kept: somebody else's, too deep, too much, or an alias to the node it is inside of.
    Skipped {
        mapping: bool,
    },
}

#[derive(Debug)]
pub(crate) struct Entry {
    /// `None` for keys that are not scalars.
    pub(crate) key: Option<String>,
    /// The plain key `<<` (YAML merge key).
    pub(crate) merge: bool,
    pub(crate) line: usize,
    pub(crate) value: Arc<Node>,
}

impl Node {
    /// Null as YAML's core schema writes it: nothing, `~` or `null`.
    pub(crate) fn is_null(&self) -> bool {
        matches!(&self.value, Value::Scalar { text, plain: true }
            if matches!(text.as_str(), "" | "~" | "null" | "Null" | "NULL"))
    }

    /// What this is, for an error message.
    pub(crate) fn kind(&self) -> &'static str {
        match &self.value {
            _ if self.is_null() => "nothing",
            Value::Scalar { .. } => "a single value",
            Value::Sequence(_) => "a list",
            Value::Mapping(_) | Value::Skipped { mapping: true } => "a mapping",
            Value::Tagged => "a value with a tag of its own",
            Value::Skipped { mapping: false } => "something too deep, too large or inside itself",
        }
    }
}

/// The roots of all documents of the file; `wanted` tells which top-level keys to keep.
pub(crate) fn parse(
    text: &str,
    path: &Path,
    wanted: &dyn Fn(&str) -> bool,
) -> Result<Vec<Arc<Node>>, ConfigError> {
    let mut builder = Builder { wanted, ..Builder::new() };
    // keep_tags: a %TAG line of the first document may serve the next; all parsers in the field allow that.
    for event in Parser::new_from_str(text).keep_tags(true) {
        let (event, span) = event.map_err(|e| syntax(path, &e))?;
        builder.event(event, span.start.line());
    }
    Ok(builder.documents)
}

fn syntax(path: &Path, error: &ScanError) -> ConfigError {
    ConfigError::Syntax {
        path: path.to_owned(),
        line: error.marker().line(),
        column: error.marker().col().saturating_add(1),
        message: error.info().to_owned(),
    }
}

/// Makes nodes of events. Open collections stand on `open`, so that depth costs heap and not stack.
struct Builder<'w> {
    wanted: &'w dyn Fn(&str) -> bool,
    open: Vec<Frame>,
    anchors: HashMap<usize, Arc<Node>>,
    documents: Vec<Arc<Node>>,
    nodes: usize,
}

struct Frame {
    collection: Collection,
    keep: bool,
    anchor: usize,
    line: usize,
}

enum Collection {
    Sequence(Vec<Arc<Node>>),
    Mapping { entries: Vec<Entry>, key: Option<Key> },
}

struct Key {
    text: Option<String>,
    merge: bool,
    line: usize,
}

impl Builder<'_> {
    fn new() -> Self {
        Self {
            wanted: &|_| true,
            open: Vec::new(),
            anchors: HashMap::new(),
            documents: Vec::new(),
            nodes: 0,
        }
    }

    fn event(&mut self, event: Event<'_>, line: usize) {
        match event {
            Event::Scalar(text, style, anchor, tag) => {
                let plain = style == ScalarStyle::Plain;
                let value = match tag {
                    Some(tag) if !tag.is_yaml_core_schema() => Value::Tagged,
                    Some(tag) if tag.suffix == "str" => {
                        Value::Scalar { text: text.into_owned(), plain: false }
                    }
                    _ => Value::Scalar { text: text.into_owned(), plain },
                };
                // Keys of a skipped mapping are scalars too: what is not kept is dropped in `close`.
                self.close(anchor, Node { value, line });
            }
            Event::SequenceStart(anchor, _) => {
                self.open(Collection::Sequence(Vec::new()), anchor, line);
            }
            Event::MappingStart(anchor, _) => {
                self.open(Collection::Mapping { entries: Vec::new(), key: None }, anchor, line);
            }
            Event::SequenceEnd | Event::MappingEnd => {
                if let Some(frame) = self.open.pop() {
                    let value = match frame.collection {
                        _ if !frame.keep => Value::Skipped {
                            mapping: matches!(frame.collection, Collection::Mapping { .. }),
                        },
                        Collection::Sequence(items) => Value::Sequence(items),
                        Collection::Mapping { entries, .. } => Value::Mapping(entries),
                    };
                    self.close(frame.anchor, Node { value, line: frame.line });
                }
            }
            Event::Alias(anchor) => {
                let node = self.anchors.get(&anchor).cloned();
                let inside_itself =
                    || Arc::new(Node { value: Value::Skipped { mapping: false }, line });
                self.place(node.unwrap_or_else(inside_itself));
            }
            Event::DocumentStart(_)
            | Event::DocumentEnd
            | Event::StreamStart
            | Event::StreamEnd
            | Event::Nothing => {}
        }
    }

    fn open(&mut self, collection: Collection, anchor: usize, line: usize) {
        let keep = self.keeps(anchor);
        self.open.push(Frame { collection, keep, anchor, line });
    }

    /// Whether the next node is one to keep: the root, a wanted top-level value, anything anchored, and all below these.
    fn keeps(&self, anchor: usize) -> bool {
        if self.nodes >= MAX_NODES || self.open.len() >= MAX_DEPTH {
            return false;
        }
        match self.open.as_slice() {
            [] => true,
            [root] => match &root.collection {
                Collection::Mapping { key: Some(key), .. } => {
                    anchor != 0
                        || key.text.as_deref().is_some_and(|key| key == "<<" || (self.wanted)(key))
                }
                // The root is a list: an error in itself, whatever is in it.
                Collection::Mapping { key: None, .. } | Collection::Sequence(_) => anchor != 0,
            },
            [.., parent] => parent.keep || anchor != 0,
        }
    }

    fn close(&mut self, anchor: usize, node: Node) {
        self.nodes = self.nodes.saturating_add(usize::from(self.keeps(anchor)));
        let node = Arc::new(node);
        if anchor != 0 {
            self.anchors.insert(anchor, Arc::clone(&node));
        }
        self.place(node);
    }

    fn place(&mut self, node: Arc<Node>) {
        let full = self.nodes >= MAX_NODES;
        let at_root = self.open.len() == 1;
        let Some(frame) = self.open.last_mut() else {
            self.documents.push(node);
            return;
        };
        match &mut frame.collection {
            Collection::Sequence(items) if frame.keep && !full => items.push(node),
            Collection::Sequence(_) => frame.keep = false,
            Collection::Mapping { key: key @ None, .. } => *key = Some(Key::of(&node)),
            Collection::Mapping { entries, key } => {
                let Some(Key { text, merge, line }) = key.take() else { return };
                let wanted =
                    !at_root || merge || text.as_deref().is_some_and(|text| (self.wanted)(text));
                if !wanted {
                    return;
                }
                if frame.keep && !full {
                    entries.push(Entry { key: text, merge, line, value: node });
                } else {
                    frame.keep = false;
                }
            }
        }
    }
}

impl Key {
    fn of(node: &Node) -> Self {
        let (text, merge) = match &node.value {
            Value::Scalar { text, plain } => (Some(text.clone()), *plain && text == "<<"),
            _ => (None, false),
        };
        Self { text, merge, line: node.line }
    }
}

/// The entries of a mapping with its merge keys resolved: what the mapping says itself comes first and wins.
/// `None`: not a mapping, or merged mappings that are no mappings, nested too deep or too many.
pub(crate) fn entries(node: &Node) -> Option<Vec<&Entry>> {
    let mut found = Vec::new();
    let mut budget = MAX_NODES;
    gather(node, MAX_DEPTH, &mut budget, &mut found)?;
    Some(found)
}

fn gather<'n>(
    node: &'n Node,
    depth: usize,
    budget: &mut usize,
    found: &mut Vec<&'n Entry>,
) -> Option<()> {
    let depth = depth.checked_sub(1)?;
    let Value::Mapping(entries) = &node.value else { return None };
    *budget = budget.checked_sub(entries.len().max(1))?;
    found.extend(entries.iter().filter(|entry| !entry.merge));
    for entry in entries.iter().filter(|entry| entry.merge) {
        match &entry.value.value {
            Value::Mapping(_) => merge(&entry.value, depth, budget, found)?,
            Value::Sequence(sources) => {
                for source in sources {
                    merge(source, depth, budget, found)?;
                }
            }
            _ => return None,
        }
    }
    Some(())
}

/// Adds the entries of `source` that are not there yet.
fn merge<'n>(
    source: &'n Node,
    depth: usize,
    budget: &mut usize,
    found: &mut Vec<&'n Entry>,
) -> Option<()> {
    let mut inherited = Vec::new();
    gather(source, depth, budget, &mut inherited)?;
    for entry in inherited {
        if !found.iter().any(|known| known.key.is_some() && known.key == entry.key) {
            found.push(entry);
        }
    }
    Some(())
}
