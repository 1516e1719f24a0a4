//! A machine whose TPM is software: an endorsement key and an attestation key that follow the protocol honestly
//! (`protocols/kcrypt.md` §2, §4.4, §6.3). What a real TPM signs is built here byte by byte and signed by the AK.
//!
//! A thousand machines want a thousand key generations; [`SoftIdentity::sharing_ak`] halves them, and [`Keys`] can be kept.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)] // helpers of tests

use std::collections::BTreeMap;

use aws_lc_rs::{
    cipher::{AES_128, DecryptingKey, DecryptionContext, UnboundCipherKey},
    encoding::{AsDer, Pkcs8V1Der, PublicKeyX509Der},
    iv::FixedLength,
    rand::SystemRandom,
    rsa::{KeySize, OAEP_SHA256_MGF1SHA256, OaepPrivateDecryptingKey, PrivateDecryptingKey},
    signature::{KeyPair as _, RSA_PKCS1_SHA256, RsaKeyPair},
};
use hmac::{Hmac, KeyInit, Mac};
use latchkey_wire::{
    attest::{AttestationParameters, ak_name},
    credential::{kdfa, split_credential},
    ek::RsaPublicKey,
    pem,
    pubhash::Pubhash,
    quote::PcrQuote,
    v1::{Challenge, ChallengeResponse, Token},
    v2::{ActivationSecret, Init, Proof},
};
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

/// TPM_GENERATED_VALUE.
const MAGIC: [u8; 4] = *b"\xffTCG";
const ATTEST_CREATION: [u8; 2] = [0x80, 0x1a];
const ATTEST_QUOTE: [u8; 2] = [0x80, 0x18];
const RSASSA_SHA256: [u8; 4] = [0x00, 0x14, 0x00, 0x0b];
const SHA256: [u8; 2] = [0x00, 0x0b];

/// The head of an AK's TPMT_PUBLIC, template of generation 2 (§1.3).
const AK_HEAD: [u8; 22] = [
    0x00, 0x01, 0x00, 0x0b, 0x00, 0x05, 0x04, 0x72, 0x00, 0x00, 0x00, 0x10, 0x00, 0x14, 0x00, 0x0b,
    0x08, 0x00, 0x00, 0x00, 0x00, 0x00,
];

/// PCR values by index.
pub type Pcrs = BTreeMap<u32, [u8; 32]>;

/// The two private keys of a machine, as PKCS#8.
#[derive(Clone)]
pub struct Keys {
    pub ek: Vec<u8>,
    pub ak: Vec<u8>,
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Keys(two test keys)")
    }
}

/// A new RSA-2048 key as PKCS#8.
pub fn new_key() -> Vec<u8> {
    let key = PrivateDecryptingKey::generate(KeySize::Rsa2048).unwrap();
    let der: Pkcs8V1Der<'_> = key.as_der().unwrap();
    der.as_ref().to_vec()
}

/// A machine.
pub struct SoftIdentity {
    keys: Keys,
    ek: OaepPrivateDecryptingKey,
    spki: Vec<u8>,
    signer: RsaKeyPair,
    /// What it shows of its AK.
    pub ak: AttestationParameters,
    /// What it measured at its last boot.
    pub pcrs: Pcrs,
}

impl std::fmt::Debug for SoftIdentity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SoftIdentity({})", self.pubhash())
    }
}

impl SoftIdentity {
    /// A new machine: two key generations, some tenths of a second.
    pub fn generate() -> Self {
        Self::with(Keys { ek: new_key(), ak: new_key() })
    }

    /// A new machine with an EK of its own and the AK of another: one key generation.
    pub fn sharing_ak(other: &Self) -> Self {
        Self::with(Keys { ek: new_key(), ak: other.keys.ak.clone() })
    }

    /// The machine with these keys.
    pub fn with(keys: Keys) -> Self {
        let private = PrivateDecryptingKey::from_pkcs8(&keys.ek).unwrap();
        let spki: PublicKeyX509Der<'_> = private.public_key().as_der().unwrap();
        let spki = spki.as_ref().to_vec();
        let signer = RsaKeyPair::from_pkcs8(&keys.ak).unwrap();
        let ak = created(&signer);
        let pcrs = [0, 7, 11].map(|index| (index, pcr(index, "as installed"))).into();
        Self { ek: OaepPrivateDecryptingKey::new(private).unwrap(), spki, keys, signer, ak, pcrs }
    }

    /// The keys, to have the same machine again.
    pub fn keys(&self) -> &Keys {
        &self.keys
    }

    /// DER SubjectPublicKeyInfo of the EK.
    pub fn spki(&self) -> &[u8] {
        &self.spki
    }

    /// PEM of the EK as Go writes it.
    pub fn ek_pem(&self) -> String {
        pem::encode(pem::PUBLIC_KEY, &self.spki)
    }

    /// The TPM hash.
    pub fn pubhash(&self) -> Pubhash {
        RsaPublicKey::from_spki(&self.spki).unwrap().pubhash()
    }

    /// What it shows in the header of generation 1.
    pub fn token(&self) -> Token {
        Token { ek_pem: self.ek_pem(), ak: self.ak.clone() }
    }

    /// Its first message of generation 2, without any wish.
    pub fn init(&self) -> Init {
        Init { ek_spki: self.spki.clone(), ak: self.ak.clone(), ..Init::default() }
    }

    /// TPM2_ActivateCredential.
    pub fn activate(&self, challenge: &Challenge) -> ChallengeResponse {
        let name = ak_name(&self.ak.public);
        let parts = split_credential(&challenge.credential, &challenge.secret).unwrap();
        let mut room = vec![0; self.ek.min_output_size()];
        let seed = self
            .ek
            .decrypt(
                &OAEP_SHA256_MGF1SHA256,
                parts.encrypted_secret,
                &mut room,
                Some(b"IDENTITY\0"),
            )
            .unwrap();
        let (mac, identity) = parts.id_object[2..].split_at(32);
        let key = kdfa(seed, "INTEGRITY", &[], &[], 256).unwrap();
        let mut check = Hmac::<Sha256>::new_from_slice(&key).unwrap();
        check.update(identity);
        check.update(&name);
        check.verify_slice(mac).expect("TPM_RC_INTEGRITY");
        let key = UnboundCipherKey::new(&AES_128, &kdfa(seed, "STORAGE", &name, &[], 128).unwrap());
        let mut identity = identity.to_vec();
        let context = DecryptionContext::Iv128(FixedLength::from([0u8; 16]));
        DecryptingKey::cfb128(key.unwrap()).unwrap().decrypt(&mut identity, context).unwrap();
        ChallengeResponse { secret: Zeroizing::new(identity[2..].to_vec()) }
    }

    /// Its second message of generation 2: the secret, and a quote of its PCRs over it.
    pub fn proof(&self, challenge: &Challenge) -> Proof {
        let secret = self.activate(challenge).secret;
        let pcr_quote = self.quote(&secret);
        Proof { secret: ActivationSecret(secret), pcr_quote }
    }

    /// A quote of all its PCRs.
    pub fn quote(&self, nonce: &[u8]) -> PcrQuote {
        let mut bitmap = [0u8; 3];
        self.pcrs.keys().for_each(|index| bitmap[*index as usize / 8] |= 1 << (index % 8));
        let values: Vec<u8> = self.pcrs.values().flatten().copied().collect();
        let selection = [&SHA256[..], &[3], &bitmap].concat();
        self.quote_of(nonce, &[&selection], &Sha256::digest(values))
    }

    /// A quote of any selections with any digest: what a TPM would sign if it were led to.
    pub fn quote_of(&self, nonce: &[u8], selections: &[&[u8]], digest: &[u8]) -> PcrQuote {
        let count = u32::try_from(selections.len()).unwrap().to_be_bytes();
        let quote = attest(
            ATTEST_QUOTE,
            nonce,
            &[&count[..], &selections.concat(), &sized(digest)].concat(),
        );
        PcrQuote {
            signature: self.sign(&quote),
            quote,
            pcrs: self.pcrs.iter().map(|(index, value)| (*index, value.to_vec())).collect(),
        }
    }

    /// A TPMT_SIGNATURE by the AK.
    pub fn sign(&self, message: &[u8]) -> Vec<u8> {
        sign(&self.signer, message)
    }
}

/// A PCR value that says where it is from.
pub fn pcr(index: u32, state: &str) -> [u8; 32] {
    Sha256::digest(format!("PCR {index}, {state}")).into()
}

/// TPM2_Create and TPM2_CertifyCreation of an AK.
fn created(signer: &RsaKeyPair) -> AttestationParameters {
    let modulus = signer.public_key().modulus().big_endian_without_leading_zero().to_vec();
    let public = [&AK_HEAD[..], &sized(&modulus)].concat();
    let parent = sized(&[&SHA256[..], &[0x55; 32]].concat());
    let create_data = [
        &[0; 4][..],
        &sized(&Sha256::digest([])),
        &[1], // locality 0
        &SHA256,
        &parent,
        &parent,
        &[0, 0],
    ]
    .concat();
    let certified = [sized(&ak_name(&public)), sized(&Sha256::digest(&create_data))].concat();
    let create_attestation = attest(ATTEST_CREATION, &[], &certified);
    let create_signature = sign(signer, &create_attestation);
    AttestationParameters { public, create_data, create_attestation, create_signature }
}

/// A TPMS_ATTEST.
fn attest(kind: [u8; 2], nonce: &[u8], attested: &[u8]) -> Vec<u8> {
    let signer = sized(&[&SHA256[..], &[0x66; 32]].concat());
    let clock = [0, 0, 0, 0, 0, 0, 0x30, 0x39, 0, 0, 0, 5, 0, 0, 0, 0, 1];
    let firmware = [0x20, 0x19, 0x10, 0x23, 0x00, 0x16, 0x36, 0x36];
    [&MAGIC[..], &kind, &signer, &sized(nonce), &clock, &firmware, attested].concat()
}

fn sign(signer: &RsaKeyPair, message: &[u8]) -> Vec<u8> {
    let mut signature = vec![0; signer.public_modulus_len()];
    signer.sign(&RSA_PKCS1_SHA256, &SystemRandom::new(), message, &mut signature).unwrap();
    [&RSASSA_SHA256[..], &sized(&signature)].concat()
}

fn sized(bytes: &[u8]) -> Vec<u8> {
    [&u16::try_from(bytes.len()).unwrap().to_be_bytes()[..], bytes].concat()
}

#[cfg(test)]
mod tests {
    use latchkey_wire::{attest::check_ak, quote};

    use super::*;

    #[test]
    fn it_passes_the_checks_of_a_key_server() {
        let machine = SoftIdentity::generate();
        assert_eq!(machine.ak.public.len(), 280);
        assert_eq!(machine.ak.create_data.len(), 115);
        assert_eq!(machine.ak.create_attestation.len(), 139);
        assert_eq!(machine.ak.create_signature.len(), 262);
        let ak = check_ak(&machine.ak).unwrap();
        let nonce = [7; 32];
        let quote = machine.quote(&nonce);
        assert_eq!((quote.quote.len(), quote.signature.len()), (113 + 32, 262));
        let policy =
            quote::Policy { nonce: &nonce, allow_empty_nonce: false, allowed: &[0, 7, 11] };
        assert_eq!(quote::verify(&ak, &quote, &policy).unwrap(), machine.pcrs);
        let again = SoftIdentity::with(machine.keys().clone());
        assert_eq!(again.pubhash(), machine.pubhash());
        let other = SoftIdentity::sharing_ak(&machine);
        assert_eq!(other.ak, machine.ak);
        assert_ne!(other.pubhash(), machine.pubhash());
    }
}
