//! The command line of `latchkey`. Verbs and flags that Ikto has are Ikto's (protocols/ikto-kilo.md §1.2).

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{ArgAction, Args, CommandFactory, Parser, Subcommand, ValueHint};
use latchkey_config::DIRS;

const EXIT_CODES: &str = "\
Exit codes:
   0  done
   1  internal error; `info`: no agent answers; `handover check`: the agent has no reason to start
   2  wrong command line
   3  `status`: the mesh is not up; `status --boot`: the disk was not opened
  10  configuration
  50  no mesh identity
  60  not permitted
  61  no WireGuard: neither the kernel's nor wireguard-go
  62  the interface's name belongs to something else
  63  the port is taken
  64  the kernel refused something, or this node has no address to advertise
  65  the mesh address belongs to another node
  66  the registry is away, refuses, or has another bucket of that name";

/// The mesh agent of a machine that lets itself in, and the operator's command beside it.
#[derive(Debug, Parser)]
#[command(name = "latchkey", version, after_help = EXIT_CODES)]
pub struct Arguments {
    /// Read cloud-config below this directory instead; may be given more than once.
    #[arg(long, global = true, value_name = "DIR", default_values = DIRS, value_hint = ValueHint::DirPath)]
    pub cloud_config: Vec<PathBuf>,

    #[command(subcommand)]
    pub verb: Verb,
}

#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Print a new ikto.json with an address drawn at random.
    Init {
        /// The whole mesh.
        #[arg(short, long, value_name = "CIDR", default_value = "fd10::/16")]
        mesh_ip_net: String,

        /// Length of the prefix that the node owns; longer than the mesh's.
        #[arg(short = 'p', long, value_name = "LENGTH", default_value_t = 48)]
        subnet_prefix_length: u8,
    },
    /// Be a member of the mesh. SIGTERM ends the agent and leaves the mesh up, SIGHUP has it read its
    /// configuration again.
    Agent(Agent),
    /// Print this node and the others as Ikto does, from the socket of either agent.
    Info {
        /// The agent's socket. Default: /tmp/ikto.sock, or where there is none that of latchkey.service.
        #[arg(long, value_name = "PATH", value_hint = ValueHint::FilePath)]
        socket: Option<PathBuf>,
    },
    /// Show this node, the registry and the peers. Needs CAP_NET_ADMIN.
    Status(Status),
    /// Leave the mesh: delete this node's own record from the registry. Stop the agent first.
    Leave {
        #[command(flatten)]
        source: Source,

        /// The socket that the agent would have, to see that it is stopped. Default: as the agent's own.
        #[arg(short, long, value_name = "PATH", value_hint = ValueHint::FilePath)]
        socket: Option<PathBuf>,
    },
    /// What an operator does to the registry.
    #[command(subcommand)]
    Registry(RegistryVerb),
    /// The identity handed over by the initramfs, as latchkey.service handles it.
    #[command(subcommand)]
    Handover(HandoverVerb),
}

/// Where the configuration is: without a file, in the cloud-config.
#[derive(Debug, Clone, Default, Args)]
pub struct Source {
    /// Take everything from this ikto.json, in the place of the cloud-config.
    #[arg(short, long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub config: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct Agent {
    #[command(flatten)]
    pub source: Source,

    /// The admin service's socket. Default: /tmp/ikto.sock with --config, else
    /// /run/latchkey/agent/admin.sock.
    #[arg(short, long, value_name = "PATH", value_hint = ValueHint::FilePath)]
    pub socket: Option<PathBuf>,

    /// Serve Prometheus metrics on http://ADDRESS:PORT/metrics.
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub metrics: Option<SocketAddr>,

    /// Take the device away instead, and with it the key of this boot. Stop the service first.
    #[arg(long, conflicts_with = "metrics")]
    pub down: bool,
}

#[derive(Debug, Args)]
pub struct Status {
    #[command(flatten)]
    pub source: Source,

    /// The agent's socket. Default: as the agent's own.
    #[arg(long, value_name = "PATH", value_hint = ValueHint::FilePath)]
    pub socket: Option<PathBuf>,

    /// Show this boot instead: how the disk was opened or why it was not, step by step, and when the mesh
    /// was up. Needs root.
    #[arg(long, conflicts_with_all = ["config", "socket", "watch", "verbose"])]
    pub boot: bool,

    /// As JSON.
    #[arg(long)]
    pub json: bool,

    /// Show all there is of each peer, as wg(8) does.
    #[arg(short, long, conflicts_with = "json")]
    pub verbose: bool,

    /// Show it again whenever it has changed, until interrupted.
    #[arg(short, long)]
    pub watch: bool,
}

#[derive(Debug, Subcommand)]
pub enum RegistryVerb {
    /// Create the bucket with the settings that a mesh needs. One that is there is compared, never changed.
    Create {
        #[command(flatten)]
        source: Source,

        /// Servers that hold a copy: 1, 3 or 5.
        #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=5), action = ArgAction::Set)]
        replicas: u8,
    },
}

#[derive(Debug, Subcommand)]
pub enum HandoverVerb {
    /// Succeed if the agent has a reason to start; otherwise say why not and exit with 1 (for
    /// ExecCondition=).
    Check,
    /// Remove every copy of the private key below /run, once the agent has it (for ExecStartPost=).
    Forget {
        /// Where systemd put the credential.
        #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
        credentials: Option<PathBuf>,
    },
}

/// The definition, for man pages and completions.
#[must_use]
pub fn command() -> clap::Command {
    Arguments::command()
}
