//! What the kernel command line configures, and what it does not: protocols/kcrypt.md §10.3, as tables.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail as tests do")]

use std::fs;
use std::path::Path;

use latchkey_config::{Config, ConfigError, DEFAULT_NV_INDEX, MapperNames, Protocol, Request};

fn no_network(_: &Request<'_>) -> Result<Vec<u8>, String> {
    Err("no network".to_owned())
}

fn load(dirs: &[&Path], cmdline: &str) -> Result<Config, ConfigError> {
    latchkey_config::load(dirs, cmdline, &mut no_network)
}

fn over(file: &str, cmdline: &str) -> Result<Config, ConfigError> {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("90.yaml"), format!("#cloud-config\n{file}\n")).unwrap();
    load(&[dir.path()], cmdline)
}

/// Of boots that were seen, and what has stopped a jq-based reader.
const OTHERS: &str = r#"BOOT_IMAGE=(hd0,gpt3)/boot/vmlinuz console=tty1 console=ttyS0,115200n8 console.x=1 net.ifnames=1
 rd.cos.oemlabel=COS_OEM rd.cos.oemtimeout=10 panic=5 rd.emergency=reboot rd.shell=0 systemd.crash_reboot=yes
 root=LABEL=COS_ACTIVE cos-img/filename=/cOS/active.img 8250.nr_uarts=1 3 single /dev/x a:b ip=10.0.2.15::10.0.2.2:255.255.255.0::eth0:none
 dyndbg="file drivers/usb/* +p" module.param='a b' path=C:\boot\x \ trailing\ space x=it's -- --init -flag =novalue . .. a..b a. .a
 "quoted word" unclosed=" kairos.other=1 kairos kcrypt install latchkey kcrypt=1 install=1 latchkey=x install.auto=true
 latchkey.test=install latchkey.encrypt=--recovery-key,--new latchkey.unlock=0 rd.latchkey=0 rd.latchkey.debug=1 latchkey.colour=red
 kcrypt.something=1 config_uri=x cos.setup=/oem/setup.yaml kairos.config=hostname=x kairos.config=x kairos.config= ümlaut=ö
 rd.neednet=1 netboot.url=x"#;

#[test]
fn every_other_word_is_somebody_elses() {
    let with_ours = format!("{OTHERS} kcrypt.challenger.challenger_server=http://a");
    let (alone, ours) = (load(&[], OTHERS).unwrap(), load(&[], &with_ours).unwrap());
    assert_eq!(alone, load(&[], "").unwrap());
    assert_eq!(ours.challenger.servers, ["http://a"]);
    // Each by itself, wherever ours stands.
    for word in latchkey_config::cmdline::words(OTHERS) {
        for text in [
            format!("{word} kcrypt.challenger.challenger_server=http://a"),
            format!("kcrypt.challenger.challenger_server=http://a {word}"),
        ] {
            assert_eq!(load(&[], &text).unwrap().challenger.servers, ["http://a"], "{text}");
        }
    }
}

#[test]
fn every_setting_can_stand_on_the_command_line() {
    let config = load(
        &[],
        "kcrypt.challenger.challenger_server=http://kms.local:8082 kcrypt.challenger.mdns kcrypt.nv_index=0x1500001 \
         kcrypt.challenger.c_index=2164260873 kcrypt.tpm_device=/dev/tpm0 latchkey.deadline=30s latchkey.protocol=v2 \
         latchkey.pcrs=7,0 latchkey.mapper=partition install.encrypted_partitions=COS_OEM,COS_PERSISTENT \
         latchkey.mesh.network=fleet latchkey.mesh.prefix=fd10::/16\n",
    )
    .unwrap();
    assert_eq!(config.challenger.servers, ["http://kms.local:8082"]);
    assert!(config.challenger.mdns);
    assert_eq!(config.challenger.nv_index, 0x0150_0001);
    assert_eq!(config.challenger.c_index, 0x8100_0009);
    assert_eq!(config.challenger.tpm_device.as_deref(), Some("/dev/tpm0"));
    assert_eq!(config.challenger.protocol, Protocol::V2);
    assert_eq!(config.challenger.pcrs, [0, 7]);
    assert_eq!(config.mapper, MapperNames::Partition);
    assert_eq!(config.deadline.as_secs(), 30);
    assert_eq!(config.encrypted_partitions, ["COS_OEM", "COS_PERSISTENT"]);
    assert_eq!(config.mesh.unwrap().network, "fleet");

    let config = load(&[], "kcrypt.challenger.challenger_server=http://a,http://b:1").unwrap();
    assert_eq!(config.challenger.servers, ["http://a", "http://b:1"]);
    // In Kairos' long form, where the original took no booleans; the later word wins.
    let config = load(
        &[],
        "kairos.config=kcrypt.challenger.challenger_server=http://a.local \"kairos.config=kcrypt.challenger.mdns=true\"",
    )
    .unwrap();
    assert!(config.challenger.mdns);
    let text = "latchkey.deadline=1s latchkey.deadline=2s kairos.config=latchkey.deadline=3s";
    assert_eq!(load(&[], text).unwrap().deadline.as_secs(), 3);
}

#[test]
fn the_command_line_wins_over_the_files() {
    let file =
        "kcrypt: {challenger: {challenger_server: ['http://a', 'http://b'], nv_index: 0x1500001}}
install: {encrypted_partitions: [A, B]}
latchkey: {pcrs: [0, 7]}";
    let config = over(
        file,
        "kcrypt.challenger.challenger_server=http://c install.encrypted_partitions=C latchkey.pcrs=11 kcrypt.nv_index=0x1500002",
    )
    .unwrap();
    assert_eq!(config.challenger.servers, ["http://c"]);
    assert_eq!(config.encrypted_partitions, ["C"]);
    assert_eq!(config.challenger.pcrs, [11]);
    // Also over the other of the two places of a setting.
    assert_eq!(config.challenger.nv_index, 0x0150_0002);
    // What it does not mention stays.
    assert_eq!(over(file, "quiet").unwrap().challenger.servers.len(), 2);
    // Empty is how somebody says that there is no server.
    assert!(
        over(file, "kcrypt.challenger.challenger_server=").unwrap().challenger.servers.is_empty()
    );
    // On one level the two places must agree, here too.
    assert!(matches!(
        load(&[], "kcrypt.nv_index=0x1500001 kcrypt.challenger.nv_index=0x1500002"),
        Err(ConfigError::Conflict { .. })
    ));
    let config = load(&[], "kcrypt.challenger.nv_index=0x1500000 kcrypt.nv_index=22020096");
    assert_eq!(config.unwrap().challenger.nv_index, DEFAULT_NV_INDEX);
}

#[test]
fn a_typing_error_on_the_command_line_is_told_with_the_key_that_was_meant() {
    for (word, nearest) in [
        (
            "kcrypt.challenger.challenger_sever=http://a",
            Some("kcrypt.challenger.challenger_server"),
        ),
        (
            "kcrypt.challenger.challenger-server=http://a",
            Some("kcrypt.challenger.challenger_server"),
        ),
        ("Kcrypt.Challenger.mDNS=true", Some("kcrypt.challenger.mdns")),
        (
            "kcrypt.chalenger.challenger_server=http://a",
            Some("kcrypt.challenger.challenger_server"),
        ),
        ("kairos.config=kcrytp.challenger.mdns=true", Some("kcrypt.challenger.mdns")),
        ("kcrypt.nvindex=1", Some("kcrypt.nv_index")),
        ("latchkey.dead_line=1s", Some("latchkey.deadline")),
        ("install.encrypted-partitions=A", Some("install.encrypted_partitions")),
        ("kairos.config-url=http://a", Some("kairos.config_url")),
        ("kairos.confg=latchkey.deadline=1s", Some("kairos.config")),
        ("kcrypt.challenger.sthelse=1", None),
        ("kcrypt.challenger.challenger_server.x=1", Some("kcrypt.challenger.challenger_server")),
        ("kcrypt.challenger.mdns.else=1", None),
    ] {
        match over("", &format!("quiet {word} ro")) {
            Err(ConfigError::UnknownKey { place, nearest: n, .. }) => {
                assert_eq!(n.as_deref(), nearest, "{word}");
                assert_eq!(place.to_string(), "/proc/cmdline:1");
            }
            other => panic!("{word}: {other:?}"),
        }
    }
}

#[test]
fn a_value_on_the_command_line_is_as_strict_as_in_a_file() {
    for word in [
        "kcrypt.challenger.challenger_server=kms:8082",
        "kcrypt.challenger.challenger_server",
        "kcrypt.challenger.challenger_server=\"http://a b\"",
        "kcrypt.challenger.challenger_server=http://a,b",
        "kcrypt.challenger.mdns=yes",
        "kcrypt.challenger.mdns=true",
        "kcrypt.challenger=http://a",
        "kcrypt.challenger",
        "latchkey.mesh=x",
        "kcrypt.nv_index=",
        "kcrypt.nv_index=0x81000000",
        "kcrypt.challenger.certificate=MIIB",
        "kcrypt.challenger.certificate=/nowhere/ca.pem",
        "latchkey.pcrs=",
        "latchkey.pcrs=7,16",
        "latchkey.deadline=soon",
        "install.encrypted_partitions=../x",
        "kairos.config_url=ftp://a",
        "kairos.config_url=x",
        "a=\"b kcrypt.challenger.challenger_server=http://a c=\"d e\"",
        "a='b kairos.config_url=http://a'",
    ] {
        assert!(load(&[], word).is_err(), "{word}");
    }
    assert!(matches!(load(&[], &"x ".repeat(40_000)), Err(ConfigError::TooMuch { .. })));
}

/// /oem is where the running system has it; in the initramfs it is another directory.
#[test]
fn a_certificates_path_on_the_command_line_is_looked_up_as_given_and_in_every_directory() {
    let pem = "-----BEGIN CERTIFICATE-----\nMIIBszCCAVmgAwIBAgIU\n-----END CERTIFICATE-----\n";
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("ca.pem"), pem).unwrap();
    for path in [dir.path().join("ca.pem").as_path(), Path::new("/oem/ca.pem")] {
        let text = format!("kcrypt.challenger.certificate={}", path.display());
        let config = load(&[Path::new("/nonexistent"), dir.path()], &text).unwrap();
        assert_eq!(config.challenger.certificate.as_deref(), Some(pem));
    }
}

/// Its lines end up as spaces, or as `\n`, when an installer puts it there.
#[test]
fn a_certificate_may_stand_on_the_command_line_in_quotes() {
    let pem = "-----BEGIN CERTIFICATE-----\nMIIBszCCAVmg\nAwIBAgIU\n-----END CERTIFICATE-----\n";
    for line_end in [" ", "\\n"] {
        let line = [pem, pem].concat().trim_end().replace('\n', line_end);
        let config = load(&[], &format!("kcrypt.challenger.certificate=\"{line}\" quiet")).unwrap();
        assert_eq!(config.challenger.certificate.unwrap(), [pem, pem].concat());
    }
    for bad in [
        "-----BEGIN CERTIFICATE-----",
        "-----BEGIN PRIVATE KEY----- MIIB -----END PRIVATE KEY-----",
    ] {
        for quote in ["", "\""] {
            let text = format!("kcrypt.challenger.certificate={quote}{bad}{quote}");
            let error = load(&[], &text).unwrap_err();
            assert!(error.to_string().contains("kcrypt.challenger.certificate"), "{error}");
        }
    }
}
