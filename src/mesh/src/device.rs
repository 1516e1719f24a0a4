//! The kernel's WireGuard device: read it, plan, apply the difference. Run again it finds nothing
//! to do.
//!
//! Two kernel interfaces are at work: rtnetlink for the link and its addresses, generic netlink for
//! key, port and peers.

use std::collections::BTreeMap;
use std::io;
use std::time::SystemTime;

use nix::libc;

use crate::error::{Error, Result};
use crate::key::{PrivateKey, PublicKey};
use crate::netlink::events::Watched;
use crate::netlink::link::{Link, Links};
use crate::netlink::wireguard::WireGuard;
pub use crate::plan::Peer;
use crate::plan::{Actual, Change, Desired, Memory, plan, settle};

/// An interface by its name, and the way to it.
pub struct Device {
    interface: String,
    /// The interface's number as of the last look; 0 is none.
    index: u32,
    links: Links,
    /// Opened when first needed: asking for the family is what loads the module.
    wireguard: Option<WireGuard>,
    /// What the last look and our own changes since have left.
    known: Option<Known>,
    memory: Memory,
    refused: BTreeMap<PublicKey, String>,
}

/// Who carries the packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    Kernel,
    /// wireguard-go, spoken to over its socket.
    Userspace,
}

/// What a plan starts from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// The device as it is: whatever others have done to it is repaired.
    Fresh,
    /// The device as we left it, if it is known: for one changed record among thousands.
    Remembered,
}

#[derive(Debug)]
struct Known {
    actual: Actual,
    peers: BTreeMap<PublicKey, Peer>,
    /// When the device was looked at: peers that were alive then count as alive.
    at: SystemTime,
}

/// What a device is, as `latchkey status` shows it.
#[derive(Debug)]
pub struct Snapshot {
    pub actual: Actual,
    pub peers: BTreeMap<PublicKey, Peer>,
    private_key: Option<PrivateKey>,
}

impl Snapshot {
    /// The device's private key, for an agent that is started again and has no other copy.
    pub fn into_private_key(self) -> Option<PrivateKey> {
        self.private_key
    }
}

impl Device {
    /// Touches nothing yet.
    pub fn open(interface: &str) -> Result<Self> {
        let links = Links::open()
            .map_err(|source| Error::Kernel { action: "open a netlink socket".into(), source })?;
        Ok(Self {
            interface: interface.into(),
            index: 0,
            links,
            wireguard: None,
            known: None,
            memory: Memory::default(),
            refused: BTreeMap::new(),
        })
    }

    pub fn interface(&self) -> &str {
        &self.interface
    }

    /// The device as it is; `None` if there is no interface of that name.
    ///
    /// # Errors
    /// [`Error::NotWireGuard`] if the name belongs to something else.
    pub fn read(&mut self) -> Result<Option<Snapshot>> {
        let Some(link) = self.link()? else { return Ok(None) };
        match self.read_rest(&link) {
            // Removed since the link was read.
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
            rest => rest.map(Some).map_err(|source| {
                failed(format!("read the WireGuard device {}", self.interface), source)
            }),
        }
    }

    fn read_rest(&mut self, link: &Link) -> io::Result<Snapshot> {
        let addresses = self.links.addresses(link.index)?;
        let device = self.wireguard()?.get(link.index)?;
        let actual = Actual {
            public_key: device.public_key,
            port: device.port,
            mtu: link.mtu,
            up: link.up,
            addresses,
        };
        Ok(Snapshot { actual, peers: device.peers, private_key: device.private_key })
    }

    /// Makes the device what `desired` says and returns what had to be done. `key` is set only if
    /// the device has another. A peer that the device does not take stops nothing: see
    /// [`Device::refused`].
    pub fn reconcile(
        &mut self,
        desired: &Desired,
        key: &PrivateKey,
        look: Look,
    ) -> Result<Vec<Change>> {
        if look == Look::Remembered
            && let Some(known) = self.known.take()
            && let Ok(changes) = self.round(desired, key, Some(known))
        {
            return Ok(changes);
        }
        // Not known, or not any more what it was.
        let now = SystemTime::now();
        let known =
            self.read()?.map(|Snapshot { actual, peers, .. }| Known { actual, peers, at: now });
        self.round(desired, key, known)
    }

    /// The peers that the last round could not set, and why.
    pub fn refused(&self) -> &BTreeMap<PublicKey, String> {
        &self.refused
    }

    pub fn backend(&self) -> Backend {
        Backend::Kernel
    }

    fn round(
        &mut self,
        desired: &Desired,
        key: &PrivateKey,
        known: Option<Known>,
    ) -> Result<Vec<Change>> {
        self.known = None; // until all is done
        self.refused.clear();
        let missing = BTreeMap::new();
        let (actual, peers, at) =
            known.as_ref().map_or((None, &missing, SystemTime::now()), |known| {
                (Some(&known.actual), &known.peers, known.at)
            });
        let changes = plan(desired, actual, peers, &self.memory, at);
        for change in &changes {
            self.apply(change, desired, key)?;
        }
        let refused = &self.refused;
        self.memory.note(desired, |key| refused.contains_key(key));
        if refused.is_empty() {
            let (mut actual, mut peers) = known.map_or_else(
                || (Actual::created(desired.mtu), BTreeMap::new()),
                |known| (known.actual, known.peers),
            );
            settle(&mut actual, &mut peers, desired, &changes);
            self.known = Some(Known { actual, peers, at });
        }
        Ok(changes)
    }

    /// Takes the device away, and the data plane with it. `false` if there was none.
    ///
    /// # Errors
    /// [`Error::NotWireGuard`] if the name belongs to something else, which is left alone.
    pub fn remove(&mut self) -> Result<bool> {
        let Some(link) = self.link()? else { return Ok(false) };
        let action = format!("remove {}", self.interface);
        self.links.delete(link.index).map_err(|source| failed(action, source))?;
        Ok(true)
    }

    pub(crate) fn watched(&self) -> Watched<'_> {
        Watched { name: &self.interface, index: self.index }
    }

    fn link(&mut self) -> Result<Option<Link>> {
        let link = self.links.get(&self.interface).map_err(|source| {
            failed(format!("look for the interface {}", self.interface), source)
        })?;
        self.index = link.as_ref().map_or(0, |link| link.index);
        match link {
            Some(link) if !link.is_wireguard() => Err(Error::NotWireGuard {
                interface: self.interface.clone(),
                kind: match link.kind.as_str() {
                    "" => "hardware".into(),
                    kind => format!("of type {kind}"),
                },
            }),
            link => Ok(link),
        }
    }

    fn create(&mut self, mtu: u32) -> Result<()> {
        let action = || format!("create the WireGuard device {}", self.interface);
        match self.links.create_wireguard(&self.interface, mtu) {
            Err(source) if source.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                return Err(Error::NoWireGuard { action: action(), source });
            }
            created => created.map_err(|source| failed(action(), source))?,
        }
        self.link().map(drop) // for its number
    }

    fn apply(&mut self, change: &Change, desired: &Desired, key: &PrivateKey) -> Result<()> {
        let index = self.index;
        let applied = match change {
            Change::Create { mtu } => return self.create(*mtu),
            Change::SetPeer(peer) => {
                let set = self.wireguard().and_then(|wireguard| wireguard.set_peer(index, peer));
                if let Err(error) = set {
                    self.refused.insert(peer.public_key, error.to_string());
                }
                return Ok(());
            }
            Change::RemovePeer(key) => self.wireguard().and_then(|wg| wg.remove_peer(index, key)),
            Change::SetKey { .. } => self.wireguard().and_then(|wg| wg.set(index, Some(key), None)),
            Change::SetPort(port) => {
                self.wireguard().and_then(|wg| wg.set(index, None, Some(*port)))
            }
            Change::SetMtu(mtu) => self.links.set_mtu(index, *mtu),
            Change::AddAddress(address) => self.links.add_address(index, *address),
            Change::RemoveAddress(address) => self.links.remove_address(index, *address),
            Change::SetUp => self.links.set_up(index),
        };
        applied.map_err(|source| self.not_done(change, desired, source))
    }

    fn not_done(&self, change: &Change, desired: &Desired, source: io::Error) -> Error {
        match (change, source.raw_os_error()) {
            // An interface that is down takes any port; whether it is free shows when it goes up.
            (Change::SetPort(_) | Change::SetUp, Some(libc::EADDRINUSE)) => {
                Error::PortTaken { port: desired.port }
            }
            (Change::AddAddress(address), code) if code != Some(libc::EPERM) => Error::Address {
                interface: self.interface.clone(),
                address: address.address,
                source,
            },
            _ => failed(format!("{change} on {}", self.interface), source),
        }
    }

    fn wireguard(&mut self) -> io::Result<&mut WireGuard> {
        let opened = match self.wireguard.take() {
            Some(opened) => opened,
            None => WireGuard::open()?,
        };
        Ok(self.wireguard.insert(opened))
    }
}

fn failed(action: String, source: io::Error) -> Error {
    match source.raw_os_error() {
        Some(libc::EPERM) => Error::NotPermitted { action },
        _ => Error::Kernel { action, source },
    }
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Device").field("interface", &self.interface).finish_non_exhaustive()
    }
}
