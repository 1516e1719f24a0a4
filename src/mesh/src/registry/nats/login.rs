//! Who the agent is to the servers: credentials, certificates and keys, read anew for each connection, so that renewed ones count.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::time::{Duration, SystemTime};

use async_nats::ConnectOptions;
use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use zeroize::Zeroizing;

use super::tls;
use crate::settings::{Login, RegistrySettings};

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
    match tls::config(&settings.tls)? {
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

/// Reads a file of reasonable size.
pub(super) fn read(path: &Path) -> Result<Zeroizing<String>, String> {
    let mut text = Zeroizing::new(String::new());
    let read = File::open(path)
        .and_then(|file| file.take(MAX_FILE + 1).read_to_string(&mut text))
        .map_err(|error| error.to_string())?;
    if read as u64 > MAX_FILE {
        return Err(format!("it is longer than {MAX_FILE} bytes"));
    }
    Ok(text)
}
