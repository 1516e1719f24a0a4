//! The mDNS responder, heard over two ends of a cable: each in a network namespace of its own.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)] // helpers of tests

use std::{
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, UdpSocket},
    process::Command,
    sync::mpsc::channel,
    thread,
    time::{Duration, Instant},
};

use nix::{net::if_::if_nametoindex, sched, unistd::gettid};
use simple_dns::{
    CLASS, Name, Packet, QCLASS, QTYPE, Question, TYPE,
    rdata::{A, RData},
};
use socket2::{Domain, InterfaceIndexOrAddress, Protocol, Socket, Type};

mod rig;
use rig::{Kms, store};

const SERVICE: &str = "_kcrypt._tcp.local";
const HOST: &str = "Kms.local";

fn run(line: &str) {
    let mut words = line.split(' ');
    let status = Command::new(words.next().unwrap()).args(words).status().unwrap();
    assert!(status.success(), "{line}");
}

/// Whether this is the test in a network of its own; if not, it is run there.
fn in_a_network_of_its_own(test: &str) -> bool {
    const MARK: &str = "LATCHKEY_TEST_NETWORK";
    if std::env::var_os(MARK).is_some() {
        return true;
    }
    let is_root = nix::unistd::geteuid().is_root();
    let status = Command::new("unshare")
        .args(["--net", "--fork", "--kill-child"])
        .args(if is_root { [].as_slice() } else { &["--map-root-user"] })
        .arg("--")
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(MARK, "1")
        .status()
        .unwrap();
    assert!(status.success(), "{test}, in a network of its own");
    false
}

/// What the other end of the cable has to send and hear with.
struct Ear {
    socket: UdpSocket,
    index: u32,
    v4: bool,
}

impl Ear {
    /// On port 5353 it hears what is said to all.
    fn new(v4: bool, port: u16) -> Self {
        let index = if_nametoindex("far").unwrap();
        let domain = if v4 { Domain::IPV4 } else { Domain::IPV6 };
        let socket = Socket::new(domain, Type::DGRAM, Some(Protocol::UDP)).unwrap();
        socket.set_reuse_address(true).unwrap();
        socket.bind_device(Some(b"far")).unwrap();
        let any: SocketAddr = if v4 {
            (Ipv4Addr::UNSPECIFIED, port).into()
        } else {
            (Ipv6Addr::UNSPECIFIED, port).into()
        };
        socket.bind(&any.into()).unwrap();
        if v4 {
            let index = InterfaceIndexOrAddress::Index(index);
            socket.join_multicast_v4_n(&Ipv4Addr::new(224, 0, 0, 251), &index).unwrap();
        } else {
            socket.set_multicast_if_v6(index).unwrap();
            socket.join_multicast_v6(&"ff02::fb".parse().unwrap(), index).unwrap();
        }
        socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        Self { socket: socket.into(), index, v4 }
    }

    fn say(&self, packet: &[u8]) {
        let group: SocketAddr = if self.v4 {
            (Ipv4Addr::new(224, 0, 0, 251), 5353).into()
        } else {
            SocketAddrV6::new("ff02::fb".parse().unwrap(), 5353, 0, self.index).into()
        };
        self.socket.send_to(packet, group).unwrap();
    }

    /// Waits for a response that is as wanted; says `again` while it does not come.
    fn hear<T>(&self, again: Option<&[u8]>, wanted: impl Fn(&Packet<'_>) -> Option<T>) -> T {
        let end = Instant::now() + rig::PATIENCE;
        let mut buffer = [0; 9000];
        loop {
            assert!(Instant::now() < end, "nothing was heard");
            if let Some(again) = again {
                self.say(again);
            }
            while let Ok((length, _)) = self.socket.recv_from(&mut buffer) {
                // Our own rubbish comes back to us.
                let Ok(packet) = Packet::parse(&buffer[..length]) else { continue };
                if let Some(found) = wanted(&packet) {
                    return found;
                }
            }
        }
    }
}

fn query(name: &'static str, kind: TYPE) -> Vec<u8> {
    let mut packet = Packet::new_query(4711);
    let class = QCLASS::CLASS(CLASS::IN);
    packet.questions.push(Question::new(
        Name::new_unchecked(name),
        QTYPE::TYPE(kind),
        class,
        false,
    ));
    packet.build_bytes_vec().unwrap()
}

/// What Kairos' client needs: SRV, TXT and addresses, all in one packet. Port, target, addresses, shortest TTL.
fn server(packet: &Packet<'_>) -> Option<(u16, String, Vec<String>, u32)> {
    let records = || packet.answers.iter().chain(&packet.additional_records);
    let (port, target) = records().find_map(|record| match &record.rdata {
        RData::SRV(srv) => Some((srv.port, format!("{}.", srv.target))),
        _ => None,
    })?;
    records().find(|record| matches!(record.rdata, RData::TXT(_)))?;
    let mut addresses: Vec<String> = records()
        .filter_map(|record| match &record.rdata {
            RData::A(a) => Some(Ipv4Addr::from(a.address).to_string()),
            RData::AAAA(aaaa) => Some(Ipv6Addr::from(aaaa.address).to_string()),
            _ => None,
        })
        .collect();
    addresses.sort();
    Some((port, target, addresses, records().map(|record| record.ttl).min()?))
}

#[test]
fn a_server_is_found_by_mdns_on_both_families_until_it_says_goodbye() {
    if !in_a_network_of_its_own("a_server_is_found_by_mdns_on_both_families_until_it_says_goodbye")
    {
        return;
    }
    // The far end of the cable is in the network of a thread.
    let (tell, told) = channel();
    let (plugged, wait) = channel::<()>();
    let far = thread::spawn(move || {
        sched::unshare(sched::CloneFlags::CLONE_NEWNET).unwrap();
        tell.send(gettid()).unwrap();
        wait.recv().unwrap();
        for line in [
            "ip link set lo up",
            "ip address add 192.0.2.8/24 dev far",
            "ip address add fd00::8/64 dev far nodad",
            "ip link set far up",
        ] {
            run(line);
        }
        [Ear::new(true, 0), Ear::new(false, 0), Ear::new(true, 5353), Ear::new(false, 5353)]
    });
    let far_end = told.recv().unwrap();
    run("ip link set lo up");
    run(&format!("ip link add near type veth peer name far netns {far_end}"));
    run("ip address add 192.0.2.7/24 dev near");
    run("ip address add fd00::7/64 dev near nodad");
    run("ip link set near up");
    plugged.send(()).unwrap();
    let [alone_v4, alone_v6, all_v4, all_v6] = far.join().unwrap();

    let directory = store(&[]);
    let mut kms = Kms::start_with(directory.path(), &["--listen", "[::]:0", "--mdns", HOST]);
    let port = kms.address.port();
    let known = |addresses: &[&str], ttl: u32| {
        let addresses = addresses.iter().map(|&address| address.to_owned()).collect::<Vec<_>>();
        (port, "Kms.local.".to_owned(), addresses, ttl)
    };
    // Unasked, on both families.
    for ear in [&all_v4, &all_v6] {
        assert_eq!(ear.hear(None, server), known(&["192.0.2.7", "fd00::7"], 120));
    }
    // Asked as Kairos' client asks: from a port of its own.
    for ear in [&alone_v4, &alone_v6] {
        for (name, kind) in
            [(SERVICE, TYPE::PTR), ("kms.local", TYPE::A), ("KMS.local", TYPE::AAAA)]
        {
            let asked = query(name, kind);
            let answer = |packet: &Packet<'_>| server(packet).filter(|_| packet.id() == 4711);
            assert_eq!(ear.hear(Some(&asked), answer), known(&["192.0.2.7", "fd00::7"], 10));
        }
    }
    // Asked as mDNS asks: what is answered is heard by all.
    for ear in [&all_v4, &all_v6] {
        let of_pointer = |packet: &Packet<'_>| {
            let is_pointer =
                packet.answers.iter().any(|record| matches!(record.rdata, RData::PTR(_)));
            server(packet).filter(|_| is_pointer && packet.answers.len() == 1)
        };
        let asked = query(SERVICE, TYPE::PTR);
        assert_eq!(ear.hear(Some(&asked), of_pointer), known(&["192.0.2.7", "fd00::7"], 120));
    }
    // Rubbish does no harm; another host of the same name is told of.
    all_v4.say(&[0xff; 200]);
    all_v4.say(&[0; 12]);
    let mut packet = Packet::new_reply(0);
    let data = RData::A(A::from(Ipv4Addr::new(192, 0, 2, 99)));
    packet.answers.push(simple_dns::ResourceRecord::new(
        Name::new_unchecked("kms.local"),
        CLASS::IN,
        120,
        data,
    ));
    let packet = packet.build_bytes_vec().unwrap();
    let conflict = "192.0.2.8:5353 has the same name with the address 192.0.2.99";
    let end = Instant::now() + rig::PATIENCE;
    while !kms.lines().iter().any(|line| line.contains(conflict)) {
        assert!(Instant::now() < end, "the conflict is not told: {:?}", kms.lines());
        all_v4.say(&packet);
        thread::sleep(Duration::from_millis(100));
    }
    // An address that comes later is announced.
    run("ip address add 192.0.2.70/24 dev near");
    let later =
        |packet: &Packet<'_>| server(packet).filter(|(_, _, addresses, _)| addresses.len() == 3);
    assert_eq!(all_v4.hear(None, later), known(&["192.0.2.7", "192.0.2.70", "fd00::7"], 120));
    // The end is told as well.
    kms.signal("-TERM");
    for ear in [&all_v4, &all_v6] {
        let goodbye = |packet: &Packet<'_>| server(packet).filter(|(_, _, _, ttl)| *ttl == 0);
        ear.hear(None, goodbye);
    }
    assert_eq!(kms.wait().code(), Some(0));
}

#[test]
fn a_name_that_is_not_of_mdns_is_refused() {
    let directory = store(&[]);
    let (status, said) = rig::fails_to_start(
        directory.path(),
        &["--listen", "127.0.0.1:0", "--mdns", "kms.example"],
    );
    assert_eq!(status.code(), Some(2), "{said}");
    assert!(said.contains("\"kms.example\" is no name for mDNS"), "{said}");
}
