//! The endorsement key as others see it: its certificate in TPM NV index 0x01C00002 (TCG EK Credential Profile 2.5
//! §2.2.1.4; TCG PC Client Specific Implementation 1.2 §7.3.2 for the header), and the PEM a client shows to a server.
//!
//! The certificate is walked only as far as its SubjectPublicKeyInfo (RFC 5280 §4.1). Makers put many a field into
//! these certificates that a validating parser refuses, and nothing here depends on any other field: the
//! machine proves itself by its key, not by the maker's signature.

use der::{Header, Reader as _, SliceReader};

use crate::{Error, Result, pem, pubhash};

/// Most bytes read for a certificate. Those of real TPMs have 800 to 2,000.
pub const MAX_CERTIFICATE: usize = 16 * 1024;

/// The TCG header "stored certificate, full certificate" before the DER of some makers: tag 0x1001, type 0.
const TCG_HEADER: [u8; 3] = [0x10, 0x01, 0x00];

const BOOLEAN_OR_CONTEXT_0: u8 = 0xa0;
const INTEGER: u8 = 0x02;
const BIT_STRING: u8 = 0x03;
const OBJECT_IDENTIFIER: u8 = 0x06;
const UTC_TIME: u8 = 0x17;
const GENERALIZED_TIME: u8 = 0x18;
const SEQUENCE: u8 = 0x30;

/// 1.2.840.113549.1.1: PKCS#1; the next byte says which.
const PKCS1: [u8; 8] = [0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01];
const RSA_ENCRYPTION: u8 = 1;
/// Infineon marks its EKs so; Go reads no key at all from such a certificate.
const ID_RSAES_OAEP: u8 = 7;
const RSASSA_PSS: u8 = 10;
/// 1.2.840.10045.2.1: id-ecPublicKey.
const EC_PUBLIC_KEY: [u8; 7] = [0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01];

/// Smallest and largest accepted modulus, in bytes (2048 and 4096 bits).
const MODULUS_BYTES: std::ops::RangeInclusive<usize> = 256..=512;

/// An RSA public key: big-endian modulus without leading zeros, and exponent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RsaPublicKey {
    /// Big-endian, 256 to 512 bytes, no leading zero.
    pub modulus: Vec<u8>,
    /// Odd, at least 3; 65537 for every TPM.
    pub exponent: u32,
}

impl RsaPublicKey {
    /// Checks the bounds. `exponent` 0 means 65537, as in a TPM public area.
    pub fn new(modulus: &[u8], exponent: u32) -> Result<Self> {
        let exponent = if exponent == 0 { 65537 } else { exponent };
        let zeros = modulus.iter().take_while(|&&byte| byte == 0).count();
        let modulus = modulus.get(zeros..).unwrap_or_default();
        if !MODULUS_BYTES.contains(&modulus.len()) {
            return Err(Error::RsaKey { reason: "its modulus must have 2048 to 4096 bits" });
        }
        if modulus.last().is_none_or(|low| low & 1 == 0) {
            return Err(Error::RsaKey { reason: "its modulus is even" });
        }
        if exponent < 3 || exponent & 1 == 0 {
            return Err(Error::RsaKey { reason: "its exponent must be odd and at least 3" });
        }
        Ok(Self { modulus: modulus.to_vec(), exponent })
    }

    /// DER SubjectPublicKeyInfo, always as `rsaEncryption`, whatever the certificate called it.
    #[must_use]
    pub fn spki(&self) -> Vec<u8> {
        pubhash::rsa_spki(&self.modulus, self.exponent)
    }

    /// The TPM hash of this key.
    #[must_use]
    pub fn pubhash(&self) -> pubhash::Pubhash {
        pubhash::Pubhash::of_spki(&self.spki())
    }

    /// Reads a DER SubjectPublicKeyInfo and nothing after it.
    pub fn from_spki(der: &[u8]) -> Result<Self> {
        let mut reader = Der::new(der)?;
        let key = read_spki(reader.enter(SEQUENCE)?)?;
        reader.end()?;
        Ok(key)
    }

    /// Reads what a client shows in its token: PEM of a certificate or of a public key (§5.2).
    pub fn from_pem(text: &str) -> Result<Self> {
        let (label, der) = pem::first_block(text)?;
        match label {
            pem::CERTIFICATE => certificate_public_key(&der)
                .and_then(|(modulus, exponent)| Self::new(&modulus, exponent)),
            pem::PUBLIC_KEY => Self::from_spki(&der),
            other => Err(Error::InvalidPemType(other.chars().take(40).collect())),
        }
    }
}

/// The public key in an EK certificate: modulus (big-endian, no leading zero) and exponent.
///
/// `blob` is what NV index 0x01C00002 holds: DER, with or without the TCG header, with or without bytes after it.
pub fn certificate_public_key(blob: &[u8]) -> Result<(Vec<u8>, u32)> {
    let mut certificate = Der::new(trim_certificate(blob)?)?.enter(SEQUENCE)?;
    let mut fields = certificate.enter(SEQUENCE)?;
    if fields.peek() == Some(BOOLEAN_OR_CONTEXT_0) {
        fields.skip()?; // version
    }
    fields.skip()?; // serialNumber
    fields.skip()?; // signature
    fields.skip()?; // issuer
    fields.skip()?; // validity
    fields.skip()?; // subject
    let key = read_spki(fields.enter(SEQUENCE)?)?;
    Ok((key.modulus, key.exponent))
}

/// From when until when a certificate is valid, in seconds since 1970: RFC 5280 §4.1.2.5.
pub fn certificate_validity(der: &[u8]) -> Result<(u64, u64)> {
    let mut certificate = Der::new(der)?.enter(SEQUENCE)?;
    let mut fields = certificate.enter(SEQUENCE)?;
    if fields.peek() == Some(BOOLEAN_OR_CONTEXT_0) {
        fields.skip()?; // version
    }
    fields.skip()?; // serialNumber
    fields.skip()?; // signature
    fields.skip()?; // issuer
    let mut validity = fields.enter(SEQUENCE)?;
    Ok((time(&mut validity)?, time(&mut validity)?))
}

/// `YYMMDDhhmmssZ` of 1950 to 2049, or `YYYYMMDDhhmmssZ`.
fn time(fields: &mut Der<'_>) -> Result<u64> {
    const BAD: Error = Error::Certificate { reason: "a time in it is not as RFC 5280 writes it" };
    let short = fields.peek() == Some(UTC_TIME);
    let text = fields.value(if short { UTC_TIME } else { GENERALIZED_TIME })?;
    let text = std::str::from_utf8(text).map_err(|_| BAD)?;
    let digits = text.strip_suffix('Z').filter(|digits| digits.bytes().all(|b| b.is_ascii_digit()));
    let digits = digits.ok_or(BAD)?;
    let (year, rest) = digits.split_at_checked(if short { 2 } else { 4 }).ok_or(BAD)?;
    let number = |text: &str| text.parse::<u64>().map_err(|_| BAD);
    let part = |at: usize| rest.get(at..at + 2).ok_or(BAD).and_then(number);
    let year = match number(year)? {
        year if !short => year,
        year if year < 50 => 2000 + year,
        year => 1900 + year,
    };
    let (month, day) = (part(0)?, part(2)?);
    let (hour, minute, second) = (part(4)?, part(6)?, part(8)?);
    if rest.len() != 10 || !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return Err(BAD);
    }
    // Hinnant's `days_from_civil`: years begin in March, so that a leap day ends one.
    let (year, month) =
        if month > 2 { (year, month - 3) } else { (year.saturating_sub(1), month + 9) };
    let days = 365 * year + year / 4 - year / 100 + year / 400 + (153 * month + 2) / 5 + day - 1;
    // What begins before 1970 began long ago.
    let days = days.saturating_sub(719_468);
    Ok(days * 86_400 + hour * 3_600 + minute * 60 + second)
}

/// The DER certificate alone: without TCG header, cut to the length its outer SEQUENCE says.
pub fn trim_certificate(blob: &[u8]) -> Result<&[u8]> {
    if blob.len() > MAX_CERTIFICATE {
        return Err(Error::TooLong {
            what: "EK certificate",
            limit: MAX_CERTIFICATE,
            got: blob.len(),
        });
    }
    let der = match blob.strip_prefix(&TCG_HEADER) {
        None => blob,
        Some([high, low, rest @ ..]) => {
            let length = usize::from(u16::from_be_bytes([*high, *low]));
            rest.get(..length).ok_or(Error::Certificate {
                reason: "its TCG header promises more bytes than there are",
            })?
        }
        Some(_) => return Err(Error::Certificate { reason: "its TCG header ends early" }),
    };
    if der.first() != Some(&SEQUENCE) {
        return Err(Error::Certificate { reason: "it does not begin with a SEQUENCE" });
    }
    let mut reader = Der::new(der)?;
    reader.skip()?;
    let length = der.len() - reader.remaining();
    der.get(..length).ok_or(Error::Certificate { reason: "it ends early" })
}

/// The inside of a SubjectPublicKeyInfo.
fn read_spki(mut spki: Der<'_>) -> Result<RsaPublicKey> {
    let mut algorithm = spki.enter(SEQUENCE)?;
    let oid = algorithm.value(OBJECT_IDENTIFIER)?;
    match oid.strip_prefix(&PKCS1) {
        Some([RSA_ENCRYPTION | ID_RSAES_OAEP | RSASSA_PSS]) => {}
        _ if oid == EC_PUBLIC_KEY => return Err(Error::EccEk),
        _ => {
            return Err(Error::EkAlgorithm {
                oid: pubhash::hex(oid.get(..oid.len().min(32)).unwrap_or_default()),
            });
        }
    }
    let Some((0, key)) = spki.value(BIT_STRING)?.split_first().map(|(unused, key)| (*unused, key))
    else {
        return Err(Error::Certificate { reason: "its public key is not a whole number of bytes" });
    };
    spki.end()?;
    let mut outer = Der::new(key)?;
    let mut numbers = outer.enter(SEQUENCE)?;
    outer.end()?;
    let modulus = numbers.value(INTEGER)?;
    let exponent = numbers.value(INTEGER)?;
    numbers.end()?;
    RsaPublicKey::new(unsigned(modulus)?, small(unsigned(exponent)?)?)
}

/// The magnitude of a DER INTEGER that must not be negative.
fn unsigned(value: &[u8]) -> Result<&[u8]> {
    match value {
        [] => Err(Error::RsaKey { reason: "a number in it is empty" }),
        [top, ..] if top & 0x80 != 0 => Err(Error::RsaKey { reason: "a number in it is negative" }),
        [0, rest @ ..] => Ok(rest),
        other => Ok(other),
    }
}

fn small(number: &[u8]) -> Result<u32> {
    if number.is_empty() || number.len() > 4 {
        return Err(Error::RsaKey { reason: "its exponent must have 1 to 32 bits" });
    }
    Ok(number.iter().fold(0, |value, &byte| value << 8 | u32::from(byte)))
}

/// Tag-length-value reading over the `der` crate, one level at a time.
struct Der<'a> {
    bytes: &'a [u8],
}

impl<'a> Der<'a> {
    fn new(bytes: &'a [u8]) -> Result<Self> {
        Ok(Self { bytes })
    }

    /// The tag byte of the next element.
    fn peek(&self) -> Option<u8> {
        self.bytes.first().copied()
    }

    fn remaining(&self) -> usize {
        self.bytes.len()
    }

    /// The value of the next element, whatever it is.
    fn skip(&mut self) -> Result<&'a [u8]> {
        const ENDS: Error =
            Error::Certificate { reason: "an ASN.1 element is malformed or ends early" };
        let mut reader = SliceReader::new(self.bytes).map_err(|_| ENDS)?;
        let header: Header = reader.decode().map_err(|_| ENDS)?;
        let value = reader.read_slice(header.length()).map_err(|_| ENDS)?;
        let used = usize::try_from(reader.position()).map_err(|_| ENDS)?;
        self.bytes = self.bytes.get(used..).ok_or(ENDS)?;
        Ok(value)
    }

    fn value(&mut self, tag: u8) -> Result<&'a [u8]> {
        if self.peek() != Some(tag) {
            return Err(Error::Certificate {
                reason: "an ASN.1 element is of another type than X.509 has there",
            });
        }
        self.skip()
    }

    fn enter(&mut self, tag: u8) -> Result<Der<'a>> {
        Der::new(self.value(tag)?)
    }

    fn end(self) -> Result<()> {
        if self.bytes.is_empty() {
            Ok(())
        } else {
            Err(Error::Certificate { reason: "bytes follow the end of an ASN.1 element" })
        }
    }
}
