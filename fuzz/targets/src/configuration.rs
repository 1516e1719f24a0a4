//! Cloud-config and the kernel command line (`protocols/kcrypt.md` §10).

use std::path::PathBuf;

use latchkey_config::mesh::{Advertise, Keepalive};
use latchkey_config::{Config, ConfigError, Local, Membership, Request, cmdline};

use crate::{SECRET, tells_nothing};

const FILE: &str = "/oem/90_custom.yaml";

fn load(files: &[&[u8]], cmdline: &str) -> Result<Config, ConfigError> {
    let files = files.iter().map(|bytes| (PathBuf::from(FILE), bytes.to_vec())).collect();
    let mut refused = |_: &Request<'_>| Err("no network".to_owned());
    Local::of_bytes(files, cmdline)?.fetch(&mut refused)
}

/// Everything but the files' names, which tell how often one was read.
fn same(one: &Config, other: &Config) {
    let without =
        |config: &Config| Config { sources: Vec::new(), unfetched: Vec::new(), ..config.clone() };
    assert_eq!(without(one), without(other));
}

/// As a file, and as what a `config_url` leads to.
pub(crate) fn cloud_config(data: &[u8]) {
    let mut text = b"#cloud-config\n".to_vec();
    text.extend_from_slice(data);
    match load(&[&text], "") {
        Ok(config) => {
            within_bounds(&config);
            // /oem is also /sysroot/oem: the same file once more changes nothing.
            same(&load(&[&text, &text], "").unwrap(), &config);
            // A word of somebody else's on the command line neither.
            same(&load(&[&text], "quiet 8250.nr_uarts=1").unwrap(), &config);
        }
        // What is wrong says where.
        Err(ConfigError::Conflict { .. } | ConfigError::Incomplete { .. }) => {}
        Err(error) => assert!(error.to_string().contains("/"), "{error}"),
    }
    let local = b"#cloud-config\nconfig_url: http://x/1\nkcrypt: {challenger: {challenger_server: ['http://a']}}\n";
    let files = vec![(PathBuf::from(FILE), local.to_vec())];
    let mut documents = |request: &Request<'_>| match request.url {
        "http://x/1" => Ok(text.clone()),
        _ => Err("no network".to_owned()),
    };
    if let Ok(config) = Local::of_bytes(files, "").unwrap().fetch(&mut documents) {
        within_bounds(&config);
    }
    membership(&text);
    url(&String::from_utf8_lossy(data));
}

/// A password in a registry's URL that somebody did not encode, or forgot something after.
fn url(text: &str) {
    if text.contains(SECRET) {
        return; // a host may well be called so
    }
    let url = serde_json::to_string(&format!("nats://u:{SECRET}{text}")).unwrap();
    let text = format!(
        "#cloud-config\nlatchkey: {{mesh: {{network: n, prefix: 'fd10::/16', registry: {url}}}}}\n"
    );
    match Local::of_bytes(vec![(PathBuf::from(FILE), text.into_bytes())], "") {
        Ok(local) => {
            assert!(!format!("{local:?} {:?}", local.membership()).contains(SECRET));
        }
        Err(error) => tells_nothing(&error),
    }
}

fn within_bounds(config: &Config) {
    assert!((1..=86_400).contains(&config.deadline.as_secs()));
    assert!(config.challenger.nv_index >> 24 == 0x01 && config.challenger.c_index >> 24 == 0x81);
    assert!(!config.challenger.pcrs.is_empty());
    assert!(
        config.challenger.pcrs.iter().all(|pcr| *pcr <= 15) && config.challenger.pcrs.is_sorted()
    );
    assert!(!config.challenger.mdns || !config.challenger.servers.is_empty());
    let plain = |label: &String| {
        !label.is_empty() && !label.contains('/') && !label.starts_with('.') && label.len() <= 47
    };
    assert!(config.encrypted_partitions.iter().all(plain));
}

/// What the agent makes of the same file: the same mesh as the boot program, where both make something of it.
fn membership(text: &[u8]) {
    let read = || Local::of_bytes(vec![(PathBuf::from(FILE), text.to_vec())], "");
    match read().and_then(|local| local.membership()) {
        Ok(found) => {
            if let Ok(config) = read().and_then(Local::alone) {
                assert_eq!(found.as_ref().map(|found| &found.mesh), config.mesh.as_ref());
            }
            found.iter().for_each(membership_within_bounds);
        }
        Err(ConfigError::Conflict { .. }) => {}
        Err(error) => assert!(error.to_string().contains('/'), "{error}"),
    }
}

fn membership_within_bounds(mesh: &Membership) {
    assert!(mesh.mesh.port != 0 && mesh.mtu.is_none_or(|mtu| (1280..=65_455).contains(&mtu)));
    assert!(mesh.keepalive != Keepalive::Every(0));
    assert!(mesh.metrics.is_none_or(|address| address.port() != 0));
    assert!(mesh.name.as_ref().is_none_or(|name| (1..=128).contains(&name.len())));
    if let Advertise::Address(address) = &mesh.advertise {
        assert!(!mesh.mesh.prefix.contains(*address) && !address.is_loopback());
    }
    if let Some(registry) = &mesh.registry {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-".contains(&byte);
        assert!((1..=252).contains(&registry.bucket.len()) && registry.bucket.bytes().all(plain));
        assert!(!registry.servers.is_empty());
        assert!(registry.servers.iter().all(|server| !server.host.is_empty() && server.port != 0));
        assert_eq!(registry.tls.certificate.is_some(), registry.tls.key.is_some());
    }
}

pub(crate) fn cmdline(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let words = cmdline::words(&text);
    if !text.contains(['"', '\'', '\\']) {
        assert!(words.iter().map(String::as_str).eq(text.split_whitespace()));
    }
    let is_live = cmdline::is_live(&text);
    assert!(!(is_live && text.contains("COS_ACTIVE")));
    if let Ok(config) = load(&[], &text) {
        within_bounds(&config);
    }
    // Whatever stands before ours: it is heard, or it is an error, and never silently lost.
    let ours = format!("{text} kcrypt.challenger.challenger_server=http://last");
    if let Ok(config) = load(&[], &ours) {
        assert_eq!(config.challenger.servers, ["http://last"], "{ours}");
    }
}
