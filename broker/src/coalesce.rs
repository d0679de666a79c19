//! Packing small messages into datagrams, by size and by delay.
//!
//! ```text
//!   ready: datagrams, each with its messages ... | open: the datagram that still takes messages
//!   <--------- to be sent now ------------------>|<-- until full, or max_delay after its first -->
//! ```
//!
//! Messages lie back to back in the send buffer, each with its separator behind it, so a datagram
//! is a run of whole messages less the last separator, and packing copies nothing. Each message is
//! looked at once, when it is staged; waiting costs nothing. Messages leave from the front only:
//! sent as whole datagrams, or given up one by one.
//!
//! Invariants: the messages of the ready datagrams and of the open one are those of the outbox, in
//! its order. No datagram holds more than `max_bytes`, unless it is one message alone. The open one
//! could take another message of one byte.

use std::collections::VecDeque;
use std::time::Duration;

use crate::timers::Time;

/// One datagram's share of the queue.
#[derive(Debug, Clone, Copy, Default)]
struct Datagram {
    messages: u64,
    /// With the separator behind each message.
    bytes: usize,
}

/// See the module's text.
#[derive(Debug, Clone)]
pub struct Coalescer {
    max_bytes: usize,
    max_delay: Duration,
    separator_bytes: usize,
    ready: VecDeque<Datagram>,
    ready_messages: u64,
    open: Datagram,
    /// When the first message of the open datagram was accepted; none while it is only staged.
    opened_at: Option<Time>,
    is_hurried: bool,
}

impl Coalescer {
    /// Nothing to pack yet.
    pub fn new(max_bytes: usize, max_delay: Duration, separator_bytes: usize) -> Self {
        Coalescer {
            max_bytes,
            max_delay,
            separator_bytes,
            ready: VecDeque::new(),
            ready_messages: 0,
            open: Datagram::default(),
            opened_at: None,
            is_hurried: false,
        }
    }

    /// Adds one message of `bytes` with its separator.
    pub fn stage(&mut self, bytes: usize) {
        if self.open.messages > 0 && self.payload_bytes(self.open.bytes + bytes) > self.max_bytes {
            self.close();
        }
        self.open.messages += 1;
        self.open.bytes += bytes;
        // No message is shorter than one byte.
        if self.payload_bytes(self.open.bytes + 1 + self.separator_bytes) > self.max_bytes {
            self.close();
        }
    }

    /// What was staged is accepted.
    pub fn accept(&mut self, now: Time) {
        if self.is_hurried {
            self.close();
        } else if self.open.messages > 0 {
            self.opened_at.get_or_insert(now);
        }
    }

    /// From now on nothing waits for company.
    pub fn hurry(&mut self) {
        self.is_hurried = true;
        self.close();
    }

    /// When [`Coalescer::close_due`] has something to do.
    pub fn due(&self) -> Option<Time> {
        self.opened_at.map(|opened_at| opened_at + self.max_delay)
    }

    /// Closes the open datagram if its first message has waited long enough.
    pub fn close_due(&mut self, now: Time) {
        if self.due().is_some_and(|due| due <= now) {
            self.close();
        }
    }

    /// The datagrams to be sent now, oldest first: their bytes with the last separator.
    pub fn ready(&self) -> impl Iterator<Item = usize> {
        self.ready.iter().map(|datagram| datagram.bytes)
    }

    /// The messages in them.
    pub fn ready_messages(&self) -> u64 {
        self.ready_messages
    }

    /// How many messages go or stay together at the front.
    pub fn front_messages(&self) -> u64 {
        self.ready.front().unwrap_or(&self.open).messages
    }

    /// The first `datagrams` were sent; how many messages they held.
    pub fn handle_sent(&mut self, datagrams: usize) -> u64 {
        let messages = self.ready.drain(..datagrams).map(|datagram| datagram.messages).sum();
        self.ready_messages -= messages;
        messages
    }

    /// Takes one message of `bytes` with its separator off the front.
    pub fn give_up(&mut self, bytes: usize) {
        let datagram = match self.ready.front_mut() {
            Some(datagram) => {
                self.ready_messages -= 1;
                datagram
            }
            None => &mut self.open,
        };
        datagram.messages -= 1;
        datagram.bytes -= bytes;
        if datagram.messages == 0 && self.ready.pop_front().is_none() {
            self.opened_at = None;
        }
    }

    /// What of `bytes` goes into a datagram.
    fn payload_bytes(&self, bytes: usize) -> usize {
        bytes - self.separator_bytes
    }

    fn close(&mut self) {
        if self.open.messages > 0 {
            self.ready_messages += self.open.messages;
            self.ready.push_back(std::mem::take(&mut self.open));
        }
        self.opened_at = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DELAY: Duration = Duration::from_millis(10);

    fn at(milliseconds: u64) -> Time {
        Time::default() + Duration::from_millis(milliseconds)
    }

    fn ready(coalescer: &Coalescer) -> Vec<usize> {
        coalescer.ready().collect()
    }

    #[test]
    fn a_datagram_is_ready_when_the_next_message_does_not_fit() {
        let mut coalescer = Coalescer::new(10, DELAY, 1);
        // 4 and 4 with a separator between are 9: nothing more fits.
        [4, 3].iter().for_each(|len| coalescer.stage(len + 1));
        coalescer.accept(at(0));
        assert_eq!((ready(&coalescer), coalescer.due()), (vec![], Some(at(10))));
        coalescer.stage(2 + 1);
        coalescer.accept(at(5));
        assert_eq!((ready(&coalescer), coalescer.due()), (vec![9], Some(at(15))));
        assert_eq!((coalescer.handle_sent(1), coalescer.front_messages()), (2, 1));
    }

    #[test]
    fn a_full_datagram_and_a_message_that_is_too_long_wait_for_nothing() {
        let mut coalescer = Coalescer::new(9, DELAY, 1);
        [4, 4, 30].iter().for_each(|len| coalescer.stage(len + 1));
        coalescer.accept(at(0));
        assert_eq!((ready(&coalescer), coalescer.due()), (vec![10, 31], None));
        assert_eq!(coalescer.ready_messages(), 3);
    }

    #[test]
    fn the_first_message_of_a_datagram_waits_no_longer_than_max_delay() {
        let mut coalescer = Coalescer::new(100, DELAY, 2);
        coalescer.stage(6);
        coalescer.accept(at(0));
        coalescer.stage(6);
        coalescer.accept(at(9));
        coalescer.close_due(at(9));
        assert!(ready(&coalescer).is_empty());
        coalescer.close_due(at(10));
        assert_eq!((ready(&coalescer), coalescer.due()), (vec![12], None));
    }

    #[test]
    fn in_a_hurry_nothing_waits() {
        let mut coalescer = Coalescer::new(100, DELAY, 1);
        coalescer.stage(6);
        coalescer.accept(at(0));
        coalescer.hurry();
        assert_eq!(ready(&coalescer), [6]);
        coalescer.stage(7);
        coalescer.accept(at(1));
        assert_eq!((ready(&coalescer), coalescer.due()), (vec![6, 7], None));
    }

    #[derive(Debug, Clone)]
    enum Op {
        Accept(Vec<usize>),
        Pass(u64),
        Send(usize),
        GiveUp(usize),
    }

    fn any_op() -> impl Strategy<Value = Op> {
        prop_oneof![
            proptest::collection::vec(1usize..30, 1..6).prop_map(Op::Accept),
            (0u64..8).prop_map(Op::Pass),
            (0usize..3).prop_map(Op::Send),
            (0usize..4).prop_map(Op::GiveUp),
        ]
    }

    proptest! {
        /// The model keeps each message with its moment, and asks of each datagram that goes
        /// whether it had to go, and of those that stay whether they may.
        #[test]
        fn every_datagram_goes_when_it_must_and_not_before(
            separator in 0usize..3,
            max_bytes in 1usize..40,
            ops in proptest::collection::vec(any_op(), 0..80),
        ) {
            let mut coalescer = Coalescer::new(max_bytes, DELAY, separator);
            let mut messages: VecDeque<(usize, Time)> = VecDeque::new();
            let mut now = at(1);
            let mut gave_up = false;
            for op in ops {
                match op {
                    Op::Accept(lens) => {
                        for len in lens {
                            coalescer.stage(len + separator);
                            messages.push_back((len + separator, now));
                        }
                        coalescer.accept(now);
                    }
                    Op::Pass(milliseconds) => now = now + Duration::from_millis(milliseconds),
                    Op::Send(datagrams) => {
                        for bytes in ready(&coalescer).into_iter().take(datagrams) {
                            let count = coalescer.handle_sent(1);
                            let gone: Vec<_> = messages.drain(..count as usize).collect();
                            prop_assert_eq!(gone.iter().map(|(len, _)| len).sum::<usize>(), bytes);
                            let payload = bytes - separator;
                            prop_assert!(payload <= max_bytes || count == 1);
                            let next = messages.front().map_or(1 + separator, |(len, _)| *len);
                            let is_due = gone[0].1 + DELAY <= now;
                            // Fewer bytes than when it was found full, once some were given up.
                            prop_assert!(is_due || gave_up || bytes + next - separator > max_bytes);
                        }
                    }
                    Op::GiveUp(count) => {
                        for (bytes, _) in messages.drain(..count.min(messages.len())) {
                            coalescer.give_up(bytes);
                            gave_up = true;
                        }
                    }
                }
                coalescer.close_due(now);
                let open = coalescer.open;
                prop_assert_eq!(coalescer.ready_messages() + open.messages, messages.len() as u64);
                let total = ready(&coalescer).into_iter().sum::<usize>() + open.bytes;
                prop_assert_eq!(total, messages.iter().map(|(len, _)| len).sum::<usize>());
                prop_assert_eq!(coalescer.due().is_some(), open.messages > 0);
                prop_assert!(coalescer.due().is_none_or(|due| due > now));
                let first = messages.get(messages.len() - open.messages as usize);
                if let (Some((_, accepted_at)), Some(due)) = (first, coalescer.due()) {
                    prop_assert!(due <= *accepted_at + DELAY, "never later");
                    prop_assert!(open.bytes < max_bytes, "one byte more has room");
                }
            }
        }
    }
}
