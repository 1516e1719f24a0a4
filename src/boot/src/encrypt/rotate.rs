//! Changes the machine's key of a volume. The old one stays until the new one has opened the volume, and at any time one of them
//! does:
//!
//! ```text
//!            keyslot 0   keyslot `next`   token
//! begin      old         –                keyslots 0, next 2
//!            old         new              keyslots 0, next 2      what unlocks tries both
//! finish     –           new              keyslots –, next 2
//!            new         new              keyslots 0, next 2
//!            new         –                keyslots 0
//! ```
//!
//! It ends in keyslot 0 because Kairos opens no other. A header is written twice and its first copy last (LUKS2), so a power cut
//! leaves one of these rows.

use std::path::Path;

use super::EncryptError;
use super::volume::{MACHINE_SLOT, RECOVERY_SLOT, Volume};
use crate::luks::VolumeKey;
use crate::token::{self, Unlock};

/// LUKS2 has places for 32 keyslots; the first two have their meaning.
const NEXT_SLOTS: std::ops::Range<u32> = 2..32;

/// Makes `new` a key of the machine, beside the present one. `key` is the volume key, from whoever could open it. What an earlier
/// run began with another passphrase is replaced.
///
/// # Errors
/// See [`EncryptError`]; the present keys are as they were.
pub fn begin(device: &Path, unlock: Unlock, key: &[u8], new: &[u8]) -> Result<(), EncryptError> {
    let mut volume = Volume::load(device)?;
    if opened_by(&mut volume, new)?.is_some() {
        return Ok(());
    }
    let metadata = volume.metadata()?;
    let (number, token) = match metadata.token() {
        Some((number, token)) => (Some(number), token.clone()),
        None => (None, token::encode(unlock, None)),
    };
    // What somebody else may have written there is not to cost him, say, the recovery key.
    let next = match token::next(&token).filter(|next| NEXT_SLOTS.contains(next)) {
        Some(next) => next,
        None => NEXT_SLOTS
            .clone()
            .find(|slot| !metadata.has_keyslot(*slot))
            .ok_or_else(|| EncryptError::NoFreeSlot { path: device.to_owned() })?,
    };
    // The token first: a slot that it does not name might be anybody's.
    let token = token::with_next(&token, Some(next));
    match number {
        Some(number) => volume.set_token(number, &token)?,
        None => volume.add_token(&token)?,
    }
    if metadata.has_keyslot(next) {
        volume.remove_slot(next)?;
    }
    volume.add_machine_slot(next, key, new)?;
    prove(device, next, key, new)
}

/// What is in a header is not what was asked for until it has been read back.
fn prove(device: &Path, slot: u32, key: &[u8], new: &[u8]) -> Result<(), EncryptError> {
    let found = Volume::load(device)?.key_in(slot, new)?;
    if found.is_some_and(|found| found.as_slice() == key) {
        return Ok(());
    }
    let what = "the keyslot of the new passphrase";
    Err(EncryptError::Verify { path: device.to_owned(), what })
}

/// Makes `new`, which [`begin`] has put beside the old one, the machine's only key.
///
/// # Errors
/// [`EncryptError::WrongPassphrase`] when it is not there; see [`EncryptError`].
pub fn finish(device: &Path, new: &[u8]) -> Result<(), EncryptError> {
    let mut volume = Volume::load(device)?;
    let wrong = || EncryptError::WrongPassphrase { path: device.to_owned() };
    let key = opened_by(&mut volume, new)?.ok_or_else(wrong)?;
    if volume.key_in(MACHINE_SLOT, new)?.is_none() {
        let metadata = volume.metadata()?;
        if metadata.has_keyslot(MACHINE_SLOT) {
            volume.remove_slot(MACHINE_SLOT)?;
        }
        volume.add_machine_slot(MACHINE_SLOT, &key, new)?;
        if metadata.has_keyslot(RECOVERY_SLOT) {
            volume.prefer_machine_slot()?;
        }
        prove(device, MACHINE_SLOT, &key, new)?;
    }
    forget_others(device)
}

/// Keyslot 0 has the new key: whatever else was the machine's goes.
fn forget_others(device: &Path) -> Result<(), EncryptError> {
    let mut volume = Volume::load(device)?;
    let metadata = volume.metadata()?;
    let Some((number, token)) = metadata.token() else { return Ok(()) };
    let others = token::keyslots(token).into_iter().filter(|slot| *slot != MACHINE_SLOT);
    let others: Vec<u32> = others.filter(|slot| metadata.has_keyslot(*slot)).collect();
    let (next, last) = (token::next(token), token::of_slot_0(token));
    let before = token::with_next(&last, next);
    if before != *token {
        volume.set_token(number, &before)?;
    }
    for slot in others {
        volume.remove_slot(slot)?;
    }
    if last != before { volume.set_token(number, &last) } else { Ok(()) }
}

/// Whether [`begin`] has put this very passphrase beside the present one.
///
/// # Errors
/// See [`EncryptError`].
pub fn is_begun_with(device: &Path, new: &[u8]) -> Result<bool, EncryptError> {
    let mut volume = Volume::load(device)?;
    let metadata = volume.metadata()?;
    let next = metadata.token().and_then(|(_, token)| token::next(token));
    match next.filter(|next| metadata.has_keyslot(*next)) {
        Some(next) => Ok(volume.key_in(next, new)?.is_some()),
        None => Ok(false),
    }
}

/// The volume key, if the passphrase is that of one of the machine's keyslots.
fn opened_by(volume: &mut Volume, passphrase: &[u8]) -> Result<Option<VolumeKey>, EncryptError> {
    let metadata = volume.metadata()?;
    let slots =
        metadata.token().map_or_else(|| vec![MACHINE_SLOT], |(_, token)| token::keyslots(token));
    for slot in slots.into_iter().filter(|slot| metadata.has_keyslot(*slot)) {
        if let Some(key) = volume.key_in(slot, passphrase)? {
            return Ok(Some(key));
        }
    }
    Ok(None)
}

/// Whether a keyslot is there that is not the machine's: a recovery key, or one of an operator.
///
/// # Errors
/// [`EncryptError::Header`].
pub fn has_other_key(device: &Path) -> Result<bool, EncryptError> {
    let metadata = Volume::load(device)?.metadata()?;
    let ours =
        metadata.token().map_or_else(|| vec![MACHINE_SLOT], |(_, token)| token::keyslots(token));
    Ok((0..NEXT_SLOTS.end).any(|slot| metadata.has_keyslot(slot) && !ours.contains(&slot)))
}
