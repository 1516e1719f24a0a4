//! Power cuts: for each write that `encrypt` and libcryptsetup make, the partition as a cut at that moment leaves it; then a second
//! run, which has to finish with every byte of the file system where it was. And cuts in that second run, too.
//!
//! By default a sample that covers every phase; LATCHKEY_ALL_CUTS=1 takes them all (half an hour).

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use kcrypt_discovery_challenger::encrypt::{EncryptError, Request, State, probe};
use serde_json::json;
use tempfile::TempDir;

use crate::disk::{LABEL, MIB, PASSPHRASE, Random, decrypt, ext4, json, scratch};
use crate::outcome::{encrypt, request};
use crate::trace::{Event, record};

/// In the environment of the traced process: the device it is to encrypt.
const TRACED_DEVICE: &str = "TRACED_DEVICE";
const SECTOR: usize = 512;
const SIZE: u64 = 24 * MIB;
const FILESYSTEM: u64 = 10 * MIB;

/// A run that nothing cuts short comes to its end. The others start this one as a process of its own, on their device, to
/// trace what it writes.
#[test]
fn undisturbed() {
    if let Some(device) = std::env::var_os(TRACED_DEVICE) {
        encrypt(&request(Path::new(&device))).unwrap();
        return;
    }
    let folder = scratch();
    let device = ext4(folder.path(), SIZE, FILESYSTEM, LABEL);
    encrypt(&request(&device)).unwrap();
    assert!(matches!(probe(&device), Ok(State::Encrypted { .. })));
}

fn trace(device: &Path) -> Vec<Event> {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["power::undisturbed", "--exact", "--test-threads=1"])
        .env(TRACED_DEVICE, device)
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    record(&mut command, device)
}

/// How much of what was written is on the disk when the power goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cut {
    /// All before this event, nothing of it.
    Between,
    /// All before, and some sectors of this write.
    Torn,
    /// All before the last sync, and of what came after, this write included, some sectors: disks write in any order.
    Reordered,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Point {
    /// The first event that does not happen whole.
    pub(crate) event: usize,
    pub(crate) cut: Cut,
}

pub(crate) fn points(events: &[Event]) -> Vec<Point> {
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
pub(crate) fn after(base: &[u8], events: &[Event], point: Point) -> Vec<u8> {
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

pub(crate) fn write(image: &mut [u8], event: &Event, takes: &mut dyn FnMut(usize) -> bool) {
    let Event::Write { offset, data } = event else { return };
    for (index, sector) in data.chunks(SECTOR).enumerate() {
        if takes(index) {
            image[offset + index * SECTOR..][..sector.len()].copy_from_slice(sector);
        }
    }
}

/// The next run finishes, and nothing is lost.
fn check(partition: &Path, cut: &[u8], filesystem: &[u8], context: &dyn std::fmt::Debug) -> State {
    fs::write(partition, cut).unwrap();
    let found = match encrypt(&request(partition)) {
        Ok(report) => report.found,
        Err(e) => panic!("{context:?}: {e}"),
    };
    assert!(matches!(probe(partition).unwrap(), State::Encrypted { .. }), "{context:?}");
    let data = decrypt(partition, PASSPHRASE, filesystem.len());
    assert!(data == filesystem, "{context:?} ({found:?}): data lost");
    // As after an undisturbed run: one keyslot, nothing left to do.
    let header = json(partition);
    assert_eq!(header["keyslots"].as_object().unwrap().len(), 1, "{context:?}");
    assert_eq!(header["digests"].as_object().unwrap().len(), 1, "{context:?}");
    assert_eq!(header["config"].get("requirements"), None, "{context:?}");
    assert_eq!(header["tokens"]["0"].get("unfinished"), None, "{context:?}");
    found
}

fn all() -> bool {
    std::env::var_os("LATCHKEY_ALL_CUTS").is_some()
}

/// About `count` of them, evenly.
pub(crate) fn sample(points: Vec<Point>, count: usize) -> Vec<Point> {
    let step = if all() { 1 } else { points.len().div_ceil(count).max(1) };
    points.into_iter().step_by(step).collect()
}

/// A partition, and what a run on it does.
struct Run {
    dir: TempDir,
    base: Vec<u8>,
    events: Vec<Event>,
}

impl Run {
    fn new() -> Self {
        let dir = scratch();
        let path = ext4(dir.path(), SIZE, FILESYSTEM, LABEL);
        let base = fs::read(&path).unwrap();
        let events = run_on(&path, &base);
        Self { dir, base, events }
    }

    fn filesystem(&self) -> &[u8] {
        &self.base[..FILESYSTEM as usize]
    }

    fn partition(&self) -> PathBuf {
        self.dir.path().join("cut")
    }

    fn cut(&self, point: Point) -> Vec<u8> {
        after(&self.base, &self.events, point)
    }

    /// The first cut that leaves such a partition, and the partition.
    fn first(&self, such: impl Fn(&Path) -> bool) -> (Point, Vec<u8>) {
        let found = points(&self.events).into_iter().find_map(|point| {
            let cut = self.cut(point);
            fs::write(self.partition(), &cut).unwrap();
            such(&self.partition()).then_some((point, cut))
        });
        found.unwrap()
    }
}

/// What a run on this partition does. Looking at a partition is not free of writes (libcryptsetup repairs a header by its other
/// copy), so it is laid anew.
fn run_on(path: &Path, base: &[u8]) -> Vec<Event> {
    fs::write(path, base).unwrap();
    let events = trace(path);
    // The trace is complete: played back, it gives what the traced program left.
    let mut image = base.to_vec();
    for event in &events {
        write(&mut image, event, &mut |_| true);
    }
    assert!(image == fs::read(path).unwrap(), "writes were missed");
    events
}

fn is(partition: &Path, state: &State) -> bool {
    probe(partition).unwrap() == *state
}

/// The number of the segment that is being encrypted.
fn hot_segment(partition: &Path) -> Option<String> {
    if !is(partition, &State::Encrypting) {
        return None;
    }
    let header = json(partition);
    let segments = header["segments"].as_object().unwrap();
    let hot = segments.iter().find(|(_, segment)| segment["flags"] == json!(["in-reencryption"]));
    hot.map(|(number, _)| number.clone())
}

#[test]
fn no_power_cut_loses_data() {
    let run = Run::new();
    let points = points(&run.events);
    let total = points.len();
    let mut found = BTreeMap::new();
    let points = sample(points, 40);
    for point in &points {
        let state = check(&run.partition(), &run.cut(*point), run.filesystem(), point);
        let name = format!("{state:?}").split([' ', '(']).next().unwrap_or_default().to_owned();
        *found.entry(name).or_insert(0) += 1;
    }
    let writes = run.events.iter().filter(|event| **event != Event::Sync).count();
    let (syncs, tried) = (run.events.len() - writes, points.len());
    println!("{writes} writes, {syncs} syncs, {total} cuts, {tried} tried: {found:?}");
    for state in ["Plain", "HalfInstalled", "Encrypting", "Cleaning", "Encrypted"] {
        assert!(found.contains_key(state), "no cut led to {state}");
    }
}

#[test]
fn no_power_cut_in_the_run_after_a_power_cut_loses_data() {
    let run = Run::new();
    let moved = |partition: &Path| hot_segment(partition).as_deref() == Some("0");
    let firsts = [
        run.first(|partition| is(partition, &State::HalfInstalled)),
        run.first(|partition| hot_segment(partition).is_some()),
        // The last zone, whose source libcryptsetup wipes before it has written that it needs it no more.
        run.first(moved),
        run.first(|partition| is(partition, &State::Cleaning)),
    ];
    for (first, cut) in firsts {
        let partition = run.dir.path().join("again");
        fs::write(&partition, &cut).unwrap();
        let last_zone = moved(&partition);
        let events = run_on(&partition, &cut);
        let points = points(&events);
        let total = points.len();
        let points = sample(points, if last_zone { 24 } else { 6 });
        let tried = points.len();
        for second in points {
            let twice = after(&cut, &events, second);
            check(&run.partition(), &twice, run.filesystem(), &(first, second));
        }
        println!("after {first:?}: {total} cuts, {tried} tried");
    }
}

#[test]
fn a_volume_that_was_used_between_two_runs_keeps_what_was_written() {
    let run = Run::new();
    // Something is written to the beginning of the file system, which at that time is where it was moved to.
    let (_, mut cut) = run.first(|partition| hot_segment(partition).is_some());
    fs::write(run.partition(), &cut).unwrap();
    let header = json(&run.partition());
    let moved = header["segments"].as_object().unwrap().values();
    let moved = moved.into_iter().find(|s| s["flags"] == json!(["backup-moved-segment"])).unwrap();
    let moved: usize = moved["offset"].as_str().unwrap().parse().unwrap();
    let mut filesystem = run.filesystem().to_vec();
    for at in [0, 5000, 3 << 20] {
        cut[moved + at] ^= 0xff;
        filesystem[at] ^= 0xff;
    }
    // The run after that is interrupted, too: in the last zone, and while that is recovered.
    let partition = run.dir.path().join("again");
    let events = run_on(&partition, &cut);
    let second = points(&events).into_iter().find_map(|point| {
        let twice = after(&cut, &events, point);
        fs::write(&partition, &twice).unwrap();
        (hot_segment(&partition).as_deref() == Some("0")).then_some(twice)
    });
    let second = second.unwrap();
    let events = run_on(&partition, &second);
    for third in sample(points(&events), 6) {
        let thrice = after(&second, &events, third);
        check(&run.partition(), &thrice, &filesystem, &third);
    }
}

#[test]
fn what_was_written_over_the_copy_since_is_not_wiped() {
    let run = Run::new();
    let (_, mut cut) = run.first(|partition| is(partition, &State::Cleaning));
    fs::write(run.partition(), &cut).unwrap();
    let copy =
        json(&run.partition())["tokens"]["0"]["unfinished"]["copy"].as_str().unwrap().to_owned();
    // The file system was made larger and has used a piece of it.
    let used = copy.parse::<usize>().unwrap() + (2 << 20) + 4096;
    let data = run.base[..8192].iter().map(|byte| byte ^ 0x5a).collect::<Vec<u8>>();
    cut[used..][..data.len()].copy_from_slice(&data);
    check(&run.partition(), &cut, run.filesystem(), &"used");
    assert!(fs::read(run.partition()).unwrap()[used..][..data.len()] == data);
}

#[test]
fn with_another_passphrase_nothing_goes_on_and_nothing_is_lost() {
    let run = Run::new();
    for state in [State::Encrypting, State::Cleaning] {
        let (point, cut) = run.first(|partition| is(partition, &state));
        fs::write(run.partition(), &cut).unwrap();
        let partition = run.partition();
        let other = Request { passphrase: b"of another machine", ..request(&partition) };
        assert!(matches!(encrypt(&other), Err(EncryptError::WrongPassphrase { .. })), "{state:?}");
        check(&partition, &fs::read(&partition).unwrap(), run.filesystem(), &point);
    }
    // Half installed: the file system is restored first, so that any passphrase can begin anew.
    let (_, cut) = run.first(|partition| is(partition, &State::HalfInstalled));
    fs::write(run.partition(), &cut).unwrap();
    let partition = run.partition();
    let other = Request { passphrase: b"of another machine", ..request(&partition) };
    assert_eq!(encrypt(&other).unwrap().found, State::HalfInstalled);
    assert!(decrypt(&partition, other.passphrase, FILESYSTEM as usize) == run.filesystem());
}

#[test]
fn a_file_system_that_was_changed_after_a_cut_is_encrypted_as_it_is_then() {
    // The record is on the disk, and the header's first sector is not: the file system can be mounted, and was.
    let run = Run::new();
    let header = run.events.iter().position(
        |event| matches!(event, Event::Write { offset: 0, data } if data.starts_with(b"LUKS")),
    );
    let mut cut = run.cut(Point { event: header.unwrap(), cut: Cut::Between });
    let mut filesystem = run.filesystem().to_vec();
    for at in [4096, 1 << 20, 9 << 20] {
        cut[at] ^= 0xff;
        filesystem[at] ^= 0xff;
    }
    let found = check(&run.partition(), &cut, &filesystem, &"changed");
    assert!(matches!(found, State::Plain(_)), "{found:?}");
}
