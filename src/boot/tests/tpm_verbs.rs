//! `info`, `checknv`, `readnv`, `cleanup`: the verbs that look at the TPM or take something out of it.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

#[allow(unreachable_pub)]
mod common;

use std::process::Command;

use common::{Machine, Run};
use latchkey_soft_tpm::SoftTpm;
use serde_json::Value;

const SURE: &str = "--i-know-what-i-am-doing";

/// Runs tpm2-tools on the machine's TPM, past the proxy. Without a resource manager they leave their transient objects behind.
fn tools(machine: &Machine, script: &str) -> String {
    let script = format!("{script}\ntpm2_flushcontext -t");
    let done = Command::new("sh")
        .args(["-ec", &script])
        .current_dir(&machine.config.0)
        .env("TPM2TOOLS_TCTI", format!("swtpm:path={}", machine.tpm.direct().display()))
        .output()
        .unwrap();
    assert!(done.status.success(), "{script}: {}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8(done.stdout).unwrap()
}

fn persistent(machine: &Machine) -> String {
    tools(machine, "tpm2_getcap handles-persistent")
}

fn nv_indices(machine: &Machine) -> String {
    tools(machine, "tpm2_getcap handles-nv-index")
}

fn json(run: &Run) -> Value {
    assert_eq!(run.code, 0, "{}", run.stderr);
    serde_json::from_slice(&run.stdout).unwrap()
}

/// Leaves a passphrase in the TPM as an installation does, and returns it.
fn install(machine: &Machine) -> String {
    let event = r#"{"name":"discovery.password","data":"{\"label\":\"COS_PERSISTENT\",\"type\":\"ext4\"}","file":""}"#;
    let run = machine.run_with(&["discovery.password"], event.as_bytes(), &[]);
    let answer: Value = serde_json::from_slice(&run.stdout).unwrap();
    let passphrase = answer["data"].as_str().unwrap().to_owned();
    assert_eq!(passphrase.len(), 52, "{answer}");
    passphrase
}

#[test]
fn info_tells_what_the_tpm_is_and_changes_nothing() {
    let machine = Machine::new(SoftTpm::certified());
    let before = persistent(&machine);
    let found = json(&machine.run(&["info", "--json", "--pcrs", "0,7,23"]));
    assert_eq!(persistent(&machine), before);
    assert_eq!(found["version"], 1);
    assert_eq!(found["device"], machine.tpm.device());
    assert_eq!(found["tpm"]["manufacturer"], "IBM");
    assert_eq!(found["tpm"]["lockout"]["active"], false);
    for hierarchy in ["owner", "endorsement", "lockout"] {
        assert_eq!(found["tpm"]["auth_set"][hierarchy], false, "{hierarchy}");
    }
    let endorsement = &found["endorsement"];
    assert_eq!(endorsement["by_certificate"], endorsement["pubhash"]);
    assert_eq!(endorsement["by_template"], endorsement["pubhash"]);
    assert_eq!(endorsement["differs"], false);
    assert!(endorsement["certificate"]["rsa_bytes"].as_u64().unwrap() > 500);
    assert_eq!(found["nv"]["index"], "0x01500000");
    assert_eq!(found["nv"]["present"], false);
    let pcrs = found["pcrs"].as_object().unwrap();
    assert_eq!(pcrs.keys().collect::<Vec<_>>(), ["0", "23", "7"]);
    assert!(pcrs.values().all(|value| value.as_str().unwrap().len() == 64));
    // The pubhash is what the program without a verb prints.
    assert_eq!(endorsement["pubhash"], machine.run(&[]).text());
}

#[test]
fn info_tells_whose_the_objects_at_kcrypts_handles_are() {
    let machine = Machine::new(SoftTpm::fresh());
    install(&machine);
    tools(
        &machine,
        "tpm2_createprimary -Q -C o -G ecc -c srk.ctx; tpm2_flushcontext -t
         tpm2_evictcontrol -Q -C o -c srk.ctx 0x81000001; tpm2_flushcontext -t
         tpm2_evictcontrol -Q -C o -c srk.ctx 0x81000077",
    );
    let found = json(&machine.run(&["info", "--json"]));
    let handles: Vec<_> = found["handles"].as_array().unwrap().iter().collect();
    let summary: Vec<_> =
        handles.iter().map(|h| (h["handle"].as_str().unwrap(), h["kcrypt"].as_bool())).collect();
    assert_eq!(
        summary,
        [("0x81010001", Some(true)), ("0x81000001", Some(false)), ("0x81000008", Some(true))]
    );
    assert_eq!(found["other_handles"], serde_json::json!(["0x81000077"]));
    assert_eq!(found["nv"]["kcrypt"], true);
    assert_eq!(found["nv"]["written"], true);
    assert_eq!(found["nv"]["bytes"], 256);
    let text = machine.run(&["info"]);
    for words in ["a storage root key of another program", "of other programs: 0x81000077"] {
        assert!(text.text().contains(words), "{}", text.text());
    }
}

#[test]
fn info_shows_the_rest_where_a_part_cannot_be_read() {
    let machine = Machine::new(SoftTpm::fresh());
    tools(&machine, "tpm2_changeauth -c endorsement secret");
    let run = machine.run(&["info", "--json"]);
    assert_eq!(run.code, 14, "{}", run.stderr);
    let found: Value = serde_json::from_slice(&run.stdout).unwrap();
    assert_eq!(found["tpm"]["auth_set"]["endorsement"], true);
    assert!(found["endorsement"]["error"].as_str().unwrap().contains("password"));
    assert_eq!(found["pcrs"].as_object().unwrap().len(), 3);
}

/// A certificate of another TPM: both names are shown, and which is which.
#[test]
fn info_warns_where_the_certificate_names_another_key() {
    let machine = Machine::new(SoftTpm::fresh());
    let other = Machine::new(SoftTpm::certified());
    tools(&other, "tpm2_nvread -C o 0x1c00002 > certificate");
    let certificate = other.config.0.join("certificate");
    tools(
        &machine,
        &format!(
            "size=$(stat -c %s {0}); tpm2_nvdefine -Q -C o 0x1c00002 -s $size -a 'ownerread|authread|ownerwrite'
             tpm2_nvwrite -Q -C o 0x1c00002 -i {0}",
            certificate.display()
        ),
    );
    let found = json(&machine.run(&["info", "--json"]));
    assert_eq!(found["endorsement"]["differs"], true);
    assert_eq!(found["endorsement"]["by_certificate"], other.run(&[]).text());
    assert_eq!(found["endorsement"]["pubhash"], machine.run(&[]).text());
    assert!(machine.run(&["info"]).text().contains("WARNING: they differ"));
}

#[test]
fn checknv_and_readnv_tell_whether_there_is_a_passphrase_and_which() {
    let machine = Machine::new(SoftTpm::fresh());
    for verb in ["checknv", "readnv"] {
        let run = machine.run(&[verb]);
        assert_eq!((run.code, run.text()), (31, ""), "{verb}: {}", run.stderr);
    }
    let passphrase = install(&machine);
    let checked = machine.run(&["checknv"]);
    assert_eq!(checked.code, 0, "{}", checked.stderr);
    assert!(checked.text().contains("0x01500000") && !checked.text().contains(&passphrase));
    assert_eq!(machine.run(&["readnv"]).text(), passphrase);
    assert_eq!(machine.run(&["readnv", "--nv-index", "0x1500001"]).code, 31);
    assert_eq!(machine.run(&["readnv", "--nv-index", "0x81000008"]).code, 1);
}

#[test]
fn checknv_tells_of_what_this_tpm_cannot_decrypt() {
    let machine = Machine::new(SoftTpm::fresh());
    tools(
        &machine,
        "tpm2_nvdefine -Q -C o 0x1500000 -s 256 -a 'ownerread|authread|ownerwrite|ppread'
         head -c 256 /dev/zero | tpm2_nvwrite -Q -C o 0x1500000 -i -",
    );
    let run = machine.run(&["checknv"]);
    assert_eq!((run.code, run.text()), (12, ""), "{}", run.stderr);
}

#[test]
fn cleanup_removes_nothing_unless_somebody_says_yes() {
    let machine = Machine::new(SoftTpm::fresh());
    let passphrase = install(&machine);
    let run = machine.run(&["cleanup"]);
    assert_eq!(run.code, 1, "{}", run.stderr);
    for words in ["0x01500000", "the passphrase of offline mode", "no terminal", SURE] {
        assert!(run.stderr.contains(words), "{}", run.stderr);
    }
    assert_eq!(machine.run(&["readnv"]).text(), passphrase);
    // At a terminal, only `yes` is yes.
    for (answer, code, left) in [("no", 1, 0), ("y", 1, 0), ("yes", 0, 31)] {
        let typed = format!(
            "printf '%s\\n' {answer} | script -qec '{} --config {} cleanup' /dev/null",
            env!("CARGO_BIN_EXE_kcrypt-discovery-challenger"),
            machine.config.0.display()
        );
        let done = Command::new("sh").args(["-c", &typed]).output().unwrap();
        let said = String::from_utf8_lossy(&done.stdout).into_owned();
        assert_eq!(done.status.code(), Some(code), "{answer}: {said}");
        assert_eq!(machine.run(&["checknv"]).code, left, "{answer}: {said}");
    }
}

#[test]
fn cleanup_leaves_the_keys_unless_told_and_they_come_again() {
    let machine = Machine::new(SoftTpm::fresh());
    let name = machine.run(&[]).text().to_owned();
    install(&machine);
    let run = machine.run(&["cleanup", SURE]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    assert!(!nv_indices(&machine).contains("0x1500000"));
    assert!(persistent(&machine).contains("0x81010001"));
    let run = machine.run(&["cleanup", SURE, "--keys"]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    assert!(run.stderr.contains("0x81010001 (endorsement key) is left"), "{}", run.stderr);
    assert!(!persistent(&machine).contains("0x81000008"));
    assert!(persistent(&machine).contains("0x81010001"));
    assert_eq!(machine.run(&["cleanup", SURE, "--keys", "--force"]).code, 0);
    assert_eq!(persistent(&machine).trim(), "");
    assert!(machine.run(&["cleanup", SURE, "--keys"]).stderr.contains("nothing to remove"));
    assert_eq!(machine.run(&[]).text(), name);
}

#[test]
fn cleanup_takes_no_index_that_kcrypt_did_not_make() {
    let machine = Machine::new(SoftTpm::fresh());
    tools(&machine, "tpm2_nvdefine -Q -C o 0x1500000 -s 32 -a 'ownerread|ownerwrite'");
    let run = machine.run(&["cleanup", SURE]);
    assert_eq!(run.code, 1, "{}", run.stderr);
    assert!(run.stderr.contains("not as kcrypt makes it"), "{}", run.stderr);
    assert!(nv_indices(&machine).contains("0x1500000"));
    assert_eq!(machine.run(&["cleanup", SURE, "--force"]).code, 0);
    assert!(!nv_indices(&machine).contains("0x1500000"));
}

/// All is looked at before the first goes: a foreign key at one handle keeps everything.
#[test]
fn cleanup_evicts_no_key_that_kcrypt_did_not_make() {
    for (handle, make) in [
        ("0x81000001", "tpm2_createprimary -Q -C o -G ecc -c key.ctx"),
        ("0x81010001", "tpm2_createprimary -Q -C o -G rsa2048 -c key.ctx"),
        (
            "0x81000008",
            "(printf '\\000\\001'; head -c 256 /dev/urandom) > unique; tpm2_createprimary -Q -C o -G rsa2048:null:null -u unique \
             -a 'sensitivedataorigin|userwithauth|decrypt|sign' -c key.ctx",
        ),
    ] {
        let machine = Machine::new(SoftTpm::fresh());
        tools(
            &machine,
            &format!("{make}; tpm2_flushcontext -t; tpm2_evictcontrol -Q -C o -c key.ctx {handle}"),
        );
        tools(
            &machine,
            "tpm2_nvdefine -Q -C o 0x1500000 -s 256 -a 'ownerread|authread|ownerwrite|ppread'",
        );
        let run = machine.run(&["cleanup", "--keys", SURE]);
        assert_eq!(run.code, 1, "{handle}: {}", run.stderr);
        assert!(run.stderr.contains(handle), "{handle}: {}", run.stderr);
        assert!(persistent(&machine).contains(handle));
        assert!(nv_indices(&machine).contains("0x1500000"), "{handle}");
        assert_eq!(machine.run(&["cleanup", "--keys", "--force", SURE]).code, 0, "{handle}");
        assert_eq!(persistent(&machine).trim(), "", "{handle}");
    }
}

#[test]
fn an_owner_password_is_named() {
    let machine = Machine::new(SoftTpm::fresh());
    install(&machine);
    tools(&machine, "tpm2_changeauth -c owner secret");
    for arguments in [&["cleanup", SURE][..], &["checknv"]] {
        let run = machine.run(arguments);
        assert_eq!(run.code, 14, "{arguments:?}: {}", run.stderr);
    }
}

/// The index that is cleaned up is the configured one; a configuration that cannot be read may name another.
#[test]
fn a_broken_configuration_stops_what_goes_by_the_index() {
    let machine = Machine::new(SoftTpm::fresh());
    machine.write("kcrypt:\n  challenger:\n    nv_indx: 0x1500001\n");
    let device = machine.tpm.device();
    for arguments in [&["cleanup", SURE][..], &["readnv"], &["checknv"]] {
        let run = machine.run(&[arguments, &["--tpm-device", &device]].concat());
        assert_eq!(run.code, 10, "{arguments:?}: {}", run.stderr);
    }
    let named = machine.run(&["checknv", "--tpm-device", &device, "--nv-index", "0x1500000"]);
    assert_eq!(named.code, 31, "{}", named.stderr);
    assert_eq!(machine.run(&["info", "--tpm-device", &device]).code, 0);
}
