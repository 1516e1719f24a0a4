//! `latchkey status`: the node, its registry and its peers, as the device has them and as the agent knows them. For a person or as
//! JSON; never a private key.
//!
//! The device tells who is heard of, the agent what they are called and where the registry is. Each may be missing: without an
//! agent the device is shown alone, and that it is so.

#[cfg(test)]
mod tests;
mod text;
mod watch;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::SystemTime;

use latchkey_wire::member::Cidr;
use latchkey_wire::timeline::{Mode, Outcome};
use serde::Serialize;

use crate::device::{Backend, Device, Peer};
use crate::error::{Error, Result};
use crate::handover::{HandOver, State};
use crate::key::PublicKey;
use crate::settings::{KeyFrom, Settings};
use crate::view::{Counters, MemberView, Node, Problem, RegistryView, View};

pub use text::Detail;
pub(crate) use text::describe;
#[cfg(test)]
use text::size;
pub use watch::{Form, watch};

/// The version of the JSON form. Fields may be added; what is there keeps its meaning.
const VERSION: u32 = 1;

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Status {
    version: u32,
    /// None with an ikto.json.
    network: Option<String>,
    /// The mesh.
    prefix: String,
    interface: String,
    /// None if there is no such interface.
    device: Option<DeviceStatus>,
    /// Why it cannot be read: wireguard-go does not answer, say.
    device_error: Option<String>,
    /// None if it is only known which socket to ask.
    identity: Option<IdentityStatus>,
    /// None if Latchkey unlocked nothing in this boot.
    boot: Option<BootStatus>,
    /// None if there is no agent to tell: then `agent_error` says why.
    agent: Option<AgentStatus>,
    agent_error: Option<String>,
    /// By name and then by key; those without a record last.
    peers: Vec<PeerStatus>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct DeviceStatus {
    public_key: Option<String>,
    addresses: Vec<String>,
    listen_port: u16,
    mtu: u32,
    up: bool,
    /// `kernel` or `userspace`.
    backend: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "lowercase")]
enum IdentityStatus {
    Waiting,
    Taken {
        public_key: String,
        network: String,
        volume: String,
        taken_at_ms: u64,
    },
    Missing {
        reason: String,
    },
    /// `private_key_path` of an ikto.json.
    File {
        path: PathBuf,
    },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct BootStatus {
    outcome: Outcome,
    mode: Mode,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

/// [`View`], but for its members, who are among the peers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct AgentStatus {
    node: Node,
    registry: Option<RegistryView>,
    problems: Vec<Problem>,
    counters: Counters,
}

/// A peer of the device, a member that the agent knows, or both.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct PeerStatus {
    public_key: String,
    endpoint: Option<String>,
    /// As on the device.
    allowed_ips: Vec<String>,
    /// Seconds since 1970.
    latest_handshake: Option<u64>,
    received_bytes: u64,
    sent_bytes: u64,
    /// Seconds; 0 is off.
    persistent_keepalive: u16,
    on_device: bool,
    /// Whether it is reached elsewhere than where its record says. None if there is no telling: no endpoint, no record, or a
    /// name in it.
    roamed: Option<bool>,
    /// None if it has no record, or there is no agent to tell.
    member: Option<MemberView>,
}

impl Status {
    /// The node as `settings` have it, or, without them, as the agent says it is.
    ///
    /// # Errors
    /// [`crate::error::Error::NotPermitted`] without CAP_NET_ADMIN; without settings, why the agent cannot be asked.
    pub fn read(
        settings: Option<&Settings>,
        view: Result<View>,
        hand_over: &HandOver,
    ) -> Result<Self> {
        let (view, agent_error) = match view {
            Ok(view) => (Some(view), None),
            Err(error) if settings.is_none() => return Err(error),
            Err(error) => (None, Some(error.to_string())),
        };
        let interface = match (&view, settings) {
            (Some(view), _) if !view.node.interface.is_empty() => view.node.interface.clone(),
            (_, Some(settings)) => settings.interface.clone(),
            (_, None) => String::new(),
        };
        let prefix = match (settings, &view) {
            (Some(settings), _) => settings.mesh.to_string(),
            (None, Some(view)) => view.node.mesh.clone(),
            (None, None) => String::new(),
        };
        let (network, identity) = match settings.map(|settings| &settings.key) {
            None => (None, None),
            Some(KeyFrom::File(path)) => (None, Some(IdentityStatus::File { path: path.clone() })),
            Some(KeyFrom::HandOver { network }) => {
                (Some(network.clone()), Some(hand_over.state()?.into()))
            }
        };
        let (device, on_device, device_error) = match look(&interface) {
            Ok(Some((device, peers))) => (Some(device), peers, None),
            Ok(None) => (None, BTreeMap::new(), None),
            // The agent knows something all the same.
            Err(error @ Error::Kernel { .. }) if view.is_some() => {
                (None, BTreeMap::new(), Some(error.to_string()))
            }
            Err(error) => return Err(error),
        };
        let boot = match identity {
            Some(IdentityStatus::File { .. }) | None => None,
            Some(_) => hand_over.timeline()?,
        };
        let boot = boot.map(|timeline| BootStatus {
            outcome: timeline.outcome,
            mode: timeline.mode,
            reason: timeline.reason,
        });
        let (members, agent) = view.map_or((Vec::new(), None), |view| {
            let View { node, registry, members, problems, counters, .. } = view;
            (members, Some(AgentStatus { node, registry, problems, counters }))
        });
        let peers = merge(on_device, members);
        Ok(Self {
            version: VERSION,
            network,
            prefix,
            interface,
            device,
            device_error,
            identity,
            boot,
            agent,
            agent_error,
            peers,
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
    pub fn to_text(&self, detail: Detail, now: SystemTime) -> String {
        text::render(self, detail, now)
    }
}

/// The device, and its peers; none if there is none.
fn look(interface: &str) -> Result<Option<(DeviceStatus, BTreeMap<PublicKey, Peer>)>> {
    let mut opened = Device::open(interface)?;
    let Some(snapshot) = opened.read()? else { return Ok(None) };
    let actual = snapshot.actual;
    let device = DeviceStatus {
        public_key: actual.public_key.map(|key| key.to_string()),
        addresses: actual.addresses.iter().map(ToString::to_string).collect(),
        listen_port: actual.port,
        mtu: actual.mtu,
        up: actual.up,
        backend: match opened.backend() {
            Backend::Kernel => "kernel",
            Backend::Userspace => "userspace",
        },
    };
    Ok(Some((device, snapshot.peers)))
}

fn merge(on_device: BTreeMap<PublicKey, Peer>, members: Vec<MemberView>) -> Vec<PeerStatus> {
    let mut peers: BTreeMap<String, PeerStatus> = on_device
        .into_iter()
        .map(|(key, peer)| (key.to_string(), PeerStatus::of_device(key.to_string(), peer)))
        .collect();
    for member in members {
        let key = member.public_key.clone();
        let peer = peers.entry(key.clone()).or_insert_with(|| PeerStatus::of_nothing(key));
        peer.roamed = roamed(peer.endpoint.as_deref(), &member);
        peer.member = Some(member);
    }
    let mut peers: Vec<_> = peers.into_values().collect();
    peers.sort_by(|one, other| one.order().cmp(&other.order()));
    peers
}

fn roamed(endpoint: Option<&str>, member: &MemberView) -> Option<bool> {
    let endpoint: SocketAddr = endpoint?.parse().ok()?;
    let advertised: IpAddr = member.advertise_address.parse().ok()?;
    Some(endpoint != SocketAddr::new(advertised, member.wg_port))
}

impl PeerStatus {
    fn of_nothing(public_key: String) -> Self {
        Self {
            public_key,
            endpoint: None,
            allowed_ips: Vec::new(),
            latest_handshake: None,
            received_bytes: 0,
            sent_bytes: 0,
            persistent_keepalive: 0,
            on_device: false,
            roamed: None,
            member: None,
        }
    }

    fn of_device(public_key: String, peer: Peer) -> Self {
        let since_1970 = |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).ok();
        Self {
            public_key,
            endpoint: peer.endpoint.map(|endpoint| endpoint.to_string()),
            allowed_ips: peer.allowed_ips.iter().map(Cidr::to_string).collect(),
            latest_handshake: peer.last_handshake.and_then(since_1970).map(|age| age.as_secs()),
            received_bytes: peer.received_bytes,
            sent_bytes: peer.sent_bytes,
            persistent_keepalive: peer.persistent_keepalive,
            on_device: true,
            roamed: None,
            member: None,
        }
    }

    fn order(&self) -> (bool, Option<&str>, &str) {
        let name = self.member.as_ref().map(|member| member.name.as_str());
        (self.member.is_none(), name, &self.public_key)
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
