//! One member of a mesh under test: a host with a key, a configuration, an agent that may run or not, and a WireGuard device
//! that outlives it.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, BTreeSet},
    fs,
    io::Write,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use base64::prelude::{BASE64_URL_SAFE, Engine as _};
use nix::sys::signal::{Signal, kill};
use serde_json::{Value, json};

use super::{
    PATIENCE, PREFIX, eventually,
    namespace::{Daemon, Namespace, pid},
    registry::BUCKET,
    traffic::{self, Echo, Stream},
};
use crate::{
    error::{Doing, Error, Result, create_dir, run, write},
    place,
};

pub const INTERFACE: &str = "wg-ikto";
pub const WG_PORT: u16 = 51820;
/// The network of the cloud-configs, which the identity is for.
pub const NETWORK: &str = "fleet-a";

/// What an agent is told.
#[derive(Debug, Clone)]
pub enum Config {
    /// An `ikto.json`.
    Ikto(Value),
    /// The keys of `latchkey.mesh` in the machine's cloud-config; the identity is handed over as the initramfs leaves it.
    Cloud(BTreeMap<String, String>),
}

/// One peer of a device, as wg(8) shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    pub endpoint: Option<String>,
    pub allowed_ips: BTreeSet<String>,
    /// Seconds since 1970; 0 for never.
    pub handshake: u64,
    pub received: u64,
    pub sent: u64,
    /// `off`, or seconds.
    pub keepalive: String,
}

#[derive(Debug)]
pub struct Host {
    pub name: String,
    pub site: Namespace,
    pub config: RefCell<Config>,
    /// WireGuard's keys in base64.
    pub private_key: RefCell<String>,
    pub public_key: RefCell<String>,
    n: usize,
    log: String,
    folder: PathBuf,
    underlay: Cell<Ipv4Addr>,
    daemon: RefCell<Option<Daemon>>,
    starts: Cell<u32>,
    _echo: Echo,
}

impl Host {
    pub(super) fn new(
        mesh: &str,
        n: usize,
        site: Namespace,
        folder: PathBuf,
        registry: &str,
    ) -> Result<Self> {
        create_dir(&folder)?;
        let (private_key, public_key) = key_pair()?;
        let echo = Echo::start(&site)?;
        let host = Self {
            name: format!("h{n}"),
            site,
            config: RefCell::new(Config::Cloud(BTreeMap::new())),
            private_key: RefCell::new(private_key),
            public_key: RefCell::new(public_key),
            n,
            log: format!("{mesh}-h{n}"),
            folder,
            underlay: Cell::new(super::underlay(n, 2)),
            daemon: RefCell::new(None),
            starts: Cell::new(0),
            _echo: echo,
        };
        *host.config.borrow_mut() = Config::Ikto(host.ikto_json(registry));
        Ok(host)
    }

    /// What `ikto init` and an operator would write for it. The prefix is its own, the address not the prefix's first.
    fn ikto_json(&self, registry: &str) -> Value {
        json!({
            "name": self.name,
            "advertise_address": self.underlay().to_string(),
            "private_address": self.fixed_address().to_string(),
            "subnet_prefix": 48,
            "mesh_cidr": PREFIX,
            "wg_dev_name": INTERFACE,
            "wg_port": WG_PORT,
            "private_key_path": self.folder.join("key"),
            "nats_creds": "",
            "nats_url": registry,
            "nats_kv": BUCKET,
        })
    }

    /// The address in its `ikto.json`: `fd10:0:N::1`.
    pub fn fixed_address(&self) -> Ipv6Addr {
        Ipv6Addr::new(0xfd10, 0, u16::try_from(self.n).unwrap_or(0), 0, 0, 0, 0, 1)
    }

    /// As in its record: `fd10:0:N::1/48`.
    pub fn fixed_cidr(&self) -> String {
        format!("{}/48", self.fixed_address())
    }

    /// The registry's key of [`Host::fixed_cidr`].
    pub fn record_key(&self) -> String {
        key_of(&self.fixed_cidr())
    }

    /// Where the others dial it now.
    pub fn underlay(&self) -> Ipv4Addr {
        self.underlay.get()
    }

    /// Changes one key of the configuration, in either form.
    pub fn set(&self, key: &str, value: impl Into<Value>) {
        let value = value.into();
        match &mut *self.config.borrow_mut() {
            Config::Ikto(Value::Object(fields)) => drop(fields.insert(key.to_owned(), value)),
            Config::Ikto(_) => {}
            Config::Cloud(keys) => {
                let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
                keys.insert(key.to_owned(), text);
            }
        }
    }

    /// From now on the agent is configured by the machine's cloud-config, and its address follows from its key.
    pub fn by_cloud_config(&self, registry: &str) {
        let keys = [
            ("network", NETWORK),
            ("prefix", PREFIX),
            ("interface", INTERFACE),
            ("name", &self.name),
            ("registry", registry),
            ("bucket", BUCKET),
        ];
        let keys = keys.map(|(key, value)| (key.to_owned(), value.to_owned()));
        *self.config.borrow_mut() = Config::Cloud(keys.into());
    }

    /// What a boot does before the agent's first start: the initramfs hands over an identity. For [`Config::Cloud`].
    pub fn boot(&self) -> Result<()> {
        let identity = json!({
            "version": 1, "network": NETWORK, "private_key": *self.private_key.borrow(),
            "volume": "11111111-2222-3333-4444-555555555555",
        });
        self.sh("rm -f /run/latchkey/handover.json")?;
        write(&self.inside("/run/latchkey/identity"), identity.to_string())
    }

    /// A path in the host's own files, as seen from here.
    pub fn inside(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.site.id()))
    }

    /// The admin service's socket.
    pub fn socket(&self) -> PathBuf {
        self.folder.join("s")
    }

    /// The file that `-c` names, or the folder that `--cloud-config` does.
    fn config_path(&self) -> PathBuf {
        match &*self.config.borrow() {
            Config::Ikto(_) => self.folder.join("ikto.json"),
            Config::Cloud(_) => self.folder.join("oem"),
        }
    }

    fn write_config(&self) -> Result<()> {
        let path = self.config_path();
        match &*self.config.borrow() {
            Config::Ikto(json) => {
                let key = self.folder.join("key");
                write(&key, format!("{}\n", self.private_key.borrow()))?;
                fs::set_permissions(&key, fs::Permissions::from_mode(0o600))
                    .doing(|| format!("protect {}", key.display()))?;
                write(&path, format!("{json:#}"))
            }
            Config::Cloud(keys) => {
                create_dir(&path)?;
                let mut yaml = String::from("#cloud-config\nlatchkey:\n  mesh:\n");
                for (key, value) in keys {
                    yaml += &format!("    {key}: {}\n", json!(value));
                }
                write(&path.join("mesh.yaml"), yaml)
            }
        }
    }

    /// `latchkey VERB` with the configuration as it was last written, not yet run.
    fn command(&self, verb: &[&str]) -> Result<Command> {
        let mut command = Command::new(program()?);
        match &*self.config.borrow() {
            Config::Ikto(_) => command.args(verb).arg("-c").arg(self.config_path()),
            Config::Cloud(_) => command.arg("--cloud-config").arg(self.config_path()).args(verb),
        };
        Ok(command)
    }

    /// Starts the agent.
    pub fn start(&self) -> Result<()> {
        self.write_config()?;
        let mut command = self.command(&["agent"])?;
        command.arg("-s").arg(self.socket());
        command.env("LATCHKEY_LOG", "info,latchkey=debug,latchkey_mesh=debug");
        self.start_command(&command)
    }

    /// Starts another agent, one that has `ikto agent`'s arguments.
    pub fn start_program(&self, program: &Path) -> Result<()> {
        self.write_config()?;
        let mut command = Command::new(program);
        command.arg("agent").arg("-c").arg(self.config_path()).arg("-s").arg(self.socket());
        self.start_command(&command)
    }

    fn start_command(&self, command: &Command) -> Result<()> {
        self.starts.set(self.starts.get() + 1);
        let log = format!("{}-{}", self.log, self.starts.get());
        let daemon =
            Daemon::start(&self.site, &format!("the agent of {}", self.name), &log, command)?;
        *self.daemon.borrow_mut() = Some(daemon);
        Ok(())
    }

    /// Ends the agent at once, as `kill -9`.
    pub fn kill(&self) {
        *self.daemon.borrow_mut() = None;
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.with_agent(|daemon| daemon.signal(signal))
    }

    /// SIGTERM, and the exit code.
    pub fn stop(&self) -> Result<Option<i32>> {
        self.signal(Signal::SIGTERM)?;
        self.exit_code()
    }

    /// Waits until the agent ends by itself; its exit code.
    pub fn exit_code(&self) -> Result<Option<i32>> {
        let mut daemon = self.daemon.borrow_mut();
        daemon.as_mut().ok_or_else(|| self.no_agent())?.wait_for_end()
    }

    /// SIGHUP, after the configuration has been written anew.
    pub fn reload(&self) -> Result<()> {
        self.write_config()?;
        self.signal(Signal::SIGHUP)
    }

    /// Waits until the agent logs this.
    pub fn says(&self, pattern: &str) -> Result<()> {
        self.with_agent(|daemon| daemon.wait_for(pattern).map(drop))
    }

    /// How often the agent has logged this since its start.
    pub fn said(&self, pattern: &str) -> Result<usize> {
        self.with_agent(|daemon| daemon.said().matching(pattern).map(|lines| lines.len()))
    }

    /// The agent's process.
    pub fn agent_id(&self) -> Result<u32> {
        self.with_agent(|daemon| Ok(daemon.id()))
    }

    fn with_agent<T>(&self, what: impl FnOnce(&Daemon) -> Result<T>) -> Result<T> {
        what(self.daemon.borrow().as_ref().ok_or_else(|| self.no_agent())?)
    }

    fn no_agent(&self) -> Error {
        Error::Setup(format!("no agent was started on {}", self.name))
    }

    /// `PROGRAM ARGUMENTS` in this host to its end: what it printed.
    pub fn run(&self, program: &Path, arguments: &[&str]) -> Result<String> {
        run(self.site.command(program).args(arguments))
    }

    /// `latchkey ARGUMENTS` likewise.
    pub fn latchkey(&self, arguments: &[&str]) -> Result<String> {
        self.run(&program()?, arguments)
    }

    /// `latchkey VERB` with this host's configuration, to its good end: all it said.
    pub fn operate(&self, verb: &[&str], further: &[&str]) -> Result<String> {
        self.write_config()?;
        let command = self.command(verb)?;
        let mut inside = self.site.command("sh");
        inside.args(["-c", "exec \"$@\" 2>&1", "sh"]);
        run(inside.arg(command.get_program()).args(command.get_args()).args(further))
    }

    /// `latchkey status --json`.
    pub fn status(&self) -> Result<Value> {
        let status = self.command(&["status"])?;
        let mut inside = self.site.command(status.get_program());
        inside.args(status.get_args()).arg("--json").arg("--socket").arg(self.socket());
        // It has an exit code of its own for a mesh that is not up, and shows it all the same.
        let output = inside.output().doing(|| "run latchkey status".into())?;
        serde_json::from_slice(&output.stdout).map_err(|e| {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            let name = &self.name;
            Error::Setup(format!("latchkey status --json on {name} printed no JSON: {e}; {said}"))
        })
    }

    /// What Ikto leaves behind, and then fails on.
    pub fn remove_socket(&self) -> Result<()> {
        let socket = self.socket();
        if !socket.exists() {
            return Ok(());
        }
        fs::remove_file(&socket).doing(|| format!("remove {}", socket.display()))
    }

    /// From now on names are asked for at this address.
    pub fn ask_dns_at(&self, server: &str) -> Result<()> {
        let file = self.folder.join("resolv.conf");
        write(&file, format!("nameserver {server}\noptions timeout:1 attempts:2\n"))?;
        // It may be a link to somewhere below /run, which is empty here.
        self.sh(&format!(
            "f=$(readlink -m /etc/resolv.conf); mkdir -p \"${{f%/*}}\"; [ -e \"$f\" ] || : >\"$f\"
             mount --bind {} \"$f\"",
            file.display()
        ))
        .map(drop)
    }

    /// A tool in this host by the shell; what it printed.
    pub fn sh(&self, script: &str) -> Result<String> {
        run(self.site.command("sh").args(["-ec", script]))
    }

    /// Brings up wireguard-go before the agent, as who has no kernel module does for Ikto.
    pub fn start_wireguard_go(&self) -> Result<()> {
        let mut daemon = self.site.daemon("wireguard-go");
        // It holds on to them for as long as it lives.
        run(daemon.arg(INTERFACE).stdout(Stdio::null()).stderr(Stdio::null()))?;
        eventually("wireguard-go has a device", || {
            Ok(run(self.site.command("wg").args(["show", INTERFACE])).ok().map(drop))
        })
    }

    /// Kills wireguard-go, its device with it.
    pub fn kill_wireguard_go(&self) -> Result<()> {
        let found = self.site.processes("wireguard-go")?;
        if found.is_empty() {
            return Err(Error::Setup(format!("no wireguard-go runs on {}", self.name)));
        }
        for id in &found {
            kill(pid(*id), Signal::SIGKILL)
                .map_err(std::io::Error::from)
                .doing(|| format!("kill process {id}"))?;
        }
        eventually("wireguard-go is gone", || {
            let left = self.site.processes("wireguard-go")?;
            Ok((!left.iter().any(|id| found.contains(id))).then_some(()))
        })
    }

    /// The device's peers by public key; none without a device.
    pub fn peers(&self) -> BTreeMap<String, Peer> {
        let shown = run(self.site.command("wg").args(["show", INTERFACE, "dump"]));
        shown.unwrap_or_default().lines().skip(1).filter_map(peer).collect()
    }

    /// One field of the device: `wg show wg-ikto FIELD`.
    pub fn wg(&self, field: &str) -> Result<String> {
        run(self.site.command("wg").args(["show", INTERFACE, field])).map(|t| t.trim().to_owned())
    }

    /// The device's global addresses with their masks; none without a device.
    pub fn addresses(&self) -> Vec<String> {
        let shown =
            run(self.site.command("ip").args(["-json", "address", "show", "dev", INTERFACE]));
        let shown: Value = serde_json::from_str(&shown.unwrap_or_default()).unwrap_or_default();
        let addresses = shown.pointer("/0/addr_info").and_then(Value::as_array);
        let global =
            addresses.into_iter().flatten().filter(|a| a.get("scope") == Some(&json!("global")));
        global
            .filter_map(|a| Some(format!("{}/{}", a.get("local")?.as_str()?, a.get("prefixlen")?)))
            .collect()
    }

    /// The overlay address, as soon as the device has one.
    pub fn overlay(&self) -> Result<IpAddr> {
        eventually(&format!("{} has a mesh address", self.name), || {
            let found = self.addresses().into_iter().next();
            Ok(found.and_then(|a| a.split('/').next().and_then(|a| a.parse().ok())))
        })
    }

    /// Packets of the overlay get from here to there and back, small and of full length.
    pub fn reaches(&self, other: &Self) -> Result<()> {
        let to = other.overlay()?;
        if !traffic::answers(&self.site, to, PATIENCE)? {
            return Err(Error::Setup(format!(
                "{} does not reach {} at {to}\n{}\n{}",
                self.name,
                other.name,
                self.sh("wg show; ip address; ip -6 route").unwrap_or_default(),
                other.sh("wg show; ip address; ip -6 route").unwrap_or_default(),
            )));
        }
        traffic::carries_tcp(&self.site, to)
    }

    /// Whether a packet gets to this address of the overlay and back within a time.
    pub fn is_answered(&self, to: IpAddr, within: Duration) -> Result<bool> {
        traffic::answers(&self.site, to, within)
    }

    /// Numbered packets to another host and back.
    pub fn stream_to(&self, other: &Self) -> Result<Stream> {
        Stream::start(&self.site, other.overlay()?)
    }

    /// Takes the network cable out.
    pub fn unplug(&self) -> Result<()> {
        self.sh("ip link set eth0 down").map(drop)
    }

    /// Puts it back, where its address may be another: 10.99.N.`last`.
    pub fn plug_in(&self, last: u8) -> Result<()> {
        let address = super::underlay(self.n, last);
        self.underlay.set(address);
        let router = super::underlay(self.n, 1);
        self.sh(&format!(
            "ip address flush dev eth0; ip link set eth0 up; ip address add {address}/24 dev eth0
             ip route replace default via {router}"
        ))
        .map(drop)
    }

    /// A new key pair, as after a re-installation.
    pub fn new_key(&self) -> Result<()> {
        let (private_key, public_key) = key_pair()?;
        *self.private_key.borrow_mut() = private_key;
        *self.public_key.borrow_mut() = public_key;
        Ok(())
    }

    /// Makes it the member that another one is: the same key pair.
    pub fn take_key_of(&self, other: &Self) {
        *self.private_key.borrow_mut() = other.private_key.borrow().clone();
        *self.public_key.borrow_mut() = other.key();
    }

    /// The public key's text.
    pub fn key(&self) -> String {
        self.public_key.borrow().clone()
    }

    /// Its files, for what an agent leaves on disk.
    pub fn read_inside(&self, path: &str) -> Result<String> {
        let path = self.inside(path);
        fs::read_to_string(&path).doing(|| format!("read {}", path.display()))
    }
}

/// One line of `wg show … dump`.
fn peer(line: &str) -> Option<(String, Peer)> {
    let fields: Vec<&str> = line.split('\t').collect();
    let [key, _psk, endpoint, allowed_ips, handshake, received, sent, keepalive] =
        fields.as_slice()
    else {
        return None;
    };
    let some = |text: &str| (text != "(none)").then(|| text.to_owned());
    let allowed_ips = some(allowed_ips).unwrap_or_default();
    let peer = Peer {
        endpoint: some(endpoint),
        allowed_ips: allowed_ips.split(',').filter(|a| !a.is_empty()).map(str::to_owned).collect(),
        handshake: handshake.parse().ok()?,
        received: received.parse().ok()?,
        sent: sent.parse().ok()?,
        keepalive: (*keepalive).to_owned(),
    };
    Some(((*key).to_owned(), peer))
}

/// The registry's key of an address (protocols/ikto-kilo.md §1.4), by other code than the agent's.
pub fn key_of(cidr: &str) -> String {
    format!("peers.{}", BASE64_URL_SAFE.encode(cidr))
}

/// Private and public key by wg(8).
pub fn key_pair() -> Result<(String, String)> {
    let private = run(Command::new("wg").arg("genkey"))?.trim().to_owned();
    let mut pubkey = Command::new("wg");
    let mut child = pubkey
        .arg("pubkey")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .doing(|| "run wg pubkey".into())?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(private.as_bytes()).doing(|| "give wg pubkey a key".into())?;
    }
    let output = child.wait_with_output().doing(|| "run wg pubkey".into())?;
    Ok((private, String::from_utf8_lossy(&output.stdout).trim().to_owned()))
}

fn program() -> Result<PathBuf> {
    let program = place::agent_program();
    if program.exists() {
        return Ok(program);
    }
    let path = program.display();
    Err(Error::Setup(format!("no agent at {path}: run image/programs.sh")))
}
