//! One attempt to join a ring to a broker: greet, ask, take the answer. Never blocks by itself.
//!
//! ```text
//!   Greeting --Welcome--> Asking --RingOpened--> joined
//!      |                     |
//!      '---- a failure, the end of the socket, the expiry: over
//! ```

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use poolbroker_proto::frame::{FrameHeader, Kind, hello};
use poolbroker_proto::message::{BrokerMessage, ClientMessage, Failure, Retry, decode, encode};
use poolbroker_proto::reason::Reason;

use crate::deadline::Deadline;
use crate::error::Error;
use crate::stream::{FrameStream, Read};

/// The first pause between two attempts.
const PAUSE_MIN: Duration = Duration::from_millis(10);

/// The longest pause: what a restarted broker waits for its clients at most.
const PAUSE_MAX: Duration = Duration::from_millis(250);

/// How long one attempt may take. A broker answers within one turn of its loop; one that takes
/// seconds is stopped.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(5);

/// The correlation id of the question; the hello has 0.
const QUESTION: u64 = 1;

const CALL: &str = "opening a ring at the broker";

/// When the next attempt is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Backoff {
    pub due: Instant,
    pause: Duration,
}

/// One attempt.
pub(crate) struct Attempt {
    stream: FrameStream,
    step: Step,
    descriptors: Vec<OwnedFd>,
    expires: Instant,
}

enum Step {
    Greeting,
    Asking { session: u64, requests_in_flight_max: usize },
}

/// How far an attempt came.
pub(crate) enum Progress {
    /// Nothing is decided: wait for the socket.
    Pending(Attempt),
    Joined(Joined),
    /// The broker refuses.
    Refused(Failure),
    /// The broker went, or did not answer in time.
    Failed,
    /// The broker says what this client does not understand.
    NotUnderstood(String),
}

/// A session whose ring a broker serves.
pub(crate) struct Joined {
    pub stream: FrameStream,
    pub session: u64,
    pub requests_in_flight_max: usize,
    pub descriptors: Vec<OwnedFd>,
}

impl Backoff {
    /// The first attempt is due at once.
    pub fn new(now: Instant) -> Self {
        Backoff { due: now, pause: PAUSE_MIN }
    }

    /// After one more attempt that failed.
    pub fn next(self, now: Instant) -> Self {
        Backoff { due: now + self.pause, pause: PAUSE_MAX.min(self.pause * 2) }
    }
}

impl Attempt {
    /// Greets over a connected socket.
    ///
    /// # Errors
    /// As sendmsg(2).
    pub fn new(socket: UnixStream, now: Instant) -> io::Result<Attempt> {
        let mut attempt = Attempt {
            stream: FrameStream::new(Arc::new(socket)),
            step: Step::Greeting,
            descriptors: Vec::new(),
            expires: now + ATTEMPT_TIMEOUT,
        };
        attempt.write(FrameHeader::new(Kind::Hello), &hello(), None)?;
        Ok(attempt)
    }

    /// Takes what the broker has said, and asks `question` when it has welcomed.
    pub fn advance(
        mut self,
        question: &ClientMessage,
        memory: Option<BorrowedFd<'_>>,
        now: Instant,
    ) -> Progress {
        let read = loop {
            match self.stream.receive(&mut self.descriptors) {
                Ok(Read::Some) => {}
                Ok(Read::Nothing) => break Read::Nothing,
                Ok(Read::End) | Err(_) => break Read::End,
            }
        };
        loop {
            let (kind, body) = match self.stream.next_frame() {
                Ok(Some(frame)) => (frame.header.kind, frame.body.to_vec()),
                Ok(None) => break,
                Err(error) => return Progress::NotUnderstood(error.to_string()),
            };
            if kind == Kind::Failure {
                return match decode(&body) {
                    Ok(failure) => Progress::Refused(failure),
                    Err(error) => Progress::NotUnderstood(error.to_string()),
                };
            }
            let message = match decode(&body) {
                Ok(message) if kind == Kind::Control => message,
                Ok(_) => return Progress::NotUnderstood(format!("a {kind:?} frame")),
                Err(error) => return Progress::NotUnderstood(error.to_string()),
            };
            match (self.step, message) {
                (
                    Step::Greeting,
                    BrokerMessage::Welcome { session, requests_in_flight_max: max },
                ) => {
                    let requests_in_flight_max = usize::try_from(max).unwrap_or(usize::MAX);
                    self.step = Step::Asking { session, requests_in_flight_max };
                    let body = match encode(question) {
                        Ok(body) => body,
                        Err(error) => return Progress::NotUnderstood(error.to_string()),
                    };
                    let header =
                        FrameHeader { correlation: QUESTION, ..FrameHeader::new(Kind::Control) };
                    if self.write(header, &body, memory).is_err() {
                        return Progress::Failed;
                    }
                }
                (
                    Step::Asking { session, requests_in_flight_max },
                    BrokerMessage::RingOpened { epoch: _ },
                ) => {
                    let Attempt { stream, descriptors, .. } = self;
                    let joined = Joined { stream, session, requests_in_flight_max, descriptors };
                    return Progress::Joined(joined);
                }
                (Step::Greeting | Step::Asking { .. }, other) => {
                    return Progress::NotUnderstood(format!("{other:?} instead of an answer"));
                }
            }
        }
        if read == Read::End || now >= self.expires {
            return Progress::Failed;
        }
        Progress::Pending(self)
    }

    /// Waits until there is something to advance on, at most until `deadline`.
    ///
    /// # Errors
    /// As poll(2).
    pub fn wait(&self, deadline: Deadline) -> io::Result<()> {
        self.stream.wait(false, deadline.earlier(Deadline::At(self.expires))).map(drop)
    }

    /// Advances to the end, for a client that connects.
    ///
    /// # Errors
    /// [`Error::VersionMismatch`], [`Error::Refused`], [`Error::TimedOut`],
    /// [`Error::Disconnected`].
    pub fn finish(mut self, question: &ClientMessage, deadline: Deadline) -> Result<Joined, Error> {
        let (call, retry) = (CALL.to_owned(), Retry::NotSent);
        let ended =
            |reason, said| Error::Disconnected { call: CALL.to_owned(), reason, said, retry };
        loop {
            match self.advance(question, None, Instant::now()) {
                Progress::Joined(joined) => return Ok(joined),
                Progress::Refused(failure) if failure.reason == Reason::VersionMismatch => {
                    return Err(Error::VersionMismatch { said: failure.text });
                }
                Progress::Refused(failure) => return Err(Error::Refused { call, failure }),
                Progress::Failed => {
                    return Err(ended(None, "it was closed without a word".to_owned()));
                }
                Progress::NotUnderstood(said) => {
                    return Err(ended(Some(Reason::BadFrame), said));
                }
                Progress::Pending(pending) => self = pending,
            }
            if deadline.is_over() {
                let why = "the broker did not answer; is it stopped?";
                return Err(Error::TimedOut { call, why, retry });
            }
            self.wait(deadline).map_err(|source| Error::Io {
                call: call.clone(),
                source,
                retry,
            })?;
        }
    }

    fn write(
        &mut self,
        header: FrameHeader,
        body: &[u8],
        descriptor: Option<BorrowedFd<'_>>,
    ) -> io::Result<()> {
        let mut bytes = Vec::new();
        header.append(body, &mut bytes).map_err(io::Error::other)?;
        // A fresh socket has room for more than the longest control frame.
        match self.stream.write([&bytes, &[]], descriptor)? {
            written if written == bytes.len() => Ok(()),
            _ => Err(io::ErrorKind::WouldBlock.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_their_limit() {
        let now = Instant::now();
        let mut backoff = Backoff::new(now);
        let mut pauses = Vec::new();
        for _ in 0..7 {
            backoff = backoff.next(now);
            pauses.push((backoff.due - now).as_millis());
        }
        assert_eq!(pauses, [10, 20, 40, 80, 160, 250, 250]);
    }
}
