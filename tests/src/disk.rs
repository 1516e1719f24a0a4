//! The disk of one scenario: a sparse copy of the base disk, with the scenario's cloud-config and persistent partition.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use sha2::{Digest, Sha256};

use crate::{
    error::{Doing, Error, Result, create_dir, run, write},
    place::{Image, Work},
};

/// Bytes of `data.bin` on COS_PERSISTENT: enough that a wrong sector would show.
const DATA_SIZE: usize = 4 << 20;
/// The persistent file system; the rest of the partition is room for the LUKS2 header when encrypting in place.
const PERSISTENT_FS_SIZE: u64 = 48 << 20;
/// What cryptsetup's reencrypt takes for itself when a volume is made here: half of it is the header.
const LUKS_ROOM: u64 = 8 << 20;

/// What COS_PERSISTENT holds before the first boot.
#[derive(Debug, Clone, Copy)]
pub enum Persistent<'a> {
    /// A plain ext4 with data, to be encrypted by an install boot.
    Plain,
    /// LUKS2 already, with this passphrase in key slot 0.
    Luks(&'a str),
}

/// A scenario's disk.
#[derive(Debug)]
pub struct Disk {
    work: Work,
    path: PathBuf,
}

impl Disk {
    /// A copy of the base disk with `cloud_config` on COS_OEM.
    pub fn new(name: &str, cloud_config: &str, persistent: Persistent<'_>) -> Result<Self> {
        let image = Image::get()?;
        let work = Work::new(&format!("{name}-disk"))?;
        let path = work.file("disk.img");
        run(Command::new("cp")
            .args(["--sparse=always", "--reflink=auto"])
            .arg(&image.disk)
            .arg(&path))?;
        let disk = Self { work, path };
        disk.set_cloud_config(cloud_config)?;
        disk.set_persistent(persistent)?;
        Ok(disk)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes COS_OEM anew with this cloud-config and nothing else.
    pub fn set_cloud_config(&self, cloud_config: &str) -> Result<()> {
        let image = Image::get()?;
        let folder = self.work.file("oem");
        create_dir(&folder)?;
        write(&folder.join("90_custom.yaml"), cloud_config)?;
        let file_system = self.work.file("oem.img");
        make_ext4("COS_OEM", &folder, image.oem_size, &file_system)?;
        self.splice(&file_system, image.oem_start)
    }

    /// Writes COS_PERSISTENT anew.
    pub fn set_persistent(&self, persistent: Persistent<'_>) -> Result<()> {
        let image = Image::get()?;
        let folder = self.work.file("persistent");
        create_dir(&folder)?;
        write(&folder.join("hello"), "hello from COS_PERSISTENT\n")?;
        write(&folder.join("data.bin"), data())?;
        let volume = self.work.file("persistent.img");
        make_ext4("COS_PERSISTENT", &folder, PERSISTENT_FS_SIZE, &volume)?;
        if let Persistent::Luks(passphrase) = persistent {
            let key = self.work.file("key");
            write(&key, passphrase)?;
            run(Command::new("truncate")
                .arg("--size")
                .arg((PERSISTENT_FS_SIZE + LUKS_ROOM).to_string())
                .arg(&volume))?;
            // In user space, on a file: no device-mapper on the host.
            run(Command::new("cryptsetup")
                .args([
                    "reencrypt",
                    "--batch-mode",
                    "--encrypt",
                    "--type",
                    "luks2",
                    "--label",
                    "COS_PERSISTENT",
                ])
                .args(["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"])
                .arg(format!("--reduce-device-size={LUKS_ROOM}"))
                .arg("--key-file")
                .arg(&key)
                .arg(&volume))?;
        }
        self.splice(&volume, image.persistent_start)
    }

    /// Puts a kernel, an initramfs and a `grub.cfg` on COS_STATE, so that the disk boots by itself.
    pub fn install_boot(&self, initramfs: &Path, grub_cfg: &str) -> Result<()> {
        let image = Image::get()?;
        let (cfg, script) = (self.work.file("grub.cfg"), self.work.file("debugfs"));
        write(&cfg, grub_cfg)?;
        let commands = format!(
            "write {} /boot/vmlinuz\nwrite {} /boot/initrd\nwrite {} /boot/grub/grub.cfg\n",
            image.kernel.display(),
            initramfs.display(),
            cfg.display()
        );
        write(&script, commands)?;
        let device = format!("{}?offset={}", self.path.display(), image.state_start);
        run(Command::new("debugfs").arg("-w").arg("-f").arg(&script).arg(&device))?;
        // debugfs exits with 0 whatever happens.
        for (path, file) in [
            ("/boot/vmlinuz", image.kernel.as_path()),
            ("/boot/initrd", initramfs),
            ("/boot/grub/grub.cfg", &cfg),
        ] {
            let found =
                run(Command::new("debugfs").arg("-R").arg(format!("stat {path}")).arg(&device))?;
            let size =
                std::fs::metadata(file).doing(|| format!("look at {}", file.display()))?.len();
            if !found.contains(&format!("Size: {size}\n")) {
                return Err(Error::Setup(format!("{path} is not whole on COS_STATE: {found}")));
            }
        }
        Ok(())
    }

    fn splice(&self, file: &Path, offset: u64) -> Result<()> {
        run(Command::new("dd")
            .args(["bs=1M", "conv=notrunc", "oflag=seek_bytes", "status=none"])
            .arg(format!("seek={offset}"))
            .arg(format!("if={}", file.display()))
            .arg(format!("of={}", self.path.display())))
        .map(drop)
    }
}

fn make_ext4(label: &str, content: &Path, size: u64, file: &Path) -> Result<()> {
    let _ = std::fs::remove_file(file);
    run(Command::new("truncate").arg("--size").arg(size.to_string()).arg(file))?;
    run(Command::new("mkfs.ext4")
        .args(["-q", "-F", "-m", "0", "-O", "^has_journal", "-L", label, "-d"])
        .arg(content)
        .arg(file))
    .map(drop)
}

/// Content of `data.bin`: a SHA-256 counter stream, so that no two sectors are alike.
fn data() -> Vec<u8> {
    (0u64..).flat_map(|n| Sha256::digest(n.to_be_bytes())).take(DATA_SIZE).collect()
}

/// What a booted machine must read in `data.bin`: its SHA-256, lower-case hex.
pub fn data_sha256() -> String {
    Sha256::digest(data()).iter().map(|b| format!("{b:02x}")).collect()
}
