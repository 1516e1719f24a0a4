//! kcrypt protocol, generation 2: the messages of `/tpm-attestation` (`protocols/kcrypt.md` §6). Each is one text frame with a
//! newline at its end; readers take binary frames and messages without the newline too.
//!
//! # What generation 1 left behind
//!
//! A Secret of generation 1 may hold a passphrase that only the machine's TPM can decrypt (`generated_by: tpm`). A Go
//! server of generation 2 hands that ciphertext out as the passphrase, and the volume stays closed. Here a client that can
//! decrypt it says so ([`Init::accepts_sealed`], an extra key that Go's server ignores), and the server marks what it
//! sends ([`Answer::sealed`]). A client that does not say so gets an error that names the way out.

use base64::{Engine, engine::general_purpose::STANDARD};
use serde::de::MapAccess;
use zeroize::Zeroizing;

use crate::{
    Result,
    attest::AttestationParameters,
    go_json,
    quote::PcrQuote,
    release::{Refusal, Release, sealed_block},
    v1::{Challenge, GENERATED_BY_TPM},
};

/// Path of the endpoint.
pub const TPM_ATTESTATION: &str = "/tpm-attestation";

/// Client to server, first: the machine's EK and a fresh AK; about 1,600 bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Init {
    /// DER SubjectPublicKeyInfo of the EK, 294 bytes for RSA-2048.
    pub ek_spki: Vec<u8>,
    /// The AK.
    pub ak: AttestationParameters,
    /// Asks the server not to learn PCRs now: this is a live system, the installed one will start differently.
    pub defer_pcr_enrollment: bool,
    /// This client decrypts what it sealed for generation 1. Ours, not upstream's.
    pub accepts_sealed: bool,
    /// This is a boot, not an installation: no passphrase is to be made, as it would be another one than the disk's. Where
    /// Go's server, which ignores this key, makes a new Secret (§7.4, rows a, c′, d, and c without one), ours refuses: the
    /// machine or partition is unknown ([`text::unknown`]), or has no Secret yet ([`crate::v1::text::no_secret`]). A Secret
    /// that is labelled for this machine and partition is released even without its volume, which an operator has taken away
    /// so that the machine enrols anew. PCRs are learned all the same. Ours, not upstream's.
    pub release_only: bool,
}

impl Init {
    /// As Go writes it, with a newline; flags that are false are left out.
    #[must_use]
    pub fn to_json(&self) -> String {
        format!(
            "{{\"ek_public\":\"{}\",\"ak_params\":{}{}{}{}}}\n",
            STANDARD.encode(&self.ek_spki),
            self.ak.to_json(),
            flag("defer_pcr_enrollment", self.defer_pcr_enrollment),
            flag("accepts_sealed", self.accepts_sealed),
            flag("release_only", self.release_only),
        )
    }

    /// Reads the message of a client.
    pub fn from_json(message: &[u8]) -> Result<Self> {
        go_json::parse("attestation init", message)
    }
}

fn flag(key: &str, is_set: bool) -> String {
    if is_set { format!(",\"{key}\":true") } else { String::new() }
}

impl go_json::GoObject for Init {
    fn take<'de, A: MapAccess<'de>>(&mut self, key: &str, map: &mut A) -> Result<bool, A::Error> {
        match key {
            "ek_public" => self.ek_spki = go_json::bytes(map)?,
            "ak_params" => self.ak = go_json::object(map)?,
            "defer_pcr_enrollment" => self.defer_pcr_enrollment = go_json::boolean(map)?,
            "accepts_sealed" => self.accepts_sealed = go_json::boolean(map)?,
            "release_only" => self.release_only = go_json::boolean(map)?,
            _ => return Ok(false),
        }
        Ok(true)
    }
}

/// Client to server, second: what TPM2_ActivateCredential returned, and a quote of the PCRs over it.
#[derive(Debug, Clone, Default)]
pub struct Proof {
    /// The activation secret, 32 bytes if it is right.
    pub secret: ActivationSecret,
    /// The quote; its qualifying data is the activation secret (§6.4).
    pub pcr_quote: PcrQuote,
}

/// Bytes that are wiped, and not shown.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct ActivationSecret(pub Zeroizing<Vec<u8>>);

impl std::fmt::Debug for ActivationSecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ActivationSecret({} bytes)", self.0.len())
    }
}

impl Proof {
    /// As Go writes it, with a newline.
    #[must_use]
    pub fn to_json(&self) -> Zeroizing<String> {
        let encoded = Zeroizing::new(STANDARD.encode(&*self.secret.0));
        let quote = self.pcr_quote.to_json();
        let mut out = Zeroizing::new(String::with_capacity(encoded.len() + quote.len() + 32));
        out.push_str(r#"{"secret":""#);
        out.push_str(&encoded);
        out.push_str(r#"","pcr_quote":"#);
        out.push_str(&quote);
        out.push_str("}\n");
        out
    }

    /// Reads the message of a client.
    pub fn from_json(message: &[u8]) -> Result<Self> {
        go_json::parse("attestation proof", message)
    }
}

impl Proof {
    /// Reads only the secret of a message whose quote cannot be read.
    pub fn secret_from_json(message: &[u8]) -> Result<ActivationSecret> {
        Ok(go_json::parse::<SecretOfProof>("attestation proof", message)?.0)
    }
}

#[derive(Default)]
struct SecretOfProof(ActivationSecret);

impl go_json::GoObject for SecretOfProof {
    fn take<'de, A: MapAccess<'de>>(&mut self, key: &str, map: &mut A) -> Result<bool, A::Error> {
        match key {
            "secret" => self.0 = ActivationSecret(Zeroizing::new(go_json::bytes(map)?)),
            _ => return Ok(false),
        }
        Ok(true)
    }
}

impl go_json::GoObject for Proof {
    fn take<'de, A: MapAccess<'de>>(&mut self, key: &str, map: &mut A) -> Result<bool, A::Error> {
        match key {
            "secret" => self.secret = ActivationSecret(Zeroizing::new(go_json::bytes(map)?)),
            "pcr_quote" => self.pcr_quote = go_json::object(map)?,
            _ => return Ok(false),
        }
        Ok(true)
    }
}

/// Server to client, first: `{"challenge":{"Credential":…,"Secret":…}}`, as Go writes it, with a newline.
#[must_use]
pub fn challenge_to_json(challenge: &Challenge) -> String {
    format!(
        "{{\"challenge\":{{\"Credential\":\"{}\",\"Secret\":\"{}\"}}}}\n",
        STANDARD.encode(&challenge.credential),
        STANDARD.encode(&challenge.secret)
    )
}

/// Server to client: a challenge or a passphrase, whichever is due, or an error in the place of either.
///
/// Go's client looks for the error only at the end and takes one that comes early for an empty challenge.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Answer {
    /// First message.
    pub challenge: Option<Challenge>,
    /// Last message: bytes of the LUKS passphrase, not to be decoded once more (§6.2).
    pub passphrase: Zeroizing<Vec<u8>>,
    /// Whether the passphrase is text that the machine's TPM key decrypts.
    pub sealed: bool,
    /// Why there is none.
    pub error: String,
}

impl Answer {
    /// A passphrase.
    #[must_use]
    pub fn passphrase(passphrase: Zeroizing<Vec<u8>>) -> Self {
        Self { passphrase, ..Self::default() }
    }

    /// What a machine of generation 1 has sealed, for a client that [accepts](Init::accepts_sealed) it.
    #[must_use]
    pub fn sealed(text: Zeroizing<Vec<u8>>) -> Self {
        Self { passphrase: text, sealed: true, ..Self::default() }
    }

    /// A refusal.
    #[must_use]
    pub fn refusal(error: impl Into<String>) -> Self {
        Self { error: error.into(), ..Self::default() }
    }

    /// The last message as Go writes it, with a newline; empty members are left out.
    #[must_use]
    pub fn to_json(&self) -> Zeroizing<String> {
        let encoded = Zeroizing::new(STANDARD.encode(&*self.passphrase));
        let room = encoded.len() + go_json::room(&self.error) + 64;
        let mut out = Zeroizing::new(String::with_capacity(room));
        out.push('{');
        if !encoded.is_empty() {
            out.push_str(r#""passphrase":""#);
            out.push_str(&encoded);
            out.push('"');
        }
        if !self.error.is_empty() {
            if out.len() > 1 {
                out.push(',');
            }
            out.push_str(r#""error":"#);
            go_json::push_string(&mut out, &self.error);
        }
        if self.sealed {
            if out.len() > 1 {
                out.push(',');
            }
            out.push_str(&format!(r#""generated_by":"{GENERATED_BY_TPM}""#));
        }
        out.push_str("}\n");
        out
    }

    /// Reads any message of a server.
    pub fn from_json(message: &[u8]) -> Result<Self> {
        go_json::parse("answer of the key server", message)
    }

    /// The first message as a client is to take it.
    ///
    /// # Errors
    /// The server's refusal; [`Refusal::Other`] if there is neither challenge nor error.
    pub fn into_challenge(self) -> Result<Challenge, Refusal> {
        if !self.error.is_empty() {
            return Err(Refusal::from_text(&self.error));
        }
        self.challenge.ok_or_else(|| Refusal::Other("neither a challenge nor an error".into()))
    }

    /// The last message as a client is to take it.
    ///
    /// # Errors
    /// The server's refusal; [`Refusal::EmptySecret`] if there is neither passphrase nor error.
    pub fn classify(self) -> Result<Release, Refusal> {
        if !self.error.is_empty() {
            return Err(Refusal::from_text(&self.error));
        }
        if self.passphrase.is_empty() {
            return Err(Refusal::EmptySecret);
        }
        if self.sealed {
            return sealed_block(&self.passphrase)
                .map(Release::Sealed)
                .map_err(|_| Refusal::Malformed);
        }
        Ok(Release::Passphrase(self.passphrase))
    }
}

impl std::fmt::Debug for Answer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Answer")
            .field("challenge", &self.challenge)
            .field("passphrase", &format_args!("{} bytes", self.passphrase.len()))
            .field("sealed", &self.sealed)
            .field("error", &self.error)
            .finish()
    }
}

impl go_json::GoObject for Answer {
    fn take<'de, A: MapAccess<'de>>(&mut self, key: &str, map: &mut A) -> Result<bool, A::Error> {
        match key {
            "challenge" => self.challenge = Some(go_json::object(map)?),
            "passphrase" => self.passphrase = Zeroizing::new(go_json::bytes(map)?),
            "error" => self.error = go_json::text(map)?,
            "generated_by" => self.sealed = go_json::text(map)? == GENERATED_BY_TPM,
            _ => return Ok(false),
        }
        Ok(true)
    }
}

/// The server's texts (§6.7). Clients key on substrings of them, and Go's takes each of them for final.
///
/// The values a PCR should have stay out of them: upstream tells them to whoever has proved to own some EK.
pub mod text {
    use std::fmt::Display;

    use crate::release;

    /// The init could not be read.
    #[must_use]
    pub fn init_unreadable(why: impl Display) -> String {
        format!("WebSocket read: reading attestation init: {why}")
    }

    /// EK or AK were not taken.
    #[must_use]
    pub fn challenge_not_made(why: impl Display) -> String {
        format!("Challenge generation: generating challenge: {why}")
    }

    /// The proof could not be read.
    #[must_use]
    pub fn proof_unreadable(why: impl Display) -> String {
        format!("Proof read: reading proof: {why}")
    }

    /// Whatever fails once the proof is there; `why` is one of the texts below, or what [`crate::quote::verify`] says.
    #[must_use]
    pub fn failed(why: impl Display) -> String {
        format!("Attestation verification failed: {why}")
    }

    /// The activation secret is wrong.
    pub const INVALID_SECRET: &str = release::INVALID_SECRET;
    /// Locked out by an operator.
    pub const QUARANTINED: &str = release::TPM_QUARANTINED;

    /// The volume is held to another EK.
    #[must_use]
    pub fn ek_mismatch() -> String {
        format!(
            "attestation verification failed: EK verification failed: {} - potential TPM impersonation",
            release::EK_MISMATCH
        )
    }

    /// A PCR is not what was learned.
    #[must_use]
    pub fn pcr_changed(index: &str) -> String {
        format!(
            "attestation verification failed: {}: PCR{index} changed - boot state verification failed",
            release::PCR_FAILED
        )
    }

    /// A PCR that the volume is held to is not in the quote.
    #[must_use]
    pub fn pcr_not_provided(index: &str) -> String {
        format!(
            "attestation verification failed: {}: PCR{index} mismatch: not provided in current values",
            release::PCR_FAILED
        )
    }

    /// Nobody we know, and [`super::Init::release_only`] forbids to make a volume, partition or Secret.
    #[must_use]
    pub fn unknown(pubhash: &crate::pubhash::Pubhash) -> String {
        format!("{} {pubhash}", release::NO_VOLUME)
    }

    /// The Secret that the volume names is not there.
    #[must_use]
    pub fn no_secret(why: impl Display) -> String {
        format!("retrieving secret: {why}")
    }

    /// The Secret has nothing under the key.
    #[must_use]
    pub fn no_passphrase(key: &str) -> String {
        format!("passphrase not found in secret at key: {key}")
    }
}
