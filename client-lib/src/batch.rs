//! Messages gathered for one write.

use poolbroker_proto::frame::HEADER_BYTES;

use crate::transport::Transport;

/// How much is gathered for the socket, in bytes: about a third of the default send buffer of a
/// Unix socket (212,992), so the broker reads one write while the next is made.
pub(crate) const STREAM_BYTES: usize = 64 * 1024;

/// How much is gathered for a ring, in bytes: what a processor keeps in its nearest cache.
const RING_BYTES: usize = 16 * 1024;

/// Messages gathered for one write: whole frames for a socket, bodies for a ring.
pub(crate) struct Batch {
    bytes: Vec<u8>,
    ends: Vec<usize>,
    max: usize,
    is_framed: bool,
}

impl Batch {
    /// An empty batch for this transport.
    pub fn new(transport: Transport) -> Self {
        let (max, is_framed) = match transport {
            Transport::Unix => (STREAM_BYTES, true),
            Transport::Ring { .. } => (RING_BYTES, false),
        };
        Batch { bytes: Vec::new(), ends: Vec::new(), max, is_framed }
    }

    /// Whether a message is too long to be gathered at all.
    pub fn is_too_small_for(&self, message: &[u8]) -> bool {
        HEADER_BYTES + message.len() >= self.max
    }

    /// Whether a message goes in now.
    pub fn has_room_for(&self, message: &[u8]) -> bool {
        self.bytes.len() + HEADER_BYTES + message.len() <= self.max
    }

    pub fn push(&mut self, header: &[u8; HEADER_BYTES], message: &[u8]) {
        if self.is_framed {
            self.bytes.extend_from_slice(header);
        }
        self.bytes.extend_from_slice(message);
        self.ends.push(self.bytes.len());
    }

    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    pub fn clear(&mut self) {
        self.bytes.clear();
        self.ends.clear();
    }

    /// All bytes, and where each message ends.
    pub fn bytes_and_ends(&self) -> (&[u8], &[usize]) {
        (&self.bytes, &self.ends)
    }

    /// The messages of a batch for a ring.
    pub fn bodies(&self) -> impl Iterator<Item = &[u8]> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        starts.zip(&self.ends).map(|(start, end)| &self.bytes[start..*end])
    }
}
