//! What `status` shows: one copy of every number, made by the shard, formatted by `control`.
//!
//! The fields are the JSON of DESIGN.md section 8; it is only ever added to.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Serialize;

use crate::stats::Tally;

/// Counts by the name of their reason.
pub type ByReason = BTreeMap<&'static str, u64>;

/// Everything.
#[derive(Debug, Serialize)]
pub struct Snapshot {
    /// Of the broker.
    pub version: &'static str,
    /// Of the broker.
    pub pid: u32,
    /// Since the start.
    pub uptime_s: u64,
    /// Where its sockets and FIFOs are.
    pub runtime_dir: PathBuf,
    /// `running` or `draining`.
    pub state: &'static str,
    /// In the order of the configuration.
    pub upstreams: Vec<UpstreamSnapshot>,
    /// The client socket and the FIFOs.
    pub listeners: Vec<ListenerSnapshot>,
    /// Attached processes and pipes.
    pub sessions: Vec<SessionSnapshot>,
}

/// One upstream.
#[derive(Debug, Serialize)]
pub struct UpstreamSnapshot {
    /// From the configuration, or the URL of one opened by URL.
    pub name: String,
    /// Whether its messages go to all of its hosts: they are counted there, under `NAME@HOST:PORT`.
    pub is_broadcast: bool,
    /// The protocol type.
    pub protocol: &'static str,
    /// What its hosts were resolved to.
    pub addresses: Vec<String>,
    /// How each of those fares.
    pub address_health: Vec<AddressSnapshot>,
    /// How its host names were resolved; literal addresses need none.
    pub names: Vec<NameSnapshot>,
    /// How replies to one-way messages are discarded.
    pub discard: &'static str,
    /// Replies that were discarded.
    pub replies_discarded: u64,
    /// `closed`, `open` or `half-open`.
    pub breaker: &'static str,
    /// Why the last connect failed, while none has succeeded since.
    pub last_failure: Option<&'static str>,
    /// One-way messages taken.
    pub accepted: u64,
    /// Of those: taken whole by the kernel.
    pub sent: u64,
    /// Of those: given up.
    pub dropped: ByReason,
    /// Of those: waited too long.
    pub expired: u64,
    /// Of those: waiting.
    pub queued: u64,
    /// Of those sent: not acknowledged when their connection ended.
    pub in_doubt: u64,
    /// Sent again after a crash.
    pub redelivered: u64,
    /// ICMP errors received for datagrams.
    pub icmp_refused: u64,
    /// Requests asked.
    pub requests: u64,
    /// Of those: answered.
    pub replied: u64,
    /// Of those: ended by a deadline.
    pub timed_out: u64,
    /// Of those: never put on a connection.
    pub refused: ByReason,
    /// Of those: failed otherwise.
    pub failed: ByReason,
    /// Of those: not ended.
    pub in_flight: u64,
    /// Of those: waiting for a connection.
    pub waiters: u64,
    /// How long the first of them has waited.
    pub maxwait_ms: u64,
    /// Put on another connection though they had been sent.
    pub retried: u64,
    /// Datagrams sent again for want of a reply.
    pub retransmitted: u64,
    /// What became of leases.
    pub leases: LeaseSnapshot,
    /// Open now.
    pub connections: Vec<ConnectionSnapshot>,
    /// Opened so far.
    pub connections_opened: u64,
    /// Closed so far.
    pub connections_closed: ByReason,
}

/// One address of an upstream.
#[derive(Debug, Serialize)]
pub struct AddressSnapshot {
    /// With its port.
    pub address: String,
    /// `closed`, `open` or `half-open`.
    pub breaker: &'static str,
    /// Requests on its connections.
    pub outstanding: usize,
    /// Connections to it that are up or under way.
    pub connections: usize,
    /// Failures in a row.
    pub failures: u32,
    /// Why the last one happened, while there are any.
    pub last_failure: Option<&'static str>,
}

/// One host name of an upstream.
#[derive(Debug, Serialize)]
pub struct NameSnapshot {
    /// With its port.
    pub name: String,
    /// How often it was looked up.
    pub lookups: u64,
    /// How often that gave no address that may be used.
    pub failures: u64,
    /// How long the last lookup took.
    pub lookup_ms: u64,
    /// Since the end of that.
    pub age_s: u64,
    /// Addresses that are used of it, from the last lookup that succeeded.
    pub addresses: usize,
    /// Why the last one failed.
    pub error: Option<String>,
}

/// The leases of one upstream: `asked = granted + refused + waiting` and
/// `granted = returned + ended + held`.
#[derive(Debug, Serialize)]
pub struct LeaseSnapshot {
    /// All that clients asked for.
    pub asked: u64,
    /// Given a connection.
    pub granted: u64,
    /// Given back clean.
    pub returned: u64,
    /// Held now.
    pub held: u64,
    /// Waited for now.
    pub waiting: u64,
    /// Never granted.
    pub refused: ByReason,
    /// Ended without being given back clean.
    pub ended: ByReason,
}

/// One connection.
#[derive(Debug, Serialize)]
pub struct ConnectionSnapshot {
    /// The protocol type.
    pub protocol: &'static str,
    /// `exchange` or `one_way`.
    pub role: &'static str,
    /// The upstream's address.
    pub remote: String,
    /// Ours.
    pub local: Option<String>,
    /// The file descriptor in the broker.
    pub fd: i32,
    /// Where it is in its life.
    pub state: &'static str,
    /// Since its connect began.
    pub age_s: u64,
    /// Requests or sends.
    pub uses: u64,
    /// Messages sent.
    pub messages_out: u64,
    /// Bytes sent.
    pub bytes_out: u64,
    /// Replies delivered.
    pub messages_in: u64,
    /// Bytes received.
    pub bytes_in: u64,
    /// Replies nobody had asked for.
    pub replies_discarded: u64,
    /// Whose request it carries.
    pub session: Option<u64>,
}

/// One local entrance.
#[derive(Debug, Serialize)]
pub struct ListenerSnapshot {
    /// `unix` or `fifo`.
    pub kind: &'static str,
    /// Its path.
    pub path: PathBuf,
    /// Where its messages go, for a FIFO.
    pub upstream: Option<String>,
    /// Messages taken, or clients for the client socket.
    pub accepted: u64,
    /// What never got in.
    pub refused: ByReason,
}

/// One session.
#[derive(Debug, Serialize)]
pub struct SessionSnapshot {
    /// Its id.
    pub id: u64,
    /// Of the process, when it connected.
    pub pid: i32,
    /// Of its user.
    pub uid: u32,
    /// Its medium.
    pub transport: &'static str,
    /// One-way messages taken.
    pub accepted: u64,
    /// What never got in.
    pub refused: ByReason,
    /// Bytes held for it: received and not taken, or not yet read by it.
    pub queued_bytes: u64,
    /// Requests without an end.
    pub in_flight: u64,
}

/// The counts that are not zero.
pub fn by_reason(tally: &Tally) -> ByReason {
    tally.iter().map(|(reason, count)| (reason.name(), count)).collect()
}
