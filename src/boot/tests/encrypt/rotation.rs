//! A change of the machine's key: whatever write the power goes at, the old passphrase or the new one opens, as `unlock` tries
//! them, and another run comes to the end.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use kcrypt_discovery_challenger::disk::{Volume, read_content};
use kcrypt_discovery_challenger::encrypt::{
    EncryptError, Request, Unlock, begin_rotation, finish_rotation, has_other_key,
};
use kcrypt_discovery_challenger::luks::{self, Origin};
use serde_json::json;

use crate::disk::{LABEL, MIB, PASSPHRASE, ext4, json, scratch, volume_key};
use crate::outcome::{encrypt, request};
use crate::power::{after, points, sample, write};
use crate::trace::{Event, record};

const NEW: &[u8] = b"the-passphrase-that-is-released-from-now-on";
/// In the environment of the traced process: the volume whose key it is to change.
const TRACED_VOLUME: &str = "TRACED_VOLUME";

fn opens(path: &Path, passphrase: &[u8]) -> Option<Vec<u8>> {
    let volume = Volume { device: path.to_owned(), content: read_content(path).unwrap() };
    luks::key(&volume, LABEL, passphrase, Origin::Machine).ok().map(|key| key.to_vec())
}

/// What `rekey` does between having the two passphrases and being done.
fn rotate(path: &Path) -> Result<(), EncryptError> {
    let key = opens(path, PASSPHRASE).or_else(|| opens(path, NEW)).unwrap();
    begin_rotation(path, Unlock::Offline, &key, NEW)?;
    assert_eq!(opens(path, NEW).as_ref(), Some(&key));
    finish_rotation(path, NEW)
}

/// The others start this one as a process of its own, on their volume, to trace what it writes.
#[test]
fn undisturbed() {
    if let Some(volume) = std::env::var_os(TRACED_VOLUME) {
        rotate(Path::new(&volume)).unwrap();
        return;
    }
    let folder = scratch();
    let path = ext4(folder.path(), 24 * MIB, 8 * MIB, LABEL);
    encrypt(&request(&path)).unwrap();
    let (before, key) = (json(&path), volume_key(&path, 0, PASSPHRASE).unwrap());

    begin_rotation(&path, Unlock::Offline, &key, NEW).unwrap();
    let between = json(&path);
    assert_eq!(
        (&between["tokens"]["0"]["keyslots"], &between["tokens"]["0"]["next"]),
        (&json!(["0"]), &json!("2"))
    );
    assert_eq!(between["keyslots"]["2"]["kdf"]["iterations"], 1000, "as cheap as the present one");
    for passphrase in [PASSPHRASE, NEW] {
        assert_eq!(opens(&path, passphrase).as_ref(), Some(&key));
    }
    assert!(!has_other_key(&path).unwrap());
    // The new one has changed once more before it was proven.
    begin_rotation(&path, Unlock::Offline, &key, b"yet another").unwrap();
    assert_eq!((opens(&path, NEW), opens(&path, b"yet another")), (None, Some(key.clone())));
    assert!(matches!(finish_rotation(&path, NEW), Err(EncryptError::WrongPassphrase { .. })));
    begin_rotation(&path, Unlock::Offline, &key, NEW).unwrap();

    finish_rotation(&path, NEW).unwrap();
    assert_eq!((opens(&path, PASSPHRASE), volume_key(&path, 0, NEW)), (None, Some(key)));
    let after = json(&path);
    assert_eq!(after["tokens"], before["tokens"]);
    assert_eq!(after["keyslots"].as_object().unwrap().len(), 1);
    assert_eq!(after["digests"], before["digests"], "the digest stays cheap");
    // Once more changes nothing.
    let content = fs::read(&path).unwrap();
    rotate(&path).unwrap();
    assert!(fs::read(&path).unwrap() == content);
}

#[test]
fn no_power_cut_leaves_a_volume_that_neither_passphrase_opens() {
    let folder = scratch();
    let path = ext4(folder.path(), 24 * MIB, 8 * MIB, LABEL);
    encrypt(&request(&path)).unwrap();
    let (base, key) = (fs::read(&path).unwrap(), volume_key(&path, 0, PASSPHRASE).unwrap());
    let mut traced = Command::new(std::env::current_exe().unwrap());
    traced
        .args(["rotation::undisturbed", "--exact", "--test-threads=1"])
        .env(TRACED_VOLUME, &path)
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let events = record(&mut traced, &path);
    let mut image = base.clone();
    events.iter().for_each(|event| write(&mut image, event, &mut |_| true));
    assert!(image == fs::read(&path).unwrap(), "writes were missed");

    let cut = folder.path().join("cut");
    let (mut old, mut new, mut both) = (0, 0, 0);
    for point in sample(points(&events), 60) {
        fs::write(&cut, after(&base, &events, point)).unwrap();
        let found = (opens(&cut, PASSPHRASE), opens(&cut, NEW));
        match &found {
            (Some(by_old), None) if *by_old == key => old += 1,
            (None, Some(by_new)) if *by_new == key => new += 1,
            (Some(by_old), Some(by_new)) if *by_old == key && *by_new == key => both += 1,
            _ => panic!("{point:?}: neither opens it"),
        }
        rotate(&cut).unwrap_or_else(|error| panic!("{point:?}: {error}"));
        assert_eq!((opens(&cut, PASSPHRASE), volume_key(&cut, 0, NEW)), (None, Some(key.clone())));
        assert_eq!(json(&cut)["keyslots"].as_object().unwrap().len(), 1, "{point:?}");
        assert_eq!(json(&cut)["tokens"]["0"].get("next"), None, "{point:?}");
    }
    let writes = events.iter().filter(|event| **event != Event::Sync).count();
    println!(
        "{writes} writes; after a cut the old one opens {old} times, the new {new}, both {both}"
    );
    assert!(old > 0 && new > 0 && both > 0);
}

#[test]
fn other_keys_stay_and_a_volume_that_kairos_made_gets_its_token() {
    let folder = scratch();
    let path = ext4(folder.path(), 24 * MIB, 8 * MIB, LABEL);
    let recovery = b"cbckbbbk-dbdkebek";
    encrypt(&Request { recovery: Some(recovery), ..request(&path) }).unwrap();
    assert!(has_other_key(&path).unwrap());
    // Taken by somebody: the next free one is taken.
    let key = volume_key(&path, 0, PASSPHRASE).unwrap();
    let removed =
        Command::new("cryptsetup").args(["token", "remove", "--token-id", "0"]).arg(&path).status();
    assert!(removed.unwrap().success());
    rotate(&path).unwrap();
    assert_eq!(volume_key(&path, 0, NEW), Some(key.clone()));
    assert_eq!(volume_key(&path, 1, recovery), Some(key));
    let header = json(&path);
    assert_eq!(header["keyslots"]["0"]["priority"], 2, "preferred, as before");
    assert_eq!(
        (&header["tokens"]["0"]["type"], &header["tokens"]["0"]["keyslots"]),
        (&json!("latchkey"), &json!(["0"]))
    );
}
