//! Finding the key server, and speaking with it, where the network or the clock is not as one would wish.

use std::net::{Ipv4Addr, UdpSocket};

use latchkey_tests::{
    error::{Doing, Result},
    front::{Dns, Stalling},
    kms::Kms,
    lan::{HOST, Lan},
    scenario::{CloudConfig, Machine, Mesh, Unlocked, static_secret_with},
    tls::Tls,
    transcript::Transcript,
    vm::Vm,
};
use latchkey_wire::timeline::{Mode, Outcome};

const PASSPHRASE: &str = "correct-horse-battery-staple-7";

/// The machine lets itself in, by the key server's word; what its console said.
fn lets_itself_in(kms: &Kms, machine: &Machine, vm: Vm<'_>) -> Result<Transcript> {
    let mut vm = vm.secret(PASSPHRASE).start()?;
    let boot = Unlocked::follow(&mut vm, Mesh::Up, &[PASSPHRASE])?;
    assert_eq!((boot.outcome(), boot.timeline.mode), (Outcome::Unlocked, Mode::Online));
    kms.wait_for(&format!("result=granted .*{}", machine.tpm.pubhash()))?;
    Ok(vm.console().clone())
}

/// A name nobody knows, since mDNS is what finds the server.
#[test]
fn mdns() -> Result<()> {
    let lan = Lan::new("mdns", HOST)?;
    let mut kms = Kms::on_lan("mdns")?.arguments(&["--mdns", "latchkey-test.local"]);
    let url = kms.url_of("latchkey-test.local");
    let machine = static_secret_with(&kms, "mdns", &CloudConfig::online(&url).mdns(), PASSPHRASE)?;
    kms.start_in(&lan)?;
    lets_itself_in(&kms, &machine, machine.vm("boot")?.lan(&lan)).map(drop)
}

/// The clock's battery is empty: the certificate is of the machine's future.
#[test]
fn tls_with_the_clock_at_1970() -> Result<()> {
    let tls = Tls::new("tls-1970", &["IP:10.0.2.2"])?;
    let mut kms = Kms::new("tls-1970")?.tls(&tls.certificate_file(), &tls.key_file());
    let config = CloudConfig::of(&kms).certificate(&tls.authority()?);
    let machine = static_secret_with(&kms, "tls-1970", &config, PASSPHRASE)?;
    kms.start()?;
    let vm = machine.vm("boot")?.clock("1970-01-01T00:00:00");
    let console = lets_itself_in(&kms, &machine, vm)?;
    let behind = console.matching("latchkey: .*clock is [0-9]{5} days behind")?;
    assert_eq!(behind.len(), 1, "an operator is told");
    Ok(())
}

#[test]
fn ipv6_only() -> Result<()> {
    let mut kms = Kms::on_ipv6("ipv6")?;
    let machine = static_secret_with(&kms, "ipv6", &CloudConfig::of(&kms), PASSPHRASE)?;
    kms.start()?;
    lets_itself_in(&kms, &machine, machine.vm("boot")?.ipv6_only().append("ip=auto6")).map(drop)
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

/// The first server's name is not to be had, since the DNS server says nothing; the second has an address.
#[test]
fn dns_dead_and_a_second_server_by_address() -> Result<()> {
    let lan = Lan::new("dead-dns", HOST)?;
    let dns = Dns::silent(dns_socket(&lan)?);
    let mut kms = Kms::on_lan("dead-dns")?;
    let config = CloudConfig::any_of(&[&kms.url_of("kms.example.org"), &kms.url()]);
    let machine = static_secret_with(&kms, "dead-dns", &config, PASSPHRASE)?;
    kms.start_in(&lan)?;
    lets_itself_in(&kms, &machine, machine.vm("boot")?.lan(&lan))?;
    assert_ne!(dns.heard(), 0, "the first server was tried too");
    Ok(())
}

/// The first server accepts and says nothing, as one whose disk hangs.
#[test]
fn a_server_that_accepts_and_stalls() -> Result<()> {
    let stalling = Stalling::start()?;
    let mut kms = Kms::new("stalling")?;
    let config = CloudConfig::any_of(&[&stalling.url(), &kms.url()]);
    let machine = static_secret_with(&kms, "stalling", &config, PASSPHRASE)?;
    kms.start()?;
    lets_itself_in(&kms, &machine, machine.vm("boot")?)?;
    assert_ne!(stalling.accepted(), 0, "the first server was tried too");
    Ok(())
}
