//! Changing one object in an operator's file: what is meant changes, and nothing else.
#![cfg(feature = "server")]
#![allow(clippy::unwrap_used, clippy::indexing_slicing)] // helpers of tests

use std::collections::BTreeMap;

use latchkey_wire::manifest::{
    self, Attestation, ObjectName, Partition, PcrValues, SEALED_VOLUME, SECRET, SealedVolume,
    SecretRef,
};

const HASH: &str = "7441c78f1976fb23e6a5c68f0be35be8375b135dcb36fb03cecc60f39c7660bd";
const PEM: &str =
    "-----BEGIN PUBLIC KEY-----\nMIIBIjANBgkqhkiG9w0BAQEF\n-----END PUBLIC KEY-----\n";

fn volume(text: &str, name: &str) -> SealedVolume {
    let read = manifest::parse(text).unwrap();
    read.volumes.into_iter().find(|volume| volume.metadata.name == name).unwrap()
}

/// What a key server learns: a second partition, EK and PCRs, quarantine.
fn learned(volume: &SealedVolume) -> SealedVolume {
    let mut volume = volume.clone();
    volume.spec.quarantined = !volume.spec.quarantined;
    volume.spec.partitions.push(Partition {
        label: "COS_OEM".to_owned(),
        device_name: "sda2".to_owned(),
        uuid: String::new(),
        secret: Some(SecretRef { name: "node-cos-oem".to_owned(), path: String::new() }),
    });
    let pcrs = BTreeMap::from([("0", "00ff"), ("7", ""), ("11", "0123")])
        .into_iter()
        .map(|(index, value)| (index.to_owned(), value.to_owned()))
        .collect();
    volume.spec.attestation = Some(Attestation {
        ek_public_key: Some(PEM.to_owned()),
        pcr_values: Some(PcrValues { pcrs: Some(pcrs) }),
        enrolled_at: Some("2026-11-21T11:00:00Z".to_owned()),
        last_verified_at: None,
    });
    volume
}

/// Lines of `text` that are not in `other`.
fn lost<'a>(text: &'a str, other: &str) -> Vec<&'a str> {
    text.lines().filter(|line| !other.lines().any(|there| there == *line)).collect()
}

fn commented(volume: &str) -> String {
    format!(
        "# Machines of the attic. Ask before changing.\napiVersion: v1\nkind: ConfigMap # some other thing\nmetadata: {{name: x}}\n\
         ---\n# the first\n{volume}\n# after it\n---\napiVersion: v1\nkind: Secret\nmetadata: {{name: node-cos-persistent}}   # odd   spaces\n\
         stringData: {{passphrase:   'geheim'}}\n---\n# the other machine\napiVersion: keyserver.kairos.io/v1alpha1\nkind: SealedVolume\n\
         metadata: {{name: other}}\nspec: {{TPMHash: {HASH}}}\n"
    )
}

#[test]
fn block_style_keeps_comments_and_unknown_fields_and_flow_style_all_but_comments() {
    let head = "apiVersion: keyserver.kairos.io/v1alpha1\nkind: SealedVolume\n";
    let block = format!(
        "{head}metadata:\n  name: node\n  uid: 0b0b # keep\n  annotations: {{a: \"1\", spec: x}}\nspec:\n  # whose\n  TPMHash: {HASH} # keep\n\n  partitions: # gone with its field\n  - label: COS_PERSISTENT\n    # sda\n    deviceName: sda5\n  location: attic # keep\nstatus: {{}} # keep\n"
    );
    let deep = format!(
        "{head}metadata: {{name: node}}\nspec:\n        TPMHash: {HASH}\n        quarantined: false # keep?\n        partitions:\n            - {{label: COS_PERSISTENT}}\n        attestation:\n            ekPublicKey: |\n                -----BEGIN PUBLIC KEY-----\n\n                old\n            enrolledAt: 2020-01-01T00:00:00Z\n"
    );
    let flow = format!(
        "{head}metadata: {{name: node, uid: \"5\"}}\nspec: {{TPMHash: {HASH}, location: attic, partitions: [{{label: COS_PERSISTENT}}]}}\n"
    );
    let split = format!(
        "{head}spec:\n  TPMHash: {HASH}\n  partitions:\n  - label: A\nmetadata:\n  name: node"
    );
    for (case, text, keeps, gone) in [
        (
            "block",
            &block,
            vec![
                "  uid: 0b0b # keep",
                "  # whose",
                "  location: attic # keep",
                "status: {} # keep",
            ],
            2,
        ),
        ("deep", &deep, vec!["kind: SealedVolume"], 7),
        ("flow", &flow, vec!["  location: attic"], 4),
        ("no newline at the end", &split, vec!["  name: node"], 0),
    ] {
        for (text, around) in [(text.clone(), false), (commented(text), true)] {
            let wanted = learned(&volume(&text, "node"));
            let changed = manifest::replace_volume(&text, &wanted).unwrap();
            assert_eq!(volume(&changed, "node"), wanted, "{case}: {}", *changed);
            for line in &keeps {
                assert!(changed.contains(line), "{case}: {line} in {}", *changed);
            }
            assert!(lost(&text, &changed).len() <= gone, "{case}: {:?}", lost(&text, &changed));
            if around {
                let before = text.find("---\n# the first\n").unwrap();
                let after = text.find("---\napiVersion: v1\nkind: Secret").unwrap();
                assert!(changed.starts_with(&text[..before]), "{case}: {}", *changed);
                assert!(changed.ends_with(&text[after..]), "{case}: {}", *changed);
                assert!(changed.contains("# the first\n"), "{case}: {}", *changed);
            }
            // and back
            let old = volume(&text, "node");
            let back = manifest::replace_volume(&changed, &old).unwrap();
            assert_eq!(volume(&back, "node"), old, "{case}");
            let unchanged = manifest::replace_volume(&text, &old).unwrap();
            assert_eq!(*unchanged, text, "{case}");
        }
    }
}

#[test]
fn line_ends_and_marks_of_windows_stay() {
    let text = format!(
        "\u{feff}apiVersion: keyserver.kairos.io/v1alpha1\r\nkind: SealedVolume\r\nmetadata:\r\n  name: node\r\nspec:\r\n  TPMHash: {HASH} # keep\r\n"
    );
    let wanted = learned(&volume(&text, "node"));
    let changed = manifest::replace_volume(&text, &wanted).unwrap();
    assert!(changed.starts_with(&text), "{}", *changed);
    assert_eq!(changed.matches('\n').count(), changed.matches("\r\n").count());
}

fn list() -> String {
    format!(
        "apiVersion: v1\nitems:\n- apiVersion: keyserver.kairos.io/v1alpha1\n  kind: SealedVolume\n  metadata:\n    name: node\n    namespace: kcrypt\n  spec:\n    TPMHash: {HASH}\n    partitions:\n    - label: COS_PERSISTENT\n  status: {{}}\n\
         - apiVersion: v1\n  data:\n    passphrase: YWJj\n  kind: Secret\n  metadata:\n    name: node-cos-persistent\n    namespace: kcrypt\n  type: Opaque\nkind: List\nmetadata:\n  resourceVersion: \"\"\n"
    )
}

#[test]
fn an_item_of_what_kubectl_prints_is_changed_alone() {
    let text = list();
    let wanted = learned(&volume(&text, "node"));
    let changed = manifest::replace_volume(&text, &wanted).unwrap();
    assert_eq!(volume(&changed, "node"), wanted);
    assert_eq!(lost(&text, &changed), [""; 0], "{}", *changed);
    let secrets = text.find("  status: {}").unwrap();
    assert!(changed.ends_with(&text[secrets..]), "{}", *changed);
}

#[test]
fn an_object_is_cut_out_and_the_rest_stays() {
    let name = |kind, namespace, name| ObjectName { kind, namespace, name };
    let text = commented(&format!(
        "apiVersion: keyserver.kairos.io/v1alpha1\nkind: SealedVolume\nmetadata: {{name: node}}\nspec: {{TPMHash: {HASH}}}\n"
    ));
    let (node, secret, other) = (
        name(SEALED_VOLUME, "default", "node"),
        name(SECRET, "default", "node-cos-persistent"),
        name(SEALED_VOLUME, "default", "other"),
    );
    let without = manifest::remove(&text, &node).unwrap().unwrap();
    let (start, end) = (
        text.find("---\n# the first").unwrap(),
        text.find("---\napiVersion: v1\nkind: Secret").unwrap(),
    );
    assert_eq!(*without, text[..start].to_owned() + &text[end..]);
    let without = manifest::remove(&without, &secret).unwrap().unwrap();
    let without = manifest::remove(&without, &other).unwrap().unwrap();
    assert!(without.contains("ConfigMap"), "an object of the cluster stays: {}", *without);

    let alone = "# mine\napiVersion: v1\nkind: Secret\nmetadata: {name: node-cos-persistent}\n";
    assert!(manifest::remove(alone, &secret).unwrap().is_none());

    let listed = list();
    let left = manifest::remove(&listed, &name(SEALED_VOLUME, "kcrypt", "node")).unwrap().unwrap();
    assert_eq!(manifest::parse(&left).unwrap().secrets.len(), 1);
    let left =
        manifest::remove(&left, &name(SECRET, "kcrypt", "node-cos-persistent")).unwrap().unwrap();
    assert!(manifest::parse(&left).unwrap().secrets.is_empty());
}

#[test]
fn what_cannot_be_changed_safely_is_refused() {
    let node = format!(
        "apiVersion: keyserver.kairos.io/v1alpha1\nkind: SealedVolume\nmetadata: {{name: node}}\nspec: {{TPMHash: {HASH}}}\n"
    );
    let wanted = learned(&volume(&node, "node"));
    let twice = format!("{node}---\n{node}");
    let flow_list = format!(
        "{{apiVersion: v1, kind: List, items: [{{apiVersion: keyserver.kairos.io/v1alpha1, kind: SealedVolume, metadata: {{name: node}}, spec: {{TPMHash: {HASH}}}}}]}}\n"
    );
    for (text, told) in [
        ("# nothing\n", "it is not in the file"),
        (twice.as_str(), "it is in the file twice"),
        (flow_list.as_str(), "change it by hand"),
    ] {
        let error = manifest::replace_volume(text, &wanted).unwrap_err().to_string();
        assert!(error.contains("SealedVolume default/node") && error.contains(told), "{error}");
    }
    let object = ObjectName { kind: SEALED_VOLUME, namespace: "default", name: "node" };
    assert!(manifest::remove(&twice, &object).is_err());
    assert!(manifest::remove(&flow_list, &object).is_err());
    assert!(manifest::remove("apiVersion: v1\nkind: [\n", &object).is_err());
}

/// A volume that has learned already, with comments and fields of another version everywhere: only what changes does.
#[test]
fn as_few_lines_as_possible_are_exchanged() {
    let text = format!(
        "apiVersion: keyserver.kairos.io/v1alpha1\nkind: SealedVolume\nmetadata:\n  name: node\nspec:\n  TPMHash: {HASH}\n  partitions: # two\n  - label: COS_OEM # first\n    secret:\n      name: a # its\n      rotation: 5\n\n  # the second\n  - label: COS_PERSISTENT\n  attestation: # learned\n    ekPublicKey: \"\" # soon\n    policy: strict\n    pcrValues:\n      # firmware\n      pcrs:\n        \"0\": \"\" # later\n        '7': ab # secure boot\n        11: cd\n      bank: sha256\n    lastVerifiedAt: \"2020-01-01T00:00:00Z\"\n  quarantined: false # see ticket 5\nstatus: {{}}\n"
    );
    let volume = volume(&text, "node");
    let change = |change: &dyn Fn(&mut SealedVolume)| {
        let mut wanted = volume.clone();
        change(&mut wanted);
        manifest::replace_volume(&text, &wanted).unwrap()
    };
    let attestation = |change: &dyn Fn(&mut Attestation)| {
        let mut attestation = volume.spec.attestation.clone().unwrap();
        change(&mut attestation);
        Some(attestation)
    };
    let pcr = |index: &str, value: &str| {
        attestation(&|attestation| {
            let pcrs = attestation.pcr_values.as_mut().unwrap().pcrs.as_mut().unwrap();
            pcrs.insert(index.to_owned(), value.to_owned());
        })
    };
    for (changed, gone) in [
        (
            change(&|volume| volume.spec.quarantined = true),
            vec!["  quarantined: false # see ticket 5"],
        ),
        (
            change(&|volume| volume.spec.attestation = pcr("7", "")),
            vec!["        '7': ab # secure boot"],
        ),
        (
            change(&|volume| volume.spec.attestation = pcr("0", "ef")),
            vec!["        \"0\": \"\" # later"],
        ),
        (change(&|volume| volume.spec.attestation = pcr("11", "")), vec!["        11: cd"]),
        (change(&|volume| volume.spec.attestation = pcr("8", "ef")), vec![]),
        (
            change(&|volume| {
                volume.spec.attestation = attestation(&|attestation| {
                    attestation.ek_public_key = Some(PEM.to_owned());
                });
            }),
            vec!["    ekPublicKey: \"\" # soon"],
        ),
        (
            change(&|volume| {
                volume.spec.attestation = attestation(&|attestation| {
                    attestation.last_verified_at = None;
                });
            }),
            vec!["    lastVerifiedAt: \"2020-01-01T00:00:00Z\""],
        ),
        (
            change(&|volume| {
                volume
                    .spec
                    .partitions
                    .push(Partition { label: "DATA".to_owned(), ..Partition::default() });
            }),
            vec![],
        ),
    ] {
        assert_eq!(lost(&text, &changed), gone, "{}", *changed);
    }
    // In flow style the comments go; what is not known here stays.
    let flow = format!(
        "apiVersion: keyserver.kairos.io/v1alpha1\nkind: SealedVolume\nmetadata: {{name: node}}\nspec: {{TPMHash: {HASH}, attestation: {{policy: strict, pcrValues: {{pcrs: {{\"7\": ab}}}}}}}}\n"
    );
    let mut wanted = self::volume(&flow, "node");
    wanted.spec.attestation = pcr("7", "cd");
    let changed = manifest::replace_volume(&flow, &wanted).unwrap();
    assert!(changed.contains("policy: strict"), "{}", *changed);
}
