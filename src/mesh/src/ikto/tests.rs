use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use latchkey_wire::member::SignaturePolicy;
use serde_json::{Map, Value, json};

use super::*;
use crate::settings::{Advertise, Keepalive, Secret};

const KEY: &str = "yAnz5TF+lXXJte14tji3zlMNq+hd2rYUIgJBgB3fBmk=";
/// What no error and no `{:?}` may show.
const SECRET: &str = "correct-horse-battery";

/// What `ikto init` prints, with what an operator fills in.
fn file() -> Map<String, Value> {
    let Value::Object(file) = json!({
        "name": "node-A",
        "advertise_address": "10.99.1.2",
        "private_address": "fd10:aaaa:1::",
        "subnet_prefix": 48,
        "mesh_cidr": "fd10::/16",
        "wg_dev_name": "wg-ikto",
        "wg_port": 51820,
        "private_key_path": "/etc/ikto/key",
        "nats_creds": "",
        "nats_url": "nats://",
        "nats_kv": "ikto-mesh",
    }) else {
        panic!("not an object")
    };
    file
}

fn with(key: &str, value: Value) -> Map<String, Value> {
    let mut file = file();
    file.insert(key.into(), value);
    file
}

fn environment(name: &str) -> Option<String> {
    [("HOME", "/root"), ("NODE", "a7")]
        .into_iter()
        .find(|(known, _)| *known == name)
        .map(|(_, value)| value.to_owned())
}

fn checked_text(text: &str) -> Result<Checked, Fault> {
    check::check(&Document::parse(text.as_bytes())?, &environment)
}

fn checked(file: &Map<String, Value>) -> Result<Checked, Fault> {
    checked_text(&Value::Object(file.clone()).to_string())
}

/// The key that an error names.
fn culprit(result: Result<Checked, Fault>) -> Option<&'static str> {
    match result.unwrap_err() {
        Fault::Key { key, .. } => Some(key),
        Fault::File(_) => None,
    }
}

/// A directory with the key and credentials, and the path of an `ikto.json` in it.
struct Files {
    directory: tempfile::TempDir,
}

impl Files {
    fn new() -> Self {
        let files = Self { directory: tempfile::tempdir().unwrap() };
        files.write("key", &format!(" {KEY}\n"));
        files.write(
            "creds",
            "-----BEGIN NATS USER JWT-----\neyJ0\n------END NATS USER JWT------\n\n\
             -----BEGIN USER NKEY SEED-----\nSUAB\n------END USER NKEY SEED------\n",
        );
        files
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
        fs::set_permissions(self.path(name), fs::Permissions::from_mode(0o600)).unwrap();
    }

    fn read(&self, change: impl FnOnce(&mut Map<String, Value>)) -> crate::error::Result<Settings> {
        let mut file = file();
        file.insert("private_key_path".into(), self.path("key").to_str().unwrap().into());
        change(&mut file);
        self.write("ikto.json", &Value::Object(file).to_string());
        Config::read(&self.path("ikto.json"))
    }
}

#[test]
fn a_file_that_ikto_takes_is_taken_as_it_is() {
    let files = Files::new();
    let creds = files.path("creds");
    let settings = files
        .read(|file| {
            file.insert("nats_creds".into(), creds.to_str().unwrap().into());
        })
        .unwrap();
    let expected = Settings {
        name: "node-A".into(),
        mesh: "fd10::/16".parse().unwrap(),
        address: AddressFrom::Fixed("fd10:aaaa:1::/48".parse().unwrap()),
        key: KeyFrom::File(files.path("key")),
        advertise: Advertise::Address("10.99.1.2".parse().unwrap()),
        interface: "wg-ikto".into(),
        port: 51820,
        keepalive: Keepalive::Auto,
        mtu: None,
        registry: Some(RegistrySettings {
            servers: vec![crate::settings::Server {
                host: "localhost".into(),
                port: 4222,
                tls: false,
            }],
            bucket: "ikto-mesh".into(),
            login: Login::CredentialsFile(creds),
            tls: Tls::default(),
        }),
        signatures: SignaturePolicy::Prefer,
        strict_records: true,
        metrics: None,
        cache: "/var/lib/latchkey/wg-ikto.json".into(),
        socket: "/tmp/ikto.sock".into(),
    };
    assert_eq!(settings, expected);
}

#[test]
fn what_init_prints_is_read_once_the_gaps_are_filled() {
    let files = Files::new();
    for (mesh, length) in [(None, None), (Some("10.64.0.0/10"), Some(24))] {
        let text = init(mesh, length).unwrap();
        let missing = checked_text(&text);
        assert_eq!(culprit(missing), Some("advertise_address"));
        let filled = text
            .replace(r#""advertise_address": """#, r#""advertise_address": "192.0.2.7""#)
            .replace(
                r#""private_key_path": """#,
                &format!(r#""private_key_path": {:?}"#, files.path("key")),
            );
        files.write("ikto.json", &filled);
        let settings = Config::read(&files.path("ikto.json")).unwrap();
        let AddressFrom::Fixed(address) = settings.address else { panic!("not fixed") };
        assert_eq!(address.length(), length.unwrap_or(48));
        assert_eq!(settings.registry.unwrap().login, Login::None);
    }
}

#[test]
fn keys_are_matched_as_go_does() {
    let text = Value::Object(file()).to_string();
    let plain = checked_text(&text).unwrap();
    assert!(plain.warnings.is_empty());
    let changed = [
        text.to_uppercase()
            .replace("FD10", "fd10")
            .replace("NODE-A", "node-A")
            .replace("\"WG-IKTO\"", "\"wg-ikto\"")
            .replace("\"IKTO-MESH\"", "\"ikto-mesh\"")
            .replace("/ETC/IKTO/KEY", "/etc/ikto/key")
            .replace("NATS://", "nats://"),
        // U+017F and U+212A are s and k under Unicode's simple folding.
        text.replace("subnet", "\u{17f}ubnet").replace("nats_kv", "nats_\u{212a}v"),
        // The last of several wins; null changes nothing.
        text.replacen('{', r#"{"wg_port":7,"#, 1),
        text.replace('}', r#","wg_port":null,"name":null}"#),
        // What Ikto does not know is no matter.
        text.replacen('{', r#"{"comment":{"a":[1,{"b":null}]},"_":1.5e9,"#, 1),
        format!("\n\t {text} \r\n"),
    ];
    for text in changed {
        assert_eq!(checked_text(&text).unwrap(), plain, "{text}");
    }
    let cut = format!("\u{fffd}{}", plain.name);
    let mut bytes = text.into_bytes();
    let at = bytes.windows(6).position(|window| window == b"node-A").unwrap();
    bytes.insert(at, 0xff);
    assert_eq!(Document::parse(&bytes).unwrap().name, cut);
}

#[test]
fn what_is_not_one_json_object_is_refused() {
    let text = Value::Object(file()).to_string();
    for bad in [
        "".to_owned(),
        " ".to_owned(),
        text[..text.len() - 1].to_owned(),
        format!("{text}{text}"),
        format!("{text} x"),
        format!("[{text}]"),
        r#""correct-horse-battery""#.to_owned(),
        "5".to_owned(),
        text.replace(',', ",,"),
        text.replace('"', "'"),
        "// a comment\n{}".to_owned(),
        " ".repeat(MAX_FILE + 1),
    ] {
        let fault = checked_text(&bad).unwrap_err();
        assert!(matches!(&fault, Fault::File(_)), "{bad}: {fault}");
        assert!(!fault.to_string().contains(SECRET), "{fault}");
    }
    // An object without a key that matters, as Go has it; the first that is missing is named.
    for empty in ["{}", "null", r#"{"x":1}"#] {
        assert_eq!(culprit(checked_text(empty)), Some("mesh_cidr"), "{empty}");
    }
}

#[test]
fn a_value_of_another_type_is_told_with_its_key() {
    for (key, value, told) in [
        ("name", json!(5), "expected a text, found a number"),
        ("advertise_address", json!(["10.0.0.1"]), "expected a text, found a list"),
        ("private_address", json!({}), "expected a text, found an object"),
        ("subnet_prefix", json!("48"), "expected a whole number, found a text"),
        ("subnet_prefix", json!(48.0), "a fraction, an exponent"),
        ("wg_port", json!(5e4), "a fraction, an exponent"),
        ("wg_port", json!(18_446_744_073_709_551_615_u64), "a number out of range"),
        ("wg_port", json!(true), "expected a whole number, found true or false"),
        ("nats_url", json!(["nats://correct-horse-battery@n"]), "expected a text, found a list"),
        ("strict", json!("no"), "expected true or false, found a text"),
        ("persistent_keepalive", json!("25s"), "expected a whole number, found a text"),
    ] {
        let fault = checked(&with(key, value)).unwrap_err();
        assert!(fault.to_string().starts_with(&format!("{key}: ")), "{fault}");
        assert!(fault.to_string().contains(told), "{fault}");
        assert!(!fault.to_string().contains(SECRET), "{fault}");
    }
}

#[test]
fn the_values_each_key_takes() {
    let long = "n".repeat(1025);
    let cases: [(&str, Vec<Value>, Vec<Value>); 15] = [
        ("name", vec![json!(""), json!("Küche"), json!(null)], vec![json!(long), json!("a\nb")]),
        (
            "advertise_address",
            [
                "192.0.2.7",
                "2001:db8::1",
                "::ffff:192.0.2.7",
                "127.0.0.1",
                "fd10:1::7",
                "node.example.org",
                "node",
            ]
            .map(Value::from)
            .into(),
            [
                "",
                "0.0.0.0",
                "::",
                "224.0.0.1",
                "ff02::1",
                "192.0.2.7:51820",
                "[2001:db8::1]",
                "10.0.0.256",
                "a b",
                "fe80::1",
            ]
            .map(Value::from)
            .into(),
        ),
        (
            "private_address",
            ["fd10::1", "fd10:ffff::"].map(Value::from).into(),
            ["", "fd11::1", "10.0.0.1", "fd10::1/48", "node", "fd10::1%eth0"]
                .map(Value::from)
                .into(),
        ),
        (
            "subnet_prefix",
            vec![json!(16), json!(17), json!(48), json!(128)],
            vec![json!(0), json!(null), json!(-1), json!(15), json!(129), json!(304)],
        ),
        (
            "mesh_cidr",
            ["fd10::/16", "fd10::1/16", "fd10:aaaa::/32", "::/1", "FD10::/16"].map(Value::from)
                [..3]
                .into(),
            [
                "",
                "::/0",
                "::/00",
                "fd10::/0x",
                "fd10::",
                "fd10::/129",
                "fd10:aaaa:1::/128",
                "10.0.0.0/8",
                "fd11::/16",
                "x/8",
            ]
            .map(Value::from)
            .into(),
        ),
        (
            "wg_dev_name",
            ["wg0", "a.b-c_d=e", "fifteen-letters"].map(Value::from).into(),
            ["", "sixteen-letters-", "a/b", "a:b", "a b", ".", ".."].map(Value::from).into(),
        ),
        (
            "wg_port",
            vec![json!(1), json!(65_535)],
            vec![json!(0), json!(null), json!(-1), json!(65_536)],
        ),
        ("private_key_path", vec![json!("key"), json!("/a b")], vec![json!(""), json!(null)]),
        (
            "nats_url",
            [
                "",
                "nats://",
                "nats",
                "nats:4333",
                "tls://nats",
                "nats://a, b:1,,tls://c/",
                "nats://u:p@",
                "nats://:4333",
                "[::1]:4222",
            ]
            .map(Value::from)
            .into(),
            [
                "ws://nats",
                "http://nats",
                "nats://n:0",
                "nats://a b",
                "nats://u:%@n",
                "nats://a/b",
                "nats://u:p@a,nats://t@b",
            ]
            .map(Value::from)
            .into(),
        ),
        (
            "nats_kv",
            ["ikto-mesh", "A_1"].map(Value::from).into(),
            ["", "a.b", "a b", "*"].map(Value::from).into(),
        ),
        (
            "signatures",
            ["", "require", "prefer", "ignore"].map(Value::from).into(),
            ["yes", "Require"].map(Value::from).into(),
        ),
        ("strict", vec![json!(true), json!(false), json!(null)], vec![]),
        (
            "persistent_keepalive",
            vec![json!(0), json!(25), json!(65_535), json!(null)],
            vec![json!(-1), json!(65_536)],
        ),
        (
            "mtu",
            vec![json!(0), json!(1280), json!(65_455)],
            vec![json!(1279), json!(65_456), json!(-1)],
        ),
        ("nats_cert", vec![json!("")], vec![json!("/c")]),
    ];
    for (key, good, bad) in cases {
        for value in good {
            if let Err(fault) = checked(&with(key, value.clone())) {
                panic!("{key} {value}: {fault}");
            }
        }
        for value in bad {
            let found = culprit(checked(&with(key, value.clone())));
            // An address out of the mesh may be the one's fault or the other's.
            let named =
                found == Some(key) || key == "mesh_cidr" && found == Some("private_address");
            assert!(named, "{key} {value}: {found:?}");
        }
    }
}

#[test]
fn values_mean_what_they_mean_to_ikto() {
    let value = |key: &str, value: Value| checked(&with(key, value)).unwrap();
    // The range is masked, the address is not.
    assert_eq!(value("mesh_cidr", json!("fd10:1::2/16")).mesh.to_string(), "fd10::/16");
    assert_eq!(value("mesh_cidr", json!("fd10::/0016")).mesh.to_string(), "fd10::/16");
    assert_eq!(value("private_address", json!("fd10:a::7")).address.to_string(), "fd10:a::7/48");
    let mapped = value("advertise_address", json!("::ffff:192.0.2.7"));
    assert_eq!(mapped.advertise, Advertise::Address("192.0.2.7".parse().unwrap()));
    // An IPv4 mesh takes the mapped form for the address itself.
    let mut v4 = with("mesh_cidr", json!("10.64.0.0/10"));
    v4.insert("private_address".into(), json!("::ffff:10.70.172.0"));
    v4.insert("subnet_prefix".into(), json!(24));
    v4.insert("advertise_address".into(), json!("192.0.2.7"));
    assert_eq!(checked(&v4).unwrap().address.to_string(), "10.70.172.0/24");
    // And what an Ikto agent does not have.
    let named = value("advertise_address", json!("node.example.org"));
    assert_eq!(named.advertise, Advertise::Name("node.example.org".into()));
    assert_eq!(value("persistent_keepalive", json!(0)).keepalive, Keepalive::Off);
    assert_eq!(value("persistent_keepalive", json!(9)).keepalive, Keepalive::Every(9));
    assert!(!value("strict", json!(false)).strict);
    assert_eq!(value("mtu", json!(1300)).mtu, Some(1300));
    assert_eq!(value("signatures", json!("require")).signatures, SignaturePolicy::Require);
}

#[test]
fn servers_are_told_as_go_tells_them() {
    let servers = |url: &str| -> String {
        let checked = checked(&with("nats_url", json!(url))).unwrap();
        checked.servers.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
    };
    for (url, meant) in [
        ("", "nats://localhost:4222"),
        (" , ", "nats://localhost:4222"),
        ("nats://", "nats://localhost:4222"),
        ("nats://:4333", "nats://localhost:4333"),
        ("nats://user:pass@", "nats://localhost:4222"),
        ("nats", "nats://nats:4222"),
        ("nats:4333", "nats://nats:4333"),
        ("tls://a,b:1, nats://[::1]/", "tls://a:4222 nats://b:1 nats://[::1]:4222"),
    ] {
        assert_eq!(servers(url), meant, "{url:?}");
    }
    let login = |url: &str| checked(&with("nats_url", json!(url))).unwrap().login;
    assert_eq!(
        login("nats://u:p%40@a,nats://b"),
        Login::Password { user: "u".into(), password: Secret::new("p@") }
    );
    assert_eq!(login("token@a"), Login::Token(Secret::new("token")));
}

#[test]
fn the_path_of_credentials_is_expanded_as_gos_client_does() {
    for (written, meant) in [
        ("/etc/a.creds", "/etc/a.creds"),
        ("a.creds", "a.creds"),
        ("~/a.creds", "/root/a.creds"),
        ("~a.creds", "/root/a.creds"),
        ("$HOME/$NODE.creds", "/root/a7.creds"),
        ("${HOME}/x${NODE}y", "/root/xa7y"),
        ("/a/$NOWHERE/b", "/a//b"),
        ("/a$/b", "/a$/b"),
        ("/a$", "/a$"),
        ("/a~b", "/a~b"),
        ("/${NODE", "/${NODE"),
    ] {
        let checked = checked(&with("nats_creds", json!(written))).unwrap();
        assert_eq!(checked.credentials, Some(PathBuf::from(meant)), "{written}");
    }
    assert_eq!(checked(&file()).unwrap().credentials, None);
}

#[test]
fn what_works_and_is_hardly_meant_is_said() {
    for (key, value, said) in [
        ("natsurl", json!("x"), "unknown key \"natsurl\" has no effect; did you mean nats_url?"),
        ("advertise-address", json!("x"), "did you mean advertise_address?"),
        ("sub_net_prefix", json!("x"), "did you mean subnet_prefix?"),
        ("subnet_prefix", json!(16), "this node owns all of the mesh"),
        ("advertise_address", json!("127.0.0.1"), "only this host reaches it"),
    ] {
        let warnings = checked(&with(key, value)).unwrap().warnings;
        assert!(matches!(&*warnings, [one] if one.contains(said)), "{key}: {warnings:?}");
    }
    assert!(checked(&with("description", json!("x"))).unwrap().warnings.is_empty());
}

#[test]
fn secrets_are_in_no_error_and_never_shown() {
    for url in [
        "nats://u:correct-horse-battery@n:0",
        "http://u:correct-horse-battery@n",
        "u:correct-horse-battery@n/x",
        "nats://u:correct-horse-battery",
        "nats://u:x/correct-horse-battery@n",
        "correct-horse-battery@n, other@m",
    ] {
        let fault = checked(&with("nats_url", json!(url))).unwrap_err();
        assert!(!format!("{fault} {fault:?}").contains(SECRET), "{fault}");
    }
    let file = with("nats_url", json!("nats://u:correct-horse-battery@n"));
    let document = Document::parse(Value::Object(file.clone()).to_string().as_bytes()).unwrap();
    assert!(!format!("{document:?} {:?}", checked(&file).unwrap()).contains(SECRET));
}

#[test]
fn files_that_are_named_can_be_read_before_anything_is_touched() {
    let files = Files::new();
    files.write("empty", "\n");
    files.write("short", "AAAA");
    files.write("long", &format!("{KEY}{KEY}"));
    files.write("text", "SUAB");
    let set = |key: &'static str, path: PathBuf| {
        move |file: &mut Map<String, Value>| {
            file.insert(key.into(), path.to_str().unwrap().into());
        }
    };
    for (key, name) in [
        ("private_key_path", "nowhere"),
        ("private_key_path", "empty"),
        ("private_key_path", "short"),
        ("private_key_path", "long"),
        ("private_key_path", "."),
        ("nats_creds", "nowhere"),
        ("nats_creds", "text"),
        ("nats_creds", "."),
        ("nats_ca", "nowhere"),
    ] {
        let error = files.read(set(key, files.path(name))).unwrap_err().to_string();
        assert!(error.contains(&format!("ikto.json: {key}: ")), "{error}");
        assert!(!error.contains("SUAB") && !error.contains(KEY), "{error}");
    }
    let client = |certificate: &'static str, key: &'static str| {
        let (certificate, key) = (files.path(certificate), files.path(key));
        files.read(move |file| {
            set("nats_cert", certificate)(file);
            set("nats_key", key)(file);
        })
    };
    assert!(client("text", "nowhere").unwrap_err().to_string().contains("nats_key: cannot read"));
    let tls = client("text", "short").unwrap().registry.unwrap().tls;
    assert_eq!(tls.certificate, Some(Pem::File(files.path("text"))));
    assert_eq!(tls.key, Some(Pem::File(files.path("short"))));

    // No credentials, as Ikto needs it to be said; then what is in the URL counts.
    for empty in [PathBuf::from("/dev/null"), files.path("empty")] {
        let settings = files
            .read(|file| {
                set("nats_creds", empty)(file);
                file.insert("nats_url".into(), "nats://token@n".into());
            })
            .unwrap();
        assert_eq!(settings.registry.unwrap().login, Login::Token(Secret::new("token")));
    }
    let missing = Config::read(&files.path("nowhere.json")).unwrap_err();
    assert!(missing.to_string().contains("nowhere.json: cannot read it"), "{missing}");
    assert_eq!(missing.exit_code(), 10);
}
