//! The buffers bytes pass through: received and not yet cut, accepted and not yet sent.
//!
//! Idle sessions and connections hold none: a [`ReceiveBuffer`] is taken from the [`Spares`] when
//! something is to be read and goes back when everything in it was used.

use crate::config::{RECEIVE_BYTES, SPARES_MAX};

/// Bytes received and not yet used.
#[derive(Debug)]
pub struct ReceiveBuffer {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl ReceiveBuffer {
    /// What was received and not yet used.
    pub fn unread(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    /// The same, to be changed in its place.
    pub fn unread_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.end]
    }

    /// Whether everything was used.
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Bytes of memory held.
    pub fn capacity(&self) -> usize {
        self.bytes.len()
    }

    /// Drops the first `bytes` of what is unread.
    pub fn consume(&mut self, bytes: usize) {
        self.start = (self.start + bytes).min(self.end);
        if self.is_empty() {
            (self.start, self.end) = (0, 0);
        }
    }

    /// Where to receive more. Never empty; grows by no more than was received already, so that an
    /// announced length allocates nothing.
    pub fn room(&mut self) -> &mut [u8] {
        if self.end == self.bytes.len() {
            if self.start > 0 {
                self.bytes.copy_within(self.start..self.end, 0);
                (self.start, self.end) = (0, self.end - self.start);
            } else {
                self.bytes.resize(self.bytes.len() * 2, 0);
            }
        }
        &mut self.bytes[self.end..]
    }

    /// `bytes` of the room were filled.
    pub fn fill(&mut self, bytes: usize) {
        self.end = (self.end + bytes).min(self.bytes.len());
    }
}

/// Receive buffers that nobody uses now.
#[derive(Debug, Default)]
pub struct Spares {
    idle: Vec<Vec<u8>>,
}

impl Spares {
    /// An empty buffer of [`RECEIVE_BYTES`].
    pub fn take(&mut self) -> ReceiveBuffer {
        let bytes = self.idle.pop().unwrap_or_else(|| vec![0; RECEIVE_BYTES]);
        ReceiveBuffer { bytes, start: 0, end: 0 }
    }

    /// Takes a buffer back.
    pub fn put_back(&mut self, buffer: ReceiveBuffer) {
        if self.idle.len() < SPARES_MAX && buffer.bytes.len() == RECEIVE_BYTES {
            self.idle.push(buffer.bytes);
        }
    }
}

/// The bytes of accepted one-way messages, in the order of their lane's outbox.
#[derive(Debug, Default)]
pub struct SendBuffer {
    bytes: Vec<u8>,
    start: usize,
}

impl SendBuffer {
    /// Everything not yet done with.
    pub fn unsent(&self) -> &[u8] {
        &self.bytes[self.start..]
    }

    /// Appends through `write`, which returns by how much the buffer is to grow, or leaves it.
    pub fn append<E>(
        &mut self,
        write: impl FnOnce(&mut Vec<u8>) -> Result<(), E>,
    ) -> Result<usize, E> {
        // Moving the rest to the front costs at most one copy per byte sent.
        if self.start > 0 && self.start >= self.bytes.len() - self.start {
            self.bytes.drain(..self.start);
            self.start = 0;
        }
        let before = self.bytes.len();
        write(&mut self.bytes)?;
        Ok(self.bytes.len() - before)
    }

    /// Takes back the `bytes` that were appended last.
    pub fn take_back(&mut self, bytes: usize) {
        self.bytes.truncate(self.bytes.len().saturating_sub(bytes).max(self.start));
    }

    /// Drops `bytes` from the front.
    pub fn consume(&mut self, bytes: usize) {
        self.start = (self.start + bytes).min(self.bytes.len());
        if self.start == self.bytes.len() {
            self.bytes.clear();
            self.start = 0;
        }
    }

    /// Drops `bytes` that begin `skip` bytes behind the front.
    pub fn cut(&mut self, skip: usize, bytes: usize) {
        let from = (self.start + skip).min(self.bytes.len());
        let to = (from + bytes).min(self.bytes.len());
        self.bytes.drain(from..to);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_receive_buffer_grows_only_when_full_of_unread_bytes() {
        let mut spares = Spares::default();
        let mut buffer = spares.take();
        let room = buffer.room().len();
        buffer.fill(room);
        buffer.consume(10);
        assert_eq!(buffer.room().len(), 10, "used bytes make room first");
        assert_eq!(buffer.capacity(), RECEIVE_BYTES);
        buffer.fill(10);
        buffer.room();
        assert_eq!(buffer.capacity(), 2 * RECEIVE_BYTES);
        assert_eq!(buffer.unread().len(), RECEIVE_BYTES);
    }

    #[test]
    fn a_send_buffer_keeps_order_through_consume_cut_and_refusal() {
        let mut buffer = SendBuffer::default();
        let append = |buffer: &mut SendBuffer, text: &[u8]| {
            buffer.append::<()>(|out| {
                out.extend_from_slice(text);
                Ok(())
            })
        };
        append(&mut buffer, b"one.").unwrap();
        append(&mut buffer, b"two.").unwrap();
        assert_eq!(append(&mut buffer, b"three."), Ok(6));
        buffer.consume(4);
        buffer.cut(4, 3);
        assert_eq!(buffer.unsent(), b"two.ee.");
        assert_eq!(buffer.append(|_| Err(7)), Err(7));
        append(&mut buffer, b"never").unwrap();
        buffer.take_back(5);
        append(&mut buffer, b"4").unwrap();
        assert_eq!(buffer.unsent(), b"two.ee.4");
        buffer.consume(100);
        assert_eq!(buffer.unsent(), b"");
    }
}
