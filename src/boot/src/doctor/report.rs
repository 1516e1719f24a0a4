//! Findings, and how they are shown.

use std::fmt;

use serde_json::json;

use crate::BootError;

/// The version of the JSON form. Fields may be added; what is there keeps its meaning.
const VERSION: u32 = 1;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    Ok,
    /// It works, though not as it could; or it cannot be told from here.
    Warn,
    /// It keeps volumes closed.
    Fail,
}

impl Level {
    fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "FAIL",
        }
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    pub level: Level,
    pub what: String,
    pub found: String,
    /// What to do; empty where nothing is to be done, or where `found` says it.
    pub advice: String,
    /// The exit code of an unlock that fails for this; 0 unless it is a failure.
    pub code: u8,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:4}  {}: {}", self.level.name(), self.what, self.found)?;
        if self.advice.is_empty() { Ok(()) } else { write!(f, "; {}", self.advice) }
    }
}

/// Takes findings and shows them at once: some checks take their time.
pub(super) struct Report<'a> {
    show: &'a mut dyn FnMut(&Finding) -> Result<(), BootError>,
    findings: Vec<Finding>,
}

impl<'a> Report<'a> {
    pub(super) fn new(show: &'a mut dyn FnMut(&Finding) -> Result<(), BootError>) -> Self {
        Self { show, findings: Vec::new() }
    }

    pub(super) fn into_findings(self) -> Vec<Finding> {
        self.findings
    }

    pub(super) fn ok(
        &mut self,
        what: impl Into<String>,
        found: impl Into<String>,
    ) -> Result<(), BootError> {
        self.add(Level::Ok, what.into(), found.into(), String::new(), 0)
    }

    pub(super) fn warn(
        &mut self,
        what: impl Into<String>,
        found: impl Into<String>,
        advice: impl Into<String>,
    ) -> Result<(), BootError> {
        self.add(Level::Warn, what.into(), found.into(), advice.into(), 0)
    }

    pub(super) fn fail(
        &mut self,
        code: u8,
        what: impl Into<String>,
        found: impl Into<String>,
        advice: impl Into<String>,
    ) -> Result<(), BootError> {
        self.add(Level::Fail, what.into(), found.into(), advice.into(), code)
    }

    /// An error of the program says itself what to do.
    pub(super) fn error(
        &mut self,
        what: impl Into<String>,
        error: &BootError,
    ) -> Result<(), BootError> {
        self.fail(error.exit_code(), what, error.to_string(), "")
    }

    fn add(
        &mut self,
        level: Level,
        what: String,
        found: String,
        advice: String,
        code: u8,
    ) -> Result<(), BootError> {
        let finding = Finding { level, what, found, advice, code };
        (self.show)(&finding)?;
        self.findings.push(finding);
        Ok(())
    }
}

pub(super) fn to_json(findings: &[Finding]) -> String {
    let checks: Vec<_> = findings
        .iter()
        .map(|finding| {
            json!({
                "level": finding.level.name().to_ascii_lowercase(),
                "what": finding.what,
                "found": finding.found,
                "advice": finding.advice,
                "code": finding.code,
            })
        })
        .collect();
    let healthy = findings.iter().all(|finding| finding.level != Level::Fail);
    format!("{:#}\n", json!({"version": VERSION, "healthy": healthy, "checks": checks}))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finding_is_one_line() {
        let mut lines = Vec::new();
        let mut show = |finding: &Finding| {
            lines.push(finding.to_string());
            Ok(())
        };
        let mut report = Report::new(&mut show);
        report.ok("clock", "2026").unwrap();
        report.fail(11, "TPM", "none", "enable it").unwrap();
        let findings = report.into_findings();
        assert_eq!(lines, ["ok    clock: 2026", "FAIL  TPM: none; enable it"]);
        let json: serde_json::Value = serde_json::from_str(&to_json(&findings)).unwrap();
        assert_eq!(json["healthy"], false);
        assert_eq!(json["checks"][1]["code"], 11);
    }
}
