//! What `bench requests` measures on: a broker, backends and proxies, which stay for the whole run,
//! and the clients of one measurement.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;

use poolbroker_client::Transport;
use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_setaffinity};
use tempfile::TempDir;

use super::backends::Backend;
use super::clock::CpuClock;
use super::helper::Helper;
use super::proxies::{self, Proxy, Server};
use super::sessions::{Ask, Asked, Goal, SessionsSpec, Talk};
use crate::cli::child_broker::ChildBroker;
use crate::cli::exit::CommandError;
use crate::config::{BENCH_CONNECTIONS_MAX, BENCH_PIPELINE_DEPTH, BENCH_REST};

/// By which way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Way {
    Direct,
    Unix,
    Ring,
    /// On connections borrowed from the broker.
    Leased,
    By(Proxy),
}

/// Clients that are alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    pub talk: Talk,
    pub clients: usize,
    pub depth: usize,
    pub is_short: bool,
    /// Nothing is asked: connections are opened or borrowed, and closed or given back.
    pub is_empty: bool,
    /// Everything on one processor.
    pub is_one_core: bool,
}

/// What one measurement gave.
#[derive(Debug, Clone, Copy)]
pub struct Run {
    pub asked: Asked,
    pub broker_cpu_ns: u64,
    pub backend_cpu_ns: u64,
    pub backend_connections: u64,
}

/// The processes.
pub struct Arena {
    home: TempDir,
    broker: Broker,
    /// One that knows from its start that it has one processor.
    tied_broker: Broker,
    /// Of the broker, and of everybody else: a backend has its own connections to count.
    backends: HashMap<(Talk, bool), Backend>,
    proxies: HashMap<(Proxy, Talk), (Server, PathBuf)>,
}

struct Broker {
    child: ChildBroker,
    cpu: CpuClock,
}

impl Broker {
    fn start(configuration: &str) -> Result<Self, CommandError> {
        let mut child = ChildBroker::start(|home| {
            let file = home.join("requests.toml");
            fs::write(&file, configuration).map_err(|error| arena_failed(&error))?;
            Ok(vec!["--config".into(), file])
        })?;
        drop(child.connect(Transport::Unix)?);
        let cpu = CpuClock::of(child.child())?;
        Ok(Broker { child, cpu })
    }
}

const TALKS: [(Talk, &str, &str); 2] =
    [(Talk::Echo, "echo", "fixed&size=64"), (Talk::Redis, "redis", "resp")];

/// As it is written in the names of cases and upstreams.
pub fn talk_name(talk: Talk) -> &'static str {
    TALKS.iter().find(|(of, _, _)| *of == talk).map_or("", |(_, name, _)| name)
}

impl Arena {
    /// Starts everything that is installed; says on standard error what is not.
    pub fn open() -> Result<Self, CommandError> {
        let home = tempfile::Builder::new().prefix("poolbroker-bench-").tempdir();
        let home = home.map_err(|error| arena_failed(&error))?;
        let mut backends = HashMap::new();
        for (talk, name, _) in TALKS {
            for is_brokers in [true, false] {
                let name = format!("{name}-{is_brokers}");
                match Backend::start(talk, home.path(), &name)? {
                    Some(backend) => _ = backends.insert((talk, is_brokers), backend),
                    None if is_brokers => eprintln!("redis-server is not installed: left out"),
                    None => {}
                }
            }
        }
        let mut proxies = HashMap::new();
        for proxy in Proxy::LASTING {
            for (talk, name, _) in TALKS {
                let is_served = proxy != Proxy::Nutcracker || talk == Talk::Redis;
                let Some(backend) = backends.get(&(talk, false)).filter(|_| is_served) else {
                    continue;
                };
                match proxies::start(proxy, home.path(), name, backend.address)? {
                    Some(started) => _ = proxies.insert((proxy, talk), started),
                    None if talk == Talk::Redis => {
                        eprintln!("{} is not installed: left out", proxy.name());
                    }
                    None => {}
                }
            }
        }
        let configuration = configuration(&backends);
        let broker = Broker::start(&configuration)?;
        // Children have the processors of their parent.
        let own = Some(std::process::id());
        pin(&[own], true)?;
        let tied_broker = Broker::start(&configuration);
        pin(&[own], false)?;
        Ok(Arena { home, broker, tied_broker: tied_broker?, backends, proxies })
    }

    /// Whether everything that a case needs is installed.
    pub fn has(&self, way: Way, talk: Talk) -> bool {
        let has_backend = self.backends.contains_key(&(talk, is_brokers(way)));
        match way {
            Way::By(proxy) if proxy != Proxy::Bare => {
                has_backend && self.proxies.contains_key(&(proxy, talk))
            }
            Way::By(_) | Way::Direct | Way::Unix | Way::Ring | Way::Leased => has_backend,
        }
    }

    /// Asks in this shape by this way.
    pub fn measure(&mut self, way: Way, shape: &Shape, ask: &Ask) -> Result<Run, CommandError> {
        let place = (shape.talk, is_brokers(way));
        let backend = self.backends.get(&place).expect("it was looked for before");
        let address = backend.address;
        // It keeps its connection, which is to be among those of no other way.
        let bare = match way {
            Way::By(Proxy::Bare) => {
                proxies::start(Proxy::Bare, self.home.path(), talk_name(shape.talk), address)?
            }
            Way::Direct | Way::Unix | Way::Ring | Way::Leased | Way::By(_) => None,
        };
        let proxy = bare.as_ref().or_else(|| self.proxy(way, shape.talk));
        let upstream = || talk_name(shape.talk).to_owned();
        let broker = if shape.is_one_core { &self.tied_broker } else { &self.broker };
        let runtime_dir = || broker.child.runtime_dir().path().to_owned();
        let goal = match way {
            Way::Direct => Goal::Tcp(address),
            Way::Unix => Goal::Frames { runtime_dir: runtime_dir(), upstream: upstream() },
            Way::Ring => Goal::Ring { runtime_dir: runtime_dir(), upstream: upstream() },
            Way::Leased => Goal::Leased { runtime_dir: runtime_dir(), upstream: upstream() },
            Way::By(_) => Goal::Unix(proxy.map(|(_, path)| path.clone()).unwrap_or_default()),
        };
        let spec = SessionsSpec {
            goal,
            talk: shape.talk,
            clients: shape.clients,
            depth: shape.depth,
            is_short: shape.is_short,
            is_empty: shape.is_empty,
        };
        let mut clients = Helper::start("bench-sessions")?;
        let between = match way {
            Way::Direct => None,
            Way::Unix | Way::Ring | Way::Leased => Some((broker.cpu, broker.child.child().id())),
            Way::By(_) => proxy.map(|(server, _)| (server.cpu, server.id())),
        };
        let everyone = [Some(clients.id()), Some(backend.id()), between.map(|(_, id)| id)];
        if shape.is_one_core {
            pin(&everyone, true)?;
        }
        clients.tell(&spec)?;
        let _: bool = clients.hear()?;
        let backend_cpu = backend.cpu;
        let backend = self.backends.get_mut(&place).expect("it is there");
        backend.connections()?;
        let before = (between.map(|(cpu, _)| cpu.ns()).transpose()?, backend_cpu.ns()?);
        clients.tell(ask)?;
        let asked: Asked = clients.hear()?;
        // What it does until it sleeps again belongs to it.
        thread::sleep(BENCH_REST);
        let after = (between.map(|(cpu, _)| cpu.ns()).transpose()?, backend_cpu.ns()?);
        let backend_connections = backend.connections()?;
        if shape.is_one_core {
            pin(&everyone, false)?;
        }
        drop(clients);
        Ok(Run {
            asked,
            broker_cpu_ns: after.0.unwrap_or(0) - before.0.unwrap_or(0),
            backend_cpu_ns: after.1 - before.1,
            backend_connections,
        })
    }

    /// Ends everything, the broker in order.
    pub fn end(self) -> Result<(), CommandError> {
        self.broker.child.end()?;
        self.tied_broker.child.end()?;
        drop(self.home);
        Ok(())
    }

    fn proxy(&self, way: Way, talk: Talk) -> Option<&(Server, PathBuf)> {
        match way {
            Way::By(proxy) => self.proxies.get(&(proxy, talk)),
            Way::Direct | Way::Unix | Way::Ring | Way::Leased => None,
        }
    }
}

fn is_brokers(way: Way) -> bool {
    match way {
        Way::Unix | Way::Ring | Way::Leased => true,
        Way::Direct | Way::By(_) => false,
    }
}

/// Ties processes, with all their threads, to one processor, or lets them go to all again.
fn pin(processes: &[Option<u32>], is_tied: bool) -> Result<(), CommandError> {
    let mut set = CpuSet::new();
    (0..if is_tied { 1 } else { CpuSet::MAX_CPU }).for_each(|processor| set.set(processor));
    for process in processes.iter().flatten() {
        let threads = fs::read_dir(Path::new("/proc").join(process.to_string()).join("task"));
        for thread in threads.map_err(|error| arena_failed(&error))?.flatten() {
            let id = thread.file_name().to_str().and_then(|name| name.parse().ok());
            sched_setaffinity(id.and_then(Pid::from_raw), &set)
                .map_err(|error| arena_failed(&error))?;
        }
    }
    Ok(())
}

fn configuration(backends: &HashMap<(Talk, bool), Backend>) -> String {
    let mut text = "[limits]\nsessions_percent_max = 95\n".to_owned();
    for (talk, name, framing) in TALKS {
        if let Some(backend) = backends.get(&(talk, true)) {
            let address = backend.address;
            text.push_str(&format!(
                "[upstream.{name}]\nurl = \"tcp://{address}?framing={framing}\"\n\
                 connections_max = {BENCH_CONNECTIONS_MAX}\n\
                 pipeline_depth = {BENCH_PIPELINE_DEPTH}\nlease = true\n"
            ));
        }
    }
    text
}

fn arena_failed(error: &dyn std::fmt::Display) -> CommandError {
    CommandError::failed(format!("the benchmark's processes: {error}"))
}
