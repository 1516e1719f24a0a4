//! What a set of cloud-config files means, and which ones are refused: protocols/kcrypt.md §10, as sentences.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use latchkey_config::{Challenger, Config, ConfigError, MapperNames, Protocol, Request};
use tempfile::TempDir;

const CERTIFICATE: &str =
    "-----BEGIN CERTIFICATE-----\nMIIBszCCAVmgAwIBAgIU\n-----END CERTIFICATE-----\n";

/// A directory with these files in it.
fn oem(files: &[(&str, &str)]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in files {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    dir
}

/// The files below these directories, with nothing on the kernel command line and no network.
fn load(dirs: &[&Path]) -> Result<Config, ConfigError> {
    latchkey_config::load(dirs, "", &mut |_: &Request<'_>| Err("no network".to_owned()))
}

fn load_files(files: &[(&str, &str)]) -> Result<Config, ConfigError> {
    load(&[oem(files).path()])
}

/// One file with a header, so that its text starts on line 2.
fn load_text(text: &str) -> Result<Config, ConfigError> {
    load_files(&[("90_custom.yaml", &format!("#cloud-config\n{text}"))])
}

fn defaults() -> Config {
    Config {
        challenger: Challenger {
            servers: vec![],
            protocol: Protocol::Auto,
            pcrs: vec![0, 7, 11],
            nv_index: 0x0150_0000,
            c_index: 0x8100_0008,
            tpm_device: None,
            certificate: None,
            mdns: false,
        },
        encrypted_partitions: vec![],
        deadline: Duration::from_secs(120),
        mapper: MapperNames::Label,
        mesh: None,
        sources: vec![],
        unfetched: vec![],
    }
}

#[test]
fn nothing_found_is_the_default() {
    assert_eq!(load(&[Path::new("/nonexistent/oem")]).unwrap(), defaults());
    assert_eq!(load_files(&[]).unwrap(), defaults());
    assert_eq!(load(&[]).unwrap(), defaults());
}

#[test]
fn a_whole_configuration() {
    let text = format!(
        "#cloud-config

hostname: \"node-{{{{ trunc 4 .MachineID }}}}\"
users:
- name: kairos
  passwd: kairos
stages:
  initramfs:
  - name: \"x\"
    commands: [\"echo {{{{ .Values }}}}\"]
install:
  auto: true
  device: auto
  encrypted_partitions:
  - COS_PERSISTENT
  grub_options:
    extra_cmdline: \"rd.neednet=1\"
kcrypt:
  challenger:
    challenger_server: \"https://kms.example.org:8443/base\"
    nv_index: \"0x1800001\"
    c_index: 0x81000009
    tpm_device: /dev/tpmrm1
    certificate: |
{}
latchkey:
  deadline: 2m
  mesh:
    network: fleet-a
    prefix: fd10::/16
    port: 51821
    interface: wg-fleet
",
        CERTIFICATE.lines().map(|line| format!("      {line}\n")).collect::<String>()
    );
    let config = load_files(&[("90_custom.yaml", &text)]).unwrap();
    assert_eq!(config.challenger.servers, ["https://kms.example.org:8443/base"]);
    assert_eq!(config.challenger.nv_index, 0x0180_0001);
    assert_eq!(config.challenger.c_index, 0x8100_0009);
    assert_eq!(config.challenger.tpm_device.as_deref(), Some("/dev/tpmrm1"));
    assert_eq!(config.challenger.certificate.as_deref(), Some(CERTIFICATE));
    assert!(!config.challenger.mdns);
    assert_eq!(config.encrypted_partitions, ["COS_PERSISTENT"]);
    assert_eq!(config.deadline, Duration::from_secs(120));
    let mesh = config.mesh.unwrap();
    assert_eq!(mesh.network, "fleet-a");
    assert_eq!(mesh.prefix.to_string(), "fd10::/16");
    assert_eq!(mesh.port, 51821);
    assert_eq!(mesh.interface, "wg-fleet");
    assert_eq!(config.sources.len(), 1);
}

#[test]
fn which_files_are_read_and_in_which_order() {
    let server = |name: &str| {
        format!("#cloud-config\nkcrypt: {{challenger: {{challenger_server: 'http://{name}'}}}}\n")
    };
    // Lexical: directories are descended where their name sorts, hidden files count, and the last one wins.
    let dir = oem(&[
        ("10_first.yaml", &server("first")),
        ("50_dir/z.yml", &server("dir")),
        ("50_dir.yaml", &server("beside")),
        (".hidden.yaml", &server("hidden")),
        ("90_last.yaml", &server("last")),
        ("99_not.yaml.bak", &server("bak")),
        ("99_not.json", &server("json")),
        ("99_no_header.yaml", "kcrypt: {challenger: {challenger_server: 'http://no-header'}}"),
    ]);
    let config = load(&[dir.path()]).unwrap();
    let names: Vec<&Path> =
        config.sources.iter().map(|path| path.strip_prefix(dir.path()).unwrap()).collect();
    let order = [".hidden.yaml", "10_first.yaml", "50_dir/z.yml", "50_dir.yaml", "90_last.yaml"];
    assert_eq!(names, order.map(Path::new));
    assert_eq!(config.challenger.servers, ["http://last"]);

    // Directories merge in the order given, not by name.
    let (first, second) = (oem(&[("99.yaml", &server("a"))]), oem(&[("00.yaml", &server("b"))]));
    let config = load(&[first.path(), Path::new("/nonexistent"), second.path()]).unwrap();
    assert_eq!(config.challenger.servers, ["http://b"]);
}

#[test]
fn the_header_stands_alone_in_one_of_the_first_ten_lines() {
    let body = "install: {encrypted_partitions: [A]}\n";
    for (text, read) in [
        (format!("#cloud-config\n{body}"), true),
        (format!("#kairos-config\n{body}"), true),
        (format!("#node-config\n{body}"), true),
        (format!("#cloud-config \t\r\n{body}"), true),
        (format!("\u{feff}#cloud-config\n{body}"), true),
        (format!("# a comment\n\n#cloud-config\n{body}"), true),
        (format!("{}#cloud-config\n{body}", "\n".repeat(9)), true),
        (format!("{}#cloud-config\n{body}", "\n".repeat(10)), false),
        (format!(" #cloud-config\n{body}"), false),
        (format!("#cloud-config: yes\n{body}"), false),
        (format!("# cloud-config\n{body}"), false),
        (format!("#Cloud-Config\n{body}"), false),
        (body.to_owned(), false),
        (String::new(), false),
    ] {
        let config = load_files(&[("a.yaml", &text)]).unwrap();
        assert_eq!(config.encrypted_partitions.len(), usize::from(read), "{text:?}");
        assert_eq!(config.sources.len(), usize::from(read), "{text:?}");
    }
}

#[test]
fn files_of_two_mebibytes_are_skipped_and_smaller_ones_are_read() {
    let text = "#cloud-config\ninstall: {encrypted_partitions: [A]}\n# ";
    let size = 2 * 1024 * 1024;
    for (len, read) in [(size, false), (size - 1, true), (size + 10, false)] {
        let text = format!("{text}{}", "x".repeat(len - text.len()));
        assert_eq!(
            load_files(&[("a.yaml", &text)]).unwrap().sources.len(),
            usize::from(read),
            "{len}"
        );
    }
}

/// Kairos does not read it, and so would silently choose another mode.
#[test]
fn a_file_that_is_too_large_is_refused_if_it_holds_settings_of_ours() {
    let fill = format!("# {}\n", "x".repeat(2 * 1024 * 1024));
    for (text, ours) in [
        ("kcrypt: {challenger: {challenger_server: 'http://a'}}", true),
        ("latchkey : {deadline: 5s}", true),
        ("config_url: http://a", true),
        ("install: {auto: true}", false),
        ("stages: {}\n# kcrypt: not", false),
        ("a:\n  kcrypt: x", false),
    ] {
        let file = format!("#cloud-config\n{text}\n{fill}");
        match load_files(&[("a.yaml", &file)]) {
            Err(ConfigError::TooLarge { line: 2, .. }) => assert!(ours, "{text}"),
            other => assert!(!ours && other.unwrap().sources.is_empty(), "{text}"),
        }
    }
}

#[test]
fn a_directory_that_anybody_may_have_made_is_not_believed() {
    use std::os::unix::fs::PermissionsExt;
    let tmp = tempfile::tempdir().unwrap();
    fs::set_permissions(tmp.path(), fs::Permissions::from_mode(0o1777)).unwrap();
    let oem = tmp.path().join("oem");
    fs::create_dir(&oem).unwrap();
    fs::write(oem.join("a.yaml"), "#cloud-config\ninstall: {encrypted_partitions: [A]}").unwrap();
    let read = |mode: u32| {
        fs::set_permissions(&oem, fs::Permissions::from_mode(mode)).unwrap();
        load(&[&oem]).unwrap().sources.len()
    };
    assert_eq!((read(0o755), read(0o775), read(0o777), read(0o700)), (1, 0, 0, 1));
    let link = tmp.path().join("link");
    std::os::unix::fs::symlink(&oem, &link).unwrap();
    assert_eq!(load(&[&link]).unwrap().sources.len(), 0);
}

#[test]
fn what_is_no_regular_file_is_passed_by_and_links_to_files_are_read() {
    let dir = oem(&[("data/real", "#cloud-config\ninstall: {encrypted_partitions: [A]}\n")]);
    std::os::unix::fs::symlink("data/real", dir.path().join("link.yaml")).unwrap();
    // A loop: links to directories are not followed, and a directory is no file whatever its name.
    std::os::unix::fs::symlink("..", dir.path().join("data/loop")).unwrap();
    std::os::unix::fs::symlink("..", dir.path().join("data/loop.yaml")).unwrap();
    fs::create_dir(dir.path().join("dir.yaml")).unwrap();
    let fifo = dir.path().join("fifo.yaml");
    assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let config = load(&[dir.path()]).unwrap();
    assert_eq!(config.encrypted_partitions, ["A"]);
    assert_eq!(config.sources, [dir.path().join("link.yaml")]);

    std::os::unix::fs::symlink("nowhere", dir.path().join("dangling.yaml")).unwrap();
    let error = load(&[dir.path()]).unwrap_err();
    assert!(
        matches!(&error, ConfigError::Unreadable { path, .. } if path.ends_with("dangling.yaml"))
    );
}

#[test]
fn later_files_merge_over_earlier_ones() {
    let merged = |texts: &[&str]| {
        let files: Vec<(String, String)> = texts
            .iter()
            .enumerate()
            .map(|(i, text)| (format!("{i}.yaml"), format!("#cloud-config\n{text}\n")))
            .collect();
        let files: Vec<(&str, &str)> =
            files.iter().map(|(name, text)| (name.as_str(), text.as_str())).collect();
        load_files(&files).unwrap()
    };

    // Mappings are merged deep: each file may say a part.
    let config = merged(&[
        "kcrypt: {challenger: {challenger_server: 'http://a', nv_index: 0x1500001}}",
        "kcrypt: {challenger: {challenger_server: 'http://b'}}",
        "kcrypt: {tpm_device: /dev/tpm0}",
    ]);
    assert_eq!(config.challenger.servers, ["http://b"]);
    assert_eq!(config.challenger.nv_index, 0x0150_0001);
    assert_eq!(config.challenger.tpm_device.as_deref(), Some("/dev/tpm0"));

    // Lists of scalars are united, also within one file.
    let config = merged(&[
        "install: {encrypted_partitions: [B, A, B]}",
        "install: {encrypted_partitions: [A, C]}",
    ]);
    assert_eq!(config.encrypted_partitions, ["B", "A", "C"]);

    let config = merged(&["latchkey: {pcrs: [11, 7]}", "latchkey: {pcrs: ['0', 7]}"]);
    assert_eq!(config.challenger.pcrs, [0, 7, 11]);
    let config = merged(&[
        "kcrypt: {challenger: {challenger_server: ['http://b', 'http://a']}}",
        "kcrypt: {challenger: {challenger_server: ['http://c', 'http://b']}}",
    ]);
    assert_eq!(config.challenger.servers, ["http://b", "http://a", "http://c"]);

    // An explicit null clears, at any level; a file that does not mention a key does not.
    let full = "kcrypt: {challenger: {challenger_server: 'http://a'}, nv_index: 0x1500001}\nlatchkey: {mesh: {network: n, prefix: 10.0.0.0/8}}";
    for (clear, server, index, mesh) in [
        ("kcrypt: {challenger: {challenger_server: null}}", false, true, true),
        ("kcrypt: {challenger: ~}", false, true, true),
        ("kcrypt:", false, false, true),
        ("latchkey: {mesh: }", true, true, false),
        ("latchkey: null", true, true, false),
        ("# nothing", true, true, true),
        ("other: null", true, true, true),
    ] {
        let config = merged(&[full, clear]);
        assert_eq!(!config.challenger.servers.is_empty(), server, "{clear}");
        assert_eq!(config.challenger.nv_index == 0x0150_0001, index, "{clear}");
        assert_eq!(config.mesh.is_some(), mesh, "{clear}");
    }
    assert!(!merged(&[full, "kcrypt:", full]).challenger.servers.is_empty());
}

#[test]
fn a_text_over_a_list_is_an_error_that_names_both_places() {
    let (text, list) = ("'http://a'", "['http://b']");
    for (first, second) in [(text, list), (list, text)] {
        let file = |value| {
            format!("#cloud-config\nkcrypt:\n  challenger:\n    challenger_server: {value}\n")
        };
        let error = load_files(&[("1.yaml", &file(first)), ("2.yaml", &file(second))]).unwrap_err();
        match &error {
            ConfigError::Merge { key, first, second, .. } => {
                assert_eq!(key, "kcrypt.challenger.challenger_server");
                assert!(first.file.ends_with("1.yaml") && first.line == 4, "{error}");
                assert!(second.file.ends_with("2.yaml") && second.line == 4, "{error}");
            }
            e => panic!("{e}"),
        }
        // A null in between starts anew.
        load_files(&[
            ("1.yaml", &file(first)),
            ("2.yaml", "#cloud-config\nkcrypt:"),
            ("3.yaml", &file(second)),
        ])
        .unwrap();
    }
}

#[test]
fn a_handle_is_read_in_every_notation_and_from_both_places() {
    for (written, expected) in [
        ("\"0x1500000\"", 0x0150_0000),
        ("0x1500001", 0x0150_0001),
        ("'0X01_50_00_02'", 0x0150_0002),
        ("0x_1500003", 0x0150_0003),
        ("22020100", 0x0150_0004),
        ("\"22020101\"", 0x0150_0005),
        ("\"22_020_102\"", 0x0150_0006),
        ("\"0124000007\"", 0x0150_0007),
        ("0o124000010", 0x0150_0008),
        ("0b1010100000000000000001001", 0x0150_0009),
        ("!!str 0x150000A", 0x0150_000a),
        ("0x01ffffff", 0x01ff_ffff),
    ] {
        for place in ["kcrypt: {nv_index: @}", "kcrypt: {challenger: {nv_index: @}}"] {
            let text = place.replace('@', written);
            assert_eq!(load_text(&text).unwrap().challenger.nv_index, expected, "{text}");
        }
    }
    for written in [
        "0x81000008",
        "0x2000000",
        "0x101500000",
        "-1",
        "+22020096",
        "0x",
        "\"\"",
        "1.5e7",
        "true",
        "0x15_",
        "1__5",
        "_22020096",
        "\"0x1500000 \"",
        "0899",
        "[0x1500000]",
        "{a: b}",
        "!hex 1500000",
        "\"0x-1500000\"",
    ] {
        for place in ["kcrypt: {nv_index: @}", "kcrypt: {challenger: {nv_index: @}}"] {
            let text = place.replace('@', written);
            assert!(load_text(&text).is_err(), "{text}");
        }
    }
    assert_eq!(load_text("kcrypt: {c_index: 0x81010002}").unwrap().challenger.c_index, 0x8101_0002);
    assert!(load_text("kcrypt: {c_index: 0x1500000}").is_err());
}

#[test]
fn two_places_may_agree_and_must_not_disagree() {
    for (key, one, same, other) in [
        ("nv_index", "0x1500001", "'22020097'", "0x1500002"),
        ("c_index", "0x81000009", "2164260873", "0x81000008"),
        ("tpm_device", "/dev/tpm0", "'/dev/tpm0'", "/dev/tpmrm0"),
    ] {
        let both =
            |new: &str| format!("kcrypt:\n  {key}: {new}\n  challenger:\n    {key}: {one}\n");
        load_text(&both(same)).unwrap();
        match load_text(&both(other)).unwrap_err() {
            ConfigError::Conflict { first_key, first, second_key, second } => {
                assert_eq!((first_key, first.line), (format!("kcrypt.challenger.{key}"), 5));
                assert_eq!((second_key, second.line), (format!("kcrypt.{key}"), 3));
            }
            e => panic!("{e}"),
        }
    }
}

#[test]
fn the_values_each_key_takes() {
    let cases: [(&str, &[&str], &[&str]); 12] = [
        (
            "kcrypt: {challenger: {challenger_server: @}}",
            &[
                "http://10.0.2.2:8082",
                "https://kms",
                "ws://kms.local:1/x/y",
                "'wss://[fd00::1]:443/'",
                "HTTPS://KMS",
                "'http://[::1]'",
                "\"\"",
                "http://a_b.example.",
                "null",
                "http://kms?x=1",
                "[http://kms]",
                "['http://a', 'https://b:8443/x']",
                "[]",
            ],
            &[
                "kms:8082",
                "10.0.2.2",
                "ftp://kms",
                "http://",
                "http:///x",
                "http://kms:",
                "http://kms:0",
                "http://kms:65536",
                "http://kms:80a",
                "http://:80",
                "'http://k ms'",
                "http://user:pw@kms",
                "'http://kms#x'",
                "http://-kms",
                "http://kms..x",
                "http://[::1",
                "http://[kms]",
                "http://::1:80",
                "12",
                "true",
                "['']",
                "[kms]",
                "[[http://kms]]",
                "[http://kms, 5]",
                "{a: b}",
                "\"http://kms\\n\"",
                "'http://[::1]80'",
            ],
        ),
        (
            "kcrypt: {tpm_device: @}",
            &[
                "/dev/tpmrm0",
                "/run/swtpm.sock",
                "device:/dev/tpmrm0",
                "'swtpm:host=127.0.0.1,port=2321'",
                "''",
            ],
            &["tpmrm0", "./sock", "5", "true", "[/dev/tpm0]", "\"/dev/tpm0\\n\"", "'a b:c'"],
        ),
        (
            "install: {encrypted_partitions: @}",
            &["[]", "[COS_PERSISTENT, COS_OEM]", "[a.b-c_d]", "null"],
            &[
                "COS_PERSISTENT",
                "[1]",
                "[true]",
                "[[A]]",
                "[{A: b}]",
                "[null]",
                "['']",
                "['a/b']",
                "['..']",
                "{A: b}",
                "['0123456789012345678901234567890123456789abcdefgh']",
            ],
        ),
        (
            "latchkey: {protocol: @}",
            &["auto", "v1", "v2", "'v2'", "null"],
            &["2", "V2", "v3", "''", "[v1]", "true"],
        ),
        (
            "latchkey: {pcrs: @}",
            &["[0, 7, 11]", "['0', '15']", "[7, 7]", "null"],
            &[
                "[]", "[16]", "[-1]", "[+1]", "[0x7]", "[a]", "7", "'7'", "[[7]]", "{7: a}",
                "[null]",
            ],
        ),
        (
            "latchkey: {mapper: @}",
            &["label", "partition", "null"],
            &["Label", "''", "[label]", "true"],
        ),
        (
            "latchkey: {deadline: @}",
            &["120s", "2m", "90", "'90'", "1m30s", "1h", "1500ms", "1s", "24h"],
            &[
                "0",
                "0s",
                "500ms",
                "24h1s",
                "2d",
                "s",
                "1.5s",
                "-1s",
                "''",
                "soon",
                "[1s]",
                "99999999999999999999s",
                "18446744073709551615h",
                "'2m '",
            ],
        ),
        (
            "latchkey: {mesh: {network: @, prefix: 10.0.0.0/8}}",
            &["fleet-a", "'1'", "a.b_c"],
            &[
                "1",
                "true",
                "''",
                "a/b",
                "'a b'",
                "null",
                "[a]",
                "0123456789012345678901234567890123456789012345678901234567890123x",
            ],
        ),
        (
            "latchkey: {mesh: {network: n, prefix: @}}",
            &["10.0.0.0/8", "'fd10::/16'", "192.168.7.0/30", "fc00::/7"],
            &[
                "10.1.0.0/8",
                "fd10::1/16",
                "0.0.0.0/0",
                "'::/0'",
                "10.0.0.0/31",
                "10.0.0.0",
                "fleet",
                "8",
                "null",
            ],
        ),
        (
            "latchkey: {mesh: {network: n, prefix: 10.0.0.0/8, port: @}}",
            &["1", "51820", "'65535'", "null"],
            &["0", "65536", "-1", "+1", "0x10", "051", "wg", "''", "1.0", "[1]"],
        ),
        (
            "latchkey: {mesh: {network: n, prefix: 10.0.0.0/8, interface: @}}",
            &["wg0", "wg-latchkey", "wg.15-chars-aaa", "null"],
            &["wg-16-characters", "wg/0", "..", "''", "'w g'", "0", "wg:0"],
        ),
        (
            "kcrypt: {challenger: {challenger_server: 'http://kms.local:8082/80', mdns: @}}",
            &["true", "false", "'true'", "null"],
            &["yes", "1", "on", "''", "[true]"],
        ),
    ];
    for (text, good, bad) in cases {
        for value in good {
            let text = text.replace('@', value);
            if let Err(e) = load_text(&text) {
                panic!("{text}: {e}");
            }
        }
        for value in bad {
            let text = text.replace('@', value);
            assert!(load_text(&text).is_err(), "{text}");
        }
    }
}

#[test]
fn durations_mean_what_they_say() {
    for (written, seconds) in [("90", 90), ("120s", 120), ("2m", 120), ("1m30s", 90), ("1h", 3600)]
    {
        let config = load_text(&format!("latchkey: {{deadline: {written}}}")).unwrap();
        assert_eq!(config.deadline, Duration::from_secs(seconds), "{written}");
    }
}

#[test]
fn multicast_dns_needs_a_server_whose_name_ends_in_local() {
    let text =
        |server| format!("kcrypt: {{challenger: {{mdns: true, challenger_server: '{server}'}}}}");
    assert!(load_text(&text("http://kms.local:8082")).unwrap().challenger.mdns);
    assert!(load_text(&text("http://KMS.LOCAL.")).unwrap().challenger.mdns);
    for server in ["http://kms.example", "http://10.0.0.1", "http://local.example/x.local", ""] {
        assert!(load_text(&text(server)).is_err(), "{server}");
    }
    assert!(matches!(
        load_text("kcrypt: {challenger: {mdns: true}}"),
        Err(ConfigError::Missing { .. })
    ));
}

#[test]
fn a_mesh_has_a_network_and_a_prefix_and_defaults_for_the_rest() {
    let mesh =
        load_text("latchkey: {mesh: {network: n, prefix: fd10::/16}}").unwrap().mesh.unwrap();
    assert_eq!((mesh.port, mesh.interface.as_str()), (51820, "wg-latchkey"));
    for (text, missing) in [
        ("latchkey: {mesh: {}}", "latchkey.mesh.network"),
        ("latchkey: {mesh: {prefix: fd10::/16}}", "latchkey.mesh.network"),
        ("latchkey: {mesh: {network: n}}", "latchkey.mesh.prefix"),
    ] {
        let error = load_text(text).unwrap_err();
        assert!(
            matches!(&error, ConfigError::Missing { missing: m, place, .. } if *m == missing && place.line == 2)
        );
    }
    assert_eq!(load_text("latchkey: {deadline: 5s}").unwrap().mesh, None);
}

#[test]
fn a_typing_error_in_a_key_is_told_with_line_and_the_key_that_was_meant() {
    for (text, line, key, nearest) in [
        (
            "kcrypt:\n  challenger:\n    challenger_sever: x",
            4,
            "kcrypt.challenger.challenger_sever",
            Some("kcrypt.challenger.challenger_server"),
        ),
        (
            "kcrypt:\n  challenger:\n    server: x",
            4,
            "kcrypt.challenger.server",
            Some("kcrypt.challenger.challenger_server"),
        ),
        (
            "kcrypt: {challenger: {TPM-Device: x}}",
            2,
            "kcrypt.challenger.TPM-Device",
            Some("kcrypt.challenger.tpm_device"),
        ),
        ("kcrypt: {challenger: {? [a] : x}}", 2, "kcrypt.challenger.?", None),
        ("kcrypt: {chalenger: {}}", 2, "kcrypt.chalenger", Some("kcrypt.challenger")),
        ("kcrypt: {nvindex: 1}", 2, "kcrypt.nvindex", Some("kcrypt.nv_index")),
        ("latchkey: {dead_line: 1s}", 2, "latchkey.dead_line", Some("latchkey.deadline")),
        ("latchkey: {mesh: {prefx: a}}", 2, "latchkey.mesh.prefx", Some("latchkey.mesh.prefix")),
        ("latchkey: {colour: red}", 2, "latchkey.colour", None),
        (
            "install: {encrypted_partition: [A]}",
            2,
            "install.encrypted_partition",
            Some("install.encrypted_partitions"),
        ),
        (
            "install: {encrypted-partitions: [A]}",
            2,
            "install.encrypted-partitions",
            Some("install.encrypted_partitions"),
        ),
        ("a: 1\nkcrytp: {challenger: {}}", 3, "kcrytp", Some("kcrypt")),
        ("latch-key: {deadline: 1s}", 2, "latch-key", Some("latchkey")),
        ("Kcrypt: {challenger: {}}", 2, "Kcrypt", Some("kcrypt")),
    ] {
        match load_text(text) {
            Err(ConfigError::UnknownKey { place, key: k, nearest: n }) => {
                assert_eq!((place.line, k.as_str()), (line, key), "{text}");
                assert_eq!(n.as_deref(), nearest, "{text}");
                assert!(place.file.ends_with("90_custom.yaml"));
            }
            other => panic!("{text}: {other:?}"),
        }
    }
}

#[test]
fn what_touches_us_and_is_not_right_is_refused() {
    for (text, line) in [
        ("kcrypt: on", 2),
        ("kcrypt: [challenger]", 2),
        ("kcrypt:\n  challenger: http://kms", 3),
        ("install: yes", 2),
        ("latchkey: 5s", 2),
        ("a: b\nlatchkey:\n  mesh: true", 4),
        ("just some text", 2),
        ("- a\n- list", 2),
    ] {
        match load_text(text) {
            Err(ConfigError::WrongType { place, .. }) => assert_eq!(place.line, line, "{text}"),
            other => panic!("{text}: {other:?}"),
        }
    }
    for (text, line) in [
        ("kcrypt: {nv_index: 0x1500001}\nkcrypt: {}", 3),
        ("kcrypt:\n  nv_index: 0x1500001\n  nv_index: 0x1500001", 4),
    ] {
        match load_text(text) {
            Err(ConfigError::Duplicate { place, .. }) => assert_eq!(place.line, line, "{text}"),
            other => panic!("{text}: {other:?}"),
        }
    }
    assert!(matches!(
        load_text("a: b\n---\nlatchkey: {deadline: 5s}"),
        Err(ConfigError::SecondDocument { place, .. }) if place.line == 4
    ));
    // A fault in an early file is a fault, also where a later file says it right.
    assert!(
        load_files(&[
            ("1.yaml", "#cloud-config\nlatchkey: {deadline: soon}"),
            ("2.yaml", "#cloud-config\nlatchkey: {deadline: 5s}"),
        ])
        .is_err()
    );
}

#[test]
fn what_is_not_yaml_is_refused_with_file_and_line() {
    for (text, line) in [
        ("a: b\n  c: d\n e", 3),
        ("a: [1, 2\nb: c", 3),
        ("a: 'unclosed", 2),
        ("a: {{ x }} y\n", 2),
        ("a: *nowhere", 2),
        ("a: \"\\q\"", 2),
    ] {
        match load_text(text) {
            Err(ConfigError::Syntax { path, line: l, .. }) => {
                assert!(l == line || l == line + 1, "{text:?}: {l}");
                assert!(path.ends_with("90_custom.yaml"));
            }
            other => panic!("{text:?}: {other:?}"),
        }
    }
    let dir = oem(&[]);
    fs::write(dir.path().join("a.yaml"), b"#cloud-config\na: b\nc: \xff\n").unwrap();
    assert!(matches!(load(&[dir.path()]), Err(ConfigError::Syntax { line: 3, .. })));
    // Without the header it is not ours to judge.
    fs::write(dir.path().join("a.yaml"), b"\xff\xfe: [").unwrap();
    load(&[dir.path()]).unwrap();
}

#[test]
fn a_file_that_cannot_be_read_is_refused() {
    // Root may read everything, so the file is one that nobody can: a read of a process' own memory at 0 fails.
    let dir = oem(&[]);
    std::os::unix::fs::symlink("/proc/self/mem", dir.path().join("a.yaml")).unwrap();
    assert!(matches!(load(&[dir.path()]), Err(ConfigError::Unreadable { .. })));
    // A file where the directory should be.
    assert!(matches!(load(&[Path::new("/proc/self/mem")]), Err(ConfigError::Unreadable { .. })));
}

#[test]
fn other_peoples_parts_may_be_any_yaml() {
    let ours = "kcrypt: {nv_index: 0x1500001}\n";
    let deep = format!("deep: {}{}", "[".repeat(200), "]".repeat(200));
    let nested: String = (0..300).map(|i| format!("{}k:\n", " ".repeat(i))).collect();
    let bomb: String = (1..30).fold("b0: &b0 [x, x]\n".to_owned(), |text, i| {
        format!("{text}b{i}: &b{i} [{}]\n", format!("*b{},", i - 1).repeat(9))
    });
    let many: String = (0..20_000).map(|i| format!("k{i}: &a{i} [1, 2, {{a: b}}]\n")).collect();
    for theirs in [
        "a: &a !custom {x: !!binary aGVsbG8=}\nb: *a\nc: {<<: *a, y: 1}",
        "a: {{ .Values.x }}",
        "? [complex, key]\n: 1\n? {a: b}\n: 2",
        "dup: 1\ndup: 2\n1: a\ntrue: b\nnull: c",
        "stages: {initramfs: [{name: x, files: [{path: /a, content: \"a\\nb\"}]}]}",
        "install: {auto: true, device: [a], grub_options: 7, 5: x, ? [a] : b}",
        "kcrypt: {something_of_theirs: {a: [b]}, 7: 8}",
        "crypt: no mapping here",
        "self: &s [*s]",
        "a: |\n  kcrypt:\n    challenger: nonsense\n",
        "x: y\n...\n---\nsecond: document\n--- \n- third",
        "%YAML 1.2\n---\na: b",
        "a: 'latchkey: 7'",
        "list: [{latchkey: 7}, {kcrypt: {challenger: 3}}]",
        &deep,
        &nested,
        &bomb,
        &many,
    ] {
        // Their part alone, and in a file before ours.
        let first = format!("#cloud-config\n{theirs}\n");
        let second = format!("#cloud-config\n{ours}");
        match load_files(&[("1.yaml", &first), ("2.yaml", &second)]) {
            Ok(config) => assert_eq!(config.challenger.nv_index, 0x0150_0001),
            Err(e) => panic!("{}: {e}", theirs.get(..80).unwrap_or(theirs)),
        }
    }
}

#[test]
fn anchors_aliases_and_merge_keys_work_in_our_part() {
    let config = load_text(
        "base: &base {challenger_server: 'http://a', mdns: false}
more: &more {challenger_server: 'http://never', c_index: 0x81000009}
index: &index '0x1500001'
kcrypt:
  nv_index: *index
  challenger:
    <<: [*base, *more]
    mdns: &flag false
",
    )
    .unwrap();
    assert_eq!(config.challenger.servers, ["http://a"]);
    assert_eq!(config.challenger.c_index, 0x8100_0009);
    assert_eq!(config.challenger.nv_index, 0x0150_0001);

    // At the top, too; and what a mapping says itself wins wherever it stands.
    let config = load_text(
        "base: &base {latchkey: {deadline: 7s}, kcrypt: {nv_index: 0x1500009}}\n<<: *base\nlatchkey: {deadline: 8s}\n",
    )
    .unwrap();
    assert_eq!(config.deadline, Duration::from_secs(8));
    assert_eq!(config.challenger.nv_index, 0x0150_0009);
}

#[test]
fn our_part_is_bounded() {
    let bomb: String = (1..30).fold("b0: &b0 {x: y}\n".to_owned(), |text, i| {
        format!("{text}b{i}: &b{i} {{<<: [{}]}}\n", format!("*b{},", i - 1).repeat(9))
    });
    let wide: String = (0..20_000).map(|i| format!("  k{i}: v\n")).collect();
    let lines: String = (0..40).map(|i| format!("{}k:\n", " ".repeat(i))).collect();
    for text in [
        format!("{bomb}latchkey: {{<<: *b29}}"),
        format!("{bomb}latchkey: *b29"),
        format!("latchkey:\n{wide}"),
        format!("install:\n{wide}"),
        "latchkey: &l {mesh: *l}".to_owned(),
        "latchkey: &l {<<: *l}".to_owned(),
        format!("{lines}{}&deep {{a: b}}\nlatchkey: *deep", " ".repeat(40)),
        format!(
            "install: {{encrypted_partitions: [{}]}}",
            (0..65).map(|i| format!("P{i},")).collect::<String>()
        ),
        format!("kcrypt: {{tpm_device: /{}}}", "x".repeat(5000)),
    ] {
        assert!(load_text(&text).is_err(), "{}", text.get(..80).unwrap_or(&text));
    }
}

#[test]
fn a_certificate_is_text_or_the_path_of_a_file() {
    let bundle = format!("# our own\n{CERTIFICATE}\n{CERTIFICATE}");
    let dir = oem(&[("certs/ca.pem", CERTIFICATE), ("bundle.pem", &bundle), ("empty.pem", "")]);
    let key = CERTIFICATE.replace("CERTIFICATE", "PRIVATE KEY");
    fs::write(dir.path().join("key.pem"), &key).unwrap();
    fs::write(dir.path().join("big.pem"), "x".repeat(1024 * 1024 + 1)).unwrap();
    fs::write(dir.path().join("cut.pem"), &CERTIFICATE[..60]).unwrap();
    let load_value = |value: &str| {
        let text = format!("#cloud-config\nkcrypt: {{challenger: {{certificate: {value}}}}}\n");
        fs::write(dir.path().join("90.yaml"), text).unwrap();
        load(&[dir.path()]).map(|config| config.challenger.certificate)
    };
    let at = |name: &str| dir.path().join(name).display().to_string();
    let quoted = |text: &str| format!("{text:?}");

    assert_eq!(load_value(&at("certs/ca.pem")).unwrap().as_deref(), Some(CERTIFICATE));
    assert_eq!(load_value(&at("bundle.pem")).unwrap().as_deref(), Some(bundle.as_str()));
    assert_eq!(load_value(&quoted(CERTIFICATE)).unwrap().as_deref(), Some(CERTIFICATE));
    assert_eq!(load_value("''").unwrap(), None);
    // As the running system names it, found where the initramfs has it.
    assert_eq!(load_value("/oem/certs/ca.pem").unwrap().as_deref(), Some(CERTIFICATE));

    for bad in ["empty.pem", "key.pem", "big.pem", "cut.pem", "certs", "nowhere.pem", "90.yaml"] {
        assert!(load_value(&at(bad)).is_err(), "{bad}");
    }
    for bad in
        ["ca.pem", "MIIBszCCAVmgAwIBAgIU", "/oem/nowhere.pem", "5", "true", "[a]", "/dev/zero"]
    {
        assert!(load_value(bad).is_err(), "{bad}");
    }
    let two = format!("{CERTIFICATE}{key}");
    for bad in [
        key.as_str(),
        &two,
        &CERTIFICATE[..60],
        &CERTIFICATE.replace("MII", "M#I"),
        &CERTIFICATE.replace('\n', " "),
    ] {
        assert!(load_value(&quoted(bad)).is_err(), "{bad}");
    }
}

/// Cut at every byte, and with bytes changed, a file is read or refused; nothing else happens.
#[test]
fn damaged_files_are_read_or_refused() {
    let text = "#cloud-config
a: &a {b: [1, 'two', \"three\\n\"], ? c : |
    block
  }
kcrypt:
  <<: *a
  nv_index: !!str 0x1500001
  challenger: {challenger_server: 'http://kms:8082', mdns: false, certificate: /oem/ca.pem}
latchkey: &l
  deadline: 1m30s
  mesh: {network: fleet-a, prefix: fd10::/16, port: 51820}
install: {encrypted_partitions: [A, *l, B]}
--- >-
 folded
";
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("a.yaml");
    let mut outcomes = [0, 0];
    let mut read = |bytes: &[u8]| {
        fs::write(&file, bytes).unwrap();
        let outcome = load(&[dir.path()]);
        outcomes[usize::from(outcome.is_ok())] += 1;
    };
    for end in 0..text.len() {
        read(&text.as_bytes()[..end]);
    }
    let special = b"\0\t\n\r !\"#%&'*,-:<>?@[]{}|~\xff\xc3\xe2";
    for (index, at) in
        (0..text.len()).flat_map(|at| (0..4).map(move |turn| (at * 7 + turn * 5, at)))
    {
        let mut bytes = text.as_bytes().to_vec();
        bytes[at] = special[index % special.len()];
        read(&bytes);
        bytes.insert(at, special[(index + 3) % special.len()]);
        read(&bytes);
    }
    assert!(outcomes.iter().all(|count| *count > 100), "{outcomes:?}");
}

#[test]
fn a_message_names_file_line_key_and_remedy() {
    let dir = oem(&[(
        "90_custom.yaml",
        "#cloud-config\nkcrypt:\n  challenger:\n    challenger_sever: http://kms\n",
    )]);
    let file: PathBuf = dir.path().join("90_custom.yaml");
    assert_eq!(
        load(&[dir.path()]).unwrap_err().to_string(),
        format!(
            "{}:4: unknown key kcrypt.challenger.challenger_sever; did you mean kcrypt.challenger.challenger_server?",
            file.display()
        )
    );
}

#[test]
fn the_example_of_the_documentation_is_read() {
    let document = include_str!("../../../docs/configuration.md");
    let (_, rest) = document.split_once("```yaml\n").unwrap();
    let (example, _) = rest.split_once("```").unwrap();
    let dir = oem(&[("90.yaml", example), ("kms-ca.pem", CERTIFICATE)]);
    let config = load(&[dir.path()]).unwrap();
    assert_eq!(config.challenger.servers, ["https://kms.example.org:8443"]);
    assert_eq!(config.challenger.certificate.as_deref(), Some(CERTIFICATE));
    assert_eq!(config.encrypted_partitions, ["COS_PERSISTENT"]);
}
