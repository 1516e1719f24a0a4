//! What WireGuard itself knows of a device, key, port and peers, and the two who can be told: the
//! kernel over generic netlink, and wireguard-go over its socket.

use std::collections::BTreeMap;
use std::io;

use nix::libc;

use crate::key::{PrivateKey, PublicKey};
use crate::netlink::wireguard::WireGuard;
use crate::plan::{Change, Peer};
use crate::userspace::Socket;

/// The device as WireGuard has it.
#[derive(Debug, Default)]
pub(crate) struct Tunnel {
    /// None as long as no key was set.
    pub(crate) private_key: Option<PrivateKey>,
    pub(crate) public_key: Option<PublicKey>,
    /// 0 as long as none was set and the link is down.
    pub(crate) port: u16,
    pub(crate) peers: BTreeMap<PublicKey, Peer>,
}

/// Who carries the packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    Kernel,
    /// wireguard-go, or another program that speaks its protocol.
    Userspace,
}

/// The way to one device, by its number (kernel) or its name (userspace).
#[derive(Debug)]
pub(super) enum Carrier {
    Kernel { wireguard: WireGuard, index: u32 },
    Userspace(Socket),
}

impl Carrier {
    pub(super) fn get(&mut self) -> io::Result<Tunnel> {
        match self {
            Self::Kernel { wireguard, index } => wireguard.get(*index),
            Self::Userspace(socket) => socket.get(),
        }
    }

    pub(super) fn set_key(&mut self, key: &PrivateKey) -> io::Result<()> {
        match self {
            Self::Kernel { wireguard, index } => wireguard.set(*index, Some(key), None),
            Self::Userspace(socket) => socket.set(Some(key), None),
        }
    }

    pub(super) fn set_port(&mut self, port: u16) -> io::Result<()> {
        match self {
            Self::Kernel { wireguard, index } => wireguard.set(*index, None, Some(port)),
            Self::Userspace(socket) => socket.set(None, Some(port)),
        }
    }

    /// Applies those of `changes` that are about peers, in their order, as many at once as one
    /// message takes. What is wrong with one peer stops none of the others: it is returned.
    pub(super) fn set_peers(
        &mut self,
        changes: &[Change],
    ) -> io::Result<BTreeMap<PublicKey, io::Error>> {
        match self {
            Self::Kernel { wireguard, index } => {
                one_by_one_if_refused(wireguard.batches(changes), |batch| {
                    wireguard.send(*index, batch)
                })
            }
            Self::Userspace(socket) => {
                one_by_one_if_refused(socket.batches(changes), |batch| socket.send(batch))
            }
        }
    }
}

/// A message about several peers, which can be said again in parts.
pub(crate) trait Batch: Sized {
    /// One for each peer.
    fn parts(self) -> Vec<(PublicKey, Self)>;
}

fn one_by_one_if_refused<B: Batch>(
    batches: Vec<B>,
    mut send: impl FnMut(&B) -> io::Result<()>,
) -> io::Result<BTreeMap<PublicKey, io::Error>> {
    let mut refused = BTreeMap::new();
    for batch in batches {
        match send(&batch) {
            Err(error) if is_about_a_peer(&error) => {}
            sent => {
                sent?;
                continue;
            }
        }
        for (key, part) in batch.parts() {
            match send(&part) {
                Err(error) if is_about_a_peer(&error) => drop(refused.insert(key, error)),
                sent => sent?,
            }
        }
    }
    Ok(refused)
}

/// Whether it is what was said that was refused. Not so if the device is gone, nobody answers, or
/// we may not ask: then it is the same for every peer.
fn is_about_a_peer(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(
            libc::EINVAL
                | libc::ERANGE
                | libc::EAFNOSUPPORT
                | libc::EPFNOSUPPORT
                | libc::ENETUNREACH
                | libc::EHOSTUNREACH
                | libc::EADDRNOTAVAIL
                | libc::EDESTADDRREQ
                | libc::EMSGSIZE
                | libc::E2BIG
                | libc::EEXIST
                | libc::EPROTO
        )
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A batch is the numbers of its peers; the device does not take odd ones.
    impl Batch for Vec<u8> {
        fn parts(self) -> Vec<(PublicKey, Self)> {
            self.into_iter().map(|n| (PublicKey::new([n; 32]), vec![n])).collect()
        }
    }

    #[test]
    fn what_is_wrong_with_one_peer_stops_no_other_and_is_named() {
        let mut device: Vec<u8> = Vec::new();
        let refused = one_by_one_if_refused(vec![vec![2, 4], vec![6, 7, 8]], |batch| {
            if batch.iter().any(|n| n % 2 == 1) {
                return Err(io::Error::from_raw_os_error(libc::EINVAL));
            }
            device.extend(batch);
            Ok(())
        });
        assert_eq!(refused.unwrap().into_keys().collect::<Vec<_>>(), [PublicKey::new([7; 32])]);
        assert_eq!(device, [2, 4, 6, 8]);
    }

    #[test]
    fn a_device_that_is_gone_is_asked_once() {
        let mut asked = 0;
        let result = one_by_one_if_refused(vec![vec![2, 4], vec![6]], |_| {
            asked += 1;
            Err(io::Error::from_raw_os_error(libc::ENODEV))
        });
        assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::ENODEV));
        assert_eq!(asked, 1);
    }
}
