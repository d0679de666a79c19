//! The configuration: what `serve` is told, and every number of policy.
//!
//! Each limit, size and duration stands here once, with its default, range, unit and reason, in a
//! `limits!` block. The block yields the struct, its defaults, the reading of the key with its
//! range, and a `TABLE` from which `serve --help`, `check` and the manual print. No other file
//! holds a number of policy.
//!
//! The file is TOML, read as a tree in which every key and value knows its place, so that each
//! error names file, line and key (`config/entry.rs`). Unknown keys are errors. Whether a group or
//! a host exists is not asked here: this file only reads text.

mod entry;
mod fixed;
mod idle;
mod on_connect;

use std::fmt;
use std::path::Path;
use std::time::Duration;

use ipnet::IpNet;
use poolbroker_proto::address::{Host, HostPort, Protocol, UpstreamUrl, check_upstream_name};
use poolbroker_proto::framing::Framing;
use poolbroker_proto::reason::Reason;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

pub use entry::ConfigError;
use entry::{Entry, Setting, Source, expected, line_at, read_within, shown};
use fixed::units::{DAY, KIB, MIB, NONE, ms, s};
pub use fixed::*;
pub use on_connect::{Greeting, Spell};

use crate::balance::Policy;
use crate::separator::Separator;

/// Everything `serve` needs to know.
#[derive(Debug, Clone, Default)]
pub struct Config {
    /// The upstreams in the order of the file, those of the command line behind them.
    pub upstreams: Vec<UpstreamConfig>,
    /// Upstreams that clients may open by URL.
    pub dynamic: Dynamic,
    /// Who may connect to the client socket.
    pub socket: SocketAccess,
    /// Limits of the broker as a whole, of its sessions and of its users.
    pub broker: BrokerLimits,
    /// What is set and has no effect: where, and why.
    pub idle_settings: Vec<ConfigError>,
}

/// One upstream.
#[derive(Debug, Clone)]
pub struct UpstreamConfig {
    /// Checked by [`check_upstream_name`]; unique.
    pub name: String,
    /// Where it is, and its framing.
    pub url: UpstreamUrl,
    /// Its limits.
    pub limits: UpstreamLimits,
    /// What happens to one-way messages when its queue is full.
    pub overflow: Overflow,
    /// How connections and requests are spread over its addresses.
    pub balance: Policy,
    /// The networks in which the addresses of its names may lie; none: any.
    pub resolve_allow: Vec<IpNet>,
    /// Whether each message goes to all of its hosts.
    pub is_broadcast: bool,
    /// How small messages are joined into datagrams, if they are.
    pub coalesce: Option<Coalesce>,
    /// Whether a request may be repeated though it was sent.
    pub is_idempotent: bool,
    /// Whether its connections are lent.
    pub lends: bool,
    /// What a fresh connection says first.
    pub on_connect: Vec<Greeting>,
    /// The same with the secrets in it: [`Config::load_secrets`].
    pub spells: Vec<Spell>,
    /// Its FIFO in the runtime directory, unless `fifo = false`.
    pub fifo: Option<FifoConfig>,
}

/// What happens to a one-way message that finds the queue of its upstream full.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Overflow {
    /// It waits in its source, which is not read meanwhile.
    #[default]
    Block,
    /// It is dropped.
    DropNewest,
    /// The message that waited longest is dropped for it.
    DropOldest,
}

/// Whether the broker looks for the next event before it waits for one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum BusyPoll {
    /// It waits at once.
    Off,
    /// It looks that long after each event.
    For(Duration),
    /// It looks as long as that pays (`waiting.rs`).
    Auto,
}

/// The FIFO of an upstream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FifoConfig {
    /// Permissions of the file.
    pub mode: u32,
    /// Its group, where it is not the broker's own.
    pub group: Option<String>,
    /// How its bytes are cut into messages; never raw.
    pub framing: Framing,
}

/// Permissions of the client socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SocketAccess {
    /// Permissions of the file.
    pub mode: u32,
    /// Its group, where it is not the broker's own.
    pub group: Option<String>,
}

/// One line of the table of limits.
#[derive(Debug, Clone, Copy)]
pub struct LimitRow {
    /// The key in the configuration.
    pub name: &'static str,
    /// The default, as [`LimitRow::assignment`] writes it but without quotes.
    pub default: fn() -> String,
    /// The least and the greatest value that is taken, written likewise.
    pub range: fn() -> (String, String),
    /// What it counts.
    pub unit: &'static str,
    /// What it is for, and why the default is what it is.
    pub reason: &'static str,
}

impl LimitRow {
    /// The default as a line of the file.
    #[must_use]
    pub fn assignment(&self) -> String {
        let default = (self.default)();
        match self.unit {
            "duration" => format!("{} = {default:?}", self.name),
            _ => format!("{} = {default}", self.name),
        }
    }

    /// "from 1 to 8 connections"; a duration names its unit itself.
    #[must_use]
    pub fn range_text(&self) -> String {
        let (least, most) = (self.range)();
        match self.unit {
            "duration" => format!("from {least} to {most}"),
            unit => format!("from {least} to {most} {unit}"),
        }
    }
}

/// A section of the file whose limits can be listed.
#[derive(Debug, Clone, Copy)]
pub struct LimitSection {
    /// As in the file: `[upstream.NAME]`.
    pub header: &'static str,
    /// Its limits.
    pub rows: &'static [LimitRow],
}

/// Every limit there is, by the section of the file in which it stands.
pub const LIMIT_SECTIONS: &[LimitSection] = &[
    LimitSection { header: "[upstream.NAME]", rows: UpstreamLimits::TABLE },
    LimitSection { header: "[upstream.NAME.coalesce]", rows: Coalesce::TABLE },
    LimitSection { header: "[limits]", rows: BrokerLimits::TABLE },
    LimitSection { header: "[dynamic]", rows: Dynamic::TABLE },
];

macro_rules! limits {
    (
        $(#[$struct_doc:meta])*
        pub struct $Name:ident { $($(#[$field_doc:meta])* pub $field:ident: $Field:ty,)* }
        $($limit:ident: $Type:ty = $default:expr, $range:expr, $unit:literal, $reason:literal;)*
    ) => {
        $(#[$struct_doc])*
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub struct $Name {
            $($(#[$field_doc])* pub $field: $Field,)*
            $(#[doc = $reason] pub $limit: $Type,)*
        }

        impl Default for $Name {
            fn default() -> Self {
                $Name {
                    $($field: Default::default(),)*
                    $($limit: $default,)*
                }
            }
        }

        impl $Name {
            /// Its limits, in the order of [`Self::values`].
            pub const TABLE: &'static [LimitRow] = &[$(LimitRow {
                name: stringify!($limit),
                default: || <$Type as Setting>::show(&$default),
                range: || shown::<$Type>(&($range)),
                unit: $unit,
                reason: $reason,
            }),*];

            /// The limits in force, as they would be written in the file.
            #[must_use]
            pub fn values(&self) -> Vec<String> {
                vec![$(self.$limit.show()),*]
            }

            /// Takes the value of `key`; `None` when it is none of these limits.
            fn set(&mut self, key: &str, value: &DeValue<'_>) -> Option<Result<(), String>> {
                match key {
                    $(stringify!($limit) => {
                        Some(read_within(value, &($range)).map(|value| self.$limit = value))
                    })*
                    _ => None,
                }
            }
        }
    };
}

limits! {
    /// Limits of one upstream, `[upstream.NAME]`.
    pub struct UpstreamLimits {}
    connections_min: usize = 0, 0..=10_000, "connections",
        "Kept open even when idle. 0: an upstream that nobody uses costs nothing.";
    connections_max: usize = 8, 1..=10_000, "connections",
        "Open at once, both roles together. Few, because peers pay for each one; a request that \
         finds none free waits.";
    one_way_connections: usize = 1, 1..=64, "connections",
        "Of those for one-way messages: several spread them over source ports. Every session keeps \
         to one of them, and so its order. Requests need places beside them.";
    connecting_max: usize = 4, 1..=1_000, "connections",
        "Connects in progress at once, so that a peer that comes back is not stormed.";
    waiters_max: usize = 1024, 0..=1_000_000, "requests",
        "Requests waiting for a connection, and as many leases. Users are served in turn. Of one more, \
         the last of the user who has most waiting is refused with waiters_full.";
    pipeline_depth: usize = 1, 1..=4_096, "requests",
        "Requests on one connection at once. 1: the next one waits for the reply, and a reply that \
         comes too late costs the connection. More: replies come in their order, so a slow request \
         holds up those behind it. With an id in the URL replies come in any order and the \
         default is 256.";
    requests_per_connection_max: u64 = 0, 0..=1_000_000_000_000, "requests",
        "A connection closes after that many. 0: no limit.";
    message_bytes_max: usize = MIB, 1..=MESSAGE_BYTES_MAX, "bytes",
        "The longest message or reply. For udp and udp-write-only default and most are 65507, \
         the longest datagram.";
    queue_bytes_max: usize = 256 * KIB, 4 * KIB..=1024 * MIB, "bytes",
        "One-way bytes taken from their sources and not yet sent; what exceeds it waits in its \
         source, or as overflow says.";
    retired_max: usize = 1024, 1..=10_000, "sockets",
        "UDP sockets with an unanswered request, kept bound for late_reply_window; while there \
         are that many, no further socket is opened for requests.";
    gso_segments_max: usize = 64, 1..=64, "datagrams",
        "Equal datagrams handed to the kernel in one send (UDP_SEGMENT). 1: each by itself, for a \
         local queueing discipline that cuts such a send apart (tbf): the kernel calls it sent when \
         only a part of it got in.";
    connect_timeout: Duration = s(5), ms(1)..=s(600), "duration",
        "From the start of a connect to its end. Covers two lost SYNs (1 s and 2 s later).";
    wait_timeout: Duration = s(5), ms(1)..=s(3_600), "duration",
        "How long a request waits for a connection.";
    request_timeout: Duration = s(30), ms(1)..=DAY, "duration",
        "From the first byte of a request written to the last byte of its reply. The deadline of \
         the caller counts too; the earlier wins.";
    retry_budget_percent: u32 = 10, 0..=100, "%",
        "Requests repeated though they were sent, of all requests; only where idempotent = true. \
         More would multiply the load of an upstream that fails.";
    retransmits: u32 = 0, 0..=20, "datagrams",
        "How often a UDP request is sent again while no reply comes.";
    retransmit_interval: Duration = s(1), ms(1)..=s(600), "duration",
        "How long each of them waits for the reply before.";
    leases_max: usize = 0, 0..=10_000, "leases",
        "Connections lent at once. 0: all but one of connections_max, so that requests keep a place.";
    lease_timeout: Duration = s(60), ms(1)..=DAY, "duration",
        "How long a lease is held at most. The deadline of the holder counts too; the earlier \
         wins.";
    queue_timeout: Duration = s(30), NONE..=DAY, "duration",
        "How long a one-way message waits before it ends as expired. 0s: for ever.";
    idle_timeout: Duration = s(60), NONE..=DAY, "duration",
        "How long an unused connection above connections_min stays open. 0s: for ever.";
    lifetime: Duration = s(3_600), NONE..=30 * DAY, "duration",
        "The age at which a connection is replaced, give or take 10 % so that not all go at \
         once. 0s: never.";
    late_reply_window: Duration = s(10), NONE..=s(600), "duration",
        "How long the socket of an unanswered UDP request stays bound, so that a late reply \
         cannot reach another request by way of a port used again.";
    finish_timeout: Duration = s(1), ms(1)..=s(600), "duration",
        "How long a one-way TCP connection that ends in order waits for the peer's own end.";
    breaker_failures: u32 = 3, 1..=1_000, "failures",
        "Connect failures in a row after which requests fail at once until a probe succeeds.";
    backoff_base: Duration = ms(100), ms(1)..=s(60), "duration",
        "Before the second connect attempt at most; doubles with each failure, with full jitter.";
    backoff_max: Duration = s(3), ms(1)..=s(600), "duration",
        "The longest pause between connect attempts: service is back within 5 s of its return.";
    send_buffer_bytes: usize = 64 * KIB, 4 * KIB..=16 * MIB, "bytes",
        "SO_SNDBUF of a TCP connection: bounds what is in doubt when a peer vanishes.";
    tcp_user_timeout: Duration = s(10), NONE..=DAY, "duration",
        "TCP_USER_TIMEOUT: a connection whose bytes stay unacknowledged that long is dead. \
         0s: the kernel's own, some 15 minutes.";
    keepalive_idle: Duration = s(5), s(1)..=s(32_767), "duration",
        "TCP_KEEPIDLE: silence before the first probe. With the next two a vanished peer is \
         noticed within 11 s.";
    keepalive_interval: Duration = s(2), s(1)..=s(32_767), "duration",
        "TCP_KEEPINTVL: between two probes.";
    keepalive_probes: u32 = 3, 1..=127, "probes",
        "TCP_KEEPCNT: unanswered probes after which the connection is dead.";
}

limits! {
    /// How one-way messages are joined into datagrams, `[upstream.NAME.coalesce]`.
    pub struct Coalesce {
        /// What stands between two messages; 0 to [`SEPARATOR_BYTES_MAX`] bytes.
        pub separator: Separator,
    }
    max_bytes: usize = 1_432, 1..=UDP_PAYLOAD_BYTES_MAX, "bytes",
        "The longest datagram of several messages; a longer message goes alone. An Ethernet frame \
         carries 1500 bytes, less 40 of IPv6 and 8 of UDP header: 1452; 20 are spare for options \
         and tunnels, so that no router fragments it.";
    max_delay: Duration = ms(1), NONE..=s(1), "duration",
        "How long a message waits for others at most. 0s: only those taken in the same moment \
         share a datagram.";
}

limits! {
    /// Limits of the broker as a whole, of its sessions and of its users, `[limits]`.
    pub struct BrokerLimits {}
    handshake_timeout: Duration = s(5), ms(1)..=s(600), "duration",
        "From connecting to the client socket to a complete handshake.";
    partial_timeout: Duration = s(5), ms(1)..=s(600), "duration",
        "How long an unfinished frame, or an unterminated record of a FIFO, may stand still.";
    descriptor_timeout: Duration = s(1), ms(1)..=s(60), "duration",
        "How long a passed descriptor may stay unclaimed: it can keep its own session alive.";
    drain_timeout: Duration = s(10), NONE..=s(3_600), "duration",
        "From SIGTERM to the end at the latest; what is not sent by then is dropped and counted.";
    fifo_record_bytes_max: usize = PIPE_BUF, 16..=PIPE_BUF, "bytes",
        "The longest record of a FIFO with its delimiter: PIPE_BUF, since longer ones of several \
         writers mix (pipe(7)).";
    requests_in_flight_max: usize = 1_024, 1..=1_000_000, "requests",
        "Requests of one session without a reply.";
    queued_bytes_max_per_uid: usize = 64 * MIB, MIB..=1024 * 1024 * MIB, "bytes",
        "Bytes of all sessions of one user that wait in the broker.";
    descriptors_in_flight_max_per_uid: usize = 64, 1..=1_024, "descriptors",
        "Descriptors passed by one user that no session reads yet.";
    sessions_percent_max: u32 = 80, 1..=95, "%",
        "Sessions of one user, of what RLIMIT_NOFILE carries; shared evenly while several users \
         are present. The rest serves upstreams.";
    run_messages_max: usize = 64, 1..=4_096, "messages",
        "Messages taken from one source in one go, so that none keeps the others waiting.";
    run_bytes_max: usize = 256 * KIB, 4 * KIB..=16 * MIB, "bytes",
        "Bytes taken from one source in one go.";
    reply_queue_bytes_max: usize = MIB, 4 * KIB..=1024 * MIB, "bytes",
        "Replies that a client has not read; a session above it is not read either.";
    resolve_interval: Duration = s(15), s(1)..=DAY, "duration",
        "Host names are resolved again that often, whether they are in use or not.";
    ring_bytes_max_per_uid: usize = 1024 * MIB, MIB..=1024 * 1024 * MIB, "bytes",
        "Shared memory of all rings of one user. Pages exist only once they were used.";
    delay_max: Duration = Duration::from_micros(900), NONE..=ms(10), "duration",
        "How long the broker naps between two looks at rings, FIFOs and pipes from which one-way \
         messages keep coming: they wait half of it on average. Requests end a nap at once.";
    busy_poll: BusyPoll = BusyPoll::Auto, BusyPoll::Off..=BusyPoll::Auto, "duration",
        "How long the broker looks for the next event before it waits for one. auto: a moment, \
         while events come closely; off: never; 50us: always that long, for the sake of latency.";
    nobuf_backoff_min: Duration = ms(1), ms(1)..=s(1), "duration",
        "First pause after ENOBUFS, which polling cannot wait for; doubles up to the next.";
    nobuf_backoff_max: Duration = ms(16), ms(1)..=s(10), "duration",
        "Last pause after ENOBUFS; then the message is dropped and counted.";
}

limits! {
    /// Upstreams that clients open by URL, `[dynamic]`.
    pub struct Dynamic {
        /// The networks in which they may lie; none: opening by URL is refused.
        pub allow: Vec<IpNet>,
    }
    upstreams_max: usize = 64, 1..=10_000, "upstreams",
        "Upstreams opened by URL at once: each has a pool of its own.";
}

impl Config {
    /// Reads and checks the file at `path`.
    ///
    /// # Errors
    /// [`ConfigError`]: the file cannot be read, or as [`Config::parse`].
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let source_name = path.display().to_string();
        let error = |line, problem| ConfigError {
            source_name: source_name.clone(),
            line,
            key: String::new(),
            problem,
        };
        let bytes =
            std::fs::read(path).map_err(|cause| error(None, format!("cannot be read: {cause}")))?;
        let text = String::from_utf8(bytes).map_err(|cause| {
            let valid = cause.utf8_error().valid_up_to();
            let line = line_at(cause.as_bytes(), valid);
            error(Some(line), "is not UTF-8 text from here on".into())
        })?;
        Config::parse(&text, &source_name)
    }

    /// Checks `text`; errors call it `source_name`.
    ///
    /// # Errors
    /// [`ConfigError`], for the first thing that is wrong.
    pub fn parse(text: &str, source_name: &str) -> Result<Self, ConfigError> {
        let source = Source { text, source_name };
        let root = DeTable::parse(text).map_err(|error| {
            let line = error.span().map(|span| line_at(text.as_bytes(), span.start));
            ConfigError {
                source_name: source_name.to_owned(),
                line,
                key: String::new(),
                problem: format!("not TOML: {}{}", error.message(), hint(error.message())),
            }
        })?;
        let mut config = Config::default();
        for entry in source.entries("", root.get_ref()) {
            match entry.key {
                "upstream" => {
                    for upstream in source.entries("upstream", entry.table()?) {
                        let idle_settings = &mut config.idle_settings;
                        config.upstreams.push(read_upstream(&upstream, idle_settings)?);
                    }
                }
                "dynamic" => config.dynamic = read_dynamic(&entry)?,
                "socket" => config.socket = read_socket(&entry)?,
                "limits" => config.broker = read_limits(&entry)?,
                _ => return Err(entry.unknown(&["upstream", "dynamic", "socket", "limits"])),
            }
        }
        check_fifos(&config, &source, root.get_ref())?;
        Ok(config)
    }

    /// Reads the secrets of `on_connect`. Not part of [`Config::parse`], which only reads text.
    ///
    /// # Errors
    /// [`ConfigError`], for the first that is missing.
    pub fn load_secrets(&mut self, source_name: &str) -> Result<(), ConfigError> {
        for upstream in &mut self.upstreams {
            let framing = upstream.url.framing;
            let spells = upstream.on_connect.iter().map(|greeting| greeting.spell(framing));
            upstream.spells = spells.collect::<Result<_, _>>().map_err(|problem| ConfigError {
                source_name: source_name.to_owned(),
                line: None,
                key: format!("upstream.{}.on_connect", upstream.name),
                problem,
            })?;
        }
        Ok(())
    }

    /// Adds the upstream of `NAME=URL`, as on the command line, with default limits.
    ///
    /// # Errors
    /// [`ConfigError`]: not of that form, a wrong name or URL, or a name that is there already.
    pub fn add_upstream(&mut self, name_and_url: &str) -> Result<(), ConfigError> {
        let error = |key: &str, problem: String| ConfigError {
            source_name: "--upstream".into(),
            line: None,
            key: key.to_owned(),
            problem,
        };
        let Some((name, url)) = name_and_url.split_once('=') else {
            let problem = "is not NAME=URL; for example metrics=udp-write-only://127.0.0.1:8125";
            return Err(error("", format!("{name_and_url:?} {problem}")));
        };
        check_upstream_name(name).map_err(|problem| error("", problem))?;
        let url = url.parse::<UpstreamUrl>().map_err(|problem| error(name, problem.to_string()))?;
        if self.upstreams.iter().any(|upstream| upstream.name == name) {
            let problem = "this upstream is configured already: choose another name";
            return Err(error(name, problem.into()));
        }
        let upstream = UpstreamConfig::new(name, url);
        check_upstream(&upstream).map_err(|(_, problem)| error(name, problem))?;
        self.upstreams.push(upstream);
        Ok(())
    }
}

impl UpstreamConfig {
    /// An upstream with every default there is.
    #[must_use]
    pub fn new(name: &str, url: UpstreamUrl) -> Self {
        UpstreamConfig {
            name: name.to_owned(),
            limits: UpstreamLimits::of(&url),
            url,
            overflow: Overflow::default(),
            balance: Policy::default(),
            resolve_allow: Vec::new(),
            is_broadcast: false,
            coalesce: None,
            is_idempotent: false,
            lends: false,
            on_connect: Vec::new(),
            spells: Vec::new(),
            fifo: Some(FifoConfig::default()),
        }
    }

    /// The upstreams that send the copies of a broadcast, one for each host; none: it is no broadcast.
    #[must_use]
    pub fn copies(&self) -> Vec<UpstreamConfig> {
        let hosts = self.url.hosts.iter().filter(|_| self.is_broadcast);
        hosts.map(|host| self.copy_for(host)).collect()
    }

    fn copy_for(&self, host: &HostPort) -> UpstreamConfig {
        let url = UpstreamUrl { hosts: vec![host.clone()], ..self.url.clone() };
        // Not a name that can be opened.
        let name = format!("{}@{host}", self.name);
        UpstreamConfig { name, url, fifo: None, ..self.clone() }
    }

    /// Why it lends no connections, if it lends none.
    #[must_use]
    pub fn leases_refused(&self) -> Option<Reason> {
        match (self.is_broadcast, self.lends) {
            (true, _) => Some(Reason::Broadcast),
            (false, true) => None,
            (false, false) => Some(Reason::NotAllowed),
        }
    }

    /// Why it takes no requests, if it takes none.
    #[must_use]
    pub fn requests_refused(&self) -> Option<Reason> {
        match (self.url.protocol, self.url.framing) {
            _ if self.is_broadcast => Some(Reason::Broadcast),
            (Protocol::UdpWriteOnly, _) => Some(Reason::WriteOnly),
            (Protocol::Tcp, Framing::Raw) => Some(Reason::NoFraming),
            (Protocol::Tcp | Protocol::Udp, _) => None,
        }
    }
}

impl UpstreamLimits {
    /// The defaults of an upstream of that URL.
    #[must_use]
    pub fn of(url: &UpstreamUrl) -> Self {
        let mut limits = UpstreamLimits::of_protocol(url.protocol);
        if url.id.is_some() {
            limits.pipeline_depth = ID_PIPELINE_DEPTH;
        }
        limits
    }

    /// The defaults of an upstream of that protocol type.
    #[must_use]
    pub fn of_protocol(protocol: Protocol) -> Self {
        let mut limits = UpstreamLimits::default();
        match protocol {
            Protocol::Tcp => {}
            Protocol::Udp | Protocol::UdpWriteOnly => {
                limits.message_bytes_max = UDP_PAYLOAD_BYTES_MAX;
            }
        }
        limits
    }
}

impl Overflow {
    const ALL: [Overflow; 3] = [Overflow::Block, Overflow::DropNewest, Overflow::DropOldest];
}

impl fmt::Display for Overflow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Overflow::Block => "block",
            Overflow::DropNewest => "drop-newest",
            Overflow::DropOldest => "drop-oldest",
        })
    }
}

impl Default for FifoConfig {
    fn default() -> Self {
        FifoConfig { mode: 0o600, group: None, framing: Framing::Lines }
    }
}

impl Default for SocketAccess {
    fn default() -> Self {
        SocketAccess { mode: 0o600, group: None }
    }
}

fn read_upstream(
    section: &Entry<'_>,
    idle_settings: &mut Vec<ConfigError>,
) -> Result<UpstreamConfig, ConfigError> {
    check_upstream_name(section.key)
        .map_err(|problem| section.error_at(section.key_span.start, section.path(), problem))?;
    let entries = section.entries()?;
    let Some(url) = entries.iter().find(|entry| entry.key == "url") else {
        let problem = "is missing; for example url = \"udp-write-only://127.0.0.1:8125\"";
        return Err(section.wrong_inside("url", problem));
    };
    let parsed = url.text()?.parse::<UpstreamUrl>();
    let parsed = parsed.map_err(|error| url.wrong(error.to_string()))?;
    let mut upstream = UpstreamConfig::new(section.key, parsed);
    for entry in &entries {
        match entry.key {
            "url" => {}
            "overflow" => upstream.overflow = read_overflow(entry)?,
            "balance" => upstream.balance = read_balance(entry)?,
            "resolve_allow" => upstream.resolve_allow = read_networks(entry)?,
            "mode" => upstream.is_broadcast = read_mode(entry)?,
            "coalesce" => upstream.coalesce = Some(read_coalesce(entry, upstream.url.protocol)?),
            "fifo" => upstream.fifo = read_fifo(entry)?,
            "idempotent" => upstream.is_idempotent = entry.flag()?,
            "lease" => upstream.lends = entry.flag()?,
            "on_connect" => upstream.on_connect = on_connect::read(entry, &upstream.url)?,
            _ => read_limit(
                entry,
                upstream.limits.set(entry.key, entry.value.get_ref()),
                &[
                    "url",
                    "mode",
                    "overflow",
                    "balance",
                    "resolve_allow",
                    "coalesce",
                    "idempotent",
                    "lease",
                    "on_connect",
                    "fifo",
                ],
                UpstreamLimits::TABLE,
            )?,
        }
    }
    check_upstream(&upstream).map_err(|(key, problem)| section.wrong_inside(key, problem))?;
    idle_settings.extend(entries.iter().filter_map(|entry| {
        let why = idle::why_idle(entry.key, &upstream)?;
        Some(entry.wrong(format!("has no effect: {why}")))
    }));
    Ok(upstream)
}

fn read_overflow(entry: &Entry<'_>) -> Result<Overflow, ConfigError> {
    let text = entry.text()?;
    let found = Overflow::ALL.into_iter().find(|overflow| overflow.to_string() == text);
    found.ok_or_else(|| {
        let names = Overflow::ALL.map(|overflow| overflow.to_string());
        entry.wrong(format!("{text:?} is unknown; there are: {}", names.join(", ")))
    })
}

fn read_mode(entry: &Entry<'_>) -> Result<bool, ConfigError> {
    match entry.text()? {
        "balance" => Ok(false),
        "broadcast" => Ok(true),
        text => Err(entry.wrong(format!("{text:?} is unknown; there are: balance, broadcast"))),
    }
}

fn read_balance(entry: &Entry<'_>) -> Result<Policy, ConfigError> {
    let text = entry.text()?;
    let found = Policy::ALL.into_iter().find(|policy| policy.to_string() == text);
    found.ok_or_else(|| {
        let names = Policy::ALL.map(|policy| policy.to_string());
        entry.wrong(format!("{text:?} is unknown; there are: {}", names.join(", ")))
    })
}

fn read_coalesce(section: &Entry<'_>, protocol: Protocol) -> Result<Coalesce, ConfigError> {
    match protocol {
        Protocol::Tcp => {
            let problem = "joins messages into datagrams, and tcp has none; leave it out";
            return Err(section.wrong(problem));
        }
        Protocol::Udp | Protocol::UdpWriteOnly => {}
    }
    let mut coalesce = Coalesce::default();
    for entry in section.entries()? {
        match entry.key {
            "separator" => coalesce.separator = read_separator(&entry)?,
            _ => read_limit(
                &entry,
                coalesce.set(entry.key, entry.value.get_ref()),
                &["separator"],
                Coalesce::TABLE,
            )?,
        }
    }
    Ok(coalesce)
}

fn read_separator(entry: &Entry<'_>) -> Result<Separator, ConfigError> {
    let bytes = entry.text()?.as_bytes();
    if bytes.len() > SEPARATOR_BYTES_MAX {
        let len = bytes.len();
        let problem = format!("{len} bytes are out of range: from 0 to {SEPARATOR_BYTES_MAX}");
        return Err(entry.wrong(problem));
    }
    Ok(Separator::new(bytes))
}

fn read_fifo(section: &Entry<'_>) -> Result<Option<FifoConfig>, ConfigError> {
    match section.value.get_ref() {
        DeValue::Boolean(false) => return Ok(None),
        DeValue::Boolean(true) => return Ok(Some(FifoConfig::default())),
        DeValue::Table(_) => {}
        value => {
            let form = "false or a table like { mode = \"0622\" }";
            return Err(section.wrong(expected(form, value)));
        }
    }
    let mut fifo = FifoConfig::default();
    for entry in section.entries()? {
        match entry.key {
            "mode" => {
                fifo.mode = entry.mode()?;
                if fifo.mode & 0o044 != 0 {
                    return Err(entry.wrong(format!(
                        "0{:o} lets others read the FIFO, and whoever reads takes messages away \
                         from the broker; writing needs only \"0622\"",
                        fifo.mode
                    )));
                }
            }
            "group" => fifo.group = Some(entry.group()?),
            "framing" => fifo.framing = read_fifo_framing(&entry)?,
            _ => return Err(entry.unknown(&["mode", "group", "framing"])),
        }
    }
    Ok(Some(fifo))
}

fn read_fifo_framing(entry: &Entry<'_>) -> Result<Framing, ConfigError> {
    match entry.text()?.parse() {
        Ok(Framing::Raw) => Err(entry.wrong("raw marks no end of a message: choose lines")),
        Ok(framing) => Ok(framing),
        Err(problem) => Err(entry.wrong(problem)),
    }
}

fn read_dynamic(section: &Entry<'_>) -> Result<Dynamic, ConfigError> {
    let mut dynamic = Dynamic::default();
    for entry in section.entries()? {
        match entry.key {
            "allow" => dynamic.allow = read_networks(&entry)?,
            _ => read_limit(
                &entry,
                dynamic.set(entry.key, entry.value.get_ref()),
                &["allow"],
                Dynamic::TABLE,
            )?,
        }
    }
    Ok(dynamic)
}

fn read_networks(entry: &Entry<'_>) -> Result<Vec<IpNet>, ConfigError> {
    let form = "a list of networks like [\"127.0.0.0/8\", \"::1/128\"]";
    let value = entry.value.get_ref();
    let list = value.as_array().ok_or_else(|| entry.wrong(expected(form, value)))?;
    let network = |item: &Spanned<DeValue<'_>>| {
        let offset = item.span().start;
        let wrong = |problem| entry.error_at(offset, entry.path(), problem);
        let text = item.get_ref().as_str();
        let text = text.ok_or_else(|| wrong(expected(form, item.get_ref())))?;
        text.parse::<IpNet>()
            .map_err(|_| wrong(format!("{text:?} is not a network like 127.0.0.0/8 or ::1/128")))
    };
    list.iter().map(network).collect()
}

fn read_socket(section: &Entry<'_>) -> Result<SocketAccess, ConfigError> {
    let mut socket = SocketAccess::default();
    for entry in section.entries()? {
        match entry.key {
            "mode" => socket.mode = entry.mode()?,
            "group" => socket.group = Some(entry.group()?),
            _ => return Err(entry.unknown(&["mode", "group"])),
        }
    }
    Ok(socket)
}

fn read_limits(section: &Entry<'_>) -> Result<BrokerLimits, ConfigError> {
    let mut limits = BrokerLimits::default();
    for entry in section.entries()? {
        let set = limits.set(entry.key, entry.value.get_ref());
        read_limit(&entry, set, &[], BrokerLimits::TABLE)?;
    }
    if limits.nobuf_backoff_min > limits.nobuf_backoff_max {
        let problem =
            exceeds(&limits.nobuf_backoff_min, "nobuf_backoff_max", &limits.nobuf_backoff_max);
        return Err(section.wrong_inside("nobuf_backoff_min", problem));
    }
    Ok(limits)
}

/// What whoever comes from other files may have meant.
fn hint(message: &str) -> &'static str {
    match message.contains("leading zero") {
        true => "; permissions stand in quotes, like mode = \"0622\"",
        false => "",
    }
}

/// Turns the verdict of a limits struct on `entry` into an error with a place.
fn read_limit(
    entry: &Entry<'_>,
    set: Option<Result<(), String>>,
    other_keys: &[&str],
    table: &[LimitRow],
) -> Result<(), ConfigError> {
    match set {
        Some(verdict) => verdict.map_err(|problem| entry.wrong(problem)),
        None => {
            if let Some(home) = home_of(entry.key) {
                return Err(entry.misplaced(home));
            }
            let limits = table.iter().map(|row| row.name);
            let known: Vec<_> = other_keys.iter().copied().chain(limits).collect();
            Err(entry.unknown(&known))
        }
    }
}

/// The section that knows a limit of this name.
fn home_of(key: &str) -> Option<&'static str> {
    let homes = [
        ("[limits]", BrokerLimits::TABLE),
        ("[upstream.NAME]", UpstreamLimits::TABLE),
        ("[upstream.NAME.coalesce]", Coalesce::TABLE),
        ("[dynamic]", Dynamic::TABLE),
    ];
    let home = homes.iter().find(|(_, table)| table.iter().any(|row| row.name == key))?;
    Some(home.0)
}

/// What no single key can be blamed for; names the key to change, and why.
fn check_upstream(upstream: &UpstreamConfig) -> Result<(), (&'static str, String)> {
    let limits = &upstream.limits;
    if limits.connections_min > limits.connections_max {
        let most = &limits.connections_max;
        let problem = exceeds(&limits.connections_min, "connections_max", most);
        return Err(("connections_min", problem));
    }
    if limits.backoff_base > limits.backoff_max {
        let problem = exceeds(&limits.backoff_base, "backoff_max", &limits.backoff_max);
        return Err(("backoff_base", problem));
    }
    let lanes = limits.one_way_connections;
    let exceeds_places = match upstream.requests_refused() {
        // With one place for both the roles take turns.
        None => lanes > 1 && lanes >= limits.connections_max,
        Some(_) => lanes > limits.connections_max,
    };
    if exceeds_places {
        let most = limits.connections_max;
        let remedy = match upstream.requests_refused() {
            None => ", and requests need at least one more place",
            Some(_) => "",
        };
        let problem = format!("{lanes} do not fit into connections_max, which is {most}{remedy}");
        return Err(("one_way_connections", problem));
    }
    let bytes = limits.message_bytes_max;
    match upstream.url.protocol {
        Protocol::Tcp => {}
        Protocol::Udp | Protocol::UdpWriteOnly if bytes > UDP_PAYLOAD_BYTES_MAX => {
            let problem = format!("{bytes} is more than a datagram holds, {UDP_PAYLOAD_BYTES_MAX}");
            return Err(("message_bytes_max", problem));
        }
        Protocol::Udp | Protocol::UdpWriteOnly => {}
    }
    if limits.pipeline_depth > 1 && upstream.url.id.is_none() {
        let problem = match upstream.url.protocol {
            Protocol::Tcp => None,
            Protocol::Udp => Some(
                "datagrams may overtake each other: name the id by which replies \
                 are known, as in udp://127.0.0.1:53?id_offset=0&id_width=2",
            ),
            Protocol::UdpWriteOnly => Some("a write-only upstream takes no requests"),
        };
        if let Some(problem) = problem {
            return Err(("pipeline_depth", problem.to_owned()));
        }
    }
    let has_name = upstream.url.hosts.iter().any(|at| matches!(at.host, Host::Name(_)));
    if !upstream.resolve_allow.is_empty() && !has_name {
        return Err(("resolve_allow", "is for host names, and the URL has none".to_owned()));
    }
    if limits.retransmits > 0 && upstream.url.protocol != Protocol::Udp {
        return Err(("retransmits", "only requests over udp are sent again".to_owned()));
    }
    if let Framing::Fixed { size } = upstream.url.framing
        && usize::try_from(size).map_or(true, |size| size > bytes)
    {
        let problem = format!("fixed messages of {size} bytes exceed message_bytes_max {bytes}");
        return Err(("url", problem));
    }
    Ok(())
}

/// A FIFO whose fixed records are longer than any record may be would refuse everything.
fn check_fifos(
    config: &Config,
    source: &Source<'_>,
    root: &DeTable<'_>,
) -> Result<(), ConfigError> {
    let most = config.broker.fifo_record_bytes_max;
    let fixed = |upstream: &UpstreamConfig| match upstream.fifo.as_ref()?.framing {
        Framing::Fixed { size } if usize::try_from(size).map_or(true, |size| size > most) => {
            Some(format!("records of {size} bytes exceed fifo_record_bytes_max {most}"))
        }
        _ => None,
    };
    for upstream in &config.upstreams {
        if let Some(problem) = fixed(upstream) {
            let sections = root.get("upstream").and_then(|value| value.get_ref().as_table());
            let key_span = sections
                .and_then(|table| table.get_key_value(upstream.name.as_str()))
                .map(|(key, _)| key.span());
            return Err(ConfigError {
                source_name: source.source_name.to_owned(),
                line: key_span.map(|span| line_at(source.text.as_bytes(), span.start)),
                key: format!("upstream.{}.fifo", upstream.name),
                problem,
            });
        }
    }
    Ok(())
}

fn exceeds<T: Setting>(value: &T, other: &str, most: &T) -> String {
    format!("{} is more than {other}, which is {}", value.show(), most.show())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn problem(text: &str) -> String {
        Config::parse(text, "pb.toml").unwrap_err().to_string()
    }

    #[test]
    fn a_full_file_is_read() {
        let text = r#"
            [upstream.metrics]
            url = "udp-write-only://127.0.0.1:8125"
            fifo = { mode = "0622", group = "adm" }
            overflow = "drop-oldest"
            one_way_connections = 8
            coalesce = { separator = "\r\n", max_delay = "0s" }

            [upstream.cache]
            url = "tcp://127.0.0.1:6379?framing=crlf"
            connections_max = 2
            connect_timeout = "1500ms"
            queue_timeout = "0s"
            fifo = false

            [dynamic]
            allow = ["127.0.0.0/8", "::1/128"]

            [socket]
            mode = "0660"

            [limits]
            drain_timeout = "1m"
        "#;
        let config = Config::parse(text, "pb.toml").unwrap();
        let [metrics, cache] = &config.upstreams[..] else {
            panic!("the order of the file: {:?}", config.upstreams);
        };
        assert_eq!(metrics.name, "metrics");
        assert_eq!(metrics.overflow, Overflow::DropOldest);
        assert_eq!(metrics.limits.message_bytes_max, UDP_PAYLOAD_BYTES_MAX);
        assert_eq!(metrics.limits.one_way_connections, 8);
        let coalesce = metrics.coalesce.clone().unwrap();
        assert_eq!((coalesce.separator.bytes(), coalesce.max_bytes), (&b"\r\n"[..], 1_432));
        assert_eq!((coalesce.max_delay, &cache.coalesce), (Duration::ZERO, &None));
        let fifo = metrics.fifo.clone().unwrap();
        assert_eq!((fifo.mode, fifo.group.as_deref()), (0o622, Some("adm")));
        assert_eq!((cache.limits.connections_max, &cache.fifo), (2, &None));
        assert_eq!(cache.limits.connect_timeout, ms(1_500));
        assert_eq!(cache.limits.queue_timeout, Duration::ZERO);
        assert_eq!(config.dynamic.allow.len(), 2);
        assert_eq!(config.socket.mode, 0o660);
        assert_eq!(config.broker.drain_timeout, s(60));
        assert_eq!(config.broker.run_messages_max, 64);
    }

    #[test]
    fn errors_name_file_line_and_key() {
        let text = "[upstream.cache]\nurl = \"tcp://x:1\"\n\nconections_max = 3\n";
        assert_eq!(
            problem(text),
            "pb.toml:4: upstream.cache: unknown key \"conections_max\"; \
             did you mean \"connections_max\"?"
        );
        assert_eq!(
            problem("[upstream.cache]\nurl = \"tcp://x:1\"\nconnections_max = 0\n"),
            "pb.toml:3: upstream.cache.connections_max: 0 is out of range: from 1 to 10000"
        );
    }

    #[test]
    fn each_mistake_in_an_upstream_is_refused_at_its_line() {
        for (line, says) in [
            ("waiters_max = -1", "-1 is out of range: from 0 to 1000000"),
            ("waiters_max = 99999999999999999999", "is out of range: from 0 to 1000000"),
            ("keepalive_probes = 4294967296", "4294967296 is out of range: from 1 to 127"),
            (
                "resolve_interval = \"5s\"",
                "unknown key \"resolve_interval\"; it belongs into [limits]",
            ),
            ("max_delay = \"5ms\"", "it belongs into [upstream.NAME.coalesce]"),
            ("waiters_max = 1.5", "whole number, not 1.5"),
            ("waiters_max = \"8\"", "whole number, not \"8\""),
            ("connections_min = 9", "9 is more than connections_max, which is 8"),
            ("backoff_base = \"4s\"", "4s is more than backoff_max, which is 3s"),
            ("connect_timeout = 5", "a duration like"),
            ("connect_timeout = \"5\"", "a duration like"),
            ("connect_timeout = \"-5s\"", "a duration like"),
            ("connect_timeout = \"0s\"", "out of range: from 1ms to 10m"),
            ("connect_timeout = \"999999999999999999999s\"", "a duration like"),
            ("lifetime = \"1000days\"", "out of range"),
            ("overflow = \"drop\"", "block, drop-newest, drop-oldest"),
            ("overflow = true", "a text in quotes, not true"),
            ("coalesced = 1", "unknown key \"coalesced\"; did you mean \"coalesce\"?"),
            ("coalesce = {}", "tcp has none"),
            ("one_way_connections = 0", "0 is out of range: from 1 to 64"),
            ("one_way_connections = 65", "65 is out of range: from 1 to 64"),
            ("one_way_connections = 8", "8 do not fit into connections_max, which is 8, and"),
            ("fifo = 3", "false or a table"),
            ("fifo = { mode = \"0644\" }", "lets others read the FIFO"),
            ("fifo = { mode = \"0022\" }", "lacks 0600"),
            ("fifo = { mode = \"0722\" }", "executable"),
            ("fifo = { mode = \"1622\" }", "octal digits"),
            ("fifo = { mode = \"+622\" }", "octal digits"),
            ("fifo = { mode = 622 }", "octal digits in quotes"),
            ("fifo = { group = \"\" }", "name of a group is missing"),
            ("fifo = { framing = \"raw\" }", "raw marks no end"),
            ("fifo = { framing = \"line\" }", "unknown framing"),
            ("fifo = { framing = \"fixed\" }", "needs its size"),
            ("fifo = { framing = \"fixed&size=x\" }", "is no number"),
            ("fifo = { owner = \"root\" }", "unknown key \"owner\"; there are: mode"),
        ] {
            let error = problem(&format!("[upstream.a]\nurl = \"tcp://x:1\"\n{line}\n"));
            assert!(error.starts_with("pb.toml:3: upstream.a"), "{line}: {error}");
            assert!(error.contains(says), "{line}: {error}");
        }
    }

    #[test]
    fn each_mistake_elsewhere_is_refused_at_its_line() {
        for (text, says) in [
            ("x = 1", "pb.toml:1: unknown key \"x\"; there are: upstream, dynamic"),
            ("[upstreams.a]", "pb.toml:1: unknown key \"upstreams\"; did you mean \"upstream\"?"),
            ("\nupstream = 3", "pb.toml:2: upstream: must be a table, not 3"),
            ("[upstream]\na = \"tcp://x:1\"", "pb.toml:2: upstream.a: must be a table"),
            ("[upstream.a]", "pb.toml:1: upstream.a.url: is missing; for example"),
            ("[upstream.a]\nurl = 1", "pb.toml:2: upstream.a.url: must be a text"),
            ("[upstream.a]\nurl = \"htp://x\"", "pb.toml:2: upstream.a.url: \"htp://x\""),
            ("[upstream.a]\nurl = \"tcp://x:65536\"", "1 to 65535"),
            ("[upstream.Ab]", "pb.toml:1: upstream.Ab: upstream name \"Ab\": lower-case"),
            ("[upstream.admin]", "the broker's own"),
            ("[upstream.a]\nurl = \"tcp://x:1\"\n[upstream.a]", "pb.toml:3: not TOML: duplicate"),
            ("a = [", "pb.toml:1: not TOML: "),
            (
                "[dynamic]\nallow = [\n\"10.0.0.0/8\",\n\"10/8\"]",
                "pb.toml:4: dynamic.allow: \"10/8\"",
            ),
            ("[dynamic]\nallow = \"10.0.0.0/8\"", "a list of networks"),
            ("[dynamic]\nupstreams_max = 0", "pb.toml:2: dynamic.upstreams_max: 0 is out"),
            ("[socket]\nmode = \"0400\"", "pb.toml:2: socket.mode"),
            ("[limits]\ndrain_time = 1", "did you mean \"drain_timeout\"?"),
            (
                "[limits]\nnobuf_backoff_min = \"1s\"",
                "pb.toml:2: limits.nobuf_backoff_min: 1s is more than nobuf_backoff_max",
            ),
        ] {
            let error = problem(text);
            assert!(error.contains(says), "{text}: {error}");
        }
    }

    #[test]
    fn limits_that_contradict_the_url_are_refused() {
        let upstream = |url: &str, more: &str| format!("[upstream.a]\nurl = \"{url}\"\n{more}");
        assert_eq!(
            problem(&upstream("udp://x:1", "message_bytes_max = 65508")),
            "pb.toml:3: upstream.a.message_bytes_max: 65508 is more than a datagram holds, 65507"
        );
        let fixed = upstream("tcp://x:1?framing=fixed&size=9", "message_bytes_max = 8");
        assert!(problem(&fixed).contains("fixed messages of 9 bytes exceed message_bytes_max 8"));
        let fifo = upstream("tcp://x:1", "fifo = { framing = \"fixed&size=4097\" }");
        assert_eq!(
            problem(&fifo),
            "pb.toml:1: upstream.a.fifo: records of 4097 bytes exceed fifo_record_bytes_max 4096"
        );
    }

    #[test]
    fn one_way_connections_leave_a_place_for_requests_where_there_are_some() {
        let upstream = |url: &str, lanes: usize, most: usize| {
            let text = format!(
                "[upstream.a]\nurl = \"{url}\"\none_way_connections = {lanes}\n\
                 connections_max = {most}"
            );
            Config::parse(&text, "pb.toml").map(drop).map_err(|error| error.to_string())
        };
        for url in ["tcp://x:1", "udp://x:1"] {
            assert_eq!(upstream(url, 2, 3), Ok(()));
            assert_eq!(upstream(url, 1, 1), Ok(()), "the roles take turns");
            let error = upstream(url, 2, 2).unwrap_err();
            assert_eq!(
                error,
                "pb.toml:3: upstream.a.one_way_connections: 2 do not fit into connections_max, \
                 which is 2, and requests need at least one more place"
            );
        }
        for url in ["udp-write-only://x:1", "tcp://x:1?framing=raw"] {
            assert_eq!(upstream(url, 2, 2), Ok(()));
            let error = upstream(url, 3, 2).unwrap_err();
            assert!(error.ends_with("3 do not fit into connections_max, which is 2"), "{error}");
        }
    }

    #[test]
    fn each_mistake_in_coalesce_is_refused_at_its_line() {
        for (table, says) in [
            ("true", "coalesce: must be a table, not true"),
            ("{ separator = 10 }", "coalesce.separator: must be a text in quotes"),
            ("{ separator = \"12345678901234567\" }", "17 bytes are out of range: from 0 to 16"),
            ("{ max_bytes = 0 }", "coalesce.max_bytes: 0 is out of range: from 1 to 65507"),
            ("{ max_bytes = 65508 }", "65508 is out of range"),
            ("{ max_delay = \"2s\" }", "coalesce.max_delay: 2s is out of range: from 0s to 1s"),
            ("{ delay = \"1ms\" }", "unknown key \"delay\"; there are: separator, max_bytes"),
        ] {
            for url in ["udp://x:1", "udp-write-only://x:1"] {
                let text = format!("[upstream.a]\nurl = \"{url}\"\ncoalesce = {table}");
                let error = problem(&text);
                assert!(error.starts_with("pb.toml:3: upstream.a.coalesce"), "{error}");
                assert!(error.contains(says), "{table}: {error}");
            }
        }
        let text = "[upstream.a]\nurl = \"udp://x:1\"\ncoalesce = { separator = \"\" }";
        let config = Config::parse(text, "pb.toml").unwrap();
        assert_eq!(config.upstreams[0].coalesce.clone().unwrap().separator.bytes(), b"");
    }

    #[test]
    fn upstreams_of_the_command_line_are_checked_like_those_of_the_file() {
        let mut config = Config::parse("[upstream.a]\nurl = \"udp://x:1\"", "pb.toml").unwrap();
        config.add_upstream("b=udp-write-only://[::1]:8125").unwrap();
        assert_eq!(config.upstreams[1].limits.message_bytes_max, UDP_PAYLOAD_BYTES_MAX);
        for (text, says) in [
            ("b", "--upstream: \"b\" is not NAME=URL; for example"),
            ("B=udp://x:1", "lower-case"),
            ("c=udp://x", "--upstream: c: \"udp://x\" is not the URL of an upstream"),
            ("a=udp://x:1", "--upstream: a: this upstream is configured already"),
            ("b=udp://x:1", "configured already"),
        ] {
            let error = config.add_upstream(text).unwrap_err().to_string();
            assert!(error.contains(says), "{text}: {error}");
        }
        assert_eq!(config.upstreams.len(), 2);
    }

    #[test]
    fn a_file_that_is_not_text_is_refused_at_its_line() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b"# fine\nx = \"\xff\"\n").unwrap();
        let error = Config::load(file.path()).unwrap_err();
        assert_eq!(error.line, Some(2), "{error}");
        let error = Config::load(Path::new("/nonexistent/pb.toml")).unwrap_err();
        assert!(error.to_string().starts_with("/nonexistent/pb.toml: cannot be read: "));
    }

    #[test]
    fn the_defaults_lie_within_their_ranges_and_read_back_as_shown() {
        for section in LIMIT_SECTIONS {
            for row in section.rows {
                let header = match section.header {
                    "[upstream.NAME]" => "[upstream.a]\nurl = \"tcp://x:1\"",
                    "[upstream.NAME.coalesce]" => {
                        "[upstream.a]\nurl = \"udp://x:1\"\n[upstream.a.coalesce]"
                    }
                    header => header,
                };
                let text = format!("{header}\n{}", row.assignment());
                assert!(Config::parse(&text, "pb.toml").is_ok(), "{text}");
            }
        }
    }

    proptest! {
        #[test]
        fn arbitrary_text_never_panics(text in "[a-z\\[\\]{}=\".\\n0-9é-]{0,80}") {
            let _ = Config::parse(&text, "pb.toml");
            let _ = Config::parse(&format!("[upstream.a]\nurl=\"udp://x:1\"\n{text}"), "pb.toml");
            let _ = Config::default().add_upstream(&text);
        }
    }
}
