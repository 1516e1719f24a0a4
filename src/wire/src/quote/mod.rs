//! A quote of PCRs as generation 2 sends it, and its verification (`protocols/kcrypt.md` §6.3 to §6.5).
//!
//! Upstream joins the bitmaps of all selections and forgets which value belongs to which index, so that whoever can
//! reset PCR 16 and 23 passes for any state. Here a quote counts only if it has exactly one selection, of the
//! SHA-256 bank, of indices the caller expects, signed over a nonce the caller chose.

#[cfg(feature = "server")]
mod verification;

use std::collections::BTreeMap;

use base64::{Engine, engine::general_purpose::STANDARD};
use serde::de::{self, MapAccess};

#[cfg(feature = "server")]
pub use self::verification::{Policy, verify};
use crate::{
    Result,
    go_json::{self, GoObject},
};

/// The PCRs kcrypt quotes: firmware, Secure Boot state, unified kernel image.
pub const KCRYPT_PCRS: [u32; 3] = [0, 7, 11];

/// A TPM has at most this many PCRs.
const MOST_PCRS: usize = 32;

/// The JSON object `pcr_quote`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PcrQuote {
    /// TPMS_ATTEST of type quote.
    pub quote: Vec<u8>,
    /// TPMT_SIGNATURE by the AK.
    pub signature: Vec<u8>,
    /// The values the quote is about, by index.
    pub pcrs: BTreeMap<u32, Vec<u8>>,
}

impl PcrQuote {
    /// Reads the object. `quote.version` is not looked at, as upstream.
    pub fn from_json(json: &[u8]) -> Result<Self> {
        go_json::parse("PCR quote", json)
    }

    /// The object as Go writes it: PCR keys in string order.
    #[must_use]
    pub fn to_json(&self) -> String {
        let sorted: BTreeMap<String, String> = self
            .pcrs
            .iter()
            .map(|(index, value)| (index.to_string(), STANDARD.encode(value)))
            .collect();
        let pcrs: Vec<String> =
            sorted.iter().map(|(index, value)| format!(r#""{index}":"{value}""#)).collect();
        format!(
            r#"{{"quote":{{"version":"2","quote":"{}","signature":"{}"}},"pcrs":{{{}}}}}"#,
            STANDARD.encode(&self.quote),
            STANDARD.encode(&self.signature),
            pcrs.join(",")
        )
    }
}

impl GoObject for PcrQuote {
    fn take<'de, A: MapAccess<'de>>(&mut self, key: &str, map: &mut A) -> Result<bool, A::Error> {
        match key {
            "quote" => {
                let signed: Signed = go_json::object(map)?;
                (self.quote, self.signature) = (signed.quote, signed.signature);
            }
            "pcrs" => self.pcrs = go_json::object::<Pcrs, A>(map)?.0,
            _ => return Ok(false),
        }
        Ok(true)
    }
}

#[derive(Default)]
struct Signed {
    quote: Vec<u8>,
    signature: Vec<u8>,
}

impl GoObject for Signed {
    fn take<'de, A: MapAccess<'de>>(&mut self, key: &str, map: &mut A) -> Result<bool, A::Error> {
        match key {
            "quote" => self.quote = go_json::bytes(map)?,
            "signature" => self.signature = go_json::bytes(map)?,
            _ => return Ok(false),
        }
        Ok(true)
    }
}

#[derive(Default)]
struct Pcrs(BTreeMap<u32, Vec<u8>>);

impl GoObject for Pcrs {
    fn take<'de, A: MapAccess<'de>>(&mut self, key: &str, map: &mut A) -> Result<bool, A::Error> {
        let index: u32 =
            key.parse().map_err(|_| de::Error::custom("a PCR index is not a number"))?;
        if index.to_string() != key {
            return Err(de::Error::custom("a PCR index is not written plainly"));
        }
        let value = go_json::bytes(map)?;
        if self.0.insert(index, value).is_some() || self.0.len() > MOST_PCRS {
            return Err(de::Error::custom("a PCR is given twice, or too many are"));
        }
        Ok(true)
    }
}
