//! Reading of TPM 2.0 structures (TPM 2.0 Library, Part 2): big-endian integers and `TPM2B` = u16 length + bytes.

use crate::{Error, Result};

/// Reads a structure front to back; each refusal names the structure and the byte.
#[derive(Debug)]
pub(crate) struct Reader<'a> {
    what: &'static str,
    whole: usize,
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(crate) fn new(what: &'static str, bytes: &'a [u8]) -> Self {
        Self { what, whole: bytes.len(), rest: bytes }
    }

    /// The error "`what` is malformed here".
    pub(crate) fn refuse(&self, reason: &'static str) -> Error {
        Error::Structure { what: self.what, at: self.whole - self.rest.len(), reason }
    }

    pub(crate) fn take(&mut self, length: usize) -> Result<&'a [u8]> {
        let Some((taken, rest)) = self.rest.split_at_checked(length) else {
            return Err(self.refuse("it ends early"));
        };
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let Some((taken, rest)) = self.rest.split_first_chunk::<N>() else {
            return Err(self.refuse("it ends early"));
        };
        self.rest = rest;
        Ok(*taken)
    }

    pub(crate) fn u8(&mut self) -> Result<u8> {
        Ok(u8::from_be_bytes(self.array()?))
    }

    pub(crate) fn u16(&mut self) -> Result<u16> {
        Ok(u16::from_be_bytes(self.array()?))
    }

    pub(crate) fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    pub(crate) fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_be_bytes(self.array()?))
    }

    /// A `TPM2B` of at most `limit` bytes.
    pub(crate) fn sized(&mut self, limit: usize) -> Result<&'a [u8]> {
        let length = usize::from(self.u16()?);
        if length > limit {
            return Err(self.refuse("a sized buffer is longer than its kind allows"));
        }
        self.take(length)
    }

    pub(crate) fn end(self) -> Result<()> {
        if self.rest.is_empty() { Ok(()) } else { Err(self.refuse("bytes follow its end")) }
    }
}
