//! Changes of links and addresses, as rtnetlink(7) announces them. That something changed is all that is taken from them: what
//! it is now, the next look will tell, and so a lost announcement does no harm either.

use std::io;

use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use nix::libc;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

const GROUPS: i32 = libc::RTMGRP_LINK | libc::RTMGRP_IPV4_IFADDR | libc::RTMGRP_IPV6_IFADDR;

pub(crate) struct Events(AsyncFd<Socket>);

impl Events {
    /// Needs the runtime.
    pub(crate) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind(&SocketAddr::new(0, GROUPS as u32))?;
        socket.set_non_blocking(true)?;
        // SAFETY: a Socket owns its descriptor, closes it when dropped and not before, and never has
        // another one. It is moved into the AsyncFd, which is only used by reference.
        #[allow(unsafe_code)]
        let registered = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) };
        registered.map(Self).map_err(io::Error::from)
    }

    /// Waits for the next change.
    pub(crate) async fn next(&self) -> io::Result<()> {
        loop {
            let mut ready = self.0.readable().await?;
            if let Ok(received) = ready.try_io(|socket| receive(socket.get_ref())) {
                return received;
            }
        }
    }

    /// Passes over what is waiting to be read.
    pub(crate) fn skip(&self) -> io::Result<()> {
        loop {
            match receive(self.0.get_ref()) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                received => received?,
            }
        }
    }
}

fn receive(socket: &Socket) -> io::Result<()> {
    let mut one_byte_is_enough = [0; 1];
    match socket.recv(&mut &mut one_byte_is_enough[..], 0) {
        // Some were lost: a change as good as any.
        Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => Ok(()),
        received => received.map(drop),
    }
}
