//! The mesh agent among 1,000 and 5,000 members: from its start to a device that has them all, from a put in the registry to
//! the device, and what it costs to be there. With a real nats-server and wireguard-go, in namespaces, as a member with the
//! least permissions.
//!
//! wg(8) sets the same peers on the same kind of device in the same run: what wireguard-go itself takes is in both.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr};
use std::process::Stdio;
use std::time::{Duration, Instant, SystemTime};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use latchkey_mesh::address::DeviceAddress;
use latchkey_mesh::device::{Backend, requests_length};
use latchkey_mesh::key::{PrivateKey, PublicKey};
use latchkey_mesh::plan::{Actual, Desired, DesiredPeer, Memory, Peer, plan};
use latchkey_tests::mesh::{BUCKET, Host, INTERFACE, Mesh};
use latchkey_tests::nats::Client;
use latchkey_tests::place::Work;
use latchkey_wire::member::{Cidr, Extension, Member, key_of};
use sha2::{Digest, Sha256};

use crate::median;
use crate::process::{cpu, memory};

const PUTS: usize = 20;
const IDLE: Duration = Duration::from_secs(20);
/// A second device, for wg(8).
const REFERENCE: &str = "wg-bench";
/// Real ikto 7c34fa7 on a machine of two cores, with wireguard-go, from start to "continuous synchronization"
/// (protocols/ikto-kilo.md §1.10): seconds, and MB of resident memory.
const IKTO: [(usize, f64, f64); 2] = [(1000, 0.19, 16.5), (5000, 0.58, 22.8)];

/// Another member of the mesh, who is not there.
struct Other {
    number: usize,
    private_key: PrivateKey,
    member: Member,
}

/// What one start cost.
struct Start {
    what: String,
    peers: usize,
    millis: f64,
    cpu: f64,
    peak: f64,
}

pub(crate) fn run() {
    println!(
        "The mesh agent, with nats-server and wireguard-go on this machine. The budget for 1,000 peers: 100 ms, 19.1 MiB;\n\
         from a put to the device: 10 ms\n"
    );
    println!(
        "{:44} {:>8} {:>9} {:>9} {:>10}",
        "from start to all peers on the device", "peers", "ms", "CPU ms", "peak MiB"
    );
    let others: Vec<Other> = (0..5000).map(Other::new).collect();
    let mut starts = Vec::new();
    let mut tables = Vec::new();
    for (peers, ..) in IKTO {
        let others = &others[..peers];
        let mesh = mesh_of(others, |other| other.member.to_json());
        let host = &mesh.hosts[0];
        starts.push(start(host, peers, "latchkey agent, records of Ikto agents"));
        tables.push(while_it_runs(&mesh, host, others));
        host.stop().expect("the agent stops");
        starts.push(again(host, peers));
        host.stop().expect("the agent stops");
        reference(host, others, &mut starts);

        // The same members, if all were ours: each has signed its record.
        let mesh = mesh_of(others, Other::signed);
        starts.push(start(&mesh.hosts[0], peers, "latchkey agent, signed records, verified"));
    }
    for (peers, seconds, megabytes) in IKTO {
        println!(
            "{:44} {peers:>8} {:>9.0} {:>9} {:>10.1}",
            "ikto agent, elsewhere (reference)",
            seconds * 1e3,
            "",
            megabytes * 1e6 / 1024.0 / 1024.0
        );
    }
    ratios(&starts);
    tables.iter().for_each(|table| println!("{table}"));
    bytes(&others);
}

impl Other {
    fn new(number: usize) -> Self {
        let seed: [u8; 32] = Sha256::digest(format!("member {number}")).into();
        let private_key = PrivateKey::new(&seed);
        let [high, low] = u16::try_from(number).unwrap().to_be_bytes();
        let member = Member {
            name: format!("node-{number}"),
            public_key: *private_key.public().as_bytes(),
            advertise_address: Ipv4Addr::new(10, 98, high, low).to_string(),
            allowed_ip: format!("fd10:1:{number:x}::/48").parse().unwrap(),
            wg_port: 51820,
            extension: None,
        };
        Self { number, private_key, member }
    }

    fn public_key(&self) -> PublicKey {
        PublicKey::new(self.member.public_key)
    }

    fn signed(&self) -> String {
        let member = Member { extension: Some(Extension::default()), ..self.member.clone() };
        member.to_signed_json(BUCKET, self.private_key.as_bytes())
    }

    /// The same at another address.
    fn moved(&self) -> Member {
        Member {
            advertise_address: format!("10.97.{}.1", self.number % 250),
            ..self.member.clone()
        }
    }

    fn endpoint(&self) -> SocketAddr {
        SocketAddr::new(self.member.advertise_address.parse().unwrap(), self.member.wg_port)
    }
}

/// One host, with a device and no agent so far, and all others' records in the registry.
fn mesh_of(others: &[Other], value: impl Fn(&Other) -> String) -> Mesh {
    let mesh = Mesh::new(&format!("bench-{}", others.len()), 1).expect("a mesh");
    let put = |client: &mut Client| {
        others.iter().try_for_each(|other| {
            client.put(BUCKET, &key_of(&other.member.allowed_ip), value(other)).map(drop)
        })
    };
    mesh.registry.ask(put).expect("the records are put");
    mesh.hosts[0].start_wireguard_go().expect("wireguard-go starts");
    mesh
}

/// Of an agent that knows nothing, on an empty device that is there already.
fn start(host: &Host, peers: usize, what: &str) -> Start {
    let began = Instant::now();
    host.start().expect("the agent starts");
    host.says(&format!("{INTERFACE}: {peers} peers set")).expect("all peers are set");
    told(host, peers, what, began.elapsed())
}

/// Of one that finds the device as it left it.
fn again(host: &Host, peers: usize) -> Start {
    let began = Instant::now();
    host.start().expect("the agent starts");
    host.says(&format!("{INTERFACE}: as it should be")).expect("nothing is to be done");
    told(host, peers, "the same again: nothing to be done", began.elapsed())
}

fn told(host: &Host, peers: usize, what: &str, took: Duration) -> Start {
    let start = Start {
        what: what.into(),
        peers,
        millis: took.as_secs_f64() * 1e3,
        cpu: cpu(pid(host)).as_secs_f64() * 1e3,
        peak: memory(pid(host), "VmHWM:"),
    };
    start.tell();
    start
}

impl Start {
    fn tell(&self) {
        let Self { what, peers, millis, cpu, peak } = self;
        let shown = |value: f64, decimals: usize| {
            if value.is_nan() { String::new() } else { format!("{value:.decimals$}") }
        };
        println!(
            "{what:44} {peers:>8} {millis:>9.0} {:>9} {:>10}",
            shown(*cpu, 0),
            shown(*peak, 1)
        );
    }
}

/// The same peers by wg(8): onto an empty device, again with nothing to do, and with one that has moved.
fn reference(host: &Host, others: &[Other], starts: &mut Vec<Start>) {
    let work = Work::new("bench-wg").expect("a work folder");
    let mut daemon = host.site.daemon("wireguard-go");
    let status = daemon.arg(REFERENCE).stdout(Stdio::null()).stderr(Stdio::null()).status();
    assert!(status.expect("wireguard-go starts").success());
    let write = |name: &str, moved: usize| {
        let mut text = format!("[Interface]\nPrivateKey = {}\n", STANDARD.encode([0x48; 32]));
        for other in others {
            let address = if other.number < moved { other.moved() } else { other.member.clone() };
            text += &format!(
                "[Peer]\nPublicKey = {}\nEndpoint = {}:51820\nAllowedIPs = {}\n",
                other.public_key(),
                address.advertise_address,
                other.member.allowed_ip
            );
        }
        let path = work.file(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let (all, one) = (write("all.conf", 0), write("one.conf", 1));
    let runs = [
        ("wg setconf, an empty device", "setconf", &all),
        ("wg syncconf, nothing to be done", "syncconf", &all),
        ("wg syncconf, one peer has moved", "syncconf", &one),
    ];
    for (what, verb, path) in runs {
        let began = Instant::now();
        let mut wg = host.site.command("wg");
        assert!(wg.args([verb, REFERENCE]).arg(path).status().expect("wg runs").success());
        let millis = began.elapsed().as_secs_f64() * 1e3;
        let start =
            Start { what: what.into(), peers: others.len(), millis, cpu: f64::NAN, peak: f64::NAN };
        start.tell();
        starts.push(start);
    }
}

fn ratios(starts: &[Start]) {
    println!();
    for (peers, seconds, _) in IKTO {
        let millis = |what: &str| {
            let found =
                starts.iter().find(|start| start.peers == peers && start.what.starts_with(what));
            found.map_or(f64::NAN, |start| start.millis)
        };
        let ours = millis("latchkey agent, records of Ikto");
        println!(
            "  {peers} peers: our agent takes {:.2} x the time of wg setconf alone, {:.2} x that of ikto elsewhere",
            ours / millis("wg setconf"),
            ours / (seconds * 1e3)
        );
    }
    println!();
}

/// Put to device, and what it costs to be there.
fn while_it_runs(mesh: &Mesh, host: &Host, others: &[Other]) -> String {
    let peers = others.len();
    let put = |client: &mut Client| {
        let mut took = Vec::new();
        for other in others.iter().step_by(peers / PUTS) {
            let moved = other.moved();
            let began = Instant::now();
            client.put(BUCKET, &key_of(&moved.allowed_ip), moved.to_json())?;
            let key = other.public_key().to_string().replace('+', "\\+");
            host.says(&format!("change the peer {key}"))?;
            took.push(began.elapsed().as_secs_f64() * 1e3);
        }
        Ok(took)
    };
    let before = cpu(pid(host));
    let took = mesh.registry.ask(put).expect("each put is seen");
    let each = (cpu(pid(host)) - before).as_secs_f64() * 1e3 / took.len() as f64;
    let worst = took.iter().copied().fold(0.0, f64::max);
    let mut table = format!(
        "Among {peers}: from a put to the device {:.1} ms (median of {}; at most {worst:.1}), for {each:.1} ms of CPU\n",
        median(took.clone()),
        took.len(),
    );
    let (traffic, before) = (bytes_of_eth0(host), cpu(pid(host)));
    std::thread::sleep(IDLE);
    let (received, sent) = bytes_of_eth0(host);
    let used = (cpu(pid(host)) - before).as_secs_f64() * 1e3;
    table += &format!(
        "Among {peers}, idle for {} s: {} bytes received, {} sent, {used:.1} ms of CPU, {:.1} MiB resident\n",
        IDLE.as_secs(),
        received - traffic.0,
        sent - traffic.1,
        memory(pid(host), "VmRSS:"),
    );
    table
}

/// One changed peer among all, by the planner and the encoders that the agent has.
fn bytes(others: &[Other]) {
    let own = PrivateKey::new(&[1; 32]).public();
    let desired = |moved: usize, more: bool| {
        let peer = |other: &Other| {
            let mut allowed_ips: BTreeSet<Cidr> = [other.member.allowed_ip].into();
            if other.number < moved && more {
                allowed_ips.insert("fd10:2::/48".parse().unwrap());
            }
            let address =
                if other.number < moved && !more { other.moved() } else { other.member.clone() };
            let endpoint = SocketAddr::new(address.advertise_address.parse().unwrap(), 51820);
            (
                other.public_key(),
                DesiredPeer { endpoint: Some(endpoint), allowed_ips, keepalive: 0 },
            )
        };
        Desired {
            public_key: own,
            port: 51820,
            mtu: 1420,
            address: Some(DeviceAddress {
                address: "fd10:0:1::1".parse().unwrap(),
                prefix_length: 16,
            }),
            peers: others.iter().map(peer).collect(),
        }
    };
    let all = desired(0, false);
    let actual = Actual {
        public_key: Some(own),
        port: all.port,
        mtu: all.mtu,
        up: true,
        addresses: all.address.into_iter().collect(),
    };
    let found: BTreeMap<PublicKey, Peer> = others
        .iter()
        .map(|other| {
            let peer = Peer {
                endpoint: Some(other.endpoint()),
                allowed_ips: [other.member.allowed_ip].into(),
                ..Peer::default()
            };
            (other.public_key(), peer)
        })
        .collect();
    let mut memory = Memory::default();
    memory.note(&all, |_| false);
    let nobody = BTreeMap::new();
    println!("Bytes to the device, among {} peers\n", others.len());
    println!("{:44} {:>9} {:>10} {:>10}", "", "netlink", "UAPI", "plan, ms");
    for (what, desired, found) in [
        ("all of them, onto an empty device", desired(0, false), &nobody),
        ("nothing to be done", desired(0, false), &found),
        ("one has moved", desired(1, false), &found),
        ("one has a further prefix", desired(1, true), &found),
    ] {
        let began = Instant::now();
        let changes = plan(&desired, Some(&actual), found, &memory, SystemTime::now());
        let millis = began.elapsed().as_secs_f64() * 1e3;
        println!(
            "{what:44} {:>9} {:>10} {millis:>10.2}",
            requests_length(Backend::Kernel, &changes),
            requests_length(Backend::Userspace, &changes)
        );
    }
    println!();
}

fn pid(host: &Host) -> u32 {
    host.agent_id().expect("an agent")
}

/// Received and sent by the host, whose only cable leads to the registry.
fn bytes_of_eth0(host: &Host) -> (u64, u64) {
    let path = format!("/proc/{}/net/dev", pid(host));
    let table = std::fs::read_to_string(path).unwrap();
    let line = table.lines().find_map(|line| line.trim().strip_prefix("eth0:")).unwrap();
    let fields: Vec<u64> = line.split_whitespace().map(|field| field.parse().unwrap()).collect();
    (fields[0], fields[8])
}
