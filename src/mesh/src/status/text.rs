//! The text form of a status: the node in the style of `wg show`, then a line for each peer in that of `tailscale status`, because
//! of many peers one wants to see who is there and who is silent; [`Detail::Full`] shows each of them as `wg show` does.

use std::fmt::{self, Write as _};
use std::time::{Duration, SystemTime};

use latchkey_wire::member::Cidr;
use latchkey_wire::timeline::{Mode, Outcome};

use super::{
    AgentStatus, BootStatus, DeviceStatus, IdentityStatus, PeerStatus, RegistryView, Status,
};
use crate::terminal::printable;
use crate::view::{MemberView, Problem, RegistryState};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Detail {
    /// One line a peer.
    Brief,
    /// A block a peer.
    Full,
}

/// Names are cut so that a line stays one.
const LONGEST_NAME: usize = 32;
/// Further ones are counted.
const MOST_PROBLEMS: usize = 10;

pub(super) fn render(status: &Status, detail: Detail, now: SystemTime) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = write_all(&mut text, status, detail, now);
    text
}

fn write_all(out: &mut String, status: &Status, detail: Detail, now: SystemTime) -> fmt::Result {
    write_node(out, status, now)?;
    if let Some(agent) = &status.agent {
        write_problems(out, &agent.problems, detail)?;
    }
    if status.peers.is_empty() {
        return writeln!(out, "\npeers: none");
    }
    match detail {
        Detail::Brief => write_table(out, status, now),
        Detail::Full => {
            let known = status.device_error.is_none();
            status.peers.iter().try_for_each(|peer| write_peer(out, peer, known, now))
        }
    }
}

fn write_node(out: &mut String, status: &Status, now: SystemTime) -> fmt::Result {
    writeln!(out, "interface: {}", printable(&status.interface))?;
    if let Some(network) = &status.network {
        writeln!(out, "  network: {network}")?;
    }
    if let Some(agent) = &status.agent {
        write_named(out, "name", &agent.node.name)?;
    }
    match (&status.device, &status.device_error) {
        (Some(device), _) => write_device(out, device)?,
        (None, Some(error)) => writeln!(out, "  device: {}", printable(error))?,
        (None, None) => writeln!(out, "  device: none")?,
    }
    if let Some(agent) = &status.agent {
        write_agent(out, agent, now)?;
    }
    if let Some(error) = &status.agent_error {
        writeln!(out, "  agent: {}; this is the device alone", printable(error))?;
    }
    if let Some(identity) = &status.identity {
        writeln!(out, "  identity: {identity}")?;
    }
    status.boot.as_ref().map_or(Ok(()), |boot| writeln!(out, "  boot: {boot}"))
}

fn write_device(out: &mut String, device: &DeviceStatus) -> fmt::Result {
    if let Some(public_key) = &device.public_key {
        writeln!(out, "  public key: {public_key}")?;
        writeln!(out, "  private key: (hidden)")?;
    }
    for address in &device.addresses {
        writeln!(out, "  address: {address}")?;
    }
    writeln!(out, "  listening port: {}", device.listen_port)?;
    writeln!(out, "  mtu: {}", device.mtu)?;
    writeln!(
        out,
        "  state: {}{}",
        if device.up { "up" } else { "down" },
        if device.backend == "kernel" { "" } else { " (wireguard-go)" }
    )
}

fn write_agent(out: &mut String, agent: &AgentStatus, now: SystemTime) -> fmt::Result {
    if let Some(own) = &agent.node.allowed_ip {
        writeln!(out, "  own range: {}", printable(own))?;
    }
    if !agent.node.advertise_address.is_empty() {
        writeln!(
            out,
            "  advertised: {}",
            advertised(&agent.node.advertise_address, agent.node.wg_port)
        )?;
    }
    match &agent.registry {
        None => writeln!(out, "  registry: none is configured")?,
        Some(registry) => writeln!(out, "  registry: {}", Registry(registry, now))?,
    }
    agent
        .node
        .trouble
        .as_ref()
        .map_or(Ok(()), |trouble| writeln!(out, "  trouble: {}", printable(trouble)))
}

/// One line of others' words.
fn write_named(out: &mut String, what: &str, name: &str) -> fmt::Result {
    if name.is_empty() { Ok(()) } else { writeln!(out, "  {what}: {}", printable(name)) }
}

/// As it was published: a literal or a name, and a port.
fn advertised(address: &str, port: u16) -> String {
    if address.contains(':') {
        format!("[{}]:{port}", printable(address))
    } else {
        format!("{}:{port}", printable(address))
    }
}

pub(super) struct Registry<'a>(pub(super) &'a RegistryView, pub(super) SystemTime);

impl fmt::Display for Registry<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(registry, now) = self;
        f.write_str(match registry.state {
            RegistryState::Joined => "joined",
            RegistryState::Refused => "not joined",
            RegistryState::Away => "away",
        })?;
        if registry.since > 0 {
            match lasting(age(registry.since, *now)).as_str() {
                "" => f.write_str(" just now")?,
                time => write!(f, " for {time}")?,
            }
        }
        if let Some(reason) = &registry.reason {
            write!(f, ": {}", printable(reason))?;
        }
        write!(f, " ({}", printable(&registry.at))?;
        if let Some(revision) = registry.revision {
            write!(f, ", revision {revision}")?;
        }
        f.write_str(if registry.from_cache {
            "); the members are those that were known last"
        } else {
            ")"
        })
    }
}

fn write_problems(out: &mut String, problems: &[Problem], detail: Detail) -> fmt::Result {
    if problems.is_empty() {
        return Ok(());
    }
    writeln!(out, "\nrecords that do not count: {}", problems.len())?;
    let shown = if detail == Detail::Full { problems.len() } else { MOST_PROBLEMS };
    for problem in problems.iter().take(shown) {
        let (key, reason) = (printable(&problem.key), printable(&problem.reason));
        writeln!(out, "  {key} (revision {}): {reason}", problem.revision)?;
    }
    match problems.len().saturating_sub(shown) {
        0 => Ok(()),
        more => writeln!(out, "  and {more} more (--verbose shows them)"),
    }
}

/// One line a peer, each column as wide as it must be.
fn write_table(out: &mut String, status: &Status, now: SystemTime) -> fmt::Result {
    let device_known = status.device_error.is_none();
    let heading = ["address", "name", "endpoint", "handshake", "received", "sent"];
    let rows: Vec<[String; 6]> =
        status.peers.iter().map(|peer| row(peer, device_known, now)).collect();

    let mut widths = heading.map(str::len);
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    writeln!(out, "\npeers: {}", status.peers.len())?;
    write_row(out, heading.iter().copied(), widths)?;
    rows.iter().try_for_each(|row| write_row(out, row.iter().map(String::as_str), widths))
}

fn write_row<'a>(
    out: &mut String,
    cells: impl Iterator<Item = &'a str>,
    widths: [usize; 6],
) -> fmt::Result {
    let mut line = String::new();
    for (cell, width) in cells.zip(widths) {
        write!(line, "{cell:width$}  ")?;
    }
    writeln!(out, "{}", line.trim_end())
}

fn row(peer: &PeerStatus, device_known: bool, now: SystemTime) -> [String; 6] {
    let ranges = peer.member.as_ref().map_or(&peer.allowed_ips, |member| &member.allowed_ips);
    let address = match ranges.as_slice() {
        [] => "-".into(),
        [one] => short_range(one),
        [first, others @ ..] => format!("{} +{}", short_range(first), others.len()),
    };
    let endpoint = match &peer.endpoint {
        Some(endpoint) if peer.roamed == Some(true) => format!("{endpoint} (roamed)"),
        Some(endpoint) => endpoint.clone(),
        None if peer.on_device || !device_known => "-".into(),
        None => "(not on the device)".into(),
    };
    [
        address,
        name_of(peer),
        endpoint,
        peer.latest_handshake.map_or("never".into(), |at| short_ago(age(at, now))),
        size(peer.received_bytes),
        size(peer.sent_bytes),
    ]
}

/// A single address without its length.
fn short_range(range: &str) -> String {
    match range.parse::<Cidr>() {
        Ok(cidr) if cidr == Cidr::host(cidr.address()) => cidr.address().to_string(),
        _ => printable(range).into_owned(),
    }
}

/// The name; the beginning of the key where there is none.
pub(super) fn name_of(peer: &PeerStatus) -> String {
    let name = peer.member.as_ref().map_or("", |member| member.name.as_str());
    if name.is_empty() {
        let key: String = peer.public_key.chars().take(8).collect();
        return format!("({}…)", printable(&key));
    }
    let name = printable(name);
    if name.chars().count() <= LONGEST_NAME {
        return name.into_owned();
    }
    name.chars().take(LONGEST_NAME - 1).chain(['…']).collect()
}

fn write_peer(
    out: &mut String,
    peer: &PeerStatus,
    device_known: bool,
    now: SystemTime,
) -> fmt::Result {
    writeln!(out, "\npeer: {}", printable(&peer.public_key))?;
    if let Some(member) = &peer.member {
        write_named(out, "name", &member.name)?;
    }
    if !peer.on_device && device_known {
        writeln!(out, "  device: does not have it")?;
    }
    if let Some(endpoint) = &peer.endpoint {
        writeln!(out, "  endpoint: {endpoint}")?;
    }
    if peer.on_device {
        let allowed_ips =
            if peer.allowed_ips.is_empty() { "(none)".into() } else { peer.allowed_ips.join(", ") };
        writeln!(out, "  allowed ips: {allowed_ips}")?;
    }
    if let Some(at) = peer.latest_handshake {
        writeln!(out, "  latest handshake: {}", ago(age(at, now)))?;
    }
    if peer.received_bytes > 0 || peer.sent_bytes > 0 {
        writeln!(
            out,
            "  transfer: {} received, {} sent",
            size(peer.received_bytes),
            size(peer.sent_bytes)
        )?;
    }
    if peer.persistent_keepalive > 0 {
        writeln!(out, "  persistent keepalive: every {} seconds", peer.persistent_keepalive)?;
    }
    match &peer.member {
        Some(member) => write_record(out, member, peer.roamed == Some(true)),
        None => Ok(()),
    }
}

fn write_record(out: &mut String, member: &MemberView, roamed: bool) -> fmt::Result {
    writeln!(
        out,
        "  advertised: {}{}",
        advertised(&member.advertise_address, member.wg_port),
        if roamed { " (it has roamed)" } else { "" }
    )?;
    write!(out, "  record: {}", printable(&member.allowed_ips.join(", ")))?;
    write!(out, ", revision {}", member.revision)?;
    out.write_str(if member.signed { ", signed" } else { ", not signed" })?;
    if member.capabilities.is_empty() {
        return writeln!(out);
    }
    writeln!(out, ", {}", printable(&member.capabilities.join(", ")))
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
            Self::Missing { reason } => write!(f, "none: {}", printable(reason)),
            Self::File { path } => write!(f, "the private key in {}", path.display()),
        }
    }
}

impl fmt::Display for BootStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(describe(self.outcome, self.mode))?;
        self.reason.as_ref().map_or(Ok(()), |reason| write!(f, " ({})", printable(reason)))
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

/// From seconds since 1970; nothing for what lies ahead.
pub(super) fn age(at: u64, now: SystemTime) -> Duration {
    let at = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(at));
    at.and_then(|at| now.duration_since(at).ok()).unwrap_or_default()
}

/// As wg(8) says it: `1 hour, 2 minutes, 3 seconds ago`.
pub(super) fn ago(age: Duration) -> String {
    match lasting(age).as_str() {
        "" => "now".into(),
        time => format!("{time} ago"),
    }
}

/// Nothing for less than a second.
fn lasting(age: Duration) -> String {
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
    parts.join(", ")
}

/// The same for a column: its largest unit.
pub(super) fn short_ago(age: Duration) -> String {
    let seconds = age.as_secs();
    match seconds {
        0..60 => format!("{seconds}s ago"),
        60..3600 => format!("{}m ago", seconds / 60),
        3600..86400 => format!("{}h ago", seconds / 3600),
        _ => format!("{}d ago", seconds / 86400),
    }
}

/// As wg(8) says it: `1.21 KiB`.
pub(super) fn size(bytes: u64) -> String {
    const UNITS: [(&str, u32); 4] = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
    UNITS.into_iter().find(|(_, shift)| bytes >> shift > 0).map_or_else(
        || format!("{bytes} B"),
        |(unit, shift)| format!("{:.2} {unit}", bytes as f64 / (1u64 << shift) as f64),
    )
}
