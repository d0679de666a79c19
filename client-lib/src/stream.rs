//! The socket to the broker and its two buffers: frames out, frames in.
//!
//! Knows what a frame is, not what it means. Nothing here blocks but [`FrameStream::wait`]; the
//! socket is read and written with MSG_DONTWAIT, and written with MSG_NOSIGNAL, so its file status
//! flags do not matter and SIGPIPE is never raised.
//!
//! Invariants:
//! - Outgoing bytes are whole frames in order. A frame that was cut short is *torn*: its rest is
//!   kept in `torn` and leaves before any other byte.
//! - `incoming[taken..]` has not been handed out yet. The buffer is allocated with the first read
//!   and reused; it grows only to hold one frame, whose length the deframer has judged.

use std::io::{self, ErrorKind, IoSlice};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use poolbroker_proto::fd;
use poolbroker_proto::frame::{Deframer, Frame, FrameError};
use rustix::buffer::spare_capacity;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags, recv, sendmsg};

use crate::deadline::Deadline;

/// The first size of the receive buffer, in bytes: many small replies per read. Pages of it that no
/// read reaches are never touched, so a quiet client does not hold them.
const READ_BYTES: usize = 64 * 1024;

/// How much is read at once where replies do not come by the socket, in bytes.
const RECEIVE_BYTES: usize = 4096;

/// The longest reply taken before an upstream with a larger limit was opened, in bytes.
const MESSAGE_BYTES_MAX: usize = 1024 * 1024;

/// The socket to the broker with its buffers.
pub(crate) struct FrameStream {
    socket: Arc<UnixStream>,
    message_bytes_max: usize,
    incoming: Vec<u8>,
    taken: usize,
    /// Where the frame that was taken last begins in `incoming`.
    frame_start: usize,
    torn: Vec<u8>,
    /// Descriptors that came while some were wanted; none: they are not.
    descriptors: Option<Vec<Passed>>,
}

/// A descriptor, and where in `incoming` the read ended that brought it: within its frame or at its
/// end, because the kernel reads no further than the message that carries one (unix(7)).
#[derive(Debug)]
struct Passed {
    descriptor: OwnedFd,
    end: usize,
}

/// What one read gave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Read {
    /// Bytes, perhaps a frame.
    Some,
    /// Nothing yet.
    Nothing,
    /// The broker has closed the socket, and everything it wrote has been read.
    End,
}

/// What the socket is ready for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Readiness {
    /// A read will not find the socket empty.
    pub readable: bool,
    /// A write will find room or an error.
    pub writable: bool,
}

impl FrameStream {
    pub fn new(socket: Arc<UnixStream>) -> Self {
        FrameStream {
            socket,
            message_bytes_max: MESSAGE_BYTES_MAX,
            incoming: Vec::new(),
            taken: 0,
            frame_start: 0,
            torn: Vec::new(),
            descriptors: None,
        }
    }

    /// Accepts replies of up to `bytes` bytes from now on, unless longer ones are accepted already.
    pub fn raise_message_bytes_max(&mut self, bytes: usize) {
        self.message_bytes_max = self.message_bytes_max.max(bytes);
    }

    /// Writes what the socket takes of the two parts: at least one byte, after the rest of a torn
    /// frame. A descriptor goes with the first byte; `parts[1]` is then not looked at.
    ///
    /// # Errors
    /// [`ErrorKind::WouldBlock`] when not one byte of the parts was taken; else as sendmsg(2).
    pub fn write(
        &mut self,
        parts: [&[u8]; 2],
        descriptor: Option<BorrowedFd<'_>>,
    ) -> io::Result<usize> {
        self.finish_torn()?;
        match descriptor {
            Some(descriptor) => fd::send(&*self.socket, parts[0], &[descriptor]),
            None => send(&self.socket, parts),
        }
    }

    /// Writes what the socket takes of the rest of a torn frame.
    ///
    /// # Errors
    /// [`ErrorKind::WouldBlock`] while some of it is left; else as sendmsg(2).
    pub fn finish_torn(&mut self) -> io::Result<()> {
        while !self.torn.is_empty() {
            let written = send(&self.socket, [&self.torn, &[]])?;
            self.torn.drain(..written);
        }
        Ok(())
    }

    /// Keeps `range` of the two parts, seen as one: the rest of a frame whose beginning is written.
    pub fn keep_torn(&mut self, parts: [&[u8]; 2], range: Range<usize>) {
        let unwritten = range.len();
        let bytes = parts.into_iter().flatten().copied();
        self.torn.extend(bytes.skip(range.start).take(unwritten));
    }

    /// Forgets the rest of a torn frame, because the broker does not read any more.
    pub fn drop_torn(&mut self) {
        self.torn.clear();
    }

    /// Keeps descriptors that come from now on.
    pub fn want_descriptors(&mut self) {
        self.descriptors = Some(Vec::new());
    }

    /// Whether descriptors are wanted.
    pub fn wants_descriptors(&self) -> bool {
        self.descriptors.is_some()
    }

    /// Those that came with the frame that was taken last. All others are closed, and whatever comes
    /// from now on: the answer to a question that was given up may bring one as well.
    pub fn take_descriptors(&mut self) -> Vec<OwnedFd> {
        let frame = self.frame_start + 1..=self.taken;
        let mut passed = self.descriptors.take().unwrap_or_default();
        passed.retain(|passed| frame.contains(&passed.end));
        passed.into_iter().map(|passed| passed.descriptor).collect()
    }

    /// Reads once.
    ///
    /// # Errors
    /// As recv(2); an empty socket is none.
    pub fn read(&mut self) -> io::Result<Read> {
        self.drop_taken();
        if self.descriptors.is_some() {
            let mut came = Vec::new();
            let read = self.receive(&mut came);
            let end = self.incoming.len();
            let passed = came.into_iter().map(|descriptor| Passed { descriptor, end });
            self.descriptors.as_mut().expect("they are wanted").extend(passed);
            return read;
        }
        if self.incoming.capacity() == 0 {
            self.incoming.reserve_exact(READ_BYTES);
        }
        // There must be room for one byte at least, or a read would seem to meet the end.
        let missing = self.deframer().bytes_missing(&self.incoming);
        self.incoming.reserve(missing.unwrap_or(0).max(1));
        let received = rustix::io::retry_on_intr(|| {
            recv(&*self.socket, spare_capacity(&mut self.incoming), RecvFlags::DONTWAIT)
        });
        match received {
            Ok((_, 0)) => Ok(Read::End),
            Ok(_) => Ok(Read::Some),
            Err(Errno::AGAIN) => Ok(Read::Nothing),
            Err(error) => Err(error.into()),
        }
    }

    /// Reads once, with the descriptors that come along.
    ///
    /// # Errors
    /// As recvmsg(2); an empty socket is none.
    pub fn receive(&mut self, descriptors: &mut Vec<OwnedFd>) -> io::Result<Read> {
        self.drop_taken();
        let mut block = [0; RECEIVE_BYTES];
        loop {
            match fd::receive(&*self.socket, &mut block) {
                Ok(received) if received.bytes == 0 => return Ok(Read::End),
                Ok(received) => {
                    self.incoming.extend_from_slice(&block[..received.bytes]);
                    descriptors.extend(received.descriptors);
                    return Ok(Read::Some);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(Read::Nothing),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Whether a read would find bytes, the end or an error. Reads no clock.
    #[must_use]
    pub fn is_readable(&self) -> bool {
        let mut fds = [PollFd::new(&*self.socket, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        rustix::io::retry_on_intr(|| poll(&mut fds, Some(&now))) != Ok(0)
    }

    /// The next complete frame that was read.
    ///
    /// # Errors
    /// Any [`FrameError`]; the stream cannot be read further.
    pub fn next_frame(&mut self) -> Result<Option<Frame<'_>>, FrameError> {
        let next = self.deframer().next_frame(&self.incoming[self.taken..])?;
        if let Some(frame) = &next {
            self.frame_start = self.taken;
            self.taken += frame.frame_bytes;
        }
        Ok(next)
    }

    /// Makes room of the frames that were handed out.
    fn drop_taken(&mut self) {
        self.incoming.drain(..self.taken);
        if let Some(descriptors) = &mut self.descriptors {
            descriptors.retain(|passed| passed.end > self.taken);
            descriptors.iter_mut().for_each(|passed| passed.end -= self.taken);
        }
        (self.taken, self.frame_start) = (0, 0);
    }

    /// Waits until there is something to read or, if `room` is wanted or a torn frame is to be
    /// finished, room to write. Looks once even if the deadline is over; neither ready = it is.
    ///
    /// # Errors
    /// As poll(2).
    pub fn wait(&self, room: bool, deadline: Deadline) -> io::Result<Readiness> {
        let mut interest = PollFlags::IN;
        interest.set(PollFlags::OUT, room || !self.torn.is_empty());
        loop {
            let timeout = timespec(deadline);
            let mut fds = [PollFd::new(&*self.socket, interest)];
            match poll(&mut fds, timeout.as_ref()) {
                Ok(_) => {
                    let ready = fds[0].revents();
                    let ended = ready.intersects(PollFlags::HUP | PollFlags::ERR);
                    return Ok(Readiness {
                        readable: ended || ready.contains(PollFlags::IN),
                        writable: ended || ready.contains(PollFlags::OUT),
                    });
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The socket itself.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn deframer(&self) -> Deframer {
        Deframer::new(self.message_bytes_max)
    }
}

/// Whether an error of a write means that the broker does not read any more.
pub(crate) fn is_gone(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset)
}

fn send(socket: &UnixStream, parts: [&[u8]; 2]) -> io::Result<usize> {
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    let slices = parts.map(IoSlice::new);
    let mut no_descriptors = SendAncillaryBuffer::default();
    Ok(rustix::io::retry_on_intr(|| sendmsg(socket, &slices, &mut no_descriptors, flags))?)
}

/// What poll(2) takes; `None` is for ever.
fn timespec(deadline: Deadline) -> Option<Timespec> {
    let left = deadline.time_left()?;
    // A number of seconds beyond 63 bits is as good as for ever.
    Timespec::try_from(left).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use poolbroker_proto::frame::{FrameHeader, Kind};
    use std::io::{Read as _, Write as _};

    fn pair() -> (FrameStream, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (FrameStream::new(Arc::new(ours)), theirs)
    }

    fn frame(body: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        FrameHeader::new(Kind::Reply).append(body, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn frames_larger_than_a_read_and_several_in_one_come_out_whole() {
        let (mut stream, mut broker) = pair();
        let bodies = [vec![1; 3], vec![2; 3 * READ_BYTES], vec![], vec![3; 100]];
        let bytes: Vec<u8> = bodies.iter().flat_map(|body| frame(body)).collect();
        let writer = std::thread::spawn(move || broker.write_all(&bytes).unwrap());
        let mut seen = Vec::new();
        loop {
            while let Some(frame) = stream.next_frame().unwrap() {
                seen.push(frame.body.to_vec());
            }
            stream.wait(false, Deadline::Never).unwrap();
            if stream.read().unwrap() == Read::End {
                break;
            }
        }
        assert_eq!(seen, bodies);
        writer.join().unwrap();
    }

    #[test]
    fn the_rest_of_a_torn_frame_goes_before_the_next_one() {
        let (mut stream, mut broker) = pair();
        let torn = frame(b"torn");
        let (head, body) = torn.split_at(10);
        stream.keep_torn([head, body], 3..torn.len());
        broker.set_nonblocking(true).unwrap();
        assert!(broker.read(&mut [0]).is_err(), "keeping writes nothing");
        stream.write([b"next", b"!"], None).unwrap();
        let mut seen = vec![0; 100];
        let seen_bytes = broker.read(&mut seen).unwrap();
        seen.truncate(seen_bytes);
        assert_eq!(seen, [&torn[3..], b"next!"].concat());
    }

    #[test]
    fn a_descriptor_goes_with_the_frame_that_brought_it_and_no_other() {
        let (mut stream, mut broker) = pair();
        stream.want_descriptors();
        let (pipes, bodies) = ([io::pipe(), io::pipe()].map(Result::unwrap), [b"late", b"mine"]);
        broker.write_all(&frame(b"")).unwrap();
        for ((_, writer), body) in pipes.iter().zip(bodies) {
            let frame = frame(body);
            assert_eq!(fd::send(&broker, &frame, &[writer.as_fd()]).unwrap(), frame.len());
        }
        broker.write_all(&frame(b"behind")).unwrap();
        // One frame is taken between two reads, and the others only once everything is read.
        while stream.descriptors.as_ref().is_none_or(Vec::is_empty) {
            assert_eq!(stream.read().unwrap(), Read::Some);
        }
        assert_eq!(stream.next_frame().unwrap().unwrap().body, b"");
        while stream.read().unwrap() == Read::Some {}
        for body in bodies {
            assert_eq!(stream.next_frame().unwrap().unwrap().body, body);
        }
        let [mine] = <[OwnedFd; 1]>::try_from(stream.take_descriptors()).unwrap();
        let [(late, late_writer), (mut reader, writer)] = pipes;
        drop((late_writer, writer));
        std::fs::File::from(mine).write_all(b"here").unwrap();
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "here");
        assert_eq!(io::read_to_string(late).unwrap(), "", "the other one is closed");
    }

    #[test]
    fn a_full_socket_would_block_and_a_closed_one_is_gone_without_a_signal() {
        let (mut stream, broker) = pair();
        let block = [0; READ_BYTES];
        let full = loop {
            if let Err(error) = stream.write([&block, &block], None) {
                break error;
            }
        };
        assert_eq!(full.kind(), ErrorKind::WouldBlock);
        let ready = stream.wait(true, Deadline::now()).unwrap();
        assert!(!ready.readable && !ready.writable, "{ready:?}");
        drop(broker);
        let ready = stream.wait(true, Deadline::Never).unwrap();
        assert!(ready.readable && ready.writable, "{ready:?}");
        for _ in 0..2 {
            assert!(is_gone(&stream.write([&block, &[]], None).unwrap_err()));
        }
    }
}
