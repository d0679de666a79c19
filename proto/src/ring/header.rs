//! The header page of a ring pair: what it is, and where everything lies.
//!
//! ```text
//!   0     magic, layout version, epoch, bytes of each ring
//!   256   send ring:   tail | released, reading | consumer's bell | producer's bell | `free`
//!   896   reply ring:  likewise, with `filled` instead of `free`
//!   1,536 the nudge | messages of the send ring that were not sent
//!   4,096 the records of the send ring, then those of the reply ring
//! ```
//!
//! What one side writes lies 128 bytes from what the other side writes: processors fetch lines of
//! 64 bytes in pairs. Fields have fixed widths, so 32-bit and 64-bit programs agree.

use std::ops::RangeInclusive;
use std::sync::Arc;

use super::CAPACITY_MAX;
use super::memory::{Memory, Ordering, WORD};
use super::semaphore::{SEMAPHORE_BYTES, Semaphore};

/// The layout that this crate speaks. Another one is refused.
pub const LAYOUT_VERSION: u64 = 1;

const MAGIC: u64 = u64::from_le_bytes(*b"PBRING\r\n");

/// What is kept apart for the sake of the processors' caches, of which a model of memory has none.
const LINE: usize = if cfg!(loom) { 2 * WORD } else { 128 };

const MAGIC_AT: usize = 0;
const VERSION_AT: usize = WORD;
const EPOCH_AT: usize = 2 * WORD;
const CAPACITY_AT: usize = 3 * WORD;

const RINGS_AT: usize = 2 * LINE;
const RING_BYTES: usize = 5 * LINE;
const NUDGE_AT: usize = RINGS_AT + 2 * RING_BYTES;
const UNSENT_AT: usize = NUDGE_AT + LINE;

/// Bytes of the header: a page, so that the records begin on one.
const HEADER_BYTES: usize = if cfg!(loom) { UNSENT_AT + LINE } else { 4096 };

/// What rings can have, in bytes: half of one takes at least the header of a frame.
const SIZES: RangeInclusive<usize> = 64..=CAPACITY_MAX;

const _: () = assert!(UNSENT_AT + LINE <= HEADER_BYTES && SEMAPHORE_BYTES <= LINE);

/// Why memory is not a ring pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadHeader {
    /// It never was one.
    #[error("it does not begin like a ring")]
    Magic,
    /// Another release made it.
    #[error("it has layout version {found}, this release speaks {LAYOUT_VERSION}")]
    Version {
        /// The version it has.
        found: u64,
    },
    /// Its rings have another size than was announced.
    #[error("its rings have {found} bytes instead of {wanted}")]
    Capacity {
        /// What was announced.
        wanted: u64,
        /// What it says.
        found: u64,
    },
}

/// Where one ring of a pair lies.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    /// Written by the producer: records before this position are complete.
    pub tail: usize,
    /// Written by the consumer: records before this position are done with.
    pub released: usize,
    /// Written by the consumer: records from this position on were never touched.
    pub reading: usize,
    /// What the consumer asks to be woken for; cleared by whoever wakes it.
    pub consumer_bell: usize,
    /// Set by the producer before it waits for room; cleared by whoever wakes it.
    pub producer_bell: usize,
    /// On which the client waits: for room in the send ring, for records in the reply ring.
    pub semaphore: usize,
    /// Where the records begin.
    pub records: usize,
    /// How many bytes they have: a power of two.
    pub capacity: usize,
}

impl Layout {
    const fn new(index: usize, capacity: usize) -> Self {
        let lines = RINGS_AT + index * RING_BYTES;
        Layout {
            tail: lines,
            released: lines + LINE,
            reading: lines + LINE + WORD,
            consumer_bell: lines + 2 * LINE,
            producer_bell: lines + 3 * LINE,
            semaphore: lines + 4 * LINE,
            records: HEADER_BYTES + index * capacity,
            capacity,
        }
    }
}

/// The shared fields of a ring pair that belong to neither ring alone.
#[derive(Debug, Clone)]
pub struct Header {
    memory: Arc<Memory>,
    capacity: usize,
}

impl Header {
    /// Bytes of a region with two rings of `capacity` bytes each.
    #[must_use]
    pub const fn region_bytes(capacity: usize) -> usize {
        HEADER_BYTES + 2 * capacity
    }

    /// Writes the header of a fresh region with two empty rings of `capacity` bytes, a power of
    /// two.
    pub fn write(memory: Arc<Memory>, capacity: usize) -> Header {
        assert!(
            capacity.is_power_of_two() && memory.bytes() == Header::region_bytes(capacity),
            "the region was made for two rings of {capacity} bytes"
        );
        let write = |at, value| {
            // ORDER: relaxed; the region reaches the other side by a message of the kernel.
            memory.word(at).store(value, Ordering::Relaxed);
        };
        write(CAPACITY_AT, capacity as u64);
        write(VERSION_AT, LAYOUT_VERSION);
        write(MAGIC_AT, MAGIC);
        Header { memory, capacity }
    }

    /// Looks at the header of a region in which two rings of `capacity` bytes are announced.
    ///
    /// # Errors
    /// Any [`BadHeader`].
    pub fn verify(memory: Arc<Memory>, capacity: usize) -> Result<Header, BadHeader> {
        let read = |at| {
            // ORDER: relaxed; the region came by a message of the kernel.
            memory.word(at).load(Ordering::Relaxed)
        };
        if read(MAGIC_AT) != MAGIC {
            return Err(BadHeader::Magic);
        }
        let found = read(VERSION_AT);
        if found != LAYOUT_VERSION {
            return Err(BadHeader::Version { found });
        }
        let (wanted, found) = (capacity as u64, read(CAPACITY_AT));
        // What was announced is as foreign as what is found: nothing is computed from it before it
        // is known to be a size.
        let is_size = capacity.is_power_of_two() && SIZES.contains(&capacity);
        if found != wanted || !is_size || memory.bytes() != Header::region_bytes(capacity) {
            return Err(BadHeader::Capacity { wanted, found });
        }
        Ok(Header { memory, capacity })
    }

    /// Bytes of each ring.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// How often the pair was attached to a broker.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        // ORDER: relaxed; it changes only while the other side waits for an answer.
        self.memory.word(EPOCH_AT).load(Ordering::Relaxed)
    }

    /// The pair was attached once more.
    pub fn advance_epoch(&self) -> u64 {
        // ORDER: relaxed; as in `epoch`.
        self.memory.word(EPOCH_AT).fetch_add(1, Ordering::Relaxed).wrapping_add(1)
    }

    /// On which a client waits for room in the send ring.
    #[must_use]
    pub fn free(&self) -> Semaphore {
        Semaphore::new(Arc::clone(&self.memory), self.send_ring().semaphore)
    }

    /// On which a client waits for records in the reply ring.
    #[must_use]
    pub fn filled(&self) -> Semaphore {
        Semaphore::new(Arc::clone(&self.memory), self.reply_ring().semaphore)
    }

    /// The client asks for a byte on its socket once there are replies: it waits by poll(2).
    pub fn ask_for_nudge(&self) {
        // ORDER: full, as the store of a bell: what was published before is seen by the look at the
        // ring that follows, or the nudge by the broker's look behind its own publishing.
        self.memory.word(NUDGE_AT).swap(1, Ordering::SeqCst);
        super::memory::fence(Ordering::SeqCst);
    }

    /// Whether the client asked for a nudge, once.
    pub fn take_nudge(&self) -> bool {
        let nudge = self.memory.word(NUDGE_AT);
        // ORDER: relaxed behind the full fence of the publishing before.
        nudge.load(Ordering::Relaxed) != 0 && nudge.swap(0, Ordering::Relaxed) != 0
    }

    /// Messages of the send ring that ended otherwise than sent, in all epochs.
    #[must_use]
    pub fn unsent(&self) -> u64 {
        // ORDER: acquire; its partner is the release in `add_unsent`.
        self.memory.word(UNSENT_AT).load(Ordering::Acquire)
    }

    /// Counts messages of the send ring that ended otherwise than sent, before they are released.
    pub fn add_unsent(&self, messages: u64) {
        // ORDER: release; the store of `released` comes after.
        self.memory.word(UNSENT_AT).fetch_add(messages, Ordering::Release);
    }

    pub(super) fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    pub(super) fn send_ring(&self) -> Layout {
        Layout::new(0, self.capacity)
    }

    pub(super) fn reply_ring(&self) -> Layout {
        Layout::new(1, self.capacity)
    }
}
