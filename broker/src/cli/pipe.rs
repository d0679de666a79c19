//! `poolbroker pipe`: hands standard input itself to the broker.

use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;

use clap::Args;
use poolbroker_client::{Deadline, Detached, Error, Outcomes, Reason};
use poolbroker_proto::runtime_dir::RuntimeDir;

use super::delivery::merge;
use super::exit::{CommandError, Exit, complain, complain_of_outcomes};
use super::input::{standard_input, unreadable};
use super::link::{Link, is_shutdown};
use super::send::send_over;
use super::{after_help, timeout, upstream_name};
use crate::config::SEND_TIMEOUT;

/// Hand standard input to the broker; every line of it is one message.
///
/// In `producer | poolbroker pipe UPSTREAM` the broker reads the pipe: no byte passes through this
/// command, which waits until the producer is done and every message has its outcome. After a
/// restart the next broker goes on where the old one stopped. Anything but a pipe is read and sent
/// as by `poolbroker send`.
#[derive(Debug, Args)]
#[command(after_help = after_help(EXAMPLES))]
pub struct Pipe {
    /// The upstream, as configured
    #[arg(value_parser = upstream_name)]
    upstream: String,

    /// How long to wait for the broker to come back; the producer may take as long as it likes
    #[arg(long, value_name = "DURATION", value_parser = timeout, default_value_t = SEND_TIMEOUT.into())]
    timeout: humantime::Duration,
}

const EXAMPLES: &str = "\
Examples:
  producer | poolbroker pipe metrics
  seq 1000000 | poolbroker pipe metrics
  poolbroker pipe metrics < measurements.txt";

impl Pipe {
    /// Waits for the end of standard input and gives the verdict.
    pub fn run(&self, dir: &RuntimeDir) -> Result<Exit, CommandError> {
        let input = standard_input()?;
        let link = Link::open(dir, &self.upstream, *self.timeout)?;
        let is_pipe = input.metadata().map_err(unreadable)?.file_type().is_fifo();
        Ok(match is_pipe {
            true => hand_over(link, &input).unwrap_or_else(|exit| exit),
            false => send_over(link, None),
        })
    }
}

/// Lets one broker after the other read a pipe until its writers are done. `Err`: it was not read
/// to its end.
pub fn hand_over(mut link: Link<'_>, input: &impl AsFd) -> Result<Exit, Exit> {
    let mut outcomes = Outcomes::default();
    let mut exit = Exit::Done;
    let mut is_cut = false;
    let stopped = loop {
        match attach(&link, input, is_cut) {
            Ok(detached) => {
                let refused = &detached.outcomes.refused;
                is_cut = refused.iter().any(|(reason, _)| *reason == Reason::Partial);
                merge(&mut outcomes, detached.outcomes);
                match detached.reason {
                    Reason::EndOfInput => break Ok(()),
                    reason if is_shutdown(reason) => {}
                    reason => {
                        break Err(CommandError::failed(format!(
                            "the broker stopped reading: {reason}"
                        )));
                    }
                }
            }
            // The broker went before it could tell how the pipe's session ended.
            Err(Error::Disconnected { reason, .. }) if reason.is_none_or(is_shutdown) => {
                complain(&format!(
                    "{}: what the broker had read of the pipe is in doubt: it ended without \
                     saying what became of it",
                    link.upstream().name()
                ));
                exit = Exit::InDoubt;
                is_cut = false;
            }
            Err(error) => break Err(error.into()),
        }
        if let Err(error) = link.reopen() {
            break Err(error);
        }
    };
    let name = link.upstream().name();
    complain_of_outcomes(name, &outcomes);
    exit = exit.max(Exit::of_outcomes(&outcomes));
    stopped.map(|()| exit).map_err(|error| {
        complain(&format!("{name}: {}; the rest of the input was not read", error.text));
        exit.max(error.exit)
    })
}

/// Lets the broker read the pipe; `is_cut`: the last one ended in the middle of a line.
fn attach(link: &Link<'_>, input: &impl AsFd, is_cut: bool) -> Result<Detached, Error> {
    let attached = match is_cut {
        true => link.upstream().resume_pipe(input)?,
        false => link.upstream().attach_pipe(input)?,
    };
    attached.wait(Deadline::Never)
}
