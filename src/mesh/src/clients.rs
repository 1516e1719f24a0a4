//! The clients of a listener: so many at once, each for so long. When one too many comes, the oldest goes, so that whoever connects and
//! says nothing keeps nobody out.

use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::io;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{sleep, timeout};

/// Dropped, it ends them all.
pub(crate) struct Clients {
    most: usize,
    life: Duration,
    running: JoinSet<()>,
    oldest: VecDeque<AbortHandle>,
}

impl Clients {
    pub(crate) fn new(most: usize, life: Duration) -> Self {
        Self { most, life, running: JoinSet::new(), oldest: VecDeque::with_capacity(most) }
    }

    /// The next that a listener accepts, however long it takes.
    pub(crate) async fn next<C>(
        &mut self,
        mut accept: impl FnMut(&mut Context<'_>) -> Poll<io::Result<C>>,
    ) -> C {
        loop {
            let accepted = tokio::select! {
                accepted = poll_fn(&mut accept) => accepted,
                Some(_) = self.running.join_next() => {
                    self.oldest.retain(|client| !client.is_finished());
                    continue;
                }
            };
            match accepted {
                Ok(client) => return client,
                // Out of file descriptors, most likely: the client stays in the queue, so asking again at once would spin.
                Err(error) => {
                    log::warn!("cannot accept a connection: {error}");
                    sleep(Duration::from_secs(1)).await;
                }
            }
        }
    }

    /// Has a client served until it is done, its time is over, or it has to make place.
    pub(crate) fn serve(&mut self, client: impl Future<Output = ()> + Send + 'static) {
        if self.oldest.len() >= self.most
            && let Some(client) = self.oldest.pop_front()
        {
            client.abort();
        }
        let served = timeout(self.life, client);
        self.oldest.push_back(self.running.spawn(async { served.await.unwrap_or_default() }));
    }
}
