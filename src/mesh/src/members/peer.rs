//! A member as the device needs it: what all its records that count say together.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use latchkey_wire::member::Cidr;

use super::record::Facts;
use crate::key::PublicKey;
use crate::view::MemberView;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemberPeer {
    pub name: String,
    pub public_key: PublicKey,
    /// As it was written. Where `endpoint` is a name, it may be the address that the name had then.
    pub advertise_address: String,
    /// None if the node cannot be dialled.
    pub endpoint: Option<Endpoint>,
    /// Of all its records, masked.
    pub allowed_ips: BTreeSet<Cidr>,
    pub wg_port: u16,
    pub signed: bool,
    pub capabilities: Vec<String>,
    /// The newest record's, which everything but `allowed_ips` is from.
    pub revision: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Endpoint {
    Address(SocketAddr),
    /// To be looked up.
    Name {
        host: String,
        port: u16,
    },
}

impl MemberPeer {
    /// From all records of one node that count, with their revisions; `None` if there are none. The newest tells where the
    /// node is. If signatures are preferred that is the newest signed one, if there is any: who can write to the registry
    /// cannot lead others away from a node that signs.
    pub(super) fn of(
        public_key: PublicKey,
        records: &[(u64, &Facts)],
        prefer: bool,
    ) -> Option<Self> {
        let (revision, newest) =
            records.iter().max_by_key(|(revision, facts)| (prefer && facts.signed, *revision))?;
        Some(Self {
            name: newest.name.clone(),
            public_key,
            advertise_address: newest.advertise_address.clone(),
            endpoint: newest.endpoint.clone(),
            allowed_ips: records.iter().map(|(_, facts)| facts.range).collect(),
            wg_port: newest.wg_port,
            signed: newest.signed,
            capabilities: newest.capabilities.clone(),
            revision: *revision,
        })
    }

    /// As it is shown, with its prefixes as they were written.
    pub(super) fn view(&self, allowed_ips: &BTreeSet<Cidr>) -> MemberView {
        MemberView {
            name: self.name.clone(),
            public_key: self.public_key.to_string(),
            advertise_address: self.advertise_address.clone(),
            wg_port: self.wg_port,
            allowed_ips: allowed_ips.iter().map(Cidr::to_string).collect(),
            signed: self.signed,
            capabilities: self.capabilities.clone(),
            revision: self.revision,
        }
    }
}
