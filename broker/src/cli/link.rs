//! An open upstream that outlives its broker: connected anew when the broker was restarted.

use std::thread;
use std::time::{Duration, Instant};

use poolbroker_client::{Client, Error, Reason, Upstream};
use poolbroker_proto::runtime_dir::RuntimeDir;

use super::exit::CommandError;
use crate::config::{RECONNECT_PAUSE_MAX, RECONNECT_PAUSE_MIN};

/// An upstream of whichever broker serves the directory.
pub struct Link<'a> {
    dir: &'a RuntimeDir,
    timeout: Duration,
    upstream: Upstream,
}

impl<'a> Link<'a> {
    /// Connects to the broker that is there now, and opens `name`. Sends wait up to `timeout` for
    /// room, [`Link::reopen`] as long for a broker.
    pub fn open(dir: &'a RuntimeDir, name: &str, timeout: Duration) -> Result<Self, CommandError> {
        Ok(Link { dir, timeout, upstream: connect(dir, name, timeout)? })
    }

    /// The upstream, in the session with the present broker.
    pub fn upstream(&self) -> &Upstream {
        &self.upstream
    }

    /// How long a wait may take.
    pub fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Waits for the next broker and opens the upstream there.
    pub fn reopen(&mut self) -> Result<(), CommandError> {
        let start = Instant::now();
        let mut pause = RECONNECT_PAUSE_MIN;
        loop {
            match connect(self.dir, self.upstream.name(), self.timeout) {
                Ok(upstream) => {
                    self.upstream = upstream;
                    return Ok(());
                }
                Err(error) if is_between_brokers(&error) => {
                    let left = self.timeout.saturating_sub(start.elapsed());
                    if left.is_zero() {
                        let mut error = CommandError::from(error);
                        let timeout = humantime::Duration::from(self.timeout);
                        error.text = format!(
                            "the broker ended and did not come back within {timeout}: {}",
                            error.text
                        );
                        return Err(error);
                    }
                    thread::sleep(pause.min(left));
                    pause = RECONNECT_PAUSE_MAX.min(pause * 2);
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}

fn connect(dir: &RuntimeDir, name: &str, timeout: Duration) -> Result<Upstream, Error> {
    let client = Client::connect_in(dir.path())?;
    client.set_send_timeout(timeout);
    client.upstream(name)
}

/// Whether the next attempt may succeed by itself.
fn is_between_brokers(error: &Error) -> bool {
    match error {
        Error::NoBroker { .. } | Error::Disconnected { .. } | Error::TimedOut { .. } => true,
        error => error.reason().is_some_and(is_shutdown),
    }
}

/// Whether the broker ended in order, so that another one may follow.
pub fn is_shutdown(reason: Reason) -> bool {
    matches!(reason, Reason::ShuttingDown | Reason::Drained)
}
