//! The registry of a mesh under test: nats-servers, each at a site of its own that can be cut off, with a user for each host
//! who may do no more than protocols/ikto-kilo.md §1.6 says, and the administrator's view of the bucket.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use serde_json::{Value, json};

use super::{eventually, namespace::Namespace};
use crate::{
    error::{Error, Result, write},
    nats::{Client, Login, NatsServer, member_permissions, user},
};

/// The bucket of every mesh under test.
pub const BUCKET: &str = "fleet";
const PORT: u16 = 4222;
const ADMINISTRATOR: &str = "admin";
/// Beside each server's configuration.
const USERS: &str = "users.conf";

/// One nats-server, at a site of its own.
#[derive(Debug)]
pub struct Server {
    pub name: String,
    pub site: Namespace,
    pub address: Ipv4Addr,
    nats: RefCell<NatsServer>,
    /// Of the administrator, for one answer: a server of a cluster without a leader gives none.
    patience: Duration,
}

/// All servers, and who may write what.
#[derive(Debug)]
pub struct Registry {
    pub servers: Vec<Server>,
    /// Keys of the bucket that each user may write.
    users: RefCell<BTreeMap<String, Vec<String>>>,
}

/// A record as it lies in the bucket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    pub revision: u64,
    pub value: String,
}

impl Server {
    /// `all` are the addresses of the cluster that it belongs to, its own among them.
    pub(super) fn new(
        name: &str,
        site: Namespace,
        address: Ipv4Addr,
        all: &[Ipv4Addr],
    ) -> Result<Self> {
        let mut nats = NatsServer::new(name)?.listen(SocketAddr::new(address.into(), PORT));
        if all.len() > 1 {
            let routes: Vec<_> = all.iter().map(|a| format!("\"nats://{a}:6222\"")).collect();
            let routes = routes.join(", ");
            nats.reconfigure(&format!(
                "cluster {{ name: {BUCKET}, listen: \"{address}:6222\", routes: [{routes}] }}"
            ));
        }
        nats.reconfigure(&format!("include ./{USERS}"));
        let patience = Duration::from_secs(if all.len() > 1 { 2 } else { 20 });
        Ok(Self { name: name.to_owned(), site, address, nats: RefCell::new(nats), patience })
    }

    /// Starts it, again on the same store if it was stopped.
    pub fn start(&self) -> Result<()> {
        self.nats.borrow_mut().start_by(|program| self.site.command(program))
    }

    /// As a power cut ends it.
    pub fn kill(&self) {
        self.nats.borrow_mut().kill();
    }

    /// It neither answers nor closes a connection until [`Server::resume`].
    pub fn pause(&self) -> Result<()> {
        self.nats.borrow().pause()
    }

    pub fn resume(&self) -> Result<()> {
        self.nats.borrow().resume()
    }

    /// Kills it, and everything that it stored is gone.
    pub fn lose_store(&self) -> Result<()> {
        self.nats.borrow_mut().empty_store()
    }

    fn client(&self) -> Result<Client> {
        let nats = self.nats.borrow();
        let (address, password, patience) =
            (nats.address(), password(ADMINISTRATOR), self.patience);
        let login = Login::Password(ADMINISTRATOR, &password);
        let connect = || Client::connect_for(address, &login, patience);
        self.site.within(connect)?
    }
}

impl Registry {
    pub(super) fn of(servers: Vec<Server>) -> Result<Self> {
        let registry = Self { servers, users: RefCell::default() };
        registry.write_users()?;
        Ok(registry)
    }

    /// Which keys of the bucket this user may write, `peers.*` for all; counts from the next start, or [`Registry::reload`].
    pub fn permit(&self, user: &str, keys: &[&str]) -> Result<()> {
        let keys = keys.iter().map(|&key| key.to_owned()).collect();
        self.users.borrow_mut().insert(user.to_owned(), keys);
        self.write_users()
    }

    fn write_users(&self) -> Result<()> {
        let mut lines = vec![user(ADMINISTRATOR, &password(ADMINISTRATOR), None)];
        for (name, keys) in self.users.borrow().iter() {
            let keys: Vec<_> = keys.iter().map(String::as_str).collect();
            lines.push(user(name, &password(name), Some(&member_permissions(BUCKET, &keys))));
        }
        let lines = format!("authorization {{ users: [\n{}\n] }}\n", lines.join("\n"));
        for server in &self.servers {
            write(&server.nats.borrow().file(USERS), &lines)?;
        }
        Ok(())
    }

    /// Has the running servers read their users again.
    pub fn reload(&self) -> Result<()> {
        self.servers.iter().try_for_each(|server| server.nats.borrow().reload())
    }

    pub fn start(&self) -> Result<()> {
        self.servers.iter().try_for_each(Server::start)
    }

    pub fn kill(&self) {
        self.servers.iter().for_each(Server::kill);
    }

    /// The URL with which `user` logs in at any of the servers.
    pub fn url(&self, user: &str) -> String {
        let address = |s: &Server| format!("nats://{user}:{}@{}:{PORT}", password(user), s.address);
        self.servers.iter().map(address).collect::<Vec<_>>().join(",")
    }

    /// The URL of an operator's tool.
    pub fn administrator_url(&self) -> String {
        self.url(ADMINISTRATOR)
    }

    /// Asks as the administrator, at the first server that answers.
    pub fn ask<T>(&self, mut question: impl FnMut(&mut Client) -> Result<T>) -> Result<T> {
        let mut tried = Error::Setup("there is no nats-server".into());
        for server in self.servers.iter().filter(|s| s.nats.borrow().process().is_some()) {
            match server.client().and_then(|mut client| question(&mut client)) {
                Err(error) => tried = error,
                answered => return answered,
            }
        }
        Err(tried)
    }

    /// As Ikto's operators make it.
    pub fn create_bucket(&self) -> Result<()> {
        self.ask(|client| client.create_bucket(BUCKET))
    }

    pub fn delete_bucket(&self) -> Result<()> {
        self.ask(|client| client.delete_bucket(BUCKET))
    }

    /// What the servers say of the bucket's stream.
    pub fn stream(&self) -> Result<Value> {
        let filter = json!({ "subjects_filter": format!("$KV.{BUCKET}.>") }).to_string();
        self.ask(|client| client.expect(&format!("$JS.API.STREAM.INFO.KV_{BUCKET}"), &filter))
    }

    /// The server that leads the bucket's stream, as soon as there is one.
    pub fn leader(&self) -> Result<&Server> {
        eventually("the bucket has a leader", || {
            let stream = self.stream().unwrap_or_default();
            let leader = stream.pointer("/cluster/leader").and_then(Value::as_str);
            Ok(self.servers.iter().find(|s| Some(s.name.as_str()) == leader))
        })
    }

    /// Waits until every server has all of the bucket, so that any of them may be lost.
    pub fn in_step(&self) -> Result<()> {
        eventually("all servers have all of the bucket", || {
            let stream = self.stream().unwrap_or_default();
            let replicas = stream.pointer("/cluster/replicas").and_then(Value::as_array);
            // `current` alone does not do: it may stay false as long as nothing is written.
            let current =
                |replica: &&Value| replica.get("offline").is_none() && replica.get("lag").is_none();
            let others = replicas.into_iter().flatten().filter(current).count();
            Ok((others + 1 == self.servers.len()).then_some(()))
        })
    }

    /// All records by key, deleted ones left out.
    pub fn records(&self) -> Result<BTreeMap<String, Record>> {
        let stream = self.stream()?;
        let subjects = stream.pointer("/state/subjects").and_then(Value::as_object);
        let mut records = BTreeMap::new();
        for subject in subjects.into_iter().flat_map(|all| all.keys()) {
            let key = subject.trim_start_matches(&format!("$KV.{BUCKET}."));
            if let Some(record) = self.record(key)? {
                records.insert(key.to_owned(), record);
            }
        }
        Ok(records)
    }

    pub fn record(&self, key: &str) -> Result<Option<Record>> {
        let found = self.ask(|client| client.get(BUCKET, key))?;
        let text = |value: Vec<u8>| String::from_utf8_lossy(&value).into_owned();
        Ok(found
            .filter(|(_, value)| !value.is_empty())
            .map(|(revision, value)| Record { revision, value: text(value) }))
    }

    /// The record, as soon as there is one that `is` accepts.
    pub fn wait_for(&self, key: &str, is: impl Fn(&Record) -> bool) -> Result<Record> {
        eventually(&format!("{key} is in the bucket as it should be"), || {
            // The server may be on its way up.
            Ok(self.record(key).ok().flatten().filter(&is))
        })
    }

    /// Writes whatever was there; the new revision.
    pub fn put(&self, key: &str, value: &str) -> Result<u64> {
        self.ask(|client| client.put(BUCKET, key, value))
    }

    /// Deletes as `nats kv del` does.
    pub fn delete(&self, key: &str) -> Result<u64> {
        self.ask(|client| client.delete(BUCKET, key))
    }

    /// Nothing that is not in the bucket after this long comes any more.
    pub fn stays(&self, key: &str, record: &Record, how_long: Duration) -> Result<()> {
        std::thread::sleep(how_long);
        match self.record(key)? {
            Some(now) if now == *record => Ok(()),
            now => Err(Error::Setup(format!("{key} was {record:?} and is {now:?}"))),
        }
    }
}

fn password(user: &str) -> String {
    format!("secret-of-{user}")
}
