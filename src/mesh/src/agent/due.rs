//! When an agent has to do what nobody tells it to do.

use std::time::{Duration, Instant};

/// The longest that a silent change stays unnoticed.
pub(super) const TICK: Duration = Duration::from_secs(30);

/// When what is to be done.
#[derive(Debug, Default)]
pub(super) struct Due {
    pub(super) tick: Option<Instant>,
    pub(super) alive: Option<Instant>,
    pub(super) look: Option<Instant>,
    pub(super) claim: Option<Instant>,
    pub(super) patience: Option<Instant>,
    pub(super) hold: Option<Instant>,
    pub(super) show: Option<Instant>,
    pub(super) measure: Option<Instant>,
    pub(super) store: Option<Instant>,
    pub(super) names: Option<Instant>,
    pub(super) ask: Option<Instant>,
    pub(super) handshake: Option<Instant>,
}

impl Due {
    /// The first of them.
    pub(super) fn next(&self, now: Instant) -> Instant {
        let all = [
            self.tick,
            self.alive,
            self.look,
            self.claim,
            self.patience,
            self.hold,
            self.show,
            self.measure,
            self.store,
            self.names,
            self.ask,
            self.handshake,
        ];
        all.into_iter().flatten().min().unwrap_or(now + TICK)
    }
}

/// Whether it is time; then it is no longer due.
pub(super) fn is_due(due: &mut Option<Instant>, now: Instant) -> bool {
    due.take_if(|at| *at <= now).is_some()
}

/// Due by then, or earlier.
pub(super) fn by(due: &mut Option<Instant>, at: Instant) {
    *due = Some(due.map_or(at, |due| due.min(at)));
}
