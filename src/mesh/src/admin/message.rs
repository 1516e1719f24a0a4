//! The messages of the admin service, protobuf 3. Numbers and types of the first three are Ikto's
//! (protocols/ikto-kilo.md §1.9); requests are empty.

use bytes::Bytes;

use crate::view::View;

pub(super) const NODE_INFO: &str = "/ikto.AdminService/NodeInfo";
pub(super) const VIEW: &str = "/latchkey.v1.AdminService/View";

/// `ikto.NodeInfoResponse`: what a node publishes, and what it knows of the others.
#[derive(Clone, PartialEq, prost::Message)]
pub struct NodeInfo {
    #[prost(message, optional, tag = "1")]
    pub node: Option<Peer>,
    #[prost(message, repeated, tag = "4")]
    pub peers: Vec<Peer>,
}

/// `ikto.Peer`: one record. Number 4 was in use once.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, prost::Message)]
pub struct Peer {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(string, tag = "2")]
    pub public_key: String,
    #[prost(string, tag = "3")]
    pub advertise_address: String,
    #[prost(int32, tag = "5")]
    pub wg_port: i32,
    #[prost(string, tag = "6")]
    pub allowed_ip: String,
}

/// `latchkey.v1.ViewResponse`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(super) struct ViewResponse {
    #[prost(bytes = "bytes", tag = "1")]
    pub(super) json: Bytes,
}

/// Peers by name and then by key. Ikto shows records, so a node with two is there twice.
impl From<&View> for NodeInfo {
    fn from(view: &View) -> Self {
        let node = &view.node;
        let mut peers: Vec<Peer> = view
            .members
            .iter()
            .flat_map(|member| {
                member.allowed_ips.iter().map(|allowed_ip| Peer {
                    name: member.name.clone(),
                    public_key: member.public_key.clone(),
                    advertise_address: member.advertise_address.clone(),
                    wg_port: member.wg_port.into(),
                    allowed_ip: allowed_ip.clone(),
                })
            })
            .collect();
        peers.sort();
        Self {
            node: Some(Peer {
                name: node.name.clone(),
                public_key: node.public_key.clone(),
                advertise_address: node.advertise_address.clone(),
                wg_port: node.wg_port.into(),
                allowed_ip: node.allowed_ip.clone().unwrap_or_default(),
            }),
            peers,
        }
    }
}
