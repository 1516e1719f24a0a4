//! The systemd unit: that systemd understands it, how far it locks the server in, and that the server takes its command line.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)] // helpers of tests

use std::{
    fs,
    os::unix::net::UnixDatagram,
    process::{Command, Stdio},
};

mod rig;

const UNIT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../systemd/latchkey-kms.service");

#[test]
fn systemd_takes_the_unit_and_it_locks_the_server_in() {
    let installed = tempfile::tempdir().unwrap();
    // `verify` wants the program to be there.
    let unit = fs::read_to_string(UNIT).unwrap();
    let program = env!("CARGO_BIN_EXE_latchkey-kms");
    let path = installed.path().join("latchkey-kms.service");
    fs::write(&path, unit.replace("/usr/bin/latchkey-kms", program)).unwrap();
    let verified = Command::new("systemd-analyze")
        .args(["verify", "--man=no", "--recursive-errors=no"])
        .arg(&path)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&verified.stderr);
    assert!(verified.status.success() && said.trim().is_empty(), "{said}");
    let rated = Command::new("systemd-analyze")
        .args(["security", "--offline=true", "--threshold=15", "--no-pager"])
        .arg(&path)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&rated.stdout);
    assert!(rated.status.success(), "more exposed than 1.5:\n{said}");
}

#[test]
fn the_server_takes_the_units_command_line_and_tells_systemd_how_it_is() {
    let state = tempfile::tempdir().unwrap();
    fs::create_dir_all(state.path().join("latchkey-kms/store")).unwrap();
    let unit = fs::read_to_string(UNIT).unwrap();
    let line = unit
        .lines()
        .find_map(|line| line.strip_prefix("ExecStart=/usr/bin/latchkey-kms "))
        .unwrap();
    let line = line
        .replace("%S", state.path().to_str().unwrap())
        .replace("127.0.0.1:8083", "127.0.0.1:0")
        .replace("$TLS $OPTIONS", "--listen 127.0.0.1:0");
    let socket_path = state.path().join("notify");
    let socket = UnixDatagram::bind(&socket_path).unwrap();
    socket.set_read_timeout(Some(rig::PATIENCE)).unwrap();
    let mut server = Command::new(env!("CARGO_BIN_EXE_latchkey-kms"))
        .args(line.split(' '))
        .env("NOTIFY_SOCKET", &socket_path)
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let heard = || {
        let mut buffer = [0; 512];
        let length = socket.recv(&mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    };
    assert!(heard().starts_with("READY=1\nSTATUS=listening on 127.0.0.1:"));
    let id = server.id().to_string();
    assert!(Command::new("kill").arg(&id).status().unwrap().success());
    assert_eq!(heard(), "STOPPING=1");
    assert!(server.wait().unwrap().success());
    let audit = fs::read_to_string(state.path().join("latchkey-kms/audit.jsonl")).unwrap();
    assert_eq!(audit.lines().count(), 2, "{audit}");
}
