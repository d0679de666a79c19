//! A counting semaphore between processes: P waits, V wakes, and the kernel is asked only when
//! somebody sleeps.
//!
//! ```text
//!   count     what V has given and P has not taken; the futex
//!   sleepers  how many are about to wait, or wait
//! ```
//!
//! V adds to `count`, then looks at `sleepers`; P adds itself to `sleepers`, then looks at `count`
//! (in futex(2), which compares it under its own lock). With a full fence between the two steps on
//! both sides one of them sees the other, so no wake-up is lost. Whoever shares the memory can write
//! any value: at worst a P returns for nothing or waits to its deadline. That is why a semaphore
//! carries wake-ups only, and every caller of P looks at the ring's positions afterwards.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::memory::{Memory, Ordering, WORD, fence};

/// Bytes of a semaphore in shared memory.
pub(super) const SEMAPHORE_BYTES: usize = 2 * WORD;

/// A process-shared counting semaphore.
#[derive(Debug, Clone)]
pub struct Semaphore {
    memory: Arc<Memory>,
    count: usize,
    sleepers: usize,
}

impl Semaphore {
    /// The semaphore at `at`; zeroed memory is one with a count of 0.
    pub(super) fn new(memory: Arc<Memory>, at: usize) -> Self {
        Semaphore { memory, count: at, sleepers: at + WORD }
    }

    /// P: takes one, waiting for it until `deadline` if there is none, for ever without one. False:
    /// there was none in time.
    #[must_use]
    pub fn wait(&self, deadline: Option<Instant>) -> bool {
        loop {
            if self.try_wait() {
                return true;
            }
            let timeout = deadline.map(|at| at.saturating_duration_since(Instant::now()));
            if timeout == Some(Duration::ZERO) {
                return false;
            }
            let sleepers = self.memory.half(self.sleepers);
            // ORDER: relaxed with the fence behind it; its partner is the fence in `post`.
            sleepers.fetch_add(1, Ordering::Relaxed);
            fence(Ordering::SeqCst);
            self.memory.futex_wait(self.count, 0, timeout);
            // ORDER: relaxed; a V that still sees us asks the kernel once for nothing.
            sleepers.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// P without waiting.
    #[must_use]
    pub fn try_wait(&self) -> bool {
        let count = self.memory.half(self.count);
        // ORDER: acquire; its partner is the release in `post`.
        count
            .fetch_update(Ordering::Acquire, Ordering::Relaxed, |count| count.checked_sub(1))
            .is_ok()
    }

    /// V: gives one. Never blocks.
    pub fn post(&self) {
        // ORDER: release; its partner is the acquire in `try_wait`.
        self.memory.half(self.count).fetch_add(1, Ordering::Release);
        // ORDER: full; its partner is the fence in `wait`.
        fence(Ordering::SeqCst);
        // ORDER: relaxed behind the fence.
        if self.memory.half(self.sleepers).load(Ordering::Relaxed) > 0 {
            self.memory.futex_wake(self.count);
        }
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;

    fn semaphore() -> Semaphore {
        let (memory, _fd) = Memory::create(4096).unwrap();
        Semaphore::new(Arc::new(memory), 128)
    }

    #[test]
    fn what_was_given_is_taken_once() {
        let semaphore = semaphore();
        assert!(!semaphore.try_wait());
        semaphore.post();
        semaphore.post();
        assert!(semaphore.wait(None) && semaphore.try_wait());
        assert!(!semaphore.wait(Some(Instant::now())));
    }

    #[test]
    fn every_v_ends_one_p() {
        let semaphore = semaphore();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..1000).for_each(|_| assert!(semaphore.wait(None))));
            }
            (0..4000).for_each(|_| semaphore.post());
        });
        assert!(!semaphore.try_wait());
    }

    #[test]
    fn a_wait_ends_at_its_deadline_whatever_is_written_to_the_memory() {
        let semaphore = semaphore();
        semaphore.memory.half(semaphore.sleepers).store(u32::MAX, Ordering::Relaxed);
        let deadline = Instant::now() + Duration::from_millis(1);
        assert!(!semaphore.wait(Some(deadline)));
        assert!(Instant::now() >= deadline);
    }
}
