//! `poolbroker bench`: what things cost on this machine.
//!
//! A user of the client library like any other program. Everything that is measured is a process of
//! its own: the broker ([`ChildBroker`](super::child_broker::ChildBroker)), and this program again
//! under hidden commands (`helper`) as producers (`load`), peers (`sink`), clients (`sessions`), a
//! backend (`echo`) and the other end of a ring (`peer`). `stage` and `arena` measure one case once,
//! with `backends` and `proxies` beside it; `one_way`, `requests`, `ring`, `idle` and `isolation`
//! choose what is measured and beside what, and `measure` makes medians, ratios and verdicts of it.

mod arena;
mod backends;
mod bare;
mod clock;
mod echo;
mod helper;
mod idle;
mod isolation;
mod load;
mod measure;
mod one_way;
mod peer;
mod proxies;
mod requests;
mod ring;
mod sessions;
mod sink;
mod stage;

use clap::{Args, Subcommand};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

pub use self::bare::BenchBare;
pub use self::echo::BenchEcho;
pub use self::load::BenchLoad;
pub use self::peer::BenchPeer;
pub use self::sessions::BenchSessions;
pub use self::sink::BenchSink;
use super::after_help;
use super::exit::{CommandError, Exit};
use crate::config::{BENCH_ROUNDS, BENCH_ROUNDS_MAX};

/// Measure what messages cost on this machine, beside what they would cost without a broker.
///
/// Starts a broker and everything else it needs. Cases and their baselines take turns within each
/// round, so that what else goes on on the machine disturbs both; read the ratios.
#[derive(Debug, Args)]
#[command(after_help = after_help(EXAMPLES))]
pub struct Bench {
    #[command(subcommand)]
    bench: Which,
}

const EXAMPLES: &str = "\
Examples:
  poolbroker bench one-way
  poolbroker bench requests
  poolbroker bench ring
  poolbroker bench idle --json
  poolbroker bench isolation";

#[derive(Debug, Subcommand)]
enum Which {
    OneWay(one_way::OneWay),
    Requests(requests::Requests),
    Ring(ring::Ring),
    Idle(idle::Idle),
    Isolation(isolation::Isolation),
}

impl Bench {
    /// Measures and prints.
    pub fn run(&self) -> Result<Exit, CommandError> {
        match &self.bench {
            Which::OneWay(one_way) => one_way.run(),
            Which::Requests(requests) => requests.run(),
            Which::Ring(ring) => ring.run(),
            Which::Idle(idle) => idle.run(),
            Which::Isolation(isolation) => isolation.run(),
        }
    }
}

/// What all benchmarks take.
#[derive(Debug, Args)]
struct Options {
    /// Print the figures as JSON
    #[arg(long)]
    json: bool,

    /// How often everything is measured
    #[arg(long, value_name = "N", default_value_t = BENCH_ROUNDS, value_parser = rounds)]
    rounds: usize,

    /// Only the cases whose name contains TEXT
    #[arg(long, value_name = "TEXT")]
    case: Option<String>,
}

impl Options {
    fn rounds(&self) -> usize {
        self.rounds
    }

    fn is_wanted(&self, case: &str) -> bool {
        self.case.as_ref().is_none_or(|text| case.contains(text.as_str()))
    }

    /// Nothing to measure is a mistake of the command line.
    fn check_cases(&self, count: usize) -> Result<(), CommandError> {
        match count {
            0 => Err(CommandError::usage(
                "no case is left to measure; names look like ring/producers=1/size=64, and more of \
                 them exist with --full",
            )),
            _ => Ok(()),
        }
    }
}

/// Raises the limit of descriptors to `wanted`, or as far as is allowed; children inherit it. Returns
/// what it is then.
fn raise_descriptors(wanted: usize) -> Result<usize, CommandError> {
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_some_and(|current| current < wanted as u64) {
        let current = Some(wanted as u64);
        let maximum = limit.maximum.map(|maximum| maximum.max(wanted as u64));
        let raised = setrlimit(Resource::Nofile, Rlimit { current, maximum });
        // Only CAP_SYS_RESOURCE may go beyond the hard limit; others go as far as that.
        let to_hard = Rlimit { current: limit.maximum, maximum: limit.maximum };
        raised.or_else(|_| setrlimit(Resource::Nofile, to_hard)).map_err(|error| {
            CommandError::failed(format!("RLIMIT_NOFILE cannot be raised: {error}"))
        })?;
    }
    let carried = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    Ok(usize::try_from(carried).unwrap_or(usize::MAX))
}

fn rounds(text: &str) -> Result<usize, String> {
    let rounds = text.parse().ok().filter(|rounds| (1..=BENCH_ROUNDS_MAX).contains(rounds));
    rounds.ok_or_else(|| format!("expected a number from 1 to {BENCH_ROUNDS_MAX}"))
}
