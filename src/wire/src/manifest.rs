//! The YAML manifests of kcrypt's key server (`protocols/kcrypt.md` §5.7, §7.1): `SealedVolume`
//! (`keyserver.kairos.io/v1alpha1`) and `v1/Secret`, as operators write them for Kubernetes.
//!
//! A file may hold several documents; documents of other kinds are passed over. As the Kubernetes API does, fields
//! that are not known are tolerated (and told, since a misspelt `quarantined` must not go unseen) and values of a
//! wrong type are errors. No error text repeats a value of a Secret.

use std::collections::BTreeMap;

use base64::{Engine, engine::general_purpose::STANDARD};
use serde::{
    Deserialize, Deserializer, Serialize,
    de::{IgnoredAny, Visitor},
};
use serde_saphyr::{Options, options::DuplicateKeyPolicy};
use zeroize::Zeroizing;

use crate::{Error, Result, go_json, pubhash::Pubhash, v1};

/// Longest file taken, in bytes. Each volume needs about 300.
pub const MAX_FILE: usize = 4 * 1024 * 1024;

/// `apiVersion` of a [`SealedVolume`].
pub const SEALED_VOLUME_API: &str = "keyserver.kairos.io/v1alpha1";
/// `kind` of a [`SealedVolume`].
pub const SEALED_VOLUME: &str = "SealedVolume";
/// `apiVersion` of a [`Secret`].
pub const SECRET_API: &str = "v1";
/// `kind` of a [`Secret`].
pub const SECRET: &str = "Secret";

/// The namespace of an object that names none, as for `kubectl` without a context.
pub const DEFAULT_NAMESPACE: &str = "default";

/// Key of a Secret that says who made it.
pub const GENERATED_BY: &str = "generated_by";

/// Key of the passphrase when the volume names none.
pub const DEFAULT_KEY: &str = "passphrase";

/// What ends the label of a LUKS partition around a file system of the same label (Kairos #4404).
const LUKS_SUFFIX: &str = "_LUKS";

/// What a file holds.
#[derive(Debug, Default)]
pub struct Manifests {
    /// In the order of the file.
    pub volumes: Vec<SealedVolume>,
    /// In the order of the file.
    pub secrets: Vec<Secret>,
    /// What an operator should look at: misspelt fields, hashes that match no machine.
    pub warnings: Vec<String>,
}

/// Name and namespace of an object.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Metadata {
    /// Unique within kind and namespace.
    #[serde(deserialize_with = "or_default")]
    pub name: String,
    /// Empty means [`DEFAULT_NAMESPACE`].
    #[serde(deserialize_with = "or_default", skip_serializing_if = "String::is_empty")]
    pub namespace: String,
    /// Labels.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Annotations.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

impl Metadata {
    /// The namespace, spelt out.
    #[must_use]
    pub fn namespace(&self) -> &str {
        if self.namespace.is_empty() { DEFAULT_NAMESPACE } else { &self.namespace }
    }
}

/// One machine: its TPM hash and the partitions it may open.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SealedVolume {
    /// Name and namespace.
    pub metadata: Metadata,
    /// What the operator wants.
    #[serde(deserialize_with = "or_default")]
    pub spec: SealedVolumeSpec,
}

/// The `spec` of a [`SealedVolume`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SealedVolumeSpec {
    /// 64 hexadecimal digits; see [`SealedVolume::pubhash`].
    #[serde(rename = "TPMHash", deserialize_with = "or_default")]
    pub tpm_hash: String,
    /// The partitions.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "Vec::is_empty")]
    pub partitions: Vec<Partition>,
    /// Nothing is released to this machine.
    #[serde(deserialize_with = "boolean")]
    pub quarantined: bool,
    /// What generation 2 has learned of the machine.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attestation: Option<Attestation>,
}

/// One partition of a machine. Empty means "not said".
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Partition {
    /// File system or LUKS label.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "String::is_empty")]
    pub label: String,
    /// Kernel name (`sda3`).
    #[serde(deserialize_with = "or_default", skip_serializing_if = "String::is_empty")]
    pub device_name: String,
    /// UUID of the GPT partition.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "String::is_empty")]
    pub uuid: String,
    /// Where the passphrase is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secret: Option<SecretRef>,
}

/// Where a passphrase is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SecretRef {
    /// Name of the Secret; empty means `<volume>-<label>`.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// Key in the Secret; empty means [`DEFAULT_KEY`].
    #[serde(deserialize_with = "or_default", skip_serializing_if = "String::is_empty")]
    pub path: String,
}

/// What generation 2 has learned of a machine (§7.1); generation 1 keeps it as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Attestation {
    /// PEM of the EK.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ek_public_key: Option<String>,
    /// The PCRs it is held to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pcr_values: Option<PcrValues>,
    /// RFC 3339.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub enrolled_at: Option<String>,
    /// RFC 3339.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_verified_at: Option<String>,
}

/// Values by PCR index, lower-case hex; an empty value is learned at the next boot.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PcrValues {
    /// Keys are decimal indices.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pcrs: Option<BTreeMap<String, String>>,
}

/// A passphrase under its key, and who made it. Values are wiped when dropped.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Secret {
    /// Name and namespace.
    pub metadata: Metadata,
    /// Values by key; `stringData` stands over `data`, as in Kubernetes.
    pub data: BTreeMap<String, Zeroizing<Vec<u8>>>,
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Secret")
            .field("metadata", &self.metadata)
            .field("keys", &self.data.keys().collect::<Vec<_>>())
            .finish()
    }
}

impl SealedVolume {
    /// The machine's TPM hash; an error if what is written there matches no machine.
    pub fn pubhash(&self) -> Result<Pubhash> {
        Pubhash::parse(self.spec.tpm_hash.trim())
    }

    /// The manifest as a YAML document, ending with a newline.
    pub fn to_yaml(&self) -> Result<String> {
        let document = Document { api_version: SEALED_VOLUME_API, kind: SEALED_VOLUME, body: self };
        serde_saphyr::to_string(&document)
            .map_err(|_| Error::Crypto("a SealedVolume could not be written as YAML"))
    }

    /// Name of the Secret of one of its partitions, as generation 1 makes it (§5.7).
    #[must_use]
    pub fn secret_name(&self, partition: &Partition) -> String {
        match &partition.secret {
            Some(SecretRef { name, .. }) if !name.is_empty() => kube_name(name),
            _ => kube_name(&format!("{}-{}", self.metadata.name, partition.label)),
        }
    }
}

#[derive(Serialize)]
struct Document<'a> {
    #[serde(rename = "apiVersion")]
    api_version: &'static str,
    kind: &'static str,
    #[serde(flatten)]
    body: &'a SealedVolume,
}

impl Partition {
    /// Key of the passphrase in its Secret, as generation 1 makes it (§5.7).
    #[must_use]
    pub fn secret_key(&self) -> String {
        match &self.secret {
            Some(SecretRef { path, .. }) if !path.is_empty() => kube_name(path),
            _ => DEFAULT_KEY.to_owned(),
        }
    }
}

/// Generation 1's rule for names and keys: `_` becomes `-`, all is lower case, nothing else changes.
#[must_use]
pub fn kube_name(name: &str) -> String {
    name.replace('_', "-").to_lowercase()
}

/// A label without the `_LUKS` that newer installers add: `X` and `X_LUKS` are one partition (§11.2).
#[must_use]
pub fn plain_label(label: &str) -> &str {
    label.strip_suffix(LUKS_SUFFIX).filter(|plain| !plain.is_empty()).unwrap_or(label)
}

impl Secret {
    /// The Secret generation 1 makes of what a machine posted: no labels, two keys (§5.7).
    #[must_use]
    pub fn generated_by_tpm(name: &str, namespace: &str, key: &str, passphrase: &str) -> Self {
        let entry =
            |key: &str, value: &str| (key.to_owned(), Zeroizing::new(value.as_bytes().to_vec()));
        Self {
            metadata: Metadata {
                name: name.to_owned(),
                namespace: namespace.to_owned(),
                ..Metadata::default()
            },
            data: BTreeMap::from([
                entry(key, passphrase),
                entry(GENERATED_BY, v1::GENERATED_BY_TPM),
            ]),
        }
    }

    /// The manifest as a YAML document, ending with a newline: text as `stringData`, other bytes as `data`.
    #[must_use]
    pub fn to_yaml(&self) -> Zeroizing<String> {
        let room: usize =
            self.data.iter().map(|(key, value)| go_json::room(key) + 6 * value.len() + 16).sum();
        let mut out = Zeroizing::new(String::with_capacity(room + 2048));
        out.push_str("apiVersion: v1\nkind: Secret\nmetadata:\n");
        push_entry(&mut out, "  name", &self.metadata.name);
        if !self.metadata.namespace.is_empty() {
            push_entry(&mut out, "  namespace", &self.metadata.namespace);
        }
        push_map(&mut out, "  labels", &self.metadata.labels);
        push_map(&mut out, "  annotations", &self.metadata.annotations);
        out.push_str("type: Opaque\n");
        let text: Vec<(&String, &str)> =
            self.data.iter().filter_map(|(key, value)| Some((key, plain_text(value)?))).collect();
        if !text.is_empty() {
            out.push_str("stringData:\n");
        }
        for (key, value) in text {
            push_pair(&mut out, key, value);
        }
        let binary: Vec<_> =
            self.data.iter().filter(|(_, value)| plain_text(value).is_none()).collect();
        if !binary.is_empty() {
            out.push_str("data:\n");
        }
        for (key, value) in binary {
            push_pair(&mut out, key, &Zeroizing::new(STANDARD.encode(&**value)));
        }
        out
    }
}

/// Text that YAML can hold in double quotes: control characters beside line breaks and tabs stay base64.
fn plain_text(value: &[u8]) -> Option<&str> {
    let text = std::str::from_utf8(value).ok()?;
    (!text.chars().any(|c| c.is_control() && !matches!(c, '\n' | '\r' | '\t'))).then_some(text)
}

fn push_entry(out: &mut String, key: &str, value: &str) {
    out.push_str(key);
    out.push_str(": ");
    go_json::push_string(out, value); // a JSON string is a YAML string
    out.push('\n');
}

fn push_pair(out: &mut String, key: &str, value: &str) {
    out.push_str("  ");
    go_json::push_string(out, key);
    out.push_str(": ");
    go_json::push_string(out, value);
    out.push('\n');
}

fn push_map(out: &mut String, name: &str, map: &BTreeMap<String, String>) {
    if map.is_empty() {
        return;
    }
    out.push_str(name);
    out.push_str(":\n");
    for (key, value) in map {
        out.push_str("  ");
        push_pair(out, key, value);
    }
}

/// Reads all documents of a file. The first error ends it: half a file is not what an operator meant.
pub fn parse(text: &str) -> Result<Manifests> {
    if text.len() > MAX_FILE {
        return Err(Error::TooLong { what: "manifest file", limit: MAX_FILE, got: text.len() });
    }
    let mut manifests = Manifests::default();
    for document in documents(text.strip_prefix('\u{feff}').unwrap_or(text)) {
        read_document(&document, &mut manifests)?;
    }
    Ok(manifests)
}

/// A document and the number of lines before it.
struct Chunk<'a> {
    lines_before: u64,
    text: &'a str,
}

/// Splits at the document markers. A line that begins with `---` ends a document wherever it stands, even inside a
/// block or a quoted scalar (YAML 1.2.2 §9.1.2), so this needs no parser.
fn documents(text: &str) -> Vec<Chunk<'_>> {
    let mut chunks = Vec::new();
    let (mut start, mut start_line, mut at) = (0, 0, 0);
    for (number, line) in (0u64..).zip(text.split_inclusive('\n')) {
        let marker = line
            .strip_prefix("---")
            .is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\n', '\r']));
        if marker && at > start {
            chunks.push(Chunk {
                lines_before: start_line,
                text: text.get(start..at).unwrap_or_default(),
            });
            (start, start_line) = (at, number);
        }
        at += line.len();
    }
    chunks.push(Chunk { lines_before: start_line, text: text.get(start..).unwrap_or_default() });
    chunks.retain(|chunk| !chunk.text.lines().all(is_filler));
    chunks
}

/// Lines that hold no node: blank, comment, directive, bare markers.
fn is_filler(line: &str) -> bool {
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
enum Telling {
    /// The document holds no secret.
    Everything,
    /// Only where it is wrong: the message could repeat a passphrase.
    Place,
}

fn read<T: for<'de> Deserialize<'de>>(chunk: &Chunk<'_>, telling: Telling) -> Result<T> {
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
fn options() -> Options {
    serde_saphyr::options! {
        duplicate_keys: DuplicateKeyPolicy::Error,
        no_schema: true,
        with_snippet: false,
    }
}

/// A boolean that is written as one, not as text; `null` is false.
fn boolean<'de, D: Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    struct Boolean;

    impl Visitor<'_> for Boolean {
        type Value = bool;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("true or false without quotes")
        }

        fn visit_bool<E>(self, value: bool) -> Result<bool, E> {
            Ok(value)
        }

        fn visit_unit<E>(self) -> Result<bool, E> {
            Ok(false)
        }
    }
    deserializer.deserialize_any(Boolean)
}

/// `null` is the zero value, as in Kubernetes.
fn or_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(
    deserializer: D,
) -> Result<T, D::Error> {
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}
