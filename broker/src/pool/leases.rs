//! Leases: the loan of a whole connection to one session.
//!
//! ```text
//!   asked --a connection is free--> held --release, clean--> (returned: the connection rests)
//!     |                              |
//!     | wait_timeout, breaker        | its deadline, the end of its session, not clean
//!     v                              v
//!   (refused)                      (ended: the connection is shut down and closed)
//! ```
//!
//! Whoever held a connection may have kept a copy of its descriptor. So one that was returned
//! serves only later leases of the same user, never requests.

use poolbroker_proto::reason::Reason;
use slotmap::SlotMap;

use super::turns::{Queue, Turn, makes_way_for};
use super::{Action, Pool, State, Timer, earliest};
use crate::ids::{ConnId, LeaseId, SourceId};
use crate::inflight::Owner;
use crate::stats::Tally;
use crate::timers::Time;

/// What becomes of the wish for a lease at first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Lend {
    /// This connection is lent, once it was found to be sound.
    Granted {
        /// The lease's id.
        lease: LeaseId,
        /// Which connection.
        conn: ConnId,
    },
    /// It waits.
    Queued,
    /// There will be none.
    Refused(Reason),
}

/// One lease, asked for or held.
#[derive(Debug, Clone, Copy)]
struct Lease {
    owner: Owner,
    /// Until when its owner wants it.
    caller_deadline: Option<Time>,
    /// None: it waits.
    conn: Option<ConnId>,
    /// When it began to wait, while it does.
    came: Option<i64>,
    /// Who had that connection before.
    lent_before: Option<u32>,
    /// Until when it waits.
    wait_deadline: Time,
}

/// What became of the leases of an upstream:
/// `asked = refused + waiting + granted` and `granted = returned + ended + held`.
#[derive(Debug, Clone, Default)]
pub struct LeaseCounts {
    /// All that clients asked for.
    pub asked: u64,
    /// Never granted.
    pub refused: Tally,
    /// Given a connection.
    pub granted: u64,
    /// Given back clean.
    pub returned: u64,
    /// Ended otherwise.
    pub ended: Tally,
}

/// The leases of one upstream.
#[derive(Debug, Default)]
pub(super) struct Leases {
    table: SlotMap<LeaseId, Lease>,
    waiters: Queue<LeaseId>,
    pub(super) counts: LeaseCounts,
}

impl Pool {
    /// What became of leases.
    pub fn lease_counts(&self) -> &LeaseCounts {
        &self.leases.counts
    }

    /// Leases that are held.
    pub fn leases_held(&self) -> usize {
        self.leases.table.len() - self.leases.waiters.len()
    }

    /// How many leases may be held at once.
    fn leases_max(&self) -> usize {
        match self.settings.limits.leases_max {
            // Requests keep a place, where there is more than one.
            0 => self.connections_max().saturating_sub(1).max(1),
            leases_max => leases_max,
        }
    }

    fn may_lend(&self) -> bool {
        self.leases_held() < self.leases_max()
    }

    /// Of those who wait for a lease, how many could have one if there were connections.
    pub(super) fn lendable(&self) -> usize {
        self.leases_max().saturating_sub(self.leases_held()).min(self.lease_waiters())
    }

    /// Leases that are waited for.
    pub fn lease_waiters(&self) -> usize {
        self.leases.waiters.len()
    }

    pub(super) fn lease_owner(&self, lease: LeaseId) -> Option<Owner> {
        self.leases.table.get(lease).map(|lease| lease.owner)
    }

    /// Asks for the loan of a connection, at the longest until `caller_deadline`.
    pub fn lease(&mut self, now: Time, owner: Owner, caller_deadline: Option<Time>) -> Lend {
        self.leases.counts.asked += 1;
        if let Some(reason) = self.settings.leases_refused {
            return self.refuse_lease(reason);
        }
        let wait_deadline = earliest(now + self.settings.limits.wait_timeout, caller_deadline);
        let wish = Lease {
            owner,
            caller_deadline,
            conn: None,
            came: None,
            lent_before: None,
            wait_deadline,
        };
        if self.may_lend()
            && let Some(conn) = self.take_returned(owner.uid).or_else(|| self.idle.pop())
        {
            let lease = self.leases.table.insert(wish);
            self.lend(now, lease, conn);
            return Lend::Granted { lease, conn };
        }
        if self.places.exchange == self.places.connecting_exchange
            && let Some(reason) = self.balance.fail_fast(now)
        {
            return self.refuse_lease(reason);
        }
        let (waiting, waiters_max) = (self.lease_waiters(), self.settings.limits.waiters_max);
        if waiting >= waiters_max {
            // As with requests.
            let waiters = &self.leases.waiters;
            let way = makes_way_for(owner.uid, waiters.counts()).filter(|_| waiting == waiters_max);
            let Some((_, other)) = way.and_then(|greediest| waiters.last_of(greediest)) else {
                return self.refuse_lease(Reason::WaitersFull);
            };
            self.give_up_lease(other, Reason::WaitersFull);
        }
        let lease = self.leases.table.insert(wish);
        let came = self.turns.begin(owner.uid);
        self.wait_for_lease(lease, came);
        self.want_connections(now);
        Lend::Queued
    }

    /// The connection that a session holds by this lease.
    pub fn leased(&self, source: SourceId, lease: LeaseId) -> Option<ConnId> {
        let lease = self.leases.table.get(lease).filter(|lease| lease.owner.source == source)?;
        lease.conn
    }

    /// A lease that was granted could not be passed on: its connection is what it was before.
    pub fn handle_unlendable(&mut self, now: Time, lease: LeaseId, reason: Reason) {
        if let Some(Lease { conn: Some(conn), lent_before, .. }) = self.leases.table.remove(lease) {
            self.leases.counts.ended.add(reason, 1);
            if let Some(record) = self.conns.get_mut(conn) {
                record.lent_to = lent_before;
            }
            self.free(now, conn);
            self.serve_lease_waiters(now);
        }
    }

    /// A lease has ended: given back clean, or why its connection is of no use any more.
    pub fn handle_returned(&mut self, now: Time, lease: LeaseId, found: Result<(), Reason>) {
        let Some(Lease { conn: Some(conn), .. }) = self.leases.table.remove(lease) else {
            return;
        };
        match found {
            Ok(()) => {
                self.leases.counts.returned += 1;
                self.free(now, conn);
            }
            Err(reason) => {
                self.leases.counts.ended.add(reason, 1);
                self.revoke(conn, reason);
                self.want_connections(now);
            }
        }
        self.serve_lease_waiters(now);
    }

    /// A session has ended, and with it its leases: whether it had any.
    pub fn end_leases(&mut self, now: Time, source: SourceId) -> bool {
        let of_source = self.leases.table.iter().filter(|(_, l)| l.owner.source == source);
        let mut ended: Vec<_> = of_source.map(|(id, lease)| (id, lease.conn)).collect();
        let had_any = !ended.is_empty();
        // Those that wait go first: what the others free is not for them.
        ended.sort_by_key(|(_, conn)| conn.is_some());
        for (id, conn) in ended {
            match conn {
                Some(_) => self.handle_returned(now, id, Err(Reason::LeaseEnded)),
                None => {
                    self.forget_lease_waiter(id);
                    self.leases.counts.refused.add(Reason::ClientGone, 1);
                }
            }
        }
        had_any
    }

    /// The broker ends: nothing more is lent, and whoever holds a connection keeps it, alone from now
    /// on.
    pub fn stop_lending(&mut self) {
        self.settings.leases_refused = Some(Reason::ShuttingDown);
        for lease in self.leases.table.keys().collect::<Vec<_>>() {
            match self.leases.table.get(lease).and_then(|lease| lease.conn) {
                Some(conn) => {
                    self.leases.table.remove(lease);
                    self.leases.counts.ended.add(Reason::Drained, 1);
                    self.close(conn, Reason::Drained);
                }
                None => self.give_up_lease(lease, Reason::ShuttingDown),
            }
        }
    }

    /// A lease is held for too long.
    pub(super) fn expire_lease(&mut self, now: Time, lease: LeaseId) {
        self.handle_returned(now, lease, Err(Reason::LeaseExpired));
    }

    /// Its time to wait is over.
    pub(super) fn handle_lease_wait_over(&mut self, now: Time, lease: LeaseId) {
        let Some(wish) = self.leases.table.get(lease).copied() else {
            return;
        };
        let by_caller = wish.caller_deadline.is_some_and(|deadline| deadline <= now);
        let reason = if by_caller { Reason::RequestTimeout } else { Reason::WaitTimeout };
        self.give_up_lease(lease, reason);
    }

    pub(super) fn refuse_lease_waiters(&mut self, reason: Reason) {
        for lease in self.leases.waiters.all() {
            self.give_up_lease(lease, reason);
        }
    }

    /// Whether a connection that carries nothing goes to whoever waits for a lease, and not to a request
    /// whose turn is later.
    pub(super) fn lends_next(&self, conn: ConnId) -> bool {
        let Some((lease, _)) = self.lease_waiter_for(conn).filter(|_| self.may_lend()) else {
            return false;
        };
        let request = self.waiters.lines(&self.turns).map(|(.., turn)| turn).min();
        request.is_none_or(|request| lease < request)
    }

    /// Lends a connection that carries nothing to whoever waits for one: whether somebody does.
    pub(super) fn lend_to_waiter(&mut self, now: Time, conn: ConnId) -> bool {
        if !self.may_lend() {
            return false;
        }
        let Some(lease) = self.live_lease_waiter_for(now, conn) else { return false };
        let Some(owner) = self.lease_owner(lease) else { return false };
        if self.forget_wait(lease) {
            self.turns.serve(owner.uid);
        }
        self.lend(now, lease, conn);
        self.actions.push_back(Action::Lend { conn, lease, owner });
        true
    }

    /// Lends what is idle to those who wait.
    pub(super) fn serve_lease_waiters(&mut self, now: Time) {
        while self.may_lend()
            && let Some((_, lease)) = self.leases.waiters.first(&self.turns, |_| true)
            && let Some(uid) = self.leases.table.get(lease).map(|lease| lease.owner.uid)
            && let Some(conn) = self.take_returned(uid).or_else(|| self.idle.pop())
        {
            if !self.lend_to_waiter(now, conn) {
                self.rest(now, conn);
            }
        }
    }

    /// The connection of a lease was found broken before it was passed on: it waits again.
    pub(super) fn lend_again(&mut self, lease: LeaseId) {
        if let Some(wish) = self.leases.table.get_mut(lease) {
            if let Some(record) = wish.conn.take().and_then(|conn| self.conns.get_mut(conn)) {
                record.lent_to = wish.lent_before;
            }
            self.leases.counts.granted -= 1;
            let came = self.turns.begin_first(wish.owner.uid);
            self.wait_for_lease(lease, came);
        }
    }

    fn wait_for_lease(&mut self, lease: LeaseId, came: i64) {
        if let Some(wish) = self.leases.table.get_mut(lease) {
            wish.came = Some(came);
            self.deadlines.insert(wish.wait_deadline, Timer::Lease(lease));
            self.leases.waiters.push(wish.owner.uid, came, lease);
        }
    }

    /// A connection that was returned by the same user.
    fn take_returned(&mut self, uid: u32) -> Option<ConnId> {
        let is_theirs =
            |conn: &ConnId| self.conns.get(*conn).is_some_and(|record| record.lent_to == Some(uid));
        let at = self.returned.iter().rposition(is_theirs)?;
        Some(self.returned.remove(at))
    }

    /// The same, once those who gave up meanwhile are gone: timers run after events.
    fn live_lease_waiter_for(&mut self, now: Time, conn: ConnId) -> Option<LeaseId> {
        while let Some((_, lease)) = self.lease_waiter_for(conn) {
            let deadline = self.leases.table.get(lease)?.caller_deadline;
            if deadline.is_none_or(|deadline| deadline > now) {
                return Some(lease);
            }
            self.give_up_lease(lease, Reason::RequestTimeout);
        }
        None
    }

    fn lease_waiter_for(&self, conn: ConnId) -> Option<(Turn, LeaseId)> {
        let lent_to = self.conns.get(conn)?.lent_to;
        let may = |uid| lent_to.is_none_or(|lent_to| lent_to == uid);
        self.leases.waiters.first(&self.turns, may)
    }

    fn lend(&mut self, now: Time, lease: LeaseId, conn: ConnId) {
        let limit = now + self.settings.limits.lease_timeout;
        let Some(entry) = self.leases.table.get_mut(lease) else { return };
        entry.conn = Some(conn);
        self.leases.counts.granted += 1;
        let (until, uid) = (earliest(limit, entry.caller_deadline), entry.owner.uid);
        if let Some(record) = self.conns.get_mut(conn) {
            record.uses += 1;
            entry.lent_before = record.lent_to;
            record.lent_to = Some(uid);
        }
        self.move_to(conn, State::Leased { lease, until });
        self.list(conn);
    }

    fn revoke(&mut self, conn: ConnId, reason: Reason) {
        self.actions.push_back(Action::Revoke { conn });
        self.close(conn, reason);
    }

    fn refuse_lease(&mut self, reason: Reason) -> Lend {
        self.leases.counts.refused.add(reason, 1);
        Lend::Refused(reason)
    }

    fn give_up_lease(&mut self, lease: LeaseId, reason: Reason) {
        if let Some(owner) = self.forget_lease_waiter(lease) {
            self.leases.counts.refused.add(reason, 1);
            self.actions.push_back(Action::RefuseLease { owner, reason });
        }
    }

    fn forget_lease_waiter(&mut self, lease: LeaseId) -> Option<Owner> {
        let waited = self.forget_wait(lease);
        let owner = self.leases.table.remove(lease)?.owner;
        if waited {
            self.turns.end(owner.uid);
        }
        Some(owner)
    }

    /// It does not wait any more: whether it did.
    fn forget_wait(&mut self, lease: LeaseId) -> bool {
        let Some(wish) = self.leases.table.get_mut(lease) else { return false };
        self.deadlines.remove(wish.wait_deadline, Timer::Lease(lease));
        let Some(came) = wish.came.take() else { return false };
        self.leases.waiters.remove(wish.owner.uid, came);
        true
    }
}
