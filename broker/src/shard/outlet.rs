//! One upstream at work: carries out what its [`Pool`] decides, on real sockets.
//!
//! Bytes lie here and nowhere else: one-way messages back to back in the send buffer of their lane,
//! the body of a waiting request under its id, the request being written on its connection.
//! Everything that sources must learn goes through [`Sources`].

mod exchange;
mod greeting;
mod lending;
mod one_way;

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use poolbroker_proto::address::Protocol;
use poolbroker_proto::framing::Framing;
use poolbroker_proto::message::{Failure, Retry};
use poolbroker_proto::reason::Reason;
use slotmap::SecondaryMap;

use self::exchange::{Body, Exchange};
use self::one_way::Wire;
use super::Target;
use super::sources::Sources;
use crate::balance::Health;
use crate::buffer::{ReceiveBuffer, SendBuffer, Spares};
use crate::closer::Closer;
use crate::coalesce::Coalescer;
use crate::config::{BrokerLimits, Overflow, UpstreamConfig};
use crate::config::{CLIENT_TEXT_CHARS_MAX, READS_MAX};
use crate::ids::{ConnId, LeaseId, RequestId, SourceId};
use crate::inflight::{Matching, Owner};
use crate::poller::{Poller, Readiness, Token};
use crate::pool::{Action, Conn, Pool, PoolSettings, Role};
use crate::snapshot::{
    AddressSnapshot, ConnectionSnapshot, LeaseSnapshot, NameSnapshot, UpstreamSnapshot, by_reason,
};
use crate::stats::RequestEnd;
use crate::timers::Time;
use crate::upstream::resolve::Lookup;
use crate::upstream::udp::{self, Discard};
use crate::upstream::{connect_failure, sockopt, tcp};

/// What the shard lends to an upstream while it works.
pub struct Context<'a> {
    /// This turn's moment.
    pub now: Time,
    /// Where sockets are watched.
    pub poller: &'a mut Poller<Target>,
    /// Receive buffers.
    pub spares: &'a mut Spares,
    /// Who is told.
    pub sources: &'a mut Sources,
    /// Where sockets are closed that somebody else had.
    pub closer: &'a mut Closer,
}

/// What became of a one-way message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Push {
    /// Staged: part of the run that [`Upstream::accept`] ends.
    Staged,
    /// The queue is full: it stays in its source.
    Full,
    /// The queue is full, and the policy is to drop it.
    Dropped,
    /// It never gets in.
    Refused(Reason),
}

/// One upstream. See the module's text.
#[derive(Debug)]
pub struct Upstream {
    /// Name, URL, limits.
    pub config: UpstreamConfig,
    /// Its decisions.
    pub pool: Pool,
    index: usize,
    /// The upstream for which its messages are counted in sessions: itself, or the broadcast.
    account: usize,
    /// The upstreams that send the copies of a broadcast; none: it sends by itself.
    pub copies: Option<Range<usize>>,
    wire: Wire,
    /// In the order of the pool's.
    lanes: Vec<LaneIo>,
    scratch: Vec<u8>,
    sockets: SecondaryMap<ConnId, Socket>,
    /// Requests that wait for a connection.
    bodies: SecondaryMap<RequestId, Body>,
    /// Connections with requests that were granted and not yet written.
    unwritten: Vec<ConnId>,
    /// Connections that were lent and not yet passed on.
    granted: Vec<(ConnId, LeaseId, Owner)>,
    /// Connections that came back from leases.
    returned: Vec<ConnId>,
    /// Sources whose next message, of so many bytes, found no room in the queue.
    blocked: VecDeque<(SourceId, usize)>,
    /// Connections with more to read than one turn allows.
    unread: Vec<ConnId>,
    /// Connections that took no more when they were written to.
    full: Vec<ConnId>,
    udp: udp::Sender,
    /// Always there, but while it is read.
    replies: Option<udp::Receiver>,
    nobuf_backoff: (Duration, Duration),
    icmp_refused: u64,
    redelivered: u64,
    /// How its names fare, in the order in which they were first looked up.
    lookups: Vec<Lookup>,
}

/// The I/O half of a lane.
#[derive(Debug, Default)]
struct LaneIo {
    send_buffer: SendBuffer,
    /// The datagram at the front was refused once.
    is_retry: bool,
    pause: Option<Pause>,
}

/// ENOBUFS: nothing is sent until then.
#[derive(Debug, Clone, Copy)]
struct Pause {
    until: Time,
    length: Duration,
}

/// How far a connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// It is being opened.
    Connecting,
    /// It says what `on_connect` has to say.
    Greeting {
        /// The reply to this of its requests comes next.
        step: usize,
    },
    /// It is used.
    Up,
}

/// The I/O half of a connection.
#[derive(Debug)]
struct Socket {
    fd: OwnedFd,
    token: Token,
    local: Option<SocketAddr>,
    phase: Phase,
    is_readable: bool,
    is_writable: bool,
    /// A datagram socket that was full, and is watched for room.
    waits_for_room: bool,
    is_ending: bool,
    /// By the poller; not while it is lent.
    is_watched: bool,
    discard: Discard,
    drops_seen: u32,
    /// Its requests; none on a one-way connection.
    exchange: Exchange,
    input: Option<ReceiveBuffer>,
}

impl Upstream {
    /// An upstream without connections.
    pub fn new(index: usize, config: UpstreamConfig, broker: &BrokerLimits, seed: u64) -> Self {
        let protocol = config.url.protocol;
        let requests_refused = config.requests_refused();
        let limits = config.limits.clone();
        let (wire, coalescer) = match (&config.coalesce, protocol) {
            (None, Protocol::Tcp) => (Wire::Framed(config.url.framing), None),
            (None, Protocol::Udp | Protocol::UdpWriteOnly) => (Wire::Framed(Framing::Raw), None),
            (Some(coalesce), _) => {
                let separator = coalesce.separator.clone();
                let separator_bytes = separator.bytes().len();
                let coalescer =
                    Coalescer::new(coalesce.max_bytes, coalesce.max_delay, separator_bytes);
                (Wire::Separated(separator), Some(coalescer))
            }
        };
        let matching = match config.url.id {
            None => Matching::InOrder,
            Some(field) => Matching::ById { ids: field.ids() },
        };
        let settings = PoolSettings {
            protocol,
            limits,
            policy: config.balance,
            requests_refused,
            leases_refused: config.leases_refused(),
            matching,
            is_idempotent: config.is_idempotent,
            coalescer,
            seed,
        };
        let pool = Pool::new(settings);
        Upstream {
            wire,
            lanes: (0..pool.lane_count()).map(|_| LaneIo::default()).collect(),
            pool,
            udp: udp::Sender::new(config.limits.gso_segments_max),
            config,
            index,
            account: index,
            copies: None,
            scratch: Vec::new(),
            sockets: SecondaryMap::new(),
            bodies: SecondaryMap::new(),
            unwritten: Vec::new(),
            granted: Vec::new(),
            returned: Vec::new(),
            blocked: VecDeque::new(),
            unread: Vec::new(),
            full: Vec::new(),
            replies: Some(udp::Receiver::new()),
            nobuf_backoff: (broker.nobuf_backoff_min, broker.nobuf_backoff_max),
            icmp_refused: 0,
            redelivered: 0,
            lookups: Vec::new(),
        }
    }

    /// Sends copies of the messages to `broadcast` from now on.
    pub fn send_copies_of(&mut self, broadcast: usize) {
        self.account = broadcast;
    }

    /// Whether a message of `bytes` has to stay in its source for now.
    pub fn holds_up(&self, bytes: usize) -> bool {
        self.config.overflow == Overflow::Block
            && !self.pool.has_room(bytes + self.wire.overhead_bytes())
    }

    /// Whether the oldest messages give way to one of `bytes`.
    pub fn drops_oldest_for(&self, bytes: usize) -> bool {
        self.config.overflow == Overflow::DropOldest
            && !self.pool.has_room(bytes + self.wire.overhead_bytes())
    }

    /// When [`Upstream::handle_timeout`] is due.
    pub fn next_deadline(&self) -> Option<Time> {
        let pauses = self.lanes.iter().filter_map(|lane| lane.pause).map(|pause| pause.until);
        self.pool.next_deadline().into_iter().chain(pauses).min()
    }

    /// Whether there is work that no event will announce.
    pub fn has_work(&self) -> bool {
        let is_granted = !(self.unwritten.is_empty() && self.granted.is_empty());
        is_granted || self.pool.has_actions() || !self.unread.is_empty() || self.has_to_send(1)
    }

    /// Whether some lane can send a full batch now: to wait for more would not make it cheaper. A
    /// stream has no batches, and takes the more at once the longer it is left alone.
    pub fn wants_work(&self) -> bool {
        match self.config.url.protocol {
            Protocol::Tcp => false,
            Protocol::Udp | Protocol::UdpWriteOnly => self.has_to_send(udp::BATCH_MAX as u64),
        }
    }

    fn has_to_send(&self, messages_min: u64) -> bool {
        (0..self.lanes.len()).any(|lane| {
            self.pool.outbox(lane).ready_messages() >= messages_min
                && self.lanes[lane].pause.is_none()
                && self.writable_one_way(lane).is_some()
        })
    }

    /// Whether no connection is left.
    pub fn is_closed(&self) -> bool {
        self.sockets.is_empty()
    }

    // From sources.

    /// Stages one one-way message of `source`; `is_line` says that it was cut from lines.
    pub fn push(&mut self, source: SourceId, body: &[u8], is_line: bool) -> Push {
        self.stage(source, body.len(), |wire, _, out| wire.encode(body, is_line, out))
    }

    /// Stages one one-way message of `len` bytes that `copy` appends from memory that others write
    /// to: checks run on the copy, and the copy is sent (M5).
    pub fn push_copied(
        &mut self,
        source: SourceId,
        len: usize,
        copy: impl FnOnce(&mut Vec<u8>),
    ) -> Push {
        self.stage(source, len, |wire, scratch, out| wire.encode_copied(copy, scratch, out))
    }

    fn stage(
        &mut self,
        source: SourceId,
        len: usize,
        encode: impl FnOnce(&Wire, &mut Vec<u8>, &mut Vec<u8>) -> Result<(), Reason>,
    ) -> Push {
        if len == 0 {
            return Push::Refused(Reason::Empty);
        }
        if len > self.config.limits.message_bytes_max {
            return Push::Refused(Reason::TooLong);
        }
        let has_room = self.pool.has_room(len + self.wire.overhead_bytes());
        match self.config.overflow {
            Overflow::Block if !has_room => return Push::Full,
            Overflow::DropNewest if !has_room => return Push::Dropped,
            Overflow::Block | Overflow::DropNewest | Overflow::DropOldest => {}
        }
        let lane = self.pool.lane_of(source);
        let send_buffer = &mut self.lanes[lane].send_buffer;
        let encoded = send_buffer.append(|out| encode(&self.wire, &mut self.scratch, out));
        let bytes = match encoded {
            Ok(bytes) => bytes,
            Err(reason) => return Push::Refused(reason),
        };
        // Only now: a message that never gets in drops nobody else's.
        while !has_room && !self.pool.has_room(bytes) {
            match self.pool.drop_oldest() {
                Some((lane, skip, bytes)) => self.lanes[lane].send_buffer.cut(skip, bytes),
                None => {
                    self.lanes[lane].send_buffer.take_back(bytes);
                    return Push::Dropped;
                }
            }
        }
        self.pool.stage(lane, bytes);
        Push::Staged
    }

    /// One of its names was looked up.
    pub fn note_lookup(&mut self, lookup: Lookup) {
        match self.lookups.iter_mut().find(|known| known.host == lookup.host) {
            Some(known) => *known = lookup,
            None => self.lookups.push(lookup),
        }
    }

    /// `messages` of those accepted may have been sent by an earlier broker.
    pub fn count_redelivered(&mut self, messages: u64) {
        self.redelivered += messages;
    }

    /// Accepts the staged messages of `source`; how many they are.
    pub fn accept(&mut self, now: Time, source: SourceId) -> u64 {
        self.pool.accept(now, source)
    }

    /// Remembers that a source waits for room for a message of `bytes`.
    pub fn block(&mut self, source: SourceId, bytes: usize) {
        self.blocked.push_back((source, bytes + self.wire.overhead_bytes()));
    }

    // From the loop.

    /// Something happened to a socket.
    pub fn handle_event(&mut self, cx: &mut Context<'_>, conn: ConnId, readiness: Readiness) {
        let Some(socket) = self.sockets.get_mut(conn) else {
            return;
        };
        socket.is_writable |= readiness.is_writable();
        if socket.waits_for_room && readiness.is_writable() {
            socket.waits_for_room = false;
            cx.poller.set_room_watched(&socket.fd, socket.token, false);
        }
        socket.is_readable |= readiness.is_readable();
        socket.is_ending |= readiness.is_ending();
        if socket.phase == Phase::Connecting {
            if readiness.is_writable() {
                self.finish_connect(cx.now, conn);
            }
            if !self.sockets.get(conn).is_some_and(|socket| socket.phase != Phase::Connecting) {
                return;
            }
        }
        if readiness.is_readable() {
            self.read(cx, conn);
        }
        // After the read: emptying the queue also clears the error that the read reports.
        if readiness.is_error()
            && self.config.url.protocol != Protocol::Tcp
            && let Some(socket) = self.sockets.get(conn)
        {
            self.icmp_refused += udp::drain_error_queue(&socket.fd);
        }
        if readiness.is_writable() {
            self.write_rest(cx, conn);
        }
    }

    /// Deadlines have come.
    pub fn handle_timeout(&mut self, now: Time) {
        for lane in 0..self.lanes.len() {
            // Only datagrams pause; the length of the last pause is the measure of the next one.
            let pause = &mut self.lanes[lane].pause;
            if let Some(pause) = pause.take_if(|pause| pause.until <= now) {
                self.send_datagrams(now, lane, pause.length);
            }
        }
        self.pool.handle_timeout(now);
    }

    /// Does everything that can be done now: once per turn.
    pub fn work(&mut self, cx: &mut Context<'_>) {
        // Before what came late is read: who timed out is told whether its request had left.
        self.carry_out(cx);
        for conn in std::mem::take(&mut self.unread) {
            self.read(cx, conn);
        }
        self.carry_out(cx);
        self.pass_on_granted(cx);
        self.write_requests(cx);
        self.pool.catch_up(cx.now);
        for lane in 0..self.lanes.len() {
            match self.config.url.protocol {
                Protocol::Tcp => self.send_stream(cx.now, lane),
                Protocol::Udp | Protocol::UdpWriteOnly if self.lanes[lane].pause.is_none() => {
                    self.send_datagrams(cx.now, lane, Duration::ZERO);
                }
                Protocol::Udp | Protocol::UdpWriteOnly => {}
            }
        }
        self.carry_out(cx);
        self.await_room(cx);
        // In the order in which they came: a large one is not passed by small ones for ever.
        while self.pool.has_room_again()
            && let Some((source, _)) =
                self.blocked.pop_front_if(|(_, bytes)| self.pool.has_room(*bytes))
        {
            cx.sources.unblock(source);
        }
    }

    /// Watches the datagram sockets that were full for room; streams are watched for it always.
    fn await_room(&mut self, cx: &mut Context<'_>) {
        for conn in self.full.drain(..) {
            if self.config.url.protocol != Protocol::Tcp
                && let Some(socket) = self.sockets.get_mut(conn)
                && !socket.waits_for_room
            {
                socket.waits_for_room = true;
                cx.poller.set_room_watched(&socket.fd, socket.token, true);
            }
        }
    }

    /// Adds what the kernel has dropped since the last look.
    pub fn refresh_discards(&mut self) {
        let conns: Vec<_> = self.sockets.keys().collect();
        for conn in conns {
            self.refresh_discard(conn);
        }
    }

    /// Everything `status` shows of it.
    pub fn snapshot(&mut self, now: Time, sources: &Sources) -> UpstreamSnapshot {
        self.refresh_discards();
        let pool = &self.pool;
        let one_way = self.sockets.values().map(|socket| socket.discard);
        let discard = one_way
            .filter(|discard| *discard != Discard::None)
            .max_by_key(|discard| *discard == Discard::Drain);
        let discard = match (discard, self.config.url.protocol) {
            (Some(discard), _) => discard,
            (None, Protocol::UdpWriteOnly) => Discard::Filter,
            (None, Protocol::Tcp | Protocol::Udp) => Discard::None,
        };
        let connection = |(conn, record): (ConnId, &Conn)| {
            let socket = self.sockets.get(conn);
            let holder = pool.holder(conn).and_then(|owner| sources.session_id(owner.source));
            ConnectionSnapshot {
                protocol: self.config.url.protocol.scheme(),
                role: record.role.name(),
                remote: record.remote.to_string(),
                local: socket.and_then(|s| s.local).map(|local| local.to_string()),
                fd: socket.map_or(-1, |socket| socket.fd.as_raw_fd()),
                state: record.state.name(),
                age_s: now.since(record.opened_at).as_secs(),
                uses: record.uses,
                messages_out: record.messages_out,
                bytes_out: record.bytes_out,
                messages_in: record.messages_in,
                bytes_in: record.bytes_in,
                replies_discarded: record.replies_discarded,
                session: holder,
            }
        };
        let address = |health: Health| AddressSnapshot {
            address: health.remote.to_string(),
            breaker: health.breaker.name(),
            outstanding: health.outstanding,
            connections: health.conns,
            failures: health.failures,
            last_failure: health.last_failure.map(Reason::name),
        };
        let name = |lookup: &Lookup| NameSnapshot {
            name: lookup.host.clone(),
            lookups: lookup.lookups,
            failures: lookup.failures,
            lookup_ms: u64::try_from(lookup.took.as_millis()).unwrap_or(u64::MAX),
            age_s: now.since(lookup.ended_at).as_secs(),
            addresses: lookup.addresses,
            error: lookup.error.clone(),
        };
        let maxwait = pool.oldest_waiter().map_or(Duration::ZERO, |since| now.since(since));
        UpstreamSnapshot {
            name: self.config.name.clone(),
            is_broadcast: self.copies.is_some(),
            protocol: self.config.url.protocol.scheme(),
            addresses: pool.health().map(|health| health.remote.to_string()).collect(),
            address_health: pool.health().map(address).collect(),
            names: self.lookups.iter().map(name).collect(),
            discard: discard.name(),
            replies_discarded: pool.replies_discarded(),
            breaker: pool.breaker().name(),
            last_failure: pool.last_failure().map(Reason::name),
            accepted: pool.ledger.accepted,
            sent: pool.ledger.sent,
            dropped: by_reason(&pool.ledger.dropped),
            expired: pool.ledger.expired,
            queued: pool.queued(),
            in_doubt: pool.ledger.in_doubt,
            redelivered: self.redelivered,
            icmp_refused: self.icmp_refused,
            requests: pool.counts.requests,
            replied: pool.counts.replied,
            timed_out: pool.counts.timed_out,
            refused: by_reason(&pool.counts.refused),
            failed: by_reason(&pool.counts.failed),
            in_flight: pool.in_flight() as u64,
            waiters: pool.waiters() as u64,
            maxwait_ms: u64::try_from(maxwait.as_millis()).unwrap_or(u64::MAX),
            retried: pool.retried,
            retransmitted: pool.retransmitted,
            leases: {
                let counts = pool.lease_counts();
                LeaseSnapshot {
                    asked: counts.asked,
                    granted: counts.granted,
                    returned: counts.returned,
                    held: pool.leases_held() as u64,
                    waiting: pool.lease_waiters() as u64,
                    refused: by_reason(&counts.refused),
                    ended: by_reason(&counts.ended),
                }
            },
            connections: pool.conns().map(connection).collect(),
            connections_opened: pool.opened,
            connections_closed: by_reason(&pool.closed),
        }
    }

    // Carrying out.

    fn carry_out(&mut self, cx: &mut Context<'_>) {
        while let Some(action) = self.pool.poll_action() {
            match action {
                Action::Connect { conn, role, remote } => self.connect(cx, conn, role, remote),
                Action::Dispatch { conn, request, tag } => self.dispatch(conn, request, tag),
                Action::Resend { conn, tag } => self.resend(conn, tag),
                Action::Forget { conn, tag } => self.forget(conn, tag),
                Action::Lend { conn, lease, owner } => self.pass_on(cx, conn, lease, owner),
                Action::RefuseLease { owner, reason } => {
                    let failure = self.failure(RequestEnd::Refused(reason), false);
                    cx.sources.refuse_lease(owner, &failure);
                }
                Action::Revoke { conn } => self.revoke(conn),
                Action::Fail { request, owner, end, left, was_sent_before } => {
                    let was_sent = self.recall(cx.now, request, left) || was_sent_before;
                    let failure = self.failure(end, was_sent);
                    cx.sources.fail(owner, failure);
                }
                Action::Drain { conn } => {
                    let finished = self.sockets.get(conn).map(|s| tcp::finish_writing(&s.fd));
                    if !matches!(finished, Some(Ok(()))) {
                        self.pool.handle_lost(cx.now, conn, Reason::PeerReset, 0);
                    }
                }
                Action::Retire { conn } => self.retire(conn),
                Action::Close { conn, reason } => self.close(cx, conn, reason),
                Action::Discard { lane, skip, bytes } => {
                    self.lanes[lane].send_buffer.cut(skip, bytes);
                }
                Action::Settle { source, settled, messages } => {
                    let is_copy = self.account != self.index;
                    cx.sources.settle(source, self.account, settled, messages, is_copy);
                }
            }
        }
    }

    fn connect(&mut self, cx: &mut Context<'_>, conn: ConnId, role: Role, remote: SocketAddr) {
        let is_tcp = self.config.url.protocol == Protocol::Tcp;
        let opened = if is_tcp {
            tcp::start_connect(remote, &self.config.limits).map(|fd| (fd, Discard::None))
        } else {
            if role != Role::Exchange {
                self.udp.forget_route();
            }
            let takes_replies = self.config.url.protocol != Protocol::UdpWriteOnly;
            udp::open(remote, takes_replies && role == Role::Exchange)
        };
        let opened = opened.and_then(|(fd, discard)| {
            let target = Target::Conn { upstream: self.index, conn };
            let token = match is_tcp {
                true => cx.poller.watch(&fd, target)?,
                false => cx.poller.watch_datagrams(&fd, target)?,
            };
            Ok((fd, discard, token))
        });
        let (fd, discard, token) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                let reason = connect_failure(error);
                tracing::debug!(upstream = self.config.name, %remote, %error, "connect failed");
                self.pool.handle_connect_failed(cx.now, conn, reason);
                return;
            }
        };
        let local = local_address(&fd);
        let bytes_max = self.config.limits.message_bytes_max;
        let has_ids = self.config.url.id.is_some();
        let exchange = Exchange::new(self.config.url.framing, has_ids, bytes_max);
        self.sockets.insert(
            conn,
            Socket {
                fd,
                token,
                local,
                phase: if is_tcp { Phase::Connecting } else { Phase::Up },
                is_readable: false,
                is_writable: !is_tcp,
                waits_for_room: false,
                is_ending: false,
                is_watched: true,
                discard,
                drops_seen: 0,
                exchange,
                input: None,
            },
        );
        if !is_tcp {
            self.pool.handle_connected(cx.now, conn);
        }
    }

    fn finish_connect(&mut self, now: Time, conn: ConnId) {
        let Some(socket) = self.sockets.get_mut(conn) else {
            return;
        };
        match tcp::connect_result(&socket.fd) {
            Ok(()) => {
                socket.local = local_address(&socket.fd);
                if let Err(reason) = self.greet(now, conn, 0) {
                    self.pool.handle_connect_failed(now, conn, reason);
                }
            }
            Err(error) => {
                let reason = connect_failure(error);
                if self.pool.last_failure() != Some(reason) {
                    tracing::warn!(
                        upstream = self.config.name, url = %self.config.url, %error,
                        "cannot connect; trying again with backoff"
                    );
                }
                self.pool.handle_connect_failed(now, conn, reason);
            }
        }
    }

    fn close(&mut self, cx: &mut Context<'_>, conn: ConnId, reason: Reason) {
        self.refresh_discard(conn);
        let mut unacknowledged = 0;
        if let Some(socket) = self.sockets.remove(conn) {
            tracing::debug!(
                upstream = self.config.name, fd = socket.fd.as_raw_fd(), %reason,
                "connection closed"
            );
            if self.config.url.protocol == Protocol::Tcp && socket.phase != Phase::Connecting {
                unacknowledged = sockopt::unacknowledged_bytes(&socket.fd).unwrap_or(0);
            }
            cx.poller.unwatch(&socket.fd, socket.token);
            if let Some(buffer) = socket.input {
                cx.spares.put_back(buffer);
            }
            // Whoever borrowed it may have made that take long: SO_LINGER (socket(7)).
            if self.pool.conn(conn).is_some_and(Conn::was_lent) {
                cx.closer.close(socket.fd);
            }
        }
        self.pool.handle_closed(cx.now, conn, unacknowledged);
    }

    /// Nothing that comes from now on is read; what came before is counted here.
    fn retire(&mut self, conn: ConnId) {
        let Some(socket) = self.sockets.get_mut(conn) else {
            return;
        };
        // Before the filter, so that none of its drops is missed.
        socket.drops_seen = sockopt::mem_info(&socket.fd).map_or(0, |info| info.drops);
        socket.discard = udp::make_deaf(&socket.fd);
        for _ in 0..READS_MAX {
            let Some(Ok((count, is_readable))) =
                self.replies.as_mut().map(|replies| replies.receive(&socket.fd))
            else {
                return;
            };
            if let Some(record) = self.pool.conn_mut(conn) {
                record.replies_discarded += count as u64;
            }
            if !is_readable {
                return;
            }
        }
    }

    fn refresh_discard(&mut self, conn: ConnId) {
        let Some(socket) = self.sockets.get_mut(conn) else {
            return;
        };
        if socket.discard != Discard::Filter {
            return;
        }
        if let Ok(info) = sockopt::mem_info(&socket.fd)
            && let Some(record) = self.pool.conn_mut(conn)
        {
            // The kernel's counter is 32 bits and wraps; its differences do not lie.
            record.replies_discarded += u64::from(info.drops.wrapping_sub(socket.drops_seen));
            socket.drops_seen = info.drops;
        }
    }

    fn read(&mut self, cx: &mut Context<'_>, conn: ConnId) {
        for _ in 0..READS_MAX {
            let Some(socket) = self.sockets.get(conn) else {
                return;
            };
            if !socket.is_readable {
                return;
            }
            let takes_more = match self.config.url.protocol {
                Protocol::Tcp => self.read_stream(cx, conn),
                Protocol::Udp | Protocol::UdpWriteOnly => self.read_datagrams(cx, conn),
            };
            if !takes_more {
                return;
            }
        }
        self.unread.push(conn);
    }

    // Words.

    /// Why a request never gets in, and what of it.
    fn refusal(&self, reason: Reason, what: &str) -> Failure {
        let mut failure = self.failure(RequestEnd::Refused(reason), false);
        if !what.is_empty() {
            failure.text.push_str(": ");
            failure.text.extend(what.chars().take(CLIENT_TEXT_CHARS_MAX));
        }
        if reason == Reason::Stateful {
            failure.text.push_str(
                "; use a lease, a connection of one's own (lease = true, client library)",
            );
        }
        failure
    }

    fn failure(&self, end: RequestEnd, was_sent: bool) -> Failure {
        let reason = match end {
            RequestEnd::TimedOut => Reason::RequestTimeout,
            RequestEnd::Refused(reason) | RequestEnd::Failed(reason) => reason,
            RequestEnd::Replied => Reason::Internal,
        };
        let retry = if was_sent { Retry::MaybeExecuted } else { Retry::NotSent };
        let (name, url, limits) = (&self.config.name, &self.config.url, &self.config.limits);
        let detail = match reason {
            Reason::WaitersFull => format!(" (waiters_max = {})", limits.waiters_max),
            Reason::WaitTimeout => format!(
                " (wait_timeout = {:?}, connections_max = {})",
                limits.wait_timeout, limits.connections_max
            ),
            Reason::TooLong | Reason::ReplyTooLong => {
                format!(" ({} bytes)", limits.message_bytes_max)
            }
            Reason::WriteOnly => "; use send, or configure it as udp://".to_owned(),
            Reason::RequestTimeout if !was_sent => {
                let last = self.pool.last_failure();
                last.map_or_else(
                    || "; it was still waiting for a connection".to_owned(),
                    |last| format!("; it was still waiting for a connection: {last}"),
                )
            }
            _ => String::new(),
        };
        let text = format!("upstream {name} ({url}): {reason}{detail}");
        Failure { reason, retry, text }
    }
}

fn local_address(fd: &OwnedFd) -> Option<SocketAddr> {
    SocketAddr::try_from(rustix::net::getsockname(fd).ok()?).ok()
}
