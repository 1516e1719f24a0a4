//! Times as text (RFC 3339), in UTC.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// `2026-11-21T11:24:00Z`, as Go writes a time in UTC.
pub(crate) fn rfc3339(time: SystemTime) -> String {
    format!("{}Z", date_and_time(since_1970(time).as_secs()))
}

/// `2026-11-21T11:24:00.123Z`.
pub(crate) fn rfc3339_millis(time: SystemTime) -> String {
    let since = since_1970(time);
    format!("{}.{:03}Z", date_and_time(since.as_secs()), since.subsec_millis())
}

fn since_1970(time: SystemTime) -> Duration {
    time.duration_since(UNIX_EPOCH).unwrap_or_default()
}

fn date_and_time(seconds: u64) -> String {
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // Days since 0000-03-01, in cycles of 400 years (146,097 days); years begin in March, so that leap days come last.
    let days = days + 719_468;
    let (cycle, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, next) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    format!(
        "{:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}",
        400 * cycle + year + next,
        second / 3600,
        second / 60 % 60,
        second % 60
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_as_go_does() {
        for (seconds, written) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (951_868_800, "2000-03-01T00:00:00Z"),
            (1_709_251_199, "2024-02-29T23:59:59Z"),
            (1_735_689_599, "2024-12-31T23:59:59Z"),
            (1_795_260_000, "2026-11-21T11:20:00Z"),
            (4_107_542_399, "2100-02-28T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(rfc3339(UNIX_EPOCH + Duration::from_secs(seconds)), written);
        }
        let time = UNIX_EPOCH + Duration::from_millis(1_795_260_000_007);
        assert_eq!(rfc3339_millis(time), "2026-11-21T11:20:00.007Z");
    }
}
