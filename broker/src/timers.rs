//! Time as the broker's pure parts see it, and a set of deadlines.
//!
//! [`Time`] is monotonic (CLOCK_MONOTONIC, read once per turn by `shard.rs`) and counts from the
//! broker's start, so a test makes its own. [`Deadlines`] holds one entry per thing that waits and
//! forgets it when the wait ends early: what is fast leaves nothing behind to be swept later.

use std::collections::BTreeSet;
use std::ops::Add;
use std::time::Duration;

/// A moment: nanoseconds since the broker started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time(u64);

impl Time {
    /// Later than any moment that comes.
    pub const NEVER: Time = Time(u64::MAX);

    /// The moment `since_start` after the start.
    pub fn from_start(since_start: Duration) -> Self {
        Time(u64::try_from(since_start.as_nanos()).unwrap_or(u64::MAX))
    }

    /// How long ago `earlier` was; zero if it was not.
    pub fn since(self, earlier: Time) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

impl Add<Duration> for Time {
    type Output = Time;

    fn add(self, duration: Duration) -> Time {
        Time(self.0.saturating_add(Time::from_start(duration).0))
    }
}

/// A set of deadlines, each with a key; the same key may wait for several moments.
#[derive(Debug)]
pub struct Deadlines<K> {
    set: BTreeSet<(Time, K)>,
}

impl<K: Ord + Copy> Deadlines<K> {
    /// No deadlines.
    pub fn new() -> Self {
        Deadlines { set: BTreeSet::new() }
    }

    /// Adds a deadline.
    pub fn insert(&mut self, at: Time, key: K) {
        self.set.insert((at, key));
    }

    /// Takes back a deadline that was added with the same two values.
    pub fn remove(&mut self, at: Time, key: K) {
        self.set.remove(&(at, key));
    }

    /// The earliest deadline.
    pub fn next_deadline(&self) -> Option<Time> {
        self.set.first().map(|(at, _)| *at)
    }

    /// Takes out the earliest deadline that has come.
    pub fn pop_due(&mut self, now: Time) -> Option<K> {
        let (at, _) = self.set.first()?;
        if *at > now {
            return None;
        }
        self.set.pop_first().map(|(_, key)| key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Time {
        Time::default() + Duration::from_millis(ms)
    }

    #[test]
    fn deadlines_come_due_in_order_and_removed_ones_never() {
        let mut deadlines = Deadlines::new();
        for ms in [30, 10, 20] {
            deadlines.insert(at(ms), ms);
        }
        deadlines.remove(at(20), 20);
        assert_eq!(deadlines.next_deadline(), Some(at(10)));
        assert_eq!(deadlines.pop_due(at(9)), None);
        assert_eq!(deadlines.pop_due(at(30)), Some(10));
        assert_eq!(deadlines.pop_due(at(30)), Some(30));
        assert_eq!(deadlines.pop_due(at(30)), None);
    }

    #[test]
    fn time_neither_wraps_nor_runs_backwards() {
        assert_eq!(at(1).since(at(5)), Duration::ZERO);
        assert!(at(1) + Duration::MAX > at(1));
    }
}
