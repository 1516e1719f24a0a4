//! kcrypt's two generations, from the live system to the installed one and from one server to the next.

use latchkey_tests::{
    disk::Persistent,
    error::Result,
    front::Front,
    kms::{Kms, Volume},
    scenario::{CloudConfig, Machine, Mesh, Unlocked, with_static_secret},
};
use latchkey_wire::timeline::{Mode, Outcome};

const PASSPHRASE: &str = "correct-horse-battery-staple-7";
/// Firmware settings have changed: PCR 7 is another at the next boot.
const OTHER_PCR_7: &str = "latchkey.test.extend=7";

/// The manifest of the machine's volume.
fn manifest(kms: &Kms, machine: &Machine) -> Result<String> {
    let mut volumes = kms.volumes()?;
    volumes.retain(|(_, text)| text.contains(machine.tpm.pubhash()));
    assert_eq!(volumes.len(), 1, "one volume for one machine: {volumes:?}");
    Ok(volumes.remove(0).1)
}

/// What the manifest holds of a PCR: nothing, an empty value, or 64 hex digits.
fn pcr(manifest: &str, index: u32) -> Option<String> {
    let line = manifest.lines().find_map(|l| {
        let (key, value) = l.trim().split_once(':')?;
        (key.trim_matches(['"', '\'']) == index.to_string()).then_some(value)
    });
    line.map(|value| value.trim().trim_matches(['"', '\'']).to_owned())
}

/// A machine that nobody told the server about is installed and enrolled by its first use. The live system's PCRs are not
/// learned, the installed system's are.
#[test]
fn v2_first_use_from_live_system_to_installed_system() -> Result<()> {
    let mut kms = Kms::new("tofu")?;
    let machine = Machine::new("tofu", &CloudConfig::of(&kms).protocol("v2"), Persistent::Plain)?;
    kms.start()?;
    assert_eq!(machine.install(&[])?.code, 0);
    kms.wait_for(&format!("endpoint=tpm-attestation .*result=.*{}", machine.tpm.pubhash()))?;
    let deferred = manifest(&kms, &machine)?;
    let name = format!("tofu-{}", machine.tpm.pubhash().get(..8).unwrap_or_default());
    assert!(deferred.contains(&format!("name: {name}")), "{deferred}");
    assert_eq!([0, 7, 11].map(|n| pcr(&deferred, n)), [0; 3].map(|_| Some(String::new())));
    let secrets = kms.secrets()?;
    assert_eq!(secrets.len(), 1, "{secrets:?}");

    let boot = Unlocked::follow(&mut machine.vm("boot")?.start()?, Mesh::Up, &[])?;
    assert_eq!((boot.outcome(), boot.timeline.mode), (Outcome::Unlocked, Mode::Online));
    let learned = manifest(&kms, &machine)?;
    for index in [0, 7, 11] {
        let value = pcr(&learned, index).unwrap_or_default();
        assert_eq!(value.len(), 64, "PCR {index} is learned: {learned}");
    }
    assert_eq!(kms.secrets()?, secrets, "a boot changes no Secret");

    let again = Unlocked::follow(&mut machine.vm("again")?.start()?, Mesh::Up, &[])?;
    assert_eq!(again.outcome(), Outcome::Unlocked);
    assert_eq!(again.public_key(), boot.public_key());
    assert_eq!(
        [0, 7, 11].map(|n| pcr(&manifest(&kms, &machine).unwrap(), n)),
        [0, 7, 11].map(|n| pcr(&learned, n))
    );
    Ok(())
}

/// A volume that an operator wrote learns the machine's PCRs at its first boot. With another PCR 7 it is refused, until the
/// operator says that the change is one of his.
#[test]
fn v2_pcr_7_changed_then_reset_pcrs() -> Result<()> {
    let config = |kms: &Kms| CloudConfig::of(kms).protocol("v2").deadline("20s");
    let (mut kms, machine) = with_static_secret("pcr7", config, PASSPHRASE)?;
    kms.start()?;
    let boot = Unlocked::follow(&mut machine.vm("boot")?.start()?, Mesh::Up, &[PASSPHRASE])?;
    assert_eq!(boot.outcome(), Outcome::Unlocked);
    let learned = pcr(&manifest(&kms, &machine)?, 7).unwrap_or_default();
    assert_eq!(learned.len(), 64);

    let mut vm = machine.vm("changed")?.append(OTHER_PCR_7).start()?;
    vm.wait_for("latchkey: .*PCR ?7")?;
    assert_eq!(vm.unlock_code()?, 30);
    vm.wait_for_power_off()?;
    kms.wait_for(&format!("result=refused .*{}", machine.tpm.pubhash()))?;
    assert!(!vm.console().contains(&learned), "a refusal does not say what was expected");

    kms.administer(&["volume", "reset-pcrs", "machine-s"])?;
    let mut vm = machine.vm("reset")?.append(OTHER_PCR_7).start()?;
    let reset = Unlocked::follow(&mut vm, Mesh::Up, &[PASSPHRASE])?;
    assert_eq!(reset.outcome(), Outcome::Unlocked);
    let now = pcr(&manifest(&kms, &machine)?, 7).unwrap_or_default();
    assert!(now.len() == 64 && now != learned, "the new value is learned: {now}");
    Ok(())
}

/// A machine that was enrolled over v1, its passphrase sealed to its TPM, when the server has only v2.
#[test]
fn v1_to_v2_server_move() -> Result<()> {
    let mut kms = Kms::new("move")?;
    let front = Front::before(kms.port())?;
    let machine = Machine::new("move", &CloudConfig::online(&front.url()), Persistent::Plain)?;
    kms.put_volume(&Volume {
        name: "machine-m",
        tpm_hash: machine.tpm.pubhash(),
        secret: None,
        quarantined: false,
    })?;
    kms.start()?;
    assert_eq!(machine.install(&[])?.code, 0);
    let secrets = kms.secrets()?;
    assert!(secrets.len() == 1 && secrets[0].1.contains("generated_by"), "{secrets:?}");
    let before = Unlocked::follow(&mut machine.vm("before")?.start()?, Mesh::Up, &[])?;
    assert_eq!(before.outcome(), Outcome::Unlocked);
    assert_eq!(kms.log()?.matching("endpoint=tpm-attestation")?, [], "the front has v1 only");

    front.move_to_v2();
    let after = Unlocked::follow(&mut machine.vm("after")?.start()?, Mesh::Up, &[])?;
    assert_eq!((after.outcome(), after.timeline.mode), (Outcome::Unlocked, Mode::Online));
    assert_eq!(after.public_key(), before.public_key());
    kms.wait_for("endpoint=tpm-attestation .*result=granted")?;
    assert_eq!(kms.secrets()?, secrets, "the server still cannot read it");
    Ok(())
}
