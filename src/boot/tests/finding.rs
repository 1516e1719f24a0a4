//! Finding the server: the program, name servers that fail in every way, and mDNS, on sockets in a network of their own.
//!
//! The other end writes its DNS messages with simple-dns, so that two readers of the specification must agree.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

#[allow(unreachable_pub)]
mod common;

use std::io::{Read, Write};
use std::net::{
    IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, TcpListener, TcpStream, UdpSocket,
};
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use common::{Machine, begin, command_line, in_a_world_of_its_own, releasing, replace_file, serve};
use kcrypt_discovery_challenger::resolver::files::Files;
use kcrypt_discovery_challenger::resolver::resolve;
use latchkey_soft_tpm::SoftTpm;
use latchkey_wire::v2::Answer;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, sockopt};
use simple_dns::rdata::{A, AAAA, CNAME, PTR, RData, SRV};
use simple_dns::{CLASS, Name, Packet, PacketFlag, QTYPE, RCODE, ResourceRecord, TYPE};
use tungstenite::Message;

const HOST: &str = "kms.example";

fn released(text: &str) -> String {
    Answer::passphrase(text.as_bytes().to_vec().into()).to_json().to_string()
}

fn record(name: &'static str, data: RData<'static>) -> ResourceRecord<'static> {
    ResourceRecord::new(Name::new_unchecked(name), CLASS::IN, 60, data)
}

fn v4(address: &str) -> RData<'static> {
    RData::A(A::from(address.parse::<Ipv4Addr>().unwrap()))
}

fn v6(address: &str) -> RData<'static> {
    RData::AAAA(AAAA::from(address.parse::<Ipv6Addr>().unwrap()))
}

/// A reply to `query` with those of `records` that it asks for, and all aliases.
fn reply(query: &[u8], records: &[ResourceRecord<'static>]) -> Packet<'static> {
    let query = Packet::parse(query).unwrap();
    let question = query.questions[0].clone().into_owned();
    let mut reply = Packet::new_reply(query.id());
    let matches = |record: &&ResourceRecord<'_>| {
        record.match_qtype(question.qtype) || matches!(record.rdata, RData::CNAME(_))
    };
    reply.answers = records.iter().filter(matches).cloned().collect();
    reply.questions.push(question);
    reply
}

/// A name server that answers each query with what `answer` makes of it; several datagrams, or none.
fn name_server(
    answer: impl Fn(&[u8], &UdpSocket, SocketAddr) -> Vec<Vec<u8>> + Send + 'static,
) -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            for message in answer(&buffer[..length], &socket, from) {
                let _ = socket.send_to(&message, from);
            }
        }
    });
    address
}

fn knowing(records: Vec<ResourceRecord<'static>>) -> SocketAddr {
    name_server(move |query, _, _| {
        vec![reply(query, &records).build_bytes_vec_compressed().unwrap()]
    })
}

fn failing(code: RCODE) -> SocketAddr {
    name_server(move |query, _, _| {
        let mut reply = reply(query, &[]);
        *reply.rcode_mut() = code;
        vec![reply.build_bytes_vec().unwrap()]
    })
}

fn silent() -> SocketAddr {
    name_server(|_, _, _| Vec::new())
}

/// A port that nobody listens on.
fn closed() -> SocketAddr {
    UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

/// The files of a machine whose DHCP has named these servers.
fn told(servers: &[SocketAddr]) -> (Files, tempfile::TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let state = directory.path().join("state");
    let words: Vec<_> = servers.iter().map(ToString::to_string).collect();
    std::fs::write(&state, format!("DNS={}\nDOMAINS=lan example\n", words.join(" "))).unwrap();
    let files = Files {
        hosts: directory.path().join("hosts"),
        resolv_conf: vec![directory.path().join("resolv.conf")],
        networkd_state: state,
    };
    (files, directory)
}

fn look_up(servers: &[SocketAddr], host: &str) -> Result<Vec<String>, std::io::Error> {
    let (files, _directory) = told(servers);
    let deadline = Instant::now() + Duration::from_secs(20);
    let found = resolve(&files, host, 80, false, deadline)?;
    Ok(found.iter().map(ToString::to_string).collect())
}

/// One of these answers although the others do what they do.
#[test]
fn one_name_server_of_several_is_enough() {
    let good = || knowing(vec![record(HOST, v4("10.0.0.1")), record(HOST, v6("fd00::1"))]);
    let cases: [(&str, Vec<SocketAddr>); 7] = [
        ("alone", vec![good()]),
        ("after a silent one", vec![silent(), good()]),
        ("after a closed port", vec![closed(), good()]),
        ("after one that fails", vec![failing(RCODE::ServerFailure), good()]),
        ("after one that refuses", vec![failing(RCODE::Refused), good()]),
        ("after one that knows no such name", vec![failing(RCODE::NameError), good()]),
        ("after one without addresses", vec![knowing(Vec::new()), good()]),
    ];
    for (what, servers) in cases {
        let found = look_up(&servers, HOST).unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_eq!(found, ["[fd00::1]:80", "10.0.0.1:80"], "{what}");
    }
}

#[test]
fn a_query_that_is_lost_is_repeated() {
    let seen = std::sync::atomic::AtomicU32::new(0);
    let server = name_server(move |query, _, _| {
        // Both families' first query.
        if seen.fetch_add(1, std::sync::atomic::Ordering::SeqCst) < 2 {
            return Vec::new();
        }
        vec![reply(query, &[record(HOST, v4("10.0.0.1"))]).build_bytes_vec().unwrap()]
    });
    assert_eq!(look_up(&[server], HOST).unwrap(), ["10.0.0.1:80"]);
}

#[test]
fn names_are_completed_and_aliases_followed() {
    let one_family = || knowing(vec![record("kms.example", v6("fd00::7"))]);
    assert_eq!(look_up(&[one_family()], "kms.example").unwrap(), ["[fd00::7]:80"]);
    // `kms.lan` is asked first and answered with a record of another name.
    assert_eq!(look_up(&[one_family()], "kms").unwrap(), ["[fd00::7]:80"]);
    let target = Name::new_unchecked("real.example");
    let alias = knowing(vec![
        record(HOST, RData::CNAME(CNAME(target))),
        record("real.example", v4("10.0.0.9")),
    ]);
    assert_eq!(look_up(&[alias], "KMS.example").unwrap(), ["10.0.0.9:80"]);
}

#[test]
fn answers_to_other_questions_are_not_taken() {
    let server = name_server(|query, _, _| {
        let truth = reply(query, &[record(HOST, v4("10.0.0.1"))]);
        let mut other_id = reply(query, &[record(HOST, v4("6.6.6.6")), record(HOST, v6("fd66::"))]);
        other_id.set_id(truth.id().wrapping_add(1));
        let mut other_name = other_id.clone();
        other_name.set_id(truth.id());
        other_name.questions[0].qname = Name::new_unchecked("other.example");
        let mut other_kind = other_name.clone();
        other_kind.questions[0] = truth.questions[0].clone();
        other_kind.questions[0].qtype = QTYPE::TYPE(TYPE::TXT);
        let packets = [other_id, other_name, other_kind, truth];
        let mut datagrams: Vec<_> =
            packets.iter().map(|packet| packet.build_bytes_vec().unwrap()).collect();
        datagrams.insert(0, query.to_vec());
        datagrams.insert(0, vec![0xff; 600]);
        datagrams
    });
    assert_eq!(look_up(&[server], HOST).unwrap(), ["10.0.0.1:80"]);
}

#[test]
fn what_does_not_fit_into_a_datagram_comes_by_tcp() {
    let many: Vec<_> =
        (1..=60).map(|n| record(HOST, RData::A(A::from(Ipv4Addr::new(10, 0, 0, n))))).collect();
    let by_tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = by_tcp.local_addr().unwrap();
    let socket = UdpSocket::bind(address).unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            let mut cut = reply(&buffer[..length], &[]);
            cut.set_flags(PacketFlag::TRUNCATION);
            let _ = socket.send_to(&cut.build_bytes_vec().unwrap(), from);
        }
    });
    std::thread::spawn(move || {
        for mut stream in by_tcp.incoming().flatten() {
            let mut length = [0; 2];
            stream.read_exact(&mut length).unwrap();
            let mut query = vec![0; usize::from(u16::from_be_bytes(length))];
            stream.read_exact(&mut query).unwrap();
            let answer = reply(&query, &many).build_bytes_vec_compressed().unwrap();
            let length = u16::try_from(answer.len()).unwrap();
            // In two parts, as a network may deliver it.
            stream.write_all(&length.to_be_bytes()).unwrap();
            stream.write_all(&answer).unwrap();
        }
    });
    assert_eq!(look_up(&[address], HOST).unwrap().len(), 60);
}

#[test]
fn why_there_is_no_address_is_told() {
    for (what, servers, word) in [
        ("no such name", vec![failing(RCODE::NameError); 2], "knows an address"),
        ("failures", vec![failing(RCODE::ServerFailure), closed()], "failed"),
        ("silence", vec![silent()], "no answer"),
        ("no server", vec![], "no name server"),
    ] {
        let error = look_up(&servers, HOST).unwrap_err().to_string();
        assert!(error.contains(word), "{what}: {error}");
    }
    let error = look_up(&[silent()], &"a".repeat(64)).unwrap_err().to_string();
    assert!(error.contains("host name"), "{error}");
}

#[test]
fn a_name_server_that_comes_late_is_used() {
    let (files, directory) = told(&[]);
    let server = knowing(vec![record(HOST, v4("10.0.0.1"))]);
    let state = directory.path().join("state");
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(300));
        std::fs::write(state, format!("DNS={server}\n")).unwrap();
    });
    let deadline = Instant::now() + Duration::from_secs(20);
    let found = resolve(&files, HOST, 80, false, deadline).unwrap();
    assert_eq!(found, ["10.0.0.1:80".parse().unwrap()]);
}

/// What the program says when its only name server is this one, and a second key server has an address.
#[test]
fn a_dead_name_server_does_not_hold_up_a_key_server_with_an_address() {
    if !in_a_world_of_its_own("a_dead_name_server_does_not_hold_up_a_key_server_with_an_address") {
        return;
    }
    replace_file("/etc/resolv.conf", "nameserver 127.0.0.1\n");
    let _dead = UdpSocket::bind("127.0.0.1:53").unwrap();
    let good = serve(vec![releasing(&released("open"))]);
    let machine = Machine::speaking("auto", SoftTpm::fresh());
    machine.configure(&format!("challenger_server: ['http://kms.example', 'http://{good}']"));
    let run = machine.get();
    assert_eq!((run.code, run.text()), (0, "open"), "{}", run.stderr);
    machine.configure("challenger_server: http://kms.example");
    let run = machine.get();
    assert_eq!(run.code, 20, "{}", run.stderr);
    assert!(run.stderr.contains("resolving kms.example"), "{}", run.stderr);
}

#[test]
fn both_families_of_a_name_are_tried() {
    if !in_a_world_of_its_own("both_families_of_a_name_are_tried") {
        return;
    }
    replace_file("/etc/hosts", "127.0.0.1 kms.example\n::1 kms.example\n");
    let machine = Machine::speaking("auto", SoftTpm::fresh());
    let v4 = serve(vec![releasing(&released("v4"))]);
    machine.configure(&format!("challenger_server: http://kms.example:{}", v4.port()));
    let run = machine.get();
    assert_eq!((run.code, run.text()), (0, "v4"), "nobody on ::1: {}", run.stderr);

    let stalling = TcpListener::bind(("::1", v4.port())).unwrap();
    std::thread::spawn(move || {
        for mut stream in stalling.incoming().flatten() {
            std::thread::spawn(move || stream.read_to_end(&mut Vec::new()));
        }
    });
    let run = machine.get();
    assert_eq!((run.code, run.text()), (0, "v4"), "::1 accepts and stalls: {}", run.stderr);
}

/// However many addresses of a name accept and stall, the next server does not wait for each of them.
#[test]
fn a_name_of_many_stalling_addresses_does_not_hold_up_the_next_server() {
    if !in_a_world_of_its_own("a_name_of_many_stalling_addresses_does_not_hold_up_the_next_server")
    {
        return;
    }
    let hosts: String = (2..10).map(|n| format!("127.0.0.{n} kms.example\n")).collect();
    replace_file("/etc/hosts", &hosts);
    let stalling = TcpListener::bind("0.0.0.0:0").unwrap();
    let port = stalling.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for mut stream in stalling.incoming().flatten() {
            std::thread::spawn(move || stream.read_to_end(&mut Vec::new()));
        }
    });
    let good = serve(vec![releasing(&released("open"))]);
    let machine = Machine::speaking("auto", SoftTpm::fresh());
    machine
        .configure(&format!("challenger_server: ['http://kms.example:{port}', 'http://{good}']"));
    let run = machine.get();
    assert_eq!((run.code, run.text()), (0, "open"), "{}", run.stderr);
}

const LOCAL: &str = "kms.local";
const INSTANCE: &str = "latchkey._kcrypt._tcp.local";

fn service(port: u16, host: &'static str) -> ResourceRecord<'static> {
    let target = Name::new_unchecked(host);
    record(INSTANCE, RData::SRV(SRV { priority: 0, weight: 0, port, target }))
}

fn pointer() -> ResourceRecord<'static> {
    record("_kcrypt._tcp.local", RData::PTR(PTR(Name::new_unchecked(INSTANCE))))
}

/// The port of mDNS, of one family, on one interface.
fn mdns_socket(v4: Option<Ipv4Addr>, interface: &str) -> UdpSocket {
    let family = if v4.is_some() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let fd: OwnedFd =
        nix::sys::socket::socket(family, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None).unwrap();
    let set = nix::sys::socket::setsockopt::<OwnedFd, sockopt::BindToDevice>;
    set(&fd, sockopt::BindToDevice, &interface.into()).unwrap();
    nix::sys::socket::setsockopt(&fd, sockopt::ReuseAddr, &true).unwrap();
    nix::sys::socket::setsockopt(&fd, sockopt::ReusePort, &true).unwrap();
    let any: SocketAddr = match v4 {
        Some(_) => (Ipv4Addr::UNSPECIFIED, 5353).into(),
        None => (Ipv6Addr::UNSPECIFIED, 5353).into(),
    };
    let raw = std::os::fd::AsRawFd::as_raw_fd(&fd);
    nix::sys::socket::bind(raw, &SockaddrStorage::from(any)).unwrap();
    let socket = UdpSocket::from(fd);
    if let Some(address) = v4 {
        socket.join_multicast_v4(&Ipv4Addr::new(224, 0, 0, 251), &address).unwrap();
    } else {
        let index = nix::net::if_::if_nametoindex(interface).unwrap();
        socket.join_multicast_v6(&"ff02::fb".parse().unwrap(), index).unwrap();
    }
    socket
}

fn on_loopback() -> UdpSocket {
    mdns_socket(Some(Ipv4Addr::LOCALHOST), "lo")
}

/// A responder that answers the queries after the first `lost`; by multicast if `to_all`, as some do whoever asks.
fn responder(socket: UdpSocket, lost: u32, to_all: bool, records: Vec<ResourceRecord<'static>>) {
    std::thread::spawn(move || respond(&socket, lost, to_all, &records));
}

fn respond(socket: &UdpSocket, lost: u32, to_all: bool, records: &[ResourceRecord<'static>]) {
    let mut buffer = [0; 9000];
    let mut left = lost;
    while let Ok((length, from)) = socket.recv_from(&mut buffer) {
        let Ok(query) = Packet::parse(&buffer[..length]) else { continue };
        if query.questions.is_empty() || from.port() == 5353 {
            continue;
        }
        if left > 0 {
            left -= 1;
            continue;
        }
        let mut reply = Packet::new_reply(0);
        reply.answers = records.to_vec();
        let to: SocketAddr = match from {
            _ if !to_all => from,
            SocketAddr::V4(_) => "224.0.0.251:5353".parse().unwrap(),
            SocketAddr::V6(from) => {
                SocketAddrV6::new("ff02::fb".parse().unwrap(), 5353, 0, from.scope_id()).into()
            }
        };
        socket.send_to(&reply.build_bytes_vec_compressed().unwrap(), to).unwrap();
    }
}

fn kms(port: u16) -> SocketAddr {
    let listener = TcpListener::bind((Ipv6Addr::LOCALHOST, port)).unwrap();
    let address = listener.local_addr().unwrap();
    serve_on(listener);
    let other = TcpListener::bind((Ipv4Addr::LOCALHOST, address.port())).unwrap();
    serve_on(other);
    address
}

/// Tells the client the `Host` it named.
fn serve_on(listener: TcpListener) {
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            echo_host(stream);
        }
    });
}

fn echo_host(stream: TcpStream) {
    let mut client = begin(stream);
    let host = client.header("host").unwrap().to_owned();
    client.prove();
    client.socket.send(Message::text(released(&host))).unwrap();
}

/// Runs the program with this `challenger_server` and mDNS on.
fn find_by_mdns(url: &str) -> common::Run {
    let machine = Machine::speaking("auto", SoftTpm::fresh());
    machine.configure(&format!("challenger_server: {url}\nmdns: true"));
    machine.get()
}

#[test]
fn mdns_finds_service_port_and_address_over_ipv4() {
    if !in_a_world_of_its_own("mdns_finds_service_port_and_address_over_ipv4") {
        return;
    }
    let port = kms(0).port();
    let records = vec![pointer(), service(port, "KMS.local"), record(LOCAL, v4("127.0.0.1"))];
    responder(on_loopback(), 3, false, records);
    // The server is not on the URL's port, and the name in `Host` is the URL's.
    let run = find_by_mdns("http://kms.local:8082/");
    assert_eq!((run.code, run.text()), (0, "kms.local:8082"), "{}", run.stderr);
    let run = find_by_mdns("http://kms.local");
    assert_eq!((run.code, run.text()), (0, "kms.local"), "{}", run.stderr);
}

/// A link to another machine, on which a key server is and a responder that answers to all.
fn a_link(address: &str, others: &str, v4: Option<Ipv4Addr>, record: ResourceRecord<'static>) {
    for command in [
        "ip netns add other",
        "ip link add v0 type veth peer name v1 netns other",
        "ip link set v0 up addrgenmode none",
        "ip -n other link set v1 up addrgenmode none",
        &format!("ip addr add {address} dev v0 nodad"),
        &format!("ip -n other addr add {others} dev v1 nodad"),
        // Whoever asks here gets no answer.
        "ip link set lo multicast off",
    ] {
        command_line(command);
    }
    let (sender, ready) = channel();
    std::thread::spawn(move || {
        let other = std::fs::File::open("/run/netns/other").unwrap();
        nix::sched::setns(other, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        serve_on(listener);
        let socket = mdns_socket(v4, "v1");
        sender.send(()).unwrap();
        respond(&socket, 1, true, &[pointer(), service(port, LOCAL), record]);
    });
    ready.recv().unwrap();
}

#[test]
fn mdns_finds_an_address_of_the_link_announced_to_all_over_ipv6() {
    if !in_a_world_of_its_own("mdns_finds_an_address_of_the_link_announced_to_all_over_ipv6") {
        return;
    }
    a_link("fe80::1/64", "fe80::2/64", None, record(LOCAL, v6("fe80::2")));
    let run = find_by_mdns("http://kms.local");
    assert_eq!((run.code, run.text()), (0, "kms.local"), "{}", run.stderr);
}

#[test]
fn mdns_hears_what_is_announced_to_all_over_ipv4() {
    if !in_a_world_of_its_own("mdns_hears_what_is_announced_to_all_over_ipv4") {
        return;
    }
    let address = Ipv4Addr::new(10, 9, 0, 2);
    a_link("10.9.0.1/24", "10.9.0.2/24", Some(address), record(LOCAL, v4("10.9.0.2")));
    let run = find_by_mdns("http://kms.local");
    assert_eq!((run.code, run.text()), (0, "kms.local"), "{}", run.stderr);
}

#[test]
fn mdns_asks_for_what_a_responder_leaves_out_and_ignores_other_hosts() {
    if !in_a_world_of_its_own("mdns_asks_for_what_a_responder_leaves_out_and_ignores_other_hosts") {
        return;
    }
    let port = kms(0).port();
    let socket = on_loopback();
    let (sender, asked): (_, Receiver<String>) = channel();
    std::thread::spawn(move || {
        let mut buffer = [0; 9000];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            let Ok(query) = Packet::parse(&buffer[..length]) else { continue };
            for question in &query.questions {
                let mut reply = Packet::new_reply(0);
                let name = question.qname.to_string();
                reply.answers = match question.qtype {
                    QTYPE::TYPE(TYPE::PTR) => vec![
                        pointer(),
                        record("other.local", v4("127.0.0.99")),
                        ResourceRecord::new(
                            Name::new_unchecked("o._kcrypt._tcp.local"),
                            CLASS::IN,
                            60,
                            RData::SRV(SRV {
                                priority: 0,
                                weight: 0,
                                port: 9,
                                target: Name::new_unchecked("other.local"),
                            }),
                        ),
                    ],
                    QTYPE::TYPE(TYPE::SRV) => {
                        let _ = sender.send(name);
                        vec![service(port, LOCAL)]
                    }
                    QTYPE::TYPE(TYPE::A) => vec![record(LOCAL, v4("127.0.0.1"))],
                    _ => continue,
                };
                let _ = socket.send_to(&reply.build_bytes_vec().unwrap(), from);
            }
        }
    });
    let run = find_by_mdns("http://kms.local");
    assert_eq!((run.code, run.text()), (0, "kms.local"), "{}", run.stderr);
    assert_eq!(asked.try_recv().as_deref(), Ok(INSTANCE));
}

#[test]
fn a_local_name_without_mdns_in_the_configuration_is_still_found() {
    if !in_a_world_of_its_own("a_local_name_without_mdns_in_the_configuration_is_still_found") {
        return;
    }
    replace_file("/etc/resolv.conf", "");
    let port = kms(0).port();
    // A service says nothing here: the URL's port counts.
    responder(on_loopback(), 0, false, vec![service(9, LOCAL), record(LOCAL, v4("127.0.0.1"))]);
    let machine = Machine::speaking("auto", SoftTpm::fresh());
    machine.configure(&format!("challenger_server: http://kms.local:{port}"));
    let run = machine.get();
    assert_eq!((run.code, run.text()), (0, format!("kms.local:{port}").as_str()), "{}", run.stderr);
}

#[test]
fn a_host_that_nobody_answers_for_is_named_with_where_it_was_looked_for() {
    if !in_a_world_of_its_own(
        "a_host_that_nobody_answers_for_is_named_with_where_it_was_looked_for",
    ) {
        return;
    }
    responder(on_loopback(), 0, false, vec![pointer(), service(1, "other.local")]);
    let run = find_by_mdns("http://kms.local");
    assert_eq!(run.code, 20, "{}", run.stderr);
    assert!(run.stderr.contains("mDNS on lo"), "{}", run.stderr);
}

/// What a flood of an enemy's answers on the link can do: nothing but be tried.
#[test]
fn answers_from_another_port_are_not_taken() {
    if !in_a_world_of_its_own("answers_from_another_port_are_not_taken") {
        return;
    }
    let port = kms(0).port();
    let socket = on_loopback();
    std::thread::spawn(move || {
        let unprivileged = UdpSocket::bind("127.0.0.1:0").unwrap();
        let mut buffer = [0; 9000];
        while let Ok((_, from)) = socket.recv_from(&mut buffer) {
            let mut reply = Packet::new_reply(0);
            reply.answers = vec![pointer(), service(9, LOCAL), record(LOCAL, v4("127.0.0.1"))];
            let bad = reply.build_bytes_vec().unwrap();
            let _ = unprivileged.send_to(&bad, from);
            reply.answers[1] = service(port, LOCAL);
            let _ = socket.send_to(&reply.build_bytes_vec().unwrap(), from);
        }
    });
    let run = find_by_mdns("http://kms.local");
    assert_eq!((run.code, run.text()), (0, "kms.local"), "{}", run.stderr);
    assert!(!run.stderr.contains("refused"), "{}", run.stderr);
}

#[test]
fn addresses_as_text_need_nobody() {
    let (files, _directory) = told(&[]);
    let deadline = Instant::now() + Duration::from_secs(20);
    for host in ["10.0.0.1", "fd00::1"] {
        let found = resolve(&files, host, 80, false, deadline).unwrap();
        assert_eq!(found, [SocketAddr::new(host.parse::<IpAddr>().unwrap(), 80)]);
    }
}
