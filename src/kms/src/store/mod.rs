//! The store: a directory of YAML manifests.
//!
//! # Layout
//!
//! * Every file `*.yaml` or `*.yml` in the directory itself is read; sub-directories are not. Names that begin with a dot
//!   are passed over (editors' and our own half-written files, Kubernetes' `..data`). Symbolic links are followed.
//! * A file holds any number of documents, divided by `---`: `SealedVolume` (`keyserver.kairos.io/v1alpha1`) and
//!   `v1/Secret`, as for `kubectl apply`. Others are passed over. An object without namespace is in `default`; a
//!   volume finds its Secrets in its own namespace.
//! * The operator owns these files. What the server makes becomes a new file, `<namespace>.<name>.secret.yaml` or
//!   `<namespace>.<name>.volume.yaml`, mode 0600, one object each. It is written under a hidden name, synced, linked to its
//!   final name (which fails if that name is taken), and the directory is synced, before it counts.
//! * What the server learns of a volume (generation 2: EK, PCRs, partitions), and what `latchkey-kms volume` changes, is
//!   written into the file that holds the volume: only the lines of the changed fields, all else stays byte for byte, owner
//!   and mode too. The new content is written beside it, synced, and renamed over it; a file that somebody else has
//!   changed since it was read is left alone. Such changes are made one at a time, also between programs (flock(2) on the
//!   directory); new files are written beside each other. A volume that is in two files is not changed.
//! * What others change is used within about two polls (one second): a file is read once it has stayed the same for one
//!   poll, and gone when it was missing twice, so a file that is still being written is not read by halves. Until then
//!   what it held before is in use, and nothing is made that its new content mentions: neither a Secret nor, for a
//!   machine that nobody knows, a volume. Who asks in that moment is to ask again.
//!
//! # What cannot be read
//!
//! * A file with a mistake is reported with its line, and *what that file held before stays valid* until it is mended. After a
//!   restart nothing of it is known. As long as such a file stays, a Secret whose name occurs in it counts as "not to be
//!   told" instead of "not there": a machine is never led to enrol again because of somebody's typing mistake.
//! * If the whole directory cannot be read, everything known stays valid.
//! * Two objects of one kind, namespace and name that differ are a conflict: neither is used. Equal ones are one.

mod change;
mod directory;
mod file;
mod files;
mod snapshot;
#[cfg(test)]
mod tests;
mod watch;

pub(crate) use change::{Change, Prepared};
pub(crate) use directory::Store;
pub(crate) use snapshot::{ReadSecret, Snapshot, secret_names};

use std::path::PathBuf;

use thiserror::Error;

/// How the store is, for those who look after it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Status {
    /// Grows with each change that was taken.
    pub(crate) generation: u64,
    /// Whether the directory could be read at the last look.
    pub(crate) readable: bool,
    pub(crate) volumes: usize,
    pub(crate) secrets: usize,
    pub(crate) unreadable_files: usize,
}

/// Why an object was not added.
#[derive(Debug, Error)]
pub(crate) enum CreateError {
    /// There is one of this name: it stays as it is.
    #[error("there is a {0} of this name already")]
    Exists(&'static str),
    /// A file that cannot be read mentions this name: nobody knows whether there is one.
    #[error("a file that cannot be read mentions this Secret's name; mend it first")]
    Unknown,
    /// A file that has just been changed mentions this name: nobody knows yet whether there is one.
    #[error(
        "a file that has just been changed mentions this Secret's name; it is read in a moment"
    )]
    Unsettled,
    /// The name is no name of a Kubernetes object, or too long for a file.
    #[error(
        "{0:?} is no valid name for a Secret: 1 to 180 of a-z, 0-9, '-' and '.', beginning and ending with a letter or digit"
    )]
    Name(String),
    /// It could not be written.
    #[error(transparent)]
    Edit(#[from] EditError),
}

/// Why the store was not changed.
#[derive(Debug, Error)]
pub(crate) enum EditError {
    /// There is no such object, or it is defined twice and differently.
    #[error("the store has no usable {0}")]
    Absent(String),
    /// It is in two files: which one is meant is the operator's to say.
    #[error("{object} is in {} and in {}: remove one of them", first.display(), second.display())]
    Twice { object: String, first: PathBuf, second: PathBuf },
    /// The file's text could not be changed.
    #[error("{}: {source}", path.display())]
    File { path: PathBuf, source: latchkey_wire::Error },
    /// The text would be read as something else.
    #[error("SealedVolume {0:?} holds what cannot be written as YAML and read again")]
    Unwritable(String),
    /// The object could not be written as text.
    #[error("{0}")]
    Text(latchkey_wire::Error),
    /// No passphrase could be made.
    #[error("no random bytes: {0}")]
    Random(getrandom::Error),
    /// Its file is being written by somebody else.
    #[error("{}: it is being written by somebody else; try again in a moment", .0.display())]
    Busy(PathBuf),
    /// The volume is not what the change was made from.
    #[error("{0} has changed meanwhile")]
    Moved(String),
    /// The file system said no, or somebody changed the file at the same moment.
    #[error("writing {} failed: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
}
