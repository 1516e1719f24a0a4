//! The mesh identity: how the WireGuard key follows from the unlocked volume and the TPM, and how it is handed from the
//! initramfs to the service (`/run/latchkey/identity`, JSON, root only).
//!
//! Construction: HKDF-SHA256 (RFC 5869) with
//! salt = `latchkey mesh identity v1`,
//! IKM = u16be(length of the volume key) ‖ volume key ‖ 32-byte TPM secret,
//! info = `wireguard private key` ‖ NUL ‖ network name,
//! 32 bytes out, clamped as X25519 wants it (RFC 7748 §5).
//! Only who opened the volume has the first, only this TPM gives the second, and each network gets its own key.

use base64::{Engine, engine::general_purpose::STANDARD};
use hkdf::Hkdf;
use serde::{Deserialize, Serialize, de};
use sha2::Sha256;
use zeroize::{Zeroize, Zeroizing};

use crate::{Error, Result, go_json};

/// The format of the file.
pub const VERSION: u64 = 1;

/// Longest identity file read, in bytes.
pub const MAX_IDENTITY: usize = 4 * 1024;

const SALT: &[u8] = b"latchkey mesh identity v1";
const INFO: &[u8] = b"wireguard private key\0";
const WHAT: &str = "identity";

/// Derives the private key, clamped. `volume_key` is the LUKS volume key (16 to 128 bytes), which survives a change of
/// passphrase; `tpm_secret` is what a TPM-bound HMAC key makes.
pub fn derive(
    volume_key: &[u8],
    tpm_secret: &[u8; 32],
    network: &str,
) -> Result<Zeroizing<[u8; 32]>> {
    if volume_key.len() < 16 {
        return Err(Error::Crypto("a volume key of less than 128 bits makes no identity"));
    }
    let length = u16::try_from(volume_key.len())
        .map_err(|_| Error::Crypto("a volume key has at most 65,535 bytes"))?;
    let mut input = Zeroizing::new(Vec::with_capacity(2 + volume_key.len() + tpm_secret.len()));
    input.extend_from_slice(&length.to_be_bytes());
    input.extend_from_slice(volume_key);
    input.extend_from_slice(tpm_secret);
    let mut key = Zeroizing::new([0; 32]);
    Hkdf::<Sha256>::new(Some(SALT), &input)
        .expand_multi_info(&[INFO, network.as_bytes()], &mut *key)
        .map_err(|_| Error::Crypto("HKDF-SHA256 failed"))?;
    clamp(&mut key);
    Ok(key)
}

/// RFC 7748 §5: a multiple of the cofactor, top bit clear, next bit set.
fn clamp(key: &mut [u8; 32]) {
    let [first, .., last] = key;
    *first &= 0xf8;
    *last = *last & 0x7f | 0x40;
}

fn is_clamped(key: &[u8; 32]) -> bool {
    let [first, .., last] = key;
    first & 0x07 == 0 && last & 0xc0 == 0x40
}

/// The identity of this machine in one network.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    version: u64,
    /// The network the key is for.
    pub network: String,
    /// The WireGuard private key.
    #[serde(serialize_with = "write_key", deserialize_with = "read_key")]
    pub private_key: Zeroizing<[u8; 32]>,
    /// UUID of the LUKS volume that was opened.
    pub volume: String,
}

impl Identity {
    /// The identity with this private key, which must be clamped ([`derive`] does it).
    pub fn new(
        network: impl Into<String>,
        private_key: Zeroizing<[u8; 32]>,
        volume: impl Into<String>,
    ) -> Result<Self> {
        if !is_clamped(&private_key) {
            return Err(Error::PrivateKey { what: WHAT });
        }
        Ok(Self { version: VERSION, network: network.into(), private_key, volume: volume.into() })
    }

    /// The file's content, without a newline.
    pub fn to_json(&self) -> Result<Zeroizing<String>> {
        let mut out = Zeroizing::new(Vec::with_capacity(MAX_IDENTITY));
        serde_json::to_writer(&mut *out, self)
            .map_err(|error| go_json::json_error(WHAT, &error))?;
        String::from_utf8(std::mem::take(&mut *out))
            .map(Zeroizing::new)
            .map_err(|_| Error::Crypto("identity is not text"))
    }

    /// Reads the file's content.
    pub fn from_json(json: &[u8]) -> Result<Self> {
        if json.len() > MAX_IDENTITY {
            return Err(Error::TooLong { what: WHAT, limit: MAX_IDENTITY, got: json.len() });
        }
        let identity: Self =
            serde_json::from_slice(json).map_err(|error| go_json::json_error(WHAT, &error))?;
        if identity.version != VERSION {
            return Err(Error::Version { what: WHAT, got: identity.version, known: VERSION });
        }
        if !is_clamped(&identity.private_key) {
            return Err(Error::PrivateKey { what: WHAT });
        }
        Ok(identity)
    }
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identity")
            .field("network", &self.network)
            .field("private_key", &format_args!("redacted"))
            .field("volume", &self.volume)
            .finish()
    }
}

fn write_key<S: serde::Serializer>(
    key: &Zeroizing<[u8; 32]>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&Zeroizing::new(STANDARD.encode(**key)))
}

fn read_key<'de, D: serde::Deserializer<'de>>(
    deserializer: D,
) -> Result<Zeroizing<[u8; 32]>, D::Error> {
    let encoded = Zeroizing::new(String::deserialize(deserializer)?);
    let mut key = Zeroizing::new([0; 32]);
    let mut decoded =
        STANDARD.decode(encoded.as_bytes()).map_err(|_| de::Error::custom("not base64"))?;
    let fits = decoded.len() == key.len();
    if fits {
        key.copy_from_slice(&decoded);
    }
    decoded.zeroize();
    if fits { Ok(key) } else { Err(de::Error::custom("not 32 bytes")) }
}
