//! Looking for the end of one message of a framing whose messages show their own ends.

use std::ops::Range;

use super::{Expect, Framing, LengthField, decimal, http1, memcached, resp};

/// What one look at the start of the unread bytes gave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Look {
    /// A message: its body, and how many bytes it takes.
    Message {
        /// Where the body is.
        body: Range<usize>,
        /// Bytes to drop once the body is used.
        consumed: usize,
    },
    /// More bytes are needed.
    Incomplete,
    /// It is longer than the limit.
    TooLong {
        /// Bytes of the whole message, where they are known.
        bytes: Option<usize>,
    },
    /// It is no message of the framing.
    Malformed,
}

/// What one look at the start of received replies gave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum ReplyLook {
    /// The reply, which is `bytes` long. `closes`: the peer closes the connection behind it.
    Reply {
        /// How long it is.
        bytes: usize,
        /// Whether the connection ends with it.
        closes: bool,
    },
    /// Something of so many bytes that nobody asked for, and that the protocol allows at any time.
    Push {
        /// How long it is.
        bytes: usize,
    },
    /// More bytes are needed.
    Incomplete,
    /// Everything up to the end of the connection belongs to the reply.
    UntilClose,
    /// It is longer than the limit.
    TooLong,
    /// It is no reply of the protocol.
    Malformed,
}

/// How far one message has been looked through; kept between looks at the same, growing bytes.
#[derive(Debug, Clone)]
pub(super) enum Scan {
    Stateless(Stateless),
    Resp(resp::Scan),
    Memcached(memcached::Scan),
    Http1(http1::Scan),
}

/// Framings whose messages show their length in their first bytes: each look starts afresh.
#[derive(Debug, Clone, Copy)]
pub(super) enum Stateless {
    /// Not scanned here.
    Other,
    Length(LengthField),
    Netstring,
    OctetCounted,
}

impl Scan {
    pub(super) fn new(framing: Framing) -> Self {
        match framing {
            Framing::Length(field) => Scan::Stateless(Stateless::Length(field)),
            Framing::Netstring => Scan::Stateless(Stateless::Netstring),
            Framing::OctetCounted => Scan::Stateless(Stateless::OctetCounted),
            Framing::Resp => Scan::Resp(resp::Scan::default()),
            Framing::Memcached => Scan::Memcached(memcached::Scan::default()),
            Framing::Http1 => Scan::Http1(http1::Scan::default()),
            Framing::Lines
            | Framing::Crlf
            | Framing::Prefix { .. }
            | Framing::Fixed { .. }
            | Framing::Raw => Scan::Stateless(Stateless::Other),
        }
    }

    /// The request that stands at the start of `bytes`, of up to `bytes_max` bytes.
    pub(super) fn next_request(&mut self, bytes: &[u8], bytes_max: usize) -> Look {
        match self {
            Scan::Stateless(Stateless::Length(field)) => field.look(bytes, bytes_max),
            Scan::Stateless(Stateless::Netstring) => decimal::look_netstring(bytes, bytes_max),
            Scan::Stateless(Stateless::OctetCounted) => {
                decimal::look_octet_counted(bytes, bytes_max)
            }
            Scan::Stateless(Stateless::Other) => Look::Malformed,
            Scan::Resp(scan) => scan.next_request(bytes, bytes_max),
            Scan::Memcached(scan) => scan.next_request(bytes, bytes_max),
            Scan::Http1(scan) => scan.next_request(bytes, bytes_max),
        }
    }

    /// The reply of that kind that stands at the start of `bytes`; none is expected: only what the
    /// protocol allows at any time. Only for those that are not [`Stateless`].
    pub(super) fn next_reply(
        &mut self,
        expect: Option<Expect>,
        bytes: &[u8],
        bytes_max: usize,
    ) -> ReplyLook {
        match self {
            Scan::Stateless(_) => ReplyLook::Malformed,
            Scan::Resp(scan) => scan.next_reply(expect, bytes, bytes_max),
            Scan::Memcached(scan) => scan.next_reply(expect, bytes, bytes_max),
            Scan::Http1(scan) => scan.next_reply(expect, bytes, bytes_max),
        }
    }
}
