//! Generation 1: `/getPass` and `/postPass` (`protocols/kcrypt.md` §5.3 to §5.7).

use latchkey_wire::{
    manifest::{GENERATED_BY, SealedVolume},
    pubhash::Pubhash,
    v1::{Payload, text},
};

use super::{Owner, Target, is_for, is_held_to_pcrs, owner, usable, value};
use crate::{
    matching::{self, Facts, Found},
    store::{ReadSecret, Snapshot},
};

/// Told to a machine whose volume is held to PCR values; it begins with what clients of generation 2 key on.
const PCRS_WANTED: &str = "PCR verification failed: this volume is held to PCR values, which generation 1 does not prove; ask /tpm-attestation, or let an operator reset them";

/// What happens with a request.
#[derive(Debug)]
pub(crate) struct Decision {
    /// Where it is about, as far as it was found.
    pub(crate) target: Option<Target>,
    pub(crate) outcome: Outcome,
}

#[derive(Debug)]
pub(crate) enum Outcome {
    /// `/getPass`: this is sent.
    Released(Payload),
    /// `/postPass`: a passphrase may come.
    MayEnrol,
    /// The client is told `answer`; the log says `why`.
    Refused { answer: String, why: String },
    /// Nothing is sent: trouble on our side.
    Failed { why: String },
}

impl Decision {
    fn refused(target: Option<Target>, answer: String, why: impl Into<String>) -> Self {
        Self { target, outcome: Outcome::Refused { answer, why: why.into() } }
    }

    fn failed(target: Option<Target>, why: impl Into<String>) -> Self {
        Self { target, outcome: Outcome::Failed { why: why.into() } }
    }
}

/// Whether, and what, `/getPass` releases.
pub(crate) fn get(snapshot: &Snapshot, pubhash: &Pubhash, facts: &Facts) -> Decision {
    let (found, target) = match admit(snapshot, pubhash, facts, text::no_volume) {
        Ok(admitted) => admitted,
        Err(decision) => return *decision,
    };
    let secret = match read_secret(snapshot, &found, &target) {
        ReadSecret::Found(secret) => secret,
        ReadSecret::Absent => {
            let answer = text::no_secret(pubhash, &target.label);
            return Decision::refused(Some(target), answer, "no secret yet");
        }
        ReadSecret::Untold(why) => {
            return Decision::failed(
                Some(target),
                format!("Secret {}: {why}", target_secret(&found)),
            );
        }
    };
    if let Owner::Another(other) = owner(secret, pubhash) {
        let why = format!("Secret is labelled for another machine ({other})");
        return Decision::refused(Some(target), text::no_volume(pubhash), why);
    }
    let by_default = found.partition.secret.as_ref().is_none_or(|secret| secret.name.is_empty());
    if by_default && !is_for(secret, &target.label) {
        let why = format!("Secret {} is labelled for another partition", target_secret(&found));
        return Decision::refused(Some(target), text::no_volume(pubhash), why);
    }
    let refuse = |why: String| {
        let answer = format!("secret {}/{}: {why}", target.namespace, target.secret);
        Decision::refused(Some(target.clone()), answer, why)
    };
    let Some(value) = value(secret, found.partition) else {
        return refuse(format!("it has no passphrase under the key {:?}", target.key));
    };
    match usable(value) {
        Ok(passphrase) => {
            let generated_by = secret
                .data
                .get(GENERATED_BY)
                .map(|value| String::from_utf8_lossy(value).into_owned());
            let payload = Payload {
                passphrase,
                error: String::new(),
                generated_by: generated_by.unwrap_or_default(),
            };
            Decision { target: Some(target), outcome: Outcome::Released(payload) }
        }
        Err(why) => refuse(why.to_owned()),
    }
}

/// Whether `/postPass` may read a passphrase from this machine.
pub(crate) fn post(snapshot: &Snapshot, pubhash: &Pubhash, facts: &Facts) -> Decision {
    match admit(snapshot, pubhash, facts, text::no_tpm_hash) {
        Ok((_, target)) => Decision { target: Some(target), outcome: Outcome::MayEnrol },
        Err(decision) => *decision,
    }
}

/// Finds the partition and checks what holds for both endpoints.
fn admit<'a>(
    snapshot: &'a Snapshot,
    pubhash: &Pubhash,
    facts: &Facts,
    unknown: fn(&Pubhash) -> String,
) -> Result<(Found<'a>, Target), Box<Decision>> {
    let volumes: Vec<&SealedVolume> = snapshot.volumes(pubhash);
    if let Some(volume) = volumes.iter().find(|volume| snapshot.is_conflicting(volume)) {
        let why =
            format!("SealedVolume {:?} is defined twice and differently", volume.metadata.name);
        return Err(Box::new(Decision::failed(None, why)));
    }
    let found = matching::find(&volumes, facts)
        .map_err(|why| Box::new(Decision::refused(None, unknown(pubhash), why.to_string())))?;
    let target = target(&found);
    if let Some(volume) = volumes.iter().find(|volume| volume.spec.quarantined) {
        let why = format!("quarantined by SealedVolume {:?}", volume.metadata.name);
        let answer = text::quarantined(&target.label);
        return Err(Box::new(Decision::refused(Some(target), answer, why)));
    }
    if let Some(volume) = volumes.iter().find(|volume| is_held_to_pcrs(volume)) {
        let why = format!("SealedVolume {:?} is held to PCR values", volume.metadata.name);
        return Err(Box::new(Decision::refused(Some(target), PCRS_WANTED.to_owned(), why)));
    }
    let by_default = found.partition.secret.as_ref().is_none_or(|secret| secret.name.is_empty());
    if by_default && snapshot.is_shared_by_default(&target.namespace, &target.secret) {
        let why = format!(
            "two partitions come to the default name {:?} for their Secret; give one a secret.name",
            target.secret
        );
        return Err(Box::new(Decision::refused(Some(target), unknown(pubhash), why)));
    }
    Ok((found, target))
}

fn target(found: &Found<'_>) -> Target {
    let (namespace, secret, key) = found.secret();
    Target {
        namespace: namespace.to_owned(),
        volume: found.volume.metadata.name.clone(),
        label: found.partition.label.clone(),
        secret,
        key,
    }
}

fn target_secret(found: &Found<'_>) -> String {
    let (namespace, secret, _) = found.secret();
    format!("{namespace}/{secret}")
}

/// The Secret by the name generation 1 makes, or else by the name exactly as the operator wrote it.
fn read_secret<'a>(snapshot: &'a Snapshot, found: &Found<'_>, target: &Target) -> ReadSecret<'a> {
    let read = snapshot.secret(&target.namespace, &target.secret);
    match (&read, found.partition.secret.as_ref().map(|secret| secret.name.as_str())) {
        (ReadSecret::Absent, Some(written)) if !written.is_empty() && written != target.secret => {
            snapshot.secret(&target.namespace, written)
        }
        _ => read,
    }
}
