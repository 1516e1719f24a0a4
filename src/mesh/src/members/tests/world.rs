//! Nodes with keys of their own, and their records.

use std::sync::LazyLock;

use latchkey_wire::member::{Cidr, Extension, Member, SignaturePolicy, key_of};

use crate::key::{PrivateKey, PublicKey};
use crate::members::Rules;
use crate::registry::Entry;

pub(super) const BUCKET: &str = "ikto-mesh";
const NODES: u8 = 32;

/// 0 is this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Node(pub(super) u8);

/// Deriving a key is slow in a test's build.
static PUBLIC_KEYS: LazyLock<Vec<PublicKey>> =
    LazyLock::new(|| (0..NODES).map(|number| Node(number).private_key().public()).collect());

/// One node with one prefix.
#[derive(Debug, Clone, Copy)]
pub(super) struct Home(Node, Cidr);

pub(super) fn rules() -> Rules {
    Rules {
        bucket: BUCKET.into(),
        mesh: "fd10::/16".parse().unwrap(),
        own: Node(0).public_key(),
        signatures: SignaturePolicy::Prefer,
        strict: true,
    }
}

impl Node {
    pub(super) fn private_key(self) -> PrivateKey {
        PrivateKey::new(&[self.0 + 1; 32])
    }

    pub(super) fn public_key(self) -> PublicKey {
        PUBLIC_KEYS[usize::from(self.0)]
    }

    pub(super) fn at(self, allowed_ip: &str) -> Home {
        Home(self, allowed_ip.parse().unwrap())
    }
}

impl Home {
    pub(super) fn member(&self) -> Member {
        Member {
            name: format!("node-{}", self.0.0),
            public_key: *self.0.public_key().as_bytes(),
            advertise_address: format!("10.99.0.{}", self.0.0),
            allowed_ip: self.1,
            wg_port: 51820,
            extension: None,
        }
    }

    pub(super) fn entry(&self, revision: u64) -> Entry {
        entry(&self.member(), revision)
    }

    pub(super) fn signed_entry(&self, revision: u64) -> Entry {
        let member = Member { extension: Some(Extension::default()), ..self.member() };
        signed_entry(&member, &self.0, revision)
    }
}

pub(super) fn entry(member: &Member, revision: u64) -> Entry {
    Entry { key: key_of(&member.allowed_ip), value: member.to_json().into(), revision }
}

pub(super) fn signed_entry(member: &Member, node: &Node, revision: u64) -> Entry {
    let value = member.to_signed_json(BUCKET, node.private_key().as_bytes());
    Entry { key: key_of(&member.allowed_ip), value: value.into(), revision }
}
