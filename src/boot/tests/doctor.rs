//! `doctor` against set-ups that are broken in one way each.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

#[allow(unreachable_pub)]
mod common;

use std::io::{BufRead, BufReader, Read};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};

use common::{Directory, Machine, Run, serve};
use latchkey_soft_tpm::SoftTpm;
use serde_json::Value;
use tungstenite::handshake::server::{ErrorResponse, Request, Response};

/// The findings on what a test has in its hand. The host's network, disks and boot are what they are.
fn findings(run: &Run) -> Vec<&str> {
    const HOSTS: [&str; 9] = [
        "link ",
        "addresses",
        "network",
        "default route",
        "name servers",
        "kernel command line",
        "initramfs",
        "this boot",
        "volume ",
    ];
    let of_host = |line: &&str| HOSTS.iter().any(|what| line.get(6..).unwrap().starts_with(what));
    run.text().lines().filter(|line| !of_host(line)).collect()
}

/// The one finding that begins so.
fn finding<'a>(run: &'a Run, beginning: &str) -> &'a str {
    let found: Vec<_> = run.text().lines().filter(|line| line.starts_with(beginning)).collect();
    assert_eq!(found.len(), 1, "{beginning}: {}", run.text());
    found[0]
}

fn closed_port() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

fn install(machine: &Machine) {
    let event = r#"{"name":"discovery.password","data":"{\"label\":\"COS_PERSISTENT\",\"type\":\"ext4\"}","file":""}"#;
    let run = machine.run_with(&["discovery.password"], event.as_bytes(), &[]);
    assert!(run.text().contains(r#""error":"""#), "{}", run.text());
}

#[test]
fn each_finding_is_one_line_with_its_level_and_json_has_them_all() {
    let machine = Machine::new(SoftTpm::fresh());
    install(&machine);
    let run = machine.run(&["doctor"]);
    for line in run.text().lines() {
        let level = line.get(..6).unwrap();
        assert!(["ok    ", "warn  ", "FAIL  "].contains(&level), "{line}");
        assert!(line.contains(": "), "{line}");
    }
    assert!(findings(&run).iter().all(|line| line.starts_with("ok ")), "{}", run.text());
    for what in [
        "configuration: ",
        "what is unlocked: ",
        "mesh: ",
        "clock: ",
        "TPM: ",
        "TPM lockout: ",
        "TPM passwords: ",
        "endorsement key: ",
        "attestation key: ",
        "passphrase in NV index 0x01500000: ",
    ] {
        finding(&run, &format!("ok    {what}"));
    }
    let json: Value = serde_json::from_slice(&machine.run(&["doctor", "--json"]).stdout).unwrap();
    let checks = json["checks"].as_array().unwrap();
    assert_eq!(checks.len(), run.text().lines().count());
    let failed: Vec<_> = checks.iter().filter(|check| check["level"] == "fail").collect();
    assert_eq!(json["healthy"], failed.is_empty());
    let code = failed.first().map_or(0, |check| check["code"].as_i64().unwrap());
    assert_eq!(i64::from(run.code), code, "the exit code is that of the first failure");
}

#[test]
fn it_leaves_nothing_behind_that_a_boot_would_not() {
    let machine = Machine::new(SoftTpm::fresh());
    machine.serve(speaking(&["/getPass"]).0);
    machine.run(&["doctor"]);
    let listed = Command::new("tpm2_getcap")
        .arg("handles-nv-index")
        .env("TPM2TOOLS_TCTI", format!("swtpm:path={}", machine.tpm.direct().display()))
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&listed.stdout).trim(), "");
}

#[test]
fn a_machine_without_a_tpm() {
    let machine = Machine::new(SoftTpm::fresh());
    machine.write("kcrypt: {challenger: {tpm_device: /nonexistent/tpm}}\n");
    let run = machine.run(&["doctor"]);
    assert_eq!(run.code, 11, "{}", run.text());
    assert!(finding(&run, "FAIL  TPM: ").contains("/nonexistent/tpm"));
    // What is on the command line goes before.
    let run = machine.run(&["doctor", "--tpm-device", &machine.tpm.device()]);
    finding(&run, "ok    TPM: ");
}

#[test]
fn a_tpm_with_a_password_and_one_in_lockout() {
    let machine = Machine::new(SoftTpm::fresh());
    let tools = |script: &str| {
        let tcti = format!("swtpm:path={}", machine.tpm.direct().display());
        let done = Command::new("sh")
            .args(["-ec", script])
            .current_dir(&machine.config.0)
            .env("TPM2TOOLS_TCTI", tcti)
            .output();
        assert!(done.as_ref().unwrap().status.success(), "{done:?}");
    };
    tools("tpm2_changeauth -c owner secret");
    let run = machine.run(&["doctor"]);
    assert_eq!(run.code, 14, "{}", run.text());
    assert!(finding(&run, "FAIL  TPM passwords: ").contains("owner"));
    // One failure is enough, and then one comes.
    tools(
        "tpm2_changeauth -c owner -p secret; tpm2_dictionarylockout -s -n 1 -t 1000 -l 1000
         tpm2_createprimary -Q -C o -p pw -c parent.ctx -a 'fixedtpm|fixedparent|sensitivedataorigin|userwithauth|restricted|decrypt'
         tpm2_flushcontext -t; ! tpm2_create -Q -C parent.ctx -P wrong -u public -r private; tpm2_flushcontext -t",
    );
    let run = machine.run(&["doctor"]);
    assert_eq!(run.code, 13, "{}", run.text());
    assert!(finding(&run, "FAIL  TPM lockout: ").contains("recovers by itself"));
}

#[test]
fn a_foreign_object_where_kcrypt_keeps_its_key() {
    let machine = Machine::new(SoftTpm::fresh());
    let done = Command::new("sh")
        .args(["-ec", "tpm2_createprimary -Q -C o -c key.ctx; tpm2_flushcontext -t; tpm2_evictcontrol -Q -C o -c key.ctx 0x81010001; tpm2_flushcontext -t"])
        .current_dir(&machine.config.0)
        .env("TPM2TOOLS_TCTI", format!("swtpm:path={}", machine.tpm.direct().display()))
        .status();
    assert!(done.unwrap().success());
    let run = machine.run(&["doctor"]);
    assert!(finding(&run, "warn  TPM handle 0x81010001").contains("cleanup --keys --force"));
}

#[test]
fn a_machine_that_was_never_installed() {
    let machine = Machine::new(SoftTpm::fresh());
    let run = machine.run(&["doctor"]);
    assert_eq!(run.code, 31, "{}", run.text());
    assert!(finding(&run, "FAIL  passphrase in NV index").contains("encrypt"));
}

#[test]
fn a_typo_in_the_configuration() {
    let machine = Machine::new(SoftTpm::fresh());
    machine.write("kcrypt:\n  challenger:\n    challenger_sever: http://a\n");
    let run = machine.run(&["doctor", "--tpm-device", &machine.tpm.device()]);
    assert_eq!(run.code, 10, "{}", run.text());
    let line = finding(&run, "FAIL  configuration: /");
    assert!(line.contains("90_latchkey.yaml") && line.contains("challenger_sever"), "{line}");
    // The rest is still looked at; what depends on the configuration is not guessed.
    finding(&run, "ok    attestation key: ");
    assert!(!run.text().contains("NV index"), "{}", run.text());
}

#[test]
fn a_file_that_lacks_its_header() {
    let machine = Machine::new(SoftTpm::fresh());
    std::fs::write(machine.config.0.join("10_server.yaml"), "kcrypt: {}\n").unwrap();
    let line = machine.run(&["doctor"]);
    let line = finding(&line, "warn  configuration: ");
    assert!(line.contains("10_server.yaml") && line.contains("#cloud-config"), "{line}");
}

#[test]
fn a_server_that_is_not_there() {
    let machine = Machine::new(SoftTpm::fresh());
    machine.serve(closed_port());
    let run = machine.run(&["doctor", "--json"]);
    let json: Value = serde_json::from_slice(&run.stdout).unwrap();
    let check = json["checks"].as_array().unwrap().iter();
    let check: Vec<_> =
        check.filter(|check| check["level"] == "fail" && check["code"] == 21).collect();
    assert_eq!(check.len(), 1, "{json:#}");
    assert!(check[0]["found"].as_str().unwrap().contains("port open?"), "{json:#}");
}

#[test]
fn a_second_server_makes_up_for_the_first() {
    let machine = Machine::new(SoftTpm::fresh());
    let (good, _) = speaking(&["/getPass", "/tpm-attestation"]);
    machine.configure(&format!("challenger_server: [http://{}, http://{good}]", closed_port()));
    let run = machine.run(&["doctor"]);
    assert!(!findings(&run).iter().any(|line| line.starts_with("FAIL")), "{}", run.text());
    finding(
        &run,
        &format!("ok    key server {good} at 127.0.0.1: answers, and speaks generation 2 and 1"),
    );
}

#[test]
fn generations_are_told_apart_and_held_against_the_configuration() {
    for (paths, protocol, code, words) in [
        (&["/getPass"][..], "auto", 0, "ok    key server"),
        (&["/tpm-attestation"], "auto", 0, "ok    key server"),
        (&["/getPass"], "v2", 22, "speaks generation 1, which is not what latchkey.protocol wants"),
        (&["/tpm-attestation"], "v1", 22, "speaks generation 2, which is not"),
        (&[], "auto", 22, "HTTP 404"),
    ] {
        let machine = Machine::new(SoftTpm::fresh());
        let (server, _) = speaking(paths);
        machine.write(&format!(
            "kcrypt: {{challenger: {{tpm_device: {}, challenger_server: 'http://{server}'}}}}\nlatchkey: {{protocol: {protocol}}}\n",
            machine.tpm.device()
        ));
        let run = machine.run(&["doctor", "--json"]);
        let json: Value = serde_json::from_slice(&run.stdout).unwrap();
        let check = json["checks"].as_array().unwrap().iter();
        let mut checks = check.filter(|check| check["what"].as_str().unwrap().contains(" at 127."));
        let check = checks.next().unwrap();
        assert_eq!(check["code"], code, "{paths:?} {protocol}: {check}");
        let text = machine.run(&["doctor"]);
        assert!(text.text().contains(words), "{paths:?} {protocol}: {}", text.text());
    }
}

/// A server that records what comes on its WebSockets hears nothing: nobody is enrolled by a check.
#[test]
fn a_server_is_told_nothing() {
    let machine = Machine::new(SoftTpm::fresh());
    let (server, heard) = speaking(&["/getPass", "/tpm-attestation"]);
    machine.serve(server);
    machine.run(&["doctor"]);
    let heard: Vec<_> = heard.try_iter().collect();
    assert_eq!(heard, ["/tpm-attestation", "/getPass"], "paths alone, no message and no token");
}

/// What `openssl s_server` with a certificate of its own is to a machine that trusts another.
#[test]
fn a_server_with_a_certificate_of_another_authority() {
    let machine = Machine::new(SoftTpm::fresh());
    let tls = TlsServer::start();
    machine.configure(&format!("challenger_server: https://{}", tls.address));
    let run = machine.run(&["doctor"]);
    let line = finding(&run, "FAIL  key server ");
    assert!(line.contains("TLS with") && line.contains("UnknownIssuer"), "{line}");
    // With the right authority, TLS is no longer what is wrong with it.
    let pem = std::fs::read_to_string(tls.directory.0.join("ca")).unwrap();
    std::fs::write(machine.config.0.join("ca.pem"), pem).unwrap();
    let path = machine.config.0.join("ca.pem");
    machine.configure(&format!(
        "challenger_server: https://{}\ncertificate: {}",
        tls.address,
        path.display()
    ));
    let run = machine.run(&["doctor"]);
    assert!(!finding(&run, "FAIL  key server ").contains("TLS with"), "{}", run.text());
}

/// `openssl req -x509` makes an authority's certificate. Go takes it for the server's as well if it is the one configured.
#[test]
fn a_server_that_shows_the_very_certificate_that_is_trusted() {
    let machine = Machine::new(SoftTpm::fresh());
    let tls = TlsServer::showing(
        "openssl req -x509 $new -days 3650 -subj /CN=kms -addext subjectAltName=IP:127.0.0.1 -keyout key -out cert",
    );
    let certificate = tls.directory.0.join("cert");
    let trust = |server: &str| {
        machine.configure(&format!(
            "challenger_server: https://{server}\ncertificate: {}",
            certificate.display()
        ));
        let run = machine.run(&["doctor"]);
        finding(&run, "FAIL  key server ").to_owned()
    };
    // This server does TLS and no WebSocket.
    let line = trust(&tls.address.to_string());
    assert!(!line.contains("TLS with"), "{line}");
    // It is trusted under its own name alone.
    let line = trust(&format!("localhost:{}", tls.address.port()));
    assert!(line.contains("NotValidForName") || line.contains("not valid for name"), "{line}");
}

/// Answers upgrades on `paths` and 404 on all others; the receiver gets the paths asked for, and every message that came.
#[allow(clippy::result_large_err)]
fn speaking(paths: &'static [&'static str]) -> (SocketAddr, Receiver<String>) {
    let (sender, receiver) = channel();
    let act = move |stream: TcpStream| {
        let socket = tungstenite::accept_hdr(stream, |request: &Request, response: Response| {
            let path = request.uri().path();
            let with =
                if request.headers().contains_key("authorization") { " with a token" } else { "" };
            let _ = sender.send(format!("{path}{with}"));
            if paths.contains(&path) {
                Ok(response)
            } else {
                let mut refused = ErrorResponse::new(None);
                *refused.status_mut() = tungstenite::http::StatusCode::NOT_FOUND;
                Err(refused)
            }
        });
        let Ok(mut socket) = socket else { return };
        while let Ok(message) = socket.read() {
            if !message.is_close() {
                let _ = sender.send(format!("{message:?}"));
            }
        }
    };
    (serve(vec![Box::new(act)]), receiver)
}

/// A TLS server that speaks nothing useful.
struct TlsServer {
    directory: Directory,
    child: Child,
    address: SocketAddr,
}

impl TlsServer {
    /// Has a certificate of an authority of its own, `ca`.
    fn start() -> Self {
        Self::showing(
            "openssl req -x509 $new -days 3650 -subj /CN=authority -keyout ca.key -out ca
             openssl req $new -subj /CN=server -keyout key -out request
             echo subjectAltName=IP:127.0.0.1 > extensions
             openssl x509 -req -in request -CA ca -CAkey ca.key -CAcreateserial -days 3650 -extfile extensions -out cert",
        )
    }

    /// Shows what `script` makes: `key` and `cert`.
    fn showing(script: &str) -> Self {
        let directory = Directory::new();
        let new = "new='-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes'";
        let made = Command::new("sh")
            .args(["-ec", &format!("{new}\n{script}")])
            .current_dir(&directory.0)
            .output()
            .unwrap();
        assert!(made.status.success(), "{made:?}");
        let mut child = Command::new("openssl")
            .args(["s_server", "-accept", "127.0.0.1:0", "-key", "key", "-cert", "cert", "-www"])
            .current_dir(&directory.0)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // `ACCEPT 127.0.0.1:PORT`, once it listens.
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let address = loop {
            let mut line = String::new();
            assert!(output.read_line(&mut line).unwrap() > 0, "openssl s_server ended");
            if let Some(address) = line.trim().strip_prefix("ACCEPT ") {
                break address.parse().unwrap();
            }
        };
        std::thread::spawn(move || output.read_to_end(&mut Vec::new()));
        Self { directory, child, address }
    }
}

impl Drop for TlsServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
