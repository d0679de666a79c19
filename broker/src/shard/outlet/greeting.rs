//! What a fresh TCP connection says before it is used: `on_connect`.
//!
//! Meanwhile the pool takes it for one that is still connecting, so `connect_timeout` covers it,
//! and a reply that is not as expected is a connect that failed.

use poolbroker_proto::framing::{Expect, Framing, ReplyCut};
use poolbroker_proto::reason::Reason;

use super::{Phase, Upstream};
use crate::buffer::ReceiveBuffer;
use crate::config::{CLIENT_TEXT_CHARS_MAX, Greeting};
use crate::ids::ConnId;
use crate::timers::Time;
use crate::upstream::tcp;

impl Upstream {
    /// A connection is up: it says what is to be said first, or is ready.
    pub(super) fn greet(&mut self, now: Time, conn: ConnId, step: usize) -> Result<(), Reason> {
        let Some(socket) = self.sockets.get_mut(conn) else { return Ok(()) };
        let Some(spell) = self.config.spells.get(step) else {
            socket.phase = Phase::Up;
            if self.pool.last_failure().is_some() {
                tracing::info!(upstream = self.config.name, "connected again");
            }
            self.pool.handle_connected(now, conn);
            return Ok(());
        };
        socket.phase = Phase::Greeting { step };
        match tcp::write(&socket.fd, &spell.bytes) {
            // A fresh socket takes more than that.
            Ok(bytes) if bytes == spell.bytes.len() => Ok(()),
            Ok(_) | Err(_) => Err(Reason::OnConnect),
        }
    }

    /// Checks the replies that came; why the connection is of no use, if so.
    pub(super) fn take_greetings(
        &mut self,
        now: Time,
        conn: ConnId,
        buffer: &mut ReceiveBuffer,
    ) -> Option<Reason> {
        while let Some(socket) = self.sockets.get_mut(conn)
            && let Phase::Greeting { step } = socket.phase
            && !buffer.is_empty()
        {
            match socket.exchange.next_reply(Some(Expect::Plain), buffer.unread()) {
                ReplyCut::Reply { body, consumed, .. } => {
                    let reply = buffer.unread().get(body).unwrap_or_default();
                    if !self.is_as_expected(step, reply) {
                        if self.pool.last_failure() != Some(Reason::OnConnect) {
                            let greeting = self.config.on_connect.get(step);
                            let expect = greeting.and_then(|greeting| greeting.expect.as_deref());
                            tracing::warn!(
                                upstream = self.config.name,
                                step = step + 1,
                                sent = greeting.map_or("", |it| it.command(self.config.url.framing)),
                                expect = %expect.unwrap_or(b"no error").escape_ascii(),
                                reply = self.printable(step, reply),
                                "a reply to on_connect is not as expected"
                            );
                        }
                        return Some(Reason::OnConnect);
                    }
                    buffer.consume(consumed);
                    if let Err(reason) = self.greet(now, conn, step + 1) {
                        return Some(reason);
                    }
                }
                ReplyCut::Push { consumed } => buffer.consume(consumed),
                ReplyCut::Incomplete => return None,
                ReplyCut::Broken(_) => return Some(Reason::OnConnect),
            }
        }
        None
    }

    /// A reply as it may be logged. Servers repeat what they do not understand, so of a reply to a
    /// secret there is only its length.
    fn printable(&self, step: usize, reply: &[u8]) -> String {
        if self.config.on_connect.get(step).is_some_and(Greeting::has_secret) {
            return format!("{} bytes, not shown beside a secret", reply.len());
        }
        let text = String::from_utf8_lossy(reply);
        text.trim_end().chars().take(CLIENT_TEXT_CHARS_MAX).collect()
    }

    fn is_as_expected(&self, step: usize, reply: &[u8]) -> bool {
        match self.config.spells.get(step).map(|spell| &spell.expect) {
            Some(Some(expect)) => reply.starts_with(expect),
            Some(None) => {
                let is_error = reply.starts_with(b"-") || reply.starts_with(b"!");
                self.config.url.framing != Framing::Resp || !is_error
            }
            None => false,
        }
    }
}
