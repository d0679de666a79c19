//! A session over the socket alone: every sequence of writing, reading and waiting.
//!
//! Invariants:
//! - While a write waits for room, frames are read too: a broker that waits for this client to read
//!   its replies would otherwise never make room.
//! - Before an error of the socket is reported, everything the broker still said is read: the
//!   kernel reports the broken pipe to a writer while a goodbye stands unread in its buffer.

use std::io::ErrorKind;
use std::ops::ControlFlow;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use poolbroker_proto::frame::{FrameHeader, HEADER_BYTES};

use crate::batch::Batch;
use crate::deadline::Deadline;
use crate::inbox::{Ended, Inbox};
use crate::link::{Offered, Outgoing, Patience, Stop, Unwritten};
use crate::stream::{FrameStream, Read, is_gone};

/// The socket of a session.
pub(crate) struct StreamLink {
    stream: FrameStream,
}

/// Whole frames to be written: the bytes of `parts`, seen as one, with the end of each frame.
#[derive(Clone, Copy)]
struct Frames<'a> {
    parts: [&'a [u8]; 2],
    ends: &'a [usize],
}

impl StreamLink {
    pub fn new(socket: Arc<UnixStream>) -> Self {
        StreamLink { stream: FrameStream::new(socket) }
    }

    /// Accepts replies of up to `bytes` bytes from now on, unless longer ones are accepted already.
    pub fn raise_message_bytes_max(&mut self, bytes: usize) {
        self.stream.raise_message_bytes_max(bytes);
    }

    /// The socket.
    pub fn stream(&mut self) -> &mut FrameStream {
        &mut self.stream
    }

    /// Writes one frame.
    pub fn write_one(
        &mut self,
        inbox: &mut Inbox,
        frame: Outgoing<'_>,
        patience: Patience,
    ) -> Result<(), Unwritten> {
        let header = encode_header(&frame.header, frame.body);
        let ends = [HEADER_BYTES + frame.body.len()];
        if frame.descriptor.is_none() {
            let frames = Frames { parts: [&header, frame.body], ends: &ends };
            return self.write(inbox, frames, None, patience);
        }
        // In one piece, because a descriptor goes with one buffer.
        let bytes = [&header, frame.body].concat();
        let frames = Frames { parts: [&bytes, &[]], ends: &ends };
        self.write(inbox, frames, frame.descriptor, patience)
    }

    /// Writes the frames of a batch.
    pub fn write_batch(
        &mut self,
        inbox: &mut Inbox,
        batch: &Batch,
        patience: Patience,
    ) -> Result<(), Unwritten> {
        let (bytes, ends) = batch.bytes_and_ends();
        self.write(inbox, Frames { parts: [bytes, &[]], ends }, None, patience)
    }

    /// Writes one frame if the socket takes its beginning at least; its rest is then torn.
    pub fn offer(&mut self, inbox: &mut Inbox, frame: Outgoing<'_>) -> Offered {
        if inbox.ended().is_some() {
            return ControlFlow::Break(Stop::Ended);
        }
        let header = encode_header(&frame.header, frame.body);
        let parts = [&header, frame.body];
        match self.stream.write(parts, None) {
            Ok(written) => {
                self.stream.keep_torn(parts, written..HEADER_BYTES + frame.body.len());
                ControlFlow::Continue(true)
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => ControlFlow::Continue(false),
            Err(error) if is_gone(&error) => {
                self.hear_last_words(inbox, Deadline::now());
                ControlFlow::Break(Stop::Ended)
            }
            Err(error) => ControlFlow::Break(Stop::Io(error)),
        }
    }

    /// Waits for news, or for room too, and reads once; finishes a torn frame where there is room.
    pub fn wait(&mut self, inbox: &mut Inbox, room: bool, deadline: Deadline) -> Result<(), Stop> {
        let ready = self.stream.wait(room, deadline).map_err(Stop::Io)?;
        if !ready.readable && !ready.writable {
            return Err(Stop::TimedOut);
        }
        if ready.writable {
            match self.stream.finish_torn() {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                // What the broker still says is read all the same.
                Err(error) if is_gone(&error) => self.stream.drop_torn(),
                Err(error) => inbox.end(Ended::unusable(&error)),
            }
        }
        if ready.readable {
            match self.stream.read() {
                Ok(Read::Some | Read::Nothing) => {}
                Ok(Read::End) => inbox.end(Ended::Closed),
                Err(error) if is_gone(&error) => inbox.end(Ended::Closed),
                Err(error) => inbox.end(Ended::unusable(&error)),
            }
        }
        Ok(())
    }

    /// Takes the next frame that was read; false when there is none, or none that counts.
    pub fn take_frame(&mut self, inbox: &mut Inbox) -> bool {
        if inbox.ended().is_some() {
            return false;
        }
        match self.stream.next_frame() {
            Ok(Some(frame)) => {
                inbox.take(frame);
                true
            }
            Ok(None) => false,
            Err(error) => {
                inbox.end(Ended::not_understood(&error));
                true
            }
        }
    }

    /// Writes frames until all are in the socket.
    fn write(
        &mut self,
        inbox: &mut Inbox,
        frames: Frames<'_>,
        descriptor: Option<BorrowedFd<'_>>,
        patience: Patience,
    ) -> Result<(), Unwritten> {
        let bytes = frames.bytes();
        let mut until = None;
        let mut written = 0;
        let stop = loop {
            if inbox.ended().is_some() {
                break Stop::Ended;
            }
            let descriptor = descriptor.filter(|_| written == 0);
            let error = match self.stream.write(frames.after(written), descriptor) {
                Ok(count) if written + count == bytes => return Ok(()),
                Ok(count) => {
                    written += count;
                    continue;
                }
                Err(error) => error,
            };
            let until = *until.get_or_insert_with(|| patience.until());
            if is_gone(&error) {
                self.hear_last_words(inbox, until);
                break Stop::Ended;
            }
            if error.kind() != ErrorKind::WouldBlock {
                break Stop::Io(error);
            }
            self.take_frames(inbox);
            if until.is_over() {
                break Stop::TimedOut;
            }
            if let Err(stop) = self.wait(inbox, true, until) {
                break stop;
            }
            self.take_frames(inbox);
        };
        let whole = frames.ends.partition_point(|end| *end <= written);
        let started = whole.checked_sub(1).map_or(0, |last| frames.ends[last]);
        // A broker that does not read any more never learns of the frame.
        let torn = written > started && !matches!(stop, Stop::Ended);
        if torn {
            let rest = written..frames.ends[whole];
            self.stream.keep_torn(frames.parts, rest);
        }
        Err(Unwritten { whole, torn, stop })
    }

    /// Reads to the end of what the broker says, after it has ceased to read.
    fn hear_last_words(&mut self, inbox: &mut Inbox, deadline: Deadline) {
        self.stream.drop_torn();
        loop {
            self.take_frames(inbox);
            if inbox.ended().is_some() || self.wait(inbox, false, deadline).is_err() {
                return;
            }
        }
    }

    fn take_frames(&mut self, inbox: &mut Inbox) {
        while self.take_frame(inbox) {}
    }
}

impl<'a> Frames<'a> {
    fn bytes(&self) -> usize {
        self.parts[0].len() + self.parts[1].len()
    }

    fn after(&self, written: usize) -> [&'a [u8]; 2] {
        let [first, second] = self.parts;
        match written.checked_sub(first.len()) {
            None => [&first[written..], second],
            Some(of_second) => [&[], &second[of_second..]],
        }
    }
}

/// Encodes the header of a frame whose body is within its upstream's limit.
pub(crate) fn encode_header(header: &FrameHeader, body: &[u8]) -> [u8; HEADER_BYTES] {
    header
        .encode(body.len())
        .expect("message_bytes_max is at most 32 bits, and so is a control message")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_continued_at_any_byte() {
        let frames = Frames { parts: [b"abc", b"de"], ends: &[5] };
        for written in 0..=5 {
            let rest = frames.after(written).concat();
            assert_eq!(rest, b"abcde"[written..]);
        }
    }
}
