//! `latchkey status`: the node as it is, for a person in the style of `wg show`, or as JSON. Never
//! a private key.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::time::{Duration, SystemTime};

use latchkey_config::Mesh;
use latchkey_wire::timeline::{Mode, Outcome};
use serde::Serialize;

use crate::device::{Device, Peer};
use crate::error::Result;
use crate::handover::{HandOver, State};
use crate::key::PublicKey;

/// The version of the JSON form. Fields may be added; what is there keeps its meaning.
const VERSION: u32 = 1;

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Status {
    version: u32,
    network: String,
    prefix: String,
    interface: String,
    /// None if there is no such interface.
    device: Option<DeviceStatus>,
    identity: IdentityStatus,
    /// None if Latchkey unlocked nothing in this boot.
    boot: Option<BootStatus>,
    peers: Vec<PeerStatus>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct DeviceStatus {
    public_key: Option<String>,
    addresses: Vec<String>,
    listen_port: u16,
    mtu: u32,
    up: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "lowercase")]
enum IdentityStatus {
    Waiting,
    Taken { public_key: String, network: String, volume: String, taken_at_ms: u64 },
    Missing { reason: String },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct BootStatus {
    outcome: Outcome,
    mode: Mode,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct PeerStatus {
    public_key: String,
    endpoint: Option<String>,
    allowed_ips: Vec<String>,
    /// Seconds since 1970.
    latest_handshake: Option<u64>,
    received_bytes: u64,
    sent_bytes: u64,
    /// Seconds; 0 is off.
    persistent_keepalive: u16,
}

impl Status {
    /// # Errors
    /// [`crate::error::Error::NotPermitted`] without CAP_NET_ADMIN.
    pub fn read(mesh: &Mesh, hand_over: &HandOver) -> Result<Self> {
        let snapshot = Device::open(&mesh.interface)?.read()?;
        let (device, peers) = snapshot
            .map_or((None, BTreeMap::new()), |snapshot| (Some(snapshot.actual), snapshot.peers));
        Ok(Self {
            version: VERSION,
            network: mesh.network.clone(),
            prefix: mesh.prefix.to_string(),
            interface: mesh.interface.clone(),
            device: device.map(|actual| DeviceStatus {
                public_key: actual.public_key.map(|key| key.to_string()),
                addresses: actual.addresses.iter().map(ToString::to_string).collect(),
                listen_port: actual.port,
                mtu: actual.mtu,
                up: actual.up,
            }),
            identity: hand_over.state()?.into(),
            boot: hand_over.timeline()?.map(|timeline| BootStatus {
                outcome: timeline.outcome,
                mode: timeline.mode,
                reason: timeline.reason,
            }),
            peers: peers.into_iter().map(PeerStatus::from).collect(),
        })
    }

    /// Whether the node has its device, up and with a key.
    pub fn is_up(&self) -> bool {
        self.device.as_ref().is_some_and(|device| device.up && device.public_key.is_some())
    }

    pub fn to_json(&self) -> Result<String, serde_json::Error> {
        serde_json::to_string_pretty(self)
    }

    /// The text form; `now` makes ages out of times.
    pub fn to_text(&self, now: SystemTime) -> String {
        let mut text = String::new();
        // Writing to a String cannot fail.
        let _ = self.write_text(&mut text, now);
        text
    }

    fn write_text(&self, out: &mut String, now: SystemTime) -> fmt::Result {
        writeln!(out, "interface: {}", self.interface)?;
        writeln!(out, "  network: {}", self.network)?;
        match &self.device {
            None => writeln!(out, "  device: none")?,
            Some(device) => device.write_text(out)?,
        }
        writeln!(out, "  identity: {}", self.identity)?;
        if let Some(boot) = &self.boot {
            writeln!(out, "  boot: {boot}")?;
        }
        if self.peers.is_empty() {
            writeln!(out, "\npeers: none")?;
        }
        self.peers.iter().try_for_each(|peer| peer.write_text(out, now))
    }
}

impl DeviceStatus {
    fn write_text(&self, out: &mut String) -> fmt::Result {
        if let Some(public_key) = &self.public_key {
            writeln!(out, "  public key: {public_key}")?;
            writeln!(out, "  private key: (hidden)")?;
        }
        for address in &self.addresses {
            writeln!(out, "  address: {address}")?;
        }
        writeln!(out, "  listening port: {}", self.listen_port)?;
        writeln!(out, "  mtu: {}", self.mtu)?;
        writeln!(out, "  state: {}", if self.up { "up" } else { "down" })
    }
}

impl PeerStatus {
    fn write_text(&self, out: &mut String, now: SystemTime) -> fmt::Result {
        writeln!(out, "\npeer: {}", self.public_key)?;
        if let Some(endpoint) = &self.endpoint {
            writeln!(out, "  endpoint: {endpoint}")?;
        }
        let allowed_ips =
            if self.allowed_ips.is_empty() { "(none)".into() } else { self.allowed_ips.join(", ") };
        writeln!(out, "  allowed ips: {allowed_ips}")?;
        if let Some(seconds) = self.latest_handshake {
            let age = now
                .duration_since(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds))
                .unwrap_or_default();
            writeln!(out, "  latest handshake: {}", ago(age))?;
        }
        if self.received_bytes + self.sent_bytes > 0 {
            writeln!(
                out,
                "  transfer: {} received, {} sent",
                size(self.received_bytes),
                size(self.sent_bytes)
            )?;
        }
        if self.persistent_keepalive > 0 {
            writeln!(out, "  persistent keepalive: every {} seconds", self.persistent_keepalive)?;
        }
        Ok(())
    }
}

impl From<State> for IdentityStatus {
    fn from(state: State) -> Self {
        match state {
            State::Waiting => Self::Waiting,
            State::Taken(record) => Self::Taken {
                public_key: record.public_key,
                network: record.network,
                volume: record.volume,
                taken_at_ms: record.taken_at_ms,
            },
            State::Missing(reason) => Self::Missing { reason },
        }
    }
}

impl From<(PublicKey, Peer)> for PeerStatus {
    fn from((public_key, peer): (PublicKey, Peer)) -> Self {
        let since_1970 = |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).ok();
        Self {
            public_key: public_key.to_string(),
            endpoint: peer.endpoint.map(|endpoint| endpoint.to_string()),
            allowed_ips: peer.allowed_ips.iter().map(ToString::to_string).collect(),
            latest_handshake: peer.last_handshake.and_then(since_1970).map(|age| age.as_secs()),
            received_bytes: peer.received_bytes,
            sent_bytes: peer.sent_bytes,
            persistent_keepalive: peer.persistent_keepalive,
        }
    }
}

impl fmt::Display for IdentityStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Waiting => f.write_str("handed over, not yet taken by the service"),
            Self::Taken { taken_at_ms, .. } => {
                write!(
                    f,
                    "taken {}.{:03} s after the kernel started; no copy is left",
                    taken_at_ms / 1000,
                    taken_at_ms % 1000
                )
            }
            Self::Missing { reason } => write!(f, "none: {reason}"),
        }
    }
}

impl fmt::Display for BootStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(describe(self.outcome, self.mode))?;
        self.reason.as_ref().map_or(Ok(()), |reason| write!(f, " ({reason})"))
    }
}

/// How an unlock ended, in a few words.
pub(crate) fn describe(outcome: Outcome, mode: Mode) -> &'static str {
    match (outcome, mode) {
        (Outcome::Unlocked, Mode::Online) => "unlocked by the key server",
        (Outcome::Unlocked, Mode::Offline) => "unlocked by the TPM",
        (Outcome::Recovery, _) => "unlocked with the recovery passphrase",
        (Outcome::Refused, _) => "refused by the key server",
        (Outcome::Failed, _) => "not unlocked",
    }
}

/// As wg(8) says it: `1 hour, 2 minutes, 3 seconds ago`.
fn ago(age: Duration) -> String {
    let seconds = age.as_secs();
    let units = [
        ("day", seconds / 86400),
        ("hour", seconds / 3600 % 24),
        ("minute", seconds / 60 % 60),
        ("second", seconds % 60),
    ];
    let parts: Vec<_> = units
        .into_iter()
        .filter(|(_, count)| *count > 0)
        .map(|(unit, count)| format!("{count} {unit}{}", if count == 1 { "" } else { "s" }))
        .collect();
    if parts.is_empty() { "now".into() } else { format!("{} ago", parts.join(", ")) }
}

/// As wg(8) says it: `1.21 KiB`.
fn size(bytes: u64) -> String {
    const UNITS: [(&str, u32); 4] = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
    UNITS.into_iter().find(|(_, shift)| bytes >> shift > 0).map_or_else(
        || format!("{bytes} B"),
        |(unit, shift)| format!("{:.2} {unit}", bytes as f64 / (1u64 << shift) as f64),
    )
}

#[cfg(test)]
mod tests;
