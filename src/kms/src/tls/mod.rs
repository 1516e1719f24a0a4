//! The server's side of TLS (rustls): certificate chain and key from PEM files, TLS 1.2 and 1.3, no client certificates
//! (a machine proves itself with its TPM).
//!
//! Changed files are taken without a restart, for connections that come then. If the new ones cannot be used, the
//! old ones stay in use and the log says so.

mod validity;

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
};

use rustls::{
    ServerConfig,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};
use tokio_rustls::TlsAcceptor;

use crate::error::Error;

const CHAIN: &str =
    "the certificate (-----BEGIN CERTIFICATE-----) first and the intermediate ones after it";
const KEY: &str = "the private key (-----BEGIN PRIVATE KEY-----), not encrypted";

/// Certificate and key, as they are now.
#[derive(Debug)]
pub(crate) struct Tls {
    cert: PathBuf,
    key: PathBuf,
    in_use: RwLock<InUse>,
    /// How the files looked when they were read, or could not be.
    seen: Mutex<[Option<Stamp>; 2]>,
    failures: AtomicU64,
}

/// Device, inode, size, time of the last change.
type Stamp = (u64, u64, u64, i64, i64);

#[derive(Debug, Clone)]
struct InUse {
    config: Arc<ServerConfig>,
    /// When the certificate expires, seconds since 1970.
    not_after: Option<i64>,
}

impl Tls {
    /// Reads both files and checks that they belong together.
    pub(crate) fn open(cert: &Path, key: &Path) -> Result<Self, Error> {
        let seen = [cert, key].map(stamp);
        let in_use = read(cert, key)?;
        Ok(Self {
            cert: cert.to_owned(),
            key: key.to_owned(),
            in_use: RwLock::new(in_use),
            seen: Mutex::new(seen),
            failures: AtomicU64::new(0),
        })
    }

    /// For a connection that has just come.
    pub(crate) fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::from(self.now().config)
    }

    /// When the certificate expires, and how many changes could not be used.
    pub(crate) fn state(&self) -> (Option<i64>, u64) {
        (self.now().not_after, self.failures.load(Ordering::Relaxed))
    }

    /// Takes the files if they have changed. Between the writing of one and the other they do not belong together: then
    /// the change of the second brings the next attempt.
    pub(crate) fn poll(&self) {
        let now = [&self.cert, &self.key].map(|path| stamp(path));
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if *seen == now {
            return;
        }
        *seen = now;
        match read(&self.cert, &self.key) {
            Ok(in_use) => {
                *self.in_use.write().unwrap_or_else(PoisonError::into_inner) = in_use;
                log::info!("TLS: {} has changed and is in use now", self.cert.display());
            }
            Err(error) => {
                self.failures.fetch_add(1, Ordering::Relaxed);
                log::error!("{error}; the certificate that was read before stays in use");
            }
        }
    }

    fn now(&self) -> InUse {
        self.in_use.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn stamp(path: &Path) -> Option<Stamp> {
    let at = fs::metadata(path).ok()?;
    Some((at.dev(), at.ino(), at.size(), at.mtime(), at.mtime_nsec()))
}

fn read(cert: &Path, key: &Path) -> Result<InUse, Error> {
    let unreadable = |path: &Path, wanted, reason: String| Error::TlsFile {
        path: path.to_owned(),
        reason,
        wanted,
    };
    let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_file_iter(cert)
        .and_then(Iterator::collect)
        .map_err(|error| unreadable(cert, CHAIN, error.to_string()))?;
    let Some(leaf) = chain.first() else {
        return Err(unreadable(cert, CHAIN, "there is no certificate in it".to_owned()));
    };
    let not_after = validity::not_after(leaf);
    let private = PrivateKeyDer::from_pem_file(key)
        .map_err(|error| unreadable(key, KEY, error.to_string()))?;
    let unusable = |error: rustls::Error| Error::TlsPair {
        cert: cert.to_owned(),
        key: key.to_owned(),
        reason: error.to_string(),
    };
    let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(unusable)?
        .with_no_client_auth()
        .with_single_cert(chain, private)
        .map_err(unusable)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(InUse { config: Arc::new(config), not_after })
}
