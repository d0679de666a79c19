//! The one-way connection and its queue: using it, resting it, ending what waits too long.

use poolbroker_proto::address::Protocol;
use poolbroker_proto::reason::Reason;

use super::{Action, Pool, State, Timer};
use crate::ids::ConnId;
use crate::outbox::{Leaving, Outbox};
use crate::stats::Settled;
use crate::timers::Time;

impl Pool {
    pub(super) fn wants_one_way(&self) -> bool {
        // Not beside one that still ends: the outbox knows of one connection, and its order.
        self.one_way.is_none() && self.places.one_way_ending == 0 && !self.outbox.is_empty()
    }

    pub(super) fn use_one_way(&mut self, conn: ConnId) {
        let is_idle =
            self.conns.get(conn).is_some_and(|record| matches!(record.state, State::Idle { .. }));
        if is_idle && !self.outbox.is_empty() {
            self.move_to(conn, State::InUse);
        }
    }

    pub(super) fn rest_one_way(&mut self, now: Time, conn: ConnId) {
        if !self.outbox.is_empty() {
            return;
        }
        let Some(record) = self.conns.get(conn) else {
            return;
        };
        if self.closing_down {
            self.finish_one_way(now, conn, Reason::Drained);
        } else if record.expires_at.is_some_and(|at| at <= now) {
            self.finish_one_way(now, conn, Reason::Lifetime);
        } else if record.state == State::InUse {
            self.move_to(conn, State::Idle { since: now });
            self.want_connections(now);
        }
    }

    pub(super) fn sent(&mut self, now: Time, conn: ConnId, bytes: usize) {
        let messages = self.leaving.iter().map(|left| left.messages).sum::<u64>();
        if let Some(record) = self.conns.get_mut(conn) {
            record.uses += u64::from(messages > 0);
            record.messages_out += messages;
            record.bytes_out += bytes as u64;
        }
        self.settle(Settled::Sent);
        self.rest_one_way(now, conn);
    }

    pub(super) fn settle(&mut self, settled: Settled) {
        for left in self.leaving.drain(..) {
            self.ledger.settle(settled, left.messages);
            let Leaving { source, messages } = left;
            self.actions.push_back(Action::Settle { source, settled, messages });
        }
    }

    pub(super) fn give_up(&mut self, messages: u64, settled: Settled) {
        let (skip, bytes) = self.outbox.give_up(messages, &mut self.leaving);
        if bytes > 0 {
            self.actions.push_back(Action::Discard { skip, bytes });
        }
        self.settle(settled);
    }

    pub(super) fn schedule_outbox(&mut self) {
        let timeout = self.settings.limits.queue_timeout;
        if timeout.is_zero() || self.outbox_scheduled_at.is_some() {
            return;
        }
        if let Some(oldest) = self.outbox.oldest() {
            let at = oldest + timeout;
            self.outbox_scheduled_at = Some(at);
            self.deadlines.insert(at, Timer::Outbox);
        }
    }

    /// Ends what waited longer than `queue_timeout`. A message that is partly written cannot be
    /// taken back from a connection, so that connection goes first.
    pub(super) fn expire(&mut self, now: Time) {
        let timeout = self.settings.limits.queue_timeout;
        let is_overdue =
            |outbox: &Outbox| outbox.oldest().is_some_and(|oldest| oldest + timeout <= now);
        if is_overdue(&self.outbox) {
            if self.outbox.is_front_torn()
                && let Some(conn) = self.one_way
            {
                // `handle_closed` sets the deadline, past already, again.
                self.close(conn, Reason::Stalled);
            }
            if self.outbox.is_front_torn() {
                return;
            }
            while let Some(oldest) = self.outbox.oldest().filter(|o| *o + timeout <= now) {
                self.give_up(self.outbox.accepted_until(oldest), Settled::Expired);
            }
            if let Some(conn) = self.one_way {
                self.rest_one_way(now, conn);
            }
        }
        self.schedule_outbox();
    }

    /// Ends a one-way connection in order: what was written is still delivered.
    pub(super) fn finish_one_way(&mut self, now: Time, conn: ConnId, reason: Reason) {
        let is_up = self.conns.get(conn).is_some_and(|record| record.state != State::Connecting);
        match self.settings.protocol {
            Protocol::Tcp if is_up => {
                let until = now + self.settings.limits.finish_timeout;
                self.move_to(conn, State::Draining { until, reason });
                self.actions.push_back(Action::Drain { conn });
            }
            Protocol::Tcp | Protocol::Udp | Protocol::UdpWriteOnly => self.close(conn, reason),
        }
    }
}
