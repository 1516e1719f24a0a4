//! Generation 2: the enrolment state machine (`protocols/kcrypt.md` §7.3, §7.4), with its rows a to e.
//!
//! It differs from upstream where that is a hazard:
//!
//! * **Deferral** is honoured wherever no PCR value is held yet, in row c too: upstream ignores it there and holds the machine
//!   to the values of its installer. The EK is learned at once, the PCRs at the first boot that does not defer.
//! * **A machine has one state**, however many volumes: a volume that is held to an EK or to PCRs speaks for all volumes of
//!   the machine, and one that is quarantined for all.
//! * **Names do not decide.** A Secret is reused only if it is labelled for this very machine and partition; if the name is
//!   taken, a longer one is made, and the volume says which. So is the name of a volume (`tofu-<8 digits>`, then 16, 32).
//!   Capitals in a label, which make upstream's names invalid for Kubernetes, are lowered.
//! * **The label decides** which partition a machine means; a partition without one cannot be enrolled. A label that no
//!   partition of the machine has is a new partition, whatever its kernel name was called before.
//! * Operators' PCR values are compared in any case, their EK as a key, however its PEM is wrapped.
//! * A machine gets 64 partitions by asking; an operator may write more.
//! * Nothing is enrolled while a file that cannot be read mentions the machine.

mod secrets;
mod state;

use std::collections::BTreeMap;

use latchkey_wire::{
    ek::RsaPublicKey,
    manifest::{
        DEFAULT_KEY, Metadata, Partition, SealedVolume, SealedVolumeSpec, Secret, SecretRef,
    },
    pubhash::Pubhash,
    v1::text as v1_text,
    v2::text,
};
use zeroize::Zeroizing;

pub(crate) use self::secrets::NewSecret;
use self::secrets::{Slot, lowered, volume_names};
use super::Target;
use crate::{
    matching::{self, Facts, Found, NotFound},
    store::Snapshot,
};

/// Most partitions that a machine can have by asking for them. Every label is another Secret, and labels are free.
const MOST_PARTITIONS: usize = 64;

/// What a machine has proved, and what it asks for.
#[derive(Debug)]
pub(crate) struct Machine {
    pub(crate) ek: RsaPublicKey,
    /// From its quote.
    pub(crate) pcrs: BTreeMap<u32, [u8; 32]>,
    pub(crate) facts: Facts,
    pub(crate) defers: bool,
    pub(crate) accepts_sealed: bool,
    pub(crate) release_only: bool,
}

/// What the decision takes from its surroundings.
#[derive(Debug)]
pub(crate) struct Surroundings<'a> {
    /// RFC 3339.
    pub(crate) now: &'a str,
    /// Of the objects that are made for machines nobody has written a volume for.
    pub(crate) namespace: &'a str,
}

/// What happens with a request.
#[derive(Debug)]
pub(crate) struct Decision {
    /// Where it is about, as far as it was found.
    pub(crate) target: Option<Target>,
    pub(crate) outcome: Outcome,
}

#[derive(Debug)]
pub(crate) enum Outcome {
    /// The passphrase is sent, once what has to be written is.
    Release(Box<Release>),
    /// The machine is told `answer`; the log says `why`.
    Refused { answer: String, why: String },
    /// Nothing is sent: trouble on our side.
    Failed { why: String },
}

/// A passphrase, and what has to be written first, in this order: the Secret, the volume.
#[derive(Debug)]
pub(crate) struct Release {
    pub(crate) row: Row,
    pub(crate) passphrase: Passphrase,
    pub(crate) volume: VolumeEffect,
}

impl Release {
    /// Whether there is anything to write.
    pub(crate) fn writes(&self) -> bool {
        matches!(self.passphrase, Passphrase::New(_)) || self.volume != VolumeEffect::Keep
    }
}

/// The rows of §7.4 that release something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Row {
    /// a: nobody knows the machine; it is trusted on its first use.
    Unknown,
    /// c: its volume was written by an operator and has learned nothing yet.
    Prepared,
    /// c′: the same, for a partition that the volume does not have.
    PreparedNewPartition,
    /// d: a further partition.
    NewPartition,
    /// e: an ordinary boot.
    Known,
}

impl Row {
    /// In words, for the log.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Unknown => "machine enrolled at its first use",
            Self::Prepared => "prepared volume enrolled",
            Self::PreparedNewPartition => "partition added to a prepared volume",
            Self::NewPartition => "partition added",
            Self::Known => "passphrase released",
        }
    }
}

/// Where the passphrase comes from.
pub(crate) enum Passphrase {
    Stored {
        text: Zeroizing<String>,
        /// Only the machine's TPM opens it.
        sealed: bool,
    },
    /// To be made, and stored in this Secret under its key.
    New(NewSecret),
}

impl std::fmt::Debug for Passphrase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Stored { sealed, .. } => write!(f, "Stored {{ sealed: {sealed} }}"),
            Self::New(secret) => write!(f, "{secret:?}"),
        }
    }
}

/// A volume as it was decided upon, and as it is to be.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Change {
    pub(crate) from: SealedVolume,
    pub(crate) to: SealedVolume,
}

/// What happens to the volume.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum VolumeEffect {
    Keep,
    Create(Box<SealedVolume>),
    Change(Box<Change>),
}

/// Why nothing is released.
enum No {
    Refused { answer: String, why: String },
    Failed(String),
}

impl No {
    fn refused(answer: impl std::fmt::Display, why: impl Into<String>) -> Self {
        Self::Refused { answer: text::failed(answer), why: why.into() }
    }
}

/// What a machine gets, and what is written for it.
pub(crate) fn decide(
    snapshot: &Snapshot,
    pubhash: &Pubhash,
    machine: &Machine,
    surroundings: &Surroundings<'_>,
) -> Decision {
    let mut case = Case { snapshot, pubhash, machine, surroundings, target: None };
    let outcome = match case.decide() {
        Ok(release) => Outcome::Release(Box::new(release)),
        Err(No::Refused { answer, why }) => Outcome::Refused { answer, why },
        Err(No::Failed(why)) => Outcome::Failed { why },
    };
    Decision { target: case.target, outcome }
}

struct Case<'a> {
    snapshot: &'a Snapshot,
    pubhash: &'a Pubhash,
    machine: &'a Machine,
    surroundings: &'a Surroundings<'a>,
    target: Option<Target>,
}

impl<'a> Case<'a> {
    fn decide(&mut self) -> Result<Release, No> {
        let volumes = self.snapshot.volumes(self.pubhash);
        if let Some(volume) = volumes.iter().find(|volume| self.snapshot.is_conflicting(volume)) {
            let name = &volume.metadata.name;
            return Err(No::Failed(format!(
                "SealedVolume {name:?} is defined twice and differently"
            )));
        }
        if volumes.is_empty() {
            return self.unknown();
        }
        if let Some(volume) = volumes.iter().find(|volume| volume.spec.quarantined) {
            let why = format!("quarantined by SealedVolume {:?}", volume.metadata.name);
            return Err(No::refused(text::QUARANTINED, why));
        }
        let found = self.find(&volumes)?;
        let pcrs = self.current_pcrs(&volumes);
        for volume in &volumes {
            self.check(volume, &pcrs)?;
        }
        match found {
            Some(found) if found.volume.spec.attestation.is_some() => self.known(found, &pcrs),
            Some(found) => self.prepared(found, &pcrs),
            None => {
                let learned = volumes.iter().find(|volume| volume.spec.attestation.is_some());
                match (learned, volumes.first()) {
                    (Some(volume), _) => self.new_partition(volume, Row::NewPartition),
                    (None, Some(volume)) => self.new_partition(volume, Row::PreparedNewPartition),
                    (None, None) => self.unknown(),
                }
            }
        }
    }

    /// The partition, or `None` for one that the machine does not have yet.
    fn find<'v>(&self, volumes: &[&'v SealedVolume]) -> Result<Option<Found<'v>>, No> {
        let facts = &self.machine.facts;
        match matching::find(volumes, facts) {
            Ok(found) => Ok(Some(found)),
            Err(NotFound::NoPartition) => Ok(None),
            Err(NotFound::Contradiction(_)) if matching::is_new_label(volumes, facts) => Ok(None),
            Err(why @ NotFound::Ambiguous) => Err(No::Failed(why.to_string())),
            Err(why) => Err(No::refused(
                format_args!("determining enrollment context: {why}"),
                why.to_string(),
            )),
        }
    }

    /// Row a.
    fn unknown(&mut self) -> Result<Release, No> {
        if self.snapshot.may_know(self.pubhash) {
            let why = "no SealedVolume has this TPM hash, but a file that cannot be read may; mend it first";
            return Err(No::Failed(why.to_owned()));
        }
        let label = self.new_label("initial enrollment: creating TOFU secret")?;
        let namespace = self.surroundings.namespace;
        let mut free = None;
        for name in volume_names(self.pubhash) {
            if self.snapshot.is_volume_name_taken(namespace, &name) {
                continue;
            }
            let secret = lowered(&format!("{name}-{label}"));
            match self.slot((namespace, &secret), &name, &label)? {
                Slot::Ours(secret) => return self.enrol(name, &label, Some(secret)),
                Slot::Free => free = free.or(Some(name)),
                Slot::Taken => {}
            }
        }
        self.must_not_only_release(text::unknown, "no SealedVolume has this TPM hash")?;
        match free {
            Some(name) => self.enrol(name, &label, None),
            None => Err(No::Failed("all names for the machine's volume are taken".to_owned())),
        }
    }

    fn enrol(
        &mut self,
        name: String,
        label: &str,
        secret: Option<&'a Secret>,
    ) -> Result<Release, No> {
        let namespace = self.surroundings.namespace;
        let secret_name = lowered(&format!("{name}-{label}"));
        let partition = self.partition(label, &secret_name);
        self.target(namespace, &name, &partition.label, &secret_name);
        let passphrase = self.passphrase(namespace, &secret_name, label, secret, &partition)?;
        let volume = SealedVolume {
            metadata: Metadata { name, namespace: namespace.to_owned(), ..Metadata::default() },
            spec: SealedVolumeSpec {
                tpm_hash: self.pubhash.to_string(),
                partitions: vec![partition],
                quarantined: false,
                attestation: Some(self.learned(self.current_pcrs(&[]))),
            },
        };
        Ok(Release {
            row: Row::Unknown,
            passphrase,
            volume: VolumeEffect::Create(Box::new(volume)),
        })
    }

    /// Rows c′ and d.
    fn new_partition(&mut self, volume: &SealedVolume, row: Row) -> Result<Release, No> {
        let label = self.new_label("adding new partition")?;
        if volume.spec.partitions.len() >= MOST_PARTITIONS {
            let why = format!("the machine has {MOST_PARTITIONS} partitions already");
            return Err(No::refused(format_args!("adding new partition: {why}"), why.as_str()));
        }
        let (name, secret) = self.free_name(volume, &label)?;
        if secret.is_none() {
            let why = "none of the machine's partitions is this one";
            self.must_not_only_release(text::unknown, why)?;
        }
        let partition = self.partition(&label, &name);
        let namespace = volume.metadata.namespace();
        self.target(namespace, &volume.metadata.name, &label, &name);
        let passphrase = self.passphrase(namespace, &name, &label, secret, &partition)?;
        let mut changed = volume.clone();
        changed.spec.partitions.push(partition);
        Ok(Release { row, passphrase, volume: change(volume, changed) })
    }

    /// Row c.
    fn prepared(
        &mut self,
        found: Found<'_>,
        pcrs: &BTreeMap<String, String>,
    ) -> Result<Release, No> {
        let Found { volume, partition } = found;
        let mut changed = volume.clone();
        let passphrase = match self.stored(found)? {
            Some(secret) => self.released(secret, partition)?,
            None if is_unnamed(partition) => {
                let label = if partition.label.is_empty() {
                    self.new_label("adding new partition")?
                } else {
                    partition.label.clone()
                };
                let (name, secret) = self.free_name(volume, &label)?;
                if secret.is_none() {
                    let why = "the partition has no Secret yet";
                    self.must_not_only_release(|hash| v1_text::no_secret(hash, &label), why)?;
                }
                let namespace = volume.metadata.namespace();
                self.target(namespace, &volume.metadata.name, &label, &name);
                let entry = changed.spec.partitions.iter_mut().find(|other| *other == partition);
                let reference = SecretRef { name: name.clone(), path: DEFAULT_KEY.to_owned() };
                if let Some(entry) = entry {
                    entry.secret = Some(reference);
                }
                self.passphrase(namespace, &name, &label, secret, partition)?
            }
            None => return Err(self.no_secret(found)),
        };
        changed.spec.attestation = Some(self.learned(pcrs.clone()));
        Ok(Release { row: Row::Prepared, passphrase, volume: change(volume, changed) })
    }

    /// Row e.
    fn known(&mut self, found: Found<'_>, pcrs: &BTreeMap<String, String>) -> Result<Release, No> {
        let secret = self.stored(found)?.ok_or_else(|| self.no_secret(found))?;
        let passphrase = self.released(secret, found.partition)?;
        let mut changed = found.volume.clone();
        self.learn(&mut changed, pcrs);
        Ok(Release { row: Row::Known, passphrase, volume: change(found.volume, changed) })
    }

    fn must_not_only_release(
        &self,
        answer: impl FnOnce(&Pubhash) -> String,
        why: &str,
    ) -> Result<(), No> {
        if self.machine.release_only {
            return Err(No::refused(
                answer(self.pubhash),
                format!("{why}, and the machine boots: no passphrase is made for it"),
            ));
        }
        Ok(())
    }

    /// The label of a partition that is to be enrolled.
    fn new_label(&self, doing: &str) -> Result<String, No> {
        let why = "the request has no partition label";
        let label = self.machine.facts.label.clone();
        label.ok_or_else(|| No::refused(format_args!("{doing}: {why}"), why))
    }

    fn partition(&self, label: &str, secret: &str) -> Partition {
        let Facts { uuid, name, .. } = &self.machine.facts;
        Partition {
            label: label.to_owned(),
            device_name: name.clone().unwrap_or_default(),
            uuid: uuid.clone().unwrap_or_default(),
            secret: Some(SecretRef { name: secret.to_owned(), path: DEFAULT_KEY.to_owned() }),
        }
    }

    fn target(&mut self, namespace: &str, volume: &str, label: &str, secret: &str) {
        self.target = Some(Target {
            namespace: namespace.to_owned(),
            volume: volume.to_owned(),
            label: label.to_owned(),
            secret: secret.to_owned(),
            key: DEFAULT_KEY.to_owned(),
        });
    }
}

fn is_unnamed(partition: &Partition) -> bool {
    partition.secret.as_ref().is_none_or(|secret| secret.name.is_empty() && secret.path.is_empty())
}

fn change(from: &SealedVolume, to: SealedVolume) -> VolumeEffect {
    if *from == to {
        VolumeEffect::Keep
    } else {
        VolumeEffect::Change(Box::new(Change { from: from.clone(), to }))
    }
}
