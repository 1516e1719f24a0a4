//! The RSA-OAEP key that seals passphrases to this TPM: v1's server-stored ones and the offline
//! mode's. `protocols/kcrypt.md` §9.1.

use tss_esapi::interface_types::algorithm::HashingAlgorithm;
use tss_esapi::interface_types::resource_handles::Hierarchy as Seed;
use tss_esapi::structures::{Data, HashScheme, PublicKeyRsa, RsaDecryptionScheme};
use zeroize::Zeroizing;

use crate::primary::Loaded;
use crate::{Tpm, TpmError, template};

/// The longest passphrase that fits: 256 − 2·32 − 2 bytes (RFC 8017 §7.1.1).
pub const BLOB_MAX: usize = 190;

const SCHEME: RsaDecryptionScheme =
    RsaDecryptionScheme::Oaep(HashScheme::new(HashingAlgorithm::Sha256));
/// userWithAuth and decrypt, not restricted: what RSA_Decrypt with empty authorization needs.
const NEEDED: u32 = 0x40 | 0x2_0000;
const RESTRICTED: u32 = 0x1_0000;

impl Tpm {
    /// Seals `passphrase` (at most [`BLOB_MAX`] bytes) with the key at `c_index`, which is made and
    /// persisted if the handle is free. 256 bytes.
    ///
    /// # Errors
    /// [`TpmError::Occupied`] when the handle holds something that cannot decrypt.
    pub fn seal_blob(&mut self, c_index: u32, passphrase: &[u8]) -> Result<Vec<u8>, TpmError> {
        const OPERATION: &str = "RSA_Encrypt";
        let key = match self.persistent(c_index)? {
            Some(loaded) if can_decrypt(&loaded) => loaded.key,
            Some(_) => {
                return Err(TpmError::Occupied {
                    what: format!("handle 0x{c_index:08x} (c_index)"),
                });
            }
            None => {
                let made = self.create_blob_key(&template::BLOB_KEY)?;
                self.persist(made.key, c_index)?
            }
        };
        let plain = PublicKeyRsa::try_from(passphrase)
            .map_err(|error| TpmError::Library { operation: OPERATION, error })?;
        let sealed =
            self.plain(OPERATION, |ctx| ctx.rsa_encrypt(key, plain, SCHEME, Data::default()))?;
        Ok(sealed.to_vec())
    }

    /// Opens what [`Tpm::seal_blob`] or upstream sealed.
    ///
    /// Where the persistent key is gone it is made again from the seed, by the template of v1 and
    /// then of v2; nothing is persisted here. The answer crosses the bus encrypted.
    ///
    /// # Errors
    /// [`TpmError::Response`] with TPM_RC_VALUE or 0x101 when it was sealed by another TPM.
    pub fn unseal_blob(
        &mut self,
        c_index: u32,
        sealed: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, TpmError> {
        if let Some(loaded) = self.persistent(c_index)? {
            if can_decrypt(&loaded) {
                return self.decrypt(&loaded, sealed);
            }
            log::warn!(
                "persistent handle 0x{c_index:08x} (c_index) cannot decrypt; making the key again"
            );
        }
        let v1 = self.create_blob_key(&template::BLOB_KEY)?;
        let opened = self.decrypt(&v1, sealed);
        self.flush(v1.key);
        if let Err(TpmError::Response { .. }) = opened {
            let v2 = self.create_blob_key(&template::blob_key_v2())?;
            let second = self.decrypt(&v2, sealed);
            self.flush(v2.key);
            return second.or(opened);
        }
        opened
    }

    fn create_blob_key(&mut self, template: &[u8]) -> Result<Loaded, TpmError> {
        self.create_primary(Seed::Owner, template, "CreatePrimary of the blob key")
    }

    fn decrypt(&mut self, key: &Loaded, sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, TpmError> {
        const OPERATION: &str = "RSA_Decrypt";
        let cipher = PublicKeyRsa::try_from(sealed)
            .map_err(|error| TpmError::Library { operation: OPERATION, error })?;
        let opened = self.under_encryption(OPERATION, key.key, None, |ctx| {
            ctx.rsa_decrypt(key.key, cipher, SCHEME, Data::default())
        });
        Ok(Zeroizing::new(opened?.to_vec()))
    }
}

pub(crate) fn can_decrypt(loaded: &Loaded) -> bool {
    let attributes = crate::transport::be_u32(&loaded.public, 4).unwrap_or(0);
    loaded.public.starts_with(&[0x00, 0x01]) && attributes & (NEEDED | RESTRICTED) == NEEDED
}
