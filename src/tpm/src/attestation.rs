//! The attestation key and what it is for: proving to a server that the endorsement key answers.
//! `protocols/kcrypt.md` §2, §4.4.

use latchkey_wire::attest::AttestationParameters;
use tss_esapi::Context;
use tss_esapi::attributes::SessionAttributesBuilder;
use tss_esapi::constants::SessionType;
use tss_esapi::handles::{AuthHandle, KeyHandle, SessionHandle};
use tss_esapi::interface_types::algorithm::HashingAlgorithm;
use tss_esapi::interface_types::session_handles::{AuthSession, PolicySession};
use tss_esapi::structures::{Digest, EncryptedSecret, IdObject, Nonce, SymmetricDefinition};
use zeroize::Zeroizing;

use crate::certify_creation::{self, Created};
use crate::ek::EndorsementKey;
use crate::{Hierarchy, Tpm, TpmError, needs_empty_auth, template};

/// A fresh attestation key, loaded, with the five parameters a server asks for.
#[derive(Debug)]
pub struct AttestationKey {
    pub(crate) key: KeyHandle,
    parameters: AttestationParameters,
}

impl AttestationKey {
    /// What goes into the v1 token or the v2 init message.
    #[must_use]
    pub fn parameters(&self) -> &AttestationParameters {
        &self.parameters
    }
}

/// The sessions of one activation to come. It serves once.
#[derive(Debug)]
pub struct Activation {
    policy: AuthSession,
}

impl Tpm {
    /// Makes an attestation key (RSA-2048: seconds on a discrete TPM, so once per process) and has
    /// it certify its own creation.
    ///
    /// # Errors
    /// [`TpmError::AuthSet`] with an owner password, else what the TPM answered.
    pub fn attestation_key(&mut self) -> Result<AttestationKey, TpmError> {
        let parent = self.storage_root()?;
        let public = template::public(&template::AK)?;
        let made = self.authorized("Create of the AK", |ctx| {
            ctx.create(parent, public, None, None, None, None)
        })?;
        let created = Created::parse(&self.last_response())?;
        let key = self.authorized("Load of the AK", |ctx| {
            ctx.load(parent, made.out_private, made.out_public)
        })?;
        let handle = certify_creation::loaded_handle(&self.last_response())?;
        let certified = certify_creation::run(&mut self.transport.borrow_mut(), handle, &created)?;
        Ok(AttestationKey {
            key,
            parameters: AttestationParameters {
                public: created.public,
                create_data: created.data,
                create_attestation: certified.attestation,
                create_signature: certified.signature,
            },
        })
    }

    /// Does what an activation needs before the server's challenge is there: with the network still
    /// coming up, two sessions and an RSA operation of the TPM cost nothing.
    ///
    /// # Errors
    /// [`TpmError::AuthSet`] with an endorsement password.
    pub fn prepare_activation(&mut self, ek: &EndorsementKey) -> Result<Activation, TpmError> {
        self.encryption(ek.key)?;
        Ok(Activation { policy: self.endorsement_policy()? })
    }

    /// `TPM2_ActivateCredential`: recovers the secret that a server sealed to the endorsement key
    /// and the attestation key's name. `credential` and `secret` are without their size prefixes.
    ///
    /// # Errors
    /// [`TpmError::Response`] with TPM_RC_INTEGRITY when it was made for another attestation key,
    /// and with 0x101 or TPM_RC_VALUE when it was made for another endorsement key.
    pub fn activate_credential(
        &mut self,
        ek: &EndorsementKey,
        ak: &AttestationKey,
        activation: Activation,
        credential: &[u8],
        secret: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, TpmError> {
        const OPERATION: &str = "ActivateCredential";
        let library = |error| TpmError::Library { operation: OPERATION, error };
        let credential = IdObject::try_from(credential).map_err(library)?;
        let secret = EncryptedSecret::try_from(secret).map_err(library)?;
        let policy = activation.policy;
        let activated = self.under_encryption(OPERATION, ek.key, Some(policy), |ctx| {
            ctx.activate_credential(ak.key, ek.key, credential, secret)
        });
        self.flush_session(policy);
        Ok(Zeroizing::new(activated?.to_vec()))
    }

    /// A policy session that satisfies the EK template's policy: PolicySecret(endorsement).
    fn endorsement_policy(&mut self) -> Result<AuthSession, TpmError> {
        const OPERATION: &str = "PolicySecret of the endorsement hierarchy";
        let session = self.start_session(SessionType::Policy, SymmetricDefinition::Null, None)?;
        let satisfied = PolicySession::try_from(session)
            .map_err(|error| TpmError::Library { operation: OPERATION, error })
            .and_then(|policy| {
                needs_empty_auth(
                    self.authorized(OPERATION, |ctx| {
                        ctx.policy_secret(
                            policy,
                            AuthHandle::Endorsement,
                            Nonce::default(),
                            Digest::default(),
                            Nonce::default(),
                            None,
                        )
                    }),
                    Hierarchy::Endorsement,
                )
            });
        match satisfied {
            Ok(_) => Ok(session),
            Err(error) => {
                self.flush_session(session);
                Err(error)
            }
        }
    }

    /// Runs a call that gives out a secret: with password authorization, a policy session where
    /// one is needed, and the TPM's response encrypted.
    ///
    /// One session serves for all of them, salted to the first `key`. After a failure the next
    /// secret gets a new one.
    pub(crate) fn under_encryption<T>(
        &mut self,
        operation: &'static str,
        key: KeyHandle,
        policy: Option<AuthSession>,
        call: impl FnOnce(&mut Context) -> tss_esapi::Result<T>,
    ) -> Result<T, TpmError> {
        let encryption = Some(self.encryption(key)?);
        let password = Some(AuthSession::Password);
        let sessions = match policy {
            Some(_) => (password, policy, encryption),
            None => (password, encryption, None),
        };
        let result = self.context.execute_with_sessions(sessions, call);
        let result = result.map_err(|error| self.explain(operation, error));
        if result.is_err()
            && let Some(session) = self.encryption.take()
        {
            self.flush_session(session);
        }
        result
    }

    /// An HMAC session salted to `key`, under which the TPM encrypts the first parameter of its
    /// response, so that a secret does not cross the bus in the clear. Salted, because the key of
    /// an unsalted session can be computed by whoever listens.
    fn encryption(&mut self, key: KeyHandle) -> Result<AuthSession, TpmError> {
        const OPERATION: &str = "setting up response encryption";
        if let Some(session) = self.encryption {
            return Ok(session);
        }
        let session =
            self.start_session(SessionType::Hmac, SymmetricDefinition::AES_128_CFB, Some(key))?;
        let (attributes, mask) =
            SessionAttributesBuilder::new().with_continue_session(true).with_encrypt(true).build();
        let set = self.context.tr_sess_set_attributes(session, attributes, mask);
        if let Err(error) = set {
            self.flush_session(session);
            return Err(TpmError::Library { operation: OPERATION, error });
        }
        self.encryption = Some(session);
        Ok(session)
    }

    fn start_session(
        &mut self,
        kind: SessionType,
        symmetric: SymmetricDefinition,
        salt: Option<KeyHandle>,
    ) -> Result<AuthSession, TpmError> {
        const OPERATION: &str = "StartAuthSession";
        self.plain(OPERATION, |ctx| {
            ctx.start_auth_session(salt, None, None, kind, symmetric, HashingAlgorithm::Sha256)
        })?
        .ok_or_else(|| TpmError::Malformed {
            operation: OPERATION,
            why: "the TPM gave no session handle".into(),
        })
    }

    pub(crate) fn flush_session(&mut self, session: AuthSession) {
        let handle = SessionHandle::from(session).into();
        if let Err(error) = self.plain("FlushContext of a session", |ctx| ctx.flush_context(handle))
        {
            log::debug!("{error}");
        }
    }
}
