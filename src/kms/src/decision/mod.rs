//! What a machine that has proved who it is gets: pure functions of the store's snapshot and of what the machine has proved,
//! one for each generation ([`v1`], [`v2`]), from the same objects.
//!
//! A refusal that an operator must hear about is told to the client in upstream's words. Trouble on our side (objects that
//! contradict each other, files that cannot be read) is not: the connection is closed without an error object, and the client
//! asks again.
//!
//! # Two generations, one store
//!
//! * A volume that is held to PCR values is closed to generation 1, which proves none: a tampered system would only have to
//!   ask the older endpoint.
//! * A Secret that a machine has sealed with its TPM (`generated_by: tpm`) goes to clients that say they open it
//!   ([`latchkey_wire::v2::Init::accepts_sealed`]), and to generation 1 as ever. Others are told why not, and nothing is
//!   learned of them, so that generation 1 goes on as before.

pub(crate) mod v1;
pub(crate) mod v2;

use latchkey_wire::{
    manifest::{self, DEFAULT_KEY, GENERATED_BY, Partition, SealedVolume, Secret},
    pubhash::Pubhash,
    v1::GENERATED_BY_TPM,
};
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

/// Label of a Secret of generation 2: the hash of the machine it is for, as [`manifest::safe_kube_name`] cuts it. As an
/// annotation, where there is room, the whole hash.
pub(crate) const TPM_HASH: &str = "kcrypt.kairos.io/tpm-hash";
/// Label (and, as it is, annotation) of a Secret of generation 2: the label of its partition.
pub(crate) const PARTITION: &str = "kcrypt.kairos.io/partition";

/// Volume, partition and secret, by name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) namespace: String,
    pub(crate) volume: String,
    /// The partition's label in the volume.
    pub(crate) label: String,
    /// Name of the Secret.
    pub(crate) secret: String,
    /// Key in the Secret.
    pub(crate) key: String,
}

/// Whom a Secret says it is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owner<'a> {
    /// It does not say, as those of operators and of generation 1.
    Untold,
    This,
    Another(&'a str),
}

/// Whether a Secret is labelled for this machine: by the whole hash where it is given, or else by the 54 digits and the
/// checksum of the whole that a label holds.
fn owner<'a>(secret: &'a Secret, pubhash: &Pubhash) -> Owner<'a> {
    let metadata = &secret.metadata;
    let cut = manifest::safe_kube_name(pubhash.as_str());
    for (found, wanted) in [
        (metadata.annotations.get(TPM_HASH), pubhash.as_str()),
        (metadata.labels.get(TPM_HASH), cut.as_str()),
    ] {
        match found {
            Some(found) if found == wanted => return Owner::This,
            Some(other) => return Owner::Another(other),
            None => {}
        }
    }
    Owner::Untold
}

/// Whether a Secret that is labelled for this machine is for this partition of it.
fn is_for(secret: &Secret, label: &str) -> bool {
    let plain = manifest::plain_label(label);
    let metadata = &secret.metadata;
    match (metadata.annotations.get(PARTITION), metadata.labels.get(PARTITION)) {
        (Some(told), _) => manifest::plain_label(told) == plain,
        (None, Some(told)) => manifest::plain_label(told) == plain || *told == label_value(label),
        (None, None) => true,
    }
}

/// A value that Kubernetes takes for a label: as it is if it can be.
fn label_value(label: &str) -> String {
    let edge = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
    let valid = label.len() <= 63
        && edge(label.as_bytes().first())
        && edge(label.as_bytes().last())
        && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
    if valid { label.to_owned() } else { manifest::safe_kube_name(label) }
}

/// Whether a PCR value is set that a machine must have.
fn is_held_to_pcrs(volume: &SealedVolume) -> bool {
    stored_pcrs(volume).any(|(_, value)| !value.is_empty())
}

/// The PCR values of a volume, by index; empty ones are to be learned.
fn stored_pcrs(volume: &SealedVolume) -> impl Iterator<Item = (&str, &str)> {
    let values = volume.spec.attestation.as_ref().and_then(|known| known.pcr_values.as_ref());
    values
        .and_then(|values| values.pcrs.as_ref())
        .into_iter()
        .flatten()
        .map(|(index, value)| (index.as_str(), value.trim()))
}

/// The value under a partition's key: as it is written, or as either generation writes it.
fn value<'a>(secret: &'a Secret, partition: &Partition) -> Option<&'a [u8]> {
    let written = match partition.secret.as_ref().map(|secret| secret.path.as_str()) {
        Some(path) if !path.is_empty() => path,
        _ => DEFAULT_KEY,
    };
    [manifest::kube_name(written), written.to_owned(), manifest::safe_kube_name(written)]
        .iter()
        .find_map(|key| secret.data.get(key))
        .map(|value| value.as_slice())
        .filter(|value| !value.is_empty())
}

/// A passphrase that survives the way to `cryptsetup` (§11.2), or why it does not.
fn usable(value: &[u8]) -> Result<Zeroizing<String>, &'static str> {
    let text = std::str::from_utf8(value)
        .map_err(|_| "its passphrase is not UTF-8 text, which JSON cannot carry")?;
    if text.contains(['\r', '\n', '\0']) {
        return Err(
            "its passphrase holds a line break or NUL, at which installers cut it off; write it without",
        );
    }
    Ok(Zeroizing::new(text.to_owned()))
}

/// Whether a machine has sealed this for itself.
fn is_sealed(secret: &Secret) -> bool {
    secret
        .data
        .get(GENERATED_BY)
        .is_some_and(|value| value.as_slice() == GENERATED_BY_TPM.as_bytes())
}

/// Compares what a stranger shows with what is stored.
fn same(shown: &[u8], stored: &[u8]) -> bool {
    shown.ct_eq(stored).into()
}
