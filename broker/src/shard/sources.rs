//! Everything that messages come from, and replies go to: sessions and FIFOs.
//!
//! A source is *ready* when it has something to cut or read (*fresh* if it had nothing before, *busy*
//! if it had more than a run could take), *due* when it has something to be
//! told, *blocked* while an upstream's queue is full, *starved* while its user's quota leaves no
//! buffer. One that has ended stays until everything it handed over has its outcome.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;

use poolbroker_proto::frame::{FrameHeader, Kind};
use poolbroker_proto::framing::{Cutter, Framing};
use poolbroker_proto::message::{BrokerMessage, Failure, encode};
use poolbroker_proto::reason::Reason;
use serde::Serialize;
use slotmap::SlotMap;

use crate::buffer::ReceiveBuffer;
use crate::config::{ANSWER_HOLD, RECEIVE_BYTES, STARVED_PAUSE};
use crate::credit::Credit;
use crate::ids::{RequestId, SourceId};
use crate::inflight::Owner;
use crate::poller::Token;
use crate::quota::{Account, Charge};
use crate::session::{Action, Session};
use crate::snapshot::{SessionSnapshot, by_reason};
use crate::stats::Settled;
use crate::timers::{Deadlines, Time};
use crate::transport::Io;
use crate::transport::ring::Ring;
use crate::transport::unix::{Flushed, Stream};
use crate::waiting::Pace;

/// One source of messages.
#[derive(Debug)]
pub struct Source {
    /// What it may do and has done.
    pub session: Session,
    /// What its user holds.
    pub account: Account,
    /// Its descriptor.
    pub io: Io,
    /// Where the descriptor is watched.
    pub token: Token,
    /// Received and not yet used.
    pub buffer: Option<ReceiveBuffer>,
    /// How its bytes are cut; client sockets speak frames instead.
    pub cutter: Option<Cutter>,
    /// How replies are written to a socketpair.
    pub framing: Framing,
    /// The kernel may have something to read.
    pub is_readable: bool,
    /// The other end sends nothing more: read until the end shows.
    pub is_ending: bool,
    /// The other end is closed altogether: nobody is there for a reply.
    pub is_hung_up: bool,
    /// What it may take in its turns.
    pub credit: Credit,
    /// Its socket was full, and is watched for room.
    pub waits_for_room: bool,
    /// Among the ready ones.
    pub is_ready: bool,
    /// Among the due ones.
    pub is_due: bool,
    /// Waits for an upstream's queue.
    pub is_blocked: bool,
    /// Waits for outcomes, or for its client to read: whatever brings them makes it ready.
    pub is_held: bool,
    /// A socketpair waits for the reply to its last request.
    pub awaits_reply: bool,
    /// Nothing more is read from it.
    pub ended: Option<Reason>,
    /// The session that attached it.
    pub parent: Option<SourceId>,
    /// Sessions that it attached and that have not ended.
    pub children: usize,
    /// Holds its place among its user's sessions; none for a FIFO.
    pub _session_charge: Option<Charge>,
    /// Holds the memory of its buffers; none for a FIFO.
    pub buffer_charge: Option<Charge>,
    /// Holds what it has not read of its replies, beyond what a socket takes; none for a FIFO.
    pub reply_charge: Option<Charge>,
    /// Holds the passed descriptors that no message has claimed; client sockets only.
    pub descriptor_charge: Option<Charge>,
    /// The deadline that is set for it.
    pub scheduled_at: Option<Time>,
    /// The client's rings, through which it speaks once it has them.
    pub ring: Option<Box<Ring>>,
    /// Where the ring's doorbell is watched.
    pub doorbell: Token,
    /// Holds the ring's memory and descriptor.
    pub ring_charges: Vec<Charge>,
    /// The socket beside the ring has ended for this reason; what stands in the ring is still taken.
    pub ring_ends: Option<Reason>,
    /// How one-way messages come by it, where the loop may look by itself: rings, FIFOs, pipes.
    pub pace: Option<Pace>,
}

impl Source {
    /// Bytes it keeps in the broker.
    pub fn queued_bytes(&self) -> usize {
        let received = self.buffer.as_ref().map_or(0, |buffer| buffer.unread().len());
        received + self.io.stream().map_or(0, |stream| stream.pending_bytes())
    }

    /// Whether answers are there for it, and replies under way, and nothing that matters more.
    fn awaits_replies_alone(&self) -> bool {
        self.ended.is_none()
            && self.ring.is_none()
            && !self.is_due
            && self.session.in_flight() > 0
            && self.io.stream().is_some_and(|stream| stream.pending_bytes() > 0)
    }

    fn make_due(&mut self, id: SourceId, due: &mut VecDeque<SourceId>) {
        if !self.is_due {
            self.is_due = true;
            due.push_back(id);
        }
    }

    /// Writes what it is to be told, as far as it reads.
    pub fn flush(&mut self) -> Flushed {
        let Some(stream) = self.io.stream_mut() else {
            return Flushed::All;
        };
        match &mut self.ring {
            None => stream.flush(),
            Some(ring) => stream.flush_into(ring).unwrap_or_else(|corrupt| {
                tracing::debug!(session = self.session.id, %corrupt, "a reply ring is corrupt");
                self.ended = Some(Reason::RingCorrupt);
                Flushed::All
            }),
        }
    }

    /// Appends a frame for the client; nothing on other media.
    pub fn tell(&mut self, header: FrameHeader, body: &[u8]) {
        if let Io::Unix(socket) = &mut self.io
            && header.append(body, socket.stream.out()).is_err()
        {
            tracing::error!("a frame for a client is longer than 4 GiB");
        }
    }

    /// Passes a control message with a descriptor by the client socket itself, now or not at all.
    fn pass<T: Serialize>(
        &mut self,
        correlation: u64,
        message: &T,
        descriptor: BorrowedFd<'_>,
    ) -> Result<(), Reason> {
        let Io::Unix(socket) = &mut self.io else { return Err(Reason::ClientGone) };
        let header = FrameHeader { correlation, ..FrameHeader::new(Kind::Control) };
        let mut frame = Vec::new();
        let is_encoded = encode(message).is_ok_and(|body| header.append(&body, &mut frame).is_ok());
        debug_assert!(is_encoded, "it has a length of a few bytes");
        socket.stream.pass(&frame, descriptor, self.ring.is_some())
    }

    /// Tells of a lease that is not granted: by the way by which the lease would come.
    pub fn tell_no_lease(&mut self, correlation: u64, failure: &Failure) {
        if self.ring.is_none() {
            return self.tell_control(Kind::Failure, correlation, failure);
        }
        let header = FrameHeader { correlation, ..FrameHeader::new(Kind::Failure) };
        if let Io::Unix(socket) = &mut self.io
            && let Ok(body) = encode(failure)
            && header.append(&body, socket.stream.beside()).is_err()
        {
            tracing::error!("a frame for a client is longer than 4 GiB");
        }
    }

    /// Appends a control message or failure for the client.
    pub fn tell_control<T: Serialize>(&mut self, kind: Kind, correlation: u64, message: &T) {
        match encode(message) {
            Ok(body) => self.tell(FrameHeader { correlation, ..FrameHeader::new(kind) }, &body),
            Err(error) => tracing::error!(%error, "a control message cannot be encoded"),
        }
    }
}

/// All sources, and what is to be done about them.
#[derive(Debug)]
pub struct Sources {
    /// The sources themselves.
    pub table: SlotMap<SourceId, Source>,
    /// Ready, having had nothing before.
    fresh: VecDeque<SourceId>,
    /// Ready, having had more than a run.
    busy: VecDeque<SourceId>,
    due: VecDeque<SourceId>,
    /// Answered, and waiting for replies to be told with.
    held_answers: Vec<SourceId>,
    /// Until when the first of them waits; some, if there are any.
    held_until: Option<Time>,
    /// Those whose sockets took no more.
    pub full: Vec<SourceId>,
    starved: Vec<SourceId>,
    /// When those try again; some, if there are any.
    starved_until: Option<Time>,
    /// Those that the loop looks at by itself.
    pub awake: Vec<SourceId>,
    deadlines: Deadlines<SourceId>,
    reply_queue_bytes_max: usize,
}

impl Sources {
    /// None yet.
    pub fn new(reply_queue_bytes_max: usize) -> Self {
        Sources {
            table: SlotMap::with_key(),
            fresh: VecDeque::new(),
            busy: VecDeque::new(),
            due: VecDeque::new(),
            held_answers: Vec::new(),
            held_until: None,
            full: Vec::new(),
            starved: Vec::new(),
            starved_until: None,
            awake: Vec::new(),
            deadlines: Deadlines::new(),
            reply_queue_bytes_max,
        }
    }

    /// The id `status` shows for a source.
    pub fn session_id(&self, source: SourceId) -> Option<u64> {
        self.table.get(source).map(|source| source.session.id)
    }

    /// Whether nothing more is read from a source.
    pub fn has_ended(&self, id: SourceId) -> bool {
        self.table.get(id).is_none_or(|source| source.ended.is_some())
    }

    // Whose turn it is.

    /// Something has come: the source has its run this turn.
    pub fn make_ready(&mut self, id: SourceId) {
        if self.get_ready(id) {
            self.fresh.push_back(id);
        }
    }

    /// There is more: the source has its next run after the others of which that is true.
    pub fn make_busy(&mut self, id: SourceId) {
        if self.get_ready(id) {
            self.busy.push_back(id);
        }
    }

    fn get_ready(&mut self, id: SourceId) -> bool {
        let source = self.table.get_mut(id);
        let Some(source) = source.filter(|source| !source.is_ready && !source.is_blocked) else {
            return false;
        };
        source.is_ready = true;
        source.is_held = false;
        true
    }

    /// The queue it waited for has room.
    pub fn unblock(&mut self, id: SourceId) {
        if let Some(source) = self.table.get_mut(id) {
            source.is_blocked = false;
            self.make_busy(id);
        }
    }

    /// No buffer could be charged to its user: it tries again after a pause.
    pub fn starve(&mut self, now: Time, id: SourceId) {
        self.starved.push(id);
        self.starved_until.get_or_insert(now + STARVED_PAUSE);
    }

    /// Lets the starved ones try again, if it is time.
    pub fn feed_starved(&mut self, now: Time) {
        if self.starved_until.is_none_or(|until| until > now) {
            return;
        }
        self.starved_until = None;
        for id in std::mem::take(&mut self.starved) {
            self.make_busy(id);
        }
    }

    /// Until when those wait who have no buffer, if somebody does.
    pub fn starved_until(&self) -> Option<Time> {
        self.starved_until
    }

    /// How many are ready.
    pub fn ready_count(&self) -> usize {
        self.fresh.len() + self.busy.len()
    }

    /// Whether one is ready that had nothing before.
    pub fn has_fresh(&self) -> bool {
        !self.fresh.is_empty()
    }

    /// The next one that is ready, and whether it has more than it could have done before.
    pub fn pop_ready(&mut self) -> Option<(SourceId, bool)> {
        let fresh = self.fresh.pop_front().map(|id| (id, false));
        let (id, is_busy) = fresh.or_else(|| Some((self.busy.pop_front()?, true)))?;
        if let Some(source) = self.table.get_mut(id) {
            source.is_ready = false;
        }
        Some((id, is_busy))
    }

    /// A source had its run. What it is to be told of that waits for the replies to what it asked: a
    /// client that says hello, opens and asks in one breath is told everything by one write. No
    /// longer than [`ANSWER_HOLD`], and not while there is nothing else to do.
    pub fn answer(&mut self, now: Time, id: SourceId) {
        let Some(source) = self.table.get_mut(id) else { return };
        if source.awaits_replies_alone() {
            self.held_answers.push(id);
            self.held_until.get_or_insert(now + ANSWER_HOLD);
        } else {
            source.make_due(id, &mut self.due);
        }
    }

    /// Whether somebody waits to be answered.
    pub fn has_held_answers(&self) -> bool {
        self.held_until.is_some()
    }

    /// Whether somebody has waited long enough.
    pub fn must_answer(&self, now: Time) -> bool {
        self.held_until.is_some_and(|until| until <= now)
    }

    /// Tells those who wait this turn.
    pub fn release_answers(&mut self) {
        self.held_until = None;
        while let Some(id) = self.held_answers.pop() {
            self.make_due(id);
        }
    }

    /// Makes sure that `pump` looks at a source this turn.
    pub fn make_due(&mut self, id: SourceId) {
        if let Some(source) = self.table.get_mut(id) {
            source.make_due(id, &mut self.due);
        }
    }

    /// The next one that has something to be told, or may be done.
    pub fn pop_due(&mut self) -> Option<SourceId> {
        let id = self.due.pop_front()?;
        if let Some(source) = self.table.get_mut(id) {
            source.is_due = false;
        }
        Some(id)
    }

    // Deadlines.

    /// When [`Sources::pop_overdue`] has something.
    pub fn next_deadline(&self) -> Option<Time> {
        self.deadlines.next_deadline()
    }

    /// Sets the deadline of a source's session, unless an earlier one is set: that one finds,
    /// when it comes, that there is nothing to do yet.
    pub fn schedule(&mut self, id: SourceId) {
        let Some(source) = self.table.get_mut(id) else {
            return;
        };
        let Some(at) = source.session.next_deadline() else {
            return;
        };
        if let Some(scheduled) = source.scheduled_at {
            if scheduled <= at {
                return;
            }
            self.deadlines.remove(scheduled, id);
        }
        source.scheduled_at = Some(at);
        self.deadlines.insert(at, id);
    }

    /// A source whose deadline has come.
    pub fn pop_overdue(&mut self, now: Time) -> Option<SourceId> {
        loop {
            let id = self.deadlines.pop_due(now)?;
            if let Some(source) = self.table.get_mut(id) {
                source.scheduled_at = None;
                return Some(id);
            }
        }
    }

    /// Removes a source from everything but the kernel.
    pub fn remove(&mut self, id: SourceId) -> Option<Source> {
        let source = self.table.remove(id)?;
        self.awake.retain(|awake| *awake != id);
        if let Some(at) = source.scheduled_at {
            self.deadlines.remove(at, id);
        }
        Some(source)
    }

    // What upstreams report.

    /// Some of a source's messages have their outcome; `is_copy`: they are copies of a broadcast, of
    /// which a ring keeps nothing.
    pub fn settle(
        &mut self,
        id: SourceId,
        upstream: usize,
        settled: Settled,
        messages: u64,
        is_copy: bool,
    ) {
        if let Some(source) = self.table.get_mut(id) {
            source.session.handle_settled(upstream, settled, messages);
            source.make_due(id, &mut self.due);
            let is_unsent = match settled {
                Settled::Sent => false,
                Settled::Dropped(_) | Settled::Expired => true,
                Settled::InDoubt => return,
            };
            if let Some(ring) = source.ring.as_mut().filter(|_| !is_copy) {
                ring.settle(upstream, messages, is_unsent);
                self.make_ready(id);
            }
        }
    }

    /// Whether a reply can be kept for its owner until it is read: within the bounds of its
    /// session, and charged to its user once a socket would not take it at once.
    pub fn can_take(&mut self, owner: Owner, body: &[u8]) -> bool {
        let Some(source) = self.table.get_mut(owner.source) else { return false };
        let Some(stream) = source.io.stream() else { return false };
        if source.ring.as_ref().is_some_and(|ring| body.len() > ring.body_bytes_max()) {
            return false;
        }
        let pending = stream.pending_bytes();
        // An empty queue takes any reply: the longest is message_bytes_max.
        if pending > 0 && pending + body.len() > 2 * self.reply_queue_bytes_max {
            return false;
        }
        let is_small = pending + body.len() <= RECEIVE_BYTES;
        let charge = source.reply_charge.as_mut().filter(|_| !is_small);
        charge.is_none_or(|charge| charge.resize(pending + body.len()).is_ok())
    }

    /// Whether a client leaves so many replies unread that it is not read either.
    pub fn is_overfull(&self, id: SourceId) -> bool {
        let source = self.table.get(id).and_then(|source| source.io.stream());
        source.is_some_and(|stream| stream.pending_bytes() > self.reply_queue_bytes_max)
    }

    /// Gives a reply to its owner.
    pub fn reply(&mut self, owner: Owner, body: &[u8]) {
        let Some(source) = self.table.get_mut(owner.source) else {
            return;
        };
        source.session.handle_answered(owner.correlation);
        let framing = source.framing;
        match &mut source.io {
            Io::Unix(_) => {
                let correlation = owner.correlation;
                source.tell(FrameHeader { correlation, ..FrameHeader::new(Kind::Reply) }, body);
            }
            Io::Socketpair(socket) => {
                source.awaits_reply = false;
                if let Err(reason) = framing.encode_reply(body, socket.stream.out()) {
                    source.ended = Some(reason);
                }
                self.make_ready(owner.source);
            }
            Io::Fifo(_) | Io::Pipe(_) => {}
        }
        self.make_due(owner.source);
    }

    /// Tells the owner of a request that it failed.
    pub fn fail(&mut self, owner: Owner, failure: Failure) {
        let Some(source) = self.table.get_mut(owner.source) else {
            return;
        };
        source.session.handle_answered(owner.correlation);
        match &source.io {
            Io::Unix(_) => source.tell_control(Kind::Failure, owner.correlation, &failure),
            // Its stream has no words for a failure.
            Io::Socketpair(_) => source.ended = Some(Reason::RequestFailed),
            Io::Fifo(_) | Io::Pipe(_) => {}
        }
        source.make_due(owner.source, &mut self.due);
    }

    /// Passes a connection to the owner of a lease, or says why it cannot be passed.
    pub fn lend(
        &mut self,
        owner: Owner,
        lease: u64,
        connection: BorrowedFd<'_>,
    ) -> Result<(), Reason> {
        let source = self.table.get_mut(owner.source).ok_or(Reason::ClientGone)?;
        if source.is_hung_up || source.ended.is_some() {
            return Err(Reason::ClientGone);
        }
        source.make_due(owner.source, &mut self.due);
        source.pass(owner.correlation, &BrokerMessage::Leased { lease }, connection)
    }

    /// Tells the owner of a wish for a lease that it gets none.
    pub fn refuse_lease(&mut self, owner: Owner, failure: &Failure) {
        if let Some(source) = self.table.get_mut(owner.source) {
            source.tell_no_lease(owner.correlation, failure);
            source.make_due(owner.source, &mut self.due);
        }
    }

    /// Tells a source what it is to be told, as far as it reads. True: it is done and is to be
    /// removed.
    pub fn pump(&mut self, id: SourceId) -> bool {
        let reply_queue_bytes_max = self.reply_queue_bytes_max;
        let Some(source) = self.table.get_mut(id) else {
            return false;
        };
        while let Some(action) = source.session.poll_action() {
            match action {
                Action::Flushed { correlation, outcomes } => {
                    let message = BrokerMessage::Flushed(outcomes);
                    source.tell_control(Kind::Control, correlation, &message);
                }
            }
        }
        let is_overfull = |source: &Source| {
            source.io.stream().is_some_and(|s| s.pending_bytes() > reply_queue_bytes_max)
        };
        let was_overfull = is_overfull(source);
        let flushed = source.flush();
        let is_socket_full = match source.ring {
            None => flushed == Flushed::WouldBlock,
            Some(_) => source.io.stream().is_some_and(Stream::has_beside),
        };
        if is_socket_full && !source.waits_for_room {
            self.full.push(id);
        }
        if flushed == Flushed::Gone {
            // Nobody reads replies any more; what was written before is still read to its end.
            source.is_hung_up = true;
            source.is_readable = true;
            source.is_ending = true;
            if let Some(stream) = source.io.stream_mut() {
                stream.discard();
            }
            self.make_ready(id);
        }
        let Some(source) = self.table.get_mut(id) else { return false };
        let pending = source.io.stream().map_or(0, |stream| stream.pending_bytes());
        if let Some(charge) = &mut source.reply_charge
            && charge.amount() > pending
        {
            let shrunk = charge.resize(pending);
            debug_assert!(shrunk.is_ok(), "shrinking cannot fail");
        }
        let is_done = match source.ended {
            None => false,
            Some(Reason::EndOfInput | Reason::ClientGone | Reason::Drained) => {
                let nobody_is_there = source.is_hung_up && matches!(source.io, Io::Unix(_));
                let is_told = flushed != Flushed::WouldBlock;
                nobody_is_there || (is_told && source.session.is_settled() && source.children == 0)
            }
            // A violation ends a session at once, whether it reads what it is told or not.
            Some(_) => true,
        };
        if was_overfull && !is_overfull(source) {
            self.make_ready(id);
        }
        is_done
    }

    // What status shows.

    /// The requests of a source, to be cancelled.
    pub fn requests(&self, id: SourceId) -> Vec<(usize, RequestId)> {
        self.table.get(id).map(|s| s.session.requests().collect()).unwrap_or_default()
    }

    /// The upstreams it has opened.
    pub fn upstreams(&self, id: SourceId) -> Vec<usize> {
        self.table.get(id).map(|s| s.session.upstreams().collect()).unwrap_or_default()
    }

    /// Every session; FIFOs are listeners.
    pub fn snapshot(&self) -> Vec<SessionSnapshot> {
        let sessions = self.table.values().filter(|source| !matches!(source.io, Io::Fifo(_)));
        let snapshot = |source: &Source| SessionSnapshot {
            id: source.session.id,
            pid: source.session.peer.pid,
            uid: source.session.peer.uid,
            transport: source.session.transport.name(),
            accepted: source.session.accepted(),
            refused: by_reason(&source.session.refused()),
            queued_bytes: source.queued_bytes() as u64,
            in_flight: source.session.in_flight() as u64,
        };
        sessions.map(snapshot).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    use super::*;
    use crate::quota::{QuotaLimits, Quotas};
    use crate::session::{Peer, SessionLimits, Transport};
    use crate::shard::entrance::new_source;
    use crate::transport::unix::UnixSocket;

    fn at(us: u64) -> Time {
        Time::from_start(Duration::from_micros(us))
    }

    /// Sources of one upstream, each with the client's end of its socket.
    fn sources(count: usize) -> (Sources, Vec<(SourceId, UnixStream)>) {
        let (max, second) = (1 << 20, Duration::from_secs(1));
        let quotas = Quotas::new(QuotaLimits {
            sessions_max: max,
            queued_bytes_max: max,
            descriptors_max: max,
            ring_bytes_max: max,
        });
        let limits = SessionLimits {
            handshake_timeout: second,
            partial_timeout: second,
            descriptor_timeout: second,
            requests_in_flight_max: max,
        };
        let mut sources = Sources::new(max);
        let clients = (0..count).map(|id| {
            let (theirs, ours) = UnixStream::pair().unwrap();
            let io = Io::Unix(UnixSocket::from_passed(OwnedFd::from(ours)).unwrap());
            let peer = Peer { pid: 1, uid: 1 };
            let session = Session::bound(id as u64, peer, Transport::Unix, limits, 0);
            let source = new_source(session, quotas.account(1), io, None, Framing::Raw);
            (sources.table.insert(source), theirs)
        });
        let clients = clients.collect();
        (sources, clients)
    }

    #[test]
    fn whoever_comes_now_and_then_goes_before_those_who_always_have_more() {
        let (mut sources, clients) = sources(4);
        let ids: Vec<_> = clients.iter().map(|(id, _)| *id).collect();
        sources.make_busy(ids[0]);
        sources.make_busy(ids[1]);
        assert!(!sources.has_fresh());
        sources.make_ready(ids[2]);
        sources.make_ready(ids[3]);
        // It has its place among the busy ones.
        sources.make_ready(ids[0]);
        assert!(sources.has_fresh());
        let order: Vec<_> = std::iter::from_fn(|| sources.pop_ready()).collect();
        assert_eq!(order, [(ids[2], false), (ids[3], false), (ids[0], true), (ids[1], true)]);
    }

    #[test]
    fn an_answer_waits_for_the_reply_and_not_for_ever() {
        let (mut sources, clients) = sources(2);
        let ((asking, _), (telling, _)) = (&clients[0], &clients[1]);
        let tell = |sources: &mut Sources, id| {
            let source = sources.table.get_mut(id).unwrap();
            source.tell_control(Kind::Control, 1, &BrokerMessage::Attached { session: 1 });
            sources.answer(at(1_000), id);
        };
        // Nothing else comes: at once.
        tell(&mut sources, *telling);
        assert!(!sources.has_held_answers());
        assert_eq!(sources.pop_due(), Some(*telling));

        let source = sources.table.get_mut(*asking).unwrap();
        source.session.start_request(7, 0, RequestId::default());
        tell(&mut sources, *asking);
        assert!(sources.has_held_answers());
        assert_eq!(sources.pop_due(), None);
        let until = at(1_000) + ANSWER_HOLD;
        assert_eq!([at(1_001), until].map(|now| sources.must_answer(now)), [false, true]);
        sources.release_answers();
        assert!(!sources.has_held_answers());
        assert_eq!((sources.pop_due(), sources.pop_due()), (Some(*asking), None));

        // The reply takes it along.
        tell(&mut sources, *asking);
        sources.reply(Owner { source: *asking, uid: 1, correlation: 7 }, b"reply");
        assert_eq!(sources.pop_due(), Some(*asking));
    }
}
