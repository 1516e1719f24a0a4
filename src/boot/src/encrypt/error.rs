//! Why a partition could not be encrypted, and what is to be done about it.

use std::io;
use std::path::PathBuf;

use libcryptsetup_rs::LibcryptErr;

/// Whatever the error: data that was on the partition is still there, and running again goes on from where it stopped.
#[derive(Debug, thiserror::Error)]
pub enum EncryptError {
    #[error("cannot open {}: {source}", path.display())]
    Open { path: PathBuf, source: io::Error },

    #[error("{} is neither a block device nor a regular file", path.display())]
    NotADevice { path: PathBuf },

    #[error("{} is a whole disk and not a partition; name the partition", path.display())]
    WholeDisk { path: PathBuf },

    #[error("{} is {found}, part of something larger; take it out of that, and wipe what says so with: wipefs -a {}", path.display(), path.display())]
    Member { path: PathBuf, found: &'static str },

    #[error("{} is in use ({by}); unmount or close it and run again", path.display())]
    InUse { path: PathBuf, by: String },

    #[error("{}: another program is encrypting it at this moment", path.display())]
    Locked { path: PathBuf },

    #[error("{}: cannot {what} {length} bytes at {offset}: {source}", path.display())]
    Io { path: PathBuf, what: &'static str, offset: u64, length: usize, source: io::Error },

    #[error("{}: {size} bytes are too few, it takes {minimum} to encrypt in place; --new makes a new volume if nothing on it is worth keeping", path.display())]
    TooSmall { path: PathBuf, size: u64, minimum: u64 },

    #[error(
        "{}: the file system leaves {free} bytes free at the end of the partition, encrypting in place takes {needed}; \
         nothing was changed. Make the file system smaller and run again: e2fsck -f {} && resize2fs {} {kib}K",
        path.display(), path.display(), path.display()
    )]
    NoRoom {
        path: PathBuf,
        free: u64,
        needed: u64,
        /// Size to shrink the file system to.
        kib: u64,
    },

    #[error("{}: {found}; only ext2, ext3 and ext4 are encrypted in place, --new makes a new volume and loses what is there", path.display())]
    UnknownContent { path: PathBuf, found: String },

    #[error("{}: the file system's superblock cannot be right ({why}); run e2fsck -f on it", path.display())]
    Filesystem { path: PathBuf, why: String },

    #[error("{} has the label {found:?} and not {wanted:?}; is it the right partition?", path.display())]
    OtherLabel { path: PathBuf, found: String, wanted: String },

    #[error(
        "{}: its encryption was begun by another program; finish it with: cryptsetup reencrypt --resume-only {}",
        path.display(), path.display()
    )]
    BegunElsewhere { path: PathBuf },

    #[error("{}: LUKS, but not LUKS2 that can be read ({why}); look at it with: cryptsetup luksDump {}", path.display(), path.display())]
    Header { path: PathBuf, why: String },

    #[error(
        "{}: this machine's passphrase does not open keyslot 0; was the volume made by another machine, or another TPM state? \
         --new makes it new and loses what is there",
        path.display()
    )]
    WrongPassphrase { path: PathBuf },

    #[error("the passphrase cannot be used: {why}")]
    BadPassphrase { why: &'static str },

    #[error("{label:?} is no label: 1 to 47 bytes without control characters")]
    BadLabel { label: String },

    #[error("{}: keyslot 1 is taken by something that is not ours; free it before asking for a recovery key", path.display())]
    RecoverySlotTaken { path: PathBuf },

    #[error("{}: all of LUKS2's keyslots are taken; free one with: cryptsetup luksKillSlot {} N", path.display(), path.display())]
    NoFreeSlot { path: PathBuf },

    #[error("{}: cannot {what}: {source}", path.display())]
    Cryptsetup { path: PathBuf, what: &'static str, source: LibcryptErr },

    #[error("{}: what was written is not what reads back: {what}; is the disk sound?", path.display())]
    Verify { path: PathBuf, what: &'static str },

    #[error("{}: mkfs.ext4 failed: {why}", path.display())]
    MakeFilesystem { path: PathBuf, why: String },

    #[error("no random numbers from the kernel: {0}")]
    Random(getrandom::Error),

    #[error("cannot make a file in memory for the header: {0}")]
    Memory(io::Error),
}
