//! Passed pipes: a descriptor that a client made, and may still hold.
//!
//! Its flags lie in the open file that client and broker share, so O_NONBLOCK protects nobody
//! (E5a). Every read says RWF_NOWAIT instead (preadv2(2); E5c).

use std::io::IoSliceMut;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{FileType, OFlags, fcntl_getfl, fstat};
use rustix::io::{Errno, ReadWriteFlags, preadv2};

use super::Read;
use crate::buffer::ReceiveBuffer;

/// The read end of a passed pipe.
#[derive(Debug)]
pub struct Pipe {
    fd: OwnedFd,
}

impl Pipe {
    /// Takes a passed descriptor if it is a pipe or FIFO that can be read; else gives it back.
    pub fn from_passed(fd: OwnedFd) -> Result<Self, OwnedFd> {
        let is_pipe =
            fstat(&fd).is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Fifo);
        let is_readable = fcntl_getfl(&fd).is_ok_and(|flags| {
            !flags.contains(OFlags::PATH) && flags & OFlags::RWMODE != OFlags::WRONLY
        });
        if is_pipe && is_readable { Ok(Pipe { fd }) } else { Err(fd) }
    }

    /// Reads what has arrived.
    pub fn read(&mut self, buffer: &mut ReceiveBuffer) -> Read {
        let room = buffer.room();
        // Offset -1: the current position, the only one a pipe has.
        let mut slices = [IoSliceMut::new(room)];
        let result = preadv2(&self.fd, &mut slices, u64::MAX, ReadWriteFlags::NOWAIT);
        Read::of_pipe(result, buffer)
    }

    /// The descriptor itself.
    pub fn into_descriptor(self) -> OwnedFd {
        self.fd
    }
}

/// Whether this kernel reads pipes without waiting (Linux 5.9 and later).
pub fn is_supported() -> bool {
    let Ok((reader, _writer)) = rustix::pipe::pipe() else {
        return false;
    };
    let mut byte = [0u8; 1];
    let mut slices = [IoSliceMut::new(&mut byte)];
    preadv2(&reader, &mut slices, u64::MAX, ReadWriteFlags::NOWAIT) == Err(Errno::AGAIN)
}

impl AsFd for Pipe {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::Spares;
    use std::io::Write;

    #[test]
    fn a_blocking_pipe_is_read_without_waiting_and_to_its_end() {
        assert!(is_supported());
        let (reader, mut writer) = std::io::pipe().unwrap();
        let mut pipe = Pipe::from_passed(reader.into()).unwrap();
        let mut buffer = Spares::default().take();
        assert_eq!(pipe.read(&mut buffer), Read::Nothing);
        writer.write_all(b"line\n").unwrap();
        assert_eq!(pipe.read(&mut buffer), Read::Bytes { more: true });
        assert_eq!(buffer.unread(), b"line\n");
        drop(writer);
        assert_eq!(pipe.read(&mut buffer), Read::End);
    }

    #[test]
    fn what_is_no_readable_pipe_is_given_back() {
        let (_reader, writer) = std::io::pipe().unwrap();
        assert!(Pipe::from_passed(writer.into()).is_err(), "a write end");
        let file = std::fs::File::open("/proc/self/exe").unwrap();
        assert!(Pipe::from_passed(file.into()).is_err(), "a regular file");
        let zero = std::fs::File::open("/dev/zero").unwrap();
        assert!(Pipe::from_passed(zero.into()).is_err(), "a device");
    }
}
