//! What was taken out of a ring and is not given back yet, because it has no outcome.
//!
//! A ring's records stay where they are until their messages have outcomes: that is what the next
//! broker finds if this one dies. The room goes back in the order of the ring, while outcomes come
//! in any order between upstreams; within one upstream they come in order, since all messages of a
//! session use one lane. Consecutive records of one length to one upstream are one entry. Pure.

use std::collections::VecDeque;

/// Records of a ring between being taken and being released.
#[derive(Debug, Default)]
pub struct Window {
    entries: VecDeque<Entry>,
    unsettled: usize,
    bytes: usize,
}

/// Records of equal length to one upstream; the first `settled` of them have their outcome.
#[derive(Debug)]
struct Entry {
    upstream: usize,
    ring_bytes: usize,
    messages: u64,
    settled: u64,
}

impl Window {
    /// Messages without an outcome.
    pub fn unsettled(&self) -> usize {
        self.unsettled
    }

    /// Bytes of the ring that are not released.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// A message to `upstream` was taken: its record has `ring_bytes`.
    pub fn take(&mut self, upstream: usize, ring_bytes: usize) {
        self.unsettled += 1;
        self.bytes += ring_bytes;
        match self.entries.back_mut() {
            Some(last) if last.upstream == upstream && last.ring_bytes == ring_bytes => {
                last.messages += 1;
            }
            _ => self.entries.push_back(Entry { upstream, ring_bytes, messages: 1, settled: 0 }),
        }
    }

    /// A record was taken that has its outcome already; the bytes to be released now.
    #[must_use]
    pub fn take_settled(&mut self, ring_bytes: usize) -> usize {
        if self.entries.is_empty() {
            return ring_bytes;
        }
        self.bytes += ring_bytes;
        // No upstream has this index, so nothing that settles later is taken for it.
        let entry = Entry { upstream: usize::MAX, ring_bytes, messages: 1, settled: 1 };
        self.entries.push_back(entry);
        0
    }

    /// The oldest `messages` to `upstream` have their outcome; the bytes to be released now.
    #[must_use]
    pub fn settle(&mut self, upstream: usize, mut messages: u64) -> usize {
        for entry in self.entries.iter_mut().filter(|entry| entry.upstream == upstream) {
            let now = messages.min(entry.messages - entry.settled);
            entry.settled += now;
            messages -= now;
            self.unsettled -= usize::try_from(now).unwrap_or(usize::MAX);
            if messages == 0 {
                break;
            }
        }
        let mut released = 0;
        while let Some(front) = self.entries.front_mut() {
            released += front.ring_bytes * usize::try_from(front.settled).unwrap_or(usize::MAX);
            front.messages -= front.settled;
            front.settled = 0;
            if front.messages > 0 {
                break;
            }
            self.entries.pop_front();
        }
        self.bytes -= released;
        released
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug, Clone)]
    enum Op {
        Take { upstream: usize, ring_bytes: usize },
        TakeSettled { ring_bytes: usize },
        Settle { upstream: usize, messages: u64 },
    }

    fn any_op() -> impl Strategy<Value = Op> {
        let ring_bytes = || prop_oneof![Just(32usize), 32..100usize];
        prop_oneof![
            (0..3usize, ring_bytes())
                .prop_map(|(upstream, ring_bytes)| Op::Take { upstream, ring_bytes }),
            ring_bytes().prop_map(|ring_bytes| Op::TakeSettled { ring_bytes }),
            (0..3usize, 1..5u64).prop_map(|(upstream, messages)| Op::Settle { upstream, messages }),
        ]
    }

    proptest! {
        /// Against a list of single records: released is what stands before the first one without
        /// an outcome.
        #[test]
        fn the_room_goes_back_in_order(ops in proptest::collection::vec(any_op(), 0..200)) {
            let mut window = Window::default();
            // Upstream, bytes, whether it has its outcome.
            let mut records: VecDeque<(Option<usize>, usize, bool)> = VecDeque::new();
            for op in ops {
                let released = match op {
                    Op::Take { upstream, ring_bytes } => {
                        records.push_back((Some(upstream), ring_bytes, false));
                        window.take(upstream, ring_bytes);
                        0
                    }
                    Op::TakeSettled { ring_bytes } => {
                        records.push_back((None, ring_bytes, true));
                        window.take_settled(ring_bytes)
                    }
                    Op::Settle { upstream, messages } => {
                        let open = records
                            .iter_mut()
                            .filter(|(to, _, is_settled)| *to == Some(upstream) && !is_settled);
                        let mut count = 0;
                        for record in open.take(messages as usize) {
                            record.2 = true;
                            count += 1;
                        }
                        window.settle(upstream, count)
                    }
                };
                let mut expected = 0;
                while records.front().is_some_and(|(_, _, is_settled)| *is_settled) {
                    expected += records.pop_front().unwrap().1;
                }
                prop_assert_eq!(released, expected);
                let open = records.iter().filter(|(_, _, is_settled)| !is_settled).count();
                prop_assert_eq!(window.unsettled(), open);
                prop_assert_eq!(window.bytes(), records.iter().map(|r| r.1).sum::<usize>());
            }
        }
    }
}
