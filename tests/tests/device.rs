//! The agent's hold on a WireGuard device: made, adopted, repaired, with 5,000 peers. wg(8) and ip(8) tell what has become of
//! it. Where the kernel has no WireGuard, wireguard-go carries the device; the last test takes this very program into a
//! machine whose kernel has it, and runs all the others there.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "helpers of tests fail as tests do"
)]

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    io::{BufRead, BufReader},
    net::{IpAddr, Ipv6Addr, SocketAddr, UdpSocket},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    thread::{self, sleep},
    time::{Duration, Instant},
};

use latchkey_mesh::{
    address::DeviceAddress,
    device::{Backend, Device, Look},
    error::Error,
    key::{PrivateKey, PublicKey},
    path,
    plan::{Change, Desired, DesiredPeer},
};
use latchkey_tests::{
    place::{Image, Work},
    vm::{Boot, Vm},
};
use latchkey_wire::member::Cidr;

const INTERFACE: &str = "lkdev0";
const PATIENCE: Duration = Duration::from_secs(30);

/// Whether this is the test with a network, a `/run` and processes of its own; if not, it is run there. All that it started
/// ends with it.
fn in_namespaces_of_its_own(test: &str) -> bool {
    const MARK: &str = "LATCHKEY_TEST_NAMESPACES";
    if env::var_os(MARK).is_some() {
        run("mount -t tmpfs none /run");
        run("ip link set lo up");
        return true;
    }
    let status = Command::new("unshare")
        .args(["--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--"])
        .arg(env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(MARK, "1")
        .status()
        .unwrap();
    assert!(status.success(), "{test}, in namespaces of its own");
    false
}

fn run(line: &str) -> String {
    let mut words = line.split(' ');
    let output = Command::new(words.next().unwrap()).args(words).output().unwrap();
    let (out, err) = (
        String::from_utf8_lossy(&output.stdout).into_owned(),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(output.status.success(), "{line}: {out}{err}");
    out
}

fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "never: {what}");
        sleep(Duration::from_millis(20));
    }
}

fn private_key(n: u8) -> PrivateKey {
    PrivateKey::new(&[n; 32])
}

/// No key that anybody has, but WireGuard does not mind.
fn peer_key(n: u16) -> PublicKey {
    let mut bytes = [9; 32];
    bytes[..2].copy_from_slice(&n.to_be_bytes());
    PublicKey::new(bytes)
}

fn peer(endpoint: &str, allowed_ips: &[&str]) -> DesiredPeer {
    DesiredPeer {
        endpoint: (!endpoint.is_empty()).then(|| endpoint.parse().unwrap()),
        allowed_ips: allowed_ips.iter().map(|ip| ip.parse().unwrap()).collect(),
        keepalive: 0,
    }
}

fn desired(peers: impl IntoIterator<Item = (u16, DesiredPeer)>) -> Desired {
    Desired {
        public_key: private_key(1).public(),
        port: 51871,
        mtu: 1400,
        address: Some(DeviceAddress { address: "fd77::1".parse().unwrap(), prefix_length: 16 }),
        peers: peers.into_iter().map(|(n, peer)| (peer_key(n), peer)).collect(),
    }
}

/// A round with a fresh look; afterwards nothing is left to do.
fn reconcile(device: &mut Device, desired: &Desired) -> Vec<Change> {
    let changes = device.reconcile(desired, &private_key(1), Look::Fresh).unwrap();
    assert_eq!(device.refused(), &BTreeMap::new());
    for look in [Look::Remembered, Look::Fresh] {
        let sent = device.bytes_sent();
        assert_eq!(device.reconcile(desired, &private_key(1), look).unwrap(), [], "{look:?}");
        assert_eq!(device.bytes_sent(), sent);
    }
    changes
}

/// Peers as wg(8) shows them: endpoint, allowed IPs, keepalive.
type Shown = BTreeMap<String, (String, BTreeSet<String>, String)>;

fn shown(interface: &str) -> Shown {
    let dump = run(&format!("wg show {interface} dump"));
    let peers = dump.lines().skip(1).map(|line| {
        let fields: Vec<&str> = line.split('\t').collect();
        let ips = fields[3].split(',').filter(|ip| *ip != "(none)").map(String::from).collect();
        (fields[0].into(), (fields[2].into(), ips, fields[7].into()))
    });
    peers.collect()
}

fn as_shown(desired: &Desired) -> Shown {
    let peers = desired.peers.iter().map(|(key, peer)| {
        let endpoint = peer.endpoint.map_or("(none)".into(), |endpoint| endpoint.to_string());
        let keepalive = if peer.keepalive == 0 { "off".into() } else { peer.keepalive.to_string() };
        let ips = peer.allowed_ips.iter().map(ToString::to_string).collect();
        (key.to_string(), (endpoint, ips, keepalive))
    });
    peers.collect()
}

/// Who carries the device where this test runs.
fn carrier() -> Backend {
    let has_wireguard = Command::new("ip")
        .args(["link", "add", "lkprobe", "type", "wireguard"])
        .stderr(Stdio::null())
        .status()
        .unwrap()
        .success();
    if !has_wireguard {
        return Backend::Userspace;
    }
    run("ip link delete lkprobe");
    Backend::Kernel
}

fn wireguard_go() -> Vec<u32> {
    let processes = fs::read_dir("/proc").unwrap().filter_map(|entry| {
        let id: u32 = entry.ok()?.file_name().to_str()?.parse().ok()?;
        let stat = fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
        // A dead one whom nobody has waited for is a zombie.
        (stat.contains("(wireguard-go)") && !stat.contains(") Z ")).then_some(id)
    });
    processes.collect()
}

/// What the kernel announces about links and addresses.
struct Monitor {
    child: Child,
    lines: std::io::Lines<BufReader<std::process::ChildStdout>>,
}

impl Monitor {
    fn start() -> Self {
        let mut child = Command::new("ip")
            .args(["-oneline", "monitor", "link", "address", "route"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut monitor = Self { child, lines };
        // It listens once it has heard something.
        let listening = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                for mtu in (50_000..60_000).take_while(|_| !listening.load(Ordering::Relaxed)) {
                    run(&format!("ip link set lo mtu {mtu}"));
                }
            });
            monitor.until("lo");
            listening.store(true, Ordering::Relaxed);
        });
        monitor
    }

    fn until(&mut self, mark: &str) -> Vec<String> {
        let mut heard = Vec::new();
        for line in self.lines.by_ref() {
            let line = line.unwrap();
            if line.contains(mark) {
                return heard;
            }
            heard.push(line);
        }
        panic!("ip monitor ended")
    }

    /// All there was, without what is not about the device.
    fn heard(mut self) -> Vec<String> {
        run("ip link set lo mtu 61000");
        let mut heard = self.until("mtu 61000");
        heard.retain(|line| line.contains(INTERFACE));
        heard
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn made_from_nothing_and_adopted_without_a_touch() {
    if !in_namespaces_of_its_own("made_from_nothing_and_adopted_without_a_touch") {
        return;
    }
    let mut desired = desired([
        (1, peer("192.0.2.1:51820", &["fd77:1::/48", "10.1.0.0/24"])),
        (2, peer("[2001:db8::2]:51820", &["fd77:2::/48"])),
        (3, peer("", &["fd77:3::/48"])),
    ]);
    desired.peers.get_mut(&peer_key(2)).unwrap().keepalive = 25;
    let mut device = Device::open(INTERFACE).unwrap();
    assert!(device.read().unwrap().is_none());
    let changes = reconcile(&mut device, &desired);
    assert_eq!(changes.len(), 8, "{changes:?}");
    assert_eq!(device.backend(), carrier());
    assert_eq!(shown(INTERFACE), as_shown(&desired));
    assert_eq!(run(&format!("wg show {INTERFACE} listen-port")), "51871\n");
    let link = run(&format!("ip address show {INTERFACE}"));
    for expected in ["mtu 1400", ",UP", "inet6 fd77::1/16"] {
        assert!(link.contains(expected), "{expected}: {link}");
    }
    let processes = wireguard_go();
    assert_eq!(processes.len(), usize::from(carrier() == Backend::Userspace));
    for process in &processes {
        // It is told nothing that is not for it, and is in nobody's way.
        let environment = fs::read_to_string(format!("/proc/{process}/environ")).unwrap();
        assert!(!environment.contains("LATCHKEY"), "{environment}");
        let own_group = nix::unistd::getpgrp().to_string();
        let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap();
        assert_ne!(stat.split(' ').nth(4), Some(own_group.as_str()), "{stat}");
    }

    // The agent is started again.
    let monitor = Monitor::start();
    let mut adopted = Device::open(INTERFACE).unwrap();
    let key = adopted.read().unwrap().unwrap().into_private_key().unwrap();
    assert_eq!(key.public(), desired.public_key);
    assert_eq!(reconcile(&mut adopted, &desired), []);
    assert_eq!((adopted.backend(), adopted.bytes_sent()), (carrier(), 0));
    assert_eq!(monitor.heard(), [""; 0]);
    assert_eq!(wireguard_go(), processes);

    assert!(adopted.remove().unwrap());
    assert!(!adopted.remove().unwrap());
    eventually("wireguard-go ends with its link", || wireguard_go().is_empty());
    assert!(adopted.read().unwrap().is_none());
}

#[test]
fn parked_it_is_made_with_its_key_alone_and_stays_down() {
    if !in_namespaces_of_its_own("parked_it_is_made_with_its_key_alone_and_stays_down") {
        return;
    }
    let whole = desired([(1, peer("192.0.2.1:51820", &["fd77:1::/48"]))]);
    let parked = Desired { address: None, peers: BTreeMap::new(), ..whole.clone() };
    let mut device = Device::open(INTERFACE).unwrap();
    let changes = reconcile(&mut device, &parked);
    assert_eq!(changes.len(), 3, "{changes:?}");
    let snapshot = device.read().unwrap().unwrap();
    assert!(!snapshot.actual.up && snapshot.actual.addresses.is_empty());
    assert_eq!(snapshot.actual.public_key, Some(whole.public_key));
    // Its address is known.
    let changes = reconcile(&mut device, &whole);
    assert_eq!(changes.len(), 3, "{changes:?}");
    assert_eq!(shown(INTERFACE), as_shown(&whole));
    // Parked again, it keeps what it has.
    assert_eq!(reconcile(&mut device, &parked), []);
    assert_eq!(shown(INTERFACE), as_shown(&whole));
}

#[test]
fn five_thousand_peers_and_then_one() {
    if !in_namespaces_of_its_own("five_thousand_peers_and_then_one") {
        return;
    }
    let many = |count: u16| {
        desired((0..count).map(|n| {
            let ip = format!("fd77:{n:x}:1::/48");
            (n, peer(&format!("192.0.2.{}:{}", n % 250, 1000 + n), &[&ip]))
        }))
    };
    for count in [1000, 5000] {
        let mut desired = many(count);
        let mut device = Device::open(INTERFACE).unwrap();
        let start = Instant::now();
        device.reconcile(&desired, &private_key(1), Look::Fresh).unwrap();
        println!(
            "{count} peers from nothing: {:?}, {} bytes",
            start.elapsed(),
            device.bytes_sent()
        );
        let start = Instant::now();
        assert_eq!(device.reconcile(&desired, &private_key(1), Look::Fresh).unwrap(), []);
        println!("{count} peers, nothing to do, looked at: {:?}", start.elapsed());
        assert_eq!(shown(INTERFACE), as_shown(&desired));

        let changed = desired.peers.get_mut(&peer_key(500)).unwrap();
        changed.allowed_ips.insert("fd77:ffff::/48".parse().unwrap());
        let (before, start) = (device.bytes_sent(), Instant::now());
        let changes = device.reconcile(&desired, &private_key(1), Look::Remembered).unwrap();
        println!(
            "one of {count} changed, remembered: {:?}, {} bytes",
            start.elapsed(),
            device.bytes_sent() - before
        );
        assert_eq!(changes.len(), 1, "{changes:?}");
        assert!(device.bytes_sent() - before < 200);
        assert_eq!(shown(INTERFACE), as_shown(&desired));
        assert_eq!(reconcile(&mut device, &desired), []);
        if count == 1000 {
            device.remove().unwrap(); // of 5,000 it takes the kernel a minute under emulation
        }
    }
}

#[test]
fn one_peer_with_thousands_of_allowed_ips() {
    if !in_namespaces_of_its_own("one_peer_with_thousands_of_allowed_ips") {
        return;
    }
    let ips: BTreeSet<Cidr> = (0..4000u16)
        .map(|n| Cidr::new(Ipv6Addr::new(0xfd77, n, 0, 0, 0, 0, 0, 0).into(), 48).unwrap())
        .collect();
    let mut desired = desired([(1, peer("", &[])), (2, peer("", &["fd78::/48"]))]);
    desired.peers.get_mut(&peer_key(1)).unwrap().allowed_ips = ips;
    let mut device = Device::open(INTERFACE).unwrap();
    reconcile(&mut device, &desired);
    assert_eq!(shown(INTERFACE), as_shown(&desired));
    // All but two go, one of them to the other peer.
    let first = desired.peers.get_mut(&peer_key(1)).unwrap();
    let mut all = std::mem::take(&mut first.allowed_ips).into_iter();
    first.allowed_ips.extend(all.by_ref().take(2));
    desired.peers.get_mut(&peer_key(2)).unwrap().allowed_ips.extend(all.take(1));
    assert_eq!(reconcile(&mut device, &desired).len(), 2);
    assert_eq!(shown(INTERFACE), as_shown(&desired));
}

#[test]
fn allowed_ips_move_between_peers_in_one_round() {
    if !in_namespaces_of_its_own("allowed_ips_move_between_peers_in_one_round") {
        return;
    }
    let mut device = Device::open(INTERFACE).unwrap();
    let (a, b, c) = ("fd77:a::/48", "fd77:b::/48", "fd77:c::/48");
    let rounds: [&[(u16, &[&str])]; 7] = [
        &[(1, &[a]), (2, &[b]), (3, &[c])],
        &[(1, &[b]), (2, &[a]), (3, &[c])],     // swapped
        &[(1, &[a]), (2, &[c]), (3, &[b])],     // in a ring
        &[(1, &[]), (2, &[a, b, c]), (3, &[])], // all to one
        &[(1, &[a, b]), (3, &[c])],             // whose former owner goes
        &[(1, &[b]), (2, &[a, c])],             // and a new one comes
        &[(4, &[a, b, c])],                     // another key for everything
    ];
    for round in rounds {
        let desired = desired(round.iter().map(|(n, ips)| (*n, peer("", ips))));
        reconcile(&mut device, &desired);
        assert_eq!(shown(INTERFACE), as_shown(&desired));
    }
}

/// The peer of [`INTERFACE`], by hand.
struct Other;

impl Other {
    const INTERFACE: &str = "lkdev1";

    fn start(of: &Desired) -> Self {
        match carrier() {
            Backend::Kernel => run(&format!("ip link add {} type wireguard", Self::INTERFACE)),
            Backend::Userspace => run(&format!("wireguard-go {}", Self::INTERFACE)),
        };
        fs::write("/run/key", base64(private_key(2).as_bytes())).unwrap();
        run(&format!(
            "wg set {} private-key /run/key listen-port 51872 peer {} endpoint 127.0.0.1:{} \
             persistent-keepalive 1 allowed-ips fd77::/16",
            Self::INTERFACE,
            of.public_key,
            of.port
        ));
        run(&format!("ip link set {} up", Self::INTERFACE));
        Self
    }

    fn listen(&self, port: u16) {
        run(&format!("wg set {} listen-port {port}", Self::INTERFACE));
    }
}

fn base64(bytes: &[u8]) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

#[test]
fn a_roamed_endpoint_is_kept_even_by_an_agent_started_anew() {
    if !in_namespaces_of_its_own("a_roamed_endpoint_is_kept_even_by_an_agent_started_anew") {
        return;
    }
    let mut desired = desired([]);
    let other = private_key(2).public();
    let advertised: SocketAddr = "127.0.0.1:51872".parse().unwrap();
    desired
        .peers
        .insert(other, DesiredPeer { endpoint: Some(advertised), ..peer("", &["fd77:2::/48"]) });
    let mut device = Device::open(INTERFACE).unwrap();
    reconcile(&mut device, &desired);
    let site = Other::start(&desired);
    let endpoint_is = |expected: &str| {
        eventually(expected, || shown(INTERFACE)[&other.to_string()].0 == expected);
    };
    eventually("a handshake", || {
        !run(&format!("wg show {INTERFACE} latest-handshakes")).ends_with("\t0\n")
    });
    site.listen(51873);
    endpoint_is("127.0.0.1:51873");
    assert_eq!(reconcile(&mut device, &desired), []);
    // Another change of that peer leaves its endpoint alone.
    desired.peers.get_mut(&other).unwrap().allowed_ips.insert("fd77:3::/48".parse().unwrap());
    assert_eq!(reconcile(&mut device, &desired).len(), 1);
    endpoint_is("127.0.0.1:51873");

    let mut device = Device::open(INTERFACE).unwrap();
    assert_eq!(reconcile(&mut device, &desired), []);
    endpoint_is("127.0.0.1:51873");

    // The peer says that it has moved: that is newer than what is known.
    site.listen(51874);
    desired.peers.get_mut(&other).unwrap().endpoint = Some("127.0.0.1:51874".parse().unwrap());
    device.reconcile(&desired, &private_key(1), Look::Remembered).unwrap();
    endpoint_is("127.0.0.1:51874");
}

#[test]
fn what_others_did_to_the_device_is_repaired() {
    if !in_namespaces_of_its_own("what_others_did_to_the_device_is_repaired") {
        return;
    }
    let desired = desired([
        (1, peer("192.0.2.1:51820", &["fd77:1::/48"])),
        (2, peer("192.0.2.2:51820", &["fd77:2::/48"])),
    ]);
    let (one, two) = (peer_key(1), peer_key(2));
    let mut device = Device::open(INTERFACE).unwrap();
    reconcile(&mut device, &desired);
    let processes = wireguard_go();
    fs::write("/run/key", base64(private_key(7).as_bytes())).unwrap();
    let damages = [
        (format!("wg set {INTERFACE} peer {one} remove"), 1),
        (format!("wg set {INTERFACE} peer {one} allowed-ips fd77:2::/48,fd77:9::/48"), 2),
        (format!("wg set {INTERFACE} peer {two} endpoint 192.0.2.9:9"), 1),
        (format!("wg set {INTERFACE} peer {two} persistent-keepalive 7"), 1),
        (format!("wg set {INTERFACE} peer {} allowed-ips fd77:2::/48", peer_key(3)), 2),
        (format!("wg set {INTERFACE} private-key /run/key"), 1),
        (format!("wg set {INTERFACE} listen-port 51999"), 1),
        (format!("ip link set {INTERFACE} mtu 1300"), 1),
        (format!("ip address add 10.9.9.9/24 dev {INTERFACE}"), 1),
        (format!("ip address flush dev {INTERFACE}"), 1),
        (format!("ip link set {INTERFACE} down"), 2), // and its IPv6 address with it
    ];
    for (damage, changes) in damages {
        run(&damage);
        let repairs = reconcile(&mut device, &desired);
        assert_eq!(repairs.len(), changes, "{damage}: {repairs:?}");
        assert_eq!(shown(INTERFACE), as_shown(&desired), "{damage}");
    }
    assert_eq!(wireguard_go(), processes);

    // What was remembered is of no use any more; that is found out.
    let ends = processes.iter().map(|process| format!("kill -9 {process}"));
    for end in ends.chain([format!("ip link delete {INTERFACE}")]) {
        run(&end);
        eventually("the link is gone", || !run("ip link").contains(INTERFACE));
        let mut changed = desired.clone();
        changed.peers.get_mut(&one).unwrap().keepalive = 3;
        device.reconcile(&changed, &private_key(1), Look::Remembered).unwrap();
        assert_eq!(shown(INTERFACE), as_shown(&changed), "{end}");
        assert_eq!(device.read().unwrap().unwrap().actual.public_key, Some(desired.public_key));
        reconcile(&mut device, &desired);
    }
}

#[test]
fn what_is_not_wireguard_is_left_alone() {
    if !in_namespaces_of_its_own("what_is_not_wireguard_is_left_alone") {
        return;
    }
    for (make, kind) in [
        (format!("ip tuntap add {INTERFACE} mode tun"), "tun"),
        (format!("ip link add {INTERFACE} type veth peer name other"), "veth"),
        (format!("ip link add {INTERFACE} type bridge"), "bridge"),
    ] {
        run(&make);
        let monitor = Monitor::start();
        let mut device = Device::open(INTERFACE).unwrap();
        for error in [
            device.reconcile(&desired([]), &private_key(1), Look::Fresh).unwrap_err(),
            device.read().unwrap_err(),
            device.remove().unwrap_err(),
        ] {
            assert!(matches!(error, Error::NotWireGuard { .. }), "{error}");
            assert!(error.to_string().contains(kind), "{error}");
        }
        assert_eq!(monitor.heard(), [""; 0]);
        run(&format!("ip link delete {INTERFACE}"));
    }
}

#[test]
fn a_port_that_another_has_is_said_so() {
    if !in_namespaces_of_its_own("a_port_that_another_has_is_said_so") {
        return;
    }
    let desired = desired([]);
    let holder = UdpSocket::bind(("0.0.0.0", desired.port)).unwrap();
    let mut device = Device::open(INTERFACE).unwrap();
    let error = device.reconcile(&desired, &private_key(1), Look::Fresh).unwrap_err();
    assert!(matches!(error, Error::PortTaken { port: 51871 }), "{error}");
    drop(holder);
    reconcile(&mut device, &desired);
    assert!(UdpSocket::bind(("0.0.0.0", desired.port)).is_err());
}

/// A program that hangs holds nobody up for ever.
#[test]
fn a_program_that_does_not_answer_is_said_so() {
    if !in_namespaces_of_its_own("a_program_that_does_not_answer_is_said_so")
        || carrier() == Backend::Kernel
    {
        return;
    }
    let desired = desired([]);
    let mut device = Device::open(INTERFACE).unwrap();
    reconcile(&mut device, &desired);
    let process = wireguard_go()[0];
    run(&format!("kill -STOP {process}"));
    let error = device.reconcile(&desired, &private_key(1), Look::Fresh).unwrap_err();
    assert!(error.to_string().contains("timed out"), "{error}");
    run(&format!("kill -CONT {process}"));
    assert_eq!(reconcile(&mut device, &desired), []);
    assert_eq!(wireguard_go(), [process]);
}

#[test]
fn why_there_is_no_device_is_said_with_what_to_install() {
    if !in_namespaces_of_its_own("why_there_is_no_device_is_said_with_what_to_install") {
        return;
    }
    if carrier() == Backend::Kernel {
        return;
    }
    let program = run("which wireguard-go");
    let mut device = Device::open(INTERFACE).unwrap();
    let stand_in = "#!/bin/sh\necho a banner; echo the reason >&2; exit 3\n";
    fs::write("/run/wireguard-go", stand_in).unwrap();
    for (mode, expected) in
        [("755", "exit status: 3: the reason"), ("644", "cannot run wireguard-go")]
    {
        run(&format!("chmod {mode} /run/wireguard-go"));
        run(&format!("mount --bind /run/wireguard-go {}", program.trim()));
        let error = device.reconcile(&desired([]), &private_key(1), Look::Fresh).unwrap_err();
        assert!(matches!(error, Error::NoWireGuard { .. }), "{error}");
        for expected in ["this kernel has no WireGuard", expected, "modprobe wireguard"] {
            assert!(error.to_string().contains(expected), "{error}");
        }
        run(&format!("umount {}", program.trim()));
    }
    reconcile(&mut device, &desired([]));
}

#[test]
fn the_way_to_the_others_is_the_kernels() {
    if !in_namespaces_of_its_own("the_way_to_the_others_is_the_kernels") {
        return;
    }
    let ip = |text: &str| text.parse::<IpAddr>().unwrap();
    let mtu = |endpoints: &[&str]| {
        path::mtu(endpoints.iter().map(|endpoint| ip(endpoint)), INTERFACE).unwrap()
    };
    let towards = |text: &str| path::own_address_towards(Some(ip(text)), INTERFACE).unwrap();
    let by_default = || path::own_address_towards(None, INTERFACE).unwrap();
    // Nothing but lo.
    assert_eq!((mtu(&["192.0.2.1"]), by_default(), towards("192.0.2.1")), (1420, None, None));
    assert!(path::is_local(ip("127.0.0.1")).unwrap() && path::is_local(ip("::1")).unwrap());
    assert!(!path::is_local(ip("192.0.2.1")).unwrap());
    assert_eq!(towards("127.0.0.1"), None, "nobody else can use that");

    for line in [
        "ip link add near type veth peer name far",
        "ip link set far up",
        "ip address add 192.0.2.7/24 dev near",
        "ip address add 192.0.2.8/24 dev near",
        "ip address add 2001:db8::7/64 dev near nodad",
        "ip link set near up",
        "ip link add wide mtu 9000 type veth peer name wider mtu 9000",
        "ip link set wider up",
        "ip address add 10.9.0.1/24 dev wide",
        "ip link set wide up",
    ] {
        run(line);
    }
    assert_eq!(path::interface_address("near").unwrap(), Some(ip("192.0.2.7")));
    assert_eq!(path::interface_address("far").unwrap(), None, "link-local alone");
    assert_eq!(path::interface_address("nowhere").unwrap(), None);
    assert!(path::is_local(ip("2001:db8::7")).unwrap());
    assert_eq!(towards("192.0.2.1"), Some(ip("192.0.2.7")));
    assert_eq!(towards("192.0.2.8"), Some(ip("192.0.2.8")), "ourselves");
    assert_eq!(towards("2001:db8::1"), Some(ip("2001:db8::7")));
    assert_eq!(towards("10.9.0.9"), Some(ip("10.9.0.1")));
    assert_eq!((towards("203.0.113.1"), by_default()), (None, None));
    assert_eq!(mtu(&["10.9.0.9"]), 8920);
    assert_eq!(mtu(&["10.9.0.9", "192.0.2.1"]), 1420);

    run("ip -6 route add default via 2001:db8::1 dev near");
    assert_eq!(by_default(), Some(ip("2001:db8::7")));
    run("ip route add default via 192.0.2.1 metric 100 mtu 1450");
    assert_eq!(by_default(), Some(ip("192.0.2.7")));
    assert_eq!((towards("203.0.113.1"), mtu(&[])), (Some(ip("192.0.2.7")), 1370));
    run("ip route add default via 10.9.0.9 metric 50 src 10.9.0.1");
    assert_eq!((by_default(), mtu(&[])), (Some(ip("10.9.0.1")), 1420), "IPv6 is 1500");
    run("ip route add 203.0.113.0/24 via 192.0.2.1 mtu lock 1300");
    assert_eq!(mtu(&["203.0.113.1"]), 1280);
    run("ip route add blackhole 198.51.100.0/24");
    assert_eq!((towards("198.51.100.1"), mtu(&["198.51.100.1"])), (None, 1420));

    // The mesh itself is no way to its members.
    let mut device = Device::open(INTERFACE).unwrap();
    reconcile(&mut device, &Desired { mtu: 1280, ..desired([]) });
    assert_eq!((towards("fd77::2"), mtu(&["fd77::2"])), (None, 1420));

    let route = |n| format!("route add 10.{}.{}.0/24 via 10.9.0.9\n", 100 + n / 250, n % 250);
    fs::write("/run/routes", (0..2000).map(route).collect::<String>()).unwrap();
    run("ip -batch /run/routes");
    let start = Instant::now();
    let endpoints = (0..5000u32).map(|n| IpAddr::from([10, 100, (n / 250) as u8, (n % 250) as u8]));
    assert_eq!(path::mtu(endpoints, INTERFACE).unwrap(), 1420);
    println!("the MTU for 5,000 endpoints by 2,000 routes: {:?}", start.elapsed());
}

/// All of the above on the kernel's WireGuard.
#[test]
fn in_a_machine_whose_kernel_has_wireguard() -> Result<(), latchkey_tests::error::Error> {
    if env::var_os(IN_A_MACHINE).is_some() {
        return Ok(());
    }
    let image = Image::get()?;
    let work = Work::new("device-kernel")?;
    let initramfs = work.file("initramfs");
    let built = Command::new("sh")
        .args(["-euc", INITRAMFS, "sh"])
        .arg(&initramfs)
        .arg(env::current_exe().unwrap())
        .arg(image.kernel.parent().unwrap())
        .arg(&image.kernel_version)
        .status()
        .unwrap();
    assert!(built.success(), "the initramfs");
    let vm = Vm::new("device-kernel")?.boot(Boot::Kernel { initramfs }).without_network();
    let mut vm = vm.memory_mib(1024).start()?;
    vm.wait_for_power_off()?;
    for line in vm.console().matching("peers from|peers, nothing|changed, rem|the MTU for")? {
        println!("on the kernel: {}", line.text);
    }
    assert_eq!(vm.console().matching("^all of it is well")?.len(), 1, "{}", vm.console().tail());
    Ok(())
}

const IN_A_MACHINE: &str = "LATCHKEY_TEST_IN_A_MACHINE";

/// Arguments: the initramfs to make, this program, the folder of the kernel and its version.
const INITRAMFS: &str = r#"
tree=$1.tree
mkdir -p "$tree"/bin "$tree"/modules "$tree"/proc "$tree"/sys "$tree"/dev "$tree"/run "$tree"/tmp
cp /bin/busybox "$tree/bin/busybox"
for applet in sh mount umount insmod poweroff chmod kill sleep cat which; do ln -s busybox "$tree/bin/$applet"; done
strip -o "$tree/bin/device" "$2"
for program in ip wg unshare; do cp "$(command -v $program)" "$tree/bin/$program"; done
for program in "$tree"/bin/device "$tree"/bin/ip "$tree"/bin/wg "$tree"/bin/unshare; do
    ldd "$program" | grep -o '/[^ )]*' | while read -r f; do [ -e "$tree$f" ] || install -D -m755 "$f" "$tree$f"; done
done
for m in ipv6 wireguard veth tun bridge; do
    modprobe -d "$3" -S "$4" -D "$m" 2>/dev/null | sed -n 's/^insmod \([^ ]*\).*/\1/p'
done | awk '!seen[$0]++' | while read -r f; do
    cp "$f" "$tree/modules/"
    echo "${f##*/}" >>"$tree/modules/order"
done
cat >"$tree/init" <<'INIT'
#!/bin/sh
export LATCHKEY_TEST_IN_A_MACHINE=1 PATH=/bin RUST_BACKTRACE=0
mount -t proc none /proc; mount -t sysfs none /sys; mount -t devtmpfs none /dev; mount -t tmpfs none /run
while read -r module; do insmod "/modules/$module"; done </modules/order
device --test-threads 1 --nocapture --skip five_thousand 2>&1 &&
    device --nocapture five_thousand 2>&1 && echo all of it is well
poweroff -f
INIT
chmod 755 "$tree/init"
(cd "$tree" && find . | cpio -o -H newc -R 0:0 --quiet) | zstd -3 -q >"$1"
rm -r "$tree"
"#;
