//! One upstream at work: carries out what its [`Pool`] decides, on real sockets.
//!
//! Bytes lie here and nowhere else: one-way messages back to back in the send buffer of their lane,
//! the body of a waiting request under its id, the request being written on its connection.
//! Everything that sources must learn goes through [`Sources`].

use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use poolbroker_proto::address::Protocol;
use poolbroker_proto::framing::{Cut, Cutter, Framing};
use poolbroker_proto::message::{Failure, Retry};
use poolbroker_proto::reason::Reason;
use rustix::io::Errno;
use slotmap::SecondaryMap;

use super::Target;
use super::sources::Sources;
use crate::buffer::{ReceiveBuffer, SendBuffer, Spares};
use crate::coalesce::Coalescer;
use crate::config::{BATCHES_MAX, READS_MAX};
use crate::config::{BrokerLimits, Overflow, UpstreamConfig};
use crate::ids::{ConnId, RequestId, SourceId};
use crate::inflight::Owner;
use crate::poller::{Poller, Readiness, Token};
use crate::pool::{Acquire, Action, After, Conn, Pool, PoolSettings, Role, State};
use crate::quota::Charge;
use crate::separator::Separator;
use crate::snapshot::{ConnectionSnapshot, UpstreamSnapshot, by_reason};
use crate::stats::RequestEnd;
use crate::timers::Time;
use crate::upstream::udp::{self, Discard, Unsent};
use crate::upstream::{broken, connect_failure, sockopt, tcp};

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
    wire: Wire,
    /// In the order of the pool's.
    lanes: Vec<LaneIo>,
    scratch: Vec<u8>,
    sockets: SecondaryMap<ConnId, Socket>,
    bodies: SecondaryMap<RequestId, Body>,
    /// Sources that found the queue full.
    blocked: Vec<SourceId>,
    /// Connections with more to read than one turn allows.
    unread: Vec<ConnId>,
    /// Connections that took no more when they were written to.
    full: Vec<ConnId>,
    udp: udp::Sender,
    replies: udp::Receiver,
    nobuf_backoff: (Duration, Duration),
    icmp_refused: u64,
    redelivered: u64,
}

/// The I/O half of a lane.
#[derive(Debug, Default)]
struct LaneIo {
    send_buffer: SendBuffer,
    /// The datagram at the front was refused once.
    is_retry: bool,
    pause: Option<Pause>,
}

/// How a body becomes a one-way message in a send buffer.
#[derive(Debug)]
enum Wire {
    /// With the marks of a framing; a datagram is its own message, and raw.
    Framed(Framing),
    /// With a separator behind it, so that it can share a datagram.
    Separated(Separator),
}

impl Wire {
    fn overhead_bytes(&self) -> usize {
        match self {
            Wire::Framed(framing) => framing.overhead_bytes(),
            Wire::Separated(separator) => separator.bytes().len(),
        }
    }

    /// The bytes at the end of a datagram that are not sent.
    fn gap(&self) -> usize {
        match self {
            Wire::Framed(_) => 0,
            Wire::Separated(separator) => separator.bytes().len(),
        }
    }

    /// Appends `body` as one message, or leaves `out` as it is and says why.
    fn encode(&self, body: &[u8], is_line: bool, out: &mut Vec<u8>) -> Result<(), Reason> {
        match self {
            Wire::Framed(framing) if is_line => framing.encode_line(body, out),
            Wire::Framed(framing) => framing.encode(body, out),
            Wire::Separated(separator) if separator.is_in(body) => Err(Reason::Delimiter),
            Wire::Separated(separator) => {
                out.extend_from_slice(body);
                out.extend_from_slice(separator.bytes());
                Ok(())
            }
        }
    }

    /// The same for a body that `copy` appends. It is looked at only after that: the original lies
    /// in memory that others write to (M5).
    fn encode_copied(
        &self,
        copy: impl FnOnce(&mut Vec<u8>),
        scratch: &mut Vec<u8>,
        out: &mut Vec<u8>,
    ) -> Result<(), Reason> {
        let before = out.len();
        match self {
            Wire::Framed(Framing::Raw) => copy(out),
            Wire::Framed(framing) => {
                scratch.clear();
                copy(scratch);
                return framing.encode(scratch, out);
            }
            Wire::Separated(separator) => {
                copy(out);
                if separator.is_in(&out[before..]) {
                    out.truncate(before);
                    return Err(Reason::Delimiter);
                }
                out.extend_from_slice(separator.bytes());
            }
        }
        Ok(())
    }
}

/// ENOBUFS: nothing is sent until then.
#[derive(Debug, Clone, Copy)]
struct Pause {
    until: Time,
    length: Duration,
}

/// The I/O half of a connection.
#[derive(Debug)]
struct Socket {
    fd: OwnedFd,
    token: Token,
    local: Option<SocketAddr>,
    is_connected: bool,
    is_readable: bool,
    is_writable: bool,
    /// A datagram socket that was full, and is watched for room.
    waits_for_room: bool,
    is_ending: bool,
    discard: Discard,
    drops_seen: u32,
    /// The request that it carries, once it is being written; a request that was only granted
    /// this connection has no reply yet.
    exchange: Option<Exchange>,
    input: Option<ReceiveBuffer>,
    cutter: Cutter,
}

/// The bytes of a request, charged to its user while they are here.
#[derive(Debug)]
struct Body {
    bytes: Vec<u8>,
    _charge: Charge,
}

/// A request on its connection.
#[derive(Debug)]
struct Exchange {
    request: RequestId,
    body: Body,
    written: usize,
}

impl Exchange {
    fn is_begun(&self) -> bool {
        self.written > 0
    }

    fn is_written(&self) -> bool {
        self.written == self.body.bytes.len()
    }
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
        let settings = PoolSettings { protocol, limits, requests_refused, coalescer, seed };
        let pool = Pool::new(settings);
        Upstream {
            wire,
            lanes: (0..pool.lane_count()).map(|_| LaneIo::default()).collect(),
            pool,
            udp: udp::Sender::new(config.limits.gso_segments_max),
            config,
            index,
            scratch: Vec::new(),
            sockets: SecondaryMap::new(),
            bodies: SecondaryMap::new(),
            blocked: Vec::new(),
            unread: Vec::new(),
            full: Vec::new(),
            replies: udp::Receiver::new(),
            nobuf_backoff: (broker.nobuf_backoff_min, broker.nobuf_backoff_max),
            icmp_refused: 0,
            redelivered: 0,
        }
    }

    /// When [`Upstream::handle_timeout`] is due.
    pub fn next_deadline(&self) -> Option<Time> {
        let pauses = self.lanes.iter().filter_map(|lane| lane.pause).map(|pause| pause.until);
        self.pool.next_deadline().into_iter().chain(pauses).min()
    }

    /// Whether there is work that no event will announce.
    pub fn has_work(&self) -> bool {
        !self.unread.is_empty() || self.has_to_send(1)
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

    /// `messages` of those accepted may have been sent by an earlier broker.
    pub fn count_redelivered(&mut self, messages: u64) {
        self.redelivered += messages;
    }

    /// Accepts the staged messages of `source`; how many they are.
    pub fn accept(&mut self, now: Time, source: SourceId) -> u64 {
        self.pool.accept(now, source)
    }

    /// Remembers that a source waits for room.
    pub fn block(&mut self, source: SourceId) {
        self.blocked.push(source);
    }

    /// Starts a request; its end comes through [`Sources`], unless it is refused at once.
    pub fn request(
        &mut self,
        now: Time,
        owner: Owner,
        body: &[u8],
        timeout: Option<Duration>,
        charge: Charge,
    ) -> Result<RequestId, Failure> {
        let refused = if body.is_empty() {
            Some(Reason::Empty)
        } else if body.len() > self.config.limits.message_bytes_max {
            Some(Reason::TooLong)
        } else {
            None
        };
        let mut bytes = Vec::new();
        let encoded = match refused {
            Some(reason) => Err(reason),
            None => self.request_framing().encode(body, &mut bytes),
        };
        if let Err(reason) = encoded {
            self.pool.refuse_request(reason);
            return Err(self.failure(RequestEnd::Refused(reason), false));
        }
        match self.pool.request(now, owner, timeout.map(|timeout| now + timeout)) {
            Acquire::Granted { request, conn } => {
                self.write_request(now, conn, request, Body { bytes, _charge: charge });
                Ok(request)
            }
            Acquire::Queued { request } => {
                self.bodies.insert(request, Body { bytes, _charge: charge });
                Ok(request)
            }
            Acquire::Refused(reason) => Err(self.failure(RequestEnd::Refused(reason), false)),
        }
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
        if !socket.is_connected {
            if readiness.is_writable() {
                self.finish_connect(cx.now, conn);
            }
            if !self.sockets.get(conn).is_some_and(|socket| socket.is_connected) {
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
            self.write_rest(cx.now, conn);
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
        for conn in std::mem::take(&mut self.unread) {
            self.read(cx, conn);
        }
        self.carry_out(cx);
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
        if !self.blocked.is_empty() && self.pool.has_room_again() {
            for source in self.blocked.drain(..) {
                cx.sources.unblock(source);
            }
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
        let maxwait = pool.oldest_waiter().map_or(Duration::ZERO, |since| now.since(since));
        UpstreamSnapshot {
            name: self.config.name.clone(),
            protocol: self.config.url.protocol.scheme(),
            addresses: pool.addresses().iter().map(ToString::to_string).collect(),
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
                Action::Dispatch { conn, request } => {
                    // The connection may have been lost meanwhile; the request waits again then.
                    if self.pool.request_on(conn) == Some(request)
                        && let Some(body) = self.bodies.remove(request)
                    {
                        self.write_request(cx.now, conn, request, body);
                    }
                }
                Action::Fail { request, owner, end, was_sent } => {
                    self.bodies.remove(request);
                    let failure = self.failure(end, was_sent);
                    cx.sources.fail(owner, failure);
                }
                Action::Drain { conn } => {
                    let finished = self.sockets.get(conn).map(|s| tcp::finish_writing(&s.fd));
                    if !matches!(finished, Some(Ok(()))) {
                        self.pool.handle_lost(cx.now, conn, Reason::PeerReset, false);
                    }
                }
                Action::Retire { conn } => self.retire(conn),
                Action::Close { conn, reason } => self.close(cx, conn, reason),
                Action::Discard { lane, skip, bytes } => {
                    self.lanes[lane].send_buffer.cut(skip, bytes);
                }
                Action::Settle { source, settled, messages } => {
                    cx.sources.settle(source, self.index, settled, messages);
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
            udp::open(remote, role == Role::Exchange)
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
        let cutter = Cutter::new(self.config.url.framing, self.config.limits.message_bytes_max);
        self.sockets.insert(
            conn,
            Socket {
                fd,
                token,
                local,
                is_connected: !is_tcp,
                is_readable: false,
                is_writable: !is_tcp,
                waits_for_room: false,
                is_ending: false,
                discard,
                drops_seen: 0,
                exchange: None,
                input: None,
                cutter,
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
                socket.is_connected = true;
                socket.local = local_address(&socket.fd);
                if self.pool.last_failure().is_some() {
                    tracing::info!(upstream = self.config.name, "connected again");
                }
                self.pool.handle_connected(now, conn);
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
            if self.config.url.protocol == Protocol::Tcp && socket.is_connected {
                unacknowledged = sockopt::unacknowledged_bytes(&socket.fd).unwrap_or(0);
            }
            cx.poller.unwatch(&socket.fd, socket.token);
            if let Some(buffer) = socket.input {
                cx.spares.put_back(buffer);
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
            let Ok((count, is_readable)) = self.replies.receive(&socket.fd) else {
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

    // Requests.

    fn write_request(&mut self, now: Time, conn: ConnId, request: RequestId, body: Body) {
        let Some(socket) = self.sockets.get_mut(conn) else { return };
        socket.exchange = Some(Exchange { request, body, written: 0 });
        let checked = match self.config.url.protocol {
            Protocol::Tcp => tcp::check_reusable(&socket.fd),
            Protocol::Udp | Protocol::UdpWriteOnly => udp::check_reusable(&socket.fd),
        };
        if let Err(reason) = checked {
            return self.lose(now, conn, reason);
        }
        self.write_rest(now, conn);
    }

    fn write_rest(&mut self, now: Time, conn: ConnId) {
        let Some(socket) = self.sockets.get_mut(conn) else { return };
        let Some(exchange) = &mut socket.exchange else { return };
        let mut is_retry = false;
        while !exchange.is_written() && socket.is_writable {
            match tcp::write(&socket.fd, &exchange.body.bytes[exchange.written..]) {
                Ok(bytes) => {
                    exchange.written += bytes;
                    if let Some(record) = self.pool.conn_mut(conn) {
                        record.bytes_out += bytes as u64;
                    }
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    socket.is_writable = false;
                    self.full.push(conn);
                }
                // The error of an earlier datagram on this socket (E10).
                Err(Errno::CONNREFUSED) if !is_retry => is_retry = true,
                Err(error) => return self.lose(now, conn, broken(error)),
            }
        }
    }

    /// A connection is of no use any more. A request of which no byte left gets its body back.
    fn lose(&mut self, now: Time, conn: ConnId, reason: Reason) {
        let exchange = self.sockets.get_mut(conn).and_then(|socket| socket.exchange.take());
        let untouched = exchange.as_ref().is_none_or(|exchange| !exchange.is_begun());
        if untouched && let Some(Exchange { request, body, .. }) = exchange {
            self.bodies.insert(request, body);
        }
        self.pool.handle_lost(now, conn, reason, untouched);
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

    // Reading.

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

    /// Reads once and cuts what came into replies; whether to read again.
    fn read_stream(&mut self, cx: &mut Context<'_>, conn: ConnId) -> bool {
        let Some(socket) = self.sockets.get_mut(conn) else {
            return false;
        };
        let buffer = socket.input.get_or_insert_with(|| cx.spares.take());
        let room = buffer.room();
        let len = room.len();
        let end = match tcp::read(&socket.fd, room) {
            Ok(0) => Some(Reason::PeerClosed),
            Ok(bytes) => {
                buffer.fill(bytes);
                socket.is_readable = bytes == len || socket.is_ending;
                if let Some(record) = self.pool.conn_mut(conn) {
                    record.bytes_in += bytes as u64;
                }
                None
            }
            Err(Errno::AGAIN) => {
                socket.is_readable = false;
                None
            }
            Err(Errno::INTR) => None,
            Err(error) => Some(broken(error)),
        };
        let mut lost = self.cut_replies(cx, conn);
        if let Some(socket) = self.sockets.get_mut(conn)
            && socket.input.as_ref().is_some_and(ReceiveBuffer::is_empty)
            && let Some(buffer) = socket.input.take()
        {
            cx.spares.put_back(buffer);
        }
        lost = lost.or(end);
        if let Some(reason) = lost {
            if let Some(socket) = self.sockets.get_mut(conn) {
                socket.is_readable = false;
            }
            self.lose(cx.now, conn, reason);
        }
        lost.is_none()
    }

    /// Delivers the complete replies in a connection's buffer; why the connection is lost, if so.
    fn cut_replies(&mut self, cx: &mut Context<'_>, conn: ConnId) -> Option<Reason> {
        let socket = self.sockets.get_mut(conn)?;
        let buffer = socket.input.as_mut()?;
        loop {
            let role = self.pool.conn(conn)?.role;
            let is_asked = socket.exchange.as_ref().is_some_and(Exchange::is_begun);
            if role == Role::Exchange && !buffer.is_empty() && !is_asked {
                return Some(Reason::Unsolicited);
            }
            match socket.cutter.next_cut(buffer.unread()) {
                Cut::Message { body, consumed } => {
                    let body = &buffer.unread()[body];
                    let exchange = socket.exchange.take();
                    let is_last = consumed == buffer.unread().len()
                        && exchange.is_some_and(|exchange| exchange.is_written());
                    let after = if is_last { After::Nothing } else { After::Surplus };
                    let deliverable =
                        self.pool.holder(conn).is_none_or(|owner| cx.sources.can_take(owner, body));
                    let owner = self.pool.handle_reply(cx.now, conn, after, deliverable);
                    if let Some(owner) = owner {
                        cx.sources.reply(owner, body);
                    }
                    buffer.consume(consumed);
                    let closing = matches!(self.pool.conn(conn)?.state, State::Closing { .. });
                    if closing {
                        return None;
                    }
                }
                Cut::Refused { reason: _, consumed } if role != Role::Exchange => {
                    buffer.consume(consumed);
                    self.pool.conn_mut(conn)?.replies_discarded += 1;
                }
                Cut::Refused { .. } => return Some(Reason::ReplyTooLong),
                Cut::Skipped { consumed } => buffer.consume(consumed),
                Cut::Incomplete => return None,
            }
        }
    }

    /// Reads what one call gives; whether to read again.
    fn read_datagrams(&mut self, cx: &mut Context<'_>, conn: ConnId) -> bool {
        let Some(socket) = self.sockets.get_mut(conn) else {
            return false;
        };
        if socket.discard == Discard::Filter {
            socket.is_readable = false;
            return false;
        }
        let mut lost = None;
        match self.replies.receive(&socket.fd) {
            Ok((count, is_readable)) => {
                socket.is_readable = is_readable;
                let discards = socket.discard == Discard::Drain;
                for body in (0..count).map(|index| self.replies.datagram(index)) {
                    let exchange = socket.exchange.take_if(|exchange| exchange.is_begun());
                    let holder = exchange.and_then(|_| self.pool.holder(conn));
                    if let Some(record) = self.pool.conn_mut(conn) {
                        record.bytes_in += body.len() as u64;
                        record.replies_discarded += u64::from(discards || holder.is_none());
                    }
                    match holder {
                        _ if discards => {}
                        None => lost = Some(Reason::Unsolicited),
                        Some(owner) => {
                            let deliverable = cx.sources.can_take(owner, body);
                            let owner =
                                self.pool.handle_reply(cx.now, conn, After::Nothing, deliverable);
                            if let Some(owner) = owner {
                                cx.sources.reply(owner, body);
                            }
                        }
                    }
                }
            }
            Err(Errno::AGAIN) => socket.is_readable = false,
            Err(Errno::INTR) => {}
            // Reported for a datagram of this socket, which then carries a request or is idle.
            Err(error) => lost = self.pool.holder(conn).map(|_| broken(error)),
        }
        if let Some(reason) = lost {
            self.lose(cx.now, conn, reason);
        }
        self.sockets.get(conn).is_some_and(|socket| socket.is_readable) && lost.is_none()
    }

    // Sending one-way messages.

    fn request_framing(&self) -> Framing {
        match self.config.url.protocol {
            Protocol::Tcp => self.config.url.framing,
            // A datagram is its own message.
            Protocol::Udp | Protocol::UdpWriteOnly => Framing::Raw,
        }
    }

    fn writable_one_way(&self, lane: usize) -> Option<ConnId> {
        let conn = self.pool.sending_conn(lane)?;
        self.sockets.get(conn)?.is_writable.then_some(conn)
    }

    fn send_stream(&mut self, now: Time, lane: usize) {
        while let Some(conn) = self.writable_one_way(lane)
            && let Some(socket) = self.sockets.get_mut(conn)
        {
            let send_buffer = &mut self.lanes[lane].send_buffer;
            let written = self.pool.outbox(lane).front_written();
            let unsent = &send_buffer.unsent()[written..];
            match tcp::write(&socket.fd, unsent) {
                Ok(bytes) => {
                    socket.is_writable = bytes == unsent.len();
                    let done = self.pool.handle_written(now, conn, bytes);
                    send_buffer.consume(done);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => socket.is_writable = false,
                Err(error) => return self.lose(now, conn, broken(error)),
            }
        }
    }

    fn send_datagrams(&mut self, now: Time, lane: usize, mut last_pause: Duration) {
        let gap = self.wire.gap();
        for _ in 0..BATCHES_MAX {
            let Some(conn) = self.writable_one_way(lane) else {
                return;
            };
            let Some(socket) = self.sockets.get_mut(conn) else {
                return;
            };
            let mut lens = [0; udp::BATCH_MAX];
            let count = self.pool.outbox(lane).next_datagrams(&mut lens);
            if count == 0 {
                return;
            }
            let LaneIo { send_buffer, is_retry, pause } = &mut self.lanes[lane];
            let result = self.udp.send(&socket.fd, send_buffer.unsent(), &lens[..count], gap);
            let done = match result {
                Ok(datagrams) => self.pool.handle_sent(now, conn, datagrams),
                Err(Unsent::WouldBlock) => {
                    socket.is_writable = false;
                    self.full.push(conn);
                    return;
                }
                Err(Unsent::Refused) if !*is_retry => {
                    *is_retry = true;
                    continue;
                }
                Err(Unsent::NoBuffers) if last_pause < self.nobuf_backoff.1 => {
                    let (shortest, longest) = self.nobuf_backoff;
                    let length = (last_pause * 2).clamp(shortest, longest);
                    *pause = Some(Pause { until: now + length, length });
                    return;
                }
                Err(unsent) => {
                    let reason = match unsent {
                        Unsent::NoBuffers => Reason::Enobufs,
                        Unsent::TooBig => Reason::TooBig,
                        Unsent::Refused => Reason::ConnectRefused,
                        Unsent::Failed(_) | Unsent::WouldBlock => Reason::SendError,
                    };
                    self.pool.handle_unsendable(now, conn, reason)
                }
            };
            *is_retry = false;
            last_pause = Duration::ZERO;
            send_buffer.consume(done);
        }
    }
}

fn local_address(fd: &OwnedFd) -> Option<SocketAddr> {
    SocketAddr::try_from(rustix::net::getsockname(fd).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn copied(wire: &Wire, body: &[u8]) -> (Result<(), Reason>, Vec<u8>) {
        let mut out = b"before".to_vec();
        let copy = |out: &mut Vec<u8>| out.extend_from_slice(body);
        let result = wire.encode_copied(copy, &mut b"scratch".to_vec(), &mut out);
        (result, out)
    }

    #[test]
    fn a_copy_is_checked_like_the_body_itself_and_taken_away_again_if_it_is_refused() {
        let wires = [
            Wire::Framed(Framing::Raw),
            Wire::Framed(Framing::Lines),
            Wire::Framed(Framing::Crlf),
            Wire::Separated(Separator::new(b"\n")),
            Wire::Separated(Separator::new(b"::")),
            Wire::Separated(Separator::new(b"")),
        ];
        for wire in &wires {
            for body in [&b"one"[..], b"a\nb", b"a::b", b"a:", b"\r"] {
                let mut out = b"before".to_vec();
                let result = wire.encode(body, false, &mut out);
                assert_eq!(copied(wire, body), (result, out.clone()), "{wire:?} {body:?}");
                match result {
                    Ok(()) => assert_eq!(out.len(), 6 + body.len() + wire.overhead_bytes()),
                    Err(reason) => {
                        assert_eq!((reason, &out[..]), (Reason::Delimiter, &b"before"[..]))
                    }
                }
            }
        }
        assert_eq!(copied(&wires[3], b"a\nFORGED").0, Err(Reason::Delimiter));
        assert_eq!(copied(&wires[4], b"a:").0, Err(Reason::Delimiter));
        assert_eq!(copied(&wires[0], b"a\nb").0, Ok(()));
    }
}
