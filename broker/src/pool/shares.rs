//! What each address has of the limits, where each session has an address of its own.
//!
//! Those who wait for one address must not take every connect and every place from those who wait
//! for another: an address that is silent would hold all of them until its connects time out. So
//! the next connect is for the address that has the fewest connections, and one that has more than
//! its share gives one up: first a connect under way, else a connection once it is free. As that
//! may be never, an address that has a connection leaves a place to each one that has none.

use std::cmp::Reverse;

use poolbroker_proto::reason::Reason;

use super::turns::Turn;
use super::waiters::Line;
use super::{Conn, Pool, Role, State};
use crate::balance::{Breaker, Pick};
use crate::ids::ConnId;
use crate::timers::Time;

/// What an address has. One-way connections, which cannot go elsewhere, do not count.
#[derive(Debug, Clone, Copy)]
struct Share {
    line: Line,
    is_failing: bool,
    /// It is on trial at the best. Then it takes from nobody, and nobody from it: while its trial
    /// is under way those who wait for it stand elsewhere, and would only undo each other's work.
    is_ejected: bool,
    /// Whose turn it is of those who wait for it, if somebody does.
    turn: Option<Turn>,
    connecting: usize,
    conns: usize,
}

impl Share {
    /// Of two that have equally much: those first whose address is well, then who waited longer.
    fn order(&self) -> (bool, Option<Turn>) {
        (self.is_failing, self.turn)
    }

    /// Whether one of the connects under way to `other` should be one to this address. Not if it
    /// would be one to `other` again.
    fn lacks_connect_of(&self, other: &Share) -> bool {
        let lead = usize::from(self.is_failing || !other.is_failing);
        !self.is_ejected
            && !other.is_ejected
            && other.connecting > self.connecting + lead
            && other.conns > self.conns + lead
    }

    /// Whether one of the connections to `other` should be one to this address, and would stay one.
    fn lacks_conn_of(&self, other: &Share) -> bool {
        // Where there are fewer places than addresses, they take turns.
        let is_first = other.turn.is_none() || self.order() < other.order();
        let is_more =
            other.conns > self.conns + 1 || (self.conns == 0 && other.conns > 0 && is_first);
        is_more && !self.is_ejected && !other.is_ejected
    }
}

impl Pool {
    /// How many connections those in a line want.
    pub(super) fn conns_for(&self, line: Line) -> usize {
        self.waiters.len_of(line).div_ceil(self.settings.limits.pipeline_depth)
    }

    /// Starts the connects that those want and may have who wait for an address of their own; how
    /// many are under way for them.
    pub(super) fn connect_for_addresses(&mut self, now: Time) -> usize {
        loop {
            self.line_up(now);
            if self.waiters.is_empty() || self.waiters.len_of(0) > 0 {
                return 0;
            }
            let shares = self.shares();
            if !self.connect_for_neediest(now, &shares) {
                let under_way = |share: &Share| share.connecting.min(self.conns_for(share.line));
                return shares.iter().map(under_way).sum();
            }
        }
    }

    /// Starts one connect, or makes room for it: whether it was started.
    fn connect_for_neediest(&mut self, now: Time, shares: &[Share]) -> bool {
        let limits = &self.settings.limits;
        let (connecting_max, retired_max) = (limits.connecting_max, limits.retired_max.max(1));
        if self.places.retired >= retired_max {
            return false;
        }
        let Some(needy) = self.neediest(now, shares) else { return false };
        if self.places.connecting >= connecting_max {
            let others = shares.iter().filter(|share| needy.lacks_connect_of(share));
            let most = others.max_by_key(|share| share.connecting).copied();
            let Some(conn) = most.and_then(|most| self.last_connect(most.line)) else {
                return false;
            };
            self.close(conn, Reason::MakeRoom);
        }
        let taken = self.places.open + self.wanting_lanes();
        if taken >= self.connections_max() {
            self.make_room(now, shares, &needy);
            return false;
        }
        let is_left_out = |share: &&Share| share.conns == 0 && !share.is_failing;
        let left_out = shares.iter().filter(is_left_out).count();
        if needy.conns > 0 && taken + left_out >= self.connections_max() {
            return false;
        }
        let first = self.waiters.first_of(&self.turns, needy.line);
        self.connect(now, Role::Exchange, first)
    }

    /// Of the addresses that want a connect and may have one, that with the fewest connections.
    fn neediest(&mut self, now: Time, shares: &[Share]) -> Option<Share> {
        let wants = |share: &&Share| self.conns_for(share.line) > share.connecting;
        let mut wanting: Vec<_> = shares.iter().filter(wants).copied().collect();
        wanting.sort_unstable_by_key(|share| (share.conns, share.order()));
        for share in wanting {
            match self.balance.obstacle_to(now, share.line - 1) {
                None => return Some(share),
                Some(Pick::NotBefore(at)) => self.look_again(at),
                Some(Pick::Probing | Pick::Unresolved | Pick::Address(_)) => {}
            }
        }
        None
    }

    fn make_room(&mut self, now: Time, shares: &[Share], needy: &Share) {
        let is_leaving = |(_, conn): (ConnId, &Conn)| {
            conn.is_making_room() || matches!(conn.state, State::Closing { .. })
        };
        if self.conns.iter().any(is_leaving) || self.give_up_resting(now) {
            return;
        }
        let others = shares.iter().filter(|share| needy.lacks_conn_of(share));
        let Some(most) = others.max_by_key(|share| share.conns).copied() else { return };
        if let Some(conn) = self.last_connect(most.line) {
            self.close(conn, Reason::MakeRoom);
        } else if let Some(conn) = self.last_used(most.line) {
            match self.in_flight.slots(conn) {
                (_, 0) => self.close(conn, Reason::MakeRoom),
                (_, _) => self.retire(conn, Reason::MakeRoom),
            }
        }
    }

    /// The connect under way to an address that began last.
    fn last_connect(&self, line: Line) -> Option<ConnId> {
        self.last_of(line, |state| state == State::Connecting)
    }

    /// The connection in use to an address that was opened last.
    fn last_used(&self, line: Line) -> Option<ConnId> {
        self.last_of(line, |state| state == State::InUse)
    }

    fn last_of(&self, line: Line, is_wanted: impl Fn(State) -> bool) -> Option<ConnId> {
        let goes_there = |conn: &Conn| {
            conn.role == Role::Exchange
                && conn.retiring.is_none()
                && is_wanted(conn.state)
                && self.line_at(conn) == Some(line)
        };
        let conns = self.conns.iter().filter(|(_, conn)| goes_there(conn));
        conns.max_by_key(|(id, conn)| (conn.opened_at, Reverse(*id))).map(|(id, _)| id)
    }

    fn line_at(&self, conn: &Conn) -> Option<Line> {
        self.balance.index_of(conn.remote).map(|index| 1 + index)
    }

    fn shares(&self) -> Vec<Share> {
        let mut shares: Vec<_> = (1..)
            .zip(self.balance.health())
            .map(|(line, health)| Share {
                line,
                is_failing: health.failures > 0,
                is_ejected: health.breaker != Breaker::Closed,
                turn: None,
                connecting: 0,
                conns: 0,
            })
            .collect();
        for (line, _, turn) in self.waiters.lines(&self.turns) {
            if let Some(share) = shares.get_mut(line - 1) {
                share.turn = Some(turn);
            }
        }
        for conn in self.conns.values().filter(|conn| conn.role == Role::Exchange) {
            let is_connecting = conn.state == State::Connecting;
            if (is_connecting || conn.is_open())
                && let Some(share) = self.line_at(conn).and_then(|line| shares.get_mut(line - 1))
            {
                share.conns += 1;
                share.connecting += usize::from(is_connecting);
            }
        }
        shares
    }
}
