//! That a volume is what it claims to be: its header before a key is tried, and what opened before anything is derived from it.
//!
//! A LUKS2 header is anybody's to write. One with a null cipher takes every passphrase, and what is then mapped is not
//! encrypted; one whose label was swapped with another partition's opens with the machine's key and holds other data.

use std::fs;
use std::path::{Path, PathBuf};

use libcryptsetup_rs::{CryptInit, LibcryptErr};
use serde_json::Value;

use crate::BootError;
use crate::disk::{Content, Volume, holders, read_content, same_label};

/// ext4 keeps this much of a label.
const EXT_LABEL: usize = 16;

/// Whether the header of `volume`, as libcryptsetup has read it, may be opened: with the UUID that was looked for, and nothing
/// in it that makes the passphrase or the encryption void.
///
/// # Errors
/// [`BootError::Untrusted`].
pub(crate) fn header(
    volume: &Volume,
    label: &str,
    uuid: &str,
    metadata: &Value,
) -> Result<(), BootError> {
    let untrusted = |why: String| untrusted(volume, label, why);
    if !uuid.eq_ignore_ascii_case(&volume.luks_uuid()) {
        return Err(untrusted(format!("its header changed under us, the UUID is {uuid} now")));
    }
    encryption(metadata).map_err(untrusted)
}

/// Every segment and every keyslot is encrypted, but for the segments that an encryption in place has not come to.
fn encryption(metadata: &Value) -> Result<(), String> {
    let parts = |name: &str| metadata.get(name).and_then(Value::as_object);
    let mandatory = metadata.pointer("/config/requirements/mandatory").and_then(Value::as_array);
    let flags = mandatory.into_iter().flatten().filter_map(Value::as_str);
    let in_progress = flags.into_iter().any(|flag| flag.starts_with("online-reencrypt"));
    let segments = parts("segments").filter(|all| !all.is_empty()).ok_or("it has no segment")?;
    for (number, segment) in segments {
        match segment.get("type").and_then(Value::as_str) {
            Some("crypt") => cipher(&format!("segment {number}"), segment.get("encryption"))?,
            Some("linear") if in_progress => {}
            other => {
                let kind = other.unwrap_or("nothing");
                return Err(format!("segment {number} is {kind} and not encrypted"));
            }
        }
    }
    for (number, slot) in parts("keyslots").into_iter().flatten() {
        // The slot of an encryption in place has no key in it.
        if slot.get("type").and_then(Value::as_str) == Some("luks2") {
            cipher(&format!("keyslot {number}"), slot.pointer("/area/encryption"))?;
        }
    }
    Ok(())
}

fn cipher(of: &str, name: Option<&Value>) -> Result<(), String> {
    let name = name.and_then(Value::as_str).unwrap_or_default();
    if name.is_empty() || is_null(name) {
        return Err(format!("the cipher of {of} is {name:?}, which encrypts nothing"));
    }
    Ok(())
}

/// `cipher_null`, in whichever notation of dm-crypt and with whatever mode.
fn is_null(cipher: &str) -> bool {
    cipher.to_ascii_lowercase().contains("null")
}

/// The kernel's name of the mapping `mapper` that is made of this very partition.
pub(crate) fn mapping(volume: &Volume, mapper: &str) -> Option<String> {
    holders(&volume.name()).into_iter().find(|holder| dm(holder, "name") == mapper)
}

fn dm(holder: &str, attribute: &str) -> String {
    let path = Path::new("/sys/class/block").join(holder).join("dm").join(attribute);
    fs::read_to_string(path).unwrap_or_default().trim_end().to_owned()
}

/// Whether `/dev/mapper/MAPPER` is this volume, encrypted, with the file system that belongs in it.
///
/// # Errors
/// [`BootError::Untrusted`]; [`BootError::Cryptsetup`] when the mapping cannot be asked.
pub(crate) fn opened(volume: &Volume, label: &str, mapper: &str) -> Result<(), BootError> {
    let untrusted = |why: String| untrusted(volume, label, why);
    let holder = mapping(volume, mapper)
        .ok_or_else(|| untrusted(format!("/dev/mapper/{mapper} is not made of it")))?;
    let uuid = dm(&holder, "uuid");
    let expected = format!("CRYPT-LUKS2-{}-", volume.luks_uuid().replace('-', ""));
    if !uuid.to_ascii_lowercase().starts_with(&expected.to_ascii_lowercase()) {
        return Err(untrusted(format!("the mapping's UUID is {uuid}, not {expected}…")));
    }
    let (device, cipher) = table(mapper).map_err(|error| BootError::Cryptsetup {
        operation: "asking for the mapping",
        device: volume.device.clone(),
        error: error.to_string(),
    })?;
    if fs::canonicalize(&device).ok() != fs::canonicalize(&volume.device).ok() {
        return Err(untrusted(format!("/dev/mapper/{mapper} is on {}", device.display())));
    }
    if is_null(&cipher) {
        return Err(untrusted(format!("/dev/mapper/{mapper} is mapped with {cipher}")));
    }
    let inside = Path::new("/dev").join(&holder);
    let content =
        read_content(&inside).map_err(BootError::io(format!("read {}", inside.display())))?;
    file_system(label, &content).map_err(untrusted)
}

fn table(mapper: &str) -> Result<(PathBuf, String), LibcryptErr> {
    let mut active = CryptInit::init_by_name_and_header(mapper, None)?;
    let mut status = active.status_handle();
    let device = status.get_device_path()?.to_owned();
    Ok((device, format!("{}-{}", status.get_cipher()?, status.get_cipher_mode()?)))
}

/// What belongs into a volume: a file system, and not the one of another of Kairos' partitions.
fn file_system(label: &str, content: &Content) -> Result<(), String> {
    let found = match content {
        Content::Ext { label } | Content::Plain { label, .. } => label,
        Content::Luks2 { .. } | Content::Luks1 => return Err("another LUKS volume is in it".into()),
        Content::Other => return Err("no file system is in it".into()),
    };
    let kept = label.get(..EXT_LABEL).unwrap_or(label);
    if found.is_empty() || same_label(found, label) || found == kept {
        return Ok(());
    }
    if found.starts_with("COS_") {
        return Err(format!("the file system in it is {found}: were two partitions swapped?"));
    }
    log::warn!("the file system in {label} is labelled {found}");
    Ok(())
}

fn untrusted(volume: &Volume, label: &str, why: String) -> BootError {
    BootError::Untrusted { label: label.to_owned(), device: volume.device.clone(), why }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_header_that_encrypts_nothing_is_refused() {
        let segment = json!({"type": "crypt", "encryption": "aes-xts-plain64"});
        let slot = json!({"type": "luks2", "area": {"encryption": "aes-xts-plain64"}});
        let with = |segments: Value, keyslots: Value, requirements: Value| json!({"segments": segments, "keyslots": keyslots, "config": {"requirements": requirements}});
        let none = json!({});
        let in_progress = json!({"mandatory": ["online-reencrypt-v2"]});
        let linear = json!({"0": segment, "1": {"type": "linear"}});
        let null = |name: &str| json!({"0": {"type": "crypt", "encryption": name}});
        let null_slot =
            json!({"0": slot, "7": {"type": "luks2", "area": {"encryption": "cipher_null-ecb"}}});
        for (metadata, why) in [
            (with(json!({"0": segment}), json!({"0": slot}), none.clone()), None),
            (with(linear.clone(), json!({"1": {"type": "reencrypt"}}), in_progress), None),
            (with(linear, json!({"0": slot}), none.clone()), Some("linear")),
            (with(null("cipher_null-ecb"), json!({}), none.clone()), Some("cipher_null")),
            (with(null("capi:ecb(Cipher_NULL)-plain"), json!({}), none.clone()), Some("NULL")),
            (with(null(""), json!({}), none.clone()), Some("nothing")),
            (with(json!({"0": segment}), null_slot, none.clone()), Some("keyslot 7")),
            (with(json!({}), json!({"0": slot}), none), Some("no segment")),
            (json!({}), Some("no segment")),
        ] {
            let result = encryption(&metadata);
            match why {
                None => assert_eq!(result, Ok(()), "{metadata}"),
                Some(why) => assert!(result.unwrap_err().contains(why), "{metadata}"),
            }
        }
    }

    #[test]
    fn what_is_in_a_volume_is_a_file_system_and_not_another_partitions() {
        let ext = |label: &str| Content::Ext { label: label.into() };
        let xfs = |label: &str| Content::Plain { kind: "xfs", label: label.into() };
        let luks = Content::Luks2 { label: "COS_PERSISTENT".into(), uuid: String::new() };
        for (content, good) in [
            (ext("COS_PERSISTENT"), true),
            (ext(""), true),
            (ext("data"), true),
            (xfs("COS_PERSISTENT"), true),
            (ext("COS_OEM"), false),
            (xfs("COS_STATE"), false),
            (Content::Other, false),
            (Content::Luks1, false),
            (luks, false),
        ] {
            assert_eq!(file_system("COS_PERSISTENT", &content).is_ok(), good, "{content:?}");
        }
        assert!(file_system("COS_A_LABEL_OF_MORE_THAN_SIXTEEN", &ext("COS_A_LABEL_OF_M")).is_ok());
    }
}
