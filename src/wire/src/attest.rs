//! The attestation key (AK) as it travels: five parameters (`protocols/kcrypt.md` §2), the TPM structures in them
//! (TPM 2.0 Library, Part 2), and the checks a server makes (§3).
//!
//! The parsers are strict: every length is bounded and bytes after a structure are an error.

use base64::{Engine, engine::general_purpose::STANDARD};
use serde::de::MapAccess;
use sha2::{Digest, Sha256};

#[cfg(feature = "server")]
use crate::Error;
use crate::{Result, go_json, tpm_bytes::Reader};

/// TPM_ALG_RSA
const ALG_RSA: u16 = 0x0001;
/// TPM_ALG_SHA256
pub(crate) const ALG_SHA256: u16 = 0x000b;
/// TPM_ALG_NULL
const ALG_NULL: u16 = 0x0010;
/// TPM_ALG_RSASSA
pub(crate) const ALG_RSASSA: u16 = 0x0014;
/// TPM_ALG_RSAES, the only RSA scheme without a hash
const ALG_RSAES: u16 = 0x0015;
/// TPM_ALG_RSAPSS
const ALG_RSAPSS: u16 = 0x0016;

/// TPM_GENERATED_VALUE: what a TPM puts first into everything it attests.
const MAGIC: u32 = 0xff54_4347;
/// TPM_ST_ATTEST_CREATION
const ATTEST_CREATION: u16 = 0x801a;
/// TPM_ST_ATTEST_QUOTE
pub(crate) const ATTEST_QUOTE: u16 = 0x8018;

/// Largest digest (SHA-512), name (algorithm and digest), TPM2B_DATA and RSA number, in bytes.
const DIGEST: usize = 64;
const NAME: usize = 2 + DIGEST;
const DATA: usize = 128;
const RSA: usize = 512;

/// Attributes of a TPM object (TPMA_OBJECT).
pub mod attributes {
    /// The object cannot leave its TPM.
    pub const FIXED_TPM: u32 = 0x2;
    /// The object cannot be moved to another parent.
    pub const FIXED_PARENT: u32 = 0x10;
    /// The TPM made the private part itself.
    pub const SENSITIVE_DATA_ORIGIN: u32 = 0x20;
    /// Signs and decrypts only what the TPM itself made.
    pub const RESTRICTED: u32 = 0x1_0000;
    /// May decrypt.
    pub const DECRYPT: u32 = 0x2_0000;
    /// May sign.
    pub const SIGN: u32 = 0x4_0000;
}

/// The five parameters of an AK, raw structures without their `TPM2B` length (§2).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AttestationParameters {
    /// TPMT_PUBLIC, 280 bytes for RSA-2048.
    pub public: Vec<u8>,
    /// TPMS_CREATION_DATA, 115 bytes.
    pub create_data: Vec<u8>,
    /// TPMS_ATTEST of type creation, 139 bytes.
    pub create_attestation: Vec<u8>,
    /// TPMT_SIGNATURE by the AK itself, 262 bytes.
    pub create_signature: Vec<u8>,
}

impl AttestationParameters {
    /// The JSON object Go writes, keys in Go's order. `UseTCSDActivationFormat` is a leftover of TPM 1.2, always false.
    #[must_use]
    pub fn to_json(&self) -> String {
        format!(
            r#"{{"Public":"{}","UseTCSDActivationFormat":false,"CreateData":"{}","CreateAttestation":"{}","CreateSignature":"{}"}}"#,
            STANDARD.encode(&self.public),
            STANDARD.encode(&self.create_data),
            STANDARD.encode(&self.create_attestation),
            STANDARD.encode(&self.create_signature),
        )
    }

    /// Reads the JSON object as Go does: keys in any case, what is missing is empty.
    pub fn from_json(json: &[u8]) -> Result<Self> {
        go_json::parse("attestation parameters", json)
    }
}

impl go_json::GoObject for AttestationParameters {
    fn take<'de, A: MapAccess<'de>>(&mut self, key: &str, map: &mut A) -> Result<bool, A::Error> {
        match key {
            "public" => self.public = go_json::bytes(map)?,
            "createdata" => self.create_data = go_json::bytes(map)?,
            "createattestation" => self.create_attestation = go_json::bytes(map)?,
            "createsignature" => self.create_signature = go_json::bytes(map)?,
            "usetcsdactivationformat" => {
                go_json::boolean(map)?; // must be a boolean; which one does not matter for TPM 2.0
            }
            _ => return Ok(false),
        }
        Ok(true)
    }
}

/// The name of an object whose nameAlg is SHA-256: `000b` and SHA-256 of its TPMT_PUBLIC, 34 bytes.
#[must_use]
pub fn ak_name(public: &[u8]) -> [u8; 34] {
    let mut name = [0; 34];
    let (algorithm, digest) = name.split_at_mut(2);
    algorithm.copy_from_slice(&ALG_SHA256.to_be_bytes());
    digest.copy_from_slice(&Sha256::digest(public));
    name
}

/// An algorithm with its hash, `None` for TPM_ALG_NULL.
pub type Scheme = Option<(u16, Option<u16>)>;

/// A TPMT_PUBLIC of an RSA key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RsaPublicArea {
    /// TPM_ALG_ID of the hash in the object's name.
    pub name_alg: u16,
    /// TPMA_OBJECT, see [`attributes`].
    pub attributes: u32,
    /// Digest of the policy, empty for none.
    pub auth_policy: Vec<u8>,
    /// Symmetric algorithm, key bits and mode; `None` for TPM_ALG_NULL.
    pub symmetric: Option<(u16, u16, u16)>,
    /// Signing or decryption scheme.
    pub scheme: Scheme,
    /// Size of the modulus.
    pub key_bits: u16,
    /// 0 means 65537.
    pub exponent: u32,
    /// Big-endian.
    pub modulus: Vec<u8>,
}

impl RsaPublicArea {
    /// Parses a whole TPMT_PUBLIC; other key types than RSA are refused.
    pub fn parse(public: &[u8]) -> Result<Self> {
        let mut reader = Reader::new("TPMT_PUBLIC", public);
        if reader.u16()? != ALG_RSA {
            return Err(reader.refuse("the key is not an RSA key"));
        }
        let name_alg = reader.u16()?;
        let attributes = reader.u32()?;
        let auth_policy = reader.sized(DIGEST)?.to_vec();
        let symmetric = match reader.u16()? {
            ALG_NULL => None,
            algorithm => Some((algorithm, reader.u16()?, reader.u16()?)),
        };
        let scheme = match reader.u16()? {
            ALG_NULL => None,
            ALG_RSAES => Some((ALG_RSAES, None)),
            algorithm => Some((algorithm, Some(reader.u16()?))),
        };
        let key_bits = reader.u16()?;
        let exponent = reader.u32()?;
        let modulus = reader.sized(RSA)?.to_vec();
        reader.end()?;
        Ok(Self {
            name_alg,
            attributes,
            auth_policy,
            symmetric,
            scheme,
            key_bits,
            exponent,
            modulus,
        })
    }
}

/// A TPMS_CREATION_DATA.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CreationData {
    /// The PCRs recorded at creation: at most one selection.
    pub pcr_selection: Vec<PcrSelection>,
    /// Digest over these PCRs.
    pub pcr_digest: Vec<u8>,
    /// TPMA_LOCALITY of the creating command.
    pub locality: u8,
    /// TPM_ALG_ID of the hash in the parent's name.
    pub parent_name_alg: u16,
    /// The parent's name.
    pub parent_name: Vec<u8>,
    /// The parent's qualified name.
    pub parent_qualified_name: Vec<u8>,
    /// What the caller added.
    pub outside_info: Vec<u8>,
}

impl CreationData {
    /// Parses a whole TPMS_CREATION_DATA.
    pub fn parse(data: &[u8]) -> Result<Self> {
        let mut reader = Reader::new("TPMS_CREATION_DATA", data);
        let parsed = Self {
            pcr_selection: pcr_selections(&mut reader, 1)?,
            pcr_digest: reader.sized(DIGEST)?.to_vec(),
            locality: reader.u8()?,
            parent_name_alg: reader.u16()?,
            parent_name: reader.sized(NAME)?.to_vec(),
            parent_qualified_name: reader.sized(NAME)?.to_vec(),
            outside_info: reader.sized(DATA)?.to_vec(),
        };
        reader.end()?;
        Ok(parsed)
    }
}

/// A TPMS_PCR_SELECTION.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PcrSelection {
    /// TPM_ALG_ID of the bank.
    pub hash: u16,
    /// Bit n of byte m is PCR 8·m + n; 1 to 4 bytes.
    pub bitmap: Vec<u8>,
}

impl PcrSelection {
    /// The selected PCRs, ascending.
    pub fn indices(&self) -> impl Iterator<Item = u32> {
        (0u32..).zip(&self.bitmap).flat_map(|(byte, bits)| {
            (0..8).filter(move |bit| bits >> bit & 1 == 1).map(move |bit| 8 * byte + bit)
        })
    }
}

fn pcr_selections(reader: &mut Reader<'_>, most: u32) -> Result<Vec<PcrSelection>> {
    let count = reader.u32()?;
    if count > most {
        return Err(reader.refuse("it selects PCRs more than once"));
    }
    (0..count)
        .map(|_| {
            let hash = reader.u16()?;
            let size = reader.u8()?;
            if !(1..=4).contains(&size) {
                return Err(reader.refuse("a PCR bitmap must have 1 to 4 bytes"));
            }
            Ok(PcrSelection { hash, bitmap: reader.take(size.into())?.to_vec() })
        })
        .collect()
}

/// A TPMS_ATTEST.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attest {
    /// Must be 0xff544347; checked apart, because upstream names it apart.
    pub magic: u32,
    /// Qualified name of the signing key.
    pub qualified_signer: Vec<u8>,
    /// What the caller asked to be signed along, the nonce.
    pub extra_data: Vec<u8>,
    /// Milliseconds the TPM has been running.
    pub clock: u64,
    /// TPM resets since the last clear.
    pub reset_count: u32,
    /// TPM restarts and resumes since the last reset.
    pub restart_count: u32,
    /// Whether `clock` never went back.
    pub safe: bool,
    /// The maker's firmware version.
    pub firmware_version: u64,
    /// What is attested.
    pub attested: Attested,
}

/// The union in a [`Attest`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Attested {
    /// TPM_ST_ATTEST_CREATION: an object was made here.
    Creation {
        /// Name of the object.
        object_name: Vec<u8>,
        /// Hash of its creation data.
        creation_hash: Vec<u8>,
    },
    /// TPM_ST_ATTEST_QUOTE: these PCRs had this digest.
    Quote {
        /// At most 16 selections; a genuine kcrypt client sends one.
        pcr_selection: Vec<PcrSelection>,
        /// Digest over the values in the order of the selections.
        pcr_digest: Vec<u8>,
    },
    /// Another kind, with its tag; not read any further.
    Other(u16),
}

impl Attest {
    /// Parses a whole TPMS_ATTEST of type creation or quote. Of another type, only the tag is told.
    pub fn parse(attest: &[u8]) -> Result<Self> {
        let mut reader = Reader::new("TPMS_ATTEST", attest);
        let magic = reader.u32()?;
        let kind = reader.u16()?;
        let qualified_signer = reader.sized(NAME)?.to_vec();
        let extra_data = reader.sized(DATA)?.to_vec();
        let clock = reader.u64()?;
        let reset_count = reader.u32()?;
        let restart_count = reader.u32()?;
        let safe = match reader.u8()? {
            0 => false,
            1 => true,
            _ => return Err(reader.refuse("a TPMI_YES_NO must be 0 or 1")),
        };
        let firmware_version = reader.u64()?;
        let attested = match kind {
            ATTEST_CREATION => Attested::Creation {
                object_name: reader.sized(NAME)?.to_vec(),
                creation_hash: reader.sized(DIGEST)?.to_vec(),
            },
            ATTEST_QUOTE => Attested::Quote {
                pcr_selection: pcr_selections(&mut reader, 16)?,
                pcr_digest: reader.sized(DIGEST)?.to_vec(),
            },
            other => Attested::Other(other),
        };
        if !matches!(attested, Attested::Other(_)) {
            reader.end()?;
        }
        Ok(Self {
            magic,
            qualified_signer,
            extra_data,
            clock,
            reset_count,
            restart_count,
            safe,
            firmware_version,
            attested,
        })
    }

    /// Whether a TPM made this: only its own structures may begin with this value when a restricted key signs.
    #[must_use]
    pub fn made_by_tpm(&self) -> bool {
        self.magic == MAGIC
    }
}

/// A TPMT_SIGNATURE by an RSA key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RsaSignature {
    /// TPM_ALG_RSASSA or TPM_ALG_RSAPSS.
    pub scheme: u16,
    /// TPM_ALG_ID of the hash.
    pub hash: u16,
    /// As long as the modulus.
    pub signature: Vec<u8>,
}

impl RsaSignature {
    /// Parses a whole TPMT_SIGNATURE; other kinds than RSASSA and RSAPSS are refused.
    pub fn parse(signature: &[u8]) -> Result<Self> {
        let mut reader = Reader::new("TPMT_SIGNATURE", signature);
        let scheme = reader.u16()?;
        if scheme != ALG_RSASSA && scheme != ALG_RSAPSS {
            return Err(reader.refuse("unsupported signature algorithm"));
        }
        let parsed = Self { scheme, hash: reader.u16()?, signature: reader.sized(RSA)?.to_vec() };
        reader.end()?;
        Ok(parsed)
    }
}

/// An attestation key that passed [`check_ak`].
#[cfg(feature = "server")]
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AkPublic {
    /// `000b` and SHA-256 of the public area.
    pub name: [u8; 34],
    /// The RSA key.
    pub key: crate::ek::RsaPublicKey,
}

#[cfg(feature = "server")]
impl AkPublic {
    /// Verifies a TPMT_SIGNATURE over `message`: RSASSA (PKCS#1 v1.5) with SHA-256 and nothing else.
    pub fn verify(&self, message: &[u8], signature: &[u8]) -> Result<()> {
        use aws_lc_rs::signature::{RSA_PKCS1_2048_8192_SHA256, RsaPublicKeyComponents};

        let signature = RsaSignature::parse(signature)?;
        if (signature.scheme, signature.hash) != (ALG_RSASSA, ALG_SHA256) {
            return Err(Error::AkRefused(
                "unsupported signature algorithm: it must be RSASSA with SHA-256".to_owned(),
            ));
        }
        let exponent = self.key.exponent.to_be_bytes();
        let zeros = exponent.iter().take_while(|&&byte| byte == 0).count();
        RsaPublicKeyComponents {
            n: self.key.modulus.as_slice(),
            e: exponent.get(zeros..).unwrap_or_default(),
        }
        .verify(&RSA_PKCS1_2048_8192_SHA256, message, &signature.signature)
        .map_err(|_| {
            Error::AkRefused(
                "could not verify attestation: the signature is not by this key".to_owned(),
            )
        })
    }
}

/// Checks that the parameters describe a key that lives in a TPM, cannot leave it, and signs only what that TPM made
/// (§3, in its order and with Go's texts; stricter: RSASSA with SHA-256, signing only, names by SHA-256).
///
/// Nothing here says *which* TPM: only a credential bound to EK and AK name does ([`crate::credential`]).
#[cfg(feature = "server")]
pub fn check_ak(parameters: &AttestationParameters) -> Result<AkPublic> {
    use attributes::{DECRYPT, FIXED_PARENT, FIXED_TPM, RESTRICTED, SENSITIVE_DATA_ORIGIN, SIGN};

    let refuse = |reason: String| Err(Error::AkRefused(reason));
    if parameters.create_signature.len() < 8 {
        return refuse(format!(
            "signature is too short to be valid: only {} bytes",
            parameters.create_signature.len()
        ));
    }
    let public = RsaPublicArea::parse(&parameters.public)?;
    CreationData::parse(&parameters.create_data)?;
    let attest = Attest::parse(&parameters.create_attestation)?;

    let (object_name, creation_hash) = match &attest.attested {
        Attested::Creation { object_name, creation_hash } => (object_name, creation_hash),
        Attested::Quote { .. } => {
            return refuse(format!(
                "attestation does not apply to creation data, got tag {ATTEST_QUOTE:x}"
            ));
        }
        Attested::Other(tag) => {
            return refuse(format!("attestation does not apply to creation data, got tag {tag:x}"));
        }
    };
    if public.key_bits < 2048 {
        return refuse(format!(
            "attestation key too small: must be at least 2048 bits but was {} bits",
            public.key_bits
        ));
    }
    let key = crate::ek::RsaPublicKey::new(&public.modulus, public.exponent)?;
    if key.modulus.len() * 8 != usize::from(public.key_bits)
        || key.modulus.first().is_none_or(|top| top & 0x80 == 0)
    {
        return refuse("its modulus does not have the bits it says".to_owned());
    }
    if public.name_alg != ALG_SHA256 {
        return refuse(format!(
            "its name algorithm must be SHA-256, it is 0x{:x}",
            public.name_alg
        ));
    }
    if creation_hash.as_slice() != Sha256::digest(&parameters.create_data).as_slice() {
        return refuse("attestation refers to different public key".to_owned());
    }
    if !attest.made_by_tpm() {
        return refuse("creation attestation was not produced by a TPM".to_owned());
    }
    if public.attributes & FIXED_TPM == 0 {
        return refuse("AK is exportable".to_owned());
    }
    let limited = RESTRICTED | FIXED_PARENT | SENSITIVE_DATA_ORIGIN | SIGN;
    if public.attributes & limited != limited || public.attributes & DECRYPT != 0 {
        return refuse("provided key is not limited to attestation".to_owned());
    }
    if public.scheme != Some((ALG_RSASSA, Some(ALG_SHA256))) {
        return refuse("its scheme must be RSASSA with SHA-256".to_owned());
    }
    let name = ak_name(&parameters.public);
    if object_name.as_slice() != name {
        return refuse("creation attestation refers to a different key".to_owned());
    }
    let ak = AkPublic { name, key };
    ak.verify(&parameters.create_attestation, &parameters.create_signature)?;
    Ok(ak)
}
