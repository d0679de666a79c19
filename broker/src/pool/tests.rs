//! The promises of the pool, a test each, and what holds whatever happens.
//!
//! [`World`] plays the shard: it owns the clock and what stands for sockets, carries out every
//! action at once, and keeps books of its own about each request, message and connection.
//! [`World::check`] compares them with the pool's.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;

use super::*;
use crate::config::Overflow;
use crate::inflight::Place;

/// How often timers may come due anew at one moment before that is a busy loop.
const TIMER_ROUNDS_MAX: usize = 4;

/// One byte of a one-way message: which, where in it, and whether it is the last.
#[derive(Debug, Clone, Copy)]
struct Byte {
    message: u64,
    offset: usize,
    is_last: bool,
}

/// What stands for a socket.
#[derive(Debug)]
struct Socket {
    role: Role,
    is_up: bool,
    carries: Option<RequestId>,
    /// An exchange on it did not complete.
    is_spoiled: bool,
    /// Every one-way byte written to it.
    stream: Vec<Byte>,
}

#[derive(Debug)]
struct World {
    pool: Pool,
    now: Time,
    /// Whether UDP sockets can be opened; a TCP connect ends when a test says so.
    opens_sockets: bool,
    /// Bytes that are not acknowledged when a connection ends, if that many were written.
    unacknowledged_max: usize,
    sockets: BTreeMap<ConnId, Socket>,
    closes: BTreeMap<ConnId, Reason>,
    asks: u64,
    /// Requests that have not ended: whose, and on which connection.
    asked: BTreeMap<RequestId, (Owner, Option<ConnId>)>,
    /// How requests ended, and whether they were sent.
    ends: BTreeMap<RequestId, (RequestEnd, bool)>,
    refused: u64,
    messages: u64,
    /// The send buffer of each lane.
    unsent: Vec<VecDeque<Byte>>,
    ledgers: BTreeMap<SourceId, Ledger>,
}

impl World {
    fn new(protocol: Protocol, limits: UpstreamLimits) -> Self {
        World::coalescing(protocol, limits, None)
    }

    fn coalescing(
        protocol: Protocol,
        limits: UpstreamLimits,
        coalescer: Option<Coalescer>,
    ) -> Self {
        let is_write_only = protocol == Protocol::UdpWriteOnly;
        let requests_refused = is_write_only.then_some(Reason::WriteOnly);
        let mut sources: SlotMap<SourceId, ()> = SlotMap::with_key();
        let unsent = vec![VecDeque::new(); limits.one_way_connections];
        let settings = PoolSettings { protocol, limits, requests_refused, coalescer, seed: 1 };
        let mut world = World {
            pool: Pool::new(settings),
            now: Time::default() + ms(1_000),
            opens_sockets: true,
            unacknowledged_max: 0,
            sockets: BTreeMap::new(),
            closes: BTreeMap::new(),
            asks: 0,
            asked: BTreeMap::new(),
            ends: BTreeMap::new(),
            refused: 0,
            messages: 0,
            unsent,
            ledgers: (0..3).map(|_| (sources.insert(()), Ledger::default())).collect(),
        };
        world.resolve();
        world
    }

    fn is_tcp(&self) -> bool {
        self.pool.settings.protocol == Protocol::Tcp
    }

    fn resolve(&mut self) {
        self.pool.handle_resolved(self.now, vec![([127, 0, 0, 1], 1).into()]);
        self.carry_out();
    }

    fn source(&self, index: usize) -> SourceId {
        *self.ledgers.keys().nth(index % self.ledgers.len()).unwrap()
    }

    fn close_down(&mut self) {
        self.pool.close_down(self.now);
        self.carry_out();
    }

    // Requests.

    fn ask_as(&mut self, source: SourceId, patience: Option<u64>) -> Result<RequestId, Reason> {
        self.asks += 1;
        let owner = Owner { source, correlation: self.asks };
        let deadline = patience.map(|milliseconds| self.now + ms(milliseconds));
        let answer = match self.pool.request(self.now, owner, deadline) {
            Acquire::Granted { request, conn } => {
                self.asked.insert(request, (owner, None));
                self.put(request, conn);
                Ok(request)
            }
            Acquire::Queued { request } => {
                self.asked.insert(request, (owner, None));
                assert!(self.pool.waiters() <= self.pool.settings.limits.waiters_max);
                Ok(request)
            }
            Acquire::Refused(reason) => {
                self.refused += 1;
                Err(reason)
            }
        };
        self.carry_out();
        answer
    }

    fn ask(&mut self) -> RequestId {
        self.ask_as(self.source(0), None).unwrap()
    }

    fn ask_times(&mut self, count: usize) -> Vec<RequestId> {
        (0..count).map(|_| self.ask()).collect()
    }

    /// Asks where something is idle.
    fn take(&mut self) -> ConnId {
        let request = self.ask();
        self.on(request).unwrap()
    }

    /// A request is written to a connection.
    fn put(&mut self, request: RequestId, conn: ConnId) {
        let (_, on) = self.asked.get_mut(&request).expect("it has not ended");
        assert_eq!(on.replace(conn), None, "it is on one connection at a time");
        let socket = self.sockets.get_mut(&conn).expect("it is open");
        assert!(socket.role == Role::Exchange && socket.is_up && !socket.is_spoiled);
        assert_eq!(socket.carries.replace(request), None, "matching is exclusive");
    }

    fn on(&self, request: RequestId) -> Option<ConnId> {
        self.asked.get(&request).and_then(|(_, on)| *on)
    }

    fn cancel(&mut self, request: RequestId) {
        self.pool.cancel(self.now, request);
        self.carry_out();
        assert!(self.ends.contains_key(&request));
    }

    fn reply(&mut self, conn: ConnId) {
        self.receive(conn, After::Nothing, true);
    }

    fn receive(&mut self, conn: ConnId, after: After, is_deliverable: bool) {
        let socket = self.sockets.get_mut(&conn).expect("it is open");
        let carried = socket.carries.take();
        if socket.role == Role::Exchange && carried.is_none() {
            return self.lose(conn, Reason::Unsolicited, false);
        }
        socket.is_spoiled |= after == After::Surplus;
        let reply = self.pool.handle_reply(self.now, conn, after, is_deliverable);
        let owner = carried.map(|request| self.asked[&request].0).filter(|_| is_deliverable);
        assert_eq!(reply, owner, "to the one who asked here");
        if let Some(request) = carried.filter(|_| is_deliverable) {
            self.end(request, RequestEnd::Replied, true);
        }
        self.carry_out();
    }

    fn end(&mut self, request: RequestId, end: RequestEnd, was_sent: bool) {
        let (_, on) = self.asked.remove(&request).expect("it ends once");
        assert_eq!(on.is_some(), was_sent);
        self.ends.insert(request, (end, was_sent));
        if let Some(socket) = on.and_then(|conn| self.sockets.get_mut(&conn)) {
            socket.is_spoiled |= socket.carries.take().is_some();
        }
    }

    // One-way messages.

    fn send(&mut self, lens: &[usize]) {
        self.send_as(self.source(0), lens);
    }

    fn send_as(&mut self, source: SourceId, lens: &[usize]) {
        lens.iter().for_each(|len| self.append(source, *len));
        self.accept(source);
    }

    fn append(&mut self, source: SourceId, len: usize) {
        self.messages += 1;
        let message = self.messages;
        let byte = |offset| Byte { message, offset, is_last: offset + 1 == len };
        let lane = self.pool.lane_of(source);
        self.unsent[lane].extend((0..len).map(byte));
        self.pool.stage(lane, len);
    }

    fn accept(&mut self, source: SourceId) {
        let accepted = self.pool.accept(self.now, source);
        self.ledgers.get_mut(&source).unwrap().accepted += accepted;
        self.carry_out();
    }

    /// As `push` of the shard does.
    fn send_or(&mut self, overflow: Overflow, source: SourceId, len: usize) {
        while !self.pool.has_room(len) {
            let is_oldest = overflow == Overflow::DropOldest;
            let dropped = is_oldest.then(|| self.pool.drop_oldest()).flatten();
            let Some((lane, skip, bytes)) = dropped else {
                self.pool.drop_unqueued(1, Reason::QueueFull);
                let ledger = self.ledgers.get_mut(&source).unwrap();
                ledger.accepted += 1;
                ledger.settle(Settled::Dropped(Reason::QueueFull), 1);
                self.pool.catch_up(self.now);
                return self.carry_out();
            };
            self.unsent[lane].drain(skip..skip + bytes);
            self.carry_out();
        }
        self.append(source, len);
        self.accept(source);
    }

    /// The kernel takes that many bytes (TCP) or datagrams (UDP) if there are.
    fn write(&mut self, count: usize) {
        self.write_by(0, count);
    }

    fn write_by(&mut self, lane: usize, count: usize) {
        let Some(conn) = self.pool.sending_conn(lane) else {
            return;
        };
        assert_eq!(self.sockets[&conn].role, Role::OneWay { lane });
        let (outbox, unsent) = (self.pool.outbox(lane), &self.unsent[lane]);
        let done = if self.is_tcp() {
            let unwritten = outbox.front_written()..unsent.len();
            let bytes = count.min(unwritten.len());
            let stream = &mut self.sockets.get_mut(&conn).expect("it is open").stream;
            for byte in unsent.range(unwritten).take(bytes) {
                match stream.last().filter(|last| !last.is_last) {
                    Some(last) => assert_eq!(byte.offset, last.offset + 1, "the same goes on"),
                    None => assert_eq!(byte.offset, 0, "a message starts at its first byte"),
                }
                assert!(stream.last().is_none_or(|last| last.message <= byte.message), "in order");
                stream.push(*byte);
            }
            self.pool.handle_written(self.now, conn, bytes)
        } else {
            let datagrams = outbox.next_datagrams(&mut [0; 64]).min(count);
            self.pool.handle_sent(self.now, conn, datagrams)
        };
        self.unsent[lane].drain(..done);
        self.carry_out();
    }

    /// The kernel will never take the first datagram.
    fn refuse_datagram(&mut self, lane: usize) {
        if let Some(conn) = self.pool.sending_conn(lane) {
            let done = self.pool.handle_unsendable(self.now, conn, Reason::TooBig);
            self.unsent[lane].drain(..done);
            self.carry_out();
        }
    }

    // Connections.

    fn state(&self, conn: ConnId) -> State {
        self.pool.conn(conn).expect("it is open").state
    }

    fn pick(&self, index: usize, wanted: impl Fn(&Socket, State) -> bool) -> Option<ConnId> {
        let found = self.sockets.iter().filter(|(conn, s)| wanted(s, self.state(**conn)));
        let found: Vec<_> = found.map(|(conn, _)| *conn).collect();
        (!found.is_empty()).then(|| found[index % found.len()])
    }

    fn connecting(&self, index: usize) -> Option<ConnId> {
        self.pick(index, |_, state| state == State::Connecting)
    }

    /// The first of the connects under way succeeds.
    fn connect(&mut self) -> ConnId {
        let conn = self.connecting(0).unwrap();
        self.finish_connect(conn, true);
        conn
    }

    fn finish_connect(&mut self, conn: ConnId, succeeds: bool) {
        if succeeds {
            self.sockets.get_mut(&conn).expect("it is open").is_up = true;
            self.pool.handle_connected(self.now, conn);
        } else {
            self.pool.handle_connect_failed(self.now, conn, Reason::ConnectRefused);
        }
        self.carry_out();
    }

    /// New connections that have carried a request each; the last one is freed last.
    fn idle_conns(&mut self, count: usize) -> Vec<ConnId> {
        self.ask_times(count);
        let conns: Vec<_> = (0..count).map(|_| self.connect()).collect();
        conns.iter().for_each(|conn| self.reply(*conn));
        conns
    }

    fn lose(&mut self, conn: ConnId, reason: Reason, untouched: bool) {
        let socket = self.sockets.get_mut(&conn).expect("it is open");
        socket.is_spoiled = true;
        if untouched && let Some(request) = socket.carries.take() {
            self.asked.get_mut(&request).expect("it has not ended").1 = None;
        }
        self.pool.handle_lost(self.now, conn, reason, untouched);
        self.carry_out();
    }

    // Time and actions.

    /// A turn of the loop, so much later.
    fn jump(&mut self, wait: Duration) {
        self.now = self.now + wait;
        for _ in 0..TIMER_ROUNDS_MAX {
            self.pool.handle_timeout(self.now);
            assert!(self.pool.next_deadline().is_none_or(|at| at > self.now), "a busy loop");
            self.carry_out();
            if self.pool.next_deadline().is_none_or(|at| at > self.now) {
                return;
            }
        }
        panic!("timers come due again and again");
    }

    /// Time passes with a turn at every deadline.
    fn pass(&mut self, milliseconds: u64) {
        let end = self.now + ms(milliseconds);
        while let Some(at) = self.pool.next_deadline().filter(|at| *at <= end) {
            self.jump(at.since(self.now));
        }
        self.jump(end.since(self.now));
    }

    fn carry_out(&mut self) {
        while let Some(action) = self.pool.poll_action() {
            match action {
                Action::Connect { conn, role, .. } => {
                    if let Role::OneWay { .. } = role {
                        let is_same = |socket: &Socket| socket.role == role;
                        assert!(!self.sockets.values().any(is_same), "one after the other");
                    }
                    let (is_up, is_spoiled, carries, stream) = (false, false, None, Vec::new());
                    let socket = Socket { role, is_up, carries, is_spoiled, stream };
                    assert!(self.sockets.insert(conn, socket).is_none());
                    if !self.is_tcp() {
                        self.finish_connect(conn, self.opens_sockets);
                    }
                }
                Action::Dispatch { conn, request } => self.put(request, conn),
                Action::Fail { request, owner, end, was_sent } => {
                    assert_eq!(owner, self.asked[&request].0);
                    self.end(request, end, was_sent);
                }
                Action::Drain { conn } => {
                    let socket = &self.sockets[&conn];
                    assert!(self.is_tcp() && socket.is_up && socket.role != Role::Exchange);
                }
                Action::Retire { conn } => {
                    assert!(!self.is_tcp() && self.sockets[&conn].role == Role::Exchange);
                }
                Action::Close { conn, reason } => self.close(conn, reason),
                Action::Discard { lane, skip, bytes } => {
                    self.unsent[lane].drain(skip..skip + bytes);
                }
                Action::Settle { source, settled, messages } => {
                    self.ledgers.get_mut(&source).unwrap().settle(settled, messages);
                }
            }
        }
    }

    fn close(&mut self, conn: ConnId, reason: Reason) {
        let socket = self.sockets.remove(&conn).expect("it is closed once");
        assert_eq!(socket.carries, None, "its request has ended or moved on");
        self.closes.insert(conn, reason);
        let unacknowledged = self.unacknowledged_max.min(socket.stream.len());
        let lost = &socket.stream[socket.stream.len() - unacknowledged..];
        let doubtful = lost.iter().filter(|byte| byte.is_last).count() as u64;
        let before = self.pool.ledger.in_doubt;
        self.pool.handle_closed(self.now, conn, unacknowledged);
        assert_eq!(self.pool.ledger.in_doubt - before, doubtful, "of those sent on {conn:?}");
    }

    // What always holds.

    fn check(&mut self) {
        self.check_sums();
        self.check_places();
        self.check_deadlines();
        self.pool.want_connections(self.now);
        assert_eq!(self.pool.poll_action(), None, "what could be begun was begun before");
    }

    fn check_sums(&self) {
        let (pool, ledger, counts) = (&self.pool, &self.pool.ledger, &self.pool.counts);
        assert_eq!(ledger.accepted, ledger.settled() + pool.queued());
        assert!(ledger.in_doubt <= ledger.sent);
        let ended =
            counts.replied + counts.timed_out + counts.refused.total() + counts.failed.total();
        assert_eq!(counts.requests, ended + pool.in_flight() as u64);
        assert_eq!((counts.requests, ended), (self.asks, self.ends.len() as u64 + self.refused));

        let ledgers = || self.ledgers.values();
        assert!(ledgers().all(|ledger| ledger.settled() <= ledger.accepted));
        assert!(ledgers().all(|ledger| ledger.in_doubt <= ledger.sent));
        assert_eq!(ledgers().map(|ledger| ledger.accepted).sum::<u64>(), ledger.accepted);
        assert_eq!(ledgers().map(Ledger::settled).sum::<u64>(), ledger.settled());
        assert_eq!(ledgers().map(|ledger| ledger.in_doubt).sum::<u64>(), ledger.in_doubt);
        let lanes = 0..pool.lane_count();
        let of_lane = |lane| pool.outbox(lane).unsent_lens().sum::<usize>();
        assert!(lanes.map(of_lane).eq(self.unsent.iter().map(VecDeque::len)));
        assert_eq!(pool.unsent_bytes, self.unsent.iter().map(VecDeque::len).sum::<usize>());

        let mut closed = Tally::default();
        self.closes.values().for_each(|reason| closed.add(*reason, 1));
        assert_eq!(pool.closed, closed);
    }

    fn check_places(&self) {
        let (pool, limits) = (&self.pool, &self.pool.settings.limits);
        assert!(pool.conns().map(|(conn, _)| conn).eq(self.sockets.keys().copied()));
        assert!(self.sockets.iter().all(|(conn, s)| pool.request_on(*conn) == s.carries));
        let is_exchange = |conn: &Conn| conn.role == Role::Exchange;
        let is_draining = |conn: &Conn| matches!(conn.state, State::Draining { .. });
        let is_idle = |conn: &Conn| matches!(conn.state, State::Idle { .. });
        let connecting = pool.conns().filter(|(_, c)| c.state == State::Connecting).count();
        let retired = pool.conns().filter(|(_, c)| is_exchange(c) && is_draining(c)).count();
        let exchange = pool.conns().filter(|(_, c)| is_exchange(c) && !is_draining(c)).count();
        let open = self.sockets.len() - retired;
        let places = pool.places;
        assert_eq!((places.open, places.connecting), (open, connecting));
        assert_eq!((places.exchange, places.retired), (exchange, retired));

        assert!(connecting <= limits.connecting_max);
        assert!(open <= limits.connections_max);
        // Each connection that is open may be retired after the last place for one was taken.
        assert!(retired + exchange < limits.retired_max + limits.connections_max);
        // A request that was admitted may have to wait again.
        assert!(pool.waiters() <= limits.waiters_max + limits.connections_max);

        let idle = pool.conns().filter(|(_, c)| is_exchange(c) && is_idle(c));
        let idle: BTreeSet<_> = idle.map(|(conn, _)| conn).collect();
        assert_eq!(idle, pool.idle.iter().copied().collect());
        assert!(idle.is_empty() || pool.waiters() == 0, "waiting beside an idle one");
        for (index, lane) in pool.lanes.iter().enumerate() {
            let conn = lane.conn.and_then(|conn| pool.conn(conn));
            assert!(conn.is_none_or(|conn| conn.role == Role::OneWay { lane: index }));
            let (rests, sends) = (conn.is_some_and(is_idle), pool.sending_conn(index).is_some());
            assert!(if lane.outbox.is_empty() { !sends } else { !rests });
            assert!(!pool.closing_down || (idle.is_empty() && !rests));
            let of_lane = pool.conns().filter(|(_, conn)| conn.role.lane() == Some(index));
            assert_eq!(of_lane.count(), lane.ending + usize::from(lane.conn.is_some()));
            assert!(lane.ending == 0 || lane.conn.is_none(), "one after the other");
        }
    }

    /// Nothing waits for ever.
    fn check_deadlines(&self) {
        let (pool, limits) = (&self.pool, &self.pool.settings.limits);
        let requests = self.asked.keys().map(|request| match pool.in_flight.get(*request) {
            Some(entry) => match entry.place {
                Place::Waiting { deadline } | Place::On { deadline, .. } => deadline,
            },
            None => panic!("{request:?} is lost"),
        });
        let conns = pool.conns().filter_map(|(conn, _)| pool.conn_due(conn));
        let outboxes = pool.lanes.iter().filter(|_| !limits.queue_timeout.is_zero());
        let oldest = outboxes.filter_map(|lane| lane.outbox.oldest());
        let expiry = oldest.map(|oldest| oldest + limits.queue_timeout);
        if let Some(first) = requests.chain(conns).chain(expiry).min() {
            assert!(pool.next_deadline().is_some_and(|next| next <= first));
        }
    }

    /// The upstream works again and answers at once, for so long at most.
    fn recover(&mut self, time_max: Duration) {
        self.opens_sockets = true;
        self.resolve();
        let end = self.now + time_max;
        while !self.pool.is_settled() {
            assert!(self.now < end, "stuck");
            while let Some(conn) = self.connecting(0) {
                self.finish_connect(conn, true);
            }
            while let Some(conn) = self.pick(0, |socket, _| socket.carries.is_some()) {
                self.reply(conn);
            }
            (0..self.unsent.len()).for_each(|lane| self.write_by(lane, usize::MAX));
            self.check();
            self.jump(ms(1));
        }
    }
}

fn ms(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

// Whatever happens.

const PROTOCOLS: &[Protocol] =
    &[Protocol::Tcp, Protocol::Tcp, Protocol::Udp, Protocol::UdpWriteOnly];

/// What may happen.
#[derive(Debug, Clone, Copy)]
enum Deed {
    Ask,
    Cancel,
    Send,
    DropNewest,
    DropOldest,
    Connect,
    Receive,
    Lose,
    Write,
    Jump,
    Resolve,
    OpenSocket,
    CloseDown,
    Abandon,
}

/// The common ones are here more often.
const DEEDS: &[Deed] = {
    use Deed::*;
    &[
        Ask, Ask, Ask, Ask, Ask, Ask, Cancel, Send, Send, Send, DropNewest, DropOldest, Connect,
        Connect, Connect, Connect, Connect, Connect, Receive, Receive, Receive, Receive, Lose,
        Lose, Write, Write, Write, Write, Jump, Jump, Jump, Jump, Resolve, OpenSocket, CloseDown,
        Abandon,
    ]
};

const LOSSES: &[Reason] = {
    use Reason::*;
    &[PeerClosed, PeerReset, ConnectRefused, ReplyTooLong, Unsolicited]
};

/// A deed: to which, how much of it, and whether it goes well.
type Step = (Deed, usize, usize, bool);

fn any_steps() -> impl Strategy<Value = Vec<Step>> {
    vec((select(DEEDS), 0usize..8, 0usize..20, prop::bool::weighted(0.8)), 0..200)
}

impl World {
    fn take_step(&mut self, (deed, index, amount, goes_well): Step) {
        let source = self.source(index);
        match deed {
            Deed::Ask => _ = self.ask_as(source, (!goes_well).then_some(amount as u64 / 4)),
            Deed::Cancel => {
                if let Some(request) = self.asked.keys().nth(index).copied() {
                    self.cancel(request);
                }
            }
            Deed::Send => {
                for len in 1 + amount / 2..=1 + amount {
                    if self.pool.has_room(len) {
                        self.append(source, len);
                    }
                }
                self.accept(source);
            }
            Deed::DropNewest => self.send_or(Overflow::DropNewest, source, 1 + amount),
            Deed::DropOldest => self.send_or(Overflow::DropOldest, source, 1 + amount),
            Deed::Connect => {
                if let Some(conn) = self.connecting(index) {
                    self.finish_connect(conn, goes_well);
                }
            }
            Deed::Receive => {
                let after = if goes_well { After::Nothing } else { After::Surplus };
                let is_open = |state| matches!(state, State::Idle { .. } | State::InUse);
                if let Some(conn) = self.pick(index, |_, state| is_open(state)) {
                    self.receive(conn, after, amount > 2);
                }
            }
            Deed::Lose => {
                self.unacknowledged_max = amount;
                let reason = LOSSES[amount % LOSSES.len()];
                // On a one-way connection everything is unsolicited, and discarded.
                let can_be = reason != Reason::Unsolicited;
                if let Some(conn) = self.pick(index, |s, _| can_be || s.role == Role::Exchange) {
                    self.lose(conn, reason, goes_well);
                }
            }
            Deed::Write if goes_well || self.is_tcp() => {
                self.write_by(index % self.unsent.len(), amount);
            }
            Deed::Write => self.refuse_datagram(index % self.unsent.len()),
            Deed::Jump => self.jump(ms(amount as u64 / 4)),
            Deed::Resolve if goes_well => self.resolve(),
            Deed::Resolve => self.pool.handle_resolved(self.now, vec![]),
            Deed::OpenSocket => self.opens_sockets = goes_well,
            Deed::CloseDown | Deed::Abandon if goes_well => {}
            Deed::CloseDown => self.pool.close_down(self.now),
            Deed::Abandon => self.pool.abandon(self.now, Reason::DrainTimeout),
        }
        self.carry_out();
    }
}

prop_compose! {
    /// Small limits and short times; waiting ends after one of `waits`.
    fn any_limits(protocol: Protocol, waits: &'static [u64])(
        lanes in 1usize..=3,
        counts in vec(0usize..5, 6),
        queue_bytes_max in 10usize..60,
        waits in vec(select(waits), 3),
        times in vec(select(&[1, 3, 10, 30, 100][..]), 7),
    ) -> UpstreamLimits {
        let connections_max = counts[1].max(1);
        let lanes_max = match protocol {
            Protocol::UdpWriteOnly => connections_max,
            Protocol::Tcp | Protocol::Udp => connections_max - 1,
        };
        UpstreamLimits {
            one_way_connections: lanes.clamp(1, lanes_max.max(1)),
            connections_min: counts[0].min(connections_max),
            connections_max,
            connecting_max: counts[2].max(1),
            waiters_max: counts[3],
            retired_max: counts[4].max(1),
            requests_per_connection_max: counts[5] as u64,
            breaker_failures: 2,
            queue_bytes_max,
            wait_timeout: ms(waits[0]),
            request_timeout: ms(waits[1]),
            queue_timeout: ms(waits[2]),
            connect_timeout: ms(times[0]),
            // The longest stands for none here.
            idle_timeout: ms(times[1] % 100),
            lifetime: ms(times[2] % 100),
            late_reply_window: ms(times[3] % 100),
            finish_timeout: ms(times[4]),
            backoff_base: ms(times[5]),
            backoff_max: ms(times[6]),
            ..UpstreamLimits::default()
        }
    }
}

/// An upstream of some protocol type, which packs its datagrams or not.
fn any_world(waits: &'static [u64]) -> impl Strategy<Value = World> {
    let packing = (0usize..=1, 5usize..30, 0u64..10, any::<bool>());
    let upstream = (select(PROTOCOLS), packing).prop_flat_map(move |(protocol, packing)| {
        (Just(protocol), any_limits(protocol, waits), Just(packing))
    });
    upstream.prop_map(|(protocol, limits, (separator_bytes, max_bytes, delay, packs))| {
        let coalescer = Coalescer::new(max_bytes, ms(delay), separator_bytes);
        let packs = packs && protocol != Protocol::Tcp;
        World::coalescing(protocol, limits, packs.then_some(coalescer))
    })
}

proptest! {
    /// See [`World::check`] and the assertions on the way there.
    #[test]
    fn the_books_agree_and_every_limit_holds_whatever_happens(
        mut world in any_world(&[1, 5, 20, 80]),
        steps in any_steps(),
    ) {
        for step in steps {
            world.take_step(step);
            world.check();
        }
        // A message that was partly written goes once its connection is closed.
        for _ in 0..2 {
            world.pool.abandon(world.now, Reason::DrainTimeout);
            world.carry_out();
        }
        prop_assert!(world.pool.is_settled() && world.asked.is_empty());
        prop_assert!(world.ledgers.values().all(|ledger| ledger.settled() == ledger.accepted));
        // The connections go too, without another word from their peers.
        world.close_down();
        world.pass(200);
        prop_assert!(world.sockets.is_empty(), "{:?}", world.sockets);
    }

    /// Whoever waits is served, and not only got rid of by a deadline.
    #[test]
    fn whatever_happened_all_are_served_soon_after_the_upstream_works_again(
        mut world in any_world(&[10_000]),
        steps in any_steps(),
    ) {
        steps.into_iter().for_each(|step| world.take_step(step));
        world.recover(ms(3_000));
    }
}

// The promises.

fn tcp(change: impl FnOnce(&mut UpstreamLimits)) -> World {
    world(Protocol::Tcp, change)
}

fn world(protocol: Protocol, change: impl FnOnce(&mut UpstreamLimits)) -> World {
    let mut limits = UpstreamLimits::of(protocol);
    change(&mut limits);
    World::new(protocol, limits)
}

#[test]
fn refuses_when_waiters_are_full() {
    let mut world = tcp(|limits| limits.waiters_max = 2);
    world.ask_times(2);
    assert_eq!(world.ask_as(world.source(0), None), Err(Reason::WaitersFull));
}

#[test]
fn a_freed_connection_serves_the_first_waiter_at_once() {
    let mut world = tcp(|limits| limits.connections_max = 1);
    let (first, second, third) = (world.ask(), world.ask(), world.ask());
    let conn = world.connect();
    assert_eq!([first, second, third].map(|r| world.on(r)), [Some(conn), None, None]);
    world.reply(conn);
    assert_eq!([first, second, third].map(|r| world.on(r)), [None, Some(conn), None]);
}

#[test]
fn idle_connections_are_reused_last_in_first_out() {
    let mut world = tcp(|_| ());
    let conns = world.idle_conns(3);
    assert_eq!([world.take(), world.take(), world.take()], [conns[2], conns[1], conns[0]]);
}

#[test]
fn never_more_connections_than_connections_max_in_both_roles() {
    let mut world = tcp(|limits| limits.connections_max = 2);
    world.send(&[1]);
    world.ask_times(2);
    let roles = [world.connect(), world.connect()].map(|conn| world.sockets[&conn].role);
    assert_eq!((roles, world.sockets.len()), ([Role::OneWay { lane: 0 }, Role::Exchange], 2));
}

#[test]
fn one_place_serves_both_roles_in_turn() {
    let mut world = tcp(|limits| limits.connections_max = 1);
    let exchange = world.idle_conns(1)[0];
    world.send(&[5]);
    assert_eq!(world.closes[&exchange], Reason::MakeRoom);
    let one_way = world.connect();
    let request = world.ask();
    world.write(5);
    // The peer has read to the end.
    world.lose(one_way, Reason::PeerClosed, false);
    assert_eq!(world.closes[&one_way], Reason::MakeRoom);
    let exchange = world.connect();
    assert_eq!(world.on(request), Some(exchange));
}

#[test]
fn a_new_connection_serves_one_waiter_before_it_makes_room() {
    let mut world = tcp(|limits| limits.connections_max = 1);
    let (first, _) = (world.ask(), world.ask());
    world.send(&[5]);
    let conn = world.connect();
    assert_eq!(world.on(first), Some(conn));
    world.reply(conn);
    assert_eq!(world.closes[&conn], Reason::MakeRoom);
}

#[test]
fn connects_in_progress_are_limited() {
    let mut world = tcp(|limits| limits.connecting_max = 2);
    world.ask_times(5);
    assert_eq!(world.sockets.len(), 2);
    world.connect();
    assert_eq!(world.sockets.len(), 3);
}

#[test]
fn a_connect_that_takes_too_long_is_given_up() {
    let mut world = tcp(|limits| limits.connect_timeout = ms(50));
    world.send(&[5]);
    let conn = world.connecting(0).unwrap();
    world.pass(50);
    assert_eq!(world.closes[&conn], Reason::ConnectTimeout);
}

#[test]
fn wait_timeout_ends_waiting_and_nothing_was_sent() {
    let mut world = tcp(|limits| limits.wait_timeout = ms(50));
    let request = world.ask();
    world.pass(49);
    assert_eq!(world.pool.waiters(), 1);
    world.pass(1);
    assert_eq!(world.ends[&request], (RequestEnd::Refused(Reason::WaitTimeout), false));
}

#[test]
fn the_deadline_of_the_caller_covers_waiting_and_exchange() {
    let mut world = tcp(|limits| limits.connections_max = 1);
    let [sent, waiting] = [(); 2].map(|()| world.ask_as(world.source(0), Some(50)).unwrap());
    world.connect();
    world.pass(50);
    assert_eq!(world.ends[&sent], (RequestEnd::TimedOut, true));
    assert_eq!(world.ends[&waiting], (RequestEnd::TimedOut, false));
}

#[test]
fn a_waiter_whose_caller_gave_up_is_not_sent() {
    let mut world = tcp(|limits| limits.connections_max = 1);
    world.idle_conns(1);
    let conn = world.take();
    let hasty = world.ask_as(world.source(0), Some(50)).unwrap();
    let patient = world.ask();
    // In one turn of the loop replies come before deadlines.
    world.now = world.now + ms(50);
    world.reply(conn);
    assert_eq!(world.ends[&hasty], (RequestEnd::TimedOut, false));
    assert_eq!(world.on(patient), Some(conn));
}

#[test]
fn a_timed_out_tcp_exchange_is_closed() {
    let mut world = tcp(|limits| limits.request_timeout = ms(50));
    let (request, conn) = (world.ask(), world.connect());
    world.pass(50);
    assert_eq!(world.ends[&request], (RequestEnd::TimedOut, true));
    assert_eq!(world.closes[&conn], Reason::RequestTimeout);
}

#[test]
fn a_timed_out_udp_socket_is_retired_until_late_replies_cannot_come() {
    let mut world = world(Protocol::Udp, |limits| limits.request_timeout = ms(50));
    let conn = world.take();
    world.pass(50);
    assert_eq!(world.pool.counts.timed_out, 1);
    world.lose(conn, Reason::PeerReset, false);
    world.pass(9_999);
    assert!(world.sockets.contains_key(&conn), "whatever comes");
    world.pass(1);
    assert_eq!(world.closes[&conn], Reason::LateReplyWindow);
}

#[test]
fn retired_sockets_are_limited() {
    let mut world = world(Protocol::Udp, |limits| limits.retired_max = 1);
    let request = world.ask();
    world.cancel(request);
    world.pass(9_000);
    let request = world.ask();
    assert_eq!((world.on(request), world.sockets.len()), (None, 1));
    world.pass(1_000);
    assert!(world.on(request).is_some());
}

#[test]
fn a_cancelled_exchange_is_never_reused() {
    let mut world = tcp(|limits| limits.connections_max = 1);
    let (cancelled, next) = (world.ask(), world.ask());
    let conn = world.connect();
    world.cancel(cancelled);
    assert_eq!(world.closes[&conn], Reason::ClientGone);
    let conn = world.connect();
    assert_eq!(world.on(next), Some(conn));
}

#[test]
fn an_untouched_request_moves_to_another_connection_and_a_touched_one_fails() {
    let mut world = tcp(|_| ());
    let conns = world.idle_conns(2);
    let request = world.ask();
    world.lose(conns[1], Reason::PeerClosed, true);
    assert_eq!(world.on(request), Some(conns[0]));
    world.lose(conns[0], Reason::PeerClosed, false);
    assert_eq!(world.ends[&request], (RequestEnd::Failed(Reason::ConnectionLost), true));
}

#[test]
fn surplus_bytes_close_the_connection() {
    let mut world = tcp(|_| ());
    let conns = world.idle_conns(2);
    let busy = world.take();
    world.receive(busy, After::Surplus, true);
    world.receive(conns[0], After::Nothing, true);
    assert!(conns.iter().all(|conn| world.closes[conn] == Reason::Unsolicited));
    assert_eq!(world.pool.counts.replied, 3);
}

#[test]
fn a_reply_that_its_owner_cannot_take_frees_the_connection_all_the_same() {
    let mut world = tcp(|_| ());
    let (request, conn) = (world.ask(), world.connect());
    world.receive(conn, After::Nothing, false);
    assert_eq!(world.ends[&request], (RequestEnd::Failed(Reason::ReplyUndeliverable), true));
    assert_eq!(world.take(), conn);
}

#[test]
fn what_comes_back_to_a_send_is_never_a_reply() {
    let mut world = tcp(|_| ());
    world.send(&[5]);
    let one_way = world.connect();
    world.write(5);
    world.ask();
    world.connect();
    world.reply(one_way);
    assert_eq!((world.pool.replies_discarded(), world.pool.in_flight()), (1, 1));
}

#[test]
fn idle_timeout_spares_the_warm_ones() {
    let mut world = tcp(|limits| limits.connections_min = 1);
    let first = world.connect();
    world.ask_times(2);
    let second = world.connect();
    world.reply(first);
    world.reply(second);
    world.pass(60_000);
    assert_eq!(world.closes, BTreeMap::from([(first, Reason::IdleTimeout)]));
    world.pass(600_000);
    assert!(world.sockets.contains_key(&second));
}

#[test]
fn a_warm_write_only_connection_stays_open() {
    let mut world = world(Protocol::UdpWriteOnly, |limits| limits.connections_min = 1);
    world.pass(600_000);
    assert_eq!((world.pool.opened, world.sockets.len()), (1, 1));
}

#[test]
fn lifetime_closes_only_when_idle() {
    let mut world = tcp(|limits| limits.lifetime = ms(100));
    let conns = world.idle_conns(2);
    world.take();
    world.pass(110);
    assert_eq!(world.closes, BTreeMap::from([(conns[0], Reason::Lifetime)]));
    world.reply(conns[1]);
    assert_eq!(world.closes[&conns[1]], Reason::Lifetime);
}

#[test]
fn a_connection_closes_after_its_last_use() {
    let mut world = tcp(|limits| limits.requests_per_connection_max = 2);
    world.idle_conns(1);
    let conn = world.take();
    world.reply(conn);
    assert_eq!(world.closes[&conn], Reason::UsesMax);
}

#[test]
fn the_breaker_opens_and_waiters_fail_with_the_cached_reason() {
    let mut world = tcp(|_| ());
    let request = world.ask();
    for _ in 0..3 {
        assert_eq!(world.pool.in_flight(), 1);
        world.pass(200);
        world.finish_connect(world.connecting(0).unwrap(), false);
    }
    let reason = Reason::ConnectRefused;
    assert_eq!(world.ends[&request], (RequestEnd::Refused(reason), false));
    assert_eq!(world.ask_as(world.source(0), None), Err(reason));
    world.pass(3_000);
    world.ask();
    assert_eq!(world.pool.breaker(), Breaker::HalfOpen);
    let conn = world.connect();
    world.reply(conn);
    assert_eq!((world.pool.breaker(), world.pool.last_failure()), (Breaker::Closed, None));
}

#[test]
fn waiters_fail_too_when_the_upstream_accepts_and_resets() {
    let mut world = tcp(|limits| limits.connections_max = 1);
    world.ask_times(4);
    for _ in 0..3 {
        world.pass(200);
        let conn = world.connect();
        world.lose(conn, Reason::PeerReset, false);
    }
    assert_eq!((world.pool.counts.failed.total(), world.pool.counts.refused.total()), (3, 1));
}

#[test]
fn an_open_breaker_spares_those_who_wait_for_a_working_connection() {
    let mut world = tcp(|limits| limits.breaker_failures = 1);
    let (_, waiting) = (world.ask(), world.ask());
    let conn = world.connect();
    world.finish_connect(world.connecting(0).unwrap(), false);
    world.resolve();
    world.reply(conn);
    assert_eq!(world.on(waiting), Some(conn));
}

#[test]
fn a_reply_ends_the_backoff_for_all_who_wait() {
    let mut world = tcp(|_| ());
    world.idle_conns(1);
    let conn = world.take();
    world.send(&[5]);
    world.finish_connect(world.connecting(0).unwrap(), false);
    assert_eq!(world.connecting(0), None);
    world.reply(conn);
    assert!(world.connecting(0).is_some());
}

#[test]
fn one_way_messages_survive_a_reconnect_in_order_from_a_message_boundary() {
    let mut world = tcp(|_| ());
    world.send(&[5, 5, 5]);
    let conn = world.connect();
    world.write(7);
    world.unacknowledged_max = 3;
    world.lose(conn, Reason::PeerReset, false);
    world.pass(100);
    let conn = world.connect();
    world.write(9);
    let messages: Vec<_> = world.sockets[&conn].stream.iter().map(|byte| byte.message).collect();
    assert_eq!(messages, [2, 2, 2, 2, 2, 3, 3, 3, 3]);
    assert_eq!((world.pool.ledger.sent, world.pool.ledger.in_doubt), (2, 1));
}

#[test]
fn a_one_way_connection_ends_before_its_successor_begins() {
    let mut world = tcp(|limits| limits.idle_timeout = ms(50));
    world.send(&[5]);
    let old = world.connect();
    world.write(5);
    world.pass(50);
    world.send(&[5]);
    assert_eq!(world.connecting(0), None);
    world.unacknowledged_max = 5;
    world.lose(old, Reason::PeerClosed, false);
    world.connect();
    world.write(5);
    assert_eq!((world.pool.ledger.sent, world.pool.ledger.in_doubt), (2, 1));
}

#[test]
fn every_source_keeps_its_lane_and_neighbours_have_different_ones() {
    let mut world = tcp(|limits| limits.one_way_connections = 2);
    let lanes = [0, 1, 2].map(|source| world.pool.lane_of(world.source(source)));
    assert!(lanes[0] != lanes[1] && lanes[0] == lanes[2], "{lanes:?}");
    let sources = [0, 1, 2].map(|source| world.source(source));
    sources.into_iter().for_each(|source| world.send_as(source, &[2, 2]));
    let conns = [world.connect(), world.connect()];
    (0..2).for_each(|lane| world.write_by(lane, 100));
    let sent = conns.map(|conn| world.pool.conn(conn).unwrap().messages_out);
    assert_eq!((sent[0] + sent[1], sent[0].max(sent[1])), (6, 4));
    world.check();
}

#[test]
fn a_lane_that_lost_its_connection_does_not_hold_up_the_others() {
    let mut world = tcp(|limits| limits.one_way_connections = 2);
    for source in [0, 1] {
        world.send_as(world.source(source), &[5, 5]);
    }
    let (broken, _) = (world.connect(), world.connect());
    let lane = world.sockets[&broken].role.lane().unwrap();
    (0..2).for_each(|lane| world.write_by(lane, 7));
    world.lose(broken, Reason::PeerReset, false);
    world.write_by(1 - lane, 3);
    assert_eq!((world.pool.ledger.sent, world.unsent[lane].len()), (3, 5));
    world.pass(100);
    let conn = world.connect();
    world.write_by(lane, 5);
    assert_eq!((world.pool.ledger.sent, world.sockets[&conn].stream[0].offset), (4, 0));
}

#[test]
fn the_queue_is_one_limit_over_all_lanes_and_the_oldest_of_all_makes_room() {
    let mut world = tcp(|limits| (limits.one_way_connections, limits.queue_bytes_max) = (2, 10));
    world.send_as(world.source(0), &[4]);
    world.pass(1);
    world.send_as(world.source(1), &[6]);
    world.pass(1);
    assert!(!world.pool.has_room(1));
    world.send_or(Overflow::DropOldest, world.source(1), 4);
    let lanes = [0, 1].map(|source| world.pool.lane_of(world.source(source)));
    let [first, second] = lanes.map(|lane| world.unsent[lane].len());
    assert_eq!((first, second), (0, 10), "that of the other lane was older");
    world.check();
}

#[test]
fn lanes_leave_a_place_for_requests() {
    let mut world = tcp(|limits| (limits.one_way_connections, limits.connections_max) = (2, 3));
    world.ask_times(3);
    let asked: Vec<_> = (0..3).map(|_| world.connect()).collect();
    [0, 1].into_iter().for_each(|source| world.send_as(world.source(source), &[1]));
    asked.iter().for_each(|conn| world.reply(*conn));
    let roles = |world: &World| {
        let is_exchange = |socket: &&Socket| socket.role == Role::Exchange;
        world.sockets.values().filter(is_exchange).count()
    };
    assert_eq!((roles(&world), world.sockets.len()), (1, 3), "two have made room");
}

#[test]
fn a_datagram_that_is_not_full_goes_after_its_delay_or_when_the_pool_closes_down() {
    let mut limits = UpstreamLimits::of(Protocol::UdpWriteOnly);
    limits.connections_min = 1;
    let coalescer = Coalescer::new(100, ms(5), 1);
    let mut world = World::coalescing(Protocol::UdpWriteOnly, limits, Some(coalescer));
    let ready = |world: &World| {
        let mut lens = [0; 4];
        let count = world.pool.outbox(0).next_datagrams(&mut lens);
        lens[..count].to_vec()
    };
    world.send(&[6, 6]);
    assert_eq!(world.pool.next_deadline(), Some(world.now + ms(5)));
    world.pass(4);
    assert!(ready(&world).is_empty());
    world.pass(1);
    assert_eq!(ready(&world), [12]);
    world.write(1);
    assert_eq!((world.pool.ledger.sent, world.unsent[0].len()), (2, 0));
    world.send(&[7]);
    world.close_down();
    assert_eq!(ready(&world), [7]);
    world.send(&[8, 9]);
    assert_eq!(ready(&world), [7, 17], "what is accepted later does not wait either");
    world.refuse_datagram(0);
    assert_eq!((world.pool.ledger.dropped.total(), ready(&world)), (1, vec![17]));
    world.refuse_datagram(0);
    assert_eq!((world.pool.ledger.dropped.total(), ready(&world)), (3, vec![]));
}

#[test]
fn queue_timeout_expires_what_waits() {
    let mut world = tcp(|limits| limits.queue_timeout = ms(50));
    world.send(&[1]);
    world.pass(30);
    world.send(&[1]);
    world.pass(20);
    assert_eq!((world.pool.ledger.expired, world.pool.queued()), (1, 1));
    world.pass(30);
    assert_eq!((world.pool.ledger.expired, world.unsent[0].len()), (2, 0));
}

#[test]
fn a_stalled_torn_message_closes_its_connection_first() {
    let mut world = tcp(|limits| limits.queue_timeout = ms(50));
    world.send(&[5, 5]);
    let conn = world.connect();
    world.write(2);
    world.pass(50);
    assert_eq!(world.closes[&conn], Reason::Stalled);
    assert_eq!((world.pool.ledger.expired, world.unsent[0].len()), (2, 0));
}

#[test]
fn a_full_queue_drops_the_newest_or_the_oldest_that_is_whole() {
    let mut world = tcp(|limits| limits.queue_bytes_max = 10);
    world.send(&[4, 3, 3]);
    world.connect();
    world.write(1);
    world.send_or(Overflow::DropNewest, world.source(0), 3);
    assert_eq!((world.pool.queued(), world.pool.ledger.dropped.total()), (3, 1));
    world.send_or(Overflow::DropOldest, world.source(1), 3);
    assert_eq!((world.pool.queued(), world.pool.ledger.dropped.total()), (3, 2));
    let left: BTreeSet<_> = world.unsent[0].iter().map(|byte| byte.message).collect();
    assert_eq!(left, BTreeSet::from([1, 3, 4]));
    world.check();
}

#[test]
fn closing_down_closes_idle_connections_and_finishes_one_way_ones() {
    let mut world = tcp(|_| ());
    let idle = world.idle_conns(2);
    world.send(&[5]);
    let (one_way, busy) = (world.connect(), world.take());
    world.close_down();
    assert_eq!(world.closes, BTreeMap::from([(idle[0], Reason::Drained)]));
    world.write(5);
    assert!(matches!(world.state(one_way), State::Draining { .. }));
    world.reply(busy);
    assert_eq!(world.closes[&busy], Reason::Drained);
    world.pass(1_000);
    assert_eq!(world.closes[&one_way], Reason::Drained);
}

#[test]
fn closing_down_ends_connects_that_nobody_needs() {
    let mut world = tcp(|limits| (limits.connections_min, limits.queue_timeout) = (1, ms(50)));
    world.send(&[5]);
    world.pass(50);
    assert_eq!((world.sockets.len(), world.pool.queued()), (2, 0));
    world.close_down();
    assert!(world.sockets.is_empty());
}
