//! What a LUKS2 header says: its binary part (LUKS2 On-Disk Format 1.1.1 §2.1) and, by way of libcryptsetup, its JSON (§3).

use serde_json::Value;

use crate::token;

const MAGIC: &[u8; 6] = b"LUKS\xba\xbe";
/// The second copy's.
const SECONDARY_MAGIC: &[u8; 6] = b"SKUL\xba\xbe";
/// Where the second copy is when metadata areas have their usual 16 KiB; we make no others.
pub(super) const SECONDARY: u64 = 0x4000;

/// The fields of the binary header that tell headers apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct BinaryHeader {
    /// Goes up with each change.
    pub(super) seqid: u64,
    pub(super) label: String,
    pub(super) uuid: String,
}

impl BinaryHeader {
    /// `None`: no LUKS2 header. The checksum is libcryptsetup's affair.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        has_magic(bytes).then(|| Self::parse_copy(bytes))?
    }

    /// Of either copy.
    pub(super) fn parse_copy(bytes: &[u8]) -> Option<Self> {
        let version = bytes.get(6..8)?;
        let magic = has_magic(bytes) || has_secondary_magic(bytes);
        (magic && version == [0, 2]).then_some(())?;
        Some(Self {
            seqid: u64::from_be_bytes(*bytes.get(0x10..)?.first_chunk()?),
            label: text(bytes.get(0x18..0x48)?),
            uuid: text(bytes.get(0xa8..0xd0)?),
        })
    }
}

pub(super) fn has_magic(bytes: &[u8]) -> bool {
    bytes.starts_with(MAGIC)
}

pub(super) fn has_secondary_magic(bytes: &[u8]) -> bool {
    bytes.starts_with(SECONDARY_MAGIC)
}

fn text(field: &[u8]) -> String {
    let end = field.iter().position(|byte| *byte == 0).unwrap_or(field.len());
    String::from_utf8_lossy(field.get(..end).unwrap_or_default()).into_owned()
}

/// The parts of the JSON we go by.
#[derive(Debug, Clone)]
pub(super) struct Metadata(pub(super) Value);

/// Flags of segments that say how it was and how it will be, not how it is.
const BACKUPS: [&str; 3] = ["backup-previous", "backup-final", "backup-moved-segment"];

/// How far an encryption in place is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reencryption {
    None,
    /// Between two zones.
    Clean,
    /// All is encrypted, only the header does not say so yet: see [`super::closing`].
    Unclosed,
    /// Within a zone: that one has to be recovered first.
    Crashed {
        /// It is the last zone, whose source is the moved first part.
        moved: bool,
    },
}

impl Metadata {
    pub(super) fn reencryption(&self) -> Reencryption {
        let required = self.0.pointer("/config/requirements/mandatory").and_then(Value::as_array);
        let flagged = required.into_iter().flatten().filter_map(Value::as_str);
        if !flagged.into_iter().any(|name| name.starts_with("online-reencrypt")) {
            return Reencryption::None;
        }
        let segments = self.0.get("segments").and_then(Value::as_object);
        let mut segments = segments.into_iter().flatten();
        let backup = |segment: &Value| BACKUPS.iter().any(|flag| has_flag(segment, flag));
        let mut current = segments.clone().filter(|(_, segment)| !backup(segment));
        if let Some((number, _)) =
            segments.find(|(_, segment)| has_flag(segment, "in-reencryption"))
        {
            return Reencryption::Crashed { moved: number == "0" };
        }
        if current.all(|(_, segment)| segment.get("type").is_some_and(|kind| kind == "crypt")) {
            Reencryption::Unclosed
        } else {
            Reencryption::Clean
        }
    }

    pub(super) fn has_keyslot(&self, slot: u32) -> bool {
        self.0.get("keyslots").and_then(|slots| slots.get(slot.to_string())).is_some()
    }

    /// PBKDF2 iterations of the digest of the data's key.
    pub(super) fn digest_iterations(&self) -> Option<u64> {
        let digests = self.0.get("digests")?.as_object()?;
        digests.values().filter_map(|digest| digest.get("iterations")?.as_u64()).max()
    }

    /// Number and content of our token.
    pub(super) fn token(&self) -> Option<(u32, &Value)> {
        token::find(&self.0)
    }
}

fn has_flag(segment: &Value, flag: &str) -> bool {
    let flags = segment.get("flags").and_then(Value::as_array);
    flags.is_some_and(|flags| flags.iter().any(|name| name == flag))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_binary_header_has_seqid_label_and_uuid_at_their_places() {
        let mut bytes = vec![0; 512];
        bytes[..6].copy_from_slice(MAGIC);
        bytes[7] = 2;
        bytes[0x17] = 9;
        bytes[0x18..0x1f].copy_from_slice(b"COS_OEM");
        bytes[0xa8..0xac].copy_from_slice(b"uuid");
        let header = BinaryHeader::parse(&bytes).unwrap();
        assert_eq!(header, BinaryHeader { seqid: 9, label: "COS_OEM".into(), uuid: "uuid".into() });
        bytes[7] = 1;
        assert_eq!(BinaryHeader::parse(&bytes), None);
        assert_eq!(BinaryHeader::parse(b"LUKS\xba\xbe\0\x02"), None);
        assert_eq!(BinaryHeader::parse(&[]), None);
    }

    #[test]
    fn the_state_of_an_encryption_is_in_requirement_and_segment_flags() {
        let metadata = |required: Value, segments: Value| {
            Metadata(
                json!({"config": {"requirements": {"mandatory": required}}, "segments": segments}),
            )
        };
        let done =
            json!({"0": {"type": "crypt"}, "1": {"type": "linear", "flags": ["backup-previous"]}});
        let plain = json!({"0": {"type": "linear"}, "1": {"type": "crypt"}});
        let hot = |number: &str| json!({number: {"type": "crypt", "flags": ["in-reencryption"]}, "9": {"flags": ["backup-final"]}});
        let flag = json!(["online-reencrypt-v2"]);
        assert_eq!(Metadata(json!({})).reencryption(), Reencryption::None);
        assert_eq!(metadata(json!([]), plain.clone()).reencryption(), Reencryption::None);
        assert_eq!(metadata(flag.clone(), plain).reencryption(), Reencryption::Clean);
        assert_eq!(metadata(flag.clone(), done).reencryption(), Reencryption::Unclosed);
        assert_eq!(
            metadata(flag.clone(), hot("1")).reencryption(),
            Reencryption::Crashed { moved: false }
        );
        assert_eq!(metadata(flag, hot("0")).reencryption(), Reencryption::Crashed { moved: true });
    }
}
