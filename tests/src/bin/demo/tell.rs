//! How the demo talks: its own sentences, what the machine and the key server say in between, and the boot's timeline.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use latchkey_tests::{scenario::Unlocked, transcript::Transcript};
use regex_lite::Regex;

/// How often a relay looks for new lines.
const POLL: Duration = Duration::from_millis(15);

/// The teller: knows when the demo began.
pub(crate) struct Teller {
    began: Instant,
}

impl Teller {
    pub(crate) fn new() -> Self {
        Self { began: Instant::now() }
    }

    pub(crate) fn chapter(&self, title: &str) {
        println!("\n== {title}");
    }

    pub(crate) fn say(&self, text: &str) {
        // What was said before this is to stand before it.
        thread::sleep(3 * POLL);
        println!("[{:6.1} s] {text}", self.began.elapsed().as_secs_f64());
    }

    /// Repeats what a program says, line by line as it comes, until the returned guard is dropped.
    pub(crate) fn relay(&self, who: &'static str, transcript: &Transcript, pattern: &str) -> Relay {
        let stop = Arc::new(AtomicBool::new(false));
        let (transcript, stopped, began) = (transcript.clone(), stop.clone(), self.began);
        let regex = Regex::new(pattern);
        let thread = thread::spawn(move || {
            let mut told = 0;
            loop {
                let last = stopped.load(Ordering::Relaxed);
                for line in transcript.from(told) {
                    told += 1;
                    let is_for_us = line.text.starts_with("REPORT ");
                    if !is_for_us && regex.as_ref().is_ok_and(|r| r.is_match(&line.text)) {
                        let text = shortened(&line.text);
                        println!("[{:6.1} s]     {who:>7} | {text}", began.elapsed().as_secs_f64());
                    }
                }
                if last {
                    return;
                }
                thread::sleep(POLL);
            }
        });
        Relay { stop, thread: Some(thread) }
    }

    pub(crate) fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }
}

/// Ends a relay, after the last line, when dropped.
pub(crate) struct Relay {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // Only a panic in it makes this fail, and that has been printed.
            let _ = thread.join();
        }
    }
}

/// A log line without what the demo's reader has no use for: times, who logs, long hashes and ids.
fn shortened(line: &str) -> String {
    let line = line.rsplit_once("latchkey: ").map_or(line, |(_, said)| said);
    let is_hash = |w: &str| w.len() == 64 && w.bytes().all(|b| b.is_ascii_hexdigit());
    let is_noise = |w: &&str| {
        ["uuid=", "name=", "label=", "peer="].iter().any(|n| w.starts_with(n))
            || w.ends_with('Z') && w.starts_with("20")
    };
    let shorten = |w: &str| {
        let hash = w.rsplit('=').next().filter(|h| is_hash(h));
        hash.and_then(|h| h.get(12..)).map_or_else(|| w.to_owned(), |rest| w.replace(rest, "…"))
    };
    line.split_whitespace().filter(|w| !is_noise(w)).map(shorten).collect::<Vec<_>>().join(" ")
}

/// Characters of the chart's bars.
const WIDTH: u64 = 56;

/// The boot as bars, one line a step, in milliseconds since the kernel started.
pub(crate) fn chart(boot: &Unlocked) {
    let mut bars: Vec<(String, u64, u64)> = Vec::new();
    let first = boot.timeline.steps.iter().map(|s| s.at_ms).min().unwrap_or(0);
    bars.push(("kernel, initramfs".into(), 0, first));
    let steps = boot.timeline.steps.iter().filter(|s| s.name != "start" && s.name != "end");
    bars.extend(steps.map(|s| (s.name.clone(), s.at_ms, s.at_ms + s.took_ms)));
    let unlocked = bars.iter().map(|b| b.2).max().unwrap_or(first);
    let m = &boot.report.milestones;
    if let Some(system) = m.system_ms {
        bars.push(("to switch-root".into(), unlocked, system));
        if let Some(service) = m.service_ms {
            bars.push(("systemd".into(), system, service));
        }
    }
    if let (Some(service), Some(ready)) = (m.service_ms, m.service_ready_ms) {
        bars.push(("latchkey.service".into(), service, ready));
        if let Some(joined) = joined_ms(boot) {
            bars.push(("mesh joined".into(), service, joined));
        }
    }
    let end = bars.iter().map(|b| b.2).max().unwrap_or(1).max(1);
    println!("\n  {:<20} {:>7} {:>7}", "step", "at ms", "took");
    for (name, from, to) in bars {
        let (a, b) = (from * WIDTH / end, (to * WIDTH).div_ceil(end));
        let bar: String =
            (0..WIDTH).map(|x| if x >= a && x < b.max(a + 1) { '#' } else { '.' }).collect();
        println!("  {name:<20} {from:>7} {:>7}  {bar}", to.saturating_sub(from));
    }
}

/// When the node's record was in the registry and the others' on its device, in milliseconds since the kernel started.
fn joined_ms(boot: &Unlocked) -> Option<u64> {
    boot.report.status.pointer("/agent/node/joined_at_ms")?.as_u64()
}
