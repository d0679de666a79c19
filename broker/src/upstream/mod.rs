//! The kernel's side of upstreams: sockets and names. Nothing of policy.

pub mod resolve;
pub mod sockopt;
pub mod tcp;
pub mod udp;

use rustix::io::Errno;

use poolbroker_proto::reason::Reason;

/// Why a connect failed, from its error (connect(2); E16 for the ones that mean "no port").
pub fn connect_failure(error: Errno) -> Reason {
    match error {
        Errno::CONNREFUSED => Reason::ConnectRefused,
        Errno::TIMEDOUT => Reason::ConnectTimeout,
        Errno::ADDRNOTAVAIL | Errno::ADDRINUSE | Errno::AGAIN => Reason::NoPorts,
        _ => Reason::ConnectError,
    }
}

/// Why a connection broke, from the error of a read or write on it.
pub fn broken(error: Errno) -> Reason {
    match error {
        Errno::CONNREFUSED => Reason::ConnectRefused,
        Errno::PIPE => Reason::PeerClosed,
        _ => Reason::PeerReset,
    }
}
