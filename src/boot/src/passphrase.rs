//! Where a volume's passphrase comes from: the TPM alone, or a key server that asks the TPM.
//!
//! [`release`] is for unlocking and creates nothing, whatever is missing: a passphrase made at
//! unlock time would be another one than the volume's. [`enrol`] is for installing.

use std::time::{Duration, Instant};

use latchkey_config::{Challenger, Config};
use latchkey_tpm::{BLOB_MAX, EndorsementKey, Tpm, TpmError};
use latchkey_wire::release::{Refusal, Release};
use latchkey_wire::timeline::Mode;
use zeroize::Zeroizing;

use crate::BootError;
use crate::clock::Steps;
use crate::dial::{Endpoint, tls};
use crate::exchange::race::{self, Ask, Server, Verdict, Wish};
use crate::exchange::{Attested, ExchangeError, Partition, Stage};
use crate::network::Changes;

/// A LUKS passphrase.
pub type Passphrase = Zeroizing<Vec<u8>>;

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
    Online { attested: Attested<'a>, servers: Vec<Server>, settings: &'a Challenger },
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
        if settings.servers.is_empty() && !settings.mdns {
            return Ok(Self::Offline { tpm, settings });
        }
        let servers = Endpoint::all(settings)?;
        if servers.iter().any(Endpoint::is_secure)
            && let Some(lag) = tls::lag()
        {
            let days = lag.as_secs() / 86_400;
            log::warn!(
                "this machine's clock is {days} days behind the date of this program; certificates are held to that date"
            );
        }
        let servers =
            servers.into_iter().map(|server| Server::new(server, settings.protocol)).collect();
        let attested = steps.time("tpm-attestation-key", || {
            Attested::new(tpm, ek, &settings.pcrs, is_live_system())
        })?;
        Ok(Self::Online { attested, servers, settings })
    }

    /// The TPM, for what else it is wanted for in between.
    pub fn tpm(&mut self) -> &mut Tpm {
        match self {
            Self::Offline { tpm, .. } => tpm,
            Self::Online { attested, .. } => attested.tpm(),
        }
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
            Self::Online { .. } => {
                let answer =
                    steps.time("exchange", || self.ask(partition, Wish::Release, deadline, steps));
                match answer? {
                    Verdict::Refused(refusal, _) => Err(refusal.into()),
                    verdict => self.open(verdict, steps),
                }
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
            Self::Online { .. } => {
                match self.ask(partition, Wish::Enrol, deadline, steps)? {
                    Verdict::Refused(Refusal::NoSecret(_), number) => {
                        // What the server gives out now is the passphrase, whoever posted first.
                        self.post_new(number, partition, deadline, steps)?;
                        self.release(partition, deadline, steps)
                    }
                    Verdict::Refused(refusal, _) => Err(refusal.into()),
                    verdict => self.open(verdict, steps),
                }
            }
        }
    }

    fn ask(
        &mut self,
        partition: &Partition,
        wish: Wish,
        deadline: Deadline,
        steps: &Steps,
    ) -> Result<Verdict, BootError> {
        let Self::Online { attested, servers, .. } = self else { return Ok(Verdict::Kept) };
        await_route(servers, deadline, steps)?;
        let papers = attested.papers().clone();
        let question = Ask { papers, partition: partition.clone(), wish, deadline: deadline.at };
        race::ask(servers, attested, question, deadline)
    }

    fn open(&mut self, verdict: Verdict, steps: &Steps) -> Result<Passphrase, BootError> {
        match (self, verdict) {
            (Self::Online { attested, settings, .. }, Verdict::Released(release)) => {
                open_release(attested.tpm(), settings, release, steps)
            }
            _ => Err(BootError::Unfinished),
        }
    }

    /// Only a server of generation 1 asks for it, and it is left with the one that did.
    fn post_new(
        &mut self,
        number: usize,
        partition: &Partition,
        deadline: Deadline,
        steps: &Steps,
    ) -> Result<(), BootError> {
        let Self::Online { attested, servers, settings } = self else { return Ok(()) };
        let Some(server) = servers.get(number).cloned() else { return Ok(()) };
        log::info!(
            "{} has no passphrase for {} yet; making one",
            server.endpoint().authority(),
            partition.label
        );
        let fresh = generate()?;
        let sealed = attested.tpm().seal_blob(settings.c_index, &fresh)?;
        let papers = attested.papers().clone();
        let wish = Wish::Keep(sealed.to_vec());
        let question = Ask { papers, partition: partition.clone(), wish, deadline: deadline.at };
        let verdict = steps.time("post", || race::ask(&mut [server], attested, question, deadline));
        match verdict? {
            Verdict::Refused(refusal, _) => Err(refusal.into()),
            Verdict::Released(_) | Verdict::Kept => Ok(()),
        }
    }
}

/// An installer's PCRs are not those of the system it installs.
fn is_live_system() -> bool {
    crate::oem::read_cmdline().is_ok_and(|text| latchkey_config::cmdline::is_live(&text))
}

/// When to give up, and how long that was from the start.
#[derive(Clone, Copy, Debug)]
pub struct Deadline {
    pub at: Instant,
    pub seconds: u64,
    /// Attempts at a server before that.
    pub attempts: Option<u32>,
}

impl Deadline {
    #[must_use]
    pub fn after(patience: Duration) -> Self {
        Self { at: Instant::now() + patience, seconds: patience.as_secs(), attempts: None }
    }

    /// At most `patience` from now, told as this deadline.
    #[must_use]
    pub fn within(self, patience: Duration) -> Self {
        Self { at: self.at.min(Instant::now() + patience), ..self }
    }

    fn passed(self) -> bool {
        Instant::now() >= self.at
    }

    /// `last` is what the time was spent on.
    pub(crate) fn error(self, last: BootError) -> BootError {
        BootError::Deadline { seconds: self.seconds, last: Box::new(last) }
    }
}

/// Waits for the kernel to have a route to a server; what is said on the console says what for.
fn await_route(servers: &[Server], deadline: Deadline, steps: &Steps) -> Result<(), BootError> {
    let changes = Changes::of_routes();
    let mut reminder = Instant::now() + Duration::from_secs(1);
    steps.time("route", || {
        while !servers.iter().any(|server| server.endpoint().has_route()) {
            if deadline.passed() {
                return Err(deadline.error(no_route(servers)));
            }
            if Instant::now() >= reminder {
                log::info!("{}", no_route(servers));
                reminder = Instant::now() + REMINDER;
            }
            changes.wait(deadline.at);
        }
        Ok(())
    })
}

fn no_route(servers: &[Server]) -> BootError {
    let names: Vec<_> = servers.iter().map(|server| server.endpoint().authority()).collect();
    BootError::Exchange(ExchangeError::Network {
        stage: Stage::Route,
        server: names.join(", "),
        error: std::io::Error::other("none yet"),
    })
}

/// The NV index beside the configured one, where a change of the machine's key keeps the new passphrase until it is everywhere.
pub(crate) fn staged_index(settings: &Challenger) -> u32 {
    settings.nv_index ^ 1
}

/// The passphrase of offline mode. While `rekey` writes the new one over the old, a power cut can leave neither; both then open
/// every volume, and the new one is kept a second time.
pub(crate) fn unseal_offline(
    tpm: &mut Tpm,
    settings: &Challenger,
) -> Result<Passphrase, BootError> {
    let error = match unseal_at(tpm, settings, settings.nv_index) {
        Err(error @ BootError::Tpm(TpmError::Response { .. })) => error,
        Err(error @ BootError::NotInstalled(TpmError::NvUnwritten { .. })) => error,
        other => return other,
    };
    unseal_at(tpm, settings, staged_index(settings)).map_err(|_| error)
}

pub(crate) fn unseal_at(
    tpm: &mut Tpm,
    settings: &Challenger,
    index: u32,
) -> Result<Passphrase, BootError> {
    let blob = tpm.nv_blob(index).map_err(|error| match error {
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
    let disguised = release.sealed_in_disguise();
    match release {
        Release::Sealed(blob) => {
            usable(steps.time("tpm-unseal", || tpm.unseal_blob(settings.c_index, &blob))?)
        }
        // A Go server of generation 2 hands out what generation 1 has left with it as it is.
        Release::Passphrase(text) => {
            match disguised.map(|blob| tpm.unseal_blob(settings.c_index, &blob)) {
                Some(Ok(unsealed)) => usable(unsealed),
                Some(Err(TpmError::Response { .. })) | None => usable(text),
                Some(Err(error)) => Err(error.into()),
            }
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
pub(crate) fn generate() -> Result<Passphrase, BootError> {
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
}
