//! Who the agent is to the servers, and whom it trusts: credentials, certificates and keys, read anew for each connection, so
//! that renewed ones count.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_nats::ConnectOptions;
use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use rustls::client::WebPkiServerVerifier;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};
use zeroize::Zeroizing;

use crate::settings::{Login, Pem, RegistrySettings, Tls};

/// Longest file that is read here.
const MAX_FILE: u64 = 1 << 20;

/// A setting of the registry that cannot be used: which, and why. Never with anything secret in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Unusable {
    pub(super) what: String,
    pub(super) reason: String,
}

/// What `settings` say, as the client library takes it. Reads files.
pub(super) fn options(settings: &RegistrySettings) -> Result<ConnectOptions, Unusable> {
    let options = ConnectOptions::new();
    let options = match &settings.login {
        Login::None => options,
        Login::Password { user, password } => {
            options.user_and_password(user.clone(), password.0.to_string())
        }
        Login::Token(token) => options.token(token.0.to_string()),
        Login::Credentials(_) | Login::CredentialsFile(_) => match credentials(&settings.login)? {
            Some(text) => options.credentials(&text).map_err(|error| Unusable {
                what: credentials_name(&settings.login),
                reason: error.to_string(),
            })?,
            None => options,
        },
    };
    match tls(&settings.tls)? {
        Some(config) => Ok(options.require_tls(true).tls_client_config(config)),
        None => Ok(options),
    }
}

/// When the credentials end, if they say so and that is past.
pub(super) fn expired(settings: &RegistrySettings) -> Option<Duration> {
    let text = credentials(&settings.login).ok()??;
    let jwt = text.lines().map(str::trim).find(|line| line.starts_with("eyJ"))?;
    let claims = BASE64_URL_SAFE_NO_PAD.decode(jwt.split('.').nth(1)?).ok()?;
    let claims: serde_json::Value = serde_json::from_slice(&claims).ok()?;
    let until = Duration::from_secs(claims.get("exp")?.as_u64()?);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    now.checked_sub(until)
}

/// What a person calls them.
pub(super) fn credentials_name(login: &Login) -> String {
    match login {
        Login::CredentialsFile(path) => format!("credentials file {}", path.display()),
        Login::Credentials(_) => "credentials".into(),
        Login::Password { user, .. } => format!("user {user:?} and password"),
        Login::Token(_) => "token".into(),
        Login::None => "login (none is configured)".into(),
    }
}

/// The text of the credentials. None if there are none, or an empty file, which is how an Ikto agent runs without.
fn credentials(login: &Login) -> Result<Option<Zeroizing<String>>, Unusable> {
    let text = match login {
        Login::CredentialsFile(path) => {
            read(path).map_err(|reason| Unusable { what: credentials_name(login), reason })?
        }
        Login::Credentials(text) => text.0.clone(),
        _ => return Ok(None),
    };
    if text.trim().is_empty() {
        return Ok(None);
    }
    // The library finds the last block only if a line end follows it.
    let mut ended = Zeroizing::new(String::with_capacity(text.len() + 1));
    ended.push_str(&text);
    ended.push('\n');
    Ok(Some(ended))
}

/// None: nothing is said, TLS only if the server wants it, with the system's authorities.
fn tls(tls: &Tls) -> Result<Option<ClientConfig>, Unusable> {
    if *tls == Tls::default() {
        return Ok(None);
    }
    let unusable = |what: &str, reason: String| Unusable { what: what.into(), reason };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut roots = RootCertStore::empty();
    match &tls.ca {
        Some(pem) => {
            let what = name("CA certificate", pem);
            for certificate in certificates(pem).map_err(|reason| unusable(&what, reason))? {
                roots.add(certificate).map_err(|error| unusable(&what, error.to_string()))?;
            }
        }
        None => {
            let system = rustls_native_certs::load_native_certs();
            roots.add_parsable_certificates(system.certs);
        }
    }
    let verifier =
        WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
            .build()
            .map_err(|error| unusable("CA certificate", error.to_string()))?;
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| unusable("TLS", error.to_string()))?
        .with_webpki_verifier(verifier);
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

fn read(path: &Path) -> Result<Zeroizing<String>, String> {
    let mut text = Zeroizing::new(String::new());
    let read = File::open(path)
        .and_then(|file| file.take(MAX_FILE + 1).read_to_string(&mut text))
        .map_err(|error| error.to_string())?;
    if read as u64 > MAX_FILE {
        return Err(format!("it is longer than {MAX_FILE} bytes"));
    }
    Ok(text)
}
