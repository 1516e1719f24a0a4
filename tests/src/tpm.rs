//! Software TPMs (swtpm): a state with a private authority's EK certificate, and a process for each boot that uses it.

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use sha2::{Digest, Sha256};

use crate::{
    child::Running,
    error::{Doing, Error, Result, create_dir, run},
    place::{Image, Work},
};

/// The state of a TPM 2.0, as a chip keeps it while the machine is off.
#[derive(Debug)]
pub struct Tpm {
    work: Work,
    pubhash: String,
}

impl Tpm {
    /// A new TPM, with a seed of its own, manufactured: EK certificate in NV, platform hierarchy as firmware finds it.
    pub fn fresh(name: &str) -> Result<Self> {
        let image = Image::get()?;
        let work = Work::new(&format!("{name}-tpm"))?;
        let (state, certificates) = (work.file("state"), work.file("certificates"));
        create_dir(&state)?;
        create_dir(&certificates)?;
        run(Command::new("swtpm_setup")
            .args(["--tpm2", "--create-ek-cert", "--overwrite", "--vmid", name])
            .arg("--tpmstate")
            .arg(&state)
            .arg("--config")
            .arg(&image.tpm_setup)
            .arg("--write-ek-cert-files")
            .arg(&certificates))?;
        let pubhash = pubhash(&certificates.join("ek-rsa2048.crt"))?;
        Ok(Self { work, pubhash })
    }

    /// The TPM hash as a key server knows it, from the EK certificate and not by the code under test.
    pub fn pubhash(&self) -> &str {
        &self.pubhash
    }

    /// Powers the TPM on, for one boot of one machine.
    pub fn power_on(&self) -> Result<PoweredTpm> {
        let socket = self.work.file("control");
        let _ = std::fs::remove_file(&socket);
        let log = self.work.file("swtpm.log");
        let log = File::create(&log).doing(|| format!("create {}", log.display()))?;
        let mut command = Command::new("swtpm");
        command
            .args(["socket", "--tpm2", "--terminate"])
            .arg("--tpmstate")
            .arg(format!("dir={}", self.work.file("state").display()))
            .arg("--ctrl")
            .arg(format!("type=unixio,path={}", socket.display()));
        let (running, _) = Running::start(&command, |c| {
            c.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::from(log));
        })?;
        let deadline = Instant::now() + Duration::from_secs(30);
        while !socket.exists() {
            if Instant::now() > deadline {
                return Err(Error::Setup(format!("swtpm made no socket at {}", socket.display())));
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(PoweredTpm { socket, _running: running })
    }
}

/// SHA-256 over the certificate's SubjectPublicKeyInfo (`protocols/kcrypt.md` §1.1), lower-case hex.
fn pubhash(certificate: &Path) -> Result<String> {
    let pem = run(Command::new("openssl")
        .args(["x509", "-inform", "DER", "-noout", "-pubkey", "-in"])
        .arg(certificate))?;
    let base64: String = pem.lines().filter(|l| !l.starts_with("-----")).collect();
    let der = base64::Engine::decode(&base64::engine::general_purpose::STANDARD, base64)
        .map_err(|e| Error::Setup(format!("openssl printed no PEM: {e}")))?;
    Ok(Sha256::digest(der).iter().map(|b| format!("{b:02x}")).collect())
}

/// A TPM that runs.
#[derive(Debug)]
pub struct PoweredTpm {
    socket: PathBuf,
    _running: Running,
}

impl PoweredTpm {
    /// swtpm's control socket, which QEMU connects to.
    pub fn socket(&self) -> &Path {
        &self.socket
    }
}
