//! The server's side of TLS (rustls): certificate chain and key from PEM files, TLS 1.2 and 1.3, no client certificates
//! (a machine proves itself with its TPM).

use std::{path::Path, sync::Arc};

use rustls::{
    ServerConfig,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};
use tokio_rustls::TlsAcceptor;

use crate::error::StartError;

/// Reads both files and checks that they belong together.
pub(crate) fn acceptor(cert: &Path, key: &Path) -> Result<TlsAcceptor, StartError> {
    let unreadable = |path: &Path, wanted, reason: String| StartError::TlsFile {
        path: path.to_owned(),
        reason,
        wanted,
    };
    const CHAIN: &str =
        "the certificate (-----BEGIN CERTIFICATE-----) first and the intermediate ones after it";
    const KEY: &str = "the private key (-----BEGIN PRIVATE KEY-----), not encrypted";

    let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_file_iter(cert)
        .and_then(Iterator::collect)
        .map_err(|error| unreadable(cert, CHAIN, error.to_string()))?;
    if chain.is_empty() {
        return Err(unreadable(cert, CHAIN, "there is no certificate in it".to_owned()));
    }
    let private = PrivateKeyDer::from_pem_file(key)
        .map_err(|error| unreadable(key, KEY, error.to_string()))?;
    let unusable = |error: rustls::Error| StartError::TlsPair {
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
    Ok(TlsAcceptor::from(Arc::new(config)))
}
