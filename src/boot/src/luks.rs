//! Opening a LUKS2 volume: which key slot, which key, and what the kernel is told (libcryptsetup).

use std::path::Path;

use libcryptsetup_rs::consts::flags::{CryptActivate, CryptDeactivate};
use libcryptsetup_rs::consts::vals::{CryptKdf, EncryptionFormat, KeyslotInfo};
use libcryptsetup_rs::{CryptDevice, CryptInit, LibcryptErr};
use serde_json::Value;
use zeroize::Zeroizing;

use crate::disk::Volume;
use crate::{BootError, token, verify};

/// The key that encrypts the data, as only whoever opened the volume has it.
pub type VolumeKey = Zeroizing<Vec<u8>>;

/// LUKS2 has 32 places for key slots.
const MAX_SLOTS: u32 = 32;
/// The largest volume key: AES-256-XTS has 64 bytes.
const MAX_VOLUME_KEY: usize = 128;

/// Whose passphrase it is; the slots are tried in an order that suits it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Released by TPM or key server: the machine's slot first, then cheap ones.
    Machine,
    /// Typed by a person: every other slot first.
    Person,
}

impl std::fmt::Display for Origin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Machine => "passphrase that was released",
            Self::Person => "passphrase that was typed",
        })
    }
}

impl Origin {
    /// A Go server of generation 2 enrols whoever it does not know, at any time (`protocols/kcrypt.md` §7.4).
    pub(crate) fn advice(self) -> &'static str {
        match self {
            Self::Machine => {
                ". It is another one than at the installation: if the key server was moved, or forgot this machine, it may have enrolled it anew; give it back the old Secret"
            }
            Self::Person => "",
        }
    }
}

/// Opens `volume` as `/dev/mapper/<mapper>`, checks that what opened is what was meant, and returns
/// its volume key. What fails that check is closed again.
///
/// # Errors
/// [`BootError::WrongPassphrase`] when no slot takes it, [`BootError::Untrusted`] for what is not as
/// it should be, [`BootError::Cryptsetup`] for the rest.
pub fn open(
    volume: &Volume,
    label: &str,
    mapper: &str,
    passphrase: &[u8],
    origin: Origin,
) -> Result<VolumeKey, BootError> {
    let (mut device, slot, key) = unlock(volume, label, passphrase, origin)?;
    if verify::mapping(volume, mapper).is_some() {
        log::info!("/dev/mapper/{mapper} is there already");
        return verify::opened(volume, label, mapper).map(|()| key);
    }
    activate(&mut device, mapper, slot, &key, passphrase)
        .map_err(fail(volume, "mapping the volume"))?;
    if let Err(error) = verify::opened(volume, label, mapper) {
        let closed = device.activate_handle().deactivate(mapper, CryptDeactivate::empty());
        if let Err(error) = closed {
            log::error!("/dev/mapper/{mapper} cannot be closed again: {error}");
        }
        return Err(error);
    }
    Ok(key)
}

/// The volume key, by whichever of the slots takes the passphrase. Nothing is mapped.
///
/// # Errors
/// As [`open`].
pub fn key(
    volume: &Volume,
    label: &str,
    passphrase: &[u8],
    origin: Origin,
) -> Result<VolumeKey, BootError> {
    unlock(volume, label, passphrase, origin).map(|(_, _, key)| key)
}

fn unlock(
    volume: &Volume,
    label: &str,
    passphrase: &[u8],
    origin: Origin,
) -> Result<(CryptDevice, u32, VolumeKey), BootError> {
    let (mut device, metadata) = trusted(volume, label)?;
    let ours = token::find(&metadata).map(|(_, token)| token);
    if ours.is_some_and(is_unfinished) {
        return Err(BootError::HalfEncrypted {
            label: label.to_owned(),
            device: volume.device.clone(),
        });
    }
    let machine = machine_slots(ours);
    let key = match_slot(&mut device, &machine, passphrase, origin)
        .map_err(fail(volume, "unlocking a key slot"))?;
    let Some((slot, key)) = key else {
        return Err(BootError::WrongPassphrase {
            label: label.to_owned(),
            device: volume.device.clone(),
            origin,
        });
    };
    log::debug!("{}: key slot {slot} takes the passphrase", volume.device.display());
    Ok((device, slot, key))
}

/// What a header says of how its volume is opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// As `encrypt` noted it (`offline`, `online`); `None` where another program made the volume.
    pub unlocked_by: Option<String>,
    /// It says on which machine it was enrolled.
    pub is_marked: bool,
    /// `encrypt` has not come to its end here.
    pub is_unfinished: bool,
    pub slots: Vec<Slot>,
}

/// A key slot that is in use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slot {
    pub number: u32,
    pub is_machines: bool,
    pub kdf: &'static str,
    pub iterations: u32,
    /// What deriving its key takes; 0 for pbkdf2.
    pub memory_kib: u64,
}

impl std::fmt::Display for Slot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { number, kdf, iterations, memory_kib, .. } = self;
        write!(f, "slot {number}: {kdf}, {iterations} iterations")?;
        if *memory_kib > 0 {
            write!(f, ", {} MiB", memory_kib >> 10)?;
        }
        f.write_str(if self.is_machines { " (the machine's)" } else { "" })
    }
}

/// Reads a LUKS2 header.
///
/// # Errors
/// [`BootError::Cryptsetup`]; [`BootError::Untrusted`] for a header that makes the encryption void.
pub fn inspect(volume: &Volume, label: &str) -> Result<Header, BootError> {
    let (mut device, metadata) = trusted(volume, label)?;
    let ours = token::find(&metadata).map(|(_, token)| token);
    let machine = machine_slots(ours);
    let slots = slot_order(&mut device, &machine, Origin::Machine);
    let slots = slots.into_iter().map(|number| {
        let kdf = device.keyslot_handle().get_pbkdf(number).ok();
        Slot {
            number,
            is_machines: machine.contains(&number),
            kdf: match kdf.as_ref().map(|kdf| &kdf.type_) {
                Some(CryptKdf::Pbkdf2) => "pbkdf2",
                Some(CryptKdf::Argon2I) => "argon2i",
                Some(CryptKdf::Argon2Id) => "argon2id",
                None => "unknown",
            },
            iterations: kdf.as_ref().map_or(0, |kdf| kdf.iterations),
            memory_kib: kdf.as_ref().map_or(0, |kdf| kdf.max_memory_kb.into()),
        }
    });
    let slots = slots.collect();
    let unlocked_by = ours.and_then(|token| token.get("unlock")?.as_str());
    Ok(Header {
        unlocked_by: unlocked_by.map(str::to_owned),
        is_marked: ours.and_then(token::mac).is_some(),
        is_unfinished: ours.is_some_and(is_unfinished),
        slots,
    })
}

/// The key slot that takes the machine's passphrase; nothing is mapped.
///
/// # Errors
/// As [`open`].
pub fn takes(volume: &Volume, label: &str, passphrase: &[u8]) -> Result<u32, BootError> {
    unlock(volume, label, passphrase, Origin::Machine).map(|(_, slot, _)| slot)
}

/// The header, once it is known that it does not make the encryption void, and its metadata.
fn trusted(volume: &Volume, label: &str) -> Result<(CryptDevice, Value), BootError> {
    let mut device = load(&volume.device).map_err(fail(volume, "reading the LUKS2 header"))?;
    let mut status = device.status_handle();
    let uuid = status.get_uuid().map_err(fail(volume, "reading its UUID"))?.to_string();
    let metadata = status.dump_json().map_err(fail(volume, "reading its metadata"))?;
    verify::header(volume, label, &uuid, &metadata)?;
    Ok((device, metadata))
}

fn activate(
    device: &mut CryptDevice,
    mapper: &str,
    slot: u32,
    key: &[u8],
    passphrase: &[u8],
) -> Result<(), LibcryptErr> {
    let flags = || CryptActivate::KEYRING_KEY;
    let mut handle = device.activate_handle();
    if handle.activate_by_volume_key(Some(mapper), Some(key), flags()).is_ok() {
        return Ok(());
    }
    // A volume that `cryptsetup reencrypt` is at work on has two keys; libcryptsetup maps it only by
    // a passphrase.
    handle.activate_by_passphrase(Some(mapper), Some(slot), passphrase, flags()).map(drop)
}

fn fail(volume: &Volume, operation: &'static str) -> impl FnOnce(LibcryptErr) -> BootError {
    let device = volume.device.clone();
    move |error| BootError::Cryptsetup { operation, device, error: error.to_string() }
}

fn load(path: &Path) -> Result<CryptDevice, LibcryptErr> {
    let mut device = CryptInit::init(path)?;
    device.context_handle().load::<()>(Some(EncryptionFormat::Luks2), None)?;
    Ok(device)
}

/// The slot that takes the passphrase, and the volume key in it.
fn match_slot(
    device: &mut CryptDevice,
    machine: &[u32],
    passphrase: &[u8],
    origin: Origin,
) -> Result<Option<(u32, VolumeKey)>, LibcryptErr> {
    let mut failure = None;
    for slot in slot_order(device, machine, origin) {
        let mut key = Zeroizing::new(vec![0; MAX_VOLUME_KEY]);
        match device.volume_key_handle().get(Some(slot), &mut key, Some(passphrase)) {
            Ok((_, length)) => {
                key.truncate(length);
                return Ok(Some((slot, key)));
            }
            Err(error) if is_wrong_passphrase(&error) => {}
            // One slot that is damaged, or that a power cut left unfinished, is no reason to leave the others untried.
            Err(error) => failure = Some(error),
        }
    }
    failure.map_or(Ok(None), Err)
}

/// Never "any slot": libcryptsetup would go by priority and number and do the slow, memory-hard
/// slot of a recovery passphrase before the machine's (`anchors/unlock.md` §0.1 no. 4).
fn slot_order(device: &mut CryptDevice, machine: &[u32], origin: Origin) -> Vec<u32> {
    let mut slots = Vec::new();
    for slot in 0..MAX_SLOTS {
        let status = device.keyslot_handle().status(slot);
        if matches!(status, Ok(KeyslotInfo::Active | KeyslotInfo::ActiveLast)) {
            let kdf = device.keyslot_handle().get_pbkdf(slot).map(|kdf| kdf.type_);
            slots.push((!machine.contains(&slot), !matches!(kdf, Ok(CryptKdf::Pbkdf2)), slot));
        }
    }
    match origin {
        Origin::Machine => slots.sort_unstable(),
        Origin::Person => {
            slots.sort_unstable_by_key(|(other, costly, slot)| (!other, *costly, *slot))
        }
    }
    slots.into_iter().map(|(_, _, slot)| slot).collect()
}

/// Whether `encrypt` has not come to its end here. It keeps a copy of the beginning until then, and
/// would put that back over what is written in the meantime.
fn is_unfinished(token: &Value) -> bool {
    token.get("unfinished").is_some()
}

/// The slots that our token names: two while the machine's key is being changed. Without a token, slot 0, which is Kairos'
/// only one.
fn machine_slots(token: Option<&Value>) -> Vec<u32> {
    token.map_or_else(|| vec![0], token::keyslots)
}

/// libcryptsetup answers EPERM when the slot does not take the passphrase, and ENOENT when there is
/// nothing in it to take one.
fn is_wrong_passphrase(error: &LibcryptErr) -> bool {
    use nix::libc::{ENOENT, EPERM};
    matches!(error, LibcryptErr::IOError(io) if matches!(io.raw_os_error(), Some(EPERM | ENOENT)))
}
