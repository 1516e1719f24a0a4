//! `ikto.json` (`protocols/ikto-kilo.md` §1.2).
//!
//! The agent's files for it alone: its crate would bring an async runtime and a NATS client along, all to be built once more
//! for libFuzzer.

use std::net::IpAddr;

use latchkey_config::mesh::{Advertise, Keepalive, Login};
use serde_json::{Value, json};

use crate::{SECRET, tells_nothing};

#[path = "../../../src/mesh/src/ikto/check.rs"]
#[allow(dead_code, missing_debug_implementations, reason = "as in its own crate")]
mod check;
#[path = "../../../src/mesh/src/ikto/document.rs"]
#[allow(dead_code, missing_debug_implementations, reason = "as in its own crate")]
mod document;

use check::{Checked, check};
use document::Document;

fn environment(name: &str) -> Option<String> {
    (name == "HOME").then(|| "/root".to_owned())
}

pub(crate) fn ikto(data: &[u8]) {
    match Document::parse(data) {
        Err(fault) => tells_nothing(&fault),
        Ok(document) => {
            // Without what it passed over, and with its keys in another case, it says the same.
            let known = Document { unknown: Vec::new(), ..document.clone() };
            let again = Document::parse(written(&document).to_string().as_bytes()).unwrap();
            assert!(again == known, "{}", written(&document));
            match check(&document, &environment) {
                Ok(checked) => within_bounds(&checked),
                Err(fault) => assert!(fault.to_string().len() < 1000, "{fault}"),
            }
        }
    }
    // A password that somebody did not encode, or forgot something after.
    let text = String::from_utf8_lossy(data);
    if text.contains(SECRET) {
        return; // a host may well be called so
    }
    let mut file = sound();
    file["nats_url"] = format!("nats://u:{SECRET}{text}").into();
    let document = Document::parse(file.to_string().as_bytes());
    match document.and_then(|document| check(&document, &environment)) {
        Ok(checked) => assert!(!format!("{checked:?}").contains(SECRET)),
        Err(fault) => tells_nothing(&fault),
    }
}

/// A file that can be meant.
fn sound() -> Value {
    json!({"advertise_address": "192.0.2.7", "private_address": "fd10:a::", "subnet_prefix": 48, "mesh_cidr": "fd10::/16",
        "wg_dev_name": "wg0", "wg_port": 1, "private_key_path": "k", "nats_kv": "b"})
}

fn written(document: &Document) -> Value {
    json!({
        "NAME": document.name,
        "Advertise_Address": document.advertise_address,
        "PRIVATE_ADDRESS": document.private_address,
        "SUBNET_PREFIX": document.subnet_prefix,
        "MESH_CIDR": document.mesh_cidr,
        "WG_DEV_NAME": document.wg_dev_name,
        "WG_PORT": document.wg_port,
        "PRIVATE_KEY_PATH": document.private_key_path,
        "NATS_CREDS": document.nats_creds,
        "NATS_URL": *document.nats_url,
        "NATS_KV": document.nats_kv,
        "SIGNATURES": document.signatures,
        "STRICT": document.strict,
        "PERSISTENT_KEEPALIVE": document.persistent_keepalive,
        "MTU": document.mtu,
        "NATS_CA": document.nats_ca,
        "NATS_CERT": document.nats_cert,
        "NATS_KEY": document.nats_key,
    })
}

fn within_bounds(checked: &Checked) {
    let (mesh, own) = (checked.mesh, checked.address);
    assert!(mesh == mesh.masked() && mesh.length() != 0 && mesh.covers(&own), "{own} in {mesh}");
    assert!(checked.port != 0 && checked.mtu.is_none_or(|mtu| (1280..=65_455).contains(&mtu)));
    assert!((1..=15).contains(&checked.interface.len()) && !checked.interface.contains('/'));
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-".contains(&byte);
    assert!((1..=252).contains(&checked.bucket.len()) && checked.bucket.bytes().all(plain));
    assert!((1..=16).contains(&checked.servers.len()));
    assert!(checked.servers.iter().all(|server| !server.host.is_empty() && server.port != 0));
    assert!(!matches!(checked.login, Login::Credentials(_) | Login::CredentialsFile(_)));
    assert!(checked.keepalive != Keepalive::Every(0));
    match &checked.advertise {
        Advertise::Address(address) => {
            assert!(
                !address.is_unspecified() && !address.is_multicast() && !mesh.contains(*address)
            );
        }
        Advertise::Name(name) => assert!(!name.is_empty() && name.parse::<IpAddr>().is_err()),
        Advertise::Interface(_) | Advertise::Route => panic!("{:?}", checked.advertise),
    }
}
