//! The audit log: who was given what, and what operators did, as a chain of JSON lines ([`chain`]) in one file.
//!
//! # What is promised
//!
//! * A line is made when a request has come to its end. A thread of its own writes what has gathered, calls `fdatasync`, and
//!   takes the next lot: a line is on the disk some milliseconds after it happened, and no machine waits for it. A
//!   power cut costs the lines of these milliseconds.
//! * If the file cannot be written, machines are served all the same (they have to boot), the log and
//!   `latchkey_kms_audit_failures_total` say so, and the lines wait. What finds no room any more is counted, and the
//!   count is a line of its own (`lines-lost`) as soon as there is room.
//! * Several programs may write to one file: each takes a lock, reads where the chain ends, and goes on from there.
//! * A file that is moved away is not missed: the next line begins a new one, and continues the chain of the old.
//! * No line ever holds a passphrase.

pub(crate) mod chain;
pub(crate) mod verify;

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread,
    time::{Duration, SystemTime},
};

use serde::Serialize;

use crate::{quiet::Quiet, report::Report};
use chain::Chain;

/// Lines that wait for the disk, and how many are written at once.
const WAITING: usize = 8192;
const AT_ONCE: usize = 512;

/// How long a file that could not be written is left alone.
const PAUSE: Duration = Duration::from_secs(1);

/// Longest reason in a line, in characters.
const MAX_WHY: usize = 600;

/// What happened.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub(crate) enum Event {
    /// The server began to listen.
    ServerStarted { version: &'static str, listen: String },
    /// The server was told to stop.
    ServerStopped { signal: &'static str },
    /// A request came to its end.
    Request(Box<Request>),
    /// An operator changed something by `latchkey-kms volume`.
    Admin(Box<Admin>),
    /// The last line was cut by a crash: so many bytes of it were removed.
    TornLineRemoved { bytes: u64 },
    /// The disk was too slow for so long that so many lines found no room.
    LinesLost { count: u64 },
}

/// A request of a machine.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Request {
    endpoint: &'static str,
    peer: String,
    pubhash: Option<String>,
    volume: Option<String>,
    partition: Option<String>,
    label: Option<String>,
    uuid: Option<String>,
    name: Option<String>,
    result: &'static str,
    reason: &'static str,
    why: String,
}

/// A change by an operator.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Admin {
    pub(crate) action: &'static str,
    /// The user of the system who did it.
    pub(crate) user: String,
    pub(crate) volume: String,
    pub(crate) pubhash: String,
    pub(crate) result: &'static str,
    pub(crate) why: String,
}

impl From<&Report> for Event {
    fn from(report: &Report) -> Self {
        let target = report.target.as_ref();
        Self::Request(Box::new(Request {
            endpoint: report.endpoint.name(),
            peer: report.peer.to_string(),
            pubhash: report.pubhash.as_ref().map(ToString::to_string),
            volume: target.map(|target| format!("{}/{}", target.namespace, target.volume)),
            partition: target.map(|target| target.label.clone()),
            label: report.facts.label.clone(),
            uuid: report.facts.uuid.clone(),
            name: report.facts.name.clone(),
            result: report.ending.result.as_str(),
            reason: report.ending.reason,
            why: report.ending.why.chars().take(MAX_WHY).collect(),
        }))
    }
}

type Timed = (SystemTime, Event);

/// What the writer is told.
enum Order {
    Write(Timed),
    /// To say where the chain ends, and that it has said it.
    Conclude(SyncSender<()>),
}

/// The way to the file, for the server.
#[derive(Debug, Clone)]
pub(crate) struct Audit {
    orders: SyncSender<Order>,
    counts: Arc<Counts>,
}

/// For the metrics.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    /// Number of the last line that is on the disk.
    pub(crate) seq: AtomicU64,
    pub(crate) failures: AtomicU64,
    pub(crate) lost: AtomicU64,
}

impl Audit {
    /// Opens the file, or makes it, and writes a first line into it.
    pub(crate) fn open(path: PathBuf, first: Event) -> std::io::Result<Self> {
        let mut chain = Chain::new(path);
        let seq = chain.append(&[(SystemTime::now(), first)])?;
        let counts = Arc::new(Counts::default());
        counts.seq.store(seq, Ordering::Relaxed);
        log::info!("audit: {chain}");
        let (orders, waiting) = sync_channel(WAITING);
        let writer = Writer { chain, waiting, counts: counts.clone(), quiet: Quiet::default() };
        thread::Builder::new().name("audit".to_owned()).spawn(move || writer.run())?;
        Ok(Self { orders, counts })
    }

    /// Has a line written. Never waits.
    pub(crate) fn record(&self, event: Event) {
        if self.orders.try_send(Order::Write((SystemTime::now(), event))).is_err() {
            self.counts.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(crate) fn counts(&self) -> Arc<Counts> {
        self.counts.clone()
    }

    /// Has all that was recorded written, as far as the disk does that in this time.
    pub(crate) fn conclude(&self, patience: Duration) {
        let (done, written) = sync_channel(1);
        if self.orders.try_send(Order::Conclude(done)).is_err()
            || written.recv_timeout(patience).is_err()
        {
            log::error!("audit: the last lines could not be written");
        }
    }
}

/// The thread that writes.
struct Writer {
    chain: Chain,
    waiting: Receiver<Order>,
    counts: Arc<Counts>,
    quiet: Quiet,
}

impl Writer {
    fn run(mut self) {
        let mut told_lost = 0;
        while let Ok(first) = self.waiting.recv() {
            let (mut lot, mut told) = (Vec::new(), None);
            for order in [first].into_iter().chain(self.waiting.try_iter()).take(AT_ONCE) {
                match order {
                    Order::Write(line) => lot.push(line),
                    Order::Conclude(done) => told = Some(done),
                }
            }
            let lost = self.counts.lost.load(Ordering::Relaxed);
            if lost > told_lost {
                lot.push((SystemTime::now(), Event::LinesLost { count: lost - told_lost }));
                told_lost = lost;
            }
            self.write(&lot);
            if let Some(done) = told {
                log::info!("audit: {}", self.chain);
                let _ = done.send(()); // who asked may have given up
            }
        }
    }

    /// Writes until it is written.
    fn write(&mut self, lot: &[Timed]) {
        loop {
            match self.chain.append(lot) {
                Ok(seq) => return self.counts.seq.store(seq, Ordering::Relaxed),
                Err(error) => {
                    self.counts.failures.fetch_add(1, Ordering::Relaxed);
                    self.quiet.warn(format_args!(
                        "audit: {} cannot be written: {error}; machines are served, lines wait",
                        self.chain.path().display()
                    ));
                    thread::sleep(PAUSE);
                }
            }
        }
    }
}
