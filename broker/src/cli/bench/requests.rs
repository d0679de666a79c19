//! `poolbroker bench requests`: what a request costs through the broker, beside a connection of its
//! own and beside other proxies.
//!
//! All paths of one shape are measured one after the other in each round, forwards in one and
//! backwards in the next. The clients are one process that drives all sessions with one loop
//! (`sessions`), the same for every path, so that what is compared are paths and not load
//! generators.

use clap::Args;

use super::arena::{Arena, Run, Shape, Way, talk_name};
use super::measure::{Bound, Column, Figure, Figures, Goal, Metric};
use super::proxies::Proxy;
use super::sessions::{Ask, Talk};
use super::{Options, raise_descriptors};
use crate::cli::after_help;
use crate::cli::exit::{CommandError, Exit};
use crate::config::{
    BENCH_BURST_CLIENTS, BENCH_CONNECTIONS_MAX, BENCH_DESCRIPTORS_SPARE, BENCH_SPAN,
};

/// Measure requests: rate, latency and CPU of every path, beside a direct connection.
///
/// The broker, its backends, the other proxies and the clients are processes of their own. All
/// clients of a case are sessions of one process, by the same loop for every path. CLIENT, BROKER
/// and BACKEND NS are CPU time per request; BROKER is whatever stands between. CONNS: the most
/// connections the backend had at one time.
///
/// Paths: direct (TCP), unix and ring (this broker, at most 8 connections), haproxy, nginx and
/// nutcracker where they are installed, by Unix sockets, and bare: a relay over one connection that
/// checks, bounds and counts nothing, the least that can stand between. Shapes: clients=N, each with
/// one request at a time; depth=N with several; short (connect, one request, close); burst (15,000
/// of these); one-core (everything on one processor); acquire (no request: connect and close, or
/// leased: borrow and give back).
#[derive(Debug, Args)]
#[command(after_help = after_help(EXAMPLES))]
pub struct Requests {
    #[command(flatten)]
    options: Options,

    /// Measure more numbers of clients, and several requests at a time
    #[arg(long)]
    full: bool,
}

const EXAMPLES: &str = "\
Examples:
  poolbroker bench requests
  poolbroker bench requests --case redis --rounds 11
  poolbroker bench requests --case echo/clients=256 --json";

const COLUMNS: &[Column] = &[
    Column::Value(Metric::RequestsPerS),
    Column::Ratio(Metric::RequestsPerS, "RATE / DIRECT"),
    Column::Value(Metric::P50Us),
    Column::Value(Metric::P99Us),
    Column::Value(Metric::ClientCpuNs),
    Column::Value(Metric::BrokerCpuNs),
    Column::Value(Metric::BackendCpuNs),
    Column::Value(Metric::BackendConnections),
];

const GOALS: &[Goal] = &[
    rate("unix/echo/clients=256", 1.3),
    rate("unix/echo/clients=256/beside=haproxy", 2.4),
    rate("unix/echo/clients=256/beside=nginx", 2.4),
    rate("ring/echo/clients=256", 2.0),
    rate("unix/redis/clients=256", 1.3),
    rate("unix/redis/clients=256/beside=nutcracker", 1.35),
    rate("unix/redis/clients=64/short", 2.2),
    rate("unix/redis/clients=64/short/beside=nutcracker", 1.25),
    rate("unix/echo/clients=64/burst", 7.0),
    Goal {
        case: "unix/echo/clients=64/burst",
        metric: Metric::P99Us,
        figure: Figure::Value,
        bound: Bound::AtMost(5_000.0),
    },
    latency("unix/echo/clients=1/one-core", 1.85),
    latency("ring/echo/clients=1/one-core", 1.5),
    latency("leased/echo/clients=1/one-core", 1.0),
    // A part of a connect is done after it has returned, so time is taken by the rate.
    rate("leased/echo/clients=1/acquire/one-core", 1.0 / 0.6),
    Goal {
        case: "unix/redis/clients=256/beside=nutcracker",
        metric: Metric::BrokerCpuNs,
        figure: Figure::Ratio,
        bound: Bound::AtMost(0.7),
    },
    connections("unix/echo/clients=256"),
    connections("unix/echo/clients=64/burst"),
];

const fn rate(case: &'static str, least: f64) -> Goal {
    let (metric, figure, bound) = (Metric::RequestsPerS, Figure::Ratio, Bound::AtLeast(least));
    Goal { case, metric, figure, bound }
}

const fn latency(case: &'static str, most: f64) -> Goal {
    Goal { case, metric: Metric::P50Us, figure: Figure::Ratio, bound: Bound::AtMost(most) }
}

const fn connections(case: &'static str) -> Goal {
    let bound = Bound::AtMost(BENCH_CONNECTIONS_MAX as f64);
    Goal { case, metric: Metric::BackendConnections, figure: Figure::Value, bound }
}

/// One shape, measured by every way one after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Scene {
    shape: Shape,
    is_burst: bool,
    ways: &'static [Way],
}

const BARE: Way = Way::By(Proxy::Bare);
const HAPROXY: Way = Way::By(Proxy::Haproxy);
const NGINX: Way = Way::By(Proxy::Nginx);
const NUTCRACKER: Way = Way::By(Proxy::Nutcracker);

const ALL_ECHO: &[Way] = &[Way::Direct, Way::Unix, Way::Ring, BARE, HAPROXY, NGINX];
const ALL_REDIS: &[Way] = &[Way::Direct, Way::Unix, Way::Ring, BARE, HAPROXY, NUTCRACKER];
const ONE_CORE: &[Way] = &[Way::Direct, Way::Unix, Way::Ring, Way::Leased, BARE, HAPROXY, NGINX];
const LEASE: &[Way] = &[Way::Direct, Way::Leased];
/// A ring is more than one request is worth.
const SHORT_ECHO: &[Way] = &[Way::Direct, Way::Unix, BARE, HAPROXY, NGINX];
const SHORT_REDIS: &[Way] = &[Way::Direct, Way::Unix, BARE, HAPROXY, NUTCRACKER];

impl Scene {
    fn new(talk: Talk, clients: usize) -> Self {
        let shape =
            Shape { talk, clients, depth: 1, is_short: false, is_empty: false, is_one_core: false };
        let ways = if talk == Talk::Echo { ALL_ECHO } else { ALL_REDIS };
        Scene { shape, is_burst: false, ways }
    }

    fn short(talk: Talk, clients: usize) -> Self {
        let mut scene = Scene::new(talk, clients);
        scene.shape.is_short = true;
        scene.ways = if talk == Talk::Echo { SHORT_ECHO } else { SHORT_REDIS };
        scene
    }

    fn burst(talk: Talk) -> Self {
        Scene { is_burst: true, ..Scene::short(talk, 64) }
    }

    fn deep(talk: Talk, clients: usize) -> Self {
        let mut scene = Scene::new(talk, clients);
        scene.shape.depth = 16;
        scene
    }

    fn one_core(talk: Talk) -> Self {
        let mut scene = Scene::new(talk, 1);
        scene.shape.is_one_core = true;
        if talk == Talk::Echo {
            scene.ways = ONE_CORE;
        }
        scene
    }

    fn lease() -> Self {
        let mut scene = Scene::one_core(Talk::Echo);
        scene.shape.is_empty = true;
        scene.ways = LEASE;
        scene
    }

    fn name(&self, way: Way) -> String {
        let Shape { talk, clients, depth, is_short, is_empty, is_one_core } = self.shape;
        let mut name = format!("{}/{}/clients={clients}", way_name(way), talk_name(talk));
        if depth > 1 {
            name += &format!("/depth={depth}");
        }
        if self.is_burst {
            name += "/burst";
        } else if is_short {
            name += "/short";
        }
        if is_empty {
            name += "/acquire";
        }
        if is_one_core {
            name += "/one-core";
        }
        name
    }

    fn ask(&self) -> Ask {
        match self.is_burst {
            true => Ask { span_ns: u64::MAX / 2, requests_max: BENCH_BURST_CLIENTS },
            false => {
                let span_ns = u64::try_from(BENCH_SPAN.as_nanos()).unwrap_or(u64::MAX);
                Ask { span_ns, requests_max: u64::MAX }
            }
        }
    }
}

fn way_name(way: Way) -> &'static str {
    match way {
        Way::Direct => "direct",
        Way::Unix => "unix",
        Way::Ring => "ring",
        Way::Leased => "leased",
        Way::By(proxy) => proxy.name(),
    }
}

fn scenes(full: bool) -> Vec<Scene> {
    let mut scenes = Vec::new();
    for talk in [Talk::Echo, Talk::Redis] {
        let clients: &[usize] = if full { &[1, 16, 64, 256] } else { &[1, 64, 256] };
        scenes.extend(clients.iter().map(|clients| Scene::new(talk, *clients)));
        let short: &[usize] = if full { &[1, 16, 64, 256] } else { &[64] };
        scenes.extend(short.iter().map(|clients| Scene::short(talk, *clients)));
        if full {
            scenes.extend([1, 64].map(|clients| Scene::deep(talk, clients)));
        }
        if full || talk == Talk::Echo {
            scenes.push(Scene::one_core(talk));
            scenes.push(Scene::burst(talk));
        }
        if talk == Talk::Echo {
            scenes.push(Scene::lease());
        }
    }
    scenes
}

impl Requests {
    /// Measures, prints.
    pub fn run(&self) -> Result<Exit, CommandError> {
        let mut scenes = scenes(self.full);
        let is_wanted =
            |scene: &Scene| scene.ways.iter().any(|way| self.options.is_wanted(&scene.name(*way)));
        scenes.retain(is_wanted);
        self.options.check_cases(scenes.len())?;
        raise_descriptors(BENCH_DESCRIPTORS_SPARE)?;
        let figures = Figures::new("requests", self.options.rounds());
        let mut course = Course { arena: Arena::open()?, figures };
        for round in 0..self.options.rounds() {
            let is_even = round.is_multiple_of(2);
            for index in 0..scenes.len() {
                let index = if is_even { index } else { scenes.len() - 1 - index };
                course.measure(&scenes[index], is_even, &self.options)?;
            }
        }
        course.arena.end()?;
        course.figures.print(self.options.json, COLUMNS, GOALS)?;
        Ok(Exit::Done)
    }
}

/// A run of the benchmark.
struct Course {
    arena: Arena,
    figures: Figures,
}

impl Course {
    /// Measures a scene by every way that is wanted, and always directly.
    fn measure(
        &mut self,
        scene: &Scene,
        forwards: bool,
        options: &Options,
    ) -> Result<(), CommandError> {
        let mut ways: Vec<_> = scene.ways.to_vec();
        ways.retain(|way| self.arena.has(*way, scene.shape.talk));
        ways.retain(|way| *way == Way::Direct || options.is_wanted(&scene.name(*way)));
        if !forwards {
            ways.reverse();
        }
        let mut runs = Vec::new();
        for way in ways {
            runs.push((way, self.arena.measure(way, &scene.shape, &scene.ask())?));
        }
        let Some(direct) = runs.iter().find(|(way, _)| *way == Way::Direct).map(|(_, run)| *run)
        else {
            return Ok(());
        };
        for (way, run) in &runs {
            let name = scene.name(*way);
            match way {
                Way::Direct => self.note(&name, run, None),
                Way::Unix | Way::Ring | Way::Leased | Way::By(_) => {
                    self.note(&name, run, Some(("direct", &direct)));
                }
            }
            if *way == Way::Unix {
                for (other, beside) in &runs {
                    if let Way::By(proxy) = other {
                        let name = format!("{name}/beside={}", proxy.name());
                        self.note(&name, run, Some((proxy.name(), beside)));
                    }
                }
            }
        }
        Ok(())
    }

    fn note(&mut self, case: &str, run: &Run, beside: Option<(&'static str, &Run)>) {
        type Reading = fn(&Run) -> f64;
        let figures: [(Metric, Reading); 7] = [
            (Metric::RequestsPerS, |run| {
                run.asked.requests as f64 / (run.asked.elapsed_ns as f64 / 1e9)
            }),
            (Metric::P50Us, |run| run.asked.p50_ns as f64 / 1e3),
            (Metric::P99Us, |run| run.asked.p99_ns as f64 / 1e3),
            (Metric::ClientCpuNs, |run| per_request(run, run.asked.cpu_ns)),
            (Metric::BrokerCpuNs, |run| per_request(run, run.broker_cpu_ns)),
            (Metric::BackendCpuNs, |run| per_request(run, run.backend_cpu_ns)),
            (Metric::BackendConnections, |run| run.backend_connections as f64),
        ];
        for (metric, figure) in figures {
            let value = figure(run);
            match beside {
                Some((baseline, other)) => {
                    self.figures.compare(case, metric, value, baseline, figure(other));
                }
                None => self.figures.record(case, metric, value),
            }
        }
    }
}

fn per_request(run: &Run, ns: u64) -> f64 {
    ns as f64 / run.asked.requests.max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    fn names(full: bool) -> Vec<String> {
        let names = scenes(full).into_iter().flat_map(|scene| {
            scene.ways.iter().map(move |way| scene.name(*way)).collect::<Vec<_>>()
        });
        names.collect()
    }

    #[test]
    fn every_goal_names_a_case_of_the_default_run() {
        let names = names(false);
        for goal in GOALS {
            let case = goal.case.split("/beside=").next().unwrap();
            assert!(names.iter().any(|name| name == case), "{}", goal.case);
        }
    }

    #[test]
    fn no_two_cases_have_one_name() {
        for full in [false, true] {
            let names = names(full);
            assert_eq!(names.iter().collect::<HashSet<_>>().len(), names.len());
        }
    }
}
