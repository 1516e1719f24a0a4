//! How many machines run at once: two on the whole host, however many test programs there are. A machine under emulation
//! takes a whole core, and a third one would only make all three late.

use std::{
    fs::{File, TryLockError},
    thread,
    time::Duration,
};

use crate::{
    error::{Doing, Error, Result, create_dir},
    place::target,
};

/// The right to run one machine, until dropped.
#[derive(Debug)]
pub struct Lane {
    _lock: File,
}

impl Lane {
    /// Waits for a free lane.
    pub fn take() -> Result<Self> {
        let folder = target().join("image");
        create_dir(&folder)?;
        loop {
            for n in 0..lanes() {
                let path = folder.join(format!(".lane.{n}"));
                let file = File::create(&path).doing(|| format!("open {}", path.display()))?;
                match file.try_lock() {
                    Ok(()) => return Ok(Self { _lock: file }),
                    Err(TryLockError::WouldBlock) => {}
                    Err(TryLockError::Error(source)) => {
                        return Err(Error::Io { what: format!("lock {}", path.display()), source });
                    }
                }
            }
            thread::sleep(Duration::from_millis(50));
        }
    }
}

/// `LATCHKEY_LANES`, else 2.
fn lanes() -> u32 {
    std::env::var("LATCHKEY_LANES").ok().and_then(|n| n.parse().ok()).unwrap_or(2)
}
