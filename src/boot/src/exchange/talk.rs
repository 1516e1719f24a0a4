//! What is said on one connection: an upgrade, the server's challenge, our answer, the server's last word.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Instant;

use latchkey_wire::release::{Refusal, Release};
use latchkey_wire::v1::{self, Challenge, GET_PASS, POST_PASS, Payload};
use latchkey_wire::v2::{Answer, TPM_ATTESTATION};
use tungstenite::Message;
use zeroize::Zeroizing;

use super::{ExchangeError, Generation, Papers, Partition};
use crate::dial::{Endpoint, Socket};

/// What is wanted of a server.
#[derive(Clone, Debug)]
pub(crate) enum Wish {
    /// The passphrase there is.
    Release,
    /// The passphrase; a server of generation 2 makes it if there is none.
    Enrol,
    /// To keep this sealed passphrase (generation 1).
    Keep(Vec<u8>),
}

/// What is asked, the same of every server.
#[derive(Debug)]
pub(crate) struct Question {
    pub(crate) papers: Papers,
    pub(crate) partition: Partition,
    pub(crate) wish: Wish,
    pub(crate) deadline: Instant,
}

/// The server's last word.
pub(crate) type Word = Result<Option<Release>, Refusal>;

/// One connection's talk.
pub(crate) struct Talk<'a> {
    pub(crate) question: &'a Question,
    pub(crate) server: &'a Arc<Endpoint>,
    pub(crate) address: SocketAddr,
}

impl Talk<'_> {
    /// Talks to its end. `connected` is told of the TCP connection; `answer` has the TPM answer the challenge.
    pub(crate) fn run(
        &self,
        generation: Generation,
        connected: impl FnOnce(&TcpStream),
        answer: impl FnOnce(Challenge) -> Result<Zeroizing<String>, ExchangeError>,
    ) -> Result<Word, ExchangeError> {
        match generation {
            Generation::V1 => self.speak_v1(connected, answer),
            Generation::V2 => self.speak_v2(connected, answer),
        }
    }

    fn speak_v1(
        &self,
        connected: impl FnOnce(&TcpStream),
        answer: impl FnOnce(Challenge) -> Result<Zeroizing<String>, ExchangeError>,
    ) -> Result<Word, ExchangeError> {
        let name = self.server.authority();
        let path = if let Wish::Keep(_) = self.question.wish { POST_PASS } else { GET_PASS };
        let authorization = ("authorization", self.question.papers.authorization.clone());
        let mut socket = self.open(path, Some(authorization), connected)?;
        let message = socket.read(&name)?;
        let challenge = match refusal_v1(&message) {
            Some(refusal) => return Ok(Err(refusal)),
            None => Challenge::from_json(&message),
        };
        let challenge = challenge.map_err(|error| ExchangeError::protocol(&name, error))?;
        let response = answer(challenge)?;
        socket.send(Message::binary(response.as_bytes().to_vec()), &name)?;
        if let Wish::Keep(sealed) = &self.question.wish {
            return self.leave(&mut socket, sealed);
        }
        let last = Zeroizing::new(socket.read(&name)?);
        let payload =
            Payload::from_json(&last).map_err(|error| ExchangeError::protocol(&name, error))?;
        Ok(payload.classify().map(Some))
    }

    /// Whether it was stored is for the next question to find out: a server that did says nothing.
    fn leave(&self, socket: &mut Socket, sealed: &[u8]) -> Result<Word, ExchangeError> {
        let name = self.server.authority();
        let payload = Payload::sealed(sealed).to_json();
        socket.send(Message::text(payload.as_str()), &name)?;
        match socket.read(&name) {
            Err(ExchangeError::Closed { .. }) => Ok(Ok(None)),
            Err(ExchangeError::Network { error, .. })
                if error.kind() == io::ErrorKind::TimedOut =>
            {
                Ok(Ok(None))
            }
            Err(error) => Err(error),
            Ok(message) => match Payload::from_json(&message) {
                Ok(answer) if answer.error.is_empty() => Ok(Ok(None)),
                Ok(answer) => Err(ExchangeError::protocol(&name, answer.error)),
                Err(error) => Err(ExchangeError::protocol(&name, error)),
            },
        }
    }

    fn speak_v2(
        &self,
        connected: impl FnOnce(&TcpStream),
        answer: impl FnOnce(Challenge) -> Result<Zeroizing<String>, ExchangeError>,
    ) -> Result<Word, ExchangeError> {
        let name = self.server.authority();
        let papers = &self.question.papers;
        let init =
            if let Wish::Release = self.question.wish { &papers.release } else { &papers.enrol };
        let mut socket = self.open(TPM_ATTESTATION, None, connected)?;
        socket.send(Message::text(init.as_str()), &name)?;
        let first = read_v2(&mut socket, &name)?;
        if first.challenge.is_none() && first.error.is_empty() {
            return Err(ExchangeError::protocol(&name, "neither a challenge nor an error"));
        }
        let challenge = match first.into_challenge() {
            Ok(challenge) => challenge,
            Err(refusal) => return Ok(Err(refusal)),
        };
        let proof = answer(challenge)?;
        socket.send(Message::text(proof.as_str()), &name)?;
        Ok(read_v2(&mut socket, &name)?.classify().map(Some))
    }

    fn open(
        &self,
        path: &str,
        authorization: Option<(&'static str, String)>,
        connected: impl FnOnce(&TcpStream),
    ) -> Result<Socket, ExchangeError> {
        let partition = &self.question.partition;
        let facts = [
            (v1::HEADER_LABEL, &partition.label),
            (v1::HEADER_NAME, &partition.name),
            (v1::HEADER_UUID, &partition.uuid),
        ];
        let known = facts.into_iter().filter(|(_, fact)| !fact.is_empty());
        let headers: Vec<_> = authorization
            .into_iter()
            .chain(known.map(|(name, fact)| (name, fact.clone())))
            .collect();
        self.server.open(self.address, path, &headers, self.question.deadline, connected)
    }
}

fn read_v2(socket: &mut Socket, server: &str) -> Result<Answer, ExchangeError> {
    let message = Zeroizing::new(socket.read(server)?);
    Answer::from_json(&message).map_err(|error| ExchangeError::protocol(server, error))
}

/// A server may say no where a challenge is expected.
fn refusal_v1(message: &[u8]) -> Option<Refusal> {
    let payload = Payload::from_json(message).ok().filter(|payload| !payload.error.is_empty())?;
    payload.classify().err()
}
