//! The client socket, and streams to clients in general.
//!
//! A [`Stream`] never blocks whatever the client does to its flags: every call says MSG_DONTWAIT
//! (E5a). What the client does not read waits in a queue that the shard bounds.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::fcntl::AT_FDCWD;
use nix::sys::stat::{FchmodatFlags, Mode, fchmod, fchmodat, umask};
use nix::unistd::{Gid, chown};
use poolbroker_proto::fd;
use poolbroker_proto::frame::{FrameHeader, Kind};
use poolbroker_proto::reason::Reason;
use poolbroker_proto::ring::Corrupt;
use rustix::io::{Errno, ioctl_fionread};
use rustix::net::{
    AddressFamily, SendFlags, Shutdown, SocketAddrAny, SocketAddrUnix, SocketFlags, SocketType,
    UCred, accept_with, bind, getpeername, getsockname, listen, send, shutdown, socket_with,
    sockopt,
};

use super::Read;
use super::ring::Ring;
use crate::buffer::ReceiveBuffer;
use crate::config::{BACKLOG, UNREAD_DESCRIPTORS_MAX};
use crate::upstream::sockopt as raw_sockopt;

/// Opens a listening socket at `path`, which must not exist. The mode is set before the socket
/// has a name, so that there is no moment with a wider one (E18); one with a group is opened to
/// the group once it is the right one. Changes the umask meanwhile: no other thread may make files.
pub fn open_listener(path: &Path, mode: u32, group: Option<Gid>) -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    let plain = |error: nix::errno::Errno| Errno::from_raw_os_error(error as i32);
    let mode = Mode::from_bits_truncate(mode);
    let private = Mode::S_IRUSR | Mode::S_IWUSR;
    fchmod(&socket, if group.is_some() { private } else { mode }).map_err(plain)?;
    let umask_before = umask(Mode::empty());
    let bound = bind(&socket, &SocketAddrUnix::new(path)?);
    umask(umask_before);
    bound?;
    if group.is_some() {
        // By path, for lack of another way; only the broker's user can put something else there.
        chown(path, None, group).map_err(plain)?;
        fchmodat(AT_FDCWD, path, mode, FchmodatFlags::NoFollowSymlink).map_err(plain)?;
    }
    listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// Accepts one client, with the credentials it had when it connected (SO_PEERCRED, unix(7)).
pub fn accept(listener: impl AsFd) -> Result<(UnixSocket, UCred), Errno> {
    let socket = accept_with(listener, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC)?;
    let credentials = sockopt::socket_peercred(&socket)?;
    Ok((UnixSocket::new(socket), credentials))
}

/// A client on the client socket: a stream on which descriptors may come.
#[derive(Debug)]
pub struct UnixSocket {
    /// The stream.
    pub stream: Stream,
    descriptors: VecDeque<OwnedFd>,
    /// Its client may have a copy.
    is_passed: bool,
    /// Read to its end: nothing stands in it, and nothing more comes.
    is_at_end: bool,
}

impl UnixSocket {
    fn new(socket: OwnedFd) -> Self {
        UnixSocket {
            stream: Stream::new(socket),
            descriptors: VecDeque::new(),
            is_passed: false,
            is_at_end: false,
        }
    }

    /// A passed end of a socketpair. Refused unless it is an unnamed Unix stream: a client's own
    /// end of the client socket has a named peer, and would keep its session alive for ever (M8).
    pub fn from_passed(socket: OwnedFd) -> Result<Self, OwnedFd> {
        let socket = UnixSocket { is_passed: true, ..UnixSocket::new(socket) };
        if !socket.is_unnamed_stream() {
            return Err(socket.stream.socket);
        }
        // Not known before Linux 6.16; what comes all the same ends the session.
        let _ = raw_sockopt::refuse_descriptors(&socket.stream.socket);
        Ok(socket)
    }

    fn is_unnamed_stream(&self) -> bool {
        let is_unix = sockopt::socket_domain(&self.stream.socket) == Ok(AddressFamily::UNIX);
        let is_stream = sockopt::socket_type(&self.stream.socket) == Ok(SocketType::STREAM);
        // The address of an unnamed socket is its family alone (unix(7)).
        let unnamed = |address: Option<SocketAddrAny>| {
            address.is_none_or(|address| address.addr_len() as usize <= size_of::<u16>())
        };
        is_unix
            && is_stream
            && getsockname(&self.stream.socket).is_ok_and(|address| unnamed(Some(address)))
            && getpeername(&self.stream.socket).is_ok_and(unnamed)
    }

    /// Reads bytes, and keeps the descriptors that come with them.
    pub fn read(&mut self, buffer: &mut ReceiveBuffer) -> Read {
        let room = buffer.room();
        let len = room.len();
        match fd::receive(&self.stream.socket, room) {
            Ok(received) => {
                // A read stops behind a message with descriptors though more may follow.
                let stopped = !received.descriptors.is_empty();
                self.descriptors.extend(received.descriptors);
                if received.is_excessive {
                    return Read::Failed(Errno::TOOMANYREFS);
                }
                match Read::of(Ok(received.bytes), len, buffer) {
                    Read::Bytes { more } => Read::Bytes { more: more || stopped },
                    read => {
                        self.is_at_end = read == Read::End;
                        read
                    }
                }
            }
            Err(error) => {
                let error = Errno::from_io_error(&error).unwrap_or(Errno::IO);
                Read::of(Err(error), len, buffer)
            }
        }
    }

    /// Descriptors that came and no message has claimed.
    pub fn descriptors(&self) -> usize {
        self.descriptors.len()
    }

    /// Whether it was read to its end, so that [`UnixSocket::into_closing`] closes it, and nobody
    /// else has it, so that this is all there is to do.
    pub fn closes_at_once(&self) -> bool {
        self.is_at_end && !self.is_passed
    }

    /// Ends the socket, and gives what has to be closed elsewhere: the descriptors that came, and
    /// the socket itself if it still holds bytes, since others may have come with those.
    pub fn into_closing(self) -> Vec<OwnedFd> {
        let closes_at_once = self.closes_at_once();
        let socket = self.stream.socket;
        let mut descriptors = Vec::from(self.descriptors);
        if closes_at_once {
            return descriptors;
        }
        // From here on nothing more comes.
        let _ = shutdown(&socket, Shutdown::Both);
        if ioctl_fionread(&socket) != Ok(0) {
            descriptors.push(socket);
        }
        descriptors
    }

    /// Claims the first of them.
    pub fn claim_descriptor(&mut self) -> Option<OwnedFd> {
        self.descriptors.pop_front()
    }
}

/// A stream to a client, with what it has not read yet.
#[derive(Debug)]
pub struct Stream {
    socket: OwnedFd,
    out: Queue,
    /// Frames that go by the socket where a ring takes all others.
    beside: Queue,
    /// Descriptors that were passed since the client was last seen to have read everything.
    unread_descriptors: usize,
}

/// Bytes for a client, and how many of them are written.
#[derive(Debug, Default)]
struct Queue {
    bytes: Vec<u8>,
    written: usize,
}

/// How far a flush came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flushed {
    /// Everything was written.
    All,
    /// The client has to read first.
    WouldBlock,
    /// The client is gone.
    Gone,
}

impl Queue {
    fn pending(&self) -> usize {
        self.bytes.len() - self.written
    }

    /// Writes what the socket takes now.
    fn write(&mut self, socket: &OwnedFd) -> Flushed {
        let mut flushed = Flushed::All;
        while self.pending() > 0 {
            match send(
                socket,
                &self.bytes[self.written..],
                SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
            ) {
                Ok(bytes) => self.written += bytes,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    flushed = Flushed::WouldBlock;
                    break;
                }
                Err(_) => return Flushed::Gone,
            }
        }
        self.tidy();
        flushed
    }

    /// Drops what is written.
    fn tidy(&mut self) {
        if self.pending() > 0 {
            self.bytes.drain(..self.written);
            self.written = 0;
            return;
        }
        self.written = 0;
        // A burst must not pin its memory on an idle session.
        if self.bytes.capacity() > 4096 {
            self.bytes = Vec::new();
        } else {
            self.bytes.clear();
        }
    }
}

impl Stream {
    fn new(socket: OwnedFd) -> Self {
        Stream { socket, out: Queue::default(), beside: Queue::default(), unread_descriptors: 0 }
    }

    /// Where to append what the client is to get.
    pub fn out(&mut self) -> &mut Vec<u8> {
        &mut self.out.bytes
    }

    /// Where to append what goes by the socket itself, past the ring.
    pub fn beside(&mut self) -> &mut Vec<u8> {
        &mut self.beside.bytes
    }

    /// Bytes that the client has not been given.
    pub fn pending_bytes(&self) -> usize {
        self.out.pending() + self.beside.pending()
    }

    /// Whether something waits that goes past the ring.
    pub fn has_beside(&self) -> bool {
        self.beside.pending() > 0
    }

    /// Passes a frame with a descriptor by the socket itself, behind what is there before; `is_ring`:
    /// the rest goes by a ring. Now or not at all: nothing of it is kept for a client that does not
    /// read, and of the descriptors in its socket, which count against the broker, few are.
    pub fn pass(
        &mut self,
        frame: &[u8],
        descriptor: BorrowedFd<'_>,
        is_ring: bool,
    ) -> Result<(), Reason> {
        let queue = if is_ring { &mut self.beside } else { &mut self.out };
        match queue.write(&self.socket) {
            Flushed::All => {}
            Flushed::WouldBlock => return Err(Reason::ReplyUndeliverable),
            Flushed::Gone => return Err(Reason::ClientGone),
        }
        if self.unread_descriptors > 0
            && raw_sockopt::unacknowledged_bytes(&self.socket).is_ok_and(|unread| unread == 0)
        {
            self.unread_descriptors = 0;
        }
        if self.unread_descriptors >= UNREAD_DESCRIPTORS_MAX {
            return Err(Reason::ReplyUndeliverable);
        }
        let sent = loop {
            match fd::send(&self.socket, frame, &[descriptor]) {
                Ok(bytes) => break bytes,
                Err(error) => match Errno::from_io_error(&error) {
                    Some(Errno::INTR) => {}
                    Some(Errno::AGAIN) => return Err(Reason::ReplyUndeliverable),
                    // Too many are on their way to all clients together, or no memory (unix(7)).
                    Some(Errno::TOOMANYREFS | Errno::NOBUFS | Errno::NOMEM) => {
                        return Err(Reason::DescriptorsFull);
                    }
                    Some(_) | None => return Err(Reason::ClientGone),
                },
            }
        };
        self.unread_descriptors += 1;
        queue.bytes.extend_from_slice(frame.get(sent..).unwrap_or_default());
        Ok(())
    }

    /// Writes what the client takes now.
    pub fn flush(&mut self) -> Flushed {
        self.out.write(&self.socket)
    }

    /// Writes likewise, but into the client's ring.
    pub fn flush_into(&mut self, ring: &mut Ring) -> Result<Flushed, Corrupt> {
        let had_bytes = !self.out.bytes.is_empty();
        let flushed = ring.flush(&self.out.bytes, &mut self.out.written)?;
        self.out.tidy();
        // What is left here goes with the next event of the socket.
        let _ = self.beside.write(&self.socket);
        // A socket that is full is readable, which is all that is to be achieved.
        if had_bytes
            && ring.take_nudge()
            && !self.has_beside()
            && let Ok(nudge) = FrameHeader::new(Kind::Hello).encode(0)
        {
            self.beside.bytes.extend_from_slice(&nudge);
            let _ = self.beside.write(&self.socket);
        }
        Ok(flushed)
    }

    /// Writes a frame with descriptors, past everything else, which must have been written.
    pub fn send_descriptors(&self, frame: &[u8], descriptors: &[BorrowedFd<'_>]) -> bool {
        let is_free = self.out.bytes.is_empty() && !self.has_beside();
        is_free && fd::send(&self.socket, frame, descriptors).ok() == Some(frame.len())
    }

    /// Forgets what the client will never read.
    pub fn discard(&mut self) {
        self.out = Queue::default();
        self.beside = Queue::default();
    }

    /// Takes nothing more from the client: its next write fails, what it wrote can still be read
    /// (unix(7); seen in `net/unix/af_unix.c`, unix_stream_read_generic).
    pub fn stop_reading(&self) {
        let _ = shutdown(&self.socket, Shutdown::Read);
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::Spares;
    use std::io::Write;
    use std::os::unix::net::{UnixListener, UnixStream};

    #[test]
    fn what_was_written_before_reading_stopped_can_still_be_read_to_its_end() {
        let (mut client, ours) = UnixStream::pair().unwrap();
        client.write_all(b"before").unwrap();
        let mut socket = UnixSocket::new(ours.into());
        socket.stream.stop_reading();
        assert!(client.write_all(b"after").is_err());
        let mut buffer = Spares::default().take();
        assert_eq!(socket.read(&mut buffer), Read::Bytes { more: false });
        assert_eq!(buffer.unread(), b"before");
        assert_eq!(socket.read(&mut buffer), Read::End);
    }

    #[test]
    fn only_unnamed_unix_streams_are_socketpairs() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        assert!(UnixSocket::from_passed(ours.into()).is_ok());
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let _listener = UnixListener::bind(&path).unwrap();
        let connected = UnixStream::connect(&path).unwrap();
        assert!(UnixSocket::from_passed(connected.into()).is_err(), "its peer has a name");
        let (reader, _writer) = std::io::pipe().unwrap();
        assert!(UnixSocket::from_passed(reader.into()).is_err());
        let udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        assert!(UnixSocket::from_passed(udp.into()).is_err());
    }
}
