//! Runs in the booted test machine, once, after latchkey.service: prints `REPORT {json}`, which
//! [`latchkey_tests::report::Report`] describes, on the console.

#[path = "guest_report/leak.rs"]
mod leak;

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use latchkey_tests::report::{Milestones, Persistent, Report, WireGuard};
use serde_json::Value;
use sha2::{Digest, Sha256};

const INTERFACE: &str = "wg-latchkey";
/// The unlocked volume's mount point.
const PERSISTENT: &str = "/usr/local";
/// The service may still be on its way when systemd calls it started.
const SETTLE: Duration = Duration::from_secs(30);

fn main() {
    settle();
    let status = output("latchkey", &["status", "--json"]);
    let timeline = json("/run/latchkey/timeline.json");
    let by_itself = timeline.get("outcome").and_then(Value::as_str) == Some("unlocked");
    let report = Report {
        persistent: persistent(),
        service: service(),
        milestones: milestones(),
        status: status
            .as_ref()
            .ok()
            .and_then(|s| serde_json::from_str(s).ok())
            .unwrap_or(Value::Null),
        status_error: status.err(),
        wireguard: wireguard(),
        timeline,
        mesh: json("/run/latchkey/agent/milestones.json"),
        run_files: run_files(),
        leaks: leak::scan(INTERFACE, by_itself),
    };
    let json = serde_json::to_string(&report)
        .unwrap_or_else(|e| format!("{{\"unserialisable\":\"{e}\"}}"));
    // A line of its own, whatever the kernel printed before it.
    println!("\nREPORT {json}");
}

/// Waits until the service has brought the interface up, or has come to its end.
fn settle() {
    let deadline = Instant::now() + SETTLE;
    while Instant::now() < deadline {
        let up = read(&format!("/sys/class/net/{INTERFACE}/flags")).is_some_and(|f| is_up(&f));
        let state = service();
        if up && state.starts_with("active/")
            || state.starts_with("failed/")
            || state.starts_with("inactive/")
        {
            return;
        }
        thread::sleep(Duration::from_millis(100));
    }
}

/// Bit 0 of the interface's flags (IFF_UP).
fn is_up(flags: &str) -> bool {
    flags
        .trim()
        .strip_prefix("0x")
        .and_then(|h| u32::from_str_radix(h, 16).ok())
        .is_some_and(|f| f & 1 == 1)
}

fn service() -> String {
    let shown =
        output("systemctl", &["show", "latchkey.service", "-p", "ActiveState,SubState,Result"])
            .unwrap_or_default();
    let value = |name: &str| shown.lines().find_map(|l| l.strip_prefix(name)).unwrap_or("?");
    format!("{}/{}/{}", value("ActiveState="), value("SubState="), value("Result="))
}

fn milestones() -> Milestones {
    // systemd counts microseconds of CLOCK_MONOTONIC, which is as good as CLOCK_BOOTTIME in a machine that never sleeps.
    let ms = |arguments: &[&str]| {
        let shown = output("systemctl", arguments).ok()?;
        shown.trim().parse::<u64>().ok().filter(|&us| us > 0).map(|us| us / 1000)
    };
    Milestones {
        system_ms: ms(&["show", "-P", "UserspaceTimestampMonotonic"]),
        service_ms: ms(&["show", "latchkey.service", "-P", "InactiveExitTimestampMonotonic"]),
        service_ready_ms: ms(&["show", "latchkey.service", "-P", "ActiveEnterTimestampMonotonic"]),
    }
}

fn persistent() -> Persistent {
    let source = read("/proc/self/mounts")
        .and_then(|m| {
            m.lines().find(|l| l.split(' ').nth(1) == Some(PERSISTENT)).map(str::to_owned)
        })
        .and_then(|l| l.split(' ').next().map(str::to_owned));
    if source.is_none() {
        return Persistent::default();
    }
    let in_volume = |name: &str| Path::new(PERSISTENT).join(name);
    let counter = in_volume("boots");
    let boots =
        fs::read_to_string(&counter).ok().and_then(|n| n.trim().parse::<u32>().ok()).unwrap_or(0)
            + 1;
    let counted = fs::write(&counter, format!("{boots}\n"))
        .and_then(|()| fs::File::open(&counter)?.sync_all());
    Persistent {
        source,
        hello: fs::read_to_string(in_volume("hello")).ok(),
        data_sha256: fs::read(in_volume("data.bin")).ok().map(|d| hex(&Sha256::digest(d))),
        boots: counted.is_ok().then_some(boots),
    }
}

fn wireguard() -> Option<WireGuard> {
    let public_key = output("wg", &["show", INTERFACE, "public-key"]).ok()?.trim().to_owned();
    let listen_port =
        output("wg", &["show", INTERFACE, "listen-port"]).ok()?.trim().parse().ok()?;
    let addresses = output("ip", &["-o", "addr", "show", "dev", INTERFACE])
        .unwrap_or_default()
        .lines()
        .filter_map(|l| {
            l.split_whitespace()
                .skip_while(|w| *w != "inet" && *w != "inet6")
                .nth(1)
                .map(str::to_owned)
        })
        .collect();
    let up = read(&format!("/sys/class/net/{INTERFACE}/flags")).is_some_and(|f| is_up(&f));
    Some(WireGuard { interface: INTERFACE.into(), public_key, listen_port, addresses, up })
}

fn run_files() -> Vec<String> {
    let mut all: Vec<String> = fs::read_dir("/run/latchkey")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|e| {
            Some(format!(
                "{:04o} {}",
                e.metadata().ok()?.permissions().mode() & 0o7777,
                e.path().display()
            ))
        })
        .collect();
    all.sort();
    all
}

fn read(path: &str) -> Option<String> {
    fs::read_to_string(path).ok()
}

/// A file's JSON, or null.
fn json(path: &str) -> Value {
    read(path).and_then(|text| serde_json::from_str(&text).ok()).unwrap_or(Value::Null)
}

/// Standard output of a program, or why there is none.
fn output(program: &str, arguments: &[&str]) -> Result<String, String> {
    let output =
        Command::new(program).args(arguments).output().map_err(|e| format!("{program}: {e}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(format!("{program}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim()))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
