//! Finding the key server, and speaking with it, where the network or the clock is not as one would wish.

use latchkey_tests::{
    error::Result,
    kms::Kms,
    scenario::{CloudConfig, Machine, Mesh, Unlocked, static_secret_with},
    vm::Vm,
};
use latchkey_wire::timeline::{Mode, Outcome};

const PASSPHRASE: &str = "correct-horse-battery-staple-7";

/// The machine lets itself in, by the key server's word.
fn lets_itself_in(kms: &Kms, machine: &Machine, vm: Vm<'_>) -> Result<()> {
    let mut vm = vm.secret(PASSPHRASE).start()?;
    let boot = Unlocked::follow(&mut vm, Mesh::Up, &[PASSPHRASE])?;
    assert_eq!((boot.outcome(), boot.timeline.mode), (Outcome::Unlocked, Mode::Online));
    kms.wait_for(&format!("result=granted .*{}", machine.tpm.pubhash()))?;
    Ok(())
}

#[test]
fn ipv6_only() -> Result<()> {
    let mut kms = Kms::on_ipv6("ipv6")?;
    let machine = static_secret_with(&kms, "ipv6", &CloudConfig::of(&kms), PASSPHRASE)?;
    kms.start()?;
    lets_itself_in(&kms, &machine, machine.vm("boot")?.ipv6_only())
}
