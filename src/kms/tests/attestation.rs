//! Generation 2 over TCP with the program: who is let through to a decision, and what the others are told
//! (`protocols/kcrypt.md` §3, §6.5, §6.7).
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)] // helpers of tests

use std::{fs, time::Duration};

use latchkey_soft_identity::{SoftIdentity, pcr};
use latchkey_wire::{
    attest::AttestationParameters,
    quote::PcrQuote,
    v1::Challenge,
    v2::{ActivationSecret, Init, Proof},
};
use serde_json::Value;
use sha2::{Digest, Sha256};
use tungstenite::Message;

mod rig;
use rig::{Kms, MACHINE, PERSISTENT, STRANGER, VECTORS, said, secret, store};

/// A store that knows the machine; nothing in it may change.
fn ordinary() -> (tempfile::TempDir, String) {
    let pem = MACHINE.soft.ek_pem().replace('\n', "\n      ");
    let manifests = MACHINE.volume(
        "node",
        &format!("  attestation:\n    ekPublicKey: |\n      {pem}\n    pcrValues: {{pcrs: {{\"9\": \"\"}}}}\n"),
    ) + &secret("node-cos-persistent", "  passphrase: found\n");
    (store(&[("all.yaml", &manifests)]), manifests)
}

fn still_serves(kms: &Kms) {
    let answer = kms.attest(&MACHINE.soft, PERSISTENT).unwrap();
    assert_eq!((answer.passphrase.as_slice(), answer.error.as_str()), (&b"found"[..], ""));
}

/// A machine with the AK parameters changed.
fn ak(change: impl Fn(&mut AttestationParameters)) -> String {
    let mut init = MACHINE.soft.init();
    change(&mut init.ak);
    init.to_json()
}

/// A machine with its creation attestation changed and signed again, as no TPM would.
fn certified(change: impl Fn(&mut Vec<u8>)) -> String {
    ak(|ak| {
        change(&mut ak.create_attestation);
        ak.create_signature = MACHINE.soft.sign(&ak.create_attestation);
    })
}

/// A machine with an AK of other attributes or size, certified as if a TPM had made it.
fn public(change: impl Fn(&mut Vec<u8>)) -> String {
    ak(|ak| {
        change(&mut ak.public);
        let name = Sha256::digest(&ak.public);
        let at = ak.create_attestation.len() - 34 - 32;
        ak.create_attestation[at..at + 32].copy_from_slice(&name);
        ak.create_signature = MACHINE.soft.sign(&ak.create_attestation);
    })
}

fn attribute(bits: u32, set: bool) -> String {
    public(|public| {
        let old = u32::from_be_bytes(public[4..8].try_into().unwrap());
        let new = if set { old | bits } else { old & !bits };
        public[4..8].copy_from_slice(&new.to_be_bytes());
    })
}

#[test]
fn each_error_before_the_challenge_is_told_in_its_place() {
    let (directory, manifests) = ordinary();
    let kms = Kms::start(directory.path());
    let good = MACHINE.soft.init();
    let ek = |spki: &[u8]| Init { ek_spki: spki.to_vec(), ..good.clone() }.to_json();
    let unread =
        "WebSocket read: reading attestation init: attestation init is not the JSON it should be";
    let challenge = |why: &str| format!("Challenge generation: generating challenge: {why}");
    let refused = |why: &str| challenge(&format!("attestation key refused: {why}"));
    let malformed = |what: &str| challenge(&format!("{what} is malformed"));
    let p256 = "3059301306072a8648ce3d020106082a8648ce3d030107034200";
    let p256: Vec<u8> = (0..p256.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&p256[at..at + 2], 16).unwrap())
        .chain([4; 65])
        .collect();
    for (case, init, told) in [
        ("no JSON", "hello".to_owned(), unread.to_owned()),
        ("half of it", good.to_json()[..500].to_owned(), unread.to_owned()),
        ("AK as text", good.to_json().replace(&good.ak.to_json(), "\"x\""), unread.to_owned()),
        ("nothing", "{}".to_owned(), challenge("parse EK SPKI: ")),
        ("no EK", ek(&[]), challenge("parse EK SPKI: ")),
        (
            "an EK with bytes behind",
            ek(&[MACHINE.soft.spki(), &[0]].concat()),
            challenge("parse EK SPKI: "),
        ),
        ("an elliptic EK", ek(&p256), challenge("parse EK SPKI: ECC EK not yet supported")),
        (
            "no signature",
            ak(|ak| ak.create_signature.clear()),
            refused("signature is too short to be valid: only 0 bytes"),
        ),
        (
            "a short signature",
            ak(|ak| ak.create_signature.truncate(7)),
            refused("signature is too short to be valid: only 7 bytes"),
        ),
        ("public area cut", ak(|ak| ak.public.truncate(100)), malformed("TPMT_PUBLIC")),
        ("public area with bytes behind", ak(|ak| ak.public.push(0)), malformed("TPMT_PUBLIC")),
        (
            "creation data cut",
            ak(|ak| ak.create_data.truncate(20)),
            malformed("TPMS_CREATION_DATA"),
        ),
        ("attestation cut", ak(|ak| ak.create_attestation.truncate(20)), malformed("TPMS_ATTEST")),
        (
            "attestation of another kind",
            certified(|attest| attest[5] = 0x17),
            refused("attestation does not apply to creation data, got tag 8017"),
        ),
        (
            "a quote",
            ak(|ak| ak.create_attestation = MACHINE.soft.quote(&[]).quote),
            refused("attestation does not apply to creation data, got tag 8018"),
        ),
        (
            "a small key",
            public(|public| public[16..18].copy_from_slice(&1024u16.to_be_bytes())),
            refused("attestation key too small: must be at least 2048 bits but was 1024 bits"),
        ),
        (
            "other creation data",
            ak(|ak| ak.create_data[40] ^= 1),
            refused("attestation refers to different public key"),
        ),
        (
            "not by a TPM",
            certified(|attest| attest[0] = 0xfe),
            refused("creation attestation was not produced by a TPM"),
        ),
        ("may leave its TPM", attribute(0x2, false), refused("AK is exportable")),
        (
            "may be moved",
            attribute(0x10, false),
            refused("provided key is not limited to attestation"),
        ),
        (
            "was brought in",
            attribute(0x20, false),
            refused("provided key is not limited to attestation"),
        ),
        (
            "signs anything",
            attribute(0x1_0000, false),
            refused("provided key is not limited to attestation"),
        ),
        (
            "may not sign",
            attribute(0x4_0000, false),
            refused("provided key is not limited to attestation"),
        ),
        (
            "decrypts",
            attribute(0x2_0000, true),
            refused("provided key is not limited to attestation"),
        ),
        (
            "no scheme",
            public(|public| {
                public.splice(12..16, [0x00, 0x10]);
            }),
            refused("its scheme must be RSASSA with SHA-256"),
        ),
        (
            "RSAPSS",
            public(|public| public[13] = 0x16),
            refused("its scheme must be RSASSA with SHA-256"),
        ),
        (
            "SHA-1 names",
            public(|public| public[3] = 0x04),
            refused("its name algorithm must be SHA-256, it is 0x4"),
        ),
        (
            "another key",
            ak(|ak| ak.public[7] ^= 4),
            refused("creation attestation refers to a different key"),
        ),
        (
            "signed by another",
            ak(|ak| ak.create_signature = STRANGER.soft.sign(&ak.create_attestation)),
            refused("could not verify attestation: "),
        ),
        (
            "signature of another kind",
            ak(|ak| ak.create_signature[1] = 0x18),
            malformed("TPMT_SIGNATURE"),
        ),
    ] {
        let mut socket = kms.open_attestation(PERSISTENT);
        socket.send(Message::text(init)).unwrap();
        let answer = said(&mut socket).unwrap_or_else(|| panic!("{case}: closed"));
        assert!(answer.challenge.is_none() && answer.passphrase.is_empty(), "{case}");
        assert!(answer.error.starts_with(&told), "{case}: {}", answer.error);
        assert!(socket.read().is_err(), "{case}: nothing comes after it");
        kms.wait_for("endpoint=tpm-attestation peer=127.0.0.1");
        kms.wait_for("result=unauthenticated");
        kms.forget_log();
    }
    still_serves(&kms);
    assert_eq!(fs::read_to_string(directory.path().join("all.yaml")).unwrap(), manifests);
}

/// A proof with its quote changed.
fn quoted(challenge: &Challenge, quote: impl Fn(&SoftIdentity, &[u8]) -> PcrQuote) -> String {
    let secret = MACHINE.soft.activate(challenge).secret;
    let pcr_quote = quote(&MACHINE.soft, &secret);
    Proof { secret: ActivationSecret(secret), pcr_quote }.to_json().to_string()
}

/// An honest quote with something changed afterwards.
fn changed(challenge: &Challenge, change: impl Fn(&mut PcrQuote)) -> String {
    quoted(challenge, |machine, nonce| {
        let mut quote = machine.quote(nonce);
        change(&mut quote);
        quote
    })
}

/// A quote with these PCRs measured.
fn measured(challenge: &Challenge, indices: &[u32]) -> String {
    let mut machine = SoftIdentity::with(MACHINE.soft.keys().clone());
    machine.pcrs = indices.iter().map(|index| (*index, pcr(*index, "x"))).collect();
    machine.proof(challenge).to_json().to_string()
}

/// The digest a TPM makes of these PCRs in this order.
fn digest(machine: &SoftIdentity, indices: &[u32]) -> Vec<u8> {
    let values: Vec<u8> = indices.iter().flat_map(|index| machine.pcrs[index]).collect();
    Sha256::digest(values).to_vec()
}

const SHA256_0_7_11: [u8; 6] = [0x00, 0x0b, 3, 0x81, 0x08, 0];

#[test]
fn each_error_after_the_proof_is_told_and_nothing_is_released() {
    type Lie = fn(&Challenge) -> String;
    let (directory, manifests) = ordinary();
    let kms = Kms::start(directory.path());
    let honest = |challenge: &Challenge| MACHINE.soft.proof(challenge).to_json().to_string();
    let cases: [(&str, Lie, &str); 30] = [
        (
            "no JSON",
            |_| "hello".into(),
            "Proof read: reading proof: attestation proof is not the JSON it should be",
        ),
        (
            "half of it",
            |c| MACHINE.soft.proof(c).to_json()[..300].into(),
            "Proof read: reading proof: ",
        ),
        (
            "a secret that is no base64",
            |_| r#"{"secret":"?"}"#.into(),
            "Proof read: reading proof: ",
        ),
        ("nothing", |_| "{}".into(), "Attestation verification failed: invalid secret"),
        ("null", |_| "null".into(), "Attestation verification failed: invalid secret"),
        (
            "another secret",
            |c| {
                Proof { secret: ActivationSecret(vec![7; 32].into()), ..MACHINE.soft.proof(c) }
                    .to_json()
                    .to_string()
            },
            "Attestation verification failed: invalid secret",
        ),
        (
            "a secret that goes on",
            |c| {
                let mut proof = MACHINE.soft.proof(c);
                proof.secret.0.push(0);
                proof.to_json().to_string()
            },
            "Attestation verification failed: invalid secret",
        ),
        (
            "half a secret",
            |c| {
                let mut proof = MACHINE.soft.proof(c);
                proof.secret.0.truncate(16);
                proof.to_json().to_string()
            },
            "Attestation verification failed: invalid secret",
        ),
        (
            "a quote of another type",
            |c| {
                MACHINE
                    .soft
                    .proof(c)
                    .to_json()
                    .replace(r#""pcr_quote":{"#, r#""pcr_quote":[{"#)
                    .replace("}}}\n", "}}]}\n")
            },
            "Attestation verification failed: unmarshaling PCR quote: ",
        ),
        (
            "a PCR that is no number",
            |c| MACHINE.soft.proof(c).to_json().replace("\"11\":", "\"x\":"),
            "Attestation verification failed: unmarshaling PCR quote: ",
        ),
        (
            "a PCR twice",
            |c| MACHINE.soft.proof(c).to_json().replace("\"11\":", "\"7\":"),
            "Attestation verification failed: unmarshaling PCR quote: ",
        ),
        (
            "a PCR value that is no base64",
            |c| {
                MACHINE.soft.proof(c).to_json().replace("\"pcrs\":{\"0\":\"", "\"pcrs\":{\"0\":\"?")
            },
            "Attestation verification failed: unmarshaling PCR quote: ",
        ),
        (
            "no quote",
            |c| changed(c, |quote| *quote = PcrQuote::default()),
            "Attestation verification failed: PCR quote verification failed: empty quote or signature",
        ),
        (
            "signed by another",
            |c| changed(c, |quote| quote.signature = STRANGER.soft.sign(&quote.quote)),
            "Attestation verification failed: PCR quote verification failed: signature is not RSASSA with SHA-256 by the AK",
        ),
        (
            "changed after it was signed",
            |c| changed(c, |quote| quote.quote[60] ^= 1),
            "Attestation verification failed: PCR quote verification failed: signature is not",
        ),
        (
            "called RSAPSS",
            |c| changed(c, |quote| quote.signature[1] = 0x16),
            "Attestation verification failed: PCR quote verification failed: signature is not",
        ),
        (
            "signature with bytes behind",
            |c| changed(c, |quote| quote.signature.push(0)),
            "Attestation verification failed: PCR quote verification failed: signature is not",
        ),
        (
            "no nonce",
            |c| quoted(c, |machine, _| machine.quote(&[])),
            "Attestation verification failed: PCR quote verification failed: a nonce is required to verify the quote is fresh",
        ),
        (
            "of another exchange",
            |c| quoted(c, |machine, _| machine.quote(&[9; 32])),
            "Attestation verification failed: PCR quote verification failed: quote was not produced for this attestation: qualifying data does not match the nonce",
        ),
        (
            "half the nonce",
            |c| quoted(c, |machine, nonce| machine.quote(&nonce[..16])),
            "Attestation verification failed: PCR quote verification failed: quote was not produced for this attestation",
        ),
        (
            "no quote but a creation",
            |c| {
                changed(c, |quote| {
                    quote.quote.clone_from(&MACHINE.soft.ak.create_attestation);
                    quote.signature.clone_from(&MACHINE.soft.ak.create_signature);
                })
            },
            "Attestation verification failed: PCR quote verification failed: not a quote attestation",
        ),
        (
            "made up by software",
            |c| {
                changed(c, |quote| {
                    quote.quote[0] = 0xfe;
                    quote.signature = MACHINE.soft.sign(&quote.quote);
                })
            },
            "Attestation verification failed: PCR quote verification failed: it was not produced by a TPM",
        ),
        (
            "two selections",
            |c| {
                quoted(c, |machine, nonce| {
                    machine.quote_of(
                        nonce,
                        &[&[0x00, 0x0b, 3, 0x81, 0, 0], &[0x00, 0x0b, 3, 0, 0x08, 0]],
                        &digest(machine, &[0, 7, 11]),
                    )
                })
            },
            "Attestation verification failed: PCR quote verification failed: it must have exactly one PCR selection",
        ),
        (
            "no selection",
            |c| quoted(c, |machine, nonce| machine.quote_of(nonce, &[], &digest(machine, &[]))),
            "Attestation verification failed: PCR quote verification failed: it must have exactly one PCR selection",
        ),
        (
            "of the SHA-1 bank",
            |c| {
                quoted(c, |machine, nonce| {
                    machine.quote_of(
                        nonce,
                        &[&[0x00, 0x04, 3, 0x81, 0x08, 0]],
                        &digest(machine, &[0, 7, 11]),
                    )
                })
            },
            "Attestation verification failed: PCR quote verification failed: its PCR bank must be SHA-256",
        ),
        (
            "a PCR that software resets",
            |c| measured(c, &[0, 7, 11, 16]),
            "Attestation verification failed: PCR quote verification failed: PCR 16 must not be in it",
        ),
        (
            "a PCR that is not expected",
            |c| measured(c, &[0, 7, 8, 11]),
            "Attestation verification failed: PCR quote verification failed: PCR 8 must not be in it",
        ),
        (
            "a value too many",
            |c| changed(c, |quote| drop(quote.pcrs.insert(8, vec![0; 32]))),
            "Attestation verification failed: PCR quote verification failed: PCR 8 was provided but not selected in the quote",
        ),
        (
            "a value too few",
            |c| changed(c, |quote| drop(quote.pcrs.remove(&7))),
            "Attestation verification failed: PCR quote verification failed: PCR 7 was selected in the quote but not provided",
        ),
        (
            "a value cut",
            |c| changed(c, |quote| quote.pcrs.get_mut(&7).unwrap().truncate(31)),
            "Attestation verification failed: PCR quote verification failed: the value of PCR 7 must have 32 bytes",
        ),
    ];
    for (case, lie, told) in cases {
        let answer = kms
            .attest_with(PERSISTENT, &MACHINE.soft.init().to_json(), lie)
            .unwrap_or_else(|| panic!("{case}: closed"));
        assert!(answer.passphrase.is_empty(), "{case}");
        assert!(answer.error.starts_with(told), "{case}: {}", answer.error);
    }
    // Values that are not the quoted ones: two changed places keep their number, not their digest.
    let swapped = |c: &Challenge| {
        changed(c, |quote| {
            let seven = quote.pcrs.insert(7, quote.pcrs[&11].clone()).unwrap();
            quote.pcrs.insert(11, seven);
        })
    };
    let wrong_digest = |c: &Challenge| {
        quoted(c, |machine, nonce| machine.quote_of(nonce, &[&SHA256_0_7_11], &[0; 32]))
    };
    for lie in [&swapped as &dyn Fn(&Challenge) -> String, &wrong_digest] {
        let answer = kms.attest_with(PERSISTENT, &MACHINE.soft.init().to_json(), lie).unwrap();
        assert!(answer.error.starts_with("Attestation verification failed: PCR quote verification failed: PCR digest mismatch"), "{}", answer.error);
    }
    assert_eq!(
        kms.attest_with(PERSISTENT, &MACHINE.soft.init().to_json(), honest)
            .unwrap()
            .passphrase
            .as_slice(),
        b"found"
    );
    assert_eq!(fs::read_to_string(directory.path().join("all.yaml")).unwrap(), manifests);
    assert!(!kms.lines().join("\n").contains("\"found\""));
}

#[test]
fn an_operator_chooses_the_pcrs_and_may_take_quotes_without_a_nonce() {
    let (directory, _) = ordinary();
    let init = MACHINE.soft.init().to_json();
    let kms = Kms::start_with(directory.path(), &["--pcrs", "0,7,8", "--allow-empty-quote-nonce"]);
    let quoting = |indices: &'static [u32]| {
        kms.attest_with(PERSISTENT, &init, |c| measured(c, indices)).unwrap()
    };
    assert_eq!(quoting(&[0, 7, 8]).passphrase.as_slice(), b"found");
    assert!(quoting(&[0, 7, 8, 11]).error.contains("PCR 11 must not be in it"));
    let without = |c: &Challenge| {
        quoted(c, |machine, nonce| {
            let mut machine = SoftIdentity::with(machine.keys().clone());
            machine.pcrs.remove(&11);
            assert!(machine.quote(nonce).quote.len() > machine.quote(&[]).quote.len());
            machine.quote(&[])
        })
    };
    assert_eq!(
        kms.attest_with(PERSISTENT, &init, without).unwrap().passphrase.as_slice(),
        b"found"
    );
    // A nonce that is there must still be the right one.
    let other = |c: &Challenge| quoted(c, |machine, _| machine.quote(&[9; 32]));
    assert!(
        kms.attest_with(PERSISTENT, &init, other)
            .unwrap()
            .error
            .contains("does not match the nonce")
    );
    drop(kms);
    let (status, said) = rig::fails_to_start(directory.path(), &["--pcrs", "0,16"]);
    assert!(!status.success() && said.contains("16"), "{said}");
}

/// What a real TPM made: its AK, and its quotes, among them the forged one of §6.5. Its activation needs its EK, in whose place
/// stands ours.
#[test]
fn recorded_quotes_of_a_tpm() {
    let mut recorded = SoftIdentity::with(MACHINE.soft.keys().clone());
    recorded.ak =
        AttestationParameters::from_json(VECTORS["ak_params_v2"].to_string().as_bytes()).unwrap();
    let quote = |name: &str| PcrQuote::from_json(VECTORS[name].to_string().as_bytes()).unwrap();
    let (directory, manifests) = ordinary();
    let kms = Kms::start_with(directory.path(), &["--allow-empty-quote-nonce"]);
    let strict = Kms::start(directory.path());
    let ask = |kms: &Kms, name: &str| {
        kms.attest_with(PERSISTENT, &recorded.init().to_json(), |challenge| {
            let secret = recorded.activate(challenge).secret;
            Proof { secret: ActivationSecret(secret), pcr_quote: quote(name) }.to_json().to_string()
        })
        .unwrap()
    };
    assert_eq!(ask(&kms, "quote_empty_nonce").passphrase.as_slice(), b"found");
    assert!(ask(&strict, "quote_empty_nonce").error.contains("a nonce is required"));
    assert!(
        ask(&kms, "quote_nonce_is_secret").error.contains("does not match the nonce"),
        "it is of another exchange"
    );
    let forged = ask(&kms, "MUST_REJECT_quote_selection_reorder").error;
    assert!(
        forged.contains("PCR quote verification failed: it must have exactly one PCR selection"),
        "{forged}"
    );
    assert_eq!(fs::read_to_string(directory.path().join("all.yaml")).unwrap(), manifests);
}

/// The recorded first messages of Go's clients of both generations. Their TPM is not here to answer the challenge.
#[test]
fn recorded_clients_get_a_challenge_and_nothing_without_their_tpm() {
    let directory = store(&[]);
    let kms = Kms::start(directory.path());
    let mut socket = kms.open_attestation(PERSISTENT);
    socket.send(Message::text(VECTORS["v2_init"].to_string())).unwrap();
    let Ok(Message::Text(challenge)) = socket.read() else { panic!() };
    assert!(
        challenge.starts_with(r#"{"challenge":{"Credential":"AEQAI"#)
            && challenge.ends_with("\"}}\n"),
        "{challenge}"
    );
    let parts: Value = serde_json::from_str(&challenge).unwrap();
    assert_eq!(parts["challenge"]["Credential"].as_str().map(str::len), Some(96));
    assert_eq!(parts["challenge"]["Secret"].as_str().map(str::len), Some(344));
    let quote = &VECTORS["quote_nonce_is_secret"];
    let secret = &VECTORS["activation_secret_b64"];
    socket.send(Message::text(format!("{{\"secret\":{secret},\"pcr_quote\":{quote}}}\n"))).unwrap();
    assert_eq!(said(&mut socket).unwrap().error, "Attestation verification failed: invalid secret");

    let header = VECTORS["v1_authorization"].as_str().unwrap();
    let mut socket = kms.open("/getPass", header, PERSISTENT);
    let challenge = rig::challenge(&mut socket);
    assert_eq!((challenge.credential.len(), challenge.secret.len()), (70, 258));
    socket.send(Message::binary(format!("{{\"Secret\":{secret}}}\n").into_bytes())).unwrap();
    assert_eq!(rig::answer(&mut socket), None);
    kms.wait_for_times("result=unauthenticated", 2);
    assert!(rig::files(directory.path()).is_empty());
}

#[test]
fn frames_of_either_type_and_paths_with_a_prefix_are_taken() {
    let (directory, _) = ordinary();
    let kms = Kms::start(directory.path());
    let machine = &MACHINE.soft;
    for path in ["/tpm-attestation", "//tpm-attestation", "/challenge/tpm-attestation"] {
        let request = rig::websocket_request(kms.address, path)
            .header("label", "COS_PERSISTENT")
            .body(())
            .unwrap();
        let mut socket = tungstenite::client(request, kms.connect())
            .map_err(|error| error.to_string())
            .unwrap()
            .0;
        let init = machine.init().to_json();
        socket.send(Message::binary(init.trim_end().as_bytes().to_vec())).unwrap();
        socket.send(Message::Ping(Vec::new().into())).unwrap();
        let challenge = said(&mut socket).unwrap().into_challenge().unwrap();
        let proof = machine.proof(&challenge).to_json();
        socket.send(Message::binary(proof.trim_end().as_bytes().to_vec())).unwrap();
        let answer = loop {
            match socket.read().unwrap() {
                Message::Text(text) => break text,
                Message::Pong(_) => {}
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(answer.as_str(), "{\"passphrase\":\"Zm91bmQ=\"}\n", "{path}");
    }
}

#[test]
fn a_machine_that_says_nothing_is_cut_off_without_a_word() {
    let (directory, _) = ordinary();
    let kms = Kms::start_with(directory.path(), &["--message-timeout", "1"]);
    let mut socket = kms.open_attestation(PERSISTENT);
    assert!(said(&mut socket).is_none());
    kms.wait_for("the peer did not send its attestation init in time");
    let mut socket = kms.open_attestation(PERSISTENT);
    socket.get_ref().set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    socket.send(Message::text(MACHINE.soft.init().to_json())).unwrap();
    assert!(said(&mut socket).unwrap().challenge.is_some());
    assert!(said(&mut socket).is_none());
    kms.wait_for("the peer did not send its proof in time");
    let mut socket = kms.open_attestation(PERSISTENT);
    let _ = socket.send(Message::text("x".repeat(70_000)));
    assert!(said(&mut socket).is_none());
}
