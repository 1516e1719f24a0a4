//! The formats a client speaks: what is written, what is read, and what is refused.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)] // helpers of tests

use base64::{Engine, engine::general_purpose::STANDARD};
use latchkey_wire::{
    Error, MAX_MESSAGE,
    credential::split_credential,
    ek::{self, RsaPublicKey},
    identity::{self, Identity},
    pem,
    plugin::{PartitionQuery, Request, Response},
    pubhash::{Pubhash, rsa_spki},
    timeline::{Mode, Outcome, Step, Timeline},
    v1::{Challenge, ChallengeResponse, Payload, Refusal, Release, Token, text},
};
use zeroize::Zeroizing;

mod common;
use common::{base64, hex, vectors};

fn tlv(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
    let body = parts.concat();
    let mut out = vec![tag];
    match body.len() {
        short @ 0..0x80 => out.push(short as u8),
        long => out.extend([0x82, (long >> 8) as u8, long as u8]),
    }
    out.extend(body);
    out
}

/// A SubjectPublicKeyInfo with another algorithm identifier.
fn spki_with(algorithm: &[u8], spki: &[u8]) -> Vec<u8> {
    tlv(0x30, &[algorithm, &spki[19..]])
}

/// A certificate with fields a validating parser would refuse: nothing in them is looked at.
fn certificate(version: &[u8], spki: &[u8]) -> Vec<u8> {
    let serial = tlv(0x02, &[&[0xff, 0x00]]); // negative
    let junk = tlv(0x30, &[&tlv(0x06, &[&[0x80]])]);
    let extensions = tlv(0xa3, &[&tlv(0x30, &[])]);
    let tbs = tlv(0x30, &[version, &serial, &junk, &junk, &junk, &junk, spki, &extensions]);
    tlv(0x30, &[&tbs, &junk, &tlv(0x03, &[&[0, 1, 2, 3]])])
}

const RSA: &[u8] = &[0x30, 13, 6, 9, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 1, 5, 0];
const OAEP: &[u8] = &[0x30, 13, 6, 9, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 7, 0x30, 0];
const PSS: &[u8] = &[0x30, 11, 6, 9, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 10];
const MD5_RSA: &[u8] = &[0x30, 13, 6, 9, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 4, 5, 0];
const EC: &[u8] = &[0x30, 9, 6, 7, 0x2a, 0x86, 0x48, 0xce, 0x3d, 2, 1];
const V3: &[u8] = &[0xa0, 3, 2, 1, 2];

#[test]
fn the_key_in_an_ek_certificate_is_found_whatever_the_maker_wrote_around_it() {
    let spki = base64(&vectors()["ek_spki_b64"]);
    let pubhash = vectors()["pubhash"].as_str().unwrap().to_owned();
    for (case, version, algorithm) in
        [("plain", V3, RSA), ("version 1", &[], RSA), ("Infineon", V3, OAEP), ("PSS", V3, PSS)]
    {
        let der = certificate(version, &spki_with(algorithm, &spki));
        let header = [&[0x10, 0x01, 0x00][..], &(der.len() as u16).to_be_bytes(), &der].concat();
        let loose_header =
            [&[0x10, 0x01, 0x00][..], &(der.len() as u16 + 3).to_be_bytes(), &der, &[0xff; 3]]
                .concat();
        for blob in [
            der.clone(),
            [&der[..], &[0xff; 40]].concat(),
            [&der[..], &[0; 3]].concat(),
            header.clone(),
            [&header[..], &[0; 500]].concat(),
            loose_header,
        ] {
            assert_eq!(ek::trim_certificate(&blob).unwrap(), der, "{case}");
            let (modulus, exponent) = ek::certificate_public_key(&blob).unwrap();
            assert_eq!(Pubhash::of_spki(&rsa_spki(&modulus, exponent)).as_str(), pubhash, "{case}");
        }
        let shown = pem::encode(pem::CERTIFICATE, &der);
        assert_eq!(RsaPublicKey::from_pem(&shown).unwrap().pubhash().as_str(), pubhash, "{case}");
        for at in 0..der.len() {
            assert!(ek::certificate_public_key(&der[..at]).is_err(), "{case} cut at {at}");
            assert!(ek::certificate_public_key(&header[..at + 5]).is_err(), "{case} cut at {at}");
            for bit in 0..8 {
                let mut flipped = der.clone();
                flipped[at] ^= 1 << bit;
                let _ = ek::certificate_public_key(&flipped); // must not panic; much of it is not looked at
            }
        }
    }
    let ecc = certificate(V3, &spki_with(EC, &spki));
    assert!(matches!(ek::certificate_public_key(&ecc), Err(Error::EccEk)));
    let other = certificate(V3, &spki_with(MD5_RSA, &spki));
    assert!(
        matches!(ek::certificate_public_key(&other), Err(Error::EkAlgorithm { oid }) if oid == "2a864886f70d010104")
    );
    for nothing in [
        &[][..],
        &[0x10, 0x01, 0x00],
        &[0x10, 0x01, 0x00, 0xff, 0xff, 0x30],
        &[0x31, 0],
        &[0; 2000],
        &vec![0x30; 20_000],
    ] {
        assert!(ek::trim_certificate(nothing).is_err());
    }
}

#[test]
fn a_public_key_is_read_to_its_last_byte() {
    let spki = base64(&vectors()["ek_spki_b64"]);
    let key = RsaPublicKey::from_spki(&spki).unwrap();
    for at in 0..spki.len() {
        assert!(RsaPublicKey::from_spki(&spki[..at]).is_err(), "cut at {at}");
        let mut flipped = spki.clone();
        flipped[at] ^= 0x80;
        let parameters = 17..19; // of the algorithm: RSA has none, so they are not looked at
        let same = RsaPublicKey::from_spki(&flipped).is_ok_and(|other| other == key);
        assert!(!same || parameters.contains(&at), "flipped at {at}");
    }
    assert!(RsaPublicKey::from_spki(&[&spki[..], &[0]].concat()).is_err());
    for (case, modulus, exponent) in [
        ("even", vec![0xfe; 256], 3),
        ("short", vec![0xff; 255], 3),
        ("long", vec![0xff; 513], 3),
        ("e = 1", vec![0xff; 256], 1),
        ("e even", vec![0xff; 256], 4),
    ] {
        assert!(RsaPublicKey::new(&modulus, exponent).is_err(), "{case}");
    }
    assert_eq!(RsaPublicKey::new(&[&[0, 0][..], &key.modulus].concat(), 0).unwrap(), key);
}

#[test]
fn pem_refuses_with_the_texts_of_upstream() {
    let good = vectors()["ek_pem"].as_str().unwrap().to_owned();
    for text in [
        "",
        "nothing",
        "-----BEGIN PUBLIC KEY-----\nAAAA\n",
        "-----BEGIN PUBLIC KEY-----\n?\n-----END PUBLIC KEY-----\n",
        "-----BEGIN A-----\nAAAA\n-----END B-----\n",
    ] {
        assert_eq!(
            RsaPublicKey::from_pem(text).unwrap_err().to_string(),
            "invalid pemBytes",
            "{text}"
        );
    }
    let other = good.replace("PUBLIC KEY", "PRIVATE KEY");
    assert_eq!(
        RsaPublicKey::from_pem(&other).unwrap_err().to_string(),
        "invalid pem type: PRIVATE KEY"
    );
    let first_wins = format!("before\r\n{}{other}", good.replace('\n', "\r\n"));
    assert!(RsaPublicKey::from_pem(&first_wins).is_ok());
    for length in [0, 1, 47, 48, 49, 96, 294] {
        let der = vec![5; length];
        let text = pem::encode("X", &der);
        assert!(text.lines().all(|line| line.len() <= 64) && text.ends_with("-----END X-----\n"));
        assert_eq!(pem::first_block(&text).unwrap(), ("X", der));
    }
}

#[test]
fn a_pubhash_is_64_hexadecimal_digits() {
    let digits = vectors()["pubhash"].as_str().unwrap().to_owned();
    assert_eq!(Pubhash::parse(&digits.to_uppercase()).unwrap().to_string(), digits);
    for wrong in [
        "",
        &digits[1..],
        &format!("{digits}0"),
        &digits.replace('1', "g"),
        &format!(" {}", &digits[1..]),
    ] {
        assert!(Pubhash::parse(wrong).is_err(), "{wrong}");
    }
}

#[test]
fn a_credential_is_split_only_if_its_lengths_are_what_they_say() {
    let software = &vectors()["software_ek"]["challenge_v1"]["EC"];
    let (credential, secret) = (base64(&software["Credential"]), base64(&software["Secret"]));
    let parts = split_credential(&credential, &secret).unwrap();
    assert_eq!((parts.id_object, parts.encrypted_secret), (&credential[2..], &secret[2..]));
    for at in 0..credential.len() {
        assert!(split_credential(&credential[..at], &secret).is_err());
    }
    for at in 0..secret.len() {
        assert!(split_credential(&credential, &secret[..at]).is_err());
    }
    for at in [0, 1, 2, 3] {
        let mut wrong = credential.clone();
        wrong[at] ^= 1;
        assert!(split_credential(&wrong, &secret).is_err(), "credential byte {at}");
    }
    for at in [0, 1] {
        let mut wrong = secret.clone();
        wrong[at] ^= 1;
        assert!(split_credential(&credential, &wrong).is_err(), "secret byte {at}");
    }
    assert!(split_credential(&[&credential[..], &[0]].concat(), &secret).is_err());
}

#[test]
fn messages_are_written_as_go_writes_them() {
    let response = ChallengeResponse { secret: Zeroizing::new(vec![0; 32]) };
    assert_eq!(
        *response.to_json(),
        "{\"Secret\":\"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\"}\n"
    );
    let challenge = Challenge { credential: vec![1, 2], secret: vec![3] };
    assert_eq!(challenge.to_json(), r#"{"EC":{"Credential":"AQI=","Secret":"Aw=="}}"#);
    for (payload, json) in [
        (Payload::default(), r#"{"passphrase":"","error":"","generated_by":""}"#),
        (
            Payload::refusal("quarantined: a"),
            r#"{"passphrase":"","error":"quarantined: a","generated_by":""}"#,
        ),
        (Payload::sealed(&[0xfb, 0xff]), r#"{"passphrase":"-_8","error":"","generated_by":"tpm"}"#),
        (
            Payload {
                passphrase: Zeroizing::new("<a>&\"\\\u{1}\t\r\n\u{2028}ü/'".to_owned()),
                ..Payload::default()
            },
            r#"{"passphrase":"\u003ca\u003e\u0026\"\\\u0001\t\r\n\u2028ü/'","error":"","generated_by":""}"#,
        ),
    ] {
        assert_eq!(*payload.to_json(), format!("{json}\n"));
        assert_eq!(Payload::from_json(payload.to_json().as_bytes()).unwrap(), payload);
    }
    assert_eq!(Payload::sealed(&[0; 256]).passphrase.len(), 342);
}

#[test]
fn messages_are_read_as_go_reads_them() {
    for json in [
        r#"{"passphrase":"a","error":"b","generated_by":"c"}"#,
        "\n {\"PASSPHRASE\":\"a\",\"Error\":\"b\",\"Generated_By\":\"c\",\"more\":[{}]}\n\n",
        r#"{"error":"x","error":"b","passphrase":"a","generated_by":"c"}"#,
    ] {
        let payload = Payload::from_json(json.as_bytes()).unwrap();
        assert_eq!(
            (payload.passphrase.as_str(), payload.error.as_str(), payload.generated_by.as_str()),
            ("a", "b", "c"),
            "{json}"
        );
    }
    for json in ["{}", "null", r#"{"passphrase":null}"#] {
        assert_eq!(Payload::from_json(json.as_bytes()).unwrap(), Payload::default(), "{json}");
        assert!(ChallengeResponse::from_json(json.as_bytes()).unwrap().secret.is_empty());
        assert_eq!(
            Token::parse_authorization(STANDARD.encode(json).as_bytes()).unwrap(),
            Token::default()
        );
    }
    let lower = r#"{"ec":{"credential":"AQI=","SECRET":null}}"#;
    assert_eq!(
        Challenge::from_json(lower.as_bytes()).unwrap(),
        Challenge { credential: vec![1, 2], secret: vec![] }
    );
    for wrong in [
        "",
        "[]",
        "7",
        "\"x\"",
        "{",
        "{}{}",
        "{} x",
        r#"{"passphrase":4711}"#,
        r#"{"passphrase":{}}"#,
        "{\"error\":\"\u{0}\"}",
        r#"{"error":"\ud800"}"#,
    ] {
        let error = Payload::from_json(wrong.as_bytes()).expect_err(wrong).to_string();
        assert!(!error.contains("4711"), "{error}");
    }
    for wrong in
        [r#"{"Secret":"AA"}"#, r#"{"Secret":"A A="}"#, r#"{"Secret":"-_8="}"#, r#"{"Secret":[1]}"#]
    {
        assert!(ChallengeResponse::from_json(wrong.as_bytes()).is_err(), "{wrong}");
    }
    let long = format!(r#"{{"passphrase":"{}"}}"#, "x".repeat(MAX_MESSAGE));
    assert!(matches!(Payload::from_json(long.as_bytes()), Err(Error::TooLong { .. })));
    assert!(Payload::from_json(format!("{{\"x\":{}", "[".repeat(60_000)).as_bytes()).is_err());
}

#[test]
fn a_token_cut_or_flipped_anywhere_never_panics() {
    let header = vectors()["v1_authorization"].as_str().unwrap().as_bytes().to_vec();
    let genuine = Token::parse_authorization(&header).unwrap();
    for at in 0..header.len() {
        assert!(
            Token::parse_authorization(&header[..at]).map_or(true, |cut| cut != genuine),
            "cut at {at}"
        );
        let mut flipped = header.clone();
        flipped[at] ^= 0x02;
        let _ = Token::parse_authorization(&flipped); // may be the same: the case of a key, an unused boolean
    }
    assert!(matches!(Token::parse_authorization(&vec![b'A'; 20_000]), Err(Error::TooLong { .. })));
}

#[test]
fn each_answer_of_a_server_means_one_thing() {
    let pubhash = Pubhash::parse(vectors()["pubhash"].as_str().unwrap()).unwrap();
    assert_eq!(
        text::no_secret(&pubhash, "COS_PERSISTENT"),
        format!("No secret found for {pubhash} and COS_PERSISTENT")
    );
    assert_eq!(
        text::no_volume(&pubhash),
        format!("no volume found with data from request and hash: {pubhash}")
    );
    assert_eq!(text::quarantined("COS_PERSISTENT"), "quarantined: COS_PERSISTENT");
    let plain =
        |text: &str| Payload { passphrase: Zeroizing::new(text.to_owned()), ..Payload::default() };
    let tpm = |text: &str| Payload { generated_by: "tpm".to_owned(), ..plain(text) };
    let said = |error: String| Payload::refusal(error);
    type Meaning = fn(&Result<Release, Refusal>) -> bool;
    let cases: [(Payload, Meaning); 11] = [
        (
            plain("hunter2"),
            |meaning| matches!(meaning, Ok(Release::Passphrase(text)) if **text == *b"hunter2"),
        ),
        (Payload { generated_by: "someone".to_owned(), ..plain("x") }, |meaning| {
            matches!(meaning, Ok(Release::Passphrase(_)))
        }),
        (
            tpm("-_8"),
            |meaning| matches!(meaning, Ok(Release::Sealed(block)) if block == &[0xfb, 0xff]),
        ),
        (tpm("+/8="), |meaning| matches!(meaning, Err(Refusal::Malformed))),
        (tpm(""), |meaning| matches!(meaning, Err(Refusal::EmptySecret))),
        (plain(""), |meaning| matches!(meaning, Err(Refusal::EmptySecret))),
        (said(text::no_secret(&pubhash, "x")), |meaning| {
            matches!(meaning, Err(Refusal::NoSecret(_)))
        }),
        (said(text::no_volume(&pubhash)), |meaning| {
            matches!(meaning, Err(Refusal::UnknownMachine(_)))
        }),
        (said(text::quarantined("x")), |meaning| matches!(meaning, Err(Refusal::Quarantined(_)))),
        (
            said("secrets \"x\" is forbidden\n".to_owned()),
            |meaning| matches!(meaning, Err(Refusal::Other(text)) if !text.contains('\n')),
        ),
        (Payload { error: "late".to_owned(), ..plain("x") }, |meaning| {
            matches!(meaning, Err(Refusal::Other(_)))
        }),
    ];
    for (payload, meant) in cases {
        let shown = format!("{payload:?}");
        let meaning = payload.classify();
        assert!(meant(&meaning), "{shown}: {meaning:?}");
        assert!(!format!("{shown}{meaning:?}").contains("hunter2"));
    }
    let Err(Refusal::Other(told)) = Payload::refusal("x".repeat(5000)).classify() else { panic!() };
    assert_eq!(told.len(), 300);
}

#[test]
fn a_plugin_request_is_read_in_both_shapes_and_any_case() {
    let query = |label: &str, server: Option<&str>, mdns| PartitionQuery {
        label: label.to_owned(),
        name: "sda3".to_owned(),
        uuid: "0b-1".to_owned(),
        is_luks: true,
        server: server.map(str::to_owned),
        mdns,
    };
    for (data, expected) in [
        (
            r#"{"name":"sda3","label":"persistent","mount_point":"","size_bytes":123,"type":"crypto_LUKS","read_only":true,"uuid":"0b-1","filesystem_label":"COS_PERSISTENT"}"#,
            query("COS_PERSISTENT", None, false),
        ),
        (
            r#"{"name":"sda3","label":"COS_PERSISTENT","type":"crypto_LUKS","uuid":"0b-1"}"#,
            query("COS_PERSISTENT", None, false),
        ),
        (
            r#"{"Name":"sda3","FilesystemLabel":"x","Filesystem_Label":"COS_PERSISTENT","TYPE":"crypto_LUKS","UUID":"0b-1"}"#,
            query("COS_PERSISTENT", None, false),
        ),
        (
            r#"{"partition":{"name":"sda3","partition_label":"persistent","label":"COS_PERSISTENT","size":1234,"fs":"crypto_LUKS","flags":["a"],"uuid":"0b-1"},"challenger_server":"https://kms","mdns":true}"#,
            query("COS_PERSISTENT", Some("https://kms"), true),
        ),
        (
            r#"{"partition":{"name":"sda3","label":"unknown","fs":"crypto_LUKS","uuid":"0b-1"},"challenger_server":"","label":"outer"}"#,
            query("", None, false),
        ),
    ] {
        assert_eq!(PartitionQuery::from_json(data.as_bytes()).unwrap(), expected, "{data}");
        let mut event = String::from(r#"{"name":"discovery.password","file":"","data":"#);
        event.push_str(&serde_json::to_string(data).unwrap());
        event.push('}');
        assert_eq!(Request::from_json(event.as_bytes()).unwrap().data, data);
    }
    for nothing in [
        "{}",
        "null",
        r#"{"partition":null}"#,
        r#"{"name":"unknown","label":"unknown","uuid":"unknown"}"#,
        r#"{"mdns":true}"#,
    ] {
        assert!(
            matches!(PartitionQuery::from_json(nothing.as_bytes()), Err(Error::NoPartition)),
            "{nothing}"
        );
    }
    for wrong in
        ["", "[]", r#"{"label":5}"#, r#"{"partition":"sda3"}"#, r#"{"mdns":"yes","name":"a"}"#]
    {
        assert!(PartitionQuery::from_json(wrong.as_bytes()).is_err(), "{wrong}");
    }
}

#[test]
fn a_plugin_response_is_one_json_object_without_newline() {
    let response = Response {
        data: Zeroizing::new("a<b".to_owned()),
        log: "x\n".to_owned(),
        ..Response::default()
    };
    assert_eq!(*response.to_json(), r#"{"state":"","data":"a\u003cb","error":"","log":"x\n"}"#);
    assert_eq!(*Response::from_json(response.to_json().as_bytes()).unwrap().data, "a<b");
    assert!(!format!("{response:?}").contains("a<b"));
}

/// Made by an independent HKDF (Python's `hmac`) over the construction in `identity`'s documentation.
#[test]
fn the_identity_follows_from_volume_key_tpm_and_network() {
    let volume_key: [u8; 64] = std::array::from_fn(|at| at as u8);
    let tpm_secret: [u8; 32] = std::array::from_fn(|at| at as u8 + 100);
    let derive = |volume_key: &[u8], tpm_secret, network| {
        hex(&*identity::derive(volume_key, tpm_secret, network).unwrap())
    };
    for (network, key) in [("fleet-a", FLEET_A), ("fleet-b", FLEET_B), ("", NO_FLEET)] {
        assert_eq!(derive(&volume_key, &tpm_secret, network), key);
    }
    assert_ne!(derive(&volume_key[..32], &tpm_secret, "fleet-a"), FLEET_A);
    assert_ne!(derive(&volume_key, &[0; 32], "fleet-a"), FLEET_A);
    assert!(identity::derive(&volume_key[..15], &tpm_secret, "fleet-a").is_err());
    assert!(identity::derive(&[0; 70_000], &tpm_secret, "fleet-a").is_err());
}

#[test]
fn the_identity_file_holds_what_the_service_needs_and_debug_output_does_not() {
    let key = identity::derive(&[1; 64], &[2; 32], "fleet-a").unwrap();
    let identity = Identity::new("fleet-a", key.clone(), "0b-1").unwrap();
    let json = identity.to_json().unwrap();
    let encoded = STANDARD.encode(*key);
    assert_eq!(
        *json,
        format!(r#"{{"version":1,"network":"fleet-a","private_key":"{encoded}","volume":"0b-1"}}"#)
    );
    assert_eq!(Identity::from_json(json.as_bytes()).unwrap(), identity);
    assert!(!format!("{identity:?}").contains(&encoded));
    for (from, to) in [
        ("\"version\":1", "\"version\":2"),
        ("\"version\":1,", ""),
        ("\"volume\"", "\"volumes\""),
        (&encoded, "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="),
        (&encoded, "AAAA"),
        (&encoded, "?"),
        ("}", "}x"),
    ] {
        let wrong = json.replace(from, to);
        let error = Identity::from_json(wrong.as_bytes()).expect_err(&wrong).to_string();
        assert!(!error.contains(&encoded), "{error}");
    }
    assert!(Identity::new("fleet-a", Zeroizing::new([0; 32]), "0b-1").is_err());
    for at in 0..json.len() {
        assert!(Identity::from_json(&json.as_bytes()[..at]).is_err());
    }
}

#[test]
fn a_timeline_is_read_as_it_is_written() {
    let mut timeline = Timeline::new("boot", Outcome::Unlocked, Mode::Online);
    timeline.steps.push(Step { name: "tpm-open".to_owned(), at_ms: 812, took_ms: 3 });
    assert_eq!(
        timeline.to_json().unwrap(),
        r#"{"version":1,"boot_id":"boot","outcome":"unlocked","mode":"online","steps":[{"name":"tpm-open","at_ms":812,"took_ms":3}]}"#
    );
    timeline.reason = Some("quarantined".to_owned());
    let json = timeline.to_json().unwrap();
    assert_eq!(Timeline::from_json(json.as_bytes()).unwrap(), timeline);
    for wrong in [
        json.replace("unlocked", "open"),
        json.replace(":1,", ":2,"),
        json.replace("812", "-1"),
        format!("{json}x"),
        " ".repeat(300_000),
    ] {
        assert!(Timeline::from_json(wrong.as_bytes()).is_err());
    }
}

const FLEET_A: &str = "58180df11ff1819e856d3c1f6b79047eea2331a44f7420b3a9d19fe387e5687c";
const FLEET_B: &str = "503e7cfa07e4e055ffacb2e92186acb9bcdd0c93129c59a4bb65de907015984e";
const NO_FLEET: &str = "00fe29e1db5f7dbd3f78301ea4794637b35c70c556bd3d5e05a1de690754a170";
