//! Passing file descriptors over a Unix stream socket (unix(7), SCM_RIGHTS).
//!
//! Received descriptors are owned from the first moment, so none leaks when the control buffer
//! was too small or a caller returns early. Nothing here blocks: both directions use
//! MSG_DONTWAIT, and a caller that wants to wait polls.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// The most descriptors one message may carry.
pub const DESCRIPTORS_PER_MESSAGE_MAX: usize = 8;

/// The most descriptors that the kernel lets one message carry (unix(7)).
const SCM_MAX_FD: usize = 253;

/// What one receive gave.
#[derive(Debug)]
pub struct Received {
    /// Bytes read; 0 at the end of the stream.
    pub bytes: usize,
    /// The descriptors that came with them, close-on-exec.
    pub descriptors: Vec<OwnedFd>,
    /// More descriptors came than a message may carry; the sender is at fault.
    pub is_excessive: bool,
}

/// Reads bytes, and the descriptors that came with them, without blocking.
///
/// # Errors
/// As recvmsg(2); [`io::ErrorKind::WouldBlock`] when there is nothing to read.
pub fn receive(socket: impl AsFd, buffer: &mut [u8]) -> io::Result<Received> {
    // Room for all that the kernel lets through, so that it never has to destroy one in this call,
    // which can block (close(2) of a lingering socket).
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(SCM_MAX_FD))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let read = recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut control, flags)?;
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    let is_excessive =
        read.flags.contains(ReturnFlags::CTRUNC) || descriptors.len() > DESCRIPTORS_PER_MESSAGE_MAX;
    Ok(Received { bytes: read.bytes, descriptors, is_excessive })
}

/// Sends `bytes` with descriptors attached to the first of them, without blocking; returns how many
/// bytes were taken. The descriptors went along if at least one was.
///
/// # Errors
/// As sendmsg(2), MSG_NOSIGNAL; an error of the caller's own for more than
/// [`DESCRIPTORS_PER_MESSAGE_MAX`].
pub fn send(socket: impl AsFd, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<usize> {
    const SPACE: usize = rustix::cmsg_space!(ScmRights(DESCRIPTORS_PER_MESSAGE_MAX));
    let mut space = [MaybeUninit::uninit(); SPACE];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        let text = format!("{} descriptors are too many for one message", descriptors.len());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    Ok(sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_passed_descriptor_is_the_same_open_file() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (mut reader, writer) = io::pipe().unwrap();
        assert_eq!(send(&ours, b"x", &[writer.as_fd()]).unwrap(), 1);
        drop(writer);
        let mut buffer = [0; 16];
        let mut received = receive(&theirs, &mut buffer).unwrap();
        assert_eq!((received.bytes, received.is_excessive), (1, false));
        let passed = received.descriptors.pop().unwrap();
        std::fs::File::from(passed).write_all(b"hello").unwrap();
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");
    }

    #[test]
    fn an_empty_socket_would_block_and_a_closed_one_reads_nothing() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut buffer = [0; 16];
        let nothing = receive(&theirs, &mut buffer).unwrap_err();
        assert_eq!(nothing.kind(), io::ErrorKind::WouldBlock);
        drop(ours);
        assert_eq!(receive(&theirs, &mut buffer).unwrap().bytes, 0);
    }
}
