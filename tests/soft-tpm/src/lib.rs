//! A software TPM on a unix socket, with a proxy in front that counts commands and makes faults.
//!
//! The proxy speaks what swtpm speaks: one TPM 2.0 command, one response (TPM 2.0 Library Part 1
//! §18: tag u16, size u32, code u32). It can answer in the TPM's place, or cut the line.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// What the proxy does to commands that pass.
#[derive(Debug, Default)]
struct Script {
    counts: BTreeMap<u32, u32>,
    /// Command code → responses to give instead of asking the TPM, in order.
    answers: BTreeMap<u32, VecDeque<u32>>,
    /// Command code → commands to slip in after it, in order: what another program does meanwhile.
    slipped: BTreeMap<u32, VecDeque<Vec<u8>>>,
    /// Commands that still get through before the line is cut for good.
    until_cut: Option<u32>,
}

/// A running swtpm. Its state outlives a [`SoftTpm::restart`]; dropping it ends the process.
#[derive(Debug)]
pub struct SoftTpm {
    dir: PathBuf,
    swtpm: Option<Child>,
    script: Arc<Mutex<Script>>,
}

static NUMBER: AtomicU32 = AtomicU32::new(0);

impl SoftTpm {
    /// A fresh TPM without an EK certificate.
    pub fn fresh() -> Self {
        Self::in_dir(new_dir())
    }

    /// A fresh TPM with an EK certificate in NV, as a manufacturer delivers it.
    pub fn certified() -> Self {
        let dir = new_dir();
        let config = write_ca_config(&dir);
        let made = Command::new("swtpm_setup")
            .args(["--tpm2", "--create-ek-cert", "--overwrite", "--vmid", "latchkey-test"])
            .arg("--tpmstate")
            .arg(dir.join("state"))
            .arg("--config")
            .arg(config)
            .output()
            .expect("swtpm_setup is installed");
        assert!(made.status.success(), "swtpm_setup: {}", String::from_utf8_lossy(&made.stdout));
        Self::in_dir(dir)
    }

    fn in_dir(dir: PathBuf) -> Self {
        let script = Arc::new(Mutex::new(Script::default()));
        let listener = UnixListener::bind(dir.join("tpm")).expect("a socket in a fresh directory");
        // tpm2-tools look for swtpm's control channel beside the socket; it needs no proxy.
        std::os::unix::fs::symlink(dir.join("swtpm.ctrl"), dir.join("tpm.ctrl"))
            .expect("a link in a fresh directory");
        let (upstream, shared) = (dir.join("swtpm"), Arc::clone(&script));
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let _ = relay(client, &upstream, &shared);
            }
        });
        let mut tpm = Self { dir, swtpm: None, script };
        tpm.start();
        tpm
    }

    /// Ends swtpm and starts it again on the same state: a reboot, as the TPM sees it.
    pub fn restart(&mut self) {
        self.stop();
        self.start();
    }

    /// The value for `tpm_device`: a socket path.
    pub fn device(&self) -> String {
        self.dir.join("tpm").display().to_string()
    }

    /// Where swtpm itself listens, past the proxy, for tpm2-tools (`swtpm:path=…`).
    pub fn direct(&self) -> PathBuf {
        self.dir.join("swtpm")
    }

    /// Commands that came through since the last call, by command code.
    pub fn take_counts(&self) -> BTreeMap<u32, u32> {
        std::mem::take(&mut self.script.lock().unwrap().counts)
    }

    /// The next commands with `code` are answered with these response codes and not executed.
    pub fn answer(&self, code: u32, responses: &[u32]) {
        self.script.lock().unwrap().answers.entry(code).or_default().extend(responses);
    }

    /// After the next commands with `code`, PCR `index` of the SHA-256 bank is extended, as another program may do.
    pub fn extend_after(&self, code: u32, index: u8, times: usize) {
        // TPM2_PCR_Extend (0x182) with an empty password: Part 3 §22.2.
        let mut extend = vec![0x80, 0x02, 0, 0, 0, 65, 0, 0, 0x01, 0x82, 0, 0, 0, index];
        extend.extend([0, 0, 0, 9, 0x40, 0, 0, 9, 0, 0, 0, 0, 0]);
        extend.extend([0, 0, 0, 1, 0, 0x0b]);
        extend.extend([0x5a; 32]);
        let mut script = self.script.lock().unwrap();
        script.slipped.entry(code).or_default().extend(vec![extend; times]);
    }

    /// Lets `commands` more through, then drops the line on every further one: a power cut.
    pub fn cut_after(&self, commands: u32) {
        self.script.lock().unwrap().until_cut = Some(commands);
    }

    /// Power is back.
    pub fn mend(&self) {
        self.script.lock().unwrap().until_cut = None;
    }

    fn start(&mut self) {
        let state = self.dir.join("state");
        std::fs::create_dir_all(&state).expect("a directory in a fresh directory");
        let socket = self.dir.join("swtpm");
        let _ = std::fs::remove_file(&socket);
        let child = Command::new("swtpm")
            .args(["socket", "--tpm2", "--flags", "not-need-init,startup-clear"])
            .arg("--tpmstate")
            .arg(format!("dir={}", state.display()))
            .arg("--server")
            .arg(format!("type=unixio,path={}", socket.display()))
            .arg("--ctrl")
            .arg(format!("type=unixio,path={}.ctrl", socket.display()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("swtpm is installed");
        self.swtpm = Some(child);
        let deadline = Instant::now() + Duration::from_secs(20);
        while !socket.exists() {
            assert!(Instant::now() < deadline, "swtpm does not come up");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn stop(&mut self) {
        if let Some(mut child) = self.swtpm.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Drop for SoftTpm {
    fn drop(&mut self) {
        self.stop();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// Names for the command codes that kcrypt's exchanges use.
pub fn command_name(code: u32) -> &'static str {
    match code {
        0x120 => "EvictControl",
        0x12a => "NV_DefineSpace",
        0x131 => "CreatePrimary",
        0x137 => "NV_Write",
        0x147 => "ActivateCredential",
        0x14a => "CertifyCreation",
        0x14e => "NV_Read",
        0x151 => "PolicySecret",
        0x153 => "Create",
        0x155 => "HMAC",
        0x157 => "Load",
        0x158 => "Quote",
        0x159 => "RSA_Decrypt",
        0x165 => "FlushContext",
        0x169 => "NV_ReadPublic",
        0x173 => "ReadPublic",
        0x174 => "RSA_Encrypt",
        0x176 => "StartAuthSession",
        0x17a => "GetCapability",
        0x17e => "PCR_Read",
        0x161 => "ContextLoad",
        0x162 => "ContextSave",
        0x15e => "Unseal",
        0x17f => "PolicyPCR",
        0x17b => "GetRandom",
        _ => "other",
    }
}

fn relay(mut client: UnixStream, upstream: &Path, script: &Mutex<Script>) -> io::Result<()> {
    let mut tpm = connect(upstream)?;
    loop {
        let command = read_message(&mut client)?;
        let code = u32::from_be_bytes(command[6..10].try_into().expect("a header has 10 bytes"));
        let (answer, slipped) = {
            let mut script = script.lock().unwrap();
            match &mut script.until_cut {
                Some(0) => return Ok(()),
                Some(left) => *left -= 1,
                None => {}
            }
            *script.counts.entry(code).or_default() += 1;
            (
                script.answers.get_mut(&code).and_then(VecDeque::pop_front),
                script.slipped.get_mut(&code).and_then(VecDeque::pop_front),
            )
        };
        let response = match answer {
            Some(code) => [&[0x80, 0x01, 0, 0, 0, 10][..], &code.to_be_bytes()].concat(),
            None => {
                tpm.write_all(&command)?;
                read_message(&mut tpm)?
            }
        };
        if let Some(command) = slipped {
            tpm.write_all(&command)?;
            let response = read_message(&mut tpm)?;
            assert_eq!(&response[6..10], [0; 4], "what was slipped in failed");
        }
        client.write_all(&response)?;
    }
}

/// The socket is there a moment before swtpm listens on it.
fn connect(upstream: &Path) -> io::Result<UnixStream> {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        match UnixStream::connect(upstream) {
            Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
            connected => return connected,
        }
    }
}

fn read_message(stream: &mut UnixStream) -> io::Result<Vec<u8>> {
    let mut message = vec![0; 10];
    stream.read_exact(&mut message)?;
    let size =
        u32::from_be_bytes(message[2..6].try_into().expect("a header has 10 bytes")) as usize;
    if !(10..=4096).contains(&size) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    message.resize(size, 0);
    stream.read_exact(&mut message[10..])?;
    Ok(message)
}

fn new_dir() -> PathBuf {
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    // Short: the path of a unix socket has at most 107 bytes.
    let dir = std::env::temp_dir().join(format!("lk-tpm-{}-{number}", std::process::id()));
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(dir.join("state")).expect("the temporary directory is writable");
    dir
}

/// swtpm_setup wants a certificate authority; this one lives and dies with the TPM.
fn write_ca_config(dir: &Path) -> PathBuf {
    let ca = dir.join("ca");
    std::fs::create_dir_all(&ca).expect("a directory in a fresh directory");
    let write = |name: &str, text: String| {
        let path = ca.join(name);
        std::fs::write(&path, text).expect("a file in a fresh directory");
        path.display().to_string()
    };
    let at = ca.display();
    let localca = write(
        "localca.conf",
        format!(
            "statedir = {at}\nsigningkey = {at}/signkey.pem\nissuercert = {at}/issuercert.pem\ncertserial = {at}/certserial\n"
        ),
    );
    let options = write(
        "localca.options",
        "--platform-manufacturer Latchkey\n--platform-version 1.0\n--platform-model Test\n".into(),
    );
    write(
        "setup.conf",
        format!(
            "create_certs_tool = /usr/bin/swtpm_localca\ncreate_certs_tool_config = {localca}\ncreate_certs_tool_options = {options}\nactive_pcr_banks = sha256\n"
        ),
    )
    .into()
}
