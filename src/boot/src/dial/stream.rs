//! Bytes to and from a server on which nothing can take for ever.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use rustls::{ClientConnection, StreamOwned};
use tungstenite::{Message, WebSocket};

use crate::exchange::{ExchangeError, Stage};

/// A server is silent for at most this long: it reads a directory and does one RSA operation.
const SILENCE: Duration = Duration::from_secs(20);

/// An open WebSocket.
pub struct Socket(pub(super) WebSocket<Stream>);

impl std::fmt::Debug for Socket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Socket")
    }
}

impl Socket {
    /// The next message, whatever frame type it came in.
    ///
    /// # Errors
    /// [`ExchangeError::Network`] when the server is silent, [`ExchangeError::Closed`] when it
    /// hangs up, which is how it refuses to authenticate.
    pub fn read(&mut self, server: &str) -> Result<Vec<u8>, ExchangeError> {
        loop {
            match self.0.read() {
                Ok(Message::Text(text)) => return Ok(text.as_bytes().to_vec()),
                Ok(Message::Binary(bytes)) => return Ok(bytes.to_vec()),
                Ok(Message::Close(_)) => {
                    return Err(ExchangeError::Closed { server: server.into() });
                }
                Ok(_) => {}
                Err(error) => {
                    return Err(ExchangeError::of_websocket(Stage::Answer, server, error));
                }
            }
        }
    }

    /// # Errors
    /// As [`Socket::read`].
    pub fn send(&mut self, message: Message, server: &str) -> Result<(), ExchangeError> {
        self.0
            .send(message)
            .map_err(|error| ExchangeError::of_websocket(Stage::Answer, server, error))
    }
}

/// A connection with or without TLS.
pub(crate) enum Stream {
    Plain(Timed),
    Tls(Box<StreamOwned<ClientConnection, Timed>>),
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.read(buffer),
            Self::Tls(stream) => stream.read(buffer),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.write(buffer),
            Self::Tls(stream) => stream.write(buffer),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(stream) => stream.flush(),
            Self::Tls(stream) => stream.flush(),
        }
    }
}

/// A TCP stream on which each read and write ends by itself: after [`SILENCE`], and at the deadline.
#[derive(Debug)]
pub(crate) struct Timed {
    pub(super) stream: TcpStream,
    pub(super) deadline: Instant,
}

impl Timed {
    fn patience(&self) -> io::Result<Option<Duration>> {
        let left = self.deadline.saturating_duration_since(Instant::now()).min(SILENCE);
        if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(Some(left)) }
    }
}

impl Read for Timed {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(self.patience()?)?;
        self.stream.read(buffer).map_err(timed_out)
    }
}

impl Write for Timed {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(self.patience()?)?;
        self.stream.write(buffer).map_err(timed_out)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

/// A blocking socket says "would block" when its time-out passes.
fn timed_out(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::WouldBlock => io::ErrorKind::TimedOut.into(),
        _ => error,
    }
}
