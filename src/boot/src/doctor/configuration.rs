//! The cloud-config: which files count, what they say together, and which do not count though somebody may think so.

use std::path::{Path, PathBuf};
use std::time::Duration;

use latchkey_config::{Challenger, Config, DIRS, Protocol};

use super::report::Report;
use crate::{BootError, oem, unlock};

/// A disk that is not there by now does not come while somebody waits at a console.
const PATIENCE: Duration = Duration::from_secs(3);
/// As unlocking ends for it.
const CODE: u8 = 10;
/// What lies deeper, nobody put there by hand.
const MAX_DEPTH: u32 = 8;

/// The configuration, if it can be used.
pub(super) fn check(
    report: &mut Report<'_>,
    directories: &[PathBuf],
) -> Result<Option<Config>, BootError> {
    let config = match oem::load(directories, PATIENCE) {
        Ok(config) => config,
        Err(BootError::Config(error)) => {
            report.fail(CODE, "configuration", error.to_string(), "")?;
            return Ok(None);
        }
        Err(error) => {
            report.error("configuration", &error)?;
            // There is none. What the kernel command line and the defaults say is still something to look at.
            return Ok(oem::load_mounted(directories).ok());
        }
    };
    for source in &config.sources {
        report.ok("configuration", format!("{} is read", source.display()))?;
    }
    let read_from: Vec<_> = if directories.is_empty() {
        DIRS.map(PathBuf::from).to_vec()
    } else {
        directories.to_vec()
    };
    for file in ignored(&read_from, &config.sources) {
        report.warn(
            "configuration",
            format!("{} is not read", file.display()),
            "if it is cloud-config, one of its first lines has to be #cloud-config",
        )?;
    }
    for document in &config.unfetched {
        report.warn(
            "config_url",
            document.clone(),
            "volumes are unlocked by what is known without it; encrypt refuses to work until it can be had",
        )?;
    }
    summary(report, &config)?;
    Ok(Some(config))
}

fn summary(report: &mut Report<'_>, config: &Config) -> Result<(), BootError> {
    let labels = unlock::labels(config).join(", ");
    let deadline = config.deadline.as_secs();
    if config.sources.is_empty() {
        report.warn(
            "configuration",
            "no cloud-config file was found",
            "write one to the file system labelled COS_OEM; the kernel command line and defaults hold until then",
        )?;
    }
    let challenger = &config.challenger;
    let way = if challenger.servers.is_empty() {
        format!("by the TPM alone (NV index 0x{:08x})", challenger.nv_index)
    } else {
        format!("by key server: {}", challenger.servers.join(", "))
    };
    report.ok("what is unlocked", format!("{labels}, {way}, within {deadline} s"))?;
    if !challenger.servers.is_empty() {
        report.ok("key server settings", server_settings(challenger))?;
    }
    match &config.mesh {
        Some(mesh) => {
            report.ok("mesh", format!("{} as {} in {}", mesh.interface, mesh.network, mesh.prefix))
        }
        None => report.ok("mesh", "none is configured: this machine gets no mesh identity"),
    }
}

fn server_settings(challenger: &Challenger) -> String {
    let protocol = match challenger.protocol {
        Protocol::Auto => "generation 2, or 1 where the server has no other",
        Protocol::V1 => "generation 1",
        Protocol::V2 => "generation 2",
    };
    let pcrs: Vec<_> = challenger.pcrs.iter().map(ToString::to_string).collect();
    let pem = challenger.certificate.as_deref().unwrap_or_default();
    let trusted = match pem.matches("-----BEGIN CERTIFICATE-----").count() {
        0 => "the system's authorities alone".to_owned(),
        number => format!("{number} certificate(s) beside the system's authorities"),
    };
    let mdns = if challenger.mdns { ", .local names by multicast alone" } else { "" };
    format!("{protocol}; PCRs {}; trusting {trusted}{mdns}", pcrs.join(","))
}

/// YAML files that are not among those that were read.
fn ignored(directories: &[PathBuf], read: &[PathBuf]) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for directory in directories {
        yaml_below(directory, MAX_DEPTH, &mut files);
    }
    files.retain(|file| !read.contains(file));
    files
}

fn yaml_below(directory: &Path, depth: u32, files: &mut Vec<PathBuf>) {
    let Ok(entries) = std::fs::read_dir(directory) else { return };
    let mut entries: Vec<_> = entries.flatten().collect();
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        let is_yaml =
            path.extension().is_some_and(|extension| extension == "yaml" || extension == "yml");
        match entry.file_type() {
            Ok(kind) if kind.is_dir() && depth > 0 => yaml_below(&path, depth - 1, files),
            Ok(kind) if kind.is_file() && is_yaml => files.push(path),
            _ => {}
        }
    }
}
