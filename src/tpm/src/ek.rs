//! The RSA-2048 endorsement key, and with it the machine's name: the pubhash.
//! TCG EK Credential Profile 2.5 §2.2.1.5.1; `protocols/kcrypt.md` §1.

use latchkey_wire::ek::certificate_public_key;
use latchkey_wire::pubhash::{Pubhash, rsa_spki};
use sha2::{Digest, Sha256};
use tss_esapi::handles::KeyHandle;
use tss_esapi::interface_types::resource_handles::Hierarchy as Seed;

use crate::nv::ReadAs;
use crate::primary::Loaded;
use crate::{Tpm, TpmError, handle, template};

/// An EK nonce: copied over the start of the template's `unique` where the index exists.
const NV_EK_NONCE: u32 = 0x01c0_0003;
const RH_ENDORSEMENT: u32 = 0x4000_000b;
const MODULUS: usize = 256;

/// The endorsement key, loaded.
#[derive(Clone, Debug)]
pub struct EndorsementKey {
    pub(crate) key: KeyHandle,
    spki: Vec<u8>,
    pubhash: Pubhash,
}

impl EndorsementKey {
    /// DER SubjectPublicKeyInfo, 294 bytes.
    #[must_use]
    pub fn spki(&self) -> &[u8] {
        &self.spki
    }

    /// The machine's name: SHA-256 of the SPKI.
    #[must_use]
    pub fn pubhash(&self) -> &Pubhash {
        &self.pubhash
    }

    fn new(key: KeyHandle, modulus: &[u8]) -> Self {
        let spki = rsa_spki(modulus, 65537);
        let pubhash = Pubhash::of_spki(&spki);
        Self { key, spki, pubhash }
    }
}

/// The EK certificate of the TPM's maker.
pub(crate) struct CertifiedKey {
    /// Of its key, or why that is of no use.
    pub(crate) modulus: Result<Vec<u8>, String>,
    pub(crate) size: usize,
}

impl Tpm {
    /// Finds the endorsement key, or makes it and persists it at [`handle::EK`].
    ///
    /// The key that upstream names is that of the certificate in NV, or without one the key of the
    /// default template. What is at the persistent handle is believed only if its public area says
    /// that it is this key; something else there stays, and a transient key is used.
    ///
    /// # Errors
    /// [`TpmError::AuthSet`] with an endorsement or owner password, else what the TPM answered.
    pub fn endorsement_key(&mut self) -> Result<EndorsementKey, TpmError> {
        let certified = self.certified_modulus();
        let found = self.persistent(handle::EK)?;
        if let Some(loaded) = &found
            && let Some(modulus) = recognize(loaded, certified.as_deref())
        {
            return Ok(EndorsementKey::new(loaded.key, modulus));
        }
        let created = self.create_endorsement_key()?;
        let modulus = modulus_of(&created.public)?;
        if certified.as_deref().is_some_and(|certified| certified != modulus) {
            log::warn!(
                "the EK certificate in NV 0x{:08x} is for another key than the TPM makes; using the TPM's key, with pubhash {}",
                handle::NV_EK_CERTIFICATE,
                Pubhash::of_spki(&rsa_spki(modulus, 65537))
            );
        }
        let key = if found.is_none() {
            self.persist(created.key, handle::EK)?
        } else {
            log::warn!(
                "persistent handle 0x{:08x} is not the endorsement key; using a transient one",
                handle::EK
            );
            created.key
        };
        Ok(EndorsementKey::new(key, modulus))
    }

    /// The modulus in the EK certificate. Every failure only means that there is no certificate to
    /// go by, as upstream has it; the reason is kept for `--debug`.
    fn certified_modulus(&mut self) -> Option<Vec<u8>> {
        let certified =
            self.certified_key().inspect_err(|error| log::debug!("no EK certificate: {error}"));
        let modulus = certified.ok()?.modulus;
        modulus.inspect_err(|why| log::debug!("the EK certificate cannot be used: {why}")).ok()
    }

    /// What is in the NV index of the EK certificate.
    pub(crate) fn certified_key(&mut self) -> Result<CertifiedKey, TpmError> {
        let index = handle::NV_EK_CERTIFICATE;
        let certificate = match self.nv_read(index, ReadAs::Index) {
            Err(TpmError::Response { .. }) => self.nv_read(index, ReadAs::Owner),
            other => other,
        }?;
        let modulus = match certificate_public_key(&certificate) {
            Ok((modulus, 65537)) if modulus.len() == MODULUS => Ok(modulus),
            Ok(_) => Err("it is not for an RSA-2048 key with exponent 65537".into()),
            Err(error) => Err(error.to_string()),
        };
        Ok(CertifiedKey { modulus, size: certificate.len() })
    }

    pub(crate) fn create_endorsement_key(&mut self) -> Result<Loaded, TpmError> {
        let mut template = template::EK;
        match self.nv_read(NV_EK_NONCE, ReadAs::Owner) {
            Ok(nonce) => {
                let unique = template.len() - MODULUS;
                for (byte, nonce) in template.iter_mut().skip(unique).zip(nonce.iter()) {
                    *byte = *nonce;
                }
            }
            Err(error) => log::debug!("no EK nonce: {error}"),
        }
        self.create_primary(Seed::Endorsement, &template, "CreatePrimary of the EK")
    }
}

/// The modulus of `loaded` if it is the endorsement key: made by the EK template, and certified, or
/// without a certificate at least a primary key of the endorsement hierarchy.
pub(crate) fn recognize<'a>(loaded: &'a Loaded, certified: Option<&[u8]>) -> Option<&'a [u8]> {
    if !loaded.public.starts_with(template::head(&template::EK)) {
        return None;
    }
    let modulus = modulus_of(&loaded.public).ok()?;
    let genuine = match certified {
        Some(certified) => certified == modulus,
        None => loaded.qualified_name == qualified_name_under(RH_ENDORSEMENT, &loaded.public),
    };
    genuine.then_some(modulus)
}

/// Part 1 §16: QN = nameAlg ‖ H(QN of the parent ‖ Name), and a hierarchy's QN is its handle.
pub(crate) fn qualified_name_under(hierarchy: u32, public: &[u8]) -> Vec<u8> {
    let name = [&[0x00, 0x0b][..], &Sha256::digest(public)].concat();
    let digest = Sha256::digest([&hierarchy.to_be_bytes()[..], &name].concat());
    [&[0x00, 0x0b][..], &digest].concat()
}

/// The modulus at the end of an RSA-2048 TPMT_PUBLIC.
pub(crate) fn modulus_of(public: &[u8]) -> Result<&[u8], TpmError> {
    match public.split_at_checked(public.len().saturating_sub(MODULUS)) {
        Some((head, modulus)) if modulus.len() == MODULUS && head.ends_with(&[0x01, 0x00]) => {
            Ok(modulus)
        }
        _ => Err(TpmError::Malformed {
            operation: "reading the EK's public area",
            why: "no RSA-2048 modulus at its end".into(),
        }),
    }
}
