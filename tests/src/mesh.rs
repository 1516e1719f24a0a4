//! Meshes in network namespaces: hosts with real WireGuard devices (wireguard-go where the kernel has none), real agents and
//! a real nats-server, and a router between them. Made as root; everything ends with the [`Mesh`].
//!
//! | who | address |
//! |---|---|
//! | host N, from 1 on | 10.99.N.2, or another last byte after a move; the overlay `fd10:0:N::1/48` by `ikto.json` |
//! | nats-server N, from 1 on | 10.99.(200+N).2 |
//! | the router | the first address of each of these networks |

mod host;
mod namespace;
mod registry;
mod traffic;

use std::{
    net::Ipv4Addr,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use crate::{
    error::{Error, Result, run},
    place::Work,
};

pub use host::{Config, Host, INTERFACE, NETWORK, Peer, WG_PORT, key_of, key_pair};
pub use namespace::{Daemon, Namespace};
pub use registry::{BUCKET, Record, Registry, Server};
pub use traffic::{Count, Stream};

/// The overlay of every mesh under test.
pub const PREFIX: &str = "fd10::/16";
/// How long anything may take before it counts as not happening. Nothing is asserted of how long it takes below that.
pub const PATIENCE: Duration = Duration::from_secs(90);
/// Networks of nats-servers begin behind those of hosts.
const SERVERS: usize = 200;

/// Hosts, a router, a registry.
#[derive(Debug)]
pub struct Mesh {
    pub hosts: Vec<Host>,
    pub registry: Registry,
    router: Namespace,
    _work: Work,
}

impl Mesh {
    /// Hosts that are configured, with a registry that runs and has the bucket. No agent runs yet.
    pub fn new(name: &str, hosts: usize) -> Result<Self> {
        let mesh = Self::with_servers(name, hosts, 1)?;
        mesh.registry.create_bucket()?;
        Ok(mesh)
    }

    /// The same with several nats-servers in a cluster, and no bucket.
    pub fn with_servers(name: &str, hosts: usize, servers: usize) -> Result<Self> {
        let work = Work::new(name)?;
        let router = Namespace::new()?;
        let addresses: Vec<_> = (1..=servers).map(|n| underlay(SERVERS + n, 2)).collect();
        let mut nats = Vec::new();
        for (n, &address) in (1..).zip(&addresses) {
            let site = attach(&router, SERVERS + n)?;
            nats.push(Server::new(&format!("{name}-{n}"), site, address, &addresses)?);
        }
        let registry = Registry::of(nats)?;
        let mut members = Vec::new();
        for n in 1..=hosts {
            let url = registry.url(&format!("h{n}"));
            let host = Host::new(name, n, attach(&router, n)?, work.file(&format!("h{n}")), &url)?;
            registry.permit(&host.name, &[&host.record_key()])?;
            members.push(host);
        }
        registry.start()?;
        Ok(Self { hosts: members, registry, router, _work: work })
    }

    /// All hosts by cloud-config, with addresses from their keys.
    pub fn by_cloud_config(name: &str, hosts: usize) -> Result<Self> {
        let mesh = Self::new(name, hosts)?;
        for host in &mesh.hosts {
            mesh.registry.permit(&host.name, &["peers.*"])?;
            host.by_cloud_config(&mesh.registry.url(&host.name));
            host.boot()?;
        }
        mesh.registry.reload()?;
        Ok(mesh)
    }

    /// Starts all agents.
    pub fn start(&self) -> Result<()> {
        self.hosts.iter().try_for_each(Host::start)
    }

    /// Each host reaches each other one.
    pub fn connected(&self) -> Result<()> {
        for from in &self.hosts {
            for to in self.hosts.iter().filter(|to| to.name != from.name) {
                from.reaches(to)?;
            }
        }
        Ok(())
    }

    /// Starts all agents and waits until each host reaches each other one.
    pub fn up(&self) -> Result<()> {
        self.start()?;
        self.connected()
    }

    /// From now on the router loses every packet to and from the registry, and tells nobody.
    pub fn partition(&self) -> Result<()> {
        self.routes("add")
    }

    pub fn heal(&self) -> Result<()> {
        self.routes("delete")
    }

    fn routes(&self, action: &str) -> Result<()> {
        for server in &self.registry.servers {
            let to = format!("{}/32", server.address);
            run(self.router.command("ip").args(["route", action, "blackhole", &to]))?;
        }
        Ok(())
    }

    /// A tool on the router.
    pub fn router(&self, program: &str) -> Command {
        self.router.command(program)
    }
}

fn underlay(network: usize, last: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 99, u8::try_from(network).unwrap_or(u8::MAX), last)
}

/// A new host in network 10.99.N.0/24, with the router's cable in its eth0.
fn attach(router: &Namespace, network: usize) -> Result<Namespace> {
    let site = Namespace::new()?;
    let (own, gateway) = (underlay(network, 2), underlay(network, 1));
    let port = format!("to{network}");
    let id = site.id().to_string();
    let link = ["link", "add", "name", &port, "type", "veth", "peer", "name", "eth0", "netns", &id];
    run(router.command("ip").args(link))?;
    let addressed = format!("ip address add {gateway}/24 dev {port}; ip link set {port} up");
    run(router.command("sh").args(["-ec", &addressed]))?;
    let addressed = format!(
        "ip address add {own}/24 dev eth0; ip link set eth0 up; ip route add default via {gateway}"
    );
    run(site.command("sh").args(["-ec", &addressed]))?;
    Ok(site)
}

/// Looks again and again until there is something.
pub fn eventually<T>(what: &str, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        if Instant::now() >= deadline {
            let seconds = PATIENCE.as_secs();
            return Err(Error::Setup(format!("waited {seconds} s in vain until {what}")));
        }
        thread::sleep(Duration::from_millis(50));
    }
}
