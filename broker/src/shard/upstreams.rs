//! The upstreams of a shard, and which of them the loop has to look at.
//!
//! Whoever borrows an upstream to change it *stirs* it: it works at the end of the turn, and its
//! deadline is read again before the loop waits. One that nothing stirs costs a turn nothing.

use std::collections::HashMap;
use std::ops::{Index, IndexMut};

use super::outlet::Upstream;
use crate::timers::Time;

/// See the module's text.
#[derive(Debug)]
pub struct Upstreams {
    list: Vec<Upstream>,
    by_name: HashMap<String, usize>,
    /// When each is due, as of the last [`Upstreams::settle`]; side by side, to be searched fast.
    due: Vec<Time>,
    is_stirred: Vec<bool>,
    stirred: Vec<usize>,
}

impl Upstreams {
    /// These, all stirred.
    pub fn new(list: Vec<Upstream>) -> Self {
        let mut upstreams = Upstreams {
            list: Vec::new(),
            by_name: HashMap::new(),
            due: Vec::new(),
            is_stirred: Vec::new(),
            stirred: Vec::new(),
        };
        list.into_iter().for_each(|upstream| upstreams.push(upstream));
        upstreams
    }

    /// Adds one, which is stirred.
    pub fn push(&mut self, upstream: Upstream) {
        let index = self.list.len();
        self.by_name.insert(upstream.config.name.clone(), index);
        self.list.push(upstream);
        self.due.push(Time::NEVER);
        self.is_stirred.push(false);
        self.stir(index);
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// The one of that name.
    pub fn find(&self, name: &str) -> Option<usize> {
        self.by_name.get(name).copied()
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Upstream> {
        self.list.iter()
    }

    /// All of them, stirred.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Upstream> {
        (0..self.list.len()).for_each(|index| self.stir(index));
        self.list.iter_mut()
    }

    /// The one that was stirred as number `at` since they were settled.
    pub fn stirred(&self, at: usize) -> Option<usize> {
        self.stirred.get(at).copied()
    }

    /// Lets those rest that have nothing to do now; whether any has.
    pub fn settle(&mut self) -> bool {
        let Upstreams { list, due, is_stirred, stirred, .. } = self;
        stirred.retain(|&index| {
            due[index] = list[index].next_deadline().unwrap_or(Time::NEVER);
            is_stirred[index] = list[index].has_work();
            is_stirred[index]
        });
        !stirred.is_empty()
    }

    /// When the first is due, as they were settled.
    pub fn next_deadline(&self) -> Option<Time> {
        self.due.iter().copied().min().filter(|due| *due < Time::NEVER)
    }

    /// One that is due, as they were settled: each once.
    pub fn pop_due(&mut self, now: Time) -> Option<usize> {
        let index = self.due.iter().position(|due| *due <= now)?;
        self.due[index] = Time::NEVER;
        self.stir(index);
        Some(index)
    }

    fn stir(&mut self, index: usize) {
        if !self.is_stirred[index] {
            self.is_stirred[index] = true;
            self.stirred.push(index);
        }
    }
}

impl Index<usize> for Upstreams {
    type Output = Upstream;

    fn index(&self, index: usize) -> &Upstream {
        &self.list[index]
    }
}

impl IndexMut<usize> for Upstreams {
    fn index_mut(&mut self, index: usize) -> &mut Upstream {
        self.stir(index);
        &mut self.list[index]
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::config::{BrokerLimits, UpstreamConfig};
    use crate::ids::SourceId;
    use crate::inflight::Owner;
    use crate::pool::Acquire;

    fn upstream(index: usize) -> Upstream {
        let url = "udp://127.0.0.1:9".parse().unwrap();
        let config = UpstreamConfig::new(&format!("it-{index}"), url);
        Upstream::new(index, config, &BrokerLimits::default(), 1)
    }

    #[test]
    fn only_what_was_changed_is_looked_at_and_what_is_due_once() {
        let mut upstreams = Upstreams::new((0..3).map(upstream).collect());
        assert_eq!([0, 1, 2, 3].map(|at| upstreams.stirred(at)), [Some(0), Some(1), Some(2), None]);
        assert!(!upstreams.settle(), "they have nothing to do");
        assert_eq!((upstreams.stirred(0), upstreams.next_deadline()), (None, None));

        assert_eq!(upstreams[1].config.name, "it-1");
        assert_eq!(upstreams.stirred(0), None, "reading changes nothing");
        let now = Time::from_start(Duration::from_secs(1));
        let owner = Owner { source: SourceId::default(), uid: 1, correlation: 1 };
        // Without an address it waits.
        let acquired = upstreams[1].pool.request(now, owner, None, false);
        assert!(matches!(acquired, Acquire::Queued { .. }), "{acquired:?}");
        assert_eq!((upstreams.stirred(0), upstreams.stirred(1)), (Some(1), None));
        upstreams.settle();
        let due = upstreams.next_deadline().unwrap();
        assert_eq!(upstreams.pop_due(now), None);
        assert_eq!((upstreams.pop_due(due), upstreams.pop_due(due)), (Some(1), None));
        assert_eq!(upstreams.stirred(0), Some(1));
        assert_eq!([upstreams.find("it-2"), upstreams.find("it-3")], [Some(2), None]);
    }
}
