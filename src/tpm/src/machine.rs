//! The machine key: HMACs that only this TPM can compute. One is the machine secret, the TPM's share
//! of the mesh identity; another marks the volumes that were enrolled on this machine.

use tss_esapi::interface_types::algorithm::HashingAlgorithm;
use tss_esapi::interface_types::resource_handles::Hierarchy as Seed;
use tss_esapi::structures::MaxBuffer;
use zeroize::Zeroizing;

use crate::ek::EndorsementKey;
use crate::primary::Loaded;
use crate::{Tpm, TpmError, template};

/// What the key authenticates; the mesh network is separated later, in HKDF.
const MESSAGE: &[u8] = b"latchkey mesh identity v1";
/// Begins what is authenticated for a volume: no volume's mark is ever the machine secret.
const VOLUME: &[u8] = b"latchkey volume v1\0";

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
        let buffer = buffer(OPERATION, MESSAGE)?;
        let made = self.machine_key()?;
        let mac = self.under_encryption(OPERATION, ek.key, None, |ctx| {
            ctx.hmac(made.key.into(), buffer, HashingAlgorithm::Sha256)
        });
        self.flush(made.key);
        bytes_32(OPERATION, &mac?).map(Zeroizing::new)
    }

    /// The mark of a volume that was enrolled on this machine: HMAC-SHA256 by the machine key over
    /// [`VOLUME`], the LUKS2 UUID, NUL, and the label. It is no secret (it stands in the volume's
    /// header), so nothing is encrypted on the bus, which spares a discrete TPM an RSA operation.
    ///
    /// # Errors
    /// [`TpmError::AuthSet`] with an endorsement password; [`TpmError::Library`] for a UUID and label
    /// of more than a kilobyte.
    pub fn volume_mac(&mut self, uuid: &str, label: &str) -> Result<[u8; 32], TpmError> {
        const OPERATION: &str = "HMAC over a volume";
        let message = [VOLUME, uuid.as_bytes(), b"\0", label.as_bytes()].concat();
        let buffer = buffer(OPERATION, &message)?;
        let made = self.machine_key()?;
        let mac = self.authorized(OPERATION, |ctx| {
            ctx.hmac(made.key.into(), buffer, HashingAlgorithm::Sha256)
        });
        self.flush(made.key);
        bytes_32(OPERATION, &mac?)
    }

    fn machine_key(&mut self) -> Result<Loaded, TpmError> {
        const OPERATION: &str = "CreatePrimary of the machine key";
        self.create_primary(Seed::Endorsement, &template::MACHINE_KEY, OPERATION)
    }
}

fn buffer(operation: &'static str, message: &[u8]) -> Result<MaxBuffer, TpmError> {
    MaxBuffer::try_from(message).map_err(|error| TpmError::Library { operation, error })
}

fn bytes_32(operation: &'static str, mac: &[u8]) -> Result<[u8; 32], TpmError> {
    <[u8; 32]>::try_from(mac).map_err(|_| TpmError::Malformed {
        operation,
        why: format!("{} bytes instead of 32", mac.len()),
    })
}
