//! Block devices by what is written at their beginning: LUKS2 volumes and ext file systems, found
//! through sysfs and by reading, without udev and without `blkid`.
//!
//! LUKS2 On-Disk Format 1.1.3 §2.1; ext4's super block as `Documentation/filesystems/ext4` has it.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::{gpt, token};

/// A block device with something we know on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// `/dev/sda3`.
    pub device: PathBuf,
    pub content: Content,
}

/// What the beginning of a device says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    Luks2 {
        label: String,
        uuid: String,
    },
    Luks1,
    /// ext2, ext3 or ext4.
    Ext {
        label: String,
    },
    /// Another file system, or what holds some.
    Plain {
        kind: &'static str,
        label: String,
    },
    Other,
}

/// Kairos' own installer leaves volumes that are not labelled with this, or with nothing.
const UNKNOWN: &str = "unknown";
/// btrfs has its super block at 64 KiB, and its label within 1 KiB of that.
const HEAD: usize = 0x1_0000 + 4096;
/// LUKS2's JSON area begins here (LUKS2 On-Disk Format 1.1.1 §2).
const JSON_AT: u64 = 4096;

impl Volume {
    /// The kernel's name of the device: `sda3`.
    #[must_use]
    pub fn name(&self) -> String {
        self.device.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
    }

    /// The partition's UUID in its partition table, lower case; empty where there is none.
    #[must_use]
    pub fn partition_uuid(&self) -> String {
        gpt::partition_uuid(&self.name()).unwrap_or_default()
    }

    /// The label in the LUKS2 header, of a LUKS2 volume.
    #[must_use]
    pub fn luks_label(&self) -> Option<String> {
        match &self.content {
            Content::Luks2 { label, .. } => Some(label.clone()),
            _ => None,
        }
    }

    /// The UUID in the LUKS2 header; empty for what is no LUKS2 volume.
    #[must_use]
    pub fn luks_uuid(&self) -> String {
        match &self.content {
            Content::Luks2 { uuid, .. } => uuid.clone(),
            _ => String::new(),
        }
    }

    /// Our token in the LUKS2 header, where there is one. Whether the header is whole is for libcryptsetup to say, before
    /// anything is done by it.
    #[must_use]
    pub fn token(&self) -> Option<Value> {
        let Content::Luks2 { .. } = &self.content else { return None };
        let device = File::open(&self.device).ok()?;
        let mut size = [0; 8];
        device.read_exact_at(&mut size, 8).ok()?;
        let size = usize::try_from(u64::from_be_bytes(size)).ok()?;
        let length = size.checked_sub(JSON_AT as usize).filter(|_| size <= token::MAX_METADATA)?;
        let mut area = vec![0; length];
        device.read_exact_at(&mut area, JSON_AT).ok()?;
        token::in_area(&area)
    }

    /// A volume without a label of its own goes by the partition's name, as in Kairos.
    fn is_luks_named(&self, wanted: &str) -> bool {
        match &self.content {
            Content::Luks2 { label, .. } if label.is_empty() || label == UNKNOWN => {
                is_partition_of(&self.name(), wanted)
            }
            Content::Luks2 { label, .. } => same_label(label, wanted),
            _ => false,
        }
    }

    /// Whether it is an unencrypted file system with this label.
    fn is_plain_named(&self, wanted: &str) -> bool {
        matches!(&self.content, Content::Ext { label } | Content::Plain { label, .. } if label == wanted)
    }
}

/// `/dev/sda3 (LUKS2 85c39d0f-…)`, as messages name it.
impl std::fmt::Display for Volume {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.device.display())?;
        match &self.content {
            Content::Luks2 { uuid, .. } => write!(f, " (LUKS2 {uuid})"),
            Content::Luks1 => f.write_str(" (LUKS1)"),
            Content::Ext { .. } => f.write_str(" (ext, not encrypted)"),
            Content::Plain { kind, .. } => write!(f, " ({kind}, not encrypted)"),
            Content::Other => Ok(()),
        }
    }
}

/// `X` and `X_LUKS` are one partition: newer Kairos labels the container so, to tell it from the
/// file system inside (`protocols/kcrypt.md` §11.2).
#[must_use]
pub fn same_label(found: &str, wanted: &str) -> bool {
    found == wanted || found.strip_suffix("_LUKS") == Some(wanted)
}

/// The label without the suffix of a container.
#[must_use]
pub fn plain_label(label: &str) -> &str {
    label.strip_suffix("_LUKS").unwrap_or(label)
}

/// Every block device of the machine that holds something, in the order of their names.
#[must_use]
pub fn scan() -> Vec<Volume> {
    let Ok(entries) = fs::read_dir("/sys/class/block") else { return Vec::new() };
    let mut names: Vec<_> = entries.flatten().map(|entry| entry.file_name()).collect();
    names.sort();
    names
        .into_iter()
        .map(|name| Path::new("/dev").join(name))
        .filter(|device| is_candidate(device))
        .filter_map(|device| {
            let content = read_content(&device).ok()?;
            Some(Volume { device, content })
        })
        .collect()
}

/// Ram and mapped devices are not where an installer puts partitions; an opened volume's inner file
/// system carries the same label as its container. A member of a RAID can begin with what the RAID begins with.
fn is_candidate(device: &Path) -> bool {
    let name = device.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let ignored = ["ram", "zram", "dm-", "fd", "sr"];
    !ignored.iter().any(|prefix| name.starts_with(prefix))
        && !holders(name).iter().any(|holder| holder.starts_with("md"))
        && fs::metadata(device).is_ok_and(|meta| meta.file_type().is_block_device())
}

/// The kernel's names of the devices that are made of this one.
#[must_use]
pub fn holders(name: &str) -> Vec<String> {
    let entries = fs::read_dir(Path::new("/sys/class/block").join(name).join("holders"));
    let names = entries.into_iter().flatten().flatten().map(|entry| entry.file_name());
    names.filter_map(|name| name.into_string().ok()).collect()
}

/// The LUKS2 volumes with this label.
#[must_use]
pub fn luks_labelled(volumes: &[Volume], label: &str) -> Vec<Volume> {
    volumes.iter().filter(|volume| volume.is_luks_named(label)).cloned().collect()
}

/// The unencrypted file systems with this label.
#[must_use]
pub fn plain_labelled(volumes: &[Volume], label: &str) -> Vec<Volume> {
    volumes.iter().filter(|volume| volume.is_plain_named(label)).cloned().collect()
}

/// The ext file system with this label, if there is one.
#[must_use]
pub fn ext_labelled(volumes: &[Volume], label: &str) -> Option<Volume> {
    let named = |volume: &&Volume| matches!(&volume.content, Content::Ext { label: found } if found == label);
    volumes.iter().find(named).cloned()
}

/// The partitions an installer can mean by a label: volumes and file systems that have it, else the entry of the partition
/// table (Kairos calls that of COS_PERSISTENT `persistent`).
#[must_use]
pub fn for_installer(volumes: &[Volume], label: &str) -> Vec<Volume> {
    let by = |is: &dyn Fn(&Volume) -> bool| -> Vec<Volume> {
        volumes.iter().filter(|volume| is(volume)).cloned().collect()
    };
    let labelled = by(&|volume| volume.is_luks_named(label) || volume.is_plain_named(label));
    if labelled.is_empty() {
        by(&|volume| is_partition_of(&volume.name(), label))
    } else {
        labelled
    }
}

/// Whether the partition table calls the device by this label, or by Kairos' short form of it.
fn is_partition_of(device: &str, label: &str) -> bool {
    let name = partition_name(device);
    let short = label.strip_prefix("COS_").unwrap_or(label);
    !name.is_empty() && (name == label || name.eq_ignore_ascii_case(short))
}

/// PARTNAME as the kernel read it from the partition table.
fn partition_name(device: &str) -> String {
    let uevent =
        fs::read_to_string(format!("/sys/class/block/{device}/uevent")).unwrap_or_default();
    uevent.lines().find_map(|line| line.strip_prefix("PARTNAME=")).unwrap_or_default().to_owned()
}

/// Reads what is on a device or in a file.
///
/// # Errors
/// What reading gave; a device shorter than 4 KiB is [`Content::Other`].
pub fn read_content(device: &Path) -> io::Result<Content> {
    let mut head = Vec::with_capacity(HEAD);
    File::open(device)?.take(HEAD as u64).read_to_end(&mut head)?;
    Ok(if head.len() < 4096 { Content::Other } else { parse_content(&head) })
}

/// What the first bytes of a device say.
#[must_use]
pub fn parse_content(head: &[u8]) -> Content {
    const LUKS_MAGIC: &[u8] = b"LUKS\xba\xbe";
    const EXT_MAGIC: &[u8] = &[0x53, 0xef];
    let at = |from: usize, length: usize| head.get(from..from + length).unwrap_or_default();
    if at(0, 6) == LUKS_MAGIC {
        return match at(6, 2) {
            [0, 2] => Content::Luks2 { label: text(at(24, 48)), uuid: text(at(168, 40)) },
            _ => Content::Luks1,
        };
    }
    if at(1024 + 56, 2) == EXT_MAGIC {
        return Content::Ext { label: text(at(1024 + 120, 16)) };
    }
    // Place and magic, name, place and length of the label.
    let others: [(usize, &[u8], &'static str, usize, usize); 7] = [
        (0, b"XFSB", "xfs", 108, 12),
        (0x1_0040, b"_BHRfS_M", "btrfs", 0x1_012b, 256),
        (0x8001, b"CD001", "iso9660", 0x8028, 32),
        (1024, &[0x10, 0x20, 0xf5, 0xf2], "f2fs", 0, 0),
        (0, b"hsqs", "squashfs", 0, 0),
        (512, b"LABELONE", "LVM", 0, 0),
        (54, b"FAT", "vfat", 43, 11),
    ];
    let found = others.iter().find(|(place, magic, ..)| at(*place, magic.len()) == *magic);
    found.map_or(Content::Other, |(_, _, kind, place, length)| {
        let label = text(at(*place, *length)).trim_end().to_owned();
        Content::Plain { kind, label }
    })
}

/// A NUL-padded field. What is no printable ASCII cannot be a label of ours, and shall not reach a
/// console.
fn text(field: &[u8]) -> String {
    let end = field.iter().position(|byte| *byte == 0).unwrap_or(field.len());
    let field = field.get(..end).unwrap_or_default();
    field
        .iter()
        .map(|byte| if byte.is_ascii_graphic() || *byte == b' ' { char::from(*byte) } else { '?' })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(parts: &[(usize, &[u8])]) -> Vec<u8> {
        let mut head = vec![0; HEAD];
        for (at, bytes) in parts {
            head[*at..*at + bytes.len()].copy_from_slice(bytes);
        }
        head
    }

    #[test]
    fn a_device_is_what_its_first_bytes_say() {
        let uuid = "85c39d0f-4867-5227-8334-f5eec606d9eb";
        let luks =
            head(&[(0, b"LUKS\xba\xbe\0\x02"), (24, b"COS_PERSISTENT"), (168, uuid.as_bytes())]);
        let cases = [
            (luks, Content::Luks2 { label: "COS_PERSISTENT".into(), uuid: uuid.into() }),
            (head(&[(0, b"LUKS\xba\xbe\0\x01")]), Content::Luks1),
            (
                head(&[(1080, &[0x53, 0xef]), (1144, b"COS_OEM")]),
                Content::Ext { label: "COS_OEM".into() },
            ),
            (
                head(&[(1080, &[0x53, 0xef]), (1144, &[0x1b; 16])]),
                Content::Ext { label: "?".repeat(16) },
            ),
            (
                head(&[(0, b"XFSB"), (108, b"COS_DATA")]),
                Content::Plain { kind: "xfs", label: "COS_DATA".into() },
            ),
            (
                head(&[(0x10040, b"_BHRfS_M"), (0x1012b, b"COS_PERSISTENT")]),
                Content::Plain { kind: "btrfs", label: "COS_PERSISTENT".into() },
            ),
            (
                head(&[(0x8001, b"CD001"), (0x8028, b"COS_PERSISTENT                  ")]),
                Content::Plain { kind: "iso9660", label: "COS_PERSISTENT".into() },
            ),
            (head(&[]), Content::Other),
        ];
        for (head, expected) in cases {
            assert_eq!(parse_content(&head), expected);
        }
    }

    #[test]
    fn a_label_names_its_container_with_or_without_suffix() {
        assert!(same_label("COS_PERSISTENT", "COS_PERSISTENT"));
        assert!(same_label("COS_PERSISTENT_LUKS", "COS_PERSISTENT"));
        assert!(!same_label("COS_PERSISTENT", "COS_PERSISTENT_LUKS"));
        assert!(!same_label("_LUKS", "COS_PERSISTENT"));
    }
}
