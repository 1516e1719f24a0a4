//! The TPM: there, awake, without passwords, and able to do what an exchange asks of it.

use std::time::{Duration, Instant};

use latchkey_config::Challenger;
use latchkey_tpm::{Held, Properties, Tpm, TpmError, handle};

use super::report::Report;
use crate::passphrase::unseal_offline;
use crate::{BootError, info};

const PATIENCE: Duration = Duration::from_secs(2);
/// So many failures before lockout that the next boots may cause it.
const NEAR_LOCKOUT: u32 = 3;

/// `configured`: whether the configuration could be read, so that it is known how the machine unlocks.
pub(super) fn check(
    report: &mut Report<'_>,
    settings: &Challenger,
    configured: bool,
) -> Result<(), BootError> {
    let mut tpm = match Tpm::open_within(settings.tpm_device.as_deref(), PATIENCE) {
        Ok(tpm) => tpm,
        Err(error) => return report.error("TPM", &error.into()),
    };
    match tpm.properties() {
        Err(error) => return report.error("TPM", &error.into()),
        Ok(properties) => check_properties(report, &tpm, &properties)?,
    }
    if check_endorsement_key(report, &mut tpm)? {
        check_handles(report, &mut tpm, settings)?;
        check_attestation_key(report, &mut tpm)?;
    }
    if configured && settings.servers.is_empty() {
        check_sealed(report, &mut tpm, settings)?;
    }
    Ok(())
}

fn check_properties(
    report: &mut Report<'_>,
    tpm: &Tpm,
    properties: &Properties,
) -> Result<(), BootError> {
    report.ok(
        "TPM",
        format!(
            "{}, {} {}, firmware {}",
            tpm.address(),
            properties.manufacturer,
            properties.vendor,
            info::firmware(properties)
        ),
    )?;
    let left = properties.max_failures.saturating_sub(properties.failures);
    let lockout = info::lockout(properties);
    if properties.in_lockout {
        let error = TpmError::Lockout { operation: "whatever is authorized" };
        report.error("TPM lockout", &error.into())?;
    } else if properties.failures > 0 && left < NEAR_LOCKOUT {
        report.warn(
            "TPM lockout",
            lockout,
            "each power cut counts as a failure: leave it on for that long, or `tpm2_dictionarylockout --clear-lockout`",
        )?;
    } else {
        report.ok("TPM lockout", lockout)?;
    }
    for (set, hierarchy) in [
        (properties.owner_auth_set, latchkey_tpm::Hierarchy::Owner),
        (properties.endorsement_auth_set, latchkey_tpm::Hierarchy::Endorsement),
    ] {
        if set {
            let error = TpmError::AuthSet { operation: "what kcrypt asks", hierarchy };
            report.error("TPM passwords", &error.into())?;
        }
    }
    if !properties.owner_auth_set && !properties.endorsement_auth_set {
        report.ok("TPM passwords", "none on owner and endorsement hierarchy")?;
    }
    Ok(())
}

fn check_endorsement_key(report: &mut Report<'_>, tpm: &mut Tpm) -> Result<bool, BootError> {
    let found = match tpm.endorsement() {
        Ok(found) => found,
        Err(error) => {
            report.error("endorsement key", &error.into())?;
            return Ok(false);
        }
    };
    report.ok("endorsement key", format!("this machine is {}", found.used))?;
    if let (true, Ok(certified)) = (found.differs(), &found.by_certificate) {
        report.warn(
            "endorsement key",
            format!("the EK certificate is for another key, with pubhash {certified}"),
            "Kairos' own programs go by that one; enter the first pubhash at the key server",
        )?;
    }
    Ok(true)
}

fn check_handles(
    report: &mut Report<'_>,
    tpm: &mut Tpm,
    settings: &Challenger,
) -> Result<(), BootError> {
    for (handle, purpose) in info::kcrypt_handles(settings.c_index) {
        let what = format!("TPM handle 0x{handle:08x} ({purpose})");
        match tpm.held(handle) {
            Err(error) => report.error(what, &error.into())?,
            Ok(held) if usable(handle, held) => report.ok(what, info::describe(held))?,
            Ok(held) => report.warn(
                what,
                info::describe(held),
                "it is left alone and the key is made at each boot, which takes a real TPM seconds; `cleanup --keys --force` removes it",
            )?,
        }
    }
    Ok(())
}

fn usable(at: u32, held: Option<Held>) -> bool {
    match held {
        None => true,
        Some(Held::EndorsementKey) => at == handle::EK,
        Some(Held::StorageRoot(_) | Held::OtherParent) => at == handle::SRK,
        Some(Held::BlobKey | Held::OtherDecrypter) => at != handle::EK && at != handle::SRK,
        Some(Held::Foreign) => false,
    }
}

/// An attestation key is made at each boot, and is where most of the time goes.
fn check_attestation_key(report: &mut Report<'_>, tpm: &mut Tpm) -> Result<(), BootError> {
    let began = Instant::now();
    match tpm.attestation_key() {
        Err(error) => report.error("attestation key", &error.into()),
        Ok(_) => {
            let took = began.elapsed().as_millis();
            report.ok("attestation key", format!("made and certified by the TPM in {took} ms"))
        }
    }
}

fn check_sealed(
    report: &mut Report<'_>,
    tpm: &mut Tpm,
    settings: &Challenger,
) -> Result<(), BootError> {
    let what = format!("passphrase in NV index 0x{:08x}", settings.nv_index);
    match unseal_offline(tpm, settings) {
        Ok(_) => report.ok(what, "the TPM releases it"),
        Err(error) => report.error(what, &error),
    }
}
