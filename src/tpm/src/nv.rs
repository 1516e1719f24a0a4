//! NV indices: TPM 2.0 Library Part 3 §31. Read in chunks, defined once, never overwritten by chance.

use tss_esapi::attributes::NvIndexAttributes;
use tss_esapi::handles::{NvIndexHandle, NvIndexTpmHandle, TpmHandle};
use tss_esapi::interface_types::algorithm::HashingAlgorithm;
use tss_esapi::interface_types::resource_handles::{NvAuth, Provision};
use tss_esapi::structures::{MaxNvBuffer, NvPublicBuilder};
use zeroize::Zeroizing;

use crate::error::rc;
use crate::response::Parameters;
use crate::{Hierarchy, Tpm, TpmError, needs_empty_auth};

/// Every TPM transfers at least 512 bytes at once (PC Client Platform TPM Profile 1.05 §4.5,
/// TPM_PT_NV_BUFFER_MAX); asking what it could do beyond costs as much as a second chunk.
const CHUNK: u16 = 512;
/// The largest index read: EK certificates are 1 to 2 KiB, a sealed passphrase is 256 bytes.
const MAX_INDEX: usize = 8192;
/// ownerwrite, ownerread, authread, ppread: `protocols/kcrypt.md` §9.2.
const BLOB_ATTRIBUTES: u32 = 0x0007_0002;

/// Whose authorization a read uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ReadAs {
    Owner,
    Index,
}

impl Tpm {
    /// The whole content of an NV index.
    pub(crate) fn nv_read(
        &mut self,
        index: u32,
        read_as: ReadAs,
    ) -> Result<Zeroizing<Vec<u8>>, TpmError> {
        let (handle, size) = self.nv_public(index)?;
        if size > MAX_INDEX {
            let why = format!("NV index 0x{index:08x} claims {size} bytes, more than {MAX_INDEX}");
            return Err(TpmError::Malformed { operation: "NV_ReadPublic", why });
        }
        let auth = match read_as {
            ReadAs::Owner => NvAuth::Owner,
            ReadAs::Index => NvAuth::NvIndex(handle),
        };
        let mut content = Zeroizing::new(Vec::with_capacity(size));
        while content.len() < size {
            let length = CHUNK.min((size - content.len()) as u16);
            let offset = content.len() as u16;
            let read = self.authorized("NV_Read", |ctx| ctx.nv_read(auth, handle, length, offset));
            let chunk = match read {
                Err(TpmError::Response { code: rc::NV_UNINITIALIZED, .. }) => {
                    return Err(TpmError::NvUnwritten { index });
                }
                other if read_as == ReadAs::Owner => needs_empty_auth(other, Hierarchy::Owner)?,
                other => other?,
            };
            if chunk.len() != usize::from(length) {
                let why = format!("{} bytes came for {length}", chunk.len());
                return Err(TpmError::Malformed { operation: "NV_Read", why });
            }
            content.extend_from_slice(&chunk);
        }
        Ok(content)
    }

    /// The sealed passphrase of offline mode.
    ///
    /// # Errors
    /// [`TpmError::NvMissing`] and [`TpmError::NvUnwritten`] when there is none: the machine was
    /// never installed, or its installation was cut off.
    pub fn nv_blob(&mut self, index: u32) -> Result<Zeroizing<Vec<u8>>, TpmError> {
        self.nv_read(index, ReadAs::Owner)
    }

    /// Defines an index for a sealed passphrase and writes it.
    ///
    /// An index that was defined but never written (a power cut between the two commands) is
    /// written now. One that holds something is left alone.
    ///
    /// # Errors
    /// [`TpmError::Occupied`] when the index holds data already.
    pub fn nv_store_new(&mut self, index: u32, content: &[u8]) -> Result<(), TpmError> {
        match self.nv_read(index, ReadAs::Owner) {
            Err(TpmError::NvMissing { .. }) => self.nv_define(index, content.len())?,
            Err(TpmError::NvUnwritten { .. }) => {}
            Err(error) => return Err(error),
            Ok(_) => return Err(TpmError::Occupied { what: format!("NV index 0x{index:08x}") }),
        }
        let (handle, size) = self.nv_public(index)?;
        if size != content.len() {
            let what = format!(
                "NV index 0x{index:08x}, which is {size} bytes long instead of {},",
                content.len()
            );
            return Err(TpmError::Occupied { what });
        }
        for (number, chunk) in content.chunks(usize::from(CHUNK)).enumerate() {
            let data = MaxNvBuffer::try_from(chunk)
                .map_err(|error| TpmError::Library { operation: "NV_Write", error })?;
            let offset = (number * usize::from(CHUNK)) as u16;
            let written = self
                .authorized("NV_Write", |ctx| ctx.nv_write(NvAuth::Owner, handle, data, offset));
            needs_empty_auth(written, Hierarchy::Owner)?;
        }
        Ok(())
    }

    fn nv_define(&mut self, index: u32, size: usize) -> Result<(), TpmError> {
        const OPERATION: &str = "NV_DefineSpace";
        let library = |error| TpmError::Library { operation: OPERATION, error };
        let public = NvPublicBuilder::new()
            .with_nv_index(NvIndexTpmHandle::new(index).map_err(library)?)
            .with_index_name_algorithm(HashingAlgorithm::Sha256)
            .with_index_attributes(NvIndexAttributes(BLOB_ATTRIBUTES))
            .with_data_area_size(size)
            .build()
            .map_err(library)?;
        let defined =
            self.authorized(OPERATION, |ctx| ctx.nv_define_space(Provision::Owner, None, public));
        needs_empty_auth(defined, Hierarchy::Owner).map(drop)
    }

    fn nv_public(&mut self, index: u32) -> Result<(NvIndexHandle, usize), TpmError> {
        const OPERATION: &str = "NV_ReadPublic";
        let tpm_handle = NvIndexTpmHandle::new(index)
            .map_err(|error| TpmError::Library { operation: OPERATION, error })?;
        let found =
            self.plain(OPERATION, |ctx| ctx.tr_from_tpm_public(TpmHandle::NvIndex(tpm_handle)));
        let handle = match found {
            Ok(object) => NvIndexHandle::from(object),
            Err(TpmError::Response { code, .. }) if rc::base(code) == rc::HANDLE => {
                return Err(TpmError::NvMissing { index });
            }
            Err(error) => return Err(error),
        };
        // TPMS_NV_PUBLIC, as the library was just told it to make its handle: its last member is the
        // size (Part 2 §13.5).
        let response = self.last_response();
        let public = Parameters::without_sessions(OPERATION, &response)?.sized()?;
        let size = public.last_chunk::<2>().map(|size| usize::from(u16::from_be_bytes(*size)));
        let size = size.ok_or_else(|| TpmError::Malformed {
            operation: OPERATION,
            why: "the public area is empty".into(),
        })?;
        Ok((handle, size))
    }
}
