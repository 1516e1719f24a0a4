//! `make demo`: a machine is installed, boots and lets itself in; then it is refused, and a person lets it in. Told as it
//! happens, on real parts: QEMU, a software TPM, the key server, an initramfs, dm-crypt and the kernel's WireGuard.

#[path = "demo/tell.rs"]
mod tell;

use std::process::ExitCode;

use latchkey_tests::{
    disk::Persistent,
    error::{Error, Result},
    kms::{Kms, Volume},
    place::Image,
    scenario::{CloudConfig, Machine, Mesh, Unlocked},
};
use tell::{Teller, chart};

/// What is worth repeating of a machine's console.
const CONSOLE: &str = "latchkey|INSTALL|initramfs:|GRUB|(?i)recovery";

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
    teller.say(&format!(
        "disk image and initramfs are built; the guest's kernel is {}",
        image.kernel_version
    ));
    let mut kms = Kms::new("demo")?;
    let machine = Machine::new("demo", &CloudConfig::online(&kms.url()), Persistent::Plain)?;
    teller.say(&format!(
        "a new TPM; its hash, the machine's name for the key server, is {}",
        machine.tpm.pubhash()
    ));
    let volume = Volume {
        name: "demo-machine",
        tpm_hash: machine.tpm.pubhash(),
        secret: None,
        quarantined: false,
    };
    kms.put_volume(&volume)?;
    kms.start()?;
    teller.say(&format!(
        "latchkey-kms listens; its store has one manifest, SealedVolume {}",
        volume.name
    ));
    let _server = teller.relay("server", kms.log()?, ".");

    teller.chapter("Installation: COS_PERSISTENT is encrypted in place");
    let recovery = install(teller, &kms, &machine)?;

    teller.chapter("The machine boots, and lets itself in");
    let boot = {
        let mut vm = machine.vm("boot")?.secret(&recovery).start()?;
        let _console = teller.relay("machine", vm.console(), CONSOLE);
        teller.say("power on");
        Unlocked::follow(&mut vm, Mesh::Up, &[&recovery])?
    };
    tell_unlocked(teller, &boot);

    teller.chapter("The same machine, quarantined");
    kms.put_volume(&Volume { quarantined: true, ..volume })?;
    teller.say(
        "the operator sets `quarantined: true` in the manifest; the machine is powered on again",
    );
    let refused = {
        let mut vm = machine.vm("quarantined")?.secret(&recovery).start()?;
        let _console = teller.relay("machine", vm.console(), CONSOLE);
        vm.wait_for("latchkey: .*quarantined")?;
        teller
            .say("refused. COS_PERSISTENT stays closed, and the console asks for the recovery key");
        vm.wait_for("(?i)recovery.*: ?$")?;
        vm.type_line(&recovery)?;
        teller.say("someone types the recovery key");
        Unlocked::follow(&mut vm, Mesh::None, &[&recovery])?
    };
    tell_unlocked(teller, &refused);

    teller.chapter("Timeline of the boot that let itself in");
    chart(&boot);
    Ok(())
}

/// The install boot; the recovery key that it printed.
fn install(teller: &Teller, kms: &Kms, machine: &Machine) -> Result<String> {
    teller.say("the installer's system boots and runs `kcrypt-discovery-challenger encrypt --recovery-key COS_PERSISTENT`");
    let installed = machine.install(&["--recovery-key"])?;
    if installed.code != 0 {
        return Err(Error::Setup(format!(
            "encrypt exited with {}: {:?}",
            installed.code, installed.output
        )));
    }
    for line in &installed.output {
        teller.say(&format!("    installer | {line}"));
    }
    for (file, _) in kms.secrets()? {
        let name = file.rsplit('/').next().unwrap_or_default().to_owned();
        teller.say(&format!(
            "the server's store has got {name}: a passphrase that only this TPM can read"
        ));
    }
    installed
        .recovery_key()
        .ok_or_else(|| Error::Setup(format!("no recovery key in {:?}", installed.output)))
}

fn tell_unlocked(teller: &Teller, boot: &Unlocked) {
    let r = &boot.report;
    teller.say(&format!(
        "{} is mounted, its data is intact (sha256 {}…), boots counted on it: {}",
        r.persistent.source.as_deref().unwrap_or("?"),
        r.persistent.data_sha256.as_deref().and_then(|h| h.get(..12)).unwrap_or("?"),
        r.persistent.boots.unwrap_or(0)
    ));
    if let Some(w) = &r.wireguard {
        teller.say(&format!(
            "{} is up: {}, port {}, key {}",
            w.interface,
            w.addresses.join(", "),
            w.listen_port,
            w.public_key
        ));
    }
    teller.say(&format!(
        "searched {} files, {} processes and the journal for {} secrets: found none",
        r.leaks.files,
        r.leaks.processes,
        r.leaks.secrets.len() - 1
    ));
}
