//! TLS with the servers: whom to trust, and the client's own certificate.

use std::sync::Arc;
use std::time::Duration;

use latchkey_wire::ek::certificate_validity;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{WebPkiServerVerifier, verify_server_name};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
};
use zeroize::Zeroizing;

use super::login::{Unusable, read};
use crate::settings::{Pem, Tls};

/// None: nothing is said, TLS only if the server wants it, with the system's authorities.
pub(super) fn config(tls: &Tls) -> Result<Option<ClientConfig>, Unusable> {
    if *tls == Tls::default() {
        return Ok(None);
    }
    let unusable = |what: &str, reason: String| Unusable { what: what.into(), reason };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut roots = RootCertStore::empty();
    let mut own = Vec::new();
    match &tls.ca {
        Some(pem) => {
            let what = name("CA certificate", pem);
            own = certificates(pem).map_err(|reason| unusable(&what, reason))?;
            for certificate in &own {
                let added = roots.add(certificate.clone());
                added.map_err(|error| unusable(&what, error.to_string()))?;
            }
        }
        None => {
            let system = rustls_native_certs::load_native_certs();
            roots.add_parsable_certificates(system.certs);
            if roots.is_empty() {
                let reason =
                    "this system has no certificates of authorities; configure registry_ca";
                return Err(unusable("TLS", reason.into()));
            }
        }
    }
    let inner = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
        .build()
        .map_err(|error| unusable("CA certificate", error.to_string()))?;
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| unusable("TLS", error.to_string()))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Verifier { inner, own }));
    let config = match (&tls.certificate, &tls.key) {
        (None, None) => builder.with_no_client_auth(),
        (Some(certificate), Some(key)) => {
            let what = name("client certificate", certificate);
            let chain = certificates(certificate).map_err(|reason| unusable(&what, reason))?;
            let what = name("client certificate's key", key);
            let key = private_key(key).map_err(|reason| unusable(&what, reason))?;
            builder
                .with_client_auth_cert(chain, key)
                .map_err(|error| unusable("client certificate with its key", error.to_string()))?
        }
        (Some(_), None) => {
            return Err(unusable("client certificate", "there is no key for it".into()));
        }
        (None, Some(_)) => {
            return Err(unusable("client key", "there is no certificate for it".into()));
        }
    };
    Ok(Some(config))
}

fn name(what: &str, pem: &Pem) -> String {
    match pem {
        Pem::File(path) => format!("{what} {}", path.display()),
        Pem::Text(_) => what.into(),
    }
}

fn certificates(pem: &Pem) -> Result<Vec<CertificateDer<'static>>, String> {
    let text = text(pem)?;
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text.as_bytes()).collect();
    let all = all.map_err(|error| error.to_string())?;
    if all.is_empty() {
        return Err("there is no PEM block of type CERTIFICATE in it".into());
    }
    Ok(all)
}

fn private_key(pem: &Pem) -> Result<PrivateKeyDer<'static>, String> {
    let text = text(pem)?;
    // The library's error could quote the text.
    PrivateKeyDer::from_pem_slice(text.as_bytes())
        .map_err(|_| "there is no PEM block with an unencrypted private key in it".into())
}

fn text(pem: &Pem) -> Result<Zeroizing<String>, String> {
    match pem {
        Pem::File(path) => read(path),
        Pem::Text(text) => Ok(text.0.clone()),
    }
}

/// rustls' own verification, and the very certificate that the operator gave.
#[derive(Debug)]
struct Verifier {
    inner: Arc<WebPkiServerVerifier>,
    own: Vec<CertificateDer<'static>>,
}

/// A server may show what `openssl req -x509` makes: an authority's certificate, which rustls takes for no server, and Go, and so the
/// rest of NATS, does. It must be for this server, and valid, as any other.
fn given(
    shown: &CertificateDer<'_>,
    name: &ServerName<'_>,
    now: UnixTime,
) -> Result<ServerCertVerified, Error> {
    verify_server_name(&ParsedCertificate::try_from(shown)?, name)?;
    let (from, until) = certificate_validity(shown)
        .map_err(|_| Error::InvalidCertificate(CertificateError::BadEncoding))?;
    let time = |seconds| UnixTime::since_unix_epoch(Duration::from_secs(seconds));
    let (not_before, not_after) = (time(from), time(until));
    let wrong = if now < not_before {
        CertificateError::NotValidYetContext { time: now, not_before }
    } else if now > not_after {
        CertificateError::ExpiredContext { time: now, not_after }
    } else {
        return Ok(ServerCertVerified::assertion());
    };
    Err(Error::InvalidCertificate(wrong))
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if self.own.contains(end_entity) {
            return given(end_entity, server_name, now);
        }
        self.inner.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}
