//! What a WireGuard program answers on its socket.
//!
//! Its file alone: the agent's crate would bring an async runtime and a NATS client along, all to be built once more for
//! libFuzzer.

use std::io::{self, Read};

#[path = "../../../src/mesh/src/userspace/answer.rs"]
#[allow(dead_code, unreachable_pub, missing_debug_implementations, reason = "as in its own crate")]
mod answer;

use answer::Item;

use crate::tells_nothing;

/// The same bytes, a few at a time.
struct Trickle<'a>(&'a [u8]);

impl Read for Trickle<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let few = self.0.len() % 7 + 1;
        let few = few.min(buffer.len());
        self.0.read(&mut buffer[..few])
    }
}

fn read(from: impl Read) -> (Vec<Item>, Result<(), String>) {
    let mut items = Vec::new();
    let read = answer::read(from, |item| items.push(item));
    if let Err(error) = &read {
        tells_nothing(error);
    }
    (items, read.map_err(|error| error.to_string()))
}

/// It is the same answer however it comes in; and nothing is said of a peer before there is one.
pub(crate) fn answer(data: &[u8]) {
    let whole = read(data);
    assert_eq!(whole, read(Trickle(data)));
    let (items, _) = whole;
    let of_a_peer = |item: &Item| !matches!(item, Item::PrivateKey(_) | Item::ListenPort(_));
    assert!(
        items.iter().find(|item| of_a_peer(item)).is_none_or(|item| matches!(item, Item::Peer(_)))
    );
}
