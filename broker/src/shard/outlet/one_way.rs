//! One-way messages: how they are packed, and sending them.

use std::time::Duration;

use poolbroker_proto::framing::{Framing, Verdict};
use poolbroker_proto::reason::Reason;
use rustix::io::Errno;

use super::{LaneIo, Pause, Upstream};
use crate::config::BATCHES_MAX;
use crate::ids::ConnId;
use crate::separator::Separator;
use crate::timers::Time;
use crate::upstream::udp::{self, Unsent};
use crate::upstream::{broken, tcp};

/// How a body becomes a one-way message in a send buffer.
#[derive(Debug)]
pub(super) enum Wire {
    /// With the marks of a framing; a datagram is its own message, and raw.
    Framed(Framing),
    /// With a separator behind it, so that it can share a datagram.
    Separated(Separator),
}

impl Wire {
    pub(super) fn overhead_bytes(&self) -> usize {
        match self {
            Wire::Framed(framing) => framing.overhead_bytes(),
            Wire::Separated(separator) => separator.bytes().len(),
        }
    }

    /// The bytes at the end of a datagram that are not sent.
    pub(super) fn gap(&self) -> usize {
        match self {
            Wire::Framed(_) => 0,
            Wire::Separated(separator) => separator.bytes().len(),
        }
    }

    /// Appends `body` as one message, or leaves `out` as it is and says why.
    pub(super) fn encode(
        &self,
        body: &[u8],
        is_line: bool,
        out: &mut Vec<u8>,
    ) -> Result<(), Reason> {
        match self {
            Wire::Framed(framing) if is_line => framing.encode_line(body, out),
            Wire::Framed(framing) => encode_framed(*framing, body, out),
            Wire::Separated(separator) if separator.is_in(body) => Err(Reason::Delimiter),
            Wire::Separated(separator) => {
                out.extend_from_slice(body);
                out.extend_from_slice(separator.bytes());
                Ok(())
            }
        }
    }

    /// The same for a body that `copy` appends. It is looked at only after that: the original lies
    /// in memory that others write to (M5).
    pub(super) fn encode_copied(
        &self,
        copy: impl FnOnce(&mut Vec<u8>),
        scratch: &mut Vec<u8>,
        out: &mut Vec<u8>,
    ) -> Result<(), Reason> {
        let before = out.len();
        match self {
            Wire::Framed(Framing::Raw) => copy(out),
            Wire::Framed(framing) => {
                scratch.clear();
                copy(scratch);
                return encode_framed(*framing, scratch, out);
            }
            Wire::Separated(separator) => {
                copy(out);
                if separator.is_in(&out[before..]) {
                    out.truncate(before);
                    return Err(Reason::Delimiter);
                }
                out.extend_from_slice(separator.bytes());
            }
        }
        Ok(())
    }
}

/// A message that ends its connection is refused: those behind it would be sent and never read.
fn encode_framed(framing: Framing, body: &[u8], out: &mut Vec<u8>) -> Result<(), Reason> {
    match framing {
        Framing::Http1 => match framing.classify(body) {
            Verdict::Last(_) => Err(Reason::Stateful),
            Verdict::Refused { reason, .. } => Err(reason),
            Verdict::One(_) | Verdict::None => framing.encode_classified(body, out),
        },
        framing => framing.encode(body, out),
    }
}

impl Upstream {
    pub(super) fn writable_one_way(&self, lane: usize) -> Option<ConnId> {
        let conn = self.pool.sending_conn(lane)?;
        self.sockets.get(conn)?.is_writable.then_some(conn)
    }

    pub(super) fn send_stream(&mut self, now: Time, lane: usize) {
        while let Some(conn) = self.writable_one_way(lane)
            && let Some(socket) = self.sockets.get_mut(conn)
        {
            let send_buffer = &mut self.lanes[lane].send_buffer;
            let written = self.pool.outbox(lane).front_written();
            let unsent = &send_buffer.unsent()[written..];
            match tcp::write(&socket.fd, unsent) {
                Ok(bytes) => {
                    socket.is_writable = bytes == unsent.len();
                    let done = self.pool.handle_written(now, conn, bytes);
                    send_buffer.consume(done);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => socket.is_writable = false,
                Err(error) => return self.lose(now, conn, broken(error)),
            }
        }
    }

    pub(super) fn send_datagrams(&mut self, now: Time, lane: usize, mut last_pause: Duration) {
        let gap = self.wire.gap();
        for _ in 0..BATCHES_MAX {
            let Some(conn) = self.writable_one_way(lane) else {
                return;
            };
            let Some(socket) = self.sockets.get_mut(conn) else {
                return;
            };
            let mut lens = [0; udp::BATCH_MAX];
            let count = self.pool.outbox(lane).next_datagrams(&mut lens);
            if count == 0 {
                return;
            }
            let LaneIo { send_buffer, is_retry, pause } = &mut self.lanes[lane];
            let result = self.udp.send(&socket.fd, send_buffer.unsent(), &lens[..count], gap);
            let done = match result {
                Ok(datagrams) => self.pool.handle_sent(now, conn, datagrams),
                Err(Unsent::WouldBlock) => {
                    socket.is_writable = false;
                    self.full.push(conn);
                    return;
                }
                Err(Unsent::Refused) if !*is_retry => {
                    *is_retry = true;
                    continue;
                }
                Err(Unsent::NoBuffers) if last_pause < self.nobuf_backoff.1 => {
                    let (shortest, longest) = self.nobuf_backoff;
                    let length = (last_pause * 2).clamp(shortest, longest);
                    *pause = Some(Pause { until: now + length, length });
                    return;
                }
                Err(unsent) => {
                    let reason = match unsent {
                        Unsent::NoBuffers => Reason::Enobufs,
                        Unsent::TooBig => Reason::TooBig,
                        Unsent::Refused => Reason::ConnectRefused,
                        Unsent::Failed(_) | Unsent::WouldBlock => Reason::SendError,
                    };
                    self.pool.handle_unsendable(now, conn, reason)
                }
            };
            *is_retry = false;
            last_pause = Duration::ZERO;
            send_buffer.consume(done);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn copied(wire: &Wire, body: &[u8]) -> (Result<(), Reason>, Vec<u8>) {
        let mut out = b"before".to_vec();
        let copy = |out: &mut Vec<u8>| out.extend_from_slice(body);
        let result = wire.encode_copied(copy, &mut b"scratch".to_vec(), &mut out);
        (result, out)
    }

    #[test]
    fn a_copy_is_checked_like_the_body_itself_and_taken_away_again_if_it_is_refused() {
        let wires = [
            Wire::Framed(Framing::Raw),
            Wire::Framed(Framing::Lines),
            Wire::Framed(Framing::Crlf),
            Wire::Separated(Separator::new(b"\n")),
            Wire::Separated(Separator::new(b"::")),
            Wire::Separated(Separator::new(b"")),
        ];
        for wire in &wires {
            for body in [&b"one"[..], b"a\nb", b"a::b", b"a:", b"\r"] {
                let mut out = b"before".to_vec();
                let result = wire.encode(body, false, &mut out);
                assert_eq!(copied(wire, body), (result, out.clone()), "{wire:?} {body:?}");
                match result {
                    Ok(()) => assert_eq!(out.len(), 6 + body.len() + wire.overhead_bytes()),
                    Err(reason) => {
                        assert_eq!((reason, &out[..]), (Reason::Delimiter, &b"before"[..]))
                    }
                }
            }
        }
        let http = Wire::Framed(Framing::Http1);
        for (body, result) in [
            (&b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..], Ok(())),
            (b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", Err(Reason::Stateful)),
            (b"GET / HTTP/1.1\r\nHost: x\r\nConnection: x-close-y\r\n\r\n", Err(Reason::Stateful)),
            (b"GET / HTTP/1.1\r\n\r\n", Err(Reason::Malformed)),
            (b"GET x HTTP/1.1\r\nHost: x\r\n\r\n", Err(Reason::Malformed)),
            (b"GET / HTTP/1.0\r\n\r\n", Err(Reason::Stateful)),
            (b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", Ok(())),
        ] {
            assert_eq!(http.encode(body, false, &mut Vec::new()), result);
            assert_eq!(copied(&http, body).0, result);
        }
        assert_eq!(copied(&wires[3], b"a\nFORGED").0, Err(Reason::Delimiter));
        assert_eq!(copied(&wires[4], b"a:").0, Err(Reason::Delimiter));
        assert_eq!(copied(&wires[0], b"a\nb").0, Ok(()));
    }
}
