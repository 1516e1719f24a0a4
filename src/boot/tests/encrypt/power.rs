//! Power cuts: for each write that `encrypt` and libcryptsetup make, the partition as a cut at that moment leaves it; then a second
//! run, which has to finish with every byte of the file system where it was. And cuts in that second run, too.
//!
//! By default a sample that covers every phase; LATCHKEY_ALL_CUTS=1 takes them all (half an hour).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use kcrypt_discovery_challenger::encrypt::{State, probe};

use crate::disk::{LABEL, MIB, PASSPHRASE, Random, decrypt, ext4, scratch};
use crate::outcome::{encrypt, request};
use crate::trace::{Event, record};

const SECTOR: usize = 512;
const SIZE: u64 = 24 * MIB;
const FILESYSTEM: u64 = 10 * MIB;

/// Not a test: what is traced.
#[test]
#[ignore = "run by the tests of power cuts"]
fn traced() {
    let device = PathBuf::from(std::env::var_os("TRACED_DEVICE").unwrap());
    encrypt(&request(&device)).unwrap();
}

fn trace(device: &Path) -> Vec<Event> {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["power::traced", "--exact", "--ignored", "--test-threads=1"])
        .env("TRACED_DEVICE", device)
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    record(&mut command, device)
}

/// How much of what was written is on the disk when the power goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cut {
    /// All before this event, nothing of it.
    Between,
    /// All before, and some sectors of this write.
    Torn,
    /// All before the last sync, and of what came after, this write included, some sectors: disks write in any order.
    Reordered,
}

#[derive(Debug, Clone, Copy)]
struct Point {
    /// The first event that does not happen whole.
    event: usize,
    cut: Cut,
}

fn points(events: &[Event]) -> Vec<Point> {
    let mut points = Vec::new();
    let mut unsynced = 0;
    for (index, event) in events.iter().enumerate() {
        points.push(Point { event: index, cut: Cut::Between });
        match event {
            Event::Sync => unsynced = 0,
            Event::Write { .. } => {
                points.push(Point { event: index, cut: Cut::Torn });
                if unsynced > 0 {
                    points.push(Point { event: index, cut: Cut::Reordered });
                }
                unsynced += 1;
            }
        }
    }
    points
}

/// The partition after the cut.
fn after(base: &[u8], events: &[Event], point: Point) -> Vec<u8> {
    let mut image = base.to_vec();
    let mut random = Random(point.event as u64 * 3 + point.cut as u64);
    let done = &events[..point.event];
    let certain = match point.cut {
        Cut::Between | Cut::Torn => done.len(),
        Cut::Reordered => {
            done.iter().rposition(|event| *event == Event::Sync).map_or(0, |at| at + 1)
        }
    };
    for event in &done[..certain] {
        write(&mut image, event, &mut |_| true);
    }
    if point.cut != Cut::Between {
        for event in &events[certain..=point.event] {
            // Sometimes nearly all, sometimes nearly nothing.
            let odds = [1, 8, 15][random.below(3)];
            write(&mut image, event, &mut |_| random.below(16) < odds);
        }
    }
    image
}

fn write(image: &mut [u8], event: &Event, takes: &mut dyn FnMut(usize) -> bool) {
    let Event::Write { offset, data } = event else { return };
    for (index, sector) in data.chunks(SECTOR).enumerate() {
        if takes(index) {
            image[offset + index * SECTOR..][..sector.len()].copy_from_slice(sector);
        }
    }
}

/// The second run finishes, and nothing is lost.
fn check(partition: &Path, cut: &[u8], filesystem: &[u8], context: &dyn std::fmt::Debug) -> State {
    fs::write(partition, cut).unwrap();
    let found = match encrypt(&request(partition)) {
        Ok(report) => report.found,
        Err(e) => {
            fs::write("/dev/shm/failed.img", cut).unwrap();
            panic!("{context:?}: {e}")
        }
    };
    assert!(matches!(probe(partition).unwrap(), State::Encrypted { .. }), "{context:?}");
    let data = decrypt(partition, PASSPHRASE);
    assert!(data[..filesystem.len()] == *filesystem, "{context:?} ({found:?}): data lost");
    found
}

fn all() -> bool {
    std::env::var_os("LATCHKEY_ALL_CUTS").is_some()
}

/// About `count` of them, evenly.
fn sample(points: Vec<Point>, count: usize) -> Vec<Point> {
    let step = if all() { 1 } else { points.len().div_ceil(count).max(1) };
    points.into_iter().step_by(step).collect()
}

#[test]
fn no_power_cut_loses_data() {
    let dir = scratch();
    let path = ext4(dir.path(), SIZE, FILESYSTEM, LABEL);
    let base = fs::read(&path).unwrap();
    let filesystem = &base[..FILESYSTEM as usize];
    let events = trace(&path);

    // The trace is complete: played back, it gives what the traced program left.
    let mut image = base.clone();
    for event in &events {
        write(&mut image, event, &mut |_| true);
    }
    assert!(image == fs::read(&path).unwrap(), "writes were missed");

    let points = points(&events);
    let total = points.len();
    let mut found = std::collections::BTreeMap::new();
    let points = sample(points, 60);
    let partition = dir.path().join("cut");
    for point in &points {
        let state = check(&partition, &after(&base, &events, *point), filesystem, point);
        let name = format!("{state:?}").split([' ', '(']).next().unwrap_or_default().to_owned();
        *found.entry(name).or_insert(0) += 1;
    }
    let writes = events.iter().filter(|event| **event != Event::Sync).count();
    println!(
        "{writes} writes, {} syncs, {total} cuts, {} tried: {found:?}",
        events.len() - writes,
        points.len()
    );
    for state in ["Plain", "HalfInstalled", "Encrypting", "Cleaning", "Encrypted"] {
        assert!(found.contains_key(state), "no cut led to {state}");
    }
}
