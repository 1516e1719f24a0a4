//! `config_url`, in files and on the command line: protocols/kcrypt.md §10.2, as sentences.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail as tests do")]

use std::collections::HashMap;
use std::fs;

use latchkey_config::{Config, ConfigError, Request};

/// Loads `files` and `cmdline` with these documents on the network; with it, which URLs were asked for.
fn load(
    files: &[&str],
    cmdline: &str,
    documents: &[(&str, &str)],
) -> (Result<Config, ConfigError>, Vec<String>) {
    let dir = tempfile::tempdir().unwrap();
    for (index, text) in files.iter().enumerate() {
        fs::write(dir.path().join(format!("{index}.yaml")), format!("#cloud-config\n{text}\n"))
            .unwrap();
    }
    let documents: HashMap<&str, &str> = documents.iter().copied().collect();
    let mut asked = Vec::new();
    let config = latchkey_config::load(&[dir.path()], cmdline, &mut |request: &Request<'_>| {
        asked.push(request.url.to_owned());
        let text = documents.get(request.url).ok_or("no route to host")?;
        Ok(text.as_bytes().to_vec())
    });
    (config, asked)
}

fn document(text: &str) -> String {
    format!("#cloud-config\n{text}\n")
}

const SERVER: &str = "kcrypt: {challenger: {challenger_server: 'http://a'}}";

#[test]
fn a_document_is_merged_over_the_file_that_names_it_and_later_files_over_both() {
    let text = document(
        "kcrypt: {challenger: {challenger_server: 'http://doc'}, nv_index: 0x1500001}\nlatchkey: {deadline: 7s}",
    );
    let (config, asked) = load(
        &[
            &format!("config_url: http://x/1\n{SERVER}\nlatchkey: {{deadline: 5s, protocol: v1}}"),
            "kcrypt: {nv_index: 0x1500002}",
        ],
        "latchkey.protocol=v2",
        &[("http://x/1", &text)],
    );
    let config = config.unwrap();
    assert_eq!(asked, ["http://x/1"]);
    assert_eq!(config.challenger.servers, ["http://doc"]);
    assert_eq!(config.deadline.as_secs(), 7);
    assert_eq!(config.challenger.nv_index, 0x0150_0002);
    assert_eq!(config.challenger.protocol, latchkey_config::Protocol::V2);
    assert_eq!(config.sources.last().unwrap().file_name().unwrap(), "1.yaml");
    assert!(config.sources.iter().any(|source| source.to_str() == Some("http://x/1")));
    config.complete().unwrap();
}

#[test]
fn the_command_line_may_name_a_document_and_its_own_keys_win_over_it() {
    let text =
        document("kcrypt: {challenger: {challenger_server: 'http://doc', nv_index: 0x1500001}}");
    for word in ["kairos.config_url=", "config_url=", "cos.setup=", "kairos.config=config_url="] {
        let cmdline = format!("{word}https://x/1 kcrypt.challenger.challenger_server=http://own");
        let (config, asked) = load(&[SERVER], &cmdline, &[("https://x/1", &text)]);
        let config = config.unwrap();
        assert_eq!(asked, ["https://x/1"], "{word}");
        assert_eq!(config.challenger.servers, ["http://own"], "{word}");
        assert_eq!(config.challenger.nv_index, 0x0150_0001, "{word}");
    }
    let (config, asked) = load(&[SERVER], "cos.setup=/oem/x.yaml kairos.config_url=", &[]);
    assert_eq!((config.unwrap().challenger.servers.len(), asked.len()), (1, 0));
}

#[test]
fn documents_name_documents_within_bounds_and_each_is_fetched_once() {
    let chain: Vec<(String, String)> = (1..9)
        .map(|n| {
            let next = n + 1;
            (
                format!("http://x/{n}"),
                document(&format!("config_url: http://x/{next}\nlatchkey: {{deadline: {n}s}}")),
            )
        })
        .collect();
    let chain: Vec<(&str, &str)> =
        chain.iter().map(|(url, text)| (url.as_str(), text.as_str())).collect();
    let (config, asked) = load(&[&format!("config_url: http://x/1\n{SERVER}")], "", &chain);
    let config = config.unwrap();
    assert_eq!((asked.len(), config.deadline.as_secs()), (4, 4));
    assert_eq!(config.unfetched.len(), 1);

    // A circle ends, and the file of /oem that is also in /run/cos/oem costs one request.
    let circle = document("config_url: http://x/1\nlatchkey: {deadline: 9s}");
    let file = format!("config_url: http://x/1\n{SERVER}");
    let (config, asked) = load(&[&file, &file], "", &[("http://x/1", &circle)]);
    let config = config.unwrap();
    assert_eq!((config.deadline.as_secs(), asked.len()), (9, 1));
    config.complete().unwrap();

    let files: Vec<String> =
        (0..20).map(|n| format!("config_url: http://x/{n}\n{SERVER}")).collect();
    let files: Vec<&str> = files.iter().map(String::as_str).collect();
    let (config, asked) = load(&files, "", &[]);
    assert_eq!((config.unwrap().unfetched.len(), asked.len()), (20, 8));
}

#[test]
fn without_its_document_a_machine_goes_on_only_if_it_knows_its_mode() {
    let url = "config_url: 'http://x/1?token=hunter2'";
    for (file, cmdline, mode) in [
        (SERVER, "", Some(1)),
        ("kcrypt: {challenger: {challenger_server: ''}}", "", Some(0)),
        ("kcrypt: {challenger: {challenger_server: []}}", "", Some(0)),
        ("", "kcrypt.challenger.challenger_server=http://a", Some(1)),
        ("", "kcrypt.challenger.challenger_server=", Some(0)),
        ("", "", None),
        ("kcrypt: {challenger: {challenger_server: null}}", "", None),
        ("kcrypt: {challenger: {nv_index: 0x1500001}}", "", None),
        ("install: {encrypted_partitions: [A]}", "", None),
    ] {
        let (config, _) = load(&[&format!("{url}\n{file}")], cmdline, &[]);
        match (config, mode) {
            (Ok(config), Some(servers)) => {
                assert_eq!(config.challenger.servers.len(), servers, "{file} {cmdline}");
                assert_eq!(config.unfetched.len(), 1);
                assert!(matches!(config.complete(), Err(ConfigError::Incomplete { .. })));
                assert!(!config.unfetched[0].contains("hunter2"));
            }
            (Err(error @ ConfigError::NotFetched { .. }), None) => {
                let text = error.to_string();
                assert!(
                    text.contains("0.yaml:2: config_url: http://x/1?...: no route to host"),
                    "{text}"
                );
                assert!(!text.contains("hunter2"));
            }
            (other, _) => panic!("{file} {cmdline}: {other:?}"),
        }
    }
}

#[test]
fn what_is_no_document_is_as_good_as_none_and_what_is_wrong_in_one_is_an_error() {
    let url = "config_url: http://x/1";
    let large = document(&"#".repeat(2 * 1024 * 1024));
    for text in ["<html>Log in to the hotel</html>", "", "kcrypt: {nv_index: 0x1500001}", &large] {
        let (config, _) = load(&[url], "", &[("http://x/1", text)]);
        assert!(matches!(config, Err(ConfigError::NotFetched { .. })));
        let (config, _) = load(&[&format!("{url}\n{SERVER}")], "", &[("http://x/1", text)]);
        assert_eq!(config.unwrap().unfetched.len(), 1);
    }
    for text in [
        "kcrypt: {challenger: {challenger_sever: x}}",
        "a: [",
        "kcrypt: {challenger: {certificate: /nowhere/ca.pem}}",
        "kcrypt: {challenger: {challenger_server: ['http://b']}}",
        "config_url: x",
    ] {
        let (config, _) =
            load(&[&format!("{url}\n{SERVER}")], "", &[("http://x/1", &document(text))]);
        assert!(config.unwrap_err().to_string().contains("http://x/1:"), "{text}");
    }
    // Templates are Kairos' own; they are not silently left as they are.
    let (config, asked) = load(&["config_url: 'http://x/{{ .UUID }}'"], "", &[]);
    assert!(matches!(config, Err(ConfigError::NotFetched { .. })) && asked.is_empty());
}

#[test]
fn a_typing_error_in_config_url_is_one() {
    for text in ["config_ulr: http://x", "config-url: http://x", "Config_Url: http://x"] {
        let (config, _) = load(&[text], "", &[]);
        assert!(
            matches!(&config, Err(ConfigError::UnknownKey { nearest: Some(n), .. }) if n == "config_url"),
            "{text}: {config:?}"
        );
    }
    for value in ["ftp://x", "x", "true", "[http://x]", "http://u:p@x", "'http://x y'"] {
        let (config, _) = load(&[&format!("config_url: {value}")], "", &[]);
        assert!(config.is_err(), "{value}");
    }
    assert!(load(&["config_url: ''"], "", &[]).0.is_ok());
    // Somebody else's mapping of a similar name.
    assert!(load(&["config_uri: {a: b}"], "", &[]).0.is_ok());
}

/// A document that says `certificate` is trusted no sooner than it is there.
#[test]
fn the_fetch_trusts_the_certificate_of_the_local_files() {
    let dir = tempfile::tempdir().unwrap();
    let pem = "-----BEGIN CERTIFICATE-----\nMIIBszCCAVmgAwIBAgIU\n-----END CERTIFICATE-----\n";
    fs::write(dir.path().join("ca.pem"), pem).unwrap();
    fs::write(
        dir.path().join("1.yaml"),
        "#cloud-config\nconfig_url: https://x/1\nkcrypt: {challenger: {certificate: /oem/ca.pem}}\n",
    )
    .unwrap();
    let local = latchkey_config::Local::read(&[dir.path()], "").unwrap();
    // By now the file system may be gone.
    drop(dir);
    let config = local.fetch(&mut |request: &Request<'_>| {
        assert_eq!((request.url, request.certificate), ("https://x/1", Some(pem)));
        assert_eq!(request.max_bytes, 2 * 1024 * 1024);
        Ok(document(SERVER).into_bytes())
    });
    let config = config.unwrap();
    assert_eq!(config.challenger.servers, ["http://a"]);
    assert_eq!(config.challenger.certificate.as_deref(), Some(pem));
}
