//! Cloud-config in the initramfs: from the directories where something else has mounted it, or from
//! the file system labelled COS_OEM, mounted here for as long as it is read.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use latchkey_config::{Config, DIRS};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::BootError;
use crate::disk::{plain_labelled, scan};
use crate::network::Changes;

const LABEL: &str = "COS_OEM";
/// One of the directories that is searched, and Kairos' name for it.
const MOUNT_POINT: &str = "/run/cos/oem";
/// Kairos' own `rd.cos.oemtimeout` is 10 s.
const PATIENCE: Duration = Duration::from_secs(10);

/// Loads the configuration of this machine; of `directories` instead of [`DIRS`] where there are any.
///
/// # Errors
/// [`BootError::Config`]; a configuration that is nowhere to be found is [`BootError::Setting`]:
/// without it nobody can say which mode is meant, and a guess could be a weaker one.
pub fn load(directories: &[PathBuf]) -> Result<Config, BootError> {
    if !directories.is_empty() || DIRS.iter().any(|directory| has_entries(Path::new(directory))) {
        return load_mounted(directories);
    }
    let mounted = Mounted::wait()?;
    let config = load_mounted(directories);
    drop(mounted);
    config
}

/// Loads what stands in the directories now, without waiting or mounting.
///
/// # Errors
/// [`BootError::Config`].
pub fn load_mounted(directories: &[PathBuf]) -> Result<Config, BootError> {
    let given: Vec<_> = directories.iter().map(PathBuf::as_path).collect();
    if let Some(missing) = given.iter().find(|directory| !directory.is_dir()) {
        return Err(BootError::Setting(format!(
            "--config {}: no such directory",
            missing.display()
        )));
    }
    let standard = DIRS.map(Path::new);
    Ok(latchkey_config::load(if given.is_empty() { &standard } else { &given })?)
}

fn has_entries(directory: &Path) -> bool {
    fs::read_dir(directory).is_ok_and(|mut entries| entries.next().is_some())
}

/// COS_OEM, mounted read-only until dropped.
struct Mounted;

impl Mounted {
    fn wait() -> Result<Self, BootError> {
        let deadline = Instant::now() + PATIENCE;
        let changes = Changes::of_devices();
        loop {
            if let Some(volume) = plain_labelled(&scan(), LABEL) {
                return Self::mount(&volume.device);
            }
            if Instant::now() >= deadline {
                return Err(BootError::Setting(format!(
                    "no configuration: {} hold nothing, and after {} s no file system is labelled {LABEL}",
                    DIRS.join(", "),
                    PATIENCE.as_secs()
                )));
            }
            changes.wait(deadline);
        }
    }

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
