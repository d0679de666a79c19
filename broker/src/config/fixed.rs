//! Numbers of policy that nobody has to set: bounds of the work per turn, queue lengths, patience.

use std::time::Duration;

use units::{DAY, KIB, MIB, ms, s};

/// The longest UDP payload over IPv4: 65,535 less 20 bytes of IP and 8 of UDP header.
pub const UDP_PAYLOAD_BYTES_MAX: usize = 65_507;

/// The longest separator of joined messages: room for a boundary, and none for a message.
pub const SEPARATOR_BYTES_MAX: usize = 16;

/// The longest message that any upstream can be configured to take.
pub const MESSAGE_BYTES_MAX: usize = 64 * MIB;

/// How long `send` and `pipe` wait for outcomes, or for the broker to come back, unless told.
pub const SEND_TIMEOUT: Duration = s(30);

/// Messages of `send` without an outcome: what is in doubt at most when a broker crashes. Large
/// enough that waiting for outcomes costs a few percent.
pub const SEND_CHUNK_MESSAGES_MAX: usize = 32_768;

/// Their bytes, which `send` keeps so that it can repeat what a broker never took.
pub const SEND_CHUNK_BYTES_MAX: usize = 4 * MIB;

/// Bytes that `send` hands over at once while it reads on: what a socket takes without waiting.
pub const SEND_BATCH_BYTES: usize = 16 * KIB;

/// How much of standard input is read at once.
pub const INPUT_BLOCK_BYTES: usize = 256 * KIB;

/// The pause before a vanished broker is looked for again; doubles up to the next.
pub const RECONNECT_PAUSE_MIN: Duration = ms(10);

/// The longest such pause: a restart is noticed soon and waiting for one costs nothing.
pub const RECONNECT_PAUSE_MAX: Duration = ms(250);

/// How long `request` waits for its reply unless told: about what a person or a script expects.
pub const REQUEST_TIMEOUT: Duration = s(1);

/// How long `status` waits for the broker's answer.
pub const STATUS_TIMEOUT: Duration = s(10);

/// The longest `--timeout`.
pub const TIMEOUT_MAX: Duration = DAY;

/// Messages that `demo` has on their way at once: 100 small datagrams take some 76 KiB of the
/// 208 KiB that a UDP socket may hold.
pub const DEMO_BATCH_MESSAGES: u64 = 100;

/// Batches of each scene of `demo`.
pub const DEMO_BATCHES: u64 = 10;

/// How long `demo` waits for any one thing.
pub const DEMO_TIMEOUT: Duration = s(10);

/// The longest write to a pipe that the kernel keeps in one piece (pipe(7)).
pub const PIPE_BUF: usize = 4_096;

/// How much a lifetime varies, so that connections opened together do not close together.
pub const LIFETIME_JITTER_PERCENT: u32 = 10;

/// Commands that may wait for the shard.
pub const COMMANDS_MAX: usize = 64;

/// How long the asker of `status` may take to ask and to read: the admin socket is served one by
/// one, by a thread that also has the signals.
pub const ADMIN_TIMEOUT: Duration = s(1);

/// How long the shard may take to answer: it copies its numbers between two turns.
pub const SHARD_TIMEOUT: Duration = s(5);

/// The longest question on the admin socket, in bytes.
pub const QUESTION_BYTES_MAX: usize = 256;

/// Events taken per turn.
pub const EVENTS_MAX: usize = 256;

/// How much of a client's own text is repeated to it (M24).
pub const CLIENT_TEXT_CHARS_MAX: usize = 64;

/// Runs of sources per turn, if fewer are ready: 2,048 messages, a fraction of a millisecond.
pub const RUNS_PER_TURN: usize = 32;

/// Clients accepted in a row before others have their turn.
pub const ACCEPTS_MAX: usize = 64;

/// How long the listener rests when no descriptor is left (R1).
pub const ACCEPT_PAUSE: Duration = ms(100);

/// How often the 32-bit drop counters of the kernel are read: at 10 Gbit/s of the smallest
/// replies they wrap after 290 s.
pub const DISCARD_INTERVAL: Duration = s(60);

/// What connections have to end in order once the time to drain is over.
pub const CLOSING_GRACE: Duration = s(1);

/// How long sources without quota for a buffer wait before they try again.
pub const STARVED_PAUSE: Duration = ms(10);

/// Reads of one connection in a row before others have their turn.
pub const READS_MAX: usize = 16;

/// Batches of datagrams sent in a row before others have their turn.
pub const BATCHES_MAX: usize = 64;

/// Connections the kernel keeps for us between two turns (R7); net.core.somaxconn caps it.
pub const BACKLOG: i32 = 4_096;

/// The most upstreams one session may open: handles are 16 bits, and each has a ledger.
pub const HANDLES_MAX: usize = 4_096;

/// Bytes of a fresh receive buffer: what a pipe holds by default (pipe(7)).
pub const RECEIVE_BYTES: usize = 64 * KIB;

/// How many receive buffers are kept for reuse; more are freed.
pub const SPARES_MAX: usize = 16;

/// More addresses of one name than this are left out.
pub const ADDRESSES_MAX: usize = 16;

/// Names that may wait for the thread at once.
pub const RESOLVER_QUEUE_MAX: usize = 4_096;

/// Descriptors that may wait for the thread; more wait with the shard.
pub const CLOSER_QUEUE_MAX: usize = 1_024;

/// How long the admin socket rests when a client of it cannot be accepted, in milliseconds.
pub const ADMIN_REST_MS: u16 = 100;

/// How many upstreams are named to a client that asks for one that does not exist.
pub const NAMES_TOLD_MAX: usize = 32;

/// Lines of the log that may wait to be written; more are dropped (R10).
pub const LOG_LINES_MAX: usize = 1_024;

/// The average gap up to which a source is napped for rather than woken by: where two naps cost as
/// much as one doorbell (`waiting.rs`).
pub const STAY_GAP: Duration = ms(1);

/// Naps without a message after which a source is asleep.
pub const PATIENCE_NAPS: u32 = 4;

/// The shortest nap: what a timer can hit.
pub const NAP_MIN: Duration = Duration::from_micros(60);

/// How long `busy_poll = "auto"` polls: half of what a wake-up takes.
pub const POLL_MAX: Duration = Duration::from_micros(20);

/// Units in which numbers of policy are written.
pub(super) mod units {
    use std::time::Duration;

    pub(in crate::config) const fn ms(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    pub(in crate::config) const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    pub(in crate::config) const NONE: Duration = Duration::ZERO;
    pub(in crate::config) const DAY: Duration = Duration::from_secs(86_400);
    pub(in crate::config) const KIB: usize = 1024;
    pub(in crate::config) const MIB: usize = 1024 * KIB;
}
