//! Where things are: the programs under test, the built image, the logs, and work folders that tidy themselves away.

use std::{
    collections::HashMap,
    env,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering},
    },
    thread,
};

use crate::error::{Doing, Error, Result, create_dir, run};

/// The project's folder.
pub fn project() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("/"))
}

/// Where everything made goes: `LATCHKEY_TARGET`, else `target`.
pub fn target() -> PathBuf {
    env::var_os("LATCHKEY_TARGET").map_or_else(|| project().join("target"), PathBuf::from)
}

/// The key server's program: `LATCHKEY_KMS`, else where `image/programs.sh` leaves it.
pub fn kms_program() -> PathBuf {
    env::var_os("LATCHKEY_KMS").map_or_else(|| target().join("release/latchkey-kms"), PathBuf::from)
}

/// The mesh agent's program: `LATCHKEY`, else where `image/programs.sh` leaves it.
pub fn agent_program() -> PathBuf {
    env::var_os("LATCHKEY").map_or_else(|| target().join("release/latchkey"), PathBuf::from)
}

/// What `image/build.sh` made.
#[derive(Debug, Clone)]
pub struct Image {
    pub kernel: PathBuf,
    pub kernel_version: String,
    /// The fast hand-made initramfs; any other, dracut's too, can be given to a VM in its place.
    pub initramfs: PathBuf,
    /// The base disk, never written to.
    pub disk: PathBuf,
    /// Byte offsets on the disk.
    pub state_start: u64,
    pub oem_start: u64,
    pub oem_size: u64,
    pub persistent_start: u64,
    pub persistent_size: u64,
    /// Configuration of swtpm_setup with the private authority.
    pub tpm_setup: PathBuf,
}

impl Image {
    /// Builds what is missing, once per process. With `LATCHKEY_NO_BUILD` set the programs are taken as they are.
    pub fn get() -> Result<&'static Self> {
        static IMAGE: OnceLock<std::result::Result<Image, String>> = OnceLock::new();
        IMAGE
            .get_or_init(|| Self::build().map_err(|e| e.to_string()))
            .as_ref()
            .map_err(|e| Error::Setup(e.clone()))
    }

    /// The path of dracut's own initramfs with our module; `variant` as image/dracut-initramfs.sh names them.
    pub fn dracut(variant: &str) -> Result<PathBuf> {
        Self::get()?;
        let path = run(Command::new(project().join("image/dracut-initramfs.sh")).arg(variant))?;
        Ok(PathBuf::from(path.trim_end()))
    }

    fn build() -> Result<Self> {
        let script = |name: &str| project().join("image").join(name);
        if env::var_os("LATCHKEY_NO_BUILD").is_none() {
            run(&mut Command::new(script("programs.sh")))?;
        }
        let answer = run(&mut Command::new(script("build.sh")))?;
        let values: HashMap<&str, &str> =
            answer.lines().filter_map(|l| l.split_once('=')).collect();
        let text = |name: &str| {
            values
                .get(name)
                .copied()
                .ok_or_else(|| Error::Setup(format!("image/build.sh did not say {name}")))
        };
        let path = |name: &str| text(name).map(PathBuf::from);
        let bytes = |name: &str| {
            text(name)?
                .parse()
                .map_err(|_| Error::Setup(format!("image/build.sh: {name} is no number of bytes")))
        };
        Ok(Self {
            kernel: path("kernel")?,
            kernel_version: text("kernel_version")?.to_owned(),
            initramfs: path("initramfs")?,
            disk: path("disk")?,
            state_start: bytes("state_start")?,
            oem_start: bytes("oem_start")?,
            oem_size: bytes("oem_size")?,
            persistent_start: bytes("persistent_start")?,
            persistent_size: bytes("persistent_size")?,
            tpm_setup: path("tpm_setup")?,
        })
    }
}

/// `target/boot-logs/NAME.log`, its folder made.
pub fn log_file(name: &str) -> Result<PathBuf> {
    let folder = target().join("boot-logs");
    create_dir(&folder)?;
    Ok(folder.join(format!("{name}.log")))
}

/// A folder for one scenario's files: removed when dropped, kept when the test failed.
#[derive(Debug)]
pub struct Work {
    path: PathBuf,
}

impl Work {
    pub fn new(name: &str) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        // Short: a unix socket's path has room for 107 bytes.
        let path = target().join("w").join(format!("{name}-{}-{n}", std::process::id()));
        create_dir(&path)?;
        let path = path.canonicalize().doing(|| format!("find {}", path.display()))?;
        Ok(Self { path })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        if !thread::panicking() {
            // Left for `make clean` if it cannot be.
            let _ = std::fs::remove_dir_all(&self.path);
        }
    }
}
