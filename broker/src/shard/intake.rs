//! One turn of one source: reads, cuts, hands over, for at most one run.
//!
//! Consecutive one-way messages to one upstream form a run: they are staged one by one and
//! accepted together. What an upstream cannot take stays in the source's buffer, and what the
//! buffer cannot take stays in the kernel: that is the flow control.

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::time::Duration;

use poolbroker_proto::address::{Host, HostPort, Protocol, UpstreamUrl, check_upstream_name};
use poolbroker_proto::frame::{self, Deframer, Frame, FrameHeader, Kind};
use poolbroker_proto::framing::{Cut, Framing, Tail};
use poolbroker_proto::message::{Attachment, BrokerMessage, ClientMessage, Failure, Retry, decode};
use poolbroker_proto::reason::Reason;
use poolbroker_proto::ring;

use super::outlet::{Push, Upstream};
use super::sources::{Source, Sources};
use super::upstreams::Upstreams;
use crate::buffer::Spares;
use crate::config::{
    BrokerLimits, CLIENT_TEXT_CHARS_MAX, Dynamic, HANDLES_MAX, NAMES_TOLD_MAX, Overflow,
    RECEIVE_BYTES, UpstreamConfig,
};
use crate::ids::SourceId;
use crate::inflight::Owner;
use crate::quota::Resource;
use crate::session::{Session, Unfinished};
use crate::timers::Time;
use crate::transport::{Io, Read};
use crate::waiting::Pace;

/// What the shard lends to a source for its turn.
pub struct Desk<'a> {
    /// This turn's moment.
    pub now: Time,
    /// Every upstream; dynamic ones are added.
    pub upstreams: &'a mut Upstreams,
    /// Receive buffers.
    pub spares: &'a mut Spares,
    /// Limits of the broker.
    pub limits: &'a BrokerLimits,
    /// What may be opened by URL.
    pub dynamic: &'a Dynamic,
    /// The longest message of any upstream.
    pub deframer: Deframer,
    /// Upstreams given something to do.
    pub touched: &'a mut Vec<usize>,
    /// What needs the whole shard.
    pub orders: &'a mut Vec<Order>,
    /// The body of a record that was copied out of a ring.
    pub scratch: &'a mut Vec<u8>,
    /// The broker is shutting down.
    pub is_draining: bool,
}

impl Desk<'_> {
    /// An upstream was given something to do.
    fn touch(&mut self, upstream: usize) {
        if self.touched.last() != Some(&upstream) {
            self.touched.push(upstream);
        }
    }
}

/// What a source asks that only the shard can do.
#[derive(Debug)]
pub enum Order {
    /// Read a passed descriptor from now on.
    Attach {
        /// Who passed it.
        source: SourceId,
        /// What is answered.
        correlation: u64,
        /// Where its messages go.
        upstream: usize,
        /// What it is said to be.
        attachment: Attachment,
        /// The descriptor.
        descriptor: OwnedFd,
    },
    /// Make a pair of rings.
    OpenRing {
        /// For whom.
        source: SourceId,
        /// What is answered.
        correlation: u64,
        /// Bytes of each ring.
        capacity: usize,
    },
    /// Take over a pair of rings from an earlier broker.
    ResumeRing {
        /// From whom.
        source: SourceId,
        /// What is answered.
        correlation: u64,
        /// Bytes of each ring.
        capacity: usize,
        /// What its handles name; none: there is no such upstream any more.
        upstreams: Vec<Option<usize>>,
        /// The memory.
        descriptor: OwnedFd,
    },
}

/// How a source's turn ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Served {
    /// There is more to do: another turn.
    Again,
    /// Nothing was done: it pays for earlier turns.
    Overdrawn,
    /// It is empty: nothing to do until an event.
    Idle,
    /// It is not looked at until something else has happened, which makes it ready again: outcomes
    /// of what was taken, or its client reads.
    Held,
    /// An upstream's queue is full.
    Blocked {
        /// Which.
        upstream: usize,
        /// Those of the message that does not fit.
        bytes: usize,
    },
    /// Its user has no quota left for a buffer.
    Starved,
    /// It ended.
    Ended(Reason),
}

/// Where a one-way message goes. Small enough for a register: it is passed along with every
/// message.
#[derive(Debug, Clone, Copy)]
struct Route {
    upstream: u32,
    handle: u16,
}

impl Route {
    fn new(handle: u16, upstream: usize) -> Self {
        let upstream = u32::try_from(upstream).expect("each upstream has a pool in memory");
        Route { upstream, handle }
    }

    fn upstream(self) -> usize {
        self.upstream as usize
    }
}

/// What was taken in this turn.
#[derive(Debug, Default)]
struct Taken {
    messages: usize,
    bytes: usize,
    has_one_way: bool,
    /// Where the messages staged and not yet accepted go.
    run: Option<Route>,
}

/// Serves one source for one turn: how that ended, and how many bytes were taken.
pub fn serve(desk: &mut Desk<'_>, sources: &mut Sources, id: SourceId) -> (Served, usize) {
    let is_overfull = sources.is_overfull(id);
    let is_alone = sources.ready_count() == 0;
    let Some(source) = sources.table.get_mut(id) else {
        return (Served::Held, 0);
    };
    if is_overfull || source.ended.is_some() || source.is_blocked {
        return (Served::Held, 0);
    }
    let mut taken = Taken::default();
    if !source.credit.begin_turn(is_alone) {
        return (Served::Overdrawn, 0);
    }
    let served = loop {
        if taken.messages >= desk.limits.run_messages_max
            || taken.bytes >= desk.limits.run_bytes_max
        {
            break Served::Again;
        }
        let step = match (&source.cutter, &source.ring) {
            (Some(_), _) => cut_step(desk, source, id, &mut taken),
            (None, None) => frame_step(desk, source, id, &mut taken),
            (None, Some(_)) => match record_step(desk, source, id, &mut taken) {
                Step::NeedsBytes => frame_step(desk, source, id, &mut taken),
                step => step,
            },
        };
        match step {
            Step::Next => {}
            Step::NeedsBytes => match read(desk, source) {
                Ok(true) => {}
                Ok(false) if has_stowaways(source) => {
                    break Served::Ended(Reason::UnexpectedDescriptor);
                }
                Ok(false) => break Served::Idle,
                Err(Served::Ended(reason)) if outlives_socket(source, reason) => {}
                Err(served) => break served,
            },
            Step::Stop(served) => break served,
        }
    };
    source.credit.pay(taken.messages, taken.bytes);
    if let Some(pace) = source.pace.as_mut().filter(|_| taken.has_one_way) {
        pace.handle_one_way(desk.now);
    }
    accept(desk, &mut source.session, id, &mut taken);
    if let Some(ring) = &source.ring {
        // From here on upstreams may send it.
        ring.mark_reading();
    }
    let served = match served {
        Served::Ended(reason @ (Reason::EndOfInput | Reason::ClientGone | Reason::Drained)) => {
            end_of_input(desk, source, id, reason)
        }
        served => served,
    };
    finish_turn(desk, source, served);
    (served, taken.bytes)
}

/// Whether a source has a ring from which everything that is complete is still to be taken, now that
/// its socket has ended in order.
fn outlives_socket(source: &mut Source, reason: Reason) -> bool {
    let is_in_order = matches!(reason, Reason::ClientGone | Reason::Drained);
    match &mut source.ring {
        Some(ring) if is_in_order && source.ring_ends.is_none() => {
            // A ring that is corrupt shows it at the next look.
            let _ = ring.end_here();
            source.ring_ends = Some(reason);
            true
        }
        _ => false,
    }
}

/// Whether descriptors came with messages that take none.
fn has_stowaways(source: &Source) -> bool {
    let Io::Unix(socket) = &source.io else { return false };
    socket.descriptors() > 0 && source.buffer.as_ref().is_none_or(|buffer| buffer.is_empty())
}

/// What one look at the buffer gave.
enum Step {
    Next,
    NeedsBytes,
    Stop(Served),
}

/// Reads once. `Ok(false)`: there is nothing now.
fn read(desk: &mut Desk<'_>, source: &mut Source) -> Result<bool, Served> {
    if !source.is_readable {
        return Ok(false);
    }
    let mut buffer = match source.buffer.take() {
        Some(buffer) => buffer,
        None => {
            if let Some(charge) = &mut source.buffer_charge
                && charge.resize(RECEIVE_BYTES).is_err()
            {
                return Err(Served::Starved);
            }
            desk.spares.take()
        }
    };
    let result = source.io.read(&mut buffer);
    let capacity = buffer.capacity();
    source.buffer = Some(buffer);
    if let Some(charge) = &mut source.buffer_charge
        && charge.resize(capacity).is_err()
    {
        return Err(Served::Ended(Reason::Quota));
    }
    charge_descriptors(source)?;
    if let Io::Socketpair(socket) = &source.io
        && socket.descriptors() > 0
    {
        return Err(Served::Ended(Reason::UnexpectedDescriptor));
    }
    match result {
        Read::Bytes { more } => {
            // A pipe that is awake is read once per look: more reads would each find little, and
            // take the pipe's lock from its writer.
            let is_pipe = matches!(source.io, Io::Fifo(_) | Io::Pipe(_));
            let is_looked_at = is_pipe && source.pace.as_ref().is_some_and(Pace::is_awake);
            source.is_readable = (more && !is_looked_at) || source.is_ending;
            source.session.handle_unfinished(desk.now, Unfinished::Nothing);
            Ok(true)
        }
        Read::Nothing => {
            source.is_readable = false;
            Ok(false)
        }
        Read::End => {
            source.is_readable = false;
            Err(Served::Ended(match source.io {
                Io::Unix(_) if desk.is_draining => Reason::Drained,
                Io::Unix(_) => Reason::ClientGone,
                Io::Socketpair(_) if desk.is_draining => Reason::Drained,
                Io::Socketpair(_) | Io::Pipe(_) | Io::Fifo(_) => Reason::EndOfInput,
            }))
        }
        Read::Failed(rustix::io::Errno::TOOMANYREFS) => {
            Err(Served::Ended(Reason::UnexpectedDescriptor))
        }
        Read::Failed(rustix::io::Errno::CONNRESET) => Err(Served::Ended(Reason::ClientGone)),
        Read::Failed(error) => {
            tracing::debug!(session = source.session.id, %error, "a source cannot be read");
            Err(Served::Ended(Reason::ReadError))
        }
    }
}

/// Charges what a client has passed and not claimed; too much ends it before it uses up the
/// broker's own descriptors (M10).
fn charge_descriptors(source: &mut Source) -> Result<(), Served> {
    if let (Io::Unix(socket), Some(charge)) = (&source.io, &mut source.descriptor_charge) {
        let charged = charge.resize(socket.descriptors());
        return charged.map_err(|_| Served::Ended(Reason::UnexpectedDescriptor));
    }
    Ok(())
}

/// Hands one one-way message of `bytes` to its upstream by `stage`, and counts it if it has its
/// outcome at once. [`Push::Full`]: it must stay where it is.
fn push(
    desk: &mut Desk<'_>,
    session: &mut Session,
    id: SourceId,
    taken: &mut Taken,
    route: Route,
    bytes: usize,
    mut stage: impl FnMut(&mut Upstream) -> Push,
) -> Push {
    let (handle, upstream) = (route.handle, route.upstream());
    if taken.run.is_some_and(|run| run.handle != handle) {
        accept(desk, session, id, taken);
    }
    let copies = desk.upstreams[upstream].copies.clone();
    let mut pushed = match copies {
        None => stage(&mut desk.upstreams[upstream]),
        Some(copies) => {
            if copies.clone().any(|copy| desk.upstreams[copy].drops_oldest_for(bytes)) {
                // What this run staged has to be accepted before it can make room.
                accept(desk, session, id, taken);
            }
            push_copies(desk, session, handle, copies, bytes, &mut stage)
        }
    };
    if pushed == Push::Dropped && taken.run.is_some() {
        // The same here.
        accept(desk, session, id, taken);
        pushed = stage(&mut desk.upstreams[upstream]);
    }
    taken.has_one_way = true;
    match pushed {
        Push::Staged => {
            taken.run.get_or_insert(route);
        }
        Push::Full => return pushed,
        Push::Dropped => {
            let outlet = &mut desk.upstreams[upstream];
            drop_unqueued(outlet, session, handle, 1, Reason::QueueFull);
        }
        Push::Refused(reason) => session.handle_refused(Some(handle), reason),
    }
    taken.messages += 1;
    taken.bytes += bytes;
    pushed
}

/// Hands one message to every host of a broadcast, or to none as long as one of them holds it up.
fn push_copies(
    desk: &mut Desk<'_>,
    session: &mut Session,
    handle: u16,
    copies: Range<usize>,
    bytes: usize,
    stage: &mut impl FnMut(&mut Upstream) -> Push,
) -> Push {
    if copies.clone().any(|copy| desk.upstreams[copy].holds_up(bytes)) {
        return Push::Full;
    }
    let mut dropped = Vec::new();
    for copy in copies.clone() {
        match stage(&mut desk.upstreams[copy]) {
            Push::Staged => {}
            Push::Full | Push::Dropped => dropped.push(copy),
            // All of them judge alike, but one without room may not have looked.
            Push::Refused(reason) => return Push::Refused(reason),
        }
    }
    for copy in dropped {
        drop_unqueued(&mut desk.upstreams[copy], session, handle, 1, Reason::QueueFull);
    }
    session.handle_copies(handle, copies.len().saturating_sub(1) as u64);
    Push::Staged
}

/// Which upstream has to make room before a message is tried again: that of a host of a broadcast.
pub fn held_up_at(upstreams: &Upstreams, upstream: usize, bytes: usize) -> usize {
    let copies = upstreams[upstream].copies.clone();
    let full = copies.into_iter().flatten().find(|copy| upstreams[*copy].holds_up(bytes));
    full.unwrap_or(upstream)
}

/// Accepts messages that do not get into the queue of their upstream, and drops them.
fn drop_unqueued(
    outlet: &mut Upstream,
    session: &mut Session,
    handle: u16,
    messages: u64,
    reason: Reason,
) {
    outlet.pool.drop_unqueued(messages, reason);
    session.handle_unqueued(handle, messages, reason);
}

/// Drops what a FIFO or pipe has been read of and could not hand over before the time to drain was
/// over; how many messages that are. One that was cut off counts as refused.
pub fn give_up_buffered(upstreams: &mut Upstreams, source: &mut Source) -> u64 {
    let Source { session, buffer, cutter, .. } = source;
    let (Some(mut buffer), Some(cutter)) = (buffer.take(), cutter) else { return 0 };
    let Some(upstream) = session.upstream(0) else { return 0 };
    let mut messages = 0;
    loop {
        match cutter.next_cut(buffer.unread()) {
            Cut::Message { consumed, .. } => {
                messages += 1;
                buffer.consume(consumed);
            }
            Cut::Refused { reason, consumed } => {
                session.handle_refused(Some(0), reason);
                buffer.consume(consumed);
            }
            Cut::Skipped { consumed } => buffer.consume(consumed),
            Cut::Incomplete | Cut::Broken => break,
        }
    }
    if !buffer.is_empty() {
        session.handle_refused(Some(0), Reason::Partial);
    }
    let copies = upstreams[upstream].copies.clone().unwrap_or(upstream..upstream + 1);
    session.handle_copies(0, messages * copies.len().saturating_sub(1) as u64);
    for copy in copies {
        drop_unqueued(&mut upstreams[copy], session, 0, messages, Reason::DrainTimeout);
    }
    messages
}

/// Ends the run: what was staged is accepted.
fn accept(desk: &mut Desk<'_>, session: &mut Session, id: SourceId, taken: &mut Taken) {
    if let Some(run) = taken.run.take() {
        let upstream = run.upstream();
        let copies = desk.upstreams[upstream].copies.clone();
        for upstream in copies.unwrap_or(upstream..upstream + 1) {
            let messages = desk.upstreams[upstream].accept(desk.now, id);
            session.handle_accepted(run.handle, messages);
            desk.touch(upstream);
        }
    }
}

fn refuse_unknown(session: &mut Session, taken: &mut Taken, handle: u16, bytes: usize) {
    session.handle_refused(Some(handle), Reason::UnknownUpstream);
    taken.messages += 1;
    taken.bytes += bytes;
}

// Records of a ring.

fn record_step(desk: &mut Desk<'_>, source: &mut Source, id: SourceId, taken: &mut Taken) -> Step {
    let Source { session, ring: Some(ring), ring_ends, .. } = source else {
        return Step::NeedsBytes;
    };
    // What is taken and not released is what a crash makes the next broker send again: one run.
    if ring.window().unsettled() >= desk.limits.run_messages_max
        || ring.window().bytes() >= desk.limits.run_bytes_max
    {
        return Step::Stop(Served::Held);
    }
    let record = match ring.peek() {
        Ok(Some(record)) => record,
        Ok(None) => match ring_ends {
            Some(reason) => return Step::Stop(Served::Ended(*reason)),
            None => return Step::NeedsBytes,
        },
        Err(corrupt) => {
            tracing::debug!(session = session.id, %corrupt, "a send ring is corrupt");
            session.handle_refused(None, Reason::RingCorrupt);
            return Step::Stop(Served::Ended(Reason::RingCorrupt));
        }
    };
    let is_touched = ring.is_touched();
    match record.header.kind {
        Kind::Send => {
            let handle = record.header.upstream;
            let Some(upstream) = session.upstream(handle) else {
                refuse_unknown(session, taken, handle, record.body_bytes);
                ring.take_settled(&record, true);
                return Step::Next;
            };
            let stage = |outlet: &mut Upstream| {
                outlet.push_copied(id, record.body_bytes, |out| ring.copy_body(&record, out))
            };
            let route = Route::new(handle, upstream);
            match push(desk, session, id, taken, route, record.body_bytes, stage) {
                // Its copies have outcomes of their own, none of which is that of the record.
                Push::Staged if desk.upstreams[upstream].copies.is_some() => {
                    ring.take_settled(&record, false);
                }
                Push::Staged => {
                    ring.take(&record, upstream);
                    desk.upstreams[upstream].count_redelivered(u64::from(is_touched));
                }
                Push::Full => {
                    let bytes = record.body_bytes;
                    return Step::Stop(Served::Blocked { upstream, bytes });
                }
                Push::Dropped | Push::Refused(_) => ring.take_settled(&record, true),
            }
            Step::Next
        }
        // Never repeated; the client itself knows that they may have been carried out.
        Kind::Request | Kind::Control if is_touched => {
            ring.take_settled(&record, false);
            Step::Next
        }
        Kind::Request | Kind::Control | Kind::Hello | Kind::Reply | Kind::Failure => {
            let mut body = std::mem::take(desk.scratch);
            body.clear();
            ring.copy_body(&record, &mut body);
            ring.take_settled(&record, false);
            let frame =
                Frame { header: record.header, body: &body, frame_bytes: record.ring_bytes };
            let step = handle_frame(desk, source, id, taken, frame);
            *desk.scratch = body;
            step.unwrap_or_else(|violation| end_for(source, violation))
        }
    }
}

// Frames.

fn frame_step(desk: &mut Desk<'_>, source: &mut Source, id: SourceId, taken: &mut Taken) -> Step {
    let Some(buffer) = source.buffer.take() else {
        return Step::NeedsBytes;
    };
    let step = match desk.deframer.next_frame(buffer.unread()) {
        Ok(None) => Ok((Step::NeedsBytes, 0)),
        Ok(Some(frame)) => {
            handle_frame(desk, source, id, taken, frame).map(|step| (step, frame.frame_bytes))
        }
        Err(error) => {
            let text = format!("{error}; is this a client of poolbroker?");
            Err((Reason::BadFrame, text))
        }
    };
    source.buffer = Some(buffer);
    match step {
        Ok((Step::Stop(served), _)) => Step::Stop(served),
        Ok((step, consumed)) => {
            if let Some(buffer) = &mut source.buffer {
                buffer.consume(consumed);
            }
            step
        }
        Err(violation) => end_for(source, violation),
    }
}

/// Tells a client why its session ends.
fn end_for(source: &mut Source, (reason, text): Violation) -> Step {
    source.session.handle_refused(None, reason);
    let failure = Failure { reason, retry: Retry::NotSent, text };
    source.tell_control(Kind::Failure, 0, &failure);
    Step::Stop(Served::Ended(reason))
}

/// An error of the client that ends its session, with the words it is told.
type Violation = (Reason, String);

fn handle_frame(
    desk: &mut Desk<'_>,
    source: &mut Source,
    id: SourceId,
    taken: &mut Taken,
    frame: Frame<'_>,
) -> Result<Step, Violation> {
    let header = frame.header;
    if !source.session.is_open() && header.kind != Kind::Hello {
        return Err((Reason::BadFrame, "the first frame must be a hello".into()));
    }
    match header.kind {
        Kind::Send => {
            let Some(upstream) = source.session.upstream(header.upstream) else {
                refuse_unknown(&mut source.session, taken, header.upstream, frame.body.len());
                return Ok(Step::Next);
            };
            let route = Route::new(header.upstream, upstream);
            let stage = |outlet: &mut Upstream| outlet.push(id, frame.body, false);
            let bytes = frame.body.len();
            if push(desk, &mut source.session, id, taken, route, bytes, stage) == Push::Full {
                return Ok(Step::Stop(Served::Blocked { upstream, bytes }));
            }
        }
        Kind::Request => {
            taken.messages += 1;
            taken.bytes += frame.body.len();
            handle_request(desk, source, id, frame);
        }
        Kind::Control => {
            accept(desk, &mut source.session, id, taken);
            taken.messages += 1;
            handle_control(desk, source, id, frame)?;
        }
        Kind::Hello => {
            let version = frame::hello_version(frame.body);
            source.session.handle_hello(version).map_err(|reason| {
                let theirs = version.map_or("no version".to_owned(), |v| format!("version {v}"));
                let text = format!(
                    "{reason}: the broker speaks version {}, the client {theirs}; \
                     install matching releases",
                    frame::VERSION
                );
                (reason, text)
            })?;
            let welcome = BrokerMessage::Welcome {
                session: source.session.id,
                requests_in_flight_max: u32::try_from(desk.limits.requests_in_flight_max)
                    .unwrap_or(u32::MAX),
            };
            source.tell_control(Kind::Control, header.correlation, &welcome);
        }
        Kind::Reply | Kind::Failure => {
            return Err((Reason::BadFrame, "a client sends neither replies nor failures".into()));
        }
    }
    Ok(Step::Next)
}

fn handle_request(desk: &mut Desk<'_>, source: &mut Source, id: SourceId, frame: Frame<'_>) {
    let correlation = frame.header.correlation;
    let refuse = |source: &mut Source, reason: Reason, text: String| {
        source.session.handle_refused(None, reason);
        let failure = Failure { reason, retry: Retry::NotSent, text };
        source.tell_control(Kind::Failure, correlation, &failure);
    };
    if source.is_hung_up {
        return source.session.handle_refused(None, Reason::ClientGone);
    }
    let Some(upstream) = source.session.upstream(frame.header.upstream) else {
        let text = format!("handle {} was not opened by this client", frame.header.upstream);
        return refuse(source, Reason::UnknownUpstream, text);
    };
    if let Err(reason) = source.session.check_request(correlation) {
        let text = match reason {
            Reason::Quota => format!(
                "{reason}: {} requests are in flight (requests_in_flight_max)",
                source.session.in_flight()
            ),
            _ => format!("{reason}: {correlation}"),
        };
        return refuse(source, reason, text);
    }
    let timeout = timeout_of(frame.header);
    let Ok(charge) = source.account.charge(Resource::QueuedBytes, frame.body.len()) else {
        let text = format!("{}: queued_bytes_max_per_uid", Reason::Quota);
        return refuse(source, Reason::Quota, text);
    };
    let owner = Owner { source: id, uid: source.session.peer.uid, correlation };
    match desk.upstreams[upstream].request(desk.now, owner, frame.body, timeout, charge) {
        Ok(request) => source.session.start_request(correlation, upstream, request),
        Err(failure) => source.tell_control(Kind::Failure, correlation, &failure),
    }
    desk.touch(upstream);
}

fn handle_control(
    desk: &mut Desk<'_>,
    source: &mut Source,
    id: SourceId,
    frame: Frame<'_>,
) -> Result<(), Violation> {
    let header = frame.header;
    let message = decode::<ClientMessage>(frame.body)
        .map_err(|error| (Reason::BadFrame, error.to_string()))?;
    let answered = match message {
        ClientMessage::Open { name } => open(desk, source, &name),
        ClientMessage::OpenUrl { url } => open_url(desk, source, &url),
        ClientMessage::Flush => {
            source.session.flush(header.upstream, header.correlation).map(|()| None).map_err(
                |reason| (reason, format!("{reason}: flush of handle {}", header.upstream)),
            )
        }
        ClientMessage::Attach { attachment } => {
            // A read ends behind the bytes that descriptors came with, so what is here now came
            // with this frame.
            if let Io::Unix(socket) = &source.io
                && socket.descriptors() > 1
            {
                let reason = Reason::UnexpectedDescriptor;
                return Err((reason, format!("{reason}: {} with one frame", socket.descriptors())));
            }
            attach(desk, source, id, &frame, attachment)
        }
        ClientMessage::OpenRing { bytes } => ring_capacity(source, bytes).map(|capacity| {
            let correlation = header.correlation;
            desk.orders.push(Order::OpenRing { source: id, correlation, capacity });
            None
        }),
        ClientMessage::ResumeRing { bytes, upstreams } => {
            resume_ring(desk, source, id, header.correlation, bytes, &upstreams)
        }
        ClientMessage::Lease => {
            ask_lease(desk, source, id, header);
            Ok(None)
        }
        ClientMessage::Release { lease, is_clean } => {
            if let Some(upstream) = source.session.upstream(header.upstream) {
                desk.upstreams[upstream].release(desk.now, id, lease, is_clean);
                desk.touch(upstream);
            }
            Ok(None)
        }
    };
    match answered {
        Ok(Some(answer)) => source.tell_control(Kind::Control, header.correlation, &answer),
        Ok(None) => {}
        Err((reason, text)) => {
            let failure = Failure { reason, retry: Retry::NotSent, text };
            source.tell_control(Kind::Failure, header.correlation, &failure);
        }
    }
    Ok(())
}

/// Asks for a lease; whatever is answered goes by the socket.
fn ask_lease(desk: &mut Desk<'_>, source: &mut Source, id: SourceId, header: FrameHeader) {
    let correlation = header.correlation;
    let timeout = timeout_of(header);
    let asked = match source.session.upstream(header.upstream) {
        Some(upstream) => {
            desk.touch(upstream);
            let owner = Owner { source: id, uid: source.session.peer.uid, correlation };
            desk.upstreams[upstream].lease(desk.now, owner, timeout)
        }
        None => {
            let reason = Reason::UnknownUpstream;
            let text = format!("handle {} was not opened by this client", header.upstream);
            Err(Failure { reason, retry: Retry::NotSent, text })
        }
    };
    if let Err(failure) = asked {
        source.session.handle_refused(None, failure.reason);
        source.tell_no_lease(correlation, &failure);
    }
}

/// How long something may take in all.
fn timeout_of(header: FrameHeader) -> Option<Duration> {
    match header.timeout_ms {
        0 => None,
        timeout_ms => Some(Duration::from_millis(u64::from(timeout_ms))),
    }
}

/// An answer, none yet, or a refusal with its words.
type Answer = Result<Option<BrokerMessage>, (Reason, String)>;

fn ring_capacity(source: &Source, bytes: u64) -> Result<usize, (Reason, String)> {
    let reason = Reason::BadRing;
    if source.ring.is_some() {
        return Err((reason, format!("{reason}: the session has its rings already")));
    }
    let capacity = usize::try_from(bytes).ok().filter(|bytes| {
        bytes.is_power_of_two() && (ring::CAPACITY_MIN..=ring::CAPACITY_MAX).contains(bytes)
    });
    capacity.ok_or_else(|| {
        let (least, most) = (ring::CAPACITY_MIN, ring::CAPACITY_MAX);
        let text = format!("{reason}: {bytes} bytes are no power of two from {least} to {most}");
        (reason, text)
    })
}

fn resume_ring(
    desk: &mut Desk<'_>,
    source: &mut Source,
    id: SourceId,
    correlation: u64,
    bytes: u64,
    names: &[String],
) -> Answer {
    let capacity = ring_capacity(source, bytes)?;
    let Io::Unix(socket) = &mut source.io else {
        return Err((Reason::Internal, "only a client socket passes descriptors".into()));
    };
    let Some(descriptor) = socket.claim_descriptor() else {
        let reason = Reason::DescriptorMissing;
        return Err((reason, reason.to_string()));
    };
    let mut upstreams = Vec::new();
    for name in names.iter().take(HANDLES_MAX) {
        let is_name = check_upstream_name(name).is_ok();
        let found = if is_name { find(desk, name) } else { find_by_url(desk, name) };
        upstreams.push(found.ok());
    }
    let order = Order::ResumeRing { source: id, correlation, capacity, upstreams, descriptor };
    desk.orders.push(order);
    Ok(None)
}

fn open(desk: &Desk<'_>, source: &mut Source, name: &str) -> Answer {
    let upstream = find(desk, name)?;
    opened(desk, source, upstream)
}

/// A configured upstream.
fn find(desk: &Desk<'_>, name: &str) -> Result<usize, (Reason, String)> {
    let found = desk.upstreams.find(name);
    let Some(upstream) = found.filter(|_| check_upstream_name(name).is_ok()) else {
        let names: Vec<_> = desk
            .upstreams
            .iter()
            .map(|upstream| upstream.config.name.as_str())
            .filter(|name| check_upstream_name(name).is_ok())
            .take(NAMES_TOLD_MAX)
            .collect();
        let known = match names.as_slice() {
            [] => "none is configured".to_owned(),
            names => format!("there are: {}", names.join(", ")),
        };
        let name = name.chars().take(CLIENT_TEXT_CHARS_MAX).collect::<String>();
        return Err((Reason::UnknownUpstream, format!("unknown upstream {name:?}; {known}")));
    };
    Ok(upstream)
}

fn opened(desk: &Desk<'_>, source: &mut Source, upstream: usize) -> Answer {
    let handle = source.session.open(upstream).map_err(|reason| {
        (reason, format!("{reason}: a session opens at most {} upstreams", HANDLES_MAX))
    })?;
    let config = &desk.upstreams[upstream].config;
    Ok(Some(BrokerMessage::Opened {
        handle,
        protocol: config.url.protocol,
        message_bytes_max: config.limits.message_bytes_max as u64,
    }))
}

fn open_url(desk: &mut Desk<'_>, source: &mut Source, url: &str) -> Answer {
    let upstream = find_by_url(desk, url)?;
    opened(desk, source, upstream)
}

/// An upstream of that URL, added if there is none and the policy allows it.
fn find_by_url(desk: &mut Desk<'_>, url: &str) -> Result<usize, (Reason, String)> {
    let url: UpstreamUrl = url.parse().map_err(|error| (Reason::InvalidUrl, format!("{error}")))?;
    let not_allowed = |why: String| (Reason::NotAllowed, format!("{url} cannot be opened: {why}"));
    let mut remotes = Vec::new();
    for HostPort { host, port } in &url.hosts {
        let Host::Ip(address) = host else {
            return Err(not_allowed(
                "by URL only an address can be opened, not a host name".into(),
            ));
        };
        if !desk.dynamic.allow.iter().any(|network| network.contains(address)) {
            return Err(not_allowed(format!(
                "no network of [dynamic] allow in the configuration contains {address}"
            )));
        }
        remotes.push((*address, *port).into());
    }
    let name = url.to_string();
    if let Some(upstream) = desk.upstreams.find(&name) {
        return Ok(upstream);
    }
    let dynamic = desk
        .upstreams
        .iter()
        .filter(|upstream| check_upstream_name(&upstream.config.name).is_err());
    if dynamic.count() >= desk.dynamic.upstreams_max {
        return Err(not_allowed(format!(
            "{} upstreams are open by URL already ([dynamic] upstreams_max)",
            desk.dynamic.upstreams_max
        )));
    }
    let mut config = UpstreamConfig::new(&name, url);
    config.overflow = Overflow::Block;
    config.fifo = None;
    let index = desk.upstreams.len();
    let mut upstream = Upstream::new(index, config, desk.limits, index as u64);
    upstream.pool.handle_resolved(desk.now, remotes);
    desk.upstreams.push(upstream);
    Ok(index)
}

fn attach(
    desk: &mut Desk<'_>,
    source: &mut Source,
    id: SourceId,
    frame: &Frame<'_>,
    attachment: Attachment,
) -> Answer {
    let Io::Unix(socket) = &mut source.io else {
        return Err((Reason::Internal, "only a client socket passes descriptors".into()));
    };
    let Some(descriptor) = socket.claim_descriptor() else {
        let reason = Reason::DescriptorMissing;
        return Err((reason, reason.to_string()));
    };
    let handle = frame.header.upstream;
    let Some(upstream) = source.session.upstream(handle) else {
        return Err((Reason::UnknownUpstream, format!("handle {handle} was not opened")));
    };
    let config = &desk.upstreams[upstream].config;
    if attachment == Attachment::Socketpair && config.url.protocol == Protocol::UdpWriteOnly {
        let reason = Reason::WriteOnly;
        return Err((reason, format!("upstream {}: {reason}", config.name)));
    }
    let correlation = frame.header.correlation;
    desk.orders.push(Order::Attach { source: id, correlation, upstream, attachment, descriptor });
    Ok(None)
}

// FIFOs, pipes, socketpairs.

fn cut_step(desk: &mut Desk<'_>, source: &mut Source, id: SourceId, taken: &mut Taken) -> Step {
    let Source { session, account, io, buffer, cutter, framing, awaits_reply, .. } = source;
    let (Some(buffer), Some(cutter)) = (buffer, cutter) else {
        return Step::NeedsBytes;
    };
    if *awaits_reply {
        return Step::Stop(Served::Idle);
    }
    let Some(upstream) = session.upstream(0) else {
        return Step::Stop(Served::Ended(Reason::Internal));
    };
    match cutter.next_cut(buffer.unread()) {
        Cut::Message { body, consumed } => {
            let body = &buffer.unread()[body];
            if let Io::Socketpair(_) = io {
                taken.messages += 1;
                let owner = Owner { source: id, uid: session.peer.uid, correlation: 0 };
                let Ok(charge) = account.charge(Resource::QueuedBytes, body.len()) else {
                    return Step::Stop(Served::Ended(Reason::Quota));
                };
                match desk.upstreams[upstream].request(desk.now, owner, body, None, charge) {
                    Ok(request) => session.start_request(0, upstream, request),
                    Err(failure) => return Step::Stop(Served::Ended(failure.reason)),
                }
                *awaits_reply = true;
                desk.touch(upstream);
            } else {
                let is_line = *framing == Framing::Lines;
                let route = Route::new(0, upstream);
                let stage = |outlet: &mut Upstream| outlet.push(id, body, is_line);
                let bytes = body.len();
                if push(desk, session, id, taken, route, bytes, stage) == Push::Full {
                    return Step::Stop(Served::Blocked { upstream, bytes });
                }
            }
            buffer.consume(consumed);
            Step::Next
        }
        Cut::Refused { reason, consumed } => {
            session.handle_refused(Some(0), reason);
            taken.messages += 1;
            taken.bytes += consumed;
            buffer.consume(consumed);
            Step::Next
        }
        Cut::Skipped { consumed } => {
            taken.bytes += consumed;
            buffer.consume(consumed);
            Step::Next
        }
        Cut::Incomplete => Step::NeedsBytes,
        Cut::Broken => {
            session.handle_refused(Some(0), Reason::Malformed);
            Step::Stop(Served::Ended(Reason::Malformed))
        }
    }
}

/// The input has ended: what an unfinished message at its end becomes.
fn end_of_input(desk: &mut Desk<'_>, source: &mut Source, id: SourceId, reason: Reason) -> Served {
    let Source { session, io, buffer, cutter, .. } = source;
    let Some(buffer) = buffer.as_mut().filter(|buffer| !buffer.is_empty()) else {
        return Served::Ended(reason);
    };
    let tail = cutter.as_mut().map_or(Tail::Partial, |cutter| cutter.finish(buffer.unread()));
    match (tail, session.upstream(0)) {
        (Tail::Message(body), Some(upstream)) if matches!(io, Io::Pipe(_)) => {
            let mut taken = Taken::default();
            let body = &buffer.unread()[body];
            let route = Route::new(0, upstream);
            let stage = |outlet: &mut Upstream| outlet.push(id, body, false);
            let bytes = body.len();
            if push(desk, session, id, &mut taken, route, bytes, stage) == Push::Full {
                // The end will be read again.
                source.is_readable = true;
                return Served::Blocked { upstream, bytes };
            }
            accept(desk, session, id, &mut taken);
        }
        (Tail::Nothing, _) => {}
        (Tail::Message(_) | Tail::Partial, _) => {
            let handle = cutter.is_some().then_some(0);
            session.handle_refused(handle, Reason::Partial);
        }
    }
    let rest = buffer.unread().len();
    buffer.consume(rest);
    Served::Ended(reason)
}

/// Gives back an empty buffer and says what is left unfinished.
fn finish_turn(desk: &mut Desk<'_>, source: &mut Source, served: Served) {
    let is_empty = source.buffer.as_ref().is_none_or(|buffer| buffer.is_empty());
    if is_empty && let Some(buffer) = source.buffer.take() {
        desk.spares.put_back(buffer);
        if let Some(charge) = &mut source.buffer_charge {
            let shrunk = charge.resize(0);
            debug_assert!(shrunk.is_ok(), "shrinking cannot fail");
        }
    }
    // Grows past the quota only for a session that ends for it.
    let charged = charge_descriptors(source);
    debug_assert!(charged.is_ok() || matches!(served, Served::Ended(_)), "claiming shrinks it");
    if served != Served::Idle {
        return;
    }
    let is_skipping = source.cutter.as_ref().is_some_and(|cutter| cutter.is_skipping());
    let unfinished = match &source.io {
        Io::Unix(socket) if socket.descriptors() > 0 => Unfinished::MessageWithDescriptor,
        Io::Unix(_) | Io::Fifo(_) if !is_empty || is_skipping => Unfinished::Message,
        // Nobody waits behind an unfinished message of a pipe of one's own, but the shutdown.
        Io::Pipe(_) if desk.is_draining && !is_empty => Unfinished::Message,
        Io::Unix(_) | Io::Fifo(_) | Io::Pipe(_) | Io::Socketpair(_) => Unfinished::Nothing,
    };
    // The wait began with the last bytes read, which set the deadline aside.
    if unfinished == Unfinished::Nothing || source.session.next_deadline().is_none() {
        source.session.handle_unfinished(desk.now, unfinished);
    }
}
