//! Partitions as files: an ext4 file system with free room behind it, and what is in a LUKS2 volume, decrypted without libcryptsetup.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use aes::Aes256;
use aes::cipher::KeyInit;
use libcryptsetup_rs::consts::vals::EncryptionFormat;
use libcryptsetup_rs::{CryptInit, CryptParamsLuks2Ref};
use serde_json::Value;
use tempfile::TempDir;
use xts_mode::{Xts128, get_tweak_default};

pub(crate) const MIB: u64 = 1024 * 1024;
pub(crate) const PASSPHRASE: &[u8] = b"0123456789abcdefghijklmnopqrstuv";
pub(crate) const LABEL: &str = "COS_PERSISTENT";

/// A directory on a file system in memory: syncs cost nothing there, and power is cut in software.
pub(crate) fn scratch() -> TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap()
}

/// A partition of `size` bytes with a well filled ext4 file system of `filesystem` bytes at its beginning.
pub(crate) fn ext4(dir: &Path, size: u64, filesystem: u64, label: &str) -> PathBuf {
    let path = dir.join("partition");
    let content = dir.join("content");
    fs::create_dir_all(&content).unwrap();
    let mut random = Random(size ^ filesystem);
    for file in 0..filesystem / MIB / 2 {
        let bytes: Vec<u8> =
            (0..MIB * 3 / 4 / 8).flat_map(|_| random.next().to_le_bytes()).collect();
        fs::write(content.join(format!("file{file}")), bytes).unwrap();
    }
    File::create(&path).unwrap().set_len(size).unwrap();
    let made = Command::new("mkfs.ext4")
        .args(["-q", "-F", "-b", "4096", "-L", label, "-d"])
        .arg(&content)
        .arg(&path)
        .arg(format!("{}K", filesystem / 1024))
        .stderr(Stdio::null())
        .status()
        .unwrap();
    assert!(made.success());
    path
}

/// The first `length` bytes of what is encrypted.
pub(crate) fn decrypt(path: &Path, passphrase: &[u8], length: usize) -> Vec<u8> {
    let key = volume_key(path, 0, passphrase).unwrap();
    let header = json(path);
    let segments = header["segments"].as_object().unwrap();
    assert_eq!(segments.len(), 1, "{segments:?}");
    let segment = &segments["0"];
    assert_eq!(segment["encryption"], "aes-xts-plain64");
    assert_eq!(
        (&segment["sector_size"], &segment["size"]),
        (&Value::from(512), &Value::from("dynamic"))
    );
    let offset: u64 = segment["offset"].as_str().unwrap().parse().unwrap();

    let mut data = vec![0; length];
    File::open(path).unwrap().read_exact_at(&mut data, offset).unwrap();
    let (data_key, tweak_key) = key.split_at(32);
    let xts = Xts128::new(
        Aes256::new_from_slice(data_key).unwrap(),
        Aes256::new_from_slice(tweak_key).unwrap(),
    );
    xts.decrypt_area(&mut data, 512, 0, get_tweak_default);
    data
}

pub(crate) fn volume_key(path: &Path, slot: u32, passphrase: &[u8]) -> Option<Vec<u8>> {
    let mut device = CryptInit::init(path).unwrap();
    device
        .context_handle()
        .load::<CryptParamsLuks2Ref<'_>>(Some(EncryptionFormat::Luks2), None)
        .unwrap();
    let mut key = vec![0; 64];
    let (_, size) = device.volume_key_handle().get(Some(slot), &mut key, Some(passphrase)).ok()?;
    assert_eq!(size, 64);
    Some(key)
}

/// The LUKS2 metadata, as cryptsetup's own program prints it.
pub(crate) fn json(path: &Path) -> Value {
    let output = Command::new("cryptsetup")
        .args(["luksDump", "--dump-json-metadata"])
        .arg(path)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// splitmix64: cuts have to be the same in each run.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }
}
