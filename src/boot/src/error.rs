//! Why a volume stays closed, and the exit code that says so to the initramfs.

use std::path::PathBuf;

use latchkey_config::ConfigError;
use latchkey_tpm::TpmError;
use latchkey_wire::v1::Refusal;

use crate::encrypt::EncryptError;
use crate::exchange::ExchangeError;
use crate::luks::Origin;

/// Why the program failed. Each kind has an exit code of its own ([`BootError::exit_code`]).
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    #[error("{0}")]
    Usage(String),

    #[error("configuration: {0}")]
    Config(#[from] ConfigError),

    #[error("{0}")]
    Setting(String),

    #[error(transparent)]
    Tpm(#[from] TpmError),

    #[error("this machine has no passphrase of its own: {0}. `encrypt` makes one, at installation")]
    NotInstalled(TpmError),

    #[error("the deadline of {seconds} s passed; last: {last}")]
    Deadline { seconds: u64, last: Box<BootError> },

    #[error("gave up after {attempts} attempts; last: {last}")]
    Attempts { attempts: u32, last: Box<BootError> },

    #[error("the TPM or the name server had not answered by then")]
    Unfinished,

    #[error(transparent)]
    Exchange(#[from] ExchangeError),

    #[error(transparent)]
    Refused(#[from] Refusal),

    #[error("no LUKS2 volume labelled {label} was found{}", list(.seen))]
    VolumeMissing { label: String, seen: Vec<String> },

    #[error("{} is labelled {label} and is not encrypted, where the configuration wants a LUKS2 volume. It is left alone: run `encrypt {label}`, or take it off install.encrypted_partitions", device.display())]
    NotEncrypted { label: String, device: PathBuf },

    #[error(
        "{count} LUKS2 volumes are labelled {label} ({devices}): one of them is not this machine's. None is opened; take the other disk out"
    )]
    Ambiguous { label: String, count: usize, devices: String },

    #[error(
        "{} (LUKS2 {uuid}) is labelled {label} and was enrolled on another machine: an impostor. It is left closed. If this machine's TPM or mainboard was replaced, type the recovery key, and run `rekey --key-stdin {label}` afterwards", device.display()
    )]
    Impostor { label: String, device: PathBuf, uuid: String },

    #[error(
        "an unencrypted file system labelled {label} is on {plain} beside the LUKS2 volume on {volume}, and would be mounted in its place. None is opened; take the other disk out"
    )]
    PlainBeside { label: String, volume: String, plain: String },

    #[error("{} ({label}) is not what it seems: {why}. It is left closed", device.display())]
    Untrusted { label: String, device: PathBuf, why: String },

    #[error("the {origin} does not open {} ({label}){}", device.display(), .origin.advice())]
    WrongPassphrase { label: String, device: PathBuf, origin: Origin },

    #[error(
        "{server} still releases the present passphrase of {label}. Either run `rekey --wait SECONDS {label}` and have the Secret changed, or forgotten, while it waits; or change it first, and run `rekey --key-stdin {label}` with the old passphrase or the recovery key"
    )]
    NothingNew { label: String, server: String },

    #[error(
        "{} ({label}) has no key beside the machine's. While its passphrase is changed at the key server, a power cut could leave none that opens it: make a recovery key first, with `encrypt --recovery-key {label}`", device.display()
    )]
    NoOtherKey { label: String, device: PathBuf },

    #[error(
        "the passphrase that is released for {label} changed once more in the meantime. The volume still opens with the one before; run `rekey {label}` again"
    )]
    ChangedAgain { label: String },

    #[error("{operation} on {}: {error}", device.display())]
    Cryptsetup { operation: &'static str, device: PathBuf, error: String },

    #[error("cannot {what}: {error}")]
    Io { what: String, error: std::io::Error },

    #[error(
        "no partition is labelled {label}, by file system, LUKS2 header or partition table. Name it with --device"
    )]
    PartitionMissing { label: String },

    #[error("{} partitions are labelled {label}: {}. Say which with --device", devices.len(), devices.join(", "))]
    AmbiguousPartition { label: String, devices: Vec<String> },

    #[error("the encryption of {} ({label}) was begun and not finished; run `encrypt {label}` again before anything is written to it", device.display())]
    HalfEncrypted { label: String, device: PathBuf },

    #[error(transparent)]
    Encrypt(#[from] EncryptError),

    #[error(
        "{what} is not as kcrypt makes it: {why}. It may belong to another program, so nothing was removed; --force removes it all the same"
    )]
    NotOurs { what: String, why: String },

    #[error("{failed} of {checks} checks failed")]
    Unhealthy {
        failed: usize,
        checks: usize,
        /// Of the first.
        code: u8,
    },

    #[error("the mesh identity could not be made: {0}")]
    Identity(String),
}

fn list(labels: &[String]) -> String {
    if labels.is_empty() {
        ". No LUKS2 volume is there at all: is the disk's driver in the initramfs?".into()
    } else {
        format!(". What is there: {}", labels.join(", "))
    }
}

impl BootError {
    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |error| Self::Io { what, error }
    }

    /// The exit code, as `--help` lists it.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) | Self::Io { .. } | Self::NotOurs { .. } | Self::NoOtherKey { .. } => 1,
            Self::Config(_) | Self::Setting(_) => 10,
            Self::Tpm(error) => tpm_exit_code(error),
            Self::NotInstalled(_) | Self::NothingNew { .. } | Self::ChangedAgain { .. } => 31,
            Self::Unfinished => 21,
            Self::Deadline { last, .. } | Self::Attempts { last, .. } => match **last {
                Self::VolumeMissing { .. } => 40,
                Self::Tpm(ref error) => tpm_exit_code(error),
                Self::Exchange(ref error) => exchange_exit_code(error),
                _ => 21,
            },
            Self::Exchange(error) => exchange_exit_code(error),
            Self::Refused(Refusal::NoSecret(_) | Refusal::EmptySecret) => 31,
            Self::Refused(Refusal::Malformed) => 22,
            Self::Refused(_) => 30,
            Self::VolumeMissing { .. } => 40,
            Self::PartitionMissing { .. } => 40,
            Self::NotEncrypted { .. } | Self::Ambiguous { .. } => 41,
            Self::Impostor { .. } | Self::PlainBeside { .. } | Self::Untrusted { .. } => 41,
            Self::AmbiguousPartition { .. } => 41,
            Self::WrongPassphrase { .. } => 42,
            Self::Encrypt(EncryptError::WrongPassphrase { .. }) => 42,
            Self::Cryptsetup { .. } | Self::HalfEncrypted { .. } | Self::Encrypt(_) => 43,
            Self::Unhealthy { code, .. } => *code,
            Self::Identity(_) => 50,
        }
    }

    /// Whether the same attempt may succeed later without anybody doing anything.
    pub(crate) fn is_transient(&self) -> bool {
        match self {
            Self::Exchange(error) => error.is_transient(),
            Self::Refused(refusal) => refusal.is_transient(),
            _ => false,
        }
    }
}

fn exchange_exit_code(error: &ExchangeError) -> u8 {
    match error {
        ExchangeError::Tpm(error) => tpm_exit_code(error),
        ExchangeError::Protocol { .. } => 22,
        ExchangeError::Url { .. } | ExchangeError::Certificate { .. } => 10,
        error if error.is_before_the_server() => 20,
        _ => 21,
    }
}

fn tpm_exit_code(error: &TpmError) -> u8 {
    match error {
        TpmError::Address { .. } => 10,
        TpmError::Missing { .. } => 11,
        TpmError::Lockout { .. } => 13,
        TpmError::AuthSet { .. } => 14,
        _ => 12,
    }
}
