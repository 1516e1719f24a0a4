//! `info`: the TPM as kcrypt sees it (`protocols/kcrypt.md` §1). It changes nothing, and a part that cannot be read does not
//! hide the others.

use std::collections::BTreeMap;
use std::fmt::Write;

use latchkey_tpm::{
    Endorsement, Held, Hierarchy, KCRYPT_HANDLES, NvIndex, Properties, Tpm, TpmError, handle,
};
use serde_json::{Value, json};

/// The version of the JSON form. Fields may be added; what is there keeps its meaning.
const VERSION: u32 = 1;
/// What Kairos' servers go by.
pub const DEFAULT_PCRS: [u8; 3] = latchkey_config::DEFAULT_PCRS;

/// What was found.
#[derive(Debug)]
pub struct Info {
    device: String,
    properties: Result<Properties, TpmError>,
    endorsement: Result<Endorsement, TpmError>,
    handles: Vec<Handle>,
    /// Persistent handles that kcrypt does not use.
    others: Result<Vec<u32>, TpmError>,
    nv_index: u32,
    nv: Result<Option<NvIndex>, TpmError>,
    pcrs: Result<BTreeMap<u8, [u8; 32]>, TpmError>,
}

#[derive(Debug)]
struct Handle {
    handle: u32,
    purpose: &'static str,
    held: Result<Option<Held>, TpmError>,
}

impl Info {
    /// Asks the TPM.
    #[must_use]
    pub fn read(tpm: &mut Tpm, nv_index: u32, c_index: u32, pcrs: &[u8]) -> Self {
        let used = kcrypt_handles(c_index);
        let known = |handle: &u32| used.iter().any(|(used, _)| used == handle);
        Self {
            device: tpm.address().to_string(),
            properties: tpm.properties(),
            endorsement: tpm.endorsement(),
            others: tpm
                .persistent_handles()
                .map(|all| all.into_iter().filter(|handle| !known(handle)).collect()),
            handles: used
                .iter()
                .map(|(handle, purpose)| Handle {
                    handle: *handle,
                    purpose,
                    held: tpm.held(*handle),
                })
                .collect(),
            nv_index,
            nv: tpm.nv_index(nv_index),
            pcrs: tpm.pcr_values(pcrs),
        }
    }

    /// The first thing that could not be read.
    ///
    /// # Errors
    /// It.
    pub fn complete(self) -> Result<(), TpmError> {
        self.properties?;
        self.endorsement?;
        for handle in self.handles {
            handle.held?;
        }
        self.others?;
        self.nv?;
        self.pcrs?;
        Ok(())
    }

    /// For a person.
    #[must_use]
    pub fn to_text(&self) -> String {
        let mut text = String::new();
        // Writing to a String cannot fail.
        let _ = self.write_text(&mut text);
        text
    }

    fn write_text(&self, out: &mut String) -> std::fmt::Result {
        writeln!(out, "TPM: {}", self.device)?;
        match &self.properties {
            Err(error) => writeln!(out, "  {error}")?,
            Ok(properties) => {
                let Properties { manufacturer, vendor, .. } = properties;
                writeln!(
                    out,
                    "  maker: {manufacturer} {vendor}, firmware {}",
                    firmware(properties)
                )?;
                writeln!(out, "  lockout: {}", lockout(properties))?;
                let set = passwords(properties);
                let set = if set.is_empty() { "none".to_owned() } else { set.join(", ") };
                writeln!(out, "  passwords set: {set}")?;
            }
        }
        match &self.endorsement {
            Err(error) => writeln!(out, "pubhash: {error}")?,
            Ok(endorsement) => write_endorsement(out, endorsement)?,
        }
        writeln!(out, "handles:")?;
        for Handle { handle, purpose, held } in &self.handles {
            let found = match held {
                Ok(held) => describe(*held).to_owned(),
                Err(error) => error.to_string(),
            };
            writeln!(out, "  0x{handle:08x} ({purpose}): {found}")?;
        }
        let nv = match &self.nv {
            Ok(nv) => describe_nv(*nv),
            Err(error) => error.to_string(),
        };
        writeln!(out, "  0x{:08x} (sealed passphrase, NV): {nv}", self.nv_index)?;
        if let Ok(others) = &self.others
            && !others.is_empty()
        {
            let others: Vec<_> = others.iter().map(|handle| format!("0x{handle:08x}")).collect();
            writeln!(out, "  of other programs: {}", others.join(", "))?;
        }
        match &self.pcrs {
            Err(error) => writeln!(out, "PCRs: {error}"),
            Ok(pcrs) => {
                writeln!(out, "PCRs (SHA-256):")?;
                pcrs.iter().try_for_each(|(pcr, value)| writeln!(out, "  {pcr:2}: {}", hex(value)))
            }
        }
    }

    /// For a program.
    #[must_use]
    pub fn to_json(&self) -> String {
        let properties = part(&self.properties, |found| {
            json!({
                "manufacturer": found.manufacturer,
                "vendor": found.vendor,
                "firmware": firmware(found),
                "lockout": {
                    "active": found.in_lockout,
                    "failures": found.failures,
                    "max_failures": found.max_failures,
                    "forgets_after_s": found.forgets_after,
                },
                "auth_set": {
                    "owner": found.owner_auth_set,
                    "endorsement": found.endorsement_auth_set,
                    "lockout": found.lockout_auth_set,
                },
            })
        });
        let endorsement = part(&self.endorsement, |found| {
            json!({
                "pubhash": found.used.to_string(),
                "by_template": found.by_template.to_string(),
                "by_certificate": found.by_certificate.as_ref().ok().map(ToString::to_string),
                "differs": found.differs(),
                "certificate": {
                    "rsa_bytes": found.certificate_size,
                    "error": found.by_certificate.as_ref().err(),
                    "ecc": found.has_ecc_certificate,
                },
            })
        });
        let handles = self.handles.iter().map(|Handle { handle, purpose, held }| {
            let found = part(held, |held| {
                json!({"present": held.is_some(), "kcrypt": held.is_some_and(Held::is_kcrypts), "is": describe(*held)})
            });
            merged(json!({"handle": format!("0x{handle:08x}"), "purpose": purpose}), found)
        });
        let nv = part(&self.nv, |found| {
            json!({
                "present": found.is_some(),
                "written": found.is_some_and(|nv| nv.is_written()),
                "kcrypt": found.is_some_and(|nv| nv.is_kcrypts()),
                "bytes": found.map(|nv| nv.size),
                "attributes": found.map(|nv| format!("0x{:08x}", nv.attributes)),
            })
        });
        let pcrs = part(&self.pcrs, |found| {
            found.iter().map(|(pcr, value)| (pcr.to_string(), json!(hex(value)))).collect()
        });
        let others = part(&self.others, |found| {
            found.iter().map(|handle| json!(format!("0x{handle:08x}"))).collect()
        });
        let all = json!({
            "version": VERSION,
            "device": self.device,
            "tpm": properties,
            "endorsement": endorsement,
            "handles": handles.collect::<Vec<_>>(),
            "other_handles": others,
            "nv": merged(json!({"index": format!("0x{:08x}", self.nv_index)}), nv),
            "pcrs": pcrs,
        });
        format!("{all:#}\n")
    }
}

fn part<T>(read: &Result<T, TpmError>, show: impl FnOnce(&T) -> Value) -> Value {
    match read {
        Ok(found) => show(found),
        Err(error) => json!({"error": error.to_string()}),
    }
}

fn merged(mut first: Value, second: Value) -> Value {
    if let (Some(first), Value::Object(second)) = (first.as_object_mut(), second) {
        first.extend(second);
    }
    first
}

/// The persistent handles that kcrypt uses on this machine.
#[must_use]
pub fn kcrypt_handles(c_index: u32) -> [(u32, &'static str); 3] {
    KCRYPT_HANDLES
        .map(|(known, purpose)| (if known == handle::BLOB_KEY { c_index } else { known }, purpose))
}

/// What is at a handle, in a few words.
#[must_use]
pub fn describe(held: Option<Held>) -> &'static str {
    match held {
        None => "nothing; made when it is needed",
        Some(Held::EndorsementKey) => "the endorsement key",
        Some(Held::StorageRoot(Hierarchy::Owner)) => "kcrypt's storage root key",
        Some(Held::StorageRoot(Hierarchy::Endorsement)) => {
            "kcrypt's storage root key, in the endorsement hierarchy"
        }
        Some(Held::OtherParent) => "a storage root key of another program",
        Some(Held::BlobKey) => "kcrypt's RSA-OAEP key",
        Some(Held::OtherDecrypter) => "another RSA key that can decrypt",
        Some(Held::Foreign) => "something that kcrypt does not make",
    }
}

fn describe_nv(nv: Option<NvIndex>) -> String {
    match nv {
        None => "nothing".into(),
        Some(nv) if !nv.is_kcrypts() => {
            format!("{} bytes, attributes 0x{:08x}: not as kcrypt makes it", nv.size, nv.attributes)
        }
        Some(nv) if nv.is_written() => format!("{} bytes", nv.size),
        Some(nv) => format!("{} bytes, never written", nv.size),
    }
}

fn write_endorsement(out: &mut String, found: &Endorsement) -> std::fmt::Result {
    writeln!(out, "pubhash: {}", found.used)?;
    match &found.by_certificate {
        Ok(certified) if found.differs() => {
            writeln!(out, "  by the EK certificate: {certified}")?;
            writeln!(out, "  by the default template: {}", found.by_template)?;
            writeln!(
                out,
                "  WARNING: they differ. Kairos' own programs go by the certificate whenever they can read it; enter the pubhash above, and that of the certificate as a second SealedVolume if they are to be used as well"
            )?;
        }
        Ok(_) => writeln!(out, "  the EK certificate and the default template agree")?,
        Err(why) => writeln!(out, "  by the default template; EK certificate: {why}")?,
    }
    let size = found.certificate_size.map_or("none".into(), |size| format!("{size} bytes"));
    let ecc = if found.has_ecc_certificate { "present, not used by kcrypt" } else { "none" };
    writeln!(out, "  EK certificates: RSA-2048 {size}; ECC P-256 {ecc}")
}

/// Four numbers with points between, as makers write it.
#[must_use]
pub fn firmware(properties: &Properties) -> String {
    properties.firmware.map(|number| number.to_string()).join(".")
}

/// Lockout and what leads to it.
#[must_use]
pub fn lockout(properties: &Properties) -> String {
    let Properties { in_lockout, failures, max_failures, forgets_after, .. } = properties;
    let state = if *in_lockout { "ACTIVE" } else { "no" };
    format!("{state}, {failures} of {max_failures} failures, one forgotten every {forgets_after} s")
}

/// The hierarchies that have a password.
#[must_use]
pub fn passwords(properties: &Properties) -> Vec<&'static str> {
    [
        (properties.owner_auth_set, "owner"),
        (properties.endorsement_auth_set, "endorsement"),
        (properties.lockout_auth_set, "lockout"),
    ]
    .into_iter()
    .filter_map(|(set, name)| set.then_some(name))
    .collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
