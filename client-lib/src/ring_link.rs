//! A session over a ring: every sequence of writing, reading and waiting, and going on with the
//! next broker when one has ended.
//!
//! The ring carries every frame; the socket beside it tells of the end of the broker, carries
//! descriptors, and wakes whoever waits by poll(2).
//!
//! ```text
//!   Serving --end of the socket--> Ended --all it said is taken--> Lost --due--> Trying
//!      |  ^                                                        ^  ^            |
//!      |  |                                                        |  '---failed---|
//!      |  '------------------------------------joined--------------|---------------|
//!      '------goodbye: it shuts down-------------------------------'               |
//!    the session has ended (in the inbox) <--refused, or a ring that makes no sense'
//! ```
//!
//! Invariants:
//! - No thread and no timer looks for the next broker: the calls do. One that must wait tries until
//!   its deadline; one that need not wait makes one step that cannot block, when it is due.
//! - The end of a broker takes effect only after everything that it published was taken.
//! - The clock is read only by a call that waits, and while no broker serves the ring.

use std::io;
use std::ops::ControlFlow;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use poolbroker_proto::frame::{Frame, FrameHeader, Kind};
use poolbroker_proto::message::{BrokerMessage, ClientMessage, Outcomes, Retry, decode};
use poolbroker_proto::reason::Reason;
use poolbroker_proto::ring::{Corrupt, NotWritten, Urgency, body_bytes_max};
use rustix::event::epoll;

use crate::attempt::{Attempt, Backoff, Joined, Progress};
use crate::batch::Batch;
use crate::deadline::Deadline;
use crate::dial::dial_now;
use crate::error::Error;
use crate::inbox::{Ended, Inbox};
use crate::link::{Books, Offered, Outgoing, Patience, Stop, Unwritten};
use crate::reply::CorrelationId;
use crate::ring::Ring;
use crate::stream::{FrameStream, Read, is_gone};
use crate::stream_link::encode_header;

/// How long a wait lasts before the socket is looked at: a broker that dies rings no bell.
const SLICE: Duration = Duration::from_millis(100);

/// How many bytes of the ring are filled before the socket is looked at, in a session that never
/// waits: some 200 small messages pay for one system call, and a ring of the least size is far from
/// full by then.
const LOOK_BYTES: u64 = 16 * 1024;

const CALL: &str = "opening a ring at the broker";

/// A ring, the socket beside it, and the broker that serves both.
pub(crate) struct RingLink {
    ring: Ring,
    stream: FrameStream,
    broker: Broker,
    /// The position from which on the next push looks at the broker; 0 while none serves.
    look_at: u64,
    /// Where brokers listen.
    path: PathBuf,
    /// Names or URLs of the opened upstreams, by handle.
    upstreams: Vec<String>,
    requests_in_flight_max: usize,
    /// Watches the socket of the broker there is.
    watch: Arc<OwnedFd>,
    /// The id of the session, for [`Client::session`](crate::Client::session).
    id: Arc<AtomicU64>,
}

enum Broker {
    Serving,
    Ended,
    Lost(Backoff),
    Trying(Box<Attempt>, Backoff),
}

impl RingLink {
    /// Asks a broker for a ring over a connected socket.
    ///
    /// # Errors
    /// As [`Client::connect_with`](crate::Client::connect_with).
    pub fn open(
        socket: UnixStream,
        path: PathBuf,
        bytes: usize,
        deadline: Deadline,
    ) -> Result<RingLink, Error> {
        let failed = |source| Error::Io { call: CALL.to_owned(), source, retry: Retry::NotSent };
        let attempt = Attempt::new(socket, Instant::now()).map_err(failed)?;
        let question = ClientMessage::OpenRing { bytes: bytes as u64 };
        let joined = attempt.finish(&question, deadline)?;
        let Joined { stream, session, requests_in_flight_max, descriptors } = joined;
        let not_a_ring = |said: String| Error::Disconnected {
            call: CALL.to_owned(),
            reason: Some(Reason::BadRing),
            said,
            retry: Retry::NotSent,
        };
        let [memory, doorbell] = <[OwnedFd; 2]>::try_from(descriptors).map_err(|descriptors| {
            not_a_ring(format!("{} descriptors came with it instead of 2", descriptors.len()))
        })?;
        let ring = Ring::open(memory, doorbell, bytes)
            .map_err(|error| not_a_ring(format!("what the broker passed is no ring: {error}")))?;
        let watch = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(|it| failed(it.into()))?;
        let mut link = RingLink {
            look_at: ring.position() + LOOK_BYTES,
            ring,
            stream,
            broker: Broker::Serving,
            path,
            upstreams: Vec::new(),
            requests_in_flight_max,
            watch: Arc::new(watch),
            id: Arc::new(AtomicU64::new(session)),
        };
        link.watch_socket().map_err(failed)?;
        Ok(link)
    }

    /// What becomes readable with the socket of whichever broker there is.
    pub fn watch(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.watch)
    }

    /// The id of the session with whichever broker there is.
    pub fn id(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.id)
    }

    /// How many requests may be in flight at once.
    pub fn requests_in_flight_max(&self) -> usize {
        self.requests_in_flight_max
    }

    /// Notes an upstream for the next broker; the longest message of a ring, in bytes.
    pub fn opened(&mut self, handle: u16, name: &str) -> usize {
        let place = usize::from(handle);
        if self.upstreams.len() <= place {
            self.upstreams.resize(place + 1, String::new());
        }
        name.clone_into(&mut self.upstreams[place]);
        body_bytes_max(self.ring.capacity())
    }

    /// Pushes a one-way message where that is all there is to do: true if it was. The way of nearly
    /// every message.
    #[inline]
    pub fn push(&mut self, books: &mut Books, header: &FrameHeader, body: &[u8]) -> bool {
        if self.ring.push(header, body).is_err() {
            return false;
        }
        let wakes = self.ring.publish(Urgency::Relaxed);
        if wakes || self.ring.position() >= self.look_at {
            self.look_after(books, wakes);
        }
        true
    }

    /// Writes one frame, waiting for room if there is none.
    pub fn write(
        &mut self,
        books: &mut Books,
        frame: Outgoing<'_>,
        patience: Patience,
    ) -> Result<(), Stop> {
        if frame.descriptor.is_some() {
            return self.write_to_socket(books, frame, patience);
        }
        self.push_patiently(books, &frame.header, frame.body, patience)?;
        let id = CorrelationId(frame.header.correlation);
        books.inbox.written(id, self.ring.position());
        let urgency = match frame.header.kind {
            Kind::Send => Urgency::Relaxed,
            Kind::Hello | Kind::Control | Kind::Request | Kind::Reply | Kind::Failure => {
                Urgency::Urgent
            }
        };
        self.publish(books, urgency);
        Ok(())
    }

    /// Writes the messages of a batch, and shows them all at once.
    pub fn write_batch(
        &mut self,
        books: &mut Books,
        header: &FrameHeader,
        batch: &Batch,
        patience: Patience,
    ) -> Result<(), Unwritten> {
        let mut whole = 0;
        let stop = batch.bodies().try_for_each(|body| {
            self.push_patiently(books, header, body, patience)?;
            whole += 1;
            Ok(())
        });
        self.publish(books, Urgency::Relaxed);
        stop.map_err(|stop| Unwritten { whole, torn: false, stop })
    }

    /// Writes one frame if there is room.
    pub fn offer(&mut self, books: &mut Books, frame: Outgoing<'_>) -> Offered {
        if books.inbox.ended().is_some() {
            return ControlFlow::Break(Stop::Ended);
        }
        if self.push(books, &frame.header, frame.body) {
            return ControlFlow::Continue(true);
        }
        // Whoever never waits learns here that there is another broker.
        self.look_after(books, false);
        match books.inbox.ended() {
            Some(_) => ControlFlow::Break(Stop::Ended),
            None => ControlFlow::Continue(self.push(books, &frame.header, frame.body)),
        }
    }

    /// Waits for news until `deadline`; returns also for none.
    pub fn wait(&mut self, books: &mut Books, deadline: Deadline) -> Result<(), Stop> {
        match &self.broker {
            Broker::Serving if self.stream.wants_descriptors() => {
                let ready = self.stream.wait(false, deadline).map_err(Stop::Io)?;
                self.look(&mut books.inbox);
                if ready.readable { Ok(()) } else { Err(Stop::TimedOut) }
            }
            Broker::Serving => self.wait_for_records(books, deadline),
            // The next look at the frames makes it `Lost`.
            Broker::Ended => Ok(()),
            Broker::Lost(backoff) => {
                let due = backoff.due;
                let until = deadline.earlier(Deadline::At(due));
                thread::sleep(until.time_left().unwrap_or_default());
                if Instant::now() < due {
                    return Err(Stop::TimedOut);
                }
                self.try_next_broker(books);
                if deadline.is_over() { Err(Stop::TimedOut) } else { Ok(()) }
            }
            Broker::Trying(attempt, _) => {
                attempt.wait(deadline).map_err(Stop::Io)?;
                self.try_next_broker(books);
                if deadline.is_over() { Err(Stop::TimedOut) } else { Ok(()) }
            }
        }
    }

    /// Takes the next frame that has arrived; false when there is none.
    pub fn take_frame(&mut self, books: &mut Books) -> bool {
        // What stands behind an answer is for later: the call that awaits it counts with it first.
        if books.inbox.ended().is_some() || books.inbox.has_answer() {
            return false;
        }
        let ended = match self.ring.take() {
            Ok(Some(frame)) => match end_of_broker(&frame) {
                Some(ended) => ended,
                None => {
                    books.inbox.take(frame);
                    return true;
                }
            },
            Ok(None) => match self.stream.next_frame() {
                Ok(Some(frame)) => {
                    // A hello without a body is a nudge, which has done its work.
                    if frame.header.kind != Kind::Hello {
                        books.inbox.take(frame);
                    }
                    return true;
                }
                Ok(None) if matches!(self.broker, Broker::Ended) => Ended::Closed,
                Ok(None) => return false,
                Err(error) => {
                    books.inbox.end(Ended::not_understood(&error));
                    return true;
                }
            },
            Err(corrupt) => {
                end_corrupt(&mut books.inbox, corrupt);
                return true;
            }
        };
        self.lose(books, &ended);
        true
    }

    /// The socket beside the ring, by which descriptors come.
    pub fn stream(&mut self) -> &mut FrameStream {
        &mut self.stream
    }

    /// Gives back the room of what was taken.
    pub fn release(&mut self) {
        self.ring.release();
    }

    /// Makes the watch readable once there is a record; true if there is one now.
    pub fn ask_for_nudge(&mut self, books: &mut Books) -> bool {
        self.ring.ask_for_nudge();
        self.has_records(&mut books.inbox)
    }

    fn push_patiently(
        &mut self,
        books: &mut Books,
        header: &FrameHeader,
        body: &[u8],
        patience: Patience,
    ) -> Result<(), Stop> {
        let mut until = None;
        loop {
            if books.inbox.ended().is_some() {
                return Err(Stop::Ended);
            }
            match self.ring.push(header, body) {
                Ok(()) => return Ok(()),
                Err(NotWritten::Full) => {
                    let until = *until.get_or_insert_with(|| patience.until());
                    self.wait_for_room(books, body.len(), until)?;
                }
                Err(NotWritten::Corrupt(corrupt)) => end_corrupt(&mut books.inbox, corrupt),
                // Lengths are checked against the ring before, and control frames always fit.
                Err(error @ NotWritten::TooLong { .. }) => {
                    return Err(Stop::Io(io::Error::new(io::ErrorKind::InvalidInput, error)));
                }
            }
        }
    }

    /// Makes visible what was pushed.
    fn publish(&mut self, books: &mut Books, urgency: Urgency) {
        let wakes = self.ring.publish(urgency);
        if wakes || self.ring.position() >= self.look_at {
            self.look_after(books, wakes);
        }
    }

    /// Wakes the broker if it asked for it, and looks whether it lives; without one, looks for the
    /// next. Never waits.
    #[cold]
    fn look_after(&mut self, books: &mut Books, wakes: bool) {
        if wakes {
            self.ring.ring_doorbell();
        }
        match self.broker {
            Broker::Serving => {
                self.look_at = self.ring.position() + LOOK_BYTES;
                if self.look(&mut books.inbox) {
                    self.take_frames(books);
                }
            }
            Broker::Ended => self.take_frames(books),
            Broker::Lost(_) | Broker::Trying(..) => {}
        }
        self.try_next_broker(books);
    }

    /// Looks at the socket: whether there was something.
    fn look(&mut self, inbox: &mut Inbox) -> bool {
        if !self.stream.is_readable() {
            return false;
        }
        loop {
            match self.stream.read() {
                Ok(Read::Some) => {}
                Ok(Read::Nothing) => return true,
                Ok(Read::End) => break,
                Err(error) if is_gone(&error) => break,
                Err(error) => {
                    inbox.end(Ended::unusable(&error));
                    return true;
                }
            }
        }
        self.broker = Broker::Ended;
        true
    }

    fn wait_for_records(&mut self, books: &mut Books, deadline: Deadline) -> Result<(), Stop> {
        if self.look(&mut books.inbox) || self.has_records(&mut books.inbox) {
            return Ok(());
        }
        let now = Instant::now();
        match deadline {
            Deadline::At(end) if end <= now => return Err(Stop::TimedOut),
            Deadline::At(_) | Deadline::Never => {}
        }
        let waited = self.ring.wait_for_records(slice(now, deadline));
        or_end(&mut books.inbox, waited);
        Ok(())
    }

    fn wait_for_room(
        &mut self,
        books: &mut Books,
        body_bytes: usize,
        until: Deadline,
    ) -> Result<(), Stop> {
        // A broker that waits for this client to take its replies makes no room.
        self.take_frames(books);
        if !matches!(self.broker, Broker::Serving) {
            return self.wait(books, until);
        }
        let asked = self.ring.ask_for_room(body_bytes);
        if asked != Ok(true) {
            or_end(&mut books.inbox, asked.map(drop));
            return Ok(());
        }
        if self.look(&mut books.inbox) {
            return Ok(());
        }
        let now = Instant::now();
        match until {
            Deadline::At(end) if end <= now => return Err(Stop::TimedOut),
            Deadline::At(_) | Deadline::Never => {}
        }
        self.ring.wait_for_room(slice(now, until));
        Ok(())
    }

    /// Writes a frame with a descriptor, which only a socket can carry.
    fn write_to_socket(
        &mut self,
        books: &mut Books,
        frame: Outgoing<'_>,
        patience: Patience,
    ) -> Result<(), Stop> {
        let until = patience.until();
        let bytes = [&encode_header(&frame.header, frame.body), frame.body].concat();
        loop {
            if books.inbox.ended().is_some() {
                return Err(Stop::Ended);
            }
            if !matches!(self.broker, Broker::Serving) {
                self.take_frames(books);
                self.wait(books, until)?;
                continue;
            }
            match self.stream.write([&bytes, &[]], frame.descriptor) {
                Ok(written) => {
                    self.stream.keep_torn([&bytes, &[]], written..bytes.len());
                    // No other broker ever sees it.
                    books.inbox.written(CorrelationId(frame.header.correlation), 0);
                    return Ok(());
                }
                Err(error) if is_gone(&error) => {
                    self.look(&mut books.inbox);
                    self.broker = Broker::Ended;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let ready = self.stream.wait(true, until).map_err(Stop::Io)?;
                    if !ready.readable && !ready.writable {
                        return Err(Stop::TimedOut);
                    }
                    if self.look(&mut books.inbox) {
                        self.take_frames(books);
                    }
                }
                Err(error) => return Err(Stop::Io(error)),
            }
        }
    }

    /// The broker has ended: settles what it leaves behind.
    fn lose(&mut self, books: &mut Books, ended: &Ended) {
        books.tallies.broker_ended(ended.all_totals(), self.ring.unsent());
        books.inbox.begin_again(self.ring.touched(), ended);
        // Its copies in forked children would keep it in the watch.
        let _ = epoll::delete(&*self.watch, self.stream.socket());
        self.broker = Broker::Lost(Backoff::new(Instant::now()));
        self.look_at = 0;
    }

    /// One step towards the next broker, if none serves and it is due. Never waits.
    fn try_next_broker(&mut self, books: &mut Books) {
        let serving = std::mem::replace(&mut self.broker, Broker::Serving);
        self.broker = match serving {
            Broker::Serving => Broker::Serving,
            Broker::Ended => Broker::Ended,
            Broker::Lost(backoff) => {
                let now = Instant::now();
                if now < backoff.due {
                    Broker::Lost(backoff)
                } else {
                    let socket = dial_now(&self.path).map_err(io::Error::from);
                    match socket.and_then(|socket| Attempt::new(socket, now)) {
                        Ok(attempt) => Broker::Trying(Box::new(attempt), backoff),
                        Err(_) => Broker::Lost(backoff.next(now)),
                    }
                }
            }
            Broker::Trying(attempt, backoff) => self.advance(books, *attempt, backoff),
        };
    }

    fn advance(&mut self, books: &mut Books, attempt: Attempt, backoff: Backoff) -> Broker {
        let now = Instant::now();
        let bytes = self.ring.capacity() as u64;
        let upstreams = self.upstreams.clone();
        let question = ClientMessage::ResumeRing { bytes, upstreams };
        match attempt.advance(&question, Some(self.ring.memory()), now) {
            Progress::Pending(attempt) => Broker::Trying(Box::new(attempt), backoff),
            Progress::Failed => Broker::Lost(backoff.next(now)),
            Progress::Refused(failure) if is_shutdown(failure.reason) => {
                Broker::Lost(backoff.next(now))
            }
            Progress::Refused(failure) => {
                books.inbox.end(Ended::Refused(failure));
                Broker::Lost(backoff.next(now))
            }
            Progress::NotUnderstood(said) => {
                books.inbox.end(Ended::not_understood(&said));
                Broker::Lost(backoff.next(now))
            }
            Progress::Joined(joined) => {
                self.join(&mut books.inbox, joined);
                Broker::Serving
            }
        }
    }

    fn join(&mut self, inbox: &mut Inbox, joined: Joined) {
        let Joined { stream, session, requests_in_flight_max, descriptors } = joined;
        let Ok([doorbell]) = <[OwnedFd; 1]>::try_from(descriptors) else {
            return inbox.end(Ended::not_understood(&"a ring without its doorbell"));
        };
        self.ring.set_doorbell(doorbell);
        // It may have asked for a wake-up before this client had its doorbell, and the asking was
        // then answered at the last one's.
        self.ring.ring_doorbell();
        self.stream = stream;
        self.requests_in_flight_max = requests_in_flight_max;
        // ORDER: relaxed; it tells of nothing but itself.
        self.id.store(session, Ordering::Relaxed);
        self.look_at = self.ring.position() + LOOK_BYTES;
        if let Err(error) = self.watch_socket() {
            inbox.end(Ended::unusable(&error));
        }
    }

    fn watch_socket(&mut self) -> io::Result<()> {
        let data = epoll::EventData::new_u64(0);
        Ok(epoll::add(&*self.watch, self.stream.socket(), data, epoll::EventFlags::IN)?)
    }

    fn take_frames(&mut self, books: &mut Books) {
        while self.take_frame(books) {}
        self.ring.release();
    }

    fn has_records(&mut self, inbox: &mut Inbox) -> bool {
        self.ring.has_records().unwrap_or_else(|corrupt| {
            end_corrupt(inbox, corrupt);
            true
        })
    }
}

/// The end of the broker, if that is what a frame tells and another one may follow.
fn end_of_broker(frame: &Frame<'_>) -> Option<Ended> {
    if frame.header.kind != Kind::Control || frame.header.correlation != 0 {
        return None;
    }
    match decode(frame.body) {
        Ok(BrokerMessage::Goodbye { reason, upstreams }) if is_shutdown(reason) => {
            Some(Ended::Goodbye { reason, totals: upstreams })
        }
        Ok(_) | Err(_) => None,
    }
}

/// Whether a broker ends in order, so that another one may follow.
fn is_shutdown(reason: Reason) -> bool {
    matches!(reason, Reason::ShuttingDown | Reason::Drained)
}

fn slice(now: Instant, deadline: Deadline) -> Instant {
    match deadline {
        Deadline::At(end) => end.min(now + SLICE),
        Deadline::Never => now + SLICE,
    }
}

fn or_end(inbox: &mut Inbox, result: Result<(), Corrupt>) {
    if let Err(corrupt) = result {
        end_corrupt(inbox, corrupt);
    }
}

fn end_corrupt(inbox: &mut Inbox, corrupt: Corrupt) {
    let text = corrupt.to_string();
    inbox.end(Ended::Broken { reason: Some(Reason::RingCorrupt), text });
}

impl Ended {
    fn all_totals(&self) -> Option<&[(u16, Outcomes)]> {
        match self {
            Ended::Goodbye { totals, .. } => Some(totals),
            Ended::Refused(_) | Ended::Closed | Ended::Broken { .. } => None,
        }
    }
}
