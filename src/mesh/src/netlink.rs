//! Netlink as a plain exchange (RFC 3549 §2.3.2): one request, its answers, an acknowledgement.
//! Synchronous: the kernel answers within the call that asks.

pub(crate) mod events;
pub(crate) mod link;
pub(crate) mod route;
pub(crate) mod wireguard;

use std::io;
use std::os::fd::AsFd;

use netlink_packet_core::{
    Emitable, NLM_F_ACK, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkBuffer, NetlinkDeserializable,
    NetlinkHeader, NetlinkMessage, NetlinkPayload, NetlinkSerializable,
};
use netlink_sys::{Socket, SocketAddr};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::TimeVal;
use zeroize::Zeroizing;

/// The kernel fills at most 32 KiB (`NLMSG_GOODSIZE` limits and `netlink_dump`) into one datagram.
const BUFFER_SIZE: usize = 64 << 10;

/// The kernel answers at once; creating the first WireGuard device may load a module first.
const ANSWER_WITHIN_SECONDS: i64 = 30;

/// How often a dump is asked for again when the table changed while it was read.
const DUMP_ATTEMPTS: usize = 8;

pub(crate) struct Netlink {
    socket: Socket,
    sequence: u32,
    /// Bytes of all requests.
    pub(crate) sent: u64,
    /// Holds private keys now and then.
    buffer: Zeroizing<Vec<u8>>,
}

/// What an answer is: the message itself, or why there is none.
enum Answer {
    Complete,
    Interrupted,
}

impl Netlink {
    pub(crate) fn open(protocol: isize) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        // Without it the kernel sends a refused request back, the private key in it included.
        socket.set_cap_ack(true)?;
        setsockopt(
            &socket.as_fd(),
            sockopt::ReceiveTimeout,
            &TimeVal::new(ANSWER_WITHIN_SECONDS, 0),
        )?;
        Ok(Self { socket, sequence: 0, sent: 0, buffer: Zeroizing::new(vec![0; BUFFER_SIZE]) })
    }

    /// Sends `message` and returns all answers. `flags` come on top of `NLM_F_REQUEST | NLM_F_ACK`.
    ///
    /// What the message and the answers hold is the caller's to wipe; the buffers between are wiped here.
    ///
    /// # Errors
    /// The kernel's errno, or what went wrong on the socket.
    pub(crate) fn request<M>(&mut self, message: &M, flags: u16) -> io::Result<Vec<M>>
    where
        M: NetlinkSerializable + NetlinkDeserializable,
    {
        self.repeat(message, flags, |answer: io::Result<M>| answer.map(Some))
    }

    /// Sends `message` until its answers are of one piece, and returns what `keep` makes of them.
    fn repeat<M, T>(
        &mut self,
        message: &M,
        flags: u16,
        mut keep: impl FnMut(io::Result<M>) -> io::Result<Option<T>>,
    ) -> io::Result<Vec<T>>
    where
        M: NetlinkSerializable + NetlinkDeserializable,
    {
        for _ in 0..DUMP_ATTEMPTS {
            self.send(message, flags)?;
            let mut kept = Vec::new();
            let answer = self.receive(|answer| {
                kept.extend(keep(answer)?);
                Ok(())
            })?;
            match answer {
                Answer::Complete => return Ok(kept),
                Answer::Interrupted => {}
            }
        }
        Err(io::Error::new(
            io::ErrorKind::Interrupted,
            "what was asked for changed again and again while it was read",
        ))
    }

    fn send<M: NetlinkSerializable>(&mut self, message: &M, flags: u16) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        let (header_length, message_length) = (header.buffer_len(), message.buffer_len());
        header.length = u32::try_from(header_length + message_length).map_err(io::Error::other)?;
        header.message_type = message.message_type();
        header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        header.sequence_number = self.sequence;
        let mut bytes = Zeroizing::new(vec![0; header_length + message_length]);
        let (for_header, for_message) = bytes.split_at_mut(header_length);
        header.emit(for_header);
        message.serialize(for_message);
        self.sent += bytes.len() as u64;
        self.socket.send(&bytes, 0).map(drop)
    }

    fn receive<M: NetlinkDeserializable>(
        &mut self,
        mut take: impl FnMut(io::Result<M>) -> io::Result<()>,
    ) -> io::Result<Answer> {
        let mut interrupted = false;
        loop {
            let length = self.socket.recv(&mut &mut self.buffer[..], 0)?;
            let mut rest = self.buffer.get(..length).unwrap_or_default();
            while !rest.is_empty() {
                let header = NetlinkBuffer::new_checked(rest).map_err(io::Error::other)?;
                let (sequence, flags) = (header.sequence_number(), header.flags());
                let message = NetlinkMessage::<M>::deserialize(rest).map_err(io::Error::other);
                rest = rest.get(padded(header.length())..).unwrap_or_default();
                if sequence != self.sequence {
                    continue; // left over from a request that failed half way
                }
                interrupted |= flags & NLM_F_DUMP_INTR != 0;
                let payload = match message {
                    Ok(message) => message.payload,
                    Err(error) => {
                        take(Err(error))?;
                        continue;
                    }
                };
                match payload {
                    NetlinkPayload::InnerMessage(answer) => take(Ok(answer))?,
                    NetlinkPayload::Error(error) if error.code.is_some() => {
                        return Err(error.to_io());
                    }
                    NetlinkPayload::Error(_) | NetlinkPayload::Done(_) => {
                        return Ok(if interrupted {
                            Answer::Interrupted
                        } else {
                            Answer::Complete
                        });
                    }
                    NetlinkPayload::Overrun(_) => {
                        return Err(io::Error::other("the kernel reports a netlink overrun"));
                    }
                    _ => {}
                }
            }
        }
    }
}

/// Messages in one datagram are aligned to four bytes; `length` is at least the header's, or
/// parsing would have failed.
fn padded(length: u32) -> usize {
    (length as usize).next_multiple_of(4)
}
