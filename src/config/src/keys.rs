//! The keys this project reads and how a name that is nearly one of them is told: protocols/kcrypt.md §10.1.

use crate::mesh::value::{Content, Kind as Agent};
use crate::value::Kind;

/// A mapping we read from.
pub(crate) struct Branch {
    pub(crate) path: &'static str,
    /// Whose keys: ours, where an unknown key is an error; or shared with others, where only a near miss is.
    pub(crate) ours: bool,
}

pub(crate) const BRANCHES: [Branch; 6] = [
    Branch { path: "", ours: false },
    Branch { path: "kcrypt", ours: false },
    Branch { path: "kcrypt.challenger", ours: true },
    Branch { path: "install", ours: false },
    Branch { path: "latchkey", ours: true },
    Branch { path: "latchkey.mesh", ours: true },
];

pub(crate) const SERVERS: &str = "kcrypt.challenger.challenger_server";
pub(crate) const CERTIFICATE: &str = "kcrypt.challenger.certificate";
pub(crate) const MESH: &str = "latchkey.mesh";
pub(crate) const REGISTRY: &str = "latchkey.mesh.registry";
pub(crate) const CREDENTIALS: &str = "latchkey.mesh.credentials";
pub(crate) const BUCKET: &str = "latchkey.mesh.bucket";
pub(crate) const REGISTRY_CA: &str = "latchkey.mesh.registry_ca";
pub(crate) const REGISTRY_CERTIFICATE: &str = "latchkey.mesh.registry_certificate";
pub(crate) const REGISTRY_KEY: &str = "latchkey.mesh.registry_key";
pub(crate) const ADVERTISE_ADDRESS: &str = "latchkey.mesh.advertise_address";
pub(crate) const ADVERTISE_INTERFACE: &str = "latchkey.mesh.advertise_interface";
pub(crate) const CONFIG_URL: &str = "config_url";

pub(crate) const LEAVES: [(&str, Kind); 32] = [
    (CONFIG_URL, Kind::ConfigUrl),
    (SERVERS, Kind::Servers),
    ("kcrypt.challenger.mdns", Kind::Flag),
    (CERTIFICATE, Kind::Certificate),
    ("kcrypt.challenger.nv_index", Kind::NvIndex),
    ("kcrypt.challenger.c_index", Kind::Persistent),
    ("kcrypt.challenger.tpm_device", Kind::TpmDevice),
    ("kcrypt.nv_index", Kind::NvIndex),
    ("kcrypt.c_index", Kind::Persistent),
    ("kcrypt.tpm_device", Kind::TpmDevice),
    ("install.encrypted_partitions", Kind::Labels),
    ("latchkey.deadline", Kind::Duration),
    ("latchkey.protocol", Kind::Protocol),
    ("latchkey.pcrs", Kind::Pcrs),
    ("latchkey.mapper", Kind::Mapper),
    ("latchkey.mesh.network", Kind::Network),
    ("latchkey.mesh.prefix", Kind::Prefix),
    ("latchkey.mesh.port", Kind::Port),
    ("latchkey.mesh.interface", Kind::Interface),
    ("latchkey.mesh.name", Kind::Agent(Agent::Name)),
    (REGISTRY, Kind::Agent(Agent::Registry)),
    (CREDENTIALS, Kind::Agent(Agent::Pem(Content::Credentials))),
    (BUCKET, Kind::Agent(Agent::Bucket)),
    (REGISTRY_CA, Kind::Agent(Agent::Pem(Content::Certificates))),
    (REGISTRY_CERTIFICATE, Kind::Agent(Agent::Pem(Content::Certificates))),
    (REGISTRY_KEY, Kind::Agent(Agent::Pem(Content::PrivateKey))),
    (ADVERTISE_ADDRESS, Kind::Agent(Agent::AdvertiseAddress)),
    (ADVERTISE_INTERFACE, Kind::Agent(Agent::Interface)),
    ("latchkey.mesh.keepalive", Kind::Agent(Agent::Keepalive)),
    ("latchkey.mesh.mtu", Kind::Agent(Agent::Mtu)),
    ("latchkey.mesh.signatures", Kind::Agent(Agent::Signatures)),
    ("latchkey.mesh.metrics", Kind::Agent(Agent::Metrics)),
];

/// What Ikto calls some of these in its own file, which is how people come to write them here.
const IKTO: [(&str, &str); 7] = [
    ("nats_url", REGISTRY),
    ("nats_creds", CREDENTIALS),
    ("nats_kv", BUCKET),
    ("mesh_cidr", "latchkey.mesh.prefix"),
    ("wg_port", "latchkey.mesh.port"),
    ("wg_dev_name", "latchkey.mesh.interface"),
    ("subnet_prefix", "latchkey.mesh.prefix"),
];

/// Edits (insert, delete, replace, swap) that still look like a typing error in a mapping shared with others.
pub(crate) const NEAR: usize = 2;
/// At the top, where cloud-init, Kairos and everybody else have their keys, only a single one does.
pub(crate) const NEAR_AT_TOP: usize = 1;

pub(crate) fn branch(path: &str) -> Option<&'static Branch> {
    BRANCHES.iter().find(|branch| branch.path == path)
}

pub(crate) fn leaf(path: &str) -> Option<(&'static str, Kind)> {
    LEAVES.iter().find(|(leaf, _)| *leaf == path).copied()
}

pub(crate) fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}

pub(crate) fn is_in_mesh(key: &str) -> bool {
    key.strip_prefix(MESH).is_some_and(|rest| rest.starts_with('.'))
}

/// The other of two keys of which only one can be meant: older Kairos reads a setting below `kcrypt.challenger`, newer below
/// `kcrypt`; and a node advertises an address or an interface.
pub(crate) fn twin(key: &str) -> Option<String> {
    match key {
        ADVERTISE_ADDRESS => return Some(ADVERTISE_INTERFACE.to_owned()),
        ADVERTISE_INTERFACE => return Some(ADVERTISE_ADDRESS.to_owned()),
        _ => {}
    }
    let (parent, name) = key.rsplit_once('.')?;
    if !["nv_index", "c_index", "tpm_device"].contains(&name) {
        return None;
    }
    match parent {
        "kcrypt" => Some(format!("kcrypt.challenger.{name}")),
        "kcrypt.challenger" => Some(format!("kcrypt.{name}")),
        _ => None,
    }
}

/// The names that may stand in a mapping.
pub(crate) fn names_in(path: &str) -> impl Iterator<Item = &'static str> {
    let keys = BRANCHES.iter().map(|branch| branch.path).chain(LEAVES.iter().map(|(key, _)| *key));
    keys.filter(|key| !key.is_empty()).filter_map(move |key| match key.rsplit_once('.') {
        Some((parent, name)) => (parent == path).then_some(name),
        None => path.is_empty().then_some(key),
    })
}

/// The name in a mapping that is the least edits away, and how many.
pub(crate) fn nearest(path: &str, name: &str) -> Option<(&'static str, usize)> {
    nearest_of(names_in(path), name)
}

/// The name among `known` that is the least edits (insert, delete, replace, swap) away, and how many. Case and hyphens
/// count as one together.
pub fn nearest_of<'k>(
    known: impl Iterator<Item = &'k str>,
    name: &str,
) -> Option<(&'k str, usize)> {
    known.map(|known| (known, distance(known, name))).min_by_key(|(_, distance)| *distance)
}

/// The key that means the same here as Ikto's `name` in its own file.
pub(crate) fn of_ikto(path: &str, name: &str) -> Option<&'static str> {
    IKTO.iter().find(|(ikto, _)| path == MESH && *ikto == name).map(|(_, key)| *key)
}

/// Whether a top-level key is ours or may have been meant to be.
pub(crate) fn concerns_us(key: &str) -> bool {
    nearest("", key).is_some_and(|(_, distance)| distance <= NEAR_AT_TOP)
}

/// Edits between them; with those that are far apart in length it is not worth the while.
pub(crate) fn distance(known: &str, name: &str) -> usize {
    const FAR: usize = 8;
    if known.len().abs_diff(name.len()) > FAR {
        return usize::MAX;
    }
    let distance = strsim::osa_distance(known, name);
    let flat = |name: &str| name.to_lowercase().replace(['-', '_', ' '], "");
    // A difference in case and hyphens only is the likeliest typing error of all.
    if flat(known) == flat(name) { distance.min(1) } else { distance }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DOCUMENT: &str = include_str!("../../../docs/configuration.md");

    #[test]
    fn every_key_is_in_the_table_and_every_key_in_the_table_is_read() {
        let cells =
            DOCUMENT.lines().filter_map(|line| line.strip_prefix("| `")?.split(" | ").next());
        let mut written: Vec<String> = cells
            .flat_map(|cell| cell.split(", "))
            .map(|key| key.trim_matches('`').to_owned())
            .collect();
        let mut read: Vec<&str> = LEAVES.iter().map(|(key, _)| *key).collect();
        written.sort();
        read.sort_unstable();
        assert_eq!(written, read);
    }

    #[test]
    fn two_places_are_each_others_twins() {
        for (key, _) in LEAVES {
            if let Some(twin) = twin(key) {
                assert!(leaf(&twin).is_some(), "{twin}");
                assert_eq!(super::twin(&twin).as_deref(), Some(key));
            }
        }
        assert_eq!(twin("latchkey.deadline"), None);
    }
}
