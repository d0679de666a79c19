//! Whose turn it is among those that wait: each user's in turn, and a user's own in the order in which
//! they came.
//!
//! A user has a *tag*: the round in which it is served next. Whoever begins to wait is in the present
//! round, and in the one behind it once it was served; what is given up changes nothing. So whoever
//! has a thousand waiting keeps another user waiting for one of them, whatever becomes of the rest.
//! Requests and leases share the rounds.

use std::collections::BTreeMap;

/// When something is served: before all that have a greater one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Turn {
    tag: i64,
    came: i64,
}

/// The users' tags, and what is needed to give them.
#[derive(Debug, Default)]
pub(super) struct Turns {
    users: BTreeMap<u32, User>,
    /// That of who was last served.
    round: i64,
    came: i64,
    front: i64,
}

#[derive(Debug, Default)]
struct User {
    tag: i64,
    waiting: usize,
}

impl Turns {
    /// Something of this user begins to wait; when it came.
    pub(super) fn begin(&mut self, uid: u32) -> i64 {
        let user = self.users.entry(uid).or_default();
        if user.waiting == 0 {
            user.tag = user.tag.max(self.round);
        }
        user.waiting += 1;
        self.came += 1;
        self.came
    }

    /// The same, before everything else.
    pub(super) fn begin_first(&mut self, uid: u32) -> i64 {
        self.begin(uid);
        self.front -= 1;
        self.front
    }

    /// Something is not waited for any more.
    pub(super) fn end(&mut self, uid: u32) {
        if let Some(user) = self.users.get_mut(&uid) {
            user.waiting -= 1;
            if user.waiting == 0 && user.tag <= self.round {
                self.users.remove(&uid);
            }
        }
    }

    /// Something that waited is served.
    pub(super) fn serve(&mut self, uid: u32) {
        let Some(user) = self.users.get_mut(&uid) else { return };
        let is_new = user.tag > self.round;
        self.round = self.round.max(user.tag);
        user.tag = self.round + 1;
        self.end(uid);
        if is_new {
            let round = self.round;
            self.users.retain(|_, user| user.waiting > 0 || user.tag > round);
        }
    }

    fn turn_of(&self, uid: u32, came: i64) -> Turn {
        let tag = match came < 0 {
            true => i64::MIN,
            false => self.users.get(&uid).map_or(self.round, |user| user.tag),
        };
        Turn { tag, came }
    }
}

/// Things that wait, each of a user and known by when it came.
#[derive(Debug)]
pub(super) struct Queue<T> {
    users: BTreeMap<u32, BTreeMap<i64, T>>,
    len: usize,
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Queue { users: BTreeMap::new(), len: 0 }
    }
}

impl<T: Copy> Queue<T> {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn push(&mut self, uid: u32, came: i64, thing: T) {
        self.users.entry(uid).or_default().insert(came, thing);
        self.len += 1;
    }

    pub(super) fn remove(&mut self, uid: u32, came: i64) {
        let Some(own) = self.users.get_mut(&uid) else { return };
        self.len -= usize::from(own.remove(&came).is_some());
        if own.is_empty() {
            self.users.remove(&uid);
        }
    }

    pub(super) fn clear(&mut self) {
        *self = Queue::default();
    }

    pub(super) fn all(&self) -> Vec<T> {
        self.users.values().flat_map(BTreeMap::values).copied().collect()
    }

    /// What is served next, of the users that may be.
    pub(super) fn first(&self, turns: &Turns, may: impl Fn(u32) -> bool) -> Option<(Turn, T)> {
        let users = self.users.iter().filter(|(uid, _)| may(**uid));
        let firsts = users.filter_map(|(uid, own)| {
            let (came, thing) = own.first_key_value()?;
            Some((turns.turn_of(*uid, *came), *thing))
        });
        firsts.min_by_key(|(turn, _)| *turn)
    }

    /// What waits longest of each user.
    pub(super) fn oldest(&self) -> impl Iterator<Item = T> {
        self.users.values().filter_map(|own| own.first_key_value()).map(|(_, thing)| *thing)
    }

    /// How many there are of each user.
    pub(super) fn counts(&self) -> impl Iterator<Item = (u32, usize)> {
        self.users.iter().map(|(uid, own)| (*uid, own.len()))
    }

    /// What came last of a user, and when.
    pub(super) fn last_of(&self, uid: u32) -> Option<(i64, T)> {
        self.users.get(&uid)?.last_key_value().map(|(came, thing)| (*came, *thing))
    }
}

/// Where there is no room for one more, whose last one makes it for a newcomer of this user: that of
/// whoever has most, if that is more than the newcomer's user would have.
pub(super) fn makes_way_for(uid: u32, counts: impl Iterator<Item = (u32, usize)>) -> Option<u32> {
    let mut sums = BTreeMap::<u32, usize>::new();
    counts.for_each(|(uid, count)| *sums.entry(uid).or_default() += count);
    let mine = sums.get(&uid).copied().unwrap_or_default();
    let (greediest, most) = sums.into_iter().max_by_key(|(_, count)| *count)?;
    (most > mine + 1).then_some(greediest)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// One queue, served as a pool does it.
    #[derive(Default)]
    struct Line {
        turns: Turns,
        queue: Queue<(u32, i64)>,
    }

    impl Line {
        fn push(&mut self, uid: u32) {
            let came = self.turns.begin(uid);
            self.queue.push(uid, came, (uid, came));
        }

        fn serve(&mut self) -> Option<u32> {
            let (_, (uid, came)) = self.queue.first(&self.turns, |_| true)?;
            self.queue.remove(uid, came);
            self.turns.serve(uid);
            Some(uid)
        }

        fn give_up(&mut self, uid: u32) {
            if let Some((came, _)) = self.queue.last_of(uid) {
                self.queue.remove(uid, came);
                self.turns.end(uid);
            }
        }

        fn waiting(&self, uid: u32) -> usize {
            self.queue.counts().find(|(of, _)| *of == uid).map_or(0, |(_, count)| count)
        }
    }

    #[test]
    fn a_user_with_many_keeps_another_waiting_for_one_of_them() {
        let mut line = Line::default();
        (0..5).for_each(|_| line.push(1));
        assert_eq!([(); 2].map(|()| line.serve()), [Some(1); 2]);
        (0..3).for_each(|_| line.push(2));
        assert_eq!([(); 6].map(|()| line.serve().unwrap()), [2, 1, 2, 1, 2, 1]);
        assert!(line.turns.users.len() <= 1, "{:?}", line.turns);
    }

    #[test]
    fn who_has_one_waiting_at_a_time_does_not_overtake_for_ever() {
        let mut line = Line::default();
        (0..100).for_each(|_| line.push(1));
        let mut served = [0; 3];
        for _ in 0..50 {
            line.push(2);
            for _ in 0..2 {
                served[line.serve().unwrap() as usize] += 1;
            }
        }
        assert_eq!(served, [0, 50, 50]);
    }

    #[test]
    fn what_was_given_up_counts_for_nothing() {
        let mut line = Line::default();
        (0..1_000).for_each(|_| line.push(1));
        (0..999).for_each(|_| line.give_up(1));
        line.push(2);
        line.push(2);
        let order = std::iter::from_fn(|| line.serve()).collect::<Vec<_>>();
        assert_eq!(order, [1, 2, 2]);
    }

    #[test]
    fn in_overload_whoever_asks_more_still_has_its_share() {
        let (mut line, mut served) = (Line::default(), [0; 3]);
        let mut asked = std::collections::VecDeque::new();
        // One is served per tick; user 1 asks three times as often, and everybody waits 100 ticks.
        for tick in 0..5_000 {
            for uid in [1, 1, 1, 2] {
                line.push(uid);
                asked.push_back((tick, uid, line.turns.came));
            }
            while let Some((at, uid, came)) = asked.front().copied()
                && at + 100 <= tick
            {
                asked.pop_front();
                let before = line.queue.len();
                line.queue.remove(uid, came);
                (line.queue.len()..before).for_each(|_| line.turns.end(uid));
            }
            if let Some(uid) = line.serve() {
                served[uid as usize] += 1;
            }
        }
        assert!(served[1] >= 2_400 && served[2] >= 2_400, "{served:?}");
    }

    #[test]
    fn whoever_has_most_makes_way_and_only_then() {
        assert_eq!(makes_way_for(1, [].into_iter()), None);
        assert_eq!(makes_way_for(1, [(1, 3)].into_iter()), None, "nobody else has more");
        assert_eq!(makes_way_for(2, [(1, 1), (1, 2)].into_iter()), Some(1));
        assert_eq!(makes_way_for(2, [(1, 2), (2, 1)].into_iter()), None, "as many as the other");
    }

    proptest! {
        /// While two users have something waiting, whatever they give up, neither is served much more
        /// often than the other.
        #[test]
        fn users_are_served_alike(steps in proptest::collection::vec((0u32..6, 0u32..3), 1..300)) {
            let mut line = Line::default();
            // Since both began to wait.
            let mut served = [[0i64; 3]; 3];
            for (kind, uid) in steps {
                match kind {
                    0..3 => line.push(uid),
                    3 => line.give_up(uid),
                    _ => if let Some(uid) = line.serve() {
                        served[uid as usize].iter_mut().for_each(|count| *count += 1);
                    }
                }
                for (one, other) in [(0, 1), (0, 2), (1, 2)] {
                    if line.waiting(one) == 0 || line.waiting(other) == 0 {
                        let (one, other) = (one as usize, other as usize);
                        (served[one][other], served[other][one]) = (0, 0);
                    }
                    let (one, other) = (one as usize, other as usize);
                    let difference = served[one][other] - served[other][one];
                    prop_assert!(difference.abs() <= 2, "{one} and {other}: {difference}");
                }
            }
            // Whoever comes and goes is forgotten.
            while line.serve().is_some() {}
            prop_assert!(line.turns.users.values().all(|user| user.waiting == 0));
        }
    }
}
