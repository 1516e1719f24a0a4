//! A quote over PCRs of the SHA-256 bank, with the values it covers. `protocols/kcrypt.md` §6.3.

use std::collections::BTreeMap;

use sha2::{Digest, Sha256};
use tss_esapi::interface_types::algorithm::HashingAlgorithm;
use tss_esapi::structures::{
    Data, PcrSelectionList, PcrSelectionListBuilder, PcrSlot, SignatureScheme,
};
use tss_esapi::traits::Marshall;

use crate::attestation::AttestationKey;
use crate::{Tpm, TpmError};

/// How often a quote is made again because a PCR was extended between it and the reading.
const MAX_TRIES: u32 = 5;
/// TPML_DIGEST holds this many: Part 2 §10.9.4.
const MOST_READ: usize = 8;

/// TPMS_ATTEST, TPMT_SIGNATURE, and the values that the attested digest covers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quote {
    pub attest: Vec<u8>,
    pub signature: Vec<u8>,
    pub pcrs: BTreeMap<u8, [u8; 32]>,
}

impl Tpm {
    /// Quotes `pcrs` (indices 0 to 23) with `nonce` as qualifying data, and reads them;
    /// both again while they do not fit together.
    ///
    /// # Errors
    /// [`TpmError::Malformed`] when the TPM has no SHA-256 bank or an index is out of range;
    /// [`TpmError::PcrsUnsteady`] when a PCR was extended each time.
    pub fn quote(
        &mut self,
        ak: &AttestationKey,
        nonce: &[u8],
        pcrs: &[u8],
    ) -> Result<Quote, TpmError> {
        let selection = select(pcrs)?;
        for _ in 0..MAX_TRIES {
            let (attest, signature) = self.quote_once(ak, nonce, &selection)?;
            let values = self.read_pcrs(pcrs)?;
            let digest =
                values.values().fold(Sha256::new(), |hash, value| hash.chain_update(value));
            // pcrDigest is the last member of a quote: Part 2 §10.12.1.
            if attest.ends_with(&digest.finalize()) {
                return Ok(Quote { attest, signature, pcrs: values });
            }
            log::debug!("a PCR changed between the quote and the reading; quoting again");
        }
        Err(TpmError::PcrsUnsteady { tries: MAX_TRIES })
    }

    fn quote_once(
        &mut self,
        ak: &AttestationKey,
        nonce: &[u8],
        selection: &PcrSelectionList,
    ) -> Result<(Vec<u8>, Vec<u8>), TpmError> {
        const OPERATION: &str = "Quote";
        let library = |error| TpmError::Library { operation: OPERATION, error };
        let nonce = Data::try_from(nonce).map_err(library)?;
        let (attest, signature) = self.authorized(OPERATION, |ctx| {
            ctx.quote(ak.key, nonce, SignatureScheme::Null, selection.clone())
        })?;
        Ok((attest.marshall().map_err(library)?, signature.marshall().map_err(library)?))
    }

    pub(crate) fn read_pcrs(&mut self, pcrs: &[u8]) -> Result<BTreeMap<u8, [u8; 32]>, TpmError> {
        let mut indices = pcrs.to_vec();
        indices.sort_unstable();
        indices.dedup();
        let mut values = BTreeMap::new();
        for some in indices.chunks(MOST_READ) {
            let selection = select(some)?;
            let (_, _, digests) = self.plain("PCR_Read", |ctx| ctx.pcr_read(selection))?;
            if digests.value().len() != some.len() {
                return Err(malformed("the TPM has no SHA-256 bank, or not these PCRs in it"));
            }
            for (index, digest) in some.iter().zip(digests.value()) {
                let value = digest.as_slice().try_into();
                values.insert(*index, value.map_err(|_| malformed("a PCR is not 32 bytes long"))?);
            }
        }
        Ok(values)
    }
}

fn select(pcrs: &[u8]) -> Result<PcrSelectionList, TpmError> {
    let slots = pcrs
        .iter()
        .map(|index| {
            1_u32.checked_shl(u32::from(*index)).and_then(|bit| PcrSlot::try_from(bit).ok())
        })
        .collect::<Option<Vec<_>>>()
        .filter(|slots| !slots.is_empty())
        .ok_or_else(|| malformed("one PCR at least, of 0 to 23, can be quoted"))?;
    PcrSelectionListBuilder::new()
        .with_selection(HashingAlgorithm::Sha256, &slots)
        .build()
        .map_err(|error| TpmError::Library { operation: "Quote", error })
}

fn malformed(why: &str) -> TpmError {
    TpmError::Malformed { operation: "Quote", why: why.to_owned() }
}
