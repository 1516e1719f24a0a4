//! The NATS registry against real servers: what its trait promises, with all that servers, operators and networks do to it.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use latchkey_mesh::registry::nats::{BucketOptions, BucketState, Nats, NatsWatch, create_bucket};
use latchkey_mesh::registry::{Entry, Event, Expected, Registry, RegistryError, Watch};
use latchkey_mesh::settings::{Login, Pem, RegistrySettings, Secret, Server, Tls};
use latchkey_tests::nats::{self, Client, NatsCluster, NatsServer, Operator};
use latchkey_tests::tls;
use serde_json::json;
use tokio::time::timeout;
use zeroize::Zeroizing;

const BUCKET: &str = "ikto-mesh";
/// Longest wait for anything: a lost consumer is noticed after 11 s, and read again a moment later.
const PATIENCE: Duration = Duration::from_secs(60);

const ADMIN: nats::Login<'_> = nats::Login::Password("admin", "admin-password");
const NOBODY: nats::Login<'_> = nats::Login::None;

fn secret(text: &str) -> Secret {
    Secret(Zeroizing::new(text.to_owned()))
}

fn settings(address: SocketAddr, login: Login) -> RegistrySettings {
    let server = Server { host: address.ip().to_string(), port: address.port(), tls: false };
    RegistrySettings { servers: vec![server], bucket: BUCKET.into(), login, tls: Tls::default() }
}

fn open(server: &NatsServer) -> Nats {
    Nats::connect(settings(server.address(), Login::None)).unwrap()
}

/// A server with an empty bucket and no users.
fn plain(name: &str) -> NatsServer {
    let mut server = NatsServer::new(name).unwrap();
    server.start().unwrap();
    server.client(&NOBODY).unwrap().create_bucket(BUCKET).unwrap();
    server
}

/// A server with an administrator, and a member with least permissions that owns `peers.own`.
fn guarded(name: &str) -> NatsServer {
    let member = nats::member_permissions(BUCKET, &["peers.own"]);
    let mut server = NatsServer::new(name).unwrap().configure(&format!(
        "accounts {{ MESH {{ jetstream: enabled, users: [\n{}\n{}\n] }} }}",
        nats::user("admin", "admin-password", None),
        nats::user("member", "member-password", Some(&member)),
    ));
    server.start().unwrap();
    server.client(&ADMIN).unwrap().create_bucket(BUCKET).unwrap();
    server
}

fn member() -> Login {
    Login::Password { user: "member".into(), password: secret("member-password") }
}

async fn next(watch: &mut NatsWatch) -> Event {
    timeout(PATIENCE, watch.next()).await.expect("the registry says nothing")
}

/// The next snapshot, whatever is said before it.
async fn snapshot(watch: &mut NatsWatch) -> (String, Vec<(String, Vec<u8>, u64)>) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Event::Snapshot { incarnation, entries } = next(watch).await {
            let entries = entries.into_iter().map(|e| (e.key, e.value.to_vec(), e.revision));
            return (incarnation, entries.collect());
        }
        assert!(Instant::now() < deadline, "no snapshot");
    }
}

/// The next word of absence.
async fn away(watch: &mut NatsWatch) -> String {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Event::Away { reason } = next(watch).await {
            return reason;
        }
        assert!(Instant::now() < deadline, "not away");
    }
}

/// Words of absence, until one has `words` in it.
async fn away_for(watch: &mut NatsWatch, words: &str) -> String {
    let deadline = Instant::now() + PATIENCE;
    let mut all = Vec::new();
    while Instant::now() < deadline {
        match timeout(PATIENCE, watch.next()).await {
            Ok(Event::Away { reason }) if reason.contains(words) => return reason,
            Ok(event) => all.push(event),
            Err(_) => break,
        }
    }
    panic!("not away for {words:?}: {all:#?}");
}

fn entry(key: &str, value: &str, revision: u64) -> (String, Vec<u8>, u64) {
    (key.into(), value.as_bytes().to_vec(), revision)
}

#[tokio::test]
async fn a_watch_begins_with_all_and_goes_on_with_what_changes() {
    let server = plain("watch");
    let mut admin = server.client(&NOBODY).unwrap();
    admin.put(BUCKET, "peers.a", "1").unwrap();
    admin.put(BUCKET, "peers.b", "2").unwrap();
    admin.put(BUCKET, "peers.a", "3").unwrap();
    admin.put(BUCKET, "peers.gone", "4").unwrap();
    admin.delete(BUCKET, "peers.gone").unwrap();
    admin.put(BUCKET, "other", "5").unwrap();
    admin.put(BUCKET, "peers.a.b", "6").unwrap();

    let registry = open(&server);
    let mut watch = registry.watch();
    let Event::Snapshot { entries, .. } = next(&mut watch).await else { panic!("no snapshot") };
    let entries: Vec<_> =
        entries.into_iter().map(|e| (e.key, e.value.to_vec(), e.revision)).collect();
    assert_eq!(entries, [entry("peers.b", "2", 2), entry("peers.a", "3", 3)]);

    admin.put(BUCKET, "peers.c", "8").unwrap();
    let c = Entry { key: "peers.c".into(), value: Bytes::from_static(b"8"), revision: 8 };
    assert_eq!(next(&mut watch).await, Event::Put(c.clone()));
    admin.delete(BUCKET, "peers.b").unwrap();
    let deleted = Event::Deleted { key: "peers.b".into(), revision: 9 };
    assert_eq!(next(&mut watch).await, deleted);
    admin.purge(BUCKET, "peers.a").unwrap();
    let purged = Event::Deleted { key: "peers.a".into(), revision: 10 };
    assert_eq!(next(&mut watch).await, purged);

    assert_eq!(registry.get("peers.c").await, Ok(Some(c)));
    assert_eq!(registry.get("peers.a").await, Ok(None));
    assert_eq!(registry.get("peers.never").await, Ok(None));
    assert!(registry.describe().ends_with(", bucket ikto-mesh"), "{}", registry.describe());
}

#[tokio::test]
async fn an_empty_bucket_is_a_snapshot_at_once() {
    let server = plain("empty");
    let started = Instant::now();
    let mut watch = open(&server).watch();
    assert_eq!(snapshot(&mut watch).await.1, []);
    // Not by way of a heartbeat, which comes after 5 s: the server's number of pending records says it.
    println!("empty snapshot after {} ms", started.elapsed().as_millis());
}

#[tokio::test]
async fn a_bucket_with_deleted_keys_only_is_an_empty_snapshot() {
    let server = plain("tombstones");
    let mut admin = server.client(&NOBODY).unwrap();
    for key in ["peers.a", "peers.b"] {
        admin.put(BUCKET, key, "x").unwrap();
        admin.delete(BUCKET, key).unwrap();
    }
    let mut watch = open(&server).watch();
    assert_eq!(snapshot(&mut watch).await.1, []);
}

#[tokio::test]
async fn writes_are_locked_optimistically() {
    let server = plain("locks");
    let registry = open(&server);
    let value = |text: &'static str| Bytes::from_static(text.as_bytes());
    let lost = Err(RegistryError::LostRace { key: "peers.a".into() });

    let first = registry.put("peers.a", value("1"), Expected::Absent).await.unwrap();
    assert_eq!(first, 1);
    assert_eq!(registry.put("peers.a", value("2"), Expected::Absent).await, lost);
    assert_eq!(registry.put("peers.a", value("2"), Expected::Revision(first)).await, Ok(2));
    assert_eq!(registry.put("peers.a", value("3"), Expected::Revision(first)).await, lost);
    // The answer to the first attempt was lost, say.
    assert_eq!(registry.put("peers.a", value("2"), Expected::Absent).await, Ok(2));
    assert_eq!(registry.put("peers.a", value("2"), Expected::Revision(first)).await, Ok(2));

    assert_eq!(
        registry.delete("peers.a", first).await,
        Err(RegistryError::LostRace { key: "peers.a".into() })
    );
    assert_eq!(registry.delete("peers.a", 2).await, Ok(()));
    assert_eq!(registry.delete("peers.a", 2).await, Ok(()), "already deleted");
    assert_eq!(registry.get("peers.a").await, Ok(None));
    // A deleted address is free.
    assert_eq!(registry.put("peers.a", value("4"), Expected::Absent).await, Ok(4));
    assert_eq!(
        registry.put("peers.a", value("5"), Expected::Revision(3)).await,
        Err(RegistryError::LostRace { key: "peers.a".into() })
    );

    // A purged one, too; and one that another deletes between our two looks at it.
    let mut admin = server.client(&NOBODY).unwrap();
    admin.purge(BUCKET, "peers.a").unwrap();
    assert_eq!(registry.put("peers.a", value("6"), Expected::Absent).await, Ok(6));
}

#[tokio::test]
async fn one_of_many_that_want_a_key_gets_it() {
    let server = plain("race");
    let mut tasks = Vec::new();
    for n in 0..10_u8 {
        let registry = open(&server);
        tasks.push(tokio::spawn(async move {
            registry.put("peers.a", Bytes::from(vec![b'a' + n]), Expected::Absent).await
        }));
    }
    let mut won = 0;
    for task in tasks {
        match task.await.unwrap() {
            Ok(revision) => {
                assert_eq!(revision, 1);
                won += 1;
            }
            Err(error) => assert_eq!(error, RegistryError::LostRace { key: "peers.a".into() }),
        }
    }
    assert_eq!(won, 1);
}

#[tokio::test]
async fn without_direct_reads_the_leader_is_asked() {
    let mut server = NatsServer::new("leader").unwrap();
    server.start().unwrap();
    let mut admin = server.client(&NOBODY).unwrap();
    admin.create_bucket_with(BUCKET, &json!({ "allow_direct": false })).unwrap();
    let registry = open(&server);
    assert_eq!(registry.get("peers.a").await, Ok(None));
    assert_eq!(registry.put("peers.a", "1".into(), Expected::Absent).await, Ok(1));
    let read = registry.get("peers.a").await.unwrap().unwrap();
    assert_eq!((read.value, read.revision), (Bytes::from_static(b"1"), 1));
    assert_eq!(registry.delete("peers.a", 1).await, Ok(()));
    assert_eq!(registry.get("peers.a").await, Ok(None));
    assert_eq!(registry.put("peers.a", "2".into(), Expected::Absent).await, Ok(3));
}

#[tokio::test]
async fn least_permissions_suffice_and_more_is_refused_at_once() {
    let server = guarded("least");
    let mut admin = server.client(&ADMIN).unwrap();
    admin.put(BUCKET, "peers.other", "theirs").unwrap();

    let registry = Nats::connect(settings(server.address(), member())).unwrap();
    let mut watch = registry.watch();
    assert_eq!(snapshot(&mut watch).await.1, [entry("peers.other", "theirs", 1)]);
    assert_eq!(registry.get("peers.own").await, Ok(None));
    assert_eq!(registry.put("peers.own", "mine".into(), Expected::Absent).await, Ok(2));
    assert!(matches!(next(&mut watch).await, Event::Put(put) if put.key == "peers.own"));
    assert_eq!(registry.delete("peers.own", 2).await, Ok(()));

    let started = Instant::now();
    let refused = registry.put("peers.other", "mine".into(), Expected::Revision(1)).await;
    let Err(RegistryError::NotPermitted { action, answer }) = refused else {
        panic!("{refused:?}")
    };
    assert_eq!(action, "write peers.other");
    assert_eq!(answer, r#"Permissions Violation for Publish to "$KV.ikto-mesh.peers.other""#);
    let refused = registry.delete("peers.other", 1).await;
    assert!(matches!(refused, Err(RegistryError::NotPermitted { .. })), "{refused:?}");
    // By the server's word, not by the end of a wait: that would be 12 s, each.
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
    // And neither hinders what is permitted.
    assert_eq!(registry.put("peers.own", "again".into(), Expected::Absent).await, Ok(4));
    // What the server had to refuse was what this test asked for, nothing else.
    let log = server.log().unwrap();
    assert_eq!(log.count("Violation"), 2);
}

#[tokio::test]
async fn who_may_not_read_the_bucket_is_told_so() {
    let mut server = NatsServer::new("refused").unwrap().configure(&format!(
        "accounts {{ MESH {{ jetstream: enabled, users: [\n{}\n{}\n] }} }}",
        nats::user("admin", "admin-password", None),
        nats::user("member", "member-password", Some(&["nothing".to_owned()])),
    ));
    server.start().unwrap();
    server.client(&ADMIN).unwrap().create_bucket(BUCKET).unwrap();
    let registry = Nats::connect(settings(server.address(), member())).unwrap();
    let mut watch = registry.watch();
    let reason = away(&mut watch).await;
    assert!(reason.contains("does not permit this node to look at bucket ikto-mesh"), "{reason}");
    assert!(reason.contains(r#"Publish to "$JS.API.STREAM.INFO.KV_ikto-mesh""#), "{reason}");
    assert!(reason.contains("docs/registry.md"), "{reason}");
}
