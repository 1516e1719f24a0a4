//! The mDNS responder (RFC 6762, RFC 6763): with it `challenger_server: https://NAME.local` and `mdns: true` need no second
//! program (`protocols/kcrypt.md` §10.6).
//!
//! One socket per interface and family, bound to it, so that an answer goes where the question came from, with the addresses
//! of that interface. Interfaces are looked at every few seconds: what comes later is announced then.

mod links;
pub mod packet;

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use tokio::{
    net::UdpSocket,
    sync::watch,
    task::JoinHandle,
    time::{MissedTickBehavior, interval, sleep},
};

use crate::quiet::Quiet;
use links::{Key, Link, on_link};
use packet::{Heard, MAX_PACKET, Service};

/// How often the interfaces are looked at.
const LOOK: Duration = Duration::from_secs(3);
/// Pause between the three questions whether the name is taken (RFC 6762 §8.1).
const PROBE_PAUSE: Duration = Duration::from_millis(250);
/// The announcement is repeated once after this long (RFC 6762 §8.3).
const AGAIN: Duration = Duration::from_secs(1);
/// Most packets per second that an interface is sent, to all and to askers: nobody shall multiply by us.
const MOST_FOR_ALL: u32 = 20;
const MOST_FOR_ASKERS: u32 = 2000;

/// Answers until `stop` says true, and then says goodbye.
pub(crate) async fn run(service: Service, only: Option<IpAddr>, mut stop: watch::Receiver<bool>) {
    let service = Arc::new(service);
    let own = Arc::new(Mutex::new(Vec::new()));
    let mut answering: HashMap<Key, Answering> = HashMap::new();
    let mut ticks = interval(LOOK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            _ = stop.wait_for(|stop| *stop) => break,
        }
        let found = links::all(only);
        *own.lock().unwrap_or_else(PoisonError::into_inner) =
            found.values().flat_map(Link::addresses).collect();
        answering.retain(|key, answering| {
            let stays = found.get(key).is_some_and(|link| *link == answering.link);
            if !stays {
                answering.task.abort();
            }
            stays
        });
        for (key, link) in found {
            if answering.contains_key(&key) {
                continue;
            }
            match Answering::start(&key, link, &service, &own) {
                Ok(begun) => drop(answering.insert(key, begun)),
                Err(error) => log::warn!("mDNS on {key}: {error}"),
            }
        }
    }
    for answering in answering.values() {
        answering.task.abort();
        let goodbye = service.announcement(&answering.addresses(), false);
        if let Ok(goodbye) = goodbye
            && let Err(error) = answering.socket.send_to(&goodbye, answering.group).await
        {
            log::debug!("mDNS: saying goodbye: {error}");
        }
    }
}

/// An interface and family on which we answer.
struct Answering {
    link: Link,
    socket: Arc<UdpSocket>,
    group: SocketAddr,
    task: JoinHandle<()>,
}

impl Answering {
    fn start(
        key: &Key,
        link: Link,
        service: &Arc<Service>,
        own: &Arc<Mutex<Vec<IpAddr>>>,
    ) -> io::Result<Self> {
        let socket = Arc::new(UdpSocket::from_std(links::socket(key)?)?);
        let group = key.family.group(key.index);
        let shown: Vec<String> = link.addresses().map(|address| address.to_string()).collect();
        log::info!("mDNS: answering on {key} with {}", shown.join(", "));
        let voice = Voice {
            name: key.to_string(),
            service: service.clone(),
            socket: socket.clone(),
            group,
            link: link.clone(),
            own: own.clone(),
            for_all: Budget::new(MOST_FOR_ALL),
            for_askers: Budget::new(MOST_FOR_ASKERS),
            conflicts: Quiet::every(Duration::from_secs(60)),
        };
        let task = tokio::spawn(async move { voice.speak().await });
        Ok(Self { link, socket, group, task })
    }

    fn addresses(&self) -> Vec<IpAddr> {
        self.link.addresses().collect()
    }
}

/// What answers on an interface.
struct Voice {
    name: String,
    service: Arc<Service>,
    socket: Arc<UdpSocket>,
    group: SocketAddr,
    link: Link,
    own: Arc<Mutex<Vec<IpAddr>>>,
    for_all: Budget,
    for_askers: Budget,
    conflicts: Quiet,
}

impl Voice {
    async fn speak(&self) {
        tokio::join!(self.announce(), self.answer());
    }

    /// Asks whether the name is taken, and announces it. A conflict is told ([`Self::hear`]) and does not stop us: two servers
    /// of one name may be meant.
    async fn announce(&self) {
        if let Ok(probe) = self.service.probe() {
            for _ in 0..3 {
                self.say(&probe).await;
                sleep(PROBE_PAUSE).await;
            }
        }
        let addresses: Vec<IpAddr> = self.link.addresses().collect();
        match self.service.announcement(&addresses, true) {
            Ok(announcement) => {
                self.say(&announcement).await;
                sleep(AGAIN).await;
                self.say(&announcement).await;
            }
            Err(error) => log::warn!("mDNS on {}: {error}", self.name),
        }
    }

    async fn say(&self, packet: &[u8]) {
        if let Err(error) = self.socket.send_to(packet, self.group).await {
            log::debug!("mDNS on {}: {error}", self.name);
        }
    }

    async fn answer(&self) {
        let addresses: Vec<IpAddr> = self.link.addresses().collect();
        let mut buffer = vec![0; MAX_PACKET + 1];
        loop {
            match self.socket.recv_from(&mut buffer).await {
                Ok((length, from)) => {
                    let message = buffer.get(..length).unwrap_or_default();
                    self.hear(message, from, &addresses).await;
                }
                Err(error) => {
                    // The interface went down, most likely; the next look decides.
                    log::debug!("mDNS on {}: {error}", self.name);
                    sleep(AGAIN).await;
                }
            }
        }
    }

    async fn hear(&self, message: &[u8], from: SocketAddr, addresses: &[IpAddr]) {
        // RFC 6762 §11: what comes from elsewhere is not of this link.
        if !on_link(&self.link, from.ip()) {
            return;
        }
        let own = self.own.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let sent = match self.service.hear(message, from.port(), addresses, &own) {
            Ok(Heard::ForAll(answer)) if self.for_all.take() => {
                self.socket.send_to(&answer, self.group).await
            }
            Ok(Heard::ForAsker(answer)) if self.for_askers.take() => {
                self.socket.send_to(&answer, from).await
            }
            Ok(Heard::Conflict(address)) => {
                self.conflicts.warn(format_args!(
                    "mDNS on {}: {from} has the same name with the address {address}: machines may ask it instead; choose another --mdns name unless that is meant",
                    self.name
                ));
                return;
            }
            Ok(Heard::Nothing | Heard::ForAll(_) | Heard::ForAsker(_)) => return,
            Err(error) => {
                log::debug!("mDNS on {}: from {from}: {error}", self.name);
                return;
            }
        };
        if let Err(error) = sent {
            log::debug!("mDNS on {}: answering {from}: {error}", self.name);
        }
    }
}

/// So many packets in a second.
struct Budget {
    most: u32,
    spent: Mutex<(Instant, u32)>,
}

impl Budget {
    fn new(most: u32) -> Self {
        Self { most, spent: Mutex::new((Instant::now(), 0)) }
    }

    fn take(&self) -> bool {
        let mut spent = self.spent.lock().unwrap_or_else(PoisonError::into_inner);
        if spent.0.elapsed() >= Duration::from_secs(1) {
            *spent = (Instant::now(), 0);
        }
        spent.1 += 1;
        spent.1 <= self.most
    }
}
