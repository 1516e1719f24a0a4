//! The NATS registry against real servers: what its trait promises, with all that servers, operators and networks do to it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Once};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use latchkey_mesh::registry::nats::{BucketOptions, BucketState, Nats, NatsWatch, create_bucket};
use latchkey_mesh::registry::{Entry, Event, Expected, Registry, RegistryError, Watch};
use latchkey_mesh::settings::{Login, Pem, RegistrySettings, Secret, Server, Tls};
use latchkey_tests::error::run;
use latchkey_tests::nats::{self, NatsCluster, NatsServer, Operator};
use latchkey_tests::tls;
use serde_json::json;
use tokio::time::timeout;
use zeroize::Zeroizing;

const BUCKET: &str = "ikto-mesh";
/// Longest wait for anything: a lost consumer is noticed after 11 s, and read again a moment later.
const PATIENCE: Duration = Duration::from_secs(60);

const ADMIN: nats::Login<'_> = nats::Login::Password("admin", "admin-password");
const NOBODY: nats::Login<'_> = nats::Login::None;

/// What the program would have logged, whichever test had it do so.
static LOGGED: Mutex<Vec<String>> = Mutex::new(Vec::new());

struct Collect;

impl log::Log for Collect {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        LOGGED.lock().unwrap().push(record.args().to_string());
    }

    fn flush(&self) {}
}

fn collect_logs() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        log::set_logger(&Collect).unwrap();
        log::set_max_level(log::LevelFilter::Trace);
    });
}

fn secret(text: &str) -> Secret {
    Secret(Zeroizing::new(text.to_owned()))
}

fn settings(address: SocketAddr, login: Login) -> RegistrySettings {
    collect_logs();
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

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
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

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_empty_bucket_is_a_snapshot_at_once() {
    let server = plain("empty");
    let started = Instant::now();
    let mut watch = open(&server).watch();
    assert_eq!(snapshot(&mut watch).await.1, []);
    // Not by way of a heartbeat, which comes after 5 s: the server's number of pending records says it.
    println!("empty snapshot after {} ms", started.elapsed().as_millis());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
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

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
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

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
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

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
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

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
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
    log.wait_for_nth("Publish Violation", 2, PATIENCE).unwrap();
    assert_eq!(log.count("Violation"), 2, "{}", log.joined());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
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

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn after_a_power_cut_of_the_server_all_is_read_again() {
    let mut server = plain("killed");
    let mut admin = server.client(&NOBODY).unwrap();
    admin.put(BUCKET, "peers.a", "1").unwrap();
    let registry = open(&server);
    let mut watch = registry.watch();
    let (incarnation, entries) = snapshot(&mut watch).await;
    assert_eq!(entries, [entry("peers.a", "1", 1)]);

    server.kill();
    let reason = away(&mut watch).await;
    assert!(reason.contains(&format!("nats://{}", server.address())), "{reason}");
    let refused = away_for(&mut watch, "refuses the connection").await;
    assert!(refused.contains("is nats-server running there?"), "{refused}");
    let absent = registry.get("peers.a").await;
    assert!(matches!(absent, Err(RegistryError::Away { .. })), "{absent:?}");
    // Said once, while it is tried again and again.
    assert!(timeout(Duration::from_secs(3), watch.next()).await.is_err());

    server.start().unwrap();
    assert_eq!(snapshot(&mut watch).await, (incarnation, vec![entry("peers.a", "1", 1)]));
    // Live again.
    assert_eq!(registry.put("peers.b", "2".into(), Expected::Absent).await, Ok(2));
    assert!(matches!(next(&mut watch).await, Event::Put(put) if put.key == "peers.b"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_bucket_made_anew_on_an_empty_disk_is_another_incarnation() {
    let mut server = plain("lost-disk");
    let mut admin = server.client(&NOBODY).unwrap();
    for n in 0..5 {
        admin.put(BUCKET, &format!("peers.{n}"), "old").unwrap();
    }
    let registry = open(&server);
    let mut watch = registry.watch();
    let (before, entries) = snapshot(&mut watch).await;
    assert_eq!(entries.len(), 5);

    server.empty_store().unwrap();
    server.start().unwrap();
    let reason = away_for(&mut watch, "there is no bucket ikto-mesh").await;
    assert!(reason.contains("latchkey registry create"), "{reason}");
    let nowhere = registry.put("peers.x", "1".into(), Expected::Absent).await;
    assert!(matches!(nowhere, Err(RegistryError::NoBucket { .. })), "{nowhere:?}");
    let nowhere = registry.get("peers.x").await;
    assert!(matches!(nowhere, Err(RegistryError::NoBucket { .. })), "{nowhere:?}");

    let mut admin = server.client(&NOBODY).unwrap();
    admin.create_bucket(BUCKET).unwrap();
    admin.put(BUCKET, "peers.new", "new").unwrap();
    // It may be read between the two.
    let (after, mut entries) = snapshot(&mut watch).await;
    if entries.is_empty() {
        let Event::Put(put) = next(&mut watch).await else { panic!("no put") };
        entries.push((put.key, put.value.to_vec(), put.revision));
    }
    assert_eq!(entries, [entry("peers.new", "new", 1)]);
    assert_ne!(after, before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_bucket_deleted_and_made_anew_under_a_watch_is_read_again() {
    let server = plain("re-created");
    let mut admin = server.client(&NOBODY).unwrap();
    for n in 0..5 {
        admin.put(BUCKET, &format!("peers.{n}"), "old").unwrap();
    }
    let mut watch = open(&server).watch();
    let (before, _) = snapshot(&mut watch).await;
    admin.delete_bucket(BUCKET).unwrap();
    admin.create_bucket(BUCKET).unwrap();
    admin.put(BUCKET, "peers.0", "new").unwrap();
    let (after, entries) = snapshot(&mut watch).await;
    assert_eq!(entries, [entry("peers.0", "new", 1)]);
    assert_ne!(after, before);
    admin.put(BUCKET, "peers.1", "new").unwrap();
    assert!(matches!(next(&mut watch).await, Event::Put(put) if put.revision == 2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_consumer_deleted_by_an_administrator_is_replaced() {
    let server = plain("consumer");
    let mut admin = server.client(&NOBODY).unwrap();
    admin.put(BUCKET, "peers.a", "1").unwrap();
    let mut watch = open(&server).watch();
    let (before, _) = snapshot(&mut watch).await;
    let consumers = admin.consumers(BUCKET).unwrap();
    assert_eq!(consumers.len(), 1, "{consumers:?}");
    assert!(consumers[0].starts_with("latchkey-"), "{consumers:?}");
    admin.delete_consumer(BUCKET, &consumers[0]).unwrap();
    admin.put(BUCKET, "peers.a", "2").unwrap();
    // Without a word of absence: the registry was there all the time.
    let Event::Snapshot { incarnation, entries } = next(&mut watch).await else { panic!() };
    assert_eq!(incarnation, before);
    assert_eq!((entries[0].value.as_ref(), entries[0].revision), (b"2".as_slice(), 2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_server_that_is_alive_and_silent_is_away_until_it_speaks() {
    let server = plain("paused");
    server.client(&NOBODY).unwrap().put(BUCKET, "peers.a", "1").unwrap();
    let registry = open(&server);
    let mut watch = registry.watch();
    snapshot(&mut watch).await;
    server.pause().unwrap();
    away_for(&mut watch, "has gone silent").await;
    away_for(&mut watch, "does not answer").await;
    server.resume().unwrap();
    assert_eq!(snapshot(&mut watch).await.1, [entry("peers.a", "1", 1)]);
    assert_eq!(registry.put("peers.b", "2".into(), Expected::Absent).await, Ok(2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_happened_behind_a_broken_way_is_read_afterwards() {
    let server = plain("partition");
    let mut admin = server.client(&NOBODY).unwrap();
    admin.put(BUCKET, "peers.a", "1").unwrap();
    admin.put(BUCKET, "peers.b", "2").unwrap();
    let way = nats::Way::to(server.address()).unwrap();
    let registry = Nats::connect(settings(way.address(), Login::None)).unwrap();
    let mut watch = registry.watch();
    snapshot(&mut watch).await;

    way.break_off();
    admin.put(BUCKET, "peers.a", "3").unwrap();
    admin.delete(BUCKET, "peers.b").unwrap();
    away(&mut watch).await;
    way.mend();
    assert_eq!(snapshot(&mut watch).await.1, [entry("peers.a", "3", 3)]);
    assert!(way.accepted() < 12, "{} connections", way.accepted());
}

// On one thread, as the agent runs it: what the library receives in one go has to find room.
#[tokio::test]
async fn a_large_mesh_is_one_snapshot_read_once() {
    let server = plain("many");
    let mut admin = server.client(&NOBODY).unwrap();
    let value = "x".repeat(400);
    for n in 0..20_000 {
        admin.put(BUCKET, &format!("peers.{n}"), &value).unwrap();
    }
    let started = Instant::now();
    let mut watch = open(&server).watch();
    let Event::Snapshot { entries, .. } = next(&mut watch).await else { panic!("no snapshot") };
    assert_eq!(entries.len(), 20_000);
    assert!(entries.is_sorted_by_key(|entry| entry.revision));
    // One that had been missed in part would have left its consumer behind.
    assert_eq!(admin.consumers(BUCKET).unwrap().len(), 1);
    println!("20,000 records after {} ms", started.elapsed().as_millis());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_receiver_that_is_busy_for_long_ends_with_the_truth() {
    let server = plain("busy");
    let mut admin = server.client(&NOBODY).unwrap();
    let mut watch = open(&server).watch();
    snapshot(&mut watch).await;
    // More than is kept for it on the way, events and messages both.
    let writes = 50_000_u64;
    let mut writer = server.client(&NOBODY).unwrap();
    writer.put_many(BUCKET, "peers.a", writes).unwrap();
    admin.put(BUCKET, "peers.last", "x").unwrap();
    let mut a = 0;
    loop {
        match next(&mut watch).await {
            Event::Put(put) if put.key == "peers.a" => a = put.revision,
            Event::Put(_) => break,
            Event::Snapshot { entries, .. } => {
                a = entries.iter().find(|e| e.key == "peers.a").map_or(0, |e| e.revision);
                if entries.iter().any(|e| e.key == "peers.last") {
                    break;
                }
            }
            Event::Deleted { .. } | Event::Away { .. } => {}
        }
    }
    assert_eq!(a, writes);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_record_that_is_too_long_is_handed_on_as_too_long() {
    let server = plain("long");
    let mut admin = server.client(&NOBODY).unwrap();
    admin.put(BUCKET, "peers.long", "x".repeat(500_000)).unwrap();
    let registry = open(&server);
    let mut watch = registry.watch();
    let entries = snapshot(&mut watch).await.1;
    assert_eq!(entries[0].1.len(), latchkey_wire::member::MAX_MEMBER + 1);
    let read = registry.get("peers.long").await.unwrap().unwrap();
    assert_eq!(read.value.len(), latchkey_wire::member::MAX_MEMBER + 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_full_bucket_and_a_value_too_long_for_it_are_said() {
    let mut server = NatsServer::new("full").unwrap();
    server.start().unwrap();
    let mut admin = server.client(&NOBODY).unwrap();
    admin.create_bucket_with(BUCKET, &json!({ "max_msgs": 1, "max_msg_size": 100 })).unwrap();
    let registry = open(&server);
    let long = registry.put("peers.a", Bytes::from(vec![b'x'; 101]), Expected::Absent).await;
    let Err(RegistryError::Away { reason, .. }) = long else { panic!("{long:?}") };
    assert!(reason.contains("message size exceeds maximum allowed"), "{reason}");
    assert_eq!(registry.put("peers.a", "1".into(), Expected::Absent).await, Ok(1));
    let full = registry.put("peers.b", "1".into(), Expected::Absent).await;
    let Err(RegistryError::Away { reason, .. }) = full else { panic!("{full:?}") };
    assert!(reason.contains("maximum messages exceeded"), "{reason}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_cluster_loses_its_leader_while_records_are_written() {
    let mut cluster = NatsCluster::new("cluster", "").unwrap();
    cluster.start(&NOBODY).unwrap();
    let servers: Vec<_> = cluster.servers.iter().map(NatsServer::address).collect();
    let settings = RegistrySettings {
        servers: servers
            .iter()
            .map(|a| Server { host: a.ip().to_string(), port: a.port(), tls: false })
            .collect(),
        bucket: BUCKET.into(),
        login: Login::None,
        tls: Tls::default(),
    };
    let made = create_bucket(&settings, BucketOptions { replicas: 3 }).await.unwrap();
    assert_eq!(made, BucketState::Created);
    let made = create_bucket(&settings, BucketOptions { replicas: 3 }).await.unwrap();
    assert_eq!(made, BucketState::Equal);
    let made = create_bucket(&settings, BucketOptions::default()).await.unwrap();
    assert_eq!(made, BucketState::Different(vec!["num_replicas is 3, not 1".into()]));

    let registry = Nats::connect(settings).unwrap();
    let mut watch = registry.watch();
    snapshot(&mut watch).await;
    let writer = registry.clone();
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = stop.clone();
    let writing = tokio::spawn(async move {
        let mut written = Vec::new();
        while !stopped.load(Ordering::SeqCst) {
            let key = format!("peers.{}", written.len());
            let deadline = Instant::now() + PATIENCE;
            loop {
                match writer.put(&key, Bytes::from(key.clone()), Expected::Absent).await {
                    Ok(revision) => break written.push((key, revision)),
                    Err(RegistryError::Away { .. }) if Instant::now() < deadline => {
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                    Err(error) => panic!("{key}: {error}"),
                }
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        written
    });
    tokio::time::sleep(Duration::from_secs(1)).await;
    let leader = cluster.leader("KV_ikto-mesh", &NOBODY).unwrap();
    // One that was told of the leader alone learns from it of the others.
    let one = Nats::connect(self::settings(servers[leader], Login::None)).unwrap();
    let mut watch_of_one = one.watch();
    snapshot(&mut watch_of_one).await;
    cluster.servers[leader].kill();
    let next_leader = cluster.leader("KV_ikto-mesh", &NOBODY).unwrap();
    assert_ne!(next_leader, leader);
    tokio::time::sleep(Duration::from_secs(2)).await;
    stop.store(true, Ordering::SeqCst);
    let written = timeout(PATIENCE, writing).await.unwrap().unwrap();
    assert!(written.len() > 50, "{}", written.len());

    snapshot(&mut watch_of_one).await;
    // Each is there once, and the watch has come to know all.
    let mut known = BTreeMap::new();
    let deadline = Instant::now() + PATIENCE;
    while known.len() < written.len() && Instant::now() < deadline {
        match next(&mut watch).await {
            Event::Put(put) => drop(known.insert(put.key, put.revision)),
            Event::Snapshot { entries, .. } => {
                known = entries.into_iter().map(|e| (e.key, e.revision)).collect();
            }
            Event::Deleted { .. } | Event::Away { .. } => {}
        }
    }
    assert_eq!(known.into_iter().collect::<BTreeSet<_>>(), written.into_iter().collect());
}

/// A server on the loopback that is none of NATS': each connection is given to `talk`.
fn impostor(talk: impl Fn(TcpStream) + Send + Sync + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let talk = Arc::new(talk);
    thread::spawn(move || {
        for client in listener.incoming().map_while(Result::ok) {
            let talk = talk.clone();
            thread::spawn(move || talk(client));
        }
    });
    address
}

/// Says this and waits for the client to go.
fn says(words: &'static [u8]) -> SocketAddr {
    impostor(move |mut client| {
        let _ = client.write_all(words);
        let _ = client.read_to_end(&mut Vec::new());
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_is_no_nats_server_is_told_from_one_that_is_away() {
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let info = b"INFO {\"server_id\":\"x\",\"version\":\"2.9.10\",\"max_payload\":1048576}\r\n";
    let cases: Vec<(SocketAddr, &str)> = vec![
        (
            says(b"SSH-2.0-OpenSSH_9.2p1\r\n"),
            r#"is no NATS server: it says "SSH-2.0-OpenSSH_9.2p1""#,
        ),
        (says(b"HTTP/1.1 400 Bad Request\r\n\r\n"), "is no NATS server: it says \"HTTP/1.1 400"),
        (says(b"INFO nonsense\r\n"), "is no NATS server"),
        (says(b"-ERR\r\n"), "is no NATS server"),
        (impostor(drop), "closes the connection at once"),
        (says(b""), "does not answer"),
        (says(b"INFO {\"server_id\":"), "does not answer"),
        (closed, "refuses the connection"),
        // INFO as it should be, and then no more, or nonsense: some of it makes the library panic.
        (says(info), "does not answer"),
        (
            impostor(move |mut client| {
                let _ = client.write_all(info);
                let _ = client.write_all(b"-ERR\r\n");
                let _ = client.read_to_end(&mut Vec::new());
            }),
            "is no NATS server",
        ),
        (
            impostor(move |mut client| {
                let _ = client.write_all(info);
                let _ = client.write_all(b"PONG\r\n-ERR\r\n");
                let _ = client.read_to_end(&mut Vec::new());
            }),
            "is lost",
        ),
    ];
    let mut tasks = Vec::new();
    for (address, expected) in cases {
        tasks.push(tokio::spawn(async move {
            let registry = Nats::connect(settings(address, Login::None)).unwrap();
            let mut watch = registry.watch();
            let reason = away_for(&mut watch, expected).await;
            assert!(reason.contains(&address.to_string()), "{reason}");
            let get = registry.get("peers.a").await;
            assert!(matches!(get, Err(RegistryError::Away { .. })), "{get:?}");
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_endless_first_line_is_not_kept() {
    static SENT: AtomicUsize = AtomicUsize::new(0);
    let endless = impostor(|mut client| {
        let _ = client.write_all(b"INFO {\"server_id\":\"");
        let block = [b'x'; 64 << 10];
        // As much as would be worth noticing, no more.
        while SENT.load(Ordering::SeqCst) < 256 << 20 && client.write_all(&block).is_ok() {
            SENT.fetch_add(block.len(), Ordering::SeqCst);
        }
    });
    let mut watch = Nats::connect(settings(endless, Login::None)).unwrap().watch();
    away_for(&mut watch, "is no NATS server").await;
    // What fits into the sockets on the way.
    let sent = SENT.load(Ordering::SeqCst);
    assert!(sent < 64 << 20, "{sent} bytes were taken");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_name_that_does_not_exist_is_named() {
    let mut settings = settings("127.0.0.1:4222".parse().unwrap(), Login::None);
    settings.servers[0].host = "nats.invalid".into();
    let mut watch = Nats::connect(settings).unwrap().watch();
    let reason = away(&mut watch).await;
    assert!(reason.contains("the address of nats.invalid cannot be found"), "{reason}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_server_without_jetstream_is_told_so() {
    let mut server = NatsServer::new("no-jetstream").unwrap();
    server.configure_wholly(&format!("listen: \"{}\"", server.address()));
    server.start().unwrap();
    let mut watch = open(&server).watch();
    let reason = away(&mut watch).await;
    assert!(reason.contains("JetStream does not answer"), "{reason}");
    assert!(reason.contains("not enabled"), "{reason}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_account_without_jetstream_is_told_so() {
    let mut server = NatsServer::new("account-off").unwrap().configure(&format!(
        "accounts {{ OTHER {{ jetstream: enabled, users: [ {{ user: o, password: o }} ] }}, \
         MESH {{ users: [ {} ] }} }}",
        nats::user("member", "member-password", None)
    ));
    server.start().unwrap();
    let mut watch = Nats::connect(settings(server.address(), member())).unwrap().watch();
    let reason = away(&mut watch).await;
    assert!(reason.contains("JetStream") && reason.contains("not enabled"), "{reason}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn permissions_given_later_count_without_a_restart() {
    let mut server = NatsServer::new("later").unwrap();
    let configuration = |address: SocketAddr, store: &Path, publish: &[String]| {
        format!(
            "listen: \"{address}\"\njetstream {{ store_dir: \"{}\" }}\n\
             accounts {{ MESH {{ jetstream: enabled, users: [\n{}\n{}\n] }} }}",
            store.display(),
            nats::user("admin", "admin-password", None),
            nats::user("member", "member-password", Some(publish)),
        )
    };
    let (address, store) = (server.address(), server.file("store"));
    let read_only = nats::member_permissions(BUCKET, &[]);
    // An empty list would permit everything.
    server.configure_wholly(&configuration(address, &store, &["nothing".into()]));
    server.start().unwrap();
    server.client(&ADMIN).unwrap().create_bucket(BUCKET).unwrap();
    let registry = Nats::connect(settings(address, member())).unwrap();
    let mut watch = registry.watch();
    away_for(&mut watch, "does not permit this node to look at bucket").await;

    server.configure_wholly(&configuration(address, &store, &read_only));
    server.reload().unwrap();
    snapshot(&mut watch).await;
    let refused = registry.put("peers.own", "1".into(), Expected::Absent).await;
    assert!(matches!(refused, Err(RegistryError::NotPermitted { .. })), "{refused:?}");

    let all = nats::member_permissions(BUCKET, &["peers.own"]);
    server.configure_wholly(&configuration(address, &store, &all));
    server.reload().unwrap();
    let deadline = Instant::now() + PATIENCE;
    while let Err(error) = registry.put("peers.own", "1".into(), Expected::Absent).await {
        assert!(Instant::now() < deadline, "{error}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_fleet_comes_back_after_an_outage_without_a_storm() {
    const NODES: usize = 40;
    let mut server = NatsServer::new("fleet").unwrap().configure("debug: true");
    server.start().unwrap();
    let mut admin = server.client(&NOBODY).unwrap();
    admin.create_bucket(BUCKET).unwrap();
    admin.put(BUCKET, "peers.a", "1").unwrap();
    let mut watches: Vec<_> = (0..NODES).map(|_| open(&server).watch()).collect();
    for watch in &mut watches {
        snapshot(watch).await;
    }
    server.kill();
    for watch in &mut watches {
        away_for(watch, "refuses the connection").await;
    }
    tokio::time::sleep(Duration::from_secs(3)).await;
    server.start().unwrap();
    let started = Instant::now();
    let tasks: Vec<_> = watches
        .into_iter()
        .map(|mut watch| {
            tokio::spawn(async move {
                assert_eq!(snapshot(&mut watch).await.1, [entry("peers.a", "1", 1)]);
                (Instant::now(), watch)
            })
        })
        .collect();
    let (mut back, mut held) = (Vec::new(), Vec::new());
    for task in tasks {
        let (at, watch) = task.await.unwrap();
        back.push((at - started).as_millis());
        held.push(watch);
    }
    back.sort_unstable();
    println!("{NODES} nodes were back after {} to {} ms", back[0], back[NODES - 1]);
    // One connection each: it has known this server for one.
    let created = server.log().unwrap().count("Client connection created");
    assert_eq!(created, NODES);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_wrong_password_or_token_is_told_and_the_right_one_joins() {
    let server = guarded("password");
    let wrong = Login::Password { user: "member".into(), password: secret("never-to-be-seen-1") };
    let mut watch = Nats::connect(settings(server.address(), wrong)).unwrap().watch();
    let reason = away(&mut watch).await;
    assert!(
        reason.contains(r#"refuses the user "member" and password: Authorization Violation"#),
        "{reason}"
    );
    let mut watch = Nats::connect(settings(server.address(), Login::None)).unwrap().watch();
    let reason = away(&mut watch).await;
    assert!(reason.contains("refuses the login (none is configured)"), "{reason}");

    let mut server = NatsServer::new("token")
        .unwrap()
        .configure("authorization { token: \"never-to-be-seen-2\" }");
    server.start().unwrap();
    server
        .client(&nats::Login::Token("never-to-be-seen-2"))
        .unwrap()
        .create_bucket(BUCKET)
        .unwrap();
    let token = Login::Token(secret("never-to-be-seen-2"));
    let mut watch = Nats::connect(settings(server.address(), token)).unwrap().watch();
    snapshot(&mut watch).await;
    let token = Login::Token(secret("never-to-be-seen-3"));
    let mut watch = Nats::connect(settings(server.address(), token)).unwrap().watch();
    let reason = away(&mut watch).await;
    assert!(reason.contains("refuses the token: Authorization Violation"), "{reason}");

    let logged = LOGGED.lock().unwrap().join("\n");
    for never in ["never-to-be-seen", "member-password", "admin-password"] {
        assert!(!logged.contains(never));
    }
    assert!(logged.contains("Authorization Violation"), "the log is looked at");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn credentials_are_read_again_at_each_connection_and_their_end_is_told() {
    let operator = Operator::new().unwrap();
    let mut server = NatsServer::new("creds").unwrap().configure(operator.configuration());
    server.start().unwrap();
    let all = operator.credentials("admin", None, None).unwrap();
    let admin = settings(server.address(), Login::Credentials(secret(&all)));
    assert_eq!(
        create_bucket(&admin, BucketOptions::default()).await.unwrap(),
        BucketState::Created
    );

    let own = nats::member_permissions(BUCKET, &["peers.own"]);
    let soon = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs() + 3;
    let file = server.file("node.creds");
    let short = operator.credentials("node", Some(&own), Some(soon)).unwrap();
    // An editor may take away the last line end.
    fs::write(&file, short.trim_end()).unwrap();
    let login = Login::CredentialsFile(file.clone());
    let registry = Nats::connect(settings(server.address(), login)).unwrap();
    let mut watch = registry.watch();
    snapshot(&mut watch).await;
    assert_eq!(registry.put("peers.own", "1".into(), Expected::Absent).await, Ok(1));
    let refused = registry.put("peers.other", "1".into(), Expected::Absent).await;
    assert!(matches!(refused, Err(RegistryError::NotPermitted { .. })), "{refused:?}");

    let reason = away_for(&mut watch, "closed the connection").await;
    assert!(reason.contains("User Authentication Expired"), "{reason}");
    let reason = away_for(&mut watch, "which expired").await;
    assert!(reason.contains("node.creds"), "{reason}");
    fs::write(&file, "").unwrap();
    away_for(&mut watch, "Authorization Violation").await;
    fs::write(&file, operator.credentials("node", Some(&own), None).unwrap()).unwrap();
    assert_eq!(snapshot(&mut watch).await.1, [entry("peers.own", "1", 1)]);

    let seed = all.lines().find(|line| line.starts_with("SU")).unwrap();
    let logged = LOGGED.lock().unwrap().join("\n");
    assert!(!logged.contains(seed) && !logged.contains("eyJ"));
}

#[tokio::test]
async fn what_no_waiting_will_mend_is_an_error_at_once() {
    let address = "127.0.0.1:4222".parse().unwrap();
    let fails = |settings: RegistrySettings, words: &str| {
        let error = Nats::connect(settings).unwrap_err();
        assert_eq!(error.exit_code(), 10);
        let text = error.to_string();
        assert!(text.contains(words), "{text}");
        assert!(!text.contains("never-to-be-seen"), "{text}");
    };
    fails(
        settings(address, Login::CredentialsFile("/nowhere/node.creds".into())),
        "credentials file /nowhere/node.creds is not usable: No such file or directory",
    );
    for text in ["never-to-be-seen", "-----BEGIN NATS USER JWT-----\nnever-to-be-seen\n"] {
        fails(settings(address, Login::Credentials(secret(text))), "credentials is not usable");
    }
    let with = |tls: Tls| RegistrySettings { tls, ..settings(address, Login::None) };
    let file = || Some(Pem::File("/nowhere/x.pem".into()));
    let text = || Some(Pem::Text(secret("never-to-be-seen")));
    fails(
        with(Tls { ca: file(), ..Tls::default() }),
        "CA certificate /nowhere/x.pem is not usable",
    );
    fails(with(Tls { ca: text(), ..Tls::default() }), "no PEM block of type CERTIFICATE");
    fails(with(Tls { key: text(), ..Tls::default() }), "there is no certificate for it");
    fails(with(Tls { certificate: text(), ..Tls::default() }), "there is no key for it");
}

/// What a node is told of an authority.
fn trusting(tls: &tls::Tls) -> Tls {
    Tls { ca: Some(Pem::File(tls.authority_file())), ..Tls::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn tls_by_an_own_authority_with_a_client_s_certificate() {
    let tls = tls::Tls::new("registry", &["IP:127.0.0.1"]).unwrap();
    let mut server = NatsServer::new("tls").unwrap().tls(
        &tls.certificate_file(),
        &tls.key_file(),
        Some(&tls.authority_file()),
    );
    server.start().unwrap();
    let with = |scheme: bool, tls: Tls| {
        let mut settings = settings(server.address(), Login::None);
        settings.servers[0].tls = scheme;
        RegistrySettings { tls, ..settings }
    };
    let text = |path: &Path| Some(Pem::Text(secret(&fs::read_to_string(path).unwrap())));
    let full = Tls {
        ca: text(&tls.authority_file()),
        certificate: text(&tls.client_certificate_file()),
        key: text(&tls.client_key_file()),
    };
    let made = create_bucket(&with(true, full.clone()), BucketOptions::default()).await.unwrap();
    assert_eq!(made, BucketState::Created);
    // The server asks for it, whatever the URL says.
    for scheme in [true, false] {
        let mut watch = Nats::connect(with(scheme, full.clone())).unwrap().watch();
        snapshot(&mut watch).await;
    }

    let mut watch = Nats::connect(with(true, trusting(&tls))).unwrap().watch();
    let reason = away(&mut watch).await;
    assert!(reason.contains("wants a client certificate (registry_certificate"), "{reason}");

    // The system's authorities, who do not know ours.
    for scheme in [true, false] {
        let mut watch = Nats::connect(with(scheme, Tls::default())).unwrap().watch();
        let reason = away(&mut watch).await;
        assert!(reason.contains("is not by an authority that this system trusts"), "{reason}");
    }
    let other = tls::Tls::new("other", &["IP:127.0.0.1"]).unwrap();
    let mut watch = Nats::connect(with(true, trusting(&other))).unwrap().watch();
    let reason = away(&mut watch).await;
    assert!(reason.contains("is not by the configured CA"), "{reason}");
    let stranger = Tls {
        ca: Some(Pem::File(tls.authority_file())),
        certificate: Some(Pem::File(other.client_certificate_file())),
        key: Some(Pem::File(other.client_key_file())),
    };
    let mut watch = Nats::connect(with(true, stranger)).unwrap().watch();
    let reason = away(&mut watch).await;
    assert!(reason.contains("does not take this node's client certificate"), "{reason}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn certificates_that_do_not_count_and_servers_without_tls() {
    let expired = tls::Tls::expired("expired", &["IP:127.0.0.1"]).unwrap();
    let renamed = tls::Tls::new("renamed", &["DNS:elsewhere.example"]).unwrap();
    let cases = [(&expired, "has expired"), (&renamed, "is not for that name")];
    for (tls, words) in cases {
        let mut server =
            NatsServer::new("bad-tls").unwrap().tls(&tls.certificate_file(), &tls.key_file(), None);
        server.start().unwrap();
        let settings =
            RegistrySettings { tls: trusting(tls), ..settings(server.address(), Login::None) };
        let mut watch = Nats::connect(settings).unwrap().watch();
        let reason = away(&mut watch).await;
        assert!(reason.contains(words), "{reason}");
    }
    // What a person makes in one line, its own authority: for its own name it counts.
    for (name, words) in [("IP:127.0.0.1", None), ("DNS:a.example", Some("is not for that name"))] {
        let mut server = NatsServer::new("self-signed").unwrap();
        let (certificate, key) = (server.file("x.crt"), server.file("x.key"));
        run(Command::new("openssl")
            .args([
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:P-256",
                "-nodes",
            ])
            .args(["-subj", "/CN=nats", "-addext", &format!("subjectAltName={name}")])
            .arg("-keyout")
            .arg(&key)
            .arg("-out")
            .arg(&certificate))
        .unwrap();
        server = server.tls(&certificate, &key, None);
        server.start().unwrap();
        let tls = Tls { ca: Some(Pem::File(certificate)), ..Tls::default() };
        let settings = RegistrySettings { tls, ..settings(server.address(), Login::None) };
        let mut watch = Nats::connect(settings).unwrap().watch();
        let reason = away(&mut watch).await;
        assert!(reason.contains(words.unwrap_or("there is no bucket")), "{reason}");
    }
    let server = plain("without-tls");
    let settings =
        RegistrySettings { tls: trusting(&renamed), ..settings(server.address(), Login::None) };
    let mut watch = Nats::connect(settings).unwrap().watch();
    let reason = away(&mut watch).await;
    assert!(reason.contains("does not speak TLS, and TLS is configured"), "{reason}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_bucket_with_a_time_to_live_is_warned_of() {
    let mut server = NatsServer::new("ttl").unwrap();
    server.start().unwrap();
    let mut admin = server.client(&NOBODY).unwrap();
    let ttl = json!({ "max_age": 3_605_000_000_000_u64 });
    admin.create_bucket_with(BUCKET, &ttl).unwrap();
    let mut watch = open(&server).watch();
    snapshot(&mut watch).await;
    let logged = LOGGED.lock().unwrap().join("\n");
    assert!(logged.contains("records in bucket ikto-mesh expire after 3605 s"), "{logged}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_connection_ends_with_its_last_user_and_there_was_one() {
    let mut server = NatsServer::new("dropped").unwrap().configure("debug: true");
    server.start().unwrap();
    server.client(&NOBODY).unwrap().create_bucket(BUCKET).unwrap();
    let registry = open(&server);
    let mut watch = registry.watch();
    snapshot(&mut watch).await;
    let log = server.log().unwrap();
    // The administrator's; one that listens who is there; the one.
    assert_eq!(log.count("Client connection created"), 3, "{}", log.joined());
    let clone = registry.clone();
    drop(registry);
    clone.put("peers.a", "1".into(), Expected::Absent).await.unwrap();
    drop(clone);
    assert!(matches!(next(&mut watch).await, Event::Put(_)));
    drop(watch);
    log.wait_for_nth("Client connection closed", 3, PATIENCE).unwrap();
    assert_eq!(log.count("Client connection created"), 3, "{}", log.joined());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn whoever_may_not_make_the_bucket_is_told_so() {
    let server = guarded("create");
    server.client(&ADMIN).unwrap().delete_bucket(BUCKET).unwrap();
    let member = settings(server.address(), member());
    let refused = create_bucket(&member, BucketOptions::default()).await.unwrap_err();
    let text = refused.to_string();
    assert!(text.contains("does not permit this node to create bucket ikto-mesh"), "{text}");
    assert_eq!(refused.exit_code(), 66);
    let nobody = settings("127.0.0.1:1".parse().unwrap(), Login::None);
    let away = create_bucket(&nobody, BucketOptions::default()).await.unwrap_err().to_string();
    assert!(away.contains("cannot create bucket ikto-mesh: nats://127.0.0.1:1 refuses"), "{away}");
    // A server alone cannot keep three copies.
    let login = Login::Password { user: "admin".into(), password: secret("admin-password") };
    let alone = settings(server.address(), login);
    let refused = create_bucket(&alone, BucketOptions { replicas: 3 }).await.unwrap_err();
    assert!(refused.to_string().contains("replicas > 1 not supported"), "{refused}");
}

/// A file of docs/nats with the addresses and folders of a test.
fn documented(name: &str, replace: &[(&str, &str)]) -> String {
    let path = latchkey_tests::place::project().join("docs/nats").join(name);
    let mut text = fs::read_to_string(path).unwrap();
    for (there, here) in replace {
        assert!(text.contains(there), "{name} has no {there}");
        text = text.replace(there, here);
    }
    text
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_documented_configuration_works_as_it_says() {
    let tls = tls::Tls::new("documented", &["IP:127.0.0.1"]).unwrap();
    let mut server = NatsServer::new("documented").unwrap();
    let folder = server.file("").display().to_string();
    for (file, from) in [
        ("server.crt", tls.certificate_file()),
        ("server.key", tls.key_file()),
        ("ca.crt", tls.authority_file()),
    ] {
        fs::copy(from, server.file(file)).unwrap();
    }
    fs::write(server.file("mesh.conf"), documented("mesh.conf", &[])).unwrap();
    let address = server.address().to_string();
    let store = server.file("store").display().to_string();
    server.configure_wholly(&documented(
        "server.conf",
        &[("0.0.0.0:4222", &address), ("/var/lib/nats", &store), ("/etc/nats/", &folder)],
    ));
    server.start().unwrap();

    let user = |name: &str| {
        let password = secret(&format!("change-me-{name}"));
        let mut settings =
            settings(server.address(), Login::Password { user: name.into(), password });
        settings.servers[0].tls = true;
        settings.tls = Tls {
            certificate: Some(Pem::File(tls.client_certificate_file())),
            key: Some(Pem::File(tls.client_key_file())),
            ..trusting(&tls)
        };
        settings
    };
    let made = create_bucket(&user("operator"), BucketOptions::default()).await.unwrap();
    assert_eq!(made, BucketState::Created);
    let own = "peers.ZmQxMDphYWFhOjE6Oi80OA==";
    let node = Nats::connect(user("node-a")).unwrap();
    let mut watch = node.watch();
    assert_eq!(snapshot(&mut watch).await.1, []);
    assert_eq!(node.get(own).await, Ok(None));
    assert_eq!(node.put(own, "a".into(), Expected::Absent).await, Ok(1));
    let other = node.put("peers.other", "a".into(), Expected::Absent).await;
    assert!(matches!(other, Err(RegistryError::NotPermitted { .. })), "{other:?}");
    let fleet = Nats::connect(user("fleet")).unwrap();
    assert_eq!(fleet.put("peers.other", "f".into(), Expected::Absent).await, Ok(2));
    let operator = Nats::connect(user("operator")).unwrap();
    assert_eq!(operator.delete(own, 1).await, Ok(()));
    assert!(matches!(next(&mut watch).await, Event::Put(put) if put.key == own));
    assert!(matches!(next(&mut watch).await, Event::Put(put) if put.revision == 2));
    assert_eq!(next(&mut watch).await, Event::Deleted { key: own.into(), revision: 3 });
    let gone = fleet.put("elsewhere", "f".into(), Expected::Absent).await;
    assert!(matches!(gone, Err(RegistryError::NotPermitted { .. })), "{gone:?}");
}

#[test]
fn the_documented_cluster_is_one() {
    let mut cluster = NatsCluster::new("documented-cluster", "").unwrap();
    let routes = cluster.routes().to_vec();
    for (n, server) in cluster.servers.iter_mut().enumerate() {
        let text = documented(
            "cluster.conf",
            &[
                ("0.0.0.0:6222", &routes[n].to_string()),
                ("mesh-1.example.org:6222", &routes[0].to_string()),
                ("mesh-2.example.org:6222", &routes[1].to_string()),
                ("mesh-3.example.org:6222", &routes[2].to_string()),
            ],
        );
        fs::write(server.file("cluster.conf"), text).unwrap();
        server.configure_wholly(&format!(
            "server_name: \"mesh-{n}\"\nlisten: \"{}\"\njetstream {{ store_dir: \"{}\" }}\ninclude \"cluster.conf\"",
            server.address(),
            server.file("store").display()
        ));
    }
    cluster.start(&NOBODY).unwrap();
    let mut admin = cluster.servers[2].client(&NOBODY).unwrap();
    admin.create_bucket_with(BUCKET, &json!({ "num_replicas": 3 })).unwrap();
    assert_eq!(admin.put(BUCKET, "peers.a", "1").unwrap(), 1);
}

/// What a scripted server says on a consumer.
enum Say {
    /// Key, revision, the message's number for this consumer, how many are to come.
    Put(&'static str, u64, u64, u64),
    /// How many messages it says were sent.
    Heartbeat(u64),
    Status(&'static str),
    Raw(&'static str),
}

/// Its name, what the first consumer is sent, and the keys of the snapshots that come of it.
type Case<'a> = (&'a str, Vec<Say>, Vec<&'a [&'a str]>);

/// A server that goes wrong as real ones do, but not when asked to: one bucket, whose n-th consumer, over all connections, is
/// sent the n-th script; the last again and again.
fn scripted(scripts: Vec<Vec<Say>>) -> SocketAddr {
    let consumers = AtomicUsize::new(0);
    impostor(move |client| {
        let _ = speak(client, &scripts, &consumers);
    })
}

fn speak(client: TcpStream, scripts: &[Vec<Say>], consumers: &AtomicUsize) -> std::io::Result<()> {
    let mut out = client.try_clone()?;
    out.write_all(b"INFO {\"server_id\":\"x\",\"version\":\"2.9.10\",\"max_payload\":1048576,\"headers\":true}\r\n")?;
    let mut from = BufReader::new(client);
    // Of in-boxes, their numbers.
    let mut subscribed: Vec<(String, String)> = Vec::new();
    loop {
        let mut line = String::new();
        if from.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["PING"] => out.write_all(b"PONG\r\n")?,
            ["SUB", subject, sid] => {
                subscribed.push((subject.trim_end_matches('*').to_owned(), sid.to_owned()));
            }
            ["PUB", subject, reply, length] => {
                let mut payload = vec![0; length.parse::<usize>().unwrap() + 2];
                from.read_exact(&mut payload)?;
                let sid = |inbox: &str| {
                    let found = subscribed.iter().find(|(to, _)| inbox.starts_with(to.as_str()));
                    found.map(|(_, sid)| sid.clone()).unwrap()
                };
                let mut send = |to: &str, body: &str| {
                    write!(out, "MSG {to} {} {}\r\n{body}\r\n", sid(to), body.len())
                };
                if subject.contains("STREAM.INFO") {
                    send(reply, r#"{"created":"2024-01-01T00:00:00Z","config":{}}"#)?;
                    continue;
                }
                assert!(subject.contains("CONSUMER.CREATE"), "{subject}");
                let request: serde_json::Value =
                    serde_json::from_slice(&payload[..payload.len() - 2]).unwrap();
                let inbox = request["config"]["deliver_subject"].as_str().unwrap().to_owned();
                let n = consumers.fetch_add(1, Ordering::SeqCst).min(scripts.len() - 1);
                send(reply, r#"{"num_pending":9}"#)?;
                for say in &scripts[n] {
                    let sid = sid(&inbox);
                    match say {
                        Say::Put(key, revision, number, pending) => write!(
                            out,
                            "MSG $KV.{BUCKET}.{key} {sid} $JS.ACK.KV_{BUCKET}.c.1.{revision}.{number}.1.{pending} 1\r\nx\r\n"
                        )?,
                        Say::Heartbeat(last) => {
                            let headers = format!(
                                "NATS/1.0 100 Idle Heartbeat\r\nNats-Last-Consumer: {last}\r\nNats-Last-Stream: 1\r\n\r\n"
                            );
                            let length = headers.len();
                            write!(out, "HMSG {inbox} {sid} {length} {length}\r\n{headers}\r\n")?;
                        }
                        Say::Status(status) => {
                            let headers = format!("NATS/1.0 {status}\r\n\r\n");
                            let length = headers.len();
                            write!(out, "HMSG {inbox} {sid} {length} {length}\r\n{headers}\r\n")?;
                        }
                        Say::Raw(text) => out.write_all(text.as_bytes())?,
                    }
                }
            }
            _ => {}
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn after_anything_missed_everything_is_read_again() {
    let all = || vec![Say::Put("peers.a", 1, 1, 1), Say::Put("peers.b", 2, 2, 0)];
    let whole = ["peers.a", "peers.b"].as_slice();
    let first = ["peers.a"].as_slice();
    let begun = || Say::Put("peers.a", 1, 1, 0);
    // Over the last two the library panics.
    let cases: Vec<Case<'_>> = vec![
        (
            "a message missed in the middle of the records",
            vec![Say::Put("peers.a", 1, 1, 2), Say::Put("peers.b", 2, 3, 0)],
            vec![whole],
        ),
        ("the first message missed", vec![Say::Put("peers.b", 2, 2, 0)], vec![whole]),
        ("a message missed later", vec![begun(), Say::Put("peers.c", 5, 3, 0)], vec![first, whole]),
        ("a heartbeat after one missed", vec![begun(), Say::Heartbeat(2)], vec![first, whole]),
        (
            "a heartbeat among the records, after one missed",
            vec![Say::Put("peers.a", 1, 1, 5), Say::Heartbeat(3)],
            vec![whole],
        ),
        (
            "the consumer ended",
            vec![begun(), Say::Status("409 Consumer Deleted")],
            vec![first, whole],
        ),
        (
            "fewer records than were counted",
            vec![Say::Put("peers.a", 1, 1, 5), Say::Heartbeat(1), Say::Status("409 x")],
            vec![first, whole],
        ),
        (
            "a message longer than there are numbers",
            vec![begun(), Say::Raw("MSG a 1 18446744073709551610\r\nx\r\n")],
            vec![whole],
        ),
        ("an end without words", vec![begun(), Say::Raw("-ERR\r\n")], vec![whole]),
    ];
    let mut tasks = Vec::new();
    for (what, script, expected) in cases {
        let server = scripted(vec![script, all()]);
        tasks.push(tokio::spawn(async move {
            let mut watch = Nats::connect(settings(server, Login::None)).unwrap().watch();
            for keys in expected {
                let read: Vec<String> =
                    snapshot(&mut watch).await.1.into_iter().map(|(key, ..)| key).collect();
                assert_eq!(read, keys, "{what}");
            }
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
}

/// Whatever a receiver knows from what it was told.
async fn fold(mut watch: NatsWatch, known: Arc<Mutex<BTreeMap<String, (Bytes, u64)>>>) {
    loop {
        let event = watch.next().await;
        let mut known = known.lock().unwrap();
        match event {
            Event::Snapshot { entries, .. } => {
                *known = entries.into_iter().map(|e| (e.key, (e.value, e.revision))).collect();
            }
            Event::Put(put) => drop(known.insert(put.key, (put.value, put.revision))),
            Event::Deleted { key, .. } => drop(known.remove(&key)),
            Event::Away { .. } => {}
        }
    }
}

/// Servers, ways, consumers and buckets go and come at random while records are written; in the end all know what there is.
#[cfg_attr(not(feature = "all"), ignore = "takes minutes: make test-all")]
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn whatever_happens_all_come_to_know_what_there_is() {
    let mut server = plain("chaos");
    let way = nats::Way::to(server.address()).unwrap();
    let mut all = Vec::new();
    for address in [server.address(), way.address(), server.address(), way.address()] {
        let registry = Nats::connect(settings(address, Login::None)).unwrap();
        let known = Arc::new(Mutex::new(BTreeMap::new()));
        let task = tokio::spawn(fold(registry.watch(), known.clone()));
        all.push((registry, known, task));
    }
    let seed = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok());
    let mut state = seed.unwrap_or_else(|| getrandom::u64().unwrap());
    println!("SEED={state}");
    let mut random = move |below: u64| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    let pause = |ms: u64| tokio::time::sleep(Duration::from_millis(ms));
    let until = Instant::now() + Duration::from_secs(120);
    while Instant::now() < until {
        let what = random(12);
        match what {
            0 => {
                server.kill();
                pause(random(3_000)).await;
                server.start().unwrap();
            }
            1 => {
                server.pause().unwrap();
                pause(random(14_000)).await;
                server.resume().unwrap();
            }
            2 => {
                way.break_off();
                pause(random(14_000)).await;
                way.mend();
            }
            _ => {
                let mut admin = server.client(&NOBODY).unwrap();
                match what {
                    3 => {
                        for consumer in admin.consumers(BUCKET).unwrap() {
                            // It may have ended by itself.
                            let _ = admin.delete_consumer(BUCKET, &consumer);
                        }
                    }
                    4 => {
                        admin.delete_bucket(BUCKET).unwrap();
                        pause(random(1_000)).await;
                        admin.create_bucket(BUCKET).unwrap();
                    }
                    _ => {
                        for _ in 0..random(50) {
                            let key = format!("peers.{}", random(20));
                            if random(4) == 0 {
                                admin.delete(BUCKET, &key).unwrap();
                            } else {
                                admin.put(BUCKET, &key, random(1_000).to_string()).unwrap();
                            }
                        }
                    }
                }
            }
        }
        pause(random(2_000)).await;
    }
    let mut admin = server.client(&NOBODY).unwrap();
    let revision = admin.put(BUCKET, "peers.end", "end").unwrap();
    let mut there = BTreeMap::from([("peers.end".to_owned(), (Bytes::from("end"), revision))]);
    for n in 0..20 {
        let key = format!("peers.{n}");
        if let Some((revision, value)) = admin.get(BUCKET, &key).unwrap()
            && !value.is_empty()
        {
            there.insert(key, (value.into(), revision));
        }
    }
    for (n, (_, known, _)) in all.iter().enumerate() {
        let deadline = Instant::now() + PATIENCE;
        while *known.lock().unwrap() != there {
            assert!(Instant::now() < deadline, "{n}: {:?}\n{there:?}", known.lock().unwrap());
            pause(50).await;
        }
    }
    assert!(all.iter().all(|(_, _, task)| !task.is_finished()));
}
