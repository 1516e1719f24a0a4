//! The volumes, one by one: there, LUKS2, whole, with key slots that this machine can afford; and, where asked for, whether what
//! is released opens them.

use std::fs;
use std::time::Duration;

use latchkey_config::Config;
use latchkey_tpm::Tpm;

use super::report::Report;
use crate::automatic::labelled;
use crate::binding::choose;
use crate::clock::Steps;
use crate::disk::{Volume, holders};
use crate::exchange::Partition;
use crate::luks::{self, Header, Slot};
use crate::{BootError, unlock};

const TPM_PATIENCE: Duration = Duration::from_secs(2);

pub(super) fn check(
    report: &mut Report<'_>,
    config: &Config,
    volumes: &[Volume],
    unlock_test: bool,
) -> Result<(), BootError> {
    for label in unlock::labels(config) {
        check_one(report, config, volumes, &label, unlock_test)?;
    }
    Ok(())
}

fn check_one(
    report: &mut Report<'_>,
    config: &Config,
    volumes: &[Volume],
    label: &str,
    unlock_test: bool,
) -> Result<(), BootError> {
    let what = format!("volume {label}");
    let inspected = find(config, volumes, label)
        .and_then(|volume| luks::inspect(&volume, label).map(|header| (volume, header)));
    let (volume, header) = match inspected {
        Ok(inspected) => inspected,
        Err(error) => return report.error(what, &error),
    };
    check_header(report, config, label, &volume, &header)?;
    check_slots(report, &what, &header)?;
    if !unlock_test {
        return Ok(());
    }
    match try_unlock(config, label, &volume) {
        Ok(slot) => report.ok(what, format!("key slot {slot} takes what is released for it")),
        Err(error) => report.error(what, &error),
    }
}

/// As `unlock` finds it; the TPM is asked only where a volume says that it was enrolled.
fn find(config: &Config, volumes: &[Volume], label: &str) -> Result<Volume, BootError> {
    let candidates = labelled(volumes, label)?;
    let device = config.challenger.tpm_device.as_deref();
    let mut mark = |uuid: &str, label: &str| {
        let mut tpm = Tpm::open_within(device, TPM_PATIENCE)?;
        Ok(tpm.volume_mac(uuid, label)?)
    };
    choose(label, &candidates, &mut mark)
}

fn check_header(
    report: &mut Report<'_>,
    config: &Config,
    label: &str,
    volume: &Volume,
    header: &Header,
) -> Result<(), BootError> {
    let what = format!("volume {label}");
    let device = volume.device.display();
    if header.is_unfinished {
        let error =
            BootError::HalfEncrypted { label: label.to_owned(), device: volume.device.clone() };
        return report.error(what, &error);
    }
    let by = match (&header.unlocked_by, header.is_marked) {
        (Some(_), true) => "enrolled on this machine",
        (Some(_), false) => "made by Latchkey",
        (None, _) => "made by another program, as by Kairos' installer",
    };
    let mappers = mappings(volume);
    let open = if mappers.is_empty() {
        String::new()
    } else {
        format!(", open as {}", mappers.join(", "))
    };
    report.ok(what.as_str(), format!("{volume}, {by}{open}"))?;
    let online = !config.challenger.servers.is_empty();
    match header.unlocked_by.as_deref() {
        Some("offline") if online => report.warn(
            what,
            format!("{device} was made to be opened by the TPM alone, and the configuration names a key server"),
            "the server has to have the same passphrase; else take challenger_server away",
        ),
        Some("online") if !online => report.warn(
            what,
            format!("{device} was made to be opened by a key server, and the configuration names none"),
            "write kcrypt.challenger.challenger_server",
        ),
        _ => Ok(()),
    }
}

fn check_slots(report: &mut Report<'_>, what: &str, header: &Header) -> Result<(), BootError> {
    let slots: Vec<_> = header.slots.iter().map(ToString::to_string).collect();
    let available = memory_available();
    let machines = header.slots.iter().find(|slot| slot.is_machines);
    match (machines, available) {
        (None, _) => report.fail(
            42,
            what,
            format!("the machine's key slot is empty; there is: {}", slots.join(", ")),
            "open it with a recovery key, and give it a machine key again: rekey",
        ),
        (Some(Slot { memory_kib, .. }), Some(available)) if *memory_kib > available => report.fail(
            43,
            what,
            format!(
                "the machine's key slot wants {} MiB of memory, and {} MiB are free",
                memory_kib >> 10,
                available >> 10
            ),
            "change the slot's costs on a larger machine: cryptsetup luksConvertKey",
        ),
        _ => report.ok(what, slots.join(", ")),
    }?;
    if header.slots.iter().all(|slot| slot.is_machines) {
        report.warn(
            what,
            "there is no recovery key: with the TPM, or the server's store, the data is lost",
            "encrypt --recovery-key adds one, also afterwards",
        )?;
    }
    Ok(())
}

/// KiB; key derivation of a slot has to fit.
fn memory_available() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.split_whitespace().next()?.parse().ok()
}

/// The mappings on the device.
fn mappings(volume: &Volume) -> Vec<String> {
    let name =
        |holder: &String| fs::read_to_string(format!("/sys/class/block/{holder}/dm/name")).ok();
    let names = holders(&volume.name());
    names.iter().filter_map(name).map(|name| format!("/dev/mapper/{}", name.trim_end())).collect()
}

/// As a boot does, but for the mapping.
fn try_unlock(config: &Config, label: &str, volume: &Volume) -> Result<u32, BootError> {
    let steps = Steps::default();
    let partition =
        Partition { label: label.to_owned(), name: volume.name(), uuid: volume.partition_uuid() };
    let passphrase = unlock::with_source(config, &steps, |source, deadline| {
        source.release(&partition, deadline, &steps)
    })?;
    luks::takes(volume, label, &passphrase)
}
