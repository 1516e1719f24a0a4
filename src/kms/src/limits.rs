//! Rate limits: token buckets in the virtual-scheduling form of the generic cell rate algorithm (ITU-T I.371), in tables of
//! fixed size.
//!
//! # What is limited
//!
//! * **Requests of an address** (IPv4 address, IPv6 /64), before anything asymmetric is computed: HTTP 429.
//! * **TLS handshakes of an address**, at twice that rate: beyond it a connection is closed before its handshake, as an answer
//!   would cost the handshake that the limit is to save.
//! * **Requests in a machine's name**, twice. What machines have proved is charged to the machine. What is merely claimed,
//!   which anybody can who knows a machine's public key, is charged to the pair of machine and address, so that
//!   a stranger who uses up a name uses it up for his own address only. Both are looked at before anything asymmetric.
//!
//! # Why a full table helps nobody
//!
//! An entry that has paid its debt off says nothing that an empty place does not, and is replaced. If all places that a
//! newcomer may have are in debt, it takes the place of the one with the least debt *and takes over that debt* (as the
//! Space-Saving sketch does): whoever has himself pushed out comes back with at least what he owed.
//! Places are found by a hash with a random key, so nobody can choose whom he shares them with.

use std::{
    hash::{BuildHasher, Hash, RandomState},
    net::{IpAddr, Ipv6Addr},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use latchkey_wire::pubhash::Pubhash;
use thiserror::Error;

/// Sets of a table and places in each: 65,536 places of 16 bytes.
const SETS: usize = 8192;
const PLACES: usize = 8;

/// How often something may happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rate {
    /// Per minute, for ever; 0 is no limit at all.
    pub(crate) per_minute: u32,
    /// At once.
    pub(crate) burst: u32,
}

impl Rate {
    fn doubled(self) -> Self {
        Self { per_minute: self.per_minute.saturating_mul(2), burst: self.burst.saturating_mul(2) }
    }
}

/// Whose connections are counted together: an IPv4 address, or an IPv6 /64, which one subscriber has at least.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Source(u128);

impl Source {
    pub(crate) fn of(address: IpAddr) -> Self {
        let v6 = match address.to_canonical() {
            IpAddr::V4(v4) => return Self(v4.to_ipv6_mapped().to_bits()),
            IpAddr::V6(v6) => v6,
        };
        Self(v6.to_bits() >> 64 << 64)
    }
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let v6 = Ipv6Addr::from_bits(self.0);
        match v6.to_ipv4_mapped() {
            Some(v4) => v4.fmt(f),
            None => write!(f, "{v6}/64"),
        }
    }
}

/// Who has used up its rate, and when it is worth asking again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("more requests than {whose} may make ({flag}); again in {} s", self.retry_after())]
pub(crate) struct TooMany {
    pub(crate) whose: &'static str,
    flag: &'static str,
    wait: Duration,
}

impl TooMany {
    /// Whole seconds, at least one.
    pub(crate) fn retry_after(&self) -> u64 {
        (self.wait.as_secs() + u64::from(self.wait.subsec_nanos() > 0)).max(1)
    }
}

/// All limits of the server.
#[derive(Debug)]
pub(crate) struct Limits {
    start: Instant,
    handshakes: Buckets,
    requests: Buckets,
    claims: Buckets,
    machines: Buckets,
}

impl Limits {
    pub(crate) fn new(address: Rate, machine: Rate) -> Self {
        Self {
            start: Instant::now(),
            handshakes: Buckets::new(address.doubled()),
            requests: Buckets::new(address),
            claims: Buckets::new(machine),
            machines: Buckets::new(machine),
        }
    }

    /// Whether this address may begin a TLS handshake.
    pub(crate) fn handshake(&self, source: Source) -> Result<(), TooMany> {
        self.handshakes.take(&source, self.now()).map_err(of_address)
    }

    /// Whether this address may make a request.
    pub(crate) fn request(&self, source: Source) -> Result<(), TooMany> {
        self.requests.take(&source, self.now()).map_err(of_address)
    }

    /// Whether this address may go on in the name of this machine.
    pub(crate) fn claim(&self, source: Source, machine: &Pubhash) -> Result<(), TooMany> {
        let now = self.now();
        self.machines.look(machine, now).map_err(of_machine)?;
        self.claims.take(&(source, machine), now).map_err(of_machine)
    }

    /// Whether this machine, now that it has proved to be it, may go on.
    pub(crate) fn proved(&self, machine: &Pubhash) -> Result<(), TooMany> {
        self.machines.take(machine, self.now()).map_err(of_machine)
    }

    fn now(&self) -> Duration {
        self.start.elapsed()
    }
}

fn of_address(wait: Duration) -> TooMany {
    TooMany { whose: "an address", flag: "--address-rate, --address-burst", wait }
}

fn of_machine(wait: Duration) -> TooMany {
    TooMany { whose: "a machine", flag: "--machine-rate, --machine-burst", wait }
}

/// Buckets of one rate, by the hash of a key.
struct Buckets {
    /// Nanoseconds that one event costs, and how many may be owed.
    cost: u64,
    credit: u64,
    hasher: RandomState,
    /// Empty if there is no limit.
    sets: Box<[Mutex<[Bucket; PLACES]>]>,
}

/// One key's debt: it is paid off at `until`, nanoseconds after the start.
#[derive(Debug, Clone, Copy, Default)]
struct Bucket {
    key: u64,
    until: u64,
}

impl std::fmt::Debug for Buckets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buckets({} ns, credit {} ns)", self.cost, self.credit)
    }
}

impl Buckets {
    fn new(rate: Rate) -> Self {
        let cost = 60_000_000_000_u64.checked_div(rate.per_minute.into());
        let sets = if cost.is_some() { SETS } else { 0 };
        let cost = cost.unwrap_or_default();
        Self {
            cost,
            credit: cost.saturating_mul(rate.burst.max(1).into()),
            hasher: RandomState::new(),
            sets: (0..sets).map(|_| Mutex::default()).collect(),
        }
    }

    /// Takes one token, or says how long there will be none.
    fn take(&self, key: &impl Hash, now: Duration) -> Result<(), Duration> {
        self.with(key, now, |bucket, free_until| bucket.until = free_until)
    }

    /// Whether there is a token, without taking it.
    fn look(&self, key: &impl Hash, now: Duration) -> Result<(), Duration> {
        self.with(key, now, |_, _| ())
    }

    fn with(
        &self,
        key: &impl Hash,
        now: Duration,
        pay: impl FnOnce(&mut Bucket, u64),
    ) -> Result<(), Duration> {
        let key = self.hasher.hash_one(key);
        let at = usize::try_from(key).unwrap_or_default().checked_rem(self.sets.len());
        let Some(set) = at.and_then(|at| self.sets.get(at)) else { return Ok(()) };
        let now = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
        let mut set = set.lock().unwrap_or_else(PoisonError::into_inner);
        let known = set.iter().position(|bucket| bucket.key == key);
        let least = set.iter().enumerate().min_by_key(|(_, bucket)| bucket.until).map(|(at, _)| at);
        let Some(bucket) = known.or(least).and_then(|at| set.get_mut(at)) else { return Ok(()) };
        let until = bucket.until.max(now).saturating_add(self.cost);
        match until.saturating_sub(now).checked_sub(self.credit) {
            None | Some(0) => {
                bucket.key = key;
                pay(bucket, until);
                Ok(())
            }
            Some(wait) => Err(Duration::from_nanos(wait)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: fn(u64) -> Duration = Duration::from_secs;

    fn buckets(per_minute: u32, burst: u32) -> Buckets {
        Buckets::new(Rate { per_minute, burst })
    }

    #[test]
    fn a_burst_at_once_and_then_the_rate() {
        let buckets = buckets(60, 3);
        for _ in 0..3 {
            assert_eq!(buckets.take(&"a", AT(10)), Ok(()));
        }
        assert_eq!(buckets.take(&"a", AT(10)), Err(AT(1)));
        assert_eq!(buckets.take(&"b", AT(10)), Ok(()), "another key has its own bucket");
        assert_eq!(buckets.take(&"a", AT(11)), Ok(()));
        assert_eq!(buckets.take(&"a", AT(11)), Err(AT(1)));
        for _ in 0..3 {
            assert_eq!(buckets.take(&"a", AT(1000)), Ok(()), "a pause fills the bucket, no more");
        }
        assert!(buckets.take(&"a", AT(1000)).is_err());
    }

    #[test]
    fn looking_takes_nothing() {
        let buckets = buckets(60, 1);
        for _ in 0..10 {
            assert_eq!(buckets.look(&"a", AT(0)), Ok(()));
        }
        assert_eq!(buckets.take(&"a", AT(0)), Ok(()));
        assert!(buckets.look(&"a", AT(0)).is_err());
    }

    #[test]
    fn no_rate_is_no_limit() {
        let buckets = buckets(0, 1);
        assert!((0..100_000).all(|_| buckets.take(&"a", AT(0)).is_ok()));
    }

    #[test]
    fn pushing_out_ones_own_bucket_gains_nothing() {
        let buckets = buckets(1, 4);
        let keys = SETS * PLACES * 4;
        let round = || (0..keys).filter(|key| buckets.take(key, AT(1)).is_ok()).count();
        let allowed: usize = (0..40).map(|_| round()).sum();
        assert_eq!(round(), 0, "with every place deep in debt nobody gets another token");
        assert!(allowed <= SETS * PLACES * 4, "{allowed} tokens, more than all places give");
        assert!(buckets.take(&"newcomer", AT(1)).is_err(), "debts are taken over");
        assert_eq!(buckets.take(&"newcomer", AT(61)), Ok(()), "and paid off");
    }

    #[test]
    fn sources() {
        for (address, shown) in [
            ("192.0.2.7", "192.0.2.7"),
            ("::ffff:192.0.2.7", "192.0.2.7"),
            ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
            ("2001:db8:1:2:ffff::", "2001:db8:1:2::/64"),
            ("::1", "::/64"),
        ] {
            assert_eq!(Source::of(address.parse().unwrap()).to_string(), shown);
        }
    }

    #[test]
    fn a_stranger_uses_up_a_name_for_his_own_address_only() {
        let limits =
            Limits::new(Rate { per_minute: 0, burst: 1 }, Rate { per_minute: 1, burst: 2 });
        let machine = Pubhash::of_spki(b"machine");
        let [stranger, home] =
            ["192.0.2.1", "192.0.2.2"].map(|address| Source::of(address.parse().unwrap()));
        assert!((0..10).any(|_| limits.claim(stranger, &machine).is_err()));
        assert_eq!(limits.claim(home, &machine), Ok(()));
        assert_eq!(limits.proved(&machine), Ok(()));
        assert_eq!(limits.proved(&machine), Ok(()));
        let refused = limits.claim(home, &machine).unwrap_err();
        assert_eq!(refused.whose, "a machine");
        assert!((1..=60).contains(&refused.retry_after()));
    }
}
