//! The loop: waits, reads the clock once, feeds events to the pure parts, carries out their
//! actions.
//!
//! ```text
//!   turn: wait -> clock -> events -> commands -> deadlines -> one run of every ready source
//!              -> upstreams work (send, reconnect, ...) -> sources are told -> ended ones go
//!
//!   (and once more before the run of a source that always has more, if there were events)
//! ```
//!
//! Work per source, connection and turn is bounded ([`intake`], [`outlet`]), so nobody keeps the
//! others waiting, and a turn that leaves work behind does not wait. All data of a shard stays in
//! its thread; the other threads send it [`Command`]s.

mod drain;
mod entrance;
mod intake;
mod naps;
mod outlet;
mod rings;
mod sources;
mod upstreams;

use std::num::NonZeroU64;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use poolbroker_proto::address::{Host, HostPort, Protocol};
use poolbroker_proto::frame::{Deframer, Kind};
use poolbroker_proto::framing::{Cutter, Framing};
use poolbroker_proto::message::BrokerMessage;
use poolbroker_proto::reason::Reason;
use rustix::io::Errno;
use rustix::thread::set_current_timer_slack;

use self::intake::{Desk, Order, Served};
use self::outlet::{Context, Upstream};
use self::sources::Sources;
use self::upstreams::Upstreams;
use crate::buffer::Spares;
use crate::closer::Closer;
use crate::config::{
    ACCEPT_PAUSE, ACCEPTS_MAX, BUSY_RUNS_PER_TURN, CLOSING_GRACE, DISCARD_INTERVAL,
};
use crate::config::{BrokerLimits, Config, Dynamic, UpstreamLimits};
use crate::ids::{ConnId, SourceId};
use crate::mailbox::Mailbox;
use crate::poller::{Poller, Readiness, Token};
use crate::quota::{QuotaLimits, Quotas};
use crate::snapshot::{ListenerSnapshot, Snapshot, by_reason};
use crate::stats::Tally;
use crate::timers::Time;
use crate::transport::Io;
use crate::upstream::resolve::{self, Report, Resolver};
use crate::waiting::Waiting;

/// What another thread asks of the shard.
#[derive(Debug)]
pub enum Command {
    /// A copy of every number.
    Status(Sender<Snapshot>),
    /// Take no new session, send what is there, end.
    Drain,
    /// End now.
    Stop,
    /// What became of the names of an upstream.
    Resolved(Report),
}

/// How a shard ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// Everything that was taken has its outcome, and nothing was left unread.
    Clean,
    /// Some messages were given up.
    Undelivered {
        /// How many.
        messages: u64,
    },
}

/// A FIFO, opened.
#[derive(Debug)]
pub struct OpenFifo {
    /// Its descriptor.
    pub fd: OwnedFd,
    /// Its path.
    pub path: PathBuf,
    /// The upstream its messages go to, by index.
    pub upstream: usize,
    /// How they are cut.
    pub framing: Framing,
}

/// What a shard is made of.
#[derive(Debug)]
pub struct ShardParts {
    /// Everything configured.
    pub config: Config,
    /// Shown by `status`.
    pub runtime_dir: PathBuf,
    /// The client socket, listening.
    pub listener: OwnedFd,
    /// The path of the client socket.
    pub listener_path: PathBuf,
    /// The FIFOs.
    pub fifos: Vec<OpenFifo>,
    /// Commands.
    pub mailbox: Mailbox<Command>,
    /// For host names.
    pub resolver: Resolver,
    /// For passed descriptors.
    pub closer: Closer,
    /// Descriptors that the process may have.
    pub descriptors_max: usize,
}

/// What a watched descriptor belongs to.
#[derive(Debug, Clone, Copy)]
pub enum Target {
    /// The client socket.
    Listener,
    /// The mailbox.
    Mailbox,
    /// A source.
    Source(SourceId),
    /// The process behind a source, by pidfd.
    Process(SourceId),
    /// The doorbell of a source's ring.
    Doorbell(SourceId),
    /// A connection.
    Conn {
        /// Of this upstream.
        upstream: usize,
        /// Which.
        conn: ConnId,
    },
}

#[derive(Debug)]
struct Listener {
    fd: Option<OwnedFd>,
    path: PathBuf,
    token: Token,
    /// Given up to accept one client too many, so that it can be told (R1).
    spare: Option<OwnedFd>,
    resumes_at: Option<Time>,
    accepted: u64,
    refused: Tally,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Running,
    /// Sources are read to their ends. `is_last_pass`: everything was found empty once, and is
    /// looked at again.
    Draining {
        deadline: Time,
        is_last_pass: bool,
    },
    /// Nothing is left but to end the connections in order.
    Closing {
        deadline: Time,
    },
}

/// One shard. See the module's text.
#[derive(Debug)]
pub struct Shard {
    started: Instant,
    now: Time,
    limits: BrokerLimits,
    dynamic: Dynamic,
    runtime_dir: PathBuf,
    poller: Poller<Target>,
    sources: Sources,
    upstreams: Upstreams,
    spares: Spares,
    quotas: Quotas,
    listener: Listener,
    fifo_paths: Vec<(SourceId, PathBuf)>,
    mailbox: Mailbox<Command>,
    resolver: Resolver,
    closer: Closer,
    pidfds: slotmap::SecondaryMap<SourceId, (OwnedFd, Token)>,
    deframer: Deframer,
    touched: Vec<usize>,
    orders: Vec<Order>,
    next_session_id: u64,
    discards_due_at: Time,
    scratch: Vec<u8>,
    waiting: Waiting,
    /// Everything awake was looked at since the loop last planned to wait.
    has_looked: bool,
    phase: Phase,
    given_up: u64,
}

impl Shard {
    /// A shard over these parts, its FIFOs watched and its names being resolved.
    pub fn new(parts: ShardParts) -> Result<Self, Errno> {
        let ShardParts { config, listener, mailbox, .. } = parts;
        let mut poller = Poller::new()?;
        let token = poller.watch_listener(&listener, Target::Listener)?;
        poller.watch_listener(&mailbox, Target::Mailbox)?;
        let percent = config.broker.sessions_percent_max as usize;
        let quotas = Quotas::new(QuotaLimits {
            sessions_max: parts.descriptors_max * percent / 100,
            queued_bytes_max: config.broker.queued_bytes_max_per_uid,
            descriptors_max: config.broker.descriptors_in_flight_max_per_uid,
            ring_bytes_max: config.broker.ring_bytes_max_per_uid,
        });
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let waiting = Waiting::new(config.broker.busy_poll, processors);
        let seed = u64::from(std::process::id());
        let mut upstreams = Vec::new();
        for (index, upstream) in config.upstreams.into_iter().enumerate() {
            let seed = seed.wrapping_mul(0x9e37_79b9).wrapping_add(index as u64);
            upstreams.push(Upstream::new(index, upstream, &config.broker, seed));
        }
        for broadcast in 0..upstreams.len() {
            let begin = upstreams.len();
            for copy in upstreams[broadcast].config.copies() {
                let index = upstreams.len();
                let seed = seed.wrapping_mul(0x9e37_79b9).wrapping_add(index as u64);
                let mut upstream = Upstream::new(index, copy, &config.broker, seed);
                upstream.send_copies_of(broadcast);
                upstreams.push(upstream);
            }
            if upstreams.len() > begin {
                upstreams[broadcast].copies = Some(begin..upstreams.len());
            }
        }
        let longest = upstreams.iter().map(|upstream| upstream.config.limits.message_bytes_max);
        let of_dynamic = UpstreamLimits::of_protocol(Protocol::Tcp).message_bytes_max;
        let longest = longest.max().unwrap_or(0).max(of_dynamic);
        let mut shard = Shard {
            started: Instant::now(),
            now: Time::default(),
            sources: Sources::new(config.broker.reply_queue_bytes_max),
            limits: config.broker,
            dynamic: config.dynamic,
            runtime_dir: parts.runtime_dir,
            poller,
            upstreams: Upstreams::new(upstreams),
            spares: Spares::default(),
            quotas,
            listener: Listener {
                fd: Some(listener),
                path: parts.listener_path,
                token,
                spare: entrance::spare_descriptor(),
                resumes_at: None,
                accepted: 0,
                refused: Tally::default(),
            },
            fifo_paths: Vec::new(),
            mailbox,
            resolver: parts.resolver,
            closer: parts.closer,
            pidfds: slotmap::SecondaryMap::new(),
            deframer: Deframer::new(longest),
            touched: Vec::new(),
            orders: Vec::new(),
            next_session_id: 1,
            discards_due_at: Time::default() + DISCARD_INTERVAL,
            scratch: Vec::new(),
            waiting,
            has_looked: false,
            phase: Phase::Running,
            given_up: 0,
        };
        for fifo in parts.fifos {
            shard.add_fifo(fifo)?;
        }
        shard.locate_upstreams();
        Ok(shard)
    }

    /// Runs until the shard was told to end and has done so.
    pub fn run(mut self) -> Result<Ending, Errno> {
        // A nap is to end when it says, not 50 us later (prctl(2), PR_SET_TIMERSLACK).
        set_current_timer_slack(NonZeroU64::new(1))?;
        loop {
            let timeout = self.timeout();
            self.poller.wait(self.now, timeout)?;
            self.read_clock();
            self.handle_events();
            self.look();
            self.handle_deadlines();
            self.serve_ready();
            self.work();
            self.tell_sources();
            if let Some(ending) = self.advance_drain() {
                return Ok(ending);
            }
        }
    }

    fn read_clock(&mut self) {
        self.now = Time::from_start(self.started.elapsed());
    }

    fn locate_upstreams(&mut self) {
        for (index, upstream) in self.upstreams.iter_mut().enumerate() {
            // It connects to nobody itself.
            if upstream.copies.is_some() {
                continue;
            }
            let url = &upstream.config.url;
            let (mut names, mut fixed) = (Vec::new(), Vec::new());
            for HostPort { host, port } in &url.hosts {
                match host {
                    Host::Ip(address) => fixed.push((*address, *port).into()),
                    Host::Name(name) => names.push((name.clone(), *port)),
                }
            }
            match names.is_empty() {
                true => upstream.pool.handle_resolved(self.now, fixed),
                false => self.resolver.watch(resolve::Request {
                    upstream: index,
                    hosts: names,
                    fixed,
                    allow: upstream.config.resolve_allow.clone(),
                }),
            }
        }
    }

    // One turn.

    fn timeout(&mut self) -> Option<Duration> {
        let has_work = self.upstreams.settle();
        if has_work || self.sources.ready_count() > 0 || self.sources.has_held_answers() {
            return Some(Duration::ZERO);
        }
        let drain = match self.phase {
            Phase::Running => None,
            Phase::Draining { deadline, is_last_pass: false } | Phase::Closing { deadline } => {
                Some(deadline)
            }
            Phase::Draining { is_last_pass: true, .. } => return Some(Duration::ZERO),
        };
        let nap = match self.nap() {
            Some(Duration::ZERO) => return Some(Duration::ZERO),
            nap => nap.map(|nap| self.now + nap),
        };
        let next = self
            .upstreams
            .next_deadline()
            .into_iter()
            .chain(self.sources.next_deadline())
            .chain(self.listener.resumes_at)
            .chain(drain)
            .chain(self.sources.starved_until())
            .chain(nap)
            .chain([self.discards_due_at])
            .min()?;
        Some(next.since(self.now))
    }

    fn handle_events(&mut self) {
        let mut is_asked = false;
        while let Some((target, readiness)) = self.poller.pop_event() {
            is_asked |= readiness.is_readable();
            match target {
                Target::Listener => self.accept_clients(),
                Target::Mailbox => self.handle_commands(),
                Target::Source(id) => self.handle_source_event(id, readiness),
                Target::Process(id) => self.handle_process_end(id),
                Target::Doorbell(id) => self.handle_doorbell(id),
                Target::Conn { upstream, conn } => {
                    let mut context = Context {
                        now: self.now,
                        poller: &mut self.poller,
                        spares: &mut self.spares,
                        sources: &mut self.sources,
                        closer: &mut self.closer,
                    };
                    self.upstreams[upstream].handle_event(&mut context, conn, readiness);
                }
            }
        }
        if is_asked {
            self.waiting.handle_events(self.now);
        }
    }

    fn handle_source_event(&mut self, id: SourceId, readiness: Readiness) {
        let Some(source) = self.sources.table.get_mut(id) else {
            return;
        };
        source.is_hung_up |= readiness.is_hung_up();
        source.is_ending |= readiness.is_ending();
        if readiness.is_writable() && std::mem::take(&mut source.waits_for_room) {
            self.poller.set_source_room_watched(&source.io, source.token, false);
        }
        if readiness.is_readable() {
            source.is_readable = true;
            self.sources.make_ready(id);
        }
        if readiness.is_writable() {
            self.sources.make_due(id);
        }
    }

    fn handle_commands(&mut self) {
        self.mailbox.clear_wake_ups();
        while let Ok(command) = self.mailbox.try_receive() {
            match command {
                // The asker has given up if it cannot be answered.
                Command::Status(answer) => drop(answer.try_send(self.snapshot())),
                Command::Drain => self.begin_drain(),
                Command::Stop => self.stop(),
                Command::Resolved(Report::Addresses(upstream, addresses)) => {
                    self.upstreams[upstream].pool.handle_resolved(self.now, addresses);
                }
                Command::Resolved(Report::Lookup(upstream, lookup)) => {
                    self.upstreams[upstream].note_lookup(lookup);
                }
            }
        }
    }

    fn handle_deadlines(&mut self) {
        while let Some(id) = self.sources.pop_overdue(self.now) {
            self.handle_overdue(id);
        }
        while let Some(upstream) = self.upstreams.pop_due(self.now) {
            self.upstreams[upstream].handle_timeout(self.now);
        }
        if self.listener.resumes_at.is_some_and(|at| at <= self.now) {
            self.listener.resumes_at = None;
            if let Some(fd) = &self.listener.fd {
                self.poller.set_listening(fd, self.listener.token, true);
            }
        }
        if self.discards_due_at <= self.now {
            self.discards_due_at = self.now + DISCARD_INTERVAL;
            self.upstreams.iter_mut().for_each(Upstream::refresh_discards);
        }
        self.sources.feed_starved(self.now);
    }

    fn handle_overdue(&mut self, id: SourceId) {
        let Some(source) = self.sources.table.get_mut(id) else {
            return;
        };
        if let Some(reason) = source.session.handle_timeout(self.now) {
            match &mut source.io {
                Io::Fifo(_) => {
                    // Whoever began the record is gone or stuck; the next one starts afresh. One
                    // that was too long is counted already.
                    let is_skipping = source.cutter.as_ref().is_some_and(Cutter::is_skipping);
                    if !is_skipping {
                        source.session.handle_refused(Some(0), Reason::Partial);
                    }
                    if let Some(buffer) = source.buffer.take() {
                        self.spares.put_back(buffer);
                    }
                    if let Some(cutter) = &mut source.cutter {
                        cutter.reset();
                    }
                }
                Io::Unix(socket) if socket.descriptors() > 0 => {
                    source.ended = Some(Reason::UnexpectedDescriptor);
                }
                Io::Unix(_) | Io::Pipe(_) | Io::Socketpair(_) => {
                    let kind = match reason {
                        Reason::PartialTimeout => Reason::Partial,
                        reason => reason,
                    };
                    source.session.handle_refused(None, kind);
                    source.ended = Some(reason);
                }
            }
            self.sources.make_due(id);
            if self.sources.has_ended(id) {
                return;
            }
        }
        self.sources.schedule(id);
    }

    fn serve_ready(&mut self) {
        // Whoever comes now and then waits for one run of those who always have more, and not for one
        // of each (RFC 8290, 4.2: new queues before old ones). Those have theirs in turn.
        let (mut busy_runs, mut has_news) = (0, !self.poller.is_quiet());
        for _ in 0..self.sources.ready_count() {
            if busy_runs >= BUSY_RUNS_PER_TURN {
                return;
            }
            // Nor do the requests and replies that came wait for that run.
            if !self.sources.has_fresh() && std::mem::take(&mut has_news) {
                self.work();
                self.tell_sources();
            }
            let Some((id, is_busy)) = self.sources.pop_ready() else { return };
            let mut desk = Desk {
                now: self.now,
                upstreams: &mut self.upstreams,
                spares: &mut self.spares,
                limits: &self.limits,
                dynamic: &self.dynamic,
                deframer: self.deframer,
                touched: &mut self.touched,
                orders: &mut self.orders,
                scratch: &mut self.scratch,
                is_draining: self.phase != Phase::Running,
            };
            let (served, bytes) = intake::serve(&mut desk, &mut self.sources, id);
            if bytes > 0 {
                has_news |= !is_busy;
                self.note_found(id, bytes);
            }
            match served {
                Served::Again => self.sources.make_busy(id),
                Served::Overdrawn => {
                    self.sources.make_busy(id);
                    continue;
                }
                Served::Idle => self.rest(id),
                Served::Held => {
                    if let Some(source) = self.sources.table.get_mut(id) {
                        source.is_held = true;
                    }
                }
                Served::Blocked { upstream, bytes } => {
                    if let Some(source) = self.sources.table.get_mut(id) {
                        source.is_blocked = true;
                    }
                    let full = intake::held_up_at(&self.upstreams, upstream, bytes);
                    self.upstreams[full].block(id, bytes);
                }
                Served::Starved => self.sources.starve(self.now, id),
                Served::Ended(reason) => {
                    if let Some(source) = self.sources.table.get_mut(id) {
                        source.ended = Some(reason);
                    }
                }
            }
            // A run that took nothing kept nobody waiting.
            busy_runs += usize::from(is_busy && bytes > 0);
            self.sources.answer(self.now, id);
            self.sources.schedule(id);
            for order in std::mem::take(&mut self.orders) {
                self.carry_out(order);
            }
            // A queue that is nearly full is sent before the next source finds it so, and a full
            // batch while its bytes are at hand.
            while let Some(upstream) = self.touched.pop() {
                let outlet = &self.upstreams[upstream];
                if !outlet.pool.has_room_again() || outlet.wants_work() {
                    self.work_on(upstream);
                }
            }
        }
    }

    fn work(&mut self) {
        let mut at = 0;
        while let Some(upstream) = self.upstreams.stirred(at) {
            self.work_on(upstream);
            at += 1;
        }
    }

    fn work_on(&mut self, upstream: usize) {
        let mut context = Context {
            now: self.now,
            poller: &mut self.poller,
            spares: &mut self.spares,
            sources: &mut self.sources,
            closer: &mut self.closer,
        };
        self.upstreams[upstream].work(&mut context);
    }

    fn tell_sources(&mut self) {
        if self.poller.is_quiet() || self.sources.must_answer(self.now) {
            self.sources.release_answers();
        }
        // The end of one source may be news for another.
        while let Some(id) = self.sources.pop_due() {
            if self.sources.pump(id) {
                self.end(id);
            }
        }
        for id in std::mem::take(&mut self.sources.full) {
            if let Some(source) = self.sources.table.get_mut(id) {
                source.waits_for_room = true;
                self.poller.set_source_room_watched(&source.io, source.token, true);
            }
        }
    }

    // Endings.

    /// Removes a source that is done: cancels its requests, closes its descriptor, tells the
    /// session that attached it.
    fn end(&mut self, id: SourceId) {
        let reason = self.sources.table.get(id).and_then(|source| source.ended);
        let reason = reason.unwrap_or(Reason::Internal);
        for (upstream, request) in self.sources.requests(id) {
            self.upstreams[upstream].pool.cancel(self.now, request);
            self.work_on(upstream);
        }
        for upstream in self.sources.upstreams(id) {
            if self.upstreams[upstream].pool.end_leases(self.now, id) {
                self.work_on(upstream);
            }
        }
        let Some(mut source) = self.sources.remove(id) else {
            return;
        };
        let session = source.session.id;
        tracing::debug!(session, pid = source.session.peer.pid, %reason, "session ended");
        if reason == Reason::Drained && matches!(source.io, Io::Unix(_)) {
            let upstreams = source.session.all_outcomes();
            let goodbye = BrokerMessage::Goodbye { reason: Reason::ShuttingDown, upstreams };
            source.tell_control(Kind::Control, 0, &goodbye);
        }
        match &source.ring {
            // The reason itself goes by the socket.
            Some(_) if reason == Reason::RingCorrupt => {
                if let Some(stream) = source.io.stream_mut() {
                    stream.discard();
                    entrance::refuse_client(stream, reason, reason.to_string());
                }
            }
            Some(_) | None => {
                let _ = source.flush();
            }
        }
        if let Some(ring) = source.ring.take() {
            self.poller.unwatch(ring.doorbell(), source.doorbell);
        }
        match source.io.closes_at_once() {
            true => self.poller.forget(source.token),
            false => self.poller.unwatch(&source.io, source.token),
        }
        if let Some((pidfd, token)) = self.pidfds.remove(id) {
            self.poller.unwatch(&pidfd, token);
        }
        if let Some(parent) = source.parent
            && let Some(parent_source) = self.sources.table.get_mut(parent)
        {
            parent_source.children -= 1;
            let outcomes = source.session.outcomes(0);
            let message = BrokerMessage::Detached { session, reason, outcomes };
            parent_source.tell_control(Kind::Control, 0, &message);
            self.sources.make_due(parent);
        }
        if let Some(buffer) = source.buffer.take() {
            self.spares.put_back(buffer);
        }
        for descriptor in source.io.into_closing() {
            self.closer.close(descriptor);
        }
    }

    fn snapshot(&mut self) -> Snapshot {
        let client_socket = ListenerSnapshot {
            kind: "unix",
            path: self.listener.path.clone(),
            upstream: None,
            accepted: self.listener.accepted,
            refused: by_reason(&self.listener.refused),
        };
        let fifos = self.fifo_paths.iter().filter_map(|(id, path)| {
            let session = &self.sources.table.get(*id)?.session;
            let upstream = session.upstream(0)?;
            Some(ListenerSnapshot {
                kind: "fifo",
                path: path.clone(),
                upstream: Some(self.upstreams[upstream].config.name.clone()),
                accepted: session.accepted(),
                refused: by_reason(&session.refused()),
            })
        });
        let listeners = std::iter::once(client_socket).chain(fifos).collect();
        let (now, sources) = (self.now, &self.sources);
        let upstreams =
            self.upstreams.iter_mut().map(|upstream| upstream.snapshot(now, sources)).collect();
        Snapshot {
            version: env!("CARGO_PKG_VERSION"),
            pid: std::process::id(),
            uptime_s: self.now.since(Time::default()).as_secs(),
            runtime_dir: self.runtime_dir.clone(),
            state: if self.phase == Phase::Running { "running" } else { "draining" },
            upstreams,
            listeners,
            sessions: self.sources.snapshot(),
        }
    }
}
