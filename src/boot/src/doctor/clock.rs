//! The clock: certificates are held to it, unless it is obviously wrong (`dial::tls`).

use std::time::{Duration, SystemTime};

use super::report::Report;
use crate::BootError;
use crate::dial::tls;

/// No installation is that old when it boots.
const TOO_LATE: Duration = Duration::from_secs(15 * 365 * 86_400);

pub(super) fn check(report: &mut Report<'_>) -> Result<(), BootError> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let floor = tls::floor();
    let shown = format!("{} UTC", date(now));
    if tls::lag().is_some() {
        return report.warn(
            "clock",
            format!("{shown}, which is before this program was built ({} UTC)", date(floor)),
            "certificates are held to the later of the two; see to the clock's battery",
        );
    }
    if now > floor + TOO_LATE {
        return report.warn(
            "clock",
            format!("{shown}, long after this program was built ({} UTC)", date(floor)),
            "if it is wrong, the server's certificate looks expired: set it in the firmware",
        );
    }
    report.ok("clock", shown)
}

/// `2026-11-21 11:30`, of a time since 1970; the days by Hinnant's `civil_from_days`.
fn date(since_1970: Duration) -> String {
    let seconds = since_1970.as_secs();
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Counted from March 1st of the year 0, leap days are at the end of a year and of an era of 400.
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let (month, carry) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    let year = era * 400 + year_of_era + carry;
    format!("{year}-{month:02}-{day:02} {:02}:{:02}", rest / 3_600, rest / 60 % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (seconds, text) in [
            (0, "1970-01-01 00:00"),
            (951_782_400, "2000-02-29 00:00"),
            (951_868_800, "2000-03-01 00:00"),
            (1_735_689_599, "2024-12-31 23:59"),
            (4_107_542_399, "2100-02-28 23:59"),
            (4_107_542_400, "2100-03-01 00:00"),
        ] {
            assert_eq!(date(Duration::from_secs(seconds)), text);
        }
    }
}
