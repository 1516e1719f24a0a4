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

use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use latchkey_config::{Config, MapperNames};
use latchkey_tpm::{Tpm, TpmError};
use latchkey_wire::timeline::{Mode, Outcome, Timeline, VolumeOutcome};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::BootError;
use crate::automatic::{Plan, Report, Reporter, labelled};
use crate::binding::ambiguous;
use crate::clock::Steps;
use crate::disk::{Volume, scan};
use crate::encrypt::normalize_recovery_key;
use crate::handover::{self, MachineSecret};
use crate::luks::{self, Origin, VolumeKey};
use crate::passphrase::{Deadline, Passphrase, Source};
use crate::prompt::Prompt;

pub use crate::automatic::{DEFAULT_LABEL, labels};

/// What a person who was quicker than the TPM waits for the identity.
const SECRET_PATIENCE: Duration = Duration::from_secs(5);
/// How much later than the deadline the automatic way's reason may come.
const REASON_PATIENCE: Duration = Duration::from_secs(2);
/// Beyond the deadline and all patience: a call into libcryptsetup or the kernel that never returns.
const WATCHDOG: u32 = 60;
/// How often a volume is looked for when its passphrase was there before it.
const EARLY_TICK: Duration = Duration::from_millis(250);

/// Why the main thread woke up.
enum Event {
    Reports,
    Typed(Passphrase),
    Deadline,
}

/// A failure, of which the timeline keeps the reason when the error itself has become the program's end.
struct Failure {
    reason: String,
    is_refusal: bool,
    error: Option<BootError>,
}

impl From<BootError> for Failure {
    fn from(error: BootError) -> Self {
        let is_refusal = matches!(error, BootError::Refused(_));
        Self { reason: error.to_string(), is_refusal, error: Some(error) }
    }
}

/// One volume that is to be opened.
struct Target {
    label: String,
    /// The one that the automatic way found to be this machine's.
    chosen: Option<Volume>,
    opened: Option<Opened>,
    /// Why it is not opened automatically.
    failure: Option<Failure>,
}

struct Opened {
    volume: Volume,
    mapper: String,
    key: VolumeKey,
    by_person: bool,
}

impl Target {
    fn new(label: &str) -> Self {
        Self { label: label.to_owned(), chosen: None, opened: None, failure: None }
    }

    /// `general`: why none was opened automatically.
    fn record(&self, general: Option<&Failure>) -> VolumeOutcome {
        let opened = self.opened.as_ref();
        let failure = self.failure.as_ref().or(general);
        let volume = opened.map(|opened| &opened.volume).or(self.chosen.as_ref());
        let outcome = match (opened, failure) {
            (Some(opened), _) if opened.by_person => Outcome::Recovery,
            (Some(_), _) => Outcome::Unlocked,
            (None, Some(failure)) if failure.is_refusal => Outcome::Refused,
            (None, _) => Outcome::Failed,
        };
        VolumeOutcome {
            label: self.label.clone(),
            device: volume.map(|volume| volume.device.display().to_string()),
            uuid: opened.map(|opened| opened.volume.luks_uuid()),
            mapper: opened.map(|opened| opened.mapper.clone()),
            reason: failure
                .filter(|_| outcome != Outcome::Unlocked)
                .map(|failure| failure.reason.clone()),
            outcome,
        }
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
    targets: Vec<Target>,
    secret: Option<MachineSecret>,
    /// Why none is opened automatically any more.
    failure: Option<Failure>,
    /// No more reports will come.
    done: bool,
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
                mapper: MapperNames::default(),
                mesh: None,
            },
            planned: false,
            began,
            reports,
            targets: vec![Target::new(DEFAULT_LABEL)],
            secret: None,
            failure: None,
            done: false,
            early: None,
            steps: steps.clone(),
        };
        Ok((unlocking, wake))
    }

    fn run(&mut self, mut wake: UnixStream) -> Result<(), BootError> {
        arm_watchdog(self.plan.deadline);
        let mut question = self.question();
        let mut prompt = Prompt::open(&question, "latchkey:recovery");
        self.steps.mark("prompt");
        // A person may be quicker than the configuration, which may name more to open.
        while self.is_closed() || (!self.planned && self.failure.is_none()) {
            if prompt.is_none() && self.done {
                break;
            }
            let event = self.wait(&mut wake, &mut prompt)?;
            self.take_reports();
            match (event, prompt.as_mut()) {
                (Event::Deadline, _) => break,
                (Event::Typed(typed), Some(prompt)) => self.try_typed(typed, prompt),
                _ => self.try_early(),
            }
            self.ask_for_the_rest(&mut question, prompt.as_mut());
        }
        drop(prompt);
        if self.is_closed() {
            return Err(self.give_up(&mut wake));
        }
        self.await_reports(&mut wake, SECRET_PATIENCE, |this| {
            this.plan.mesh.is_some() && this.secret.is_none() && !this.done
        });
        self.leave_identity()
    }

    fn is_closed(&self) -> bool {
        self.targets.iter().any(|target| target.opened.is_none())
    }

    fn closed(&self) -> Vec<String> {
        let closed = self.targets.iter().filter(|target| target.opened.is_none());
        closed.map(|target| target.label.clone()).collect()
    }

    fn target(&mut self, label: &str) -> Option<&mut Target> {
        self.targets.iter_mut().find(|target| target.label == label)
    }

    /// Names what is asked for, where it is not the one volume that every Kairos has.
    fn question(&self) -> String {
        let closed = self.closed().join(", ");
        let of = if closed.is_empty() || self.targets.len() == 1 && closed == DEFAULT_LABEL {
            String::new()
        } else {
            format!(" for {}", closed.replace(char::is_control, "?"))
        };
        format!("Recovery passphrase{of} (unlocking goes on by itself meanwhile)")
    }

    fn ask_for_the_rest(&self, question: &mut String, prompt: Option<&mut Prompt>) {
        let now = self.question();
        if now != *question && self.is_closed() {
            *question = now;
            if let Some(Err(error)) = prompt.map(|prompt| prompt.change(question)) {
                log::warn!("cannot ask for the rest: {error}");
            }
        }
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
                Report::Plan(plan) => self.take_plan(*plan),
                Report::Secret(secret) => self.secret = Some(secret),
                Report::Chosen(label, volume) => {
                    if let Some(target) = self.target(&label) {
                        target.chosen = Some(volume);
                    }
                }
                Report::Release(label, passphrase) => self.open_released(&label, &passphrase),
                Report::VolumeFailed(label, error) => self.fail_volume(&label, error),
                Report::Failed(error) => {
                    self.say_failed(&error, "the volumes");
                    self.failure.get_or_insert(error.into());
                    self.done = true;
                }
                Report::Done => self.done = true,
            }
        }
    }

    /// A person may have opened one of them already.
    fn take_plan(&mut self, plan: Plan) {
        let mut before = std::mem::take(&mut self.targets);
        for label in &plan.labels {
            let known = before.iter().position(|target| target.label == *label);
            let target = known.map_or_else(|| Target::new(label), |at| before.swap_remove(at));
            self.targets.push(target);
        }
        self.targets.extend(before.into_iter().filter(|target| target.opened.is_some()));
        self.plan = plan;
        self.planned = true;
        arm_watchdog(self.plan.deadline);
    }

    fn fail_volume(&mut self, label: &str, error: BootError) {
        self.say_failed(&error, label);
        if let Some(target) = self.target(label) {
            target.failure.get_or_insert(error.into());
        }
    }

    fn say_failed(&self, error: &BootError, what: &str) {
        log::error!("{error}");
        log::error!(
            "{what}: not unlocked automatically after {:.1} s. The recovery passphrase opens it; without it this ends after {} s",
            self.began.elapsed().as_secs_f32(),
            self.plan.deadline.seconds
        );
    }

    fn open_released(&mut self, label: &str, passphrase: &[u8]) {
        let target = self.targets.iter().find(|target| target.label == label);
        let Some(volume) = target.filter(|target| target.opened.is_none()) else { return };
        let Some(volume) = volume.chosen.clone() else { return };
        if let Err(error) = self.open(&volume, label, passphrase, Origin::Machine) {
            self.fail_volume(label, error);
        }
    }

    fn open(
        &mut self,
        volume: &Volume,
        label: &str,
        passphrase: &[u8],
        origin: Origin,
    ) -> Result<(), BootError> {
        let mapper = match self.plan.mapper {
            MapperNames::Label => label.to_owned(),
            MapperNames::Partition => volume.name(),
        };
        let opened =
            self.steps.time("luks-open", || luks::open(volume, label, &mapper, passphrase, origin));
        let key = opened?;
        log::info!("{} is open as /dev/mapper/{mapper}", volume.device.display());
        let (volume, by_person) = (volume.clone(), origin == Origin::Person);
        if let Some(target) = self.target(label) {
            target.opened = Some(Opened { volume, mapper, key, by_person });
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
            self.try_on_closed(&typed);
            if self.early.is_some() {
                log::info!("what was typed is kept for the volume that is not there yet");
            }
        }
        if self.is_closed()
            && let Err(error) = prompt.again()
        {
            log::warn!("cannot ask again: {error}");
        }
    }

    /// Tries what was typed too early on volumes that have appeared since.
    fn try_early(&mut self) {
        if let Some(typed) = self.early.take() {
            self.try_on_closed(&typed);
        }
    }

    /// Each volume can have a passphrase of its own: that one of them does not take it is only worth a word if none does.
    fn try_on_closed(&mut self, typed: &Passphrase) {
        let mut errors = Vec::new();
        let closed = self.closed();
        for label in &closed {
            match self.open_labelled(label, typed) {
                Ok(()) => {}
                Err(BootError::VolumeMissing { .. }) => self.early = Some(typed.clone()),
                Err(error) => errors.push(error),
            }
        }
        if self.closed().len() == closed.len() {
            errors.iter().for_each(|error| log::error!("{error}"));
        }
    }

    fn open_labelled(&mut self, label: &str, typed: &[u8]) -> Result<(), BootError> {
        let candidates = labelled(&scan(), label)?;
        let chosen = self.target(label).and_then(|target| target.chosen.clone());
        match (chosen.filter(|chosen| candidates.contains(chosen)), candidates.as_slice()) {
            (Some(volume), _) => self.open_typed(&volume, label, typed),
            (None, [volume]) => self.open_typed(volume, label, typed),
            (None, several) => Err(ambiguous(label, several.iter())),
        }
    }

    /// The automatic way has the same deadline, so its reason is on its way or just arrived.
    fn give_up(&mut self, wake: &mut UnixStream) -> BootError {
        self.await_reports(wake, REASON_PATIENCE, |this| !this.done);
        let closed = self.targets.iter_mut().filter(|target| target.opened.is_none());
        let own = closed.filter_map(|target| target.failure.as_mut()).next();
        let error = own.or(self.failure.as_mut()).and_then(|failure| failure.error.take());
        error.unwrap_or_else(|| self.plan.deadline.error(BootError::Unfinished))
    }

    fn failures(&self) -> impl Iterator<Item = &Failure> {
        let own = self.targets.iter().filter_map(|target| target.failure.as_ref());
        self.failure.iter().chain(own)
    }

    /// A machine that the server refused its disk has no place in the mesh either, even if a
    /// person opened the disk.
    fn is_refused(&self) -> bool {
        self.failures().any(|failure| failure.is_refusal)
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
        // The identity hangs on the first volume.
        let first = self.targets.first().and_then(|target| target.opened.as_ref());
        let (Some(first), Some(secret)) = (first, self.secret.take()) else {
            log::warn!("the TPM gave no secret: this boot has no mesh identity");
            return Ok(());
        };
        let uuid = first.volume.luks_uuid();
        let leave = || handover::leave_identity(&mesh, &first.key, &secret, &uuid);
        self.steps.time("identity", leave)
    }

    fn leave_timeline(&mut self, result: &Result<(), BootError>) {
        let mut opened = self.targets.iter().filter_map(|target| target.opened.as_ref());
        let outcome = match result {
            Ok(()) if opened.any(|opened| opened.by_person) => Outcome::Recovery,
            Ok(()) => Outcome::Unlocked,
            Err(BootError::Refused(_)) => Outcome::Refused,
            Err(_) => Outcome::Failed,
        };
        let mut timeline = Timeline::new(handover::boot_id(), outcome, self.plan.mode);
        let error = result.as_ref().err().map(ToString::to_string);
        timeline.reason = error.or(self.failures().next().map(|failure| failure.reason.clone()));
        let general = self.failure.as_ref();
        timeline.volumes = self.targets.iter().map(|target| target.record(general)).collect();
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
