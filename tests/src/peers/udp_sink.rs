//! A UDP peer that keeps what it is sent, and may answer what nobody will read.

use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::port::bind_somewhere;
use super::tcp_server::lock;
use crate::deadline::{PATIENCE, poll_for};
use crate::udp_table::udp_sockets;

/// Receive buffer asked for: room for some 300,000 small datagrams, where the kernel grants it.
const RECEIVE_BUFFER_BYTES: usize = 256 * 1024 * 1024;

const DATAGRAM_BYTES_MAX: usize = 65_536;

const STOP_CHECK: Duration = Duration::from_millis(20);

/// A UDP server on 127.0.0.1 that keeps each datagram.
pub struct UdpSink {
    address: SocketAddr,
    state: Arc<State>,
    running: Option<Running>,
}

#[derive(Debug, Default)]
struct State {
    received: Mutex<Vec<Vec<u8>>>,
    answers: AtomicU64,
    replies_sent: AtomicU64,
}

struct Running {
    stopping: Arc<AtomicBool>,
    receiver: JoinHandle<()>,
}

impl UdpSink {
    /// A sink that answers nothing.
    pub fn start() -> UdpSink {
        UdpSink::answering(0)
    }

    /// A sink that answers each datagram `answers` times.
    pub fn answering(answers: u64) -> UdpSink {
        let (socket, port) = bind_somewhere(|port| UdpSocket::bind(("127.0.0.1", port)));
        let mut sink = UdpSink {
            address: SocketAddr::from(([127, 0, 0, 1], port)),
            state: Arc::default(),
            running: None,
        };
        sink.state.answers.store(answers, Ordering::SeqCst);
        sink.run(socket);
        sink
    }

    /// The URL of an upstream of type `udp`.
    pub fn url(&self) -> String {
        format!("udp://{}", self.address)
    }

    /// The URL of an upstream of type `udp-write-only`.
    pub fn url_write_only(&self) -> String {
        format!("udp-write-only://{}", self.address)
    }

    /// The port it receives on.
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// Waits for at least `count` datagrams and returns all there are, in the order of arrival.
    ///
    /// # Panics
    /// When [`PATIENCE`] runs out.
    pub fn wait_for(&self, count: usize) -> Vec<Vec<u8>> {
        let arrived = || self.received_count();
        if poll_for(PATIENCE, || (arrived() >= count).then_some(())).is_none() {
            let (came, lost) = (arrived(), self.kernel_drops());
            panic!("waited in vain for {count} datagrams: {came} came, the kernel dropped {lost}");
        }
        self.received()
    }

    /// The datagrams so far, in the order of arrival.
    pub fn received(&self) -> Vec<Vec<u8>> {
        lock(&self.state.received).clone()
    }

    /// How many datagrams arrived so far.
    pub fn received_count(&self) -> usize {
        lock(&self.state.received).len()
    }

    /// How many replies were sent so far.
    pub fn replies_sent(&self) -> u64 {
        self.state.replies_sent.load(Ordering::SeqCst)
    }

    /// Datagrams that the kernel dropped because this sink was too slow: without privilege its
    /// buffer is small. 0 while it is stopped.
    pub fn kernel_drops(&self) -> u64 {
        let sockets = udp_sockets().into_iter();
        sockets.filter(|socket| socket.local_port == self.port()).map(|socket| socket.drops).sum()
    }

    /// Closes the socket: what is sent from now on is refused by ICMP.
    pub fn stop(&mut self) {
        if let Some(running) = self.running.take() {
            running.stopping.store(true, Ordering::SeqCst);
            let _ = running.receiver.join();
        }
    }

    /// Receives again on the same port.
    pub fn restart(&mut self) {
        assert!(self.running.is_none(), "the peer still runs");
        let socket = UdpSocket::bind(self.address).expect("the peer's port is still free");
        self.run(socket);
    }

    fn run(&mut self, socket: UdpSocket) {
        enlarge_receive_buffer(&socket);
        socket.set_read_timeout(Some(STOP_CHECK)).expect("a timeout above zero can be set");
        let stopping = Arc::new(AtomicBool::new(false));
        let receiver = {
            let (stopping, state) = (Arc::clone(&stopping), Arc::clone(&self.state));
            thread::spawn(move || receive_all(&socket, &stopping, &state))
        };
        self.running = Some(Running { stopping, receiver });
    }
}

impl Drop for UdpSink {
    fn drop(&mut self) {
        self.stop();
    }
}

fn receive_all(socket: &UdpSocket, stopping: &AtomicBool, state: &State) {
    let mut datagram = vec![0; DATAGRAM_BYTES_MAX];
    while !stopping.load(Ordering::SeqCst) {
        let Ok((bytes, sender)) = socket.recv_from(&mut datagram) else {
            continue;
        };
        let datagram = &datagram[..bytes];
        lock(&state.received).push(datagram.to_vec());
        for _ in 0..state.answers.load(Ordering::SeqCst) {
            if socket.send_to(datagram, sender).is_ok() {
                state.replies_sent.fetch_add(1, Ordering::SeqCst);
            }
        }
    }
}

/// Beyond net.core.rmem_max where this process may, else up to it.
pub(super) fn enlarge_receive_buffer(socket: &UdpSocket) {
    use rustix::net::sockopt::{set_socket_recv_buffer_size, set_socket_recv_buffer_size_force};
    if set_socket_recv_buffer_size_force(socket, RECEIVE_BUFFER_BYTES).is_err() {
        set_socket_recv_buffer_size(socket, RECEIVE_BUFFER_BYTES)
            .expect("the kernel cuts the size down by itself");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_datagrams_and_counts_its_replies() {
        let sink = UdpSink::answering(3);
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.send_to(b"one", sink.address).unwrap();
        socket.send_to(b"", sink.address).unwrap();
        assert_eq!(sink.wait_for(2), [&b"one"[..], b""]);
        for _ in 0..6 {
            socket.recv(&mut [0; 8]).unwrap();
        }
        let counted = poll_for(PATIENCE, || (sink.replies_sent() == 6).then_some(()));
        assert!(counted.is_some(), "{}", sink.replies_sent());
    }

    #[test]
    fn a_stopped_sink_refuses_and_comes_back_on_its_port() {
        let mut sink = UdpSink::start();
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.connect(sink.address).unwrap();
        sink.stop();
        socket.send(b"lost").unwrap();
        let refused = poll_for(PATIENCE, || socket.send(b"lost").err()).unwrap();
        assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
        sink.restart();
        socket.send(b"kept").or_else(|_| socket.send(b"kept")).unwrap();
        assert_eq!(sink.wait_for(1), [b"kept"]);
    }
}
