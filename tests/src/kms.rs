//! The key server under test, on the host's loopback, with a store of YAML manifests.

use std::{
    fs::File,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use crate::{
    child::Running,
    error::{Doing, Error, Result, create_dir, run, write},
    place::{self, Work},
    transcript::{Line, Transcript},
    vm::PATIENCE,
};

/// A key server's folder and port; the server itself runs between [`Kms::start`] and [`Kms::stop`].
#[derive(Debug)]
pub struct Kms {
    name: String,
    work: Work,
    port: u16,
    server: Option<(Running, Transcript)>,
    starts: u32,
}

impl Kms {
    /// An empty store, and a port that nobody listens on yet.
    pub fn new(name: &str) -> Result<Self> {
        let work = Work::new(&format!("{name}-kms"))?;
        create_dir(&work.file("store"))?;
        let port = TcpListener::bind("127.0.0.1:0")
            .and_then(|l| l.local_addr())
            .doing(|| "find a free port".into())?
            .port();
        Ok(Self { name: name.to_owned(), work, port, server: None, starts: 0 })
    }

    /// The URL under which a machine under test reaches it: the host's loopback is 10.0.2.2 there.
    pub fn url(&self) -> String {
        format!("http://10.0.2.2:{}", self.port)
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// The folder with the manifests.
    pub fn store(&self) -> PathBuf {
        self.work.file("store")
    }

    /// Starts the server, again if it was stopped, on the same port and store.
    pub fn start(&mut self) -> Result<()> {
        self.start_with(&[])
    }

    /// As [`Kms::start`], with TLS.
    pub fn start_tls(&mut self, certificate: &Path, key: &Path) -> Result<()> {
        self.start_with(&["--tls-cert".as_ref(), certificate, "--tls-key".as_ref(), key])
    }

    fn start_with(&mut self, arguments: &[&Path]) -> Result<()> {
        self.starts += 1;
        let program = place::kms_program();
        if !program.exists() {
            return Err(Error::Setup(format!(
                "no key server at {}: run image/programs.sh",
                program.display()
            )));
        }
        let log = place::log_file(&format!("{}-kms-{}", self.name, self.starts))?;
        let log = File::create(&log).doing(|| format!("create {}", log.display()))?;
        let mut command = Command::new(program);
        command
            .arg("serve")
            .arg("--store")
            .arg(self.store())
            .arg("--listen")
            .arg(format!("127.0.0.1:{}", self.port))
            .args(arguments);
        let (running, pipes) = Running::start(&command, |c| {
            c.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        })?;
        let stderr = pipes
            .stderr
            .ok_or_else(|| Error::Setup("the key server has no standard error".into()))?;
        let said = Transcript::follow("the key server", stderr, log, Instant::now());
        let deadline = Instant::now() + Duration::from_secs(30);
        while std::net::TcpStream::connect(("127.0.0.1", self.port)).is_err() {
            if Instant::now() > deadline {
                return Err(Error::Setup(format!(
                    "the key server does not listen; it said:\n{}",
                    said.tail()
                )));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        self.server = Some((running, said));
        Ok(())
    }

    /// Kills the server, as a power cut does.
    pub fn stop(&mut self) {
        self.server = None;
    }

    /// What the running server has logged.
    pub fn log(&self) -> Result<&Transcript> {
        self.server
            .as_ref()
            .map(|(_, said)| said)
            .ok_or_else(|| Error::Setup("the key server is not running".into()))
    }

    /// Waits for a line in the running server's log.
    pub fn wait_for(&self, pattern: &str) -> Result<Line> {
        self.log()?.wait_for(pattern, PATIENCE)
    }

    /// Puts a manifest into the store, whole at once, as the server may read the folder at any moment.
    pub fn put(&self, file: &str, yaml: &str) -> Result<()> {
        let temporary = self.work.file("manifest");
        write(&temporary, yaml)?;
        run(Command::new("mv").arg(&temporary).arg(self.store().join(file))).map(drop)
    }

    /// The volume of a machine: `kairos.io` SealedVolume with one partition, COS_PERSISTENT. Without a secret's name the
    /// server names it after volume and label.
    pub fn put_volume(&self, volume: &Volume<'_>) -> Result<()> {
        self.put(&format!("{}.yaml", volume.name), &volume.yaml())
    }

    /// All Secret manifests now in the store, file name and text.
    pub fn secrets(&self) -> Result<Vec<(String, String)>> {
        let store = self.store();
        let mut all = Vec::new();
        collect(&store, &mut all)?;
        all.retain(|(_, text)| text.lines().any(|l| l.trim() == "kind: Secret"));
        Ok(all)
    }
}

fn collect(folder: &Path, all: &mut Vec<(String, String)>) -> Result<()> {
    for entry in std::fs::read_dir(folder).doing(|| format!("list {}", folder.display()))? {
        let path = entry.doing(|| format!("list {}", folder.display()))?.path();
        if path.is_dir() {
            collect(&path, all)?;
        } else {
            let text =
                std::fs::read_to_string(&path).doing(|| format!("read {}", path.display()))?;
            all.push((path.display().to_string(), text));
        }
    }
    Ok(())
}

/// A SealedVolume as an operator writes it.
#[derive(Debug, Clone, Copy)]
pub struct Volume<'a> {
    pub name: &'a str,
    pub tpm_hash: &'a str,
    /// Name and key of an operator's Secret; without it the machine makes its own passphrase.
    pub secret: Option<(&'a str, &'a str)>,
    pub quarantined: bool,
}

impl Volume<'_> {
    pub fn yaml(&self) -> String {
        let secret = self.secret.map_or_else(String::new, |(name, path)| {
            format!("      secret:\n        name: {name}\n        path: {path}\n")
        });
        format!(
            "apiVersion: keyserver.kairos.io/v1alpha1\nkind: SealedVolume\nmetadata:\n  name: {}\n  namespace: default\n\
             spec:\n  TPMHash: \"{}\"\n  partitions:\n    - label: COS_PERSISTENT\n{secret}  quarantined: {}\n",
            self.name, self.tpm_hash, self.quarantined
        )
    }
}

/// An operator's Secret with a passphrase in clear.
pub fn secret_yaml(name: &str, path: &str, passphrase: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Secret\nmetadata:\n  name: {name}\n  namespace: default\ntype: Opaque\n\
         stringData:\n  {path}: \"{passphrase}\"\n"
    )
}
