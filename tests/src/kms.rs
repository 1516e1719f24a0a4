//! The key server under test, on the host's loopback or in a [`Lan`], with a store of YAML manifests.

use std::{
    fs::File,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Instant,
};

use crate::{
    child::Running,
    error::{Doing, Error, Result, create_dir, run, write},
    lan::{self, Lan},
    place::{self, Work},
    transcript::{Line, Transcript},
    vm::PATIENCE,
};

/// In a LAN every address is free.
const LAN_PORT: u16 = 8082;

/// A key server's folder and port; the server itself runs between [`Kms::start`] and [`Kms::stop`].
#[derive(Debug)]
pub struct Kms {
    name: String,
    work: Work,
    listen: SocketAddr,
    /// The host in the URL under which a machine under test reaches it.
    host: String,
    /// Certificate and private key, PEM.
    tls: Option<(PathBuf, PathBuf)>,
    /// Further arguments of `latchkey-kms serve`.
    arguments: Vec<String>,
    server: Option<(Running, Transcript)>,
    starts: u32,
}

impl Kms {
    /// An empty store, and a port of the loopback that nobody listens on yet. For a machine the loopback is 10.0.2.2.
    pub fn new(name: &str) -> Result<Self> {
        let address = free_port(Ipv4Addr::LOCALHOST.into()).doing(|| "find a free port".into())?;
        Self::on(name, address, "10.0.2.2")
    }

    /// The same on the loopback's IPv6 address, which is `fec0::2` for a machine.
    pub fn on_ipv6(name: &str) -> Result<Self> {
        let address = free_port(Ipv6Addr::LOCALHOST.into()).doing(|| "find a free port".into())?;
        Self::on(name, address, "[fec0::2]")
    }

    /// The same on the address of servers in a LAN, where it is to be started with [`Kms::start_in`].
    pub fn on_lan(name: &str) -> Result<Self> {
        let any = IpAddr::from(Ipv6Addr::UNSPECIFIED);
        Self::on(name, SocketAddr::new(any, LAN_PORT), lan::HOST)
    }

    fn on(name: &str, listen: SocketAddr, host: &str) -> Result<Self> {
        let work = Work::new(&format!("{name}-kms"))?;
        create_dir(&work.file("store"))?;
        Ok(Self {
            name: name.to_owned(),
            work,
            listen,
            host: host.to_owned(),
            tls: None,
            arguments: Vec::new(),
            server: None,
            starts: 0,
        })
    }

    /// With TLS, by this certificate and private key.
    #[must_use]
    pub fn tls(mut self, certificate: &Path, key: &Path) -> Self {
        self.tls = Some((certificate.to_owned(), key.to_owned()));
        self
    }

    /// Further arguments of `latchkey-kms serve`.
    #[must_use]
    pub fn arguments(mut self, arguments: &[&str]) -> Self {
        self.arguments.extend(arguments.iter().map(|&a| a.to_owned()));
        self
    }

    /// The URL under which a machine under test reaches it.
    pub fn url(&self) -> String {
        self.url_of(&self.host)
    }

    /// The same, by another name of the host.
    pub fn url_of(&self, host: &str) -> String {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{host}:{}", self.port())
    }

    pub fn port(&self) -> u16 {
        self.listen.port()
    }

    /// The folder with the manifests.
    pub fn store(&self) -> PathBuf {
        self.work.file("store")
    }

    /// Starts the server, again if it was stopped, on the same port and store.
    pub fn start(&mut self) -> Result<()> {
        self.start_as(|program| Ok(Command::new(program)))
    }

    /// As [`Kms::start`], in a LAN.
    pub fn start_in(&mut self, lan: &Lan) -> Result<()> {
        self.start_as(|program| {
            let program = program
                .to_str()
                .ok_or_else(|| Error::Setup(format!("{} is no UTF-8", program.display())))?;
            Ok(lan.command(program))
        })
    }

    fn start_as(&mut self, command: impl FnOnce(&Path) -> Result<Command>) -> Result<()> {
        self.starts += 1;
        let mut command = command(&program()?)?;
        command.arg("serve").arg("--store").arg(self.store());
        command.arg("--listen").arg(self.listen.to_string()).args(&self.arguments);
        if let Some((certificate, key)) = &self.tls {
            command.arg("--tls-cert").arg(certificate).arg("--tls-key").arg(key);
        }
        let log = place::log_file(&format!("{}-kms-{}", self.name, self.starts))?;
        let log = File::create(&log).doing(|| format!("create {}", log.display()))?;
        let (running, pipes) = Running::start(&command, |c| {
            c.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        })?;
        let stderr = pipes
            .stderr
            .ok_or_else(|| Error::Setup("the key server has no standard error".into()))?;
        let said = Transcript::follow("the key server", stderr, log, Instant::now());
        said.wait_for("INFO +listening on .*:[0-9]+ ", PATIENCE)?;
        self.server = Some((running, said));
        Ok(())
    }

    /// Runs `latchkey-kms` with these arguments on the store, as an operator does, to its end: what it printed.
    pub fn administer(&self, arguments: &[&str]) -> Result<String> {
        run(Command::new(program()?).args(arguments).arg("--store").arg(self.store()))
    }

    /// Process id of the running server.
    pub fn process(&self) -> Option<u32> {
        self.server.as_ref().map(|(running, _)| running.id())
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
        self.manifests("Secret")
    }

    /// All SealedVolume manifests now in the store, file name and text.
    pub fn volumes(&self) -> Result<Vec<(String, String)>> {
        self.manifests("SealedVolume")
    }

    fn manifests(&self, kind: &str) -> Result<Vec<(String, String)>> {
        let mut all = Vec::new();
        collect(&self.store(), &mut all)?;
        all.retain(|(_, text)| text.lines().any(|l| l.trim() == format!("kind: {kind}")));
        Ok(all)
    }
}

fn program() -> Result<PathBuf> {
    let program = place::kms_program();
    if program.exists() {
        return Ok(program);
    }
    let path = program.display();
    Err(Error::Setup(format!("no key server at {path}: run image/programs.sh")))
}

fn free_port(address: IpAddr) -> io::Result<SocketAddr> {
    TcpListener::bind((address, 0))?.local_addr()
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
