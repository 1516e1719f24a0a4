//! Signatures with a WireGuard key: XEdDSA on Curve25519 (Signal, "The XEdDSA and VXEdDSA Signature Schemes", revision 1).
//!
//! The X25519 public key names an Edwards point but for its sign, which is taken to be 0; under that key the signature is an
//! ordinary Ed25519 one. A verifier is stricter than the scheme asks: low-order points are refused.
//!
//! Where the scheme draws random bytes for the nonce, it follows from key and message here as in Ed25519 (RFC 8032 §5.1.6):
//! the same record has the same signature, so that there is nothing to write when nothing has changed.

use curve25519_dalek::{EdwardsPoint, MontgomeryPoint, Scalar};
use ed25519_dalek::hazmat::{ExpandedSecretKey, raw_sign};
use ed25519_dalek::{Signature, VerifyingKey};
use sha2::{Digest, Sha512};
use zeroize::{Zeroize, Zeroizing};

/// What the scheme's `hash1` begins with: 2²⁵⁶ - 2 in little endian, which no point's encoding begins with.
const NONCE_DOMAIN: [u8; 32] = {
    let mut bytes = [0xff; 32];
    bytes[0] = 0xfe;
    bytes
};

/// Signs `message` with an X25519 private key. `context` says what is signed, so that a signature over one thing never passes
/// for one over another.
pub fn sign(context: &str, message: &[u8], private_key: &[u8; 32]) -> [u8; 64] {
    sign_bytes(&framed(context, message), private_key)
}

/// Whether `signature` over `message` was made in `context` with the private key of this X25519 public key.
pub fn verify(context: &str, message: &[u8], public_key: &[u8; 32], signature: &[u8; 64]) -> bool {
    verify_bytes(&framed(context, message), public_key, signature)
}

/// No context has a zero byte, so that this is one to one.
fn framed(context: &str, message: &[u8]) -> Vec<u8> {
    [context.as_bytes(), &[0], message].concat()
}

fn sign_bytes(message: &[u8], private_key: &[u8; 32]) -> [u8; 64] {
    let clamped = Zeroizing::new(curve25519_dalek::scalar::clamp_integer(*private_key));
    let mut scalar = Scalar::from_bytes_mod_order(*clamped);
    let public = EdwardsPoint::mul_base(&scalar);
    let negative = public.compress().as_bytes().last().is_some_and(|byte| byte & 0x80 != 0);
    let public = if negative {
        let negated = -scalar;
        scalar.zeroize();
        scalar = negated;
        -public
    } else {
        public
    };
    let mut hash_prefix = [0; 32];
    let mut digest =
        Sha512::new().chain_update(NONCE_DOMAIN).chain_update(scalar.as_bytes()).finalize();
    hash_prefix.iter_mut().zip(&digest).for_each(|(to, from)| *to = *from);
    digest.as_mut_slice().zeroize();
    let secret = ExpandedSecretKey { scalar, hash_prefix };
    scalar.zeroize();
    hash_prefix.zeroize();
    raw_sign::<Sha512>(&secret, message, &VerifyingKey::from(public)).to_bytes()
}

fn verify_bytes(message: &[u8], public_key: &[u8; 32], signature: &[u8; 64]) -> bool {
    edwards(public_key)
        .is_some_and(|key| key.verify_strict(message, &Signature::from_bytes(signature)).is_ok())
}

/// The Ed25519 key of an X25519 public key. `None` if that is on the twist, of low order, or not the one way to write it.
fn edwards(public_key: &[u8; 32]) -> Option<VerifyingKey> {
    let point = MontgomeryPoint(*public_key).to_edwards(0)?;
    let canonical = point.to_montgomery().as_bytes() == public_key;
    (canonical && !point.is_small_order()).then(|| VerifyingKey::from(point))
}

#[cfg(test)]
mod tests;
