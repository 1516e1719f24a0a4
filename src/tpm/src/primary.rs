//! Primary keys: made from a hierarchy's seed by a template, found again at a persistent handle by
//! their public area. TPM 2.0 Library Part 3 §24.1, §28.5.

use tss_esapi::handles::{KeyHandle, ObjectHandle, PersistentTpmHandle, TpmHandle};
use tss_esapi::interface_types::dynamic_handles::Persistent;
use tss_esapi::interface_types::resource_handles::{Hierarchy as Seed, Provision};
use tss_esapi::traits::Marshall;

use crate::error::rc;
use crate::response::Parameters;
use crate::{Hierarchy, Tpm, TpmError, needs_empty_auth, template};

/// A key that is loaded, with its public area (TPMT_PUBLIC) and qualified name.
#[derive(Clone, Debug)]
pub(crate) struct Loaded {
    pub(crate) key: KeyHandle,
    pub(crate) public: Vec<u8>,
    pub(crate) qualified_name: Vec<u8>,
}

impl Tpm {
    /// The object at a persistent handle, or `None` where there is none.
    pub(crate) fn persistent(&mut self, handle: u32) -> Result<Option<Loaded>, TpmError> {
        const OPERATION: &str = "ReadPublic of a persistent handle";
        let library = |error| TpmError::Library { operation: OPERATION, error };
        let tpm_handle = PersistentTpmHandle::new(handle).map_err(library)?;
        let found =
            self.plain(OPERATION, |ctx| ctx.tr_from_tpm_public(TpmHandle::Persistent(tpm_handle)));
        let key = match found {
            Ok(object) => KeyHandle::from(object),
            Err(TpmError::Response { code, .. }) if rc::base(code) == rc::HANDLE => {
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        // The library asked for the public area to make its handle and keeps what it was told.
        let response = self.last_response();
        let mut told = Parameters::without_sessions(OPERATION, &response)?;
        let public = told.sized()?.to_vec();
        told.sized()?; // the name
        Ok(Some(Loaded { key, public, qualified_name: told.sized()?.to_vec() }))
    }

    /// `TPM2_CreatePrimary` with empty authorization; the object is transient.
    pub(crate) fn create_primary(
        &mut self,
        seed: Seed,
        template: &[u8],
        operation: &'static str,
    ) -> Result<Loaded, TpmError> {
        let public = template::public(template)?;
        let hierarchy =
            if seed == Seed::Endorsement { Hierarchy::Endorsement } else { Hierarchy::Owner };
        let created = needs_empty_auth(
            self.authorized(operation, |ctx| {
                ctx.create_primary(seed, public, None, None, None, None)
            }),
            hierarchy,
        )?;
        let public = created
            .out_public
            .marshall()
            .map_err(|error| TpmError::Library { operation, error })?;
        Ok(Loaded { key: created.key_handle, public, qualified_name: Vec::new() })
    }

    /// `TPM2_EvictControl`: gives a transient primary a persistent handle and flushes the transient.
    pub(crate) fn persist(&mut self, key: KeyHandle, handle: u32) -> Result<KeyHandle, TpmError> {
        const OPERATION: &str = "EvictControl";
        let handle = PersistentTpmHandle::new(handle)
            .map_err(|error| TpmError::Library { operation: OPERATION, error })?;
        let object = ObjectHandle::from(key);
        let persisted = needs_empty_auth(
            self.authorized(OPERATION, |ctx| {
                ctx.evict_control(Provision::Owner, object, Persistent::Persistent(handle))
            }),
            Hierarchy::Owner,
        )?;
        self.flush(key);
        Ok(KeyHandle::from(persisted))
    }

    /// `TPM2_EvictControl` the other way: the object at a persistent handle goes.
    pub(crate) fn evict(&mut self, key: KeyHandle, handle: u32) -> Result<(), TpmError> {
        const OPERATION: &str = "EvictControl";
        let handle = PersistentTpmHandle::new(handle)
            .map_err(|error| TpmError::Library { operation: OPERATION, error })?;
        let evicted = self.authorized(OPERATION, |ctx| {
            ctx.evict_control(Provision::Owner, key.into(), Persistent::Persistent(handle))
        });
        needs_empty_auth(evicted, Hierarchy::Owner).map(drop)
    }

    /// Flushes a transient object. A failure is only worth a line: the context flushes what is left
    /// when it is dropped, and the kernel's resource manager when the device is closed.
    pub(crate) fn flush(&mut self, key: KeyHandle) {
        if let Err(error) = self.plain("FlushContext", |ctx| ctx.flush_context(key.into())) {
            log::debug!("{error}");
        }
    }

    /// A storage parent for the attestation key: what is at the SRK's handle if it is a storage
    /// parent by its public area, else a fresh SRK, which is persisted where the handle is free.
    pub(crate) fn storage_root(&mut self) -> Result<KeyHandle, TpmError> {
        let found = self.persistent(crate::handle::SRK)?;
        if let Some(loaded) = &found {
            if is_storage_parent(&loaded.public) {
                return Ok(loaded.key);
            }
            log::warn!(
                "persistent handle 0x{:08x} is no storage parent; using a transient SRK instead",
                crate::handle::SRK
            );
        }
        let created =
            self.create_primary(Seed::Owner, &template::SRK, "CreatePrimary of the SRK")?;
        if found.is_some() {
            return Ok(created.key);
        }
        self.persist(created.key, crate::handle::SRK)
    }
}

/// fixedTPM, fixedParent, userWithAuth, restricted and decrypt are what makes a key a parent that
/// we can use with empty authorization; RSA or ECC is all the same to the attestation key.
pub(crate) fn is_storage_parent(public: &[u8]) -> bool {
    const NEEDED: u32 = 0x2 | 0x10 | 0x40 | 0x1_0000 | 0x2_0000;
    let kind = public.get(..2);
    let attributes = crate::transport::be_u32(public, 4).unwrap_or(0);
    matches!(kind, Some([0x00, 0x01 | 0x23])) && attributes & NEEDED == NEEDED
}
