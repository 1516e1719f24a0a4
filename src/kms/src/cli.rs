//! The command line.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand};

use crate::limits::Rate;

/// The key server: releases disk passphrases to machines that prove themselves with their TPM.
#[derive(Debug, Parser)]
#[command(version, about, after_help = EXIT_CODES)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

const EXIT_CODES: &str = "\
Exit codes:
  0  stopped by SIGTERM or SIGINT
  1  internal error
  2  wrong command line
  3  the store cannot be read
  4  the address cannot be listened on
  5  TLS certificate or key is missing or wrong";

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Answers machines until it is told to stop.
    Serve(Serve),
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
