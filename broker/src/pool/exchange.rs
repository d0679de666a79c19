//! Requests and the connections they are on: granting, freeing, waiting, ending.

use poolbroker_proto::address::Protocol;
use poolbroker_proto::reason::Reason;

use super::{Acquire, Action, Pool, State, Timer, earliest};
use crate::ids::{ConnId, RequestId};
use crate::inflight::Place;
use crate::stats::RequestEnd;
use crate::timers::Time;

impl Pool {
    pub(super) fn refuse(&mut self, reason: Reason) -> Acquire {
        self.counts.end(RequestEnd::Refused(reason));
        Acquire::Refused(reason)
    }

    pub(super) fn grant(&mut self, now: Time, request: RequestId, conn: ConnId) {
        let Some(entry) = self.in_flight.get(request) else {
            return;
        };
        if let Place::Waiting { deadline } = entry.place {
            self.deadlines.remove(deadline, Timer::Request(request));
        }
        let limit = now + self.settings.limits.request_timeout;
        let deadline = earliest(limit, entry.caller_deadline);
        self.in_flight.assign(request, conn, deadline);
        if let Some(record) = self.conns.get_mut(conn) {
            record.uses += 1;
            record.messages_out += 1;
        }
        self.move_to(conn, State::InUse);
    }

    /// The exchange on a connection is complete, or it is new: it serves a waiter or rests.
    pub(super) fn free(&mut self, now: Time, conn: ConnId) {
        let Some(record) = self.conns.get(conn) else {
            return;
        };
        let uses_max = self.settings.limits.requests_per_connection_max;
        // A new connection serves one waiter before it makes room: the roles take turns.
        let has_turn = record.uses == 0 && !self.waiters.is_empty();
        let one_way_waits =
            !has_turn && self.wanting_lanes() > 0 && self.places.open >= self.connections_max();
        if uses_max > 0 && record.uses >= uses_max {
            self.close(conn, Reason::UsesMax);
        } else if record.expires_at.is_some_and(|at| at <= now) {
            self.close(conn, Reason::Lifetime);
        } else if one_way_waits {
            self.close(conn, Reason::MakeRoom);
        } else if let Some(request) = self.next_waiter(now) {
            self.grant(now, request, conn);
            self.actions.push_back(Action::Dispatch { conn, request });
            return;
        } else if self.closing_down {
            self.close(conn, Reason::Drained);
        } else {
            self.move_to(conn, State::Idle { since: now });
            self.idle.push(conn);
            return;
        }
        self.want_connections(now);
    }

    pub(super) fn serve_waiters(&mut self, now: Time) {
        while !self.idle.is_empty()
            && let Some(request) = self.next_waiter(now)
            && let Some(conn) = self.idle.pop()
        {
            self.grant(now, request, conn);
            self.actions.push_back(Action::Dispatch { conn, request });
        }
    }

    /// Takes the first waiter whose caller still waits: timers run after events, and what nobody
    /// wants any more is not sent.
    fn next_waiter(&mut self, now: Time) -> Option<RequestId> {
        while let Some(request) = self.waiters.pop_front() {
            let deadline = self.in_flight.get(request)?.caller_deadline;
            if deadline.is_none_or(|deadline| deadline > now) {
                return Some(request);
            }
            self.end_request(now, request, RequestEnd::TimedOut);
        }
        None
    }

    /// Puts the request on a connection back to the head of the waiters.
    pub(super) fn wait_again(&mut self, conn: ConnId) {
        let Some(request) = self.in_flight.on(conn) else {
            return;
        };
        let Some(entry) = self.in_flight.get(request) else {
            return;
        };
        let limit = entry.asked_at + self.settings.limits.wait_timeout;
        let deadline = earliest(limit, entry.caller_deadline);
        if self.in_flight.unassign(conn, deadline).is_some() {
            self.deadlines.insert(deadline, Timer::Request(request));
            self.waiters.push_front(request);
        }
    }

    pub(super) fn handle_wait_over(&mut self, now: Time, request: RequestId) {
        let Some(entry) = self.in_flight.get(request) else {
            return;
        };
        let by_caller = entry.caller_deadline.is_some_and(|deadline| deadline <= now);
        let end =
            if by_caller { RequestEnd::TimedOut } else { RequestEnd::Refused(Reason::WaitTimeout) };
        self.waiters.retain(|waiting| *waiting != request);
        self.fail(request, end);
    }

    /// Ends a request without a reply, wherever it is; its connection is not used again.
    pub(super) fn end_request(&mut self, now: Time, request: RequestId, end: RequestEnd) {
        let Some(entry) = self.in_flight.get(request) else {
            return;
        };
        match entry.place {
            Place::Waiting { deadline } => {
                self.deadlines.remove(deadline, Timer::Request(request));
                self.waiters.retain(|waiting| *waiting != request);
                self.fail(request, end);
            }
            Place::On { conn, .. } => {
                self.fail(request, end);
                let reason = match end {
                    RequestEnd::TimedOut => Reason::RequestTimeout,
                    RequestEnd::Failed(reason) | RequestEnd::Refused(reason) => reason,
                    RequestEnd::Replied => Reason::Internal,
                };
                self.taint(now, conn, reason);
            }
        }
    }

    pub(super) fn fail(&mut self, request: RequestId, end: RequestEnd) {
        let Some(entry) = self.in_flight.remove(request) else {
            return;
        };
        let was_sent = match entry.place {
            Place::Waiting { .. } => false,
            Place::On { .. } => true,
        };
        self.counts.end(end);
        self.actions.push_back(Action::Fail { request, owner: entry.owner, end, was_sent });
    }

    /// Nobody waits for an open breaker, unless a connection is left to wait for.
    pub(super) fn fail_waiters_if_down(&mut self, now: Time) {
        let Some(reason) = self.balance.fail_fast(now).filter(|_| self.places.exchange == 0) else {
            return;
        };
        for request in std::mem::take(&mut self.waiters) {
            if let Some(Place::Waiting { deadline }) =
                self.in_flight.get(request).map(|entry| entry.place)
            {
                self.deadlines.remove(deadline, Timer::Request(request));
            }
            self.fail(request, RequestEnd::Refused(reason));
        }
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
}
