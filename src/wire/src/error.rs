//! What can be wrong with bytes from elsewhere. One enum for the crate; each variant is something a caller can tell apart.

use thiserror::Error;

/// Result of everything that parses here.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why bytes were not taken. No text repeats the received values: they may be secrets.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// Longer than its format ever is.
    #[error("{what} is too long: {got} bytes, at most {limit} are accepted")]
    TooLong { what: &'static str, limit: usize, got: usize },
    /// Not JSON, or a value of another type than the format has.
    #[error("{what} is not the JSON it should be ({category} at line {line}, column {column})")]
    Json { what: &'static str, category: &'static str, line: usize, column: usize },
    /// Text that should be base64 is not.
    #[error("{what} is not valid base64")]
    Base64 { what: &'static str },
    /// A TPM 2.0 structure that ends early, goes on, or holds what it must not.
    #[error("{what} is malformed at byte {at}: {reason}")]
    Structure { what: &'static str, at: usize, reason: &'static str },
    /// The EK certificate could not be read as far as its public key.
    #[error(
        "EK certificate is malformed: {reason}; read NV index 0x01C00002 by hand to see what the maker put there"
    )]
    Certificate { reason: &'static str },
    /// The EK is an elliptic-curve key; kcrypt identifies machines by an RSA EK only.
    #[error("ECC EK not yet supported: the certificate is for an elliptic-curve key")]
    EccEk,
    /// The certificate's key is neither RSA nor elliptic curve; the object identifier in hex.
    #[error("EK certificate is for a key of unknown kind (object identifier {oid})")]
    EkAlgorithm { oid: String },
    /// An RSA public key out of the accepted range.
    #[error("RSA public key refused: {reason}")]
    RsaKey { reason: &'static str },
    /// No PEM block was found (the text is the one kcrypt's server uses).
    #[error("invalid pemBytes")]
    InvalidPem,
    /// A PEM block of another type than `CERTIFICATE` and `PUBLIC KEY`.
    #[error("invalid pem type: {0}")]
    InvalidPemType(String),
    /// Not 64 hexadecimal digits.
    #[error(
        "TPM hash must be 64 hexadecimal digits (SHA-256 of the EK public key), got {got} characters"
    )]
    Pubhash { got: usize },
    /// The attestation key failed one of the checks of §3.
    #[error("attestation key refused: {0}")]
    AkRefused(String),
    /// The quote failed one of the checks of §6.5.
    #[error("PCR quote verification failed: {0}")]
    QuoteRefused(String),
    /// The two parts of a credential challenge are not the lengths their prefixes say.
    #[error("credential challenge refused: {0}")]
    Credential(&'static str),
    /// A cryptographic operation failed although its inputs were checked.
    #[error("cryptographic operation failed: {0}")]
    Crypto(&'static str),
    /// The partition a plugin request is about is missing.
    #[error("partition is required in payload")]
    NoPartition,
    /// A file of Latchkey's own of a version this program does not know.
    #[error(
        "{what} has version {got}, this program knows version {known}; use programs of one release"
    )]
    Version { what: &'static str, got: u64, known: u64 },
    /// A key that was not clamped as X25519 wants it.
    #[error("{what}: the private key is not a clamped 32-byte X25519 key")]
    PrivateKey { what: &'static str },
    /// An object in a manifest file was not changed.
    #[error("{object} cannot be changed: {reason}")]
    ManifestEdit { object: String, reason: &'static str },
    /// A YAML manifest is wrong.
    #[error("line {line}, column {column}: {reason}")]
    Manifest { line: u64, column: u64, reason: String },
    /// A record of the mesh's registry that is none; nothing in it is secret.
    #[error("the record is none of a member: {reason}")]
    Member { reason: String },
}
