//! Without power cuts: what comes out, and what is refused.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};

use kcrypt_discovery_challenger::encrypt::{
    EncryptError, Progress, Report, Request, State, Unlock, examine, probe, recovery_key, run,
};

use crate::disk::{LABEL, MIB, PASSPHRASE, decrypt, ext4, json, scratch, volume_key};

pub(crate) fn request(device: &Path) -> Request<'_> {
    Request {
        device,
        label: LABEL,
        passphrase: PASSPHRASE,
        recovery: None,
        unlock: Unlock::Offline,
        new: false,
    }
}

pub(crate) fn encrypt(request: &Request<'_>) -> Result<Report, EncryptError> {
    run(request, &mut |_| {})
}

#[test]
fn a_file_system_is_encrypted_in_place_and_kept_byte_for_byte() {
    // Free room in zones and between them; and sizes that are no multiple of anything.
    for (size, filesystem) in
        [(32 * MIB, 12 * MIB), (36 * MIB, 24 * MIB - 4096), (33 * MIB + 512 * 3, 8 * MIB)]
    {
        let dir = scratch();
        let path = ext4(dir.path(), size, filesystem, LABEL);
        let before = fs::read(&path).unwrap();
        assert!(
            matches!(probe(&path).unwrap(), State::Plain(ext) if ext.size == filesystem && ext.label == LABEL)
        );

        let mut steps = Vec::new();
        let report = run(&request(&path), &mut |step| steps.push(step)).unwrap();
        assert!(matches!(report.found, State::Plain(_)));
        assert_eq!(
            probe(&path).unwrap(),
            State::Encrypted { label: LABEL.into(), uuid: report.uuid.clone() }
        );
        assert!(steps.starts_with(&[Progress::Preparing]));
        assert!(matches!(steps.last(), Some(Progress::Encrypting { done, of }) if done == of));

        let filesystem = filesystem as usize;
        let data = decrypt(&path, PASSPHRASE, filesystem);
        assert!(data == before[..filesystem], "the data is not what it was");
        assert_no_plaintext(&before[..filesystem], &fs::read(&path).unwrap());

        // Again: nothing changes any more.
        let after = fs::read(&path).unwrap();
        let again = encrypt(&request(&path)).unwrap();
        assert_eq!(again.found, State::Encrypted { label: LABEL.into(), uuid: report.uuid });
        assert!(fs::read(&path).unwrap() == after);
    }
}

#[test]
fn a_partition_of_half_a_gigabyte_or_more_has_a_header_of_the_usual_size() {
    let dir = scratch();
    let path = ext4(dir.path(), 512 * MIB, 60 * MIB, LABEL);
    let before = fs::read(&path).unwrap()[..60 * MIB as usize].to_vec();
    let mut last = 0;
    let report = run(&request(&path), &mut |step| {
        if let Progress::Encrypting { done, of } = step {
            assert!(last <= done && done <= of, "{last} {done} {of}");
            last = done;
        }
    });
    report.unwrap();
    let header = json(&path);
    assert_eq!(header["segments"]["0"]["offset"], (16 * MIB).to_string());
    assert_eq!(header["config"]["keyslots_size"], (16 * MIB - 2 * 16384).to_string());
    assert!(decrypt(&path, PASSPHRASE, before.len()) == before);
}

/// No 4 KiB of the old file system are left anywhere.
fn assert_no_plaintext(before: &[u8], after: &[u8]) {
    let plain: std::collections::HashSet<&[u8]> =
        before.chunks_exact(4096).filter(|block| block.iter().any(|byte| *byte != 0)).collect();
    let left = after.chunks_exact(4096).position(|block| plain.contains(block));
    assert_eq!(left, None, "block with old plaintext");
}

#[test]
fn the_header_is_cheap_to_open_and_says_what_it_is() {
    let dir = scratch();
    let path = ext4(dir.path(), 32 * MIB, 12 * MIB, LABEL);
    let report = encrypt(&Request { unlock: Unlock::Online, ..request(&path) }).unwrap();
    assert_eq!(report.digest_iterations, 1000);
    assert!(!report.recovery);

    let header = json(&path);
    let slots = header["keyslots"].as_object().unwrap();
    assert_eq!(slots.len(), 1, "{slots:?}");
    let slot = &slots["0"];
    assert_eq!(slot["key_size"], 64);
    assert_eq!(slot["kdf"]["type"], "pbkdf2");
    assert_eq!(
        (&slot["kdf"]["hash"], &slot["kdf"]["iterations"]),
        (&"sha256".into(), &1000.into())
    );
    let digests = header["digests"].as_object().unwrap();
    assert_eq!(digests.len(), 1);
    assert_eq!(digests["0"]["iterations"], 1000);
    assert_eq!(digests["0"]["hash"], "sha256");
    assert_eq!(
        header["tokens"],
        serde_json::json!({"0": {"type": "latchkey", "keyslots": ["0"], "version": 1, "unlock": "online"}})
    );
    assert_eq!(header["config"]["flags"], serde_json::json!(["allow-discards"]));
    assert_eq!(header["config"].get("requirements"), None);

    // Each volume has a UUID of its own, random (version 4).
    assert_eq!(report.uuid.as_bytes()[14], b'4');
    let other = scratch();
    let path = ext4(other.path(), 32 * MIB, 12 * MIB, LABEL);
    assert_ne!(encrypt(&request(&path)).unwrap().uuid, report.uuid);
}

#[test]
fn a_recovery_key_opens_keyslot_1_and_is_tried_after_the_machines() {
    let dir = scratch();
    let path = ext4(dir.path(), 32 * MIB, 12 * MIB, LABEL);
    let (first, second) = (recovery_key().unwrap(), recovery_key().unwrap());
    let with = |key: &'static [u8]| Request { recovery: Some(key), ..request(&path) };
    let leak = |key: &str| -> &'static [u8] { Vec::leak(key.as_bytes().to_vec()) };
    let (first, second) = (leak(&first), leak(&second));

    assert!(encrypt(&with(first)).unwrap().recovery);
    let key = volume_key(&path, 0, PASSPHRASE).unwrap();
    assert_eq!(volume_key(&path, 1, first), Some(key.clone()));
    let slot = json(&path)["keyslots"]["1"].clone();
    assert_eq!(
        (&slot["kdf"]["type"], &slot["priority"]),
        (&"argon2id".into(), &serde_json::Value::Null)
    );
    assert_eq!(json(&path)["keyslots"]["0"]["priority"], 2, "preferred");
    let memory = slot["kdf"]["memory"].as_u64().unwrap();
    assert!((32..=1024 * 1024).contains(&memory), "{memory}");

    // The one given last is the one that opens.
    encrypt(&with(second)).unwrap();
    assert_eq!(volume_key(&path, 1, second), Some(key));
    assert_eq!(volume_key(&path, 1, first), None);
    assert_eq!(json(&path)["keyslots"].as_object().unwrap().len(), 2);
}

#[test]
fn without_room_nothing_is_touched_and_the_remedy_is_told_and_works() {
    let dir = scratch();
    let path = dir.path().join("partition");
    fs::File::create(&path).unwrap().set_len(32 * MIB).unwrap();
    let made = Command::new("mkfs.ext4").args(["-q", "-F", "-L", LABEL]).arg(&path).status();
    assert!(made.unwrap().success());
    let before = fs::read(&path).unwrap();
    let error = encrypt(&request(&path)).unwrap_err();
    let EncryptError::NoRoom { free: 0, needed, kib, .. } = error else { panic!("{error}") };
    assert_eq!(needed, 12 * MIB + 4096);
    assert!(fs::read(&path).unwrap() == before);

    let message = error.to_string();
    let path_text = path.display();
    let command = format!("e2fsck -f {path_text} && resize2fs {path_text} {kib}K");
    assert!(message.ends_with(&command), "{message}");
    let command = command.replace("e2fsck -f", "e2fsck -fp");
    assert!(Command::new("sh").args(["-c", &command]).output().unwrap().status.success());
    // resize2fs cuts a file off behind the file system; a partition stays as large as it is.
    truncate(&path, 32 * MIB);
    let before = fs::read(&path).unwrap();
    encrypt(&request(&path)).unwrap();
    let kept = (kib * 1024) as usize;
    assert!(decrypt(&path, PASSPHRASE, kept) == before[..kept]);
}

#[test]
fn what_is_not_ours_to_encrypt_is_refused_and_left_alone() {
    type Case = (&'static str, fn(&Path), fn(&EncryptError) -> bool);
    let cases: [Case; 10] = [
        (
            "other label",
            |path| relabel(path, "COS_OEM"),
            |e| matches!(e, EncryptError::OtherLabel { found, .. } if found == "COS_OEM"),
        ),
        (
            "superblock of a larger partition",
            |path| truncate(path, 10 * MIB),
            |e| matches!(e, EncryptError::Filesystem { .. }),
        ),
        (
            "xfs",
            |path| patch(path, 0, b"XFSB", true),
            |e| matches!(e, EncryptError::UnknownContent { found, .. } if found.contains("XFS")),
        ),
        (
            "something in the middle of nothing",
            |path| patch(path, 3 * MIB, b"x", true),
            |e| matches!(e, EncryptError::UnknownContent { .. }),
        ),
        (
            "something at the end of nothing",
            |path| patch(path, 32 * MIB - 1, b"x", true),
            |e| matches!(e, EncryptError::UnknownContent { .. }),
        ),
        (
            "LUKS1",
            |path| luks_format(path, &["--type", "luks1"]),
            |e| matches!(e, EncryptError::Header { .. }),
        ),
        (
            "a header that is broken",
            |path| patch(path, 0, b"LUKS\xba\xbe\0\x02", true),
            |e| matches!(e, EncryptError::Header { .. }),
        ),
        (
            "a volume with another label",
            |path| luks_format(path, &["--type", "luks2", "--label", "COS_OEM"]),
            |e| matches!(e, EncryptError::OtherLabel { .. }),
        ),
        ("an encryption begun by cryptsetup", begin_elsewhere, |e| {
            matches!(e, EncryptError::BegunElsewhere { .. })
        }),
        (
            "a volume whose slot 0 has another passphrase",
            |path| {
                luks_format_with(path, &["--type", "luks2", "--label", LABEL], b"another");
            },
            |e| matches!(e, EncryptError::WrongPassphrase { .. }),
        ),
    ];
    for (name, make, expected) in cases {
        let dir = scratch();
        let size = if name.contains("cryptsetup") { 48 * MIB } else { 32 * MIB };
        let path = ext4(dir.path(), size, 12 * MIB, LABEL);
        make(&path);
        let before = fs::read(&path).unwrap();
        let error = encrypt(&request(&path)).unwrap_err();
        assert!(expected(&error), "{name}: {error}");
        assert!(fs::read(&path).unwrap() == before, "{name}");
    }
}

#[test]
fn what_seems_to_be_something_else_is_not_thrown_away_either() {
    const MD: &[u8] = b"\xfc\x4e\x2b\xa9";
    type Case = (&'static str, fn(&Path), fn(&EncryptError) -> bool);
    let member = |e: &EncryptError| matches!(e, EncryptError::Member { .. });
    let other = |e: &EncryptError| matches!(e, EncryptError::OtherLabel { .. });
    let cases: [Case; 7] = [
        ("file system with another label", |path| relabel(path, "COS_OEM"), other),
        (
            "volume with another label",
            |path| luks_format(path, &["--type", "luks2", "--label", "COS_OEM"]),
            other,
        ),
        ("LVM", |path| patch(path, 512, b"LABELONE", true), member),
        ("RAID, superblock 1.2", |path| patch(path, 4096, MD, true), member),
        // A file system is to be seen on these.
        ("RAID, superblock 1.0", |path| patch(path, 32 * MIB - 8192, MD, false), member),
        ("RAID, superblock 0.90", |path| patch(path, 32 * MIB - 65536, MD, false), member),
        (
            "RAID of a volume",
            |path| {
                luks_format(path, &["--type", "luks2", "--label", LABEL]);
                patch(path, 32 * MIB - 8192, MD, false);
            },
            member,
        ),
    ];
    for (name, make, expected) in cases {
        let dir = scratch();
        let path = ext4(dir.path(), 32 * MIB, 12 * MIB, LABEL);
        make(&path);
        let before = fs::read(&path).unwrap();
        for new in [false, true] {
            let error = encrypt(&Request { new, ..request(&path) }).unwrap_err();
            assert!(expected(&error), "{name}, new {new}: {error}");
            let error = examine(&path, LABEL, new).unwrap_err();
            assert!(expected(&error), "{name}, new {new}: {error}");
        }
        assert!(fs::read(&path).unwrap() == before, "{name}");
    }
}

/// Neither bytes nor the time of the last write change, also where libcryptsetup would repair something.
#[test]
fn looking_writes_nothing() {
    let torn = |path: &Path| {
        luks_format(path, &["--type", "luks2", "--label", LABEL]);
        patch(path, 100, b"torn", false);
    };
    type Case<'a> = (&'a str, &'a dyn Fn(&Path), fn(&State) -> bool);
    let cases: [Case<'_>; 4] = [
        ("plain", &|_| {}, |state| matches!(state, State::Plain(_))),
        ("empty", &|path| patch(path, 0, b"", true), |state| *state == State::Empty),
        ("volume", &|path| luks_format(path, &["--type", "luks2", "--label", LABEL]), |state| {
            matches!(state, State::Encrypted { .. })
        }),
        (
            "torn volume",
            &torn,
            |state| matches!(state, State::Encrypted { label, .. } if label == LABEL),
        ),
    ];
    for (name, make, expected) in cases {
        let dir = scratch();
        let path = ext4(dir.path(), 32 * MIB, 12 * MIB, LABEL);
        make(&path);
        let written =
            || (fs::read(&path).unwrap(), fs::metadata(&path).unwrap().modified().unwrap());
        let before = written();
        assert!(expected(&probe(&path).unwrap()), "{name}");
        for new in [false, true] {
            assert!(expected(&examine(&path, LABEL, new).unwrap()), "{name}");
        }
        assert!(written() == before, "{name}");
        // And what is torn is repaired when something is to be done.
        if name == "torn volume" {
            encrypt(&request(&path)).unwrap();
            assert!(written() != before);
        }
    }
}

fn truncate(path: &Path, size: u64) {
    OpenOptions::new().write(true).open(path).unwrap().set_len(size).unwrap();
}

fn patch(path: &Path, at: u64, bytes: &[u8], on_zeros: bool) {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    if on_zeros {
        let size = file.metadata().unwrap().len();
        file.set_len(0).unwrap();
        file.set_len(size).unwrap();
    }
    file.write_all_at(bytes, at).unwrap();
}

fn relabel(path: &Path, label: &str) {
    assert!(
        Command::new("tune2fs")
            .args(["-L", label])
            .arg(path)
            .stdout(Stdio::null())
            .status()
            .unwrap()
            .success()
    );
}

fn luks_format(path: &Path, options: &[&str]) {
    luks_format_with(path, options, PASSPHRASE);
}

fn luks_format_with(path: &Path, options: &[&str], passphrase: &[u8]) {
    cryptsetup("luksFormat", path, options, passphrase);
}

fn begin_elsewhere(path: &Path) {
    cryptsetup(
        "reencrypt",
        path,
        &["--encrypt", "--init-only", "--reduce-device-size", "32M"],
        PASSPHRASE,
    );
}

fn cryptsetup(action: &str, path: &Path, options: &[&str], passphrase: &[u8]) {
    let key = path.with_extension("key");
    fs::write(&key, passphrase).unwrap();
    let done = Command::new("cryptsetup")
        .args([action, "-q", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--key-file"])
        .arg(&key)
        .args(options)
        .arg(path)
        .current_dir(path.parent().unwrap())
        .status()
        .unwrap();
    assert!(done.success());
}

#[test]
fn a_volume_that_kairos_made_is_accepted_as_it_is() {
    for label in [LABEL, "COS_PERSISTENT_LUKS"] {
        let dir = scratch();
        let path = ext4(dir.path(), 32 * MIB, 12 * MIB, LABEL);
        luks_format(
            &path,
            &[
                "--type",
                "luks2",
                "--label",
                label,
                "--uuid",
                "85c39d0f-4867-5227-8334-f5eec606d9eb",
            ],
        );
        let before = fs::read(&path).unwrap();
        let report = encrypt(&request(&path)).unwrap();
        assert_eq!(report.uuid, "85c39d0f-4867-5227-8334-f5eec606d9eb");
        assert!(report.digest_iterations >= 1000);
        assert!(fs::read(&path).unwrap() == before);
    }
}

#[test]
fn what_is_no_partition_or_no_passphrase_is_refused() {
    let dir = scratch();
    let path = ext4(dir.path(), 32 * MIB, 12 * MIB, LABEL);
    let is = |result: Result<Report, EncryptError>, expected: fn(&EncryptError) -> bool| {
        let error = result.unwrap_err();
        assert!(expected(&error), "{error}");
    };
    is(encrypt(&request(Path::new("/nonexistent"))), |e| matches!(e, EncryptError::Open { .. }));
    is(encrypt(&request(Path::new("/dev/null"))), |e| matches!(e, EncryptError::NotADevice { .. }));
    is(encrypt(&request(dir.path())), |e| matches!(e, EncryptError::Open { .. }));
    let long = vec![b'x'; 513];
    for passphrase in [&b""[..], b"a\nb", b"a\r", b"\0", &long] {
        let bad = |e: &EncryptError| matches!(e, EncryptError::BadPassphrase { .. });
        is(encrypt(&Request { passphrase, ..request(&path) }), bad);
        is(encrypt(&Request { recovery: Some(passphrase), ..request(&path) }), bad);
    }
    let long = "x".repeat(48);
    for label in ["", "a\nb", long.as_str()] {
        is(encrypt(&Request { label, ..request(&path) }), |e| {
            matches!(e, EncryptError::BadLabel { .. })
        });
    }
    let small = dir.path().join("small");
    fs::copy(&path, &small).unwrap();
    let made =
        Command::new("mkfs.ext4").args(["-q", "-F", "-L", LABEL]).arg(&small).arg("4M").status();
    assert!(made.unwrap().success());
    truncate(&small, 9 * MIB);
    is(encrypt(&request(&small)), |e| matches!(e, EncryptError::TooSmall { .. }));
}

#[test]
fn two_runs_at_once_do_not_meet() {
    let dir = scratch();
    let path = ext4(dir.path(), 32 * MIB, 12 * MIB, LABEL);
    let mut refused = 0;
    run(&request(&path), &mut |_| {
        let error = encrypt(&request(&path)).unwrap_err();
        refused += u32::from(matches!(error, EncryptError::Locked { .. }));
    })
    .unwrap();
    assert!(refused > 3, "{refused}");
}

#[test]
fn a_new_volume_has_nothing_of_the_old_and_waits_for_its_file_system() {
    for start in ["plain", "empty", "half", "luks"] {
        let dir = scratch();
        let path = ext4(dir.path(), 32 * MIB, 12 * MIB, LABEL);
        let before = fs::read(&path).unwrap();
        match start {
            "empty" => patch(&path, 0, b"", true),
            "half" => patch(&path, 0, b"LUKS\xba\xbe\0\x02", false),
            "luks" => {
                luks_format_with(
                    &path,
                    &["--type", "luks2", "--label", LABEL],
                    b"another machine's",
                );
            }
            _ => {}
        }
        let result = encrypt(&Request { new: start != "empty", ..request(&path) });
        if Path::new("/dev/mapper/control").exists() && result.is_ok() {
            assert!(matches!(probe(&path).unwrap(), State::Encrypted { .. }));
        } else {
            // Without device-mapper the volume cannot be opened to make the file system in it.
            assert!(matches!(result, Err(EncryptError::Cryptsetup { .. })), "{result:?}");
            assert_eq!(probe(&path).unwrap(), State::WithoutFileSystem);
        }
        let header = json(&path);
        assert_eq!(header["digests"]["0"]["iterations"], 1000);
        assert_eq!(header["keyslots"]["0"]["kdf"]["iterations"], 1000);
        assert!(volume_key(&path, 0, PASSPHRASE).is_some());
        let ends = |bytes: &[u8]| {
            [bytes[..MIB as usize].to_vec(), bytes[bytes.len() - MIB as usize..].to_vec()].concat()
        };
        if start == "plain" {
            assert_no_plaintext(&ends(&before), &fs::read(&path).unwrap());
        }
    }
}

/// What `encrypt` is asked is in logs; what it is asked with is not.
#[test]
fn a_request_does_not_show_its_passphrases() {
    let shown = format!(
        "{:?}",
        Request { recovery: Some(b"recovery-secret"), ..request(Path::new("/dev/x")) }
    );
    assert!(
        !shown.contains("0123456789")
            && !shown.contains("48, 49")
            && !shown.contains("recovery-secret"),
        "{shown}"
    );
    assert!(shown.contains("/dev/x"));
}
