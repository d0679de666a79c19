//! Replies: which a request has, and where they end.

use std::ops::Range;

use super::Framing;
use super::cutter::{Cut, Cutter, Tail};
use super::scan::{ReplyLook, Scan};
use crate::reason::Reason;

/// What reply a request has ([`Framing::classify`]).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// One, of this kind.
    One(Expect),
    /// One, of this kind, behind which the peer closes the connection because the request says so:
    /// nothing may follow it there.
    Last(Expect),
    /// None: it is done once it is written.
    None,
    /// It would change or occupy a connection that others share: [`Reason::Stateful`]. Or it is not
    /// one message of the framing: [`Reason::Malformed`].
    Refused {
        /// Which of the two.
        reason: Reason,
        /// What of it: `SUBSCRIBE`.
        what: String,
    },
}

/// The kind of a reply, where the protocol does not show it in the reply itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Expect {
    /// The reply shows by itself where it ends.
    #[default]
    Plain,
    /// HTTP: a header without a body, whatever it says of a length (HEAD; RFC 9112, section 6.3).
    HeaderOnly,
    /// memcached: values up to a line `END`.
    Values,
    /// memcached: `STAT` lines up to a line `END`, or one line.
    Stats,
    /// memcached: the reply of a meta command.
    Meta,
}

/// What stands at the start of the received bytes. Positions are relative to them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReplyCut {
    /// A complete reply.
    Reply {
        /// Where its body is.
        body: Range<usize>,
        /// Bytes to drop once the body is used.
        consumed: usize,
        /// The peer closes the connection behind it.
        closes: bool,
    },
    /// Something that nobody asked for and the protocol allows at any time (RESP3 push): to be
    /// dropped and counted.
    Push {
        /// Bytes to drop.
        consumed: usize,
    },
    /// Nothing complete: more bytes are needed.
    Incomplete,
    /// The connection cannot be read further: [`Reason::ReplyTooLong`], [`Reason::BadReply`] or,
    /// where no reply is expected, [`Reason::Unsolicited`].
    Broken(Reason),
}

/// Cuts what a connection receives into replies, each as its request has it.
#[derive(Debug, Clone)]
pub struct ReplyCutter {
    message_bytes_max: usize,
    way: Way,
}

#[derive(Debug, Clone)]
enum Way {
    /// Replies are messages like any other.
    Plain(Cutter),
    /// Replies are told apart from requests.
    Protocol { scan: Scan, is_until_close: bool },
}

impl ReplyCutter {
    /// A cutter for replies of up to `message_bytes_max` bytes.
    #[must_use]
    pub fn new(framing: Framing, message_bytes_max: usize) -> Self {
        let way = match framing {
            Framing::Resp | Framing::Memcached | Framing::Http1 => {
                Way::Protocol { scan: Scan::new(framing), is_until_close: false }
            }
            Framing::Lines
            | Framing::Crlf
            | Framing::Prefix { .. }
            | Framing::Length(_)
            | Framing::Fixed { .. }
            | Framing::Netstring
            | Framing::OctetCounted
            | Framing::Raw => Way::Plain(Cutter::new(framing, message_bytes_max)),
        };
        ReplyCutter { message_bytes_max, way }
    }

    /// What stands at the start of `bytes`, which begins where the last cut ended. `expect` is the
    /// reply that is awaited next, the same one until it came; none: nothing is awaited.
    pub fn next_reply(&mut self, expect: Option<Expect>, bytes: &[u8]) -> ReplyCut {
        if bytes.is_empty() {
            return ReplyCut::Incomplete;
        }
        match &mut self.way {
            Way::Plain(_) if expect.is_none() => ReplyCut::Broken(Reason::Unsolicited),
            Way::Plain(cutter) => match cutter.next_cut(bytes) {
                Cut::Message { body, consumed } => {
                    ReplyCut::Reply { body, consumed, closes: false }
                }
                Cut::Refused { .. } | Cut::Skipped { .. } => ReplyCut::Broken(Reason::ReplyTooLong),
                Cut::Incomplete => ReplyCut::Incomplete,
                Cut::Broken => ReplyCut::Broken(Reason::BadReply),
            },
            Way::Protocol { is_until_close: true, .. } if bytes.len() > self.message_bytes_max => {
                ReplyCut::Broken(Reason::ReplyTooLong)
            }
            Way::Protocol { is_until_close: true, .. } => ReplyCut::Incomplete,
            Way::Protocol { scan, is_until_close } => {
                match scan.next_reply(expect, bytes, self.message_bytes_max) {
                    ReplyLook::Reply { bytes, closes } => {
                        ReplyCut::Reply { body: 0..bytes, consumed: bytes, closes }
                    }
                    ReplyLook::Push { bytes } => ReplyCut::Push { consumed: bytes },
                    ReplyLook::Incomplete => ReplyCut::Incomplete,
                    ReplyLook::UntilClose => {
                        *is_until_close = true;
                        ReplyCut::Incomplete
                    }
                    ReplyLook::TooLong => ReplyCut::Broken(Reason::ReplyTooLong),
                    ReplyLook::Malformed if expect.is_none() => {
                        ReplyCut::Broken(Reason::Unsolicited)
                    }
                    ReplyLook::Malformed => ReplyCut::Broken(Reason::BadReply),
                }
            }
        }
    }

    /// Whether the reply that has begun ends with the connection, and nothing follows it.
    #[must_use]
    pub fn is_until_close(&self) -> bool {
        match &self.way {
            Way::Plain(_) => false,
            Way::Protocol { is_until_close, .. } => *is_until_close,
        }
    }

    /// The connection has ended: the reply that only its end completes, if `bytes` is one.
    pub fn finish(&mut self, bytes: &[u8]) -> Option<Range<usize>> {
        match &mut self.way {
            Way::Plain(cutter) => match cutter.finish(bytes) {
                // An unterminated line may have been cut off.
                Tail::Nothing | Tail::Message(_) | Tail::Partial => None,
            },
            Way::Protocol { is_until_close, .. } => {
                std::mem::take(is_until_close).then_some(0..bytes.len())
            }
        }
    }
}
