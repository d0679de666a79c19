//! A descriptor that the broker reads: the session it became, and how that session ended.
//!
//! The end is announced once, by a frame that can arrive during any call of the client, so it is
//! kept in a slot that the client's inbox fills and every clone of the handle can look into.

use std::fmt;
use std::sync::{Arc, OnceLock};

use poolbroker_proto::message::Outcomes;
use poolbroker_proto::reason::Reason;

use crate::client::Client;
use crate::deadline::Deadline;
use crate::error::Error;

/// A pipe or socketpair that the broker reads as a session of its own. Dropping the handle changes
/// nothing for that session.
#[derive(Clone)]
pub struct Attached {
    client: Client,
    session: u64,
    end: Arc<OnceLock<Detached>>,
}

/// How an attached session ended; every message it read has its outcome.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Detached {
    /// Why it ended: [`Reason::EndOfInput`] when the last writer closed its end.
    pub reason: Reason,
    /// What became of its messages.
    pub outcomes: Outcomes,
}

impl Attached {
    pub(crate) fn new(client: Client, session: u64, end: Arc<OnceLock<Detached>>) -> Self {
        Attached { client, session, end }
    }

    /// The id of the session that reads the descriptor, as `poolbroker status` shows it.
    #[must_use]
    pub fn session(&self) -> u64 {
        self.session
    }

    /// Waits until every writer has closed its end and each message has its outcome. Once it has
    /// returned how the session ended it returns the same again at once.
    ///
    /// A writer held by this process counts: drop it, and drop a [`Command`](std::process::Command)
    /// that was given it, or the wait cannot end.
    ///
    /// # Errors
    /// [`Error::TimedOut`] at the deadline; the broker goes on reading, and the call may be made
    /// again. [`Error::Disconnected`] when the client's session ended first, or
    /// over a ring the broker that read the descriptor.
    pub fn wait(&self, deadline: impl Into<Deadline>) -> Result<Detached, Error> {
        match self.end.get() {
            Some(end) => Ok(end.clone()),
            None => self.client.lock()?.wait_detached(self.session, &self.end, deadline.into()),
        }
    }
}

impl fmt::Debug for Attached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attached")
            .field("session", &self.session)
            .field("end", &self.end.get())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake_broker::{FakeBroker, HANDLE, Script, sent_all};
    use poolbroker_proto::message::{Attachment, BrokerMessage, ClientMessage};
    use std::fs::File;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    const LONG: Duration = Duration::from_secs(60);
    const ATTACHED: u64 = 12;

    fn expect_attach(session: &mut Script, attachment: Attachment) -> u64 {
        let (id, upstream, message) = session.expect_control();
        assert_eq!(upstream, HANDLE);
        assert_eq!(message, ClientMessage::Attach { attachment });
        assert_eq!(session.descriptors.len(), 1);
        id
    }

    fn detached() -> BrokerMessage {
        BrokerMessage::Detached {
            session: ATTACHED,
            reason: Reason::EndOfInput,
            outcomes: sent_all(1),
        }
    }

    #[test]
    fn what_is_written_to_the_pipe_reaches_the_broker_and_its_end_reaches_the_handle() {
        let (broker, _client, echo) = FakeBroker::serving_echo(|mut session| {
            let id = expect_attach(&mut session, Attachment::Pipe);
            session.tell(id, &BrokerMessage::Attached { session: ATTACHED });
            let mut text = String::new();
            let mut pipe = File::from(session.descriptors.remove(0));
            pipe.read_to_string(&mut text).unwrap();
            assert_eq!(text, "line\n");
            session.tell(0, &detached());
        });
        let (mut writer, attached) = echo.pipe().unwrap();
        assert_eq!(attached.session(), ATTACHED);
        let waiting = attached.wait(Deadline::now()).unwrap_err();
        assert!(matches!(waiting, Error::TimedOut { .. }), "{waiting}");
        writer.write_all(b"line\n").unwrap();
        drop(writer);
        for _ in 0..2 {
            let end = attached.wait(LONG).unwrap();
            assert_eq!((end.reason, end.outcomes), (Reason::EndOfInput, sent_all(1)));
        }
        broker.join();
    }

    #[test]
    fn an_end_that_arrives_together_with_the_answer_is_not_lost() {
        let (_broker, _client, echo) = FakeBroker::serving_echo(|mut session| {
            let id = expect_attach(&mut session, Attachment::Pipe);
            let answer = BrokerMessage::Attached { session: ATTACHED };
            session.tell_together(&[(id, answer), (0, detached())]);
        });
        let (_writer, attached) = echo.pipe().unwrap();
        assert_eq!(attached.wait(LONG).unwrap().outcomes, sent_all(1));
    }

    #[test]
    fn a_socketpair_carries_both_ways() {
        let (broker, _client, echo) = FakeBroker::serving_echo(|mut session| {
            let id = expect_attach(&mut session, Attachment::Socketpair);
            session.tell(id, &BrokerMessage::Attached { session: ATTACHED });
            let mut socket = UnixStream::from(session.descriptors.remove(0));
            let mut request = [0; 5];
            socket.read_exact(&mut request).unwrap();
            socket.write_all(&request).unwrap();
        });
        let (mut socket, _attached) = echo.socketpair().unwrap();
        socket.write_all(b"ping\n").unwrap();
        let mut reply = String::new();
        socket.read_to_string(&mut reply).unwrap();
        assert_eq!(reply, "ping\n");
        broker.join();
    }

    #[test]
    fn the_wait_ends_with_the_session() {
        let (_broker, _client, echo) = FakeBroker::serving_echo(|mut session| {
            let id = expect_attach(&mut session, Attachment::Pipe);
            session.tell(id, &BrokerMessage::Attached { session: ATTACHED });
        });
        let (_writer, attached) = echo.pipe().unwrap();
        let ended = attached.wait(Deadline::Never).unwrap_err();
        assert!(matches!(ended, Error::Disconnected { .. }), "{ended}");
    }
}
