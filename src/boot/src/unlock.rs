//! `unlock`: what the initramfs calls. Opens the volumes and leaves the identity, or says why not.
//!
//! Two ways at once, and whichever comes first wins. The automatic way has a thread of its own,
//! because a TPM command and a name look-up cannot be interrupted; it only reports. The main
//! thread polls those reports and the prompt, opens volumes, and alone decides how it ends:
//!
//! ```text
//!            Plan, Secret            Release(label)            Release(last)
//!  Preparing ────────────▶ Waiting ───────────────▶ Waiting ───────────────▶ Unlocked
//!      │                      │  └── typed, opens all ─────────────────────▶ Recovery
//!      │ Failed               │ Failed                typed, opens all
//!      └──────────────────────┴─────▶ Person only ──────────────────────────▶ Recovery
//!                                          └── deadline ────────────────────▶ Refused / Failed
//! ```

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use latchkey_config::{Config, Mesh};
use latchkey_tpm::{Tpm, TpmError};
use latchkey_wire::timeline::{Mode, Outcome, Timeline};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::clock::Steps;
use crate::disk::{Volume, luks_labelled, plain_labelled, scan};
use crate::encrypt::normalize_recovery_key;
use crate::exchange::Partition;
use crate::handover::{self, MachineSecret};
use crate::luks::{self, Origin, VolumeKey};
use crate::network::Changes;
use crate::passphrase::{Deadline, Passphrase, Source, mode};
use crate::prompt::Prompt;
use crate::{BootError, oem};

/// Kairos' name of the volume, when the configuration names none.
pub const DEFAULT_LABEL: &str = "COS_PERSISTENT";
/// A driver that is loaded by udev's coldplug comes within a second or two.
const TPM_PATIENCE: Duration = Duration::from_secs(15);
/// A plain file system under the label is believed to be all there is after this long.
const PLAIN_PATIENCE: Duration = Duration::from_secs(3);
/// What a person who was quicker than the TPM waits for the identity.
const SECRET_PATIENCE: Duration = Duration::from_secs(5);
/// How much later than the deadline the automatic way's reason may come.
const REASON_PATIENCE: Duration = Duration::from_secs(2);
/// Beyond the deadline and all patience: a call into libcryptsetup or the kernel that never returns.
const WATCHDOG: u32 = 60;
/// How often a volume is looked for when its passphrase was there before it.
const EARLY_TICK: Duration = Duration::from_millis(250);
const REMINDER: Duration = Duration::from_secs(10);

/// What the automatic way reports to the main thread.
enum Report {
    /// What is to be opened, and until when.
    Plan(Box<Plan>),
    /// The TPM's share of the mesh identity.
    Secret(MachineSecret),
    /// The passphrase of a volume.
    Release(Volume, String, Passphrase),
    /// The automatic way is at its end.
    Failed(BootError),
}

/// Why the main thread woke up.
enum Event {
    Reports,
    Typed(Passphrase),
    Deadline,
}

struct Plan {
    labels: Vec<String>,
    deadline: Deadline,
    mode: Mode,
    mesh: Option<Mesh>,
}

impl Plan {
    fn of(config: &Config, began: Instant) -> Self {
        Self {
            labels: labels(config),
            deadline: Deadline { at: began + config.deadline, seconds: config.deadline.as_secs() },
            mode: mode(config),
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

/// Unlocks this machine's volumes.
///
/// # Errors
/// Why they stay closed.
pub fn run(directories: Vec<PathBuf>) -> Result<(), BootError> {
    let steps = Steps::default();
    steps.mark("start");
    let (mut unlocking, wake) = Unlocking::new(&steps, directories)?;
    let result = unlocking.run(wake);
    unlocking.leave_timeline(&result);
    result
}

/// The state of the main thread.
struct Unlocking {
    plan: Plan,
    planned: bool,
    began: Instant,
    reports: Receiver<Report>,
    closed: Vec<String>,
    /// UUID and key of the first volume: what the mesh identity hangs on.
    first: Option<(String, VolumeKey)>,
    secret: Option<MachineSecret>,
    failure: Option<BootError>,
    by_person: bool,
    /// What was typed before the volume appeared.
    early: Option<Passphrase>,
    steps: Steps,
}

impl Unlocking {
    fn new(steps: &Steps, directories: Vec<PathBuf>) -> Result<(Self, UnixStream), BootError> {
        let (wake, wakened) =
            UnixStream::pair().map_err(BootError::io("make a pair of sockets"))?;
        wake.set_nonblocking(true).map_err(BootError::io("set up a socket"))?;
        let (sender, reports) = channel();
        let began = Instant::now();
        let deadline = Deadline::after(latchkey_config::DEFAULT_DEADLINE);
        let reporter = Reporter { sender, wakened, directories };
        let automatic = steps.clone();
        std::thread::Builder::new()
            .name("automatic".into())
            .spawn(move || reporter.run(began, &automatic))
            .map_err(BootError::io("start a thread"))?;
        let unlocking = Self {
            plan: Plan {
                labels: vec![DEFAULT_LABEL.to_owned()],
                deadline,
                mode: Mode::Offline,
                mesh: None,
            },
            planned: false,
            began,
            reports,
            closed: vec![DEFAULT_LABEL.to_owned()],
            first: None,
            secret: None,
            failure: None,
            by_person: false,
            early: None,
            steps: steps.clone(),
        };
        Ok((unlocking, wake))
    }

    fn run(&mut self, mut wake: UnixStream) -> Result<(), BootError> {
        arm_watchdog(self.plan.deadline);
        let mut prompt = Prompt::open(
            "Recovery passphrase (unlocking goes on by itself meanwhile)",
            "latchkey:recovery",
        );
        self.steps.mark("prompt");
        // A person may be quicker than the configuration, which may name more to open.
        while !self.closed.is_empty() || (!self.planned && self.failure.is_none()) {
            if prompt.is_none() && self.failure.is_some() {
                break;
            }
            let event = self.wait(&mut wake, &mut prompt)?;
            self.take_reports();
            match (event, prompt.as_mut()) {
                (Event::Deadline, _) => break,
                (Event::Typed(typed), Some(prompt)) => self.try_typed(typed, prompt),
                _ => self.try_early(),
            }
        }
        drop(prompt);
        if !self.closed.is_empty() {
            return Err(self.give_up(&mut wake));
        }
        self.await_reports(&mut wake, SECRET_PATIENCE, |this| {
            this.plan.mesh.is_some() && this.secret.is_none() && this.failure.is_none()
        });
        self.leave_identity()
    }

    fn wait(
        &mut self,
        wake: &mut UnixStream,
        prompt: &mut Option<Prompt>,
    ) -> Result<Event, BootError> {
        let left = self.plan.deadline.at.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(Event::Deadline);
        }
        let left = if self.early.is_some() { left.min(EARLY_TICK) } else { left };
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let mut fds = vec![PollFd::new(wake.as_fd(), PollFlags::POLLIN)];
        fds.extend(prompt.as_ref().map(|prompt| PollFd::new(prompt.fd(), PollFlags::POLLIN)));
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(BootError::io("wait for events")(errno.into())),
        }
        let typed = fds.get(1).and_then(PollFd::any).unwrap_or(false);
        drop(fds);
        drain(wake);
        if !typed {
            return Ok(Event::Reports);
        }
        match prompt.as_mut().map(Prompt::answer) {
            Some(Ok(Some(passphrase))) => Ok(Event::Typed(passphrase)),
            Some(Err(error)) => {
                log::warn!("the prompt is gone: {error}");
                *prompt = None;
                Ok(Event::Reports)
            }
            Some(Ok(None)) | None => Ok(Event::Reports),
        }
    }

    fn take_reports(&mut self) {
        while let Ok(report) = self.reports.try_recv() {
            match report {
                Report::Plan(plan) => {
                    // A person may have opened one of them already.
                    let open = self.plan.labels.iter().filter(|label| !self.closed.contains(label));
                    let open: Vec<_> = open.cloned().collect();
                    self.closed =
                        plan.labels.iter().filter(|label| !open.contains(label)).cloned().collect();
                    self.plan = *plan;
                    self.planned = true;
                    arm_watchdog(self.plan.deadline);
                }
                Report::Secret(secret) => self.secret = Some(secret),
                Report::Release(volume, label, passphrase) => {
                    let opened = self.open(&volume, &label, &passphrase, Origin::Machine);
                    if let Err(error) = opened {
                        self.fail(error);
                    }
                }
                Report::Failed(error) => self.fail(error),
            }
        }
    }

    fn fail(&mut self, error: BootError) {
        log::error!("{error}");
        log::error!(
            "not unlocked by itself after {:.1} s. The recovery passphrase opens the volume; without it this ends after {} s",
            self.began.elapsed().as_secs_f32(),
            self.plan.deadline.seconds
        );
        self.failure.get_or_insert(error);
    }

    fn open(
        &mut self,
        volume: &Volume,
        label: &str,
        passphrase: &[u8],
        origin: Origin,
    ) -> Result<(), BootError> {
        let key = self
            .steps
            .time("luks-open", || luks::open(volume, label, label, passphrase, origin))?;
        log::info!("{} is open as /dev/mapper/{label}", volume.device.display());
        self.closed.retain(|closed| closed != label);
        if self.plan.labels.first().is_some_and(|first| first == label) {
            self.first = Some((volume.luks_uuid(), key));
        }
        Ok(())
    }

    /// A recovery key may have been typed in capitals or without its dashes.
    fn open_typed(&mut self, volume: &Volume, label: &str, typed: &[u8]) -> Result<(), BootError> {
        let text = std::str::from_utf8(typed).unwrap_or_default();
        if let Some(key) = normalize_recovery_key(text).filter(|key| key.as_bytes() != typed)
            && self.open(volume, label, key.as_bytes(), Origin::Person).is_ok()
        {
            return Ok(());
        }
        self.open(volume, label, typed, Origin::Person)
    }

    fn try_typed(&mut self, typed: Passphrase, prompt: &mut Prompt) {
        if !typed.is_empty() {
            self.early = None;
            for label in self.closed.clone() {
                match self.open_labelled(&label, &typed) {
                    Ok(()) => self.by_person = true,
                    Err(BootError::VolumeMissing { .. }) => {
                        log::info!(
                            "no volume labelled {label} is there yet; what was typed is kept for it"
                        );
                        self.early = Some(typed.clone());
                    }
                    Err(error) => log::error!("{error}"),
                }
            }
        }
        if !self.closed.is_empty()
            && let Err(error) = prompt.again()
        {
            log::warn!("cannot ask again: {error}");
        }
    }

    /// Tries what was typed too early on volumes that have appeared since.
    fn try_early(&mut self) {
        let Some(typed) = self.early.take() else { return };
        for label in self.closed.clone() {
            match self.open_labelled(&label, &typed) {
                Ok(()) => self.by_person = true,
                Err(BootError::VolumeMissing { .. }) => self.early = Some(typed.clone()),
                Err(error) => log::error!("{error}"),
            }
        }
    }

    fn open_labelled(&mut self, label: &str, typed: &[u8]) -> Result<(), BootError> {
        let volumes = scan();
        match luks_labelled(&volumes, label).as_slice() {
            [volume] => self.open_typed(volume, label, typed),
            [] => Err(missing(label, &volumes)),
            several => Err(ambiguous(label, several)),
        }
    }

    /// The automatic way has the same deadline, so its reason is on its way or just arrived.
    fn give_up(&mut self, wake: &mut UnixStream) -> BootError {
        self.await_reports(wake, REASON_PATIENCE, |this| this.failure.is_none());
        let deadline = self.plan.deadline;
        self.failure.take().unwrap_or_else(|| deadline.error(BootError::Unfinished))
    }

    /// A machine that the server refused its disk has no place in the mesh either, even if a
    /// person opened the disk.
    fn is_refused(&self) -> bool {
        matches!(self.failure, Some(BootError::Refused(_)))
    }

    /// Takes reports while `wanting` says that one is missing, for `patience` at most.
    fn await_reports(
        &mut self,
        wake: &mut UnixStream,
        patience: Duration,
        wanting: impl Fn(&Self) -> bool,
    ) {
        let until = Instant::now() + patience;
        self.take_reports();
        while wanting(self) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
            let _ = poll(&mut [PollFd::new(wake.as_fd(), PollFlags::POLLIN)], timeout);
            drain(wake);
            self.take_reports();
        }
    }

    fn leave_identity(&mut self) -> Result<(), BootError> {
        let Some(mesh) = self.plan.mesh.clone() else { return Ok(()) };
        if self.is_refused() {
            log::warn!("the key server refused this machine: it gets no mesh identity");
            return Ok(());
        }
        let (Some((uuid, key)), Some(secret)) = (self.first.take(), self.secret.take()) else {
            log::warn!("the TPM gave no secret: this boot has no mesh identity");
            return Ok(());
        };
        let steps = self.steps.clone();
        steps.time("identity", || handover::leave_identity(&mesh, &key, &secret, &uuid))
    }

    fn leave_timeline(&mut self, result: &Result<(), BootError>) {
        let error = result.as_ref().err().or(self.failure.as_ref());
        let outcome = match (result, self.by_person) {
            (Ok(()), false) => Outcome::Unlocked,
            (Ok(()), true) => Outcome::Recovery,
            (Err(BootError::Refused(_)), _) => Outcome::Refused,
            (Err(_), _) => Outcome::Failed,
        };
        let mut timeline = Timeline::new(handover::boot_id(), outcome, self.plan.mode);
        timeline.reason = error.map(ToString::to_string);
        self.steps.mark("end");
        timeline.steps = self.steps.taken();
        if let Err(error) = handover::leave_timeline(&timeline) {
            log::warn!("{error}");
        }
    }
}

/// The default action of SIGALRM ends the process, whatever it hangs in.
fn arm_watchdog(deadline: Deadline) {
    let left = deadline.at.saturating_duration_since(Instant::now()).as_secs();
    let seconds = u32::try_from(left).unwrap_or(u32::MAX - WATCHDOG) + WATCHDOG;
    nix::unistd::alarm::set(seconds);
}

fn drain(wake: &mut UnixStream) {
    let mut sink = [0; 64];
    while matches!(wake.read(&mut sink), Ok(1..)) {}
}

/// The automatic way's end of the channel.
struct Reporter {
    sender: Sender<Report>,
    wakened: UnixStream,
    directories: Vec<PathBuf>,
}

impl Reporter {
    fn run(mut self, began: Instant, steps: &Steps) {
        if let Err(error) = self.unlock(began, steps) {
            self.report(Report::Failed(error));
        }
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
        for label in labels(&config) {
            let volume = steps.time("volume", || await_volume(&label, deadline))?;
            let partition = Partition {
                label: label.clone(),
                name: volume.name(),
                uuid: volume.partition_uuid(),
            };
            let passphrase = source.release(&partition, deadline, steps)?;
            self.report(Report::Release(volume, label, passphrase));
        }
        Ok(())
    }

    fn report(&mut self, report: Report) {
        // The main thread ends the process when it has what it needs; then nobody listens.
        if self.sender.send(report).is_ok() {
            let _ = self.wakened.write_all(&[0]);
        }
    }
}

/// Waits for the one LUKS2 volume with this label.
fn await_volume(label: &str, deadline: Deadline) -> Result<Volume, BootError> {
    let changes = Changes::of_devices();
    let began = Instant::now();
    let mut reminder = began + Duration::from_secs(1);
    loop {
        let volumes = scan();
        match luks_labelled(&volumes, label).as_slice() {
            [volume] => return Ok(volume.clone()),
            [] => {}
            several => return Err(ambiguous(label, several)),
        }
        if began.elapsed() >= PLAIN_PATIENCE
            && let Some(plain) = plain_labelled(&volumes, label)
        {
            let label = label.to_owned();
            return Err(BootError::NotEncrypted { label, device: plain.device });
        }
        let now = Instant::now();
        if now >= deadline.at {
            return Err(deadline.error(missing(label, &volumes)));
        }
        if now >= reminder {
            log::info!("{}", missing(label, &volumes));
            reminder = now + REMINDER;
        }
        changes.wait(deadline.at.min(now + Duration::from_millis(250)));
    }
}

fn missing(label: &str, volumes: &[Volume]) -> BootError {
    let seen = volumes.iter().filter_map(Volume::luks_label).collect();
    BootError::VolumeMissing { label: label.to_owned(), seen }
}

fn ambiguous(label: &str, volumes: &[Volume]) -> BootError {
    let names: Vec<_> = volumes.iter().map(|volume| volume.device.display().to_string()).collect();
    BootError::Ambiguous {
        label: label.to_owned(),
        count: volumes.len(),
        devices: names.join(", "),
    }
}

/// Opens TPM and source by the configuration and hands them to `work`.
///
/// # Errors
/// Whatever fails first.
pub fn with_source<T>(
    config: &Config,
    steps: &Steps,
    work: impl FnOnce(&mut Source<'_>, Deadline) -> Result<T, BootError>,
) -> Result<T, BootError> {
    let deadline = Deadline::after(config.deadline);
    let mut tpm =
        Tpm::open_within(config.challenger.tpm_device.as_deref(), Duration::from_secs(2))?;
    let ek = steps.time("tpm-endorsement-key", || tpm.endorsement_key())?;
    let mut source = Source::prepare(&mut tpm, ek, &config.challenger, steps)?;
    work(&mut source, deadline)
}

/// The machine's name, as an operator enters it in a SealedVolume.
///
/// # Errors
/// What the TPM answered.
pub fn pubhash(device: Option<&str>) -> Result<String, TpmError> {
    let mut tpm = Tpm::open_within(device, Duration::from_secs(2))?;
    Ok(tpm.endorsement_key()?.pubhash().to_string())
}
