//! One-way throughput beside `socat -u`, in one run.
//!
//! ```text
//! cargo bench -p poolbroker-tests --bench one_way
//! ```
//!
//! 1,000,000 lines of 22 bytes go through a FIFO, or in by standard input, to a sink in this
//! process: once through socat, once through the broker, in interleaved rounds. Each round is
//! judged by its own ratio, so that a noisy machine disturbs both sides alike. Over UDP socat is
//! made to do the same job, one datagram per line, by reads of exactly one line (`-b 22`); what it
//! does by default, 8 KiB blocks that ignore where lines end, is measured beside it.
//!
//! A TCP round ends when the sink has read every byte. A UDP round ends when every datagram was
//! handed to the kernel; how many the sink then got is printed too, since a full receive buffer
//! loses datagrams without a word.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, UdpSocket};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use poolbroker_tests::Broker;
use poolbroker_tests::broker::total;
use poolbroker_tests::deadline::{PATIENCE, wait_for};

const LINES: u64 = 1_000_000;
const LINE_BYTES: u64 = 22;
const BYTES: u64 = LINES * LINE_BYTES;
const ROUNDS: usize = 7;

/// How the lines come in.
#[derive(Clone, Copy, PartialEq)]
enum Entrance {
    Fifo,
    StandardInput,
}

/// What takes them.
#[derive(Clone, Copy, PartialEq)]
enum Protocol {
    Tcp,
    Udp,
}

struct Case {
    name: &'static str,
    entrance: Entrance,
    protocol: Protocol,
    /// socat's block size; its default of 8 KiB where there is none.
    block_bytes: Option<u64>,
}

const CASES: &[Case] = &[
    Case { name: "fifo/tcp", entrance: Entrance::Fifo, protocol: Protocol::Tcp, block_bytes: None },
    Case {
        name: "send/tcp",
        entrance: Entrance::StandardInput,
        protocol: Protocol::Tcp,
        block_bytes: None,
    },
    Case {
        name: "fifo/udp",
        entrance: Entrance::Fifo,
        protocol: Protocol::Udp,
        block_bytes: Some(LINE_BYTES),
    },
    Case {
        name: "send/udp",
        entrance: Entrance::StandardInput,
        protocol: Protocol::Udp,
        block_bytes: Some(LINE_BYTES),
    },
    Case {
        name: "fifo/udp (socat: 8 KiB datagrams)",
        entrance: Entrance::Fifo,
        protocol: Protocol::Udp,
        block_bytes: None,
    },
];

fn main() {
    let dir = tempfile::tempdir().expect("a temporary directory can be made");
    let lines = dir.path().join("lines");
    let text: String = (0..LINES).map(|number| format!("bench.lines:{number:0>7}|c\n")).collect();
    assert_eq!(text.len() as u64, BYTES, "the lines have the size that is said");
    std::fs::write(&lines, text).expect("the lines can be written");
    println!(
        "{LINES} lines of {LINE_BYTES} bytes, {ROUNDS} interleaved rounds, medians (min to max)"
    );
    println!("{:<34} {:>9} {:>12} {:>22}", "case", "socat s", "poolbroker s", "ratio");
    for case in CASES {
        measure(case, &lines, dir.path());
    }
}

fn measure(case: &Case, lines: &Path, dir: &Path) {
    let sink = Sink::start(case.protocol);
    let broker = Broker::start(&[format!("sink={}", sink.url)]);
    let fifo = dir.join("socat.fifo");
    let (mut theirs, mut ours, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    let mut lost = 0;
    for _ in 0..ROUNDS {
        let their_time = socat_round(case, &sink, lines, &fifo);
        let before = sink.datagrams.load(Ordering::SeqCst);
        let our_time = our_round(case, &sink, &broker, lines);
        if case.protocol == Protocol::Udp {
            lost += LINES - sink.settled_datagrams().saturating_sub(before).min(LINES);
        }
        theirs.push(their_time.as_secs_f64());
        ours.push(our_time.as_secs_f64());
        ratios.push(our_time.as_secs_f64() / their_time.as_secs_f64());
    }
    for figures in [&mut theirs, &mut ours, &mut ratios] {
        figures.sort_by(f64::total_cmp);
    }
    let middle = ROUNDS / 2;
    let spread = format!("({:.2} to {:.2})", ratios[0], ratios[ROUNDS - 1]);
    print!("{:<34} {:>9.3} {:>12.3} ", case.name, theirs[middle], ours[middle]);
    print!("{:>7.2} {spread:>14}", ratios[middle]);
    match lost {
        0 => println!(),
        lost => println!("  {lost} of ours not received in all"),
    }
}

fn socat_round(case: &Case, sink: &Sink, lines: &Path, fifo: &Path) -> Duration {
    let target = match case.protocol {
        Protocol::Tcp => format!("TCP:127.0.0.1:{}", sink.port),
        Protocol::Udp => format!("UDP:127.0.0.1:{}", sink.port),
    };
    let mut socat = Command::new("socat");
    socat.arg("-u");
    if let Some(bytes) = case.block_bytes {
        socat.arg(format!("-b{bytes}"));
    }
    let expected = sink.bytes.load(Ordering::SeqCst) + BYTES;
    let begin = match case.entrance {
        Entrance::StandardInput => {
            let begin = Instant::now();
            let input = File::open(lines).expect("the lines can be read");
            wait(start(socat.arg("STDIN").arg(target).stdin(Stdio::from(input))));
            begin
        }
        Entrance::Fifo => {
            let _ = std::fs::remove_file(fifo);
            let made = Command::new("mkfifo").arg(fifo).status().expect("mkfifo is there");
            assert!(made.success());
            let child = start(socat.arg(format!("OPEN:{}", fifo.display())).arg(target));
            // Opening waits for the reader, so that socat's own start does not count.
            let mut writer = File::options().write(true).open(fifo).expect("the FIFO opens");
            let begin = Instant::now();
            copy_lines(lines, &mut writer);
            drop(writer);
            wait(child);
            begin
        }
    };
    if case.protocol == Protocol::Tcp {
        sink.wait_for_bytes(expected);
    }
    begin.elapsed()
}

fn our_round(case: &Case, sink: &Sink, broker: &Broker, lines: &Path) -> Duration {
    let expected = sink.bytes.load(Ordering::SeqCst) + BYTES;
    let sent_before = total(&broker.upstream_status("sink"), "sent");
    let begin = Instant::now();
    match case.entrance {
        Entrance::StandardInput => {
            let input = File::open(lines).expect("the lines can be read");
            wait(start(broker.command("send").arg("sink").stdin(Stdio::from(input))));
        }
        Entrance::Fifo => {
            let fifo = File::options().write(true).open(broker.fifo("sink"));
            copy_lines(lines, &mut fifo.expect("the FIFO opens"));
        }
    }
    match case.protocol {
        Protocol::Tcp => sink.wait_for_bytes(expected),
        Protocol::Udp => wait_for("every line is sent", || {
            let sent = total(&broker.upstream_status("sink"), "sent");
            (sent == sent_before + LINES).then_some(())
        }),
    }
    let time = begin.elapsed();
    let upstream = broker.upstream_status("sink");
    assert_eq!(total(&upstream, "sent"), sent_before + LINES, "{upstream:#}");
    time
}

fn copy_lines(lines: &Path, writer: &mut File) {
    let mut input = File::open(lines).expect("the lines can be read");
    let mut block = vec![0; 64 * 1024];
    loop {
        let bytes = input.read(&mut block).expect("the lines can be read");
        if bytes == 0 {
            return;
        }
        writer.write_all(&block[..bytes]).expect("the FIFO takes the lines");
    }
}

fn start(command: &mut Command) -> Child {
    command.spawn().expect("socat is installed and the broker is built")
}

fn wait(mut child: Child) {
    // Not polled: its interval would count, and weigh more on the faster side.
    let status = child.wait().expect("the child is ours");
    assert!(status.success(), "{status}");
}

/// Counts what arrives, in a thread of its own.
struct Sink {
    port: u16,
    url: String,
    bytes: Arc<AtomicU64>,
    datagrams: Arc<AtomicU64>,
    stopping: Arc<AtomicBool>,
}

impl Sink {
    fn start(protocol: Protocol) -> Sink {
        let (bytes, datagrams) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let stopping = Arc::new(AtomicBool::new(false));
        let (port, url) = match protocol {
            Protocol::Tcp => {
                let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
                let port = listener.local_addr().expect("it is bound").port();
                let bytes = Arc::clone(&bytes);
                thread::spawn(move || {
                    for stream in listener.incoming().flatten() {
                        let bytes = Arc::clone(&bytes);
                        thread::spawn(move || count_stream(stream, &bytes));
                    }
                });
                (port, format!("tcp://127.0.0.1:{port}"))
            }
            Protocol::Udp => {
                let socket = UdpSocket::bind("127.0.0.1:0").expect("a port is free");
                let room = 1 << 30;
                // Only root may go beyond net.core.rmem_max.
                if rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, room).is_err() {
                    let _ = rustix::net::sockopt::set_socket_recv_buffer_size(&socket, room);
                }
                let port = socket.local_addr().expect("it is bound").port();
                let (datagrams, stopping) = (Arc::clone(&datagrams), Arc::clone(&stopping));
                thread::spawn(move || count_datagrams(&socket, &datagrams, &stopping));
                (port, format!("udp-write-only://127.0.0.1:{port}"))
            }
        };
        Sink { port, url, bytes, datagrams, stopping }
    }

    fn wait_for_bytes(&self, expected: u64) {
        let end = Instant::now() + PATIENCE;
        while self.bytes.load(Ordering::SeqCst) < expected {
            assert!(Instant::now() < end, "the sink has not got every byte");
            thread::sleep(Duration::from_micros(100));
        }
    }

    /// The datagrams received, once no more come.
    fn settled_datagrams(&self) -> u64 {
        let mut seen = self.datagrams.load(Ordering::SeqCst);
        loop {
            thread::sleep(Duration::from_millis(50));
            let now = self.datagrams.load(Ordering::SeqCst);
            if now == seen {
                return now;
            }
            seen = now;
        }
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::SeqCst);
    }
}

fn count_stream(mut stream: impl Read, bytes: &AtomicU64) {
    let mut block = vec![0; 256 * 1024];
    while let Ok(read @ 1..) = stream.read(&mut block) {
        bytes.fetch_add(read as u64, Ordering::SeqCst);
    }
}

fn count_datagrams(socket: &UdpSocket, datagrams: &AtomicU64, stopping: &AtomicBool) {
    let mut datagram = [0; 65_536];
    let patience = Duration::from_millis(100);
    socket.set_read_timeout(Some(patience)).expect("a timeout above zero can be set");
    while !stopping.load(Ordering::SeqCst) {
        if socket.recv(&mut datagram).is_ok() {
            datagrams.fetch_add(1, Ordering::SeqCst);
        }
    }
}
