//! The client's ends of a pair of rings: records in, records out, and the bells. Knows no socket
//! and no meaning.
//!
//! Invariants:
//! - Room of the reply ring that was taken is given back in portions, and all of it before this
//!   client waits.
//! - Nothing here waits but [`Ring::wait_for_room`] and [`Ring::wait_for_records`], and these until
//!   a moment that the caller names.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use poolbroker_proto::frame::{Frame, FrameHeader, HEADER_BYTES};
use poolbroker_proto::ring::{
    BadHeader, Bell, Consumer, Corrupt, Header, Memory, NotMapped, NotWritten, Producer, Semaphore,
    Urgency,
};

/// Which part of the reply ring is given back at once while records are being taken.
const RELEASE_FRACTION: usize = 8;

/// The client's ends of a pair of rings.
pub(crate) struct Ring {
    header: Header,
    producer: Producer,
    consumer: Consumer,
    free: Semaphore,
    filled: Semaphore,
    memory: OwnedFd,
    doorbell: OwnedFd,
    /// Bytes of the reply ring that were taken and not given back.
    unreleased: usize,
    body: Vec<u8>,
}

/// Why what a broker passed is not a pair of rings.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NotARing {
    #[error(transparent)]
    NotMapped(#[from] NotMapped),
    #[error(transparent)]
    BadHeader(#[from] BadHeader),
    #[error(transparent)]
    Corrupt(#[from] Corrupt),
}

impl Ring {
    /// Maps a fresh pair of rings of `bytes` each.
    pub fn open(memory: OwnedFd, doorbell: OwnedFd, bytes: usize) -> Result<Ring, NotARing> {
        let map = Memory::map(memory.as_fd(), Header::region_bytes(bytes))?;
        let header = Header::verify(Arc::new(map), bytes)?;
        Ok(Ring {
            producer: header.send_producer()?,
            consumer: header.reply_consumer()?,
            free: header.free(),
            filled: header.filled(),
            header,
            memory,
            doorbell,
            unreleased: 0,
            body: Vec::new(),
        })
    }

    /// Bytes of each ring.
    pub fn capacity(&self) -> usize {
        self.header.capacity()
    }

    /// The memory, to be passed to the next broker.
    pub fn memory(&self) -> BorrowedFd<'_> {
        self.memory.as_fd()
    }

    /// Rings at another broker from now on.
    pub fn set_doorbell(&mut self, doorbell: OwnedFd) {
        self.doorbell = doorbell;
    }

    /// The position behind the last record that was pushed.
    #[inline]
    pub fn position(&self) -> u64 {
        self.producer.position()
    }

    /// Up to where a broker that has ended may have seen what was pushed.
    pub fn touched(&self) -> u64 {
        self.producer.touched()
    }

    /// Messages that ended otherwise than sent, whichever broker had them.
    pub fn unsent(&self) -> u64 {
        self.header.unsent()
    }

    /// Writes one record, which [`Ring::publish`] makes visible.
    ///
    /// # Errors
    /// Any [`NotWritten`].
    #[inline]
    pub fn push(&mut self, header: &FrameHeader, body: &[u8]) -> Result<(), NotWritten> {
        self.producer.push(header, body)
    }

    /// Makes visible what was pushed. True: the broker sleeps, and the doorbell must be rung.
    #[inline]
    #[must_use]
    pub fn publish(&mut self, urgency: Urgency) -> bool {
        self.producer.publish(urgency)
    }

    /// Wakes the broker. Never blocks: the kernel refuses when the count is full, and the broker is
    /// awake then.
    pub fn ring_doorbell(&self) {
        let _ = rustix::io::write(&self.doorbell, &1u64.to_ne_bytes());
    }

    /// Takes the next record.
    ///
    /// # Errors
    /// [`Corrupt`].
    pub fn take(&mut self) -> Result<Option<Frame<'_>>, Corrupt> {
        let Some(record) = self.consumer.peek()? else {
            return Ok(None);
        };
        self.body.clear();
        self.consumer.copy_body(&record, &mut self.body);
        self.consumer.take(&record);
        self.unreleased += record.ring_bytes;
        if self.unreleased >= self.capacity() / RELEASE_FRACTION {
            self.release();
        }
        let frame_bytes = HEADER_BYTES + self.body.len();
        Ok(Some(Frame { header: record.header, body: &self.body, frame_bytes }))
    }

    /// Gives back the room of what was taken.
    #[inline]
    pub fn release(&mut self) {
        if self.unreleased > 0 {
            let bytes = std::mem::take(&mut self.unreleased);
            if self.consumer.release(bytes) {
                self.ring_doorbell();
            }
        }
    }

    /// Whether there is a record to take.
    ///
    /// # Errors
    /// [`Corrupt`].
    pub fn has_records(&mut self) -> Result<bool, Corrupt> {
        self.consumer.has_records()
    }

    /// Asks for a nudge on the socket once there is a record.
    pub fn ask_for_nudge(&self) {
        self.header.ask_for_nudge();
    }

    /// Waits for a record until `until`, or for nothing.
    ///
    /// # Errors
    /// [`Corrupt`].
    pub fn wait_for_records(&mut self, until: Instant) -> Result<(), Corrupt> {
        self.release();
        if self.consumer.arm(Bell::Everything)? {
            let _woken = self.filled.wait(Some(until));
            // Whoever looks by itself need not be woken.
            self.consumer.arm(Bell::Silent)?;
        }
        Ok(())
    }

    /// Asks for room for a body of that many bytes; false if there is some.
    ///
    /// # Errors
    /// [`Corrupt`].
    pub fn ask_for_room(&mut self, body_bytes: usize) -> Result<bool, Corrupt> {
        self.release();
        if !self.producer.arm(body_bytes)? {
            return Ok(false);
        }
        // A broker that naps would make room only after its nap.
        if self.producer.publish(Urgency::Urgent) {
            self.ring_doorbell();
        }
        Ok(true)
    }

    /// Waits until `until`, or for nothing, after the ring asked for room.
    pub fn wait_for_room(&self, until: Instant) {
        let _woken = self.free.wait(Some(until));
    }
}

impl From<NotARing> for io::Error {
    fn from(error: NotARing) -> Self {
        io::Error::new(io::ErrorKind::InvalidData, error)
    }
}
