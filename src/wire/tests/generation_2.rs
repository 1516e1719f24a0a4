//! The messages of generation 2: what is written, what is read, and what a server's texts mean to a client.
#![allow(clippy::unwrap_used)] // helpers of tests

use latchkey_wire::{
    MAX_MESSAGE,
    pubhash::Pubhash,
    release::{Refusal, Release},
    v1::Challenge,
    v2::{Answer, Init, Proof, challenge_to_json, text},
};
use zeroize::Zeroizing;

fn bytes(text: &str) -> Zeroizing<Vec<u8>> {
    Zeroizing::new(text.as_bytes().to_vec())
}

#[test]
fn a_challenge_is_written_and_read_as_go_does() {
    let challenge = Challenge { credential: vec![0, 1, 2], secret: vec![0xff] };
    let written = challenge_to_json(&challenge);
    assert_eq!(written, "{\"challenge\":{\"Credential\":\"AAEC\",\"Secret\":\"/w==\"}}\n");
    for message in
        [written.as_str(), written.trim_end(), &written.replace("Credential", "CREDENTIAL")]
    {
        assert_eq!(
            Answer::from_json(message.as_bytes()).unwrap().into_challenge(),
            Ok(challenge.clone()),
            "{message}"
        );
    }
}

#[test]
fn an_answer_is_a_passphrase_or_an_error_and_empty_members_are_left_out() {
    for (answer, written) in [
        (Answer::passphrase(bytes("pass<&>")), "{\"passphrase\":\"cGFzczwmPg==\"}\n"),
        (Answer::refusal("no <such> thing"), "{\"error\":\"no \\u003csuch\\u003e thing\"}\n"),
        (Answer::sealed(bytes("AAEC")), "{\"passphrase\":\"QUFFQw==\",\"generated_by\":\"tpm\"}\n"),
    ] {
        assert_eq!(*answer.to_json(), written);
        assert!(Answer::from_json(written.as_bytes()).unwrap() == answer, "{written}");
    }
    let shown = format!("{:?}", Answer::passphrase(bytes("geheim")));
    assert!(!shown.contains("geheim") && shown.contains("6 bytes"), "{shown}");
}

#[test]
fn an_error_counts_wherever_it_stands() {
    let quarantined = Answer::refusal(text::failed(text::QUARANTINED)).to_json();
    let read = || Answer::from_json(quarantined.as_bytes()).unwrap();
    assert!(matches!(read().into_challenge(), Err(Refusal::Quarantined(_))));
    assert!(matches!(read().classify(), Err(Refusal::Quarantined(_))));
    let neither = || Answer::from_json(b"{}").unwrap();
    assert!(matches!(neither().into_challenge(), Err(Refusal::Other(_))));
    assert_eq!(neither().classify(), Err(Refusal::EmptySecret));
}

#[test]
fn each_text_of_a_server_means_one_thing_and_only_some_may_pass() {
    type Meaning = fn(&Refusal) -> bool;
    let pubhash = Pubhash::of_spki(b"");
    let cases: [(String, Meaning, bool); 16] = [
        (text::failed(text::unknown(&pubhash)), |r| matches!(r, Refusal::UnknownMachine(_)), false),
        (text::failed(text::QUARANTINED), |r| matches!(r, Refusal::Quarantined(_)), false),
        (text::failed(text::ek_mismatch()), |r| matches!(r, Refusal::OtherTpm(_)), false),
        (text::failed(text::pcr_changed("7")), |r| matches!(r, Refusal::BootState(_)), false),
        (text::failed(text::pcr_not_provided("7")), |r| matches!(r, Refusal::BootState(_)), false),
        (
            // Upstream's, with the values it gives away.
            "Attestation verification failed: attestation verification failed: PCR verification failed: PCR7 changed - boot state verification failed: expected 00, got 01".into(),
            |r| matches!(r, Refusal::BootState(_)),
            false,
        ),
        (
            "Attestation verification failed: attestation verification failed: PCR verification failed: no current PCR values provided but PCR7 is required".into(),
            |r| matches!(r, Refusal::BootState(_)),
            false,
        ),
        (text::failed(text::INVALID_SECRET), |r| matches!(r, Refusal::Proof(_)), false),
        (
            text::failed("PCR quote verification failed: unsupported signature algorithm"),
            |r| matches!(r, Refusal::Proof(_)),
            false,
        ),
        (
            text::failed("PCR quote verification failed: PCR digest mismatch at byte 3"),
            |r| matches!(r, Refusal::PcrMoved(_)),
            true,
        ),
        (text::challenge_not_made("AK is exportable"), |r| matches!(r, Refusal::Proof(_)), false),
        (text::init_unreadable("EOF"), |r| matches!(r, Refusal::Other(_)), true),
        (text::proof_unreadable("EOF"), |r| matches!(r, Refusal::Other(_)), true),
        (
            text::failed("determining enrollment context: listing sealed volumes: timeout"),
            |r| matches!(r, Refusal::Other(_)),
            true,
        ),
        (text::failed(text::no_secret("secrets \"x\" not found")), |r| matches!(r, Refusal::Other(_)), true),
        (text::failed(text::no_passphrase("pass")), |r| matches!(r, Refusal::Other(_)), true),
    ];
    for (said, meaning, passes) in cases {
        let read = Answer::from_json(Answer::refusal(said.clone()).to_json().as_bytes()).unwrap();
        let refusal = read.classify().unwrap_err();
        assert!(meaning(&refusal), "{said}: {refusal:?}");
        assert_eq!(refusal.is_transient(), passes, "{said}");
    }
}

#[test]
fn what_generation_1_sealed_is_known_when_it_is_marked_and_guessed_when_it_is_not() {
    let text = "A".repeat(342); // 256 bytes of zeros
    let marked = Answer::from_json(Answer::sealed(bytes(&text)).to_json().as_bytes()).unwrap();
    assert_eq!(marked.classify(), Ok(Release::Sealed(vec![0; 256])));
    let bare = Answer::from_json(Answer::passphrase(bytes(&text)).to_json().as_bytes()).unwrap();
    let release = bare.classify().unwrap();
    assert_eq!(release, Release::Passphrase(bytes(&text)));
    assert_eq!(release.sealed_in_disguise(), Some(vec![0; 256]));
    let made = Release::Passphrase(bytes("q83vEjRWeJCrze8SNFZ4kKvN7xI0VniQq83vEjRWeJA="));
    assert_eq!(made.sealed_in_disguise(), None);
    let damaged = Answer::sealed(bytes("+/8="));
    assert_eq!(damaged.classify(), Err(Refusal::Malformed));
}

#[test]
fn a_message_that_is_none_is_refused_and_not_repeated() {
    for message in [
        "",
        "{",
        "[]",
        "\"text\"",
        "{} {}",
        "{\"ek_public\":3,\"secret\":3,\"passphrase\":3}",
        "{\"ek_public\":\"geheim!\",\"secret\":\"geheim!\",\"passphrase\":\"geheim!\"}",
        "{\"ak_params\":\"\",\"pcr_quote\":\"\",\"challenge\":\"\"}",
    ] {
        for error in [
            Init::from_json(message.as_bytes()).unwrap_err(),
            Proof::from_json(message.as_bytes()).unwrap_err(),
            Answer::from_json(message.as_bytes()).unwrap_err(),
        ] {
            assert!(!error.to_string().contains("geheim"), "{error}");
        }
    }
    let long = format!("{{\"x\":\"{}\"}}", "y".repeat(MAX_MESSAGE));
    assert!(Init::from_json(long.as_bytes()).is_err());
    assert!(Answer::from_json(long.as_bytes()).is_err());
}
