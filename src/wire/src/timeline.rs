//! The timeline of one boot: every step from the start of the initramfs program to the open volume, in milliseconds
//! since the kernel started (CLOCK_BOOTTIME). Written to `/run/latchkey/timeline.json`; holds no secret.

use serde::{Deserialize, Serialize};

use crate::{Error, Result, go_json};

/// The format of the file.
pub const VERSION: u64 = 1;

/// Longest timeline read, in bytes.
pub const MAX_TIMELINE: usize = 256 * 1024;

const WHAT: &str = "timeline";

/// How the unlock ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// By TPM or key server, without a person.
    Unlocked,
    /// By a recovery passphrase that a person typed.
    Recovery,
    /// The key server said no.
    Refused,
    /// It could not be tried to the end.
    Failed,
}

/// Where the passphrase was to come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// The TPM alone.
    Offline,
    /// A key server.
    Online,
}

/// One step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// A short name in lower case with dashes, e.g. `tpm-open`.
    pub name: String,
    /// When it began, in milliseconds since the kernel started.
    pub at_ms: u64,
    /// How long it took, in milliseconds.
    pub took_ms: u64,
}

/// What became of one volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeOutcome {
    /// The label it was looked for by.
    pub label: String,
    /// The partition, e.g. `/dev/sda3`, where it was found.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// UUID of the LUKS2 volume, where it was opened.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uuid: Option<String>,
    /// `/dev/mapper/NAME`, where it was opened.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mapper: Option<String>,
    /// How it ended.
    pub outcome: Outcome,
    /// Why it did not unlock by itself, in one line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// All steps of one boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timeline {
    version: u64,
    /// The kernel's `boot_id`.
    pub boot_id: String,
    /// How it ended.
    pub outcome: Outcome,
    /// Where the passphrase was to come from.
    pub mode: Mode,
    /// Why it did not unlock by itself, in one line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Each volume that was to be opened. Empty in what was written before there were several.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<VolumeOutcome>,
    /// In the order they began.
    pub steps: Vec<Step>,
}

impl Timeline {
    /// A timeline of the present version.
    #[must_use]
    pub fn new(boot_id: impl Into<String>, outcome: Outcome, mode: Mode) -> Self {
        Self {
            version: VERSION,
            boot_id: boot_id.into(),
            outcome,
            mode,
            reason: None,
            volumes: Vec::new(),
            steps: Vec::new(),
        }
    }

    /// The file's content, without a newline.
    pub fn to_json(&self) -> Result<String> {
        serde_json::to_string(self).map_err(|error| go_json::json_error(WHAT, &error))
    }

    /// Reads the file's content.
    pub fn from_json(json: &[u8]) -> Result<Self> {
        if json.len() > MAX_TIMELINE {
            return Err(Error::TooLong { what: WHAT, limit: MAX_TIMELINE, got: json.len() });
        }
        let timeline: Self =
            serde_json::from_slice(json).map_err(|error| go_json::json_error(WHAT, &error))?;
        if timeline.version != VERSION {
            return Err(Error::Version { what: WHAT, got: timeline.version, known: VERSION });
        }
        Ok(timeline)
    }
}
