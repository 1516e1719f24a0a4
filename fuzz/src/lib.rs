//! What the targets of libFuzzer share: the memory that one input may cost.

use peak_alloc::PeakAlloc;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

#[doc(hidden)]
pub use libfuzzer_sys::fuzz_target;

/// Times its own size, for every copy and tree that is made of an input and of what is made of it again; and what an empty
/// one costs.
const FACTOR: usize = 512;
const BASE: usize = 8 * 1024 * 1024;

/// Runs a target on one input.
///
/// # Panics
/// If the target does, or if the input cost more memory than its size explains.
pub fn run(target: &str, data: &[u8]) {
    ALLOCATOR.reset_peak_usage();
    let before = ALLOCATOR.current_usage();
    latchkey_fuzz_targets::run(target, data);
    let peak = ALLOCATOR.peak_usage().saturating_sub(before);
    assert!(peak <= BASE + FACTOR * data.len(), "{} bytes cost {peak} bytes of memory", data.len());
}

/// The libFuzzer program of a target.
#[macro_export]
macro_rules! target {
    ($name:literal) => {
        $crate::fuzz_target!(|data: &[u8]| $crate::run($name, data));
    };
}
