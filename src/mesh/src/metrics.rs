//! Prometheus metrics of the agent, on request: `GET /metrics` in the text exposition format 0.0.4.

use std::convert::Infallible;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;

use tokio::sync::watch;

use crate::error::{Error, Result};
use crate::view::View;

/// The listener, before it answers.
#[derive(Debug)]
pub struct Server(TcpListener);

impl Server {
    /// # Errors
    /// [`Error::Metrics`]: the address is taken, or none of this host's.
    pub fn bind(address: SocketAddr) -> Result<Self> {
        let refused = |source| Error::Metrics { address, source };
        let listener = TcpListener::bind(address).map_err(refused)?;
        listener.set_nonblocking(true).map_err(refused)?;
        Ok(Self(listener))
    }

    /// Answers for ever. What is of the device is read at each scrape, at most once a second.
    ///
    /// # Errors
    /// That the event loop does not take the socket.
    pub async fn serve(
        self,
        _view: watch::Receiver<Arc<View>>,
        _interface: String,
    ) -> Result<Infallible> {
        std::future::pending().await
    }
}

/// [`Server::bind`] and [`Server::serve`], for whoever need not know at once that the address is taken.
pub async fn serve(
    address: SocketAddr,
    view: watch::Receiver<Arc<View>>,
    interface: String,
) -> Result<Infallible> {
    Server::bind(address)?.serve(view, interface).await
}
