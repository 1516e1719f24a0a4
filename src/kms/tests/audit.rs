//! The audit log: what is in it, that it survives crashes, and that no change of it goes unseen.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)] // helpers of tests

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use serde_json::Value;

mod rig;
use rig::{Kms, MACHINE, PERSISTENT, STRANGER, secret, store};

fn ordinary() -> tempfile::TempDir {
    let secret = secret("node-cos-persistent", "  passphrase: hunter2\n");
    store(&[("all.yaml", &(MACHINE.volume("node", "") + &secret))])
}

fn lines(log: &Path) -> Vec<Value> {
    let text = fs::read_to_string(log).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn verify(log: &Path, more: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_latchkey-kms"));
    command.args(["audit", "verify"]).arg(log).args(more).output().unwrap()
}

fn whole(log: &Path) -> String {
    let output = verify(log, &[]);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn broken(log: &Path, more: &[&str], told: &str) {
    let output = verify(log, more);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(7), "{said}");
    assert!(said.contains(told) && output.stdout.is_empty(), "{told}: {said}");
}

/// Runs a server that serves one machine and is told to stop; gives back its log's end, as `SEQ:HASH`.
fn serve_once(store: &Path, log: &Path) -> String {
    let mut kms = Kms::start_with(store, &["--audit", log.to_str().unwrap()]);
    assert_eq!(*kms.get(&MACHINE, PERSISTENT).unwrap().passphrase, "hunter2");
    kms.signal("-TERM");
    assert_eq!(kms.wait().code(), Some(0));
    kms.wait_for_times("ends with ", 2).split("ends with ").nth(1).unwrap().to_owned()
}

#[test]
fn each_request_is_a_line_without_its_passphrase() {
    let (directory, files) = (ordinary(), tempfile::tempdir().unwrap());
    let log = files.path().join("audit.jsonl");
    let mut kms = Kms::start_with(directory.path(), &["--audit", log.to_str().unwrap()]);
    kms.get(&MACHINE, PERSISTENT).unwrap();
    kms.get(&STRANGER, ["COS_PERSISTENT", "x\"\n}".trim_end_matches("\n}"), ""]).unwrap();
    assert!(kms.open("/getPass", "Bearer TPM", PERSISTENT).read().is_err());
    kms.wait_for("result=unauthenticated");
    kms.signal("-TERM");
    kms.wait();
    let lines = lines(&log);
    let of = |field: &str| -> Vec<Value> { lines.iter().map(|line| line[field].clone()).collect() };
    assert_eq!(of("seq"), [1, 2, 3, 4, 5]);
    assert_eq!(of("event"), ["server-started", "request", "request", "request", "server-stopped"]);
    assert_eq!(of("result")[1..4], ["granted", "refused", "unauthenticated"]);
    assert_eq!(lines[1]["pubhash"], MACHINE.pubhash.as_str());
    assert_eq!(lines[1]["volume"], "default/node");
    assert_eq!(lines[1]["partition"], "COS_PERSISTENT");
    assert!(lines[1]["peer"].as_str().unwrap().starts_with("127.0.0.1:"));
    assert_eq!(lines[2]["pubhash"], STRANGER.pubhash.as_str());
    assert_eq!(lines[2]["uuid"], "x\"");
    assert_eq!(lines[3]["pubhash"], Value::Null);
    assert!(!fs::read_to_string(&log).unwrap().contains("hunter2"));
    let said = whole(&log);
    assert!(said.contains("whole: 5 lines\nfirst: 1 of 2"), "{said}");
    use std::os::unix::fs::PermissionsExt;
    assert_eq!(fs::metadata(&log).unwrap().permissions().mode() & 0o777, 0o600);
}

#[test]
fn a_restart_continues_the_chain_and_a_half_line_is_mended() {
    let (directory, files) = (ordinary(), tempfile::tempdir().unwrap());
    let log = files.path().join("audit.jsonl");
    let first_end = serve_once(directory.path(), &log);
    serve_once(directory.path(), &log);
    assert!(whole(&log).contains("whole: 6 lines"));
    // What a power cut leaves: a piece of a line, with what a file system puts behind it.
    let text = fs::read_to_string(&log).unwrap();
    for (rest, bytes) in [(&b"{\"seq\":7,\"time\":\"2026"[..], 21), (&[0; 300], 300)] {
        fs::write(&log, [text.as_bytes(), rest].concat()).unwrap();
        broken(&log, &[], &format!("line 7 is cut off, {bytes} bytes"));
        serve_once(directory.path(), &log);
        assert!(whole(&log).contains("whole: 10 lines"));
        assert_eq!(lines(&log)[6]["event"], "torn-line-removed");
        assert_eq!(lines(&log)[6]["bytes"], bytes);
    }
    assert_eq!(verify(&log, &["--contains", &first_end]).status.code(), Some(0));
    // A file that was moved away is continued in a new one.
    let mut kms = Kms::start_with(directory.path(), &["--audit", log.to_str().unwrap()]);
    let old = files.path().join("audit.jsonl.1");
    fs::rename(&log, &old).unwrap();
    kms.get(&MACHINE, PERSISTENT).unwrap();
    kms.signal("-TERM");
    kms.wait();
    assert!(whole(&old).contains("whole: 11 lines"));
    assert!(whole(&log).contains("whole: 2 lines\nfirst: 12 of "), "{}", whole(&log));
    assert!(whole(&log).contains("continues: 11:"));
}

#[test]
fn no_change_goes_unseen() {
    let (directory, files) = (ordinary(), tempfile::tempdir().unwrap());
    let log = files.path().join("audit.jsonl");
    serve_once(directory.path(), &log);
    let end = serve_once(directory.path(), &log);
    let text = fs::read_to_string(&log).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let joined =
        |order: &[usize]| order.iter().map(|&at| format!("{}\n", lines[at])).collect::<String>();
    let edit = |line: usize, from: &str, to: &str| {
        assert!(lines[line].contains(from));
        let mut lines: Vec<String> = lines.iter().map(|line| format!("{line}\n")).collect();
        lines[line] = lines[line].replace(from, to);
        lines.concat()
    };
    for (changed, told) in [
        (edit(1, "granted", "refused"), "line 2 breaks the chain: its hash does not fit"),
        (edit(4, "\"seq\":5", "\"seq\":6"), "line 5 breaks the chain: its hash does not fit"),
        (edit(2, "\"hash\":\"", "\"hash\":\"0"), "line 3 breaks the chain: it has no hash"),
        (edit(2, "\"}", "\"} "), "line 3 breaks the chain: it has no hash"),
        (joined(&[0, 1, 3, 4, 5]), "line 3 breaks the chain: it does not follow"),
        (joined(&[0, 2, 1, 3, 4, 5]), "line 2 breaks the chain: it does not follow"),
        (joined(&[0, 1, 1, 2, 3, 4, 5]), "line 3 breaks the chain: it does not follow"),
        (text.trim_end().to_owned(), "line 6 is cut off"),
        (String::new(), "it is empty"),
        ("x".repeat(100_000), "line 1 breaks the chain: it is too long"),
        ("{}\n".to_owned(), "line 1 breaks the chain: it has no hash"),
    ] {
        fs::write(&log, changed).unwrap();
        broken(&log, &[], told);
    }
    // What was cut off at the end is seen by who knows what was there.
    fs::write(&log, joined(&[0, 1, 2, 3])).unwrap();
    assert!(whole(&log).contains("whole: 4 lines"));
    broken(&log, &["--contains", &end], "the end was cut off, or it is another chain");
    broken(&files.path().join("missing"), &[], "No such file");
    // Nothing is added to what is not a chain.
    fs::write(&log, edit(5, "SIGTERM", "SIGINT!")).unwrap();
    let (status, said) = rig::fails_to_start(
        directory.path(),
        &["--listen", "127.0.0.1:0", "--audit", log.to_str().unwrap()],
    );
    assert_eq!(status.code(), Some(6), "{said}");
    assert!(said.contains("its hash does not fit its content; look with"), "{said}");
}

#[test]
fn machines_are_served_while_the_log_cannot_be_written() {
    let (directory, files) = (ordinary(), tempfile::tempdir().unwrap());
    let folder = files.path().join("log");
    fs::create_dir(&folder).unwrap();
    let log = folder.join("audit.jsonl");
    let kms = Kms::start_with(directory.path(), &["--audit", log.to_str().unwrap()]);
    let away = files.path().join("away");
    fs::rename(&folder, &away).unwrap();
    for _ in 0..3 {
        assert_eq!(*kms.get(&MACHINE, PERSISTENT).unwrap().passphrase, "hunter2");
    }
    kms.wait_for("cannot be written");
    fs::rename(&away, &folder).unwrap();
    let end = std::time::Instant::now() + rig::PATIENCE;
    while lines(&log).len() < 4 {
        assert!(std::time::Instant::now() < end, "the lines that waited are not written");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    assert!(whole(&log).contains("whole: 4 lines"));
}
