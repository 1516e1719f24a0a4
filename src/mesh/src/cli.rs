//! The command line of `latchkey`.

use std::path::PathBuf;

use clap::{CommandFactory, Parser, Subcommand};
use latchkey_config::DIRS;

const EXIT_CODES: &str = "\
Exit codes:
   0  done
   1  internal error; `handover check`: the agent has no reason to start
   2  wrong command line
   3  `status`: the mesh is not up; `status --boot`: the disk was not opened
  10  configuration
  50  no mesh identity
  60  not permitted
  61  no WireGuard in the kernel
  62  the interface's name belongs to something else
  63  the port is taken
  64  the kernel refused something";

/// The mesh agent of a machine that lets itself in, and the operator's command beside it.
#[derive(Debug, Parser)]
#[command(name = "latchkey", version, after_help = EXIT_CODES)]
pub struct Arguments {
    /// Read cloud-config below this directory instead; may be given more than once.
    #[arg(long, global = true, value_name = "DIR", default_values = DIRS)]
    pub cloud_config: Vec<PathBuf>,

    #[command(subcommand)]
    pub verb: Verb,
}

#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Bring the WireGuard device up and keep it as it should be. SIGTERM ends the agent and leaves
    /// the device up.
    Agent {
        /// Take the device away instead, and with it the key of this boot. Stop the service first.
        #[arg(long)]
        down: bool,
    },
    /// Show this node: key, address, identity, peers. Needs CAP_NET_ADMIN.
    Status {
        /// Show this boot instead: how the disk was opened or why it was not, step by step. Needs root.
        #[arg(long)]
        boot: bool,

        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// The identity handed over by the initramfs, as latchkey.service handles it.
    #[command(subcommand)]
    Handover(HandoverVerb),
}

#[derive(Debug, Subcommand)]
pub enum HandoverVerb {
    /// Succeed if the agent has a reason to start; otherwise say why not and exit with 1 (for
    /// ExecCondition=).
    Check,
    /// Remove every copy of the private key below /run, once the agent has it (for ExecStartPost=).
    Forget {
        /// Where systemd put the credential.
        #[arg(long, value_name = "DIR")]
        credentials: Option<PathBuf>,
    },
}

/// The definition, for man pages and completions.
#[must_use]
pub fn command() -> clap::Command {
    Arguments::command()
}
