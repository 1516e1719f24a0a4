//! `latchkey-kms`: the key server. Machines prove themselves with their TPM (`protocols/kcrypt.md` §3 to §7) and get the
//! passphrase of their disk, from a directory of manifests ([`store`]).
//!
//! A library beside the program only for what is made from the program: its manual pages and completions
//! ([`command`]).

mod cli;
mod decision;
mod error;
mod exchange;
mod health;
mod limits;
mod matching;
mod metrics;
mod places;
mod quiet;
mod report;
mod serve;
mod server;
mod store;
mod tls;
mod visit;

use std::{io::Write, process::ExitCode};

use clap::{CommandFactory, Parser};

use crate::cli::{Cli, Command};

/// The command line as it is parsed, for manual pages and completions.
#[must_use]
pub fn command() -> clap::Command {
    Cli::command()
}

/// Does what the command line says, to the exit code.
#[must_use]
pub fn main() -> ExitCode {
    let command = Cli::parse().command;
    start_log();
    let done = match command {
        Command::Serve(options) => serve::run(options),
    };
    match done {
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
