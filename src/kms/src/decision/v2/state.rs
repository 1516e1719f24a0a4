//! The state a machine proves, held against what its volumes have learned, and learned where they have not (§7.3, §7.4).

use std::collections::BTreeMap;

use latchkey_wire::{
    ek::RsaPublicKey,
    manifest::{Attestation, PcrValues, SealedVolume},
    pem,
    v2::text,
};

use super::{Case, No};
use crate::decision::{is_held_to_pcrs, same, stored_pcrs};

impl Case<'_> {
    /// The values of the quote as they are compared and stored: all empty if they are not to be learned now (§7.3).
    pub(super) fn current_pcrs(&self, volumes: &[&SealedVolume]) -> BTreeMap<String, String> {
        let defers = self.machine.defers && !volumes.iter().any(|volume| is_held_to_pcrs(volume));
        let shown = |value: &[u8; 32]| if defers { String::new() } else { hex(value) };
        self.machine.pcrs.iter().map(|(index, value)| (index.to_string(), shown(value))).collect()
    }

    /// Whether the machine is the one, in the state, that a volume is held to.
    pub(super) fn check(
        &self,
        volume: &SealedVolume,
        current: &BTreeMap<String, String>,
    ) -> Result<(), No> {
        let Some(attestation) = &volume.spec.attestation else { return Ok(()) };
        let name = &volume.metadata.name;
        let stored = attestation.ek_public_key.as_deref().unwrap_or_default();
        if !stored.is_empty() {
            let why = match RsaPublicKey::from_pem(stored) {
                Ok(stored) if same(&self.machine.ek.spki(), &stored.spki()) => None,
                Ok(_) => Some(format!("SealedVolume {name:?} is held to another EK")),
                Err(error) => {
                    Some(format!("SealedVolume {name:?}: ekPublicKey cannot be read: {error}"))
                }
            };
            if let Some(why) = why {
                return Err(No::refused(text::ek_mismatch(), why));
            }
        }
        for (index, wanted) in stored_pcrs(volume).filter(|(_, wanted)| !wanted.is_empty()) {
            match current.get(index) {
                None => {
                    let why = format!(
                        "SealedVolume {name:?} is held to PCR {index} = {wanted}, which the quote does not have (--pcrs says which it may have)"
                    );
                    return Err(No::refused(text::pcr_not_provided(index), why));
                }
                Some(got) if !same(got.as_bytes(), wanted.to_ascii_lowercase().as_bytes()) => {
                    let why = format!(
                        "SealedVolume {name:?} is held to PCR {index} = {wanted}, the machine has {got}"
                    );
                    return Err(No::refused(text::pcr_changed(index), why));
                }
                Some(_) => {}
            }
        }
        Ok(())
    }

    /// Fills what is empty and was meant to be learned; a value that is not there at all is not.
    pub(super) fn learn(&self, volume: &mut SealedVolume, pcrs: &BTreeMap<String, String>) {
        let Some(attestation) = &mut volume.spec.attestation else { return };
        let mut learned = false;
        if attestation.ek_public_key.as_deref().unwrap_or_default().is_empty() {
            attestation.ek_public_key = Some(self.ek_pem());
            learned = true;
        }
        let values = attestation.pcr_values.as_mut().and_then(|values| values.pcrs.as_mut());
        for (index, value) in values.into_iter().flatten() {
            if let Some(current) = pcrs.get(index).filter(|current| !current.is_empty())
                && value.trim().is_empty()
            {
                value.clone_from(current);
                learned = true;
            }
        }
        if learned {
            attestation.last_verified_at = Some(self.surroundings.now.to_owned());
        }
    }

    pub(super) fn learned(&self, pcrs: BTreeMap<String, String>) -> Attestation {
        let now = Some(self.surroundings.now.to_owned());
        Attestation {
            ek_public_key: Some(self.ek_pem()),
            pcr_values: Some(PcrValues { pcrs: Some(pcrs) }),
            enrolled_at: now.clone(),
            last_verified_at: now,
        }
    }

    pub(super) fn ek_pem(&self) -> String {
        pem::encode(pem::PUBLIC_KEY, &self.machine.ek.spki())
    }
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut out, byte| {
        let _ = write!(out, "{byte:02x}"); // writing to a String cannot fail
        out
    })
}
