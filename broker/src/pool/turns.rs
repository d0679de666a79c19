//! Whose turn it is among those that wait: each user's in turn, and a user's own in the order in which
//! they came.
//!
//! A turn is a *round*, and within it the order of coming. A user's next one is in the round behind
//! its last, and not before the round that is being served (start-time fair queueing, Goyal, Vin and
//! Cheng 1996, with a cost of one): whoever has a thousand waiting keeps another user waiting for one
//! of them, and not for all.

use std::collections::{BTreeMap, BTreeSet};

/// When something is served: before all that have a greater one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Turn {
    round: i64,
    came: u64,
}

/// The turns that were given and not yet taken or given up.
#[derive(Debug, Default)]
pub(super) struct Turns {
    users: BTreeMap<u32, User>,
    /// The one that was last served.
    round: i64,
    /// Before the first one.
    front: i64,
    came: u64,
}

#[derive(Debug, Default)]
struct User {
    turns: BTreeSet<Turn>,
    last_round: i64,
}

impl Turns {
    /// The next one of this user.
    pub(super) fn push_back(&mut self, uid: u32) -> Turn {
        let user = self.users.entry(uid).or_default();
        user.last_round = self.round.max(user.last_round + 1);
        let round = user.last_round;
        self.push(uid, round)
    }

    /// One before all others.
    pub(super) fn push_front(&mut self, uid: u32) -> Turn {
        self.front -= 1;
        self.push(uid, self.front)
    }

    fn push(&mut self, uid: u32, round: i64) -> Turn {
        self.came += 1;
        let turn = Turn { round, came: self.came };
        self.users.entry(uid).or_default().turns.insert(turn);
        turn
    }

    /// Whoever has this one is served.
    pub(super) fn take(&mut self, uid: u32, turn: Turn) {
        self.round = self.round.max(turn.round);
        self.remove(uid, turn);
    }

    /// It is given up.
    pub(super) fn remove(&mut self, uid: u32, turn: Turn) {
        if let Some(user) = self.users.get_mut(&uid) {
            user.turns.remove(&turn);
            if user.turns.is_empty() {
                self.users.remove(&uid);
            }
        }
    }

    /// All of them are given up.
    pub(super) fn clear(&mut self) {
        self.users.clear();
    }

    /// The first one of each user.
    pub(super) fn firsts(&self) -> impl Iterator<Item = Turn> {
        self.users.values().filter_map(|user| user.turns.first().copied())
    }

    /// Where there is no room for one more, the one that makes it for a newcomer of this user: the last
    /// of whoever has most, if that is more than the newcomer's user would have.
    pub(super) fn makes_way_for(&self, uid: u32) -> Option<Turn> {
        let mine = self.users.get(&uid).map_or(0, |user| user.turns.len());
        let greediest = self.users.values().max_by_key(|user| user.turns.len())?;
        greediest.turns.last().copied().filter(|_| greediest.turns.len() > mine + 1)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_user_with_many_keeps_another_waiting_for_one_of_them() {
        let mut turns = Turns::default();
        let mut all: BTreeMap<Turn, u32> = (0..5).map(|_| (turns.push_back(1), 1)).collect();
        let serve = |turns: &mut Turns, all: &mut BTreeMap<Turn, u32>| {
            let (turn, uid) = all.pop_first().unwrap();
            turns.take(uid, turn);
            uid
        };
        assert_eq!([(); 2].map(|()| serve(&mut turns, &mut all)), [1, 1]);
        all.extend((0..3).map(|_| (turns.push_back(2), 2)));
        assert_eq!([(); 6].map(|()| serve(&mut turns, &mut all)), [2, 1, 2, 1, 2, 1]);
        // Having waited for nothing in the meantime is no merit.
        all.extend((0..2).map(|_| (turns.push_back(3), 3)));
        all.extend((0..2).map(|_| (turns.push_back(1), 1)));
        assert_eq!([(); 4].map(|()| serve(&mut turns, &mut all)), [3, 1, 3, 1]);
        all.insert(turns.push_back(1), 1);
        all.insert(turns.push_front(2), 2);
        assert_eq!([(); 2].map(|()| serve(&mut turns, &mut all)), [2, 1]);
    }

    #[test]
    fn whoever_has_most_makes_way_and_only_then() {
        let mut turns = Turns::default();
        assert_eq!(turns.makes_way_for(1), None);
        let mine: Vec<_> = (0..3).map(|_| turns.push_back(1)).collect();
        assert_eq!(turns.makes_way_for(1), None, "nobody else has more");
        assert_eq!(turns.makes_way_for(2), Some(mine[2]));
        turns.remove(1, mine[2]);
        turns.push_back(2);
        assert_eq!(turns.makes_way_for(2), None, "as many as the other");
    }

    proptest! {
        /// While two users have something waiting, neither is served twice more than the other.
        #[test]
        fn users_are_served_alike(steps in proptest::collection::vec((0u32..3, 0u32..3), 1..200)) {
            let mut turns = Turns::default();
            let mut all: BTreeMap<Turn, u32> = BTreeMap::new();
            // Served since both began to wait.
            let mut served = [[0i64; 3]; 3];
            for (kind, uid) in steps {
                if kind < 2 {
                    all.insert(turns.push_back(uid), uid);
                } else if let Some((turn, uid)) = all.pop_first() {
                    turns.take(uid, turn);
                    served[uid as usize].iter_mut().for_each(|count| *count += 1);
                }
                for (one, other) in [(0, 1), (0, 2), (1, 2)] {
                    let waits = |uid: usize| all.values().any(|of| *of as usize == uid);
                    if !waits(one) || !waits(other) {
                        (served[one][other], served[other][one]) = (0, 0);
                    }
                    let difference = served[one][other] - served[other][one];
                    prop_assert!(difference.abs() <= 2, "{one} and {other}: {difference}");
                }
            }
        }
    }
}
