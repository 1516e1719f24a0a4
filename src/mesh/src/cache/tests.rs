use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use tempfile::TempDir;

use super::*;
use crate::error::Error;

const BUCKET: &str = "ikto-mesh";

fn key() -> PrivateKey {
    PrivateKey::new(&[7; 32])
}

fn cached(records: u64) -> Cached {
    let entry = |revision| Entry {
        key: format!("peers.{revision}"),
        value: format!("{{\"name\":\"node-{revision}\"}}\u{7f}").into(),
        revision,
    };
    let mut entries: Vec<Entry> = (1..=records).map(entry).collect();
    if let Some(entry) = entries.first_mut() {
        // A registry may hold anything.
        entry.value = Bytes::from_static(b"\0\xff{\"\n");
    }
    let own = "fd10::7/128".parse().ok();
    Cached { incarnation: "2026-01-01T00:00:00Z".into(), own, entries }
}

struct Place {
    path: PathBuf,
    _directory: TempDir,
}

fn place() -> Place {
    let directory = tempfile::tempdir().unwrap();
    Place { path: directory.path().join("mesh-a.json"), _directory: directory }
}

fn loaded(path: &Path) -> Option<Cached> {
    load(path, &key(), BUCKET).unwrap()
}

#[test]
fn what_is_stored_is_loaded() {
    let Place { path, _directory } = place();
    let path = path.with_file_name("deep").join("er.json");
    assert_eq!(loaded(&path), None);
    for cached in [cached(3), Cached::default(), cached(100)] {
        store(&path, &key(), BUCKET, &cached).unwrap();
        assert_eq!(loaded(&path), Some(cached));
    }
    let rights = |path: &Path| fs::metadata(path).unwrap().mode() & 0o7777;
    assert_eq!((rights(&path), rights(path.parent().unwrap())), (0o600, 0o700));
    let names: Vec<_> = fs::read_dir(path.parent().unwrap())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(names, ["er.json"]);
}

#[test]
fn no_key_is_in_it() {
    let bytes = format(&key(), BUCKET, &cached(3)).unwrap();
    for secret in [key().as_bytes().to_vec(), STANDARD.encode(key().as_bytes()).into_bytes()] {
        assert!(!bytes.windows(secret.len()).any(|window| window == secret));
    }
}

#[test]
fn another_key_and_another_bucket_find_nothing() {
    let bytes = format(&key(), BUCKET, &cached(3)).unwrap();
    assert_eq!(parse(&bytes, &key(), BUCKET), Ok(cached(3)));
    let other = PrivateKey::new(&[8; 32]);
    assert_eq!(
        parse(&bytes, &other, BUCKET),
        Err("it was not signed by this node's key, or changed since")
    );
    assert_eq!(parse(&bytes, &key(), "ikto-mesh2"), Err("it is of another bucket"));
}

/// A record's signature by the same key is none of a cache.
#[test]
fn what_was_signed_as_something_else_is_no_cache() {
    let body =
        format(&key(), BUCKET, &cached(1)).unwrap()[MAGIC.len() + SIGNATURE_TEXT + 2..].to_vec();
    let signature = STANDARD.encode(sign("latchkey member record v1", &body, key().as_bytes()));
    let bytes = [MAGIC.as_bytes(), b"\n", signature.as_bytes(), b"\n", &body].concat();
    assert!(parse(&bytes, &key(), BUCKET).is_err());
}

/// Each byte: changed, gone, doubled, and all after it gone.
#[test]
fn a_damaged_file_is_none() {
    let bytes = format(&key(), BUCKET, &cached(2)).unwrap();
    for at in 0..bytes.len() {
        for bit in [0, 3, 7] {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1 << bit;
            assert!(parse(&damaged, &key(), BUCKET).is_err(), "bit {bit} of byte {at}");
        }
        let gone = [&bytes[..at], &bytes[at + 1..]].concat();
        assert!(parse(&gone, &key(), BUCKET).is_err(), "without byte {at}");
        let doubled = [&bytes[..=at], &bytes[at..]].concat();
        assert!(parse(&doubled, &key(), BUCKET).is_err(), "byte {at} twice");
        assert!(parse(&bytes[..at], &key(), BUCKET).is_err(), "cut at {at}");
    }
    for more in [b"\n".as_slice(), b"\0", &bytes] {
        assert!(parse(&[&bytes, more].concat(), &key(), BUCKET).is_err());
        assert!(parse(&[more, &bytes].concat(), &key(), BUCKET).is_err());
    }
}

/// Signed by ourselves and still not what we write: another version of us did.
#[test]
fn what_is_signed_is_looked_at_all_the_same() {
    let signed = |body: &str| {
        let signature = STANDARD.encode(sign(MAGIC, body.as_bytes(), key().as_bytes()));
        parse(format!("{MAGIC}\n{signature}\n{body}").as_bytes(), &key(), BUCKET)
    };
    let good = r#"{"bucket":"ikto-mesh","incarnation":"","own":null,"entries":[]}"#;
    assert_eq!(signed(good), Ok(Cached::default()));
    let entry = |entry: &str| good.replace("[]", &format!("[{entry}]"));
    assert!(signed(&entry(r#"{"key":"k","revision":1,"value":"e30="}"#)).is_ok());
    for body in [
        String::new(),
        "null".into(),
        good.replace("null", "7"),
        good.replace("null", "\"fd10::\""),
        good.replace("\"bucket\":\"ikto-mesh\",", ""),
        good.replace("{\"b", "{\"more\":1,\"b"),
        format!("{good}{good}"),
        entry(r#"{"key":"k","revision":-1,"value":""}"#),
        entry(r#"{"key":"k","revision":1,"value":"e30"}"#),
        entry(r#"{"key":"k","value":""}"#),
    ] {
        assert!(signed(&body).is_err(), "{body}");
    }
    let many = entry(&vec![r#"{"key":"","revision":1,"value":""}"#; MAX_RECORDS + 1].join(","));
    assert_eq!(signed(&many), Err("it has more records than a cache ever has"));
}

#[test]
fn a_huge_file_is_not_read_to_its_end() {
    let Place { path, _directory } = place();
    let file = fs::File::create(&path).unwrap();
    file.set_len(1 << 40).unwrap();
    assert_eq!(loaded(&path), None);
    assert_eq!(file::read(&path).unwrap().unwrap().len(), MAX_FILE + 1);
}

#[test]
fn of_too_many_records_the_oldest_are_kept() {
    let Place { path, _directory } = place();
    let many = MAX_RECORDS as u64 + 5;
    let mut cached = cached(many);
    cached.entries.reverse();
    store(&path, &key(), BUCKET, &cached).unwrap();
    let revisions: Vec<u64> =
        loaded(&path).unwrap().entries.iter().map(|entry| entry.revision).collect();
    assert_eq!(revisions.len(), MAX_RECORDS);
    assert!(revisions.iter().all(|revision| *revision <= many - 5));
}

#[test]
fn what_would_make_the_file_too_long_is_left_out() {
    let entry = |revision| Entry {
        key: format!("peers.{revision}"),
        value: vec![b'x'; 16 * 1024].into(),
        revision,
    };
    let cached = Cached { entries: (1..=4000).rev().map(entry).collect(), ..cached(0) };
    let bytes = format(&key(), BUCKET, &cached).unwrap();
    assert!(bytes.len() <= MAX_FILE, "{}", bytes.len());
    let kept = parse(&bytes, &key(), BUCKET).unwrap().entries;
    assert!(kept.len() > 2000);
    assert!(kept.iter().all(|entry| entry.revision <= kept.len() as u64));
}

/// The rights that a file has say who can read it, not who wrote it; the next one has the right ones.
#[test]
fn wrong_rights_are_put_right() {
    let Place { path, _directory } = place();
    store(&path, &key(), BUCKET, &cached(1)).unwrap();
    let beside = file::beside(&path);
    fs::copy(&path, &beside).unwrap();
    for path in [&path, &beside] {
        fs::set_permissions(path, Permissions::from_mode(0o666)).unwrap();
    }
    assert_eq!(loaded(&path), Some(cached(1)));
    store(&path, &key(), BUCKET, &cached(2)).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
    assert!(!beside.exists());
}

#[test]
fn what_is_no_file_is_neither_read_nor_followed_nor_waited_for() {
    let Place { path, _directory } = place();
    let elsewhere = path.with_file_name("elsewhere");
    store(&elsewhere, &key(), BUCKET, &cached(1)).unwrap();
    symlink(&elsewhere, &path).unwrap();
    assert!(matches!(load(&path, &key(), BUCKET), Err(Error::File { action: "read", .. })));
    // Nor is a link where the new one is to be written.
    symlink(&elsewhere, file::beside(&path)).unwrap();
    store(&path, &key(), BUCKET, &cached(2)).unwrap();
    assert_eq!((loaded(&elsewhere), loaded(&path)), (Some(cached(1)), Some(cached(2))));
    assert!(!fs::symlink_metadata(&path).unwrap().is_symlink());

    fs::remove_file(&path).unwrap();
    mkfifo(&path, Mode::S_IRWXU).unwrap();
    assert!(load(&path, &key(), BUCKET).is_err());
    store(&path, &key(), BUCKET, &cached(3)).unwrap();
    assert_eq!(loaded(&path), Some(cached(3)));

    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    assert!(load(&path, &key(), BUCKET).is_err());
    let error = store(&path, &key(), BUCKET, &cached(3)).unwrap_err();
    assert!(error.to_string().contains("mesh-a.json"), "{error}");
    assert!(!file::beside(&path).exists(), "nothing is left behind");
    assert!(store(Path::new("/proc/latchkey/x"), &key(), BUCKET, &cached(1)).is_err());
}

/// Whoever reads while it is written anew sees one whole file or the other.
#[test]
fn a_reader_sees_all_of_it_or_the_one_before() {
    let Place { path, _directory } = place();
    store(&path, &key(), BUCKET, &cached(1)).unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                let records = loaded(&path).expect("never without").entries.len();
                assert!([1, 300].contains(&records), "{records}");
            }
        });
        for _ in 0..20 {
            store(&path, &key(), BUCKET, &cached(300)).unwrap();
            store(&path, &key(), BUCKET, &cached(1)).unwrap();
        }
        done.store(true, Ordering::Relaxed);
        reader.join().unwrap();
    });
}

/// A write that was cut short: there is a new file, not whole, and the old one.
#[test]
fn a_write_cut_short_leaves_the_old_one() {
    let Place { path, _directory } = place();
    store(&path, &key(), BUCKET, &cached(1)).unwrap();
    let next = format(&key(), BUCKET, &cached(2)).unwrap();
    fs::write(file::beside(&path), &next[..next.len() / 2]).unwrap();
    assert_eq!(loaded(&path), Some(cached(1)));
    store(&path, &key(), BUCKET, &cached(2)).unwrap();
    assert_eq!(loaded(&path), Some(cached(2)));
}
