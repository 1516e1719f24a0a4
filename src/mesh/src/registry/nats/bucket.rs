//! Making the bucket (`latchkey registry create`), as the Go library makes a key-value bucket.

use crate::error::Result;
use crate::settings::RegistrySettings;

use super::super::RegistryError;

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
    Err(RegistryError::Away {
        action: format!("create bucket {} with {} replicas", settings.bucket, options.replicas),
        reason: "not connected".into(),
    }
    .into())
}
