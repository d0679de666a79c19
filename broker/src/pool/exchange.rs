//! Requests and the connections they are on: granting, freeing, waiting, ending.

use std::net::SocketAddr;

use poolbroker_proto::address::Protocol;
use poolbroker_proto::reason::Reason;
use slotmap::Key;

use super::waiters::Line;
use super::{Acquire, Action, Left, Pool, State, Timer, earliest};
use crate::balance::{Balance, Choice};
use crate::config::{RETRIES_KEPT, RETRIES_MAX};
use crate::ids::{ConnId, RequestId};
use crate::inflight::{InFlight, Matching, Owner, Place, Slot, Times};
use crate::stats::RequestEnd;
use crate::tagged::Tag;
use crate::timers::Time;

/// What a retry costs, where a request gives `retry_budget_percent`.
const RETRY_COST: u64 = 100;

/// How many more requests may be repeated: a part of all that were asked, so that repeating never
/// multiplies the load of an upstream that fails them all.
#[derive(Debug)]
pub(super) struct RetryBudget {
    percent: u64,
    saved: u64,
}

impl RetryBudget {
    pub(super) fn new(percent: u32) -> Self {
        RetryBudget { percent: u64::from(percent), saved: RETRIES_KEPT * RETRY_COST }
    }

    pub(super) fn handle_request(&mut self) {
        self.saved = (self.saved + self.percent).min(RETRIES_KEPT * RETRY_COST);
    }

    fn take(&mut self) -> bool {
        let left = self.saved.checked_sub(RETRY_COST).filter(|_| self.percent > 0);
        self.saved = left.unwrap_or(self.saved);
        left.is_some()
    }
}

/// The session, as the balance knows it.
pub(super) fn key(owner: Owner) -> u64 {
    owner.source.data().as_ffi()
}

/// In the line of its session's address, if it has one.
fn line_of(balance: &Balance, in_flight: &InFlight, now: Time, request: RequestId) -> Line {
    let home = in_flight.get(request).and_then(|entry| balance.home_of(now, key(entry.owner)));
    home.map_or(0, |home| 1 + home)
}

impl Pool {
    pub(super) fn refuse(&mut self, reason: Reason) -> Acquire {
        self.counts.end(RequestEnd::Refused(reason));
        Acquire::Refused(reason)
    }

    /// Whether a connection carries one request at a time, whose reply nothing tells from others.
    pub(super) fn is_exclusive(&self) -> bool {
        self.settings.matching == Matching::InOrder && self.settings.limits.pipeline_depth == 1
    }

    /// A connection for a request of this owner now: an idle one, the last used first, or one in use
    /// that has room.
    pub(super) fn select(&mut self, now: Time, owner: Owner) -> Option<ConnId> {
        let Pool { balance, idle, with_room, conns, .. } = self;
        balance.choose(now, Some(key(owner)), |choice| match choice {
            Choice::Any => idle.pop().or_else(|| with_room.front().copied()),
            Choice::To(remote) => {
                let goes_there =
                    |conn: &ConnId| conns.get(*conn).is_some_and(|c| c.remote == remote);
                match idle.iter().rposition(goes_there) {
                    Some(at) => Some(idle.remove(at)),
                    None => with_room.iter().copied().find(goes_there),
                }
            }
        })
    }

    pub(super) fn grant(&mut self, now: Time, request: RequestId, conn: ConnId) -> Option<Tag> {
        let entry = self.in_flight.get(request)?;
        if let Place::Waiting { deadline } = entry.place {
            self.deadlines.remove(deadline, Timer::Request(request));
        }
        let is_last = entry.is_last;
        let limits = &self.settings.limits;
        let hopeless_at = now + limits.request_timeout;
        let deadline = earliest(hopeless_at, entry.caller_deadline);
        let resends_left = limits.retransmits.checked_sub(1);
        let resend = resends_left.map(|left| (now + limits.retransmit_interval, left));
        let tag = self.in_flight.assign(request, conn, Times { deadline, hopeless_at, resend })?;
        let record = self.conns.get_mut(conn)?;
        record.uses += 1;
        record.messages_out += 1;
        self.balance.handle_dispatched(record.remote);
        if record.state == State::InUse {
            self.schedule_conn(conn);
        } else {
            self.move_to(conn, State::InUse);
        }
        let uses_max = self.settings.limits.requests_per_connection_max;
        if uses_max > 0 && self.conns.get(conn)?.uses >= uses_max {
            self.retire(conn, Reason::UsesMax);
        }
        if is_last {
            self.retire(conn, Reason::RequestEndsConnection);
        }
        self.list(conn);
        Some(tag)
    }

    /// Puts a connection in use among those with room, or takes it out, as it is now.
    pub(super) fn list(&mut self, conn: ConnId) {
        let depth = self.settings.limits.pipeline_depth;
        if depth == 1 {
            return;
        }
        let has_room = self.takes_one_more(conn);
        let Some(record) = self.conns.get_mut(conn) else { return };
        let is_open = record.state == State::InUse && record.retiring.is_none();
        let has_room = is_open && has_room;
        match (record.is_listed, has_room) {
            (true, true) if self.with_room.len() > 1 && self.with_room.front() == Some(&conn) => {
                self.with_room.rotate_left(1);
            }
            (true, false) => self.with_room.retain(|listed| *listed != conn),
            (false, true) => self.with_room.push_back(conn),
            (true, true) | (false, false) => {}
        }
        record.is_listed = has_room;
    }

    /// Whether a connection in use can carry one more request.
    pub(super) fn takes_one_more(&self, conn: ConnId) -> bool {
        let depth = self.settings.limits.pipeline_depth;
        // A lost datagram is nothing unusual, and its slot does not stay for long.
        let is_stream = self.settings.protocol == Protocol::Tcp;
        let (slots, _) = self.in_flight.slots(conn);
        (!is_stream || slots < 2 * depth) && self.in_flight.has_room(conn, depth)
    }

    /// A connection takes nothing new from now on, and is closed once nobody awaits a reply on it.
    pub(super) fn retire(&mut self, conn: ConnId, reason: Reason) {
        if let Some(record) = self.conns.get_mut(conn) {
            record.retiring.get_or_insert(reason);
            self.list(conn);
        }
    }

    /// A slot of a connection is free, or the connection is new: it serves waiters or rests.
    pub(super) fn free(&mut self, now: Time, conn: ConnId) {
        let Some(record) = self.conns.get(conn) else {
            return;
        };
        match record.state {
            State::Connecting | State::Idle { .. } | State::InUse | State::Leased { .. } => {}
            State::Draining { .. } | State::Closing { .. } => return,
        }
        let (slots, awaited) = self.in_flight.slots(conn);
        // A new connection serves one waiter before it makes room: the roles take turns.
        let somebody_waits = !self.waiters.is_empty() || self.lendable() > 0;
        let has_turn = record.uses == 0 && somebody_waits;
        let is_expired = record.expires_at.is_some_and(|at| at <= now);
        if !self.balance.has(record.remote) {
            self.retire(conn, Reason::AddressGone);
        } else if is_expired {
            self.retire(conn, Reason::Lifetime);
        } else if !has_turn && self.lanes_lack_places() {
            self.retire(conn, Reason::MakeRoom);
        } else if self.closing_down && !somebody_waits {
            self.retire(conn, Reason::Drained);
        }
        match self.conns.get(conn).and_then(|record| record.retiring) {
            Some(reason) if awaited == 0 => {
                // Late replies to what was given up must not reach the next one on its port.
                let is_datagram = self.settings.protocol == Protocol::Udp;
                match is_datagram && slots > 0 && reason != Reason::Drained {
                    true => self.taint(now, conn, reason),
                    false => self.close(conn, reason),
                }
            }
            Some(_) => {}
            None if slots == 0 => return self.free_whole(now, conn),
            None => self.list(conn),
        }
        self.serve_waiters(now);
        self.want_connections(now);
    }

    /// A connection that carries nothing serves whoever waited longest, or rests.
    fn free_whole(&mut self, now: Time, conn: ConnId) {
        if self.lends_next(conn) && self.lend_to_waiter(now, conn) {
            return;
        }
        let Some(record) = self.conns.get(conn) else { return };
        let (is_lent, remote) = (record.was_lent(), record.remote);
        if !is_lent && let Some(request) = self.next_waiter(now, remote) {
            if let Some(tag) = self.grant(now, request, conn) {
                self.actions.push_back(Action::Dispatch { conn, request, tag });
            }
            self.serve_waiters(now);
            return;
        }
        let is_full = self.places.open + self.wanting_lanes() >= self.connections_max();
        if is_lent && is_full && !self.waiters.is_empty() {
            // It serves no request, and it is a request's turn: what takes its place does.
            return self.close(conn, Reason::MakeRoom);
        }
        // The requests that came first had been given up.
        if self.lend_to_waiter(now, conn) {
            return;
        }
        // Another one, for those who wait for another address, would only come after it.
        if self.closing_down && self.waiters.is_empty() {
            return self.close(conn, Reason::Drained);
        }
        self.rest(now, conn);
        self.want_connections(now);
    }

    pub(super) fn rest(&mut self, now: Time, conn: ConnId) {
        let is_lent = self.conns.get(conn).is_some_and(|record| record.was_lent());
        self.move_to(conn, State::Idle { since: now });
        self.list(conn);
        match is_lent {
            true => self.returned.push(conn),
            false => self.idle.push(conn),
        }
    }

    /// Lanes wait for places that only exchange connections can give, and none is about to.
    fn lanes_lack_places(&self) -> bool {
        let wanting = self.wanting_lanes();
        wanting > 0
            && self.places.open >= self.connections_max()
            && self.conns.values().filter(|conn| conn.is_making_room()).count() < wanting
    }

    pub(super) fn serve_waiters(&mut self, now: Time) {
        // Lines for whose address nothing is free, a bit for each.
        let mut passed_over = 0u128;
        while !(self.idle.is_empty() && self.with_room.is_empty()) {
            if self.line_up(now) {
                passed_over = 0;
            }
            let lines = self.waiters.lines(&self.turns);
            let lines = lines.filter(|(line, ..)| passed_over & (1 << line) == 0);
            let Some((line, request, _)) = lines.min_by_key(|(_, _, turn)| *turn) else { break };
            let Some(entry) = self.in_flight.get(request) else { break };
            let owner = entry.owner;
            if entry.caller_deadline.is_some_and(|deadline| deadline <= now) {
                self.end_request(now, request, RequestEnd::TimedOut);
            } else if let Some(conn) = self.select(now, owner) {
                self.serve_waiter(request);
                if let Some(tag) = self.grant(now, request, conn) {
                    self.actions.push_back(Action::Dispatch { conn, request, tag });
                }
            } else {
                passed_over |= 1 << line;
            }
        }
        if !self.idle.is_empty() {
            self.serve_lease_waiters(now);
        }
    }

    /// Takes the first waiter that a connection to `remote` may serve and whose caller still waits:
    /// timers run after events, and what nobody wants any more is not sent.
    fn next_waiter(&mut self, now: Time, remote: SocketAddr) -> Option<RequestId> {
        self.line_up(now);
        let line = match self.waiters.first_of(&self.turns, 0) {
            Some(_) => 0,
            None => 1 + self.balance.index_of(remote)?,
        };
        while let Some(request) = self.waiters.first_of(&self.turns, line) {
            let entry = self.in_flight.get(request)?;
            if entry.caller_deadline.is_some_and(|deadline| deadline <= now) {
                self.end_request(now, request, RequestEnd::TimedOut);
            } else if self.balance.may_serve(now, Some(key(entry.owner)), remote) {
                self.serve_waiter(request);
                return Some(request);
            } else {
                // Nor may it serve another one in that line.
                return None;
            }
        }
        None
    }

    /// A request waits no more: it has a connection.
    fn serve_waiter(&mut self, request: RequestId) {
        if let Some(uid) = self.waiters.remove(request) {
            self.turns.serve(uid);
        }
    }

    /// A request waits no more, and gets none.
    fn forget_waiter(&mut self, request: RequestId) {
        if let Some(uid) = self.waiters.remove(request) {
            self.turns.end(uid);
        }
    }

    /// Whoever waits stands where its address is now: whether somebody had to move.
    pub(super) fn line_up(&mut self, now: Time) -> bool {
        let spread = self.balance.spread(now);
        if spread == self.waiters.spread {
            return false;
        }
        let lines = 1 + self.balance.health().count();
        let Pool { waiters, balance, in_flight, .. } = self;
        waiters.line_up(spread, lines, |request| line_of(balance, in_flight, now, request));
        true
    }

    /// Where a request stands that waits.
    pub(super) fn line_of(&self, now: Time, request: RequestId) -> Line {
        line_of(&self.balance, &self.in_flight, now, request)
    }

    /// A request has left its connection.
    pub(super) fn count_request_end(&mut self, conn: ConnId) {
        if let Some(record) = self.conns.get(conn) {
            self.balance.handle_request_end(record.remote);
        }
    }

    /// What becomes of the requests of a connection that was lost, of which the first `begun` left
    /// at least in part.
    pub(super) fn give_back(&mut self, now: Time, conn: ConnId, reason: Reason, begun: usize) {
        let slots = self.in_flight.take_all(conn);
        // A bad reply is that to the first request; by id it may be that to any.
        let is_told = self.settings.matching == Matching::InOrder || slots.len() == 1;
        let mut again = Vec::new();
        for (at, (_, slot)) in slots.into_iter().enumerate() {
            let Slot { request: Some(request), .. } = slot else { continue };
            let is_begun = at < begun;
            let failed = match reason {
                Reason::ConnectRefused => reason,
                Reason::ReplyTooLong | Reason::BadReply if at == 0 && is_told => reason,
                _ => Reason::ConnectionLost,
            };
            // Its own reply would be as bad the next time.
            let may_repeat = failed == Reason::ConnectionLost || failed == Reason::ConnectRefused;
            if !is_begun || (may_repeat && self.may_retry(request)) {
                again.push((request, is_begun));
            } else {
                self.fail(now, request, RequestEnd::Failed(failed), Left::Something);
            }
        }
        for (request, is_begun) in again.into_iter().rev() {
            self.count_request_end(conn);
            self.wait_again(now, request, is_begun);
        }
    }

    fn may_retry(&mut self, request: RequestId) -> bool {
        let is_young = |retries: u32| retries < RETRIES_MAX;
        self.settings.is_idempotent
            && self.in_flight.get(request).is_some_and(|entry| is_young(entry.retries))
            && self.retry_budget.take()
    }

    /// Puts a request back to the head of the waiters.
    fn wait_again(&mut self, now: Time, request: RequestId, is_retry: bool) {
        let Some(entry) = self.in_flight.get(request) else {
            return;
        };
        let limit = entry.asked_at + self.settings.limits.wait_timeout;
        let (deadline, uid) = (earliest(limit, entry.caller_deadline), entry.owner.uid);
        self.in_flight.wait_again(request, deadline, is_retry);
        self.retried += u64::from(is_retry);
        self.deadlines.insert(deadline, Timer::Request(request));
        self.line_up(now);
        let came = self.turns.begin_first(uid);
        self.waiters.push(request, uid, came, self.line_of(now, request));
    }

    pub(super) fn handle_wait_over(&mut self, now: Time, request: RequestId) {
        let Some(entry) = self.in_flight.get(request) else {
            return;
        };
        let by_caller = entry.caller_deadline.is_some_and(|deadline| deadline <= now);
        let end =
            if by_caller { RequestEnd::TimedOut } else { RequestEnd::Refused(Reason::WaitTimeout) };
        self.forget_waiter(request);
        self.fail(now, request, end, Left::Nothing);
    }

    /// Ends a request without a reply, wherever it is.
    pub(super) fn end_request(&mut self, now: Time, request: RequestId, end: RequestEnd) {
        let Some(entry) = self.in_flight.get(request) else {
            return;
        };
        match entry.place {
            Place::Waiting { deadline } => {
                self.deadlines.remove(deadline, Timer::Request(request));
                self.forget_waiter(request);
                self.fail(now, request, end, Left::Nothing);
            }
            Place::On { conn, tag } => {
                self.fail(now, request, end, Left::SeeSlot { conn, tag });
                if let Some(record) = self.conns.get(conn)
                    && end == RequestEnd::TimedOut
                {
                    self.balance.handle_request_timeout(now, record.remote);
                }
                let reason = match end {
                    RequestEnd::TimedOut => Reason::RequestTimeout,
                    RequestEnd::Failed(reason) | RequestEnd::Refused(reason) => reason,
                    RequestEnd::Replied => Reason::Internal,
                };
                if self.is_exclusive() {
                    self.taint(now, conn, reason);
                } else {
                    if end == RequestEnd::TimedOut {
                        self.retire_stuck(conn);
                    }
                    self.schedule_conn(conn);
                    self.free(now, conn);
                }
            }
        }
    }

    /// A connection that leaves as many ids unanswered as it may carry at once is of no use.
    fn retire_stuck(&mut self, conn: ConnId) {
        let (slots, awaited) = self.in_flight.slots(conn);
        let is_stream = self.settings.protocol == Protocol::Tcp;
        let has_ids = self.settings.matching != Matching::InOrder;
        if is_stream && has_ids && slots - awaited >= self.settings.limits.pipeline_depth {
            self.retire(conn, Reason::Stuck);
        }
    }

    /// When the reply of a request that is given up now need not be expected any more, if that is
    /// another moment than planned.
    fn hopeless_at(&self, now: Time) -> Option<Time> {
        match self.settings.protocol {
            Protocol::Tcp => None,
            Protocol::Udp | Protocol::UdpWriteOnly => {
                Some(now + self.settings.limits.late_reply_window)
            }
        }
    }

    pub(super) fn fail(&mut self, now: Time, request: RequestId, end: RequestEnd, left: Left) {
        let hopeless_at = self.hopeless_at(now);
        let Some(entry) = self.in_flight.remove(request, hopeless_at) else {
            return;
        };
        if let Place::On { conn, .. } = entry.place {
            self.count_request_end(conn);
        }
        let was_sent_before = entry.retries > 0;
        let end = match end {
            RequestEnd::Refused(reason) if was_sent_before => RequestEnd::Failed(reason),
            end => end,
        };
        self.counts.end(end);
        let owner = entry.owner;
        self.actions.push_back(Action::Fail { request, owner, end, left, was_sent_before });
    }

    /// Nobody waits for an open breaker, unless a connection is left to wait for.
    pub(super) fn fail_waiters_if_down(&mut self, now: Time) {
        let Some(reason) = self.balance.fail_fast(now).filter(|_| self.places.exchange == 0) else {
            return;
        };
        for request in self.waiters.all() {
            self.forget_waiter(request);
            if let Some(Place::Waiting { deadline }) =
                self.in_flight.get(request).map(|entry| entry.place)
            {
                self.deadlines.remove(deadline, Timer::Request(request));
            }
            self.fail(now, request, RequestEnd::Refused(reason), Left::Nothing);
        }
        self.refuse_lease_waiters(reason);
    }

    /// The exchange on a connection did not complete: it never returns to `Idle`.
    pub(super) fn taint(&mut self, now: Time, conn: ConnId, reason: Reason) {
        match self.settings.protocol {
            Protocol::Tcp => self.close(conn, reason),
            Protocol::Udp | Protocol::UdpWriteOnly => {
                let until = now + self.settings.limits.late_reply_window;
                self.move_to(conn, State::Draining { until, reason: Reason::LateReplyWindow });
                self.actions.push_back(Action::Retire { conn });
            }
        }
        self.want_connections(now);
    }

    /// Times of the slots of a connection have come.
    pub(super) fn handle_slots_due(&mut self, now: Time, conn: ConnId) {
        let interval = self.settings.limits.retransmit_interval;
        while let Some((tag, slot)) = self.in_flight.first_due(conn, now) {
            match slot.request {
                Some(request) if slot.times.deadline <= now => {
                    self.end_request(now, request, RequestEnd::TimedOut);
                    if self.conns.get(conn).is_none_or(|record| record.state != State::InUse) {
                        return;
                    }
                }
                Some(_) => {
                    self.in_flight.resent(conn, tag, now + interval);
                    self.retransmitted += 1;
                    self.actions.push_back(Action::Resend { conn, tag });
                }
                None if self.settings.protocol == Protocol::Tcp => {
                    // Its place in the order, or its id, stays taken.
                    self.in_flight.keep_for_ever(conn, tag);
                    self.retire(conn, Reason::Stuck);
                    self.free(now, conn);
                }
                None => {
                    self.in_flight.take(conn, tag);
                    self.actions.push_back(Action::Forget { conn, tag });
                    self.free(now, conn);
                }
            }
        }
    }
}
