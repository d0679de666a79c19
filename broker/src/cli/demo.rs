//! `poolbroker demo`: the main job in one command, with peers of its own.
//!
//! Starts a real broker in a temporary directory, drives every transport and protocol type there
//! is, and compares what the broker says with what the peers counted. Messages go in batches that
//! fit the receive buffer of a UDP socket, since a full one loses datagrams without a word.

use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{Shutdown, SocketAddr, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use poolbroker_client::{Client, Transport, Upstream};

use super::after_help;
use super::child_broker::ChildBroker;
use super::exit::{CommandError, Exit, messages, print};
use super::peers::Peer;
use super::report::{ConnectionReport, Report, UpstreamReport, fetch};
use super::table::{Table, stdout_takes_colour};
use crate::config::{DEMO_BATCH_MESSAGES, DEMO_BATCHES, DEMO_TIMEOUT};

/// Show the whole broker at work, without any set-up.
///
/// Starts a broker in a temporary directory with TCP and UDP peers that answer everything, sends
/// through every transport to every protocol type, and compares what the broker counted with what
/// the peers counted. Then it measures why write-only exists: the kernel memory that unread
/// replies hold.
#[derive(Debug, Args)]
#[command(after_help = after_help(EXAMPLES))]
pub struct Demo {}

const EXAMPLES: &str = "\
Examples:
  poolbroker demo";

impl Demo {
    /// Runs the demonstration; a figure that does not agree is a failure.
    pub fn run(&self) -> Result<Exit, CommandError> {
        let mut stage = Stage::set()?;
        let mut table = Table::new(&[
            "TRANSPORT",
            "PROTOCOL",
            "KIND",
            "ACCEPTED",
            "SENT",
            "REPLIED",
            "DISCARDED",
            "US/MESSAGE",
        ]);
        let (mut disagreements, mut total) = (Vec::new(), 0);
        for scene in SCENES {
            let figures = stage.play(scene)?;
            total += figures.handed_over;
            disagreements.extend(figures.disagreement(scene));
            table.push(figures.row(scene));
        }
        print(table.render(stdout_takes_colour()).as_bytes())?;
        print(format!("\n{}", stage.memory_of_unread_replies()?).as_bytes())?;
        stage.end()?;
        if !disagreements.is_empty() {
            let list = disagreements.join("; ");
            return Err(CommandError::failed(format!("figures do not agree: {list}")));
        }
        print(
            format!(
                "\n{}, {} ways: each was accepted, sent, received and answered exactly once, and \
                 every answer\nwas delivered or discarded. At SIGTERM the broker ended with 0.\n",
                messages(total),
                SCENES.len()
            )
            .as_bytes(),
        )?;
        Ok(Exit::Done)
    }
}

/// What a message is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    OneWay,
    Request,
}

impl Kind {
    /// How many of the answers to `messages` nobody asked for.
    fn replies_discarded(self, messages: u64) -> u64 {
        match self {
            Kind::OneWay => messages,
            Kind::Request => 0,
        }
    }
}

/// One line of the table: a transport, an upstream, and how to hand over one batch.
struct Scene {
    transport: &'static str,
    upstream: &'static str,
    kind: Kind,
    hand_over: fn(&Stage, &Upstream) -> Result<(), CommandError>,
}

const fn scene(
    transport: &'static str,
    upstream: &'static str,
    kind: Kind,
    hand_over: fn(&Stage, &Upstream) -> Result<(), CommandError>,
) -> Scene {
    Scene { transport, upstream, kind, hand_over }
}

const TCP: &str = "tcp";
const UDP: &str = "udp";
const WRITE_ONLY: &str = "udp-write-only";

const SCENES: &[Scene] = &[
    scene("client socket", TCP, Kind::OneWay, Stage::send),
    scene("client socket", UDP, Kind::OneWay, Stage::send),
    scene("client socket", WRITE_ONLY, Kind::OneWay, Stage::send),
    scene("client socket", TCP, Kind::Request, Stage::request),
    scene("client socket", UDP, Kind::Request, Stage::request),
    scene("socketpair", TCP, Kind::Request, Stage::request_by_socketpair),
    scene("socketpair", UDP, Kind::Request, Stage::request_by_socketpair),
    scene("pipe", TCP, Kind::OneWay, Stage::write_pipe),
    scene("pipe", UDP, Kind::OneWay, Stage::write_pipe),
    scene("pipe", WRITE_ONLY, Kind::OneWay, Stage::write_pipe),
    scene("seq | poolbroker pipe", TCP, Kind::OneWay, Stage::pipe_from_shell),
    scene("seq | poolbroker pipe", UDP, Kind::OneWay, Stage::pipe_from_shell),
    scene("seq | poolbroker pipe", WRITE_ONLY, Kind::OneWay, Stage::pipe_from_shell),
    scene("echo > FIFO", TCP, Kind::OneWay, Stage::echo_from_shell),
    scene("echo > FIFO", UDP, Kind::OneWay, Stage::echo_from_shell),
    scene("echo > FIFO", WRITE_ONLY, Kind::OneWay, Stage::echo_from_shell),
];

/// What one scene moved.
struct Figures {
    handed_over: u64,
    accepted: u64,
    /// Of one-way messages.
    sent: Option<u64>,
    /// Of requests.
    replied: Option<u64>,
    discarded: u64,
    /// What the peer received, and answered.
    answered: u64,
    elapsed: Duration,
}

impl Figures {
    fn row(&self, scene: &Scene) -> Vec<String> {
        let count = |count: Option<u64>| count.map_or("-".into(), |count| count.to_string());
        let us = self.elapsed.as_secs_f64() * 1e6 / self.handed_over as f64;
        let kind = match scene.kind {
            Kind::OneWay => "one-way",
            Kind::Request => "request",
        };
        vec![
            scene.transport.into(),
            scene.upstream.into(),
            kind.into(),
            self.accepted.to_string(),
            count(self.sent),
            count(self.replied),
            self.discarded.to_string(),
            format!("{us:.1}"),
        ]
    }

    fn disagreement(&self, scene: &Scene) -> Option<String> {
        let all = self.handed_over;
        let ended = self.sent.or(self.replied).unwrap_or(0);
        let agrees = [self.accepted, ended, self.answered] == [all; 3]
            && self.discarded == scene.kind.replies_discarded(all);
        (!agrees).then(|| {
            format!(
                "{} to {}: handed over {all}, accepted {}, sent or replied {ended}, arrived {}, \
                 discarded {}",
                scene.transport, scene.upstream, self.accepted, self.answered, self.discarded
            )
        })
    }
}

/// A broker in a directory of its own, and the peers it talks to.
struct Stage {
    broker: ChildBroker,
    client: Client,
    peers: Vec<(&'static str, Peer)>,
}

impl Stage {
    fn set() -> Result<Self, CommandError> {
        let peers = vec![
            (TCP, Peer::tcp().map_err(io_failed("a TCP peer"))?),
            (UDP, Peer::udp().map_err(io_failed("a UDP peer"))?),
            (WRITE_ONLY, Peer::udp().map_err(io_failed("a UDP peer"))?),
        ];
        let mut broker = ChildBroker::start(|_| Ok(upstreams(&peers)))?;
        let client = broker.connect(Transport::Unix)?;
        Ok(Stage { broker, client, peers })
    }

    fn peer(&self, upstream: &str) -> &Peer {
        let found = self.peers.iter().find(|(name, _)| *name == upstream);
        &found.expect("every scene names one of the three upstreams").1
    }

    fn counters(&self, upstream: &str) -> Result<UpstreamReport, CommandError> {
        let report = Report::parse(&fetch(self.broker.runtime_dir())?)?;
        let found = report.upstreams.into_iter().find(|report| report.name == upstream);
        found.ok_or_else(|| CommandError::failed(format!("status does not show {upstream:?}")))
    }

    /// Plays a scene batch by batch; each has arrived before the next.
    fn play(&mut self, scene: &Scene) -> Result<Figures, CommandError> {
        let upstream = self.client.upstream(scene.upstream)?;
        let before = self.counters(scene.upstream)?;
        let answered_before = self.peer(scene.upstream).answered();
        let (mut handed_over, mut elapsed) = (0, Duration::ZERO);
        for _ in 0..DEMO_BATCHES {
            let start = Instant::now();
            (scene.hand_over)(self, &upstream)?;
            handed_over += DEMO_BATCH_MESSAGES;
            let arrived = || self.peer(scene.upstream).answered() - answered_before >= handed_over;
            wait_until(|| Ok(arrived()))?;
            elapsed += start.elapsed();
        }
        let discards = scene.kind.replies_discarded(handed_over);
        let settled = |report: &UpstreamReport| {
            report.queued == 0 && report.replies_discarded - before.replies_discarded >= discards
        };
        wait_until(|| Ok(settled(&self.counters(scene.upstream)?)))?;
        let after = self.counters(scene.upstream)?;
        let (accepted, sent, replied) = match scene.kind {
            Kind::OneWay => {
                (after.accepted - before.accepted, Some(after.sent - before.sent), None)
            }
            Kind::Request => {
                (after.requests - before.requests, None, Some(after.replied - before.replied))
            }
        };
        Ok(Figures {
            handed_over,
            accepted,
            sent,
            replied,
            discarded: after.replies_discarded - before.replies_discarded,
            answered: self.peer(scene.upstream).answered() - answered_before,
            elapsed,
        })
    }

    fn send(&self, upstream: &Upstream) -> Result<(), CommandError> {
        for number in 0..DEMO_BATCH_MESSAGES {
            upstream.send(format!("send:{number}|c").as_bytes())?;
        }
        upstream.flush(DEMO_TIMEOUT)?;
        Ok(())
    }

    fn request(&self, upstream: &Upstream) -> Result<(), CommandError> {
        for number in 0..DEMO_BATCH_MESSAGES {
            let body = format!("request {number}");
            let reply = upstream.request(body.as_bytes(), DEMO_TIMEOUT)?;
            is_the_answer(&reply, &body)?;
        }
        Ok(())
    }

    fn request_by_socketpair(&self, upstream: &Upstream) -> Result<(), CommandError> {
        let (stream, attached) = upstream.socketpair()?;
        let failed = io_failed("the socketpair");
        stream.set_read_timeout(Some(DEMO_TIMEOUT)).map_err(&failed)?;
        let (mut writer, mut reader) = (&stream, BufReader::new(&stream));
        let mut reply = Vec::new();
        for number in 0..DEMO_BATCH_MESSAGES {
            let body = format!("request {number}");
            writer.write_all(format!("{body}\n").as_bytes()).map_err(&failed)?;
            reply.clear();
            reader.read_until(b'\n', &mut reply).map_err(&failed)?;
            is_the_answer(reply.strip_suffix(b"\n").unwrap_or(&reply), &body)?;
        }
        stream.shutdown(Shutdown::Write).map_err(&failed)?;
        attached.wait(DEMO_TIMEOUT)?;
        Ok(())
    }

    fn write_pipe(&self, upstream: &Upstream) -> Result<(), CommandError> {
        let (mut writer, attached) = upstream.pipe()?;
        for number in 0..DEMO_BATCH_MESSAGES {
            let line = format!("pipe:{number}|c\n");
            writer.write_all(line.as_bytes()).map_err(io_failed("the pipe"))?;
        }
        drop(writer);
        attached.wait(DEMO_TIMEOUT)?;
        Ok(())
    }

    fn pipe_from_shell(&self, upstream: &Upstream) -> Result<(), CommandError> {
        let script = "seq \"$1\" | \"$2\" --runtime-dir \"$3\" pipe \"$4\"";
        let dir = self.broker.runtime_dir().path();
        shell(
            script,
            &[
                DEMO_BATCH_MESSAGES.to_string().as_ref(),
                self.broker.executable().as_os_str(),
                dir.as_os_str(),
                upstream.name().as_ref(),
            ],
        )
    }

    fn echo_from_shell(&self, upstream: &Upstream) -> Result<(), CommandError> {
        let script =
            "i=0; while [ $i -lt \"$1\" ]; do echo \"echo:$i|c\" > \"$2\"; i=$((i+1)); done";
        let fifo = self.broker.runtime_dir().fifo(upstream.name());
        shell(script, &[DEMO_BATCH_MESSAGES.to_string().as_ref(), fifo.as_os_str()])
    }

    /// The reason for write-only: a socket that nobody reads, beside those of the pool, after the
    /// same number of replies.
    fn memory_of_unread_replies(&self) -> Result<String, CommandError> {
        let peer = self.peer(WRITE_ONLY);
        let pool = self.counters(WRITE_ONLY)?;
        let failed = io_failed("a plain UDP socket");
        let plain = UdpSocket::bind(("127.0.0.1", 0)).map_err(&failed)?;
        plain.connect(peer.address()).map_err(&failed)?;
        let before = peer.answered();
        let mut sent = 0;
        while sent < pool.replies_discarded {
            let batch = DEMO_BATCH_MESSAGES.min(pool.replies_discarded - sent);
            for number in sent..sent + batch {
                plain.send(format!("plain:{number}|c").as_bytes()).map_err(&failed)?;
            }
            sent += batch;
            wait_until(|| Ok(peer.answered() - before >= sent))?;
        }
        let plain_bytes = unread_bytes(&[plain.local_addr().map_err(&failed)?])?;
        let local = |connection: &ConnectionReport| connection.local.as_ref()?.parse().ok();
        let pool_sockets: Vec<SocketAddr> = pool.connections.iter().filter_map(local).collect();
        let pool_bytes = unread_bytes(&pool_sockets)?;
        let mut table = Table::new(&["AFTER THE SAME REPLIES", "REPLIES", "KERNEL MEMORY HELD"]);
        let row = |what: &str, replies: u64, bytes: u64| {
            vec![what.to_owned(), replies.to_string(), format!("{bytes} bytes")]
        };
        table.push(row("a UDP socket that nobody reads", sent, plain_bytes));
        let what = format!("write-only sockets of the pool ({})", pool_sockets.len());
        table.push(row(&what, pool.replies_discarded, pool_bytes));
        if pool_sockets.is_empty() || pool_bytes != 0 || plain_bytes == 0 {
            return Err(CommandError::failed(format!(
                "the pool's {} write-only sockets hold {pool_bytes} bytes of replies, the plain \
                 one {plain_bytes}: expected none and some",
                pool_sockets.len()
            )));
        }
        Ok(table.render(stdout_takes_colour()))
    }

    fn end(self) -> Result<(), CommandError> {
        drop(self.client);
        self.broker.end()
    }
}

/// The arguments that configure one upstream for each peer.
fn upstreams(peers: &[(&str, Peer)]) -> Vec<String> {
    let url = |(name, peer): &(&str, Peer)| format!("{name}={name}://{}", peer.address());
    peers.iter().flat_map(|peer| ["--upstream".to_owned(), url(peer)]).collect()
}

const POLL_INTERVAL: Duration = Duration::from_millis(1);

fn wait_until(mut is_done: impl FnMut() -> Result<bool, CommandError>) -> Result<(), CommandError> {
    let start = Instant::now();
    while !is_done()? {
        if start.elapsed() > DEMO_TIMEOUT {
            // What is missing shows in the figures.
            return Ok(());
        }
        thread::sleep(POLL_INTERVAL);
    }
    Ok(())
}

fn io_failed(what: &'static str) -> impl Fn(io::Error) -> CommandError {
    move |error| CommandError::failed(format!("{what}: {error}"))
}

fn is_the_answer(reply: &[u8], body: &str) -> Result<(), CommandError> {
    match reply == body.as_bytes() {
        true => Ok(()),
        false => Err(CommandError::failed(format!(
            "the request {body:?} got another reply: {:?}",
            String::from_utf8_lossy(reply)
        ))),
    }
}

fn shell(script: &str, arguments: &[&std::ffi::OsStr]) -> Result<(), CommandError> {
    let mut command = Command::new("sh");
    command.args(["-c", script, "sh"]).args(arguments);
    let status = command.status().map_err(io_failed("sh"))?;
    match status.success() {
        true => Ok(()),
        false => Err(CommandError::failed(format!("sh -c '{script}' ended with {status}"))),
    }
}

/// The bytes that wait unread in the UDP sockets at `local`, as the kernel accounts them:
/// `rx_queue` in proc(5).
fn unread_bytes(local: &[SocketAddr]) -> Result<u64, CommandError> {
    let path = Path::new("/proc/net/udp");
    let text = fs::read_to_string(path).map_err(io_failed("/proc/net/udp"))?;
    let mut bytes = 0;
    for address in local {
        let queued = rx_queue_bytes(&text, address.port());
        let missing = || CommandError::failed(format!("{address} is not in {}", path.display()));
        bytes += queued.ok_or_else(missing)?;
    }
    Ok(bytes)
}

/// The `rx_queue` column of the socket at that port: behind the colon of the fifth column.
fn rx_queue_bytes(table: &str, port: u16) -> Option<u64> {
    let of_port = format!(":{port:04X}");
    table.lines().skip(1).find_map(|line| {
        let columns: Vec<_> = line.split_whitespace().collect();
        let (local, queues) = (columns.get(1)?, columns.get(4)?);
        let (_, rx_queue) = queues.split_once(':')?;
        let is_it = local.ends_with(&of_port);
        is_it.then(|| u64::from_str_radix(rx_queue, 16).ok())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_receive_queue_is_read_from_the_kernel_s_table() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt\n\
             100: 0100007F:1F90 0100007F:1FBD 01 00000000:00034000 00:00000000 00000000 0 0 1 2 0\n\
             101: 0100007F:1F91 00000000:0000 07 00000000:00000000 00:00000000 00000000 0 0 1 2 0\n";
        assert_eq!(rx_queue_bytes(table, 8080), Some(212_992));
        assert_eq!(rx_queue_bytes(table, 8081), Some(0));
        assert_eq!(rx_queue_bytes(table, 8082), None);
    }
}
