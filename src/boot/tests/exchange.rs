//! What the program makes of everything a key server, or something in its place, can do on the wire.

#![allow(clippy::unwrap_used, clippy::panic)]

#[allow(unreachable_pub)]
mod common;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use common::{Machine, answering, authenticate, serve, upgrade};
use latchkey_soft_tpm::SoftTpm;
use tungstenite::Message;

type Act = Box<dyn Fn(TcpStream) + Send>;

fn act(act: impl Fn(TcpStream) + Send + 'static) -> Vec<Act> {
    vec![Box::new(act)]
}

fn hold(stream: TcpStream) {
    // Until the other side gives up.
    let mut stream = stream;
    let _ = stream.read_to_end(&mut Vec::new());
}

#[test]
fn a_released_passphrase_is_printed_without_a_newline() {
    let machine = Machine::new(SoftTpm::certified());
    machine.serve(serve(vec![answering(
        r#"{"passphrase":"open <sesame> é","error":"","generated_by":""}"#,
    )]));
    let run = machine.get();
    assert_eq!((run.code, run.text()), (0, "open <sesame> é"), "{}", run.stderr);
}

#[test]
fn frames_may_be_text_or_binary_and_end_with_a_newline_or_not() {
    let machine = Machine::new(SoftTpm::fresh());
    machine.serve(serve(act(|stream| {
        let mut client = upgrade(stream);
        let (challenge, _) = common::challenge(&client.token);
        client.socket.send(Message::text(challenge.to_json() + "\n")).unwrap();
        client.socket.read().unwrap();
        client.socket.send(Message::Ping(Vec::new().into())).unwrap();
        client.socket.send(Message::text(r#"{"PASSPHRASE":"x"}"#)).unwrap();
    })));
    let run = machine.get();
    assert_eq!((run.code, run.text()), (0, "x"), "{}", run.stderr);
}

#[test]
fn the_server_hears_the_partition_and_the_path_that_the_url_has() {
    let machine = Machine::new(SoftTpm::fresh());
    let server = serve(act(|stream| {
        let mut client = authenticate(stream);
        let told = format!(r#"{{"passphrase":"{} {}"}}"#, client.path, client.label);
        client.socket.send(Message::text(told)).unwrap();
    }));
    for suffix in ["", "/"] {
        machine.configure(&format!("challenger_server: ws://{server}/a/b{suffix}"));
        assert_eq!(machine.get().text(), "/a/b/getPass COS_PERSISTENT");
    }
}

/// A refusal, and what it must lead to: the exit code, a word of the message, and no second try.
#[test]
fn refusals_are_not_retried() {
    let cases = [
        (
            r#"{"passphrase":"","error":"quarantined: COS_PERSISTENT","generated_by":""}"#,
            30,
            "quarantine",
        ),
        (r#"{"error":"no volume found with data from request and hash: 00"}"#, 30, "does not know"),
        (r#"{"error":"No secret found for 00 and COS_PERSISTENT"}"#, 31, "no secret"),
        (r#"{"passphrase":"","error":"","generated_by":""}"#, 31, "empty"),
        (r#"{"passphrase":"***","generated_by":"tpm"}"#, 22, "damaged"),
        (r#"{"passphrase":"with\nnewline"}"#, 10, "line end"),
    ];
    for (payload, code, word) in cases {
        let machine = Machine::new(SoftTpm::fresh());
        let asked = Arc::new(AtomicU32::new(0));
        let (counter, answer) = (Arc::clone(&asked), answering(payload));
        machine.serve(serve(act(move |stream| {
            counter.fetch_add(1, Ordering::Relaxed);
            answer(stream);
        })));
        let run = machine.get();
        assert_eq!(run.code, code, "{payload}: {}", run.stderr);
        assert!(run.stderr.contains(word), "{payload}: {}", run.stderr);
        assert!(run.stdout.is_empty(), "{payload}: {run:?}");
        assert_eq!(asked.load(Ordering::Relaxed), 1, "{payload}");
    }
}

#[test]
fn a_passphrase_that_another_tpm_sealed_is_the_tpms_error() {
    let other = SoftTpm::fresh();
    let sealed = latchkey_tpm::Tpm::open(Some(&other.device()))
        .unwrap()
        .seal_blob(0x8100_0008, b"x")
        .unwrap();
    let payload = latchkey_wire::v1::Payload::sealed(&sealed).to_json().to_string();
    let machine = Machine::new(SoftTpm::fresh());
    machine.serve(serve(vec![answering(payload.leak())]));
    let run = machine.get();
    assert_eq!(run.code, 12, "{}", run.stderr);
    assert!(run.stderr.contains("RSA_Decrypt"), "{}", run.stderr);
}

/// Everything that may be better the next time: it is tried again, and named at the deadline.
#[test]
fn trouble_is_retried_until_the_deadline_and_then_named() {
    let raw = |bytes: &'static [u8]| {
        act(move |mut stream| {
            let _ = stream.read(&mut [0; 8192]);
            let _ = stream.write_all(bytes);
        })
    };
    let first = |message: Message| {
        act(move |stream| {
            let mut client = upgrade(stream);
            client.socket.send(message.clone()).unwrap();
            hold(client.socket.into_inner());
        })
    };
    let sized = |credential: usize, secret: usize| {
        let challenge = latchkey_wire::v1::Challenge {
            credential: [
                &(credential as u16).to_be_bytes()[..],
                &0x20_u16.to_be_bytes(),
                &vec![7; credential - 2],
            ]
            .concat(),
            secret: [&(secret as u16).to_be_bytes()[..], &vec![7; secret]].concat(),
        };
        Message::binary(challenge.to_json().into_bytes())
    };
    let cases: Vec<(&str, Vec<Act>, i32, &str)> = vec![
        ("hangs up at once", act(drop), 21, "upgrade"),
        ("accepts and stalls", act(hold), 21, "upgrade"),
        ("is no HTTP server", raw(b"SSH-2.0-OpenSSH_9.2\r\n"), 22, "not kcrypt's protocol"),
        (
            "has no such path",
            raw(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"),
            21,
            "404",
        ),
        ("redirects", raw(b"HTTP/1.1 301 Moved\r\nLocation: /getPass\r\n\r\n"), 21, "slash"),
        ("upgrades and hangs up", act(|stream| drop(upgrade(stream))), 21, "attestation"),
        (
            "upgrades and stalls",
            act(|stream| hold(upgrade(stream).socket.into_inner())),
            21,
            "waiting for an answer",
        ),
        ("sends no JSON", first(Message::binary(vec![0xff; 70])), 22, "not kcrypt's protocol"),
        ("sends an empty challenge", first(Message::text("{}")), 22, "70 bytes"),
        (
            "sends an error for a challenge",
            first(Message::text(r#"{"error":"no room"}"#)),
            21,
            "no room",
        ),
        ("sends 1 MiB", first(Message::binary(vec![b' '; 1 << 20])), 22, "not kcrypt's protocol"),
        ("sends a short credential", first(sized(40, 256)), 22, "70 bytes"),
        ("sends a credential for another TPM", first(sized(68, 256)), 12, "ActivateCredential"),
        (
            "hangs up after the answer",
            act(|stream| drop(authenticate(stream))),
            21,
            "closed the connection",
        ),
        (
            "stalls after the answer",
            act(|stream| hold(authenticate(stream).socket.into_inner())),
            21,
            "waiting for an answer",
        ),
        ("answers with garbage", vec![answering("garbage")], 22, "not kcrypt's protocol"),
        (
            "has trouble of its own",
            vec![answering(r#"{"error":"etcdserver: request timed out"}"#)],
            21,
            "etcdserver",
        ),
    ];
    // A few at a time: each makes an RSA key in its TPM before the deadline.
    let cases = Mutex::new(cases);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while let Some((name, acts, code, word)) = { cases.lock().unwrap().pop() } {
                    let machine = Machine::new(SoftTpm::fresh());
                    machine.serve(serve(acts));
                    let run = machine.get();
                    assert_eq!(run.code, code, "{name}: {}", run.stderr);
                    assert!(run.stderr.contains(word), "{name}: {}", run.stderr);
                    assert!(
                        run.stderr.contains("the deadline of 10 s passed"),
                        "{name}: {}",
                        run.stderr
                    );
                    assert!(run.stdout.is_empty(), "{name}");
                }
            });
        }
    });
}

#[test]
fn a_server_that_recovers_is_asked_again_with_the_same_key() {
    let machine = Machine::new(SoftTpm::fresh());
    machine.serve(serve(vec![
        Box::new(drop),
        answering(r#"{"error":"secrets is forbidden"}"#),
        answering(r#"{"passphrase":"at last"}"#),
    ]));
    let run = machine.get();
    assert_eq!((run.code, run.text()), (0, "at last"), "{}", run.stderr);
    assert_eq!(
        machine.tpm.take_counts().get(&0x153),
        Some(&1),
        "one attestation key for all attempts"
    );
}

#[test]
fn a_closed_port_and_a_name_that_does_not_resolve_are_told_apart() {
    let machine = Machine::new(SoftTpm::fresh());
    machine.configure("challenger_server: http://127.0.0.1:9");
    let run = machine.get();
    assert_eq!(run.code, 21, "{}", run.stderr);
    assert!(run.stderr.contains("refused"), "{}", run.stderr);
    machine.configure("challenger_server: http://latchkey.invalid:8082");
    let run = machine.get();
    assert_eq!(run.code, 20, "{}", run.stderr);
    assert!(run.stderr.contains("latchkey.invalid"), "{}", run.stderr);
}

#[test]
fn a_tls_port_that_speaks_no_tls_or_has_another_ca_is_named_as_such() {
    let machine = Machine::new(SoftTpm::fresh());
    let server = serve(act(|mut stream| {
        let _ = stream.read(&mut [0; 8192]);
        let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n");
    }));
    machine.configure(&format!("challenger_server: https://{server}"));
    let run = machine.get();
    assert_eq!(run.code, 21, "{}", run.stderr);
    assert!(run.stderr.contains("TLS with"), "{}", run.stderr);
}

#[test]
fn every_fault_of_the_tpm_has_its_exit_code() {
    const READ_PUBLIC: u32 = 0x173;
    const CREATE: u32 = 0x153;
    const CREATE_PRIMARY: u32 = 0x131;
    for (command, response, code, word) in [
        (READ_PUBLIC, 0x101, 12, "0x101"),
        (CREATE, 0x921, 13, "lockout"),
        (CREATE_PRIMARY, 0x9a2, 14, "endorsement hierarchy has a password"),
    ] {
        let machine = Machine::new(SoftTpm::fresh());
        machine.configure("challenger_server: http://127.0.0.1:9");
        machine.tpm.answer(command, &[response; 40]);
        let run = machine.get();
        assert_eq!(run.code, code, "{}", run.stderr);
        assert!(run.stderr.contains(word), "{}", run.stderr);
    }
    let machine = Machine::new(SoftTpm::fresh());
    machine.write("kcrypt: {challenger: {tpm_device: /nonexistent/tpm}}\n");
    let run = machine.get();
    assert_eq!(run.code, 11, "{}", run.stderr);
    assert!(run.stderr.contains("/nonexistent/tpm"), "{}", run.stderr);
}

#[test]
fn a_bad_configuration_stops_before_the_tpm_is_touched() {
    for (yaml, word) in [
        ("kcrypt:\n  challenger:\n    challenger_sever: http://a\n", "challenger_server"),
        ("kcrypt:\n  challenger:\n    nv_index: [1]\n", ":4"),
        ("kcrypt: {\n", "YAML"),
        ("kcrypt: {challenger: {challenger_server: 'ftp://a'}}\n", "challenger_server"),
    ] {
        let machine = Machine::new(SoftTpm::fresh());
        machine.write(yaml);
        let run = machine.get();
        assert_eq!(run.code, 10, "{yaml}: {}", run.stderr);
        assert!(
            run.stderr.contains(word) && run.stderr.contains("90_latchkey.yaml"),
            "{}",
            run.stderr
        );
        assert!(machine.tpm.take_counts().is_empty());
    }
}
