//! Real exchanges over TCP with the program: who gets what, in which bytes (`protocols/kcrypt.md` §5).

use std::{fs, os::unix::fs::PermissionsExt, thread};

use latchkey_wire::{
    manifest::safe_kube_name,
    pem,
    v1::{Payload, Refusal, Release, Token},
};
use tungstenite::Message;

mod rig;
use rig::{Facts, Kms, MACHINE, PERSISTENT, STRANGER, secret, store};

/// What a server must answer on `/getPass`.
enum Answer {
    Passphrase(&'static str),
    Error(String),
    /// Closed without a word.
    Nothing,
}

#[test]
fn each_answer_of_get_pass() {
    let pubhash = &MACHINE.pubhash;
    let no_volume =
        || Answer::Error(format!("no volume found with data from request and hash: {pubhash}"));
    let no_secret =
        |label: &str| Answer::Error(format!("No secret found for {pubhash} and {label}"));
    let (plain, other) = (MACHINE.volume("node", ""), STRANGER.volume("other", ""));
    let reference = MACHINE.volume_of(
        "node",
        "  - {label: COS_PERSISTENT, secret: {name: My_Secret, path: pass_phrase}}\n",
        "",
    );
    let two = MACHINE.volume_of("node", "  - {label: COS_PERSISTENT, deviceName: sda5, uuid: a-1}\n  - {label: COS_OEM, deviceName: sda2, uuid: a-2}\n", "");
    let found = secret("node-cos-persistent", "  passphrase: found\n");
    let cases: Vec<(&str, String, Facts<'_>, Answer)> = vec![
        ("nothing in the store", String::new(), PERSISTENT, no_volume()),
        ("another machine's volume", other, PERSISTENT, no_volume()),
        ("no such partition", plain.clone(), ["COS_OEM", "", ""], no_volume()),
        ("no identifier", plain.clone(), ["", "", ""], no_volume()),
        ("unknown is none", MACHINE.volume_of("node", "  - {label: unknown}\n", ""), ["unknown"; 3], no_volume()),
        ("no secret yet", plain.clone(), PERSISTENT, no_secret("COS_PERSISTENT")),
        ("no secret, X_LUKS asked for X", MACHINE.volume_of("node", "  - {label: COS_PERSISTENT_LUKS}\n", ""), PERSISTENT, no_secret("COS_PERSISTENT_LUKS")),
        ("quarantined", MACHINE.volume("node", "  quarantined: true\n") + &found, PERSISTENT, Answer::Error("quarantined: COS_PERSISTENT".to_owned())),
        ("quarantined elsewhere", plain.clone() + &found + &MACHINE.volume_of("second", "  - {label: OTHER}\n", "  quarantined: true\n"), PERSISTENT, Answer::Error("quarantined: COS_PERSISTENT".to_owned())),
        ("released", plain.clone() + &found, PERSISTENT, Answer::Passphrase("found")),
        ("released to X_LUKS", plain.clone() + &found, ["COS_PERSISTENT_LUKS", "", ""], Answer::Passphrase("found")),
        ("released by uuid", two.clone() + &found, ["", "A-1", "nvme0n1p7"], Answer::Passphrase("found")),
        ("the hash in upper case", plain.replace(pubhash.as_str(), &pubhash.as_str().to_uppercase()) + &found, PERSISTENT, Answer::Passphrase("found")),
        ("operator's names, as generation 1 looks them up", reference.clone() + &secret("my-secret", "  pass-phrase: found\n"), PERSISTENT, Answer::Passphrase("found")),
        ("operator's names, as they are written", reference.clone() + &secret("My_Secret", "  pass_phrase: found\n"), PERSISTENT, Answer::Passphrase("found")),
        ("json escapes", plain.clone() + &secret("node-cos-persistent", "  passphrase: \"<a>&\\\"\\\\ ü\"\n"), PERSISTENT, Answer::Passphrase("<a>&\"\\ ü")),
        ("the Secret is in another namespace", plain.clone() + &found.replace("namespace: default", "namespace: other"), PERSISTENT, no_secret("COS_PERSISTENT")),
        ("no namespace is the default one", plain.clone() + &found.replace(", namespace: default", ""), PERSISTENT, Answer::Passphrase("found")),
        ("another partition's name", two.clone() + &found, ["COS_PERSISTENT", "", "sda2"], no_volume()),
        ("another partition's uuid", two.clone() + &found, ["COS_PERSISTENT", "a-2", ""], no_volume()),
        ("a foreign disk under a known name", two + &found, ["OTHER", "b-1", "sda5"], no_volume()),
        ("two volumes, two secrets", plain.clone() + &MACHINE.volume("second", "") + &found, PERSISTENT, no_volume()),
        ("default names meet", plain.clone() + &STRANGER.volume_of("node-cos", "  - {label: PERSISTENT}\n", "") + &found, PERSISTENT, no_volume()),
        (
            "a Secret of another machine",
            plain.clone() + &found.replace("namespace: default}", &format!("namespace: default, labels: {{kcrypt.kairos.io/tpm-hash: x{}}}}}", &pubhash.as_str()[..53])),
            PERSISTENT,
            no_volume(),
        ),
        (
            "a Secret of this machine",
            plain.clone() + &found.replace("namespace: default}", &format!("namespace: default, labels: {{kcrypt.kairos.io/tpm-hash: {}}}}}", safe_kube_name(pubhash.as_str()))),
            PERSISTENT,
            Answer::Passphrase("found"),
        ),
        (
            "a Secret of another partition",
            plain.clone() + &found.replace("namespace: default}", "namespace: default, labels: {kcrypt.kairos.io/partition: COS.PERSISTENT}}"),
            PERSISTENT,
            no_volume(),
        ),
        (
            "names that only generation 2 takes for one",
            MACHINE.volume_of("node", "  - {label: COS_PERSISTENT}\n  - {label: COS.PERSISTENT}\n", "") + &found,
            PERSISTENT,
            Answer::Passphrase("found"),
        ),
        (
            "a Secret of a machine whose hash begins alike",
            plain.clone() + &found.replace("namespace: default}", &format!("namespace: default, labels: {{kcrypt.kairos.io/tpm-hash: {}-12345678}}}}", &pubhash.as_str()[..54])),
            PERSISTENT,
            no_volume(),
        ),
        (
            "held to PCR values, which generation 1 does not prove",
            MACHINE.volume("node", "  attestation: {pcrValues: {pcrs: {\"7\": \"00\"}}}\n") + &found,
            PERSISTENT,
            Answer::Error("PCR verification failed: this volume is held to PCR values, which generation 1 does not prove; ask /tpm-attestation, or let an operator reset them".to_owned()),
        ),
        ("held to none yet", MACHINE.volume("node", "  attestation: {pcrValues: {pcrs: {\"7\": \"\"}}}\n") + &found, PERSISTENT, Answer::Passphrase("found")),
        ("empty", plain.clone() + &secret("node-cos-persistent", "  passphrase: \"\"\n"), PERSISTENT, Answer::Error("secret default/node-cos-persistent: it has no passphrase under the key \"passphrase\"".to_owned())),
        ("other key", plain.clone() + &secret("node-cos-persistent", "  pass: found\n"), PERSISTENT, Answer::Error("secret default/node-cos-persistent: it has no passphrase under the key \"passphrase\"".to_owned())),
        ("newline", plain.clone() + &secret("node-cos-persistent", "  passphrase: |\n    hunter2\n"), PERSISTENT, line_break()),
        ("carriage return", plain.clone() + &secret("node-cos-persistent", "  passphrase: \"hunter2\\r\"\n"), PERSISTENT, line_break()),
        ("NUL", plain.clone() + &secret("node-cos-persistent", "  passphrase: \"hunter2\\0\"\n"), PERSISTENT, line_break()),
        ("not text", plain.clone() + &found.replace("stringData", "data").replace("found", "//8="), PERSISTENT, Answer::Error("secret default/node-cos-persistent: its passphrase is not UTF-8 text, which JSON cannot carry".to_owned())),
        ("a Secret twice and differently", plain.clone() + &found + &found.replace("found", "hunter2"), PERSISTENT, Answer::Nothing),
        ("a Secret twice and equal", plain.clone() + &found + &found, PERSISTENT, Answer::Passphrase("found")),
        ("a volume twice and differently", plain.clone() + &MACHINE.volume("node", "  quarantined: true\n") + &found, PERSISTENT, Answer::Nothing),
        ("a volume twice and equal", plain.clone() + &plain + &found, PERSISTENT, Answer::Passphrase("found")),
    ];
    for (case, manifests, facts, expected) in cases {
        let directory = store(&[("all.yaml", &manifests)]);
        let kms = Kms::start(directory.path());
        let answer = kms.get(&MACHINE, facts);
        match (&expected, answer) {
            (Answer::Passphrase(passphrase), Some(answer)) => {
                assert_eq!(
                    (
                        answer.passphrase.as_str(),
                        answer.error.as_str(),
                        answer.generated_by.as_str()
                    ),
                    (*passphrase, "", ""),
                    "{case}"
                );
                kms.wait_for("result=granted");
            }
            (Answer::Error(error), Some(answer)) => {
                assert_eq!(
                    (
                        answer.passphrase.as_str(),
                        answer.error.as_str(),
                        answer.generated_by.as_str()
                    ),
                    ("", error.as_str(), ""),
                    "{case}"
                );
                kms.wait_for("result=refused");
            }
            (Answer::Nothing, None) => {
                kms.wait_for("result=failed");
            }
            (_, answer) => panic!("{case}: {answer:?}\n{}", kms.lines().join("\n")),
        }
        let log = kms.wait_for("request endpoint=getPass");
        assert!(
            log.contains(&format!("pubhash={pubhash}")) && log.contains("peer=127.0.0.1:"),
            "{log}"
        );
        let log = kms.lines().join("\n");
        assert!(
            !log.contains("hunter2") && !log.contains("=found") && !log.contains("\"found\""),
            "{case}: {log}"
        );
    }
}

fn line_break() -> Answer {
    Answer::Error("secret default/node-cos-persistent: its passphrase holds a line break or NUL, at which installers cut it off; write it without".to_owned())
}

#[test]
fn each_answer_of_post_pass() {
    let pubhash = &MACHINE.pubhash;
    let sealed = Payload::sealed(&[7; 256]).to_json();
    let error = |text: &str| Some(text.to_owned());
    let no_hash = format!("no TPM Hash found for {pubhash}");
    let not_sealed = "invalid answer from client: its passphrase is not encrypted by a TPM key (RSA-OAEP, unpadded URL base64)";
    let bad_name = MACHINE.volume_of(
        "node",
        "  - {label: COS_PERSISTENT, secret: {name: ../../etc/passwd}}\n",
        "",
    );
    for (case, manifests, payload, refused, stored) in [
        ("stored", MACHINE.volume("node", ""), sealed.as_str(), None, true),
        ("unknown machine", STRANGER.volume("node", ""), &sealed, error(&no_hash), false),
        (
            "quarantined",
            MACHINE.volume("node", "  quarantined: true\n"),
            &sealed,
            error("quarantined: COS_PERSISTENT"),
            false,
        ),
        (
            "nothing",
            MACHINE.volume("node", ""),
            "{}",
            error("invalid answer from client: doesn't contain any passphrase"),
            false,
        ),
        (
            "the client failed",
            MACHINE.volume("node", ""),
            r#"{"passphrase":"","error":"no TPM","generated_by":""}"#,
            error("error: no TPM"),
            false,
        ),
        (
            "failed, and yet",
            MACHINE.volume("node", ""),
            &sealed.replace(r#""error":"""#, r#""error":"late""#),
            error("error: late"),
            false,
        ),
        (
            "in clear",
            MACHINE.volume("node", ""),
            r#"{"passphrase":"hunter2","error":"","generated_by":""}"#,
            error(not_sealed),
            false,
        ),
        (
            "cut",
            MACHINE.volume("node", ""),
            &Payload::sealed(&[7; 255]).to_json(),
            error(not_sealed),
            false,
        ),
        (
            "a name that is a path",
            bad_name,
            &sealed,
            error(
                "\"../../etc/passwd\" is no valid name for a Secret: 1 to 180 of a-z, 0-9, '-' and '.', beginning and ending with a letter or digit",
            ),
            false,
        ),
        ("no JSON", MACHINE.volume("node", ""), "hunter2", None, false),
    ] {
        let directory = store(&[("all.yaml", &manifests)]);
        let kms = Kms::start(directory.path());
        let answer = kms.post_text(&MACHINE, PERSISTENT, payload);
        assert_eq!(answer.map(|answer| answer.error), refused, "{case}");
        kms.wait_for("request endpoint=postPass");
        let files = rig::files(directory.path());
        assert_eq!(
            files.iter().any(|name| name.ends_with(".secret.yaml")),
            stored,
            "{case}: {files:?}"
        );
        assert_eq!(files.len(), 1 + usize::from(stored), "{case}: {files:?}");
        let log = kms.lines().join("\n");
        assert!(!log.contains("hunter2") && !log.contains("BwcHBwcH"), "{case}: {log}");
    }
}

#[test]
fn a_machine_enrols_once_and_gets_that_for_ever() {
    let directory = store(&[("node.yaml", &MACHINE.volume("Node_1", ""))]);
    let kms = Kms::start(directory.path());
    let first = kms.get(&MACHINE, PERSISTENT).unwrap();
    assert!(matches!(first.classify(), Err(Refusal::NoSecret(_))));

    assert_eq!(kms.post(&MACHINE, PERSISTENT, &[1; 256]), None);
    kms.wait_for("result=granted why=\"first passphrase stored\"");
    let got = || kms.get(&MACHINE, PERSISTENT).unwrap();
    assert_eq!(got(), Payload::sealed(&[1; 256]));
    assert_eq!(got().classify().unwrap(), Release::Sealed(vec![1; 256]));

    assert_eq!(kms.post(&MACHINE, ["COS_PERSISTENT_LUKS", "", ""], &[2; 256]), None);
    kms.wait_for("result=refused why=\"there is a Secret of this name already\"");
    assert_eq!(got(), Payload::sealed(&[1; 256]));

    assert_eq!(
        rig::files(directory.path()),
        ["default.node-1-cos-persistent.secret.yaml", "node.yaml"]
    );
    let path = directory.path().join("default.node-1-cos-persistent.secret.yaml");
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
    let passphrase = Payload::sealed(&[1; 256]).passphrase;
    assert_eq!(
        fs::read_to_string(&path).unwrap(),
        format!(
            "apiVersion: v1\nkind: Secret\nmetadata:\n  name: \"node-1-cos-persistent\"\n  namespace: \"default\"\ntype: Opaque\n\
             stringData:\n  \"generated_by\": \"tpm\"\n  \"passphrase\": \"{}\"\n",
            *passphrase
        )
    );
    assert!(!kms.lines().join("\n").contains(passphrase.as_str()));

    drop(kms);
    let kms = Kms::start(directory.path());
    assert_eq!(kms.get(&MACHINE, PERSISTENT), Some(Payload::sealed(&[1; 256])));
}

#[test]
fn of_machines_that_enrol_at_once_one_wins_and_all_get_the_same() {
    let directory = store(&[("node.yaml", &MACHINE.volume("node", ""))]);
    let kms = Kms::start(directory.path());
    let posts = 16u8;
    thread::scope(|scope| {
        for number in 1..=posts {
            let kms = &kms;
            scope.spawn(move || assert_eq!(kms.post(&MACHINE, PERSISTENT, &[number; 256]), None));
        }
    });
    let Ok(Release::Sealed(winner)) = kms.get(&MACHINE, PERSISTENT).unwrap().classify() else {
        panic!()
    };
    assert!((1..=posts).contains(&winner[0]) && winner == [winner[0]; 256]);
    for _ in 0..3 {
        assert_eq!(kms.get(&MACHINE, PERSISTENT), Some(Payload::sealed(&winner)));
    }
    assert_eq!(rig::files(directory.path()).len(), 2);
    let stored = kms.lines().iter().filter(|line| line.contains("first passphrase stored")).count();
    assert_eq!(stored, 1);
}

#[test]
fn many_machines_enrol_and_unlock_side_by_side() {
    let labels: Vec<String> = (0..24).map(|number| format!("DISK_{number}")).collect();
    let partitions: String =
        labels.iter().map(|label| format!("  - {{label: {label}}}\n")).collect();
    let directory = store(&[("node.yaml", &MACHINE.volume_of("node", &partitions, ""))]);
    let kms = Kms::start(directory.path());
    thread::scope(|scope| {
        for (number, label) in (0u8..).zip(&labels) {
            let kms = &kms;
            scope.spawn(move || {
                let facts = [label.as_str(), "", ""];
                assert_eq!(kms.post(&MACHINE, facts, &[number; 256]), None);
                assert_eq!(kms.get(&MACHINE, facts), Some(Payload::sealed(&[number; 256])));
            });
        }
    });
    assert_eq!(rig::files(directory.path()).len(), 1 + labels.len());
}

#[test]
fn paths_with_a_prefix_or_a_doubled_slash_are_the_same_endpoints() {
    let directory = store(&[(
        "node.yaml",
        &(MACHINE.volume("node", "") + &secret("node-cos-persistent", "  passphrase: found\n")),
    )]);
    let kms = Kms::start(directory.path());
    for path in ["/getPass", "//getPass", "/kcrypt/getPass", "/a/b//getPass", "/getPass?x=y"] {
        let mut socket = kms.open(path, &MACHINE.token.authorization_header(), PERSISTENT);
        rig::prove(&mut socket, &MACHINE);
        assert_eq!(*rig::answer(&mut socket).unwrap().passphrase, "found", "{path}");
    }
}

#[test]
fn the_frames_are_those_of_the_go_server() {
    let directory = store(&[(
        "node.yaml",
        &(MACHINE.volume("node", "") + &secret("node-cos-persistent", "  passphrase: <found>\n")),
    )]);
    let kms = Kms::start(directory.path());
    let bare = MACHINE.token.authorization_header().replace("Bearer TPM", "");
    let mut socket = kms.open("/getPass", &bare, PERSISTENT);
    let Message::Binary(challenge) = socket.read().unwrap() else { panic!() };
    let text = std::str::from_utf8(&challenge).unwrap();
    assert!(
        text.starts_with(r#"{"EC":{"Credential":"AEQAI"#)
            && text.ends_with("\"}}")
            && text.len() == 476,
        "{text}"
    );
    let response = MACHINE.activate(&latchkey_wire::v1::Challenge::from_json(&challenge).unwrap());
    // Control frames in between, text instead of binary, no newline, other case: all of it is taken.
    socket.send(Message::Ping(vec![1, 2, 3].into())).unwrap();
    socket.send(Message::text(response.to_json().trim().replace("Secret", "SECRET"))).unwrap();
    let payload = loop {
        match socket.read().unwrap() {
            Message::Pong(_) => {}
            Message::Binary(payload) => break payload,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(
        payload.as_ref(),
        b"{\"passphrase\":\"\\u003cfound\\u003e\",\"error\":\"\",\"generated_by\":\"\"}\n"
    );
    assert!(socket.read().is_err());
}

#[test]
fn a_machine_may_show_a_certificate_of_its_key() {
    let key = rig::VECTORS["software_ek"]["private_pkcs8_pem"].as_str().unwrap();
    let key = rcgen::KeyPair::from_pem(key).unwrap();
    let certificate =
        rcgen::CertificateParams::new(["tpm".to_owned()]).unwrap().self_signed(&key).unwrap();
    let ek_pem = pem::encode(pem::CERTIFICATE, certificate.der());
    let manifests =
        MACHINE.volume("node", "") + &secret("node-cos-persistent", "  passphrase: found\n");
    let directory = store(&[("node.yaml", &manifests)]);
    let kms = Kms::start(directory.path());
    let token = Token { ek_pem, ak: MACHINE.token.ak.clone() };
    let mut socket = kms.open("/getPass", &token.authorization_header(), PERSISTENT);
    rig::prove(&mut socket, &MACHINE);
    assert_eq!(*rig::answer(&mut socket).unwrap().passphrase, "found");
}

#[test]
fn a_server_killed_at_any_moment_keeps_whole_secrets_or_none() {
    let labels: Vec<String> = (0..200).map(|number| format!("DISK_{number}")).collect();
    let partitions: String =
        labels.iter().map(|label| format!("  - {{label: {label}}}\n")).collect();
    let directory = store(&[("node.yaml", &MACHINE.volume_of("node", &partitions, ""))]);
    let mut stored = 0;
    for round in 1u8..=5 {
        let kms = Kms::start(directory.path());
        thread::scope(|scope| {
            for chunk in labels.chunks(labels.len() / 4) {
                let kms = &kms;
                scope.spawn(move || {
                    for label in chunk {
                        kms.try_post(&MACHINE, [label, "", ""], &[round; 256]);
                    }
                });
            }
            kms.wait_for_times("first passphrase stored", 3 * usize::from(round));
            kms.signal("-KILL");
        });
        drop(kms);

        let kms = Kms::start(directory.path());
        assert!(!kms.lines().iter().any(|line| line.contains("ERROR")), "{:?}", kms.lines());
        let mut now = 0;
        for label in &labels {
            let answer = kms.get(&MACHINE, [label, "", ""]).unwrap().classify();
            match answer {
                Ok(Release::Sealed(block)) => {
                    assert!((1..=round).contains(&block[0]) && block == [block[0]; 256], "{label}");
                    now += 1;
                }
                Err(Refusal::NoSecret(_)) => {}
                other => panic!("{label}: {other:?}"),
            }
        }
        assert!(now > stored, "no round goes by without a secret");
        stored = now;
        assert_eq!(rig::files(directory.path()).len(), 1 + now, "nothing half-written is left");
    }
}
