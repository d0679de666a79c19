//! One measurement: contenders for the same work, in interleaved rounds, judged by the ratios of
//! each round, so that a noisy machine disturbs all alike.

use std::fs;
use std::time::{Duration, Instant};

use rustix::thread::{CpuSet, sched_setaffinity};
use rustix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};

/// What a message cost, in nanoseconds.
#[derive(Clone, Copy)]
pub struct Cost {
    pub wall_ns: f64,
    /// Processor time of the thread that sends, or that begins each round trip.
    pub sender_ns: f64,
    /// Of the other one.
    pub receiver_ns: f64,
}

/// Picks a number out of a cost.
type Metric = fn(&Cost) -> f64;

/// One way of doing the work of a case.
pub struct Contender {
    pub name: &'static str,
    pub run: fn(messages: u64) -> Cost,
}

/// The same work for several contenders; the first one is what the others are compared with.
pub struct Case {
    pub name: &'static str,
    pub messages: u64,
    pub contenders: &'static [Contender],
    /// The most that the last contender may take of the first one's time.
    pub goal: Option<f64>,
}

/// Median and extremes.
pub struct Spread {
    pub median: f64,
    pub min: f64,
    pub max: f64,
}

/// What a contender took, over all rounds.
pub struct Outcome {
    pub case: &'static Case,
    pub contender: &'static Contender,
    pub costs: Vec<Cost>,
    /// Its wall time by that of the first contender of the same round; none for that one itself.
    pub ratios: Option<Spread>,
}

impl Cost {
    pub fn per_message(messages: u64, wall: Duration, sender_ns: u64, receiver_ns: u64) -> Cost {
        let each = |total_ns: f64| total_ns / messages as f64;
        Cost {
            wall_ns: each(wall.as_nanos() as f64),
            sender_ns: each(sender_ns as f64),
            receiver_ns: each(receiver_ns as f64),
        }
    }
}

impl Case {
    /// Runs all contenders, once unmeasured and then in so many rounds.
    pub fn measure(&'static self, rounds: usize) -> Vec<Outcome> {
        let mut costs = vec![Vec::new(); self.contenders.len()];
        for round in 0..=rounds {
            for (contender, costs) in self.contenders.iter().zip(&mut costs) {
                let cost = (contender.run)(self.messages);
                if round > 0 {
                    costs.push(cost);
                }
            }
        }
        let first = costs[0].clone();
        let contenders = self.contenders.iter().zip(costs).enumerate();
        let outcome = |(index, (contender, costs)): (usize, (_, Vec<Cost>))| {
            let pairs = costs.iter().zip(&first).map(|(own, first)| own.wall_ns / first.wall_ns);
            let ratios = (index > 0).then(|| Spread::of(pairs));
            Outcome { case: self, contender, costs, ratios }
        };
        contenders.map(outcome).collect()
    }
}

impl Spread {
    pub fn of(values: impl Iterator<Item = f64>) -> Spread {
        let mut values: Vec<f64> = values.collect();
        values.sort_by(f64::total_cmp);
        let (min, max) = (values[0], values[values.len() - 1]);
        Spread { median: values[values.len() / 2], min, max }
    }
}

impl Outcome {
    fn spread(&self, of: Metric) -> Spread {
        Spread::of(self.costs.iter().map(of))
    }

    /// As a line for people.
    pub fn line(&self) -> String {
        let wall = self.spread(|cost| cost.wall_ns);
        let sender = self.spread(|cost| cost.sender_ns);
        let receiver = self.spread(|cost| cost.receiver_ns);
        let line = format!(
            "{:<22} {:<22} {:>8.1} ({:>7.1} to {:>8.1}) {:>9.1} {:>9.1}",
            self.case.name,
            self.contender.name,
            wall.median,
            wall.min,
            wall.max,
            sender.median,
            receiver.median,
        );
        let Some(ratios) = &self.ratios else {
            return line;
        };
        let goal = match self.case.goal {
            Some(goal) if ratios.median > goal => format!("  MISSES {goal}"),
            Some(goal) => format!("  meets {goal}"),
            None => String::new(),
        };
        let (median, min, max) = (ratios.median, ratios.min, ratios.max);
        format!("{line}   {median:.2} ({min:.2} to {max:.2}){goal}")
    }

    /// As results for programs: one for each metric.
    pub fn results(&self) -> Vec<Value> {
        let case = format!("{}/{}", self.case.name, self.contender.name);
        let baseline = self.ratios.as_ref().map(|_| self.case.contenders[0].name);
        let metrics: [(&str, Metric); 3] = [
            ("wall", |cost| cost.wall_ns),
            ("sender_cpu", |cost| cost.sender_ns),
            ("receiver_cpu", |cost| cost.receiver_ns),
        ];
        let result = |metric: &str, unit: &str, spread: &Spread, ratio: Option<f64>| {
            json!({
                "case": case, "metric": metric, "unit": unit, "median": spread.median,
                "min": spread.min, "max": spread.max, "baseline": baseline, "ratio": ratio,
            })
        };
        let mut results: Vec<Value> = metrics
            .iter()
            .map(|(name, of)| {
                let is_compared = *name == "wall";
                let ratio = self.ratios.as_ref().filter(|_| is_compared).map(|all| all.median);
                result(name, "ns/message", &self.spread(*of), ratio)
            })
            .collect();
        if let Some(ratios) = &self.ratios {
            results.push(result("wall_ratio", "1", ratios, Some(ratios.median)));
        }
        results
    }
}

/// On what it was measured.
pub fn machine() -> Value {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    let cpuinfo = read("/proc/cpuinfo");
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name"));
    let model = model.map(|model| model.trim_start_matches(['\t', ' ', ':']));
    let processors = std::thread::available_parallelism().map_or(0, usize::from);
    let kernel = read("/proc/sys/kernel/osrelease");
    json!({ "cpu": model, "cpus": processors, "kernel": kernel.trim() })
}

/// Keeps the calling thread on one processor.
pub fn pin(cpu: usize) {
    let mut set = CpuSet::new();
    set.set(cpu);
    sched_setaffinity(None, &set).expect("the sides run on processors 0 and 1");
}

/// Processor time of the calling thread so far.
pub fn thread_cpu_ns() -> u64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// The wall and processor time that `work` takes on this thread, and when it began and ended.
pub fn timed(work: impl FnOnce()) -> (Instant, Instant, u64) {
    let (began, cpu_began) = (Instant::now(), thread_cpu_ns());
    work();
    (began, Instant::now(), thread_cpu_ns() - cpu_began)
}
