//! What the server tells systemd (sd_notify(3)): one datagram to `$NOTIFY_SOCKET`.

use std::{
    env, io,
    os::{
        linux::net::SocketAddrExt as _,
        unix::net::{SocketAddr, UnixDatagram},
    },
};

/// It listens, and answers machines from now on.
pub(crate) fn ready(status: &str) {
    tell(&format!("READY=1\nSTATUS={status}"));
}

/// It was told to stop, and finishes what runs.
pub(crate) fn stopping() {
    tell("STOPPING=1");
}

/// Says nothing, to nobody, if the program was not started by systemd.
fn tell(state: &str) {
    let Some(name) = env::var_os("NOTIFY_SOCKET") else { return };
    let sent = || -> io::Result<usize> {
        let address = match name.as_encoded_bytes().strip_prefix(b"@") {
            Some(abstract_name) => SocketAddr::from_abstract_name(abstract_name)?,
            None => SocketAddr::from_pathname(&name)?,
        };
        UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address)
    };
    if let Err(error) = sent() {
        log::warn!("systemd could not be told over $NOTIFY_SOCKET: {error}");
    }
}
