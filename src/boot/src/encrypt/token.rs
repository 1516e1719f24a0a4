//! Our LUKS2 token (LUKS2 On-Disk Format 1.1.1 §3.6): which keyslot is the machine's, how it is unlocked, and what of making
//! the volume is still to be done. Anybody can read and change it; there is no secret in it and nothing is trusted because of it.
//!
//! ```json
//! {"type": "latchkey", "keyslots": ["0"], "version": 1, "unlock": "offline",
//!  "unfinished": {"copy": "1056964608", "size": "16777216"}}
//! ```
//!
//! `unfinished` stands there while the volume is being made: where the copy of the file system's first part is while it is
//! encrypted in place (see [`super::journal`]), nothing in it while a new volume waits for its file system.

use serde_json::{Value, json};

pub(super) const TYPE: &str = "latchkey";

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
pub(super) enum Unfinished {
    FileSystem,
    /// Offset and size of the copy.
    Encryption {
        copy: u64,
        size: u64,
    },
}

pub(super) fn encode(unlock: Unlock, unfinished: Option<&Unfinished>) -> Value {
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
    if let (Some(token), Some(todo)) = (token.as_object_mut(), todo) {
        token.insert("unfinished".to_owned(), todo);
    }
    token
}

/// `None`: nothing is left to do. A token that cannot be understood is `Some(Err)`.
pub(super) fn unfinished(token: &Value) -> Option<Result<Unfinished, &'static str>> {
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
pub(super) fn finished(token: &Value) -> Value {
    let mut token = token.clone();
    if let Some(fields) = token.as_object_mut() {
        fields.remove("unfinished");
    }
    token
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
}
