//! A lease: the loan of one connection of an upstream, as a socket of this process.

use std::fmt;
use std::io;
use std::net::{Shutdown, TcpStream, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use poolbroker_proto::address::Protocol;
use poolbroker_proto::message::Retry;

use crate::client::Client;
use crate::error::Error;

/// The exclusive loan of one connection, got by [`Upstream::lease`](crate::Upstream::lease).
///
/// The socket is this process's own descriptor of the broker's connection: reading and writing go
/// past the broker. At the end of the lease the broker shuts the connection down, which shows here
/// as its end.
///
/// [`Lease::release`] gives the connection back for the next one. A lease that is dropped without
/// that shuts its connection down and closes it: nobody knows what state it is in.
///
/// Whoever keeps a copy of the descriptor disturbs only later leases of the same user: what was lent
/// once serves nothing else.
pub struct Lease {
    client: Client,
    handle: u16,
    id: u64,
    /// Of the session with the broker that lent it.
    session: u64,
    socket: Option<Socket>,
}

enum Socket {
    Tcp(TcpStream),
    Udp(UdpSocket),
}

impl Lease {
    pub(crate) fn new(
        client: Client,
        handle: u16,
        id: u64,
        protocol: Protocol,
        descriptor: OwnedFd,
    ) -> io::Result<Self> {
        let socket = match protocol {
            Protocol::Tcp => Socket::Tcp(descriptor.into()),
            Protocol::Udp | Protocol::UdpWriteOnly => Socket::Udp(descriptor.into()),
        };
        // The broker never blocks, whatever the socket says; a program expects that it does.
        match &socket {
            Socket::Tcp(stream) => stream.set_nonblocking(false)?,
            Socket::Udp(socket) => socket.set_nonblocking(false)?,
        }
        let session = client.session();
        Ok(Lease { client, handle, id, session, socket: Some(socket) })
    }

    /// The connection of a `tcp` upstream.
    #[must_use]
    pub fn tcp(&self) -> Option<&TcpStream> {
        match &self.socket {
            Some(Socket::Tcp(stream)) => Some(stream),
            Some(Socket::Udp(_)) | None => None,
        }
    }

    /// The connected socket of a `udp` or `udp-write-only` upstream. The latter never receives.
    #[must_use]
    pub fn udp(&self) -> Option<&UdpSocket> {
        match &self.socket {
            Some(Socket::Udp(socket)) => Some(socket),
            Some(Socket::Tcp(_)) | None => None,
        }
    }

    /// Gives the connection back. The last exchange on it must be complete: if the broker finds
    /// anything unread or unsent, it closes the connection.
    ///
    /// # Errors
    /// As [`Upstream::send`](crate::Upstream::send); the connection is then closed.
    pub fn release(mut self) -> Result<(), Error> {
        let mut session = self.client.lock()?;
        // The broker that lent it is gone, and with it the lease.
        if self.client.session() != self.session {
            return Ok(());
        }
        session.release(self.handle, self.id)?;
        drop(session);
        // Told before it is closed here, so that it is never open nowhere; and not shut down.
        self.socket = None;
        Ok(())
    }
}

impl AsFd for Lease {
    /// The socket.
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.socket {
            Some(Socket::Tcp(stream)) => stream.as_fd(),
            Some(Socket::Udp(socket)) => socket.as_fd(),
            None => unreachable!("it is there until the lease is given back"),
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let Some(socket) = self.socket.take() else { return };
        if let Socket::Tcp(stream) = &socket {
            // Fails when it has ended already.
            let _ = stream.shutdown(Shutdown::Both);
        }
        drop(socket);
        // Where that would have to wait, the deadline of the lease ends it.
        if let Some(mut session) = self.client.try_lock()
            && self.client.session() == self.session
        {
            session.give_up_lease(self.handle, self.id);
        }
    }
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease").field("id", &self.id).finish_non_exhaustive()
    }
}

/// A socket that cannot be used as it is.
pub(crate) fn unusable(call: String, source: io::Error) -> Error {
    Error::Io { call, source, retry: Retry::NotSent }
}
