//! Endpoints given as DNS names: looked up when they are new, and again about every minute as long as the peer is silent. No name
//! holds up another, and an answer that does not come leaves what was known.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use tokio::net::lookup_host;
use tokio::time::timeout;

/// For one answer.
const DEADLINE: Duration = Duration::from_secs(10);

/// Between two looks at one name, three quarters to five quarters of it.
const AGAIN: Duration = Duration::from_secs(60);

/// Most names asked for at one time. The resolver of the C library needs a thread for each.
const AT_ONCE: usize = 4;

/// Most addresses of one name that are looked at.
const MAX_ADDRESSES: usize = 16;

#[derive(Debug)]
pub(crate) struct Names {
    known: BTreeMap<String, Name>,
    asked: usize,
    /// From 0 to 1.
    random: fn() -> f64,
}

#[derive(Debug)]
struct Name {
    /// The one in use.
    address: Option<IpAddr>,
    is_asked: bool,
    next: Instant,
    /// Whether the last answer was none, so that this is said once.
    failed: bool,
}

impl Names {
    pub(crate) fn new(random: fn() -> f64) -> Self {
        Self { known: BTreeMap::new(), asked: 0, random }
    }

    /// These names, and no others, are of interest from now on.
    pub(crate) fn follow<'a>(&mut self, hosts: impl Iterator<Item = &'a str>, now: Instant) {
        let mut before = std::mem::take(&mut self.known);
        for host in hosts {
            if self.known.contains_key(host) {
                continue;
            }
            let name = before.remove(host).unwrap_or(Name {
                address: None,
                is_asked: false,
                next: now,
                failed: false,
            });
            self.known.insert(host.to_owned(), name);
        }
    }

    /// What the name stands for, as far as that is known.
    pub(crate) fn address(&self, host: &str) -> Option<IpAddr> {
        self.known.get(host)?.address
    }

    /// The names to be asked for now, each of which [`Names::found`] has to be told of. One whose peer is heard of is
    /// where it says it is, and left alone.
    pub(crate) fn ask(&mut self, now: Instant, is_silent: impl Fn(&str) -> bool) -> Vec<String> {
        let mut ask = Vec::new();
        for (host, name) in &mut self.known {
            if name.is_asked || name.next > now {
                continue;
            }
            if name.address.is_some() && !is_silent(host) {
                name.next = now + again(self.random);
                continue;
            }
            if self.asked >= AT_ONCE {
                break; // and the next one when an answer is there
            }
            name.is_asked = true;
            self.asked += 1;
            ask.push(host.clone());
        }
        ask
    }

    /// When [`Names::ask`] may have something to say.
    pub(crate) fn next(&self) -> Option<Instant> {
        if self.asked >= AT_ONCE {
            return None;
        }
        self.known.values().filter(|name| !name.is_asked).map(|name| name.next).min()
    }

    /// An answer. Whether the name stands for another address now: the next one after that in use, if the peer
    /// has several and cannot be reached at this one.
    pub(crate) fn found(
        &mut self,
        host: &str,
        answer: Result<Vec<IpAddr>, String>,
        now: Instant,
    ) -> bool {
        self.asked = self.asked.saturating_sub(1);
        let Some(name) = self.known.get_mut(host) else { return false };
        name.is_asked = false;
        name.next = now + again(self.random);
        let answer = answer.and_then(|addresses| {
            if addresses.is_empty() { Err("it has no address".into()) } else { Ok(addresses) }
        });
        match answer {
            Err(reason) => {
                if !std::mem::replace(&mut name.failed, true) {
                    log::warn!("cannot look up {host}, the endpoint of a peer: {reason}");
                }
                false
            }
            Ok(addresses) => {
                name.failed = false;
                let at =
                    name.address.and_then(|in_use| addresses.iter().position(|a| *a == in_use));
                let next = at.map_or(0, |at| (at + 1) % addresses.len());
                let address = addresses.get(next).copied();
                std::mem::replace(&mut name.address, address) != address
            }
        }
    }
}

fn again(random: fn() -> f64) -> Duration {
    AGAIN.mul_f64(0.75 + random().clamp(0.0, 1.0) / 2.0)
}

/// All addresses of a name, best first.
///
/// # Errors
/// Why there are none, for a person.
pub(crate) async fn look_up(host: &str) -> Result<Vec<IpAddr>, String> {
    let addresses = timeout(DEADLINE, lookup_host((host, 0)))
        .await
        .map_err(|_| format!("no answer within {} s", DEADLINE.as_secs()))?
        .map_err(|error| error.to_string())?;
    let mut all: Vec<IpAddr> = Vec::new();
    for address in addresses.map(|address| address.ip()) {
        if all.len() < MAX_ADDRESSES && !all.contains(&address) {
            all.push(address);
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    fn names(hosts: &[&str], now: Instant) -> Names {
        let mut names = Names::new(|| 0.5);
        names.follow(hosts.iter().copied(), now);
        names
    }

    fn ip(last: u8) -> IpAddr {
        [192, 0, 2, last].into()
    }

    #[test]
    fn a_name_is_asked_for_at_once_and_then_every_minute_while_its_peer_is_silent() {
        let start = Instant::now();
        let mut names = names(&["a.example"], start);
        assert_eq!(names.ask(start, |_| true), ["a.example"]);
        assert_eq!(names.ask(start + MINUTE, |_| true), [""; 0], "the answer is not there yet");
        assert!(names.found("a.example", Ok(vec![ip(1)]), start));
        assert_eq!(names.address("a.example"), Some(ip(1)));
        assert_eq!(names.ask(start + MINUTE / 2, |_| true), [""; 0]);
        assert_eq!(names.next(), Some(start + MINUTE));
        assert_eq!(names.ask(start + MINUTE, |_| false), [""; 0], "heard of");
        assert_eq!(names.ask(start + 2 * MINUTE, |_| true), ["a.example"]);
        assert!(!names.found("a.example", Ok(vec![ip(1)]), start + 2 * MINUTE));
    }

    #[test]
    fn an_answer_that_does_not_come_leaves_what_was_known() {
        let start = Instant::now();
        let mut names = names(&["a.example"], start);
        names.ask(start, |_| true);
        names.found("a.example", Ok(vec![ip(1)]), start);
        names.ask(start + MINUTE, |_| true);
        assert!(!names.found("a.example", Err("no answer".into()), start + MINUTE));
        assert!(!names.found("a.example", Ok(vec![]), start + MINUTE));
        assert_eq!(names.address("a.example"), Some(ip(1)));
    }

    #[test]
    fn a_peer_that_does_not_answer_is_tried_at_its_other_addresses() {
        let start = Instant::now();
        let mut names = names(&["a.example"], start);
        let mut at = Vec::new();
        for n in 0..4 {
            let now = start + n * MINUTE;
            names.ask(now, |_| true);
            names.found("a.example", Ok(vec![ip(1), ip(2), ip(3)]), now);
            at.extend(names.address("a.example"));
        }
        assert_eq!(at, [ip(1), ip(2), ip(3), ip(1)]);
    }

    #[test]
    fn dead_names_do_not_hold_up_the_others() {
        let start = Instant::now();
        let hosts: Vec<String> = (0..10).map(|n| format!("{n}.example")).collect();
        let mut names = names(&hosts.iter().map(String::as_str).collect::<Vec<_>>(), start);
        let mut answered = 0;
        let mut waiting = names.ask(start, |_| true);
        assert_eq!(waiting.len(), AT_ONCE);
        assert_eq!(names.next(), None, "an answer comes first");
        while let Some(host) = waiting.pop() {
            names.found(&host, Err("dead".into()), start);
            answered += 1;
            waiting.extend(names.ask(start, |_| true));
        }
        assert_eq!(answered, 10);
    }

    #[test]
    fn a_name_of_no_interest_any_more_is_forgotten_with_its_answer() {
        let start = Instant::now();
        let mut names = names(&["a.example", "b.example"], start);
        assert_eq!(names.ask(start, |_| true).len(), 2);
        names.follow(["b.example"].into_iter(), start);
        assert!(!names.found("a.example", Ok(vec![ip(1)]), start));
        assert!(names.found("b.example", Ok(vec![ip(2)]), start));
        assert_eq!((names.address("a.example"), names.address("b.example")), (None, Some(ip(2))));
        assert_eq!(names.asked, 0);
    }
}
