//! `discovery.password`: kcrypt's plugin contract (go-pluggable, `protocols/kcrypt.md` §8). The event
//! on stdin, the answer on stdout, and not a byte besides.

use std::io::{Read, Write};
use std::path::PathBuf;

use latchkey_wire::plugin::{PartitionQuery, Request, Response};
use zeroize::Zeroizing;

use crate::clock::Steps;
use crate::exchange::Partition;
use crate::passphrase::Passphrase;
use crate::{BootError, oem, unlock};

/// go-pluggable passes longer data by a file.
const MAX_EVENT: u64 = 64 * 1024;
/// Documented by upstream for trying a plugin by hand; takes precedence over the configuration.
const SERVER_VARIABLE: &str = "WSS_SERVER";

/// Answers one event. The exit code is 0 even if the answer is an error: the caller reads `error`.
///
/// # Errors
/// Only when the answer cannot be written.
pub fn run(directories: &[PathBuf]) -> Result<(), BootError> {
    let mut response = Response::default();
    match passphrase(directories) {
        Ok(passphrase) => match String::from_utf8(passphrase.to_vec()) {
            Ok(text) => response.data = Zeroizing::new(text),
            // JSON has no bytes; upstream would hand over another passphrase instead.
            Err(_) => {
                response.error = "the passphrase is not UTF-8 and cannot be passed to kcrypt".into()
            }
        },
        Err(error) => response.error = format!("failed getting pass: {error}"),
    }
    let mut stdout = std::io::stdout().lock();
    stdout
        .write_all(response.to_json().as_bytes())
        .and_then(|()| stdout.flush())
        .map_err(BootError::io("write the answer to stdout"))
}

fn passphrase(directories: &[PathBuf]) -> Result<Passphrase, BootError> {
    let query = read_query()?;
    let mut config = oem::load(directories, oem::PATIENCE)?;
    let server = query.server.clone().or_else(|| std::env::var(SERVER_VARIABLE).ok());
    // The caller knows one server. Where several are configured and it is one of them, the others still count.
    if let Some(server) = server.filter(|server| !server.is_empty())
        && !config.challenger.servers.contains(&server)
    {
        config.challenger.servers = vec![server];
    }
    config.challenger.mdns |= query.mdns;
    let partition = Partition { label: query.label, name: query.name, uuid: query.uuid };
    let steps = Steps::default();
    unlock::with_source(&config, &steps, |source, deadline| {
        // A partition that is LUKS already has its passphrase: making one would lock it for good.
        if query.is_luks {
            source.release(&partition, deadline, &steps)
        } else {
            config.complete()?;
            source.enrol(&partition, deadline, &steps)
        }
    })
}

fn read_query() -> Result<PartitionQuery, BootError> {
    let unreadable =
        |error: latchkey_wire::Error| BootError::Usage(format!("failed reading payload: {error}"));
    let event = bounded(std::io::stdin().lock(), "stdin")?;
    let request = Request::from_json(&event).map_err(unreadable)?;
    let data = if request.data.is_empty() && !request.file.is_empty() {
        let file = std::fs::File::open(&request.file)
            .map_err(BootError::io(format!("open {}", request.file)))?;
        bounded(file, &request.file)?
    } else {
        request.data.as_bytes().to_vec()
    };
    PartitionQuery::from_json(&data).map_err(unreadable)
}

fn bounded(source: impl Read, name: &str) -> Result<Vec<u8>, BootError> {
    let mut content = Vec::new();
    source
        .take(MAX_EVENT + 1)
        .read_to_end(&mut content)
        .map_err(BootError::io(format!("read {name}")))?;
    if content.len() as u64 > MAX_EVENT {
        return Err(BootError::Usage(format!("{name} holds more than {MAX_EVENT} bytes")));
    }
    Ok(content)
}
