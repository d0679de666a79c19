//! Sending by the FIFO of an upstream, as `echo` in a shell does, but with an eye on what the
//! path is, on the length of each line and on the time.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use poolbroker_client::Reason;
use rustix::fs::OFlags;
use rustix::io::Errno;

use super::exit::{CommandError, Exit, messages};
use super::input::{TakeLines, read_lines};
use super::patient_pipe::PatientPipe;
use crate::config::{PIPE_BUF, RECONNECT_PAUSE_MIN};

/// Writes `message`, or every line of standard input, each in one piece.
pub fn send_by_fifo(
    path: &Path,
    message: Option<&[u8]>,
    patience: Duration,
) -> Result<Exit, CommandError> {
    let mut fifo = FifoWriter {
        pipe: PatientPipe::new(open(path)?.into(), patience)?,
        patience,
        line: Vec::with_capacity(PIPE_BUF),
        written: 0,
        refused: 0,
    };
    let taken = match message {
        Some(message) => one_line(message).and_then(|_| fifo.take(message)),
        None => read_lines(PIPE_BUF - 1, &mut fifo),
    };
    let shown = path.display();
    taken.map_err(|error| CommandError {
        text: format!("{shown}: after {}: {}", messages(fifo.written), error.text),
        ..error
    })?;
    match fifo.refused {
        0 => Ok(Exit::Done),
        count => Err(CommandError::failed(format!(
            "{shown}: {} refused: empty, or longer than the {PIPE_BUF} bytes that a FIFO takes in \
             one piece, newline included; use `send` without --via fifo",
            messages(count)
        ))),
    }
}

/// `message` as a line; one that holds a newline would become two.
pub fn one_line(message: &[u8]) -> Result<Vec<u8>, CommandError> {
    if message.contains(&b'\n') {
        return Err(CommandError::failed(
            "the message contains a newline, which ends a message in a pipe or FIFO; use `send` \
             without --via",
        ));
    }
    Ok([message, b"\n"].concat())
}

/// Writes lines to a FIFO, one write each.
struct FifoWriter {
    pipe: PatientPipe,
    patience: Duration,
    line: Vec<u8>,
    written: u64,
    refused: u64,
}

impl FifoWriter {
    /// Writes the line, to the next broker if this one ends: a line that was refused was refused
    /// whole. The descriptor stays open meanwhile, which keeps what the FIFO holds.
    fn write_line(&mut self) -> Result<(), CommandError> {
        let start = Instant::now();
        loop {
            match self.pipe.write(&self.line) {
                Err(error) if error.exit == Exit::NoBroker && start.elapsed() < self.patience => {
                    thread::sleep(RECONNECT_PAUSE_MIN);
                }
                result => return result,
            }
        }
    }
}

impl TakeLines for FifoWriter {
    fn take(&mut self, line: &[u8]) -> Result<(), CommandError> {
        if line.is_empty() {
            self.refuse(Reason::Empty);
            return Ok(());
        }
        if line.len() >= PIPE_BUF {
            self.refuse(Reason::TooLong);
            return Ok(());
        }
        self.line.clear();
        self.line.extend_from_slice(line);
        self.line.push(b'\n');
        self.write_line()?;
        self.written += 1;
        Ok(())
    }

    fn refuse(&mut self, _: Reason) {
        self.refused += 1;
    }

    fn pause(&mut self) -> Result<(), CommandError> {
        Ok(())
    }
}

fn open(path: &Path) -> Result<File, CommandError> {
    let shown = path.display();
    // Without a reader O_NONBLOCK fails with ENXIO (fifo(7)) where else the open would wait for
    // one; a link that took the place of the FIFO is not followed.
    let flags = (OFlags::NONBLOCK | OFlags::NOFOLLOW).bits().cast_signed();
    let opened = OpenOptions::new().write(true).custom_flags(flags).open(path);
    let file = opened.map_err(|error| match Errno::from_io_error(&error) {
        Some(Errno::NXIO) => CommandError {
            exit: Exit::NoBroker,
            text: format!("no broker reads {shown}; start one with `poolbroker serve`"),
        },
        Some(Errno::NOENT) => CommandError {
            exit: Exit::NoBroker,
            text: format!(
                "there is no {shown}: no broker serves this directory, or the upstream is unknown \
                 or has `fifo = false`; `poolbroker status` shows every FIFO"
            ),
        },
        Some(Errno::LOOP) => not_a_fifo(path),
        _ => CommandError::failed(format!("{shown} cannot be opened for writing: {error}")),
    })?;
    match file.metadata().map(|metadata| metadata.file_type().is_fifo()) {
        Ok(true) => Ok(file),
        Ok(false) => Err(not_a_fifo(path)),
        Err(error) => Err(metadata_failed(path, &error)),
    }
}

fn not_a_fifo(path: &Path) -> CommandError {
    CommandError::failed(format!(
        "{} is not a FIFO, so nothing was written; remove it and start the broker again",
        path.display()
    ))
}

fn metadata_failed(path: &Path, error: &io::Error) -> CommandError {
    CommandError::failed(format!("{} cannot be examined: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn a_line_that_finds_no_broker_is_written_once_and_whole_to_the_next() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("metrics.fifo");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let read = || File::options().read(true).write(true).open(&path).unwrap();
        let first = read();
        let patience = Duration::from_millis(30);
        let mut fifo = FifoWriter {
            pipe: PatientPipe::new(open(&path).unwrap().into(), patience).unwrap(),
            patience,
            line: Vec::new(),
            written: 0,
            refused: 0,
        };
        drop(first);
        let start = Instant::now();
        assert_eq!(fifo.take(b"line").unwrap_err().exit, Exit::NoBroker);
        assert!(start.elapsed() >= patience, "the next broker is waited for");

        fifo.patience = Duration::from_secs(60);
        let writer = thread::spawn(move || fifo.take(b"line"));
        let mut next = read();
        writer.join().unwrap().unwrap();
        let mut taken = [0; 64];
        let bytes = next.read(&mut taken).unwrap();
        assert_eq!(&taken[..bytes], b"line\n");
    }
}
