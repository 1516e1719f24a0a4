//! What an agent waits for, all of it at once.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt as _;
use tokio::sync::mpsc;
use tokio::time::{sleep, sleep_until};

use super::failed;
use super::signals::{Signal, Signals};
use crate::advertise::Advertised;
use crate::error::{Error, Result};
use crate::netlink::events::{Events, Watched};
use crate::registry::nats::NatsWatch;
use crate::registry::{Event, RegistryError, Watch as _};
use crate::settings::Settings;

/// Results that wait to be taken. Whoever has one waits likewise.
const WAITING: usize = 16;

/// A burst of records is taken in at once, if it comes with no longer gaps than this,
const GAP: Duration = Duration::from_millis(3);

/// in at most this time,
const BURST: Duration = Duration::from_millis(30);

/// and as many events.
const MOST: usize = 4096;

pub(super) struct Inputs {
    pub(super) watch: Option<NatsWatch>,
    pub(super) news: mpsc::Sender<News>,
    incoming: mpsc::Receiver<News>,
    events: Events,
    signals: Signals,
}

/// What a task has found out.
#[derive(Debug)]
pub(super) enum News {
    /// Of the write with this number.
    Written(u64, Result<u64, RegistryError>),
    /// And what was asked for.
    Advertised(Result<Advertised>, Arc<Settings>),
    Name(String, Result<Vec<IpAddr>, String>),
    Stored(Result<()>),
    /// A server that should answer for ever does not.
    Ended(Error),
}

#[derive(Debug)]
pub(super) enum Input {
    /// Not empty.
    Registry(Vec<Event>),
    News(News),
    /// The device or one of its addresses has changed.
    Device,
    Signal(Signal),
    /// It is time for something.
    Time,
}

impl Inputs {
    /// From here on nothing changes unseen. Needs the runtime.
    pub(super) fn open() -> Result<Self> {
        let events = Events::open().map_err(listening)?;
        let signals = Signals::listen()?;
        let (news, incoming) = mpsc::channel(WAITING);
        Ok(Self { watch: None, news, incoming, events, signals })
    }

    /// Waits for whatever comes first, or until `wake`.
    pub(super) async fn next(&mut self, watched: Watched<'_>, wake: Instant) -> Result<Input> {
        let registry = async {
            match &mut self.watch {
                Some(watch) => watch.next().await,
                None => std::future::pending().await,
            }
        };
        let event = tokio::select! {
            biased;
            signal = self.signals.next() => return Ok(Input::Signal(signal)),
            event = registry => event,
            Some(news) = self.incoming.recv() => return Ok(Input::News(news)),
            changed = self.events.next(watched) => {
                // One look will do for all that came with it.
                changed.and_then(|()| self.events.skip(watched)).map_err(listening)?;
                return Ok(Input::Device);
            }
            () = sleep_until(wake.into()) => return Ok(Input::Time),
        };
        Ok(Input::Registry(self.burst(event).await))
    }

    /// One that comes alone is passed on at once; where there are more, they are waited for.
    async fn burst(&mut self, first: Event) -> Vec<Event> {
        let mut events = vec![first];
        let until = Instant::now() + BURST;
        let Some(watch) = &mut self.watch else { return events };
        loop {
            let before = events.len();
            while events.len() < MOST
                && let Some(event) = watch.next().now_or_never()
            {
                events.push(event);
            }
            if events.len() == before || events.len() >= MOST || Instant::now() >= until {
                return events;
            }
            sleep(GAP).await;
        }
    }
}

fn listening(source: std::io::Error) -> Error {
    failed("listen to netlink events", source)
}
