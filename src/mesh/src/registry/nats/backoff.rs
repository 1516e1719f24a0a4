//! How long to wait before the next attempt: soon at first, then longer, never the same on two machines.

use std::time::Duration;

/// The longest wait. A registry that comes back is found within it by every node of a fleet, and by no two at once.
const CAP: Duration = Duration::from_secs(30);

#[derive(Debug)]
pub(super) struct Backoff {
    first: Duration,
    failures: u32,
}

impl Backoff {
    /// The first wait is around `first`, each further one around twice the one before.
    pub(super) fn new(first: Duration) -> Self {
        Self { first, failures: 0 }
    }

    /// After a success that lasted.
    pub(super) fn reset(&mut self) {
        self.failures = 0;
    }

    /// Between half and all of what is due.
    pub(super) fn next(&mut self) -> Duration {
        let factor = 2_u32.checked_pow(self.failures).unwrap_or(u32::MAX);
        self.failures = self.failures.saturating_add(1);
        let due = self.first.saturating_mul(factor).min(CAP);
        due / 2 + up_to(due / 2)
    }
}

/// Anything from nothing to `most`.
pub(super) fn up_to(most: Duration) -> Duration {
    // Without random numbers all wait longest.
    let share = f64::from(getrandom::u32().unwrap_or(u32::MAX)) / f64::from(u32::MAX);
    most.mul_f64(share)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_from_the_first_to_half_a_minute_and_differ() {
        let mut backoff = Backoff::new(Duration::from_millis(100));
        let waits: Vec<_> = (0..40).map(|_| backoff.next()).collect();
        assert!(waits[0] <= Duration::from_millis(100));
        assert!(waits.iter().all(|wait| *wait >= Duration::from_millis(50) && *wait <= CAP));
        let late = &waits[20..];
        assert!(late.iter().all(|wait| *wait >= CAP / 2));
        assert!(late.windows(2).any(|two| two[0] != two[1]));
        backoff.reset();
        assert!(backoff.next() <= Duration::from_millis(100));
    }
}
