//! What scenarios are told in: a machine (TPM and disk) that is installed and booted, and what a good boot must show.

use std::{cell::Cell, path::PathBuf};

use latchkey_wire::timeline::{Outcome, Timeline};

use crate::{
    disk::{Disk, Persistent, data_sha256},
    error::{Error, Result},
    place::Image,
    report::Report,
    tpm::Tpm,
    vm::{Boot, RunningVm, Vm},
};

/// The mesh of every scenario that has one.
pub const NETWORK: &str = "fleet-a";
pub const PREFIX: &str = "fd10::/16";
pub const MESH_PORT: u16 = 51820;
pub const INTERFACE: &str = "wg-latchkey";

/// A cloud-config as an operator writes it.
#[derive(Debug, Clone, Default)]
pub struct CloudConfig {
    /// Key server; without it the machine is unlocked by its TPM alone.
    pub server: Option<String>,
    /// `latchkey.deadline`, e.g. `15s`.
    pub deadline: Option<String>,
}

impl CloudConfig {
    pub fn offline() -> Self {
        Self::default()
    }

    pub fn online(server: &str) -> Self {
        Self { server: Some(server.to_owned()), ..Self::default() }
    }

    #[must_use]
    pub fn deadline(mut self, deadline: &str) -> Self {
        self.deadline = Some(deadline.to_owned());
        self
    }

    pub fn yaml(&self) -> String {
        let mut yaml = String::from("#cloud-config\n");
        yaml += "install:\n  encrypted_partitions: [COS_PERSISTENT]\n  grub_options:\n    extra_cmdline: \"rd.neednet=1\"\n";
        if let Some(server) = &self.server {
            yaml += &format!("kcrypt:\n  challenger:\n    challenger_server: \"{server}\"\n");
        }
        yaml += "latchkey:\n";
        if let Some(deadline) = &self.deadline {
            yaml += &format!("  deadline: {deadline}\n");
        }
        yaml += &format!(
            "  mesh:\n    network: {NETWORK}\n    prefix: {PREFIX}\n    port: {MESH_PORT}\n    interface: {INTERFACE}\n"
        );
        yaml
    }
}

/// A machine: its TPM, its disk, and how often it was powered on.
#[derive(Debug)]
pub struct Machine {
    pub name: String,
    pub tpm: Tpm,
    pub disk: Disk,
    boots: Cell<u32>,
}

/// What an install boot printed.
#[derive(Debug)]
pub struct Installed {
    pub code: i32,
    /// Standard output of `encrypt`, line by line.
    pub output: Vec<String>,
}

impl Installed {
    /// The recovery key that `encrypt --recovery-key` printed: eight groups of eight letters, as systemd's are.
    pub fn recovery_key(&self) -> Option<String> {
        let is_key = |w: &&str| {
            w.len() >= 32
                && w.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
                && w.contains('-')
        };
        self.output.iter().flat_map(|l| l.split_whitespace()).find(is_key).map(str::to_owned)
    }
}

impl Machine {
    pub fn new(name: &str, config: &CloudConfig, persistent: Persistent<'_>) -> Result<Self> {
        Ok(Self {
            name: name.to_owned(),
            tpm: Tpm::fresh(name)?,
            disk: Disk::new(name, &config.yaml(), persistent)?,
            boots: Cell::new(0),
        })
    }

    /// The machine, ready to be powered on; the log is `NAME-N-STEP.log`.
    pub fn vm(&self, step: &str) -> Result<Vm<'_>> {
        self.boots.set(self.boots.get() + 1);
        Ok(Vm::new(&format!("{}-{}-{step}", self.name, self.boots.get()))?
            .disk(&self.disk)
            .tpm(&self.tpm))
    }

    /// Boots the live system and runs `encrypt OPTIONS COS_PERSISTENT` in it.
    pub fn install(&self, options: &[&str]) -> Result<Installed> {
        let mut words = String::from("latchkey.test=install");
        if !options.is_empty() {
            words += &format!(" latchkey.encrypt={}", options.join(","));
        }
        let mut vm = self.vm("install")?.append(&words).start()?;
        let line = vm.wait_for(r"^INSTALL exited with \d+$")?;
        let output = vm
            .console()
            .matching("^INSTALL-OUTPUT ")?
            .into_iter()
            .map(|l| l.text.trim_start_matches("INSTALL-OUTPUT ").to_owned())
            .collect();
        vm.wait_for_power_off()?;
        let code = line.text.rsplit(' ').next().and_then(|n| n.parse().ok());
        Ok(Installed { code: code.ok_or_else(|| Error::Report(line.text.clone()))?, output })
    }

    /// Makes the disk boot by itself through GRUB, with this initramfs or the fast one.
    pub fn install_grub(&self, initramfs: Option<PathBuf>) -> Result<Boot> {
        let initramfs = initramfs.map_or_else(|| Image::get().map(|i| i.initramfs.clone()), Ok)?;
        let command_line = Vm::new(&self.name)?.command_line();
        self.disk.install_boot(&initramfs, &grub_cfg(&command_line))?;
        Ok(Boot::Disk)
    }
}

fn grub_cfg(command_line: &str) -> String {
    format!(
        "serial --unit=0\nterminal_output serial\necho GRUB starts the machine\n\
         linux /boot/vmlinuz {command_line} rd.neednet=1\ninitrd /boot/initrd\nboot\n"
    )
}

/// A boot that ended with the volume open, in the booted system.
#[derive(Debug)]
pub struct Unlocked {
    pub report: Report,
    pub timeline: Timeline,
}

impl Unlocked {
    /// Follows a boot to its end and checks all that holds of every good one: the volume's data is what it was, the mesh
    /// interface is up with an identity of its own, and no secret is left anywhere, `secrets` not on the console either.
    pub fn follow(vm: &mut RunningVm, secrets: &[&str]) -> Result<Self> {
        let report = vm.report()?;
        let wrong = |what: &str| Err(Error::Report(format!("{what}: {report:#?}")));
        let p = &report.persistent;
        if p.source.as_deref() != Some("/dev/mapper/COS_PERSISTENT") {
            return wrong("COS_PERSISTENT is not mounted");
        }
        if p.hello.as_deref() != Some("hello from COS_PERSISTENT\n")
            || p.data_sha256 != Some(data_sha256())
        {
            return wrong("the data on COS_PERSISTENT is not what it was");
        }
        if !report.service.starts_with("active/running/") {
            return wrong("latchkey.service does not run");
        }
        let Some(wg) = &report.wireguard else { return wrong("there is no WireGuard interface") };
        if !wg.up
            || wg.listen_port != MESH_PORT
            || !wg.addresses.iter().any(|a| a.starts_with("fd10:"))
        {
            return wrong("the WireGuard interface is not up as configured");
        }
        if report.status.is_null() {
            return wrong("`latchkey status --json` says nothing");
        }
        if report.run_files.iter().any(|f| f.ends_with("/identity")) {
            return wrong("the identity is still there");
        }
        let l = &report.leaks;
        if !l.planted_found || l.processes == 0 || l.journal_bytes == 0 {
            return wrong("the search for leaks cannot find anything");
        }
        if !l.secrets.iter().any(|s| s == "WireGuard private key") || l.secrets.len() < 3 {
            return wrong("the search for leaks did not have the secrets to look for");
        }
        if !l.found.is_empty() {
            return wrong("a secret is where it should not be");
        }
        if secrets.iter().any(|s| vm.console().contains(s)) {
            return wrong("a secret is on the console");
        }
        let timeline = Timeline::from_json(report.timeline.to_string().as_bytes())
            .map_err(|e| Error::Report(format!("timeline: {e}: {}", report.timeline)))?;
        Ok(Self { report, timeline })
    }

    pub fn outcome(&self) -> Outcome {
        self.timeline.outcome
    }

    /// The machine's name in the mesh.
    pub fn public_key(&self) -> &str {
        self.report.wireguard.as_ref().map_or("", |w| &w.public_key)
    }
}
