//! What each user holds of the broker: charged before it is allocated, released by dropping.
//!
//! A [`Charge`] is a guard: whoever owns it owns what it was charged for, so an early return or a
//! closed session cannot leak quota. Limits are per uid. Sessions are also bounded in total: one
//! user may have all of them while alone, and 1/n of them while n users are present.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::{Rc, Weak};

/// What is charged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resource {
    /// Attached sessions, each of which holds at least one descriptor.
    Sessions,
    /// Bytes in receive and reply buffers.
    QueuedBytes,
    /// Descriptors that were passed and not yet claimed or closed.
    Descriptors,
    /// Shared memory of rings.
    RingBytes,
}

/// The limits.
#[derive(Debug, Clone, Copy)]
pub struct QuotaLimits {
    /// Sessions of all users together.
    pub sessions_max: usize,
    /// Bytes queued per user.
    pub queued_bytes_max: usize,
    /// Descriptors in flight per user.
    pub descriptors_max: usize,
    /// Shared memory per user.
    pub ring_bytes_max: usize,
}

/// The accounts of all users.
#[derive(Debug)]
pub struct Quotas {
    book: Rc<Book>,
}

#[derive(Debug)]
struct Book {
    limits: QuotaLimits,
    accounts: RefCell<BTreeMap<u32, Weak<Holdings>>>,
    /// Sessions of all users.
    sessions: Cell<usize>,
    /// Users that have any.
    users: Cell<usize>,
}

/// What one user holds; forgotten with its last charge and account.
#[derive(Debug)]
struct Holdings {
    book: Rc<Book>,
    uid: u32,
    sessions: Cell<usize>,
    queued_bytes: Cell<usize>,
    descriptors: Cell<usize>,
    ring_bytes: Cell<usize>,
}

/// A quota is used up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exceeded {
    /// What the user may hold now.
    pub limit: usize,
}

impl Quotas {
    /// Empty accounts under these limits.
    pub fn new(limits: QuotaLimits) -> Self {
        let (accounts, sessions, users) = Default::default();
        Quotas { book: Rc::new(Book { limits, accounts, sessions, users }) }
    }

    /// The account of a user.
    pub fn account(&self, uid: u32) -> Account {
        let mut accounts = self.book.accounts.borrow_mut();
        if let Some(held) = accounts.get(&uid).and_then(Weak::upgrade) {
            return Account { held };
        }
        let held = Rc::new(Holdings {
            book: Rc::clone(&self.book),
            uid,
            sessions: Cell::default(),
            queued_bytes: Cell::default(),
            descriptors: Cell::default(),
            ring_bytes: Cell::default(),
        });
        accounts.insert(uid, Rc::downgrade(&held));
        Account { held }
    }
}

/// Where a user's charges are made: found once, not for each of them.
#[derive(Debug, Clone)]
pub struct Account {
    held: Rc<Holdings>,
}

impl Account {
    /// Charges `amount` of `resource`.
    pub fn charge(&self, resource: Resource, amount: usize) -> Result<Charge, Exceeded> {
        let mut charge = Charge { account: self.clone(), resource, amount: 0 };
        charge.resize(amount)?;
        Ok(charge)
    }
}

impl Holdings {
    fn held(&self, resource: Resource) -> &Cell<usize> {
        match resource {
            Resource::Sessions => &self.sessions,
            Resource::QueuedBytes => &self.queued_bytes,
            Resource::Descriptors => &self.descriptors,
            Resource::RingBytes => &self.ring_bytes,
        }
    }

    fn limit(&self, resource: Resource) -> usize {
        let limits = &self.book.limits;
        match resource {
            Resource::Sessions => {
                let others = self.book.users.get() - usize::from(self.sessions.get() > 0);
                limits.sessions_max / (others + 1)
            }
            Resource::QueuedBytes => limits.queued_bytes_max,
            Resource::Descriptors => limits.descriptors_max,
            Resource::RingBytes => limits.ring_bytes_max,
        }
    }

    fn grow(&self, resource: Resource, more: usize) -> Result<(), Exceeded> {
        let limit = self.limit(resource);
        let after = self.held(resource).get() + more;
        let full = resource == Resource::Sessions
            && self.book.sessions.get() + more > self.book.limits.sessions_max;
        if full || after > limit {
            return Err(Exceeded { limit });
        }
        self.set(resource, after);
        Ok(())
    }

    fn set(&self, resource: Resource, after: usize) {
        let before = self.held(resource).replace(after);
        if resource == Resource::Sessions {
            let Book { sessions, users, .. } = &*self.book;
            sessions.set(sessions.get() - before + after);
            users.set(users.get() - usize::from(before > 0) + usize::from(after > 0));
        }
    }
}

impl Drop for Holdings {
    fn drop(&mut self) {
        self.book.accounts.borrow_mut().remove(&self.uid);
    }
}

/// The right to hold something; released when dropped.
#[derive(Debug)]
pub struct Charge {
    account: Account,
    resource: Resource,
    amount: usize,
}

impl Charge {
    /// How much it holds.
    pub fn amount(&self) -> usize {
        self.amount
    }

    /// Holds `amount` from now on. Shrinking always succeeds; when growing fails nothing changes.
    #[inline]
    pub fn resize(&mut self, amount: usize) -> Result<(), Exceeded> {
        if amount > self.amount {
            self.account.held.grow(self.resource, amount - self.amount)?;
        } else if amount < self.amount {
            let held = &self.account.held;
            held.set(self.resource, held.held(self.resource).get() - (self.amount - amount));
        }
        self.amount = amount;
        Ok(())
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        let released = self.resize(0);
        debug_assert!(released.is_ok(), "shrinking cannot fail");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn quotas() -> Quotas {
        Quotas::new(QuotaLimits {
            sessions_max: 10,
            queued_bytes_max: 100,
            descriptors_max: 4,
            ring_bytes_max: 100,
        })
    }

    #[test]
    fn one_user_may_have_all_while_alone_and_a_share_beside_another() {
        let quotas = quotas();
        let mut held: Vec<_> =
            (0..10).map(|_| quotas.account(1).charge(Resource::Sessions, 1).unwrap()).collect();
        assert_eq!(
            quotas.account(1).charge(Resource::Sessions, 1).unwrap_err(),
            Exceeded { limit: 10 }
        );
        assert!(quotas.account(2).charge(Resource::Sessions, 1).is_err(), "nothing is left");
        held.truncate(8);
        let _other = quotas.account(2).charge(Resource::Sessions, 1).unwrap();
        assert_eq!(
            quotas.account(1).charge(Resource::Sessions, 1).unwrap_err(),
            Exceeded { limit: 5 }
        );
    }

    #[test]
    fn a_charge_that_cannot_grow_keeps_what_it_has() {
        let quotas = quotas();
        let mut charge = quotas.account(7).charge(Resource::QueuedBytes, 60).unwrap();
        assert!(charge.resize(101).is_err());
        assert!(quotas.account(7).charge(Resource::QueuedBytes, 41).is_err());
        assert!(quotas.account(7).charge(Resource::QueuedBytes, 40).is_ok());
        charge.resize(10).unwrap();
        assert!(quotas.account(7).charge(Resource::QueuedBytes, 90).is_ok());
    }

    proptest! {
        #[test]
        fn what_is_dropped_is_released(ops in proptest::collection::vec((0u32..3, 0usize..5), 0..60)) {
            let quotas = quotas();
            let mut held: Vec<(u32, usize, Charge)> = Vec::new();
            for (uid, amount) in ops {
                let mine: usize =
                    held.iter().filter(|(owner, ..)| *owner == uid).map(|(_, n, _)| n).sum();
                match quotas.account(uid).charge(Resource::Descriptors, amount) {
                    Ok(charge) => {
                        prop_assert!(mine + amount <= 4);
                        held.push((uid, amount, charge));
                    }
                    Err(_) => {
                        prop_assert!(mine + amount > 4);
                        held.retain(|(owner, ..)| *owner != uid);
                    }
                }
            }
            drop(held);
            prop_assert!(quotas.book.accounts.borrow().is_empty());
        }
    }
}
