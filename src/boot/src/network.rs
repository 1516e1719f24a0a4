//! Waiting for the kernel to tell that something changed: routes and addresses by rtnetlink(7),
//! devices by kobject uevents. Nothing here polls a clock where an event will come.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use netlink_sys::protocols::{NETLINK_KOBJECT_UEVENT, NETLINK_ROUTE};
use netlink_sys::{Socket, SocketAddr};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV4_ROUTE, RTMGRP_IPV6_IFADDR, RTMGRP_IPV6_ROUTE.
const ROUTE_GROUPS: u32 = 0x1 | 0x10 | 0x40 | 0x100 | 0x400;
/// The kernel's own uevents, not udev's.
const KERNEL_GROUP: u32 = 1;

/// A tick beside the events: an event may have been lost in a full buffer, and a resolver's
/// address is a file, not an event.
const TICK: Duration = Duration::from_millis(500);

/// A subscription to changes of one kind.
#[derive(Debug)]
pub struct Changes(Option<Socket>);

impl Changes {
    /// Routes, addresses and links.
    #[must_use]
    pub fn of_routes() -> Self {
        Self::subscribe(NETLINK_ROUTE, ROUTE_GROUPS)
    }

    /// Devices that appear.
    #[must_use]
    pub fn of_devices() -> Self {
        Self::subscribe(NETLINK_KOBJECT_UEVENT, KERNEL_GROUP)
    }

    /// Without the subscription (a kernel or sandbox may refuse it) the tick is left.
    fn subscribe(protocol: isize, groups: u32) -> Self {
        let open = || {
            let mut socket = Socket::new(protocol)?;
            socket.bind(&SocketAddr::new(0, groups))?;
            socket.set_non_blocking(true)?;
            Ok::<_, std::io::Error>(socket)
        };
        Self(open().inspect_err(|error| log::debug!("no kernel events: {error}")).ok())
    }

    /// Waits until something changed, a tick passed, or `deadline` came.
    pub fn wait(&self, deadline: Instant) {
        let left = deadline.saturating_duration_since(Instant::now()).min(TICK);
        let Some(socket) = &self.0 else { return std::thread::sleep(left) };
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
        match poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(0) => {}
            Ok(_) => self.drain(socket),
            Err(errno) => {
                log::debug!("poll: {errno}");
                std::thread::sleep(left.min(Duration::from_millis(10)));
            }
        }
    }

    /// What changed is looked up afresh, so a burst of events is one change.
    fn drain(&self, socket: &Socket) {
        for _ in 0..1024 {
            let mut buffer = Vec::with_capacity(8192);
            if socket.recv(&mut buffer, 0).is_err() {
                return;
            }
        }
    }
}
