//! What a running program said, line by line with the time of each, for tests to wait on and search.

use std::{
    fmt::Write as _,
    fs::File,
    io::{Read, Write as _},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use regex_lite::Regex;

use crate::error::{Error, Result};

/// One line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// Milliseconds on the host's clock since the program was started, when what stands there began.
    pub at_ms: u64,
    /// As it stands on a terminal: what was overwritten after a carriage return, and colours, left out.
    pub text: String,
    /// Every character as it came, without the line end.
    raw: String,
}

#[derive(Debug, Default)]
struct State {
    lines: Vec<Line>,
    /// The last of `lines` has no line end yet: a prompt, most often.
    open: bool,
    ended: bool,
}

/// A transcript that grows while its program runs. Clones share it.
#[derive(Debug, Clone)]
pub struct Transcript {
    who: String,
    shared: Arc<(Mutex<State>, Condvar)>,
}

impl Transcript {
    /// Follows `source` in a thread of its own until it ends, with a copy to `log`, each line with its milliseconds.
    pub fn follow(
        who: &str,
        source: impl Read + Send + 'static,
        log: File,
        started: Instant,
    ) -> Self {
        let transcript = Self { who: who.to_owned(), shared: Arc::default() };
        let writer = transcript.clone();
        thread::spawn(move || writer.pump(source, log, started));
        transcript
    }

    fn pump(&self, mut source: impl Read, mut log: File, started: Instant) {
        let mut buffer = [0; 8192];
        let mut pending = Vec::new();
        while let Ok(n) = source.read(&mut buffer) {
            if n == 0 {
                break;
            }
            pending.extend_from_slice(buffer.get(..n).unwrap_or_default());
            let at_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
            while let Some(end) = pending.iter().position(|&b| b == b'\n') {
                let bytes: Vec<u8> = pending.drain(..=end).collect();
                let line = self.put(&bytes, at_ms, false);
                // The copy is for a person; the harness does without it if the disk is full.
                let _ = writeln!(log, "{:>8} {}", line.at_ms, line.text);
            }
            if !pending.is_empty() {
                self.put(&pending, at_ms, true);
            }
        }
        let _ = writeln!(log, "{:>8} {}", "end", String::from_utf8_lossy(&pending));
        self.lock().ended = true;
        self.shared.1.notify_all();
    }

    fn put(&self, bytes: &[u8], at_ms: u64, open: bool) -> Line {
        let raw = String::from_utf8_lossy(bytes).trim_end_matches(['\r', '\n']).to_owned();
        let text = as_shown(&raw);
        let mut state = self.lock();
        let unfinished = if state.open { state.lines.pop() } else { None };
        // A prompt that a log line took the place of does not date the log line.
        let goes_on = unfinished.filter(|l| !l.text.trim().is_empty() && text.starts_with(&l.text));
        let line = Line { at_ms: goes_on.map_or(at_ms, |l| l.at_ms), text, raw };
        state.lines.push(line.clone());
        state.open = open;
        drop(state);
        self.shared.1.notify_all();
        line
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first line that matches, as soon as there is one, be it unfinished, as prompts are.
    pub fn wait_for(&self, pattern: &str, timeout: Duration) -> Result<Line> {
        self.wait(pattern, 1, false, timeout)
    }

    /// The first finished line that matches: for lines that are read, not only waited for.
    pub fn wait_for_finished(&self, pattern: &str, timeout: Duration) -> Result<Line> {
        self.wait(pattern, 1, true, timeout)
    }

    /// The `n`th line that matches, counted from 1, as soon as there is one.
    pub fn wait_for_nth(&self, pattern: &str, n: usize, timeout: Duration) -> Result<Line> {
        self.wait(pattern, n, false, timeout)
    }

    fn wait(&self, pattern: &str, n: usize, finished: bool, timeout: Duration) -> Result<Line> {
        let regex = compile(pattern)?;
        let deadline = Instant::now() + timeout;
        let mut state = self.lock();
        loop {
            let considered =
                state.lines.len() - usize::from(finished && state.open && !state.ended);
            let mut matching =
                state.lines.iter().take(considered).filter(|l| regex.is_match(&l.text));
            if let Some(line) = matching.nth(n - 1) {
                return Ok(line.clone());
            }
            let (who, pattern, tail) = (self.who.clone(), pattern.to_owned(), tail(&state.lines));
            if state.ended {
                return Err(Error::Ended { who, pattern, tail });
            }
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                return Err(Error::Timeout { who, pattern, seconds: timeout.as_secs(), tail });
            };
            state =
                self.shared.1.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits until the program has closed its output.
    pub fn wait_for_end(&self, timeout: Duration) -> Result<()> {
        let deadline = Instant::now() + timeout;
        let mut state = self.lock();
        while !state.ended {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                let (who, tail) = (self.who.clone(), tail(&state.lines));
                return Err(Error::StillRunning { who, seconds: timeout.as_secs(), tail });
            };
            state =
                self.shared.1.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    /// Every line up to now that matches.
    pub fn matching(&self, pattern: &str) -> Result<Vec<Line>> {
        let regex = compile(pattern)?;
        Ok(self.lock().lines.iter().filter(|l| regex.is_match(&l.text)).cloned().collect())
    }

    /// Whether `text` stands anywhere in what was said, overwritten or not, line ends left out, so that a wrapped secret is
    /// found too.
    pub fn contains(&self, text: &str) -> bool {
        self.joined().contains(text)
    }

    /// How often `text` was said, overwritten or not.
    pub fn count(&self, text: &str) -> usize {
        count(&self.lock(), text)
    }

    /// Whether `text` was said more than `than` times within `timeout`; an error when the program ended without.
    pub fn wait_for_more(&self, text: &str, than: usize, timeout: Duration) -> Result<bool> {
        let deadline = Instant::now() + timeout;
        let mut state = self.lock();
        while count(&state, text) <= than {
            if state.ended {
                let (who, tail) = (self.who.clone(), tail(&state.lines));
                return Err(Error::Ended { who, pattern: text.to_owned(), tail });
            }
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                return Ok(false);
            };
            state =
                self.shared.1.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(true)
    }

    /// Everything that was said, overwritten or not, line ends left out.
    pub fn joined(&self) -> String {
        self.lock().lines.iter().map(|l| l.raw.as_str()).collect()
    }

    /// The finished lines from the `n`th on, counted from 0, as far as there are any.
    pub fn from(&self, n: usize) -> Vec<Line> {
        let state = self.lock();
        let finished = state.lines.len() - usize::from(state.open);
        state.lines.get(n..finished).unwrap_or_default().to_vec()
    }

    /// The last lines, for a message.
    pub fn tail(&self) -> String {
        tail(&self.lock().lines)
    }
}

fn count(state: &State, text: &str) -> usize {
    state.lines.iter().map(|l| l.raw.matches(text).count()).sum()
}

/// A line as a terminal shows it: what follows the last carriage return, without control sequences (ECMA-48 CSI).
fn as_shown(raw: &str) -> String {
    let mut shown = String::new();
    let mut rest = raw.chars();
    while let Some(c) = rest.next() {
        match c {
            '\r' => shown.clear(),
            '\u{1b}' if rest.as_str().starts_with('[') => {
                rest.next();
                let _ = rest.by_ref().find(|c| ('@'..='~').contains(c));
            }
            c if c.is_control() && c != '\t' => {}
            c => shown.push(c),
        }
    }
    shown
}

fn compile(pattern: &str) -> Result<Regex> {
    Regex::new(pattern)
        .map_err(|e| Error::Setup(format!("the pattern /{pattern}/ is no regular expression: {e}")))
}

fn tail(lines: &[Line]) -> String {
    lines.iter().skip(lines.len().saturating_sub(20)).fold(String::new(), |mut all, l| {
        let _ = writeln!(all, "  {:>7} {}", l.at_ms, l.text);
        all
    })
}

#[cfg(test)]
mod tests {
    use super::as_shown;

    #[test]
    fn a_line_is_what_a_terminal_shows_of_it() {
        for (raw, shown) in [
            ("plain", "plain"),
            ("Prompt: \r\u{1b}[Klatchkey: news", "latchkey: news"),
            ("\u{1b}[0;1;31mred\u{1b}[0m", "red"),
            ("\u{1b}[H\u{1b}[J\u{1b}[1;1HGRUB", "GRUB"),
            ("\u{1b}", ""),
            ("\u{1b}[", ""),
        ] {
            assert_eq!(as_shown(raw), shown, "{raw:?}");
        }
    }
}
