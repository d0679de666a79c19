//! Connecting to the socket of a broker, within a bound or without waiting at all.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use poolbroker_proto::message::Retry;
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use crate::deadline::Deadline;
use crate::error::Error;

/// Connects to a broker's socket.
///
/// # Errors
/// [`Error::NoBroker`], [`Error::PermissionDenied`], [`Error::TimedOut`], [`Error::Io`].
pub(crate) fn dial(path: &Path, deadline: Deadline) -> Result<UnixStream, Error> {
    let call = || format!("connecting to {}", path.display());
    match try_dial(path, deadline) {
        Ok(socket) => Ok(socket),
        Err(Errno::NOENT | Errno::CONNREFUSED) => Err(Error::NoBroker { path: path.into() }),
        Err(Errno::ACCESS | Errno::PERM) => Err(Error::PermissionDenied { path: path.into() }),
        Err(Errno::AGAIN) => Err(Error::TimedOut {
            call: call(),
            why: "the broker accepts no connection; is it stopped?",
            retry: Retry::NotSent,
        }),
        Err(error) => {
            Err(Error::Io { call: call(), source: io::Error::from(error), retry: Retry::NotSent })
        }
    }
}

/// As [`dial`], but gives up instead of waiting for the listener to accept others first.
///
/// # Errors
/// As connect(2).
pub(crate) fn dial_now(path: &Path) -> Result<UnixStream, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(UnixStream::from(socket))
}

fn try_dial(path: &Path, deadline: Deadline) -> Result<UnixStream, Errno> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    // connect(2) waits while the listener's backlog is full, which no poll can watch; SO_SNDTIMEO
    // bounds that wait (socket(7)) and then fails with EAGAIN. Later writes do not block at all.
    // Zero would mean no bound.
    let wait = deadline.time_left();
    let wait = wait.map(|left| left.max(Duration::from_millis(1)));
    set_socket_timeout(&socket, Timeout::Send, wait)?;
    let address = SocketAddrUnix::new(path)?;
    loop {
        match connect(&socket, &address) {
            Ok(()) => return Ok(UnixStream::from(socket)),
            // A signal starts the wait anew: one that keeps coming must not make it endless.
            Err(Errno::INTR) if deadline.is_over() => return Err(Errno::AGAIN),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
}
