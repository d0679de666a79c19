//! `poolbroker bench one-way`: what a one-way message costs, by every way, beside sendto(2).
//!
//! Every measurement of a case stands next to one of its baseline, before it in one round and behind
//! it in the next. Both go to the same peer, which reads normally. CPU is that of whole processes:
//! the producers' from their first send to the answer of their flush (at a steady rate only that of
//! the sends, see `load`), the broker's until it sleeps again, the peer's until it has read everything.

use std::collections::{HashMap, HashSet};
use std::num::NonZeroU64;

use clap::{Args, ValueEnum};

use super::load::Way;
use super::measure::{Bound, Column, Figure, Figures, Goal, Metric};
use super::stage::{Crew, Run, Stage, Target, Task};
use super::{Options, raise_descriptors};
use crate::cli::after_help;
use crate::cli::exit::{CommandError, Exit};
use crate::config::{
    BENCH_DESCRIPTORS_PER_PRODUCER, BENCH_DESCRIPTORS_SPARE, BENCH_PACED_SPAN, BENCH_RATES,
    BENCH_SPAN, BENCH_WARM_UP_MESSAGES, PIPE_BUF,
};

/// Measure one-way messages: CPU, rate and latency of every way, beside sendto.
///
/// The broker, its peer and every producer are processes of their own. CLIENT, BROKER and SINK NS
/// are CPU time per message; BOTH is client and broker together, and its ratio compares that with
/// one process which calls sendto for each datagram to the same peer. Ratios are medians of the
/// ratios within each round, with the least and the greatest.
///
/// Cases are named like ring/producers=1/size=64. The ways: ring and unix (a send per message),
/// unix-all (send_all), fifo and pipe (lines, many per write), fifo-line (one line per write); and
/// without a broker sendto, send (connected) and sendmmsg. coalesce: the upstream joins messages.
/// rate: messages come steadily, and the latency is measured from each send to its arrival.
#[derive(Debug, Args)]
#[command(after_help = after_help(EXAMPLES))]
pub struct OneWay {
    #[command(flatten)]
    options: Options,

    /// Measure the whole matrix of sizes, producers and ways, which takes about half an hour
    #[arg(long)]
    full: bool,

    /// Only the ways through the broker that are named here
    #[arg(long, value_enum, value_delimiter = ',')]
    via: Vec<Via>,
}

const EXAMPLES: &str = "\
Examples:
  poolbroker bench one-way
  poolbroker bench one-way --via ring,unix --rounds 11
  poolbroker bench one-way --case rate= --json";

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Via {
    /// Rings in shared memory
    Ring,
    /// The client socket
    Unix,
    /// The FIFO of the upstream
    Fifo,
    /// A pipe that the broker reads
    Pipe,
}

const COLUMNS: &[Column] = &[
    Column::Value(Metric::ClientCpuNs),
    Column::Value(Metric::BrokerCpuNs),
    Column::Value(Metric::PathCpuNs),
    Column::Ratio(Metric::PathCpuNs, "BOTH / BASELINE"),
    Column::Value(Metric::SinkCpuNs),
    Column::Value(Metric::MessagesPerS),
    Column::Ratio(Metric::MessagesPerS, "RATE / BASELINE"),
    Column::Value(Metric::P50Us),
    Column::Value(Metric::P99Us),
    Column::Value(Metric::Delivered),
];

const GOALS: &[Goal] = &[
    value("ring/producers=1/size=64", Metric::ClientCpuNs, Bound::AtMost(25.0)),
    ratio("ring/producers=1/size=64", Metric::ClientCpuNs, Bound::AtMost(0.02)),
    ratio("ring/producers=1/size=64", Metric::PathCpuNs, Bound::AtMost(0.5)),
    ratio("ring/producers=1/size=64", Metric::MessagesPerS, Bound::AtLeast(2.0)),
    ratio("ring/producers=1/size=64/coalesce", Metric::MessagesPerS, Bound::AtLeast(10.0)),
    ratio("ring/producers=64/size=64/beside=1", Metric::MessagesPerS, Bound::AtLeast(0.9)),
    ratio("ring/producers=1/size=64/rate=100000", Metric::ClientCpuNs, Bound::AtMost(0.05)),
    ratio("ring/producers=1/size=64/rate=100000", Metric::PathCpuNs, Bound::AtMost(0.6)),
    value("ring/producers=1/size=64/rate=100000", Metric::AddedP50Us, Bound::AtMost(500.0)),
    value("ring/producers=1/size=64/rate=100000", Metric::AddedP99Us, Bound::AtMost(1500.0)),
    ratio("ring/producers=1/size=64/rate=10000", Metric::ClientCpuNs, Bound::AtMost(0.05)),
    ratio("ring/producers=1/size=64/rate=10000", Metric::PathCpuNs, Bound::AtMost(0.6)),
    value("ring/producers=1/size=64/rate=10000", Metric::AddedP50Us, Bound::AtMost(500.0)),
    value("ring/producers=1/size=64/rate=10000", Metric::AddedP99Us, Bound::AtMost(1500.0)),
    ratio("fifo/producers=1/size=64", Metric::MessagesPerS, Bound::AtLeast(1.6)),
    ratio("fifo-line/producers=1/size=64", Metric::MessagesPerS, Bound::AtLeast(1.6)),
    ratio("fifo/producers=1/size=64/coalesce", Metric::MessagesPerS, Bound::AtLeast(5.0)),
    ratio("fifo/producers=1/size=64/beside=napping", Metric::ClientCpuNs, Bound::AtMost(1.15)),
    ratio("fifo-line/producers=1/size=64/beside=napping", Metric::ClientCpuNs, Bound::AtMost(1.15)),
];

const fn value(case: &'static str, metric: Metric, bound: Bound) -> Goal {
    Goal { case, metric, figure: Figure::Value, bound }
}

const fn ratio(case: &'static str, metric: Metric, bound: Bound) -> Goal {
    Goal { case, metric, figure: Figure::Ratio, bound }
}

/// What a case is compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Baseline {
    /// One process that calls sendto for each datagram.
    Sendto,
    /// The same way with one producer.
    OneProducer,
    /// The same writer with a reader that sleeps between large reads.
    NappingReader,
}

impl Baseline {
    fn name(self) -> &'static str {
        match self {
            Baseline::Sendto => "sendto",
            Baseline::OneProducer => "one producer",
            Baseline::NappingReader => "napping reader",
        }
    }
}

/// A case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Case {
    crew: Crew,
    /// Messages per second; none: as many as there can be.
    rate: Option<NonZeroU64>,
    baseline: Baseline,
}

impl Case {
    const fn new(way: Way, producers: u64, bytes: usize) -> Self {
        let crew = Crew { way, target: Target::Plain, producers, bytes };
        Case { crew, rate: None, baseline: Baseline::Sendto }
    }

    fn coalescing(mut self) -> Self {
        self.crew.target = Target::Coalescing;
        self
    }

    fn at(mut self, rate: NonZeroU64) -> Self {
        self.rate = Some(rate);
        self
    }

    fn beside(mut self, baseline: Baseline) -> Self {
        self.baseline = baseline;
        self
    }

    fn name(&self) -> String {
        let Crew { way, target, producers, bytes } = self.crew;
        let mut name = format!("{}/producers={producers}/size={bytes}", way_name(way));
        match target {
            Target::Plain => {}
            Target::Coalescing => name += "/coalesce",
            Target::NappingReader => name += "/napping-reader",
        }
        if let Some(rate) = self.rate {
            name += &format!("/rate={rate}");
        }
        match self.baseline {
            Baseline::Sendto => {}
            Baseline::OneProducer => name += "/beside=1",
            Baseline::NappingReader => name += "/beside=napping",
        }
        name
    }

    /// What is measured next to it.
    fn counterpart(&self) -> Case {
        let Crew { way, bytes, .. } = self.crew;
        match self.baseline {
            Baseline::Sendto => Case { rate: self.rate, ..Case::new(Way::Sendto, 1, bytes) },
            Baseline::OneProducer => Case::new(way, 1, bytes),
            Baseline::NappingReader => {
                let mut case = Case::new(way, 1, bytes);
                case.crew.target = Target::NappingReader;
                case
            }
        }
    }

    fn is_wanted(&self, options: &Options, via: &[Via]) -> bool {
        let is_via = match way_via(self.crew.way) {
            _ if via.is_empty() => true,
            Some(way) => via.contains(&way),
            None => false,
        };
        is_via && options.is_wanted(&self.name())
    }
}

fn way_name(way: Way) -> &'static str {
    match way {
        Way::Sendto => "sendto",
        Way::Send => "send",
        Way::Sendmmsg => "sendmmsg",
        Way::Ring => "ring",
        Way::Unix => "unix",
        Way::UnixAll => "unix-all",
        Way::Fifo => "fifo",
        Way::FifoLine => "fifo-line",
        Way::Pipe => "pipe",
    }
}

fn way_via(way: Way) -> Option<Via> {
    match way {
        Way::Sendto | Way::Send | Way::Sendmmsg => None,
        Way::Ring => Some(Via::Ring),
        Way::Unix | Way::UnixAll => Some(Via::Unix),
        Way::Fifo | Way::FifoLine => Some(Via::Fifo),
        Way::Pipe => Some(Via::Pipe),
    }
}

const BROKER_WAYS: [Way; 6] =
    [Way::Ring, Way::Unix, Way::UnixAll, Way::Fifo, Way::FifoLine, Way::Pipe];

/// The cases of a run: what the goals name and what stands beside it, or the whole matrix.
fn cases(full: bool) -> Vec<Case> {
    let sizes: &[usize] = if full { &[16, 64, 512, 1400, 8192] } else { &[64] };
    let mut cases = Vec::new();
    for &bytes in sizes {
        cases.extend([Way::Send, Way::Sendmmsg].map(|way| Case::new(way, 1, bytes)));
        for way in BROKER_WAYS {
            // A FIFO takes longer lines only in pieces, which mix (pipe(7)).
            if matches!(way, Way::Fifo | Way::FifoLine) && bytes >= PIPE_BUF {
                continue;
            }
            let producers: &[u64] = if full || way == Way::Ring { &[1, 8, 64] } else { &[1, 64] };
            cases.extend(producers.iter().map(|&producers| Case::new(way, producers, bytes)));
            let joins = matches!(way, Way::Ring | Way::UnixAll | Way::Fifo | Way::FifoLine);
            if full || joins {
                cases.push(Case::new(way, 1, bytes).coalescing());
            }
            // One at a time, send_all is send, and a block has one line.
            let is_single = !matches!(way, Way::UnixAll | Way::Fifo);
            if way == Way::Ring || full && is_single {
                let steady = BENCH_RATES.map(|rate| Case::new(way, 1, bytes).at(rate));
                cases.extend(steady);
            }
        }
        cases.push(Case::new(Way::Ring, 64, bytes).beside(Baseline::OneProducer));
        if bytes < PIPE_BUF {
            let writers = [Way::Fifo, Way::FifoLine].map(|way| Case::new(way, 1, bytes));
            cases.extend(writers.map(|case| case.beside(Baseline::NappingReader)));
        }
    }
    cases
}

/// What all producers need at once, which stay until the end: here two of each, in the broker up to
/// two, of which it gives sessions only a share.
fn descriptors(cases: &[Case]) -> usize {
    let crews: HashSet<_> = cases.iter().map(|case| case.crew).collect();
    let producers: u64 = crews.iter().map(|crew| crew.producers).sum();
    BENCH_DESCRIPTORS_PER_PRODUCER * producers as usize + BENCH_DESCRIPTORS_SPARE
}

impl OneWay {
    /// Measures, prints.
    pub fn run(&self) -> Result<Exit, CommandError> {
        let cases = cases(self.full);
        let wanted = |case: &Case| case.is_wanted(&self.options, &self.via);
        let cases: Vec<_> = cases.into_iter().filter(wanted).collect();
        self.options.check_cases(cases.len())?;
        raise_descriptors(descriptors(&cases))?;
        let stage = Stage::set()?;
        let mut course = Course {
            stage,
            figures: Figures::new("one-way", self.options.rounds()),
            tasks: HashMap::new(),
        };
        for case in cases.iter().flat_map(|case| [case.counterpart(), *case]) {
            course.warm_up(&case)?;
        }
        for round in 0..self.options.rounds() {
            let is_even = round.is_multiple_of(2);
            for index in 0..cases.len() {
                let index = if is_even { index } else { cases.len() - 1 - index };
                course.measure(&cases[index], is_even)?;
            }
        }
        course.stage.end()?;
        course.figures.print(self.options.json, COLUMNS, GOALS)?;
        Ok(Exit::Done)
    }
}

/// A run of the benchmark.
struct Course {
    stage: Stage,
    figures: Figures,
    tasks: HashMap<Crew, Task>,
}

impl Course {
    /// Starts the case's processes, lets them touch their memory, and finds out how many messages
    /// take about [`BENCH_SPAN`].
    fn warm_up(&mut self, case: &Case) -> Result<(), CommandError> {
        if self.tasks.contains_key(&case.crew) {
            return Ok(());
        }
        let mut task = Task { messages: BENCH_WARM_UP_MESSAGES, interval_ns: None };
        // The second time is the measure: the first one pays for fresh memory.
        for _ in 0..2 {
            let run = self.stage.measure(&case.crew, &task)?;
            let messages = run.messages_per_s() * BENCH_SPAN.as_secs_f64();
            task.messages = (messages as u64).max(case.crew.producers);
        }
        self.tasks.insert(case.crew, task);
        Ok(())
    }

    /// Measures the case and its baseline, one after the other.
    fn measure(&mut self, case: &Case, baseline_first: bool) -> Result<(), CommandError> {
        let other = case.counterpart();
        let (run, baseline) = match baseline_first {
            true => {
                let baseline = self.run(&other)?;
                (self.run(case)?, baseline)
            }
            false => (self.run(case)?, self.run(&other)?),
        };
        self.note(case, &run, &baseline);
        Ok(())
    }

    fn run(&mut self, case: &Case) -> Result<Run, CommandError> {
        let task = match case.rate {
            None => self.tasks[&case.crew],
            Some(rate) => {
                let messages = rate.get() as f64 * BENCH_PACED_SPAN.as_secs_f64();
                let interval_ns = NonZeroU64::new(1_000_000_000 / rate);
                Task { messages: messages as u64, interval_ns }
            }
        };
        self.stage.measure(&case.crew, &task)
    }

    fn note(&mut self, case: &Case, run: &Run, baseline: &Run) {
        let figures = &mut self.figures;
        let (name, beside) = (case.name(), case.baseline.name());
        let mut compare = |metric, figure: fn(&Run) -> f64| {
            figures.compare(&name, metric, figure(run), beside, figure(baseline));
        };
        match case.baseline {
            Baseline::Sendto => {}
            Baseline::OneProducer => return compare(Metric::MessagesPerS, Run::messages_per_s),
            Baseline::NappingReader => return compare(Metric::ClientCpuNs, client_cpu),
        }
        compare(Metric::ClientCpuNs, client_cpu);
        compare(
            Metric::PathCpuNs,
            match way_via(case.crew.way) {
                Some(_) => path_cpu,
                None => client_cpu,
            },
        );
        compare(Metric::SinkCpuNs, |run| run.per_message(run.sink_cpu_ns));
        match case.rate {
            None => compare(Metric::MessagesPerS, Run::messages_per_s),
            Some(_) => {
                compare(Metric::P50Us, |run| run.p50_us);
                compare(Metric::P99Us, |run| run.p99_us);
                figures.record(&name, Metric::AddedP50Us, run.p50_us - baseline.p50_us);
                figures.record(&name, Metric::AddedP99Us, run.p99_us - baseline.p99_us);
            }
        }
        figures.record(&name, Metric::Delivered, delivered(run));
        if way_via(case.crew.way).is_some() {
            figures.record(&name, Metric::BrokerCpuNs, run.per_message(run.broker_cpu_ns));
        }
        self.note_baseline(&case.counterpart(), baseline);
    }

    fn note_baseline(&mut self, case: &Case, run: &Run) {
        let (figures, name) = (&mut self.figures, case.name());
        figures.record(&name, Metric::ClientCpuNs, client_cpu(run));
        figures.record(&name, Metric::PathCpuNs, client_cpu(run));
        figures.record(&name, Metric::SinkCpuNs, run.per_message(run.sink_cpu_ns));
        figures.record(&name, Metric::Delivered, delivered(run));
        match case.rate {
            None => figures.record(&name, Metric::MessagesPerS, run.messages_per_s()),
            Some(_) => {
                figures.record(&name, Metric::P50Us, run.p50_us);
                figures.record(&name, Metric::P99Us, run.p99_us);
            }
        }
    }
}

fn client_cpu(run: &Run) -> f64 {
    run.per_message(run.client_cpu_ns)
}

/// Without a broker in the way its CPU is none.
fn path_cpu(run: &Run) -> f64 {
    run.per_message(run.client_cpu_ns + run.broker_cpu_ns)
}

fn delivered(run: &Run) -> f64 {
    run.per_message(run.delivered as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_goal_names_a_case_of_the_default_run() {
        let names: HashSet<_> = cases(false).iter().map(Case::name).collect();
        for goal in GOALS {
            assert!(names.contains(goal.case), "{}", goal.case);
        }
    }

    #[test]
    fn no_two_cases_have_one_name() {
        for full in [false, true] {
            let cases = cases(full);
            let names: HashSet<_> = cases.iter().map(Case::name).collect();
            assert_eq!(names.len(), cases.len());
        }
    }

    #[test]
    fn the_whole_matrix_has_every_default_case() {
        let full: HashSet<_> = cases(true).into_iter().collect();
        assert!(cases(false).iter().all(|case| full.contains(case)));
    }
}
