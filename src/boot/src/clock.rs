//! Time since the kernel started, and the steps of a boot measured with it.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use latchkey_wire::timeline::Step;
use nix::time::{ClockId, clock_gettime};

/// CLOCK_BOOTTIME: what a console message and `systemd-analyze` count from.
#[must_use]
pub fn since_boot() -> Duration {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from)
}

/// The steps done so far, shared by the threads that do them.
#[derive(Clone, Debug, Default)]
pub struct Steps(Arc<Mutex<Vec<Step>>>);

impl Steps {
    /// Does `work` and notes when it began and how long it took, whatever came of it.
    pub fn time<T>(&self, name: &str, work: impl FnOnce() -> T) -> T {
        let began = since_boot();
        let result = work();
        let took = since_boot().saturating_sub(began);
        log::debug!("{name}: {} ms", took.as_millis());
        self.push(name, began, took);
        result
    }

    /// Notes something that began then, counted from the start of the kernel, and has come to its end now.
    pub fn since(&self, name: &str, began: Duration) {
        self.push(name, began, since_boot().saturating_sub(began));
    }

    /// Notes something that has no length.
    pub fn mark(&self, name: &str) {
        self.push(name, since_boot(), Duration::ZERO);
    }

    /// All steps, in the order in which they began.
    #[must_use]
    pub fn taken(&self) -> Vec<Step> {
        let mut steps = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        steps.sort_by_key(|step| step.at_ms);
        steps
    }

    fn push(&self, name: &str, began: Duration, took: Duration) {
        let step = Step { name: name.to_owned(), at_ms: millis(began), took_ms: millis(took) };
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(step);
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
