//! Ports for peers: below the ephemeral range.

use std::fs;
use std::io;
use std::net::{TcpListener, UdpSocket};

const ATTEMPTS_MAX: usize = 1000;

/// Binds something to a port of 127.0.0.1 that nobody uses; returns it with the port.
pub(super) fn bind_somewhere<T>(bind: impl Fn(u16) -> io::Result<T>) -> (T, u16) {
    let first_ephemeral = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range")
        .ok()
        .and_then(|range| range.split_whitespace().next()?.parse::<u16>().ok())
        .unwrap_or(32768);
    // A machine whose ephemeral range begins very low leaves no room below it.
    let ports = match first_ephemeral {
        0..12_000 => 61_000..u16::MAX,
        first => 10_000..first,
    };
    let bound = (0..ATTEMPTS_MAX).find_map(|_| {
        let port = fastrand::u16(ports.clone());
        bind(port).ok().map(|bound| (bound, port))
    });
    bound.expect("one of the ports below the ephemeral range is free")
}

/// A port of 127.0.0.1 on which nobody listens, neither by TCP nor by UDP.
pub fn unused_port() -> u16 {
    let bind = |port| {
        let address = ("127.0.0.1", port);
        TcpListener::bind(address).and_then(|_| UdpSocket::bind(address))
    };
    let (_, port) = bind_somewhere(bind);
    port
}
