//! What the TPM floor promises, asked of a real software TPM over a unix socket.

// A test's helpers may panic as the tests do.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use latchkey_soft_tpm::SoftTpm;
use latchkey_tpm::{AttestationKey, EndorsementKey, Hierarchy, Tpm, TpmError, handle};

const ACTIVATE: u32 = 0x147;
const CREATE: u32 = 0x153;
const CREATE_PRIMARY: u32 = 0x131;
const EVICT: u32 = 0x120;
const FLUSH: u32 = 0x165;
const HMAC: u32 = 0x155;
const POLICY_SECRET: u32 = 0x151;
const READ_PUBLIC: u32 = 0x173;

fn open(soft: &SoftTpm) -> Tpm {
    Tpm::open(Some(&soft.device())).unwrap()
}

fn activate(
    tpm: &mut Tpm,
    ek: &EndorsementKey,
    ak: &AttestationKey,
    credential: &[u8],
    secret: &[u8],
) -> Result<Vec<u8>, TpmError> {
    let activation = tpm.prepare_activation(ek)?;
    tpm.activate_credential(ek, ak, activation, credential, secret).map(|secret| secret.to_vec())
}

/// Runs tpm2-tools in a scratch folder, past the proxy.
fn tools(soft: &SoftTpm, script: &str) {
    let dir = soft.direct().with_file_name("tools");
    std::fs::create_dir_all(&dir).unwrap();
    let done = std::process::Command::new("sh")
        .args(["-ec", script])
        .current_dir(dir)
        .env("TPM2TOOLS_TCTI", format!("swtpm:path={}", soft.direct().display()))
        .output()
        .unwrap();
    assert!(done.status.success(), "{script}: {}", String::from_utf8_lossy(&done.stderr));
}

/// TPM2_GetCapability(handles), asked past the library: what is left in the TPM.
fn handles(soft: &SoftTpm, first: &str) -> String {
    let out = std::process::Command::new("tpm2_getcap")
        .arg(first)
        .env("TPM2TOOLS_TCTI", format!("swtpm:path={}", soft.direct().display()))
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

#[test]
fn commands_go_through_our_own_tcti() {
    let soft = SoftTpm::fresh();
    let mut tpm = open(&soft);
    tpm.endorsement_key().unwrap();
    assert_eq!(tpm.commands(), soft.take_counts().values().sum::<u32>());
}

#[test]
fn the_pubhash_is_the_same_with_and_without_certificate_across_reboots() {
    for mut soft in [SoftTpm::fresh(), SoftTpm::certified()] {
        let first = open(&soft).endorsement_key().unwrap().pubhash().to_string();
        assert_eq!(first.len(), 64);
        assert!(handles(&soft, "handles-persistent").contains("0x81010001"));
        soft.restart();
        soft.take_counts();
        let second = open(&soft).endorsement_key().unwrap().pubhash().to_string();
        assert_eq!(first, second);
        assert!(!soft.take_counts().contains_key(&CREATE_PRIMARY), "a warm boot makes no key");
    }
}

#[test]
fn the_certificate_names_the_key_that_the_template_makes() {
    let soft = SoftTpm::certified();
    let hash = open(&soft).endorsement_key().unwrap().pubhash().to_string();
    let spki = std::process::Command::new("sh")
        .arg("-c")
        .arg("tpm2_nvread 0x1c00002 -C o | openssl x509 -inform DER -noout -pubkey | openssl pkey -pubin -outform DER | sha256sum")
        .env("TPM2TOOLS_TCTI", format!("swtpm:path={}", soft.direct().display()))
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&spki.stdout).split(' ').next().unwrap(), hash);
}

#[test]
fn a_foreign_object_at_the_handle_of_the_endorsement_key_is_neither_used_nor_replaced() {
    let soft = SoftTpm::fresh();
    let mut tpm = open(&soft);
    let genuine = tpm.endorsement_key().unwrap().pubhash().to_string();
    drop(tpm);
    tools(&soft, "tpm2_evictcontrol -C o -c 0x81010001");
    let policy = soft.direct().with_file_name("tools").join("policy");
    std::fs::write(policy, &latchkey_tpm::template::EK[10..42]).unwrap();
    // The EK template under the owner hierarchy: the same shape, another key.
    tools(
        &soft,
        "tpm2_createprimary -C o -G rsa2048:aes128cfb -g sha256 -c k.ctx -L policy \
           -a 'fixedtpm|fixedparent|sensitivedataorigin|adminwithpolicy|restricted|decrypt'
         tpm2_flushcontext -t; tpm2_evictcontrol -C o -c k.ctx 0x81010001; tpm2_flushcontext -t",
    );
    let before = handles(&soft, "handles-persistent");
    let mut tpm = open(&soft);
    let ek = tpm.endorsement_key().unwrap();
    assert_eq!(ek.pubhash().to_string(), genuine);
    drop(tpm);
    assert_eq!(handles(&soft, "handles-persistent"), before);
}

/// Some manufacturers' certificates name the key's algorithm id-RSAES-OAEP; Go finds no key in them.
#[test]
fn a_certificate_for_an_oaep_key_gives_the_same_pubhash() {
    let soft = SoftTpm::certified();
    let pubhash = open(&soft).endorsement_key().unwrap().pubhash().to_string();
    tools(&soft, "tpm2_nvread -C o -o cert 0x1c00002; tpm2_nvundefine -C p 0x1c00002");
    let file = soft.direct().with_file_name("tools").join("cert");
    let mut certificate = std::fs::read(&file).unwrap();
    let rsa = [0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x01];
    let at = certificate.windows(rsa.len()).position(|window| window == rsa).unwrap();
    certificate[at + rsa.len() - 1] = 0x07;
    std::fs::write(&file, &certificate).unwrap();
    tools(
        &soft,
        "tpm2_nvdefine -C o -s $(stat -c %s cert) -a 'ownerread|ownerwrite|authread' 0x1c00002
         tpm2_nvwrite -C o -i cert 0x1c00002; tpm2_evictcontrol -C o -c 0x81010001",
    );
    assert_eq!(open(&soft).endorsement_key().unwrap().pubhash().to_string(), pubhash);
    assert_eq!(latchkey_wire::ek::certificate_public_key(&certificate).unwrap().1, 65537);
}

#[test]
fn a_password_on_a_hierarchy_is_named() {
    for (which, hierarchy) in [("owner", Hierarchy::Owner), ("endorsement", Hierarchy::Endorsement)]
    {
        let soft = SoftTpm::fresh();
        tools(&soft, &format!("tpm2_changeauth -c {which} secret"));
        let error = open(&soft).endorsement_key().unwrap_err();
        assert!(
            matches!(error, TpmError::AuthSet { hierarchy: found, .. } if found == hierarchy),
            "{error:?}"
        );
    }
}

#[test]
fn a_real_lockout_is_named_and_the_attestation_is_not_affected() {
    let soft = SoftTpm::fresh();
    let sealed = open(&soft).seal_blob(handle::BLOB_KEY, b"x").unwrap();
    tools(
        &soft,
        "tpm2_dictionarylockout -s -n 1 -t 1000 -l 1000
         tpm2_createprimary -C o -c p.ctx; tpm2_flushcontext -t
         echo secret | tpm2_create -C p.ctx -i- -p right -u u -r r; tpm2_flushcontext -t
         tpm2_load -C p.ctx -u u -r r -c k.ctx; tpm2_flushcontext -t
         ! tpm2_unseal -c k.ctx -p wrong; tpm2_flushcontext -t",
    );
    let mut tpm = open(&soft);
    let error = tpm.unseal_blob(handle::BLOB_KEY, &sealed).unwrap_err();
    assert!(matches!(error, TpmError::Lockout { .. }), "{error:?}");
    let ek = tpm.endorsement_key().unwrap();
    tpm.attestation_key().unwrap();
    tpm.machine_secret(&ek).unwrap();
}

#[test]
fn an_activated_credential_gives_the_secret_back_and_leaves_nothing_behind() {
    use latchkey_wire::credential::{make_credential, split_credential};
    let soft = SoftTpm::certified();
    let mut tpm = open(&soft);
    let ek = tpm.endorsement_key().unwrap();
    let ak = tpm.attestation_key().unwrap();
    let checked = latchkey_wire::attest::check_ak(ak.parameters()).unwrap();
    let (secret, seed) = ([7; 32], [9; 16]);
    let ek_public = latchkey_wire::ek::RsaPublicKey::from_spki(ek.spki()).unwrap();
    let challenge = make_credential(&ek_public, &checked.name, &secret, &seed).unwrap();
    let parts = split_credential(&challenge.credential, &challenge.secret).unwrap();
    for _ in 0..8 {
        let got = activate(&mut tpm, &ek, &ak, parts.id_object, parts.encrypted_secret).unwrap();
        assert_eq!(got.as_slice(), secret);
    }
    let mut wrong = parts.encrypted_secret.to_vec();
    wrong[40] ^= 1;
    let refused = activate(&mut tpm, &ek, &ak, parts.id_object, &wrong);
    assert!(
        matches!(refused, Err(TpmError::Response { operation: "ActivateCredential", .. })),
        "{refused:?}"
    );
    drop((tpm, ak));
    assert_eq!(handles(&soft, "handles-transient"), "");
    assert_eq!(handles(&soft, "handles-loaded-session"), "");
}

#[test]
fn a_quote_covers_the_values_it_comes_with() {
    let soft = SoftTpm::fresh();
    let mut tpm = open(&soft);
    let ak = tpm.attestation_key().unwrap();
    let nonce = [3; 32];
    let quote = tpm.quote(&ak, &nonce, &[0, 7, 11]).unwrap();
    assert_eq!(quote.pcrs.keys().copied().collect::<Vec<_>>(), [0, 7, 11]);
    assert_eq!(quote.attest.len(), 145, "113 bytes and the nonce");
    assert_eq!(quote.attest[44..76], nonce);
    let all: Vec<u8> = (0..16).collect();
    assert_eq!(tpm.quote(&ak, &nonce, &all).unwrap().pcrs.len(), 16, "more than one reading gives");
    assert!(tpm.quote(&ak, &nonce, &[]).is_err());
    assert!(tpm.quote(&ak, &nonce, &[24]).is_err());
}

#[test]
fn a_sealed_passphrase_opens_on_this_tpm_and_on_no_other() {
    let mut soft = SoftTpm::fresh();
    let sealed = open(&soft).seal_blob(handle::BLOB_KEY, b"correct horse").unwrap();
    assert_eq!(sealed.len(), 256);
    soft.restart();
    assert_eq!(*open(&soft).unseal_blob(handle::BLOB_KEY, &sealed).unwrap(), b"correct horse");
    let other = SoftTpm::fresh();
    let refused = open(&other).unseal_blob(handle::BLOB_KEY, &sealed);
    assert!(matches!(refused, Err(TpmError::Response { .. })), "{refused:?}");
    assert_eq!(handles(&other, "handles-persistent"), "", "unsealing makes nothing that stays");
}

#[test]
fn a_lost_blob_key_is_made_again_from_the_seed() {
    let soft = SoftTpm::fresh();
    let sealed = open(&soft).seal_blob(handle::BLOB_KEY, b"still there").unwrap();
    let gone = std::process::Command::new("tpm2_evictcontrol")
        .args(["-C", "o", "-c", "0x81000008"])
        .env("TPM2TOOLS_TCTI", format!("swtpm:path={}", soft.direct().display()))
        .status();
    assert!(gone.unwrap().success());
    assert_eq!(*open(&soft).unseal_blob(handle::BLOB_KEY, &sealed).unwrap(), b"still there");
}

/// Newer Kairos makes the key with a `unique` field of 256 zero bytes, which is another key from the same seed.
#[test]
fn a_lost_blob_key_of_generation_2_is_made_again_too() {
    let soft = SoftTpm::fresh();
    tools(
        &soft,
        "(printf '\\000\\001'; head -c 256 /dev/zero) > unique
         tpm2_createprimary -Q -C o -G rsa2048:null:null -u unique -a 'sensitivedataorigin|userwithauth|decrypt|sign' -c key.ctx
         tpm2_flushcontext -t; tpm2_evictcontrol -Q -C o -c key.ctx 0x81000008; tpm2_flushcontext -t",
    );
    assert!(open(&soft).blob_key_can_be_remade(handle::BLOB_KEY).unwrap());
    let sealed = open(&soft).seal_blob(handle::BLOB_KEY, b"of generation 2").unwrap();
    tools(&soft, "tpm2_evictcontrol -C o -c 0x81000008");
    assert_eq!(*open(&soft).unseal_blob(handle::BLOB_KEY, &sealed).unwrap(), b"of generation 2");
    let first = SoftTpm::fresh();
    open(&first).seal_blob(handle::BLOB_KEY, b"x").unwrap();
    assert!(open(&first).blob_key_can_be_remade(handle::BLOB_KEY).unwrap());
}

#[test]
fn an_nv_index_is_written_once_and_never_overwritten() {
    let soft = SoftTpm::fresh();
    let mut tpm = open(&soft);
    let index = handle::NV_BLOB;
    assert!(matches!(tpm.nv_blob(index), Err(TpmError::NvMissing { .. })));
    let content = vec![0xa5; 256];
    tpm.nv_store_new(index, &content).unwrap();
    assert_eq!(*tpm.nv_blob(index).unwrap(), content);
    assert!(matches!(tpm.nv_store_new(index, &[1; 256]), Err(TpmError::Occupied { .. })));
    assert_eq!(*tpm.nv_blob(index).unwrap(), content);
}

#[test]
fn a_power_cut_between_defining_and_writing_is_made_good_by_the_next_run() {
    let soft = SoftTpm::fresh();
    let content = [0x5a; 256];
    let mut commands = 0;
    loop {
        let mut tpm = open(&soft);
        soft.cut_after(commands);
        let stored = tpm.nv_store_new(handle::NV_BLOB, &content);
        drop(tpm);
        soft.mend();
        let mut tpm = open(&soft);
        match tpm.nv_store_new(handle::NV_BLOB, &content) {
            Ok(()) | Err(TpmError::Occupied { .. }) => {}
            Err(error) => panic!("cut after {commands} commands: {error}"),
        }
        assert_eq!(*tpm.nv_blob(handle::NV_BLOB).unwrap(), content, "cut after {commands}");
        if stored.is_ok() {
            break;
        }
        assert!(matches!(stored, Err(TpmError::Connection { .. })), "{stored:?}");
        let tcti = format!("swtpm:path={}", soft.direct().display());
        drop(tpm);
        let undefined = std::process::Command::new("tpm2_nvundefine")
            .args(["-C", "o", "0x1500000"])
            .env("TPM2TOOLS_TCTI", tcti)
            .status();
        assert!(undefined.unwrap().success());
        commands += 1;
    }
    assert!(commands >= 3, "there were cuts before and after the definition");
}

#[test]
fn an_index_is_written_over_only_where_that_is_asked_for() {
    const INDEX: u32 = 0x0150_0001;
    let soft = SoftTpm::fresh();
    let mut tpm = open(&soft);
    tpm.nv_replace(INDEX, &[1; 256]).unwrap();
    assert!(matches!(tpm.nv_store_new(INDEX, &[2; 256]), Err(TpmError::Occupied { .. })));
    assert_eq!(*tpm.nv_blob(INDEX).unwrap(), [1; 256]);
    tpm.nv_replace(INDEX, &[2; 256]).unwrap();
    assert_eq!(*tpm.nv_blob(INDEX).unwrap(), [2; 256]);
    assert!(matches!(tpm.nv_replace(INDEX, &[3; 255]), Err(TpmError::Occupied { .. })));
    assert_eq!(*tpm.nv_blob(INDEX).unwrap(), [2; 256]);
}

#[test]
fn the_machine_secret_is_constant_and_the_machines_own() {
    let mut soft = SoftTpm::certified();
    let secret = |soft: &SoftTpm| {
        let mut tpm = open(soft);
        let ek = tpm.endorsement_key().unwrap();
        *tpm.machine_secret(&ek).unwrap()
    };
    let first = secret(&soft);
    soft.restart();
    assert_eq!(secret(&soft), first);
    assert_ne!(secret(&SoftTpm::fresh()), first);
}

#[test]
fn the_mark_of_a_volume_is_its_own_and_the_machines_own() {
    const UUID: &str = "85c39d0f-4867-5227-8334-f5eec606d9eb";
    let mut soft = SoftTpm::certified();
    let mac = |soft: &SoftTpm, uuid: &str, label: &str| open(soft).volume_mac(uuid, label).unwrap();
    let first = mac(&soft, UUID, "COS_PERSISTENT");
    let mut tpm = open(&soft);
    let ek = tpm.endorsement_key().unwrap();
    assert_ne!(*tpm.machine_secret(&ek).unwrap(), first);
    drop(tpm);
    soft.restart();
    assert_eq!(mac(&soft, UUID, "COS_PERSISTENT"), first);
    assert_ne!(mac(&soft, UUID, "COS_OEM"), first);
    assert_ne!(mac(&soft, "8bfa06f9-ca4f-56dc-90c9-49cf20f4f45e", "COS_PERSISTENT"), first);
    assert_ne!(mac(&SoftTpm::fresh(), UUID, "COS_PERSISTENT"), first);
    assert!(open(&soft).volume_mac(UUID, &"x".repeat(2000)).is_err());
}

#[test]
fn what_the_tpm_asks_to_be_resent_is_resent() {
    const RETRY: u32 = 0x922;
    const TESTING: u32 = 0x90a;
    let soft = SoftTpm::fresh();
    let mut tpm = open(&soft);
    soft.answer(CREATE_PRIMARY, &[RETRY, TESTING, RETRY]);
    soft.answer(CREATE, &[RETRY]);
    tpm.endorsement_key().unwrap();
    tpm.attestation_key().unwrap();
}

#[test]
fn every_refusal_has_an_error_of_its_own() {
    const LOCKOUT: u32 = 0x921;
    const BAD_AUTH: u32 = 0x9a2;
    let owner =
        |error: &TpmError| matches!(error, TpmError::AuthSet { hierarchy: Hierarchy::Owner, .. });
    let endorsement = |error: &TpmError| {
        matches!(error, TpmError::AuthSet { hierarchy: Hierarchy::Endorsement, .. })
    };
    let lockout = |error: &TpmError| matches!(error, TpmError::Lockout { .. });
    type Case<'a> = (&'a str, u32, u32, &'a dyn Fn(&TpmError) -> bool);
    let cases: [Case<'_>; 7] = [
        ("owner password, at EvictControl", EVICT, BAD_AUTH, &owner),
        ("endorsement password, at CreatePrimary", CREATE_PRIMARY, BAD_AUTH, &endorsement),
        ("lockout, at Create", CREATE, LOCKOUT, &lockout),
        ("lockout, at CertifyCreation", 0x14a, LOCKOUT, &lockout),
        ("lockout, at HMAC", HMAC, LOCKOUT, &lockout),
        ("out of sessions", 0x176, 0x903, &|error| {
            matches!(error, TpmError::Response { code: 0x903, .. })
        }),
        ("a failing ReadPublic", READ_PUBLIC, 0x101, &|error| {
            matches!(error, TpmError::Response { code: 0x101, .. })
        }),
    ];
    for (name, command, code, expected) in cases {
        let soft = SoftTpm::fresh();
        let mut tpm = open(&soft);
        soft.answer(command, &[code; 30]);
        let error = tpm
            .endorsement_key()
            .and_then(|ek| tpm.attestation_key().map(|_| ek))
            .and_then(|ek| tpm.machine_secret(&ek).map(drop))
            .unwrap_err();
        assert!(expected(&error), "{name}: {error:?}");
    }
}

#[test]
fn sessions_are_flushed_when_a_command_under_them_fails() {
    let soft = SoftTpm::fresh();
    let mut tpm = open(&soft);
    let ek = tpm.endorsement_key().unwrap();
    let ak = tpm.attestation_key().unwrap();
    for (command, code) in [(POLICY_SECRET, 0x9a2), (ACTIVATE, 0x1df), (HMAC, 0x921)] {
        soft.answer(command, &[code]);
        let failed = match command {
            HMAC => tpm.machine_secret(&ek).map(drop),
            _ => activate(&mut tpm, &ek, &ak, &[0; 68], &[0; 256]).map(drop),
        };
        assert!(failed.is_err());
    }
    drop((tpm, ak));
    let counts = soft.take_counts();
    assert!(counts[&FLUSH] >= counts[&0x176], "{counts:?}");
    assert_eq!(handles(&soft, "handles-loaded-session"), "");
}

#[test]
fn a_missing_tpm_is_waited_for_and_then_named() {
    let before = std::time::Instant::now();
    let error = Tpm::open_within(Some("/nonexistent/tpm"), Duration::from_millis(100)).unwrap_err();
    assert!(before.elapsed() >= Duration::from_millis(100));
    assert!(
        matches!(&error, TpmError::Missing { tried } if tried == "/nonexistent/tpm"),
        "{error}"
    );
}

#[test]
fn a_tpm_that_hangs_up_or_talks_nonsense_is_an_error_not_a_panic() {
    use std::io::{Read, Write};
    for answer in
        [&b""[..], b"garbage that is no header at all", &[0x80, 1, 0, 0, 0, 5, 0, 0, 0, 0]]
    {
        let dir = std::env::temp_dir().join(format!("lk-nonsense-{}", std::process::id()));
        let _ = std::fs::remove_file(&dir);
        let listener = std::os::unix::net::UnixListener::bind(&dir).unwrap();
        let answer = answer.to_vec();
        let server = std::thread::spawn(move || {
            let (mut client, _) = listener.accept().unwrap();
            let _ = client.read(&mut [0; 4096]);
            let _ = client.write_all(&answer);
        });
        let mut tpm = Tpm::open(Some(dir.to_str().unwrap())).unwrap();
        let error = tpm.endorsement_key().unwrap_err();
        assert!(matches!(error, TpmError::Connection { .. }), "{error:?}");
        server.join().unwrap();
        std::fs::remove_file(&dir).unwrap();
    }
}
