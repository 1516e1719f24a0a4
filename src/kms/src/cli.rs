//! The command line.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand};

use crate::{audit::chain::Head, limits::Rate};

/// The key server: releases disk passphrases to machines that prove themselves with their TPM.
#[derive(Debug, Parser)]
#[command(version, about, after_help = EXIT_CODES)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

const EXIT_CODES: &str = "\
Exit codes:
  0  done; a server: stopped by SIGTERM or SIGINT
  1  internal error
  2  wrong command line
  3  the store cannot be read
  4  the address cannot be listened on
  5  TLS certificate or key is missing or wrong
  6  the audit log cannot be written or continued
  7  audit verify: the chain is broken, or cannot be read
  8  volume: there is no such volume, or the name is not clear
  9  volume: the change was not made";

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Answers machines until it is told to stop.
    Serve(Box<Serve>),
    /// Looks at the audit log.
    #[command(subcommand)]
    Audit(Audit),
    /// Shows and changes the SealedVolumes of a store. A running server sees changes within a second.
    #[command(subcommand)]
    Volume(Volume),
}

#[derive(Debug, Subcommand)]
pub(crate) enum Volume {
    /// Lists the volumes, one per line.
    #[command(after_help = EXIT_CODES)]
    List {
        #[command(flatten)]
        place: Place,
        /// As JSON, for programs.
        #[arg(long)]
        json: bool,
    },
    /// Shows all that is known of a volume, but no passphrase.
    #[command(after_help = EXIT_CODES)]
    Show {
        #[command(flatten)]
        which: Which,
        /// As JSON, for programs.
        #[arg(long)]
        json: bool,
    },
    /// Releases nothing to the machine any more.
    #[command(after_help = EXIT_CODES)]
    Quarantine {
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        audit: AuditFile,
    },
    /// Ends a quarantine.
    #[command(after_help = EXIT_CODES)]
    Release {
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        audit: AuditFile,
    },
    /// Removes the volume from its file. Its Secrets stay unless --with-secrets says otherwise.
    #[command(after_help = EXIT_CODES)]
    Forget {
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        audit: AuditFile,
        /// Removes its Secrets as well: without them the machine's disk opens with its recovery passphrase only, or never.
        #[arg(long)]
        with_secrets: bool,
        /// Does not ask.
        #[arg(long)]
        yes: bool,
    },
    /// Lets the machine's next boot say which PCR values are right, as after a change of its firmware.
    #[command(after_help = EXIT_CODES)]
    ResetPcrs {
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        audit: AuditFile,
        /// Only this PCR; may be given several times.
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(0..24))]
        pcr: Vec<u32>,
    },
}

/// Where volumes are.
#[derive(Debug, Args)]
pub(crate) struct Place {
    /// Directory of YAML manifests, as for `serve`.
    #[arg(long, value_name = "DIR")]
    pub(crate) store: PathBuf,

    /// Only this namespace.
    #[arg(long, value_name = "NAMESPACE")]
    pub(crate) namespace: Option<String>,
}

/// Which volume.
#[derive(Debug, Args)]
pub(crate) struct Which {
    #[command(flatten)]
    pub(crate) place: Place,

    /// Name of the volume, or the machine's TPM hash (its first 8 digits or more): then all its volumes.
    #[arg(value_name = "NAME|HASH")]
    pub(crate) name: String,
}

/// Where changes are written down.
#[derive(Debug, Args)]
pub(crate) struct AuditFile {
    /// Audit log that the change is added to: the file of `serve --audit`.
    #[arg(long, value_name = "FILE")]
    pub(crate) audit: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Audit {
    /// Checks that an audit log is whole, and prints how many lines it has, the first and the last, or where it breaks.
    #[command(after_help = EXIT_CODES)]
    Verify {
        /// The file that `serve --audit` writes.
        file: PathBuf,

        /// A line that must be there: its number and hash, as the server logs them when it starts and stops, or as this command
        /// printed them before. Without it nobody can know whether lines were cut off at the end.
        #[arg(long, value_name = "SEQ:HASH", value_parser = head)]
        contains: Option<Head>,
    },
}

fn head(text: &str) -> Result<Head, String> {
    text.split_once(':')
        .and_then(|(seq, hash)| {
            Some(Head { seq: seq.parse().ok()?, hash: hash.to_ascii_lowercase() })
        })
        .filter(|head| {
            head.hash.len() == 64 && head.hash.bytes().all(|byte| byte.is_ascii_hexdigit())
        })
        .ok_or_else(|| "a number, a colon, and 64 hexadecimal digits are wanted".to_owned())
}

#[derive(Debug, Args)]
#[command(after_help = EXIT_CODES)]
pub(crate) struct Serve {
    /// Directory of YAML manifests (SealedVolume, Secret); new Secrets are written into it.
    #[arg(long, value_name = "DIR")]
    pub(crate) store: PathBuf,

    /// Address and port to listen on; port 0 takes a free one and says which.
    #[arg(long, value_name = "ADDR:PORT", default_value = "[::]:8082")]
    pub(crate) listen: SocketAddr,

    /// PEM file with the server's certificate, followed by the intermediate ones.
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    pub(crate) tls_cert: Option<PathBuf>,

    /// PEM file with the private key of the certificate.
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub(crate) tls_key: Option<PathBuf>,

    /// Address and port for /metrics (Prometheus), /healthz and /readyz. Without it there are no metrics; the other two are
    /// also on the main port.
    #[arg(long, value_name = "ADDR:PORT")]
    pub(crate) metrics_listen: Option<SocketAddr>,

    /// Answers mDNS by itself, as NAME.local and as a `_kcrypt._tcp` service, on every interface: machines with `mdns: true`
    /// then find the server by `challenger_server: http://NAME.local` (https with TLS).
    #[arg(long, value_name = "NAME.local")]
    pub(crate) mdns: Option<String>,

    /// File for the audit log: a chain of JSON lines, one for each request and each change by an operator. Lines are synced
    /// to the disk some milliseconds after they happened.
    #[arg(long, value_name = "FILE")]
    pub(crate) audit: Option<PathBuf>,

    /// Most connections at once. For one more, the oldest is closed that has proved nothing yet, of the address that has
    /// the most of these.
    #[arg(long, value_name = "N", default_value_t = 12_288, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub(crate) max_connections: u32,

    /// Most connections at once of one address (IPv4 address, IPv6 /64); behind a NAT all machines have one.
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub(crate) max_connections_per_address: u32,

    /// Requests per minute that one address may make; 0 is no limit. Beyond it: 429 with Retry-After.
    #[arg(long, value_name = "N", default_value_t = 12_000)]
    pub(crate) address_rate: u32,

    /// Requests that one address may make at once, after a rest. A machine makes up to six to install or boot, so the default
    /// lets 3,000 machines behind one NAT boot at once.
    #[arg(long, value_name = "N", default_value_t = 20_000, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) address_burst: u32,

    /// Requests per minute that one machine (TPM hash) may make; 0 is no limit. Beyond it: 429 with Retry-After.
    #[arg(long, value_name = "N", default_value_t = 60)]
    pub(crate) machine_rate: u32,

    /// Requests that one machine may make at once, after a rest.
    #[arg(long, value_name = "N", default_value_t = 120, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) machine_burst: u32,

    /// Namespace of the volumes and Secrets that are made for machines nobody has written a volume for.
    #[arg(long, value_name = "NAME", default_value = "default")]
    pub(crate) namespace: String,

    /// PCRs that a machine's quote may have, of 0 to 15. Volumes are held to those of their first quote; which ones these are
    /// is the client's choice.
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_values_t = [0, 7, 11], value_parser = clap::value_parser!(u32).range(0..=15))]
    pub(crate) pcrs: Vec<u32>,

    /// Take quotes without a nonce, as clients before generation 2 bound them to the exchange. Such a quote may be an old one,
    /// of before the machine was tampered with.
    #[arg(long)]
    pub(crate) allow_empty_quote_nonce: bool,

    /// Seconds a peer has for its TLS handshake, and again for its HTTP request.
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = seconds)]
    pub(crate) handshake_timeout: Duration,

    /// Seconds a machine has for each message: its TPM may need most of a minute.
    #[arg(long, value_name = "SECONDS", default_value = "120", value_parser = seconds)]
    pub(crate) message_timeout: Duration,

    /// Seconds that running exchanges have to finish when the server is told to stop.
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = seconds)]
    pub(crate) stop_timeout: Duration,
}

impl Serve {
    pub(crate) fn address_limit(&self) -> Rate {
        Rate { per_minute: self.address_rate, burst: self.address_burst }
    }

    pub(crate) fn machine_limit(&self) -> Rate {
        Rate { per_minute: self.machine_rate, burst: self.machine_burst }
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    match text.parse() {
        Ok(seconds @ 1..=3600) => Ok(Duration::from_secs(seconds)),
        _ => Err("a whole number of seconds from 1 to 3600 is wanted".to_owned()),
    }
}
