//! The automatic way of unlocking: finds the volumes, asks TPM or key server for their passphrases, one after the other over
//! one exchange context, and reports. It opens nothing itself, and creates nothing.
//!
//! A volume that is not there yet, or that the server has no answer for at the moment, does not hold up the others: it is come
//! back to until the deadline.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use latchkey_config::{Config, MapperNames, Mesh};
use latchkey_tpm::Tpm;
use latchkey_wire::timeline::Mode;

use crate::binding::choose;
use crate::clock::{Steps, since_boot};
use crate::disk::{Volume, luks_labelled, plain_labelled, scan};
use crate::exchange::Partition;
use crate::handover::MachineSecret;
use crate::network::Changes;
use crate::passphrase::{Deadline, Passphrase, Source, mode};
use crate::{BootError, oem};

/// Kairos' name of the volume, when the configuration names none.
pub const DEFAULT_LABEL: &str = "COS_PERSISTENT";
/// A driver that is loaded by udev's coldplug comes within a second or two.
const TPM_PATIENCE: Duration = Duration::from_secs(15);
/// A plain file system under the label is believed to be all there is after this long.
const PLAIN_PATIENCE: Duration = Duration::from_secs(3);
/// How long a server is asked for one volume before the next one has its turn.
const TURN: Duration = Duration::from_secs(10);
const REMINDER: Duration = Duration::from_secs(10);
const TICK: Duration = Duration::from_millis(250);

/// What the automatic way reports to the main thread.
pub(crate) enum Report {
    /// What is to be opened, and until when.
    Plan(Box<Plan>),
    /// The TPM's share of the mesh identity.
    Secret(MachineSecret),
    /// Which of the volumes with a label is this machine's.
    Chosen(String, Volume),
    /// The passphrase of a volume.
    Release(String, Passphrase),
    /// One volume is not opened automatically. The others go on.
    VolumeFailed(String, BootError),
    /// The automatic way is at its end: nothing more comes, for want of something that all volumes need.
    Failed(BootError),
    /// The automatic way has done what it could.
    Done,
}

/// What the configuration says is to be done.
pub(crate) struct Plan {
    pub(crate) labels: Vec<String>,
    pub(crate) deadline: Deadline,
    pub(crate) mode: Mode,
    pub(crate) mapper: MapperNames,
    pub(crate) mesh: Option<Mesh>,
}

impl Plan {
    fn of(config: &Config, began: Instant) -> Self {
        Self {
            labels: labels(config),
            deadline: Deadline {
                at: began + config.deadline,
                seconds: config.deadline.as_secs(),
                attempts: None,
            },
            mode: mode(config),
            mapper: config.mapper,
            mesh: config.mesh.clone(),
        }
    }
}

/// The labels to open.
#[must_use]
pub fn labels(config: &Config) -> Vec<String> {
    if config.encrypted_partitions.is_empty() {
        vec![DEFAULT_LABEL.to_owned()]
    } else {
        config.encrypted_partitions.clone()
    }
}

/// The automatic way's end of the channel.
pub(crate) struct Reporter {
    pub(crate) sender: Sender<Report>,
    pub(crate) wakened: UnixStream,
    pub(crate) directories: Vec<PathBuf>,
}

impl Reporter {
    pub(crate) fn run(mut self, began: Instant, steps: &Steps) {
        let end = match self.unlock(began, steps) {
            Ok(()) => Report::Done,
            Err(error) => Report::Failed(error),
        };
        self.report(end);
    }

    fn unlock(&mut self, began: Instant, steps: &Steps) -> Result<(), BootError> {
        let config = steps.time("config", || oem::load(&self.directories, oem::BOOT_PATIENCE))?;
        let plan = Plan::of(&config, began);
        let deadline = plan.deadline;
        self.report(Report::Plan(Box::new(plan)));
        let device = config.challenger.tpm_device.as_deref();
        let patience = TPM_PATIENCE.min(deadline.at.saturating_duration_since(Instant::now()));
        let mut tpm = steps.time("tpm-open", || Tpm::open_within(device, patience))?;
        let ek = steps.time("tpm-endorsement-key", || tpm.endorsement_key())?;
        log::info!("this machine is {}", ek.pubhash());
        if config.mesh.is_some() {
            let secret = steps.time("tpm-machine-secret", || tpm.machine_secret(&ek))?;
            self.report(Report::Secret(secret));
        }
        let mut source = Source::prepare(&mut tpm, ek, &config.challenger, steps)?;
        self.release_all(labels(&config), &mut source, deadline, steps);
        Ok(())
    }

    fn release_all(
        &mut self,
        labels: Vec<String>,
        source: &mut Source<'_>,
        deadline: Deadline,
        steps: &Steps,
    ) {
        let changes = Changes::of_devices();
        let mut waiting: Vec<_> = labels.into_iter().map(Waiting::new).collect();
        loop {
            let turn = if waiting.len() > 1 { deadline.within(TURN) } else { deadline };
            let volumes = scan();
            for mut volume in std::mem::take(&mut waiting) {
                match self.attempt(&mut volume, &volumes, source, turn, steps) {
                    Ok(passphrase) => self.report(Report::Release(volume.label, passphrase)),
                    Err(error) => match passing(error, deadline) {
                        Ok(error) => waiting.push(volume.later(error)),
                        Err(error) => self.report(Report::VolumeFailed(volume.label, error)),
                    },
                }
            }
            if waiting.is_empty() {
                return;
            }
            changes.wait(deadline.at.min(Instant::now() + TICK));
        }
    }

    fn attempt(
        &mut self,
        waiting: &mut Waiting,
        volumes: &[Volume],
        source: &mut Source<'_>,
        turn: Deadline,
        steps: &Steps,
    ) -> Result<Passphrase, BootError> {
        let label = waiting.label.as_str();
        let chosen = match &waiting.chosen {
            Some(chosen) => chosen.clone(),
            None => {
                let candidates = candidates(volumes, label, waiting.began)?;
                let mut mark = |uuid: &str, label: &str| {
                    let ask = || source.tpm().volume_mac(uuid, label);
                    Ok(steps.time("tpm-volume-mark", ask)?)
                };
                let chosen = choose(label, &candidates, &mut mark)?;
                steps.since("volume", waiting.since_boot);
                self.report(Report::Chosen(label.to_owned(), chosen.clone()));
                waiting.chosen.insert(chosen).clone()
            }
        };
        let partition = Partition {
            label: label.to_owned(),
            name: chosen.name(),
            uuid: chosen.partition_uuid(),
        };
        source.release(&partition, turn, steps)
    }

    fn report(&mut self, report: Report) {
        // The main thread ends the process when it has what it needs; then nobody listens.
        if self.sender.send(report).is_ok() {
            let _ = self.wakened.write_all(&[0]);
        }
    }
}

/// A volume that has no passphrase yet.
struct Waiting {
    label: String,
    chosen: Option<Volume>,
    began: Instant,
    since_boot: Duration,
    reminder: Instant,
}

impl Waiting {
    fn new(label: String) -> Self {
        let began = Instant::now();
        let reminder = began + Duration::from_secs(1);
        Self { label, chosen: None, began, since_boot: since_boot(), reminder }
    }

    /// Says what is waited for, not too often.
    fn later(mut self, error: BootError) -> Self {
        let now = Instant::now();
        if now >= self.reminder {
            log::info!("{error}");
            self.reminder = now + REMINDER;
        }
        self
    }
}

/// `Ok`: what may yet come. `Err`: a failure for good, or for want of time.
fn passing(error: BootError, deadline: Deadline) -> Result<BootError, BootError> {
    let late = Instant::now() >= deadline.at;
    match error {
        BootError::VolumeMissing { .. } if late => Err(deadline.error(error)),
        BootError::VolumeMissing { .. } => Ok(error),
        BootError::Deadline { last, .. } if !late => Ok(*last),
        error => Err(error),
    }
}

/// The LUKS2 volumes that can be meant by a label, one at least.
fn candidates(volumes: &[Volume], label: &str, began: Instant) -> Result<Vec<Volume>, BootError> {
    let found = labelled(volumes, label);
    if matches!(found, Err(BootError::NotEncrypted { .. })) && began.elapsed() < PLAIN_PATIENCE {
        return Err(missing(label, volumes));
    }
    found
}

/// The LUKS2 volumes with a label, one at least, and no unencrypted file system beside them: the system mounts by label.
///
/// # Errors
/// [`BootError::VolumeMissing`], [`BootError::NotEncrypted`] or [`BootError::PlainBeside`].
pub(crate) fn labelled(volumes: &[Volume], label: &str) -> Result<Vec<Volume>, BootError> {
    let luks = luks_labelled(volumes, label);
    let plain = plain_labelled(volumes, label);
    match (luks.first(), plain.first()) {
        (None, None) => Err(missing(label, volumes)),
        (None, Some(plain)) => {
            Err(BootError::NotEncrypted { label: label.to_owned(), device: plain.device.clone() })
        }
        (Some(luks), Some(plain)) => Err(BootError::PlainBeside {
            label: label.to_owned(),
            volume: luks.to_string(),
            plain: plain.to_string(),
        }),
        (Some(_), None) => Ok(luks),
    }
}

fn missing(label: &str, volumes: &[Volume]) -> BootError {
    let seen = volumes.iter().filter_map(Volume::luks_label).collect();
    BootError::VolumeMissing { label: label.to_owned(), seen }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::Content;

    fn volume(device: &str, content: Content) -> Volume {
        Volume { device: device.into(), content }
    }

    #[test]
    fn a_plain_file_system_is_never_passed_off_as_the_volume() {
        let luks = volume("/dev/sda3", Content::Luks2 { label: "X".into(), uuid: "u".into() });
        let ext = volume("/dev/sdb1", Content::Ext { label: "X".into() });
        let xfs = volume("/dev/sdc1", Content::Plain { kind: "xfs", label: "X".into() });
        let other = volume("/dev/sdd1", Content::Ext { label: "Y".into() });
        let of = |volumes: &[&Volume]| {
            labelled(&volumes.iter().copied().cloned().collect::<Vec<_>>(), "X")
        };
        assert_eq!(of(&[&luks, &other]).unwrap(), std::slice::from_ref(&luks));
        assert!(matches!(of(&[&other]), Err(BootError::VolumeMissing { .. })));
        assert!(matches!(of(&[&ext]), Err(BootError::NotEncrypted { .. })));
        for plain in [&ext, &xfs] {
            let error = of(&[plain, &luks]).unwrap_err();
            assert_eq!(error.exit_code(), 41);
            let said = error.to_string();
            for device in [&luks, plain] {
                assert!(said.contains(&device.device.display().to_string()), "{said}");
            }
        }
    }

    #[test]
    fn a_turn_that_is_over_is_no_failure_before_the_deadline() {
        let far = Deadline::after(Duration::from_secs(600));
        let gone = Deadline { at: Instant::now(), ..far };
        let missing = || missing("X", &[]);
        assert!(matches!(passing(missing(), far), Ok(BootError::VolumeMissing { .. })));
        assert!(matches!(passing(missing(), gone), Err(BootError::Deadline { seconds: 600, .. })));
        assert!(matches!(passing(far.error(missing()), far), Ok(BootError::VolumeMissing { .. })));
        assert!(matches!(passing(gone.error(missing()), gone), Err(BootError::Deadline { .. })));
        let impostor =
            BootError::Impostor { label: "X".into(), device: "/dev/x".into(), uuid: "u".into() };
        assert!(passing(impostor, far).is_err());
    }
}
