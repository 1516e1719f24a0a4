//! Whom to believe that it is the key server: the system's certificate authorities and `certificate`, at a time
//! that this machine's clock may not know.
//!
//! # A clock that lags
//!
//! A machine without a battery starts in 1970, and nothing sets its clock before its disk is open. Such a clock is
//! noticed: it shows a time before this program was built ([`floor`]). Then, and only then,
//!
//! * certificates are held to the floor instead of the clock: what had expired when the program was built is refused;
//! * a certificate that begins after the floor is taken as proof that it is at least that late, and the chain is
//!   held to that time. No authority issues certificates for times to come, so nothing is lost by it.
//!
//! What remains of a wrong clock: a certificate that has expired since the program was built passes. With a clock that
//! is not behind the floor, all of this has no effect. The system's clock is not set; that is for others, after boot.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use latchkey_wire::ek::certificate_validity;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{WebPkiServerVerifier, verify_server_name};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
};

use crate::exchange::ExchangeError;

/// What a system trusts; Kairos adds `certificate` to it.
const SYSTEM_ROOTS: &str = "/etc/ssl/certs/ca-certificates.crt";
/// Certificates of a chain that may each begin later than the one before.
const MAX_STEPS: usize = 4;

/// The earliest time it can be: the date of the source this program was built from, in seconds since 1970.
#[must_use]
pub fn floor() -> Duration {
    Duration::from_secs(env!("LATCHKEY_BUILD_DATE").parse().unwrap_or(0))
}

/// How far the system's clock is behind [`floor`], if it is.
#[must_use]
pub fn lag() -> Option<Duration> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    floor().checked_sub(now).filter(|lag| !lag.is_zero())
}

/// What to trust: `certificate`, in PEM, beside the system's authorities.
///
/// # Errors
/// [`ExchangeError::Certificate`] when it cannot be read, or when there is nothing to trust at all.
pub(super) fn config(certificate: Option<&str>) -> Result<Arc<ClientConfig>, ExchangeError> {
    let bad = |why: String| ExchangeError::Certificate { why };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let own = own(certificate)?;
    let roots = Arc::new(roots(&own)?);
    let inner = WebPkiServerVerifier::builder_with_provider(roots, Arc::clone(&provider))
        .build()
        .map_err(|error| bad(error.to_string()))?;
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| bad(error.to_string()))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(NotBefore { inner, floor, own }))
        .with_no_client_auth();
    Ok(Arc::new(config))
}

/// The certificates that the operator gave.
fn own(certificate: Option<&str>) -> Result<Vec<CertificateDer<'static>>, ExchangeError> {
    let bad = |why: &str| ExchangeError::Certificate { why: why.to_owned() };
    let Some(pem) = certificate else { return Ok(Vec::new()) };
    let own: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    let own = own.map_err(|error| bad(&format!("{error:?}")))?;
    if own.is_empty() {
        return Err(bad("there is no PEM block of type CERTIFICATE in it"));
    }
    Ok(own)
}

fn roots(own: &[CertificateDer<'static>]) -> Result<RootCertStore, ExchangeError> {
    let bad = |why: String| ExchangeError::Certificate { why };
    let mut roots = RootCertStore::empty();
    if let Ok(pem) = std::fs::read(SYSTEM_ROOTS) {
        let system = CertificateDer::pem_slice_iter(&pem).filter_map(Result::ok);
        roots.add_parsable_certificates(system);
    }
    for certificate in own {
        roots.add(certificate.clone()).map_err(|error| bad(error.to_string()))?;
    }
    if roots.is_empty() {
        return Err(bad(format!(
            "the server's URL wants TLS, and there is neither `certificate` nor {SYSTEM_ROOTS}"
        )));
    }
    Ok(roots)
}

/// rustls' own verification, at a time that is not before the floor.
#[derive(Debug)]
struct NotBefore {
    inner: Arc<WebPkiServerVerifier>,
    floor: fn() -> Duration,
    own: Vec<CertificateDer<'static>>,
}

impl NotBefore {
    /// A server may show the very certificate that the operator gave, as `openssl req -x509` makes it: an authority's, which
    /// rustls takes for no server and Go does. `None`: it shows another.
    fn given(
        &self,
        shown: &CertificateDer<'_>,
        name: &ServerName<'_>,
        at: UnixTime,
    ) -> Option<Result<ServerCertVerified, Error>> {
        self.own.contains(shown).then(|| {
            verify_server_name(&ParsedCertificate::try_from(shown)?, name)?;
            let (from, until) = certificate_validity(shown)
                .map_err(|_| Error::InvalidCertificate(CertificateError::BadEncoding))?;
            let time = |seconds| UnixTime::since_unix_epoch(Duration::from_secs(seconds));
            let (not_before, not_after) = (time(from), time(until));
            let wrong = if at < not_before {
                CertificateError::NotValidYetContext { time: at, not_before }
            } else if at > not_after {
                CertificateError::ExpiredContext { time: at, not_after }
            } else {
                return Ok(ServerCertVerified::assertion());
            };
            Err(Error::InvalidCertificate(wrong))
        })
    }
}

impl ServerCertVerifier for NotBefore {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let verify = |at| {
            self.given(end_entity, server_name, at).unwrap_or_else(|| {
                self.inner.verify_server_cert(
                    end_entity,
                    intermediates,
                    server_name,
                    ocsp_response,
                    at,
                )
            })
        };
        let floor = UnixTime::since_unix_epoch((self.floor)());
        if now >= floor {
            return verify(now);
        }
        let mut at = floor;
        for _ in 0..MAX_STEPS {
            match verify(at) {
                Err(Error::InvalidCertificate(CertificateError::NotValidYetContext {
                    not_before,
                    ..
                })) if not_before > at => at = not_before,
                verified => return verified,
            }
        }
        verify(at)
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

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, date_time_ymd};

    use super::*;

    const DAY: u64 = 86_400;
    /// 2026-01-01.
    const FLOOR: u64 = 1_767_225_600;

    fn verifier(root: &CertificateDer<'static>, own: Vec<CertificateDer<'static>>) -> NotBefore {
        let mut roots = RootCertStore::empty();
        roots.add(root.clone()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let inner =
            WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider).build().unwrap();
        NotBefore { inner, floor: || Duration::from_secs(FLOOR), own }
    }

    fn verify(
        verifier: &NotBefore,
        shown: &CertificateDer<'_>,
        name: &str,
        clock: u64,
    ) -> Result<ServerCertVerified, Error> {
        let name = ServerName::try_from(name.to_owned()).unwrap();
        let now = UnixTime::since_unix_epoch(Duration::from_secs(clock));
        verifier.verify_server_cert(shown, &[], &name, &[], now)
    }

    fn of_kms(years: (i32, i32)) -> CertificateParams {
        let mut params = CertificateParams::new(vec!["kms.local".to_owned()]).unwrap();
        (params.not_before, params.not_after) =
            (date_time_ymd(years.0, 1, 1), date_time_ymd(years.1, 1, 1));
        params
    }

    /// As `openssl req -x509` makes it.
    fn self_signed(years: (i32, i32)) -> CertificateDer<'static> {
        let mut params = of_kms(years);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().clone()
    }

    /// A certificate for `kms.local` that holds between two years, verified at `clock`.
    fn verified_at(clock: u64, years: (i32, i32)) -> Result<ServerCertVerified, Error> {
        let authority_key = KeyPair::generate().unwrap();
        let mut authority = CertificateParams::new(Vec::new()).unwrap();
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root = authority.self_signed(&authority_key).unwrap();
        let key = KeyPair::generate().unwrap();
        let leaf = of_kms(years)
            .signed_by(&key, &Issuer::from_params(&authority, &authority_key))
            .unwrap();
        verify(&verifier(root.der(), Vec::new()), leaf.der(), "kms.local", clock)
    }

    #[test]
    fn a_clock_behind_the_floor_is_not_asked() {
        for (what, clock, years, is_valid) in [
            ("1970, a certificate of the time", 1000, (2025, 2027), true),
            ("1970, a certificate made after the program", 1000, (2030, 2031), true),
            ("1970, expired before the program was made", 1000, (2020, 2025), false),
            ("the day before the floor", FLOOR - DAY, (2025, 2027), true),
            ("the floor, a certificate for later", FLOOR, (2027, 2028), false),
            ("after the floor, a certificate of the time", FLOOR + DAY, (2025, 2027), true),
            ("after the floor, expired since", FLOOR + 400 * DAY, (2025, 2027), false),
        ] {
            let verified = verified_at(clock, years);
            assert_eq!(verified.is_ok(), is_valid, "{what}: {verified:?}");
            let shown = self_signed(years);
            let verified =
                verify(&verifier(&shown, vec![shown.clone()]), &shown, "kms.local", clock);
            assert_eq!(verified.is_ok(), is_valid, "{what}, self-signed: {verified:?}");
        }
    }

    #[test]
    fn a_certificate_that_was_given_is_good_for_its_own_name_and_for_no_other_certificate() {
        let (given, other) = (self_signed((2025, 2055)), self_signed((2025, 2055)));
        let verifier = verifier(&given, vec![given.clone()]);
        verify(&verifier, &given, "kms.local", FLOOR + DAY).unwrap();
        assert!(verify(&verifier, &given, "kms.example", FLOOR + DAY).is_err());
        assert!(verify(&verifier, &other, "kms.local", FLOOR + DAY).is_err());
    }

    #[test]
    fn this_program_is_not_from_before_it_was_written() {
        assert!(floor() >= Duration::from_secs(FLOOR));
    }
}
