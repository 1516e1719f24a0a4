//! What can go wrong between us and a TPM, as things a caller can tell apart.

use std::fmt;
use std::io;

/// An operation on the TPM failed.
#[derive(Debug, thiserror::Error)]
pub enum TpmError {
    #[error("`tpm_device: {text}` is no address of a TPM: {why}")]
    Address { text: String, why: &'static str },

    #[error(
        "no TPM: {tried} does not exist. Is it enabled in the firmware, and its driver (tpm_tis, tpm_crb) in the initramfs?"
    )]
    Missing { tried: String },

    #[error("{device} is in use by another program. Stop that program, or use /dev/tpmrm0")]
    Busy { device: String },

    #[error("cannot open the TPM at {device}: {error}")]
    Open { device: String, error: io::Error },

    #[error("the connection to the TPM broke at {operation}. Reset or power-cycle the machine")]
    Connection { operation: &'static str },

    #[error(
        "the TPM is in dictionary-attack lockout and refuses {operation}. It recovers by itself with time, or by `tpm2_dictionarylockout --clear-lockout`"
    )]
    Lockout { operation: &'static str },

    #[error(
        "the TPM's {hierarchy} hierarchy has a password, so {operation} is refused. Kcrypt needs it empty: `tpm2_changeauth -c {hierarchy} -p OLD`"
    )]
    AuthSet { operation: &'static str, hierarchy: Hierarchy },

    #[error("{operation}: the TPM answered 0x{code:03x} ({})", meaning(*.code))]
    Response { operation: &'static str, code: u32 },

    #[error(
        "the TPM holds something else at {what}, and latchkey replaces nothing that it did not make"
    )]
    Occupied { what: String },

    #[error("the TPM has no NV index 0x{index:08x}")]
    NvMissing { index: u32 },

    #[error("NV index 0x{index:08x} exists but nothing was ever written to it")]
    NvUnwritten { index: u32 },

    #[error("{operation}: what the TPM sent cannot be read: {why}")]
    Malformed { operation: &'static str, why: String },

    #[error(
        "Quote: the PCRs were extended between each of {tries} quotes and the reading of their values. Something measures all the time; see the TPM event log"
    )]
    PcrsUnsteady { tries: u32 },

    #[error("{operation}: {error}")]
    Library { operation: &'static str, error: tss_esapi::Error },
}

/// The hierarchies whose authorization kcrypt expects to be empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hierarchy {
    Owner,
    Endorsement,
}

impl fmt::Display for Hierarchy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Owner => "owner",
            Self::Endorsement => "endorsement",
        })
    }
}

/// TPM 2.0 Library Part 2 §6.6.3, without the bits that say which session or parameter is meant.
pub(crate) mod rc {
    pub(crate) const LOCKOUT: u32 = 0x921;
    pub(crate) const NV_UNINITIALIZED: u32 = 0x14a;
    pub(crate) const NV_DEFINED: u32 = 0x14c;
    pub(crate) const HANDLE: u32 = 0x08b;
    pub(crate) const INTEGRITY: u32 = 0x09f;
    pub(crate) const POLICY_FAIL: u32 = 0x09d;
    pub(crate) const BAD_AUTH: u32 = 0x0a2;
    pub(crate) const AUTH_FAIL: u32 = 0x08e;
    pub(crate) const VALUE: u32 = 0x084;
    pub(crate) const SIZE: u32 = 0x095;

    /// A format-one code (bit 7) without parameter, handle and session numbers.
    pub(crate) fn base(code: u32) -> u32 {
        if code & 0x80 != 0 { code & 0x0bf } else { code }
    }
}

fn meaning(code: u32) -> &'static str {
    match rc::base(code) {
        rc::LOCKOUT => "dictionary-attack lockout",
        rc::NV_UNINITIALIZED => "the NV index was never written",
        rc::NV_DEFINED => "the NV index is defined already",
        rc::HANDLE => "there is nothing at that handle",
        rc::INTEGRITY => "integrity check failed: made for another key or another TPM",
        rc::POLICY_FAIL => "policy check failed: the key is not an endorsement key",
        rc::BAD_AUTH | rc::AUTH_FAIL => "authorization failed",
        rc::VALUE => "a value is out of range, or the data was made for another key",
        rc::SIZE => "a structure has the wrong size",
        0x101 => "failure: the data was made for another key, or the TPM has failed",
        0x120 => "command blocked",
        0x902 => "out of memory for objects",
        0x903 => "out of memory for sessions",
        0x923 => "NV is not available",
        _ => "see TPM 2.0 Library Part 2, table 17",
    }
}
