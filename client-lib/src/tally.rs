//! What became of the messages to each upstream: handed over, told, still to be told. Pure.
//!
//! ```text
//!   handed over = told by brokers + settled without a word + untold yet
//! ```
//!
//! A broker tells totals of its own session. Those of the present one count from `base`; what is
//! new in them is news. A ring outlives its broker, so news can come from one that has ended, and is
//! then kept for the next flush. What the ended one released without telling is known to be sent if
//! none of the ring's messages ended otherwise without having been told; else it is `untold`.

use poolbroker_proto::message::Outcomes;
use poolbroker_proto::reason::Reason;

/// The counts of every upstream of a session, by place.
#[derive(Debug, Default)]
pub(crate) struct Tallies {
    by_place: Vec<Tally>,
    /// Messages of the ring of which was told that they ended otherwise than sent.
    unsent_told: u64,
}

#[derive(Debug, Default)]
struct Tally {
    handle: u16,
    handed_over: u64,
    /// How many of them have an outcome that was told or settled.
    told: u64,
    /// The totals of the present broker's session at the last news.
    base: Outcomes,
    /// Told by a broker that has ended, for the next flush.
    news: Outcomes,
    gap: Gap,
}

/// What a broker that ended left unsaid, until the next flush.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Gap {
    #[default]
    None,
    /// Whatever it released without telling was sent.
    Sent,
    /// Some of what it released was perhaps not sent.
    Unknown,
}

impl Tallies {
    /// Begins to count for one more upstream; returns its place.
    pub fn open(&mut self, handle: u16) -> usize {
        self.by_place.push(Tally { handle, ..Tally::default() });
        self.by_place.len() - 1
    }

    /// Messages handed over to an upstream so far.
    pub fn handed_over(&self, place: usize) -> u64 {
        self.by_place[place].handed_over
    }

    /// Counts further messages as handed over.
    #[inline]
    pub fn hand_over(&mut self, place: usize, messages: u64) {
        self.by_place[place].handed_over += messages;
    }

    /// What is new in `totals`, which account for every message handed over by now.
    pub fn settle(&mut self, place: usize, totals: Outcomes) -> Outcomes {
        let tally = &mut self.by_place[place];
        let news = since(&totals, &tally.base);
        self.unsent_told += unsent(&news);
        tally.told += taken(&news);
        tally.base = totals;
        let mut all = std::mem::take(&mut tally.news);
        merge(&mut all, news);
        let rest = tally.handed_over.saturating_sub(tally.told);
        match std::mem::take(&mut tally.gap) {
            Gap::None => {}
            Gap::Sent => {
                tally.told += rest;
                all.accepted += rest;
                all.sent += rest;
            }
            Gap::Unknown => {
                tally.told += rest;
                all.accepted += rest;
                all.untold += rest;
            }
        }
        all
    }

    /// What `totals` hold beyond those that were settled.
    pub fn news(&self, place: usize, totals: &Outcomes) -> Outcomes {
        since(totals, &self.by_place[place].base)
    }

    /// The broker of a ring has ended, with its last totals per handle if it said goodbye. `unsent`:
    /// how many messages of the ring ended otherwise than sent, in all.
    pub fn broker_ended(&mut self, goodbye: Option<&[(u16, Outcomes)]>, unsent_now: u64) {
        for tally in &mut self.by_place {
            let totals = goodbye.unwrap_or_default().iter().find(|(it, _)| *it == tally.handle);
            let base = std::mem::take(&mut tally.base);
            if let Some((_, totals)) = totals {
                let mut news = since(totals, &base);
                self.unsent_told += unsent(&news);
                tally.told += taken(&news);
                news.untold += news.queued();
                merge(&mut tally.news, news);
            }
        }
        let gap = if unsent_now <= self.unsent_told { Gap::Sent } else { Gap::Unknown };
        for tally in &mut self.by_place {
            if tally.gap != Gap::Unknown {
                tally.gap = gap;
            }
        }
        self.unsent_told = unsent_now;
    }
}

/// How many messages were taken, by these totals.
pub(crate) fn taken(totals: &Outcomes) -> u64 {
    totals.accepted - totals.copies.min(totals.accepted) + totals.refused_total()
}

fn unsent(totals: &Outcomes) -> u64 {
    totals.dropped_total() + totals.expired + totals.refused_total()
}

/// What `totals` holds beyond `earlier` ones of the same handle.
fn since(totals: &Outcomes, earlier: &Outcomes) -> Outcomes {
    let counts = |now: &[(Reason, u64)], before: &[(Reason, u64)]| {
        let count_before = |reason| before.iter().find(|(known, _)| *known == reason);
        now.iter()
            .map(|(reason, count)| {
                let before = count_before(*reason).map_or(0, |(_, count)| *count);
                (*reason, count.saturating_sub(before))
            })
            .filter(|(_, count)| *count > 0)
            .collect()
    };
    Outcomes {
        accepted: totals.accepted.saturating_sub(earlier.accepted),
        copies: totals.copies.saturating_sub(earlier.copies),
        sent: totals.sent.saturating_sub(earlier.sent),
        dropped: counts(&totals.dropped, &earlier.dropped),
        expired: totals.expired.saturating_sub(earlier.expired),
        in_doubt: totals.in_doubt.saturating_sub(earlier.in_doubt),
        refused: counts(&totals.refused, &earlier.refused),
        untold: totals.untold.saturating_sub(earlier.untold),
    }
}

/// Adds the outcomes of further messages.
fn merge(into: &mut Outcomes, from: Outcomes) {
    into.accepted += from.accepted;
    into.copies += from.copies;
    into.sent += from.sent;
    into.expired += from.expired;
    into.in_doubt += from.in_doubt;
    into.untold += from.untold;
    for (counts, news) in [(&mut into.dropped, from.dropped), (&mut into.refused, from.refused)] {
        for (reason, count) in news {
            match counts.iter_mut().find(|(known, _)| *known == reason) {
                Some((_, total)) => *total += count,
                None => counts.push((reason, count)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake_broker::sent_all;

    fn tallies(handed_over: u64) -> Tallies {
        let mut tallies = Tallies::default();
        let place = tallies.open(0);
        tallies.hand_over(place, handed_over);
        tallies
    }

    fn dropped(sent: u64, dropped: u64) -> Outcomes {
        let counts = vec![(Reason::QueueFull, dropped)];
        Outcomes { accepted: sent + dropped, sent, dropped: counts, ..Outcomes::default() }
    }

    #[test]
    fn what_ended_brokers_released_in_silence_was_sent_if_nothing_else_became_of_the_ring() {
        let mut tallies = tallies(10);
        assert_eq!(tallies.settle(0, dropped(2, 1)), dropped(2, 1));
        tallies.broker_ended(None, 1);
        tallies.broker_ended(None, 1);
        assert_eq!(tallies.settle(0, sent_all(4)), sent_all(7));
        assert_eq!(tallies.settle(0, sent_all(4)), Outcomes::default());
    }

    #[test]
    fn it_is_untold_if_something_was_not_sent_and_not_told() {
        let mut tallies = tallies(10);
        tallies.broker_ended(None, 1);
        tallies.broker_ended(None, 1);
        let outcomes = tallies.settle(0, dropped(3, 1));
        assert_eq!((outcomes.accepted, outcomes.sent, outcomes.untold), (10, 3, 6));
        assert_eq!(outcomes.queued(), 0);
        // What the next broker tells is no reason to doubt the one after it.
        tallies.hand_over(0, 2);
        tallies.broker_ended(None, 2);
        assert_eq!(tallies.settle(0, Outcomes::default()), sent_all(2));
    }

    #[test]
    fn a_goodbye_is_exact_and_waits_for_the_next_flush() {
        let mut tallies = tallies(10);
        tallies.settle(0, sent_all(1));
        // Of 9 that are left 3 were sent and 1 dropped; the next broker takes the other 5.
        tallies.broker_ended(Some(&[(0, dropped(4, 1))]), 1);
        let outcomes = tallies.settle(0, sent_all(5));
        assert_eq!(outcomes, dropped(8, 1));
    }
}
