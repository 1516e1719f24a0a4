//! What the initramfs leaves for the system: the mesh identity and the timeline, under
//! `/run/latchkey` (tmpfs, root only), which survives switch-root.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use latchkey_config::Mesh;
use latchkey_wire::identity::{Identity, derive};
use latchkey_wire::timeline::Timeline;
use zeroize::Zeroizing;

use crate::BootError;

/// Mode 0700.
pub const DIRECTORY: &str = "/run/latchkey";

/// Writes `identity`, which `latchkey.service` takes as a credential.
///
/// # Errors
/// [`BootError::Identity`] when it cannot be derived, [`BootError::Io`] when it cannot be written.
pub fn leave_identity(
    mesh: &Mesh,
    volume_key: &[u8],
    machine_secret: &[u8; 32],
    volume_uuid: &str,
) -> Result<(), BootError> {
    let identity = derive(volume_key, machine_secret, &mesh.network)
        .and_then(|key| Identity::new(mesh.network.clone(), key, volume_uuid))
        .and_then(|identity| identity.to_json())
        .map_err(|error| BootError::Identity(error.to_string()))?;
    write("identity", identity.as_bytes())
}

/// Writes `timeline.json`.
///
/// # Errors
/// [`BootError::Io`].
pub fn leave_timeline(timeline: &Timeline) -> Result<(), BootError> {
    let json = timeline.to_json().map_err(|error| BootError::Identity(error.to_string()))?;
    write("timeline.json", json.as_bytes())
}

/// The kernel's name for this boot.
#[must_use]
pub fn boot_id() -> String {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    text.trim().to_owned()
}

/// A new file in the directory, in place all at once.
fn write(name: &str, content: &[u8]) -> Result<(), BootError> {
    let directory = Path::new(DIRECTORY);
    let target = directory.join(name);
    let fail = || BootError::io(format!("write {}", target.display()));
    DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(fail())?;
    let temporary = directory.join(format!(".{name}"));
    // A leftover of a run that was cut off is in the way of create_new, and of no use.
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(fail()(error)),
        _ => {}
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&temporary)
        .map_err(fail())?;
    file.write_all(content).map_err(fail())?;
    fs::rename(&temporary, &target).map_err(fail())
}

/// A machine secret on its way from the thread that has the TPM.
pub type MachineSecret = Zeroizing<[u8; 32]>;
