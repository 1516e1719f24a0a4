//! `doctor`: goes over everything an unlock needs and says of each what was found and what to do, in the initramfs' shell and in
//! the running system alike.
//!
//! It makes nothing: no passphrase, no volume, no entry at a key server, which it asks no more than whether it is there. Only with
//! [`Options::unlock_test`] does it do what a boot does, up to and not including the mapping.

mod clock;
mod configuration;
mod initramfs;
mod network;
mod report;
mod server;
mod tpm;
mod volumes;

use std::path::PathBuf;

use latchkey_config::{Challenger, Config};

use crate::BootError;
use crate::disk::{Volume, scan};

use report::Report;
pub use report::{Finding, Level};

/// What `doctor` was told.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// `--config`.
    pub directories: Vec<PathBuf>,
    pub tpm_device: Option<String>,
    /// Get each volume's passphrase and try it.
    pub unlock_test: bool,
}

/// Checks everything; `show` gets each finding as it is made. Returns all of them.
///
/// # Errors
/// Of `show` alone.
pub fn run(
    options: &Options,
    show: &mut dyn FnMut(&Finding) -> Result<(), BootError>,
) -> Result<Vec<Finding>, BootError> {
    let mut report = Report::new(show);
    let config = configuration::check(&mut report, &options.directories)?;
    let mut settings =
        config.as_ref().map_or_else(Challenger::default, |config| config.challenger.clone());
    if let Some(device) = &options.tpm_device {
        settings.tpm_device = Some(device.clone());
    }
    clock::check(&mut report)?;
    tpm::check(&mut report, &settings, config.is_some())?;
    if let Some(config) = &config {
        let config = Config { challenger: settings, ..config.clone() };
        network::check(&mut report, &config)?;
        server::check(&mut report, &config.challenger)?;
        volumes::check(&mut report, &config, &scan(), options.unlock_test)?;
        initramfs::check(&mut report, &config)?;
    }
    Ok(report.into_findings())
}

/// Checks the volumes that the configuration names among `volumes`.
///
/// # Errors
/// As [`run`].
pub fn check_volumes(
    config: &Config,
    volumes: &[Volume],
    unlock_test: bool,
) -> Result<Vec<Finding>, BootError> {
    let mut quiet = |_: &Finding| Ok(());
    let mut report = Report::new(&mut quiet);
    volumes::check(&mut report, config, volumes, unlock_test)?;
    Ok(report.into_findings())
}

/// What the findings come to, as a result of the program.
///
/// # Errors
/// [`BootError::Unhealthy`] with the exit code of the first failure.
pub fn verdict(findings: &[Finding]) -> Result<(), BootError> {
    let failed: Vec<_> = findings.iter().filter(|finding| finding.level == Level::Fail).collect();
    match failed.first() {
        None => Ok(()),
        Some(first) => Err(BootError::Unhealthy {
            failed: failed.len(),
            checks: findings.len(),
            code: first.code,
        }),
    }
}

/// All findings for a program.
#[must_use]
pub fn to_json(findings: &[Finding]) -> String {
    report::to_json(findings)
}
