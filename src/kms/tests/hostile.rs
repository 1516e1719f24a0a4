//! Peers that are broken, slow, or not who they say; and how the server starts and stops.
#![allow(clippy::unwrap_used)] // helpers of tests

use std::{
    fs,
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    sync::Arc,
};

use latchkey_wire::v1::Token;
use rustls::{ClientConfig, ClientConnection, StreamOwned, pki_types::PrivateKeyDer};
use tungstenite::{
    Message,
    protocol::frame::{
        Frame, FrameHeader,
        coding::{Data, OpCode},
    },
};

mod rig;
use rig::{Kms, MACHINE, PERSISTENT, STRANGER, secret, store};

fn ordinary() -> tempfile::TempDir {
    store(&[(
        "node.yaml",
        &(MACHINE.volume("node", "") + &secret("node-cos-persistent", "  passphrase: found\n")),
    )])
}

fn still_serves(kms: &Kms) {
    assert_eq!(*kms.get(&MACHINE, PERSISTENT).unwrap().passphrase, "found");
}

/// Sends bytes and reads until the server closes.
fn talk(kms: &Kms, bytes: &[u8]) -> String {
    let mut stream = kms.connect();
    let _ = stream.write_all(bytes); // a server that has seen enough may close
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

#[test]
fn requests_that_open_no_websocket_are_turned_away() {
    let directory = ordinary();
    let kms = Kms::start(directory.path());
    let handshake = "GET /getPass HTTP/1.1\r\nHost: kms\r\nConnection: keep-alive, Upgrade\r\nUpgrade: WebSocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
    for (case, request, status) in [
        ("as it must be", format!("{handshake}\r\n"), "101"),
        ("own origin", format!("{handshake}Origin: http://KMS\r\n\r\n"), "101"),
        ("foreign origin", format!("{handshake}Origin: http://evil.example\r\n\r\n"), "403"),
        ("other path", handshake.replace("/getPass", "/attestation") + "\r\n", "404"),
        ("path in other case", handshake.replace("/getPass", "/getpass") + "\r\n", "404"),
        ("root", handshake.replace("/getPass", "/") + "\r\n", "404"),
        ("no upgrade", handshake.replace("keep-alive, Upgrade", "close") + "\r\n", "400"),
        ("other upgrade", handshake.replace("WebSocket\r\n", "h2c\r\n") + "\r\n", "400"),
        ("old version", handshake.replace(": 13", ": 8") + "\r\n", "426"),
        ("no key", handshake.replace("Sec-WebSocket-Key", "X-Key") + "\r\n", "400"),
        ("short key", handshake.replace("dGhlIHNh", "") + "\r\n", "400"),
        ("POST", handshake.replace("GET", "POST") + "\r\n", "405"),
        (
            "huge header",
            format!("{handshake}Authorization: {}\r\n\r\n", "A".repeat(64 * 1024)),
            "431",
        ),
        ("many headers", format!("{handshake}{}\r\n", "X: y\r\n".repeat(500)), "431"),
        ("no HTTP", "\x16\x03\x01\x02\x00\x01\x00\x01\r\n\r\n".to_owned(), "400"),
        ("endless line", "G".repeat(64 * 1024), "4"),
    ] {
        let answer = talk(&kms, request.as_bytes());
        let told = answer.strip_prefix("HTTP/1.1 ").unwrap_or_default();
        assert!(told.starts_with(status), "{case}: {answer:.60}");
        if status == "101" {
            // RFC 6455 §1.3: the answer to this very key.
            assert!(
                answer
                    .to_ascii_lowercase()
                    .contains("sec-websocket-accept: s3pplmbitxaq9kygzzhzrbk+xoo="),
                "{answer}"
            );
        }
    }
    still_serves(&kms);
}

#[test]
fn a_peer_that_does_not_prove_itself_learns_nothing() {
    let directory = ordinary();
    let kms = Kms::start(directory.path());
    let header = MACHINE.token.authorization_header();
    let with = |change: &dyn Fn(&mut Token)| {
        let mut token = MACHINE.token.clone();
        change(&mut token);
        token.authorization_header()
    };
    // Refused before a challenge: nothing at all is sent.
    for (case, authorization) in [
        ("nothing", String::new()),
        ("a space", header.replace("TPM", "TPM ")),
        ("another scheme", "Basic dXNlcjpwYXNz".to_owned()),
        ("no base64", "Bearer TPM?".to_owned()),
        ("no JSON", "Bearer TPMAAAA".to_owned()),
        ("empty token", format!("Bearer TPM{}", "e30=")),
        ("too long", "A".repeat(20_000)),
        ("no EK", with(&|token| token.ek_pem.clear())),
        (
            "EK of another kind",
            with(&|token| token.ek_pem = token.ek_pem.replace("PUBLIC KEY", "PRIVATE KEY")),
        ),
        ("no AK", with(&|token| token.ak = Default::default())),
        ("AK changed", with(&|token| token.ak.public[100] ^= 1)),
        ("AK that may leave its TPM", with(&|token| token.ak.public[7] &= !2)),
        ("AK signature changed", with(&|token| token.ak.create_signature[100] ^= 1)),
        ("AK with bytes behind", with(&|token| token.ak.create_data.push(0))),
    ] {
        for path in ["/getPass", "/postPass"] {
            let mut socket = kms.open(path, &authorization, PERSISTENT);
            assert!(socket.read().is_err(), "{case}: nothing is sent");
            kms.wait_for("result=unauthenticated");
            kms.forget_log();
        }
    }
    // Refused after the challenge: nothing more is sent.
    type Proof = fn(&mut Vec<u8>);
    let proofs: [(&str, Proof); 6] = [
        ("wrong", |json| {
            *json = br#"{"Secret":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="}"#.to_vec()
        }),
        ("empty", |json| *json = br#"{"Secret":""}"#.to_vec()),
        ("short", |json| *json = br#"{"Secret":"AA=="}"#.to_vec()),
        ("null", |json| *json = b"null".to_vec()),
        ("no JSON", |json| *json = b"\xff\xfe".to_vec()),
        ("too long", |json| json.extend([b' '; 70_000])),
    ];
    for (case, change) in proofs {
        for path in ["/getPass", "/postPass"] {
            let mut socket = kms.open(path, &header, PERSISTENT);
            let mut proof =
                MACHINE.activate(&rig::challenge(&mut socket)).to_json().as_bytes().to_vec();
            change(&mut proof);
            let _ = socket.send(Message::binary(proof));
            assert!(socket.read().is_err(), "{case}: nothing is sent");
            kms.wait_for("result=unauthenticated");
            kms.forget_log();
        }
    }
    // The proof of one exchange is worth nothing in another.
    let mut first = kms.open("/getPass", &header, PERSISTENT);
    let proof = MACHINE.activate(&rig::challenge(&mut first)).to_json();
    let mut second = kms.open("/getPass", &header, PERSISTENT);
    rig::challenge(&mut second);
    second.send(Message::text(proof.to_string())).unwrap();
    assert!(second.read().is_err());
    still_serves(&kms);
}

#[test]
fn a_machine_gets_only_what_is_its_own() {
    let directory = ordinary();
    let kms = Kms::start(directory.path());
    let answer = kms.get(&STRANGER, PERSISTENT).unwrap();
    assert_eq!(
        answer.error,
        format!("no volume found with data from request and hash: {}", STRANGER.pubhash)
    );
    // The EK of one machine with the proof of another: the challenge is for the EK that was shown.
    let mut socket = kms.open("/getPass", &MACHINE.token.authorization_header(), PERSISTENT);
    let challenge = rig::challenge(&mut socket);
    assert!(std::panic::catch_unwind(|| STRANGER.activate(&challenge)).is_err());
}

#[test]
fn broken_frames_end_the_exchange_and_nothing_else() {
    let directory = ordinary();
    let kms = Kms::start(directory.path());
    let unmasked = [0x82, 0x02, b'{', b'}'];
    let reserved_opcode = [0x83, 0x80, 0, 0, 0, 0];
    let reserved_bits = [0xf2, 0x80, 0, 0, 0, 0];
    let huge = [0x82, 0xff, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0];
    let endless_fragments = [0x02, 0x80, 0, 0, 0, 0].repeat(50);
    let fragment_first = [0x80, 0x80, 0, 0, 0, 0];
    let bad_text = [0x81, 0x82, 0, 0, 0, 0, 0xff, 0xfe];
    let close = [0x88, 0x80, 0, 0, 0, 0];
    let half = [0x82, 0xfe, 0x10];
    for (case, bytes) in [
        ("unmasked", &unmasked[..]),
        ("reserved opcode", &reserved_opcode),
        ("reserved bits", &reserved_bits),
        ("longer than memory", &huge),
        ("fragments", &endless_fragments),
        ("continuation of nothing", &fragment_first),
        ("text that is none", &bad_text),
        ("close", &close),
        ("half a frame", &half),
        ("nothing", &[]),
    ] {
        let mut socket = kms.open("/getPass", &MACHINE.token.authorization_header(), PERSISTENT);
        rig::challenge(&mut socket);
        let stream = socket.get_mut();
        stream.write_all(bytes).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
        assert!(!String::from_utf8_lossy(&rest).contains("passphrase"), "{case}");
        kms.wait_for("result=unauthenticated");
        kms.forget_log();
    }
    still_serves(&kms);
}

#[test]
fn a_message_in_fragments_has_the_same_bound() {
    let directory = ordinary();
    let kms = Kms::start(directory.path());
    let mut socket = kms.open("/getPass", &MACHINE.token.authorization_header(), PERSISTENT);
    rig::challenge(&mut socket);
    let fragment = |opcode| {
        let header = FrameHeader {
            is_final: false,
            opcode: OpCode::Data(opcode),
            mask: Some([0; 4]),
            ..FrameHeader::default()
        };
        Message::Frame(Frame::from_payload(header, vec![b' '; 16 * 1024].into()))
    };
    let mut sent = socket.send(fragment(Data::Binary));
    for _ in 0..1024 {
        sent = sent.and_then(|()| socket.send(fragment(Data::Continue)));
    }
    assert!(sent.is_err(), "16 MiB went into one message");
    kms.wait_for("result=unauthenticated");
    still_serves(&kms);
}

#[test]
fn slow_peers_are_cut_and_hold_nobody_up() {
    let directory = ordinary();
    let kms =
        Kms::start_with(directory.path(), &["--handshake-timeout", "1", "--message-timeout", "1"]);
    let header = MACHINE.token.authorization_header();
    let silent: Vec<TcpStream> = (0..50).map(|_| kms.connect()).collect();
    let mut half_head = kms.connect();
    half_head.write_all(b"GET /getPass HTTP/1.1\r\nHost: x\r\n").unwrap();
    let mut no_proof = kms.open("/getPass", &header, PERSISTENT);
    rig::challenge(&mut no_proof);
    let mut no_payload = kms.open("/postPass", &header, PERSISTENT);
    rig::prove(&mut no_payload, &MACHINE);
    still_serves(&kms);
    for mut stream in silent.into_iter().chain([half_head]) {
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).unwrap();
    }
    assert!(no_proof.read().is_err());
    kms.wait_for("the peer did not answer the challenge in time");
    assert!(no_payload.read().is_err());
    kms.wait_for("the peer did not send its passphrase in time");
    // Bytes that trickle in do not stretch a deadline.
    let mut trickle = kms.open("/getPass", &header, PERSISTENT);
    rig::challenge(&mut trickle);
    kms.forget_log();
    let stream = trickle.get_mut();
    stream.write_all(&[0x82, 0xfe, 0x10, 0x00, 0, 0, 0, 0]).unwrap();
    while stream.write_all(b" ").is_ok() {
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    kms.wait_for("the peer did not answer the challenge in time");
    still_serves(&kms);
}

#[test]
fn beyond_the_limit_the_oldest_that_has_proved_nothing_makes_place() {
    let directory = ordinary();
    let kms = Kms::start_with(directory.path(), &["--max-connections", "2"]);
    let header = MACHINE.token.authorization_header();
    let open = || {
        let mut socket = kms.open("/getPass", &header, PERSISTENT);
        let challenge = rig::challenge(&mut socket);
        (socket, challenge)
    };
    let (mut oldest, _) = open();
    let (mut older, challenge) = open();
    let (mut newest, _) = open();
    kms.wait_for("closed to make place");
    assert!(oldest.read().is_err());
    let proof = MACHINE.activate(&challenge).to_json();
    older.send(Message::binary(proof.as_bytes().to_vec())).unwrap();
    assert_eq!(*rig::answer(&mut older).unwrap().passphrase, "found");
    drop(older);
    still_serves(&kms);
    newest.close(None).unwrap();
}

#[test]
fn what_peers_write_cannot_forge_a_line_of_the_log() {
    let directory = ordinary();
    let kms = Kms::start(directory.path());
    kms.get(
        &MACHINE,
        ["COS_PERSISTENT", "x\" result=granted y=\"", "\u{1b}[2J"]
            .map(|fact| if fact.contains('\u{1b}') { "z\u{fc}" } else { fact }),
    );
    let line = kms.wait_for("request endpoint=getPass");
    assert!(line.contains(r#"uuid="x\" result=granted y=\"""#), "{line}");
}

#[test]
fn over_tls_the_exchange_is_the_same() {
    let (directory, files) = (ordinary(), tempfile::tempdir().unwrap());
    let (cert, key, roots) = rig::certificate(files.path());
    let kms = Kms::start_with(
        directory.path(),
        &["--tls-cert", &cert, "--tls-key", &key, "--handshake-timeout", "2"],
    );
    let config =
        ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
    let connection =
        ClientConnection::new(Arc::new(config), "localhost".try_into().unwrap()).unwrap();
    let stream = StreamOwned::new(connection, kms.connect());
    let mut socket = rig::upgrade(
        stream,
        kms.address,
        "/getPass",
        &MACHINE.token.authorization_header(),
        PERSISTENT,
    );
    rig::prove(&mut socket, &MACHINE);
    assert_eq!(*rig::answer(&mut socket).unwrap().passphrase, "found");
    // Plain HTTP on this port, and a peer that says nothing.
    assert!(!talk(&kms, b"GET /getPass HTTP/1.1\r\n\r\n").contains("HTTP"));
    kms.wait_for("TLS handshake failed");
    assert_eq!(talk(&kms, b""), "");
    kms.wait_for("said nothing in time");
    assert_eq!(talk(&kms, &[22, 3, 1]), "");
    kms.wait_for("TLS handshake took too long");
}

#[test]
fn what_keeps_the_server_from_starting_is_said_with_an_exit_code() {
    let (directory, files) = (ordinary(), tempfile::tempdir().unwrap());
    let (cert, key, _) = rig::certificate(files.path());
    let other = tempfile::tempdir().unwrap();
    let (other_cert, _, _) = rig::certificate(other.path());
    let empty = files.path().join("empty.pem").display().to_string();
    fs::write(&empty, "nothing\n").unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap().to_string();
    let missing = files.path().join("missing").display().to_string();
    let (good, free) = (directory.path().to_owned(), "127.0.0.1:0");
    for (case, store, options, code, told) in [
        ("no store", files.path().join("missing"), vec!["--listen", free], 3, "No such file"),
        (
            "store is a file",
            files.path().join("cert.pem"),
            vec!["--listen", free],
            3,
            "Not a directory",
        ),
        ("port in use", good.clone(), vec!["--listen", &taken], 4, "another program has this port"),
        (
            "foreign address",
            good.clone(),
            vec!["--listen", "192.0.2.1:8082"],
            4,
            "this machine does not have this address",
        ),
        (
            "no certificate",
            good.clone(),
            vec!["--tls-cert", &missing, "--tls-key", &key],
            5,
            &missing,
        ),
        (
            "empty certificate",
            good.clone(),
            vec!["--tls-cert", &empty, "--tls-key", &key],
            5,
            "there is no certificate in it",
        ),
        ("no key", good.clone(), vec!["--tls-cert", &cert, "--tls-key", &missing], 5, &missing),
        (
            "key is a certificate",
            good.clone(),
            vec!["--tls-cert", &cert, "--tls-key", &cert],
            5,
            "the private key",
        ),
        (
            "key of another",
            good.clone(),
            vec!["--tls-cert", &other_cert, "--tls-key", &key],
            5,
            "not usable together",
        ),
        ("half of TLS", good.clone(), vec!["--tls-cert", &cert], 2, "--tls-key"),
        ("no address", good.clone(), vec!["--listen", "nowhere"], 2, "--listen"),
        ("no limit", good, vec!["--message-timeout", "0"], 2, "1 to 3600"),
    ] {
        let (status, said) = rig::fails_to_start(&store, &options);
        assert_eq!(status.code(), Some(code), "{case}: {said}");
        assert!(said.contains(told), "{case}: {said}");
    }
    let private = fs::read_to_string(&key).unwrap();
    PrivateKeyDer::try_from(private.into_bytes()).unwrap_err(); // it is PEM, so its text is what could leak
}

#[test]
fn asked_to_stop_the_server_finishes_what_runs_and_takes_nothing_new() {
    for signal in ["-TERM", "-INT"] {
        let directory = ordinary();
        let mut kms = Kms::start(directory.path());
        let mut socket = kms.open("/getPass", &MACHINE.token.authorization_header(), PERSISTENT);
        let challenge = rig::challenge(&mut socket);
        kms.signal(signal);
        kms.wait_for("stopping, 1 connections are still open");
        assert!(TcpStream::connect(kms.address).is_err());
        socket
            .send(Message::binary(MACHINE.activate(&challenge).to_json().as_bytes().to_vec()))
            .unwrap();
        assert_eq!(*rig::answer(&mut socket).unwrap().passphrase, "found");
        drop(socket);
        assert_eq!(kms.wait().code(), Some(0), "{signal}");
    }
}

#[test]
fn asked_to_stop_the_server_does_not_wait_for_ever() {
    let directory = ordinary();
    let mut kms = Kms::start_with(directory.path(), &["--stop-timeout", "1"]);
    let mut socket = kms.open("/getPass", &MACHINE.token.authorization_header(), PERSISTENT);
    rig::challenge(&mut socket);
    kms.signal("-TERM");
    assert_eq!(kms.wait().code(), Some(0));
    kms.wait_for("stopped with 1 connections still open");
}
