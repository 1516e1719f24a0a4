//! What has to change on a device so that it is what it should be. Pure: an equal device yields an
//! empty plan, and is not touched.

mod peers;

use std::collections::BTreeMap;
use std::fmt;
use std::time::SystemTime;

use crate::address::DeviceAddress;
use crate::key::PublicKey;

pub use peers::{DesiredPeer, HANDSHAKE_EXPIRES, Memory, Peer, PeerChange};

/// How the WireGuard device should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Desired {
    pub public_key: PublicKey,
    pub port: u16,
    pub mtu: u32,
    /// None: parked. Key, port and MTU are seen to, but nothing else: no address is added or
    /// removed, no peer either, and a link that is down stays down.
    pub address: Option<DeviceAddress>,
    /// All there should be; others are removed.
    pub peers: BTreeMap<PublicKey, DesiredPeer>,
}

/// How it is, without its peers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Actual {
    /// None as long as no key was set.
    pub public_key: Option<PublicKey>,
    /// 0 as long as none was set and the link is down.
    pub port: u16,
    pub mtu: u32,
    pub up: bool,
    /// Without link-local ones.
    pub addresses: Vec<DeviceAddress>,
}

/// One step. In the order of this list, which is the order to apply them in: a device is complete
/// before it goes up, so that its port is its own from the first packet on; an allowed IP gets its
/// new owner before the former one goes; and the new address is there before the old one goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    Create { mtu: u32 },
    SetKey { public_key: PublicKey },
    SetPort(u16),
    SetMtu(u32),
    SetPeer(PeerChange),
    RemovePeer(PublicKey),
    AddAddress(DeviceAddress),
    RemoveAddress(DeviceAddress),
    SetUp,
}

/// The difference between `desired` and what is there; no `actual` is no device at all. `memory` is
/// what was set before, and `now` the time of the look at the device.
pub fn plan(
    desired: &Desired,
    actual: Option<&Actual>,
    peers: &BTreeMap<PublicKey, Peer>,
    memory: &Memory,
    now: SystemTime,
) -> Vec<Change> {
    let fresh;
    let (mut changes, actual) = match actual {
        Some(actual) => (Vec::new(), actual),
        None => {
            fresh = Actual::created(desired.mtu);
            (vec![Change::Create { mtu: desired.mtu }], &fresh)
        }
    };
    if actual.public_key != Some(desired.public_key) {
        changes.push(Change::SetKey { public_key: desired.public_key });
    }
    if actual.port != desired.port {
        changes.push(Change::SetPort(desired.port));
    }
    if actual.mtu != desired.mtu {
        changes.push(Change::SetMtu(desired.mtu));
    }
    let Some(wanted) = desired.address else { return changes };
    peers::plan(&mut changes, desired, peers, memory, now);
    if !actual.addresses.contains(&wanted) {
        changes.push(Change::AddAddress(wanted));
    }
    let foreign = actual.addresses.iter().filter(|address| **address != wanted);
    changes.extend(foreign.copied().map(Change::RemoveAddress));
    if !actual.up {
        changes.push(Change::SetUp);
    }
    changes
}

/// What is there once `changes` are applied, as far as it does not follow from what the device does
/// by itself.
pub(crate) fn settle(
    actual: &mut Actual,
    peers: &mut BTreeMap<PublicKey, Peer>,
    desired: &Desired,
    changes: &[Change],
) {
    for change in changes {
        match change {
            Change::SetKey { public_key } => actual.public_key = Some(*public_key),
            Change::SetPort(port) => actual.port = *port,
            Change::SetMtu(mtu) => actual.mtu = *mtu,
            Change::AddAddress(address) => actual.addresses.push(*address),
            Change::RemoveAddress(address) => actual.addresses.retain(|other| other != address),
            Change::SetUp => actual.up = true,
            Change::Create { .. } | Change::SetPeer(_) | Change::RemovePeer(_) => {}
        }
    }
    if desired.address.is_some() {
        peers::settle(peers, desired, changes);
    }
}

impl Change {
    pub(crate) fn is_about_peers(&self) -> bool {
        matches!(self, Self::SetPeer(_) | Self::RemovePeer(_))
    }
}

impl Actual {
    /// A device as it is made.
    pub(crate) fn created(mtu: u32) -> Self {
        Self { public_key: None, port: 0, mtu, up: false, addresses: Vec::new() }
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Create { mtu } => write!(f, "create the device with MTU {mtu}"),
            Self::SetKey { public_key } => write!(f, "set the key of {public_key}"),
            Self::SetPort(port) => write!(f, "listen on port {port}"),
            Self::SetMtu(mtu) => write!(f, "set MTU {mtu}"),
            Self::SetPeer(change) => change.fmt(f),
            Self::RemovePeer(public_key) => write!(f, "remove the peer {public_key}"),
            Self::AddAddress(address) => write!(f, "add {address}"),
            Self::RemoveAddress(address) => write!(f, "remove {address}"),
            Self::SetUp => f.write_str("set it up"),
        }
    }
}

#[cfg(test)]
mod tests;
