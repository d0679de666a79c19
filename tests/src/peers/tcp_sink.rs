//! A TCP peer that keeps what it is sent.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use super::marks::Marks;
use super::tcp_server::{Serve, TcpServer, is_stopped, lock};
use crate::deadline::{PATIENCE, poll_for};

/// A TCP server on 127.0.0.1 that keeps each message with the number of its connection.
pub struct TcpSink {
    server: TcpServer,
    marks: Marks,
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    records: Mutex<Vec<(u64, Vec<u8>)>>,
    unsolicited: Mutex<Vec<u8>>,
    paused: AtomicBool,
    resets: AtomicU64,
}

impl TcpSink {
    /// A sink of lines.
    pub fn start() -> TcpSink {
        TcpSink::with(Marks::Lines)
    }

    /// A sink of messages with these marks.
    pub fn with(marks: Marks) -> TcpSink {
        let state = Arc::new(State::default());
        let serving = Arc::clone(&state);
        let serve: Serve = Arc::new(move |number, stream| keep(marks, &serving, number, stream));
        TcpSink { server: TcpServer::start(serve), marks, state }
    }

    /// The upstream's URL.
    pub fn url(&self) -> String {
        format!("tcp://{}{}", self.server.address(), self.marks.query())
    }

    /// The port it listens on.
    pub fn port(&self) -> u16 {
        self.server.address().port()
    }

    /// Sends these bytes behind every record from now on, though nobody asks for them.
    pub fn answer_each(&self, bytes: &[u8]) {
        *lock(&self.state.unsolicited) = bytes.to_vec();
    }

    /// Reads nothing, so that the sender's window closes, until [`TcpSink::resume`].
    pub fn pause(&self) {
        self.state.paused.store(true, Ordering::SeqCst);
    }

    /// Reads again.
    pub fn resume(&self) {
        self.state.paused.store(false, Ordering::SeqCst);
    }

    /// Waits for at least `count` records and returns all there are, in the order of arrival.
    ///
    /// # Panics
    /// When [`PATIENCE`] runs out.
    pub fn wait_for(&self, count: usize) -> Vec<Vec<u8>> {
        let arrived = || lock(&self.state.records).len();
        if poll_for(PATIENCE, || (arrived() >= count).then_some(())).is_none() {
            panic!("waited in vain for {count} records, {} came", arrived());
        }
        self.received()
    }

    /// The records so far, in the order of arrival.
    pub fn received(&self) -> Vec<Vec<u8>> {
        let records = lock(&self.state.records);
        records.iter().map(|(_, record)| record.clone()).collect()
    }

    /// The records so far, each with the number of its connection (from 0).
    pub fn received_by_connection(&self) -> Vec<(u64, Vec<u8>)> {
        lock(&self.state.records).clone()
    }

    /// Connections that are open now.
    pub fn connections_open(&self) -> usize {
        self.server.connections_open()
    }

    /// Connections that were ever accepted.
    pub fn connections_ever(&self) -> u64 {
        self.server.connections_ever()
    }

    /// Connections that ended by a reset instead of a FIN.
    pub fn connections_reset(&self) -> u64 {
        self.state.resets.load(Ordering::SeqCst)
    }

    /// Stops listening and closes every connection.
    pub fn stop(&mut self) {
        self.server.stop();
    }

    /// Listens again on the same port.
    pub fn restart(&mut self) {
        self.server.restart();
    }
}

fn keep(marks: Marks, state: &State, number: u64, mut connection: TcpStream) {
    let (mut unread, mut chunk) = (Vec::new(), vec![0; 64 * 1024]);
    loop {
        while state.paused.load(Ordering::SeqCst) {
            if is_stopped(&connection) {
                return;
            }
            thread::sleep(Duration::from_millis(1));
        }
        match connection.read(&mut chunk) {
            Ok(0) => return,
            Err(_) => {
                state.resets.fetch_add(1, Ordering::SeqCst);
                return;
            }
            Ok(count) => unread.extend_from_slice(&chunk[..count]),
        }
        let messages = marks.cut(&mut unread);
        let answers = lock(&state.unsolicited).repeat(messages.len());
        let records = messages.into_iter().map(|message| (number, message));
        lock(&state.records).extend(records);
        if connection.write_all(&answers).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_records_in_order_and_answers_unasked() {
        let sink = TcpSink::start();
        sink.answer_each(b"?");
        let mut connection = TcpStream::connect(("127.0.0.1", sink.port())).unwrap();
        connection.write_all(b"one\ntwo\nunfinished").unwrap();
        assert_eq!(sink.wait_for(2), [b"one", b"two"]);
        connection.read_exact(&mut [0; 2]).unwrap();
        assert_eq!(sink.received_by_connection()[1], (0, b"two".to_vec()));
        drop(connection);
        let closed = || (sink.connections_open() == 0).then_some(());
        assert!(poll_for(PATIENCE, closed).is_some());
    }
}
