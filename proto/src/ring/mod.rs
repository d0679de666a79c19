//! The ring: messages between one client and the broker in shared memory, without a system call.
//!
//! A *pair* is one sealed memory region ([`Memory`]) with a [`Header`] and two rings of one
//! producer and one consumer each: the client sends into the first, the broker answers into the
//! second. A record is a frame ([`FrameHeader`] and body), aligned to 8 bytes; one that would cross
//! the end of the ring begins at its start, behind a padding record.
//!
//! ```text
//!          released          reading (private)              tail
//!   ----------|-----------------|-----------------------------|-----------------
//!    free     |  being sent     |  complete, not touched      |  being written, free
//! ```
//!
//! Positions only grow; their remainder by the capacity is the place. Each side keeps its own
//! position in private memory and only publishes it. The other side's is believed if it makes
//! sense: `tail - released <= capacity`. A header is read once, into locals that are checked and
//! used; a body is copied, and whoever needs it checked checks the copy. So the other side can break
//! its own ring ([`Corrupt`]) and nothing else.
//!
//! # Why no wake-up is lost
//!
//! Nobody is woken who did not ask: a wake-up costs more than a thousand records.
//!
//! ```text
//!   producer                                consumer
//!   P1  store tail                          C1  store bell = what to be woken for
//!       full fence                              full fence
//!   P2  load bell; ring if it is set        C2  load tail; stay awake if there is a record
//! ```
//!
//! The fences allow no outcome in which P2 misses C1 and C2 misses P1: in the one order that all
//! sequentially consistent fences have, one of the two comes first, and what was stored before it is
//! seen by the load behind the other. Waiting for room is the same with the roles changed. Whoever
//! rings clears the bell with a swap, so that it rings once. `proto/src/ring/model.rs` proves it for
//! all interleavings of small cases, and names the orderings without which it fails.

mod header;
#[cfg(not(loom))]
mod memory;
#[cfg(loom)]
#[path = "memory_model.rs"]
mod memory;
#[cfg(test)]
#[cfg(loom)]
mod model;
mod semaphore;

use std::sync::Arc;

use self::header::Layout;
pub use self::header::{BadHeader, Header, LAYOUT_VERSION};
pub use self::memory::Memory;
#[cfg(not(loom))]
pub use self::memory::{ForkMark, NotMapped};
use self::memory::{Ordering, WORD, fence};
pub use self::semaphore::Semaphore;
use crate::frame::{CONTROL_BYTES_MAX, FrameHeader, HEADER_BYTES};

/// The kind byte of a padding record, in the place where a frame header has its own.
const PADDING: u64 = 0xff << 32;

/// The other side wrote what cannot be. The ring is of no use any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the ring is corrupt: {0}")]
pub struct Corrupt(pub &'static str);

/// Why a record was not written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotWritten {
    /// There is no room now.
    #[error("the ring is full")]
    Full,
    /// A record takes at most half of the ring.
    #[error("a record of {bytes} bytes does not fit a ring of {capacity}")]
    TooLong {
        /// Bytes of the record.
        bytes: usize,
        /// Bytes of the ring.
        capacity: usize,
    },
    /// As [`Corrupt`].
    #[error(transparent)]
    Corrupt(#[from] Corrupt),
}

/// How soon the consumer is to look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Urgency {
    /// When it looks again by itself, which it does unless it sleeps.
    Relaxed,
    /// At once.
    Urgent,
}

/// What a consumer asks to be woken for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum Bell {
    /// For nothing: it is looking.
    Silent = 0,
    /// For what is urgent: it looks again by itself soon.
    Urgent = 1,
    /// For everything: it sleeps.
    Everything = 2,
}

/// The least that a ring of a session has, in bytes: half of it takes the longest control message.
pub const CAPACITY_MIN: usize = 256 * 1024;

/// The most that it has, in bytes.
pub const CAPACITY_MAX: usize = 1024 * 1024 * 1024;

const _: () = assert!(body_bytes_max(CAPACITY_MIN) >= CONTROL_BYTES_MAX);

/// The longest body that a ring of `capacity` bytes takes.
#[must_use]
pub const fn body_bytes_max(capacity: usize) -> usize {
    capacity / 2 - HEADER_BYTES
}

/// Bytes of the record of a body.
const fn record_bytes(body_bytes: usize) -> usize {
    (HEADER_BYTES + body_bytes).next_multiple_of(WORD)
}

/// The writing end of a ring.
#[derive(Debug)]
pub struct Producer {
    memory: Arc<Memory>,
    layout: Layout,
    tail: u64,
    /// The consumer's position as last seen.
    released: u64,
}

/// The reading end of a ring.
#[derive(Debug)]
pub struct Consumer {
    memory: Arc<Memory>,
    layout: Layout,
    /// The producer's position as last seen.
    tail: u64,
    position: u64,
    released: u64,
}

/// A record that was read: what its header said when it was looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record {
    /// The header of the frame.
    pub header: FrameHeader,
    /// Bytes of its body.
    pub body_bytes: usize,
    /// Bytes of the ring that it takes, with the padding before it.
    pub ring_bytes: usize,
    body_at: usize,
}

/// Room for one record, until it is committed or dropped.
#[derive(Debug)]
#[must_use = "a claim that is dropped is not written"]
pub struct Claim<'a> {
    producer: &'a mut Producer,
    body_at: usize,
    body_bytes: usize,
    end: u64,
}

impl Header {
    /// The end that sends, for the client that made or keeps the pair.
    ///
    /// # Errors
    /// [`Corrupt`]: the positions make no sense.
    pub fn send_producer(&self) -> Result<Producer, Corrupt> {
        Producer::resume(Arc::clone(self.memory()), self.send_ring())
    }

    /// The end that takes what was sent, for a broker; and up to where an earlier broker has
    /// touched it.
    ///
    /// # Errors
    /// [`Corrupt`]: the positions make no sense.
    pub fn send_consumer(&self) -> Result<(Consumer, u64), Corrupt> {
        Consumer::resume(Arc::clone(self.memory()), self.send_ring())
    }

    /// The end that answers, for a broker.
    ///
    /// # Errors
    /// [`Corrupt`]: the positions make no sense.
    pub fn reply_producer(&self) -> Result<Producer, Corrupt> {
        Producer::resume(Arc::clone(self.memory()), self.reply_ring())
    }

    /// The end that takes answers, for the client.
    ///
    /// # Errors
    /// [`Corrupt`]: the positions make no sense.
    pub fn reply_consumer(&self) -> Result<Consumer, Corrupt> {
        Ok(Consumer::resume(Arc::clone(self.memory()), self.reply_ring())?.0)
    }
}

impl Producer {
    fn resume(memory: Arc<Memory>, layout: Layout) -> Result<Self, Corrupt> {
        // ORDER: acquire; what the last producer published before is seen.
        let tail = memory.word(layout.tail).load(Ordering::Acquire);
        let mut producer = Producer { memory, layout, tail, released: tail };
        if !tail.is_multiple_of(WORD as u64) {
            return Err(Corrupt("its tail is not aligned"));
        }
        producer.refresh()?;
        Ok(producer)
    }

    /// The position behind the last committed record.
    #[must_use]
    pub fn position(&self) -> u64 {
        self.tail
    }

    /// Claims room for one record.
    ///
    /// # Errors
    /// Any [`NotWritten`].
    #[inline]
    pub fn claim(
        &mut self,
        header: &FrameHeader,
        body_bytes: usize,
    ) -> Result<Claim<'_>, NotWritten> {
        let capacity = self.layout.capacity;
        let too_long = NotWritten::TooLong { bytes: body_bytes, capacity };
        if body_bytes > body_bytes_max(capacity) {
            return Err(too_long);
        }
        let record = record_bytes(body_bytes);
        let place = self.place(self.tail);
        let padding = if place + record > capacity { capacity - place } else { 0 };
        let end = self.tail.wrapping_add((padding + record) as u64);
        if end.wrapping_sub(self.released) > capacity as u64 {
            self.refresh()?;
            if end.wrapping_sub(self.released) > capacity as u64 {
                return Err(NotWritten::Full);
            }
        }
        let words = header.words(body_bytes).map_err(|_| too_long)?;
        if padding > 0 {
            self.memory.store(self.layout.records + place, [PADDING | padding as u64]);
        }
        let at = self.layout.records + if padding > 0 { 0 } else { place };
        self.memory.store(at, words);
        let body_at = at + HEADER_BYTES;
        Ok(Claim { producer: self, body_at, body_bytes, end })
    }

    /// Claims, writes and commits one record; [`Producer::publish`] makes it visible.
    ///
    /// # Errors
    /// Any [`NotWritten`].
    #[inline]
    pub fn push(&mut self, header: &FrameHeader, body: &[u8]) -> Result<(), NotWritten> {
        self.claim(header, body.len())?.commit(body);
        Ok(())
    }

    /// Makes every committed record visible. True: the consumer asked to be woken for this, and
    /// must be.
    #[must_use]
    #[inline]
    pub fn publish(&mut self, urgency: Urgency) -> bool {
        // ORDER: release; its partner is the acquire in `Consumer::refresh`. Everything written to
        // the records before is seen by who sees this position.
        self.memory.word(self.layout.tail).store(self.tail, Ordering::Release);
        // ORDER: full (P1, P2); its partner is the fence in `Consumer::arm`.
        fence(Ordering::SeqCst);
        let bell = self.memory.word(self.layout.consumer_bell);
        let wakes = |bell: u64| match urgency {
            Urgency::Relaxed => bell >= Bell::Everything as u64,
            Urgency::Urgent => bell >= Bell::Urgent as u64,
        };
        // ORDER: relaxed behind the fence; the swap makes sure that one wake-up is one. What it
        // clears may be younger and ask for less than what was seen: whoever clears it rings.
        wakes(bell.load(Ordering::Relaxed))
            && bell.swap(Bell::Silent as u64, Ordering::Relaxed) != Bell::Silent as u64
    }

    /// Says that this side waits for room; false if there is room for a body of that many bytes, and
    /// nothing to wait for. What was committed must be published before: nobody makes room of what
    /// nobody sees.
    ///
    /// # Errors
    /// [`Corrupt`].
    pub fn arm(&mut self, body_bytes: usize) -> Result<bool, Corrupt> {
        self.set_bell(1);
        // ORDER: full (C1, C2 with the roles changed); its partner is the fence in
        // `Consumer::release`.
        fence(Ordering::SeqCst);
        self.refresh()?;
        let has_room = self.has_room(body_bytes);
        if has_room {
            // At worst one wake-up comes for nothing.
            self.set_bell(0);
        }
        Ok(!has_room)
    }

    fn set_bell(&self, bell: u64) {
        // ORDER: relaxed; the fence in `arm` stands behind it.
        self.memory.word(self.layout.producer_bell).store(bell, Ordering::Relaxed);
    }

    /// Whether there is room for a body of that many bytes, as far as is known.
    fn has_room(&self, body_bytes: usize) -> bool {
        let capacity = self.layout.capacity;
        let record = record_bytes(body_bytes);
        let place = self.place(self.tail);
        let padding = if place + record > capacity { capacity - place } else { 0 };
        let end = self.tail.wrapping_add((padding + record) as u64);
        end.wrapping_sub(self.released) <= capacity as u64
    }

    /// Whether everything published was released.
    ///
    /// # Errors
    /// [`Corrupt`].
    pub fn is_drained(&mut self) -> Result<bool, Corrupt> {
        self.refresh()?;
        Ok(self.released == self.tail)
    }

    /// Up to where the consumer may have touched records: those from this position on it never saw.
    #[must_use]
    pub fn touched(&self) -> u64 {
        // ORDER: acquire; read when the consumer is gone.
        self.memory.word(self.layout.reading).load(Ordering::Acquire)
    }

    #[inline]
    fn refresh(&mut self) -> Result<(), Corrupt> {
        // ORDER: acquire; its partner is the release in `Consumer::release`. The consumer has read
        // what lay there before it is written to again.
        let released = self.memory.word(self.layout.released).load(Ordering::Acquire);
        if self.tail.wrapping_sub(released) > self.layout.capacity as u64 {
            return Err(Corrupt("more was released than was written"));
        }
        self.released = released;
        Ok(())
    }

    #[inline]
    fn place(&self, position: u64) -> usize {
        place(position, self.layout.capacity)
    }
}

impl Claim<'_> {
    /// Writes the body, of the length that was claimed, and commits the record.
    ///
    /// # Panics
    /// If the body has another length.
    #[inline]
    pub fn commit(self, body: &[u8]) {
        let Claim { producer, body_at, body_bytes, end } = self;
        assert_eq!(body.len(), body_bytes, "the body has the length that was claimed");
        producer.memory.copy_in(body_at, body);
        producer.tail = end;
    }
}

impl Consumer {
    fn resume(memory: Arc<Memory>, layout: Layout) -> Result<(Self, u64), Corrupt> {
        let read = |at| {
            // ORDER: acquire; what the last consumer did before is seen.
            memory.word(at).load(Ordering::Acquire)
        };
        let (released, reading) = (read(layout.released), read(layout.reading));
        let mut consumer =
            Consumer { layout, tail: released, position: released, released, memory };
        if !released.is_multiple_of(WORD as u64) {
            return Err(Corrupt("what was released is not aligned"));
        }
        consumer.refresh()?;
        if reading.wrapping_sub(released) > consumer.tail.wrapping_sub(released) {
            return Err(Corrupt("more was read than was written"));
        }
        Ok((consumer, reading))
    }

    /// The position behind the last record that was taken.
    #[must_use]
    pub fn position(&self) -> u64 {
        self.position
    }

    /// The position behind the last record that is complete.
    ///
    /// # Errors
    /// [`Corrupt`].
    pub fn end(&mut self) -> Result<u64, Corrupt> {
        self.refresh()?;
        Ok(self.tail)
    }

    /// The next record, if there is one that is complete. It is shown again until it is
    /// [taken](Consumer::take).
    ///
    /// # Errors
    /// [`Corrupt`].
    #[inline]
    pub fn peek(&mut self) -> Result<Option<Record>, Corrupt> {
        if self.position == self.tail {
            self.refresh()?;
            if self.position == self.tail {
                return Ok(None);
            }
        }
        let unread = self.tail.wrapping_sub(self.position) as usize;
        let mut place = place(self.position, self.layout.capacity);
        let [first] = self.memory.load(self.layout.records + place);
        let mut padding = 0;
        if first & !u64::from(u32::MAX) == PADDING {
            padding = (first & u64::from(u32::MAX)) as usize;
            // A record follows: padding alone is never published.
            if place + padding != self.layout.capacity || padding >= unread {
                return Err(Corrupt("padding does not end with the ring"));
            }
            place = 0;
        }
        let at = self.layout.records + place;
        let [first] = if padding > 0 { self.memory.load(at) } else { [first] };
        // Its end is checked before its other words are read.
        if place + HEADER_BYTES > self.layout.capacity || padding + HEADER_BYTES > unread {
            return Err(Corrupt("a record is cut off"));
        }
        let [second, third] = self.memory.load(at + WORD);
        let (header, body_bytes) = FrameHeader::from_words([first, second, third])
            .map_err(|_| Corrupt("a record does not begin with a header"))?;
        if body_bytes > body_bytes_max(self.layout.capacity) {
            return Err(Corrupt("a record is longer than half of the ring"));
        }
        let record = record_bytes(body_bytes);
        if place + record > self.layout.capacity || padding + record > unread {
            return Err(Corrupt("a record is cut off"));
        }
        Ok(Some(Record {
            header,
            body_bytes,
            ring_bytes: padding + record,
            body_at: at + HEADER_BYTES,
        }))
    }

    /// Appends a copy of the body of a peeked record to `out`. The other side may change it before
    /// and after: only the copy can be judged.
    #[inline]
    pub fn copy_body(&self, record: &Record, out: &mut Vec<u8>) {
        self.memory.copy_out(record.body_at, record.body_bytes, out);
    }

    /// Goes on behind a peeked record. Its room stays taken until it is released.
    #[inline]
    pub fn take(&mut self, record: &Record) {
        self.position = self.position.wrapping_add(record.ring_bytes as u64);
    }

    /// Says that everything taken so far may be acted upon: after a crash it was perhaps sent.
    pub fn mark_reading(&self) {
        // ORDER: release; before the system call that acts upon it.
        self.memory.word(self.layout.reading).store(self.position, Ordering::Release);
    }

    /// Gives back the room of the oldest `bytes` that were taken. True: the producer waits for room,
    /// there is enough of it, and it must be woken.
    #[must_use]
    #[inline]
    pub fn release(&mut self, bytes: usize) -> bool {
        self.released = self.released.wrapping_add(bytes as u64);
        debug_assert!(
            self.position.wrapping_sub(self.released) <= self.layout.capacity as u64,
            "only what was taken is released"
        );
        // ORDER: release; its partner is the acquire in `Producer::refresh`.
        self.memory.word(self.layout.released).store(self.released, Ordering::Release);
        // ORDER: full; its partner is the fence in `Producer::arm`.
        fence(Ordering::SeqCst);
        let bell = self.memory.word(self.layout.producer_bell);
        // ORDER: relaxed behind the fence.
        if bell.load(Ordering::Relaxed) == 0 {
            return false;
        }
        // A wake-up is to pay for many records, so it waits until half of the ring is free; in the
        // end all of it is.
        // ORDER: relaxed behind the fence; the producer that waits has stored it before its own. A
        // lie costs its own wake-up alone.
        let tail = self.memory.word(self.layout.tail).load(Ordering::Relaxed);
        let taken = tail.wrapping_sub(self.released);
        // ORDER: relaxed; the swap makes sure that one wake-up is one.
        taken <= self.layout.capacity as u64 / 2 && bell.swap(0, Ordering::Relaxed) != 0
    }

    /// Says what this side is to be woken for from now on. False: there are records, and it must
    /// not wait.
    ///
    /// # Errors
    /// [`Corrupt`].
    pub fn arm(&mut self, bell: Bell) -> Result<bool, Corrupt> {
        let word = self.memory.word(self.layout.consumer_bell);
        // ORDER: relaxed with the fence behind it (C1, C2); its partner is the fence in
        // `Producer::publish`.
        word.store(bell as u64, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        self.refresh()?;
        Ok(self.position == self.tail)
    }

    /// Whether there is a record that was not taken.
    ///
    /// # Errors
    /// [`Corrupt`].
    #[inline]
    pub fn has_records(&mut self) -> Result<bool, Corrupt> {
        if self.position == self.tail {
            self.refresh()?;
        }
        Ok(self.position != self.tail)
    }

    /// Looks at the producer's position, which makes sense if it is neither behind what was taken
    /// nor a ring ahead of what was released.
    #[inline]
    fn refresh(&mut self) -> Result<(), Corrupt> {
        // ORDER: acquire; its partner is the release in `Producer::publish`.
        let tail = self.memory.word(self.layout.tail).load(Ordering::Acquire);
        let held = self.position.wrapping_sub(self.released);
        let used = tail.wrapping_sub(self.released);
        if used > self.layout.capacity as u64 || used < held || !tail.is_multiple_of(WORD as u64) {
            return Err(Corrupt("its tail makes no sense"));
        }
        self.tail = tail;
        Ok(())
    }
}

#[inline]
fn place(position: u64, capacity: usize) -> usize {
    // The capacity is a power of two; what is kept of the position fits a usize.
    (position & (capacity as u64 - 1)) as usize
}

#[cfg(test)]
#[cfg(not(loom))]
mod hostile;
#[cfg(test)]
#[cfg(not(loom))]
mod tests;
