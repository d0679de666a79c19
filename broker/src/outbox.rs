//! The one-way messages of one lane between acceptance and outcome, as counts and lengths.
//!
//! ```text
//!   window: sent, perhaps not acknowledged | unsent: front (perhaps partly written) ... back
//!   <-------- window_bytes_max ----------->|<------------------ queued --------------------->
//! ```
//!
//! The bytes themselves lie in the send buffer of [`crate::upstream`], in the same order; whoever
//! removes here says how many bytes to remove there. The window remembers just enough of what was
//! sent to say, when a connection ends, which messages its unacknowledged bytes belonged to.
//!
//! Datagrams are sent whole, and need no window. A datagram is one message, or as many as the
//! [`Coalescer`] puts into it.

use std::collections::VecDeque;

use crate::coalesce::Coalescer;
use crate::ids::SourceId;
use crate::timers::Time;

/// Consecutive messages of one source, accepted at one moment.
#[derive(Debug, Clone, Copy)]
struct Run {
    source: SourceId,
    messages: u64,
    accepted_at: Time,
}

/// See the module's text.
#[derive(Debug)]
pub struct Outbox {
    lens: VecDeque<u32>,
    window_messages: usize,
    window_bytes: usize,
    window_bytes_max: usize,
    window_runs: VecDeque<(SourceId, u64)>,
    runs: VecDeque<Run>,
    unsent_messages: u64,
    front_written: usize,
    staged: u64,
    coalescer: Option<Coalescer>,
}

/// Consecutive messages of one source that leave the outbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Leaving {
    /// Whose.
    pub source: SourceId,
    /// How many.
    pub messages: u64,
}

impl Outbox {
    /// An empty outbox that remembers the last `window_bytes_max` bytes sent, and packs datagrams
    /// if it is told how.
    pub fn new(window_bytes_max: usize, coalescer: Option<Coalescer>) -> Self {
        Outbox {
            lens: VecDeque::new(),
            window_messages: 0,
            window_bytes: 0,
            window_bytes_max,
            window_runs: VecDeque::new(),
            runs: VecDeque::new(),
            unsent_messages: 0,
            front_written: 0,
            staged: 0,
            coalescer,
        }
    }

    /// Messages without an outcome.
    pub fn queued(&self) -> u64 {
        self.runs.iter().map(|run| run.messages).sum()
    }

    /// Whether every message has its outcome.
    pub fn is_empty(&self) -> bool {
        self.unsent_messages == 0
    }

    /// Whether part of the front message is written.
    pub fn is_front_torn(&self) -> bool {
        self.front_written > 0
    }

    /// Bytes of the front message that are already written.
    pub fn front_written(&self) -> usize {
        self.front_written
    }

    /// The lengths of the unsent messages, oldest first.
    pub fn unsent_lens(&self) -> impl Iterator<Item = usize> {
        self.lens.range(self.window_messages..).map(|len| *len as usize)
    }

    /// How many messages can be sent now, given a connection.
    pub fn ready_messages(&self) -> u64 {
        self.coalescer.as_ref().map_or(self.unsent_messages, Coalescer::ready_messages)
    }

    /// The lengths of the datagrams that can be sent now, oldest first, with the separator at
    /// their ends; how many fit into `lens`.
    pub fn next_datagrams(&self, lens: &mut [usize]) -> usize {
        fn fill(lens: &mut [usize], from: impl Iterator<Item = usize>) -> usize {
            lens.iter_mut().zip(from).map(|(place, len)| *place = len).count()
        }
        match &self.coalescer {
            Some(coalescer) => fill(lens, coalescer.ready()),
            None => fill(lens, self.unsent_lens()),
        }
    }

    /// When [`Outbox::close_due`] has something to do.
    pub fn datagram_due(&self) -> Option<Time> {
        self.coalescer.as_ref().and_then(Coalescer::due)
    }

    /// Sends off the datagram that waited long enough for more messages.
    pub fn close_due(&mut self, now: Time) {
        if let Some(coalescer) = &mut self.coalescer {
            coalescer.close_due(now);
        }
    }

    /// From now on no message waits for others to share its datagram.
    pub fn hurry(&mut self) {
        if let Some(coalescer) = &mut self.coalescer {
            coalescer.hurry();
        }
    }

    /// When the oldest unsent message was accepted.
    pub fn oldest(&self) -> Option<Time> {
        self.runs.front().map(|run| run.accepted_at)
    }

    /// When the message that [`Outbox::give_up`] would take first was accepted.
    pub fn oldest_whole(&self) -> Option<Time> {
        let is_torn_alone = |run: &Run| self.is_front_torn() && run.messages == 1;
        match self.runs.front()? {
            run if is_torn_alone(run) => self.runs.get(1).map(|run| run.accepted_at),
            run => Some(run.accepted_at),
        }
    }

    /// Adds one message of the run that the next [`Outbox::accept`] takes.
    pub fn stage(&mut self, bytes: usize) {
        let len = u32::try_from(bytes).expect("message_bytes_max is far below 4 GiB");
        self.lens.push_back(len);
        self.staged += 1;
        if let Some(coalescer) = &mut self.coalescer {
            coalescer.stage(bytes);
        }
    }

    /// Takes over the staged messages as one run; how many they are.
    pub fn accept(&mut self, now: Time, source: SourceId) -> u64 {
        let messages = std::mem::take(&mut self.staged);
        if messages == 0 {
            return 0;
        }
        self.unsent_messages += messages;
        if let Some(coalescer) = &mut self.coalescer {
            coalescer.accept(now);
        }
        match self.runs.back_mut() {
            Some(last) if last.source == source && last.accepted_at == now => {
                last.messages += messages;
            }
            _ => self.runs.push_back(Run { source, messages, accepted_at: now }),
        }
        messages
    }

    /// `bytes` more were written: the messages that are now complete, and their bytes.
    pub fn handle_written(&mut self, bytes: usize, leaving: &mut Vec<Leaving>) -> usize {
        let mut written = self.front_written + bytes;
        let (mut messages, mut complete) = (0, 0);
        for len in self.unsent_lens() {
            if written < len {
                break;
            }
            written -= len;
            complete += len;
            messages += 1;
        }
        self.front_written = written;
        self.complete(messages, complete, leaving);
        complete
    }

    /// The first `datagrams` were sent; the bytes of their messages.
    pub fn handle_sent(&mut self, datagrams: usize, leaving: &mut Vec<Leaving>) -> usize {
        let messages = match &mut self.coalescer {
            Some(coalescer) => coalescer.handle_sent(datagrams),
            None => datagrams as u64,
        };
        let bytes = self.front_bytes(messages);
        self.complete(messages, bytes, leaving);
        bytes
    }

    /// The messages of the first datagram, which cannot be sent without the others of them.
    pub fn front_datagram_messages(&self) -> u64 {
        self.coalescer.as_ref().map_or(1, Coalescer::front_messages)
    }

    /// The connection ended with `unacknowledged` bytes of what was written to it: whose messages
    /// they belong to. What was written in part starts again at its first byte.
    pub fn handle_connection_end(&mut self, unacknowledged: usize, leaving: &mut Vec<Leaving>) {
        let mut doubtful = unacknowledged.saturating_sub(self.front_written);
        self.front_written = 0;
        let mut messages = 0;
        for len in self.lens.iter().take(self.window_messages).rev() {
            if doubtful == 0 {
                break;
            }
            doubtful = doubtful.saturating_sub(*len as usize);
            messages += 1;
        }
        while messages > 0 {
            let Some((source, count)) = self.window_runs.pop_back() else {
                break;
            };
            let taken = count.min(messages);
            leaving.push(Leaving { source, messages: taken });
            messages -= taken;
        }
        self.lens.drain(..self.window_messages);
        self.window_runs.clear();
        self.window_messages = 0;
        self.window_bytes = 0;
    }

    /// How many messages were accepted at or before `moment`.
    pub fn accepted_until(&self, moment: Time) -> u64 {
        let old = self.runs.iter().take_while(|run| run.accepted_at <= moment);
        old.map(|run| run.messages).sum()
    }

    /// Gives up the oldest `messages` that are not partly written: where their bytes begin in the
    /// send buffer, and how many they are.
    pub fn give_up(&mut self, messages: u64, leaving: &mut Vec<Leaving>) -> (usize, usize) {
        let kept = u64::from(self.is_front_torn());
        let skip = self.front_bytes(kept);
        let first = self.window_messages + usize::try_from(kept).unwrap_or(0);
        let count = messages.min(self.unsent_messages - kept);
        let end = first + usize::try_from(count).unwrap_or(usize::MAX);
        let mut bytes = 0;
        for len in self.lens.drain(first..end) {
            bytes += len as usize;
            if let Some(coalescer) = &mut self.coalescer {
                coalescer.give_up(len as usize);
            }
        }
        self.unsent_messages -= count;
        // The torn message stays at the front of its run.
        let torn = if kept == 1 { self.take_runs(1, &mut Vec::new()) } else { None };
        self.take_runs(count, leaving);
        if let Some(run) = torn {
            self.runs.push_front(Run { messages: 1, ..run });
        }
        (skip, bytes)
    }

    fn front_bytes(&self, messages: u64) -> usize {
        self.unsent_lens().take(usize::try_from(messages).unwrap_or(usize::MAX)).sum()
    }

    /// Moves the first `messages`, which have `bytes`, from unsent into the window.
    fn complete(&mut self, messages: u64, bytes: usize, leaving: &mut Vec<Leaving>) {
        if messages == 0 {
            return;
        }
        let count = usize::try_from(messages).unwrap_or(usize::MAX);
        let from = leaving.len();
        self.take_runs(messages, leaving);
        self.unsent_messages -= messages;
        if self.window_bytes_max == 0 {
            self.lens.drain(..count);
            return;
        }
        self.window_messages += count;
        self.window_bytes += bytes;
        for left in &leaving[from..] {
            match self.window_runs.back_mut() {
                Some((source, count)) if *source == left.source => *count += left.messages,
                _ => self.window_runs.push_back((left.source, left.messages)),
            }
        }
        while self.window_messages > 0 && self.window_bytes > self.window_bytes_max {
            let len = self.lens.pop_front().unwrap_or(0);
            self.window_messages -= 1;
            self.window_bytes -= len as usize;
            if let Some((_, count)) = self.window_runs.front_mut() {
                *count -= 1;
                if *count == 0 {
                    self.window_runs.pop_front();
                }
            }
        }
    }

    /// Takes `messages` off the front of the runs; the last run touched.
    fn take_runs(&mut self, mut messages: u64, leaving: &mut Vec<Leaving>) -> Option<Run> {
        let mut last = None;
        while messages > 0 {
            let run = self.runs.front_mut()?;
            let taken = run.messages.min(messages);
            leaving.push(Leaving { source: run.source, messages: taken });
            last = Some(*run);
            run.messages -= taken;
            messages -= taken;
            if run.messages == 0 {
                self.runs.pop_front();
            }
        }
        last
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use slotmap::SlotMap;
    use std::time::Duration;

    const WINDOW_BYTES: usize = 40;

    #[derive(Debug, Clone)]
    enum Op {
        Accept { source: usize, lens: Vec<usize> },
        Write { bytes: usize },
        Send { messages: usize },
        GiveUp { messages: u64 },
        End { unacknowledged: usize },
    }

    fn any_op() -> impl Strategy<Value = Op> {
        prop_oneof![
            (0usize..3, proptest::collection::vec(1usize..12, 1..6))
                .prop_map(|(source, lens)| Op::Accept { source, lens }),
            (0usize..30).prop_map(|bytes| Op::Write { bytes }),
            (0usize..4).prop_map(|messages| Op::Send { messages }),
            (0u64..4).prop_map(|messages| Op::GiveUp { messages }),
            (0usize..30).prop_map(|unacknowledged| Op::End { unacknowledged }),
        ]
    }

    fn flat(leaving: &[Leaving]) -> Vec<SourceId> {
        leaving.iter().flat_map(|left| vec![left.source; left.messages as usize]).collect()
    }

    proptest! {
        /// The model keeps one entry per message: whose and how long.
        #[test]
        fn behaves_as_a_plain_queue_of_messages(ops in proptest::collection::vec(any_op(), 0..60)) {
            let mut keys: SlotMap<SourceId, ()> = SlotMap::with_key();
            let sources: Vec<_> = (0..3).map(|_| keys.insert(())).collect();
            let mut outbox = Outbox::new(WINDOW_BYTES, None);
            let mut unsent: VecDeque<(SourceId, usize)> = VecDeque::new();
            let mut sent: Vec<(SourceId, usize)> = Vec::new();
            let mut torn = 0;
            for (turn, op) in ops.into_iter().enumerate() {
                let now = Time::default() + Duration::from_millis(turn as u64);
                let mut leaving = Vec::new();
                match op {
                    Op::Accept { source, lens } => {
                        for len in &lens {
                            outbox.stage(*len);
                            unsent.push_back((sources[source], *len));
                        }
                        prop_assert_eq!(outbox.accept(now, sources[source]), lens.len() as u64);
                    }
                    Op::Write { bytes } => {
                        let bytes = bytes.min(outbox.unsent_lens().sum::<usize>() - torn);
                        let complete = outbox.handle_written(bytes, &mut leaving);
                        torn += bytes;
                        let (mut expected, mut expected_bytes) = (vec![], 0);
                        while unsent.front().is_some_and(|(_, len)| *len <= torn) {
                            let message = unsent.pop_front().unwrap();
                            torn -= message.1;
                            expected_bytes += message.1;
                            expected.push(message.0);
                            sent.push(message);
                        }
                        prop_assert_eq!(flat(&leaving), expected);
                        prop_assert_eq!(complete, expected_bytes);
                    }
                    Op::Send { messages } => {
                        if torn > 0 { continue; }
                        let messages = messages.min(unsent.len());
                        let bytes = outbox.handle_sent(messages, &mut leaving);
                        let gone: Vec<_> = unsent.drain(..messages).collect();
                        prop_assert_eq!(bytes, gone.iter().map(|(_, len)| len).sum::<usize>());
                        prop_assert_eq!(flat(&leaving), gone.iter().map(|(s, _)| *s).collect::<Vec<_>>());
                        sent.extend(gone);
                    }
                    Op::GiveUp { messages } => {
                        let first = usize::from(torn > 0);
                        let skip: usize = unsent.iter().take(first).map(|(_, len)| len).sum();
                        let end = unsent.len().min(first + messages as usize);
                        let gone: Vec<_> = unsent.drain(first.min(end)..end).collect();
                        let expected = (skip, gone.iter().map(|(_, len)| len).sum::<usize>());
                        prop_assert_eq!(outbox.give_up(messages, &mut leaving), expected);
                        prop_assert_eq!(flat(&leaving), gone.iter().map(|(s, _)| *s).collect::<Vec<_>>());
                    }
                    Op::End { unacknowledged } => {
                        let mut window = 0;
                        let recent = sent.iter().rev().take_while(|(_, len)| {
                            window += len;
                            window <= WINDOW_BYTES
                        });
                        let mut doubtful = unacknowledged.saturating_sub(torn);
                        let mut expected = vec![];
                        for (source, len) in recent {
                            if doubtful == 0 { break; }
                            doubtful = doubtful.saturating_sub(*len);
                            expected.push(*source);
                        }
                        outbox.handle_connection_end(unacknowledged, &mut leaving);
                        prop_assert_eq!(flat(&leaving), expected);
                        sent.clear();
                        torn = 0;
                    }
                }
                prop_assert_eq!(outbox.queued(), unsent.len() as u64);
                prop_assert_eq!(outbox.is_empty(), unsent.is_empty());
                prop_assert_eq!(outbox.front_written(), torn);
                prop_assert_eq!(
                    outbox.unsent_lens().collect::<Vec<_>>(),
                    unsent.iter().map(|(_, len)| *len).collect::<Vec<_>>()
                );
            }
        }
    }

    #[test]
    fn only_what_was_accepted_early_enough_has_expired() {
        let mut keys: SlotMap<SourceId, ()> = SlotMap::with_key();
        let source = keys.insert(());
        let mut outbox = Outbox::new(0, None);
        let at = |ms| Time::default() + Duration::from_millis(ms);
        for ms in [1, 2, 2, 3] {
            outbox.stage(1);
            outbox.accept(at(ms), source);
        }
        assert_eq!(outbox.oldest(), Some(at(1)));
        assert_eq!(outbox.accepted_until(at(2)), 3);
        assert_eq!(outbox.accepted_until(at(0)), 0);
    }

    #[test]
    fn the_oldest_that_is_whole_stands_behind_a_torn_one() {
        let mut keys: SlotMap<SourceId, ()> = SlotMap::with_key();
        let source = keys.insert(());
        let mut outbox = Outbox::new(WINDOW_BYTES, None);
        let at = |ms| Time::default() + Duration::from_millis(ms);
        for ms in [1, 2] {
            outbox.stage(5);
            outbox.accept(at(ms), source);
        }
        assert_eq!(outbox.oldest_whole(), Some(at(1)));
        outbox.handle_written(2, &mut Vec::new());
        assert_eq!((outbox.oldest(), outbox.oldest_whole()), (Some(at(1)), Some(at(2))));
    }

    #[test]
    fn datagrams_leave_with_all_their_messages() {
        let mut keys: SlotMap<SourceId, ()> = SlotMap::with_key();
        let source = keys.insert(());
        let coalescer = Coalescer::new(10, Duration::from_millis(1), 1);
        let mut outbox = Outbox::new(0, Some(coalescer));
        [5, 5, 4, 3, 2].iter().for_each(|bytes| outbox.stage(*bytes));
        outbox.accept(Time::default(), source);
        let mut lens = [0; 4];
        assert_eq!((outbox.next_datagrams(&mut lens), lens), (1, [10, 0, 0, 0]));
        assert_eq!((outbox.ready_messages(), outbox.queued()), (2, 5));
        outbox.close_due(Time::default() + Duration::from_millis(1));
        assert_eq!((outbox.next_datagrams(&mut lens), lens), (2, [10, 9, 0, 0]));
        let mut leaving = Vec::new();
        assert_eq!(outbox.handle_sent(1, &mut leaving), 10);
        assert_eq!(outbox.front_datagram_messages(), 3);
        assert_eq!(outbox.give_up(1, &mut leaving), (0, 4));
        assert_eq!((outbox.next_datagrams(&mut lens), lens[0]), (1, 5));
        assert_eq!(outbox.handle_sent(1, &mut leaving), 5);
        assert!(outbox.is_empty());
        assert_eq!(flat(&leaving).len(), 5);
    }
}
