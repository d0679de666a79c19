//! `poolbroker bench-sink`: what the benchmarks send to.
//!
//! Either a UDP peer that reads normally, one blocking recv(2) per datagram, the same for all cases;
//! or the reader of a plain FIFO that sleeps between large reads, which is as cheap for its writers
//! as a reader can be. It counts, and tells its counts when asked. Datagrams that carry the time of
//! their sending ([`stamp`]) give the one-way latency.

use std::fs::File;
use std::io::{self, Read};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;

use clap::Args;
use rustix::net::sockopt::{set_socket_recv_buffer_size, set_socket_recv_buffer_size_force};
use serde::{Deserialize, Serialize};

use super::clock::now_ns;
use super::helper::{Orders, answer};
use crate::cli::exit::{CommandError, Exit};
use crate::config::{BENCH_SINK_BUFFER_BYTES, NAPPING_READER_BLOCK_BYTES, NAPPING_READER_PAUSE};

/// Serve `poolbroker bench` as the peer that it sends to.
#[derive(Debug, Args)]
pub struct BenchSink {}

/// The first order: what to be.
#[derive(Debug, Serialize, Deserialize)]
pub enum SinkSpec {
    /// A UDP peer; answers with its address.
    Udp {
        /// What separates the messages in a datagram; one datagram is one message without it.
        separator: Option<u8>,
    },
    /// The reader of a FIFO that sleeps between its reads.
    NappingReader {
        /// The FIFO.
        path: PathBuf,
    },
}

/// Every other order: answer with a [`SinkReport`].
#[derive(Debug, Serialize, Deserialize)]
pub struct Ask {
    /// Messages carry the time of their sending from now on, and latencies start anew.
    pub is_stamped: Option<bool>,
}

/// What arrived since the start; and, of stamped messages, how long they took.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct SinkReport {
    pub messages: u64,
    pub p50_ns: u64,
    pub p99_ns: u64,
}

/// Digits of a time stamp.
pub const STAMP_BYTES: usize = 16;

impl BenchSink {
    /// Reads until the benchmark ends.
    pub fn run(&self) -> Result<Exit, CommandError> {
        let mut orders = Orders::from_standard_input()?;
        let Some(spec) = orders.next::<SinkSpec>()? else { return Ok(Exit::Done) };
        let tally = Arc::new(Tally::default());
        match spec {
            SinkSpec::Udp { separator } => {
                let socket = socket().map_err(failed)?;
                answer(&socket.local_addr().map_err(failed)?)?;
                let tally = Arc::clone(&tally);
                spawn(move || count_datagrams(&socket, separator, &tally))?;
            }
            SinkSpec::NappingReader { path } => {
                // Open for writing too, so that no writer's end is an end of the input.
                let fifo = File::options().read(true).write(true).open(path).map_err(failed)?;
                answer(&SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)))?;
                let tally = Arc::clone(&tally);
                spawn(move || count_lines(fifo, &tally))?;
            }
        }
        while let Some(ask) = orders.next::<Ask>()? {
            answer(&tally.report(&ask))?;
        }
        Ok(Exit::Done)
    }
}

/// Writes the monotonic time to the beginning of a message, in hexadecimal digits.
pub fn stamp(message: &mut [u8], now_ns: u64) {
    for (index, digit) in message[..STAMP_BYTES].iter_mut().rev().enumerate() {
        *digit = b"0123456789abcdef"[(now_ns >> (4 * index) & 0xf) as usize];
    }
}

fn read_stamp(message: &[u8]) -> Option<u64> {
    let digits = std::str::from_utf8(message.get(..STAMP_BYTES)?).ok()?;
    u64::from_str_radix(digits, 16).ok()
}

/// What arrived; written by the thread that reads.
#[derive(Debug, Default)]
struct Tally {
    messages: AtomicU64,
    is_stamped: AtomicBool,
    latencies: Histogram,
}

impl Tally {
    fn count(&self, messages: u64) {
        // One writer: a load and a store are an increment.
        self.messages.store(self.messages.load(Relaxed) + messages, Relaxed);
    }

    fn note(&self, message: &[u8], arrived_ns: u64) {
        if let Some(sent_ns) = read_stamp(message) {
            self.latencies.count(arrived_ns.saturating_sub(sent_ns));
        }
    }

    fn report(&self, ask: &Ask) -> SinkReport {
        let messages = self.messages.load(Relaxed);
        let (p50_ns, p99_ns) = (self.latencies.percentile(50), self.latencies.percentile(99));
        if let Some(is_stamped) = ask.is_stamped {
            self.is_stamped.store(is_stamped, Relaxed);
            self.latencies.clear();
        }
        SinkReport { messages, p50_ns, p99_ns }
    }
}

/// Counts of durations by size: 32 steps for each doubling, so a percentile is exact to 3 %.
#[derive(Debug)]
pub struct Histogram {
    counts: Vec<AtomicU64>,
}

const STEP_BITS: u32 = 5;

impl Default for Histogram {
    fn default() -> Self {
        let counts = (0..u64::BITS << STEP_BITS).map(|_| AtomicU64::new(0)).collect();
        Histogram { counts }
    }
}

impl Histogram {
    pub fn count(&self, ns: u64) {
        self.counts[bucket(ns)].fetch_add(1, Relaxed);
    }

    pub fn clear(&self) {
        for count in &self.counts {
            count.store(0, Relaxed);
        }
    }

    /// The lower bound of the step in which that percentile lies; 0 of nothing.
    pub fn percentile(&self, percent: u64) -> u64 {
        let all: u64 = self.counts.iter().map(|count| count.load(Relaxed)).sum();
        let mut left = (all * percent).div_ceil(100);
        for (index, count) in self.counts.iter().enumerate() {
            let count = count.load(Relaxed);
            if count >= left && left > 0 {
                return lower_bound(index);
            }
            left -= count.min(left);
        }
        0
    }
}

fn bucket(ns: u64) -> usize {
    let Some(high) = ns.checked_ilog2().filter(|high| *high >= STEP_BITS) else {
        return ns as usize;
    };
    let shift = high - STEP_BITS;
    let step = (ns >> shift) as usize & ((1 << STEP_BITS) - 1);
    (((shift + 1) << STEP_BITS) as usize) + step
}

fn lower_bound(bucket: usize) -> u64 {
    let (row, step) = (bucket >> STEP_BITS, bucket as u64 & ((1 << STEP_BITS) - 1));
    match row {
        0 => step,
        _ => (step | 1 << STEP_BITS) << (row - 1),
    }
}

fn socket() -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    // Only root may go beyond net.core.rmem_max; what is lost for want of it shows as not delivered.
    if set_socket_recv_buffer_size_force(&socket, BENCH_SINK_BUFFER_BYTES).is_err() {
        set_socket_recv_buffer_size(&socket, BENCH_SINK_BUFFER_BYTES)?;
    }
    Ok(socket)
}

fn count_datagrams(socket: &UdpSocket, separator: Option<u8>, tally: &Tally) -> io::Result<()> {
    let mut datagram = vec![0; usize::from(u16::MAX)];
    loop {
        let bytes = socket.recv(&mut datagram)?;
        let taken = &datagram[..bytes];
        match separator {
            None => tally.count(1),
            Some(separator) => {
                let separators = taken.iter().filter(|byte| **byte == separator).count();
                let is_ended = taken.last() == Some(&separator);
                tally.count(separators as u64 + u64::from(!is_ended));
            }
        }
        if tally.is_stamped.load(Relaxed) {
            let arrived_ns = now_ns();
            match separator {
                None => tally.note(taken, arrived_ns),
                Some(separator) => taken
                    .split(|byte| *byte == separator)
                    .for_each(|message| tally.note(message, arrived_ns)),
            }
        }
    }
}

fn count_lines(mut fifo: File, tally: &Tally) -> io::Result<()> {
    let mut block = vec![0; NAPPING_READER_BLOCK_BYTES];
    loop {
        let bytes = fifo.read(&mut block)?;
        let lines = block[..bytes].iter().filter(|byte| **byte == b'\n').count();
        tally.count(lines as u64);
        thread::sleep(NAPPING_READER_PAUSE);
    }
}

fn spawn(body: impl FnOnce() -> io::Result<()> + Send + 'static) -> Result<(), CommandError> {
    let run = move || {
        if let Err(error) = body() {
            // What is not counted from now on is missing in the figures.
            crate::cli::exit::complain(&failed(error).text);
        }
    };
    thread::Builder::new().name("sink".into()).spawn(run).map(drop).map_err(failed)
}

fn failed(error: io::Error) -> CommandError {
    CommandError::failed(format!("the sink: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_is_read_back() {
        let mut message = vec![b'x'; 64];
        stamp(&mut message, 0x0123_4567_89ab_cdef);
        assert!(message.starts_with(b"0123456789abcdefx"));
        assert_eq!(read_stamp(&message), Some(0x0123_4567_89ab_cdef));
        assert_eq!(read_stamp(b"short"), None);
    }

    #[test]
    fn percentiles_are_exact_to_three_percent() {
        let histogram = Histogram::default();
        assert_eq!(histogram.percentile(50), 0);
        (1..=1000).for_each(|us| histogram.count(us * 1000));
        for (percent, expected) in [(50, 500_000.0), (99, 990_000.0)] {
            let found = histogram.percentile(percent) as f64;
            assert!((0.97..=1.0).contains(&(found / expected)), "{percent}: {found}");
        }
        histogram.clear();
        assert_eq!(histogram.percentile(99), 0);
    }

    #[test]
    fn every_duration_has_a_step_not_above_it() {
        for ns in [0, 1, 31, 32, 33, 63, 64, 1000, u64::MAX] {
            assert!(lower_bound(bucket(ns)) <= ns, "{ns}");
            assert_eq!(bucket(lower_bound(bucket(ns))), bucket(ns), "{ns}");
        }
    }
}
