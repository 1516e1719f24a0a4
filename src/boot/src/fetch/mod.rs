//! `config_url`: one document by HTTP GET, dialled as the key server is (protocols/kcrypt.md §10.2).
//!
//! Kairos' own fetch has no time-out and hides its failures. This one has a deadline for all of it, and says why.

mod response;

use std::io::{BufReader, ErrorKind, Write};
use std::time::{Duration, Instant};

use latchkey_config::Request;
use tungstenite::http::Uri;

use crate::dial::Endpoint;
use crate::network::Changes;

pub use response::Response;

/// For all documents of a boot, from the wait for the network on; half of `latchkey.deadline` where that is shorter, so
/// that there is time left to ask the key server.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// One attempt, connected or not.
const ATTEMPT: Duration = Duration::from_secs(20);
/// Between attempts, the last one doubled each time.
const PAUSE: Duration = Duration::from_secs(1);
const MAX_REDIRECTIONS: usize = 5;
const REMINDER: Duration = Duration::from_secs(10);

/// Why an attempt failed, and whether another may succeed.
struct Failure {
    why: String,
    transient: bool,
}

/// Gets documents until `until`.
#[derive(Debug, Clone, Copy)]
pub struct Fetcher {
    until: Instant,
}

impl Fetcher {
    #[must_use]
    pub fn until(until: Instant) -> Self {
        Self { until }
    }

    /// The document, as soon as the network is there.
    ///
    /// # Errors
    /// Why it cannot be had, in words.
    pub fn get(&self, request: &Request<'_>) -> Result<Vec<u8>, String> {
        let mut pause = PAUSE;
        loop {
            let failure = match self.attempt(request) {
                Ok(document) => return Ok(document),
                Err(failure) => failure,
            };
            let next = Instant::now() + pause;
            if !failure.transient || next >= self.until {
                return Err(failure.why);
            }
            log::warn!("config_url: {}; trying again", failure.why);
            std::thread::sleep(pause);
            pause *= 2;
        }
    }

    fn attempt(&self, request: &Request<'_>) -> Result<Vec<u8>, Failure> {
        let mut url = request.url.to_owned();
        for _ in 0..=MAX_REDIRECTIONS {
            let uri: Uri = url.parse().map_err(|error| lasting(format!("{error}")))?;
            let response = self.ask(&uri, request)?;
            match (response.status, response.location) {
                (200, _) => return Ok(response.body),
                (301 | 302 | 303 | 307 | 308, Some(location)) => url = redirected(&uri, &location)?,
                // Request time-out, too many requests, and the server's own trouble.
                (status @ (408 | 429 | 500..), _) => {
                    return Err(passing(format!("the server answers {status}")));
                }
                (status, _) => return Err(lasting(format!("the server answers {status}"))),
            }
        }
        Err(lasting(format!("more than {MAX_REDIRECTIONS} redirections")))
    }

    fn ask(&self, uri: &Uri, request: &Request<'_>) -> Result<Response, Failure> {
        let server = Endpoint::new(&uri.to_string(), request.certificate)
            .map_err(|error| lasting(error.to_string()))?;
        self.await_route(&server)?;
        let until = self.until.min(Instant::now() + ATTEMPT);
        let mut stream = server
            .stream(until)
            .map_err(|error| Failure { transient: error.is_transient(), why: error.to_string() })?;
        let target = uri.path_and_query().map_or("/", |target| target.as_str());
        let host = uri.authority().map_or("", |authority| authority.as_str());
        let head = format!(
            "GET {target} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: latchkey\r\nAccept: */*\r\nConnection: close\r\n\r\n"
        );
        let failed = |error: std::io::Error| match error.kind() {
            ErrorKind::InvalidData => lasting(format!("the server answers with {error}")),
            _ => passing(format!("no answer: {error}")),
        };
        stream.write_all(head.as_bytes()).and_then(|()| stream.flush()).map_err(failed)?;
        Response::read(&mut BufReader::new(stream), request.max_bytes).map_err(failed)
    }

    fn await_route(&self, server: &Endpoint) -> Result<(), Failure> {
        let changes = Changes::of_routes();
        let mut reminder = Instant::now() + Duration::from_secs(1);
        while !server.has_route() {
            let now = Instant::now();
            if now >= self.until {
                return Err(lasting(format!("no route to {} in time", server.authority())));
            }
            if now >= reminder {
                log::info!("config_url: waiting for the network to reach {}", server.authority());
                reminder = now + REMINDER;
            }
            changes.wait(self.until);
        }
        Ok(())
    }
}

/// Where a redirection leads; never from TLS to none.
fn redirected(from: &Uri, location: &str) -> Result<String, Failure> {
    let scheme = from.scheme_str().unwrap_or("http");
    let authority = from.authority().map_or("", |authority| authority.as_str());
    let url = if location.contains("://") {
        location.to_owned()
    } else if location.starts_with("//") {
        format!("{scheme}:{location}")
    } else if location.starts_with('/') {
        format!("{scheme}://{authority}{location}")
    } else {
        return Err(lasting("a redirection without an absolute path".to_owned()));
    };
    let lower = url.to_ascii_lowercase();
    if lower.starts_with("https://") || (lower.starts_with("http://") && scheme == "http") {
        Ok(url)
    } else {
        Err(lasting("a redirection away from https".to_owned()))
    }
}

fn passing(why: String) -> Failure {
    Failure { why, transient: true }
}

fn lasting(why: String) -> Failure {
    Failure { why, transient: false }
}
