//! What goes on beside the loop, because it may wait: look-ups, the disk, the servers.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use tokio::task::AbortHandle;

use super::due::is_due;
use super::inputs::News;
use super::node::{Agent, STORE_SOON};
use crate::error::Result;
use crate::members::Endpoint;
use crate::resolve::look_up;
use crate::{admin, advertise, cache, metrics};

impl Agent {
    pub(super) fn ask_advertised(&mut self) {
        self.due.ask = None;
        if self.joining.is_none() || std::mem::replace(&mut self.is_asking, true) {
            return;
        }
        let (settings, known) = (Arc::clone(&self.settings), self.advertised.clone());
        let news = self.news.clone();
        tokio::spawn(async move {
            let advertised = advertise::resolve(&settings, known.as_ref()).await;
            let _ = news.send(News::Advertised(advertised, settings)).await;
        });
    }

    pub(super) fn ask_names(&mut self, now: Instant) {
        let Some(joining) = &self.joining else { return };
        let is_due = is_due(&mut self.due.names, now);
        if !std::mem::take(&mut self.names_changed) && !is_due {
            return;
        }
        let mut peers: BTreeMap<&str, bool> = BTreeMap::new();
        for (public_key, peer) in joining.peers() {
            if let Some(Endpoint::Name { host, .. }) = &peer.endpoint {
                *peers.entry(host).or_default() |= self.plane.is_silent(public_key);
            }
        }
        self.names.follow(peers.keys().copied(), now);
        for host in self.names.ask(now, |host| peers.get(host).copied().unwrap_or(true)) {
            let news = self.news.clone();
            tokio::spawn(async move {
                let answer = look_up(&host).await;
                let _ = news.send(News::Name(host, answer)).await;
            });
        }
        self.due.names = self.names.next();
    }

    pub(super) fn store(&mut self, now: Instant) {
        if self.is_storing {
            self.due.store = Some(now + STORE_SOON);
            return;
        }
        let Some(joining) = &self.joining else { return };
        let Some(cached) = joining.to_cache() else { return };
        self.is_storing = true;
        let (path, bucket) = (self.settings.cache.clone(), joining.wanted().bucket.clone());
        let (key, news) = (self.plane.shared_key(), self.news.clone());
        tokio::task::spawn_blocking(move || {
            let stored = cache::store(&path, &key, &bucket, &cached);
            let _ = news.blocking_send(News::Stored(stored));
        });
    }

    pub(super) fn store_now(&self, cached: &cache::Cached) -> Result<()> {
        let Some(joining) = &self.joining else { return Ok(()) };
        let path: &Path = &self.settings.cache;
        cache::store(path, self.plane.key(), &joining.wanted().bucket, cached)
    }

    pub(super) fn serve(&self, socket: admin::Server) {
        let (view, news) = (self.shown.subscribe(), self.news.clone());
        tokio::spawn(async move {
            let Err(error) = socket.serve(view).await;
            let _ = news.send(News::Ended(error)).await;
        });
    }

    pub(super) fn serve_metrics(&self, server: metrics::Server) -> AbortHandle {
        let (view, news) = (self.shown.subscribe(), self.news.clone());
        let interface = self.settings.interface.clone();
        let serving = tokio::spawn(async move {
            let Err(error) = server.serve(view, interface).await;
            let _ = news.send(News::Ended(error)).await;
        });
        serving.abort_handle()
    }
}
