//! Our LUKS2 token (LUKS2 On-Disk Format 1.1.1 §3.6): which keyslots are the machine's, how the volume is unlocked, on which
//! machine it was enrolled, and what of making it is still to be done. Anybody can read and change it: there is no secret in
//! it, and of what it says only [`mac`] is believed, because only the TPM of the machine can make that.
//!
//! ```json
//! {"type": "latchkey", "keyslots": ["0"], "version": 1, "unlock": "offline", "mac": "…64 hex digits…",
//!  "next": "2", "unfinished": {"copy": "1056964608", "size": "16777216"}}
//! ```
//!
//! `mac` is [`latchkey_tpm::Tpm::volume_mac`] of the volume's UUID and label. `next` is the keyslot in which a change of the
//! machine's key has its new one, as long as that is under way. `unfinished` stands there while the volume is being made:
//! where the copy of the file system's first part is while it is encrypted in place (see [`crate::encrypt`]), nothing in it
//! while a new volume waits for its file system.

use serde_json::{Value, json};

/// The type of the token.
pub const TYPE: &str = "latchkey";
/// LUKS2 has places for 32 keyslots.
const MAX_SLOTS: u32 = 32;
/// The longest metadata area of a LUKS2 header: 4 MiB.
pub const MAX_METADATA: usize = 4 << 20;

/// Where the passphrase of the machine's keyslot comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unlock {
    /// From the TPM of this machine alone.
    Offline,
    /// From a key server.
    Online,
}

impl Unlock {
    fn name(self) -> &'static str {
        match self {
            Self::Offline => "offline",
            Self::Online => "online",
        }
    }
}

/// What is left to do on a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unfinished {
    FileSystem,
    /// Offset and size of the copy.
    Encryption {
        copy: u64,
        size: u64,
    },
}

pub(crate) fn encode(unlock: Unlock, unfinished: Option<&Unfinished>) -> Value {
    let mut token = json!({
        "type": TYPE,
        "keyslots": ["0"],
        "version": 1,
        "unlock": unlock.name(),
    });
    let todo = unfinished.map(|unfinished| match unfinished {
        Unfinished::FileSystem => json!({}),
        // Strings, as LUKS2 writes all 64-bit numbers.
        Unfinished::Encryption { copy, size } => {
            json!({"copy": copy.to_string(), "size": size.to_string()})
        }
    });
    if let Some(todo) = todo {
        set(&mut token, "unfinished", todo);
    }
    token
}

/// `None`: nothing is left to do. A token that cannot be understood is `Some(Err)`.
pub(crate) fn unfinished(token: &Value) -> Option<Result<Unfinished, &'static str>> {
    let todo = token.get("unfinished")?;
    if todo.as_object().is_some_and(serde_json::Map::is_empty) {
        return Some(Ok(Unfinished::FileSystem));
    }
    let number = |name| todo.get(name)?.as_str()?.parse().ok();
    Some(match (number("copy"), number("size")) {
        (Some(copy), Some(size)) => Ok(Unfinished::Encryption { copy, size }),
        _ => Err("the latchkey token's `unfinished` is not as this program writes it"),
    })
}

/// The token without what was to be done.
pub(crate) fn finished(token: &Value) -> Value {
    let mut token = token.clone();
    if let Some(fields) = token.as_object_mut() {
        fields.remove("unfinished");
    }
    token
}

/// The token of a volume that is unlocked in this way on the machine that made this mark.
pub(crate) fn bound(token: &Value, unlock: Unlock, mac: &[u8; 32]) -> Value {
    let mut token = token.clone();
    set(&mut token, "unlock", unlock.name().into());
    let hex: String = mac.iter().map(|byte| format!("{byte:02x}")).collect();
    set(&mut token, "mac", hex.into());
    token
}

fn set(token: &mut Value, name: &str, value: Value) {
    if let Some(fields) = token.as_object_mut() {
        fields.insert(name.to_owned(), value);
    }
}

/// The mark of the machine that the volume was enrolled on. `None`: there is none, as on volumes that Kairos made; what is no
/// mark of ours is `Some(None)`.
#[must_use]
pub fn mac(token: &Value) -> Option<Option<[u8; 32]>> {
    let text = token.get("mac")?.as_str().unwrap_or_default().as_bytes();
    let mut mac = [0; 32];
    if text.len() != 2 * mac.len() {
        return Some(None);
    }
    for (byte, pair) in mac.iter_mut().zip(text.chunks_exact(2)) {
        let digit = |at: usize| char::from(*pair.get(at)?).to_digit(16);
        let (Some(high), Some(low)) = (digit(0), digit(1)) else { return Some(None) };
        *byte = u8::try_from(high << 4 | low).unwrap_or_default();
    }
    Some(Some(mac))
}

/// The machine's keyslots: those assigned to the token, and the one that a change of key has begun.
#[must_use]
pub fn keyslots(token: &Value) -> Vec<u32> {
    let assigned = token.get("keyslots").and_then(Value::as_array);
    let slot = |value: &Value| value.as_str()?.parse().ok().filter(|slot| *slot < MAX_SLOTS);
    let mut slots = Vec::new();
    for slot in assigned.into_iter().flatten().filter_map(slot).chain(next(token)) {
        // Each is tried, which takes its time, and anybody may have written this.
        if !slots.contains(&slot) {
            slots.push(slot);
        }
    }
    slots
}

/// The keyslot in which a change of the machine's key has its new one.
pub(crate) fn next(token: &Value) -> Option<u32> {
    token.get("next")?.as_str()?.parse().ok().filter(|slot| *slot < MAX_SLOTS)
}

pub(crate) fn with_next(token: &Value, next: Option<u32>) -> Value {
    let mut token = token.clone();
    match (next, token.as_object_mut()) {
        (Some(next), _) => set(&mut token, "next", next.to_string().into()),
        (None, Some(fields)) => drop(fields.remove("next")),
        (None, None) => {}
    }
    token
}

/// The token of a volume whose machine's key is in keyslot 0 and nowhere else.
pub(crate) fn of_slot_0(token: &Value) -> Value {
    let mut token = with_next(token, None);
    set(&mut token, "keyslots", json!(["0"]));
    token
}

/// Number and content of our token in the metadata of a LUKS2 header.
#[must_use]
pub fn find(metadata: &Value) -> Option<(u32, &Value)> {
    let tokens = metadata.get("tokens")?.as_object()?;
    tokens.iter().find_map(|(number, token)| {
        (token.get("type")?.as_str()? == TYPE).then_some((number.parse().ok()?, token))
    })
}

/// Our token in the JSON area of a LUKS2 header as it is on the disk: text, NUL, and anything.
#[must_use]
pub fn in_area(area: &[u8]) -> Option<Value> {
    let text = area.split(|byte| *byte == 0).next().filter(|_| area.len() <= MAX_METADATA)?;
    let metadata: Value = serde_json::from_slice(text).ok()?;
    find(&metadata).map(|(_, token)| token.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_to_do_reads_back() {
        for todo in
            [Unfinished::FileSystem, Unfinished::Encryption { copy: 7 << 20, size: u64::MAX }]
        {
            let token = encode(Unlock::Online, Some(&todo));
            assert_eq!(unfinished(&token), Some(Ok(todo)));
            assert_eq!(unfinished(&finished(&token)), None);
            assert_eq!(finished(&token), encode(Unlock::Online, None));
        }
        assert_eq!(
            encode(Unlock::Offline, None).to_string(),
            r#"{"keyslots":["0"],"type":"latchkey","unlock":"offline","version":1}"#
        );
    }

    #[test]
    fn a_token_that_is_not_as_we_write_it_is_told() {
        for todo in [
            json!(5),
            json!(null),
            json!({"copy": 5, "size": 5}),
            json!({"copy": "5"}),
            json!({"copy": "-5", "size": "5"}),
            json!({"copy": "5", "size": "18446744073709551616"}),
        ] {
            let token = json!({"type": TYPE, "unfinished": todo});
            assert!(matches!(unfinished(&token), Some(Err(_))), "{token}");
        }
    }

    #[test]
    fn a_mark_reads_back_and_what_is_none_is_told_from_no_mark() {
        let unbound = encode(Unlock::Offline, None);
        assert_eq!(mac(&unbound), None);
        let mark = std::array::from_fn(|i| (i * 8) as u8);
        let token = bound(&unbound, Unlock::Online, &mark);
        assert_eq!(mac(&token), Some(Some(mark)));
        assert_eq!((&token["unlock"], &token["keyslots"]), (&json!("online"), &json!(["0"])));
        for wrong in
            [json!(5), json!(""), json!("00"), json!("0g".repeat(32)), json!("é".repeat(32))]
        {
            assert_eq!(mac(&json!({"mac": wrong})), Some(None), "{wrong}");
        }
    }

    #[test]
    fn the_machines_keyslots_are_those_assigned_and_the_next() {
        for (token, slots) in [
            (json!({"keyslots": ["0"]}), vec![0]),
            (json!({"keyslots": ["0"], "next": "2"}), vec![0, 2]),
            (json!({"keyslots": ["0", "2"], "next": "2"}), vec![0, 2]),
            (json!({"keyslots": ["31", "32", 5, "x"]}), vec![31]),
            (json!({"keyslots": "0", "next": 2}), vec![]),
            (json!({}), vec![]),
        ] {
            assert_eq!(keyslots(&token), slots, "{token}");
        }
    }

    #[test]
    fn the_token_is_found_in_the_area_of_a_header() {
        let area = |text: &str| [text.as_bytes(), b"\0 rest"].concat();
        let text = r#"{"tokens": {"0": {"type": "other"}, "3": {"type": "latchkey", "a": 1}}}"#;
        assert_eq!(in_area(&area(text)), Some(json!({"type": "latchkey", "a": 1})));
        for none in ["", "{", r#"{"tokens": []}"#, r#"{"tokens": {"x": {"type": "latchkey"}}}"#] {
            assert_eq!(in_area(&area(none)), None, "{none}");
        }
        assert_eq!(in_area(&vec![b' '; MAX_METADATA + 1]), None);
    }
}
