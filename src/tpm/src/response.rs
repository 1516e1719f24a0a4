//! The parameters of a response as they came over the wire: TPM 2.0 Library Part 1 §18.

use crate::TpmError;
use crate::transport::be_u32;

const HEADER: usize = 10;

/// A reader over a response's parameter area.
pub(crate) struct Parameters<'a> {
    operation: &'static str,
    rest: &'a [u8],
}

impl<'a> Parameters<'a> {
    /// Of a response to a command that took no authorization and returned no handle.
    pub(crate) fn without_sessions(
        operation: &'static str,
        response: &'a [u8],
    ) -> Result<Self, TpmError> {
        let rest = response.get(HEADER..);
        rest.map(|rest| Self { operation, rest })
            .ok_or_else(|| malformed(operation, "it is too short"))
    }

    /// Of a response that has a parameter size before the parameters and sessions after them.
    pub(crate) fn with_sessions(
        operation: &'static str,
        response: &'a [u8],
    ) -> Result<Self, TpmError> {
        let size =
            be_u32(response, HEADER).ok_or_else(|| malformed(operation, "it is too short"))?;
        let from = HEADER + 4;
        response
            .get(from..from.saturating_add(size as usize))
            .map(|rest| Self { operation, rest })
            .ok_or_else(|| malformed(operation, "the parameter size exceeds it"))
    }

    /// The content of the next TPM2B.
    pub(crate) fn sized(&mut self) -> Result<&'a [u8], TpmError> {
        let missing = || malformed(self.operation, "a sized structure is cut off");
        let (prefix, rest) = self.rest.split_first_chunk::<2>().ok_or_else(missing)?;
        let size = usize::from(u16::from_be_bytes(*prefix));
        let (content, rest) = rest.split_at_checked(size).ok_or_else(missing)?;
        self.rest = rest;
        Ok(content)
    }

    pub(crate) fn remaining(&self) -> &'a [u8] {
        self.rest
    }
}

fn malformed(operation: &'static str, why: &str) -> TpmError {
    TpmError::Malformed { operation, why: why.to_owned() }
}
