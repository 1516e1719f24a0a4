//! Structures of the TPM 2.0 Library, Part 2, and keys and certificates around them.

use latchkey_wire::attest::{Attest, Attested, CreationData, RsaPublicArea, RsaSignature};
use latchkey_wire::credential::split_credential;
use latchkey_wire::ek::{
    MAX_CERTIFICATE, RsaPublicKey, certificate_public_key, certificate_validity, trim_certificate,
};
use latchkey_wire::pem;
use latchkey_wire::pubhash::Pubhash;

/// Each is strict: what was read has no byte after it, so the same bytes with one more are refused.
pub(crate) fn structure(data: &[u8]) {
    let mut longer = data.to_vec();
    longer.push(0);
    if RsaPublicArea::parse(data).is_ok() {
        assert!(RsaPublicArea::parse(&longer).is_err());
    }
    if CreationData::parse(data).is_ok() {
        assert!(CreationData::parse(&longer).is_err());
    }
    if let Ok(attest) = Attest::parse(data) {
        assert_eq!(attest.made_by_tpm(), data.starts_with(&[0xff, 0x54, 0x43, 0x47]));
        // Of another kind only the tag is told.
        let is_read = !matches!(attest.attested, Attested::Other(_));
        assert!(!is_read || Attest::parse(&longer).is_err());
    }
    if RsaSignature::parse(data).is_ok() {
        assert!(RsaSignature::parse(&longer).is_err());
    }
    let (credential, secret) = data.split_at(data.len().min(70));
    if let Ok(parts) = split_credential(credential, secret) {
        assert_eq!((parts.id_object.len(), parts.encrypted_secret.len()), (68, 256));
    }
}

/// NV certificates, SubjectPublicKeyInfo, PEM, and the machine's name.
pub(crate) fn ek(data: &[u8]) {
    if let Ok(trimmed) = trim_certificate(data) {
        assert!(trimmed.len() <= data.len());
        assert_eq!(trim_certificate(trimmed).unwrap(), trimmed);
    }
    if let Ok((modulus, exponent)) = certificate_public_key(data) {
        assert!(data.len() <= MAX_CERTIFICATE + 64);
        assert_eq!(RsaPublicKey::new(&modulus, exponent).unwrap().modulus, modulus);
    }
    if let Ok((from, until)) = certificate_validity(data) {
        // The year 10000, give or take.
        assert!(from.max(until) < 253_402_300_800 + 31 * 86_400);
    }
    if let Ok(key) = RsaPublicKey::from_spki(data) {
        assert_eq!(RsaPublicKey::from_spki(&key.spki()).unwrap(), key);
        assert_eq!(Pubhash::parse(key.pubhash().as_str()).unwrap(), key.pubhash());
    }
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok((label, der)) = pem::first_block(text) {
        let written = pem::encode(label, &der);
        assert_eq!(pem::first_block(&written).unwrap(), (label, der));
    }
    let _ = RsaPublicKey::from_pem(text);
    if let Ok(pubhash) = Pubhash::parse(text) {
        assert_eq!(pubhash.as_str().len(), 64);
    }
}
