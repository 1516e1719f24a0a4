//! One connection's standing: its place among the others, and what its requests are charged to.

use std::sync::Arc;

use latchkey_wire::pubhash::Pubhash;

use crate::{
    limits::{Limits, Source, TooMany},
    places::Place,
};

/// A connection, seen from the limits.
#[derive(Debug)]
pub(crate) struct Visit {
    source: Source,
    limits: Arc<Limits>,
    place: Place,
}

impl Visit {
    pub(crate) fn new(source: Source, limits: Arc<Limits>, place: Place) -> Self {
        Self { source, limits, place }
    }

    pub(crate) fn source(&self) -> Source {
        self.source
    }

    /// Its request is read. Whether this address may make one.
    pub(crate) fn asks(&self) -> Result<(), TooMany> {
        self.place.asked();
        self.limits.request(self.source)
    }

    /// The peer says it is this machine. Whether it may go on to prove it: to be asked before anything asymmetric.
    pub(crate) fn claims(&self, machine: &Pubhash) -> Result<(), TooMany> {
        self.limits.claim(self.source, machine)
    }

    /// The peer has proved to be this machine. Whether it may have an answer.
    pub(crate) fn proved(&self, machine: &Pubhash) -> Result<(), TooMany> {
        self.place.proved();
        self.limits.proved(machine)
    }

    /// Resolves when the connection has to make place for another.
    pub(crate) async fn must_go(&self) {
        self.place.must_go().await;
    }
}
