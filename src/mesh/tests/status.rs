//! `latchkey status --boot` as the operator calls it, on a machine that Latchkey did not boot.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::Command;

#[test]
fn without_a_timeline_it_says_so_and_what_to_do_and_needs_no_configuration() {
    if Path::new("/run/latchkey").exists() {
        eprintln!("this machine was booted by Latchkey itself");
        return;
    }
    for (arguments, expected) in [
        (&["status", "--boot"][..], "unlocked nothing in this boot"),
        (&["status", "--boot", "--json"], "null"),
    ] {
        let run = Command::new(env!("CARGO_BIN_EXE_latchkey"))
            .args(["--cloud-config", "/nonexistent"])
            .args(arguments)
            .output()
            .unwrap();
        let text = String::from_utf8(run.stdout).unwrap();
        assert_eq!(run.status.code(), Some(3), "{text}");
        assert!(text.contains(expected), "{text}");
    }
}
