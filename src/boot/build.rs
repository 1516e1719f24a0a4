//! Bakes in a date before which no machine can rightly run this program: the floor of the clock.
//!
//! `SOURCE_DATE_EPOCH` (reproducible-builds.org) if it is set, else the date of the commit, else the date
//! below. The same source gives the same program.

use std::process::Command;

/// 2026-01-01 00:00 UTC: this file is not older.
const WRITTEN: u64 = 1_767_225_600;

fn main() {
    println!("cargo:rerun-if-env-changed=SOURCE_DATE_EPOCH");
    // Not with each commit: an older floor is a lower one, and nothing worse.
    println!("cargo:rerun-if-changed=build.rs");
    let date = from_environment().or_else(from_commit).unwrap_or(WRITTEN).max(WRITTEN);
    println!("cargo:rustc-env=LATCHKEY_BUILD_DATE={date}");
}

fn from_environment() -> Option<u64> {
    std::env::var("SOURCE_DATE_EPOCH").ok()?.trim().parse().ok()
}

fn from_commit() -> Option<u64> {
    let told = Command::new("git").args(["log", "-1", "--format=%ct"]).output().ok()?;
    String::from_utf8(told.stdout).ok()?.trim().parse().ok()
}
