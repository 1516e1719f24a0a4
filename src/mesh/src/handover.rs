//! The hand-over from the initramfs: `/run/latchkey`, root only, on tmpfs (DESIGN.md, "One boot",
//! 6).
//!
//! | file | written by | what |
//! |---|---|---|
//! | `identity` | kcrypt-discovery-challenger | the private key ([`Identity`]). Gone once the service has it |
//! | `timeline.json` | kcrypt-discovery-challenger | how the disk was opened ([`Timeline`]) |
//! | `handover.json` | `latchkey handover forget` | what is left of the identity, nothing secret ([`Record`]) |
//!
//! After the identity has been taken its private key is in two places: in the kernel's WireGuard
//! device and in the agent's memory. An agent that is started again takes it from the device.

mod forget;

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use latchkey_wire::identity::{Identity, MAX_IDENTITY};
use latchkey_wire::timeline::{MAX_TIMELINE, Outcome, Timeline};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::error::{Error, Result};
use crate::key::{PrivateKey, PublicKey};

pub use forget::forget;
pub(crate) use forget::forget_here;

/// What `SetCredential=` in latchkey.service puts in the place of an identity that is no longer
/// there. systemd 252 refuses an empty value, and fails the unit when a credential has neither file
/// nor value.
pub const NO_IDENTITY: &[u8] = b"none";

/// Longest record read, in bytes.
const MAX_RECORD: usize = 4096;

const RECORD_VERSION: u64 = 1;

/// The directory, `/run/latchkey` but in tests.
#[derive(Debug, Clone)]
pub struct HandOver {
    directory: PathBuf,
}

/// What stays of an identity that was taken. No secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    version: u64,
    pub network: String,
    /// WireGuard public key in base64.
    pub public_key: String,
    /// UUID of the LUKS volume that was opened.
    pub volume: String,
    /// When it was taken, in milliseconds since the kernel started (CLOCK_BOOTTIME).
    pub taken_at_ms: u64,
}

/// Where the identity is in its life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// Handed over, not yet taken by the service.
    Waiting,
    /// In the device and the agent, nowhere else.
    Taken(Record),
    /// There is none in this boot; why, and what to do.
    Missing(String),
}

impl Default for HandOver {
    fn default() -> Self {
        Self::at("/run/latchkey")
    }
}

impl HandOver {
    pub fn at(directory: impl Into<PathBuf>) -> Self {
        Self { directory: directory.into() }
    }

    fn identity_path(&self) -> PathBuf {
        self.directory.join("identity")
    }

    fn record_path(&self) -> PathBuf {
        self.directory.join("handover.json")
    }

    fn timeline_path(&self) -> PathBuf {
        self.directory.join("timeline.json")
    }

    /// The right to be the agent of this machine, until dropped or the process ends. `None` if
    /// there is no hand-over to lock; two agents would then still do the same to the device.
    ///
    /// # Errors
    /// [`Error::AgentRunning`] if another process has it.
    pub fn lock(&self) -> Result<Option<fs::File>> {
        let directory = match fs::File::open(&self.directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened.map_err(|source| file("open", &self.directory, source))?,
        };
        match directory.try_lock() {
            Ok(()) => Ok(Some(directory)),
            Err(fs::TryLockError::WouldBlock) => Err(Error::AgentRunning),
            Err(fs::TryLockError::Error(source)) => Err(file("lock", &self.directory, source)),
        }
    }

    /// The identity: from systemd's directory of credentials if there is one, else as it was handed
    /// over. `None` if it is gone.
    pub fn identity(&self, credentials: Option<&Path>) -> Result<Option<Identity>> {
        let path = credentials
            .map_or_else(|| self.identity_path(), |directory| directory.join("identity"));
        let Some(bytes) = read(&path, MAX_IDENTITY)? else { return Ok(None) };
        if bytes.is_empty() || *bytes == NO_IDENTITY {
            return Ok(None);
        }
        let unusable =
            |error: latchkey_wire::Error| Error::BadIdentity { path, reason: error.to_string() };
        Identity::from_json(&bytes).map(Some).map_err(unusable)
    }

    pub fn record(&self) -> Result<Option<Record>> {
        let path = self.record_path();
        let Some(bytes) = read(&path, MAX_RECORD)? else { return Ok(None) };
        let unusable = |reason: String| Error::BadIdentity { path: self.record_path(), reason };
        let record: Record =
            serde_json::from_slice(&bytes).map_err(|error| unusable(error.to_string()))?;
        if record.version != RECORD_VERSION {
            return Err(unusable(format!("version {}, known is {RECORD_VERSION}", record.version)));
        }
        Ok(Some(record))
    }

    /// How the disk was opened in this boot. One that cannot be read is none: it explains, it
    /// decides nothing.
    pub fn timeline(&self) -> Result<Option<Timeline>> {
        match self.boot() {
            Err(error @ Error::BadTimeline { .. }) => {
                log::warn!("{error}");
                Ok(None)
            }
            read => read,
        }
    }

    /// The same for whoever asks for nothing else.
    ///
    /// # Errors
    /// [`Error::BadTimeline`] if it cannot be understood.
    pub fn boot(&self) -> Result<Option<Timeline>> {
        let path = self.timeline_path();
        let Some(bytes) = read(&path, MAX_TIMELINE)? else { return Ok(None) };
        let bad =
            |error: latchkey_wire::Error| Error::BadTimeline { path, reason: error.to_string() };
        Timeline::from_json(&bytes).map(Some).map_err(bad)
    }

    pub fn state(&self) -> Result<State> {
        if fs::exists(self.identity_path())
            .map_err(|source| file("look for", &self.identity_path(), source))?
        {
            return Ok(State::Waiting);
        }
        if let Some(record) = self.record()? {
            return Ok(State::Taken(record));
        }
        Ok(State::Missing(self.timeline()?.as_ref().map_or_else(no_timeline, why_no_identity)))
    }

    /// Why a boot rightly has no identity, so that there is nothing for an agent to do: Latchkey
    /// unlocked nothing, or the machine did not let itself in. `None` if there is an identity,
    /// or if one is missing that should be there.
    pub fn reason_to_stay_idle(&self) -> Result<Option<String>> {
        let State::Missing(reason) = self.state()? else { return Ok(None) };
        let let_itself_in =
            self.timeline()?.is_some_and(|timeline| timeline.outcome == Outcome::Unlocked);
        Ok((!let_itself_in).then_some(reason))
    }

    /// The private key of this node: from the identity, or, once that is gone, the key that the
    /// device has.
    ///
    /// # Errors
    /// [`Error::NoIdentity`] if there is neither, [`Error::OtherNetwork`] if it belongs to another
    /// network than `network`.
    pub fn private_key(
        &self,
        network: &str,
        credentials: Option<&Path>,
        device: Option<PrivateKey>,
    ) -> Result<PrivateKey> {
        if let Some(identity) = self.identity(credentials)? {
            same_network(&identity.network, network)?;
            return Ok(PrivateKey::new(&identity.private_key));
        }
        match (self.state()?, device) {
            (State::Taken(record), Some(key)) => {
                same_network(&record.network, network)?;
                same_key(&record, key)
            }
            (State::Taken(_), None) => Err(Error::NoIdentity {
                reason: "the identity of this boot was taken before, and the device that carried \
                         it is gone; reboot"
                    .into(),
            }),
            (_, Some(key)) => {
                log::warn!(
                    "nothing was handed over; going on with the key that the device has ({})",
                    key.public()
                );
                Ok(key)
            }
            (State::Missing(reason), None) => Err(Error::NoIdentity { reason }),
            (State::Waiting, None) => Err(Error::NoIdentity {
                reason: format!(
                    "{} is there, but was not passed on as a credential; see LoadCredential= in \
                     latchkey.service",
                    self.identity_path().display()
                ),
            }),
        }
    }
}

fn same_network(handed_over: &str, configured: &str) -> Result<()> {
    if handed_over == configured {
        return Ok(());
    }
    Err(Error::OtherNetwork { handed_over: handed_over.into(), configured: configured.into() })
}

fn same_key(record: &Record, key: PrivateKey) -> Result<PrivateKey> {
    if record.public_key.parse::<PublicKey>()? == key.public() {
        return Ok(key);
    }
    Err(Error::NoIdentity {
        reason: format!(
            "the identity of this boot was {}, and another program has given the device another \
             key ({}); reboot",
            record.public_key,
            key.public()
        ),
    })
}

fn no_timeline() -> String {
    "nothing was unlocked by Latchkey in this boot (no /run/latchkey/timeline.json); if it should \
     have been, see that the initramfs has the dracut module 50latchkey"
        .into()
}

fn why_no_identity(timeline: &Timeline) -> String {
    let reason =
        timeline.reason.as_deref().map_or_else(String::new, |reason| format!(" ({reason})"));
    match timeline.outcome {
        Outcome::Recovery => format!(
            "the disk was opened with the recovery passphrase, not by the machine itself{reason}, \
             and only a machine that lets itself in gets an identity; repair that, then reboot"
        ),
        Outcome::Refused => {
            format!("the key server refused this machine{reason}; release it there, then reboot")
        }
        Outcome::Failed => {
            format!("the machine could not unlock by itself{reason}; repair that, then reboot")
        }
        Outcome::Unlocked => "the disk was unlocked, but no identity was made: the initramfs \
                              found no latchkey.mesh in the cloud-config, or could not make one \
                              (see the log of the boot); correct it, then reboot"
            .into(),
    }
}

/// A file of at most `limit` bytes; `None` if there is none. A longer one is cut after one byte too
/// many, which its parser refuses.
fn read(path: &Path, limit: usize) -> Result<Option<Zeroizing<Vec<u8>>>> {
    let opened = match fs::File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(|source| file("open", path, source))?,
    };
    // Room for all from the start: a vector that grows leaves copies behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(limit + 1));
    opened
        .take(limit as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(|source| file("read", path, source))?;
    Ok(Some(bytes))
}

fn file(action: &'static str, path: &Path, source: io::Error) -> Error {
    match source.kind() {
        io::ErrorKind::PermissionDenied => {
            Error::NotPermitted { action: format!("{action} {}", path.display()) }
        }
        _ => Error::File { action, path: path.into(), source },
    }
}

#[cfg(test)]
mod tests;
