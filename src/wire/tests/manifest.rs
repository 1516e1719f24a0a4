//! Manifests as Kairos documents them, and as operators get them wrong.
#![cfg(feature = "server")]

use latchkey_wire::{
    Error,
    manifest::{self, Metadata, Partition, Secret, SecretRef, kube_name, plain_label},
};

/// The shape of Kairos' documentation, with what an operator's editor adds.
const DOCUMENTED: &str = r#"# our fleet
---
apiVersion: v1
kind: Secret
metadata:
  name: example-host-tpm-secret
  namespace: default
type: Opaque
stringData:
  pass: "awesome-plaintext-passphrase"
---
apiVersion: keyserver.kairos.io/v1alpha1
kind: SealedVolume
metadata:
    name: test2
    namespace: default
spec:
  TPMHash: "7441c78f1976fb23e6a5c68f0be35be8375b135dcb36fb03cecc60f39c7660bd"
  partitions:
    - label: COS_PERSISTENT
      secret:
       name: example-host-tpm-secret
       path: pass
  quarantined: false
---
apiVersion: v1
kind: ConfigMap
metadata: {name: something-else}
data: {number: "5"}
---
"#;

#[test]
fn the_documented_manifests_parse_unchanged() {
    let read = manifest::parse(DOCUMENTED).unwrap();
    assert_eq!(read.warnings, [""; 0]);
    let [volume] = read.volumes.as_slice() else { panic!("{read:?}") };
    let [secret] = read.secrets.as_slice() else { panic!("{read:?}") };
    assert_eq!(volume.metadata.name, "test2");
    assert_eq!(volume.metadata.namespace(), "default");
    assert_eq!(
        volume.pubhash().unwrap().as_str(),
        "7441c78f1976fb23e6a5c68f0be35be8375b135dcb36fb03cecc60f39c7660bd"
    );
    assert!(!volume.spec.quarantined);
    let [partition] = volume.spec.partitions.as_slice() else { panic!("{volume:?}") };
    assert_eq!(partition.label, "COS_PERSISTENT");
    assert_eq!(volume.secret_name(partition), "example-host-tpm-secret");
    assert_eq!(partition.secret_key(), "pass");
    assert_eq!(secret.data["pass"].as_slice(), b"awesome-plaintext-passphrase");
}

#[test]
fn data_is_base64_and_string_data_stands_over_it() {
    let text = "apiVersion: v1\nkind: Secret\nmetadata: {name: s}\ndata:\n  a: YWJj\n  b: |\n    YWJj\n    ZGVm\n  c: YWJj\n  d:\nstringData:\n  c: xyz\n";
    let read = manifest::parse(text).unwrap();
    let data = &read.secrets[0].data;
    for (key, value) in [("a", "abc"), ("b", "abcdef"), ("c", "xyz"), ("d", "")] {
        assert_eq!(data[key].as_slice(), value.as_bytes(), "{key}");
    }
    assert_eq!(read.secrets[0].metadata.namespace(), "default");
}

#[test]
fn what_generation_2_learned_is_kept_and_written_back() {
    let text = r#"apiVersion: keyserver.kairos.io/v1alpha1
kind: SealedVolume
metadata:
  name: tofu-7441c78f
  namespace: kcrypt
  creationTimestamp: "2026-08-21T10:00:00Z"
spec:
  TPMHash: 7441c78f1976fb23e6a5c68f0be35be8375b135dcb36fb03cecc60f39c7660bd
  partitions:
  - deviceName: sda5
    label: COS_PERSISTENT
    secret: {name: tofu-7441c78f-cos-persistent, path: passphrase}
    uuid: 0b0b0b0b-0000-4000-8000-000000000000
  quarantined: true
  attestation:
    ekPublicKey: |
      -----BEGIN PUBLIC KEY-----
      MIIBIjANBgkqhkiG9w0BAQEFAAOCAQ8AMIIBCgKCAQEA0SnzheE3tey0SnziV3OK
      -----END PUBLIC KEY-----
    enrolledAt: 2026-08-21T10:00:00Z
    lastVerifiedAt: "2026-08-22T10:00:00Z"
    pcrValues:
      pcrs:
        "0": 3e287e57770de15677579228044a2abe6ca7c39d61de4b8a47fd6b7209dd0bab
        "7": ""
status: {}
"#;
    let read = manifest::parse(text).unwrap();
    assert_eq!(read.warnings, [""; 0]);
    let volume = &read.volumes[0];
    let attestation = volume.spec.attestation.as_ref().unwrap();
    assert!(attestation.ek_public_key.as_ref().unwrap().ends_with("-----END PUBLIC KEY-----\n"));
    assert_eq!(attestation.enrolled_at.as_deref(), Some("2026-08-21T10:00:00Z"));
    let pcrs = attestation.pcr_values.as_ref().unwrap().pcrs.as_ref().unwrap();
    assert_eq!((pcrs.len(), pcrs["7"].as_str()), (2, ""));
    assert!(volume.spec.quarantined);
    let written = volume.to_yaml().unwrap();
    assert_eq!(&manifest::parse(&written).unwrap().volumes[0], volume, "{written}");
}

#[test]
fn a_secret_survives_being_written() {
    let mut secret =
        Secret::generated_by_tpm("node-a-cos-persistent", "fleet", "passphrase", "AbC-_123");
    assert_eq!(
        secret.to_yaml().as_str(),
        "apiVersion: v1\nkind: Secret\nmetadata:\n  name: \"node-a-cos-persistent\"\n  namespace: \"fleet\"\ntype: Opaque\n\
         stringData:\n  \"generated_by\": \"tpm\"\n  \"passphrase\": \"AbC-_123\"\n"
    );
    for awkward in [
        &b"a\0b"[..],
        b"\xff\xfe",
        b"# no: comment",
        b"yes",
        b"\"<&>\"\\",
        "\u{2028}\u{feff}\u{85}".as_bytes(),
        b" spaces ",
        b"1\n2\r\n\t",
        b"",
    ] {
        secret.data.insert("x".to_owned(), awkward.to_vec().into());
        secret
            .metadata
            .labels
            .insert("kcrypt.kairos.io/partition".to_owned(), "COS_PERSISTENT".to_owned());
        let written = secret.to_yaml();
        assert_eq!(manifest::parse(&written).unwrap().secrets[0], secret, "{}", *written);
    }
}

#[test]
fn names_follow_the_rule_of_generation_1() {
    for (given, name) in [
        ("COS_PERSISTENT", "cos-persistent"),
        ("pass_phrase", "pass-phrase"),
        ("My.Name", "my.name"),
        ("a b", "a b"),
    ] {
        assert_eq!(kube_name(given), name);
    }
    let volume = manifest::SealedVolume {
        metadata: Metadata { name: "Node_1".to_owned(), ..Metadata::default() },
        ..Default::default()
    };
    let partition =
        |label: &str, secret| Partition { label: label.to_owned(), secret, ..Partition::default() };
    let reference =
        |name: &str, path: &str| Some(SecretRef { name: name.to_owned(), path: path.to_owned() });
    for (partition, name, key) in [
        (partition("COS_PERSISTENT", None), "node-1-cos-persistent", "passphrase"),
        (partition("COS_PERSISTENT", reference("", "")), "node-1-cos-persistent", "passphrase"),
        (
            partition("COS_PERSISTENT", reference("", "Pass_Phrase")),
            "node-1-cos-persistent",
            "pass-phrase",
        ),
        (partition("COS_PERSISTENT", reference("My_Secret", "")), "my-secret", "passphrase"),
    ] {
        assert_eq!(
            (volume.secret_name(&partition).as_str(), partition.secret_key().as_str()),
            (name, key)
        );
    }
}

#[test]
fn a_label_and_its_luks_twin_are_one() {
    for (label, plain) in [
        ("COS_PERSISTENT_LUKS", "COS_PERSISTENT"),
        ("COS_PERSISTENT", "COS_PERSISTENT"),
        ("_LUKS", "_LUKS"),
        ("X_LUKS_LUKS", "X_LUKS"),
    ] {
        assert_eq!(plain_label(label), plain);
    }
}

#[test]
fn mistakes_are_told_with_their_line() {
    let volume = |rest: &str| {
        format!(
            "# a comment\n---\napiVersion: keyserver.kairos.io/v1alpha1\nkind: SealedVolume\nmetadata: {{name: a}}\nspec:\n{rest}"
        )
    };
    let secret =
        |rest: &str| format!("apiVersion: v1\nkind: Secret\nmetadata: {{name: a}}\n{rest}");
    for (case, text, line) in [
        ("boolean as text", volume("  TPMHash: aa\n  quarantined: \"true\"\n"), 8),
        ("no boolean", volume("  quarantined: maybe\n"), 7),
        ("number as hash", volume("  TPMHash: 1234\n"), 7),
        ("partition is text", volume("  partitions: COS_PERSISTENT\n"), 7),
        ("label is a list", volume("  partitions:\n  - label: [a]\n"), 8),
        ("device is a number", volume("  partitions:\n  - label: a\n    deviceName: 5\n"), 9),
        ("bad indentation", volume("  partitions:\n  - label: a\n   uuid: b\n"), 9),
        ("same key twice", volume("  quarantined: true\n  quarantined: false\n"), 8),
        (
            "other version",
            "---\napiVersion: keyserver.kairos.io/v1\nkind: SealedVolume\n".to_owned(),
            1,
        ),
        ("no kind", "apiVersion: v1\n---\n".to_owned(), 1),
        ("no name", "apiVersion: v1\nkind: Secret\n".to_owned(), 1),
        (
            "a list of other things",
            "apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: Pod}\n".to_owned(),
            1,
        ),
        (
            "a list with a mistake",
            "apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Secret\n  metadata: {name: a}\n  stringData: {a: [hunter2]}\n".to_owned(),
            7,
        ),
        ("scalar", "hello\n".to_owned(), 1),
        ("not base64", secret("data: {a: '*hunter2*'}\n"), 1),
        ("passphrase is a number", secret("stringData:\n  pass: 20261121\n"), 5),
        ("passphrase is a list", secret("stringData:\n  pass: [hunter2]\n"), 5),
        ("unclosed quote", secret("stringData:\n  pass: \"hunter2\n"), 0),
        ("a tag", secret("stringData:\n  pass: !!binary hunter2\n"), 5),
    ] {
        let error = manifest::parse(&text).expect_err(case);
        let shown = error.to_string();
        assert!(!shown.contains("hunter2") && !shown.contains("20261121"), "{case}: {shown}");
        let Error::Manifest { line: told, .. } = error else { panic!("{case}: {shown}") };
        assert!(line == 0 || told == line, "{case}: {shown}, wanted line {line}");
    }
}

#[test]
fn what_kubernetes_tolerates_is_tolerated_and_what_is_suspicious_is_told() {
    let text = "%YAML 1.2\n---\napiVersion: keyserver.kairos.io/v1alpha1\nkind: SealedVolume\nmetadata: {name: a, uid: x, generation: 5}\nspec:\n  TPMHash: zz\n  quarantine: true\n  partitions:\n  - {label: A, lable: B, secret: null, uuid: null}\n  attestation: null\n...\n";
    let read = manifest::parse(text).unwrap();
    assert_eq!(read.volumes.len(), 1);
    let told = read.warnings.join("\n");
    for expected in ["TPMHash", "spec.quarantine", "spec.partitions[].lable"] {
        assert!(told.contains(expected), "{expected} in {told}");
    }
    assert_eq!(read.warnings.len(), 3, "{told}");
    for empty in ["", "\n# nothing\n", "---\n---\n...\n", "\u{feff}"] {
        assert!(manifest::parse(empty).is_ok_and(|read| read.volumes.is_empty()), "{empty:?}");
    }
}

#[test]
fn a_document_made_to_exhaust_memory_is_refused() {
    let mut bomb = "apiVersion: v1\nkind: Secret\nmetadata: {name: a}\na0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
    for level in 1..12 {
        let previous = format!("*a{}, ", level - 1).repeat(10);
        bomb.push_str(&format!("a{level}: &a{level} [{previous}]\n"));
    }
    assert!(manifest::parse(&bomb).is_err());
    assert!(manifest::parse(&"[".repeat(100_000)).is_err());
    assert!(manifest::parse(&" ".repeat(manifest::MAX_FILE + 1)).is_err());
}

#[test]
fn what_kubectl_prints_is_read() {
    let text = r#"apiVersion: v1
items:
- apiVersion: keyserver.kairos.io/v1alpha1
  kind: SealedVolume
  metadata:
    creationTimestamp: "2026-08-21T10:00:00Z"
    generation: 2
    name: node
    namespace: kcrypt
    uid: 0b0b0b0b-0000-4000-8000-000000000000
  spec:
    TPMHash: 7441c78f1976fb23e6a5c68f0be35be8375b135dcb36fb03cecc60f39c7660bd
    partitions:
    - label: COS_PERSISTENT
- apiVersion: v1
  data:
    passphrase: YWJj
  kind: Secret
  metadata:
    labels:
      kcrypt.kairos.io/partition: COS_PERSISTENT
    name: node-cos-persistent
    namespace: kcrypt
  type: Opaque
kind: List
metadata:
  resourceVersion: ""
"#;
    let read = manifest::parse(text).unwrap();
    let volume = &read.volumes[0];
    assert_eq!(volume.secret_name(&volume.spec.partitions[0]), read.secrets[0].metadata.name);
    assert_eq!(read.secrets[0].data["passphrase"].as_slice(), b"abc");
    assert_eq!(volume.metadata.namespace(), read.secrets[0].metadata.namespace());
}

#[test]
fn generation_2_makes_these_names() {
    let sixty = "a".repeat(70);
    let cut = format!("{}-6bd5e503", "a".repeat(54));
    for (from, to) in [
        ("tofu-7441c78f-COS_PERSISTENT", "tofu-7441c78f-cos-persistent"),
        (
            "7441c78f1976fb23e6a5c68f0be35be8375b135dcb36fb03cecc60f39c7660bd",
            "7441c78f1976fb23e6a5c68f0be35be8375b135dcb36fb03cecc60-e99b68da",
        ),
        ("___", "kube-bda25155"),
        ("my.vol-COS_OEM", "my-vol-cos-oem"),
        (sixty.as_str(), cut.as_str()),
        ("tofu-7441c78f-PERSISTENT", "tofu-7441c78f-PERSISTENT"),
    ] {
        assert_eq!(manifest::safe_kube_name(from), to);
    }
    let pubhash =
        "187c624e06113ed470275dd1ab94f595d41aeae89e8fcf740bb1a3b0b62c691c".parse().unwrap();
    assert_eq!(manifest::tofu_volume_name(&pubhash), "tofu-187c624e");
}

#[test]
fn pcrs_may_be_written_as_kubectl_takes_them() {
    let text = "apiVersion: keyserver.kairos.io/v1alpha1\nkind: SealedVolume\nmetadata: {name: a}\nspec:\n  TPMHash: 7441c78f1976fb23e6a5c68f0be35be8375b135dcb36fb03cecc60f39c7660bd\n  attestation:\n    pcrValues:\n      pcrs: {0: \"00ff\", \"7\": \"\", 11: null, 8: }\n";
    let read = manifest::parse(text).unwrap();
    let attestation = read.volumes[0].spec.attestation.clone().unwrap();
    let pcrs = attestation.pcr_values.unwrap().pcrs.unwrap();
    let shown: Vec<_> =
        pcrs.iter().map(|(index, value)| (index.as_str(), value.as_str())).collect();
    assert_eq!(shown, [("0", "00ff"), ("11", ""), ("7", ""), ("8", "")]);
}
