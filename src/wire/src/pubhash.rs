//! The TPM hash ("pubhash") that names a machine: lower-case hex of SHA-256 over the DER of the EK's
//! SubjectPublicKeyInfo (`protocols/kcrypt.md` §1.1; RFC 5280 §4.1.2.7, RFC 3279 §2.3.1).

use std::{fmt, str::FromStr};

use sha2::{Digest, Sha256};

use crate::{Error, Result};

/// `rsaEncryption` (1.2.840.113549.1.1.1) with its explicit NULL parameter, as a DER AlgorithmIdentifier.
const RSA_ENCRYPTION: [u8; 15] =
    [0x30, 0x0d, 0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x01, 0x05, 0x00];

const INTEGER: u8 = 0x02;
const BIT_STRING: u8 = 0x03;
const SEQUENCE: u8 = 0x30;

/// DER SubjectPublicKeyInfo of an RSA key; 294 bytes for a 2048-bit modulus and exponent 65537.
///
/// `modulus` is big-endian, leading zeros are dropped. `exponent` 0 means 65537, as in a TPM public area.
#[must_use]
pub fn rsa_spki(modulus: &[u8], exponent: u32) -> Vec<u8> {
    let exponent = if exponent == 0 { 65537 } else { exponent };
    let mut numbers = unsigned(modulus);
    numbers.extend(unsigned(&exponent.to_be_bytes()));
    let mut bit_string = vec![0]; // no unused bits
    bit_string.extend(tlv(SEQUENCE, &numbers));
    let mut body = RSA_ENCRYPTION.to_vec();
    body.extend(tlv(BIT_STRING, &bit_string));
    tlv(SEQUENCE, &body)
}

/// DER INTEGER of an unsigned big-endian number.
fn unsigned(number: &[u8]) -> Vec<u8> {
    let significant = number
        .iter()
        .position(|&byte| byte != 0)
        .map_or(&[][..], |at| number.get(at..).unwrap_or_default());
    let mut value = Vec::with_capacity(significant.len() + 1);
    if significant.first().is_none_or(|&top| top & 0x80 != 0) {
        value.push(0);
    }
    value.extend_from_slice(significant);
    tlv(INTEGER, &value)
}

fn tlv(tag: u8, value: &[u8]) -> Vec<u8> {
    let mut out = vec![tag];
    let length = value.len().to_be_bytes();
    let significant: Vec<u8> = length.into_iter().skip_while(|&byte| byte == 0).collect();
    match significant.as_slice() {
        [] => out.push(0),
        [short] if *short < 0x80 => out.push(*short),
        long => {
            out.push(0x80 | long.len() as u8);
            out.extend_from_slice(long);
        }
    }
    out.extend_from_slice(value);
    out
}

/// A TPM hash. Always valid: 64 lower-case hexadecimal digits.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pubhash(String);

impl Pubhash {
    /// The hash of a DER SubjectPublicKeyInfo.
    #[must_use]
    pub fn of_spki(spki: &[u8]) -> Self {
        Self(hex(&Sha256::digest(spki)))
    }

    /// Reads 64 hexadecimal digits. Upper case is taken too: an operator who pastes it means the same machine.
    pub fn parse(text: &str) -> Result<Self> {
        if text.len() != 64 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(Error::Pubhash { got: text.chars().count() });
        }
        Ok(Self(text.to_ascii_lowercase()))
    }

    /// The 64 digits.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Pubhash {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::parse(text)
    }
}

impl fmt::Display for Pubhash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Pubhash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pubhash({})", self.0)
    }
}

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    use fmt::Write as _;
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut out, byte| {
        let _ = write!(out, "{byte:02x}"); // writing to a String cannot fail
        out
    })
}
