//! Whole meshes in network namespaces: real agents, real WireGuard (wireguard-go where the kernel has none), a real nats-server
//! that permits each node no more than protocols/ikto-kilo.md §1.6 says.
//!
//! What is shown again and again: whatever happens to the registry or to an agent, traffic over the overlay goes on, and
//! nothing that was there is removed because somebody is silent.

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    net::UdpSocket,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use latchkey_tests::{
    error::{Doing, Error, Result},
    front::Dns,
    mesh::{
        Host, INTERFACE, Mesh, PREFIX, Registry, Stream, WG_PORT, eventually, key_of, key_pair,
    },
};
use serde_json::{Value, json};

/// Exit codes of `latchkey agent`.
const ADDRESS_TAKEN: i32 = 65;

/// A member that is nowhere, as an Ikto agent writes it.
struct Ghost {
    key: String,
    allowed_ip: String,
}

impl Ghost {
    fn new(allowed_ip: &str) -> Result<Self> {
        Ok(Self { key: key_pair()?.1, allowed_ip: allowed_ip.to_owned() })
    }

    fn record(&self) -> String {
        ikto_record("ghost", &self.key, "10.99.250.2", &self.allowed_ip)
    }

    fn put(&self, registry: &Registry) -> Result<()> {
        registry.put(&key_of(&self.allowed_ip), &self.record()).map(drop)
    }
}

/// Byte for byte (protocols/ikto-kilo.md §1.4).
fn ikto_record(name: &str, key: &str, advertise: &str, allowed_ip: &str) -> String {
    format!(
        r#"{{"name":"{name}","public_key":"{key}","advertise_address":"{advertise}","allowed_ip":"{allowed_ip}","wg_port":{WG_PORT}}}"#
    )
}

/// What an Ikto agent in the host's place would write.
fn ikto_record_of(host: &Host) -> String {
    ikto_record(&host.name, &host.key(), &host.underlay().to_string(), &host.fixed_cidr())
}

/// Waits until a host's device has exactly these peers.
fn has_peers(host: &Host, peers: &[&str]) -> Result<()> {
    let wanted: BTreeSet<String> = peers.iter().map(|&p| p.to_owned()).collect();
    eventually(&format!("{} has the peers {wanted:?}", host.name), || {
        Ok((host.peers().into_keys().collect::<BTreeSet<_>>() == wanted).then_some(()))
    })
}

/// Waits until a host's device has this peer with exactly these allowed IPs.
fn has_peer(host: &Host, peer: &str, allowed_ips: &[&str]) -> Result<()> {
    let wanted: BTreeSet<String> = allowed_ips.iter().map(|&p| p.to_owned()).collect();
    eventually(&format!("{} has peer {peer} with {wanted:?}", host.name), || {
        Ok(host.peers().get(peer).filter(|peer| peer.allowed_ips == wanted).map(drop))
    })
}

fn loses(host: &Host, peer: &str) -> Result<()> {
    eventually(&format!("{} no longer has peer {peer}", host.name), || {
        Ok((!host.peers().contains_key(peer)).then_some(()))
    })
}

/// Waits until `latchkey status` says so of the agent.
fn shows(host: &Host, what: &str, is: impl Fn(&Value) -> bool) -> Result<()> {
    let mut last = Value::Null;
    let waited = eventually(&format!("the status of {} shows {what}", host.name), || {
        last = host.status().unwrap_or_else(|error| json!(error.to_string()));
        Ok(last.get("agent").is_some_and(&is).then_some(()))
    });
    if waited.is_err() {
        eprintln!("the status of {} is {last:#}", host.name);
    }
    waited
}

fn registry_state(status: &Value) -> &str {
    status.pointer("/registry/state").and_then(Value::as_str).unwrap_or_default()
}

fn joined(host: &Host) -> Result<()> {
    shows(host, "joined", |status| registry_state(status) == "joined")
}

/// The registry's keys of the records that do not count here, each with the reason.
fn problems(status: &Value) -> BTreeMap<String, String> {
    let text =
        |problem: &Value, field: &str| problem[field].as_str().unwrap_or_default().to_owned();
    let problems = status.get("problems").and_then(Value::as_array);
    problems.into_iter().flatten().map(|p| (text(p, "key"), text(p, "reason"))).collect()
}

fn lost_nothing(stream: Stream) -> Result<()> {
    let count = stream.finish()?;
    assert!(count.lost.is_empty(), "{count:?}");
    Ok(())
}

/// The record with other JSON for one of its values.
fn change(record: &str, from: &str, to: &str) -> String {
    let changed = record.replace(from, to);
    assert_ne!(changed, record);
    changed
}

// Joining.

#[test]
fn five_nodes_with_an_ikto_json_each() -> Result<()> {
    let mesh = Mesh::new("five", 5)?;
    // The others' agents start it themselves.
    mesh.hosts[0].start_wireguard_go()?;
    mesh.hosts[1].start_wireguard_go()?;
    mesh.up()?;
    for host in &mesh.hosts {
        joined(host)?;
        let record = mesh.registry.record(&host.record_key())?.expect("a record");
        let ikto_s = ikto_record_of(host);
        let first_five = ikto_s.trim_end_matches('}');
        assert!(record.value.starts_with(&format!("{first_five},")), "{}", record.value);
        assert_eq!(host.addresses(), [format!("{}/16", host.fixed_address())]);
        assert_eq!(host.wg("listen-port")?, WG_PORT.to_string());
        for other in mesh.hosts.iter().filter(|other| other.name != host.name) {
            let peer = host.peers().remove(&other.key()).expect("a peer");
            assert_eq!(peer.endpoint, Some(format!("{}:{WG_PORT}", other.underlay())));
            assert_eq!(peer.keepalive, "off");
        }
    }
    assert_eq!(mesh.registry.records()?.len(), 5);

    let socket = mesh.hosts[0].socket().display().to_string();
    let info = mesh.hosts[0].latchkey(&["info", "--socket", &socket])?;
    let block = |host: &Host| {
        format!(
            "Name: {}\nPublic Key: {}\nAdvertise Address: {}\nAllowed IP: {}\nWireGuard Port: {WG_PORT}\n\n",
            host.name,
            host.key(),
            host.underlay(),
            host.fixed_cidr()
        )
    };
    assert!(info.starts_with(&format!("Local Node:\n{}Peers:\n", block(&mesh.hosts[0]))), "{info}");
    for other in &mesh.hosts[1..] {
        assert!(info.contains(&block(other)), "{info}");
    }
    Ok(())
}

/// Restarts included: the key is then in the device alone.
#[test]
fn two_nodes_by_the_cloud_config_and_the_handed_over_identity() -> Result<()> {
    let mesh = Mesh::by_cloud_config("cloud", 2)?;
    mesh.up()?;
    let [a, b] = &mesh.hosts[..] else { unreachable!() };
    for host in &mesh.hosts {
        joined(host)?;
        assert!(!host.inside("/run/latchkey/identity").exists(), "the identity was taken");
        assert_eq!(host.wg("private-key")?, *host.private_key.borrow());
        let address = host.overlay()?;
        assert_eq!(host.addresses(), [format!("{address}/16")]);
        let record = mesh.registry.record(&key_of(&format!("{address}/128")))?.expect("a record");
        let value: Value = serde_json::from_str(&record.value).unwrap();
        assert_eq!(value["advertise_address"], host.underlay().to_string());
        assert!(value["signature"].is_string(), "{value}");
    }
    let (before, records) = (b.overlay()?, mesh.registry.records()?);
    let stream = a.stream_to(b)?;
    stream.flows(50)?;
    b.stop()?;
    b.start()?;
    joined(b)?;
    stream.flows(50)?;
    lost_nothing(stream)?;
    assert_eq!(b.overlay()?, before);
    assert_eq!(mesh.registry.records()?, records, "an equal record is not written again");
    Ok(())
}

#[test]
fn twenty_nodes() -> Result<()> {
    let mesh = Mesh::new("twenty", 20)?;
    mesh.start()?;
    for (n, host) in mesh.hosts.iter().enumerate() {
        let others: Vec<_> =
            mesh.hosts.iter().map(Host::key).filter(|k| *k != host.key()).collect();
        has_peers(host, &others.iter().map(String::as_str).collect::<Vec<_>>())?;
        host.reaches(&mesh.hosts[(n + 7) % 20])?;
    }
    let mut resident: Vec<u64> = Vec::new();
    for host in &mesh.hosts {
        let status = fs::read_to_string(format!("/proc/{}/status", host.agent_id()?)).unwrap();
        let line = status.lines().find(|l| l.starts_with("VmRSS:")).unwrap();
        resident.push(line.split_whitespace().nth(1).unwrap().parse().unwrap());
    }
    eprintln!("resident memory of the agents: {:?} KiB at most", resident.iter().max());
    Ok(())
}

/// In IPv4, five in a mesh with six addresses: nine times in ten some meet.
#[test]
fn nodes_whose_keys_lead_to_one_address_get_two() -> Result<()> {
    let mesh = Mesh::by_cloud_config("collision", 5)?;
    for host in &mesh.hosts {
        host.set("prefix", "10.77.0.0/29");
    }
    mesh.up()?;
    let addresses: BTreeSet<_> = mesh.hosts.iter().map(|h| h.overlay().unwrap()).collect();
    assert_eq!(addresses.len(), 5, "{addresses:?}");
    eventually("there are five records", || Ok((mesh.registry.records()?.len() == 5).then_some(())))
}

// What the server permits.

#[test]
fn a_node_without_a_permission_for_its_key_says_so_and_changes_nothing_of_the_others() -> Result<()>
{
    let mesh = Mesh::new("permission", 3)?;
    let [a, b, stranger] = &mesh.hosts[..] else { unreachable!() };
    mesh.registry.permit(&stranger.name, &["peers.another"])?;
    mesh.registry.reload()?;
    a.start()?;
    b.start()?;
    a.reaches(b)?;
    let stream = a.stream_to(b)?;
    let before = mesh.registry.records()?;
    stranger.start()?;
    stranger.says("(?i)permit|permission")?;
    shows(stranger, "refused", |status| {
        let reason = status.pointer("/registry/reason").and_then(Value::as_str);
        registry_state(status) == "refused" && reason.is_some_and(|r| r.contains("permi"))
    })?;
    assert_eq!(mesh.registry.records()?, before);
    has_peers(a, &[&b.key()])?;
    stream.flows(25)?;
    lost_nothing(stream)?;

    // Permitted later, it joins by itself.
    mesh.registry.permit(&stranger.name, &[&stranger.record_key()])?;
    mesh.registry.reload()?;
    stranger.reaches(a)
}

#[test]
fn a_node_with_a_wrong_password_says_so_and_keeps_trying() -> Result<()> {
    let mesh = Mesh::new("password", 2)?;
    let [a, b] = &mesh.hosts[..] else { unreachable!() };
    a.start()?;
    joined(a)?;
    b.set("nats_url", a_url_with_a_wrong_password(&mesh.registry.url("h2")));
    b.start()?;
    b.says("(?i)authorization|login|password|refuse")?;
    let log = b.latchkey(&["status", "--json", "--socket", &b.socket().display().to_string()]);
    assert!(!format!("{log:?}").contains("wrong-secret"), "no secret is shown");
    assert_eq!(b.said("wrong-secret")?, 0, "no secret is logged");
    Ok(())
}

fn a_url_with_a_wrong_password(url: &str) -> String {
    url.replace("secret-of", "wrong-secret-of")
}

// The registry comes and goes.

#[test]
fn without_a_registry_at_boot_a_node_comes_up_with_the_members_it_knew() -> Result<()> {
    let mesh = Mesh::new("away-at-boot", 3)?;
    let [a, b, newcomer] = &mesh.hosts[..] else { unreachable!() };
    a.start()?;
    b.start()?;
    a.reaches(b)?;
    joined(b)?;
    // The cache is written soon, not at once.
    eventually("b has a cache", || Ok(b.sh("ls /var/lib/latchkey/* | grep .").ok().map(drop)))?;
    has_peers(b, &[&a.key()])?;
    thread::sleep(Duration::from_secs(3));
    let private_key = b.private_key.borrow().clone();
    assert!(b.sh(&format!("! grep -r '{private_key}' /var/lib/latchkey")).is_ok());

    mesh.registry.kill();
    b.kill();
    let _ = b.kill_wireguard_go();
    assert!(b.addresses().is_empty());
    b.start()?;
    b.reaches(a)?;
    shows(b, "away, and members from the cache", |status| {
        registry_state(status) == "away"
            && status.pointer("/registry/from_cache").and_then(Value::as_bool) == Some(true)
    })?;

    // One that knows nobody waits, and joins with the others.
    newcomer.start()?;
    shows(newcomer, "away", |status| registry_state(status) == "away")?;
    assert!(newcomer.addresses().is_empty());
    mesh.registry.start()?;
    joined(b)?;
    mesh.connected()
}

/// One stream of numbered packets through all of it. After each event news must get through again.
#[test]
fn whatever_happens_to_the_registry_traffic_flows_and_nothing_is_removed() -> Result<()> {
    let mesh = Mesh::new("outages", 3)?;
    mesh.up()?;
    let [a, b, _] = &mesh.hosts[..] else { unreachable!() };
    let server = &mesh.registry.servers[0];
    let stream = a.stream_to(b)?;
    let all = |host: &Host| -> Vec<String> {
        mesh.hosts.iter().map(Host::key).filter(|key| *key != host.key()).collect()
    };
    let nothing_is_removed = |phase: &str| {
        for host in &mesh.hosts {
            let peers = host.peers();
            for other in all(host) {
                assert!(peers.contains_key(&other), "{phase}: {} has lost {other}", host.name);
            }
        }
    };
    let mut n = 0;
    let mut news_get_through = |phase: &str| -> Result<()> {
        n += 1;
        let ghost = Ghost::new(&format!("fd10:99:{n}::/48"))?;
        ghost.put(&mesh.registry)?;
        for host in &mesh.hosts {
            eventually(&format!("{phase}: news reach {}", host.name), || {
                Ok(host.peers().contains_key(&ghost.key).then_some(()))
            })?;
        }
        mesh.registry.delete(&key_of(&ghost.allowed_ip))?;
        for host in &mesh.hosts {
            loses(host, &ghost.key)?;
            joined(host)?;
        }
        nothing_is_removed(phase);
        stream.flows(10)
    };
    news_get_through("before")?;

    server.kill();
    for host in &mesh.hosts {
        shows(host, "away", |status| registry_state(status) == "away")?;
    }
    nothing_is_removed("killed");
    stream.flows(50)?;
    server.start()?;
    news_get_through("restarted")?;

    server.pause()?;
    stream.flows(100)?;
    nothing_is_removed("paused");
    server.resume()?;
    news_get_through("resumed")?;

    mesh.partition()?;
    for host in &mesh.hosts {
        shows(host, "away", |status| registry_state(status) == "away")?;
    }
    nothing_is_removed("partitioned");
    mesh.heal()?;
    news_get_through("healed")?;

    mesh.registry.delete_bucket()?;
    stream.flows(100)?;
    nothing_is_removed("without a bucket");
    mesh.registry.create_bucket()?;
    all_claim_again(&mesh)?;
    news_get_through("bucket made anew")?;

    mesh.registry.delete_bucket()?;
    mesh.registry.create_bucket()?;
    all_claim_again(&mesh)?;
    news_get_through("bucket made anew at once")?;

    server.lose_store()?;
    server.start()?;
    stream.flows(50)?;
    nothing_is_removed("with an empty store");
    mesh.registry.create_bucket()?;
    all_claim_again(&mesh)?;
    news_get_through("with an empty store")?;

    mesh.connected()?;
    lost_nothing(stream)
}

fn all_claim_again(mesh: &Mesh) -> Result<()> {
    for host in &mesh.hosts {
        mesh.registry.wait_for(&host.record_key(), |record| record.value.contains(&host.key()))?;
    }
    Ok(())
}

#[test]
fn one_of_three_servers_is_lost_whichever_it_is() -> Result<()> {
    let mesh = Mesh::with_servers("cluster", 4, 3)?;
    let [a, b, c, d] = &mesh.hosts[..] else { unreachable!() };
    // An operator creates the bucket with an ikto.json of his own.
    a.set("nats_url", mesh.registry.administrator_url());
    let create = || a.operate(&["registry", "create"], &["--replicas", "3"]);
    // Refused as long as the servers have not found each other.
    eventually("the bucket is created", || match create() {
        Err(Error::Tool { .. }) => Ok(None),
        done => done.map(Some),
    })?;
    let again = create()?;
    assert!(again.contains("as it should be"), "{again}");
    a.set("nats_url", mesh.registry.url(&a.name));
    let stream = mesh.registry.stream()?;
    assert_eq!(stream["config"]["num_replicas"], 3, "{stream}");
    a.start()?;
    b.start()?;
    a.reaches(b)?;
    let traffic = a.stream_to(b)?;

    let leader = mesh.registry.leader()?;
    leader.kill();
    c.start()?;
    c.reaches(a)?;
    c.reaches(b)?;
    leader.start()?;

    // And then one after the other, so that it is the connected one of each agent once.
    let lost = if cfg!(feature = "all") { 3 } else { 1 };
    for (n, server) in (1..).zip(mesh.registry.servers.iter().take(lost)) {
        mesh.registry.in_step()?;
        server.kill();
        mesh.registry.leader()?;
        let ghost = Ghost::new(&format!("fd10:99:{n}::/48"))?;
        eventually("the bucket takes a record", || Ok(ghost.put(&mesh.registry).ok()))?;
        for host in [a, b, c] {
            has_peer(host, &ghost.key, &[&ghost.allowed_ip])?;
        }
        server.start()?;
    }
    d.start()?;
    d.reaches(a)?;
    traffic.flows(25)?;
    lost_nothing(traffic)
}

// Who owns an address.

#[test]
fn two_nodes_race_for_one_address_and_the_loser_touches_nothing() -> Result<()> {
    let mesh = Mesh::new("race", 2)?;
    let [a, b] = &mesh.hosts[..] else { unreachable!() };
    b.set("private_address", a.fixed_address().to_string());
    mesh.registry.permit(&b.name, &[&a.record_key()])?;
    mesh.registry.reload()?;
    // The loser may have a device of before; it must stay as it is.
    for host in &mesh.hosts {
        host.start_wireguard_go()?;
        host.sh(&format!(
            "ip address add fd10:77::1/16 dev {INTERFACE}; ip link set {INTERFACE} up"
        ))?;
    }
    mesh.start()?;
    let record = mesh.registry.wait_for(&a.record_key(), |_| true)?;
    let (winner, loser) = if record.value.contains(&a.key()) { (a, b) } else { (b, a) };
    assert_eq!(loser.exit_code()?, Some(ADDRESS_TAKEN));
    loser.says("belongs to|held by|taken|another node")?;
    assert_eq!(loser.addresses(), ["fd10:77::1/16"]);
    assert_ne!(loser.wg("private-key")?, *loser.private_key.borrow());
    joined(winner)?;
    eventually("the winner has the address", || {
        Ok((winner.addresses() == [format!("{}/16", a.fixed_address())]).then_some(()))
    })?;
    assert_eq!(mesh.registry.record(&a.record_key())?, Some(record));
    Ok(())
}

/// To Ikto these are two addresses, to WireGuard one.
#[test]
fn a_range_that_overlaps_another_s_is_taken() -> Result<()> {
    let mesh = Mesh::new("overlap", 3)?;
    let [a, b, c] = &mesh.hosts[..] else { unreachable!() };
    a.set("private_address", "fd10:a:b::1");
    b.set("private_address", "fd10:a:b::2");
    mesh.registry.permit(&a.name, &[&key_of("fd10:a:b::1/48")])?;
    mesh.registry.permit(&b.name, &[&key_of("fd10:a:b::2/48")])?;
    mesh.registry.reload()?;
    a.start()?;
    c.start()?;
    a.reaches(c)?;
    let stream = c.stream_to(a)?;
    b.start()?;
    assert_eq!(b.exit_code()?, Some(ADDRESS_TAKEN));
    assert!(b.addresses().is_empty());
    assert!(mesh.registry.record(&key_of("fd10:a:b::2/48"))?.is_none());

    // An Ikto agent would write it all the same: whoever was first keeps the range, with everybody.
    let late = Ghost::new("fd10:a:b::2/48")?;
    late.put(&mesh.registry)?;
    for host in [a, c] {
        shows(host, "the overlap", |s| problems(s).contains_key(&key_of("fd10:a:b::2/48")))?;
    }
    has_peers(c, &[&a.key()])?;
    has_peers(a, &[&c.key()])?;
    stream.flows(25)?;
    lost_nothing(stream)
}

#[test]
fn a_foreign_key_in_our_place_takes_no_data_plane_away() -> Result<()> {
    let mesh = Mesh::new("usurper", 2)?;
    mesh.up()?;
    let [a, b] = &mesh.hosts[..] else { unreachable!() };
    let usurper = Ghost::new(&b.fixed_cidr())?;
    usurper.put(&mesh.registry)?;
    shows(b, "that it is no longer in the registry", |status| registry_state(status) == "refused")?;
    has_peers(a, &[&usurper.key])?;
    assert!(b.peers().contains_key(&a.key()), "{:?}", b.peers());
    mesh.registry.delete(&b.record_key())?;
    mesh.registry.wait_for(&b.record_key(), |record| record.value.contains(&b.key()))?;
    has_peers(a, &[&b.key()])?;
    joined(b)?;
    mesh.connected()
}

#[test]
fn an_own_record_that_somebody_deleted_is_written_again() -> Result<()> {
    let mesh = Mesh::new("deleted", 2)?;
    mesh.up()?;
    let [a, b] = &mesh.hosts[..] else { unreachable!() };
    let deleted = mesh.registry.delete(&b.record_key())?;
    mesh.registry.wait_for(&b.record_key(), |record| record.revision > deleted)?;
    has_peers(a, &[&b.key()])?;
    mesh.connected()
}

#[test]
fn bad_records_are_shown_and_hurt_nobody() -> Result<()> {
    let mesh = Mesh::new("bad-records", 2)?;
    mesh.up()?;
    let [a, b] = &mesh.hosts[..] else { unreachable!() };
    let stream = a.stream_to(b)?;
    let good = Ghost::new("fd10:500::/48")?;
    let everything = Ghost::new("::/0")?;
    let outside = Ghost::new("fd20:1::/48")?;
    let underlay = Ghost::new("10.99.0.0/16")?;
    let of = |cidr: &str| key_of(cidr);
    let record = |cidr: &str| Ok(Ghost::new(cidr)?.record());
    let bad: Vec<(String, String)> = vec![
        (of("::/0"), everything.record()),
        (of("fd20:1::/48"), outside.record()),
        (of("10.99.0.0/16"), underlay.record()),
        (of("fd10:501::/48"), "garbage".into()),
        (of("fd10:502::/48"), "[]".into()),
        (of("fd10:503::/48"), "{}".into()),
        (of("fd10:504::/48"), "\u{0}\u{1}".into()),
        (of("fd10:505::/48"), format!("{}{}", record("fd10:505::/48")?, "x".repeat(20_000))),
        (of("fd10:506::/48"), change(&record("fd10:506::/48")?, "=\"", "\"")),
        (of("fd10:507::/48"), change(&record("fd10:507::/48")?, "10.99.250.2", "fd10:507::1")),
        (of("fd10:508::/48"), change(&record("fd10:508::/48")?, "51820", "-1")),
        (of("fd10:509::/48"), record("fd10:50a::/48")?),
        ("peers.not-base64!".replace('!', ""), record("fd10:50b::/48")?),
        // The whole mesh, and a part of a that lies in its own.
        (of(PREFIX), record(PREFIX)?),
        (of("fd10:0:1:1::/64"), record("fd10:0:1:1::/64")?),
    ];
    for (key, value) in &bad {
        mesh.registry.put(key, value)?;
    }
    good.put(&mesh.registry)?;
    for host in &mesh.hosts {
        has_peer(host, &good.key, &[&good.allowed_ip])?;
        shows(host, "every bad record", |status| {
            let problems = problems(status);
            bad.iter().all(|(key, _)| problems.contains_key(key))
        })?;
        assert_eq!(host.peers().len(), 2, "{:?}", host.peers());
    }
    stream.flows(25)?;
    lost_nothing(stream)?;
    // Who starts among them joins as well.
    b.stop()?;
    b.start()?;
    joined(b)?;
    mesh.connected()
}

#[test]
fn a_stale_record_of_a_live_node_may_go_without_harm() -> Result<()> {
    let mesh = Mesh::new("stale", 2)?;
    mesh.up()?;
    let [a, b] = &mesh.hosts[..] else { unreachable!() };
    // b's operator gives it another address, and no more a permission for the former, whose record stays.
    let former = b.record_key();
    mesh.registry.permit(&b.name, &[&key_of("fd10:700::1/48")])?;
    mesh.registry.reload()?;
    b.stop()?;
    b.set("private_address", "fd10:700::1");
    b.start()?;
    has_peer(a, &b.key(), &["fd10:0:2::/48", "fd10:700::/48"])?;
    a.reaches(b)?;
    let stream = a.stream_to(b)?;
    stream.flows(10)?;
    mesh.registry.delete(&former)?;
    has_peer(a, &b.key(), &["fd10:700::/48"])?;
    stream.flows(25)?;
    lost_nothing(stream)
}

#[test]
fn a_new_key_under_one_address_takes_the_place_of_the_old_one() -> Result<()> {
    let mesh = Mesh::new("rekey", 2)?;
    mesh.up()?;
    let [a, b] = &mesh.hosts[..] else { unreachable!() };
    let old = b.key();
    b.stop()?;
    b.new_key()?;
    // To the registry that is another node in the old one's place.
    b.start()?;
    assert_eq!(b.exit_code()?, Some(ADDRESS_TAKEN));
    has_peers(a, &[&old])?;

    mesh.registry.put(&b.record_key(), &ikto_record_of(b))?;
    has_peers(a, &[&b.key()])?;
    b.start()?;
    joined(b)?;
    mesh.connected()
}

// Agents come and go.

/// Seconds of dying at random.
const DYING: u64 = if cfg!(feature = "all") { 120 } else { 30 };

#[test]
fn agents_die_at_random_moments_and_no_packet_is_lost() -> Result<()> {
    let mesh = Mesh::new("dying", 3)?;
    mesh.up()?;
    let [a, b, c] = &mesh.hosts[..] else { unreachable!() };
    let streams = [a.stream_to(b)?, b.stream_to(c)?, c.stream_to(a)?];
    let random = |below: u64| getrandom::u64().unwrap() % below;
    let until = Instant::now() + Duration::from_secs(DYING);
    let mut deaths = 0;
    while Instant::now() < until {
        let host = &mesh.hosts[random(3) as usize];
        if random(4) == 0 {
            // None: the signal came before the agent was ready for it.
            assert!(matches!(host.stop()?, Some(0) | None));
        } else {
            host.kill();
        }
        deaths += 1;
        thread::sleep(Duration::from_millis(random(300)));
        host.start()?;
        // Sometimes before it has done anything, sometimes long after it has done all.
        thread::sleep(Duration::from_millis(random(1500)));
        for stream in &streams {
            stream.flows(1)?;
        }
    }
    for host in &mesh.hosts {
        joined(host)?;
    }
    for stream in streams {
        let count = stream.finish()?;
        eprintln!("{deaths} deaths: {} packets, {:?} lost", count.sent, count.lost);
        assert!(count.lost.is_empty(), "{count:?}");
    }
    let records = mesh.registry.records()?;
    assert_eq!(records.len(), 3);
    assert!(records.values().all(|r| r.revision <= 3), "no restart has written: {records:?}");
    mesh.connected()
}

#[test]
fn what_others_do_to_the_device_is_repaired() -> Result<()> {
    let mesh = Mesh::new("repair", 2)?;
    for host in &mesh.hosts {
        host.start_wireguard_go()?;
    }
    mesh.up()?;
    let [a, b] = &mesh.hosts[..] else { unreachable!() };
    let stranger = key_pair()?.1;
    b.sh(&format!(
        "wg set {INTERFACE} listen-port 1234 peer {stranger} allowed-ips fd10:5::/48
         wg set {INTERFACE} peer {} remove",
        a.key()
    ))?;
    has_peers(b, &[&a.key()])?;
    eventually("the port is back", || {
        Ok((b.wg("listen-port")? == WG_PORT.to_string()).then_some(()))
    })?;
    mesh.connected()?;

    // b speaks first: after some of this a does not know yet that its session is gone.
    let repaired = || b.reaches(a).and_then(|()| a.reaches(b));
    b.sh(&format!("ip address flush dev {INTERFACE} scope global"))?;
    repaired()?;
    b.sh(&format!("ip link set {INTERFACE} down"))?;
    repaired()?;
    b.sh(&format!("ip link delete {INTERFACE}"))?;
    repaired()?;
    b.kill_wireguard_go()?;
    repaired()?;
    shows(b, "no trouble", |status| {
        registry_state(status) == "joined"
            && status.pointer("/node/trouble").is_none_or(Value::is_null)
    })
}

#[test]
fn a_node_that_moves_is_followed_and_stays_where_it_is_heard() -> Result<()> {
    let mesh = Mesh::new("roaming", 2)?;
    mesh.up()?;
    let [a, b] = &mesh.hosts[..] else { unreachable!() };
    b.unplug()?;
    b.plug_in(77)?;
    let moved = Some(format!("10.99.2.77:{WG_PORT}"));
    // It is heard from, as its own packets go to where the other still is.
    b.reaches(a)?;
    let endpoint = || a.peers().remove(&b.key()).and_then(|peer| peer.endpoint);
    eventually("a has heard where b is", || Ok((endpoint() == moved).then_some(())))?;

    // Its record still names the former address, and somebody writes it again, as Ikto does at each start.
    let stream = a.stream_to(b)?;
    let again = mesh.registry.record(&b.record_key())?.expect("a record").value;
    mesh.registry.put(&b.record_key(), &again)?;
    let ghost = Ghost::new("fd10:900::/48")?;
    ghost.put(&mesh.registry)?;
    has_peer(a, &ghost.key, &[&ghost.allowed_ip])?;
    assert_eq!(endpoint(), moved);
    a.kill();
    a.start()?;
    joined(a)?;
    stream.flows(50)?;
    assert_eq!(endpoint(), moved);
    lost_nothing(stream)
}

#[test]
fn a_node_that_finds_its_own_address_tells_the_others_when_it_has_another() -> Result<()> {
    let mesh = Mesh::by_cloud_config("moving", 2)?;
    mesh.up()?;
    let [a, b] = &mesh.hosts[..] else { unreachable!() };
    let key = key_of(&format!("{}/128", b.overlay()?));
    b.unplug()?;
    b.plug_in(77)?;
    mesh.registry.wait_for(&key, |record| record.value.contains(r#""10.99.2.77""#))?;
    eventually("a dials the new address", || {
        let endpoint = a.peers().remove(&b.key()).and_then(|peer| peer.endpoint);
        Ok((endpoint == Some(format!("10.99.2.77:{WG_PORT}"))).then_some(()))
    })?;
    a.reaches(b)
}

#[test]
fn reload_takes_a_new_port_and_a_keepalive_without_a_restart() -> Result<()> {
    let mesh = Mesh::by_cloud_config("reload", 2)?;
    mesh.up()?;
    let [a, b] = &mesh.hosts[..] else { unreachable!() };
    let agent = b.agent_id()?;
    b.set("port", "51999");
    b.set("keepalive", "7");
    b.reload()?;
    let key = key_of(&format!("{}/128", b.overlay()?));
    mesh.registry.wait_for(&key, |record| record.value.contains(r#""wg_port":51999"#))?;
    eventually("the device has port and keepalive", || {
        let keepalive = b.peers().remove(&a.key()).map(|peer| peer.keepalive);
        Ok((b.wg("listen-port")? == "51999" && keepalive.as_deref() == Some("7")).then_some(()))
    })?;
    eventually("a dials the new port", || {
        let endpoint = a.peers().remove(&b.key()).and_then(|peer| peer.endpoint);
        Ok((endpoint == Some(format!("{}:51999", b.underlay()))).then_some(()))
    })?;
    mesh.connected()?;
    assert_eq!(b.agent_id()?, agent);

    // A configuration that is wrong changes nothing, and is said.
    b.set("keepalive", "often");
    b.reload()?;
    b.says("keepalive")?;
    mesh.connected()
}

#[test]
fn down_takes_the_device_away_and_leave_the_own_record_alone() -> Result<()> {
    let mesh = Mesh::new("leave", 3)?;
    mesh.up()?;
    let [a, b, c] = &mesh.hosts[..] else { unreachable!() };
    assert_eq!(b.stop()?, Some(0));
    assert!(b.reaches(a).is_ok(), "the data plane outlives the agent");
    b.operate(&["agent"], &["--down"])?;
    assert!(b.addresses().is_empty());
    assert_eq!(mesh.registry.records()?.len(), 3);

    b.operate(&["leave"], &[])?;
    let records = mesh.registry.records()?;
    assert_eq!(
        records.into_keys().collect::<BTreeSet<_>>(),
        [a.record_key(), c.record_key()].into()
    );
    has_peers(a, &[&c.key()])?;
    has_peers(c, &[&a.key()])?;
    a.reaches(c)?;
    b.start()?;
    mesh.connected()
}

#[test]
fn a_node_advertised_by_name_is_found_again_when_the_name_means_another_address() -> Result<()> {
    const NAME: &str = "b.mesh.example.org";
    let mesh = Mesh::by_cloud_config("dns", 2)?;
    let [a, b] = &mesh.hosts[..] else { unreachable!() };
    let serve = |host: &Host| {
        host.ask_dns_at("127.0.0.1")?;
        let bind = || UdpSocket::bind(("127.0.0.1", 53));
        let socket = host.site.within(bind)?.doing(|| "listen for DNS".into())?;
        Ok(Dns::of(socket, NAME, b.underlay()))
    };
    let dns = mesh.hosts.iter().map(serve).collect::<Result<Vec<_>>>()?;
    b.set("advertise_address", NAME);
    mesh.up()?;
    let key = key_of(&format!("{}/128", b.overlay()?));
    let record = mesh.registry.wait_for(&key, |record| record.value.contains(NAME))?;
    assert!(record.value.contains(r#""advertise_address":"10.99.2.2""#), "{}", record.value);
    assert!(dns.iter().all(|dns| dns.heard() > 0));

    // The record stays as it is, as b's agent does not run.
    b.kill();
    b.unplug()?;
    b.plug_in(77)?;
    dns.iter().for_each(|dns| dns.change(b.underlay()));
    // a alone has something to say, so that b is not heard of before it is found.
    eventually("a finds b", || {
        Ok(a.is_answered(b.overlay()?, Duration::from_secs(1))?.then_some(()))
    })?;
    assert_eq!(mesh.registry.record(&key)?, Some(record));
    b.start()?;
    mesh.registry
        .wait_for(&key, |record| record.value.contains(r#""advertise_address":"10.99.2.77""#))?;
    mesh.connected()
}

// Signatures.

#[test]
fn signatures_are_required_preferred_or_ignored_as_configured() -> Result<()> {
    let mesh = Mesh::by_cloud_config("signatures", 4)?;
    let [require, prefer, ignore, other] = &mesh.hosts[..] else { unreachable!() };
    for (host, policy) in [(require, "require"), (prefer, "prefer"), (ignore, "ignore")] {
        host.set("signatures", policy);
    }
    mesh.up()?;
    let unsigned = Ghost::new("fd10:1:1:1:1:1:1:1/128")?;
    unsigned.put(&mesh.registry)?;
    // The other node's record, with an endpoint that it did not sign.
    let key = key_of(&format!("{}/128", other.overlay()?));
    let genuine = mesh.registry.record(&key)?.expect("a record");
    other.stop()?;
    let forged = genuine.value.replace("10.99.4.2", "10.99.250.7");
    assert_ne!(forged, genuine.value);
    mesh.registry.put(&key, &forged)?;

    has_peers(require, &[&prefer.key(), &ignore.key()])?;
    has_peers(prefer, &[&require.key(), &ignore.key(), &unsigned.key])?;
    has_peers(ignore, &[&require.key(), &prefer.key(), &other.key(), &unsigned.key])?;
    shows(require, "both", |s| {
        problems(s).keys().cloned().collect::<BTreeSet<_>>()
            == [key.clone(), key_of(&unsigned.allowed_ip)].into()
    })?;
    shows(prefer, "the forged one", |s| {
        problems(s).keys().cloned().collect::<BTreeSet<_>>() == [key.clone()].into()
    })?;

    // Its agent sees what was made of its record, and writes it anew.
    other.start()?;
    mesh.registry.wait_for(&key, |record| record.value == genuine.value)?;
    mesh.connected()
}

// Side by side with Ikto.

/// An installed `ikto` to run beside; without one the test is skipped, and says so.
fn ikto() -> Option<PathBuf> {
    let ikto = env::var_os("LATCHKEY_TEST_IKTO").map(PathBuf::from);
    if ikto.is_none() {
        eprintln!("skipped: LATCHKEY_TEST_IKTO names no ikto program");
    }
    ikto
}

#[test]
fn with_iktos_in_one_mesh() -> Result<()> {
    let Some(ikto) = ikto() else { return Ok(()) };
    let mesh = Mesh::new("ikto", 4)?;
    let [ikto1, ikto2, ours1, ours2] = &mesh.hosts[..] else { unreachable!() };
    for host in [ikto1, ikto2] {
        // What makes it go without credentials; each has its device beforehand.
        host.set("nats_creds", "/dev/null");
        host.start_wireguard_go()?;
    }
    ikto1.start_program(&ikto)?;
    ours1.start()?;
    ikto2.start_program(&ikto)?;
    ours2.start()?;
    mesh.connected()?;

    for host in &mesh.hosts {
        let socket = host.socket().display().to_string();
        // Ikto's peers come in random order.
        let sorted = |text: String| {
            let text = text.replace("Peers:\n", "Peers:\n\n");
            text.split("\n\n").map(str::to_owned).collect::<BTreeSet<_>>()
        };
        let ours = host.latchkey(&["info", "--socket", &socket])?;
        let theirs = host.run(&ikto, &["info", "--socket", &socket])?;
        assert_eq!(sorted(ours), sorted(theirs), "either reads the socket of {}", host.name);
    }
    let stream = ours1.stream_to(ikto1)?;
    // Ikto, started again, writes its record again; ours does not.
    ikto2.kill();
    ikto2.remove_socket()?;
    ikto2.start_program(&ikto)?;
    ours2.kill();
    ours2.start()?;
    mesh.connected()?;

    // The same file for both programs: the member changes, the others do not notice.
    ours2.stop()?;
    ours2.set("nats_creds", "/dev/null");
    ours2.start_program(&ikto)?;
    mesh.connected()?;
    // Ikto, killed, leaves its socket behind.
    ours2.kill();
    ours2.start()?;
    joined(ours2)?;
    mesh.connected()?;
    lost_nothing(stream)?;

    // Deleted records: Ikto writes its own again at its next start only, ours at once.
    mesh.registry.delete(&ikto2.record_key())?;
    has_peers(ours1, &[&ikto1.key(), &ours2.key()])?;
    ikto2.kill();
    ikto2.remove_socket()?;
    ikto2.start_program(&ikto)?;
    mesh.registry.delete(&ours2.record_key())?;
    mesh.registry.wait_for(&ours2.record_key(), |record| record.value.contains(&ours2.key()))?;
    mesh.connected()
}
