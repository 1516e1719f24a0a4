use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::thread;

use super::*;
use crate::view::{Counters, MemberView, Node, Problem, RegistryView};

/// A sample's labels, in their order, and its value.
type Samples = Vec<(Vec<(String, String)>, f64)>;

/// The text format 0.0.4, read strictly: each family once, HELP and TYPE before its samples and all of it together, names and
/// labels of the right characters, escapes known, no series twice, counters called so.
fn parse(text: &str) -> BTreeMap<String, (String, Samples)> {
    assert!(text.ends_with('\n') && !text.contains('\r'), "lines end in line feeds");
    let mut families = BTreeMap::new();
    let mut lines = text.lines().peekable();
    while let Some(line) = lines.next() {
        let (name, help) = line.strip_prefix("# HELP ").unwrap().split_once(' ').unwrap();
        assert!(is_name(name) && help.ends_with('.') && !help.contains('\\'), "{line}");
        let kind = lines.next().unwrap().strip_prefix(&format!("# TYPE {name} ")).unwrap();
        assert!(["gauge", "counter"].contains(&kind), "{kind}");
        assert_eq!(kind == "counter", name.ends_with("_total"), "{name}");
        let mut samples = Samples::new();
        let mut series = BTreeSet::new();
        while let Some(line) = lines.next_if(|line| !line.starts_with('#')) {
            let rest = line.strip_prefix(name).unwrap_or_else(|| panic!("{line} is not of {name}"));
            let (labels, value) = labels(rest);
            assert!(series.insert(labels.clone()), "twice: {line}");
            samples.push((labels, value.parse().unwrap()));
        }
        let family = (kind.to_owned(), samples);
        assert!(families.insert(name.to_owned(), family).is_none(), "{name} twice");
    }
    families
}

fn is_name(name: &str) -> bool {
    let first = name.chars().next().unwrap();
    let good = |c: char| c.is_ascii_alphanumeric() || c == '_';
    !first.is_ascii_digit() && name.chars().all(good)
}

/// `{a="b",c="d"} 1`, or ` 1`.
fn labels(rest: &str) -> (Vec<(String, String)>, &str) {
    let Some(mut rest) = rest.strip_prefix('{') else {
        return (vec![], rest.strip_prefix(' ').unwrap());
    };
    let mut labels = Vec::new();
    loop {
        let (name, after) = rest.split_once("=\"").unwrap();
        assert!(is_name(name) && !name.contains("__"), "{rest}");
        let mut value = String::new();
        let mut characters = after.chars();
        loop {
            match characters.next().unwrap() {
                '"' => break,
                '\\' => value.push(match characters.next().unwrap() {
                    'n' => '\n',
                    same @ ('\\' | '"') => same,
                    other => panic!("\\{other} in {rest}"),
                }),
                '\n' => panic!("a line feed in {rest}"),
                other => value.push(other),
            }
        }
        labels.push((name.to_owned(), value));
        rest = characters.as_str();
        match rest.strip_prefix(',') {
            Some(next) => rest = next,
            None => return (labels, rest.strip_prefix("} ").unwrap()),
        }
    }
}

const RUDE: &str = "a \"name\" \\ with\nall, of} it{ 1 \u{1b} # HELP Ü";

fn key(byte: u8) -> PublicKey {
    PublicKey::new([byte; 32])
}

fn known() -> View {
    let member = |byte, name: &str| MemberView {
        name: name.into(),
        public_key: key(byte).to_string(),
        allowed_ips: vec!["fd10::8/128".into(), "fd10::9/128".into()],
        ..MemberView::default()
    };
    View {
        version: 1,
        node: Node {
            name: RUDE.into(),
            up_at_ms: Some(9001),
            trouble: Some("trouble".into()),
            ..Node::default()
        },
        registry: Some(RegistryView {
            at: String::new(),
            state: RegistryState::Joined,
            reason: None,
            since: 1_700_000_000,
            revision: Some(12),
            from_cache: false,
        }),
        members: vec![member(2, RUDE), member(3, "")],
        problems: vec![Problem::default()],
        counters: Counters {
            snapshots: 1,
            updates: 2,
            lost: 3,
            repairs: 4,
            peers_set: 5,
            peers_removed: 6,
        },
    }
}

fn device() -> Seen {
    let heard_of = Peer {
        last_handshake: Some(SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_100)),
        received_bytes: 7,
        sent_bytes: u64::MAX,
        ..Peer::default()
    };
    let actual =
        Actual { public_key: Some(key(1)), port: 51820, mtu: 1420, up: true, addresses: vec![] };
    Seen { actual, peers: BTreeMap::from([(key(2), heard_of), (key(4), Peer::default())]) }
}

#[test]
fn the_page_is_strictly_what_prometheus_reads() {
    let families = parse(&render(&known(), Some(Some(&device()))));
    let value = |name: &str| match families[name].1.as_slice() {
        [(labels, value)] if labels.is_empty() => *value,
        other => panic!("{name}: {other:?}"),
    };
    for (name, expected) in [
        ("latchkey_members", 2.0),
        ("latchkey_problems", 1.0),
        ("latchkey_device_complete_boottime_seconds", 9.001),
        ("latchkey_registry_state_since_timestamp_seconds", 1.7e9),
        ("latchkey_registry_from_cache", 0.0),
        ("latchkey_registry_revision", 12.0),
        ("latchkey_registry_snapshots_total", 1.0),
        ("latchkey_registry_updates_total", 2.0),
        ("latchkey_registry_lost_total", 3.0),
        ("latchkey_device_repairs_total", 4.0),
        ("latchkey_peers_set_total", 5.0),
        ("latchkey_peers_removed_total", 6.0),
        ("latchkey_device_trouble", 1.0),
        ("latchkey_device_readable", 1.0),
        ("latchkey_device_up", 1.0),
        ("latchkey_device_mtu_bytes", 1420.0),
        ("latchkey_device_peers", 2.0),
    ] {
        assert_eq!(value(name), expected, "{name}");
    }
    let with = |name: &str, label: &str, wanted: &str| -> Vec<f64> {
        let has = |(labels, _): &&(Vec<(String, String)>, f64)| {
            labels.iter().any(|(name, value)| name == label && value == wanted)
        };
        families[name].1.iter().filter(has).map(|(_, value)| *value).collect()
    };
    assert_eq!(with("latchkey_registry_state", "state", "joined"), [1.0]);
    assert_eq!(with("latchkey_registry_state", "state", "away"), [0.0]);
    assert_eq!(with("latchkey_registry_state", "state", "refused"), [0.0]);
    assert_eq!(with("latchkey_node_info", "name", RUDE), [1.0]);
    assert_eq!(with("latchkey_peer_info", "name", RUDE), [1.0]);
    assert_eq!(with("latchkey_peer_info", "allowed_ips", "fd10::8/128,fd10::9/128").len(), 2);
    let heard_of = key(2).to_string();
    let handshakes = "latchkey_peer_latest_handshake_timestamp_seconds";
    assert_eq!(with(handshakes, "public_key", &heard_of), [1_700_000_100.0]);
    assert_eq!(families[handshakes].1.len(), 1, "never heard of is no time");
    assert_eq!(with("latchkey_peer_received_bytes_total", "public_key", &heard_of), [7.0]);
    assert_eq!(families["latchkey_peer_sent_bytes_total"].1.len(), 2);
}

/// `docs/commands.md` names each of them, and the labels they have.
#[test]
fn all_of_it_is_documented() {
    let documented = include_str!("../../../../docs/commands.md");
    for (name, (_, samples)) in parse(&render(&known(), Some(Some(&device())))) {
        let row = format!("`{}`", name.strip_prefix("latchkey_").unwrap());
        let row =
            documented.lines().find(|line| line.contains(&row)).unwrap_or_else(|| panic!("{row}"));
        for (label, _) in samples.iter().flat_map(|(labels, _)| labels) {
            assert!(row.contains(&format!("`{label}`")), "{name}: {label}");
        }
    }
}

#[test]
fn what_is_not_known_is_left_out_and_not_zero() {
    let families = parse(&render(&View::default(), None));
    assert_eq!(families["latchkey_device_readable"].1[0].1, 0.0);
    for absent in [
        "latchkey_device_up",
        "latchkey_device_peers",
        "latchkey_registry_state",
        "latchkey_joined_boottime_seconds",
        "latchkey_peer_received_bytes_total",
    ] {
        assert!(!families.contains_key(absent), "{absent}");
    }
    let families = parse(&render(&View::default(), Some(None)));
    assert_eq!(families["latchkey_device_up"].1[0].1, 0.0);
    assert!(!families.contains_key("latchkey_device_mtu_bytes"));
}

#[test]
fn thousands_of_peers_are_one_page() {
    let mut seen = device();
    let keys = (0..5000_u32).map(|number| {
        let mut key = [0; 32];
        key[..4].copy_from_slice(&number.to_le_bytes());
        PublicKey::new(key)
    });
    seen.peers = keys.map(|key| (key, Peer::default())).collect();
    let families = parse(&render(&known(), Some(Some(&seen))));
    assert_eq!(families["latchkey_peer_sent_bytes_total"].1.len(), 5000);
}

/// A server in a thread of its own; it ends with the process.
fn serving() -> SocketAddr {
    let server = Server::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = server.0.local_addr().unwrap();
    thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (_keep, view) = watch::channel(Arc::new(known()));
        runtime.block_on(server.serve(view, "wg-none".into())).unwrap();
    });
    address
}

fn ask(address: SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn metrics_are_read_with_get_and_nothing_else_is_there() {
    let address = serving();
    let answer = ask(address, "GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n");
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    assert!(head.contains("content-type: text/plain; version=0.0.4; charset=utf-8"), "{head}");
    parse(body);
    for (request, status) in [
        ("POST /metrics HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n", "405"),
        ("HEAD /metrics HTTP/1.1\r\nhost: x\r\n\r\n", "405"),
        ("GET / HTTP/1.1\r\nhost: x\r\n\r\n", "404"),
        ("GET /metrics/ HTTP/1.1\r\nhost: x\r\n\r\n", "404"),
        ("\u{1} nonsense\r\n\r\n", "400"),
        (&format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(10_000)), "431"),
    ] {
        let answer = ask(address, request);
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{request:?}: {answer}");
    }
}

#[test]
fn silent_readers_keep_nobody_out() {
    let address = serving();
    let silent: Vec<_> = (0..4 * READERS).map(|_| TcpStream::connect(address).unwrap()).collect();
    let answer = ask(address, "GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n");
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    for mut reader in silent {
        reader.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let _ = reader.read_to_end(&mut Vec::new()); // until the server has enough of it
    }
}

#[test]
fn an_address_that_is_taken_is_said() {
    let first = Server::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = first.0.local_addr().unwrap();
    let error = Server::bind(address).unwrap_err();
    assert!(matches!(error, Error::Metrics { .. }), "{error}");
}
