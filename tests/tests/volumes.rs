//! Which volumes are opened: those of others' making, several, and not one that only has the right label.

use latchkey_tests::{
    disk::Persistent,
    error::Result,
    kms::{Kms, secret_yaml},
    scenario::{CloudConfig, Machine, Mesh, Unlocked, static_volume},
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
