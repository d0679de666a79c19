//! A session with a broker: connecting, opening upstreams, replies of submitted requests.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::Duration;

use poolbroker_proto::address::{UpstreamUrl, check_upstream_name};
use poolbroker_proto::message::{ClientMessage, Retry};
use poolbroker_proto::ring::ForkMark;
use poolbroker_proto::runtime_dir::RuntimeDir;

use crate::deadline::Deadline;
use crate::dial::dial;
use crate::error::Error;
use crate::reply::Reply;
use crate::ring_link::RingLink;
use crate::session::Session;
use crate::transport::Transport;
use crate::upstream::Upstream;

/// How long connecting and the handshake may take together. A broker answers within one turn of its
/// loop; one that takes seconds is stopped.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A session with a broker. Clones share it; it ends when the last clone and the last [`Upstream`]
/// and [`Attached`](crate::Attached) of it are dropped.
///
/// Threads that share a client take turns, and a call that waits holds the others up: a client per
/// thread is the fast way.
#[derive(Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

struct Inner {
    /// What a forked child finds wiped. Before the lock, which a thread may hold that only the
    /// parent has.
    fork_mark: Option<ForkMark>,
    session: Mutex<Session>,
    descriptor: Descriptor,
    id: Arc<AtomicU64>,
    transport: Transport,
}

/// What poll(2) watches.
enum Descriptor {
    Socket(Arc<UnixStream>),
    /// The sockets of one broker after the other.
    Watch(Arc<OwnedFd>),
}

impl Client {
    /// Connects to the broker of this user: in `$XDG_RUNTIME_DIR/poolbroker`, as root in
    /// `/run/poolbroker`.
    ///
    /// # Errors
    /// As [`Client::connect_in`], and [`Error::RuntimeDir`] when `XDG_RUNTIME_DIR` is not set.
    pub fn connect() -> Result<Client, Error> {
        Client::connect_with(Transport::Unix)
    }

    /// As [`Client::connect`], over this transport.
    ///
    /// A client over a ring outlives its broker: after a crash or a restart its calls look for the
    /// next one in the same directory, and what stands in the ring goes there. A request that the
    /// dead broker may have begun fails with [`Retry::MaybeExecuted`]; the others wait for the next
    /// one. Only when that refuses the ring has the session ended.
    ///
    /// In a process forked from the one that connected, every call of the client and of what was
    /// opened with it fails with [`Error::Forked`].
    ///
    /// # Errors
    /// As [`Client::connect`]; [`Error::RingTooLarge`]; [`Error::Refused`] also when the broker has
    /// no memory for the ring by its quotas; [`Error::Io`] when it cannot be mapped.
    pub fn connect_with(transport: Transport) -> Result<Client, Error> {
        Client::connect_to(&RuntimeDir::resolve(None)?, transport)
    }

    /// Connects to the broker that serves in `runtime_dir`. Takes at most 5 s.
    ///
    /// ```
    /// use poolbroker_client::Client;
    /// use poolbroker_tests::{Broker, peers::UdpSink};
    ///
    /// let peer = UdpSink::start();
    /// let broker = Broker::start(&[format!("metrics={}", peer.url_write_only())]);
    /// let client = Client::connect_in(broker.runtime_dir())?;
    /// println!("session {}", client.session());
    /// # Ok::<(), poolbroker_client::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::RuntimeDir`], [`Error::NoBroker`], [`Error::PermissionDenied`],
    /// [`Error::VersionMismatch`]; [`Error::Refused`] when the broker takes no more sessions;
    /// [`Error::TimedOut`] when it is stopped.
    pub fn connect_in(runtime_dir: impl AsRef<Path>) -> Result<Client, Error> {
        Client::connect_in_with(runtime_dir, Transport::Unix)
    }

    /// As [`Client::connect_with`], to the broker that serves in `runtime_dir`.
    ///
    /// # Errors
    /// As [`Client::connect_with`].
    pub fn connect_in_with(
        runtime_dir: impl AsRef<Path>,
        transport: Transport,
    ) -> Result<Client, Error> {
        Client::connect_to(&RuntimeDir::resolve(Some(runtime_dir.as_ref()))?, transport)
    }

    /// The id of the session, as `poolbroker status` shows it. Over a ring it changes with the
    /// broker.
    #[must_use]
    pub fn session(&self) -> u64 {
        // ORDER: relaxed; it tells of nothing but itself.
        self.inner.id.load(Ordering::Relaxed)
    }

    /// Sets how long a call waits for room in the socket to the broker or in the ring, and for the answer of the
    /// broker where the call takes no deadline. 30 s unless set.
    pub fn set_send_timeout(&self, timeout: Duration) {
        if let Ok(mut session) = self.lock() {
            session.set_send_timeout(timeout);
        }
    }

    /// Opens a configured upstream. Opening a name again costs nothing and gives the same handle.
    ///
    /// # Errors
    /// [`Error::InvalidName`]; [`Error::Refused`] when no such upstream is configured;
    /// [`Error::TimedOut`] after the send timeout; [`Error::Disconnected`].
    pub fn upstream(&self, name: &str) -> Result<Upstream, Error> {
        check_upstream_name(name).map_err(|problem| Error::InvalidName { problem })?;
        let message = ClientMessage::Open { name: name.into() };
        let description = self.lock()?.open(name, &message)?;
        Ok(Upstream::new(self.clone(), description))
    }

    /// Opens an upstream by URL, where the broker's configuration allows it (`[dynamic] allow`).
    /// Opening a URL again costs nothing and gives the same handle.
    ///
    /// # Errors
    /// [`Error::InvalidUrl`]; [`Error::Refused`] when the broker does not allow it; else as
    /// [`Client::upstream`].
    pub fn open(&self, url: &str) -> Result<Upstream, Error> {
        let url = url.parse::<UpstreamUrl>()?.to_string();
        let message = ClientMessage::OpenUrl { url: url.clone() };
        let description = self.lock()?.open(&url, &message)?;
        Ok(Upstream::new(self.clone(), description))
    }

    /// Waits for the reply to any request that was [submitted](Upstream::submit). Each request
    /// gives exactly one reply, in whatever order they arrive.
    ///
    /// ```
    /// use std::time::Duration;
    /// use poolbroker_client::Client;
    /// use poolbroker_tests::{Broker, peers::TcpEcho};
    ///
    /// let peer = TcpEcho::start();
    /// let broker = Broker::start(&[format!("echo={}", peer.url())]);
    /// let client = Client::connect_in(broker.runtime_dir())?;
    /// let echo = client.upstream("echo")?;
    ///
    /// let deadline = Duration::from_secs(5);
    /// let one = echo.submit(b"one", deadline)?;
    /// let two = echo.submit(b"two", deadline)?;
    /// for _ in 0..2 {
    ///     let reply = client.next_reply(deadline)?;
    ///     let expected = if reply.id == one { b"one" } else { b"two" };
    ///     assert_eq!(reply.result?, expected);
    /// }
    /// # assert_ne!(one, two);
    /// # Ok::<(), poolbroker_client::Error>(())
    /// ```
    ///
    /// # Errors
    /// The call's own: [`Error::NothingInFlight`] when no reply can come; [`Error::TimedOut`] at
    /// `deadline`; [`Error::Disconnected`] when the session has ended and every reply was taken.
    /// How a request failed stands in [`Reply::result`].
    pub fn next_reply(&self, deadline: impl Into<Deadline>) -> Result<Reply, Error> {
        self.lock()?.next_reply(deadline.into())
    }

    /// The next reply that is there already; does not wait.
    ///
    /// For an event loop of one's own: when the descriptor of the client ([`AsFd`]) is readable,
    /// and once after any other call, take replies until there is `None`. A reply can have been
    /// read together with the answer to another call, and the descriptor tells nothing of it. Wake
    /// up for the deadlines of the requests, too: they expire on this side if the broker is stuck.
    ///
    /// # Errors
    /// [`Error::Disconnected`] when the session has ended and every reply was taken.
    pub fn try_next_reply(&self) -> Result<Option<Reply>, Error> {
        self.lock()?.try_next_reply()
    }

    /// As [`Client::try_next_reply`], for a program that looks again by itself and does not wait for
    /// the descriptor: over a ring that costs no system call, and nobody has to wake it.
    ///
    /// # Errors
    /// As [`Client::try_next_reply`].
    pub fn poll_reply(&self) -> Result<Option<Reply>, Error> {
        self.lock()?.poll_reply()
    }

    /// The session, for one call.
    ///
    /// # Errors
    /// [`Error::Forked`].
    #[inline]
    pub(crate) fn lock(&self) -> Result<MutexGuard<'_, Session>, Error> {
        if self.inner.fork_mark.as_ref().is_some_and(ForkMark::is_in_child) {
            return Err(Error::Forked);
        }
        // No code of a caller runs under the lock, and no step of a session can panic half-way
        // but by a defect: better a session that may be wrong than a second panic.
        Ok(self.inner.session.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The session, unless another thread is in a call now.
    pub(crate) fn try_lock(&self) -> Option<MutexGuard<'_, Session>> {
        if self.inner.fork_mark.as_ref().is_some_and(ForkMark::is_in_child) {
            return None;
        }
        match self.inner.session.try_lock() {
            Ok(session) => Some(session),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// How this client talks to its broker.
    pub(crate) fn transport(&self) -> Transport {
        self.inner.transport
    }

    fn connect_to(runtime_dir: &RuntimeDir, transport: Transport) -> Result<Client, Error> {
        let transport = transport.rounded()?;
        let deadline = Deadline::after(CONNECT_TIMEOUT);
        let path = runtime_dir.client_socket();
        let socket = dial(&path, deadline)?;
        let inner = match transport {
            Transport::Unix => {
                let socket = Arc::new(socket);
                let (session, id) = Session::start(Arc::clone(&socket), deadline)?;
                Inner {
                    fork_mark: None,
                    session: Mutex::new(session),
                    descriptor: Descriptor::Socket(socket),
                    id: Arc::new(AtomicU64::new(id)),
                    transport,
                }
            }
            Transport::Ring { bytes } => {
                let fork_mark = ForkMark::set().map_err(|source| Error::Io {
                    call: "marking this process".to_owned(),
                    source,
                    retry: Retry::NotSent,
                })?;
                let ring = RingLink::open(socket, path, bytes, deadline)?;
                Inner {
                    fork_mark: Some(fork_mark),
                    descriptor: Descriptor::Watch(ring.watch()),
                    id: ring.id(),
                    session: Mutex::new(Session::over_ring(ring)),
                    transport,
                }
            }
        };
        Ok(Client { inner: Arc::new(inner) })
    }
}

impl AsFd for Client {
    /// What poll(2) finds readable when [`Client::try_next_reply`] may find something. It stays the
    /// same as long as the client lives. Reading from or writing to it breaks the session.
    ///
    /// Over a ring it speaks up for what arrives after a [`Client::try_next_reply`] that gave
    /// `None`, and for the end of the broker; while no broker is there it keeps silent, so call
    /// [`Client::try_next_reply`] from time to time to have the next one looked for.
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.inner.descriptor {
            Descriptor::Socket(socket) => socket.as_fd(),
            Descriptor::Watch(watch) => watch.as_fd(),
        }
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("session", &self.session()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake_broker::{FakeBroker, SESSION};
    use poolbroker_proto::address::Protocol;
    use poolbroker_proto::frame::Kind;
    use poolbroker_proto::reason::Reason;
    use std::collections::HashMap;
    use std::os::unix::net::UnixListener;

    const LONG: Duration = Duration::from_secs(60);
    const SHORT: Duration = Duration::from_millis(1);

    #[test]
    fn clients_can_be_shared_between_threads() {
        fn assert_shareable<T: Clone + Send + Sync>() {}
        assert_shareable::<Client>();
        assert_shareable::<Upstream>();
        assert_shareable::<crate::Attached>();
    }

    #[test]
    fn without_a_broker_the_error_names_the_socket() {
        let dir = tempfile::tempdir().unwrap();
        let absent = Client::connect_in(dir.path()).unwrap_err();
        assert!(matches!(&absent, Error::NoBroker { path } if path.starts_with(dir.path())));

        let runtime_dir = RuntimeDir::resolve(Some(dir.path())).unwrap();
        drop(UnixListener::bind(runtime_dir.client_socket()).unwrap());
        let dead = Client::connect_in(dir.path()).unwrap_err();
        assert!(matches!(dead, Error::NoBroker { .. }), "{dead}");
    }

    #[test]
    fn a_broker_that_accepts_nothing_ends_the_wait_for_a_connection() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("full.sock");
        let listener = UnixListener::bind(&path).unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        let mut accepted = Vec::new();
        let refused = loop {
            match dial(&path, SHORT.into()) {
                Ok(socket) => accepted.push(socket),
                Err(error) => break error,
            }
        };
        assert!(matches!(refused, Error::TimedOut { .. }), "{refused}");
        assert_eq!(refused.retry(), Retry::NotSent);
    }

    #[test]
    fn the_handshake_gives_the_session() {
        let broker = FakeBroker::start(|mut session| session.welcome(1));
        assert_eq!(broker.connect().session(), SESSION);
        broker.join();
    }

    #[test]
    fn another_version_is_told_as_such() {
        let broker = FakeBroker::start(|mut session| {
            session.expect(Kind::Hello);
            session.fail(0, Reason::VersionMismatch, Retry::NotSent);
        });
        let refused = Client::connect_in(broker.runtime_dir()).unwrap_err();
        assert!(matches!(refused, Error::VersionMismatch { .. }), "{refused}");
        assert_eq!(refused.reason(), Some(Reason::VersionMismatch));
    }

    #[test]
    fn a_refusal_is_heard_even_if_the_broker_never_read_the_hello() {
        let broker = FakeBroker::start(|mut session| {
            session.fail(0, Reason::Quota, Retry::NotSent);
        });
        let refused = Client::connect_in(broker.runtime_dir()).unwrap_err();
        assert!(matches!(refused, Error::Refused { .. }), "{refused}");
        assert_eq!(refused.reason(), Some(Reason::Quota));
    }

    #[test]
    fn a_name_opened_again_is_not_asked_for_again() {
        let broker = FakeBroker::start(|mut session| {
            session.welcome(1);
            let asked = session.open(Protocol::Udp);
            assert_eq!(asked, ClientMessage::Open { name: "dns".into() });
            assert_eq!(session.frame(), None);
        });
        let client = broker.connect();
        for _ in 0..2 {
            let dns = client.upstream("dns").unwrap();
            assert_eq!((dns.name(), dns.protocol()), ("dns", Protocol::Udp));
        }
        drop(client);
        broker.join();
    }

    #[test]
    fn what_cannot_be_an_upstream_is_refused_without_asking() {
        let broker = FakeBroker::start(|mut session| {
            session.welcome(1);
            assert_eq!(session.frame(), None);
        });
        let client = broker.connect();
        let name = client.upstream("Not A Name").unwrap_err();
        assert_eq!(name.reason(), Some(Reason::UnknownUpstream));
        let url = client.open("http://x").unwrap_err();
        assert_eq!(url.reason(), Some(Reason::InvalidUrl));
        drop(client);
        broker.join();
    }

    #[test]
    fn an_upstream_that_is_not_configured_is_refused_and_the_session_goes_on() {
        let broker = FakeBroker::start(|mut session| {
            session.welcome(1);
            let (id, _, _) = session.expect_control();
            session.fail(id, Reason::UnknownUpstream, Retry::NotSent);
            session.open(Protocol::Tcp);
        });
        let client = broker.connect();
        let refused = client.upstream("nowhere").unwrap_err();
        assert!(matches!(refused, Error::Refused { .. }), "{refused}");
        assert!(client.upstream("echo").is_ok());
    }

    #[test]
    fn each_submitted_request_gets_its_own_reply_whatever_the_order() {
        let (broker, client, echo) = FakeBroker::serving_echo(|mut session| {
            let mut requests: Vec<_> = (0..3).map(|_| session.expect_request()).collect();
            requests.rotate_left(1);
            for (id, body) in requests {
                session.reply(id, &body);
            }
            assert_eq!(session.frame(), None);
        });
        let bodies = [b"one", b"two", b"six"];
        let mut submitted: HashMap<_, _> =
            bodies.map(|body| (echo.submit(body, LONG).unwrap(), body.to_vec())).into();
        for _ in bodies {
            let reply = client.next_reply(LONG).unwrap();
            assert_eq!(Some(reply.result.unwrap()), submitted.remove(&reply.id));
        }
        let nothing = client.next_reply(LONG).unwrap_err();
        assert!(matches!(nothing, Error::NothingInFlight), "{nothing}");
        assert!(client.try_next_reply().unwrap().is_none());
        drop((client, echo));
        broker.join();
    }

    #[test]
    fn a_request_between_submitted_ones_gets_its_own_reply() {
        let (_broker, client, echo) = FakeBroker::serving_echo(|mut session| {
            for _ in 0..2 {
                let (id, body) = session.expect_request();
                session.reply(id, &body);
            }
            assert_eq!(session.frame(), None);
        });
        let submitted = echo.submit(b"submitted", LONG).unwrap();
        assert_eq!(echo.request(b"asked", LONG).unwrap(), b"asked");
        let reply = client.try_next_reply().unwrap().unwrap();
        assert_eq!(reply.id, submitted);
        assert_eq!(reply.result.unwrap(), b"submitted");
    }

    #[test]
    fn a_failed_request_carries_the_verdict_of_the_broker() {
        let (_broker, client, echo) = FakeBroker::serving_echo(|mut session| {
            for retry in [Retry::NotSent, Retry::MaybeExecuted] {
                let (id, _) = session.expect_request();
                session.fail(id, Reason::ConnectionLost, retry);
            }
        });
        let failed = echo.request(b"x", LONG).unwrap_err();
        assert_eq!(failed.retry(), Retry::NotSent);
        echo.submit(b"x", LONG).unwrap();
        let failed = client.next_reply(LONG).unwrap().result.unwrap_err();
        assert_eq!(failed.retry(), Retry::MaybeExecuted);
        assert_eq!(failed.reason(), Some(Reason::ConnectionLost));
    }

    #[test]
    fn the_late_reply_to_an_abandoned_request_is_not_taken_for_the_next_one() {
        let (_broker, _client, echo) = FakeBroker::serving_echo(|mut session| {
            let (abandoned, _) = session.expect_request();
            let (next, _) = session.expect_request();
            session.reply(abandoned, b"late");
            session.reply(next, b"in time");
        });
        let abandoned = echo.request(b"x", SHORT).unwrap_err();
        assert!(matches!(abandoned, Error::TimedOut { .. }), "{abandoned}");
        assert_eq!(abandoned.retry(), Retry::MaybeExecuted);
        assert_eq!(echo.request(b"y", LONG).unwrap(), b"in time");
    }

    #[test]
    fn a_submitted_request_expires_on_this_side_when_the_broker_is_stuck() {
        let (_broker, client, echo) = FakeBroker::serving_echo(|mut session| {
            session.expect_request();
            session.expect_request();
            assert_eq!(session.frame(), None);
        });
        let patient = echo.submit(b"patient", LONG).unwrap();
        let hasty = echo.submit(b"hasty", SHORT).unwrap();
        let expired = client.next_reply(Deadline::Never).unwrap();
        assert_eq!(expired.id, hasty);
        let error = expired.result.unwrap_err();
        assert!(matches!(error, Error::TimedOut { .. }), "{error}");
        let waiting = client.next_reply(SHORT).unwrap_err();
        assert!(matches!(waiting, Error::TimedOut { .. }), "{waiting}");
        assert_ne!(patient, hasty);
    }

    #[test]
    fn a_request_whose_deadline_is_over_is_not_sent() {
        let (broker, client, echo) = FakeBroker::serving_echo(|mut session| {
            assert_eq!(session.frame(), None);
        });
        for over in [
            echo.request(b"x", Deadline::now()).unwrap_err(),
            echo.submit(b"x", Deadline::now()).unwrap_err(),
        ] {
            assert!(matches!(over, Error::TimedOut { .. }), "{over}");
            assert_eq!(over.retry(), Retry::NotSent);
        }
        drop((client, echo));
        broker.join();
    }

    #[test]
    fn requests_in_flight_are_limited_until_their_replies_are_taken() {
        let broker = FakeBroker::start(|mut session| {
            session.welcome(1);
            session.open(Protocol::Tcp);
            while let Some((header, body)) = session.frame() {
                session.reply(header.correlation, &body);
            }
        });
        let client = broker.connect();
        let echo = client.upstream("echo").unwrap();
        echo.submit(b"x", LONG).unwrap();
        for refused in [echo.submit(b"y", LONG).unwrap_err(), echo.request(b"y", LONG).unwrap_err()]
        {
            assert!(matches!(refused, Error::TooManyInFlight { max: 1 }), "{refused}");
        }
        assert_eq!(client.next_reply(LONG).unwrap().result.unwrap(), b"x");
        assert_eq!(echo.request(b"y", LONG).unwrap(), b"y");
    }

    #[test]
    fn a_broker_that_dies_in_a_request_leaves_it_in_doubt_and_fails_every_later_call() {
        let (broker, client, echo) = FakeBroker::serving_echo(|mut session| {
            session.expect_request();
            session.expect_request();
        });
        let submitted = echo.submit(b"x", Deadline::Never).unwrap();
        let died = echo.request(b"y", Deadline::Never).unwrap_err();
        assert_eq!(died.retry(), Retry::MaybeExecuted);
        assert!(matches!(died, Error::Disconnected { reason: None, .. }), "{died}");
        broker.join();

        let reply = client.next_reply(Deadline::Never).unwrap();
        assert_eq!(reply.id, submitted);
        assert_eq!(reply.result.unwrap_err().retry(), Retry::MaybeExecuted);
        let later = [
            client.next_reply(Deadline::Never).unwrap_err(),
            client.try_next_reply().unwrap_err(),
            client.upstream("other").unwrap_err(),
            echo.send(b"x").unwrap_err(),
            echo.flush(Deadline::Never).unwrap_err(),
            echo.request(b"x", Deadline::Never).unwrap_err(),
            echo.submit(b"x", Deadline::Never).unwrap_err(),
            echo.pipe().unwrap_err(),
        ];
        for error in later {
            assert!(matches!(error, Error::Disconnected { .. }), "{error}");
        }
        assert_eq!(echo.not_taken(), None);
    }

    #[test]
    fn a_session_that_the_broker_throws_out_ends_with_its_reason() {
        let (_broker, _client, echo) = FakeBroker::serving_echo(|mut session| {
            session.expect_request();
            session.fail(0, Reason::ClientGone, Retry::NotSent);
        });
        let ended = echo.request(b"x", Deadline::Never).unwrap_err();
        assert!(matches!(ended, Error::Disconnected { .. }), "{ended}");
        assert_eq!(ended.reason(), Some(Reason::ClientGone));
        assert_eq!(ended.retry(), Retry::MaybeExecuted);
    }

    #[test]
    fn a_request_refused_before_its_body_was_read_gets_its_verdict() {
        // The broker answers as soon as it sees the beginning, so the answer arrives while this
        // side still writes.
        let (broker, client, echo) = FakeBroker::serving_echo(|mut session| {
            let id = session.expect_beginning_of_request();
            session.fail(id, Reason::Quota, Retry::NotSent);
            session.expect_request();
        });
        let body = vec![0; echo.message_bytes_max()];
        let refused = echo.request(&body, Deadline::Never).unwrap_err();
        assert_eq!(refused.reason(), Some(Reason::Quota), "{refused}");
        drop(client);
        broker.join();
    }

    #[test]
    fn an_event_loop_learns_of_replies_and_of_the_end_by_the_descriptor() {
        let (broker, client, echo) = FakeBroker::serving_echo(|mut session| {
            let (id, body) = session.expect_request();
            session.reply(id, &body);
        });
        echo.submit(b"x", LONG).unwrap();
        broker.join();
        let mut fds = [rustix::event::PollFd::new(&client, rustix::event::PollFlags::IN)];
        assert_eq!(rustix::event::poll(&mut fds, None).unwrap(), 1);
        let reply = client.try_next_reply().unwrap().unwrap();
        assert_eq!(reply.result.unwrap(), b"x");
        let ended = client.try_next_reply().unwrap_err();
        assert!(matches!(ended, Error::Disconnected { .. }), "{ended}");
    }
}
