//! The client's half of a session: every sequence of writing, reading and waiting.
//!
//! A call writes its frame, then takes frames from the broker until the one it awaits has arrived,
//! its deadline has passed or the session has ended. Frames for others go to the [`Inbox`] on the
//! way; taking stops at the awaited one, so what stands behind it finds the call's result in place.
//!
//! Invariants:
//! - While a write waits for room, frames are read too: a broker that waits for this client to read
//!   its replies would otherwise never make room.
//! - Before an error of the socket is reported, everything the broker still said is read: the
//!   kernel reports the broken pipe to a writer while a goodbye stands unread in its buffer.
//! - `handed_over` counts the messages to a handle in the order of the stream: those written whole
//!   and a torn one, whose rest leaves before anything else.

use std::io::{self, ErrorKind};
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use poolbroker_proto::address::Protocol;
use poolbroker_proto::frame::{FrameHeader, HEADER_BYTES, Kind, hello};
use poolbroker_proto::message::{
    Attachment, BrokerMessage, ClientMessage, Outcomes, Retry, encode,
};
use poolbroker_proto::reason::Reason;

use crate::attached::Detached;
use crate::deadline::Deadline;
use crate::error::Error;
use crate::inbox::{Answer, Ended, HELLO, Inbox};
use crate::reply::{CorrelationId, Reply};
use crate::stream::{FrameStream, Read, is_gone};

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
    stream: FrameStream,
    inbox: Inbox,
    opened: Vec<Opened>,
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

/// Whole frames to be written: the bytes of `parts`, seen as one, with the end of each frame.
#[derive(Clone, Copy)]
pub(crate) struct Frames<'a> {
    pub parts: [&'a [u8]; 2],
    pub ends: &'a [usize],
}

struct Opened {
    description: Arc<Description>,
    handed_over: u64,
    flushed: Outcomes,
}

/// Why a call stopped waiting.
enum Stop {
    TimedOut,
    Ended,
    Io(io::Error),
}

/// How far a write came.
struct Unwritten {
    /// Frames written whole.
    whole: usize,
    /// Whether the next one is torn: its rest leaves before anything else.
    torn: bool,
    stop: Stop,
}

impl Session {
    /// Shakes hands over a connected socket; returns the session and its id.
    pub fn start(socket: Arc<UnixStream>, deadline: Deadline) -> Result<(Session, u64), Error> {
        const CALL: &str = "the handshake with the broker";
        let mut session = Session {
            stream: FrameStream::new(socket),
            inbox: Inbox::default(),
            opened: Vec::new(),
            last_id: HELLO,
            requests_in_flight_max: 0,
            send_timeout: SEND_TIMEOUT,
        };
        let body = hello();
        let header = encode_header(FrameHeader::new(Kind::Hello), &body);
        let ends = [HEADER_BYTES + body.len()];
        let frame = Frames { parts: [&header, &body], ends: &ends };
        let answer =
            session.exchange(HELLO, frame, None, deadline, deadline).map_err(|(stop, _)| {
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
            Answer::Message(_) | Answer::Reply(_) => Err(session.misunderstood(CALL.to_owned())),
        }
    }

    pub fn set_send_timeout(&mut self, timeout: Duration) {
        self.send_timeout = timeout;
    }

    /// Opens an upstream with `message`, unless one of this name is open.
    pub fn open(&mut self, name: &str, message: &ClientMessage) -> Result<Arc<Description>, Error> {
        if let Some(opened) = self.opened.iter().find(|it| &*it.description.name == name) {
            return Ok(Arc::clone(&opened.description));
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
        self.stream.raise_message_bytes_max(message_bytes_max);
        let place = self.opened.len();
        let description =
            Arc::new(Description { name: name.into(), handle, protocol, message_bytes_max, place });
        self.opened.push(Opened {
            description: Arc::clone(&description),
            handed_over: 0,
            flushed: Outcomes::default(),
        });
        Ok(description)
    }

    /// Writes frames with one-way messages to one upstream.
    pub fn send(&mut self, to: &Description, frames: Frames<'_>) -> Result<(), Error> {
        let Err(unwritten) = self.write(frames, None, Deadline::Never) else {
            self.opened[to.place].handed_over += frames.ends.len() as u64;
            return Ok(());
        };
        let Unwritten { whole, torn, stop } = unwritten;
        self.opened[to.place].handed_over += whole as u64 + u64::from(torn);
        let (why, retry) = if torn {
            let why = "the socket to the broker has room for its beginning only; its rest leaves \
                       before anything else";
            (why, Retry::MaybeExecuted)
        } else {
            let why = "the socket to the broker stayed full; is the broker stopped, or the \
                       upstream down?";
            (why, Retry::NotSent)
        };
        Err(self.stopped(stop, format!("send to {:?}", to.name), why, retry))
    }

    /// Messages to an upstream handed over so far.
    pub fn handed_over(&self, to: &Description) -> u64 {
        self.opened[to.place].handed_over
    }

    /// Waits until each message to an upstream has its outcome: what is new since the last time.
    pub fn flush(&mut self, to: &Description, deadline: Deadline) -> Result<Outcomes, Error> {
        let call = || format!("flush of {:?}", to.name);
        match self.ask(call, to.handle, &ClientMessage::Flush, None, deadline) {
            Ok(BrokerMessage::Flushed(totals)) => Ok(self.settle(to, totals)),
            Ok(_) => Err(self.misunderstood(call())),
            Err(error @ Error::Disconnected { .. }) => match self.goodbye_totals(to) {
                Some(totals) if totals.queued() == 0 && taken(totals) == self.handed_over(to) => {
                    let totals = totals.clone();
                    Ok(self.settle(to, totals))
                }
                _ => Err(error),
            },
            Err(error) => Err(error),
        }
    }

    /// What the broker's goodbye says of the messages to an upstream since the last flush.
    pub fn goodbye(&self, to: &Description) -> Option<Outcomes> {
        let totals = self.goodbye_totals(to)?;
        Some(since(totals, &self.opened[to.place].flushed))
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
        let (id, header) = self.begin_request(to, body, deadline)?;
        let frame = Frames { parts: [&header, body], ends: &[HEADER_BYTES + body.len()] };
        let answered_by = deadline.later(VERDICT_GRACE);
        match self.exchange(id, frame, None, deadline, answered_by) {
            Ok(Answer::Reply(body)) => Ok(body),
            Ok(Answer::Failed(failure)) => {
                Err(Error::Failed { upstream: to.name.to_string(), failure })
            }
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
        let (id, header) = self.begin_request(to, body, deadline)?;
        let frame = Frames { parts: [&header, body], ends: &[HEADER_BYTES + body.len()] };
        let expires = deadline.later(VERDICT_GRACE);
        self.inbox.await_reply(id, Arc::clone(&to.name), expires);
        if let Err(unwritten) = self.write(frame, None, deadline) {
            self.inbox.abandon_reply(id);
            let retry = unwritten.retry();
            return Err(self.stopped(unwritten.stop, request_to(to), NO_VERDICT, retry));
        }
        Ok(id)
    }

    /// Waits for the reply to any submitted request.
    pub fn next_reply(&mut self, deadline: Deadline) -> Result<Reply, Error> {
        if self.inbox.in_flight() == 0 && self.inbox.ended().is_none() {
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
        match self.await_reply(Deadline::now()) {
            Ok(reply) => Ok(Some(reply)),
            Err(Stop::TimedOut) => Ok(None),
            Err(stop) => {
                let call = "looking for a reply".to_owned();
                Err(self.stopped(stop, call, "", Retry::MaybeExecuted))
            }
        }
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
                Ok((session, self.inbox.await_detached(session)))
            }
            _ => Err(self.misunderstood(call())),
        }
    }

    /// Waits until `end` tells how the attached session ended.
    pub fn wait_detached(
        &mut self,
        session: u64,
        end: &OnceLock<Detached>,
        deadline: Deadline,
    ) -> Result<Detached, Error> {
        self.wait_until(|_| end.get().cloned(), deadline).map_err(|stop| {
            let call = format!("waiting for the end of session {session}");
            let why = "its writers have not closed it, or its messages are not all out";
            self.stopped(stop, call, why, Retry::MaybeExecuted)
        })
    }

    fn goodbye_totals(&self, to: &Description) -> Option<&Outcomes> {
        self.inbox.ended()?.totals(to.handle)
    }

    fn settle(&mut self, to: &Description, totals: Outcomes) -> Outcomes {
        let flushed = &mut self.opened[to.place].flushed;
        let news = since(&totals, flushed);
        *flushed = totals;
        news
    }

    fn next_id(&mut self) -> CorrelationId {
        self.last_id.0 += 1;
        self.last_id
    }

    /// The id and header of a request that may be sent.
    fn begin_request(
        &mut self,
        to: &Description,
        body: &[u8],
        deadline: Deadline,
    ) -> Result<(CorrelationId, [u8; HEADER_BYTES]), Error> {
        let max = self.requests_in_flight_max;
        if self.inbox.in_flight() >= max {
            return Err(Error::TooManyInFlight { max });
        }
        if deadline.is_over() {
            let why = "its deadline was over before it was sent";
            return Err(self.stopped(Stop::TimedOut, request_to(to), why, Retry::NotSent));
        }
        let id = self.next_id();
        let header = FrameHeader {
            kind: Kind::Request,
            upstream: to.handle,
            correlation: id.0,
            timeout_ms: deadline.timeout_ms(Instant::now()),
        };
        Ok((id, encode_header(header, body)))
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
        let id = self.next_id();
        let header =
            FrameHeader { kind: Kind::Control, upstream, correlation: id.0, timeout_ms: 0 };
        let body =
            encode(message).expect("names and URLs are checked, so they fit a control frame");
        // In one piece, because a descriptor goes with one buffer.
        let bytes = [&encode_header(header, &body), body.as_slice()].concat();
        let frame = Frames { parts: [&bytes, &[]], ends: &[bytes.len()] };
        match self.exchange(id, frame, descriptor, deadline, deadline) {
            Ok(Answer::Message(message)) => Ok(message),
            Ok(Answer::Failed(failure)) => Err(Error::Refused { call: call(), failure }),
            Ok(Answer::Reply(_)) => Err(self.misunderstood(call())),
            Err((stop, retry)) => {
                let why = "the broker did not answer; is it stopped, or the upstream down?";
                Err(self.stopped(stop, call(), why, retry))
            }
        }
    }

    /// Writes one frame, with room by `sent_by`, and waits for its answer until `answered_by`. A
    /// failure comes with what it leaves behind.
    fn exchange(
        &mut self,
        id: CorrelationId,
        frame: Frames<'_>,
        descriptor: Option<BorrowedFd<'_>>,
        sent_by: Deadline,
        answered_by: Deadline,
    ) -> Result<Answer, (Stop, Retry)> {
        // Awaited before it is written: a broker can refuse by the header alone, or refuse the
        // session before it reads anything.
        self.inbox.await_answer(id);
        let answer = match self.write(frame, descriptor, sent_by) {
            Ok(()) => self
                .wait_until(Inbox::take_answer, answered_by)
                .map_err(|stop| (stop, Retry::MaybeExecuted)),
            Err(unwritten) => {
                let retry = unwritten.retry();
                let answer = self.inbox.take_answer();
                answer.ok_or((unwritten.stop, retry))
            }
        };
        self.inbox.abandon_answer();
        answer
    }

    fn await_reply(&mut self, deadline: Deadline) -> Result<Reply, Stop> {
        loop {
            // What is here already needs no look at the expiries.
            if let Some(reply) = self.find(&mut Inbox::take_reply) {
                return Ok(reply);
            }
            let until = deadline.earlier(self.inbox.next_expiry());
            match self.wait_until(Inbox::take_reply, until) {
                Err(Stop::TimedOut) => {
                    self.inbox.expire(Instant::now());
                    match self.inbox.take_reply() {
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
            if self.inbox.ended().is_some() {
                return Err(Stop::Ended);
            }
            self.wait(false, deadline)?;
        }
    }

    /// Takes frames that were read until `found` finds what it looks for.
    fn find<T>(&mut self, found: &mut impl FnMut(&mut Inbox) -> Option<T>) -> Option<T> {
        loop {
            let value = found(&mut self.inbox);
            if value.is_some() || !self.take_frame() {
                return value;
            }
        }
    }

    /// Writes frames until all are in the socket. `deadline` and the send timeout end the wait for
    /// room, whichever comes first; the clock is read only if there is a wait.
    fn write(
        &mut self,
        frames: Frames<'_>,
        descriptor: Option<BorrowedFd<'_>>,
        deadline: Deadline,
    ) -> Result<(), Unwritten> {
        let bytes = frames.bytes();
        let mut until = None;
        let mut written = 0;
        let stop = loop {
            if self.inbox.ended().is_some() {
                break Stop::Ended;
            }
            let descriptor = descriptor.filter(|_| written == 0);
            let error = match self.stream.write(frames.after(written), descriptor) {
                Ok(count) if written + count == bytes => return Ok(()),
                Ok(count) => {
                    written += count;
                    continue;
                }
                Err(error) => error,
            };
            let timeout = self.send_timeout;
            let until = *until.get_or_insert_with(|| deadline.earlier(timeout.into()));
            if is_gone(&error) {
                self.hear_last_words(until);
                break Stop::Ended;
            }
            if error.kind() != ErrorKind::WouldBlock {
                break Stop::Io(error);
            }
            self.take_frames();
            if until.is_over() {
                break Stop::TimedOut;
            }
            if let Err(stop) = self.wait(true, until) {
                break stop;
            }
            self.take_frames();
        };
        let whole = frames.ends.partition_point(|end| *end <= written);
        let started = whole.checked_sub(1).map_or(0, |last| frames.ends[last]);
        // A broker that does not read any more never learns of the frame.
        let torn = written > started && !matches!(stop, Stop::Ended);
        if torn {
            let rest = written..frames.ends[whole];
            self.stream.keep_torn(frames.parts, rest);
        }
        Err(Unwritten { whole, torn, stop })
    }

    /// Waits for news, or for room too, and reads once; finishes a torn frame where there is room.
    fn wait(&mut self, room: bool, deadline: Deadline) -> Result<(), Stop> {
        let ready = self.stream.wait(room, deadline).map_err(Stop::Io)?;
        if !ready.readable && !ready.writable {
            return Err(Stop::TimedOut);
        }
        if ready.writable {
            match self.stream.finish_torn() {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                // What the broker still says is read all the same.
                Err(error) if is_gone(&error) => self.stream.drop_torn(),
                Err(error) => self.inbox.end(Ended::unusable(&error)),
            }
        }
        if ready.readable {
            match self.stream.read() {
                Ok(Read::Some | Read::Nothing) => {}
                Ok(Read::End) => self.inbox.end(Ended::Closed),
                Err(error) if is_gone(&error) => self.inbox.end(Ended::Closed),
                Err(error) => self.inbox.end(Ended::unusable(&error)),
            }
        }
        Ok(())
    }

    /// Reads to the end of what the broker says, after it has ceased to read.
    fn hear_last_words(&mut self, deadline: Deadline) {
        self.stream.drop_torn();
        loop {
            self.take_frames();
            if self.inbox.ended().is_some() || self.wait(false, deadline).is_err() {
                return;
            }
        }
    }

    fn take_frames(&mut self) {
        while self.take_frame() {}
    }

    /// Takes the next frame that was read; false when there is none, or none that counts.
    fn take_frame(&mut self) -> bool {
        if self.inbox.ended().is_some() {
            return false;
        }
        match self.stream.next_frame() {
            Ok(Some(frame)) => {
                self.inbox.take(frame);
                true
            }
            Ok(None) => false,
            Err(error) => {
                self.inbox.end(Ended::not_understood(&error));
                true
            }
        }
    }

    /// The error of a call that stopped; `why` says what it waited for.
    fn stopped(&self, stop: Stop, call: String, why: &'static str, retry: Retry) -> Error {
        match stop {
            Stop::TimedOut => Error::TimedOut { call, why, retry },
            Stop::Ended => self.inbox.ended().unwrap_or(&Ended::Closed).error(call, retry),
            Stop::Io(source) => Error::Io { call, source, retry },
        }
    }

    /// Ends the session after an answer that does not belong to its question.
    fn misunderstood(&mut self, call: String) -> Error {
        self.inbox.end(Ended::not_understood(&"an answer to another question"));
        self.stopped(Stop::Ended, call, "", Retry::MaybeExecuted)
    }
}

impl<'a> Frames<'a> {
    fn bytes(&self) -> usize {
        self.parts[0].len() + self.parts[1].len()
    }

    fn after(&self, written: usize) -> [&'a [u8]; 2] {
        let [first, second] = self.parts;
        match written.checked_sub(first.len()) {
            None => [&first[written..], second],
            Some(of_second) => [&[], &second[of_second..]],
        }
    }
}

impl Unwritten {
    /// Whether a single frame may be written again.
    fn retry(&self) -> Retry {
        if self.torn { Retry::MaybeExecuted } else { Retry::NotSent }
    }
}

/// Encodes the header of a frame whose body is within its upstream's limit.
pub(crate) fn encode_header(header: FrameHeader, body: &[u8]) -> [u8; HEADER_BYTES] {
    header
        .encode(body.len())
        .expect("message_bytes_max is at most 32 bits, and so is a control message")
}

fn request_to(to: &Description) -> String {
    format!("request to {:?}", to.name)
}

fn taken(totals: &Outcomes) -> u64 {
    totals.accepted + totals.refused_total()
}

/// What `totals` holds beyond `earlier` ones of the same handle.
fn since(totals: &Outcomes, earlier: &Outcomes) -> Outcomes {
    let counts = |now: &[(Reason, u64)], before: &[(Reason, u64)]| {
        let count_before = |reason| before.iter().find(|(known, _)| *known == reason);
        now.iter()
            .map(|(reason, count)| {
                let before = count_before(*reason).map_or(0, |(_, count)| *count);
                (*reason, count.saturating_sub(before))
            })
            .filter(|(_, count)| *count > 0)
            .collect()
    };
    Outcomes {
        accepted: totals.accepted.saturating_sub(earlier.accepted),
        sent: totals.sent.saturating_sub(earlier.sent),
        dropped: counts(&totals.dropped, &earlier.dropped),
        expired: totals.expired.saturating_sub(earlier.expired),
        in_doubt: totals.in_doubt.saturating_sub(earlier.in_doubt),
        refused: counts(&totals.refused, &earlier.refused),
        untold: totals.untold.saturating_sub(earlier.untold),
    }
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

    #[test]
    fn frames_are_continued_at_any_byte() {
        let frames = Frames { parts: [b"abc", b"de"], ends: &[5] };
        for written in 0..=5 {
            let rest = frames.after(written).concat();
            assert_eq!(rest, b"abcde"[written..]);
        }
    }
}
