//! The lanes of one-way messages: using and resting their connections, ending what waits too long.

use poolbroker_proto::address::Protocol;
use poolbroker_proto::reason::Reason;

use super::{Action, Pool, State, Timer};
use crate::ids::ConnId;
use crate::outbox::{Leaving, Outbox};
use crate::stats::Settled;
use crate::timers::Time;

/// A queue of one-way messages, and the connection they go by.
#[derive(Debug)]
pub struct Lane {
    pub(super) outbox: Outbox,
    /// When it is told to look for what waited too long.
    pub(super) scheduled_at: Option<Time>,
    /// It takes messages, or will.
    pub(super) conn: Option<ConnId>,
    /// Connections of the lane that still end; counted by [`Pool::move_to`].
    pub(super) ending: usize,
}

impl Lane {
    pub(super) fn new(outbox: Outbox) -> Self {
        Lane { outbox, scheduled_at: None, conn: None, ending: 0 }
    }

    /// Whether a connection of it could be opened: not beside one that still ends, since the
    /// outbox knows of one connection, and its order.
    pub(super) fn is_free(&self) -> bool {
        self.conn.is_none() && self.ending == 0
    }

    pub(super) fn wants_connection(&self) -> bool {
        self.is_free() && !self.outbox.is_empty()
    }
}

impl Pool {
    /// How many lanes have something to send and no connection.
    pub(super) fn wanting_lanes(&self) -> usize {
        self.lanes.iter().filter(|lane| lane.wants_connection()).count()
    }

    pub(super) fn lane_on(&self, conn: ConnId) -> Option<usize> {
        self.conns.get(conn).and_then(|record| record.role.lane())
    }

    pub(super) fn use_one_way(&mut self, lane: usize, conn: ConnId) {
        let is_idle =
            self.conns.get(conn).is_some_and(|record| matches!(record.state, State::Idle { .. }));
        if is_idle && !self.lanes[lane].outbox.is_empty() {
            self.move_to(conn, State::InUse);
        }
    }

    /// The connection of a lane rests, or ends, if there is nothing left to send.
    pub(super) fn rest_one_way(&mut self, now: Time, lane: usize) {
        let Lane { conn: Some(conn), outbox, .. } = &self.lanes[lane] else {
            return;
        };
        let conn = *conn;
        if !outbox.is_empty() {
            return;
        }
        let Some(record) = self.conns.get(conn) else {
            return;
        };
        if self.closing_down {
            self.finish_one_way(now, conn, Reason::Drained);
        } else if record.expires_at.is_some_and(|at| at <= now) {
            self.finish_one_way(now, conn, Reason::Lifetime);
        } else if !self.balance.has(record.remote) {
            self.finish_one_way(now, conn, Reason::AddressGone);
        } else if record.state == State::InUse {
            self.move_to(conn, State::Idle { since: now });
            self.want_connections(now);
        }
    }

    pub(super) fn rest_emptied(&mut self, now: Time) {
        if std::mem::take(&mut self.has_emptied) {
            (0..self.lanes.len()).for_each(|lane| self.rest_one_way(now, lane));
        }
    }

    pub(super) fn sent(&mut self, now: Time, lane: usize, conn: ConnId, bytes: usize) {
        let messages = self.leaving.iter().map(|left| left.messages).sum::<u64>();
        if let Some(record) = self.conns.get_mut(conn) {
            record.uses += u64::from(messages > 0);
            record.messages_out += messages;
            record.bytes_out += bytes as u64;
        }
        self.settle(Settled::Sent);
        self.rest_one_way(now, lane);
    }

    pub(super) fn settle(&mut self, settled: Settled) {
        for left in self.leaving.drain(..) {
            self.ledger.settle(settled, left.messages);
            let Leaving { source, messages } = left;
            self.actions.push_back(Action::Settle { source, settled, messages });
        }
    }

    /// Takes the oldest messages out of a lane, to be settled; where their bytes are.
    pub(super) fn take_oldest(&mut self, lane: usize, messages: u64) -> (usize, usize) {
        let (skip, bytes) = self.lanes[lane].outbox.give_up(messages, &mut self.leaving);
        self.unsent_bytes -= bytes;
        (skip, bytes)
    }

    pub(super) fn give_up(&mut self, lane: usize, messages: u64, settled: Settled) {
        let (skip, bytes) = self.take_oldest(lane, messages);
        if bytes > 0 {
            self.actions.push_back(Action::Discard { lane, skip, bytes });
        }
        self.settle(settled);
    }

    pub(super) fn schedule_outbox(&mut self, lane: usize) {
        let timeout = self.settings.limits.queue_timeout;
        let Lane { outbox, scheduled_at, .. } = &mut self.lanes[lane];
        if timeout.is_zero() || scheduled_at.is_some() {
            return;
        }
        if let Some(oldest) = outbox.oldest() {
            let at = oldest + timeout;
            *scheduled_at = Some(at);
            self.deadlines.insert(at, Timer::Outbox { lane });
        }
    }

    /// Ends what waited in a lane longer than `queue_timeout`. A message that is partly written
    /// cannot be taken back from a connection, so that connection goes first.
    pub(super) fn expire(&mut self, now: Time, lane: usize) {
        let timeout = self.settings.limits.queue_timeout;
        let overdue = |outbox: &Outbox| outbox.oldest().filter(|oldest| *oldest + timeout <= now);
        if overdue(&self.lanes[lane].outbox).is_some() {
            if self.lanes[lane].outbox.is_front_torn()
                && let Some(conn) = self.lanes[lane].conn
            {
                // `handle_closed` sets the deadline, past already, again.
                self.close(conn, Reason::Stalled);
            }
            if self.lanes[lane].outbox.is_front_torn() {
                return;
            }
            while let Some(oldest) = overdue(&self.lanes[lane].outbox) {
                let messages = self.lanes[lane].outbox.accepted_until(oldest);
                self.give_up(lane, messages, Settled::Expired);
            }
            self.rest_one_way(now, lane);
        }
        self.schedule_outbox(lane);
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
