//! Volumes as text and as JSON. No passphrase is read here, only whether there is one.

use std::{collections::BTreeMap, fmt::Write as _, path::Path};

use latchkey_wire::manifest::{GENERATED_BY, Partition, SealedVolume};
use serde::Serialize;

use super::Name;
use crate::store::{ReadSecret, Snapshot, secret_names};

/// Digits of a TPM hash in the table.
const SHORT: usize = 16;

/// A volume, for operators.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Shown {
    namespace: String,
    name: String,
    file: String,
    tpm_hash: String,
    quarantined: bool,
    /// What keeps it from being used.
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<&'static str>,
    partitions: Vec<ShownPartition>,
    #[serde(skip_serializing_if = "Option::is_none")]
    attestation: Option<ShownAttestation>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct ShownPartition {
    label: String,
    device_name: String,
    uuid: String,
    secret: String,
    secret_key: String,
    /// `operator`, `machine` (sealed by its TPM), `server`, `none`, or why that is not known.
    passphrase: &'static str,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct ShownAttestation {
    ek_known: bool,
    pcrs: BTreeMap<String, String>,
    enrolled_at: String,
    last_verified_at: String,
}

/// All volumes, of one namespace if that is wanted.
pub(super) fn all(snapshot: &Snapshot, namespace: Option<&str>) -> Vec<Shown> {
    let mut all: Vec<Shown> = snapshot
        .all_volumes()
        .filter(|(_, volume)| namespace.is_none_or(|only| only == volume.metadata.namespace()))
        .map(|(path, volume)| shown(snapshot, path, volume))
        .collect();
    all.sort_by(|a, b| (&a.namespace, &a.name, &a.file).cmp(&(&b.namespace, &b.name, &b.file)));
    all
}

/// These volumes.
pub(super) fn some(snapshot: &Snapshot, names: &[Name]) -> Vec<Shown> {
    let mut all = all(snapshot, None);
    all.retain(|shown| {
        names.iter().any(|(space, name)| *space == shown.namespace && *name == shown.name)
    });
    all
}

fn shown(snapshot: &Snapshot, path: &Path, volume: &SealedVolume) -> Shown {
    let problem = if snapshot.is_conflicting(volume) {
        Some("defined twice and differently: not used")
    } else if volume.pubhash().is_err() {
        Some("TPMHash is not 64 hexadecimal digits: fits no machine")
    } else {
        None
    };
    Shown {
        namespace: volume.metadata.namespace().to_owned(),
        name: volume.metadata.name.clone(),
        file: path.display().to_string(),
        tpm_hash: volume.spec.tpm_hash.clone(),
        quarantined: volume.spec.quarantined,
        problem,
        partitions: volume
            .spec
            .partitions
            .iter()
            .map(|partition| shown_partition(snapshot, volume, partition))
            .collect(),
        attestation: volume.spec.attestation.as_ref().map(|attestation| ShownAttestation {
            ek_known: attestation.ek_public_key.as_ref().is_some_and(|ek| !ek.is_empty()),
            pcrs: attestation
                .pcr_values
                .as_ref()
                .and_then(|values| values.pcrs.clone())
                .unwrap_or_default(),
            enrolled_at: attestation.enrolled_at.clone().unwrap_or_default(),
            last_verified_at: attestation.last_verified_at.clone().unwrap_or_default(),
        }),
    }
}

fn shown_partition(
    snapshot: &Snapshot,
    volume: &SealedVolume,
    partition: &Partition,
) -> ShownPartition {
    let (mut secret, mut passphrase) = (volume.secret_name(partition), "none");
    for name in secret_names(volume, partition) {
        match snapshot.secret(volume.metadata.namespace(), &name) {
            ReadSecret::Absent => continue,
            ReadSecret::Untold(why) => passphrase = why,
            ReadSecret::Found(found) if found.data.contains_key(GENERATED_BY) => {
                passphrase = "machine";
            }
            ReadSecret::Found(found) if !found.metadata.labels.is_empty() => passphrase = "server",
            ReadSecret::Found(_) => passphrase = "operator",
        }
        secret = name;
    }
    ShownPartition {
        label: partition.label.clone(),
        device_name: partition.device_name.clone(),
        uuid: partition.uuid.clone(),
        secret,
        secret_key: partition.secret_key(),
        passphrase,
    }
}

/// For programs.
pub(super) fn json(all: &[Shown]) -> String {
    // Strings and numbers of our own: there is nothing that could not be written.
    serde_json::to_string_pretty(all).unwrap_or_default() + "\n"
}

/// One line per volume.
pub(super) fn table(all: &[Shown]) -> String {
    let mut rows =
        vec![["VOLUME", "TPM HASH", "STATE", "PARTITIONS", "LAST VERIFIED"].map(str::to_owned)];
    for shown in all {
        let attestation = shown.attestation.as_ref();
        rows.push([
            quoted(&format!("{}/{}", shown.namespace, shown.name)),
            quoted(&shown.tpm_hash.chars().take(SHORT).collect::<String>()),
            state(shown).to_owned(),
            quoted(&labels(shown).join(",")),
            quoted(attestation.map_or("-", |attestation| or_dash(&attestation.last_verified_at))),
        ]);
    }
    let mut widths = [0; 5];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for row in &rows {
        let cells: Vec<String> =
            row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        let _ = writeln!(text, "{}", cells.join("  ").trim_end());
    }
    text
}

fn labels(shown: &Shown) -> Vec<&str> {
    shown.partitions.iter().map(|partition| or_dash(&partition.label)).collect()
}

fn state(shown: &Shown) -> &'static str {
    match (shown.problem, shown.quarantined) {
        (Some(_), _) => "unusable",
        (None, true) => "quarantined",
        (None, false) => "ok",
    }
}

/// Everything of each volume.
pub(super) fn details(all: &[Shown]) -> String {
    let mut text = String::new();
    for (number, shown) in all.iter().enumerate() {
        if number > 0 {
            text.push('\n');
        }
        let mut line = |name: &str, value: &str| {
            let _ = writeln!(text, "{name:16}{}", quoted(value));
        };
        line("volume", &format!("{}/{}", shown.namespace, shown.name));
        line("file", &shown.file);
        line("tpm hash", &shown.tpm_hash);
        line("state", shown.problem.unwrap_or(state(shown)));
        for partition in &shown.partitions {
            line("partition", or_dash(&partition.label));
            line("  device name", or_dash(&partition.device_name));
            line("  uuid", or_dash(&partition.uuid));
            line("  secret", &format!("{} ({})", partition.secret, partition.secret_key));
            line("  passphrase", partition.passphrase);
        }
        if let Some(attestation) = &shown.attestation {
            line("ek", if attestation.ek_known { "known" } else { "learned at the next boot" });
            for (index, value) in &attestation.pcrs {
                let value = if value.is_empty() { "learned at the next boot" } else { value };
                line(&format!("pcr {index}"), value);
            }
            line("enrolled", or_dash(&attestation.enrolled_at));
            line("last verified", or_dash(&attestation.last_verified_at));
        }
    }
    text
}

fn or_dash(text: &str) -> &str {
    if text.is_empty() { "-" } else { text }
}

/// What machines and operators wrote, harmless at a terminal.
fn quoted(text: &str) -> String {
    text.chars()
        .flat_map(
            |char| if char.is_control() { char.escape_default().collect() } else { vec![char] },
        )
        .collect()
}
