//! The agent itself: the loop, and what each input leads to.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;

use super::Options;
use super::due::{Due, TICK, by, is_due};
use super::inputs::{Input, Inputs, News};
use super::joining::{Joining, Next, random};
use super::plane::Plane;
use super::round::FIRST_HANDSHAKE;
use super::signals::Signal;
use super::view::Since;
use crate::address::{DeviceAddress, candidates};
use crate::advertise::Advertised;
use crate::cache;
use crate::claim::{Wanted, Write, perform};
use crate::device::Look;
use crate::error::Result;
use crate::members::Rules;
use crate::milestones::{self, Milestones};
use crate::notify::{Notify, watchdog_interval};
use crate::registry::nats::Nats;
use crate::registry::{Event, Registry as _};
use crate::resolve::Names;
use crate::settings::{AddressFrom, KeyFrom, RegistrySettings, Settings};
use crate::view::{Counters, View};
use crate::{admin, metrics};

/// Netlink events come in bursts: look once it is quiet.
const SETTLE: Duration = Duration::from_millis(100);

/// How long a start waits for the registry before it goes on with what it knows from the last time.
const PATIENCE: Duration = Duration::from_secs(2);

/// How often systemd hears that READY has to wait, and how much time it gives each time.
const HOLD: Duration = Duration::from_secs(10);
const HOLD_FOR: Duration = Duration::from_secs(30);

/// Changes are shown to others, and the paths to new peers measured, after these.
pub(super) const SHOW: Duration = Duration::from_millis(50);
const MEASURE: Duration = Duration::from_secs(1);

/// Changes are stored after the first of these, and so again at the earliest after the second.
pub(super) const STORE_SOON: Duration = Duration::from_secs(1);
const STORE_AGAIN: Duration = Duration::from_secs(30);

/// As long as it is not known where others reach this node, it is tried to find out as often as this.
const ASK_AGAIN: Duration = Duration::from_secs(3);

pub(super) struct Agent {
    pub(super) settings: Arc<Settings>,
    pub(super) options: Options,
    pub(super) plane: Plane,
    pub(super) notify: Notify,
    /// None without a registry.
    pub(super) joining: Option<Joining>,
    pub(super) registry: Option<Nats>,
    /// For a person.
    pub(super) registry_at: String,
    pub(super) advertised: Option<Advertised>,
    pub(super) is_behind_nat: bool,
    pub(super) names: Names,
    /// Whether the names may be others than before.
    pub(super) names_changed: bool,
    /// Whether somebody is finding out where others reach this node.
    pub(super) is_asking: bool,
    /// Counts the writes to the registry, so that the answer to one that was given up is known as such.
    pub(super) writes: u64,
    pub(super) counters: Counters,
    pub(super) milestones: Milestones,
    pub(super) since: Since,
    pub(super) shown: watch::Sender<Arc<View>>,
    pub(super) news: mpsc::Sender<News>,
    pub(super) due: Due,
    /// The device has to be compared.
    pub(super) look: Option<Look>,
    pub(super) is_ready: bool,
    /// Whether the device had peers, and an address, when it was compared last.
    pub(super) is_up: bool,
    pub(super) wipes_identity: bool,
    pub(super) is_storing: bool,
    pub(super) status: String,
    pub(super) handshake_pause: Duration,
    pub(super) metrics: Option<AbortHandle>,
}

impl Agent {
    pub(super) fn new(
        settings: Settings,
        options: Options,
        plane: Plane,
        notify: Notify,
        wipes_identity: bool,
        inputs: &mut Inputs,
    ) -> Result<Self> {
        let now = Instant::now();
        // They are the machine's: its own mesh has them, not an agent with a file of its own.
        let milestones = match settings.key {
            KeyFrom::HandOver { .. } => Milestones::at(milestones::DIRECTORY),
            KeyFrom::File(_) => Milestones::of_no_boot(),
        };
        let mut agent = Self {
            settings: Arc::new(settings),
            options,
            plane,
            notify,
            joining: None,
            registry: None,
            registry_at: String::new(),
            advertised: None,
            is_behind_nat: false,
            names: Names::new(random),
            names_changed: false,
            is_asking: false,
            writes: 0,
            counters: Counters::default(),
            milestones,
            since: Since::default(),
            shown: watch::Sender::new(Arc::default()),
            news: inputs.news.clone(),
            due: Due::default(),
            look: None,
            is_ready: false,
            is_up: false,
            wipes_identity,
            is_storing: false,
            status: String::new(),
            handshake_pause: FIRST_HANDSHAKE,
            metrics: None,
        };
        agent.due.tick = Some(now + TICK);
        agent.due.alive = watchdog_interval().map(|interval| now + interval / 2);
        match agent.settings.registry.clone() {
            Some(registry) => agent.follow(registry, inputs, now)?,
            None => {
                // Bad settings are told before anything is touched.
                agent.own_without_registry()?;
                agent.look = Some(Look::Fresh);
            }
        }
        Ok(agent)
    }

    fn follow(
        &mut self,
        registry: RegistrySettings,
        inputs: &mut Inputs,
        now: Instant,
    ) -> Result<()> {
        if let AddressFrom::Key = self.settings.address {
            // Whether the mesh is one is told before anything is touched.
            candidates(&self.settings.mesh, self.plane.public_key()).map(drop)?;
        }
        let nats = Nats::connect(registry.clone())?;
        let cached = cache::load(&self.settings.cache, self.plane.key(), &registry.bucket)
            .unwrap_or_else(|error| {
                log::warn!("{error}; starting without what was known last time");
                None
            });
        self.joining = Some(Joining::new(self.wanted(&registry.bucket), self.rules(), cached));
        self.registry_at = nats.describe();
        inputs.watch = Some(nats.watch());
        self.registry = Some(nats);
        self.due.patience = Some(now + PATIENCE);
        log::info!("registry: {}", self.registry_at);
        Ok(())
    }

    pub(super) async fn run(mut self, mut inputs: Inputs, socket: admin::Server) -> Result<()> {
        self.serve(socket);
        if let Some(address) = self.settings.metrics {
            self.metrics = Some(self.serve_metrics(metrics::Server::bind(address)?));
        }
        self.show();
        self.ask_advertised();
        loop {
            let now = Instant::now();
            self.turn(now)?;
            match inputs.next(self.plane.watched(), self.due.next(now)).await? {
                Input::Registry(events) => {
                    events.into_iter().for_each(|event| self.hear(event));
                }
                Input::News(news) => self.learn(news),
                Input::Device => by(&mut self.due.look, Instant::now() + SETTLE),
                Input::Signal(Signal::Stop) => break,
                Input::Signal(Signal::Reload) => self.reload(&mut inputs),
                Input::Time => {}
            }
        }
        self.stop()
    }

    fn stop(mut self) -> Result<()> {
        if self.due.store.is_some()
            && let Some(cached) = self.joining.as_mut().and_then(|joining| joining.to_cache())
            && let Err(error) = self.store_now(&cached)
        {
            log::warn!("{error}");
        }
        log::info!("stopping; {} stays as it is", self.plane.interface());
        self.tell(self.notify.stopping());
        Ok(())
    }

    fn hear(&mut self, event: Event) {
        let Some(joining) = &mut self.joining else { return };
        match &event {
            Event::Snapshot { entries, .. } => {
                self.counters.snapshots += 1;
                log::info!("registry: {} records are read", entries.len());
                // The network may be another than before.
                self.ask_advertised();
            }
            Event::Put(_) | Event::Deleted { .. } => self.counters.updates += 1,
            Event::Away { reason } => {
                if joining.is_current() {
                    self.counters.lost += 1;
                    let count = peers(joining.peers().count());
                    log::warn!("registry: away: {reason}; {count} on the device stay");
                } else {
                    log::warn!("registry: away: {reason}");
                }
                if self.due.patience.is_some() {
                    self.due.patience = Some(Instant::now());
                }
            }
        }
        let now = Instant::now();
        let Some(joining) = &mut self.joining else { return };
        joining.event(event, now);
        by(&mut self.due.show, now + SHOW);
        if joining.is_current() {
            by(&mut self.due.store, now + STORE_AGAIN);
        }
    }

    fn learn(&mut self, news: News) {
        let now = Instant::now();
        by(&mut self.due.show, now + SHOW);
        match news {
            News::Written(number, result) => {
                if number == self.writes
                    && let Some(joining) = &mut self.joining
                {
                    joining.written(result, now);
                }
            }
            News::Advertised(_, settings) if !Arc::ptr_eq(&settings, &self.settings) => {
                self.is_asking = false; // it was asked of settings that are no more
                self.ask_advertised();
            }
            News::Advertised(Ok(advertised), _) => {
                self.is_asking = false;
                if self.advertised.as_ref() != Some(&advertised) {
                    log::info!("others are told to reach this node at {}", advertised.address);
                    self.advertised = Some(advertised);
                    self.want();
                    by(&mut self.due.measure, now);
                }
            }
            News::Advertised(Err(error), _) => {
                self.is_asking = false;
                match &self.advertised {
                    Some(known) => log::debug!("{error}; it stays {}", known.address),
                    None => {
                        log::warn!("{error}; trying again");
                        self.due.ask = Some(now + ASK_AGAIN);
                    }
                }
            }
            News::Name(host, answer) => {
                if self.names.found(&host, answer, now) {
                    self.look.get_or_insert(Look::Remembered);
                    by(&mut self.due.measure, now + MEASURE);
                }
                self.names_changed = true; // the next one may be asked for
            }
            News::Stored(result) => {
                self.is_storing = false;
                if let Err(error) = result {
                    log::warn!("{error}; without it this node needs the registry to start");
                }
            }
            News::Ended(error) => log::error!("{error}"),
        }
    }

    /// Does whatever there is to do now.
    fn turn(&mut self, now: Instant) -> Result<()> {
        if is_due(&mut self.due.alive, now) {
            self.due.alive = watchdog_interval().map(|interval| now + interval / 2);
            self.tell(self.notify.alive());
        }
        if is_due(&mut self.due.tick, now) {
            self.due.tick = Some(now + TICK);
            self.due.measure = Some(now);
            self.look = Some(Look::Fresh);
            self.ask_advertised();
        }
        if is_due(&mut self.due.look, now) {
            self.look = Some(Look::Fresh);
            // It may have been a default route: then the own address and the ways to the peers are others.
            self.due.measure = Some(now);
            self.ask_advertised();
        }
        if is_due(&mut self.due.ask, now) {
            self.ask_advertised();
        }
        self.claim(now)?;
        if is_due(&mut self.due.patience, now) {
            self.do_without(now)?;
        }
        if is_due(&mut self.due.hold, now) && !self.is_ready {
            self.due.hold = Some(now + HOLD);
            self.tell(self.notify.extend(HOLD_FOR));
        }
        self.compare(now)?;
        self.ask_names(now);
        self.look_for_handshake(now);
        if is_due(&mut self.due.store, now) {
            self.store(now);
        }
        if is_due(&mut self.due.show, now) {
            self.show();
            self.tell_status();
        }
        Ok(())
    }

    /// What the registry should be told next.
    fn claim(&mut self, now: Instant) -> Result<()> {
        let Some(joining) = &mut self.joining else { return Ok(()) };
        let was_joined = joining.is_joined();
        match joining.next(now)? {
            Next::Wait(until) => self.due.claim = until,
            Next::Write(step) => {
                self.due.claim = None;
                let write = Write::of(&step, &joining.wanted().bucket, self.plane.key());
                if let (Some(registry), Some(write)) = (self.registry.clone(), write) {
                    self.writes += 1;
                    let (number, news) = (self.writes, self.news.clone());
                    tokio::spawn(async move {
                        let written = perform(registry, write).await;
                        let _ = news.send(News::Written(number, written)).await;
                    });
                }
            }
        }
        if joining.is_joined() != was_joined {
            // So that the time is noted now and not with the next tick.
            self.look.get_or_insert(Look::Remembered);
            by(&mut self.due.show, now + SHOW);
            by(&mut self.due.store, now + STORE_SOON);
        }
        if joining.take_changed() {
            self.look.get_or_insert(Look::Remembered);
            by(&mut self.due.measure, now + MEASURE);
            by(&mut self.due.store, now + STORE_AGAIN);
            self.names_changed = true;
        }
        Ok(())
    }

    pub(super) fn wanted(&self, bucket: &str) -> Wanted {
        Wanted {
            bucket: bucket.into(),
            mesh: self.settings.mesh,
            address: self.settings.address,
            public_key: self.plane.public_key(),
            name: self.settings.name.clone(),
            advertised: self.advertised.clone(),
            wg_port: self.settings.port,
        }
    }

    fn rules(&self) -> Rules {
        Rules {
            bucket: self.settings.registry.as_ref().map_or_else(String::new, |r| r.bucket.clone()),
            mesh: self.settings.mesh,
            own: self.plane.public_key(),
            signatures: self.settings.signatures,
            strict: self.settings.strict_records,
        }
    }

    /// The own record should say what is known now.
    pub(super) fn want(&mut self) {
        let Some(registry) = &self.settings.registry else { return };
        let wanted = self.wanted(&registry.bucket);
        if let Some(joining) = &mut self.joining {
            joining.want(wanted);
        }
    }

    fn show(&mut self) {
        let view = self.view();
        self.shown.send_replace(Arc::new(view));
    }

    pub(super) fn tell_status(&mut self) {
        let status = self.summary();
        if self.is_ready && status != self.status {
            self.tell(self.notify.status(&status));
            self.status = status;
        }
    }

    /// That systemd does not listen, while it re-executes itself say, is no reason to end.
    pub(super) fn tell(&self, told: Result<()>) {
        if let Err(error) = told {
            log::warn!("{error}");
        }
    }

    pub(super) fn look_fresh(&mut self) {
        self.look = Some(Look::Fresh);
    }

    pub(super) fn summary(&self) -> String {
        let interface = self.plane.interface();
        if let Some(trouble) = self.plane.trouble() {
            return trouble.into();
        }
        let device = match self.own() {
            Some(own) if self.is_up => {
                let address = DeviceAddress::new(&own, &self.settings.mesh);
                format!("{interface} is up: {address}, port {}", self.settings.port)
            }
            _ => format!("{interface} waits for its address"),
        };
        let Some(joining) = &self.joining else { return device };
        let peers = peers(joining.peers().count());
        match joining.state() {
            (_, Some(reason)) => format!("{device}, {peers}; registry: {reason}"),
            (_, None) => format!("{device}, {peers}; joined"),
        }
    }
}

pub(super) fn peers(count: usize) -> String {
    let s = if count == 1 { "" } else { "s" };
    format!("{count} peer{s}")
}
