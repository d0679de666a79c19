//! What the kernel says of its UDP sockets: /proc/net/udp.

use std::fs;

/// One UDP socket over IPv4.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UdpSocketEntry {
    /// Its own port.
    pub local_port: u16,
    /// The port it is connected to; 0 when it is not.
    pub remote_port: u16,
    /// Bytes in its receive queue, as `ss` shows them under Recv-Q.
    pub receive_queue_bytes: u64,
    /// Datagrams that the kernel dropped at this socket.
    pub drops: u64,
}

/// All UDP sockets of this network namespace.
///
/// # Panics
/// When the kernel's table cannot be read.
pub fn udp_sockets() -> Vec<UdpSocketEntry> {
    let table = fs::read_to_string("/proc/net/udp").expect("/proc/net/udp can be read");
    table.lines().skip(1).map(parse).collect()
}

/// The sockets that are connected to `port`.
pub fn udp_sockets_to(port: u16) -> Vec<UdpSocketEntry> {
    let all = udp_sockets().into_iter();
    all.filter(|socket| socket.remote_port == port).collect()
}

fn parse(line: &str) -> UdpSocketEntry {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let hex = |text: &str| u64::from_str_radix(text, 16).expect("a hexadecimal field");
    let after_colon = |field: usize| {
        let (_, text) = fields[field].split_once(':').expect("a pair of fields");
        hex(text)
    };
    let port = |field| u16::try_from(after_colon(field)).expect("a port has 16 bits");
    UdpSocketEntry {
        local_port: port(1),
        remote_port: port(2),
        receive_queue_bytes: after_colon(4),
        drops: fields[12].parse().expect("drops is a number"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::UdpSocket;

    #[test]
    fn an_unread_datagram_stands_in_the_receive_queue() {
        let receiver = UdpSocket::bind("127.0.0.1:0").unwrap();
        let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
        let port = receiver.local_addr().unwrap().port();
        sender.connect(("127.0.0.1", port)).unwrap();
        sender.send(b"x").unwrap();
        assert_eq!(udp_sockets_to(port).len(), 1);
        let entries = udp_sockets();
        let entry = entries.iter().find(|entry| entry.local_port == port);
        assert!(entry.unwrap().receive_queue_bytes > 0, "{entry:?}");
    }
}
