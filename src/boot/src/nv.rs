//! The passphrase of offline mode, sealed in an NV index of the TPM (`protocols/kcrypt.md` §9): `checknv` and `readnv`. Neither
//! ever makes one.

use latchkey_config::Challenger;
use latchkey_tpm::Tpm;

use crate::BootError;
use crate::passphrase::{Passphrase, unseal_offline};

/// An NV index in an open TPM.
#[derive(Debug)]
pub struct Nv {
    tpm: Tpm,
    settings: Challenger,
}

impl Nv {
    #[must_use]
    pub fn new(tpm: Tpm, settings: Challenger) -> Self {
        Self { tpm, settings }
    }

    /// The passphrase.
    ///
    /// # Errors
    /// [`BootError::NotInstalled`] when there is none, else what the TPM answered.
    pub fn read(&mut self) -> Result<Passphrase, BootError> {
        unseal_offline(&mut self.tpm, &self.settings)
    }

    /// Reads it and says so.
    ///
    /// # Errors
    /// As [`Nv::read`].
    pub fn check(&mut self) -> Result<String, BootError> {
        self.read()?;
        Ok(format!(
            "NV index 0x{:08x} holds a passphrase, and the TPM releases it\n",
            self.settings.nv_index
        ))
    }
}
