use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use prost::Message as _;
use tokio::sync::{oneshot, watch};

use super::*;
use crate::error::Error;
use crate::view::{MemberView, Node, View};

const KEY: &str = "WzPYRHCzki0WlvHTleeBt8ig6hXKZ9N5PXpt/DxIIkE=";

fn member(name: &str, key: &str, allowed_ips: &[&str]) -> MemberView {
    MemberView {
        name: name.into(),
        public_key: key.into(),
        advertise_address: "10.99.2.2".into(),
        wg_port: 51821,
        allowed_ips: allowed_ips.iter().map(ToString::to_string).collect(),
        ..MemberView::default()
    }
}

fn known() -> View {
    View {
        version: crate::view::VERSION,
        node: Node {
            name: "node-A".into(),
            public_key: KEY.into(),
            allowed_ip: Some("fd10:aaaa:1::/48".into()),
            advertise_address: "10.99.1.2".into(),
            wg_port: 51820,
            ..Node::default()
        },
        members: vec![
            member("node-C", "c", &["fd10:cccc::/48"]),
            member("node-B", "z", &["fd10:bbbb:2::/48"]),
            member("node-B", "b", &["fd10:bbbb:4::/48", "fd10:bbbb:3::/48"]),
        ],
        ..View::default()
    }
}

/// A server in a thread of its own, as the agent has it in its loop.
struct Running {
    directory: tempfile::TempDir,
    view: watch::Sender<Arc<View>>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Running {
    fn start(view: View) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let server = Server::bind(&directory.path().join("admin.sock")).unwrap();
        let (view, shown) = watch::channel(Arc::new(view));
        let (stop, stopped) = oneshot::channel();
        let thread = thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                tokio::select! {
                    ended = server.serve(shown) => panic!("{ended:?}"),
                    _ = stopped => {}
                }
            });
        });
        Self { directory, view, stop: Some(stop), thread: Some(thread) }
    }

    fn socket(&self) -> std::path::PathBuf {
        self.directory.path().join("admin.sock")
    }

    fn stop(&mut self) {
        drop(self.stop.take());
        self.thread.take().into_iter().for_each(|thread| thread.join().unwrap());
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.stop.take());
    }
}

#[test]
fn what_the_agent_knows_comes_over_the_socket() {
    let running = Running::start(known());
    let info = node_info(&running.socket()).unwrap();
    let node = info.node.unwrap();
    assert_eq!((node.name.as_str(), node.public_key.as_str()), ("node-A", KEY));
    assert_eq!((node.allowed_ip.as_str(), node.wg_port), ("fd10:aaaa:1::/48", 51820));
    assert_eq!(node.advertise_address, "10.99.1.2");
    let peers: Vec<_> =
        info.peers.iter().map(|peer| (&*peer.name, &*peer.public_key, &*peer.allowed_ip)).collect();
    assert_eq!(
        peers,
        [
            ("node-B", "b", "fd10:bbbb:3::/48"),
            ("node-B", "b", "fd10:bbbb:4::/48"),
            ("node-B", "z", "fd10:bbbb:2::/48"),
            ("node-C", "c", "fd10:cccc::/48"),
        ]
    );
    assert_eq!(view(&running.socket()).unwrap(), known());

    running.view.send_replace(Arc::new(View::default()));
    assert_eq!(view(&running.socket()).unwrap(), View::default());
    assert!(node_info(&running.socket()).unwrap().peers.is_empty());
}

#[test]
fn five_thousand_members_fit_into_an_answer() {
    let members =
        (0..5000).map(|number| member(&format!("node-{number:04}"), KEY, &["fd10::1/128"]));
    let running = Running::start(View { members: members.collect(), ..known() });
    assert_eq!(view(&running.socket()).unwrap().members.len(), 5000);
    let info = node_info(&running.socket()).unwrap();
    assert!(info.peers.iter().map(|peer| &peer.name).is_sorted());
    // What a Go client takes unless it is told otherwise.
    assert!(info.encoded_len() < 4 << 20, "{}", info.encoded_len());
}

/// Numbers, types and order of Ikto's messages (protocols/ikto-kilo.md §1.9).
#[test]
fn messages_have_ikto_s_numbers() {
    let peer = Peer {
        name: "n".into(),
        public_key: "k".into(),
        advertise_address: "a".into(),
        wg_port: 51820,
        allowed_ip: "i".into(),
    };
    let wire = b"\x0a\x01n\x12\x01k\x1a\x01a\x28\xec\x94\x03\x32\x01i";
    assert_eq!(peer.encode_to_vec(), wire);
    let info = NodeInfo { node: Some(peer), peers: vec![Peer::default()] };
    assert_eq!(info.encode_to_vec(), [b"\x0a\x10", &wire[..], b"\x22\x00"].concat());
    // Number 4 of a peer was once in use, and is skipped.
    let old = Peer::decode(&b"\x0a\x01n\x22\x02xx\x32\x01i"[..]).unwrap();
    assert_eq!((old.name.as_str(), old.allowed_ip.as_str()), ("n", "i"));
}

#[test]
fn a_method_that_is_not_there_is_said() {
    let running = Running::start(known());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let answer = runtime
        .block_on(client::call::<NodeInfo>(&running.socket(), "/latchkey.v1.AdminService/Nothing"));
    let error = answer.unwrap_err().to_string();
    assert!(error.contains("does not know the method"), "{error}");
}

#[test]
fn garbage_harms_nobody() {
    let running = Running::start(known());
    let mut random = [0; 4096];
    getrandom::fill(&mut random).unwrap();
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let too_long = [&preface[..], &[0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 1], &random[..]].concat();
    let a_long_header = {
        let mut frames = preface.to_vec();
        frames.extend([0, 0, 0, 4, 0, 0, 0, 0, 0]); // SETTINGS
        for kind in [1].into_iter().chain([9; 200]) {
            frames.extend([0x00, 0x40, 0x00, kind, 0, 0, 0, 0, 1]); // HEADERS, CONTINUATION: 16 KiB each
            frames.extend([b'a'; 0x4000]);
        }
        frames
    };
    for garbage in
        [&b""[..], b"GET /metrics HTTP/1.1\r\n\r\n", &random, preface, &too_long, &a_long_header]
    {
        let mut stream = UnixStream::connect(running.socket()).unwrap();
        stream.set_write_timeout(Some(Duration::from_secs(10))).unwrap();
        let _ = stream.write_all(garbage); // it may be cut short
        let _ = stream.shutdown(std::net::Shutdown::Write);
        assert_eq!(node_info(&running.socket()).unwrap().peers.len(), 4);
    }
}

/// More connections than there are places, none of which says anything: each new one makes the oldest go.
#[test]
fn a_thousand_silent_clients_keep_nobody_out() {
    let running = Running::start(known());
    let mut silent: Vec<_> =
        (0..1000).map(|_| UnixStream::connect(running.socket()).unwrap()).collect();
    assert_eq!(node_info(&running.socket()).unwrap().peers.len(), 4);
    let mut first = silent.swap_remove(0);
    first.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    // The server's own preface, then the end.
    first.read_to_end(&mut Vec::new()).unwrap();
    assert_eq!(view(&running.socket()).unwrap(), known());
}

/// An answer that nobody reads stays in the server's bounds.
#[test]
fn a_client_that_does_not_read_keeps_nobody_out() {
    let members: Vec<_> = (0..5000)
        .map(|number| member(&format!("node-{number:04}"), KEY, &["fd10::1/128"]))
        .collect();
    let running = Running::start(View { members, ..known() });
    let mut clients = Vec::new();
    for _ in 0..20 {
        let mut stream = UnixStream::connect(running.socket()).unwrap();
        let mut request = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0".to_vec();
        // POST, http, the path, all as literals without an index (RFC 7541 §6.2.2); then an empty message.
        let path = b"/latchkey.v1.AdminService/View";
        let mut headers = vec![0x83, 0x86, 0x04, path.len() as u8];
        headers.extend(path);
        headers.extend(b"\x0f\x10\x10application/grpc");
        request.extend([0, 0, headers.len() as u8, 1, 4, 0, 0, 0, 1]);
        request.extend(headers);
        request.extend(b"\0\0\x05\0\x01\0\0\0\x01\0\0\0\0\0");
        stream.write_all(&request).unwrap();
        clients.push(stream);
    }
    assert_eq!(view(&running.socket()).unwrap().members.len(), 5000);
    // They were answered, as far as the window lets one.
    let mut last = clients.pop().unwrap();
    last.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let mut answer = vec![0; 32 * 1024];
    last.read_exact(&mut answer).unwrap();
    assert!(answer.windows(9).any(|part| part == b"node-0000"));
}

#[test]
fn the_socket_is_its_owner_s_and_goes_with_the_agent() {
    let mut running = Running::start(known());
    let socket = running.socket();
    assert_eq!(fs::symlink_metadata(&socket).unwrap().permissions().mode() & 0o7777, 0o600);
    running.stop();
    assert!(!socket.exists());
    assert!(matches!(view(&socket), Err(Error::NoAgent { .. })));
}

#[test]
fn another_s_socket_in_its_place_is_left_alone() {
    let mut running = Running::start(known());
    let socket = running.socket();
    fs::remove_file(&socket).unwrap();
    let _other = UnixListener::bind(&socket).unwrap();
    running.stop();
    assert!(socket.exists());
}

#[test]
fn a_dead_socket_is_replaced_and_a_living_one_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("admin.sock");
    drop(UnixListener::bind(&socket).unwrap()); // as an agent that was killed leaves it
    assert!(socket.exists());
    let first = Server::bind(&socket).unwrap();
    let error = Server::bind(&socket).unwrap_err();
    assert!(matches!(error, Error::SocketTaken { .. }), "{error}");
    assert_eq!(error.exit_code(), 1);
    UnixStream::connect(&socket).unwrap();
    drop(first);
    Server::bind(&socket).unwrap();
}

#[test]
fn agents_that_start_at_once_do_not_take_each_other_s_socket() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("admin.sock");
    drop(UnixListener::bind(&socket).unwrap());
    let agents: Vec<_> = (0..8)
        .map(|_| {
            let socket = socket.clone();
            thread::spawn(move || Server::bind(&socket))
        })
        .collect();
    let bound: Vec<_> = agents.into_iter().filter_map(|agent| agent.join().unwrap().ok()).collect();
    assert_eq!(bound.len(), 1);
    UnixStream::connect(&socket).unwrap();
}

#[test]
fn what_is_no_socket_is_never_removed() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    fs::write(at("file"), "precious").unwrap();
    fs::create_dir(at("directory")).unwrap();
    symlink(at("file"), at("link")).unwrap();
    symlink(at("nowhere"), at("dangling")).unwrap();
    drop(UnixListener::bind(at("dead")).unwrap());
    symlink(at("dead"), at("link-to-dead")).unwrap();
    for name in ["file", "directory", "link", "dangling", "link-to-dead"] {
        let error = Server::bind(&at(name)).unwrap_err();
        assert!(matches!(error, Error::NotASocket { .. }), "{name}: {error}");
        assert!(fs::symlink_metadata(at(name)).is_ok(), "{name}");
    }
    assert_eq!(fs::read_to_string(at("file")).unwrap(), "precious");
    assert!(at("dead").exists() && !at("nowhere").exists());

    let _datagrams = UnixDatagram::bind(at("datagrams")).unwrap();
    assert!(matches!(Server::bind(&at("datagrams")), Err(Error::SocketTaken { .. })));
}

#[test]
fn a_directory_where_anybody_may_replace_the_socket_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("admin.sock");
    let allow = |mode| {
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(mode)).unwrap();
    };
    allow(0o777);
    assert!(matches!(Server::bind(&socket), Err(Error::UnsafeDirectory { .. })));
    assert!(!socket.exists());
    allow(0o1777); // as /tmp
    Server::bind(&socket).unwrap();
    let missing = directory.path().join("missing").join("admin.sock");
    assert!(matches!(Server::bind(&missing), Err(Error::File { .. })));
    let long = directory.path().join("x".repeat(108));
    assert!(matches!(Server::bind(&long), Err(Error::File { .. })));
}

/// Somebody holds the lock of /tmp for ever: that delays an agent, and no more.
#[test]
fn a_directory_that_is_locked_is_used_all_the_same() {
    let directory = tempfile::tempdir().unwrap();
    let lock = fs::File::open(directory.path()).unwrap();
    lock.lock().unwrap();
    Server::bind(&directory.path().join("admin.sock")).unwrap();
}

#[test]
fn no_agent_is_told_from_one_that_talks_nonsense() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("admin.sock");
    let error = node_info(&socket).unwrap_err();
    assert!(matches!(error, Error::NoAgent { .. }), "{error}");
    assert_eq!(error.exit_code(), 1);

    let listener = UnixListener::bind(&socket).unwrap();
    let nonsense = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").unwrap();
        let _ = stream.read(&mut [0; 1024]);
    });
    let error = node_info(&socket).unwrap_err();
    assert!(matches!(error, Error::Agent { .. }), "{error}");
    nonsense.join().unwrap();
}

#[test]
fn a_client_waits_for_no_silent_agent() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("admin.sock");
    let _silent = UnixListener::bind(&socket).unwrap();
    let error = view(&socket).unwrap_err().to_string();
    assert!(error.contains("no answer within 10 s"), "{error}");
}

#[test]
fn ikto_s_place_goes_first_unless_nothing_of_ours_is_there() {
    let directory = tempfile::tempdir().unwrap();
    let (ikto, service) = (&directory.path().join("ikto.sock"), &directory.path().join("service"));
    assert_eq!(one_of(ikto, service), ikto); // the error names what Ikto's users know
    let _service = UnixListener::bind(service).unwrap();
    assert_eq!(one_of(ikto, service), service);
    fs::write(ikto, "").unwrap();
    assert_eq!(one_of(ikto, service), service);
    fs::remove_file(ikto).unwrap();
    let _ikto = UnixListener::bind(ikto).unwrap();
    assert_eq!(one_of(ikto, service), ikto);
    if nix::unistd::geteuid().is_root() {
        std::os::unix::fs::chown(ikto, Some(65534), None).unwrap();
        assert_eq!(one_of(ikto, service), service, "a stranger's");
    }
}
