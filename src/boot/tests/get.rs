//! `get`: what is given on the command line goes before the configuration, and may do without one.

#![allow(clippy::unwrap_used)]

#[allow(unreachable_pub)]
mod common;

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use common::{Machine, Run, releasing, serve};
use latchkey_soft_tpm::SoftTpm;

/// In base64, as generation 2 sends it: `correct`.
const ANSWER: &str = r#"{"passphrase":"Y29ycmVjdA=="}"#;

fn server() -> SocketAddr {
    serve(vec![releasing(ANSWER)])
}

fn closed_port() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

fn get(machine: &Machine, more: &[&str]) -> Run {
    machine.run(&[&["get", "--partition-label", "COS_PERSISTENT"], more].concat())
}

#[test]
fn servers_on_the_command_line_go_before_the_configured_ones() {
    let machine = Machine::speaking("v2", SoftTpm::fresh());
    machine.serve(closed_port());
    let (dead, good) = (format!("http://{}", closed_port()), format!("http://{}", server()));
    for servers in [
        &["--challenger-server", &*good][..],
        &["--challenger-server", &*dead, "--challenger-server", &*good],
    ] {
        let run = get(&machine, servers);
        assert_eq!((run.code, run.text()), (0, "correct"), "{}", run.stderr);
    }
}

#[test]
fn a_server_on_the_command_line_needs_no_configuration() {
    let machine = Machine::speaking("auto", SoftTpm::fresh());
    std::fs::remove_file(machine.config.0.join("90_latchkey.yaml")).unwrap();
    let server = format!("http://{}", server());
    let run =
        get(&machine, &["--challenger-server", &server, "--tpm-device", &machine.tpm.device()]);
    assert_eq!((run.code, run.text()), (0, "correct"), "{}", run.stderr);
}

#[test]
fn attempts_are_counted_and_the_last_trouble_is_named() {
    let machine = Machine::speaking("v2", SoftTpm::fresh());
    let asked = Arc::new(AtomicU32::new(0));
    let counted = Arc::clone(&asked);
    machine.serve(serve(vec![Box::new(move |_| {
        counted.fetch_add(1, Ordering::Relaxed);
    })]));
    for attempts in [1, 3] {
        asked.store(0, Ordering::Relaxed);
        let run = get(&machine, &["--attempts", &attempts.to_string()]);
        assert_eq!(run.code, 21, "{}", run.stderr);
        assert_eq!(asked.load(Ordering::Relaxed), attempts, "{}", run.stderr);
        assert!(
            run.stderr.contains(&format!("gave up after {attempts} attempts")),
            "{}",
            run.stderr
        );
    }
}

#[test]
fn a_value_that_makes_no_sense_is_told_before_anything_is_asked() {
    let machine = Machine::speaking("v2", SoftTpm::fresh());
    machine.serve(closed_port());
    for (more, code, words) in [
        (&["--attempts", "0"][..], 1, "--attempts"),
        (&["--attempts", "many"], 1, "--attempts"),
        (&["--certificate", "/nonexistent"], 10, "/nonexistent"),
        (&["--challenger-server", "kms.example"], 10, "kms.example"),
        (&["--mdns"], 10, ".local"),
        (
            &[
                "--challenger-server",
                "https://127.0.0.1:1",
                "--certificate",
                "-----BEGIN NOTHING-----",
            ],
            10,
            "`certificate` cannot be used",
        ),
    ] {
        let run = get(&machine, more);
        assert_eq!(run.code, code, "{more:?}: {}", run.stderr);
        assert!(run.stderr.contains(words), "{more:?}: {}", run.stderr);
    }
}

#[test]
fn a_partition_is_named_in_one_of_three_ways() {
    let machine = Machine::speaking("v2", SoftTpm::fresh());
    machine.serve(server());
    for name in ["--partition-label", "--partition-name", "--partition-uuid"] {
        let run = machine.run(&["get", name, "x"]);
        assert_eq!((run.code, run.text()), (0, "correct"), "{name}: {}", run.stderr);
    }
    let run = machine.run(&["get"]);
    assert_eq!((run.code, run.text()), (1, ""), "{}", run.stderr);
    assert!(run.stderr.contains("--partition-label"), "{}", run.stderr);
}
