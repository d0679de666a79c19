//! Requests in flight: their ids and what became of them.

use std::fmt;

use crate::error::Error;

/// Names one submitted request until its [`Reply`] is taken. Unique within its client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CorrelationId(pub(crate) u64);

impl fmt::Display for CorrelationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What became of one submitted request.
#[derive(Debug)]
pub struct Reply {
    /// Which request: what [`Upstream::submit`](crate::Upstream::submit) returned.
    pub id: CorrelationId,
    /// The body of the reply, or how the request failed: [`Error::Failed`], [`Error::TimedOut`] or
    /// [`Error::Disconnected`].
    pub result: Result<Vec<u8>, Error>,
}
