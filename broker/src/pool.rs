//! The connections of one upstream: which there are, what each does, who waits for one.
//!
//! ```text
//!                    connect                    request, or bytes to send
//!   (wanted) ---> Connecting ---> Idle <-----------------------------------> InUse
//!                     |           ^ |     replies complete, or all bytes sent   |
//!                     |   release | | lease                                     |
//!                     |           | v                                  timeout, |
//!                     |          Leased        idle_timeout, lifetime   broken  |
//!                     | failed     |    (one_way TCP: Draining first)           |
//!                     v            v                                            v
//!                  Closing <----------------- Draining <------------- (UDP: retired behind the
//!                     |                          late_reply_window     filter, else closed)
//!                     v
//!                  (closed)
//! ```
//!
//! A state is a place and [`Pool::move_to`] is the only way between two. Every ending has a
//! [`Reason`]. A connection returns to `Idle` only when every exchange on it is complete. An
//! exclusive one (`pipeline_depth = 1`) whose exchange did not complete is closed, or kept bound and
//! deaf until a late reply can no longer come; one that carries several requests keeps a slot for
//! the reply that nobody awaits any more ([`crate::inflight`]).
//!
//! The pool is pure: it is told what happened (`handle_*`), asked for things (`request`, `stage`
//! and `accept`), and says what to do (`poll_action`) and when to call again (`next_deadline`).
//! It sees counts, lengths and ids, never a byte, a socket or a clock.
//!
//! One-way messages go by *lanes*, each a queue with a connection of its own. Every source has one
//! lane for its life, so its messages keep their order whatever happens to connections.
//!
//! This file has what a pool is asked and told; how it decides is in `pool/exchange.rs`,
//! `pool/one_way.rs`, `pool/leases.rs`, `pool/places.rs`, `pool/shares.rs` and
//! `pool/waiters.rs`.

mod exchange;
mod leases;
mod one_way;
mod places;
mod shares;
mod turns;
mod waiters;

use std::collections::VecDeque;
use std::net::SocketAddr;

use poolbroker_proto::address::Protocol;
use poolbroker_proto::reason::Reason;
use slotmap::{Key, SlotMap};

use self::exchange::RetryBudget;
use self::leases::Leases;
pub use self::leases::Lend;
use self::one_way::Lane;
use self::places::Places;
use self::turns::Turns;
use self::waiters::Waiters;
use crate::balance::{Balance, BalanceLimits, Breaker, Health, Policy};
use crate::coalesce::Coalescer;
use crate::config::LIFETIME_JITTER_PERCENT;
use crate::config::UpstreamLimits;
use crate::ids::{ConnId, LeaseId, RequestId, SourceId};
use crate::inflight::{InFlight, Matching, Owner, Slot};
use crate::outbox::{Leaving, Outbox};
use crate::stats::{Ledger, RequestCounts, RequestEnd, Settled, Tally};
use crate::tagged::Tag;
use crate::timers::{Deadlines, Time};

/// What a connection does for its whole life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Requests, whose replies are matched.
    Exchange,
    /// Sends; whatever comes back is read, discarded and counted.
    OneWay {
        /// Whose messages.
        lane: usize,
    },
}

impl Role {
    /// As `status` prints it.
    pub const fn name(self) -> &'static str {
        match self {
            Role::Exchange => "exchange",
            Role::OneWay { .. } => "one_way",
        }
    }

    /// The lane of a one-way connection.
    pub const fn lane(self) -> Option<usize> {
        match self {
            Role::Exchange => None,
            Role::OneWay { lane } => Some(lane),
        }
    }
}

/// Where a connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// The connect is under way.
    Connecting,
    /// Nothing to do since then.
    Idle {
        /// Since when.
        since: Time,
    },
    /// It carries requests, or has bytes to send.
    InUse,
    /// It is lent to a session.
    Leased {
        /// Which lease.
        lease: LeaseId,
        /// When the lease ends in any case.
        until: Time,
    },
    /// It takes nothing new: a one-way TCP connection read to its end, or a retired UDP socket.
    Draining {
        /// When it is closed in any case.
        until: Time,
        /// Why it drains.
        reason: Reason,
    },
    /// The shard was told to close it.
    Closing {
        /// Why.
        reason: Reason,
    },
}

impl State {
    /// As `status` prints it.
    pub const fn name(self) -> &'static str {
        match self {
            State::Connecting => "connecting",
            State::Idle { .. } => "idle",
            State::InUse => "in_use",
            State::Leased { .. } => "leased",
            State::Draining { .. } => "draining",
            State::Closing { .. } => "closing",
        }
    }
}

/// The pool's record of a connection.
#[derive(Debug)]
pub struct Conn {
    /// What it does.
    pub role: Role,
    /// Where it goes.
    pub remote: SocketAddr,
    /// Where it is.
    pub state: State,
    /// When its connect began.
    pub opened_at: Time,
    /// Requests or runs it has carried.
    pub uses: u64,
    /// Messages sent.
    pub messages_out: u64,
    /// Bytes sent, with framing.
    pub bytes_out: u64,
    /// Replies delivered.
    pub messages_in: u64,
    /// Bytes received, with framing.
    pub bytes_in: u64,
    /// Replies that nobody had asked for.
    pub replies_discarded: u64,
    expires_at: Option<Time>,
    scheduled_at: Option<Time>,
    /// It takes nothing new and is closed, for this reason, once nobody awaits a reply on it.
    retiring: Option<Reason>,
    /// Among those in use that have room for another request.
    is_listed: bool,
    /// The user to whom it was lent, who may have kept a copy.
    lent_to: Option<u32>,
}

impl Conn {
    /// Whether it rests.
    pub fn is_at_rest(&self) -> bool {
        matches!(self.state, State::Idle { .. })
    }

    /// Whether somebody borrowed it, now or before.
    pub fn was_lent(&self) -> bool {
        self.lent_to.is_some()
    }

    fn is_making_room(&self) -> bool {
        self.retiring == Some(Reason::MakeRoom) && self.is_open()
    }

    fn is_open(&self) -> bool {
        match self.state {
            State::Idle { .. } | State::InUse | State::Leased { .. } => true,
            State::Connecting | State::Draining { .. } | State::Closing { .. } => false,
        }
    }
}

/// Whether a byte of a request that failed can have left, by its last connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Left {
    /// No.
    Nothing,
    /// Yes.
    Something,
    /// That depends on how much of its slot was written. If nothing was, it is to be taken back:
    /// [`Pool::handle_unsent`].
    SeeSlot {
        /// On this connection.
        conn: ConnId,
        /// Which slot.
        tag: Tag,
    },
}

/// What the shard is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Open a connection.
    Connect {
        /// Its id from now on.
        conn: ConnId,
        /// What it will do.
        role: Role,
        /// Where to.
        remote: SocketAddr,
    },
    /// Write a waiting request to a connection.
    Dispatch {
        /// Where to.
        conn: ConnId,
        /// Which.
        request: RequestId,
        /// By what its reply is known.
        tag: Tag,
    },
    /// Send a request again.
    Resend {
        /// On this connection.
        conn: ConnId,
        /// Which slot.
        tag: Tag,
    },
    /// The reply of a slot is not expected any more.
    Forget {
        /// On this connection.
        conn: ConnId,
        /// Which slot.
        tag: Tag,
    },
    /// Check a connection and pass it on, unless the lease has ended; if it is broken,
    /// [`Pool::handle_lost`], and if nobody is there, [`Pool::handle_unlendable`].
    Lend {
        /// Which.
        conn: ConnId,
        /// By which lease.
        lease: LeaseId,
        /// To whom.
        owner: Owner,
    },
    /// Tell a session that it gets no lease.
    RefuseLease {
        /// Who.
        owner: Owner,
        /// Why.
        reason: Reason,
    },
    /// Shut a lent connection down, so that copies of it are of no use.
    Revoke {
        /// Which.
        conn: ConnId,
    },
    /// Tell the owner that its request ended without a reply, and forget its body.
    Fail {
        /// Which.
        request: RequestId,
        /// Whose.
        owner: Owner,
        /// How; never `Replied`.
        end: RequestEnd,
        /// Whether a byte of it can have left by where it is.
        left: Left,
        /// It was sent by a connection that was lost, and may have been carried out, whatever
        /// became of it since.
        was_sent_before: bool,
    },
    /// Stop sending, read to the end, then report the connection lost.
    Drain {
        /// Which.
        conn: ConnId,
    },
    /// Attach the drop filter; keep the socket bound.
    Retire {
        /// Which.
        conn: ConnId,
    },
    /// Close, then call [`Pool::handle_closed`].
    Close {
        /// Which.
        conn: ConnId,
        /// Why.
        reason: Reason,
    },
    /// Remove bytes from a send buffer: their messages were given up.
    Discard {
        /// Of this lane.
        lane: usize,
        /// Where they begin.
        skip: usize,
        /// How many they are.
        bytes: usize,
    },
    /// Tell a source how some of its accepted messages ended.
    Settle {
        /// Whose.
        source: SourceId,
        /// How.
        settled: Settled,
        /// How many.
        messages: u64,
    },
}

/// What becomes of a request at first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Acquire {
    /// Write it to this connection.
    Granted {
        /// Its id.
        request: RequestId,
        /// Where to.
        conn: ConnId,
        /// By what its reply is known.
        tag: Tag,
    },
    /// Keep its body: it waits.
    Queued {
        /// Its id.
        request: RequestId,
    },
    /// It ended; it was never sent.
    Refused(Reason),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Timer {
    Conn(ConnId),
    Request(RequestId),
    Lease(LeaseId),
    Outbox { lane: usize },
    Retry,
}

/// What a pool must know of its upstream.
#[derive(Debug, Clone)]
pub struct PoolSettings {
    /// The protocol type.
    pub protocol: Protocol,
    /// The limits.
    pub limits: UpstreamLimits,
    /// How connections and requests are spread over the addresses.
    pub policy: Policy,
    /// Why requests are refused, if they are.
    pub requests_refused: Option<Reason>,
    /// Why leases are refused, if they are.
    pub leases_refused: Option<Reason>,
    /// How replies find their requests.
    pub matching: Matching,
    /// A request may be repeated though it was sent.
    pub is_idempotent: bool,
    /// How one-way messages are packed into datagrams, if they are.
    pub coalescer: Option<Coalescer>,
    /// Seed of the jitter.
    pub seed: u64,
}

/// The connections of one upstream. See the module's text.
#[derive(Debug)]
pub struct Pool {
    settings: PoolSettings,
    conns: SlotMap<ConnId, Conn>,
    places: Places,
    /// Exchange connections in `Idle`; the last used is at the end and is used first.
    idle: Vec<ConnId>,
    /// Exchange connections in `Idle` that were lent; the last one returned is at the end.
    returned: Vec<ConnId>,
    /// Exchange connections in `InUse` that can carry one more request, to be used in turn. Empty
    /// where a connection carries one at a time.
    with_room: VecDeque<ConnId>,
    waiters: Waiters,
    /// Of those, and of whoever waits for a lease.
    turns: Turns,
    leases: Leases,
    retry_budget: RetryBudget,
    in_flight: InFlight,
    /// At least one.
    lanes: Vec<Lane>,
    /// Of all lanes.
    unsent_bytes: usize,
    /// A lane may have nothing to send any more though its connection does not rest.
    has_emptied: bool,
    balance: Balance,
    retry_scheduled_at: Option<Time>,
    deadlines: Deadlines<Timer>,
    actions: VecDeque<Action>,
    leaving: Vec<Leaving>,
    closing_down: bool,
    /// The one-way messages.
    pub ledger: Ledger,
    /// The requests.
    pub counts: RequestCounts,
    /// Connections opened so far.
    pub opened: u64,
    /// Connections closed so far.
    pub closed: Tally,
    /// Requests that were put on another connection though they had been sent.
    pub retried: u64,
    /// Datagrams sent again for want of a reply.
    pub retransmitted: u64,
    /// Replies discarded on connections that are closed now.
    replies_discarded_before: u64,
}

impl Pool {
    /// A pool without connections or addresses.
    pub fn new(settings: PoolSettings) -> Self {
        let limits = &settings.limits;
        let balance_limits = BalanceLimits {
            policy: settings.policy,
            breaker_failures: limits.breaker_failures,
            backoff_base: limits.backoff_base,
            backoff_max: limits.backoff_max,
        };
        // The kernel doubles SO_SNDBUF and holds no more unacknowledged bytes than that.
        let window_bytes_max = match settings.protocol {
            Protocol::Tcp => limits.send_buffer_bytes.saturating_mul(4),
            Protocol::Udp | Protocol::UdpWriteOnly => 0,
        };
        Pool {
            conns: SlotMap::with_key(),
            places: Places::default(),
            idle: Vec::new(),
            returned: Vec::new(),
            with_room: VecDeque::new(),
            waiters: Waiters::new(),
            turns: Turns::default(),
            leases: Leases::default(),
            retry_budget: RetryBudget::new(limits.retry_budget_percent),
            in_flight: InFlight::new(settings.matching, settings.seed),
            lanes: (0..limits.one_way_connections.max(1))
                .map(|_| Lane::new(Outbox::new(window_bytes_max, settings.coalescer.clone())))
                .collect(),
            unsent_bytes: 0,
            has_emptied: false,
            balance: Balance::new(balance_limits, settings.seed),
            retry_scheduled_at: None,
            deadlines: Deadlines::new(),
            actions: VecDeque::new(),
            leaving: Vec::new(),
            closing_down: false,
            ledger: Ledger::default(),
            counts: RequestCounts::default(),
            opened: 0,
            closed: Tally::default(),
            retried: 0,
            retransmitted: 0,
            replies_discarded_before: 0,
            settings,
        }
    }

    // What there is.

    /// The connections.
    pub fn conns(&self) -> impl Iterator<Item = (ConnId, &Conn)> {
        self.conns.iter()
    }

    /// The record of a connection, to add to its counts.
    pub fn conn_mut(&mut self, conn: ConnId) -> Option<&mut Conn> {
        self.conns.get_mut(conn)
    }

    /// The record of a connection.
    pub fn conn(&self, conn: ConnId) -> Option<&Conn> {
        self.conns.get(conn)
    }

    /// How the addresses fare that connections go to.
    pub fn health(&self) -> impl Iterator<Item = Health> {
        self.balance.health()
    }

    /// Where the breaker stands: closed while any connection is up.
    pub fn breaker(&self) -> Breaker {
        if self.places.open > self.places.connecting {
            return Breaker::Closed;
        }
        self.balance.breaker()
    }

    /// The reason of the last failure since the last success.
    pub fn last_failure(&self) -> Option<Reason> {
        self.balance.last_failure()
    }

    /// Replies discarded so far.
    pub fn replies_discarded(&self) -> u64 {
        let now = self.conns.values().map(|conn| conn.replies_discarded).sum::<u64>();
        self.replies_discarded_before + now
    }

    /// One-way messages without an outcome.
    pub fn queued(&self) -> u64 {
        self.lanes.iter().map(|lane| lane.outbox.queued()).sum()
    }

    /// Requests that have not ended.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Requests that wait for a connection.
    pub fn waiters(&self) -> usize {
        self.waiters.len()
    }

    /// Since when somebody waits.
    pub fn oldest_waiter(&self) -> Option<Time> {
        let oldest = self.waiters.oldest().filter_map(|request| self.in_flight.get(request));
        oldest.map(|request| request.asked_at).min()
    }

    /// The slot of a connection with that tag.
    pub fn slot(&self, conn: ConnId, tag: Tag) -> Option<&Slot> {
        self.in_flight.slot(conn, tag)
    }

    /// Who awaits the reply of a slot.
    pub fn awaiting(&self, slot: &Slot) -> Option<Owner> {
        self.in_flight.get(slot.request?).map(|request| request.owner)
    }

    /// Who holds a connection: the first who awaits a reply on it, or to whom it is lent.
    pub fn holder(&self, conn: ConnId) -> Option<Owner> {
        match self.conns.get(conn)?.state {
            State::Leased { lease, .. } => self.lease_owner(lease),
            _ => {
                let slots = self.in_flight.slots_on(conn);
                slots.into_iter().find_map(|(_, slot)| self.awaiting(slot))
            }
        }
    }

    /// How many lanes there are.
    pub fn lane_count(&self) -> usize {
        self.lanes.len()
    }

    /// The lane of a source's one-way messages: the same one for its life, and neighbours have
    /// different ones.
    pub fn lane_of(&self, source: SourceId) -> usize {
        // The lower half of a key is its index in the table of sources.
        let [low @ .., _, _, _, _] = source.data().as_ffi().to_le_bytes();
        u32::from_le_bytes(low) as usize % self.lanes.len()
    }

    /// The queue of a lane.
    pub fn outbox(&self, lane: usize) -> &Outbox {
        &self.lanes[lane].outbox
    }

    /// The connection of a lane, if it is up and there is something to send.
    pub fn sending_conn(&self, lane: usize) -> Option<ConnId> {
        let conn = self.lanes[lane].conn?;
        matches!(self.conns.get(conn)?.state, State::InUse).then_some(conn)
    }

    /// Whether nothing is queued and nothing in flight.
    pub fn is_settled(&self) -> bool {
        self.lanes.iter().all(|lane| lane.outbox.is_empty()) && self.in_flight.len() == 0
    }

    /// The next thing to do.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// Whether [`Pool::poll_action`] has one.
    pub fn has_actions(&self) -> bool {
        !self.actions.is_empty()
    }

    /// When to call [`Pool::handle_timeout`].
    pub fn next_deadline(&self) -> Option<Time> {
        let datagrams = self.lanes.iter().filter_map(|lane| lane.outbox.datagram_due());
        self.deadlines.next_deadline().into_iter().chain(datagrams).min()
    }

    // Commands.

    /// Counts a request that is refused before it needs a connection.
    pub fn refuse_request(&mut self, reason: Reason) {
        self.counts.requests += 1;
        self.counts.end(RequestEnd::Refused(reason));
    }

    /// Asks for a connection for one exchange; `is_last` says that the connection ends with it.
    pub fn request(
        &mut self,
        now: Time,
        owner: Owner,
        caller_deadline: Option<Time>,
        is_last: bool,
    ) -> Acquire {
        self.counts.requests += 1;
        if let Some(reason) = self.settings.requests_refused {
            return self.refuse(reason);
        }
        let wait = now + self.settings.limits.wait_timeout;
        let deadline = earliest(wait, caller_deadline);
        self.retry_budget.handle_request();
        if let Some(conn) = self.select(now, owner) {
            let request = self.in_flight.insert(owner, now, caller_deadline, is_last, deadline);
            if let Some(tag) = self.grant(now, request, conn) {
                // In order also with what is still to be carried out.
                let is_first = self.actions.is_empty();
                self.connect_to_left_out(now);
                if is_first {
                    return Acquire::Granted { request, conn, tag };
                }
                self.actions.push_back(Action::Dispatch { conn, request, tag });
                return Acquire::Queued { request };
            }
        }
        if self.places.exchange == self.places.connecting_exchange
            && let Some(reason) = self.balance.fail_fast(now)
        {
            return self.refuse(reason);
        }
        let waiters_max = self.settings.limits.waiters_max;
        if self.waiters.len() >= waiters_max {
            // Nobody is shut out by a user who takes all there is. There are more where a connection
            // was lost: they go first.
            let way = self.waiters.makes_way_for(owner.uid);
            let Some(other) = way.filter(|_| self.waiters.len() == waiters_max) else {
                if waiters_max == 0 {
                    self.connect_for_next(now);
                }
                return self.refuse(Reason::WaitersFull);
            };
            self.end_request(now, other, RequestEnd::Refused(Reason::WaitersFull));
        }
        let request = self.in_flight.insert(owner, now, caller_deadline, is_last, deadline);
        self.deadlines.insert(deadline, Timer::Request(request));
        self.line_up(now);
        let came = self.turns.begin(owner.uid);
        self.waiters.push(request, owner.uid, came, self.line_of(now, request));
        self.want_connections(now);
        Acquire::Queued { request }
    }

    /// The owner of a request went away: its reply, if one comes, belongs to nobody.
    pub fn cancel(&mut self, now: Time, request: RequestId) {
        self.end_request(now, request, RequestEnd::Failed(Reason::ClientGone));
    }

    /// Whether one more one-way message of `bytes` fits. An empty queue takes any message.
    pub fn has_room(&self, bytes: usize) -> bool {
        self.unsent_bytes == 0 || self.unsent_bytes + bytes <= self.settings.limits.queue_bytes_max
    }

    /// Whether enough was sent that blocked sources should be read again.
    pub fn has_room_again(&self) -> bool {
        self.unsent_bytes <= self.settings.limits.queue_bytes_max / 2
    }

    /// Adds one one-way message, with framing, to the run of a lane that [`Pool::accept`] ends.
    pub fn stage(&mut self, lane: usize, bytes: usize) {
        self.lanes[lane].outbox.stage(bytes);
        self.unsent_bytes += bytes;
    }

    /// Accepts the staged messages of `source`; how many they are.
    pub fn accept(&mut self, now: Time, source: SourceId) -> u64 {
        let lane = self.lane_of(source);
        let Lane { outbox, conn, .. } = &mut self.lanes[lane];
        let was_empty = outbox.is_empty();
        let messages = outbox.accept(now, source);
        let conn = *conn;
        self.ledger.accepted += messages;
        if was_empty && messages > 0 {
            self.schedule_outbox(lane);
            match conn {
                Some(conn) => self.use_one_way(lane, conn),
                None => self.want_connections(now),
            }
        }
        self.rest_emptied(now);
        messages
    }

    /// Accepts and drops `messages` that do not get into the queue.
    pub fn drop_unqueued(&mut self, messages: u64, reason: Reason) {
        self.ledger.accepted += messages;
        self.ledger.settle(Settled::Dropped(reason), messages);
    }

    /// Drops the message that waited longest of all lanes and is not partly written, if there is
    /// one: its lane, where its bytes begin in the send buffer, and how many they are.
    pub fn drop_oldest(&mut self) -> Option<(usize, usize, usize)> {
        let oldest = |(index, lane): (usize, &Lane)| Some((lane.outbox.oldest_whole()?, index));
        let (_, lane) = self.lanes.iter().enumerate().filter_map(oldest).min()?;
        let (skip, bytes) = self.take_oldest(lane, 1);
        self.settle(Settled::Dropped(Reason::QueueFull));
        self.has_emptied |= self.lanes[lane].outbox.is_empty();
        Some((lane, skip, bytes))
    }

    /// From now on no one-way message waits for others to share its datagram.
    pub fn hurry(&mut self) {
        self.lanes.iter_mut().for_each(|lane| lane.outbox.hurry());
    }

    /// Brings the lanes up to this moment, before anything of them is sent: datagrams that waited
    /// long enough for more messages are ready, and a lane that [`Pool::drop_oldest`] has emptied
    /// rests.
    pub fn catch_up(&mut self, now: Time) {
        self.lanes.iter_mut().for_each(|lane| lane.outbox.close_due(now));
        self.rest_emptied(now);
    }

    /// Opens nothing new for its own sake any more, and closes what is idle.
    pub fn close_down(&mut self, now: Time) {
        self.closing_down = true;
        self.hurry();
        let exchanges = self.conns.iter().filter(|(_, record)| record.role == Role::Exchange);
        let is_unused = |conn: &Conn| match conn.state {
            State::Connecting | State::Idle { .. } => true,
            State::InUse | State::Leased { .. } => false,
            State::Draining { .. } | State::Closing { .. } => true,
        };
        let unused = exchanges.filter(|(_, record)| is_unused(record));
        for conn in unused.map(|(conn, _)| conn).collect::<Vec<_>>() {
            self.close(conn, Reason::Drained);
        }
        self.stop_lending();
        for lane in 0..self.lanes.len() {
            if let Lane { conn: Some(conn), outbox, .. } = &self.lanes[lane]
                && outbox.is_empty()
            {
                self.finish_one_way(now, *conn, Reason::Drained);
            }
        }
    }

    /// Gives up everything that is queued or in flight. A message that is partly written goes
    /// only after its connection was closed: call again until [`Pool::is_settled`].
    pub fn abandon(&mut self, now: Time, reason: Reason) {
        for lane in 0..self.lanes.len() {
            if self.lanes[lane].outbox.is_front_torn()
                && let Some(conn) = self.lanes[lane].conn
            {
                self.close(conn, reason);
            }
            self.give_up(lane, u64::MAX, Settled::Dropped(reason));
            self.rest_one_way(now, lane);
        }
        for request in self.in_flight.ids() {
            self.end_request(now, request, RequestEnd::Failed(reason));
        }
    }

    // Events.

    /// The upstream's name was resolved, or not (no addresses).
    pub fn handle_resolved(&mut self, now: Time, addresses: Vec<SocketAddr>) {
        for remote in self.balance.handle_resolved(addresses) {
            self.leave_address(now, remote);
        }
        self.serve_waiters(now);
        self.fail_waiters_if_down(now);
        self.want_connections(now);
    }

    /// A connection is up.
    pub fn handle_connected(&mut self, now: Time, conn: ConnId) {
        let Some(record) = self.conns.get(conn).filter(|r| r.state == State::Connecting) else {
            return;
        };
        let (remote, role) = (record.remote, record.role);
        self.balance.handle_connected(remote);
        self.opened += 1;
        let lifetime = self.settings.limits.lifetime;
        let expires_at = (!lifetime.is_zero())
            .then(|| now + self.balance.jittered(lifetime, LIFETIME_JITTER_PERCENT));
        let Some(record) = self.conns.get_mut(conn) else {
            return;
        };
        record.expires_at = expires_at;
        match role {
            Role::Exchange => self.free(now, conn),
            Role::OneWay { lane } => {
                self.move_to(conn, State::Idle { since: now });
                self.use_one_way(lane, conn);
            }
        }
        // A datagram socket is up whoever is there. What is sent one-way brings no better news, and
        // with one address there is no better choice.
        let is_proof = role != Role::Exchange || self.balance.health().count() == 1;
        if self.settings.protocol != Protocol::Tcp && is_proof {
            self.balance.handle_useful(remote);
        }
        self.want_connections(now);
    }

    /// A connection could not be opened.
    pub fn handle_connect_failed(&mut self, now: Time, conn: ConnId, reason: Reason) {
        if let Some(record) = self.conns.get(conn) {
            self.balance.handle_failure(now, record.remote, reason);
        }
        self.close(conn, reason);
        // Their address may be another one now.
        self.serve_waiters(now);
        self.fail_waiters_if_down(now);
        self.want_connections(now);
    }

    /// The reply of a slot is complete: who awaits it. One that cannot be delivered fails its
    /// request; the exchange is complete all the same.
    pub fn handle_reply(
        &mut self,
        now: Time,
        conn: ConnId,
        tag: Tag,
        is_deliverable: bool,
    ) -> Option<Owner> {
        let slot = self.in_flight.take(conn, tag)?;
        let owner = self.awaiting(&slot);
        if let Some(record) = self.conns.get_mut(conn) {
            self.balance.handle_useful(record.remote);
            record.messages_in += u64::from(owner.is_some());
            record.replies_discarded += u64::from(owner.is_none());
        }
        if let Some(request) = slot.request {
            if is_deliverable {
                self.in_flight.remove(request, None);
                self.count_request_end(conn);
                self.counts.end(RequestEnd::Replied);
            } else {
                let end = RequestEnd::Failed(Reason::ReplyUndeliverable);
                self.fail(now, request, end, Left::Something);
            }
        }
        self.free(now, conn);
        // What waited for the backoff to pass need not wait any more.
        self.want_connections(now);
        owner.filter(|_| is_deliverable)
    }

    /// The upstream closes the connection behind the reply that came last, or is coming.
    pub fn handle_last_reply(&mut self, conn: ConnId) {
        self.retire(conn, Reason::ReplyEndsConnection);
    }

    /// No byte of a slot was written, and none will be.
    pub fn handle_unsent(&mut self, now: Time, conn: ConnId, tag: Tag) {
        if self.in_flight.take(conn, tag).is_some() {
            self.free(now, conn);
        }
    }

    /// A connection cannot be used any more. The first `begun` of its slots left at least in part;
    /// the requests of the others may use another connection.
    pub fn handle_lost(&mut self, now: Time, conn: ConnId, reason: Reason, begun: usize) {
        let Some(record) = self.conns.get(conn) else {
            return;
        };
        let (opened_at, role, messages_in) = (record.opened_at, record.role, record.messages_in);
        let remote = record.remote;
        match record.state {
            State::Closing { .. } => return,
            State::Draining { reason, .. } => {
                // A retired UDP socket keeps its port whatever comes.
                if self.settings.protocol == Protocol::Tcp {
                    self.close(conn, reason);
                }
                return;
            }
            State::Connecting => return self.handle_connect_failed(now, conn, reason),
            State::Leased { lease, .. } => self.lend_again(lease),
            State::Idle { .. } | State::InUse => {}
        }
        let short_lived = now.since(opened_at) < self.settings.limits.backoff_max;
        let useless = match role {
            Role::Exchange => messages_in == 0 && short_lived,
            Role::OneWay { .. } => short_lived,
        };
        // Whoever borrowed a connection can make it look as it likes.
        if !self.conns.get(conn).is_some_and(Conn::was_lent) {
            match useless {
                true => self.balance.handle_failure(now, remote, reason),
                false => self.balance.handle_useful(remote),
            }
        }
        self.give_back(now, conn, reason, begun);
        if reason == Reason::Unsolicited && self.settings.protocol == Protocol::Udp {
            // A reply too many: others may follow, and must not reach the port's next user.
            self.taint(now, conn, reason);
        } else {
            self.close(conn, reason);
        }
        self.serve_waiters(now);
        self.serve_lease_waiters(now);
        self.fail_waiters_if_down(now);
        self.want_connections(now);
    }

    /// The shard has closed a connection; `unacknowledged` bytes of those written to it had not
    /// reached the peer's kernel.
    pub fn handle_closed(&mut self, now: Time, conn: ConnId, unacknowledged: usize) {
        let Some(record) = self.conns.get(conn) else {
            return;
        };
        let reason = match record.state {
            State::Closing { reason } => reason,
            State::Connecting
            | State::Idle { .. }
            | State::InUse
            | State::Leased { .. }
            | State::Draining { .. } => Reason::Internal,
        };
        let lane = record.role.lane();
        if let Some(lane) = lane.filter(|_| self.settings.protocol == Protocol::Tcp) {
            let outbox = &mut self.lanes[lane].outbox;
            outbox.handle_connection_end(unacknowledged, &mut self.leaving);
            self.settle(Settled::InDoubt);
        }
        self.forget(conn, reason);
        if let Some(lane) = lane {
            self.schedule_outbox(lane);
        }
        self.want_connections(now);
    }

    /// `bytes` of a lane were written to its TCP connection: how many bytes of its send buffer are
    /// done with.
    pub fn handle_written(&mut self, now: Time, conn: ConnId, bytes: usize) -> usize {
        let Some(lane) = self.lane_on(conn) else { return 0 };
        let complete = self.lanes[lane].outbox.handle_written(bytes, &mut self.leaving);
        self.unsent_bytes -= complete;
        self.sent(now, lane, conn, bytes);
        complete
    }

    /// The first `datagrams` of a lane were sent: how many bytes of its send buffer are done with.
    pub fn handle_sent(&mut self, now: Time, conn: ConnId, datagrams: usize) -> usize {
        let Some(lane) = self.lane_on(conn) else { return 0 };
        let bytes = self.lanes[lane].outbox.handle_sent(datagrams, &mut self.leaving);
        self.unsent_bytes -= bytes;
        self.sent(now, lane, conn, bytes);
        bytes
    }

    /// The first datagram of a lane cannot be sent: how many bytes of its send buffer are done
    /// with.
    pub fn handle_unsendable(&mut self, now: Time, conn: ConnId, reason: Reason) -> usize {
        let Some(lane) = self.lane_on(conn) else { return 0 };
        let messages = self.lanes[lane].outbox.front_datagram_messages();
        let (_, bytes) = self.take_oldest(lane, messages);
        self.settle(Settled::Dropped(reason));
        self.rest_one_way(now, lane);
        bytes
    }

    /// A deadline has come.
    pub fn handle_timeout(&mut self, now: Time) {
        self.catch_up(now);
        while let Some(timer) = self.deadlines.pop_due(now) {
            match timer {
                Timer::Conn(conn) => {
                    if let Some(record) = self.conns.get_mut(conn) {
                        record.scheduled_at = None;
                        self.handle_conn_due(now, conn);
                    }
                }
                Timer::Request(request) => self.handle_wait_over(now, request),
                Timer::Lease(lease) => self.handle_lease_wait_over(now, lease),
                Timer::Outbox { lane } => {
                    self.lanes[lane].scheduled_at = None;
                    self.expire(now, lane);
                }
                Timer::Retry => {
                    self.retry_scheduled_at = None;
                    // An ejected address may be tried by a connection that is there.
                    self.serve_waiters(now);
                    self.want_connections(now);
                }
            }
        }
    }
}

fn earliest(limit: Time, caller_deadline: Option<Time>) -> Time {
    caller_deadline.map_or(limit, |deadline| deadline.min(limit))
}

#[cfg(test)]
mod tests;
