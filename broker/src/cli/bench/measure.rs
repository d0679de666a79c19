//! What the benchmarks make of their figures: medians over rounds, ratios to a baseline of the same
//! round, the goals they are held against; as a table for people or JSON for programs.
//!
//! A noisy machine disturbs two measurements that follow each other alike. So each round gives its
//! own ratio, and the median of these ratios is the figure to read; its spread says how far to trust
//! it.

use serde::Serialize;

use crate::cli::exit::{CommandError, print};
use crate::cli::table::{Table, stdout_takes_colour};

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Metric {
    ClientCpuNs,
    BrokerCpuNs,
    PathCpuNs,
    SinkCpuNs,
    PeerCpuNs,
    BackendCpuNs,
    MessagesPerS,
    RequestsPerS,
    BackendConnections,
    Delivered,
    P50Us,
    P99Us,
    AddedP50Us,
    AddedP99Us,
    CpuPercent,
    SessionBytes,
}

impl Metric {
    /// The stable name.
    pub fn name(self) -> &'static str {
        self.words().0
    }

    fn unit(self) -> &'static str {
        self.words().1
    }

    fn header(self) -> &'static str {
        self.words().2
    }

    fn words(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Metric::ClientCpuNs => ("client_cpu_ns", "ns/message", "CLIENT NS"),
            Metric::BrokerCpuNs => ("broker_cpu_ns", "ns/message", "BROKER NS"),
            Metric::PathCpuNs => ("path_cpu_ns", "ns/message", "BOTH NS"),
            Metric::SinkCpuNs => ("sink_cpu_ns", "ns/message", "SINK NS"),
            Metric::PeerCpuNs => ("peer_cpu_ns", "ns/message", "PEER NS"),
            Metric::BackendCpuNs => ("backend_cpu_ns", "ns/request", "BACKEND NS"),
            Metric::MessagesPerS => ("messages_per_s", "1/s", "MESSAGES/S"),
            Metric::RequestsPerS => ("requests_per_s", "1/s", "REQUESTS/S"),
            Metric::BackendConnections => ("backend_connections", "connections", "CONNS"),
            Metric::Delivered => ("delivered", "of accepted", "DELIVERED"),
            Metric::P50Us => ("p50_us", "us", "P50 US"),
            Metric::P99Us => ("p99_us", "us", "P99 US"),
            Metric::AddedP50Us => ("added_p50_us", "us", "ADDED P50 US"),
            Metric::AddedP99Us => ("added_p99_us", "us", "ADDED P99 US"),
            Metric::CpuPercent => ("cpu_percent", "% of a core", "CPU %"),
            Metric::SessionBytes => ("session_bytes", "bytes/session", "BYTES/SESSION"),
        }
    }

    fn text(self, value: f64) -> String {
        match self {
            Metric::CpuPercent | Metric::Delivered => format!("{value:.3}"),
            Metric::ClientCpuNs
            | Metric::BrokerCpuNs
            | Metric::PathCpuNs
            | Metric::SinkCpuNs
            | Metric::PeerCpuNs
            | Metric::BackendCpuNs
            | Metric::P50Us
            | Metric::P99Us
            | Metric::AddedP50Us
            | Metric::AddedP99Us => format!("{value:.1}"),
            Metric::MessagesPerS
            | Metric::RequestsPerS
            | Metric::BackendConnections
            | Metric::SessionBytes => format!("{value:.0}"),
        }
    }
}

/// A column of the table for people, beside the case.
#[derive(Debug, Clone, Copy)]
pub enum Column {
    /// The median.
    Value(Metric),
    /// The ratio to the baseline, with its spread, under this header.
    Ratio(Metric, &'static str),
}

/// What a figure of a case is to reach.
#[derive(Debug, Clone, Copy)]
pub struct Goal {
    pub case: &'static str,
    pub metric: Metric,
    pub figure: Figure,
    pub bound: Bound,
}

/// Which figure.
#[derive(Debug, Clone, Copy)]
pub enum Figure {
    Value,
    Ratio,
}

/// Where it is to lie.
#[derive(Debug, Clone, Copy)]
pub enum Bound {
    AtMost(f64),
    AtLeast(f64),
}

/// Median, least and greatest.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Spread {
    pub median: f64,
    pub min: f64,
    pub max: f64,
}

impl Spread {
    /// Of at least one value.
    pub fn of(values: &[f64]) -> Option<Self> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (&min, &max) = (sorted.first()?, sorted.last()?);
        let middle = sorted.len() / 2;
        let median = match sorted.len().is_multiple_of(2) {
            true => f64::midpoint(sorted[middle - 1], sorted[middle]),
            false => sorted[middle],
        };
        Some(Spread { median, min, max })
    }
}

/// All figures of a benchmark.
#[derive(Debug)]
pub struct Figures {
    bench: &'static str,
    rounds: usize,
    machine: Machine,
    series: Vec<Series>,
}

/// One metric of one case.
#[derive(Debug)]
struct Series {
    case: String,
    metric: Metric,
    baseline: Option<&'static str>,
    values: Vec<f64>,
    ratios: Vec<f64>,
}

impl Figures {
    /// None yet; the machine is looked at now, before anything is tied to a processor.
    pub fn new(bench: &'static str, rounds: usize) -> Self {
        Figures { bench, rounds, machine: Machine::read(), series: Vec::new() }
    }

    /// A value that is compared with nothing.
    pub fn record(&mut self, case: &str, metric: Metric, value: f64) {
        self.series(case, metric).values.push(value);
    }

    /// A value, and that of the baseline in the same round.
    pub fn compare(
        &mut self,
        case: &str,
        metric: Metric,
        value: f64,
        baseline: &'static str,
        baseline_value: f64,
    ) {
        let series = self.series(case, metric);
        series.values.push(value);
        series.baseline = Some(baseline);
        let ratio = value / baseline_value;
        if ratio.is_finite() {
            series.ratios.push(ratio);
        }
    }

    fn series(&mut self, case: &str, metric: Metric) -> &mut Series {
        let is_it = |series: &Series| series.case == case && series.metric == metric;
        let index = self.series.iter().position(is_it).unwrap_or_else(|| {
            let (values, ratios) = (Vec::new(), Vec::new());
            self.series.push(Series {
                case: case.to_owned(),
                metric,
                baseline: None,
                values,
                ratios,
            });
            self.series.len() - 1
        });
        &mut self.series[index]
    }

    fn find(&self, case: &str, metric: Metric) -> Option<&Series> {
        self.series.iter().find(|series| series.case == case && series.metric == metric)
    }

    /// Prints them as JSON, or as a table with a row per case and a list of the goals.
    pub fn print(
        &self,
        json: bool,
        columns: &[Column],
        goals: &[Goal],
    ) -> Result<(), CommandError> {
        if json {
            let text = serde_json::to_string_pretty(&self.document());
            let text = text.map_err(|error| CommandError::failed(error.to_string()))?;
            return print(format!("{text}\n").as_bytes());
        }
        let colour = stdout_takes_colour();
        print(self.table(columns).render(colour).as_bytes())?;
        let goals = self.verdicts(goals);
        if !goals.is_empty() {
            print(format!("\n{}", goals.render(colour)).as_bytes())?;
        }
        let Machine { cores, kernel } = &self.machine;
        let rounds = self.rounds;
        print(format!("\n{rounds} rounds, medians; {cores} cores, Linux {kernel}\n").as_bytes())
    }

    fn table(&self, columns: &[Column]) -> Table {
        let is_there = |column: &&Column| {
            let metric = match column {
                Column::Value(metric) | Column::Ratio(metric, _) => *metric,
            };
            self.series.iter().any(|series| series.metric == metric)
        };
        let columns: Vec<_> = columns.iter().filter(is_there).collect();
        let mut header = vec!["CASE"];
        header.extend(columns.iter().map(|column| match column {
            Column::Value(metric) => metric.header(),
            Column::Ratio(_, header) => header,
        }));
        let mut table = Table::new(&header);
        let mut cases: Vec<&str> = Vec::new();
        for series in &self.series {
            if !cases.contains(&series.case.as_str()) {
                cases.push(&series.case);
            }
        }
        for case in cases {
            let mut row = vec![case.to_owned()];
            row.extend(columns.iter().map(|column| self.cell(case, column)));
            table.push(row);
        }
        table
    }

    fn cell(&self, case: &str, column: &Column) -> String {
        let text = match column {
            Column::Value(metric) => self.find(case, *metric).and_then(|series| {
                Spread::of(&series.values).map(|spread| metric.text(spread.median))
            }),
            Column::Ratio(metric, _) => self
                .find(case, *metric)
                .and_then(|series| Spread::of(&series.ratios))
                .map(|spread| spread_text(&spread, ratio_text)),
        };
        text.unwrap_or_else(|| "-".into())
    }

    fn verdicts(&self, goals: &[Goal]) -> Table {
        let mut table = Table::new(&["CASE", "FIGURE", "GOAL", "MEASURED", "VERDICT"]);
        for goal in goals {
            let Some(series) = self.find(goal.case, goal.metric) else { continue };
            let (values, unit) = match goal.figure {
                Figure::Value => (&series.values, ""),
                Figure::Ratio => (&series.ratios, " x "),
            };
            let Some(spread) = Spread::of(values) else { continue };
            let baseline = series.baseline.filter(|_| !unit.is_empty()).unwrap_or_default();
            let text = |value: f64| match goal.figure {
                Figure::Value => goal.metric.text(value),
                Figure::Ratio => ratio_text(value),
            };
            let (sign, bound, is_met) = match goal.bound {
                Bound::AtMost(bound) => ("<=", bound, spread.median <= bound),
                Bound::AtLeast(bound) => (">=", bound, spread.median >= bound),
            };
            table.push(vec![
                goal.case.into(),
                goal.metric.name().into(),
                format!("{sign} {bound}{unit}{baseline}"),
                spread_text(&spread, text),
                if is_met { "met" } else { "missed" }.into(),
            ]);
        }
        table
    }

    fn document(&self) -> Document<'_> {
        let results = self.series.iter().filter_map(|series| {
            let Spread { median, min, max } = Spread::of(&series.values)?;
            Some(ResultRow {
                case: &series.case,
                metric: series.metric.name(),
                unit: series.metric.unit(),
                median,
                min,
                max,
                baseline: series.baseline,
                ratio: Spread::of(&series.ratios).map(|spread| spread.median),
            })
        });
        let Figures { bench, rounds, machine, .. } = self;
        Document { bench, rounds: *rounds, machine, results: results.collect() }
    }
}

fn spread_text(spread: &Spread, text: impl Fn(f64) -> String) -> String {
    let Spread { median, min, max } = *spread;
    format!("{} ({} to {})", text(median), text(min), text(max))
}

/// Two digits that count.
fn ratio_text(ratio: f64) -> String {
    match ratio.abs() {
        0.0..0.1 => format!("{ratio:.4}"),
        0.1..10.0 => format!("{ratio:.2}"),
        _ => format!("{ratio:.1}"),
    }
}

/// `--json`.
#[derive(Debug, Serialize)]
struct Document<'a> {
    bench: &'a str,
    rounds: usize,
    machine: &'a Machine,
    results: Vec<ResultRow<'a>>,
}

/// Where it was measured.
#[derive(Debug, Serialize)]
struct Machine {
    cores: usize,
    kernel: String,
}

impl Machine {
    fn read() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let kernel = rustix::system::uname().release().to_string_lossy().into_owned();
        Machine { cores, kernel }
    }
}

#[derive(Debug, Serialize)]
struct ResultRow<'a> {
    case: &'a str,
    metric: &'a str,
    unit: &'a str,
    median: f64,
    min: f64,
    max: f64,
    baseline: Option<&'a str>,
    ratio: Option<f64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(rounds: &[(f64, f64)]) -> Figures {
        let mut figures = Figures::new("test", rounds.len());
        for (value, baseline) in rounds {
            figures.compare("ring", Metric::PathCpuNs, *value, "sendto", *baseline);
        }
        figures
    }

    #[test]
    fn the_median_of_an_even_number_lies_between_the_middle_two() {
        let spread = Spread::of(&[4.0, 1.0, 3.0, 2.0]).unwrap();
        assert_eq!(spread, Spread { median: 2.5, min: 1.0, max: 4.0 });
        assert_eq!(Spread::of(&[7.0]).unwrap().median, 7.0);
        assert_eq!(Spread::of(&[]), None);
    }

    #[test]
    fn the_ratio_is_the_median_of_the_ratios_and_not_the_ratio_of_the_medians() {
        // The second round was disturbed on both sides alike.
        let figures = figures(&[(1.0, 2.0), (30.0, 40.0), (3.0, 10.0)]);
        let json = serde_json::to_value(figures.document()).unwrap();
        let row = &json["results"][0];
        assert_eq!((&row["median"], &row["ratio"]), (&3.0.into(), &0.5.into()));
        assert_eq!((&row["min"], &row["max"]), (&1.0.into(), &30.0.into()));
        assert_eq!((&row["baseline"], &row["metric"]), (&"sendto".into(), &"path_cpu_ns".into()));
    }

    #[test]
    fn a_baseline_of_nothing_gives_no_ratio() {
        let json = serde_json::to_value(figures(&[(1.0, 0.0)]).document()).unwrap();
        assert!(json["results"][0]["ratio"].is_null());
    }

    #[test]
    fn a_goal_is_judged_by_the_median_and_only_where_it_was_measured() {
        let figures = figures(&[(1.0, 2.0), (1.0, 4.0), (1.0, 1.0)]);
        let goal = |case, bound| {
            let (metric, figure) = (Metric::PathCpuNs, Figure::Ratio);
            Goal { case, metric, figure, bound }
        };
        let goals = [
            goal("ring", Bound::AtMost(0.5)),
            goal("ring", Bound::AtLeast(0.6)),
            goal("pipe", Bound::AtMost(0.5)),
        ];
        assert_eq!(
            figures.verdicts(&goals).render(false),
            "CASE  FIGURE       GOAL                        MEASURED  VERDICT\n\
             ring  path_cpu_ns  <= 0.5 x sendto  0.50 (0.25 to 1.00)  met\n\
             ring  path_cpu_ns  >= 0.6 x sendto  0.50 (0.25 to 1.00)  missed\n"
        );
    }

    #[test]
    fn the_table_shows_what_was_measured_and_a_dash_for_the_rest() {
        let mut figures = figures(&[(5.0, 10.0)]);
        figures.record("sendto", Metric::PathCpuNs, 10.0);
        let columns = [
            Column::Value(Metric::PathCpuNs),
            Column::Ratio(Metric::PathCpuNs, "RATIO"),
            Column::Value(Metric::P50Us),
        ];
        assert_eq!(
            figures.table(&columns).render(false),
            "CASE    BOTH NS                RATIO\n\
             ring        5.0  0.50 (0.50 to 0.50)\n\
             sendto     10.0                    -\n"
        );
    }
}
