//! One attached local process, or one FIFO: what it may do, and what became of its messages.
//!
//! ```text
//!   Handshake --hello of our version--> Open --end of input, error, shutdown--> (closed)
//!       |  handshake_timeout, anything else
//!       +--> (closed)
//! ```
//!
//! FIFOs and attached pipes have no handshake and begin `Open` with one handle. A session keeps
//! one ledger per opened upstream, and knows which of its requests are in flight so that they can
//! be cancelled when it ends. Pure: see [`crate::pool`] for the contract.

use std::collections::VecDeque;
use std::time::Duration;

use poolbroker_proto::frame;
use poolbroker_proto::message::Outcomes;
use poolbroker_proto::reason::Reason;

use crate::config::HANDLES_MAX;
use crate::ids::RequestId;
use crate::stats::{Ledger, Settled, Tally};
use crate::timers::Time;

/// The medium of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// The client socket.
    Unix,
    /// A FIFO in the runtime directory.
    Fifo,
    /// A passed pipe.
    Pipe,
    /// A passed end of a socketpair.
    Socketpair,
    /// A pair of rings, beside the client socket.
    Ring,
}

impl Transport {
    /// As `status` prints it.
    pub const fn name(self) -> &'static str {
        match self {
            Transport::Unix => "unix",
            Transport::Fifo => "fifo",
            Transport::Pipe => "pipe",
            Transport::Socketpair => "socketpair",
            Transport::Ring => "ring",
        }
    }
}

/// Who is attached.
#[derive(Debug, Clone, Copy)]
pub struct Peer {
    /// The process, as the kernel named it when it connected; 0 for a FIFO.
    pub pid: i32,
    /// Its user.
    pub uid: u32,
}

/// The limits of a session.
#[derive(Debug, Clone, Copy)]
pub struct SessionLimits {
    /// From connecting to the handshake.
    pub handshake_timeout: Duration,
    /// How long an unfinished message may stand still.
    pub partial_timeout: Duration,
    /// How long a passed descriptor may stay unclaimed.
    pub descriptor_timeout: Duration,
    /// Requests without a reply.
    pub requests_in_flight_max: usize,
}

/// What the shard is to tell the client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Everything sent before the flush has its outcome.
    Flushed {
        /// The flush.
        correlation: u64,
        /// The handle's totals.
        outcomes: Outcomes,
    },
}

/// What ends an unfinished message by time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unfinished {
    /// Nothing is unfinished.
    Nothing,
    /// Bytes of a message that is not complete.
    Message,
    /// The same, with a descriptor that the message has not claimed yet.
    MessageWithDescriptor,
}

#[derive(Debug)]
enum Phase {
    Handshake { deadline: Time },
    Open,
}

#[derive(Debug)]
struct Handle {
    /// None: it was opened at another broker, and this one has no such upstream.
    upstream: Option<usize>,
    ledger: Ledger,
    flushes: VecDeque<Flush>,
}

#[derive(Debug)]
struct Flush {
    correlation: u64,
    settled_at_least: u64,
}

/// One source of messages. See the module's text.
#[derive(Debug)]
pub struct Session {
    /// Unique in this broker; shown by `status`.
    pub id: u64,
    /// Who it is.
    pub peer: Peer,
    /// Its medium.
    pub transport: Transport,
    limits: SessionLimits,
    phase: Phase,
    handles: Vec<Handle>,
    /// By correlation, which mostly counts up, as the oldest mostly ends first.
    in_flight: VecDeque<(u64, usize, RequestId)>,
    unfinished_deadline: Option<Time>,
    refused: Tally,
    actions: VecDeque<Action>,
}

impl Session {
    /// A client that has connected and not yet said hello.
    pub fn connected(now: Time, id: u64, peer: Peer, limits: SessionLimits) -> Self {
        let deadline = now + limits.handshake_timeout;
        Session::new(id, peer, Transport::Unix, limits, Phase::Handshake { deadline })
    }

    /// A FIFO or an attached pipe: everything goes to `upstream`.
    pub fn bound(
        id: u64,
        peer: Peer,
        transport: Transport,
        limits: SessionLimits,
        upstream: usize,
    ) -> Self {
        let mut session = Session::new(id, peer, transport, limits, Phase::Open);
        session.handles.push(Handle::new(Some(upstream)));
        session
    }

    fn new(id: u64, peer: Peer, transport: Transport, limits: SessionLimits, phase: Phase) -> Self {
        Session {
            id,
            peer,
            transport,
            limits,
            phase,
            handles: Vec::new(),
            in_flight: VecDeque::new(),
            unfinished_deadline: None,
            refused: Tally::default(),
            actions: VecDeque::new(),
        }
    }

    // What there is.

    /// Whether the handshake is done.
    pub fn is_open(&self) -> bool {
        matches!(self.phase, Phase::Open)
    }

    /// The upstream that a handle names.
    pub fn upstream(&self, handle: u16) -> Option<usize> {
        self.handles.get(usize::from(handle)).and_then(|handle| handle.upstream)
    }

    /// The upstreams that its handles mean.
    pub fn upstreams(&self) -> impl Iterator<Item = usize> {
        self.handles.iter().filter_map(|handle| handle.upstream)
    }

    /// How many requests are in flight.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// The requests in flight, to be cancelled when the session ends.
    pub fn requests(&self) -> impl Iterator<Item = (usize, RequestId)> {
        self.in_flight.iter().map(|(_, upstream, request)| (*upstream, *request))
    }

    /// One-way messages accepted from it.
    pub fn accepted(&self) -> u64 {
        self.handles.iter().map(|handle| handle.ledger.accepted).sum()
    }

    /// What never got in, by reason.
    pub fn refused(&self) -> Tally {
        let mut all = self.refused.clone();
        for handle in &self.handles {
            for (reason, count) in handle.ledger.refused.iter() {
                all.add(reason, count);
            }
        }
        all
    }

    /// The totals of one handle.
    pub fn outcomes(&self, handle: u16) -> Outcomes {
        self.handles
            .get(usize::from(handle))
            .map(|handle| handle.ledger.outcomes())
            .unwrap_or_default()
    }

    /// The totals of every handle.
    pub fn all_outcomes(&self) -> Vec<(u16, Outcomes)> {
        (0u16..).zip(&self.handles).map(|(at, handle)| (at, handle.ledger.outcomes())).collect()
    }

    /// Whether every accepted message has its outcome and every request its end.
    pub fn is_settled(&self) -> bool {
        self.in_flight.is_empty()
            && self.handles.iter().all(|handle| handle.ledger.settled() == handle.ledger.accepted)
    }

    /// The next thing to tell the client.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// When to call [`Session::handle_timeout`].
    pub fn next_deadline(&self) -> Option<Time> {
        match self.phase {
            Phase::Handshake { deadline } => Some(deadline),
            Phase::Open => self.unfinished_deadline,
        }
    }

    // Commands.

    /// Opens an upstream; the handle that frames name from now on.
    pub fn open(&mut self, upstream: usize) -> Result<u16, Reason> {
        let known = self.handles.iter().position(|handle| handle.upstream == Some(upstream));
        let at = known.unwrap_or(self.handles.len());
        if at >= HANDLES_MAX {
            return Err(Reason::Quota);
        }
        if known.is_none() {
            self.handles.push(Handle::new(Some(upstream)));
        }
        u16::try_from(at).map_err(|_| Reason::Quota)
    }

    /// Opens the next handle of a session with an earlier broker, whether there is still such an
    /// upstream or not.
    pub fn reopen(&mut self, upstream: Option<usize>) -> Result<(), Reason> {
        if self.handles.len() >= HANDLES_MAX {
            return Err(Reason::Quota);
        }
        self.handles.push(Handle::new(upstream));
        Ok(())
    }

    /// It speaks through a pair of rings from now on.
    pub fn handle_ring(&mut self) {
        self.transport = Transport::Ring;
    }

    /// Whether one more request may be made under this id.
    pub fn check_request(&self, correlation: u64) -> Result<(), Reason> {
        if self.place_of(correlation).is_ok() {
            Err(Reason::DuplicateId)
        } else if self.in_flight.len() >= self.limits.requests_in_flight_max {
            Err(Reason::Quota)
        } else {
            Ok(())
        }
    }

    /// Records that a checked request is in flight.
    pub fn start_request(&mut self, correlation: u64, upstream: usize, request: RequestId) {
        let place = self.place_of(correlation).unwrap_or_else(|place| place);
        match place == self.in_flight.len() {
            true => self.in_flight.push_back((correlation, upstream, request)),
            false => self.in_flight.insert(place, (correlation, upstream, request)),
        }
    }

    /// Where a request in flight is, or would be.
    fn place_of(&self, correlation: u64) -> Result<usize, usize> {
        match self.in_flight.back() {
            Some((last, ..)) if *last < correlation => Err(self.in_flight.len()),
            _ => self.in_flight.binary_search_by_key(&correlation, |(id, ..)| *id),
        }
    }

    /// Asks to be told when everything sent so far on `handle` has its outcome.
    pub fn flush(&mut self, handle: u16, correlation: u64) -> Result<(), Reason> {
        let at = usize::from(handle);
        let entry = self.handles.get_mut(at).ok_or(Reason::UnknownUpstream)?;
        if entry.flushes.len() >= self.limits.requests_in_flight_max {
            return Err(Reason::Quota);
        }
        let settled_at_least = entry.ledger.accepted;
        entry.flushes.push_back(Flush { correlation, settled_at_least });
        entry.complete_flushes(&mut self.actions);
        Ok(())
    }

    // Events.

    /// The hello came.
    pub fn handle_hello(&mut self, version: Option<u16>) -> Result<(), Reason> {
        match (&self.phase, version) {
            (Phase::Handshake { .. }, Some(frame::VERSION)) => {
                self.phase = Phase::Open;
                Ok(())
            }
            (Phase::Handshake { .. }, Some(_)) => Err(Reason::VersionMismatch),
            (Phase::Handshake { .. }, None) | (Phase::Open, _) => Err(Reason::BadFrame),
        }
    }

    /// `messages` were accepted by the upstream of `handle`.
    pub fn handle_accepted(&mut self, handle: u16, messages: u64) {
        if let Some(handle) = self.handles.get_mut(usize::from(handle)) {
            handle.ledger.accepted += messages;
        }
    }

    /// A message goes to so many hosts beside the first one.
    pub fn handle_copies(&mut self, handle: u16, copies: u64) {
        if let Some(handle) = self.handles.get_mut(usize::from(handle)) {
            handle.ledger.copies += copies;
        }
    }

    /// `messages` were accepted and dropped at once, though earlier ones may wait: theirs is no
    /// outcome that a flush waits for.
    pub fn handle_unqueued(&mut self, handle: u16, messages: u64, reason: Reason) {
        if let Some(handle) = self.handles.get_mut(usize::from(handle)) {
            handle.ledger.accepted += messages;
            handle.ledger.settle(Settled::Dropped(reason), messages);
            handle.flushes.iter_mut().for_each(|flush| flush.settled_at_least += messages);
        }
    }

    /// One message was refused; `handle` is the upstream it was meant for, where one was named.
    pub fn handle_refused(&mut self, handle: Option<u16>, reason: Reason) {
        match handle.and_then(|handle| self.handles.get_mut(usize::from(handle))) {
            Some(handle) => handle.ledger.refused.add(reason, 1),
            None => self.refused.add(reason, 1),
        }
    }

    /// Some accepted messages to `upstream` have their outcome.
    pub fn handle_settled(&mut self, upstream: usize, settled: Settled, mut messages: u64) {
        // A ring from an earlier broker may name an upstream twice.
        for handle in self.handles.iter_mut().filter(|handle| handle.upstream == Some(upstream)) {
            let queued = handle.ledger.accepted.saturating_sub(handle.ledger.settled());
            let now = match settled {
                Settled::Sent | Settled::Dropped(_) | Settled::Expired => messages.min(queued),
                Settled::InDoubt => messages,
            };
            handle.ledger.settle(settled, now);
            handle.complete_flushes(&mut self.actions);
            messages -= now;
            if messages == 0 {
                return;
            }
        }
    }

    /// A request has its end.
    pub fn handle_answered(&mut self, correlation: u64) {
        if self.in_flight.front().is_some_and(|(first, ..)| *first == correlation) {
            self.in_flight.pop_front();
        } else if let Ok(place) = self.place_of(correlation) {
            self.in_flight.remove(place);
        }
    }

    /// After each read: what the session has begun and not finished. Every new byte starts the
    /// wait anew; `now` is the moment of the last one.
    pub fn handle_unfinished(&mut self, now: Time, unfinished: Unfinished) {
        self.unfinished_deadline = match unfinished {
            Unfinished::Nothing => None,
            Unfinished::Message => Some(now + self.limits.partial_timeout),
            Unfinished::MessageWithDescriptor => Some(now + self.limits.descriptor_timeout),
        };
    }

    /// A deadline has come: why the session, or what it left unfinished, is to be given up.
    pub fn handle_timeout(&mut self, now: Time) -> Option<Reason> {
        if self.next_deadline()? > now {
            return None;
        }
        match self.phase {
            Phase::Handshake { .. } => Some(Reason::HandshakeTimeout),
            Phase::Open => {
                self.unfinished_deadline = None;
                Some(Reason::PartialTimeout)
            }
        }
    }
}

impl Handle {
    fn new(upstream: Option<usize>) -> Self {
        Handle { upstream, ledger: Ledger::default(), flushes: VecDeque::new() }
    }

    fn complete_flushes(&mut self, actions: &mut VecDeque<Action>) {
        while let Some(flush) = self.flushes.front()
            && self.ledger.settled() >= flush.settled_at_least
        {
            let correlation = flush.correlation;
            actions.push_back(Action::Flushed { correlation, outcomes: self.ledger.outcomes() });
            self.flushes.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: SessionLimits = SessionLimits {
        handshake_timeout: Duration::from_secs(5),
        partial_timeout: Duration::from_secs(5),
        descriptor_timeout: Duration::from_secs(1),
        requests_in_flight_max: 2,
    };

    fn at(ms: u64) -> Time {
        Time::default() + Duration::from_millis(ms)
    }

    fn connected() -> Session {
        Session::connected(at(0), 1, Peer { pid: 1, uid: 1 }, LIMITS)
    }

    #[test]
    fn a_client_that_says_nothing_is_given_up() {
        let mut session = connected();
        assert_eq!(session.handle_timeout(at(4_999)), None);
        assert_eq!(session.handle_timeout(at(5_000)), Some(Reason::HandshakeTimeout));
    }

    #[test]
    fn only_a_hello_of_our_version_opens_and_only_once() {
        assert_eq!(connected().handle_hello(None), Err(Reason::BadFrame));
        assert_eq!(connected().handle_hello(Some(999)), Err(Reason::VersionMismatch));
        let mut session = connected();
        assert_eq!(session.handle_hello(Some(frame::VERSION)), Ok(()));
        assert!(session.is_open());
        assert_eq!(session.handle_hello(Some(frame::VERSION)), Err(Reason::BadFrame));
        assert_eq!(session.next_deadline(), None);
    }

    #[test]
    fn an_unfinished_message_is_given_up_and_a_descriptor_sooner() {
        let mut session = connected();
        session.handle_hello(Some(frame::VERSION)).unwrap();
        session.handle_unfinished(at(10), Unfinished::Message);
        assert_eq!(session.next_deadline(), Some(at(5_010)));
        session.handle_unfinished(at(20), Unfinished::MessageWithDescriptor);
        assert_eq!(session.handle_timeout(at(1_020)), Some(Reason::PartialTimeout));
        session.handle_unfinished(at(30), Unfinished::Nothing);
        assert_eq!(session.handle_timeout(at(90_000)), None);
    }

    #[test]
    fn a_flush_answers_once_everything_before_it_has_an_outcome() {
        let mut session = connected();
        let (first, second) = (session.open(10).unwrap(), session.open(20).unwrap());
        assert_eq!(session.open(10), Ok(first));
        session.handle_accepted(first, 3);
        session.handle_accepted(second, 1);
        session.flush(first, 77).unwrap();
        session.handle_settled(20, Settled::Sent, 1);
        session.handle_settled(10, Settled::Sent, 2);
        assert_eq!(session.poll_action(), None);
        session.handle_accepted(first, 5);
        session.handle_settled(10, Settled::Dropped(Reason::TooBig), 1);
        let Some(Action::Flushed { correlation, outcomes }) = session.poll_action() else {
            panic!("the flush is due");
        };
        assert_eq!((correlation, outcomes.sent, outcomes.accepted), (77, 2, 8));
        assert_eq!(session.flush(9, 1), Err(Reason::UnknownUpstream));
    }

    #[test]
    fn a_message_dropped_on_arrival_answers_no_flush_for_those_that_wait() {
        let mut session = connected();
        let handle = session.open(10).unwrap();
        session.handle_accepted(handle, 1);
        session.flush(handle, 5).unwrap();
        session.handle_unqueued(handle, 3, Reason::QueueFull);
        session.handle_settled(20, Settled::Sent, 1);
        assert_eq!(session.poll_action(), None);
        session.handle_settled(10, Settled::Sent, 1);
        assert!(session.poll_action().is_some());
    }

    #[test]
    fn an_upstream_that_a_ring_names_twice_has_no_more_outcomes_than_messages() {
        let mut session = connected();
        (0..2).for_each(|_| session.reopen(Some(10)).unwrap());
        session.handle_accepted(1, 3);
        session.handle_accepted(0, 1);
        session.handle_settled(10, Settled::Sent, 3);
        assert!(!session.is_settled());
        session.handle_settled(10, Settled::Expired, 1);
        assert!(session.is_settled());
        let outcomes = [session.outcomes(0), session.outcomes(1)];
        assert_eq!(outcomes.map(|it| (it.accepted, it.queued())), [(1, 0), (3, 0)]);
    }

    #[test]
    fn flushes_that_wait_are_bounded() {
        let mut session = connected();
        let handle = session.open(10).unwrap();
        session.handle_accepted(handle, 1);
        for correlation in 0..LIMITS.requests_in_flight_max as u64 {
            session.flush(handle, correlation).unwrap();
        }
        assert_eq!(session.flush(handle, 99), Err(Reason::Quota));
    }

    #[test]
    fn ids_are_unique_and_bounded_while_in_flight() {
        let mut session = connected();
        session.start_request(1, 0, RequestId::default());
        assert_eq!(session.check_request(1), Err(Reason::DuplicateId));
        assert_eq!(session.check_request(2), Ok(()));
        session.start_request(2, 0, RequestId::default());
        assert_eq!(session.check_request(3), Err(Reason::Quota));
        session.handle_answered(1);
        assert_eq!(session.check_request(1), Ok(()));
    }
}
