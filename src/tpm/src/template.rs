//! The public areas of the keys kcrypt uses, byte for byte: TPMT_PUBLIC, `protocols/kcrypt.md` §1.3.
//!
//! Another byte in a template is another key from the same seed, so they are kept as bytes and never
//! built from parts.

use tss_esapi::structures::Public;
use tss_esapi::traits::UnMarshall;

use crate::TpmError;

const RSA_2048_UNIQUE_ZERO: [u8; 258] = {
    let mut unique = [0; 258];
    unique[0] = 0x01; // 256 bytes
    unique
};

// Evaluated by the compiler, where an index out of bounds is an error and not a panic.
#[allow(clippy::indexing_slicing)]
const fn with_zero_unique<const HEAD: usize, const ALL: usize>(head: [u8; HEAD]) -> [u8; ALL] {
    let mut all = [0; ALL];
    let mut i = 0;
    while i < HEAD {
        all[i] = head[i];
        i += 1;
    }
    let mut j = 0;
    while j < RSA_2048_UNIQUE_ZERO.len() {
        all[HEAD + j] = RSA_2048_UNIQUE_ZERO[j];
        j += 1;
    }
    all
}

/// The RSA-2048 endorsement key: TCG EK Credential Profile 2.5, template L-1. 314 bytes.
pub const EK: [u8; 314] = with_zero_unique([
    0x00, 0x01, 0x00, 0x0b, 0x00, 0x03, 0x00, 0xb2, 0x00, 0x20, 0x83, 0x71, 0x97, 0x67, 0x44, 0x84,
    0xb3, 0xf8, 0x1a, 0x90, 0xcc, 0x8d, 0x46, 0xa5, 0xd7, 0x24, 0xfd, 0x52, 0xd7, 0x6e, 0x06, 0x52,
    0x0b, 0x64, 0xf2, 0xa1, 0xda, 0x1b, 0x33, 0x14, 0x69, 0xaa, 0x00, 0x06, 0x00, 0x80, 0x00, 0x43,
    0x00, 0x10, 0x08, 0x00, 0x00, 0x00, 0x00, 0x00,
]);

/// The RSA-2048 storage root key: TCG Provisioning Guidance, template H-1 with noDA. 282 bytes.
pub const SRK: [u8; 282] = with_zero_unique([
    0x00, 0x01, 0x00, 0x0b, 0x00, 0x03, 0x04, 0x72, 0x00, 0x00, 0x00, 0x06, 0x00, 0x80, 0x00, 0x43,
    0x00, 0x10, 0x08, 0x00, 0x00, 0x00, 0x00, 0x00,
]);

/// The attestation key of both generations (v2's, with noDA: one power cut less counts as an
/// attack). RSASSA with SHA-256, 24 bytes.
pub const AK: [u8; 24] = [
    0x00, 0x01, 0x00, 0x0b, 0x00, 0x05, 0x04, 0x72, 0x00, 0x00, 0x00, 0x10, 0x00, 0x14, 0x00, 0x0b,
    0x08, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
];

/// The RSA-OAEP key of v1 that seals passphrases (`c_index`). 22 bytes: `unique` is empty, which
/// makes it another key than v2's.
pub const BLOB_KEY: [u8; 22] = [
    0x00, 0x01, 0x00, 0x0b, 0x00, 0x06, 0x00, 0x60, 0x00, 0x00, 0x00, 0x10, 0x00, 0x10, 0x08, 0x00,
    0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
];

/// v2's OAEP key: the same head, but `unique` has the length of a modulus, all zero. 278 bytes.
#[must_use]
pub fn blob_key_v2() -> Vec<u8> {
    let head = BLOB_KEY.len() - 2;
    [BLOB_KEY.get(..head).unwrap_or_default(), &RSA_2048_UNIQUE_ZERO].concat()
}

/// An HMAC-SHA256 key of the endorsement hierarchy, for [`crate::Tpm::machine_secret`]: fixedTPM,
/// fixedParent, sensitiveDataOrigin, userWithAuth, noDA, sign; `unique` is SHA-256 of
/// `latchkey machine secret v1`, so that no other program comes to the same key by accident.
pub const MACHINE_KEY: [u8; 48] = [
    0x00, 0x08, 0x00, 0x0b, 0x00, 0x04, 0x04, 0x72, 0x00, 0x00, 0x00, 0x05, 0x00, 0x0b, 0x00, 0x20,
    0xb0, 0x60, 0x8c, 0xbd, 0x3b, 0xbc, 0xc3, 0x58, 0x51, 0x59, 0x86, 0x59, 0xea, 0xd2, 0x18, 0xf4,
    0xb4, 0x01, 0x0c, 0x6b, 0x49, 0x76, 0x51, 0x31, 0xc8, 0x26, 0xb5, 0xc4, 0xfa, 0x6a, 0xf0, 0xd6,
];

/// Length of the part of [`EK`] and [`SRK`] before `unique`.
pub(crate) fn head(template: &[u8]) -> &[u8] {
    let head = template.len().saturating_sub(RSA_2048_UNIQUE_ZERO.len());
    template.get(..head).unwrap_or_default()
}

pub(crate) fn public(template: &[u8]) -> Result<Public, TpmError> {
    Public::unmarshall(template)
        .map_err(|error| TpmError::Library { operation: "reading a key template", error })
}
