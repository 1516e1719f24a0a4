//! Writing of manifests. A Secret is written by hand: a general serializer would leave copies of it in memory.

use std::collections::BTreeMap;

use base64::{Engine, engine::general_purpose::STANDARD};
use serde::Serialize;
use zeroize::Zeroizing;

use super::{SEALED_VOLUME, SEALED_VOLUME_API, SealedVolume, Secret};
use crate::{Error, Result, go_json};

impl SealedVolume {
    /// The manifest as a YAML document, ending with a newline.
    pub fn to_yaml(&self) -> Result<String> {
        let document = Document { api_version: SEALED_VOLUME_API, kind: SEALED_VOLUME, body: self };
        serde_saphyr::to_string(&document)
            .map_err(|_| Error::Crypto("a SealedVolume could not be written as YAML"))
    }
}

#[derive(Serialize)]
struct Document<'a> {
    #[serde(rename = "apiVersion")]
    api_version: &'static str,
    kind: &'static str,
    #[serde(flatten)]
    body: &'a SealedVolume,
}

impl Secret {
    /// The manifest as a YAML document, ending with a newline: text as `stringData`, other bytes as `data`.
    #[must_use]
    pub fn to_yaml(&self) -> Zeroizing<String> {
        let room: usize =
            self.data.iter().map(|(key, value)| go_json::room(key) + 6 * value.len() + 16).sum();
        let mut out = Zeroizing::new(String::with_capacity(room + 2048));
        out.push_str("apiVersion: v1\nkind: Secret\nmetadata:\n");
        push_entry(&mut out, "  name", &self.metadata.name);
        if !self.metadata.namespace.is_empty() {
            push_entry(&mut out, "  namespace", &self.metadata.namespace);
        }
        push_map(&mut out, "  labels", &self.metadata.labels);
        push_map(&mut out, "  annotations", &self.metadata.annotations);
        out.push_str("type: Opaque\n");
        let text: Vec<(&String, &str)> =
            self.data.iter().filter_map(|(key, value)| Some((key, plain_text(value)?))).collect();
        if !text.is_empty() {
            out.push_str("stringData:\n");
        }
        for (key, value) in text {
            push_pair(&mut out, key, value);
        }
        let binary: Vec<_> =
            self.data.iter().filter(|(_, value)| plain_text(value).is_none()).collect();
        if !binary.is_empty() {
            out.push_str("data:\n");
        }
        for (key, value) in binary {
            push_pair(&mut out, key, &Zeroizing::new(STANDARD.encode(&**value)));
        }
        out
    }
}

/// Text that YAML can hold in double quotes: control characters beside line breaks and tabs stay base64.
fn plain_text(value: &[u8]) -> Option<&str> {
    let text = std::str::from_utf8(value).ok()?;
    (!text.chars().any(|c| c.is_control() && !matches!(c, '\n' | '\r' | '\t'))).then_some(text)
}

fn push_entry(out: &mut String, key: &str, value: &str) {
    out.push_str(key);
    out.push_str(": ");
    go_json::push_string(out, value); // a JSON string is a YAML string
    out.push('\n');
}

fn push_pair(out: &mut String, key: &str, value: &str) {
    out.push_str("  ");
    go_json::push_string(out, key);
    out.push_str(": ");
    go_json::push_string(out, value);
    out.push('\n');
}

fn push_map(out: &mut String, name: &str, map: &BTreeMap<String, String>) {
    if map.is_empty() {
        return;
    }
    out.push_str(name);
    out.push_str(":\n");
    for (key, value) in map {
        out.push_str("  ");
        push_pair(out, key, value);
    }
}
