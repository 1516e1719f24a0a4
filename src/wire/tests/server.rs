//! What a key server checks, against genuine TPM output (`protocols/kcrypt.md` §3, §4, §6.5).
#![cfg(feature = "server")]
#![allow(clippy::unwrap_used, clippy::indexing_slicing)] // helpers of tests

use latchkey_wire::{
    attest::{self, AttestationParameters},
    credential::{kdfa, make_credential, split_credential},
    ek,
    quote::{self, KCRYPT_PCRS, PcrQuote, Policy},
    v1,
};
use serde_json::Value;

mod common;
use common::{base64, hex, unhex, vectors};

fn parameters(value: &Value) -> AttestationParameters {
    AttestationParameters::from_json(value.to_string().as_bytes()).unwrap()
}

/// A vector of §4.3 as hexadecimal text.
const NAME: &str = "000b12632540cbbb58767006f9bc138f643ba7e90b95cd7f0d14629fddec57aeeb0d";
const CREDENTIAL: &str = "00440020f73146af34ded6a8ba88e33e4c547685b119b0b214b61cd79a60a0da946740087d66072a7a6ed1668591e884c35fd11deb250079e16bc77dda49bb34a2e9929a648a";

fn counting<const N: usize>() -> [u8; N] {
    std::array::from_fn(|at| at as u8)
}

#[test]
fn kdfa_makes_the_keys_of_the_vector() {
    let seed: [u8; 16] = counting();
    assert_eq!(
        hex(&kdfa(&seed, "STORAGE", &unhex(NAME), &[], 128).unwrap()),
        "da14de462d0b449e8c38ba604db7bce5"
    );
    assert_eq!(
        hex(&kdfa(&seed, "INTEGRITY", &[], &[], 256).unwrap()),
        "9d0eee85ba906b4eb5a28628d1406fc399e7de87d400e0bc42d7c44617498077"
    );
    let long = kdfa(&seed, "X", &[], &[], 8 * 70).unwrap();
    assert_eq!(long.len(), 70);
    assert_ne!(long[..32], long[32..64]);
}

#[test]
fn a_credential_is_the_vector_and_its_seed_opens_with_the_private_key() {
    let vectors = vectors();
    let software = &vectors["software_ek"];
    let private = common::software_ek(&vectors);
    let ek = common::software_ek_public(&vectors);
    for (name, credential) in [
        (NAME.to_owned(), CREDENTIAL.to_owned()),
        (
            software["name_hex"].as_str().unwrap().to_owned(),
            hex(&base64(&software["challenge_v1"]["EC"]["Credential"])),
        ),
    ] {
        let challenge = make_credential(&ek, &unhex(&name), &counting(), &counting()).unwrap();
        assert_eq!(hex(&challenge.credential), credential);
        assert_eq!((challenge.credential.len(), challenge.secret.len()), (70, 258));
        let parts = split_credential(&challenge.credential, &challenge.secret).unwrap();
        assert_eq!((parts.id_object.len(), parts.encrypted_secret.len()), (68, 256));
        assert_eq!(common::open_seed(&private, parts.encrypted_secret), counting::<16>());
        assert_eq!(common::activate(&private, &unhex(&name), &challenge), counting::<32>());
    }
}

#[test]
fn the_recorded_challenge_is_read_and_opens() {
    let vectors = vectors();
    let recorded = vectors["software_ek"]["challenge_v1"].to_string();
    let challenge = v1::Challenge::from_json(recorded.as_bytes()).unwrap();
    let written: Value = serde_json::from_str(&challenge.to_json()).unwrap();
    assert_eq!(written, vectors["software_ek"]["challenge_v1"]);
    let name = unhex(vectors["software_ek"]["name_hex"].as_str().unwrap());
    let secret = common::activate(&common::software_ek(&vectors), &name, &challenge);
    assert_eq!(hex(&secret), vectors["software_ek"]["secret_hex"]);
}

#[test]
fn genuine_attestation_keys_pass() {
    let vectors = vectors();
    for (ak, name) in [
        ("/ak_params_v2", "ak_name_hex"),
        ("/v2_init/ak_params", "ak_name_hex"),
        ("/v1_token_json/AK", "v1_ak_name_hex"),
    ] {
        let ak = attest::check_ak(&parameters(vectors.pointer(ak).unwrap())).unwrap();
        assert_eq!(hex(&ak.name), vectors[name]);
        assert_eq!((ak.key.modulus.len(), ak.key.exponent), (256, 65537));
    }
}

#[test]
fn an_attestation_key_with_any_byte_changed_cut_or_added_is_refused() {
    let vectors = vectors();
    let genuine = parameters(&vectors["v1_token_json"]["AK"]);
    type Part = fn(&mut AttestationParameters) -> &mut Vec<u8>;
    let parts: [(&str, Part); 4] = [
        ("Public", |ak| &mut ak.public),
        ("CreateData", |ak| &mut ak.create_data),
        ("CreateAttestation", |ak| &mut ak.create_attestation),
        ("CreateSignature", |ak| &mut ak.create_signature),
    ];
    for (name, part) in parts {
        let length = part(&mut genuine.clone()).len();
        for at in 0..length {
            let mut cut = genuine.clone();
            part(&mut cut).truncate(at);
            assert!(attest::check_ak(&cut).is_err(), "{name} cut at {at}");
            for bit in [0x01, 0x80] {
                let mut flipped = genuine.clone();
                part(&mut flipped)[at] ^= bit;
                assert!(attest::check_ak(&flipped).is_err(), "{name} flipped at {at}");
            }
        }
        let mut longer = genuine.clone();
        part(&mut longer).push(0);
        assert!(attest::check_ak(&longer).is_err(), "{name} with a byte more");
    }
}

/// The checks in front of the signature, each on its own: what is changed in a genuine public area and attestation,
/// re-hashed so that only the check in question is left to object.
#[test]
fn each_rule_for_attestation_keys_has_its_own_refusal() {
    let genuine = parameters(&vectors()["v1_token_json"]["AK"]);
    let consistent = |change: &dyn Fn(&mut AttestationParameters)| {
        let mut ak = genuine.clone();
        change(&mut ak);
        let (public, data) = (attest::ak_name(&ak.public), attest::ak_name(&ak.create_data));
        let length = ak.create_attestation.len();
        if length == 139 {
            ak.create_attestation[length - 34 - 34..length - 34].copy_from_slice(&public);
            ak.create_attestation[length - 32..].copy_from_slice(&data[2..]);
        }
        ak
    };
    type Change<'a> = &'a dyn Fn(&mut AttestationParameters);
    let cases: [(&str, &str, Change<'_>); 13] = [
        ("signature", "too short to be valid: only 7 bytes", &|ak| ak.create_signature.truncate(7)),
        ("quote", "got tag 8018", &|ak| {
            let quote = base64(&vectors()["quote_empty_nonce"]["quote"]["quote"]);
            ak.create_attestation = quote;
        }),
        ("tag", "got tag 8017", &|ak| ak.create_attestation[5] = 0x17),
        ("magic", "not produced by a TPM", &|ak| ak.create_attestation[0] = 0xfe),
        ("exportable", "AK is exportable", &|ak| ak.public[7] &= !0x02),
        ("fixedParent", "not limited to attestation", &|ak| ak.public[7] &= !0x10),
        ("origin", "not limited to attestation", &|ak| ak.public[7] &= !0x20),
        ("restricted", "not limited to attestation", &|ak| ak.public[5] &= !0x01),
        ("sign", "not limited to attestation", &|ak| ak.public[5] &= !0x04),
        ("decrypt", "not limited to attestation", &|ak| ak.public[5] |= 0x02),
        ("scheme", "scheme must be RSASSA", &|ak| ak.public[13] = 0x16),
        ("small", "too small", &|ak| ak.public[16] = 4),
        ("nothing", "could not verify attestation", &|ak| ak.create_data[40] ^= 1),
    ];
    for (case, text, change) in cases {
        let error = attest::check_ak(&consistent(change)).expect_err(case).to_string();
        assert!(error.contains(text), "{case}: {error}");
    }
}

fn quote_of(name: &str) -> PcrQuote {
    PcrQuote::from_json(vectors()[name].to_string().as_bytes()).unwrap()
}

#[test]
fn a_quote_counts_with_the_nonce_and_an_empty_one_only_by_flag() {
    let vectors = vectors();
    let ak = attest::check_ak(&parameters(&vectors["ak_params_v2"])).unwrap();
    let nonce: [u8; 32] = base64(&vectors["activation_secret_b64"]).try_into().unwrap();
    let other = [7; 32];
    for (case, name, nonce, allow_empty_nonce, allowed, accepted) in [
        ("nonce", "quote_nonce_is_secret", &nonce, false, &KCRYPT_PCRS[..], true),
        ("nonce, flag", "quote_nonce_is_secret", &nonce, true, &KCRYPT_PCRS, true),
        ("more allowed", "quote_nonce_is_secret", &nonce, false, &[0, 1, 2, 7, 11, 14], true),
        ("fewer allowed", "quote_nonce_is_secret", &nonce, false, &[0, 7], false),
        ("other nonce", "quote_nonce_is_secret", &other, false, &KCRYPT_PCRS, false),
        ("other nonce, flag", "quote_nonce_is_secret", &other, true, &KCRYPT_PCRS, false),
        ("empty", "quote_empty_nonce", &nonce, false, &KCRYPT_PCRS, false),
        ("empty, flag", "quote_empty_nonce", &nonce, true, &KCRYPT_PCRS, true),
        ("reordered", "MUST_REJECT_quote_selection_reorder", &nonce, true, &KCRYPT_PCRS, false),
        (
            "reordered, all allowed",
            "MUST_REJECT_quote_selection_reorder",
            &nonce,
            true,
            &[0, 7, 11, 16, 23],
            false,
        ),
    ] {
        let verified =
            quote::verify(&ak, &quote_of(name), &Policy { nonce, allow_empty_nonce, allowed });
        assert_eq!(verified.is_ok(), accepted, "{case}: {verified:?}");
        for (index, value) in verified.unwrap_or_default() {
            assert_eq!(hex(&value), vectors["pcr_hex"][index.to_string()], "{case}");
        }
    }
}

#[test]
fn a_quote_of_another_key_or_with_a_byte_changed_is_refused() {
    let vectors = vectors();
    let ak = attest::check_ak(&parameters(&vectors["ak_params_v2"])).unwrap();
    let nonce: [u8; 32] = base64(&vectors["activation_secret_b64"]).try_into().unwrap();
    let policy = Policy { nonce: &nonce, allow_empty_nonce: true, allowed: &KCRYPT_PCRS };
    let genuine = quote_of("quote_nonce_is_secret");
    let stranger = attest::check_ak(&parameters(&vectors["v1_token_json"]["AK"])).unwrap();
    assert!(quote::verify(&stranger, &genuine, &policy).is_err());
    type Part = fn(&mut PcrQuote) -> &mut Vec<u8>;
    let parts: [(&str, Part); 5] = [
        ("quote", |quote| &mut quote.quote),
        ("signature", |quote| &mut quote.signature),
        ("PCR 0", |quote| quote.pcrs.get_mut(&0).unwrap()),
        ("PCR 7", |quote| quote.pcrs.get_mut(&7).unwrap()),
        ("PCR 11", |quote| quote.pcrs.get_mut(&11).unwrap()),
    ];
    for (name, part) in parts {
        for at in 0..part(&mut genuine.clone()).len() {
            let (mut cut, mut flipped) = (genuine.clone(), genuine.clone());
            part(&mut cut).truncate(at);
            part(&mut flipped)[at] ^= 0x40;
            assert!(quote::verify(&ak, &cut, &policy).is_err(), "{name} cut at {at}");
            assert!(quote::verify(&ak, &flipped, &policy).is_err(), "{name} flipped at {at}");
        }
        let mut longer = genuine.clone();
        part(&mut longer).push(0);
        assert!(quote::verify(&ak, &longer, &policy).is_err(), "{name} with a byte more");
    }
    let mut missing = genuine.clone();
    missing.pcrs.remove(&7);
    assert!(quote::verify(&ak, &missing, &policy).is_err());
    let mut more = genuine.clone();
    more.pcrs.insert(8, vec![0; 32]);
    assert!(quote::verify(&ak, &more, &policy).is_err());
}

#[test]
fn a_quote_is_written_as_it_is_read() {
    for name in
        ["quote_empty_nonce", "quote_nonce_is_secret", "MUST_REJECT_quote_selection_reorder"]
    {
        let written: Value = serde_json::from_str(&quote_of(name).to_json()).unwrap();
        assert_eq!(written, vectors()[name]);
    }
    for wrong in [
        r#"{"pcrs":{"x":""}}"#,
        r#"{"pcrs":{"07":""}}"#,
        r#"{"pcrs":{"-1":""}}"#,
        r#"{"pcrs":{"7":"","7":""}}"#,
        r#"{"quote":"AA=="}"#,
    ] {
        assert!(PcrQuote::from_json(wrong.as_bytes()).is_err(), "{wrong}");
    }
}

#[test]
fn only_an_ek_of_2048_bits_gets_a_credential() {
    let mut modulus = vec![0xff; 384];
    let large = ek::RsaPublicKey::new(&modulus, 0).unwrap();
    assert!(make_credential(&large, &[0; 34], &[0; 32], &[0; 16]).is_err());
    modulus.truncate(255);
    assert!(ek::RsaPublicKey::new(&modulus, 0).is_err());
}
