//! The peers of the demonstration: one TCP and several UDP services in this process that answer
//! everything with what they were sent, and count it.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread;

/// A service that answers everything.
#[derive(Debug, Clone)]
pub struct Peer {
    address: SocketAddr,
    answered: Arc<AtomicU64>,
}

impl Peer {
    /// Answers each line of each connection.
    pub fn tcp() -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let peer = Peer::at(listener.local_addr()?);
        let answered = Arc::clone(&peer.answered);
        spawn(move || {
            for stream in listener.incoming() {
                let (stream, answered) = (stream?, Arc::clone(&answered));
                spawn(move || answer_stream(&stream, &answered))?;
            }
            Ok(())
        })?;
        Ok(peer)
    }

    /// Answers each datagram.
    pub fn udp() -> io::Result<Self> {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        let peer = Peer::at(socket.local_addr()?);
        let answered = Arc::clone(&peer.answered);
        spawn(move || answer_datagrams(&socket, &answered))?;
        Ok(peer)
    }

    fn at(address: SocketAddr) -> Self {
        Peer { address, answered: Arc::default() }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// How many messages it received and answered.
    pub fn answered(&self) -> u64 {
        self.answered.load(Relaxed)
    }
}

fn spawn(body: impl FnOnce() -> io::Result<()> + Send + 'static) -> io::Result<()> {
    // A peer whose socket fails stops answering, which the demonstration notices by its counts.
    let thread = thread::Builder::new().name("peer".into());
    thread.spawn(move || drop(body())).map(drop)
}

fn answer_stream(stream: &TcpStream, answered: &AtomicU64) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream);
    let mut writer = stream;
    let mut line = Vec::new();
    while reader.read_until(b'\n', &mut line)? > 0 {
        writer.write_all(&line)?;
        answered.fetch_add(1, Relaxed);
        line.clear();
    }
    Ok(())
}

fn answer_datagrams(socket: &UdpSocket, answered: &AtomicU64) -> io::Result<()> {
    let mut datagram = [0; 2048];
    loop {
        let (bytes, from) = socket.recv_from(&mut datagram)?;
        // The client may be gone: its answer is then nobody's.
        let _ = socket.send_to(&datagram[..bytes], from);
        answered.fetch_add(1, Relaxed);
    }
}
