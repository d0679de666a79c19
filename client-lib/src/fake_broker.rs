//! A broker that follows a script: a thread on a socket in a directory of its own, for the tests of
//! this crate. It speaks frames and knows no rules, so it can also break them.

use std::io::{ErrorKind, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};

use poolbroker_proto::address::Protocol;
use poolbroker_proto::fd;
use poolbroker_proto::frame::{Deframer, FrameHeader, HEADER_BYTES, Kind, VERSION, hello_version};
use poolbroker_proto::message::{
    BrokerMessage, ClientMessage, Failure, Outcomes, Retry, decode, encode,
};
use poolbroker_proto::reason::Reason;
use poolbroker_proto::runtime_dir::RuntimeDir;
use rustix::event::{PollFd, PollFlags, poll};
use tempfile::TempDir;

use crate::client::Client;
use crate::upstream::Upstream;

/// The session that [`Script::welcome`] names.
pub(crate) const SESSION: u64 = 7;

/// The handle that [`Script::open`] gives.
pub(crate) const HANDLE: u16 = 3;

/// The limit that [`Script::open`] tells.
pub(crate) const MESSAGE_BYTES_MAX: usize = 1 << 20;

/// A running script.
pub(crate) struct FakeBroker {
    dir: TempDir,
    script: JoinHandle<()>,
}

/// Where a script awaits one session after the other, as brokers do that follow each other.
pub(crate) struct Door {
    path: PathBuf,
    listener: Option<UnixListener>,
}

/// The script's side of a session it serves.
pub(crate) struct Script {
    pub socket: UnixStream,
    incoming: Vec<u8>,
    /// Descriptors that arrived, in order.
    pub descriptors: Vec<OwnedFd>,
}

impl FakeBroker {
    /// Runs `script` on the first session.
    pub fn start(script: impl FnOnce(Script) + Send + 'static) -> FakeBroker {
        FakeBroker::start_at_door(|mut door| script(door.next()))
    }

    /// Runs `script` on as many sessions as it takes.
    pub fn start_at_door(script: impl FnOnce(Door) + Send + 'static) -> FakeBroker {
        let dir = tempfile::tempdir().unwrap();
        let path = RuntimeDir::resolve(Some(dir.path())).unwrap().client_socket();
        let mut door = Door { path, listener: None };
        door.open();
        FakeBroker { dir, script: thread::spawn(move || script(door)) }
    }

    /// Runs `script` after a welcome and the opening of one TCP upstream, and gives that upstream.
    pub fn serving_echo(
        script: impl FnOnce(Script) + Send + 'static,
    ) -> (FakeBroker, Client, Upstream) {
        let broker = FakeBroker::start(move |mut session| {
            session.welcome(100);
            session.open(Protocol::Tcp);
            script(session);
        });
        let client = broker.connect();
        let upstream = client.upstream("echo").unwrap();
        (broker, client, upstream)
    }

    pub fn runtime_dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn connect(&self) -> Client {
        Client::connect_in(self.runtime_dir()).unwrap()
    }

    /// Whether the script has ended.
    pub fn is_over(&self) -> bool {
        self.script.is_finished()
    }

    /// Waits until the script has ended, and panics if it did.
    pub fn join(self) {
        self.script.join().unwrap();
    }
}

impl Door {
    /// The next session.
    pub fn next(&mut self) -> Script {
        let (socket, _) = self.listener.as_ref().unwrap().accept().unwrap();
        Script { socket, incoming: Vec::new(), descriptors: Vec::new() }
    }

    /// Lets nobody connect, as if there were no broker.
    pub fn close(&mut self) {
        self.listener = None;
        std::fs::remove_file(&self.path).unwrap();
    }

    pub fn open(&mut self) {
        self.listener = Some(UnixListener::bind(&self.path).unwrap());
    }
}

impl Script {
    /// Takes the hello and welcomes the client.
    pub fn welcome(&mut self, requests_in_flight_max: u32) {
        let (_, body) = self.expect(Kind::Hello);
        assert_eq!(hello_version(&body), Some(VERSION));
        let welcome = BrokerMessage::Welcome { session: SESSION, requests_in_flight_max };
        self.tell(0, &welcome);
    }

    /// Opens whatever the client asks for; returns what it asked.
    pub fn open(&mut self, protocol: Protocol) -> ClientMessage {
        let (id, _, message) = self.expect_control();
        let opened = BrokerMessage::Opened {
            handle: HANDLE,
            protocol,
            message_bytes_max: MESSAGE_BYTES_MAX as u64,
        };
        self.tell(id, &opened);
        message
    }

    /// The next frame, or `None` when the client has gone.
    pub fn frame(&mut self) -> Option<(FrameHeader, Vec<u8>)> {
        loop {
            let deframer = Deframer::new(MESSAGE_BYTES_MAX);
            if let Some(frame) = deframer.next_frame(&self.incoming).unwrap() {
                let (header, body, bytes) = (frame.header, frame.body.to_vec(), frame.frame_bytes);
                self.incoming.drain(..bytes);
                return Some((header, body));
            }
            if self.read() == 0 {
                return None;
            }
        }
    }

    /// The next frame, which must be of this kind.
    pub fn expect(&mut self, kind: Kind) -> (FrameHeader, Vec<u8>) {
        let (header, body) = self.frame().expect("the client has gone");
        assert_eq!(header.kind, kind);
        (header, body)
    }

    /// The next frame, which must be a control message: correlation id, handle, message.
    pub fn expect_control(&mut self) -> (u64, u16, ClientMessage) {
        let (header, body) = self.expect(Kind::Control);
        assert_ne!(header.correlation, 0);
        (header.correlation, header.upstream, decode(&body).unwrap())
    }

    /// The next frame, which must be a request: correlation id and body.
    pub fn expect_request(&mut self) -> (u64, Vec<u8>) {
        let (header, body) = self.expect(Kind::Request);
        assert_eq!(header.upstream, HANDLE);
        (header.correlation, body)
    }

    /// The correlation id of the next frame, of which no more is read than its beginning.
    pub fn expect_beginning_of_request(&mut self) -> u64 {
        while self.incoming.len() < HEADER_BYTES {
            assert_ne!(self.read(), 0, "the client has gone");
        }
        let mut header = self.incoming[..HEADER_BYTES].to_vec();
        header[..4].fill(0);
        let frame = Deframer::new(0).next_frame(&header).unwrap().unwrap();
        assert_eq!(frame.header.kind, Kind::Request);
        frame.header.correlation
    }

    pub fn tell(&mut self, id: u64, message: &BrokerMessage) {
        self.write(&frame(Kind::Control, id, &encode(message).unwrap()));
    }

    /// Tells several things in one write, so that one read can give them all.
    pub fn tell_together(&mut self, messages: &[(u64, BrokerMessage)]) {
        let frames = messages
            .iter()
            .flat_map(|(id, message)| frame(Kind::Control, *id, &encode(message).unwrap()));
        self.write(&frames.collect::<Vec<_>>());
    }

    pub fn reply(&mut self, id: u64, body: &[u8]) {
        self.write(&frame(Kind::Reply, id, body));
    }

    pub fn fail(&mut self, id: u64, reason: Reason, retry: Retry) {
        let failure = Failure { reason, retry, text: "as the script says".into() };
        self.write(&frame(Kind::Failure, id, &encode(&failure).unwrap()));
    }

    /// Says goodbye, having taken and sent this many messages.
    pub fn goodbye(&mut self, sent: u64) {
        let goodbye = BrokerMessage::Goodbye {
            reason: Reason::ShuttingDown,
            upstreams: vec![(HANDLE, sent_all(sent))],
        };
        self.tell(0, &goodbye);
    }

    pub fn read(&mut self) -> usize {
        poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], None).unwrap();
        let mut buffer = [0; 4096];
        let received = match fd::receive(&self.socket, &mut buffer) {
            // The client left without reading everything.
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return 0,
            received => received.unwrap(),
        };
        self.incoming.extend(&buffer[..received.bytes]);
        self.descriptors.extend(received.descriptors);
        received.bytes
    }

    pub fn write(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).unwrap();
    }
}

fn frame(kind: Kind, id: u64, body: &[u8]) -> Vec<u8> {
    let mut header = FrameHeader::new(kind);
    header.correlation = id;
    let mut bytes = Vec::new();
    header.append(body, &mut bytes).unwrap();
    bytes
}

/// The totals of `count` messages that were all sent.
pub(crate) fn sent_all(count: u64) -> Outcomes {
    Outcomes { accepted: count, sent: count, ..Outcomes::default() }
}
