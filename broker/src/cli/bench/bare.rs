//! `poolbroker bench-bare`: the least that can stand between clients and a backend, as a measure for
//! `bench requests`: one thread, one connection, messages of a fixed size, replies in order. It
//! checks nothing, bounds nothing and counts nothing.

use std::collections::VecDeque;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use clap::Args;
use rustix::buffer::spare_capacity;
use rustix::event::epoll;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, SocketFlags, accept_with, recv, send};

use super::sessions::MESSAGE_BYTES;
use crate::cli::exit::{CommandError, Exit};
use crate::config::{BACKLOG, BENCH_EVENTS, BENCH_READ_BYTES};

/// Serve `poolbroker bench requests` as a relay without checks.
#[derive(Debug, Args)]
pub struct BenchBare {
    /// Where to listen
    socket: PathBuf,

    /// Whom to ask
    backend: SocketAddr,
}

impl BenchBare {
    /// Relays until it is killed.
    pub fn run(&self) -> Result<Exit, CommandError> {
        let failed = |error| CommandError::failed(format!("the bare relay: {error}"));
        let mut relay = Relay::start(self).map_err(failed)?;
        loop {
            relay.turn().map_err(failed)?;
        }
    }
}

const LISTENER: u64 = u64::MAX;
const BACKEND: u64 = LISTENER - 1;

/// A client's place, and how many clients have had it before.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Owner {
    place: usize,
    generation: u64,
}

#[derive(Debug, Default)]
struct Place {
    client: Option<OwnedFd>,
    generation: u64,
}

struct Relay {
    epoll: OwnedFd,
    listener: UnixListener,
    backend: TcpStream,
    places: Vec<Place>,
    free: Vec<usize>,
    /// Whose replies are under way.
    asked: VecDeque<Owner>,
    /// Requests of this turn.
    out: Vec<u8>,
    /// Replies, the last of which may be incomplete.
    begun: Vec<u8>,
    events: Vec<epoll::Event>,
}

impl Relay {
    fn start(options: &BenchBare) -> io::Result<Self> {
        let backend = TcpStream::connect(options.backend)?;
        backend.set_nodelay(true)?;
        // That of the one before.
        let _ = std::fs::remove_file(&options.socket);
        let listener = UnixListener::bind(&options.socket)?;
        rustix::net::listen(&listener, BACKLOG)?;
        listener.set_nonblocking(true)?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let data = epoll::EventData::new_u64;
        epoll::add(&epoll, &listener, data(LISTENER), epoll::EventFlags::IN)?;
        epoll::add(&epoll, &backend, data(BACKEND), epoll::EventFlags::IN)?;
        Ok(Relay {
            epoll,
            listener,
            backend,
            places: Vec::new(),
            free: Vec::new(),
            asked: VecDeque::new(),
            out: Vec::with_capacity(BENCH_READ_BYTES),
            begun: Vec::with_capacity(BENCH_READ_BYTES),
            events: Vec::with_capacity(BENCH_EVENTS),
        })
    }

    fn turn(&mut self) -> io::Result<()> {
        match epoll::wait(&self.epoll, spare_capacity(&mut self.events), None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let mut events = std::mem::take(&mut self.events);
        for event in events.drain(..) {
            match event.data.u64() {
                LISTENER => self.accept()?,
                BACKEND => self.answer()?,
                place => self.read(usize::try_from(place).unwrap_or(usize::MAX), event.flags)?,
            }
        }
        if !self.out.is_empty() {
            send(&self.backend, &self.out, SendFlags::NOSIGNAL)?;
            self.out.clear();
        }
        self.events = events;
        Ok(())
    }

    fn accept(&mut self) -> io::Result<()> {
        while let Ok(client) =
            accept_with(&self.listener, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC)
        {
            let place = self.free.pop().unwrap_or_else(|| {
                self.places.push(Place::default());
                self.places.len() - 1
            });
            let data = epoll::EventData::new_u64(place as u64);
            let flags = epoll::EventFlags::IN | epoll::EventFlags::RDHUP | epoll::EventFlags::ET;
            epoll::add(&self.epoll, &client, data, flags)?;
            self.places[place].client = Some(client);
        }
        Ok(())
    }

    /// Takes the requests of a client. It writes whole ones, fewer than a read takes.
    fn read(&mut self, at: usize, flags: epoll::EventFlags) -> io::Result<()> {
        let Some(place) = self.places.get_mut(at) else { return Ok(()) };
        let Some(client) = &place.client else { return Ok(()) };
        loop {
            let before = self.out.len();
            self.out.reserve(BENCH_READ_BYTES);
            match recv(client, spare_capacity(&mut self.out), RecvFlags::DONTWAIT) {
                Ok((_, 0)) => break,
                Ok(_) => {
                    let owner = Owner { place: at, generation: place.generation };
                    let requests = (self.out.len() - before) / MESSAGE_BYTES;
                    self.asked.extend(std::iter::repeat_n(owner, requests));
                }
                Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
                Err(_) => break,
            }
            if !flags.intersects(epoll::EventFlags::RDHUP | epoll::EventFlags::HUP) {
                return Ok(());
            }
        }
        place.client = None;
        place.generation += 1;
        self.free.push(at);
        Ok(())
    }

    /// Gives replies to whoever asked.
    fn answer(&mut self) -> io::Result<()> {
        self.begun.reserve(BENCH_READ_BYTES);
        match recv(&self.backend, spare_capacity(&mut self.begun), RecvFlags::DONTWAIT) {
            Ok((_, 0)) => return Err(io::Error::other("the backend has ended")),
            Ok(_) => {}
            Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        let (replies, _) = self.begun.as_chunks::<MESSAGE_BYTES>();
        for reply in replies {
            let Some(owner) = self.asked.pop_front() else { continue };
            let place = &self.places[owner.place];
            if let Some(client) = &place.client
                && place.generation == owner.generation
            {
                // A client that is gone needs none.
                let _ = send(client, reply, SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
            }
        }
        let whole = replies.len() * MESSAGE_BYTES;
        self.begun.drain(..whole);
        Ok(())
    }
}
