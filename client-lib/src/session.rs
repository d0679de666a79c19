//! The client's half of a session: what each call writes, and what it waits for.
//!
//! A call writes its frame, then takes frames from the broker until the one it awaits has arrived,
//! its deadline has passed or the session has ended. Frames for others go to the [`Inbox`] on the
//! way; taking stops at the awaited one, so what stands behind it finds the call's result in place.
//!
//! Invariants:
//! - `handed_over` counts the messages to a handle in their order: those written whole and a torn
//!   one, whose rest leaves before anything else.
//! - A question that a broker of the ring took with it is asked anew; a request never is.

use std::ops::ControlFlow;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use poolbroker_proto::address::Protocol;
use poolbroker_proto::frame::{FrameHeader, Kind, hello};
use poolbroker_proto::message::{
    Attachment, BrokerMessage, ClientMessage, Outcomes, Retry, encode,
};
use poolbroker_proto::reason::Reason;

use crate::attached::Detached;
use crate::batch::Batch;
use crate::deadline::Deadline;
use crate::error::Error;
use crate::inbox::{Answer, Ended, HELLO, Inbox};
use crate::link::{Books, Link, Outgoing, Patience, Stop, Unwritten};
use crate::reply::{CorrelationId, Reply};
use crate::ring_link::RingLink;
use crate::stream_link::StreamLink;
use crate::tally::taken;

/// How long a send waits for room and a control message for its answer, unless set otherwise. Both
/// end early only where the broker reads no more of the session, because it is stopped or because
/// an upstream with `overflow = "block"` is; 30 s is that upstream's own `queue_timeout`.
pub(crate) const SEND_TIMEOUT: Duration = Duration::from_secs(30);

/// How much longer than its deadline a request waits for the broker's verdict, which is the more
/// exact one: it knows whether the request left. Far above a scheduling delay, far below patience.
pub(crate) const VERDICT_GRACE: Duration = Duration::from_millis(250);

const NO_VERDICT: &str = "the broker gave no answer by its deadline";

/// The client's half of a session.
pub(crate) struct Session {
    link: Link,
    books: Books,
    opened: Vec<Arc<Description>>,
    last_id: CorrelationId,
    requests_in_flight_max: usize,
    send_timeout: Duration,
}

/// What is known of an opened upstream, and never changes.
#[derive(Debug)]
pub(crate) struct Description {
    pub name: Arc<str>,
    pub handle: u16,
    pub protocol: Protocol,
    pub message_bytes_max: usize,
    /// Where the session keeps its counts.
    pub place: usize,
}

impl Session {
    /// Shakes hands over a connected socket; returns the session and its id.
    pub fn start(socket: Arc<UnixStream>, deadline: Deadline) -> Result<(Session, u64), Error> {
        const CALL: &str = "the handshake with the broker";
        let mut session = Session::over(Link::Stream(StreamLink::new(socket)));
        let frame =
            Outgoing { header: FrameHeader::new(Kind::Hello), body: &hello(), descriptor: None };
        let answer = session.exchange(frame, deadline, deadline).map_err(|(stop, _)| {
            let why = "the broker did not answer; is it stopped?";
            session.stopped(stop, CALL.to_owned(), why, Retry::NotSent)
        })?;
        match answer {
            Answer::Message(BrokerMessage::Welcome { session: id, requests_in_flight_max }) => {
                session.requests_in_flight_max =
                    usize::try_from(requests_in_flight_max).unwrap_or(usize::MAX);
                Ok((session, id))
            }
            Answer::Failed(failure) if failure.reason == Reason::VersionMismatch => {
                Err(Error::VersionMismatch { said: failure.text })
            }
            Answer::Failed(failure) => Err(Error::Refused { call: CALL.to_owned(), failure }),
            Answer::Message(_) | Answer::Reply(_) | Answer::Lost => {
                Err(session.misunderstood(CALL.to_owned()))
            }
        }
    }

    /// Goes on over a ring that was opened.
    pub fn over_ring(ring: RingLink) -> Session {
        Session::over(Link::Ring(Box::new(ring)))
    }

    fn over(link: Link) -> Session {
        Session {
            link,
            books: Books::default(),
            opened: Vec::new(),
            last_id: HELLO,
            requests_in_flight_max: 0,
            send_timeout: SEND_TIMEOUT,
        }
    }

    pub fn set_send_timeout(&mut self, timeout: Duration) {
        self.send_timeout = timeout;
    }

    /// Opens an upstream with `message`, unless one of this name is open.
    pub fn open(&mut self, name: &str, message: &ClientMessage) -> Result<Arc<Description>, Error> {
        if let Some(opened) = self.opened.iter().find(|it| &*it.name == name) {
            return Ok(Arc::clone(opened));
        }
        let call = || format!("opening {name:?}");
        let deadline = Deadline::after(self.send_timeout);
        let BrokerMessage::Opened { handle, protocol, message_bytes_max } =
            self.ask(call, 0, message, None, deadline)?
        else {
            return Err(self.misunderstood(call()));
        };
        // A frame header carries lengths of 32 bits.
        let message_bytes_max = u32::try_from(message_bytes_max).unwrap_or(u32::MAX) as usize;
        let message_bytes_max = self.link.opened(handle, name, message_bytes_max);
        let place = self.books.tallies.open(handle);
        let description =
            Arc::new(Description { name: name.into(), handle, protocol, message_bytes_max, place });
        self.opened.push(Arc::clone(&description));
        Ok(description)
    }

    /// Writes one one-way message.
    #[inline]
    pub fn send(&mut self, to: &Description, message: &[u8]) -> Result<(), Error> {
        if let Link::Ring(ring) = &mut self.link
            && self.books.inbox.ended().is_none()
            && ring.push(&mut self.books, &to.send_header(), message)
        {
            self.books.tallies.hand_over(to.place, 1);
            return Ok(());
        }
        self.send_patiently(to, message)
    }

    /// Writes the messages of a batch.
    pub fn send_batch(&mut self, to: &Description, batch: &Batch) -> Result<(), Error> {
        let patience = self.patience(Deadline::Never);
        let written = self.link.write_batch(&mut self.books, &to.send_header(), batch, patience);
        self.handed_over_as_far(to, batch.bytes_and_ends().1.len(), written)
    }

    /// Writes one one-way message if there is room for it: whether there was.
    pub fn offer(&mut self, to: &Description, message: &[u8]) -> Result<bool, Error> {
        let frame = Outgoing { header: to.send_header(), body: message, descriptor: None };
        match self.link.offer(&mut self.books, frame) {
            ControlFlow::Continue(is_taken) => {
                self.books.tallies.hand_over(to.place, u64::from(is_taken));
                Ok(is_taken)
            }
            ControlFlow::Break(stop) => Err(self.stopped(stop, send_to(to), "", Retry::NotSent)),
        }
    }

    #[cold]
    fn send_patiently(&mut self, to: &Description, message: &[u8]) -> Result<(), Error> {
        let frame = Outgoing { header: to.send_header(), body: message, descriptor: None };
        let patience = self.patience(Deadline::Never);
        let written = self.link.write(&mut self.books, frame, patience);
        self.handed_over_as_far(to, 1, written)
    }

    /// Counts what was written of `count` messages.
    fn handed_over_as_far(
        &mut self,
        to: &Description,
        count: usize,
        written: Result<(), Unwritten>,
    ) -> Result<(), Error> {
        let Err(unwritten) = written else {
            self.books.tallies.hand_over(to.place, count as u64);
            return Ok(());
        };
        let Unwritten { whole, torn, stop } = unwritten;
        self.books.tallies.hand_over(to.place, whole as u64 + u64::from(torn));
        let (why, retry) = if torn {
            let why = "the socket to the broker has room for its beginning only; its rest leaves \
                       before anything else";
            (why, Retry::MaybeExecuted)
        } else {
            (self.no_room(), Retry::NotSent)
        };
        Err(self.stopped(stop, send_to(to), why, retry))
    }

    fn no_room(&self) -> &'static str {
        match self.link {
            Link::Stream(_) => {
                "the socket to the broker stayed full; is the broker stopped, or the upstream down?"
            }
            Link::Ring(_) => {
                "the ring stayed full; is the broker gone or stopped, or the upstream down?"
            }
        }
    }

    /// Messages to an upstream handed over so far.
    pub fn handed_over(&self, to: &Description) -> u64 {
        self.books.tallies.handed_over(to.place)
    }

    /// Waits until each message to an upstream has its outcome: what is new since the last time.
    pub fn flush(&mut self, to: &Description, deadline: Deadline) -> Result<Outcomes, Error> {
        let call = || format!("flush of {:?}", to.name);
        match self.ask(call, to.handle, &ClientMessage::Flush, None, deadline) {
            Ok(BrokerMessage::Flushed(totals)) => Ok(self.books.tallies.settle(to.place, totals)),
            Ok(_) => Err(self.misunderstood(call())),
            Err(error @ Error::Disconnected { .. }) => match self.goodbye_totals(to) {
                Some(totals) if totals.queued() == 0 && taken(totals) == self.handed_over(to) => {
                    let totals = totals.clone();
                    Ok(self.books.tallies.settle(to.place, totals))
                }
                _ => Err(error),
            },
            Err(error) => Err(error),
        }
    }

    /// What the broker's goodbye says of the messages to an upstream since the last flush.
    pub fn goodbye(&self, to: &Description) -> Option<Outcomes> {
        let totals = self.goodbye_totals(to)?;
        Some(self.books.tallies.news(to.place, totals))
    }

    /// Messages handed over that the broker, by its goodbye, never took.
    pub fn not_taken(&self, to: &Description) -> Option<u64> {
        let taken = taken(self.goodbye_totals(to)?);
        Some(self.handed_over(to).saturating_sub(taken))
    }

    /// Sends a request and waits for its reply.
    pub fn request(
        &mut self,
        to: &Description,
        body: &[u8],
        deadline: Deadline,
    ) -> Result<Vec<u8>, Error> {
        let frame = self.begin_request(to, body, deadline)?;
        let answered_by = deadline.later(VERDICT_GRACE);
        match self.exchange(frame, deadline, answered_by) {
            Ok(Answer::Reply(body)) => Ok(body),
            Ok(Answer::Failed(failure)) => {
                Err(Error::Failed { upstream: to.name.to_string(), failure })
            }
            Ok(Answer::Lost) => Err(Ended::Closed.error(request_to(to), Retry::MaybeExecuted)),
            Ok(Answer::Message(_)) => Err(self.misunderstood(request_to(to))),
            Err((stop, retry)) => Err(self.stopped(stop, request_to(to), NO_VERDICT, retry)),
        }
    }

    /// Sends a request whose reply is taken later.
    pub fn submit(
        &mut self,
        to: &Description,
        body: &[u8],
        deadline: Deadline,
    ) -> Result<CorrelationId, Error> {
        let frame = self.begin_request(to, body, deadline)?;
        let id = CorrelationId(frame.header.correlation);
        let expires = deadline.later(VERDICT_GRACE);
        self.books.inbox.await_reply(id, Arc::clone(&to.name), expires);
        let patience = self.patience(deadline);
        if let Err(unwritten) = self.link.write(&mut self.books, frame, patience) {
            self.books.inbox.abandon_reply(id);
            let retry = unwritten.retry();
            return Err(self.stopped(unwritten.stop, request_to(to), NO_VERDICT, retry));
        }
        Ok(id)
    }

    /// Waits for the reply to any submitted request.
    pub fn next_reply(&mut self, deadline: Deadline) -> Result<Reply, Error> {
        if self.books.inbox.in_flight() == 0 && self.books.inbox.ended().is_none() {
            return Err(Error::NothingInFlight);
        }
        self.await_reply(deadline).map_err(|stop| {
            let call = "waiting for a reply".to_owned();
            let why = "no request in flight was answered by then";
            self.stopped(stop, call, why, Retry::MaybeExecuted)
        })
    }

    /// The next reply that is there, after reading what the socket holds.
    pub fn try_next_reply(&mut self) -> Result<Option<Reply>, Error> {
        let mut found = self.await_reply(Deadline::now());
        if matches!(found, Err(Stop::TimedOut)) && self.link.ask_for_nudge(&mut self.books) {
            found = self.await_reply(Deadline::now());
        }
        self.found(found)
    }

    /// The same, without asking to be told of the next one.
    pub fn poll_reply(&mut self) -> Result<Option<Reply>, Error> {
        let found = self.await_reply(Deadline::now());
        self.found(found)
    }

    fn found(&self, found: Result<Reply, Stop>) -> Result<Option<Reply>, Error> {
        match found {
            Ok(reply) => Ok(Some(reply)),
            Err(Stop::TimedOut) => Ok(None),
            Err(stop) => {
                let call = "looking for a reply".to_owned();
                Err(self.stopped(stop, call, "", Retry::MaybeExecuted))
            }
        }
    }

    /// Asks for the loan of a connection: its id and its descriptor.
    pub fn lease(&mut self, to: &Description, deadline: Deadline) -> Result<(u64, OwnedFd), Error> {
        let call = || format!("lease of {:?}", to.name);
        let body = encode(&ClientMessage::Lease).expect("it has no contents");
        loop {
            let correlation = self.next_id().0;
            let timeout_ms = deadline.timeout_ms(Instant::now());
            let header =
                FrameHeader { kind: Kind::Control, upstream: to.handle, correlation, timeout_ms };
            let frame = Outgoing { header, body: &body, descriptor: None };
            self.link.stream().want_descriptors();
            let answer = self.exchange(frame, deadline, deadline.later(VERDICT_GRACE));
            let mut descriptors = self.link.stream().take_descriptors();
            return match answer {
                Ok(Answer::Message(BrokerMessage::Leased { lease })) => {
                    match (descriptors.pop(), descriptors.is_empty()) {
                        (Some(descriptor), true) => Ok((lease, descriptor)),
                        (Some(_) | None, _) => Err(self.misunderstood(call())),
                    }
                }
                Ok(Answer::Failed(failure)) => Err(Error::Refused { call: call(), failure }),
                // What the dead broker lent is gone with it.
                Ok(Answer::Lost) if !deadline.is_over() => continue,
                Ok(Answer::Lost) => {
                    Err(self.stopped(Stop::TimedOut, call(), NO_VERDICT, Retry::NotSent))
                }
                Ok(Answer::Message(_) | Answer::Reply(_)) => Err(self.misunderstood(call())),
                // One that comes yet ends with its own deadline.
                Err((stop, _)) => Err(self.stopped(stop, call(), NO_VERDICT, Retry::NotSent)),
            };
        }
    }

    /// Gives a connection back.
    pub fn release(&mut self, upstream: u16, lease: u64) -> Result<(), Error> {
        let body = release_body(lease, true);
        let header = FrameHeader { upstream, ..FrameHeader::new(Kind::Control) };
        let frame = Outgoing { header, body: &body, descriptor: None };
        let patience = self.patience(Deadline::Never);
        let written = self.link.write(&mut self.books, frame, patience);
        written.map_err(|unwritten| {
            let call = "giving a lease back".to_owned();
            let retry = unwritten.retry();
            self.stopped(unwritten.stop, call, self.no_room(), retry)
        })
    }

    /// Tells that a lease has ended without being given back, if that can be told at once. If not,
    /// its deadline ends it.
    pub fn give_up_lease(&mut self, upstream: u16, lease: u64) {
        let body = release_body(lease, false);
        let header = FrameHeader { upstream, ..FrameHeader::new(Kind::Control) };
        let _ =
            self.link.offer(&mut self.books, Outgoing { header, body: &body, descriptor: None });
    }

    /// Hands a descriptor over: the id of the session that reads it, and the slot for its end.
    pub fn attach(
        &mut self,
        to: &Description,
        attachment: Attachment,
        descriptor: BorrowedFd<'_>,
    ) -> Result<(u64, Arc<OnceLock<Detached>>), Error> {
        let call = || format!("attaching a descriptor to {:?}", to.name);
        let message = ClientMessage::Attach { attachment };
        let deadline = Deadline::after(self.send_timeout);
        match self.ask(call, to.handle, &message, Some(descriptor), deadline)? {
            BrokerMessage::Attached { session } => {
                Ok((session, self.books.inbox.await_detached(session)))
            }
            _ => Err(self.misunderstood(call())),
        }
    }

    /// Waits until `end` tells how the attached session ended.
    pub fn wait_detached(
        &mut self,
        session: u64,
        end: &Arc<OnceLock<Detached>>,
        deadline: Deadline,
    ) -> Result<Detached, Error> {
        let call = || format!("waiting for the end of session {session}");
        let told = |inbox: &mut Inbox| match end.get() {
            Some(end) => Some(Some(end.clone())),
            // Its broker has ended, and the ring with another one goes on.
            None if !inbox.awaits_detached(session, end) => Some(None),
            None => None,
        };
        match self.wait_until(told, deadline) {
            Ok(Some(end)) => Ok(end),
            Ok(None) => Err(Ended::Closed.error(call(), Retry::MaybeExecuted)),
            Err(stop) => {
                let why = "its writers have not closed it, or its messages are not all out";
                Err(self.stopped(stop, call(), why, Retry::MaybeExecuted))
            }
        }
    }

    fn goodbye_totals(&self, to: &Description) -> Option<&Outcomes> {
        self.books.inbox.ended()?.totals(to.handle)
    }

    fn next_id(&mut self) -> CorrelationId {
        self.last_id.0 += 1;
        self.last_id
    }

    /// The frame of a request that may be sent.
    fn begin_request<'a>(
        &mut self,
        to: &Description,
        body: &'a [u8],
        deadline: Deadline,
    ) -> Result<Outgoing<'a>, Error> {
        let max = match &self.link {
            Link::Stream(_) => self.requests_in_flight_max,
            Link::Ring(ring) => ring.requests_in_flight_max(),
        };
        if self.books.inbox.in_flight() >= max {
            return Err(Error::TooManyInFlight { max });
        }
        if deadline.is_over() {
            let why = "its deadline was over before it was sent";
            return Err(self.stopped(Stop::TimedOut, request_to(to), why, Retry::NotSent));
        }
        let header = FrameHeader {
            kind: Kind::Request,
            upstream: to.handle,
            correlation: self.next_id().0,
            timeout_ms: deadline.timeout_ms(Instant::now()),
        };
        Ok(Outgoing { header, body, descriptor: None })
    }

    /// Sends a control message and waits for its answer.
    fn ask(
        &mut self,
        call: impl Fn() -> String,
        upstream: u16,
        message: &ClientMessage,
        descriptor: Option<BorrowedFd<'_>>,
        deadline: Deadline,
    ) -> Result<BrokerMessage, Error> {
        let body =
            encode(message).expect("names and URLs are checked, so they fit a control frame");
        loop {
            let correlation = self.next_id().0;
            let header = FrameHeader { kind: Kind::Control, upstream, correlation, timeout_ms: 0 };
            let frame = Outgoing { header, body: &body, descriptor };
            match self.exchange(frame, deadline, deadline) {
                Ok(Answer::Message(message)) => return Ok(message),
                Ok(Answer::Failed(failure)) => {
                    return Err(Error::Refused { call: call(), failure });
                }
                // The broker that ended may have begun to read the descriptor.
                Ok(Answer::Lost) if descriptor.is_some() => {
                    return Err(Ended::Closed.error(call(), Retry::MaybeExecuted));
                }
                Ok(Answer::Lost) => {}
                Ok(Answer::Reply(_)) => return Err(self.misunderstood(call())),
                Err((stop, retry)) => {
                    let why = "the broker did not answer; is it stopped, or the upstream down?";
                    return Err(self.stopped(stop, call(), why, retry));
                }
            }
        }
    }

    /// Writes one frame, with room by `sent_by`, and waits for its answer until `answered_by`. A
    /// failure comes with what it leaves behind.
    fn exchange(
        &mut self,
        frame: Outgoing<'_>,
        sent_by: Deadline,
        answered_by: Deadline,
    ) -> Result<Answer, (Stop, Retry)> {
        // Awaited before it is written: a broker can refuse by the header alone, or refuse the
        // session before it reads anything.
        self.books.inbox.await_answer(CorrelationId(frame.header.correlation));
        let patience = self.patience(sent_by);
        let answer = match self.link.write(&mut self.books, frame, patience) {
            Ok(()) => self
                .wait_until(Inbox::take_answer, answered_by)
                .map_err(|stop| (stop, Retry::MaybeExecuted)),
            Err(unwritten) => {
                let retry = unwritten.retry();
                let answer = self.books.inbox.take_answer();
                answer.ok_or((unwritten.stop, retry))
            }
        };
        self.books.inbox.abandon_answer();
        answer
    }

    fn await_reply(&mut self, deadline: Deadline) -> Result<Reply, Stop> {
        loop {
            // What is here already needs no look at the expiries.
            if let Some(reply) = self.find(&mut Inbox::take_reply) {
                return Ok(reply);
            }
            let until = deadline.earlier(self.books.inbox.next_expiry());
            match self.wait_until(Inbox::take_reply, until) {
                Err(Stop::TimedOut) => {
                    self.books.inbox.expire(Instant::now());
                    match self.books.inbox.take_reply() {
                        Some(reply) => return Ok(reply),
                        None if deadline.is_over() => return Err(Stop::TimedOut),
                        None => {}
                    }
                }
                arrived => return arrived,
            }
        }
    }

    /// Takes frames until `found` finds what it looks for.
    fn wait_until<T>(
        &mut self,
        mut found: impl FnMut(&mut Inbox) -> Option<T>,
        deadline: Deadline,
    ) -> Result<T, Stop> {
        loop {
            if let Some(value) = self.find(&mut found) {
                return Ok(value);
            }
            if self.books.inbox.ended().is_some() {
                return Err(Stop::Ended);
            }
            self.link.wait(&mut self.books, deadline)?;
        }
    }

    /// Takes frames that were read until `found` finds what it looks for.
    fn find<T>(&mut self, found: &mut impl FnMut(&mut Inbox) -> Option<T>) -> Option<T> {
        loop {
            let value = found(&mut self.books.inbox);
            if value.is_some() || !self.link.take_frame(&mut self.books) {
                self.link.pause_reading();
                return value;
            }
        }
    }

    fn patience(&self, deadline: Deadline) -> Patience {
        Patience { deadline, send_timeout: self.send_timeout }
    }

    /// The error of a call that stopped; `why` says what it waited for.
    fn stopped(&self, stop: Stop, call: String, why: &'static str, retry: Retry) -> Error {
        match stop {
            Stop::TimedOut => Error::TimedOut { call, why, retry },
            Stop::Ended => self.books.inbox.ended().unwrap_or(&Ended::Closed).error(call, retry),
            Stop::Io(source) => Error::Io { call, source, retry },
        }
    }

    /// Ends the session after an answer that does not belong to its question.
    fn misunderstood(&mut self, call: String) -> Error {
        self.books.inbox.end(Ended::not_understood(&"an answer to another question"));
        self.stopped(Stop::Ended, call, "", Retry::MaybeExecuted)
    }
}

impl Description {
    #[inline]
    pub fn send_header(&self) -> FrameHeader {
        FrameHeader { upstream: self.handle, ..FrameHeader::new(Kind::Send) }
    }
}

fn release_body(lease: u64, is_clean: bool) -> Vec<u8> {
    encode(&ClientMessage::Release { lease, is_clean }).expect("it fits a control frame")
}

fn send_to(to: &Description) -> String {
    format!("send to {:?}", to.name)
}

fn request_to(to: &Description) -> String {
    format!("request to {:?}", to.name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broker_that_says_nothing_ends_the_handshake() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let deadline = Deadline::after(Duration::from_millis(1));
        let silent = Session::start(Arc::new(ours), deadline).err().unwrap();
        assert!(matches!(silent, Error::TimedOut { .. }), "{silent}");
        assert_eq!(silent.retry(), Retry::NotSent);
    }
}
