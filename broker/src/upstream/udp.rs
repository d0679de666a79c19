//! UDP sockets: connected, deaf where nobody listens, sent to in batches.
//!
//! A run of equal lengths goes out as one GSO send (udp(7), UDP_SEGMENT), everything else by
//! sendmmsg(2). GSO that a route refuses with EIO, EINVAL or EMSGSIZE is sent again datagram by
//! datagram and not tried again for that size (E12). See E10, E11, E13, E31 and E51.

use std::io::IoSlice;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::sys::socket::{
    ControlMessage, MsgFlags, MultiHeaders, SockaddrStorage, sendmmsg, sendmsg, setsockopt,
    sockopt::{Ipv4RecvErr, Ipv6RecvErr},
};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvFlags, SocketFlags, SocketType, connect, recv, recvmsg,
    socket_with, sockopt as net_sockopt,
};

use poolbroker_proto::reason::Reason;

use super::sockopt;

/// Datagrams per system call: what GSO takes on every kernel (UDP_MAX_SEGMENTS; E12).
const BATCH_MAX: usize = 64;

/// Equal datagrams from which a GSO send is cheaper than its share of a sendmmsg.
const GSO_RUN_MIN: usize = 4;

/// Bytes of one GSO send: the longest UDP payload.
const GSO_BYTES_MAX: usize = crate::config::UDP_PAYLOAD_BYTES_MAX;

/// What happens to datagrams that come back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Discard {
    /// They are replies: nothing is discarded.
    None,
    /// The kernel drops them before they are queued, and counts them.
    Filter,
    /// No filter could be attached: the smallest buffer, read and counted here.
    Drain,
}

impl Discard {
    /// As `status` prints it.
    pub const fn name(self) -> &'static str {
        match self {
            Discard::None => "none",
            Discard::Filter => "filter",
            Discard::Drain => "drain",
        }
    }
}

/// Opens a connected socket. One that takes no replies is made deaf before it is connected, so
/// that nothing is ever queued.
pub fn open(remote: SocketAddr, takes_replies: bool) -> Result<(OwnedFd, Discard), Errno> {
    let family = if remote.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(family, SocketType::DGRAM, flags, None)?;
    let discard = if takes_replies { Discard::None } else { make_deaf(&socket) };
    let report_errors = if remote.is_ipv4() {
        setsockopt(&socket, Ipv4RecvErr, &true)
    } else {
        setsockopt(&socket, Ipv6RecvErr, &true)
    };
    report_errors.map_err(|error| Errno::from_raw_os_error(error as i32))?;
    connect(&socket, &remote)?;
    Ok((socket, discard))
}

/// From now on nothing that arrives is queued. What is queued already is dropped with the socket.
pub fn make_deaf(socket: impl AsFd) -> Discard {
    let socket = socket.as_fd();
    match sockopt::attach_drop_filter(socket) {
        Ok(()) => Discard::Filter,
        Err(_) => {
            // The kernel raises 1 to its minimum, which holds about two small datagrams.
            let _ = net_sockopt::set_socket_recv_buffer_size(socket, 1);
            Discard::Drain
        }
    }
}

/// Reads one datagram; a longer one than `room` is cut off.
pub fn receive(socket: impl AsFd, room: &mut [u8]) -> Result<usize, Errno> {
    recv(socket, room, RecvFlags::DONTWAIT).map(|(bytes, _)| bytes)
}

/// Whether a socket between two requests can carry another one: nothing waits to be read that
/// would be taken for its reply. A pending error of an earlier datagram is cleared by looking.
pub fn check_reusable(socket: impl AsFd) -> Result<(), Reason> {
    match recv(socket, &mut [0u8; 1], RecvFlags::PEEK | RecvFlags::DONTWAIT) {
        Ok(_) => Err(Reason::Unsolicited),
        Err(_) => Ok(()),
    }
}

/// Empties the error queue, which would otherwise keep epoll awake (E51); how many errors it had.
pub fn drain_error_queue(socket: impl AsFd) -> u64 {
    let socket = socket.as_fd();
    let mut errors = 0;
    let flags = RecvFlags::ERRQUEUE | RecvFlags::DONTWAIT;
    while recvmsg(socket, &mut [], &mut RecvAncillaryBuffer::default(), flags).is_ok() {
        errors += 1;
    }
    errors
}

/// Why the first message of a batch was not sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unsent {
    /// The socket's buffer is full: wait until it is writable.
    WouldBlock,
    /// A local queue is full: wait a while, since the socket polls writable at once (E31).
    NoBuffers,
    /// An ICMP error of an earlier datagram was reported instead (E10).
    Refused,
    /// It is longer than the path or the kernel takes.
    TooBig,
    /// Anything else.
    Failed(Errno),
}

/// Sends batches over one connected socket.
pub struct Sender {
    /// Datagrams of this size and above are not sent by GSO.
    gso_size_limit: usize,
    headers: MultiHeaders<SockaddrStorage>,
}

impl std::fmt::Debug for Sender {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sender").field("gso_size_limit", &self.gso_size_limit).finish()
    }
}

impl Sender {
    /// Nothing is known of the route yet.
    pub fn new() -> Self {
        Sender { gso_size_limit: usize::MAX, headers: MultiHeaders::preallocate(BATCH_MAX, None) }
    }

    /// Sends the first few of the messages that lie back to back in `bytes` with lengths `lens`;
    /// how many were sent, at least one.
    pub fn send(
        &mut self,
        socket: impl AsFd,
        bytes: &[u8],
        lens: impl Iterator<Item = usize>,
    ) -> Result<u64, Unsent> {
        let mut batch = [0usize; BATCH_MAX];
        let mut count = 0;
        for (place, len) in batch.iter_mut().zip(lens) {
            *place = len;
            count += 1;
        }
        let batch = &batch[..count];
        let run = equal_run(batch);
        let result = if run >= GSO_RUN_MIN && batch[0] < self.gso_size_limit {
            match send_segmented(socket.as_fd(), bytes, &batch[..run]) {
                Err(Errno::IO) => {
                    self.gso_size_limit = 0;
                    self.send_each(socket.as_fd(), bytes, &batch[..run])
                }
                Err(Errno::INVAL | Errno::MSGSIZE) => {
                    self.gso_size_limit = batch[0];
                    self.send_each(socket.as_fd(), bytes, &batch[..run])
                }
                result => result,
            }
        } else {
            self.send_each(socket.as_fd(), bytes, &batch[..until_next_run(batch)])
        };
        result.map_err(|error| match error {
            Errno::AGAIN | Errno::INTR => Unsent::WouldBlock,
            Errno::NOBUFS | Errno::NOMEM => Unsent::NoBuffers,
            Errno::CONNREFUSED | Errno::HOSTUNREACH | Errno::NETUNREACH => Unsent::Refused,
            Errno::MSGSIZE => Unsent::TooBig,
            error => Unsent::Failed(error),
        })
    }

    /// sendmmsg: stops at the first datagram that fails, whose error then comes with the next
    /// call (E11).
    fn send_each(&mut self, socket: impl AsFd, bytes: &[u8], lens: &[usize]) -> Result<u64, Errno> {
        const NO_ADDRESS: [Option<SockaddrStorage>; BATCH_MAX] = [None; BATCH_MAX];
        let mut slices = [[IoSlice::new(&[])]; BATCH_MAX];
        let mut rest = bytes;
        for (slice, len) in slices.iter_mut().zip(lens) {
            let (message, behind) = rest.split_at(*len);
            *slice = [IoSlice::new(message)];
            rest = behind;
        }
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        let sent = sendmmsg(
            socket.as_fd().as_raw_fd(),
            &mut self.headers,
            &slices[..lens.len()],
            &NO_ADDRESS[..lens.len()],
            [],
            flags,
        );
        sent.map(|sent| sent.count() as u64).map_err(|error| Errno::from_raw_os_error(error as i32))
    }
}

/// How many messages at the start form one GSO run: equal lengths, the last may be shorter.
fn equal_run(lens: &[usize]) -> usize {
    let Some(size) = lens.first().copied().filter(|size| *size > 0) else {
        return 0;
    };
    let equal = lens.iter().take_while(|len| **len == size).count();
    let shorter = lens.get(equal).is_some_and(|len| *len > 0 && *len < size);
    (equal + usize::from(shorter)).min(GSO_BYTES_MAX / size)
}

/// How many messages at the start stand before the next run that GSO would take.
fn until_next_run(lens: &[usize]) -> usize {
    let mut at = equal_run(lens).clamp(1, lens.len().max(1));
    while at < lens.len() && equal_run(&lens[at..]) < GSO_RUN_MIN {
        at += 1;
    }
    at.min(lens.len())
}

fn send_segmented(socket: impl AsFd, bytes: &[u8], lens: &[usize]) -> Result<u64, Errno> {
    let size = u16::try_from(lens[0]).map_err(|_| Errno::INVAL)?;
    let total = lens.iter().sum::<usize>();
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    let sent = sendmsg::<SockaddrStorage>(
        socket.as_fd().as_raw_fd(),
        &[IoSlice::new(&bytes[..total])],
        &[ControlMessage::UdpGsoSegments(&size)],
        flags,
        None,
    );
    sent.map(|_| lens.len() as u64).map_err(|error| Errno::from_raw_os_error(error as i32))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::net::UdpSocket;

    fn sink() -> UdpSocket {
        let sink = UdpSocket::bind("127.0.0.1:0").unwrap();
        sink.set_read_timeout(Some(std::time::Duration::from_secs(5))).unwrap();
        sink
    }

    #[test]
    fn a_run_ends_at_the_first_longer_one_and_may_end_with_a_shorter_one() {
        assert_eq!(equal_run(&[5, 5, 5, 6]), 3);
        assert_eq!(equal_run(&[5, 5, 3, 5]), 3);
        assert_eq!(equal_run(&[5, 5, 0]), 2);
        assert_eq!(equal_run(&[0, 0]), 0);
        assert_eq!(equal_run(&[]), 0);
        assert_eq!(equal_run(&[40_000, 40_000]), 1);
        assert_eq!(until_next_run(&[1, 2, 3, 9, 9, 9, 9]), 3);
        assert_eq!(until_next_run(&[0]), 1);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn every_message_arrives_as_one_datagram_in_order(
            messages in proptest::collection::vec(
                (prop_oneof![Just(8usize), 1usize..40], any::<u8>()), 1..100),
        ) {
            let sink = sink();
            let (socket, discard) = open(sink.local_addr().unwrap(), false).unwrap();
            prop_assert_eq!(discard, Discard::Filter);
            let messages: Vec<Vec<u8>> =
                messages.into_iter().map(|(len, byte)| vec![byte; len]).collect();
            let bytes = messages.concat();
            let (mut sent, mut at, mut sender) = (0, 0, Sender::new());
            let mut room = [0u8; 100];
            while sent < messages.len() {
                let lens = messages[sent..].iter().map(Vec::len);
                let more = sender.send(&socket, &bytes[at..], lens).unwrap() as usize;
                for message in &messages[sent..sent + more] {
                    let received = sink.recv(&mut room).unwrap();
                    prop_assert_eq!(&room[..received], &message[..]);
                    at += message.len();
                }
                sent += more;
            }
        }
    }

    #[test]
    fn a_datagram_that_is_too_big_stops_a_batch_and_is_named_next() {
        let sink = sink();
        let (socket, _) = open(sink.local_addr().unwrap(), false).unwrap();
        let lens = [3, 70_000, 5];
        let bytes = vec![7u8; 70_008];
        let mut sender = Sender::new();
        assert_eq!(sender.send(&socket, &bytes, lens.into_iter()), Ok(1));
        let rest = sender.send(&socket, &bytes[3..], lens.into_iter().skip(1));
        assert_eq!(rest, Err(Unsent::TooBig));
    }

    #[test]
    fn a_refusal_is_about_an_earlier_datagram() {
        let gone = sink();
        let (socket, _) = open(gone.local_addr().unwrap(), false).unwrap();
        drop(gone);
        let mut sender = Sender::new();
        assert_eq!(sender.send(&socket, b"a", [1].into_iter()), Ok(1));
        assert_eq!(sender.send(&socket, b"b", [1].into_iter()), Err(Unsent::Refused));
        assert_eq!(sender.send(&socket, b"b", [1].into_iter()), Ok(1));
        assert!(drain_error_queue(&socket) >= 1);
    }
}
