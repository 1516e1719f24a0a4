//! Making the bucket (`latchkey registry create`), as the Go library makes a key-value bucket.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::timeout;

use super::api::code;
use super::link::Session;
use super::{Bucket, Nats, Trouble, api};
use crate::error::Result;
use crate::settings::RegistrySettings;

/// Servers of a cluster have to agree first.
const CREATE: Duration = Duration::from_secs(20);
const ALL: Duration = Duration::from_secs(45);

/// What an operator may choose of a bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BucketOptions {
    /// How many servers of a cluster keep a copy: 1, 3 or 5.
    pub replicas: u8,
}

/// What [`create_bucket`] found or did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BucketState {
    Created,
    /// It was there, and is as it would have been made.
    Equal,
    /// It was there, and has been left as it is; one line for each setting that differs, for a person.
    Different(Vec<String>),
}

impl Default for BucketOptions {
    fn default() -> Self {
        Self { replicas: 1 }
    }
}

/// Makes the bucket of the settings, unless it is there. One attempt with a deadline: a person waits for it.
pub async fn create_bucket(
    settings: &RegistrySettings,
    options: BucketOptions,
) -> Result<BucketState> {
    let nats = Nats::connect(settings.clone())?;
    let action = format!("create bucket {}", settings.bucket);
    let session = nats.session(&action).await?;
    let made = timeout(ALL, make(&nats.bucket, &session, options)).await;
    let made = made.unwrap_or_else(|_| {
        Err(Trouble::Silent { what: action.clone(), server: session.server().into() })
    });
    Ok(made.map_err(|trouble| trouble.while_doing(&action))?)
}

async fn make(
    bucket: &Bucket,
    session: &Session,
    options: BucketOptions,
) -> Result<BucketState, Trouble> {
    let wanted = wanted(&bucket.name, options);
    if let Some(there) = look(bucket, session).await? {
        return Ok(compare(&wanted, &there));
    }
    let subject = format!("$JS.API.STREAM.CREATE.KV_{}", bucket.name);
    let action = format!("create bucket {}", bucket.name);
    let answer = session.request(&subject, None, wanted.to_string().into(), CREATE).await;
    let message = answer.map_err(|unanswered| bucket.unanswered(unanswered, session, &action))?;
    match api::answer::<Value>(&message.payload).map_err(|refusal| bucket.refused(refusal, session))
    {
        Ok(_) => Ok(BucketState::Created),
        // Made by somebody else in this moment.
        Err(Trouble::Refused(error)) if error.err_code == code::STREAM_NAME_IN_USE => {
            let there = look(bucket, session).await?;
            Ok(compare(&wanted, &there.unwrap_or_default()))
        }
        Err(trouble) => Err(trouble),
    }
}

/// The configuration of the bucket's stream; None if there is no bucket.
async fn look(bucket: &Bucket, session: &Session) -> Result<Option<Value>, Trouble> {
    let subject = format!("$JS.API.STREAM.INFO.KV_{}", bucket.name);
    let action = format!("look at bucket {}", bucket.name);
    match bucket.ask::<Value>(session, &action, &subject, "".into()).await {
        Ok(info) => Ok(Some(info.get("config").cloned().unwrap_or_default())),
        Err(Trouble::NoBucket { .. }) => Ok(None),
        Err(trouble) => Err(trouble),
    }
}

/// A stream as the Go library makes one for a bucket.
fn wanted(bucket: &str, options: BucketOptions) -> Value {
    json!({
        "name": format!("KV_{bucket}"),
        "subjects": [format!("$KV.{bucket}.>")],
        "retention": "limits",
        "max_consumers": -1,
        "max_msgs_per_subject": 1,
        "max_msgs": -1,
        "max_bytes": -1,
        "max_age": 0,
        "max_msg_size": -1,
        "storage": "file",
        "discard": "new",
        "num_replicas": options.replicas,
        "duplicate_window": 120_000_000_000_u64,
        "deny_delete": true,
        "allow_rollup_hdrs": true,
        "allow_direct": true,
    })
}

fn compare(wanted: &Value, there: &Value) -> BucketState {
    let absent = |wanted: &Value| match wanted {
        Value::Bool(_) => Value::Bool(false),
        Value::Number(_) => json!(0),
        _ => Value::Null,
    };
    let wanted = wanted.as_object().into_iter().flatten();
    let different: Vec<String> = wanted
        .filter_map(|(name, wanted)| {
            let there = there.get(name).cloned().unwrap_or_else(|| absent(wanted));
            (there != *wanted).then(|| format!("{name} is {there}, not {wanted}"))
        })
        .collect();
    if different.is_empty() { BucketState::Equal } else { BucketState::Different(different) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_differs_by_what_it_says_and_by_what_it_does_not() {
        let wanted = wanted("b", BucketOptions { replicas: 3 });
        assert_eq!(compare(&wanted, &wanted), BucketState::Equal);

        let mut there = wanted.clone();
        there["max_age"] = json!(3_600_000_000_000_u64);
        there["num_replicas"] = json!(1);
        there.as_object_mut().unwrap().remove("allow_direct");
        let BucketState::Different(lines) = compare(&wanted, &there) else { panic!() };
        assert_eq!(
            lines,
            [
                "allow_direct is false, not true",
                "max_age is 3600000000000, not 0",
                "num_replicas is 1, not 3",
            ]
        );
    }
}
