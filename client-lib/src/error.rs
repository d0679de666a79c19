//! How a call of the library failed.
//!
//! Every error names what was attempted and what to do, and answers two questions for programs:
//! [`Error::retry`] (may it be repeated?) and [`Error::reason`] (the broker's stable code).

use std::io;
use std::path::PathBuf;

use poolbroker_proto::address::UrlError;
use poolbroker_proto::frame::VERSION;
use poolbroker_proto::message::{Failure, Retry};
use poolbroker_proto::reason::Reason;
use poolbroker_proto::runtime_dir::RuntimeDirError;

/// How a call of the library failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No runtime directory is known, or its path is too long for a socket.
    #[error(transparent)]
    RuntimeDir(#[from] RuntimeDirError),
    /// No broker listens in the runtime directory.
    #[error(
        "no broker listens on {}; start one with `poolbroker serve --runtime-dir {}`",
        .path.display(),
        .path.parent().unwrap_or(.path).display()
    )]
    NoBroker {
        /// The socket that was tried.
        path: PathBuf,
    },
    /// This user may not connect to the broker's socket.
    #[error(
        "this user may not connect to {}; let the broker open it with `socket = {{ mode, group }}`",
        .path.display()
    )]
    PermissionDenied {
        /// The socket that was tried.
        path: PathBuf,
    },
    /// The broker speaks another version of the protocol.
    #[error(
        "the broker does not speak version {VERSION} of the protocol, as this client does \
         ({said}); install both from the same release"
    )]
    VersionMismatch {
        /// The broker's own words.
        said: String,
    },
    /// The name cannot be that of an upstream.
    #[error("{problem}")]
    InvalidName {
        /// What is wrong with it.
        problem: String,
    },
    /// The URL cannot be that of an upstream.
    #[error(transparent)]
    InvalidUrl(#[from] UrlError),
    /// The broker refused a session, an upstream or a descriptor.
    #[error("{call} was refused: {}", said(.failure))]
    Refused {
        /// What was asked for.
        call: String,
        /// The broker's answer.
        failure: Failure,
    },
    /// A request failed, or the broker refused it.
    #[error("request to {upstream:?} failed: {}; {}", said(.failure), retry_text(.failure.retry))]
    Failed {
        /// The name of the upstream.
        upstream: String,
        /// The broker's answer.
        failure: Failure,
    },
    /// The message has no bytes.
    #[error("a message to {upstream:?} is empty: send at least one byte")]
    Empty {
        /// The name of the upstream.
        upstream: String,
    },
    /// The message is longer than the upstream takes.
    #[error("a message of {bytes} bytes to {upstream:?} is too long: message_bytes_max is {max}")]
    TooLong {
        /// The name of the upstream.
        upstream: String,
        /// The length of the message.
        bytes: usize,
        /// The longest that goes.
        max: usize,
    },
    /// A request to a write-only upstream, whose replies nobody reads.
    #[error(
        "{upstream:?} is a udp-write-only upstream and takes no requests: its replies are \
         discarded; use `send`, or configure it as udp://"
    )]
    WriteOnly {
        /// The name of the upstream.
        upstream: String,
    },
    /// As many submitted requests as the broker allows are in flight or wait to be taken with
    /// [`Client::next_reply`](crate::Client::next_reply).
    #[error("{max} requests are in flight, as many as may be: take a reply before the next one")]
    TooManyInFlight {
        /// How many requests one client may have in flight.
        max: usize,
    },
    /// [`Client::next_reply`](crate::Client::next_reply) without a submitted request.
    #[error("no request is in flight, so no reply can come: submit one first")]
    NothingInFlight,
    /// A send that does not wait found no room for the whole message.
    #[error("there is no room for a message to {upstream:?} now; nothing of it was sent")]
    Full {
        /// The name of the upstream.
        upstream: String,
    },
    /// This process was forked from the one that connected by a ring, which stays the parent's:
    /// two senders would destroy it. Connect again in the child.
    #[error(
        "this process was forked from the one that connected, and the ring belongs to the parent; \
         connect again here"
    )]
    Forked,
    /// A ring of that size cannot be.
    #[error("a ring of {bytes} bytes is too large: it has {max} at most")]
    RingTooLarge {
        /// The size that was asked for, in bytes.
        bytes: usize,
        /// The largest one, in bytes.
        max: usize,
    },
    /// The deadline passed.
    #[error("{call} timed out: {why}; {}", retry_text(*.retry))]
    TimedOut {
        /// What was attempted.
        call: String,
        /// What it waited for.
        why: &'static str,
        /// Whether it may be repeated.
        retry: Retry,
    },
    /// The session with the broker has ended. Connect again.
    #[error("{call}: the session with the broker has ended ({said}); {}", retry_text(*.retry))]
    Disconnected {
        /// What was attempted.
        call: String,
        /// The broker's reason; `None` when it went without a word, as after SIGKILL.
        reason: Option<Reason>,
        /// What is known of the end, for people.
        said: String,
        /// Whether what was attempted may be repeated.
        retry: Retry,
    },
    /// The kernel refused a system call.
    #[error("{call}: {source}; {}", retry_text(*.retry))]
    Io {
        /// What was attempted.
        call: String,
        /// The kernel's answer.
        source: io::Error,
        /// Whether what was attempted may be repeated.
        retry: Retry,
    },
}

impl Error {
    /// Whether the operation that failed may be repeated without the risk of doing it twice.
    ///
    /// For a `send` that timed out, [`Retry::MaybeExecuted`] means: its beginning is in the socket
    /// already, and the next call finishes it. For `flush` and the other calls that only wait it
    /// is about the question, which may always be asked again; messages keep on their way.
    #[must_use]
    pub fn retry(&self) -> Retry {
        match self {
            Error::RuntimeDir(_)
            | Error::NoBroker { .. }
            | Error::PermissionDenied { .. }
            | Error::VersionMismatch { .. }
            | Error::InvalidName { .. }
            | Error::InvalidUrl(_)
            | Error::Empty { .. }
            | Error::TooLong { .. }
            | Error::WriteOnly { .. }
            | Error::TooManyInFlight { .. }
            | Error::NothingInFlight
            | Error::Full { .. }
            | Error::Forked
            | Error::RingTooLarge { .. } => Retry::NotSent,
            Error::Refused { failure, .. } | Error::Failed { failure, .. } => failure.retry,
            Error::TimedOut { retry, .. }
            | Error::Disconnected { retry, .. }
            | Error::Io { retry, .. } => *retry,
        }
    }

    /// The broker's stable code for this failure, or `None` where it has none: the broker was not
    /// reached, did not answer in time, or ended without a word.
    #[must_use]
    pub fn reason(&self) -> Option<Reason> {
        match self {
            Error::VersionMismatch { .. } => Some(Reason::VersionMismatch),
            Error::InvalidName { .. } => Some(Reason::UnknownUpstream),
            Error::InvalidUrl(_) => Some(Reason::InvalidUrl),
            Error::Refused { failure, .. } | Error::Failed { failure, .. } => Some(failure.reason),
            Error::Empty { .. } => Some(Reason::Empty),
            Error::TooLong { .. } => Some(Reason::TooLong),
            Error::WriteOnly { .. } => Some(Reason::WriteOnly),
            Error::Disconnected { reason, .. } => *reason,
            Error::RuntimeDir(_)
            | Error::NoBroker { .. }
            | Error::PermissionDenied { .. }
            | Error::TooManyInFlight { .. }
            | Error::NothingInFlight
            | Error::Full { .. }
            | Error::Forked
            | Error::RingTooLarge { .. }
            | Error::TimedOut { .. }
            | Error::Io { .. } => None,
        }
    }
}

fn said(failure: &Failure) -> &str {
    if failure.text.is_empty() { failure.reason.text() } else { &failure.text }
}

fn retry_text(retry: Retry) -> &'static str {
    match retry {
        Retry::NotSent => "nothing of it was sent",
        Retry::MaybeExecuted => "it may have been carried out",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_broker_is_told_with_the_command_that_starts_one() {
        let path = PathBuf::from("/run/poolbroker/broker.sock");
        assert_eq!(
            Error::NoBroker { path }.to_string(),
            "no broker listens on /run/poolbroker/broker.sock; \
             start one with `poolbroker serve --runtime-dir /run/poolbroker`"
        );
    }

    #[test]
    fn a_failure_without_text_is_told_by_its_reason() {
        let failed = |text: &str| Error::Failed {
            upstream: "echo".into(),
            failure: Failure {
                reason: Reason::UpstreamDown,
                retry: Retry::NotSent,
                text: text.into(),
            },
        };
        assert!(failed("").to_string().contains(Reason::UpstreamDown.text()));
        assert!(failed("no route to 10.0.0.1").to_string().contains("no route to 10.0.0.1"));
        assert_eq!(failed("").reason(), Some(Reason::UpstreamDown));
        assert_eq!(failed("").retry(), Retry::NotSent);
    }
}
