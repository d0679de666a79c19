//! How sessions come to their rings: a fresh pair, or the one of an earlier broker.

use std::os::fd::{AsFd, OwnedFd};

use poolbroker_proto::frame::{FrameHeader, Kind};
use poolbroker_proto::message::{BrokerMessage, Failure, Retry, encode};
use poolbroker_proto::reason::Reason;
use poolbroker_proto::ring::Header;

use super::{Phase, Shard, Target};
use crate::ids::SourceId;
use crate::quota::Resource;
use crate::transport::ring::{NoRing, Ring};
use crate::transport::unix::Flushed;
use crate::waiting::{Brings, Pace};

impl Shard {
    /// Makes a pair of rings for a client and passes it.
    pub(super) fn open_ring(&mut self, id: SourceId, correlation: u64, capacity: usize) {
        let opened = self.charge_ring(id, capacity).and_then(|()| {
            let (ring, memory) = Ring::create(capacity).map_err(refusal)?;
            self.install_ring(id, correlation, ring, Some(memory))
        });
        self.answer_refusal(id, correlation, opened);
    }

    /// Goes on with the pair of rings of a client whose broker is gone.
    pub(super) fn resume_ring(
        &mut self,
        id: SourceId,
        correlation: u64,
        capacity: usize,
        upstreams: &[Option<usize>],
        memory: OwnedFd,
    ) {
        let resumed = self.charge_ring(id, capacity).and_then(|()| {
            let ring = Ring::resume(memory.as_fd(), capacity).map_err(refusal)?;
            // Two sessions on one ring would be two consumers of it (C17).
            let mut rings = self.sources.table.values().filter_map(|source| source.ring.as_ref());
            if rings.any(|other| other.file() == ring.file()) {
                return Err((Reason::RingAttached, Reason::RingAttached.to_string()));
            }
            if let Some(source) = self.sources.table.get_mut(id) {
                for upstream in upstreams {
                    let quota = |reason| (reason, "too many upstreams are open".to_owned());
                    source.session.reopen(*upstream).map_err(quota)?;
                }
            }
            self.install_ring(id, correlation, ring, None)
        });
        self.closer.close(memory);
        self.answer_refusal(id, correlation, resumed);
    }

    /// Charges a ring to its user before there is one: memory, and the descriptor of its doorbell.
    fn charge_ring(&mut self, id: SourceId, capacity: usize) -> Result<(), (Reason, String)> {
        let refused = |what: &str, limit| {
            let reason = Reason::Quota;
            (reason, format!("{reason}: this user may have {limit} {what} now"))
        };
        let Some(source) = self.sources.table.get_mut(id) else {
            return Err((Reason::ClientGone, String::new()));
        };
        if self.phase != Phase::Running {
            return Err((Reason::ShuttingDown, Reason::ShuttingDown.to_string()));
        }
        // Two questions may have come together.
        if source.ring.is_some() {
            return Err((Reason::BadRing, "the session has its rings already".to_owned()));
        }
        // Those would be taken for the first ones of the ring.
        if !source.session.is_settled() {
            return Err((
                Reason::BadRing,
                "messages of the session have no outcome yet".to_owned(),
            ));
        }
        let (account, bytes) = (&source.account, Header::region_bytes(capacity));
        let memory = account.charge(Resource::RingBytes, bytes).map_err(|exceeded| {
            refused("bytes of rings (ring_bytes_max_per_uid)", exceeded.limit)
        })?;
        let doorbell = account.charge(Resource::Sessions, 1).map_err(|exceeded| {
            refused("sessions, of which a ring counts as one more", exceeded.limit)
        })?;
        source.ring_charges = vec![memory, doorbell];
        Ok(())
    }

    fn install_ring(
        &mut self,
        id: SourceId,
        correlation: u64,
        ring: Ring,
        memory: Option<OwnedFd>,
    ) -> Result<(), (Reason, String)> {
        let Some(source) = self.sources.table.get_mut(id) else {
            return Ok(());
        };
        let unwatched = |error| refusal(NoRing::from(error));
        let token =
            self.poller.watch_doorbell(ring.doorbell(), Target::Doorbell(id)).map_err(unwatched)?;
        let header = FrameHeader { correlation, ..FrameHeader::new(Kind::Control) };
        let mut frame = Vec::new();
        let body = encode(&BrokerMessage::RingOpened { epoch: ring.epoch() }).unwrap_or_default();
        let is_framed = header.append(&body, &mut frame).is_ok();
        let mut descriptors = Vec::from_iter(memory.as_ref().map(AsFd::as_fd));
        descriptors.push(ring.doorbell().as_fd());
        let is_sent = is_framed
            && source.flush() == Flushed::All
            && source
                .io
                .stream()
                .is_some_and(|stream| stream.send_descriptors(&frame, &descriptors));
        if !is_sent {
            // A client that does not read cannot be answered with descriptors.
            self.poller.unwatch(ring.doorbell(), token);
            source.ended = Some(Reason::ClientGone);
            source.is_hung_up = true;
            return Ok(());
        }
        let brings = Brings::Requests { one_way_at: None };
        source.pace = Some(Pace::new(self.now, ring.capacity(), brings));
        source.doorbell = token;
        source.session.handle_ring();
        source.ring = Some(Box::new(ring));
        // What an earlier broker left behind.
        self.sources.make_ready(id);
        Ok(())
    }

    fn answer_refusal(
        &mut self,
        id: SourceId,
        correlation: u64,
        result: Result<(), (Reason, String)>,
    ) {
        if let (Err((reason, text)), Some(source)) = (result, self.sources.table.get_mut(id)) {
            if source.ring.is_none() {
                source.ring_charges.clear();
            }
            source.session.handle_refused(None, reason);
            let failure = Failure { reason, retry: Retry::NotSent, text };
            source.tell_control(Kind::Failure, correlation, &failure);
        }
        self.sources.make_due(id);
    }

    pub(super) fn handle_doorbell(&mut self, id: SourceId) {
        if let Some(ring) = self.sources.table.get_mut(id).and_then(|source| source.ring.as_mut()) {
            ring.handle_doorbell();
            self.sources.make_ready(id);
            // It may have made room for replies.
            self.sources.make_due(id);
        }
    }
}

fn refusal(problem: NoRing) -> (Reason, String) {
    let reason = match &problem {
        NoRing::Bad(_) => Reason::BadRing,
        NoRing::Kernel(_) => Reason::Internal,
    };
    (reason, format!("{reason}: {problem}"))
}
