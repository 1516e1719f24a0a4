//! Where everything is on a partition that is being encrypted in place. All numbers are bytes from its beginning.
//!
//! ```text
//! before   | file system ............................ | free (room it must leave: see `room`)            |
//! during   | header | file system, one shift further up as it gets encrypted | moved | copy | record |
//! after    | header | encrypted ........................................................................ |
//!          0        shift                                          gap      moved   copy   record   size
//! ```
//!
//! `shift`: as much as the header takes; libcryptsetup moves the first `shift` bytes of the file system to `moved` and then,
//! from the end, everything up by `shift` (crypt_reencrypt(), data shift with moved first segment). `copy` is our own second copy of
//! the first `shift` bytes, and `record` says what it is for: see [`super::journal`].

use super::EncryptError;
use std::path::Path;

/// Unit of all positions: a page, the largest sector there is.
pub(super) const BLOCK: u64 = 4096;
const MIB: u64 = 1024 * 1024;
/// LUKS2's usual header: 16 MiB, room for 32 keyslots.
const SHIFT: u64 = 16 * MIB;
/// Header of a small partition (COS_OEM has 64 MiB): the least that libcryptsetup finds enough.
const SMALL_SHIFT: u64 = 4 * MIB;
const SMALL: u64 = 512 * MIB;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    /// Size of the header, offset of the encrypted data.
    pub(super) shift: u64,
    /// Where libcryptsetup puts the first `shift` bytes; also the size it is told the data has.
    pub(super) moved: u64,
    /// Where our copy of the first `shift` bytes is.
    pub(super) copy: u64,
    /// Where the undo record is, one [`BLOCK`].
    pub(super) record: u64,
}

impl Layout {
    pub(super) fn of(path: &Path, size: u64) -> Result<Self, EncryptError> {
        let shift = shift(size);
        let record = (size - size % BLOCK).checked_sub(BLOCK);
        let copy = record.and_then(|record| record.checked_sub(shift));
        let moved = copy.and_then(|copy| copy.checked_sub(shift));
        match (moved, copy, record) {
            // Two shifts of file system at least, so that there is a first and a second segment.
            (Some(moved), Some(copy), Some(record)) if moved >= 3 * shift => {
                Ok(Self { shift, moved, copy, record })
            }
            _ => Err(EncryptError::TooSmall {
                path: path.to_owned(),
                size,
                minimum: 5 * shift + BLOCK,
            }),
        }
    }

    /// From what the token says, of a partition that may have been made larger since.
    pub(super) fn from_copy(device_size: u64, copy: u64, shift: u64) -> Option<Self> {
        let moved = copy.checked_sub(shift)?;
        let record = copy.checked_add(shift)?;
        let aligned = [copy, shift].iter().all(|number| number % BLOCK == 0);
        let fits = shift > 0 && record.checked_add(BLOCK)? <= device_size;
        (aligned && fits && moved >= shift.checked_mul(3)?).then_some(Self {
            shift,
            moved,
            copy,
            record,
        })
    }

    /// Size of the largest file system that can be encrypted in place.
    pub(super) fn room(&self) -> u64 {
        self.moved.saturating_sub(self.shift)
    }
}

/// Size of the header on a partition of `size`.
pub(super) fn shift(size: u64) -> u64 {
    if size < SMALL { SMALL_SHIFT } else { SHIFT }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn areas_follow_each_other_up_to_the_end() {
        for (size, shift) in
            [(512 * MIB, SHIFT), (100 * 1024 * MIB + 512, SHIFT), (64 * MIB, SMALL_SHIFT)]
        {
            let layout = Layout::of(Path::new("x"), size).unwrap();
            assert_eq!(layout.shift, shift);
            assert_eq!(layout.room() + shift, layout.moved);
            assert_eq!(layout.moved + shift, layout.copy);
            assert_eq!(layout.copy + shift, layout.record);
            assert_eq!(layout.record + BLOCK, size - size % BLOCK);
            assert_eq!(layout.moved % BLOCK, 0);
        }
        let size = 512 * MIB;
        let layout = Layout::of(Path::new("x"), size).unwrap();
        assert_eq!(Layout::from_copy(size, layout.copy, layout.shift), Some(layout));
        assert_eq!(Layout::from_copy(size + 5, layout.copy, layout.shift), Some(layout));
        for (copy, shift) in [
            (layout.copy, 0),
            (layout.copy + BLOCK, layout.shift),
            (layout.copy + 1, layout.shift),
            (u64::MAX - BLOCK + 1, layout.shift),
            (layout.copy, u64::MAX),
            (0, layout.shift),
        ] {
            assert_eq!(Layout::from_copy(size, copy, shift), None, "{copy} {shift}");
        }
        assert_eq!(Layout::of(Path::new("x"), 20 * MIB + BLOCK).unwrap().room(), 8 * MIB);
        for size in [0, 1, BLOCK, 8 * MIB, 20 * MIB] {
            assert!(
                matches!(Layout::of(Path::new("x"), size), Err(EncryptError::TooSmall { .. })),
                "{size}"
            );
        }
    }
}
