//! The machine's key is changed on a real disk, by the TPM that every boot asks; and the names of mappings that Kairos expects.
#![cfg(feature = "all")]

use latchkey_tests::{
    disk::Persistent,
    error::Result,
    scenario::{CloudConfig, Installed, Machine, Mesh, Unlocked},
};
use latchkey_wire::timeline::Outcome;

/// Between two boots the key is another one, and the volume and the mesh identity are the same. Then once more, with the plug
/// pulled while it is under way, which a boot survives, and running it again.
#[test]
fn rekey_between_boots() -> Result<()> {
    let machine = Machine::new("rekey", &CloudConfig::offline(), Persistent::Plain)?;
    assert_eq!(machine.install(&[])?.code, 0);
    let boot = |step: &str| Unlocked::follow(&mut machine.vm(step)?.start()?, Mesh::Up, &[]);
    let rekeying =
        |step: &str| machine.vm(step)?.append("latchkey.test=install latchkey.verb=rekey").start();
    let before = boot("before")?;
    assert_eq!(Installed::follow(&mut rekeying("rekey")?)?.code, 0);
    let after = boot("after")?;
    assert_eq!(after.outcome(), Outcome::Unlocked);
    assert_eq!(after.public_key(), before.public_key(), "the identity hangs on the volume key");

    let vm = rekeying("cut")?;
    vm.wait_for("has a new machine key")?;
    drop(vm);
    assert_eq!(boot("after-cut")?.outcome(), Outcome::Unlocked);
    assert_eq!(Installed::follow(&mut rekeying("again")?)?.code, 0);

    let volumes = boot("last")?.timeline.volumes;
    let [volume] = volumes.as_slice() else { panic!("{volumes:?}") };
    assert_eq!((volume.label.as_str(), volume.outcome), ("COS_PERSISTENT", Outcome::Unlocked));
    assert_eq!(volume.mapper.as_deref(), Some("COS_PERSISTENT"));

    // As Kairos calls it.
    let yaml = CloudConfig::offline().yaml();
    machine
        .disk
        .set_cloud_config(&yaml.replace("latchkey:\n", "latchkey:\n  mapper: partition\n"))?;
    let vm = machine.vm("partition")?.start()?;
    vm.wait_for("latchkey: /dev/vda(\\d) is open as /dev/mapper/vda\\d$")?;
    assert_eq!(vm.unlock_code()?, 0);
    Ok(())
}
