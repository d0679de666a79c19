//! Which reply belongs to whom: the table of requests that await one.
//!
//! A request is *waiting* for a connection or *on* one. Matching is exclusive: a connection
//! carries at most one request, so the next reply on it belongs to that request and to no other.
//! An entry leaves the table exactly once, when its request has its end; a late event finds no
//! entry and reaches nobody.

use slotmap::{SecondaryMap, SlotMap};

use crate::ids::{ConnId, RequestId, SourceId};
use crate::timers::Time;

/// Who asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    /// The session.
    pub source: SourceId,
    /// The session's own name for the request.
    pub correlation: u64,
}

/// One request that has not ended.
#[derive(Debug, Clone, Copy)]
pub struct Request {
    /// Who asked.
    pub owner: Owner,
    /// When it was asked.
    pub asked_at: Time,
    /// The caller's own deadline.
    pub caller_deadline: Option<Time>,
    /// Where it is.
    pub place: Place,
}

/// Where a request is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Among the waiters, until the deadline.
    Waiting {
        /// The earlier of `wait_timeout` and the caller's deadline.
        deadline: Time,
    },
    /// On a connection, until the deadline.
    On {
        /// Which.
        conn: ConnId,
        /// The earlier of `request_timeout` and the caller's deadline.
        deadline: Time,
    },
}

/// The requests of one upstream that have not ended.
#[derive(Debug, Default)]
pub struct InFlight {
    requests: SlotMap<RequestId, Request>,
    on_conn: SecondaryMap<ConnId, RequestId>,
}

impl InFlight {
    /// How many requests have not ended.
    pub fn len(&self) -> usize {
        self.requests.len()
    }

    /// Adds a request that waits until `deadline`.
    pub fn insert(
        &mut self,
        owner: Owner,
        asked_at: Time,
        caller_deadline: Option<Time>,
        deadline: Time,
    ) -> RequestId {
        let place = Place::Waiting { deadline };
        self.requests.insert(Request { owner, asked_at, caller_deadline, place })
    }

    /// The request, while it has not ended.
    pub fn get(&self, request: RequestId) -> Option<&Request> {
        self.requests.get(request)
    }

    /// The request on a connection.
    pub fn on(&self, conn: ConnId) -> Option<RequestId> {
        self.on_conn.get(conn).copied()
    }

    /// When the request on a connection times out.
    pub fn deadline_on(&self, conn: ConnId) -> Option<Time> {
        match self.requests.get(self.on(conn)?)?.place {
            Place::On { deadline, .. } => Some(deadline),
            Place::Waiting { .. } => None,
        }
    }

    /// Puts a request on a connection that carries none.
    pub fn assign(&mut self, request: RequestId, conn: ConnId, deadline: Time) {
        debug_assert!(self.on(conn).is_none(), "matching is exclusive");
        if let Some(entry) = self.requests.get_mut(request) {
            entry.place = Place::On { conn, deadline };
            self.on_conn.insert(conn, request);
        }
    }

    /// Takes the request off its connection, of which it used nothing, to wait again.
    pub fn unassign(&mut self, conn: ConnId, deadline: Time) -> Option<RequestId> {
        let request = self.on_conn.remove(conn)?;
        self.requests.get_mut(request)?.place = Place::Waiting { deadline };
        Some(request)
    }

    /// Removes a request that has its end.
    pub fn remove(&mut self, request: RequestId) -> Option<Request> {
        let entry = self.requests.remove(request)?;
        if let Place::On { conn, .. } = entry.place {
            self.on_conn.remove(conn);
        }
        Some(entry)
    }

    /// Every request.
    pub fn ids(&self) -> Vec<RequestId> {
        self.requests.keys().collect()
    }
}
