//! Block devices by what is written at their beginning: LUKS2 volumes and ext file systems, found
//! through sysfs and by reading, without udev and without `blkid`.
//!
//! LUKS2 On-Disk Format 1.1.3 §2.1; ext4's super block as `Documentation/filesystems/ext4` has it.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use crate::gpt;

/// A block device with something we know on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// `/dev/sda3`.
    pub device: PathBuf,
    pub content: Content,
}

/// What the first 4 KiB of a device say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    Luks2 { label: String, uuid: String },
    Luks1,
    Ext { label: String },
    Other,
}

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

    fn is_luks_named(&self, wanted: &str) -> bool {
        matches!(&self.content, Content::Luks2 { label, .. } if same_label(label, wanted))
    }
}

/// `X` and `X_LUKS` are one partition: newer Kairos labels the container so, to tell it from the
/// file system inside (`protocols/kcrypt.md` §11.2).
#[must_use]
pub fn same_label(found: &str, wanted: &str) -> bool {
    found == wanted || found.strip_suffix("_LUKS") == Some(wanted)
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
/// system carries the same label as its container.
fn is_candidate(device: &Path) -> bool {
    let name = device.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let ignored = ["ram", "zram", "dm-", "fd", "sr"];
    !ignored.iter().any(|prefix| name.starts_with(prefix))
        && fs::metadata(device).is_ok_and(|meta| meta.file_type().is_block_device())
}

/// The LUKS2 volumes with this label.
#[must_use]
pub fn luks_labelled(volumes: &[Volume], label: &str) -> Vec<Volume> {
    volumes.iter().filter(|volume| volume.is_luks_named(label)).cloned().collect()
}

/// The unencrypted file system with this label, if there is one.
#[must_use]
pub fn plain_labelled(volumes: &[Volume], label: &str) -> Option<Volume> {
    let named = |volume: &&Volume| matches!(&volume.content, Content::Ext { label: found } if found == label);
    volumes.iter().find(named).cloned()
}

/// The partitions an installer can mean by a label: the volume that is there already, else the file
/// system, else the entry of the partition table (Kairos calls that of COS_PERSISTENT `persistent`).
#[must_use]
pub fn for_installer(volumes: &[Volume], label: &str) -> Vec<Volume> {
    let by = |is: &dyn Fn(&Volume) -> bool| -> Vec<Volume> {
        volumes.iter().filter(|volume| is(volume)).cloned().collect()
    };
    let short = label.strip_prefix("COS_").unwrap_or(label);
    let attempts: [&dyn Fn(&Volume) -> bool; 3] = [
        &|volume| volume.is_luks_named(label),
        &|volume| matches!(&volume.content, Content::Ext { label: found } if found == label),
        &|volume| {
            let name = partition_name(&volume.name());
            name == label || name.eq_ignore_ascii_case(short)
        },
    ];
    attempts.into_iter().map(by).find(|found| !found.is_empty()).unwrap_or_default()
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
    let mut head = [0; 4096];
    let mut file = File::open(device)?;
    file.seek(SeekFrom::Start(0))?;
    match file.read_exact(&mut head) {
        Ok(()) => Ok(parse_content(&head)),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(Content::Other),
        Err(error) => Err(error),
    }
}

fn parse_content(head: &[u8; 4096]) -> Content {
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
    Content::Other
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

    fn head(parts: &[(usize, &[u8])]) -> [u8; 4096] {
        let mut head = [0; 4096];
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
