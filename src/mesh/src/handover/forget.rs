//! Leaves no copy of the private key below /run once the service has taken it.
//!
//! Two copies are there: `/run/latchkey/identity`, and the credential systemd made of it in a ramfs
//! of its own, mounted read-only at `/run/credentials/UNIT` in the host's mount namespace and,
//! bound from there, in the service's. Unmounting the former would leave the latter; but both are
//! one file. So that file is overwritten and removed, through the host's mount, made writable for
//! that moment. The mount itself stays systemd's, who takes it away when the service stops.
//!
//! Runs as `ExecStartPost=+latchkey handover forget`: root, all capabilities, but with a mount
//! namespace of its own in which systemd 252 hides /run/credentials. Therefore it first steps into
//! that of PID 1.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use nix::libc::O_NOFOLLOW;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns};
use nix::sys::statvfs::{FsFlags, statvfs};
use nix::time::{ClockId, clock_gettime};

use super::{HandOver, RECORD_VERSION, Record, file};
use crate::error::Result;
use crate::key::PrivateKey;

/// systemd 252 mounts credentials with these (and read-only).
const CREDENTIAL_FLAGS: MsFlags =
    MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV).union(MsFlags::MS_NOEXEC);

/// Removes both copies of the identity and leaves a [`Record`] without secrets. Run again, it finds
/// nothing to do.
///
/// Must be called while the process has one thread only: it changes the mount namespace.
///
/// # Errors
/// Whatever kept it from removing a copy; then one may be left, and the service must not go on as
/// if none were.
pub fn forget(hand_over: &HandOver, credentials: Option<&Path>) -> Result<()> {
    enter_mount_namespace_of_init()?;
    remove_copies(hand_over, credentials)
}

/// [`forget`], in the mount namespace one is in.
pub(super) fn remove_copies(hand_over: &HandOver, credentials: Option<&Path>) -> Result<()> {
    leave_record(hand_over)?;
    wipe(&hand_over.identity_path())?;
    if let Some(directory) = credentials {
        wipe_credential(directory)?;
    }
    Ok(())
}

/// [`forget`], for an agent that was started by hand: nothing hides anything from it, and nobody made a credential.
pub(crate) fn forget_here(hand_over: &HandOver) -> Result<()> {
    remove_copies(hand_over, None)
}

fn enter_mount_namespace_of_init() -> Result<()> {
    const INIT: &str = "/proc/1/ns/mnt";
    let open =
        |path: &str| File::open(path).map_err(|source| file("open", Path::new(path), source));
    let inode = |of: &File, path: &str| {
        of.metadata()
            .map(|metadata| metadata.ino())
            .map_err(|source| file("read", Path::new(path), source))
    };
    let init = open(INIT)?;
    if inode(&init, INIT)? == inode(&open("/proc/self/ns/mnt")?, "/proc/self/ns/mnt")? {
        return Ok(());
    }
    setns(&init, CloneFlags::CLONE_NEWNS)
        .map_err(|errno| file("enter", Path::new(INIT), errno.into()))
}

fn leave_record(hand_over: &HandOver) -> Result<()> {
    let Some(identity) = hand_over.identity(None)? else { return Ok(()) };
    let record = Record {
        version: RECORD_VERSION,
        network: identity.network.clone(),
        public_key: PrivateKey::new(&identity.private_key).public().to_string(),
        volume: identity.volume.clone(),
        taken_at_ms: since_boot().as_millis() as u64,
    };
    write_whole(&hand_over.record_path(), &record)
}

/// Written beside and renamed, so that a reader sees all of it or none.
fn write_whole(path: &Path, record: &Record) -> Result<()> {
    let new = path.with_extension("new");
    let write = || {
        let mut file =
            OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        file.write_all(&serde_json::to_vec(record)?)?;
        fs::rename(&new, path)
    };
    write().map_err(|source| file("write", path, source))
}

fn since_boot() -> Duration {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from)
}

/// Wipes through a read-only mount by making it writable for that moment.
fn wipe_credential(directory: &Path) -> Result<()> {
    let credential = directory.join("identity");
    if !fs::exists(&credential).map_err(|source| file("look for", &credential, source))? {
        return Ok(());
    }
    let flags = statvfs(directory).map_err(|errno| file("look at", directory, errno.into()))?;
    if !flags.flags().contains(FsFlags::ST_RDONLY) {
        return wipe(&credential); // no mount of its own: so systemd does it where it can mount nothing
    }
    remount(directory, CREDENTIAL_FLAGS)?;
    let wiped = wipe(&credential);
    let closed = remount(directory, CREDENTIAL_FLAGS | MsFlags::MS_RDONLY);
    wiped.and(closed)
}

fn remount(directory: &Path, flags: MsFlags) -> Result<()> {
    let (flags, none) = (MsFlags::MS_REMOUNT | MsFlags::MS_BIND | flags, None::<&Path>);
    mount(none, directory, none, flags, none)
        .map_err(|errno| file("remount", directory, errno.into()))
}

/// Overwrites in place, then unlinks. On tmpfs and ramfs the bytes written are the very pages the
/// key was in.
fn wipe(path: &Path) -> Result<()> {
    let mut opened = match OpenOptions::new().write(true).custom_flags(O_NOFOLLOW).open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        opened => opened.map_err(|source| file("open", path, source))?,
    };
    overwrite(&mut opened)
        .and_then(|()| fs::remove_file(path))
        .map_err(|source| file("wipe", path, source))
}

fn overwrite(file: &mut File) -> io::Result<()> {
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(0))?;
    io::copy(&mut io::Read::take(io::repeat(0), length), file)?;
    file.sync_all()
}
