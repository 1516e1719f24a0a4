//! Writes the seeds of all targets: `seeds DIR` makes `DIR/TARGET/seed-N`.

use std::path::PathBuf;
use std::{env, fs, io};

use latchkey_fuzz_targets::{TARGETS, seeds};

fn main() -> io::Result<()> {
    let root = PathBuf::from(env::args_os().nth(1).ok_or(io::ErrorKind::InvalidInput)?);
    for target in TARGETS {
        let directory = root.join(target.name);
        fs::create_dir_all(&directory)?;
        for (number, seed) in seeds::of(target.name).iter().enumerate() {
            fs::write(directory.join(format!("seed-{number}")), seed)?;
        }
    }
    Ok(())
}
