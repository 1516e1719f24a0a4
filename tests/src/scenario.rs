//! What scenarios are told in: a machine (TPM and disk) that is installed and booted, and what a good boot must show.

use std::{cell::Cell, path::PathBuf};

use latchkey_wire::timeline::{Outcome, Timeline};

use crate::{
    disk::{Disk, Persistent, data_sha256},
    error::{Error, Result},
    kms::{Kms, Volume, secret_yaml},
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

/// The install boot's root: what Kairos' live medium has on its kernel command line.
const LIVE: &str = "root=live:CDLABEL=COS_LIVE";

/// A cloud-config as an operator writes it.
#[derive(Debug, Clone, Default)]
pub struct CloudConfig {
    /// Key servers; without any the machine is unlocked by its TPM alone.
    pub servers: Vec<String>,
    pub mdns: bool,
    /// PEM, inline.
    pub certificate: Option<String>,
    /// `latchkey.protocol`: auto, v1, v2.
    pub protocol: Option<String>,
    /// `latchkey.deadline`, e.g. `15s`.
    pub deadline: Option<String>,
    /// Labels in `install.encrypted_partitions` beside COS_PERSISTENT.
    pub also: Vec<String>,
    /// More keys of `latchkey.mesh`, with their values as YAML.
    pub mesh: Vec<(String, String)>,
}

impl CloudConfig {
    pub fn offline() -> Self {
        Self::default()
    }

    pub fn online(server: &str) -> Self {
        Self::any_of(&[server])
    }

    /// A machine that asks several key servers.
    pub fn any_of(servers: &[&str]) -> Self {
        Self { servers: servers.iter().map(|&s| s.to_owned()).collect(), ..Self::default() }
    }

    /// A machine that asks the key server at `kms`.
    pub fn of(kms: &Kms) -> Self {
        Self::online(&kms.url())
    }

    #[must_use]
    pub fn mdns(mut self) -> Self {
        self.mdns = true;
        self
    }

    #[must_use]
    pub fn certificate(mut self, pem: &str) -> Self {
        self.certificate = Some(pem.to_owned());
        self
    }

    #[must_use]
    pub fn protocol(mut self, protocol: &str) -> Self {
        self.protocol = Some(protocol.to_owned());
        self
    }

    #[must_use]
    pub fn deadline(mut self, deadline: &str) -> Self {
        self.deadline = Some(deadline.to_owned());
        self
    }

    /// One more volume to be opened.
    #[must_use]
    pub fn also(mut self, label: &str) -> Self {
        self.also.push(label.to_owned());
        self
    }

    /// One more key of `latchkey.mesh`.
    #[must_use]
    pub fn mesh(mut self, key: &str, value: &str) -> Self {
        self.mesh.push((key.to_owned(), value.to_owned()));
        self
    }

    pub fn yaml(&self) -> String {
        let mut yaml = String::from("#cloud-config\n");
        let labels = [&["COS_PERSISTENT".to_owned()], self.also.as_slice()].concat().join(", ");
        yaml += &format!("install:\n  encrypted_partitions: [{labels}]\n");
        yaml += "  grub_options:\n    extra_cmdline: \"rd.neednet=1\"\n";
        yaml += &self.challenger();
        yaml += "latchkey:\n";
        for (key, value) in [("deadline", &self.deadline), ("protocol", &self.protocol)] {
            if let Some(value) = value {
                yaml += &format!("  {key}: {value}\n");
            }
        }
        yaml += &format!(
            "  mesh:\n    network: {NETWORK}\n    prefix: {PREFIX}\n    port: {MESH_PORT}\n    interface: {INTERFACE}\n"
        );
        for (key, value) in &self.mesh {
            yaml += &format!("    {key}: {value}\n");
        }
        yaml
    }

    fn challenger(&self) -> String {
        let mut yaml = match self.servers.as_slice() {
            [] => return String::new(),
            // As every cloud-config in the field has it.
            [one] => format!("kcrypt:\n  challenger:\n    challenger_server: \"{one}\"\n"),
            several => several.iter().fold(
                String::from("kcrypt:\n  challenger:\n    challenger_server:\n"),
                |yaml, server| yaml + &format!("      - \"{server}\"\n"),
            ),
        };
        if self.mdns {
            yaml += "    mdns: true\n";
        }
        if let Some(pem) = &self.certificate {
            yaml += "    certificate: |\n";
            yaml += &pem.lines().fold(String::new(), |all, line| all + &format!("      {line}\n"));
        }
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
    /// Follows an install boot until the machine is off.
    pub fn follow(vm: &mut RunningVm) -> Result<Self> {
        let line = vm.wait_for_finished(r"^INSTALL exited with \d+$")?;
        let output = vm.console().matching("^INSTALL-OUTPUT ")?;
        let output = output.iter().map(|l| l.text.trim_start_matches("INSTALL-OUTPUT ").to_owned());
        let output = output.collect();
        vm.wait_for_power_off()?;
        let code = line.text.rsplit(' ').next().and_then(|n| n.parse().ok());
        Ok(Self { code: code.ok_or_else(|| Error::Report(line.text.clone()))?, output })
    }

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

    /// Boots the live system, which runs `encrypt OPTIONS COS_PERSISTENT`; follow it with [`Installed::follow`].
    pub fn installing(&self, options: &[&str]) -> Result<RunningVm> {
        self.live(options)?.start()
    }

    /// The live system of [`Machine::installing`], for further settings.
    pub fn live(&self, options: &[&str]) -> Result<Vm<'_>> {
        let mut words = format!("{LIVE} latchkey.test=install");
        if !options.is_empty() {
            words += &format!(" latchkey.encrypt={}", options.join(","));
        }
        Ok(self.vm("install")?.append(&words))
    }

    /// An install boot from beginning to end.
    pub fn install(&self, options: &[&str]) -> Result<Installed> {
        Installed::follow(&mut self.installing(options)?)
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
        "echo GRUB starts the machine\n\
         linux /boot/vmlinuz {command_line} rd.neednet=1\ninitrd /boot/initrd\nboot\n"
    )
}

/// A key server, not started yet, with an operator's passphrase for a machine; and that machine, its volume encrypted with
/// the same passphrase.
pub fn with_static_secret(
    name: &str,
    config: impl FnOnce(&Kms) -> CloudConfig,
    passphrase: &str,
) -> Result<(Kms, Machine)> {
    let kms = Kms::new(name)?;
    let machine = static_secret_with(&kms, name, &config(&kms), passphrase)?;
    Ok((kms, machine))
}

/// The same with a key server that is there already.
pub fn static_secret_with(
    kms: &Kms,
    name: &str,
    config: &CloudConfig,
    passphrase: &str,
) -> Result<Machine> {
    let machine = Machine::new(name, config, Persistent::Luks(passphrase))?;
    kms.put_volume(&static_volume(&machine))?;
    kms.put("secret.yaml", &secret_yaml("disk-secret", "pass", passphrase))?;
    Ok(machine)
}

/// The volume that [`with_static_secret`] puts: not quarantined.
pub fn static_volume(machine: &Machine) -> Volume<'_> {
    Volume {
        name: "machine-s",
        tpm_hash: machine.tpm.pubhash(),
        secret: Some(("disk-secret", "pass")),
        quarantined: false,
    }
}

/// Whether a boot leaves a member of the mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mesh {
    Up,
    /// A machine that the server refused has no identity, even if a person opened its disk.
    None,
}

/// A boot that ended with the volume open, in the booted system.
#[derive(Debug)]
pub struct Unlocked {
    pub report: Report,
    pub timeline: Timeline,
}

impl Unlocked {
    /// Follows a boot to its end and checks all that holds of every good one: the volume's data is what it was, the mesh
    /// interface is up with an identity of its own (or there is none of it), and no secret is left anywhere, `secrets` not
    /// on the console either.
    pub fn follow(vm: &mut RunningVm, mesh: Mesh, secrets: &[&str]) -> Result<Self> {
        let report = vm.report()?;
        let said = check_volume(&report)
            .and_then(|()| check_mesh(&report, mesh))
            .and_then(|()| check_leaks(&report, mesh));
        if let Err(what) = said {
            return Err(Error::Report(format!("{what}: {report:#?}")));
        }
        let console = vm.console().joined();
        let prints = &report.leaks.fingerprints;
        if secrets.iter().any(|s| console.contains(s)) || prints.iter().any(|p| p.is_in(&console)) {
            return Err(Error::Report("a secret is on the console".into()));
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

fn demand(is_so: bool, otherwise: &'static str) -> std::result::Result<(), &'static str> {
    if is_so { Ok(()) } else { Err(otherwise) }
}

fn check_volume(report: &Report) -> std::result::Result<(), &'static str> {
    let p = &report.persistent;
    demand(
        p.source.as_deref() == Some("/dev/mapper/COS_PERSISTENT"),
        "COS_PERSISTENT is not mounted",
    )?;
    demand(
        p.hello.as_deref() == Some("hello from COS_PERSISTENT\n"),
        "the file on COS_PERSISTENT is not what it was",
    )?;
    demand(p.data_sha256 == Some(data_sha256()), "the data on COS_PERSISTENT is not what it was")
}

fn check_mesh(report: &Report, mesh: Mesh) -> std::result::Result<(), &'static str> {
    demand(
        !report.run_files.iter().any(|f| f.ends_with("/identity")),
        "the identity is still there",
    )?;
    if mesh == Mesh::None {
        demand(report.wireguard.is_none(), "there is a WireGuard interface")?;
        return demand(
            report.service.starts_with("inactive/"),
            "latchkey.service is not where it waits for an identity",
        );
    }
    demand(report.service.starts_with("active/running/"), "latchkey.service does not run")?;
    let wg = report.wireguard.as_ref().ok_or("there is no WireGuard interface")?;
    demand(wg.up, "the WireGuard interface is not up")?;
    demand(wg.listen_port == MESH_PORT, "the WireGuard port is another")?;
    demand(wg.addresses.iter().any(|a| a.starts_with("fd10:")), "the mesh address is not there")?;
    let up = report.mesh.get("device_up_ms").and_then(serde_json::Value::as_u64);
    demand(up > Some(0), "nobody knows since when the mesh is up")?;
    let device = |name: &str| report.status.pointer(&format!("/device/{name}"));
    demand(
        device("public_key").and_then(|k| k.as_str()) == Some(wg.public_key.as_str()),
        "`latchkey status` says another key",
    )?;
    demand(
        device("up").and_then(serde_json::Value::as_bool) == Some(true),
        "`latchkey status` does not say that it is up",
    )
}

fn check_leaks(report: &Report, mesh: Mesh) -> std::result::Result<(), &'static str> {
    let l = &report.leaks;
    demand(
        l.planted_found && l.processes > 0 && l.journal_bytes > 0,
        "the search for leaks cannot find anything",
    )?;
    let has = |kind: &str| l.secrets.iter().any(|s| s == kind);
    demand(
        mesh == Mesh::None || has("WireGuard private key"),
        "the search for leaks did not know the WireGuard key",
    )?;
    demand(
        has("passphrase") || has("given secret"),
        "the search for leaks did not know the passphrase",
    )?;
    demand(l.found.is_empty(), "a secret is where it should not be")
}
