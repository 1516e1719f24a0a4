//! `latchkey-kms volume`: what operators see and change, beside a server that runs.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)] // helpers of tests

use std::{
    fs,
    path::Path,
    process::{Command, Output, Stdio},
};

use serde_json::Value;

mod rig;
use rig::{Kms, MACHINE, PERSISTENT, STRANGER, secret, store};

fn volume(store: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_latchkey-kms"));
    command.arg("volume").args(arguments).arg("--store").arg(store).stdin(Stdio::null());
    command.output().unwrap()
}

fn done(store: &Path, arguments: &[&str]) -> String {
    let output = volume(store, arguments);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(0), "{arguments:?}: {said}");
    String::from_utf8(output.stdout).unwrap()
}

fn fails(store: &Path, arguments: &[&str], code: i32, told: &str) {
    let output = volume(store, arguments);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
    assert!(said.contains(told), "{arguments:?}: {said}");
}

const ATTESTED: &str = "  attestation:\n    ekPublicKey: \"\"\n    pcrValues:\n      pcrs: {\"0\": \"aa\", \"7\": \"bb\"} # firmware\n    enrolledAt: 2026-01-01T00:00:00Z\n";

fn fleet() -> tempfile::TempDir {
    let node = MACHINE.volume("node", "");
    let secrets = secret("node-cos-persistent", "  passphrase: hunter2\n");
    let other = STRANGER.volume("other", ATTESTED)
        + "\n"
        + &STRANGER.volume("third", "").replace("namespace: default", "namespace: lab");
    store(&[("node.yaml", &("# rack 4\n".to_owned() + &node + &secrets)), ("other.yaml", &other)])
}

#[test]
fn volumes_are_listed_and_shown_without_passphrases() {
    let directory = fleet();
    let store = directory.path();
    let list = done(store, &["list"]);
    let lines: Vec<&str> = list.lines().collect();
    assert_eq!(lines.len(), 4, "{list}");
    assert!(lines[0].starts_with("VOLUME "), "{list}");
    assert!(lines[1].starts_with("default/node ") && lines[1].contains(" ok "), "{list}");
    assert_eq!(done(store, &["list", "--namespace", "lab"]).lines().count(), 2);
    let all: Value = serde_json::from_str(&done(store, &["list", "--json"])).unwrap();
    let names: Vec<&str> =
        all.as_array().unwrap().iter().map(|v| v["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["node", "other", "third"]);

    let shown: Value = serde_json::from_str(&done(store, &["show", "node", "--json"])).unwrap();
    let node = &shown[0];
    assert_eq!(node["tpmHash"], MACHINE.pubhash.as_str());
    assert_eq!(node["partitions"][0]["label"], "COS_PERSISTENT");
    assert_eq!(node["partitions"][0]["secret"], "node-cos-persistent");
    assert_eq!(node["partitions"][0]["passphrase"], "operator");
    let attested: Value = serde_json::from_str(&done(store, &["show", "other", "--json"])).unwrap();
    assert_eq!(attested[0]["attestation"]["pcrs"]["7"], "bb");
    let by_hash = done(store, &["show", MACHINE.pubhash.as_str().get(..12).unwrap()]);
    assert_eq!(by_hash, done(store, &["show", "node"]));
    assert!(done(store, &["show", "other"]).contains("pcr 7           bb\n"));
    for text in [&list, &by_hash, &shown.to_string()] {
        assert!(!text.contains("hunter2"), "{text}");
    }
    assert_eq!(done(store, &["show", STRANGER.pubhash.as_str()]).matches("volume ").count(), 2);

    fails(store, &["show", "nobody"], 8, "there is no volume \"nobody\"");
    fails(store, &["show", "node", "--namespace", "lab"], 8, "there is no volume");
    fails(&store.join("missing"), &["list"], 3, "No such file");
    let twice = MACHINE.volume("other", "").replace("namespace: default", "namespace: lab");
    fs::write(store.join("twice.yaml"), twice).unwrap();
    fails(store, &["show", "other"], 8, "in each of default, lab: choose one with --namespace");
}

#[test]
fn a_running_server_sees_what_an_operator_changes_and_the_audit_log_has_it() {
    let directory = fleet();
    let files = tempfile::tempdir().unwrap();
    let log = files.path().join("audit.jsonl").display().to_string();
    let kms = Kms::start_with(directory.path(), &["--audit", &log]);
    let store = directory.path();
    let release = || kms.get(&MACHINE, PERSISTENT).unwrap();
    let until = |wanted: &dyn Fn() -> bool| {
        let end = std::time::Instant::now() + rig::PATIENCE;
        while !wanted() {
            assert!(std::time::Instant::now() < end, "the server does not see the change");
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
    };
    assert_eq!(*release().passphrase, "hunter2");
    let before = fs::read_to_string(store.join("node.yaml")).unwrap();

    assert_eq!(
        done(store, &["quarantine", "node", "--audit", &log]),
        "default/node: quarantine done\n"
    );
    until(&|| release().error == "quarantined: COS_PERSISTENT");
    assert!(done(store, &["list"]).contains(" quarantined "));
    assert_eq!(
        done(store, &["quarantine", "node", "--audit", &log]),
        "default/node: quarantine has nothing to change\n"
    );
    done(store, &["release", MACHINE.pubhash.as_str(), "--audit", &log]);
    until(&|| *release().passphrase == "hunter2");
    let text = fs::read_to_string(store.join("node.yaml")).unwrap();
    assert!(text.starts_with("# rack 4\n") && text.contains("passphrase: hunter2"), "{text}");
    assert_eq!(text.replace("  quarantined: false\n", ""), before);

    done(store, &["reset-pcrs", "other", "--pcr", "7", "--audit", &log]);
    let pcrs = || {
        serde_json::from_str::<Value>(&done(store, &["show", "other", "--json"])).unwrap()[0]["attestation"]["pcrs"].clone()
    };
    assert_eq!(pcrs(), serde_json::json!({"0": "aa", "7": ""}));
    done(store, &["reset-pcrs", "other", "--audit", &log]);
    assert_eq!(pcrs(), serde_json::json!({"0": "", "7": ""}));

    fails(store, &["forget", "node", "--audit", &log], 9, "say --yes");
    let said = done(store, &["forget", "node", "--yes", "--audit", &log]);
    assert_eq!(
        said,
        "default/node: forgotten\n  Secret default/node-cos-persistent stays in the store\n"
    );
    until(&|| release().error.starts_with("no volume found"));
    let text = fs::read_to_string(store.join("node.yaml")).unwrap();
    assert!(!text.contains("SealedVolume") && text.contains("hunter2"), "{text}");

    let verified = Command::new(env!("CARGO_BIN_EXE_latchkey-kms"))
        .args(["audit", "verify", &log])
        .output()
        .unwrap();
    assert_eq!(verified.status.code(), Some(0));
    let admin: Vec<(String, String)> = fs::read_to_string(&log)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap())
        .filter(|line| line["event"] == "admin")
        .map(|line| {
            (
                line["action"].as_str().unwrap().to_owned(),
                line["result"].as_str().unwrap().to_owned(),
            )
        })
        .collect();
    let expected = [
        ("quarantine", "done"),
        ("quarantine", "unchanged"),
        ("release", "done"),
        ("reset-pcrs", "done"),
        ("reset-pcrs", "done"),
        ("forget", "done"),
    ]
    .map(|(action, result)| (action.to_owned(), result.to_owned()));
    assert_eq!(admin, expected);
}

#[test]
fn a_machine_is_forgotten_with_its_secrets_only_when_that_is_said() {
    let directory = fleet();
    let said = done(directory.path(), &["forget", "node", "--yes", "--with-secrets"]);
    assert!(said.contains("Secret default/node-cos-persistent removed as well"), "{said}");
    assert_eq!(rig::files(directory.path()), ["other.yaml"], "nothing was left in the file");
}
