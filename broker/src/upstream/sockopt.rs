//! Socket options and ioctls that nix and rustix lack. One of the two files with unsafe code.
//!
//! Each function is one system call on a borrowed descriptor with memory of its own; none keeps a
//! pointer.

#![allow(unsafe_code, reason = "socket options that nix and rustix do not offer")]

use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use nix::libc;
use rustix::io::Errno;

/// SO_PEERPIDFD (Linux 6.5) and SO_PASSRIGHTS (Linux 6.16), asm-generic/socket.h.
const SO_PEERPIDFD: libc::c_int = 77;
const SO_PASSRIGHTS: libc::c_int = 83;

/// What a socket holds and has dropped (SO_MEMINFO, socket(7)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemInfo {
    /// Bytes of kernel memory that received, unread data pins.
    pub receive_bytes: u32,
    /// Packets dropped instead of queued, modulo 2^32.
    pub drops: u32,
}

fn set<T: Copy>(
    socket: impl AsFd,
    level: libc::c_int,
    option: libc::c_int,
    value: T,
) -> Result<(), Errno> {
    // SAFETY: the pointer and length describe `value`, which lives across the call; the kernel
    // only reads it. The descriptor is borrowed, so it is open.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
            size_of::<T>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(last_error()) }
}

fn get<T: Copy>(
    socket: impl AsFd,
    level: libc::c_int,
    option: libc::c_int,
    mut value: T,
) -> Result<T, Errno> {
    let mut len = size_of::<T>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes, the size of `value`, which lives across the
    // call; `T` is a plain integer or an array of integers, for which every bit pattern is valid.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            level,
            option,
            (&raw mut value).cast(),
            &raw mut len,
        )
    };
    if result == 0 { Ok(value) } else { Err(last_error()) }
}

fn last_error() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::INVAL)
}

/// Attaches and locks the filter "accept nothing": replies are dropped before they are queued,
/// and counted (E13; socket(7), SO_ATTACH_FILTER, SO_LOCK_FILTER).
pub fn attach_drop_filter(socket: impl AsFd) -> Result<(), Errno> {
    const ACCEPT_NOTHING: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    let mut program = [libc::sock_filter { code: ACCEPT_NOTHING, jt: 0, jf: 0, k: 0 }];
    // The pointer inside stays valid: `program` lives until the end of this function.
    let filter = libc::sock_fprog { len: 1, filter: program.as_mut_ptr() };
    let socket = socket.as_fd();
    set(socket, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, filter)?;
    set(socket, libc::SOL_SOCKET, libc::SO_LOCK_FILTER, 1 as libc::c_int)
}

/// What the socket holds and has dropped.
pub fn mem_info(socket: impl AsFd) -> Result<MemInfo, Errno> {
    // SK_MEMINFO_VARS = 9; RMEM_ALLOC is entry 0, DROPS entry 8 (linux/sock_diag.h).
    let [receive_bytes, .., drops] = get(socket, libc::SOL_SOCKET, libc::SO_MEMINFO, [0u32; 9])?;
    Ok(MemInfo { receive_bytes, drops })
}

/// Bytes written to a TCP socket that the peer's kernel has not acknowledged (SIOCOUTQ, tcp(7)).
pub fn unacknowledged_bytes(socket: impl AsFd) -> Result<usize, Errno> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: SIOCOUTQ, which is TIOCOUTQ, writes one int to the pointer, which is valid.
    let result = unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    if result == 0 { Ok(usize::try_from(bytes).unwrap_or(0)) } else { Err(last_error()) }
}

/// Makes the kernel refuse descriptors that peers of this Unix socket send (E8f). Older kernels
/// do not know the option.
pub fn refuse_descriptors(socket: impl AsFd) -> Result<(), Errno> {
    set(socket, libc::SOL_SOCKET, SO_PASSRIGHTS, 0 as libc::c_int)
}

/// A descriptor that becomes readable when the process that connected a Unix socket dies (E17).
pub fn peer_pidfd(socket: impl AsFd) -> Result<OwnedFd, Errno> {
    let fd = get(socket, libc::SOL_SOCKET, SO_PEERPIDFD, -1 as libc::c_int)?;
    if fd < 0 {
        return Err(Errno::INVAL);
    }
    // SAFETY: the kernel has just installed this descriptor for us; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::net::{TcpListener, TcpStream, UdpSocket};
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_filtered_socket_holds_nothing_and_counts_every_reply() {
        let peer = UdpSocket::bind("127.0.0.1:0").unwrap();
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        attach_drop_filter(&socket).unwrap();
        socket.connect(peer.local_addr().unwrap()).unwrap();
        for _ in 0..1_000 {
            peer.send_to(b"reply", socket.local_addr().unwrap()).unwrap();
        }
        assert_eq!(mem_info(&socket), Ok(MemInfo { receive_bytes: 0, drops: 1_000 }));
        let detach = set(&socket, libc::SOL_SOCKET, libc::SO_DETACH_FILTER, 0 as libc::c_int);
        assert_eq!(detach, Err(Errno::PERM), "the filter is locked");
    }

    #[test]
    fn bytes_that_the_peer_acknowledged_are_not_counted() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let _accepted = listener.accept().unwrap();
        stream.write_all(b"12345").unwrap();
        while unacknowledged_bytes(&stream).unwrap() > 0 {
            std::thread::yield_now();
        }
    }

    #[test]
    fn the_peer_of_a_unix_socket_has_a_pidfd() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        peer_pidfd(&ours).unwrap();
    }
}
