//! `latchkey-kms serve`: what is set up before the first connection, and what runs beside the server until it is told to stop.

use std::{net::SocketAddr, path::Path, sync::Arc, time::Duration};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::watch,
    task::JoinHandle,
    time::{MissedTickBehavior, interval, timeout},
};

use crate::{
    audit::{self, Audit},
    cli::Serve,
    error::Error,
    exchange::Settings,
    health::{self, Health},
    limits::Limits,
    mdns::{self, packet::Service},
    metrics::Metrics,
    notify,
    places::Places,
    server::{Lines, Server},
    store::Store,
    tls::Tls,
};

/// How often the store and the TLS files are looked at.
const POLL: Duration = Duration::from_millis(500);

/// How long the end waits for a write in progress.
const LAST_WRITES: Duration = Duration::from_secs(2);

/// How long the mDNS responder may take to say goodbye.
const GOODBYE: Duration = Duration::from_secs(1);

/// File descriptors for all but connections: listeners, the store's files, the runtime's own.
const OTHER_FILES: u64 = 64;

/// Serves until SIGTERM or SIGINT.
pub(crate) fn run(options: Serve) -> Result<(), Error> {
    // Passphrases are in this program's memory: they must not end up in a core file.
    if let Err(error) = setrlimit(Resource::RLIMIT_CORE, 0, 0) {
        log::warn!("core dumps could not be turned off: {error}");
    }
    let tls = match (&options.tls_cert, &options.tls_key) {
        (Some(cert), Some(key)) => Some(Arc::new(Tls::open(cert, key)?)),
        _ => None,
    };
    let store = Store::open(&options.store)
        .map_err(|source| Error::Store { path: options.store.clone(), source })?;
    store.remove_leftovers();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|source| Error::System { what: "starting the runtime", source })?;
    let served = runtime.block_on(listen(options, tls, Arc::new(store)));
    // A write that hangs in the file system was promised to nobody.
    runtime.shutdown_timeout(LAST_WRITES);
    served
}

async fn listen(options: Serve, tls: Option<Arc<Tls>>, store: Arc<Store>) -> Result<(), Error> {
    let (listener, address) = bind(options.listen, "--listen").await?;
    let stop = stop_signal()?;
    if tls.is_none() {
        log::warn!(
            "without --tls-cert and --tls-key, passphrases that operators wrote cross the network in clear"
        );
    }
    let places = Places::new(
        room_for(options.max_connections),
        options.max_connections_per_address as usize,
    );
    let audit = match &options.audit {
        Some(path) => Some(open_audit(path, address)?),
        None => None,
    };
    let counts = audit.as_ref().map(Audit::counts);
    let metrics = Arc::new(Metrics::new(places.clone(), tls.clone(), counts));
    let health = Arc::new(Health::new(store.clone()));
    if let Some(wanted) = options.metrics_listen {
        let (listener, address) = bind(wanted, "--metrics-listen").await?;
        log::info!("metrics on http://{address}/metrics");
        tokio::spawn(health::serve(listener, health.clone(), metrics.clone()));
    }
    log::info!("listening on {address} ({})", if tls.is_some() { "TLS" } else { "plain" });
    let responder = match &options.mdns {
        Some(name) => Some(Responder::start(name, address)?),
        None => None,
    };
    tokio::spawn(watch(store, tls.clone()));
    let server = Arc::new(Server {
        health,
        tls,
        limits: Arc::new(Limits::new(options.address_limit(), options.machine_limit())),
        places,
        metrics,
        settings: Settings {
            message_timeout: options.message_timeout,
            pcrs: options.pcrs.iter().copied().collect(),
            allow_empty_nonce: options.allow_empty_quote_nonce,
            namespace: options.namespace.clone(),
        },
        handshake_timeout: options.handshake_timeout,
        stop_timeout: options.stop_timeout,
        audit,
        quiet: Lines::default(),
    });
    notify::ready(&format!("listening on {address}"));
    server.clone().run(listener, stop).await;
    if let Some(responder) = responder {
        responder.stop().await;
    }
    if let Some(audit) = &server.audit {
        audit.conclude(LAST_WRITES);
    }
    Ok(())
}

/// The mDNS responder beside the server.
struct Responder {
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Responder {
    fn start(name: &str, address: SocketAddr) -> Result<Self, Error> {
        let service = Service::new(name, address.port())?;
        let only = Some(address.ip().to_canonical()).filter(|address| !address.is_unspecified());
        let (stop, stopped) = watch::channel(false);
        let task = tokio::spawn(mdns::run(service, only, stopped));
        Ok(Self { stop, task })
    }

    async fn stop(self) {
        let _ = self.stop.send(true); // it may have ended already
        let _ = timeout(GOODBYE, self.task).await; // so many goodbyes are not worth waiting for
    }
}

async fn bind(wanted: SocketAddr, flag: &'static str) -> Result<(TcpListener, SocketAddr), Error> {
    let failed = |source| Error::Listen { address: wanted, flag, source };
    let listener = TcpListener::bind(wanted).await.map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    Ok((listener, address))
}

fn open_audit(path: &Path, address: SocketAddr) -> Result<Audit, Error> {
    let version = env!("CARGO_PKG_VERSION");
    let first = audit::Event::ServerStarted { version, listen: address.to_string() };
    Audit::open(path.to_owned(), first)
        .map_err(|source| Error::Audit { path: path.to_owned(), source })
}

/// How many connections there may be: as many as are wanted, if the system lets the program have as many files.
fn room_for(wanted: u32) -> usize {
    let files = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(soft, hard)| {
        let needed = (u64::from(wanted) + OTHER_FILES).min(hard);
        if soft < needed {
            setrlimit(Resource::RLIMIT_NOFILE, needed, hard)?;
        }
        Ok(soft.max(needed))
    });
    let wanted = wanted as usize;
    match files {
        Err(error) => {
            log::warn!("the limit of open files could not be raised: {error}");
            wanted
        }
        Ok(files) => {
            let room = usize::try_from(files.saturating_sub(OTHER_FILES)).unwrap_or(usize::MAX);
            if room < wanted {
                log::warn!(
                    "only {room} of {wanted} connections (--max-connections): this program may have {files} files open (LimitNOFILE=, ulimit -n)"
                );
            }
            room.min(wanted).max(1)
        }
    }
}

/// Resolves with the name of the signal that asks the server to stop.
fn stop_signal() -> Result<impl Future<Output = &'static str>, Error> {
    let handler =
        |kind| signal(kind).map_err(|source| Error::System { what: "catching signals", source });
    let (mut terminate, mut interrupt) =
        (handler(SignalKind::terminate())?, handler(SignalKind::interrupt())?);
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        }
    })
}

/// Looks at the store and the TLS files for ever.
async fn watch(store: Arc<Store>, tls: Option<Arc<Tls>>) {
    let mut ticks = interval(POLL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let (store, tls) = (store.clone(), tls.clone());
        let look = move || {
            store.poll();
            if let Some(tls) = tls {
                tls.poll();
            }
        };
        if let Err(error) = tokio::task::spawn_blocking(look).await {
            log::error!("looking at the store failed: {error}");
        }
    }
}
