//! A client that speaks through rings as badly as a test wants: it can forge every word of them.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use poolbroker_proto::fd;
use poolbroker_proto::frame::{Deframer, FrameHeader, Kind};
use poolbroker_proto::message::{BrokerMessage, ClientMessage, Failure, Outcomes};
use poolbroker_proto::ring::{Bell, Consumer, Header, Memory, NotWritten, Producer, Urgency};

use crate::deadline::PATIENCE;
use crate::raw::{OwnedFrame, RawClient, control, frame};

const RING_ID: u64 = 90;
const OPEN_ID: u64 = 91;
const FLUSH_ID: u64 = 92;

/// Bytes of each of its rings, unless it asks for others.
pub const CAPACITY: usize = poolbroker_proto::ring::CAPACITY_MIN;

/// A session with rings. Its fields are there to be misused.
#[derive(Debug)]
pub struct RawRing {
    /// The socket beside the rings.
    pub client: RawClient,
    /// The shared memory.
    pub memory: OwnedFd,
    /// The eventfd that wakes the broker.
    pub doorbell: OwnedFd,
    /// Its header page.
    pub header: Header,
    /// The end that sends.
    pub producer: Producer,
    /// The end that takes answers.
    pub consumer: Consumer,
}

/// What the broker made of a ring that it was handed.
#[derive(Debug)]
pub enum Resumed {
    /// It goes on with it.
    Opened(RawClient, OwnedFd),
    /// It refused.
    Refused(Failure),
    /// It ended the session.
    Closed,
}

impl RawRing {
    /// Connects and asks for rings of [`CAPACITY`].
    ///
    /// # Panics
    /// When the broker gives none.
    pub fn connect(runtime_dir: &Path) -> RawRing {
        let (client, _) = RawClient::welcomed(runtime_dir);
        RawRing::open(client, CAPACITY).expect("the broker makes rings")
    }

    /// Asks for rings on a session; the broker's refusal otherwise.
    ///
    /// # Errors
    /// The failure that the broker answers.
    ///
    /// # Panics
    /// When it answers anything else.
    pub fn open(mut client: RawClient, capacity: usize) -> Result<RawRing, Failure> {
        client.send_control(RING_ID, 0, &ClientMessage::OpenRing { bytes: capacity as u64 });
        RawRing::opened(client, capacity)
    }

    /// Takes the rings that a session has asked for; the broker's refusal otherwise.
    ///
    /// # Errors
    /// The failure that the broker answers.
    ///
    /// # Panics
    /// When it answers anything else.
    pub fn opened(client: RawClient, capacity: usize) -> Result<RawRing, Failure> {
        let (frame, mut descriptors) = receive(&client).expect("the broker answers");
        if frame.header.kind == Kind::Failure {
            return Err(frame.failure());
        }
        assert!(matches!(frame.control(), BrokerMessage::RingOpened { .. }), "{frame:?}");
        let doorbell = descriptors.pop().expect("a doorbell");
        let memory = descriptors.pop().expect("memory");
        let mapped = Memory::map(memory.as_fd(), Header::region_bytes(capacity));
        let header = Header::verify(Arc::new(mapped.expect("sealed memory")), capacity);
        let header = header.expect("a header of this release");
        let producer = header.send_producer().expect("a fresh ring");
        let consumer = header.reply_consumer().expect("a fresh ring");
        Ok(RawRing { client, memory, doorbell, header, producer, consumer })
    }

    /// Hands a memory to a broker as if it were the ring of a session with an earlier one.
    ///
    /// # Panics
    /// When there is no broker.
    pub fn resume(
        runtime_dir: &Path,
        memory: impl AsFd,
        capacity: usize,
        upstreams: &[&str],
    ) -> Resumed {
        let (client, _) = RawClient::welcomed(runtime_dir);
        let upstreams = upstreams.iter().map(|name| (*name).to_owned()).collect();
        let message = ClientMessage::ResumeRing { bytes: capacity as u64, upstreams };
        let (header, body) = control(RING_ID, 0, &message);
        let _ = client.send_with(&frame(header, &body), &[memory.as_fd()]);
        match receive(&client) {
            None => Resumed::Closed,
            Some((frame, _)) if frame.header.kind == Kind::Failure => {
                Resumed::Refused(frame.failure())
            }
            Some((_, mut descriptors)) => {
                Resumed::Opened(client, descriptors.pop().expect("a doorbell"))
            }
        }
    }

    /// Goes on with the broker that serves now.
    ///
    /// # Panics
    /// When it does not take the ring.
    pub fn reattach(&mut self, runtime_dir: &Path, upstreams: &[&str]) {
        let capacity = self.header.capacity();
        match RawRing::resume(runtime_dir, &self.memory, capacity, upstreams) {
            Resumed::Opened(client, doorbell) => (self.client, self.doorbell) = (client, doorbell),
            other => panic!("the broker does not take the ring: {other:?}"),
        }
    }

    /// Opens an upstream; its handle.
    ///
    /// # Panics
    /// When the broker does not.
    pub fn open_upstream(&mut self, name: &str) -> u16 {
        let (header, body) = control(OPEN_ID, 0, &ClientMessage::Open { name: name.into() });
        self.write(header, &body);
        match self.next_frame().map(|frame| frame.control()) {
            Some(BrokerMessage::Opened { handle, .. }) => handle,
            other => panic!("{name} was not opened: {other:?}"),
        }
    }

    /// Writes a record without publishing it, once there is room.
    ///
    /// # Panics
    /// When there is none for long.
    pub fn write_unpublished(&mut self, header: FrameHeader, body: &[u8]) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.producer.push(&header, body) {
                Ok(()) => return,
                Err(NotWritten::Full) => {
                    assert!(Instant::now() < deadline, "the ring stays full");
                    self.publish();
                    std::thread::sleep(Duration::from_micros(100));
                }
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// Makes everything written visible, and rings if the broker asks for it.
    pub fn publish(&mut self) {
        if self.producer.publish(Urgency::Urgent) {
            self.ring_doorbell();
        }
    }

    /// Wakes the broker whether it asked or not.
    pub fn ring_doorbell(&self) {
        let _ = rustix::io::write(&self.doorbell, &1u64.to_ne_bytes());
    }

    /// Writes and publishes a record.
    pub fn write(&mut self, header: FrameHeader, body: &[u8]) {
        self.write_unpublished(header, body);
        self.publish();
    }

    /// Sends one one-way message.
    pub fn send(&mut self, upstream: u16, body: &[u8]) {
        self.write(FrameHeader { upstream, ..FrameHeader::new(Kind::Send) }, body);
    }

    /// Sends one request.
    pub fn send_request(&mut self, upstream: u16, correlation: u64, body: &[u8]) {
        let header = FrameHeader { kind: Kind::Request, upstream, correlation, timeout_ms: 0 };
        self.write(header, body);
    }

    /// What became of all messages to `upstream`, once each has its outcome.
    ///
    /// # Panics
    /// When the broker does not say.
    pub fn flush(&mut self, upstream: u16) -> Outcomes {
        let (header, body) = control(FLUSH_ID, upstream, &ClientMessage::Flush);
        self.write(header, &body);
        match self.next_frame().map(|frame| frame.control()) {
            Some(BrokerMessage::Flushed(outcomes)) => outcomes,
            other => panic!("the broker did not flush but said {other:?}"),
        }
    }

    /// The next record of the reply ring, waiting for it; none once the broker is gone.
    ///
    /// # Panics
    /// When nothing comes for long.
    pub fn next_frame(&mut self) -> Option<OwnedFrame> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(record) = self.consumer.peek().expect("a broker does not lie") {
                let mut body = Vec::new();
                self.consumer.copy_body(&record, &mut body);
                self.consumer.take(&record);
                if self.consumer.release(record.ring_bytes) {
                    self.ring_doorbell();
                }
                return Some(OwnedFrame { header: record.header, body });
            }
            if self.client.is_closed() && !self.consumer.has_records().unwrap_or(false) {
                return None;
            }
            assert!(Instant::now() < deadline, "no answer");
            if self.consumer.arm(Bell::Everything).expect("a broker does not lie") {
                let slice = Instant::now() + Duration::from_millis(20);
                let _ = self.header.filled().wait(Some(slice.min(deadline)));
            }
        }
    }
}

/// One frame with its descriptors; none at the end.
fn receive(client: &RawClient) -> Option<(OwnedFrame, Vec<OwnedFd>)> {
    let mut bytes = vec![0; 65_536];
    let received = loop {
        match fd::receive(client.socket(), &mut bytes) {
            Ok(received) if received.bytes == 0 => return None,
            Ok(received) => break received,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(_) => return None,
        }
    };
    let frame = Deframer::new(bytes.len()).next_frame(&bytes[..received.bytes]).ok()??;
    let frame = OwnedFrame { header: frame.header, body: frame.body.to_vec() };
    Some((frame, received.descriptors))
}
