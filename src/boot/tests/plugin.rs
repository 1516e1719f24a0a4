//! kcrypt's plugin contract: one event on stdin, one JSON object on stdout, exit code 0.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

#[allow(unreachable_pub)]
mod common;

use common::{Machine, answering, serve};
use latchkey_soft_tpm::SoftTpm;
use serde_json::{Value, json};

/// ghw's partition, as generation 1 passes it: `label` is the partition table's.
fn flat(kind: &str) -> Value {
    json!({"name": "sda3", "label": "persistent", "mount_point": "", "size_bytes": 1, "type": kind,
           "read_only": true, "uuid": "9a1b", "filesystem_label": "COS_PERSISTENT"})
}

fn nested(kind: &str) -> Value {
    json!({"partition": {"name": "sda3", "partition_label": "persistent", "label": "COS_PERSISTENT",
                         "size": 1, "fs": kind, "flags": [], "uuid": "9a1b"}})
}

fn event(data: &Value) -> Vec<u8> {
    json!({"name": "discovery.password", "data": data.to_string(), "file": ""})
        .to_string()
        .into_bytes()
}

fn ask(machine: &Machine, event: &[u8], environment: &[(&str, &str)]) -> Value {
    let run = machine.run_with(&["discovery.password"], event, environment);
    assert_eq!(run.code, 0, "{}", run.stderr);
    assert!(!run.stdout.ends_with(b"\n"));
    let answer: Value = serde_json::from_slice(&run.stdout).unwrap();
    let mut keys: Vec<_> = answer.as_object().unwrap().keys().collect();
    keys.sort();
    assert_eq!(keys, ["data", "error", "log", "state"]);
    answer
}

#[test]
fn both_payload_shapes_are_answered() {
    let machine = Machine::new(SoftTpm::fresh());
    machine.serve(serve(vec![answering(r#"{"passphrase":"p & q"}"#)]));
    for data in [flat("crypto_LUKS"), nested("crypto_LUKS")] {
        let answer = ask(&machine, &event(&data), &[]);
        assert_eq!((answer["data"].as_str(), answer["error"].as_str()), (Some("p & q"), Some("")));
    }
}

#[test]
fn a_long_event_comes_by_file() {
    let machine = Machine::new(SoftTpm::fresh());
    machine.serve(serve(vec![answering(r#"{"passphrase":"from file"}"#)]));
    let path = machine.config.0.join("event.json");
    std::fs::write(&path, flat("crypto_LUKS").to_string()).unwrap();
    let event = json!({"name": "discovery.password", "data": "", "file": path}).to_string();
    assert_eq!(ask(&machine, event.as_bytes(), &[])["data"], "from file");
}

#[test]
fn the_environment_and_the_payload_may_name_the_server() {
    let machine = Machine::new(SoftTpm::fresh());
    let server = format!("http://{}", serve(vec![answering(r#"{"passphrase":"elsewhere"}"#)]));
    machine.configure("challenger_server: http://127.0.0.1:9");
    assert_eq!(
        ask(&machine, &event(&flat("crypto_LUKS")), &[("WSS_SERVER", &server)])["data"],
        "elsewhere"
    );
    let mut data = nested("crypto_LUKS");
    data["challenger_server"] = json!(server);
    assert_eq!(ask(&machine, &event(&data), &[])["data"], "elsewhere");
}

/// Kairos knows one server; a second one that only we read is not forgotten for it.
#[test]
fn a_server_that_is_one_of_the_configured_ones_leaves_the_others_in_place() {
    let machine = Machine::new(SoftTpm::fresh());
    let good = serve(vec![answering(r#"{"passphrase":"from the second"}"#)]);
    machine.configure(&format!("challenger_server: ['http://127.0.0.1:9', 'http://{good}']"));
    let mut data = nested("crypto_LUKS");
    data["challenger_server"] = json!("http://127.0.0.1:9");
    assert_eq!(ask(&machine, &event(&data), &[])["data"], "from the second");
    data["challenger_server"] = json!("http://127.0.0.1:10");
    let answer = ask(&machine, &event(&data), &[]);
    assert!(answer["error"].as_str().unwrap().contains("127.0.0.1:10"), "{answer}");
}

#[test]
fn the_payload_may_ask_for_multicast_dns() {
    let machine = Machine::new(SoftTpm::fresh());
    machine.configure("challenger_server: http://127.0.0.1:9");
    let mut data = nested("crypto_LUKS");
    data["mdns"] = json!(true);
    let answer = ask(&machine, &event(&data), &[]);
    assert!(answer["error"].as_str().unwrap().contains(".local"), "{answer}");
}

#[test]
fn trouble_is_an_answer_with_an_error_and_nothing_else_on_stdout() {
    let machine = Machine::new(SoftTpm::fresh());
    for (event, word) in [
        (b"".to_vec(), "failed reading payload"),
        (b"{\"data\":\"{\"}".to_vec(), "failed reading payload"),
        (b"{\"data\":\"{}\"}".to_vec(), "partition is required"),
        (vec![b' '; 100_000], "more than"),
        (event(&flat("crypto_LUKS")), "no passphrase of its own"),
    ] {
        let answer = ask(&machine, &event, &[]);
        assert_eq!(answer["data"], "");
        assert!(answer["error"].as_str().unwrap().contains(word), "{answer}");
    }
}

/// Kairos asks the plugin at installation and at boot alike; only the partition tells which it is.
#[test]
fn a_passphrase_is_made_for_a_partition_that_is_not_luks_yet_and_then_kept() {
    let mut machine = Machine::new(SoftTpm::fresh());
    let made = ask(&machine, &event(&flat("ext4")), &[]);
    let passphrase = made["data"].as_str().unwrap().to_owned();
    assert_eq!(passphrase.len(), 52, "{made}");
    machine.tpm.restart();
    for data in [flat("crypto_LUKS"), flat("ext4"), nested("crypto_LUKS")] {
        assert_eq!(ask(&machine, &event(&data), &[])["data"], passphrase.as_str());
    }
}
