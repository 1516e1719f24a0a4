//! `latchkey status --boot`: how this boot's disk was opened, or why it was not, from the timeline that the initramfs left;
//! and when its mesh came up, from the agent's [`crate::milestones`].

use std::fmt::{self, Write as _};
use std::path::Path;

use latchkey_wire::timeline::{Mode, Outcome, Step, Timeline, VolumeOutcome};
use serde::Serialize;

use crate::error::Result;
use crate::handover::HandOver;
use crate::milestones::{self, Reached};
use crate::status::describe;

/// What is known of this boot.
#[derive(Debug, Serialize)]
pub struct BootReport {
    /// None if Latchkey unlocked nothing.
    #[serde(flatten)]
    timeline: Option<Timeline>,
    #[serde(skip_serializing_if = "Reached::is_empty")]
    mesh: Reached,
}

impl BootReport {
    /// # Errors
    /// [`crate::error::Error::BadTimeline`], or that it cannot be read; root alone can.
    pub fn read(hand_over: &HandOver) -> Result<Self> {
        let timeline = hand_over.boot()?;
        Ok(Self { timeline, mesh: milestones::read(Path::new(milestones::DIRECTORY)) })
    }

    /// Whether the disk was opened, be it by a person.
    #[must_use]
    pub fn is_open(&self) -> bool {
        let outcome = self.timeline.as_ref().map(|timeline| timeline.outcome);
        matches!(outcome, Some(Outcome::Unlocked | Outcome::Recovery))
    }

    /// The timeline as it was written, and `mesh` beside its fields once there is something to say; `null` where there is
    /// neither.
    ///
    /// # Errors
    /// None that can happen.
    pub fn to_json(&self) -> Result<String, serde_json::Error> {
        let known = self.timeline.is_some() || !self.mesh.is_empty();
        serde_json::to_string_pretty(&known.then_some(self))
    }

    /// For a person.
    #[must_use]
    pub fn to_text(&self) -> String {
        let mut text = String::new();
        // Writing to a String cannot fail.
        let _ = match &self.timeline {
            Some(timeline) => write_boot(&mut text, timeline),
            None => text.write_str(NOTHING),
        }
        .and_then(|()| self.write_steps(&mut text));
        text
    }

    /// One table: what the initramfs did, and what the agent went on to reach.
    fn write_steps(&self, out: &mut String) -> fmt::Result {
        let unlock = self.timeline.iter().flat_map(|timeline| &timeline.steps);
        let unlock = unlock.map(|step| (step.name.as_str(), step.at_ms, step.took_ms));
        let mesh = self.mesh.steps().map(|(name, at_ms)| (name, at_ms, 0));
        let steps: Vec<_> = unlock.chain(mesh).collect();
        if self.timeline.is_none() && steps.is_empty() {
            return Ok(());
        }
        let width = steps.iter().map(|(name, ..)| name.len()).max().unwrap_or(0).max(4);
        writeln!(out, "\n{:width$}  {:>9}  {:>9}", "step", "at", "took")?;
        steps.into_iter().try_for_each(|(name, at_ms, took_ms)| {
            let took = match took_ms {
                0 => String::new(),
                took => format!("{took} ms"),
            };
            let line = format!("{name:width$}  {:>7} s  {took:>9}", seconds(at_ms));
            writeln!(out, "{}", line.trim_end())
        })
    }
}

const NOTHING: &str = "Latchkey unlocked nothing in this boot: its initramfs left no /run/latchkey/timeline.json.
Either the initramfs has no `latchkey` module (add_dracutmodules+=\" latchkey \", then dracut --force),
or /run was not carried over to this system.
";

fn write_boot(out: &mut String, timeline: &Timeline) -> fmt::Result {
    writeln!(out, "boot: {}", timeline.boot_id)?;
    writeln!(out, "  outcome: {}", describe(timeline.outcome, timeline.mode))?;
    if let Some(reason) = &timeline.reason {
        writeln!(out, "  reason: {reason}")?;
    }
    if let Some((first, last)) = span(&timeline.steps) {
        writeln!(
            out,
            "  time: {} s, from {} s to {} s after the kernel started",
            seconds(last.saturating_sub(first)),
            seconds(first),
            seconds(last)
        )?;
    }
    timeline.volumes.iter().try_for_each(|volume| write_volume(out, volume, timeline.mode))
}

fn write_volume(out: &mut String, volume: &VolumeOutcome, mode: Mode) -> fmt::Result {
    writeln!(out, "\nvolume: {}", volume.label)?;
    writeln!(out, "  outcome: {}", describe(volume.outcome, mode))?;
    let facts = [
        ("reason", &volume.reason),
        ("device", &volume.device),
        ("uuid", &volume.uuid),
        ("mapper", &volume.mapper),
    ];
    facts.into_iter().try_for_each(|(name, fact)| match fact {
        Some(fact) => writeln!(out, "  {name}: {fact}"),
        None => Ok(()),
    })
}

/// From the beginning of the first step to the end of the last.
fn span(steps: &[Step]) -> Option<(u64, u64)> {
    let first = steps.iter().map(|step| step.at_ms).min()?;
    let last = steps.iter().map(|step| step.at_ms.saturating_add(step.took_ms)).max()?;
    Some((first, last))
}

fn seconds(milliseconds: u64) -> String {
    format!("{}.{:03}", milliseconds / 1000, milliseconds % 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(name: &str, at_ms: u64, took_ms: u64) -> Step {
        Step { name: name.into(), at_ms, took_ms }
    }

    fn report(timeline: Timeline) -> BootReport {
        BootReport { timeline: Some(timeline), mesh: Reached::default() }
    }

    #[test]
    fn a_boot_is_told_with_its_reason_and_steps() {
        let mut timeline = Timeline::new("5c0f", Outcome::Recovery, Mode::Online);
        timeline.reason = Some("kms:8082: quarantined".into());
        timeline.steps =
            vec![step("start", 6_389, 0), step("exchange", 6_504, 113), step("end", 12_000, 0)];
        let report = report(timeline);
        assert!(report.is_open());
        assert_eq!(
            report.to_text(),
            "\
boot: 5c0f
  outcome: unlocked with the recovery passphrase
  reason: kms:8082: quarantined
  time: 5.611 s, from 6.389 s to 12.000 s after the kernel started

step             at       took
start       6.389 s
exchange    6.504 s     113 ms
end        12.000 s
"
        );
        let json: serde_json::Value = serde_json::from_str(&report.to_json().unwrap()).unwrap();
        assert_eq!(json["outcome"], "recovery");
        assert_eq!(json["steps"][1]["took_ms"], 113);
        assert!(json.get("mesh").is_none());
    }

    #[test]
    fn the_mesh_comes_after_the_unlock() {
        let mut timeline = Timeline::new("5c0f", Outcome::Unlocked, Mode::Online);
        timeline.steps = vec![step("start", 6_389, 0), step("luks", 6_504, 113)];
        let mesh =
            Reached { device_up_ms: Some(9_001), joined_ms: Some(9_110), first_handshake_ms: None };
        let report = BootReport { timeline: Some(timeline), mesh };
        assert_eq!(
            report.to_text(),
            "\
boot: 5c0f
  outcome: unlocked by the key server
  time: 0.228 s, from 6.389 s to 6.617 s after the kernel started

step              at       took
start        6.389 s
luks         6.504 s     113 ms
device-up    9.001 s
joined       9.110 s
"
        );
        let json: serde_json::Value = serde_json::from_str(&report.to_json().unwrap()).unwrap();
        assert_eq!(json["boot_id"], "5c0f");
        assert_eq!(json["mesh"], serde_json::json!({"device_up_ms": 9001, "joined_ms": 9110}));

        // A machine that Latchkey did not unlock, as one with an ikto.json.
        let report = BootReport { timeline: None, ..report };
        assert!(!report.is_open());
        let text = report.to_text();
        assert!(text.starts_with(NOTHING) && text.ends_with("\njoined       9.110 s\n"), "{text}");
        let json: serde_json::Value = serde_json::from_str(&report.to_json().unwrap()).unwrap();
        assert_eq!(json, serde_json::json!({"mesh": {"device_up_ms": 9001, "joined_ms": 9110}}));
    }

    #[test]
    fn each_volume_is_told_with_what_became_of_it() {
        let mut timeline = Timeline::new("5c0f", Outcome::Failed, Mode::Offline);
        let volume = |label: &str, outcome| VolumeOutcome {
            label: label.into(),
            device: Some("/dev/sda3".into()),
            uuid: None,
            mapper: None,
            outcome,
            reason: None,
        };
        timeline.volumes = vec![
            VolumeOutcome {
                uuid: Some("85c39d0f".into()),
                mapper: Some("COS_PERSISTENT".into()),
                ..volume("COS_PERSISTENT", Outcome::Unlocked)
            },
            VolumeOutcome {
                device: None,
                reason: Some("no LUKS2 volume".into()),
                ..volume("COS_OEM", Outcome::Failed)
            },
        ];
        let text = report(timeline).to_text();
        let expected = "
volume: COS_PERSISTENT
  outcome: unlocked by the TPM
  device: /dev/sda3
  uuid: 85c39d0f
  mapper: COS_PERSISTENT

volume: COS_OEM
  outcome: not unlocked
  reason: no LUKS2 volume
";
        assert!(text.contains(expected), "{text}");
    }

    #[test]
    fn a_boot_that_failed_is_no_success() {
        for outcome in [Outcome::Failed, Outcome::Refused] {
            let report = report(Timeline::new("5c0f", outcome, Mode::Online));
            assert!(!report.is_open());
        }
    }

    #[test]
    fn no_timeline_is_said_with_what_to_do() {
        let report = BootReport { timeline: None, mesh: Reached::default() };
        assert!(!report.is_open());
        assert!(report.to_text().contains("add_dracutmodules"));
        assert_eq!(report.to_json().unwrap(), "null");
    }

    #[test]
    fn a_timeline_that_cannot_be_read_is_an_error_and_not_none() {
        let directory = tempfile::tempdir().unwrap();
        let hand_over = HandOver::at(directory.path());
        assert!(BootReport::read(&hand_over).unwrap().timeline.is_none());
        std::fs::write(directory.path().join("timeline.json"), r#"{"version":99}"#).unwrap();
        let error = BootReport::read(&hand_over).unwrap_err().to_string();
        assert!(error.contains("timeline.json"), "{error}");
    }
}
