//! The recorded vectors of `tests/vectors/kcrypt.json` (genuine TPM output; see `protocols/kcrypt.md` §13).
#![allow(clippy::unwrap_used)] // helpers of tests

use latchkey_wire::{
    attest, ek, pem,
    pubhash::{Pubhash, rsa_spki},
    v1, v2,
};
use serde_json::Value;

mod common;
use common::{base64, vectors};

fn parameters(value: &Value) -> attest::AttestationParameters {
    attest::AttestationParameters::from_json(value.to_string().as_bytes()).unwrap()
}

#[test]
fn the_pubhash_is_sha256_of_the_spki_and_the_spki_of_2048_bits_has_294_bytes() {
    let vectors = vectors();
    let spki = base64(&vectors["ek_spki_b64"]);
    let key = ek::RsaPublicKey::from_spki(&spki).unwrap();
    assert_eq!(spki.len(), 294);
    for exponent in [0, 65537] {
        assert_eq!(rsa_spki(&key.modulus, exponent), spki);
        let with_zero = [&[0][..], &key.modulus].concat();
        assert_eq!(rsa_spki(&with_zero, exponent), spki);
    }
    assert_eq!(Pubhash::of_spki(&spki).as_str(), vectors["pubhash"]);
    assert_eq!(key.pubhash().to_string(), vectors["pubhash"]);
}

#[test]
fn a_public_key_is_pem_of_451_bytes() {
    let vectors = vectors();
    let text = pem::encode(pem::PUBLIC_KEY, &base64(&vectors["ek_spki_b64"]));
    assert_eq!(text, vectors["ek_pem"].as_str().unwrap());
    assert_eq!(text.len(), 451);
    assert_eq!(ek::RsaPublicKey::from_pem(&text).unwrap().pubhash().as_str(), vectors["pubhash"]);
}

#[test]
fn the_authorization_header_is_the_recorded_one() {
    let vectors = vectors();
    let recorded = vectors["v1_authorization"].as_str().unwrap();
    let token = v1::Token {
        ek_pem: vectors["ek_pem"].as_str().unwrap().to_owned(),
        ak: parameters(&vectors["v1_token_json"]["AK"]),
    };
    assert_eq!(token.authorization_header(), recorded);
    assert_eq!(v1::Token::parse_authorization(recorded.as_bytes()).unwrap(), token);
    let bare = recorded.strip_prefix("Bearer TPM").unwrap();
    assert_eq!(v1::Token::parse_authorization(bare.as_bytes()).unwrap(), token);
    for wrong in [
        format!("Bearer TPM {bare}"),
        format!("bearer tpm{bare}"),
        format!("Bearer {bare}"),
        format!("{recorded}\n"),
    ] {
        assert!(v1::Token::parse_authorization(wrong.as_bytes()).is_err(), "{}", &wrong[..20]);
    }
}

#[test]
fn ak_names_are_the_recorded_ones() {
    let vectors = vectors();
    for (ak, name) in [
        (&vectors["ak_params_v2"], "ak_name_hex"),
        (&vectors["v1_token_json"]["AK"], "v1_ak_name_hex"),
    ] {
        assert_eq!(common::hex(&attest::ak_name(&parameters(ak).public)), vectors[name]);
    }
}

#[test]
fn ak_parameters_are_written_as_go_writes_them() {
    let recorded = &vectors()["ak_params_v2"];
    let written: Value = serde_json::from_str(&parameters(recorded).to_json()).unwrap();
    assert_eq!(&written, recorded);
}

fn init(vectors: &Value) -> v2::Init {
    v2::Init {
        ek_spki: base64(&vectors["ek_spki_b64"]),
        ak: parameters(&vectors["ak_params_v2"]),
        defer_pcr_enrollment: false,
        accepts_sealed: false,
        release_only: false,
    }
}

#[test]
fn the_init_of_generation_2_is_the_recorded_one() {
    let vectors = vectors();
    let (init, recorded) = (init(&vectors), &vectors["v2_init"]);
    let read = v2::Init::from_json(recorded.to_string().as_bytes()).unwrap();
    let deferred = recorded["defer_pcr_enrollment"].as_bool().unwrap_or_default();
    assert_eq!(read, v2::Init { defer_pcr_enrollment: deferred, ..init.clone() });
    let written: Value = serde_json::from_str(&read.to_json()).unwrap();
    assert_eq!(&written, recorded);
    assert!(read.to_json().ends_with("}\n"));
    let ours = v2::Init { accepts_sealed: true, release_only: true, ..init.clone() };
    assert_eq!(v2::Init::from_json(ours.to_json().as_bytes()).unwrap(), ours);
    for key in ["accepts_sealed", "release_only", "defer_pcr_enrollment"] {
        assert!(!init.to_json().contains(key), "nothing more than upstream sends");
    }
}

#[test]
fn the_proof_of_generation_2_carries_the_recorded_quote_as_an_object() {
    let vectors = vectors();
    let secret = base64(&vectors["activation_secret_b64"]);
    let recorded = serde_json::json!({
        "secret": vectors["activation_secret_b64"],
        "pcr_quote": vectors["quote_nonce_is_secret"],
    });
    let proof = v2::Proof::from_json(recorded.to_string().as_bytes()).unwrap();
    assert_eq!(*proof.secret.0, secret);
    assert_eq!(proof.pcr_quote.pcrs.keys().copied().collect::<Vec<_>>(), [0, 7, 11]);
    let written: Value = serde_json::from_str(&proof.to_json()).unwrap();
    assert_eq!(written, recorded);
    assert!(!format!("{proof:?}").contains(vectors["activation_secret_b64"].as_str().unwrap()));
}
