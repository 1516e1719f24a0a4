//! Real nats-servers with JetStream: one alone or three as a cluster, on the loopback or in a network namespace.
//!
//! ```no_run
//! # use latchkey_tests::nats::{NatsServer, Login, member_permissions, user};
//! # fn main() -> latchkey_tests::error::Result<()> {
//! let mut server = NatsServer::new("mesh")?.configure(&format!(
//!     "accounts {{ MESH {{ jetstream: enabled, users: [\n{}\n{}\n] }} }}",
//!     user("admin", "a-password", None),
//!     user("node-a", "b-password", Some(&member_permissions("ikto-mesh", &["peers.ZmQx"]))),
//! ));
//! server.start()?;
//! let mut admin = server.client(&Login::Password("admin", "a-password"))?;
//! admin.create_bucket("ikto-mesh")?;
//! server.pause()?; // SIGSTOP: alive, says nothing
//! server.resume()?;
//! server.kill(); // SIGKILL, as a power cut
//! server.start()?; // the same port and store
//! # Ok(()) }
//! ```
//!
//! In a namespace: `NatsServer::new(..)?.listen("10.77.0.1:4222".parse()?)`, then `start_by(|program| lan.command(program))`,
//! and clients by `lan.within(|| server.client(&login))`. It dies with the thread that started it.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read, Write},
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use nkeys::KeyPair;
use serde_json::{Value, json};

use crate::{
    child::Running,
    error::{Doing, Error, Result, create_dir, run, write},
    place::{self, Work},
    transcript::Transcript,
    vm::PATIENCE,
};

/// Longest wait for one answer.
const ANSWER: Duration = Duration::from_secs(20);
/// The same where nobody answers while a cluster has no leader, and the question is put again.
const SOON: Duration = Duration::from_secs(1);

/// A server's folder, configuration and port; the server itself runs between [`NatsServer::start`] and [`NatsServer::kill`].
#[derive(Debug)]
pub struct NatsServer {
    name: String,
    work: Work,
    listen: SocketAddr,
    /// Further lines of its configuration.
    configuration: String,
    /// All of its configuration, in the place of ours.
    whole: Option<String>,
    tls: bool,
    server: Option<(Running, Transcript)>,
    starts: u32,
}

/// How a [`Client`] says who it is.
#[derive(Debug, Clone, Copy)]
pub enum Login<'a> {
    None,
    Password(&'a str, &'a str),
    Token(&'a str),
}

impl NatsServer {
    /// JetStream on an empty store, no users, and a port of the loopback that nobody listens on yet.
    pub fn new(name: &str) -> Result<Self> {
        let work = Work::new(&format!("{name}-nats"))?;
        Ok(Self {
            name: name.to_owned(),
            work,
            listen: free_port()?,
            configuration: String::new(),
            whole: None,
            tls: false,
            server: None,
            starts: 0,
        })
    }

    /// Another address; in a namespace every port is free.
    #[must_use]
    pub fn listen(mut self, address: SocketAddr) -> Self {
        self.listen = address;
        self
    }

    /// Adds lines to its configuration file; they are read at the next start, or [`NatsServer::reload`].
    #[must_use]
    pub fn configure(mut self, lines: &str) -> Self {
        self.reconfigure(lines);
        self
    }

    /// This and nothing else is its configuration: an operator's. What it says of addresses and folders must be
    /// [`NatsServer::address`] and below [`NatsServer::file`].
    pub fn configure_wholly(&mut self, configuration: &str) {
        self.whole = Some(configuration.to_owned());
    }

    /// The same for a server that runs.
    pub fn reconfigure(&mut self, lines: &str) {
        self.configuration.push_str(lines);
        self.configuration.push('\n');
    }

    /// TLS by this certificate and key. With `authority`, clients need a certificate by it.
    #[must_use]
    pub fn tls(mut self, certificate: &Path, key: &Path, authority: Option<&Path>) -> Self {
        let verify = authority.map_or_else(String::new, |authority| {
            format!(", ca_file: \"{}\", verify: true", authority.display())
        });
        self.tls = true;
        self.configure(&format!(
            "tls {{ cert_file: \"{}\", key_file: \"{}\", timeout: 5{verify} }}",
            certificate.display(),
            key.display()
        ))
    }

    pub fn address(&self) -> SocketAddr {
        self.listen
    }

    pub fn port(&self) -> u16 {
        self.listen.port()
    }

    /// `nats://127.0.0.1:PORT`, or `tls://`; without user and password.
    pub fn url(&self) -> String {
        let scheme = if self.tls { "tls" } else { "nats" };
        format!("{scheme}://{}", self.listen)
    }

    /// A file beside its configuration, which may `include` it.
    pub fn file(&self, name: &str) -> PathBuf {
        self.work.file(name)
    }

    /// Starts the server, again if it was stopped, and waits until it is ready.
    pub fn start(&mut self) -> Result<()> {
        self.start_by(|program| Command::new(program))
    }

    /// As [`NatsServer::start`], by a command that runs a program elsewhere ([`crate::lan::Lan::command`]). It must become
    /// the program (exec), as signals are sent to its process id.
    pub fn start_by(&mut self, command: impl FnOnce(&str) -> Command) -> Result<()> {
        self.launch(command)?;
        self.log()?.wait_for("Server is ready", PATIENCE)?;
        Ok(())
    }

    fn launch(&mut self, command: impl FnOnce(&str) -> Command) -> Result<()> {
        self.kill();
        self.starts += 1;
        let configuration = self.write_configuration()?;
        let program = program()?;
        let mut command = command(&program.to_string_lossy());
        command.arg("--config").arg(configuration);
        let log = place::log_file(&format!("{}-nats-{}", self.name, self.starts))?;
        let log = File::create(&log).doing(|| format!("create {}", log.display()))?;
        let (running, pipes) = Running::start(&command, |c| {
            c.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        })?;
        let stderr =
            pipes.stderr.ok_or_else(|| Error::Setup("nats-server has no standard error".into()))?;
        let said = Transcript::follow("nats-server", stderr, log, Instant::now());
        self.server = Some((running, said));
        Ok(())
    }

    fn write_configuration(&self) -> Result<PathBuf> {
        let path = self.work.file("nats.conf");
        if let Some(whole) = &self.whole {
            write(&path, whole)?;
            return Ok(path);
        }
        write(
            &path,
            format!(
                "server_name: \"{}\"\nlisten: \"{}\"\n\
                 jetstream {{ store_dir: \"{}\", max_mem: 64MB, max_file: 256MB }}\n{}",
                self.name,
                self.listen,
                self.store().display(),
                self.configuration
            ),
        )?;
        Ok(path)
    }

    /// Process id of the running server.
    pub fn process(&self) -> Option<u32> {
        self.server.as_ref().map(|(running, _)| running.id())
    }

    /// Kills the server, as a power cut does. Port and store stay.
    pub fn kill(&mut self) {
        self.server = None;
    }

    /// Ends the server as systemd does, by SIGTERM; it closes its connections in order.
    pub fn stop(&mut self) -> Result<()> {
        self.signal("TERM")?;
        if let Some((running, _)) = &mut self.server
            && !running.ended_within(PATIENCE)?
        {
            return Err(Error::Setup("nats-server does not end".into()));
        }
        self.server = None;
        Ok(())
    }

    /// Kills it and starts it again at once.
    pub fn restart(&mut self) -> Result<()> {
        self.kill();
        self.start()
    }

    /// SIGSTOP: connections stay and nothing is answered, as behind a broken network.
    pub fn pause(&self) -> Result<()> {
        self.signal("STOP")
    }

    pub fn resume(&self) -> Result<()> {
        self.signal("CONT")
    }

    /// Has the running server read its configuration again, and waits until it has: it throws out whoever logs in meanwhile.
    pub fn reload(&self) -> Result<()> {
        const DONE: &str = "Reloaded server configuration";
        self.write_configuration()?;
        let log = self.log()?;
        let reloads = log.count(DONE);
        self.signal("HUP")?;
        if log.wait_for_more(DONE, reloads, PATIENCE)? {
            return Ok(());
        }
        Err(Error::Setup(format!("nats-server has not reloaded: {}", log.tail())))
    }

    fn signal(&self, signal: &str) -> Result<()> {
        let process =
            self.process().ok_or_else(|| Error::Setup("nats-server is not running".into()))?;
        run(Command::new("kill").args(["-s", signal, &process.to_string()])).map(drop)
    }

    fn store(&self) -> PathBuf {
        self.work.file("store")
    }

    /// Takes away all that was stored, as a new disk does. The server must not run.
    pub fn empty_store(&mut self) -> Result<()> {
        self.kill();
        let store = self.store();
        if store.exists() {
            std::fs::remove_dir_all(&store).doing(|| format!("remove {}", store.display()))?;
        }
        create_dir(&store)
    }

    /// What the running server has logged.
    pub fn log(&self) -> Result<&Transcript> {
        self.server
            .as_ref()
            .map(|(_, said)| said)
            .ok_or_else(|| Error::Setup("nats-server is not running".into()))
    }

    /// A client of this server. To be called where its address is reached: [`crate::lan::Lan::within`].
    pub fn client(&self, login: &Login<'_>) -> Result<Client> {
        Client::connect(self.listen, login)
    }
}

/// Three servers as one JetStream cluster.
#[derive(Debug)]
pub struct NatsCluster {
    pub servers: Vec<NatsServer>,
    routes: Vec<SocketAddr>,
}

impl NatsCluster {
    /// On the loopback. `configuration` is what all three have in common: accounts and users.
    pub fn new(name: &str, configuration: &str) -> Result<Self> {
        let mut routes = Vec::new();
        for _ in 0..3 {
            routes.push(free_port()?);
        }
        let all: Vec<_> = routes.iter().map(|route| format!("\"nats://{route}\"")).collect();
        let servers = routes.iter().enumerate().map(|(n, route)| {
            Ok(NatsServer::new(&format!("{name}-{n}"))?.configure(&format!(
                "cluster {{ name: \"{name}\", listen: \"{route}\", routes: [{}] }}\n{configuration}",
                all.join(", ")
            )))
        });
        Ok(Self { servers: servers.collect::<Result<_>>()?, routes })
    }

    /// Where each listens to the others.
    pub fn routes(&self) -> &[SocketAddr] {
        &self.routes
    }

    /// Starts all three and waits until they are one JetStream.
    pub fn start(&mut self, login: &Login<'_>) -> Result<()> {
        for server in &mut self.servers {
            server.launch(|program| Command::new(program))?;
        }
        for server in &self.servers {
            server.log()?.wait_for("Server is ready", PATIENCE)?;
        }
        let server = self.servers.first().ok_or_else(|| Error::Setup("no servers".into()))?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let answer = Client::connect_for(server.listen, login, SOON)
                .and_then(|mut client| client.request("$JS.API.INFO", ""))
                .unwrap_or_default();
            if answer.get("limits").is_some() {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(Error::Setup(format!("the cluster has no leader: {answer}")));
            }
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// Which of the servers leads a stream now.
    pub fn leader(&self, stream: &str, login: &Login<'_>) -> Result<usize> {
        let deadline = Instant::now() + PATIENCE;
        let mut last = Value::Null;
        while Instant::now() < deadline {
            for server in self.servers.iter().filter(|s| s.process().is_some()) {
                let subject = format!("$JS.API.STREAM.INFO.{stream}");
                last = Client::connect_for(server.listen, login, SOON)
                    .and_then(|mut client| client.request(&subject, ""))
                    .unwrap_or_default();
                let leader = last.pointer("/cluster/leader").and_then(Value::as_str);
                let found = self.servers.iter().position(|s| Some(s.name.as_str()) == leader);
                if let Some(n) = found {
                    return Ok(n);
                }
            }
            thread::sleep(Duration::from_millis(100));
        }
        Err(Error::Setup(format!("stream {stream} has no leader: {last}")))
    }
}

/// A client as small as can be, and independent of the one under test: what an administrator does, and other nodes.
#[derive(Debug)]
pub struct Client {
    stream: BufReader<TcpStream>,
    inbox: String,
    requests: u64,
}

impl Client {
    pub fn connect(address: SocketAddr, login: &Login<'_>) -> Result<Self> {
        Self::connect_for(address, login, ANSWER)
    }

    /// The same with another patience for each answer.
    pub fn connect_for(address: SocketAddr, login: &Login<'_>, answer: Duration) -> Result<Self> {
        let stream = TcpStream::connect_timeout(&address, answer)
            .and_then(|stream| stream.set_read_timeout(Some(answer)).map(|()| stream))
            .and_then(|stream| stream.set_nodelay(true).map(|()| stream))
            .doing(|| format!("connect to nats-server at {address}"))?;
        let inbox = format!("_INBOX.harness{}", getrandom::u64().unwrap_or_default());
        let mut client = Self { stream: BufReader::new(stream), inbox, requests: 0 };
        client.line()?; // INFO
        let credentials = match *login {
            Login::None => json!({}),
            Login::Password(user, password) => json!({ "user": user, "pass": password }),
            Login::Token(token) => json!({ "auth_token": token }),
        };
        let options = with(
            json!({ "verbose": false, "pedantic": false, "lang": "rust", "version": "0", "headers": true,
                "no_responders": true, "name": "harness" }),
            &credentials,
        );
        client.send(&format!("CONNECT {options}\r\nSUB {}.* 1\r\nPING\r\n", client.inbox))?;
        loop {
            let line = client.line()?;
            if line.starts_with("PONG") {
                return Ok(client);
            }
            if line.starts_with("-ERR") {
                return Err(Error::Setup(format!("nats-server said {line}")));
            }
        }
    }

    /// Sends JSON, or nothing, to a subject of the API; the answer as JSON, errors of the API included.
    pub fn request(&mut self, subject: &str, payload: &str) -> Result<Value> {
        let answer = self.exchange(subject, "", payload.as_bytes())?;
        serde_json::from_slice(&answer).map_err(|e| {
            Error::Setup(format!("{subject}: {e}: {}", String::from_utf8_lossy(&answer)))
        })
    }

    /// As [`Client::request`], for an answer that must be no error.
    pub fn expect(&mut self, subject: &str, payload: &str) -> Result<Value> {
        let answer = self.request(subject, payload)?;
        match answer.get("error") {
            None => Ok(answer),
            Some(error) => Err(Error::Setup(format!("{subject}: {error}"))),
        }
    }

    /// A bucket as Ikto's operators make it with the Go library.
    pub fn create_bucket(&mut self, bucket: &str) -> Result<()> {
        self.create_bucket_with(bucket, &json!({}))
    }

    /// The same with some of the stream's settings in other ways.
    pub fn create_bucket_with(&mut self, bucket: &str, settings: &Value) -> Result<()> {
        let stream = json!({ "name": format!("KV_{bucket}"), "subjects": [format!("$KV.{bucket}.>")],
            "retention": "limits", "max_consumers": -1, "max_msgs": -1, "max_bytes": -1, "max_age": 0,
            "max_msgs_per_subject": 1, "max_msg_size": -1, "storage": "file", "discard": "new",
            "num_replicas": 1, "duplicate_window": 120_000_000_000_u64, "deny_delete": true,
            "allow_rollup_hdrs": true, "allow_direct": true });
        let stream = with(stream, settings);
        self.expect(&format!("$JS.API.STREAM.CREATE.KV_{bucket}"), &stream.to_string()).map(drop)
    }

    pub fn delete_bucket(&mut self, bucket: &str) -> Result<()> {
        self.expect(&format!("$JS.API.STREAM.DELETE.KV_{bucket}"), "").map(drop)
    }

    /// Writes a value whatever was there; its revision.
    pub fn put(&mut self, bucket: &str, key: &str, value: impl AsRef<[u8]>) -> Result<u64> {
        self.publish(&format!("$KV.{bucket}.{key}"), "", value.as_ref())
    }

    /// Writes the numbers from 1 to `times` to one key, as fast as the server takes them.
    pub fn put_many(&mut self, bucket: &str, key: &str, times: u64) -> Result<()> {
        for n in 1..times {
            let value = n.to_string();
            self.send(&format!("PUB $KV.{bucket}.{key} {}\r\n{value}\r\n", value.len()))?;
        }
        self.put(bucket, key, times.to_string()).map(drop)
    }

    /// Writes the mark of a deleted key, as `nats kv del` does; the mark's revision.
    pub fn delete(&mut self, bucket: &str, key: &str) -> Result<u64> {
        self.publish(&format!("$KV.{bucket}.{key}"), "KV-Operation: DEL\r\n", b"")
    }

    /// The same, and takes away the key's history, as `nats kv purge` does.
    pub fn purge(&mut self, bucket: &str, key: &str) -> Result<u64> {
        let headers = "KV-Operation: PURGE\r\nNats-Rollup: sub\r\n";
        self.publish(&format!("$KV.{bucket}.{key}"), headers, b"")
    }

    /// The value now stored, with its revision; a deleted key's value is empty.
    pub fn get(&mut self, bucket: &str, key: &str) -> Result<Option<(u64, Vec<u8>)>> {
        let question = json!({ "last_by_subj": format!("$KV.{bucket}.{key}") }).to_string();
        let answer = self.request(&format!("$JS.API.STREAM.MSG.GET.KV_{bucket}"), &question)?;
        let Some(message) = answer.get("message") else { return Ok(None) };
        let revision = message.get("seq").and_then(Value::as_u64).unwrap_or_default();
        let data = message.get("data").and_then(Value::as_str).unwrap_or_default();
        let value = base64::prelude::BASE64_STANDARD.decode(data).unwrap_or_default();
        Ok(Some((revision, value)))
    }

    /// Names of the consumers of a bucket.
    pub fn consumers(&mut self, bucket: &str) -> Result<Vec<String>> {
        let answer = self.expect(&format!("$JS.API.CONSUMER.NAMES.KV_{bucket}"), "{}")?;
        let names = answer.get("consumers").and_then(Value::as_array);
        Ok(names.into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect())
    }

    pub fn delete_consumer(&mut self, bucket: &str, name: &str) -> Result<()> {
        self.expect(&format!("$JS.API.CONSUMER.DELETE.KV_{bucket}.{name}"), "").map(drop)
    }

    fn publish(&mut self, subject: &str, headers: &str, value: &[u8]) -> Result<u64> {
        let answer = self.exchange(subject, headers, value)?;
        let json: Value = serde_json::from_slice(&answer).unwrap_or_default();
        json.get("seq")
            .and_then(Value::as_u64)
            .ok_or_else(|| Error::Setup(format!("{subject}: {}", String::from_utf8_lossy(&answer))))
    }

    fn exchange(&mut self, subject: &str, headers: &str, payload: &[u8]) -> Result<Vec<u8>> {
        self.requests += 1;
        let reply = format!("{}.{}", self.inbox, self.requests);
        let mut message = if headers.is_empty() {
            format!("PUB {subject} {reply} {}\r\n", payload.len()).into_bytes()
        } else {
            let headers = format!("NATS/1.0\r\n{headers}\r\n");
            let (header, total) = (headers.len(), headers.len() + payload.len());
            format!("HPUB {subject} {reply} {header} {total}\r\n{headers}").into_bytes()
        };
        message.extend(payload);
        message.extend(b"\r\n");
        let failed = || format!("ask nats-server ({subject})");
        self.stream.get_mut().write_all(&message).doing(failed)?;
        loop {
            let line = self.line()?;
            let words: Vec<&str> = line.split_whitespace().collect();
            let number = |back: usize| {
                let word = words.len().checked_sub(back).and_then(|n| words.get(n));
                word.and_then(|word| word.parse::<usize>().ok()).unwrap_or_default()
            };
            let headers = match words.first().copied() {
                Some("MSG") => 0,
                Some("HMSG") => number(2),
                Some("PING") => {
                    self.send("PONG\r\n")?;
                    continue;
                }
                Some("-ERR") => return Err(Error::Setup(format!("{subject}: {line}"))),
                _ => continue,
            };
            let mut body = vec![0; number(1) + 2];
            self.stream.read_exact(&mut body).doing(failed)?;
            body.truncate(body.len() - 2);
            if words.get(1) != Some(&reply.as_str()) {
                continue; // The late answer to an earlier question.
            }
            let payload = body.split_off(headers);
            if body.starts_with(b"NATS/1.0 503") {
                return Err(Error::Setup(format!("{subject}: nobody answers there")));
            }
            return Ok(payload);
        }
    }

    fn send(&mut self, text: &str) -> Result<()> {
        self.stream.get_mut().write_all(text.as_bytes()).doing(|| "write to nats-server".into())
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        let read = self.stream.read_line(&mut line).doing(|| "read from nats-server".into())?;
        if read == 0 {
            return Err(Error::Io {
                what: "read from nats-server".into(),
                source: io::ErrorKind::UnexpectedEof.into(),
            });
        }
        Ok(line.trim_end().to_owned())
    }
}

/// A way to a server that can be broken: connections through it stay, and nothing passes.
#[derive(Debug)]
pub struct Way {
    address: SocketAddr,
    broken: Arc<AtomicBool>,
    accepted: Arc<AtomicUsize>,
}

impl Way {
    /// A port of the loopback that leads to `server`. Its threads end with the test program.
    pub fn to(server: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).doing(|| "listen".into())?;
        let address = listener.local_addr().doing(|| "find a free port".into())?;
        let (broken, accepted) = (Arc::<AtomicBool>::default(), Arc::<AtomicUsize>::default());
        let (is_broken, count) = (broken.clone(), accepted.clone());
        thread::spawn(move || {
            for client in listener.incoming().map_while(io::Result::ok) {
                count.fetch_add(1, Ordering::SeqCst);
                let is_broken = is_broken.clone();
                thread::spawn(move || join(&client, server, &is_broken));
            }
        });
        Ok(Self { address, broken, accepted })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// From now on all that is sent is lost, either way; new connections are accepted, and lead nowhere.
    pub fn break_off(&self) {
        self.broken.store(true, Ordering::SeqCst);
    }

    /// From now on new connections pass. What was sent over the old ones meanwhile is lost, so that they end.
    pub fn mend(&self) {
        self.broken.store(false, Ordering::SeqCst);
    }

    /// How many connections there were.
    pub fn accepted(&self) -> usize {
        self.accepted.load(Ordering::SeqCst)
    }
}

fn join(client: &TcpStream, server: SocketAddr, broken: &Arc<AtomicBool>) -> io::Result<()> {
    let server = TcpStream::connect(server)?;
    let (from_client, to_server) = (client.try_clone()?, server.try_clone()?);
    let is_broken = broken.clone();
    thread::spawn(move || pass(from_client, to_server, &is_broken));
    pass(server, client.try_clone()?, broken)
}

fn pass(mut from: TcpStream, mut to: TcpStream, broken: &AtomicBool) -> io::Result<()> {
    let mut buffer = [0; 16 << 10];
    let mut lost = false;
    loop {
        let n = from.read(&mut buffer)?;
        lost |= broken.load(Ordering::SeqCst);
        if n == 0 || (lost && !broken.load(Ordering::SeqCst)) {
            let _ = from.shutdown(Shutdown::Both);
            return to.shutdown(Shutdown::Both);
        }
        if !lost {
            to.write_all(buffer.get(..n).unwrap_or_default())?;
        }
    }
}

/// What a member may do, no more (`protocols/ikto-kilo.md` §1.6): subjects to publish to. `keys` are its own, with `peers.`;
/// `peers.*` lets it take any address.
pub fn member_permissions(bucket: &str, keys: &[&str]) -> Vec<String> {
    let stream = format!("KV_{bucket}");
    let mut subjects = vec![
        format!("$JS.API.STREAM.INFO.{stream}"),
        format!("$JS.API.DIRECT.GET.{stream}.$KV.{bucket}.peers.*"),
        format!("$JS.API.CONSUMER.CREATE.{stream}.*.$KV.{bucket}.peers.*"),
        "$JS.FC.>".to_owned(),
    ];
    subjects.extend(keys.iter().map(|key| format!("$KV.{bucket}.{key}")));
    subjects
}

/// One line for a `users: [ … ]` of the configuration. With `publish` it may publish to these subjects only, and subscribe to
/// its replies only.
pub fn user(name: &str, password: &str, publish: Option<&[String]>) -> String {
    let permissions = publish.map_or_else(String::new, |subjects| {
        let allowed = json!(subjects);
        format!(", permissions: {{ publish: {{ allow: {allowed} }}, subscribe: {{ allow: [\"_INBOX.>\"] }} }}")
    });
    format!("{{ user: \"{name}\", password: \"{password}\"{permissions} }}")
}

/// An operator with one account that has JetStream: users are whoever has credentials by it.
#[derive(Debug)]
pub struct Operator {
    account: KeyPair,
    configuration: String,
}

impl Operator {
    pub fn new() -> Result<Self> {
        let (operator, account, system) =
            (KeyPair::new_operator(), KeyPair::new_account(), KeyPair::new_account());
        let account_jwt = |name: &str, account: &KeyPair, storage: i64| {
            let limits = json!({ "subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1,
                "wildcards": true, "conn": -1, "leaf": -1, "mem_storage": storage, "disk_storage": storage,
                "streams": -1, "consumer": -1 });
            let claims = json!({ "type": "account", "version": 2, "limits": limits });
            jwt(&operator, name, &account.public_key(), &claims, None)
        };
        let configuration = format!(
            "operator: \"{}\"\nsystem_account: {1}\nresolver: MEMORY\nresolver_preload {{ {1}: \"{2}\", {3}: \"{4}\" }}",
            jwt(
                &operator,
                "operator",
                &operator.public_key(),
                &json!({ "type": "operator", "version": 2 }),
                None
            )?,
            system.public_key(),
            account_jwt("SYS", &system, 0)?,
            account.public_key(),
            account_jwt("MESH", &account, -1)?,
        );
        Ok(Self { account, configuration })
    }

    /// For [`NatsServer::configure`].
    pub fn configuration(&self) -> &str {
        &self.configuration
    }

    /// The text of a `.creds` file for a new user, who may publish to these subjects only and read replies only, or do all.
    /// `expires`: seconds since 1970.
    pub fn credentials(
        &self,
        name: &str,
        publish: Option<&[String]>,
        expires: Option<u64>,
    ) -> Result<String> {
        let user = KeyPair::new_user();
        let permissions = publish.map_or_else(
            || json!({}),
            |publish| json!({ "pub": { "allow": publish }, "sub": { "allow": ["_INBOX.>"] } }),
        );
        let claims = with(
            json!({ "type": "user", "version": 2, "subs": -1, "data": -1, "payload": -1 }),
            &permissions,
        );
        let jwt = jwt(&self.account, name, &user.public_key(), &claims, expires)?;
        let seed = user.seed().map_err(|e| Error::Setup(format!("no seed: {e}")))?;
        Ok(format!(
            "-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n\
             -----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
        ))
    }
}

/// A JWT as NATS has them: Ed25519 by an nkey.
fn jwt(
    issuer: &KeyPair,
    name: &str,
    subject: &str,
    nats: &Value,
    expires: Option<u64>,
) -> Result<String> {
    let claims = with(
        json!({ "jti": name, "iat": 1_700_000_000, "iss": issuer.public_key(), "name": name,
            "sub": subject, "nats": nats }),
        &expires.map_or_else(|| json!({}), |expires| json!({ "exp": expires })),
    );
    let encode = |bytes: &[u8]| BASE64_URL_SAFE_NO_PAD.encode(bytes);
    let header = json!({ "typ": "JWT", "alg": "ed25519-nkey" });
    let signed = format!(
        "{}.{}",
        encode(header.to_string().as_bytes()),
        encode(claims.to_string().as_bytes())
    );
    let signature = issuer
        .sign(signed.as_bytes())
        .map_err(|e| Error::Setup(format!("cannot sign a JWT: {e}")))?;
    Ok(format!("{signed}.{}", encode(&signature)))
}

/// One object with the fields of both.
fn with(mut object: Value, more: &Value) -> Value {
    if let (Some(object), Some(more)) = (object.as_object_mut(), more.as_object()) {
        object.extend(more.clone());
    }
    object
}

/// Fetched on first use.
fn program() -> Result<PathBuf> {
    let ready = place::target().join("image/tools/nats-server");
    if ready.exists() {
        return Ok(ready);
    }
    let path = run(&mut Command::new(place::project().join("image/nats.sh")))?;
    Ok(PathBuf::from(path.trim_end()))
}

fn free_port() -> Result<SocketAddr> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
        .and_then(|listener| listener.local_addr())
        .doing(|| "find a free port".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_keeps_what_was_written_over_a_power_cut_and_members_write_their_own_key_only() {
        let member = member_permissions("b", &["peers.own"]);
        let mut server = NatsServer::new("harness").unwrap().configure(&format!(
            "accounts {{ MESH {{ jetstream: enabled, users: [\n{}\n{}\n] }} }}",
            user("admin", "a", None),
            user("node", "n", Some(&member))
        ));
        server.start().unwrap();
        let mut admin = server.client(&Login::Password("admin", "a")).unwrap();
        admin.create_bucket("b").unwrap();
        assert_eq!(admin.put("b", "peers.x", "1").unwrap(), 1);

        server.restart().unwrap();
        let mut node = server.client(&Login::Password("node", "n")).unwrap();
        assert_eq!(node.put("b", "peers.own", "2").unwrap(), 2);
        let refused = node.put("b", "peers.x", "3").unwrap_err().to_string();
        assert!(refused.contains("Permissions Violation for Publish to"), "{refused}");
        let mut admin = server.client(&Login::Password("admin", "a")).unwrap();
        assert_eq!(admin.get("b", "peers.x").unwrap(), Some((1, b"1".to_vec())));

        server.empty_store().unwrap();
        server.start().unwrap();
        let mut admin = server.client(&Login::Password("admin", "a")).unwrap();
        assert_eq!(admin.get("b", "peers.x").unwrap(), None);
        assert!(server.client(&Login::Password("admin", "wrong")).is_err());
    }

    #[test]
    fn an_operator_s_server_starts_with_its_jwts() {
        let operator = Operator::new().unwrap();
        let mut server = NatsServer::new("operator").unwrap().configure(operator.configuration());
        server.start().unwrap();
        assert!(server.client(&Login::None).is_err());
    }

    #[test]
    fn three_servers_become_one_jetstream_and_its_leader_is_found() {
        let mut cluster = NatsCluster::new("harness-cluster", "").unwrap();
        cluster.start(&Login::None).unwrap();
        let mut admin = cluster.servers[0].client(&Login::None).unwrap();
        admin.create_bucket_with("b", &json!({ "num_replicas": 3 })).unwrap();
        let leader = cluster.leader("KV_b", &Login::None).unwrap();
        cluster.servers[leader].kill();
        assert_ne!(cluster.leader("KV_b", &Login::None).unwrap(), leader);
    }
}
