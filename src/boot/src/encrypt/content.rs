//! What is on the partition: the ext2/3/4 superblock (Linux Documentation/filesystems/ext4/super.rst), emptiness, and the
//! names of some others, so that a refusal can say what it found.

use std::path::Path;

use super::EncryptError;
use super::device::Device;

/// The superblock is 1024 bytes at 1024, whatever the block size.
const SUPERBLOCK: u64 = 1024;
const MAGIC: u16 = 0xef53;
/// INCOMPAT_64BIT: the block count has a high half.
const INCOMPAT_64BIT: u32 = 0x80;
/// What must be zero at both ends of a partition that is taken for empty: more than where any file system, RAID or volume
/// manager has its signature (ZFS: 256 KiB at each end; btrfs: 64 KiB; md: first 4 KiB or last 128 KiB).
const EMPTY: u64 = 4 * 1024 * 1024;

/// An ext2, ext3 or ext4 file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ext {
    /// In bytes; it begins at the partition's beginning.
    pub size: u64,
    /// May be empty.
    pub label: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Content {
    Ext(Ext),
    Empty,
    Other(&'static str),
}

pub(super) fn look(device: &Device) -> Result<Content, EncryptError> {
    if let Some(ext) = ext(device)? {
        return Ok(Content::Ext(ext));
    }
    let head = device.read_up_to(0, EMPTY)?;
    let tail = device.read_up_to(device.size().saturating_sub(EMPTY), EMPTY)?;
    if head.iter().chain(&tail).all(|byte| *byte == 0) {
        return Ok(Content::Empty);
    }
    Ok(Content::Other(name(&head)))
}

/// What the partition is a member of: LVM (label in one of the first four sectors) or an md RAID (Linux md(4): superblocks 1.1 and
/// 1.2 at the beginning, 1.0 and 0.90 at the end, where a file system or a volume begins as if it were by itself).
pub(super) fn member(device: &Device) -> Result<Option<&'static str>, EncryptError> {
    const MD: [u8; 4] = [0xfc, 0x4e, 0x2b, 0xa9];
    const SECTOR: u64 = 512;
    let has = |at: u64, magic: &[u8]| -> Result<bool, EncryptError> {
        Ok(device.read_up_to(at, magic.len() as u64)? == magic)
    };
    for sector in 0..4 {
        if has(sector * SECTOR, b"LABELONE")? {
            return Ok(Some("an LVM physical volume"));
        }
    }
    let size = device.size();
    let version_1_0 = (size / SECTOR).checked_sub(16).map(|sectors| sectors / 8 * 8 * SECTOR);
    let version_0_90 = (size / 0x1_0000 * 0x1_0000).checked_sub(0x1_0000);
    for at in [Some(0), Some(4096), version_1_0, version_0_90].into_iter().flatten() {
        if has(at, &MD)? {
            return Ok(Some("a RAID member"));
        }
    }
    Ok(None)
}

fn ext(device: &Device) -> Result<Option<Ext>, EncryptError> {
    let block = device.read_up_to(SUPERBLOCK, 1024)?;
    parse(&block, device.path(), device.size())
}

fn parse(block: &[u8], path: &Path, size: u64) -> Result<Option<Ext>, EncryptError> {
    let (Some(magic), Some(log_block), Some(low), Some(incompat), Some(high), Some(label)) = (
        u16_at(block, 0x38),
        u32_at(block, 0x18),
        u32_at(block, 0x04),
        u32_at(block, 0x60),
        u32_at(block, 0x150),
        block.get(0x78..0x88),
    ) else {
        return Ok(None);
    };
    if magic != MAGIC {
        return Ok(None);
    }
    let wrong = |why: String| EncryptError::Filesystem { path: path.to_owned(), why };
    // 1 KiB to 64 KiB.
    if log_block > 6 {
        return Err(wrong(format!("block size 2^{}", u64::from(log_block) + 10)));
    }
    let high = if incompat & INCOMPAT_64BIT == 0 { 0 } else { high };
    let blocks = u64::from(high) << 32 | u64::from(low);
    let bytes = blocks.checked_mul(1024 << log_block).filter(|bytes| *bytes > 0 && *bytes <= size);
    let Some(bytes) = bytes else {
        return Err(wrong(format!(
            "{blocks} blocks of {} bytes on a partition of {size} bytes",
            1024 << log_block
        )));
    };
    let label = label.split(|byte| *byte == 0).next().unwrap_or_default();
    Ok(Some(Ext { size: bytes, label: String::from_utf8_lossy(label).into_owned() }))
}

fn u16_at(block: &[u8], at: usize) -> Option<u16> {
    block.get(at..)?.first_chunk().map(|bytes| u16::from_le_bytes(*bytes))
}

fn u32_at(block: &[u8], at: usize) -> Option<u32> {
    block.get(at..)?.first_chunk().map(|bytes| u32::from_le_bytes(*bytes))
}

fn name(head: &[u8]) -> &'static str {
    let signatures: [(usize, &[u8], &str); 8] = [
        (0, b"XFSB", "an XFS file system"),
        (0x10040, b"_BHRfS_M", "a btrfs file system"),
        (0, b"hsqs", "a squashfs image"),
        (4086, b"SWAPSPACE2", "swap space"),
        (512, b"LABELONE", "an LVM physical volume"),
        (4096, b"\xfc\x4e\x2b\xa9", "a RAID member"),
        (3, b"NTFS    ", "an NTFS file system"),
        (510, b"\x55\xaa", "a FAT file system or a partition table"),
    ];
    let found = signatures
        .iter()
        .find(|(at, magic, _)| head.get(*at..).is_some_and(|bytes| bytes.starts_with(magic)));
    found.map_or("something that is not known", |(_, _, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn superblock(blocks: u64, log_block: u32, incompat: u32) -> Vec<u8> {
        let mut block = vec![0; 1024];
        block[0x38..0x3a].copy_from_slice(&MAGIC.to_le_bytes());
        block[0x04..0x08].copy_from_slice(&(blocks as u32).to_le_bytes());
        block[0x150..0x154].copy_from_slice(&((blocks >> 32) as u32).to_le_bytes());
        block[0x18..0x1c].copy_from_slice(&log_block.to_le_bytes());
        block[0x60..0x64].copy_from_slice(&incompat.to_le_bytes());
        block[0x78..0x86].copy_from_slice(b"COS_PERSISTENT");
        block
    }

    #[test]
    fn the_size_is_block_count_times_block_size() {
        let size = 1 << 50;
        for (blocks, log_block, incompat, bytes) in [
            (1000, 0, 0, Some(1_024_000)),
            (1000, 2, 0, Some(4_096_000)),
            (1 << 33, 2, INCOMPAT_64BIT, Some(1 << 45)),
            // Without the 64-bit feature the high half is something else.
            ((1 << 33) + 5, 2, 0, Some(5 * 4096)),
            (0, 2, 0, None),
            (1 << 40, 2, INCOMPAT_64BIT, None),
            (u64::MAX, 6, INCOMPAT_64BIT, None),
            (1000, 7, 0, None),
        ] {
            let parsed = parse(&superblock(blocks, log_block, incompat), Path::new("x"), size);
            match bytes {
                Some(bytes) => {
                    let ext = parsed.unwrap().unwrap();
                    assert_eq!((ext.size, ext.label.as_str()), (bytes, "COS_PERSISTENT"));
                }
                None => assert!(matches!(parsed, Err(EncryptError::Filesystem { .. })), "{blocks}"),
            }
        }
    }

    #[test]
    fn without_the_magic_it_is_no_ext() {
        let mut block = superblock(1000, 2, 0);
        block[0x38] = 0;
        assert_eq!(parse(&block, Path::new("x"), 1 << 50).unwrap(), None);
        assert_eq!(parse(&block[..100], Path::new("x"), 1 << 50).unwrap(), None);
    }
}
