//! What `bench one-way` measures on: one broker, its sinks, and the producers of each case, all
//! processes of their own that stay for the whole run; and the measuring of one case once.

use std::collections::HashMap;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::num::NonZeroU64;
use std::path::PathBuf;
use std::thread;
use std::time::Instant;

use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use poolbroker_client::Transport;

use super::clock::CpuClock;
use super::helper::Helper;
use super::load::{Done, LoadSpec, Order, Ready, Way};
use super::sink::{Ask, SinkReport, SinkSpec};
use crate::cli::child_broker::ChildBroker;
use crate::cli::exit::CommandError;
use crate::config::{BENCH_POLL_INTERVAL, BENCH_REST, BENCH_SETTLING};

/// What is at the other end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Target {
    /// The peer that reads normally: directly, or by the upstream that sends a datagram for each
    /// message.
    Plain,
    /// The upstream that joins messages.
    Coalescing,
    /// A FIFO that no broker reads, but a reader that sleeps between large reads.
    NappingReader,
}

/// Producers that are alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Crew {
    pub way: Way,
    pub target: Target,
    pub producers: u64,
    pub bytes: usize,
}

/// How much to send.
#[derive(Debug, Clone, Copy)]
pub struct Task {
    /// By all producers together.
    pub messages: u64,
    /// Between two messages of one producer.
    pub interval_ns: Option<NonZeroU64>,
}

/// What one measurement gave.
#[derive(Debug, Clone, Copy)]
pub struct Run {
    pub accepted: u64,
    pub delivered: u64,
    pub client_cpu_ns: f64,
    pub broker_cpu_ns: f64,
    pub sink_cpu_ns: f64,
    /// From the first send to the last producer's end.
    pub seconds: f64,
    pub p50_us: f64,
    pub p99_us: f64,
}

impl Run {
    /// A figure per message that was accepted.
    pub fn per_message(&self, figure: f64) -> f64 {
        figure / self.accepted.max(1) as f64
    }

    /// Messages of all producers per second.
    pub fn messages_per_s(&self) -> f64 {
        self.accepted as f64 / self.seconds
    }
}

/// The processes.
pub struct Stage {
    crews: HashMap<Crew, Vec<Helper>>,
    broker: ChildBroker,
    broker_cpu: CpuClock,
    sinks: HashMap<Target, Sink>,
}

const PLAIN: &str = "plain";
const COALESCING: &str = "coalescing";
const SEPARATOR: u8 = b'\n';

impl Stage {
    /// Starts the broker and its sinks.
    pub fn set() -> Result<Self, CommandError> {
        let mut sinks = HashMap::new();
        sinks.insert(Target::Plain, Sink::start(&SinkSpec::Udp { separator: None })?);
        let joined = Sink::start(&SinkSpec::Udp { separator: Some(SEPARATOR) })?;
        sinks.insert(Target::Coalescing, joined);
        let mut napped_fifo = PathBuf::new();
        let text = configuration(&sinks);
        let mut broker = ChildBroker::start(|home| {
            napped_fifo = home.join("napping-reader.fifo");
            mkfifo(&napped_fifo, Mode::S_IRWXU).map_err(|error| stage_failed(&error))?;
            let file = home.join("bench.toml");
            fs::write(&file, text).map_err(|error| stage_failed(&error))?;
            Ok(vec!["--config".into(), file])
        })?;
        drop(broker.connect(Transport::Unix)?);
        let napping = Sink::start(&SinkSpec::NappingReader { path: napped_fifo })?;
        sinks.insert(Target::NappingReader, napping);
        let broker_cpu = CpuClock::of(broker.child())?;
        Ok(Stage { crews: HashMap::new(), broker, broker_cpu, sinks })
    }

    /// Lets the crew do the task, and waits until everything has arrived or nothing more comes.
    pub fn measure(&mut self, crew: &Crew, task: &Task) -> Result<Run, CommandError> {
        if !self.crews.contains_key(crew) {
            let helpers = self.hire(crew)?;
            self.crews.insert(*crew, helpers);
        }
        let sink = self.sinks.get_mut(&crew.target).expect("every target has a sink");
        let helpers = self.crews.get_mut(crew).expect("it was hired");
        let before = sink.ask(Some(task.interval_ns.is_some()))?;
        let cpu_before = (self.broker_cpu.ns()?, sink.cpu.ns()?);
        let done = send(helpers, task)?;
        let accepted = done.iter().map(|done| done.accepted).sum();
        let after = sink.settle(before.messages + accepted)?;
        // What the broker does until it sleeps again belongs to it.
        thread::sleep(BENCH_REST);
        let cpu_after = (self.broker_cpu.ns()?, sink.cpu.ns()?);
        let first_ns = done.iter().map(|done| done.started_ns).min().unwrap_or_default();
        let last_ns = done.iter().map(|done| done.ended_ns).max().unwrap_or_default();
        Ok(Run {
            accepted,
            delivered: after.messages - before.messages,
            client_cpu_ns: done.iter().map(|done| done.cpu_ns).sum::<u64>() as f64,
            broker_cpu_ns: (cpu_after.0 - cpu_before.0) as f64,
            sink_cpu_ns: (cpu_after.1 - cpu_before.1) as f64,
            seconds: last_ns.saturating_sub(first_ns) as f64 / 1e9,
            p50_us: after.p50_ns as f64 / 1e3,
            p99_us: after.p99_ns as f64 / 1e3,
        })
    }

    /// Ends the producers, then the broker.
    pub fn end(mut self) -> Result<(), CommandError> {
        self.crews.clear();
        self.broker.end()
    }

    fn hire(&self, crew: &Crew) -> Result<Vec<Helper>, CommandError> {
        let upstream = match crew.target {
            Target::Plain | Target::NappingReader => PLAIN,
            Target::Coalescing => COALESCING,
        };
        let fifo = match crew.target {
            Target::Plain | Target::Coalescing => self.broker.runtime_dir().fifo(upstream),
            Target::NappingReader => self.broker.home().join("napping-reader.fifo"),
        };
        let spec = LoadSpec {
            way: crew.way,
            bytes: crew.bytes,
            sink: self.sinks[&crew.target].address,
            runtime_dir: self.broker.runtime_dir().path().to_owned(),
            upstream: upstream.to_owned(),
            fifo,
        };
        let mut helpers = Vec::new();
        for _ in 0..crew.producers {
            let mut helper = Helper::start("bench-load")?;
            helper.tell(&spec)?;
            helpers.push(helper);
        }
        for helper in &mut helpers {
            let Ready {} = helper.hear()?;
        }
        Ok(helpers)
    }
}

/// Gives each its share, and waits for all.
fn send(helpers: &mut [Helper], task: &Task) -> Result<Vec<Done>, CommandError> {
    let messages = (task.messages / helpers.len() as u64).max(1);
    let order = Order { messages, interval_ns: task.interval_ns };
    for helper in &mut *helpers {
        helper.tell(&order)?;
    }
    helpers.iter_mut().map(Helper::hear).collect()
}

/// A sink process.
struct Sink {
    helper: Helper,
    address: SocketAddr,
    cpu: CpuClock,
}

impl Sink {
    fn start(spec: &SinkSpec) -> Result<Self, CommandError> {
        let mut helper = Helper::start("bench-sink")?;
        helper.tell(spec)?;
        let address = helper.hear()?;
        let cpu = helper.cpu_clock()?;
        Ok(Sink { helper, address, cpu })
    }

    fn ask(&mut self, is_stamped: Option<bool>) -> Result<SinkReport, CommandError> {
        self.helper.tell(&Ask { is_stamped })?;
        self.helper.hear()
    }

    /// Waits until so many messages have arrived in all, or nothing more comes.
    fn settle(&mut self, expected: u64) -> Result<SinkReport, CommandError> {
        let mut last = self.ask(None)?;
        let mut news = Instant::now();
        while last.messages < expected && news.elapsed() < BENCH_SETTLING {
            thread::sleep(BENCH_POLL_INTERVAL);
            let report = self.ask(None)?;
            if report.messages > last.messages {
                news = Instant::now();
            }
            last = report;
        }
        Ok(last)
    }
}

/// One upstream that sends each message by itself and one that joins them.
fn configuration(sinks: &HashMap<Target, Sink>) -> String {
    let address = |target| {
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        sinks.get(&target).map_or(any, |sink: &Sink| sink.address)
    };
    let (plain, joined) = (address(Target::Plain), address(Target::Coalescing));
    format!(
        "[upstream.{PLAIN}]\nurl = \"udp-write-only://{plain}\"\n\
         [upstream.{COALESCING}]\nurl = \"udp-write-only://{joined}\"\n\
         coalesce = {{ separator = \"\\n\", max_bytes = 1432, max_delay = \"1ms\" }}\n"
    )
}

fn stage_failed(error: &dyn std::fmt::Display) -> CommandError {
    CommandError::failed(format!("the benchmark's own directory: {error}"))
}
