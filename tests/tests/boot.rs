//! A machine boots and lets itself in: each scenario has a TPM, a disk and, where it says so, a key server of its own, and
//! asserts what the machine saw and what the server logged.

use latchkey_tests::{
    disk::Persistent,
    error::Result,
    kms::{Kms, Volume},
    scenario::{CloudConfig, Machine, Mesh, Unlocked, static_volume, with_static_secret},
};
use latchkey_wire::timeline::{Mode, Outcome};

/// An operator's passphrase, in a Secret of the key server or in someone's head.
const PASSPHRASE: &str = "correct-horse-battery-staple-7";
/// What the console says when a person may type.
const PROMPT: &str = "Recovery passphrase.*: ?$";

/// Offline: the TPM alone has the passphrase, in an NV index that only `encrypt` makes.
#[test]
fn offline() -> Result<()> {
    let machine = Machine::new("offline", &CloudConfig::offline(), Persistent::Plain)?;
    assert_eq!(machine.install(&[])?.code, 0);

    let first =
        Unlocked::follow(&mut machine.vm("boot")?.without_network().start()?, Mesh::Up, &[])?;
    assert_eq!((first.outcome(), first.timeline.mode), (Outcome::Unlocked, Mode::Offline));
    assert_eq!(first.report.persistent.boots, Some(1));

    let second =
        Unlocked::follow(&mut machine.vm("boot")?.without_network().start()?, Mesh::Up, &[])?;
    assert_eq!(second.report.persistent.boots, Some(2), "what was written before is there");
    assert_eq!(
        first.public_key(),
        second.public_key(),
        "the identity is the machine's, not the boot's"
    );
    Ok(())
}

/// Online, automatic: the machine makes its passphrase at install and leaves it, encrypted for its TPM, with the server.
#[test]
fn online_automatic() -> Result<()> {
    let mut kms = Kms::new("automatic")?;
    let config = CloudConfig::online(&kms.url()).protocol("v1");
    let machine = Machine::new("automatic", &config, Persistent::Plain)?;
    kms.put_volume(&Volume {
        name: "machine-a",
        tpm_hash: machine.tpm.pubhash(),
        secret: None,
        quarantined: false,
    })?;
    kms.start()?;

    assert_eq!(machine.install(&[])?.code, 0);
    let secrets = kms.secrets()?;
    assert_eq!(secrets.len(), 1, "enrolled: {secrets:?}");
    assert!(secrets[0].1.contains("machine-a-cos-persistent"), "{secrets:?}");
    assert!(secrets[0].1.contains("generated_by"), "{secrets:?}");

    let boot = Unlocked::follow(&mut machine.vm("boot")?.start()?, Mesh::Up, &[])?;
    assert_eq!((boot.outcome(), boot.timeline.mode), (Outcome::Unlocked, Mode::Online));
    kms.wait_for(&format!("endpoint=getPass .*result=granted .*{}", machine.tpm.pubhash()))?;
    assert_eq!(kms.secrets()?, secrets, "a boot changes nothing on the server");
    Ok(())
}

/// Online, static: the operator's own passphrase, from a Secret.
#[test]
fn online_static() -> Result<()> {
    let (mut kms, machine) = with_static_secret("static", CloudConfig::of, PASSPHRASE)?;
    kms.start()?;
    let boot = Unlocked::follow(
        &mut machine.vm("boot")?.secret(PASSPHRASE).start()?,
        Mesh::Up,
        &[PASSPHRASE],
    )?;
    assert_eq!((boot.outcome(), boot.timeline.mode), (Outcome::Unlocked, Mode::Online));
    kms.wait_for(&format!(
        "endpoint=tpm-attestation .*result=granted .*{}",
        machine.tpm.pubhash()
    ))?;
    assert!(!kms.log()?.contains(PASSPHRASE), "the server's log has the passphrase");
    Ok(())
}

/// Quarantined: refused as soon as the server has said so, and a person with the passphrase gets in.
#[test]
fn quarantined() -> Result<()> {
    let (mut kms, machine) = with_static_secret("quarantined", CloudConfig::of, PASSPHRASE)?;
    kms.put_volume(&Volume { quarantined: true, ..static_volume(&machine) })?;
    kms.start()?;
    let mut vm = machine.vm("boot")?.secret(PASSPHRASE).start()?;
    kms.wait_for(&format!("result=refused why=\"quarantined.*{}", machine.tpm.pubhash()))?;
    vm.wait_for("latchkey: .*quarantined")?;
    vm.wait_for(PROMPT)?;
    vm.type_line(PASSPHRASE)?;
    assert_eq!(vm.unlock_code()?, 0);
    let boot = Unlocked::follow(&mut vm, Mesh::None, &[PASSPHRASE])?;
    assert_eq!(boot.outcome(), Outcome::Recovery);
    assert!(boot.timeline.reason.is_some_and(|r| r.contains("quarantined")));
    Ok(())
}

/// No key server: the prompt is there at once, long before the deadline, and works.
#[test]
fn server_absent_passphrase_typed() -> Result<()> {
    let (_kms, machine) = with_static_secret("absent", CloudConfig::of, PASSPHRASE)?;
    let mut vm = machine.vm("boot")?.secret(PASSPHRASE).start()?;
    vm.wait_for(PROMPT)?;
    vm.type_line("not the passphrase")?;
    vm.wait_for("latchkey: .*does not open")?;
    vm.type_line(PASSPHRASE)?;
    assert_eq!(vm.unlock_code()?, 0);
    assert_eq!(Unlocked::follow(&mut vm, Mesh::Up, &[PASSPHRASE])?.outcome(), Outcome::Recovery);
    Ok(())
}

/// No key server and nobody at the console: it ends when the deadline says so, with the code that says why.
#[test]
fn server_absent_deadline() -> Result<()> {
    let (_kms, machine) =
        with_static_secret("deadline", |kms| CloudConfig::of(kms).deadline("15s"), PASSPHRASE)?;
    let mut vm = machine.vm("boot")?.start()?;
    let began = vm.wait_for("initramfs: starting unlock")?;
    assert_eq!(vm.unlock_code()?, 21);
    let ended = vm.wait_for("initramfs: unlock exited")?;
    assert!(ended.at_ms - began.at_ms >= 14_000, "it gave up before its deadline");
    vm.wait_for("initramfs: stopped")?;
    vm.wait_for_power_off()
}

/// A key server that comes up while the machine waits.
#[test]
fn server_late() -> Result<()> {
    let (mut kms, machine) = with_static_secret("late", CloudConfig::of, PASSPHRASE)?;
    let mut vm = machine.vm("boot")?.secret(PASSPHRASE).start()?;
    vm.wait_for("latchkey: .*(refused|unreachable|cannot connect|connect)")?;
    kms.start()?;
    assert_eq!(Unlocked::follow(&mut vm, Mesh::Up, &[PASSPHRASE])?.outcome(), Outcome::Unlocked);
    Ok(())
}

/// The disk in another machine: the server knows the machine by its TPM, and does not know this one.
#[test]
fn other_tpm() -> Result<()> {
    let (mut kms, machine) =
        with_static_secret("stolen", |kms| CloudConfig::of(kms).deadline("20s"), PASSPHRASE)?;
    kms.start()?;
    let thief = latchkey_tests::tpm::Tpm::fresh("thief")?;
    assert_ne!(thief.pubhash(), machine.tpm.pubhash());
    let mut vm = machine.vm("boot")?.tpm(&thief).start()?;
    assert_eq!(vm.unlock_code()?, 30);
    kms.wait_for(&format!("result=refused .*{}", thief.pubhash()))?;
    assert_eq!(kms.log()?.matching("result=granted")?, [], "nobody got anything");
    vm.wait_for_power_off()
}

/// From disk, through firmware and GRUB.
#[test]
fn from_disk_through_grub() -> Result<()> {
    let (mut kms, machine) = with_static_secret("grub", CloudConfig::of, PASSPHRASE)?;
    kms.start()?;
    let boot = machine.install_grub(None)?;
    let mut vm = machine.vm("boot")?.boot(boot).secret(PASSPHRASE).start()?;
    vm.wait_for("GRUB starts the machine")?;
    assert_eq!(Unlocked::follow(&mut vm, Mesh::Up, &[PASSPHRASE])?.outcome(), Outcome::Unlocked);
    Ok(())
}

/// The plug is pulled while the partition is being encrypted, twice: the installation, called again, finishes, and what was
/// on the partition is there.
#[test]
fn power_cut_while_installing() -> Result<()> {
    let machine = Machine::new("power-cut", &CloudConfig::offline(), Persistent::Plain)?;
    for _ in 0..2 {
        let vm = machine.installing(&[])?;
        vm.wait_for("% of .* MiB encrypted")?;
        drop(vm);
    }
    assert_eq!(machine.install(&[])?.code, 0);
    let unlocked =
        Unlocked::follow(&mut machine.vm("boot")?.without_network().start()?, Mesh::Up, &[])?;
    assert_eq!(unlocked.outcome(), Outcome::Unlocked);
    Ok(())
}
