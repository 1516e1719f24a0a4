//! What a process has cost so far.

use std::time::Duration;

/// Processor time, in its own code and in the kernel's on its behalf.
pub(crate) fn cpu(pid: u32) -> Duration {
    // Field 1 is the nanoseconds on a processor; of each thread, as those that ended do not count for the process.
    let nanoseconds: u64 = std::fs::read_dir(format!("/proc/{pid}/task"))
        .unwrap()
        .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("schedstat")).ok())
        .filter_map(|line| line.split(' ').next()?.parse::<u64>().ok())
        .sum();
    Duration::from_nanos(nanoseconds)
}

/// MiB of memory, by its name in /proc/PID/status.
pub(crate) fn memory(pid: u32, field: &str) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
    line.trim().trim_end_matches(" kB").parse::<f64>().unwrap() / 1024.0
}
