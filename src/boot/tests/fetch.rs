//! `config_url` over a real connection: what is asked, what is followed, and what ends it.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use kcrypt_discovery_challenger::fetch::Fetcher;
use kcrypt_discovery_challenger::oem;
use latchkey_config::Request;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

/// A server that gives each connection the next of these answers, and tells what it was asked.
fn serve(answers: Vec<String>) -> (String, Receiver<Vec<String>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (sender, asked) = channel();
    std::thread::spawn(move || {
        for answer in answers {
            let (mut stream, _) = listener.accept().unwrap();
            sender.send(request(&stream)).unwrap();
            stream.write_all(answer.as_bytes()).unwrap();
        }
    });
    (address, asked)
}

fn request(stream: &TcpStream) -> Vec<String> {
    let lines = BufReader::new(stream).lines().map(Result::unwrap);
    lines.take_while(|line| !line.is_empty()).collect()
}

fn get(url: &str, patience: Duration) -> Result<Vec<u8>, String> {
    let request = Request { url, certificate: None, max_bytes: 100 };
    Fetcher::until(Instant::now() + patience).get(&request)
}

const ENOUGH: Duration = Duration::from_secs(30);

#[test]
fn a_document_is_asked_for_by_its_path_and_query_and_redirections_are_followed() {
    let (address, asked) = serve(vec![
        "HTTP/1.1 301 Moved\r\nLocation: /b?c=d\r\n\r\n".into(),
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n".into(),
    ]);
    let document = get(&format!("http://{address}/a.yaml?token=x"), ENOUGH).unwrap();
    assert_eq!(document, b"hello");
    let host = format!("Host: {address}");
    for target in ["/a.yaml?token=x", "/b?c=d"] {
        let lines = asked.recv().unwrap();
        assert_eq!(lines.first().unwrap(), &format!("GET {target} HTTP/1.1"));
        assert!(lines.contains(&host) && lines.contains(&"Connection: close".to_owned()));
    }
}

#[test]
fn a_servers_trouble_is_waited_out_and_a_clear_no_is_not() {
    let (address, asked) = serve(vec![
        "HTTP/1.1 503 Not yet\r\n\r\n".into(),
        String::new(), // hangs up
        "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok".into(),
        "HTTP/1.1 404 No\r\n\r\n".into(),
    ]);
    let url = format!("http://{address}/");
    assert_eq!(get(&url, ENOUGH).unwrap(), b"ok");
    assert_eq!(get(&url, ENOUGH).unwrap_err(), "the server answers 404");
    assert_eq!(asked.iter().count(), 4);
}

#[test]
fn what_cannot_be_a_document_ends_it_at_once() {
    let long = format!("HTTP/1.1 200 OK\r\n\r\n{}", "x".repeat(101));
    let around = "HTTP/1.1 302 Found\r\nLocation: /\r\n\r\n".to_owned();
    for (answers, why) in [
        (vec![long], "more than 100 bytes"),
        (vec!["SSH-2.0-x\r\n\r\n".to_owned()], "no HTTP/1 status line"),
        (vec!["HTTP/1.1 302 Found\r\nLocation: file:///etc/shadow\r\n\r\n".into()], "redirection"),
        (vec!["HTTP/1.1 302 Found\r\n\r\n".into()], "302"),
        (vec![around; 6], "more than 5 redirections"),
    ] {
        let (address, _asked) = serve(answers);
        let error = get(&format!("http://{address}/"), ENOUGH).unwrap_err();
        assert!(error.contains(why), "{error}");
    }
}

#[test]
fn a_machines_configuration_is_what_its_config_url_adds_to_it() {
    let text = "#cloud-config\nkcrypt: {challenger: {challenger_server: 'http://10.0.0.1:8082'}}\n";
    let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{text}", text.len());
    let (address, _asked) = serve(vec![answer, "HTTP/1.1 404 No\r\n\r\n".into()]);
    let directory = tempfile::tempdir().unwrap();
    let file = format!("#cloud-config\nconfig_url: http://{address}/node.yaml\n");
    std::fs::write(directory.path().join("90.yaml"), file).unwrap();
    let directories = [directory.path().to_owned()];
    let config = oem::load(&directories, ENOUGH).unwrap();
    assert_eq!(config.challenger.servers, ["http://10.0.0.1:8082"]);
    assert!(config.unfetched.is_empty());
    // Without it nobody says that there is no server: this is not offline mode.
    let error = oem::load(&directories, ENOUGH).unwrap_err();
    assert_eq!(error.exit_code(), 10);
    assert!(error.to_string().contains("90.yaml:2: config_url: "), "{error}");
}

/// Upstream's fetch hangs here for ever.
#[test]
fn a_server_that_accepts_and_says_nothing_ends_at_the_deadline() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    let error = get(&url, Duration::from_secs(2)).unwrap_err();
    assert!(error.contains("no answer"), "{error}");
    // And one that nobody listens for.
    drop(listener);
    assert!(get(&url, Duration::from_secs(2)).is_err());
}

/// One certificate, by itself, for 127.0.0.1: PEM of it and of its key.
fn self_signed() -> (String, String) {
    let directory = tempfile::tempdir().unwrap();
    let (certificate, key) = (directory.path().join("crt"), directory.path().join("key"));
    let made = std::process::Command::new("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"])
        .args(["-subj", "/CN=x", "-days", "3650", "-addext", "basicConstraints=critical,CA:FALSE"])
        .args(["-addext", "subjectAltName=IP:127.0.0.1", "-keyout"])
        .arg(&key)
        .arg("-out")
        .arg(&certificate)
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    (std::fs::read_to_string(certificate).unwrap(), std::fs::read_to_string(key).unwrap())
}

/// Serves each of these answers over TLS to one connection.
fn serve_tls(certificate: &str, key: &str, answers: Vec<&'static str>) -> String {
    let chain = CertificateDer::pem_slice_iter(certificate.as_bytes()).map(Result::unwrap);
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain.collect(), key)
        .unwrap();
    let config = Arc::new(config);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for answer in answers {
            let (stream, _) = listener.accept().unwrap();
            let connection = rustls::ServerConnection::new(Arc::clone(&config)).unwrap();
            let mut stream = rustls::StreamOwned::new(connection, stream);
            // A client that does not trust us says so now.
            let mut line = [0; 1024];
            if stream.read(&mut line).is_ok() {
                stream.write_all(answer.as_bytes()).unwrap();
                stream.conn.send_close_notify();
                stream.flush().unwrap();
            }
        }
    });
    address
}

#[test]
fn a_document_by_https_comes_from_whom_the_certificate_names() {
    let (certificate, key) = self_signed();
    let (other, _) = self_signed();
    let away = "HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\n\r\n";
    let address = serve_tls(
        &certificate,
        &key,
        vec!["HTTP/1.1 200 OK\r\n\r\nhello", away, "", "", "", "", ""],
    );
    let get = |certificate: &str| {
        let url = &format!("https://{address}/");
        let request = Request { url, certificate: Some(certificate), max_bytes: 100 };
        Fetcher::until(Instant::now() + ENOUGH).get(&request)
    };
    assert_eq!(get(&certificate).unwrap(), b"hello");
    assert!(get(&certificate).unwrap_err().contains("away from https"));
    let error = Fetcher::until(Instant::now() + Duration::from_secs(5))
        .get(&Request {
            url: &format!("https://{address}/"),
            certificate: Some(&other),
            max_bytes: 100,
        })
        .unwrap_err();
    assert!(error.to_lowercase().contains("certificate"), "{error}");
}
