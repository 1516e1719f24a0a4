//! Prefixes by where they lie, so that those around one and those in one are found without looking at all.
//!
//! Of two prefixes either one lies in the other or they have nothing in common: they are a forest.

use std::collections::BTreeMap;
use std::net::IpAddr;

use latchkey_wire::member::Cidr;

/// Masked prefixes, each with what is there. In the order of their first addresses; of those with the same, the widest first.
#[derive(Debug)]
pub(super) struct Ranges<T> {
    all: BTreeMap<Cidr, T>,
    /// How many there are of each family and length: a mesh uses one or two, and no others need to be tried.
    lengths: BTreeMap<(bool, u8), usize>,
}

impl<T> Default for Ranges<T> {
    fn default() -> Self {
        Self { all: BTreeMap::new(), lengths: BTreeMap::new() }
    }
}

impl<T> Ranges<T> {
    pub(super) fn remove(&mut self, range: &Cidr) {
        if self.all.remove(range).is_none() {
            return;
        }
        if let Some(count) = self.lengths.get_mut(&kind(range)) {
            *count -= 1;
            if *count == 0 {
                self.lengths.remove(&kind(range));
            }
        }
    }

    pub(super) fn entry(&mut self, range: Cidr) -> &mut T
    where
        T: Default,
    {
        self.all.entry(range).or_insert_with(|| {
            *self.lengths.entry(kind(&range)).or_default() += 1;
            T::default()
        })
    }

    /// All that `range` lies in, itself if it is there, the widest first.
    pub(super) fn covering(&self, range: &Cidr) -> impl Iterator<Item = (Cidr, &T)> {
        let (range, (v4, length)) = (*range, kind(range));
        self.lengths.range((v4, 0)..=(v4, length)).filter_map(move |((_, length), _)| {
            let wider = Cidr::new(range.address(), *length)?.masked();
            Some((wider, self.all.get(&wider)?))
        })
    }

    /// All that lie in `range`, itself if it is there.
    pub(super) fn within(&self, range: &Cidr) -> impl Iterator<Item = (Cidr, &T)> {
        let range = *range;
        self.all
            .range(range..)
            .map(|(inner, value)| (*inner, value))
            .take_while(move |(inner, _)| range.covers(inner))
    }
}

fn kind(range: &Cidr) -> (bool, u8) {
    (matches!(range.address(), IpAddr::V4(_)), range.length())
}

#[cfg(test)]
mod tests;
