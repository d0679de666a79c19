//! `poolbroker bench ring`: the ring alone between two processes, without a broker, beside what a
//! program would use otherwise.
//!
//! The two processes are tied to two processors. One way, the producer writes each message by
//! itself, and the clock stops when the other side has read the last one; round trips are taken one
//! by one. The CPU is that of each process.

use std::io;
use std::os::fd::AsFd;

use clap::Args;

use super::Options;
use super::clock::{now_ns, own_cpu_ns};
use super::helper::Helper;
use super::measure::{Column, Figures, Metric};
use super::peer::{Begun, End, Errand, Finished, Medium, pin};
use crate::cli::after_help;
use crate::cli::exit::{CommandError, Exit};
use crate::config::{
    BENCH_PIPE_MESSAGES, BENCH_RING_MESSAGES, BENCH_RING_RUN_BYTES, BENCH_ROUND_TRIPS_POLLED,
    BENCH_ROUND_TRIPS_SLEPT,
};

/// Measure the ring alone between two processes, beside pipes, sockets, eventfds and futexes.
///
/// one-way: how fast messages get across, and the CPU per message of the producer (CLIENT) and of
/// the consumer (PEER). round-trip: there and back, one at a time. The ring's two sides poll
/// (ring-polled), its consumer naps when there is nothing (ring-napped), or sleeps until it is woken
/// (ring-slept). RATE and P50 are compared with the ring: ring-napped one way, ring-polled for round
/// trips.
#[derive(Debug, Args)]
#[command(after_help = after_help(EXAMPLES))]
pub struct Ring {
    #[command(flatten)]
    options: Options,

    /// Measure messages of every size from 16 bytes to 8 KiB
    #[arg(long)]
    full: bool,
}

const EXAMPLES: &str = "\
Examples:
  poolbroker bench ring
  poolbroker bench ring --case round-trip --json";

const COLUMNS: &[Column] = &[
    Column::Value(Metric::ClientCpuNs),
    Column::Value(Metric::PeerCpuNs),
    Column::Value(Metric::MessagesPerS),
    Column::Ratio(Metric::MessagesPerS, "RATE / RING"),
    Column::Value(Metric::P50Us),
    Column::Ratio(Metric::P50Us, "P50 / RING"),
    Column::Value(Metric::P99Us),
];

/// A case: one way or there and back, by what, and messages of how many bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Case {
    medium: Medium,
    is_echo: bool,
    bytes: usize,
}

impl Case {
    fn name(&self) -> String {
        let Case { medium, is_echo, bytes } = *self;
        let course = if is_echo { "round-trip" } else { "one-way" };
        format!("{course}/{}/size={bytes}", medium_name(medium))
    }

    /// The ring that it is compared with; none for that ring itself.
    fn baseline(&self) -> Option<(Case, &'static str)> {
        let medium = if self.is_echo { Medium::RingPolled } else { Medium::RingNapped };
        let baseline = Case { medium, ..*self };
        (baseline != *self).then_some((baseline, medium_name(medium)))
    }

    fn messages(&self) -> u64 {
        let is_fast = match self.medium {
            Medium::RingPolled => true,
            Medium::RingNapped | Medium::RingSlept => !self.is_echo,
            Medium::Pipe | Medium::Unix | Medium::Eventfd | Medium::Futex => false,
        };
        let messages = match (self.is_echo, is_fast) {
            (false, true) => BENCH_RING_MESSAGES,
            (false, false) => BENCH_PIPE_MESSAGES,
            (true, true) => BENCH_ROUND_TRIPS_POLLED,
            (true, false) => BENCH_ROUND_TRIPS_SLEPT,
        };
        messages.min(BENCH_RING_RUN_BYTES / self.bytes as u64)
    }
}

fn medium_name(medium: Medium) -> &'static str {
    match medium {
        Medium::RingPolled => "ring-polled",
        Medium::RingNapped => "ring-napped",
        Medium::RingSlept => "ring-slept",
        Medium::Pipe => "pipe",
        Medium::Unix => "unix",
        Medium::Eventfd => "eventfd",
        Medium::Futex => "futex",
    }
}

/// The cases of a run.
fn cases(full: bool) -> Vec<Case> {
    let sizes: &[usize] = if full { &[16, 64, 512, 1400, 8192] } else { &[64] };
    let rings = [Medium::RingNapped, Medium::RingPolled, Medium::RingSlept];
    let streams = [Medium::Pipe, Medium::Unix];
    let mut cases = Vec::new();
    for &bytes in sizes {
        let one_way = rings.into_iter().chain(streams);
        cases.extend(one_way.map(|medium| Case { medium, is_echo: false, bytes }));
        let there_and_back = [Medium::RingPolled, Medium::RingSlept].into_iter().chain(streams);
        cases.extend(there_and_back.map(|medium| Case { medium, is_echo: true, bytes }));
    }
    // They carry no bytes.
    let signals = [Medium::Eventfd, Medium::Futex];
    cases.extend(signals.map(|medium| Case { medium, is_echo: true, bytes: 64 }));
    cases
}

impl Ring {
    /// Measures, prints.
    pub fn run(&self) -> Result<Exit, CommandError> {
        let mut cases = cases(self.full);
        cases.retain(|case| self.options.is_wanted(&case.name()));
        self.options.check_cases(cases.len())?;
        let mut figures = Figures::new("ring", self.options.rounds());
        let mut peer = Helper::start("bench-peer")?;
        pin(0)?;
        for round in 0..self.options.rounds() {
            let is_even = round.is_multiple_of(2);
            for index in 0..cases.len() {
                let index = if is_even { index } else { cases.len() - 1 - index };
                measure_pair(&mut peer, &cases[index], is_even, &mut figures)?;
            }
        }
        figures.print(self.options.json, COLUMNS, &[])?;
        Ok(Exit::Done)
    }
}

/// What one measurement gave.
struct Run {
    client_cpu_ns: f64,
    peer_cpu_ns: f64,
    messages_per_s: f64,
    /// Of round trips, in microseconds.
    p50_p99_us: Option<(f64, f64)>,
}

/// Measures the case and its baseline, one after the other.
fn measure_pair(
    peer: &mut Helper,
    case: &Case,
    baseline_first: bool,
    figures: &mut Figures,
) -> Result<(), CommandError> {
    let name = case.name();
    let Some((other, beside)) = case.baseline() else {
        let run = measure(peer, case)?;
        note(figures, &name, &run, None);
        return Ok(());
    };
    let (run, baseline) = match baseline_first {
        true => {
            let baseline = measure(peer, &other)?;
            (measure(peer, case)?, baseline)
        }
        false => (measure(peer, case)?, measure(peer, &other)?),
    };
    note(figures, &name, &run, Some((&baseline, beside)));
    Ok(())
}

fn note(figures: &mut Figures, name: &str, run: &Run, beside: Option<(&Run, &'static str)>) {
    let mut compare = |metric, figure: fn(&Run) -> f64| match beside {
        Some((baseline, beside)) => {
            figures.compare(name, metric, figure(run), beside, figure(baseline));
        }
        None => figures.record(name, metric, figure(run)),
    };
    compare(Metric::ClientCpuNs, |run| run.client_cpu_ns);
    compare(Metric::PeerCpuNs, |run| run.peer_cpu_ns);
    match run.p50_p99_us {
        None => compare(Metric::MessagesPerS, |run| run.messages_per_s),
        Some(_) => {
            compare(Metric::P50Us, |run| run.p50_p99_us.unwrap_or_default().0);
            compare(Metric::P99Us, |run| run.p50_p99_us.unwrap_or_default().1);
        }
    }
}

fn measure(peer: &mut Helper, case: &Case) -> Result<Run, CommandError> {
    let Case { medium, is_echo, bytes } = *case;
    let messages = case.messages();
    let (mut end, descriptors) = End::ours(medium).map_err(failed)?;
    let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    peer.tell_with(&Errand { medium, is_echo, messages, bytes }, &borrowed)?;
    let Begun {} = peer.hear()?;
    let message = vec![b'x'; bytes];
    let mut times_ns = Vec::with_capacity(if is_echo { messages as usize } else { 0 });
    let (cpu, started_ns) = (own_cpu_ns(), now_ns());
    if is_echo {
        let mut before_ns = started_ns;
        for _ in 0..messages {
            end.send(&message).map_err(failed)?;
            end.receive(1, bytes).map_err(failed)?;
            let after_ns = now_ns();
            times_ns.push(after_ns - before_ns);
            before_ns = after_ns;
        }
    } else {
        for _ in 0..messages {
            end.send(&message).map_err(failed)?;
        }
    }
    let client_cpu = own_cpu_ns() - cpu;
    let Finished { cpu_ns, ended_ns } = peer.hear()?;
    times_ns.sort_unstable();
    let percentile = |percent: usize| {
        let index = (times_ns.len() * percent / 100).min(times_ns.len().saturating_sub(1));
        times_ns.get(index).map(|ns| *ns as f64 / 1e3)
    };
    Ok(Run {
        client_cpu_ns: client_cpu as f64 / messages as f64,
        peer_cpu_ns: cpu_ns as f64 / messages as f64,
        messages_per_s: messages as f64 * 1e9 / ended_ns.saturating_sub(started_ns).max(1) as f64,
        p50_p99_us: percentile(50).zip(percentile(99)),
    })
}

fn failed(error: io::Error) -> CommandError {
    CommandError::failed(format!("the two processes of `bench ring`: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn no_two_cases_have_one_name_and_each_baseline_is_a_case() {
        for full in [false, true] {
            let cases = cases(full);
            let names: HashSet<_> = cases.iter().map(Case::name).collect();
            assert_eq!(names.len(), cases.len());
            let baselines = cases.iter().filter_map(Case::baseline);
            assert!(baselines.into_iter().all(|(case, _)| cases.contains(&case)));
        }
    }
}
