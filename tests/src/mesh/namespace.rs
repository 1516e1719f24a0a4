//! A host without a machine: namespaces for its network, its files below `/run` and `/var/lib`, and its processes.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sched::{CloneFlags, setns},
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    child::Running,
    error::{Doing, Error, Result},
    place,
    transcript::{Line, Transcript},
};

/// Sockets of wireguard-go are named by interface only, and the agent's files by device: each host has its own.
const SET_UP: &str = "set -e
    ip link set lo up
    for hidden in /run /var/lib; do mount -t tmpfs -o mode=755 none $hidden; done
    mkdir -m 700 /run/latchkey /var/lib/latchkey
    echo 1 >/proc/sys/net/ipv4/ip_forward
    echo 1 >/proc/sys/net/ipv6/conf/all/forwarding
    echo ready
    exec sleep infinity";

/// The namespaces. Whatever runs in them ends when this is dropped, daemons included, and when the test is killed.
#[derive(Debug)]
pub struct Namespace {
    /// The first process in there, as seen from here.
    first: u32,
    _holder: Running,
}

impl Namespace {
    pub fn new() -> Result<Self> {
        let mut command = Command::new("unshare");
        command.args(["--net", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", SET_UP]);
        let (holder, pipes) = Running::start(&command, |c| {
            c.stdin(Stdio::null()).stdout(Stdio::piped());
        })?;
        let mut said = String::new();
        if let Some(stdout) = pipes.stdout {
            BufReader::new(stdout).read_line(&mut said).doing(|| "make a namespace".into())?;
        }
        if said != "ready\n" {
            return Err(Error::Setup("no namespaces could be made; that takes root".into()));
        }
        Ok(Self { first: child_of(holder.id())?, _holder: holder })
    }

    /// A tool that ends by itself. It sees the host's network and files, and the processes of all hosts.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        self.enter(&["--net", "--mount"], program)
    }

    /// A program that goes into the background. It ends with the host.
    pub fn daemon(&self, program: impl AsRef<OsStr>) -> Command {
        self.enter(&["--net", "--mount", "--pid"], program)
    }

    fn enter(&self, namespaces: &[&str], program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--target={}", self.first)).args(namespaces).arg("--").arg(program);
        command
    }

    /// Process id of the holder, for `ip link … netns`.
    pub fn id(&self) -> u32 {
        self.first
    }

    /// Calls `open` where it finds the host's addresses: the sockets that it makes are in the host.
    pub fn within<T: Send>(&self, open: impl FnOnce() -> T + Send) -> Result<T> {
        let path = PathBuf::from(format!("/proc/{}/ns/net", self.first));
        let namespace = File::open(&path).doing(|| format!("open {}", path.display()))?;
        let enter = || {
            setns(&namespace, CloneFlags::CLONE_NEWNET)
                .map_err(std::io::Error::from)
                .doing(|| "enter a network namespace".into())
        };
        // A namespace belongs to a thread, and this one is not to stay there.
        thread::scope(|scope| scope.spawn(|| enter().map(|()| open())).join())
            .unwrap_or_else(|_| Err(Error::Setup("a thread in a namespace panicked".into())))
    }

    /// Process ids of the running programs of this name, oldest first.
    pub fn processes(&self, name: &str) -> Result<Vec<u32>> {
        let own = fs::read_link(format!("/proc/{}/ns/pid", self.first))
            .doing(|| "look at a namespace".into())?;
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").doing(|| "list processes".into())?.flatten() {
            let Some(id) = entry.file_name().to_str().and_then(|n| n.parse::<u32>().ok()) else {
                continue;
            };
            // What ends meanwhile is not running, nor is what has ended, its last thread too, and waits for its parent to look.
            let path = entry.path();
            let here = fs::read_link(path.join("ns/pid")).is_ok_and(|theirs| theirs == own);
            let stat = fs::read_to_string(path.join("stat")).unwrap_or_default();
            let is_program =
                stat.split_once(" (").and_then(|(_, rest)| rest.rsplit_once(") ")).is_some_and(
                    |(comm, state)| comm == name && (!state.starts_with('Z') || threads(&path) > 1),
                );
            if here && is_program {
                found.push(id);
            }
        }
        found.sort_unstable();
        Ok(found)
    }
}

/// A daemon in a host.
#[derive(Debug)]
pub struct Daemon {
    running: Running,
    id: u32,
    said: Transcript,
}

impl Daemon {
    /// Starts `command`, whose program, arguments and environment are taken; its output goes to `target/boot-logs/LOG.log`.
    pub fn start(host: &Namespace, who: &str, log: &str, command: &Command) -> Result<Self> {
        // Both outputs in one, in their order.
        let mut inside = host.daemon("sh");
        inside.args(["-c", "exec \"$@\" 2>&1", "sh"]);
        inside.arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            if let Some(value) = value {
                inside.env(name, value);
            }
        }
        let log = place::log_file(log)?;
        let log = File::create(&log).doing(|| format!("create {}", log.display()))?;
        let (running, pipes) = Running::start(&inside, |c| {
            c.stdin(Stdio::null()).stdout(Stdio::piped());
        })?;
        let output =
            pipes.stdout.ok_or_else(|| Error::Setup(format!("{who} has no standard output")))?;
        let said = Transcript::follow(who, output, log, Instant::now());
        // nsenter's child is the program: only children are in the other namespace of processes.
        let id = child_of(running.id())?;
        Ok(Self { running, id, said })
    }

    pub fn id(&self) -> u32 {
        self.id
    }

    pub fn said(&self) -> &Transcript {
        &self.said
    }

    pub fn wait_for(&self, pattern: &str) -> Result<Line> {
        self.said.wait_for(pattern, super::PATIENCE)
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(pid(self.id), signal)
            .map_err(std::io::Error::from)
            .doing(|| format!("send {signal} to process {}", self.id))
    }

    /// Waits until it has ended by itself or by a signal; its exit code, if it was not a signal.
    pub fn wait_for_end(&mut self) -> Result<Option<i32>> {
        let timeout = super::PATIENCE;
        let ended = self.running.status_within(timeout)?;
        let tail = || self.said.tail();
        let still = || Error::StillRunning {
            who: "a daemon".into(),
            seconds: timeout.as_secs(),
            tail: tail(),
        };
        // The rest of what it said is still on its way.
        let _ = self.said.wait_for_end(Duration::from_secs(2));
        ended.map(|status| status.code()).ok_or_else(still)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // nsenter ends when its child does. As long as it runs the id is that child's.
        if matches!(self.running.status_within(Duration::ZERO), Ok(None)) {
            let _ = kill(pid(self.id), Signal::SIGKILL);
            let _ = self.running.status_within(Duration::from_secs(5));
        }
    }
}

pub(super) fn pid(id: u32) -> Pid {
    Pid::from_raw(i32::try_from(id).unwrap_or(i32::MAX))
}

fn threads(process: &Path) -> usize {
    fs::read_dir(process.join("task")).map_or(0, |tasks| tasks.count())
}

/// The only child of a process, as soon as it has one.
fn child_of(parent: u32) -> Result<u32> {
    let path = format!("/proc/{parent}/task/{parent}/children");
    let deadline = Instant::now() + super::PATIENCE;
    while Instant::now() < deadline {
        let children = fs::read_to_string(&path).doing(|| format!("read {path}"))?;
        if let Some(child) = children.split_whitespace().next().and_then(|c| c.parse().ok()) {
            return Ok(child);
        }
        thread::sleep(Duration::from_millis(5));
    }
    Err(Error::Setup(format!("process {parent} starts nothing")))
}
