//! Finding the key server, and speaking with it, where the network or the clock is not as one would wish.

use std::net::{Ipv4Addr, UdpSocket};

use latchkey_tests::{
    error::{Doing, Result},
    front::Dns,
    kms::Kms,
    lan::{HOST, Lan},
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

fn dns_socket(lan: &Lan) -> Result<UdpSocket> {
    lan.within(|| UdpSocket::bind((HOST, 53)))?.doing(|| "listen for DNS".into())
}

/// The fast initramfs has no file of the C library's resolver.
#[test]
fn dns_without_libnss() -> Result<()> {
    const NAME: &str = "kms.latchkey.example.org";
    let lan = Lan::new("dns", HOST)?;
    let dns = Dns::of(dns_socket(&lan)?, NAME, Ipv4Addr::new(10, 77, 0, 1));
    let mut kms = Kms::on_lan("dns")?;
    let config = CloudConfig::online(&kms.url_of(NAME));
    let machine = static_secret_with(&kms, "dns", &config, PASSPHRASE)?;
    kms.start_in(&lan)?;
    lets_itself_in(&kms, &machine, machine.vm("boot")?.lan(&lan))?;
    assert_ne!(dns.heard(), 0);
    Ok(())
}
