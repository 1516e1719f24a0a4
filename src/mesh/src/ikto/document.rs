//! The text of an `ikto.json` as Go's `encoding/json` takes it: key names in any case, unknown keys passed over, missing keys
//! and `null` are zero values, the last of several wins.

use std::fmt;

use serde::de::{self, Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::Value;
use zeroize::Zeroizing;

/// Longest file read, in bytes. A genuine one has less than 1 KiB.
pub(crate) const MAX_FILE: usize = 64 * 1024;

/// What is wrong with a file, without the value of a key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Fault {
    #[error("{key}: {why}")]
    Key { key: &'static str, why: String },

    #[error("{0}")]
    File(String),
}

/// What stands in it, not yet looked at. Never printed: the URL may hold a password.
#[derive(Clone, Default, PartialEq, Eq)]
pub(crate) struct Document {
    pub(crate) name: String,
    pub(crate) advertise_address: String,
    pub(crate) private_address: String,
    pub(crate) subnet_prefix: i64,
    pub(crate) mesh_cidr: String,
    pub(crate) wg_dev_name: String,
    pub(crate) wg_port: i64,
    pub(crate) private_key_path: String,
    pub(crate) nats_creds: String,
    pub(crate) nats_url: Zeroizing<String>,
    pub(crate) nats_kv: String,
    // Ours; Ikto passes them over.
    pub(crate) signatures: String,
    pub(crate) strict: Option<bool>,
    pub(crate) persistent_keepalive: Option<i64>,
    pub(crate) mtu: i64,
    pub(crate) nats_ca: String,
    pub(crate) nats_cert: String,
    pub(crate) nats_key: String,
    /// Keys that are none of these, as they were written.
    pub(crate) unknown: Vec<String>,
}

/// The keys, Ikto's first.
pub(crate) const KEYS: [&str; 18] = [
    "name",
    "advertise_address",
    "private_address",
    "subnet_prefix",
    "mesh_cidr",
    "wg_dev_name",
    "wg_port",
    "private_key_path",
    "nats_creds",
    "nats_url",
    "nats_kv",
    "signatures",
    "strict",
    "persistent_keepalive",
    "mtu",
    "nats_ca",
    "nats_cert",
    "nats_key",
];

impl Document {
    /// Reads a whole file of at most [`MAX_FILE`] bytes.
    ///
    /// # Errors
    /// Not JSON, more than one value, not an object, or a key with a value of another type, which is named.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, Fault> {
        if bytes.len() > MAX_FILE {
            return Err(Fault::File(format!("more than {MAX_FILE} bytes")));
        }
        // Go puts U+FFFD in the place of what is not UTF-8.
        let text = Zeroizing::new(String::from_utf8_lossy(bytes).into_owned());
        let Entries(entries) = serde_json::from_str(&text).map_err(|error| not_json(&error))?;
        let mut document = Self::default();
        for (written, value) in entries {
            let folded = fold(&written);
            match KEYS.iter().find(|key| **key == folded) {
                Some(key) => document.set(key, value)?,
                None => document.unknown.push(written),
            }
        }
        Ok(document)
    }

    fn set(&mut self, key: &'static str, value: Value) -> Result<(), Fault> {
        match key {
            "name" => text(key, value, &mut self.name),
            "advertise_address" => text(key, value, &mut self.advertise_address),
            "private_address" => text(key, value, &mut self.private_address),
            "subnet_prefix" => number(key, &value, &mut self.subnet_prefix),
            "mesh_cidr" => text(key, value, &mut self.mesh_cidr),
            "wg_dev_name" => text(key, value, &mut self.wg_dev_name),
            "wg_port" => number(key, &value, &mut self.wg_port),
            "private_key_path" => text(key, value, &mut self.private_key_path),
            "nats_creds" => text(key, value, &mut self.nats_creds),
            "nats_url" => text(key, value, &mut self.nats_url),
            "nats_kv" => text(key, value, &mut self.nats_kv),
            "signatures" => text(key, value, &mut self.signatures),
            "mtu" => number(key, &value, &mut self.mtu),
            "nats_ca" => text(key, value, &mut self.nats_ca),
            "nats_cert" => text(key, value, &mut self.nats_cert),
            "nats_key" => text(key, value, &mut self.nats_key),
            "strict" => match value {
                Value::Null => Ok(()),
                Value::Bool(strict) => {
                    self.strict = Some(strict);
                    Ok(())
                }
                other => Err(wrong_type(key, "true or false", &other)),
            },
            "persistent_keepalive" if value.is_null() => Ok(()),
            "persistent_keepalive" => number(key, &value, self.persistent_keepalive.insert(0)),
            _ => Ok(()),
        }
    }
}

impl fmt::Debug for Document {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Document").field("name", &self.name).finish_non_exhaustive()
    }
}

/// Go compares names under Unicode's simple case folding, in which two more letters are ASCII's.
fn fold(name: &str) -> String {
    name.chars()
        .map(|c| match c {
            '\u{17f}' => 's',
            '\u{212a}' => 'k',
            _ => c.to_ascii_lowercase(),
        })
        .collect()
}

fn text(key: &'static str, value: Value, place: &mut String) -> Result<(), Fault> {
    match value {
        Value::Null => Ok(()),
        Value::String(text) => {
            *place = text;
            Ok(())
        }
        other => Err(wrong_type(key, "a text", &other)),
    }
}

/// A whole number: Go takes neither 48.0 nor 4e1 for one.
fn number(key: &'static str, value: &Value, place: &mut i64) -> Result<(), Fault> {
    match value {
        Value::Null => Ok(()),
        value => {
            *place = value.as_i64().ok_or_else(|| wrong_type(key, "a whole number", value))?;
            Ok(())
        }
    }
}

fn wrong_type(key: &'static str, expected: &str, value: &Value) -> Fault {
    let found = match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    };
    let found = if found == "a number" && expected == "a whole number" {
        "a fraction, an exponent or a number out of range"
    } else {
        found
    };
    Fault::Key { key, why: format!("expected {expected}, found {found}") }
}

/// Where and what; not serde's text where that repeats a value.
fn not_json(error: &serde_json::Error) -> Fault {
    Fault::File(match error.classify() {
        serde_json::error::Category::Data => {
            "not a JSON object; `latchkey init` prints one".to_owned()
        }
        _ => format!("not valid JSON: {error}"),
    })
}

/// The keys of an object in their order, also those that come twice; `null` has none.
struct Entries(Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(EntriesVisitor)
    }
}

struct EntriesVisitor;

impl<'de> Visitor<'de> for EntriesVisitor {
    type Value = Entries;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_unit<E: de::Error>(self) -> Result<Entries, E> {
        Ok(Entries(Vec::new()))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = map.next_entry()? {
            entries.push(entry);
        }
        Ok(Entries(entries))
    }
}
