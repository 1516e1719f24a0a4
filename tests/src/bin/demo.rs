//! `make demo`: a machine is installed, boots, lets itself in and joins its mesh; then it is refused, and a person lets it in.
//! Told as it happens, on real parts: QEMU, a software TPM, the key server, nats-server, an initramfs, dm-crypt and the
//! kernel's WireGuard.

#[path = "demo/registry.rs"]
mod registry;
#[path = "demo/tell.rs"]
mod tell;

use std::process::ExitCode;

use latchkey_tests::{
    disk::Persistent,
    error::{Error, Result},
    kms::{Kms, Volume},
    place::Image,
    scenario::{CloudConfig, Installed, Machine, Mesh, Unlocked},
    vm::{Boot, RunningVm},
};
use registry::Registry;
use tell::{Teller, chart};

/// What is worth repeating of a machine's console.
const CONSOLE: &str = "latchkey: ";
const PROMPT: &str = "Recovery passphrase";
/// systemd in the initramfs, the network by systemd-networkd: the commonest of the initramfs that dracut makes.
const INITRAMFS: &str = "sysd-networkd";

fn main() -> ExitCode {
    let teller = Teller::new();
    match story(&teller) {
        Ok(()) => {
            println!(
                "\nThe end, after {:.0} s. The consoles are in target/boot-logs/demo-*.log",
                teller.elapsed().as_secs_f64()
            );
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("\ndemo: {error}");
            ExitCode::FAILURE
        }
    }
}

fn story(teller: &Teller) -> Result<()> {
    teller.chapter("The parts");
    let image = Image::get()?;
    Image::dracut(INITRAMFS)?;
    teller.say(&format!(
        "a disk image and dracut's initramfs with module 50latchkey; the machine's kernel will be {}",
        image.kernel_version
    ));
    let mut kms = Kms::new("demo")?;
    let mut registry = Registry::start(teller)?;
    let machine =
        Machine::new("demo", &registry.in_cloud_config(CloudConfig::of(&kms)), Persistent::Plain)?;
    let hash = machine.tpm.pubhash();
    teller.say(&format!("a new TPM; by this hash the key server will know the machine: {hash}"));
    let volume = Volume { name: "demo-machine", tpm_hash: hash, secret: None, quarantined: false };
    kms.put_volume(&volume)?;
    kms.start()?;
    teller.say("a key server; its store holds one manifest, SealedVolume demo-machine");
    let _server = teller.relay("server", kms.log()?, "request|INFO  listening|ERROR");

    teller.chapter("Installation");
    let recovery = install(teller, &kms, &machine)?;

    teller.chapter("The machine boots, and lets itself in");
    teller.say("power on: firmware, kernel, dracut's initramfs with systemd and systemd-networkd");
    let mut vm = power_on(&machine, "boot", &recovery)?;
    let console = teller.relay("machine", vm.console(), CONSOLE);
    vm.wait_for(PROMPT)?;
    teller.say("the console takes the recovery passphrase from now on; nobody is there to type it");
    let boot = Unlocked::follow(&mut vm, Mesh::Up, &[&recovery])?;
    drop((console, vm));
    tell_unlocked(teller, &boot);
    registry.tell(teller, &boot)?;

    teller.chapter("The same machine, quarantined");
    kms.put_volume(&Volume { quarantined: true, ..volume })?;
    teller.say(
        "the operator sets `quarantined: true` in the manifest; the machine is powered on again",
    );
    let mut vm = power_on(&machine, "quarantined", &recovery)?;
    let console = teller.relay("machine", vm.console(), CONSOLE);
    vm.wait_for("latchkey: .*quarantined")?;
    vm.wait_for(PROMPT)?;
    teller.say("refused: COS_PERSISTENT stays closed. Somebody comes, and types the recovery key");
    vm.type_to_agent(&recovery)?;
    let refused = Unlocked::follow(&mut vm, Mesh::None, &[&recovery])?;
    drop((console, vm));
    tell_unlocked(teller, &refused);

    teller.chapter("Timeline of the boot that let itself in");
    chart(&boot);
    Ok(())
}

/// Boots the installed machine as an operator's would: dracut's initramfs, and the network in it because of `rd.neednet=1`.
fn power_on(machine: &Machine, step: &str, recovery: &str) -> Result<RunningVm> {
    let boot = Boot::Kernel { initramfs: Image::dracut(INITRAMFS)? };
    let vm = machine.vm(step)?.boot(boot).append("rd.neednet=1 ip=dhcp").cpus(2).memory_mib(640);
    vm.secret(recovery).start()
}

/// The install boot; the recovery key that it printed.
fn install(teller: &Teller, kms: &Kms, machine: &Machine) -> Result<String> {
    teller.say("the installer's system starts, and calls `kcrypt-discovery-challenger encrypt --recovery-key`");
    let mut vm = machine.installing(&["--recovery-key"])?;
    let console = teller.relay("machine", vm.console(), CONSOLE);
    let installed = Installed::follow(&mut vm)?;
    drop((console, vm));
    if installed.code != 0 {
        let what = format!("encrypt exited with {}: {:?}", installed.code, installed.output);
        return Err(Error::Setup(what));
    }
    for line in &installed.output {
        teller.say(&format!("the recovery key, this once: {line}"));
    }
    for (file, _) in kms.secrets()? {
        let name = file.rsplit('/').next().unwrap_or_default();
        teller.say(&format!(
            "new in the server's store: {name}, for this machine and partition alone"
        ));
    }
    let none = || Error::Setup(format!("no recovery key in {:?}", installed.output));
    installed.recovery_key().ok_or_else(none)
}

fn tell_unlocked(teller: &Teller, boot: &Unlocked) {
    let r = &boot.report;
    teller.say(&format!(
        "root switched. {} is mounted, what was on it before is intact (sha256 {}…), and it counts boot {}",
        r.persistent.source.as_deref().unwrap_or("?"),
        r.persistent.data_sha256.as_deref().and_then(|h| h.get(..12)).unwrap_or("?"),
        r.persistent.boots.unwrap_or(0)
    ));
    if let Some(w) = &r.wireguard {
        let (name, key, port) = (&w.interface, &w.public_key, w.listen_port);
        teller.say(&format!("{name} is up: {}, port {port}, key {key}", w.addresses.join(", ")));
    } else {
        teller.say(
            "no mesh interface: a machine that the server refuses has no identity in the mesh",
        );
    }
    let l = &r.leaks;
    let secrets = l.secrets.iter().filter(|s| *s != "planted").count();
    teller.say(&format!(
        "{} files below /run, {} processes and the journal searched for {secrets} secret(s): found in none",
        l.files, l.processes
    ));
}
