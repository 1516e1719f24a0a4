//! A new volume: nothing of what was on the partition is kept.

use std::process::{Command, Stdio};

use super::device::Device;
use super::journal::{self, Order};
use super::layout::shift;
use super::volume::{self, Plan, Volume};
use super::{EncryptError, Progress, Request};
use crate::token::{self, Unfinished};

/// Zeroed at both ends: all signatures, LUKS2's second headers (the last place for one is at 4 MiB) and our own undo record.
const WIPE: u64 = 8 * 1024 * 1024;

/// Header and keyslots, without file system. The header's first sector comes last: before that it is no volume.
pub(super) fn format(device: &Device, request: &Request<'_>) -> Result<(), EncryptError> {
    let bytes = shift(device.size());
    if device.size() < 2 * bytes {
        let (path, size) = (device.path().to_owned(), device.size());
        return Err(EncryptError::TooSmall { path, size, minimum: 2 * bytes });
    }
    let token = token::encode(request.unlock, Some(&Unfinished::FileSystem));
    let plan = Plan { label: request.label, passphrase: request.passphrase, token, bytes };
    let header = volume::header(device.path(), &plan)?;

    wipe(device)?;
    journal::put(device, &header, Order::FirstSectorLast)
}

fn wipe(device: &Device) -> Result<(), EncryptError> {
    let length = WIPE.min(device.size());
    let zeros = vec![0; usize::try_from(length).unwrap_or_default()];
    // The beginning first: without LUKS magic nothing at the end is looked at.
    for offset in [0, device.size().saturating_sub(length)] {
        device.write(offset, &zeros)?;
        device.sync()?;
    }
    Ok(())
}

/// An ext4 file system with the volume's label in the opened volume. Afterwards the volume is finished.
pub(super) fn make_filesystem(
    device: &Device,
    request: &Request<'_>,
    progress: &mut dyn FnMut(Progress),
) -> Result<(), EncryptError> {
    progress(Progress::MakingFileSystem);
    let mut volume = Volume::load(device.path())?;
    let name = format!("latchkey-{}", volume.uuid()?);
    volume.open(&name, request.passphrase)?;
    let made = mkfs(device, &name, request.label);
    volume.close(&name)?;
    made?;
    super::finish_token(&mut volume)
}

fn mkfs(device: &Device, name: &str, label: &str) -> Result<(), EncryptError> {
    let failed = |why: String| EncryptError::MakeFilesystem { path: device.path().to_owned(), why };
    let output = Command::new("mkfs.ext4")
        .args(["-q", "-F", "-L", label, &format!("/dev/mapper/{name}")])
        .stdin(Stdio::null())
        .output()
        .map_err(|e| failed(format!("it cannot be started: {e}")))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(failed(format!("{}: {}", output.status, said.trim())))
}
