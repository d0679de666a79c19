//! `poolbroker bench isolation`: what a client feels of others who use the same broker.
//!
//! A probe asks an upstream that is well, while neighbours use one that is not. The probe that goes
//! past the broker shows what of that is the machine's doing: neighbours need processors, too.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use clap::Args;
use poolbroker_client::{Client, Transport, Upstream};

use super::Options;
use super::backends::Backend;
use super::measure::{Bound, Column, Figure, Figures, Goal, Metric};
use super::proxies::free_address;
use super::sessions::{MESSAGE_BYTES, Talk};
use crate::cli::after_help;
use crate::cli::child_broker::ChildBroker;
use crate::cli::exit::{CommandError, Exit};
use crate::config::{
    BENCH_NEIGHBOUR_PAUSE, BENCH_NEIGHBOURS, BENCH_PROBE_PAUSE, BENCH_PROBE_REQUESTS,
    BENCH_SETTLING, BENCH_TIMEOUT,
};

/// Measure what a client feels of neighbours: its latency beside them, and alone.
///
/// A probe makes a request of 64 bytes five thousand times a second at most, by the client socket
/// (unix) and by a TCP connection of its own (direct), alone and beside: down (8 clients whose
/// upstream refuses connections), silent (theirs never answers), full (theirs never reads what
/// they send), flood (one sends by a ring as fast as it can). The direct probe tells what the load
/// does to everybody on this machine.
#[derive(Debug, Args)]
#[command(after_help = after_help(EXAMPLES))]
pub struct Isolation {
    #[command(flatten)]
    options: Options,
}

const EXAMPLES: &str = "\
Examples:
  poolbroker bench isolation
  poolbroker bench isolation --case flood --rounds 11";

const COLUMNS: &[Column] = &[
    Column::Value(Metric::P50Us),
    Column::Ratio(Metric::P50Us, "P50 / ALONE"),
    Column::Value(Metric::P99Us),
    Column::Ratio(Metric::P99Us, "P99 / ALONE"),
];

const GOALS: &[Goal] = &[
    tail("unix/beside=down"),
    tail("unix/beside=silent"),
    tail("unix/beside=full"),
    tail("unix/beside=flood"),
];

const fn tail(case: &'static str) -> Goal {
    Goal { case, metric: Metric::P99Us, figure: Figure::Ratio, bound: Bound::AtMost(2.0) }
}

/// What is wrong with the neighbours' upstream, or with them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Neighbour {
    Down,
    Silent,
    Full,
    Flood,
}

const NEIGHBOURS: [Neighbour; 4] =
    [Neighbour::Down, Neighbour::Silent, Neighbour::Full, Neighbour::Flood];

impl Neighbour {
    /// Also the name of the upstream.
    fn name(self) -> &'static str {
        match self {
            Neighbour::Down => "down",
            Neighbour::Silent => "silent",
            Neighbour::Full => "full",
            Neighbour::Flood => "flood",
        }
    }

    fn count(self) -> usize {
        if self == Neighbour::Flood { 1 } else { BENCH_NEIGHBOURS }
    }

    fn transport(self) -> Transport {
        match self {
            Neighbour::Flood => Transport::RING,
            Neighbour::Down | Neighbour::Silent | Neighbour::Full => Transport::Unix,
        }
    }

    /// Does its worst until it is told to stop.
    fn disturb(self, upstream: &Upstream, is_over: &AtomicBool) {
        let large = vec![b'x'; upstream.message_bytes_max() / 16];
        // ORDER: relaxed; it tells of nothing but itself.
        while !is_over.load(Ordering::Relaxed) {
            // That they fail is what they are for.
            match self {
                Neighbour::Down | Neighbour::Silent => {
                    _ = upstream.request(b"x", BENCH_TIMEOUT);
                    thread::sleep(BENCH_NEIGHBOUR_PAUSE);
                }
                Neighbour::Full => _ = upstream.send(&large),
                Neighbour::Flood => _ = upstream.send(&[b'x'; MESSAGE_BYTES]),
            }
        }
    }
}

/// Peers that are no good, for as long as they are kept.
struct Peers {
    down: SocketAddr,
    silent: TcpListener,
    full: TcpListener,
    flooded: UdpSocket,
}

impl Peers {
    fn start() -> Result<Self, CommandError> {
        let down = free_address()?;
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        // The kernel takes connections for those two, and what comes as far as it has room.
        let listen = || TcpListener::bind(any).map_err(failed);
        let [silent, full] = [listen()?, listen()?];
        let flooded = UdpSocket::bind(any).map_err(failed)?;
        Ok(Peers { down, silent, full, flooded })
    }

    fn configuration(&self, probe: SocketAddr) -> std::io::Result<String> {
        let (down, flooded) = (self.down, self.flooded.local_addr()?);
        let (silent, full) = (self.silent.local_addr()?, self.full.local_addr()?);
        Ok(format!(
            "[upstream.probe]\nurl = \"tcp://{probe}?framing=fixed&size={MESSAGE_BYTES}\"\n\
             [upstream.down]\nurl = \"tcp://{down}\"\n\
             [upstream.silent]\nurl = \"tcp://{silent}\"\nrequest_timeout = \"50ms\"\n\
             [upstream.full]\nurl = \"tcp://{full}?framing=raw\"\noverflow = \"block\"\n\
             [upstream.flood]\nurl = \"udp-write-only://{flooded}\"\noverflow = \"block\"\n"
        ))
    }
}

/// Whose latency is measured.
enum Probe {
    Unix(Upstream),
    Direct(TcpStream),
}

impl Probe {
    fn name(&self) -> &'static str {
        match self {
            Probe::Unix(_) => "unix",
            Probe::Direct(_) => "direct",
        }
    }

    /// Asks many times; the median and the 99th percentile of the round trips, in microseconds.
    fn measure(&mut self) -> Result<(f64, f64), CommandError> {
        let mut round_trips = Vec::with_capacity(BENCH_PROBE_REQUESTS);
        for _ in 0..BENCH_PROBE_REQUESTS {
            thread::sleep(BENCH_PROBE_PAUSE);
            let asked = Instant::now();
            self.ask()?;
            round_trips.push(asked.elapsed());
        }
        round_trips.sort_unstable();
        let at = |percent: usize| {
            let place = (round_trips.len() * percent / 100).min(round_trips.len() - 1);
            round_trips.get(place).map_or(0.0, |time| time.as_secs_f64() * 1e6)
        };
        Ok((at(50), at(99)))
    }

    fn ask(&mut self) -> Result<(), CommandError> {
        let mut message = [b'p'; MESSAGE_BYTES];
        match self {
            Probe::Unix(upstream) => drop(upstream.request(&message, BENCH_TIMEOUT)?),
            Probe::Direct(stream) => {
                stream.write_all(&message).map_err(failed)?;
                stream.read_exact(&mut message).map_err(failed)?;
            }
        }
        Ok(())
    }
}

impl Isolation {
    /// Measures, prints.
    pub fn run(&self) -> Result<Exit, CommandError> {
        let mut neighbours = NEIGHBOURS.to_vec();
        neighbours.retain(|neighbour| {
            let wanted = |probe| self.options.is_wanted(&format!("{probe}/{}", beside(*neighbour)));
            wanted("unix") || wanted("direct")
        });
        self.options.check_cases(neighbours.len())?;
        let mut figures = Figures::new("isolation", self.options.rounds());
        let peers = Peers::start()?;
        let mut backend = None;
        let mut broker = ChildBroker::start(|home| {
            let echo = Backend::start(Talk::Echo, home, "probe")?;
            let echo = backend.insert(echo.expect("it is a part of this program"));
            let text = peers.configuration(echo.address).map_err(failed)?;
            let file = home.join("bench.toml");
            fs::write(&file, text).map_err(failed)?;
            Ok(vec!["--config".into(), file])
        })?;
        let address = backend.as_ref().map(|echo| echo.address).expect("it was started");
        let direct = TcpStream::connect(address).map_err(failed)?;
        direct.set_nodelay(true).map_err(failed)?;
        let client = broker.connect(Transport::Unix)?;
        let mut probes = [Probe::Unix(client.upstream("probe")?), Probe::Direct(direct)];
        for _ in 0..self.options.rounds() {
            for probe in &mut probes {
                let (p50_us, p99_us) = probe.measure()?;
                let case = format!("{}/alone", probe.name());
                figures.record(&case, Metric::P50Us, p50_us);
                figures.record(&case, Metric::P99Us, p99_us);
                for neighbour in &neighbours {
                    let beside_us = disturbed(&mut broker, *neighbour, probe)?;
                    let case = format!("{}/{}", probe.name(), beside(*neighbour));
                    figures.compare(&case, Metric::P50Us, beside_us.0, "alone", p50_us);
                    figures.compare(&case, Metric::P99Us, beside_us.1, "alone", p99_us);
                }
            }
        }
        // Not ended: what waits for a peer that never reads would hold that up.
        drop(broker);
        figures.print(self.options.json, COLUMNS, GOALS)?;
        Ok(Exit::Done)
    }
}

fn beside(neighbour: Neighbour) -> String {
    format!("beside={}", neighbour.name())
}

/// Measures while the neighbours do their worst.
fn disturbed(
    broker: &mut ChildBroker,
    neighbour: Neighbour,
    probe: &mut Probe,
) -> Result<(f64, f64), CommandError> {
    let mut clients: Vec<Client> = Vec::new();
    for _ in 0..neighbour.count() {
        let client = broker.connect(neighbour.transport())?;
        client.set_send_timeout(BENCH_SETTLING);
        clients.push(client);
    }
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        for client in &clients {
            let upstream = client.upstream(neighbour.name())?;
            let is_over = &is_over;
            scope.spawn(move || neighbour.disturb(&upstream, is_over));
        }
        // Until what is to be full is full.
        thread::sleep(BENCH_SETTLING);
        let measured = probe.measure();
        // ORDER: relaxed; as above.
        is_over.store(true, Ordering::Relaxed);
        measured
    })
}

fn failed(error: impl std::fmt::Display) -> CommandError {
    CommandError::failed(format!("the benchmark's peers: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_goal_names_a_case() {
        let cases = NEIGHBOURS.map(|neighbour| format!("unix/{}", beside(neighbour)));
        assert!(GOALS.iter().all(|goal| cases.iter().any(|case| case == goal.case)));
    }
}
