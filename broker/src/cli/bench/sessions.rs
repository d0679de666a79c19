//! `poolbroker bench-sessions`: the clients of `bench requests`, all in one process and one loop, by
//! the same code whatever they talk to.
//!
//! A session writes a request, reads until its reply is complete, checks that it carries the token
//! of that request, and writes the next one. Over a socket it does that itself, with the frames of
//! the broker around it or without; over a ring by the client library, whose rings the loop looks at
//! in turn as a program would that is busy with them.

use std::collections::VecDeque;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread;

use clap::Args;
use poolbroker_client::{Client, Lease, Transport, Upstream};
use poolbroker_proto::frame::{Deframer, FrameHeader, Kind, hello};
use poolbroker_proto::message::{ClientMessage, encode};
use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send, sockopt::set_tcp_nodelay};
use serde::{Deserialize, Serialize};

use super::clock::{now_ns, own_cpu_ns};
use super::helper::{Orders, answer};
use super::sink::Histogram;
use crate::cli::exit::{CommandError, Exit};
use crate::config::{
    BENCH_EVENTS, BENCH_LEASE, BENCH_READ_BYTES, BENCH_SESSION_RING_BYTES, BENCH_TIMEOUT,
};

/// Serve `poolbroker bench requests` as its clients.
#[derive(Debug, Args)]
pub struct BenchSessions {}

/// Where requests go.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Goal {
    /// To a TCP port.
    Tcp(SocketAddr),
    /// To a proxy's Unix socket.
    Unix(PathBuf),
    /// By the client socket of the broker in this directory to this upstream.
    Frames { runtime_dir: PathBuf, upstream: String },
    /// Likewise, by rings.
    Ring { runtime_dir: PathBuf, upstream: String },
    /// On connections that were borrowed from the broker.
    Leased { runtime_dir: PathBuf, upstream: String },
}

/// What is said.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Talk {
    /// Messages of 64 bytes, which come back.
    Echo,
    /// `GET` of one of the keys of [`redis_key`], 64 bytes each way.
    Redis,
}

/// Bytes of each request and each reply.
pub const MESSAGE_BYTES: usize = 64;

/// How many keys a Redis has.
pub const REDIS_KEYS: u64 = 256;

/// The first order. Answered with `true` once everything is connected.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SessionsSpec {
    pub goal: Goal,
    pub talk: Talk,
    pub clients: usize,
    /// Requests of each without a reply.
    pub depth: usize,
    /// A session makes one request and closes.
    pub is_short: bool,
    /// Nothing is asked: a connection is opened, or borrowed, and closed, or given back.
    pub is_empty: bool,
}

/// Every other order: ask. Answered by [`Asked`].
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Ask {
    /// For so long; requests under way are finished.
    pub span_ns: u64,
    /// No more than that.
    pub requests_max: u64,
}

/// What asking took.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Asked {
    pub requests: u64,
    pub cpu_ns: u64,
    pub elapsed_ns: u64,
    pub p50_ns: u64,
    pub p99_ns: u64,
}

/// A key of Redis, whose request has [`MESSAGE_BYTES`].
pub fn redis_key(number: u64) -> String {
    format!("poolbroker-bench-requests-key-{number:014}")
}

/// What stands under it, whose reply has [`MESSAGE_BYTES`].
pub fn redis_value(number: u64) -> String {
    format!("value-{number:051}")
}

impl BenchSessions {
    /// Asks as ordered until the benchmark ends.
    pub fn run(&self) -> Result<Exit, CommandError> {
        let mut orders = Orders::from_standard_input()?;
        let Some(spec) = orders.next::<SessionsSpec>()? else { return Ok(Exit::Done) };
        let mut load = Load::open(spec).map_err(failed)?;
        answer(&true)?;
        while let Some(order) = orders.next::<Ask>()? {
            answer(&load.ask(&order).map_err(failed)?)?;
        }
        Ok(Exit::Done)
    }
}

/// A request without a reply.
#[derive(Debug, Clone, Copy)]
struct Pending {
    token: u64,
    sent_ns: u64,
}

struct Session {
    line: Line,
    pending: VecDeque<Pending>,
}

/// What a session talks by.
enum Line {
    /// A socket, with the beginning of a reply that is not complete.
    Socket {
        socket: OwnedFd,
        begun: Vec<u8>,
    },
    Ring {
        client: Client,
        upstream: Upstream,
    },
    /// A borrowed connection: given back at the end.
    Leased {
        socket: OwnedFd,
        begun: Vec<u8>,
        _lease: Lease,
    },
    /// It will connect anew.
    Closed,
}

struct Load {
    spec: SessionsSpec,
    epoll: OwnedFd,
    sessions: Vec<Session>,
    next_token: u64,
    out: Vec<u8>,
    block: Vec<u8>,
    latencies: Histogram,
    replies: u64,
    /// Of those: what the only client has waited for.
    rested: u64,
    lender: Option<Upstream>,
}

impl Load {
    fn open(spec: SessionsSpec) -> io::Result<Self> {
        let mut load = Load {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            sessions: Vec::new(),
            next_token: 0,
            out: Vec::new(),
            block: Vec::with_capacity(BENCH_READ_BYTES),
            latencies: Histogram::default(),
            replies: 0,
            rested: 0,
            lender: None,
            spec,
        };
        for at in 0..load.spec.clients {
            let line = match &load.spec.goal {
                Goal::Ring { runtime_dir, upstream } => {
                    let transport = Transport::Ring { bytes: BENCH_SESSION_RING_BYTES };
                    let client = Client::connect_in_with(runtime_dir, transport).map_err(other)?;
                    let upstream = client.upstream(upstream).map_err(other)?;
                    Line::Ring { client, upstream }
                }
                Goal::Tcp(_) | Goal::Unix(_) | Goal::Frames { .. } | Goal::Leased { .. } => {
                    Line::Closed
                }
            };
            load.sessions.push(Session { line, pending: VecDeque::new() });
            if !load.spec.is_short && !load.spec.is_empty {
                load.connect(at)?;
                load.flush(at)?;
            }
        }
        Ok(load)
    }

    /// Connects a session unless it is; what it has to say first stands in `out`.
    fn connect(&mut self, at: usize) -> io::Result<()> {
        if !matches!(self.sessions[at].line, Line::Closed) {
            return Ok(());
        }
        let socket: OwnedFd = match &self.spec.goal {
            Goal::Tcp(address) => {
                let stream = TcpStream::connect(address)?;
                set_tcp_nodelay(&stream, true)?;
                stream.into()
            }
            Goal::Unix(path) => connect_unix(path)?.into(),
            Goal::Frames { runtime_dir, upstream } => {
                let stream = connect_unix(&runtime_dir.join("broker.sock"))?;
                let open = ClientMessage::Open { name: upstream.clone() };
                let body = encode(&open).map_err(other)?;
                let frames = &mut self.out;
                FrameHeader::new(Kind::Hello).append(&hello(), frames).map_err(other)?;
                let header =
                    FrameHeader { correlation: u64::MAX, ..FrameHeader::new(Kind::Control) };
                header.append(&body, frames).map_err(other)?;
                stream.into()
            }
            Goal::Ring { .. } => return Ok(()),
            Goal::Leased { .. } => {
                let lease = self.lender()?.lease(BENCH_LEASE).map_err(other)?;
                let stream = lease.tcp().ok_or_else(|| io::Error::other("no TCP connection"))?;
                let socket = OwnedFd::from(stream.try_clone()?);
                let data = epoll::EventData::new_u64(at as u64);
                epoll::add(&self.epoll, &socket, data, epoll::EventFlags::IN)?;
                self.sessions[at].line = Line::Leased { socket, begun: Vec::new(), _lease: lease };
                return Ok(());
            }
        };
        let data = epoll::EventData::new_u64(at as u64);
        epoll::add(&self.epoll, &socket, data, epoll::EventFlags::IN)?;
        self.sessions[at].line = Line::Socket { socket, begun: Vec::new() };
        Ok(())
    }

    /// The upstream that lends connections.
    fn lender(&mut self) -> io::Result<Upstream> {
        if let Some(lender) = &self.lender {
            return Ok(lender.clone());
        }
        let Goal::Leased { runtime_dir, upstream } = &self.spec.goal else {
            return Err(io::Error::other("nothing is borrowed here"));
        };
        let client = Client::connect_in(runtime_dir).map_err(other)?;
        Ok(self.lender.insert(client.upstream(upstream).map_err(other)?).clone())
    }

    /// Opens and closes, or borrows and gives back, one connection after the other.
    fn open_and_close(&mut self, end_ns: u64) -> io::Result<()> {
        while now_ns() < end_ns {
            let begun_ns = now_ns();
            match &self.spec.goal {
                Goal::Tcp(address) => drop(TcpStream::connect(address)?),
                Goal::Unix(path) => drop(connect_unix(path)?),
                Goal::Frames { .. } | Goal::Ring { .. } => {}
                Goal::Leased { .. } => {
                    let lease = self.lender()?.lease(BENCH_LEASE).map_err(other)?;
                    lease.release().map_err(other)?;
                }
            }
            self.latencies.count(now_ns() - begun_ns);
            self.replies += 1;
        }
        Ok(())
    }

    fn ask(&mut self, order: &Ask) -> io::Result<Asked> {
        self.latencies.clear();
        self.replies = 0;
        let (start_ns, start_cpu_ns) = (now_ns(), own_cpu_ns());
        let end_ns = start_ns.saturating_add(order.span_ns);
        if self.spec.is_empty {
            self.open_and_close(end_ns)?;
            return Ok(self.asked(start_ns, start_cpu_ns));
        }
        let give_up_ns = end_ns.saturating_add(BENCH_TIMEOUT.as_nanos() as u64);
        let mut begun = 0;
        for at in 0..self.spec.clients {
            for _ in 0..self.spec.depth {
                if begun < order.requests_max {
                    begun += 1;
                    self.begin(at)?;
                }
            }
            self.flush(at)?;
        }
        let is_ring = matches!(self.spec.goal, Goal::Ring { .. });
        let mut events = Vec::with_capacity(BENCH_EVENTS);
        while self.replies < begun {
            let before = self.replies;
            if is_ring {
                self.rest()?;
                for at in 0..self.spec.clients {
                    let new = self.look(at)?;
                    self.follow(at, new, end_ns, order.requests_max, &mut begun)?;
                }
                if self.replies == before {
                    // Whoever looks all the time gives way to whoever has to answer.
                    thread::yield_now();
                }
            } else {
                events.clear();
                let patience = Timespec { tv_sec: 1, tv_nsec: 0 };
                match epoll::wait(&self.epoll, spare_capacity(&mut events), Some(&patience)) {
                    Ok(_) | Err(Errno::INTR) => {}
                    Err(error) => return Err(error.into()),
                }
                for event in &events {
                    let at = usize::try_from(event.data.u64()).unwrap_or(usize::MAX);
                    let new = self.read(at)?;
                    self.follow(at, new, end_ns, order.requests_max, &mut begun)?;
                }
            }
            if self.replies == before && now_ns() > give_up_ns {
                let left = begun - self.replies;
                return Err(io::Error::other(format!("{left} requests were never answered")));
            }
        }
        Ok(self.asked(start_ns, start_cpu_ns))
    }

    fn asked(&self, start_ns: u64, start_cpu_ns: u64) -> Asked {
        let (elapsed_ns, cpu_ns) = (now_ns() - start_ns, own_cpu_ns() - start_cpu_ns);
        let percentile = |percent| self.latencies.percentile(percent);
        let (p50_ns, p99_ns) = (percentile(50), percentile(99));
        Asked { requests: self.replies, cpu_ns, elapsed_ns, p50_ns, p99_ns }
    }

    /// A session that had `new` replies asks as many times again.
    fn follow(
        &mut self,
        at: usize,
        new: u64,
        end_ns: u64,
        requests_max: u64,
        begun: &mut u64,
    ) -> io::Result<()> {
        if new == 0 {
            return Ok(());
        }
        if self.spec.is_short {
            self.sessions[at].line = Line::Closed;
        }
        if now_ns() < end_ns {
            for _ in 0..new {
                if *begun < requests_max {
                    *begun += 1;
                    self.begin(at)?;
                }
            }
            self.flush(at)?;
        }
        Ok(())
    }

    /// Begins one request; over a socket it waits for [`Load::flush`].
    fn begin(&mut self, at: usize) -> io::Result<()> {
        let sent_ns = now_ns();
        self.connect(at)?;
        self.next_token += 1;
        let token = match self.spec.talk {
            Talk::Echo => self.next_token,
            Talk::Redis => self.next_token % REDIS_KEYS,
        };
        let body = request(self.spec.talk, token);
        let session = &mut self.sessions[at];
        match (&session.line, &self.spec.goal) {
            (Line::Ring { upstream, .. }, _) => {
                upstream.submit(&body, BENCH_TIMEOUT).map_err(other)?;
            }
            (_, Goal::Frames { .. }) => {
                let correlation = self.next_token;
                let header = FrameHeader { correlation, ..FrameHeader::new(Kind::Request) };
                header.append(&body, &mut self.out).map_err(other)?;
            }
            (_, _) => self.out.extend_from_slice(&body),
        }
        session.pending.push_back(Pending { token, sent_ns });
        Ok(())
    }

    fn flush(&mut self, at: usize) -> io::Result<()> {
        if let Line::Socket { socket, .. } | Line::Leased { socket, .. } = &self.sessions[at].line
            && !self.out.is_empty()
        {
            // What one session has under way is far less than a socket holds.
            let sent = send(socket, &self.out, SendFlags::NOSIGNAL)?;
            if sent < self.out.len() {
                return Err(io::Error::other("a socket took only a part of a request"));
            }
        }
        self.out.clear();
        Ok(())
    }

    /// One client alone sleeps until its reply comes, as a program does that has nothing else to do.
    fn rest(&mut self) -> io::Result<()> {
        let [session] = self.sessions.as_mut_slice() else { return Ok(()) };
        if let Line::Ring { client, .. } = &session.line
            && !session.pending.is_empty()
        {
            let reply = client.next_reply(BENCH_TIMEOUT).map_err(other)?;
            let body = reply.result.map_err(other)?;
            note(&mut session.pending, self.spec.talk, &body, &self.latencies)?;
            self.replies += 1;
            self.rested += 1;
        }
        Ok(())
    }

    /// Takes the replies in a ring; how many.
    fn look(&mut self, at: usize) -> io::Result<u64> {
        let mut new = std::mem::take(&mut self.rested);
        let before = new;
        let session = &mut self.sessions[at];
        let Line::Ring { client, .. } = &session.line else { return Ok(0) };
        while !session.pending.is_empty()
            && let Some(reply) = client.poll_reply().map_err(other)?
        {
            let body = reply.result.map_err(other)?;
            note(&mut session.pending, self.spec.talk, &body, &self.latencies)?;
            new += 1;
        }
        self.replies += new - before;
        Ok(new)
    }

    /// Reads what came by a socket; how many replies that completes.
    fn read(&mut self, at: usize) -> io::Result<u64> {
        let Some(session) = self.sessions.get_mut(at) else { return Ok(0) };
        let (Line::Socket { socket, begun } | Line::Leased { socket, begun, .. }) =
            &mut session.line
        else {
            return Ok(0);
        };
        self.block.clear();
        self.block.append(begun);
        match recv(&*socket, spare_capacity(&mut self.block), RecvFlags::DONTWAIT) {
            Ok((_, 0)) => return Err(io::Error::other("the other side closed a session")),
            Ok(_) => {}
            Err(Errno::AGAIN | Errno::INTR) => return Ok(0),
            Err(error) => return Err(error.into()),
        }
        let is_framed = matches!(self.spec.goal, Goal::Frames { .. });
        let (mut rest, mut new) = (self.block.as_slice(), 0);
        while !rest.is_empty() {
            let (body, bytes) = match is_framed {
                false if rest.len() >= MESSAGE_BYTES => (&rest[..MESSAGE_BYTES], MESSAGE_BYTES),
                false => break,
                true => match Deframer::new(MESSAGE_BYTES).next_frame(rest).map_err(other)? {
                    Some(frame) if frame.header.kind == Kind::Reply => {
                        (frame.body, frame.frame_bytes)
                    }
                    // Welcome, and Opened.
                    Some(frame) if frame.header.kind == Kind::Control => {
                        rest = &rest[frame.frame_bytes..];
                        continue;
                    }
                    Some(frame) => {
                        let text = String::from_utf8_lossy(frame.body);
                        return Err(io::Error::other(format!("a request failed: {text}")));
                    }
                    None => break,
                },
            };
            note(&mut session.pending, self.spec.talk, body, &self.latencies)?;
            new += 1;
            rest = &rest[bytes..];
        }
        begun.extend_from_slice(rest);
        self.replies += new;
        Ok(new)
    }
}

/// A reply came: it must be that of the oldest request.
fn note(
    pending: &mut VecDeque<Pending>,
    talk: Talk,
    body: &[u8],
    latencies: &Histogram,
) -> io::Result<()> {
    let Some(Pending { token, sent_ns }) = pending.pop_front() else {
        return Err(io::Error::other("a reply that was not asked for"));
    };
    let is_it = match talk {
        Talk::Echo => body == request(talk, token).as_slice(),
        Talk::Redis => body == format!("$57\r\n{}\r\n", redis_value(token)).as_bytes(),
    };
    if !is_it {
        let body = String::from_utf8_lossy(body);
        return Err(io::Error::other(format!("the reply to {token} is another's: {body:?}")));
    }
    latencies.count(now_ns().saturating_sub(sent_ns));
    Ok(())
}

/// The request with that token.
fn request(talk: Talk, token: u64) -> Vec<u8> {
    match talk {
        Talk::Echo => {
            let mut body = vec![b'.'; MESSAGE_BYTES];
            body[..8].copy_from_slice(&token.to_le_bytes());
            body[MESSAGE_BYTES - 8..].copy_from_slice(&token.to_be_bytes());
            body
        }
        Talk::Redis => {
            let key = redis_key(token);
            format!("*2\r\n$3\r\nGET\r\n${}\r\n{key}\r\n", key.len()).into_bytes()
        }
    }
}

/// A server that is busy refuses for a moment.
fn connect_unix(path: &std::path::Path) -> io::Result<UnixStream> {
    loop {
        match UnixStream::connect(path) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::yield_now(),
            connected => return connected,
        }
    }
}

fn other(error: impl std::fmt::Display) -> io::Error {
    io::Error::other(error.to_string())
}

fn failed(error: io::Error) -> CommandError {
    CommandError::failed(format!("the clients of the benchmark: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_and_replies_have_the_size_that_is_promised() {
        for token in [0, REDIS_KEYS - 1] {
            assert_eq!(request(Talk::Echo, token).len(), MESSAGE_BYTES);
            assert_eq!(request(Talk::Redis, token).len(), MESSAGE_BYTES);
            assert_eq!(format!("$57\r\n{}\r\n", redis_value(token)).len(), MESSAGE_BYTES);
        }
    }
}
