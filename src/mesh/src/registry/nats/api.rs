//! The part of the JetStream API that a member needs: stream, consumer and message as it describes them
//! (protocols/ikto-kilo.md §1.6, NATS ADR-8).

use serde::Deserialize;
use serde_json::{Value, json};

/// The consumer's heartbeat.
pub(super) const HEARTBEAT: std::time::Duration = std::time::Duration::from_secs(5);

/// Header of a write that expects this sequence number to be the newest of its subject.
pub(super) const EXPECTED: &str = "Nats-Expected-Last-Subject-Sequence";
/// Header that marks a deleted key: `DEL` or `PURGE`.
pub(super) const OPERATION: &str = "KV-Operation";

/// `err_code` of answers.
pub(super) mod code {
    pub(in super::super) const NO_MESSAGE: u64 = 10037;
    pub(in super::super) const NOT_ENABLED_FOR_ACCOUNT: u64 = 10039;
    pub(in super::super) const STREAM_NAME_IN_USE: u64 = 10058;
    pub(in super::super) const STREAM_NOT_FOUND: u64 = 10059;
    pub(in super::super) const WRONG_LAST_SEQUENCE: u64 = 10071;
    pub(in super::super) const NOT_ENABLED: u64 = 10076;
}

/// A refusal by the API.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct ApiError {
    #[serde(default)]
    pub(super) err_code: u64,
    #[serde(default)]
    pub(super) description: String,
}

/// What a member asks of `$JS.API.STREAM.INFO`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct StreamInfo {
    /// RFC 3339 with nanoseconds.
    pub(super) created: String,
    pub(super) config: StreamConfig,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct StreamConfig {
    #[serde(default)]
    pub(super) allow_direct: bool,
    /// Nanoseconds; 0: for ever.
    #[serde(default)]
    pub(super) max_age: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct ConsumerInfo {
    #[serde(default)]
    pub(super) num_pending: u64,
}

/// The answer to a write.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct PubAck {
    pub(super) seq: u64,
}

/// The answer to `$JS.API.STREAM.MSG.GET`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct StoredMessage {
    pub(super) message: Stored,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct Stored {
    pub(super) seq: u64,
    /// Base64.
    #[serde(default)]
    pub(super) data: String,
    /// Base64.
    #[serde(default)]
    pub(super) hdrs: String,
}

/// What is wrong with an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Refusal {
    Api(ApiError),
    NotUnderstood(String),
}

/// Reads an answer of the API.
pub(super) fn answer<T: for<'de> Deserialize<'de>>(payload: &[u8]) -> Result<T, Refusal> {
    let not_understood = |error: serde_json::Error| Refusal::NotUnderstood(error.to_string());
    let value: Value = serde_json::from_slice(payload).map_err(not_understood)?;
    match value.get("error") {
        Some(error) => Err(Refusal::Api(ApiError::deserialize(error).map_err(not_understood)?)),
        None => T::deserialize(value).map_err(not_understood),
    }
}

/// A consumer that sends the newest value of each key, then what changes, to `inbox`. Named, as least permissions want it.
pub(super) fn consumer(bucket: &str, name: &str, inbox: &str) -> (String, String) {
    let filter = format!("$KV.{bucket}.peers.*");
    let subject = format!("$JS.API.CONSUMER.CREATE.KV_{bucket}.{name}.{filter}");
    let request = json!({ "stream_name": format!("KV_{bucket}"), "config": {
        "name": name,
        "deliver_subject": inbox,
        "filter_subject": filter,
        "deliver_policy": "last_per_subject",
        "ack_policy": "none",
        "replay_policy": "instant",
        "max_deliver": 1,
        "flow_control": true,
        "idle_heartbeat": u64::try_from(HEARTBEAT.as_nanos()).unwrap_or(u64::MAX),
        "num_replicas": 1,
        "mem_storage": true,
    } });
    (subject, request.to_string())
}

/// Where a delivered message stands, as its reply subject says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Position {
    /// Sequence number in the stream: the revision.
    pub(super) stream: u64,
    /// Sequence number among what this consumer was sent, from 1.
    pub(super) consumer: u64,
    /// How many are still to come.
    pub(super) pending: u64,
}

impl Position {
    /// `$JS.ACK.<stream>.<consumer>.<delivered>.<stream seq>.<consumer seq>.<time>.<pending>`, and from newer servers with
    /// domain and account before the stream, and perhaps more at the end.
    pub(super) fn read(reply: &str) -> Option<Self> {
        let tokens: Vec<&str> = reply.strip_prefix("$JS.ACK.")?.split('.').collect();
        let skip = match tokens.len() {
            7 => 0,
            9.. => 2,
            _ => return None,
        };
        let number = |n: usize| tokens.get(skip + n)?.parse().ok();
        Some(Self { stream: number(3)?, consumer: number(4)?, pending: number(6)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_read_in_both_forms() {
        let expected = Some(Position { stream: 12, consumer: 3, pending: 4 });
        for reply in [
            "$JS.ACK.KV_b.name.1.12.3.1700000000000000000.4",
            "$JS.ACK._.ACCHASH.KV_b.name.1.12.3.1700000000000000000.4",
            "$JS.ACK.hub.ACCHASH.KV_b.name.1.12.3.1700000000000000000.4.token",
        ] {
            assert_eq!(Position::read(reply), expected, "{reply}");
        }
    }

    #[test]
    fn other_subjects_are_no_positions() {
        for reply in [
            "",
            "_INBOX.x",
            "$JS.ACK.KV_b.name.1.12.3.17",
            "$JS.ACK.KV_b.name.1.12.3.17.4.5",
            "$JS.ACK.KV_b.name.1.x.3.17.4",
            "$JS.ACK.KV_b.name.1.99999999999999999999.3.17.4",
        ] {
            assert_eq!(Position::read(reply), None, "{reply}");
        }
    }

    #[test]
    fn an_answer_is_what_was_asked_for_or_a_refusal() {
        let ack = answer::<PubAck>(br#"{"stream":"KV_b","seq":7}"#);
        assert_eq!(ack, Ok(PubAck { seq: 7 }));
        let refused = answer::<PubAck>(
            br#"{"error":{"code":400,"err_code":10071,"description":"wrong last sequence: 7"},"stream":"KV_b","seq":0}"#,
        );
        let Err(Refusal::Api(error)) = refused else { panic!("{refused:?}") };
        assert_eq!(error.err_code, code::WRONG_LAST_SEQUENCE);
        for nonsense in ["", "[]", "{}", r#"{"seq":-1}"#, "\u{1}"] {
            let read = answer::<PubAck>(nonsense.as_bytes());
            assert!(matches!(read, Err(Refusal::NotUnderstood(_))), "{nonsense}");
        }
    }
}
