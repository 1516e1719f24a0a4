//! The partition as bytes: a block device, or a regular file in tests and images.
//!
//! Every write here can be the last one before the power goes. What orders them is [`Device::sync`] and nothing else.

use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use super::EncryptError;

#[derive(Debug)]
pub(super) struct Device {
    path: PathBuf,
    file: File,
    size: u64,
}

impl Device {
    /// For looking only; the device may be in use.
    pub(super) fn open(path: &Path) -> Result<Self, EncryptError> {
        Self::with(path, OpenOptions::new().read(true))
    }

    /// For looking at what is to be changed: refused as in [`Device::claim`].
    pub(super) fn open_unused(path: &Path) -> Result<Self, EncryptError> {
        check_usable(path)?;
        Self::open(path)
    }

    /// For changing: refused while it is mounted, mapped, or being encrypted by another process.
    pub(super) fn claim(path: &Path) -> Result<Self, EncryptError> {
        check_usable(path)?;
        let device = Self::with(path, OpenOptions::new().read(true).write(true))?;
        device.lock()?;
        Ok(device)
    }

    fn with(path: &Path, options: &OpenOptions) -> Result<Self, EncryptError> {
        let open = |source| EncryptError::Open { path: path.to_owned(), source };
        let mut file = options.open(path).map_err(open)?;
        let kind = file.metadata().map_err(open)?.file_type();
        if !kind.is_block_device() && !kind.is_file() {
            return Err(EncryptError::NotADevice { path: path.to_owned() });
        }
        let size = file.seek(SeekFrom::End(0)).map_err(open)?;
        Ok(Self { path: path.to_owned(), file, size })
    }

    /// An open-file-description lock, since libcryptsetup takes flock() on regular files and would wait for ours.
    fn lock(&self) -> Result<(), EncryptError> {
        let whole = libc::flock {
            l_type: libc::F_WRLCK as libc::c_short,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: 0,
            l_len: 0,
            l_pid: 0,
        };
        match fcntl(&self.file, FcntlArg::F_OFD_SETLK(&whole)) {
            Ok(_) => Ok(()),
            Err(Errno::EAGAIN | Errno::EACCES) => {
                Err(EncryptError::Locked { path: self.path.clone() })
            }
            Err(e) => Err(EncryptError::Open { path: self.path.clone(), source: e.into() }),
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// In bytes.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    pub(super) fn read(&self, offset: u64, length: u64) -> Result<Vec<u8>, EncryptError> {
        let mut bytes = vec![0; usize::try_from(length).unwrap_or(usize::MAX)];
        self.file
            .read_exact_at(&mut bytes, offset)
            .map_err(|source| self.io("read", offset, bytes.len(), source))?;
        Ok(bytes)
    }

    /// As much of the range as the device has.
    pub(super) fn read_up_to(&self, offset: u64, length: u64) -> Result<Vec<u8>, EncryptError> {
        let length = length.min(self.size.saturating_sub(offset));
        self.read(offset, length)
    }

    pub(super) fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), EncryptError> {
        self.file
            .write_all_at(bytes, offset)
            .map_err(|source| self.io("write", offset, bytes.len(), source))
    }

    /// Returns when everything written so far would survive a power cut.
    pub(super) fn sync(&self) -> Result<(), EncryptError> {
        self.file.sync_data().map_err(|source| self.io("sync", 0, 0, source))
    }

    fn io(
        &self,
        what: &'static str,
        offset: u64,
        length: usize,
        source: std::io::Error,
    ) -> EncryptError {
        EncryptError::Io { path: self.path.clone(), what, offset, length, source }
    }
}

fn check_usable(path: &Path) -> Result<(), EncryptError> {
    let metadata = fs::metadata(path)
        .map_err(|source| EncryptError::Open { path: path.to_owned(), source })?;
    if metadata.file_type().is_block_device() {
        check_partition(path, metadata.rdev())?;
        check_unused(path, metadata.rdev())?;
    }
    Ok(())
}

/// A drive itself is no partition; a mapping, a RAID or a loop device can stand for one.
fn check_partition(path: &Path, rdev: u64) -> Result<(), EncryptError> {
    let of = |name: &str| {
        let number = format!("{}:{}", libc::major(rdev), libc::minor(rdev));
        Path::new("/sys/dev/block").join(number).join(name).exists()
    };
    if of("device") && !of("partition") {
        return Err(EncryptError::WholeDisk { path: path.to_owned() });
    }
    Ok(())
}

/// O_EXCL on a block device fails while a file system, a mapping, swap or RAID holds it (open(2)).
fn check_unused(path: &Path, rdev: u64) -> Result<(), EncryptError> {
    match OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(path) {
        Ok(_) => Ok(()),
        Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
            Err(EncryptError::InUse { path: path.to_owned(), by: holder(rdev) })
        }
        Err(source) => Err(EncryptError::Open { path: path.to_owned(), source }),
    }
}

/// Who holds the device, in words.
fn holder(rdev: u64) -> String {
    let number = format!("{}:{}", libc::major(rdev), libc::minor(rdev));
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    // Fields: id, parent, major:minor, root, mount point (proc_pid_mountinfo(5)).
    let mounted = mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(2);
        (fields.next() == Some(number.as_str()))
            .then(|| fields.nth(1).unwrap_or_default().to_owned())
    });
    if let Some(mount_point) = mounted {
        return format!("mounted on {mount_point}");
    }
    let holders = fs::read_dir(format!("/sys/dev/block/{number}/holders")).ok();
    let names: Vec<String> = holders
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect();
    if names.is_empty() {
        "opened exclusively".to_owned()
    } else {
        format!("held by {}", names.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reading_stops_at_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("partition");
        fs::write(&path, b"0123456789").unwrap();
        let device = Device::open(&path).unwrap();
        assert_eq!(device.size(), 10);
        assert_eq!(device.read(2, 3).unwrap(), b"234");
        assert_eq!(device.read_up_to(8, 100).unwrap(), b"89");
        assert_eq!(device.read_up_to(100, 100).unwrap(), b"");
        assert!(matches!(device.read(8, 3), Err(EncryptError::Io { what: "read", .. })));
    }
}
