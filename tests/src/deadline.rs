//! Waiting for a condition, with an end: a test never sleeps and hopes.

use std::thread;
use std::time::{Duration, Instant};

/// How long a test waits for what must happen before it fails. Generous, since a loaded machine is
/// slow; it bounds a broken test and measures nothing.
pub const PATIENCE: Duration = Duration::from_secs(60);

const POLL_EVERY: Duration = Duration::from_millis(2);

/// Polls `attempt` until it gives a value.
///
/// # Panics
/// When [`PATIENCE`] runs out; `what` says what did not happen.
pub fn wait_for<T>(what: &str, mut attempt: impl FnMut() -> Option<T>) -> T {
    match poll_for(PATIENCE, &mut attempt) {
        Some(value) => value,
        None => panic!("waited {PATIENCE:?} in vain: {what}"),
    }
}

/// Polls `attempt` until it gives a value or `patience` runs out. For a test that checks that
/// something does *not* happen, and for messages of one's own.
pub fn poll_for<T>(patience: Duration, mut attempt: impl FnMut() -> Option<T>) -> Option<T> {
    let end = Instant::now() + patience;
    loop {
        if let Some(value) = attempt() {
            return Some(value);
        }
        if Instant::now() >= end {
            return None;
        }
        thread::sleep(POLL_EVERY);
    }
}
