//! `poolbroker send`: one-way messages from the arguments or from standard input.

use std::ffi::OsString;
use std::io::{self, Read};
use std::thread;

use clap::{Args, ValueEnum};
use poolbroker_client::Reason;
use poolbroker_proto::runtime_dir::RuntimeDir;

use super::delivery::Delivery;
use super::exit::{CommandError, Exit};
use super::fifo::{one_line, send_by_fifo};
use super::input::{TakeLines, read_lines, standard_input, unreadable};
use super::link::Link;
use super::patient_pipe::PatientPipe;
use super::pipe::hand_over;
use super::ring_delivery::RingDelivery;
use super::{after_help, timeout, upstream_name};
use crate::config::{INPUT_BLOCK_BYTES, SEND_TIMEOUT};

/// Send one-way messages and wait until each has its outcome.
///
/// Without MESSAGE every line of standard input is one message. A restart of the broker is waited
/// for; what the old broker never took goes to the new one.
#[derive(Debug, Args)]
#[command(after_help = after_help(EXAMPLES))]
pub struct Send {
    /// The upstream, as configured
    #[arg(value_parser = upstream_name)]
    upstream: String,

    /// The message; without it, every line of standard input
    message: Option<OsString>,

    /// How the messages reach the broker
    #[arg(long, value_enum, default_value_t = Via::Unix)]
    via: Via,

    /// How long to wait for outcomes, for room, or for the broker to come back
    #[arg(long, value_name = "DURATION", value_parser = timeout, default_value_t = SEND_TIMEOUT.into())]
    timeout: humantime::Duration,
}

const EXAMPLES: &str = "\
Examples:
  poolbroker send metrics 'page.views:1|c'
  journalctl -b | poolbroker send logs --timeout 5m
  poolbroker send metrics --via fifo 'page.views:1|c'";

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Via {
    /// The client socket
    Unix,
    /// A ring in shared memory, which the next broker takes over
    Ring,
    /// A pipe that the broker reads
    Pipe,
    /// The upstream's FIFO; done means here that the FIFO took the message
    Fifo,
}

impl Send {
    /// Sends everything and gives the verdict.
    pub fn run(self, dir: &RuntimeDir) -> Result<Exit, CommandError> {
        let message = self.message.as_ref().map(|message| message.as_encoded_bytes());
        let timeout = *self.timeout;
        match self.via {
            Via::Unix => {
                let link = Link::open(dir, &self.upstream, timeout)?;
                Ok(send_over(link, message))
            }
            Via::Ring => {
                let mut delivery = RingDelivery::open(dir, &self.upstream, timeout)?;
                let sent = match message {
                    Some(message) => delivery.push(message),
                    None => read_all_lines(delivery.message_bytes_max(), &mut delivery),
                };
                let settled = sent.and_then(|()| delivery.settle());
                Ok(delivery.finish(settled))
            }
            Via::Pipe => send_by_pipe(Link::open(dir, &self.upstream, timeout)?, message),
            Via::Fifo => send_by_fifo(&dir.fifo(&self.upstream), message, timeout),
        }
    }
}

/// Sends `message`, or every line of standard input, over a link.
pub fn send_over(link: Link<'_>, message: Option<&[u8]>) -> Exit {
    let mut delivery = Delivery::new(link);
    let sent = match message {
        Some(message) => delivery.push(message),
        None => read_all_lines(delivery.message_bytes_max(), &mut delivery),
    };
    let settled = sent.and_then(|()| delivery.settle());
    delivery.finish(settled)
}

fn read_all_lines(line_bytes_max: usize, taker: &mut impl TakeLines) -> Result<(), CommandError> {
    read_lines(line_bytes_max, taker).map_err(|mut error| {
        error.text.push_str("; the rest of standard input was not read");
        error
    })
}

impl TakeLines for Delivery<'_> {
    fn take(&mut self, line: &[u8]) -> Result<(), CommandError> {
        self.push(line)
    }

    fn refuse(&mut self, reason: Reason) {
        Delivery::refuse(self, reason);
    }

    /// Whoever writes the input may take long: until then nothing stays without its outcome.
    fn pause(&mut self) -> Result<(), CommandError> {
        self.settle()
    }
}

/// Writes to a pipe that the broker reads; its read end stays here too, for the next broker.
fn send_by_pipe(link: Link<'_>, message: Option<&[u8]>) -> Result<Exit, CommandError> {
    let line = message.map(one_line).transpose()?;
    let (reader, writer) = io::pipe()
        .map_err(|error| CommandError::failed(format!("no pipe can be made: {error}")))?;
    let mut pipe = PatientPipe::new(writer.into(), link.timeout())?;
    let writing = thread::spawn(move || match line {
        Some(line) => pipe.write(&line),
        None => copy_input(&mut pipe),
    });
    let exit = match hand_over(link, &reader) {
        Ok(exit) => exit,
        // Not read to its end: the writer may wait for input that never comes.
        Err(exit) => return Ok(exit),
    };
    let written = writing.join().unwrap_or_else(|_| {
        Err(CommandError::failed("reading the input failed: a defect of poolbroker"))
    });
    written.map(|()| exit)
}

fn copy_input(pipe: &mut PatientPipe) -> Result<(), CommandError> {
    let mut input = standard_input()?;
    let mut block = vec![0; INPUT_BLOCK_BYTES];
    loop {
        match input.read(&mut block) {
            Ok(0) => return Ok(()),
            Ok(read) => pipe.write(&block[..read])?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(unreadable(error)),
        }
    }
}
