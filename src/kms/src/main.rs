//! `latchkey-kms`: the key server. Machines prove themselves with their TPM (`protocols/kcrypt.md` §3 to §5) and get the
//! passphrase of their disk, from a directory of manifests ([`store`]).

mod cli;
mod decision;
mod error;
mod exchange;
mod matching;
mod server;
mod store;
mod tls;

use std::{io::Write, process::ExitCode, sync::Arc, time::Duration};

use clap::Parser;
use nix::sys::resource::{Resource, setrlimit};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    time::{MissedTickBehavior, interval},
};

use crate::{
    cli::{Cli, Command, Serve},
    error::StartError,
    server::Server,
    store::Store,
};

/// How often the store is looked at.
const POLL: Duration = Duration::from_millis(500);

/// How long the end waits for a write in progress.
const LAST_WRITES: Duration = Duration::from_secs(2);

fn main() -> ExitCode {
    let Command::Serve(options) = Cli::parse().command;
    start_log();
    match serve(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log::error!("{error}");
            error.exit_code()
        }
    }
}

/// Lines on stderr: time, level, message. `RUST_LOG` changes the level.
fn start_log() {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info"))
        .format(|out, record| {
            writeln!(out, "{} {:<5} {}", out.timestamp_millis(), record.level(), record.args())
        })
        .init();
}

fn serve(options: Serve) -> Result<(), StartError> {
    // Passphrases are in this program's memory: they must not end up in a core file.
    if let Err(error) = setrlimit(Resource::RLIMIT_CORE, 0, 0) {
        log::warn!("core dumps could not be turned off: {error}");
    }
    let tls = match (&options.tls_cert, &options.tls_key) {
        (Some(cert), Some(key)) => Some(tls::acceptor(cert, key)?),
        _ => None,
    };
    let store = Store::open(&options.store)
        .map_err(|source| StartError::Store { path: options.store.clone(), source })?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|source| StartError::System { what: "starting the runtime", source })?;
    let served = runtime.block_on(listen(options, tls, Arc::new(store)));
    // A write that hangs in the file system was promised to nobody.
    runtime.shutdown_timeout(LAST_WRITES);
    served
}

async fn listen(
    options: Serve,
    tls: Option<tokio_rustls::TlsAcceptor>,
    store: Arc<Store>,
) -> Result<(), StartError> {
    let failed = |source| StartError::Listen { address: options.listen, source };
    let listener = TcpListener::bind(options.listen).await.map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    let stop = stop_signal()?;
    if tls.is_none() {
        log::warn!(
            "without --tls-cert and --tls-key, passphrases that operators wrote cross the network in clear"
        );
    }
    log::info!("listening on {address} ({})", if tls.is_some() { "TLS" } else { "plain" });
    tokio::spawn(watch(store.clone()));
    let server = Server {
        store,
        tls,
        max_connections: options.max_connections,
        handshake_timeout: options.handshake_timeout,
        message_timeout: options.message_timeout,
        stop_timeout: options.stop_timeout,
    };
    server.run(listener, stop).await;
    Ok(())
}

/// Resolves with the name of the signal that asks the server to stop.
fn stop_signal() -> Result<impl Future<Output = &'static str>, StartError> {
    let handler = |kind| {
        signal(kind).map_err(|source| StartError::System { what: "catching signals", source })
    };
    let (mut terminate, mut interrupt) =
        (handler(SignalKind::terminate())?, handler(SignalKind::interrupt())?);
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        }
    })
}

/// Looks at the store for ever.
async fn watch(store: Arc<Store>) {
    let mut ticks = interval(POLL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let store = store.clone();
        if let Err(error) = tokio::task::spawn_blocking(move || store.poll()).await {
            log::error!("looking at the store failed: {error}");
        }
    }
}
