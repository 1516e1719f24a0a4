//! `TPM2_CertifyCreation` (TPM 2.0 Library Part 3 §18.3) by hand: tss-esapi 7.7 does not have it,
//! and kcrypt's servers take no attestation key without it.

use crate::TpmError;
use crate::response::Parameters;
use crate::transport::{Transport, be_u32};

const OPERATION: &str = "CertifyCreation of the AK";
const ST_SESSIONS: u16 = 0x8002;
const CC_CERTIFY_CREATION: u32 = 0x14a;
/// One password authorization: TPM_RS_PW, empty nonce, continueSession, empty password.
const EMPTY_PASSWORD: [u8; 9] = [0x40, 0x00, 0x00, 0x09, 0x00, 0x00, 0x01, 0x00, 0x00];
/// RSASSA with SHA-256.
const SCHEME: [u8; 4] = [0x00, 0x14, 0x00, 0x0b];

/// What `TPM2_Create` answered, as bytes: the server hashes them, so they are not re-encoded.
#[derive(Debug)]
pub(crate) struct Created {
    /// TPMT_PUBLIC, 280 bytes.
    pub(crate) public: Vec<u8>,
    /// TPMS_CREATION_DATA, 115 bytes.
    pub(crate) data: Vec<u8>,
    hash: Vec<u8>,
    /// TPMT_TK_CREATION with its structure intact.
    ticket: Vec<u8>,
}

impl Created {
    pub(crate) fn parse(response: &[u8]) -> Result<Self, TpmError> {
        let mut rest = Parameters::with_sessions(OPERATION, response)?;
        rest.sized()?; // outPrivate goes the library's way
        Ok(Self {
            public: rest.sized()?.to_vec(),
            data: rest.sized()?.to_vec(),
            hash: rest.sized()?.to_vec(),
            ticket: rest.remaining().to_vec(),
        })
    }
}

/// The TPM's own handle of the object that `TPM2_Load` just loaded.
pub(crate) fn loaded_handle(response: &[u8]) -> Result<u32, TpmError> {
    be_u32(response, 10).ok_or_else(|| malformed("Load answered without a handle"))
}

/// TPMS_ATTEST and TPMT_SIGNATURE.
#[derive(Debug)]
pub(crate) struct Certified {
    pub(crate) attestation: Vec<u8>,
    pub(crate) signature: Vec<u8>,
}

/// Lets the key at `handle` certify that the TPM created it.
pub(crate) fn run(
    transport: &mut Transport,
    handle: u32,
    created: &Created,
) -> Result<Certified, TpmError> {
    let response = transport
        .transact(&command(handle, created)?)
        .map_err(|_| TpmError::Connection { operation: OPERATION })?;
    match be_u32(response, 6) {
        Some(0) => {}
        Some(crate::error::rc::LOCKOUT) => return Err(TpmError::Lockout { operation: OPERATION }),
        code => return Err(TpmError::Response { operation: OPERATION, code: code.unwrap_or(0) }),
    }
    let mut rest = Parameters::with_sessions(OPERATION, response)?;
    Ok(Certified { attestation: rest.sized()?.to_vec(), signature: rest.remaining().to_vec() })
}

fn command(handle: u32, created: &Created) -> Result<Vec<u8>, TpmError> {
    let hash_size = u16::try_from(created.hash.len())
        .map_err(|_| malformed("the creation hash is too long"))?;
    let body = [
        &handle.to_be_bytes()[..], // signHandle
        &handle.to_be_bytes(),     // objectHandle
        &(EMPTY_PASSWORD.len() as u32).to_be_bytes(),
        &EMPTY_PASSWORD,
        &[0, 0], // qualifyingData
        &hash_size.to_be_bytes(),
        &created.hash,
        &SCHEME,
        &created.ticket,
    ]
    .concat();
    let size = 10 + body.len() as u32;
    Ok([
        &ST_SESSIONS.to_be_bytes()[..],
        &size.to_be_bytes(),
        &CC_CERTIFY_CREATION.to_be_bytes(),
        &body,
    ]
    .concat())
}

fn malformed(why: &str) -> TpmError {
    TpmError::Malformed { operation: OPERATION, why: why.to_owned() }
}
