//! Changes of one object in the text of a manifest file, which is somebody else's: all around it stays byte for byte.
//!
//! The lines of the changed fields are exchanged where the document is written in block style, so that its comments and the
//! fields not known here stay as well: as few lines as possible, more if they are not written one below the other. A
//! document in flow style (`{…}`) is written anew, without its comments. Each result is read again and must hold exactly
//! the wanted objects; if none does, nothing is changed.

mod changes;
mod lines;

use std::ops::Range;

use serde::Deserialize;
use serde_json::{Map, Value};
use zeroize::Zeroizing;

use self::{
    changes::{Grain, changes},
    lines::{Lines, exchange_lines},
};
use super::{
    Manifests, SEALED_VOLUME, SECRET, SealedVolume, or_default,
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
    Grain::ALL
        .into_iter()
        .filter_map(|grain| exchange_lines(chunk, place.item, &changes(&old, new, grain)?))
        .chain(rewrite(chunk, place.item, new))
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

/// The document written anew with everything it holds, but for its comments. Not for a List: it may hold Secrets.
fn rewrite(chunk: &str, item: Option<usize>, new: &SealedVolume) -> Option<Zeroizing<String>> {
    if item.is_some() {
        return None;
    }
    let mut document: Value = serde_saphyr::from_str_with_options(chunk, read::options()).ok()?;
    let spec = serde_json::to_value(&new.spec).ok()?;
    let fields = document.get_mut("spec")?.as_object_mut()?;
    let learned = fields.get("attestation").and_then(Value::as_object).cloned();
    set(fields, &spec, &["TPMHash", "partitions", "quarantined", "attestation"]);
    if let Some(attestation) = fields.get_mut("attestation").and_then(Value::as_object_mut) {
        let known = Value::Object(std::mem::take(attestation));
        *attestation = learned.unwrap_or_default();
        set(attestation, &known, &["ekPublicKey", "pcrValues", "enrolledAt", "lastVerifiedAt"]);
    }
    let head: String =
        chunk.split_inclusive('\n').take_while(|line| read::is_filler(line)).collect();
    let marker = if head.is_empty() && chunk.starts_with("---") { "---\n" } else { "" };
    let body = serde_saphyr::to_string(&document).ok()?;
    Some(Zeroizing::new(format!("{head}{marker}{body}")))
}

/// Sets these fields to what they have in `values`; fields that are not known here stay.
fn set(fields: &mut Map<String, Value>, values: &Value, keys: &[&str]) {
    for key in keys {
        match values.get(key) {
            Some(value) => fields.insert((*key).to_owned(), value.clone()),
            None => fields.remove(*key),
        };
    }
}
