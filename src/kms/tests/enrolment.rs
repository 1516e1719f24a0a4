//! Generation 2 over TCP with the program: each row of the decision table, and what it leaves in the store
//! (`protocols/kcrypt.md` §7).
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)] // helpers of tests

use std::{
    collections::BTreeMap, fs, os::unix::fs::PermissionsExt, path::Path, sync::LazyLock, thread,
};

use latchkey_soft_identity::{Pcrs, SoftIdentity, pcr};
use latchkey_wire::{
    manifest::{self, Attestation, Manifests, Partition, SealedVolume, Secret, safe_kube_name},
    v1::Payload,
    v2::{Answer, Init},
};

mod rig;
use rig::{Facts, Kms, MACHINE, PERSISTENT, STRANGER, replace, secret, store};

const OEM: Facts<'static> = ["COS_OEM", "0b0b-2", "sda2"];

/// The machine after a change of its firmware.
static TAMPERED: LazyLock<SoftIdentity> = LazyLock::new(|| in_state("after an update"));

fn in_state(seven: &str) -> SoftIdentity {
    let mut machine = SoftIdentity::with(MACHINE.soft.keys().clone());
    machine.pcrs.insert(7, pcr(7, seven));
    machine
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// All that is in the store.
fn objects(store: &Path) -> Manifests {
    let mut all = Manifests::default();
    for name in rig::files(store) {
        let read = manifest::parse(&fs::read_to_string(store.join(name)).unwrap()).unwrap();
        all.volumes.extend(read.volumes);
        all.secrets.extend(read.secrets);
    }
    all
}

fn text(answer: &Answer) -> &str {
    std::str::from_utf8(&answer.passphrase).unwrap()
}

fn stored<'a>(objects: &'a Manifests, name: &str) -> &'a Secret {
    objects
        .secrets
        .iter()
        .find(|secret| secret.metadata.name == name)
        .unwrap_or_else(|| panic!("{name} in {objects:?}"))
}

fn pcrs_of(attestation: &Attestation) -> BTreeMap<String, String> {
    attestation.pcr_values.clone().and_then(|values| values.pcrs).unwrap_or_default()
}

fn shown(pcrs: &Pcrs) -> BTreeMap<String, String> {
    pcrs.iter().map(|(index, value)| (index.to_string(), hex(value))).collect()
}

fn empty(pcrs: &Pcrs) -> BTreeMap<String, String> {
    pcrs.keys().map(|index| (index.to_string(), String::new())).collect()
}

#[test]
fn a_machine_nobody_knows_is_enrolled_with_upstreams_objects_and_gets_the_same_again() {
    let directory = store(&[]);
    let kms = Kms::start(directory.path());
    let facts = ["COS_PERSISTENT", "0b0b-5", "sda5"];
    let first = kms.attest(&MACHINE.soft, facts).unwrap();
    assert_eq!((first.error.as_str(), first.sealed, first.passphrase.len()), ("", false, 44));
    let pubhash = MACHINE.pubhash.as_str();
    let volume_name = format!("tofu-{}", &pubhash[..8]);
    let secret_name = format!("{volume_name}-cos-persistent");

    let all = objects(directory.path());
    let [volume] = all.volumes.as_slice() else { panic!("{all:?}") };
    assert_eq!(
        (volume.metadata.name.as_str(), volume.spec.tpm_hash.as_str()),
        (volume_name.as_str(), pubhash)
    );
    assert!(!volume.spec.quarantined);
    let [partition] = volume.spec.partitions.as_slice() else { panic!("{volume:?}") };
    let reference = partition.secret.as_ref().unwrap();
    assert_eq!(
        [
            &partition.label,
            &partition.device_name,
            &partition.uuid,
            &reference.name,
            &reference.path
        ],
        ["COS_PERSISTENT", "sda5", "0b0b-5", &secret_name, "passphrase"]
    );
    let attestation = volume.spec.attestation.as_ref().unwrap();
    assert_eq!(attestation.ek_public_key.as_deref(), Some(MACHINE.soft.ek_pem().as_str()));
    assert_eq!(pcrs_of(attestation), shown(&MACHINE.soft.pcrs));
    assert_eq!(attestation.enrolled_at, attestation.last_verified_at);
    assert_eq!(
        attestation.enrolled_at.as_ref().map(String::len),
        Some("2026-11-21T11:24:00Z".len())
    );

    let secret = stored(&all, &secret_name);
    assert_eq!(secret.data["passphrase"].as_slice(), first.passphrase.as_slice());
    assert_eq!(secret.data.len(), 1, "no generated_by");
    let label = |key: &str| secret.metadata.labels[key].as_str();
    assert_eq!(label("app.kubernetes.io/name"), "kcrypt-challenger");
    assert_eq!(label("app.kubernetes.io/component"), "encryption-secret");
    assert_eq!(label("kcrypt.kairos.io/managed-by"), "kcrypt-challenger");
    assert_eq!(label("kcrypt.kairos.io/partition"), "COS_PERSISTENT");
    assert_eq!(label("kcrypt.kairos.io/tpm-hash"), safe_kube_name(pubhash));
    assert_eq!(secret.metadata.labels.len(), 5);
    assert_eq!(secret.metadata.annotations["kcrypt.kairos.io/tpm-hash"], pubhash);

    let files = rig::files(directory.path());
    assert_eq!(
        files,
        [
            format!("default.{secret_name}.secret.yaml"),
            format!("default.{volume_name}.volume.yaml")
        ]
    );
    for file in &files {
        let mode = fs::metadata(directory.path().join(file)).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o600, "{file}");
    }
    let contents = || {
        files
            .iter()
            .map(|file| fs::read_to_string(directory.path().join(file)).unwrap())
            .collect::<Vec<_>>()
    };
    let before = contents();

    for label in ["COS_PERSISTENT", "COS_PERSISTENT_LUKS"] {
        let again = kms.attest(&MACHINE.soft, [label, "0b0b-5", "nvme0n1p5"]).unwrap();
        assert_eq!(text(&again), text(&first), "{label}");
    }
    drop(kms);
    let kms = Kms::start(directory.path());
    let boot = Init { release_only: true, ..MACHINE.soft.init() };
    assert_eq!(text(&kms.attest_as(&MACHINE.soft, facts, &boot).unwrap()), text(&first));
    assert_eq!(before, contents(), "nothing is written where nothing is learned");
    assert!(!kms.lines().join("\n").contains(text(&first)));
}

/// From the live system to the installed one, and on: §7.4, "life of a normal node".
#[test]
fn a_normal_life() {
    let directory = store(&[]);
    let kms = Kms::start(directory.path());
    let live = in_state("live system");
    let deferring = Init { defer_pcr_enrollment: true, ..live.init() };
    let oem = kms.attest_as(&live, OEM, &deferring).unwrap();
    let persistent = kms.attest_as(&live, PERSISTENT, &deferring).unwrap();
    assert_ne!(text(&oem), text(&persistent));
    let volume = || objects(directory.path()).volumes.remove(0);
    let pcrs = || pcrs_of(&volume().spec.attestation.unwrap());
    assert_eq!(volume().spec.partitions.len(), 2);
    assert_eq!(pcrs(), empty(&live.pcrs));

    // The first boot of the installed system is what is learned; two volumes at once.
    thread::scope(|scope| {
        for (facts, passphrase) in [(OEM, &oem), (PERSISTENT, &persistent)] {
            let kms = &kms;
            scope.spawn(move || {
                assert_eq!(text(&kms.attest(&MACHINE.soft, facts).unwrap()), text(passphrase));
            });
        }
    });
    assert_eq!(pcrs(), shown(&MACHINE.soft.pcrs));

    // Another state is refused, a live system too: it does not get to defer any more.
    for (machine, init) in [(&*TAMPERED, TAMPERED.init()), (&live, deferring.clone())] {
        let refused = kms.attest_as(machine, PERSISTENT, &init).unwrap();
        assert_eq!(
            refused.error,
            "Attestation verification failed: attestation verification failed: PCR verification failed: PCR7 changed - boot state verification failed"
        );
        kms.wait_for(&format!(
            "PCR 7 = {}, the machine has {}",
            hex(&MACHINE.soft.pcrs[&7]),
            hex(&machine.pcrs[&7])
        ));
        kms.forget_log();
    }
    // The operator lets it learn anew.
    let name = volume().metadata.name;
    let path = directory.path().join(format!("default.{name}.volume.yaml"));
    let told = fs::read_to_string(&path).unwrap();
    kms.forget_log();
    replace(path, &told.replace(&hex(&MACHINE.soft.pcrs[&7]), "\"\""));
    kms.wait_for("1 volumes, 2 secrets");
    assert_eq!(text(&kms.attest(&TAMPERED, PERSISTENT).unwrap()), text(&persistent));
    assert_eq!(pcrs(), shown(&TAMPERED.pcrs));
    assert!(!kms.attest(&MACHINE.soft, OEM).unwrap().error.is_empty());
}

/// What a machine must get.
enum Expected {
    Passphrase(&'static str),
    /// One that was not in the store before.
    New,
    Error(&'static str),
    /// Closed without a word.
    Nothing,
}
use Expected::{Error, New, Nothing, Passphrase};

struct Case {
    name: &'static str,
    manifests: String,
    machine: &'static SoftIdentity,
    facts: Facts<'static>,
    init: fn(&mut Init),
    expected: Expected,
    /// What must be true of the store afterwards; `None` if nothing may have been written.
    then: Option<fn(&Manifests)>,
}

fn node(objects: &Manifests) -> &SealedVolume {
    objects.volumes.iter().find(|volume| volume.metadata.name == "node").unwrap()
}

fn learned(objects: &Manifests) -> &Attestation {
    node(objects).spec.attestation.as_ref().unwrap()
}

fn partition<'a>(objects: &'a Manifests, label: &str) -> &'a Partition {
    node(objects).spec.partitions.iter().find(|partition| partition.label == label).unwrap()
}

fn reference(objects: &Manifests, label: &str) -> String {
    partition(objects, label).secret.as_ref().map(|secret| secret.name.clone()).unwrap_or_default()
}

/// The fields of an `attestation`.
fn attestation(ek: &str, pcrs: &str) -> String {
    let ek = ek.replace('\n', "\n      ");
    let ek =
        if ek.is_empty() { String::new() } else { format!("    ekPublicKey: |\n      {ek}\n") };
    format!(
        "  attestation:\n    enrolledAt: \"2026-01-01T00:00:00Z\"\n{ek}    pcrValues: {{pcrs: {pcrs}}}\n"
    )
}

fn labelled(name: &str, pubhash: &str, partition: &str, passphrase: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Secret\nmetadata:\n  name: {name}\n  namespace: default\n  labels:\n    kcrypt.kairos.io/tpm-hash: {}\n    kcrypt.kairos.io/partition: {partition}\ntype: Opaque\nstringData:\n  passphrase: {passphrase}\n",
        safe_kube_name(pubhash)
    )
}

const NO_WISH: fn(&mut Init) = |_| {};
const DEFER: fn(&mut Init) = |init| init.defer_pcr_enrollment = true;
const BOOT: fn(&mut Init) = |init| init.release_only = true;

#[test]
fn each_row_of_the_decision_table() {
    let (soft, pubhash) = (&MACHINE.soft, MACHINE.pubhash.as_str());
    let found = || secret("node-cos-persistent", "  passphrase: found\n");
    let quoted = |pcrs: &Pcrs| format!("{:?}", shown(pcrs));
    let (seven, eleven) = (hex(&soft.pcrs[&7]), hex(&soft.pcrs[&11]));
    let pem = soft.ek_pem();
    let wrapped = pem
        .replace("\nM", "\nM ")
        .replace('\n', "\r\n")
        .replace(' ', "")
        .replace("-----BEGINPUBLICKEY-----", "-----BEGIN PUBLIC KEY-----")
        .replace("-----ENDPUBLICKEY-----", "-----END PUBLIC KEY-----");
    let wrapped = format!("\"{}\"", wrapped.trim_end().replace("\r\n", "\\r\\n"));
    let named = "  - {label: COS_PERSISTENT, secret: {name: mine, path: pass}}\n";
    let mine = || secret("mine", "  pass: found\n");
    let all_hex = quoted(&soft.pcrs);
    let unknown: &'static str = format!("Attestation verification failed: no volume found with data from request and hash: {pubhash}").leak();
    let no_secret: &'static str = format!(
        "Attestation verification failed: No secret found for {pubhash} and COS_PERSISTENT"
    )
    .leak();
    let case = |name, manifests: String, expected, then| Case {
        name,
        manifests,
        machine: soft,
        facts: PERSISTENT,
        init: NO_WISH,
        expected,
        then,
    };
    let cases = vec![
        // a
        Case { init: DEFER, ..case("a, deferred", String::new(), New, Some(|all| {
            let attestation = all.volumes[0].spec.attestation.as_ref().unwrap();
            assert_eq!(pcrs_of(attestation), empty(&MACHINE.soft.pcrs));
            assert_eq!(attestation.ek_public_key.as_deref(), Some(MACHINE.soft.ek_pem().as_str()));
        })) },
        Case { init: BOOT, ..case("a, only released", String::new(), Error(unknown), None) },
        Case { facts: ["unknown", "0b0b-5", "sda5"], ..case("a, no label", String::new(), Error("Attestation verification failed: initial enrollment: creating TOFU secret: the request has no partition label"), None) },
        case("a, its Secret is left of a former life", labelled(&format!("tofu-{}-cos-persistent", &pubhash[..8]), pubhash, "COS_PERSISTENT", "left"), Passphrase("left"), Some(|all| {
            assert_eq!(all.secrets.len(), 1);
            assert_eq!(all.volumes[0].spec.partitions[0].secret.as_ref().unwrap().name, all.secrets[0].metadata.name);
        })),
        Case { init: BOOT, ..case("a, the operator has taken the volume away, and it boots", labelled(&format!("tofu-{}-cos-persistent", &pubhash[..8]), pubhash, "COS_PERSISTENT", "left"), Passphrase("left"), Some(|all| {
            assert_eq!(pcrs_of(all.volumes[0].spec.attestation.as_ref().unwrap()), shown(&MACHINE.soft.pcrs));
        })) },
        case("a, the Secret of that name is not labelled", secret(&format!("tofu-{}-cos-persistent", &pubhash[..8]), "  passphrase: found\n"), New, Some(|all| {
            assert_eq!(all.volumes[0].metadata.name, format!("tofu-{}", &MACHINE.pubhash.as_str()[..16]));
        })),
        case("a, the Secret of that name is another machine's", labelled(&format!("tofu-{}-cos-persistent", &pubhash[..8]), STRANGER.pubhash.as_str(), "COS_PERSISTENT", "found"), New, Some(|all| {
            assert_eq!(all.volumes[0].metadata.name, format!("tofu-{}", &MACHINE.pubhash.as_str()[..16]));
        })),
        case("a, the volume's name is another machine's", STRANGER.volume(&format!("tofu-{}", &pubhash[..8]), ""), New, Some(|all| {
            assert!(all.volumes.iter().any(|volume| volume.metadata.name == format!("tofu-{}", &MACHINE.pubhash.as_str()[..16])));
            assert_eq!(all.volumes.len(), 2);
        })),
        // b
        case("b", MACHINE.volume("node", "  quarantined: true\n") + &found(), Error("Attestation verification failed: TPM is quarantined"), None),
        Case { facts: OEM, ..case("b, another partition", MACHINE.volume("node", "  quarantined: true\n"), Error("Attestation verification failed: TPM is quarantined"), None) },
        // c
        case("c, operator's Secret", MACHINE.volume_of("node", named, "") + &mine(), Passphrase("found"), Some(|all| {
            assert_eq!(pcrs_of(learned(all)), shown(&MACHINE.soft.pcrs));
            assert_eq!(learned(all).ek_public_key.as_deref(), Some(MACHINE.soft.ek_pem().as_str()));
            assert_eq!(learned(all).enrolled_at, learned(all).last_verified_at);
            assert_eq!(all.secrets.len(), 1);
        })),
        case("c, operator's Secret by its default name", MACHINE.volume("node", "") + &found(), Passphrase("found"), Some(|all| {
            assert_eq!(pcrs_of(learned(all)), shown(&MACHINE.soft.pcrs));
        })),
        case("c, without a Secret", MACHINE.volume("node", ""), New, Some(|all| {
            assert_eq!(reference(all, "COS_PERSISTENT"), "node-cos-persistent");
            assert_eq!(pcrs_of(learned(all)), shown(&MACHINE.soft.pcrs));
            assert_eq!(all.secrets.len(), 1);
        })),
        Case { init: DEFER, ..case("c, deferred: a live system is not what is learned", MACHINE.volume("node", ""), New, Some(|all| {
            assert_eq!(pcrs_of(learned(all)), empty(&MACHINE.soft.pcrs));
            assert_eq!(learned(all).ek_public_key.as_deref(), Some(MACHINE.soft.ek_pem().as_str()));
        })) },
        Case { init: BOOT, ..case("c, without a Secret, only released", MACHINE.volume("node", ""), Error(no_secret), None) },
        case("c, the named Secret is not there", MACHINE.volume_of("node", named, ""), Error("Attestation verification failed: retrieving secret: secrets \"mine\" not found"), None),
        case("c, its default name is shared", MACHINE.volume_of("node", "  - {label: a-X}\n", "") + &STRANGER.volume_of("node-a", "  - {label: X}\n", ""), New, Some(|all| {
            assert_eq!(reference(all, "a-X"), format!("node-a-x-{}", &MACHINE.pubhash.as_str()[..16]));
        })).about(["a-X", "", ""]),
        case("c, its default name is shared, and the Secret does not say whose it is", MACHINE.volume_of("node", "  - {label: a-X}\n", "") + &STRANGER.volume_of("node-a", "  - {label: X}\n", "") + &secret("node-a-x", "  passphrase: whose\n"), Nothing, None).about(["a-X", "", ""]),
        // c'
        Case { facts: OEM, ..case("c', another partition", MACHINE.volume("node", "") + &found(), New, Some(|all| {
            assert_eq!(reference(all, "COS_OEM"), "node-cos-oem");
            assert_eq!((partition(all, "COS_OEM").uuid.as_str(), partition(all, "COS_OEM").device_name.as_str()), ("0b0b-2", "sda2"));
            assert!(node(all).spec.attestation.is_none(), "the next request for a known partition learns");
        })) },
        // d
        Case { facts: OEM, ..case("d", MACHINE.volume("node", &attestation(&pem, &all_hex)) + &found(), New, Some(|all| {
            assert_eq!(reference(all, "COS_OEM"), "node-cos-oem");
            assert_eq!(node(all).spec.partitions.len(), 2);
            assert_eq!(pcrs_of(learned(all)), shown(&MACHINE.soft.pcrs));
        })) },
        Case { facts: OEM, ..case("d, empty PCRs are not learned", MACHINE.volume("node", &attestation(&pem, "{\"7\": \"\"}")), New, Some(|all| {
            assert_eq!(pcrs_of(learned(all))["7"], "");
        })) },
        Case { facts: OEM, machine: &TAMPERED, ..case("d, in another state", MACHINE.volume("node", &attestation(&pem, &all_hex)), Error("Attestation verification failed: attestation verification failed: PCR verification failed: PCR7 changed - boot state verification failed"), None) },
        Case { facts: OEM, init: BOOT, ..case("d, only released", MACHINE.volume("node", &attestation(&pem, &all_hex)), Error(unknown), None) },
        Case { facts: ["", "0b0b-9", "sda9"], ..case("d, no label", MACHINE.volume("node", &attestation(&pem, &all_hex)), Error("Attestation verification failed: adding new partition: the request has no partition label"), None) },
        Case { facts: ["a-X", "", ""], ..case("d, the name is another machine's Secret", MACHINE.volume("node", &attestation(&pem, &all_hex)) + &STRANGER.volume_of("node-a", "  - {label: X}\n", "") + &secret("node-a-x", "  passphrase: whose\n"), New, Some(|all| {
            assert_eq!(reference(all, "a-X"), format!("node-a-x-{}", &MACHINE.pubhash.as_str()[..16]));
        })) },
        Case { facts: ["a_b", "", ""], ..case("d, the name is another partition's Secret", MACHINE.volume_of("node", "  - {label: a.b, secret: {name: node-a-b}}\n", &attestation(&pem, &all_hex)) + &labelled("node-a-b", pubhash, "a.b", "found"), New, Some(|all| {
            assert_eq!(reference(all, "a_b"), format!("node-a-b-{}", &MACHINE.pubhash.as_str()[..16]));
        })) },
        Case { facts: ["DATA", "", "sda5"], ..case("d, under a kernel name that was another's", MACHINE.volume_of("node", "  - {label: COS_PERSISTENT, deviceName: sda5}\n", &attestation(&pem, &all_hex)) + &found(), New, Some(|all| {
            assert_eq!(reference(all, "DATA"), "node-data");
        })) },
        Case { facts: OEM, ..case("d, the Secret was made and then the power went", MACHINE.volume("node", &attestation(&pem, &all_hex)) + &labelled("node-cos-oem", pubhash, "COS_OEM", "made"), Passphrase("made"), Some(|all| {
            assert_eq!(reference(all, "COS_OEM"), "node-cos-oem");
        })) },
        Case { facts: OEM, ..case("d, one partition too many", MACHINE.volume_of("node", &(0..64).map(|n| format!("  - {{label: P{n}}}\n")).collect::<String>(), &attestation(&pem, &all_hex)), Error("Attestation verification failed: adding new partition: the machine has 64 partitions already"), None) },
        // e
        case("e, all held", MACHINE.volume("node", &attestation(&pem, &all_hex)) + &found(), Passphrase("found"), None),
        case("e, EK wrapped otherwise, PCRs in capitals", MACHINE.volume("node", &format!("  attestation:\n    ekPublicKey: {wrapped}\n    pcrValues: {{pcrs: {{\"7\": {}}}}}\n", seven.to_uppercase())) + &found(), Passphrase("found"), None),
        case("e, learns 7 only", MACHINE.volume("node", &attestation("", "{\"7\": \"\"}")) + &found(), Passphrase("found"), Some(|all| {
            assert_eq!(pcrs_of(learned(all)), BTreeMap::from([("7".to_owned(), hex(&MACHINE.soft.pcrs[&7]))]));
            assert_eq!(learned(all).ek_public_key.as_deref(), Some(MACHINE.soft.ek_pem().as_str()));
            assert_eq!(learned(all).enrolled_at.as_deref(), Some("2026-01-01T00:00:00Z"));
            assert!(learned(all).last_verified_at.is_some());
        })),
        Case { init: BOOT, ..case("e, learns when it boots", MACHINE.volume("node", &attestation(&pem, "{\"7\": \"\"}")) + &found(), Passphrase("found"), Some(|all| {
            assert_eq!(pcrs_of(learned(all))["7"], hex(&MACHINE.soft.pcrs[&7]));
        })) },
        Case { init: DEFER, ..case("e, deferred: does not learn", MACHINE.volume("node", &attestation(&pem, "{\"7\": \"\"}")) + &found(), Passphrase("found"), None) },
        Case { init: DEFER, machine: &TAMPERED, ..case("e, deferral does not help where a value is held", MACHINE.volume("node", &attestation(&pem, &format!("{{\"0\": \"\", \"7\": \"{seven}\"}}"))) + &found(), Error("Attestation verification failed: attestation verification failed: PCR verification failed: PCR7 changed - boot state verification failed"), None) },
        case("e, `attestation: {}` learns the EK and never a PCR", MACHINE.volume("node", "  attestation: {}\n") + &found(), Passphrase("found"), Some(|all| {
            assert_eq!(learned(all).ek_public_key.as_deref(), Some(MACHINE.soft.ek_pem().as_str()));
            assert!(learned(all).pcr_values.is_none());
        })),
        Case { machine: &TAMPERED, ..case("e, only 11 is held", MACHINE.volume("node", &attestation(&pem, &format!("{{\"11\": \"{eleven}\"}}"))) + &found(), Passphrase("found"), None) },
        case("e, another EK", MACHINE.volume("node", &attestation(&STRANGER.soft.ek_pem(), "{}")) + &found(), Error("Attestation verification failed: attestation verification failed: EK verification failed: EK public key does not match enrolled key - potential TPM impersonation"), None),
        case("e, an EK nobody can read", MACHINE.volume("node", &attestation("hello", "{}")) + &found(), Error("Attestation verification failed: attestation verification failed: EK verification failed: EK public key does not match enrolled key - potential TPM impersonation"), None),
        case("e, a PCR that is not quoted", MACHINE.volume("node", &attestation(&pem, "{\"8\": \"00\"}")) + &found(), Error("Attestation verification failed: attestation verification failed: PCR verification failed: PCR8 mismatch: not provided in current values"), None),
        case("e, a PCR to be learned that is not quoted", MACHINE.volume("node", &attestation(&pem, "{\"8\": \"\"}")) + &found(), Passphrase("found"), None),
        case("e, never makes a Secret", MACHINE.volume("node", &attestation(&pem, &all_hex)), Error("Attestation verification failed: retrieving secret: secrets \"node-cos-persistent\" not found"), None),
        case("e, an empty Secret", MACHINE.volume("node", &attestation(&pem, &all_hex)) + &secret("node-cos-persistent", "  passphrase: \"\"\n"), Error("Attestation verification failed: passphrase not found in secret at key: passphrase"), None),
        case("e, a passphrase with a line break", MACHINE.volume("node", &attestation(&pem, &all_hex)) + &secret("node-cos-persistent", "  passphrase: |\n    found\n"), Error("Attestation verification failed: retrieving secret: its passphrase holds a line break or NUL, at which installers cut it off; write it without"), None),
        case("e, the Secret is labelled for another machine", MACHINE.volume_of("node", named, &attestation(&pem, &all_hex)) + &labelled("mine", STRANGER.pubhash.as_str(), "COS_PERSISTENT", "found"), Error("Attestation verification failed: retrieving secret: it belongs to another machine"), None),
        case("e, names with a dot, as they are written", MACHINE.volume_of("node", "  - {label: COS_PERSISTENT, secret: {name: my.secret, path: pass_phrase}}\n", &attestation(&pem, &all_hex)) + &secret("my.secret", "  pass_phrase: found\n"), Passphrase("found"), None),
        case("e, and as upstream reads them", MACHINE.volume_of("node", "  - {label: COS_PERSISTENT, secret: {name: my.secret, path: pass_phrase}}\n", &attestation(&pem, &all_hex)) + &secret("my-secret", "  pass-phrase: found\n"), Passphrase("found"), None),
        // partitions and their facts
        Case { facts: ["COS_PERSISTENT_LUKS", "", ""], ..case("X_LUKS is X", MACHINE.volume("node", &attestation(&pem, &all_hex)) + &found(), Passphrase("found"), None) },
        Case { facts: ["unknown"; 3], ..case("unknown is no identifier", MACHINE.volume_of("node", "  - {label: unknown, uuid: unknown, deviceName: unknown}\n", &attestation(&pem, &all_hex)), Error("Attestation verification failed: determining enrollment context: the request has neither label nor uuid nor name"), None) },
        Case { facts: ["COS_PERSISTENT", "0b0b-2", ""], ..case("a label and another partition's uuid", MACHINE.volume_of("node", "  - {label: COS_PERSISTENT}\n  - {label: COS_OEM, uuid: 0b0b-2}\n", &attestation(&pem, &all_hex)) + &found(), Error("Attestation verification failed: determining enrollment context: contradiction: label, uuid and name point at different partitions"), None) },
        // several volumes of one machine
        Case { machine: &TAMPERED, ..case("another volume of the machine holds it to its PCRs", MACHINE.volume("node", "") + &found() + &MACHINE.volume_of("second", "  - {label: OTHER}\n", &attestation(&pem, &all_hex)), Error("Attestation verification failed: attestation verification failed: PCR verification failed: PCR7 changed - boot state verification failed"), None) },
        Case { facts: OEM, ..case("a new partition goes to the volume that has learned", MACHINE.volume_of("first", "  - {label: OTHER}\n", "") + &MACHINE.volume("node", &attestation(&pem, &all_hex)), New, Some(|all| {
            assert_eq!(reference(all, "COS_OEM"), "node-cos-oem");
        })) },
        // trouble on our side
        case("a volume twice and differently", MACHINE.volume("node", "") + &MACHINE.volume("node", "  quarantined: true\n"), Nothing, None),
        case("a Secret twice and differently", MACHINE.volume("node", &attestation(&pem, &all_hex)) + &found() + &found().replace("found", "other"), Nothing, None),
        case("two volumes, two Secrets", MACHINE.volume("node", "") + &MACHINE.volume("second", "") + &found(), Nothing, None),
    ];
    for case in cases {
        run(case);
    }
}

impl Case {
    fn about(self, facts: Facts<'static>) -> Self {
        Self { facts, ..self }
    }
}

fn run(case: Case) {
    let directory = store(&[("all.yaml", &case.manifests)]);
    let kms = Kms::start(directory.path());
    let mut init = case.machine.init();
    (case.init)(&mut init);
    let name = case.name;
    let answer = kms.attest_as(case.machine, case.facts, &init);
    match (&case.expected, &answer) {
        (Passphrase(passphrase), Some(answer)) => {
            assert_eq!((text(answer), answer.error.as_str()), (*passphrase, ""), "{name}");
            kms.wait_for("endpoint=tpm-attestation peer=127.0.0.1:");
            kms.wait_for("result=granted");
        }
        (New, Some(answer)) => {
            assert_eq!((answer.passphrase.len(), answer.error.as_str()), (44, ""), "{name}");
            assert!(!case.manifests.contains(text(answer)), "{name}");
        }
        (Error(error), Some(answer)) => {
            assert_eq!((text(answer), answer.error.as_str()), ("", *error), "{name}");
            kms.wait_for("result=refused");
        }
        (Nothing, None) => drop(kms.wait_for("result=failed")),
        (_, answer) => panic!("{name}: {answer:?}\n{}", kms.lines().join("\n")),
    }
    let all = objects(directory.path());
    match case.then {
        Some(then) => then(&all),
        None => {
            assert_eq!(rig::files(directory.path()), ["all.yaml"], "{name}");
            let now = fs::read_to_string(directory.path().join("all.yaml")).unwrap();
            assert_eq!(now, case.manifests, "{name}");
        }
    }
    if let (Passphrase(_) | New, Some(first)) = (&case.expected, &answer) {
        // It lasts: the same machine gets the same at its next boot, whatever was learned.
        let boot = Init { release_only: true, ..case.machine.init() };
        let again = kms.attest_as(case.machine, case.facts, &boot).unwrap();
        assert_eq!((text(&again), again.error.as_str()), (text(first), ""), "{name}, once more");
        let log = kms.lines().join("\n");
        assert!(!log.contains(text(first)) || text(first) == "found", "{name}: {log}");
    }
}

#[test]
fn what_generation_1_sealed_goes_to_those_who_can_open_it() {
    let sealed = Payload::sealed(&[7; 256]).passphrase;
    let manifests = MACHINE.volume("node", "")
        + &secret(
            "node-cos-persistent",
            &format!("  passphrase: {}\n  generated_by: tpm\n", *sealed),
        );
    let directory = store(&[("all.yaml", &manifests)]);
    let kms = Kms::start(directory.path());
    // Go's client: told why, and nothing is learned, so that generation 1 goes on.
    let refused = kms.attest(&MACHINE.soft, PERSISTENT).unwrap();
    assert!(refused.error.starts_with("Attestation verification failed: retrieving secret: this machine's TPM has sealed the passphrase for generation 1 (/getPass)"), "{}", refused.error);
    assert_eq!(fs::read_to_string(directory.path().join("all.yaml")).unwrap(), manifests);
    assert_eq!(kms.get(&MACHINE, PERSISTENT), Some(Payload::sealed(&[7; 256])));
    // Ours: gets it, marked, and the volume is from now on held to its state.
    let accepting = Init { accepts_sealed: true, release_only: true, ..MACHINE.soft.init() };
    let answer = kms.attest_as(&MACHINE.soft, PERSISTENT, &accepting).unwrap();
    assert_eq!((text(&answer), answer.sealed), (sealed.as_str(), true));
    assert_eq!(pcrs_of(learned(&objects(directory.path()))), shown(&MACHINE.soft.pcrs));
    // A tampered system does not get around that by the older endpoint.
    let refused = kms.get(&MACHINE, PERSISTENT).unwrap();
    assert!(
        refused.error.starts_with("PCR verification failed: ") && refused.passphrase.is_empty(),
        "{}",
        refused.error
    );
    let again = kms.attest_as(&MACHINE.soft, PERSISTENT, &accepting).unwrap();
    assert_eq!((text(&again), again.sealed), (sealed.as_str(), true));
}

#[test]
fn a_passphrase_of_generation_2_is_released_over_generation_1_until_pcrs_are_held() {
    let directory = store(&[]);
    let kms = Kms::start(directory.path());
    let deferring = Init { defer_pcr_enrollment: true, ..MACHINE.soft.init() };
    let made = kms.attest_as(&MACHINE.soft, PERSISTENT, &deferring).unwrap();
    assert_eq!(kms.get(&MACHINE, PERSISTENT).unwrap().passphrase.as_str(), text(&made));
    assert!(kms.attest(&MACHINE.soft, PERSISTENT).unwrap().error.is_empty());
    assert!(kms.get(&MACHINE, PERSISTENT).unwrap().passphrase.is_empty());
}

#[test]
fn the_operators_text_stays_around_what_is_learned() {
    let manifests = format!(
        "# the attic\n{}# keep: bought 2024\n---\n# the passphrase is in the safe, too\n{}",
        MACHINE.volume(
            "node",
            "  attestation:   # learn\n    pcrValues:\n      pcrs: {\"7\": \"\"} # secure boot\n"
        ),
        secret("node-cos-persistent", "  passphrase:   'found'  # odd\n")
            .trim_start_matches("---\n")
    );
    let directory = store(&[("attic.yml", &manifests)]);
    let path = directory.path().join("attic.yml");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    let kms = Kms::start(directory.path());
    assert_eq!(text(&kms.attest(&MACHINE.soft, PERSISTENT).unwrap()), "found");
    let now = fs::read_to_string(&path).unwrap();
    let (head, tail) = manifests.split_at(manifests.find("  attestation:").unwrap());
    let tail = &tail[tail.find("# keep").unwrap()..];
    assert!(now.starts_with(head) && now.ends_with(tail), "{now}");
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
    assert_eq!(rig::files(directory.path()), ["attic.yml"]);
}

#[test]
fn partitions_and_machines_enrol_side_by_side() {
    const LABELS: [&str; 8] = ["A", "B", "C", "D", "E", "F", "G", "H"];
    let directory = store(&[]);
    let kms = Kms::start(directory.path());
    let others: Vec<SoftIdentity> =
        (0..6).map(|_| SoftIdentity::sharing_ak(&MACHINE.soft)).collect();
    let enrol = |machine: &SoftIdentity, label: &str| {
        let answer = kms.attest(machine, [label, "", ""]).unwrap();
        assert_eq!(answer.error, "", "{label}");
        (machine.pubhash(), label.to_owned(), text(&answer).to_owned())
    };
    let got: Vec<_> = thread::scope(|scope| {
        let enrol = &enrol;
        let one = LABELS
            .iter()
            .chain(&LABELS)
            .map(|label| scope.spawn(move || enrol(&MACHINE.soft, label)));
        let many =
            others.iter().map(|machine| scope.spawn(move || enrol(machine, "COS_PERSISTENT")));
        let all: Vec<_> = one.chain(many).collect();
        all.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let by_partition: BTreeMap<_, _> =
        got.iter().map(|(hash, label, text)| ((hash, label), text)).collect();
    assert_eq!(by_partition.len(), LABELS.len() + others.len());
    let distinct: std::collections::BTreeSet<_> = got.iter().map(|(.., text)| text).collect();
    assert_eq!(distinct.len(), by_partition.len(), "each partition has one, and none another's");
    let all = objects(directory.path());
    assert_eq!((all.volumes.len(), all.secrets.len()), (1 + others.len(), by_partition.len()));
    let mine =
        all.volumes.iter().find(|volume| volume.spec.tpm_hash == MACHINE.pubhash.as_str()).unwrap();
    assert_eq!(mine.spec.partitions.len(), LABELS.len());
}

#[test]
fn nothing_is_enrolled_that_an_unreadable_file_may_know() {
    let directory = store(&[]);
    let broken = MACHINE
        .volume("node", "  quarantined: [\n")
        .replace(MACHINE.pubhash.as_str(), &MACHINE.pubhash.as_str().to_uppercase());
    fs::write(directory.path().join("broken.yaml"), broken).unwrap();
    let kms = Kms::start(directory.path());
    kms.wait_for("broken.yaml: line");
    assert!(kms.attest(&MACHINE.soft, PERSISTENT).is_none());
    kms.wait_for(
        "result=failed why=\"no SealedVolume has this TPM hash, but a file that cannot be read may",
    );
    // One that it does not mention is.
    assert!(kms.attest(&STRANGER.soft, PERSISTENT).unwrap().error.is_empty());
}

#[test]
fn what_cannot_be_written_is_not_released() {
    let volume = MACHINE.volume("node", "");
    let found = secret("node-cos-persistent", "  passphrase: found\n");
    // The same volume in two files: which one is to learn?
    let directory = store(&[("a.yaml", &(volume.clone() + &found)), ("b.yaml", &volume)]);
    let kms = Kms::start(directory.path());
    assert!(kms.attest(&MACHINE.soft, PERSISTENT).is_none());
    let told = kms.wait_for("result=failed");
    assert!(told.contains("a.yaml") && told.contains("b.yaml: remove one of them"), "{told}");
    kms.forget_log();
    fs::remove_file(directory.path().join("b.yaml")).unwrap();
    kms.wait_for("1 volumes, 1 secrets in 1 files");
    assert_eq!(text(&kms.attest(&MACHINE.soft, PERSISTENT).unwrap()), "found");
}

#[test]
fn a_crash_between_secret_and_volume_heals() {
    let directory = store(&[]);
    let kms = Kms::start(directory.path());
    let first = kms.attest(&MACHINE.soft, PERSISTENT).unwrap();
    kms.forget_log();
    let volume = format!("default.tofu-{}.volume.yaml", &MACHINE.pubhash.as_str()[..8]);
    fs::remove_file(directory.path().join(volume)).unwrap();
    kms.wait_for("0 volumes, 1 secrets in 1 files");
    assert_eq!(text(&kms.attest(&MACHINE.soft, PERSISTENT).unwrap()), text(&first));
    assert_eq!(objects(directory.path()).volumes.len(), 1);
}

/// The server is killed while machines enrol: whoever has got a passphrase gets it again, and nothing is half there.
#[test]
fn a_server_that_is_killed_while_machines_enrol_loses_nothing_it_gave_out() {
    let directory = store(&[]);
    let machines: Vec<SoftIdentity> =
        (0..8).map(|_| SoftIdentity::sharing_ak(&MACHINE.soft)).collect();
    let mut given: BTreeMap<(usize, String), String> = BTreeMap::new();
    for round in 0..4 {
        let kms = Kms::start(directory.path());
        thread::scope(|scope| {
            let threads: Vec<_> = (0..machines.len())
                .map(|number| {
                    let (kms, machine) = (&kms, &machines[number]);
                    scope.spawn(move || {
                        let labels = (0..4).map(|label| format!("R{round}L{label}"));
                        labels
                            .map_while(|label| {
                                let got = kms.try_attest(machine, [&label, "", ""])?;
                                Some(((number, label), got))
                            })
                            .collect::<Vec<_>>()
                    })
                })
                .collect();
            kms.wait_for_times("result=granted", 3 + 4 * round);
            kms.signal("-KILL");
            given.extend(threads.into_iter().flat_map(|thread| thread.join().unwrap()));
        });
        drop(kms);
        let kms = Kms::start(directory.path());
        assert!(!kms.lines().iter().any(|line| line.contains("ERROR")), "{:?}", kms.lines());
        for ((number, label), passphrase) in &given {
            let boot = Init { release_only: true, ..machines[*number].init() };
            let again = kms.attest_as(&machines[*number], [label, "", ""], &boot).unwrap();
            assert_eq!(text(&again), passphrase, "{label} of {number}");
        }
        objects(directory.path());
        assert!(!rig::files(directory.path()).iter().any(|name| name.starts_with('.')));
    }
    assert!(given.len() >= 3, "{}", given.len());
}

#[test]
fn labels_that_yaml_or_kubernetes_could_take_for_something_else() {
    let directory = store(&[]);
    let kms = Kms::start(directory.path());
    let labels = [
        "1e3",
        "0x10",
        "null",
        "~",
        "true",
        "no",
        "-",
        "- a",
        "#x",
        "a: b",
        "{a}",
        "'",
        "\"",
        "\\\\",
        "..",
        "../../x",
        "a b",
        "%",
        "!!str",
        "*a",
        "&a",
        "2026-11-21",
        "Größe",
        "_",
        "x_LUKS",
        "PERSISTENT",
        "persistent",
    ];
    let mut given = BTreeMap::new();
    for label in labels {
        let answer = kms.attest(&MACHINE.soft, [label, "", ""]).unwrap();
        assert_eq!(answer.error, "", "{label}");
        assert!(given.insert(text(&answer).to_owned(), label).is_none(), "{label}");
    }
    let all = objects(directory.path());
    let stored: Vec<&str> =
        all.volumes[0].spec.partitions.iter().map(|partition| partition.label.as_str()).collect();
    assert_eq!(stored, labels);
    for secret in &all.secrets {
        let valid = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        assert!(secret.metadata.name.chars().all(valid), "{}", secret.metadata.name);
        let value = &secret.metadata.labels["kcrypt.kairos.io/partition"];
        let valid = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        assert!(value.len() <= 63 && value.chars().all(valid), "{value}");
    }
    drop(kms);
    let kms = Kms::start(directory.path());
    for (passphrase, label) in given {
        assert_eq!(
            text(&kms.attest(&MACHINE.soft, [label, "", ""]).unwrap()),
            passphrase,
            "{label}"
        );
    }
}
