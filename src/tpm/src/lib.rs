//! Everything that talks to a TPM 2.0: TCG TPM 2.0 Library, over tss-esapi; keys, handles and
//! structures as Kairos' kcrypt uses them (`protocols/kcrypt.md` §1, §2, §4.4, §9).
//!
//! A [`Tpm`] is one open connection. It belongs to one thread, asks for one thing at a time, and
//! leaves no session and no transient object behind on any path. Owner and endorsement
//! authorization must be empty, as everywhere in kcrypt.

mod attestation;
mod blob;
mod certify_creation;
mod device;
mod ek;
mod error;
mod inspect;
mod machine;
mod nv;
mod primary;
mod quote;
mod response;
mod tcti;
pub mod template;
mod transport;

use std::cell::RefCell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tss_esapi::Context;
use tss_esapi::interface_types::session_handles::AuthSession;
use tss_esapi::tcti_ldr::{DeviceConfig, TctiNameConf};

pub use attestation::{Activation, AttestationKey};
pub use blob::BLOB_MAX;
pub use device::{Address, DEFAULT_DEVICES};
pub use ek::EndorsementKey;
pub use error::{Hierarchy, TpmError};
pub use inspect::{Endorsement, Held, KCRYPT_HANDLES, Properties};
pub use nv::NvIndex;
pub use quote::Quote;

use error::rc;
use tcti::SharedTransport;
use transport::Transport;

/// Persistent handles and NV indices as upstream uses them (`protocols/kcrypt.md` §1.4, §9).
pub mod handle {
    /// RSA endorsement key.
    pub const EK: u32 = 0x8101_0001;
    /// Storage root key, parent of the attestation key.
    pub const SRK: u32 = 0x8100_0001;
    /// Default of `c_index`: the RSA-OAEP key that seals passphrases.
    pub const BLOB_KEY: u32 = 0x8100_0008;
    /// Default of `nv_index`: the sealed passphrase of offline mode.
    pub const NV_BLOB: u32 = 0x0150_0000;
    /// The RSA-2048 EK certificate, TCG EK Credential Profile 2.5 §2.2.1.4.
    pub const NV_EK_CERTIFICATE: u32 = 0x01c0_0002;
}

/// An open TPM.
pub struct Tpm {
    context: Context,
    transport: SharedTransport,
    address: Address,
    /// The session under which secrets cross the bus, once one was needed.
    encryption: Option<AuthSession>,
}

impl std::fmt::Debug for Tpm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tpm").field("address", &self.address).finish_non_exhaustive()
    }
}

impl Tpm {
    /// Opens the TPM of the `tpm_device` setting, or the first of [`DEFAULT_DEVICES`].
    ///
    /// # Errors
    /// [`TpmError::Missing`], [`TpmError::Busy`], [`TpmError::Open`], [`TpmError::Address`].
    pub fn open(device: Option<&str>) -> Result<Self, TpmError> {
        let addresses = match device {
            Some(text) => vec![Address::parse(text)?],
            None => DEFAULT_DEVICES.map(|path| Address::Device(path.into())).to_vec(),
        };
        let mut missing = Vec::new();
        for address in addresses {
            match Transport::open(&address) {
                Ok(transport) => return Self::over(transport, address),
                Err(TpmError::Missing { tried }) => missing.push(tried),
                Err(error) => return Err(error),
            }
        }
        Err(TpmError::Missing { tried: missing.join(", ") })
    }

    /// As [`Tpm::open`], but waits up to `patience` for a device that has not appeared yet or is
    /// still held by another program: in an initramfs the driver may come later than we do.
    ///
    /// # Errors
    /// As [`Tpm::open`].
    pub fn open_within(device: Option<&str>, patience: Duration) -> Result<Self, TpmError> {
        let deadline = Instant::now() + patience;
        loop {
            match Self::open(device) {
                Err(TpmError::Missing { .. } | TpmError::Busy { .. })
                    if Instant::now() < deadline =>
                {
                    std::thread::sleep(Duration::from_millis(20));
                }
                opened => return opened,
            }
        }
    }

    fn over(transport: Transport, address: Address) -> Result<Self, TpmError> {
        let transport = Rc::new(RefCell::new(transport));
        // The name is for tss-esapi's parser only: see `tcti`.
        let conf = TctiNameConf::Device(DeviceConfig::default());
        let context = tcti::with_transport(&transport, || Context::new(conf))
            .map_err(|error| TpmError::Library { operation: "opening the TPM", error })?;
        Ok(Self { context, transport, address, encryption: None })
    }

    /// Where this TPM was found.
    #[must_use]
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Commands sent so far, resent ones included.
    #[must_use]
    pub fn commands(&self) -> u32 {
        self.transport.borrow().commands()
    }

    /// Runs one tss-esapi call with password authorization and turns its error into ours.
    fn authorized<T>(
        &mut self,
        operation: &'static str,
        call: impl FnOnce(&mut Context) -> tss_esapi::Result<T>,
    ) -> Result<T, TpmError> {
        let result = self.context.execute_with_session(Some(AuthSession::Password), call);
        result.map_err(|error| self.explain(operation, error))
    }

    /// Runs one tss-esapi call that takes no authorization.
    fn plain<T>(
        &mut self,
        operation: &'static str,
        call: impl FnOnce(&mut Context) -> tss_esapi::Result<T>,
    ) -> Result<T, TpmError> {
        let result = self.context.execute_without_session(call);
        result.map_err(|error| self.explain(operation, error))
    }

    /// The response code that came over the wire says more than the library's rendering of it.
    fn explain(&self, operation: &'static str, error: tss_esapi::Error) -> TpmError {
        let Ok(transport) = self.transport.try_borrow() else {
            return TpmError::Library { operation, error };
        };
        match transport.response_code() {
            _ if transport.is_broken() => TpmError::Connection { operation },
            0 => TpmError::Library { operation, error },
            rc::LOCKOUT => TpmError::Lockout { operation },
            code => TpmError::Response { operation, code },
        }
    }

    /// The last response as it came over the wire.
    fn last_response(&self) -> Vec<u8> {
        self.transport.borrow().response().to_vec()
    }
}

/// Where an operation takes owner or endorsement authorization, "authorization failed" means that
/// somebody set a password on that hierarchy.
fn needs_empty_auth<T>(result: Result<T, TpmError>, hierarchy: Hierarchy) -> Result<T, TpmError> {
    result.map_err(|error| match error {
        TpmError::Response { operation, code }
            if matches!(rc::base(code), rc::BAD_AUTH | rc::AUTH_FAIL) =>
        {
            TpmError::AuthSet { operation, hierarchy }
        }
        other => other,
    })
}

/// Keeps tpm2-tss from writing to stderr: it reports as errors what is an ordinary answer here (an
/// NV index that is not there), and stderr is the console of an initramfs. Call it first in `main`.
///
/// `TSS2_LOG` is left alone where it is set.
pub fn silence_tss_log() {
    if std::env::var_os("TSS2_LOG").is_none() {
        // SAFETY: called at the start of `main`, while there is one thread.
        #[allow(unsafe_code)]
        unsafe {
            std::env::set_var("TSS2_LOG", "all+NONE");
        }
    }
}
