//! `poolbroker bench-echo`: the backend of `bench requests`: sends every message of a fixed size back,
//! all that came with one read by one write. It counts connections, and tells when asked.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread;

use clap::Args;
use rustix::buffer::spare_capacity;
use rustix::event::epoll;
use rustix::io::Errno;
use rustix::net::{
    RecvFlags, SendFlags, SocketFlags, accept_with, recv, send, sockopt::set_tcp_nodelay,
};
use serde::{Deserialize, Serialize};

use super::helper::{Orders, answer};
use crate::cli::exit::{CommandError, Exit};
use crate::config::{BACKLOG, BENCH_EVENTS, BENCH_READ_BYTES};

/// Serve `poolbroker bench requests` as its backend.
#[derive(Debug, Args)]
pub struct BenchEcho {}

/// The first order; answered with the address.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct EchoSpec {
    /// Of each message.
    pub bytes: usize,
}

/// Every other order: answer with [`Connections`].
#[derive(Debug, Serialize, Deserialize)]
pub struct Count {}

/// The connections since the last count.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Connections {
    /// The most at one time.
    pub most: u64,
}

#[derive(Debug, Default)]
struct Tally {
    open: AtomicU64,
    most: AtomicU64,
}

impl BenchEcho {
    /// Echoes until the benchmark ends.
    pub fn run(&self) -> Result<Exit, CommandError> {
        let mut orders = Orders::from_standard_input()?;
        let Some(spec) = orders.next::<EchoSpec>()? else { return Ok(Exit::Done) };
        let (listener, address) = listen().map_err(failed)?;
        let tally = Arc::new(Tally::default());
        let theirs = Arc::clone(&tally);
        thread::spawn(move || serve(&listener, spec.bytes, &theirs));
        answer(&address)?;
        while let Some(Count {}) = orders.next()? {
            // ORDER: relaxed; counters that tell of nothing but themselves.
            answer(&Connections { most: tally.most.load(Relaxed) })?;
            // ORDER: relaxed; as above.
            tally.most.store(tally.open.load(Relaxed), Relaxed);
        }
        Ok(Exit::Done)
    }
}

fn listen() -> io::Result<(TcpListener, SocketAddr)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    rustix::net::listen(&listener, BACKLOG)?;
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?;
    Ok((listener, address))
}

/// A connection, and what came of a message that is not complete.
struct Peer {
    socket: OwnedFd,
    begun: Vec<u8>,
}

fn serve(listener: &TcpListener, bytes: usize, tally: &Tally) {
    // Without it the benchmark hears no answer, and says so.
    if let Err(error) = echo(listener, bytes, tally) {
        eprintln!("the echo server: {error}");
    }
}

fn echo(listener: &TcpListener, bytes: usize, tally: &Tally) -> io::Result<()> {
    const LISTENER: u64 = u64::MAX;
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let data = epoll::EventData::new_u64;
    epoll::add(&epoll, listener, data(LISTENER), epoll::EventFlags::IN)?;
    let mut peers: Vec<Option<Peer>> = Vec::new();
    let mut free: Vec<usize> = Vec::new();
    let mut block = Vec::with_capacity(BENCH_READ_BYTES);
    let mut events = Vec::with_capacity(BENCH_EVENTS);
    loop {
        events.clear();
        match epoll::wait(&epoll, spare_capacity(&mut events), None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        for event in &events {
            if event.data.u64() == LISTENER {
                while let Ok(socket) =
                    accept_with(listener, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC)
                {
                    set_tcp_nodelay(&socket, true)?;
                    let at = free.pop().unwrap_or_else(|| {
                        peers.push(None);
                        peers.len() - 1
                    });
                    epoll::add(&epoll, &socket, data(at as u64), epoll::EventFlags::IN)?;
                    peers[at] = Some(Peer { socket, begun: Vec::new() });
                    // ORDER: relaxed; counters that tell of nothing but themselves.
                    let open = tally.open.fetch_add(1, Relaxed) + 1;
                    // ORDER: relaxed; as above.
                    tally.most.fetch_max(open, Relaxed);
                }
                continue;
            }
            let at = usize::try_from(event.data.u64()).unwrap_or(usize::MAX);
            let Some(Some(peer)) = peers.get_mut(at) else { continue };
            if !peer.echo(bytes, &mut block) {
                peers[at] = None;
                free.push(at);
                // ORDER: relaxed; as above.
                tally.open.fetch_sub(1, Relaxed);
            }
        }
    }
}

impl Peer {
    /// Sends back what has come; whether it goes on.
    fn echo(&mut self, bytes: usize, block: &mut Vec<u8>) -> bool {
        block.clear();
        block.append(&mut self.begun);
        match recv(self.socket.as_fd(), spare_capacity(block), RecvFlags::DONTWAIT) {
            Ok((_, 0)) => return false,
            Ok(_) => {}
            Err(Errno::AGAIN | Errno::INTR) => return true,
            Err(_) => return false,
        }
        let whole = block.len() - block.len() % bytes;
        self.begun.extend_from_slice(&block[whole..]);
        // Its clients never leave more unread than a socket holds.
        whole == 0 || send(&self.socket, &block[..whole], SendFlags::NOSIGNAL) == Ok(whole)
    }
}

fn failed(error: io::Error) -> CommandError {
    CommandError::failed(format!("the echo server: {error}"))
}
