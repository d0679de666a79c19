//! Standard input as messages: one per line.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;

use poolbroker_client::Reason;
use poolbroker_proto::framing::{Cut, Cutter, Framing, Tail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::exit::CommandError;
use crate::config::INPUT_BLOCK_BYTES;

/// Who takes the lines.
pub trait TakeLines {
    /// One line without its end.
    fn take(&mut self, line: &[u8]) -> Result<(), CommandError>;
    /// A line that is longer than the limit.
    fn refuse(&mut self, reason: Reason);
    /// Nothing more is there for now: the next read waits.
    fn pause(&mut self) -> Result<(), CommandError>;
}

/// Reads standard input to its end. Lines of up to `line_bytes_max` bytes are taken, the last one
/// also without a line end.
pub fn read_lines(line_bytes_max: usize, taker: &mut impl TakeLines) -> Result<(), CommandError> {
    let mut input = standard_input()?;
    let mut cutter = Cutter::new(Framing::Lines, line_bytes_max);
    let mut unread = Vec::new();
    loop {
        if !is_ready(&input) {
            taker.pause()?;
        }
        let start = unread.len();
        unread.resize(start + INPUT_BLOCK_BYTES, 0);
        let read = loop {
            match input.read(&mut unread[start..]) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                read => break read.map_err(unreadable)?,
            }
        };
        unread.truncate(start + read);
        let consumed = cut(&mut cutter, &unread, taker)?;
        unread.drain(..consumed);
        if read == 0 {
            if let Tail::Message(body) = cutter.finish(&unread) {
                taker.take(&unread[body])?;
            }
            return Ok(());
        }
    }
}

/// Standard input without a buffer of its own.
pub fn standard_input() -> Result<File, CommandError> {
    let input = io::stdin().as_fd().try_clone_to_owned();
    input.map(File::from).map_err(unreadable)
}

/// What an error of reading standard input means for the command.
pub fn unreadable(error: io::Error) -> CommandError {
    CommandError::failed(format!("standard input cannot be read: {error}"))
}

/// Takes every complete line; returns how many bytes are used up.
fn cut(
    cutter: &mut Cutter,
    bytes: &[u8],
    taker: &mut impl TakeLines,
) -> Result<usize, CommandError> {
    let mut start = 0;
    loop {
        let rest = &bytes[start..];
        start += match cutter.next_cut(rest) {
            Cut::Message { body, consumed } => {
                taker.take(&rest[body])?;
                consumed
            }
            Cut::Refused { reason, consumed } => {
                taker.refuse(reason);
                consumed
            }
            Cut::Skipped { consumed } => consumed,
            Cut::Incomplete | Cut::Broken => return Ok(start),
        };
    }
}

/// Whether a read would return at once. In doubt it would.
fn is_ready(input: &File) -> bool {
    let mut fds = [PollFd::new(input, PollFlags::IN)];
    !matches!(poll(&mut fds, Some(&Timespec::default())), Ok(0))
}
