//! How a client talks to its broker.

use poolbroker_proto::ring::{CAPACITY_MAX, CAPACITY_MIN};

use crate::error::Error;

/// How a client talks to its broker.
///
/// ```
/// use poolbroker_client::Transport;
///
/// assert_eq!(Transport::default(), Transport::Unix);
/// assert_eq!(Transport::RING, Transport::Ring { bytes: Transport::RING_BYTES });
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Transport {
    /// Over a socket: a system call per message.
    #[default]
    Unix,
    /// Over shared memory: a message is one copy and mostly no system call, and what was handed
    /// over survives the broker: the next one in the same directory takes it.
    Ring {
        /// Bytes of each of the two rings, rounded up to a power of two and to 256 KiB; at most
        /// 1 GiB. A message takes its length and 24 bytes, rounded up to 8, and at most half of the
        /// ring.
        bytes: usize,
    },
}

impl Transport {
    /// A size that suits most, in bytes: 1 MiB, some 10,000 messages of 64 bytes.
    pub const RING_BYTES: usize = 1024 * 1024;

    /// A ring of [`Transport::RING_BYTES`].
    pub const RING: Transport = Transport::Ring { bytes: Transport::RING_BYTES };

    /// The transport with the size that it will have.
    ///
    /// # Errors
    /// [`Error::RingTooLarge`].
    pub(crate) fn rounded(self) -> Result<Self, Error> {
        match self {
            Transport::Unix => Ok(Transport::Unix),
            Transport::Ring { bytes } if bytes > CAPACITY_MAX => {
                Err(Error::RingTooLarge { bytes, max: CAPACITY_MAX })
            }
            Transport::Ring { bytes } => {
                Ok(Transport::Ring { bytes: bytes.max(CAPACITY_MIN).next_power_of_two() })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_rounded_up_to_what_a_ring_can_have() {
        for (wanted, given) in
            [(0, CAPACITY_MIN), (CAPACITY_MIN + 1, 2 * CAPACITY_MIN), (CAPACITY_MAX, CAPACITY_MAX)]
        {
            let rounded = Transport::Ring { bytes: wanted }.rounded().unwrap();
            assert_eq!(rounded, Transport::Ring { bytes: given });
        }
        let bytes = CAPACITY_MAX + 1;
        let refused = Transport::Ring { bytes }.rounded().unwrap_err();
        assert!(matches!(refused, Error::RingTooLarge { .. }), "{refused}");
    }
}
