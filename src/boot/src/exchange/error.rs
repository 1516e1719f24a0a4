//! What can fail on the way to a key server's answer, told apart by how far it got.

use std::io;

use latchkey_tpm::TpmError;

/// What failed between us and the key server.
#[derive(Debug, thiserror::Error)]
pub enum ExchangeError {
    #[error("`challenger_server: {url}` cannot be used: {why}")]
    Url { url: String, why: String },

    #[error("`certificate` cannot be used: {why}")]
    Certificate { why: String },

    #[error("{stage} {server}: {error}{}", .stage.advice())]
    Network { stage: Stage, server: String, error: io::Error },

    #[error("{server} answered with HTTP {status} instead of a WebSocket{}", status_advice(*.status))]
    Status { server: String, status: u16 },

    #[error(
        "{server} closed the connection without an answer: it does not accept this TPM's attestation, or has trouble of its own; its log says which"
    )]
    Closed { server: String },

    #[error("{server} sent something that is not kcrypt's protocol: {why}")]
    Protocol { server: String, why: String },

    #[error(transparent)]
    Tpm(#[from] TpmError),
}

/// How far the connection got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    Route,
    Resolve,
    Connect,
    Tls,
    Upgrade,
    Answer,
}

impl std::fmt::Display for Stage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Route => "waiting for a route to",
            Self::Resolve => "resolving",
            Self::Connect => "connecting to",
            Self::Tls => "TLS with",
            Self::Upgrade => "WebSocket upgrade at",
            Self::Answer => "waiting for an answer of",
        })
    }
}

impl Stage {
    fn advice(self) -> &'static str {
        match self {
            Self::Route => ". Is rd.neednet=1 on the kernel's command line, and the cable in?",
            Self::Resolve => {
                ". Did DHCP give a name server? An address in challenger_server needs none"
            }
            Self::Connect => ". Is the key server running and the port open?",
            Self::Tls => {
                ". Check `certificate`, the name in the server's certificate, and this machine's clock"
            }
            Self::Upgrade | Self::Answer => "",
        }
    }
}

fn status_advice(status: u16) -> &'static str {
    match status {
        404 => {
            ": there is no kcrypt server under this URL, or none of the generation that latchkey.protocol wants. Is the path in challenger_server right?"
        }
        301 | 302 | 307 | 308 => {
            ": is there a slash too many in challenger_server, or http where it wants https?"
        }
        _ => "",
    }
}

impl ExchangeError {
    pub(crate) fn protocol(server: &str, why: impl std::fmt::Display) -> Self {
        Self::Protocol { server: server.to_owned(), why: why.to_string() }
    }

    pub(crate) fn of_websocket(stage: Stage, server: &str, error: tungstenite::Error) -> Self {
        let server = server.to_owned();
        match error {
            tungstenite::Error::Io(error) if is_hang_up(&error) && stage == Stage::Answer => {
                Self::Closed { server }
            }
            tungstenite::Error::Io(error) => Self::Network { stage, server, error },
            tungstenite::Error::ConnectionClosed
            | tungstenite::Error::AlreadyClosed
            | tungstenite::Error::Protocol(
                tungstenite::error::ProtocolError::ResetWithoutClosingHandshake,
            ) => Self::Closed { server },
            tungstenite::Error::Protocol(
                tungstenite::error::ProtocolError::HandshakeIncomplete,
            ) => Self::Network { stage, server, error: io::ErrorKind::UnexpectedEof.into() },
            tungstenite::Error::Http(response) => {
                Self::Status { server, status: response.status().as_u16() }
            }
            other => Self::Protocol { server, why: other.to_string() },
        }
    }

    /// Nothing came of a connection.
    pub(crate) fn silent(server: &str) -> Self {
        let error = io::ErrorKind::TimedOut.into();
        Self::Network { stage: Stage::Answer, server: server.to_owned(), error }
    }

    /// How far it got, to tell which of two errors says more.
    pub(crate) fn progress(&self) -> u8 {
        match self {
            Self::Network { stage: Stage::Route | Stage::Resolve, .. } => 0,
            Self::Network { stage: Stage::Connect, .. } => 1,
            Self::Network { stage: Stage::Tls, .. } => 2,
            Self::Network { stage: Stage::Upgrade, .. } => 3,
            Self::Network { stage: Stage::Answer, .. } | Self::Status { .. } => 4,
            _ => 5,
        }
    }

    /// Whether the network, not the server, is what is missing.
    pub(crate) fn is_before_the_server(&self) -> bool {
        matches!(self, Self::Network { stage: Stage::Route | Stage::Resolve, .. })
    }

    pub(crate) fn is_transient(&self) -> bool {
        match self {
            Self::Url { .. } | Self::Certificate { .. } => false,
            // What another key server or the next moment may answer differently. A TPM that
            // refuses will refuse again; one that has been asked with a wrong credential will not.
            Self::Tpm(error) => {
                matches!(
                    error,
                    TpmError::Response { operation: "ActivateCredential", .. }
                        | TpmError::PcrsUnsteady { .. }
                )
            }
            _ => true,
        }
    }
}

fn is_hang_up(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), UnexpectedEof | ConnectionReset | ConnectionAborted | BrokenPipe)
}
