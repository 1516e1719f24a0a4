//! A machine boots and lets itself in: each scenario has a TPM, a disk and, where it says so, a key server of its own, and
//! asserts what the machine saw and what the server logged.

use latchkey_tests::{
    disk::{Disk, Persistent, data_sha256},
    error::Result,
    tpm::Tpm,
    vm::Vm,
};

#[test]
fn smoke() -> Result<()> {
    let tpm = Tpm::fresh("smoke")?;
    let disk = Disk::new("smoke", "#cloud-config\n{}\n", Persistent::Luks("open sesame"))?;
    let mut vm = Vm::new("smoke")?.disk(&disk).tpm(&tpm).secret("open sesame").start()?;
    vm.wait_for("Passphrase")?;
    vm.type_line("open sesame")?;
    assert_eq!(vm.unlock_code()?, 0);
    let report = vm.report()?;
    eprintln!("{report:#?}");
    assert_eq!(report.persistent.data_sha256, Some(data_sha256()));
    Ok(())
}

#[test]
fn smoke_grub() -> Result<()> {
    let tpm = Tpm::fresh("smoke-grub")?;
    let disk = Disk::new("smoke-grub", "#cloud-config\n{}\n", Persistent::Luks("open sesame"))?;
    let vm = Vm::new("smoke-grub")?.disk(&disk).tpm(&tpm).secret("open sesame");
    let cfg = format!("serial --unit=0\nterminal_output serial\necho GRUB is here\nlinux /boot/vmlinuz {}\ninitrd /boot/initrd\nboot\n", vm.command_line());
    disk.install_boot(&latchkey_tests::place::Image::get()?.initramfs, &cfg)?;
    let mut vm = vm.boot(latchkey_tests::vm::Boot::Disk).start()?;
    vm.wait_for("Passphrase")?;
    vm.type_line("open sesame")?;
    assert_eq!(vm.unlock_code()?, 0);
    let report = vm.report()?;
    eprintln!("{report:#?}");
    assert_eq!(report.persistent.data_sha256, Some(data_sha256()));
    Ok(())
}
