//! Log lines that strangers can cause as often as they like: one in a while is written, the others are counted.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// How long a line of one kind silences the next.
const PAUSE: Duration = Duration::from_secs(1);

/// One kind of line.
#[derive(Debug)]
pub(crate) struct Quiet {
    pause: Duration,
    said: Mutex<Said>,
}

impl Default for Quiet {
    fn default() -> Self {
        Self::every(PAUSE)
    }
}

#[derive(Debug, Default)]
struct Said {
    last: Option<Instant>,
    since: u64,
}

impl Quiet {
    /// A kind of line that is written once in this time.
    pub(crate) fn every(pause: Duration) -> Self {
        Self { pause, said: Mutex::default() }
    }

    /// Writes the line, or counts it if one was written a moment ago.
    pub(crate) fn warn(&self, line: std::fmt::Arguments<'_>) {
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        if said.last.is_some_and(|last| last.elapsed() < self.pause) {
            said.since += 1;
            return;
        }
        said.last = Some(Instant::now());
        match std::mem::take(&mut said.since) {
            0 => log::warn!("{line}"),
            more => log::warn!("{line} (and {more} like it that were not logged)"),
        }
    }
}
