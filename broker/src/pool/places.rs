//! How many connections there are, in which state, and until when.
//!
//! [`Pool::move_to`] is the only way from one state to another, and keeps the counts that the
//! limits are checked against.

use std::net::SocketAddr;

use poolbroker_proto::address::Protocol;
use poolbroker_proto::reason::Reason;

use super::exchange::key;
use super::one_way::Lane;
use super::{Action, Conn, Pool, Role, State, Timer};
use crate::balance::Pick;
use crate::ids::{ConnId, RequestId};
use crate::timers::Time;

/// How many connections are where; kept by [`Pool::move_to`].
#[derive(Debug, Default, Clone, Copy)]
pub struct Places {
    pub(super) connecting: usize,
    pub(super) connecting_exchange: usize,
    pub(super) exchange: usize,
    pub(super) open: usize,
    pub(super) retired: usize,
}

impl Pool {
    pub(super) fn connections_max(&self) -> usize {
        self.settings.limits.connections_max
    }

    /// Whether nobody waits for a connection, and as many are warm as should be.
    fn has_connections(&self) -> bool {
        let is_warm =
            self.closing_down || self.places.exchange >= self.settings.limits.connections_min;
        is_warm
            && self.settings.protocol != Protocol::UdpWriteOnly
            && self.waiters.is_empty()
            && self.lendable() == 0
            && !self.lanes.iter().any(Lane::wants_connection)
    }

    /// Starts the connects that are wanted and allowed.
    pub(super) fn want_connections(&mut self, now: Time) {
        // Mostly: every reply asks.
        if self.has_connections() {
            return;
        }
        for lane in 0..self.lanes.len() {
            if !self.lanes[lane].wants_connection() {
                continue;
            }
            if self.places.open < self.connections_max() {
                if !self.connect(now, Role::OneWay { lane }, None) {
                    break;
                }
            } else if let Some(conn) = self.longest_idle() {
                // Closing it calls here again.
                self.close(conn, Reason::MakeRoom);
            }
        }
        let limits = &self.settings.limits;
        let (connections_min, retired_max) = (limits.connections_min, limits.retired_max);
        if self.settings.protocol == Protocol::UdpWriteOnly {
            for lane in 0..self.lanes.len().min(connections_min) {
                // Not in the place that was made for whoever waits for a lease.
                let is_wanted = !self.closing_down && self.lendable() == 0;
                let has_place = self.places.open < self.connections_max();
                if self.lanes[lane].is_free() && is_wanted && has_place {
                    self.connect(now, Role::OneWay { lane }, None);
                }
            }
        }
        let keeps_warm = self.settings.protocol != Protocol::UdpWriteOnly && !self.closing_down;
        let at_addresses = self.connect_for_addresses(now);
        loop {
            let places = self.places;
            let for_requests = self.conns_for(0);
            let others = self.balance.doubtful_connects() + at_addresses;
            let expected = places.connecting_exchange.saturating_sub(others);
            let for_waiters = for_requests + self.lendable() > expected;
            let warm = keeps_warm && places.exchange < connections_min;
            let reserved = self.wanting_lanes();
            if !(for_waiters || warm)
                || places.connecting >= self.settings.limits.connecting_max
                || places.retired >= retired_max.max(1)
            {
                return;
            }
            if places.open + reserved >= self.connections_max() {
                if self.lendable() > 0
                    && self.returned.is_empty()
                    && let Some(conn) = self.with_room.front().copied()
                    && !self.conns.values().any(|conn| conn.is_making_room())
                {
                    // One that always carries something would never be free to be lent.
                    self.retire(conn, Reason::MakeRoom);
                } else if for_waiters {
                    self.give_up_resting(now);
                }
                return;
            }
            let first = self.waiters.first_of(&self.turns, 0);
            if !self.connect(now, Role::Exchange, first) {
                return;
            }
        }
    }

    /// Whether one more connection may be opened for requests to come.
    fn has_place(&self) -> bool {
        !self.closing_down
            && self.places.open + self.wanting_lanes() < self.connections_max()
            && self.places.retired < self.settings.limits.retired_max.max(1)
    }

    /// A request that may not wait found no connection: the next one is to find one.
    pub(super) fn connect_for_next(&mut self, now: Time) {
        if self.has_place() && self.places.connecting_exchange == 0 {
            self.connect(now, Role::Exchange, None);
        }
    }

    /// A request found a connection: where those of all addresses take turns, one that has none gets
    /// its own for the next request.
    pub(super) fn connect_to_left_out(&mut self, now: Time) {
        if self.has_place() && self.balance.lacks_address(now) {
            self.connect(now, Role::Exchange, None);
        }
    }

    /// Closes a connection that rests and serves nobody who waits now: whether there is one.
    pub(super) fn give_up_resting(&mut self, now: Time) -> bool {
        // What was lent serves nobody else; and with one place for both roles, a resting one-way
        // connection makes room.
        if let Some(conn) = self.returned.first().copied() {
            self.close(conn, Reason::MakeRoom);
        } else if self.places.exchange == 0
            && let Some(conn) = self.resting_one_way()
        {
            self.finish_one_way(now, conn, Reason::MakeRoom);
        } else if let Some(conn) = self.idle.first().copied()
            && let Some(State::Idle { since }) = self.conns.get(conn).map(|c| c.state)
        {
            // It goes to an address that no waiter may use now. Not at once: what is opened
            // instead may turn out to be no better.
            let at = since + self.settings.limits.backoff_base;
            match at <= now {
                true => self.close(conn, Reason::MakeRoom),
                false => self.look_again(at),
            }
        } else {
            return false;
        }
        true
    }

    /// Looks then, at the latest, for what can be opened or used.
    pub(super) fn look_again(&mut self, at: Time) {
        if self.retry_scheduled_at.is_none_or(|scheduled| scheduled > at) {
            self.retry_scheduled_at = Some(at);
            self.deadlines.insert(at, Timer::Retry);
        }
    }

    fn longest_idle(&self) -> Option<ConnId> {
        self.returned.first().or_else(|| self.idle.first()).copied()
    }

    fn resting_one_way(&self) -> Option<ConnId> {
        let conns = self.lanes.iter().filter_map(|lane| lane.conn);
        let is_idle = |conn: &Conn| matches!(conn.state, State::Idle { .. });
        conns.into_iter().find(|conn| self.conns.get(*conn).is_some_and(is_idle))
    }

    /// Starts a connect if there is an address to go to now: that of the request it is for.
    pub(super) fn connect(&mut self, now: Time, role: Role, first: Option<RequestId>) -> bool {
        if self.places.connecting >= self.settings.limits.connecting_max {
            return false;
        }
        let owner = first.and_then(|first| self.in_flight.get(first)).map(|entry| entry.owner);
        let remote = match self.balance.pick(now, owner.map(key)) {
            Pick::Address(remote) => remote,
            Pick::NotBefore(at) => {
                self.look_again(at);
                return false;
            }
            Pick::Probing | Pick::Unresolved => return false,
        };
        let conn = self.conns.insert(Conn {
            role,
            remote,
            state: State::Connecting,
            opened_at: now,
            uses: 0,
            messages_out: 0,
            bytes_out: 0,
            messages_in: 0,
            bytes_in: 0,
            replies_discarded: 0,
            expires_at: None,
            scheduled_at: None,
            retiring: None,
            is_listed: false,
            lent_to: None,
        });
        self.count(role, State::Connecting, 1);
        if let Some(lane) = role.lane() {
            self.lanes[lane].conn = Some(conn);
        }
        self.schedule_conn(conn);
        self.actions.push_back(Action::Connect { conn, role, remote });
        true
    }

    /// The only way from one state to another.
    pub(super) fn move_to(&mut self, conn: ConnId, state: State) {
        let Some(record) = self.conns.get_mut(conn) else {
            return;
        };
        let (role, remote) = (record.role, record.remote);
        let before = std::mem::replace(&mut record.state, state);
        let is_listed = record.is_listed;
        self.count(role, before, -1);
        self.count(role, state, 1);
        let takes_nothing_new = match state {
            State::Connecting | State::Idle { .. } | State::InUse | State::Leased { .. } => false,
            State::Draining { .. } | State::Closing { .. } => true,
        };
        if takes_nothing_new {
            if let Some(lane) = role.lane()
                && self.lanes[lane].conn == Some(conn)
            {
                self.lanes[lane].conn = None;
            }
            if let State::Idle { .. } = before {
                self.idle.retain(|idle| *idle != conn);
                self.returned.retain(|returned| *returned != conn);
            }
            if is_listed {
                self.with_room.retain(|listed| *listed != conn);
            }
            self.leave(remote, before);
        }
        self.schedule_conn(conn);
    }

    pub(super) fn close(&mut self, conn: ConnId, reason: Reason) {
        let closing = match self.conns.get(conn).map(|record| record.state) {
            None | Some(State::Closing { .. }) => return,
            Some(
                State::Connecting
                | State::Idle { .. }
                | State::InUse
                | State::Leased { .. }
                | State::Draining { .. },
            ) => State::Closing { reason },
        };
        self.move_to(conn, closing);
        self.actions.push_back(Action::Close { conn, reason });
    }

    /// A connection in this state goes on to one that takes nothing new.
    fn leave(&mut self, remote: SocketAddr, before: State) {
        match before {
            State::Connecting => self.balance.handle_abandoned(remote),
            State::Idle { .. } | State::InUse | State::Leased { .. } => {
                self.balance.handle_ended(remote);
            }
            State::Draining { .. } | State::Closing { .. } => {}
        }
    }

    /// Ends the connections to an address in order: those that carry something when it is done.
    pub(super) fn leave_address(&mut self, now: Time, remote: SocketAddr) {
        let conns = self.conns.iter().filter(|(_, record)| record.remote == remote);
        let conns: Vec<_> = conns.map(|(conn, r)| (conn, r.role, r.state)).collect();
        for (conn, role, state) in conns {
            match (state, role) {
                (State::Connecting | State::Idle { .. }, Role::Exchange) => {
                    self.close(conn, Reason::AddressGone);
                }
                (State::Connecting | State::Idle { .. }, Role::OneWay { .. }) => {
                    self.finish_one_way(now, conn, Reason::AddressGone);
                }
                (State::InUse, Role::Exchange) => self.retire(conn, Reason::AddressGone),
                (State::InUse, Role::OneWay { .. }) => {}
                (State::Leased { .. } | State::Draining { .. } | State::Closing { .. }, _) => {}
            }
        }
    }

    pub(super) fn forget(&mut self, conn: ConnId, reason: Reason) {
        let Some(record) = self.conns.remove(conn) else {
            return;
        };
        self.count(record.role, record.state, -1);
        self.leave(record.remote, record.state);
        if let Some(at) = record.scheduled_at {
            self.deadlines.remove(at, Timer::Conn(conn));
        }
        self.in_flight.take_all(conn);
        self.replies_discarded_before += record.replies_discarded;
        self.closed.add(reason, 1);
    }

    pub(super) fn count(&mut self, role: Role, state: State, change: isize) {
        let places = &mut self.places;
        let add = |place: &mut usize| *place = place.saturating_add_signed(change);
        let is_exchange = role == Role::Exchange;
        match state {
            State::Connecting => {
                add(&mut places.connecting);
                add(&mut places.open);
                if is_exchange {
                    add(&mut places.connecting_exchange);
                    add(&mut places.exchange);
                }
            }
            State::Idle { .. } | State::InUse | State::Leased { .. } => {
                add(&mut places.open);
                if is_exchange {
                    add(&mut places.exchange);
                }
            }
            State::Draining { .. } if is_exchange => add(&mut places.retired),
            State::Draining { .. } | State::Closing { .. } => {
                add(&mut places.open);
                if let Some(lane) = role.lane() {
                    add(&mut self.lanes[lane].ending);
                }
            }
        }
    }

    /// When something must happen to a connection by itself.
    pub(super) fn conn_due(&self, conn: ConnId) -> Option<Time> {
        let record = self.conns.get(conn)?;
        let limits = &self.settings.limits;
        match record.state {
            State::Connecting => Some(record.opened_at + limits.connect_timeout),
            State::Idle { since } => {
                let idle_end =
                    (!limits.idle_timeout.is_zero()).then(|| since + limits.idle_timeout);
                idle_end.into_iter().chain(record.expires_at).min()
            }
            State::InUse => self.in_flight.due(conn),
            State::Leased { until, .. } => Some(until),
            State::Draining { until, .. } => Some(until),
            State::Closing { .. } => None,
        }
    }

    /// Makes sure that a deadline no later than the connection's own is set. One that is earlier
    /// stays and finds, when it comes, that there is nothing to do yet.
    pub(super) fn schedule_conn(&mut self, conn: ConnId) {
        let Some(due) = self.conn_due(conn) else {
            return;
        };
        let Some(record) = self.conns.get_mut(conn) else {
            return;
        };
        if let Some(scheduled) = record.scheduled_at {
            if scheduled <= due {
                return;
            }
            self.deadlines.remove(scheduled, Timer::Conn(conn));
        }
        record.scheduled_at = Some(due);
        self.deadlines.insert(due, Timer::Conn(conn));
    }

    pub(super) fn handle_conn_due(&mut self, now: Time, conn: ConnId) {
        if self.conn_due(conn).is_some_and(|due| due <= now) {
            self.end_conn_wait(now, conn);
        }
        self.schedule_conn(conn);
    }

    pub(super) fn end_conn_wait(&mut self, now: Time, conn: ConnId) {
        let Some(record) = self.conns.get(conn) else {
            return;
        };
        match record.state {
            State::Connecting => self.handle_connect_failed(now, conn, Reason::ConnectTimeout),
            State::Idle { .. } => {
                let expired = record.expires_at.is_some_and(|at| at <= now);
                let warm = self.settings.limits.connections_min;
                let kept_warm = match record.role {
                    Role::Exchange => self.places.exchange <= warm,
                    Role::OneWay { lane } => {
                        self.settings.protocol == Protocol::UdpWriteOnly && lane < warm
                    }
                };
                if kept_warm && !expired && self.waiters.is_empty() {
                    // Idle counts anew: it is kept on purpose. Whoever waits beside it needs its
                    // place for another address.
                    if let Some(record) = self.conns.get_mut(conn) {
                        record.state = State::Idle { since: now };
                    }
                    return;
                }
                let reason = if expired { Reason::Lifetime } else { Reason::IdleTimeout };
                match record.role {
                    Role::Exchange => self.close(conn, reason),
                    Role::OneWay { .. } => self.finish_one_way(now, conn, reason),
                }
            }
            State::InUse => self.handle_slots_due(now, conn),
            State::Leased { lease, .. } => self.expire_lease(now, lease),
            State::Draining { reason, .. } => self.close(conn, reason),
            State::Closing { .. } => {}
        }
    }
}
