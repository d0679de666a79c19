//! What may happen to a pool, and what holds whatever does.
//!
//! [`World`] plays the shard: it owns the clock and what stands for sockets, carries out every
//! action at once, and keeps books of its own about each request, message and connection.
//! [`World::check`] compares them with the pool's.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;

use super::super::*;
use crate::config::Overflow;
use crate::inflight::Place;

/// How often timers may come due anew at one moment before that is a busy loop.
const TIMER_ROUNDS_MAX: usize = 4;

/// One byte of a one-way message: which, where in it, and whether it is the last.
#[derive(Debug, Clone, Copy)]
pub struct Byte {
    pub message: u64,
    pub offset: usize,
    pub is_last: bool,
}

/// What stands for a socket.
#[derive(Debug)]
pub struct Socket {
    pub role: Role,
    pub is_up: bool,
    /// The requests put on it whose reply has not come, in order.
    pub slots: VecDeque<(Tag, RequestId)>,
    /// So many of them were written.
    pub begun: usize,
    /// An exchange on it did not complete.
    pub is_spoiled: bool,
    /// The user to whom it was lent.
    pub lent_to: Option<u32>,
    /// Every one-way byte written to it.
    pub stream: Vec<Byte>,
}

#[derive(Debug)]
pub struct World {
    pub pool: Pool,
    pub now: Time,
    /// How many addresses there are.
    pub addresses: u16,
    /// Whether UDP sockets can be opened; a TCP connect ends when a test says so.
    pub opens_sockets: bool,
    /// Bytes that are not acknowledged when a connection ends, if that many were written.
    pub unacknowledged_max: usize,
    pub sockets: BTreeMap<ConnId, Socket>,
    pub closes: BTreeMap<ConnId, Reason>,
    pub asks: u64,
    /// Requests that have not ended: whose, and on which connection.
    pub asked: BTreeMap<RequestId, (Owner, Option<ConnId>)>,
    /// Requests with which their connection ends.
    pub last: BTreeSet<RequestId>,
    /// Sockets take nothing for now.
    pub holds: bool,
    pub lent: BTreeMap<LeaseId, (ConnId, SourceId)>,
    /// Who waits for a lease.
    pub wishes: BTreeMap<u64, (SourceId, u32)>,
    pub lease_asks: u64,
    /// The last connection that was to be lent was found broken.
    was_broken: bool,
    pub leases_refused: u64,
    pub leases_ended: u64,
    /// Requests that were written, at least in part, to a connection that was lost.
    pub lost: BTreeSet<RequestId>,
    /// How requests ended, and whether they were sent.
    pub ends: BTreeMap<RequestId, (RequestEnd, bool)>,
    pub refused: u64,
    pub messages: u64,
    /// The send buffer of each lane.
    pub unsent: Vec<VecDeque<Byte>>,
    pub ledgers: BTreeMap<SourceId, Ledger>,
}

impl World {
    pub fn new(protocol: Protocol, limits: UpstreamLimits) -> Self {
        World::coalescing(protocol, limits, None)
    }

    pub fn coalescing(
        protocol: Protocol,
        limits: UpstreamLimits,
        coalescer: Option<Coalescer>,
    ) -> Self {
        World::matching(protocol, limits, coalescer, Matching::InOrder, false, Policy::RoundRobin)
    }

    pub fn matching(
        protocol: Protocol,
        limits: UpstreamLimits,
        coalescer: Option<Coalescer>,
        matching: Matching,
        is_idempotent: bool,
        policy: Policy,
    ) -> Self {
        let is_write_only = protocol == Protocol::UdpWriteOnly;
        let requests_refused = is_write_only.then_some(Reason::WriteOnly);
        let mut sources: SlotMap<SourceId, ()> = SlotMap::with_key();
        let unsent = vec![VecDeque::new(); limits.one_way_connections];
        let settings = PoolSettings {
            protocol,
            limits,
            policy,
            requests_refused,
            leases_refused: None,
            matching,
            is_idempotent,
            coalescer,
            seed: 1,
        };
        let mut world = World {
            pool: Pool::new(settings),
            now: Time::default() + ms(1_000),
            addresses: 1,
            opens_sockets: true,
            unacknowledged_max: 0,
            sockets: BTreeMap::new(),
            closes: BTreeMap::new(),
            asks: 0,
            last: BTreeSet::new(),
            asked: BTreeMap::new(),
            holds: false,
            lent: BTreeMap::new(),
            wishes: BTreeMap::new(),
            lease_asks: 0,
            was_broken: false,
            leases_refused: 0,
            leases_ended: 0,
            lost: BTreeSet::new(),
            ends: BTreeMap::new(),
            refused: 0,
            messages: 0,
            unsent,
            ledgers: (0..3).map(|_| (sources.insert(()), Ledger::default())).collect(),
        };
        world.resolve();
        world
    }

    pub fn is_tcp(&self) -> bool {
        self.pool.settings.protocol == Protocol::Tcp
    }

    pub fn resolve(&mut self) {
        self.resolve_to(self.addresses);
    }

    pub fn resolve_to(&mut self, count: u16) {
        let addresses = (1..=count).map(|port| ([127, 0, 0, 1], port).into());
        self.pool.handle_resolved(self.now, addresses.collect());
        self.carry_out();
    }

    pub fn source(&self, index: usize) -> SourceId {
        *self.ledgers.keys().nth(index % self.ledgers.len()).unwrap()
    }

    /// Each source is a user of its own.
    fn uid_of(&self, source: SourceId) -> u32 {
        let place = self.ledgers.keys().position(|other| *other == source);
        u32::try_from(place.unwrap()).unwrap()
    }

    pub fn close_down(&mut self) {
        self.pool.close_down(self.now);
        self.carry_out();
    }

    // Requests.

    pub fn ask_as(&mut self, source: SourceId, patience: Option<u64>) -> Result<RequestId, Reason> {
        self.ask_for(source, patience, false)
    }

    pub fn ask_last(&mut self) -> RequestId {
        self.ask_for(self.source(0), None, true).unwrap()
    }

    fn ask_for(
        &mut self,
        source: SourceId,
        patience: Option<u64>,
        is_last: bool,
    ) -> Result<RequestId, Reason> {
        self.asks += 1;
        let owner = Owner { source, uid: self.uid_of(source), correlation: self.asks };
        let deadline = patience.map(|milliseconds| self.now + ms(milliseconds));
        let answer = match self.pool.request(self.now, owner, deadline, is_last) {
            Acquire::Granted { request, conn, tag } => {
                self.asked.insert(request, (owner, None));
                self.last.extend(is_last.then_some(request));
                self.put(request, conn, tag);
                Ok(request)
            }
            Acquire::Queued { request } => {
                self.asked.insert(request, (owner, None));
                self.last.extend(is_last.then_some(request));
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

    pub fn ask(&mut self) -> RequestId {
        self.ask_as(self.source(0), None).unwrap()
    }

    pub fn ask_times(&mut self, count: usize) -> Vec<RequestId> {
        (0..count).map(|_| self.ask()).collect()
    }

    /// Asks where something is idle.
    pub fn take(&mut self) -> ConnId {
        let request = self.ask();
        self.on(request).unwrap()
    }

    /// A request is put on a connection, and written unless the sockets hold.
    pub fn put(&mut self, request: RequestId, conn: ConnId, tag: Tag) {
        let (_, on) = self.asked.get_mut(&request).expect("it has not ended");
        assert_eq!(on.replace(conn), None, "it is on one connection at a time");
        let depth = self.pool.settings.limits.pipeline_depth;
        let socket = self.sockets.get_mut(&conn).expect("it is open");
        assert!(socket.role == Role::Exchange && socket.is_up && !socket.is_spoiled);
        assert_eq!(socket.lent_to, None, "somebody may have kept a copy");
        assert!(socket.slots.iter().all(|(other, _)| *other != tag), "each has its own");
        let is_last = |(_, other): &(Tag, RequestId)| self.last.contains(other);
        assert!(!socket.slots.iter().any(is_last), "the peer reads nothing behind it");
        socket.slots.push_back((tag, request));
        let asked = &self.asked;
        let awaited = socket.slots.iter().filter(|(_, request)| asked.contains_key(request));
        assert!(awaited.count() <= depth, "at most pipeline_depth");
        let slots_max = if self.pool.settings.protocol == Protocol::Tcp { 2 * depth } else { 16 };
        assert!(socket.slots.len() <= slots_max, "with those that were given up");
        if !self.holds {
            socket.begun = socket.slots.len();
        }
    }

    pub fn let_go(&mut self) {
        self.holds = false;
        self.sockets.values_mut().for_each(|socket| socket.begun = socket.slots.len());
    }

    pub fn on(&self, request: RequestId) -> Option<ConnId> {
        self.asked.get(&request).and_then(|(_, on)| *on)
    }

    pub fn cancel(&mut self, request: RequestId) {
        self.pool.cancel(self.now, request);
        self.carry_out();
        assert!(self.ends.contains_key(&request));
    }

    pub fn reply(&mut self, conn: ConnId) {
        self.receive(conn, 0, true);
    }

    /// A reply comes: the next one, or where they have ids that of some slot.
    pub fn receive(&mut self, conn: ConnId, index: usize, is_deliverable: bool) {
        let socket = self.sockets.get_mut(&conn).expect("it is open");
        if socket.role != Role::Exchange {
            self.pool.conn_mut(conn).expect("it is open").replies_discarded += 1;
            return;
        }
        if socket.begun == 0 {
            return self.lose(conn, Reason::Unsolicited);
        }
        let place = match self.pool.settings.matching {
            Matching::InOrder => 0,
            Matching::ById { .. } => index % socket.begun,
        };
        let (tag, request) = socket.slots.remove(place).expect("it was written");
        socket.begun -= 1;
        let owner = self.asked.get(&request).map(|(owner, _)| *owner).filter(|_| is_deliverable);
        let reply = self.pool.handle_reply(self.now, conn, tag, is_deliverable);
        assert_eq!(reply, owner, "to the one who asked here");
        if owner.is_some() {
            self.end(request, RequestEnd::Replied, true);
        }
        self.carry_out();
    }

    pub fn end(&mut self, request: RequestId, end: RequestEnd, was_sent: bool) {
        let (_, on) = self.asked.remove(&request).expect("it ends once");
        self.ends.insert(request, (end, was_sent));
        let is_exclusive = self.pool.is_exclusive();
        if let Some(socket) = on.and_then(|conn| self.sockets.get_mut(&conn))
            && let Some((_, of_slot)) = socket.slots.front()
            && *of_slot == request
        {
            socket.is_spoiled |= is_exclusive;
        }
    }

    /// A request ended without its reply: whether it was written.
    pub fn recall(&mut self, request: RequestId, left: Left) -> bool {
        let on = self.asked[&request].1;
        match left {
            Left::Nothing => {
                assert_eq!(on, None);
                false
            }
            Left::Something => true,
            Left::SeeSlot { conn, tag } => {
                // It may not have been put there yet.
                assert!(on.is_none_or(|on| on == conn));
                let Some(socket) = self.sockets.get_mut(&conn) else { return false };
                let place = socket.slots.iter().position(|(of_slot, _)| *of_slot == tag);
                if place.is_some_and(|place| place < socket.begun) {
                    return true;
                }
                if let Some(place) = place {
                    socket.slots.remove(place);
                }
                self.pool.handle_unsent(self.now, conn, tag);
                false
            }
        }
    }

    // Leases.

    pub fn lease_as(&mut self, source: SourceId, uid: u32, patience: Option<u64>) {
        self.lease_asks += 1;
        let owner = Owner { source, uid, correlation: self.lease_asks };
        let deadline = patience.map(|milliseconds| self.now + ms(milliseconds));
        self.wishes.insert(owner.correlation, (source, uid));
        match self.pool.lease(self.now, owner, deadline) {
            Lend::Granted { lease, conn } => self.pass_on(lease, conn, owner),
            Lend::Queued => {}
            Lend::Refused(_) => {
                self.leases_refused += 1;
                self.wishes.remove(&owner.correlation);
            }
        }
        self.carry_out();
    }

    pub fn pass_on(&mut self, lease: LeaseId, conn: ConnId, owner: Owner) {
        if self.pool.leased(owner.source, lease) != Some(conn) {
            return;
        }
        // Some are found broken, and some clients do not take what they asked for.
        match self.lease_asks % 8 {
            3 if self.sockets.contains_key(&conn) && !self.was_broken => {
                self.was_broken = true;
                return self.pool.handle_lost(self.now, conn, Reason::PeerClosed, 0);
            }
            5 => {
                self.wishes.remove(&owner.correlation).expect("it was asked for");
                self.leases_ended += 1;
                return self.pool.handle_unlendable(self.now, lease, Reason::ReplyUndeliverable);
            }
            _ => self.was_broken = false,
        }
        let (_, uid) = self.wishes.remove(&owner.correlation).expect("it was asked for");
        let socket = self.sockets.get_mut(&conn).expect("it is open");
        assert!(socket.slots.is_empty() && socket.is_up && !socket.is_spoiled);
        assert!(socket.lent_to.is_none_or(|lent_to| lent_to == uid), "only to the same user");
        socket.lent_to = Some(uid);
        self.lent.insert(lease, (conn, owner.source));
    }

    pub fn give_back(&mut self, lease: LeaseId, found: Result<(), Reason>) {
        self.lent.remove(&lease).expect("it is held");
        self.leases_ended += 1;
        self.pool.handle_returned(self.now, lease, found);
        self.carry_out();
    }

    pub fn end_source(&mut self, source: SourceId) {
        let theirs = self.lent.len();
        self.lent.retain(|_, (_, of)| *of != source);
        self.leases_ended += (theirs - self.lent.len()) as u64;
        let wishes = self.wishes.len();
        self.wishes.retain(|_, (of, _)| *of != source);
        self.leases_refused += (wishes - self.wishes.len()) as u64;
        self.pool.end_leases(self.now, source);
        self.carry_out();
    }

    // One-way messages.

    pub fn send(&mut self, lens: &[usize]) {
        self.send_as(self.source(0), lens);
    }

    pub fn send_as(&mut self, source: SourceId, lens: &[usize]) {
        lens.iter().for_each(|len| self.append(source, *len));
        self.accept(source);
    }

    pub fn append(&mut self, source: SourceId, len: usize) {
        self.messages += 1;
        let message = self.messages;
        let byte = |offset| Byte { message, offset, is_last: offset + 1 == len };
        let lane = self.pool.lane_of(source);
        self.unsent[lane].extend((0..len).map(byte));
        self.pool.stage(lane, len);
    }

    pub fn accept(&mut self, source: SourceId) {
        let accepted = self.pool.accept(self.now, source);
        self.ledgers.get_mut(&source).unwrap().accepted += accepted;
        self.carry_out();
    }

    /// As `push` of the shard does.
    pub fn send_or(&mut self, overflow: Overflow, source: SourceId, len: usize) {
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
    pub fn write(&mut self, count: usize) {
        self.write_by(0, count);
    }

    pub fn write_by(&mut self, lane: usize, count: usize) {
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
    pub fn refuse_datagram(&mut self, lane: usize) {
        if let Some(conn) = self.pool.sending_conn(lane) {
            let done = self.pool.handle_unsendable(self.now, conn, Reason::TooBig);
            self.unsent[lane].drain(..done);
            self.carry_out();
        }
    }

    // Connections.

    pub fn state(&self, conn: ConnId) -> State {
        self.pool.conn(conn).expect("it is open").state
    }

    pub fn pick(&self, index: usize, wanted: impl Fn(&Socket, State) -> bool) -> Option<ConnId> {
        let found = self.sockets.iter().filter(|(conn, s)| wanted(s, self.state(**conn)));
        let found: Vec<_> = found.map(|(conn, _)| *conn).collect();
        (!found.is_empty()).then(|| found[index % found.len()])
    }

    pub fn connecting(&self, index: usize) -> Option<ConnId> {
        self.pick(index, |_, state| state == State::Connecting)
    }

    /// The first of the connects under way succeeds.
    pub fn connect(&mut self) -> ConnId {
        let conn = self.connecting(0).unwrap();
        self.finish_connect(conn, true);
        conn
    }

    pub fn finish_connect(&mut self, conn: ConnId, succeeds: bool) {
        if succeeds {
            self.sockets.get_mut(&conn).expect("it is open").is_up = true;
            self.pool.handle_connected(self.now, conn);
        } else {
            self.pool.handle_connect_failed(self.now, conn, Reason::ConnectRefused);
        }
        self.carry_out();
    }

    /// New connections that have carried a request each; the last one is freed last.
    pub fn idle_conns(&mut self, count: usize) -> Vec<ConnId> {
        self.ask_times(count);
        let conns: Vec<_> = (0..count).map(|_| self.connect()).collect();
        conns.iter().for_each(|conn| self.reply(*conn));
        conns
    }

    pub fn lose(&mut self, conn: ConnId, reason: Reason) {
        let socket = self.sockets.get_mut(&conn).expect("it is open");
        socket.is_spoiled = true;
        let begun = std::mem::take(&mut socket.begun);
        for (at, (_, request)) in std::mem::take(&mut socket.slots).into_iter().enumerate() {
            if let Some((_, on)) = self.asked.get_mut(&request) {
                *on = None;
                if at < begun {
                    self.lost.insert(request);
                }
            }
        }
        self.pool.handle_lost(self.now, conn, reason, begun);
        self.carry_out();
    }

    /// As [`World::lose`], before anything was written.
    pub fn lose_untouched(&mut self, conn: ConnId, reason: Reason) {
        self.sockets.get_mut(&conn).expect("it is open").begun = 0;
        self.lose(conn, reason);
    }

    // Time and actions.

    /// A turn of the loop, so much later.
    pub fn jump(&mut self, wait: Duration) {
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
    pub fn pass(&mut self, milliseconds: u64) {
        let end = self.now + ms(milliseconds);
        while let Some(at) = self.pool.next_deadline().filter(|at| *at <= end) {
            self.jump(at.since(self.now));
        }
        self.jump(end.since(self.now));
    }

    pub fn carry_out(&mut self) {
        while let Some(action) = self.pool.poll_action() {
            match action {
                Action::Connect { conn, role, .. } => {
                    if let Role::OneWay { .. } = role {
                        let is_same = |socket: &Socket| socket.role == role;
                        assert!(!self.sockets.values().any(is_same), "one after the other");
                    }
                    let socket = Socket {
                        role,
                        is_up: false,
                        slots: VecDeque::new(),
                        begun: 0,
                        is_spoiled: false,
                        lent_to: None,
                        stream: Vec::new(),
                    };
                    assert!(self.sockets.insert(conn, socket).is_none());
                    if !self.is_tcp() {
                        self.finish_connect(conn, self.opens_sockets);
                    }
                }
                Action::Dispatch { conn, request, tag } => {
                    let is_there = self.pool.slot(conn, tag).map(|slot| slot.request);
                    if is_there == Some(Some(request)) {
                        self.put(request, conn, tag);
                    }
                }
                Action::Resend { conn, tag } => {
                    assert!(!self.is_tcp() && self.pool.slot(conn, tag).is_some());
                }
                Action::Forget { conn, tag } => {
                    // It may have been taken back meanwhile.
                    if let Some(socket) = self.sockets.get_mut(&conn)
                        && let Some(place) = socket.slots.iter().position(|slot| slot.0 == tag)
                    {
                        socket.begun -= usize::from(place < socket.begun);
                        let (_, request) = socket.slots.remove(place).expect("it is there");
                        assert!(!self.asked.contains_key(&request));
                    }
                }
                Action::Lend { conn, lease, owner } => self.pass_on(lease, conn, owner),
                Action::RefuseLease { owner, .. } => {
                    self.leases_refused += 1;
                    self.wishes.remove(&owner.correlation).expect("it was asked for");
                }
                Action::Revoke { conn } => {
                    assert!(self.sockets[&conn].lent_to.is_some());
                }
                Action::Fail { request, owner, end, left, was_sent_before } => {
                    assert_eq!(owner, self.asked[&request].0);
                    let was_sent = self.recall(request, left) || was_sent_before;
                    if self.lost.contains(&request) {
                        assert!(was_sent, "it may have been carried out");
                        assert!(!matches!(end, RequestEnd::Refused(_)), "{end:?}");
                    }
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

    pub fn close(&mut self, conn: ConnId, reason: Reason) {
        let socket = self.sockets.remove(&conn).expect("it is closed once");
        let mut requests = socket.slots.iter().map(|(_, request)| request);
        assert!(requests.all(|r| !self.asked.contains_key(r)), "they have ended or moved on");
        let held = self.lent.len();
        self.lent.retain(|_, (on, _)| *on != conn);
        self.leases_ended += (held - self.lent.len()) as u64;
        self.closes.insert(conn, reason);
        let unacknowledged = self.unacknowledged_max.min(socket.stream.len());
        let lost = &socket.stream[socket.stream.len() - unacknowledged..];
        let doubtful = lost.iter().filter(|byte| byte.is_last).count() as u64;
        let before = self.pool.ledger.in_doubt;
        self.pool.handle_closed(self.now, conn, unacknowledged);
        assert_eq!(self.pool.ledger.in_doubt - before, doubtful, "of those sent on {conn:?}");
    }

    // What always holds.

    pub fn check(&mut self) {
        self.check_sums();
        self.check_places();
        self.check_deadlines();
        self.pool.want_connections(self.now);
        // Among several addresses one may have become the better choice meanwhile.
        if self.addresses > 1 {
            return self.carry_out();
        }
        assert_eq!(self.pool.poll_action(), None, "what could be begun was begun before");
    }

    pub fn check_sums(&self) {
        let (pool, ledger, counts) = (&self.pool, &self.pool.ledger, &self.pool.counts);
        assert_eq!(ledger.accepted, ledger.settled() + pool.queued());
        assert!(ledger.in_doubt <= ledger.sent);
        let ended =
            counts.replied + counts.timed_out + counts.refused.total() + counts.failed.total();
        assert_eq!(counts.requests, ended + pool.in_flight() as u64);
        assert_eq!((counts.requests, ended), (self.asks, self.ends.len() as u64 + self.refused));

        let leases = pool.lease_counts();
        let waiting = pool.lease_waiters() as u64;
        assert_eq!(leases.asked, self.lease_asks);
        assert_eq!(leases.asked, leases.granted + leases.refused.total() + waiting);
        assert_eq!(leases.refused.total(), self.leases_refused);
        let held = self.lent.len() as u64;
        assert_eq!(leases.granted, leases.returned + leases.ended.total() + held);
        assert_eq!(leases.returned + leases.ended.total(), self.leases_ended);

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

    pub fn check_places(&self) {
        let (pool, limits) = (&self.pool, &self.pool.settings.limits);
        assert!(pool.conns().map(|(conn, _)| conn).eq(self.sockets.keys().copied()));
        for (conn, socket) in &self.sockets {
            let awaited = |request: RequestId| self.asked.contains_key(&request).then_some(request);
            let known = socket.slots.iter().map(|(tag, request)| (*tag, awaited(*request)));
            let slots = pool.in_flight.slots_on(*conn).into_iter();
            let slots = slots.map(|(tag, slot)| (tag, slot.request));
            let is_open = pool.conn(*conn).is_some_and(Conn::is_open);
            assert!(!is_open || slots.eq(known), "both know the same of {conn:?}");
            let lent_to = pool.conn(*conn).and_then(|record| record.lent_to);
            assert!(!is_open || lent_to == socket.lent_to, "lent or not: {conn:?}");
        }
        let is_exchange = |conn: &Conn| conn.role == Role::Exchange;
        let is_draining = |conn: &Conn| matches!(conn.state, State::Draining { .. });
        let is_idle = |conn: &Conn| matches!(conn.state, State::Idle { .. });
        let is_lent = |conn: &Conn| conn.lent_to.is_some();
        let listed: BTreeSet<_> = pool.with_room.iter().copied().collect();
        let depth = limits.pipeline_depth;
        let has_room = |(conn, c): &(ConnId, &Conn)| {
            let is_in_use = is_exchange(c) && c.state == State::InUse && c.retiring.is_none();
            depth > 1 && is_in_use && pool.takes_one_more(*conn)
        };
        assert_eq!(listed, pool.conns().filter(has_room).map(|(conn, _)| conn).collect());
        assert_eq!(listed.len(), pool.with_room.len());
        let is_waiting = |request: &&RequestId| {
            let entry = pool.in_flight.get(**request);
            entry.is_some_and(|entry| matches!(entry.place, Place::Waiting { .. }))
        };
        assert_eq!(pool.waiters.len(), self.asked.keys().filter(is_waiting).count());
        let lines = pool.waiters.lines(&pool.turns).map(|(line, ..)| pool.waiters.len_of(line));
        assert_eq!(pool.waiters.len(), lines.sum::<usize>());
        // With several, what is free may go to an address that is not for those who wait.
        let has_choice = self.addresses > 1;
        assert!(
            has_choice || listed.is_empty() || pool.waiters() == 0,
            "waiting beside one with room"
        );
        let held = pool.conns().filter(|(_, c)| matches!(c.state, State::Leased { .. })).count();
        assert_eq!((held, pool.leases_held()), (self.lent.len(), self.lent.len()));
        assert_eq!(self.wishes.len(), pool.lease_waiters());
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
        // A request that was admitted may have to wait again, and then keeps back only those who
        // wait for the same address.
        let lines = match pool.settings.policy {
            Policy::Hash => usize::from(self.addresses),
            Policy::RoundRobin | Policy::LeastOutstanding => 1,
        };
        assert!(pool.waiters() <= limits.waiters_max + lines * limits.connections_max * depth);

        let rests = |lent: bool| {
            let resting = pool.conns().filter(|(_, c)| is_exchange(c) && is_idle(c));
            resting.filter(move |(_, c)| is_lent(c) == lent).map(|(conn, _)| conn)
        };
        assert_eq!(rests(true).collect::<BTreeSet<_>>(), pool.returned.iter().copied().collect());
        let idle: BTreeSet<_> = rests(false).collect();
        assert!(idle.is_empty() || pool.lendable() == 0, "waiting beside an idle one");
        let leases_max = match limits.leases_max {
            0 => limits.connections_max.max(2) - 1,
            leases_max => leases_max,
        };
        assert!(held <= leases_max, "{held} leases, {leases_max} at most");
        assert_eq!(idle, pool.idle.iter().copied().collect());
        assert!(has_choice || idle.is_empty() || pool.waiters() == 0, "waiting beside an idle one");
        let outstanding: usize = pool.health().map(|health| health.outstanding).sum();
        let on_conns = self.asked.values().filter(|(_, on)| on.is_some()).count();
        assert!(outstanding <= on_conns, "{outstanding} of {on_conns}");
        for (index, lane) in pool.lanes.iter().enumerate() {
            let conn = lane.conn.and_then(|conn| pool.conn(conn));
            assert!(conn.is_none_or(|conn| conn.role == Role::OneWay { lane: index }));
            let (rests, sends) = (conn.is_some_and(is_idle), pool.sending_conn(index).is_some());
            assert!(if lane.outbox.is_empty() { !sends } else { !rests });
            assert!(!pool.closing_down || ((has_choice || idle.is_empty()) && !rests));
            let of_lane = pool.conns().filter(|(_, conn)| conn.role.lane() == Some(index));
            assert_eq!(of_lane.count(), lane.ending + usize::from(lane.conn.is_some()));
            assert!(lane.ending == 0 || lane.conn.is_none(), "one after the other");
        }
    }

    /// Nothing waits for ever.
    pub fn check_deadlines(&self) {
        let (pool, limits) = (&self.pool, &self.pool.settings.limits);
        let requests = self.asked.keys().map(|request| match pool.in_flight.get(*request) {
            Some(entry) => match entry.place {
                Place::Waiting { deadline } => deadline,
                Place::On { conn, tag } => {
                    pool.slot(conn, tag).expect("it has a slot").times.deadline
                }
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
    pub fn recover(&mut self, time_max: Duration) {
        self.opens_sockets = true;
        self.resolve();
        let end = self.now + time_max;
        while !self.pool.is_settled() {
            assert!(self.now < end, "stuck");
            while let Some(conn) = self.connecting(0) {
                self.finish_connect(conn, true);
            }
            self.let_go();
            while let Some(conn) =
                self.pick(0, |socket, state| state == State::InUse && socket.begun > 0)
            {
                self.reply(conn);
            }
            (0..self.unsent.len()).for_each(|lane| self.write_by(lane, usize::MAX));
            self.check();
            self.jump(ms(1));
        }
    }
}

pub fn ms(milliseconds: u64) -> Duration {
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
    Hold,
    Lease,
    Return,
    EndSource,
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
        Connect, Connect, Connect, Connect, Connect, Receive, Receive, Receive, Receive, Receive,
        Receive, Hold, Lease, Return, Return, EndSource, Lose, Lose, Write, Write, Write, Write,
        Jump, Jump, Jump, Jump, Resolve, OpenSocket, CloseDown, Abandon,
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
            Deed::Ask => {
                let patience = (!goes_well).then_some(amount as u64 / 4);
                let _ = self.ask_for(source, patience, amount == 19);
            }
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
                // Now and then one that nobody asked for.
                let may_come = |s: &Socket, state| match state {
                    State::InUse => s.begun > 0 || !goes_well,
                    State::Idle { .. } => !goes_well,
                    _ => false,
                };
                if let Some(conn) = self.pick(index, may_come) {
                    if amount == 19 {
                        self.pool.handle_last_reply(conn);
                    }
                    self.receive(conn, amount, amount > 2);
                }
            }
            Deed::Hold if goes_well => self.let_go(),
            Deed::Hold => self.holds = true,
            Deed::Lease => {
                self.lease_as(source, index as u32 % 2, (!goes_well).then_some(amount as u64 / 4));
            }
            Deed::Return => {
                if let Some(lease) = self.lent.keys().nth(index).copied() {
                    let found = if goes_well { Ok(()) } else { Err(Reason::LeaseUnclean) };
                    self.give_back(lease, found);
                }
            }
            Deed::EndSource if goes_well => {}
            Deed::EndSource => self.end_source(source),
            Deed::Lose => {
                self.unacknowledged_max = amount;
                let reason = LOSSES[amount % LOSSES.len()];
                // On a one-way connection everything is unsolicited, and discarded.
                let can_be = reason != Reason::Unsolicited;
                let is_watched = |state| !matches!(state, State::Leased { .. });
                let may_be =
                    |s: &Socket, state| is_watched(state) && (can_be || s.role == Role::Exchange);
                if let Some(conn) = self.pick(index, may_be) {
                    match goes_well {
                        true => self.lose_untouched(conn, reason),
                        false => self.lose(conn, reason),
                    }
                }
            }
            Deed::Write if goes_well || self.is_tcp() => {
                self.write_by(index % self.unsent.len(), amount);
            }
            Deed::Write => self.refuse_datagram(index % self.unsent.len()),
            Deed::Jump => self.jump(ms(amount as u64 / 4)),
            Deed::Resolve if goes_well => self.resolve_to(1 + amount as u16 % self.addresses),
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
            lease_timeout: ms(times[0] * 2),
            leases_max: counts[2] % 3,
            pipeline_depth: if protocol == Protocol::Tcp { [1, 1, 2, 3, 8][counts[4]] } else { 1 },
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
    let addresses = (prop_oneof![3 => Just(1u16), 2 => 2u16..4], select(&Policy::ALL[..]));
    let matching = (any::<bool>(), any::<bool>(), 0u32..3, addresses);
    let upstream = (select(PROTOCOLS), packing, matching).prop_flat_map(
        move |(protocol, packing, matching)| {
            (Just(protocol), any_limits(protocol, waits), Just(packing), Just(matching))
        },
    );
    upstream.prop_map(
        |(
            protocol,
            mut limits,
            packing,
            (has_ids, is_idempotent, resends, (addresses, policy)),
        )| {
            let (separator_bytes, max_bytes, delay, packs) = packing;
            let coalescer = Coalescer::new(max_bytes, ms(delay), separator_bytes);
            let packs = packs && protocol != Protocol::Tcp;
            let has_ids = has_ids && protocol != Protocol::UdpWriteOnly;
            if has_ids {
                limits.pipeline_depth = 4;
            }
            if protocol == Protocol::Udp {
                (limits.retransmits, limits.retransmit_interval) = (resends, ms(3));
            }
            let matching = if has_ids { Matching::ById { ids: 16 } } else { Matching::InOrder };
            let coalescer = packs.then_some(coalescer);
            let mut world =
                World::matching(protocol, limits, coalescer, matching, is_idempotent, policy);
            world.addresses = addresses;
            world.resolve();
            world
        },
    )
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
