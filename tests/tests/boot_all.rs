//! The rest of the matrix: what can be wrong with a machine, its network, its server or its configuration, each with the
//! exit code that says so; and the longer stories. `make test-all`.
#![cfg(feature = "all")]

use latchkey_tests::{
    disk::Persistent,
    error::Result,
    kms::{Kms, Volume, secret_yaml},
    scenario::{CloudConfig, Machine, Mesh, Unlocked, static_volume, with_static_secret},
    tpm::Tpm,
    vm::RunningVm,
};
use latchkey_wire::timeline::Outcome;

const PASSPHRASE: &str = "correct-horse-battery-staple-7";
const PROMPT: &str = "Recovery passphrase.*: ?$";

/// Waits for the end of a boot that nobody helped: the exit code, and the machine off.
fn stopped(mut vm: RunningVm) -> Result<i32> {
    let code = vm.unlock_code()?;
    vm.wait_for("initramfs: stopped")?;
    vm.wait_for_power_off()?;
    Ok(code)
}

/// An installed machine's disk with another TPM: the volume says that it was enrolled with this one's, and stays closed.
#[test]
fn offline_other_tpm() -> Result<()> {
    let machine =
        Machine::new("offline-stolen", &CloudConfig::offline().deadline("10s"), Persistent::Plain)?;
    assert_eq!(machine.install(&[])?.code, 0);
    let thief = Tpm::fresh("offline-thief")?;
    assert_eq!(stopped(machine.vm("thief")?.tpm(&thief).start()?)?, 41);
    let home = Unlocked::follow(&mut machine.vm("home")?.start()?, Mesh::Up, &[])?;
    assert_eq!(home.outcome(), Outcome::Unlocked, "the attempt elsewhere did no harm");
    Ok(())
}

/// The recovery key that the installer printed opens a quarantined machine; released, it is itself again.
#[test]
fn recovery_key_then_release() -> Result<()> {
    let mut kms = Kms::new("release")?;
    let machine = Machine::new("release", &CloudConfig::of(&kms), Persistent::Plain)?;
    let volume = Volume {
        name: "machine-r",
        tpm_hash: machine.tpm.pubhash(),
        secret: None,
        quarantined: false,
    };
    kms.put_volume(&volume)?;
    kms.start()?;
    let installed = machine.install(&["--recovery-key"])?;
    assert_eq!(installed.code, 0);
    let recovery = installed.recovery_key().expect("a recovery key is printed");
    let before = Unlocked::follow(
        &mut machine.vm("before")?.secret(&recovery).start()?,
        Mesh::Up,
        &[&recovery],
    )?;

    kms.put_volume(&Volume { quarantined: true, ..volume })?;
    let mut vm = machine.vm("quarantined")?.secret(&recovery).start()?;
    vm.wait_for("latchkey: .*quarantined")?;
    vm.wait_for(PROMPT)?;
    vm.type_line(&recovery)?;
    assert_eq!(Unlocked::follow(&mut vm, Mesh::None, &[&recovery])?.outcome(), Outcome::Recovery);

    kms.put_volume(&volume)?;
    let after = Unlocked::follow(
        &mut machine.vm("after")?.secret(&recovery).start()?,
        Mesh::Up,
        &[&recovery],
    )?;
    assert_eq!(after.outcome(), Outcome::Unlocked);
    assert_eq!(after.public_key(), before.public_key(), "the identity is the machine's");
    assert_eq!(after.report.persistent.boots, Some(3));
    Ok(())
}

/// Two machines with one server: each gets in, and each is somebody else.
#[test]
fn two_machines() -> Result<()> {
    let mut kms = Kms::new("two")?;
    let names = ["machine-one", "machine-two"];
    let machines = [
        Machine::new("one", &CloudConfig::of(&kms), Persistent::Luks("passphrase-of-one"))?,
        Machine::new("two", &CloudConfig::of(&kms), Persistent::Luks("passphrase-of-two"))?,
    ];
    for (name, machine) in names.iter().zip(&machines) {
        let secret = Some((*name, "pass"));
        kms.put_volume(&Volume {
            name,
            tpm_hash: machine.tpm.pubhash(),
            secret,
            quarantined: false,
        })?;
        let passphrase = format!("passphrase-of-{}", machine.name);
        kms.put(&format!("{name}-secret.yaml"), &secret_yaml(name, "pass", &passphrase))?;
    }
    kms.start()?;
    let mut keys = Vec::new();
    for machine in &machines {
        let boot = Unlocked::follow(&mut machine.vm("boot")?.start()?, Mesh::Up, &[])?;
        assert_eq!(boot.outcome(), Outcome::Unlocked);
        keys.push(boot.public_key().to_owned());
    }
    assert_ne!(keys[0], keys[1]);
    Ok(())
}

/// The server is killed while the machine waits for it, and comes back.
#[test]
fn server_restarted() -> Result<()> {
    let (mut kms, machine) = with_static_secret("restarted", CloudConfig::of, PASSPHRASE)?;
    let first = {
        kms.start()?;
        Unlocked::follow(&mut machine.vm("first")?.start()?, Mesh::Up, &[PASSPHRASE])?
    };
    kms.stop();
    let mut vm = machine.vm("second")?.start()?;
    vm.wait_for("latchkey: .*connecting to")?;
    kms.start()?;
    let second = Unlocked::follow(&mut vm, Mesh::Up, &[PASSPHRASE])?;
    assert_eq!(second.outcome(), Outcome::Unlocked);
    assert_eq!(first.public_key(), second.public_key());
    Ok(())
}

/// A TPM behind a command-response buffer.
#[test]
fn crb() -> Result<()> {
    let (mut kms, machine) = with_static_secret("crb", CloudConfig::of, PASSPHRASE)?;
    kms.start()?;
    let boot = Unlocked::follow(&mut machine.vm("boot")?.crb().start()?, Mesh::Up, &[PASSPHRASE])?;
    assert_eq!(boot.outcome(), Outcome::Unlocked);
    Ok(())
}

#[test]
fn without_tpm() -> Result<()> {
    let (mut kms, machine) =
        with_static_secret("no-tpm", |kms| CloudConfig::of(kms).deadline("10s"), PASSPHRASE)?;
    kms.start()?;
    assert_eq!(stopped(machine.vm("boot")?.without_tpm().start()?)?, 11);
    Ok(())
}

/// Without a TPM a person still gets in, but there is nothing to make the machine's identity of.
#[test]
fn without_tpm_passphrase_typed() -> Result<()> {
    let (_kms, machine) = with_static_secret("no-tpm-typed", CloudConfig::of, PASSPHRASE)?;
    let mut vm = machine.vm("boot")?.without_tpm().secret(PASSPHRASE).start()?;
    vm.wait_for(PROMPT)?;
    vm.type_line(PASSPHRASE)?;
    let boot = Unlocked::follow(&mut vm, Mesh::None, &[PASSPHRASE])?;
    assert_eq!(boot.outcome(), Outcome::Recovery);
    Ok(())
}

#[test]
fn without_network() -> Result<()> {
    let (_kms, machine) =
        with_static_secret("no-net", |kms| CloudConfig::of(kms).deadline("10s"), PASSPHRASE)?;
    assert_eq!(stopped(machine.vm("boot")?.without_network().start()?)?, 20);
    Ok(())
}

/// The server has a passphrase, and it is not this volume's.
#[test]
fn wrong_passphrase_from_server() -> Result<()> {
    let (mut kms, machine) =
        with_static_secret("wrong", |kms| CloudConfig::of(kms).deadline("10s"), PASSPHRASE)?;
    kms.put("secret.yaml", &secret_yaml("disk-secret", "pass", "another passphrase"))?;
    kms.start()?;
    assert_eq!(stopped(machine.vm("boot")?.start()?)?, 42);
    assert!(!kms.log()?.contains("another passphrase"));
    Ok(())
}

/// The server knows the machine and has no passphrase for it: a boot makes none.
#[test]
fn no_secret_on_server() -> Result<()> {
    let mut kms = Kms::new("no-secret")?;
    let machine = Machine::new(
        "no-secret",
        &CloudConfig::of(&kms).deadline("10s"),
        Persistent::Luks(PASSPHRASE),
    )?;
    kms.put_volume(&Volume { secret: None, ..static_volume(&machine) })?;
    kms.start()?;
    assert_eq!(stopped(machine.vm("boot")?.start()?)?, 31);
    assert_eq!(kms.secrets()?, [], "only an installation enrols");
    Ok(())
}

/// A plain file system where an encrypted volume is due is not taken for it.
#[test]
fn volume_in_clear() -> Result<()> {
    let machine =
        Machine::new("clear", &CloudConfig::offline().deadline("10s"), Persistent::Plain)?;
    // The TPM has a passphrase, so that the volume is all that is wrong.
    assert_eq!(machine.install(&[])?.code, 0);
    machine.disk.set_persistent(Persistent::Plain)?;
    assert_eq!(stopped(machine.vm("boot")?.start()?)?, 41);
    Ok(())
}

/// A typing error in the cloud-config stops it, with the line, and is no reason for a weaker mode.
#[test]
fn broken_cloud_config() -> Result<()> {
    let (mut kms, machine) = with_static_secret("broken", CloudConfig::of, PASSPHRASE)?;
    kms.start()?;
    machine.disk.set_cloud_config(
        "#cloud-config\nlatchkey:\n  deadline: 10s\nkcrypt:\n  challenger: [\n",
    )?;
    let mut vm = machine.vm("boot")?.start()?;
    vm.wait_for(r"latchkey: .*90_custom\.yaml.*[0-9]")?;
    vm.wait_for(PROMPT)?;
    vm.type_line(PASSPHRASE)?;
    assert_eq!(vm.unlock_code()?, 0, "a person gets in all the same");
    Ok(())
}
