//! The challenge exchange with key servers: kcrypt protocol generations 1 and 2 (`protocols/kcrypt.md` §5, §6).
//!
//! What the TPM does is here, on the one thread it belongs to: the keys, and the answer to a challenge. Who is asked,
//! and when, is in [`race`]; what goes over one connection is in `talk`.

mod error;
pub mod race;
mod talk;

use latchkey_tpm::{Activation, AttestationKey, EndorsementKey, Tpm, TpmError};
use latchkey_wire::attest::AttestationParameters;
use latchkey_wire::credential::split_credential;
use latchkey_wire::pem;
use latchkey_wire::quote::PcrQuote;
use latchkey_wire::v1::{Challenge, ChallengeResponse, Token};
use latchkey_wire::v2::{ActivationSecret, Init, Proof};
use zeroize::Zeroizing;

pub use error::{ExchangeError, Stage};

/// A generation of the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Generation {
    V1,
    V2,
}

/// What identifies a partition to the server. An unknown fact is empty and not sent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Partition {
    pub label: String,
    pub name: String,
    pub uuid: String,
}

/// What a server is shown of this machine before it asks anything. No secret is in it.
#[derive(Clone, Debug)]
pub(crate) struct Papers {
    /// Generation 1: the `Authorization` header.
    authorization: String,
    /// Generation 2: the init message of a boot, and of an installation.
    release: String,
    enrol: String,
}

/// This machine before a key server: its keys, made once and used for every attempt of either generation. The
/// attestation keys that upstream's clients make differ between the generations by noDA, which no server looks at.
#[derive(Debug)]
pub struct Attested<'a> {
    tpm: &'a mut Tpm,
    ek: EndorsementKey,
    ak: AttestationKey,
    /// Made ahead for the next exchange.
    activation: Option<Activation>,
    /// What a quote is over.
    pcrs: Vec<u8>,
    papers: Papers,
}

impl<'a> Attested<'a> {
    /// Makes the attestation key. Needs no network, so it is done while that comes up.
    ///
    /// `pcrs` are quoted to a server of generation 2, which is asked not to learn them yet if `is_live`: an
    /// installer's are not the installed system's.
    ///
    /// # Errors
    /// What the TPM answered.
    pub fn new(
        tpm: &'a mut Tpm,
        ek: EndorsementKey,
        pcrs: &[u8],
        is_live: bool,
    ) -> Result<Self, TpmError> {
        let ak = tpm.attestation_key()?;
        let activation = Some(tpm.prepare_activation(&ek)?);
        let papers = Papers::new(&ek, ak.parameters(), is_live);
        Ok(Self { tpm, ek, ak, activation, pcrs: pcrs.to_vec(), papers })
    }

    /// The open TPM, for what else is wanted of it.
    pub fn tpm(&mut self) -> &mut Tpm {
        self.tpm
    }

    pub(crate) fn papers(&self) -> &Papers {
        &self.papers
    }

    /// The message that answers a challenge of `server`.
    pub(crate) fn answer(
        &mut self,
        server: &str,
        generation: Generation,
        challenge: &Challenge,
    ) -> Result<Zeroizing<String>, ExchangeError> {
        let parts = split_credential(&challenge.credential, &challenge.secret)
            .map_err(|error| ExchangeError::protocol(server, error))?;
        let activation = match self.activation.take() {
            Some(ready) => ready,
            None => self.tpm.prepare_activation(&self.ek)?,
        };
        let secret = self.tpm.activate_credential(
            &self.ek,
            &self.ak,
            activation,
            parts.id_object,
            parts.encrypted_secret,
        )?;
        match generation {
            Generation::V1 => Ok(ChallengeResponse { secret }.to_json()),
            Generation::V2 => {
                let pcr_quote = self.quote(&secret)?;
                Ok(Proof { secret: ActivationSecret(secret), pcr_quote }.to_json())
            }
        }
    }

    /// The activation secret is the nonce: servers that know of it see that the quote is of now (§6.4).
    fn quote(&mut self, nonce: &[u8]) -> Result<PcrQuote, TpmError> {
        let quote = self.tpm.quote(&self.ak, nonce, &self.pcrs)?;
        let pcrs = quote.pcrs.into_iter();
        Ok(PcrQuote {
            quote: quote.attest,
            signature: quote.signature,
            pcrs: pcrs.map(|(index, value)| (u32::from(index), value.to_vec())).collect(),
        })
    }
}

impl Papers {
    fn new(ek: &EndorsementKey, ak: &AttestationParameters, is_live: bool) -> Self {
        // The public key, never the certificate: the name is the same, and no server can stumble
        // over a manufacturer's encoding.
        let ek_pem = pem::encode(pem::PUBLIC_KEY, ek.spki());
        let init = |release_only| {
            Init {
                ek_spki: ek.spki().to_vec(),
                ak: ak.clone(),
                defer_pcr_enrollment: is_live,
                accepts_sealed: true,
                release_only,
            }
            .to_json()
        };
        Self {
            authorization: Token { ek_pem, ak: ak.clone() }.authorization_header(),
            release: init(true),
            enrol: init(false),
        }
    }
}
