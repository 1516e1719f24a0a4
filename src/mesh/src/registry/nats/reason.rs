//! What a failed connection means, in words for a person.

use std::error::Error as StdError;
use std::io;
use std::time::Duration;

use async_nats::{ConnectError, ConnectErrorKind, ServerError};
use rustls::{AlertDescription, CertificateError};

use crate::settings::{RegistrySettings, Server};

use super::login;

/// Why `server` could not be connected to.
pub(super) fn of(error: &ConnectError, server: &Server, settings: &RegistrySettings) -> String {
    if let Some(tls) = find::<rustls::Error>(error) {
        return of_tls(tls, server, settings);
    }
    if let Some(refused) = find::<ServerError>(error) {
        return of_server(refused, server, settings);
    }
    match error.kind() {
        ConnectErrorKind::Dns => {
            let source = error.source().map(ToString::to_string).unwrap_or_default();
            format!("the address of {} cannot be found: {source}", server.host)
        }
        ConnectErrorKind::TimedOut => format!("{server} does not answer"),
        ConnectErrorKind::AuthorizationViolation => {
            of_server(&ServerError::AuthorizationViolation, server, settings)
        }
        _ => of_io(error, server),
    }
}

/// Whether the server was not met at all, so that nothing is known of it.
pub(super) fn unmet(error: &ConnectError) -> bool {
    let unreachable = |io: &io::Error| {
        matches!(
            io.kind(),
            io::ErrorKind::ConnectionRefused
                | io::ErrorKind::NetworkUnreachable
                | io::ErrorKind::HostUnreachable
        )
    };
    error.kind() == ConnectErrorKind::Dns || find::<io::Error>(error).is_some_and(unreachable)
}

fn of_io(error: &ConnectError, server: &Server) -> String {
    let Some(io) = find::<io::Error>(error) else {
        let text = error.source().map_or_else(|| error.to_string(), ToString::to_string);
        return if text.contains("expected INFO, got nothing") || text == "broken pipe" {
            format!("{server} closes the connection at once")
        } else if text.contains("expected INFO") {
            format!("{server} is no NATS server: it does not say INFO first")
        } else {
            format!("{server}: {text}")
        };
    };
    match io.kind() {
        io::ErrorKind::ConnectionRefused => {
            format!("{server} refuses the connection; is nats-server running there?")
        }
        io::ErrorKind::NetworkUnreachable | io::ErrorKind::HostUnreachable => {
            format!("there is no route to {server}")
        }
        io::ErrorKind::ConnectionReset
        | io::ErrorKind::BrokenPipe
        | io::ErrorKind::UnexpectedEof => format!("{server} closes the connection at once"),
        io::ErrorKind::InvalidInput => {
            format!("{server} is no NATS server: it says what none would say")
        }
        _ => format!("{server}: {io}"),
    }
}

fn of_tls(error: &rustls::Error, server: &Server, settings: &RegistrySettings) -> String {
    use AlertDescription as Alert;
    use CertificateError as Certificate;
    let authority = if settings.tls.ca.is_some() {
        "the configured CA (registry_ca)"
    } else {
        "an authority that this system trusts; a private one goes into registry_ca"
    };
    match error {
        rustls::Error::InvalidCertificate(wrong) => match wrong {
            Certificate::UnknownIssuer | Certificate::BadSignature => {
                format!("the certificate of {server} is not by {authority}")
            }
            Certificate::Expired | Certificate::ExpiredContext { .. } => {
                format!(
                    "the certificate of {server} has expired ({wrong}); is this machine's clock right?"
                )
            }
            Certificate::NotValidYet | Certificate::NotValidYetContext { .. } => {
                format!(
                    "the certificate of {server} is not valid yet ({wrong}); is this machine's clock right?"
                )
            }
            Certificate::NotValidForName | Certificate::NotValidForNameContext { .. } => {
                format!("the certificate of {server} is not for that name: {wrong}")
            }
            _ => format!("the certificate of {server} does not count: {wrong}"),
        },
        rustls::Error::AlertReceived(
            Alert::CertificateRequired
            | Alert::BadCertificate
            | Alert::HandshakeFailure
            | Alert::UnknownCA
            | Alert::CertificateExpired
            | Alert::CertificateUnknown
            | Alert::UnsupportedCertificate
            | Alert::AccessDenied,
        ) if settings.tls.certificate.is_none() => {
            format!(
                "{server} wants a client certificate (registry_certificate, registry_key): {error}"
            )
        }
        rustls::Error::AlertReceived(_) if settings.tls.certificate.is_some() => {
            format!("{server} does not take this node's client certificate: {error}")
        }
        rustls::Error::InvalidMessage(_) => {
            format!("{server} does not speak TLS, and TLS is configured: {error}")
        }
        _ => format!("no TLS with {server}: {error}"),
    }
}

/// What a server said before it closed the connection.
fn of_server(refused: &ServerError, server: &Server, settings: &RegistrySettings) -> String {
    let text = said(refused);
    let lower = text.to_lowercase();
    if !lower.contains("authorization") && !lower.contains("authentication") {
        return format!("{server} refuses this node: {text}");
    }
    let credentials = login::credentials_name(&settings.login);
    match login::expired(settings) {
        Some(ago) => {
            let ago = span(ago);
            format!("{server} refuses the {credentials}, which expired {ago} ago: {text}")
        }
        None => format!("{server} refuses the {credentials}: {text}"),
    }
}

fn span(time: Duration) -> String {
    match time.as_secs() {
        seconds @ ..120 => format!("{seconds} s"),
        seconds @ ..7_200 => format!("{} min", seconds / 60),
        seconds @ ..172_800 => format!("{} h", seconds / 3_600),
        seconds => format!("{} days", seconds / 86_400),
    }
}

/// The server's own words.
pub(super) fn said(error: &ServerError) -> String {
    match error {
        ServerError::AuthorizationViolation => "Authorization Violation".into(),
        ServerError::SlowConsumer(_) => "Slow Consumer".into(),
        ServerError::Other(text) => bounded(text),
    }
}

/// As much of a foreign text as goes into a line.
pub(super) fn bounded(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(300).collect()
}

/// The first error of this type among an error, what it wraps, and its sources.
fn find<'a, T: StdError + 'static>(error: &'a (dyn StdError + 'static)) -> Option<&'a T> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref::<T>() {
            return Some(found);
        }
        let inner = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        if let Some(found) = inner.and_then(|inner| inner.downcast_ref::<T>()) {
            return Some(found);
        }
        next = error.source();
    }
    None
}
