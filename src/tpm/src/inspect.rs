//! What a TPM is and what it holds, for whoever has to find out why it does not work. Nothing here changes it.
//! TPM 2.0 Library Part 2 §6.13 and §8.6, Part 3 §30.2; `protocols/kcrypt.md` §1.2, §1.4, §9.

use std::collections::BTreeMap;

use latchkey_wire::pubhash::{Pubhash, rsa_spki};
use tss_esapi::interface_types::resource_handles::Hierarchy as Seed;

use crate::ek::{CertifiedKey, modulus_of, qualified_name_under, recognize};
use crate::error::rc;
use crate::nv::NvIndex;
use crate::primary::{Loaded, is_storage_parent};
use crate::transport::be_u32;
use crate::{Hierarchy, Tpm, TpmError, handle, template};

const CC_GET_CAPABILITY: u32 = 0x17a;
const ST_NO_SESSIONS: u16 = 0x8001;
const CAP_HANDLES: u32 = 1;
const CAP_TPM_PROPERTIES: u32 = 6;
/// The fixed properties begin here, the variable ones at 0x200.
const PT_FIXED: u32 = 0x100;
const PT_VAR: u32 = 0x200;
/// One answer has room for more; a TPM has about 50 of each kind.
const MAX_VALUES: u32 = 100;
/// The ECC P-256 EK certificate, TCG EK Credential Profile 2.5 §2.2.1.4.
const NV_ECC_CERTIFICATE: u32 = 0x01c0_000a;
const RH_OWNER: u32 = 0x4000_0001;
const RH_ENDORSEMENT: u32 = 0x4000_000b;

/// The persistent handles that kcrypt uses, and for what; the last is the default of `c_index`.
pub const KCRYPT_HANDLES: [(u32, &str); 3] = [
    (handle::EK, "endorsement key"),
    (handle::SRK, "storage root key"),
    (handle::BLOB_KEY, "key that seals passphrases"),
];

/// What the TPM says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Properties {
    /// Four characters: `IFX`, `IBM`, `NTC`.
    pub manufacturer: String,
    /// The maker's own name for it.
    pub vendor: String,
    /// As makers write it: four numbers of 16 bits.
    pub firmware: [u16; 4],
    pub owner_auth_set: bool,
    pub endorsement_auth_set: bool,
    pub lockout_auth_set: bool,
    pub in_lockout: bool,
    /// Failed authorizations that still count, and how many lead to lockout.
    pub failures: u32,
    pub max_failures: u32,
    /// Seconds after which one failure is forgotten.
    pub forgets_after: u32,
}

/// A persistent object, by its public area and the hierarchy it is from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held {
    /// RSA-2048 by the default template, in the endorsement hierarchy.
    EndorsementKey,
    /// RSA-2048 by kcrypt's SRK template. Newer Kairos makes it in the endorsement hierarchy.
    StorageRoot(Hierarchy),
    /// Another storage parent that kcrypt can use: systemd's is ECC.
    OtherParent,
    /// The RSA-OAEP key of either generation, in the owner hierarchy.
    BlobKey,
    /// Something else that can decrypt as the blob key does.
    OtherDecrypter,
    Foreign,
}

impl Held {
    /// Whether kcrypt makes such an object.
    #[must_use]
    pub fn is_kcrypts(self) -> bool {
        matches!(self, Self::EndorsementKey | Self::StorageRoot(_) | Self::BlobKey)
    }
}

/// The endorsement key by both ways of naming it, and its certificates.
#[derive(Clone, Debug)]
pub struct Endorsement {
    /// The pubhash of the key in the RSA certificate, or why there is none.
    pub by_certificate: Result<Pubhash, String>,
    /// Bytes in the certificate's NV index.
    pub certificate_size: Option<usize>,
    pub by_template: Pubhash,
    /// The one of the two that this project goes by: of a key that the TPM has.
    pub used: Pubhash,
    /// Kcrypt never uses it.
    pub has_ecc_certificate: bool,
}

impl Endorsement {
    /// Whether two programs may come to two names for this machine.
    #[must_use]
    pub fn differs(&self) -> bool {
        self.by_certificate.as_ref().is_ok_and(|certified| *certified != self.by_template)
    }
}

impl Tpm {
    /// Maker, firmware, lockout, and which hierarchies have a password.
    ///
    /// # Errors
    /// What the TPM answered.
    pub fn properties(&mut self) -> Result<Properties, TpmError> {
        let fixed = self.tpm_properties(PT_FIXED)?;
        let variable = self.tpm_properties(PT_VAR)?;
        let of = |number: u32| variable.get(&number).copied().unwrap_or(0);
        let text = |numbers: std::ops::RangeInclusive<u32>| {
            numbers.flat_map(|number| fixed.get(&number).copied().unwrap_or(0).to_be_bytes())
        };
        let firmware = [0x10b, 0x10c].map(|number| fixed.get(&number).copied().unwrap_or(0));
        let [first, second] = firmware.map(|half| [(half >> 16) as u16, half as u16]);
        // TPMA_PERMANENT.
        let permanent = of(0x200);
        Ok(Properties {
            manufacturer: printable(text(0x105..=0x105)),
            vendor: printable(text(0x106..=0x109)),
            firmware: [first[0], first[1], second[0], second[1]],
            owner_auth_set: permanent & 1 != 0,
            endorsement_auth_set: permanent & 2 != 0,
            lockout_auth_set: permanent & 4 != 0,
            in_lockout: permanent & 0x200 != 0,
            failures: of(0x20e),
            max_failures: of(0x20f),
            forgets_after: of(0x210),
        })
    }

    /// The persistent handles in use, ascending.
    ///
    /// # Errors
    /// What the TPM answered.
    pub fn persistent_handles(&mut self) -> Result<Vec<u32>, TpmError> {
        let listed = self.capability(CAP_HANDLES, 0x8100_0000)?;
        let listed = listed.chunks_exact(4).filter_map(|handle| be_u32(handle, 0));
        Ok(listed.filter(|handle| handle >> 24 == 0x81).collect())
    }

    /// What is at a persistent handle.
    ///
    /// # Errors
    /// What the TPM answered.
    pub fn held(&mut self, handle: u32) -> Result<Option<Held>, TpmError> {
        Ok(self.persistent(handle)?.map(|loaded| classify(&loaded)))
    }

    /// What an NV index is, without its content.
    ///
    /// # Errors
    /// What the TPM answered.
    pub fn nv_index(&mut self, index: u32) -> Result<Option<NvIndex>, TpmError> {
        match self.nv_describe(index) {
            Ok((_, described)) => Ok(Some(described)),
            Err(TpmError::NvMissing { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The endorsement key by both ways that kcrypt knows.
    ///
    /// # Errors
    /// [`TpmError::AuthSet`] with an endorsement password, else what the TPM answered.
    pub fn endorsement(&mut self) -> Result<Endorsement, TpmError> {
        let created = self.create_endorsement_key()?;
        self.flush(created.key);
        let by_template = pubhash(modulus_of(&created.public)?);
        let (certified, certificate_size) = match self.certified_key() {
            Ok(CertifiedKey { modulus, size }) => (modulus, Some(size)),
            Err(TpmError::NvMissing { .. }) => (Err("there is none".into()), None),
            Err(error) => (Err(error.to_string()), None),
        };
        let held = self.persistent(handle::EK)?;
        let known = held.as_ref().and_then(|held| recognize(held, certified.as_deref().ok()));
        let used = known.map_or_else(|| by_template.clone(), pubhash);
        let by_certificate = certified.map(|key| pubhash(&key));
        let has_ecc_certificate = self.nv_index(NV_ECC_CERTIFICATE)?.is_some();
        Ok(Endorsement { by_certificate, certificate_size, by_template, used, has_ecc_certificate })
    }

    /// Values of PCRs 0 to 23 of the SHA-256 bank.
    ///
    /// # Errors
    /// [`TpmError::Malformed`] when there is no such bank.
    pub fn pcr_values(&mut self, pcrs: &[u8]) -> Result<BTreeMap<u8, [u8; 32]>, TpmError> {
        self.read_pcrs(pcrs)
    }

    /// Takes what is at a persistent handle away.
    ///
    /// # Errors
    /// [`TpmError::AuthSet`] with an owner password, else what the TPM answered.
    pub fn remove_persistent(&mut self, handle: u32) -> Result<(), TpmError> {
        match self.persistent(handle)? {
            Some(loaded) => self.evict(loaded.key, handle),
            None => Ok(()),
        }
    }

    /// The key that [`Tpm::unseal_blob`] would make again from the seed, were its handle empty.
    ///
    /// # Errors
    /// What the TPM answered.
    pub fn blob_key_can_be_remade(&mut self, c_index: u32) -> Result<bool, TpmError> {
        let Some(loaded) = self.persistent(c_index)? else { return Ok(true) };
        for template in [template::BLOB_KEY.to_vec(), template::blob_key_v2()] {
            let made =
                self.create_primary(Seed::Owner, &template, "CreatePrimary of the blob key")?;
            self.flush(made.key);
            if made.public == loaded.public {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn tpm_properties(&mut self, first: u32) -> Result<BTreeMap<u32, u32>, TpmError> {
        let listed = self.capability(CAP_TPM_PROPERTIES, first)?;
        let pairs = listed.chunks_exact(8);
        Ok(pairs.filter_map(|pair| Some((be_u32(pair, 0)?, be_u32(pair, 4)?))).collect())
    }

    /// TPM2_GetCapability by hand: the library refuses a list in which a value is new to it.
    fn capability(&mut self, capability: u32, first: u32) -> Result<Vec<u8>, TpmError> {
        const OPERATION: &str = "GetCapability";
        let body = [capability, first, MAX_VALUES].map(u32::to_be_bytes).concat();
        let command = [
            &ST_NO_SESSIONS.to_be_bytes()[..],
            &(10 + body.len() as u32).to_be_bytes(),
            &CC_GET_CAPABILITY.to_be_bytes(),
            &body,
        ]
        .concat();
        let mut transport = self.transport.borrow_mut();
        let response = transport
            .transact(&command)
            .map_err(|_| TpmError::Connection { operation: OPERATION })?;
        match be_u32(response, 6) {
            Some(0) => {}
            Some(rc::LOCKOUT) => return Err(TpmError::Lockout { operation: OPERATION }),
            code => {
                return Err(TpmError::Response { operation: OPERATION, code: code.unwrap_or(0) });
            }
        }
        // moreData, capability, count, then the values.
        let values = response.get(10 + 1 + 4 + 4..);
        values.map(<[u8]>::to_vec).ok_or_else(|| TpmError::Malformed {
            operation: OPERATION,
            why: "it is too short".into(),
        })
    }
}

fn classify(loaded: &Loaded) -> Held {
    let public = &loaded.public;
    let under = |hierarchy| loaded.qualified_name == qualified_name_under(hierarchy, public);
    let made_by = |template: &[u8]| public.starts_with(template::head(template));
    if made_by(&template::EK) && under(RH_ENDORSEMENT) {
        Held::EndorsementKey
    } else if made_by(&template::SRK) && under(RH_OWNER) {
        Held::StorageRoot(Hierarchy::Owner)
    } else if made_by(&template::SRK) && under(RH_ENDORSEMENT) {
        Held::StorageRoot(Hierarchy::Endorsement)
    } else if made_by(&template::blob_key_v2()) && under(RH_OWNER) {
        Held::BlobKey
    } else if is_storage_parent(public) {
        Held::OtherParent
    } else if crate::blob::can_decrypt(loaded) {
        Held::OtherDecrypter
    } else {
        Held::Foreign
    }
}

fn pubhash(modulus: &[u8]) -> Pubhash {
    Pubhash::of_spki(&rsa_spki(modulus, 65537))
}

/// Characters in four-byte numbers, padded with NUL or blanks.
fn printable(bytes: impl Iterator<Item = u8>) -> String {
    let text: String =
        bytes.filter(|byte| byte.is_ascii_graphic() || *byte == b' ').map(char::from).collect();
    text.trim().to_owned()
}
