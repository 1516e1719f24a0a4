//! The same exchanges as in the boots, without a machine around them: the program of the initramfs, a
//! software TPM on a unix socket, and the real key server; and a power cut at every step of the first
//! enrolment.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use latchkey_soft_tpm::SoftTpm;
use latchkey_tests::kms::{Kms, Volume, secret_yaml};
use latchkey_tests::place::{Work, target};

const LABEL: &str = "COS_PERSISTENT";

/// A machine's TPM and configuration.
struct Machine {
    tpm: SoftTpm,
    work: Work,
    /// `latchkey.protocol`.
    protocol: &'static str,
}

struct Run {
    code: i32,
    stdout: String,
    stderr: String,
}

impl Machine {
    fn new(name: &str) -> Self {
        Self::speaking("auto", name)
    }

    fn speaking(protocol: &'static str, name: &str) -> Self {
        let machine = Self { tpm: SoftTpm::fresh(), work: Work::new(name).unwrap(), protocol };
        std::fs::create_dir(machine.config()).unwrap();
        machine.configure(None);
        machine
    }

    fn config(&self) -> PathBuf {
        self.work.file("oem")
    }

    fn configure(&self, server: Option<&str>) {
        let server =
            server.map_or_else(String::new, |url| format!("    challenger_server: {url}\n"));
        let text = format!(
            "#cloud-config\nkcrypt:\n  challenger:\n    tpm_device: {}\n{server}latchkey:\n  deadline: 20s\n  protocol: {}\n",
            self.tpm.device(),
            self.protocol
        );
        std::fs::write(self.config().join("99_kcrypt.yaml"), text).unwrap();
    }

    fn run(&self, arguments: &[&str], stdin: &str) -> Run {
        let program = target().join("boot/kcrypt-discovery-challenger");
        let mut child = Command::new(&program)
            .arg("--config")
            .arg(self.config())
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| {
                panic!("{}: {error}; run image/programs.sh", program.display())
            });
        let _ = child.stdin.take().unwrap().write_all(stdin.as_bytes());
        let done = child.wait_with_output().unwrap();
        Run {
            code: done.status.code().unwrap_or(-1),
            stdout: String::from_utf8(done.stdout).unwrap(),
            stderr: String::from_utf8(done.stderr).unwrap(),
        }
    }

    fn pubhash(&self) -> String {
        let device = self.tpm.device();
        self.run(&["--tpm-device", &device], "").stdout
    }

    fn get(&self) -> Run {
        self.run(&["get", "--partition-label", LABEL], "")
    }

    /// What Kairos' installer does: asks the plugin for a partition that is not encrypted yet.
    fn enrol(&self) -> (String, String) {
        let partition =
            format!(r#"{{\"filesystem_label\":\"{LABEL}\",\"type\":\"ext4\",\"name\":\"vda3\"}}"#);
        let event = format!(r#"{{"name":"discovery.password","data":"{partition}","file":""}}"#);
        let run = self.run(&["discovery.password"], &event);
        assert_eq!(run.code, 0, "{}", run.stderr);
        let answer: serde_json::Value = serde_json::from_str(&run.stdout).unwrap();
        let text = |key: &str| answer[key].as_str().unwrap().to_owned();
        (text("data"), text("error"))
    }

    fn volume<'a>(&self, pubhash: &'a str) -> Volume<'a> {
        Volume { name: "node-1", tpm_hash: pubhash, secret: None, quarantined: false }
    }
}

fn kms(name: &str) -> (Kms, String) {
    let mut kms = Kms::new(name).unwrap();
    kms.start().unwrap();
    let url = format!("http://127.0.0.1:{}", kms.port());
    (kms, url)
}

/// An ext4 file system with a file of random bytes, and room after it.
fn partition(work: &Work) -> (PathBuf, Vec<u8>) {
    let (image, source) = (work.file("partition"), work.file("source"));
    std::fs::create_dir(&source).unwrap();
    let mut data = vec![0; 3 << 20];
    getrandom::fill(&mut data).unwrap();
    std::fs::write(source.join("data"), &data).unwrap();
    std::fs::File::create(&image).unwrap().set_len(96 << 20).unwrap();
    let made = Command::new("mkfs.ext4")
        .args(["-q", "-F", "-L", LABEL, "-d"])
        .arg(&source)
        .arg(&image)
        .arg("32M")
        .status()
        .unwrap();
    assert!(made.success());
    (image, data)
}

fn opens(image: &Path, passphrase: &str) -> bool {
    let mut child = Command::new("cryptsetup")
        .args(["open", "--test-passphrase", "--key-file", "-"])
        .arg(image)
        .stdin(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(passphrase.as_bytes()).unwrap();
    child.wait().unwrap().success()
}

/// Decrypts in place and takes the file out again.
fn content(image: &Path, passphrase: &str) -> Vec<u8> {
    let header = image.with_extension("header");
    let mut child = Command::new("cryptsetup")
        .args([
            "reencrypt",
            "-q",
            "--decrypt",
            "--force-offline-reencrypt",
            "--key-file",
            "-",
            "--header",
        ])
        .arg(&header)
        .arg(image)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(passphrase.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success());
    let dumped = Command::new("debugfs").args(["-R", "cat data"]).arg(image).output().unwrap();
    dumped.stdout
}

#[test]
fn offline_the_tpm_alone_releases_what_encrypt_made() {
    let mut machine = Machine::new("x-offline");
    let (image, data) = partition(&machine.work);
    assert_eq!(machine.get().code, 31, "nothing is made by asking");
    let device = image.to_str().unwrap();
    let encrypted = machine.run(&["encrypt", "--recovery-key", "--device", device, LABEL], "");
    assert_eq!(encrypted.code, 0, "{}", encrypted.stderr);
    let recovery = encrypted.stdout.trim().split(' ').nth(1).unwrap().to_owned();
    machine.tpm.restart();
    let got = machine.get();
    assert_eq!(got.code, 0, "{}", got.stderr);
    assert!(opens(&image, &got.stdout) && opens(&image, &recovery));
    assert!(!encrypted.stderr.contains(&recovery) && !encrypted.stderr.contains(&got.stdout));
    let again = machine.run(&["encrypt", "--device", device, LABEL], "");
    assert_eq!(again.code, 0, "{}", again.stderr);
    assert!(content(&image, &got.stdout) == data, "the file is what it was");
}

#[test]
fn online_automatic_the_machine_enrols_once_and_is_known_from_then_on() {
    let machine = Machine::speaking("v1", "x-auto");
    let (mut kms, url) = kms("x-auto");
    machine.configure(Some(&url));
    let pubhash = machine.pubhash();

    let stranger = machine.get();
    assert_eq!(stranger.code, 30, "{}", stranger.stderr);
    kms.put_volume(&machine.volume(&pubhash)).unwrap();
    let unenrolled = wait_for_code(&machine, 31);
    assert!(unenrolled.stderr.contains("encrypt"), "{}", unenrolled.stderr);
    assert!(kms.secrets().unwrap().is_empty(), "asking makes nothing");

    let (image, data) = partition(&machine.work);
    let encrypted = machine.run(&["encrypt", "--device", image.to_str().unwrap(), LABEL], "");
    assert_eq!(encrypted.code, 0, "{}", encrypted.stderr);
    let secrets = kms.secrets().unwrap();
    assert_eq!(secrets.len(), 1);
    kms.stop();
    kms.start().unwrap();
    let got = machine.get();
    assert_eq!(got.code, 0, "{}", got.stderr);
    assert!(opens(&image, &got.stdout));
    assert!(!secrets[0].1.contains(&got.stdout), "the server has no passphrase it could read");
    assert_eq!(machine.enrol().0, got.stdout);
    assert_eq!(kms.secrets().unwrap(), secrets, "a second enrolment changes nothing");
    assert!(content(&image, &got.stdout) == data);
}

fn wait_for_code(machine: &Machine, code: i32) -> Run {
    // The server re-reads its store by itself.
    for _ in 0..50 {
        let run = machine.get();
        if run.code == code {
            return run;
        }
        std::thread::sleep(std::time::Duration::from_millis(200));
    }
    panic!("the exit code does not become {code}");
}

#[test]
fn online_static_an_operators_passphrase_is_released_until_quarantine() {
    let machine = Machine::new("x-static");
    let (kms, url) = kms("x-static");
    machine.configure(Some(&url));
    let pubhash = machine.pubhash();
    let volume = Volume { secret: Some(("mysecret", "pass")), ..machine.volume(&pubhash) };
    kms.put("secret.yaml", &secret_yaml("mysecret", "pass", "an operator's own")).unwrap();
    kms.put_volume(&volume).unwrap();
    let got = wait_for_code(&machine, 0);
    assert_eq!(got.stdout, "an operator's own");
    kms.put_volume(&Volume { quarantined: true, ..volume }).unwrap();
    let refused = wait_for_code(&machine, 30);
    assert!(refused.stderr.contains("quarantine"), "{}", refused.stderr);
    assert!(refused.stdout.is_empty());
}

/// The server's certificate is for its address, signed by an authority that only `certificate` names.
#[test]
fn over_tls_the_server_is_believed_by_the_configured_certificate_and_no_other() {
    let machine = Machine::new("x-tls");
    let folder = machine.work.path().to_owned();
    let at = |name: &str| folder.join(name);
    let made = Command::new("openssl")
        .args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=kms"])
        .args([
            "-addext",
            "subjectAltName=IP:127.0.0.1",
            "-addext",
            "basicConstraints=critical,CA:FALSE",
        ])
        .args([
            "-keyout",
            at("key.pem").to_str().unwrap(),
            "-out",
            at("cert.pem").to_str().unwrap(),
        ])
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let mut kms = Kms::new("x-tls").unwrap().tls(&at("cert.pem"), &at("key.pem"));
    kms.start().unwrap();
    let pubhash = machine.pubhash();
    let volume = Volume { secret: Some(("mysecret", "pass")), ..machine.volume(&pubhash) };
    kms.put("secret.yaml", &secret_yaml("mysecret", "pass", "over TLS")).unwrap();
    kms.put_volume(&volume).unwrap();

    let write = |url: &str, certificate: &str| {
        let text = format!(
            "#cloud-config\nkcrypt:\n  challenger:\n    tpm_device: {}\n    challenger_server: {url}\n{certificate}latchkey:\n  deadline: 5s\n",
            machine.tpm.device()
        );
        std::fs::write(machine.config().join("99_kcrypt.yaml"), text).unwrap();
    };
    let url = format!("https://127.0.0.1:{}", kms.port());
    let pem = std::fs::read_to_string(at("cert.pem")).unwrap();
    let inline: String = pem.lines().map(|line| format!("      {line}\n")).collect();
    write(&url, &format!("    certificate: |\n{inline}"));
    assert_eq!(wait_for_code(&machine, 0).stdout, "over TLS");
    write(&url, &format!("    certificate: {}\n", at("cert.pem").display()));
    assert_eq!(machine.get().stdout, "over TLS", "a path does as well");

    write(&url, "");
    let stranger = machine.get();
    assert_eq!(stranger.code, 21, "{}", stranger.stderr);
    assert!(
        stranger.stderr.contains("TLS with") && stranger.stdout.is_empty(),
        "{}",
        stranger.stderr
    );
    write(&url.replace("127.0.0.1", "localhost"), &format!("    certificate: |\n{inline}"));
    let misnamed = machine.get();
    assert_eq!(misnamed.code, 21, "{}", misnamed.stderr);
    write(&url.replace("https", "http"), "");
    assert_eq!(machine.get().code, 22, "plain HTTP to a TLS port");
}

#[test]
fn another_tpm_gets_neither_the_secret_nor_the_passphrase() {
    let (machine, thief) = (Machine::speaking("v1", "x-owner"), Machine::new("x-thief"));
    let (kms, url) = kms("x-thief");
    machine.configure(Some(&url));
    thief.configure(Some(&url));
    let pubhash = machine.pubhash();
    kms.put_volume(&machine.volume(&pubhash)).unwrap();
    wait_for_code(&machine, 31);
    let (passphrase, error) = machine.enrol();
    assert_eq!((passphrase.len(), error.as_str()), (52, ""));
    let refused = thief.get();
    assert_eq!(refused.code, 30, "{}", refused.stderr);
    // And with the owner's sealed blob in hand it can do nothing either.
    let thiefs = thief.pubhash();
    kms.put(
        "theft.yaml",
        &Volume {
            name: "theft",
            tpm_hash: &thiefs,
            secret: Some(("node-1-cos-persistent", "passphrase")),
            quarantined: false,
        }
        .yaml(),
    )
    .unwrap();
    let sealed = wait_for_code(&thief, 12);
    assert!(sealed.stderr.contains("RSA_Decrypt"), "{}", sealed.stderr);
}

/// Cuts the power after `commands` TPM commands of an enrolment, and enrols again. Whether the first one came to its end.
fn enrol_cut(machine: &mut Machine, commands: u32) -> bool {
    machine.tpm.cut_after(commands);
    let (first, _) = machine.enrol();
    machine.tpm.mend();
    machine.tpm.restart();
    let (passphrase, error) = machine.enrol();
    assert_eq!((passphrase.len(), error.as_str()), (52, ""), "cut after {commands} commands");
    assert!(first.is_empty() || first == passphrase, "cut after {commands} commands");
    assert_eq!(machine.get().stdout, passphrase, "cut after {commands} commands");
    !first.is_empty()
}

/// Offline: the power goes after each TPM command of the first enrolment in turn.
#[test]
fn a_power_cut_at_any_tpm_command_of_the_offline_enrolment_is_made_good() {
    let uncut = (0..).find(|cut| enrol_cut(&mut Machine::new("x-cut-off"), *cut)).unwrap();
    assert!(uncut > 10, "only {uncut} commands");
}

/// Online: likewise.
#[test]
fn a_power_cut_at_any_tpm_command_of_the_online_enrolment_is_made_good() {
    let (kms, url) = kms("x-cut-tpm");
    let cut = |commands: u32| {
        let mut machine = Machine::speaking("v1", "x-cut-tpm");
        machine.configure(Some(&url));
        let (pubhash, name) = (machine.pubhash(), format!("node-{commands}"));
        kms.put_volume(&Volume { name: &name, ..machine.volume(&pubhash) }).unwrap();
        wait_for_code(&machine, 31);
        enrol_cut(&mut machine, commands)
    };
    let uncut = (0..).find(|commands| cut(*commands)).unwrap();
    assert!(uncut > 20, "only {uncut} commands");
}

/// Online: the line goes after each of a row of bytes, in either direction, for good.
#[test]
fn a_line_cut_anywhere_in_the_online_enrolment_is_made_good() {
    for (protocol, length) in [("v1", 52), ("v2", 44)] {
        cut_lines(protocol, length);
    }
}

fn cut_lines(protocol: &'static str, length: usize) {
    let work = format!("x-cut-line-{protocol}");
    let (kms, url) = kms(&work);
    let server: SocketAddr = url.trim_start_matches("http://").parse().unwrap();
    let machine = Machine::speaking(protocol, &work);
    let pubhash = machine.pubhash();
    let mut budget = 0;
    loop {
        let name = format!("node-{budget}");
        kms.put_volume(&Volume { name: &name, ..machine.volume(&pubhash) }).unwrap();
        machine.configure(Some(&url));
        wait_for_code(&machine, 31);
        let line = cutting(server, budget);
        machine.configure(Some(&format!("http://{line}")));
        let text = std::fs::read_to_string(machine.config().join("99_kcrypt.yaml")).unwrap();
        std::fs::write(machine.config().join("99_kcrypt.yaml"), text.replace("20s", "3s")).unwrap();
        let (first, _) = machine.enrol();
        machine.configure(Some(&url));
        let (passphrase, error) = machine.enrol();
        let cut = format!("{protocol}, cut after {budget} bytes");
        assert_eq!((passphrase.len(), error.as_str()), (length, ""), "{cut}");
        assert!(first.is_empty() || first == passphrase, "{cut}");
        assert_eq!(machine.get().stdout, passphrase, "{cut}");
        if !first.is_empty() {
            break;
        }
        for (file, _) in kms.secrets().unwrap() {
            std::fs::remove_file(file).unwrap();
        }
        std::fs::remove_file(kms.store().join(format!("{name}.yaml"))).unwrap();
        budget += 900;
    }
    assert!(budget > 2000, "{protocol}: the exchange has more than {budget} bytes");
}

/// Generation 2 with nothing prepared on the server: asking makes nothing, an installation enrols, and from the first
/// boot on the machine is held to the state it started in.
#[test]
fn over_generation_2_an_installation_enrols_and_a_boot_only_asks() {
    const CREATE: u32 = 0x153;
    let machine = Machine::new("x-tofu");
    let (mut kms, url) = kms("x-tofu");
    machine.configure(Some(&url));
    let stranger = machine.get();
    assert_eq!(stranger.code, 30, "{}", stranger.stderr);
    assert!(kms.secrets().unwrap().is_empty(), "asking makes nothing");

    let (passphrase, error) = machine.enrol();
    assert_eq!((passphrase.len(), error.as_str()), (44, ""));
    kms.stop();
    kms.start().unwrap();
    assert_eq!(machine.get().stdout, passphrase);
    assert_eq!(machine.enrol().0, passphrase, "a second enrolment changes nothing");
    assert_eq!(kms.secrets().unwrap().len(), 1);

    machine.tpm.extend_after(CREATE, 7, 1);
    let tampered = machine.get();
    assert_eq!(tampered.code, 30, "{}", tampered.stderr);
    assert!(tampered.stderr.contains("PCR7") && tampered.stdout.is_empty(), "{}", tampered.stderr);
}

/// What a machine of generation 1 has left with the server opens over generation 2 as well: an update of the program
/// bricks nothing.
#[test]
fn a_machine_of_generation_1_goes_on_by_generation_2() {
    let mut machine = Machine::speaking("v1", "x-move");
    let (kms, url) = kms("x-move");
    machine.configure(Some(&url));
    let pubhash = machine.pubhash();
    kms.put_volume(&machine.volume(&pubhash)).unwrap();
    wait_for_code(&machine, 31);
    let (passphrase, error) = machine.enrol();
    assert_eq!((passphrase.len(), error.as_str()), (52, ""));
    let secrets = kms.secrets().unwrap();
    for protocol in ["auto", "v2"] {
        machine.protocol = protocol;
        machine.configure(Some(&url));
        let run = machine.get();
        assert_eq!((run.code, &run.stdout), (0, &passphrase), "{protocol}: {}", run.stderr);
    }
    assert_eq!(kms.secrets().unwrap(), secrets);
    machine.protocol = "v1";
    machine.configure(Some(&url));
    let back = machine.get();
    assert_eq!(
        (back.code, back.stdout.as_str()),
        (30, ""),
        "its PCRs are known now: {}",
        back.stderr
    );
}

/// A relay to `server` that stops for good once `budget` bytes have passed, both ways together.
fn cutting(server: SocketAddr, budget: i64) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let left = Arc::new(AtomicI64::new(budget));
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            if left.load(Ordering::SeqCst) <= 0 {
                continue;
            }
            let upstream = TcpStream::connect(server).unwrap();
            for (from, to) in [(&client, &upstream), (&upstream, &client)] {
                let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                let left = Arc::clone(&left);
                std::thread::spawn(move || copy(from, to, &left));
            }
        }
    });
    address
}

fn copy(mut from: TcpStream, mut to: TcpStream, left: &AtomicI64) {
    let mut buffer = [0; 256];
    while let Ok(got @ 1..) = from.read(&mut buffer) {
        let allowed = left.fetch_sub(got as i64, Ordering::SeqCst).clamp(0, got as i64);
        if to.write_all(&buffer[..allowed as usize]).is_err() || allowed < got as i64 {
            break;
        }
    }
    for stream in [&from, &to] {
        let _ = stream.shutdown(Shutdown::Both);
    }
}

/// A check is no enrolment: a server that takes whoever comes does not take whoever only looks.
#[test]
fn doctor_finds_the_key_server_and_leaves_nothing_in_its_store() {
    let (mut kms, url) = kms("doctor");
    let machine = Machine::new("doctor-machine");
    machine.configure(Some(&url));
    let stored = |kms: &Kms| (kms.volumes().unwrap(), kms.secrets().unwrap());
    let before = stored(&kms);
    let run = machine.run(&["doctor"], "");
    assert!(run.stdout.contains("answers, and speaks generation 2 and 1"), "{}", run.stdout);
    assert_eq!(stored(&kms), before);
    kms.stop();
    let run = machine.run(&["doctor"], "");
    let told = run.stdout.lines().find(|line| line.starts_with("FAIL  key server"));
    assert!(told.is_some_and(|line| line.contains("port open?")), "{}", run.stdout);
    assert_ne!(run.code, 0);
}
