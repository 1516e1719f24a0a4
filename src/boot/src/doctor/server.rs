//! The key servers: each at each of its addresses, up to the open WebSocket. Nothing is said on it, so nothing is enrolled:
//! a server learns that somebody was there, not who.

use std::fmt::Write;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use latchkey_config::{Challenger, Protocol};
use latchkey_wire::v1::GET_PASS;
use latchkey_wire::v2::TPM_ATTESTATION;

use super::report::Report;
use crate::BootError;
use crate::dial::Endpoint;
use crate::exchange::ExchangeError;

/// For one look-up, or for one address: enough for a connect and a TLS handshake, each of which has its own limit.
const PATIENCE: Duration = Duration::from_secs(10);
/// Server unreachable; and one that does not speak what is asked of it.
const UNREACHABLE: u8 = 21;
const WRONG_PROTOCOL: u8 = 22;

/// What came of one address, or of finding any.
struct Outcome {
    what: String,
    result: Result<String, (u8, String)>,
}

/// A server that cannot be reached is a failure only where no other one can.
pub(super) fn check(report: &mut Report<'_>, settings: &Challenger) -> Result<(), BootError> {
    if settings.servers.is_empty() {
        return Ok(());
    }
    let endpoints = match Endpoint::all(settings) {
        Ok(endpoints) => endpoints,
        Err(error) => return report.error("key server", &error),
    };
    let outcomes: Vec<_> =
        endpoints.iter().flat_map(|endpoint| ask(endpoint, settings.protocol)).collect();
    let any = outcomes.iter().any(|outcome| outcome.result.is_ok());
    for Outcome { what, result } in outcomes {
        match result {
            Ok(found) => report.ok(what, found)?,
            Err((_, found)) if any => report.warn(what, found, "another way in works")?,
            Err((code, found)) => report.fail(code, what, found, "")?,
        }
    }
    for endpoint in endpoints.iter().filter(|endpoint| !endpoint.is_secure()) {
        report.warn(
            format!("key server {}", endpoint.authority()),
            "is asked without TLS, and so releases passphrases in clear to whoever listens",
            "give the server a certificate and write https://",
        )?;
    }
    Ok(())
}

fn ask(endpoint: &Endpoint, protocol: Protocol) -> Vec<Outcome> {
    let name = endpoint.authority();
    match endpoint.addresses(Instant::now() + PATIENCE) {
        Err(error) => {
            let code = BootError::from(error);
            let result = Err((code.exit_code(), code.to_string()));
            vec![Outcome { what: format!("key server {name}"), result }]
        }
        Ok(addresses) => addresses
            .into_iter()
            .map(|address| Outcome {
                what: format!("key server {name} at {}", address.ip()),
                result: knock(endpoint, address, protocol),
            })
            .collect(),
    }
}

/// Which generations a WebSocket is given for.
fn knock(
    endpoint: &Endpoint,
    address: SocketAddr,
    protocol: Protocol,
) -> Result<String, (u8, String)> {
    let second = upgrade(endpoint, address, TPM_ATTESTATION);
    let first = match &second {
        // What stands in the way stands in the way of both.
        Err(ExchangeError::Status { .. }) | Ok(()) => upgrade(endpoint, address, GET_PASS),
        Err(error) => return Err((code(error), error.to_string())),
    };
    let mut spoken = String::new();
    for (number, result) in [(2, &second), (1, &first)] {
        if result.is_ok() {
            let and = if spoken.is_empty() { "answers, and speaks generation" } else { " and" };
            let _ = write!(spoken, "{and} {number}");
        }
    }
    let wanted = match protocol {
        Protocol::Auto if second.is_err() => first,
        Protocol::Auto | Protocol::V2 => second,
        Protocol::V1 => first,
    };
    match wanted {
        Ok(()) => Ok(spoken),
        Err(error) if spoken.is_empty() => Err((code(&error), error.to_string())),
        Err(_) => Err((
            WRONG_PROTOCOL,
            format!(
                "{spoken}, which is not what latchkey.protocol wants; take that key out of the configuration"
            ),
        )),
    }
}

fn upgrade(endpoint: &Endpoint, address: SocketAddr, path: &str) -> Result<(), ExchangeError> {
    endpoint.open(address, path, &[], Instant::now() + PATIENCE, |_| ()).map(drop)
}

fn code(error: &ExchangeError) -> u8 {
    match error {
        ExchangeError::Protocol { .. } | ExchangeError::Status { .. } => WRONG_PROTOCOL,
        _ => UNREACHABLE,
    }
}
