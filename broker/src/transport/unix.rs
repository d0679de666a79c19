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
use crate::config::BACKLOG;
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
}

impl UnixSocket {
    fn new(socket: OwnedFd) -> Self {
        UnixSocket { stream: Stream::new(socket), descriptors: VecDeque::new() }
    }

    /// A passed end of a socketpair. Refused unless it is an unnamed Unix stream: a client's own
    /// end of the client socket has a named peer, and would keep its session alive for ever (M8).
    pub fn from_passed(socket: OwnedFd) -> Result<Self, OwnedFd> {
        let socket = UnixSocket::new(socket);
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
                    read => read,
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

    /// Shuts the socket down, and gives what has to be closed elsewhere: the descriptors that came,
    /// and the socket itself if it still holds bytes, since others may have come with those.
    pub fn into_closing(self) -> Vec<OwnedFd> {
        let socket = self.stream.socket;
        // From here on nothing more comes.
        let _ = shutdown(&socket, Shutdown::Both);
        let mut descriptors = Vec::from(self.descriptors);
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
    out: Vec<u8>,
    written: usize,
    /// Frames that go by the socket itself, also where there is a ring.
    passing: VecDeque<Passing>,
}

/// A frame on its way by the socket, with the descriptor that goes with its first byte.
#[derive(Debug)]
struct Passing {
    frame: Vec<u8>,
    written: usize,
    descriptor: Option<OwnedFd>,
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

impl Stream {
    fn new(socket: OwnedFd) -> Self {
        Stream { socket, out: Vec::new(), written: 0, passing: VecDeque::new() }
    }

    /// Where to append what the client is to get.
    pub fn out(&mut self) -> &mut Vec<u8> {
        &mut self.out
    }

    /// Bytes that the client has not been given.
    pub fn pending_bytes(&self) -> usize {
        self.out.len() - self.written
    }

    /// Passes a frame by the socket itself, with a descriptor or without, past what
    /// [`Stream::out`] holds.
    pub fn pass(&mut self, frame: Vec<u8>, descriptor: Option<BorrowedFd<'_>>) -> bool {
        let is_free = self.out.is_empty() && self.passing.is_empty();
        let sent = match descriptor {
            Some(descriptor) if is_free => fd::send(&self.socket, &frame, &[descriptor]).ok(),
            Some(_) | None => None,
        };
        if sent == Some(frame.len()) {
            return true;
        }
        let descriptor = match descriptor.filter(|_| sent.is_none()) {
            Some(descriptor) => match descriptor.try_clone_to_owned() {
                Ok(copy) => Some(copy),
                Err(_) => return false,
            },
            None => None,
        };
        self.passing.push_back(Passing { frame, written: sent.unwrap_or(0), descriptor });
        true
    }

    /// Whether something waits that goes by the socket itself.
    pub fn is_passing(&self) -> bool {
        !self.passing.is_empty()
    }

    /// Writes what goes by the socket itself; only what was begun, where `begun` says so.
    fn flush_passing(&mut self, begun: bool) -> Flushed {
        while let Some(passing) = self.passing.front_mut() {
            if begun && passing.written == 0 {
                return Flushed::All;
            }
            let rest = &passing.frame[passing.written..];
            let sent = match &passing.descriptor {
                Some(descriptor) => fd::send(&self.socket, rest, &[descriptor.as_fd()])
                    .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO)),
                None => send_now(&self.socket, rest),
            };
            match sent {
                Ok(bytes) => {
                    passing.written += bytes;
                    passing.descriptor = None;
                    if passing.written == passing.frame.len() {
                        self.passing.pop_front();
                    }
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Flushed::WouldBlock,
                Err(_) => return Flushed::Gone,
            }
        }
        Flushed::All
    }

    /// Writes what the client takes now.
    pub fn flush(&mut self) -> Flushed {
        let begun = self.flush_passing(true);
        if begun != Flushed::All {
            return begun;
        }
        let mut flushed = Flushed::All;
        while self.written < self.out.len() {
            match send_now(&self.socket, &self.out[self.written..]) {
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
        if flushed == Flushed::All { self.flush_passing(false) } else { flushed }
    }

    /// Writes likewise, but into the client's ring.
    pub fn flush_into(&mut self, ring: &mut Ring) -> Result<Flushed, Corrupt> {
        let had_bytes = !self.out.is_empty();
        let flushed = ring.flush(&self.out, &mut self.written)?;
        self.tidy();
        if had_bytes && ring.take_nudge() {
            let nudge = FrameHeader::new(Kind::Hello).encode(0);
            // A socket that is full is readable, which is all that is to be achieved.
            let _ = nudge.map(|nudge| send_now(&self.socket, &nudge));
        }
        // What waits here goes with the next event of the socket.
        let _ = self.flush_passing(false);
        Ok(flushed)
    }

    /// Writes a frame with descriptors, past everything else, which must have been written.
    pub fn send_descriptors(&self, frame: &[u8], descriptors: &[BorrowedFd<'_>]) -> bool {
        self.out.is_empty() && fd::send(&self.socket, frame, descriptors).ok() == Some(frame.len())
    }

    /// Drops what is written.
    fn tidy(&mut self) {
        if self.written < self.out.len() {
            self.out.drain(..self.written);
            self.written = 0;
            return;
        }
        self.written = 0;
        // A burst must not pin its memory on an idle session.
        if self.out.capacity() > 4096 {
            self.out = Vec::new();
        } else {
            self.out.clear();
        }
    }

    /// Forgets what the client will never read.
    pub fn discard(&mut self) {
        self.out = Vec::new();
        self.written = 0;
        self.passing.clear();
    }

    /// Takes nothing more from the client: its next write fails, what it wrote can still be read
    /// (unix(7); seen in `net/unix/af_unix.c`, unix_stream_read_generic).
    pub fn stop_reading(&self) {
        let _ = shutdown(&self.socket, Shutdown::Read);
    }
}

fn send_now(socket: &OwnedFd, bytes: &[u8]) -> Result<usize, Errno> {
    send(socket, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)
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
