//! The store while the server runs: what is added, broken, mended and taken away.

use std::{fs, os::unix::fs::PermissionsExt};

use latchkey_wire::v1::Payload;

mod rig;
use rig::{Kms, MACHINE, PERSISTENT, STRANGER, replace, secret, store};

fn passphrase(kms: &Kms) -> String {
    kms.get(&MACHINE, PERSISTENT)
        .map(|payload| format!("{}{}", *payload.passphrase, payload.error))
        .unwrap_or_default()
}

#[test]
fn changes_are_seen_and_a_broken_file_keeps_what_it_held() {
    let directory = store(&[]);
    let kms = Kms::start(directory.path());
    let path = |name: &str| directory.path().join(name);
    assert!(passphrase(&kms).starts_with("no volume found"));

    kms.forget_log();
    replace(
        path("node.yaml"),
        &(MACHINE.volume("node", "") + &secret("node-cos-persistent", "  passphrase: one\n")),
    );
    kms.wait_for("1 volumes, 1 secrets in 1 files");
    assert_eq!(passphrase(&kms), "one");

    kms.forget_log();
    replace(
        path("node.yaml"),
        &(MACHINE.volume("node", "  quarantined: tru e\n")
            + &secret("node-cos-persistent", "  passphrase: two\n")),
    );
    let told = kms.wait_for("node.yaml: line 11, column 3: invalid type");
    assert!(told.contains("ERROR") && told.contains("what it held before stays valid"), "{told}");
    assert_eq!(passphrase(&kms), "one");

    // Other files go on meanwhile.
    kms.forget_log();
    replace(
        path("other.yml"),
        &(STRANGER.volume("other", "") + &secret("other-cos-persistent", "  passphrase: other\n")),
    );
    kms.wait_for("2 volumes, 2 secrets in 2 files");
    assert_eq!(*kms.get(&STRANGER, PERSISTENT).unwrap().passphrase, "other");
    assert_eq!(passphrase(&kms), "one");

    kms.forget_log();
    replace(
        path("node.yaml"),
        &(MACHINE.volume("node", "") + &secret("node-cos-persistent", "  passphrase: two\n")),
    );
    kms.wait_for("node.yaml: is valid again");
    kms.wait_for("2 volumes, 2 secrets in 2 files");
    assert_eq!(passphrase(&kms), "two");

    kms.forget_log();
    replace(
        path("node.yaml"),
        &(MACHINE.volume("node", "  quarantined: true\n")
            + &secret("node-cos-persistent", "  passphrase: two\n")),
    );
    kms.wait_for("2 volumes, 2 secrets in 2 files");
    assert_eq!(passphrase(&kms), "quarantined: COS_PERSISTENT");

    kms.forget_log();
    fs::remove_file(path("node.yaml")).unwrap();
    kms.wait_for("node.yaml: is gone");
    kms.wait_for("1 volumes, 1 secrets in 1 files");
    assert!(passphrase(&kms).starts_with("no volume found"));
}

#[test]
fn an_unreadable_file_never_leads_a_machine_to_enrol_again() {
    let directory = store(&[
        ("node.yaml", &MACHINE.volume("node", "")),
        ("more.yaml", &STRANGER.volume("other", "")),
    ]);
    let kms = Kms::start(directory.path());
    assert_eq!(kms.post(&MACHINE, PERSISTENT, &[1; 256]), None);
    kms.wait_for("first passphrase stored");
    drop(kms);
    let path = directory.path().join("default.node-cos-persistent.secret.yaml");
    let good = fs::read_to_string(&path).unwrap();
    fs::write(&path, good.replace("stringData:", "stringData: [")).unwrap();

    let kms = Kms::start(directory.path());
    kms.wait_for("default.node-cos-persistent.secret.yaml: line");
    assert_eq!(kms.get(&MACHINE, PERSISTENT), None);
    kms.wait_for("a file that cannot be read mentions it");
    assert_eq!(kms.post(&MACHINE, PERSISTENT, &[2; 256]), None);
    kms.wait_for("result=failed why=\"a file that cannot be read mentions this Secret's name");
    // A machine the file does not mention enrols.
    assert_eq!(kms.post(&STRANGER, PERSISTENT, &[3; 256]), None);
    assert_eq!(kms.get(&STRANGER, PERSISTENT), Some(Payload::sealed(&[3; 256])));

    replace(path, &good);
    kms.wait_for("default.node-cos-persistent.secret.yaml: is valid again");
    kms.wait_for("2 volumes, 2 secrets");
    assert_eq!(kms.get(&MACHINE, PERSISTENT), Some(Payload::sealed(&[1; 256])));
}

#[test]
fn a_secret_the_operator_has_just_written_is_not_overwritten() {
    let directory = store(&[("node.yaml", &MACHINE.volume("node", ""))]);
    let kms = Kms::start(directory.path());
    fs::write(
        directory.path().join("mine.yaml"),
        secret("node-cos-persistent", "  passphrase: mine\n"),
    )
    .unwrap();
    assert_eq!(kms.post(&MACHINE, PERSISTENT, &[1; 256]), None);
    kms.wait_for("1 volumes, 1 secrets in 2 files");
    assert_eq!(passphrase(&kms), "mine");
    assert!(kms.lines().iter().any(|line| {
        line.contains("a file that has just been changed mentions this Secret's name")
            || line.contains("there is a Secret of this name already")
    }));
    assert_eq!(rig::files(directory.path()), ["mine.yaml", "node.yaml"]);
}

#[test]
fn a_file_of_the_name_a_secret_would_get_is_not_overwritten() {
    let name = "default.node-cos-persistent.secret.yaml";
    let directory =
        store(&[("node.yaml", &MACHINE.volume("node", "")), (name, "# the operator's notes\n")]);
    let kms = Kms::start(directory.path());
    assert_eq!(kms.post(&MACHINE, PERSISTENT, &[1; 256]), None);
    kms.wait_for("result=failed why=\"writing ");
    assert_eq!(rig::files(directory.path()), [name, "node.yaml"]);
    assert_eq!(
        fs::read_to_string(directory.path().join(name)).unwrap(),
        "# the operator's notes\n"
    );
}

#[test]
fn only_manifests_are_read_and_leftovers_of_a_crash_are_removed() {
    let volume = MACHINE.volume("node", "");
    let wrong = "this: [is not\n";
    let directory = store(&[
        ("node.yaml", &volume),
        (".hidden.yaml", wrong),
        ("README.md", wrong),
        ("node.yaml~", wrong),
        ("node.yaml.bak", wrong),
        (".latchkey-new-0123456789abcdef", wrong),
    ]);
    fs::create_dir(directory.path().join("folder.yaml")).unwrap();
    std::os::unix::fs::symlink("node.yaml", directory.path().join("link.yaml")).unwrap();
    fs::set_permissions(directory.path().join("node.yaml"), fs::Permissions::from_mode(0o600))
        .unwrap();
    let kms = Kms::start(directory.path());
    kms.wait_for(".latchkey-new-0123456789abcdef: removed");
    assert!(passphrase(&kms).starts_with("No secret found for"));
    assert!(!kms.lines().iter().any(|line| line.contains("ERROR")), "{:?}", kms.lines());
    assert!(!rig::files(directory.path()).iter().any(|name| name.starts_with(".latchkey")));
}

#[test]
fn a_store_that_goes_away_and_comes_back_costs_nothing() {
    let parent = tempfile::tempdir().unwrap();
    let (here, away) = (parent.path().join("store"), parent.path().join("away"));
    fs::create_dir(&here).unwrap();
    fs::write(
        here.join("node.yaml"),
        MACHINE.volume("node", "") + &secret("node-cos-persistent", "  passphrase: found\n"),
    )
    .unwrap();
    let kms = Kms::start(&here);
    fs::rename(&here, &away).unwrap();
    kms.wait_for("cannot be read");
    assert_eq!(passphrase(&kms), "found");
    fs::rename(&away, &here).unwrap();
    kms.wait_for("can be read again");
    assert_eq!(passphrase(&kms), "found");
}

#[test]
fn what_an_operator_should_look_at_is_told() {
    let directory = store(&[
        ("typo.yaml", &MACHINE.volume("node", "  quarantine: true\n")),
        ("hash.yaml", &MACHINE.volume("short", "").replace(MACHINE.pubhash.as_str(), "abc")),
        ("open.yaml", &secret("a", "  passphrase: x\n")),
    ]);
    fs::set_permissions(directory.path().join("open.yaml"), fs::Permissions::from_mode(0o644))
        .unwrap();
    let kms = Kms::start(directory.path());
    for told in [
        "unknown field \"spec.quarantine\"",
        "TPMHash is not 64 hexadecimal digits",
        "open.yaml: holds Secrets and is open to every user",
    ] {
        assert!(kms.wait_for(told).contains("WARN"));
    }
}
