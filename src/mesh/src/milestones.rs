//! When this boot's mesh came up: device, registry, first handshake, in milliseconds since the kernel started
//! (CLOCK_BOOTTIME), in `/run/latchkey/agent/milestones.json`. `latchkey status --boot` shows them after the steps of
//! the initramfs.
//!
//! They belong to the boot, not to one run of the agent: what was reached once stays, so an agent that is started again
//! finds what the first one wrote (`RuntimeDirectoryPreserve=` in latchkey.service). Nothing depends on them: where they
//! cannot be written, the agent says so once and goes on.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// Where latchkey.service has them.
pub const DIRECTORY: &str = "/run/latchkey/agent";

const FILE: &str = "milestones.json";

const VERSION: u64 = 1;

/// Longest file read, in bytes.
const MAX_FILE: u64 = 4096;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Milestone {
    /// The device has its key and its address, and is up.
    DeviceUp,
    /// The own record is in the registry, and the others' are on the device.
    Joined,
    /// With whichever peer was first.
    FirstHandshake,
}

/// What was reached in this boot, each in milliseconds since the kernel started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Reached {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_up_ms: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub joined_ms: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_handshake_ms: Option<u64>,
}

/// Unknown fields are ignored: a later version may have more milestones.
#[derive(Serialize, Deserialize)]
struct File {
    version: u64,
    #[serde(flatten)]
    reached: Reached,
}

/// The milestones of this boot, and where they are kept.
#[derive(Debug)]
pub struct Milestones {
    directory: PathBuf,
    reached: Reached,
}

impl Reached {
    pub fn get(&self, milestone: Milestone) -> Option<u64> {
        match milestone {
            Milestone::DeviceUp => self.device_up_ms,
            Milestone::Joined => self.joined_ms,
            Milestone::FirstHandshake => self.first_handshake_ms,
        }
    }

    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// In the order of [`Milestone`], with their names in the timeline's form.
    pub fn steps(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let all = [
            ("device-up", self.device_up_ms),
            ("joined", self.joined_ms),
            ("first-handshake", self.first_handshake_ms),
        ];
        all.into_iter().filter_map(|(name, at_ms)| Some((name, at_ms?)))
    }

    fn slot(&mut self, milestone: Milestone) -> &mut Option<u64> {
        match milestone {
            Milestone::DeviceUp => &mut self.device_up_ms,
            Milestone::Joined => &mut self.joined_ms,
            Milestone::FirstHandshake => &mut self.first_handshake_ms,
        }
    }
}

impl Milestones {
    /// With what an earlier agent of this boot has reached. A file that cannot be read is none, said in the log.
    pub fn at(directory: impl Into<PathBuf>) -> Self {
        let directory = directory.into();
        let reached = read(&directory);
        Self { directory, reached }
    }

    /// For an agent that is not the machine's own: nothing is kept.
    pub fn of_no_boot() -> Self {
        Self { directory: PathBuf::new(), reached: Reached::default() }
    }

    pub fn reached_so_far(&self) -> Reached {
        self.reached
    }

    /// Notes that a milestone is reached now, unless it was before. When it was.
    pub fn reached(&mut self, milestone: Milestone) -> u64 {
        self.note(milestone, since_kernel_start())
    }

    /// The same for what happened at `when` and is noticed only now, as handshakes are. When the clock was set in between,
    /// that may be off: it is never before the device was up, nor in the future.
    pub fn reached_at(&mut self, milestone: Milestone, when: SystemTime) -> u64 {
        let ago = SystemTime::now().duration_since(when).unwrap_or_default();
        let at = since_kernel_start().saturating_sub(ago);
        let up = Duration::from_millis(self.reached.device_up_ms.unwrap_or_default());
        self.note(milestone, at.max(up))
    }

    fn note(&mut self, milestone: Milestone, at: Duration) -> u64 {
        let slot = self.reached.slot(milestone);
        if let Some(before) = *slot {
            return before;
        }
        let at_ms = at.as_millis() as u64;
        *slot = Some(at_ms);
        if let Err(error) = self.write() {
            log::warn!(
                "`latchkey status --boot` will not show the mesh: cannot write {}: {error}",
                self.directory.join(FILE).display()
            );
        }
        at_ms
    }

    /// Written beside and renamed, so that a reader sees all of it or none. Without the hand-over's directory around it
    /// (an agent that runs by hand, with a file of its own) nobody would look for it, and nothing is written.
    fn write(&self) -> io::Result<()> {
        if self.directory.as_os_str().is_empty() {
            return Ok(());
        }
        match DirBuilder::new().mode(0o700).create(&self.directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            Ok(()) | Err(_) => {}
        }
        let path = self.directory.join(FILE);
        let new = path.with_extension("new");
        let json = serde_json::to_vec(&File { version: VERSION, reached: self.reached })?;
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600);
        options.open(&new)?.write_all(&json)?;
        fs::rename(&new, &path)
    }
}

/// What this boot's agent has reached; nothing where there is no file, or none that can be understood.
pub fn read(directory: &Path) -> Reached {
    let path = directory.join(FILE);
    match read_file(&path) {
        Ok(reached) => reached,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Reached::default(),
        Err(error) => {
            log::warn!("cannot read {}: {error}", path.display());
            Reached::default()
        }
    }
}

fn read_file(path: &Path) -> io::Result<Reached> {
    let mut json = Vec::new();
    // One that is longer is cut, and then no JSON.
    fs::File::open(path)?.take(MAX_FILE).read_to_end(&mut json)?;
    let file: File = serde_json::from_slice(&json)?;
    if file.version != VERSION {
        let other = format!("it is of version {}, known is {VERSION}", file.version);
        return Err(io::Error::new(io::ErrorKind::InvalidData, other));
    }
    Ok(file.reached)
}

fn since_kernel_start() -> Duration {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const ALL: [Milestone; 3] = [Milestone::DeviceUp, Milestone::Joined, Milestone::FirstHandshake];

    fn directory() -> (tempfile::TempDir, PathBuf) {
        let parent = tempfile::tempdir().unwrap();
        let directory = parent.path().join("agent");
        (parent, directory)
    }

    #[test]
    fn only_the_first_time_counts_and_an_agent_started_again_knows_it() {
        let (_parent, directory) = directory();
        let mut first = Milestones::at(&directory);
        assert!(first.reached_so_far().is_empty());
        let at = ALL.map(|milestone| first.reached(milestone));
        assert!(at[0] > 0 && at.is_sorted(), "{at:?}");

        let mut again = Milestones::at(&directory);
        assert_eq!(again.reached_so_far(), first.reached_so_far());
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(ALL.map(|milestone| again.reached(milestone)), at);
        assert_eq!(ALL.map(|milestone| read(&directory).get(milestone)), at.map(Some));
    }

    #[test]
    fn what_is_noticed_late_has_its_own_time() {
        let (_parent, directory) = directory();
        let mut milestones = Milestones::at(&directory);
        let now = SystemTime::now();
        let late = milestones.reached_at(Milestone::Joined, now - Duration::from_secs(2));
        let up = milestones.reached(Milestone::DeviceUp);
        assert!((1_900..=30_000).contains(&(up - late)), "{late} {up}");
        // The clock was set: neither the future nor a time before the device can be right.
        for when in [now - Duration::from_secs(1 << 30), now + Duration::from_secs(1 << 30)] {
            let mut milestones = Milestones::at(&directory);
            let at = milestones.reached_at(Milestone::FirstHandshake, when);
            assert!(at >= up && at <= since_kernel_start().as_millis() as u64);
            fs::write(directory.join(FILE), format!(r#"{{"version":1,"device_up_ms":{up}}}"#))
                .unwrap();
        }
    }

    #[test]
    fn the_file_is_whole_small_and_root_only() {
        let (_parent, directory) = directory();
        let mut milestones = Milestones::at(&directory);
        let at = milestones.reached(Milestone::DeviceUp);
        let text = fs::read_to_string(directory.join(FILE)).unwrap();
        assert_eq!(text, format!(r#"{{"version":1,"device_up_ms":{at}}}"#));
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&directory), mode(&directory.join(FILE))), (0o700, 0o600));
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 1, "nothing is left beside it");
    }

    #[test]
    fn a_file_that_cannot_be_understood_is_none_and_is_written_anew() {
        let long = format!(r#"{{"version":1,"device_up_ms":5,"x":"{}"}}"#, "x".repeat(5000));
        for bad in ["", "{", r#"{"version":2,"device_up_ms":5}"#, r#"{"device_up_ms":5}"#, &long] {
            let (_parent, directory) = directory();
            fs::create_dir(&directory).unwrap();
            fs::write(directory.join(FILE), bad).unwrap();
            let mut milestones = Milestones::at(&directory);
            assert!(milestones.reached_so_far().is_empty(), "{bad:?}");
            let at = milestones.reached(Milestone::Joined);
            assert_eq!(read(&directory).joined_ms, Some(at), "{bad:?}");
        }
        let later = r#"{"version":1,"joined_ms":7,"first_byte_ms":9}"#;
        assert_eq!(serde_json::from_str::<File>(later).unwrap().reached.joined_ms, Some(7));
    }

    #[test]
    fn without_a_place_they_are_known_to_this_agent_alone() {
        let (parent, directory) = directory();
        let mut milestones = Milestones::at(directory.join("deeper"));
        let at = milestones.reached(Milestone::Joined);
        assert_eq!(milestones.reached(Milestone::Joined), at);
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 0);
    }
}
