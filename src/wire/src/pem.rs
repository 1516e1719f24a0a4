//! PEM as Go's `encoding/pem` writes it: 64 columns, `\n`, a newline at the end (RFC 7468; `protocols/kcrypt.md` §5.2).

use base64::{Engine, engine::general_purpose::STANDARD};

use crate::{Error, MAX_MESSAGE, Result};

/// Label of a DER certificate.
pub const CERTIFICATE: &str = "CERTIFICATE";
/// Label of a DER SubjectPublicKeyInfo.
pub const PUBLIC_KEY: &str = "PUBLIC KEY";

const COLUMNS: usize = 64;
const BEGIN: &str = "-----BEGIN ";
const END: &str = "-----END ";
const DASHES: &str = "-----";

/// One block of PEM text; 451 bytes for the SubjectPublicKeyInfo of a 2048-bit RSA key.
#[must_use]
pub fn encode(label: &str, der: &[u8]) -> String {
    let mut out = format!("{BEGIN}{label}{DASHES}\n");
    let encoded = STANDARD.encode(der);
    let mut rest = encoded.as_str();
    while !rest.is_empty() {
        let (line, after) = rest.split_at_checked(COLUMNS).unwrap_or((rest, ""));
        out.push_str(line);
        out.push('\n');
        rest = after;
    }
    out.push_str(&format!("{END}{label}{DASHES}\n"));
    out
}

/// The first block of PEM text: label and DER. What stands before and after it is ignored, as Go does.
pub fn first_block(text: &str) -> Result<(&str, Vec<u8>)> {
    if text.len() > MAX_MESSAGE {
        return Err(Error::TooLong { what: "PEM text", limit: MAX_MESSAGE, got: text.len() });
    }
    let mut lines = text.lines().map(str::trim_end);
    let label = lines
        .find_map(|line| line.strip_prefix(BEGIN)?.strip_suffix(DASHES))
        .ok_or(Error::InvalidPem)?;
    let mut encoded = String::new();
    for line in lines {
        if let Some(end) = line.strip_prefix(END) {
            if end.strip_suffix(DASHES) != Some(label) {
                return Err(Error::InvalidPem);
            }
            let der = STANDARD.decode(&encoded).map_err(|_| Error::InvalidPem)?;
            return Ok((label, der));
        }
        // RFC 1421 headers ("Proc-Type: …") never occur in what we read.
        encoded.push_str(line.trim_start());
    }
    Err(Error::InvalidPem)
}
