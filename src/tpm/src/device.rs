//! Where the TPM is: a device node, a unix socket, or a TCTI string as tpm2-tools take it.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::TpmError;

/// The device nodes tried when nothing is configured: the kernel's resource manager first, because
/// without it every transient object and session of an earlier program is still in the way.
pub const DEFAULT_DEVICES: [&str; 2] = ["/dev/tpmrm0", "/dev/tpm0"];

/// How the TPM is reached. All three carry plain TPM 2.0 commands and responses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A character device of the kernel (`/dev/tpmrm0`, `/dev/tpm0`).
    Device(PathBuf),
    /// A unix stream socket, as `swtpm socket --server type=unixio,path=…` serves it.
    Unix(PathBuf),
    /// A TCP socket, as `swtpm socket --server type=tcp,port=…` serves it.
    Tcp(String, u16),
}

impl Address {
    /// Reads a `tpm_device` setting.
    ///
    /// Accepted: a path (a socket or a device node, told apart by what is there), `device:PATH`,
    /// `swtpm:path=PATH`, `swtpm:host=HOST,port=PORT` (host `localhost`, port 2321 when left out).
    ///
    /// # Errors
    /// [`TpmError::Address`] when it is none of these.
    pub fn parse(text: &str) -> Result<Self, TpmError> {
        let bad = |why| TpmError::Address { text: text.to_owned(), why };
        if text.starts_with('/') {
            return Ok(Self::of_path(Path::new(text)));
        }
        match text.split_once(':') {
            Some(("device", path)) if path.starts_with('/') => Ok(Self::Device(path.into())),
            Some(("swtpm" | "mssim", conf)) => Self::of_socket(conf).map_err(bad),
            None if text == "swtpm" => Self::of_socket("").map_err(bad),
            _ => Err(bad("give a path, device:PATH, swtpm:path=PATH or swtpm:host=HOST,port=PORT")),
        }
    }

    fn of_path(path: &Path) -> Self {
        use std::os::unix::fs::FileTypeExt;
        match path.metadata() {
            Ok(meta) if meta.file_type().is_socket() => Self::Unix(path.to_owned()),
            _ => Self::Device(path.to_owned()),
        }
    }

    fn of_socket(conf: &str) -> Result<Self, &'static str> {
        let (mut host, mut port) = ("localhost".to_owned(), 2321);
        for pair in conf.split(',').filter(|pair| !pair.is_empty()) {
            match pair.split_once('=') {
                Some(("path", path)) => return Ok(Self::Unix(path.into())),
                Some(("host", name)) => name.clone_into(&mut host),
                Some(("port", number)) => {
                    port = number.parse().map_err(|_| "the port is not a number below 65536")?;
                }
                _ => return Err("a socket takes path=, host= and port="),
            }
        }
        Ok(Self::Tcp(host, port))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Device(path) | Self::Unix(path) => path.display().fmt(f),
            Self::Tcp(host, port) => write!(f, "{host}:{port}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_setting_is_a_path_or_a_tcti_string() {
        for (text, expected) in [
            ("/dev/tpmrm0", Address::Device("/dev/tpmrm0".into())),
            ("device:/dev/tpm1", Address::Device("/dev/tpm1".into())),
            ("swtpm:path=/run/s", Address::Unix("/run/s".into())),
            ("swtpm:host=127.0.0.1,port=99", Address::Tcp("127.0.0.1".into(), 99)),
            ("swtpm", Address::Tcp("localhost".into(), 2321)),
        ] {
            assert_eq!(Address::parse(text).unwrap(), expected, "{text}");
        }
    }

    #[test]
    fn anything_else_is_refused() {
        for text in
            ["", "tpmrm0", "device:tpm0", "tabrmd:bus_name=x", "swtpm:port=70000", "swtpm:x=1"]
        {
            assert!(matches!(Address::parse(text), Err(TpmError::Address { .. })), "{text}");
        }
    }
}
