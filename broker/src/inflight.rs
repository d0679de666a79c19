//! Which reply belongs to whom: the requests that await one, and the slots of the connections that
//! carry them.
//!
//! A request is *waiting* for a connection or *on* one. On a connection it has a *slot*, and the
//! slot has a *tag* by which its reply is known:
//!
//! - *in order*: tags count up, and the next reply on a connection belongs to its oldest slot. With
//!   one slot per connection that is the exclusive exchange;
//! - *by id*: the tag is the id that the request carries and its reply repeats. It is drawn at
//!   random among those that are free on the connection, so that nobody can guess it.
//!
//! An entry leaves the table exactly once, when its request has its end; a late event finds no
//! entry and reaches nobody. A slot outlives its request: one that was given up is *abandoned* and
//! swallows its late reply, so that nothing behind it moves up.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use slotmap::{SecondaryMap, SlotMap};

use crate::ids::{ConnId, RequestId, SourceId};
use crate::tagged::{Tag, Tagged};
use crate::timers::Time;

/// So many moments more than two for each slot, and a connection forgets the outdated ones.
const OUTDATED_MAX: usize = 16;

/// Who asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    /// The session.
    pub source: SourceId,
    /// Its user.
    pub uid: u32,
    /// The session's own name for the request.
    pub correlation: u64,
}

/// How replies find their slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Matching {
    /// By their order.
    InOrder,
    /// By an id.
    ById {
        /// Ids are below this.
        ids: u64,
    },
}

/// One request that has not ended.
#[derive(Debug, Clone, Copy)]
pub struct Request {
    /// Who asked.
    pub owner: Owner,
    /// When it was asked.
    pub asked_at: Time,
    /// The caller's own deadline.
    pub caller_deadline: Option<Time>,
    /// Its connection ends with it, and takes nothing behind it.
    pub is_last: bool,
    /// How often it was put on a connection that was lost before its reply came.
    pub retries: u32,
    /// Where it is.
    pub place: Place,
}

/// Where a request is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Among the waiters, until the deadline.
    Waiting {
        /// The earlier of `wait_timeout` and the caller's deadline.
        deadline: Time,
    },
    /// In a slot of a connection.
    On {
        /// Which.
        conn: ConnId,
        /// Which slot.
        tag: Tag,
    },
}

/// What happens to a slot by itself, and when.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Times {
    /// The request ends: the earlier of `request_timeout` and the caller's deadline.
    pub deadline: Time,
    /// Nobody expects the reply any more, whether somebody awaits it or not.
    pub hopeless_at: Time,
    /// The request is sent again, and so many times after that.
    pub resend: Option<(Time, u32)>,
}

/// One request on a connection, or what is left of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    /// Who awaits the reply; none: it was given up.
    pub request: Option<RequestId>,
    /// When something happens to it.
    pub times: Times,
}

impl Slot {
    fn due(&self) -> Time {
        match (self.request, self.times.resend) {
            (None, _) => self.times.hopeless_at,
            (Some(_), None) => self.times.deadline,
            (Some(_), Some((resend_at, _))) => self.times.deadline.min(resend_at),
        }
    }
}

#[derive(Debug)]
struct Slots {
    tagged: Tagged<Slot>,
    awaited: usize,
    next_tag: Tag,
    /// When each slot is due, and moments that are outdated: of slots that are gone, or that are
    /// due at another one.
    dues: BinaryHeap<Reverse<(Time, Tag)>>,
}

impl Slots {
    fn new(matching: Matching) -> Self {
        Slots {
            tagged: Tagged::new(matching == Matching::InOrder),
            awaited: 0,
            next_tag: 0,
            dues: BinaryHeap::new(),
        }
    }

    /// A slot is due at another moment than before.
    fn expect(&mut self, tag: Tag, due: Time) {
        self.dues.push(Reverse((due, tag)));
        if self.dues.len() > 2 * self.tagged.len() + OUTDATED_MAX {
            let Slots { dues, tagged, .. } = self;
            dues.retain(|Reverse((due, tag))| {
                tagged.get(*tag).is_some_and(|slot| slot.due() == *due)
            });
        }
    }

    /// Changes a slot, if it is there.
    fn change(&mut self, tag: Tag, change: impl FnOnce(&mut Slot)) {
        if let Some(slot) = self.tagged.get_mut(tag) {
            let before = slot.due();
            change(slot);
            let due = slot.due();
            if due != before && due != Time::NEVER {
                self.expect(tag, due);
            }
        }
    }
}

/// The requests of one upstream that have not ended.
#[derive(Debug)]
pub struct InFlight {
    matching: Matching,
    requests: SlotMap<RequestId, Request>,
    conns: SecondaryMap<ConnId, Slots>,
    random: fastrand::Rng,
}

impl InFlight {
    /// Nothing in flight; `seed` makes the ids.
    pub fn new(matching: Matching, seed: u64) -> Self {
        InFlight {
            matching,
            requests: SlotMap::with_key(),
            conns: SecondaryMap::new(),
            random: fastrand::Rng::with_seed(seed),
        }
    }

    /// How many requests have not ended.
    pub fn len(&self) -> usize {
        self.requests.len()
    }

    /// The request, while it has not ended.
    pub fn get(&self, request: RequestId) -> Option<&Request> {
        self.requests.get(request)
    }

    /// Every request.
    pub fn ids(&self) -> Vec<RequestId> {
        self.requests.keys().collect()
    }

    /// How many slots a connection has, and in how many somebody awaits a reply.
    pub fn slots(&self, conn: ConnId) -> (usize, usize) {
        self.conns.get(conn).map_or((0, 0), |slots| (slots.tagged.len(), slots.awaited))
    }

    /// Whether a connection can have one more slot beside `slots_max - 1` others.
    pub fn has_room(&self, conn: ConnId, slots_max: usize) -> bool {
        let (slots, awaited) = self.slots(conn);
        match self.matching {
            Matching::InOrder => slots < slots_max,
            // Half of the ids stay free, so that one is found soon.
            Matching::ById { ids } => awaited < slots_max && (slots as u64) < ids.div_ceil(2),
        }
    }

    /// The slots of a connection, oldest first.
    pub fn slots_on(&self, conn: ConnId) -> Vec<(Tag, &Slot)> {
        self.conns.get(conn).map(|slots| slots.tagged.all()).unwrap_or_default()
    }

    /// The slot of that tag.
    pub fn slot(&self, conn: ConnId, tag: Tag) -> Option<&Slot> {
        self.conns.get(conn)?.tagged.get(tag)
    }

    /// When something happens on a connection, at the earliest.
    pub fn due(&self, conn: ConnId) -> Option<Time> {
        self.conns.get(conn)?.dues.peek().map(|Reverse((due, _))| *due)
    }

    /// Adds a request that waits until `deadline`.
    pub fn insert(
        &mut self,
        owner: Owner,
        asked_at: Time,
        caller_deadline: Option<Time>,
        is_last: bool,
        deadline: Time,
    ) -> RequestId {
        let place = Place::Waiting { deadline };
        let retries = 0;
        self.requests.insert(Request { owner, asked_at, caller_deadline, is_last, retries, place })
    }

    /// Puts a waiting request into a new slot of a connection, which [has room](Self::has_room).
    pub fn assign(&mut self, request: RequestId, conn: ConnId, times: Times) -> Option<Tag> {
        let entry = self.requests.get_mut(request)?;
        let matching = self.matching;
        let slots = self.conns.entry(conn)?.or_insert_with(|| Slots::new(matching));
        let tag = match self.matching {
            Matching::InOrder => slots.next_tag,
            Matching::ById { ids } => loop {
                let id = self.random.u64(..ids);
                if slots.tagged.get(id).is_none() {
                    break id;
                }
            },
        };
        slots.next_tag += 1;
        entry.place = Place::On { conn, tag };
        let slot = Slot { request: Some(request), times };
        slots.tagged.push(tag, slot);
        slots.expect(tag, slot.due());
        slots.awaited += 1;
        Some(tag)
    }

    /// Takes a request off its slot, which its connection does not need any more, to wait again.
    pub fn wait_again(&mut self, request: RequestId, deadline: Time, is_retry: bool) {
        if let Some(entry) = self.requests.get_mut(request) {
            entry.place = Place::Waiting { deadline };
            entry.retries += u32::from(is_retry);
        }
    }

    /// Takes out the slot of a reply that came.
    pub fn take(&mut self, conn: ConnId, tag: Tag) -> Option<Slot> {
        let slots = self.conns.get_mut(conn)?;
        let slot = slots.tagged.take(tag)?;
        slots.awaited -= usize::from(slot.request.is_some());
        if slots.tagged.is_empty() {
            slots.dues.clear();
        }
        Some(slot)
    }

    /// Takes out every slot of a connection that has ended, oldest first.
    pub fn take_all(&mut self, conn: ConnId) -> Vec<(Tag, Slot)> {
        self.conns.remove(conn).map(|mut slots| slots.tagged.take_all()).unwrap_or_default()
    }

    /// Removes a request that has its end. Its slot, if it has one, is abandoned: its reply is not
    /// expected after `hopeless_at`, unless that is set already.
    pub fn remove(&mut self, request: RequestId, hopeless_at: Option<Time>) -> Option<Request> {
        let entry = self.requests.remove(request)?;
        if let Place::On { conn, tag } = entry.place
            && let Some(slots) = self.conns.get_mut(conn)
        {
            let mut was_awaited = false;
            slots.change(tag, |slot| {
                was_awaited = slot.request.take().is_some();
                slot.times.hopeless_at = hopeless_at.unwrap_or(slot.times.hopeless_at);
            });
            slots.awaited -= usize::from(was_awaited);
        }
        Some(entry)
    }

    /// What is due on a connection: the slot whose time came first, if there is one. Its next time
    /// is set once it was [resent](Self::resent), [removed](Self::remove) or [taken](Self::take).
    pub fn first_due(&mut self, conn: ConnId, now: Time) -> Option<(Tag, Slot)> {
        let slots = self.conns.get_mut(conn)?;
        while let Some(Reverse((due, tag))) = slots.dues.peek().copied()
            && due <= now
        {
            if let Some(slot) = slots.tagged.get(tag).filter(|slot| slot.due() == due) {
                return Some((tag, *slot));
            }
            slots.dues.pop();
        }
        None
    }

    /// A request was sent again; the next time is `next`, if it is to be sent once more.
    pub fn resent(&mut self, conn: ConnId, tag: Tag, next: Time) {
        if let Some(slots) = self.conns.get_mut(conn) {
            slots.change(tag, |slot| {
                slot.times.resend = match slot.times.resend {
                    Some((_, left)) if left > 0 => Some((next, left - 1)),
                    Some(_) | None => None,
                };
            });
        }
    }

    /// An abandoned slot that is hopeless stays for as long as its connection does.
    pub fn keep_for_ever(&mut self, conn: ConnId, tag: Tag) {
        if let Some(slots) = self.conns.get_mut(conn) {
            slots.change(tag, |slot| slot.times.hopeless_at = Time::NEVER);
        }
    }
}
