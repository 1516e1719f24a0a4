//! Records as they are written: Ikto's five fields as Go's `encoding/json` writes them, then ours.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use super::{CONTEXT, Member, VERSION, key_of, sign, signed_bytes};

impl Member {
    /// The record without a signature. What an Ikto agent would write, to the byte, if there is no extension.
    pub fn to_json(&self) -> String {
        let mut text = self.open();
        text.push('}');
        text
    }

    /// The record signed with the node's key for this bucket, under the key that follows from [`Member::allowed_ip`].
    pub fn to_signed_json(&self, bucket: &str, private_key: &[u8; 32]) -> String {
        let mut text = self.open();
        let bytes = signed_bytes(bucket, &key_of(&self.allowed_ip), text.as_bytes());
        let signature = STANDARD.encode(sign(CONTEXT, &bytes, private_key));
        text.push_str(&format!(",\"signature\":\"{signature}\"}}"));
        text
    }

    /// All but the brace at the end.
    fn open(&self) -> String {
        let mut text = String::from("{\"name\":");
        push_string(&mut text, &self.name);
        text.push_str(",\"public_key\":");
        push_string(&mut text, &STANDARD.encode(self.public_key));
        text.push_str(",\"advertise_address\":");
        push_string(&mut text, &self.advertise_address);
        text.push_str(",\"allowed_ip\":");
        push_string(&mut text, &self.allowed_ip.to_string());
        text.push_str(&format!(",\"wg_port\":{}", self.wg_port));
        let Some(extension) = &self.extension else { return text };
        text.push_str(&format!(",\"version\":{VERSION}"));
        if let Some(name) = &extension.advertise_name {
            text.push_str(",\"advertise_name\":");
            push_string(&mut text, name);
        }
        if !extension.capabilities.is_empty() {
            text.push_str(",\"capabilities\":[");
            for (number, capability) in extension.capabilities.iter().enumerate() {
                if number > 0 {
                    text.push(',');
                }
                push_string(&mut text, capability);
            }
            text.push(']');
        }
        text
    }
}

/// A JSON string as Go 1.22 and later write it, with which Ikto is built: what [`crate::go_json`] writes is of before,
/// when backspace and form feed had no short form.
fn push_string(text: &mut String, value: &str) {
    text.push('"');
    for c in value.chars() {
        match c {
            '"' => text.push_str("\\\""),
            '\\' => text.push_str("\\\\"),
            '\u{8}' => text.push_str("\\b"),
            '\u{c}' => text.push_str("\\f"),
            '\n' => text.push_str("\\n"),
            '\r' => text.push_str("\\r"),
            '\t' => text.push_str("\\t"),
            '<' | '>' | '&' | '\u{2028}' | '\u{2029}' | '\0'..='\u{1f}' => {
                text.push_str(&format!("\\u{:04x}", u32::from(c)));
            }
            _ => text.push(c),
        }
    }
    text.push('"');
}
