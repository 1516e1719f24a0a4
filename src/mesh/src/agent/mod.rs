//! `latchkey agent`: keeps the WireGuard device as it should be.
//!
//! Level-triggered: each round reads the device, and changes what differs. Rounds come with the
//! netlink events about links and addresses, and with a slow tick, because nobody is told when the
//! key, the port or the peers of a device change.

use std::collections::BTreeMap;
use std::env;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use latchkey_wire::member::Cidr;
use nix::sys::prctl::set_dumpable;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{MissedTickBehavior, interval, sleep};

use crate::address::{DeviceAddress, candidates};
use crate::device::{Device, Look};
use crate::error::{Error, Result};
use crate::handover::{self, HandOver};
use crate::key::PrivateKey;
use crate::netlink::events::Events;
use crate::notify::{Notify, watchdog_interval};
use crate::plan::Desired;
use crate::settings::{AddressFrom, KeyFrom, Settings};

/// What WireGuard takes off an Ethernet path over IPv6: 1500 - 40 (IPv6) - 8 (UDP) - 32
/// (WireGuard). The kernel's own default.
pub const DEFAULT_MTU: u32 = 1420;

/// The longest that a silent change stays unnoticed.
const TICK: Duration = Duration::from_secs(30);

/// Events come in bursts, our own changes among them: look once it is quiet.
const SETTLE: Duration = Duration::from_millis(100);

/// One agent: what should be, and the device that should be so.
#[derive(Debug)]
pub struct Agent {
    device: Device,
    desired: Desired,
    key: PrivateKey,
    /// What kept the last round from its end.
    trouble: Option<String>,
}

/// What an agent needs beside its settings.
pub struct Options {
    pub hand_over: HandOver,
    /// Reads the settings again, on SIGHUP.
    pub settings_again: Box<dyn Fn() -> Result<Settings> + Send>,
}

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Options").field("hand_over", &self.hand_over).finish_non_exhaustive()
    }
}

/// Runs until SIGTERM or SIGINT, which leave the device up and working.
pub fn run(settings: Settings, options: Options) -> Result<()> {
    let hand_over = &options.hand_over;
    // No core dump, and no debugger of others. latchkey.service says the same; this is for runs by
    // hand.
    set_dumpable(false).map_err(|errno| failed("switch core dumps off", errno.into()))?;
    let credentials = env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from);
    let _lock = hand_over.lock()?;
    let notify = Notify::from_env()?;
    let mut agent = Agent::new(&settings, hand_over, credentials.as_deref())?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|source| failed("start the event loop", source))?;
    runtime.block_on(async {
        // Before the first look, so that nothing can change unseen in between.
        let events = Events::open().map_err(|source| failed("listen to netlink events", source))?;
        agent.reconcile()?;
        notify.ready(&agent.summary())?;
        if credentials.is_none() {
            // Without systemd there is no ExecStartPost= that would do it.
            handover::forget(hand_over, None)?;
        }
        agent.watch(&events, &notify).await
    })
}

/// Takes the device away, and with it the key of this boot. `false` if there was none.
///
/// # Errors
/// [`Error::AgentRunning`] if there is an agent, which would put it back.
pub fn down(settings: &Settings, hand_over: &HandOver) -> Result<bool> {
    let _lock = hand_over.lock()?;
    Device::open(&settings.interface)?.remove()
}

impl Agent {
    fn new(settings: &Settings, hand_over: &HandOver, credentials: Option<&Path>) -> Result<Self> {
        let mut device = Device::open(&settings.interface)?;
        let device_key = device.read()?.and_then(|snapshot| snapshot.into_private_key());
        let key = match &settings.key {
            KeyFrom::HandOver { network } => {
                hand_over.private_key(network, credentials, device_key)?
            }
            KeyFrom::File(path) => PrivateKey::read(path)?,
        };
        let own = match settings.address {
            AddressFrom::Fixed(own) => own,
            AddressFrom::Key => candidates(&settings.mesh, key.public())?
                .next()
                .map(|(_, address)| Cidr::host(address))
                .ok_or(Error::MeshPrefix { mesh: settings.mesh })?,
        };
        let desired = Desired {
            public_key: key.public(),
            port: settings.port,
            mtu: DEFAULT_MTU,
            address: Some(DeviceAddress::new(&own, &settings.mesh)),
            peers: BTreeMap::new(),
        };
        Ok(Self { device, desired, key, trouble: None })
    }

    fn reconcile(&mut self) -> Result<()> {
        let changes = self.device.reconcile(&self.desired, &self.key, Look::Fresh)?;
        for change in &changes {
            log::info!("{}: {change}", self.device.interface());
        }
        if changes.is_empty() {
            log::debug!("{}: as it should be", self.device.interface());
        }
        Ok(())
    }

    async fn watch(&mut self, events: &Events, notify: &Notify) -> Result<()> {
        let on = |kind| signal(kind).map_err(|source| failed("wait for signals", source));
        let (mut terminate, mut interrupt) =
            (on(SignalKind::terminate())?, on(SignalKind::interrupt())?);
        let mut tick =
            interval(watchdog_interval().map_or(TICK, |watchdog| TICK.min(watchdog / 2)));
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        tick.tick().await; // the first is due at once, and its work is done
        loop {
            tokio::select! {
                _ = terminate.recv() => break,
                _ = interrupt.recv() => break,
                _ = tick.tick() => {}
                changed = self.changed(events) => changed?,
            }
            self.repair(notify)?;
            notify.alive()?;
        }
        log::info!("stopping; {} stays up", self.device.interface());
        notify.stopping()
    }

    /// Goes on whatever happens: with the device gone, this process has the only copy of the key.
    fn repair(&mut self, notify: &Notify) -> Result<()> {
        let trouble = self.reconcile().err().map(|error| error.to_string());
        if trouble != self.trouble {
            match &trouble {
                Some(trouble) => log::error!("{trouble}; trying again"),
                None => log::info!("{}", self.summary()),
            }
            notify.status(trouble.as_ref().unwrap_or(&self.summary()))?;
            self.trouble = trouble;
        }
        Ok(())
    }

    /// Waits until something about the device has changed, and then until it is quiet.
    async fn changed(&self, events: &Events) -> Result<()> {
        let listening = |source| failed("listen to netlink events", source);
        events.next(self.device.watched()).await.map_err(listening)?;
        sleep(SETTLE).await;
        events.skip(self.device.watched()).map_err(listening)
    }

    fn summary(&self) -> String {
        let address =
            self.desired.address.map_or_else(String::new, |address| format!("{address}, "));
        format!("{} is up: {address}port {}", self.device.interface(), self.desired.port)
    }
}

fn failed(action: &str, source: io::Error) -> Error {
    Error::Kernel { action: action.into(), source }
}
