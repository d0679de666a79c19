//! TCP sockets: connecting without blocking, the options that bound what can go wrong, and the
//! check before reuse. See tcp(7) and E14, E15, E30, E60.

use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, Shutdown, SocketFlags, SocketType, connect, recv, send,
    shutdown, socket_with, sockopt,
};

use poolbroker_proto::reason::Reason;

use crate::config::UpstreamLimits;

/// Starts a connect; it is decided when the socket becomes writable ([`connect_result`]).
pub fn start_connect(remote: SocketAddr, limits: &UpstreamLimits) -> Result<OwnedFd, Errno> {
    let family = if remote.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(family, SocketType::STREAM, flags, None)?;
    sockopt::set_tcp_nodelay(&socket, true)?;
    sockopt::set_socket_send_buffer_size(&socket, limits.send_buffer_bytes)?;
    sockopt::set_socket_keepalive(&socket, true)?;
    sockopt::set_tcp_keepidle(&socket, limits.keepalive_idle)?;
    sockopt::set_tcp_keepintvl(&socket, limits.keepalive_interval)?;
    sockopt::set_tcp_keepcnt(&socket, limits.keepalive_probes)?;
    let user_timeout_ms = u32::try_from(limits.tcp_user_timeout.as_millis()).unwrap_or(u32::MAX);
    sockopt::set_tcp_user_timeout(&socket, user_timeout_ms)?;
    match connect(&socket, &remote) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(socket),
        Err(error) => Err(error),
    }
}

/// How a connect ended, once the socket is writable.
pub fn connect_result(socket: impl AsFd) -> Result<(), Errno> {
    sockopt::socket_error(socket)?
}

/// Whether an idle connection can carry another request: the peer has neither closed it nor sent
/// anything unasked (E30: the first write after a peer's close would succeed and be lost).
pub fn check_reusable(socket: impl AsFd) -> Result<(), Reason> {
    let mut byte = [0u8; 1];
    match recv(socket, &mut byte, RecvFlags::PEEK | RecvFlags::DONTWAIT) {
        Err(Errno::AGAIN | Errno::INTR) => Ok(()),
        Ok((_, 0)) => Err(Reason::PeerClosed),
        Ok(_) => Err(Reason::Unsolicited),
        Err(error) => Err(super::broken(error)),
    }
}

/// Writes what the socket takes now.
pub fn write(socket: impl AsFd, bytes: &[u8]) -> Result<usize, Errno> {
    send(socket, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)
}

/// Reads what has arrived; 0 at the end.
pub fn read(socket: impl AsFd, room: &mut [u8]) -> Result<usize, Errno> {
    recv(socket, room, RecvFlags::DONTWAIT).map(|(_, bytes)| bytes)
}

/// Makes a socket useless to everybody who has a copy of its descriptor.
pub fn revoke(socket: impl AsFd) {
    // An error means that it is so already.
    let _ = shutdown(socket, Shutdown::Both);
}

/// Sends FIN behind what was written; reading goes on.
pub fn finish_writing(socket: impl AsFd) -> Result<(), Errno> {
    shutdown(socket, Shutdown::Write)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::net::TcpListener;

    #[test]
    fn an_idle_connection_is_refused_once_the_peer_spoke_or_closed() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let remote = listener.local_addr().unwrap();
        let limits = UpstreamLimits::of_protocol(poolbroker_proto::address::Protocol::Tcp);
        let settle = |socket: &OwnedFd, expected: Result<(), Reason>| {
            while check_reusable(socket) != expected {
                std::thread::yield_now();
            }
        };
        let socket = start_connect(remote, &limits).unwrap();
        let (mut peer, _) = listener.accept().unwrap();
        settle(&socket, Ok(()));
        assert_eq!(connect_result(&socket), Ok(()));
        peer.write_all(b"unasked").unwrap();
        settle(&socket, Err(Reason::Unsolicited));

        let socket = start_connect(remote, &limits).unwrap();
        let (peer, _) = listener.accept().unwrap();
        drop(peer);
        settle(&socket, Err(Reason::PeerClosed));
    }
}
