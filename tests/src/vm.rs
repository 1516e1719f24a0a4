//! Virtual machines: QEMU without KVM, a serial console that can be read and typed at, user-mode network in which the
//! host's loopback is 10.0.2.2 (`fec0::2`), or a [`Lan`].

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use crate::{
    child::Running,
    disk::{Disk, SecondDisk},
    error::{Doing, Error, Result},
    lan::Lan,
    lane::Lane,
    place::{self, Image},
    report::Report,
    tpm::{PoweredTpm, Tpm},
    transcript::{Line, Transcript},
};

/// How long the harness waits for anything at all. Long, since no test is about speed and the host may be busy.
pub const PATIENCE: Duration = Duration::from_secs(240);

/// Options that make a kernel start fast under emulation: no self-tests of ciphers, no address randomisation. The clock is
/// the ACPI timer, whose frequency is fixed: on a busy host the kernel measures the TSC's wrong, and a guest was seen to
/// live through a deadline of 120 s in 25.
const FAST: &str = "quiet cryptomgr.notests nokaslr audit=0 lsm=none no_timer_check clocksource=acpi_pm \
                    net.ifnames=0 systemd.show_status=false";
/// A processor with the AES instructions and little else: it starts 1.3 s sooner than `max`.
const CPU: &str = "qemu64,+aes,+pclmulqdq,+sse4.1,+sse4.2,+ssse3,+popcnt,+rdrand";

/// What the machine boots from.
#[derive(Debug, Clone)]
pub enum Boot {
    /// The image's kernel with an initramfs: [`Image::initramfs`], or one that dracut made.
    Kernel { initramfs: PathBuf },
    /// The disk, through the firmware and GRUB; see [`Disk::install_boot`].
    Disk,
}

/// What the machine's network card is plugged into.
#[derive(Debug, Clone, Copy)]
enum Network<'a> {
    None,
    /// QEMU's user-mode network, with these options.
    User(&'static str),
    Lan(&'a Lan),
}

/// A machine about to be started.
#[derive(Debug)]
pub struct Vm<'a> {
    name: String,
    boot: Boot,
    disk: Option<&'a Disk>,
    second_disk: Option<&'a SecondDisk>,
    tpm: Option<&'a Tpm>,
    tpm_device: &'static str,
    network: Network<'a>,
    clock: Option<&'static str>,
    append: String,
    secrets: Vec<String>,
    cpus: u32,
    memory_mib: u32,
}

impl<'a> Vm<'a> {
    /// A machine with the fast initramfs, one core, 512 MiB and a network. `name` names its log.
    pub fn new(name: &str) -> Result<Self> {
        Ok(Self {
            name: name.to_owned(),
            boot: Boot::Kernel { initramfs: Image::get()?.initramfs.clone() },
            disk: None,
            second_disk: None,
            tpm: None,
            tpm_device: "tpm-tis",
            network: Network::User(""),
            clock: None,
            append: String::new(),
            secrets: Vec::new(),
            cpus: 1,
            memory_mib: 512,
        })
    }

    #[must_use]
    pub fn boot(mut self, boot: Boot) -> Self {
        self.boot = boot;
        self
    }

    #[must_use]
    pub fn disk(mut self, disk: &'a Disk) -> Self {
        self.disk = Some(disk);
        self
    }

    #[must_use]
    pub fn tpm(mut self, tpm: &'a Tpm) -> Self {
        self.tpm = Some(tpm);
        self
    }

    #[must_use]
    pub fn without_tpm(mut self) -> Self {
        self.tpm = None;
        self
    }

    /// The TPM behind a command-response buffer, as in newer machines, and not behind TIS registers.
    #[must_use]
    pub fn crb(mut self) -> Self {
        self.tpm_device = "tpm-crb";
        self
    }

    /// One more disk, after the first.
    #[must_use]
    pub fn second_disk(mut self, disk: &'a SecondDisk) -> Self {
        self.second_disk = Some(disk);
        self
    }

    #[must_use]
    pub fn without_network(mut self) -> Self {
        self.network = Network::None;
        self
    }

    /// Nothing but IPv6: the host's loopback is `fec0::2`, the address comes by router advertisement.
    #[must_use]
    pub fn ipv6_only(mut self) -> Self {
        self.network = Network::User(",ipv4=off");
        self
    }

    #[must_use]
    pub fn lan(mut self, lan: &'a Lan) -> Self {
        self.network = Network::Lan(lan);
        self
    }

    /// The time in the machine's clock when it is powered on, e.g. `1970-01-01T00:00:00`: a battery is empty.
    #[must_use]
    pub fn clock(mut self, time: &'static str) -> Self {
        self.clock = Some(time);
        self
    }

    /// More words for the kernel command line (not when booting from disk: there they are GRUB's).
    #[must_use]
    pub fn append(mut self, words: &str) -> Self {
        self.append.push(' ');
        self.append.push_str(words);
        self
    }

    /// A secret that the guest's report is to search for; it reaches the guest in the firmware's tables.
    #[must_use]
    pub fn secret(mut self, secret: &str) -> Self {
        self.secrets.push(secret.to_owned());
        self
    }

    #[must_use]
    pub fn cpus(mut self, cpus: u32) -> Self {
        self.cpus = cpus;
        self
    }

    #[must_use]
    pub fn memory_mib(mut self, memory_mib: u32) -> Self {
        self.memory_mib = memory_mib;
        self
    }

    /// The kernel command line for a boot with [`Boot::Kernel`]; a `grub.cfg` may start from it.
    pub fn command_line(&self) -> String {
        format!("console=ttyS0 {FAST} root=LABEL=COS_STATE rw{}", self.append)
    }

    /// Waits for a lane, then powers on.
    pub fn start(self) -> Result<RunningVm> {
        let lane = Lane::take()?;
        let tpm = self.tpm.map(Tpm::power_on).transpose()?;
        let log_path = place::log_file(&self.name)?;
        let log = File::create(&log_path).doing(|| format!("create {}", log_path.display()))?;
        let errors_path = log_path.with_extension("qemu");
        let errors =
            File::create(&errors_path).doing(|| format!("create {}", errors_path.display()))?;
        let command = self.command(tpm.as_ref().map(PoweredTpm::socket))?;
        let started = Instant::now();
        let (qemu, pipes) = Running::start(&command, |c| {
            c.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::from(errors));
        })?;
        let console =
            pipes.stdout.ok_or_else(|| Error::Setup("QEMU has no standard output".into()))?;
        let console = Transcript::follow(&format!("machine {}", self.name), console, log, started);
        Ok(RunningVm { qemu, console, _tpm: tpm, lane: Some(lane) })
    }

    fn command(&self, tpm: Option<&Path>) -> Result<Command> {
        let image = Image::get()?;
        let qemu = "qemu-system-x86_64";
        let mut c = match self.network {
            Network::Lan(lan) => lan.command(qemu),
            Network::None | Network::User(_) => Command::new(qemu),
        };
        c.args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
            "-monitor",
            "none",
        ]);
        c.args(["-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", CPU, "-serial", "stdio"]);
        c.arg("-smp").arg(self.cpus.to_string()).arg("-m").arg(self.memory_mib.to_string());
        if let Boot::Kernel { initramfs } = &self.boot {
            c.arg("-kernel")
                .arg(&image.kernel)
                .arg("-initrd")
                .arg(initramfs)
                .arg("-append")
                .arg(self.command_line());
        }
        if let Some(socket) = tpm {
            c.arg("-chardev").arg(format!("socket,id=tpm,path={}", socket.display()));
            c.args(["-tpmdev", "emulator,id=tpm0,chardev=tpm", "-device"])
                .arg(format!("{},tpmdev=tpm0", self.tpm_device));
        }
        if let Some(disk) = self.disk {
            let file = disk.path().display();
            c.arg("-drive").arg(format!("if=none,id=disk,format=raw,file={file},cache=unsafe"));
            c.args(["-device", "virtio-blk-pci,drive=disk,bootindex=1"]);
        }
        if let Some(disk) = self.second_disk {
            let file = disk.path().display();
            c.arg("-drive").arg(format!("if=none,id=disk2,format=raw,file={file},cache=unsafe"));
            c.args(["-device", "virtio-blk-pci,drive=disk2"]);
        }
        // No option ROM: nothing boots from the network, and it takes time.
        let card = "virtio-net-pci,netdev=net,romfile=";
        match self.network {
            Network::None => {}
            Network::User(options) => {
                c.arg("-netdev").arg(format!("user,id=net{options}")).args(["-device", card]);
            }
            Network::Lan(lan) => {
                let (tap, mac) = lan.plug_in()?;
                c.arg("-netdev")
                    .arg(format!("tap,id=net,ifname={tap},script=no,downscript=no"))
                    .arg("-device")
                    .arg(format!("{card},mac={mac}"));
            }
        }
        if let Some(time) = self.clock {
            c.arg("-rtc").arg(format!("base={time}"));
        }
        for secret in &self.secrets {
            let hex: String = secret.bytes().map(|b| format!("{b:02x}")).collect();
            c.arg("-smbios").arg(format!("type=11,value={}{hex}", crate::report::SECRET_TAG));
        }
        Ok(c)
    }
}

/// A machine that runs. Dropping it pulls the plug.
#[derive(Debug)]
pub struct RunningVm {
    qemu: Running,
    console: Transcript,
    _tpm: Option<PoweredTpm>,
    /// Until the machine is off: a test that holds on to it may start the next one.
    lane: Option<Lane>,
}

impl RunningVm {
    /// Everything on the serial console.
    pub fn console(&self) -> &Transcript {
        &self.console
    }

    /// Waits for a line on the console, an unfinished one too, such as a prompt.
    pub fn wait_for(&self, pattern: &str) -> Result<Line> {
        self.console.wait_for(pattern, PATIENCE)
    }

    /// Waits for a finished line on the console: for lines that are read, not only waited for.
    pub fn wait_for_finished(&self, pattern: &str) -> Result<Line> {
        self.console.wait_for_finished(pattern, PATIENCE)
    }

    /// Types a line at the console, Enter included.
    pub fn type_line(&mut self, line: &str) -> Result<()> {
        self.qemu.write(format!("{line}\n").as_bytes())
    }

    /// Types a line at systemd's password agent, Enter included, when that has turned the terminal's echo off. It prints its
    /// prompt before, and may drop what comes too early; so a letter is typed until the agent shows an asterisk for it,
    /// and taken back (Ctrl-U).
    pub fn type_to_agent(&mut self, line: &str) -> Result<()> {
        let before = self.console.count("*");
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.qemu.write(b"x")?;
            if self.console.wait_for_more("*", before, Duration::from_secs(3))? {
                break;
            }
            if Instant::now() > deadline {
                return Err(Error::Timeout {
                    who: "systemd's password agent".into(),
                    pattern: "[*]".into(),
                    seconds: PATIENCE.as_secs(),
                    tail: self.console.tail(),
                });
            }
        }
        self.qemu.write(format!("\u{15}{line}\n").as_bytes())
    }

    /// Waits until the machine has powered itself off.
    pub fn wait_for_power_off(&mut self) -> Result<()> {
        self.console.wait_for_end(PATIENCE)?;
        if self.qemu.ended_within(PATIENCE)? {
            self.lane = None;
            return Ok(());
        }
        Err(Error::StillRunning {
            who: "QEMU".into(),
            seconds: PATIENCE.as_secs(),
            tail: self.console.tail(),
        })
    }

    /// Waits for the report of the booted system, and for the machine to be off.
    pub fn report(&mut self) -> Result<Report> {
        let line = self.wait_for_finished(r"^REPORT \{.*\}$")?;
        let report = Report::parse(&line.text)?;
        self.wait_for_power_off()?;
        Ok(report)
    }

    /// Waits for the exit code of the unlock program in the fast initramfs.
    pub fn unlock_code(&self) -> Result<i32> {
        let line = self.wait_for_finished(r"initramfs: unlock exited with \d+")?;
        line.text
            .split_once("exited with ")
            .and_then(|(_, rest)| rest.split(' ').next()?.parse().ok())
            .ok_or_else(|| Error::Report(line.text.clone()))
    }
}
