//! Cloud-config and kernel command line: where they are found, how they merge, what they mean (protocols/kcrypt.md §10).
//!
//! [`load`] returns what this project needs of them, or says what is wrong. Each source is read into statements by itself
//! (`layer`, `overrides`), then merged (`settings`); in between, documents that a `config_url` names are fetched by whoever
//! has a network ([`Local::fetch`]).
//!
#![doc = include_str!("../../../docs/configuration.md")]

mod certificate;
pub mod cmdline;
mod error;
mod files;
mod keys;
mod layer;
mod local;
pub mod mesh;
mod overrides;
mod prefix;
mod settings;
mod value;
mod yaml;

use std::path::{Path, PathBuf};
use std::time::Duration;

pub use error::{ConfigError, Place};
pub use files::is_populated;
pub use keys::nearest_of;
pub use local::{Fetch, Local, Request};
pub use mesh::{DEFAULT_MESH_INTERFACE, DEFAULT_MESH_PORT, Membership, Mesh};
pub use prefix::Prefix;
pub use value::number;

use settings::Settings;
use value::Setting;

/// Where cloud-config is, in the order in which it is merged: the running system, the initramfs, and an earlier stage of it
/// as older and as newer Kairos have it.
pub const DIRS: [&str; 4] = ["/oem", "/sysroot/oem", "/tmp/oem", "/run/cos/oem"];

/// Total time for the automatic ways of one boot.
pub const DEFAULT_DEADLINE: Duration = Duration::from_secs(120);
/// NV index of the local blob (protocols/kcrypt.md §9.2).
pub const DEFAULT_NV_INDEX: u32 = 0x0150_0000;
/// Persistent handle of the blob key (protocols/kcrypt.md §9.1).
pub const DEFAULT_C_INDEX: u32 = 0x8100_0008;
/// Firmware, Secure Boot state, unified kernel image: what Kairos quotes (protocols/kcrypt.md §6.3).
pub const DEFAULT_PCRS: [u8; 3] = [0, 7, 11];

/// What the machine is told to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    pub challenger: Challenger,
    /// Labels, in the order found, each once: `install.encrypted_partitions`.
    pub encrypted_partitions: Vec<String>,
    /// `latchkey.deadline`, 1 s to 24 h, default [`DEFAULT_DEADLINE`].
    pub deadline: Duration,
    /// `latchkey.mapper`.
    pub mapper: MapperNames,
    /// `latchkey.mesh`; without it no mesh identity is made.
    pub mesh: Option<Mesh>,
    /// The cloud-config files that were read, in order, and the URLs. Empty: no directory, or no file with a header.
    pub sources: Vec<PathBuf>,
    /// URLs of `config_url` that could not be fetched, each with the reason. What was to be installed may stand there.
    pub unfetched: Vec<String>,
}

impl Config {
    /// For whoever makes volumes and secrets: which ones, and where their keys are kept, may stand in a document that could
    /// not be had. What is encrypted without it may be the wrong volume, and what is not stays readable.
    ///
    /// # Errors
    /// [`ConfigError::Incomplete`].
    pub fn complete(&self) -> Result<(), ConfigError> {
        match self.unfetched.first() {
            Some(document) => Err(ConfigError::Incomplete { document: document.clone() }),
            None => Ok(()),
        }
    }
}

/// `kcrypt.challenger`, and what newer Kairos reads directly below `kcrypt`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Challenger {
    /// http, https, ws or wss URLs, each once: `challenger_server`, a text or a list. Empty: local mode.
    pub servers: Vec<String>,
    /// `latchkey.protocol`.
    pub protocol: Protocol,
    /// What a v2 quote is over, 0 to 15, ascending: `latchkey.pcrs`, default [`DEFAULT_PCRS`].
    pub pcrs: Vec<u8>,
    /// 0x01000000 to 0x01ffffff.
    pub nv_index: u32,
    /// 0x81000000 to 0x81ffffff.
    pub c_index: u32,
    /// Path of a device or socket, or a TCTI string.
    pub tpm_device: Option<String>,
    /// PEM text with one certificate at least.
    pub certificate: Option<String>,
    /// A server whose name ends in `.local` is looked for by multicast; there is one such at least.
    pub mdns: bool,
}

impl Default for Challenger {
    /// What holds where nothing is configured: local mode.
    fn default() -> Self {
        Self {
            servers: Vec::new(),
            protocol: Protocol::default(),
            pcrs: DEFAULT_PCRS.to_vec(),
            nv_index: DEFAULT_NV_INDEX,
            c_index: DEFAULT_C_INDEX,
            tpm_device: None,
            certificate: None,
            mdns: false,
        }
    }
}

/// Which generation of the protocol is spoken (protocols/kcrypt.md §0.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Protocol {
    /// v2, and v1 with a server that answers 404 to it.
    #[default]
    Auto,
    V1,
    V2,
}

/// What a mapping below /dev/mapper is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MapperNames {
    /// As the volume's label, which stays: `/dev/mapper/COS_PERSISTENT`.
    #[default]
    Label,
    /// As the kernel calls the partition this time, as Kairos does: `/dev/mapper/sda3`.
    Partition,
}

/// Reads the cloud-config files below `dirs`, in this order, the documents that a `config_url` names, and the kernel command
/// line over them. A directory that is not there is none.
///
/// # Errors
/// See [`ConfigError`] and [`Local::fetch`]; nothing is silently left out.
pub fn load(dirs: &[&Path], cmdline: &str, fetch: &mut Fetch<'_>) -> Result<Config, ConfigError> {
    Local::read(dirs, cmdline)?.fetch(fetch)
}

fn config_of(
    settings: &Settings,
    sources: Vec<PathBuf>,
    unfetched: Vec<String>,
) -> Result<Config, ConfigError> {
    for unknown in settings.unknown_in_mesh() {
        log::warn!("{}; it opens no disk and closes none", ConfigError::from(unknown.clone()));
    }
    Ok(Config {
        challenger: challenger(settings)?,
        encrypted_partitions: match settings.get("install.encrypted_partitions") {
            Some((Setting::List(labels), _)) => labels.clone(),
            _ => Vec::new(),
        },
        mapper: match settings.get("latchkey.mapper") {
            Some((Setting::Mapper(mapper), _)) => *mapper,
            _ => MapperNames::default(),
        },
        deadline: deadline_of(settings),
        mesh: mesh::of(settings)?,
        sources,
        unfetched,
    })
}

fn challenger(settings: &Settings) -> Result<Challenger, ConfigError> {
    let servers = match settings.get(keys::SERVERS) {
        Some((Setting::List(urls), _)) => urls.clone(),
        single => text(single).into_iter().collect(),
    };
    let mdns = mdns(settings, &servers)?;
    Ok(Challenger {
        servers,
        protocol: match settings.get("latchkey.protocol") {
            Some((Setting::Protocol(protocol), _)) => *protocol,
            _ => Protocol::default(),
        },
        pcrs: match settings.get("latchkey.pcrs") {
            Some((Setting::Pcrs(pcrs), _)) => pcrs.clone(),
            _ => DEFAULT_PCRS.to_vec(),
        },
        nv_index: handle(either(settings, "nv_index")?).unwrap_or(DEFAULT_NV_INDEX),
        c_index: handle(either(settings, "c_index")?).unwrap_or(DEFAULT_C_INDEX),
        tpm_device: text(either(settings, "tpm_device")?),
        certificate: text(settings.get(keys::CERTIFICATE)),
        mdns,
    })
}

type Found<'s> = Option<(&'s Setting, &'s Place)>;

/// A setting that older Kairos reads below `kcrypt.challenger` and newer below `kcrypt`; both may say the same.
fn either<'s>(settings: &'s Settings, name: &str) -> Result<Found<'s>, ConfigError> {
    let (old_key, new_key) = (format!("kcrypt.challenger.{name}"), format!("kcrypt.{name}"));
    match (settings.get(&old_key), settings.get(&new_key)) {
        (Some((old, first)), Some((new, second))) if old != new => Err(ConfigError::Conflict {
            first_key: old_key,
            first: first.clone(),
            second_key: new_key,
            second: second.clone(),
        }),
        (old, new) => Ok(new.or(old)),
    }
}

fn text(found: Found<'_>) -> Option<String> {
    match found {
        // An empty text is how templates say "none"; Kairos takes it so, too.
        Some((Setting::Text(text), _)) if !text.is_empty() => Some(text.clone()),
        _ => None,
    }
}

fn handle(found: Found<'_>) -> Option<u32> {
    match found {
        Some((Setting::Handle(handle), _)) => Some(*handle),
        _ => None,
    }
}

fn mdns(settings: &Settings, servers: &[String]) -> Result<bool, ConfigError> {
    let key = "kcrypt.challenger.mdns";
    let Some((Setting::Flag(true), place)) = settings.get(key) else { return Ok(false) };
    if servers.is_empty() {
        return Err(ConfigError::Missing {
            place: place.clone(),
            key: key.to_owned(),
            missing: "kcrypt.challenger.challenger_server, with a host that ends in .local",
        });
    }
    let hosts: Vec<_> = servers.iter().filter_map(|server| value::host_of(server)).collect();
    let is_local =
        |host: &&str| host.trim_end_matches('.').to_ascii_lowercase().ends_with(".local");
    if !hosts.iter().any(is_local) {
        return Err(ConfigError::Invalid {
            place: place.clone(),
            key: key.to_owned(),
            why: format!(
                "multicast DNS finds hosts that end in .local only, and challenger_server names {}",
                hosts.join(", ")
            ),
        });
    }
    Ok(true)
}

fn deadline_of(settings: &Settings) -> Duration {
    match settings.get("latchkey.deadline") {
        Some((Setting::Duration(deadline), _)) => *deadline,
        _ => DEFAULT_DEADLINE,
    }
}
