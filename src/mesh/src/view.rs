//! What the agent knows, as it shows it to others: `latchkey status`, `latchkey info`, the metrics. No secret is in it.
//!
//! The agent publishes a new view over a `tokio::sync::watch` channel after each change. Its JSON form is what
//! `latchkey status` gets over the socket.

use serde::{Deserialize, Serialize};

/// Fields may be added; what is there keeps its meaning. One that is missing, because the agent that runs is older than the
/// program that asks it, is as if it were empty.
pub const VERSION: u32 = 1;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct View {
    pub version: u32,
    pub node: Node,
    /// None: the agent has no registry.
    pub registry: Option<RegistryView>,
    /// The others, by name and then by key.
    pub members: Vec<MemberView>,
    /// Records that do not count, and why.
    pub problems: Vec<Problem>,
    pub counters: Counters,
}

/// This node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct Node {
    pub name: String,
    pub public_key: String,
    /// The mesh: `fd10::/16`.
    pub mesh: String,
    /// None until it is claimed, or known from the cache.
    pub allowed_ip: Option<String>,
    pub advertise_address: String,
    pub wg_port: u16,
    pub interface: String,
    /// `kernel` or `userspace`.
    pub backend: String,
    pub mtu: u32,
    /// Seconds; 0 is off.
    pub persistent_keepalive: u16,
    /// What is wrong with the device, if something is.
    pub trouble: Option<String>,
    /// When the device was complete for the first time, in milliseconds since the kernel started (CLOCK_BOOTTIME).
    pub up_at_ms: Option<u64>,
    /// When the own record was in the registry and the others' on the device, likewise.
    pub joined_at_ms: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct RegistryView {
    /// `nats://10.0.0.5:4222, bucket ikto-mesh`.
    pub at: String,
    pub state: RegistryState,
    /// Why it is not `Joined`.
    pub reason: Option<String>,
    /// Seconds since 1970, of the last change of `state`.
    pub since: u64,
    /// The own record's revision.
    pub revision: Option<u64>,
    /// Whether what is known of the members is from the cache, not from the registry.
    pub from_cache: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum RegistryState {
    /// Not reached so far, or lost: the last known members stay.
    #[default]
    Away,
    /// Read, but the own record is not in it: `reason` says why.
    Refused,
    Joined,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct MemberView {
    pub name: String,
    pub public_key: String,
    pub advertise_address: String,
    pub wg_port: u16,
    /// As in the record; a node with two records has two.
    pub allowed_ips: Vec<String>,
    pub signed: bool,
    pub capabilities: Vec<String>,
    /// The newest record's.
    pub revision: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct Problem {
    /// The registry's key.
    pub key: String,
    pub revision: u64,
    pub reason: String,
}

/// Since the agent started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct Counters {
    /// Times that everything was read anew.
    pub snapshots: u64,
    /// Puts and deletions that came one by one.
    pub updates: u64,
    /// Times that the registry was lost.
    pub lost: u64,
    /// Rounds in which something had to be changed on the device, and peers set or removed by them.
    pub repairs: u64,
    pub peers_set: u64,
    pub peers_removed: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_view_of_an_older_or_a_later_agent_is_read() {
        let text = r#"{"version": 1, "node": {"name": "a", "colour": "blue"}, "registry": {"state": "joined"},
                       "members": [{"name": "b"}], "weather": []}"#;
        let view: View = serde_json::from_str(text).unwrap();
        assert_eq!((view.node.name.as_str(), view.members.len()), ("a", 1));
        assert_eq!(view.registry.unwrap().state, RegistryState::Joined);
    }
}
