//! Takes out of a LUKS2 header what belongs to an encryption that is done.
//!
//! libcryptsetup (2.6.1 to 2.8.6 at least) writes the header after the last zone, wipes that zone's source, and then writes the header
//! again without the reencryption keyslot and the requirement. A header from between the two says that everything is encrypted and that
//! encryption is in progress; libcryptsetup tries the first zone once more and fails ("Failed to set device segments"). What it would
//! have written is written here: LUKS2 On-Disk Format 1.1.1 §2 (binary header, checksum, two copies), §3 (JSON).

use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::EncryptError;
use super::device::Device;
use super::header::{BinaryHeader, SECONDARY, has_magic};

/// Binary header and JSON of one copy.
const COPY: usize = SECONDARY as usize;
const JSON_AT: usize = 4096;
/// Big-endian, goes up with each change.
const SEQID: std::ops::Range<usize> = 0x10..0x18;
const CHECKSUM_NAME: std::ops::Range<usize> = 0x48..0x68;
/// Of the copy, with this field zero; the hash's 32 bytes and zeros.
const CHECKSUM: std::ops::Range<usize> = 0x1c0..0x200;

/// Closes the header. libcryptsetup must have loaded it just before, which makes both copies the same.
pub(super) fn close(device: &Device) -> Result<(), EncryptError> {
    let header =
        |why: &str| EncryptError::Header { path: device.path().to_owned(), why: why.to_owned() };
    let primary = closed(&device.read(0, SECONDARY)?).map_err(header)?;
    let secondary = device.read(SECONDARY, SECONDARY)?;
    let secondary = with_json_of(&secondary, &primary).map_err(header)?;
    // One copy is whole at any time.
    for (offset, copy) in [(0, primary), (SECONDARY, secondary)] {
        device.write(offset, &copy)?;
        device.sync()?;
    }
    Ok(())
}

fn closed(copy: &[u8]) -> Result<Vec<u8>, &'static str> {
    let binary = BinaryHeader::parse(copy).ok_or("no LUKS2 header")?;
    let whole = has_magic(copy)
        && copy.len() == COPY
        && checksum(copy)? == copy.get(CHECKSUM).unwrap_or_default();
    if !whole {
        return Err("the first copy of the header is damaged");
    }
    let text =
        copy.get(JSON_AT..).unwrap_or_default().split(|byte| *byte == 0).next().unwrap_or_default();
    let mut json: Value = serde_json::from_slice(text).map_err(|_| "its metadata is not JSON")?;
    strip(&mut json).ok_or("its metadata has not the form of LUKS2")?;
    let json = json.to_string();
    let mut closed = copy.to_vec();
    let room = closed.get_mut(JSON_AT..).unwrap_or_default();
    room.fill(0);
    // One NUL at least.
    let place = room.get_mut(..json.len() + 1).ok_or("its metadata does not fit")?;
    place.iter_mut().zip(json.bytes()).for_each(|(place, byte)| *place = byte);
    let seqid = binary.seqid.checked_add(1).ok_or("its sequence number is the last one")?;
    put(&mut closed, SEQID, &seqid.to_be_bytes());
    sign(&mut closed)?;
    Ok(closed)
}

/// The second copy has a magic, a salt and an offset of its own.
fn with_json_of(secondary: &[u8], primary: &[u8]) -> Result<Vec<u8>, &'static str> {
    let mut copy = secondary.to_vec();
    put(&mut copy, SEQID, primary.get(SEQID).unwrap_or_default());
    put(&mut copy, JSON_AT..COPY, primary.get(JSON_AT..COPY).unwrap_or_default());
    sign(&mut copy)?;
    Ok(copy)
}

fn put(copy: &mut [u8], at: std::ops::Range<usize>, bytes: &[u8]) {
    let place = copy.get_mut(at).unwrap_or_default();
    place.iter_mut().zip(bytes).for_each(|(place, byte)| *place = *byte);
}

fn sign(copy: &mut [u8]) -> Result<(), &'static str> {
    let checksum = checksum(copy)?;
    put(copy, CHECKSUM, &checksum);
    Ok(())
}

fn checksum(copy: &[u8]) -> Result<Vec<u8>, &'static str> {
    if !copy.get(CHECKSUM_NAME).is_some_and(|name| name.starts_with(b"sha256\0")) {
        return Err("its checksum is not SHA-256");
    }
    let mut blank = copy.to_vec();
    blank.get_mut(CHECKSUM).unwrap_or_default().fill(0);
    let mut checksum = Sha256::digest(&blank).to_vec();
    checksum.resize(CHECKSUM.len(), 0);
    Ok(checksum)
}

/// Reencryption keyslots, backup segments, digests of nothing but these, and the requirement.
fn strip(json: &mut Value) -> Option<()> {
    let gone_keyslots = remove(json.get_mut("keyslots")?.as_object_mut()?, |slot| {
        slot.get("type").is_some_and(|kind| kind == "reencrypt")
    });
    let gone_segments = remove(json.get_mut("segments")?.as_object_mut()?, |segment| {
        let flags = segment.get("flags").and_then(Value::as_array);
        flags
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .any(|flag| flag.starts_with("backup-"))
    });
    let digests = json.get_mut("digests")?.as_object_mut()?;
    for digest in digests.values_mut() {
        for (list, gone) in [("keyslots", &gone_keyslots), ("segments", &gone_segments)] {
            let list = digest.get_mut(list)?.as_array_mut()?;
            list.retain(|number| !gone.iter().any(|gone| number == gone.as_str()));
        }
    }
    remove(digests, |digest| {
        ["keyslots", "segments"]
            .iter()
            .all(|list| digest.get(*list) == Some(&Value::Array(Vec::new())))
    });
    let config = json.get_mut("config")?.as_object_mut()?;
    let mandatory = config.get_mut("requirements")?.get_mut("mandatory")?.as_array_mut()?;
    mandatory
        .retain(|name| !name.as_str().is_some_and(|name| name.starts_with("online-reencrypt")));
    if mandatory.is_empty() {
        config.remove("requirements");
    }
    Some(())
}

/// The names of what was removed.
fn remove(from: &mut Map<String, Value>, which: impl Fn(&Value) -> bool) -> Vec<String> {
    let names: Vec<String> =
        from.iter().filter(|(_, value)| which(value)).map(|(name, _)| name.clone()).collect();
    for name in &names {
        from.remove(name);
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_belongs_to_the_encryption_goes_and_all_else_stays() {
        let mut json = json!({
            "keyslots": {"0": {"type": "luks2"}, "1": {"type": "reencrypt"}, "2": {"type": "luks2"}},
            "tokens": {"0": {"type": "latchkey"}},
            "segments": {
                "0": {"type": "crypt"},
                "1": {"flags": ["backup-previous"]},
                "2": {"flags": ["backup-final"]},
                "3": {"flags": ["backup-moved-segment"]},
            },
            "digests": {
                "0": {"keyslots": ["0", "2"], "segments": ["2", "0"], "salt": "x"},
                "1": {"keyslots": ["1"], "segments": []},
            },
            "config": {"flags": ["allow-discards"], "requirements": {"mandatory": ["online-reencrypt-v2"]}},
        });
        strip(&mut json).unwrap();
        assert_eq!(
            json,
            json!({
                "keyslots": {"0": {"type": "luks2"}, "2": {"type": "luks2"}},
                "tokens": {"0": {"type": "latchkey"}},
                "segments": {"0": {"type": "crypt"}},
                "digests": {"0": {"keyslots": ["0", "2"], "segments": ["0"], "salt": "x"}},
                "config": {"flags": ["allow-discards"]},
            })
        );
    }

    #[test]
    fn a_header_that_is_damaged_is_not_written_over() {
        assert!(closed(&[]).is_err());
        assert!(closed(&[0; COPY]).is_err());
        let mut copy = vec![0; COPY];
        copy[..8].copy_from_slice(b"LUKS\xba\xbe\0\x02");
        copy[CHECKSUM_NAME][..6].copy_from_slice(b"sha256");
        copy[JSON_AT..JSON_AT + 2].copy_from_slice(b"{}");
        assert_eq!(closed(&copy), Err("the first copy of the header is damaged"));
        sign(&mut copy).unwrap();
        assert_eq!(closed(&copy), Err("its metadata has not the form of LUKS2"));
    }
}
