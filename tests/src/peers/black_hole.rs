//! Upstreams that answer nothing at all: no handshake, no reply, no refusal.

use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::net::{AddressFamily, SocketType, bind, listen, socket};

use super::port::bind_somewhere;

/// Long enough that a handshake on loopback would be done, short enough to try several times.
const HANDSHAKE: Duration = Duration::from_millis(200);

const FILLERS_MAX: usize = 16;

/// A TCP address on which connecting neither succeeds nor fails: its accept queue is full, so the
/// kernel drops every SYN.
pub struct TcpBlackHole {
    address: SocketAddr,
    _listener: OwnedFd,
    _fillers: Vec<TcpStream>,
}

impl TcpBlackHole {
    /// Binds it and fills its queue.
    pub fn start() -> TcpBlackHole {
        let (listener, port) = bind_somewhere(|port| {
            let listener = socket(AddressFamily::INET, SocketType::STREAM, None)?;
            bind(&listener, &SocketAddr::from(([127, 0, 0, 1], port)))?;
            listen(&listener, 0)?;
            Ok(listener)
        });
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        let mut fillers = Vec::new();
        while let Ok(filler) = TcpStream::connect_timeout(&address, HANDSHAKE) {
            fillers.push(filler);
            assert!(fillers.len() < FILLERS_MAX, "the accept queue never fills");
        }
        TcpBlackHole { address, _listener: listener, _fillers: fillers }
    }

    /// The upstream's URL.
    pub fn url(&self) -> String {
        format!("tcp://{}", self.address)
    }
}

/// A UDP address that takes every datagram and answers none.
pub struct UdpBlackHole {
    address: SocketAddr,
    _socket: UdpSocket,
}

impl UdpBlackHole {
    /// Binds it.
    pub fn start() -> UdpBlackHole {
        let (socket, port) = bind_somewhere(|port| UdpSocket::bind(("127.0.0.1", port)));
        UdpBlackHole { address: SocketAddr::from(([127, 0, 0, 1], port)), _socket: socket }
    }

    /// The upstream's URL.
    pub fn url(&self) -> String {
        format!("udp://{}", self.address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::ErrorKind;

    #[test]
    fn connecting_into_the_black_hole_times_out() {
        let hole = TcpBlackHole::start();
        let error = TcpStream::connect_timeout(&hole.address, HANDSHAKE).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
    }
}
