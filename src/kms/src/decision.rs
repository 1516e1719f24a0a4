//! What a machine that has proved who it is gets: a pure function of the store's snapshot, its TPM hash and its facts
//! (`protocols/kcrypt.md` §5.3 to §5.7).
//!
//! A refusal that an operator must hear about is told to the client in upstream's words. Trouble on our side (objects that
//! contradict each other, files that cannot be read) is not: the connection is closed without an error object, and the client
//! asks again.

use latchkey_wire::{
    manifest::{GENERATED_BY, SealedVolume, Secret},
    pubhash::Pubhash,
    v1::{Payload, text},
};
use zeroize::Zeroizing;

use crate::{
    matching::{self, Facts, Found},
    store::{ReadSecret, Snapshot},
};

/// Label that generation 2 puts on a Secret: the hash of the machine it is for, cut to what a label holds.
const TPM_HASH_LABEL: &str = "kcrypt.kairos.io/tpm-hash";
/// Digits of the hash that survive the cutting.
const TPM_HASH_DIGITS: usize = 54;

/// What happens with a request.
#[derive(Debug)]
pub(crate) struct Decision {
    /// Where it is about, as far as it was found.
    pub(crate) target: Option<Target>,
    pub(crate) outcome: Outcome,
}

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
    if let Some(other) = belongs_to_another(secret, pubhash) {
        let why = format!("Secret is labelled for another machine ({other})");
        return Decision::refused(Some(target), text::no_volume(pubhash), why);
    }
    match passphrase(secret, &found, &target) {
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
        Err(why) => {
            let answer = format!("secret {}/{}: {why}", target.namespace, target.secret);
            Decision::refused(Some(target), answer, why)
        }
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

fn belongs_to_another<'a>(secret: &'a Secret, pubhash: &Pubhash) -> Option<&'a str> {
    let owner = secret.metadata.labels.get(TPM_HASH_LABEL)?;
    let digits = pubhash.as_str().get(..TPM_HASH_DIGITS)?;
    (!owner.starts_with(digits)).then_some(owner.as_str())
}

/// The passphrase in a Secret, if it is one that survives the way to `cryptsetup` (§11.2).
fn passphrase(
    secret: &Secret,
    found: &Found<'_>,
    target: &Target,
) -> Result<Zeroizing<String>, String> {
    let written =
        found.partition.secret.as_ref().map(|secret| secret.path.as_str()).unwrap_or_default();
    let value = [target.key.as_str(), written]
        .iter()
        .find_map(|key| secret.data.get(*key))
        .filter(|value| !value.is_empty())
        .ok_or_else(|| format!("it has no passphrase under the key {:?}", target.key))?;
    let text = std::str::from_utf8(value)
        .map_err(|_| "its passphrase is not UTF-8 text, which JSON cannot carry".to_owned())?;
    if text.contains(['\r', '\n', '\0']) {
        return Err("its passphrase holds a line break or NUL, at which installers cut it off; write it without".to_owned());
    }
    Ok(Zeroizing::new(text.to_owned()))
}
