//! `latchkey-kms`: the key server. Machines prove themselves with their TPM (`protocols/kcrypt.md` §3 to §7) and get the
//! passphrase of their disk, from a directory of manifests ([`store`]).
//!
//! A library beside the program only for what is made from the program: its manual pages and completions
//! ([`command`]).

mod audit;
mod cli;
mod decision;
mod error;
mod exchange;
mod health;
mod limits;
mod matching;
pub mod mdns;
mod metrics;
mod notify;
mod places;
mod quiet;
mod report;
mod serve;
mod server;
mod store;
mod time;
mod tls;
mod visit;
mod volume;

use std::{io::Write, path::Path, process::ExitCode};

use clap::{CommandFactory, Parser};

use crate::{
    audit::chain::Head,
    cli::{Cli, Command},
    error::Error,
};

/// The command line as it is parsed, for manual pages and completions.
#[must_use]
pub fn command() -> clap::Command {
    Cli::command()
}

/// Does what the command line says, to the exit code.
#[must_use]
pub fn main() -> ExitCode {
    let command = Cli::parse().command;
    start_log(match command {
        Command::Serve(_) => "info",
        Command::Audit(_) | Command::Volume(_) => "warn",
    });
    let done = match command {
        Command::Serve(options) => serve::run(*options),
        Command::Audit(cli::Audit::Verify { file, contains }) => verify(&file, contains.as_ref()),
        Command::Volume(command) => volume::run(command),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log::error!("{error}");
            error.exit_code()
        }
    }
}

/// `audit verify`.
fn verify(path: &Path, contains: Option<&Head>) -> Result<(), Error> {
    let whole = audit::verify::verify(path, contains)
        .map_err(|source| Error::Broken { path: path.to_owned(), source })?;
    println!("{whole}");
    Ok(())
}

/// Lines on stderr: time, level, message. `RUST_LOG` changes the level.
fn start_log(level: &'static str) {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or(level))
        .format(|out, record| {
            writeln!(out, "{} {:<5} {}", out.timestamp_millis(), record.level(), record.args())
        })
        .init();
}
