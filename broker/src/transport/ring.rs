//! A client's pair of rings: the medium of a session beside its socket.
//!
//! The ring itself lies in `poolbroker_proto::ring`; here is what the broker adds. It is woken by an
//! eventfd that it never reads or writes, since a client could make either block (E6), and wakes the
//! client by its semaphores, which cannot. Records stay in the ring until their messages have
//! outcomes ([`Window`]), so that the next broker finds them if this one dies.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use poolbroker_proto::frame::{Deframer, Frame};
use poolbroker_proto::ring::{
    Bell, Consumer, Corrupt, Header, Memory, NotWritten, Producer, Record, Semaphore, Urgency,
    body_bytes_max,
};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::fstat;
use rustix::io::Errno;

use super::unix::Flushed;
use crate::window::Window;

/// What tells two rings apart: the device and number of the file that holds them.
pub type FileId = (u64, u64);

/// A pair of rings. See the module's text.
#[derive(Debug)]
pub struct Ring {
    header: Header,
    consumer: Consumer,
    producer: Producer,
    free: Semaphore,
    filled: Semaphore,
    doorbell: OwnedFd,
    bell: Bell,
    file: FileId,
    /// Records before this position may have been sent by an earlier broker.
    touched: u64,
    /// Nothing behind this position is taken.
    end: Option<u64>,
    window: Window,
}

/// Why there is no ring.
#[derive(Debug, thiserror::Error)]
pub enum NoRing {
    /// It is not one, or none of this release.
    #[error("{0}")]
    Bad(String),
    /// The kernel refuses.
    #[error("the kernel refuses: {0}")]
    Kernel(#[from] std::io::Error),
}

impl Ring {
    /// Makes a pair of rings of `capacity` bytes each; the descriptor of the memory is for the
    /// client.
    pub fn create(capacity: usize) -> Result<(Ring, OwnedFd), NoRing> {
        let (memory, fd) = Memory::create(Header::region_bytes(capacity))?;
        let header = Header::write(Arc::new(memory), capacity);
        Ok((Ring::over(header, fd.as_fd())?, fd))
    }

    /// Takes over the pair of rings of a client whose broker is gone, after a look at everything
    /// that could be wrong with it (M2).
    pub fn resume(fd: BorrowedFd<'_>, capacity: usize) -> Result<Ring, NoRing> {
        let memory = Memory::map(fd, Header::region_bytes(capacity))
            .map_err(|problem| NoRing::Bad(problem.to_string()))?;
        let header = Header::verify(Arc::new(memory), capacity)
            .map_err(|problem| NoRing::Bad(problem.to_string()))?;
        Ring::over(header, fd)
    }

    fn over(header: Header, fd: BorrowedFd<'_>) -> Result<Ring, NoRing> {
        let corrupt = |problem: Corrupt| NoRing::Bad(problem.to_string());
        let (consumer, touched) = header.send_consumer().map_err(corrupt)?;
        let producer = header.reply_producer().map_err(corrupt)?;
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let doorbell = eventfd(0, flags).map_err(std::io::Error::from)?;
        let stat = fstat(fd).map_err(std::io::Error::from)?;
        header.advance_epoch();
        Ok(Ring {
            free: header.free(),
            filled: header.filled(),
            consumer,
            producer,
            header,
            doorbell,
            bell: Bell::Silent,
            file: (stat.st_dev, stat.st_ino),
            touched,
            end: None,
            window: Window::default(),
        })
    }

    /// The eventfd by which the client wakes the broker.
    pub fn doorbell(&self) -> &OwnedFd {
        &self.doorbell
    }

    /// Which file it is.
    pub fn file(&self) -> FileId {
        self.file
    }

    /// How often it was attached.
    pub fn epoch(&self) -> u64 {
        self.header.epoch()
    }

    /// Bytes of each of the two.
    pub fn capacity(&self) -> usize {
        self.header.capacity()
    }

    /// The longest body that it takes.
    pub fn body_bytes_max(&self) -> usize {
        body_bytes_max(self.capacity())
    }

    /// What was taken and has no outcome.
    pub fn window(&self) -> &Window {
        &self.window
    }

    // From the client.

    /// The next record, unless what comes now is not to be taken any more.
    pub fn peek(&mut self) -> Result<Option<Record>, Corrupt> {
        if self.end == Some(self.consumer.position()) {
            return Ok(None);
        }
        self.consumer.peek()
    }

    /// Whether [`Ring::peek`] would find something.
    pub fn has_records(&mut self) -> Result<bool, Corrupt> {
        Ok(self.end != Some(self.consumer.position()) && self.consumer.has_records()?)
    }

    /// Nothing is taken any more that is not complete now.
    pub fn end_here(&mut self) -> Result<(), Corrupt> {
        if self.end.is_none() {
            self.end = Some(self.consumer.end()?);
        }
        Ok(())
    }

    /// Whether an earlier broker may have sent the record that is peeked.
    pub fn is_touched(&self) -> bool {
        self.touched.wrapping_sub(self.consumer.position()) as i64 > 0
    }

    /// Appends a copy of a record's body to `out`.
    pub fn copy_body(&self, record: &Record, out: &mut Vec<u8>) {
        self.consumer.copy_body(record, out);
    }

    /// The peeked record was handed to an upstream; it stays until its message has an outcome.
    pub fn take(&mut self, record: &Record, upstream: usize) {
        self.consumer.take(record);
        self.window.take(upstream, record.ring_bytes);
    }

    /// The peeked record needs nothing more. `is_unsent`: it was a message that never got in.
    pub fn take_settled(&mut self, record: &Record, is_unsent: bool) {
        self.consumer.take(record);
        self.consumer.mark_reading();
        self.header.add_unsent(u64::from(is_unsent));
        let bytes = self.window.take_settled(record.ring_bytes);
        self.release(bytes);
    }

    /// Everything taken so far may be acted upon from now on.
    pub fn mark_reading(&self) {
        self.consumer.mark_reading();
    }

    /// The oldest `messages` to `upstream` have their outcome; `is_unsent`: another one than sent.
    pub fn settle(&mut self, upstream: usize, messages: u64, is_unsent: bool) {
        if is_unsent {
            self.header.add_unsent(messages);
        }
        let bytes = self.window.settle(upstream, messages);
        self.release(bytes);
    }

    fn release(&mut self, bytes: usize) {
        if bytes > 0 && self.consumer.release(bytes) {
            self.free.post();
        }
    }

    // To the client.

    /// Writes the frames of `out` from `written` on, as far as there is room.
    pub fn flush(&mut self, out: &[u8], written: &mut usize) -> Result<Flushed, Corrupt> {
        if out.is_empty() {
            return Ok(Flushed::All);
        }
        let deframer = Deframer::new(usize::MAX);
        let mut flushed = Flushed::All;
        while let Ok(Some(Frame { header, body, frame_bytes })) =
            deframer.next_frame(&out[*written..])
        {
            match self.producer.push(&header, body) {
                Ok(()) => *written += frame_bytes,
                Err(NotWritten::Full) if self.producer.arm(body.len())? => {
                    flushed = Flushed::WouldBlock;
                    break;
                }
                Err(NotWritten::Full) => {}
                Err(NotWritten::Corrupt(corrupt)) => return Err(corrupt),
                Err(NotWritten::TooLong { .. }) => {
                    // `can_take` refuses such replies, and control messages are shorter.
                    tracing::error!("a frame of {frame_bytes} bytes is too long for a ring");
                    *written += frame_bytes;
                }
            }
        }
        if self.producer.publish(Urgency::Relaxed) {
            self.filled.post();
        }
        Ok(flushed)
    }

    /// Whether the client asks to be told on its socket that there are replies.
    pub fn take_nudge(&self) -> bool {
        self.header.take_nudge()
    }

    // Waiting.

    /// The doorbell rang: whoever rang it has taken the bell down.
    pub fn handle_doorbell(&mut self) {
        self.bell = Bell::Silent;
    }

    /// Makes sure that the doorbell rings for `bell`; false if there is something to take already.
    pub fn arm(&mut self, bell: Bell) -> Result<bool, Corrupt> {
        if self.bell == bell {
            return Ok(true);
        }
        self.bell = bell;
        self.consumer.arm(bell)
    }
}

impl AsFd for Ring {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.doorbell.as_fd()
    }
}

impl From<Errno> for NoRing {
    fn from(error: Errno) -> Self {
        NoRing::Kernel(error.into())
    }
}
