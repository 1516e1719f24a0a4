//! The initramfs: is Latchkey in it, does it bring the network up, and how did it end this time.

use std::fs;
use std::path::{Path, PathBuf};

use latchkey_config::Config;
use latchkey_config::cmdline::{CMDLINE, is_live, words};
use latchkey_wire::timeline::{MAX_TIMELINE, Outcome, Timeline};

use super::network::is_initramfs;
use super::report::Report;
use crate::{BootError, handover};

const MODULE: &str = "/usr/lib/dracut/modules.d/50latchkey";
/// Where Kairos looks for its plugin.
const PLUGIN: &str = "/system/discovery/kcrypt-discovery-challenger";
const DRACUT_CONF: [&str; 3] =
    ["/etc/dracut.conf", "/etc/dracut.conf.d", "/usr/lib/dracut/dracut.conf.d"];
/// Words that keep our unit from unlocking.
const OFF: [&str; 4] =
    ["rd.latchkey=0", "rd.latchkey=no", "latchkey.unlock=0", "latchkey.unlock=no"];

pub(super) fn check(report: &mut Report<'_>, config: &Config) -> Result<(), BootError> {
    let cmdline = fs::read(CMDLINE).unwrap_or_default();
    let cmdline = String::from_utf8_lossy(&cmdline);
    let words = words(&cmdline);
    let has = |wanted: &str| words.iter().any(|word| word == wanted);
    if !config.challenger.servers.is_empty() {
        if has("rd.neednet=1") {
            report.ok("kernel command line", "rd.neednet=1 is there")?;
        } else {
            report.warn(
                "kernel command line",
                "rd.neednet=1 is not there",
                "nothing brings the network up in the initramfs without it: install.grub_options.extra_cmdline, or grub's configuration",
            )?;
        }
    }
    if let Some(word) = OFF.iter().find(|word| has(word)) {
        report.warn(
            "kernel command line",
            format!("{word} keeps Latchkey from unlocking"),
            "take it off",
        )?;
    }
    if is_live(&cmdline) {
        report.warn(
            "kernel command line",
            "this is a live system",
            "it unlocks nothing by itself; PCRs are not those of the installed system",
        )?;
    }
    if is_initramfs() {
        return report.ok("initramfs", "this is it");
    }
    check_installation(report)?;
    check_boot(report)
}

fn check_installation(report: &mut Report<'_>) -> Result<(), BootError> {
    if Path::new(MODULE).exists() {
        let asked = DRACUT_CONF.iter().flat_map(|path| files(Path::new(path))).any(|file| {
            fs::read_to_string(file).is_ok_and(|text| {
                text.lines()
                    .any(|line| !line.trim_start().starts_with('#') && line.contains("latchkey"))
            })
        });
        if asked {
            return report.ok("initramfs", "dracut is told to take the module latchkey in");
        }
        return report.warn(
            "initramfs",
            "dracut has the module latchkey, and nothing asks for it",
            "add_dracutmodules+=\" latchkey \" in /etc/dracut.conf.d, then dracut --force",
        );
    }
    if Path::new(PLUGIN).exists() {
        return report.ok("initramfs", format!("{PLUGIN} is there for Kairos' own"));
    }
    report.warn(
        "initramfs",
        format!("neither {MODULE} nor {PLUGIN} is there"),
        "make install puts both in place",
    )
}

/// A file, or the files in a directory.
fn files(path: &Path) -> Vec<PathBuf> {
    match fs::read_dir(path) {
        Ok(entries) => entries.flatten().map(|entry| entry.path()).collect(),
        Err(_) => vec![path.to_owned()],
    }
}

fn check_boot(report: &mut Report<'_>) -> Result<(), BootError> {
    let path = Path::new(handover::DIRECTORY).join("timeline.json");
    let what = "this boot";
    let bytes = match fs::metadata(&path) {
        Ok(metadata) if metadata.len() <= MAX_TIMELINE as u64 => {
            fs::read(&path).unwrap_or_default()
        }
        _ => {
            return report.warn(
                what,
                format!("{} is not there", path.display()),
                "Latchkey opened no volume in this boot's initramfs, or this is not root",
            );
        }
    };
    match Timeline::from_json(&bytes) {
        Err(error) => report.warn(what, format!("{}: {error}", path.display()), ""),
        Ok(timeline) => report_timeline(report, &timeline),
    }
}

fn report_timeline(report: &mut Report<'_>, timeline: &Timeline) -> Result<(), BootError> {
    const STEPS: &str = "`latchkey status --boot` has the steps";
    let told = |outcome, reason: &Option<String>| {
        let reason = reason.as_deref().map_or_else(String::new, |reason| format!(": {reason}"));
        match outcome {
            Outcome::Unlocked => "unlocked by itself".to_owned(),
            Outcome::Recovery => format!("unlocked by a person{reason}"),
            Outcome::Refused => format!("refused by the key server{reason}"),
            Outcome::Failed => format!("not unlocked{reason}"),
        }
    };
    let mut all =
        vec![("this boot".to_owned(), timeline.outcome, told(timeline.outcome, &timeline.reason))];
    all.extend(timeline.volumes.iter().map(|volume| {
        (
            format!("this boot, {}", volume.label),
            volume.outcome,
            told(volume.outcome, &volume.reason),
        )
    }));
    for (what, outcome, found) in all {
        match outcome {
            Outcome::Unlocked => report.ok(what, found)?,
            _ => report.warn(what, found, STEPS)?,
        }
    }
    Ok(())
}
