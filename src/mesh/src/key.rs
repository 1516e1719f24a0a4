//! WireGuard keys: X25519 (RFC 7748 §5), 32 bytes, base64 as wg(8) writes them.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use zeroize::Zeroizing;

use crate::error::{Error, Result};

pub const KEY_LENGTH: usize = 32;

/// With its one `=`.
const BASE64_LENGTH: usize = 44;

/// Longest key file read, in bytes.
const MAX_KEY_FILE: usize = 4096;

/// A private key, clamped, wiped when dropped. There is no way to print it.
pub struct PrivateKey(Zeroizing<[u8; KEY_LENGTH]>);

#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PublicKey([u8; KEY_LENGTH]);

impl PrivateKey {
    /// Clamps as the kernel does (RFC 7748 §5), so that what is set and what is read back are the
    /// same bytes.
    pub fn new(bytes: &[u8; KEY_LENGTH]) -> Self {
        let mut key = Zeroizing::new(*bytes);
        let [first, .., last] = &mut *key;
        *first &= 0b1111_1000;
        *last = *last & 0b0111_1111 | 0b0100_0000;
        Self(key)
    }

    /// Reads a file as `wg genkey` writes it: base64, with white space around it or not.
    ///
    /// # Errors
    /// [`Error::BadKeyFile`] if there is anything else in it.
    pub fn read(path: &Path) -> Result<Self> {
        let mut text = Zeroizing::new(Vec::with_capacity(MAX_KEY_FILE + 1));
        File::open(path)
            .and_then(|file| file.take(MAX_KEY_FILE as u64 + 1).read_to_end(&mut text))
            .map_err(|source| match source.kind() {
                io::ErrorKind::PermissionDenied => {
                    Error::NotPermitted { action: format!("read {}", path.display()) }
                }
                _ => Error::File { action: "read", path: path.into(), source },
            })?;
        Self::from_base64(text.trim_ascii()).ok_or_else(|| Error::BadKeyFile { path: path.into() })
    }

    fn from_base64(text: &[u8]) -> Option<Self> {
        // Three bytes for four characters, rounded up: 44 make 33.
        let mut bytes = Zeroizing::new([0; KEY_LENGTH + 1]);
        if text.len() != BASE64_LENGTH {
            return None;
        }
        let length = STANDARD.decode_slice(text, &mut *bytes).ok()?;
        let key: &[u8; KEY_LENGTH] = bytes.get(..length)?.try_into().ok()?;
        Some(Self::new(key))
    }

    pub fn as_bytes(&self) -> &[u8; KEY_LENGTH] {
        &self.0
    }

    pub fn public(&self) -> PublicKey {
        let secret = x25519_dalek::StaticSecret::from(*self.0);
        PublicKey(x25519_dalek::PublicKey::from(&secret).to_bytes())
    }
}

impl PublicKey {
    pub const fn new(bytes: [u8; KEY_LENGTH]) -> Self {
        Self(bytes)
    }

    pub fn as_bytes(&self) -> &[u8; KEY_LENGTH] {
        &self.0
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PrivateKey(hidden)")
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&STANDARD.encode(self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({self})")
    }
}

impl FromStr for PublicKey {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let bytes = STANDARD.decode(text).map_err(|_| Error::PublicKey)?;
        Ok(Self(bytes.try_into().map_err(|_| Error::PublicKey)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 7748 §6.1, Alice's key pair: the private key as printed there is not clamped.
    #[test]
    fn public_key_follows_from_the_private_one() {
        let alice: [u8; 32] = [
            0x77, 0x07, 0x6d, 0x0a, 0x73, 0x18, 0xa5, 0x7d, 0x3c, 0x16, 0xc1, 0x72, 0x51, 0xb2,
            0x66, 0x45, 0xdf, 0x4c, 0x2f, 0x87, 0xeb, 0xc0, 0x99, 0x2a, 0xb1, 0x77, 0xfb, 0xa5,
            0x1d, 0xb9, 0x2c, 0x2a,
        ];
        assert_eq!(
            PrivateKey::new(&alice).public().to_string(),
            "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo="
        );
    }

    #[test]
    fn private_keys_are_clamped_and_never_printed() {
        let key = PrivateKey::new(&[0xff; 32]);
        assert_eq!((key.as_bytes()[0], key.as_bytes()[31]), (0xf8, 0x7f));
        assert_eq!(format!("{key:?}"), "PrivateKey(hidden)");
    }

    #[test]
    fn key_files_are_read_as_wg_writes_them() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key");
        let text = "iEEL/lZm3WZO0m2vtX2jeJkGO9YNuRNcMTbXiTqlHm4=";
        for good in [text.into(), format!("{text}\n"), format!(" \t{text}\r\n\n")] {
            std::fs::write(&path, &good).unwrap();
            let key = PrivateKey::read(&path).unwrap();
            assert_eq!(STANDARD.encode(key.as_bytes()), text, "{good:?}");
        }
        let twice = format!("{text}\n{text}\n");
        for bad in ["", "AAAA", "iEEL/lZm3WZO0m2vtX2jeJkGO9YNuRNcMTbXiTqlHm4", &twice] {
            std::fs::write(&path, bad).unwrap();
            let error = PrivateKey::read(&path).unwrap_err();
            assert!(matches!(error, Error::BadKeyFile { .. }), "{bad:?}: {error}");
            assert!(bad.is_empty() || !error.to_string().contains(bad), "{error}");
        }
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(PrivateKey::read(&path).unwrap_err(), Error::File { .. }));
    }

    #[test]
    fn public_keys_are_32_bytes_of_base64() {
        let text = "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=";
        assert_eq!(text.parse::<PublicKey>().unwrap().to_string(), text);
        for wrong in
            ["", "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo", "AAAA", &format!("{text}AAAA")]
        {
            assert!(wrong.parse::<PublicKey>().is_err(), "{wrong:?}");
        }
    }
}
