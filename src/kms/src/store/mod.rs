//! The store: a directory of YAML manifests.
//!
//! # Layout
//!
//! * Every file `*.yaml` or `*.yml` in the directory itself is read; sub-directories are not. Names that begin with a dot
//!   are passed over (editors' and our own half-written files, Kubernetes' `..data`). Symbolic links are followed.
//! * A file holds any number of documents, divided by `---`: `SealedVolume` (`keyserver.kairos.io/v1alpha1`) and
//!   `v1/Secret`, as for `kubectl apply`. Others are passed over. An object without namespace is in `default`; a
//!   volume finds its Secrets in its own namespace.
//! * The operator owns these files. The server never changes, renames or removes one. It adds files: a passphrase that a
//!   machine posts becomes the new file `<namespace>.<name>.secret.yaml`, mode 0600, one Secret each. It is written
//!   under a hidden name, synced, linked to its final name (which fails if that name is taken), and the directory is synced,
//!   before the machine's post counts. To enrol a machine afresh, remove that file.
//! * Changes are seen within about two polls (one second): a file is read once it has stayed the same for one poll, so a
//!   file that is still being written is not read by halves.
//!
//! # What cannot be read
//!
//! * A file with a mistake is reported with its line, and *what that file held before stays valid* until it is mended. After a
//!   restart nothing of it is known. As long as such a file stays, a Secret whose name occurs in it counts as "not to be
//!   told" instead of "not there": a machine is never led to enrol again because of somebody's typing mistake.
//! * If the whole directory cannot be read, everything known stays valid.
//! * Two objects of one kind, namespace and name that differ are a conflict: neither is used. Equal ones are one.

mod directory;
mod snapshot;

pub(crate) use directory::Store;
pub(crate) use snapshot::{ReadSecret, Snapshot};

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

/// Why a Secret was not added.
#[derive(Debug, Error)]
pub(crate) enum CreateError {
    /// There is one of this name: it stays as it is.
    #[error("there is a Secret of this name already")]
    Exists,
    /// A file that cannot be read mentions this name: nobody knows whether there is one.
    #[error("a file that cannot be read mentions this Secret's name; mend it first")]
    Unknown,
    /// The name is no name of a Kubernetes object, or too long for a file.
    #[error(
        "{0:?} is no valid name for a Secret: 1 to 180 of a-z, 0-9, '-' and '.', beginning and ending with a letter or digit"
    )]
    Name(String),
    /// The file system said no.
    #[error("writing {path} failed: {source}")]
    Io { path: PathBuf, source: std::io::Error },
}
