//! Reading of manifests: documents, kinds, strict types, and errors that name the line but no secret.

use std::collections::BTreeMap;

use base64::{Engine, engine::general_purpose::STANDARD};
use serde::{Deserialize, de::IgnoredAny};
use serde_saphyr::{Options, options::DuplicateKeyPolicy};
use zeroize::Zeroizing;

use super::{
    MAX_FILE, Manifests, Metadata, SEALED_VOLUME, SEALED_VOLUME_API, SECRET, SECRET_API,
    SealedVolume, SealedVolumeSpec, Secret, or_default,
};
use crate::{Error, Result};

/// Reads all documents of a file. The first error ends it: half a file is not what an operator meant.
pub fn parse(text: &str) -> Result<Manifests> {
    if text.len() > MAX_FILE {
        return Err(Error::TooLong { what: "manifest file", limit: MAX_FILE, got: text.len() });
    }
    let mut manifests = Manifests::default();
    for document in documents(text) {
        read_document(&document, &mut manifests)?;
    }
    Ok(manifests)
}

/// A document and the number of lines before it.
pub(super) struct Chunk<'a> {
    lines_before: u64,
    /// Where it starts in the text, in bytes.
    pub(super) start: usize,
    pub(super) text: &'a str,
}

/// Splits at the document markers. A line that begins with `---` ends a document wherever it stands, even inside a
/// block or a quoted scalar (YAML 1.2.2 §9.1.2), so this needs no parser.
pub(super) fn documents(text: &str) -> Vec<Chunk<'_>> {
    let mut chunks = Vec::new();
    let mark = text.len() - text.strip_prefix('\u{feff}').unwrap_or(text).len();
    let (mut start, mut start_line, mut at) = (mark, 0, mark);
    for (number, line) in (0u64..).zip(text.get(mark..).unwrap_or_default().split_inclusive('\n')) {
        let marker = line
            .strip_prefix("---")
            .is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\n', '\r']));
        if marker && at > start {
            chunks.push(Chunk {
                lines_before: start_line,
                start,
                text: text.get(start..at).unwrap_or_default(),
            });
            (start, start_line) = (at, number);
        }
        at += line.len();
    }
    chunks.push(Chunk {
        lines_before: start_line,
        start,
        text: text.get(start..).unwrap_or_default(),
    });
    chunks.retain(|chunk| !chunk.text.lines().all(is_filler));
    chunks
}

/// Lines that hold no node: blank, comment, directive, bare markers.
pub(super) fn is_filler(line: &str) -> bool {
    let line = line.trim();
    line.is_empty() || line.starts_with(['#', '%']) || line == "---" || line == "..."
}

/// What every Kubernetes object has.
#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct Head {
    #[serde(deserialize_with = "or_default")]
    api_version: String,
    #[serde(deserialize_with = "or_default")]
    kind: String,
}

fn read_document(chunk: &Chunk<'_>, manifests: &mut Manifests) -> Result<()> {
    // Before its kind is known, a document may be a Secret: nothing of it is repeated.
    let head: Head = read(chunk, Telling::Place)?;
    match (head.api_version.as_str(), head.kind.as_str()) {
        (SEALED_VOLUME_API, SEALED_VOLUME) => read_volume(chunk, manifests),
        (other, SEALED_VOLUME) => Err(at(
            chunk,
            1,
            1,
            format!("SealedVolume of apiVersion {other:?}: only {SEALED_VOLUME_API} is known"),
        )),
        (SECRET_API, SECRET) => {
            manifests.secrets.push(read_secret(chunk)?);
            Ok(())
        }
        (_, "") => Err(at(chunk, 1, 1, "the document has no kind".to_owned())),
        (SECRET_API, "List") => read_list(chunk, manifests),
        _ => Ok(()), // some other object of the cluster
    }
}

fn read_volume(chunk: &Chunk<'_>, manifests: &mut Manifests) -> Result<()> {
    let volume: SealedVolume = read(chunk, Telling::Everything)?;
    let (line, name) = (chunk.lines_before + 1, volume.metadata.name.clone());
    add_volume(chunk, volume, manifests)?;
    for field in read::<FieldNames>(chunk, Telling::Everything)?.unknown() {
        manifests.warnings.push(format!(
            "line {line}: SealedVolume {name:?}: unknown field {field:?} is not looked at; is it misspelt?"
        ));
    }
    Ok(())
}

fn add_volume(chunk: &Chunk<'_>, volume: SealedVolume, manifests: &mut Manifests) -> Result<()> {
    named(chunk, SEALED_VOLUME, &volume.metadata)?;
    if volume.pubhash().is_err() {
        manifests.warnings.push(format!(
            "line {}: SealedVolume {:?}: TPMHash is not 64 hexadecimal digits, no machine can match it",
            chunk.lines_before + 1,
            volume.metadata.name
        ));
    }
    manifests.volumes.push(volume);
    Ok(())
}

/// The names of the fields that matter for who gets in.
#[derive(Deserialize, Default)]
#[serde(default)]
struct FieldNames {
    #[serde(deserialize_with = "or_default")]
    spec: BTreeMap<String, Fields>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Fields {
    List(Vec<BTreeMap<String, IgnoredAny>>),
    Other(IgnoredAny),
}

impl FieldNames {
    fn unknown(&self) -> Vec<String> {
        let mut unknown = Vec::new();
        for (field, inner) in &self.spec {
            match (field.as_str(), inner) {
                ("partitions", Fields::List(partitions)) => unknown.extend(
                    partitions
                        .iter()
                        .flat_map(BTreeMap::keys)
                        .filter(|field| {
                            !["label", "deviceName", "uuid", "secret"].contains(&field.as_str())
                        })
                        .map(|field| format!("spec.partitions[].{field}")),
                ),
                ("TPMHash" | "partitions" | "quarantined" | "attestation", _) => {}
                (other, Fields::List(_) | Fields::Other(_)) => {
                    unknown.push(format!("spec.{other}"))
                }
            }
        }
        unknown
    }
}

/// A Secret as it is written.
#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct SecretDocument {
    metadata: Metadata,
    #[serde(deserialize_with = "or_default")]
    data: Values,
    #[serde(deserialize_with = "or_default")]
    string_data: Values,
}

fn read_secret(chunk: &Chunk<'_>) -> Result<Secret> {
    let document: SecretDocument = read(chunk, Telling::Place)?;
    secret_of(chunk, document.metadata, document.data, document.string_data)
}

/// Values as they are written; `null` is empty.
type Values = BTreeMap<String, Option<Zeroizing<String>>>;

fn secret_of(
    chunk: &Chunk<'_>,
    metadata: Metadata,
    encoded: Values,
    text: Values,
) -> Result<Secret> {
    named(chunk, SECRET, &metadata)?;
    let mut data = BTreeMap::new();
    for (key, value) in encoded {
        let value =
            Zeroizing::new(value.unwrap_or_default().split_ascii_whitespace().collect::<String>());
        let decoded = STANDARD.decode(value.as_bytes()).map_err(|_| {
            let reason = format!(
                "Secret {:?}: data.{key} is not base64; text goes under stringData",
                metadata.name
            );
            at(chunk, 1, 1, reason)
        })?;
        data.insert(key, Zeroizing::new(decoded));
    }
    for (key, value) in text {
        data.insert(key, Zeroizing::new(value.unwrap_or_default().as_bytes().to_vec()));
    }
    Ok(Secret { metadata, data })
}

/// What `kubectl get sealedvolumes,secrets -o yaml` prints: the objects as items of one document.
#[derive(Deserialize, Default)]
#[serde(default)]
struct ListDocument {
    #[serde(deserialize_with = "or_default")]
    items: Vec<Item>,
}

/// Either kind.
#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct Item {
    #[serde(deserialize_with = "or_default")]
    api_version: String,
    #[serde(deserialize_with = "or_default")]
    kind: String,
    metadata: Metadata,
    #[serde(deserialize_with = "or_default")]
    spec: SealedVolumeSpec,
    #[serde(deserialize_with = "or_default")]
    data: Values,
    #[serde(deserialize_with = "or_default")]
    string_data: Values,
}

fn read_list(chunk: &Chunk<'_>, manifests: &mut Manifests) -> Result<()> {
    let list: ListDocument = read(chunk, Telling::Place)?;
    for item in list.items {
        match (item.api_version.as_str(), item.kind.as_str()) {
            (SEALED_VOLUME_API, SEALED_VOLUME) => {
                let volume = SealedVolume { metadata: item.metadata, spec: item.spec };
                add_volume(chunk, volume, manifests)?;
            }
            (SECRET_API, SECRET) => {
                manifests.secrets.push(secret_of(
                    chunk,
                    item.metadata,
                    item.data,
                    item.string_data,
                )?);
            }
            (version, kind) => {
                let reason = format!(
                    "the List holds a {kind:?} of apiVersion {version:?}: only SealedVolumes and Secrets are read from one"
                );
                return Err(at(chunk, 1, 1, reason));
            }
        }
    }
    Ok(())
}

fn named(chunk: &Chunk<'_>, kind: &str, metadata: &Metadata) -> Result<()> {
    if metadata.name.is_empty() {
        Err(at(chunk, 1, 1, format!("the {kind} has no metadata.name")))
    } else {
        Ok(())
    }
}

fn at(chunk: &Chunk<'_>, line: u64, column: u64, reason: String) -> Error {
    Error::Manifest { line: chunk.lines_before + line, column, reason }
}

/// How much of a parser's message may be told.
#[derive(Clone, Copy)]
pub(super) enum Telling {
    /// The document holds no secret.
    Everything,
    /// Only where it is wrong: the message could repeat a passphrase.
    Place,
}

pub(super) fn read<T: for<'de> Deserialize<'de>>(chunk: &Chunk<'_>, telling: Telling) -> Result<T> {
    serde_saphyr::from_str_with_options(chunk.text, options()).map_err(|error| {
        let place = error.location();
        let (line, column) = place.map_or((1, 1), |place| (place.line().max(1), place.column().max(1)));
        let reason = match telling {
            Telling::Everything => without_place(&error.without_snippet().to_string()).to_owned(),
            Telling::Place => "not valid YAML, or a value of a wrong type (text must be quoted if it looks like a number)".to_owned(),
        };
        at(chunk, line, column, reason)
    })
}

/// The library ends its messages with a place that counts from the document's beginning, not the file's.
fn without_place(message: &str) -> &str {
    message.rsplit_once(" at line ").map_or(message, |(message, _)| message)
}

/// Types as strictly as the Kubernetes API; limits against documents made to exhaust memory are the library's own.
pub(super) fn options() -> Options {
    serde_saphyr::options! {
        duplicate_keys: DuplicateKeyPolicy::Error,
        no_schema: true,
        with_snippet: false,
    }
}
