//! kcrypt protocol, generation 1: the `Authorization` token and the messages of `/getPass` and `/postPass`
//! (`protocols/kcrypt.md` §5).

use base64::{
    Engine,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};
use serde::de::MapAccess;
use zeroize::Zeroizing;

pub use crate::release::{Refusal, Release};
use crate::{Error, Result, attest::AttestationParameters, go_json, release};

/// Path of the endpoint that releases a passphrase.
pub const GET_PASS: &str = "/getPass";
/// Path of the endpoint that takes a first passphrase.
pub const POST_PASS: &str = "/postPass";

/// Header with the file system label; for a LUKS partition, its LUKS2 label.
pub const HEADER_LABEL: &str = "label";
/// Header with the kernel's device name (`sda3`).
pub const HEADER_NAME: &str = "name";
/// Header with the GPT partition's UUID.
pub const HEADER_UUID: &str = "uuid";

/// Longest `Authorization` value taken, in bytes; with a certificate it has 4 to 5 KB.
pub const MAX_AUTHORIZATION: usize = 16 * 1024;

/// `generated_by` of a passphrase that only the machine's TPM can decrypt.
pub const GENERATED_BY_TPM: &str = "tpm";

/// How the token begins; the base64 follows without a space.
const SCHEME: &str = "Bearer TPM";

/// What a client shows of itself before any message: its EK and a fresh AK.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Token {
    /// PEM of the EK certificate or of the EK's SubjectPublicKeyInfo.
    pub ek_pem: String,
    /// The AK.
    pub ak: AttestationParameters,
}

impl Token {
    /// The value of the `Authorization` header: 2,406 bytes with a public key.
    #[must_use]
    pub fn authorization_header(&self) -> String {
        let json =
            format!(r#"{{"EK":"{}","AK":{}}}"#, STANDARD.encode(&self.ek_pem), self.ak.to_json());
        format!("{SCHEME}{}", STANDARD.encode(json))
    }

    /// Reads an `Authorization` value, with or without `Bearer TPM` before the base64.
    pub fn parse_authorization(value: &[u8]) -> Result<Self> {
        const WHAT: &str = "Authorization header";
        if value.len() > MAX_AUTHORIZATION {
            return Err(Error::TooLong { what: WHAT, limit: MAX_AUTHORIZATION, got: value.len() });
        }
        let encoded = value.strip_prefix(SCHEME.as_bytes()).unwrap_or(value);
        let json = STANDARD.decode(encoded).map_err(|_| Error::Base64 { what: WHAT })?;
        go_json::parse(WHAT, &json)
    }
}

impl go_json::GoObject for Token {
    fn take<'de, A: MapAccess<'de>>(&mut self, key: &str, map: &mut A) -> Result<bool, A::Error> {
        match key {
            "ek" => {
                self.ek_pem = String::from_utf8(go_json::bytes(map)?)
                    .map_err(|_| serde::de::Error::custom("EK is not text"))?;
            }
            "ak" => self.ak = go_json::object(map)?,
            _ => return Ok(false),
        }
        Ok(true)
    }
}

/// Server to client: `{"EC":{"Credential":…,"Secret":…}}`, both parts with their `TPM2B` length (§4.2).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Challenge {
    /// TPM2B_ID_OBJECT, 70 bytes.
    pub credential: Vec<u8>,
    /// TPM2B_ENCRYPTED_SECRET, 258 bytes.
    pub secret: Vec<u8>,
}

impl Challenge {
    /// As Go writes it, without a newline.
    #[must_use]
    pub fn to_json(&self) -> String {
        format!(
            r#"{{"EC":{{"Credential":"{}","Secret":"{}"}}}}"#,
            STANDARD.encode(&self.credential),
            STANDARD.encode(&self.secret)
        )
    }

    /// Reads the message of a server. The lengths are checked by [`crate::credential::split_credential`].
    pub fn from_json(message: &[u8]) -> Result<Self> {
        Ok(go_json::parse::<ChallengeMessage>("challenge", message)?.0)
    }
}

#[derive(Default)]
struct ChallengeMessage(Challenge);

impl go_json::GoObject for ChallengeMessage {
    fn take<'de, A: MapAccess<'de>>(&mut self, key: &str, map: &mut A) -> Result<bool, A::Error> {
        match key {
            "ec" => self.0 = go_json::object(map)?,
            _ => return Ok(false),
        }
        Ok(true)
    }
}

impl go_json::GoObject for Challenge {
    fn take<'de, A: MapAccess<'de>>(&mut self, key: &str, map: &mut A) -> Result<bool, A::Error> {
        match key {
            "credential" => self.credential = go_json::bytes(map)?,
            "secret" => self.secret = go_json::bytes(map)?,
            _ => return Ok(false),
        }
        Ok(true)
    }
}

/// Client to server: the activation secret, 32 bytes if it is right.
#[derive(Clone, Default)]
pub struct ChallengeResponse {
    /// What TPM2_ActivateCredential returned.
    pub secret: Zeroizing<Vec<u8>>,
}

impl ChallengeResponse {
    /// As Go writes it, with a newline.
    #[must_use]
    pub fn to_json(&self) -> Zeroizing<String> {
        let encoded = Zeroizing::new(STANDARD.encode(&*self.secret));
        let mut out = Zeroizing::new(String::with_capacity(encoded.len() + 16));
        out.push_str(r#"{"Secret":""#);
        out.push_str(&encoded);
        out.push_str("\"}\n");
        out
    }

    /// Reads the message of a client.
    pub fn from_json(message: &[u8]) -> Result<Self> {
        go_json::parse("challenge response", message)
    }
}

impl std::fmt::Debug for ChallengeResponse {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ChallengeResponse({} bytes)", self.secret.len())
    }
}

impl go_json::GoObject for ChallengeResponse {
    fn take<'de, A: MapAccess<'de>>(&mut self, key: &str, map: &mut A) -> Result<bool, A::Error> {
        match key {
            "secret" => self.secret = Zeroizing::new(go_json::bytes(map)?),
            _ => return Ok(false),
        }
        Ok(true)
    }
}

/// The last message: of the server on `/getPass`, of the client on `/postPass` (§5.5).
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Payload {
    /// The passphrase in clear, or unpadded URL base64 of an OAEP block if `generated_by` is `tpm`.
    pub passphrase: Zeroizing<String>,
    /// Why there is none.
    pub error: String,
    /// Empty for a passphrase an operator wrote, `tpm` for one a machine made.
    pub generated_by: String,
}

impl Payload {
    /// A refusal.
    #[must_use]
    pub fn refusal(error: impl Into<String>) -> Self {
        Self { error: error.into(), ..Self::default() }
    }

    /// The passphrase a machine made, encrypted by its TPM: what `/postPass` takes.
    #[must_use]
    pub fn sealed(block: &[u8]) -> Self {
        Self {
            passphrase: Zeroizing::new(URL_SAFE_NO_PAD.encode(block)),
            error: String::new(),
            generated_by: GENERATED_BY_TPM.to_owned(),
        }
    }

    /// As Go writes it: all three keys, with a newline.
    #[must_use]
    pub fn to_json(&self) -> Zeroizing<String> {
        let room = [&*self.passphrase, &self.error, &self.generated_by]
            .map(|text| go_json::room(text))
            .iter()
            .sum::<usize>();
        let mut out = Zeroizing::new(String::with_capacity(room + 64));
        out.push_str(r#"{"passphrase":"#);
        go_json::push_string(&mut out, &self.passphrase);
        out.push_str(r#","error":"#);
        go_json::push_string(&mut out, &self.error);
        out.push_str(r#","generated_by":"#);
        go_json::push_string(&mut out, &self.generated_by);
        out.push_str("}\n");
        out
    }

    /// Reads the message of either side.
    pub fn from_json(message: &[u8]) -> Result<Self> {
        go_json::parse("payload", message)
    }

    /// The OAEP block in `passphrase`, if it is unpadded URL base64.
    pub fn sealed_block(&self) -> Result<Vec<u8>> {
        release::sealed_block(self.passphrase.as_bytes())
    }

    /// What the server's answer on `/getPass` means for a client.
    pub fn classify(self) -> Result<Release, Refusal> {
        if !self.error.is_empty() {
            return Err(Refusal::from_text(&self.error));
        }
        if self.passphrase.is_empty() {
            return Err(Refusal::EmptySecret);
        }
        if self.generated_by == GENERATED_BY_TPM {
            return self.sealed_block().map(Release::Sealed).map_err(|_| Refusal::Malformed);
        }
        Ok(Release::Passphrase(Zeroizing::new(self.passphrase.as_bytes().to_vec())))
    }
}

impl std::fmt::Debug for Payload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Payload")
            .field("passphrase", &format_args!("{} bytes", self.passphrase.len()))
            .field("error", &self.error)
            .field("generated_by", &self.generated_by)
            .finish()
    }
}

impl go_json::GoObject for Payload {
    fn take<'de, A: MapAccess<'de>>(&mut self, key: &str, map: &mut A) -> Result<bool, A::Error> {
        match key {
            "passphrase" => self.passphrase = Zeroizing::new(go_json::text(map)?),
            "error" => self.error = go_json::text(map)?,
            "generated_by" => self.generated_by = go_json::text(map)?,
            _ => return Ok(false),
        }
        Ok(true)
    }
}

/// The server's texts, byte for byte (§5.5).
pub mod text {
    use crate::{pubhash::Pubhash, release};

    /// `/getPass`: no Secret yet; the client enrols.
    #[must_use]
    pub fn no_secret(pubhash: &Pubhash, label: &str) -> String {
        format!("{} {pubhash} and {label}", release::NO_SECRET)
    }

    /// `/getPass`: nobody we know.
    #[must_use]
    pub fn no_volume(pubhash: &Pubhash) -> String {
        format!("{} {pubhash}", release::NO_VOLUME)
    }

    /// Both endpoints: locked out; `label` is the partition's in the volume.
    #[must_use]
    pub fn quarantined(label: &str) -> String {
        format!("{} {label}", release::QUARANTINED)
    }

    /// `/postPass`: nobody we know.
    #[must_use]
    pub fn no_tpm_hash(pubhash: &Pubhash) -> String {
        format!("no TPM Hash found for {pubhash}")
    }

    /// `/postPass`: nothing to store.
    pub const NO_PASSPHRASE: &str = "invalid answer from client: doesn't contain any passphrase";

    /// `/postPass`: the client reports that it failed.
    #[must_use]
    pub fn client_error(error: &str) -> String {
        format!("error: {error}")
    }
}
