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
/// What cryptsetup's reencrypt takes for itself when a volume is made here.
const LUKS_ROOM: u64 = 8 << 20;

/// What COS_PERSISTENT holds before the first boot.
#[derive(Debug, Clone, Copy)]
pub enum Persistent<'a> {
    /// A plain ext4 with data, to be encrypted by an install boot.
    Plain,
    /// LUKS2 already, with this passphrase in key slot 0.
    Luks(&'a str),
    /// LUKS2 as Kairos' installer leaves it (`protocols/kcrypt.md` §11.2), with this passphrase in key slot 0.
    Kairos(&'a str),
}

/// The UUID that Kairos' installer gives COS_PERSISTENT on every machine: UUIDv5 of the label.
pub const KAIROS_UUID: &str = "85c39d0f-4867-5227-8334-f5eec606d9eb";

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
        match persistent {
            Persistent::Plain => {}
            Persistent::Luks(passphrase) => {
                let cheap = ["--pbkdf=pbkdf2", "--pbkdf-force-iterations=1000"];
                encrypt(&self.work, &volume, "COS_PERSISTENT", passphrase, LUKS_ROOM, &cheap)?;
            }
            Persistent::Kairos(passphrase) => {
                // What makes the header of 16 MiB that luksFormat makes.
                let kairos = ["--iter-time=5", "--uuid", KAIROS_UUID];
                encrypt(&self.work, &volume, "COS_PERSISTENT", passphrase, 32 << 20, &kairos)?;
            }
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
        splice(file, &self.path, offset)
    }
}

/// A second disk: one partition, and on that a LUKS2 volume.
#[derive(Debug)]
pub struct SecondDisk {
    path: PathBuf,
    _work: Work,
}

impl SecondDisk {
    /// An ext4 labelled `label` in a volume labelled the same, with a UUID of its own and this passphrase.
    pub fn new(name: &str, label: &str, passphrase: &str) -> Result<Self> {
        const START: u64 = 1 << 20;
        const SIZE: u64 = 32 << 20;
        let work = Work::new(&format!("{name}-disk2"))?;
        let (path, folder, volume) =
            (work.file("disk.img"), work.file("content"), work.file("volume.img"));
        create_dir(&folder)?;
        write(&folder.join("hello"), format!("hello from {label}\n"))?;
        make_ext4(label, &folder, SIZE - LUKS_ROOM, &volume)?;
        let cheap = ["--pbkdf=pbkdf2", "--pbkdf-force-iterations=1000"];
        encrypt(&work, &volume, label, passphrase, LUKS_ROOM, &cheap)?;
        let table = work.file("table");
        // Room for the second copy of the table at the end.
        write(&table, format!("label: gpt\nstart={}, size={}\n", START / 512, SIZE / 512))?;
        run(Command::new("truncate").arg("--size").arg((2 * START + SIZE).to_string()).arg(&path))?;
        let sfdisk = "sfdisk --quiet --no-reread --no-tell-kernel \"$1\" <\"$2\"";
        run(Command::new("sh").args(["-c", sfdisk, "sh"]).arg(&path).arg(&table))?;
        splice(&volume, &path, START)?;
        Ok(Self { path, _work: work })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Encrypts a file system in a file in place, which grows by `room`; half of that is the header. In user space: no
/// device-mapper on the host.
fn encrypt(
    work: &Work,
    volume: &Path,
    label: &str,
    passphrase: &str,
    room: u64,
    options: &[&str],
) -> Result<()> {
    let key = work.file("key");
    write(&key, passphrase)?;
    run(Command::new("truncate").arg(format!("--size=+{room}")).arg(volume))?;
    run(Command::new("cryptsetup")
        .args(["reencrypt", "--batch-mode", "--encrypt", "--type", "luks2", "--label", label])
        .args(options)
        .arg(format!("--reduce-device-size={room}"))
        .arg("--key-file")
        .arg(&key)
        .arg(volume))
    .map(drop)
}

fn splice(file: &Path, onto: &Path, offset: u64) -> Result<()> {
    run(Command::new("dd")
        .args(["bs=1M", "conv=notrunc", "oflag=seek_bytes", "status=none"])
        .arg(format!("seek={offset}"))
        .arg(format!("if={}", file.display()))
        .arg(format!("of={}", onto.display())))
    .map(drop)
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
