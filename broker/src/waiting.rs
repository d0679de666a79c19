//! When to poll, nap or sleep: the one policy, its reasons and its proof.
//!
//! # What it weighs
//!
//! On a virtual machine a wake-up across processors costs the waker 15 us of CPU and the woken 11 us,
//! and takes 35 to 40 us; a nap that ends by its timer costs the napper 5 to 15 us and nobody else
//! anything. A reader that is eager, finally, slows its writers: each look at a ring takes a cache
//! line from the producer, and each read of a pipe wakes its writer.
//!
//! # The policy
//!
//! Each one-way source (ring, FIFO, pipe) is *asleep* or *awake* ([`Pace`]).
//!
//! - Asleep, it wakes the loop: by its doorbell, or by epoll. It stays asleep as long as what it
//!   brings comes less often than every [`STAY_GAP`] on average.
//! - Awake, it wakes nobody. The loop looks at all sources that are awake, takes what is there until
//!   they are empty, and *naps*: at most `delay_max`, or until half of the fullest would be full
//!   again at the rate seen, counted for a ring from the look, for a pipe from the end of the work:
//!   a writer that is read while it writes pays for it. A source falls asleep when nothing came for
//!   [`PATIENCE_NAPS`] naps.
//!
//! An awake ring that brings nothing but requests is worth no nap: before the loop sleeps it is armed
//! as if it were asleep. A pipe cannot be armed while it is awake, and is always worth one.
//!
//! What is urgent (requests, control messages, a producer that found its ring full) ends a nap at
//! once; a nap is a wait for events with a short timeout. Where less than [`NAP_MIN`] would remain to
//! nap, the loop looks again at once instead: a timer cannot hit that.
//!
//! After an event the loop may *poll*, which is looking for the next event without waiting:
//! `busy_poll = "auto"` does so for at most [`POLL_MAX`] and only while events come closer together
//! than that, `"off"` never, a duration always for so long. With one processor there is nobody to
//! poll for: whoever could send waits for us to stop.
//!
//! # What that costs at most
//!
//! - Latency: `delay_max` and one timer's lateness, for a one-way message to an awake source; one
//!   wake-up for everything else. `bench one-way --case rate=` prints it.
//! - Idle: nothing. A source without messages is asleep after `PATIENCE_NAPS` naps, and the loop
//!   then waits without a timeout.
//! - Few messages: with gaps of `STAY_GAP`, about a nap of the default `delay_max`, naps cost a timer
//!   per message, 5 to 15 us, and doorbells up to 26 us: that is where the two meet. A source that
//!   comes less often pays `PATIENCE_NAPS` naps for each change of its habits, not for each
//!   message, because the average must fall below `STAY_GAP` before it stays awake.
//! - Many: per nap of `delay_max` one timer, whatever the number of messages.
//!
//! # Why nothing is overlooked
//!
//! A source that falls asleep is looked at once more after it was armed ([`Bell::Everything`], or
//! epoll, which reports what is there already); `proto/src/ring/model.rs` proves that step. An awake
//! source is looked at after every nap, and a nap always ends.
//!
//! [`Bell::Everything`]: poolbroker_proto::ring::Bell::Everything

use std::time::Duration;

use crate::config::{BusyPoll, NAP_MIN, PATIENCE_NAPS, POLL_MAX, STAY_GAP};
use crate::timers::Time;

/// How one source comes, and whether it is awake.
#[derive(Debug, Clone)]
pub struct Pace {
    is_awake: bool,
    found_at: Time,
    brings: Brings,
    looked_at: Time,
    /// Between two moments at which something was found, on average.
    gap: Duration,
    /// Bytes found since it was empty.
    found_bytes: usize,
    capacity: usize,
    /// How long it may be left alone.
    nap: Duration,
}

/// What comes by a source.
#[derive(Debug, Clone, Copy)]
pub enum Brings {
    /// One-way messages alone: by a pipe.
    OneWay,
    /// Requests as well, by a ring; one-way messages last came at that time.
    Requests {
        /// None came yet.
        one_way_at: Option<Time>,
    },
}

/// The longest gap that counts: a source that comes often again is known after a few messages.
const GAP_MAX: Duration = STAY_GAP.saturating_mul(4);

impl Pace {
    /// A source of which nothing is known, asleep; `capacity` is how many bytes it holds.
    pub fn new(now: Time, capacity: usize, brings: Brings) -> Self {
        Pace {
            is_awake: false,
            found_at: now,
            brings,
            looked_at: now,
            gap: GAP_MAX,
            found_bytes: 0,
            capacity,
            nap: Duration::MAX,
        }
    }

    /// Whether the loop has to look at it by itself.
    pub fn is_awake(&self) -> bool {
        self.is_awake
    }

    /// How long it may be left alone.
    pub fn nap(&self) -> Duration {
        self.nap
    }

    /// Whether one-way messages come by it, so that it is worth a nap. Where only requests come, which
    /// ring in any case, a timer would be for nothing.
    pub fn is_worth_a_nap(&self, now: Time, nap_max: Duration) -> bool {
        match self.brings {
            Brings::OneWay => true,
            Brings::Requests { one_way_at } => {
                one_way_at.is_some_and(|at| now.since(at) <= nap_max * PATIENCE_NAPS)
            }
        }
    }

    /// One-way messages are among what is taken from it.
    pub fn handle_one_way(&mut self, now: Time) {
        if let Brings::Requests { one_way_at } = &mut self.brings {
            *one_way_at = Some(now);
        }
    }

    /// `bytes` were taken from it. True: it is awake from now on, and was not before.
    pub fn handle_found(&mut self, now: Time, bytes: usize) -> bool {
        if now > self.found_at {
            let gap = now.since(self.found_at).min(GAP_MAX);
            self.gap = (self.gap * 3 + gap) / 4;
            self.found_at = now;
        }
        self.found_bytes = self.found_bytes.saturating_add(bytes);
        let wakes = !self.is_awake && self.gap <= STAY_GAP;
        self.is_awake |= wakes;
        wakes
    }

    /// It has something that cannot be taken now: it is asleep until that changes, which the loop
    /// learns by itself.
    pub fn handle_stuck(&mut self) {
        self.is_awake = false;
    }

    /// It was looked at and is empty. True: nothing has come for so long that it is asleep from now
    /// on.
    pub fn handle_empty(&mut self, now: Time, nap_max: Duration) -> bool {
        let elapsed = now.since(self.looked_at);
        if !elapsed.is_zero() {
            // Until half of it would be full at this rate.
            let found = u32::try_from(self.found_bytes.max(1)).unwrap_or(u32::MAX);
            let half = u32::try_from(self.capacity / 2).unwrap_or(u32::MAX);
            self.nap = (elapsed.saturating_mul(half) / found).min(nap_max);
            self.looked_at = now;
            self.found_bytes = 0;
        }
        let falls = self.is_awake && now.since(self.found_at) > nap_max * PATIENCE_NAPS;
        self.is_awake &= !falls;
        falls
    }
}

/// How the loop is to wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// Look for events, and go on.
    Poll,
    /// Wait for events this long, then look at what is awake.
    Nap(Duration),
    /// Wait for events.
    Sleep,
}

/// When the loop last had something to do, and what to do when it has not.
#[derive(Debug)]
pub struct Waiting {
    busy_poll: BusyPoll,
    is_alone: bool,
    event_at: Time,
    gap: Duration,
    look_at: Time,
}

impl Waiting {
    /// A loop that shares `processors` with its clients.
    pub fn new(busy_poll: BusyPoll, processors: usize) -> Self {
        Waiting {
            busy_poll,
            is_alone: processors < 2,
            event_at: Time::default(),
            gap: POLL_MAX * 4,
            look_at: Time::default(),
        }
    }

    /// Events came.
    pub fn handle_events(&mut self, now: Time) {
        let gap = now.since(self.event_at).min(POLL_MAX * 4);
        self.gap = (self.gap * 3 + gap) / 4;
        self.event_at = now;
    }

    /// Everything that is awake was looked at, and is to be looked at again at `look_at`.
    pub fn handle_looked(&mut self, look_at: Time) {
        self.look_at = look_at;
    }

    /// Whether it is time to look at what is awake.
    pub fn is_look_due(&self, now: Time) -> bool {
        now >= self.look_at
    }

    /// What to do at the end of a turn that left no work, while something is worth a nap or not.
    pub fn plan(&self, now: Time, is_worth_a_nap: bool) -> Wait {
        if self.is_polling(now) {
            return Wait::Poll;
        }
        match self.look_at.since(now) {
            _ if !is_worth_a_nap => Wait::Sleep,
            nap if nap < NAP_MIN => Wait::Poll,
            nap => Wait::Nap(nap),
        }
    }

    fn is_polling(&self, now: Time) -> bool {
        let quiet = now.since(self.event_at);
        match self.busy_poll {
            _ if self.is_alone => false,
            BusyPoll::Off => false,
            BusyPoll::For(length) => quiet < length,
            BusyPoll::Auto => self.gap < POLL_MAX && quiet < POLL_MAX,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAP: Duration = Duration::from_micros(500);
    const CAPACITY: usize = 1 << 20;

    fn at(us: u64) -> Time {
        Time::default() + Duration::from_micros(us)
    }

    /// Something every `gap` for a second, looked at as the policy says: doorbells and naps.
    fn run(gap_us: u64) -> (u64, u64) {
        let mut pace = Pace::new(at(0), CAPACITY, Brings::OneWay);
        let (mut doorbells, mut naps) = (0, 0);
        let (mut now, mut next_message) = (0, gap_us);
        while now < 1_000_000 {
            if pace.is_awake() {
                naps += 1;
                now += 500;
            } else {
                doorbells += 1;
                now = next_message;
            }
            let mut found = 0;
            while next_message <= now {
                next_message += gap_us;
                found += 100;
            }
            if found > 0 {
                pace.handle_found(at(now), found);
            }
            pace.handle_empty(at(now), NAP);
        }
        (doorbells, naps)
    }

    #[test]
    fn what_comes_often_is_napped_for_and_what_comes_seldom_rings() {
        for gap_us in [1, 10, 100, 500] {
            let (doorbells, naps) = run(gap_us);
            assert!(doorbells <= 16 && naps <= 2_000, "every {gap_us} us: {doorbells}, {naps}");
        }
        for gap_us in [2_000, 10_000, 100_000] {
            let (doorbells, naps) = run(gap_us);
            assert_eq!((doorbells, naps), (1_000_000 / gap_us, 0), "every {gap_us} us");
        }
    }

    #[test]
    fn a_source_that_stops_is_asleep_after_a_few_naps() {
        let mut pace = Pace::new(at(0), CAPACITY, Brings::OneWay);
        for us in 0..100 {
            pace.handle_found(at(us * 100), 100);
        }
        assert!(pace.is_awake());
        assert!(!pace.handle_empty(at(10_000), NAP));
        assert!(!pace.handle_empty(at(9_900 + 2_000), NAP));
        assert!(pace.handle_empty(at(9_900 + 2_001), NAP));
        assert!(!pace.is_awake());
    }

    /// It would be overlooked: awake, it wakes nobody.
    #[test]
    fn a_pipe_that_is_awake_is_always_worth_a_nap_and_a_ring_while_one_way_messages_come() {
        let pipe = Pace::new(at(0), CAPACITY, Brings::OneWay);
        assert!(pipe.is_worth_a_nap(at(1_000_000), NAP));
        let mut ring = Pace::new(at(0), CAPACITY, Brings::Requests { one_way_at: None });
        assert!(!ring.is_worth_a_nap(at(1), NAP));
        ring.handle_one_way(at(100));
        assert!(ring.is_worth_a_nap(at(2_100), NAP));
        assert!(!ring.is_worth_a_nap(at(2_101), NAP));
    }

    #[test]
    fn a_nap_ends_before_more_than_half_is_full() {
        let mut pace = Pace::new(at(0), CAPACITY, Brings::OneWay);
        pace.handle_found(at(100), CAPACITY / 4);
        pace.handle_empty(at(100), NAP);
        assert_eq!(pace.nap(), Duration::from_micros(200));
        pace.handle_found(at(1_000), 10);
        pace.handle_empty(at(1_000), NAP);
        assert_eq!(pace.nap(), NAP);
    }

    #[test]
    fn the_loop_sleeps_naps_or_polls_by_what_is_awake_and_what_came() {
        let mut waiting = Waiting::new(BusyPoll::Auto, 2);
        assert_eq!(waiting.plan(at(1_000), false), Wait::Sleep);
        waiting.handle_looked(at(1_000) + NAP);
        assert_eq!(waiting.plan(at(1_000), true), Wait::Nap(NAP));
        assert_eq!(waiting.plan(at(1_499), true), Wait::Poll, "too short for a timer");
        assert!(!waiting.is_look_due(at(1_499)) && waiting.is_look_due(at(1_500)));
        for us in 0..100 {
            waiting.handle_events(at(2_000 + us * 2));
        }
        assert_eq!(waiting.plan(at(2_200), false), Wait::Poll);
        assert_eq!(waiting.plan(at(3_000), false), Wait::Sleep);
    }

    #[test]
    fn polling_is_a_choice_and_gives_way_on_a_single_processor() {
        let mut waiting = Waiting::new(BusyPoll::For(Duration::from_millis(1)), 2);
        waiting.handle_events(at(5_000));
        assert_eq!(waiting.plan(at(5_999), false), Wait::Poll);
        assert_eq!(waiting.plan(at(6_000), false), Wait::Sleep);
        for (busy_poll, processors) in [(BusyPoll::Off, 2), (BusyPoll::Auto, 1)] {
            let mut waiting = Waiting::new(busy_poll, processors);
            for us in 0..100 {
                waiting.handle_events(at(us));
            }
            assert_eq!(waiting.plan(at(100), false), Wait::Sleep);
        }
    }
}
