//! What the device should be: what the settings, the registry, names and routes say together.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use latchkey_wire::member::Cidr;

use super::due::by;
use super::joining::Joining;
use super::node::{Agent, SHOW};
use crate::address::{DeviceAddress, candidates};
use crate::advertise;
use crate::device::Look;
use crate::error::{Error, Result};
use crate::members::{Endpoint, MemberPeer};
use crate::path;
use crate::plan::{Desired, DesiredPeer};
use crate::settings::AddressFrom;

impl Agent {
    /// What the device should be.
    pub(super) fn desired(&self) -> Desired {
        let keepalive = self.keepalive();
        let peers = self.joining.iter().flat_map(Joining::peers).map(|(public_key, peer)| {
            let peer = DesiredPeer {
                endpoint: self.endpoint(peer),
                allowed_ips: peer.allowed_ips.clone(),
                keepalive,
            };
            (*public_key, peer)
        });
        Desired {
            public_key: self.plane.public_key(),
            port: self.settings.port,
            mtu: self.mtu(),
            address: self.own().map(|own| DeviceAddress::new(&own, &self.settings.mesh)),
            peers: peers.collect(),
        }
    }

    /// Where a peer is; for a name that could not be looked up so far, the address in its record, which is what it was then.
    pub(super) fn endpoint(&self, peer: &MemberPeer) -> Option<SocketAddr> {
        let (address, port) = match peer.endpoint.as_ref()? {
            Endpoint::Address(endpoint) => return Some(*endpoint),
            Endpoint::Name { host, port } => {
                let recorded = || peer.advertise_address.parse().ok();
                (self.names.address(host).or_else(recorded)?, *port)
            }
        };
        // A way to a peer that leads through the mesh is none.
        (!self.settings.mesh.contains(address)).then_some(SocketAddr::new(address, port))
    }

    /// The own range, as soon as the device may have it.
    pub(super) fn own(&self) -> Option<Cidr> {
        match &self.joining {
            Some(joining) => joining.address(),
            None => self.own_without_registry().ok(),
        }
    }

    pub(super) fn own_without_registry(&self) -> Result<Cidr> {
        let mesh = self.settings.mesh;
        match self.settings.address {
            AddressFrom::Fixed(own) => Ok(own),
            AddressFrom::Key => candidates(&mesh, self.plane.public_key())?
                .next()
                .map(|(_, address)| Cidr::host(address))
                .ok_or(Error::MeshPrefix { mesh }),
        }
    }

    pub(super) fn mtu(&self) -> u32 {
        self.settings.mtu.unwrap_or_else(|| self.plane.mtu())
    }

    pub(super) fn keepalive(&self) -> u16 {
        advertise::keepalive(self.settings.keepalive, self.is_behind_nat)
    }

    /// Looks at the ways to the others: how large packets may be, and whether a NAT is in between.
    pub(super) fn measure(&mut self) {
        let endpoints: BTreeSet<IpAddr> = self
            .joining
            .iter()
            .flat_map(Joining::peers)
            .filter_map(|(_, peer)| Some(self.endpoint(peer)?.ip()))
            .collect();
        let mut changed = false;
        if let Some(advertised) = &self.advertised {
            match path::is_local(advertised.address) {
                Ok(is_own) => {
                    let peers = endpoints.iter().copied();
                    let nat = advertise::behind_nat(advertised.address, is_own, peers);
                    changed = self.is_behind_nat != nat;
                    self.is_behind_nat = nat;
                }
                Err(error) => log::debug!("{error}"),
            }
        }
        if self.settings.mtu.is_none() {
            changed |= self.plane.measure(endpoints);
        }
        if changed {
            self.look.get_or_insert(Look::Remembered);
            by(&mut self.due.show, Instant::now() + SHOW);
        }
    }
}
