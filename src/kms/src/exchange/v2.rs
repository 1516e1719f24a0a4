//! `/tpm-attestation`: init, challenge, proof, response (`protocols/kcrypt.md` §6). Text frames that end with a newline.
//!
//! What goes wrong before the challenge is told in the place of the challenge, as upstream does. Trouble on our side closes
//! the connection without a word: Go's client takes every error it is told after its proof for final, and asks again only
//! then. The values that PCRs should have are in the log alone.

use std::{sync::Arc, time::SystemTime};

use base64::{Engine, engine::general_purpose::STANDARD};
use latchkey_wire::{
    attest::{AkPublic, check_ak},
    credential::make_credential,
    ek::RsaPublicKey,
    pubhash::Pubhash,
    quote,
    v1::Challenge,
    v2::{Answer, Init, Proof, challenge_to_json, text},
};
use subtle::ConstantTimeEq;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_tungstenite::tungstenite::{Message, Utf8Bytes};
use zeroize::Zeroizing;

use super::{Bytes, Concluded, Failure, Peer, Settings, Wiped};
use crate::{
    decision::{
        Target,
        v2::{self, Decision, Machine, Outcome, Passphrase, Release, Surroundings, VolumeEffect},
    },
    matching::Facts,
    report::{self, Ended, Ending},
    store::{Change, CreateError, EditError, Store},
    time,
    visit::Visit,
};

/// Runs the exchange, to who it was and what came of it.
pub(super) async fn attest<S>(
    peer: &mut Peer<S>,
    facts: &Facts,
    visit: &Visit,
    store: &Arc<Store>,
    settings: &Settings,
) -> (Option<Pubhash>, Concluded)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let proved = match prove(peer, visit, settings).await {
        Ok(proved) => proved,
        Err(Unproved::Silent(failure)) => return (None, failure.before_proof()),
        Err(Unproved::Told(pubhash, told)) => {
            let result = match pubhash {
                Some(_) => Ended::Refused,
                None => Ended::Unauthenticated,
            };
            let ending = Ending::new(result, told.reason, told.why.clone());
            return (pubhash, (None, refuse(peer, told.answer, ending).await));
        }
    };
    let pubhash = proved.ek.pubhash();
    let machine = Machine {
        ek: proved.ek,
        pcrs: proved.pcrs,
        facts: facts.clone(),
        defers: proved.init.defer_pcr_enrollment,
        accepts_sealed: proved.init.accepts_sealed,
        release_only: proved.init.release_only,
    };
    let concluded = conclude(peer, store, settings, &pubhash, machine).await;
    (Some(pubhash), concluded)
}

/// A peer that has proved to be the TPM it names, in the state it says.
struct Proved {
    init: Init,
    ek: RsaPublicKey,
    pcrs: std::collections::BTreeMap<u32, [u8; 32]>,
}

/// What a peer is told that has not.
struct Told {
    answer: String,
    reason: &'static str,
    why: String,
}

enum Unproved {
    /// Nothing: it is gone, or the trouble is ours.
    Silent(Failure),
    /// And who it was, if the activation secret proved that much.
    Told(Option<Pubhash>, Told),
}

impl From<Failure> for Unproved {
    fn from(failure: Failure) -> Self {
        Self::Silent(failure)
    }
}

fn told(answer: String, reason: &'static str) -> Unproved {
    Unproved::Told(None, Told { why: answer.clone(), answer, reason })
}

async fn prove<S>(
    peer: &mut Peer<S>,
    visit: &Visit,
    settings: &Settings,
) -> Result<Proved, Unproved>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let message = peer.receive("send its attestation init").await?;
    let init = Init::from_json(&message)
        .map_err(|error| told(text::init_unreadable(error), "malformed"))?;
    let ek = RsaPublicKey::from_spki(&init.ek_spki).map_err(|error| {
        told(text::challenge_not_made(format_args!("parse EK SPKI: {error}")), "malformed")
    })?;
    let pubhash = ek.pubhash();
    visit.claims(&pubhash).map_err(Failure::from)?;
    let (ak, challenge, secret) = challenge(&ek, &init)?;
    peer.send_text(challenge_to_json(&challenge)).await?;

    let message = peer.receive("send its proof").await?;
    let proof = Proof::from_json(&message);
    let shown = match &proof {
        Ok(proof) => proof.secret.clone(),
        Err(error) => Proof::secret_from_json(&message)
            .map_err(|_| told(text::proof_unreadable(error), "malformed"))?,
    };
    if !bool::from(shown.0.ct_eq(&*secret)) {
        return Err(told(text::failed(text::INVALID_SECRET), "proof"));
    }
    visit.proved(&pubhash).map_err(Failure::from)?;
    let refused = |answer: String| {
        let why = answer.clone();
        Unproved::Told(Some(pubhash.clone()), Told { answer, reason: "quote", why })
    };
    let proof = proof
        .map_err(|error| refused(text::failed(format_args!("unmarshaling PCR quote: {error}"))))?;
    let policy = quote::Policy {
        nonce: &secret,
        allow_empty_nonce: settings.allow_empty_nonce,
        allowed: &settings.pcrs.iter().copied().collect::<Vec<_>>(),
    };
    let pcrs = quote::verify(&ak, &proof.pcr_quote, &policy)
        .map_err(|error| refused(text::failed(error)))?;
    Ok(Proved { init, ek, pcrs })
}

/// The checked AK, the challenge that binds it to the EK, and the secret in it.
fn challenge(
    ek: &RsaPublicKey,
    init: &Init,
) -> Result<(AkPublic, Challenge, Zeroizing<[u8; 32]>), Unproved> {
    let refused = |error| told(text::challenge_not_made(error), "proof");
    let ak = check_ak(&init.ak).map_err(refused)?;
    let (mut secret, mut seed) = (Zeroizing::new([0; 32]), Zeroizing::new([0; 16]));
    getrandom::fill(&mut *secret).map_err(Failure::Random)?;
    getrandom::fill(&mut *seed).map_err(Failure::Random)?;
    let challenge = make_credential(ek, &ak.name, &secret, &seed).map_err(refused)?;
    Ok((ak, challenge, secret))
}

/// Decides, writes what is to be written, and answers.
async fn conclude<S>(
    peer: &mut Peer<S>,
    store: &Arc<Store>,
    settings: &Settings,
    pubhash: &Pubhash,
    machine: Machine,
) -> Concluded
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let now = time::rfc3339(SystemTime::now());
    let surroundings = Surroundings { now: &now, namespace: &settings.namespace };
    let turn = store.turn_of(pubhash).await;
    let decision = store.read(|snapshot| v2::decide(snapshot, pubhash, &machine, &surroundings));
    let done = match decision.outcome {
        Outcome::Release(release) if !release.writes() => {
            Done::of_stored(decision.target, *release)
        }
        Outcome::Release(_) => {
            let (writer, hash) = (store.clone(), pubhash.clone());
            let namespace = settings.namespace.clone();
            let _turn = store.turn().await;
            let written = tokio::task::spawn_blocking(move || {
                let surroundings = Surroundings { now: &now, namespace: &namespace };
                decide_and_write(&writer, &hash, &machine, &surroundings)
            });
            written.await.unwrap_or_else(|error| Done::failed(None, "internal", error.to_string()))
        }
        Outcome::Refused { answer, why } => {
            Done { target: decision.target, end: End::Refused { answer, why } }
        }
        Outcome::Failed { why } => Done::failed(decision.target, "store", why),
    };
    drop(turn);
    let ending = match done.end {
        End::Released { answer, reason, why } => match peer.send_answer(&answer).await {
            Ok(()) => Ending::new(Ended::Granted, reason, why),
            Err(failure) => failure.ending(),
        },
        End::Refused { answer, why } => {
            let ending = Ending::new(Ended::Refused, report::class(&answer), why);
            refuse(peer, answer, ending).await
        }
        End::Failed(ending) => ending,
    };
    (done.target, ending)
}

/// What was decided and, by now, written.
struct Done {
    target: Option<Target>,
    end: End,
}

enum End {
    Released { answer: Answer, reason: &'static str, why: String },
    Refused { answer: String, why: String },
    Failed(Ending),
}

impl Done {
    fn failed(target: Option<Target>, reason: &'static str, why: impl Into<String>) -> Self {
        Self { target, end: End::Failed(Ending::new(Ended::Failed, reason, why)) }
    }

    fn released(target: Option<Target>, text: &str, sealed: bool, why: &str) -> Self {
        let text = Zeroizing::new(text.as_bytes().to_vec());
        let (answer, reason) = if sealed {
            (Answer::sealed(text), "released-sealed")
        } else {
            (Answer::passphrase(text), "released")
        };
        Self { target, end: End::Released { answer, reason, why: why.to_owned() } }
    }

    /// A release that needs nothing written.
    fn of_stored(target: Option<Target>, release: Release) -> Self {
        match release.passphrase {
            Passphrase::Stored { text, sealed } => {
                Self::released(target, &text, sealed, release.row.as_str())
            }
            Passphrase::New(_) => Self::failed(target, "internal", "a new Secret was not written"),
        }
    }
}

/// Decides once more, with everything that was written meanwhile and nobody else writing, and writes.
fn decide_and_write(
    store: &Store,
    pubhash: &Pubhash,
    machine: &Machine,
    surroundings: &Surroundings<'_>,
) -> Done {
    let change = match store.change() {
        Ok(change) => change,
        Err(error) => return Done::failed(None, "store", error.to_string()),
    };
    let Decision { target, outcome } =
        change.read(|snapshot| v2::decide(snapshot, pubhash, machine, surroundings));
    match outcome {
        Outcome::Release(release) => {
            let row = release.row.as_str();
            match write(store, change, *release) {
                Ok((text, sealed)) => Done::released(target, &text, sealed, row),
                Err(error) => Done::failed(target, "store", format!("{row}: {error}")),
            }
        }
        Outcome::Refused { answer, why } => Done { target, end: End::Refused { answer, why } },
        Outcome::Failed { why } => Done::failed(target, "store", why),
    }
}

/// First the Secret, then the volume: what a crash leaves between them is found and used by the next request.
fn write(
    store: &Store,
    mut change: Change<'_>,
    release: Release,
) -> Result<(Zeroizing<String>, bool), CreateError> {
    let (text, sealed) = match release.passphrase {
        Passphrase::Stored { text, sealed } => (text, sealed),
        Passphrase::New(secret) => {
            let text = new_passphrase().map_err(EditError::Random)?;
            let secret = secret.with(&text);
            if let VolumeEffect::Create(volume) = &release.volume {
                let prepared = change.prepare(&secret, volume)?;
                drop(change);
                store.write(&prepared)?;
                return Ok((text, false));
            }
            change.create_secret(&secret)?;
            (text, false)
        }
    };
    match release.volume {
        VolumeEffect::Keep => {}
        VolumeEffect::Create(volume) => change.create_volume(&volume)?,
        VolumeEffect::Change(made) => change.replace_volume(&made.from, made.to)?,
    }
    Ok((text, sealed))
}

/// 32 random bytes as 44 characters of base64.
fn new_passphrase() -> Result<Zeroizing<String>, getrandom::Error> {
    let mut bytes = Zeroizing::new([0; 32]);
    getrandom::fill(&mut *bytes)?;
    Ok(Zeroizing::new(STANDARD.encode(*bytes)))
}

/// Tells the peer why not.
async fn refuse<S>(peer: &mut Peer<S>, answer: String, mut ending: Ending) -> Ending
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    if let Err(failure) = peer.send_answer(&Answer::refusal(answer)).await {
        ending.why = format!("{}; the answer did not arrive: {failure}", ending.why);
    }
    ending
}

impl<S: AsyncRead + AsyncWrite + Unpin> Peer<S> {
    async fn send_answer(&mut self, answer: &Answer) -> Result<(), Failure> {
        let json = Zeroizing::new(answer.to_json().as_bytes().to_vec());
        let text = Utf8Bytes::try_from(Bytes::from_owner(Wiped(json)));
        // What came from a String is UTF-8.
        self.send_message(text.map_or_else(|_| Message::Close(None), Message::Text)).await
    }

    async fn send_text(&mut self, json: String) -> Result<(), Failure> {
        self.send_message(Message::text(json)).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_passphrase_is_44_characters_and_another_each_time() {
        let (one, other) = (new_passphrase().unwrap(), new_passphrase().unwrap());
        assert_eq!(one.len(), 44);
        assert_eq!(STANDARD.decode(&*one).unwrap().len(), 32);
        assert_ne!(one, other);
    }
}
