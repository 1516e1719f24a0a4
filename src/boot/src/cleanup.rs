//! `cleanup`: takes out of the TPM what kcrypt put there. What is lost by it is lost for good, so it is all listed first, and
//! nothing goes that is not as kcrypt makes it.

use std::io::{BufRead, IsTerminal, Write};

use latchkey_config::Challenger;
use latchkey_tpm::{Held, Tpm};

use crate::disk::{Content, Volume, scan};
use crate::info::{describe, kcrypt_handles};
use crate::passphrase::unseal_offline;
use crate::{BootError, luks};

/// What `cleanup` was told.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Also the keys at persistent handles.
    pub keys: bool,
    /// Also what is not as kcrypt makes it.
    pub force: bool,
    /// Do not ask.
    pub sure: bool,
}

/// One thing that would go.
#[derive(Debug)]
enum Target {
    Nv { index: u32, size: usize, opens: bool },
    Key { handle: u32, purpose: &'static str, held: Held },
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Nv { index, size, opens: true } => {
                write!(f, "NV index 0x{index:08x}: {size} bytes, the passphrase of offline mode")
            }
            Self::Nv { index, size, opens: false } => {
                write!(f, "NV index 0x{index:08x}: {size} bytes that this TPM cannot decrypt")
            }
            Self::Key { handle, purpose, held } => {
                write!(f, "handle 0x{handle:08x} ({purpose}): {}", describe(Some(*held)))
            }
        }
    }
}

/// Lists, asks, removes.
///
/// # Errors
/// [`BootError::NotOurs`] when something is not as kcrypt makes it, [`BootError::Usage`] when nobody said yes, else what the
/// TPM answered.
pub fn run(tpm: &mut Tpm, settings: &Challenger, options: Options) -> Result<(), BootError> {
    let targets = targets(tpm, settings, options)?;
    if targets.is_empty() {
        log::info!("there is nothing to remove from the TPM at {}", tpm.address());
        return Ok(());
    }
    log::warn!("this would be removed from the TPM at {}, for good:", tpm.address());
    for target in &targets {
        log::warn!("  {target}");
    }
    warn_of_volumes(&scan());
    if !options.sure {
        ask()?;
    }
    for target in targets {
        match target {
            Target::Nv { index, .. } => tpm.nv_remove(index)?,
            Target::Key { handle, .. } => tpm.remove_persistent(handle)?,
        }
        log::info!("removed {target}");
    }
    Ok(())
}

fn targets(
    tpm: &mut Tpm,
    settings: &Challenger,
    options: Options,
) -> Result<Vec<Target>, BootError> {
    let mut targets = Vec::new();
    let index = settings.nv_index;
    if let Some(nv) = tpm.nv_index(index)? {
        if !nv.is_kcrypts() && !options.force {
            return Err(BootError::NotOurs {
                what: format!("NV index 0x{index:08x}"),
                why: format!(
                    "it has {} bytes and attributes 0x{:08x}, where kcrypt makes 256 bytes and 0x00070002",
                    nv.size, nv.attributes
                ),
            });
        }
        let opens = unseal_offline(tpm, settings).is_ok();
        targets.push(Target::Nv { index, size: nv.size, opens });
    }
    if !options.keys {
        return Ok(targets);
    }
    for (handle, purpose) in kcrypt_handles(settings.c_index) {
        let Some(held) = tpm.held(handle)? else { continue };
        if options.force || is_only_ours(tpm, handle, held)? {
            targets.push(Target::Key { handle, purpose, held });
        } else {
            log::info!(
                "handle 0x{handle:08x} ({purpose}) is left: other programs use the same key, as systemd-cryptenroll; --force removes it all the same"
            );
        }
    }
    Ok(targets)
}

/// Whether a key is of no use to anybody else. EK and SRK are by the templates of the TCG, for all programs of a machine.
///
/// # Errors
/// [`BootError::NotOurs`] for what kcrypt does not make.
fn is_only_ours(tpm: &mut Tpm, handle: u32, held: Held) -> Result<bool, BootError> {
    let why = match held {
        Held::EndorsementKey | Held::StorageRoot(_) => return Ok(false),
        Held::BlobKey if tpm.blob_key_can_be_remade(handle)? => return Ok(true),
        Held::BlobKey => {
            "neither generation's template makes this key, so nothing could make it again".into()
        }
        _ => format!("it is {}", describe(Some(held))),
    };
    Err(BootError::NotOurs { what: format!("handle 0x{handle:08x}"), why })
}

/// What opens by the passphrase, as far as headers say.
fn warn_of_volumes(volumes: &[Volume]) {
    let luks: Vec<_> = volumes
        .iter()
        .filter_map(|volume| match &volume.content {
            Content::Luks2 { label, .. } => Some((volume, label)),
            _ => None,
        })
        .collect();
    if luks.is_empty() {
        log::warn!("no LUKS2 volume is in this machine now");
    }
    for (volume, label) in luks {
        let device = volume.device.display();
        let header = luks::inspect(volume, label).ok();
        match header.as_ref().and_then(|header| header.unlocked_by.as_deref()) {
            Some("online") => {
                log::warn!(
                    "{device} ({label}) is opened by a key server; it is not affected unless the server holds its passphrase sealed to this TPM"
                );
            }
            Some(_) => log::warn!(
                "{device} ({label}) is opened by this TPM alone: without a recovery key, nobody ever opens it again"
            ),
            None => log::warn!(
                "{device} ({label}) does not say how it is opened: if by this TPM alone, nobody ever opens it again"
            ),
        }
    }
}

fn ask() -> Result<(), BootError> {
    let refused = |why: &str| {
        Err(BootError::Usage(format!(
            "nothing was removed: {why}. --i-know-what-i-am-doing removes without asking"
        )))
    };
    if !std::io::stdin().is_terminal() {
        return refused("there is no terminal to ask at");
    }
    let mut stderr = std::io::stderr().lock();
    let asked = stderr.write_all(b"Type `yes` to remove it: ").and_then(|()| stderr.flush());
    asked.map_err(BootError::io("ask at the terminal"))?;
    let mut answer = String::new();
    let read = std::io::stdin().lock().read_line(&mut answer);
    read.map_err(BootError::io("read the answer"))?;
    if answer.trim() == "yes" { Ok(()) } else { refused("the answer was not `yes`") }
}
