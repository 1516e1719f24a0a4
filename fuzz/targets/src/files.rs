//! Files and headers on disks: manifests, LUKS2 metadata, what is left in /run/latchkey.

use kcrypt_discovery_challenger::disk::{self, Content};
use kcrypt_discovery_challenger::token;
use latchkey_wire::identity::Identity;
use latchkey_wire::manifest::{self, Manifests, Partition, SealedVolume};
use latchkey_wire::timeline::Timeline;

use crate::tells_nothing;

pub(crate) fn manifest(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(manifests) = manifest::parse(text) else { return };
    // What kubectl has written reads the same after we have.
    let mut written = String::new();
    for volume in &manifests.volumes {
        written += "---\n";
        written += &volume.to_yaml().unwrap();
    }
    for secret in &manifests.secrets {
        written += "---\n";
        written += &secret.to_yaml();
    }
    let Manifests { volumes, secrets, .. } = manifest::parse(&written).unwrap();
    assert_eq!(volumes, manifests.volumes);
    assert_eq!(secrets, manifests.secrets);
    for (at, volume) in manifests.volumes.iter().enumerate() {
        for wanted in [volume.clone(), learned(volume)] {
            // Names that cannot be told apart are an error of the store's, not of the text.
            let Ok(changed) = manifest::replace_volume(text, &wanted) else { continue };
            let again = manifest::parse(&changed).unwrap();
            let mut volumes = manifests.volumes.clone();
            volumes[at] = wanted;
            assert_eq!(again.volumes, volumes);
            assert_eq!(again.secrets, manifests.secrets);
        }
        let (namespace, name) = (volume.metadata.namespace(), volume.metadata.name.as_str());
        let object = manifest::ObjectName { kind: manifest::SEALED_VOLUME, namespace, name };
        if let Ok(left) = manifest::remove(text, &object) {
            let left = manifest::parse(&left.unwrap_or_default()).unwrap();
            assert_eq!(left.volumes.len(), manifests.volumes.len() - 1);
            assert_eq!(left.secrets, manifests.secrets);
        }
    }
}

/// What a key server writes into a volume.
fn learned(volume: &SealedVolume) -> SealedVolume {
    let mut volume = volume.clone();
    volume.spec.quarantined = !volume.spec.quarantined;
    volume.spec.partitions.push(Partition { label: "NEW".to_owned(), ..Partition::default() });
    let attestation = volume.spec.attestation.get_or_insert_default();
    attestation.last_verified_at = Some("2026-11-21T00:00:00Z".to_owned());
    let pcrs = attestation.pcr_values.get_or_insert_default().pcrs.get_or_insert_default();
    pcrs.insert("7".to_owned(), "00ff".to_owned());
    volume
}

/// The first bytes of any device that is plugged in. What is shown of them cannot steer a console.
pub(crate) fn disk(data: &[u8]) {
    // Magic numbers stand far apart: the first byte says before which of them the rest comes.
    const PLACES: [usize; 6] = [0, 512, 1024, 0x8000, 0x1_0000, 54];
    let (which, rest) = data.split_first().unwrap_or((&0, &[]));
    let place = PLACES.get(usize::from(*which)).copied().unwrap_or_default();
    let head = [vec![0; place], rest.to_vec()].concat();
    let labels = match disk::parse_content(&head) {
        Content::Luks2 { label, uuid } => vec![label, uuid],
        Content::Ext { label } | Content::Plain { label, .. } => vec![label],
        Content::Luks1 | Content::Other => vec![],
    };
    for label in labels {
        assert!(label.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' '), "{label:?}");
    }
}

/// The JSON area of a LUKS2 header, which anybody who has had the disk may have written.
pub(crate) fn luks_token(data: &[u8]) {
    let Some(token) = token::in_area(data) else { return };
    assert_eq!(token.get("type").and_then(serde_json::Value::as_str), Some(token::TYPE));
    // What comes after the text is not looked at.
    let longer = [data, b"\0{\"tokens\":{}}"].concat();
    assert_eq!(token::in_area(&longer).as_ref(), Some(&token));
    let slots = token::keyslots(&token);
    assert!(slots.iter().all(|slot| *slot < 32) && slots.len() <= 32, "each is tried: {slots:?}");
    let _ = token::mac(&token);
}

pub(crate) fn identity(data: &[u8]) {
    match Identity::from_json(data) {
        Ok(identity) => {
            let json = identity.to_json().unwrap();
            // Escapes may make it longer than what is read.
            if json.len() <= latchkey_wire::identity::MAX_IDENTITY {
                assert_eq!(Identity::from_json(json.as_bytes()).unwrap(), identity);
            }
        }
        Err(error) => tells_nothing(&error),
    }
}

pub(crate) fn timeline(data: &[u8]) {
    if let Ok(timeline) = Timeline::from_json(data) {
        let json = timeline.to_json().unwrap();
        if json.len() <= latchkey_wire::timeline::MAX_TIMELINE {
            assert_eq!(Timeline::from_json(json.as_bytes()).unwrap(), timeline);
        }
    }
}
