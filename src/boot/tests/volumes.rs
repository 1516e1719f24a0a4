//! Which volume is this machine's, and that a header which encrypts nothing, or which Kairos made, is taken for what it is.
//! On files: neither device-mapper nor root is there where tests run, and nothing here is mapped.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

#[allow(unreachable_pub)]
mod common;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::{Directory, Machine};
use kcrypt_discovery_challenger::BootError;
use kcrypt_discovery_challenger::binding::choose;
use kcrypt_discovery_challenger::disk::{Volume, read_content};
use kcrypt_discovery_challenger::doctor::{self, Level};
use kcrypt_discovery_challenger::encrypt;
use kcrypt_discovery_challenger::luks::{self, Origin};
use kcrypt_discovery_challenger::{oem, token};
use latchkey_config::Config;
use latchkey_soft_tpm::SoftTpm;
use latchkey_tpm::Tpm;
use sha2::{Digest, Sha256};

const LABEL: &str = "COS_PERSISTENT";
/// UUIDv5(NAMESPACE_URL, label), as on every machine that Kairos installed (protocols/kcrypt.md §11.2).
const KAIROS_UUID: &str = "85c39d0f-4867-5227-8334-f5eec606d9eb";
const PASSPHRASE: &[u8] = b"kairos-passphrase-of-32-letters.";

fn volume(path: &Path) -> Volume {
    Volume { device: path.to_owned(), content: read_content(path).unwrap() }
}

fn empty(directory: &Directory, name: &str) -> PathBuf {
    let path = directory.0.join(name);
    File::create(&path).unwrap().set_len(32 << 20).unwrap();
    path
}

/// A plain file system that leaves room for being encrypted in place.
fn plain(directory: &Directory, name: &str) -> PathBuf {
    let path = empty(directory, name);
    let made = Command::new("mkfs.ext4")
        .args(["-q", "-F", "-L", LABEL])
        .arg(&path)
        .arg("12M")
        .stderr(Stdio::null())
        .status();
    assert!(made.unwrap().success());
    path
}

/// What Kairos' installer runs (protocols/kcrypt.md §11.2): the passphrase on stdin, without a newline.
fn kairos_made(path: &Path, label: &str) {
    format(path, PASSPHRASE, &["--iter-time", "5", "--uuid", KAIROS_UUID, "--label", label]);
}

fn format(path: &Path, passphrase: &[u8], options: &[&str]) {
    let mut child = Command::new("cryptsetup")
        .args(["luksFormat", "--type", "luks2", "-q"])
        .args(options)
        .arg(path)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), passphrase).unwrap();
    assert!(child.wait().unwrap().success());
}

fn choose_on(tpm: &SoftTpm, volumes: &[Volume]) -> Result<Volume, BootError> {
    let mut tpm = Tpm::open_within(Some(&tpm.device()), std::time::Duration::from_secs(10))?;
    choose(LABEL, volumes, &mut |uuid, label| Ok(tpm.volume_mac(uuid, label)?))
}

#[test]
fn a_volume_that_kairos_made_opens() {
    let directory = Directory::new();
    for label in [LABEL, "COS_PERSISTENT_LUKS"] {
        let path = empty(&directory, label);
        kairos_made(&path, label);
        let volume = volume(&path);
        assert_eq!(volume.luks_uuid(), KAIROS_UUID);
        assert_eq!(volume.token(), None);
        let key = luks::key(&volume, LABEL, PASSPHRASE, Origin::Machine).unwrap();
        assert_eq!(key.len(), 64, "AES-256-XTS, cryptsetup's default");
        let wrong = luks::key(&volume, LABEL, b"kairos-passphrase", Origin::Machine).unwrap_err();
        assert_eq!(wrong.exit_code(), 42);
    }
}

#[test]
fn an_enrolled_volume_is_told_from_an_impostor_by_the_tpm_alone() {
    let machine = Machine::new(SoftTpm::fresh());
    let directory = Directory::new();
    let ours = plain(&directory, "ours");
    let run = machine.run(&["encrypt", "--device", ours.to_str().unwrap(), LABEL]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    let ours = volume(&ours);
    let token = ours.token().unwrap();
    assert_eq!((&token["unlock"], &token["keyslots"][0]), (&"offline".into(), &"0".into()));
    assert!(token::mac(&token).unwrap().is_some());

    // A copy with another UUID, so that it can be put beside the first: token and mark are the first one's.
    let copy = directory.0.join("copy");
    fs::copy(&ours.device, &copy).unwrap();
    let uuid = "11111111-2222-4333-8444-555555555555";
    let changed =
        Command::new("cryptsetup").args(["luksUUID", "-q", "--uuid", uuid]).arg(&copy).status();
    assert!(changed.unwrap().success());
    let kairos = empty(&directory, "kairos");
    kairos_made(&kairos, LABEL);
    let (copy, kairos) = (volume(&copy), volume(&kairos));

    let tpm = &machine.tpm;
    assert_eq!(choose_on(tpm, std::slice::from_ref(&ours)).unwrap(), ours);
    assert_eq!(choose_on(tpm, &[copy.clone(), ours.clone(), kairos.clone()]).unwrap(), ours);
    assert_eq!(choose_on(tpm, std::slice::from_ref(&kairos)).unwrap(), kairos);
    for (volumes, named) in [
        (vec![copy.clone()], vec![&copy]),
        (vec![copy.clone(), kairos.clone()], vec![&copy, &kairos]),
        (vec![kairos.clone(), kairos.clone()], vec![&kairos, &kairos]),
    ] {
        let error = choose_on(tpm, &volumes).unwrap_err();
        assert_eq!(error.exit_code(), 41);
        for volume in named {
            let said = error.to_string();
            assert!(said.contains(volume.device.to_str().unwrap()), "{said}");
            assert!(said.contains(&volume.luks_uuid()), "{said}");
        }
    }
    // On any other machine it is the impostor.
    let stranger = SoftTpm::fresh();
    assert!(matches!(choose_on(&stranger, &[ours]), Err(BootError::Impostor { .. })));
}

#[test]
fn a_volume_from_before_is_enrolled_by_running_encrypt_again() {
    let machine = Machine::new(SoftTpm::fresh());
    let directory = Directory::new();
    let path = plain(&directory, "volume");
    let arguments = ["encrypt", "--device", path.to_str().unwrap(), LABEL];
    assert_eq!(machine.run(&arguments).code, 0);
    let marked = volume(&path).token().unwrap();
    let removed =
        Command::new("cryptsetup").args(["token", "remove", "--token-id", "0"]).arg(&path).status();
    assert!(removed.unwrap().success());
    assert_eq!(volume(&path).token(), None);
    assert_eq!(machine.run(&arguments).code, 0);
    assert_eq!(volume(&path).token(), Some(marked));
    // And a third time changes nothing.
    let before = fs::read(&path).unwrap();
    assert_eq!(machine.run(&arguments).code, 0);
    assert!(fs::read(&path).unwrap() == before);
}

/// Replaces the `nth` cipher that the metadata names, in both copies of the header, and makes their checksums right again.
fn replace_cipher(path: &Path, nth: usize, by: &[u8; 15]) {
    const CHECKSUM: std::ops::Range<usize> = 0x1c0..0x200;
    const COPY: usize = 0x4000;
    let mut content = fs::read(path).unwrap();
    for copy in content.chunks_exact_mut(COPY).take(2) {
        let places = copy.windows(15).enumerate().filter(|(_, text)| text == b"aes-xts-plain64");
        let at = places.map(|(at, _)| at).nth(nth).unwrap();
        copy[at..at + 15].copy_from_slice(by);
        copy[CHECKSUM].fill(0);
        let digest = Sha256::digest(&*copy);
        copy[CHECKSUM][..32].copy_from_slice(&digest);
    }
    fs::write(path, content).unwrap();
}

#[test]
fn a_null_cipher_is_refused_before_a_key_is_tried() {
    let directory = Directory::new();
    let path = empty(&directory, "null");
    // The keyslot's, and the data's.
    for nth in [0, 1] {
        kairos_made(&path, LABEL);
        luks::key(&volume(&path), LABEL, PASSPHRASE, Origin::Machine).unwrap();
        replace_cipher(&path, nth, b"cipher_null-ecb");
        let error = luks::key(&volume(&path), LABEL, PASSPHRASE, Origin::Machine).unwrap_err();
        assert!(
            matches!(&error, BootError::Untrusted { why, .. } if why.contains("cipher_null")),
            "{error}"
        );
        assert_eq!(error.exit_code(), 41);
    }
}

#[test]
fn a_header_that_was_swapped_after_it_was_chosen_is_refused() {
    let directory = Directory::new();
    let path = empty(&directory, "swapped");
    kairos_made(&path, LABEL);
    let chosen = volume(&path);
    format(&path, PASSPHRASE, &["--iter-time", "5", "--label", LABEL]);
    let error = luks::key(&chosen, LABEL, PASSPHRASE, Origin::Machine).unwrap_err();
    assert!(matches!(error, BootError::Untrusted { .. }), "{error}");
}

/// Neither the partition, nor the TPM, nor the key server notice.
#[test]
fn a_dry_run_says_what_it_would_do_and_does_nothing() {
    let machine = Machine::new(SoftTpm::fresh());
    let directory = Directory::new();
    let path = plain(&directory, "partition");
    let device = path.to_str().unwrap();
    let written = || (fs::read(&path).unwrap(), fs::metadata(&path).unwrap().modified().unwrap());
    let before = written();
    let dry = ["encrypt", "--dry-run", "--recovery-key", "--device", device, LABEL];

    let run = machine.run(&dry);
    assert_eq!(run.code, 0, "{}", run.stderr);
    for said in
        [device, "12 MiB", "encrypted in place", "a new passphrase", "0x01500000", "recovery key"]
    {
        assert!(run.text().contains(said), "{said}: {}", run.text());
    }
    assert!(run.text().ends_with("Nothing was changed.\n"), "{}", run.text());
    assert!(written() == before);
    let mut tpm =
        Tpm::open_within(Some(&machine.tpm.device()), std::time::Duration::from_secs(10)).unwrap();
    assert!(tpm.nv_blob(0x0150_0000).is_err(), "a passphrase was made");
    drop(tpm);

    // A server that is only waited for if it is asked.
    let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    server.set_nonblocking(true).unwrap();
    machine.serve(server.local_addr().unwrap());
    let run = machine.run(&dry);
    assert_eq!(run.code, 0, "{}", run.stderr);
    assert!(run.text().contains(&server.local_addr().unwrap().to_string()), "{}", run.text());
    assert!(server.accept().is_err(), "the server was asked");
    assert!(written() == before);

    machine.configure("");
    let in_place = machine.run(&["encrypt", "--device", device, LABEL]);
    assert_eq!(in_place.code, 0, "{}", in_place.stderr);
    let run = machine.run(&dry);
    assert!(run.text().contains("encrypted already") && run.text().contains("stays as it is"));
    assert!(run.text().contains("that NV index 0x01500000 of this TPM holds"), "{}", run.text());

    let run = machine.run(&["encrypt", "--dry-run", "--device", device, "COS_OEM"]);
    assert_ne!(run.code, 0);
    assert!(run.stderr.contains("has the label"), "{}", run.stderr);
}

/// What `doctor` says of one volume: levels and texts.
fn examined(config: &Config, volumes: &[Volume], unlock_test: bool) -> Vec<(Level, String)> {
    let findings = doctor::check_volumes(config, volumes, unlock_test).unwrap();
    assert!(findings.iter().all(|finding| finding.what == format!("volume {LABEL}")));
    findings.into_iter().map(|finding| (finding.level, finding.to_string())).collect()
}

fn configuration(machine: &Machine) -> Config {
    oem::load_mounted(std::slice::from_ref(&machine.config.0)).unwrap()
}

#[test]
fn doctor_tells_an_enrolled_volume_from_others_and_whether_it_would_open() {
    let machine = Machine::new(SoftTpm::fresh());
    let directory = Directory::new();
    let path = plain(&directory, "volume");
    let run = machine.run(&["encrypt", "--device", path.to_str().unwrap(), LABEL]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    let config = configuration(&machine);
    let found = examined(&config, &[volume(&path)], true);
    let levels: Vec<_> = found.iter().map(|(level, _)| *level).collect();
    assert_eq!(levels, [Level::Ok, Level::Ok, Level::Warn, Level::Ok], "{found:?}");
    for ((_, line), words) in found.iter().zip([
        "enrolled on this machine",
        "slot 0: pbkdf2, 1000 iterations (the machine's)",
        "no recovery key",
        "key slot 0 takes what is released",
    ]) {
        assert!(line.contains(words), "{line}");
    }
    // The passphrase of another machine's TPM.
    let stranger = Machine::new(SoftTpm::fresh());
    let found = examined(&configuration(&stranger), &[volume(&path)], true);
    assert!(matches!(&found[..], [(Level::Fail, line)] if line.contains("impostor")), "{found:?}");
}

#[test]
fn doctor_takes_a_volume_of_kairos_and_tells_when_it_would_not_open() {
    let machine = Machine::new(SoftTpm::fresh());
    let directory = Directory::new();
    let path = empty(&directory, "kairos");
    kairos_made(&path, LABEL);
    let config = configuration(&machine);
    let found = examined(&config, &[volume(&path)], false);
    assert!(found[0].1.contains("made by another program"), "{found:?}");
    assert!(found[1].1.contains("slot 0: argon2id") && found[1].1.contains("64 MiB"), "{found:?}");
    // The TPM has a passphrase, and it is another.
    let event = r#"{"name":"discovery.password","data":"{\"label\":\"COS_PERSISTENT\",\"type\":\"ext4\"}","file":""}"#;
    assert_eq!(machine.run_with(&["discovery.password"], event.as_bytes(), &[]).code, 0);
    let found = examined(&config, &[volume(&path)], true);
    let (level, line) = found.last().unwrap();
    assert_eq!(*level, Level::Fail);
    assert!(line.contains("does not open"), "{line}");
}

#[test]
fn doctor_tells_of_a_volume_that_is_not_there_not_encrypted_or_there_twice() {
    let machine = Machine::new(SoftTpm::fresh());
    let directory = Directory::new();
    let config = configuration(&machine);
    let plain = volume(&plain(&directory, "plain"));
    let (one, other) = (empty(&directory, "one"), empty(&directory, "other"));
    kairos_made(&one, LABEL);
    kairos_made(&other, LABEL);
    for (volumes, words) in [
        (vec![], "no LUKS2 volume labelled"),
        (vec![plain.clone()], "not encrypted"),
        (vec![volume(&one), volume(&other)], "2 LUKS2 volumes"),
        (vec![volume(&one), plain], "beside the LUKS2 volume"),
    ] {
        let found = examined(&config, &volumes, false);
        assert!(
            matches!(&found[..], [(Level::Fail, line)] if line.contains(words)),
            "{words}: {found:?}"
        );
    }
    machine.configure("challenger_server: http://127.0.0.1:9");
    let offline = empty(&directory, "mode");
    kairos_made(&offline, LABEL);
    let token = r#"{"type":"latchkey","keyslots":["0"],"version":1,"unlock":"offline"}"#;
    let file = directory.0.join("token");
    fs::write(&file, token).unwrap();
    let imported = Command::new("cryptsetup")
        .args(["token", "import", "--json-file"])
        .arg(&file)
        .arg(&offline)
        .status();
    assert!(imported.unwrap().success());
    let found = examined(&configuration(&machine), &[volume(&offline)], false);
    assert!(
        found.iter().any(|(level, line)| *level == Level::Warn
            && line.contains("by the TPM alone, and the configuration names a key server")),
        "{found:?}"
    );
}

/// With a QR code where there is somebody to point a telephone at it, without where it would end up in a file.
#[test]
fn a_recovery_key_is_printed_once_on_a_terminal_as_a_code_too() {
    let machine = Machine::new(SoftTpm::fresh());
    let directory = Directory::new();
    let path = plain(&directory, "partition");
    let arguments = ["encrypt", "--recovery-key", "--device", path.to_str().unwrap(), LABEL];

    let piped = machine.run(&arguments);
    assert_eq!(piped.code, 0, "{}", piped.stderr);
    let first = piped.text().strip_prefix("COS_PERSISTENT ").unwrap().strip_suffix('\n').unwrap();
    assert_eq!(first.len(), 71, "the key and nothing else: {}", piped.text());

    let terminal = nix::pty::openpty(None, None).unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_kcrypt-discovery-challenger"))
        .arg("--config")
        .arg(&machine.config.0)
        .args(arguments)
        .stdout(terminal.slave)
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut shown = Vec::new();
    // EIO is how a terminal ends.
    let _ = std::io::Read::read_to_end(&mut File::from(terminal.master), &mut shown);
    assert!(child.wait().unwrap().success());
    let shown = String::from_utf8(shown).unwrap().replace("\r\n", "\n");
    let (line, code) = shown.split_once('\n').unwrap();
    let second = line.strip_prefix("COS_PERSISTENT ").unwrap();
    assert_eq!(code, *encrypt::qr_code(second).unwrap());
    assert_ne!(first, second, "made anew");
}
