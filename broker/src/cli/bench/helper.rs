//! Helper processes of the benchmarks: this program again, under a hidden command.
//!
//! Orders go in by standard input, which is a socket so that descriptors can go along; answers come
//! back by standard output. Both are JSON, one per line. A helper ends when its standard input does,
//! so none outlives the benchmark.

use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, ChildStdout, Command, Stdio};

use poolbroker_proto::fd;
use rustix::event::{PollFd, PollFlags, poll};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::clock::CpuClock;
use crate::cli::exit::{CommandError, print};
use crate::config::INPUT_BLOCK_BYTES;

/// A helper process, seen from the benchmark. It ends when this is dropped.
#[derive(Debug)]
pub struct Helper {
    role: &'static str,
    child: Child,
    orders: UnixStream,
    answers: BufReader<ChildStdout>,
}

impl Helper {
    /// Starts this program under the hidden command `role`.
    pub fn start(role: &'static str) -> Result<Self, CommandError> {
        let failed = |error| failed(role, error);
        let (orders, theirs) = UnixStream::pair().map_err(failed)?;
        let mut child = Command::new(std::env::current_exe().map_err(failed)?)
            .arg(role)
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        let answers = child.stdout.take().expect("its standard output is a pipe");
        Ok(Helper { role, child, orders, answers: BufReader::new(answers) })
    }

    /// Gives an order.
    pub fn tell(&mut self, order: &impl Serialize) -> Result<(), CommandError> {
        self.tell_with(order, &[])
    }

    /// Gives an order with descriptors.
    pub fn tell_with(
        &mut self,
        order: &impl Serialize,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), CommandError> {
        let line = json_line(order)?;
        let sent = match descriptors {
            [] => self.orders.write_all(&line),
            // Far shorter than a socket's buffer, which nothing else is in: taken whole.
            _ => fd::send(&self.orders, &line, descriptors).map(drop),
        };
        sent.map_err(|error| failed(self.role, error))
    }

    /// Waits for the next answer.
    pub fn hear<T: DeserializeOwned>(&mut self) -> Result<T, CommandError> {
        let mut line = String::new();
        let read = self.answers.read_line(&mut line).map_err(|error| failed(self.role, error))?;
        if read == 0 {
            return Err(failed(self.role, io::Error::other("it has ended; see above")));
        }
        serde_json::from_str(&line).map_err(|error| failed(self.role, error.into()))
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Its CPU clock.
    pub fn cpu_clock(&self) -> Result<CpuClock, CommandError> {
        CpuClock::of(&self.child)
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        // It has nothing of its own to put away.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The orders, seen from the helper.
#[derive(Debug)]
pub struct Orders {
    socket: UnixStream,
    buffer: Vec<u8>,
    descriptors: Vec<OwnedFd>,
}

impl Orders {
    /// Those that come by standard input.
    pub fn from_standard_input() -> Result<Self, CommandError> {
        let socket = io::stdin().as_fd().try_clone_to_owned().map_err(no_orders)?;
        Ok(Orders { socket: socket.into(), buffer: Vec::new(), descriptors: Vec::new() })
    }

    /// Waits for the next order; none when the benchmark has ended.
    pub fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, CommandError> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<_> = self.buffer.drain(..=end).collect();
                let order = serde_json::from_slice(&line);
                return order.map(Some).map_err(|error| no_orders(error.into()));
            }
            if !self.read().map_err(no_orders)? {
                return Ok(None);
            }
        }
    }

    /// The descriptors that came with the last order.
    pub fn take_descriptors(&mut self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.descriptors)
    }

    fn read(&mut self) -> io::Result<bool> {
        poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], None)?;
        let mut block = vec![0; INPUT_BLOCK_BYTES];
        let received = fd::receive(&self.socket, &mut block)?;
        self.buffer.extend_from_slice(&block[..received.bytes]);
        self.descriptors.extend(received.descriptors);
        Ok(received.bytes > 0)
    }
}

/// Answers an order.
pub fn answer(answer: &impl Serialize) -> Result<(), CommandError> {
    print(&json_line(answer)?)
}

fn json_line(value: &impl Serialize) -> Result<Vec<u8>, CommandError> {
    let mut line = serde_json::to_vec(value).map_err(|error| no_orders(error.into()))?;
    line.push(b'\n');
    Ok(line)
}

fn failed(role: &str, error: io::Error) -> CommandError {
    CommandError::failed(format!("the helper process {role}: {error}"))
}

fn no_orders(error: io::Error) -> CommandError {
    CommandError::failed(format!(
        "this command serves `poolbroker bench` and takes its orders from it: {error}"
    ))
}
