//! Where a volume's passphrase comes from: the TPM alone, or a key server that asks the TPM.
//!
//! [`release`] is for unlocking and creates nothing, whatever is missing: a passphrase made at
//! unlock time would be another one than the volume's. [`enrol`] is for installing.

use std::time::{Duration, Instant};

use latchkey_config::{Challenger, Config};
use latchkey_tpm::{BLOB_MAX, EndorsementKey, Tpm, TpmError};
use latchkey_wire::timeline::Mode;
use latchkey_wire::v1::{Refusal, Release};
use zeroize::Zeroizing;

use crate::BootError;
use crate::clock::Steps;
use crate::dial::Endpoint;
use crate::exchange::{Attested, ExchangeError, Partition, Stage};
use crate::network::Changes;

/// A LUKS passphrase.
pub type Passphrase = Zeroizing<Vec<u8>>;

/// Pauses between attempts double from the first to the last of these, give or take a half.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(8));
/// A word on the console this often while nothing happens.
const REMINDER: Duration = Duration::from_secs(10);

/// The way of unlocking that a configuration names.
#[must_use]
pub fn mode(config: &Config) -> Mode {
    if config.challenger.servers.is_empty() { Mode::Offline } else { Mode::Online }
}

/// The passphrases of a machine, from its TPM or its key server.
#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // there is one, on the stack
pub enum Source<'a> {
    Offline { tpm: &'a mut Tpm, settings: &'a Challenger },
    Online { attested: Attested<'a>, server: Endpoint, settings: &'a Challenger },
}

impl<'a> Source<'a> {
    /// Prepares everything that needs no network.
    ///
    /// # Errors
    /// A setting that cannot be used, or what the TPM answered.
    pub fn prepare(
        tpm: &'a mut Tpm,
        ek: EndorsementKey,
        settings: &'a Challenger,
        steps: &Steps,
    ) -> Result<Self, BootError> {
        let Some(url) = settings.servers.first() else {
            return Ok(Self::Offline { tpm, settings });
        };
        if settings.mdns {
            return Err(BootError::Setting(
                "kcrypt.challenger.mdns: this version finds no server by mDNS; give challenger_server an address"
                    .into(),
            ));
        }
        let server = Endpoint::new(url, settings.certificate.as_deref())?;
        let attested = steps.time("tpm-attestation-key", || Attested::new(tpm, ek))?;
        Ok(Self::Online { attested, server, settings })
    }

    /// The passphrase for `partition`, asked for until it comes, a refusal comes, or the deadline.
    ///
    /// # Errors
    /// A refusal, a TPM error, or [`BootError::Deadline`] with what failed last.
    pub fn release(
        &mut self,
        partition: &Partition,
        deadline: Deadline,
        steps: &Steps,
    ) -> Result<Passphrase, BootError> {
        match self {
            Self::Offline { tpm, settings } => {
                steps.time("tpm-unseal", || unseal_offline(tpm, settings))
            }
            Self::Online { attested, server, settings } => {
                await_route(server, deadline, steps)?;
                let release = retried(deadline, || {
                    let asked = || attested.get_pass(server, partition, deadline.at);
                    Ok(steps.time("exchange", asked)??)
                })?;
                open_release(attested.tpm(), settings, release, steps)
            }
        }
    }

    /// The passphrase for `partition`, made and left with the TPM or the key server if there is
    /// none yet. Cut off anywhere and run again it comes to the same passphrase.
    ///
    /// # Errors
    /// As [`Source::release`].
    pub fn enrol(
        &mut self,
        partition: &Partition,
        deadline: Deadline,
        steps: &Steps,
    ) -> Result<Passphrase, BootError> {
        match self {
            Self::Offline { tpm, settings } => enrol_offline(tpm, settings),
            Self::Online { .. } => match self.release(partition, deadline, steps) {
                Err(BootError::Refused(Refusal::NoSecret(_))) => {
                    self.post_new(partition, deadline)?;
                    // What the server gives out now is the passphrase, whoever posted first.
                    self.release(partition, deadline, steps)
                }
                released => released,
            },
        }
    }

    fn post_new(&mut self, partition: &Partition, deadline: Deadline) -> Result<(), BootError> {
        let Self::Online { attested, server, settings } = self else { return Ok(()) };
        log::info!(
            "{} has no passphrase for {} yet; making one",
            server.authority(),
            partition.label
        );
        let fresh = generate()?;
        let sealed = attested.tpm().seal_blob(settings.c_index, &fresh)?;
        retried(deadline, || Ok(attested.post_pass(server, partition, &sealed, deadline.at)?))
    }
}

/// When to give up, and how long that was from the start.
#[derive(Clone, Copy, Debug)]
pub struct Deadline {
    pub at: Instant,
    pub seconds: u64,
}

impl Deadline {
    #[must_use]
    pub fn after(patience: Duration) -> Self {
        Self { at: Instant::now() + patience, seconds: patience.as_secs() }
    }

    fn passed(self) -> bool {
        Instant::now() >= self.at
    }

    /// `last` is what the time was spent on.
    pub(crate) fn error(self, last: BootError) -> BootError {
        BootError::Deadline { seconds: self.seconds, last: Box::new(last) }
    }
}

/// Waits for the kernel to have a route to the server; what is said on the console says what for.
fn await_route(server: &Endpoint, deadline: Deadline, steps: &Steps) -> Result<(), BootError> {
    let changes = Changes::of_routes();
    let mut reminder = Instant::now() + Duration::from_secs(1);
    steps.time("route", || {
        while !server.has_route() {
            if deadline.passed() {
                return Err(deadline.error(no_route(server)));
            }
            if Instant::now() >= reminder {
                log::info!("{}", no_route(server));
                reminder = Instant::now() + REMINDER;
            }
            changes.wait(deadline.at);
        }
        Ok(())
    })
}

fn no_route(server: &Endpoint) -> BootError {
    BootError::Exchange(ExchangeError::Network {
        stage: Stage::Route,
        server: server.authority(),
        error: std::io::Error::other("none yet"),
    })
}

/// Does `attempt` until it succeeds, fails for good, or the deadline passes.
fn retried<T>(
    deadline: Deadline,
    mut attempt: impl FnMut() -> Result<T, BootError>,
) -> Result<T, BootError> {
    let mut pause = BACK_OFF.0;
    loop {
        let error = match attempt() {
            Ok(done) => return Ok(done),
            Err(error) if !error.is_transient() => return Err(error),
            Err(error) => error,
        };
        let next = Instant::now() + jittered(pause);
        if next >= deadline.at {
            return Err(deadline.error(error));
        }
        let rest = next.saturating_duration_since(Instant::now());
        log::warn!("{error}; trying again in {:.1} s", rest.as_secs_f32());
        std::thread::sleep(rest);
        pause = (pause * 2).min(BACK_OFF.1);
    }
}

/// Half to one and a half of `pause`: machines that lost power together shall not ask together.
fn jittered(pause: Duration) -> Duration {
    let mut random = [0; 2];
    if let Err(error) = getrandom::fill(&mut random) {
        log::debug!("no jitter: {error}");
    }
    let fraction = f64::from(u16::from_le_bytes(random)) / f64::from(u16::MAX);
    pause.mul_f64(0.5 + fraction)
}

pub(crate) fn unseal_offline(
    tpm: &mut Tpm,
    settings: &Challenger,
) -> Result<Passphrase, BootError> {
    let blob = tpm.nv_blob(settings.nv_index).map_err(|error| match error {
        TpmError::NvMissing { .. } | TpmError::NvUnwritten { .. } => BootError::NotInstalled(error),
        other => other.into(),
    })?;
    usable(tpm.unseal_blob(settings.c_index, &blob)?)
}

fn enrol_offline(tpm: &mut Tpm, settings: &Challenger) -> Result<Passphrase, BootError> {
    match unseal_offline(tpm, settings) {
        Err(BootError::NotInstalled(_)) => {
            let fresh = generate()?;
            let sealed = tpm.seal_blob(settings.c_index, &fresh)?;
            tpm.nv_store_new(settings.nv_index, &sealed)?;
            // Read back what will be read at every boot.
            unseal_offline(tpm, settings)
        }
        known => known,
    }
}

fn open_release(
    tpm: &mut Tpm,
    settings: &Challenger,
    release: Release,
    steps: &Steps,
) -> Result<Passphrase, BootError> {
    match &release {
        Release::Passphrase(text) => usable(text.clone()),
        Release::Sealed(blob) => {
            usable(steps.time("tpm-unseal", || tpm.unseal_blob(settings.c_index, blob))?)
        }
    }
}

/// cryptsetup reads a passphrase up to the first line feed, so one that contains it formats with
/// another passphrase than it opens with.
fn usable(passphrase: Passphrase) -> Result<Passphrase, BootError> {
    if passphrase.is_empty() || passphrase.iter().any(|byte| matches!(byte, b'\r' | b'\n' | 0)) {
        return Err(BootError::Setting(
            "the passphrase that was released is empty or contains a line end or NUL; correct the Secret".into(),
        ));
    }
    Ok(passphrase)
}

/// 256 bits from the kernel as 52 characters of the alphabet Kairos uses, so that every tool that
/// handles kcrypt passphrases handles it.
fn generate() -> Result<Passphrase, BootError> {
    const ALPHABET: &[u8; 32] = b"234567abcdefghijklmnopqrstuvwxyz";
    const LENGTH: usize = 52;
    const _: () = assert!(LENGTH <= BLOB_MAX);
    let mut random = Zeroizing::new([0; LENGTH]);
    getrandom::fill(&mut *random)
        .map_err(|error| BootError::Io { what: "get random bytes".into(), error: error.into() })?;
    let letters =
        random.iter().map(|byte| ALPHABET.get(usize::from(byte & 31)).copied().unwrap_or(b'a'));
    Ok(Zeroizing::new(letters.collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_is_jittered_around_itself() {
        for _ in 0..100 {
            let pause = jittered(Duration::from_secs(2));
            assert!(
                (Duration::from_secs(1)..=Duration::from_secs(3)).contains(&pause),
                "{pause:?}"
            );
        }
    }

    #[test]
    fn a_generated_passphrase_has_256_bits_of_letters_and_digits() {
        let (first, second) = (generate().unwrap(), generate().unwrap());
        assert_ne!(first, second);
        assert_eq!(first.len(), 52);
        assert!(first.iter().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit()));
    }

    #[test]
    fn a_passphrase_that_cryptsetup_would_cut_is_refused() {
        for bad in [&b""[..], b"a\n", b"a\rb", b"\0"] {
            assert!(usable(Zeroizing::new(bad.to_vec())).is_err(), "{bad:?}");
        }
        assert!(usable(Zeroizing::new(b"with space and \xc3\xa9".to_vec())).is_ok());
    }

    #[test]
    fn a_failure_for_good_is_not_retried() {
        let mut attempts = 0;
        let result: Result<(), _> = retried(Deadline::after(Duration::from_secs(60)), || {
            attempts += 1;
            Err(Refusal::Quarantined("x".into()).into())
        });
        assert!(matches!(result, Err(BootError::Refused(_))));
        assert_eq!(attempts, 1);
    }

    #[test]
    fn a_passing_failure_is_retried_until_the_deadline_and_named_then() {
        let mut attempts = 0;
        let result: Result<(), _> = retried(Deadline::after(Duration::from_secs(2)), || {
            attempts += 1;
            Err(ExchangeError::Closed { server: "kms".into() }.into())
        });
        assert!(matches!(result, Err(BootError::Deadline { .. })), "{result:?}");
        assert!(attempts >= 2);
    }
}
