//! One question to all key servers at once: the first verified answer wins.
//!
//! Each server is asked on a thread of its own, each of its addresses on a connection of its own; the TPM stays
//! with the caller's thread, which answers one challenge at a time. Nothing before a challenge costs TPM work.
//!
//! * **Starts** are staggered (RFC 8305 §5): the next server or address begins [`STAGGER`] after the one before, or at
//!   once when that fails. The first that accepts holds the next back for [`PATIENCE`], and no longer: whoever accepts
//!   and stalls keeps its connection, and the others get their turn.
//! * **Challenges** are answered in the order in which they come. If nothing follows within [`ANSWER_PATIENCE`], the
//!   next challenge is answered as well.
//! * **Trouble** (no route, no answer, an unknown error text) is that server's alone. It is asked again after a pause
//!   that doubles, until the deadline.
//! * **Refusals** are a server's last word on the matter (quarantine, unknown machine, boot state). They do not stop the
//!   others: a client that stopped would protect nothing, because whoever holds the machine can ask the others himself.
//!   An operator who locks a machine out does so on every server that does not share the store. A refusal is the result
//!   once every other server has refused too or has been asked in vain, or [`REFUSAL_PATIENCE`] later.

use std::collections::VecDeque;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use latchkey_config::Protocol;
use latchkey_wire::release::{Refusal, Release};
use latchkey_wire::v1::Challenge;
use zeroize::Zeroizing;

use super::talk::{Question, Talk, Word};
pub(crate) use super::talk::{Question as Ask, Wish};
use super::{Attested, ExchangeError, Generation};
use crate::BootError;
use crate::dial::Endpoint;
use crate::passphrase::Deadline;

/// RFC 8305 §8: "Connection Attempt Delay".
const STAGGER: Duration = Duration::from_millis(250);
/// A server that accepts has this long for its challenge before others are tried beside it.
const PATIENCE: Duration = Duration::from_secs(2);
/// And this long for its last word.
const ANSWER_PATIENCE: Duration = Duration::from_secs(3);
/// A refusal waits this long for a server that knows better.
const REFUSAL_PATIENCE: Duration = Duration::from_secs(10);
/// Pauses between attempts double from the first to the last of these, give or take a half.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(8));
/// The connections end at the deadline, and then say where they stood.
const LAST_WORDS: Duration = Duration::from_millis(500);
/// Most addresses of one server that are tried at a time.
const MAX_ADDRESSES: usize = 8;

/// A key server, and the generation it turned out to speak.
#[derive(Clone, Debug)]
pub struct Server {
    endpoint: Arc<Endpoint>,
    protocol: Protocol,
    speaks: Option<Generation>,
}

impl Server {
    #[must_use]
    pub fn new(endpoint: Endpoint, protocol: Protocol) -> Self {
        Self { endpoint: Arc::new(endpoint), protocol, speaks: None }
    }

    #[must_use]
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// The generation to begin with. A server that has answered 404 to the second stays with the first.
    fn generation(&self) -> Generation {
        match self.protocol {
            Protocol::V1 => Generation::V1,
            Protocol::V2 => Generation::V2,
            Protocol::Auto => self.speaks.unwrap_or(Generation::V2),
        }
    }
}

/// What came of a question, and which server said so.
#[derive(Debug)]
pub(crate) enum Verdict {
    Released(Release),
    /// It took what it was to keep.
    Kept,
    Refused(Refusal, usize),
}

/// Asks all `servers` until one has answered, all have refused, or the deadline passes.
///
/// # Errors
/// [`BootError::Deadline`] with the last trouble; a TPM error.
pub(crate) fn ask(
    servers: &mut [Server],
    attested: &mut Attested<'_>,
    question: Question,
    deadline: Deadline,
) -> Result<Verdict, BootError> {
    let (sender, events) = channel();
    let now = Instant::now();
    let starts = (0_u32..).map(|number| now + STAGGER * number);
    let mut race = Race {
        lanes: starts.take(servers.len()).map(Lane::new).collect(),
        servers,
        question: Arc::new(question),
        lines: Arc::default(),
        sender,
        waiting: VecDeque::new(),
        answered: None,
        has_held_back: false,
        refused: None,
        last: None,
    };
    let result = race.run(&events, attested, deadline);
    race.lines.cut();
    result
}

/// What the threads of a race report.
enum Event {
    /// There is a connection to one of the servers.
    Connected,
    Challenged(Challenged),
    /// It has turned out which generation this server speaks.
    Speaks(usize, Generation),
    /// The attempt on this server is over.
    Ended(usize, Result<Word, ExchangeError>),
}

/// A challenge, and who waits for its answer.
struct Challenged {
    server: usize,
    generation: Generation,
    challenge: Challenge,
    reply: Sender<Result<Zeroizing<String>, ExchangeError>>,
}

/// One server in the race.
struct Lane {
    state: State,
    pause: Duration,
    was_tried: bool,
    attempts: u32,
}

enum State {
    Due(Instant),
    Running,
    Refused(Refusal),
    /// Asked as often as it may be.
    Spent,
}

impl Lane {
    fn new(start: Instant) -> Self {
        Self { state: State::Due(start), pause: BACK_OFF.0, was_tried: false, attempts: 0 }
    }

    fn is_waiting_for_its_first_turn(&self) -> bool {
        !self.was_tried && matches!(self.state, State::Due(_))
    }
}

struct Race<'a> {
    servers: &'a mut [Server],
    lanes: Vec<Lane>,
    question: Arc<Question>,
    lines: Arc<Lines>,
    sender: Sender<Event>,
    waiting: VecDeque<Challenged>,
    /// The server whose challenge was answered last, and when.
    answered: Option<(usize, Instant)>,
    has_held_back: bool,
    /// When the first server refused.
    refused: Option<Instant>,
    last: Option<BootError>,
}

impl Race<'_> {
    fn run(
        &mut self,
        events: &Receiver<Event>,
        attested: &mut Attested<'_>,
        deadline: Deadline,
    ) -> Result<Verdict, BootError> {
        loop {
            let now = Instant::now();
            if let Some(verdict) = self.refusal(now, deadline.at) {
                return Ok(verdict);
            }
            if let Some(attempts) = deadline.attempts
                && self.lanes.iter().all(|lane| matches!(lane.state, State::Spent))
            {
                let last = Box::new(self.last.take().unwrap_or(BootError::Unfinished));
                return Err(BootError::Attempts { attempts, last });
            }
            if now >= deadline.at && (!self.has_more_to_say() || now >= deadline.at + LAST_WORDS) {
                return Err(deadline.error(self.last.take().unwrap_or(BootError::Unfinished)));
            }
            if now < deadline.at {
                self.start_due(now)?;
                self.answer_next(now, attested)?;
            }
            let turn = self.next_turn(now, deadline.at);
            let left = turn.saturating_duration_since(Instant::now());
            match events.recv_timeout(left) {
                Ok(Event::Ended(server, Ok(Ok(release)))) => {
                    log::debug!("{} has answered", self.name(server));
                    return Ok(release.map_or(Verdict::Kept, Verdict::Released));
                }
                Ok(event) => self.take(event, deadline.attempts)?,
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
            }
        }
    }

    fn name(&self, server: usize) -> String {
        self.servers.get(server).map_or_else(String::new, |server| server.endpoint.authority())
    }

    fn start_due(&mut self, now: Instant) -> Result<(), BootError> {
        for (number, (lane, server)) in self.lanes.iter_mut().zip(&*self.servers).enumerate() {
            if matches!(lane.state, State::Due(at) if now >= at) {
                let attempt = Attempt {
                    number,
                    server: Arc::clone(&server.endpoint),
                    generation: server.generation(),
                    may_fall_back: server.protocol == Protocol::Auto,
                    question: Arc::clone(&self.question),
                    lines: Arc::clone(&self.lines),
                    events: self.sender.clone(),
                };
                spawn(move || Arc::new(attempt).run())?;
                lane.state = State::Running;
            }
        }
        Ok(())
    }

    /// Has the TPM answer the next challenge, unless the one before may still be worth it.
    fn answer_next(&mut self, now: Instant, attested: &mut Attested<'_>) -> Result<(), BootError> {
        if self.answered.is_some_and(|(_, at)| now < at + ANSWER_PATIENCE) {
            return Ok(());
        }
        let Some(next) = self.waiting.pop_front() else { return Ok(()) };
        let name = self.name(next.server);
        let answer = attested.answer(&name, next.generation, &next.challenge);
        if let Err(error) = answer {
            // What the TPM refuses to one it refuses to all, except for a wrong credential.
            if !error.is_transient() {
                return Err(error.into());
            }
            let _ = next.reply.send(Err(error));
        } else if next.reply.send(answer).is_ok() {
            self.answered = Some((next.server, Instant::now()));
        }
        Ok(())
    }

    fn take(&mut self, event: Event, attempts: Option<u32>) -> Result<(), BootError> {
        match event {
            Event::Connected => self.hold_back(),
            Event::Challenged(challenged) => self.waiting.push_back(challenged),
            Event::Speaks(number, generation) => {
                if let Some(server) = self.servers.get_mut(number) {
                    server.speaks = Some(generation);
                }
            }
            Event::Ended(number, result) => {
                self.waiting.retain(|challenged| challenged.server != number);
                self.answered = self.answered.filter(|(server, _)| *server != number);
                self.next_may_start();
                match result {
                    Ok(Ok(_)) => {}
                    Ok(Err(refusal)) if !refusal.is_transient() => self.refuse(number, refusal),
                    Ok(Err(refusal)) => self.try_again(number, refusal.into(), attempts)?,
                    Err(error) => self.try_again(number, error.into(), attempts)?,
                }
            }
        }
        Ok(())
    }

    fn refuse(&mut self, number: usize, refusal: Refusal) {
        log::warn!("{}: {refusal}", self.name(number));
        self.refused.get_or_insert_with(Instant::now);
        if let Some(lane) = self.lanes.get_mut(number) {
            lane.state = State::Refused(refusal);
        }
    }

    fn try_again(
        &mut self,
        number: usize,
        error: BootError,
        attempts: Option<u32>,
    ) -> Result<(), BootError> {
        if !error.is_transient() {
            return Err(error);
        }
        if let Some(lane) = self.lanes.get_mut(number) {
            lane.was_tried = true;
            lane.attempts = lane.attempts.saturating_add(1);
            if attempts.is_some_and(|attempts| lane.attempts >= attempts) {
                log::warn!("{error}");
                lane.state = State::Spent;
                self.last = Some(error);
                return Ok(());
            }
            let pause = jittered(lane.pause);
            log::warn!("{error}; trying again in {:.1} s", pause.as_secs_f32());
            lane.state = State::Due(Instant::now() + pause);
            lane.pause = (lane.pause * 2).min(BACK_OFF.1);
        }
        self.last = Some(error);
        Ok(())
    }

    /// Gives the first server that accepts a little time alone.
    fn hold_back(&mut self) {
        if std::mem::replace(&mut self.has_held_back, true) {
            return;
        }
        let later = Instant::now() + PATIENCE;
        for lane in self.lanes.iter_mut().filter(|lane| lane.is_waiting_for_its_first_turn()) {
            lane.state = State::Due(later);
        }
    }

    fn next_may_start(&mut self) {
        if let Some(lane) = self.lanes.iter_mut().find(|lane| lane.is_waiting_for_its_first_turn())
        {
            lane.state = State::Due(Instant::now());
        }
    }

    /// The refusal that stands, if it is time for one.
    fn refusal(&self, now: Instant, deadline: Instant) -> Option<Verdict> {
        let since = self.refused?;
        let open = |lane: &&Lane| !lane.was_tried && !matches!(lane.state, State::Refused(_));
        if self.lanes.iter().any(|lane| open(&lane))
            && now < (since + REFUSAL_PATIENCE).min(deadline)
        {
            return None;
        }
        self.lanes.iter().enumerate().find_map(|(number, lane)| match &lane.state {
            State::Refused(refusal) => Some(Verdict::Refused(refusal.clone(), number)),
            _ => None,
        })
    }

    /// Whether the only one who knows what the time was spent on is still under way.
    fn has_more_to_say(&self) -> bool {
        let is_running = |lane: &Lane| matches!(lane.state, State::Running);
        self.last.is_none() && self.lanes.iter().any(is_running)
    }

    fn next_turn(&self, now: Instant, deadline: Instant) -> Instant {
        if now >= deadline {
            return deadline + LAST_WORDS;
        }
        let starts = self.lanes.iter().filter_map(|lane| match lane.state {
            State::Due(at) => Some(at),
            _ => None,
        });
        let answer = match self.waiting.is_empty() {
            true => None,
            false => self.answered.map(|(_, at)| at + ANSWER_PATIENCE),
        };
        let refusal = self.refused.map(|since| since + REFUSAL_PATIENCE);
        starts.chain(answer).chain(refusal).chain([deadline]).min().unwrap_or(deadline)
    }
}

/// One attempt on one server.
struct Attempt {
    number: usize,
    server: Arc<Endpoint>,
    generation: Generation,
    may_fall_back: bool,
    question: Arc<Question>,
    lines: Arc<Lines>,
    events: Sender<Event>,
}

/// What the connections of an attempt report to it.
enum Step {
    Connected,
    Ended(Result<Word, ExchangeError>),
}

impl Attempt {
    fn run(self: Arc<Self>) {
        let result = self.try_addresses();
        self.report(Event::Ended(self.number, result));
    }

    /// Nobody listens any more once another server was quicker.
    fn report(&self, event: Event) {
        let _ = self.events.send(event);
    }

    /// Staggers the addresses as the race does the servers.
    fn try_addresses(self: &Arc<Self>) -> Result<Word, ExchangeError> {
        let addresses = self.server.addresses(self.question.deadline)?;
        let (sender, steps) = channel();
        let mut addresses = addresses.into_iter().take(MAX_ADDRESSES).peekable();
        let mut running = 0_usize;
        let mut worst = None;
        let mut patience = PATIENCE;
        loop {
            if let Some(address) = addresses.next() {
                let (this, sender) = (Arc::clone(self), sender.clone());
                if addresses.peek().is_none() && running == 0 {
                    // The only one needs no thread of its own.
                    return this.talk(address, &sender).map_err(|error| further(worst, error));
                }
                let spawned = spawn(move || {
                    let result = this.talk(address, &sender);
                    let _ = sender.send(Step::Ended(result));
                });
                running += usize::from(spawned.is_ok());
            }
            let mut next = Instant::now() + STAGGER;
            loop {
                let until = if addresses.peek().is_some() { next } else { self.question.deadline };
                let left = until.saturating_duration_since(Instant::now());
                match steps.recv_timeout(left) {
                    Ok(Step::Connected) => {
                        next = Instant::now() + patience;
                        patience = STAGGER;
                    }
                    Ok(Step::Ended(Ok(word))) => return Ok(word),
                    Ok(Step::Ended(Err(error))) => {
                        running = running.saturating_sub(1);
                        worst = Some(further(worst, error));
                        break;
                    }
                    Err(_) => break,
                }
            }
            if addresses.peek().is_none()
                && (running == 0 || Instant::now() >= self.question.deadline)
            {
                return Err(
                    worst.unwrap_or_else(|| ExchangeError::silent(&self.server.authority()))
                );
            }
        }
    }

    fn talk(&self, address: SocketAddr, steps: &Sender<Step>) -> Result<Word, ExchangeError> {
        match self.speak(address, self.generation, steps) {
            Err(ExchangeError::Status { server, status: 404 })
                if self.may_fall_back && self.generation == Generation::V2 =>
            {
                log::debug!("{server} has no /tpm-attestation; asking by generation 1");
                self.speak(address, Generation::V1, steps)
            }
            spoken => spoken,
        }
    }

    fn speak(
        &self,
        address: SocketAddr,
        generation: Generation,
        steps: &Sender<Step>,
    ) -> Result<Word, ExchangeError> {
        let line = Line::new(&self.lines);
        let talk = Talk { question: &self.question, server: &self.server, address };
        let connected = |stream: &TcpStream| {
            line.hold(stream);
            let _ = steps.send(Step::Connected);
            self.report(Event::Connected);
        };
        talk.run(generation, connected, |challenge| {
            self.report(Event::Speaks(self.number, generation));
            let (reply, answer) = channel();
            let server = self.number;
            self.report(Event::Challenged(Challenged { server, generation, challenge, reply }));
            answer.recv().unwrap_or_else(|_| Err(ExchangeError::silent(&self.server.authority())))
        })
    }
}

/// Of two errors the one from further on, which says more.
fn further(one: Option<ExchangeError>, other: ExchangeError) -> ExchangeError {
    match one {
        Some(one) if one.progress() > other.progress() => one,
        _ => other,
    }
}

/// The open connections of a race: those that are still waited for when it is decided are shut down.
#[derive(Debug, Default)]
struct Lines {
    open: Mutex<Vec<(usize, TcpStream)>>,
    next: AtomicUsize,
    is_cut: AtomicBool,
}

impl Lines {
    fn cut(&self) {
        self.is_cut.store(true, Ordering::SeqCst);
        for (_, stream) in self.open.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

/// One of them, as long as it is talked on.
struct Line<'a> {
    lines: &'a Lines,
    number: usize,
}

impl<'a> Line<'a> {
    fn new(lines: &'a Lines) -> Self {
        Self { lines, number: lines.next.fetch_add(1, Ordering::SeqCst) }
    }

    fn hold(&self, stream: &TcpStream) {
        match stream.try_clone() {
            Ok(stream) => {
                let mut open = self.lines.open.lock().unwrap_or_else(PoisonError::into_inner);
                open.push((self.number, stream));
            }
            Err(error) => log::debug!("a connection cannot be cut short: {error}"),
        }
        if self.lines.is_cut.load(Ordering::SeqCst) {
            self.lines.cut();
        }
    }
}

impl Drop for Line<'_> {
    fn drop(&mut self) {
        let mut open = self.lines.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|(number, _)| *number != self.number);
    }
}

fn spawn(work: impl FnOnce() + Send + 'static) -> Result<(), BootError> {
    std::thread::Builder::new().spawn(work).map(drop).map_err(BootError::io("start a thread"))
}

/// Half to one and a half of `pause`: machines that lost power together shall not ask together.
fn jittered(pause: Duration) -> Duration {
    let mut random = [0; 2];
    if let Err(error) = getrandom::fill(&mut random) {
        log::debug!("no jitter: {error}");
    }
    let fraction = f64::from(u16::from_le_bytes(random)) / f64::from(u16::MAX);
    pause.mul_f64(0.5 + fraction)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_is_jittered_around_itself() {
        for _ in 0..100 {
            let pause = jittered(Duration::from_secs(2));
            let around = Duration::from_secs(1)..=Duration::from_secs(3);
            assert!(around.contains(&pause), "{pause:?}");
        }
    }
}
