//! JSON as Go's `encoding/json` reads and writes it (`protocols/kcrypt.md` §0.3): keys in any case, unknown keys ignored,
//! missing keys and `null` are zero values; written text escapes `<`, `>` and `&`.
//!
//! Stricter than Go in one point: bytes after the value are an error.

use std::{fmt, marker::PhantomData};

use base64::{Engine, engine::general_purpose::STANDARD};
use serde::{
    Deserialize, Deserializer,
    de::{self, IgnoredAny, MapAccess, Visitor},
};
use zeroize::Zeroizing;

use crate::{Error, MAX_MESSAGE, Result};

/// A type that is filled key by key; keys arrive in lower case.
pub(crate) trait GoObject: Default {
    /// Takes the value of `key` from `map`; `false` if the key is not one of this type's.
    fn take<'de, A: MapAccess<'de>>(&mut self, key: &str, map: &mut A) -> Result<bool, A::Error>;
}

/// Parses a whole message of at most [`MAX_MESSAGE`] bytes.
pub(crate) fn parse<T: GoObject>(what: &'static str, message: &[u8]) -> Result<T> {
    if message.len() > MAX_MESSAGE {
        return Err(Error::TooLong { what, limit: MAX_MESSAGE, got: message.len() });
    }
    let object: Object<T> =
        serde_json::from_slice(message).map_err(|error| json_error(what, &error))?;
    Ok(object.0)
}

/// Keeps where and what kind, drops serde's text: it repeats values.
pub(crate) fn json_error(what: &'static str, error: &serde_json::Error) -> Error {
    let category = match error.classify() {
        serde_json::error::Category::Eof => "unexpected end",
        serde_json::error::Category::Syntax => "syntax error",
        serde_json::error::Category::Data => "value of a wrong type",
        serde_json::error::Category::Io => "read error",
    };
    Error::Json { what, category, line: error.line(), column: error.column() }
}

/// A JSON object, or `null` for the zero value.
struct Object<T>(T);

impl<'de, T: GoObject> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ObjectVisitor(PhantomData))
    }
}

struct ObjectVisitor<T>(PhantomData<T>);

impl<'de, T: GoObject> Visitor<'de> for ObjectVisitor<T> {
    type Value = Object<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_unit<E: de::Error>(self) -> Result<Self::Value, E> {
        Ok(Object(T::default()))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut object = T::default();
        while let Some(key) = map.next_key::<String>()? {
            if !object.take(&key.to_ascii_lowercase(), &mut map)? {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(Object(object))
    }
}

/// A nested object; `null` is its zero value.
pub(crate) fn object<'de, T: GoObject, A: MapAccess<'de>>(map: &mut A) -> Result<T, A::Error> {
    Ok(map.next_value::<Object<T>>()?.0)
}

/// A string; `null` is empty.
pub(crate) fn text<'de, A: MapAccess<'de>>(map: &mut A) -> Result<String, A::Error> {
    Ok(map.next_value::<Option<String>>()?.unwrap_or_default())
}

/// A boolean; `null` is false.
pub(crate) fn boolean<'de, A: MapAccess<'de>>(map: &mut A) -> Result<bool, A::Error> {
    Ok(map.next_value::<Option<bool>>()?.unwrap_or_default())
}

/// A Go `[]byte`: standard base64 with padding; `null` is empty.
pub(crate) fn bytes<'de, A: MapAccess<'de>>(map: &mut A) -> Result<Vec<u8>, A::Error> {
    let encoded = Zeroizing::new(text(map)?);
    STANDARD.decode(encoded.as_bytes()).map_err(|_| de::Error::custom("not base64"))
}

/// Appends `value` as a JSON string as Go's encoder writes it.
///
/// By hand, because what is written may be a passphrase: a general serializer would leave copies in memory.
pub(crate) fn push_string(out: &mut String, value: &str) {
    out.push('"');
    for c in value.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '<' | '>' | '&' | '\u{2028}' | '\u{2029}' | '\0'..='\u{1f}' => {
                out.push_str(&format!("\\u{:04x}", c as u32));
            }
            _ => out.push(c),
        }
    }
    out.push('"');
}

/// Room for `value` written by [`push_string`], so that the buffer never moves and leaves a copy behind.
pub(crate) fn room(value: &str) -> usize {
    6 * value.len() + 2
}
