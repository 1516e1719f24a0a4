//! What a quote must fulfil to count (`protocols/kcrypt.md` §6.5), and the check.

use std::collections::{BTreeMap, BTreeSet};

use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use super::PcrQuote;
use crate::{
    Error, Result,
    attest::{ALG_SHA256, AkPublic, Attest, Attested},
};

/// PCRs below this are reset by a power cycle only; 16 to 23 can be reset by software.
const FIRST_RESETTABLE: u32 = 16;

/// What a quote must fulfil.
#[derive(Debug, Clone, Copy)]
pub struct Policy<'a> {
    /// The activation secret of the same exchange: the quote's qualifying data must equal it.
    pub nonce: &'a [u8; 32],
    /// Accept empty qualifying data, as clients before the nonce send. Such a quote may be an old one.
    pub allow_empty_nonce: bool,
    /// Indices a quote may contain. Resettable PCRs (16 and above) are never taken, even if named here.
    pub allowed: &'a [u32],
}

/// Verifies a quote and gives back the PCR values it proves.
///
/// `ak` comes from [`crate::attest::check_ak`] and its credential must have been activated; otherwise a quote proves nothing.
pub fn verify(
    ak: &AkPublic,
    quote: &PcrQuote,
    policy: &Policy<'_>,
) -> Result<BTreeMap<u32, [u8; 32]>> {
    let refuse = |reason: &str| Error::QuoteRefused(reason.to_owned());
    if quote.quote.is_empty() || quote.signature.is_empty() {
        return Err(refuse("empty quote or signature"));
    }
    ak.verify(&quote.quote, &quote.signature)
        .map_err(|_| refuse("signature is not RSASSA with SHA-256 by the AK"))?;
    let attest =
        Attest::parse(&quote.quote).map_err(|error| Error::QuoteRefused(error.to_string()))?;
    if !attest.made_by_tpm() {
        return Err(refuse("it was not produced by a TPM"));
    }
    let Attested::Quote { pcr_selection, pcr_digest } = &attest.attested else {
        return Err(refuse("not a quote attestation"));
    };
    check_nonce(&attest.extra_data, policy)?;

    let [selection] = pcr_selection.as_slice() else {
        return Err(refuse("it must have exactly one PCR selection"));
    };
    if selection.hash != ALG_SHA256 {
        return Err(refuse("its PCR bank must be SHA-256"));
    }
    let selected: BTreeSet<u32> = selection.indices().collect();
    if selected.is_empty() {
        return Err(refuse("it selects no PCR"));
    }
    if let Some(index) =
        selected.iter().find(|index| **index >= FIRST_RESETTABLE || !policy.allowed.contains(index))
    {
        return Err(Error::QuoteRefused(format!("PCR {index} must not be in it")));
    }
    if let Some(index) = quote.pcrs.keys().find(|index| !selected.contains(index)) {
        return Err(Error::QuoteRefused(format!(
            "PCR {index} was provided but not selected in the quote"
        )));
    }
    let mut digest = Sha256::new();
    let mut values = BTreeMap::new();
    for index in selected {
        let value = quote.pcrs.get(&index).ok_or_else(|| {
            Error::QuoteRefused(format!("PCR {index} was selected in the quote but not provided"))
        })?;
        let value: [u8; 32] = value.as_slice().try_into().map_err(|_| {
            Error::QuoteRefused(format!("the value of PCR {index} must have 32 bytes"))
        })?;
        digest.update(value);
        values.insert(index, value);
    }
    if digest.finalize().as_slice() != pcr_digest.as_slice() {
        return Err(refuse(
            "PCR digest mismatch: a PCR changed after the quote, or the values are not the quoted ones",
        ));
    }
    Ok(values)
}

fn check_nonce(extra_data: &[u8], policy: &Policy<'_>) -> Result<()> {
    if extra_data.is_empty() {
        return if policy.allow_empty_nonce {
            Ok(())
        } else {
            Err(Error::QuoteRefused("a nonce is required to verify the quote is fresh".to_owned()))
        };
    }
    if bool::from(extra_data.ct_eq(policy.nonce)) {
        return Ok(());
    }
    Err(Error::QuoteRefused(
        "quote was not produced for this attestation: qualifying data does not match the nonce"
            .to_owned(),
    ))
}
