//! A client that speaks the protocol as badly as a test wants: any bytes, any descriptors.

use std::io::{self, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use poolbroker_proto::frame::{Deframer, FrameHeader, Kind, hello};
use poolbroker_proto::message::{
    Attachment, BrokerMessage, ClientMessage, Failure, Outcomes, decode, encode,
};
use poolbroker_proto::reason::Reason;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use crate::deadline::PATIENCE;

/// The most descriptors the kernel passes in one message (SCM_MAX_FD).
pub const DESCRIPTORS_MAX: usize = 253;

const FLUSH_ID: u64 = 78;

const ATTACH_ID: u64 = 79;

const REPLY_BYTES_MAX: usize = 64 * 1024 * 1024;

/// A connection to a broker's client socket.
#[derive(Debug)]
pub struct RawClient {
    socket: UnixStream,
    unread: Vec<u8>,
}

/// How a request ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// With its reply.
    Reply(Vec<u8>),
    /// With a failure.
    Failed(Failure),
    /// With the session: the broker closed the connection.
    Closed,
}

impl Answer {
    /// The reply.
    ///
    /// # Panics
    /// When there is none.
    pub fn reply(self) -> Vec<u8> {
        match self {
            Answer::Reply(body) => body,
            other => panic!("no reply but {other:?}"),
        }
    }

    /// Why and how the request failed.
    ///
    /// # Panics
    /// When it did not.
    pub fn failure(self) -> Failure {
        match self {
            Answer::Failed(failure) => failure,
            other => panic!("no failure but {other:?}"),
        }
    }
}

/// What the broker did with a descriptor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Attach {
    /// It reads it.
    Taken {
        /// Its id.
        session: u64,
    },
    /// It does not want it.
    Refused(Failure),
    /// It closed the session that handed it over.
    Closed,
}

/// A frame with its body, owned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwnedFrame {
    /// The fixed part.
    pub header: FrameHeader,
    /// The body.
    pub body: Vec<u8>,
}

impl OwnedFrame {
    /// The control message in it.
    ///
    /// # Panics
    /// When it is none.
    pub fn control(&self) -> BrokerMessage {
        assert_eq!(self.header.kind, Kind::Control, "{self:?}");
        decode(&self.body).expect("a control frame holds a control message")
    }

    /// The failure in it.
    ///
    /// # Panics
    /// When it is none.
    pub fn failure(&self) -> Failure {
        assert_eq!(self.header.kind, Kind::Failure, "{self:?}");
        decode(&self.body).expect("a failure frame holds a failure")
    }
}

impl RawClient {
    /// Connects, and says nothing.
    ///
    /// # Errors
    /// As connect(2).
    pub fn try_connect(runtime_dir: &Path) -> io::Result<RawClient> {
        let socket = UnixStream::connect(runtime_dir.join("broker.sock"))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.set_write_timeout(Some(PATIENCE))?;
        Ok(RawClient { socket, unread: Vec::new() })
    }

    /// Connects, and says nothing.
    ///
    /// # Panics
    /// When nobody listens.
    pub fn connect(runtime_dir: &Path) -> RawClient {
        RawClient::try_connect(runtime_dir).expect("the broker listens")
    }

    /// Connects and shakes hands; the session's id is returned beside.
    ///
    /// # Panics
    /// When the broker does not welcome it.
    pub fn welcomed(runtime_dir: &Path) -> (RawClient, u64) {
        let welcomed = RawClient::try_welcomed(runtime_dir);
        welcomed.expect("the broker says welcome")
    }

    /// Connects and shakes hands; `None` when the broker turns it away.
    pub fn try_welcomed(runtime_dir: &Path) -> Option<(RawClient, u64)> {
        let mut client = RawClient::try_connect(runtime_dir).ok()?;
        client.send_frame(FrameHeader::new(Kind::Hello), &hello());
        let answer = client.next_frame()?;
        match answer.header.kind {
            Kind::Control => match answer.control() {
                BrokerMessage::Welcome { session, .. } => Some((client, session)),
                _ => None,
            },
            _ => None,
        }
    }

    /// A second handle on the same session, for another thread to send with.
    ///
    /// # Panics
    /// When the process has no descriptor left.
    #[must_use]
    pub fn duplicate(&self) -> RawClient {
        RawClient {
            socket: self.socket.try_clone().expect("a descriptor is free"),
            unread: Vec::new(),
        }
    }

    /// The socket itself, to be passed, polled or cloned.
    pub fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Sends any bytes. What the broker has closed swallows them.
    pub fn send_bytes(&mut self, bytes: &[u8]) {
        let _ = self.socket.write_all(bytes);
    }

    /// Sends one frame.
    pub fn send_frame(&mut self, header: FrameHeader, body: &[u8]) {
        self.send_bytes(&frame(header, body));
    }

    /// Sends a control message with this correlation id, about this upstream.
    pub fn send_control(&mut self, correlation: u64, upstream: u16, message: &ClientMessage) {
        let (header, body) = control(correlation, upstream, message);
        self.send_frame(header, &body);
    }

    /// Sends bytes with these descriptors attached to the first of them.
    ///
    /// # Errors
    /// As sendmsg(2): the kernel may refuse to pass them.
    pub fn send_with(&self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<usize> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fits = control.push(SendAncillaryMessage::ScmRights(descriptors));
        assert!(fits, "at most {DESCRIPTORS_MAX} descriptors go in one message");
        let bytes = [IoSlice::new(bytes)];
        let flags = SendFlags::NOSIGNAL;
        Ok(sendmsg(self.socket.as_fd(), &bytes, &mut control, flags)?)
    }

    /// Sends one one-way message.
    pub fn send(&mut self, upstream: u16, body: &[u8]) {
        let header = FrameHeader { upstream, ..FrameHeader::new(Kind::Send) };
        self.send_frame(header, body);
    }

    /// What became of all messages to `upstream`, once each has its outcome.
    ///
    /// # Panics
    /// When the broker does not say.
    pub fn flush(&mut self, upstream: u16) -> Outcomes {
        self.send_control(FLUSH_ID, upstream, &ClientMessage::Flush);
        match self.next_frame().map(|frame| frame.control()) {
            Some(BrokerMessage::Flushed(outcomes)) => outcomes,
            other => panic!("the broker did not flush but said {other:?}"),
        }
    }

    /// Sends one request; `timeout_ms` = 0: the upstream's own limits.
    pub fn send_request(&mut self, upstream: u16, correlation: u64, timeout_ms: u32, body: &[u8]) {
        let header = FrameHeader { kind: Kind::Request, upstream, correlation, timeout_ms };
        self.send_frame(header, body);
    }

    /// The end of the next request to end, with its correlation id.
    ///
    /// # Panics
    /// When something else comes.
    pub fn next_answer(&mut self) -> (u64, Answer) {
        let Some(frame) = self.next_frame() else {
            return (0, Answer::Closed);
        };
        let answer = match frame.header.kind {
            Kind::Reply => Answer::Reply(frame.body),
            Kind::Failure => Answer::Failed(frame.failure()),
            Kind::Hello | Kind::Control | Kind::Send | Kind::Request => {
                panic!("the broker does not answer but says {frame:?}")
            }
        };
        (frame.header.correlation, answer)
    }

    /// Sends one request, with nothing else in flight, and waits for its end.
    ///
    /// # Panics
    /// When another request's answer comes.
    pub fn request(&mut self, upstream: u16, timeout_ms: u32, body: &[u8]) -> Answer {
        const CORRELATION: u64 = 77;
        self.send_request(upstream, CORRELATION, timeout_ms, body);
        let (correlation, answer) = self.next_answer();
        let own = correlation == CORRELATION || answer == Answer::Closed;
        assert!(own, "the answer to request {correlation} came: {answer:?}");
        answer
    }

    /// Opens an upstream that exists; its handle.
    ///
    /// # Panics
    /// When the broker does not open it.
    pub fn open(&mut self, name: &str) -> u16 {
        let name = name.to_owned();
        self.send_control(1, 0, &ClientMessage::Open { name });
        match self.next_frame().map(|frame| frame.control()) {
            Some(BrokerMessage::Opened { handle, .. }) => handle,
            other => panic!("the broker did not open the upstream but said {other:?}"),
        }
    }

    /// Hands a descriptor over, to be read as a session of its own; the broker's answer.
    ///
    /// # Panics
    /// When the kernel does not pass it.
    pub fn attach(&mut self, upstream: u16, attachment: Attachment, fd: BorrowedFd<'_>) -> Attach {
        let (header, body) = control(ATTACH_ID, upstream, &ClientMessage::Attach { attachment });
        let sent = self.send_with(&frame(header, &body), &[fd]);
        sent.expect("a short message with one descriptor is sent at once");
        match self.next_frame() {
            None => Attach::Closed,
            Some(frame) if frame.header.kind == Kind::Failure => Attach::Refused(frame.failure()),
            Some(frame) => match frame.control() {
                BrokerMessage::Attached { session } => Attach::Taken { session },
                BrokerMessage::Goodbye { .. } => Attach::Closed,
                other => panic!("the broker does not attach but says {other:?}"),
            },
        }
    }

    /// How the next session that this client attached ended.
    ///
    /// # Panics
    /// When something else comes.
    pub fn next_detached(&mut self) -> (u64, Reason, Outcomes) {
        match self.next_frame().map(|frame| frame.control()) {
            Some(BrokerMessage::Detached { session, reason, outcomes }) => {
                (session, reason, outcomes)
            }
            other => panic!("no session ends, the broker says {other:?}"),
        }
    }

    /// The next frame of the broker; `None` when it has closed the connection.
    ///
    /// # Panics
    /// When nothing comes, or something that is no frame.
    pub fn next_frame(&mut self) -> Option<OwnedFrame> {
        let deframer = Deframer::new(REPLY_BYTES_MAX);
        loop {
            let next = deframer.next_frame(&self.unread);
            if let Some(frame) = next.expect("the broker sends frames") {
                let owned = OwnedFrame { header: frame.header, body: frame.body.to_vec() };
                let used = frame.frame_bytes;
                self.unread.drain(..used);
                return Some(owned);
            }
            let mut chunk = [0; 4096];
            match self.socket.read(&mut chunk) {
                Ok(0) => return None,
                Ok(count) => self.unread.extend_from_slice(&chunk[..count]),
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return None,
                Err(error) => panic!("the broker neither answers nor closes: {error}"),
            }
        }
    }

    /// Reads until the broker closes the connection, and returns what it said before.
    ///
    /// # Panics
    /// When it does not close it.
    pub fn until_closed(&mut self) -> Vec<OwnedFrame> {
        std::iter::from_fn(|| self.next_frame()).collect()
    }
}

impl RawClient {
    /// Whether the broker has closed the connection, as far as it shows without reading.
    pub fn is_closed(&self) -> bool {
        let mut fds = [PollFd::new(&self.socket, PollFlags::RDHUP)];
        let looked = poll(&mut fds, Some(&Timespec::default()));
        looked.is_ok() && !fds[0].revents().is_empty()
    }
}

/// One request by a client of its own: what any other process could do right now.
pub fn ask(runtime_dir: &Path, upstream: &str, body: &[u8]) -> Answer {
    let (mut client, _) = RawClient::welcomed(runtime_dir);
    let handle = client.open(upstream);
    client.request(handle, 0, body)
}

/// The bytes of one frame.
pub fn frame(header: FrameHeader, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let appended = header.append(body, &mut bytes);
    appended.expect("a test's body has less than 4 GiB");
    bytes
}

/// Header and body of a control message.
pub fn control(correlation: u64, upstream: u16, message: &ClientMessage) -> (FrameHeader, Vec<u8>) {
    let header = FrameHeader { upstream, correlation, ..FrameHeader::new(Kind::Control) };
    let body = encode(message).expect("a test's control message is short");
    (header, body)
}
