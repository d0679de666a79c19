//! A pipe or FIFO that is written with patience, but not for ever.

use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::{Errno, write};

use super::exit::{CommandError, Exit};

/// The write end of a pipe or FIFO.
pub struct PatientPipe {
    fd: OwnedFd,
    patience: Duration,
}

impl PatientPipe {
    /// Waits up to `patience` each time the pipe is full.
    pub fn new(fd: OwnedFd, patience: Duration) -> Result<Self, CommandError> {
        let non_blocking = fcntl_getfl(&fd).and_then(|flags| {
            let flags = flags | OFlags::NONBLOCK;
            fcntl_setfl(&fd, flags)
        });
        non_blocking.map_err(unwritable)?;
        Ok(PatientPipe { fd, patience })
    }

    /// Writes all bytes; up to PIPE_BUF of them in one piece (pipe(7)).
    pub fn write(&mut self, mut bytes: &[u8]) -> Result<(), CommandError> {
        while !bytes.is_empty() {
            match write(&self.fd, bytes) {
                Ok(written) => bytes = &bytes[written..],
                Err(Errno::AGAIN) => self.wait_for_room()?,
                Err(Errno::INTR) => {}
                Err(error) => return Err(unwritable(error)),
            }
        }
        Ok(())
    }

    fn wait_for_room(&self) -> Result<(), CommandError> {
        let timeout = Timespec::try_from(self.patience).ok();
        match poll(&mut [PollFd::new(&self.fd, PollFlags::OUT)], timeout.as_ref()) {
            Ok(0) => Err(CommandError {
                exit: Exit::TimedOut,
                text: format!(
                    "the pipe stayed full for {}: is the broker stopped, or the upstream down?",
                    humantime::Duration::from(self.patience)
                ),
            }),
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(unwritable(error)),
        }
    }
}

fn unwritable(error: Errno) -> CommandError {
    match error {
        Errno::PIPE => CommandError {
            exit: Exit::NoBroker,
            text: "the broker stopped reading the pipe".into(),
        },
        error => CommandError::failed(format!("the pipe cannot be written: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn a_pipe_that_stays_full_is_given_up_as_timed_out() {
        let (reader, writer) = std::io::pipe().unwrap();
        let mut pipe = PatientPipe::new(writer.into(), Duration::from_millis(20)).unwrap();
        let error = pipe.write(&vec![b'x'; 1024 * 1024]).unwrap_err();
        assert_eq!(error.exit, Exit::TimedOut, "{error}");
        drop(reader);
        assert_eq!(pipe.write(b"x").unwrap_err().exit, Exit::NoBroker);
    }

    #[test]
    fn more_than_a_pipe_holds_arrives_when_it_is_read() {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let mut pipe = PatientPipe::new(writer.into(), Duration::from_secs(60)).unwrap();
        let read = std::thread::spawn(move || {
            let mut all = Vec::new();
            reader.read_to_end(&mut all).map(|_| all)
        });
        pipe.write(&vec![b'x'; 300_000]).unwrap();
        drop(pipe);
        assert_eq!(read.join().unwrap().unwrap().len(), 300_000);
    }
}
