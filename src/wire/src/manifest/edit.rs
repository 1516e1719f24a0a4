//! Changes of one object in the text of a manifest file, which is somebody else's: all around it stays byte for byte.
//!
//! The lines of the changed fields are exchanged where the document is written in block style, so that its comments and the
//! fields not known here stay as well. Otherwise (`{…}`) the whole document is written anew, without its comments. Either
//! way the result is read again and must hold exactly the wanted objects; if it does not, nothing is changed.

use std::ops::Range;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use zeroize::Zeroizing;

use super::{
    Attestation, Manifests, Partition, SEALED_VOLUME, SECRET, SealedVolume, or_default,
    read::{self, Chunk},
};
use crate::{Error, Result};

/// Which object of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ObjectName<'a> {
    /// [`SEALED_VOLUME`] or [`SECRET`].
    pub kind: &'a str,
    /// The namespace, spelt out.
    pub namespace: &'a str,
    /// The name.
    pub name: &'a str,
}

impl std::fmt::Display for ObjectName<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}/{}", self.kind, self.namespace, self.name)
    }
}

/// The text with the `spec` of one volume replaced; the volume is found by namespace and name.
///
/// # Errors
/// [`Error::ManifestEdit`] if the text does not hold it exactly once, or is written in a way that cannot be changed safely.
pub fn replace_volume(text: &str, new: &SealedVolume) -> Result<Zeroizing<String>> {
    let object = ObjectName {
        kind: SEALED_VOLUME,
        namespace: new.metadata.namespace(),
        name: &new.metadata.name,
    };
    let mut wanted = read::parse(text)?;
    let old = wanted
        .volumes
        .iter_mut()
        .find(|volume| names(volume, &object))
        .map(|volume| std::mem::replace(volume, new.clone()))
        .ok_or_else(|| refuse(&object, "it is not in the file"))?;
    let place = Place::of(text, &object)?;
    let chunk = text.get(place.chunk.clone()).unwrap_or_default();
    [exchange_lines(chunk, place.item, &old, new), rewrite(chunk, place.item, new)]
        .into_iter()
        .flatten()
        .map(|changed| spliced(text, &place.chunk, &changed))
        .find(|candidate| holds(candidate, &wanted))
        .ok_or_else(|| {
            refuse(
                &object,
                "it is written in a way that cannot be changed safely; change it by hand",
            )
        })
}

/// The text without one object; `None` if nothing is left but comments.
///
/// # Errors
/// As for [`replace_volume`].
pub fn remove(text: &str, object: &ObjectName<'_>) -> Result<Option<Zeroizing<String>>> {
    let place = Place::of(text, object)?;
    let mut wanted = read::parse(text)?;
    match object.kind {
        SECRET => wanted.secrets.retain(|secret| !is(&secret.metadata, object)),
        _ => wanted.volumes.retain(|volume| !names(volume, object)),
    }
    let removed = match place.item {
        None => place.chunk,
        Some(item) => {
            let chunk = text.get(place.chunk.clone()).unwrap_or_default();
            let lines = Lines::of(chunk);
            let (range, _) = lines.items().get(item).cloned().ok_or_else(|| {
                refuse(object, "it is in a List that is not written line by line")
            })?;
            place.chunk.start + lines.start(range.start)..place.chunk.start + lines.start(range.end)
        }
    };
    let left = spliced(text, &removed, "");
    if !holds(&left, &wanted) {
        return Err(refuse(object, "it cannot be cut out of the file safely; remove it by hand"));
    }
    Ok((!read::documents(&left).is_empty()).then_some(left))
}

fn refuse(object: &ObjectName<'_>, reason: &'static str) -> Error {
    Error::ManifestEdit { object: object.to_string(), reason }
}

fn names(volume: &SealedVolume, object: &ObjectName<'_>) -> bool {
    is(&volume.metadata, object)
}

fn is(metadata: &super::Metadata, object: &ObjectName<'_>) -> bool {
    metadata.namespace() == object.namespace && metadata.name == object.name
}

fn holds(text: &str, wanted: &Manifests) -> bool {
    read::parse(text)
        .is_ok_and(|read| read.volumes == wanted.volumes && read.secrets == wanted.secrets)
}

/// Room for the whole is taken at once: a buffer that moves would leave a copy of the file's Secrets behind.
fn spliced(text: &str, range: &Range<usize>, with: &str) -> Zeroizing<String> {
    let mut out = Zeroizing::new(String::with_capacity(text.len() + with.len()));
    out.push_str(text.get(..range.start).unwrap_or_default());
    out.push_str(with);
    out.push_str(text.get(range.end..).unwrap_or_default());
    out
}

/// Where an object is: bytes of its document, and which item if that is a List.
struct Place {
    chunk: Range<usize>,
    item: Option<usize>,
}

impl Place {
    fn of(text: &str, object: &ObjectName<'_>) -> Result<Self> {
        let mut found = None;
        for chunk in read::documents(text) {
            for item in objects(&chunk, object)? {
                let range = chunk.start..chunk.start + chunk.text.len();
                if found.replace(Self { chunk: range, item }).is_some() {
                    return Err(refuse(object, "it is in the file twice; remove one of them"));
                }
            }
        }
        found.ok_or_else(|| refuse(object, "it is not in the file"))
    }
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Head {
    #[serde(deserialize_with = "or_default")]
    kind: String,
    metadata: super::Metadata,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Heads {
    #[serde(deserialize_with = "or_default")]
    items: Vec<Head>,
}

/// The places of the object in one document: `None` for the document itself, the number of an item in a List.
fn objects(chunk: &Chunk<'_>, object: &ObjectName<'_>) -> Result<Vec<Option<usize>>> {
    let fits = |head: &Head| head.kind == object.kind && is(&head.metadata, object);
    let kind: Head = read::read(chunk, read::Telling::Place)?;
    if kind.kind == "List" {
        let list: Heads = read::read(chunk, read::Telling::Place)?;
        return Ok((0..)
            .zip(&list.items)
            .filter(|(_, head)| fits(head))
            .map(|(at, _)| Some(at))
            .collect());
    }
    Ok(if fits(&kind) { vec![None] } else { Vec::new() })
}

/// A document as lines.
struct Lines<'a> {
    lines: Vec<&'a str>,
}

impl<'a> Lines<'a> {
    fn of(text: &'a str) -> Self {
        Self { lines: text.split_inclusive('\n').collect() }
    }

    /// The byte at which a line starts.
    fn start(&self, line: usize) -> usize {
        self.lines.iter().take(line).map(|line| line.len()).sum()
    }

    fn all(&self) -> Range<usize> {
        0..self.lines.len()
    }

    /// Blanks before a line's text, or `None` for a line without any; the dash of the item that begins there is a blank.
    fn indent(&self, line: usize, item: Option<usize>) -> Option<usize> {
        let line_text = self.lines.get(line)?;
        let text = line_text.trim_start_matches(' ');
        let text = match text.strip_prefix('-') {
            Some(rest) if item == Some(line) => rest.trim_start_matches(' '),
            _ => text,
        };
        let indent = line_text.len() - text.len();
        let filler = text.trim_end().is_empty()
            || text.starts_with('#')
            || indent == 0 && text.starts_with(['%', '-']) && read::is_filler(text);
        (!filler).then_some(indent)
    }

    /// The lines of the value under `key` in the block mapping that has `range` and `indent`: the key's line to the last
    /// line that is further in (or, of a list, as far in).
    fn field(
        &self,
        range: &Range<usize>,
        item: Option<usize>,
        indent: usize,
        key: &str,
    ) -> Option<Range<usize>> {
        let first = range.clone().find(|&line| {
            self.indent(line, item) == Some(indent) && self.has_key(line, item, key)
        })?;
        let mut end = first + 1;
        for line in first + 1..range.end {
            let Some(here) = self.indent(line, None) else { continue };
            let dash = self.lines.get(line).is_some_and(|text| text.trim_start().starts_with('-'));
            if here < indent || (here == indent && !dash) {
                break;
            }
            end = line + 1;
        }
        Some(first..end)
    }

    fn has_key(&self, line: usize, item: Option<usize>, key: &str) -> bool {
        let text = self.lines.get(line).map(|text| text.trim_start()).unwrap_or_default();
        let text = if item == Some(line) {
            text.strip_prefix('-').unwrap_or(text).trim_start()
        } else {
            text
        };
        text.strip_prefix(key)
            .and_then(|rest| rest.strip_prefix(':'))
            .is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\n', '\r', '\t']))
    }

    /// The items of a List: their lines, and how far in their fields are.
    fn items(&self) -> Vec<(Range<usize>, usize)> {
        let Some(list) = self.field(&self.all(), None, 0, "items") else { return Vec::new() };
        let body = list.start + 1..list.end;
        let Some(dash) = body.clone().find_map(|line| self.indent(line, None)) else {
            return Vec::new();
        };
        let starts: Vec<usize> = body
            .clone()
            .filter(|&line| {
                self.indent(line, None) == Some(dash)
                    && self.lines.get(line).is_some_and(|text| text.trim_start().starts_with("- "))
            })
            .collect();
        let ends = starts.iter().skip(1).copied().chain([body.end]);
        starts
            .iter()
            .zip(ends)
            .map(|(&start, end)| (start..end, self.indent(start, Some(start)).unwrap_or(dash + 2)))
            .collect()
    }
}

/// The document with the lines of the fields that differ exchanged; `None` if it is not written line by line.
fn exchange_lines(
    chunk: &str,
    item: Option<usize>,
    old: &SealedVolume,
    new: &SealedVolume,
) -> Option<Zeroizing<String>> {
    let mut text = Zeroizing::new(chunk.to_owned());
    for field in fields(old, new) {
        text = exchange_field(&text, item, &field?)?;
    }
    Some(text)
}

fn exchange_field(text: &str, item: Option<usize>, field: &Field) -> Option<Zeroizing<String>> {
    let lines = Lines::of(text);
    let (range, indent) = match item {
        None => (lines.all(), 0),
        Some(item) => lines.items().get(item).cloned()?,
    };
    let dash = item.map(|_| range.start);
    let spec = lines.field(&range, dash, indent, "spec")?;
    let inside = spec.start + 1..spec.end;
    let deeper =
        inside.clone().find_map(|line| lines.indent(line, None)).filter(|at| *at > indent)?;
    let place = lines.field(&inside, None, deeper, field.key).unwrap_or(inside.end..inside.end);
    let newline = if text.contains("\r\n") { "\r\n" } else { "\n" };
    let written: String =
        field.yaml.lines().map(|line| format!("{:deeper$}{line}{newline}", "")).collect();
    let mut out = Zeroizing::new(String::with_capacity(text.len() + written.len() + newline.len()));
    out.push_str(text.get(..lines.start(place.start))?);
    if !out.ends_with('\n') {
        out.push_str(newline);
    }
    out.push_str(&written);
    out.push_str(text.get(lines.start(place.end)..)?);
    Some(out)
}

/// A field of `spec` with its new value as YAML; no text if it is to go.
struct Field {
    key: &'static str,
    yaml: String,
}

#[derive(Serialize)]
struct PartitionsField<'a> {
    partitions: &'a Vec<Partition>,
}

#[derive(Serialize)]
struct AttestationField<'a> {
    attestation: &'a Attestation,
}

/// The fields that differ.
fn fields(old: &SealedVolume, new: &SealedVolume) -> Vec<Option<Field>> {
    let (old, new) = (&old.spec, &new.spec);
    let mut fields = Vec::new();
    if old.tpm_hash != new.tpm_hash {
        fields.push(Some(Field { key: "TPMHash", yaml: format!("TPMHash: {:?}", new.tpm_hash) }));
    }
    if old.partitions != new.partitions {
        fields.push(yaml("partitions", &PartitionsField { partitions: &new.partitions }));
    }
    if old.quarantined != new.quarantined {
        let yaml = format!("quarantined: {}", new.quarantined);
        fields.push(Some(Field { key: "quarantined", yaml }));
    }
    if old.attestation != new.attestation {
        fields.push(match &new.attestation {
            Some(attestation) => yaml("attestation", &AttestationField { attestation }),
            None => Some(Field { key: "attestation", yaml: String::new() }),
        });
    }
    fields
}

fn yaml(key: &'static str, value: &impl Serialize) -> Option<Field> {
    Some(Field { key, yaml: serde_saphyr::to_string(value).ok()? })
}

/// The document written anew with everything it holds, but for its comments. Not for a List: it may hold Secrets.
fn rewrite(chunk: &str, item: Option<usize>, new: &SealedVolume) -> Option<Zeroizing<String>> {
    if item.is_some() {
        return None;
    }
    let mut document: Value = serde_saphyr::from_str_with_options(chunk, read::options()).ok()?;
    let spec = serde_json::to_value(&new.spec).ok()?;
    let fields = document.get_mut("spec")?.as_object_mut()?;
    for key in ["TPMHash", "partitions", "quarantined", "attestation"] {
        match spec.get(key) {
            Some(value) => fields.insert(key.to_owned(), value.clone()),
            None => fields.remove(key),
        };
    }
    let head: String =
        chunk.split_inclusive('\n').take_while(|line| read::is_filler(line)).collect();
    let marker = if head.is_empty() && chunk.starts_with("---") { "---\n" } else { "" };
    let body = serde_saphyr::to_string(&document).ok()?;
    Some(Zeroizing::new(format!("{head}{marker}{body}")))
}
