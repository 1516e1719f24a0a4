//! Which volumes are opened: those of others' making, several, and not one that only has the right label.

use latchkey_tests::{
    disk::{Persistent, SecondDisk},
    error::Result,
    kms::{Kms, secret_yaml},
    scenario::{CloudConfig, Machine, Mesh, Unlocked, static_volume, with_static_secret},
    vm::PATIENCE,
};
use latchkey_wire::timeline::{Mode, Outcome};

const PASSPHRASE: &str = "correct-horse-battery-staple-7";

/// A volume that Kairos' own installer made: argon2id with 64 MiB, the same UUID on every machine, no token.
#[test]
fn made_by_kairos() -> Result<()> {
    let mut kms = Kms::new("kairos")?;
    let machine = Machine::new("kairos", &CloudConfig::of(&kms), Persistent::Kairos(PASSPHRASE))?;
    kms.put_volume(&static_volume(&machine))?;
    kms.put("secret.yaml", &secret_yaml("disk-secret", "pass", PASSPHRASE))?;
    kms.start()?;
    let mut vm = machine.vm("boot")?.secret(PASSPHRASE).start()?;
    let boot = Unlocked::follow(&mut vm, Mesh::Up, &[PASSPHRASE])?;
    assert_eq!((boot.outcome(), boot.timeline.mode), (Outcome::Unlocked, Mode::Online));
    Ok(())
}

/// Two volumes on two disks, each with a passphrase of its own from one SealedVolume.
#[test]
fn two_volumes() -> Result<()> {
    const DATA: &str = "another-horse-another-battery-8";
    let mut kms = Kms::new("two-volumes")?;
    let machine = Machine::new(
        "two-volumes",
        &CloudConfig::of(&kms).also("COS_DATA"),
        Persistent::Luks(PASSPHRASE),
    )?;
    let data = SecondDisk::new("two-volumes", "COS_DATA", DATA)?;
    let partition =
        "    - label: COS_DATA\n      secret:\n        name: data-secret\n        path: pass\n";
    let volume = static_volume(&machine).yaml();
    kms.put(
        "machine-s.yaml",
        &volume.replace("  quarantined:", &format!("{partition}  quarantined:")),
    )?;
    kms.put("secret.yaml", &secret_yaml("disk-secret", "pass", PASSPHRASE))?;
    kms.put("data.yaml", &secret_yaml("data-secret", "pass", DATA))?;
    kms.start()?;
    let mut vm = machine.vm("boot")?.second_disk(&data).secret(PASSPHRASE).secret(DATA).start()?;
    let boot = Unlocked::follow(&mut vm, Mesh::Up, &[PASSPHRASE, DATA])?;
    assert_eq!(boot.outcome(), Outcome::Unlocked);
    for label in ["COS_PERSISTENT", "COS_DATA"] {
        kms.wait_for(&format!("result=granted .*partition=.?\"?{label}"))?;
        vm.console()
            .wait_for(&format!("latchkey: /dev/vd.* is open as /dev/mapper/{label}$"), PATIENCE)?;
    }
    Ok(())
}

/// Somebody plugs in a disk whose volume has the label of the machine's own: the enrolled one is opened.
#[test]
fn impostor_beside_the_enrolled_volume() -> Result<()> {
    let machine = Machine::new("impostor", &CloudConfig::offline(), Persistent::Plain)?;
    assert_eq!(machine.install(&[])?.code, 0);
    let impostor = SecondDisk::new("impostor", "COS_PERSISTENT", PASSPHRASE)?;
    let mut vm = machine.vm("boot")?.second_disk(&impostor).start()?;
    let boot = Unlocked::follow(&mut vm, Mesh::Up, &[])?;
    assert_eq!(boot.outcome(), Outcome::Unlocked);
    let console = vm.console();
    assert_eq!(console.matching("is open as")?.len(), 1);
    assert_ne!(console.matching("latchkey: .*/dev/vdb")?, [], "an operator is told of it");
    Ok(())
}

/// Two volumes with one label, and nothing on either that says which is the machine's: neither is opened, the server's
/// passphrase is tried on none.
#[test]
fn impostor_beside_a_volume_without_mark() -> Result<()> {
    let config = |kms: &Kms| CloudConfig::of(kms).deadline("20s");
    let (mut kms, machine) = with_static_secret("ambiguous", config, PASSPHRASE)?;
    kms.start()?;
    let impostor = SecondDisk::new("ambiguous", "COS_PERSISTENT", "known to its maker")?;
    let mut vm = machine.vm("boot")?.second_disk(&impostor).start()?;
    vm.wait_for("latchkey: .*/dev/vd.*/dev/vd")?;
    assert_eq!(vm.unlock_code()?, 41);
    vm.wait_for_power_off()?;
    assert_eq!(vm.console().matching("is open as")?, []);
    Ok(())
}

/// Another machine's disk in the place of this one's: it was enrolled there, and stays closed here.
#[test]
#[cfg(feature = "all")]
fn impostor_in_place_of_the_enrolled_volume() -> Result<()> {
    let config = CloudConfig::offline().deadline("20s");
    let machines = [
        Machine::new("replaced", &config, Persistent::Plain)?,
        Machine::new("replacing", &config, Persistent::Plain)?,
    ];
    for machine in &machines {
        assert_eq!(machine.install(&[])?.code, 0);
    }
    let [mine, other] = &machines;
    let mut vm = mine.vm("impostor")?.disk(&other.disk).start()?;
    vm.wait_for("latchkey: .*enrolled on another machine")?;
    assert_eq!(vm.unlock_code()?, 41);
    vm.wait_for_power_off()?;
    let boot = Unlocked::follow(&mut mine.vm("mine")?.start()?, Mesh::Up, &[])?;
    assert_eq!(boot.outcome(), Outcome::Unlocked);
    Ok(())
}
