//! The agent itself: the loop, and what each input leads to.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use latchkey_wire::member::Cidr;
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;

use super::Options;
use super::inputs::{Input, Inputs, News};
use super::joining::{Joining, Next, random};
use super::plane::{Found, Plane};
use super::signals::Signal;
use super::view::Since;
use crate::address::{DeviceAddress, candidates};
use crate::advertise::{self, Advertised};
use crate::cache;
use crate::claim::{Wanted, Write, perform};
use crate::device::Look;
use crate::error::{Error, Result};
use crate::handover;
use crate::members::{Endpoint, MemberPeer, Rules};
use crate::milestones::{self, Milestone, Milestones};
use crate::notify::{Notify, watchdog_interval};
use crate::plan::{Desired, DesiredPeer};
use crate::registry::nats::Nats;
use crate::registry::{Event, Registry as _};
use crate::resolve::{Names, look_up};
use crate::settings::{AddressFrom, KeyFrom, RegistrySettings, Settings};
use crate::view::{Counters, View};
use crate::{admin, metrics, path};

/// The longest that a silent change stays unnoticed.
const TICK: Duration = Duration::from_secs(30);

/// Netlink events come in bursts: look once it is quiet.
const SETTLE: Duration = Duration::from_millis(100);

/// How long a start waits for the registry before it goes on with what it knows from the last time.
const PATIENCE: Duration = Duration::from_secs(2);

/// How often systemd hears that READY has to wait, and how much time it gives each time.
const HOLD: Duration = Duration::from_secs(10);
const HOLD_FOR: Duration = Duration::from_secs(30);

/// Changes are shown to others, and the paths to new peers measured, after these.
const SHOW: Duration = Duration::from_millis(50);
const MEASURE: Duration = Duration::from_secs(1);

/// Changes are stored after the first of these, and so again at the earliest after the second.
const STORE_SOON: Duration = Duration::from_secs(1);
const STORE_AGAIN: Duration = Duration::from_secs(30);

/// As long as it is not known where others reach this node, it is tried to find out as often as this.
const ASK_AGAIN: Duration = Duration::from_secs(3);

/// After the first peers are there, the device is looked at for the first handshake: at double the time each time.
const FIRST_HANDSHAKE: Duration = Duration::from_millis(500);

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
    is_behind_nat: bool,
    names: Names,
    /// Whether the names may be others than before.
    names_changed: bool,
    /// Whether somebody is finding out where others reach this node.
    is_asking: bool,
    /// Counts the writes to the registry, so that the answer to one that was given up is known as such.
    writes: u64,
    pub(super) counters: Counters,
    pub(super) milestones: Milestones,
    pub(super) since: Since,
    shown: watch::Sender<Arc<View>>,
    news: mpsc::Sender<News>,
    pub(super) due: Due,
    /// The device has to be compared.
    look: Option<Look>,
    is_ready: bool,
    /// Whether the device had peers, and an address, when it was compared last.
    is_up: bool,
    wipes_identity: bool,
    is_storing: bool,
    status: String,
    handshake_pause: Duration,
    pub(super) metrics: Option<AbortHandle>,
}

/// When what is to be done.
#[derive(Debug, Default)]
pub(super) struct Due {
    tick: Option<Instant>,
    alive: Option<Instant>,
    look: Option<Instant>,
    claim: Option<Instant>,
    patience: Option<Instant>,
    hold: Option<Instant>,
    show: Option<Instant>,
    pub(super) measure: Option<Instant>,
    pub(super) store: Option<Instant>,
    names: Option<Instant>,
    ask: Option<Instant>,
    handshake: Option<Instant>,
}

impl Due {
    fn next(&self, now: Instant) -> Instant {
        let all = [
            self.tick,
            self.alive,
            self.look,
            self.claim,
            self.patience,
            self.hold,
            self.show,
            self.measure,
            self.store,
            self.names,
            self.ask,
            self.handshake,
        ];
        all.into_iter().flatten().min().unwrap_or(now + TICK)
    }
}

/// Whether it is time; then it is no longer due.
fn is_due(due: &mut Option<Instant>, now: Instant) -> bool {
    due.take_if(|at| *at <= now).is_some()
}

/// Due by then, or earlier.
pub(super) fn by(due: &mut Option<Instant>, at: Instant) {
    *due = Some(due.map_or(at, |due| due.min(at)));
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
                Input::Signal(Signal::Reload) => self.reload(&mut inputs)?,
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
        self.notify.stopping()
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
            self.notify.alive()?;
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
            self.notify.extend(HOLD_FOR)?;
        }
        self.compare(now)?;
        self.ask_names(now);
        self.look_for_handshake(now);
        if is_due(&mut self.due.store, now) {
            self.store(now);
        }
        if is_due(&mut self.due.show, now) {
            self.show();
            self.tell_status()?;
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

    /// The registry has not answered, or does not let this node have a record: what can be done without?
    fn do_without(&mut self, now: Instant) -> Result<()> {
        let Some(joining) = &mut self.joining else { return Ok(()) };
        if joining.address().is_some() {
            return Ok(());
        }
        if joining.settle_for_cache() {
            self.look = Some(Look::Fresh);
            log::warn!(
                "registry: no answer so far; going on with {} known from the last time",
                peers(joining.peers().count())
            );
            return Ok(());
        }
        self.park(now)
    }

    /// Has the device carry the key, if it may, so that nothing else has to.
    fn park(&mut self, now: Instant) -> Result<()> {
        if let KeyFrom::File(_) = self.settings.key {
            return self.ready(); // which stays where it is
        }
        match self.plane.found()? {
            Found::Own => self.ready(),
            Found::Nothing => {
                let parked = Desired { address: None, peers: BTreeMap::new(), ..self.desired() };
                self.plane.reconcile(&parked, Look::Fresh, &mut self.counters)?;
                self.ready()
            }
            Found::Foreign => {
                if !self.is_ready && self.due.hold.is_none() {
                    log::warn!(
                        "{} has another node's key; it stays until the registry has given this one an address",
                        self.plane.interface()
                    );
                    self.due.hold = Some(now);
                }
                Ok(())
            }
        }
    }

    /// Compares the device with what it should be, if there is reason to.
    fn compare(&mut self, now: Instant) -> Result<()> {
        if is_due(&mut self.due.measure, now) {
            self.measure();
        }
        let Some(look) = self.look.take() else { return Ok(()) };
        if self.own().is_none() {
            // Parked, and it should stay so.
            let is_waiting = self.due.patience.is_some();
            let parked = if is_waiting { Ok(()) } else { self.park(now) };
            return if self.is_ready { self.noted(parked, now) } else { parked };
        }
        let is_first = !self.is_up;
        if is_first {
            self.measure();
        }
        let desired = self.desired();
        let has_peers = !desired.peers.is_empty();
        let before = self.counters;
        let result = self.plane.reconcile(&desired, look, &mut self.counters);
        if self.counters != before {
            by(&mut self.due.show, now + SHOW);
        }
        if !self.is_ready {
            result?;
            self.is_up = true;
        } else {
            self.is_up = result.is_ok();
            self.noted(result, now)?;
        }
        if !self.is_up {
            return Ok(());
        }
        self.milestones.reached(Milestone::DeviceUp);
        if self.joining.as_ref().is_some_and(Joining::is_joined)
            && self.milestones.reached_so_far().joined_ms.is_none()
        {
            self.milestones.reached(Milestone::Joined);
            by(&mut self.due.show, now);
        }
        if has_peers
            && self.handshake_pause == FIRST_HANDSHAKE
            && self.milestones.reached_so_far().first_handshake_ms.is_none()
        {
            by(&mut self.due.handshake, now + FIRST_HANDSHAKE);
        }
        self.ready()
    }

    fn noted(&mut self, result: Result<()>, now: Instant) -> Result<()> {
        if self.plane.note(result) {
            by(&mut self.due.show, now);
        }
        Ok(())
    }

    /// Tells systemd, once; and then there is to be no other copy of the key.
    fn ready(&mut self) -> Result<()> {
        if self.is_ready {
            return Ok(());
        }
        self.is_ready = true;
        self.due.hold = None;
        self.status = self.summary();
        log::info!("{}", self.status);
        self.notify.ready(&self.status)?;
        if let KeyFrom::HandOver { .. } = self.settings.key
            && self.wipes_identity
        {
            // Without systemd there is no ExecStartPost= that would do it.
            handover::forget_here(&self.options.hand_over)?;
        }
        Ok(())
    }

    fn look_for_handshake(&mut self, now: Instant) {
        if self.milestones.reached_so_far().first_handshake_ms.is_some() {
            return;
        }
        if let Some(when) = self.plane.first_handshake() {
            self.milestones.reached_at(Milestone::FirstHandshake, when);
            self.due.handshake = None;
        } else if is_due(&mut self.due.handshake, now) {
            self.handshake_pause = self.handshake_pause.saturating_mul(2);
            if self.handshake_pause < TICK {
                self.due.handshake = Some(now + self.handshake_pause);
            }
            by(&mut self.due.look, now);
        }
    }

    /// What the device should be.
    fn desired(&self) -> Desired {
        let keepalive = self.keepalive();
        let peers = self.joining.iter().flat_map(Joining::peers).map(|(public_key, peer)| {
            let peer = DesiredPeer {
                endpoint: self.endpoint(peer),
                allowed_ips: peer.allowed_ips.clone(),
                keepalive,
            };
            (*public_key, peer)
        });
        Desired {
            public_key: self.plane.public_key(),
            port: self.settings.port,
            mtu: self.mtu(),
            address: self.own().map(|own| DeviceAddress::new(&own, &self.settings.mesh)),
            peers: peers.collect(),
        }
    }

    /// Where a peer is; for a name that could not be looked up so far, the address in its record, which is what it was then.
    fn endpoint(&self, peer: &MemberPeer) -> Option<SocketAddr> {
        let (address, port) = match peer.endpoint.as_ref()? {
            Endpoint::Address(endpoint) => return Some(*endpoint),
            Endpoint::Name { host, port } => {
                let recorded = || peer.advertise_address.parse().ok();
                (self.names.address(host).or_else(recorded)?, *port)
            }
        };
        // A way to a peer that leads through the mesh is none.
        (!self.settings.mesh.contains(address)).then_some(SocketAddr::new(address, port))
    }

    /// The own range, as soon as the device may have it.
    pub(super) fn own(&self) -> Option<Cidr> {
        match &self.joining {
            Some(joining) => joining.address(),
            None => self.own_without_registry().ok(),
        }
    }

    fn own_without_registry(&self) -> Result<Cidr> {
        let mesh = self.settings.mesh;
        match self.settings.address {
            AddressFrom::Fixed(own) => Ok(own),
            AddressFrom::Key => candidates(&mesh, self.plane.public_key())?
                .next()
                .map(|(_, address)| Cidr::host(address))
                .ok_or(Error::MeshPrefix { mesh }),
        }
    }

    pub(super) fn mtu(&self) -> u32 {
        self.settings.mtu.unwrap_or_else(|| self.plane.mtu())
    }

    pub(super) fn keepalive(&self) -> u16 {
        advertise::keepalive(self.settings.keepalive, self.is_behind_nat)
    }

    /// Looks at the ways to the others: how large packets may be, and whether a NAT is in between.
    fn measure(&mut self) {
        let endpoints: BTreeSet<IpAddr> = self
            .joining
            .iter()
            .flat_map(Joining::peers)
            .filter_map(|(_, peer)| Some(self.endpoint(peer)?.ip()))
            .collect();
        let mut changed = false;
        if let Some(advertised) = &self.advertised {
            match path::is_local(advertised.address) {
                Ok(is_own) => {
                    let peers = endpoints.iter().copied();
                    let nat = advertise::behind_nat(advertised.address, is_own, peers);
                    changed = self.is_behind_nat != nat;
                    self.is_behind_nat = nat;
                }
                Err(error) => log::debug!("{error}"),
            }
        }
        if self.settings.mtu.is_none() {
            changed |= self.plane.measure(endpoints);
        }
        if changed {
            self.look.get_or_insert(Look::Remembered);
            by(&mut self.due.show, Instant::now() + SHOW);
        }
    }

    pub(super) fn ask_advertised(&mut self) {
        self.due.ask = None;
        if self.joining.is_none() || std::mem::replace(&mut self.is_asking, true) {
            return;
        }
        let (settings, known) = (Arc::clone(&self.settings), self.advertised.clone());
        let news = self.news.clone();
        tokio::spawn(async move {
            let advertised = advertise::resolve(&settings, known.as_ref()).await;
            let _ = news.send(News::Advertised(advertised, settings)).await;
        });
    }

    fn ask_names(&mut self, now: Instant) {
        let Some(joining) = &self.joining else { return };
        let is_due = is_due(&mut self.due.names, now);
        if !std::mem::take(&mut self.names_changed) && !is_due {
            return;
        }
        let mut peers: BTreeMap<&str, bool> = BTreeMap::new();
        for (public_key, peer) in joining.peers() {
            if let Some(Endpoint::Name { host, .. }) = &peer.endpoint {
                *peers.entry(host).or_default() |= self.plane.is_silent(public_key);
            }
        }
        self.names.follow(peers.keys().copied(), now);
        for host in self.names.ask(now, |host| peers.get(host).copied().unwrap_or(true)) {
            let news = self.news.clone();
            tokio::spawn(async move {
                let answer = look_up(&host).await;
                let _ = news.send(News::Name(host, answer)).await;
            });
        }
        self.due.names = self.names.next();
    }

    fn store(&mut self, now: Instant) {
        if self.is_storing {
            self.due.store = Some(now + STORE_SOON);
            return;
        }
        let Some(joining) = &self.joining else { return };
        let Some(cached) = joining.to_cache() else { return };
        self.is_storing = true;
        let (path, bucket) = (self.settings.cache.clone(), joining.wanted().bucket.clone());
        let (key, news) = (self.plane.shared_key(), self.news.clone());
        tokio::task::spawn_blocking(move || {
            let stored = cache::store(&path, &key, &bucket, &cached);
            let _ = news.blocking_send(News::Stored(stored));
        });
    }

    fn store_now(&self, cached: &cache::Cached) -> Result<()> {
        let Some(joining) = &self.joining else { return Ok(()) };
        let path: &Path = &self.settings.cache;
        cache::store(path, self.plane.key(), &joining.wanted().bucket, cached)
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

    fn serve(&self, socket: admin::Server) {
        let (view, news) = (self.shown.subscribe(), self.news.clone());
        tokio::spawn(async move {
            let Err(error) = socket.serve(view).await;
            let _ = news.send(News::Ended(error)).await;
        });
    }

    pub(super) fn serve_metrics(&self, server: metrics::Server) -> AbortHandle {
        let (view, news) = (self.shown.subscribe(), self.news.clone());
        let interface = self.settings.interface.clone();
        let serving = tokio::spawn(async move {
            let Err(error) = server.serve(view, interface).await;
            let _ = news.send(News::Ended(error)).await;
        });
        serving.abort_handle()
    }

    fn show(&mut self) {
        let view = self.view();
        self.shown.send_replace(Arc::new(view));
    }

    pub(super) fn tell_status(&mut self) -> Result<()> {
        let status = self.summary();
        if self.is_ready && status != self.status {
            self.notify.status(&status)?;
            self.status = status;
        }
        Ok(())
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

fn peers(count: usize) -> String {
    let s = if count == 1 { "" } else { "s" };
    format!("{count} peer{s}")
}
