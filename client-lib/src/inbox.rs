//! What the frames of the broker mean. Pure: frames in, values out; no socket, no clock.
//!
//! The inbox holds what is awaited and what has arrived:
//! - one *answer*, to a call that blocks (the client's lock admits one such call at a time);
//! - *submitted* requests, each of which becomes exactly one [`Reply`]: by a frame, by its expiry,
//!   or by the end of the session;
//! - the *ends* of attached sessions, as long as somebody holds their [`Attached`] handle;
//! - how the session itself *ended*, after which nothing more is taken.
//!
//! A frame for an id that nobody awaits is the late answer to an abandoned call and is dropped.
//!
//! [`Attached`]: crate::Attached

use std::collections::{HashMap, VecDeque};
use std::mem;
use std::sync::{Arc, OnceLock, Weak};
use std::time::Instant;

use poolbroker_proto::frame::{Frame, Kind};
use poolbroker_proto::message::{BrokerMessage, Failure, Outcomes, Retry, decode};
use poolbroker_proto::reason::Reason;

use crate::attached::Detached;
use crate::deadline::Deadline;
use crate::error::Error;
use crate::reply::{CorrelationId, Reply};

/// The correlation id of the hello, whose answer is the first frame of the broker.
pub(crate) const HELLO: CorrelationId = CorrelationId(0);

/// The answer to a call that blocks.
#[derive(Debug)]
pub(crate) enum Answer {
    /// To a control message.
    Message(BrokerMessage),
    /// To a request.
    Reply(Vec<u8>),
    /// To either.
    Failed(Failure),
    /// None: the broker that had seen the question ended, and another one took over the ring.
    Lost,
}

/// How a session ended.
#[derive(Debug, Clone)]
pub(crate) enum Ended {
    /// The broker said goodbye and how many messages it took, by handle.
    Goodbye { reason: Reason, totals: Vec<(u16, Outcomes)> },
    /// The broker threw the session out.
    Refused(Failure),
    /// The socket was closed without a word.
    Closed,
    /// The stream cannot be used further.
    Broken { reason: Option<Reason>, text: String },
}

/// What is awaited and what has arrived.
#[derive(Default)]
pub(crate) struct Inbox {
    awaited: Awaited,
    submitted: HashMap<CorrelationId, Submitted>,
    replies: VecDeque<Reply>,
    attached: HashMap<u64, Weak<OnceLock<Detached>>>,
    ended: Option<Ended>,
}

#[derive(Default)]
enum Awaited {
    #[default]
    Nothing,
    Answer(Asked),
    Arrived(Answer),
}

/// A question, and where it ends in the ring that carries it.
#[derive(Clone, Copy)]
struct Asked {
    id: CorrelationId,
    end: u64,
}

struct Submitted {
    upstream: Arc<str>,
    expires: Deadline,
    end: u64,
}

/// Where something ends that was not written yet: behind everything that a broker can have seen.
const UNWRITTEN: u64 = u64::MAX;

impl Inbox {
    /// Awaits the answer with this id, and no other.
    pub fn await_answer(&mut self, id: CorrelationId) {
        self.awaited = Awaited::Answer(Asked { id, end: UNWRITTEN });
    }

    /// The question or request with this id is in the ring now, up to `end`.
    pub fn written(&mut self, id: CorrelationId, end: u64) {
        match &mut self.awaited {
            Awaited::Answer(asked) if asked.id == id => asked.end = end,
            Awaited::Answer(_) | Awaited::Arrived(_) | Awaited::Nothing => {
                if let Some(request) = self.submitted.get_mut(&id) {
                    request.end = end;
                }
            }
        }
    }

    /// Takes the awaited answer once it has arrived.
    pub fn take_answer(&mut self) -> Option<Answer> {
        match mem::take(&mut self.awaited) {
            Awaited::Arrived(answer) => Some(answer),
            waiting @ (Awaited::Answer(_) | Awaited::Nothing) => {
                self.awaited = waiting;
                None
            }
        }
    }

    /// Whether the awaited answer has arrived and was not taken.
    pub fn has_answer(&self) -> bool {
        matches!(self.awaited, Awaited::Arrived(_))
    }

    /// Awaits no answer any more: if it comes, it is dropped.
    pub fn abandon_answer(&mut self) {
        self.awaited = Awaited::Nothing;
    }

    /// Awaits the reply to a submitted request until it `expires`.
    pub fn await_reply(&mut self, id: CorrelationId, upstream: Arc<str>, expires: Deadline) {
        self.submitted.insert(id, Submitted { upstream, expires, end: UNWRITTEN });
    }

    /// Awaits no reply to this request any more, whether it has arrived or not.
    pub fn abandon_reply(&mut self, id: CorrelationId) {
        self.submitted.remove(&id);
        self.replies.retain(|reply| reply.id != id);
    }

    /// Submitted requests whose reply has not been taken.
    pub fn in_flight(&self) -> usize {
        self.submitted.len() + self.replies.len()
    }

    /// Takes the reply that arrived first.
    pub fn take_reply(&mut self) -> Option<Reply> {
        self.replies.pop_front()
    }

    /// When the first submitted request expires.
    pub fn next_expiry(&self) -> Deadline {
        // At most `requests_in_flight_max` are looked at, and only by a call that is about to wait:
        // an ordered index would cost every request more than this costs the wait.
        let expiries = self.submitted.values().map(|request| request.expires);
        expiries.fold(Deadline::Never, Deadline::earlier)
    }

    /// Gives up the submitted requests that have expired.
    pub fn expire(&mut self, now: Instant) {
        let is_due = |expires| matches!(expires, Deadline::At(instant) if instant <= now);
        self.give_up(
            |request| is_due(request.expires),
            |upstream| Error::TimedOut {
                call: format!("request to {upstream:?}"),
                why: "the broker gave no answer by its deadline",
                retry: Retry::MaybeExecuted,
            },
        );
    }

    /// The slot that will hold the end of an attached session.
    pub fn await_detached(&mut self, session: u64) -> Arc<OnceLock<Detached>> {
        let end = Arc::new(OnceLock::new());
        self.attached.insert(session, Arc::downgrade(&end));
        end
    }

    /// Takes one frame. Nothing is taken after the session has ended.
    pub fn take(&mut self, frame: Frame<'_>) {
        if self.ended.is_some() {
            return;
        }
        let id = CorrelationId(frame.header.correlation);
        match frame.header.kind {
            Kind::Reply => {
                if self.is_awaited(id) {
                    self.settle(id, Answer::Reply(frame.body.to_vec()));
                }
            }
            Kind::Failure => match decode::<Failure>(frame.body) {
                Ok(failure) if self.is_awaited(id) => self.settle(id, Answer::Failed(failure)),
                Ok(failure) if id == HELLO => self.end(Ended::Refused(failure)),
                Ok(_) => {}
                Err(error) => self.end(Ended::not_understood(&error)),
            },
            Kind::Control => match decode::<BrokerMessage>(frame.body) {
                Ok(message) => self.take_message(id, message),
                Err(error) => self.end(Ended::not_understood(&error)),
            },
            kind @ (Kind::Hello | Kind::Send | Kind::Request) => {
                self.end(Ended::not_understood(&format_args!(
                    "a {kind:?} frame, which only clients send"
                )));
            }
        }
    }

    /// Ends the session: every submitted request without a reply gets one that says so.
    pub fn end(&mut self, ended: Ended) {
        if self.ended.is_some() {
            return;
        }
        self.give_up(
            |_| true,
            |upstream| ended.error(format!("request to {upstream:?}"), Retry::MaybeExecuted),
        );
        self.ended = Some(ended);
    }

    /// The broker of a ring has ended as told, but not the session. What it may have seen, up to
    /// `touched`, gets no answer any more; the rest the next broker will see.
    pub fn begin_again(&mut self, touched: u64, ended: &Ended) {
        if matches!(self.awaited, Awaited::Answer(asked) if asked.end <= touched) {
            self.awaited = Awaited::Arrived(Answer::Lost);
        }
        self.give_up(
            |request| request.end <= touched,
            |upstream| ended.error(format!("request to {upstream:?}"), Retry::MaybeExecuted),
        );
        self.attached.clear();
    }

    /// Whether the end of an attached session can still be told to `end`.
    pub fn awaits_detached(&self, session: u64, end: &Arc<OnceLock<Detached>>) -> bool {
        let slot = self.attached.get(&session);
        slot.is_some_and(|slot| slot.as_ptr() == Arc::as_ptr(end))
    }

    /// How the session ended, if it has.
    pub fn ended(&self) -> Option<&Ended> {
        self.ended.as_ref()
    }

    fn take_message(&mut self, id: CorrelationId, message: BrokerMessage) {
        match message {
            BrokerMessage::Detached { session, reason, outcomes } => {
                let slot = self.attached.remove(&session);
                if let Some(slot) = slot.and_then(|slot| slot.upgrade()) {
                    // A slot leaves the table when it is filled, so it is still empty here.
                    let _ = slot.set(Detached { reason, outcomes });
                }
            }
            BrokerMessage::Goodbye { reason, upstreams } => {
                self.end(Ended::Goodbye { reason, totals: upstreams })
            }
            answer @ (BrokerMessage::Welcome { .. }
            | BrokerMessage::Opened { .. }
            | BrokerMessage::Flushed(_)
            | BrokerMessage::RingOpened { .. }
            | BrokerMessage::Attached { .. }
            | BrokerMessage::Leased { .. }) => self.settle(id, Answer::Message(answer)),
        }
    }

    fn is_awaited(&self, id: CorrelationId) -> bool {
        matches!(self.awaited, Awaited::Answer(asked) if asked.id == id)
            || self.submitted.contains_key(&id)
    }

    fn settle(&mut self, id: CorrelationId, answer: Answer) {
        if matches!(self.awaited, Awaited::Answer(asked) if asked.id == id) {
            self.awaited = Awaited::Arrived(answer);
        } else if let Some(request) = self.submitted.remove(&id) {
            let result = match answer {
                Answer::Reply(body) => Ok(body),
                Answer::Failed(failure) => {
                    Err(Error::Failed { upstream: request.upstream.to_string(), failure })
                }
                Answer::Lost => Err(Ended::Closed
                    .error(format!("request to {:?}", request.upstream), Retry::MaybeExecuted)),
                Answer::Message(message) => {
                    let ended = Ended::not_understood(&format_args!("{message:?} for a request"));
                    let call = format!("request to {:?}", request.upstream);
                    let error = ended.error(call, Retry::MaybeExecuted);
                    self.end(ended);
                    Err(error)
                }
            };
            self.replies.push_back(Reply { id, result });
        }
    }

    fn give_up(&mut self, is_given_up: impl Fn(&Submitted) -> bool, error: impl Fn(&str) -> Error) {
        let mut given_up: Vec<_> =
            self.submitted.extract_if(|_, request| is_given_up(request)).collect();
        given_up.sort_by_key(|(id, _)| *id);
        self.replies.extend(
            given_up
                .into_iter()
                .map(|(id, request)| Reply { id, result: Err(error(&request.upstream)) }),
        );
    }
}

impl Ended {
    /// The stream carries what this client does not understand.
    pub fn not_understood(problem: &impl std::fmt::Display) -> Self {
        Ended::Broken {
            reason: Some(Reason::BadFrame),
            text: format!("the broker sent what this client does not understand: {problem}"),
        }
    }

    /// The socket cannot be read or written.
    pub fn unusable(error: &std::io::Error) -> Self {
        Ended::Broken { reason: None, text: format!("its socket cannot be used: {error}") }
    }

    /// What a `call` reports that met this end.
    pub fn error(&self, call: String, retry: Retry) -> Error {
        let (reason, said) = match self {
            Ended::Goodbye { reason, .. } => (Some(*reason), reason.text()),
            Ended::Refused(failure) => (Some(failure.reason), failure.text.as_str()),
            Ended::Closed => (None, "it was closed without a word, as by a crash"),
            Ended::Broken { reason, text } => (*reason, text.as_str()),
        };
        Error::Disconnected { call, reason, said: said.to_owned(), retry }
    }

    /// What the broker's goodbye says of the messages to one handle; `None` if it does not.
    pub fn totals(&self, handle: u16) -> Option<&Outcomes> {
        match self {
            Ended::Goodbye { totals, .. } => {
                totals.iter().find(|(named, _)| *named == handle).map(|(_, outcomes)| outcomes)
            }
            Ended::Refused(_) | Ended::Closed | Ended::Broken { .. } => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use poolbroker_proto::frame::{Deframer, FrameHeader};
    use poolbroker_proto::message::encode;
    use std::time::Duration;

    fn take(inbox: &mut Inbox, kind: Kind, id: u64, body: &[u8]) {
        let mut bytes = Vec::new();
        let mut header = FrameHeader::new(kind);
        header.correlation = id;
        header.append(body, &mut bytes).unwrap();
        inbox.take(Deframer::new(1000).next_frame(&bytes).unwrap().unwrap());
    }

    fn submit(inbox: &mut Inbox, id: u64, expires: Deadline) {
        inbox.await_reply(CorrelationId(id), "echo".into(), expires);
    }

    fn ids_of_replies(inbox: &mut Inbox) -> Vec<u64> {
        std::iter::from_fn(|| inbox.take_reply()).map(|reply| reply.id.0).collect()
    }

    #[test]
    fn frames_for_ids_that_nobody_awaits_are_dropped() {
        let mut inbox = Inbox::default();
        submit(&mut inbox, 1, Deadline::Never);
        inbox.await_answer(CorrelationId(2));
        inbox.abandon_answer();
        take(&mut inbox, Kind::Reply, 2, b"late");
        take(&mut inbox, Kind::Reply, 3, b"never asked");
        assert!(inbox.take_answer().is_none());
        assert!(inbox.take_reply().is_none());
        assert!(inbox.ended().is_none());
    }

    #[test]
    fn an_answer_and_submitted_replies_do_not_mix() {
        let mut inbox = Inbox::default();
        submit(&mut inbox, 1, Deadline::Never);
        inbox.await_answer(CorrelationId(2));
        take(&mut inbox, Kind::Reply, 1, b"one");
        assert!(inbox.take_answer().is_none());
        take(&mut inbox, Kind::Reply, 2, b"two");
        assert!(matches!(inbox.take_answer(), Some(Answer::Reply(body)) if body == b"two"));
        let reply = inbox.take_reply().unwrap();
        assert_eq!((reply.id.0, reply.result.unwrap()), (1, b"one".to_vec()));
        assert_eq!(inbox.in_flight(), 0);
    }

    #[test]
    fn only_requests_whose_time_has_come_expire() {
        let mut inbox = Inbox::default();
        let now = Instant::now();
        let later = now + Duration::from_secs(1);
        submit(&mut inbox, 1, Deadline::Never);
        submit(&mut inbox, 2, Deadline::At(later));
        submit(&mut inbox, 3, Deadline::At(now));
        assert_eq!(inbox.next_expiry(), Deadline::At(now));
        inbox.expire(now);
        assert_eq!(ids_of_replies(&mut inbox), [3]);
        assert_eq!(inbox.next_expiry(), Deadline::At(later));
        inbox.expire(later);
        assert_eq!(ids_of_replies(&mut inbox), [2]);
        assert_eq!(inbox.next_expiry(), Deadline::Never);
    }

    #[test]
    fn the_end_answers_what_is_in_flight_in_order_and_nothing_is_taken_after_it() {
        let mut inbox = Inbox::default();
        for id in [4, 2, 9] {
            submit(&mut inbox, id, Deadline::Never);
        }
        take(&mut inbox, Kind::Reply, 9, b"in time");
        inbox.end(Ended::Closed);
        take(&mut inbox, Kind::Reply, 2, b"too late");
        assert_eq!(ids_of_replies(&mut inbox), [9, 2, 4]);
    }

    #[test]
    fn bytes_that_are_no_message_end_the_session_as_bad_frames() {
        for (kind, body) in
            [(Kind::Control, b"\xff".as_slice()), (Kind::Failure, b""), (Kind::Send, b"x")]
        {
            let mut inbox = Inbox::default();
            take(&mut inbox, kind, 1, body);
            let error = inbox.ended().unwrap().error("call".into(), Retry::NotSent);
            assert_eq!(error.reason(), Some(Reason::BadFrame), "{error}");
        }
    }

    #[test]
    fn the_end_of_an_attached_session_reaches_its_handle_and_is_dropped_without_one() {
        let mut inbox = Inbox::default();
        let (kept, dropped) = (inbox.await_detached(7), inbox.await_detached(8));
        drop(dropped);
        for session in [7, 8, 9] {
            let message = BrokerMessage::Detached {
                session,
                reason: Reason::EndOfInput,
                outcomes: Outcomes::default(),
            };
            take(&mut inbox, Kind::Control, 0, &encode(&message).unwrap());
        }
        assert_eq!(kept.get().unwrap().reason, Reason::EndOfInput);
        assert!(inbox.attached.is_empty());
        assert!(inbox.ended().is_none());
    }
}
