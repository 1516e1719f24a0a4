//! `latchkey info`: this node and the others, as `ikto info` prints them (protocols/ikto-kilo.md §1.9), but for control characters,
//! which Ikto hands to the terminal.

use std::fmt::Write as _;

use crate::admin::{NodeInfo, Peer};
use crate::terminal::printable;

/// A block for the node, and one for each peer. Each ends with an empty line.
#[must_use]
pub fn to_text(info: &NodeInfo) -> String {
    let mut text = String::from("Local Node:\n");
    // A message that is not there reads as an empty one.
    write_peer(&mut text, &info.node.clone().unwrap_or_default());
    text.push_str("Peers:\n");
    info.peers.iter().for_each(|peer| write_peer(&mut text, peer));
    text
}

fn write_peer(out: &mut String, peer: &Peer) {
    // Writing to a String cannot fail.
    let _ = write!(
        out,
        "Name: {}\nPublic Key: {}\nAdvertise Address: {}\nAllowed IP: {}\nWireGuard Port: {}\n\n",
        printable(&peer.name),
        printable(&peer.public_key),
        printable(&peer.advertise_address),
        printable(&peer.allowed_ip),
        peer.wg_port
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The block of protocols/ikto-kilo.md §1.9, byte for byte.
    #[test]
    fn a_node_and_its_peers_as_ikto_prints_them() {
        let node = Peer {
            name: "node-A".into(),
            public_key: "WzPYRHCzki0WlvHTleeBt8ig6hXKZ9N5PXpt/DxIIkE=".into(),
            advertise_address: "10.99.1.2".into(),
            wg_port: 51820,
            allowed_ip: "fd10:aaaa:1::/48".into(),
        };
        let block = "\
Name: node-A
Public Key: WzPYRHCzki0WlvHTleeBt8ig6hXKZ9N5PXpt/DxIIkE=
Advertise Address: 10.99.1.2
Allowed IP: fd10:aaaa:1::/48
WireGuard Port: 51820

";
        let alone = NodeInfo { node: Some(node.clone()), peers: vec![] };
        assert_eq!(to_text(&alone), format!("Local Node:\n{block}Peers:\n"));
        let rude = Peer { name: "\u{1b}]0;B\u{7}".into(), ..node.clone() };
        let both = NodeInfo { node: Some(node), peers: vec![rude] };
        let escaped = block.replace("node-A", "\\u{1b}]0;B\\u{7}");
        assert_eq!(to_text(&both), format!("Local Node:\n{block}Peers:\n{escaped}"));
    }
}
