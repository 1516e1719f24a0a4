//! One exchange over one WebSocket: challenge, proof, decision, answer (`protocols/kcrypt.md` §5.3, §5.4).
//!
//! A peer that has not proved itself gets the challenge and nothing else. Answers are the frames Go's server sends.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use latchkey_wire::{
    MAX_MESSAGE,
    attest::check_ak,
    credential::make_credential,
    ek::RsaPublicKey,
    manifest::Secret,
    pubhash::Pubhash,
    v1::{ChallengeResponse, Payload, Token, text},
};
use subtle::ConstantTimeEq;
use thiserror::Error;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    time::timeout,
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        self, Message,
        protocol::{Role, WebSocketConfig},
    },
};
use zeroize::Zeroizing;

use crate::{
    decision::{self, Decision, Outcome, Target},
    matching::Facts,
    store::{CreateError, Store},
};

/// How long a peer may take to read our last message and close, before the connection is cut.
const LINGER: Duration = Duration::from_secs(2);

/// Sizes of the OAEP blocks of RSA-2048, -3072 and -4096.
const OAEP_BLOCKS: [usize; 3] = [256, 384, 512];

/// The two endpoints of generation 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Endpoint {
    GetPass,
    PostPass,
}

impl Endpoint {
    /// The endpoint a path means: its last segment counts, so that a prefix in `challenger_server` works, and a slash at
    /// its end, which doubles the slash here.
    pub(crate) fn of_path(path: &str) -> Option<Self> {
        match path.rsplit('/').next() {
            Some("getPass") => Some(Self::GetPass),
            Some("postPass") => Some(Self::PostPass),
            _ => None,
        }
    }
}

impl std::fmt::Display for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::GetPass => "getPass",
            Self::PostPass => "postPass",
        })
    }
}

/// What the HTTP request said.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) peer: SocketAddr,
    pub(crate) endpoint: Endpoint,
    pub(crate) authorization: Vec<u8>,
    pub(crate) facts: Facts,
}

/// Why an exchange ended before a decision.
#[derive(Debug, Error)]
enum Failure {
    #[error("{0}")]
    Token(#[from] latchkey_wire::Error),
    #[error("no random bytes: {0}")]
    Random(getrandom::Error),
    #[error("the proof is wrong: this peer does not hold the TPM it names")]
    Proof,
    #[error("the peer did not {0} in time")]
    Deadline(&'static str),
    #[error("the peer closed while it was to {0}")]
    Closed(&'static str),
    #[error("connection: {0}")]
    Connection(#[from] tungstenite::Error),
}

/// Runs the exchange to its end and logs what came of it, in one line.
pub(crate) async fn run<S>(stream: S, request: &Request, store: Arc<Store>, patience: Duration)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let config = WebSocketConfig::default()
        .read_buffer_size(4 * 1024)
        .write_buffer_size(0)
        .max_write_buffer_size(2 * MAX_MESSAGE)
        .max_message_size(Some(MAX_MESSAGE))
        .max_frame_size(Some(MAX_MESSAGE));
    let stream = WebSocketStream::from_raw_socket(stream, Role::Server, Some(config)).await;
    let mut peer = Peer { stream, patience };
    match authenticate(&mut peer, &request.authorization).await {
        Err(failure) => {
            log_line(log::Level::Warn, request, None, None, "unauthenticated", &failure.to_string())
        }
        Ok(pubhash) => {
            let snapshot = store.snapshot();
            let concluded = match request.endpoint {
                Endpoint::GetPass => {
                    get(&mut peer, decision::get(&snapshot, &pubhash, &request.facts)).await
                }
                Endpoint::PostPass => {
                    post(&mut peer, &store, decision::post(&snapshot, &pubhash, &request.facts))
                        .await
                }
            };
            log_line(
                concluded.level,
                request,
                Some(&pubhash),
                concluded.target.as_ref(),
                concluded.result,
                &concluded.why,
            );
        }
    }
    peer.close().await;
}

/// A peer's side of the WebSocket, with a deadline on each step.
struct Peer<S> {
    stream: WebSocketStream<S>,
    patience: Duration,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Peer<S> {
    /// The next data message, text or binary.
    async fn receive(&mut self, what: &'static str) -> Result<Zeroizing<Vec<u8>>, Failure> {
        let next = async {
            loop {
                match self.stream.next().await {
                    Some(Ok(Message::Binary(data))) => return Ok(wiped(data)),
                    Some(Ok(Message::Text(data))) => return Ok(wiped(data.into())),
                    Some(Ok(Message::Close(_))) | None => return Err(Failure::Closed(what)),
                    Some(Ok(_)) => {} // ping, pong
                    Some(Err(tungstenite::Error::Protocol(
                        tungstenite::error::ProtocolError::ResetWithoutClosingHandshake,
                    ))) => {
                        return Err(Failure::Closed(what));
                    }
                    Some(Err(error)) => return Err(error.into()),
                }
            }
        };
        timeout(self.patience, next).await.map_err(|_| Failure::Deadline(what))?
    }

    /// Sends a binary message, as Go's server does.
    async fn send(&mut self, message: Zeroizing<Vec<u8>>) -> Result<(), Failure> {
        let message = Message::Binary(Bytes::from_owner(Wiped(message)));
        timeout(self.patience, self.stream.send(message))
            .await
            .map_err(|_| Failure::Deadline("read"))?
            .map_err(Into::into)
    }

    async fn send_payload(&mut self, payload: &Payload) -> Result<(), Failure> {
        self.send(Zeroizing::new(payload.to_json().as_bytes().to_vec())).await
    }

    /// Ends the connection without a closing handshake, as Go's server does, but so that what was sent arrives: closing with
    /// unread bytes would reset the connection and take our last message with it.
    async fn close(mut self) {
        let stream = self.stream.get_mut();
        let drain = async {
            stream.shutdown().await?;
            tokio::io::copy(&mut stream.take(MAX_MESSAGE as u64), &mut tokio::io::sink()).await
        };
        let _ = timeout(LINGER, drain).await; // the peer may be gone: nothing is left to say to it
    }
}

struct Wiped(Zeroizing<Vec<u8>>);

impl AsRef<[u8]> for Wiped {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// A received message in memory that is wiped, and the library's buffer wiped if it is ours alone.
fn wiped(data: Bytes) -> Zeroizing<Vec<u8>> {
    let copy = Zeroizing::new(data.to_vec());
    if let Ok(mut buffer) = data.try_into_mut() {
        buffer.fill(0);
    }
    copy
}

/// Lets the peer prove that the TPM with its EK also holds its AK, which lives in a TPM and nowhere else.
async fn authenticate<S>(peer: &mut Peer<S>, authorization: &[u8]) -> Result<Pubhash, Failure>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let token = Token::parse_authorization(authorization)?;
    let ek = RsaPublicKey::from_pem(&token.ek_pem)?;
    let ak = check_ak(&token.ak)?;
    let (mut secret, mut seed) = (Zeroizing::new([0; 32]), Zeroizing::new([0; 16]));
    getrandom::fill(&mut *secret).map_err(Failure::Random)?;
    getrandom::fill(&mut *seed).map_err(Failure::Random)?;
    let challenge = make_credential(&ek, &ak.name, &secret, &seed)?;
    peer.send(Zeroizing::new(challenge.to_json().into_bytes())).await?;
    let response = ChallengeResponse::from_json(&peer.receive("answer the challenge").await?)?;
    if bool::from(response.secret.ct_eq(&*secret)) { Ok(ek.pubhash()) } else { Err(Failure::Proof) }
}

/// How a request ended, for the log.
struct Concluded {
    level: log::Level,
    target: Option<Target>,
    result: &'static str,
    why: String,
}

impl Concluded {
    fn new(
        level: log::Level,
        target: Option<Target>,
        result: &'static str,
        why: impl Into<String>,
    ) -> Self {
        Self { level, target, result, why: why.into() }
    }
}

const GRANTED: &str = "granted";
const REFUSED: &str = "refused";
const FAILED: &str = "failed";

async fn get<S: AsyncRead + AsyncWrite + Unpin>(
    peer: &mut Peer<S>,
    decision: Decision,
) -> Concluded {
    let target = decision.target;
    match decision.outcome {
        Outcome::Released(payload) => match peer.send_payload(&payload).await {
            Ok(()) => {
                let kind = if payload.generated_by.is_empty() {
                    "operator's passphrase"
                } else {
                    "machine's sealed passphrase"
                };
                Concluded::new(log::Level::Info, target, GRANTED, kind)
            }
            Err(failure) => Concluded::new(log::Level::Warn, target, FAILED, failure.to_string()),
        },
        other => decline(peer, target, other).await,
    }
}

async fn post<S>(peer: &mut Peer<S>, store: &Arc<Store>, decision: Decision) -> Concluded
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (target, outcome) = (decision.target, decision.outcome);
    let (Some(target), Outcome::MayEnrol) = (&target, &outcome) else {
        return decline(peer, target, outcome).await;
    };
    let target = target.clone();
    let payload = match receive_payload(peer).await {
        Ok(payload) => payload,
        Err(failure) => {
            return Concluded::new(log::Level::Warn, Some(target), FAILED, failure.to_string());
        }
    };
    if let Some(answer) = unacceptable(&payload) {
        let why = answer.clone();
        return decline(peer, Some(target), Outcome::Refused { answer, why }).await;
    }
    let secret = Secret::generated_by_tpm(
        &target.secret,
        &target.namespace,
        &target.key,
        &payload.passphrase,
    );
    let writer = store.clone();
    let created = tokio::task::spawn_blocking(move || writer.create(&secret)).await;
    match created {
        Ok(Ok(())) => {
            Concluded::new(log::Level::Info, Some(target), GRANTED, "first passphrase stored")
        }
        // As upstream: nothing is changed, nothing is said. The machine asks again and gets the one that is there.
        Ok(Err(error @ CreateError::Exists)) => {
            Concluded::new(log::Level::Warn, Some(target), REFUSED, error.to_string())
        }
        Ok(Err(error @ CreateError::Name(_))) => {
            let (answer, why) = (error.to_string(), error.to_string());
            decline(peer, Some(target), Outcome::Refused { answer, why }).await
        }
        Ok(Err(error)) => {
            Concluded::new(log::Level::Error, Some(target), FAILED, error.to_string())
        }
        Err(error) => Concluded::new(log::Level::Error, Some(target), FAILED, error.to_string()),
    }
}

async fn receive_payload<S: AsyncRead + AsyncWrite + Unpin>(
    peer: &mut Peer<S>,
) -> Result<Payload, Failure> {
    Ok(Payload::from_json(&peer.receive("send its passphrase").await?)?)
}

/// Why a posted passphrase is not stored, in upstream's words where it has some.
fn unacceptable(payload: &Payload) -> Option<String> {
    if !payload.error.is_empty() {
        let shown: String = payload.error.chars().take(300).collect();
        return Some(text::client_error(&shown));
    }
    if payload.passphrase.is_empty() {
        return Some(text::NO_PASSPHRASE.to_owned());
    }
    let sealed = payload.sealed_block().is_ok_and(|block| OAEP_BLOCKS.contains(&block.len()));
    (!sealed).then(|| "invalid answer from client: its passphrase is not encrypted by a TPM key (RSA-OAEP, unpadded URL base64)".to_owned())
}

/// Tells the peer what it may be told.
async fn decline<S>(peer: &mut Peer<S>, target: Option<Target>, outcome: Outcome) -> Concluded
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    match outcome {
        Outcome::Refused { answer, why } => {
            let sent = peer.send_payload(&Payload::refusal(answer)).await;
            let why = match sent {
                Ok(()) => why,
                Err(failure) => format!("{why}; the answer did not arrive: {failure}"),
            };
            Concluded::new(log::Level::Warn, target, REFUSED, why)
        }
        Outcome::Failed { why } => Concluded::new(log::Level::Error, target, FAILED, why),
        Outcome::Released(_) | Outcome::MayEnrol => Concluded::new(
            log::Level::Error,
            target,
            FAILED,
            "this endpoint has no answer for this decision",
        ),
    }
}

/// One line per request. Whatever a peer or an operator wrote is quoted: it cannot begin a line of its own.
fn log_line(
    level: log::Level,
    request: &Request,
    pubhash: Option<&Pubhash>,
    target: Option<&Target>,
    result: &str,
    why: &str,
) {
    let absent = "-".to_owned();
    let fact = |fact: &Option<String>| {
        fact.as_ref().map_or_else(|| absent.clone(), |fact| format!("{fact:?}"))
    };
    let pubhash = pubhash.map_or("-", Pubhash::as_str);
    let volume = target.map_or_else(
        || absent.clone(),
        |target| format!("{:?}", format!("{}/{}", target.namespace, target.volume)),
    );
    let partition = target.map_or_else(|| absent.clone(), |target| format!("{:?}", target.label));
    log::log!(
        level,
        "request endpoint={} peer={} result={result} why={why:?} pubhash={pubhash} volume={volume} partition={partition} label={} uuid={} name={}",
        request.endpoint,
        request.peer,
        fact(&request.facts.label),
        fact(&request.facts.uuid),
        fact(&request.facts.name),
    );
}
