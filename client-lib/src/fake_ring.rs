//! The ring half of the broker that follows a script: it takes and answers only what the script
//! says, and dies where the script drops it.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use poolbroker_proto::address::Protocol;
use poolbroker_proto::fd;
use poolbroker_proto::frame::{FrameHeader, HEADER_BYTES, Kind};
use poolbroker_proto::message::{
    BrokerMessage, ClientMessage, Failure, Outcomes, Retry, decode, encode,
};
use poolbroker_proto::reason::Reason;
use poolbroker_proto::ring::{Bell, CAPACITY_MIN, Consumer, Header, Memory, Producer, Urgency};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use crate::client::Client;
use crate::fake_broker::{Door, FakeBroker, HANDLE, MESSAGE_BYTES_MAX, Script};
use crate::transport::Transport;
use crate::upstream::Upstream;

/// Bytes of each ring of a test.
pub(crate) const RING_BYTES: usize = CAPACITY_MIN;

/// The broker's ends of a pair of rings.
pub(crate) struct FakeRing {
    pub script: Script,
    pub header: Header,
    pub consumer: Consumer,
    pub producer: Producer,
    pub memory: OwnedFd,
    doorbell: OwnedFd,
}

impl FakeBroker {
    /// Runs `script` after a welcome, the opening of a ring and that of a TCP upstream, and gives
    /// that upstream.
    pub fn ringing_echo(
        script: impl FnOnce(FakeRing, Door) + Send + 'static,
    ) -> (FakeBroker, Client, Upstream) {
        let broker = FakeBroker::start_at_door(|mut door| {
            let mut ring = FakeRing::open(door.next());
            ring.open_upstream();
            script(ring, door);
        });
        let client = broker.connect_by_ring().unwrap();
        let upstream = client.upstream("echo").unwrap();
        (broker, client, upstream)
    }

    pub fn connect_by_ring(&self) -> Result<Client, crate::Error> {
        Client::connect_in_with(self.runtime_dir(), Transport::Ring { bytes: RING_BYTES })
    }
}

impl FakeRing {
    /// Welcomes the client and gives it a ring.
    pub fn open(mut script: Script) -> FakeRing {
        script.welcome(100);
        let (id, _, question) = script.expect_control();
        assert_eq!(question, ClientMessage::OpenRing { bytes: RING_BYTES as u64 });
        let (map, memory) = Memory::create(Header::region_bytes(RING_BYTES)).unwrap();
        let header = Header::write(Arc::new(map), RING_BYTES);
        let mut ring = FakeRing::over(script, header, memory);
        let memory = ring.memory.try_clone().unwrap();
        ring.tell_opened(id, &[memory]);
        ring
    }

    /// Welcomes the client and takes its ring over; gives its upstreams, too.
    pub fn resume(mut script: Script) -> (FakeRing, Vec<String>) {
        script.welcome(100);
        let (id, _, question) = script.expect_control();
        let ClientMessage::ResumeRing { bytes, upstreams } = question else {
            panic!("{question:?} instead of a ring");
        };
        let bytes = usize::try_from(bytes).unwrap();
        let memory = script.descriptors.pop().unwrap();
        let map = Memory::map(memory.as_fd(), Header::region_bytes(bytes)).unwrap();
        let header = Header::verify(Arc::new(map), bytes).unwrap();
        let mut ring = FakeRing::over(script, header, memory);
        ring.tell_opened(id, &[]);
        (ring, upstreams)
    }

    fn over(script: Script, header: Header, memory: OwnedFd) -> FakeRing {
        FakeRing {
            script,
            consumer: header.send_consumer().unwrap().0,
            producer: header.reply_producer().unwrap(),
            header,
            memory,
            doorbell: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap(),
        }
    }

    fn tell_opened(&mut self, id: u64, memory: &[OwnedFd]) {
        let epoch = self.header.advance_epoch();
        let body = encode(&BrokerMessage::RingOpened { epoch }).unwrap();
        let mut bytes = Vec::new();
        header(Kind::Control, id).append(&body, &mut bytes).unwrap();
        let mut descriptors: Vec<_> = memory.iter().map(AsFd::as_fd).collect();
        descriptors.push(self.doorbell.as_fd());
        assert_eq!(fd::send(&self.script.socket, &bytes, &descriptors).unwrap(), bytes.len());
    }

    /// Opens whatever the client asks for.
    pub fn open_upstream(&mut self) {
        let (id, _, _) = self.expect_control();
        let opened = BrokerMessage::Opened {
            handle: HANDLE,
            protocol: Protocol::Tcp,
            message_bytes_max: MESSAGE_BYTES_MAX as u64,
        };
        self.tell(id, &opened);
    }

    /// Takes the next record for good, waiting for it; `None` when the client has gone.
    pub fn frame(&mut self) -> Option<(FrameHeader, Vec<u8>)> {
        let (header, body, bytes) = self.touch()?;
        self.release(bytes);
        Some((header, body))
    }

    /// Takes the next record, and marks it as touched without giving back its room.
    pub fn touch(&mut self) -> Option<(FrameHeader, Vec<u8>, usize)> {
        loop {
            if let Some(record) = self.consumer.peek().unwrap() {
                let mut body = Vec::new();
                self.consumer.copy_body(&record, &mut body);
                self.consumer.take(&record);
                self.consumer.mark_reading();
                return Some((record.header, body, record.ring_bytes));
            }
            if self.consumer.arm(Bell::Everything).unwrap() && !self.sleep() {
                return None;
            }
        }
    }

    /// Gives back the room of so many bytes.
    pub fn release(&mut self, bytes: usize) {
        if self.consumer.release(bytes) {
            self.header.free().post();
        }
    }

    /// Waits for the doorbell or the client's end; whether it was the doorbell.
    pub fn sleep(&mut self) -> bool {
        loop {
            let mut fds = [
                PollFd::new(&self.doorbell, PollFlags::IN),
                PollFd::new(&self.script.socket, PollFlags::IN),
            ];
            poll(&mut fds, None).unwrap();
            let (rung, spoken) = (!fds[0].revents().is_empty(), !fds[1].revents().is_empty());
            if rung {
                assert!(self.rings() > 0);
                return true;
            }
            if spoken && self.script.read() == 0 {
                return false;
            }
        }
    }

    /// How often the doorbell was rung since it was asked last.
    pub fn rings(&self) -> u64 {
        let mut count = [0; 8];
        match rustix::io::read(&self.doorbell, &mut count) {
            Ok(_) => u64::from_ne_bytes(count),
            Err(_) => 0,
        }
    }

    pub fn expect(&mut self, kind: Kind) -> (FrameHeader, Vec<u8>) {
        let (header, body) = self.frame().expect("the client has gone");
        assert_eq!(header.kind, kind);
        (header, body)
    }

    pub fn expect_send(&mut self) -> Vec<u8> {
        let (header, body) = self.expect(Kind::Send);
        assert_eq!((header.upstream, header.correlation), (HANDLE, 0));
        body
    }

    pub fn expect_control(&mut self) -> (u64, u16, ClientMessage) {
        let (header, body) = self.expect(Kind::Control);
        (header.correlation, header.upstream, decode(&body).unwrap())
    }

    pub fn expect_request(&mut self) -> (u64, Vec<u8>) {
        let (header, body) = self.expect(Kind::Request);
        (header.correlation, body)
    }

    /// Answers the next frame, a flush, with these totals.
    pub fn answer_flush(&mut self, totals: Outcomes) {
        let (id, upstream, message) = self.expect_control();
        assert_eq!((upstream, message), (HANDLE, ClientMessage::Flush));
        self.tell(id, &BrokerMessage::Flushed(totals));
    }

    pub fn tell(&mut self, id: u64, message: &BrokerMessage) {
        self.push(Kind::Control, id, &encode(message).unwrap());
    }

    pub fn reply(&mut self, id: u64, body: &[u8]) {
        self.push(Kind::Reply, id, body);
    }

    /// Ends the session by the socket.
    pub fn throw_out(&mut self, reason: Reason) {
        self.script.fail(0, reason, Retry::NotSent);
    }

    pub fn fail(&mut self, id: u64, reason: Reason) {
        let failure = Failure { reason, retry: Retry::NotSent, text: "by script".into() };
        self.push(Kind::Failure, id, &encode(&failure).unwrap());
    }

    pub fn goodbye(&mut self, totals: Outcomes) {
        let reason = Reason::ShuttingDown;
        let goodbye = BrokerMessage::Goodbye { reason, upstreams: vec![(HANDLE, totals)] };
        self.tell(0, &goodbye);
    }

    /// Writes into the reply ring, waiting for room, and wakes whoever asked.
    fn push(&mut self, kind: Kind, id: u64, body: &[u8]) {
        while self.producer.push(&header(kind, id), body).is_err() {
            if self.producer.arm(body.len()).unwrap() && !self.sleep() {
                return;
            }
        }
        if self.producer.publish(Urgency::Urgent) {
            self.header.filled().post();
        }
        if self.header.take_nudge() {
            let nudge = FrameHeader::new(Kind::Hello).encode(0).unwrap();
            assert_eq!(nudge.len(), HEADER_BYTES);
            self.script.write(&nudge);
        }
    }
}

fn header(kind: Kind, id: u64) -> FrameHeader {
    FrameHeader { correlation: id, ..FrameHeader::new(kind) }
}
