//! `ikto.json`, read as Ikto reads it (protocols/ikto-kilo.md §1.2), and `latchkey init`, which makes one (§1.3).

use std::path::Path;

use crate::error::{Error, Result};
use crate::settings::Settings;

/// What stands in an `ikto.json`.
#[derive(Debug)]
pub struct Config;

impl Config {
    /// Reads the file and checks all of it, before anything is touched.
    ///
    /// # Errors
    /// [`Error::Ikto`] names the key.
    pub fn read(path: &Path) -> Result<Settings> {
        Err(Error::Ikto { path: path.into(), reason: "not read yet".into() })
    }
}

/// The text of a new `ikto.json` with an address drawn at random, as `ikto init` prints it, line end included.
///
/// # Errors
/// [`Error::Argument`] for a mesh or a length that cannot be.
pub fn init(mesh: Option<&str>, prefix_length: Option<u8>) -> Result<String> {
    let _ = (mesh, prefix_length);
    Err(Error::Argument { argument: "--mesh-ip-net", reason: "not read yet".into() })
}
