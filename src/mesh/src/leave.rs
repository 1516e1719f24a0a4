//! `latchkey leave`: takes this node's record out of the registry. Nobody else's is ever touched.

use std::fmt;
use std::time::Duration;

use latchkey_wire::member::{Cidr, cidr_of};
use tokio::time::{Instant, timeout_at};

use crate::agent;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::handover::{HandOver, State};
use crate::key::{PrivateKey, PublicKey};
use crate::members::{Members, Rules};
use crate::registry::nats::Nats;
use crate::registry::{Event, Registry, RegistryError, Watch as _};
use crate::settings::{KeyFrom, Settings};

/// For all of it.
const DEADLINE: Duration = Duration::from_secs(20);

/// What [`run`] has done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Left {
    /// The records for these ranges were there, and are no more.
    Deleted(Vec<Cidr>),
    /// There was none with this node's key.
    NotThere,
}

/// Deletes the records with this node's public key, each only as it was read.
///
/// # Errors
/// [`Error::AgentRunning`] if there is an agent, which would write them again; [`Error::NoRegistry`]; or why the registry
/// cannot be read or written.
pub fn run(settings: &Settings, hand_over: &HandOver) -> Result<Left> {
    let registry = settings.registry.as_ref().ok_or(Error::NoRegistry)?;
    let _alone = agent::alone(settings, hand_over)?;
    let rules = Rules {
        bucket: registry.bucket.clone(),
        mesh: settings.mesh,
        own: public_key(settings, hand_over)?,
        signatures: settings.signatures,
        strict: settings.strict_records,
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime
        .map_err(|source| Error::Kernel { action: "start the event loop".into(), source })?;
    let left = runtime.block_on(async {
        let registry = Nats::connect(registry.clone())?;
        leave(&registry, rules, Instant::now() + DEADLINE).await
    });
    runtime.shutdown_background();
    left
}

/// Of the key nothing but its public half is needed, which is there also when the device is gone.
fn public_key(settings: &Settings, hand_over: &HandOver) -> Result<PublicKey> {
    match &settings.key {
        KeyFrom::File(path) => Ok(PrivateKey::read(path)?.public()),
        KeyFrom::HandOver { network } => {
            if let State::Taken(record) = hand_over.state()?
                && record.network == *network
            {
                return record.public_key.parse();
            }
            let device = Device::open(&settings.interface)?.read()?;
            let on_device = device.and_then(|snapshot| snapshot.into_private_key());
            let identity = hand_over.identity(None)?;
            match (identity.filter(|identity| identity.network == *network), on_device) {
                (Some(identity), _) => Ok(PrivateKey::new(&identity.private_key).public()),
                (None, on_device) => {
                    hand_over.private_key(network, None, on_device).map(|key| key.public())
                }
            }
        }
    }
}

async fn leave<R: Registry>(registry: &R, rules: Rules, until: Instant) -> Result<Left> {
    let mut watch = registry.watch();
    let mut members = Members::new(rules);
    let mut is_read = false;
    let mut away = "no answer".to_owned();
    let mut deleted = Vec::new();
    loop {
        // Each round begins with news: a record that was changed just now comes again.
        match timeout_at(until, watch.next()).await {
            Err(_) => {
                let action = format!("leave {}", registry.describe());
                let reason = format!("{away} (tried for {} s)", DEADLINE.as_secs());
                return Err(RegistryError::Away { action, reason }.into());
            }
            Ok(Event::Snapshot { entries, .. }) => {
                members.replace(entries);
                is_read = true;
            }
            Ok(Event::Put(entry)) => drop(members.put(entry)),
            Ok(Event::Deleted { key, revision }) => drop(members.delete(&key, revision)),
            Ok(Event::Away { reason }) => {
                away = reason;
                is_read = false;
            }
        }
        if !is_read {
            continue;
        }
        let own: Vec<(String, u64)> =
            members.own().iter().map(|entry| (entry.key.clone(), entry.revision)).collect();
        let mut lost_race = false;
        for (key, revision) in own {
            let deletion = timeout_at(until, registry.delete(&key, revision)).await;
            match deletion.unwrap_or_else(|_| {
                let action = format!("delete {key}");
                Err(RegistryError::Away { action, reason: "no answer".into() })
            }) {
                Ok(()) => {
                    members.delete(&key, revision);
                    deleted.extend(cidr_of(&key));
                }
                Err(RegistryError::LostRace { .. }) => lost_race = true,
                Err(error) => return Err(error.into()),
            }
        }
        if !lost_race {
            break;
        }
    }
    Ok(if deleted.is_empty() { Left::NotThere } else { Left::Deleted(deleted) })
}

impl fmt::Display for Left {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Deleted(ranges) => {
                let ranges: Vec<_> = ranges.iter().map(ToString::to_string).collect();
                write!(f, "left: the record for {} is deleted", ranges.join(" and "))
            }
            Self::NotThere => f.write_str("the registry has no record of this node: nothing to do"),
        }
    }
}

#[cfg(test)]
mod tests {
    use latchkey_wire::member::{Extension, Member, SignaturePolicy, key_of};

    use super::*;
    use crate::claim::memory::Memory;

    fn rules(n: u8) -> Rules {
        Rules {
            bucket: "b".into(),
            mesh: "fd10::/16".parse().unwrap(),
            own: PrivateKey::new(&[n; 32]).public(),
            signatures: SignaturePolicy::Prefer,
            strict: true,
        }
    }

    fn write(registry: &Memory, n: u8, range: &str) -> String {
        let key = PrivateKey::new(&[n; 32]);
        let member = Member {
            name: String::new(),
            public_key: *key.public().as_bytes(),
            advertise_address: "192.0.2.1".into(),
            allowed_ip: range.parse().unwrap(),
            wg_port: 51820,
            extension: Some(Extension::default()),
        };
        let name = key_of(&member.allowed_ip);
        registry.write(&name, member.to_signed_json("b", key.as_bytes()));
        name
    }

    fn leave_as(n: u8, registry: &Memory) -> Result<Left> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async { leave(registry, rules(n), Instant::now() + DEADLINE).await })
    }

    #[test]
    fn all_own_records_are_deleted_and_nobody_elses() {
        let registry = Memory::default();
        write(&registry, 1, "fd10:1::/48");
        write(&registry, 1, "fd10:2::/48");
        let other = write(&registry, 2, "fd10:3::/48");
        registry.write("peers.garbage", "{");
        let Left::Deleted(ranges) = leave_as(1, &registry).unwrap() else { panic!() };
        assert_eq!(ranges.len(), 2);
        assert_eq!(registry.keys(), [other, "peers.garbage".into()]);
        assert_eq!(leave_as(1, &registry).unwrap(), Left::NotThere);
    }

    #[test]
    fn what_is_not_permitted_is_said() {
        let registry = Memory::default();
        let own = write(&registry, 1, "fd10:1::/48");
        registry.forbid(&own);
        let error = leave_as(1, &registry).unwrap_err();
        assert!(error.to_string().contains("does not permit"), "{error}");
        assert_eq!(registry.keys(), [own]);
    }
}
