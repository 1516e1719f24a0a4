//! The credential that ties an AK to an EK: TPM2_MakeCredential in software, and its framing on the wire
//! (`protocols/kcrypt.md` §4; TPM 2.0 Library, Part 1 §24 "Credential Protection" and Annex B.10.4).

use crate::{Error, Result};

/// TPM2B_ID_OBJECT with its length: 2 + (2 + 32-byte HMAC) + 34 bytes of encrypted identity.
pub const ID_OBJECT_BYTES: usize = 70;
/// TPM2B_ENCRYPTED_SECRET with its length: 2 + one 2048-bit RSA block.
pub const ENCRYPTED_SECRET_BYTES: usize = 258;

/// The two parts as a TPM takes them, without their lengths.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CredentialParts<'a> {
    /// TPMS_ID_OBJECT, 68 bytes.
    pub id_object: &'a [u8],
    /// TPMU_ENCRYPTED_SECRET, 256 bytes.
    pub encrypted_secret: &'a [u8],
}

/// Splits what a server sent, after checking that each prefix is the length of what follows it.
/// (Go's client drops the prefixes unseen.)
pub fn split_credential<'a>(credential: &'a [u8], secret: &'a [u8]) -> Result<CredentialParts<'a>> {
    let id_object = body(credential, ID_OBJECT_BYTES).ok_or(Error::Credential(
        "Credential must be a TPM2B_ID_OBJECT of 70 bytes, its length included",
    ))?;
    let encrypted_secret = body(secret, ENCRYPTED_SECRET_BYTES).ok_or(Error::Credential(
        "Secret must be a TPM2B_ENCRYPTED_SECRET of 258 bytes, its length included",
    ))?;
    if body(id_object.get(..34).unwrap_or_default(), 34).is_none() {
        return Err(Error::Credential("Credential must begin with a 32-byte HMAC"));
    }
    Ok(CredentialParts { id_object, encrypted_secret })
}

/// The bytes after a `TPM2B` length, if the whole has `total` bytes and the length says so.
fn body(sized: &[u8], total: usize) -> Option<&[u8]> {
    let (length, body) = sized.split_first_chunk::<2>()?;
    (sized.len() == total && usize::from(u16::from_be_bytes(*length)) == body.len()).then_some(body)
}

#[cfg(feature = "server")]
pub use server::{kdfa, make_credential};

#[cfg(feature = "server")]
mod server {
    use aws_lc_rs::{
        cipher::{AES_128, EncryptingKey, EncryptionContext, UnboundCipherKey},
        iv::FixedLength,
        rsa::{OAEP_SHA256_MGF1SHA256, OaepPublicEncryptingKey, PublicEncryptingKey},
    };
    use hmac::{Hmac, KeyInit, Mac};
    use sha2::Sha256;
    use zeroize::Zeroizing;

    use crate::{Error, Result, ek::RsaPublicKey, v1::Challenge};

    /// OAEP label of a credential's seed, terminating NUL included.
    const LABEL: &[u8] = b"IDENTITY\0";

    /// KDFa with SHA-256 (TPM 2.0 Library, Part 1 §11.4.10.2; SP 800-108 in counter mode): `bits` / 8 bytes.
    ///
    /// `label` comes without NUL; one is added.
    pub fn kdfa(
        key: &[u8],
        label: &str,
        context_u: &[u8],
        context_v: &[u8],
        bits: u32,
    ) -> Result<Zeroizing<Vec<u8>>> {
        let length = (bits / 8) as usize;
        let mut out = Zeroizing::new(Vec::with_capacity(length.next_multiple_of(32)));
        for counter in 1u32.. {
            if out.len() >= length {
                break;
            }
            let block = hmac(
                key,
                &[
                    &counter.to_be_bytes(),
                    label.as_bytes(),
                    &[0],
                    context_u,
                    context_v,
                    &bits.to_be_bytes(),
                ],
            )?;
            out.extend_from_slice(block.as_slice());
        }
        out.truncate(length);
        Ok(out)
    }

    fn hmac(key: &[u8], parts: &[&[u8]]) -> Result<Zeroizing<[u8; 32]>> {
        let mut mac = Hmac::<Sha256>::new_from_slice(key)
            .map_err(|_| Error::Crypto("HMAC-SHA256 refused its key"))?;
        for part in parts {
            mac.update(part);
        }
        Ok(Zeroizing::new(mac.finalize().into_bytes().into()))
    }

    /// Encrypts `secret` so that only the TPM that holds both the EK and the object named `name` recovers it (§4.1).
    ///
    /// `secret` and `seed` must be fresh random bytes; they are parameters so that the vectors can be checked. The
    /// OAEP padding takes its randomness by itself. The EK must have 2048 bits: the profile's template L-1, whose
    /// symmetric key has the 16 bytes of `seed`.
    pub fn make_credential(
        ek: &RsaPublicKey,
        name: &[u8],
        secret: &[u8; 32],
        seed: &[u8; 16],
    ) -> Result<Challenge> {
        if ek.modulus.len() != 256 {
            return Err(Error::RsaKey { reason: "an EK must have 2048 bits (template L-1)" });
        }
        let encrypted_seed = oaep(ek, seed)?;
        let symmetric_key = kdfa(seed, "STORAGE", name, &[], 128)?;
        let mut identity = Zeroizing::new([&32u16.to_be_bytes()[..], secret].concat());
        encrypt_in_place(&symmetric_key, &mut identity)?;
        let hmac_key = kdfa(seed, "INTEGRITY", &[], &[], 256)?;
        let mac = hmac(&hmac_key, &[&identity, name])?;
        Ok(Challenge {
            credential: sized(&[&sized(&[mac.as_slice()]), &identity]),
            secret: sized(&[&encrypted_seed]),
        })
    }

    fn oaep(ek: &RsaPublicKey, seed: &[u8; 16]) -> Result<Vec<u8>> {
        const FAILED: Error = Error::Crypto("RSA-OAEP with the EK failed");
        let key = PublicEncryptingKey::from_der(&ek.spki())
            .map_err(|_| Error::RsaKey { reason: "it is no usable RSA key" })?;
        let key = OaepPublicEncryptingKey::new(key).map_err(|_| FAILED)?;
        let mut block = vec![0; key.ciphertext_size()];
        let length = key
            .encrypt(&OAEP_SHA256_MGF1SHA256, seed, &mut block, Some(LABEL))
            .map_err(|_| FAILED)?
            .len();
        block.truncate(length);
        Ok(block)
    }

    /// AES-128-CFB with full-block feedback and an all-zero IV, as the TPM does.
    fn encrypt_in_place(key: &[u8], text: &mut [u8]) -> Result<()> {
        const FAILED: Error = Error::Crypto("AES-128-CFB failed");
        let key = UnboundCipherKey::new(&AES_128, key).map_err(|_| FAILED)?;
        let key = EncryptingKey::cfb128(key).map_err(|_| FAILED)?;
        let context = EncryptionContext::Iv128(FixedLength::from([0u8; 16]));
        key.less_safe_encrypt(text, context).map_err(|_| FAILED)?;
        Ok(())
    }

    /// A `TPM2B` of the joined parts; they are short by construction.
    fn sized(parts: &[&[u8]]) -> Vec<u8> {
        let body = parts.concat();
        let mut out = (body.len() as u16).to_be_bytes().to_vec();
        out.extend(body);
        out
    }
}
