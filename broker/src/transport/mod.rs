//! The kernel's side of sessions: the descriptors that messages come in by, behind one enum.
//! Nothing of policy, and nothing of what the bytes mean.

pub mod fifo;
pub mod pipe;
pub mod ring;
pub mod unix;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;

use self::pipe::Pipe;
use self::unix::{Stream, UnixSocket};
use crate::buffer::ReceiveBuffer;

/// What one read gave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Read {
    /// Bytes; whether the kernel may have more.
    Bytes {
        /// Whether to read again before the next event.
        more: bool,
    },
    /// Nothing now.
    Nothing,
    /// The end: nothing will come any more.
    End,
    /// The descriptor cannot be read.
    Failed(Errno),
}

impl Read {
    /// The result of a plain read into `room` bytes.
    fn of(result: Result<usize, Errno>, room: usize, buffer: &mut ReceiveBuffer) -> Read {
        match result {
            Ok(0) => Read::End,
            Ok(bytes) => {
                buffer.fill(bytes);
                Read::Bytes { more: bytes == room }
            }
            Err(Errno::AGAIN) => Read::Nothing,
            Err(Errno::INTR) => Read::Bytes { more: true },
            Err(error) => Read::Failed(error),
        }
    }

    /// Likewise from a pipe, where a read may stop between two packets (O_DIRECT, pipe(2)).
    fn of_pipe(result: Result<usize, Errno>, buffer: &mut ReceiveBuffer) -> Read {
        Read::of(result, result.unwrap_or(0), buffer)
    }
}

/// The descriptor of one source.
#[derive(Debug)]
pub enum Io {
    /// A client on the client socket.
    Unix(UnixSocket),
    /// A FIFO of the broker's own.
    Fifo(OwnedFd),
    /// The read end of a passed pipe.
    Pipe(Pipe),
    /// A passed end of a socketpair.
    Socketpair(UnixSocket),
}

impl Io {
    /// Reads what has arrived.
    pub fn read(&mut self, buffer: &mut ReceiveBuffer) -> Read {
        match self {
            Io::Unix(socket) => socket.read(buffer),
            Io::Fifo(fd) => {
                let result = rustix::io::read(&*fd, buffer.room());
                Read::of_pipe(result, buffer)
            }
            Io::Pipe(pipe) => pipe.read(buffer),
            Io::Socketpair(socket) => socket.read(buffer),
        }
    }

    /// Where replies go, if the medium carries any.
    pub fn stream_mut(&mut self) -> Option<&mut Stream> {
        match self {
            Io::Unix(socket) | Io::Socketpair(socket) => Some(&mut socket.stream),
            Io::Fifo(_) | Io::Pipe(_) => None,
        }
    }

    /// Likewise, to look at.
    pub fn stream(&self) -> Option<&Stream> {
        match self {
            Io::Unix(socket) | Io::Socketpair(socket) => Some(&socket.stream),
            Io::Fifo(_) | Io::Pipe(_) => None,
        }
    }

    /// Whether [`Io::into_closing`] closes it for certain, and nobody else has it.
    pub fn closes_at_once(&self) -> bool {
        match self {
            Io::Unix(socket) | Io::Socketpair(socket) => socket.closes_at_once(),
            Io::Fifo(_) | Io::Pipe(_) => false,
        }
    }

    /// Ends the medium for its other side at once, and gives what closing can block on: every
    /// descriptor that a client made, and the sockets that may still hold some unread. A FIFO is
    /// closed here.
    pub fn into_closing(self) -> Vec<OwnedFd> {
        match self {
            Io::Unix(socket) | Io::Socketpair(socket) => socket.into_closing(),
            Io::Fifo(_) => Vec::new(),
            Io::Pipe(pipe) => vec![pipe.into_descriptor()],
        }
    }
}

impl AsFd for Io {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Io::Unix(socket) | Io::Socketpair(socket) => socket.stream.as_fd(),
            Io::Fifo(fd) => fd.as_fd(),
            Io::Pipe(pipe) => pipe.as_fd(),
        }
    }
}
