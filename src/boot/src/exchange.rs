//! The challenge exchange with a key server: kcrypt protocol generation 1 (`protocols/kcrypt.md` §5).

use std::io;
use std::time::Instant;

use latchkey_tpm::{Activation, AttestationKey, EndorsementKey, Tpm, TpmError};
use latchkey_wire::credential::split_credential;
use latchkey_wire::pem;
use latchkey_wire::v1::{
    Challenge, ChallengeResponse, GET_PASS, HEADER_LABEL, HEADER_NAME, HEADER_UUID, POST_PASS,
    Payload, Refusal, Release, Token,
};
use tungstenite::Message;

use crate::dial::{Endpoint, Socket};

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
            ": it has no /getPass. Is the path in challenger_server right, and is it a server of generation 1?"
        }
        301 | 302 | 307 | 308 => {
            ": is there a slash too many in challenger_server, or http where it wants https?"
        }
        _ => "",
    }
}

impl ExchangeError {
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
                matches!(error, TpmError::Response { operation: "ActivateCredential", .. })
            }
            _ => true,
        }
    }
}

fn is_hang_up(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), UnexpectedEof | ConnectionReset | ConnectionAborted | BrokenPipe)
}

/// What identifies a partition to the server. An unknown fact is empty and not sent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Partition {
    pub label: String,
    pub name: String,
    pub uuid: String,
}

/// This machine before a key server: its keys, made once and used for every attempt.
#[derive(Debug)]
pub struct Attested<'a> {
    tpm: &'a mut Tpm,
    ek: EndorsementKey,
    ak: AttestationKey,
    /// Made ahead for the next exchange.
    activation: Option<Activation>,
    authorization: String,
}

impl<'a> Attested<'a> {
    /// Makes the attestation key. Needs no network, so it is done while that comes up.
    ///
    /// # Errors
    /// What the TPM answered.
    pub fn new(tpm: &'a mut Tpm, ek: EndorsementKey) -> Result<Self, TpmError> {
        let ak = tpm.attestation_key()?;
        let activation = Some(tpm.prepare_activation(&ek)?);
        // The public key, never the certificate: the name is the same, and no server can stumble
        // over a manufacturer's encoding.
        let ek_pem = pem::encode(pem::PUBLIC_KEY, ek.spki());
        let authorization = Token { ek_pem, ak: ak.parameters().clone() }.authorization_header();
        Ok(Self { tpm, ek, ak, activation, authorization })
    }

    /// The open TPM, for what else is wanted of it.
    pub fn tpm(&mut self) -> &mut Tpm {
        self.tpm
    }

    /// `/getPass`: the passphrase of `partition`, or why there is none.
    ///
    /// # Errors
    /// The outer error when no answer was had, the inner one when the server said no.
    pub fn get_pass(
        &mut self,
        server: &Endpoint,
        partition: &Partition,
        deadline: Instant,
    ) -> Result<Result<Release, Refusal>, ExchangeError> {
        let mut socket = self.authenticate(server, GET_PASS, partition, deadline)?;
        let answer = zeroize::Zeroizing::new(socket.read(&server.authority())?);
        let payload = Payload::from_json(&answer).map_err(|error| protocol(server, error))?;
        Ok(payload.classify())
    }

    /// `/postPass`: leaves a sealed passphrase with the server. Whether it was stored is for
    /// [`Attested::get_pass`] to find out: a server that did says nothing.
    ///
    /// # Errors
    /// [`ExchangeError`], or the server's own text for why it did not store it.
    pub fn post_pass(
        &mut self,
        server: &Endpoint,
        partition: &Partition,
        sealed: &[u8],
        deadline: Instant,
    ) -> Result<(), ExchangeError> {
        let authority = server.authority();
        let mut socket = self.authenticate(server, POST_PASS, partition, deadline)?;
        let payload = Payload::sealed(sealed).to_json();
        socket.send(Message::text(payload.as_str()), &authority)?;
        match socket.read(&authority) {
            Err(ExchangeError::Closed { .. }) => Ok(()),
            Err(ExchangeError::Network { error, .. })
                if error.kind() == io::ErrorKind::TimedOut =>
            {
                Ok(())
            }
            Err(error) => Err(error),
            Ok(message) => match Payload::from_json(&message) {
                Ok(answer) if answer.error.is_empty() => Ok(()),
                Ok(answer) => Err(protocol(server, answer.error)),
                Err(error) => Err(protocol(server, error)),
            },
        }
    }

    fn authenticate(
        &mut self,
        server: &Endpoint,
        path: &str,
        partition: &Partition,
        deadline: Instant,
    ) -> Result<Socket, ExchangeError> {
        let facts = [
            (HEADER_LABEL, &partition.label),
            (HEADER_NAME, &partition.name),
            (HEADER_UUID, &partition.uuid),
        ];
        let headers: Vec<_> = std::iter::once(("authorization", self.authorization.clone()))
            .chain(
                facts
                    .into_iter()
                    .filter(|(_, fact)| !fact.is_empty())
                    .map(|(name, fact)| (name, fact.clone())),
            )
            .collect();
        let authority = server.authority();
        let mut socket = server.open(path, &headers, deadline)?;
        let message = socket.read(&authority)?;
        let challenge = Challenge::from_json(&message).map_err(|error| protocol(server, error))?;
        let parts =
            split_credential(&challenge.credential, &challenge.secret).map_err(|error| {
                refusal_in(server, &message).unwrap_or_else(|| protocol(server, error))
            })?;
        let activation = match self.activation.take() {
            Some(ready) => ready,
            None => self.tpm.prepare_activation(&self.ek)?,
        };
        let secret = self.tpm.activate_credential(
            &self.ek,
            &self.ak,
            activation,
            parts.id_object,
            parts.encrypted_secret,
        )?;
        let response = ChallengeResponse { secret }.to_json();
        socket.send(Message::binary(response.as_bytes().to_vec()), &authority)?;
        Ok(socket)
    }
}

/// A server may say no where a challenge is expected.
fn refusal_in(server: &Endpoint, message: &[u8]) -> Option<ExchangeError> {
    let payload = Payload::from_json(message).ok().filter(|payload| !payload.error.is_empty())?;
    Some(protocol(server, payload.classify().err()?))
}

fn protocol(server: &Endpoint, why: impl std::fmt::Display) -> ExchangeError {
    ExchangeError::Protocol { server: server.authority(), why: why.to_string() }
}
