//! What an application does with one upstream: send, request, attach.
//!
//! What can be judged here is judged here, without a round trip: the length of a message, and
//! requests to a write-only upstream.

use std::fmt;
use std::io::{self, PipeWriter};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use poolbroker_proto::address::Protocol;
use poolbroker_proto::message::{Attachment, Outcomes, Retry};

use crate::attached::Attached;
use crate::batch::Batch;
use crate::client::Client;
use crate::deadline::Deadline;
use crate::error::Error;
use crate::lease::{self, Lease};
use crate::reply::CorrelationId;
use crate::session::Description;
use crate::stream_link::encode_header;

/// One upstream, opened with [`Client::upstream`] or [`Client::open`]. Clones share the handle and
/// its counts, and so does opening the same name again.
#[derive(Clone)]
pub struct Upstream {
    client: Client,
    description: Arc<Description>,
}

impl Upstream {
    pub(crate) fn new(client: Client, description: Arc<Description>) -> Self {
        Upstream { client, description }
    }

    /// The name, or the URL it was opened by.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.description.name
    }

    /// The protocol type: what may be done with it.
    #[must_use]
    pub fn protocol(&self) -> Protocol {
        self.description.protocol
    }

    /// The longest message, in bytes.
    #[must_use]
    pub fn message_bytes_max(&self) -> usize {
        self.description.message_bytes_max
    }

    /// Hands over one one-way message: one system call and no copy on this side, or over a ring one
    /// copy and no system call.
    ///
    /// `Ok` means that the whole message is in the socket to the broker, or in the ring. What becomes
    /// of it there [`Upstream::flush`] tells. When there is no room the call waits for it, up to the
    /// client's send timeout. A ring takes messages also while no broker serves it; the next call
    /// that waits, or a later send, hands it to the next one.
    ///
    /// ```
    /// use std::time::Duration;
    /// use poolbroker_client::Client;
    /// use poolbroker_tests::{Broker, peers::UdpSink};
    ///
    /// let peer = UdpSink::start();
    /// let broker = Broker::start(&[format!("metrics={}", peer.url_write_only())]);
    /// let client = Client::connect_in(broker.runtime_dir())?;
    /// let metrics = client.upstream("metrics")?;
    ///
    /// metrics.send(b"jobs.done:1|c")?;
    /// let outcomes = metrics.flush(Duration::from_secs(5))?;
    /// assert_eq!((outcomes.accepted, outcomes.sent), (1, 1));
    /// assert_eq!(peer.wait_for(1), [b"jobs.done:1|c"]);
    /// # Ok::<(), poolbroker_client::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Empty`], [`Error::TooLong`], [`Error::Disconnected`]: the message was not handed
    /// over. [`Error::TimedOut`]: the socket or the ring stayed full. With [`Retry::NotSent`] no byte of the
    /// message was written; with [`Retry::MaybeExecuted`] its beginning was, and the next call of
    /// this client finishes it before it does anything else. The message is handed over then, in
    /// its order, and must not be sent again.
    pub fn send(&self, message: &[u8]) -> Result<(), Error> {
        self.check(message)?;
        self.client.lock()?.send(&self.description, message)
    }

    /// Hands over one one-way message if there is room for it now: never waits.
    ///
    /// ```
    /// use poolbroker_client::{Client, Error};
    /// use poolbroker_tests::{Broker, peers::UdpSink};
    ///
    /// let peer = UdpSink::start();
    /// let broker = Broker::start(&[format!("metrics={}", peer.url_write_only())]);
    /// let metrics = Client::connect_in(broker.runtime_dir())?.upstream("metrics")?;
    ///
    /// match metrics.try_send(b"jobs.done:1|c") {
    ///     Ok(()) => {}
    ///     Err(Error::Full { .. }) => println!("not now"),
    ///     Err(error) => return Err(error),
    /// }
    /// # Ok::<(), Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Full`]: nothing of it was written. Else as [`Upstream::send`], but for
    /// [`Error::TimedOut`]: a message whose beginning alone the socket takes is handed over, and the
    /// next call of this client finishes it.
    pub fn try_send(&self, message: &[u8]) -> Result<(), Error> {
        self.check(message)?;
        match self.client.lock()?.offer(&self.description, message)? {
            true => Ok(()),
            false => Err(Error::Full { upstream: self.name().to_owned() }),
        }
    }

    /// Hands over many one-way messages in writes of about 64 KiB; returns how many. Other threads'
    /// messages may come in between.
    ///
    /// ```
    /// use std::time::Duration;
    /// use poolbroker_client::Client;
    /// use poolbroker_tests::{Broker, peers::UdpSink};
    ///
    /// let peer = UdpSink::start();
    /// let broker = Broker::start(&[format!("metrics={}", peer.url_write_only())]);
    /// let metrics = Client::connect_in(broker.runtime_dir())?.upstream("metrics")?;
    ///
    /// assert_eq!(metrics.send_all(["a:1|c", "b:2|c"])?, 2);
    /// assert_eq!(metrics.flush(Duration::from_secs(5))?.sent, 2);
    /// # Ok::<(), poolbroker_client::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`Upstream::send`], for the first message that fails; those before it are handed over.
    /// [`Upstream::handed_over`] tells how many they are.
    pub fn send_all<I>(&self, messages: I) -> Result<u64, Error>
    where
        I: IntoIterator,
        I::Item: AsRef<[u8]>,
    {
        let mut batch = Batch::new(self.client.transport());
        let mut count = 0;
        for message in messages {
            let message = message.as_ref();
            if let Err(error) = self.check(message) {
                self.send_batch(&mut batch)?;
                return Err(error);
            }
            if batch.is_too_small_for(message) {
                self.send_batch(&mut batch)?;
                self.send(message)?;
            } else {
                if !batch.has_room_for(message) {
                    self.send_batch(&mut batch)?;
                }
                batch.push(&encode_header(&self.description.send_header(), message), message);
            }
            count += 1;
        }
        self.send_batch(&mut batch)?;
        Ok(count)
    }

    /// How many messages were handed over on this handle since it was opened: those whose `send`
    /// returned `Ok`, and those whose `send` timed out with [`Retry::MaybeExecuted`].
    #[must_use]
    pub fn handed_over(&self) -> u64 {
        self.client.lock().map_or(0, |session| session.handed_over(&self.description))
    }

    /// Waits until each message handed over on this handle has its outcome: the outcomes of those
    /// since the previous flush.
    ///
    /// A broker that shut down answers, too, if its goodbye accounts for every message.
    ///
    /// # Errors
    /// [`Error::TimedOut`]: the messages keep on their way, and the next flush tells their
    /// outcomes. [`Error::Disconnected`]: see [`Upstream::not_taken`].
    pub fn flush(&self, deadline: impl Into<Deadline>) -> Result<Outcomes, Error> {
        self.client.lock()?.flush(&self.description, deadline.into())
    }

    /// After [`Error::Disconnected`]: how many of the messages handed over the broker never took,
    /// as its goodbye tells. They are the last ones, and sending them to another broker repeats
    /// nothing.
    ///
    /// `None` when the broker went without a goodbye: what it took is then unknown. `None` over a
    /// ring: what one broker did not take, the next one does.
    #[must_use]
    pub fn not_taken(&self) -> Option<u64> {
        self.client.lock().ok()?.not_taken(&self.description)
    }

    /// After [`Error::Disconnected`]: the outcomes, since the previous flush, of the messages that
    /// the broker did take, as its goodbye tells; `None` when it went without one, and over a ring,
    /// where [`Upstream::flush`] counts them.
    #[must_use]
    pub fn goodbye(&self) -> Option<Outcomes> {
        self.client.lock().ok()?.goodbye(&self.description)
    }

    /// Sends a request and waits for its reply.
    ///
    /// ```
    /// use std::time::Duration;
    /// use poolbroker_client::Client;
    /// use poolbroker_tests::{Broker, peers::TcpEcho};
    ///
    /// let peer = TcpEcho::start();
    /// let broker = Broker::start(&[format!("echo={}", peer.url())]);
    /// let echo = Client::connect_in(broker.runtime_dir())?.upstream("echo")?;
    /// assert_eq!(echo.request(b"ping", Duration::from_secs(5))?, b"ping");
    /// # Ok::<(), poolbroker_client::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Empty`], [`Error::TooLong`], [`Error::WriteOnly`], [`Error::TooManyInFlight`]: not
    /// sent. [`Error::Failed`]: the broker's verdict, also that the deadline passed.
    /// [`Error::TimedOut`]: the broker gave none within 250 ms of the deadline; a later reply is
    /// dropped. [`Error::Disconnected`]. All tell by [`Error::retry`] whether the request may have
    /// been executed.
    pub fn request(&self, body: &[u8], deadline: impl Into<Deadline>) -> Result<Vec<u8>, Error> {
        self.check_request(body)?;
        self.client.lock()?.request(&self.description, body, deadline.into())
    }

    /// Sends a request without waiting: [`Client::next_reply`] gives its reply, by `deadline` and
    /// 250 ms at the latest. An example stands there.
    ///
    /// # Errors
    /// As [`Upstream::request`], as far as sending goes. After an error no reply comes.
    pub fn submit(
        &self,
        body: &[u8],
        deadline: impl Into<Deadline>,
    ) -> Result<CorrelationId, Error> {
        self.check_request(body)?;
        self.client.lock()?.submit(&self.description, body, deadline.into())
    }

    /// Borrows one connection of the upstream, until `deadline` at the longest, where the broker's
    /// configuration allows it (`lease = true`). Waits for one no longer than that, either.
    ///
    /// ```
    /// use std::io::{Read, Write};
    /// use std::time::Duration;
    /// use poolbroker_client::Client;
    /// use poolbroker_tests::{Broker, peers::TcpEcho};
    ///
    /// let peer = TcpEcho::start();
    /// let config = format!("[upstream.echo]\nurl = \"{}\"\nlease = true\n", peer.url());
    /// let broker = Broker::builder().config(&config).start();
    /// let echo = Client::connect_in(broker.runtime_dir())?.upstream("echo")?;
    ///
    /// let lease = echo.lease(Duration::from_secs(5))?;
    /// let mut stream = lease.tcp().expect("tcp upstreams lend TCP connections");
    /// let mut reply = [0; 6];
    /// if stream.write_all(b"hello\n").and_then(|()| stream.read_exact(&mut reply)).is_ok() {
    ///     assert_eq!(&reply, b"hello\n");
    ///     lease.release()?;
    /// }
    /// # Ok::<(), poolbroker_client::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Refused`]: the configuration does not allow it, none became free in time, or the
    /// upstream is down. [`Error::TimedOut`] when the broker is stopped; [`Error::Io`] when this
    /// process cannot use the socket; [`Error::Disconnected`].
    pub fn lease(&self, deadline: impl Into<Deadline>) -> Result<Lease, Error> {
        let call = || format!("lease of {:?}", self.name());
        let (id, descriptor) = self.client.lock()?.lease(&self.description, deadline.into())?;
        let (handle, protocol) = (self.description.handle, self.description.protocol);
        let lease = Lease::new(self.client.clone(), handle, id, protocol, descriptor);
        lease.map_err(|error| lease::unusable(call(), error))
    }

    /// Makes a pipe that the broker reads: each line written to it is one one-way message, without
    /// any work in this process. An unterminated last line is a message, too.
    ///
    /// ```
    /// use std::process::Command;
    /// use std::time::Duration;
    /// use poolbroker_client::Client;
    /// use poolbroker_tests::{Broker, peers::UdpSink};
    ///
    /// let peer = UdpSink::start();
    /// let broker = Broker::start(&[format!("metrics={}", peer.url_write_only())]);
    /// let metrics = Client::connect_in(broker.runtime_dir())?.upstream("metrics")?;
    ///
    /// let (writer, attached) = metrics.pipe()?;
    /// let status = Command::new("echo").arg("jobs.done:1|c").stdout(writer).status();
    /// assert!(status.is_ok_and(|status| status.success()));
    /// assert_eq!(attached.wait(Duration::from_secs(5))?.outcomes.sent, 1);
    /// # Ok::<(), poolbroker_client::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Refused`] when a quota is used up; [`Error::Io`] when no pipe can be made;
    /// [`Error::TimedOut`] after the send timeout; [`Error::Disconnected`].
    pub fn pipe(&self) -> Result<(PipeWriter, Attached), Error> {
        let (reader, writer) = io::pipe().map_err(|error| self.not_made("a pipe", error))?;
        let attached = self.attach_pipe(reader)?;
        Ok((writer, attached))
    }

    /// Lets the broker read a pipe that exists already, such as standard input: each line is one
    /// one-way message. Nobody else may read it from now on.
    ///
    /// # Errors
    /// As [`Upstream::pipe`]; [`Error::Refused`] also when it is not the read end of a pipe.
    pub fn attach_pipe(&self, reader: impl AsFd) -> Result<Attached, Error> {
        self.attach(Attachment::Pipe, reader.as_fd())
    }

    /// As [`Upstream::attach_pipe`], for a pipe that the last broker stopped reading in the middle
    /// of a line ([`Detached`](crate::Detached) then counts it as refused for
    /// [`Reason::Partial`](crate::Reason::Partial)): the rest of that line is skipped.
    ///
    /// # Errors
    /// As [`Upstream::attach_pipe`].
    pub fn resume_pipe(&self, reader: impl AsFd) -> Result<Attached, Error> {
        self.attach(Attachment::CutPipe, reader.as_fd())
    }

    /// Makes a pair of stream sockets and lets the broker serve one of them: requests in the
    /// upstream's framing go in at the other, and their replies come out in order.
    ///
    /// # Errors
    /// As [`Upstream::pipe`]; [`Error::WriteOnly`].
    pub fn socketpair(&self) -> Result<(UnixStream, Attached), Error> {
        self.check_replies()?;
        let (ours, theirs) =
            UnixStream::pair().map_err(|error| self.not_made("a socketpair", error))?;
        let attached = self.attach(Attachment::Socketpair, theirs.as_fd())?;
        Ok((ours, attached))
    }

    fn attach(
        &self,
        attachment: Attachment,
        descriptor: BorrowedFd<'_>,
    ) -> Result<Attached, Error> {
        let (session, end) =
            self.client.lock()?.attach(&self.description, attachment, descriptor)?;
        Ok(Attached::new(self.client.clone(), session, end))
    }

    fn send_batch(&self, batch: &mut Batch) -> Result<(), Error> {
        if batch.is_empty() {
            return Ok(());
        }
        self.client.lock()?.send_batch(&self.description, batch)?;
        batch.clear();
        Ok(())
    }

    fn check_request(&self, body: &[u8]) -> Result<(), Error> {
        self.check_replies()?;
        self.check(body)
    }

    fn check_replies(&self) -> Result<(), Error> {
        match self.protocol() {
            Protocol::Tcp | Protocol::Udp => Ok(()),
            Protocol::UdpWriteOnly => Err(Error::WriteOnly { upstream: self.name().to_owned() }),
        }
    }

    fn check(&self, message: &[u8]) -> Result<(), Error> {
        let max = self.description.message_bytes_max;
        match message.len() {
            0 => Err(Error::Empty { upstream: self.name().to_owned() }),
            bytes if bytes > max => {
                Err(Error::TooLong { upstream: self.name().to_owned(), bytes, max })
            }
            _ => Ok(()),
        }
    }

    fn not_made(&self, what: &str, source: io::Error) -> Error {
        Error::Io {
            call: format!("making {what} for {:?}", self.name()),
            source,
            retry: Retry::NotSent,
        }
    }
}

impl fmt::Debug for Upstream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Upstream")
            .field("name", &self.name())
            .field("protocol", &self.protocol())
            .field("client", &self.client)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::STREAM_BYTES as BATCH_BYTES;
    use crate::fake_broker::{FakeBroker, HANDLE, MESSAGE_BYTES_MAX, Script, sent_all};
    use poolbroker_proto::frame::{HEADER_BYTES, Kind};
    use poolbroker_proto::message::{BrokerMessage, ClientMessage};
    use poolbroker_proto::reason::Reason;
    use std::sync::mpsc;
    use std::time::Duration;

    const LONG: Duration = Duration::from_secs(60);

    fn expect_send(session: &mut Script) -> Vec<u8> {
        let (header, body) = session.expect(Kind::Send);
        assert_eq!((header.upstream, header.correlation), (HANDLE, 0));
        body
    }

    fn expect_flush(session: &mut Script) -> u64 {
        let (id, upstream, message) = session.expect_control();
        assert_eq!((upstream, message), (HANDLE, ClientMessage::Flush));
        id
    }

    #[test]
    fn messages_that_cannot_be_sent_are_refused_without_sending() {
        let (broker, client, echo) = FakeBroker::serving_echo(|mut session| {
            assert_eq!(session.frame(), None);
        });
        let long = vec![0; MESSAGE_BYTES_MAX + 1];
        for (message, reason) in [(&[][..], Reason::Empty), (&long, Reason::TooLong)] {
            for refused in [
                echo.send(message).unwrap_err(),
                echo.request(message, LONG).unwrap_err(),
                echo.submit(message, LONG).unwrap_err(),
                echo.send_all([message]).unwrap_err(),
            ] {
                assert_eq!(refused.reason(), Some(reason), "{refused}");
                assert_eq!(refused.retry(), Retry::NotSent);
            }
        }
        drop((client, echo));
        broker.join();
    }

    #[test]
    fn a_write_only_upstream_takes_sends_and_nothing_that_is_answered() {
        let broker = FakeBroker::start(|mut session| {
            session.welcome(1);
            session.open(Protocol::UdpWriteOnly);
            assert_eq!(expect_send(&mut session), b"x");
            assert_eq!(session.frame(), None);
        });
        let metrics = broker.connect().upstream("metrics").unwrap();
        for refused in [
            metrics.request(b"x", LONG).unwrap_err(),
            metrics.submit(b"x", LONG).unwrap_err(),
            metrics.socketpair().unwrap_err(),
        ] {
            assert!(matches!(refused, Error::WriteOnly { .. }), "{refused}");
        }
        metrics.send(b"x").unwrap();
        drop(metrics);
        broker.join();
    }

    #[test]
    fn a_flush_tells_what_is_new_since_the_one_before() {
        let totals = |sent, dropped, in_doubt| Outcomes {
            accepted: sent + dropped,
            sent,
            dropped: vec![(Reason::Enobufs, dropped)],
            in_doubt,
            ..Outcomes::default()
        };
        let (_broker, _client, echo) = FakeBroker::serving_echo(move |mut session| {
            for (messages, totals) in [(3, totals(2, 1, 1)), (2, totals(4, 1, 2))] {
                for _ in 0..messages {
                    expect_send(&mut session);
                }
                let id = expect_flush(&mut session);
                session.tell(id, &BrokerMessage::Flushed(totals));
            }
        });
        assert_eq!(echo.send_all(["a", "b", "c"]).unwrap(), 3);
        assert_eq!(echo.flush(LONG).unwrap(), totals(2, 1, 1));
        echo.send(b"d").unwrap();
        echo.send(b"e").unwrap();
        let news = Outcomes { accepted: 2, sent: 2, in_doubt: 1, ..Outcomes::default() };
        assert_eq!(echo.flush(LONG).unwrap(), news);
    }

    #[test]
    fn batches_keep_the_order_and_the_bounds_of_messages_of_all_sizes() {
        let sizes = [1, 100, BATCH_BYTES - HEADER_BYTES, 3, BATCH_BYTES, 40_000, 40_000, 5];
        let messages = |sizes: [usize; 8]| sizes.map(|size| vec![size as u8; size]);
        let (broker, client, echo) = FakeBroker::serving_echo(move |mut session| {
            for message in messages(sizes) {
                assert!(expect_send(&mut session) == message);
            }
            assert_eq!(session.frame(), None);
        });
        assert_eq!(echo.send_all(messages(sizes)).unwrap(), 8);
        assert_eq!(echo.handed_over(), 8);
        drop((client, echo));
        broker.join();
    }

    #[test]
    fn the_messages_before_a_refused_one_are_handed_over() {
        let (broker, client, echo) = FakeBroker::serving_echo(|mut session| {
            assert_eq!(expect_send(&mut session), b"a");
            assert_eq!(expect_send(&mut session), b"b");
            assert_eq!(session.frame(), None);
        });
        let refused = echo.send_all(["a", "b", "", "c"]).unwrap_err();
        assert!(matches!(refused, Error::Empty { .. }), "{refused}");
        assert_eq!(echo.handed_over(), 2);
        drop((client, echo));
        broker.join();
    }

    #[test]
    fn a_full_socket_does_not_keep_replies_from_being_read() {
        // Each direction carries several times what a socket holds, and the broker reads no send
        // before it has written every reply.
        const COUNT: usize = 64;
        const BYTES: usize = 64 * 1024;
        let (broker, client, echo) = FakeBroker::serving_echo(|mut session| {
            let ids: Vec<_> = (0..COUNT).map(|_| session.expect_request().0).collect();
            for id in ids {
                session.reply(id, &[1; BYTES]);
            }
            for _ in 0..COUNT {
                assert_eq!(expect_send(&mut session).len(), BYTES);
            }
        });
        for _ in 0..COUNT {
            echo.submit(b"x", LONG).unwrap();
        }
        for _ in 0..COUNT {
            echo.send(&[2; BYTES]).unwrap();
        }
        for _ in 0..COUNT {
            let reply = client.next_reply(LONG).unwrap();
            assert_eq!(reply.result.unwrap().len(), BYTES);
        }
        broker.join();
    }

    #[test]
    fn a_frame_cut_short_by_the_send_timeout_is_finished_before_the_next_one() {
        let (read_now, may_read) = mpsc::channel();
        let (broker, client, echo) = FakeBroker::serving_echo(move |mut session| {
            may_read.recv().unwrap();
            assert!(expect_send(&mut session) == vec![1; MESSAGE_BYTES_MAX]);
            assert_eq!(expect_send(&mut session), b"next");
            assert_eq!(session.frame(), None);
        });
        client.set_send_timeout(Duration::ZERO);
        let torn = echo.send(&[1; MESSAGE_BYTES_MAX]).unwrap_err();
        assert!(matches!(torn, Error::TimedOut { .. }), "{torn}");
        assert_eq!(torn.retry(), Retry::MaybeExecuted);
        let unsent = echo.send(b"unsent").unwrap_err();
        assert!(matches!(unsent, Error::TimedOut { .. }), "{unsent}");
        assert_eq!(unsent.retry(), Retry::NotSent);
        assert_eq!(echo.handed_over(), 1);

        read_now.send(()).unwrap();
        client.set_send_timeout(LONG);
        echo.send(b"next").unwrap();
        assert_eq!(echo.handed_over(), 2);
        drop((client, echo));
        broker.join();
    }

    #[test]
    fn a_request_that_found_no_room_is_not_in_flight() {
        let (leave_now, may_leave) = mpsc::channel::<()>();
        let (_broker, client, echo) = FakeBroker::serving_echo(move |session| {
            let _unread = session;
            may_leave.recv().unwrap_err();
        });
        client.set_send_timeout(Duration::ZERO);
        while echo.send(&[0; 1000]).is_ok() {}
        for unsent in [echo.submit(b"x", LONG).unwrap_err(), echo.request(b"x", LONG).unwrap_err()]
        {
            assert!(matches!(unsent, Error::TimedOut { .. }), "{unsent}");
            assert_eq!(unsent.retry(), Retry::NotSent);
        }
        let nothing = client.next_reply(LONG).unwrap_err();
        assert!(matches!(nothing, Error::NothingInFlight), "{nothing}");
        drop(leave_now);
    }

    #[test]
    fn a_batch_cut_short_counts_the_whole_messages_and_the_torn_one() {
        const BYTES: usize = 30_000;
        let (read_now, may_read) = mpsc::channel();
        let (broker, client, echo) = FakeBroker::serving_echo(move |mut session| {
            let handed_over: u64 = may_read.recv().unwrap();
            for _ in 0..handed_over {
                assert_eq!(expect_send(&mut session).len(), BYTES);
            }
            assert_eq!(expect_send(&mut session), b"next");
        });
        client.set_send_timeout(Duration::ZERO);
        echo.send_all(std::iter::repeat([1; BYTES])).unwrap_err();
        assert!(echo.handed_over() > 0);
        read_now.send(echo.handed_over()).unwrap();
        client.set_send_timeout(LONG);
        echo.send(b"next").unwrap();
        broker.join();
    }

    #[test]
    fn a_goodbye_tells_how_many_messages_were_never_taken() {
        let (leave_now, may_leave) = mpsc::channel();
        let (broker, client, echo) = FakeBroker::serving_echo(move |mut session| {
            for _ in 0..3 {
                expect_send(&mut session);
            }
            may_leave.recv().unwrap();
            session.goodbye(3);
        });
        for _ in 0..5 {
            echo.send(b"x").unwrap();
        }
        let submitted = echo.submit(b"x", LONG).unwrap();
        leave_now.send(()).unwrap();
        broker.join();

        // The write meets a broken pipe while the goodbye is still unread.
        let unsent = echo.send(b"x").unwrap_err();
        assert_eq!(unsent.reason(), Some(Reason::ShuttingDown), "{unsent}");
        assert_eq!(unsent.retry(), Retry::NotSent);
        assert_eq!((echo.handed_over(), echo.not_taken()), (5, Some(2)));
        assert_eq!(echo.goodbye(), Some(sent_all(3)));
        let flush = echo.flush(LONG).unwrap_err();
        assert!(matches!(flush, Error::Disconnected { .. }), "{flush}");

        let reply = client.next_reply(LONG).unwrap();
        assert_eq!(reply.id, submitted);
        assert_eq!(reply.result.unwrap_err().retry(), Retry::MaybeExecuted);
    }

    #[test]
    fn a_goodbye_that_accounts_for_every_message_answers_the_flush() {
        let (_broker, _client, echo) = FakeBroker::serving_echo(|mut session| {
            expect_send(&mut session);
            let id = expect_flush(&mut session);
            session.tell(id, &BrokerMessage::Flushed(sent_all(1)));
            expect_send(&mut session);
            session.goodbye(2);
        });
        echo.send(b"x").unwrap();
        assert_eq!(echo.flush(LONG).unwrap(), sent_all(1));
        echo.send(b"y").unwrap();
        assert_eq!(echo.flush(LONG).unwrap(), sent_all(1));
        assert_eq!(echo.not_taken(), Some(0));
    }

    #[test]
    fn a_broker_killed_while_a_send_waits_ends_the_send() {
        let (_broker, client, echo) = FakeBroker::serving_echo(|mut session| {
            expect_send(&mut session);
        });
        client.set_send_timeout(LONG);
        let messages = std::iter::repeat([0; 1000]);
        let ended = echo.send_all(messages).unwrap_err();
        assert!(matches!(ended, Error::Disconnected { reason: None, .. }), "{ended}");
        assert_eq!(echo.not_taken(), None);
    }
}
