//! The LUKS2 volume, through libcryptsetup 2.6 (it is not thread-safe: call from one thread).

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use libcryptsetup_rs::consts::flags::{
    CryptActivate, CryptDeactivate, CryptPbkdf, CryptReencrypt, CryptVolumeKey,
};
use libcryptsetup_rs::consts::vals::{
    CryptKdf, CryptReencryptDirectionInfo, CryptReencryptModeInfo, EncryptionFormat,
    KeyslotPriority, KeyslotsSize, MetadataSize,
};
use libcryptsetup_rs::{
    CryptDevice, CryptInit, CryptParamsLuks2, CryptParamsLuks2Ref, CryptParamsReencrypt,
    CryptPbkdfType, Either, LibcryptErr, TokenInput, c_progress_callback,
};
use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde_json::Value;
use zeroize::Zeroizing;

use super::device::Device;
use super::header::Metadata;
use super::layout::Layout;
use super::{EncryptError, Progress};

/// The keyslot of the machine's passphrase: Kairos opens no other.
pub(super) const MACHINE_SLOT: u32 = 0;
pub(super) const RECOVERY_SLOT: u32 = 1;

const CIPHER: (&str, &str) = ("aes", "xts-plain64");
/// Two AES-256 keys.
const KEY_BYTES: usize = 64;
/// Encryption sector: the size that every block size of a file system is a multiple of.
const SECTOR: u32 = 512;
/// 1000 is the least that LUKS2 takes. The machine's passphrase is random: stretching adds nothing but time at each boot.
/// Set before formatting, since the digest of the volume key gets its cost then and keeps it for ever (anchors/unlock.md §0.1).
const MACHINE_ITERATIONS: u32 = 1000;
const RECOVERY_ITERATIONS: u32 = 4;
/// libcryptsetup takes no less than the first; the second is what it takes at most by itself.
const RECOVERY_MEMORY_KIB: (u64, u64) = (32, 1024 * 1024);
const METADATA_BYTES: u64 = 0x4000;
/// Both copies of the largest metadata that LUKS2 has.
const MAX_METADATA: u64 = 8 << 20;

/// A LUKS2 volume on a partition.
pub(super) struct Volume {
    path: PathBuf,
    device: CryptDevice,
}

impl Volume {
    /// Reads the header; libcryptsetup repairs one of the two copies by the other.
    pub(super) fn load(path: &Path) -> Result<Self, EncryptError> {
        Self::load_from(path, path)
    }

    /// Reads `header`, which is that of the volume on `path`.
    pub(super) fn load_from(header: &Path, path: &Path) -> Result<Self, EncryptError> {
        let mut device =
            CryptInit::init(header).map_err(fault(path, "open it for libcryptsetup"))?;
        device
            .context_handle()
            .load::<CryptParamsLuks2Ref<'_>>(Some(EncryptionFormat::Luks2), None)
            .map_err(|e| EncryptError::Header { path: path.to_owned(), why: e.to_string() })?;
        Ok(Self { path: path.to_owned(), device })
    }

    pub(super) fn metadata(&mut self) -> Result<Metadata, EncryptError> {
        let json = self.device.status_handle().dump_json();
        json.map(Metadata).map_err(fault(&self.path, "read its LUKS2 metadata"))
    }

    pub(super) fn uuid(&mut self) -> Result<String, EncryptError> {
        let uuid = self.device.status_handle().get_uuid();
        uuid.map(|uuid| uuid.to_string()).map_err(fault(&self.path, "read its UUID"))
    }

    /// The volume key, by the machine's passphrase.
    pub(super) fn key(&mut self, passphrase: &[u8]) -> Result<Zeroizing<Vec<u8>>, EncryptError> {
        let key = self.key_in(MACHINE_SLOT, passphrase)?;
        key.ok_or_else(|| EncryptError::WrongPassphrase { path: self.path.clone() })
    }

    /// The volume key, if the passphrase is that of this keyslot. A power cut can leave a keyslot that no digest is assigned to
    /// yet, for which libcryptsetup has EINVAL.
    pub(super) fn key_in(
        &mut self,
        slot: u32,
        passphrase: &[u8],
    ) -> Result<Option<Zeroizing<Vec<u8>>>, EncryptError> {
        let size = usize::try_from(self.device.status_handle().get_volume_key_size());
        let mut key = Zeroizing::new(vec![0; size.unwrap_or(KEY_BYTES)]);
        let got = self.device.volume_key_handle().get(Some(slot), &mut key, Some(passphrase));
        match got {
            Ok(_) => Ok(Some(key)),
            Err(LibcryptErr::IOError(e))
                if matches!(
                    e.raw_os_error().map(Errno::from_raw),
                    Some(Errno::EPERM | Errno::ENOENT | Errno::EINVAL)
                ) =>
            {
                Ok(None)
            }
            Err(e) => Err(fault(&self.path, "open a keyslot")(e)),
        }
    }

    /// A key of the machine in a keyslot that is free.
    pub(super) fn add_machine_slot(
        &mut self,
        slot: u32,
        key: &[u8],
        passphrase: &[u8],
    ) -> Result<(), EncryptError> {
        self.device
            .settings_handle()
            .set_pbkdf_type(&machine_kdf())
            .map_err(fault(&self.path, "set the cost of the machine's key"))?;
        self.device
            .keyslot_handle()
            .add_by_key(Some(slot), Some(Either::Left(key)), passphrase, CryptVolumeKey::empty())
            .map(drop)
            .map_err(fault(&self.path, "add a key of the machine"))
    }

    pub(super) fn remove_slot(&mut self, slot: u32) -> Result<(), EncryptError> {
        let destroyed = self.device.keyslot_handle().destroy(slot);
        destroyed.map_err(fault(&self.path, "take a keyslot away"))
    }

    /// The machine's slot goes first wherever no slot is named, and spares its key the seconds and
    /// up to 1 GiB of the recovery slot. That one is not to be ignored: whoever has the recovery key
    /// in hand and a live system in front of him shall not have to know about key slots.
    pub(super) fn prefer_machine_slot(&mut self) -> Result<(), EncryptError> {
        let set = self.device.keyslot_handle().set_priority(MACHINE_SLOT, KeyslotPriority::Prefer);
        set.map_err(fault(&self.path, "set the machine key's priority"))
    }

    pub(super) fn set_token(&mut self, number: u32, token: &Value) -> Result<(), EncryptError> {
        let set = self.device.token_handle().json_set(TokenInput::ReplaceToken(number, token));
        set.map(drop).map_err(fault(&self.path, "write the latchkey token"))
    }

    pub(super) fn add_token(&mut self, token: &Value) -> Result<(), EncryptError> {
        let set = self.device.token_handle().json_set(TokenInput::AddToken(token));
        set.map(drop).map_err(fault(&self.path, "write the latchkey token"))
    }

    /// Puts `recovery` in its keyslot, in the place of an earlier one.
    pub(super) fn set_recovery(
        &mut self,
        replace: bool,
        key: &[u8],
        recovery: &[u8],
    ) -> Result<(), EncryptError> {
        let path = self.path.clone();
        if replace {
            self.remove_slot(RECOVERY_SLOT)?;
        }
        self.device
            .settings_handle()
            .set_pbkdf_type(&recovery_kdf())
            .map_err(fault(&path, "set the cost of the recovery key"))?;
        let mut slots = self.device.keyslot_handle();
        slots
            .add_by_key(
                Some(RECOVERY_SLOT),
                Some(Either::Left(key)),
                recovery,
                CryptVolumeKey::empty(),
            )
            .map_err(fault(&path, "add the recovery key"))?;
        self.prefer_machine_slot()
    }

    /// Completes the zone that was being encrypted when the power went.
    pub(super) fn recover(
        &mut self,
        layout: &Layout,
        passphrase: &[u8],
    ) -> Result<(), EncryptError> {
        self.reencrypt_init(
            layout,
            passphrase,
            CryptReencrypt::RECOVERY,
            "recover the interrupted zone",
        )
    }

    /// Encrypts what is not encrypted yet.
    pub(super) fn encrypt(
        &mut self,
        layout: &Layout,
        passphrase: &[u8],
        progress: &mut dyn FnMut(Progress),
    ) -> Result<(), EncryptError> {
        self.reencrypt_init(layout, passphrase, CryptReencrypt::RESUME_ONLY, "go on encrypting")?;
        let mut watch = Watch { progress };
        self.device
            .reencrypt_handle()
            .reencrypt2(Some(on_progress), Some(&mut watch))
            .map_err(fault(&self.path, "encrypt it"))
    }

    fn reencrypt_init(
        &mut self,
        layout: &Layout,
        passphrase: &[u8],
        flags: CryptReencrypt,
        what: &'static str,
    ) -> Result<(), EncryptError> {
        let cipher = flags.contains(CryptReencrypt::INITIALIZE_ONLY).then_some(CIPHER);
        let parameters = reencryption(layout, flags);
        self.device
            .reencrypt_handle()
            .reencrypt_init_by_passphrase(
                None,
                passphrase,
                None,
                Some(MACHINE_SLOT),
                cipher,
                parameters,
            )
            .map(drop)
            .map_err(fault(&self.path, what))
    }

    /// Makes the mapping `/dev/mapper/NAME`.
    pub(super) fn open(&mut self, name: &str, passphrase: &[u8]) -> Result<(), EncryptError> {
        self.device
            .activate_handle()
            .activate_by_passphrase(
                Some(name),
                Some(MACHINE_SLOT),
                passphrase,
                CryptActivate::empty(),
            )
            .map(drop)
            .map_err(fault(&self.path, "open the new volume (is dm-crypt there?)"))
    }

    pub(super) fn close(&mut self, name: &str) -> Result<(), EncryptError> {
        let close = self.device.activate_handle().deactivate(name, CryptDeactivate::empty());
        close.map_err(fault(&self.path, "close the new volume"))
    }
}

/// What a header is made of.
pub(super) struct Plan<'a> {
    pub(super) label: &'a str,
    pub(super) passphrase: &'a [u8],
    pub(super) token: Value,
    /// Of the header, which is as large as the data's offset.
    pub(super) bytes: u64,
}

/// A complete LUKS2 header for `path`, made in memory. Nothing is written to the partition.
pub(super) fn header(path: &Path, plan: &Plan<'_>) -> Result<Vec<u8>, EncryptError> {
    let memory = Memory::new(plan.bytes)?;
    format(path, &memory, plan)?;
    memory.read(plan.bytes)
}

/// As [`header`], for encrypting in place: the header says that nothing is encrypted yet, and libcryptsetup has copied the
/// first `layout.shift` bytes to `layout.moved`. These are not synced.
pub(super) fn header_and_move(
    path: &Path,
    plan: &Plan<'_>,
    layout: &Layout,
) -> Result<Vec<u8>, EncryptError> {
    let memory = Memory::new(plan.bytes)?;
    let device = format(path, &memory, plan)?;
    let mut volume = Volume { path: path.to_owned(), device };
    volume.reencrypt_init(
        layout,
        plan.passphrase,
        CryptReencrypt::INITIALIZE_ONLY | CryptReencrypt::MOVE_FIRST_SEGMENT,
        "begin encrypting",
    )?;
    drop(volume);
    memory.read(plan.bytes)
}

fn format(path: &Path, memory: &Memory, plan: &Plan<'_>) -> Result<CryptDevice, EncryptError> {
    let mut device =
        CryptInit::init(&memory.path).map_err(fault(path, "open the header in memory"))?;
    let keyslots = KeyslotsSize::try_from(plan.bytes.saturating_sub(2 * METADATA_BYTES))
        .map_err(fault(path, "size the header"))?;
    let mut settings = device.settings_handle();
    settings
        .set_metadata_size(MetadataSize::Kb16, keyslots)
        .and_then(|()| settings.set_pbkdf_type(&machine_kdf()))
        .map_err(fault(path, "set up the header"))?;
    device
        .set_data_offset(plan.bytes / u64::from(SECTOR))
        .map_err(fault(path, "set the data's offset"))?;
    let parameters = CryptParamsLuks2 {
        pbkdf: None,
        integrity: None,
        integrity_params: None,
        data_alignment: 0,
        data_device: Some(path.to_owned()),
        sector_size: SECTOR,
        label: Some(plan.label.to_owned()),
        subsystem: None,
    };
    let mut parameters: CryptParamsLuks2Ref<'_> =
        (&parameters).try_into().map_err(fault(path, "prepare the header"))?;
    device
        .context_handle()
        // No UUID given: a random one, so that no two disks have the same (protocols/kcrypt.md §11.2).
        .format(
            EncryptionFormat::Luks2,
            CIPHER,
            None,
            Either::Right(KEY_BYTES),
            Some(&mut parameters),
        )
        .map_err(fault(path, "make the LUKS2 header"))?;
    device
        .keyslot_handle()
        .add_by_key(Some(MACHINE_SLOT), None, plan.passphrase, CryptVolumeKey::empty())
        .map_err(fault(path, "add the machine's keyslot"))?;
    device
        .luks2_flag_handle::<CryptActivate>()
        // As Kairos sets it (protocols/kcrypt.md §11.2).
        .persistent_flags_set(CryptActivate::ALLOW_DISCARDS)
        .map_err(fault(path, "allow discards"))?;
    device
        .token_handle()
        .json_set(TokenInput::AddToken(&plan.token))
        .map_err(fault(path, "write the latchkey token"))?;
    Ok(device)
}

fn reencryption(layout: &Layout, flags: CryptReencrypt) -> CryptParamsReencrypt {
    let begins = flags.contains(CryptReencrypt::INITIALIZE_ONLY);
    CryptParamsReencrypt {
        mode: CryptReencryptModeInfo::Encrypt,
        direction: CryptReencryptDirectionInfo::Backward,
        // The source of a zone stays untouched until the header says that the zone is done.
        resilience: "datashift".to_owned(),
        hash: "sha256".to_owned(),
        data_shift: layout.shift / u64::from(SECTOR),
        max_hotzone_size: 0,
        // Keeps libcryptsetup away from our copy at the end; later it knows by itself.
        device_size: if begins { layout.moved / u64::from(SECTOR) } else { 0 },
        luks2: begins.then_some(CryptParamsLuks2 {
            pbkdf: None,
            integrity: None,
            integrity_params: None,
            data_alignment: 0,
            data_device: None,
            sector_size: SECTOR,
            label: None,
            subsystem: None,
        }),
        flags,
    }
}

fn machine_kdf() -> CryptPbkdfType {
    CryptPbkdfType {
        type_: CryptKdf::Pbkdf2,
        hash: Some("sha256".to_owned()),
        time_ms: 0,
        iterations: MACHINE_ITERATIONS,
        max_memory_kb: 0,
        parallel_threads: 0,
        flags: CryptPbkdf::NO_BENCHMARK,
    }
}

/// argon2id, of no more memory than a recovery on this machine will have.
fn recovery_kdf() -> CryptPbkdfType {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(4);
    CryptPbkdfType {
        type_: CryptKdf::Argon2Id,
        hash: Some("sha256".to_owned()),
        time_ms: 0,
        iterations: RECOVERY_ITERATIONS,
        max_memory_kb: recovery_memory(&meminfo),
        parallel_threads: u32::try_from(threads).unwrap_or(1),
        flags: CryptPbkdf::NO_BENCHMARK,
    }
}

/// In KiB: a quarter of the machine's memory, since a rescue system may have half of it full, and half of what is available now,
/// since it is needed now. Of `/proc/meminfo` (proc_meminfo(5)).
fn recovery_memory(meminfo: &str) -> u32 {
    let kib = |name: &str| -> Option<u64> {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.split_whitespace().next()?.parse().ok()
    };
    let quarter = kib("MemTotal").unwrap_or_default() / 4;
    let half = kib("MemAvailable").map_or(quarter, |available| available / 2);
    let bounded = quarter.min(half).clamp(RECOVERY_MEMORY_KIB.0, RECOVERY_MEMORY_KIB.1);
    u32::try_from(bounded).unwrap_or(u32::MAX)
}

/// A file in memory that libcryptsetup can open by name.
pub(super) struct Memory {
    file: File,
    path: PathBuf,
}

impl Memory {
    fn new(bytes: u64) -> Result<Self, EncryptError> {
        let fd: OwnedFd = memfd_create("luks2 header", MFdFlags::MFD_CLOEXEC)
            .map_err(|e| EncryptError::Memory(e.into()))?;
        let file = File::from(fd);
        file.set_len(bytes).map_err(EncryptError::Memory)?;
        let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
        Ok(Self { file, path })
    }

    /// As large as the device, with a copy of its metadata.
    pub(super) fn of_header(device: &Device) -> Result<Self, EncryptError> {
        let memory = Self::new(device.size())?;
        let metadata = device.read_up_to(0, MAX_METADATA)?;
        memory.file.write_all_at(&metadata, 0).map_err(EncryptError::Memory)?;
        Ok(memory)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    fn read(&self, bytes: u64) -> Result<Vec<u8>, EncryptError> {
        let mut content = vec![0; usize::try_from(bytes).unwrap_or(usize::MAX)];
        self.file.read_exact_at(&mut content, 0).map_err(EncryptError::Memory)?;
        Ok(content)
    }
}

struct Watch<'p> {
    progress: &'p mut dyn FnMut(Progress),
}

/// Never asks to stop: whoever wants to stop kills the process, and runs again.
fn report(size: u64, done: u64, watch: Option<&mut Watch<'_>>) -> i32 {
    if let Some(watch) = watch {
        (watch.progress)(Progress::Encrypting { done, of: size });
    }
    0
}

c_progress_callback!(on_progress, Watch<'_>, report);

fn fault(path: &Path, what: &'static str) -> impl FnOnce(LibcryptErr) -> EncryptError {
    let path = path.to_owned();
    move |source| EncryptError::Cryptsetup { path, what, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recovery_takes_a_fraction_of_the_machines_memory() {
        let meminfo = |total: u64, available: u64| {
            format!("MemTotal: {total} kB\nMemFree: 5 kB\nMemAvailable:   {available} kB\n")
        };
        for (total, available, kib) in [
            (16 << 20, 15 << 20, 1 << 20),
            (2 << 20, 2 << 20, 512 << 10),
            (512 << 10, 500 << 10, 128 << 10),
            // An installer whose memory is full of what it installs.
            (2 << 20, 300 << 10, 150 << 10),
            (100, 100, 32),
        ] {
            assert_eq!(recovery_memory(&meminfo(total, available)), kib, "{total} {available}");
        }
        assert_eq!(recovery_memory("MemTotal: 4000 kB\n"), 1000);
        assert_eq!(recovery_memory(""), 32);
    }
}
