//! What differs between two versions of a volume, as fields to be written: the smallest ones first.

use std::collections::BTreeMap;

use serde::Serialize;

use super::super::{Attestation, Partition, SealedVolume, SealedVolumeSpec};

/// How small the fields are that are exchanged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Grain {
    /// Fields of `spec`.
    Coarse,
    /// Fields of `attestation`, entries of `partitions`.
    Medium,
    /// Single PCRs.
    Fine,
}

impl Grain {
    pub(super) const ALL: [Self; 3] = [Self::Fine, Self::Medium, Self::Coarse];
}

/// A field of a mapping with its new value.
pub(super) struct Change {
    /// The keys that lead to the mapping.
    pub(super) path: &'static [&'static str],
    pub(super) key: String,
    /// The field; or, if it [appends](Self::appends), the new entries of its list. Empty if it is to go.
    pub(super) yaml: String,
    pub(super) appends: bool,
}

impl Change {
    /// `key: value`, or no field for no value.
    fn set(
        path: &'static [&'static str],
        key: &str,
        value: Option<&impl Serialize>,
    ) -> Option<Self> {
        let yaml = match value {
            Some(value) => serde_saphyr::to_string(&BTreeMap::from([(key, value)])).ok()?,
            None => String::new(),
        };
        Some(Self { path, key: key.to_owned(), yaml, appends: false })
    }
}

const SPEC: &[&str] = &["spec"];
const ATTESTATION: &[&str] = &["spec", "attestation"];
const PCRS: &[&str] = &["spec", "attestation", "pcrValues", "pcrs"];

/// The fields that differ; `None` if one cannot be written.
pub(super) fn changes(old: &SealedVolume, new: &SealedVolume, grain: Grain) -> Option<Vec<Change>> {
    let (old, new): (&SealedVolumeSpec, &SealedVolumeSpec) = (&old.spec, &new.spec);
    let mut changes = Vec::new();
    if old.tpm_hash != new.tpm_hash {
        changes.push(Change::set(SPEC, "TPMHash", Some(&new.tpm_hash))?);
    }
    if old.partitions != new.partitions {
        changes.push(partitions(&old.partitions, &new.partitions, grain)?);
    }
    if old.quarantined != new.quarantined {
        changes.push(Change::set(SPEC, "quarantined", Some(&new.quarantined))?);
    }
    match (&old.attestation, &new.attestation) {
        (Some(old), Some(new)) if grain >= Grain::Medium => {
            attestation(&mut changes, old, new, grain)?;
        }
        (old, new) if old != new => {
            changes.push(Change::set(SPEC, "attestation", new.as_ref())?);
        }
        _ => {}
    }
    Some(changes)
}

fn partitions(old: &[Partition], new: &[Partition], grain: Grain) -> Option<Change> {
    match new.strip_prefix(old) {
        Some(added) if grain >= Grain::Medium && !old.is_empty() => {
            let yaml = serde_saphyr::to_string(&added).ok()?;
            Some(Change { path: SPEC, key: "partitions".to_owned(), yaml, appends: true })
        }
        _ => Change::set(SPEC, "partitions", Some(&new)),
    }
}

fn attestation(
    changes: &mut Vec<Change>,
    old: &Attestation,
    new: &Attestation,
    grain: Grain,
) -> Option<()> {
    for (key, old, new) in [
        ("ekPublicKey", &old.ek_public_key, &new.ek_public_key),
        ("enrolledAt", &old.enrolled_at, &new.enrolled_at),
        ("lastVerifiedAt", &old.last_verified_at, &new.last_verified_at),
    ] {
        if old != new {
            changes.push(Change::set(ATTESTATION, key, new.as_ref())?);
        }
    }
    let (old, new) = (&old.pcr_values, &new.pcr_values);
    let values = |values: &Option<super::super::PcrValues>| {
        values.as_ref().and_then(|values| values.pcrs.clone())
    };
    match (values(old), values(new)) {
        (Some(old), Some(new)) if grain == Grain::Fine => {
            for index in old.keys().chain(new.keys().filter(|index| !old.contains_key(*index))) {
                if old.get(index) != new.get(index) {
                    changes.push(Change::set(PCRS, index, new.get(index))?);
                }
            }
        }
        _ if old != new => changes.push(Change::set(ATTESTATION, "pcrValues", new.as_ref())?),
        _ => {}
    }
    Some(())
}
