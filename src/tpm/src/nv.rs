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

/// TPMA_NV_WRITTEN: set by the TPM with the first write.
const WRITTEN: u32 = 0x2000_0000;
/// A passphrase sealed by RSA-2048.
const BLOB_SIZE: usize = 256;

/// An NV index, without its content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NvIndex {
    pub size: usize,
    /// TPMA_NV, Part 2 §13.4.
    pub attributes: u32,
}

impl NvIndex {
    /// Whether it holds anything yet.
    #[must_use]
    pub fn is_written(&self) -> bool {
        self.attributes & WRITTEN != 0
    }

    /// Whether kcrypt makes such an index, of either generation.
    #[must_use]
    pub fn is_kcrypts(&self) -> bool {
        self.attributes & !WRITTEN == BLOB_ATTRIBUTES && self.size == BLOB_SIZE
    }
}

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
        self.nv_write(handle, content)
    }

    /// Writes over what an index holds, or defines it. For a content of which the caller has another copy: a power cut may
    /// leave neither the old nor the new.
    ///
    /// # Errors
    /// [`TpmError::Occupied`] when the index has another size; [`TpmError::AuthSet`] with an owner password.
    pub fn nv_replace(&mut self, index: u32, content: &[u8]) -> Result<(), TpmError> {
        let (handle, size) = match self.nv_public(index) {
            Err(TpmError::NvMissing { .. }) => return self.nv_store_new(index, content),
            public => public?,
        };
        if size != content.len() {
            let what = format!(
                "NV index 0x{index:08x}, which is {size} bytes long instead of {},",
                content.len()
            );
            return Err(TpmError::Occupied { what });
        }
        self.nv_write(handle, content)
    }

    fn nv_write(&mut self, handle: NvIndexHandle, content: &[u8]) -> Result<(), TpmError> {
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

    /// Takes an NV index away, with what is in it.
    ///
    /// # Errors
    /// [`TpmError::NvMissing`]; [`TpmError::AuthSet`] with an owner password.
    pub fn nv_remove(&mut self, index: u32) -> Result<(), TpmError> {
        let (handle, _) = self.nv_public(index)?;
        let removed = self
            .authorized("NV_UndefineSpace", |ctx| ctx.nv_undefine_space(Provision::Owner, handle));
        needs_empty_auth(removed, Hierarchy::Owner)
    }

    fn nv_public(&mut self, index: u32) -> Result<(NvIndexHandle, usize), TpmError> {
        self.nv_describe(index).map(|(handle, described)| (handle, described.size))
    }

    pub(crate) fn nv_describe(&mut self, index: u32) -> Result<(NvIndexHandle, NvIndex), TpmError> {
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
        // TPMS_NV_PUBLIC, as the library was just told it to make its handle (Part 2 §13.5): index,
        // name algorithm, attributes, policy, size.
        let response = self.last_response();
        let public = Parameters::without_sessions(OPERATION, &response)?.sized()?;
        let size = public.last_chunk::<2>().map(|size| usize::from(u16::from_be_bytes(*size)));
        let attributes = crate::transport::be_u32(public, 6);
        let (Some(size), Some(attributes)) = (size, attributes) else {
            let why = "the public area is cut off".into();
            return Err(TpmError::Malformed { operation: OPERATION, why });
        };
        Ok((handle, NvIndex { size, attributes }))
    }
}
