//! Machines in software that follow the protocols honestly (`protocols/kcrypt.md` §4.4, §5, §6), and what the key server
//! answers them.

use std::{
    net::TcpStream,
    path::PathBuf,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

use latchkey_soft_identity::{Keys, SoftIdentity, new_key};
use latchkey_tests::place::target;
use latchkey_wire::{
    v1::{Challenge, Payload},
    v2::Answer,
};
use tungstenite::{Message, WebSocket, http::Request};

/// Attestation keys are shared by so many machines: their generation is the dearest, and the server does not know.
const MACHINES_PER_AK: usize = 64;

/// A machine waits this long for a message.
const PATIENCE: Duration = Duration::from_secs(120);

/// So many machines. Their keys are made once, on all cores, and kept in target/bench.
pub(crate) fn machines(count: usize) -> Vec<SoftIdentity> {
    let path = target().join("bench/keys");
    let wanted = count + count.div_ceil(MACHINES_PER_AK);
    let mut keys = read_keys(&path);
    if keys.len() < wanted {
        let (begun, missing) = (Instant::now(), wanted - keys.len());
        println!("Making {missing} RSA keys, once; they are kept in target/bench/keys");
        keys.extend(new_keys(missing));
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, write_keys(&keys)).unwrap();
        println!("  took {:.0} s\n", begun.elapsed().as_secs_f64());
    }
    let (aks, eks) = keys.split_at(count.div_ceil(MACHINES_PER_AK));
    let machines = eks.iter().take(count).zip(aks.iter().cycle());
    machines.map(|(ek, ak)| SoftIdentity::with(Keys { ek: ek.clone(), ak: ak.clone() })).collect()
}

fn new_keys(count: usize) -> Vec<Vec<u8>> {
    let left = AtomicUsize::new(count);
    let make = || {
        let mut made = Vec::new();
        while left
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1))
            .is_ok()
        {
            made.push(new_key());
        }
        made
    };
    let cores = thread::available_parallelism().unwrap().get();
    thread::scope(|scope| {
        let makers: Vec<_> = (0..cores).map(|_| scope.spawn(make)).collect();
        makers.into_iter().flat_map(|maker| maker.join().unwrap()).collect()
    })
}

fn read_keys(path: &PathBuf) -> Vec<Vec<u8>> {
    let bytes = std::fs::read(path).unwrap_or_default();
    let (mut rest, mut keys) = (bytes.as_slice(), Vec::new());
    while let Some((length, tail)) = rest.split_first_chunk::<4>() {
        let Some((key, tail)) = tail.split_at_checked(u32::from_be_bytes(*length) as usize) else {
            return Vec::new(); // written by halves: made again
        };
        keys.push(key.to_vec());
        rest = tail;
    }
    keys
}

fn write_keys(keys: &[Vec<u8>]) -> Vec<u8> {
    let sized = |key: &Vec<u8>| [&(key.len() as u32).to_be_bytes()[..], key].concat();
    keys.iter().flat_map(sized).collect()
}

/// Which protocol.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Generation {
    V1,
    V2,
}

/// One exchange: the passphrase, or what went wrong.
pub(crate) fn unlock(
    port: u16,
    machine: &SoftIdentity,
    generation: Generation,
) -> Result<Vec<u8>, String> {
    match generation {
        Generation::V1 => ask_v1(port, machine),
        Generation::V2 => ask_v2(port, machine, false),
    }
}

/// An installation: the server makes a passphrase for a machine it has never seen.
pub(crate) fn enrol(port: u16, machine: &SoftIdentity) -> Result<Vec<u8>, String> {
    ask_v2(port, machine, true)
}

fn ask_v1(port: u16, machine: &SoftIdentity) -> Result<Vec<u8>, String> {
    let header = machine.token().authorization_header();
    let mut socket = open(port, "/getPass", Some(&header))?;
    let challenge = Challenge::from_json(&receive(&mut socket)?).map_err(said)?;
    let response = machine.activate(&challenge).to_json();
    socket.send(Message::binary(response.as_bytes().to_vec())).map_err(said)?;
    let payload = Payload::from_json(&receive(&mut socket)?).map_err(said)?;
    if payload.passphrase.is_empty() {
        return Err(payload.error);
    }
    Ok(payload.passphrase.as_bytes().to_vec())
}

fn ask_v2(port: u16, machine: &SoftIdentity, defers: bool) -> Result<Vec<u8>, String> {
    let mut socket = open(port, "/tpm-attestation", None)?;
    let mut init = machine.init();
    init.defer_pcr_enrollment = defers;
    socket.send(Message::text(init.to_json())).map_err(said)?;
    let answer = Answer::from_json(&receive(&mut socket)?).map_err(said)?;
    let challenge = answer.into_challenge().map_err(|refusal| format!("{refusal:?}"))?;
    let proof = machine.proof(&challenge).to_json();
    socket.send(Message::text(proof.to_string())).map_err(said)?;
    let answer = Answer::from_json(&receive(&mut socket)?).map_err(said)?;
    let release = answer.classify().map_err(|refusal| format!("{refusal:?}"))?;
    Ok(format!("{release:?}").into_bytes())
}

fn open(
    port: u16,
    path: &str,
    authorization: Option<&str>,
) -> Result<WebSocket<TcpStream>, String> {
    let stream = TcpStream::connect(("127.0.0.1", port)).map_err(said)?;
    stream.set_read_timeout(Some(PATIENCE)).map_err(said)?;
    stream.set_nodelay(true).map_err(said)?;
    let host = format!("127.0.0.1:{port}");
    let mut request = Request::builder()
        .uri(format!("ws://{host}{path}"))
        .header("Host", &host)
        .header("Connection", "Upgrade")
        .header("Upgrade", "websocket")
        .header("Sec-WebSocket-Version", "13")
        .header("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ==")
        .header("label", "COS_PERSISTENT");
    if let Some(authorization) = authorization {
        request = request.header("Authorization", authorization);
    }
    tungstenite::client(request.body(()).map_err(said)?, stream)
        .map(|(socket, _)| socket)
        .map_err(said)
}

fn receive(socket: &mut WebSocket<TcpStream>) -> Result<Vec<u8>, String> {
    match socket.read().map_err(said)? {
        Message::Binary(bytes) => Ok(bytes.to_vec()),
        Message::Text(text) => Ok(text.as_bytes().to_vec()),
        other => Err(format!("not a data frame: {other:?}")),
    }
}

fn said(error: impl std::fmt::Display) -> String {
    error.to_string()
}
