//! Records as they are read: what Go's decoder takes, Ikto's agents take, and so do we.
//!
//! Names of fields in any case, unknown ones ignored, of several the last, `null` the zero value, broken UTF-8 replaced;
//! but a value of a wrong type, or bytes after the object, are an error.

use std::fmt;

use base64::Engine;
use base64::alphabet;
use base64::engine::general_purpose::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use serde::de::{self, Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::Value;

use super::{
    CONTEXT, Cidr, Extension, MAX_ADDRESS, MAX_CAPABILITIES, MAX_CAPABILITY, MAX_MEMBER, MAX_NAME,
    Member, Signature, VERSION, signed_bytes, verify,
};
use crate::go_json::json_error;
use crate::{Error, Result};

const WHAT: &str = "the record";

/// Go's `base64.StdEncoding` reads a key whose last character has bits set that count for nothing.
const GO_BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new()
        .with_decode_allow_trailing_bits(true)
        .with_decode_padding_mode(DecodePaddingMode::RequireCanonical),
);

/// What a record begins its last field with, and what follows it.
const BEFORE_SIGNATURE: &[u8] = b",\"signature\":\"";
const AFTER_SIGNATURE: &[u8] = b"\"}";
/// Base64 of 64 bytes.
const SIGNATURE_TEXT: usize = 88;

/// The signature that a record carries, not yet looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Claim {
    Absent,
    /// There is one, and all that is before it.
    Made {
        signature: Box<[u8; 64]>,
        signed: usize,
    },
    /// Something that goes by its name and is none.
    Broken,
}

/// Reads the record under `key` of `bucket`, and says what its signature is worth.
///
/// # Errors
/// The value is too long, is not JSON, or lacks what a member has. Whether the key belongs to the record is not looked at.
pub fn read(bucket: &str, key: &str, value: &[u8]) -> Result<(Member, Signature)> {
    let (member, claim) = read_unchecked(value)?;
    let signature = claim.check(bucket, key, value, &member.public_key);
    Ok((member, signature))
}

/// Reads a record for whoever does not look at signatures, or not yet.
///
/// # Errors
/// As [`read`].
pub fn read_unchecked(value: &[u8]) -> Result<(Member, Claim)> {
    if value.len() > MAX_MEMBER {
        return Err(Error::TooLong { what: WHAT, limit: MAX_MEMBER, got: value.len() });
    }
    refuse_control_characters(value)?;
    let fields: Fields = serde_json::from_slice(value).map_err(|error| json_error(WHAT, &error))?;
    let claim = fields.claim(value);
    Ok((fields.member()?, claim))
}

impl Claim {
    /// `value` is the record that the claim was read from.
    pub fn check(&self, bucket: &str, key: &str, value: &[u8], public_key: &[u8; 32]) -> Signature {
        match self {
            Self::Absent => Signature::Absent,
            Self::Broken => Signature::Invalid,
            Self::Made { signature, signed } => {
                let text = value.get(..*signed).unwrap_or_default();
                let bytes = signed_bytes(bucket, key, text);
                if verify(CONTEXT, &bytes, public_key, signature) {
                    Signature::Valid
                } else {
                    Signature::Invalid
                }
            }
        }
    }
}

/// The fields as they come, the last of each.
#[derive(Default)]
struct Fields {
    name: String,
    public_key: Option<[u8; 32]>,
    /// Whether one of them was none: Go's decoder stops there, also if a good one follows.
    bad_public_key: bool,
    advertise_address: String,
    allowed_ip: String,
    /// v0.2.0 and before.
    private_cidr: bool,
    wg_port: i64,
    version: Value,
    advertise_name: Value,
    capabilities: Value,
    /// How often it came, in whatever case; `null` does not count.
    signatures: usize,
}

impl Fields {
    fn member(self) -> Result<Member> {
        let refused = |reason: String| Err(Error::Member { reason });
        let long = |what: &str, limit: usize, got: usize| {
            refused(format!("{what} has {got} bytes, at most {limit} are accepted"))
        };
        if self.name.len() > MAX_NAME {
            return long("name", MAX_NAME, self.name.len());
        }
        for (what, text) in
            [("advertise_address", &self.advertise_address), ("allowed_ip", &self.allowed_ip)]
        {
            if text.len() > MAX_ADDRESS {
                return long(what, MAX_ADDRESS, text.len());
            }
        }
        if self.bad_public_key {
            return refused("its public_key is not 32 bytes in base64".into());
        }
        let Some(public_key) = self.public_key.filter(|key| *key != [0; 32]) else {
            return refused("it has no public_key".into());
        };
        let Ok(allowed_ip) = self.allowed_ip.parse::<Cidr>() else {
            return refused(match (self.allowed_ip.is_empty(), self.private_cidr) {
                (true, true) => "it has private_cidr where allowed_ip should be: an Ikto agent of v0.2.0 or before wrote it; update that agent".into(),
                (true, false) => "it has no allowed_ip".into(),
                (false, _) => format!("its allowed_ip {:?} is not a CIDR, such as fd10:aaaa:1::/48", self.allowed_ip),
            });
        };
        let Ok(wg_port) = u16::try_from(self.wg_port) else {
            return refused(format!("its wg_port {} is no port", self.wg_port));
        };
        let extension = self.extension();
        Ok(Member {
            name: self.name,
            public_key,
            advertise_address: self.advertise_address,
            allowed_ip,
            wg_port,
            extension,
        })
    }

    /// What is not as we write it is somebody else's, under names that are not ours alone: ignored, as Ikto would. A later
    /// version is read as far as it is known; what is added must be ignorable.
    fn extension(&self) -> Option<Extension> {
        self.version.as_u64().filter(|version| *version >= VERSION)?;
        let advertise_name = match &self.advertise_name {
            Value::Null => None,
            Value::String(name) if name.len() <= MAX_ADDRESS => Some(name.clone()),
            _ => return None,
        };
        let capabilities = match &self.capabilities {
            Value::Null => Vec::new(),
            Value::Array(values) if values.len() <= MAX_CAPABILITIES => {
                values.iter().map(capability).collect::<Option<_>>()?
            }
            _ => return None,
        };
        Some(Extension { advertise_name, capabilities })
    }

    /// Only in the form in which we write it, once, as the very last: else nothing says what is signed and what is not.
    fn claim(&self, value: &[u8]) -> Claim {
        if self.signatures == 0 {
            return Claim::Absent;
        }
        let tail = BEFORE_SIGNATURE.len() + SIGNATURE_TEXT + AFTER_SIGNATURE.len();
        let last = value.len().checked_sub(tail).and_then(|at| Some((at, value.get(at..)?)));
        let signature = last.and_then(|(at, tail)| {
            let text = tail.strip_prefix(BEFORE_SIGNATURE)?.strip_suffix(AFTER_SIGNATURE)?;
            let signature = STANDARD.decode(text).ok()?.try_into().ok()?;
            Some(Claim::Made { signature: Box::new(signature), signed: at })
        });
        signature.filter(|_| self.signatures == 1).unwrap_or(Claim::Broken)
    }
}

/// Those in strings, which JSON forbids, and [`Text`] would let pass.
fn refuse_control_characters(value: &[u8]) -> Result<()> {
    let (mut inside, mut escaped) = (false, false);
    for byte in value {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = inside,
            b'"' => inside = !inside,
            0..0x20 if inside => {
                return Err(Error::Member {
                    reason: "it is not JSON: a control character in a string".into(),
                });
            }
            _ => {}
        }
    }
    Ok(())
}

fn public_key(text: &str) -> Option<[u8; 32]> {
    // Go's decoder skips line ends.
    let text = text.replace(['\r', '\n'], "");
    GO_BASE64.decode(text).ok()?.try_into().ok()
}

fn capability(value: &Value) -> Option<String> {
    let text = value.as_str().filter(|text| (1..=MAX_CAPABILITY).contains(&text.len()))?;
    let plain = |byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-');
    text.bytes().all(plain).then(|| text.to_owned())
}

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(FieldsVisitor)
    }
}

struct FieldsVisitor;

impl<'de> Visitor<'de> for FieldsVisitor {
    type Value = Fields;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields, A::Error> {
        let mut fields = Fields::default();
        while let Some(Text(name)) = map.next_key()? {
            // `null` leaves a field as it was, which after an earlier one of its name is not zero: as in Go.
            match folded(&name).as_str() {
                "name" => set(&mut fields.name, text(&mut map)?),
                "public_key" => {
                    fields.public_key = public_key(&text(&mut map)?.unwrap_or_default());
                    fields.bad_public_key |= fields.public_key.is_none();
                }
                "advertise_address" => set(&mut fields.advertise_address, text(&mut map)?),
                "allowed_ip" => set(&mut fields.allowed_ip, text(&mut map)?),
                "private_cidr" => {
                    map.next_value::<IgnoredAny>()?;
                    fields.private_cidr = true;
                }
                "wg_port" => set(&mut fields.wg_port, map.next_value()?),
                "version" => fields.version = map.next_value()?,
                "advertise_name" => fields.advertise_name = map.next_value()?,
                "capabilities" => fields.capabilities = map.next_value()?,
                "signature" => {
                    let signature = map.next_value::<Option<IgnoredAny>>()?;
                    fields.signatures += usize::from(signature.is_some());
                }
                _ => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(fields)
    }
}

fn set<T>(field: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *field = value;
    }
}

fn text<'de, A: MapAccess<'de>>(map: &mut A) -> Result<Option<String>, A::Error> {
    Ok(map.next_value::<Option<Text>>()?.map(|text| text.0))
}

/// As Go compares names of fields: without regard to case, where ſ and the sign for kelvin are s and k.
fn folded(name: &str) -> String {
    name.chars()
        .map(|c| match c {
            '\u{17f}' => 's',
            '\u{212a}' => 'k',
            _ => c.to_ascii_lowercase(),
        })
        .collect()
}

/// A string in which what is not UTF-8 is replaced, byte for byte, as in Go; but half a surrogate pair by three, not one.
struct Text(String);

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_bytes(TextVisitor)
    }
}

struct TextVisitor;

impl Visitor<'_> for TextVisitor {
    type Value = Text;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Text, E> {
        Ok(Text(text.to_owned()))
    }

    fn visit_bytes<E: de::Error>(self, bytes: &[u8]) -> Result<Text, E> {
        let mut text = String::with_capacity(bytes.len());
        for chunk in bytes.utf8_chunks() {
            text.push_str(chunk.valid());
            text.extend(chunk.invalid().iter().map(|_| char::REPLACEMENT_CHARACTER));
        }
        Ok(Text(text))
    }
}
