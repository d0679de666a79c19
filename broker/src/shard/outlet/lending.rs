//! Leases: passing a connection to a session, and looking at it when it comes back.

use std::os::fd::AsFd;
use std::time::Duration;

use poolbroker_proto::address::Protocol;
use poolbroker_proto::message::Failure;
use poolbroker_proto::reason::Reason;
use slotmap::{Key, KeyData};

use super::{Context, Upstream};
use crate::ids::{ConnId, LeaseId, SourceId};
use crate::inflight::Owner;
use crate::pool::Lend;
use crate::stats::RequestEnd;
use crate::timers::Time;
use crate::upstream::{sockopt, tcp, udp};

impl Upstream {
    /// Asks for a lease; the answer comes through `Sources`, unless it is refused at once.
    pub fn lease(
        &mut self,
        now: Time,
        owner: Owner,
        timeout: Option<Duration>,
    ) -> Result<(), Failure> {
        match self.pool.lease(now, owner, timeout.map(|timeout| now + timeout)) {
            Lend::Granted { lease, conn } => {
                // Passed with everything else that is to be done at the end of the turn.
                self.granted.push((conn, lease, owner));
                Ok(())
            }
            Lend::Queued => Ok(()),
            Lend::Refused(reason) => {
                let mut failure = self.failure(RequestEnd::Refused(reason), false);
                if reason == Reason::NotAllowed {
                    failure.text.push_str(": its configuration has no lease = true");
                }
                Err(failure)
            }
        }
    }

    /// A session gives a lease back, or up.
    pub fn release(&mut self, now: Time, source: SourceId, lease: u64, is_clean: bool) {
        let lease = LeaseId::from(KeyData::from_ffi(lease));
        // One that has expired meanwhile is gone.
        let Some(conn) = self.pool.leased(source, lease) else { return };
        let found = match self.sockets.get(conn) {
            Some(_) if !is_clean => Err(Reason::LeaseEnded),
            Some(socket) => {
                let sound = match self.config.url.protocol {
                    Protocol::Tcp => tcp::check_reusable(&socket.fd),
                    Protocol::Udp => udp::check_reusable(&socket.fd),
                    Protocol::UdpWriteOnly => Ok(()),
                };
                let unsent = match self.config.url.protocol {
                    Protocol::Tcp => sockopt::unacknowledged_bytes(&socket.fd).unwrap_or(0),
                    Protocol::Udp | Protocol::UdpWriteOnly => 0,
                };
                match sound {
                    Err(Reason::Unsolicited) => Err(Reason::LeaseUnclean),
                    Ok(()) if unsent > 0 => Err(Reason::LeaseUnclean),
                    sound => sound,
                }
            }
            None => Err(Reason::Internal),
        };
        if found.is_ok() {
            self.returned.push(conn);
        }
        self.pool.handle_returned(now, lease, found);
    }

    /// Passes the connections that were lent in this turn.
    pub(super) fn pass_on_granted(&mut self, cx: &mut Context<'_>) {
        for (conn, lease, owner) in std::mem::take(&mut self.granted) {
            self.pass_on(cx, conn, lease, owner);
        }
        // Those that came back and did not go again are watched like any other.
        for conn in std::mem::take(&mut self.returned) {
            if self.pool.conn(conn).is_some_and(|record| record.is_at_rest())
                && let Some(socket) = self.sockets.get_mut(conn)
                && !socket.is_watched
            {
                cx.poller.set_watched(&socket.fd, socket.token, true);
                socket.is_watched = true;
            }
        }
    }

    /// Passes a connection to the session that it is lent to, if it is still sound.
    pub(super) fn pass_on(
        &mut self,
        cx: &mut Context<'_>,
        conn: ConnId,
        lease: LeaseId,
        owner: Owner,
    ) {
        if self.pool.leased(owner.source, lease) != Some(conn) {
            return;
        }
        let Some(socket) = self.sockets.get_mut(conn) else { return };
        let checked = match self.config.url.protocol {
            // The rest of what was begun would be the first thing its holder reads.
            _ if socket.input.as_ref().is_some_and(|input| !input.is_empty()) => {
                Err(Reason::Unsolicited)
            }
            Protocol::Tcp => tcp::check_reusable(&socket.fd),
            Protocol::Udp => udp::check_reusable(&socket.fd),
            Protocol::UdpWriteOnly => Ok(()),
        };
        if let Err(reason) = checked {
            return self.pool.handle_lost(cx.now, conn, reason, 0);
        }
        match cx.sources.lend(owner, lease.data().as_ffi(), socket.fd.as_fd()) {
            // What its holder reads is no news here.
            Ok(()) if socket.is_watched => {
                cx.poller.set_watched(&socket.fd, socket.token, false);
                socket.is_watched = false;
            }
            Ok(()) => {}
            Err(reason) => {
                let failure = self.failure(RequestEnd::Refused(reason), false);
                cx.sources.refuse_lease(owner, &failure);
                self.pool.handle_unlendable(cx.now, lease, reason);
            }
        }
    }

    /// Shuts a connection down that somebody else may hold, too.
    pub(super) fn revoke(&mut self, conn: ConnId) {
        if let Some(socket) = self.sockets.get(conn) {
            tcp::revoke(&socket.fd);
        }
    }
}
