//! The way to the broker and back: a socket, or a ring beside one.

use std::io;
use std::ops::ControlFlow;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use poolbroker_proto::frame::FrameHeader;
use poolbroker_proto::message::Retry;

use crate::batch::Batch;
use crate::deadline::Deadline;
use crate::inbox::Inbox;
use crate::ring_link::RingLink;
use crate::stream::FrameStream;
use crate::stream_link::StreamLink;
use crate::tally::Tallies;

/// The way to the broker and back.
pub(crate) enum Link {
    Stream(StreamLink),
    Ring(Box<RingLink>),
}

/// What is known of a session: filled while a link is read, asked by the calls.
#[derive(Default)]
pub(crate) struct Books {
    pub inbox: Inbox,
    pub tallies: Tallies,
}

/// A frame that leaves.
#[derive(Clone, Copy)]
pub(crate) struct Outgoing<'a> {
    pub header: FrameHeader,
    pub body: &'a [u8],
    /// A descriptor that goes along.
    pub descriptor: Option<BorrowedFd<'a>>,
}

/// How long a write may wait for room: until the deadline of its call, or as long as any send,
/// whichever is over first. The clock is read only if there is a wait.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Patience {
    pub deadline: Deadline,
    pub send_timeout: Duration,
}

/// Why a call stopped waiting.
pub(crate) enum Stop {
    TimedOut,
    Ended,
    Io(io::Error),
}

/// How far a write came.
pub(crate) struct Unwritten {
    /// Frames written whole.
    pub whole: usize,
    /// Whether the next one is torn: its rest leaves before anything else.
    pub torn: bool,
    pub stop: Stop,
}

/// What a write that does not wait found.
pub(crate) type Offered = ControlFlow<Stop, bool>;

impl Link {
    /// Writes one frame.
    pub fn write(
        &mut self,
        books: &mut Books,
        frame: Outgoing<'_>,
        patience: Patience,
    ) -> Result<(), Unwritten> {
        match self {
            Link::Stream(stream) => stream.write_one(&mut books.inbox, frame, patience),
            Link::Ring(ring) => ring.write(books, frame, patience).map_err(|stop| Unwritten {
                whole: 0,
                torn: false,
                stop,
            }),
        }
    }

    /// Writes the messages of a batch behind headers as this one.
    pub fn write_batch(
        &mut self,
        books: &mut Books,
        header: &FrameHeader,
        batch: &Batch,
        patience: Patience,
    ) -> Result<(), Unwritten> {
        match self {
            Link::Stream(stream) => stream.write_batch(&mut books.inbox, batch, patience),
            Link::Ring(ring) => ring.write_batch(books, header, batch, patience),
        }
    }

    /// Writes one frame if there is room for it now: whether there was.
    pub fn offer(&mut self, books: &mut Books, frame: Outgoing<'_>) -> Offered {
        match self {
            Link::Stream(stream) => stream.offer(&mut books.inbox, frame),
            Link::Ring(ring) => ring.offer(books, frame),
        }
    }

    /// The socket to the broker, by which descriptors come.
    pub fn stream(&mut self) -> &mut FrameStream {
        match self {
            Link::Stream(stream) => stream.stream(),
            Link::Ring(ring) => ring.stream(),
        }
    }

    /// Waits for news; returns also for none.
    pub fn wait(&mut self, books: &mut Books, deadline: Deadline) -> Result<(), Stop> {
        match self {
            Link::Stream(stream) => stream.wait(&mut books.inbox, false, deadline),
            Link::Ring(ring) => ring.wait(books, deadline),
        }
    }

    /// Takes the next frame that has arrived; false when there is none.
    pub fn take_frame(&mut self, books: &mut Books) -> bool {
        match self {
            Link::Stream(stream) => stream.take_frame(&mut books.inbox),
            Link::Ring(ring) => ring.take_frame(books),
        }
    }

    /// A call that took frames takes no more of them now.
    pub fn pause_reading(&mut self) {
        match self {
            Link::Stream(_) => {}
            Link::Ring(ring) => ring.release(),
        }
    }

    /// Makes the client's descriptor readable once there is a frame; true if there may be one now.
    pub fn ask_for_nudge(&mut self, books: &mut Books) -> bool {
        match self {
            Link::Stream(_) => false,
            Link::Ring(ring) => ring.ask_for_nudge(books),
        }
    }

    /// An upstream was opened: the longest message to it that goes this way, in bytes.
    pub fn opened(&mut self, handle: u16, name: &str, message_bytes_max: usize) -> usize {
        match self {
            Link::Stream(stream) => {
                stream.raise_message_bytes_max(message_bytes_max);
                message_bytes_max
            }
            Link::Ring(ring) => message_bytes_max.min(ring.opened(handle, name)),
        }
    }
}

impl Patience {
    /// From now on.
    pub fn until(self) -> Deadline {
        self.deadline.earlier(self.send_timeout.into())
    }
}

impl Unwritten {
    /// Whether a single frame may be written again.
    pub fn retry(&self) -> Retry {
        if self.torn { Retry::MaybeExecuted } else { Retry::NotSent }
    }
}
