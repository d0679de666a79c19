//! Numbers of policy that nobody has to set: bounds of the work per turn, queue lengths, patience.

use std::num::NonZeroU64;
use std::time::Duration;

use units::{DAY, KIB, MIB, ms, rate, s};

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

/// How long `demo` and `bench` wait for a broker of their own to come up, or to end.
pub const CHILD_BROKER_TIMEOUT: Duration = s(10);

/// Rounds of `bench`: fewer give no median worth its name on a noisy machine.
pub const BENCH_ROUNDS: usize = 7;

/// The most rounds.
pub const BENCH_ROUNDS_MAX: usize = 1_000;

/// About how long one measurement of `bench one-way` sends: long beside the milliseconds that a
/// scheduler or a hypervisor takes away, short enough that seven rounds of all cases and their
/// baselines end within 180 s.
pub const BENCH_SPAN: Duration = ms(150);

/// Messages by which a case of `bench one-way` is made warm and its speed is found out.
pub const BENCH_WARM_UP_MESSAGES: u64 = 20_000;

/// Steady rates of `bench one-way`, in messages per second.
pub const BENCH_RATES: [NonZeroU64; 2] = [rate(100_000), rate(10_000)];

/// How long a steady rate is kept: at the lower one there are 4,000 messages, 40 of them above the
/// 99th percentile.
pub const BENCH_PACED_SPAN: Duration = ms(400);

/// SO_RCVBUF of the sink of `bench`: holds some 300,000 small datagrams (832 bytes each as the
/// kernel counts), so that a sink slower than its senders loses none within [`BENCH_SPAN`].
pub const BENCH_SINK_BUFFER_BYTES: usize = 128 * MIB;

/// Datagrams of one sendmmsg(2) in `bench one-way`.
pub const BENCH_MMSG_MESSAGES: usize = 64;

/// Bytes of each ring of a producer of `bench`: some 10,000 small messages, and still in the cache.
pub const BENCH_RING_BYTES: usize = MIB;

/// How long a producer of `bench` waits for the outcomes of its messages.
pub const BENCH_TIMEOUT: Duration = s(30);

/// How long a sink without news is given before `bench` counts what is missing as lost.
pub const BENCH_SETTLING: Duration = ms(200);

/// How often a sink is asked whether everything has arrived.
pub const BENCH_POLL_INTERVAL: Duration = ms(1);

/// How long the broker is given to fall asleep: ten naps of the default `delay_max`.
pub const BENCH_REST: Duration = ms(5);

/// How much the reader takes at once that is cheap for the writers of a FIFO: all that it holds.
pub const NAPPING_READER_BLOCK_BYTES: usize = 64 * KIB;

/// How long it sleeps in between.
pub const NAPPING_READER_PAUSE: Duration = Duration::from_micros(200);

/// How long the napping consumer of `bench ring` sleeps: a ring of [`BENCH_RING_BYTES`] takes longer
/// to fill.
pub const NAPPING_CONSUMER_PAUSE: Duration = Duration::from_micros(100);

/// Messages that `bench ring` sends one way through a ring: some 50 ms.
pub const BENCH_RING_MESSAGES: u64 = 2_000_000;

/// The same through a pipe or socket: some 100 ms.
pub const BENCH_PIPE_MESSAGES: u64 = 100_000;

/// The most bytes of one measurement of `bench ring`.
pub const BENCH_RING_RUN_BYTES: u64 = 256 * MIB as u64;

/// Round trips of `bench ring` between sides that poll: some 50 ms.
pub const BENCH_ROUND_TRIPS_POLLED: u64 = 50_000;

/// The same where both sleep: some 100 ms.
pub const BENCH_ROUND_TRIPS_SLEPT: u64 = 1_000;

/// Records that the consumer of `bench ring` takes before it gives their room back.
pub const BENCH_RING_RUN_RECORDS: u64 = 256;

/// Looks at a ring in `bench ring` before the other side gets a chance to use this processor: many
/// more than a round trip takes where there are two.
pub const BENCH_POLLS_PER_YIELD: u32 = 1_024;

/// How much the other side of `bench ring` reads of a pipe or socket at once: all that a pipe holds.
pub const BENCH_READ_BYTES: usize = 64 * KIB;

/// `connections_max` of the upstreams of `bench requests`.
pub const BENCH_CONNECTIONS_MAX: usize = 8;

/// Their `pipeline_depth`: 256 clients find room on one of them, where they share every call.
pub const BENCH_PIPELINE_DEPTH: usize = 256;

/// Clients of a burst of `bench requests`: beyond about 10,000 a system runs out of ports that it
/// may use again (TIME_WAIT).
pub const BENCH_BURST_CLIENTS: u64 = 15_000;

/// Events that the loops of `bench requests` take at once.
pub const BENCH_EVENTS: usize = 256;

/// Until when `bench requests` borrows connections: longer than it uses them.
pub const BENCH_LEASE: Duration = s(30);

/// Bytes of each ring of a client of `bench requests`: the least.
pub const BENCH_SESSION_RING_BYTES: usize = 256 * KIB;

/// How many sessions `bench idle` attaches.
pub const BENCH_IDLE_SESSIONS: [usize; 3] = [0, 1_000, 10_000];

/// `sessions_percent_max` of its broker: as much as there can be.
pub const BENCH_IDLE_SESSIONS_PERCENT: usize = 95;

/// Descriptors that `bench one-way` has for each producer, here or in the broker.
pub const BENCH_DESCRIPTORS_PER_PRODUCER: usize = 4;

/// Descriptors beside those of sessions and producers.
pub const BENCH_DESCRIPTORS_SPARE: usize = 1_000;

/// Requests of a probe of `bench isolation`: some half a second.
pub const BENCH_PROBE_REQUESTS: usize = 2_000;

/// How long it rests between two.
pub const BENCH_PROBE_PAUSE: Duration = Duration::from_micros(200);

/// Clients beside it whose upstream is no good.
pub const BENCH_NEIGHBOURS: usize = 8;

/// How long each of them rests between two requests.
pub const BENCH_NEIGHBOUR_PAUSE: Duration = ms(1);

/// How long sessions are left alone before their idleness is measured.
pub const BENCH_IDLE_CALM: Duration = ms(200);

/// How long it is measured.
pub const BENCH_IDLE_SPAN: Duration = s(1);

/// The longest write to a pipe that the kernel keeps in one piece (pipe(7)).
pub const PIPE_BUF: usize = 4_096;

/// How much a lifetime varies, so that connections opened together do not close together.
pub const LIFETIME_JITTER_PERCENT: u32 = 10;

/// How often one request is repeated though it was sent: the second failure is hardly an accident.
pub const RETRIES_MAX: u32 = 2;

/// Repetitions that the retry budget saves up, so that the loss of one connection is mended at
/// once.
pub const RETRIES_KEPT: u64 = 10;

/// `pipeline_depth` where replies are matched by an id, unless it is set.
pub const ID_PIPELINE_DEPTH: usize = 256;

/// Requests of `on_connect`: some five make a session with any server known.
pub const ON_CONNECT_STEPS_MAX: usize = 16;

/// Bytes of each of them: what the buffer of a fresh socket takes for certain.
pub const ON_CONNECT_BYTES_MAX: usize = 2_048;

/// Commands that may wait for the shard.
pub const COMMANDS_MAX: usize = 64;

/// How long the asker of `status` may take to ask and to read: the admin socket is served one by
/// one, by a thread that also has the signals.
pub const ADMIN_TIMEOUT: Duration = s(1);

/// How long the shard may take to answer: it copies its numbers between two turns.
pub const SHARD_TIMEOUT: Duration = s(5);

/// The longest question on the admin socket, in bytes.
pub const QUESTION_BYTES_MAX: usize = 256;

/// From this on a wait is ended by a timer that stays set over many waits.
pub const ALARM_MIN: Duration = ms(5);

/// Events taken per turn.
pub const EVENTS_MAX: usize = 256;

/// How much of a client's own text is repeated to it (M24).
pub const CLIENT_TEXT_CHARS_MAX: usize = 64;

/// Runs per turn of sources that always have more, before the loop looks who else is there: to look
/// takes a few per cent of a run.
pub const BUSY_RUNS_PER_TURN: usize = 1;

/// What each turn of a source brings it (`credit.rs`): less than a run
/// of small messages costs, so that no source leaves any of it unused.
pub const TURN_CREDIT_BYTES: i64 = 8 * KIB as i64;

/// What a message costs beside its bytes: copying 128 bytes takes far less than everything else that
/// is done for one, but much more would make large messages as good as free.
pub const MESSAGE_COST_BYTES: usize = 128;

/// How long answers wait for replies to be told with, while there is other work: some turns.
pub const ANSWER_HOLD: Duration = Duration::from_micros(500);

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

/// Lent descriptors in the socket of a session that may not have read them: they count against the
/// broker's RLIMIT_NOFILE (ETOOMANYREFS in unix(7)), and a session that reads has none.
pub const UNREAD_DESCRIPTORS_MAX: usize = 16;

/// More addresses of one upstream than this are left out: as many as its URL can name.
pub const ADDRESSES_MAX: usize = 64;

/// Addresses of one host name that are used.
pub const ADDRESSES_PER_NAME_MAX: usize = 16;

/// The pause before a name that could not be resolved is looked up again; doubles up to
/// `resolve_interval`. A host that has just started has its network within seconds.
pub const RESOLVE_RETRY: Duration = s(1);

/// Requests in a row that time out before their address is ejected, whatever `breaker_failures`
/// says: one may be slow by itself.
pub const TIMEOUTS_TO_EJECT_MIN: u32 = 2;

/// Names that may wait for the thread at once.
pub const RESOLVER_QUEUE_MAX: usize = 4_096;

/// Descriptors that may wait for the thread; more wait with the shard.
pub const CLOSER_QUEUE_MAX: usize = 1_024;

/// Signals that come so close together are one: timeout(1) signals its child and then its group, and
/// systemd may send SIGHUP behind SIGTERM.
pub const SIGNALS_TOGETHER: Duration = ms(100);

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
    use std::num::NonZeroU64;
    use std::time::Duration;

    pub(in crate::config) const fn ms(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    pub(in crate::config) const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    pub(in crate::config) const fn rate(per_second: u64) -> NonZeroU64 {
        NonZeroU64::new(per_second).expect("above 0")
    }

    pub(in crate::config) const NONE: Duration = Duration::ZERO;
    pub(in crate::config) const DAY: Duration = Duration::from_secs(86_400);
    pub(in crate::config) const KIB: usize = 1024;
    pub(in crate::config) const MIB: usize = 1024 * KIB;
}
