//! Man pages and completions are as the programs' definitions make them, and the shells and man read them.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use latchkey_docs::{FOLDERS, files, root};

#[test]
fn what_is_checked_in_is_what_the_definitions_make() {
    let mut kept = BTreeMap::new();
    for folder in FOLDERS {
        read_all(&root(), Path::new(folder), &mut kept);
    }
    let made = files().unwrap();
    let names = |files: &BTreeMap<PathBuf, Vec<u8>>| files.keys().cloned().collect::<Vec<_>>();
    let again = "run `cargo run -p latchkey-docs` and check the result in";
    assert_eq!(names(&kept), names(&made), "{again}");
    for (file, content) in &made {
        assert!(kept.get(file) == Some(content), "{} differs: {again}", file.display());
    }
}

fn read_all(root: &Path, folder: &Path, files: &mut BTreeMap<PathBuf, Vec<u8>>) {
    for entry in std::fs::read_dir(root.join(folder)).unwrap().flatten() {
        let path = folder.join(entry.file_name());
        if entry.path().is_dir() {
            read_all(root, &path, files);
        } else {
            files.insert(path, std::fs::read(entry.path()).unwrap());
        }
    }
}

#[test]
fn bash_reads_the_completions() {
    let mut scripts = BTreeMap::new();
    read_all(&root(), Path::new("completions/bash"), &mut scripts);
    assert!(!scripts.is_empty());
    for script in scripts.keys() {
        let read = Command::new("bash").arg("-n").arg(root().join(script)).output().unwrap();
        assert!(read.status.success(), "{}: {read:?}", script.display());
    }
}

/// The completion of a half-typed word, asked of bash itself.
#[test]
fn bash_completes_verbs_and_options() {
    let program = "kcrypt-discovery-challenger";
    let script = root().join("completions/bash").join(program);
    for (typed, expected) in [("clean", "cleanup"), ("info --pc", "--pcrs")] {
        let words = format!("{program} {typed}");
        let ask = format!(
            "source {}; COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
             function=$(complete -p {program} | sed 's/.* -F \\([^ ]*\\) .*/\\1/')
             \"$function\" {program} \"${{COMP_WORDS[COMP_CWORD]}}\" '' ; echo \"${{COMPREPLY[@]}}\"",
            script.display()
        );
        let answer = Command::new("bash").args(["-c", &ask]).output().unwrap();
        let completions = String::from_utf8_lossy(&answer.stdout).into_owned();
        assert!(completions.split_whitespace().any(|word| word == expected), "{typed}: {answer:?}");
    }
}

/// A line of roff that begins with an unknown request is silently left out by man.
#[test]
fn pages_hold_every_option_and_no_request_that_man_does_not_know() {
    let mut pages = BTreeMap::new();
    read_all(&root(), Path::new("man"), &mut pages);
    for (name, page) in &pages {
        let page = std::str::from_utf8(page).unwrap();
        for line in page.lines().filter(|line| line.starts_with(['.', '\''])) {
            let request = line.split_whitespace().next().unwrap();
            let known = [
                ".TH", ".SH", ".TP", ".RS", ".RE", ".br", ".ie", ".el", ".nr", ".PP", ".sp", ".nf",
                ".fi",
            ];
            assert!(known.contains(&request), "{}: {line}", name.display());
        }
    }
    let page = pages.get(Path::new("man/kcrypt-discovery-challenger-cleanup.8")).unwrap();
    let page = String::from_utf8_lossy(page).replace("\\-", "-");
    assert!(page.contains("--i-know-what-i-am-doing"), "{page}");
}
