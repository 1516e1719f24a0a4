//! The machine secret: 32 bytes that only this TPM can compute, the TPM's share of the mesh identity.

use tss_esapi::interface_types::algorithm::HashingAlgorithm;
use tss_esapi::interface_types::resource_handles::Hierarchy as Seed;
use tss_esapi::structures::MaxBuffer;
use zeroize::Zeroizing;

use crate::ek::EndorsementKey;
use crate::{Tpm, TpmError, template};

/// What the key authenticates; the mesh network is separated later, in HKDF.
const MESSAGE: &[u8] = b"latchkey mesh identity v1";

impl Tpm {
    /// HMAC-SHA256 over a fixed message by a keyed-hash primary of the endorsement hierarchy
    /// ([`template::MACHINE_KEY`]): the same at every boot, gone with the endorsement seed, stored
    /// nowhere. Symmetric, so a few milliseconds even on a discrete TPM; salted to the endorsement
    /// key on its way over the bus.
    ///
    /// # Errors
    /// [`TpmError::AuthSet`] with an endorsement password.
    pub fn machine_secret(&mut self, ek: &EndorsementKey) -> Result<Zeroizing<[u8; 32]>, TpmError> {
        const OPERATION: &str = "HMAC by the machine key";
        let buffer = MaxBuffer::try_from(MESSAGE)
            .map_err(|error| TpmError::Library { operation: OPERATION, error })?;
        let made = self.create_primary(
            Seed::Endorsement,
            &template::MACHINE_KEY,
            "CreatePrimary of the machine key",
        )?;
        let mac = self.under_encryption(OPERATION, ek.key, None, |ctx| {
            ctx.hmac(made.key.into(), buffer, HashingAlgorithm::Sha256)
        });
        self.flush(made.key);
        let mac = mac?;
        <[u8; 32]>::try_from(mac.as_slice()).map(Zeroizing::new).map_err(|_| TpmError::Malformed {
            operation: OPERATION,
            why: format!("{} bytes instead of 32", mac.len()),
        })
    }
}
