//! Passed pipes: a descriptor that a client made, and may still hold.
//!
//! Its flags lie in the open file that client and broker share, so O_NONBLOCK protects nobody
//! (E5a). Every read says RWF_NOWAIT instead (preadv2(2); E5c). A FIFO that was opened by its path,
//! as a shell does for `< fifo` and `<(command)`, does not know that flag; what it holds is spliced
//! into a pipe of the broker's own first, with SPLICE_F_NONBLOCK, which it does know.

use std::io::IoSliceMut;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{FileType, OFlags, fcntl_getfl, fstat};
use rustix::io::{Errno, ReadWriteFlags, preadv2};
use rustix::pipe::{PipeFlags, SpliceFlags, pipe_with, splice};

use super::Read;
use crate::buffer::ReceiveBuffer;

/// The read end of a passed pipe.
#[derive(Debug)]
pub struct Pipe {
    fd: OwnedFd,
    /// Our own pipe, through which it is read: reading end, writing end. Empty between two reads.
    detour: Option<(OwnedFd, OwnedFd)>,
}

impl Pipe {
    /// Takes a passed descriptor if it is a pipe or FIFO that can be read; else gives it back.
    pub fn from_passed(fd: OwnedFd) -> Result<Self, OwnedFd> {
        let is_pipe =
            fstat(&fd).is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Fifo);
        let is_readable = fcntl_getfl(&fd).is_ok_and(|flags| {
            !flags.contains(OFlags::PATH) && flags & OFlags::RWMODE != OFlags::WRONLY
        });
        if is_pipe && is_readable { Ok(Pipe { fd, detour: None }) } else { Err(fd) }
    }

    /// Reads what has arrived.
    pub fn read(&mut self, buffer: &mut ReceiveBuffer) -> Read {
        let room = buffer.room();
        // Offset -1: the current position, the only one a pipe has.
        let result = match &self.detour {
            Some(detour) => read_spliced(&self.fd, detour, room),
            None => {
                let mut slices = [IoSliceMut::new(room)];
                preadv2(&self.fd, &mut slices, u64::MAX, ReadWriteFlags::NOWAIT)
            }
        };
        if result == Err(Errno::OPNOTSUPP) && self.detour.is_none() {
            return match pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK) {
                Ok(detour) => {
                    self.detour = Some(detour);
                    Read::Bytes { more: true }
                }
                Err(error) => Read::Failed(error),
            };
        }
        Read::of_pipe(result, buffer)
    }

    /// The descriptor itself.
    pub fn into_descriptor(self) -> OwnedFd {
        self.fd
    }
}

/// Moves what there is into our own pipe, as much as `room` takes, and reads it there.
fn read_spliced(
    fd: &OwnedFd,
    (reader, writer): &(OwnedFd, OwnedFd),
    room: &mut [u8],
) -> Result<usize, Errno> {
    let bytes = splice(fd, None, writer, None, room.len(), SpliceFlags::NONBLOCK)?;
    let mut read = 0;
    while read < bytes {
        read += rustix::io::retry_on_intr(|| rustix::io::read(reader, &mut room[read..bytes]))?;
    }
    Ok(bytes)
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
    fn a_fifo_opened_by_its_path_is_read_without_waiting_and_to_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        // Open for both, so that neither open waits for the other.
        let mut writer = std::fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
        let reader = std::fs::File::open(&path).unwrap();
        let mut pipe = Pipe::from_passed(reader.into()).unwrap();
        let mut buffer = Spares::default().take();
        assert_eq!(pipe.read(&mut buffer), Read::Bytes { more: true }, "the detour is taken");
        assert_eq!(pipe.read(&mut buffer), Read::Nothing);
        for block in [&b"one\n"[..], &[b'x'; 50_000]] {
            writer.write_all(block).unwrap();
            assert_eq!(pipe.read(&mut buffer), Read::Bytes { more: true });
            assert_eq!(buffer.unread(), block);
            buffer.consume(block.len());
            assert_eq!(pipe.read(&mut buffer), Read::Nothing);
        }
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
