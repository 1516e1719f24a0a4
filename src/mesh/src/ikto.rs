//! `ikto.json`, read as Ikto reads it (protocols/ikto-kilo.md §1.2), and `latchkey init`, which makes one (§1.3).
//!
//! | key | beyond Ikto |
//! |---|---|
//! | Ikto's eleven | checked, each with its name in the error; `advertise_address` may be a DNS name, `nats_creds` empty |
//! | `signatures` | `require`, `prefer` (default) or `ignore` |
//! | `strict` | `false`: records outside the mesh or under another key count, as for Ikto |
//! | `persistent_keepalive` | seconds, 0 is off; without it, 25 behind a NAT |
//! | `mtu` | 1280 to 65455; without it, what the path allows |
//! | `nats_ca`, `nats_cert`, `nats_key` | PEM files: certificates to trust in the place of the system's, client certificate and key |
//!
//! Ikto passes over what it does not know, so one file may serve both programs.

mod check;
mod document;
mod init;

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

use crate::error::{Error, Result};
use crate::key::PrivateKey;
use crate::settings::{
    AddressFrom, DEFAULT_IKTO_SOCKET, KeyFrom, Login, Pem, RegistrySettings, STATE_DIRECTORY,
    Settings, Tls,
};
use check::Checked;
use document::{Document, Fault, MAX_FILE};

pub use init::{DEFAULT_MESH, DEFAULT_PREFIX_LENGTH, init};

/// A `.creds` file has two or three KiB.
const MAX_CREDENTIALS: usize = 64 * 1024;

/// What stands in an `ikto.json`.
#[derive(Debug)]
pub struct Config;

impl Config {
    /// Reads the file and checks all of it, and that the files it names can be read, before anything is touched.
    ///
    /// # Errors
    /// [`Error::Ikto`] names the key.
    pub fn read(path: &Path) -> Result<Settings> {
        let fault = |fault: Fault| Error::Ikto { path: path.into(), reason: fault.to_string() };
        let bytes = contents(path, MAX_FILE).map_err(|error| {
            fault(Fault::File(format!("cannot read it: {error}; `latchkey init` prints a new one")))
        })?;
        let document = Document::parse(&bytes).map_err(fault)?;
        let variable = |name: &str| std::env::var(name).ok();
        let checked = check::check(&document, &variable).map_err(fault)?;
        for warning in &checked.warnings {
            log::warn!("{}: {warning}", path.display());
        }
        let login = files(&checked).map_err(fault)?;
        if matches!(login, Login::CredentialsFile(_)) && checked.login != Login::None {
            log::warn!(
                "{}: nats_creds counts, and the user, password or token in nats_url does not",
                path.display()
            );
        }
        Ok(settings(checked, login))
    }
}

/// Whether what the file names can be read and is what it should be, and with it how to log in.
fn files(checked: &Checked) -> Result<Login, Fault> {
    let key = |why: String| Fault::Key { key: "private_key_path", why };
    PrivateKey::read(&checked.key).map_err(|error| key(error.to_string()))?;
    let open_to_others = fs::metadata(&checked.key).is_ok_and(|file| file.mode() & 0o077 != 0);
    if open_to_others {
        log::warn!(
            "private_key_path: others can read {}; take that from them (chmod 600)",
            checked.key.display()
        );
    }
    let pem = [
        ("nats_ca", checked.ca.as_ref()),
        ("nats_cert", checked.client.as_ref().map(|(certificate, _)| certificate)),
        ("nats_key", checked.client.as_ref().map(|(_, key)| key)),
    ];
    for (key, path) in pem {
        if let Some(path) = path {
            File::open(path).map_err(|error| unreadable(key, path, &error))?;
        }
    }
    credentials(checked)
}

/// An empty file (`/dev/null`) is how people give Ikto none.
fn credentials(checked: &Checked) -> Result<Login, Fault> {
    const KEY: &str = "nats_creds";
    let Some(path) = &checked.credentials else { return Ok(checked.login.clone()) };
    let text = contents(path, MAX_CREDENTIALS).map_err(|error| unreadable(KEY, path, &error))?;
    if text.trim_ascii().is_empty() {
        return Ok(checked.login.clone());
    }
    let armour = b"-----BEGIN NATS USER JWT-----";
    if text.windows(armour.len()).any(|window| window == armour) {
        return Ok(Login::CredentialsFile(path.clone()));
    }
    let why =
        format!("{} is no .creds file: it has no -----BEGIN NATS USER JWT-----", path.display());
    Err(Fault::Key { key: KEY, why })
}

fn unreadable(key: &'static str, path: &Path, error: &io::Error) -> Fault {
    Fault::Key { key, why: format!("cannot read {}: {error}", path.display()) }
}

fn contents(path: &Path, limit: usize) -> io::Result<Zeroizing<Vec<u8>>> {
    // Room for all from the start: a vector that grows leaves copies behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(limit + 1));
    File::open(path)?.take(limit as u64 + 1).read_to_end(&mut bytes)?;
    if bytes.len() > limit {
        return Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            format!("more than {limit} bytes"),
        ));
    }
    Ok(bytes)
}

fn settings(checked: Checked, login: Login) -> Settings {
    let pem = |path: PathBuf| Some(Pem::File(path));
    let (certificate, key) = match checked.client {
        Some((certificate, key)) => (pem(certificate), pem(key)),
        None => (None, None),
    };
    Settings {
        name: checked.name,
        mesh: checked.mesh,
        address: AddressFrom::Fixed(checked.address),
        key: KeyFrom::File(checked.key),
        advertise: checked.advertise,
        cache: PathBuf::from(STATE_DIRECTORY).join(format!("{}.json", checked.interface)),
        interface: checked.interface,
        port: checked.port,
        keepalive: checked.keepalive,
        mtu: checked.mtu,
        registry: Some(RegistrySettings {
            servers: checked.servers,
            bucket: checked.bucket,
            login,
            tls: Tls { ca: checked.ca.and_then(pem), certificate, key },
        }),
        signatures: checked.signatures,
        strict_records: checked.strict,
        metrics: None,
        socket: PathBuf::from(DEFAULT_IKTO_SOCKET),
    }
}

#[cfg(test)]
mod tests;
