//! The UUID of a partition in its GUID partition table (UEFI Specification 2.10 §5.3), which kcrypt
//! calls `uuid`. The kernel knows it and, before 6.10, does not tell.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

const SIGNATURE: &[u8] = b"EFI PART";
/// Entries have 128 bytes today and a power-of-two multiple of it at most; tables have 128 of them.
const MAX_ENTRY: u32 = 4096;

/// The UUID of the partition with this kernel name, or `None` where there is no GPT or no partition.
#[must_use]
pub(crate) fn partition_uuid(name: &str) -> Option<String> {
    let sys = Path::new("/sys/class/block").join(name);
    let number: u32 = read_number(&sys.join("partition"))?;
    // /sys/class/block/sda3 links to …/block/sda/sda3.
    let disk = fs::canonicalize(&sys).ok()?.parent()?.file_name()?.to_owned();
    let block =
        read_number(&Path::new("/sys/class/block").join(&disk).join("queue/logical_block_size"));
    let device = File::open(Path::new("/dev").join(&disk)).ok()?;
    entry_uuid(&device, u64::from(block.unwrap_or(512)), number)
}

fn read_number(path: &Path) -> Option<u32> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// Reads entry `number`, counted from 1, of the primary table on `disk`.
fn entry_uuid(disk: &File, block: u64, number: u32) -> Option<String> {
    let mut header = [0; 92];
    disk.read_exact_at(&mut header, block).ok()?;
    if header.get(..8)? != SIGNATURE {
        return None;
    }
    let table = u64::from_le_bytes(header.get(72..80)?.try_into().ok()?);
    let entries = u32::from_le_bytes(header.get(80..84)?.try_into().ok()?);
    let size = u32::from_le_bytes(header.get(84..88)?.try_into().ok()?);
    if number == 0 || number > entries || !(128..=MAX_ENTRY).contains(&size) {
        return None;
    }
    let at = table.checked_mul(block)?.checked_add(u64::from(number - 1) * u64::from(size))?;
    let mut guid = [0; 16];
    disk.read_exact_at(&mut guid, at.checked_add(16)?).ok()?;
    (guid != [0; 16]).then(|| format_guid(&guid))
}

/// A GUID is stored with its first three fields little-endian.
fn format_guid(guid: &[u8; 16]) -> String {
    let [a, b, c, d, e, f, g, h, rest @ ..] = *guid;
    let [i, j, k, l, m, n, o, p] = rest;
    format!(
        "{:08x}-{:04x}-{:04x}-{i:02x}{j:02x}-{k:02x}{l:02x}{m:02x}{n:02x}{o:02x}{p:02x}",
        u32::from_le_bytes([a, b, c, d]),
        u16::from_le_bytes([e, f]),
        u16::from_le_bytes([g, h]),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::process::{Command, Stdio};

    #[test]
    fn the_uuid_is_the_one_that_sfdisk_wrote() {
        let path = std::env::temp_dir().join(format!("lk-gpt-{}", std::process::id()));
        File::create(&path).unwrap().set_len(64 << 20).unwrap();
        let mut sfdisk = Command::new("sfdisk")
            .args(["-q", path.to_str().unwrap()])
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let script =
            "label: gpt\nsize=16M, name=A\nsize=16M, uuid=6D1F5C5A-3B0B-4A3C-9D5E-0123456789AB\n";
        sfdisk.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
        assert!(sfdisk.wait().unwrap().success());
        let disk = File::open(&path).unwrap();
        assert_eq!(entry_uuid(&disk, 512, 2).unwrap(), "6d1f5c5a-3b0b-4a3c-9d5e-0123456789ab");
        for number in [0, 3, 129, u32::MAX] {
            assert_eq!(entry_uuid(&disk, 512, number), None, "{number}");
        }
        assert_eq!(entry_uuid(&disk, 4096, 1), None, "another block size finds no header");
        std::fs::remove_file(path).unwrap();
    }
}
