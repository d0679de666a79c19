//! Requests and replies: writing the ones, and giving the others to whom they belong.
//!
//! A request is copied once, into the buffer of the connection that it was granted; one that waits
//! for a connection keeps its bytes under its id. What was granted during a turn is written at its
//! end, all of a connection in one call.

use std::collections::VecDeque;
use std::time::Duration;

use poolbroker_proto::address::Protocol;
use poolbroker_proto::framing::{Expect, Framing, ReplyCut, ReplyCutter, Verdict};
use poolbroker_proto::message::Failure;
use poolbroker_proto::reason::Reason;
use rustix::io::Errno;

use super::{Context, Phase, Upstream};
use crate::buffer::{ReceiveBuffer, SendBuffer};
use crate::ids::{ConnId, RequestId};
use crate::inflight::Owner;
use crate::pool::{Acquire, Left, Role, State};
use crate::quota::Charge;
use crate::stats::RequestEnd;
use crate::tagged::{Tag, Tagged};
use crate::timers::Time;
use crate::upstream::udp::{self, Discard};
use crate::upstream::{broken, tcp};

/// A request as it is written.
#[derive(Debug)]
pub(super) struct Body {
    /// With the marks of its framing.
    bytes: Vec<u8>,
    meta: Meta,
}

/// What is known of a request beside its bytes.
#[derive(Debug)]
struct Meta {
    /// The reply it has, if it has one.
    expect: Option<Expect>,
    /// Where in the bytes the message begins, which carries the id.
    body_at: usize,
    /// The id that the client gave it, and that its reply has to repeat.
    client_id: u64,
    /// For its bytes while they are here.
    charge: Option<Charge>,
}

/// A request on a connection.
#[derive(Debug)]
struct Slot {
    request: RequestId,
    bytes: usize,
    meta: Meta,
    /// Its bytes, where it may have to be sent again.
    kept: Option<Vec<u8>>,
}

/// The requests of one connection.
#[derive(Debug)]
pub(super) struct Exchange {
    /// What is not yet written.
    out: SendBuffer,
    /// What was wholly written.
    written: Tagged<Slot>,
    /// The others, in the order in which they are written.
    unwritten: VecDeque<(Tag, Slot)>,
    /// So many bytes of the first of these were written.
    torn: usize,
    cutter: ReplyCutter,
}

impl Exchange {
    pub(super) fn new(framing: Framing, has_ids: bool, message_bytes_max: usize) -> Self {
        Exchange {
            out: SendBuffer::default(),
            written: Tagged::new(!has_ids),
            unwritten: VecDeque::new(),
            torn: 0,
            cutter: ReplyCutter::new(framing, message_bytes_max),
        }
    }

    /// How many slots have left at least in part.
    fn begun(&self) -> usize {
        self.written.len() + usize::from(self.torn > 0)
    }

    fn is_written(&self) -> bool {
        self.unwritten.is_empty()
    }

    /// The one that is torn.
    fn torn(&self) -> Option<&(Tag, Slot)> {
        self.unwritten.front().filter(|_| self.torn > 0)
    }

    fn is_torn(&self, tag: Tag) -> bool {
        self.torn().is_some_and(|(torn, _)| *torn == tag)
    }

    /// The one whose reply comes next, where they come in order.
    fn front(&self) -> Option<&(Tag, Slot)> {
        self.written.front().or_else(|| self.torn())
    }

    /// The reply that comes next, if one may come.
    fn expected(&self) -> Option<Expect> {
        match self.front() {
            Some((_, slot)) => slot.meta.expect,
            // Replies with ids are all alike.
            None => (!self.written.is_empty()).then_some(Expect::Plain),
        }
    }

    /// The reply that stands at the start of `bytes`.
    pub(super) fn next_reply(&mut self, expect: Option<Expect>, bytes: &[u8]) -> ReplyCut {
        self.cutter.next_reply(expect, bytes)
    }

    fn push(&mut self, tag: Tag, slot: Slot, bytes: &[u8]) {
        let appended = self.out.append::<std::convert::Infallible>(|out| {
            out.extend_from_slice(bytes);
            Ok(())
        });
        debug_assert_eq!(appended, Ok(slot.bytes));
        self.unwritten.push_back((tag, slot));
    }

    /// `bytes` more are written; adds to `silent` what is now written and has no reply.
    fn advance(&mut self, bytes: usize, silent: &mut Vec<Tag>) {
        self.out.consume(bytes);
        self.torn += bytes;
        while let Some((tag, mut slot)) =
            self.unwritten.pop_front_if(|(_, slot)| self.torn >= slot.bytes)
        {
            self.torn -= slot.bytes;
            if slot.kept.is_none() {
                slot.meta.charge = None;
            }
            if slot.meta.expect.is_none() {
                silent.push(tag);
            }
            self.written.push(tag, slot);
        }
    }

    /// Whether a slot has left at least in part.
    fn has_begun(&self, tag: Tag) -> bool {
        self.written.get(tag).is_some() || self.is_torn(tag)
    }

    /// Takes out a slot whose exchange is over. The rest of one that is torn is never written: its
    /// connection is of no use behind that.
    fn take(&mut self, tag: Tag) -> Option<Slot> {
        if let Some(slot) = self.written.take(tag) {
            return Some(slot);
        }
        let (_, slot) = self.unwritten.pop_front_if(|(torn, _)| self.torn > 0 && *torn == tag)?;
        self.out.consume(slot.bytes - self.torn);
        self.torn = 0;
        Some(slot)
    }

    /// Takes a slot back of which nothing was written: whether that was so.
    fn take_back(&mut self, tag: Tag) -> bool {
        if self.has_begun(tag) {
            return false;
        }
        // It may not have come here yet.
        if let Some(place) = self.unwritten.iter().position(|(other, _)| *other == tag) {
            let before: usize = self.unwritten.range(..place).map(|(_, slot)| slot.bytes).sum();
            if let Some((_, slot)) = self.unwritten.remove(place) {
                self.out.cut(before - self.torn, slot.bytes);
            }
        }
        true
    }

    /// Takes out all slots, each with its bytes if these are still here.
    fn take_all(&mut self) -> Vec<(Tag, Slot, Option<Vec<u8>>)> {
        let keep = |(tag, mut slot): (Tag, Slot)| {
            let kept = slot.kept.take();
            (tag, slot, kept)
        };
        let mut all: Vec<_> = self.written.take_all().into_iter().map(keep).collect();
        // The rest of a torn one is of no use.
        let torn = self.unwritten.pop_front_if(|_| self.torn > 0);
        let mut at = torn.as_ref().map_or(0, |(_, slot)| slot.bytes - self.torn);
        all.extend(torn.map(keep));
        for (tag, slot) in self.unwritten.drain(..) {
            let bytes = self.out.unsent().get(at..at + slot.bytes).map(<[u8]>::to_vec);
            at += slot.bytes;
            all.push((tag, slot, bytes));
        }
        (self.out, self.torn) = (SendBuffer::default(), 0);
        all
    }
}

impl Upstream {
    /// Starts a request; its end comes through `Sources`, unless it is refused at once.
    pub fn request(
        &mut self,
        now: Time,
        owner: Owner,
        body: &[u8],
        timeout: Option<Duration>,
        charge: Charge,
    ) -> Result<RequestId, Failure> {
        let mut bytes = std::mem::take(&mut self.scratch);
        bytes.clear();
        let answer = match self.prepare(body, charge, &mut bytes) {
            Err((reason, what)) => {
                self.pool.refuse_request(reason);
                Err(self.refusal(reason, &what))
            }
            Ok((meta, is_last)) => {
                let deadline = timeout.map(|after| now + after);
                match self.pool.request(now, owner, deadline, is_last) {
                    Acquire::Granted { request, conn, tag } => {
                        self.put(conn, request, tag, &mut bytes, meta);
                        Ok(request)
                    }
                    Acquire::Queued { request } => {
                        self.bodies.insert(request, Body { bytes: bytes.clone(), meta });
                        Ok(request)
                    }
                    Acquire::Refused(reason) => {
                        Err(self.failure(RequestEnd::Refused(reason), false))
                    }
                }
            }
        };
        self.scratch = bytes;
        answer
    }

    /// Checks a request and appends it to `bytes` as it is written; whether its connection ends
    /// with it. Or why it cannot be written, and what of it.
    fn prepare(
        &self,
        body: &[u8],
        charge: Charge,
        bytes: &mut Vec<u8>,
    ) -> Result<(Meta, bool), (Reason, String)> {
        let refused = |reason| (reason, String::new());
        if body.is_empty() {
            return Err(refused(Reason::Empty));
        }
        if body.len() > self.config.limits.message_bytes_max {
            return Err(refused(Reason::TooLong));
        }
        let framing = self.request_framing();
        let (expect, is_last) = match framing.classify(body) {
            Verdict::One(expect) => (Some(expect), false),
            Verdict::Last(expect) => (Some(expect), true),
            Verdict::None => (None, false),
            Verdict::Refused { reason, what } => return Err((reason, what)),
        };
        let client_id = match self.config.url.id {
            None => 0,
            Some(field) => field
                .of_request(body)
                .ok_or_else(|| (Reason::Malformed, "it ends before its id".to_owned()))?,
        };
        framing.encode_classified(body, bytes).map_err(refused)?;
        let behind = usize::from(framing == Framing::Netstring);
        let body_at = bytes.len().saturating_sub(body.len() + behind);
        Ok((Meta { expect, body_at, client_id, charge: Some(charge) }, is_last))
    }

    fn request_framing(&self) -> Framing {
        match self.config.url.protocol {
            Protocol::Tcp => self.config.url.framing,
            // A datagram is its own message.
            Protocol::Udp | Protocol::UdpWriteOnly => Framing::Raw,
        }
    }

    /// Appends a request to what its connection writes at the end of the turn.
    fn put(&mut self, conn: ConnId, request: RequestId, tag: Tag, bytes: &mut [u8], meta: Meta) {
        let Some(socket) = self.sockets.get_mut(conn) else { return };
        if let Some(field) = self.config.url.id
            && let Some(body) = bytes.get_mut(meta.body_at..)
        {
            field.set_in_request(body, tag);
        }
        let may_repeat = self.config.is_idempotent || self.config.limits.retransmits > 0;
        let kept = may_repeat.then(|| bytes.to_vec());
        let slot = Slot { request, bytes: bytes.len(), meta, kept };
        let exchange = &mut socket.exchange;
        if exchange.is_written() {
            self.unwritten.push(conn);
        }
        exchange.push(tag, slot, bytes);
    }

    /// A waiting request was granted a connection, which may have been lost meanwhile.
    pub(super) fn dispatch(&mut self, conn: ConnId, request: RequestId, tag: Tag) {
        let is_there = self.pool.slot(conn, tag).is_some_and(|s| s.request == Some(request));
        if is_there && let Some(Body { mut bytes, meta }) = self.bodies.remove(request) {
            self.put(conn, request, tag, &mut bytes, meta);
        }
    }

    /// A request has ended without its reply: whether a byte of it can have left. If none has, it
    /// is taken back from its connection.
    pub(super) fn recall(&mut self, now: Time, request: RequestId, left: Left) -> bool {
        self.bodies.remove(request);
        match left {
            Left::Nothing => false,
            Left::Something => true,
            Left::SeeSlot { conn, tag } => {
                let Some(socket) = self.sockets.get_mut(conn) else { return false };
                if socket.exchange.take_back(tag) {
                    // It was on its way here, or to the socket.
                    self.pool.handle_unsent(now, conn, tag);
                    return false;
                }
                true
            }
        }
    }

    /// Writes what was granted since the last time.
    pub(super) fn write_requests(&mut self, cx: &mut Context<'_>) {
        let mut unwritten = std::mem::take(&mut self.unwritten);
        for conn in unwritten.drain(..) {
            self.begin_writing(cx, conn);
        }
        // The same memory the next time; what was pushed meanwhile comes with the next turn.
        unwritten.append(&mut self.unwritten);
        self.unwritten = unwritten;
    }

    fn begin_writing(&mut self, cx: &mut Context<'_>, conn: ConnId) {
        let Some(socket) = self.sockets.get_mut(conn) else { return };
        // What the last wait did not tell of it had not happened a moment ago.
        let is_known = cx.poller.is_calm() && socket.is_watched && !socket.is_readable;
        let has_rested = socket.exchange.begun() == 0 && !is_known;
        let checked = match self.config.url.protocol {
            Protocol::Tcp if has_rested => tcp::check_reusable(&socket.fd),
            // What came late is known by its id.
            Protocol::Udp if has_rested && self.config.url.id.is_none() => {
                udp::check_reusable(&socket.fd)
            }
            Protocol::Tcp | Protocol::Udp | Protocol::UdpWriteOnly => Ok(()),
        };
        match checked {
            Ok(()) => self.write_rest(cx, conn),
            Err(reason) => self.lose(cx.now, conn, reason),
        }
    }

    /// Writes as much as the socket takes of the requests of a connection.
    pub(super) fn write_rest(&mut self, cx: &mut Context<'_>, conn: ConnId) {
        let Some(socket) = self.sockets.get_mut(conn) else { return };
        let is_stream = self.config.url.protocol == Protocol::Tcp;
        let exchange = &mut socket.exchange;
        let (mut is_retry, mut lost, mut silent) = (false, None, Vec::new());
        while socket.is_writable && !exchange.is_written() {
            let unsent = exchange.out.unsent();
            let next = exchange.unwritten.front().map_or(0, |(_, slot)| slot.bytes);
            let block = if is_stream { unsent } else { unsent.get(..next).unwrap_or(unsent) };
            match tcp::write(&socket.fd, block) {
                Ok(bytes) => {
                    exchange.advance(bytes, &mut silent);
                    is_retry = false;
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
                Err(error) => {
                    lost = Some(broken(error));
                    break;
                }
            }
        }
        // What has no reply is done.
        for tag in silent {
            self.complete(cx, conn, tag, &mut []);
        }
        if let Some(reason) = lost {
            self.lose(cx.now, conn, reason);
        }
    }

    /// Sends a request once more that had no reply.
    pub(super) fn resend(&mut self, conn: ConnId, tag: Tag) {
        if let Some(socket) = self.sockets.get(conn)
            && let Some(bytes) = socket.exchange.written.get(tag).and_then(|s| s.kept.as_ref())
        {
            // What does not get out is lost on the way like any other datagram, but for the error
            // of an earlier one, which stands in its way once (E10).
            if tcp::write(&socket.fd, bytes) == Err(Errno::CONNREFUSED) {
                let _ = tcp::write(&socket.fd, bytes);
            }
        }
    }

    /// The reply of a slot is not expected any more.
    pub(super) fn forget(&mut self, conn: ConnId, tag: Tag) {
        if let Some(socket) = self.sockets.get_mut(conn) {
            socket.exchange.take(tag);
        }
    }

    /// A connection is of no use any more. Requests of which no byte left get their bytes back, and
    /// those that may be repeated.
    pub(super) fn lose(&mut self, now: Time, conn: ConnId, reason: Reason) {
        let mut begun = 0;
        if let Some(socket) = self.sockets.get_mut(conn) {
            begun = socket.exchange.begun();
            for (tag, slot, bytes) in socket.exchange.take_all() {
                let is_awaited = self.pool.slot(conn, tag).is_some_and(|s| s.request.is_some());
                if let Some(bytes) = bytes.filter(|_| is_awaited) {
                    self.bodies.insert(slot.request, Body { bytes, meta: slot.meta });
                }
            }
        }
        self.pool.handle_lost(now, conn, reason, begun);
    }

    /// Reads once and cuts what came into replies; whether to read again.
    pub(super) fn read_stream(&mut self, cx: &mut Context<'_>, conn: ConnId) -> bool {
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
        if lost.is_none() && end == Some(Reason::PeerClosed) {
            self.finish_reply(cx, conn);
        }
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
        let mut buffer = socket.input.take()?;
        let mut lost = self.take_greetings(cx.now, conn, &mut buffer);
        let is_up = self.sockets.get(conn).is_some_and(|socket| socket.phase == Phase::Up);
        let role = self.pool.conn(conn).map(|record| record.role);
        lost = match role.filter(|_| is_up && lost.is_none()) {
            Some(Role::Exchange) => self.take_replies(cx, conn, &mut buffer),
            Some(Role::OneWay { .. }) => {
                self.discard_replies(conn, &mut buffer);
                None
            }
            None => lost,
        };
        match self.sockets.get_mut(conn) {
            Some(socket) => socket.input = Some(buffer),
            None => cx.spares.put_back(buffer),
        }
        lost
    }

    fn take_replies(
        &mut self,
        cx: &mut Context<'_>,
        conn: ConnId,
        buffer: &mut ReceiveBuffer,
    ) -> Option<Reason> {
        while !buffer.is_empty() {
            let exchange = &mut self.sockets.get_mut(conn)?.exchange;
            let expected = exchange.expected();
            match exchange.cutter.next_reply(expected, buffer.unread()) {
                ReplyCut::Reply { body, consumed, closes } => {
                    let reply = buffer.unread_mut().get_mut(body).unwrap_or_default();
                    let tag = match self.config.url.id {
                        None => exchange.front().map(|(tag, _)| *tag),
                        Some(field) => field.of_reply(reply),
                    };
                    if closes {
                        self.pool.handle_last_reply(conn);
                    }
                    let Some(tag) = tag.filter(|tag| exchange.has_begun(*tag)) else {
                        return Some(Reason::Unsolicited);
                    };
                    // Answered before it was asked to its end.
                    let is_torn = exchange.is_torn(tag);
                    self.complete(cx, conn, tag, reply);
                    buffer.consume(consumed);
                    if is_torn {
                        return Some(Reason::ReplyEndsConnection);
                    }
                    if matches!(self.pool.conn(conn)?.state, State::Closing { .. }) {
                        return None;
                    }
                }
                ReplyCut::Push { consumed } => {
                    buffer.consume(consumed);
                    self.pool.conn_mut(conn)?.replies_discarded += 1;
                }
                ReplyCut::Incomplete => {
                    if exchange.cutter.is_until_close() {
                        self.pool.handle_last_reply(conn);
                    }
                    return None;
                }
                ReplyCut::Broken(reason) => return Some(reason),
            }
        }
        None
    }

    /// What comes back by a one-way connection is counted, as far as it can be told apart.
    fn discard_replies(&mut self, conn: ConnId, buffer: &mut ReceiveBuffer) {
        let Some(socket) = self.sockets.get_mut(conn) else { return };
        while !buffer.is_empty() {
            let cutter = &mut socket.exchange.cutter;
            let discarded = match cutter.next_reply(Some(Expect::Plain), buffer.unread()) {
                ReplyCut::Reply { consumed, .. } | ReplyCut::Push { consumed } => consumed,
                ReplyCut::Incomplete => return,
                ReplyCut::Broken(_) => {
                    let bytes_max = self.config.limits.message_bytes_max;
                    *cutter = ReplyCutter::new(self.config.url.framing, bytes_max);
                    buffer.unread().len()
                }
            };
            buffer.consume(discarded);
            if let Some(record) = self.pool.conn_mut(conn) {
                record.replies_discarded += 1;
            }
        }
    }

    /// Delivers a reply that the end of the connection completes.
    fn finish_reply(&mut self, cx: &mut Context<'_>, conn: ConnId) {
        let Some(socket) = self.sockets.get_mut(conn) else { return };
        let Some(mut buffer) = socket.input.take() else { return };
        if let Some(tag) = socket.exchange.written.front().map(|(tag, _)| *tag)
            && let Some(body) = socket.exchange.cutter.finish(buffer.unread())
        {
            let reply = buffer.unread_mut().get_mut(body).unwrap_or_default();
            self.complete(cx, conn, tag, reply);
        }
        cx.spares.put_back(buffer);
    }

    /// The exchange of a slot is complete: its reply goes to whoever awaits it.
    fn complete(&mut self, cx: &mut Context<'_>, conn: ConnId, tag: Tag, reply: &mut [u8]) {
        let Some(socket) = self.sockets.get_mut(conn) else { return };
        let slot = socket.exchange.take(tag);
        if let Some(field) = self.config.url.id
            && let Some(slot) = &slot
        {
            field.set_in_reply(reply, slot.meta.client_id);
        }
        let awaiting = self.pool.slot(conn, tag).and_then(|slot| self.pool.awaiting(slot));
        let can_be_taken = awaiting.is_none_or(|owner| cx.sources.can_take(owner, reply));
        if let Some(owner) = self.pool.handle_reply(cx.now, conn, tag, can_be_taken) {
            cx.sources.reply(owner, reply);
        }
    }

    /// Reads what one call gives; whether to read again.
    pub(super) fn read_datagrams(&mut self, cx: &mut Context<'_>, conn: ConnId) -> bool {
        let Some(socket) = self.sockets.get_mut(conn) else {
            return false;
        };
        if socket.discard == Discard::Filter {
            socket.is_readable = false;
            return false;
        }
        let mut lost = None;
        let Some(mut replies) = self.replies.take() else { return false };
        match replies.receive(&socket.fd) {
            Ok((count, is_readable)) => {
                socket.is_readable = is_readable;
                for datagram in 0..count {
                    let reply = replies.datagram_mut(datagram);
                    lost = lost.or(self.take_datagram(cx, conn, reply));
                }
            }
            Err(Errno::AGAIN) => socket.is_readable = false,
            Err(Errno::INTR) => {}
            // Reported for a datagram of this socket. What is sent again may still be answered.
            Err(error) => {
                let is_asked = socket.exchange.begun() > 0;
                let is_final = self.config.limits.retransmits == 0;
                lost = (is_asked && is_final).then(|| broken(error));
            }
        }
        self.replies = Some(replies);
        if let Some(reason) = lost {
            self.lose(cx.now, conn, reason);
        }
        self.sockets.get(conn).is_some_and(|socket| socket.is_readable) && lost.is_none()
    }

    /// Takes one datagram; why the socket is lost, if so.
    fn take_datagram(
        &mut self,
        cx: &mut Context<'_>,
        conn: ConnId,
        reply: &mut [u8],
    ) -> Option<Reason> {
        let socket = self.sockets.get(conn)?;
        let exchange = &socket.exchange;
        let tag = match self.config.url.id {
            None => exchange.front().map(|(tag, _)| *tag),
            Some(field) => field.of_reply(reply),
        };
        let is_asked = tag.is_some_and(|tag| exchange.written.get(tag).is_some());
        let discards = socket.discard == Discard::Drain;
        let record = self.pool.conn_mut(conn)?;
        record.bytes_in += reply.len() as u64;
        match tag.filter(|_| is_asked && !discards) {
            Some(tag) => self.complete(cx, conn, tag, reply),
            None => {
                record.replies_discarded += 1;
                // With an id it is known to be late, twice, or forged: nobody takes it for another.
                return (!discards && self.config.url.id.is_none()).then_some(Reason::Unsolicited);
            }
        }
        None
    }
}
