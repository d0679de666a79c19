//! Carries out the policy of [`crate::waiting`]: which sources are awake, and how the loop waits.

use std::time::Duration;

use poolbroker_proto::ring::Bell;

use super::Shard;
use super::sources::Source;
use crate::ids::SourceId;
use crate::transport::Io;
use crate::waiting::Wait;

impl Shard {
    /// Something was taken from a source, which may be worth looking at from now on.
    pub(super) fn note_found(&mut self, id: SourceId, bytes: usize) {
        let Some(source) = self.sources.table.get_mut(id) else { return };
        let Some(pace) = &mut source.pace else { return };
        if pace.handle_found(self.now, bytes) {
            self.sources.awake.push(id);
            self.set_watched(id, false);
        }
    }

    /// A source is empty: it stays awake, or is asleep and wakes the loop from now on.
    pub(super) fn rest(&mut self, id: SourceId) {
        let Some(source) = self.sources.table.get_mut(id) else { return };
        let Some(pace) = &mut source.pace else { return };
        if pace.handle_empty(self.now, self.limits.delay_max) {
            self.forget_awake(id);
        }
        let Some(source) = self.sources.table.get_mut(id) else { return };
        let is_awake = source.pace.as_ref().is_some_and(|pace| pace.is_awake());
        if !is_awake && !is_armed(source, Bell::Everything) {
            self.sources.make_ready(id);
        }
    }

    /// A source has something that no upstream takes now: there is nothing to look for in it until it
    /// is made ready.
    fn park(&mut self, id: SourceId) {
        if let Some(pace) = self.sources.table.get_mut(id).and_then(|source| source.pace.as_mut()) {
            pace.handle_stuck();
            self.forget_awake(id);
        }
    }

    fn forget_awake(&mut self, id: SourceId) {
        self.sources.awake.retain(|awake| *awake != id);
        self.set_watched(id, true);
    }

    /// Pipes and FIFOs that are awake do not wake the loop: each write would, at the cost of the
    /// writer.
    fn set_watched(&mut self, id: SourceId, is_watched: bool) {
        if let Some(source) = self.sources.table.get(id) {
            match source.io {
                Io::Fifo(_) | Io::Pipe(_) => {
                    self.poller.set_watched(&source.io, source.token, is_watched);
                }
                Io::Unix(_) | Io::Socketpair(_) => {}
            }
        }
    }

    /// Looks at everything that is awake, if it is time.
    pub(super) fn look(&mut self) {
        if self.sources.awake.is_empty() || !self.waiting.is_look_due(self.now) {
            return;
        }
        self.has_looked = true;
        for at in (0..self.sources.awake.len()).rev() {
            let id = self.sources.awake[at];
            let Some(source) = self.sources.table.get_mut(id) else { continue };
            if source.is_blocked || source.is_held {
                self.park(id);
                continue;
            }
            match source.ring.as_mut().map(|ring| ring.has_records()) {
                Some(Ok(false)) => self.rest(id),
                Some(Ok(true) | Err(_)) => self.sources.make_ready(id),
                None => {
                    source.is_readable = true;
                    self.sources.make_ready(id);
                }
            }
        }
    }

    /// How long to wait for events, if no deadline comes first and no work is left.
    pub(super) fn nap(&mut self) -> Option<Duration> {
        let has_awake = !self.sources.awake.is_empty();
        if has_awake && std::mem::take(&mut self.has_looked) {
            let looked_at = self.now;
            self.read_clock();
            let delay_max = self.limits.delay_max;
            let awake = self.sources.awake.iter().filter_map(|id| self.sources.table.get(*id));
            let look_at = awake.filter_map(|source| {
                // A ring is filled while it is worked on. The writer of a pipe is to write in peace
                // after it was read: it pays for a reader that comes while it writes.
                let from = if source.ring.is_some() { looked_at } else { self.now };
                Some(from + source.pace.as_ref()?.nap().min(delay_max))
            });
            self.waiting.handle_looked(look_at.min().unwrap_or(looked_at));
        }
        let (now, delay_max) = (self.now, self.limits.delay_max);
        let mut awake = self.sources.awake.iter().filter_map(|id| self.sources.table.get(*id));
        let is_worth_a_nap = awake.any(|source| {
            source.pace.as_ref().is_some_and(|pace| pace.is_worth_a_nap(now, delay_max))
        });
        match self.waiting.plan(now, is_worth_a_nap) {
            Wait::Poll => Some(Duration::ZERO),
            Wait::Sleep | Wait::Nap(_) if !self.arm_awake() => Some(Duration::ZERO),
            Wait::Sleep => None,
            Wait::Nap(nap) => Some(nap),
        }
    }

    /// Makes sure that what is urgent ends the wait, and everything of a source that is not napped
    /// for; false if something is there already.
    fn arm_awake(&mut self) -> bool {
        let (now, delay_max) = (self.now, self.limits.delay_max);
        let mut is_quiet = true;
        for at in 0..self.sources.awake.len() {
            let id = self.sources.awake[at];
            let Some(source) = self.sources.table.get_mut(id) else { continue };
            let is_napped_for =
                source.pace.as_ref().is_some_and(|pace| pace.is_worth_a_nap(now, delay_max));
            let bell = if is_napped_for { Bell::Urgent } else { Bell::Everything };
            if !is_armed(source, bell) {
                is_quiet = false;
                self.sources.make_ready(id);
            }
        }
        is_quiet
    }
}

/// Sets the bell of a ring; false if there is a record already. Other sources have none.
fn is_armed(source: &mut Source, bell: Bell) -> bool {
    // A ring that is corrupt is to be served: that ends it.
    source.ring.as_mut().is_none_or(|ring| ring.arm(bell).unwrap_or(false))
}
