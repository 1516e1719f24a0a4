//! What may stand below `latchkey.mesh`, and what is refused: docs/configuration.md, as sentences.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail as tests do")]

use std::fs;
use std::path::Path;

use latchkey_config::mesh::{
    Advertise, Keepalive, Login, Membership, Mesh, Pem, Registry, Secret, Server, Signatures, Tls,
};
use latchkey_config::{ConfigError, Local};
use tempfile::TempDir;

const CERTIFICATE: &str =
    "-----BEGIN CERTIFICATE-----\nMIIBszCCAVmgAwIBAgIU\n-----END CERTIFICATE-----\n";
const KEY: &str = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIE\n-----END PRIVATE KEY-----\n";
const CREDENTIALS: &str = "-----BEGIN NATS USER JWT-----
eyJ0eXAiOiJKV1QiLCJhbGciOiJlZDI1NTE5LW5rZXkifQ.e30.c2ln
------END NATS USER JWT------

************************* IMPORTANT *************************
NKEY Seed printed below can be used to sign and prove identity.

-----BEGIN USER NKEY SEED-----
SUACORRECTHORSEBATTERY
------END USER NKEY SEED------
";
/// What no error and no `{:?}` may show.
const SECRET: &str = "correct-horse-battery";

fn oem(files: &[(&str, &str)]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in files {
        fs::write(dir.path().join(name), text).unwrap();
    }
    dir
}

fn read(dir: &Path, cmdline: &str) -> Result<Option<Membership>, ConfigError> {
    let local = Local::read(&[dir], cmdline)?;
    let shown = format!("{local:?}");
    assert!(!shown.contains(SECRET), "{shown}");
    local.membership()
}

/// One file, whose mesh has a network and a prefix on lines 4 and 5; `text` begins on line 6.
fn mesh(text: &str) -> Result<Membership, ConfigError> {
    mesh_over(&[text], "")
}

/// Several files in their order, and a command line.
fn mesh_over(texts: &[&str], cmdline: &str) -> Result<Membership, ConfigError> {
    let dir = tempfile::tempdir().unwrap();
    for (index, text) in texts.iter().enumerate() {
        let text = text.replace('\n', "\n    ");
        let file = format!(
            "#cloud-config\nlatchkey:\n  mesh:\n    network: fleet-a\n    prefix: fd10::/16\n    {text}\n"
        );
        fs::write(dir.path().join(format!("{index}.yaml")), file).unwrap();
    }
    read(dir.path(), cmdline).map(Option::unwrap)
}

fn with(change: impl FnOnce(&mut Membership)) -> Membership {
    let mut mesh = Membership::from(Mesh {
        network: "fleet-a".to_owned(),
        prefix: "fd10::/16".parse().unwrap(),
        port: 51820,
        interface: "wg-latchkey".to_owned(),
    });
    change(&mut mesh);
    mesh
}

fn server(host: &str, port: u16, tls: bool) -> Server {
    Server { host: host.to_owned(), port, tls }
}

fn registry(text: &str) -> Registry {
    mesh(text).unwrap_or_else(|error| panic!("{text}: {error}")).registry.unwrap()
}

#[test]
fn a_network_and_a_prefix_are_enough() {
    assert_eq!(mesh("").unwrap(), with(|_| {}));
}

#[test]
fn a_whole_mesh() {
    let text = "name: Gateway in Paris
port: 51821
interface: wg-fleet
registry: [tls://nats-1.example.org, 'nats://[fd00::5]:4333']
credentials: /etc/fleet.creds
bucket: Fleet_A-1
registry_ca: /etc/ca.pem
registry_certificate: /etc/node.pem
registry_key: /etc/node.key
advertise_address: paris.example.org
keepalive: 15
mtu: 1380
signatures: require
metrics: '[::1]:9586'";
    assert_eq!(
        mesh(text).unwrap(),
        Membership {
            mesh: Mesh {
                network: "fleet-a".to_owned(),
                prefix: "fd10::/16".parse().unwrap(),
                port: 51821,
                interface: "wg-fleet".to_owned(),
            },
            name: Some("Gateway in Paris".to_owned()),
            registry: Some(Registry {
                servers: vec![
                    server("nats-1.example.org", 4222, true),
                    server("fd00::5", 4333, false)
                ],
                bucket: "Fleet_A-1".to_owned(),
                login: Login::CredentialsFile("/etc/fleet.creds".into()),
                tls: Tls {
                    ca: Some(Pem::File("/etc/ca.pem".into())),
                    certificate: Some(Pem::File("/etc/node.pem".into())),
                    key: Some(Pem::File("/etc/node.key".into())),
                },
            }),
            advertise: Advertise::Name("paris.example.org".to_owned()),
            keepalive: Keepalive::Every(15),
            mtu: Some(1380),
            signatures: Signatures::Require,
            metrics: Some("[::1]:9586".parse().unwrap()),
        }
    );
}

#[test]
fn the_values_each_key_takes() {
    let long_name = "n".repeat(128);
    let long_bucket = "b".repeat(252);
    let [longer_name, longer_bucket] = [&long_name, &long_bucket].map(|name| format!("{name}x"));
    let cases: [(&str, &[&str], &[&str]); 13] = [
        (
            "name: @",
            &["node-17", "12", "'Küche, links'", "''", "null", &long_name],
            &["\"a\\nb\"", "\"\\e[31m\"", "[a]", &longer_name],
        ),
        (
            "registry: @",
            &[
                "nats://10.0.0.5:4222",
                "tls://nats.example.org",
                "NATS://nats/",
                "'nats://nats:'",
                "'tls://[fd00::1]'",
                "'nats://user:p%40ss%2Fword@nats'",
                "'nats://user:@nats'",
                "nats://token@nats",
                "nats://@nats",
                "'nats://a:b:c@nats'",
                "[nats://a, nats://b]",
                "['nats://u:p@a', nats://b, 'nats://u:p@c']",
                "''",
                "[]",
                "null",
            ],
            &[
                "nats",
                "nats:4222",
                "nats://",
                "nats://:4222",
                "'nats://user:pw@'",
                "ws://nats",
                "wss://nats:443",
                "http://nats",
                "nats://nats:0",
                "nats://nats:65536",
                "nats://nats:+1",
                "nats://nats/path",
                "'nats://nats?tls=1'",
                "'nats://nats#x'",
                "'nats://na ts'",
                "\"nats://nats\\n\"",
                "'nats://u:p%4@nats'",
                "'nats://u:p%zz@nats'",
                "'nats://u:p%ff@nats'",
                "'nats://u:p/w@nats'",
                "nats://-nats",
                "nats://[::1",
                "nats://::1",
                "nats://a,nats://b",
                "5",
                "true",
                "['']",
                "[[nats://a]]",
                "{a: b}",
                "['nats://u:p@a', 'nats://u:q@b']",
                "['nats://u:p@a', nats://token@b]",
            ],
        ),
        (
            "registry: nats://nats\ncredentials: @",
            &["/oem/fleet.creds", "' /a b '", "''", "null"],
            &["fleet.creds", "./fleet.creds", "~/fleet.creds", "SUAB", "5", "[/a]", "\"/a\\nb\""],
        ),
        (
            "registry: nats://nats\nbucket: @",
            &["ikto-mesh", "A_1", "7", "null", &long_bucket],
            &["a.b", "'a b'", "a/b", "ü", "[a]", "'*'", "'>'", "''", &longer_bucket],
        ),
        (
            "registry: nats://nats\nregistry_ca: @",
            &["/etc/ssl/ca.pem", "''", "null"],
            &["ca.pem", "MIIB", "5", "[a]"],
        ),
        (
            "registry: nats://nats\nregistry_key: /k\nregistry_certificate: @",
            &["/etc/ssl/node.pem"],
            &["node.pem", "''", "null"],
        ),
        (
            "registry: nats://nats\nregistry_certificate: /c\nregistry_key: @",
            &["/etc/ssl/node.key"],
            &["node.key", "''", "null"],
        ),
        (
            "advertise_address: @",
            &[
                "192.0.2.7",
                "10.0.0.1",
                "2001:db8::1",
                "'fd00::1'",
                "node.example.org",
                "node",
                "node.example.org.",
                "null",
            ],
            &[
                "0.0.0.0",
                "'::'",
                "127.0.0.1",
                "127.1.2.3",
                "'::1'",
                "'::ffff:127.0.0.1'",
                "224.0.0.1",
                "'ff02::1'",
                "255.255.255.255",
                "fe80::1",
                "fd10:1::1",
                "192.0.2.7:51820",
                "'[2001:db8::1]'",
                "'[2001:db8::1]:51820'",
                "node:51820",
                "10.0.0.256",
                "1.2.3",
                "localhost",
                "me.localhost.",
                "-a",
                "''",
                "5",
                "[192.0.2.7]",
            ],
        ),
        (
            "advertise_interface: @",
            &["eth0", "br-lan", "null"],
            &["wg-latchkey", "sixteen-letters-", "a/b", "''", "[eth0]"],
        ),
        (
            "keepalive: @",
            &["auto", "off", "0", "25", "'25'", "65535", "null"],
            &["65536", "-1", "25s", "on", "true", "''", "1.5", "025", "[25]"],
        ),
        (
            "mtu: @",
            &["1280", "1420", "'9000'", "65455", "null"],
            &["1279", "65456", "0", "auto", "''", "0x580", "[1420]"],
        ),
        (
            "signatures: @",
            &["require", "prefer", "ignore", "null"],
            &["Require", "required", "true", "''", "[require]"],
        ),
        (
            "metrics: @",
            &["127.0.0.1:9586", "'[::]:9586'", "0.0.0.0:1", "null"],
            &[
                "9586",
                "':9586'",
                "127.0.0.1",
                "127.0.0.1:0",
                "localhost:9586",
                "::1:9586",
                "''",
                "[a]",
            ],
        ),
    ];
    for (text, good, bad) in cases {
        for value in good {
            let text = text.replace('@', value);
            if let Err(error) = mesh(&text) {
                panic!("{text}: {error}");
            }
        }
        for value in bad {
            let text = text.replace('@', value);
            let error = mesh(&text).unwrap_err();
            // Refused for what it says, not for how it is written.
            assert!(!matches!(error, ConfigError::Syntax { .. }), "{text}: {error}");
        }
    }
}

#[test]
fn an_error_names_file_line_key_and_what_to_write() {
    for (text, line, key, told) in [
        ("registry: ws://nats:443", 6, "registry", "WebSocket (ws://, wss://) is not supported"),
        ("port: 1\nregistry: nats.example.org", 7, "registry", "write nats://HOST:4222"),
        ("bucket: a.b", 6, "bucket", "letters, digits, `_`, `-`"),
        ("keepalive: 25s", 6, "keepalive", "neither auto nor off nor seconds"),
        ("mtu: 9", 6, "mtu", "1280 to 65455"),
        ("advertise_address: fd10::7", 6, "advertise_address", "inside the mesh fd10::/16"),
        ("advertise_address: 127.0.0.1", 6, "advertise_address", "a loopback address"),
        ("advertise_interface: wg-latchkey", 6, "advertise_interface", "the mesh's own device"),
        ("metrics: ':9586'", 6, "metrics", "127.0.0.1:9586"),
    ] {
        let error = mesh(text).unwrap_err();
        let ConfigError::Invalid { place, key: found, why } = &error else { panic!("{error}") };
        assert_eq!(
            (place.line, found.as_str()),
            (line, &*format!("latchkey.mesh.{key}")),
            "{text}"
        );
        assert!(why.contains(told), "{text}: {why}");
    }
    for (text, line, key, missing) in [
        ("credentials: /c", 6, "credentials", "registry"),
        ("port: 1\nbucket: b", 7, "bucket", "registry"),
        ("registry_ca: /c", 6, "registry_ca", "registry"),
        ("registry: nats://n\nregistry_certificate: /c", 7, "registry_certificate", "registry_key"),
        ("registry: nats://n\nregistry_key: /c", 7, "registry_key", "registry_certificate"),
    ] {
        let error = mesh(text).unwrap_err();
        let ConfigError::Missing { place, key: found, missing: needed } = &error else {
            panic!("{error}")
        };
        assert_eq!(
            (place.line, found.as_str()),
            (line, &*format!("latchkey.mesh.{key}")),
            "{text}"
        );
        assert_eq!(*needed, format!("latchkey.mesh.{missing}"), "{text}");
    }
    for (text, lines) in [
        ("advertise_address: 192.0.2.7\nadvertise_interface: eth0", [6, 7]),
        ("credentials: /c\nregistry: nats://u:p@n", [7, 6]),
        ("registry: nats://token@n\ncredentials: /c", [6, 7]),
    ] {
        let error = mesh(text).unwrap_err();
        let ConfigError::Conflict { first, second, .. } = &error else { panic!("{error}") };
        assert_eq!([first.line, second.line], lines, "{text}");
    }
}

#[test]
fn a_key_that_nearly_is_one_is_told_with_the_key_that_was_meant() {
    for (written, nearest) in [
        ("registy: nats://n", Some("registry")),
        ("keep_alive: 25", Some("keepalive")),
        ("advertise-address: 192.0.2.7", Some("advertise_address")),
        ("advertise: 192.0.2.7", Some("advertise_address")),
        ("signature: require", Some("signatures")),
        ("nats_url: nats://n", Some("registry")),
        ("nats_creds: /c", Some("credentials")),
        ("nats_kv: b", Some("bucket")),
        ("wg_port: 1", Some("port")),
        ("wg_dev_name: wg0", Some("interface")),
        ("mesh_cidr: 10.0.0.0/8", Some("prefix")),
        ("colour: red", None),
    ] {
        let error = mesh(written).unwrap_err();
        let ConfigError::UnknownKey { place, nearest: found, .. } = &error else {
            panic!("{error}")
        };
        let nearest = nearest.map(|key| format!("latchkey.mesh.{key}"));
        assert_eq!((place.line, found.as_ref()), (6, nearest.as_ref()), "{written}");
    }
}

#[test]
fn who_logs_in_and_how() {
    let password = |user: &str, password| Login::Password {
        user: user.to_owned(),
        password: Secret::new(password),
    };
    for (text, login) in [
        ("registry: nats://n", Login::None),
        ("registry: nats://@n", Login::None),
        ("registry: 'nats://edge:p%40ss%2F%25@n'", password("edge", "p@ss/%")),
        ("registry: 'nats://edge:a:b@n'", password("edge", "a:b")),
        ("registry: 'nats://edge:@n'", password("edge", "")),
        ("registry: 'nats://a@b:p@n'", password("a@b", "p")),
        ("registry: 'nats://%74oken@n'", Login::Token(Secret::new("token"))),
        ("registry: [nats://a, 'nats://u:p@b']", password("u", "p")),
        ("registry: nats://n\ncredentials: /a", Login::CredentialsFile("/a".into())),
        ("registry: nats://@n\ncredentials: /a", Login::CredentialsFile("/a".into())),
    ] {
        assert_eq!(registry(text).login, login, "{text}");
    }
}

#[test]
fn credentials_and_certificates_may_be_texts() {
    let block = |key: &str, text: &str| {
        format!("registry: nats://n\n{key}: |\n  {}", text.trim_end().replace('\n', "\n  "))
    };
    assert_eq!(
        registry(&block("credentials", CREDENTIALS)).login,
        Login::Credentials(Secret::new(CREDENTIALS))
    );
    // YAML takes the last line's end away, and NATS' libraries want it.
    assert_eq!(
        registry(&block("credentials", CREDENTIALS).replace(": |", ": |-")).login,
        Login::Credentials(Secret::new(CREDENTIALS))
    );
    assert_eq!(
        registry(&block("registry_ca", CERTIFICATE)).tls.ca,
        Some(Pem::Text(Secret::new(CERTIFICATE)))
    );
    let both = block("registry_certificate", CERTIFICATE) + "\nregistry_key: /k";
    assert_eq!(registry(&both).tls.certificate, Some(Pem::Text(Secret::new(CERTIFICATE))));
    let both = block("registry_key", KEY) + "\nregistry_certificate: /c";
    assert_eq!(registry(&both).tls.key, Some(Pem::Text(Secret::new(KEY))));

    let jwt_only = CREDENTIALS.split("***").next().unwrap();
    let unended = CREDENTIALS.replace("------END USER NKEY SEED------", "");
    let unfilled = CREDENTIALS.replace("SUACORRECTHORSEBATTERY\n", "");
    let on_one_line = CREDENTIALS.replace('\n', " ");
    let twice = format!("{CREDENTIALS}{CREDENTIALS}");
    for (key, text) in [
        ("credentials", jwt_only),
        ("credentials", &unended),
        ("credentials", &unfilled),
        ("credentials", &on_one_line),
        ("credentials", &twice),
        ("credentials", KEY),
        ("registry_ca", KEY),
        ("registry_ca", &format!("{CERTIFICATE}{KEY}")),
        ("registry_ca", CREDENTIALS),
        ("registry_certificate", KEY),
        ("registry_key", CERTIFICATE),
        ("registry_key", "-----BEGIN PRIVATE KEY-----\nAAAA\n"),
        ("registry_key", "-----BEGIN PRIVATE KEY-----\n-----END PRIVATE KEY-----\n"),
    ] {
        let error = mesh(&block(key, text)).unwrap_err();
        assert!(matches!(error, ConfigError::Invalid { .. }), "{key}: {error}");
        assert!(!error.to_string().contains("SUACORRECT"), "{error}");
    }
}

#[test]
fn secrets_are_in_no_error_and_never_shown() {
    for text in [
        "registry: nats://user:correct-horse-battery@nats",
        "registry: nats://correct-horse-battery@nats",
        "registry: [nats://user:correct-horse-battery@nats]",
    ] {
        let shown = format!("{:?}", mesh(text).unwrap());
        assert!(!shown.contains(SECRET), "{shown}");
    }
    for text in [
        "registry: user:correct-horse-battery@nats",
        "registry: http://user:correct-horse-battery@nats",
        "registry: nats://user:correct-horse-battery",
        "registry: 'nats://user:correct-horse-battery@na ts'",
        "registry: nats://user:correct-horse-battery@nats:0",
        "registry: nats://user:correct-horse-battery@nats/x",
        "registry: 'nats://user:x/correct-horse-battery@nats'",
        "registry: 'nats://user:x#correct-horse-battery@nats'",
        "registry: 'nats://user:%correct-horse-battery@nats'",
        "registry: [nats://user:correct-horse-battery@nats, nats://user:x@nats]",
        "registry: nats://user:correct-horse-battery@nats\ncredentials: /c",
        "registry: nats://nats\ncredentials: correct-horse-battery",
        "registry: nats://nats\nregistry_key: correct-horse-battery",
        "registry: nats://nats\nregistry_key: \"-----BEGIN PRIVATE KEY----- correct-horse-battery\"",
    ] {
        let error = mesh(text).unwrap_err();
        assert!(!error.to_string().contains(SECRET), "{error}");
        assert!(!format!("{error:?}").contains(SECRET), "{error:?}");
    }
}

/// What the agent alone needs keeps no disk closed, nor does a key that only a newer initramfs would know.
#[test]
fn the_boot_program_does_not_judge_what_the_agent_needs() {
    let load = |text: &str| {
        let file = format!(
            "#cloud-config\nlatchkey:\n  mesh:\n    network: n\n    prefix: fd10::/16\n    {text}\n"
        );
        let dir = oem(&[("90.yaml", &file)]);
        let config =
            latchkey_config::load(&[dir.path()], "", &mut |_: &_| Err("no network".to_owned()));
        (config, read(dir.path(), ""))
    };
    for text in [
        "keepalive: 25s",
        "registry: 5",
        "credentials: /c",
        "registry: nats://n\n    registry_key: /k",
        "mtu: [a]",
        "metrics: {a: b}",
        "advertise_address: fd10::1",
        "keepalife: 25",
        "colour: {of: [the, future]}",
    ] {
        let (config, membership) = load(text);
        assert_eq!(config.unwrap().mesh.unwrap().network, "n", "{text}");
        assert!(membership.is_err(), "{text}");
    }
    for text in ["port: 0", "registry: nats://n\n    registry: nats://n"] {
        let (config, membership) = load(text);
        assert!(config.is_err() && membership.is_err(), "{text}");
    }
}

/// Which mesh it is, the boot program has to know.
#[test]
fn a_typing_error_in_what_is_required_is_told_to_the_boot_program_too() {
    let dir = oem(&[(
        "90.yaml",
        "#cloud-config\nlatchkey:\n  mesh:\n    netwrok: n\n    prefix: fd10::/16\n",
    )]);
    let config =
        latchkey_config::load(&[dir.path()], "", &mut |_: &_| Err("no network".to_owned()));
    match config {
        Err(ConfigError::UnknownKey { nearest, .. }) => {
            assert_eq!(nearest.as_deref(), Some("latchkey.mesh.network"));
        }
        other => panic!("{other:?}"),
    }
}

/// The boot program reads the same keys, and has no use for what they name.
#[test]
fn what_a_path_names_is_not_opened() {
    let missing = "registry: nats://n
credentials: /nowhere/a.creds
registry_ca: /nowhere/ca.pem
registry_certificate: /nowhere/node.pem
registry_key: /dev/zero";
    assert!(mesh(missing).is_ok());

    let text = "#cloud-config
latchkey:
  mesh:
    network: n
    prefix: fd10::/16
    registry: nats://n
    credentials: /oem/fleet.creds
    registry_ca: /oem/nowhere.pem
";
    let dir = oem(&[("90.yaml", text), ("fleet.creds", "not looked at")]);
    let registry = read(dir.path(), "").unwrap().unwrap().registry.unwrap();
    // As the running system names it, found where these files are.
    assert_eq!(registry.login, Login::CredentialsFile(dir.path().join("fleet.creds")));
    assert_eq!(registry.tls.ca, Some(Pem::File("/oem/nowhere.pem".into())));
}

#[test]
fn later_files_add_servers_and_replace_the_rest() {
    let hosts = |mesh: Membership| -> Vec<String> {
        let servers = mesh.registry.map(|registry| registry.servers).unwrap_or_default();
        servers.iter().map(|server| server.host.clone()).collect()
    };
    let over = |texts: &[&str]| mesh_over(texts, "");
    let lists = ["registry: [nats://a, nats://b]", "registry: [nats://b, nats://c]"];
    assert_eq!(hosts(over(&lists).unwrap()), ["a", "b", "c"]);
    assert_eq!(hosts(over(&["registry: nats://a", "registry: nats://b"]).unwrap()), ["b"]);
    assert_eq!(hosts(over(&["registry: [nats://a]", "registry: null"]).unwrap()), [""; 0]);
    // A machine of the fleet without a registry.
    let none = ["registry: nats://a\nbucket: b\ncredentials: /c", "registry: ''"];
    assert_eq!(over(&none).unwrap().registry, None);
    assert!(matches!(
        over(&["registry: [nats://a]", "registry: nats://b"]),
        Err(ConfigError::Merge { .. })
    ));
    let interface = "advertise_interface: eth0";
    assert!(matches!(
        over(&[interface, "advertise_address: 192.0.2.7"]),
        Err(ConfigError::Conflict { .. })
    ));
    assert_eq!(
        over(&[interface, "advertise_interface: null\nadvertise_address: 192.0.2.7"])
            .unwrap()
            .advertise,
        Advertise::Address("192.0.2.7".parse().unwrap())
    );
}

#[test]
fn the_command_line_replaces() {
    let mesh = |file: &str, words: &str| {
        let words: Vec<String> =
            words.split(' ').map(|word| format!("latchkey.mesh.{word}")).collect();
        mesh_over(&[file], &format!("quiet {} 8250.nr_uarts=1", words.join(" ")))
    };
    let found = mesh(
        "registry: [nats://a]\nadvertise_interface: eth0\nname: x",
        "registry=tls://b,tls://c:4333 bucket=b advertise_address=192.0.2.7 keepalive=off name=y mtu=1400",
    )
    .unwrap();
    let registry = found.registry.clone().unwrap();
    assert_eq!(registry.servers, [server("b", 4222, true), server("c", 4333, true)]);
    assert_eq!(
        found,
        with(|mesh| {
            mesh.registry = Some(registry);
            mesh.advertise = Advertise::Address("192.0.2.7".parse().unwrap());
            mesh.keepalive = Keepalive::Off;
            mesh.name = Some("y".to_owned());
            mesh.mtu = Some(1400);
        })
    );
    let in_a_line = format!("registry_ca=\"{}\"", CERTIFICATE.replace('\n', "\\n"));
    let words = format!("latchkey.mesh.{in_a_line}");
    let tls = mesh_over(&["registry: nats://n"], &words).unwrap().registry.unwrap().tls;
    assert_eq!(tls.ca, Some(Pem::Text(Secret::new(CERTIFICATE))));
    for bad in ["registry=nats", "registy=nats://n", "nats_url=nats://n", "mtu=1", "registry.x=1"] {
        assert!(mesh("", bad).is_err(), "{bad}");
    }
}

#[test]
fn the_fleet_of_the_documentation_is_read() {
    let document = include_str!("../../../docs/configuration.md");
    let examples: Vec<&str> =
        document.split("```yaml\n").skip(1).map(|rest| rest.split("```").next().unwrap()).collect();
    let dir = oem(&[
        ("90_fleet.yaml", examples[1]),
        ("95_this_machine.yaml", examples[2]),
        ("fleet-ca.pem", CERTIFICATE),
        ("fleet-a.creds", CREDENTIALS),
    ]);
    let mesh = read(dir.path(), "").unwrap().unwrap();
    assert_eq!(mesh.name.as_deref(), Some("gateway-paris"));
    assert_eq!(mesh.advertise, Advertise::Name("paris.example.org".to_owned()));
    assert_eq!(mesh.metrics, Some("127.0.0.1:9586".parse().unwrap()));
    let registry = mesh.registry.unwrap();
    assert_eq!(registry.bucket, "fleet-a");
    assert_eq!(registry.servers.len(), 2);
    assert_eq!(registry.login, Login::CredentialsFile(dir.path().join("fleet-a.creds")));
    assert_eq!(registry.tls.ca, Some(Pem::File(dir.path().join("fleet-ca.pem"))));
}
