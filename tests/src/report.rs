//! What a booted machine tells the harness about itself: one line on the console, `REPORT {json}`, written by
//! `latchkey-guest-report` in the root image and read here.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

/// Stands before a secret, in hex, in a string of the firmware's tables (SMBIOS type 11).
pub const SECRET_TAG: &str = "latchkey.secret:";

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    pub persistent: Persistent,
    /// `ActiveState/SubState/Result` of latchkey.service.
    pub service: String,
    /// What came after the initramfs, in milliseconds since the kernel started.
    pub milestones: Milestones,
    /// `latchkey status --json`: its answer, or null.
    pub status: Value,
    /// Why `status` is null.
    pub status_error: Option<String>,
    pub wireguard: Option<WireGuard>,
    /// /run/latchkey/timeline.json, or null.
    pub timeline: Value,
    /// /run/latchkey/agent/milestones.json, or null.
    pub mesh: Value,
    /// Files left below /run/latchkey, with their modes: `0600 /run/latchkey/identity`.
    pub run_files: Vec<String>,
    pub leaks: LeakScan,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Milestones {
    /// The root file system's systemd began: just after switch-root.
    pub system_ms: Option<u64>,
    /// latchkey.service began, and was ready.
    pub service_ms: Option<u64>,
    pub service_ready_ms: Option<u64>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Persistent {
    /// What is mounted at /usr/local.
    pub source: Option<String>,
    pub hello: Option<String>,
    /// SHA-256 of data.bin, lower-case hex.
    pub data_sha256: Option<String>,
    /// How many boots have got this far, this one included; counted in a file on the volume.
    pub boots: Option<u32>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct WireGuard {
    pub interface: String,
    pub public_key: String,
    pub listen_port: u16,
    /// As `ip` prints them: `fd10::1/16`.
    pub addresses: Vec<String>,
    pub up: bool,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct LeakScan {
    /// The secrets that were searched for, by kind.
    pub secrets: Vec<String>,
    pub files: usize,
    pub processes: usize,
    pub journal_bytes: usize,
    /// A secret that was planted for the search to find, and removed: the search can find something.
    pub planted_found: bool,
    /// `KIND as FORM in PLACE`, one for each find.
    pub found: Vec<String>,
    /// By which the host can look for the same secrets where the guest cannot: on the console.
    pub fingerprints: Vec<Fingerprint>,
}

/// A secret in one form, without the secret.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Fingerprint {
    pub kind: String,
    pub form: String,
    /// Bytes of that form.
    pub length: usize,
    /// Lower-case hex.
    pub sha256: String,
}

impl Fingerprint {
    pub fn of(kind: &str, form: &str, bytes: &[u8]) -> Self {
        Self {
            kind: kind.to_owned(),
            form: form.to_owned(),
            length: bytes.len(),
            sha256: sha256(bytes),
        }
    }

    /// Whether the secret stands anywhere in `text`.
    pub fn is_in(&self, text: &str) -> bool {
        self.length > 0 && text.as_bytes().windows(self.length).any(|w| sha256(w) == self.sha256)
    }
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

impl Report {
    /// Parses the console's line.
    pub fn parse(line: &str) -> Result<Self> {
        let json = line.strip_prefix("REPORT ").ok_or_else(|| Error::Report(line.to_owned()))?;
        serde_json::from_str(json).map_err(|e| Error::Report(format!("{e} in {line}")))
    }
}

#[cfg(test)]
mod tests {
    use super::Fingerprint;

    #[test]
    fn a_fingerprint_finds_its_secret_and_no_other() {
        let print = Fingerprint::of("passphrase", "text", b"open sesame");
        for (text, there) in [
            ("open sesame", true),
            ("say open sesame!", true),
            ("open Sesame", false),
            ("open sesam", false),
            ("", false),
        ] {
            assert_eq!(print.is_in(text), there, "{text:?}");
        }
        assert!(!Fingerprint::of("nothing", "text", b"").is_in("anything"));
    }
}
