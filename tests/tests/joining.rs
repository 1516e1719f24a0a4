//! How one node joins, in network namespaces: with real agents, wireguard-go and a real nats-server. What is decided when is
//! tested case by case beside the code (`src/mesh/src/agent/joining`); here it is the device and the bucket that count.

use std::time::Duration;

use latchkey_tests::{
    error::Result,
    mesh::{Host, Mesh, eventually, key_of},
};
use serde_json::{Value, json};

/// What a host publishes as its own range, as soon as it is joined.
fn joined(host: &Host) -> Result<String> {
    eventually(&format!("{} is joined", host.name), || {
        let status = host.status()?;
        Ok((shown(&status, "/registry/state") == "joined")
            .then(|| shown(&status, "/node/allowed_ip").to_owned()))
    })
}

/// What `latchkey status` has from the agent.
fn shown<'a>(status: &'a Value, what: &str) -> &'a str {
    status.pointer(&format!("/agent{what}")).and_then(Value::as_str).unwrap_or_default()
}

/// Whether a program's file holds the key of this boot.
fn is_identity_kept(host: &Host) -> bool {
    host.inside("/run/latchkey/identity").exists()
}

fn record_of(mesh: &Mesh, cidr: &str) -> Result<Option<Value>> {
    let record = mesh.registry.record(&key_of(cidr))?;
    Ok(record.and_then(|record| serde_json::from_str(&record.value).ok()))
}

/// Another node's record, as Ikto writes it.
fn foreign(cidr: &str) -> String {
    let key = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAEI=";
    json!({"name": "other", "public_key": key, "advertise_address": "10.99.77.2", "allowed_ip": cidr, "wg_port": 51820})
        .to_string()
}

/// No registry and no cache: the device is made, down and with the key alone, so that the identity is needed nowhere else.
#[test]
fn without_a_registry_the_device_keeps_the_key_and_the_node_joins_later() -> Result<()> {
    let mesh = Mesh::by_cloud_config("parked", 1)?;
    let host = &mesh.hosts[0];
    mesh.registry.kill();
    host.start()?;
    eventually("the device has the key", || {
        Ok(host.wg("public-key").is_ok_and(|key| key == host.key()).then_some(()))
    })?;
    eventually("no other copy of the key is left", || Ok((!is_identity_kept(host)).then_some(())))?;
    assert_eq!(host.addresses(), [""; 0]);
    // The agent that has the only other copy in its memory may end.
    assert_eq!(host.stop()?, Some(0));
    host.start()?;
    mesh.registry.start()?;
    let own = joined(host)?;
    assert!(record_of(&mesh, &own)?.is_some(), "{own}");
    assert_eq!(host.wg("public-key")?, host.key());
    Ok(())
}

/// What follows readiness is that the identity is wiped; so it must not be ready while only a file has the key.
#[test]
fn a_device_with_another_key_is_not_touched_before_the_claim() -> Result<()> {
    let mesh = Mesh::by_cloud_config("foreign", 1)?;
    let host = &mesh.hosts[0];
    mesh.registry.kill();
    host.start_wireguard_go()?;
    host.sh("wg genkey >/tmp/k && wg set wg-ikto private-key /tmp/k && rm /tmp/k")?;
    let before = host.wg("public-key")?;
    host.start()?;
    host.says("has another node's key")?;
    assert_eq!(host.wg("public-key")?, before);
    assert!(is_identity_kept(host));
    mesh.registry.start()?;
    joined(host)?;
    eventually("the device has the own key", || {
        Ok((host.wg("public-key")? == host.key() && !is_identity_kept(host)).then_some(()))
    })
}

#[test]
fn a_taken_candidate_is_passed_over_and_the_next_one_kept_for_good() -> Result<()> {
    let mesh = Mesh::by_cloud_config("candidate", 1)?;
    let host = &mesh.hosts[0];
    host.start()?;
    let first = joined(host)?;
    assert_eq!(host.stop()?, Some(0));
    let said = host.operate(&["leave"], &[])?;
    assert!(said.contains(&first), "{said}");
    assert_eq!(record_of(&mesh, &first)?, None);

    mesh.registry.put(&key_of(&first), &foreign(&first))?;
    host.start()?;
    let second = joined(host)?;
    assert_ne!(first, second);
    assert_eq!(host.stop()?, Some(0));

    // Its own record is gone, and the first one is free again.
    mesh.registry.delete(&key_of(&first))?;
    mesh.registry.delete(&key_of(&second))?;
    host.start()?;
    assert_eq!(joined(host)?, second);
    Ok(())
}

#[test]
fn leaving_takes_the_own_record_and_needs_the_agent_to_be_stopped() -> Result<()> {
    let mesh = Mesh::by_cloud_config("leave", 2)?;
    let (host, other) = (&mesh.hosts[0], &mesh.hosts[1]);
    mesh.start()?;
    let (own, others) = (joined(host)?, joined(other)?);
    let refused = host.operate(&["leave"], &[]).map_err(|error| error.to_string());
    assert!(refused.clone().is_err_and(|error| error.contains("agent is running")), "{refused:?}");
    assert_eq!(host.stop()?, Some(0));
    host.operate(&["leave"], &[])?;
    assert_eq!(record_of(&mesh, &own)?, None);
    assert!(record_of(&mesh, &others)?.is_some());
    eventually(
        "the peer is gone",
        || Ok((!other.peers().contains_key(&host.key())).then_some(())),
    )?;
    assert!(host.operate(&["leave"], &[])?.contains("no record of this node"));
    host.start()?;
    assert_eq!(joined(host)?, own, "it comes again as who it was");
    Ok(())
}

#[test]
fn a_deleted_record_is_written_again_and_a_changed_one_corrected() -> Result<()> {
    let mesh = Mesh::new("deleted", 1)?;
    let host = &mesh.hosts[0];
    host.start()?;
    joined(host)?;
    let before = mesh.registry.wait_for(&host.record_key(), |_| true)?;
    let gone = mesh.registry.delete(&host.record_key())?;
    let again = mesh.registry.wait_for(&host.record_key(), |record| record.revision > gone)?;
    let fields = |text: &str| serde_json::from_str::<Value>(text).unwrap_or_default();
    assert_eq!(fields(&again.value)["public_key"], fields(&before.value)["public_key"]);
    let changed = before.value.replace("51820", "51999");
    let revision = mesh.registry.put(&host.record_key(), &changed)?;
    let again = mesh.registry.wait_for(&host.record_key(), |record| record.revision > revision)?;
    assert_eq!(fields(&again.value)["wg_port"], json!(51820));
    joined(host).map(drop)
}

/// Its permission first, then its record.
#[test]
fn a_node_that_is_shut_out_says_so_and_its_data_plane_stays() -> Result<()> {
    let mesh = Mesh::new("revoked", 2)?;
    mesh.up()?;
    let (host, other) = (&mesh.hosts[0], &mesh.hosts[1]);
    mesh.registry.permit(&host.name, &["peers.none"])?;
    mesh.registry.reload()?;
    mesh.registry.delete(&host.record_key())?;
    eventually("the other has let go of it", || {
        Ok((!other.peers().contains_key(&host.key())).then_some(()))
    })?;
    eventually("it says that it may not", || {
        let status = host.status()?;
        let refused = shown(&status, "/registry/state") == "refused";
        Ok((refused && shown(&status, "/registry/reason").contains("permit")).then_some(()))
    })?;
    assert!(host.peers().contains_key(&other.key()));
    assert_eq!(host.addresses().len(), 1);
    Ok(())
}

#[test]
fn a_reload_changes_what_it_can_and_nothing_if_the_configuration_is_bad() -> Result<()> {
    let mesh = Mesh::new("reload", 2)?;
    mesh.up()?;
    let (host, other) = (&mesh.hosts[0], &mesh.hosts[1]);
    let port = |wanted: &str| {
        eventually("the port is another", || Ok((host.wg("listen-port")? == wanted).then_some(())))
    };
    host.set("wg_port", 51999);
    host.reload()?;
    port("51999")?;
    mesh.registry.wait_for(&host.record_key(), |record| record.value.contains(":51999"))?;
    host.reaches(other)?;
    other.reaches(host)?;

    host.set("wg_port", "many");
    host.reload()?;
    host.says("the configuration stays as it was: .*wg_port")?;
    host.set("wg_port", 51820);
    host.set("wg_dev_name", "wg-other");
    host.reload()?;
    host.says("the interface has changed: that needs a restart")?;
    port("51820")?;
    assert!(host.sh("ip link show wg-other").is_err());
    host.reaches(other)
}

/// One key on two machines: they are one node, and can not both be it; but the registry is not worn out by it.
#[test]
fn two_agents_with_one_key_do_not_wear_out_the_registry() -> Result<()> {
    let mesh = Mesh::new("clone", 2)?;
    let (host, clone) = (&mesh.hosts[0], &mesh.hosts[1]);
    clone.take_key_of(host);
    clone.set("private_address", host.fixed_address().to_string());
    mesh.registry.permit(&clone.name, &[&host.record_key()])?;
    mesh.registry.reload()?;
    host.start()?;
    joined(host)?;
    clone.start()?;
    clone.says("this node is|has no record")?;
    std::thread::sleep(Duration::from_secs(15));
    let record = mesh.registry.wait_for(&host.record_key(), |_| true)?;
    assert!(record.revision < 20, "{record:?}");
    Ok(())
}
