//! A stream that ends its reader's patience after so many bytes, for the time in which a stranger decides what is buffered.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

/// A connection from which at most so much is read.
#[derive(Debug)]
pub(crate) struct Frugal {
    stream: TcpStream,
    left: Option<usize>,
}

impl Frugal {
    pub(crate) fn new(stream: TcpStream, most: usize) -> Self {
        Self { stream, left: Some(most) }
    }

    /// From now on as much is read as comes.
    pub(crate) fn no_longer(&mut self) {
        self.left = None;
    }
}

impl AsyncRead for Frugal {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(context, buffer))?;
        if let Some(left) = self.left {
            let left = left.checked_sub(buffer.filled().len() - before);
            self.left =
                Some(left.ok_or_else(|| io::Error::other("more bytes than a handshake has"))?);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Frugal {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
