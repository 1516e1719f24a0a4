//! Generation 2 of the protocol (`protocols/kcrypt.md` §6) as the program speaks it, and the choice between the two.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

#[allow(unreachable_pub)]
mod common;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use common::{Machine, answering, begin, not_found, peek_path, releasing, serve};
use latchkey_soft_tpm::SoftTpm;
use latchkey_wire::quote::{self, Policy};
use latchkey_wire::v2::{Answer, text};
use tungstenite::Message;

type Act = Box<dyn Fn(TcpStream) + Send>;

const QUOTE: u32 = 0x158;
const CREATE: u32 = 0x153;

fn act(act: impl Fn(TcpStream) + Send + 'static) -> Act {
    Box::new(act)
}

fn hold(mut stream: TcpStream) {
    let _ = stream.read_to_end(&mut Vec::new());
}

fn machine() -> Machine {
    Machine::speaking("auto", SoftTpm::fresh())
}

fn passphrase(text: &str) -> String {
    Answer::passphrase(text.as_bytes().to_vec().into()).to_json().to_string()
}

fn refusal(text: impl Into<String>) -> String {
    Answer::refusal(text).to_json().to_string()
}

/// Each connection with what its path wants.
fn both(v1: Act, v2: Act) -> Act {
    act(move |stream| match peek_path(&stream).rsplit('/').next() {
        Some("tpm-attestation") => v2(stream),
        _ => v1(stream),
    })
}

/// Counts the connections, by path.
fn noting(paths: &Arc<Mutex<Vec<String>>>, then: Act) -> Act {
    let paths = Arc::clone(paths);
    act(move |stream| {
        paths.lock().unwrap().push(peek_path(&stream));
        then(stream);
    })
}

#[test]
fn the_server_hears_partition_keys_and_wishes_and_gets_a_fresh_quote() {
    let machine = machine();
    machine.tpm.extend_after(CREATE, 7, 1);
    let server = serve(vec![act(|stream| {
        let mut client = begin(stream);
        assert_eq!(client.path, "/a/tpm-attestation");
        assert_eq!(client.header("label"), Some("COS_PERSISTENT"));
        assert_eq!(client.header("authorization"), None);
        assert_eq!(client.header("uuid"), None);
        assert!(client.init.accepts_sealed && client.init.release_only);
        assert!(!client.init.defer_pcr_enrollment);
        let (proof, secret) = client.prove();
        let policy = Policy { nonce: &secret, allow_empty_nonce: false, allowed: &[0, 7, 11] };
        let pcrs = quote::verify(&client.ak(), &proof.pcr_quote, &policy).unwrap();
        assert_eq!(pcrs.keys().copied().collect::<Vec<_>>(), [0, 7, 11]);
        assert_ne!(pcrs[&7], [0; 32], "it was extended");
        // The 44 characters that a server makes are the passphrase: they are not decoded once more.
        client.socket.send(Message::text(passphrase("QUJD"))).unwrap();
    })]);
    machine.configure(&format!("challenger_server: http://{server}/a/"));
    let run = machine.get();
    assert_eq!((run.code, run.text()), (0, "QUJD"), "{}", run.stderr);
}

#[test]
fn the_quote_is_over_the_pcrs_of_the_configuration() {
    let machine = machine();
    let server = serve(vec![act(|stream| {
        let mut client = begin(stream);
        let (proof, _) = client.prove();
        let keys: Vec<_> = proof.pcr_quote.pcrs.keys().map(ToString::to_string).collect();
        client.socket.send(Message::text(passphrase(&keys.join(" ")))).unwrap();
    })]);
    let device = machine.tpm.device();
    machine.write(&format!(
        "kcrypt: {{challenger: {{tpm_device: {device}, challenger_server: 'http://{server}'}}}}\nlatchkey: {{deadline: 10s, pcrs: [4, 7, 2]}}\n"
    ));
    let run = machine.get();
    assert_eq!((run.code, run.text()), (0, "2 4 7"), "{}", run.stderr);
}

/// Every text of §6.7 that no repetition mends: exit code, a word of the message, and one question.
#[test]
fn refusals_for_good_are_not_retried() {
    let pubhash = "00".repeat(32).parse().unwrap();
    let cases = [
        (text::failed(text::QUARANTINED), 30, "quarantine"),
        (text::failed(text::ek_mismatch()), 30, "another TPM"),
        (text::failed(text::pcr_changed("7")), 30, "does not trust how this machine was started"),
        (
            // As upstream words it.
            text::failed(
                "attestation verification failed: PCR verification failed: PCR7 changed - boot state verification failed: expected 00, got 11",
            ),
            30,
            "PCR7 changed",
        ),
        (text::failed(text::pcr_not_provided("11")), 30, "PCR11"),
        (text::failed(text::INVALID_SECRET), 30, "proof"),
        (text::failed("PCR quote verification failed: a nonce is required"), 30, "nonce"),
        (text::challenge_not_made("AK is exportable"), 30, "AK is exportable"),
        (text::failed(text::unknown(&pubhash)), 30, "does not know"),
        ("No secret found for 00 and COS_PERSISTENT".to_owned(), 31, "no secret"),
    ];
    let cases = cases.into_iter().flat_map(|(text, code, word)| {
        let answer = refusal(text);
        let early = answer.clone();
        let early = act(move |stream| {
            let mut client = begin(stream);
            client.socket.send(Message::text(early.as_str())).unwrap();
        });
        [("late", releasing(&answer), code, word), ("early", early, code, word)]
    });
    let others: [(&str, Act, i32, &str); 2] = [
        ("empty", releasing("{}\n"), 31, "empty"),
        ("damaged", releasing(r#"{"passphrase":"KioqKg==","generated_by":"tpm"}"#), 22, "damaged"),
    ];
    let machine = machine();
    for (when, answer, code, word) in cases.chain(others) {
        let asked = Arc::new(AtomicU32::new(0));
        let counter = Arc::clone(&asked);
        machine.serve(serve(vec![act(move |stream| {
            counter.fetch_add(1, Ordering::Relaxed);
            answer(stream);
        })]));
        let run = machine.get();
        assert_eq!(run.code, code, "{when} {word}: {}", run.stderr);
        assert!(run.stderr.contains(word), "{when} {word}: {}", run.stderr);
        assert!(run.stdout.is_empty(), "{when} {word}");
        assert_eq!(asked.load(Ordering::Relaxed), 1, "{when} {word}");
    }
}

/// What passes by itself: the machine asks again, and opens.
#[test]
fn trouble_of_the_server_is_asked_through() {
    let first = |message: &'static str| {
        act(move |stream| {
            let mut client = begin(stream);
            client.socket.send(Message::text(message)).unwrap();
        })
    };
    let cases: [(&str, Act); 10] = [
        ("hangs up at once", act(drop)),
        ("hangs up after the init", act(|stream| drop(begin(stream)))),
        ("hangs up after the proof", act(|stream| drop(begin(stream).prove()))),
        ("sends no JSON for a challenge", first("?")),
        ("sends an empty challenge", first("{}")),
        ("sends half a challenge", first(r#"{"challenge":{"Credential":"AAAA"}}"#)),
        ("has trouble before the challenge", first(r#"{"error":"too many open files"}"#)),
        (
            "has trouble after the proof",
            releasing(&refusal(text::failed("re-enrollment data update: conflict"))),
        ),
        (
            "saw a PCR change",
            releasing(&refusal(text::failed(
                "PCR quote verification failed: PCR digest mismatch at byte 0",
            ))),
        ),
        ("answers with garbage", releasing("garbage")),
    ];
    let machine = machine();
    for (what, trouble) in cases {
        machine.serve(serve(vec![trouble, releasing(&passphrase("at last"))]));
        machine.tpm.take_counts();
        let run = machine.get();
        assert_eq!((run.code, run.text()), (0, "at last"), "{what}: {}", run.stderr);
        assert!(run.stderr.contains("trying again"), "{what}: {}", run.stderr);
        assert_eq!(machine.tpm.take_counts().get(&CREATE), Some(&1), "{what}: one key for all");
    }
}

#[test]
fn a_server_that_stalls_is_named_at_the_deadline() {
    let machine = machine();
    for (what, stall) in [
        ("after the init", act(|stream| hold(begin(stream).socket.into_inner()))),
        (
            "after the proof",
            act(|stream| {
                let mut client = begin(stream);
                client.prove();
                hold(client.socket.into_inner());
            }),
        ),
    ] {
        machine.serve(serve(vec![stall]));
        let run = machine.get();
        assert_eq!(run.code, 21, "{what}: {}", run.stderr);
        assert!(run.stderr.contains("waiting for an answer"), "{what}: {}", run.stderr);
    }
}

#[test]
fn a_pcr_that_changes_between_quote_and_reading_is_quoted_again() {
    let machine = machine();
    machine.tpm.extend_after(QUOTE, 11, 2);
    machine.serve(serve(vec![act(|stream| {
        let mut client = begin(stream);
        let (proof, secret) = client.prove();
        let policy = Policy { nonce: &secret, allow_empty_nonce: false, allowed: &[0, 7, 11] };
        let pcrs = quote::verify(&client.ak(), &proof.pcr_quote, &policy).unwrap();
        assert_ne!(pcrs[&11], [0; 32]);
        client.socket.send(Message::text(passphrase("open"))).unwrap();
    })]));
    let run = machine.get();
    assert_eq!((run.code, run.text()), (0, "open"), "{}", run.stderr);
    assert_eq!(machine.tpm.take_counts().get(&QUOTE), Some(&3));
}

#[test]
fn pcrs_that_never_rest_are_the_reason_at_the_deadline() {
    let machine = machine();
    machine.tpm.extend_after(QUOTE, 11, 1000);
    machine.serve(serve(vec![releasing(&passphrase("open"))]));
    let run = machine.get();
    assert_eq!(run.code, 12, "{}", run.stderr);
    assert!(run.stderr.contains("extended between"), "{}", run.stderr);
}

#[test]
fn what_generation_1_has_sealed_opens_over_generation_2() {
    let machine = machine();
    let sealed = latchkey_tpm::Tpm::open(Some(&machine.tpm.device()))
        .unwrap()
        .seal_blob(0x8100_0008, b"made by the machine")
        .unwrap();
    let block = latchkey_wire::v1::Payload::sealed(&sealed).passphrase.as_bytes().to_vec();
    // Marked, as our server does; and as a Go server hands it out, for the passphrase itself.
    for answer in [Answer::sealed(block.clone().into()), Answer::passphrase(block.clone().into())] {
        machine.serve(serve(vec![releasing(&answer.to_json())]));
        let run = machine.get();
        assert_eq!((run.code, run.text()), (0, "made by the machine"), "{}", run.stderr);
    }
    // A passphrase that only looks like it.
    let text = "A".repeat(342);
    machine.serve(serve(vec![releasing(&passphrase(&text))]));
    let run = machine.get();
    assert_eq!((run.code, run.text()), (0, text.as_str()), "{}", run.stderr);
}

#[test]
fn a_server_of_generation_1_is_recognized_by_404_and_remembered() {
    let machine = machine();
    let paths = Arc::default();
    let trouble = answering(r#"{"error":"etcdserver: request timed out"}"#);
    let asked = AtomicU32::new(0);
    let good = answering(r#"{"passphrase":"old"}"#);
    let v1 = act(move |stream| match asked.fetch_add(1, Ordering::Relaxed) {
        0 => trouble(stream),
        _ => good(stream),
    });
    machine.serve(serve(vec![noting(&paths, both(v1, act(not_found)))]));
    let run = machine.get();
    assert_eq!((run.code, run.text()), (0, "old"), "{}", run.stderr);
    let paths = paths.lock().unwrap();
    assert_eq!(*paths, ["/tpm-attestation", "/getPass", "/getPass"]);
}

#[test]
fn a_path_without_any_kcrypt_is_named() {
    let machine = machine();
    machine.serve(serve(vec![act(not_found)]));
    let run = machine.get();
    assert_eq!(run.code, 21, "{}", run.stderr);
    assert!(run.stderr.contains("404") && run.stderr.contains("path"), "{}", run.stderr);
}

#[test]
fn a_generation_that_is_set_is_kept() {
    for (protocol, code) in [("v1", 0), ("v2", 21)] {
        let machine = Machine::speaking(protocol, SoftTpm::fresh());
        let paths = Arc::default();
        let old = both(answering(r#"{"passphrase":"old"}"#), act(not_found));
        machine.serve(serve(vec![noting(&paths, old)]));
        let run = machine.get();
        assert_eq!(run.code, code, "{protocol}: {}", run.stderr);
        let wanted = if protocol == "v1" { "/getPass" } else { "/tpm-attestation" };
        assert!(paths.lock().unwrap().iter().all(|path| path == wanted), "{protocol}");
    }
}

/// An installer's question about a partition that is not encrypted yet may make a passphrase; a question about one
/// that is must not.
#[test]
fn only_an_installation_may_have_a_passphrase_made() {
    let machine = machine();
    machine.serve(serve(vec![act(|stream| {
        let mut client = begin(stream);
        let told = format!("{} {:?}", client.init.release_only, client.header("uuid"));
        client.prove();
        client.socket.send(Message::text(passphrase(&told))).unwrap();
    })]));
    for (kind, told) in
        [("ext4", "false Some(\\\"u-1\\\")"), ("crypto_LUKS", "true Some(\\\"u-1\\\")")]
    {
        let event = format!(
            r#"{{"name":"discovery.password","data":"{{\"partition\":{{\"label\":\"COS_PERSISTENT\",\"fs\":\"{kind}\",\"uuid\":\"u-1\"}}}}","file":""}}"#
        );
        let run = machine.run_with(&["discovery.password"], event.as_bytes(), &[]);
        assert_eq!(run.code, 0, "{}", run.stderr);
        assert!(run.text().contains(told), "{kind}: {}", run.text());
    }
}

#[test]
fn an_event_that_asks_for_mdns_without_a_local_name_is_a_mistake() {
    let machine = machine();
    let event = r#"{"name":"discovery.password","data":"{\"partition\":{\"label\":\"COS_PERSISTENT\"},\"challenger_server\":\"http://10.0.0.1\",\"mdns\":true}","file":""}"#;
    let run = machine.run_with(&["discovery.password"], event.as_bytes(), &[]);
    assert!(run.text().contains("NAME.local"), "{}", run.text());
}

/// What Go's servers sent to the recorded clients. The credentials were made for a TPM whose endorsement key cannot be
/// put into another TPM, so that everything is taken up to the TPM itself, which says that they are not for it; no
/// client could do more with a recording.
#[test]
fn recorded_challenges_of_both_generations_are_read_up_to_the_tpm() {
    let recorded: serde_json::Value =
        serde_json::from_str(include_str!("../../../tests/vectors/kcrypt.json")).unwrap();
    let of = |name: &str| recorded["software_ek"][name].to_string();
    let (first, second) = (of("challenge_v1"), of("challenge_v2"));
    let v1 = act(move |stream| {
        let mut client = common::upgrade(stream);
        client.socket.send(Message::binary(first.clone().into_bytes())).unwrap();
        let _ = client.socket.read();
    });
    let v2 = act(move |stream| {
        let mut client = begin(stream);
        client.socket.send(Message::text(second.clone() + "\n")).unwrap();
        let _ = client.socket.read();
    });
    let server = serve(vec![both(v1, v2)]);
    for protocol in ["v1", "v2"] {
        let machine = Machine::speaking(protocol, SoftTpm::fresh());
        machine.serve(server);
        let run = machine.get();
        assert_eq!(run.code, 12, "{protocol}: {}", run.stderr);
        assert!(run.stderr.contains("ActivateCredential"), "{protocol}: {}", run.stderr);
    }
}

/// A server in a race, by what it does.
fn server(act: Act) -> SocketAddr {
    serve(vec![act])
}

fn list(servers: &[SocketAddr]) -> String {
    let lines: Vec<_> = servers.iter().map(|server| format!("\n  - http://{server}")).collect();
    format!("challenger_server:{}", lines.concat())
}

/// Whatever the first of two servers does, the second one opens; within a deadline that no stall leaves room for.
#[test]
fn the_first_verified_answer_wins() {
    let quarantined = refusal(text::failed(text::QUARANTINED));
    let stalled = act(|stream| {
        let mut client = begin(stream);
        client.prove();
        hold(client.socket.into_inner());
    });
    let firsts: [(&str, Act); 9] = [
        ("accepts and stalls", act(hold)),
        ("stalls after the init", act(|stream| hold(begin(stream).socket.into_inner()))),
        ("stalls after the proof", stalled),
        ("hangs up", act(drop)),
        ("sends garbage", act(|mut stream| drop(stream.write_all(b"SSH-2.0-OpenSSH_9.2\r\n")))),
        ("has no kcrypt", act(not_found)),
        ("refuses", releasing(&quarantined)),
        ("refuses at once", {
            let quarantined = quarantined.clone();
            act(move |stream| {
                begin(stream).socket.send(Message::text(quarantined.as_str())).unwrap();
            })
        }),
        (
            "speaks generation 1 and has trouble",
            both(answering(r#"{"error":"x"}"#), act(not_found)),
        ),
    ];
    let machine = machine();
    for (what, first) in firsts {
        machine.configure(&list(&[server(first), server(releasing(&passphrase("open")))]));
        let run = machine.get();
        assert_eq!((run.code, run.text()), (0, "open"), "{what}: {}", run.stderr);
    }
}

#[test]
fn a_black_hole_and_a_dead_name_do_not_hold_up_a_server_with_an_address() {
    let machine = machine();
    let good = server(releasing(&passphrase("open")));
    for first in ["http://203.0.113.1:8082", "http://kms.invalid", "http://127.0.0.1:9"] {
        machine.configure(&format!("challenger_server: ['{first}', 'http://{good}']"));
        let run = machine.get();
        assert_eq!((run.code, run.text()), (0, "open"), "{first}: {}", run.stderr);
    }
}

#[test]
fn a_refusal_stands_when_no_other_server_knows_better() {
    let refused = || server(releasing(&refusal(text::failed(text::QUARANTINED))));
    let closed = "127.0.0.1:9".parse().unwrap();
    let machine = machine();
    for servers in [[refused(), refused()], [refused(), closed], [closed, refused()]] {
        machine.configure(&list(&servers));
        let run = machine.get();
        assert_eq!(run.code, 30, "{}", run.stderr);
        assert!(run.stderr.contains("quarantine"), "{}", run.stderr);
        assert!(!run.stderr.contains("deadline"), "{}", run.stderr);
    }
}

#[test]
fn an_address_of_ipv6_is_a_server_too() {
    let listener = std::net::TcpListener::bind("[::1]:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            releasing(&passphrase("v6"))(stream);
        }
    });
    let machine = machine();
    machine.configure(&format!("challenger_server: 'http://{address}'"));
    let run = machine.get();
    assert_eq!((run.code, run.text()), (0, "v6"), "{}", run.stderr);
}
