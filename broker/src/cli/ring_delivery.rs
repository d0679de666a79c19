//! One-way messages on their way to one upstream by a ring, followed until each has its outcome.
//!
//! The ring outlives a broker, and the client library goes on with the next one: nothing is kept
//! here, and nothing is sent again.

use std::time::Duration;

use poolbroker_client::{Client, Error, Outcomes, Reason, Transport, Upstream};
use poolbroker_proto::runtime_dir::RuntimeDir;

use super::delivery::{add, merge};
use super::exit::{CommandError, Exit, complain, complain_of_outcomes, messages};
use super::input::TakeLines;

/// Messages on their way. [`RingDelivery::finish`] gives the verdict.
pub struct RingDelivery {
    upstream: Upstream,
    timeout: Duration,
    outcomes: Outcomes,
    /// Handed over up to the last flush.
    settled: u64,
}

impl RingDelivery {
    /// Connects to the broker that is there now, and opens `name`. Every wait lasts up to `timeout`.
    pub fn open(dir: &RuntimeDir, name: &str, timeout: Duration) -> Result<Self, CommandError> {
        let client = Client::connect_in_with(dir.path(), Transport::RING)?;
        client.set_send_timeout(timeout);
        let upstream = client.upstream(name)?;
        Ok(RingDelivery { upstream, timeout, outcomes: Outcomes::default(), settled: 0 })
    }

    /// The longest message that goes.
    pub fn message_bytes_max(&self) -> usize {
        self.upstream.message_bytes_max()
    }

    /// Hands a message over.
    pub fn push(&mut self, message: &[u8]) -> Result<(), CommandError> {
        match message.len() {
            0 => add(&mut self.outcomes.refused, Reason::Empty, 1),
            bytes if bytes > self.message_bytes_max() => {
                add(&mut self.outcomes.refused, Reason::TooLong, 1);
            }
            _ => self.upstream.send(message)?,
        }
        Ok(())
    }

    /// Waits until each message has its outcome.
    pub fn settle(&mut self) -> Result<(), CommandError> {
        if self.upstream.handed_over() == self.settled {
            return Ok(());
        }
        match self.upstream.flush(self.timeout) {
            Ok(outcomes) => merge(&mut self.outcomes, outcomes),
            Err(error @ Error::TimedOut { .. }) => {
                let name = self.upstream.name();
                let timeout = humantime::Duration::from(self.timeout);
                let text = format!(
                    "{name}: no outcome within {timeout}: is the upstream or the broker down? \
                     `poolbroker status` shows it"
                );
                return Err(CommandError { exit: CommandError::from(error).exit, text });
            }
            Err(error) => return Err(error.into()),
        }
        self.settled = self.upstream.handed_over();
        Ok(())
    }

    /// Says what went wrong, together with what stopped the command, and gives the verdict.
    pub fn finish(self, stopped: Result<(), CommandError>) -> Exit {
        let name = self.upstream.name();
        complain_of_outcomes(name, &self.outcomes);
        let mut exit = Exit::of_outcomes(&self.outcomes);
        if let Err(error) = stopped {
            complain(&error.text);
            exit = exit.max(error.exit);
            let unsettled = self.upstream.handed_over() - self.settled;
            if unsettled > 0 {
                let count = messages(unsettled);
                complain(&format!("{name}: {count} handed over, whose outcomes are not all known"));
            }
        }
        exit
    }
}

impl TakeLines for RingDelivery {
    fn take(&mut self, line: &[u8]) -> Result<(), CommandError> {
        self.push(line)
    }

    fn refuse(&mut self, reason: Reason) {
        add(&mut self.outcomes.refused, reason, 1);
    }

    /// Whoever writes the input may take long: until then nothing stays without its outcome.
    fn pause(&mut self) -> Result<(), CommandError> {
        self.settle()
    }
}
