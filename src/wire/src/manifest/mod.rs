//! The YAML manifests of kcrypt's key server (`protocols/kcrypt.md` §5.7, §7.1): `SealedVolume`
//! (`keyserver.kairos.io/v1alpha1`) and `v1/Secret`, as operators write them for Kubernetes.
//!
//! A file may hold several documents; documents of other kinds are passed over. As the Kubernetes API does, fields
//! that are not known are tolerated (and told, since a misspelt `quarantined` must not go unseen) and values of a
//! wrong type are errors. No error text repeats a value of a Secret.

mod edit;
mod read;
mod write;

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize, de::Visitor};
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

pub use self::{
    edit::{ObjectName, remove, replace_volume},
    read::parse,
};
use crate::{Result, pubhash::Pubhash, v1};

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
    #[serde(deserialize_with = "by_index", skip_serializing_if = "Option::is_none")]
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

    /// Name of the Secret of one of its partitions, as generation 1 makes it (§5.7).
    #[must_use]
    pub fn secret_name(&self, partition: &Partition) -> String {
        match &partition.secret {
            Some(SecretRef { name, .. }) if !name.is_empty() => kube_name(name),
            _ => kube_name(&format!("{}-{}", self.metadata.name, partition.label)),
        }
    }
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

/// Generation 2's rule for names and keys (`SafeKubeName`, §7.2), defects included: what is valid but for capitals stays as it
/// is, and `a_b` and `a.b` come to the same name.
#[must_use]
pub fn safe_kube_name(name: &str) -> String {
    let is_edge = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
    let bytes = name.as_bytes();
    if bytes.len() <= MAX_KUBE_NAME
        && is_edge(bytes.first())
        && is_edge(bytes.last())
        && bytes.iter().all(|byte| byte.is_ascii_alphanumeric() || *byte == b'-')
    {
        return name.to_owned();
    }
    let checksum: String =
        Sha256::digest(bytes).iter().take(4).map(|byte| format!("{byte:02x}")).collect();
    let mapped: String = name
        .chars()
        .map(|c| match c {
            'a'..='z' | '0'..='9' | '-' => c,
            'A'..='Z' => c.to_ascii_lowercase(),
            _ => '-',
        })
        .collect();
    let cleaned = mapped.trim_matches('-');
    if cleaned.is_empty() {
        return format!("kube-{checksum}");
    }
    match cleaned.get(..MAX_KUBE_NAME - 1 - checksum.len()) {
        Some(front) if cleaned.len() > MAX_KUBE_NAME => {
            format!("{}-{checksum}", front.strip_suffix('-').unwrap_or(front))
        }
        _ => cleaned.to_owned(),
    }
}

/// Longest name that [`safe_kube_name`] makes, in bytes (RFC 1123 label).
const MAX_KUBE_NAME: usize = 63;

/// The name generation 2 gives the volume of a machine it learns of: 32 bits of the TPM hash, so never what decides
/// whose volume it is.
#[must_use]
pub fn tofu_volume_name(pubhash: &Pubhash) -> String {
    format!("tofu-{}", pubhash.as_str().get(..8).unwrap_or_default())
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

/// Values by PCR index. As `kubectl` does, an index is taken without quotes too, and no value for an empty one.
fn by_index<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<BTreeMap<String, String>>, D::Error> {
    #[derive(PartialEq, Eq, PartialOrd, Ord)]
    struct Index(String);

    impl<'de> Deserialize<'de> for Index {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            deserializer.deserialize_any(IndexVisitor)
        }
    }

    struct IndexVisitor;

    impl Visitor<'_> for IndexVisitor {
        type Value = Index;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("the index of a PCR")
        }

        fn visit_str<E>(self, value: &str) -> Result<Index, E> {
            Ok(Index(value.to_owned()))
        }

        fn visit_u64<E>(self, value: u64) -> Result<Index, E> {
            Ok(Index(value.to_string()))
        }

        fn visit_i64<E>(self, value: i64) -> Result<Index, E> {
            Ok(Index(value.to_string()))
        }
    }

    let values = Option::<BTreeMap<Index, Option<String>>>::deserialize(deserializer)?;
    Ok(values.map(|values| {
        values.into_iter().map(|(index, value)| (index.0, value.unwrap_or_default())).collect()
    }))
}

/// `null` is the zero value, as in Kubernetes.
fn or_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(
    deserializer: D,
) -> Result<T, D::Error> {
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}
