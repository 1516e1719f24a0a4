//! The WireGuard device: read it, plan, apply the difference. Run again it finds nothing to do.
//!
//! The link and its addresses are the kernel's in any case, and rtnetlink's. Key, port and peers
//! are asked of the kernel by generic netlink, or of wireguard-go where the kernel has no WireGuard.

pub(crate) mod tunnel;

use std::collections::BTreeMap;
use std::io;
use std::time::SystemTime;

use nix::libc;

use crate::error::{Error, Result};
use crate::key::{PrivateKey, PublicKey};
use crate::netlink::events::Watched;
use crate::netlink::link::{self, Link, Links};
use crate::netlink::wireguard::{self, WireGuard};
pub use crate::plan::Peer;
use crate::plan::{Actual, Change, Desired, Memory, plan, settle};
use crate::userspace;
pub use tunnel::Backend;
use tunnel::Carrier;

/// An interface by its name, and the way to it.
pub struct Device {
    interface: String,
    /// The interface's number as of the last look; 0 is none.
    index: u32,
    links: Links,
    /// None if there is no device, or none was looked at so far.
    carrier: Option<Carrier>,
    /// What the last look and our own changes since have left.
    known: Option<Known>,
    memory: Memory,
    refused: BTreeMap<PublicKey, String>,
    /// Of the last round.
    port: u16,
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
    /// Not so if a peer was refused: the device may have taken some of what was said of it.
    is_certain: bool,
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
            carrier: None,
            known: None,
            memory: Memory::default(),
            refused: BTreeMap::new(),
            port: 0,
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
            Err(_) if self.links.get(&self.interface).is_ok_and(|link| link.is_none()) => Ok(None),
            rest => rest.map(Some).map_err(|source| {
                failed(format!("read the WireGuard device {}", self.interface), source)
            }),
        }
    }

    fn read_rest(&mut self, link: &Link) -> io::Result<Snapshot> {
        let addresses = self.links.addresses(link.index)?;
        let tunnel = self.carrier()?.get()?;
        let actual = Actual {
            public_key: tunnel.public_key,
            port: tunnel.port,
            mtu: link.mtu,
            up: link.up,
            addresses,
        };
        Ok(Snapshot { actual, peers: tunnel.peers, private_key: tunnel.private_key })
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
            && let Some(known) = self.known.take_if(|known| known.is_certain)
            && let Ok(changes) = self.round(desired, key, Some(known))
        {
            return Ok(changes);
        }
        // Not known, or not any more what it was.
        let now = SystemTime::now();
        let is_certain = true;
        let known = self.read()?.map(|Snapshot { actual, peers, .. }| Known {
            actual,
            peers,
            at: now,
            is_certain,
        });
        self.round(desired, key, known)
    }

    /// The peers that the last round could not set, and why.
    pub fn refused(&self) -> &BTreeMap<PublicKey, String> {
        &self.refused
    }

    /// The peers as the last look and our own changes since have left them, if that is known.
    pub(crate) fn peers(&self) -> Option<&BTreeMap<PublicKey, Peer>> {
        self.known.as_ref().map(|known| &known.peers)
    }

    /// Who carries the packets; the kernel as long as there is no device.
    pub fn backend(&self) -> Backend {
        match self.carrier {
            None | Some(Carrier::Kernel { .. }) => Backend::Kernel,
            Some(Carrier::Userspace(_)) => Backend::Userspace,
        }
    }

    /// Bytes sent so far in order to change key, port or peers of the device as it now is.
    pub fn bytes_sent(&self) -> u64 {
        match &self.carrier {
            None => 0,
            Some(Carrier::Kernel { wireguard, .. }) => wireguard.sent,
            Some(Carrier::Userspace(socket)) => socket.sent(),
        }
    }

    fn round(
        &mut self,
        desired: &Desired,
        key: &PrivateKey,
        known: Option<Known>,
    ) -> Result<Vec<Change>> {
        self.known = None; // until all is done
        self.refused.clear();
        self.port = desired.port;
        let missing = BTreeMap::new();
        let (actual, peers, at) =
            known.as_ref().map_or((None, &missing, SystemTime::now()), |known| {
                (Some(&known.actual), &known.peers, known.at)
            });
        let changes = plan(desired, actual, peers, &self.memory, at);
        for changes in changes.chunk_by(|a, b| a.is_about_peers() && b.is_about_peers()) {
            self.apply(changes, key)?;
        }
        let refused = &self.refused;
        self.memory.note(desired, |key| refused.contains_key(key));
        let is_certain = refused.is_empty();
        let (mut actual, mut peers) = known.map_or_else(
            || (Actual::created(desired.mtu), BTreeMap::new()),
            |known| (known.actual, known.peers),
        );
        settle(&mut actual, &mut peers, desired, &changes);
        self.known = Some(Known { actual, peers, at, is_certain });
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

    /// Looks for the link, and for who carries it.
    fn link(&mut self) -> Result<Option<Link>> {
        let action = || format!("look for the interface {}", self.interface);
        let link = self.links.get(&self.interface).map_err(|source| failed(action(), source))?;
        self.index = link.as_ref().map_or(0, |link| link.index);
        let carrier = self.carrier.take();
        let Some(link) = link else { return Ok(None) };
        self.carrier = match link.kind.as_str() {
            link::WIREGUARD => kernel(carrier, link.index),
            link::TUN => {
                let found = match carrier {
                    Some(Carrier::Userspace(socket)) if socket.answers() => Some(socket),
                    _ => userspace::Socket::find(&self.interface)
                        .map_err(|source| failed(action(), source))?,
                };
                let found = found.ok_or_else(|| self.not_wireguard(&link))?;
                Ok(Carrier::Userspace(found))
            }
            _ => return Err(self.not_wireguard(&link)),
        }
        .map(Some)
        .map_err(|source| {
            failed(format!("ask the kernel about WireGuard on {}", self.interface), source)
        })?;
        Ok(Some(link))
    }

    fn not_wireguard(&self, link: &Link) -> Error {
        Error::NotWireGuard {
            interface: self.interface.clone(),
            kind: match link.kind.as_str() {
                "" => "hardware".into(),
                link::TUN => "of type tun, with no WireGuard program behind it".into(),
                kind => format!("of type {kind}"),
            },
        }
    }

    fn carrier(&mut self) -> io::Result<&mut Carrier> {
        self.carrier.as_mut().ok_or_else(|| io::Error::from_raw_os_error(libc::ENODEV))
    }

    fn create(&mut self, mtu: u32) -> Result<()> {
        let action = || format!("create the WireGuard device {}", self.interface);
        match self.links.create_wireguard(&self.interface, mtu) {
            Err(source) if source.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                userspace::start(&self.interface).map_err(|userspace| Error::NoWireGuard {
                    action: action(),
                    source,
                    userspace,
                })?;
                log::warn!(
                    "this kernel has no WireGuard: started wireguard-go for {}, which needs more \
                     of the CPU; install the wireguard kernel module to do without",
                    self.interface
                );
            }
            created => created.map_err(|source| failed(action(), source))?,
        }
        let link = self.link()?; // for its number
        if link.is_some_and(|link| link.mtu != mtu) {
            self.links
                .set_mtu(self.index, mtu)
                .map_err(|source| self.not_done(&Change::SetMtu(mtu), source))?;
        }
        Ok(())
    }

    /// One change, or several that are about peers.
    fn apply(&mut self, changes: &[Change], key: &PrivateKey) -> Result<()> {
        let Some(change) = changes.first() else { return Ok(()) };
        let index = self.index;
        let applied = match change {
            Change::Create { mtu } => return self.create(*mtu),
            Change::SetPeer(_) | Change::RemovePeer(_) => return self.set_peers(changes),
            Change::SetKey { .. } => self.carrier().and_then(|carrier| carrier.set_key(key)),
            Change::SetPort(port) => self.carrier().and_then(|carrier| carrier.set_port(*port)),
            Change::SetMtu(mtu) => self.links.set_mtu(index, *mtu),
            Change::AddAddress(address) => self.links.add_address(index, *address),
            Change::RemoveAddress(address) => self.links.remove_address(index, *address),
            Change::SetUp => self.links.set_up(index),
        };
        applied.map_err(|source| self.not_done(change, source))
    }

    fn set_peers(&mut self, changes: &[Change]) -> Result<()> {
        let action = || format!("set the peers of {}", self.interface);
        let set = match &mut self.carrier {
            Some(carrier) => carrier.set_peers(changes),
            None => Err(io::Error::from_raw_os_error(libc::ENODEV)),
        };
        let refused = set.map_err(|source| failed(action(), source))?;
        self.refused = refused.into_iter().map(|(key, error)| (key, error.to_string())).collect();
        Ok(())
    }

    fn not_done(&self, change: &Change, source: io::Error) -> Error {
        match (change, source.raw_os_error()) {
            // An interface that is down takes any port; whether it is free shows when it goes up.
            (Change::SetPort(_) | Change::SetUp, Some(libc::EADDRINUSE)) => {
                Error::PortTaken { port: self.port }
            }
            (Change::AddAddress(address), code) if code != Some(libc::EPERM) => Error::Address {
                interface: self.interface.clone(),
                address: address.address,
                source,
            },
            _ => failed(format!("{change} on {}", self.interface), source),
        }
    }
}

/// Bytes of the requests that tell a device what `changes` say of its peers.
pub fn requests_length(backend: Backend, changes: &[Change]) -> usize {
    match backend {
        Backend::Kernel => wireguard::length(changes),
        Backend::Userspace => userspace::length(changes),
    }
}

fn kernel(carrier: Option<Carrier>, index: u32) -> io::Result<Carrier> {
    let wireguard = match carrier {
        Some(Carrier::Kernel { wireguard, .. }) => wireguard,
        _ => WireGuard::open()?,
    };
    Ok(Carrier::Kernel { wireguard, index })
}

fn failed(action: String, source: io::Error) -> Error {
    match source.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => Error::NotPermitted { action },
        _ => Error::Kernel { action, source },
    }
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Device").field("interface", &self.interface).finish_non_exhaustive()
    }
}
