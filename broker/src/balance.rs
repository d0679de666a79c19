//! Which address of an upstream to use: how each one fares, backoff, circuit breaker, policy.
//!
//! An upstream has one or more addresses. This file knows for each how its connects and requests
//! went and how much it has to do now, and answers two questions of the pool: where does a new
//! connection go ([`Balance::pick`]), and whose connections may carry this request
//! ([`Balance::choose`], [`Balance::may_serve`]). It has no clock, no sockets and no connections:
//! the pool tells it what happened.
//!
//! # One address
//!
//! ```text
//!          failures in a row, or timeouts             the retry time has come:
//!          while another address is Closed            one connect at a time
//!   Closed ------------------------------------> Open ------------------------> HalfOpen
//!     ^                                          ^  ^     the connect fails        |
//!     |                                          |  +------------------------------+
//!     |  an exchange proves useful; or the last  |     it succeeds: on trial       |
//!     |  Closed one goes and this was but slow   +---------------------------------+
//!     +------------------------------------------+
//! ```
//!
//! - A *failure* is a connect that failed, or a connection that broke before it was of any use.
//!   After each one the next connect waits for a random time up to `backoff_base * 2^(n-1)`, at
//!   most `backoff_max` (full jitter), and is then the only one under way. The first
//!   `breaker_failures - 1` cost no more than that.
//! - *Ejected* is an address that is not `Closed`: it gets no requests, until its retry time. From
//!   then on it is on *trial* with one connect or one request at a time, and the first exchange
//!   that succeeds brings it back. A connect alone does not: a peer may accept and reset.
//! - *Timeouts* of requests are counted apart and hold back no connect. They eject only when
//!   `breaker_failures` came in a row, two at least: one slow request says nothing. And they never
//!   eject the last closed address: requests that time out everywhere mean a slow upstream or hard
//!   requests, and fewer addresses make that worse (Envoy has `max_ejection_percent` for this). If
//!   failures take the last closed address, those that were only slow come back.
//!
//! So where one address is ejected by timeouts, another is closed.
//!
//! # All of them
//!
//! While every address is ejected and none may be tried, the breaker of the whole is open: requests
//! that need a connection fail at once, with the reason of the latest failure. While every address
//! is ejected, any connection that is up may be used: one that works is the better witness.
//!
//! # Policy
//!
//! | policy              | a new connection goes to   | a request goes to                       |
//! |---------------------|----------------------------|-----------------------------------------|
//! | `round-robin`       | the one with fewest        | the next in turn with a free connection |
//! | `least-outstanding` | the one with fewest        | the one with the fewest requests        |
//! | `hash`              | the address of the session | the address of the session              |
//!
//! Ties are broken by turn. The first turn is random, so that many brokers with few connections do
//! not all go to the same address. `hash` gives each pair of session and address a weight, and a
//! session goes to the address of the greatest weight that is not ejected (rendezvous hashing): the
//! loss of an address moves its sessions and no others. What has no session goes by `round-robin`.
//!
//! With one address nothing of this is computed.

use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::SocketAddr;
use std::ops::Range;
use std::time::Duration;

use poolbroker_proto::reason::Reason;

use crate::config::{ADDRESSES_MAX, TIMEOUTS_TO_EJECT_MIN};
use crate::timers::Time;

// A bit for each address.
const _: () = assert!(ADDRESSES_MAX <= u64::BITS as usize);

/// How connections and requests are spread over the addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Policy {
    /// Addresses take turns.
    #[default]
    RoundRobin,
    /// The address with the fewest requests that have not ended.
    LeastOutstanding,
    /// Each session keeps to one address.
    Hash,
}

impl Policy {
    /// Every policy.
    pub const ALL: [Policy; 3] = [Policy::RoundRobin, Policy::LeastOutstanding, Policy::Hash];
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Policy::RoundRobin => "round-robin",
            Policy::LeastOutstanding => "least-outstanding",
            Policy::Hash => "hash",
        })
    }
}

/// Where the breaker stands, for `status`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Breaker {
    /// Connects as needed.
    Closed,
    /// Failed too often: requests fail fast, or go to other addresses.
    Open,
    /// One connect is under way to see whether it is back.
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

/// Whose connections may carry a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// Any: there is but one address.
    Any,
    /// Those to this address.
    To(SocketAddr),
}

/// How the sessions are spread over the addresses. While this stays the same, each session keeps
/// its address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Spread {
    /// Changes with the set of addresses.
    generation: u64,
    /// The addresses that sessions go to, a bit for each. None: no session has one of its own.
    homes: u64,
}

/// How an address fares, for `status`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Health {
    /// The address.
    pub remote: SocketAddr,
    /// Where its breaker stands.
    pub breaker: Breaker,
    /// Requests on its connections that have not ended.
    pub outstanding: usize,
    /// Connections to it that are up or under way.
    pub conns: usize,
    /// Failures in a row.
    pub failures: u32,
    /// Why the last one happened, while there are any.
    pub last_failure: Option<Reason>,
}

/// Backoff and breaker settings, from the upstream's limits.
#[derive(Debug, Clone, Copy)]
pub struct BalanceLimits {
    /// How connections and requests are spread.
    pub policy: Policy,
    /// Failures in a row before an address is ejected.
    pub breaker_failures: u32,
    /// Longest wait after the first failure.
    pub backoff_base: Duration,
    /// Longest wait after any failure.
    pub backoff_max: Duration,
}

/// The addresses of one upstream. See the module's text.
#[derive(Debug)]
pub struct Balance {
    limits: BalanceLimits,
    /// In ascending order, none twice.
    addresses: Vec<Address>,
    /// Resolved no more, and still with connections or requests: kept until those are gone, so
    /// that an address that returns meanwhile has the right counts.
    departed: Vec<Address>,
    /// How often the addresses changed.
    generation: u64,
    /// The name was resolved in vain and there never was an address.
    is_unresolved: bool,
    /// Where the next connection goes among equals.
    connect_turn: usize,
    /// Where the next request goes among equals.
    request_turn: usize,
    random: fastrand::Rng,
}

/// One address and how it fares.
#[derive(Debug)]
struct Address {
    remote: SocketAddr,
    /// Makes its weights for sessions.
    salt: u64,
    /// Since the last exchange that was of use.
    failing: Option<Failing>,
    timeouts_in_a_row: u32,
    /// Of its connections: not up yet.
    connecting: usize,
    conns: usize,
    outstanding: usize,
}

/// The failures in a row of an address.
#[derive(Debug, Clone, Copy)]
struct Failing {
    in_a_row: u32,
    is_ejected: bool,
    reason: Reason,
    failed_at: Time,
    retry_at: Time,
}

/// Load first, turn second: what is least is taken.
type Rank = (usize, usize);

impl Balance {
    /// No address yet; `seed` makes the jitter and the first turns.
    pub fn new(limits: BalanceLimits, seed: u64) -> Self {
        let mut random = fastrand::Rng::with_seed(seed);
        Balance {
            limits,
            addresses: Vec::new(),
            departed: Vec::new(),
            generation: 0,
            is_unresolved: false,
            connect_turn: random.usize(..ADDRESSES_MAX),
            request_turn: random.usize(..ADDRESSES_MAX),
            random,
        }
    }

    // What there is.

    /// Whether connections may go to an address.
    pub fn has(&self, remote: SocketAddr) -> bool {
        self.addresses.iter().any(|address| address.remote == remote)
    }

    /// How each address fares, in ascending order.
    pub fn health(&self) -> impl Iterator<Item = Health> {
        self.addresses.iter().map(|address| Health {
            remote: address.remote,
            breaker: address.breaker(),
            outstanding: address.outstanding,
            conns: address.conns,
            failures: address.failing.map_or(0, |failing| failing.in_a_row),
            last_failure: address.failing.map(|failing| failing.reason),
        })
    }

    /// Where the breaker of the whole stands: closed while it is for any address.
    pub fn breaker(&self) -> Breaker {
        let stands = |breaker| self.addresses.iter().any(|address| address.breaker() == breaker);
        if self.addresses.is_empty() || stands(Breaker::Closed) {
            Breaker::Closed
        } else if stands(Breaker::HalfOpen) {
            Breaker::HalfOpen
        } else {
            Breaker::Open
        }
    }

    /// The reason of the latest failure of an address that has not been of use since.
    pub fn last_failure(&self) -> Option<Reason> {
        if self.is_unresolved {
            return Some(Reason::Unresolved);
        }
        let failing = self.addresses.iter().filter_map(|address| address.failing);
        failing.max_by_key(|failing| failing.failed_at).map(|failing| failing.reason)
    }

    /// Why a request that needs a new connection should fail at once, if it should.
    pub fn fail_fast(&self, now: Time) -> Option<Reason> {
        let is_shut = |address: &Address| {
            address.failing.is_some_and(|failing| failing.is_ejected && now < failing.retry_at)
        };
        self.addresses.iter().all(is_shut).then(|| self.last_failure()).flatten()
    }

    /// Connects under way whose success is in doubt while other addresses are well: whoever waits
    /// for a connection should not count on them.
    pub fn doubtful_connects(&self) -> usize {
        if self.addresses.len() <= 1 || self.addresses.iter().all(|one| one.failing.is_some()) {
            return 0;
        }
        let failing = self.addresses.iter().filter(|address| address.failing.is_some());
        failing.map(|address| address.connecting).sum()
    }

    // Questions.

    /// Where a new connection goes now; `key` is the session it is for, if it is for one.
    /// `Address` counts as a connect under way, which ends with [`Balance::handle_connected`] or
    /// [`Balance::handle_abandoned`].
    pub fn pick(&mut self, now: Time, key: Option<u64>) -> Pick {
        if self.addresses.is_empty() {
            return Pick::Unresolved;
        }
        let among = match self.home(now, key) {
            Some(home) => home..home + 1,
            None => 0..self.addresses.len(),
        };
        let may_take = |address: &Address| address.is_connectable(now);
        let least =
            self.least(among.clone(), self.connect_turn, |address| address.conns, may_take, None);
        let Some((_, index)) = least else {
            return obstacle(now, &self.addresses[among]);
        };
        self.connect_turn = index + 1;
        let address = &mut self.addresses[index];
        address.connecting += 1;
        address.conns += 1;
        Pick::Address(address.remote)
    }

    /// Finds a connection for a request of the session `key`: asks `free` for a free connection to
    /// one address after the other, the best first, until there is one. Which of several to the
    /// same address it is, is for `free` to say.
    ///
    /// `None`: the request waits. [`Balance::pick`] with its key says where to connect for it, and
    /// [`Balance::may_serve`] whether a connection that becomes free will do. Ask again after
    /// `pick`: an address with a probe under way is no session's address meanwhile.
    ///
    /// This runs once per request. With one address it is `free(Choice::Any)` and nothing else.
    #[inline]
    pub fn choose<T>(
        &mut self,
        now: Time,
        key: Option<u64>,
        mut free: impl FnMut(Choice) -> Option<T>,
    ) -> Option<T> {
        if self.addresses.len() <= 1 {
            return free(Choice::Any);
        }
        if let Some(home) = self.home(now, key) {
            return free(Choice::To(self.addresses[home].remote));
        }
        let is_any_closed = self.is_any_closed();
        let may_take = |address: &Address| !is_any_closed || address.is_eligible(now);
        let load: fn(&Address) -> usize = match self.limits.policy {
            Policy::LeastOutstanding => |address| address.outstanding,
            Policy::RoundRobin | Policy::Hash => |_| 0,
        };
        let all = 0..self.addresses.len();
        let mut asked = None;
        while let Some((rank, index)) =
            self.least(all.clone(), self.request_turn, load, may_take, asked)
        {
            if let Some(found) = free(Choice::To(self.addresses[index].remote)) {
                self.request_turn = index + 1;
                return Some(found);
            }
            asked = Some(rank);
        }
        None
    }

    /// Whether requests would be spread over more addresses if there were one more connection.
    pub fn lacks_address(&self, now: Time) -> bool {
        let is_left_out = |address: &Address| address.conns == 0 && address.is_connectable(now);
        self.addresses.len() > 1
            && self.limits.policy != Policy::Hash
            && self.addresses.iter().any(is_left_out)
    }

    /// Whether a free connection to `remote` may carry a request of the session `key` that waits:
    /// one that [`Balance::choose`] would have taken. With one address: any.
    #[inline]
    pub fn may_serve(&self, now: Time, key: Option<u64>, remote: SocketAddr) -> bool {
        if self.addresses.len() <= 1 {
            return true;
        }
        let Some(index) = self.index_of(remote) else {
            return false;
        };
        match self.home(now, key) {
            Some(home) => home == index,
            None => self.addresses[index].is_eligible(now) || !self.is_any_closed(),
        }
    }

    /// How the sessions are spread over the addresses now.
    #[inline]
    pub fn spread(&self, now: Time) -> Spread {
        if self.limits.policy != Policy::Hash || self.addresses.len() <= 1 || !self.is_any_closed()
        {
            return Spread::default();
        }
        let bit =
            |(index, address): (usize, &Address)| u64::from(address.is_eligible(now)) << index;
        let homes = self.addresses.iter().enumerate().map(bit).sum();
        Spread { generation: self.generation, homes }
    }

    /// The index of the address of a session, if it has one of its own now.
    pub fn home_of(&self, now: Time, key: u64) -> Option<usize> {
        self.home(now, Some(key)).filter(|_| self.addresses.len() > 1)
    }

    /// Why no connect to the address of that index may begin now, if so.
    pub fn obstacle_to(&self, now: Time, index: usize) -> Option<Pick> {
        let address = self.addresses.get(index)?;
        let is_free = address.is_connectable(now);
        (!is_free).then(|| obstacle(now, std::slice::from_ref(address)))
    }

    /// The index of an address, in ascending order.
    pub fn index_of(&self, remote: SocketAddr) -> Option<usize> {
        self.addresses.iter().position(|address| address.remote == remote)
    }

    /// A duration spread evenly by `percent` around `duration`.
    pub fn jittered(&mut self, duration: Duration, percent: u32) -> Duration {
        let spread = f64::from(percent) / 100.0;
        duration.mul_f64(1.0 - spread + 2.0 * spread * self.random.f64())
    }

    // Events: connections. Each one picked is up once at most, and ends once.

    /// A connect succeeded. That alone ejects or brings back nothing.
    pub fn handle_connected(&mut self, remote: SocketAddr) {
        self.update(remote, |address| {
            address.connecting = address.connecting.saturating_sub(1);
        });
    }

    /// A connect under way came to nothing. If it failed, [`Balance::handle_failure`] is called
    /// too; if it was given up for reasons of our own, it is not.
    pub fn handle_abandoned(&mut self, remote: SocketAddr) {
        self.update(remote, |address| {
            address.connecting = address.connecting.saturating_sub(1);
            address.conns = address.conns.saturating_sub(1);
        });
    }

    /// A connection that was up takes nothing new any more.
    pub fn handle_ended(&mut self, remote: SocketAddr) {
        self.update(remote, |address| address.conns = address.conns.saturating_sub(1));
    }

    // Events: requests. Each one put on a connection leaves it once.

    /// A request was put on a connection.
    #[inline]
    pub fn handle_dispatched(&mut self, remote: SocketAddr) {
        self.update(remote, |address| address.outstanding += 1);
    }

    /// A request left its connection, however it ended.
    #[inline]
    pub fn handle_request_end(&mut self, remote: SocketAddr) {
        self.update(remote, |address| {
            address.outstanding = address.outstanding.saturating_sub(1);
        });
    }

    // Events: health.

    /// A connection proved useful.
    #[inline]
    pub fn handle_useful(&mut self, remote: SocketAddr) {
        self.update(remote, |address| {
            address.failing = None;
            address.timeouts_in_a_row = 0;
        });
    }

    /// A connect failed, or a connection broke before it was of any use.
    pub fn handle_failure(&mut self, now: Time, remote: SocketAddr, reason: Reason) {
        let limit = self.limits.breaker_failures;
        let Some(address) = self.find(remote) else {
            return;
        };
        let before = address.failing.map_or(0, |failing| failing.in_a_row);
        let was_ejected = address.is_ejected();
        let in_a_row = before.saturating_add(1);
        self.fail(now, remote, reason, in_a_row, was_ejected || in_a_row >= limit);
        self.readmit_slow();
    }

    /// A request timed out. May eject the address; see the module's text.
    pub fn handle_request_timeout(&mut self, now: Time, remote: SocketAddr) {
        let limit = self.limits.breaker_failures;
        let is_closed = |other: &Address| other.remote != remote && !other.is_ejected();
        let is_another_closed = self.addresses.iter().any(is_closed);
        let Some(address) = self.find(remote) else {
            return;
        };
        address.timeouts_in_a_row = address.timeouts_in_a_row.saturating_add(1);
        let in_a_row = match address.failing {
            // Of a request from before the ejection.
            Some(failing) if failing.is_ejected && now < failing.retry_at => return,
            // The trial.
            Some(failing) if failing.is_ejected => failing.in_a_row.saturating_add(1),
            Some(_) | None if address.timeouts_in_a_row >= limit.max(TIMEOUTS_TO_EJECT_MIN) => {
                limit
            }
            Some(_) | None => return,
        };
        if is_another_closed {
            self.fail(now, remote, Reason::RequestTimeout, in_a_row, true);
        }
    }

    /// Replaces the addresses, and returns those that are not among them any more: their
    /// connections are to end in order, with [`Reason::AddressGone`]. An empty list keeps the
    /// addresses there are. Those that stay keep their health.
    ///
    /// If there are more than [`ADDRESSES_MAX`], those that are here already stay before others
    /// come, the lowest first: an answer in another order changes nothing.
    pub fn handle_resolved(&mut self, mut remotes: Vec<SocketAddr>) -> Vec<SocketAddr> {
        if remotes.is_empty() {
            self.is_unresolved = self.addresses.is_empty();
            return Vec::new();
        }
        self.is_unresolved = false;
        remotes.sort_by_key(|remote| (!self.has(*remote), *remote));
        remotes.dedup();
        remotes.truncate(ADDRESSES_MAX);
        remotes.sort_unstable();
        let current = self.addresses.iter().map(|address| address.remote);
        let gone: Vec<_> = current.filter(|remote| !remotes.contains(remote)).collect();
        let mut before = std::mem::take(&mut self.addresses);
        before.append(&mut self.departed);
        for remote in remotes {
            let index = before.iter().position(|address| address.remote == remote);
            let known = index.map(|index| before.swap_remove(index));
            self.addresses.push(known.unwrap_or_else(|| Address::new(remote)));
        }
        before.retain(Address::is_in_use);
        self.departed = before;
        self.generation += 1;
        self.readmit_slow();
        gone
    }

    // How.

    fn is_any_closed(&self) -> bool {
        self.addresses.iter().any(|address| !address.is_ejected())
    }

    /// The address of a session, by policy. None: it has none, or every address is ejected.
    fn home(&self, now: Time, key: Option<u64>) -> Option<usize> {
        let key = key.filter(|_| self.limits.policy == Policy::Hash && self.is_any_closed())?;
        let eligible = self.addresses.iter().enumerate();
        let eligible = eligible.filter(|(_, address)| address.is_eligible(now));
        eligible.max_by_key(|(_, address)| address.weight(key)).map(|(index, _)| index)
    }

    /// The least of the addresses `among` that may be taken, by load and then by turn; of those
    /// behind rank `asked`, if there is one.
    #[inline]
    fn least(
        &self,
        among: Range<usize>,
        turn: usize,
        load: impl Fn(&Address) -> usize,
        may_take: impl Fn(&Address) -> bool,
        asked: Option<Rank>,
    ) -> Option<(Rank, usize)> {
        let len = self.addresses.len();
        let ranked = |index: usize| {
            let address = &self.addresses[index];
            let rank = (load(address), (index + len - turn % len) % len);
            (may_take(address) && asked.is_none_or(|asked| rank > asked)).then_some((rank, index))
        };
        among.filter_map(ranked).min()
    }

    fn find(&mut self, remote: SocketAddr) -> Option<&mut Address> {
        let mut all = self.addresses.iter_mut().chain(&mut self.departed);
        all.find(|address| address.remote == remote)
    }

    #[inline]
    fn update(&mut self, remote: SocketAddr, change: impl FnOnce(&mut Address)) {
        if let Some(address) = self.find(remote) {
            change(address);
        }
        if !self.departed.is_empty() {
            self.departed.retain(Address::is_in_use);
        }
    }

    fn fail(
        &mut self,
        now: Time,
        remote: SocketAddr,
        reason: Reason,
        in_a_row: u32,
        is_ejected: bool,
    ) {
        // Beyond 2^16 any pause has reached its maximum.
        let doublings = in_a_row.saturating_sub(1).min(16);
        let ceiling = self.limits.backoff_base.saturating_mul(1 << doublings);
        let ceiling = ceiling.min(self.limits.backoff_max);
        let retry_at = now + ceiling.mul_f64(self.random.f64());
        if let Some(address) = self.find(remote) {
            if is_ejected {
                address.timeouts_in_a_row = 0;
            }
            address.failing =
                Some(Failing { in_a_row, is_ejected, reason, failed_at: now, retry_at });
        }
    }

    /// Once no address is closed any more: those that were only slow are better than nothing.
    fn readmit_slow(&mut self) {
        if self.is_any_closed() {
            return;
        }
        let is_slow = |failing: &mut Failing| failing.reason == Reason::RequestTimeout;
        for address in &mut self.addresses {
            address.failing.take_if(is_slow);
        }
    }
}

impl Address {
    fn new(remote: SocketAddr) -> Self {
        // Of fixed keys: an address that went and comes back has its sessions again.
        let mut hasher = DefaultHasher::new();
        remote.hash(&mut hasher);
        Address {
            remote,
            salt: hasher.finish(),
            failing: None,
            timeouts_in_a_row: 0,
            connecting: 0,
            conns: 0,
            outstanding: 0,
        }
    }

    fn is_ejected(&self) -> bool {
        self.failing.is_some_and(|failing| failing.is_ejected)
    }

    fn is_in_use(&self) -> bool {
        self.conns > 0 || self.outstanding > 0
    }

    fn breaker(&self) -> Breaker {
        match (self.is_ejected(), self.connecting) {
            (false, _) => Breaker::Closed,
            (true, 0) => Breaker::Open,
            (true, _) => Breaker::HalfOpen,
        }
    }

    /// Whether a connect may begin: after a failure one at a time, from the retry time on.
    fn is_connectable(&self, now: Time) -> bool {
        self.failing.is_none_or(|failing| failing.retry_at <= now && self.connecting == 0)
    }

    /// Whether it may get a request: not while it is ejected, but for a trial.
    fn is_eligible(&self, now: Time) -> bool {
        !self.is_ejected() || (self.is_connectable(now) && self.outstanding == 0)
    }

    /// How much a session wants this address: one fixed random number for each pair.
    fn weight(&self, key: u64) -> u64 {
        // The end of SplitMix64: each bit of key and salt moves half of the bits of the weight.
        let mut bits = key ^ self.salt;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ (bits >> 31)
    }
}

/// What stands in the way of a connect to any of these, none of which may be connected to.
fn obstacle(now: Time, addresses: &[Address]) -> Pick {
    let retries = addresses.iter().filter_map(|address| address.failing);
    let earliest = retries.map(|failing| failing.retry_at).filter(|at| *at > now).min();
    earliest.map_or(Pick::Probing, Pick::NotBefore)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    use proptest::collection::vec;
    use proptest::prelude::*;
    use proptest::sample::subsequence;

    const LIMITS: BalanceLimits = BalanceLimits {
        policy: Policy::RoundRobin,
        breaker_failures: 3,
        backoff_base: Duration::from_millis(100),
        backoff_max: Duration::from_secs(3),
    };

    fn remote(last: u8) -> SocketAddr {
        ([10, 0, 0, last], 80).into()
    }

    /// A balance over the addresses 0 to `count - 1`.
    fn balance_of(policy: Policy, count: u8) -> Balance {
        let mut balance = Balance::new(BalanceLimits { policy, ..LIMITS }, 1);
        balance.handle_resolved((0..count).map(remote).collect());
        balance
    }

    fn at(ms: u64) -> Time {
        Time::default() + Duration::from_millis(ms)
    }

    impl Balance {
        fn of(&self, remote: SocketAddr) -> &Address {
            self.addresses.iter().find(|address| address.remote == remote).unwrap()
        }

        fn connect(&mut self, now: Time, key: Option<u64>) -> Option<SocketAddr> {
            match self.pick(now, key) {
                Pick::Address(remote) => {
                    self.handle_connected(remote);
                    Some(remote)
                }
                Pick::NotBefore(_) | Pick::Probing | Pick::Unresolved => None,
            }
        }

        /// A connect that fails, as the pool reports it; when the next may come.
        fn fail_connect(&mut self, now: Time, remote: SocketAddr) -> Time {
            self.handle_failure(now, remote, Reason::ConnectRefused);
            self.handle_abandoned(remote);
            self.of(remote).failing.unwrap().retry_at
        }

        fn eject(&mut self, now: Time, remote: SocketAddr) -> Time {
            for _ in 1..self.limits.breaker_failures {
                self.handle_failure(now, remote, Reason::ConnectRefused);
            }
            self.fail_connect(now, remote)
        }

        fn time_out(&mut self, now: Time, remote: SocketAddr, times: u32) {
            (0..times).for_each(|_| self.handle_request_timeout(now, remote));
        }

        fn states(&self) -> Vec<Breaker> {
            self.health().map(|health| health.breaker).collect()
        }

        /// The addresses that `choose` asks when none has a connection.
        fn asks(&mut self, now: Time, key: Option<u64>) -> Vec<Choice> {
            let mut asked = Vec::new();
            let none: Option<()> = self.choose(now, key, |choice| {
                asked.push(choice);
                None
            });
            assert_eq!(none, None);
            asked
        }

        fn chosen(&mut self, now: Time, key: Option<u64>) -> Choice {
            self.choose(now, key, Some).unwrap()
        }
    }

    // One address.

    #[test]
    fn backoff_grows_is_jittered_and_never_exceeds_its_maximum() {
        let mut balance = balance_of(Policy::RoundRobin, 1);
        let mut now = at(0);
        let mut waits = Vec::new();
        for failure in 1..200 {
            let retry = balance.fail_connect(now, remote(0));
            let wait = retry.since(now);
            let ceiling = LIMITS.backoff_base.saturating_mul(1 << (failure - 1).min(16));
            assert!(wait <= ceiling.min(LIMITS.backoff_max), "{failure}: {wait:?}");
            waits.push(wait.as_secs_f64());
            now = retry;
        }
        // Evenly between nothing and the maximum: a quarter in each quarter, give or take.
        for quarter in 0..4 {
            let within = |wait: &&f64| (**wait / 0.75) as usize == quarter;
            let count = waits[10..].iter().filter(within).count();
            assert!((25..=75).contains(&count), "{quarter}: {count} of 190");
        }
    }

    #[test]
    fn the_breaker_opens_fails_fast_and_closes_after_one_probe() {
        let mut balance = balance_of(Policy::RoundRobin, 1);
        let mut now = at(0);
        for _ in 0..3 {
            assert_eq!(balance.fail_fast(now), None);
            assert_eq!(balance.pick(now, None), Pick::Address(remote(0)));
            now = balance.fail_connect(now, remote(0));
        }
        assert_eq!(balance.fail_fast(at(0)), Some(Reason::ConnectRefused));
        assert_eq!(balance.breaker(), Breaker::Open);
        assert_eq!(balance.pick(at(0), None), Pick::NotBefore(now));
        assert!(matches!(balance.pick(now, None), Pick::Address(_)));
        assert_eq!(balance.breaker(), Breaker::HalfOpen);
        assert_eq!(balance.pick(now, None), Pick::Probing);
        balance.handle_connected(remote(0));
        assert_eq!(balance.breaker(), Breaker::Open, "it may accept and reset");
        balance.handle_useful(remote(0));
        assert_eq!((balance.breaker(), balance.last_failure()), (Breaker::Closed, None));
        assert!(matches!(balance.pick(now, None), Pick::Address(_)));
    }

    #[test]
    fn connects_from_before_a_failure_allow_no_second_probe() {
        let mut balance = balance_of(Policy::RoundRobin, 1);
        for _ in 0..3 {
            assert!(matches!(balance.pick(at(0), None), Pick::Address(_)));
        }
        let retry = balance.fail_connect(at(0), remote(0));
        assert_eq!(balance.pick(retry, None), Pick::Probing);
        balance.handle_abandoned(remote(0));
        assert_eq!(balance.pick(retry, None), Pick::Probing);
        balance.handle_abandoned(remote(0));
        assert!(matches!(balance.pick(retry, None), Pick::Address(_)));
    }

    #[test]
    fn one_address_is_never_weighed_or_ejected_by_timeouts() {
        for policy in Policy::ALL {
            let mut balance = balance_of(policy, 1);
            balance.time_out(at(0), remote(0), 100);
            assert_eq!(balance.breaker(), Breaker::Closed);
            balance.eject(at(0), remote(0));
            assert_eq!(balance.asks(at(0), Some(1)), [Choice::Any]);
            assert!(balance.may_serve(at(0), Some(1), remote(0)));
        }
    }

    #[test]
    fn a_failed_resolution_keeps_the_last_good_addresses() {
        let mut balance = Balance::new(LIMITS, 1);
        assert_eq!(balance.pick(at(0), None), Pick::Unresolved);
        assert_eq!(balance.fail_fast(at(0)), None);
        balance.handle_resolved(vec![]);
        assert_eq!(balance.fail_fast(at(0)), Some(Reason::Unresolved));
        balance.handle_resolved(vec![remote(0)]);
        assert_eq!((balance.fail_fast(at(0)), balance.last_failure()), (None, None));
        assert_eq!(balance.handle_resolved(vec![]), []);
        assert!(balance.has(remote(0)));
    }

    // Several addresses: failures.

    #[test]
    fn an_ejected_address_gets_nothing_until_its_trial_and_returns_by_a_useful_exchange() {
        for policy in Policy::ALL {
            let mut balance = balance_of(policy, 3);
            let retry = balance.eject(at(0), remote(1));
            assert_eq!(balance.states(), [Breaker::Closed, Breaker::Open, Breaker::Closed]);
            assert_eq!(balance.breaker(), Breaker::Closed);
            for key in 0..100 {
                assert_ne!(balance.connect(at(0), Some(key)), Some(remote(1)));
                assert!(!balance.asks(at(0), Some(key)).contains(&Choice::To(remote(1))));
                assert!(!balance.may_serve(at(0), Some(key), remote(1)));
            }
            let is_asked = |balance: &mut Balance, key| {
                balance.asks(retry, key).contains(&Choice::To(remote(1)))
            };
            let key = (0..100).map(Some).find(|key| is_asked(&mut balance, *key)).unwrap();
            assert_eq!(balance.pick(retry, key), Pick::Address(remote(1)), "the fewest");
            assert!(!is_asked(&mut balance, key), "a probe is under way");
            balance.handle_connected(remote(1));
            assert!(balance.may_serve(retry, key, remote(1)), "the trial");
            balance.handle_dispatched(remote(1));
            assert!(!balance.may_serve(retry, key, remote(1)), "one at a time");
            balance.handle_request_end(remote(1));
            balance.handle_useful(remote(1));
            assert!(balance.may_serve(retry, key, remote(1)));
            assert_eq!(balance.states(), [Breaker::Closed; 3]);
        }
    }

    #[test]
    fn requests_fail_fast_only_when_every_address_is_ejected_and_none_may_be_tried() {
        let mut balance = balance_of(Policy::RoundRobin, 2);
        let first = balance.eject(at(0), remote(0));
        assert_eq!(balance.fail_fast(at(0)), None);
        balance.handle_failure(at(0), remote(1), Reason::ConnectTimeout);
        assert_eq!(balance.breaker(), Breaker::Closed);
        balance.handle_failure(at(0), remote(1), Reason::ConnectTimeout);
        balance.handle_failure(at(1), remote(1), Reason::ConnectTimeout);
        assert_eq!(balance.breaker(), Breaker::Open);
        assert_eq!(balance.fail_fast(at(0)), Some(Reason::ConnectTimeout), "the latest");
        let earliest = first.min(balance.of(remote(1)).failing.unwrap().retry_at);
        assert_eq!(balance.pick(at(0), None), Pick::NotBefore(earliest));
        assert_eq!(balance.fail_fast(earliest), None);
        assert!(matches!(balance.pick(earliest, None), Pick::Address(_)));
        assert_eq!(balance.breaker(), Breaker::HalfOpen);
        assert!(balance.may_serve(at(0), Some(1), remote(0)), "a connection that is up will do");
    }

    #[test]
    fn nobody_counts_on_a_connect_in_doubt_while_another_address_is_well() {
        let mut balance = balance_of(Policy::RoundRobin, 2);
        let retry = balance.fail_connect(at(0), remote(0));
        balance.connect(at(0), None);
        assert_eq!(balance.pick(retry, None), Pick::Address(remote(0)));
        assert_eq!(balance.doubtful_connects(), 1);
        balance.handle_failure(at(0), remote(1), Reason::PeerReset);
        assert_eq!(balance.doubtful_connects(), 0, "there is nothing better");
    }

    // Several addresses: timeouts.

    #[test]
    fn timeouts_in_a_row_eject_and_one_slow_request_does_not() {
        for (breaker_failures, enough) in [(1, 2), (2, 2), (3, 3)] {
            let limits = BalanceLimits { breaker_failures, ..LIMITS };
            let mut balance = Balance::new(limits, 1);
            balance.handle_resolved(vec![remote(0), remote(1)]);
            for _ in 0..10 {
                balance.time_out(at(0), remote(0), enough - 1);
                assert_eq!(balance.states(), [Breaker::Closed; 2]);
                balance.handle_useful(remote(0));
            }
            balance.time_out(at(0), remote(0), enough);
            assert_eq!(balance.states(), [Breaker::Open, Breaker::Closed]);
            assert_eq!(balance.last_failure(), Some(Reason::RequestTimeout));
        }
    }

    #[test]
    fn a_trial_that_times_out_ejects_again_and_late_timeouts_prolong_nothing() {
        let mut balance = balance_of(Policy::RoundRobin, 2);
        balance.time_out(at(0), remote(0), 3);
        let failing = balance.of(remote(0)).failing.unwrap();
        balance.time_out(at(0), remote(0), 50);
        let retry = balance.of(remote(0)).failing.unwrap().retry_at;
        assert_eq!(retry, failing.retry_at);
        balance.time_out(retry, remote(0), 1);
        let again = balance.of(remote(0)).failing.unwrap();
        assert_eq!((again.in_a_row, again.failed_at), (4, retry));
    }

    #[test]
    fn timeouts_never_eject_the_last_closed_address() {
        let mut balance = balance_of(Policy::RoundRobin, 3);
        for last in [0, 1, 2, 2, 1, 0] {
            balance.time_out(at(0), remote(last), 20);
        }
        assert_eq!(balance.states(), [Breaker::Open, Breaker::Open, Breaker::Closed]);
        balance.eject(at(1), remote(2));
        assert_eq!(balance.states(), [Breaker::Closed, Breaker::Closed, Breaker::Open]);
    }

    #[test]
    fn what_was_only_slow_returns_when_the_last_closed_address_is_resolved_no_more() {
        let mut balance = balance_of(Policy::RoundRobin, 2);
        balance.time_out(at(0), remote(0), 3);
        assert_eq!(balance.handle_resolved(vec![remote(0)]), [remote(1)]);
        assert_eq!(balance.states(), [Breaker::Closed]);
    }

    // Policy.

    #[test]
    fn policies_have_distinct_names() {
        let names = Policy::ALL.map(|policy| policy.to_string());
        assert_eq!(names, ["round-robin", "least-outstanding", "hash"]);
    }

    #[test]
    fn connections_spread_evenly_and_replace_what_ended() {
        for policy in [Policy::RoundRobin, Policy::LeastOutstanding] {
            let mut balance = balance_of(policy, 3);
            (0..30).for_each(|_| assert!(balance.connect(at(0), Some(5)).is_some()));
            let conns = |balance: &Balance| balance.health().map(|h| h.conns).collect::<Vec<_>>();
            assert_eq!(conns(&balance), [10, 10, 10]);
            (0..5).for_each(|_| balance.handle_ended(remote(2)));
            (0..5).for_each(|_| assert_eq!(balance.connect(at(0), None), Some(remote(2))));
            assert_eq!(conns(&balance), [10, 10, 10]);
        }
    }

    #[test]
    fn the_first_turn_is_anywhere() {
        let first = |seed| {
            let mut balance = Balance::new(LIMITS, seed);
            balance.handle_resolved((0..4).map(remote).collect());
            balance.connect(at(0), None).unwrap()
        };
        for last in 0..4 {
            let count = (0..400).filter(|seed| first(*seed) == remote(last)).count();
            assert!((60..=140).contains(&count), "{last}: {count} of 400");
        }
    }

    #[test]
    fn addresses_take_turns_and_those_without_a_free_connection_are_passed_over() {
        let mut balance = balance_of(Policy::RoundRobin, 3);
        let mut counts = [0; 3];
        for _ in 0..30 {
            let chosen = balance.chosen(at(0), None);
            (0..3).for_each(|last| {
                counts[last] += usize::from(chosen == Choice::To(remote(last as u8)))
            });
        }
        assert_eq!(counts, [10, 10, 10]);
        let not_second = |choice| (choice != Choice::To(remote(1))).then_some(choice);
        let chosen: Vec<_> =
            (0..4).map(|_| balance.choose(at(0), None, not_second).unwrap()).collect();
        assert_eq!((chosen[0], chosen[1]), (chosen[2], chosen[3]));
        assert_ne!(chosen[0], chosen[1]);
        assert_eq!(balance.asks(at(0), None).len(), 3, "each once");
    }

    #[test]
    fn the_fewest_outstanding_requests_win_and_ties_go_by_turn() {
        let mut balance = balance_of(Policy::LeastOutstanding, 3);
        for (last, count) in [(0, 2), (1, 0), (2, 1)] {
            (0..count).for_each(|_| balance.handle_dispatched(remote(last)));
        }
        let order = [1, 2, 0].map(|last| Choice::To(remote(last)));
        assert_eq!(balance.asks(at(0), None), order);
        balance.handle_request_end(remote(0));
        balance.handle_dispatched(remote(1));
        let mut chosen: Vec<_> = (0..3).map(|_| balance.chosen(at(0), None)).collect();
        chosen.sort_by_key(|choice| *choice != order[2]);
        chosen.dedup();
        assert_eq!(chosen.len(), 3, "all are equal: each has its turn");
    }

    #[test]
    fn a_session_keeps_to_its_address_and_the_loss_of_one_moves_only_its_sessions() {
        let mut balance = balance_of(Policy::Hash, 5);
        let sessions = 0..10_000u64;
        let homes = |balance: &mut Balance| -> Vec<Choice> {
            sessions.clone().map(|key| balance.chosen(at(0), Some(key))).collect()
        };
        let before = homes(&mut balance);
        for last in 0..5 {
            let count = before.iter().filter(|home| **home == Choice::To(remote(last))).count();
            assert!((1_800..=2_200).contains(&count), "{last}: {count}");
        }
        let lost = Choice::To(remote(2));
        let moved_only_lost = |after: &[Choice]| {
            before.iter().zip(after).all(|(b, a)| (a == b) == (*b != lost) && *a != lost)
        };
        balance.eject(at(0), remote(2));
        assert!(moved_only_lost(&homes(&mut balance)));
        balance.handle_useful(remote(2));
        assert_eq!(homes(&mut balance), before);
        balance.handle_resolved([0, 1, 3, 4].map(remote).to_vec());
        assert!(moved_only_lost(&homes(&mut balance)));
        balance.handle_resolved((0..5).map(remote).collect());
        assert_eq!(homes(&mut balance), before, "it is back");
        for key in sessions.clone().take(100) {
            let Choice::To(home) = before[key as usize] else { panic!("several addresses") };
            assert_eq!(balance.connect(at(0), Some(key)), Some(home));
            assert!(
                (0..5)
                    .all(|l| balance.may_serve(at(0), Some(key), remote(l)) == (remote(l) == home))
            );
        }
    }

    #[test]
    fn a_session_waits_for_its_own_address_to_end_a_short_backoff() {
        let mut balance = balance_of(Policy::Hash, 3);
        let Choice::To(home) = balance.chosen(at(0), Some(7)) else { panic!("several addresses") };
        let retry = balance.fail_connect(at(0), home);
        assert_eq!(balance.pick(at(0), Some(7)), Pick::NotBefore(retry));
        assert!(balance.connect(at(0), None).is_some_and(|other| other != home));
    }

    // Resolution.

    #[test]
    fn addresses_that_stay_keep_their_health_and_those_that_go_are_named_once() {
        let mut balance = balance_of(Policy::RoundRobin, 2);
        balance.eject(at(0), remote(1));
        let [b, c] = [1, 2].map(remote);
        assert_eq!(balance.handle_resolved(vec![c, b, c]), [remote(0)]);
        assert_eq!(balance.states(), [Breaker::Open, Breaker::Closed]);
        assert!(!balance.has(remote(0)) && balance.has(b) && balance.has(c));
        assert!(!balance.may_serve(at(0), None, remote(0)));
        assert_eq!(balance.handle_resolved(vec![b, c]), []);
    }

    #[test]
    fn an_address_that_returns_has_the_counts_of_its_old_connections() {
        let mut balance = balance_of(Policy::RoundRobin, 2);
        while balance.of(remote(0)).conns < 2 {
            balance.connect(at(0), None);
        }
        balance.handle_dispatched(remote(0));
        balance.handle_resolved(vec![remote(1)]);
        balance.handle_ended(remote(0));
        balance.handle_resolved(vec![remote(0)]);
        assert_eq!((balance.of(remote(0)).conns, balance.of(remote(0)).outstanding), (1, 1));
        balance.handle_resolved(vec![remote(2)]);
        balance.handle_ended(remote(0));
        balance.handle_request_end(remote(0));
        assert!(balance.departed.iter().all(|address| address.remote != remote(0)), "forgotten");
    }

    #[test]
    fn too_many_addresses_are_cut_so_that_those_that_are_here_stay() {
        let mut balance = balance_of(Policy::RoundRobin, 0);
        balance.handle_resolved((100..=200).rev().map(remote).collect());
        let kept = |balance: &Balance| balance.health().map(|h| h.remote).collect::<Vec<_>>();
        let first = kept(&balance);
        assert_eq!(first, (100..164).map(remote).collect::<Vec<_>>());
        assert_eq!(balance.handle_resolved((0..=255).map(remote).collect()), []);
        assert_eq!(kept(&balance), first);
        assert_eq!(balance.handle_resolved((102..=250).map(remote).collect()).len(), 2);
        assert_eq!(kept(&balance), (102..166).map(remote).collect::<Vec<_>>());
    }

    /// U15: one hundred pools lose their upstream at the same moment, and have it again 30 s later.
    #[test]
    fn reconnects_of_many_pools_spread_over_time_and_end_within_five_seconds() {
        const OUTAGE_MS: u64 = 30_000;
        let mut attempts = Vec::new();
        for seed in 0..100 {
            let mut balance = Balance::new(LIMITS, seed);
            balance.handle_resolved(vec![remote(0), remote(1)]);
            let (a, b) = (remote(0), remote(1));
            [a, b].iter().for_each(|lost| balance.handle_failure(at(0), *lost, Reason::PeerReset));
            for ms in 0.. {
                match balance.pick(at(ms), None) {
                    Pick::Address(_) if ms >= OUTAGE_MS => {
                        assert!(ms <= OUTAGE_MS + 5_000, "{ms}");
                        attempts.push(ms);
                        break;
                    }
                    Pick::Address(remote) => {
                        attempts.push(ms);
                        balance.fail_connect(at(ms), remote);
                    }
                    Pick::NotBefore(_) | Pick::Probing | Pick::Unresolved => {}
                }
            }
        }
        let within =
            |start: u64| attempts.iter().filter(move |ms| (start..start + 1_000).contains(ms));
        let most = (0..35_000).step_by(50).map(|start| within(start).count()).max().unwrap();
        assert!(most * 5 <= attempts.len(), "{most} of {}", attempts.len());
    }

    // A model: whatever happens, each promise holds.

    #[derive(Debug, Clone)]
    enum Op {
        Pick { key: Option<u64> },
        Settle { index: usize, is_up: bool },
        Break { last: u8 },
        End { index: usize },
        Dispatch { index: usize },
        Finish { index: usize, is_useful: bool },
        Resolve { lasts: Vec<u8> },
        Pass { ms: u64 },
    }

    fn any_op() -> impl Strategy<Value = Op> {
        let index = 0usize..8;
        prop_oneof![
            5 => proptest::option::of(0u64..6).prop_map(|key| Op::Pick { key }),
            4 => (index.clone(), any::<bool>())
                .prop_map(|(index, is_up)| Op::Settle { index, is_up }),
            1 => (0u8..4).prop_map(|last| Op::Break { last }),
            1 => index.clone().prop_map(|index| Op::End { index }),
            4 => index.clone().prop_map(|index| Op::Dispatch { index }),
            4 => (index, proptest::bool::weighted(0.3))
                .prop_map(|(index, is_useful)| Op::Finish { index, is_useful }),
            1 => subsequence(vec![0u8, 1, 2, 3], 0..=4).prop_map(|lasts| Op::Resolve { lasts }),
            2 => prop_oneof![Just(1), Just(60), Just(400), Just(3_000)]
                .prop_map(|ms| Op::Pass { ms }),
        ]
    }

    /// What the pool knows, and what was promised to it.
    #[derive(Default)]
    struct Model {
        connecting: Vec<SocketAddr>,
        up: Vec<SocketAddr>,
        requests: Vec<SocketAddr>,
        /// Failures in a row of each address, and until when it rests.
        failing: BTreeMap<SocketAddr, (u32, Time)>,
    }

    fn count(of: &[SocketAddr], remote: SocketAddr) -> usize {
        of.iter().filter(|other| **other == remote).count()
    }

    fn take(from: &mut Vec<SocketAddr>, index: usize) -> Option<SocketAddr> {
        (!from.is_empty()).then(|| from.remove(index % from.len()))
    }

    impl Model {
        /// A failure was reported; the pause is within its bounds.
        fn fail(&mut self, balance: &Balance, now: Time, remote: SocketAddr) {
            let Some(address) = balance.addresses.iter().find(|a| a.remote == remote) else {
                return;
            };
            let failing = address.failing.unwrap();
            let doublings = (failing.in_a_row - 1).min(16);
            let ceiling = LIMITS.backoff_base.saturating_mul(1 << doublings);
            assert!(failing.retry_at >= now);
            assert!(failing.retry_at.since(now) <= ceiling.min(LIMITS.backoff_max));
            let before = self.failing.get(&remote).map_or(0, |(in_a_row, _)| *in_a_row);
            assert_eq!(failing.in_a_row, before + 1);
            assert_eq!(failing.is_ejected, failing.in_a_row >= LIMITS.breaker_failures);
            self.failing.insert(remote, (failing.in_a_row, failing.retry_at));
        }

        fn may_connect(&self, now: Time, remote: SocketAddr) -> bool {
            let is_alone = count(&self.connecting, remote) == 0;
            self.failing.get(&remote).is_none_or(|(_, retry_at)| *retry_at <= now && is_alone)
        }
    }

    fn take_step(balance: &mut Balance, model: &mut Model, now: &mut Time, op: Op) {
        let was_closed = balance.is_any_closed();
        let is_health_news = match op {
            Op::Settle { is_up, .. } => !is_up,
            Op::Finish { is_useful, .. } => !is_useful,
            Op::Break { .. } | Op::Resolve { .. } => true,
            Op::Pick { .. } | Op::End { .. } | Op::Dispatch { .. } | Op::Pass { .. } => false,
        };
        match op {
            Op::Pick { key } => match balance.pick(*now, key) {
                Pick::Address(remote) => {
                    assert!(balance.has(remote));
                    assert!(model.may_connect(*now, remote), "{remote} rests or is probed");
                    model.connecting.push(remote);
                }
                Pick::NotBefore(retry_at) => assert!(retry_at > *now),
                Pick::Probing => assert!(!model.connecting.is_empty()),
                Pick::Unresolved => assert!(balance.addresses.is_empty()),
            },
            Op::Settle { index, is_up } => {
                let Some(remote) = take(&mut model.connecting, index) else { return };
                if is_up {
                    balance.handle_connected(remote);
                    model.up.push(remote);
                } else {
                    balance.handle_failure(*now, remote, Reason::ConnectRefused);
                    model.fail(balance, *now, remote);
                    balance.handle_abandoned(remote);
                }
            }
            Op::Break { last } => {
                balance.handle_failure(*now, remote(last), Reason::PeerReset);
                model.fail(balance, *now, remote(last));
            }
            Op::End { index } => {
                if let Some(remote) = take(&mut model.up, index) {
                    balance.handle_ended(remote);
                }
            }
            Op::Dispatch { index } => {
                if let Some(remote) = model.up.get(index % model.up.len().max(1)) {
                    balance.handle_dispatched(*remote);
                    model.requests.push(*remote);
                }
            }
            Op::Finish { index, is_useful } => {
                let Some(remote) = take(&mut model.requests, index) else { return };
                balance.handle_request_end(remote);
                if is_useful {
                    balance.handle_useful(remote);
                    model.failing.remove(&remote);
                } else {
                    balance.handle_request_timeout(*now, remote);
                    assert!(!was_closed || balance.is_any_closed(), "the last one");
                }
            }
            Op::Resolve { lasts } => {
                let before: Vec<_> = balance.health().map(|health| health.remote).collect();
                let gone = balance.handle_resolved(lasts.iter().copied().map(remote).collect());
                for remote in before {
                    assert_eq!(gone.contains(&remote), !balance.has(remote));
                }
            }
            Op::Pass { ms } => *now = *now + Duration::from_millis(ms),
        }
        let failing = |address: &Address| {
            let failing = address.failing?;
            Some((address.remote, (failing.in_a_row, failing.retry_at)))
        };
        let actual: BTreeMap<_, _> = balance.addresses.iter().filter_map(failing).collect();
        if is_health_news {
            // Ejections by timeouts, those that return, and health that went with its address.
            model.failing = actual;
        } else {
            assert_eq!(model.failing, actual, "health changes only by news of it");
        }
    }

    proptest! {
        #[test]
        fn every_promise_holds_whatever_happens(
            policy in proptest::sample::select(&Policy::ALL[..]),
            seed in any::<u64>(),
            ops in vec(any_op(), 0..120),
        ) {
            let mut balance = Balance::new(BalanceLimits { policy, ..LIMITS }, seed);
            let (mut model, mut now) = (Model::default(), at(1));
            balance.handle_resolved((0..3).map(remote).collect());
            for op in ops {
                take_step(&mut balance, &mut model, &mut now, op);
                for health in balance.health() {
                    let conns = count(&model.connecting, health.remote) + count(&model.up, health.remote);
                    prop_assert_eq!(health.conns, conns);
                    prop_assert_eq!(health.outstanding, count(&model.requests, health.remote));
                }
                let is_slow = |h: &Health| h.last_failure == Some(Reason::RequestTimeout);
                if !balance.is_any_closed() {
                    prop_assert!(!balance.health().any(|health| is_slow(&health)));
                    prop_assert_ne!(balance.breaker(), Breaker::Closed);
                } else {
                    prop_assert_eq!(balance.fail_fast(now), None);
                    // Somebody may always be asked, and no one who rests.
                    let asked = balance.asks(now, Some(1));
                    prop_assert!(!asked.is_empty());
                    for choice in asked {
                        let Choice::To(remote) = choice else { continue };
                        prop_assert!(balance.may_serve(now, Some(1), remote));
                        prop_assert!(balance.of(remote).is_eligible(now));
                    }
                }
                let well = balance.health().find(|health| health.last_failure.is_none());
                if let Some(well) = well {
                    prop_assert!(model.may_connect(now, well.remote));
                }
            }
        }
    }
}
