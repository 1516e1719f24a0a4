//! The connections that are open, and which one has to go when there is no place for another.
//!
//! Slow strangers must not keep machines out, so a full house does not turn the newcomer away: it closes the oldest
//! connection of the address ([`Source`]) that has the most unproved ones, and of these one that has not made a request yet
//! before one that has. Who has proved to be a machine is never closed for another. An address that has as many
//! as an address may have makes place among its own.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::Notify;

use crate::limits::Source;

/// All places.
#[derive(Debug)]
pub(crate) struct Places {
    most: usize,
    most_of_a_source: usize,
    state: Mutex<State>,
    /// Told whenever the last connection ends.
    empty: Notify,
}

#[derive(Debug, Default)]
struct State {
    last: u64,
    open: usize,
    crowds: HashMap<Source, Crowd>,
    /// Crowds with somebody who could go, the one to shrink first at the end.
    ranks: BTreeSet<Rank>,
}

/// Unproved connections, then who would go, then whose they are.
type Rank = (usize, Reverse<u64>, Source);

/// The connections of one source, in the order they came.
#[derive(Debug, Default)]
struct Crowd {
    arrived: BTreeMap<u64, Arc<Notify>>,
    asked: BTreeMap<u64, Arc<Notify>>,
    proved: BTreeSet<u64>,
}

impl Crowd {
    fn size(&self) -> usize {
        self.arrived.len() + self.asked.len() + self.proved.len()
    }

    fn remove(&mut self, id: u64) -> bool {
        self.arrived.remove(&id).is_some()
            || self.asked.remove(&id).is_some()
            || self.proved.remove(&id)
    }

    fn rank(&self, source: Source) -> Option<Rank> {
        let (first, _) = self.arrived.first_key_value().or_else(|| self.asked.first_key_value())?;
        Some((self.arrived.len() + self.asked.len(), Reverse(*first), source))
    }
}

impl State {
    /// Changes a crowd, and its rank with it.
    fn change<T>(&mut self, source: Source, change: impl FnOnce(&mut Crowd) -> T) -> T {
        let crowd = self.crowds.entry(source).or_default();
        if let Some(rank) = crowd.rank(source) {
            self.ranks.remove(&rank);
        }
        let changed = change(crowd);
        match crowd.rank(source) {
            Some(rank) => drop(self.ranks.insert(rank)),
            None if crowd.size() == 0 => drop(self.crowds.remove(&source)),
            None => {}
        }
        changed
    }

    /// Closes a connection of this source; whether there was one to close.
    fn close_one_of(&mut self, source: Source) -> bool {
        let gone = self
            .change(source, |crowd| crowd.arrived.pop_first().or_else(|| crowd.asked.pop_first()));
        if let Some((_, gone)) = &gone {
            self.open -= 1;
            gone.notify_one();
        }
        gone.is_some()
    }
}

impl Places {
    pub(crate) fn new(most: usize, most_of_a_source: usize) -> Arc<Self> {
        let (state, empty) = (Mutex::default(), Notify::new());
        Arc::new(Self { most, most_of_a_source, state, empty })
    }

    /// A place for a connection that has come, if need be another one's; `None` if all others have proved themselves.
    pub(crate) fn take(self: &Arc<Self>, source: Source) -> Option<Place> {
        let mut state = self.lock();
        let crowd = state.crowds.get(&source).map_or(0, Crowd::size);
        if crowd >= self.most_of_a_source && !state.close_one_of(source) {
            return None;
        }
        if state.open >= self.most {
            let (_, _, crowded) = *state.ranks.last()?;
            state.close_one_of(crowded);
        }
        state.last += 1;
        state.open += 1;
        let (id, told) = (state.last, Arc::new(Notify::new()));
        state.change(source, |crowd| crowd.arrived.insert(id, told.clone()));
        drop(state);
        Some(Place { places: self.clone(), source, id, told })
    }

    /// How many connections are open.
    pub(crate) fn open(&self) -> usize {
        self.lock().open
    }

    /// Waits until none is.
    pub(crate) async fn empty(&self) {
        loop {
            let told = self.empty.notified();
            if self.open() == 0 {
                return;
            }
            told.await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection's place, until it is dropped.
#[derive(Debug)]
pub(crate) struct Place {
    places: Arc<Places>,
    source: Source,
    id: u64,
    told: Arc<Notify>,
}

impl Place {
    /// Resolves when the connection has to go.
    pub(crate) async fn must_go(&self) {
        self.told.notified().await;
    }

    /// The connection's request is read.
    pub(crate) fn asked(&self) {
        self.places.lock().change(self.source, |crowd| {
            if let Some(told) = crowd.arrived.remove(&self.id) {
                crowd.asked.insert(self.id, told);
            }
        });
    }

    /// The peer has proved to be a machine.
    pub(crate) fn proved(&self) {
        self.places.lock().change(self.source, |crowd| {
            if crowd.remove(self.id) {
                crowd.proved.insert(self.id);
            }
        });
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.places.lock();
        if state.change(self.source, |crowd| crowd.remove(self.id)) {
            state.open -= 1;
        }
        if state.open == 0 {
            self.places.empty.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(last: u8) -> Source {
        Source::of([192, 0, 2, last].into())
    }

    fn has_to_go(place: &Place) -> bool {
        let waker = std::task::Waker::noop();
        let mut context = std::task::Context::from_waker(waker);
        std::pin::pin!(place.must_go()).poll(&mut context).is_ready()
    }

    #[test]
    fn the_oldest_of_the_largest_crowd_goes_and_who_has_asked_goes_last() {
        let places = Places::new(5, 5);
        let honest = places.take(source(1)).unwrap();
        let crowd: Vec<_> = (0..4).map(|_| places.take(source(2)).unwrap()).collect();
        crowd[0].asked();
        let newcomer = places.take(source(3)).unwrap();
        let gone: Vec<_> = crowd.iter().map(has_to_go).collect();
        assert_eq!(gone, [false, true, false, false]);
        assert!(!has_to_go(&honest) && !has_to_go(&newcomer));
        assert_eq!(places.open(), 5);
        let more: Vec<_> = (0..2).map(|_| places.take(source(4)).unwrap()).collect();
        assert!(has_to_go(&crowd[2]) && has_to_go(&crowd[3]));
        drop(crowd);
        assert_eq!(places.open(), 4, "only one of the crowd still had its place");
        drop((honest, newcomer, more));
        assert_eq!(places.open(), 0);
        let state = places.lock();
        assert!(state.crowds.is_empty() && state.ranks.is_empty());
    }

    #[test]
    fn an_address_makes_place_among_its_own() {
        let places = Places::new(10, 2);
        let other = places.take(source(1)).unwrap();
        let own: Vec<_> = (0..3).map(|_| places.take(source(2)).unwrap()).collect();
        assert_eq!(own.iter().map(has_to_go).collect::<Vec<_>>(), [true, false, false]);
        assert!(!has_to_go(&other));
    }

    #[test]
    fn who_has_proved_itself_stays() {
        let places = Places::new(2, 2);
        let proved: Vec<_> = (0..2).map(|_| places.take(source(1)).unwrap()).collect();
        proved[0].asked();
        proved.iter().for_each(Place::proved);
        assert!(places.take(source(1)).is_none() && places.take(source(2)).is_none());
        assert!(!proved.iter().any(has_to_go));
        drop(proved);
        assert!(places.take(source(2)).is_some());
    }

    #[test]
    fn among_crowds_of_one_size_the_oldest_goes() {
        let places = Places::new(3, 3);
        let one_each: Vec<_> = [9, 1, 5].map(|last| places.take(source(last)).unwrap()).into();
        let _newcomer = places.take(source(7)).unwrap();
        assert_eq!(one_each.iter().map(has_to_go).collect::<Vec<_>>(), [true, false, false]);
    }
}
