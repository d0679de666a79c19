//! Control messages: everything on a client socket that is not a payload.
//!
//! Encoded with bincode 2.0.1, size-limited, trailing bytes rejected. This is the only file that
//! names bincode. A control message of a client carries a correlation id in its frame header and
//! is answered by exactly one control message or [`Failure`] with the same id.

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::address::Protocol;
use crate::frame::CONTROL_BYTES_MAX;
use crate::reason::Reason;

/// From the client to the broker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ClientMessage {
    /// Opens a configured upstream by name. Answered by [`BrokerMessage::Opened`].
    Open {
        /// The name of the upstream.
        name: String,
    },
    /// Opens an upstream by URL, where `[dynamic] allow` names its network.
    OpenUrl {
        /// As in the configuration: `udp-write-only://127.0.0.1:8125`.
        url: String,
    },
    /// Asks for [`BrokerMessage::Flushed`] once every message sent before has its outcome. The
    /// frame header names the upstream.
    Flush,
    /// Hands over one descriptor (attached to this frame) that the broker reads from now on as a
    /// session of its own. Answered by [`BrokerMessage::Attached`]; the frame header names the
    /// upstream.
    Attach {
        /// What the descriptor is.
        attachment: Attachment,
    },
    /// Asks for a pair of rings ([`crate::ring`]) before any upstream is opened; from the answer on
    /// every frame of the session but `Attach` goes through them. Answered by
    /// [`BrokerMessage::RingOpened`] with two descriptors: the memory and the doorbell.
    OpenRing {
        /// Bytes of each ring: a power of two.
        bytes: u64,
    },
    /// Hands over the pair of rings of a session with a broker that has ended: the memory is
    /// attached to this frame. What was not touched is taken as if it came now. Answered by
    /// [`BrokerMessage::RingOpened`] with one descriptor: the doorbell.
    ResumeRing {
        /// Bytes of each ring, as they were asked for.
        bytes: u64,
        /// The names or URLs of the upstreams that were open, in the order of their handles. One
        /// that there is no more keeps its handle, and what is sent to it is refused.
        upstreams: Vec<String>,
    },
    /// Asks for the loan of one connection of the upstream that the frame header names, until
    /// `timeout_ms` of the header have passed. Answered by [`BrokerMessage::Leased`]; whatever the
    /// answer is, it goes by the socket, also where there is a ring.
    Lease,
    /// The end of a loan. Not answered.
    Release {
        /// Which.
        lease: u64,
        /// The last exchange on it is complete: it may serve the next lease.
        is_clean: bool,
    },
}

/// What kind of descriptor a client hands over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Attachment {
    /// The read end of a pipe: each line is one one-way message.
    Pipe,
    /// The same, after another broker ended in the middle of a line: the rest of it is skipped.
    CutPipe,
    /// One end of a Unix stream socketpair: requests in, replies out, in the upstream's framing.
    Socketpair,
}

/// From the broker to the client.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum BrokerMessage {
    /// Answers the hello.
    Welcome {
        /// The session's id, as `poolbroker status` shows it.
        session: u64,
        /// How many requests may be in flight at once.
        requests_in_flight_max: u32,
    },
    /// Answers `Open` and `OpenUrl`.
    Opened {
        /// What the header of later frames names.
        handle: u16,
        /// What a client may do with it.
        protocol: Protocol,
        /// The longest message, in bytes.
        message_bytes_max: u64,
    },
    /// Answers `Flush`.
    Flushed(Outcomes),
    /// Answers `Attach`: the descriptor was taken.
    Attached {
        /// The session that now reads the descriptor.
        session: u64,
    },
    /// Unasked: a session that this client attached has ended, and every message it read has its
    /// outcome.
    Detached {
        /// The session of [`BrokerMessage::Attached`].
        session: u64,
        /// How it ended.
        reason: Reason,
        /// What became of its messages.
        outcomes: Outcomes,
    },
    /// Unasked, last: the broker reads nothing more from the session. What it had not taken was
    /// never seen and may be sent again elsewhere.
    Goodbye {
        /// Why.
        reason: Reason,
        /// Per handle the totals of the session: the first `accepted + refused` messages were
        /// taken.
        upstreams: Vec<(u16, Outcomes)>,
    },
    /// Answers `OpenRing` and `ResumeRing`.
    RingOpened {
        /// How often the pair was attached to a broker.
        epoch: u64,
    },
    /// Answers `Lease`, with the connected socket attached.
    Leased {
        /// What the release names.
        lease: u64,
    },
}

/// What became of the one-way messages of a session to one upstream, as totals since the upstream
/// was opened: `accepted = sent + dropped + expired + untold + queued`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcomes {
    /// Taken by the broker. Each copy of a broadcast counts.
    pub accepted: u64,
    /// Of those: copies beside the first one.
    pub copies: u64,
    /// Taken whole by the kernel.
    pub sent: u64,
    /// Given up, by reason.
    pub dropped: Vec<(Reason, u64)>,
    /// Waited longer than `queue_timeout`.
    pub expired: u64,
    /// Of those sent: the peer's kernel had not acknowledged them when the connection ended.
    pub in_doubt: u64,
    /// Never taken, by reason.
    pub refused: Vec<(Reason, u64)>,
    /// Taken by a broker that ended before it told what became of them, though not all of them can
    /// have been sent. Counted by the client library, for a ring that outlived its broker.
    pub untold: u64,
}

impl Outcomes {
    /// All dropped messages, whatever the reason.
    #[must_use]
    pub fn dropped_total(&self) -> u64 {
        self.dropped.iter().map(|(_, count)| count).sum()
    }

    /// All refused messages, whatever the reason.
    #[must_use]
    pub fn refused_total(&self) -> u64 {
        self.refused.iter().map(|(_, count)| count).sum()
    }

    /// Accepted messages without an outcome yet.
    #[must_use]
    pub fn queued(&self) -> u64 {
        let told = self.sent + self.dropped_total() + self.expired;
        self.accepted.saturating_sub(told + self.untold)
    }
}

/// Whether the upstream can have seen a request that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Retry {
    /// No byte of it left the broker: repeating it is safe.
    NotSent,
    /// Some or all of it left: it may have been executed.
    MaybeExecuted,
}

/// How a request or a control message failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// The stable code.
    pub reason: Reason,
    /// Whether it may be repeated.
    pub retry: Retry,
    /// For people: what, which name, which number, what to do.
    pub text: String,
}

/// Why bytes are not a control message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// bincode refuses them.
    #[error("not a control message of this version: {0}")]
    Malformed(String),
    /// Bytes are left over behind the message.
    #[error("{0} bytes are left over behind a control message")]
    Trailing(usize),
}

const WIRE: bincode::config::Configuration<
    bincode::config::LittleEndian,
    bincode::config::Varint,
    bincode::config::Limit<CONTROL_BYTES_MAX>,
> = bincode::config::standard().with_limit::<CONTROL_BYTES_MAX>();

/// Encodes a control message or a failure as the body of a frame.
///
/// # Errors
/// [`MessageError::Malformed`] when it exceeds [`CONTROL_BYTES_MAX`].
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, MessageError> {
    let body = bincode::serde::encode_to_vec(message, WIRE)
        .map_err(|error| MessageError::Malformed(error.to_string()))?;
    if body.len() > CONTROL_BYTES_MAX {
        return Err(MessageError::Malformed(format!("{} bytes are too long", body.len())));
    }
    Ok(body)
}

/// Decodes the body of a control or failure frame.
///
/// # Errors
/// Both variants of [`MessageError`].
pub fn decode<T: DeserializeOwned>(body: &[u8]) -> Result<T, MessageError> {
    let (message, read) = bincode::serde::decode_from_slice(body, WIRE)
        .map_err(|error| MessageError::Malformed(error.to_string()))?;
    match body.len() - read {
        0 => Ok(message),
        left => Err(MessageError::Trailing(left)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn messages_survive_the_wire() {
        let outcomes = Outcomes {
            accepted: 7,
            copies: 2,
            sent: 3,
            dropped: vec![(Reason::QueueFull, 2)],
            expired: 1,
            in_doubt: 1,
            refused: vec![(Reason::TooLong, 4)],
            untold: 1,
        };
        assert_eq!(outcomes.queued(), 0);
        let message = BrokerMessage::Detached { session: 9, reason: Reason::EndOfInput, outcomes };
        assert_eq!(decode::<BrokerMessage>(&encode(&message).unwrap()), Ok(message));
    }

    #[test]
    fn trailing_bytes_are_refused() {
        let mut body = encode(&ClientMessage::Flush).unwrap();
        body.push(0);
        assert_eq!(decode::<ClientMessage>(&body), Err(MessageError::Trailing(1)));
    }

    #[test]
    fn a_length_that_is_not_there_allocates_nothing() {
        // A string of 2^63 bytes announced in ten bytes of varint.
        let body = [0, 253, 255, 255, 255, 255, 255, 255, 255, 127];
        assert!(decode::<ClientMessage>(&body).is_err());
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = decode::<ClientMessage>(&bytes);
            let _ = decode::<BrokerMessage>(&bytes);
            let _ = decode::<Failure>(&bytes);
        }
    }
}
