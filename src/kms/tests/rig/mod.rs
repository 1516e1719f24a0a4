//! What the tests share: the server as a process of its own, and machines whose TPM is software.
//!
//! A machine is a real RSA key that does TPM2_ActivateCredential by itself, with the attestation key recorded from a TPM
//! (`v1_token_json` of the vectors; its proof does not depend on the EK). Between them goes the real protocol.
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)] // helpers of tests

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, LazyLock, Mutex},
    thread,
    time::{Duration, Instant},
};

use latchkey_soft_identity::{Keys, SoftIdentity, new_key};
use latchkey_wire::{
    attest::AttestationParameters,
    pem,
    pubhash::Pubhash,
    v1::{Challenge, ChallengeResponse, Payload, Token},
    v2::{Answer, Init, Proof},
};
use serde_json::Value;
use tempfile::TempDir;
use tungstenite::{
    Message, WebSocket,
    http::{self, Request},
    protocol::Role,
};

/// Nothing here takes this long on a machine that is alive.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) static VECTORS: LazyLock<Value> = LazyLock::new(|| {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/vectors/kcrypt.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
});

/// The machine whose EK is in the vectors.
pub(crate) static MACHINE: LazyLock<Machine> = LazyLock::new(|| {
    let (_, ek) =
        pem::first_block(VECTORS["software_ek"]["private_pkcs8_pem"].as_str().unwrap()).unwrap();
    Machine::with(ek)
});

/// Another machine.
pub(crate) static STRANGER: LazyLock<Machine> = LazyLock::new(|| Machine::with(new_key()));

pub(crate) struct Machine {
    /// With the AK that was recorded from a TPM (`v1_token_json`), which cannot sign: generation 1 needs no more.
    recorded: SoftIdentity,
    /// With an AK of its own.
    pub(crate) soft: SoftIdentity,
    pub(crate) token: Token,
    pub(crate) pubhash: Pubhash,
}

impl Machine {
    fn with(ek: Vec<u8>) -> Self {
        let soft = SoftIdentity::with(Keys { ek, ak: new_key() });
        let mut recorded = SoftIdentity::with(soft.keys().clone());
        recorded.ak =
            AttestationParameters::from_json(VECTORS["v1_token_json"]["AK"].to_string().as_bytes())
                .unwrap();
        Self { token: recorded.token(), pubhash: soft.pubhash(), recorded, soft }
    }

    /// TPM2_ActivateCredential.
    pub(crate) fn activate(&self, challenge: &Challenge) -> ChallengeResponse {
        self.recorded.activate(challenge)
    }

    /// A SealedVolume of this machine with one partition `COS_PERSISTENT`; `more` is further YAML of the spec.
    pub(crate) fn volume(&self, name: &str, more: &str) -> String {
        self.volume_of(name, "  - {label: COS_PERSISTENT}\n", more)
    }

    pub(crate) fn volume_of(&self, name: &str, partitions: &str, more: &str) -> String {
        format!(
            "---\napiVersion: keyserver.kairos.io/v1alpha1\nkind: SealedVolume\nmetadata:\n  name: {name}\n  namespace: default\n\
             spec:\n  TPMHash: {}\n  partitions:\n{partitions}{more}",
            self.pubhash
        )
    }
}

pub(crate) fn secret(name: &str, data: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Secret\nmetadata: {{name: {name}, namespace: default}}\ntype: Opaque\nstringData:\n{data}"
    )
}

/// What a machine says about its partition: label, uuid, name.
pub(crate) type Facts<'a> = [&'a str; 3];

pub(crate) const PERSISTENT: Facts<'static> = ["COS_PERSISTENT", "", "sda5"];

/// The server, as a process, on a store of its own.
pub(crate) struct Kms {
    pub(crate) address: SocketAddr,
    child: Child,
    log: Arc<Mutex<Vec<String>>>,
}

/// A store with these files.
pub(crate) fn store(files: &[(&str, &str)]) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    for (name, content) in files {
        std::fs::write(directory.path().join(name), content).unwrap();
    }
    directory
}

fn command(store: &Path, options: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_latchkey-kms"));
    command
        .arg("serve")
        .arg("--store")
        .arg(store)
        .args(options)
        .env_remove("RUST_LOG")
        .stdin(Stdio::null())
        .stderr(Stdio::piped());
    command
}

/// Runs the server where it must not start: exit status and what it said.
pub(crate) fn fails_to_start(store: &Path, options: &[&str]) -> (ExitStatus, String) {
    let output = command(store, options).output().unwrap();
    (output.status, String::from_utf8(output.stderr).unwrap())
}

impl Kms {
    pub(crate) fn start(store: &Path) -> Self {
        Self::start_with(store, &[])
    }

    pub(crate) fn start_with(store: &Path, options: &[&str]) -> Self {
        let mut options = options.to_vec();
        if !options.contains(&"--listen") {
            options.extend(["--listen", "127.0.0.1:0"]);
        }
        // Two machines do here what a thousand do elsewhere.
        if !options.contains(&"--machine-rate") {
            options.extend(["--machine-rate", "0"]);
        }
        let mut child = command(store, &options).spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let log = Arc::new(Mutex::new(Vec::new()));
        let lines = log.clone();
        thread::spawn(move || {
            stderr.lines().map_while(Result::ok).for_each(|line| lines.lock().unwrap().push(line))
        });
        let mut kms = Self { address: ([127, 0, 0, 1], 0).into(), child, log };
        let line = kms.wait_for("listening on ");
        let address = line.split("listening on ").nth(1).unwrap().split(' ').next().unwrap();
        kms.address = address.parse().unwrap();
        kms
    }

    /// Waits for a log line that contains `text`, and gives back the last such line.
    pub(crate) fn wait_for(&self, text: &str) -> String {
        self.wait_for_times(text, 1)
    }

    /// Waits for so many log lines that contain `text`, and gives back the last such line.
    pub(crate) fn wait_for_times(&self, text: &str, times: usize) -> String {
        let end = Instant::now() + PATIENCE;
        loop {
            let mut found: Vec<String> =
                self.lines().into_iter().filter(|line| line.contains(text)).collect();
            if found.len() >= times {
                return found.pop().unwrap();
            }
            assert!(
                Instant::now() < end,
                "{} of {times} lines with {text:?} in:\n{}",
                found.len(),
                self.lines().join("\n")
            );
            thread::sleep(Duration::from_millis(5));
        }
    }

    pub(crate) fn lines(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }

    /// Forgets the log so far, so that [`Kms::wait_for`] sees only what comes.
    pub(crate) fn forget_log(&self) {
        self.log.lock().unwrap().clear();
    }

    /// Memory of the server that is in RAM, KiB.
    pub(crate) fn resident(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }

    /// The address that a log line gives after `text`.
    pub(crate) fn address_after(&self, text: &str) -> SocketAddr {
        let line = self.wait_for(text);
        let rest = line.split(text).nth(1).unwrap();
        rest.split([' ', '/']).next().unwrap().parse().unwrap()
    }

    pub(crate) fn signal(&self, signal: &str) {
        assert!(
            Command::new("kill")
                .arg(signal)
                .arg(self.child.id().to_string())
                .status()
                .unwrap()
                .success()
        );
    }

    pub(crate) fn wait(&mut self) -> ExitStatus {
        self.child.wait().unwrap()
    }

    pub(crate) fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// Opens a WebSocket with these header values.
    pub(crate) fn open(
        &self,
        path: &str,
        authorization: &str,
        facts: Facts<'_>,
    ) -> WebSocket<TcpStream> {
        upgrade(self.connect(), self.address, path, authorization, facts)
    }

    /// `/tpm-attestation`, opened as Go's client does: without an Authorization header.
    pub(crate) fn open_attestation(&self, [label, uuid, name]: Facts<'_>) -> WebSocket<TcpStream> {
        let request = websocket_request(self.address, "/tpm-attestation")
            .header("label", label)
            .header("uuid", uuid)
            .header("name", name)
            .body(())
            .unwrap();
        tungstenite::client(request, self.connect()).map_err(|error| error.to_string()).unwrap().0
    }

    /// `/tpm-attestation`, to the answer, which may come in the place of the challenge.
    pub(crate) fn attest_with(
        &self,
        facts: Facts<'_>,
        init: &str,
        proof: impl FnOnce(&Challenge) -> String,
    ) -> Option<Answer> {
        let mut socket = self.open_attestation(facts);
        socket.send(Message::text(init.to_owned())).unwrap();
        let challenge = match said(&mut socket)?.into_challenge() {
            Ok(challenge) => challenge,
            Err(refusal) => panic!("{refusal}"),
        };
        socket.send(Message::text(proof(&challenge))).unwrap();
        let answer = said(&mut socket);
        assert!(socket.read().is_err(), "nothing comes after the answer");
        answer
    }

    /// `/tpm-attestation` at a server that may be gone at any moment: the passphrase, if it came.
    pub(crate) fn try_attest(&self, machine: &SoftIdentity, facts: Facts<'_>) -> Option<String> {
        let stream = TcpStream::connect(self.address).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).ok()?;
        let request =
            websocket_request(self.address, "/tpm-attestation").header("label", facts[0]).body(());
        let (mut socket, _) = tungstenite::client(request.unwrap(), stream).ok()?;
        socket.send(Message::text(machine.init().to_json())).ok()?;
        let challenge = said(&mut socket)?.into_challenge().ok()?;
        socket.send(Message::text(machine.proof(&challenge).to_json().to_string())).ok()?;
        let answer = said(&mut socket)?;
        assert_eq!(answer.error, "");
        String::from_utf8(answer.passphrase.to_vec()).ok()
    }

    /// `/tpm-attestation` of a machine with these wishes.
    pub(crate) fn attest_as(
        &self,
        machine: &SoftIdentity,
        facts: Facts<'_>,
        init: &Init,
    ) -> Option<Answer> {
        let proof = |challenge: &Challenge| Proof::to_json(&machine.proof(challenge)).to_string();
        self.attest_with(facts, &init.to_json(), proof)
    }

    /// `/tpm-attestation` of a machine that wishes nothing.
    pub(crate) fn attest(&self, machine: &SoftIdentity, facts: Facts<'_>) -> Option<Answer> {
        self.attest_as(machine, facts, &machine.init())
    }

    /// `/getPass`, to the answer.
    pub(crate) fn get(&self, machine: &Machine, facts: Facts<'_>) -> Option<Payload> {
        let mut socket = self.open("/getPass", &machine.token.authorization_header(), facts);
        prove(&mut socket, machine);
        answer(&mut socket)
    }

    /// `/postPass` of what a machine sealed; what the server said against it.
    pub(crate) fn post(
        &self,
        machine: &Machine,
        facts: Facts<'_>,
        block: &[u8],
    ) -> Option<Payload> {
        self.post_text(machine, facts, &Payload::sealed(block).to_json())
    }

    /// `/postPass` at a server that may be gone at any moment.
    pub(crate) fn try_post(&self, machine: &Machine, facts: Facts<'_>, block: &[u8]) -> Option<()> {
        let stream = TcpStream::connect(self.address).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).ok()?;
        let header = machine.token.authorization_header();
        let (mut socket, _) =
            tungstenite::client(request(self.address, "/postPass", &header, facts), stream).ok()?;
        let Message::Binary(challenge) = socket.read().ok()? else { return None };
        let response = machine.activate(&Challenge::from_json(&challenge).ok()?);
        socket.send(Message::text(response.to_json().to_string())).ok()?;
        socket.send(Message::text(Payload::sealed(block).to_json().to_string())).ok()?;
        let _ = socket.read(); // until it closes
        Some(())
    }

    pub(crate) fn post_text(
        &self,
        machine: &Machine,
        facts: Facts<'_>,
        payload: &str,
    ) -> Option<Payload> {
        let mut socket = self.open("/postPass", &machine.token.authorization_header(), facts);
        prove(&mut socket, machine);
        // A server that has refused already may have closed; then the answer is what counts.
        let _ = socket.send(Message::text(payload.to_owned()));
        answer(&mut socket)
    }
}

impl Drop for Kms {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            eprintln!("the server's log:\n{}", self.lines().join("\n"));
        }
    }
}

/// The opening handshake of Go's client: no Origin, no subprotocol, no extensions.
pub(crate) fn upgrade<S: Read + Write>(
    stream: S,
    address: SocketAddr,
    path: &str,
    authorization: &str,
    facts: Facts<'_>,
) -> WebSocket<S> {
    let request = request(address, path, authorization, facts);
    tungstenite::client(request, stream).map_err(|error| error.to_string()).unwrap().0
}

fn request(
    address: SocketAddr,
    path: &str,
    authorization: &str,
    [label, uuid, name]: Facts<'_>,
) -> Request<()> {
    websocket_request(address, path)
        .header("Authorization", authorization)
        .header("label", label)
        .header("uuid", uuid)
        .header("name", name)
        .body(())
        .unwrap()
}

pub(crate) fn websocket_request(address: SocketAddr, path: &str) -> http::request::Builder {
    Request::builder()
        .uri(format!("ws://{address}{path}"))
        .header("Host", address.to_string())
        .header("Connection", "Upgrade")
        .header("Upgrade", "websocket")
        .header("Sec-WebSocket-Version", "13")
        .header("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ==")
}

/// Answers the challenge.
pub(crate) fn prove<S: Read + Write>(socket: &mut WebSocket<S>, machine: &Machine) {
    let challenge = challenge(socket);
    let response = machine.activate(&challenge);
    socket.send(Message::binary(response.to_json().as_bytes().to_vec())).unwrap();
}

pub(crate) fn challenge<S: Read + Write>(socket: &mut WebSocket<S>) -> Challenge {
    let Message::Binary(challenge) = socket.read().unwrap() else {
        panic!("the challenge must be a binary frame")
    };
    Challenge::from_json(&challenge).unwrap()
}

/// The last message of the server, if there is one, and that it then closes as Go's server does.
pub(crate) fn answer<S: Read + Write>(socket: &mut WebSocket<S>) -> Option<Payload> {
    let payload = match socket.read() {
        Ok(Message::Binary(payload)) => Payload::from_json(&payload).unwrap(),
        Ok(other) => panic!("not a binary frame: {other:?}"),
        Err(_) => return None,
    };
    assert!(socket.read().is_err(), "nothing comes after the answer");
    Some(payload)
}

/// A certificate for `localhost` and its key, as files, and what trusts it.
pub(crate) fn certificate(directory: &Path) -> (String, String, rustls::RootCertStore) {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let (cert, key) = (directory.join("cert.pem"), directory.join("key.pem"));
    std::fs::write(&cert, made.cert.pem()).unwrap();
    std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(made.cert.der().clone()).unwrap();
    (cert.display().to_string(), key.display().to_string(), roots)
}

/// Whatever is answered to these bytes, until the connection closes.
pub(crate) fn talk(address: SocketAddr, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(bytes).unwrap();
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer); // a reset is an end, too
    String::from_utf8_lossy(&answer).into_owned()
}

/// A page that is read with GET: its status line and text.
pub(crate) fn page(address: SocketAddr, path: &str) -> (String, String) {
    let answer = talk(address, format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes());
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.lines().next().unwrap().to_owned(), body.to_owned())
}

/// The next message of a server of generation 2: one text frame, with a newline at its end.
pub(crate) fn said<S: Read + Write>(socket: &mut WebSocket<S>) -> Option<Answer> {
    match socket.read() {
        Ok(Message::Text(text)) => {
            assert!(text.ends_with("}\n"), "{text}");
            Some(Answer::from_json(text.as_bytes()).unwrap())
        }
        Ok(other) => panic!("not a text frame: {other:?}"),
        Err(_) => None,
    }
}

/// A WebSocket without its opening handshake, to send what a library would not.
pub(crate) fn raw_socket(stream: TcpStream) -> WebSocket<TcpStream> {
    WebSocket::from_raw_socket(stream, Role::Client, None)
}

/// The manifests in a store, by file name.
pub(crate) fn files(store: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(store)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Replaces a file as a careful editor does.
pub(crate) fn replace(path: PathBuf, content: &str) {
    let temporary = path.with_extension("tmp");
    std::fs::write(&temporary, content).unwrap();
    std::fs::rename(temporary, path).unwrap();
}
