//! The plugin protocol of kcrypt (go-pluggable): a request on stdin, a response on stdout (`protocols/kcrypt.md` §8).

use serde::de::MapAccess;
use zeroize::Zeroizing;

use crate::{Error, Result, go_json};

/// The event kcrypt asks a passphrase with; also the program's first argument.
pub const DISCOVERY_PASSWORD: &str = "discovery.password";

/// What ghw says instead of a fact it does not have.
const UNKNOWN: &str = "unknown";

/// The file system type of a LUKS partition.
const LUKS: &str = "crypto_LUKS";

/// An event on stdin.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Request {
    /// The event's name.
    pub name: String,
    /// JSON text; empty if it was longer than 8,192 bytes and is in `file` instead.
    pub data: String,
    /// Path of the file that holds the data, or empty.
    pub file: String,
}

impl Request {
    /// Reads an event.
    pub fn from_json(json: &[u8]) -> Result<Self> {
        go_json::parse("plugin request", json)
    }
}

impl go_json::GoObject for Request {
    fn take<'de, A: MapAccess<'de>>(&mut self, key: &str, map: &mut A) -> Result<bool, A::Error> {
        match key {
            "name" => self.name = go_json::text(map)?,
            "data" => self.data = go_json::text(map)?,
            "file" => self.file = go_json::text(map)?,
            _ => return Ok(false),
        }
        Ok(true)
    }
}

/// The partition a passphrase is wanted for. A fact that is not known is empty, never `unknown`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PartitionQuery {
    /// File system label; of a LUKS partition, the LUKS2 label.
    pub label: String,
    /// Kernel device name (`sda3`), not a path.
    pub name: String,
    /// UUID of the GPT partition.
    pub uuid: String,
    /// Whether the caller says that it holds LUKS.
    pub is_luks: bool,
    /// Key server that takes precedence over the configured one (generation 2).
    pub server: Option<String>,
    /// Whether the server is to be found by mDNS (generation 2).
    pub mdns: bool,
}

impl PartitionQuery {
    /// Reads the data of a `discovery.password` event, in either generation's shape (§8.3).
    ///
    /// With a `partition` in it, `label` is the file system's. Without, it is the *GPT* label, and the file
    /// system's is `filesystem_label` (callers of the ghw 0.8 era know only `label`).
    pub fn from_json(data: &[u8]) -> Result<Self> {
        let payload: PayloadFields = go_json::parse("partition in plugin request", data)?;
        let label = match (&payload.nested, payload.flat.filesystem_label.is_empty()) {
            (Some(partition), _) => partition.label.clone(),
            (None, true) => payload.flat.label.clone(),
            (None, false) => payload.flat.filesystem_label.clone(),
        };
        let facts = payload.nested.unwrap_or(payload.flat);
        let query = Self {
            label: known(label),
            name: known(facts.name),
            uuid: known(facts.uuid),
            is_luks: facts.kind == LUKS,
            server: Some(payload.challenger_server).filter(|server| !server.is_empty()),
            mdns: payload.mdns,
        };
        if query.label.is_empty() && query.name.is_empty() && query.uuid.is_empty() {
            return Err(Error::NoPartition);
        }
        Ok(query)
    }
}

fn known(fact: String) -> String {
    if fact == UNKNOWN { String::new() } else { fact }
}

/// What both shapes say about a partition.
#[derive(Default)]
struct PartitionFields {
    name: String,
    label: String,
    filesystem_label: String,
    uuid: String,
    kind: String,
}

impl go_json::GoObject for PartitionFields {
    fn take<'de, A: MapAccess<'de>>(&mut self, key: &str, map: &mut A) -> Result<bool, A::Error> {
        match key {
            "name" => self.name = go_json::text(map)?,
            "label" => self.label = go_json::text(map)?,
            "filesystem_label" => self.filesystem_label = go_json::text(map)?,
            "uuid" => self.uuid = go_json::text(map)?,
            "type" | "fs" => self.kind = go_json::text(map)?,
            _ => return Ok(false),
        }
        Ok(true)
    }
}

#[derive(Default)]
struct PayloadFields {
    nested: Option<PartitionFields>,
    flat: PartitionFields,
    challenger_server: String,
    mdns: bool,
}

impl go_json::GoObject for PayloadFields {
    fn take<'de, A: MapAccess<'de>>(&mut self, key: &str, map: &mut A) -> Result<bool, A::Error> {
        match key {
            "partition" => self.nested = Some(go_json::object(map)?),
            "challenger_server" => self.challenger_server = go_json::text(map)?,
            "mdns" => self.mdns = go_json::boolean(map)?,
            _ => return self.flat.take(key, map),
        }
        Ok(true)
    }
}

/// The answer on stdout. The program exits with 0 even if `error` is set.
#[derive(Clone, Default)]
pub struct Response {
    /// Only logged by the caller.
    pub state: String,
    /// The passphrase.
    pub data: Zeroizing<String>,
    /// Why there is none.
    pub error: String,
    /// What the caller may log. Never a secret.
    pub log: String,
}

impl Response {
    /// As Go writes it, without a newline: a stray byte makes the caller's decoder fail.
    #[must_use]
    pub fn to_json(&self) -> Zeroizing<String> {
        let room = [&self.state, &*self.data, &self.error, &self.log]
            .map(|text| go_json::room(text))
            .iter()
            .sum::<usize>();
        let mut out = Zeroizing::new(String::with_capacity(room + 64));
        out.push_str(r#"{"state":"#);
        go_json::push_string(&mut out, &self.state);
        out.push_str(r#","data":"#);
        go_json::push_string(&mut out, &self.data);
        out.push_str(r#","error":"#);
        go_json::push_string(&mut out, &self.error);
        out.push_str(r#","log":"#);
        go_json::push_string(&mut out, &self.log);
        out.push('}');
        out
    }

    /// Reads an answer, for whoever stands in for kcrypt.
    pub fn from_json(json: &[u8]) -> Result<Self> {
        go_json::parse("plugin response", json)
    }
}

impl std::fmt::Debug for Response {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Response")
            .field("state", &self.state)
            .field("data", &format_args!("{} bytes", self.data.len()))
            .field("error", &self.error)
            .field("log", &self.log)
            .finish()
    }
}

impl go_json::GoObject for Response {
    fn take<'de, A: MapAccess<'de>>(&mut self, key: &str, map: &mut A) -> Result<bool, A::Error> {
        match key {
            "state" => self.state = go_json::text(map)?,
            "data" => self.data = Zeroizing::new(go_json::text(map)?),
            "error" => self.error = go_json::text(map)?,
            "log" => self.log = go_json::text(map)?,
            _ => return Ok(false),
        }
        Ok(true)
    }
}
