//! How a shard ends: everything handed over before is sent, in order, then the connections close.
//!
//! ```text
//!   Running --SIGTERM--> Draining --all found empty twice--> Closing --connections gone--> (ended)
//!                           | drain_timeout                     ^
//!                           +--- the rest is dropped, counted --+
//! ```
//!
//! Clients are read to their ends: the socket takes nothing more from them at once, so that the
//! end comes and nothing is lost in between. FIFOs and pipes have no such end; they are done when
//! a pass over all of them, after everything else is settled, finds them empty.

use poolbroker_proto::reason::Reason;
use rustix::io::ioctl_fionread;

use super::intake;
use super::outlet::Upstream;
use super::sources::Source;
use super::{CLOSING_GRACE, Ending, Phase, Shard};
use crate::timers::Time;
use crate::transport::Io;

impl Shard {
    pub(super) fn begin_drain(&mut self) {
        if self.phase != Phase::Running {
            return;
        }
        let deadline = self.now + self.limits.drain_timeout;
        self.phase = Phase::Draining { deadline, is_last_pass: false };
        for upstream in self.upstreams.iter_mut() {
            upstream.pool.hurry();
            upstream.pool.stop_lending();
        }
        if let Some(listener) = self.listener.fd.take() {
            self.poller.unwatch(&listener, self.listener.token);
        }
        let ids: Vec<_> = self.sources.table.keys().collect();
        for id in ids {
            let source = &mut self.sources.table[id];
            // A client's next write fails; what it wrote before is read to its end.
            if let Some(stream) = source.io.stream() {
                stream.stop_reading();
            }
            // What comes after this stays in the ring, for the next broker. One that is corrupt
            // shows it when it is served.
            if let Some(ring) = &mut source.ring {
                let _ = ring.end_here();
            }
            source.is_readable = true;
            self.sources.make_ready(id);
        }
    }

    /// Ends at once: what is not sent now is dropped and counted, no connection is waited for.
    pub(super) fn stop(&mut self) {
        self.begin_drain();
        self.abandon("given up at the second signal");
        self.begin_closing(self.now);
    }

    /// Takes the next step of shutting down, if it is time.
    pub(super) fn advance_drain(&mut self) -> Option<Ending> {
        match self.phase {
            Phase::Running => None,
            Phase::Draining { deadline, .. } if self.now >= deadline => {
                self.abandon("given up after drain_timeout");
                self.begin_closing(self.now + CLOSING_GRACE);
                self.advance_drain()
            }
            Phase::Draining { deadline, is_last_pass } => {
                let is_quiet = self.sources.ready_count() == 0
                    && self.sources.starved_until().is_none()
                    && self.upstreams.iter().all(|upstream| upstream.pool.is_settled())
                    && self.sources.table.values().all(is_at_its_end);
                if !is_quiet {
                    self.phase = Phase::Draining { deadline, is_last_pass: false };
                } else if is_last_pass && !self.holds_unread_bytes() {
                    self.begin_closing(deadline);
                    return self.advance_drain();
                } else {
                    // FIFOs and pipes have no end of their own: one more look at all of them.
                    for id in self.sources.table.keys().collect::<Vec<_>>() {
                        self.sources.table[id].is_readable = true;
                        self.sources.make_ready(id);
                    }
                    self.phase = Phase::Draining { deadline, is_last_pass: true };
                }
                None
            }
            Phase::Closing { deadline } => {
                let is_closed = self.upstreams.iter().all(Upstream::is_closed);
                (is_closed || self.now >= deadline).then(|| self.ending())
            }
        }
    }

    /// Whether a FIFO or pipe was written to since it was read: asked right before they are closed.
    fn holds_unread_bytes(&self) -> bool {
        self.sources.table.values().any(|source| match source.io {
            Io::Fifo(_) | Io::Pipe(_) => ioctl_fionread(&source.io).is_ok_and(|bytes| bytes > 0),
            Io::Unix(_) | Io::Socketpair(_) => false,
        })
    }

    fn begin_closing(&mut self, deadline: Time) {
        self.phase = Phase::Closing { deadline };
        // Attached pipes first, so that their parents hear of it.
        let mut ids: Vec<_> = self.sources.table.keys().collect();
        ids.sort_by_key(|id| self.sources.table[*id].parent.is_none());
        for id in ids {
            let source = &mut self.sources.table[id];
            self.given_up += intake::give_up_buffered(&mut self.upstreams, source);
            // FIFOs too, in the same moment: what is written to one from here on stays in it as
            // long as its writer lives, and is read by the next broker.
            source.ended = Some(Reason::Drained);
            self.end(id);
        }
        for upstream in 0..self.upstreams.len() {
            self.upstreams[upstream].pool.close_down(self.now);
            self.work_on(upstream);
        }
    }

    /// The time to drain is over: what is not sent now is dropped and counted.
    fn abandon(&mut self, why: &'static str) {
        for upstream in 0..self.upstreams.len() {
            let Upstream { pool, config, .. } = &self.upstreams[upstream];
            let (queued, in_flight) = (pool.queued(), pool.in_flight());
            if queued > 0 || in_flight > 0 {
                tracing::warn!(upstream = config.name, queued, in_flight, "{why}");
            }
            self.given_up += queued + in_flight as u64;
            // Twice: a message that was partly written goes once its connection is closed.
            for _ in 0..2 {
                self.upstreams[upstream].pool.abandon(self.now, Reason::DrainTimeout);
                self.work_on(upstream);
            }
        }
        for source in self.sources.table.values_mut() {
            let unread = source.buffer.as_ref().is_some_and(|buffer| !buffer.is_empty());
            let pending = ioctl_fionread(&source.io).unwrap_or(0);
            if unread || pending > 0 {
                self.given_up += 1;
                tracing::warn!(
                    session = source.session.id,
                    transport = source.session.transport.name(),
                    unread_bytes = pending,
                    "not read to its end"
                );
            }
        }
    }

    fn ending(&self) -> Ending {
        match self.given_up {
            0 => Ending::Clean,
            messages => Ending::Undelivered { messages },
        }
    }
}

/// Whether a source has nothing more to hand over, as far as is known.
fn is_at_its_end(source: &Source) -> bool {
    match source.io {
        // Read to the end, and told; or kept by what it attached.
        Io::Unix(_) => source.ended.is_some() && source.children > 0,
        Io::Socketpair(_) => false,
        // The rest of an unfinished message is waited for, as long as partial_timeout allows.
        Io::Fifo(_) | Io::Pipe(_) => !source.is_blocked && source.buffer.is_none(),
    }
}
