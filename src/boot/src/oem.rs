//! Cloud-config in the initramfs: from the directories where something else has mounted it, or from
//! the file system labelled COS_OEM, mounted here for as long as it is read.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use latchkey_config::cmdline::CMDLINE;
use latchkey_config::{Config, DIRS, Local, is_populated};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::BootError;
use crate::automatic::DEFAULT_LABEL;
use crate::disk::{ext_labelled, luks_labelled, scan};
use crate::fetch::{self, Fetcher};
use crate::network::Changes;

const LABEL: &str = "COS_OEM";
/// One of the directories that is searched, and Kairos' name for it.
const MOUNT_POINT: &str = "/run/cos/oem";
/// On a running system the disk is there, or it is not.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// Early in the boot its driver may come late; Kairos' own `rd.cos.oemtimeout` is 10 s, which a busy
/// machine was seen to exceed.
pub const BOOT_PATIENCE: Duration = Duration::from_secs(90);
const REMINDER: Duration = Duration::from_secs(10);

/// Loads the configuration of this machine; of `directories` instead of [`DIRS`] where there are any.
/// Waits up to `patience` for COS_OEM, and for the network if there is a `config_url`.
///
/// # Errors
/// [`BootError::Config`]; a configuration that is nowhere to be found is [`BootError::Setting`]:
/// without it nobody can say which mode is meant, and a guess could be a weaker one.
pub fn load(directories: &[PathBuf], patience: Duration) -> Result<Config, BootError> {
    let (local, oem_is_encrypted) = read_local(directories, patience)?;
    let patience = fetch::PATIENCE.min(local.deadline() / 2);
    let fetcher = Fetcher::until(Instant::now() + patience);
    let mut config = local.fetch(&mut |request| fetcher.get(request))?;
    if oem_is_encrypted && config.encrypted_partitions.is_empty() {
        config.encrypted_partitions = [LABEL, DEFAULT_LABEL].map(str::to_owned).to_vec();
    }
    Ok(config)
}

/// What the machine says itself, and whether COS_OEM is a LUKS volume, which hides the rest. COS_OEM is
/// not kept mounted while the network comes up: something else may want to mount it.
fn read_local(directories: &[PathBuf], patience: Duration) -> Result<(Local, bool), BootError> {
    let found = if directories.is_empty() { Oem::find(patience)? } else { Oem::There };
    let local = read_mounted(directories)?;
    let says_enough = local.knows_mode() || local.names_config_url();
    match found {
        Oem::There | Oem::Mounted(_) => Ok((local, false)),
        Oem::Encrypted | Oem::Missing if !says_enough => Err(no_configuration(&found, patience)),
        Oem::Encrypted => Ok((local, true)),
        Oem::Missing => {
            log::warn!("no file system is labelled {LABEL}: the kernel command line alone counts");
            Ok((local, false))
        }
    }
}

fn no_configuration(found: &Oem, patience: Duration) -> BootError {
    let nothing_there = match found {
        Oem::Encrypted => format!("the volume labelled {LABEL} is encrypted"),
        _ => format!(
            "{} hold nothing, and after {} s no file system is labelled {LABEL}",
            DIRS.join(", "),
            patience.as_secs()
        ),
    };
    BootError::Setting(format!(
        "no configuration: {nothing_there}; the kernel command line says nothing either, as kcrypt.challenger.challenger_server=URL (nothing after the = for none)"
    ))
}

/// What stands in the directories and on the kernel command line now, without waiting, mounting or
/// asking for a `config_url`: not enough to say how a volume is unlocked.
///
/// # Errors
/// [`BootError::Config`].
pub fn load_mounted(directories: &[PathBuf]) -> Result<Config, BootError> {
    Ok(read_mounted(directories)?.alone()?)
}

fn read_mounted(directories: &[PathBuf]) -> Result<Local, BootError> {
    let given: Vec<_> = directories.iter().map(PathBuf::as_path).collect();
    if let Some(missing) = given.iter().find(|directory| !directory.is_dir()) {
        return Err(BootError::Setting(format!(
            "--config {}: no such directory",
            missing.display()
        )));
    }
    let standard = DIRS.map(Path::new);
    let cmdline = read_cmdline()?;
    Ok(Local::read(if given.is_empty() { &standard } else { &given }, &cmdline)?)
}

pub(crate) fn read_cmdline() -> Result<String, BootError> {
    let bytes = fs::read(CMDLINE).map_err(BootError::io(format!("read {CMDLINE}")))?;
    // Somebody else's word may be in any encoding; ours are ASCII.
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Where COS_OEM is.
enum Oem {
    /// Its content is in the directories already.
    There,
    /// Mounted here, read-only, until dropped.
    Mounted(#[allow(dead_code, reason = "it is for its Drop")] Mounted),
    /// In a LUKS volume that nobody has opened yet: what Kairos' installer then leaves of the configuration is on the
    /// kernel command line (protocols/kcrypt.md §10.3).
    Encrypted,
    /// Nowhere.
    Missing,
}

impl Oem {
    fn find(patience: Duration) -> Result<Self, BootError> {
        if DIRS.iter().any(|directory| is_populated(Path::new(directory))) {
            return Ok(Self::There);
        }
        let deadline = Instant::now() + patience;
        let mut reminder = Instant::now() + REMINDER;
        let changes = Changes::of_devices();
        loop {
            let volumes = scan();
            if let Some(volume) = ext_labelled(&volumes, LABEL) {
                return Mounted::mount(&volume.device).map(Self::Mounted);
            }
            if !luks_labelled(&volumes, LABEL).is_empty() {
                return Ok(Self::Encrypted);
            }
            if Instant::now() >= deadline {
                return Ok(Self::Missing);
            }
            if Instant::now() >= reminder {
                log::info!(
                    "waiting for the file system labelled {LABEL}, where the configuration is"
                );
                reminder += REMINDER;
            }
            changes.wait(deadline);
        }
    }
}

/// COS_OEM, mounted read-only until dropped.
struct Mounted;

impl Mounted {
    fn mount(device: &Path) -> Result<Self, BootError> {
        let fail = || BootError::io(format!("mount {} on {MOUNT_POINT}", device.display()));
        fs::create_dir_all(MOUNT_POINT).map_err(fail())?;
        let flags =
            MsFlags::MS_RDONLY | MsFlags::MS_NODEV | MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
        // ext4's driver mounts ext2 and ext3 as well.
        mount(Some(device), MOUNT_POINT, Some("ext4"), flags, None::<&str>)
            .map_err(|errno| fail()(errno.into()))?;
        Ok(Self)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Err(errno) = umount2(MOUNT_POINT, MntFlags::MNT_DETACH) {
            log::warn!("cannot unmount {MOUNT_POINT}: {errno}");
        }
    }
}
