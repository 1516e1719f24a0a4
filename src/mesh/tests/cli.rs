//! The command line as an operator, or a script made for Ikto, uses it; the agent is its admin service alone.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::thread;

use latchkey_mesh::admin::Server;
use latchkey_mesh::view::{MemberView, Node, RegistryState, RegistryView, View};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::sync::watch;

fn latchkey() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_latchkey"));
    command.args(["--cloud-config", "/nonexistent"]);
    command
}

fn run(arguments: &[&str]) -> Output {
    latchkey().args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

fn known() -> View {
    View {
        version: 1,
        node: Node {
            name: "node-A".into(),
            public_key: "WzPYRHCzki0WlvHTleeBt8ig6hXKZ9N5PXpt/DxIIkE=".into(),
            mesh: "fd10::/16".into(),
            allowed_ip: Some("fd10:aaaa:1::/48".into()),
            advertise_address: "10.99.1.2".into(),
            wg_port: 51820,
            interface: "wg-none".into(),
            ..Node::default()
        },
        registry: Some(RegistryView { state: RegistryState::Joined, ..RegistryView::default() }),
        members: vec![MemberView {
            name: "node-B\u{1b}[2J".into(),
            public_key: "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=".into(),
            advertise_address: "10.99.2.2".into(),
            wg_port: 51821,
            allowed_ips: vec!["fd10:bbbb:2::/48".into()],
            ..MemberView::default()
        }],
        ..View::default()
    }
}

/// The admin service in a thread of its own, which ends with the process.
fn agent(directory: &Path) -> (PathBuf, watch::Sender<Arc<View>>) {
    let socket = directory.join("admin.sock");
    let server = Server::bind(&socket).unwrap();
    let (sender, view) = watch::channel(Arc::new(known()));
    thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(server.serve(view)).unwrap();
    });
    (socket, sender)
}

#[test]
fn info_prints_what_ikto_prints() {
    let directory = tempfile::tempdir().unwrap();
    let (socket, _view) = agent(directory.path());
    let run = run(&["info", "--socket", socket.to_str().unwrap()]);
    assert!(run.status.success() && run.stderr.is_empty(), "{run:?}");
    assert_eq!(
        text(&run.stdout),
        "\
Local Node:
Name: node-A
Public Key: WzPYRHCzki0WlvHTleeBt8ig6hXKZ9N5PXpt/DxIIkE=
Advertise Address: 10.99.1.2
Allowed IP: fd10:aaaa:1::/48
WireGuard Port: 51820

Peers:
Name: node-B\\u{1b}[2J
Public Key: hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=
Advertise Address: 10.99.2.2
Allowed IP: fd10:bbbb:2::/48
WireGuard Port: 51821

"
    );
}

#[test]
fn init_prints_the_json_and_nothing_else() {
    let run = run(&["init", "-m", "10.64.0.1/10", "-p", "24"]);
    assert!(run.status.success() && run.stderr.is_empty(), "{run:?}");
    assert!(
        text(&run.stdout).starts_with("{\n  \"name\": \"\",\n") && run.stdout.ends_with(b"}\n")
    );
    let config: serde_json::Value = serde_json::from_slice(&run.stdout).unwrap();
    assert_eq!(config["mesh_cidr"], "10.64.0.0/10");
    assert_eq!(config["subnet_prefix"], 24);
    let config: serde_json::Value = serde_json::from_slice(&self::run(&["init"]).stdout).unwrap();
    assert_eq!(config["mesh_cidr"], "fd10::/16");
    assert_eq!(config["subnet_prefix"], 48);
}

/// An error is one line on stderr that names what it is about, and a code; stdout stays empty.
#[test]
fn errors_name_what_they_are_about() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let (nobody, missing, broken) = (at("nobody.sock"), at("missing.json"), at("broken.json"));
    std::fs::write(&broken, r#"{"wg_port": "51820"}"#).unwrap();
    let cases: &[(&[&str], i32, &str)] = &[
        (&["info", "--socket", &nobody], 1, &nobody),
        (&["status", "--socket", &nobody], 1, &nobody),
        (&["agent", "-c", &missing], 10, &missing),
        (&["agent", "--config", &broken, "--socket", &nobody], 10, "wg_port"),
        (&["leave", "-c", &missing], 10, &missing),
        (&["registry", "create", "-c", &missing], 10, &missing),
        (&["agent", "--down"], 10, "latchkey.mesh"),
        (&["init", "-m", "fd10::/16", "-p", "129"], 2, "--subnet-prefix-length"),
        (&["init", "-m", "everything"], 2, "--mesh-ip-net"),
    ];
    for (arguments, code, about) in cases {
        let run = run(arguments);
        let said = text(&run.stderr);
        assert_eq!(run.status.code(), Some(*code), "{arguments:?}: {said}");
        assert!(said.contains(about) && said.lines().count() == 1, "{arguments:?}: {said}");
        assert!(run.stdout.is_empty(), "{arguments:?}");
    }
}

/// What stands in a file, a record or an answer reaches no terminal but as printed characters.
#[test]
fn errors_are_obeyed_by_no_terminal() {
    let run = run(&["agent", "-c", "/nonexistent/\u{1b}[2J\nerror: all is well\u{7}"]);
    let said = text(&run.stderr);
    assert!(said.contains("/nonexistent/\\u{1b}[2J\\nerror: all is well\\u{7}"), "{said}");
    assert!(said.lines().count() == 1 && !said.contains('\u{1b}'), "{said}");
}

#[test]
fn flags_that_do_not_go_together_are_refused() {
    let refused: &[&[&str]] = &[
        &["agent", "--down", "--metrics", "127.0.0.1:1"],
        &["status", "--boot", "--watch"],
        &["status", "--boot", "-c", "x"],
        &["status", "--json", "--verbose"],
        &["info", "-s", "/tmp/x.sock"], // Ikto's info has no short form
        &["agent", "--metrics", "9586"],
        &["registry", "create", "--replicas", "0"],
    ];
    for arguments in refused {
        assert_eq!(run(arguments).status.code(), Some(2), "{arguments:?}");
    }
}

#[test]
fn status_finds_the_node_by_its_socket_alone() {
    let directory = tempfile::tempdir().unwrap();
    let (socket, _view) = agent(directory.path());
    let run = run(&["status", "--socket", socket.to_str().unwrap()]);
    let said = text(&run.stdout);
    assert_eq!(run.status.code(), Some(3), "the device is not there: {run:?}");
    for line in [
        "interface: wg-none\n  name: node-A\n  device: none\n",
        "  registry: joined (",
        "fd10:bbbb:2::/48  node-B\\u{1b}[2J  (not on the device)  never",
    ] {
        assert!(said.contains(line), "{said}");
    }
}

#[test]
fn status_watch_tells_changes_until_it_is_interrupted() {
    let directory = tempfile::tempdir().unwrap();
    let (socket, view) = agent(directory.path());
    let mut watching = latchkey()
        .args(["status", "--watch", "--socket", socket.to_str().unwrap()])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(watching.stdout.take().unwrap()).lines().map(Result::unwrap);
    assert!(lines.any(|line| line.contains("node-B")), "the first look is whole");
    let mut changed = known();
    changed.members[0].public_key = changed.node.public_key.clone();
    changed.members[0].name = "node-C".into();
    let registry = changed.registry.as_mut().unwrap();
    registry.state = RegistryState::Away;
    registry.reason = Some("unplugged".into());
    view.send_replace(Arc::new(changed));
    assert!(lines.next().unwrap().starts_with("registry: away: unplugged"));
    assert_eq!(lines.next().unwrap(), "peer node-C: new");
    assert_eq!(lines.next().unwrap(), "peer node-B\\u{1b}[2J: gone");
    kill(Pid::from_raw(watching.id().try_into().unwrap()), Signal::SIGINT).unwrap();
    assert_eq!(watching.wait().unwrap().code(), Some(0));
    assert_eq!(lines.next(), None);
}

#[test]
fn status_watch_as_json_is_a_line_each() {
    let directory = tempfile::tempdir().unwrap();
    let (socket, view) = agent(directory.path());
    let mut watching = latchkey()
        .args(["status", "--watch", "--json", "--socket", socket.to_str().unwrap()])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(watching.stdout.take().unwrap()).lines().map(Result::unwrap);
    let mut name = || {
        let status: serde_json::Value = serde_json::from_str(&lines.next().unwrap()).unwrap();
        status["agent"]["node"]["name"].clone()
    };
    assert_eq!(name(), "node-A");
    view.send_modify(|view| Arc::make_mut(view).node.name = "node-Z".into());
    assert_eq!(name(), "node-Z");
    // Whoever reads no more ends it.
    drop(lines);
    view.send_modify(|view| Arc::make_mut(view).node.name = "node-Y".into());
    assert_eq!(watching.wait().unwrap().code(), Some(0));
}
