//! The mesh's registry in the demo: a nats-server with the two users that a fleet needs, and a bucket that `latchkey registry
//! create` makes.

use std::process::Command;

use base64::{Engine, engine::general_purpose::URL_SAFE};
use latchkey_tests::{
    error::{Error, Result, create_dir, run, write},
    nats::{Login, NatsServer, member_permissions, user},
    place::{Work, agent_program},
    scenario::{CloudConfig, NETWORK, PREFIX, Unlocked},
};

use crate::tell::Teller;

const BUCKET: &str = "fleet-a";
const ADMIN: (&str, &str) = ("admin", "of-the-registry");
const FLEET: (&str, &str) = ("fleet", "all-its-machines");
/// The host's loopback, as the machine sees it.
const HOST: &str = "10.0.2.2";

pub(crate) struct Registry {
    nats: NatsServer,
    _work: Work,
}

impl Registry {
    pub(crate) fn start(teller: &Teller) -> Result<Self> {
        let member = member_permissions(BUCKET, &["peers.*"]);
        let mut nats = NatsServer::new("demo")?.configure(&format!(
            "accounts {{ MESH {{ jetstream: enabled, users: [\n{}\n{}\n] }} }}",
            user(ADMIN.0, ADMIN.1, None),
            user(FLEET.0, FLEET.1, Some(&member)),
        ));
        nats.start()?;
        let work = Work::new("demo-registry")?;
        let oem = work.file("oem");
        create_dir(&oem)?;
        let operators = format!(
            "#cloud-config\nlatchkey:\n  mesh:\n    network: {NETWORK}\n    prefix: {PREFIX}\n    bucket: {BUCKET}\n    \
             registry: nats://{}:{}@{}\n",
            ADMIN.0,
            ADMIN.1,
            nats.address()
        );
        write(&oem.join("registry.yaml"), operators)?;
        run(Command::new(agent_program())
            .args(["registry", "create", "--cloud-config"])
            .arg(&oem))?;
        teller.say(&format!(
            "a NATS server; `latchkey registry create` has made the bucket {BUCKET}, in which the mesh's members write their records"
        ));
        Ok(Self { nats, _work: work })
    }

    pub(crate) fn in_cloud_config(&self, config: CloudConfig) -> CloudConfig {
        let url = format!("nats://{}:{}@{HOST}:{}", FLEET.0, FLEET.1, self.nats.port());
        config.mesh("registry", &url).mesh("bucket", BUCKET)
    }

    /// The record that the machine has written.
    pub(crate) fn tell(&mut self, teller: &Teller, boot: &Unlocked) -> Result<()> {
        let status = &boot.report.status;
        let range = status.pointer("/agent/node/allowed_ip").and_then(|range| range.as_str());
        let range = range.ok_or_else(|| Error::Report(format!("no address in {status:#}")))?;
        let key = format!("peers.{}", URL_SAFE.encode(range));
        let mut client = self.nats.client(&Login::Password(ADMIN.0, ADMIN.1))?;
        let record = client.get(BUCKET, &key)?;
        let (revision, record) =
            record.ok_or_else(|| Error::Report(format!("no record {key} of {range}")))?;
        teller.say(&format!(
            "a member of the mesh. In the bucket, revision {revision}, for every Ikto and Latchkey agent: {}",
            String::from_utf8_lossy(&record)
        ));
        Ok(())
    }
}
