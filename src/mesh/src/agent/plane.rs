//! The data plane: the device, what it was last told to be, and what that came to.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::SystemTime;

use crate::device::{Backend, Device, Look};
use crate::error::Result;
use crate::key::{PrivateKey, PublicKey};
use crate::netlink::events::Watched;
use crate::path;
use crate::plan::{Change, Desired, HANDSHAKE_EXPIRES};
use crate::view::Counters;

/// What WireGuard takes off an Ethernet path over IPv6: 1500 - 40 (IPv6) - 8 (UDP) - 32
/// (WireGuard). The kernel's own default.
const DEFAULT_MTU: u32 = 1420;

/// More changed peers than these in one round are counted, not listed.
const LISTED: usize = 8;

#[derive(Debug)]
pub(super) struct Plane {
    device: Device,
    key: Arc<PrivateKey>,
    public_key: PublicKey,
    mtu: Mtu,
    /// What kept the last round from its end.
    trouble: Option<String>,
}

/// What the paths to the peers allow. It goes down at once, and up when it was found higher twice, so that a route that
/// comes and goes does not take the device with it each time.
#[derive(Debug, Default)]
struct Mtu {
    now: Option<u32>,
    higher: Option<u32>,
}

impl Mtu {
    fn found(&mut self, mtu: u32) {
        let higher = self.higher.take();
        match self.now {
            Some(now) if mtu > now && higher != Some(mtu) => self.higher = Some(mtu),
            _ => self.now = Some(mtu),
        }
    }
}

/// What a device is that this node finds when it starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Found {
    /// None, or one without a key: nobody's.
    Nothing,
    /// One with this node's key.
    Own,
    /// One with another key.
    Foreign,
}

impl Plane {
    pub(super) fn new(device: Device, key: Arc<PrivateKey>) -> Self {
        let public_key = key.public();
        Self { device, key, public_key, mtu: Mtu::default(), trouble: None }
    }

    pub(super) fn interface(&self) -> &str {
        self.device.interface()
    }

    pub(super) fn watched(&self) -> Watched<'_> {
        self.device.watched()
    }

    pub(super) fn public_key(&self) -> PublicKey {
        self.public_key
    }

    pub(super) fn key(&self) -> &PrivateKey {
        &self.key
    }

    pub(super) fn shared_key(&self) -> Arc<PrivateKey> {
        Arc::clone(&self.key)
    }

    pub(super) fn backend(&self) -> &'static str {
        match self.device.backend() {
            Backend::Kernel => "kernel",
            Backend::Userspace => "userspace",
        }
    }

    pub(super) fn trouble(&self) -> Option<&str> {
        self.trouble.as_deref()
    }

    pub(super) fn mtu(&self) -> u32 {
        self.mtu.now.unwrap_or(DEFAULT_MTU)
    }

    /// Looks at the ways to the peers. Whether another MTU follows. What cannot be asked now stays as it was.
    pub(super) fn measure(&mut self, endpoints: impl IntoIterator<Item = IpAddr>) -> bool {
        let before = self.mtu.now;
        match path::mtu(endpoints, self.device.interface()) {
            Ok(mtu) => self.mtu.found(mtu),
            Err(error) => log::debug!("{error}"),
        }
        self.mtu.now != before
    }

    pub(super) fn found(&mut self) -> Result<Found> {
        let Some(snapshot) = self.device.read()? else { return Ok(Found::Nothing) };
        Ok(match snapshot.actual.public_key {
            None => Found::Nothing,
            Some(key) if key == self.public_key => Found::Own,
            Some(_) => Found::Foreign,
        })
    }

    /// Makes the device what it should be, as far as it is not.
    pub(super) fn reconcile(
        &mut self,
        desired: &Desired,
        look: Look,
        counters: &mut Counters,
    ) -> Result<()> {
        let changes = self.device.reconcile(desired, &self.key, look)?;
        self.tell(&changes, counters);
        Ok(())
    }

    fn tell(&self, changes: &[Change], counters: &mut Counters) {
        let interface = self.device.interface();
        if changes.is_empty() {
            log::debug!("{interface}: as it should be");
            return;
        }
        let is_peer =
            |change: &&Change| matches!(change, Change::SetPeer(_) | Change::RemovePeer(_));
        let removed =
            changes.iter().filter(|change| matches!(change, Change::RemovePeer(_))).count() as u64;
        let set = changes.iter().filter(is_peer).count() as u64 - removed;
        counters.repairs += 1;
        counters.peers_set += set;
        counters.peers_removed += removed;
        let listed = set + removed <= LISTED as u64;
        for change in changes.iter().filter(|change| listed || !is_peer(change)) {
            log::info!("{interface}: {change}");
        }
        if !listed {
            log::info!("{interface}: {set} peers set, {removed} removed");
        }
    }

    /// Goes on whatever happened: with the device gone, this process may have the only copy of the key. Whether that is
    /// news.
    pub(super) fn note(&mut self, result: Result<()>) -> bool {
        let trouble = result.err().map(|error| error.to_string());
        let is_news = trouble != self.trouble;
        if is_news {
            match &trouble {
                Some(trouble) => log::error!("{trouble}; trying again"),
                None => log::info!("{}: as it should be again", self.device.interface()),
            }
            self.trouble = trouble;
        }
        is_news
    }

    /// The peers that the device does not take, and why.
    pub(super) fn refused(&self) -> &BTreeMap<PublicKey, String> {
        self.device.refused()
    }

    /// The oldest of the peers' last handshakes, as of the last look.
    pub(super) fn first_handshake(&self) -> Option<SystemTime> {
        self.device.peers()?.values().filter_map(|peer| peer.last_handshake).min()
    }

    /// Whether a peer was not heard of for so long that it may be elsewhere by now.
    pub(super) fn is_silent(&self, peer: &PublicKey) -> bool {
        let last = self.device.peers().and_then(|peers| peers.get(peer)?.last_handshake);
        last.is_none_or(|last| last.elapsed().unwrap_or_default() > HANDSHAKE_EXPIRES)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mtu_goes_down_at_once_and_up_when_it_stays() {
        let mut mtu = Mtu::default();
        let mut after = |found| {
            mtu.found(found);
            mtu.now
        };
        assert_eq!(after(1420), Some(1420));
        assert_eq!(after(1280), Some(1280));
        assert_eq!(after(1420), Some(1280));
        assert_eq!(after(1280), Some(1280));
        assert_eq!(after(1420), Some(1280));
        assert_eq!(after(1420), Some(1420));
        assert_eq!(after(8920), Some(1420));
        assert_eq!(after(1500), Some(1420));
        assert_eq!(after(1500), Some(1500));
    }
}
