//! Counters, and the two sums that hold at every moment (DESIGN.md section 7):
//!
//! ```text
//! accepted = sent + dropped + expired + queued          in_doubt <= sent
//! requests = replied + timed_out + refused + failed + in_flight
//! ```
//!
//! `queued` and `in_flight` are counted by those who hold the things ([`crate::outbox`],
//! [`crate::inflight`]), not derived from the others: so the sums can fail, and a test that finds
//! them unequal has found a lost message.

use std::collections::BTreeMap;

use poolbroker_proto::message::Outcomes;
use poolbroker_proto::reason::Reason;

/// Counts by reason.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tally {
    counts: BTreeMap<Reason, u64>,
}

impl Tally {
    /// Adds `count` under `reason`.
    pub fn add(&mut self, reason: Reason, count: u64) {
        if count > 0 {
            *self.counts.entry(reason).or_default() += count;
        }
    }

    /// All of them.
    pub fn total(&self) -> u64 {
        self.counts.values().sum()
    }

    /// Each reason that has a count.
    pub fn iter(&self) -> impl Iterator<Item = (Reason, u64)> {
        self.counts.iter().map(|(reason, count)| (*reason, *count))
    }
}

/// How accepted one-way messages ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Settled {
    /// The kernel took all of them.
    Sent,
    /// They were given up.
    Dropped(Reason),
    /// They waited longer than `queue_timeout`.
    Expired,
    /// They were sent before, and their connection ended before the peer's kernel acknowledged
    /// them: counted beside `sent`, not instead.
    InDoubt,
}

/// The one-way messages of an upstream, or of one session to one upstream.
#[derive(Debug, Clone, Default)]
pub struct Ledger {
    /// Taken over from a client. Each copy of a broadcast counts.
    pub accepted: u64,
    /// Of those: copies beside the first one.
    pub copies: u64,
    /// Taken whole by the kernel.
    pub sent: u64,
    /// Given up.
    pub dropped: Tally,
    /// Waited longer than `queue_timeout`.
    pub expired: u64,
    /// Of those sent: not acknowledged when their connection ended.
    pub in_doubt: u64,
    /// Never taken.
    pub refused: Tally,
}

impl Ledger {
    /// Counts how `count` accepted messages ended.
    pub fn settle(&mut self, settled: Settled, count: u64) {
        match settled {
            Settled::Sent => self.sent += count,
            Settled::Dropped(reason) => self.dropped.add(reason, count),
            Settled::Expired => self.expired += count,
            Settled::InDoubt => self.in_doubt += count,
        }
    }

    /// Accepted messages that have their outcome.
    pub fn settled(&self) -> u64 {
        self.sent + self.dropped.total() + self.expired
    }

    /// The same as a client sees it.
    pub fn outcomes(&self) -> Outcomes {
        Outcomes {
            accepted: self.accepted,
            copies: self.copies,
            sent: self.sent,
            dropped: self.dropped.iter().collect(),
            expired: self.expired,
            in_doubt: self.in_doubt,
            refused: self.refused.iter().collect(),
            untold: 0,
        }
    }
}

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RequestEnd {
    /// Its reply went to its owner.
    Replied,
    /// The caller's deadline or `request_timeout` came first.
    TimedOut,
    /// It was never put on a connection.
    Refused(Reason),
    /// It was put on a connection, or its owner went away.
    Failed(Reason),
}

/// The requests to an upstream.
#[derive(Debug, Clone, Default)]
pub struct RequestCounts {
    /// All that clients asked.
    pub requests: u64,
    /// Ended with their reply.
    pub replied: u64,
    /// Ended by a deadline.
    pub timed_out: u64,
    /// Ended before they were put on a connection.
    pub refused: Tally,
    /// Ended otherwise.
    pub failed: Tally,
}

impl RequestCounts {
    /// Counts how one request ended.
    pub fn end(&mut self, end: RequestEnd) {
        match end {
            RequestEnd::Replied => self.replied += 1,
            RequestEnd::TimedOut => self.timed_out += 1,
            RequestEnd::Refused(reason) => self.refused.add(reason, 1),
            RequestEnd::Failed(reason) => self.failed.add(reason, 1),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ledger_says_what_is_still_queued() {
        let mut ledger = Ledger { accepted: 10, ..Ledger::default() };
        ledger.settle(Settled::Sent, 4);
        ledger.settle(Settled::InDoubt, 2);
        ledger.settle(Settled::Dropped(Reason::TooBig), 1);
        ledger.settle(Settled::Expired, 3);
        assert_eq!(ledger.settled(), 8);
        assert_eq!(ledger.outcomes().queued(), 2);
        assert_eq!(ledger.outcomes().dropped, vec![(Reason::TooBig, 1)]);
    }
}
