//! A TCP peer that answers each message with the same message, in good manners or bad ones.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use super::marks::Marks;
use super::tcp_server::{Serve, TcpServer, is_stopped, lock};

/// The body of the second reply that [`Manners::ForgesSecondReply`] appends.
pub const FORGED: &[u8] = b"forged";

/// How a [`TcpEcho`] behaves. A new choice applies from the next message on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Manners {
    /// Answers each message at once.
    Prompt,
    /// Answers each message so much later.
    Slow(Duration),
    /// Answers every `every`th message so much later, the others at once.
    SlowEvery {
        /// 1 = each.
        every: u64,
        /// How much later.
        delay: Duration,
    },
    /// Closes the connection behind each reply, its end in the same segment.
    ClosesAfterReply,
    /// Sends a second reply nobody asked for behind each reply, in the same segment.
    ForgesSecondReply,
    /// Sends half a reply, then resets the connection.
    ResetsInReply,
    /// Sends the reply byte by byte with this pause between.
    Drips(Duration),
    /// Sends a reply that never ends.
    NeverEnds,
    /// Reads, and answers nothing.
    NeverReplies,
    /// Accepts, and reads nothing.
    NeverReads,
}

/// A TCP echo server on 127.0.0.1.
pub struct TcpEcho {
    server: TcpServer,
    marks: Marks,
    state: Arc<State>,
}

struct State {
    manners: Mutex<Manners>,
    messages: AtomicU64,
}

impl TcpEcho {
    /// An echo of lines with good manners.
    pub fn start() -> TcpEcho {
        TcpEcho::with(Marks::Lines, Manners::Prompt)
    }

    /// An echo of lines with these manners.
    pub fn behaving(manners: Manners) -> TcpEcho {
        TcpEcho::with(Marks::Lines, manners)
    }

    /// An echo with these marks and manners.
    pub fn with(marks: Marks, manners: Manners) -> TcpEcho {
        let state = Arc::new(State { manners: Mutex::new(manners), messages: AtomicU64::new(0) });
        let serving = Arc::clone(&state);
        let serve: Serve = Arc::new(move |_, connection| echo(marks, &serving, connection));
        TcpEcho { server: TcpServer::start(serve), marks, state }
    }

    /// The upstream's URL.
    pub fn url(&self) -> String {
        format!("tcp://{}{}", self.server.address(), self.marks.query())
    }

    /// The port it listens on.
    pub fn port(&self) -> u16 {
        self.server.address().port()
    }

    /// Behaves like this from the next message on.
    pub fn behave(&self, manners: Manners) {
        *lock(&self.state.manners) = manners;
    }

    /// Messages read so far.
    pub fn messages(&self) -> u64 {
        self.state.messages.load(Ordering::SeqCst)
    }

    /// Connections that are open now.
    pub fn connections_open(&self) -> usize {
        self.server.connections_open()
    }

    /// Connections that were ever accepted.
    pub fn connections_ever(&self) -> u64 {
        self.server.connections_ever()
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

fn echo(marks: Marks, state: &State, mut connection: TcpStream) {
    let _ = connection.set_nodelay(true);
    let (mut unread, mut chunk) = (Vec::new(), vec![0; 64 * 1024]);
    loop {
        while *lock(&state.manners) == Manners::NeverReads {
            if is_stopped(&connection) {
                return;
            }
            thread::sleep(Duration::from_millis(10));
        }
        match connection.read(&mut chunk) {
            Ok(0) | Err(_) => return,
            Ok(count) => unread.extend_from_slice(&chunk[..count]),
        }
        for message in marks.cut(&mut unread) {
            let number = state.messages.fetch_add(1, Ordering::SeqCst) + 1;
            let manners = *lock(&state.manners);
            let reply = marks.wrap(&message);
            if answer(manners, marks, number, &reply, &mut connection).is_none() {
                return;
            }
        }
    }
}

/// Answers one message; `None` when the connection is to be left.
fn answer(
    manners: Manners,
    marks: Marks,
    number: u64,
    reply: &[u8],
    connection: &mut TcpStream,
) -> Option<()> {
    let mut write = |bytes: &[u8]| connection.write_all(bytes).ok();
    match manners {
        Manners::Prompt => write(reply),
        Manners::Slow(delay) => {
            thread::sleep(delay);
            write(reply)
        }
        Manners::SlowEvery { every, delay } => {
            if number.is_multiple_of(every) {
                thread::sleep(delay);
            }
            write(reply)
        }
        Manners::ClosesAfterReply => {
            // MSG_MORE holds the reply back until the FIN goes with it.
            let _ = rustix::net::send(&*connection, reply, rustix::net::SendFlags::MORE);
            let _ = connection.shutdown(std::net::Shutdown::Both);
            None
        }
        Manners::ForgesSecondReply => write(&[reply, &marks.wrap(FORGED)].concat()),
        Manners::ResetsInReply => {
            write(&reply[..reply.len() / 2]);
            let _ = rustix::net::sockopt::set_socket_linger(&*connection, Some(Duration::ZERO));
            None
        }
        Manners::Drips(pause) => {
            for byte in reply {
                write(&[*byte])?;
                thread::sleep(pause);
            }
            Some(())
        }
        Manners::NeverEnds => {
            let chunk = [b'x'; 4096];
            while write(&chunk).is_some() {}
            None
        }
        Manners::NeverReplies | Manners::NeverReads => Some(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::ErrorKind;
    use std::net::TcpStream;

    fn connect(echo: &TcpEcho) -> TcpStream {
        TcpStream::connect(("127.0.0.1", echo.port())).unwrap()
    }

    fn exchange(echo: &TcpEcho) -> Vec<u8> {
        let mut connection = connect(echo);
        connection.write_all(b"hello\n").unwrap();
        connection.shutdown(std::net::Shutdown::Write).unwrap();
        let mut reply = Vec::new();
        connection.read_to_end(&mut reply).unwrap();
        reply
    }

    #[test]
    fn answers_with_the_same_line() {
        let echo = TcpEcho::start();
        assert_eq!(exchange(&echo), b"hello\n");
        assert_eq!((echo.messages(), echo.connections_ever()), (1, 1));
    }

    #[test]
    fn bad_manners_are_as_named() {
        let pause = Duration::from_millis(1);
        for (manners, expected) in [
            (Manners::Drips(pause), &b"hello\n"[..]),
            (Manners::Slow(pause), b"hello\n"),
            (Manners::ClosesAfterReply, b"hello\n"),
            (Manners::ForgesSecondReply, b"hello\nforged\n"),
            (Manners::NeverReplies, b""),
        ] {
            assert_eq!(exchange(&TcpEcho::behaving(manners)), expected, "{manners:?}");
        }
    }

    #[test]
    fn a_reset_in_the_reply_is_a_reset() {
        let echo = TcpEcho::behaving(Manners::ResetsInReply);
        let mut connection = connect(&echo);
        connection.write_all(b"hello\n").unwrap();
        let mut reply = Vec::new();
        let error = connection.read_to_end(&mut reply).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        assert!(reply.len() < b"hello\n".len(), "{reply:?}");
    }

    #[test]
    fn a_stopped_echo_refuses_and_comes_back_on_its_port() {
        let mut echo = TcpEcho::start();
        let mut open = connect(&echo);
        open.write_all(b"x\n").unwrap();
        open.read_exact(&mut [0; 2]).unwrap();
        echo.stop();
        assert_eq!(open.read(&mut [0; 1]).unwrap(), 0);
        assert!(TcpStream::connect(("127.0.0.1", echo.port())).is_err());
        echo.restart();
        assert_eq!(exchange(&echo), b"hello\n");
    }
}
