//! What each user holds of the broker: charged before it is allocated, released by dropping.
//!
//! A [`Charge`] is a guard: whoever owns it owns what it was charged for, so an early return or a
//! closed session cannot leak quota. Limits are per uid. Sessions are also bounded in total: one
//! user may have all of them while alone, and 1/n of them while n users are present.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

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
#[derive(Debug, Clone)]
pub struct Quotas {
    book: Rc<RefCell<Book>>,
}

#[derive(Debug)]
struct Book {
    limits: QuotaLimits,
    /// A host has few users, and every message is charged.
    accounts: BTreeMap<u32, Account>,
}

#[derive(Debug, Default)]
struct Account {
    sessions: usize,
    queued_bytes: usize,
    descriptors: usize,
    ring_bytes: usize,
}

impl Account {
    fn held(&mut self, resource: Resource) -> &mut usize {
        match resource {
            Resource::Sessions => &mut self.sessions,
            Resource::QueuedBytes => &mut self.queued_bytes,
            Resource::Descriptors => &mut self.descriptors,
            Resource::RingBytes => &mut self.ring_bytes,
        }
    }

    fn is_empty(&self) -> bool {
        let Account { sessions, queued_bytes, descriptors, ring_bytes } = self;
        // One by one: read as a block they would have to wait for the write before.
        *sessions == 0 && *queued_bytes == 0 && *descriptors == 0 && *ring_bytes == 0
    }
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
        Quotas { book: Rc::new(RefCell::new(Book { limits, accounts: BTreeMap::new() })) }
    }

    /// Charges `amount` of `resource` to `uid`.
    pub fn charge(&self, uid: u32, resource: Resource, amount: usize) -> Result<Charge, Exceeded> {
        self.book.borrow_mut().grow(uid, resource, amount)?;
        Ok(Charge { quotas: self.clone(), uid, resource, amount })
    }
}

impl Book {
    fn limit(&self, uid: u32, resource: Resource) -> usize {
        match resource {
            Resource::Sessions => {
                let others = self.accounts.iter();
                let others = others.filter(|(other, held)| **other != uid && held.sessions > 0);
                self.limits.sessions_max / (others.count() + 1)
            }
            Resource::QueuedBytes => self.limits.queued_bytes_max,
            Resource::Descriptors => self.limits.descriptors_max,
            Resource::RingBytes => self.limits.ring_bytes_max,
        }
    }

    fn grow(&mut self, uid: u32, resource: Resource, more: usize) -> Result<(), Exceeded> {
        if more == 0 {
            return Ok(());
        }
        let limit = self.limit(uid, resource);
        let full =
            resource == Resource::Sessions && self.sessions() + more > self.limits.sessions_max;
        let held = self.accounts.get_mut(&uid).map_or(0, |account| *account.held(resource));
        if full || held + more > limit {
            return Err(Exceeded { limit });
        }
        *self.accounts.entry(uid).or_default().held(resource) += more;
        Ok(())
    }

    fn shrink(&mut self, uid: u32, resource: Resource, less: usize) {
        if let Some(account) = self.accounts.get_mut(&uid) {
            *account.held(resource) -= less;
            if account.is_empty() {
                self.accounts.remove(&uid);
            }
        }
    }

    fn sessions(&self) -> usize {
        self.accounts.values().map(|account| account.sessions).sum()
    }
}

/// The right to hold something; released when dropped.
#[derive(Debug)]
pub struct Charge {
    quotas: Quotas,
    uid: u32,
    resource: Resource,
    amount: usize,
}

impl Charge {
    /// How much it holds.
    pub fn amount(&self) -> usize {
        self.amount
    }

    /// Holds `amount` from now on. Shrinking always succeeds; when growing fails nothing changes.
    pub fn resize(&mut self, amount: usize) -> Result<(), Exceeded> {
        let mut book = self.quotas.book.borrow_mut();
        match amount.checked_sub(self.amount) {
            Some(more) => book.grow(self.uid, self.resource, more)?,
            None => book.shrink(self.uid, self.resource, self.amount - amount),
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
            (0..10).map(|_| quotas.charge(1, Resource::Sessions, 1).unwrap()).collect();
        assert_eq!(quotas.charge(1, Resource::Sessions, 1).unwrap_err(), Exceeded { limit: 10 });
        assert!(quotas.charge(2, Resource::Sessions, 1).is_err(), "nothing is left");
        held.truncate(8);
        let _other = quotas.charge(2, Resource::Sessions, 1).unwrap();
        assert_eq!(quotas.charge(1, Resource::Sessions, 1).unwrap_err(), Exceeded { limit: 5 });
    }

    #[test]
    fn a_charge_that_cannot_grow_keeps_what_it_has() {
        let quotas = quotas();
        let mut charge = quotas.charge(7, Resource::QueuedBytes, 60).unwrap();
        assert!(charge.resize(101).is_err());
        assert!(quotas.charge(7, Resource::QueuedBytes, 41).is_err());
        assert!(quotas.charge(7, Resource::QueuedBytes, 40).is_ok());
        charge.resize(10).unwrap();
        assert!(quotas.charge(7, Resource::QueuedBytes, 90).is_ok());
    }

    proptest! {
        #[test]
        fn what_is_dropped_is_released(ops in proptest::collection::vec((0u32..3, 0usize..5), 0..60)) {
            let quotas = quotas();
            let mut held: Vec<(u32, usize, Charge)> = Vec::new();
            for (uid, amount) in ops {
                let mine: usize =
                    held.iter().filter(|(owner, ..)| *owner == uid).map(|(_, n, _)| n).sum();
                match quotas.charge(uid, Resource::Descriptors, amount) {
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
            prop_assert!(quotas.book.borrow().accounts.is_empty());
        }
    }
}
