//! Log lines that strangers can cause as often as they like: one in a while is written, the others are counted.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// How long a line of one kind silences the next.
const PAUSE: Duration = Duration::from_secs(1);

/// One kind of line.
#[derive(Debug, Default)]
pub(crate) struct Quiet(Mutex<Said>);

#[derive(Debug, Default)]
struct Said {
    last: Option<Instant>,
    since: u64,
}

impl Quiet {
    /// Writes the line, or counts it if one was written a moment ago.
    pub(crate) fn warn(&self, line: std::fmt::Arguments<'_>) {
        let mut said = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if said.last.is_some_and(|last| last.elapsed() < PAUSE) {
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
