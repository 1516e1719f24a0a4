//! Searches the booted machine for secrets that should be nowhere to be read: every file below /run (credentials too) and
//! of the agent's on the disk, the environment and arguments of every process, and the journal.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use base64::{Engine, engine::general_purpose::STANDARD};
use latchkey_tests::report::{Fingerprint, LeakScan, SECRET_TAG};

/// Files of more than this are not read: there are none that large below /run but the journal's.
const MAX_FILE: u64 = 64 << 20;
/// Where programs of ours may write.
const SEARCHED: [&str; 2] = ["/run", "/var/lib/latchkey"];
/// Where the planted secret lies while the search runs.
const PLANTED: &str = "/run/latchkey-test-planted";
/// The firmware's tables; the harness's secrets are strings of type 11 in it.
const DMI: &str = "/sys/firmware/dmi/tables/DMI";

/// What is searched for, in one form.
struct Needle {
    kind: &'static str,
    form: &'static str,
    bytes: Vec<u8>,
}

/// `by_itself`: whether the machine got its passphrase by itself, so that it may be asked for again.
pub(crate) fn scan(interface: &str, by_itself: bool) -> LeakScan {
    let mut secrets: Vec<(&'static str, Vec<u8>)> = Vec::new();
    secrets.extend(wireguard_key(interface).map(|k| ("WireGuard private key", k)));
    if by_itself {
        secrets.extend(passphrase().map(|p| ("passphrase", p)));
    }
    secrets.extend(given().into_iter().map(|g| ("given secret", g)));
    let mut planted = [0; 32];
    let plantable = getrandom::fill(&mut planted).is_ok()
        && fs::write(PLANTED, STANDARD.encode(planted)).is_ok();
    if plantable {
        secrets.push(("planted", planted.to_vec()));
    }
    let needles: Vec<Needle> =
        secrets.iter().flat_map(|(kind, secret)| forms(kind, secret)).collect();

    let mut result = LeakScan {
        secrets: secrets.iter().map(|(kind, _)| (*kind).to_owned()).collect(),
        ..LeakScan::default()
    };
    let shown = needles.iter().filter(|n| n.kind != "planted");
    result.fingerprints = shown.map(|n| Fingerprint::of(n.kind, n.form, &n.bytes)).collect();
    for path in SEARCHED.iter().flat_map(|folder| files_below(Path::new(folder))) {
        if let Ok(bytes) = fs::read(&path) {
            result.files += 1;
            search(&needles, &bytes, &path.display().to_string(), &mut result.found);
        }
    }
    for process in processes() {
        result.processes += 1;
        for name in ["environ", "cmdline"] {
            let path = process.join(name);
            if let Ok(bytes) = fs::read(&path) {
                search(&needles, &bytes, &path.display().to_string(), &mut result.found);
            }
        }
    }
    // Long fields are compressed in the journal's files, so it is read by its own program too.
    if let Ok(journal) =
        Command::new("journalctl").args(["--no-pager", "--all", "--output=export"]).output()
    {
        result.journal_bytes = journal.stdout.len();
        search(&needles, &journal.stdout, "the journal", &mut result.found);
    }
    let _ = fs::remove_file(PLANTED);
    let found = result.found.len();
    result.found.retain(|f| !(f.starts_with("planted ") && f.ends_with(PLANTED)));
    result.planted_found = result.found.len() < found;
    result
}

/// The secret as its bytes, in base64 and in hex. A secret that is text is searched for as that text.
fn forms(kind: &'static str, secret: &[u8]) -> [Needle; 4] {
    let hex: String = secret.iter().map(|b| format!("{b:02x}")).collect();
    [
        Needle { kind, form: "raw bytes", bytes: secret.to_vec() },
        Needle {
            kind,
            form: "base64",
            bytes: STANDARD.encode(secret).trim_end_matches('=').as_bytes().to_vec(),
        },
        Needle { kind, form: "hex", bytes: hex.clone().into_bytes() },
        Needle { kind, form: "upper-case hex", bytes: hex.to_uppercase().into_bytes() },
    ]
}

fn search(needles: &[Needle], hay: &[u8], place: &str, found: &mut Vec<String>) {
    for n in needles {
        if contains(hay, &n.bytes) {
            found.push(format!("{} as {} in {place}", n.kind, n.form));
        }
    }
}

fn contains(hay: &[u8], needle: &[u8]) -> bool {
    let Some((first, rest)) = needle.split_first() else { return false };
    let mut left = hay;
    while let Some(at) = left.iter().position(|b| b == first) {
        left = left.get(at + 1..).unwrap_or_default();
        if left.starts_with(rest) {
            return true;
        }
    }
    false
}

/// Regular files, links not followed.
fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut all = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let Ok(kind) = entry.file_type() else { continue };
        if kind.is_dir() {
            all.extend(files_below(&entry.path()));
        } else if kind.is_file() && entry.metadata().is_ok_and(|m| m.len() <= MAX_FILE) {
            all.push(entry.path());
        }
    }
    all
}

fn processes() -> Vec<PathBuf> {
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter(|e| e.file_name().to_string_lossy().bytes().all(|b| b.is_ascii_digit()))
        .map(|e| e.path())
        .collect()
}

fn wireguard_key(interface: &str) -> Option<Vec<u8>> {
    let output = Command::new("wg").args(["show", interface, "private-key"]).output().ok()?;
    STANDARD.decode(output.stdout.trim_ascii()).ok().filter(|k| k.len() == 32)
}

/// What opens the volume, asked for in the way a boot asks.
fn passphrase() -> Option<Vec<u8>> {
    let output = Command::new("kcrypt-discovery-challenger")
        .args(["get", "--partition-label", "COS_PERSISTENT"])
        .output()
        .ok()?;
    (output.status.success() && output.stdout.len() >= 8)
        .then(|| output.stdout.trim_ascii_end().to_vec())
}

/// The secrets that the harness gave, from the firmware's tables. The first string of a structure follows its header
/// without a separator, so the tag may stand anywhere in a part.
fn given() -> Vec<Vec<u8>> {
    let table = fs::read(DMI).unwrap_or_default();
    let tag = SECRET_TAG.as_bytes();
    table
        .split(|&b| b == 0)
        .filter_map(|s| {
            s.windows(tag.len()).position(|w| w == tag).and_then(|at| s.get(at + tag.len()..))
        })
        .map(|hex| {
            hex.chunks_exact(2)
                .filter_map(|p| u8::from_str_radix(std::str::from_utf8(p).ok()?, 16).ok())
                .collect()
        })
        .collect()
}
