//! What came of one request: its line in the log, and what the audit log and the metrics take from it.

use std::net::SocketAddr;

use latchkey_wire::{pubhash::Pubhash, release::Refusal};

use crate::{decision::Target, exchange::Endpoint, matching::Facts};

/// What came of one request.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) endpoint: Endpoint,
    pub(crate) peer: SocketAddr,
    pub(crate) facts: Facts,
    /// Who it was, once that is proved.
    pub(crate) pubhash: Option<Pubhash>,
    /// What it was about, as far as it was found.
    pub(crate) target: Option<Target>,
    pub(crate) ending: Ending,
}

/// How it ended.
#[derive(Debug)]
pub(crate) struct Ending {
    pub(crate) result: Ended,
    /// One of few words, for counting.
    pub(crate) reason: &'static str,
    /// A sentence, for people. Never holds a secret.
    pub(crate) why: String,
}

impl Ending {
    pub(crate) fn new(result: Ended, reason: &'static str, why: impl Into<String>) -> Self {
        Self { result, reason, why: why.into() }
    }
}

/// The class of a refusal, by what the machine is told: the same texts that clients key on.
pub(crate) fn class(answer: &str) -> &'static str {
    match Refusal::from_text(answer) {
        Refusal::Quarantined(_) => "quarantined",
        Refusal::UnknownMachine(_) => "unknown",
        Refusal::OtherTpm(_) => "other-tpm",
        Refusal::BootState(_) => "pcrs",
        Refusal::Proof(_) | Refusal::PcrMoved(_) => "quote",
        Refusal::NoSecret(_) => "no-secret",
        Refusal::EmptySecret | Refusal::Malformed | Refusal::Other(_) => "refused",
    }
}

/// The ways a request ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ended {
    /// The machine got a passphrase, or its own was stored.
    Granted,
    /// The machine proved itself and was told no.
    Refused,
    /// Trouble on our side; the machine asks again.
    Failed,
    /// The machine proved itself and then was gone, or wrote what cannot be read.
    Interrupted,
    /// Nobody proved anything.
    Unauthenticated,
}

impl Ended {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Granted => "granted",
            Self::Refused => "refused",
            Self::Failed | Self::Interrupted => "failed",
            Self::Unauthenticated => "unauthenticated",
        }
    }
}

impl Report {
    /// One line per request. Whatever a peer or an operator wrote is quoted: it cannot begin a line of its own.
    pub(crate) fn log(&self) {
        let fact = |fact: &Option<String>| {
            fact.as_ref().map_or_else(|| "-".to_owned(), |fact| format!("{fact:?}"))
        };
        let pubhash = self.pubhash.as_ref().map_or("-", Pubhash::as_str);
        let (volume, partition) = self.target.as_ref().map_or_else(
            || ("-".to_owned(), "-".to_owned()),
            |target| {
                let volume = format!("{}/{}", target.namespace, target.volume);
                (format!("{volume:?}"), format!("{:?}", target.label))
            },
        );
        log::log!(
            self.level(),
            "request endpoint={} peer={} result={} why={:?} pubhash={pubhash} volume={volume} partition={partition} label={} uuid={} name={}",
            self.endpoint,
            self.peer,
            self.ending.result.as_str(),
            self.ending.why,
            fact(&self.facts.label),
            fact(&self.facts.uuid),
            fact(&self.facts.name),
        );
    }

    fn level(&self) -> log::Level {
        match self.ending.result {
            Ended::Granted => log::Level::Info,
            Ended::Refused | Ended::Interrupted | Ended::Unauthenticated => log::Level::Warn,
            Ended::Failed => log::Level::Error,
        }
    }
}
