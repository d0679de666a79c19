//! Which address to connect to, and when: order, failures, backoff, circuit breaker.
//!
//! ```text
//!            breaker_failures in a row              retry time comes, one connect allowed
//!   Closed ------------------------------> Open --------------------------------------> HalfOpen
//!     ^  failures before: backoff only      ^          the connect fails                   |
//!     |                                     +----------------------------------------------+
//!     +------------------------------------ a connection proves useful --------------------+
//! ```
//!
//! After each failure the next connect waits for a random time up to `backoff_base * 2^(n-1)`,
//! at most `backoff_max` (full jitter). While `Open`, requests fail at once with the cached reason.

use std::net::SocketAddr;
use std::time::Duration;

use poolbroker_proto::reason::Reason;

use crate::timers::Time;

/// Where the breaker stands, for `status`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Breaker {
    /// Connects as needed.
    Closed,
    /// Failed too often: requests fail fast.
    Open,
    /// One connect is under way to see whether the upstream is back.
    HalfOpen,
}

impl Breaker {
    /// As `status` prints it.
    pub const fn name(self) -> &'static str {
        match self {
            Breaker::Closed => "closed",
            Breaker::Open => "open",
            Breaker::HalfOpen => "half-open",
        }
    }
}

/// What to do about a wanted connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pick {
    /// Connect to this address.
    Address(SocketAddr),
    /// Not yet: backing off until then.
    NotBefore(Time),
    /// Not now: the outcome of the connect under way decides.
    Probing,
    /// No address is known yet.
    Unresolved,
}

/// Backoff and breaker settings, from the upstream's limits.
#[derive(Debug, Clone, Copy)]
pub struct BalanceLimits {
    /// Failures in a row before requests fail fast.
    pub breaker_failures: u32,
    /// Longest wait after the first failure.
    pub backoff_base: Duration,
    /// Longest wait after any failure.
    pub backoff_max: Duration,
}

/// The addresses of one upstream and their health.
#[derive(Debug)]
pub struct Balance {
    limits: BalanceLimits,
    addresses: Vec<SocketAddr>,
    next: usize,
    failures_in_a_row: u32,
    last_failure: Option<Reason>,
    retry_at: Time,
    probing: bool,
    random: fastrand::Rng,
}

impl Balance {
    /// No address yet; `seed` makes the jitter.
    pub fn new(limits: BalanceLimits, seed: u64) -> Self {
        Balance {
            limits,
            addresses: Vec::new(),
            next: 0,
            failures_in_a_row: 0,
            last_failure: None,
            retry_at: Time::default(),
            probing: false,
            random: fastrand::Rng::with_seed(seed),
        }
    }

    /// The addresses that connects go to, in turn.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// Replaces the addresses; an empty list keeps the last good ones.
    pub fn handle_resolved(&mut self, addresses: Vec<SocketAddr>) {
        if addresses.is_empty() {
            if self.addresses.is_empty() {
                self.last_failure = Some(Reason::Unresolved);
            }
            return;
        }
        self.addresses = addresses;
        if self.last_failure == Some(Reason::Unresolved) {
            self.last_failure = None;
        }
    }

    /// Where a new connection goes now. `Address` counts as an attempt under way.
    pub fn pick(&mut self, now: Time) -> Pick {
        if self.addresses.is_empty() {
            return Pick::Unresolved;
        }
        if self.probing {
            return Pick::Probing;
        }
        if now < self.retry_at {
            return Pick::NotBefore(self.retry_at);
        }
        self.probing = self.failures_in_a_row > 0;
        let address = self.addresses[self.next % self.addresses.len()];
        self.next = self.next.wrapping_add(1);
        Pick::Address(address)
    }

    /// A connect succeeded. That alone does not close the breaker: a peer may accept and reset.
    pub fn handle_connected(&mut self) {
        self.probing = false;
    }

    /// A connection proved useful.
    pub fn handle_useful(&mut self) {
        if self.failures_in_a_row > 0 {
            self.failures_in_a_row = 0;
            self.last_failure = None;
            self.retry_at = Time::default();
        }
    }

    /// A connect failed, or a connection broke before it was of any use.
    pub fn handle_failure(&mut self, now: Time, reason: Reason) {
        self.probing = false;
        self.failures_in_a_row = self.failures_in_a_row.saturating_add(1);
        self.last_failure = Some(reason);
        let doublings = (self.failures_in_a_row - 1).min(16);
        let ceiling = self.limits.backoff_base.saturating_mul(1 << doublings);
        let ceiling = ceiling.min(self.limits.backoff_max);
        self.retry_at = now + ceiling.mul_f64(self.random.f64());
    }

    /// A connect that was under way was given up for reasons of our own.
    pub fn handle_abandoned(&mut self) {
        self.probing = false;
    }

    /// Why a request that needs a new connection should fail at once, if it should.
    pub fn fail_fast(&self, now: Time) -> Option<Reason> {
        let open = self.failures_in_a_row >= self.limits.breaker_failures && now < self.retry_at;
        let unresolved = self.addresses.is_empty() && self.last_failure.is_some();
        if open || unresolved { self.last_failure } else { None }
    }

    /// Where the breaker stands.
    pub fn breaker(&self) -> Breaker {
        if self.failures_in_a_row < self.limits.breaker_failures {
            Breaker::Closed
        } else if self.probing {
            Breaker::HalfOpen
        } else {
            Breaker::Open
        }
    }

    /// The reason of the last failure since the last success.
    pub fn last_failure(&self) -> Option<Reason> {
        self.last_failure
    }

    /// A duration spread evenly by `percent` around `duration`.
    pub fn jittered(&mut self, duration: Duration, percent: u32) -> Duration {
        let spread = f64::from(percent) / 100.0;
        duration.mul_f64(1.0 - spread + 2.0 * spread * self.random.f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: BalanceLimits = BalanceLimits {
        breaker_failures: 3,
        backoff_base: Duration::from_millis(100),
        backoff_max: Duration::from_secs(3),
    };

    fn balance() -> Balance {
        let mut balance = Balance::new(LIMITS, 1);
        balance.handle_resolved(vec![([127, 0, 0, 1], 1).into(), ([127, 0, 0, 1], 2).into()]);
        balance
    }

    fn at(ms: u64) -> Time {
        Time::default() + Duration::from_millis(ms)
    }

    #[test]
    fn addresses_are_taken_in_turn() {
        let mut balance = balance();
        let ports: Vec<_> = (0..4)
            .map(|_| match balance.pick(at(0)) {
                Pick::Address(address) => address.port(),
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(ports, [1, 2, 1, 2]);
    }

    #[test]
    fn backoff_grows_is_jittered_and_never_exceeds_its_maximum() {
        let mut balance = balance();
        let mut now = at(0);
        let mut waits = Vec::new();
        for failure in 1..200 {
            balance.handle_failure(now, Reason::ConnectRefused);
            let Pick::NotBefore(retry) = balance.pick(now) else {
                continue;
            };
            let wait = retry.since(now);
            let ceiling = LIMITS.backoff_base.saturating_mul(1 << (failure - 1).min(16));
            assert!(wait <= ceiling.min(LIMITS.backoff_max), "{failure}: {wait:?}");
            waits.push(wait);
            now = retry;
        }
        assert!(waits.iter().any(|wait| *wait > Duration::from_secs(2)));
        assert!(waits[20..].iter().any(|wait| *wait < Duration::from_secs(1)), "full jitter");
    }

    #[test]
    fn the_breaker_opens_fails_fast_and_closes_after_one_probe() {
        let mut balance = balance();
        let mut now = at(0);
        for _ in 0..3 {
            assert_eq!(balance.fail_fast(now), None);
            balance.handle_failure(now, Reason::ConnectRefused);
            now = balance.retry_at;
        }
        let before = Time::default();
        assert_eq!(balance.fail_fast(before), Some(Reason::ConnectRefused));
        assert_eq!(balance.breaker(), Breaker::Open);
        assert!(matches!(balance.pick(now), Pick::Address(_)));
        assert_eq!(balance.breaker(), Breaker::HalfOpen);
        assert_eq!(balance.pick(now), Pick::Probing);
        balance.handle_connected();
        assert_ne!(balance.breaker(), Breaker::Closed, "it may accept and reset");
        balance.handle_useful();
        assert_eq!(balance.breaker(), Breaker::Closed);
        assert!(matches!(balance.pick(now), Pick::Address(_)));
    }

    #[test]
    fn a_failed_resolution_keeps_the_last_good_addresses() {
        let mut balance = Balance::new(LIMITS, 1);
        assert_eq!(balance.pick(at(0)), Pick::Unresolved);
        assert_eq!(balance.fail_fast(at(0)), None);
        balance.handle_resolved(vec![]);
        assert_eq!(balance.fail_fast(at(0)), Some(Reason::Unresolved));
        balance.handle_resolved(vec![([127, 0, 0, 1], 1).into()]);
        assert_eq!(balance.fail_fast(at(0)), None);
        balance.handle_resolved(vec![]);
        assert_eq!(balance.addresses().len(), 1);
    }
}
