//! A UDP peer that answers each datagram with the same datagram, perhaps late.

use std::collections::VecDeque;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::port::bind_somewhere;
use super::tcp_server::lock;
use super::udp_sink::enlarge_receive_buffer;

const STOP_CHECK: Duration = Duration::from_millis(20);

/// A UDP echo server on 127.0.0.1.
pub struct UdpEcho {
    address: SocketAddr,
    state: Arc<State>,
    receiver: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct State {
    stopping: AtomicBool,
    lateness: Mutex<Lateness>,
    received: AtomicU64,
    replied: AtomicU64,
}

/// Which replies are late, and how much.
#[derive(Debug, Clone, Copy, Default)]
struct Lateness {
    every: u64,
    delay: Duration,
}

struct Due {
    at: Instant,
    to: SocketAddr,
    datagram: Vec<u8>,
}

impl UdpEcho {
    /// An echo that answers at once.
    pub fn start() -> UdpEcho {
        UdpEcho::late_every(0, Duration::ZERO)
    }

    /// An echo that answers every `every`th datagram so much later; `every` = 0: none.
    pub fn late_every(every: u64, delay: Duration) -> UdpEcho {
        let (socket, port) = bind_somewhere(|port| UdpSocket::bind(("127.0.0.1", port)));
        enlarge_receive_buffer(&socket);
        let state = Arc::new(State::default());
        *lock(&state.lateness) = Lateness { every, delay };
        let receiving = Arc::clone(&state);
        UdpEcho {
            address: SocketAddr::from(([127, 0, 0, 1], port)),
            state,
            receiver: Some(thread::spawn(move || echo(&socket, &receiving))),
        }
    }

    /// Answers like this from now on; see [`UdpEcho::late_every`].
    pub fn behave(&self, every: u64, delay: Duration) {
        *lock(&self.state.lateness) = Lateness { every, delay };
    }

    /// The upstream's URL.
    pub fn url(&self) -> String {
        format!("udp://{}", self.address)
    }

    /// The port it receives on.
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// Datagrams received so far.
    pub fn received(&self) -> u64 {
        self.state.received.load(Ordering::SeqCst)
    }

    /// Replies sent so far.
    pub fn replied(&self) -> u64 {
        self.state.replied.load(Ordering::SeqCst)
    }
}

impl Drop for UdpEcho {
    fn drop(&mut self) {
        self.state.stopping.store(true, Ordering::SeqCst);
        if let Some(receiver) = self.receiver.take() {
            let _ = receiver.join();
        }
    }
}

fn echo(socket: &UdpSocket, state: &State) {
    let mut datagram = vec![0; 65_536];
    let mut due: VecDeque<Due> = VecDeque::new();
    while !state.stopping.load(Ordering::SeqCst) {
        let now = Instant::now();
        while due.front().is_some_and(|reply| reply.at <= now) {
            if let Some(reply) = due.pop_front() {
                answer(socket, state, &reply.datagram, reply.to);
            }
        }
        let next = due.front().map_or(STOP_CHECK, |reply| (reply.at - now).min(STOP_CHECK));
        socket
            .set_read_timeout(Some(next.max(Duration::from_micros(10))))
            .expect("a timeout above zero can be set");
        let Ok((bytes, sender)) = socket.recv_from(&mut datagram) else {
            continue;
        };
        let number = state.received.fetch_add(1, Ordering::SeqCst) + 1;
        let lateness = *lock(&state.lateness);
        if lateness.every > 0 && number.is_multiple_of(lateness.every) {
            due.push_back(Due {
                at: Instant::now() + lateness.delay,
                to: sender,
                datagram: datagram[..bytes].to_vec(),
            });
        } else {
            answer(socket, state, &datagram[..bytes], sender);
        }
    }
}

fn answer(socket: &UdpSocket, state: &State, datagram: &[u8], to: SocketAddr) {
    if socket.send_to(datagram, to).is_ok() {
        state.replied.fetch_add(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::deadline::{PATIENCE, poll_for};

    #[test]
    fn a_late_reply_comes_behind_the_next_prompt_one() {
        let echo = UdpEcho::late_every(2, Duration::from_millis(50));
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let mut replies = Vec::new();
        for datagram in [b"1", b"2", b"3"] {
            socket.send_to(datagram, echo.address).unwrap();
        }
        for _ in 0..3 {
            let mut reply = [0; 1];
            socket.recv(&mut reply).unwrap();
            replies.push(reply);
        }
        assert_eq!(replies, [*b"1", *b"3", *b"2"]);
        let counted = poll_for(PATIENCE, || (echo.replied() == 3).then_some(()));
        assert!(counted.is_some() && echo.received() == 3);
    }
}
