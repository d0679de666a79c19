//! Readiness: one epoll instance, edge-triggered, and what each descriptor in it belongs to.
//!
//! Edge-triggered, so that a descriptor is registered once and never changed: whoever gets an
//! event remembers that the descriptor is readable or writable until the kernel says otherwise.
//! Every registration has a token with a generation; an event for something that is gone finds
//! no target and is dropped.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::event::Timespec;
use rustix::event::epoll::{
    CreateFlags, Event, EventData, EventFlags, add, create, delete, modify, wait,
};
use rustix::io::Errno;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, timerfd_create, timerfd_settime,
};
use slotmap::{Key, KeyData, SlotMap, new_key_type};

use crate::config::{ALARM_MIN, EVENTS_MAX};
use crate::timers::Time;

/// What is asked of a datagram socket that has room; the other end and errors show anyway.
const INPUT: EventFlags = EventFlags::IN.union(EventFlags::ET);

/// What is asked of a source. A Unix socket would tell of room whenever its peer reads, at the cost of
/// the peer.
const SOURCE: EventFlags = INPUT.union(EventFlags::RDHUP);

/// What is asked of a connection, and of a source that was full.
const WATCHED: EventFlags = INPUT.union(EventFlags::OUT).union(EventFlags::RDHUP);

new_key_type! {
    /// One registration.
    pub struct Token;
}

/// What an event says about a descriptor.
#[derive(Debug, Clone, Copy)]
pub struct Readiness {
    flags: EventFlags,
}

impl Readiness {
    /// There may be something to read, the end included.
    pub fn is_readable(self) -> bool {
        let readable = EventFlags::IN | EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR;
        self.flags.intersects(readable)
    }

    /// There may be room to write, or a connect was decided.
    pub fn is_writable(self) -> bool {
        self.flags.intersects(EventFlags::OUT | EventFlags::HUP | EventFlags::ERR)
    }

    /// The peer sends nothing more: to be read until the end shows.
    pub fn is_ending(self) -> bool {
        self.flags.intersects(EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR)
    }

    /// Both directions are closed.
    pub fn is_hung_up(self) -> bool {
        self.flags.contains(EventFlags::HUP)
    }

    /// An error waits, or the error queue has something.
    pub fn is_error(self) -> bool {
        self.flags.contains(EventFlags::ERR)
    }
}

/// An epoll instance and its targets.
pub struct Poller<T> {
    epoll: OwnedFd,
    targets: SlotMap<Token, T>,
    events: Vec<Event>,
    /// Of how many events the last wait told.
    told: usize,
    alarm: Alarm,
}

/// A timer that ends waits from afar: it is set once and not for every wait, which costs more than
/// the wait itself on a virtual machine.
struct Alarm {
    timer: OwnedFd,
    at: Option<Time>,
}

impl Alarm {
    /// Makes sure that it rings at `at` or before; false: it cannot be set.
    fn set(&mut self, now: Time, at: Time) -> bool {
        if self.at.is_some_and(|set| set > now && set <= at) {
            return true;
        }
        let value = timespec(at.since(now));
        let once = Itimerspec { it_interval: timespec(Duration::ZERO), it_value: value };
        self.at = Some(at);
        timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once).is_ok()
    }
}

fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(duration.subsec_nanos()),
    }
}

impl<T> std::fmt::Debug for Poller<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Poller").field("watched", &self.targets.len()).finish_non_exhaustive()
    }
}

impl<T: Copy> Poller<T> {
    /// An empty one.
    pub fn new() -> Result<Self, Errno> {
        let epoll = create(CreateFlags::CLOEXEC)?;
        let events = Vec::with_capacity(EVENTS_MAX);
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags)?;
        // By edges: it is never read. Its token belongs to nothing, so its events are passed over.
        let token = Token::null();
        add(&epoll, &timer, EventData::new_u64(token.data().as_ffi()), INPUT)?;
        let alarm = Alarm { timer, at: None };
        Ok(Poller { epoll, targets: SlotMap::with_key(), events, told: 0, alarm })
    }

    /// Watches a source for reading, by edges.
    pub fn watch_source(&mut self, fd: impl AsFd, target: T) -> Result<Token, Errno> {
        self.add(fd, target, SOURCE)
    }

    /// Watches a source for room, too, or not any more; room that is there is reported.
    pub fn set_source_room_watched(&self, fd: impl AsFd, token: Token, is_watched: bool) {
        self.modify(fd, token, if is_watched { WATCHED } else { SOURCE });
    }

    /// Watches a descriptor for reading and writing, by edges.
    pub fn watch(&mut self, fd: impl AsFd, target: T) -> Result<Token, Errno> {
        self.add(fd, target, WATCHED)
    }

    /// Watches a listener, by level: it stays readable while somebody waits.
    pub fn watch_listener(&mut self, fd: impl AsFd, target: T) -> Result<Token, Errno> {
        self.add(fd, target, EventFlags::IN)
    }

    /// Watches an eventfd that nobody reads, by edges: one event per write (E6c).
    pub fn watch_doorbell(&mut self, fd: impl AsFd, target: T) -> Result<Token, Errno> {
        self.add(fd, target, INPUT)
    }

    /// Watches a datagram socket for reading, by edges. Room to write would be reported for each
    /// datagram that leaves it.
    pub fn watch_datagrams(&mut self, fd: impl AsFd, target: T) -> Result<Token, Errno> {
        self.add(fd, target, INPUT)
    }

    /// Watches a datagram socket for room, too, or not any more; room that is there is reported.
    pub fn set_room_watched(&self, fd: impl AsFd, token: Token, is_watched: bool) {
        self.modify(fd, token, if is_watched { WATCHED } else { INPUT });
    }

    /// Takes a source out of the kernel's watch, or puts it in again, when what it holds already is
    /// reported. It is taken out rather than masked: every write to a pipe calls on whoever
    /// watches it.
    pub fn set_watched(&self, fd: impl AsFd, token: Token, is_watched: bool) {
        let data = EventData::new_u64(token.data().as_ffi());
        let result = match is_watched {
            true => add(&self.epoll, fd, data, WATCHED),
            false => delete(&self.epoll, fd),
        };
        if let Err(error) = result {
            tracing::error!(%error, "a source cannot be watched");
        }
    }

    fn add(&mut self, fd: impl AsFd, target: T, flags: EventFlags) -> Result<Token, Errno> {
        let token = self.targets.insert(target);
        let data = EventData::new_u64(token.data().as_ffi());
        match add(&self.epoll, fd, data, flags) {
            Ok(()) => Ok(token),
            Err(error) => {
                self.targets.remove(token);
                Err(error)
            }
        }
    }

    /// Stops or resumes watching a listener.
    pub fn set_listening(&self, fd: impl AsFd, token: Token, is_listening: bool) {
        let flags = if is_listening { EventFlags::IN } else { EventFlags::empty() };
        self.modify(fd, token, flags);
    }

    fn modify(&self, fd: impl AsFd, token: Token, flags: EventFlags) {
        let data = EventData::new_u64(token.data().as_ffi());
        // Fails only if the descriptor was never added.
        if let Err(error) = modify(&self.epoll, fd, data, flags) {
            tracing::error!(%error, "what is watched for could not be changed");
        }
    }

    /// Forgets a descriptor, which must still be open.
    pub fn unwatch(&mut self, fd: impl AsFd, token: Token) {
        if self.targets.remove(token).is_some() {
            // Fails only if the descriptor was never added.
            let _ = delete(&self.epoll, fd);
        }
    }

    /// Forgets a descriptor that is closed before the next wait, which takes it out of the kernel's
    /// watch unless somebody else has it, too (epoll(7), question 6).
    pub fn forget(&mut self, token: Token) {
        self.targets.remove(token);
    }

    /// Waits for events at most that long from `now` on, for ever without a timeout.
    pub fn wait(&mut self, now: Time, timeout: Option<Duration>) -> Result<(), Errno> {
        let is_far = |timeout: &Duration| *timeout >= ALARM_MIN;
        let timeout = match timeout.filter(is_far) {
            Some(timeout) if self.alarm.set(now, now + timeout) => None,
            Some(_) | None => timeout,
        };
        let timeout = timeout.map(timespec);
        self.events.clear();
        let room = rustix::buffer::spare_capacity(&mut self.events);
        let waited = wait(&self.epoll, room, timeout.as_ref());
        self.told = self.events.len();
        match waited {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Whether the last wait told of one event at most: nothing else had happened to what is watched,
    /// and that was a moment ago.
    pub fn is_calm(&self) -> bool {
        self.told <= 1
    }

    /// Whether the last wait told of nothing.
    pub fn is_quiet(&self) -> bool {
        self.told == 0
    }

    /// The events of the last wait, one by one; those without a target are passed over.
    pub fn pop_event(&mut self) -> Option<(T, Readiness)> {
        loop {
            let event = self.events.pop()?;
            let token = Token::from(KeyData::from_ffi(event.data.u64()));
            if let Some(target) = self.targets.get(token) {
                return Some((*target, Readiness { flags: event.flags }));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    #[test]
    fn an_event_for_something_gone_is_dropped() {
        let mut poller = Poller::new().unwrap();
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let token = poller.watch(&theirs, 7).unwrap();
        ours.write_all(b"x").unwrap();
        poller.wait(Time::default(), Some(Duration::from_secs(5))).unwrap();
        poller.unwatch(&theirs, token);
        assert!(poller.pop_event().is_none());
    }

    #[test]
    fn a_source_tells_of_room_only_while_that_is_watched_for() {
        let mut poller = Poller::new().unwrap();
        let (_ours, theirs) = UnixStream::pair().unwrap();
        let token = poller.watch_source(&theirs, 7).unwrap();
        for is_watched in [true, false] {
            poller.set_source_room_watched(&theirs, token, is_watched);
            poller.wait(Time::default(), Some(Duration::ZERO)).unwrap();
            assert_eq!(poller.pop_event().is_some(), is_watched);
        }
    }

    #[test]
    fn edges_are_reported_once_and_again_with_new_data() {
        let mut poller = Poller::new().unwrap();
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        poller.watch(&theirs, 7).unwrap();
        for _ in 0..2 {
            ours.write_all(b"x").unwrap();
            poller.wait(Time::default(), Some(Duration::from_secs(5))).unwrap();
            let (target, readiness) = poller.pop_event().unwrap();
            assert!(target == 7 && readiness.is_readable() && readiness.is_writable());
            poller.wait(Time::default(), Some(Duration::ZERO)).unwrap();
            assert!(poller.pop_event().is_none());
        }
    }
}
