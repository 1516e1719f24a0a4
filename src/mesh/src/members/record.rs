//! One record, judged by itself; and whether another is in its way.

use std::net::IpAddr;

use bytes::Bytes;
use latchkey_wire::member::{
    Cidr, Extension, MAX_MEMBER, Member, Signature, SignaturePolicy, key_of, read_unchecked,
};

use super::{Endpoint, Holder, Rules};
use crate::key::PublicKey;
use crate::registry::Entry;

#[derive(Debug, Clone)]
pub(super) struct Record {
    entry: Entry,
    /// Known also of a record that is refused, if it could be read.
    public_key: Option<PublicKey>,
    /// Or why it is none.
    facts: Result<Box<Facts>, String>,
    standing: Standing,
}

/// What a valid record says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Facts {
    pub(super) name: String,
    pub(super) advertise_address: String,
    pub(super) endpoint: Option<Endpoint>,
    /// As it was written.
    pub(super) allowed_ip: Cidr,
    /// The same masked.
    pub(super) range: Cidr,
    pub(super) wg_port: u16,
    pub(super) signed: bool,
    pub(super) capabilities: Vec<String>,
}

/// A valid record's standing among the others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Standing {
    /// Not looked at so far, or not valid.
    Open,
    Counts,
    /// Overlaps `range` of `holder`, which comes before it.
    Behind {
        range: Cidr,
        holder: Holder,
    },
}

impl Record {
    pub(super) fn read(rules: &Rules, entry: &Entry) -> Self {
        let (public_key, facts) = match read_unchecked(&entry.value) {
            Err(error) => (None, Err(error.to_string())),
            Ok((member, claim)) => {
                let signature = match rules.signatures {
                    SignaturePolicy::Ignore => Signature::Absent,
                    SignaturePolicy::Require | SignaturePolicy::Prefer => {
                        claim.check(&rules.bucket, &entry.key, &entry.value, &member.public_key)
                    }
                };
                let public_key = PublicKey::new(member.public_key);
                (Some(public_key), judge(rules, &entry.key, member, signature).map(Box::new))
            }
        };
        // A copy, which keeps alive nothing but itself: the registry's may be part of a buffer of many messages. And none of
        // what is too long to be a record.
        let value = entry.value.get(..).filter(|value| value.len() <= MAX_MEMBER);
        let value = Bytes::copy_from_slice(value.unwrap_or_default());
        let entry = Entry { key: entry.key.clone(), value, revision: entry.revision };
        Self { entry, public_key, facts, standing: Standing::Open }
    }

    /// Whether `entry` says the same, so that it need not be read. Of a refused record that is not known.
    pub(super) fn is_of(&self, entry: &Entry) -> bool {
        self.facts.is_ok() && self.entry.value == entry.value && self.entry.key == entry.key
    }

    /// The same, written again.
    pub(super) fn renewed(mut self, revision: u64) -> Self {
        self.entry.revision = revision;
        self.standing = Standing::Open;
        self
    }

    pub(super) fn entry(&self) -> &Entry {
        &self.entry
    }

    pub(super) fn revision(&self) -> u64 {
        self.entry.revision
    }

    pub(super) fn public_key(&self) -> Option<PublicKey> {
        self.public_key
    }

    pub(super) fn valid(&self) -> Option<&Facts> {
        self.facts.as_deref().ok()
    }

    pub(super) fn counting(&self) -> Option<&Facts> {
        self.valid().filter(|_| self.standing == Standing::Counts)
    }

    /// Whether it counts now and did not, or the other way round.
    pub(super) fn stand(&mut self, standing: Standing) -> bool {
        let before = std::mem::replace(&mut self.standing, standing);
        (before == Standing::Counts) != (self.standing == Standing::Counts)
    }

    /// Why it does not count.
    pub(super) fn problem(&self) -> Option<String> {
        match (&self.facts, &self.standing) {
            (Err(reason), _) => Some(reason.clone()),
            (Ok(facts), Standing::Behind { range, holder }) => Some(format!(
                "{} overlaps {range} of {} (record {}, revision {}), which comes first; give one of the two another address",
                facts.allowed_ip, holder.public_key, holder.key, holder.revision
            )),
            (Ok(_), _) => None,
        }
    }
}

fn judge(rules: &Rules, key: &str, member: Member, signature: Signature) -> Result<Facts, String> {
    match (rules.signatures, signature) {
        (SignaturePolicy::Require | SignaturePolicy::Prefer, Signature::Invalid) => {
            return Err(format!(
                "its signature is not one by the key {} for this record in bucket {}: somebody else wrote or changed it, or copied it from elsewhere",
                PublicKey::new(member.public_key),
                rules.bucket
            ));
        }
        (SignaturePolicy::Require, Signature::Absent) => {
            return Err("it is not signed, and signatures are required here".into());
        }
        _ => {}
    }
    let range = member.allowed_ip.masked();
    if range.length() == 0 {
        return Err(format!("{} is everything there is, not a node's prefix", member.allowed_ip));
    }
    if rules.strict && !rules.mesh.covers(&range) {
        return Err(format!("{} is not in the mesh {}", member.allowed_ip, rules.mesh));
    }
    if rules.strict && key_of(&member.allowed_ip) != key {
        return Err(format!(
            "it stands under another key than that of its prefix {} ({})",
            member.allowed_ip,
            key_of(&member.allowed_ip)
        ));
    }
    let endpoint = endpoint(&range, &member)?;
    let Extension { capabilities, .. } = member.extension.unwrap_or_default();
    Ok(Facts {
        name: member.name,
        advertise_address: member.advertise_address,
        endpoint,
        allowed_ip: member.allowed_ip,
        range,
        wg_port: member.wg_port,
        signed: signature == Signature::Valid,
        capabilities,
    })
}

/// None if the node cannot be dialled.
fn endpoint(range: &Cidr, member: &Member) -> Result<Option<Endpoint>, String> {
    let advertised = &member.advertise_address;
    let address = advertised.parse::<IpAddr>().ok().map(|address| address.to_canonical());
    let name = member.extension.as_ref().and_then(|extension| extension.advertise_name.as_deref());
    if let Some(address) = address {
        if address.is_unspecified() || address.is_multicast() || is_broadcast(address) {
            return Err(format!("nobody can be reached at its advertise_address {address}"));
        }
        // One elsewhere in the mesh's range may be right: that of a LAN with a route of its own. If it has none, the
        // kernel drops what would go round in circles, and nobody but this peer is the worse for it.
        if range.contains(address) {
            return Err(format!(
                "its advertise_address {address} is in its own {range}, which is reached through it"
            ));
        }
    }
    let port = member.wg_port;
    let endpoint = match (name, address) {
        (Some(name), _) if is_dns_name(name) => Endpoint::Name { host: name.to_owned(), port },
        (Some(name), _) => return Err(format!("its advertise_name {name:?} is no DNS name")),
        (None, Some(address)) => Endpoint::Address((address, port).into()),
        (None, None) if is_dns_name(advertised) => {
            Endpoint::Name { host: advertised.clone(), port }
        }
        (None, None) => {
            return Err(format!(
                "its advertise_address {advertised:?} is neither an IP address nor a DNS name"
            ));
        }
    };
    Ok((port != 0).then_some(endpoint))
}

fn is_broadcast(address: IpAddr) -> bool {
    matches!(address, IpAddr::V4(v4) if v4.is_broadcast())
}

/// RFC 1123 §2.1, underscores allowed as they are in use. Not what a resolver would take for an address: the last label is
/// no number.
fn is_dns_name(name: &str) -> bool {
    let name = name.strip_suffix('.').unwrap_or(name);
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
    };
    let number = |label: &str| {
        label.bytes().all(|byte| byte.is_ascii_digit())
            || label.to_ascii_lowercase().starts_with("0x")
    };
    name.len() <= 253
        && name.split('.').all(label)
        && name.rsplit('.').next().is_some_and(|last| !number(last))
}
