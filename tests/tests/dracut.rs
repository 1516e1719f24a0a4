//! dracut's own initramfs: module 50latchkey with each init and network back end that dracut 059 has, what it does when a
//! volume stays closed, and that an incomplete image is refused when it is built, not when it is booted.

use std::{
    fs,
    net::{Ipv4Addr, UdpSocket},
    path::{Path, PathBuf},
    process::Command,
};

use latchkey_tests::{
    disk::Persistent,
    error::{Doing, Error, Result, create_dir, run, write},
    front::Dns,
    kms::{Kms, Volume},
    lan::{HOST, Lan},
    place::{Image, Work, project},
    scenario::{
        CloudConfig, Machine, Mesh, Unlocked, static_secret_with, static_volume, with_static_secret,
    },
    vm::{Boot, PATIENCE, RunningVm, Vm},
};
use latchkey_wire::timeline::{Mode, Outcome};

const PASSPHRASE: &str = "correct-horse-battery-staple-7";
/// What asks a person. A log line may follow it on the same line.
const PROMPT: &str = "Recovery passphrase";
/// What an operator has GRUB add: see grub/README.md.
const NETWORK: &str = "rd.neednet=1";
/// What Kairos boots with: no shell for whoever stands before a machine that cannot open its disk.
const UNATTENDED: &str = "rd.shell=0 rd.emergency=reboot";

/// The initramfs of a variant of image/dracut-initramfs.sh, which builds it if needed.
fn initramfs(variant: &str) -> Result<PathBuf> {
    Image::get()?;
    Ok(PathBuf::from(run(&mut dracut(variant))?.trim_end()))
}

fn dracut(variant: &str) -> Command {
    let mut command = Command::new(project().join("image/dracut-initramfs.sh"));
    command.arg(variant);
    command
}

/// `machine` with dracut's initramfs and these further words for its kernel. Two cores: dracut runs much in parallel.
fn vm<'a>(machine: &'a Machine, variant: &str, words: &str) -> Result<Vm<'a>> {
    let boot = Boot::Kernel { initramfs: initramfs(variant)? };
    Ok(machine.vm(variant)?.boot(boot).append(words).cpus(2).memory_mib(640))
}

/// The key server has the passphrase; dracut brings up the network, since the kernel's command line asks for it.
fn online(variant: &str) -> Result<()> {
    let name = format!("dracut-online-{variant}");
    let (mut kms, machine) =
        with_static_secret(&name, |k| CloudConfig::of(k).deadline("120s"), PASSPHRASE)?;
    kms.start()?;
    let mut vm = vm(&machine, variant, NETWORK)?.secret(PASSPHRASE).start()?;
    let boot = Unlocked::follow(&mut vm, Mesh::Up, &[PASSPHRASE])?;
    assert_eq!((boot.outcome(), boot.timeline.mode), (Outcome::Unlocked, Mode::Online));
    Ok(())
}

/// The server by its name, too: systemd-networkd keeps what DHCP says of DNS to itself, and the image has no file of the C
/// library's resolver for it.
#[test]
fn online_with_systemd_and_networkd() -> Result<()> {
    const NAME: &str = "kms.latchkey.example.org";
    let lan = Lan::new("dracut-online", HOST)?;
    let dns = lan.within(|| UdpSocket::bind((HOST, 53)))?.doing(|| "listen for DNS".into())?;
    let dns = Dns::of(dns, NAME, Ipv4Addr::new(10, 77, 0, 1));
    let mut kms = Kms::on_lan("dracut-online")?;
    let config = CloudConfig::online(&kms.url_of(NAME));
    let machine = static_secret_with(&kms, "dracut-online", &config, PASSPHRASE)?;
    kms.start_in(&lan)?;
    let mut vm = vm(&machine, "sysd-networkd", NETWORK)?.lan(&lan).secret(PASSPHRASE).start()?;
    let boot = Unlocked::follow(&mut vm, Mesh::Up, &[PASSPHRASE])?;
    assert_eq!((boot.outcome(), boot.timeline.mode), (Outcome::Unlocked, Mode::Online));
    assert_ne!(dns.heard(), 0);
    Ok(())
}

/// Where there is no IPv4: networkd needs no word for that, network-legacy `ip=auto6`.
#[test]
#[cfg(feature = "all")]
fn online_where_there_is_ipv6_only() -> Result<()> {
    for (variant, words) in [("sysd-networkd", ""), ("sh-busybox", " ip=auto6")] {
        let name = format!("dracut-ipv6-{variant}");
        let mut kms = Kms::on_ipv6(&name)?;
        let machine = static_secret_with(&kms, &name, &CloudConfig::of(&kms), PASSPHRASE)?;
        kms.start()?;
        let vm = vm(&machine, variant, &format!("{NETWORK}{words}"))?.ipv6_only();
        let mut vm = vm.secret(PASSPHRASE).start()?;
        let boot = Unlocked::follow(&mut vm, Mesh::Up, &[PASSPHRASE])?;
        assert_eq!(boot.outcome(), Outcome::Unlocked);
    }
    Ok(())
}

#[test]
fn online_with_systemd_and_network_legacy() -> Result<()> {
    online("sysd-legacy")
}

#[test]
fn online_with_busybox_and_network_legacy() -> Result<()> {
    online("sh-busybox")
}

#[test]
#[cfg(feature = "all")]
fn online_with_dash_and_network_legacy() -> Result<()> {
    online("sh-dash")
}

#[test]
#[cfg(feature = "all")]
fn online_with_bash_and_network_legacy() -> Result<()> {
    online("sh-bash")
}

/// The same word on its way from GRUB's environment block on COS_STATE, where Kairos' installer leaves
/// `install.grub_options.extra_cmdline`, by grub/latchkey.cfg to the kernel.
#[test]
fn online_with_the_network_asked_for_in_grubenv() -> Result<()> {
    let (mut kms, machine) = with_static_secret("dracut-grub", CloudConfig::of, PASSPHRASE)?;
    kms.start()?;
    let vm = machine.vm("grub")?.boot(Boot::Disk).secret(PASSPHRASE).cpus(2).memory_mib(640);
    let snippet = project().join("grub/latchkey.cfg");
    let snippet = fs::read_to_string(&snippet).doing(|| format!("read {}", snippet.display()))?;
    let cfg = format!(
        "serial --unit=0\nterminal_output serial\n{snippet}\necho GRUB adds: ${{extra_cmdline}}\n\
         linux /boot/vmlinuz {} ${{extra_cmdline}}\ninitrd /boot/initrd\nboot\n",
        vm.command_line()
    );
    machine.disk.install_boot(&initramfs("sh-busybox")?, &cfg)?;
    leave_in_grubenv(&machine, &format!("extra_cmdline={NETWORK}"))?;

    let mut vm = vm.start()?;
    vm.wait_for(&format!("GRUB adds: {NETWORK}$"))?;
    let boot = Unlocked::follow(&mut vm, Mesh::Up, &[PASSPHRASE])?;
    assert_eq!((boot.outcome(), boot.timeline.mode), (Outcome::Unlocked, Mode::Online));
    Ok(())
}

/// `grub-editenv /grubenv set ASSIGNMENT` on COS_STATE.
fn leave_in_grubenv(machine: &Machine, assignment: &str) -> Result<()> {
    let work = Work::new("grubenv")?;
    let block = work.file("grubenv");
    run(Command::new("grub-editenv").arg(&block).arg("create"))?;
    run(Command::new("grub-editenv").arg(&block).args(["set", assignment]))?;
    let device = format!("{}?offset={}", machine.disk.path().display(), Image::get()?.state_start);
    run(Command::new("debugfs")
        .args(["-w", "-R", &format!("write {} /grubenv", block.display())])
        .arg(device))
    .map(drop)
}

/// A machine that unlocks by its TPM alone needs no network, and waits for none.
#[test]
fn offline_without_a_network() -> Result<()> {
    let machine = Machine::new("dracut-offline", &CloudConfig::offline(), Persistent::Plain)?;
    assert_eq!(machine.install(&[])?.code, 0);
    for variant in ["sysd-networkd", "sh-busybox"] {
        let mut vm = vm(&machine, variant, "")?.without_network().start()?;
        let boot = Unlocked::follow(&mut vm, Mesh::Up, &[])?;
        assert_eq!((boot.outcome(), boot.timeline.mode), (Outcome::Unlocked, Mode::Offline));
    }
    Ok(())
}

/// The console is never blocked: with no server to be reached, the passphrase is asked for and taken.
fn typed(variant: &str, type_line: fn(&mut RunningVm, &str) -> Result<()>) -> Result<()> {
    let name = format!("dracut-typed-{variant}");
    let (_kms, machine) =
        with_static_secret(&name, |k| CloudConfig::of(k).deadline("120s"), PASSPHRASE)?;
    let mut vm = vm(&machine, variant, NETWORK)?.secret(PASSPHRASE).start()?;
    vm.wait_for(PROMPT)?;
    // A passphrase is tried on what is there: not before the disk is.
    vm.wait_for("latchkey: .*(waiting for a route|connecting)")?;
    type_line(&mut vm, "not the passphrase")?;
    vm.wait_for("latchkey: .*does not open")?;
    vm.console().wait_for_nth(PROMPT, 2, PATIENCE)?;
    type_line(&mut vm, PASSPHRASE)?;
    let boot = Unlocked::follow(&mut vm, Mesh::Up, &[PASSPHRASE])?;
    assert_eq!(boot.outcome(), Outcome::Recovery);
    Ok(())
}

#[test]
fn passphrase_typed_with_systemd() -> Result<()> {
    typed("sysd-networkd", RunningVm::type_to_agent)
}

#[test]
fn passphrase_typed_without_systemd() -> Result<()> {
    typed("sh-busybox", RunningVm::type_line)
}

/// A volume that stays closed stops the boot: dracut's emergency handling says why, and does what rd.emergency says.
fn refused(variant: &str) -> Result<()> {
    let name = format!("dracut-refused-{variant}");
    let (mut kms, machine) =
        with_static_secret(&name, |k| CloudConfig::of(k).deadline("30s"), PASSPHRASE)?;
    kms.put_volume(&Volume { quarantined: true, ..static_volume(&machine) })?;
    kms.start()?;
    let mut vm = vm(&machine, variant, &format!("{NETWORK} {UNATTENDED}"))?.start()?;
    vm.wait_for(r"the encrypted volumes stay closed: the key server refused this machine \(30\)")?;
    // QEMU is told to end where the machine would start anew.
    vm.wait_for_power_off()?;
    assert!(!booted(&vm)?, "the boot went on with the volume closed");
    Ok(())
}

#[test]
fn refused_with_systemd() -> Result<()> {
    refused("sysd-networkd")
}

#[test]
fn refused_without_systemd() -> Result<()> {
    refused("sh-busybox")
}

/// Whoever has the emergency shell and leaves it starts another attempt.
#[test]
#[cfg(feature = "all")]
fn another_attempt_from_the_emergency_shell() -> Result<()> {
    let shells: [(&str, &[&str]); 2] =
        [("sysd-networkd", &["Press Enter for maintenance", "# ?$"]), ("sh-busybox", &["# "])];
    for (variant, prompts) in shells {
        let name = format!("dracut-again-{variant}");
        let (mut kms, machine) =
            with_static_secret(&name, |k| CloudConfig::of(k).deadline("5s"), PASSPHRASE)?;
        let mut vm = vm(&machine, variant, NETWORK)?.secret(PASSPHRASE).start()?;
        vm.wait_for(r"the encrypted volumes stay closed: .* \(2[01]\)")?;
        kms.start()?;
        for prompt in prompts {
            vm.wait_for(prompt)?;
            vm.type_line(if prompt.contains("Enter") { "" } else { "exit" })?;
        }
        let boot = Unlocked::follow(&mut vm, Mesh::Up, &[PASSPHRASE])?;
        assert_eq!(boot.outcome(), Outcome::Unlocked);
    }
    Ok(())
}

/// The kernel's command line can say that nothing is to be unlocked, and live systems say so by what they are.
#[test]
fn told_not_to() -> Result<()> {
    let (_kms, machine) =
        with_static_secret("dracut-not", |k| CloudConfig::of(k).deadline("10s"), PASSPHRASE)?;
    for (variant, word) in [("sysd-networkd", "rd.latchkey=0"), ("sh-busybox", "rd.cos.disable")] {
        let mut vm = vm(&machine, variant, word)?.start()?;
        let report = vm.report()?;
        assert_eq!(report.persistent.source, None, "{variant} {word}");
        assert!(report.timeline.is_null(), "{variant} {word}: {}", report.timeline);
    }
    Ok(())
}

fn booted(vm: &RunningVm) -> Result<bool> {
    Ok(!vm.console().matching("^REPORT ")?.is_empty())
}

/// Each of these would be a machine that cannot unlock. dracut is to fail, say what is missing and where it is to be had,
/// and leave no image.
#[test]
fn an_incomplete_image_is_not_built() -> Result<()> {
    let image = Image::get()?;
    let work = Work::new("dracut-incomplete")?;
    let lib = Path::new("/usr/lib/x86_64-linux-gnu");
    let cases: [(&str, Lack<'_>, &str, &str); 9] = [
        ("sh-busybox", Lack::Program, "kcrypt-discovery-challenger", "make install"),
        (
            "sh-busybox",
            Lack::Host(&lib.join("libtss2-tcti-device.so.0")),
            "libtss2-tcti-device.so.0",
            "libtss2-tcti-device0",
        ),
        (
            "sysd-networkd",
            Lack::Host(&lib.join("libtss2-esys.so.0")),
            "libtss2-esys.so.0",
            "libtss2-esys-3.0.2-0",
        ),
        (
            "sh-busybox",
            Lack::Host(&lib.join("libcryptsetup.so.12")),
            "libcryptsetup.so.12",
            "libcryptsetup12",
        ),
        ("sh-busybox", Lack::Host(Path::new("/usr/sbin/dmsetup")), "dmsetup", "package dmsetup"),
        (
            "sh-busybox",
            Lack::Host(Path::new("/usr/lib/udev/rules.d/95-dm-notify.rules")),
            "95-dm-notify.rules",
            "package dmsetup",
        ),
        (
            "sysd-networkd",
            Lack::Host(Path::new("/usr/bin/systemd-tty-ask-password-agent")),
            "systemd-tty-ask-password-agent",
            "systemd's package",
        ),
        ("sh-busybox", Lack::KernelModule("dm-crypt.ko"), "dm_crypt", "CONFIG_DM_CRYPT"),
        ("sysd-networkd", Lack::KernelModule("xts.ko"), "xts", "CONFIG_CRYPTO_XTS"),
    ];
    for (n, (variant, lack, missing, remedy)) in cases.into_iter().enumerate() {
        let out = work.file(&format!("out-{n}"));
        let mut command = lack.command(variant, image, &work.file(&format!("case-{n}")))?;
        match run(command.arg(&out)) {
            Ok(_) => panic!("{variant} was built without {missing}"),
            Err(Error::Tool { output, .. }) => {
                let said = output.lines().any(|l| {
                    l.contains("latchkey: ")
                        && l.contains(missing)
                        && l.contains("missing")
                        && l.contains(remedy)
                });
                assert!(said, "{variant} without {missing} said:\n{output}");
            }
            Err(other) => return Err(other),
        }
        assert!(!out.exists(), "{variant} without {missing} left an image");
    }
    Ok(())
}

/// What a build is to go without.
#[derive(Debug)]
enum Lack<'a> {
    Program,
    /// A file of the host: removed in a view of /usr of the build's own, by an overlay that ends with the build.
    Host(&'a Path),
    KernelModule(&'a str),
}

impl Lack<'_> {
    fn command(&self, variant: &str, image: &Image, work: &Path) -> Result<Command> {
        create_dir(work)?;
        match self {
            Self::Program => {
                let mut command = dracut(variant);
                command.env("LATCHKEY_KCRYPT", work.join("kcrypt-discovery-challenger"));
                Ok(command)
            }
            Self::Host(file) => {
                let (upper, workdir) = (work.join("upper"), work.join("work"));
                create_dir(&upper)?;
                create_dir(&workdir)?;
                let mount = format!(
                    "mount -t overlay overlay -o lowerdir=/usr,upperdir={},workdir={} /usr && rm {} && exec \"$@\"",
                    upper.display(),
                    workdir.display(),
                    file.display()
                );
                let mut command = Command::new("unshare");
                command.args(["--mount", "sh", "-c", &mount, "sh"]);
                command.arg(project().join("image/dracut-initramfs.sh")).arg(variant);
                // Or a finished product of the same inputs would be found.
                command.env("LATCHKEY_KERNEL", kernel_copy(image, work)?);
                Ok(command)
            }
            Self::KernelModule(name) => {
                let kernel = kernel_copy(image, work)?;
                run(Command::new("find").arg(kernel.join("lib")).args(["-name", name, "-delete"]))?;
                run(Command::new("depmod").arg("-b").arg(&kernel).arg(&image.kernel_version))?;
                let mut command = dracut(variant);
                command.env("LATCHKEY_KERNEL", &kernel);
                Ok(command)
            }
        }
    }
}

/// The kernel's folder anew, its files linked, not copied.
fn kernel_copy(image: &Image, work: &Path) -> Result<PathBuf> {
    let kernel = work.join("kernel");
    let original = image.kernel.parent().unwrap_or(Path::new("/"));
    run(Command::new("cp").arg("-al").arg(original).arg(&kernel))?;
    Ok(kernel)
}

/// Kairos' own initramfs program unlocks what it finds and calls ours as its plugin. With it in the image there is the
/// program and all it needs, and nothing of ours that would open the volumes a second time.
#[test]
fn with_immucore_only_the_plugin() -> Result<()> {
    Image::get()?;
    let work = Work::new("dracut-immucore")?;
    let immucore = work.file("modules/28immucore");
    create_dir(&immucore)?;
    write(&immucore.join("module-setup.sh"), "check() { return 255; }\n")?;
    let (with, without) = (work.file("with"), work.file("without"));
    run(dracut("sysd-legacy").arg(&with).env("LATCHKEY_BESIDE", work.file("modules")))?;
    run(dracut("sysd-legacy").arg(&without))?;
    let plugin = "system/discovery/kcrypt-discovery-challenger";
    let (with, without) = (files(&with)?, files(&without)?);
    assert!(with.contains(plugin) && without.contains(plugin));
    assert!(without.contains("latchkey-unlock.service"));
    assert!(!with.contains("latchkey-unlock.service"));
    Ok(())
}

/// The names of all files in an initramfs.
fn files(initramfs: &Path) -> Result<String> {
    run(Command::new("sh").args(["-c", "zstd -dcq \"$1\" | cpio -it --quiet", "sh"]).arg(initramfs))
}

/// What the module adds to an initramfs that has a network already, compressed. Printed, for the budget in the design.
#[test]
fn size() -> Result<()> {
    Image::get()?;
    for variant in ["sysd-networkd", "sysd-legacy", "sh-busybox"] {
        let bytes = |command: &mut Command| -> Result<u64> {
            let path = run(command)?;
            let path = Path::new(path.trim_end());
            Ok(fs::metadata(path).doing(|| format!("look at {}", path.display()))?.len())
        };
        let with = bytes(&mut dracut(variant))?;
        let without = bytes(dracut(variant).env("LATCHKEY_WITHOUT", "1"))?;
        assert!(with > without);
        println!("{variant}: {with} bytes, {} KiB of them for latchkey", (with - without) / 1024);
    }
    Ok(())
}
