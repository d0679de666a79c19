//! The backends of `bench requests`: an echo server of ours, or a Redis with the keys that are asked
//! for.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::thread;
use std::time::Instant;

use super::clock::CpuClock;
use super::echo::{Connections, Count, EchoSpec};
use super::helper::Helper;
use super::proxies::{Server, free_address, installed};
use super::sessions::{MESSAGE_BYTES, REDIS_KEYS, Talk, redis_key, redis_value};
use crate::cli::exit::CommandError;
use crate::config::{BENCH_POLL_INTERVAL, CHILD_BROKER_TIMEOUT};

/// A backend process.
pub struct Backend {
    pub address: SocketAddr,
    pub cpu: CpuClock,
    kind: Kind,
}

enum Kind {
    Echo(Helper),
    Redis { server: Server, connections_before: u64 },
}

impl Backend {
    /// Starts one; none: it is not installed.
    pub fn start(talk: Talk, home: &Path, name: &str) -> Result<Option<Self>, CommandError> {
        match talk {
            Talk::Echo => {
                let mut helper = Helper::start("bench-echo")?;
                helper.tell(&EchoSpec { bytes: MESSAGE_BYTES })?;
                let address = helper.hear()?;
                let cpu = helper.cpu_clock()?;
                Ok(Some(Backend { address, cpu, kind: Kind::Echo(helper) }))
            }
            Talk::Redis => {
                let Some(program) = installed("redis-server") else { return Ok(None) };
                let address = free_address()?;
                let port = address.port().to_string();
                let arguments = [
                    "--port",
                    &port,
                    "--bind",
                    "127.0.0.1",
                    "--save",
                    "",
                    "--appendonly",
                    "no",
                    "--maxclients",
                    "20000",
                    "--tcp-backlog",
                    "4096",
                ]
                .map(str::to_owned);
                let log = home.join(format!("redis-{name}.log"));
                let server = Server::start(&program, &arguments, &log)?;
                let cpu = server.cpu;
                let kind = Kind::Redis { server, connections_before: 0 };
                let backend = Backend { address, cpu, kind };
                backend.fill().map_err(failed)?;
                Ok(Some(backend))
            }
        }
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        match &self.kind {
            Kind::Echo(helper) => helper.id(),
            Kind::Redis { server, .. } => server.id(),
        }
    }

    /// The connections it had since the last time: the most at one time (an echo server), or all that
    /// were opened and those that had stayed open (a Redis, which does not tell the former).
    pub fn connections(&mut self) -> Result<u64, CommandError> {
        match &mut self.kind {
            Kind::Echo(helper) => {
                helper.tell(&Count {})?;
                let Connections { most } = helper.hear()?;
                Ok(most)
            }
            Kind::Redis { connections_before, .. } => {
                let (received, open) = counts(self.address).map_err(failed)?;
                // This question was one, too.
                let new = received.saturating_sub(*connections_before + 1);
                *connections_before = received;
                Ok(new.max(open.saturating_sub(1)))
            }
        }
    }

    /// Waits for a Redis, and writes its keys.
    fn fill(&self) -> std::io::Result<()> {
        let start = Instant::now();
        let stream = loop {
            match TcpStream::connect(self.address) {
                Ok(stream) => break stream,
                Err(error) if start.elapsed() > CHILD_BROKER_TIMEOUT => return Err(error),
                Err(_) => thread::sleep(BENCH_POLL_INTERVAL),
            }
        };
        let mut replies = BufReader::new(stream.try_clone()?);
        let (mut stream, mut line) = (stream, String::new());
        for number in 0..REDIS_KEYS {
            stream.write_all(
                format!("SET {} {}\r\n", redis_key(number), redis_value(number)).as_bytes(),
            )?;
            line.clear();
            replies.read_line(&mut line)?;
            if line != "+OK\r\n" {
                return Err(std::io::Error::other(format!("redis-server said {line:?}")));
            }
        }
        Ok(())
    }
}

/// Connections that a Redis has had in all, and has now.
fn counts(address: SocketAddr) -> std::io::Result<(u64, u64)> {
    let mut stream = TcpStream::connect(address)?;
    stream.write_all(b"INFO\r\nQUIT\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let figure = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|value| value.trim().parse().ok())
            .ok_or_else(|| std::io::Error::other(format!("INFO of redis-server has no {name}")))
    };
    Ok((figure("total_connections_received:")?, figure("connected_clients:")?))
}

fn failed(error: std::io::Error) -> CommandError {
    CommandError::failed(format!("redis-server: {error}"))
}
