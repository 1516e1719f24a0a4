//! What the tests of this crate share.
#![allow(
    dead_code,
    unused_imports,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing
)] // each test program uses its part

use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::Value;

pub(crate) fn vectors() -> Value {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/vectors/kcrypt.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

pub(crate) fn base64(value: &Value) -> Vec<u8> {
    STANDARD.decode(value.as_str().unwrap()).unwrap()
}

pub(crate) fn unhex(text: &str) -> Vec<u8> {
    (0..text.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap())
        .collect()
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(feature = "server")]
pub(crate) use tpm::*;

/// The part of a TPM that a key server meets, in software: TPM2_ActivateCredential with the vector's private EK.
#[cfg(feature = "server")]
mod tpm {
    use aws_lc_rs::{
        cipher::{AES_128, DecryptingKey, DecryptionContext, UnboundCipherKey},
        iv::FixedLength,
        rsa::{OAEP_SHA256_MGF1SHA256, OaepPrivateDecryptingKey, PrivateDecryptingKey},
    };
    use hmac::{Hmac, KeyInit, Mac};
    use latchkey_wire::{
        credential::{kdfa, split_credential},
        ek::RsaPublicKey,
        pem,
        v1::Challenge,
    };
    use serde_json::Value;

    pub(crate) fn software_ek(vectors: &Value) -> OaepPrivateDecryptingKey {
        let text = vectors["software_ek"]["private_pkcs8_pem"].as_str().unwrap();
        let (_, der) = pem::first_block(text).unwrap();
        OaepPrivateDecryptingKey::new(PrivateDecryptingKey::from_pkcs8(&der).unwrap()).unwrap()
    }

    pub(crate) fn software_ek_public(vectors: &Value) -> RsaPublicKey {
        use aws_lc_rs::encoding::{AsDer, PublicKeyX509Der};
        let text = vectors["software_ek"]["private_pkcs8_pem"].as_str().unwrap();
        let (_, der) = pem::first_block(text).unwrap();
        let public = PrivateDecryptingKey::from_pkcs8(&der).unwrap().public_key();
        let spki: PublicKeyX509Der<'_> = public.as_der().unwrap();
        RsaPublicKey::from_spki(spki.as_ref()).unwrap()
    }

    pub(crate) fn open_seed(ek: &OaepPrivateDecryptingKey, encrypted: &[u8]) -> Vec<u8> {
        let mut out = vec![0; ek.min_output_size()];
        ek.decrypt(&OAEP_SHA256_MGF1SHA256, encrypted, &mut out, Some(b"IDENTITY\0"))
            .unwrap()
            .to_vec()
    }

    pub(crate) fn activate(
        ek: &OaepPrivateDecryptingKey,
        name: &[u8],
        challenge: &Challenge,
    ) -> Vec<u8> {
        let parts = split_credential(&challenge.credential, &challenge.secret).unwrap();
        let seed = open_seed(ek, parts.encrypted_secret);
        let (mac, identity) = parts.id_object[2..].split_at(32);
        let mut check =
            Hmac::<sha2::Sha256>::new_from_slice(&kdfa(&seed, "INTEGRITY", &[], &[], 256).unwrap())
                .unwrap();
        check.update(identity);
        check.update(name);
        check.verify_slice(mac).expect("TPM_RC_INTEGRITY");
        let key = UnboundCipherKey::new(&AES_128, &kdfa(&seed, "STORAGE", name, &[], 128).unwrap())
            .unwrap();
        let mut identity = identity.to_vec();
        DecryptingKey::cfb128(key)
            .unwrap()
            .decrypt(&mut identity, DecryptionContext::Iv128(FixedLength::from([0u8; 16])))
            .unwrap();
        assert_eq!(identity[..2], [0, 32]);
        identity[2..].to_vec()
    }
}
