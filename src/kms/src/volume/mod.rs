//! `latchkey-kms volume`: what operators look at and change in a store (`protocols/kcrypt.md` §7.1), by the same rules as the
//! server: one change at a time, in the operator's own files, durable when it is done.

mod show;

use std::{
    io::{self, BufRead as _, IsTerminal as _, Write as _},
    path::Path,
    time::SystemTime,
};

use latchkey_wire::{
    manifest::{ObjectName, SEALED_VOLUME, SECRET, SealedVolume},
    pubhash::Pubhash,
};

use crate::{
    audit::{self, chain::Chain},
    cli::{AuditFile, Place, Volume, Which},
    error,
    store::{EditError, ReadSecret, Store, secret_names},
};

/// Fewest digits of a TPM hash that are taken for one.
const LEAST_DIGITS: usize = 8;

/// Why nothing was shown or changed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(
        "there is no volume {0:?}: neither a name nor the beginning of a TPM hash fits; `volume list` shows all"
    )]
    NoneSuch(String),
    #[error("{0}")]
    Unclear(String),
    #[error("nothing was removed: {0}")]
    NotConfirmed(&'static str),
    #[error("volume {volume}: {source}")]
    Edit { volume: String, source: EditError },
    #[error("writing the answer failed: {0}")]
    Output(io::Error),
    #[error("the change was made, but the audit log {path} does not have it: {source}")]
    Unaudited { path: String, source: io::Error },
}

/// Namespace and name.
type Name = (String, String);

/// Does one command.
pub(crate) fn run(command: Volume) -> Result<(), error::Error> {
    match command {
        Volume::List { place, json } => {
            let store = open(&place)?;
            let all = store.read(|snapshot| show::all(snapshot, place.namespace.as_deref()));
            print(&if json { show::json(&all) } else { show::table(&all) })?;
        }
        Volume::Show { which, json } => {
            let store = open(&which.place)?;
            let names = find(&store, &which)?;
            let all = store.read(|snapshot| show::some(snapshot, &names));
            print(&if json { show::json(&all) } else { show::details(&all) })?;
        }
        Volume::Quarantine { which, audit } => {
            edit(&which, &audit, "quarantine", |volume| volume.spec.quarantined = true)?;
        }
        Volume::Release { which, audit } => {
            edit(&which, &audit, "release", |volume| volume.spec.quarantined = false)?;
        }
        Volume::ResetPcrs { which, audit, pcr } => {
            edit(&which, &audit, "reset-pcrs", |volume| reset_pcrs(volume, &pcr))?;
        }
        Volume::Forget { which, audit, with_secrets, yes } => {
            forget(&which, &audit, with_secrets, yes)?;
        }
    }
    Ok(())
}

fn open(place: &Place) -> Result<Store, error::Error> {
    Store::open(&place.store)
        .map_err(|source| error::Error::Store { path: place.store.clone(), source })
}

fn print(text: &str) -> Result<(), Error> {
    io::stdout().lock().write_all(text.as_bytes()).map_err(Error::Output)
}

/// The volumes that are meant: one by its name, or all of a machine.
fn find(store: &Store, which: &Which) -> Result<Vec<Name>, Error> {
    let wanted = which.name.as_str();
    let digits = wanted.to_ascii_lowercase();
    let is_hash =
        digits.len() >= LEAST_DIGITS && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    let hash = |volume: &SealedVolume| volume.pubhash().ok().filter(|_| is_hash);
    let (by_name, by_hash) = store.read(|snapshot| {
        let (mut by_name, mut by_hash) = (Vec::new(), Vec::new());
        for (_, volume) in snapshot.all_volumes() {
            let namespace = volume.metadata.namespace();
            if which.place.namespace.as_ref().is_some_and(|only| only != namespace) {
                continue;
            }
            let name = (namespace.to_owned(), volume.metadata.name.clone());
            if volume.metadata.name == wanted && !by_name.contains(&name) {
                by_name.push(name);
            } else if let Some(hash) =
                hash(volume).filter(|hash| hash.as_str().starts_with(&digits))
                && !by_hash.iter().any(|(known, _)| *known == name)
            {
                by_hash.push((name, hash));
            }
        }
        (by_name, by_hash)
    });
    if by_name.len() > 1 {
        return Err(Error::Unclear(format!(
            "there is a volume {wanted:?} in each of {}: choose one with --namespace",
            by_name.iter().map(|(namespace, _)| namespace.as_str()).collect::<Vec<_>>().join(", ")
        )));
    }
    if !by_name.is_empty() {
        return Ok(by_name);
    }
    let machines: std::collections::BTreeSet<&Pubhash> =
        by_hash.iter().map(|(_, hash)| hash).collect();
    match machines.len() {
        0 => Err(Error::NoneSuch(wanted.to_owned())),
        1 => Ok(by_hash.into_iter().map(|(name, _)| name).collect()),
        several => Err(Error::Unclear(format!(
            "{several} machines have a TPM hash that begins with {wanted}"
        ))),
    }
}

/// An empty value is learned at the next boot.
fn reset_pcrs(volume: &mut SealedVolume, only: &[u32]) {
    let values = volume
        .spec
        .attestation
        .as_mut()
        .and_then(|attestation| attestation.pcr_values.as_mut())
        .and_then(|values| values.pcrs.as_mut());
    for (index, value) in values.into_iter().flatten() {
        if only.is_empty() || index.parse().is_ok_and(|index| only.contains(&index)) {
            value.clear();
        }
    }
}

/// Changes each of the volumes that are meant.
fn edit(
    which: &Which,
    audit: &AuditFile,
    action: &'static str,
    change: impl Fn(&mut SealedVolume),
) -> Result<(), error::Error> {
    let store = open(&which.place)?;
    for (namespace, name) in find(&store, which)? {
        let volume = format!("{namespace}/{name}");
        let hash = hash_of(&store, &namespace, &name);
        let changed = store.edit_volume(&namespace, &name, &change);
        let (result, why) = match &changed {
            Ok(true) => ("done", String::new()),
            Ok(false) => ("unchanged", String::new()),
            Err(error) => ("failed", error.to_string()),
        };
        write_down(audit, action, &volume, &hash, (result, why))?;
        match changed.map_err(|source| Error::Edit { volume: volume.clone(), source })? {
            true => print(&format!("{volume}: {action} done\n"))?,
            false => print(&format!("{volume}: {action} has nothing to change\n"))?,
        }
    }
    Ok(())
}

fn hash_of(store: &Store, namespace: &str, name: &str) -> String {
    let hash = store.read(|snapshot| Some(snapshot.volume(namespace, name)?.spec.tpm_hash.clone()));
    hash.unwrap_or_default()
}

fn forget(
    which: &Which,
    audit: &AuditFile,
    with_secrets: bool,
    yes: bool,
) -> Result<(), error::Error> {
    let store = open(&which.place)?;
    let names = find(&store, which)?;
    if !yes {
        confirm(&names, with_secrets)?;
    }
    for (namespace, name) in names {
        let volume = format!("{namespace}/{name}");
        let hash = hash_of(&store, &namespace, &name);
        let secrets = own_secrets(&store, &namespace, &name);
        let removed = remove(&store, &namespace, &name, if with_secrets { &secrets } else { &[] });
        let (result, why) = match &removed {
            Ok(()) if with_secrets => ("done", format!("with secrets {}", secrets.join(", "))),
            Ok(()) => ("done", String::new()),
            Err(error) => ("failed", error.to_string()),
        };
        write_down(audit, "forget", &volume, &hash, (result, why))?;
        removed.map_err(|source| Error::Edit { volume: volume.clone(), source })?;
        print(&format!("{volume}: forgotten\n"))?;
        for secret in secrets {
            let what = if with_secrets { "removed as well" } else { "stays in the store" };
            print(&format!("  Secret {namespace}/{secret} {what}\n"))?;
        }
    }
    Ok(())
}

/// The Secrets that are there and that no other volume comes to.
fn own_secrets(store: &Store, namespace: &str, name: &str) -> Vec<String> {
    store.read(|snapshot| {
        let Some(volume) = snapshot.volume(namespace, name) else { return Vec::new() };
        let mut secrets = Vec::new();
        for partition in &volume.spec.partitions {
            for secret in secret_names(volume, partition) {
                let there = matches!(snapshot.secret(namespace, &secret), ReadSecret::Found(_));
                let label = partition.label.as_str();
                if there
                    && !secrets.contains(&secret)
                    && !snapshot.has_other_user((namespace, &secret), name, label)
                {
                    secrets.push(secret);
                }
            }
        }
        secrets
    })
}

/// The volume goes first: if the rest fails, Secrets are left that nobody comes to, and not a machine without its Secret.
fn remove(store: &Store, namespace: &str, name: &str, secrets: &[String]) -> Result<(), EditError> {
    let mut change = store.change()?;
    change.remove(&ObjectName { kind: SEALED_VOLUME, namespace, name })?;
    for secret in secrets {
        change.remove(&ObjectName { kind: SECRET, namespace, name: secret })?;
    }
    Ok(())
}

fn confirm(names: &[Name], with_secrets: bool) -> Result<(), Error> {
    let input = io::stdin();
    if !input.is_terminal() {
        return Err(Error::NotConfirmed("say --yes, or run this at a terminal"));
    }
    let list: Vec<String> =
        names.iter().map(|(namespace, name)| format!("{namespace}/{name}")).collect();
    let secrets = if with_secrets { " and the passphrases of its disk" } else { "" };
    print(&format!("Forget {}{secrets}? Type yes: ", list.join(" and ")))?;
    io::stdout().flush().map_err(Error::Output)?;
    let mut answer = String::new();
    let read = input.lock().read_line(&mut answer);
    if read.is_ok() && answer.trim() == "yes" {
        Ok(())
    } else {
        Err(Error::NotConfirmed("not confirmed"))
    }
}

/// Adds the change to the audit log, if there is one.
fn write_down(
    audit: &AuditFile,
    action: &'static str,
    volume: &str,
    pubhash: &str,
    (result, why): (&'static str, String),
) -> Result<(), Error> {
    let Some(path) = &audit.audit else { return Ok(()) };
    let (volume, pubhash) = (volume.to_owned(), pubhash.to_owned());
    let admin = audit::Admin { action, user: user(), volume, pubhash, result, why };
    append(path, audit::Event::Admin(Box::new(admin)))
        .map_err(|source| Error::Unaudited { path: path.display().to_string(), source })
}

fn append(path: &Path, event: audit::Event) -> io::Result<()> {
    Chain::new(path.to_owned()).append(&[(SystemTime::now(), event)]).map(drop)
}

/// Who does it: the user of the process, and who became that by sudo.
fn user() -> String {
    let uid = nix::unistd::getuid();
    let name = nix::unistd::User::from_uid(uid).ok().flatten().map(|user| user.name);
    let name = name.unwrap_or_else(|| uid.to_string());
    match std::env::var("SUDO_USER") {
        Ok(before) => format!("{name} (by sudo: {})", before.chars().take(64).collect::<String>()),
        Err(_) => name,
    }
}
