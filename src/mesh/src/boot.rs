//! `latchkey status --boot`: how this boot's disk was opened, or why it was not, from the timeline that the initramfs left.

use std::fmt::{self, Write as _};

use latchkey_wire::timeline::{Mode, Outcome, Step, Timeline, VolumeOutcome};

use crate::error::Result;
use crate::handover::HandOver;
use crate::status::describe;

/// The timeline of this boot, if Latchkey had anything to do with it.
#[derive(Debug)]
pub struct BootReport(Option<Timeline>);

impl BootReport {
    /// # Errors
    /// [`crate::error::Error::BadTimeline`], or that it cannot be read; root alone can.
    pub fn read(hand_over: &HandOver) -> Result<Self> {
        hand_over.boot().map(Self)
    }

    /// Whether the disk was opened, be it by a person.
    #[must_use]
    pub fn is_open(&self) -> bool {
        let outcome = self.0.as_ref().map(|timeline| timeline.outcome);
        matches!(outcome, Some(Outcome::Unlocked | Outcome::Recovery))
    }

    /// The timeline as it was written; `null` where there is none.
    ///
    /// # Errors
    /// None that can happen.
    pub fn to_json(&self) -> Result<String, serde_json::Error> {
        serde_json::to_string_pretty(&self.0)
    }

    /// For a person.
    #[must_use]
    pub fn to_text(&self) -> String {
        let mut text = String::new();
        // Writing to a String cannot fail.
        let _ = match &self.0 {
            Some(timeline) => write_timeline(&mut text, timeline),
            None => text.write_str(NOTHING),
        };
        text
    }
}

const NOTHING: &str = "Latchkey unlocked nothing in this boot: its initramfs left no /run/latchkey/timeline.json.
Either the initramfs has no `latchkey` module (add_dracutmodules+=\" latchkey \", then dracut --force),
or /run was not carried over to this system.
";

fn write_timeline(out: &mut String, timeline: &Timeline) -> fmt::Result {
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
    timeline.volumes.iter().try_for_each(|volume| write_volume(out, volume, timeline.mode))?;
    let width = timeline.steps.iter().map(|step| step.name.len()).max().unwrap_or(0).max(4);
    writeln!(out, "\n{:width$}  {:>9}  {:>9}", "step", "at", "took")?;
    timeline.steps.iter().try_for_each(|step| {
        let took = match step.took_ms {
            0 => String::new(),
            took => format!("{took} ms"),
        };
        let line = format!("{:width$}  {:>7} s  {took:>9}", step.name, seconds(step.at_ms));
        writeln!(out, "{}", line.trim_end())
    })
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

    #[test]
    fn a_boot_is_told_with_its_reason_and_steps() {
        let mut timeline = Timeline::new("5c0f", Outcome::Recovery, Mode::Online);
        timeline.reason = Some("kms:8082: quarantined".into());
        timeline.steps =
            vec![step("start", 6_389, 0), step("exchange", 6_504, 113), step("end", 12_000, 0)];
        let report = BootReport(Some(timeline));
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
        let text = BootReport(Some(timeline)).to_text();
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
            let report = BootReport(Some(Timeline::new("5c0f", outcome, Mode::Online)));
            assert!(!report.is_open());
        }
    }

    #[test]
    fn no_timeline_is_said_with_what_to_do() {
        let report = BootReport(None);
        assert!(!report.is_open());
        assert!(report.to_text().contains("add_dracutmodules"));
        assert_eq!(report.to_json().unwrap(), "null");
    }

    #[test]
    fn a_timeline_that_cannot_be_read_is_an_error_and_not_none() {
        let directory = tempfile::tempdir().unwrap();
        let hand_over = HandOver::at(directory.path());
        assert!(BootReport::read(&hand_over).unwrap().0.is_none());
        std::fs::write(directory.path().join("timeline.json"), r#"{"version":99}"#).unwrap();
        let error = BootReport::read(&hand_over).unwrap_err().to_string();
        assert!(error.contains("timeline.json"), "{error}");
    }
}
