//! Two machines of one fleet boot, let themselves in and are members of one mesh, over the kernel's WireGuard; and one of
//! them boots again while the registry is away.

use std::{
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    process::Command,
    time::Instant,
};

use base64::prelude::{BASE64_STANDARD, BASE64_URL_SAFE, Engine as _};
use latchkey_tests::{
    disk::Persistent,
    error::{Error, Result, run},
    kms::{Kms, Volume, secret_yaml},
    lan::{HOST, Lan},
    nats::{Client, Login, NatsServer, member_permissions, user},
    place::Image,
    scenario::{CloudConfig, INTERFACE, Machine, Mesh, Unlocked},
    shell::Shell,
};
use latchkey_wire::timeline::{Mode, Outcome};
use serde_json::{Value, json};

const PASSPHRASE: &str = "correct-horse-battery-staple-7";
const NATS_PASSWORD: &str = "mesh-registry-of-the-fleet-41";
const ADMIN: (&str, &str) = ("admin", "administrator-of-the-registry");
const HOST_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
const BUCKET: &str = "fleet-a";
const CACHE: &str = "/var/lib/latchkey/mesh-fleet-a.json";
/// More than fits into one packet of any size.
const FILE: &str = "/usr/bin/wireguard-go";
/// A mesh of some size.
const CROWD: u16 = 1000;

/// Key server, registry, and the network that they and the machines are in.
struct World {
    lan: Lan,
    kms: Kms,
    nats: NatsServer,
}

impl World {
    /// The registry has two users: who made the bucket, and the fleet's, who may do what a member must.
    fn new() -> Result<Self> {
        let lan = Lan::new("mesh-boot", HOST)?;
        let mut kms = Kms::on_lan("mesh-boot")?;
        kms.start_in(&lan)?;
        let member = member_permissions(BUCKET, &["peers.*"]);
        let nats = NatsServer::new("mesh-boot")?
            .listen(SocketAddr::from((HOST_ADDRESS, 4222)))
            .configure(&format!(
                "accounts {{ MESH {{ jetstream: enabled, users: [\n{}\n{}\n] }} }}",
                user(ADMIN.0, ADMIN.1, None),
                user("fleet", NATS_PASSWORD, Some(&member)),
            ));
        let mut world = Self { lan, kms, nats };
        world.start_registry()?;
        world.administrator(|registry| registry.create_bucket(BUCKET))?;
        Ok(world)
    }

    fn administrator<T: Send>(
        &self,
        act: impl FnOnce(&mut Client) -> Result<T> + Send,
    ) -> Result<T> {
        let login = Login::Password(ADMIN.0, ADMIN.1);
        self.lan.within(|| act(&mut self.nats.client(&login)?))?
    }

    /// So many members more, as Ikto writes them, none of which is anywhere; and then they are gone again.
    fn crowd(&self, come: bool) -> Result<()> {
        self.administrator(|registry| {
            (1..=CROWD).try_for_each(|n| {
                let range = format!("{}/128", Ipv6Addr::new(0xfd10, 5, 0, 0, 0, 0, 0, n));
                let entry = format!("peers.{}", BASE64_URL_SAFE.encode(&range));
                if !come {
                    return registry.delete(BUCKET, &entry).map(drop);
                }
                let mut key = [0; 32];
                getrandom::fill(&mut key).map_err(|e| Error::Setup(e.to_string()))?;
                let record = json!({ "name": "", "public_key": BASE64_STANDARD.encode(key),
                    "advertise_address": "10.77.0.250", "allowed_ip": range, "wg_port": 51820 });
                registry.put(BUCKET, &entry, record.to_string()).map(drop)
            })
        })
    }

    fn start_registry(&mut self) -> Result<()> {
        self.nats.start_by(|program| self.lan.command(program))
    }

    /// The same for every machine.
    fn cloud_config(&self) -> CloudConfig {
        CloudConfig::of(&self.kms)
            .mesh("registry", &format!("nats://fleet:{NATS_PASSWORD}@{HOST}:4222"))
            .mesh("bucket", BUCKET)
    }

    /// A machine with a disk, a TPM and a volume of its own.
    fn machine(&self, name: &str) -> Result<Machine> {
        let machine = Machine::new(name, &self.cloud_config(), Persistent::Luks(PASSPHRASE))?;
        let secret = format!("{name}-secret");
        self.kms.put_volume(&Volume {
            name,
            tpm_hash: machine.tpm.pubhash(),
            secret: Some((&secret, "pass")),
            quarantined: false,
        })?;
        self.kms.put(&format!("{secret}.yaml"), &secret_yaml(&secret, "pass", PASSPHRASE))?;
        Ok(machine)
    }

    fn boot(&self, machine: &Machine) -> Result<Shell> {
        let vm = machine.vm("boot")?.lan(&self.lan).secret(PASSPHRASE).secret(NATS_PASSWORD);
        // The one thing that is not the same for all, where the boot loader says it.
        Shell::boot(&machine.name, vm.append(&format!("latchkey.mesh.name={}", machine.name)))
    }
}

/// The only other member's address, once the agent has given it to the device.
fn peer(shell: &mut Shell) -> Result<String> {
    shell.until(&format!(
        "wg show {INTERFACE} allowed-ips | grep -oE 'fd10:[0-9a-f:]+/128' | grep -oE '^[^/]+'"
    ))
}

/// A packet there and back, and a file from there, which does not fit into one packet.
fn reaches(shell: &mut Shell, address: &str) -> Result<()> {
    shell.until(&format!("ping -c 1 -W 2 {address}"))?;
    shell.ok(&format!("timeout 60 cat </dev/tcp/{address}/7777 | cmp - {FILE}")).map(drop)
}

/// Whoever connects gets the file.
fn serve(shell: &mut Shell) -> Result<()> {
    shell.wait()?;
    let server = "systemd-socket-activate --listen=[::]:7777 --accept --inetd cat";
    shell.ok(&format!("systemd-run --quiet --unit=file-server {server} {FILE}"))?;
    Ok(())
}

fn status(shell: &mut Shell) -> Result<Value> {
    parse(&shell.ok("latchkey status --json")?)
}

fn parse(json: &str) -> Result<Value> {
    serde_json::from_str(json).map_err(|e| Error::Report(format!("{e} in {json}")))
}

fn until_registry_is(shell: &mut Shell, state: &str) -> Result<()> {
    shell.until(&format!("latchkey status --json | grep -E '\"state\": \"{state}\"'")).map(drop)
}

/// When the mesh was up, after the unlock, in milliseconds since the kernel started.
fn check_timeline(shell: &mut Shell) -> Result<()> {
    let boot =
        shell.until("latchkey status --boot --json | grep -B 999 -A 9 first_handshake_ms")?;
    let boot = parse(&boot)?;
    println!("{}", shell.ok("latchkey status --boot")?);
    let ms = |at: &str| {
        let number = boot.pointer(at).and_then(Value::as_u64);
        number.ok_or_else(|| Error::Report(format!("no {at} in {boot:#}")))
    };
    let steps = boot.pointer("/steps").and_then(Value::as_array).map_or(0, Vec::len);
    let unlocked = ms(&format!("/steps/{}/at_ms", steps.saturating_sub(1)))?;
    let (up, joined) = (ms("/mesh/device_up_ms")?, ms("/mesh/joined_ms")?);
    let handshake = ms("/mesh/first_handshake_ms")?;
    assert!(unlocked < up && up <= joined && up <= handshake, "{boot:#}");
    Ok(())
}

/// Where the members are kept: on the unlocked disk, for root alone, and without the private key.
fn check_cache(shell: &mut Shell) -> Result<()> {
    let mode = shell.until(&format!("stat -c '%U %a' {CACHE}"))?;
    assert_eq!(mode, "root 600");
    let source = shell.ok(&format!("findmnt -no SOURCE -T {CACHE}"))?;
    assert_eq!(source, "/dev/mapper/COS_PERSISTENT[/.state/var-lib-latchkey.bind]");
    let key = format!("\"$(wg show {INTERFACE} private-key)\"");
    let copies = shell.run(&format!("grep -rlsF -e {key} /var /etc /root /usr/local /run /tmp"))?;
    assert_eq!((copies.code, copies.text()), (1, String::new()), "a copy of the private key");
    Ok(())
}

/// Many peers on the kernel's device: all are there, an agent that starts again changes none, and they go when their
/// records do.
fn check_crowd(world: &World, shell: &mut Shell) -> Result<()> {
    let count = format!("wg show {INTERFACE} allowed-ips | grep -c /128");
    let written = Instant::now();
    world.crowd(true)?;
    shell.until(&format!("[ $({count}) = {} ]", CROWD + 1))?;
    println!("{CROWD} more peers on the device after {} ms", written.elapsed().as_millis());
    println!("{}", shell.ok("systemctl show latchkey -p MemoryCurrent -p CPUUsageNSec")?);

    let list = format!("wg show {INTERFACE} allowed-ips | sort");
    shell.ok(&format!("{list} >/run/before; systemctl restart latchkey"))?;
    until_registry_is(shell, "joined")?;
    // The whole of it would take the console a minute.
    shell.ok("latchkey status --json >/run/status")?;
    let untouched = shell.ok(r#"grep -cE '"peers_(set|removed)": 0,?$' /run/status"#)?;
    let shown = shell.ok(r#"grep -c '"on_device": true' /run/status"#)?;
    assert_eq!((untouched.as_str(), shown), ("2", (CROWD + 1).to_string()));
    shell.ok(&format!("{list} | cmp - /run/before"))?;

    world.crowd(false)?;
    shell.until(&format!("[ $({count}) = 1 ]")).map(drop)
}

/// Powers the machine off, by its report; checks all that holds of a good boot.
fn power_off(shell: Shell) -> Result<Unlocked> {
    let mut vm = shell.leave()?;
    let boot = Unlocked::follow(&mut vm, Mesh::Up, &[PASSPHRASE, NATS_PASSWORD])?;
    assert_eq!((boot.outcome(), boot.timeline.mode), (Outcome::Unlocked, Mode::Online));
    Ok(boot)
}

/// The registry's password stands in the cloud-config on COS_OEM, and nowhere else on the disk.
fn check_disk(machine: &Machine) -> Result<()> {
    let grep = ["--byte-offset", "--only-matching", "--text", "--fixed-strings", NATS_PASSWORD];
    let found = run(Command::new("grep").args(grep).arg(machine.disk.path()))?;
    let image = Image::get()?;
    let oem = image.oem_start..image.oem_start + image.oem_size;
    for place in found.lines().filter_map(|line| line.split(':').next()?.parse::<u64>().ok()) {
        assert!(oem.contains(&place), "at byte {place} of {}", machine.name);
    }
    assert!(!found.is_empty(), "it is searched for in the right form");
    Ok(())
}

#[test]
fn two_machines_unlock_and_reach_each_other_also_when_the_registry_is_away() -> Result<()> {
    let mut world = World::new()?;
    let (one, two) = (world.machine("mesh-one")?, world.machine("mesh-two")?);
    let (mut a, mut b) = (world.boot(&one)?, world.boot(&two)?);
    serve(&mut a)?;
    serve(&mut b)?;

    let (address_of_b, address_of_a) = (peer(&mut a)?, peer(&mut b)?);
    assert_ne!(address_of_a, address_of_b);
    reaches(&mut a, &address_of_b)?;
    reaches(&mut b, &address_of_a)?;
    check_timeline(&mut a)?;
    check_timeline(&mut b)?;
    until_registry_is(&mut a, "joined")?;
    println!("{}", a.ok("latchkey status")?);
    let info = a.ok("latchkey info")?;
    let (names, _) = info.split_once("Peers:").ok_or_else(|| Error::Report(info.clone()))?;
    assert!(names.contains("Name: mesh-one\n") && info.contains("Name: mesh-two\n"), "{info}");
    check_cache(&mut a)?;

    // The registry is gone: nothing is removed, and a machine that boots comes up with whom it knew.
    world.nats.kill();
    until_registry_is(&mut a, "away")?;
    reaches(&mut a, &address_of_b)?;
    let before = power_off(a)?;
    let mut a = world.boot(&one)?;
    serve(&mut a)?;
    assert_eq!(peer(&mut a)?, address_of_b);
    // Its own address is another, as its network card is; so it speaks first.
    reaches(&mut a, &address_of_b)?;
    reaches(&mut b, &address_of_a)?;
    let away = status(&mut a)?;
    assert_eq!(away.pointer("/device/backend"), Some(&"kernel".into()), "{away:#}");
    assert_eq!(away.pointer("/agent/registry/state"), Some(&"away".into()), "{away:#}");
    assert_eq!(away.pointer("/agent/registry/from_cache"), Some(&true.into()), "{away:#}");
    println!("{}", a.ok("latchkey status")?);

    world.start_registry()?;
    until_registry_is(&mut a, "joined")?;
    until_registry_is(&mut b, "joined")?;
    check_timeline(&mut a)?;
    reaches(&mut b, &address_of_a)?;

    let after = power_off(a)?;
    assert_eq!(before.public_key(), after.public_key());
    check_crowd(&world, &mut b)?;
    power_off(b)?;
    check_disk(&one)?;
    check_disk(&two)
}
