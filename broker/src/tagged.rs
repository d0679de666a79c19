//! Things of a connection, each known by a tag, in the order in which they came.
//!
//! Where replies come in order, tags count up and the next one is at the front: a queue. Where they
//! name an id, the tag is that id, and any may be next: a table. Taking one out never looks at the
//! others.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasherDefault, Hasher};

/// By what a thing is known on its connection.
pub type Tag = u64;

/// Things that are known by a tag.
#[derive(Debug)]
pub enum Tagged<T> {
    /// By tags that count up.
    InOrder(VecDeque<(Tag, T)>),
    /// By random ids.
    ById {
        /// Each with its turn.
        table: HashMap<Tag, (u64, T), BuildHasherDefault<IdHasher>>,
        /// How many came so far.
        turns: u64,
    },
}

impl<T> Tagged<T> {
    /// None yet.
    pub fn new(is_in_order: bool) -> Self {
        match is_in_order {
            true => Tagged::InOrder(VecDeque::new()),
            false => Tagged::ById { table: HashMap::default(), turns: 0 },
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        match self {
            Tagged::InOrder(queue) => queue.len(),
            Tagged::ById { table, .. } => table.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The one that is next, where they stay in order.
    pub fn front(&self) -> Option<&(Tag, T)> {
        match self {
            Tagged::InOrder(queue) => queue.front(),
            Tagged::ById { .. } => None,
        }
    }

    /// The one of that tag.
    pub fn get(&self, tag: Tag) -> Option<&T> {
        match self {
            Tagged::InOrder(queue) => place_of(queue, tag).map(|place| &queue[place].1),
            Tagged::ById { table, .. } => table.get(&tag).map(|(_, thing)| thing),
        }
    }

    /// The same, to be changed.
    pub fn get_mut(&mut self, tag: Tag) -> Option<&mut T> {
        match self {
            Tagged::InOrder(queue) => place_of(queue, tag).map(|place| &mut queue[place].1),
            Tagged::ById { table, .. } => table.get_mut(&tag).map(|(_, thing)| thing),
        }
    }

    /// Adds one, whose tag none of the others has; in order it is above theirs.
    pub fn push(&mut self, tag: Tag, thing: T) {
        match self {
            Tagged::InOrder(queue) => queue.push_back((tag, thing)),
            Tagged::ById { table, turns } => {
                *turns += 1;
                table.insert(tag, (*turns, thing));
            }
        }
    }

    /// Takes out the one of that tag.
    pub fn take(&mut self, tag: Tag) -> Option<T> {
        match self {
            Tagged::InOrder(queue) => {
                let taken = match place_of(queue, tag)? {
                    // What `remove` does in many more steps.
                    0 => queue.pop_front(),
                    place => queue.remove(place),
                };
                taken.map(|(_, thing)| thing)
            }
            Tagged::ById { table, .. } => table.remove(&tag).map(|(_, thing)| thing),
        }
    }

    /// Takes out all of them, in the order in which they came.
    pub fn take_all(&mut self) -> Vec<(Tag, T)> {
        match self {
            Tagged::InOrder(queue) => queue.drain(..).collect(),
            Tagged::ById { table, .. } => {
                let mut all: Vec<_> = table.drain().collect();
                all.sort_unstable_by_key(|(_, (turn, _))| *turn);
                all.into_iter().map(|(tag, (_, thing))| (tag, thing)).collect()
            }
        }
    }

    /// All of them, in the order in which they came.
    pub fn all(&self) -> Vec<(Tag, &T)> {
        match self {
            Tagged::InOrder(queue) => queue.iter().map(|(tag, thing)| (*tag, thing)).collect(),
            Tagged::ById { table, .. } => {
                let mut all: Vec<_> = table.iter().collect();
                all.sort_unstable_by_key(|(_, (turn, _))| *turn);
                all.into_iter().map(|(tag, (_, thing))| (*tag, thing)).collect()
            }
        }
    }
}

/// Where a tag is: mostly at the front, or there no more.
fn place_of<T>(queue: &VecDeque<(Tag, T)>, tag: Tag) -> Option<usize> {
    match queue.front() {
        Some((front, _)) if *front >= tag => (*front == tag).then_some(0),
        _ => queue.binary_search_by_key(&tag, |(tag, _)| *tag).ok(),
    }
}

/// Spreads ids that were drawn at random: nobody else chooses which ones meet in the table.
#[derive(Debug, Default)]
pub struct IdHasher(u64);

impl Hasher for IdHasher {
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u64(self.0 ^ u64::from(*byte)));
    }

    fn write_u64(&mut self, id: u64) {
        // The table looks at the highest bits too, which short ids lack: 2^64 by the golden ratio.
        self.0 = id.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn each_is_found_by_its_tag_and_all_keep_their_order(
            is_in_order in any::<bool>(),
            steps in vec((any::<bool>(), 0usize..40), 0..120),
        ) {
            let mut tagged = Tagged::new(is_in_order);
            let mut model: Vec<(Tag, usize)> = Vec::new();
            for (turn, (adds, index)) in steps.into_iter().enumerate() {
                let drawn = (turn as u64 + 1).wrapping_mul(0xd134_2543_de82_ef95);
                let tag = if is_in_order { turn as u64 } else { drawn };
                if adds {
                    tagged.push(tag, turn);
                    model.push((tag, turn));
                } else if index < model.len() {
                    let (tag, thing) = model.remove(index);
                    prop_assert_eq!(tagged.get(tag), Some(&thing));
                    prop_assert_eq!(tagged.get_mut(tag).copied(), Some(thing));
                    prop_assert_eq!(tagged.take(tag), Some(thing));
                    prop_assert_eq!(tagged.get(tag), None);
                    prop_assert_eq!(tagged.take(tag), None);
                }
                prop_assert_eq!(tagged.front(), model.first().filter(|_| is_in_order));
                prop_assert_eq!(tagged.len(), model.len());
                let known: Vec<_> = model.iter().map(|(tag, thing)| (*tag, thing)).collect();
                prop_assert_eq!(tagged.all(), known);
            }
            prop_assert_eq!(tagged.take_all(), model);
            prop_assert!(tagged.is_empty());
        }
    }
}
