//! Deficit round robin: how much of its turn a source may use.
//!
//! Sources take turns, and each turn brings the same credit. A message costs its bytes and a fixed
//! part for the work that does not depend on them. A turn takes a run and pays for it afterwards;
//! whoever has overdrawn sits out turns until the debt is paid; so over time everybody gets the same
//! share, with small messages or large ones (Shreedhar and Varghese, "Efficient Fair Queuing using
//! Deficit Round Robin", 1995; with the debt carried over instead of the rest).

use crate::config::{MESSAGE_COST_BYTES, TURN_CREDIT_BYTES};

/// The account of one source.
#[derive(Debug, Clone, Copy, Default)]
pub struct Credit {
    bytes: i64,
}

impl Credit {
    /// Its turn has come: whether it may take something. Nobody else waits for a turn if it
    /// `is_alone`: it owes nothing to anybody then.
    pub fn begin_turn(&mut self, is_alone: bool) -> bool {
        if is_alone {
            self.bytes = 0;
        }
        // What is left of a turn is not saved up.
        self.bytes = self.bytes.min(0) + TURN_CREDIT_BYTES;
        self.bytes > 0
    }

    /// Pays for what it took in its turn: so many messages of so many bytes in all.
    pub fn pay(&mut self, messages: usize, bytes: usize) {
        let price = bytes.saturating_add(messages.saturating_mul(MESSAGE_COST_BYTES));
        self.bytes = self.bytes.saturating_sub(i64::try_from(price).unwrap_or(i64::MAX));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes that each source gets through, with messages of its own size, in so many rounds.
    fn served(sizes: &[usize], rounds: usize) -> Vec<usize> {
        let mut credits = vec![Credit::default(); sizes.len()];
        let mut bytes = vec![0; sizes.len()];
        for _ in 0..rounds {
            for ((credit, size), bytes) in credits.iter_mut().zip(sizes).zip(&mut bytes) {
                if credit.begin_turn(false) {
                    // A run: at most 64 messages or 256 KiB, and one message at least.
                    let messages = (262_144 / size).clamp(1, 64);
                    *bytes += messages * (size + MESSAGE_COST_BYTES);
                    credit.pay(messages, messages * size);
                }
            }
        }
        bytes
    }

    #[test]
    fn small_and_large_messages_get_the_same_share() {
        let bytes = served(&[64, 1_432, 100_000, 1_000_000], 10_000);
        let (least, most) = (bytes.iter().min().unwrap(), bytes.iter().max().unwrap());
        assert!(*most as f64 / *least as f64 <= 1.02, "{bytes:?}");
    }

    #[test]
    fn whoever_is_alone_pays_no_debt() {
        let mut credit = Credit::default();
        assert!(credit.begin_turn(false));
        credit.pay(1, 10_000_000);
        assert!(!credit.begin_turn(false));
        assert!(credit.begin_turn(true));
    }
}
