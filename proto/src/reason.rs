//! Why something ended: one closed set for connections, sessions, messages and requests.
//!
//! The name of a reason is its counter in `status --json` (`dropped`, `refused`, `failed`,
//! `connections_closed`), its text goes to logs and error messages, and the reason itself crosses
//! the client socket as the stable code of a failure. New reasons are appended.

use serde::{Deserialize, Serialize};

macro_rules! reasons {
    ($($variant:ident $name:literal $text:literal;)*) => {
        /// Why a connection or session was closed, or a message or request did not succeed.
        #[derive(
            Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
        )]
        #[repr(u8)]
        pub enum Reason {
            $(#[doc = $text] $variant,)*
        }

        impl Reason {
            /// Every reason, in the order of the wire.
            pub const ALL: &'static [Reason] = &[$(Reason::$variant),*];

            /// The counter's name: stable, snake case.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Reason::$variant => $name),* }
            }

            /// What happened, as a sentence without a subject's name.
            #[must_use]
            pub const fn text(self) -> &'static str {
                match self { $(Reason::$variant => $text),* }
            }
        }
    };
}

reasons! {
    // A message never got in.
    Empty "empty" "the message has no bytes";
    TooLong "too_long" "the message is longer than message_bytes_max";
    Partial "partial" "the message was cut off before its end";
    Delimiter "delimiter" "the message contains the delimiter of the upstream's framing";
    WrongSize "wrong_size" "the message does not have the size of the upstream's fixed framing";
    BadFrame "bad_frame" "the bytes are not a frame of this protocol";
    VersionMismatch "version_mismatch" "client library and broker speak different versions";
    UnknownUpstream "unknown_upstream" "no upstream of that name or handle is configured";
    InvalidUrl "invalid_url" "the URL of the upstream cannot be used";
    NotAllowed "not_allowed" "the policy of the broker does not allow this";
    WriteOnly "write_only" "the upstream is write-only: it takes sends, and its replies are discarded";
    NoFraming "no_framing" "the upstream has framing=raw, so a reply has no end: requests need a framing";
    Quota "quota" "a quota of this user is used up";
    DuplicateId "duplicate_id" "the correlation id is already in use";
    ShuttingDown "shutting_down" "the broker is shutting down";
    // A passed descriptor.
    BadDescriptor "bad_descriptor" "the passed descriptor is not of a kind that can be read here";
    UnexpectedDescriptor "unexpected_descriptor" "descriptors arrived that no message announced";
    DescriptorMissing "descriptor_missing" "the message announces a descriptor that did not arrive";
    // A one-way message was given up.
    QueueFull "queue_full" "the queue of the upstream is full";
    Enobufs "enobufs" "the local network queue stayed full (ENOBUFS)";
    TooBig "too_big" "the datagram is larger than the path or the kernel takes (EMSGSIZE)";
    SendError "send_error" "the kernel refused to send the message";
    DrainTimeout "drain_timeout" "the broker stopped before the message could be sent";
    // A request was refused or failed.
    WaitersFull "waiters_full" "as many requests wait for a connection as waiters_max allows";
    WaitTimeout "wait_timeout" "no connection became free within wait_timeout";
    RequestTimeout "request_timeout" "no complete reply within the request's deadline";
    UpstreamDown "upstream_down" "the upstream cannot be reached";
    ConnectionLost "connection_lost" "the connection ended before the reply was complete";
    ReplyTooLong "reply_too_long" "the reply is longer than message_bytes_max";
    ReplyUndeliverable "reply_undeliverable" "the client does not read its replies";
    // A connection ended.
    ConnectTimeout "connect_timeout" "no connection within connect_timeout";
    ConnectRefused "connect_refused" "the upstream refused the connection";
    ConnectError "connect_error" "the connection could not be opened";
    NoPorts "no_ports" "no local port is free for another connection";
    Unresolved "unresolved" "the host name has no address that may be used";
    PeerClosed "peer_closed" "the upstream closed the connection";
    PeerReset "peer_reset" "the upstream reset the connection or vanished";
    IdleTimeout "idle_timeout" "the connection was idle for idle_timeout";
    Lifetime "lifetime" "the connection reached its lifetime";
    UsesMax "uses_max" "the connection carried requests_per_connection_max requests";
    Unsolicited "unsolicited" "bytes arrived that no request asked for";
    BadReply "bad_reply" "the reply does not follow the upstream's framing";
    Stalled "stalled" "the upstream took no bytes for queue_timeout";
    LateReplyWindow "late_reply_window" "a retired socket was kept until late replies could no longer come";
    MakeRoom "make_room" "the connection made room for one of the other role";
    // A session ended.
    ClientGone "client_gone" "the client closed its end";
    EndOfInput "end_of_input" "the writer closed the pipe";
    HandshakeTimeout "handshake_timeout" "no handshake within handshake_timeout";
    PartialTimeout "partial_timeout" "an unfinished message was not continued within partial_timeout";
    RequestFailed "request_failed" "a request of a socketpair failed, which its stream cannot express";
    ReadError "read_error" "the session's descriptor could not be read";
    Drained "drained" "the broker shut down after it had sent everything";
    Internal "internal" "the broker made a mistake; please report it";
    // A ring.
    BadRing "bad_ring" "the passed memory is not a ring of this release";
    RingAttached "ring_attached" "the ring is attached to a session already";
    RingCorrupt "ring_corrupt" "what stands in the client's ring does not make sense";
    // A request that its framing knows.
    Stateful "stateful" "the request would change or occupy a connection that others share";
    Malformed "malformed" "the bytes are not one complete message of the upstream's framing";
    // A connection's beginning and end.
    OnConnect "on_connect" "a request of on_connect did not get the reply it expects";
    ReplyEndsConnection "reply_ends_connection" "the upstream said that it closes the connection behind its reply";
    Stuck "stuck" "the replies of requests that nobody awaits any more did not come either";
    AddressGone "address_gone" "the host name does not resolve to this address any more";
    // A broadcast.
    Broadcast "broadcast" "the upstream sends to all of its hosts: it takes sends only";
    // A lease.
    LeaseExpired "lease_expired" "the lease was not given back by its deadline";
    LeaseEnded "lease_ended" "the lease ended without giving the connection back";
    LeaseUnclean "lease_unclean" "the connection was given back with bytes unread or unsent";
    DescriptorsFull "descriptors_full" "as many descriptors are on their way to clients as the kernel allows";
    // A connection's end.
    RequestEndsConnection "request_ends_connection" "a request asked the upstream to close the connection behind its reply";
}

impl Reason {
    /// The reason's place in [`Reason::ALL`].
    #[must_use]
    pub const fn index(self) -> usize {
        self as usize
    }
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.text())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_indices_match_the_table() {
        for (index, reason) in Reason::ALL.iter().enumerate() {
            assert_eq!(reason.index(), index);
            let same = Reason::ALL.iter().filter(|other| other.name() == reason.name()).count();
            assert_eq!(same, 1, "{}", reason.name());
        }
    }
}
