//! A private authority, and a server's and a client's certificate by it, made by openssl.

use std::{fs, path::PathBuf, process::Command};

use crate::{
    error::{Doing, Result, run, write},
    place::Work,
};

/// Before any build of the programs, as certificates are that a machine meets in the field.
const NOT_BEFORE: &str = "20200101000000Z";
const NOT_AFTER: &str = "20991231235959Z";
/// Before this program was written.
const LONG_AGO: &str = "20210101000000Z";

/// The files of one authority and one server.
#[derive(Debug)]
pub struct Tls {
    work: Work,
}

impl Tls {
    /// A certificate for these names, as openssl writes them: `IP:10.0.2.2`, `DNS:kms.local`.
    pub fn new(name: &str, names: &[&str]) -> Result<Self> {
        Self::until(name, names, NOT_AFTER)
    }

    /// The same, but the server's certificate has expired.
    pub fn expired(name: &str, names: &[&str]) -> Result<Self> {
        Self::until(name, names, LONG_AGO)
    }

    fn until(name: &str, names: &[&str], not_after: &str) -> Result<Self> {
        let tls = Self { work: Work::new(&format!("{name}-tls"))? };
        tls.key("ca.key")?;
        tls.key("server.key")?;
        tls.key("client.key")?;
        write(&tls.work.file("index"), "")?;
        write(
            &tls.work.file("openssl.cnf"),
            format!(
                "[req]\nprompt=no\ndistinguished_name=dn\n[dn]\nCN=Latchkey tests\n[ca]\ndefault_ca=ca_default\n\
                 [ca_default]\ndatabase={0}/index\nnew_certs_dir={0}\nrand_serial=yes\ndefault_md=sha256\n\
                 policy=any\nunique_subject=no\n[any]\ncommonName=supplied\n\
                 [authority]\nbasicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign\n\
                 subjectKeyIdentifier=hash\n[server]\nbasicConstraints=CA:FALSE\nextendedKeyUsage=serverAuth\n\
                 subjectAltName={1}\n[client]\nbasicConstraints=CA:FALSE\nextendedKeyUsage=clientAuth\n",
                tls.work.path().display(),
                names.join(",")
            ),
        )?;
        tls.certificate("ca", "authority", &["-selfsign"], None, NOT_AFTER)?;
        tls.certificate("server", "server", &[], Some("ca.crt"), not_after)?;
        tls.certificate("client", "client", &[], Some("ca.crt"), NOT_AFTER)?;
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

    /// The certificate of a client, PEM.
    pub fn client_certificate_file(&self) -> PathBuf {
        self.work.file("client.crt")
    }

    /// The client's private key, PEM.
    pub fn client_key_file(&self) -> PathBuf {
        self.work.file("client.key")
    }

    /// The authority's certificate, PEM.
    pub fn authority_file(&self) -> PathBuf {
        self.work.file("ca.crt")
    }

    /// Its text: what a machine is told to trust.
    pub fn authority(&self) -> Result<String> {
        let path = self.authority_file();
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
        issuer: Option<&str>,
        not_after: &str,
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
        sign.args(["ca", "-batch", "-notext", "-startdate", NOT_BEFORE, "-enddate", not_after]);
        sign.arg("-config").arg(&configuration).args(["-extensions", extensions]);
        sign.args(signing).arg("-keyfile").arg(self.work.file("ca.key"));
        if let Some(issuer) = issuer {
            sign.arg("-cert").arg(self.work.file(issuer));
        }
        sign.arg("-in").arg(&request).arg("-out").arg(self.work.file(&format!("{name}.crt")));
        run(&mut sign).map(drop)
    }
}
