//! A private authority and a key server's certificate by it, made by openssl.

use std::{fs, path::PathBuf, process::Command};

use crate::{
    error::{Doing, Result, run, write},
    place::Work,
};

/// Before any build of the programs, as certificates are that a machine meets in the field.
const NOT_BEFORE: &str = "20200101000000Z";
const NOT_AFTER: &str = "20991231235959Z";

/// The files of one authority and one server.
#[derive(Debug)]
pub struct Tls {
    work: Work,
}

impl Tls {
    /// A certificate for these names, as openssl writes them: `IP:10.0.2.2`, `DNS:kms.local`.
    pub fn new(name: &str, names: &[&str]) -> Result<Self> {
        let tls = Self { work: Work::new(&format!("{name}-tls"))? };
        tls.key("ca.key")?;
        tls.key("server.key")?;
        write(&tls.work.file("index"), "")?;
        write(
            &tls.work.file("openssl.cnf"),
            format!(
                "[req]\nprompt=no\ndistinguished_name=dn\n[dn]\nCN=Latchkey tests\n[ca]\ndefault_ca=ca_default\n\
                 [ca_default]\ndatabase={0}/index\nnew_certs_dir={0}\nrand_serial=yes\ndefault_md=sha256\n\
                 policy=any\nunique_subject=no\n[any]\ncommonName=supplied\n\
                 [authority]\nbasicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign\n\
                 subjectKeyIdentifier=hash\n[server]\nbasicConstraints=CA:FALSE\nextendedKeyUsage=serverAuth\n\
                 subjectAltName={1}\n",
                tls.work.path().display(),
                names.join(",")
            ),
        )?;
        tls.certificate("ca", "authority", &["-selfsign", "-keyfile"], "ca.key", None)?;
        tls.certificate("server", "server", &["-keyfile"], "ca.key", Some("ca.crt"))?;
        Ok(tls)
    }

    /// The server's certificate, PEM.
    pub fn certificate_file(&self) -> PathBuf {
        self.work.file("server.crt")
    }

    /// The server's private key, PEM.
    pub fn key_file(&self) -> PathBuf {
        self.work.file("server.key")
    }

    /// The authority's certificate, PEM: what a machine is told to trust.
    pub fn authority(&self) -> Result<String> {
        let path = self.work.file("ca.crt");
        fs::read_to_string(&path).doing(|| format!("read {}", path.display()))
    }

    fn key(&self, file: &str) -> Result<()> {
        run(Command::new("openssl")
            .args(["genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out"])
            .arg(self.work.file(file)))
        .map(drop)
    }

    fn certificate(
        &self,
        name: &str,
        extensions: &str,
        signing: &[&str],
        key: &str,
        issuer: Option<&str>,
    ) -> Result<()> {
        let request = self.work.file(&format!("{name}.csr"));
        let configuration = self.work.file("openssl.cnf");
        run(Command::new("openssl")
            .args(["req", "-new", "-subj", &format!("/CN=Latchkey tests, {name}"), "-config"])
            .arg(&configuration)
            .arg("-key")
            .arg(self.work.file(&format!("{name}.key")))
            .arg("-out")
            .arg(&request))?;
        let mut sign = Command::new("openssl");
        sign.args(["ca", "-batch", "-notext", "-startdate", NOT_BEFORE, "-enddate", NOT_AFTER]);
        sign.arg("-config").arg(&configuration).args(["-extensions", extensions]);
        sign.args(signing).arg(self.work.file(key));
        if let Some(issuer) = issuer {
            sign.arg("-cert").arg(self.work.file(issuer));
        }
        sign.arg("-in").arg(&request).arg("-out").arg(self.work.file(&format!("{name}.crt")));
        run(&mut sign).map(drop)
    }
}
