//! How sources come in: clients that connect, FIFOs at the start, descriptors that clients pass.
//!
//! Everything is charged before it is taken. A client that cannot be taken is told why.

use std::os::fd::OwnedFd;

use poolbroker_proto::frame::{FrameHeader, Kind};
use poolbroker_proto::framing::{Cutter, Framing};
use poolbroker_proto::message::{Attachment, BrokerMessage, Failure, Retry, encode};
use poolbroker_proto::reason::Reason;
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use rustix::pipe::fcntl_getpipe_size;

use super::intake::Order;
use super::sources::Source;
use super::{ACCEPT_PAUSE, ACCEPTS_MAX, OpenFifo, Phase, Shard, Target};
use crate::config::RECEIVE_BYTES;
use crate::credit::Credit;
use crate::ids::SourceId;
use crate::poller::Token;
use crate::quota::{Account, Resource};
use crate::session::{Peer, Session, SessionLimits, Transport};
use crate::transport::Io;
use crate::transport::pipe::Pipe;
use crate::transport::unix::{self, Stream, UnixSocket};
use crate::upstream::sockopt;
use crate::waiting::{Brings, Pace};

impl Shard {
    pub(super) fn accept_clients(&mut self) {
        for _ in 0..ACCEPTS_MAX {
            let Some(listener) = &self.listener.fd else {
                return;
            };
            match unix::accept(listener) {
                Ok((socket, credentials)) => {
                    let pid = credentials.pid.as_raw_nonzero().get();
                    let peer = Peer { pid, uid: credentials.uid.as_raw() };
                    self.add_client(Io::Unix(socket), peer);
                }
                Err(Errno::AGAIN) => return,
                Err(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
                    return self.turn_one_away();
                }
                // The client that waited is gone, or the like: there may be others.
                Err(_) => {}
            }
        }
    }

    /// No descriptor is left: one client is told so with the spare one, then the listener rests.
    fn turn_one_away(&mut self) {
        self.listener.refused.add(Reason::Quota, 1);
        self.listener.spare = None;
        if let Some(listener) = &self.listener.fd {
            if let Ok((mut socket, _)) = unix::accept(listener) {
                let text = "the broker has no file descriptor left: raise its LimitNOFILE";
                refuse_client(&mut socket.stream, Reason::Quota, text.to_owned());
            }
            self.poller.set_listening(listener, self.listener.token, false);
        }
        self.listener.spare = spare_descriptor();
        if self.listener.resumes_at.is_none() {
            tracing::warn!("no file descriptor left for another client: raise LimitNOFILE");
        }
        self.listener.resumes_at = Some(self.now + ACCEPT_PAUSE);
    }

    fn add_client(&mut self, mut io: Io, peer: Peer) {
        let account = self.quotas.account(peer.uid);
        let charge = match account.charge(Resource::Sessions, 1) {
            Ok(charge) => charge,
            Err(exceeded) => {
                self.listener.refused.add(Reason::Quota, 1);
                if let Some(stream) = io.stream_mut() {
                    let uid = peer.uid;
                    let text = format!(
                        "{}: uid {uid} may have {} sessions now (sessions_percent_max of the \
                         broker's LimitNOFILE)",
                        Reason::Quota,
                        exceeded.limit
                    );
                    refuse_client(stream, Reason::Quota, text);
                }
                return;
            }
        };
        let id = self.take_session_id();
        let session = Session::connected(self.now, id, peer, self.session_limits());
        let source = Source {
            _session_charge: Some(charge),
            buffer_charge: account.charge(Resource::QueuedBytes, 0).ok(),
            reply_charge: account.charge(Resource::QueuedBytes, 0).ok(),
            descriptor_charge: account.charge(Resource::Descriptors, 0).ok(),
            ..new_source(session, account, io, None, Framing::Raw)
        };
        self.listener.accepted += 1;
        if let Err((error, _)) = self.add_source(source) {
            tracing::error!(%error, "a client cannot be watched");
        }
    }

    pub(super) fn add_fifo(&mut self, fifo: OpenFifo) -> Result<(), Errno> {
        let peer = Peer { pid: 0, uid: rustix::process::geteuid().as_raw() };
        let id = self.take_session_id();
        let limits = self.session_limits();
        let session = Session::bound(id, peer, Transport::Fifo, limits, fifo.upstream);
        let record_max = self.limits.fifo_record_bytes_max - fifo.framing.overhead_bytes();
        let message_max = self.upstreams[fifo.upstream].config.limits.message_bytes_max;
        let cutter = Cutter::new(fifo.framing, record_max.min(message_max));
        let account = self.quotas.account(peer.uid);
        let source = new_source(session, account, Io::Fifo(fifo.fd), Some(cutter), fifo.framing);
        let id = self.add_source(source).map_err(|(error, _)| error)?;
        self.fifo_paths.push((id, fifo.path));
        Ok(())
    }

    fn add_source(&mut self, source: Source) -> Result<SourceId, (Errno, Box<Source>)> {
        let mut source = source;
        source.pace = match &source.io {
            Io::Fifo(_) | Io::Pipe(_) => {
                let capacity = fcntl_getpipe_size(&source.io).unwrap_or(RECEIVE_BYTES);
                Some(Pace::new(self.now, capacity, Brings::OneWay))
            }
            Io::Unix(_) | Io::Socketpair(_) => None,
        };
        let id = self.sources.table.insert(source);
        let watched = self.poller.watch_source(&self.sources.table[id].io, Target::Source(id));
        match watched {
            Ok(token) => {
                self.sources.table[id].token = token;
                self.sources.schedule(id);
                // It may have been written to before it was watched.
                self.sources.make_ready(id);
                Ok(id)
            }
            Err(error) => {
                let source = self.sources.remove(id).expect("it was inserted above");
                Err((error, Box::new(source)))
            }
        }
    }

    fn take_session_id(&mut self) -> u64 {
        let id = self.next_session_id;
        self.next_session_id += 1;
        id
    }

    fn session_limits(&self) -> SessionLimits {
        SessionLimits {
            handshake_timeout: self.limits.handshake_timeout,
            partial_timeout: self.limits.partial_timeout,
            descriptor_timeout: self.limits.descriptor_timeout,
            requests_in_flight_max: self.limits.requests_in_flight_max,
        }
    }

    // Passed descriptors.

    pub(super) fn carry_out(&mut self, order: Order) {
        let (source, correlation, upstream, attachment, descriptor) = match order {
            Order::Attach { source, correlation, upstream, attachment, descriptor } => {
                (source, correlation, upstream, attachment, descriptor)
            }
            Order::OpenRing { source, correlation, capacity } => {
                return self.open_ring(source, correlation, capacity);
            }
            Order::ResumeRing { source, correlation, capacity, upstreams, descriptor } => {
                return self.resume_ring(source, correlation, capacity, &upstreams, descriptor);
            }
        };
        let answer = self.attach(source, upstream, attachment, descriptor);
        let Some(parent) = self.sources.table.get_mut(source) else {
            return;
        };
        match answer {
            Ok(session) => {
                parent.children += 1;
                let message = BrokerMessage::Attached { session };
                parent.tell_control(Kind::Control, correlation, &message);
            }
            Err(reason) => {
                parent.session.handle_refused(None, reason);
                let text = match reason {
                    Reason::BadDescriptor => format!("{reason}: {}", wanted(attachment)),
                    reason => reason.to_string(),
                };
                let failure = Failure { reason, retry: Retry::NotSent, text };
                parent.tell_control(Kind::Failure, correlation, &failure);
            }
        }
        self.sources.make_due(source);
    }

    /// Reads a passed descriptor as a session of its own; its id.
    fn attach(
        &mut self,
        parent: SourceId,
        upstream: usize,
        attachment: Attachment,
        descriptor: OwnedFd,
    ) -> Result<u64, Reason> {
        let peer = match self.sources.table.get(parent) {
            Some(parent) if self.phase == Phase::Running => parent.session.peer,
            _ => {
                self.closer.close(descriptor);
                return Err(Reason::ShuttingDown);
            }
        };
        let account = self.quotas.account(peer.uid);
        let charges =
            (account.charge(Resource::Sessions, 1), account.charge(Resource::QueuedBytes, 0));
        let (Ok(session_charge), Ok(buffer_charge)) = charges else {
            self.closer.close(descriptor);
            return Err(Reason::Quota);
        };
        let config = &self.upstreams[upstream].config;
        let message_bytes_max = config.limits.message_bytes_max;
        let (io, transport, framing) = match attachment {
            Attachment::Pipe | Attachment::CutPipe => {
                (Pipe::from_passed(descriptor).map(Io::Pipe), Transport::Pipe, Framing::Lines)
            }
            Attachment::Socketpair => {
                let io = UnixSocket::from_passed(descriptor).map(Io::Socketpair);
                (io, Transport::Socketpair, config.url.framing)
            }
        };
        let io = match io {
            Ok(io) => io,
            Err(descriptor) => {
                self.closer.close(descriptor);
                return Err(Reason::BadDescriptor);
            }
        };
        let id = self.take_session_id();
        let session = Session::bound(id, peer, transport, self.session_limits(), upstream);
        let mut cutter = Cutter::new(framing, message_bytes_max);
        if attachment == Attachment::CutPipe {
            cutter.skip_begun();
        }
        let source = Source {
            parent: Some(parent),
            _session_charge: Some(session_charge),
            buffer_charge: Some(buffer_charge),
            reply_charge: account.charge(Resource::QueuedBytes, 0).ok(),
            ..new_source(session, account, io, Some(cutter), framing)
        };
        match self.add_source(source) {
            Ok(_) => {
                self.watch_process(parent);
                Ok(id)
            }
            Err((error, source)) => {
                tracing::warn!(%error, "a passed descriptor cannot be watched");
                for descriptor in source.io.into_closing() {
                    self.closer.close(descriptor);
                }
                Err(Reason::BadDescriptor)
            }
        }
    }

    /// From its first passed descriptor on, the death of a client shows by its pidfd: what it
    /// passed may keep its own socket open (M8, E8g).
    fn watch_process(&mut self, id: SourceId) {
        if self.pidfds.contains_key(id) {
            return;
        }
        let Some(source) = self.sources.table.get(id) else {
            return;
        };
        // Before Linux 6.5 there is none; a client is then gone when its socket says so.
        if let Ok(pidfd) = sockopt::peer_pidfd(&source.io)
            && let Ok(token) = self.poller.watch(&pidfd, Target::Process(id))
        {
            self.pidfds.insert(id, (pidfd, token));
        }
    }

    pub(super) fn handle_process_end(&mut self, id: SourceId) {
        if let Some(source) = self.sources.table.get_mut(id) {
            source.is_hung_up = true;
            source.is_readable = true;
            if source.ended.is_none() && source.io.stream().is_some() {
                // What it wrote is still taken; then its socket shows its end.
                if let Io::Unix(socket) = &source.io {
                    socket.stream.stop_reading();
                }
            }
            self.sources.make_ready(id);
            self.sources.make_due(id);
        }
    }
}

/// A source of which nothing is known yet.
pub(super) fn new_source(
    session: Session,
    account: Account,
    io: Io,
    cutter: Option<Cutter>,
    framing: Framing,
) -> Source {
    Source {
        session,
        account,
        io,
        token: Token::default(),
        buffer: None,
        cutter,
        framing,
        is_readable: true,
        is_ending: false,
        is_hung_up: false,
        credit: Credit::default(),
        waits_for_room: false,
        is_ready: false,
        is_due: false,
        is_blocked: false,
        is_held: false,
        awaits_reply: false,
        ended: None,
        parent: None,
        children: 0,
        _session_charge: None,
        buffer_charge: None,
        reply_charge: None,
        descriptor_charge: None,
        scheduled_at: None,
        ring: None,
        doorbell: Token::default(),
        ring_charges: Vec::new(),
        ring_ends: None,
        pace: None,
    }
}

fn wanted(attachment: Attachment) -> &'static str {
    match attachment {
        Attachment::Pipe | Attachment::CutPipe => "the read end of a pipe or FIFO is wanted",
        Attachment::Socketpair => "one end of a Unix stream socketpair is wanted",
    }
}

pub(super) fn refuse_client(stream: &mut Stream, reason: Reason, text: String) {
    let failure = Failure { reason, retry: Retry::NotSent, text };
    let header = FrameHeader::new(Kind::Failure);
    if let Ok(body) = encode(&failure)
        && header.append(&body, stream.out()).is_ok()
    {
        // A fresh socket takes this; if not, the client sees the end alone.
        let _ = stream.flush();
    }
}

/// A descriptor to give up when there is no other (R1).
pub(super) fn spare_descriptor() -> Option<OwnedFd> {
    eventfd(0, EventfdFlags::CLOEXEC).ok()
}
