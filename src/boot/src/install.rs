//! `encrypt`: what an installer calls. Gets each partition a passphrase that TPM or key server will
//! release again, and only then encrypts the partition with it.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use latchkey_config::Config;
use latchkey_tpm::{Tpm, TpmError};
use latchkey_wire::timeline::Mode;
use zeroize::Zeroizing;

use crate::clock::Steps;
use crate::disk::{Volume, for_installer, plain_label, read_content, scan};
use crate::encrypt::{self, Progress, Report, Request, State, Unlock};
use crate::exchange::Partition;
use crate::passphrase::{Passphrase, mode};
use crate::{BootError, unlock};

/// Where the configuration is.
const OEM: &str = "COS_OEM";
/// The TPM was there a moment before.
const TPM_PATIENCE: Duration = Duration::from_secs(2);

/// What `encrypt` was told.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Empty: `install.encrypted_partitions`.
    pub labels: Vec<String>,
    /// The partition itself, instead of the one that has the label.
    pub device: Option<PathBuf>,
    pub recovery_key: bool,
    /// Drop what is there.
    pub new: bool,
}

/// Encrypts the partitions, one after the other. Where a recovery key was asked for, `show` gets it
/// once the volume takes it; it is kept nowhere.
///
/// # Errors
/// The first thing that failed. Nothing that was on a partition is lost, and it can be run again.
pub fn run(
    config: &Config,
    options: &Options,
    show: &mut dyn FnMut(&str, &str) -> Result<(), BootError>,
) -> Result<(), BootError> {
    for Target { label, volume, .. } in targets(config, options)? {
        let (report, recovery) = encrypt_one(config, options, &label, &volume)?;
        enrol(config, &label, &volume, &report)?;
        log::info!(
            "{} is encrypted: LUKS2 volume {} labelled {label}",
            volume.device.display(),
            report.uuid
        );
        if let Some(recovery) = recovery.filter(|_| report.recovery) {
            show(&label, &recovery)?;
        }
        if let Some(note) = note(config, &label) {
            log::warn!("{note}");
        }
    }
    Ok(())
}

/// What [`run`] would do, in words. Writes nothing, neither to a partition nor to the TPM, and asks
/// no key server: some make a passphrase for whoever asks.
///
/// # Errors
/// What `run` would refuse before it touched anything.
pub fn plan(config: &Config, options: &Options) -> Result<String, BootError> {
    let mut text = String::new();
    let key = key_plan(config)?;
    for Target { label, volume, found } in targets(config, options)? {
        let device = volume.device.display();
        text += &format!("{label}: {device} is {found}\n  {}\n", action(&found, options.new));
        text += &format!("  key slot 0: {key}\n");
        if options.recovery_key {
            text += "  key slot 1: a new recovery key, printed once; an earlier one is replaced\n";
        }
        text +=
            "  token: this machine's mark, by its TPM, so that no other volume is taken for it\n";
        if let Some(note) = note(config, &label) {
            text += &format!("  note: {note}\n");
        }
    }
    Ok(text + "Nothing was changed.\n")
}

fn action(found: &State, new: bool) -> &'static str {
    match found {
        _ if new => "what is on it is lost: a new volume with an empty ext4 file system is made",
        State::Empty => "a new volume with an empty ext4 file system is made",
        State::Plain(_) => "it is encrypted in place, and what is on it is kept",
        State::HalfInstalled | State::WithoutFileSystem | State::Encrypting | State::Cleaning => {
            "the interrupted run is finished, and what is on it is kept"
        }
        State::Encrypted { .. } => "it stays as it is, once the machine's passphrase opens it",
    }
}

fn key_plan(config: &Config) -> Result<String, BootError> {
    let settings = &config.challenger;
    if mode(config) == Mode::Online {
        let servers = settings.servers.join(", ");
        return Ok(format!(
            "the passphrase that {servers} releases for it; where there is none yet, a new one is left there"
        ));
    }
    let index = settings.nv_index;
    let mut tpm = Tpm::open_within(settings.tpm_device.as_deref(), TPM_PATIENCE)?;
    match tpm.nv_blob(index) {
        Ok(_) => Ok(format!("the passphrase that NV index 0x{index:08x} of this TPM holds")),
        Err(TpmError::NvMissing { .. } | TpmError::NvUnwritten { .. }) => {
            Ok(format!("a new passphrase, sealed to this TPM in its NV index 0x{index:08x}"))
        }
        Err(error) => Err(error.into()),
    }
}

/// What has to be known about encrypting this one.
fn note(config: &Config, label: &str) -> Option<String> {
    let needed = match mode(config) {
        Mode::Online => "kcrypt.challenger.challenger_server=URL",
        Mode::Offline => "kcrypt.challenger.challenger_server= (nothing behind it: there is none)",
    };
    (plain_label(label) == OEM).then(|| {
        format!(
            "the configuration is on {label}, and cannot be read before that is open: {needed} has to be on the kernel command line"
        )
    })
}

/// A partition that was looked at.
struct Target {
    label: String,
    volume: Volume,
    found: State,
}

/// All of them, before the first is touched.
fn targets(config: &Config, options: &Options) -> Result<Vec<Target>, BootError> {
    config.complete()?;
    let labels =
        if options.labels.is_empty() { unlock::labels(config) } else { options.labels.clone() };
    if options.device.is_some() && labels.len() != 1 {
        return Err(BootError::Usage("--device goes with exactly one LABEL".into()));
    }
    let mut targets: Vec<Target> = Vec::with_capacity(labels.len());
    for label in labels {
        let volume = find(&label, options)?;
        if let Some(other) = targets.iter().find(|target| target.volume.device == volume.device) {
            return Err(BootError::Usage(format!(
                "{} is both {} and {label}",
                volume.device.display(),
                other.label
            )));
        }
        let found = encrypt::examine(&volume.device, &label, options.new)?;
        targets.push(Target { label, volume, found });
    }
    Ok(targets)
}

type RecoveryKey = Zeroizing<String>;

fn encrypt_one(
    config: &Config,
    options: &Options,
    label: &str,
    volume: &Volume,
) -> Result<(Report, Option<RecoveryKey>), BootError> {
    let passphrase = passphrase(config, options, label, volume)?;
    let recovery = options.recovery_key.then(encrypt::recovery_key).transpose()?;
    let request = Request {
        device: &volume.device,
        label,
        passphrase: &passphrase,
        recovery: recovery.as_ref().map(|key| key.as_bytes()),
        unlock: unlock_of(config),
        new: options.new,
    };
    let mut reporter = Reporter::new(label);
    let report = encrypt::run(&request, &mut |progress| reporter.tell(progress))?;
    Ok((report, recovery))
}

fn enrol(config: &Config, label: &str, volume: &Volume, report: &Report) -> Result<(), BootError> {
    let mut tpm = Tpm::open_within(config.challenger.tpm_device.as_deref(), TPM_PATIENCE)?;
    mark(&mut tpm, config, label, &volume.device, &report.uuid)
}

/// Leaves this machine's mark in the volume, by which `unlock` knows it from an impostor.
pub(crate) fn mark(
    tpm: &mut Tpm,
    config: &Config,
    label: &str,
    device: &Path,
    uuid: &str,
) -> Result<(), BootError> {
    let mac = tpm.volume_mac(uuid, plain_label(label))?;
    Ok(encrypt::bind(device, unlock_of(config), &mac)?)
}

pub(crate) fn unlock_of(config: &Config) -> Unlock {
    match mode(config) {
        Mode::Offline => Unlock::Offline,
        Mode::Online => Unlock::Online,
    }
}

/// A partition that is a volume already, wholly or half, has its passphrase: making another one
/// would not open it, and would be what is released from then on.
fn passphrase(
    config: &Config,
    options: &Options,
    label: &str,
    volume: &Volume,
) -> Result<Passphrase, BootError> {
    let fresh =
        options.new || matches!(encrypt::probe(&volume.device)?, State::Empty | State::Plain(_));
    let partition =
        Partition { label: label.into(), name: volume.name(), uuid: volume.partition_uuid() };
    let steps = Steps::default();
    unlock::with_source(config, &steps, |source, deadline| {
        if fresh {
            source.enrol(&partition, deadline, &steps)
        } else {
            source.release(&partition, deadline, &steps)
        }
    })
}

fn find(label: &str, options: &Options) -> Result<Volume, BootError> {
    if let Some(device) = &options.device {
        let content =
            read_content(device).map_err(BootError::io(format!("read {}", device.display())))?;
        return Ok(Volume { device: device.clone(), content });
    }
    let volumes = scan();
    match for_installer(&volumes, label).as_slice() {
        [volume] => Ok(volume.clone()),
        [] => Err(BootError::PartitionMissing { label: label.to_owned() }),
        several => Err(BootError::AmbiguousPartition {
            label: label.to_owned(),
            devices: several.iter().map(|volume| volume.device.display().to_string()).collect(),
        }),
    }
}

/// A line for each phase, and one every few seconds while a long one lasts.
struct Reporter<'a> {
    label: &'a str,
    next: Instant,
}

impl<'a> Reporter<'a> {
    const EVERY: Duration = Duration::from_secs(2);

    fn new(label: &'a str) -> Self {
        Self { label, next: Instant::now() }
    }

    fn tell(&mut self, progress: Progress) {
        let label = self.label;
        match progress {
            Progress::Restoring => {
                log::info!("{label}: putting back what an interrupted run had replaced")
            }
            Progress::Preparing => log::info!("{label}: preparing to encrypt in place"),
            Progress::Recovering => log::info!("{label}: completing what was interrupted"),
            Progress::MakingFileSystem => log::info!("{label}: making a new file system"),
            Progress::AddingRecoveryKey => log::info!("{label}: adding the recovery key"),
            Progress::Encrypting { done, of } if Instant::now() >= self.next || done == of => {
                let percent = done.saturating_mul(100) / of.max(1);
                log::info!("{label}: {percent} % of {} MiB encrypted", of >> 20);
                self.next = Instant::now() + Self::EVERY;
            }
            Progress::Encrypting { .. } => {}
        }
    }
}
