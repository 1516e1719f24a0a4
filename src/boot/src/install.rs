//! `encrypt`: what an installer calls. Gets each partition a passphrase that TPM or key server will
//! release again, and only then encrypts the partition with it.

use crate::BootError;

/// What `encrypt` was told.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Empty: `install.encrypted_partitions`.
    pub labels: Vec<String>,
    pub recovery_key: bool,
    /// Drop what is there.
    pub new: bool,
}

/// Encrypts the partitions.
///
/// # Errors
/// The first thing that failed; it can be run again.
pub fn run(options: &Options) -> Result<(), BootError> {
    let _ = options;
    Err(BootError::Usage("not here yet".into()))
}
