//! Opening a LUKS2 volume: which key slot, which key, and what the kernel is told (libcryptsetup).

use std::path::Path;

use libcryptsetup_rs::consts::flags::CryptActivate;
use libcryptsetup_rs::consts::vals::{CryptKdf, EncryptionFormat, KeyslotInfo};
use libcryptsetup_rs::{CryptDevice, CryptInit, LibcryptErr};
use serde_json::Value;
use zeroize::Zeroizing;

use crate::BootError;
use crate::disk::Volume;

/// The key that encrypts the data, as only whoever opened the volume has it.
pub type VolumeKey = Zeroizing<Vec<u8>>;

/// The type of the LUKS2 token by which `encrypt` says which slot the machine's key is in.
pub const TOKEN_TYPE: &str = "latchkey";
/// LUKS2 has 32 places for key slots and 32 for tokens.
const MAX_SLOTS: u32 = 32;
const MAX_TOKENS: u32 = 32;
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

impl Origin {
    fn name(self) -> &'static str {
        match self {
            Self::Machine => "passphrase that was released",
            Self::Person => "passphrase that was typed",
        }
    }
}

/// Opens `volume` as `/dev/mapper/<mapper>` and returns its volume key.
///
/// # Errors
/// [`BootError::WrongPassphrase`] when no slot takes it, [`BootError::Cryptsetup`] for the rest.
pub fn open(
    volume: &Volume,
    label: &str,
    mapper: &str,
    passphrase: &[u8],
    origin: Origin,
) -> Result<VolumeKey, BootError> {
    let fail = |operation| {
        move |error: LibcryptErr| BootError::Cryptsetup {
            operation,
            device: volume.device.clone(),
            error: error.to_string(),
        }
    };
    let mut device = load(&volume.device).map_err(fail("reading the LUKS2 header"))?;
    if is_unfinished(&mut device) {
        return Err(BootError::HalfEncrypted {
            label: label.to_owned(),
            device: volume.device.clone(),
        });
    }
    let key = match_slot(&mut device, passphrase, origin).map_err(fail("unlocking a key slot"))?;
    let Some((slot, key)) = key else {
        return Err(BootError::WrongPassphrase {
            label: label.to_owned(),
            device: volume.device.clone(),
            origin: origin.name(),
        });
    };
    log::debug!("{}: key slot {slot} takes the passphrase", volume.device.display());
    if is_mapped(volume, mapper) {
        log::info!("/dev/mapper/{mapper} is there already");
        return Ok(key);
    }
    let activated = device.activate_handle().activate_by_volume_key(
        Some(mapper),
        Some(&key),
        CryptActivate::KEYRING_KEY,
    );
    if activated.is_err() {
        // A volume that `cryptsetup reencrypt` is at work on has two keys; libcryptsetup maps it
        // only by a passphrase.
        device
            .activate_handle()
            .activate_by_passphrase(
                Some(mapper),
                Some(slot),
                passphrase,
                CryptActivate::KEYRING_KEY,
            )
            .map_err(fail("mapping the volume"))?;
    }
    Ok(key)
}

/// How `encrypt` said that the volume is unlocked (`offline`, `online`); `None` where it did not make the volume.
#[must_use]
pub fn unlocked_by(device: &Path) -> Option<String> {
    let token = our_token(&mut load(device).ok()?)?;
    token.get("unlock")?.as_str().map(str::to_owned)
}

/// Whether an earlier run, or another program, has mapped this very device under this name.
fn is_mapped(volume: &Volume, mapper: &str) -> bool {
    let holders = Path::new("/sys/class/block").join(volume.name()).join("holders");
    let Ok(entries) = std::fs::read_dir(holders) else { return false };
    entries.flatten().any(|holder| {
        let name = std::fs::read_to_string(holder.path().join("dm/name"));
        name.is_ok_and(|name| name.trim_end() == mapper)
    })
}

fn load(path: &Path) -> Result<CryptDevice, LibcryptErr> {
    let mut device = CryptInit::init(path)?;
    device.context_handle().load::<()>(Some(EncryptionFormat::Luks2), None)?;
    Ok(device)
}

/// The slot that takes the passphrase, and the volume key in it.
fn match_slot(
    device: &mut CryptDevice,
    passphrase: &[u8],
    origin: Origin,
) -> Result<Option<(u32, VolumeKey)>, LibcryptErr> {
    for slot in slot_order(device, origin) {
        let mut key = Zeroizing::new(vec![0; MAX_VOLUME_KEY]);
        match device.volume_key_handle().get(Some(slot), &mut key, Some(passphrase)) {
            Ok((_, length)) => {
                key.truncate(length);
                return Ok(Some((slot, key)));
            }
            Err(error) if is_wrong_passphrase(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

/// Never "any slot": libcryptsetup would go by priority and number and do the slow, memory-hard
/// slot of a recovery passphrase before the machine's (`anchors/unlock.md` §0.1 no. 4).
fn slot_order(device: &mut CryptDevice, origin: Origin) -> Vec<u32> {
    let machine = machine_slot(device);
    let mut slots = Vec::new();
    for slot in 0..MAX_SLOTS {
        let status = device.keyslot_handle().status(slot);
        if matches!(status, Ok(KeyslotInfo::Active | KeyslotInfo::ActiveLast)) {
            let kdf = device.keyslot_handle().get_pbkdf(slot).map(|kdf| kdf.type_);
            slots.push((Some(slot) != machine, !matches!(kdf, Ok(CryptKdf::Pbkdf2)), slot));
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
fn is_unfinished(device: &mut CryptDevice) -> bool {
    our_token(device).is_some_and(|token| token.get("unfinished").is_some())
}

fn our_token(device: &mut CryptDevice) -> Option<Value> {
    (0..MAX_TOKENS)
        .filter_map(|token| device.token_handle().json_get(token).ok())
        .find(|token| token.get("type").and_then(Value::as_str) == Some(TOKEN_TYPE))
}

/// The slot that our token names; without a token, slot 0, which is Kairos' only one.
fn machine_slot(device: &mut CryptDevice) -> Option<u32> {
    our_token(device).map_or(Some(0), |token| token.get("keyslots")?.get(0)?.as_str()?.parse().ok())
}

/// libcryptsetup answers EPERM when the slot does not take the passphrase, and ENOENT when there is
/// nothing in it to take one.
fn is_wrong_passphrase(error: &LibcryptErr) -> bool {
    use nix::libc::{ENOENT, EPERM};
    matches!(error, LibcryptErr::IOError(io) if matches!(io.raw_os_error(), Some(EPERM | ENOENT)))
}
