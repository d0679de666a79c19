//! The shared region as loom models it: stands in for `memory.rs` under `--cfg loom`.
//!
//! Every word is a loom atomic, so loom gives each relaxed load every value that the orderings
//! allow, old ones included. A half word is modelled by a whole one. The futex is a lock with a
//! queue of sleepers, as in the kernel: a wait compares and goes to sleep under the lock, a wake
//! takes the lock and wakes the first sleeper of its address.
//!
//! One thing loom does not do by itself: let a load move behind a later store, so that a consumer
//! reads what the producer wrote after the release. Each word of a record therefore carries a trace
//! of its reads; who overwrites the word must see the last of them, as happens-before says it must.

use std::sync::Arc;
use std::time::Duration;

use loom::sync::atomic::AtomicU64;
use loom::sync::{Condvar, Mutex};

pub(super) use loom::sync::atomic::{Ordering, fence};

/// Bytes of a word, to which everything in a region is aligned.
pub(super) const WORD: usize = size_of::<u64>();

/// A region that is not mapped, but shared by the threads of a model.
#[derive(Debug)]
pub struct Memory {
    words: Vec<Word>,
    /// Who sleeps, and at which address.
    sleepers: Mutex<Vec<(usize, Arc<Condvar>)>>,
}

/// A word, with the operations of an atomic.
#[derive(Debug)]
pub(super) struct Word {
    value: AtomicU64,
    /// Of the words of records only: those of the header are written to while they are read.
    reads: Option<Trace>,
}

/// How often a word was read: in truth, and as far as the thread that looks can know.
#[derive(Debug)]
struct Trace {
    truth: std::sync::atomic::AtomicU64,
    known: AtomicU64,
}

impl Memory {
    /// A zeroed region.
    #[must_use]
    pub fn new(bytes: usize) -> Memory {
        let records_at = super::Header::region_bytes(0);
        let words = (0..bytes).step_by(WORD).map(|at| Word {
            value: AtomicU64::new(0),
            reads: (at >= records_at).then(|| Trace {
                truth: std::sync::atomic::AtomicU64::new(0),
                known: AtomicU64::new(0),
            }),
        });
        Memory { words: words.collect(), sleepers: Mutex::new(Vec::new()) }
    }

    /// Bytes of the region.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.words.len() * WORD
    }

    /// The word `at` bytes from the start.
    pub(super) fn word(&self, at: usize) -> &Word {
        assert!(at.is_multiple_of(WORD), "{at} is not aligned");
        &self.words[at / WORD]
    }

    /// The half word `at` bytes from the start, which is a multiple of a word's size.
    pub(super) fn half(&self, at: usize) -> &Word {
        self.word(at)
    }

    /// The words from `at` on.
    pub(super) fn load<const WORDS: usize>(&self, at: usize) -> [u64; WORDS] {
        // ORDER: relaxed, as in the real one.
        std::array::from_fn(|index| self.word(at + index * WORD).load(Ordering::Relaxed))
    }

    /// Stores words from `at` on.
    pub(super) fn store<const WORDS: usize>(&self, at: usize, words: [u64; WORDS]) {
        for (index, value) in words.into_iter().enumerate() {
            // ORDER: relaxed, as in the real one.
            self.word(at + index * WORD).store(value, Ordering::Relaxed);
        }
    }

    /// Copies `bytes` to `at`; the last word is filled up with zeros.
    pub(super) fn copy_in(&self, at: usize, bytes: &[u8]) {
        for (index, chunk) in bytes.chunks(WORD).enumerate() {
            let mut word = [0; WORD];
            word[..chunk.len()].copy_from_slice(chunk);
            // ORDER: relaxed, as in the real one.
            self.word(at + index * WORD).store(u64::from_ne_bytes(word), Ordering::Relaxed);
        }
    }

    /// Appends the `len` bytes at `at` to `out`.
    pub(super) fn copy_out(&self, at: usize, len: usize, out: &mut Vec<u8>) {
        let before = out.len();
        for index in 0..len.div_ceil(WORD) {
            // ORDER: relaxed, as in the real one.
            let word = self.word(at + index * WORD).load(Ordering::Relaxed);
            out.extend_from_slice(&word.to_ne_bytes());
        }
        out.truncate(before + len);
    }

    /// Waits while the half word at `at` is `expected`. No model has a clock.
    pub(super) fn futex_wait(&self, at: usize, expected: u64, _timeout: Option<Duration>) {
        let mut sleepers = self.sleepers.lock().expect("no model goes on after a panic");
        // ORDER: relaxed; the kernel's own barriers would hide that the caller's is missing.
        if self.half(at).load(Ordering::Relaxed) != expected {
            return;
        }
        let woken = Arc::new(Condvar::new());
        sleepers.push((at, Arc::clone(&woken)));
        drop(woken.wait(sleepers).expect("no model goes on after a panic"));
    }

    /// Wakes one that waits at `at`.
    pub(super) fn futex_wake(&self, at: usize) {
        let mut sleepers = self.sleepers.lock().expect("no model goes on after a panic");
        if let Some(first) = sleepers.iter().position(|(place, _)| *place == at) {
            sleepers.remove(first).1.notify_one();
        }
    }
}

impl Word {
    pub(super) fn load(&self, order: Ordering) -> u64 {
        if let Some(reads) = &self.reads {
            // ORDER: relaxed; threads of a model run one at a time, and a trace orders nothing.
            let count = reads.truth.fetch_add(1, Ordering::Relaxed) + 1;
            reads.known.store(count, Ordering::Relaxed);
        }
        self.value.load(order)
    }

    pub(super) fn store(&self, value: u64, order: Ordering) {
        if let Some(reads) = &self.reads {
            // ORDER: relaxed; as in `load`.
            let known = reads.known.load(Ordering::Relaxed);
            let truth = reads.truth.load(Ordering::Relaxed);
            assert_eq!(known, truth, "a word is overwritten that may still be read");
        }
        self.value.store(value, order);
    }

    pub(super) fn swap(&self, value: u64, order: Ordering) -> u64 {
        self.value.swap(value, order)
    }

    pub(super) fn fetch_add(&self, value: u64, order: Ordering) -> u64 {
        self.value.fetch_add(value, order)
    }

    pub(super) fn fetch_sub(&self, value: u64, order: Ordering) -> u64 {
        self.value.fetch_sub(value, order)
    }

    pub(super) fn fetch_update(
        &self,
        taken: Ordering,
        refused: Ordering,
        update: impl FnMut(u64) -> Option<u64>,
    ) -> Result<u64, u64> {
        self.value.fetch_update(taken, refused, update)
    }
}
