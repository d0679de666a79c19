//! How a command ended: one exit code, ordered so that the worst outcome wins.

use std::io::{self, Write};
use std::process::ExitCode;

use poolbroker_client::{Error, Outcomes, Reason, Retry};

/// The exit codes, from good to bad.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Exit {
    /// Everything was done.
    Done = 0,
    /// Something was refused or failed.
    Failed = 1,
    /// The command line or the configuration is wrong.
    Usage = 2,
    /// No broker is there.
    NoBroker = 3,
    /// Something timed out or expired.
    TimedOut = 4,
    /// Nobody can say whether a message arrived.
    InDoubt = 5,
}

/// What `--help` of every command says about them.
pub const EXIT_CODES: &str = "\
Exit codes, by the worst outcome:
  0  done
  1  refused or failed
  2  wrong usage or configuration
  3  no broker
  4  timed out or expired
  5  in doubt: it cannot be known whether the upstream received a message";

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        ExitCode::from(exit as u8)
    }
}

impl Exit {
    /// The verdict on one-way messages.
    pub fn of_outcomes(outcomes: &Outcomes) -> Exit {
        if outcomes.in_doubt + outcomes.untold > 0 {
            Exit::InDoubt
        } else if outcomes.expired > 0 {
            Exit::TimedOut
        } else if outcomes.dropped_total() + outcomes.refused_total() > 0 {
            Exit::Failed
        } else {
            Exit::Done
        }
    }

    /// The verdict on a request or an operation that ended for `reason`.
    pub fn of_reason(reason: Reason) -> Exit {
        if matches!(reason, Reason::RequestTimeout | Reason::WaitTimeout) {
            Exit::TimedOut
        } else {
            Exit::Failed
        }
    }
}

/// A command that could not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct CommandError {
    /// How the process ends.
    pub exit: Exit,
    /// What, which name, what to do.
    pub text: String,
}

impl CommandError {
    /// The command line is wrong.
    pub fn usage(text: impl Into<String>) -> Self {
        CommandError { exit: Exit::Usage, text: text.into() }
    }

    /// Something else went wrong.
    pub fn failed(text: impl Into<String>) -> Self {
        CommandError { exit: Exit::Failed, text: text.into() }
    }
}

impl From<Error> for CommandError {
    fn from(error: Error) -> Self {
        let exit = match &error {
            Error::RuntimeDir(_) | Error::InvalidName { .. } | Error::InvalidUrl(_) => Exit::Usage,
            Error::NoBroker { .. } => Exit::NoBroker,
            Error::TimedOut { .. } => Exit::TimedOut,
            Error::Disconnected { retry, .. } => match retry {
                Retry::NotSent => Exit::NoBroker,
                Retry::MaybeExecuted => Exit::InDoubt,
            },
            _ => error.reason().map_or(Exit::Failed, Exit::of_reason),
        };
        CommandError { exit, text: error.to_string() }
    }
}

/// Says what is wrong. A standard error that is closed changes nothing.
pub fn complain(text: &str) {
    let _ = writeln!(io::stderr().lock(), "poolbroker: {text}");
}

/// Says which one-way messages did not arrive, and why, one line each.
pub fn complain_of_outcomes(upstream: &str, outcomes: &Outcomes) {
    let problems = [("dropped", &outcomes.dropped), ("refused", &outcomes.refused)];
    for (verb, counts) in problems {
        for (reason, count) in counts.iter().filter(|(_, count)| *count > 0) {
            complain(&format!("{upstream}: {} {verb}: {reason}", messages(*count)));
        }
    }
    if outcomes.expired > 0 {
        complain(&format!(
            "{upstream}: {} expired: not sent within queue_timeout",
            messages(outcomes.expired)
        ));
    }
    if outcomes.in_doubt > 0 {
        complain(&format!(
            "{upstream}: {} in doubt: sent, but the connection ended before they were acknowledged",
            messages(outcomes.in_doubt)
        ));
    }
    if outcomes.untold > 0 {
        complain(&format!(
            "{upstream}: {} in doubt: the broker ended before it told what became of them, and not \
             every message was sent; they were not repeated",
            messages(outcomes.untold)
        ));
    }
}

/// "1 message", "2 messages".
pub fn messages(count: u64) -> String {
    match count {
        1 => "1 message".into(),
        _ => format!("{count} messages"),
    }
}

/// Writes to standard output. A reader that has left, as in `| head`, is no error.
pub fn print(bytes: &[u8]) -> Result<(), CommandError> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(CommandError::failed(format!("standard output cannot be written: {error}")))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_outcome_decides() {
        let mut outcomes = Outcomes::default();
        assert_eq!(Exit::of_outcomes(&outcomes), Exit::Done);
        outcomes.refused.push((Reason::TooLong, 1));
        assert_eq!(Exit::of_outcomes(&outcomes), Exit::Failed);
        outcomes.expired = 1;
        assert_eq!(Exit::of_outcomes(&outcomes), Exit::TimedOut);
        outcomes.in_doubt = 1;
        assert_eq!(Exit::of_outcomes(&outcomes), Exit::InDoubt);
        let untold = Outcomes { untold: 1, ..Outcomes::default() };
        assert_eq!(Exit::of_outcomes(&untold), Exit::InDoubt);
        assert_eq!(Exit::Failed.max(Exit::TimedOut), Exit::TimedOut);
    }
}
