//! Which partition a request is about (`protocols/kcrypt.md` §5.6, with the differences of §14).
//!
//! Upstream gives out the secret of the first partition of which *any* fact in the request is equal. Here:
//!
//! 1. Empty facts and `unknown` identify nothing. `X` and `X_LUKS` are one label. UUIDs are compared in any case.
//! 2. Label, partition UUID and device name each point at the partitions that have that value; a fact that points at none says
//!    nothing. If two facts point at different partitions, nothing is released: one of them would be the wrong one.
//!    The device name is not asked when label and UUID agree: kernel names move from boot to boot, on machines with several
//!    disks to another's.
//! 3. The label decides. A partition found without it (by UUID or name) must not have another label than the request, and
//!    one found by name alone not another UUID either: kernel names move from boot to boot.
//! 4. What is left must be one secret. If several volumes of the machine name different secrets for it, nothing is released.
//! 5. A quarantined volume locks out the machine, not just that volume's partitions.

use latchkey_wire::manifest::{Partition, SealedVolume, plain_label};

/// What ghw writes for a fact it does not have.
const UNKNOWN: &str = "unknown";

/// Longest fact taken, in bytes; a LUKS2 label has at most 47, a UUID 36, a GPT name 72.
const MAX_FACT: usize = 128;

/// What a request says about its partition.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Facts {
    pub(crate) label: Option<String>,
    pub(crate) uuid: Option<String>,
    pub(crate) name: Option<String>,
}

impl Facts {
    /// Facts as the headers give them.
    pub(crate) fn new(label: &str, uuid: &str, name: &str) -> Self {
        let known = |fact: &str| {
            let fact = fact.trim();
            let usable =
                !fact.is_empty() && !fact.eq_ignore_ascii_case(UNKNOWN) && fact.len() <= MAX_FACT;
            usable.then(|| fact.to_owned())
        };
        Self { label: known(label), uuid: known(uuid), name: known(name) }
    }
}

/// A partition of a machine, with the volume it is in.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Found<'a> {
    pub(crate) volume: &'a SealedVolume,
    pub(crate) partition: &'a Partition,
}

impl PartialEq for Found<'_> {
    /// Two are the same if they lead to the same secret.
    fn eq(&self, other: &Self) -> bool {
        self.secret() == other.secret()
    }
}

impl Found<'_> {
    /// Namespace, name and key of the secret.
    pub(crate) fn secret(&self) -> (&str, String, String) {
        (
            self.volume.metadata.namespace(),
            self.volume.secret_name(self.partition),
            self.partition.secret_key(),
        )
    }
}

/// Why no partition was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum NotFound {
    /// The machine has no volume.
    NoVolume,
    /// The request names its partition by nothing.
    NoFacts,
    /// None of the machine's partitions has any of the facts.
    NoPartition,
    /// The facts are about different partitions.
    Contradiction(&'static str),
    /// Volumes of the machine name different secrets for the partition.
    Ambiguous,
}

impl std::fmt::Display for NotFound {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NoVolume => f.write_str("no SealedVolume has this TPM hash"),
            Self::NoFacts => f.write_str("the request has neither label nor uuid nor name"),
            Self::NoPartition => {
                f.write_str("no partition of this machine has this label, uuid or name")
            }
            Self::Contradiction(what) => write!(f, "contradiction: {what}"),
            Self::Ambiguous => f.write_str(
                "several volumes of this machine name different secrets for this partition",
            ),
        }
    }
}

/// Finds the partition among all volumes of one machine.
pub(crate) fn find<'a>(volumes: &[&'a SealedVolume], facts: &Facts) -> Result<Found<'a>, NotFound> {
    if volumes.is_empty() {
        return Err(NotFound::NoVolume);
    }
    if *facts == Facts::default() {
        return Err(NotFound::NoFacts);
    }
    let all: Vec<Found<'a>> = volumes
        .iter()
        .flat_map(|volume| {
            volume.spec.partitions.iter().map(|partition| Found { volume, partition })
        })
        .collect();
    let tests: [fn(&Facts, &Partition) -> bool; 3] = [same_label, same_uuid, same_name];
    let mut left: Option<Vec<Found<'a>>> = None;
    for test in tests {
        let sure = |found: &Found<'a>| {
            same_label(facts, found.partition) && same_uuid(facts, found.partition)
        };
        if left.as_ref().is_some_and(|left| left.iter().all(sure)) {
            break;
        }
        let pointed_at = |found: &&Found<'a>| test(facts, found.partition);
        if !all.iter().any(|found| pointed_at(&found)) {
            continue;
        }
        let narrowed: Vec<Found<'a>> =
            left.as_ref().unwrap_or(&all).iter().filter(pointed_at).copied().collect();
        if narrowed.is_empty() {
            return Err(NotFound::Contradiction(
                "label, uuid and name point at different partitions",
            ));
        }
        left = Some(narrowed);
    }
    let left = left.ok_or(NotFound::NoPartition)?;
    for found in &left {
        contradiction(facts, found.partition)
            .map_or(Ok(()), |what| Err(NotFound::Contradiction(what)))?;
    }
    match left.as_slice() {
        [] => Err(NotFound::NoPartition),
        [first, others @ ..] if others.iter().all(|other| other == first) => Ok(*first),
        _ => Err(NotFound::Ambiguous),
    }
}

/// Whether a request has a label that no partition of the machine has.
pub(crate) fn is_new_label(volumes: &[&SealedVolume], facts: &Facts) -> bool {
    facts.label.is_some()
        && !volumes
            .iter()
            .flat_map(|volume| &volume.spec.partitions)
            .any(|partition| same_label(facts, partition))
}

fn same_label(facts: &Facts, partition: &Partition) -> bool {
    !partition.label.is_empty()
        && facts
            .label
            .as_deref()
            .is_some_and(|label| plain_label(label) == plain_label(&partition.label))
}

fn same_uuid(facts: &Facts, partition: &Partition) -> bool {
    facts.uuid.as_deref().is_some_and(|uuid| uuid.eq_ignore_ascii_case(&partition.uuid))
}

fn same_name(facts: &Facts, partition: &Partition) -> bool {
    facts.name.as_deref().is_some_and(|name| name == partition.device_name)
}

/// What the request and a partition found without its label say differently.
fn contradiction(facts: &Facts, partition: &Partition) -> Option<&'static str> {
    if same_label(facts, partition) {
        return None;
    }
    if facts.label.is_some() && !partition.label.is_empty() {
        return Some("the partition found by uuid or name has another label");
    }
    if !same_uuid(facts, partition) && facts.uuid.is_some() && !partition.uuid.is_empty() {
        return Some("the partition found by name has another uuid");
    }
    None
}

#[cfg(test)]
mod tests {
    use latchkey_wire::manifest::{Metadata, SecretRef};

    use super::*;

    fn partition(label: &str, uuid: &str, name: &str) -> Partition {
        Partition {
            label: label.to_owned(),
            uuid: uuid.to_owned(),
            device_name: name.to_owned(),
            secret: None,
        }
    }

    fn volume(name: &str, partitions: Vec<Partition>) -> SealedVolume {
        let mut volume = SealedVolume {
            metadata: Metadata { name: name.to_owned(), ..Metadata::default() },
            ..SealedVolume::default()
        };
        volume.spec.partitions = partitions;
        volume
    }

    #[test]
    fn a_request_finds_its_partition_or_none_but_never_another() {
        let volume = volume(
            "node",
            vec![
                partition("COS_PERSISTENT", "aaaa-1", "sda5"),
                partition("COS_OEM_LUKS", "AAAA-2", "sda2"),
                partition("DATA", "", ""),
                partition("", "aaaa-4", "sdb1"),
                partition("", "", "sdc1"),
                partition("unknown", "unknown", "unknown"),
            ],
        );
        let contradiction = |what| Err(NotFound::Contradiction(what));
        let (points, label, uuid) = (
            contradiction("label, uuid and name point at different partitions"),
            contradiction("the partition found by uuid or name has another label"),
            contradiction("the partition found by name has another uuid"),
        );
        for (facts, expected) in [
            // by each fact alone, and by all
            (["COS_PERSISTENT", "", ""], Ok(0)),
            (["", "aaaa-1", ""], Ok(0)),
            (["", "", "sda5"], Ok(0)),
            (["COS_PERSISTENT", "aaaa-1", "sda5"], Ok(0)),
            ([" COS_PERSISTENT ", "AAAA-1", "sda5"], Ok(0)),
            // X and X_LUKS
            (["COS_PERSISTENT_LUKS", "", ""], Ok(0)),
            (["COS_OEM", "", ""], Ok(1)),
            (["COS_OEM_LUKS", "aaaa-2", ""], Ok(1)),
            // facts that point nowhere do not matter beside a label that fits
            (["COS_PERSISTENT", "ffff-9", "nvme0n1p5"], Ok(0)),
            (["DATA", "ffff-9", "sdz1"], Ok(2)),
            // the kernel names of two disks have swapped
            (["COS_PERSISTENT", "aaaa-1", "sda2"], Ok(0)),
            // nothing known
            (["", "", ""], Err(NotFound::NoFacts)),
            (["unknown", "unknown", "unknown"], Err(NotFound::NoFacts)),
            (["Unknown", " ", ""], Err(NotFound::NoFacts)),
            (["OTHER", "ffff-9", "sdz1"], Err(NotFound::NoPartition)),
            (["cos_persistent", "", ""], Err(NotFound::NoPartition)),
            // facts about different partitions
            (["COS_PERSISTENT", "aaaa-2", ""], points.clone()),
            (["COS_PERSISTENT", "", "sda2"], points.clone()),
            (["", "aaaa-1", "sda2"], points.clone()),
            (["COS_OEM", "aaaa-1", "sda5"], points),
            // a disk was added and the names moved
            (["OTHER", "ffff-9", "sda5"], label.clone()),
            (["OTHER", "aaaa-1", ""], label),
            (["", "ffff-9", "sda5"], uuid),
            // partitions the operator named by less than a label
            (["OTHER", "aaaa-4", "sdz9"], Ok(3)),
            (["OTHER", "ffff-9", "sdc1"], Ok(4)),
        ] {
            let [label, uuid, name] = facts;
            let found = find(&[&volume], &Facts::new(label, uuid, name)).map(|found| {
                volume
                    .spec
                    .partitions
                    .iter()
                    .position(|partition| std::ptr::eq(partition, found.partition))
                    .unwrap()
            });
            assert_eq!(found, expected, "{facts:?}");
        }
        let long = "x".repeat(200);
        assert_eq!(Facts::new(&long, &long, &long), Facts::default());
    }

    #[test]
    fn several_volumes_of_a_machine_are_searched_and_must_agree() {
        let named = |name: &str| Some(SecretRef { name: name.to_owned(), path: String::new() });
        let first = volume("a", vec![Partition { secret: named("s"), ..partition("X", "", "") }]);
        let same = volume(
            "b",
            vec![
                Partition { secret: named("s"), ..partition("X", "", "") },
                partition("Y", "", ""),
            ],
        );
        let other = volume("c", vec![partition("X", "", "")]);
        let facts = Facts::new("X", "", "");
        assert!(find(&[], &facts).is_err_and(|why| why == NotFound::NoVolume));
        assert!(find(&[&first, &same], &facts).is_ok());
        assert!(
            find(&[&first, &same], &Facts::new("Y", "", "")).is_ok_and(|found| found
                .volume
                .metadata
                .name
                == "b")
        );
        assert!(find(&[&first, &other], &facts).is_err_and(|why| why == NotFound::Ambiguous));
        let elsewhere = SealedVolume {
            metadata: Metadata { namespace: "n".to_owned(), ..first.metadata.clone() },
            ..first.clone()
        };
        assert!(find(&[&first, &elsewhere], &facts).is_err_and(|why| why == NotFound::Ambiguous));
    }
}
