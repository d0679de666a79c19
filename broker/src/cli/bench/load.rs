//! `poolbroker bench-load`: one producer of the benchmarks.
//!
//! Opens its way out once, then sends as many messages as it is told and answers what that cost: its
//! own CPU from just before the first message to the answer of the last flush, connecting excluded.
//! A way without a flush (direct sending, a FIFO) ends with its last system call.
//!
//! At a steady rate each message has a moment, until which it sleeps: a message that is late is sent
//! at once. Its CPU is then that of the sends alone, by the thread's CPU clock, which is read around
//! each. Reading costs more than a send through a ring, so the clock is read twice in a row before
//! each send, and what that took is subtracted; an earlier reading takes the cache misses of the
//! first one after a sleep. (To subtract a run that only sleeps would not do: a sleep costs less
//! where others keep the processor awake.)

use std::fs::File;
use std::io::{IoSlice, Write};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};

use clap::Args;
use poolbroker_client::{Client, Transport, Upstream};
use rustix::net::{MMsgHdr, SendAncillaryBuffer, SendFlags, sendmmsg, sendto};
use rustix::thread::set_current_timer_slack;
use serde::{Deserialize, Serialize};

use super::clock::{now_ns, own_cpu_ns, sleep_until, thread_cpu_ns};
use super::helper::{Orders, answer};
use super::sink::stamp;
use crate::cli::exit::{CommandError, Exit};
use crate::config::{BENCH_MMSG_MESSAGES, BENCH_RING_BYTES, BENCH_TIMEOUT, PIPE_BUF};

/// Serve `poolbroker bench` as one of its producers.
#[derive(Debug, Args)]
pub struct BenchLoad {}

/// The first order: what to open. Answered by [`Ready`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LoadSpec {
    pub way: Way,
    /// Bytes of each message.
    pub bytes: usize,
    /// Where datagrams go that are sent directly.
    pub sink: SocketAddr,
    /// Of the broker.
    pub runtime_dir: PathBuf,
    pub upstream: String,
    /// For the ways that write to a FIFO.
    pub fifo: PathBuf,
}

/// How messages are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Way {
    /// sendto(2) for each datagram on a socket that is not connected.
    Sendto,
    /// send(2) for each on one that is.
    Send,
    /// sendmmsg(2) for many.
    Sendmmsg,
    /// `Upstream::send` by way of a ring.
    Ring,
    /// `Upstream::send` by way of the client socket.
    Unix,
    /// `Upstream::send_all` by way of the client socket.
    UnixAll,
    /// Lines, as many whole ones as a write of PIPE_BUF bytes takes.
    Fifo,
    /// Lines, each in a write of its own.
    FifoLine,
    /// As `Fifo`, to a pipe that was handed over.
    Pipe,
}

/// The way out is open.
#[derive(Debug, Serialize, Deserialize)]
pub struct Ready {}

/// Every other order: send. Answered by [`Done`].
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Order {
    pub messages: u64,
    /// Between the moments of two messages; none: as fast as it goes.
    pub interval_ns: Option<NonZeroU64>,
}

/// What sending took.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Done {
    /// Messages that the other side took.
    pub accepted: u64,
    /// Of everything from the start to the end; at a steady rate, of the sends.
    pub cpu_ns: u64,
    /// Monotonic.
    pub started_ns: u64,
    pub ended_ns: u64,
}

impl BenchLoad {
    /// Sends as ordered until the benchmark ends.
    pub fn run(&self) -> Result<Exit, CommandError> {
        // A sleep that ends by the default slack of 50 us late would bunch steady messages.
        set_current_timer_slack(NonZeroU64::new(1)).map_err(|error| failed(error.into()))?;
        let mut orders = Orders::from_standard_input()?;
        let Some(spec) = orders.next::<LoadSpec>()? else { return Ok(Exit::Done) };
        let mut load = Load { message: vec![b'x'; spec.bytes], outlet: Outlet::open(&spec)? };
        answer(&Ready {})?;
        while let Some(order) = orders.next::<Order>()? {
            answer(&load.run(&order)?)?;
        }
        Ok(Exit::Done)
    }
}

struct Load {
    message: Vec<u8>,
    outlet: Outlet,
}

impl Load {
    fn run(&mut self, order: &Order) -> Result<Done, CommandError> {
        self.outlet.prepare()?;
        let (cpu, started_ns) = (own_cpu_ns(), now_ns());
        let (accepted, cpu_ns) = match order.interval_ns {
            None => {
                self.outlet.send(&self.message, order.messages)?;
                let accepted = self.outlet.finish(order.messages)?;
                (accepted, own_cpu_ns() - cpu)
            }
            Some(interval_ns) => {
                let cpu_ns = self.send_steadily(order.messages, interval_ns)?;
                (self.outlet.finish(order.messages)?, cpu_ns)
            }
        };
        Ok(Done { accepted, cpu_ns, started_ns, ended_ns: now_ns() })
    }

    /// Returns the CPU of the sends.
    fn send_steadily(
        &mut self,
        messages: u64,
        interval_ns: NonZeroU64,
    ) -> Result<u64, CommandError> {
        let (mut due_ns, mut sends_ns, mut readings_ns) = (now_ns(), 0, 0);
        for _ in 0..messages {
            due_ns += interval_ns.get();
            sleep_until(due_ns);
            stamp(&mut self.message, now_ns());
            thread_cpu_ns();
            let (first, second) = (thread_cpu_ns(), thread_cpu_ns());
            self.outlet.send(&self.message, 1)?;
            let third = thread_cpu_ns();
            readings_ns += second - first;
            sends_ns += third - second;
        }
        Ok(sends_ns.saturating_sub(readings_ns))
    }
}

/// The way out.
enum Outlet {
    Datagrams { socket: UdpSocket, to: SocketAddr },
    Connected(UdpSocket),
    Batched { socket: UdpSocket, batch: usize },
    Session { upstream: Upstream, is_batched: bool },
    Lines { lines: Lines },
    Pipe { upstream: Upstream, open: Option<(Lines, poolbroker_client::Attached)> },
}

impl Outlet {
    fn open(spec: &LoadSpec) -> Result<Self, CommandError> {
        let session = |transport| -> Result<Upstream, CommandError> {
            let client = Client::connect_in_with(&spec.runtime_dir, transport)?;
            Ok(client.upstream(&spec.upstream)?)
        };
        Ok(match spec.way {
            Way::Sendto => Outlet::Datagrams { socket: socket()?, to: spec.sink },
            Way::Send => Outlet::Connected(connected(spec.sink)?),
            Way::Sendmmsg => {
                Outlet::Batched { socket: connected(spec.sink)?, batch: BENCH_MMSG_MESSAGES }
            }
            Way::Ring => Outlet::Session {
                upstream: session(Transport::Ring { bytes: BENCH_RING_BYTES })?,
                is_batched: false,
            },
            Way::Unix => Outlet::Session { upstream: session(Transport::Unix)?, is_batched: false },
            Way::UnixAll => {
                Outlet::Session { upstream: session(Transport::Unix)?, is_batched: true }
            }
            Way::Fifo => Outlet::Lines { lines: Lines::to_fifo(&spec.fifo, PIPE_BUF)? },
            Way::FifoLine => Outlet::Lines { lines: Lines::to_fifo(&spec.fifo, 0)? },
            Way::Pipe => Outlet::Pipe { upstream: session(Transport::Unix)?, open: None },
        })
    }

    /// What is not to be measured.
    fn prepare(&mut self) -> Result<(), CommandError> {
        if let Outlet::Pipe { upstream, open } = self {
            let (writer, attached) = upstream.pipe()?;
            let file = File::from(std::os::fd::OwnedFd::from(writer));
            *open = Some((Lines::new(file, PIPE_BUF), attached));
        }
        Ok(())
    }

    /// Sends `message` so many times.
    fn send(&mut self, message: &[u8], times: u64) -> Result<(), CommandError> {
        match self {
            Outlet::Datagrams { socket, to } => {
                for _ in 0..times {
                    sendto(&*socket, message, SendFlags::empty(), to)
                        .map_err(|error| failed(error.into()))?;
                }
            }
            Outlet::Connected(socket) => {
                for _ in 0..times {
                    socket.send(message).map_err(failed)?;
                }
            }
            Outlet::Batched { socket, batch } => send_batched(socket, *batch, message, times)?,
            Outlet::Session { upstream, is_batched: false } => {
                for _ in 0..times {
                    upstream.send(message)?;
                }
            }
            Outlet::Session { upstream, is_batched: true } => {
                let times = usize::try_from(times).unwrap_or(usize::MAX);
                upstream.send_all(std::iter::repeat_n(message, times))?;
            }
            Outlet::Lines { lines } => lines.write(message, times)?,
            Outlet::Pipe { open, .. } => {
                let (lines, _) = open.as_mut().expect("`prepare` comes first");
                lines.write(message, times)?;
            }
        }
        Ok(())
    }

    /// Waits until every message has its outcome; returns how many the other side took.
    fn finish(&mut self, sent: u64) -> Result<u64, CommandError> {
        match self {
            Outlet::Session { upstream, .. } => Ok(upstream.flush(BENCH_TIMEOUT)?.accepted),
            Outlet::Pipe { open, .. } => {
                let (lines, attached) = open.take().expect("`prepare` comes first");
                drop(lines);
                Ok(attached.wait(BENCH_TIMEOUT)?.outcomes.accepted)
            }
            Outlet::Datagrams { .. }
            | Outlet::Connected(_)
            | Outlet::Batched { .. }
            | Outlet::Lines { .. } => Ok(sent),
        }
    }
}

fn send_batched(
    socket: &UdpSocket,
    batch: usize,
    message: &[u8],
    times: u64,
) -> Result<(), CommandError> {
    let parts = [IoSlice::new(message)];
    let mut controls: Vec<_> = (0..batch).map(|_| SendAncillaryBuffer::default()).collect();
    let headers = controls.iter_mut().map(|control| MMsgHdr::new(&parts, control));
    let mut headers: Vec<_> = headers.collect();
    let mut left = times;
    while left > 0 {
        let many = usize::try_from(left).unwrap_or(batch).min(batch);
        let sent = sendmmsg(socket, &mut headers[..many], SendFlags::empty());
        left -= sent.map_err(|error| failed(error.into()))? as u64;
    }
    Ok(())
}

/// A pipe or FIFO that takes one message per line.
struct Lines {
    file: File,
    /// The most that one write has, if more than one line fits.
    write_bytes_max: usize,
    block: Vec<u8>,
}

impl Lines {
    fn to_fifo(path: &Path, write_bytes_max: usize) -> Result<Self, CommandError> {
        let file = File::options().write(true).open(path).map_err(failed)?;
        Ok(Lines::new(file, write_bytes_max))
    }

    fn new(file: File, write_bytes_max: usize) -> Self {
        Lines { file, write_bytes_max, block: Vec::new() }
    }

    fn write(&mut self, message: &[u8], times: u64) -> Result<(), CommandError> {
        let line_bytes = message.len() + 1;
        let lines = (self.write_bytes_max / line_bytes).max(1) as u64;
        self.block.clear();
        for _ in 0..lines.min(times) {
            self.block.extend_from_slice(message);
            self.block.push(b'\n');
        }
        let mut left = times;
        while left > 0 {
            let bytes = lines.min(left) as usize * line_bytes;
            self.file.write_all(&self.block[..bytes]).map_err(failed)?;
            left -= lines.min(left);
        }
        Ok(())
    }
}

fn socket() -> Result<UdpSocket, CommandError> {
    UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).map_err(failed)
}

fn connected(to: SocketAddr) -> Result<UdpSocket, CommandError> {
    let socket = socket()?;
    socket.connect(to).map_err(failed)?;
    Ok(socket)
}

fn failed(error: std::io::Error) -> CommandError {
    CommandError::failed(format!("a producer: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::fd::OwnedFd;

    fn written(write_bytes_max: usize, times: u64) -> Vec<u8> {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let mut lines = Lines::new(File::from(OwnedFd::from(writer)), write_bytes_max);
        lines.write(b"abc", times).unwrap();
        drop(lines);
        let mut text = Vec::new();
        reader.read_to_end(&mut text).unwrap();
        text
    }

    #[test]
    fn every_line_is_written_whatever_fits_one_write() {
        for (write_bytes_max, times) in [(0, 3), (8, 3), (9, 5), (4096, 3), (4096, 2000)] {
            assert_eq!(written(write_bytes_max, times), b"abc\n".repeat(times as usize));
        }
    }

    #[test]
    fn many_datagrams_go_in_batches_and_the_rest_behind() {
        let peer = UdpSocket::bind("127.0.0.1:0").unwrap();
        let socket = connected(peer.local_addr().unwrap()).unwrap();
        send_batched(&socket, 4, b"message", 10).unwrap();
        let mut datagram = [0; 16];
        for _ in 0..10 {
            assert_eq!(peer.recv(&mut datagram).unwrap(), 7);
        }
    }
}
