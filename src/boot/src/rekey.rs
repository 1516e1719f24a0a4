//! `rekey`: changes the machine's key of a volume. The old one stays until the new one has been released once more and has
//! opened the volume; the power may go at any moment, and running again comes to the end ([`crate::encrypt`] has the keyslots).
//!
//! Offline, one passphrase opens all volumes of the machine, so all are changed:
//!
//! ```text
//!  NV index   staged     keyslots of each volume
//!  old        –          old
//!  old        new        old                       made, sealed and read back
//!  old        new        old, new                  on each volume
//!  ?          new        old, new                  being written over: what unlocks goes by `staged` if it must
//!  new        new        old, new                  released once more, and every volume opened with it
//!  new        new        new
//!  new        –          new
//! ```
//!
//! Online, what is released is the server's to change, and no message of either generation does that: an operator changes the
//! Secret, or forgets it so that a new one is made. Whoever runs this has the volume key meanwhile: it waits for the change with
//! the old passphrase still good (`--wait`), or is given another key of the volume afterwards (`--key-stdin`).

use std::path::PathBuf;
use std::time::{Duration, Instant};

use latchkey_config::{Challenger, Config};
use latchkey_tpm::{Tpm, TpmError};
use latchkey_wire::release::Refusal;
use latchkey_wire::timeline::Mode;

use crate::automatic::{labelled, labels};
use crate::binding::choose;
use crate::clock::Steps;
use crate::disk::{Volume, read_content, scan};
use crate::encrypt::{self, normalize_recovery_key};
use crate::exchange::Partition;
use crate::install::{mark, unlock_of};
use crate::luks::{self, Origin, VolumeKey};
use crate::passphrase::{Deadline, Passphrase, Source, generate, mode, staged_index, unseal_at};
use crate::{BootError, unlock};

const TPM_PATIENCE: Duration = Duration::from_secs(2);
/// How often a server is asked whether it has another passphrase now.
const PAUSE: Duration = Duration::from_secs(2);

/// What `rekey` was told.
#[derive(Clone, Default)]
pub struct Options {
    pub label: String,
    /// The volume itself, instead of the one that has the label.
    pub device: Option<PathBuf>,
    /// Another key of the volume: a recovery key, or the passphrase from before.
    pub key: Option<Passphrase>,
    /// How long to wait for the server to release another passphrase.
    pub wait: Duration,
}

impl std::fmt::Debug for Options {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Options")
            .field("label", &self.label)
            .field("device", &self.device)
            .field("key", &self.key.is_some())
            .field("wait", &self.wait)
            .finish()
    }
}

/// A volume that is there.
struct Target {
    label: String,
    volume: Volume,
}

/// Changes the machine's key.
///
/// # Errors
/// Whatever it is: the volume opens with what is released.
pub fn run(config: &Config, options: &Options) -> Result<(), BootError> {
    config.complete()?;
    match mode(config) {
        Mode::Offline => offline(config, options),
        Mode::Online => online(config, options),
    }
}

fn offline(config: &Config, options: &Options) -> Result<(), BootError> {
    let settings = &config.challenger;
    let mut tpm = Tpm::open_within(settings.tpm_device.as_deref(), TPM_PATIENCE)?;
    let targets = sharing(config, options, &mut tpm)?;
    let staged = staged(&mut tpm, settings)?;
    let held = held(&mut tpm, settings, staged.is_some() || options.key.is_some())?;
    // Before anything is written: a volume that was left out would be closed for good.
    let known: Vec<_> = [&staged, &held].into_iter().flatten().collect();
    let keys = targets
        .iter()
        .map(|target| access(target, &known, options.key.as_ref()))
        .collect::<Result<Vec<_>, _>>()?;

    let new = match staged {
        Some(new) => new,
        None => stage(&mut tpm, settings)?,
    };
    for (target, key) in targets.iter().zip(&keys) {
        encrypt::begin_rotation(&target.volume.device, unlock_of(config), key, &new)?;
    }
    if held.is_none_or(|held| held != new) {
        let sealed = tpm.nv_blob(staged_index(settings))?;
        tpm.nv_replace(settings.nv_index, &sealed)?;
    }
    let released = unseal_at(&mut tpm, settings, settings.nv_index)?;
    for target in &targets {
        prove(target, &released, &new)?;
    }
    for target in &targets {
        finish(&mut tpm, config, target, &new)?;
    }
    Ok(tpm.nv_remove(staged_index(settings))?)
}

/// The volume that is meant, and those that the same passphrase opens.
fn sharing(config: &Config, options: &Options, tpm: &mut Tpm) -> Result<Vec<Target>, BootError> {
    let mut targets = vec![find(&options.label, options, tpm)?];
    for label in labels(config).into_iter().filter(|label| *label != options.label) {
        targets.push(find(&label, &Options { device: None, ..options.clone() }, tpm)?);
    }
    Ok(targets)
}

/// Whoever names the device, or has another key of the only volume there is, vouches for it: after a change of TPM it has a mark
/// that this one does not make.
fn find(label: &str, options: &Options, tpm: &mut Tpm) -> Result<Target, BootError> {
    let volumes = match &options.device {
        Some(device) => {
            let content = read_content(device)
                .map_err(BootError::io(format!("read {}", device.display())))?;
            vec![Volume { device: device.clone(), content }]
        }
        None => scan(),
    };
    let volume = match labelled(&volumes, label)?.as_slice() {
        [only] if options.device.is_some() || options.key.is_some() => only.clone(),
        several => choose(label, several, &mut |uuid, label| Ok(tpm.volume_mac(uuid, label)?))?,
    };
    Ok(Target { label: label.to_owned(), volume })
}

/// What an earlier run that was cut off has kept.
fn staged(tpm: &mut Tpm, settings: &Challenger) -> Result<Option<Passphrase>, BootError> {
    let index = staged_index(settings);
    match unseal_at(tpm, settings, index) {
        Ok(new) => {
            log::info!("a change of the machine's key was begun before; it is finished now");
            Ok(Some(new))
        }
        Err(BootError::NotInstalled(_)) => Ok(None),
        Err(BootError::Tpm(TpmError::Response { .. }) | BootError::Setting(_)) => {
            let what =
                format!("NV index 0x{index:08x}, which is to keep the new passphrase meanwhile,");
            Err(TpmError::Occupied { what }.into())
        }
        Err(error) => Err(error),
    }
}

/// The present passphrase. There may be none where another key opens the volume: the TPM was replaced or cleared, or the power
/// went while it was written over.
fn held(
    tpm: &mut Tpm,
    settings: &Challenger,
    may_be_gone: bool,
) -> Result<Option<Passphrase>, BootError> {
    match unseal_at(tpm, settings, settings.nv_index) {
        Ok(held) => Ok(Some(held)),
        Err(BootError::NotInstalled(_) | BootError::Tpm(TpmError::Response { .. }))
            if may_be_gone =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

fn stage(tpm: &mut Tpm, settings: &Challenger) -> Result<Passphrase, BootError> {
    let fresh = generate()?;
    let sealed = tpm.seal_blob(settings.c_index, &fresh)?;
    tpm.nv_store_new(staged_index(settings), &sealed)?;
    // Read back what will be read at every boot.
    unseal_at(tpm, settings, staged_index(settings))
}

/// The volume key, by whichever passphrase opens it.
fn access(
    target: &Target,
    known: &[&Passphrase],
    typed: Option<&Passphrase>,
) -> Result<VolumeKey, BootError> {
    let Target { label, volume } = target;
    let mut error = None;
    for passphrase in known {
        match luks::key(volume, label, passphrase, Origin::Machine) {
            Err(wrong @ BootError::WrongPassphrase { .. }) => error = Some(wrong),
            other => return other,
        }
    }
    match typed {
        Some(typed) => by_person(target, typed),
        None => Err(error.unwrap_or_else(|| BootError::WrongPassphrase {
            label: label.clone(),
            device: volume.device.clone(),
            origin: Origin::Machine,
        })),
    }
}

/// A recovery key may have been typed in capitals or without its dashes.
fn by_person(
    Target { label, volume }: &Target,
    typed: &Passphrase,
) -> Result<VolumeKey, BootError> {
    let text = std::str::from_utf8(typed).unwrap_or_default();
    let recovery = normalize_recovery_key(text).map(|key| key.as_bytes().to_vec());
    let recovery = recovery.map(Passphrase::from);
    luks::key(volume, label, recovery.as_ref().unwrap_or(typed), Origin::Person)
}

/// What was released just now is the new passphrase, and opens the volume as it would at a boot.
fn prove(target: &Target, released: &Passphrase, new: &Passphrase) -> Result<(), BootError> {
    if released != new {
        return Err(BootError::ChangedAgain { label: target.label.clone() });
    }
    luks::key(&target.volume, &target.label, released, Origin::Machine).map(drop)
}

fn finish(
    tpm: &mut Tpm,
    config: &Config,
    Target { label, volume }: &Target,
    new: &Passphrase,
) -> Result<(), BootError> {
    encrypt::finish_rotation(&volume.device, new)?;
    mark(tpm, config, label, &volume.device, &volume.luks_uuid())?;
    log::info!("{volume} ({label}) has a new machine key; the old one opens it no more");
    Ok(())
}

fn online(config: &Config, options: &Options) -> Result<(), BootError> {
    let steps = Steps::default();
    unlock::with_source(config, &steps, |source, _| {
        let target = find(&options.label, options, source.tpm())?;
        let mut server = Server { source, config, target: &target, steps: &steps };
        let (key, new) = server.change(options)?;
        encrypt::begin_rotation(&target.volume.device, unlock_of(config), &key, &new)?;
        let released = server.release()?;
        prove(&target, &released, &new)?;
        finish(server.source.tpm(), config, &target, &new)
    })
}

/// The key server, asked for one volume.
struct Server<'s, 'a> {
    source: &'s mut Source<'a>,
    config: &'s Config,
    target: &'s Target,
    steps: &'s Steps,
}

impl Server<'_, '_> {
    /// The volume key, and the passphrase that is released from now on.
    fn change(&mut self, options: &Options) -> Result<(VolumeKey, Passphrase), BootError> {
        let released = match self.release() {
            Ok(released) => Some(released),
            Err(BootError::Refused(Refusal::NoSecret(_) | Refusal::EmptySecret)) => None,
            Err(error) => return Err(error),
        };
        if let Some(released) = &released
            && let Some(key) = self.opened_by(released)?
        {
            let device = &self.target.volume.device;
            if encrypt::is_begun_with(device, released)? {
                log::info!("a change of the machine's key was begun before; it is finished now");
                return Ok((key, released.clone()));
            }
            return Ok((key, self.await_other(released, options.wait)?));
        }
        let typed = options.key.as_ref();
        let key = access(self.target, &[], typed)?;
        let new = match released {
            Some(new) => new,
            None => self.enrol(self.config.deadline)?,
        };
        Ok((key, new))
    }

    fn opened_by(&self, released: &Passphrase) -> Result<Option<VolumeKey>, BootError> {
        let Target { label, volume } = self.target;
        match luks::key(volume, label, released, Origin::Machine) {
            Ok(key) => Ok(Some(key)),
            Err(BootError::WrongPassphrase { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Waits for the operator.
    fn await_other(&mut self, old: &Passphrase, wait: Duration) -> Result<Passphrase, BootError> {
        let Target { label, volume } = self.target;
        let server = self.config.challenger.servers.join(", ");
        let nothing_new = || BootError::NothingNew { label: label.clone(), server: server.clone() };
        if wait.is_zero() {
            return Err(nothing_new());
        }
        if !encrypt::has_other_key(&volume.device)? {
            let (label, device) = (label.clone(), volume.device.clone());
            return Err(BootError::NoOtherKey { label, device });
        }
        log::warn!(
            "change the Secret of {label} at {server} now, or forget it there; waiting for {} s",
            wait.as_secs()
        );
        let until = Instant::now() + wait;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            match self.enrol(left.max(PAUSE)) {
                Ok(other) if other != *old => return Ok(other),
                Ok(_) => {}
                Err(error) if error.is_transient() => log::warn!("{error}"),
                Err(error) => return Err(error),
            }
            if left.is_zero() {
                return Err(nothing_new());
            }
            std::thread::sleep(PAUSE.min(left));
        }
    }

    fn release(&mut self) -> Result<Passphrase, BootError> {
        let deadline = Deadline::after(self.config.deadline);
        self.source.release(&self.partition(), deadline, self.steps)
    }

    fn enrol(&mut self, patience: Duration) -> Result<Passphrase, BootError> {
        self.source.enrol(&self.partition(), Deadline::after(patience), self.steps)
    }

    fn partition(&self) -> Partition {
        let Target { label, volume } = self.target;
        Partition { label: label.clone(), name: volume.name(), uuid: volume.partition_uuid() }
    }
}
