//! `poolbroker bench idle`: what sessions cost that do nothing.
//!
//! Each round starts a fresh broker for each transport, so that memory once used by sessions of the
//! last round does not hide what new ones take. The sessions belong to this process; none of them
//! sends anything.

use std::fs;
use std::thread;

use clap::Args;
use poolbroker_client::{Client, Transport};
use poolbroker_proto::ring::{CAPACITY_MIN, Header};

use super::clock::CpuClock;
use super::measure::{Bound, Column, Figure, Figures, Goal, Metric};
use super::{Options, raise_descriptors};
use crate::cli::after_help;
use crate::cli::child_broker::ChildBroker;
use crate::cli::exit::{CommandError, Exit, complain};
use crate::config::{
    BENCH_DESCRIPTORS_SPARE, BENCH_IDLE_CALM, BENCH_IDLE_SESSIONS,
    BENCH_IDLE_SESSIONS_PERCENT as SESSIONS_PERCENT, BENCH_IDLE_SPAN,
};

/// Measure what idle sessions cost the broker: CPU, and memory.
///
/// CPU % is that of a core over some seconds in which nobody sends. BYTES/SESSION is what the
/// broker's resident memory grew by, divided by the sessions. Many sessions need many descriptors:
/// the limit is raised as far as this user may, and a case for which that is not enough says how many
/// sessions it has instead.
#[derive(Debug, Args)]
#[command(after_help = after_help(EXAMPLES))]
pub struct Idle {
    #[command(flatten)]
    options: Options,
}

const EXAMPLES: &str = "\
Examples:
  poolbroker bench idle
  poolbroker bench idle --case ring --rounds 3";

const COLUMNS: &[Column] =
    &[Column::Value(Metric::CpuPercent), Column::Value(Metric::SessionBytes)];

const GOALS: &[Goal] = &[Goal {
    case: "ring/sessions=1000",
    metric: Metric::CpuPercent,
    figure: Figure::Value,
    bound: Bound::AtMost(0.5),
}];

/// A transport, and what a session by it takes.
struct Idler {
    name: &'static str,
    transport: Transport,
    /// Descriptors in the broker, each of which its quotas count as a session.
    in_broker: usize,
    /// Descriptors here.
    here: usize,
}

const TRANSPORTS: [Idler; 2] = [
    Idler { name: "unix", transport: Transport::Unix, in_broker: 1, here: 1 },
    // Socket and doorbell; here also the memory, for the next broker, and what is polled.
    Idler {
        name: "ring",
        transport: Transport::Ring { bytes: CAPACITY_MIN },
        in_broker: 2,
        here: 4,
    },
];

impl Idler {
    /// The limit that so many sessions need: the broker gives its sessions a share of it.
    fn descriptors(&self, sessions: usize) -> usize {
        let in_broker = (sessions * self.in_broker * 100).div_ceil(SESSIONS_PERCENT);
        BENCH_DESCRIPTORS_SPARE + in_broker.max(sessions * self.here)
    }

    /// The sessions that a limit carries.
    fn sessions_max(&self, descriptors: usize) -> usize {
        let usable = descriptors.saturating_sub(BENCH_DESCRIPTORS_SPARE);
        let in_broker = usable.saturating_mul(SESSIONS_PERCENT) / 100 / self.in_broker;
        in_broker.min(usable / self.here)
    }
}

impl Idle {
    /// Measures, prints.
    pub fn run(&self) -> Result<Exit, CommandError> {
        let most = BENCH_IDLE_SESSIONS.into_iter().max().unwrap_or_default();
        let wanted = TRANSPORTS.iter().map(|transport| transport.descriptors(most)).max();
        let descriptors = raise_descriptors(wanted.unwrap_or_default())?;
        let steps = |transport: &Idler| (transport.transport, self.steps(transport, descriptors));
        let mut courses: Vec<_> = TRANSPORTS.iter().map(steps).collect();
        courses.retain(|(_, steps)| !steps.is_empty());
        self.options.check_cases(courses.len())?;
        let mut figures = Figures::new("idle", self.options.rounds());
        for round in 0..self.options.rounds() {
            let is_even = round.is_multiple_of(2);
            for index in 0..courses.len() {
                let index = if is_even { index } else { courses.len() - 1 - index };
                let (transport, steps) = &courses[index];
                measure(*transport, steps, &mut figures)?;
            }
        }
        figures.print(self.options.json, COLUMNS, GOALS)?;
        Ok(Exit::Done)
    }

    /// The cases of a transport, and how many sessions each has: no more than the limit carries.
    fn steps(&self, transport: &Idler, descriptors: usize) -> Vec<(String, usize)> {
        let carried = transport.sessions_max(descriptors);
        let mut steps = Vec::new();
        for wanted in BENCH_IDLE_SESSIONS {
            let sessions = wanted.min(carried);
            let case = format!("{}/sessions={sessions}", transport.name);
            if !self.options.is_wanted(&case) {
                continue;
            }
            if sessions < wanted {
                complain(&format!(
                    "{case} instead of {wanted}: RLIMIT_NOFILE is {descriptors} and cannot be \
                     raised by this user; try `ulimit -n` as another"
                ));
            }
            steps.push((case, sessions));
        }
        steps
    }
}

/// Connects more and more sessions to one broker, and looks at it after each step.
fn measure(
    transport: Transport,
    steps: &[(String, usize)],
    figures: &mut Figures,
) -> Result<(), CommandError> {
    let mut broker = ChildBroker::start(|home| {
        let file = home.join("bench.toml");
        fs::write(&file, configuration()).map_err(|error| failed("its configuration", error))?;
        Ok(vec!["--config".into(), file])
    })?;
    // The first session shows that it serves, and what comes once with the first.
    drop(broker.connect(Transport::Unix)?);
    thread::sleep(BENCH_IDLE_CALM);
    let clock = CpuClock::of(broker.child())?;
    let bytes_before = resident_bytes(broker.child().id())?;
    let mut clients: Vec<Client> = Vec::new();
    for (case, sessions) in steps {
        while clients.len() < *sessions {
            clients.push(broker.connect(transport)?);
        }
        thread::sleep(BENCH_IDLE_CALM);
        let before = clock.ns()?;
        thread::sleep(BENCH_IDLE_SPAN);
        let cpu_ns = (clock.ns()? - before) as f64;
        let percent = cpu_ns / BENCH_IDLE_SPAN.as_nanos() as f64 * 100.0;
        figures.record(case, Metric::CpuPercent, percent);
        if *sessions > 0 {
            let grown = resident_bytes(broker.child().id())?.saturating_sub(bytes_before);
            figures.record(case, Metric::SessionBytes, grown as f64 / *sessions as f64);
        }
    }
    drop(clients);
    broker.end()
}

/// VmRSS in proc(5).
fn resident_bytes(pid: u32) -> Result<u64, CommandError> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"));
    let status = status.map_err(|error| failed("/proc/PID/status", error))?;
    read_resident(&status)
        .ok_or_else(|| failed("/proc/PID/status", std::io::Error::other("it has no VmRSS")))
}

fn read_resident(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// An upstream that is never used, and room for the rings.
fn configuration() -> String {
    let most = BENCH_IDLE_SESSIONS.into_iter().max().unwrap_or_default();
    let ring_bytes = most * Header::region_bytes(CAPACITY_MIN);
    format!(
        "[upstream.unused]\nurl = \"udp-write-only://127.0.0.1:9\"\n\
         [limits]\nring_bytes_max_per_uid = {ring_bytes}\n\
         sessions_percent_max = {SESSIONS_PERCENT}\n"
    )
}

fn failed(what: &str, error: std::io::Error) -> CommandError {
    CommandError::failed(format!("{what}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resident_memory_is_read_from_the_kernel_s_text() {
        let status = "Name:\tx\nVmHWM:\t 4 kB\nVmRSS:\t    5120 kB\nThreads:\t3\n";
        assert_eq!(read_resident(status), Some(5120 * 1024));
        assert_eq!(read_resident("VmRSS: many\n"), None);
    }

    #[test]
    fn a_limit_carries_the_sessions_that_ask_for_it() {
        for transport in TRANSPORTS {
            let descriptors = transport.descriptors(10_000);
            assert!((10_000..10_010).contains(&transport.sessions_max(descriptors)));
            assert_eq!(transport.sessions_max(10), 0);
        }
    }

    #[test]
    fn every_goal_names_a_case() {
        let cases: Vec<_> = TRANSPORTS
            .iter()
            .flat_map(|Idler { name, .. }| {
                BENCH_IDLE_SESSIONS.map(|sessions| format!("{name}/sessions={sessions}"))
            })
            .collect();
        assert!(GOALS.iter().all(|goal| cases.iter().any(|case| case == goal.case)));
    }
}
