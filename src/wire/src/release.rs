//! What a key server's last word means for a machine, in both generations (`protocols/kcrypt.md` §5.5, §6.7).
//!
//! The texts are the servers'; Go's clients key on the same substrings. What is not known here is taken for trouble on the
//! server's side, which passes: a machine is not given up because of an unknown text.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use thiserror::Error;
use zeroize::Zeroizing;

use crate::{Error, Result};

/// Sizes of the OAEP blocks of RSA-2048, -3072 and -4096, in bytes.
pub const OAEP_BLOCKS: [usize; 3] = [256, 384, 512];

/// What a server released.
#[derive(Clone, PartialEq, Eq)]
pub enum Release {
    /// The passphrase itself.
    Passphrase(Zeroizing<Vec<u8>>),
    /// An OAEP block that this machine's TPM key decrypts.
    Sealed(Vec<u8>),
}

impl Release {
    /// The OAEP block that a passphrase of generation 2 may be: a Go server of that generation hands out what a machine of
    /// generation 1 has sealed as if it were the passphrase, and says nothing of it. The TPM tells which it is.
    #[must_use]
    pub fn sealed_in_disguise(&self) -> Option<Vec<u8>> {
        match self {
            Self::Passphrase(text) => {
                sealed_block(text).ok().filter(|block| OAEP_BLOCKS.contains(&block.len()))
            }
            Self::Sealed(_) => None,
        }
    }
}

impl std::fmt::Debug for Release {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Passphrase(_) => f.write_str("Passphrase(redacted)"),
            Self::Sealed(block) => write!(f, "Sealed({} bytes)", block.len()),
        }
    }
}

/// The OAEP block in unpadded URL base64: how generation 1 writes it (§9.1).
pub(crate) fn sealed_block(text: &[u8]) -> Result<Vec<u8>> {
    URL_SAFE_NO_PAD.decode(text).map_err(|_| Error::Base64 { what: "TPM-encrypted passphrase" })
}

/// Why a server released nothing. Texts of the server are cut to [`MAX_REASON`] characters and hold no control characters.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Refusal {
    /// An operator has locked this machine out. Asking again is no use.
    #[error("the key server has this machine in quarantine ({0}); an operator must release it")]
    Quarantined(String),
    /// No volume of the server has this TPM hash and partition.
    #[error(
        "the key server does not know this machine or partition ({0}); an operator must add its TPM hash"
    )]
    UnknownMachine(String),
    /// The server holds another EK for this machine's TPM hash.
    #[error(
        "the key server knows another TPM under this machine's name ({0}); if the TPM or mainboard was replaced, an operator must enrol the machine anew"
    )]
    OtherTpm(String),
    /// A PCR is not what the server learned: firmware, Secure Boot state or kernel image have changed, or were tampered with.
    #[error(
        "the key server does not trust how this machine was started ({0}); if its firmware, Secure Boot keys or image were changed on purpose, an operator must reset its PCRs"
    )]
    BootState(String),
    /// The proof itself was not taken: secret, quote or attestation key.
    #[error("the key server does not accept this TPM's proof ({0})")]
    Proof(String),
    /// The values beside the quote are not the quoted ones: a PCR was extended in between. A new quote mends it.
    #[error("a PCR changed while it was being quoted ({0})")]
    PcrMoved(String),
    /// The volume is known, its Secret is not there yet: first enrolment may make one, unlocking may not.
    #[error("the key server has no secret for this volume yet ({0}); encrypt enrols it")]
    NoSecret(String),
    /// Neither passphrase nor error: the server's Secret exists and is empty. Enrolling cannot mend it (the Secret is never
    /// overwritten), and Go's client loops for ever here.
    #[error(
        "the key server's secret for this volume exists but is empty; an operator must delete or fill it"
    )]
    EmptySecret,
    /// Marked as encrypted by a TPM, but not what a TPM key can decrypt.
    #[error(
        "the key server's secret for this volume is damaged: it is not the base64 a machine sends"
    )]
    Malformed,
    /// Something else, most likely trouble on the server's side.
    #[error("the key server refused: {0}")]
    Other(String),
}

/// Most characters kept of a server's text.
pub const MAX_REASON: usize = 300;

impl Refusal {
    /// What a text of the server means.
    #[must_use]
    pub fn from_text(text: &str) -> Self {
        let told: String = text
            .chars()
            .take(MAX_REASON)
            .map(|c| if c.is_control() { '\u{fffd}' } else { c })
            .collect();
        KNOWN
            .iter()
            .find(|(known, _)| text.contains(known))
            .map_or_else(|| Self::Other(told.clone()), |(_, meaning)| meaning(told.clone()))
    }

    /// Whether the same question may have another answer a moment later, without anybody doing anything.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Other(_) | Self::PcrMoved(_))
    }
}

pub(crate) const NO_SECRET: &str = "No secret found for";
pub(crate) const NO_VOLUME: &str = "no volume found with data from request and hash:";
pub(crate) const QUARANTINED: &str = "quarantined:";
pub(crate) const TPM_QUARANTINED: &str = "TPM is quarantined";
pub(crate) const EK_MISMATCH: &str = "EK public key does not match enrolled key";
pub(crate) const PCR_FAILED: &str = "PCR verification failed";
pub(crate) const INVALID_SECRET: &str = "invalid secret";
pub(crate) const QUOTE_FAILED: &str = "PCR quote verification failed";
const DIGEST_MISMATCH: &str = "PCR digest mismatch";
const CHALLENGE_FAILED: &str = "generating challenge:";

type Meaning = fn(String) -> Refusal;

/// Substrings, and what they mean; the first that occurs counts.
const KNOWN: [(&str, Meaning); 11] = [
    (NO_SECRET, Refusal::NoSecret),
    (TPM_QUARANTINED, Refusal::Quarantined),
    (QUARANTINED, Refusal::Quarantined),
    (NO_VOLUME, Refusal::UnknownMachine),
    (EK_MISMATCH, Refusal::OtherTpm),
    (PCR_FAILED, Refusal::BootState),
    (DIGEST_MISMATCH, Refusal::PcrMoved),
    (QUOTE_FAILED, Refusal::Proof),
    (INVALID_SECRET, Refusal::Proof),
    (CHALLENGE_FAILED, Refusal::Proof),
    ("quarantined", Refusal::Quarantined),
];
