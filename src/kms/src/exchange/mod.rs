//! One exchange over one WebSocket: challenge, proof, decision, answer (`protocols/kcrypt.md` §5.3, §5.4; §6 in [`v2`]).
//!
//! A peer that has not proved itself gets the challenge and nothing else. Answers are the frames Go's server sends.

mod v2;

use std::{collections::BTreeSet, net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use latchkey_wire::{
    MAX_MESSAGE,
    attest::{AttestationParameters, check_ak},
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
    decision::{
        Target,
        v1::{self, Decision, Outcome},
    },
    limits::TooMany,
    matching::Facts,
    report::{self, Ended, Ending, Report},
    store::{CreateError, Store},
    visit::Visit,
};

/// How long a peer may take to read our last message and close, before the connection is cut.
const LINGER: Duration = Duration::from_secs(2);

/// Sizes of the OAEP blocks of RSA-2048, -3072 and -4096.
const OAEP_BLOCKS: [usize; 3] = [256, 384, 512];

/// The endpoints: two of generation 1, one of generation 2.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Endpoint {
    GetPass,
    PostPass,
    Attestation,
}

impl Endpoint {
    /// The endpoint a path means: its last segment counts, so that a prefix in `challenger_server` works, and a slash at
    /// its end, which doubles the slash here.
    pub(crate) fn of_path(path: &str) -> Option<Self> {
        match path.rsplit('/').next() {
            Some("getPass") => Some(Self::GetPass),
            Some("postPass") => Some(Self::PostPass),
            Some("tpm-attestation") => Some(Self::Attestation),
            _ => None,
        }
    }
}

impl Endpoint {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::GetPass => "getPass",
            Self::PostPass => "postPass",
            Self::Attestation => "tpm-attestation",
        }
    }
}

impl std::fmt::Display for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// How exchanges are held.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    /// How long a peer has for each message.
    pub(crate) message_timeout: Duration,
    /// Generation 2: the PCRs a quote may have.
    pub(crate) pcrs: BTreeSet<u32>,
    /// Generation 2: take quotes without a nonce, which may be old ones.
    pub(crate) allow_empty_nonce: bool,
    /// Generation 2: of the objects that are made for machines nobody has written a volume for.
    pub(crate) namespace: String,
}

/// What the HTTP request said.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) peer: SocketAddr,
    pub(crate) endpoint: Endpoint,
    /// Of generation 1; generation 2 says it in its first message.
    pub(crate) claim: Option<latchkey_wire::Result<Claim>>,
    pub(crate) facts: Facts,
}

/// Who a peer says it is, read and not yet checked.
#[derive(Debug)]
pub(crate) struct Claim {
    ek: RsaPublicKey,
    ak: AttestationParameters,
}

impl Claim {
    /// Reads the value of an `Authorization` header.
    pub(crate) fn read(authorization: &[u8]) -> latchkey_wire::Result<Self> {
        let token = Token::parse_authorization(authorization)?;
        Ok(Self { ek: RsaPublicKey::from_pem(&token.ek_pem)?, ak: token.ak })
    }

    pub(crate) fn pubhash(&self) -> Pubhash {
        self.ek.pubhash()
    }
}

/// Why an exchange ended before a decision.
#[derive(Debug, Error)]
enum Failure {
    #[error("{0}")]
    Message(#[from] latchkey_wire::Error),
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
    #[error("{0}")]
    TooMany(#[from] TooMany),
}

impl Failure {
    fn reason(&self) -> &'static str {
        match self {
            Self::Message(_) => "malformed",
            Self::Random(_) => "internal",
            Self::Proof => "proof",
            Self::Deadline(_) => "timeout",
            Self::Closed(_) => "closed",
            Self::Connection(_) => "connection",
            Self::TooMany(_) => "rate",
        }
    }

    /// The end of an exchange that this befell before anything was proved.
    fn before_proof(&self) -> Concluded {
        (None, Ending::new(Ended::Unauthenticated, self.reason(), self.to_string()))
    }

    /// The end of an exchange that this befell after the proof.
    fn ending(&self) -> Ending {
        Ending::new(Ended::Interrupted, self.reason(), self.to_string())
    }
}

/// Runs the exchange to its end, and says what came of it. The peer is to be closed then.
pub(crate) async fn run<S>(
    stream: S,
    request: Request,
    visit: &Visit,
    store: &Arc<Store>,
    settings: &Settings,
) -> (Report, Peer<S>)
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
    let mut peer = Peer { stream, patience: settings.message_timeout };
    let Request { peer: address, endpoint, claim, facts } = request;
    let (pubhash, (target, ending)) = match claim {
        Some(claim) => prove_and_ask(&mut peer, endpoint, claim, &facts, visit, store).await,
        None => v2::attest(&mut peer, &facts, visit, store, settings).await,
    };
    (Report { endpoint, peer: address, facts, pubhash, target, ending }, peer)
}

/// The exchange of generation 1.
async fn prove_and_ask<S>(
    peer: &mut Peer<S>,
    endpoint: Endpoint,
    claim: latchkey_wire::Result<Claim>,
    facts: &Facts,
    visit: &Visit,
    store: &Arc<Store>,
) -> (Option<Pubhash>, Concluded)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let pubhash = match authenticate(peer, claim, visit).await {
        Ok(pubhash) => pubhash,
        Err(failure) => return (None, failure.before_proof()),
    };
    let turn = store.turn_of(&pubhash).await;
    let decision = store.read(|snapshot| match endpoint {
        Endpoint::PostPass => v1::post(snapshot, &pubhash, facts),
        Endpoint::GetPass | Endpoint::Attestation => v1::get(snapshot, &pubhash, facts),
    });
    drop(turn);
    let concluded = match endpoint {
        Endpoint::PostPass => post(peer, store, decision).await,
        Endpoint::GetPass | Endpoint::Attestation => get(peer, decision).await,
    };
    (Some(pubhash), concluded)
}

/// A peer's side of the WebSocket, with a deadline on each step.
pub(crate) struct Peer<S> {
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

    /// Sends a binary message, as Go's server of generation 1 does.
    async fn send(&mut self, message: Zeroizing<Vec<u8>>) -> Result<(), Failure> {
        self.send_message(Message::Binary(Bytes::from_owner(Wiped(message)))).await
    }

    async fn send_message(&mut self, message: Message) -> Result<(), Failure> {
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
    pub(crate) async fn close(mut self) {
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
async fn authenticate<S>(
    peer: &mut Peer<S>,
    claim: latchkey_wire::Result<Claim>,
    visit: &Visit,
) -> Result<Pubhash, Failure>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let claim = claim?;
    let ak = check_ak(&claim.ak)?;
    let (mut secret, mut seed) = (Zeroizing::new([0; 32]), Zeroizing::new([0; 16]));
    getrandom::fill(&mut *secret).map_err(Failure::Random)?;
    getrandom::fill(&mut *seed).map_err(Failure::Random)?;
    let challenge = make_credential(&claim.ek, &ak.name, &secret, &seed)?;
    peer.send(Zeroizing::new(challenge.to_json().into_bytes())).await?;
    let response = ChallengeResponse::from_json(&peer.receive("answer the challenge").await?)?;
    if !bool::from(response.secret.ct_eq(&*secret)) {
        return Err(Failure::Proof);
    }
    let pubhash = claim.pubhash();
    visit.proved(&pubhash)?;
    Ok(pubhash)
}

/// What a request was about, and how it ended.
type Concluded = (Option<Target>, Ending);

async fn get<S: AsyncRead + AsyncWrite + Unpin>(
    peer: &mut Peer<S>,
    decision: Decision,
) -> Concluded {
    let target = decision.target;
    match decision.outcome {
        Outcome::Released(payload) => match peer.send_payload(&payload).await {
            Ok(()) => {
                let (reason, kind) = if payload.generated_by.is_empty() {
                    ("released", "operator's passphrase")
                } else {
                    ("released-sealed", "machine's sealed passphrase")
                };
                (target, Ending::new(Ended::Granted, reason, kind))
            }
            Err(failure) => (target, failure.ending()),
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
        Err(failure) => return (Some(target), failure.ending()),
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
    let _turn = store.turn().await;
    let created = tokio::task::spawn_blocking(move || writer.create(&secret)).await;
    let ending = match created {
        Ok(Ok(())) => Ending::new(Ended::Granted, "stored", "first passphrase stored"),
        // As upstream: nothing is changed, nothing is said. The machine asks again and gets the one that is there.
        Ok(Err(error @ CreateError::Exists(_))) => {
            Ending::new(Ended::Refused, "exists", error.to_string())
        }
        Ok(Err(error @ CreateError::Name(_))) => {
            let (answer, why) = (error.to_string(), error.to_string());
            return decline(peer, Some(target), Outcome::Refused { answer, why }).await;
        }
        Ok(Err(error)) => Ending::new(Ended::Failed, "store", error.to_string()),
        Err(error) => Ending::new(Ended::Failed, "internal", error.to_string()),
    };
    (Some(target), ending)
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
    let ending = match outcome {
        Outcome::Refused { answer, why } => {
            let reason = report::class(&answer);
            let sent = peer.send_payload(&Payload::refusal(answer)).await;
            let why = match sent {
                Ok(()) => why,
                Err(failure) => format!("{why}; the answer did not arrive: {failure}"),
            };
            Ending::new(Ended::Refused, reason, why)
        }
        Outcome::Failed { why } => Ending::new(Ended::Failed, "store", why),
        Outcome::Released(_) | Outcome::MayEnrol => {
            Ending::new(Ended::Failed, "internal", "this endpoint has no answer for this decision")
        }
    };
    (target, ending)
}
