//! `latchkey agent`: makes this node a member of its mesh, and keeps the WireGuard device as it should be.
//!
//! Level-triggered: what the registry says, what the settings say and what names stand for make up what the device should be;
//! each round compares that with the device, and changes what differs. Rounds come with each event of the registry, with
//! netlink events about the device and its addresses, and with a slow tick, because nobody is told when the key, the port
//! or the peers of a device change.
//!
//! # Joining
//!
//! ```text
//!             ┌────────── registry silent for 2 s, or away ──────────┐
//!             │                                                      ▼
//! Starting ───┴─► Reading ──► Claiming ──► Joined          Parked (no cache) or
//!   key, lock,     all the     write, and    │             Up (with the members of the cache)
//!   socket         records     see it shown  │                       │
//!                    ▲           │  ▲        │                       │
//!                    │           ▼  │        ▼                       │
//!                    │         Refused   record gone or changed      │
//!                    │         by NATS   by somebody: Claiming       │
//!                    │         or taken                              │
//!                    └──── the registry is there (again) ────────────┘
//! ```
//!
//! | state | the device | registry goes away |
//! |---|---|---|
//! | Starting | untouched | – |
//! | Reading | untouched, as far as there is one | Parked, or Up if the cache names this node's address |
//! | Claiming | untouched until the record is this node's; the others' records count for it from then on | as in Reading, or stays as it is |
//! | Joined | address, peers | stays as it is; nothing is removed |
//! | Refused | stays as it is: untouched, or with its address and the peers that the registry tells | stays as it is |
//! | Parked | made, if there was none: down, with the key alone | – |
//! | Up | address of the last time, members of the last time | – |
//! | Taken | untouched; [`Error::AddressTaken`] ends the agent. Only for a configured address, and only if it never was this node's | – |
//!
//! * A write counts once the watch has shown it. By then all that was written before has been seen, records of other
//!   keys with overlapping ranges among them: the later one gives its record up and takes its next candidate.
//! * A record that this node had and that somebody deleted or changed is written again after a pause, which doubles with
//!   each time, so that two agents with one key do not wear out the registry. To shut a node out, its permission to write
//!   is taken first, then its record.
//! * A record that is missing in a new snapshot of the same bucket was deleted. A bucket that was made anew ([`incarnation`])
//!   says nothing of those who have not written to it yet: they stay for five minutes, unless it says
//!   otherwise (their record is deleted in it, or another node has their range). The cache still names them all that time.
//!
//! [`incarnation`]: crate::registry::Event::Snapshot
//!
//! # Readiness
//!
//! systemd is told READY when the device is as it should be, or, while the registry does not answer, when the device at
//! least has the key: what follows READY is that every other copy of it is wiped. A device that is there with another
//! key is not touched before this node may have an address; until then READY has to wait.

mod aside;
mod desired;
mod due;
mod inputs;
mod joining;
mod node;
mod plane;
mod reload;
mod round;
mod signals;
mod view;

use std::env;
use std::fmt;
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::prctl::set_dumpable;

use crate::admin;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::handover::HandOver;
use crate::key::PrivateKey;
use crate::notify::Notify;
use crate::settings::{KeyFrom, Settings};

use inputs::Inputs;
use node::Agent;
use plane::Plane;

/// Threads for what waits for the disk or a resolver. They end when they are idle.
const THREADS: usize = 6;

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
///
/// # Errors
/// What keeps the agent from starting. Once it is ready it goes on whatever happens.
pub fn run(settings: Settings, options: Options) -> Result<()> {
    // No core dump, and no debugger of others. latchkey.service says the same; this is for runs by
    // hand.
    set_dumpable(false).map_err(|errno| failed("switch core dumps off", errno.into()))?;
    let credentials = env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from);
    let _lock = lock(&settings, &options.hand_over)?;
    let notify = Notify::from_env()?;
    let mut device = Device::open(&settings.interface)?;
    let key = match &settings.key {
        KeyFrom::File(path) => PrivateKey::read(path)?,
        KeyFrom::HandOver { network } => {
            let on_device = device.read()?.and_then(|snapshot| snapshot.into_private_key());
            options.hand_over.private_key(network, credentials.as_deref(), on_device)?
        }
    };
    let socket = admin::Server::bind(&settings.socket)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(THREADS)
        .thread_keep_alive(Duration::from_secs(1))
        .build()
        .map_err(|source| failed("start the event loop", source))?;
    let wipes_identity = credentials.is_none();
    let done = runtime.block_on(async {
        let mut inputs = Inputs::open()?;
        let plane = Plane::new(device, Arc::new(key));
        let agent = Agent::new(settings, options, plane, notify, wipes_identity, &mut inputs)?;
        agent.run(inputs, socket).await
    });
    // A look-up that never ends must not keep the agent from ending.
    runtime.shutdown_background();
    done
}

/// Takes the device away, and with it the key of this boot. `false` if there was none.
///
/// # Errors
/// [`Error::AgentRunning`] if there is an agent, which would put it back.
pub fn down(settings: &Settings, hand_over: &HandOver) -> Result<bool> {
    let _alone = alone(settings, hand_over)?;
    Device::open(&settings.interface)?.remove()
}

/// The right to be the agent of the machine's own mesh. Agents with a file of their own are told apart by their sockets.
fn lock(settings: &Settings, hand_over: &HandOver) -> Result<Option<File>> {
    match settings.key {
        KeyFrom::HandOver { .. } => hand_over.lock(),
        KeyFrom::File(_) => Ok(None),
    }
}

/// The certainty that no agent runs with these settings, until it is dropped.
pub(crate) fn alone(settings: &Settings, hand_over: &HandOver) -> Result<impl Drop + use<>> {
    struct Alone(Option<File>, Option<admin::Server>);
    impl Drop for Alone {
        fn drop(&mut self) {
            drop((self.0.take(), self.1.take()));
        }
    }
    let lock = lock(settings, hand_over)?;
    let socket = match settings.key {
        KeyFrom::HandOver { .. } => None,
        KeyFrom::File(_) => match admin::Server::bind(&settings.socket) {
            Err(Error::SocketTaken { .. }) => return Err(Error::AgentRunning),
            bound => Some(bound?),
        },
    };
    Ok(Alone(lock, socket))
}

fn failed(action: &str, source: io::Error) -> Error {
    Error::Kernel { action: action.into(), source }
}
