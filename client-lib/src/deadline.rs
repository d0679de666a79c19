//! Until when a call may wait.
//!
//! A deadline is a point in time, so that the steps of one call share it and none of them adds a
//! timeout of its own.

use std::time::{Duration, Instant};

/// Until when a call may wait. Calls take `impl Into<Deadline>`: a [`Duration`] from now, an
/// [`Instant`], or a deadline itself.
///
/// ```
/// use std::time::{Duration, Instant};
/// use poolbroker_client::Deadline;
///
/// assert!(!Deadline::from(Duration::from_secs(60)).is_over());
/// assert!(Deadline::from(Instant::now()).is_over());
/// assert!(Deadline::now().is_over());
/// assert!(!Deadline::Never.is_over());
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deadline {
    /// Wait until this moment.
    At(Instant),
    /// Wait as long as it takes. The wait then ends with an answer or with the session, so a
    /// broker that is stopped (SIGSTOP) can hold it up for ever.
    Never,
}

impl Deadline {
    /// A deadline that is over: the call looks once and does not wait.
    #[must_use]
    pub fn now() -> Self {
        Deadline::At(Instant::now())
    }

    /// The deadline `timeout` from now; [`Deadline::Never`] when the clock cannot express it.
    #[must_use]
    pub fn after(timeout: Duration) -> Self {
        Deadline::At(Instant::now()).later(timeout)
    }

    /// Whether it has passed.
    #[must_use]
    pub fn is_over(self) -> bool {
        self.time_left() == Some(Duration::ZERO)
    }

    /// How long there is still to wait: zero when it has passed, `None` for [`Deadline::Never`].
    #[must_use]
    pub fn time_left(self) -> Option<Duration> {
        self.time_left_at(Instant::now())
    }

    /// The time left in milliseconds as a frame header carries it: rounded up, at least 1, and 0
    /// for [`Deadline::Never`].
    pub(crate) fn timeout_ms(self, now: Instant) -> u32 {
        let Some(left) = self.time_left_at(now) else {
            return 0;
        };
        let milliseconds = left.as_nanos().div_ceil(1_000_000);
        u32::try_from(milliseconds).unwrap_or(u32::MAX).max(1)
    }

    /// The deadline `grace` later.
    pub(crate) fn later(self, grace: Duration) -> Self {
        match self {
            Deadline::At(instant) => {
                instant.checked_add(grace).map_or(Deadline::Never, Deadline::At)
            }
            Deadline::Never => Deadline::Never,
        }
    }

    /// Whichever of the two comes first.
    pub(crate) fn earlier(self, other: Deadline) -> Self {
        match (self, other) {
            (Deadline::At(a), Deadline::At(b)) => Deadline::At(a.min(b)),
            (Deadline::Never, at) | (at, Deadline::Never) => at,
        }
    }

    fn time_left_at(self, now: Instant) -> Option<Duration> {
        match self {
            Deadline::At(instant) => Some(instant.saturating_duration_since(now)),
            Deadline::Never => None,
        }
    }
}

impl From<Duration> for Deadline {
    fn from(timeout: Duration) -> Self {
        Deadline::after(timeout)
    }
}

impl From<Instant> for Deadline {
    fn from(instant: Instant) -> Self {
        Deadline::At(instant)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn milliseconds_on_the_wire_are_rounded_up_and_never_zero_but_for_never() {
        let now = Instant::now();
        for (left, wire) in [
            (Duration::ZERO, 1),
            (Duration::from_nanos(1), 1),
            (Duration::from_millis(1), 1),
            (Duration::from_micros(1_001), 2),
            (Duration::from_secs(60), 60_000),
            (Duration::from_secs(100 * 24 * 3600), u32::MAX),
        ] {
            let deadline = Deadline::At(now + left);
            assert_eq!(deadline.timeout_ms(now), wire, "{left:?}");
        }
        assert_eq!(Deadline::Never.timeout_ms(now), 0);
    }

    #[test]
    fn a_timeout_beyond_the_clock_is_never() {
        assert_eq!(Deadline::from(Duration::MAX), Deadline::Never);
    }

    #[test]
    fn the_earlier_of_two_deadlines_wins() {
        let (early, late) = (Instant::now(), Instant::now() + Duration::from_secs(1));
        for (a, b) in
            [(Deadline::At(early), Deadline::At(late)), (Deadline::At(early), Deadline::Never)]
        {
            assert_eq!(a.earlier(b), Deadline::At(early));
            assert_eq!(b.earlier(a), Deadline::At(early));
        }
        assert_eq!(Deadline::Never.earlier(Deadline::Never), Deadline::Never);
    }
}
