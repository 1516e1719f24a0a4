//! Secrets and their names: which one a partition's passphrase is in, and what a new one may be called (§7.2).

use std::collections::BTreeMap;

use latchkey_wire::{
    manifest::{self, DEFAULT_KEY, Metadata, Partition, SealedVolume, Secret},
    pubhash::Pubhash,
    v2::text,
};
use zeroize::Zeroizing;

use super::{Case, No, Passphrase};
use crate::{
    decision::{
        Owner, PARTITION, TPM_HASH, Target, is_for, is_sealed, label_value, owner, usable, value,
    },
    matching::Found,
    store::{ReadSecret, secret_names},
};

/// A Secret that is to be made, but for its passphrase.
#[derive(Debug)]
pub(crate) struct NewSecret {
    metadata: Metadata,
}

impl NewSecret {
    /// As upstream makes it (§7.2), with the whole hash and the partition as annotations too.
    pub(super) fn new(namespace: &str, name: &str, pubhash: &Pubhash, label: &str) -> Self {
        let entries = |entries: &[(&str, &str)]| {
            entries.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
        };
        let metadata = Metadata {
            name: name.to_owned(),
            namespace: namespace.to_owned(),
            labels: entries(&[
                ("app.kubernetes.io/name", "kcrypt-challenger"),
                ("app.kubernetes.io/component", "encryption-secret"),
                (TPM_HASH, &manifest::safe_kube_name(pubhash.as_str())),
                (PARTITION, &label_value(label)),
                ("kcrypt.kairos.io/managed-by", "kcrypt-challenger"),
            ]),
            annotations: entries(&[(TPM_HASH, pubhash.as_str()), (PARTITION, label)]),
        };
        Self { metadata }
    }

    /// The Secret with its passphrase.
    pub(crate) fn with(self, passphrase: &str) -> Secret {
        let value = Zeroizing::new(passphrase.as_bytes().to_vec());
        Secret { metadata: self.metadata, data: BTreeMap::from([(DEFAULT_KEY.to_owned(), value)]) }
    }
}

/// A name for a Secret, seen from one partition of one machine.
pub(super) enum Slot<'a> {
    Free,
    Ours(&'a Secret),
    Taken,
}

impl<'a> Case<'a> {
    /// The Secret of a partition that a volume has. One without a name may be labelled for this machine and partition, or an
    /// operator's or generation 1's, which have no labels, if no other partition comes to that name.
    pub(super) fn stored(&mut self, found: Found<'_>) -> Result<Option<&'a Secret>, No> {
        let Found { volume, partition } = found;
        let (namespace, name, key) = found.secret();
        self.target = Some(Target {
            namespace: namespace.to_owned(),
            volume: volume.metadata.name.clone(),
            label: partition.label.clone(),
            secret: name,
            key,
        });
        let named = !partition.secret.as_ref().is_none_or(|secret| secret.name.is_empty());
        for name in secret_names(volume, partition) {
            let secret = match self.snapshot.secret(namespace, &name) {
                ReadSecret::Absent => continue,
                ReadSecret::Untold(why) => {
                    return Err(No::Failed(format!("Secret {namespace}/{name}: {why}")));
                }
                ReadSecret::Found(secret) => secret,
            };
            if let Some(target) = &mut self.target {
                target.secret.clone_from(&name);
            }
            match owner(secret, self.pubhash) {
                Owner::Another(other) if named => {
                    let why = format!(
                        "Secret {namespace}/{name} is labelled for another machine ({other})"
                    );
                    return Err(No::refused(text::no_secret("it belongs to another machine"), why));
                }
                Owner::Another(_) => {}
                Owner::This if named || is_for(secret, &partition.label) => {
                    return Ok(Some(secret));
                }
                Owner::This => {}
                Owner::Untold if named => return Ok(Some(secret)),
                Owner::Untold => {
                    let (volume, label) = (&volume.metadata.name, &partition.label);
                    if !self.snapshot.has_other_user((namespace, &name), volume, label) {
                        return Ok(Some(secret));
                    }
                    return Err(No::Failed(format!(
                        "two partitions come to the default name {name:?} for their Secret; give one a secret.name"
                    )));
                }
            }
        }
        Ok(None)
    }

    pub(super) fn no_secret(&self, found: Found<'_>) -> No {
        let (namespace, name, _) = found.secret();
        let why = format!(
            "Secret {namespace}/{name} is not there; write it, or take the partition out of its volume to have it enrolled"
        );
        No::refused(text::no_secret(format_args!("secrets {name:?} not found")), why)
    }

    /// A name for the Secret of a partition that is none else's, and the Secret itself if it is there already.
    pub(super) fn free_name(
        &self,
        volume: &SealedVolume,
        label: &str,
    ) -> Result<(String, Option<&'a Secret>), No> {
        let base = format!("{}-{label}", volume.metadata.name);
        let digits = self.pubhash.as_str().get(..16).unwrap_or_default();
        let names = [base.clone(), format!("{base}-{digits}"), format!("{base}-{}", self.pubhash)];
        let mut free = None;
        for name in names.map(|name| lowered(&name)) {
            let place = (volume.metadata.namespace(), name.as_str());
            match self.slot(place, &volume.metadata.name, label)? {
                Slot::Ours(secret) => return Ok((name, Some(secret))),
                Slot::Free => free = free.or(Some(name)),
                Slot::Taken => {}
            }
        }
        free.map(|name| (name, None)).ok_or_else(|| {
            No::Failed(format!(
                "all names for the Secret of {label:?} in {:?} are taken",
                volume.metadata.name
            ))
        })
    }

    /// Whether a name can be used for the Secret of this machine's partition `label` in `volume`.
    pub(super) fn slot(
        &self,
        place: (&str, &str),
        volume: &str,
        label: &str,
    ) -> Result<Slot<'a>, No> {
        let (namespace, name) = place;
        let others = self.snapshot.has_other_user(place, volume, label);
        match self.snapshot.secret(namespace, name) {
            ReadSecret::Untold(why) => Err(No::Failed(format!("Secret {namespace}/{name}: {why}"))),
            ReadSecret::Absent if !others => Ok(Slot::Free),
            ReadSecret::Found(secret)
                if !others
                    && owner(secret, self.pubhash) == Owner::This
                    && is_for(secret, label) =>
            {
                Ok(Slot::Ours(secret))
            }
            ReadSecret::Absent | ReadSecret::Found(_) => Ok(Slot::Taken),
        }
    }

    /// The passphrase for a partition that is being enrolled: of the Secret that is there, or of one that is to be made.
    pub(super) fn passphrase(
        &self,
        namespace: &str,
        name: &str,
        label: &str,
        secret: Option<&Secret>,
        partition: &Partition,
    ) -> Result<Passphrase, No> {
        match secret {
            Some(secret) => self.released(secret, partition),
            None => Ok(Passphrase::New(NewSecret::new(namespace, name, self.pubhash, label))),
        }
    }

    /// The passphrase in a Secret, if this client can use it.
    pub(super) fn released(
        &self,
        secret: &Secret,
        partition: &Partition,
    ) -> Result<Passphrase, No> {
        let Some(value) = value(secret, partition) else {
            let key = partition.secret_key();
            let why = format!(
                "Secret {:?} has no passphrase under the key {key:?}",
                secret.metadata.name
            );
            return Err(No::refused(text::no_passphrase(&key), why));
        };
        let text = usable(value).map_err(|why| No::refused(text::no_secret(why), why))?;
        let sealed = is_sealed(secret);
        if sealed && !self.machine.accepts_sealed {
            return Err(No::refused(
                text::no_secret(SEALED),
                "the machine sealed its passphrase for generation 1, and this client does not open it",
            ));
        }
        Ok(Passphrase::Stored { text, sealed })
    }
}

/// Told to a client that takes what its TPM has sealed for the passphrase itself.
const SEALED: &str = "this machine's TPM has sealed the passphrase for generation 1 (/getPass), which this client cannot open; use Latchkey's, or generation 1's";

/// The names a machine's own volume may have: upstream's, and longer ones for when that is taken.
pub(super) fn volume_names(pubhash: &Pubhash) -> [String; 3] {
    let longer = |digits| format!("tofu-{}", pubhash.as_str().get(..digits).unwrap_or_default());
    [manifest::tofu_volume_name(pubhash), longer(16), longer(32)]
}

pub(super) fn lowered(name: &str) -> String {
    manifest::safe_kube_name(name).to_ascii_lowercase()
}
