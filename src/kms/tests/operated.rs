//! The server as a service that somebody runs: limits, memory, metrics, health, certificates that change.
#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests

use std::{
    fs,
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Instant,
};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use tokio::{
    io::AsyncWriteExt,
    net::{TcpSocket, TcpStream},
};

mod rig;
use rig::{Kms, MACHINE, PERSISTENT, STRANGER, secret, store};

fn ordinary() -> tempfile::TempDir {
    let secret = secret("node-cos-persistent", "  passphrase: found\n");
    store(&[("all.yaml", &(MACHINE.volume("node", "") + &secret))])
}

fn still_serves(kms: &Kms) {
    assert_eq!(*kms.get(&MACHINE, PERSISTENT).unwrap().passphrase, "found");
}

fn upgrade_request(path: &str, authorization: &str) -> String {
    format!(
        "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
         Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nAuthorization: {authorization}\r\nlabel: COS_PERSISTENT\r\n\r\n"
    )
}

fn metric(page: &str, name: &str) -> f64 {
    let value = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.unwrap_or_else(|| panic!("no {name} in:\n{page}")).parse().unwrap()
}

#[test]
fn an_address_that_asks_too_often_is_told_when_to_come_back() {
    let directory = ordinary();
    let kms = Kms::start_with(
        directory.path(),
        &["--address-rate", "1", "--address-burst", "3", "--metrics-listen", "127.0.0.1:0"],
    );
    for _ in 0..3 {
        still_serves(&kms);
    }
    let header = MACHINE.token.authorization_header();
    let answer = rig::talk(kms.address, upgrade_request("/getPass", &header).as_bytes());
    assert!(answer.starts_with("HTTP/1.1 429 "), "{answer}");
    let wait: u64 = answer
        .lines()
        .find_map(|line| line.strip_prefix("retry-after: "))
        .unwrap()
        .parse()
        .unwrap();
    assert!((1..=60).contains(&wait), "{answer}");
    kms.wait_for("refused: more requests than an address may make (--address-rate");
    let metrics = kms.address_after("metrics on http://");
    let (_, page) = rig::page(metrics, "/metrics");
    assert_eq!(metric(&page, "latchkey_kms_rate_limited_total{limit=\"an address\"}"), 1.0);
    assert_eq!(metric(&page, "latchkey_kms_http_responses_total{code=\"429\"}"), 1.0);
    // Who is limited still sees whether the server is alive.
    assert_eq!(rig::page(kms.address, "/healthz").0, "HTTP/1.1 200 OK");
}

#[test]
fn a_machine_that_asks_too_often_leaves_others_alone() {
    let directory = ordinary();
    let kms = Kms::start_with(directory.path(), &["--machine-rate", "1", "--machine-burst", "2"]);
    still_serves(&kms);
    still_serves(&kms);
    let request = |machine: &rig::Machine| {
        let header = machine.token.authorization_header();
        let mut stream = kms.connect();
        stream.write_all(upgrade_request("/getPass", &header).as_bytes()).unwrap();
        let mut status = [0; 12];
        stream.read_exact(&mut status).unwrap();
        String::from_utf8(status.to_vec()).unwrap()
    };
    assert_eq!(request(&MACHINE), "HTTP/1.1 429");
    kms.wait_for("refused: more requests than a machine may make (--machine-rate");
    assert_eq!(request(&STRANGER), "HTTP/1.1 101");
}

#[test]
fn metrics_and_health_tell_how_the_server_is() {
    let parent = tempfile::tempdir().unwrap();
    let (path, away) = (parent.path().join("store"), parent.path().join("away"));
    let secret = secret("node-cos-persistent", "  passphrase: found\n");
    fs::create_dir(&path).unwrap();
    fs::write(path.join("all.yaml"), MACHINE.volume("node", "") + &secret).unwrap();
    let kms = Kms::start_with(&path, &["--metrics-listen", "127.0.0.1:0"]);
    let metrics = kms.address_after("metrics on http://");
    still_serves(&kms);
    kms.get(&STRANGER, PERSISTENT).unwrap();
    kms.wait_for("result=refused");
    rig::talk(kms.address, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n");
    for address in [kms.address, metrics] {
        assert_eq!(rig::page(address, "/healthz"), ok("alive\n"));
        assert_eq!(rig::page(address, "/readyz"), ok("ready: 1 volumes, 1 secrets\n"));
        assert!(rig::page(address, "/metricsx").0.contains("404"));
    }
    assert!(rig::page(kms.address, "/metrics").0.contains("404"), "not on the machines' port");
    let (status, page) = rig::page(metrics, "/metrics");
    assert_eq!(status, "HTTP/1.1 200 OK");
    for (name, value) in [
        (
            "latchkey_kms_requests_total{endpoint=\"getPass\",result=\"granted\",reason=\"released\"}",
            1.0,
        ),
        ("latchkey_kms_request_duration_seconds_count{endpoint=\"getPass\"}", 2.0),
        ("latchkey_kms_request_duration_seconds_bucket{endpoint=\"getPass\",le=\"+Inf\"}", 2.0),
        ("latchkey_kms_http_responses_total{code=\"101\"}", 2.0),
        ("latchkey_kms_store_readable", 1.0),
        ("latchkey_kms_store_volumes", 1.0),
        ("latchkey_kms_store_secrets", 1.0),
        ("latchkey_kms_store_unreadable_files", 0.0),
    ] {
        assert_eq!(metric(&page, name), value, "{name}\n{page}");
    }
    let generation = metric(&page, "latchkey_kms_store_generation");
    assert_well_formed(&page);

    fs::write(path.join("broken.yaml"), "kind: [\n").unwrap();
    kms.wait_for("broken.yaml");
    let (_, page) = rig::page(metrics, "/metrics");
    assert_eq!(metric(&page, "latchkey_kms_store_unreadable_files"), 1.0);
    assert!(metric(&page, "latchkey_kms_store_generation") > generation);
    assert_eq!(
        rig::page(metrics, "/readyz"),
        ok("ready: 1 volumes, 1 secrets, 1 files with mistakes\n")
    );
    fs::rename(&path, &away).unwrap();
    kms.wait_for("cannot be read");
    kms.wait_for("everything known from it stays valid");
    let (status, why) = rig::page(kms.address, "/readyz");
    assert!(status.contains("503") && why.contains("store directory"), "{status} {why}");
    assert_eq!(rig::page(kms.address, "/healthz"), ok("alive\n"));
    still_serves(&kms);
    fs::rename(&away, &path).unwrap();
    kms.wait_for("can be read again");
    assert_eq!(rig::page(metrics, "/readyz").0, "HTTP/1.1 200 OK");
}

fn ok(text: &str) -> (String, String) {
    ("HTTP/1.1 200 OK".to_owned(), text.to_owned())
}

/// Each sample's name was announced with HELP and TYPE, and has a number.
fn assert_well_formed(page: &str) {
    let mut announced = Vec::new();
    for line in page.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            announced.push(rest.split(' ').next().unwrap());
            continue;
        }
        if line.starts_with("# HELP ") {
            continue;
        }
        let (name, value) = line.rsplit_once(' ').unwrap();
        value.parse::<f64>().unwrap();
        let name = name.split('{').next().unwrap();
        assert!(announced.last().is_some_and(|last| name.starts_with(last)), "{line}");
    }
    assert!(announced.len() > 10);
}

/// What a slow connection sends before it falls silent.
type Opening<'a> = &'a (dyn Fn(usize) -> Vec<u8> + Sync);

/// Opens connections of four addresses, each of which sends its opening and no more.
async fn slow_connections(to: SocketAddr, count: usize, opening: Opening<'_>) -> Vec<TcpStream> {
    let mut streams = Vec::with_capacity(count);
    for number in 0..count {
        let socket = TcpSocket::new_v4().unwrap();
        let last = 2 + (number * 4 / count) as u8;
        socket.bind((Ipv4Addr::new(127, 0, 0, last), 0).into()).unwrap();
        let mut stream = socket.connect(to).await.unwrap();
        // A server that has closed the connection already is as good.
        let _ = stream.write_all(&opening(number)).await;
        streams.push(stream);
    }
    streams
}

/// How many connections the system lets this process open, ten thousand if it can.
fn ten_thousand() -> usize {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    let room = usize::try_from(hard).unwrap_or(usize::MAX).saturating_sub(500);
    if room < 10_000 {
        eprintln!("only {room} slow connections: the limit of open files is {hard}");
    }
    room.min(10_000)
}

/// Opens them, waits until the server has taken them all, and gives them back with what one costs in memory, KiB.
fn hold(kms: &Kms, count: usize, opening: Opening<'_>) -> (Vec<TcpStream>, f64) {
    let metrics = kms.address_after("metrics on http://");
    let before = kms.resident();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let streams = runtime.block_on(slow_connections(kms.address, count, opening));
    let end = Instant::now() + rig::PATIENCE;
    let mut open = 0.0;
    while open < count as f64 {
        assert!(Instant::now() < end, "{open} of {count} connections are open");
        open = metric(&rig::page(metrics, "/metrics").1, "latchkey_kms_connections_open");
    }
    let (now, each) = (kms.resident(), kms.resident().saturating_sub(before) as f64 / count as f64);
    println!("{count} connections: {before} KiB before, {now} KiB with them, {each:.1} KiB each");
    (streams, each)
}

const PATIENT: [&str; 6] =
    ["--handshake-timeout", "600", "--message-timeout", "600", "--metrics-listen", "127.0.0.1:0"];

#[test]
fn ten_thousand_slow_connections_cost_little_and_keep_nobody_out() {
    let directory = ordinary();
    let count = ten_thousand();
    let most = (count + 10).to_string();
    let kms =
        Kms::start_with(directory.path(), &[&PATIENT[..], &["--max-connections", &most]].concat());
    let header = MACHINE.token.authorization_header();
    let mut early = kms.open("/getPass", &header, PERSISTENT);
    let challenge = rig::challenge(&mut early);
    // Silent, half a head, as long a head as is read, and an exchange that waits for its proof.
    let opening = |number: usize| match number % 16 {
        0..5 => Vec::new(),
        5..10 => b"GET /getPass HTTP/1.1\r\nHost: x\r\n".to_vec(),
        10..15 => [&b"GET /getPass HTTP/1.1\r\nAuthorization: "[..], &[b'x'; 20_000]].concat(),
        _ => upgrade_request("/getPass", &header).into_bytes(),
    };
    let (slow, each) = hold(&kms, count, &opening);
    assert!(each < 32.0, "{each} KiB for a connection");
    still_serves(&kms);
    // More than there are places: the crowds shrink, the machine that came early keeps its own.
    let (more, _) = hold(&kms, 500, &|_| Vec::new());
    kms.wait_for("closed to make place");
    still_serves(&kms);
    let proof = MACHINE.activate(&challenge).to_json();
    early.send(tungstenite::Message::binary(proof.as_bytes().to_vec())).unwrap();
    assert_eq!(*rig::answer(&mut early).unwrap().passphrase, "found");
    drop((slow, more));
}

#[test]
fn half_a_tls_handshake_costs_little() {
    let (directory, files) = (ordinary(), tempfile::tempdir().unwrap());
    let (cert, key, _) = rig::certificate(files.path());
    let tls = ["--tls-cert", &cert, "--tls-key", &key, "--address-rate", "0"];
    let kms = Kms::start_with(directory.path(), &[&PATIENT[..], &tls].concat());
    // A ClientHello of 64 KiB in records of 16 KiB, of which as much comes as the peer likes.
    let record = [&[22, 3, 1, 0x40, 0x00][..], &[1, 0, 0xff, 0xff], &[0; 0x4000 - 4]].concat();
    let (_streams, each) = hold(&kms, 1000, &|_| record.get(..12_000).unwrap().to_vec());
    assert!(each < 48.0, "{each} KiB for a connection");
    rig::talk(kms.address, &record.repeat(3));
    kms.wait_for("more bytes than a handshake has");
}

#[test]
fn a_renewed_certificate_is_used_without_a_restart() {
    let (directory, files) = (ordinary(), tempfile::tempdir().unwrap());
    let (cert, key, old) = rig::certificate(files.path());
    let tls = ["--tls-cert", &cert, "--tls-key", &key, "--metrics-listen", "127.0.0.1:0"];
    let kms = Kms::start_with(directory.path(), &tls);
    let trusts = |roots: &RootCertStore| {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots.clone())
            .with_no_client_auth();
        let name = "localhost".try_into().unwrap();
        let connection = ClientConnection::new(Arc::new(config), name).unwrap();
        let mut stream = StreamOwned::new(connection, kms.connect());
        stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").is_ok()
    };
    let metrics = kms.address_after("metrics on http://");
    let page = || rig::page(metrics, "/metrics").1;
    assert!(trusts(&old));
    assert!(metric(&page(), "latchkey_kms_tls_certificate_not_after_seconds") > 1e9);

    rig::replace(files.path().join("cert.pem"), "nothing\n");
    kms.wait_for("the certificate that was read before stays in use");
    assert!(trusts(&old));
    assert_eq!(metric(&page(), "latchkey_kms_tls_reload_failures_total"), 1.0);

    let renewed = tempfile::tempdir().unwrap();
    let (_, _, new) = rig::certificate(renewed.path());
    for name in ["cert.pem", "key.pem"] {
        let text = fs::read_to_string(renewed.path().join(name)).unwrap();
        rig::replace(files.path().join(name), &text);
    }
    kms.wait_for("cert.pem has changed and is in use now");
    assert!(trusts(&new) && !trusts(&old));
}
