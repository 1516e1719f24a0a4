//! `rekey`, with a real TPM and on a real LUKS2 header: whenever the power goes, what is released opens the volume.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

#[allow(unreachable_pub)]
mod common;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use common::{Directory, Machine, Run, authenticate, serve};
use kcrypt_discovery_challenger::binding::choose;
use kcrypt_discovery_challenger::disk::{Volume, read_content};
use kcrypt_discovery_challenger::luks::{self, Origin};
use kcrypt_discovery_challenger::token;
use latchkey_soft_tpm::SoftTpm;
use latchkey_tpm::Tpm;
use latchkey_wire::v1::Payload;
use tungstenite::Message;
use zeroize::Zeroizing;

const LABEL: &str = "COS_PERSISTENT";
const NV: u32 = 0x0150_0000;
const STAGED: u32 = 0x0150_0001;
const OLD: &str = "the-passphrase-of-the-old-secret";
const NEW: &str = "the-passphrase-of-the-new-secret";
const OPERATORS: &str = "the passphrase of an operator";

fn volume(path: &Path) -> Volume {
    Volume { device: path.to_owned(), content: read_content(path).unwrap() }
}

fn opens(path: &Path, passphrase: &[u8]) -> bool {
    luks::key(&volume(path), LABEL, passphrase, Origin::Machine).is_ok()
}

/// A volume as it is after `encrypt`, with the passphrase in the TPM.
fn encrypted(machine: &Machine, directory: &Directory) -> PathBuf {
    let path = directory.0.join("volume");
    File::create(&path).unwrap().set_len(32 << 20).unwrap();
    let made = Command::new("mkfs.ext4")
        .args(["-q", "-F", "-L", LABEL])
        .arg(&path)
        .arg("12M")
        .stderr(Stdio::null())
        .status();
    assert!(made.unwrap().success());
    let run = machine.run(&["encrypt", "--device", path.to_str().unwrap(), LABEL]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    path
}

/// A volume that Kairos made with [`OLD`], to which an operator may have added a key of his own.
fn made_elsewhere(directory: &Directory, with_other_key: bool) -> PathBuf {
    let path = directory.0.join("volume");
    File::create(&path).unwrap().set_len(32 << 20).unwrap();
    let keys = [directory.0.join("old"), directory.0.join("operators")];
    std::fs::write(&keys[0], OLD).unwrap();
    std::fs::write(&keys[1], OPERATORS).unwrap();
    let cheap = ["-q", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--key-file"];
    let format = Command::new("cryptsetup")
        .args(["luksFormat", "--type", "luks2", "--label", LABEL])
        .args(cheap)
        .args([&keys[0], &path])
        .status();
    assert!(format.unwrap().success());
    if with_other_key {
        let add = Command::new("cryptsetup")
            .arg("luksAddKey")
            .args(cheap)
            .args([&keys[0], &path, &keys[1]])
            .status();
        assert!(add.unwrap().success());
    }
    path
}

fn rekey(machine: &Machine, path: &Path, options: &[&str], stdin: &str) -> Run {
    let arguments = [&["rekey", "--device", path.to_str().unwrap()], options, &[LABEL]].concat();
    machine.run_with(&arguments, stdin.as_bytes(), &[])
}

fn tpm(machine: &Machine) -> Tpm {
    Tpm::open_within(Some(&machine.tpm.device()), Duration::from_secs(10)).unwrap()
}

/// Without what was loaded. Not by a restart: some of these without a shutdown before, and the TPM takes it for an attack.
fn power_is_back(tpm: &SoftTpm) {
    tpm.mend();
    let tcti = format!("swtpm:path={}", tpm.direct().display());
    for kind in ["--loaded-session", "--transient-object"] {
        let flushed =
            Command::new("tpm2_flushcontext").arg(kind).env("TPM2TOOLS_TCTI", &tcti).status();
        assert!(flushed.unwrap().success());
    }
}

#[test]
fn offline_no_power_cut_closes_the_volume() {
    let machine = Machine::new(SoftTpm::fresh());
    let directory = Directory::new();
    let path = encrypted(&machine, &directory);
    let (mut cuts, mut between) = (0, 0);
    loop {
        let before = machine.get().stdout;
        machine.tpm.cut_after(cuts);
        let cut = rekey(&machine, &path, &[], "");
        power_is_back(&machine.tpm);
        // As at the next boot.
        let released = machine.get();
        assert_eq!(released.code, 0, "after {cuts} commands: {}", released.stderr);
        assert!(opens(&path, &released.stdout), "after {cuts} commands: {}", cut.stderr);
        between += u32::from(opens(&path, &before) && released.stdout != before);
        if cut.code == 0 {
            break;
        }
        let run = rekey(&machine, &path, &[], "");
        assert_eq!(run.code, 0, "after {cuts} commands: {}", run.stderr);
        let after = machine.get().stdout;
        assert!(opens(&path, &after) && !opens(&path, &before), "after {cuts} commands");
        assert!(tpm(&machine).nv_blob(STAGED).is_err(), "after {cuts} commands");
        cuts += 2;
    }
    assert!(cuts > 10, "{cuts}: there were cuts in all of it");
    assert!(between > 0, "no cut came while both opened the volume");
    let token = volume(&path).token().unwrap();
    assert_eq!(token::keyslots(&token), [0]);
    assert_eq!(token.get("next"), None);
}

/// The power goes while the TPM writes the new sealed passphrase over the old one: half of each opens nothing.
#[test]
fn offline_a_torn_passphrase_in_the_tpm_is_replaced_by_its_copy() {
    let machine = Machine::new(SoftTpm::fresh());
    let directory = Directory::new();
    let path = encrypted(&machine, &directory);
    let old = tpm(&machine).nv_blob(NV).unwrap();
    // Each time a little further, until the new one has been written.
    let mut cuts = 0;
    while *tpm(&machine).nv_blob(NV).unwrap() == *old {
        machine.tpm.cut_after(cuts);
        let cut = rekey(&machine, &path, &[], "");
        assert_ne!(cut.code, 0, "{}", cut.stderr);
        power_is_back(&machine.tpm);
        cuts += 1;
        assert!(cuts < 100, "{}", cut.stderr);
    }
    let mut torn = tpm(&machine).nv_blob(NV).unwrap();
    torn[128..].copy_from_slice(&old[128..]);
    tpm(&machine).nv_replace(NV, &torn).unwrap();

    let released = machine.get();
    assert_eq!(released.code, 0, "{}", released.stderr);
    assert!(opens(&path, &released.stdout));
    let run = rekey(&machine, &path, &[], "");
    assert_eq!(run.code, 0, "{}", run.stderr);
    assert_eq!(machine.get().stdout, released.stdout);
    assert!(opens(&path, &released.stdout));
    assert!(tpm(&machine).nv_blob(STAGED).is_err());
}

#[test]
fn offline_another_tpm_takes_the_volume_over_by_another_key() {
    let machine = Machine::new(SoftTpm::fresh());
    let directory = Directory::new();
    let path = made_elsewhere(&directory, true);
    let run = rekey(&machine, &path, &[], "");
    assert_ne!(run.code, 0);
    assert!(
        tpm(&machine).nv_blob(STAGED).is_err(),
        "nothing is made before the volume is known to open"
    );
    let run = rekey(&machine, &path, &["--key-stdin"], "no key of it\n");
    assert_eq!(run.code, 42, "{}", run.stderr);
    assert!(tpm(&machine).nv_blob(STAGED).is_err());

    let run = rekey(&machine, &path, &["--key-stdin"], &format!("{OPERATORS}\n"));
    assert_eq!(run.code, 0, "{}", run.stderr);
    assert!(opens(&path, &machine.get().stdout));
    assert!(opens(&path, OPERATORS.as_bytes()) && !opens(&path, OLD.as_bytes()));
    let mut tpm = tpm(&machine);
    let volume = volume(&path);
    let chosen = choose(LABEL, &[volume.clone(), volume.clone()], &mut |uuid, label| {
        Ok(tpm.volume_mac(uuid, label)?)
    });
    // Both have this machine's mark, being one: it was enrolled.
    assert!(chosen.unwrap_err().to_string().contains("2 LUKS2 volumes"));
    assert_eq!(
        choose(LABEL, std::slice::from_ref(&volume), &mut |uuid, label| Ok(
            tpm.volume_mac(uuid, label)?
        ))
        .unwrap(),
        volume
    );
    assert!(token::mac(&volume.token().unwrap()).unwrap().is_some());
}

/// A server that releases [`OLD`] so many times, and [`NEW`] from then on.
fn changing_after(machine: &Machine, times: usize) {
    let asked = AtomicUsize::new(0);
    machine.serve(serve(vec![Box::new(move |stream| {
        let mut client = authenticate(stream);
        let released = if asked.fetch_add(1, Ordering::Relaxed) < times { OLD } else { NEW };
        let payload =
            Payload { passphrase: Zeroizing::new(released.into()), ..Payload::default() }.to_json();
        client.socket.send(Message::binary(payload.as_bytes().to_vec())).unwrap();
    })]));
}

#[test]
fn online_it_waits_until_another_passphrase_is_released() {
    let machine = Machine::new(SoftTpm::fresh());
    let directory = Directory::new();
    let path = made_elsewhere(&directory, false);
    changing_after(&machine, usize::MAX);
    let run = rekey(&machine, &path, &[], "");
    assert_eq!(run.code, 31, "{}", run.stderr);
    assert!(run.stderr.contains("still releases the present passphrase"), "{}", run.stderr);
    // With no other key, a power cut between the change there and the change here would be the end of the volume.
    let run = rekey(&machine, &path, &["--wait", "60"], "");
    assert_eq!(run.code, 1, "{}", run.stderr);
    assert!(run.stderr.contains("--recovery-key"), "{}", run.stderr);

    let path = made_elsewhere(&directory, true);
    changing_after(&machine, 3);
    let run = rekey(&machine, &path, &["--wait", "300"], "");
    assert_eq!(run.code, 0, "{}", run.stderr);
    assert!(opens(&path, NEW.as_bytes()) && !opens(&path, OLD.as_bytes()));
    assert!(opens(&path, OPERATORS.as_bytes()));
    assert_eq!(volume(&path).token().unwrap()["unlock"], "online");
}

#[test]
fn online_a_secret_that_was_changed_already_is_taken_with_another_key() {
    let machine = Machine::new(SoftTpm::fresh());
    let directory = Directory::new();
    let path = made_elsewhere(&directory, false);
    changing_after(&machine, 0);
    assert_eq!(rekey(&machine, &path, &[], "").code, 42);
    // The old one, from where the operator keeps it.
    let run = rekey(&machine, &path, &["--key-stdin"], OLD);
    assert_eq!(run.code, 0, "{}", run.stderr);
    assert!(opens(&path, NEW.as_bytes()) && !opens(&path, OLD.as_bytes()));
    // Once more: nothing is left to do, and the server has nothing new.
    assert_eq!(rekey(&machine, &path, &[], "").code, 31);
}

#[test]
fn online_what_changes_once_more_in_between_leaves_both_keys() {
    let machine = Machine::new(SoftTpm::fresh());
    let directory = Directory::new();
    let path = made_elsewhere(&directory, true);
    // Released when asked first; at the proof it is the other one.
    changing_after(&machine, 1);
    let add = Command::new("cryptsetup")
        .args(["luksChangeKey", "-q", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"])
        .args(["--key-slot", "0", "--key-file"])
        .args([&directory.0.join("old"), &path, &directory.0.join("operators")])
        .status();
    assert!(add.unwrap().success());
    let run = rekey(&machine, &path, &["--key-stdin"], OPERATORS);
    assert_eq!(run.code, 31, "{}", run.stderr);
    assert!(run.stderr.contains("changed once more"), "{}", run.stderr);
    assert!(opens(&path, OLD.as_bytes()) && opens(&path, OPERATORS.as_bytes()));
    let run = rekey(&machine, &path, &["--key-stdin"], OPERATORS);
    assert_eq!(run.code, 0, "{}", run.stderr);
    assert!(opens(&path, NEW.as_bytes()) && !opens(&path, OLD.as_bytes()));
}
