//! A machine for tests: a software TPM, a configuration, the program; and a key server that does what
//! a test tells it, on real sockets.

#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::Write;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use latchkey_soft_tpm::SoftTpm;
use latchkey_wire::attest::{AkPublic, AttestationParameters, check_ak};
use latchkey_wire::ek::RsaPublicKey;
use latchkey_wire::v1::{Challenge, ChallengeResponse, Token};
use latchkey_wire::v2::{self, Init, Proof};
use tungstenite::handshake::server::{Request, Response};
use tungstenite::{Message, WebSocket};

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// A temporary directory that goes with its owner.
#[derive(Debug)]
pub struct Directory(pub PathBuf);

impl Directory {
    pub fn new() -> Self {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("lk-boot-{}-{number}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// What the program did.
#[derive(Debug)]
pub struct Run {
    pub code: i32,
    pub stdout: Vec<u8>,
    pub stderr: String,
}

impl Run {
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.stdout).unwrap()
    }
}

/// A machine with a TPM and a cloud-config.
#[derive(Debug)]
pub struct Machine {
    pub tpm: SoftTpm,
    pub config: Directory,
    /// `latchkey.protocol`.
    protocol: &'static str,
}

impl Machine {
    /// A machine that speaks generation 1.
    pub fn new(tpm: SoftTpm) -> Self {
        Self::speaking("v1", tpm)
    }

    pub fn speaking(protocol: &'static str, tpm: SoftTpm) -> Self {
        let machine = Self { tpm, config: Directory::new(), protocol };
        machine.configure("");
        machine
    }

    /// Writes the configuration: the TPM, and `challenger`, lines below `kcrypt.challenger`.
    pub fn configure(&self, challenger: &str) {
        let device = self.tpm.device();
        let lines: String =
            challenger.lines().map(|line| format!("    {}\n", line.trim_end())).collect();
        self.write(&format!(
            "kcrypt:\n  challenger:\n    tpm_device: {device}\n{lines}latchkey:\n  deadline: 10s\n  protocol: {}\n",
            self.protocol
        ));
    }

    pub fn write(&self, yaml: &str) {
        std::fs::write(self.config.0.join("90_latchkey.yaml"), format!("#cloud-config\n{yaml}"))
            .unwrap();
    }

    pub fn serve(&self, server: SocketAddr) {
        self.configure(&format!("challenger_server: http://{server}"));
    }

    pub fn run(&self, arguments: &[&str]) -> Run {
        self.run_with(arguments, b"", &[])
    }

    pub fn run_with(&self, arguments: &[&str], stdin: &[u8], environment: &[(&str, &str)]) -> Run {
        let mut child = Command::new(env!("CARGO_BIN_EXE_kcrypt-discovery-challenger"))
            .arg("--config")
            .arg(&self.config.0)
            .args(arguments)
            .envs(environment.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let _ = child.stdin.take().unwrap().write_all(stdin);
        let Output { status, stdout, stderr } = child.wait_with_output().unwrap();
        Run {
            code: status.code().unwrap_or(-1),
            stdout,
            stderr: String::from_utf8(stderr).unwrap(),
        }
    }

    pub fn get(&self) -> Run {
        self.run(&["get", "--partition-label", "COS_PERSISTENT"])
    }
}

/// Serves each connection with the next of `acts`, the last one for ever.
pub fn serve(acts: Vec<Box<dyn Fn(TcpStream) + Send>>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for (number, stream) in listener.incoming().flatten().enumerate() {
            let act = acts.get(number).or(acts.last()).unwrap();
            // A client that gives up in the middle is no end of the server.
            let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| act(stream)));
        }
    });
    address
}

/// A WebSocket and what its upgrade request said.
pub struct Client {
    pub socket: WebSocket<TcpStream>,
    pub path: String,
    pub token: Token,
    pub label: String,
}

/// Upgrades as Go's server does.
#[allow(clippy::result_large_err)]
pub fn upgrade(stream: TcpStream) -> Client {
    let (mut path, mut authorization, mut label) = Default::default();
    let socket = tungstenite::accept_hdr(stream, |request: &Request, response: Response| {
        let header =
            |name| request.headers().get(name).map(|value| value.to_str().unwrap().to_owned());
        path = request.uri().path().to_owned();
        authorization = header("authorization").unwrap_or_default();
        label = header("label").unwrap_or_default();
        Ok(response)
    })
    .unwrap();
    let token = Token::parse_authorization(String::as_bytes(&authorization)).unwrap();
    Client { socket, path, token, label }
}

/// A challenge that the client's TPM can answer, and the secret in it.
pub fn challenge(token: &Token) -> (Challenge, [u8; 32]) {
    challenge_to(&RsaPublicKey::from_pem(&token.ek_pem).unwrap(), &token.ak)
}

fn challenge_to(ek: &RsaPublicKey, ak: &AttestationParameters) -> (Challenge, [u8; 32]) {
    let ak = check_ak(ak).unwrap();
    let (mut secret, mut seed) = ([0; 32], [0; 16]);
    getrandom::fill(&mut secret).unwrap();
    getrandom::fill(&mut seed).unwrap();
    let challenge =
        latchkey_wire::credential::make_credential(ek, &ak.name, &secret, &seed).unwrap();
    (challenge, secret)
}

/// Upgrades and authenticates, asserting that the client recovers the secret.
pub fn authenticate(stream: TcpStream) -> Client {
    let mut client = upgrade(stream);
    let (challenge, secret) = challenge(&client.token);
    client.socket.send(Message::binary(challenge.to_json().into_bytes())).unwrap();
    let answer = client.socket.read().unwrap().into_data();
    assert_eq!(*ChallengeResponse::from_json(&answer).unwrap().secret, secret);
    client
}

/// An act that authenticates and then sends `payload` in a binary frame.
pub fn answering(payload: &'static str) -> Box<dyn Fn(TcpStream) + Send> {
    Box::new(move |stream| {
        let mut client = authenticate(stream);
        client.socket.send(Message::binary(payload.as_bytes().to_vec())).unwrap();
    })
}

/// A client of generation 2 that has sent its init.
pub struct Attesting {
    pub socket: WebSocket<TcpStream>,
    pub path: String,
    pub headers: Vec<(String, String)>,
    pub init: Init,
}

/// Upgrades and reads the init.
#[allow(clippy::result_large_err)]
pub fn begin(stream: TcpStream) -> Attesting {
    let (mut path, mut headers) = (String::new(), Vec::new());
    let mut socket =
        tungstenite::accept_hdr(stream, |request: &Request, response: Response| {
            path = request.uri().path().to_owned();
            headers.extend(request.headers().iter().map(|(name, value)| {
                (name.as_str().to_owned(), value.to_str().unwrap().to_owned())
            }));
            Ok(response)
        })
        .unwrap();
    let message = socket.read().unwrap();
    assert!(message.is_text() && message.to_text().unwrap().ends_with('\n'), "{message:?}");
    let init = Init::from_json(&message.into_data()).unwrap();
    Attesting { socket, path, headers, init }
}

impl Attesting {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(of, _)| of == name).map(|(_, value)| value.as_str())
    }

    pub fn ak(&self) -> AkPublic {
        check_ak(&self.init.ak).unwrap()
    }

    /// Sends a challenge, and takes the proof with the right secret.
    pub fn prove(&mut self) -> (Proof, [u8; 32]) {
        let ek = RsaPublicKey::from_spki(&self.init.ek_spki).unwrap();
        let (challenge, secret) = challenge_to(&ek, &self.init.ak);
        self.socket.send(Message::text(v2::challenge_to_json(&challenge))).unwrap();
        let proof = Proof::from_json(&self.socket.read().unwrap().into_data()).unwrap();
        assert_eq!(*proof.secret.0, secret);
        (proof, secret)
    }
}

/// An act of generation 2 that takes the proof and then sends `answer`.
pub fn releasing(answer: &str) -> Box<dyn Fn(TcpStream) + Send> {
    let answer = answer.to_owned();
    Box::new(move |stream| {
        let mut client = begin(stream);
        client.prove();
        client.socket.send(Message::text(answer.as_str())).unwrap();
    })
}

/// The path that a connection asks for, left for the next reader.
pub fn peek_path(stream: &TcpStream) -> String {
    let mut buffer = [0; 4096];
    loop {
        let length = stream.peek(&mut buffer).unwrap();
        let text = String::from_utf8_lossy(buffer.get(..length).unwrap_or_default());
        if let Some((line, _)) = text.split_once("\r\n") {
            return line.split(' ').nth(1).unwrap().to_owned();
        }
        assert!(length > 0, "the client has hung up");
        std::thread::yield_now();
    }
}

/// What Go's server of one generation says to the paths of the other.
pub fn not_found(mut stream: TcpStream) {
    use std::io::Read;
    let mut request = [0; 8192];
    let _ = stream.read(&mut request);
    let _ = stream.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n");
}

/// Whether this is the test itself, in a network and a file system of its own where it is root; if not, it is run
/// there, by its name, and this returns false when it has passed.
pub fn in_a_world_of_its_own(test: &str) -> bool {
    const MARK: &str = "LATCHKEY_TEST_WORLD";
    if std::env::var_os(MARK).is_some() {
        for command in [
            "ip link set lo up",
            "ip link set lo multicast on",
            "mount -t tmpfs none /run",
            "mkdir -p /run/systemd/netif",
        ] {
            command_line(command);
        }
        return true;
    }
    let is_root = nix::unistd::geteuid().is_root();
    let mut command = Command::new("unshare");
    command.args(["--net", "--mount", "--fork", "--kill-child"]);
    command.args(if is_root { [].as_slice() } else { &["--map-root-user"] });
    let status = command
        .arg("--")
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(MARK, "1")
        .status()
        .expect("unshare is installed (util-linux)");
    assert!(status.success(), "{test}, in namespaces of its own");
    false
}

/// Runs a program with arguments that have no blanks in them.
pub fn command_line(line: &str) {
    let mut words = line.split(' ');
    let status = Command::new(words.next().unwrap()).args(words).status().unwrap();
    assert!(status.success(), "{line}");
}

/// Puts `content` in the place of a file of the system; only in a world of its own.
pub fn replace_file(path: &str, content: &str) {
    let source = format!("/run/replaced-{}", NUMBER.fetch_add(1, Ordering::Relaxed));
    std::fs::write(&source, content).unwrap();
    let status = Command::new("mount").args(["--bind", &source, path]).status().unwrap();
    assert!(status.success(), "{path}");
}
