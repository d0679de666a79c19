//! UDP sockets: connected, deaf where nobody listens, sent to and read from in batches.
//!
//! A run of equal lengths goes out as one GSO send (udp(7), UDP_SEGMENT), everything else by
//! sendmmsg(2). GSO that a route refuses with EIO, EINVAL or EMSGSIZE is sent again datagram by
//! datagram and not tried again for that size until a socket is opened anew (E12). Replies are read
//! by recvmmsg(2). No datagram allocates anything. See E10, E11, E13, E31 and E51.

use std::io::{IoSlice, IoSliceMut};
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::sys::socket::{
    ControlMessage, MsgFlags, MultiHeaders, SockaddrStorage, recvmmsg, sendmmsg, sendmsg,
    setsockopt,
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
pub const BATCH_MAX: usize = 64;

/// Equal datagrams from which a GSO send is cheaper than its share of a sendmmsg.
const GSO_RUN_MIN: usize = 4;

/// Bytes of one GSO send: the longest UDP payload.
const GSO_BYTES_MAX: usize = crate::config::UDP_PAYLOAD_BYTES_MAX;

/// Datagrams read per system call. Most calls find one reply; the rest is for those who get many,
/// and each slot is memory.
const SLOTS: usize = 8;

/// Bytes of a slot: more than the longest datagram, so that none is cut off.
const SLOT_BYTES: usize = 64 * 1024;

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

/// Sends batches over the connected sockets of one upstream, which share a route.
pub struct Sender {
    /// Datagrams of this size and above are not sent by GSO.
    gso_size_limit: usize,
    /// Datagrams of one GSO send.
    segments_max: usize,
    /// No addresses: the sockets are connected.
    headers: MultiHeaders<()>,
}

impl std::fmt::Debug for Sender {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sender").field("gso_size_limit", &self.gso_size_limit).finish()
    }
}

impl Sender {
    /// Nothing is known of the route yet.
    pub fn new(segments_max: usize) -> Self {
        let headers = MultiHeaders::preallocate(BATCH_MAX, None);
        let mut sender = Sender { gso_size_limit: 0, segments_max, headers };
        sender.forget_route();
        sender
    }

    /// Forgets what the route refused. To be called when a socket is opened: it may go by another
    /// route, and a route whose MTU has grown again shows it only to those who try. To be wrong
    /// costs one system call.
    pub fn forget_route(&mut self) {
        self.gso_size_limit = if self.segments_max < GSO_RUN_MIN { 0 } else { usize::MAX };
    }

    /// Sends the first few of the datagrams that lie back to back in `bytes` with lengths `lens`,
    /// at most [`BATCH_MAX`], each without the `gap` bytes at its end; how many were sent, at least
    /// one.
    pub fn send(
        &mut self,
        socket: impl AsFd,
        bytes: &[u8],
        lens: &[usize],
        gap: usize,
    ) -> Result<usize, Unsent> {
        debug_assert!(!lens.is_empty() && lens.len() <= BATCH_MAX);
        let size = lens[0] - gap;
        let run = equal_run(lens, gap).min(self.segments_max);
        let result = if run >= GSO_RUN_MIN && size < self.gso_size_limit {
            match send_segmented(socket.as_fd(), bytes, &lens[..run], gap) {
                Err(Errno::IO) => {
                    self.gso_size_limit = 0;
                    self.send_each(socket.as_fd(), bytes, &lens[..run], gap)
                }
                Err(Errno::INVAL | Errno::MSGSIZE) => {
                    self.gso_size_limit = size;
                    self.send_each(socket.as_fd(), bytes, &lens[..run], gap)
                }
                result => result,
            }
        } else {
            let before_run = until_next_run(lens, gap, self.gso_size_limit);
            self.send_each(socket.as_fd(), bytes, &lens[..before_run], gap)
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
    fn send_each(
        &mut self,
        socket: impl AsFd,
        bytes: &[u8],
        lens: &[usize],
        gap: usize,
    ) -> Result<usize, Errno> {
        const NO_ADDRESS: [Option<()>; BATCH_MAX] = [None; BATCH_MAX];
        let mut slices = [[IoSlice::new(&[])]; BATCH_MAX];
        for (slice, payload) in slices.iter_mut().zip(payloads(bytes, lens, gap)) {
            *slice = [IoSlice::new(payload)];
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
        sent.map(Iterator::count).map_err(|error| Errno::from_raw_os_error(error as i32))
    }
}

/// Reads what comes back, several datagrams at once into the same memory.
pub struct Receiver {
    /// Allocated when something is read first.
    slots: Vec<u8>,
    headers: MultiHeaders<SockaddrStorage>,
    lens: [usize; SLOTS],
}

impl std::fmt::Debug for Receiver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Receiver").field("lens", &self.lens).finish_non_exhaustive()
    }
}

impl Receiver {
    /// Nothing was read yet.
    pub fn new() -> Self {
        let headers = MultiHeaders::preallocate(SLOTS, None);
        Receiver { slots: Vec::new(), headers, lens: [0; SLOTS] }
    }

    /// Reads as many datagrams as there are and slots for them; how many, and whether there may be
    /// more.
    pub fn receive(&mut self, socket: impl AsFd) -> Result<(usize, bool), Errno> {
        if self.slots.is_empty() {
            // Zeroed by the kernel, page by page as they are used.
            self.slots = vec![0; SLOTS * SLOT_BYTES];
        }
        let mut rest = self.slots.as_mut_slice();
        let mut slices: [[IoSliceMut<'_>; 1]; SLOTS] = std::array::from_fn(|_| {
            let (slot, behind) = std::mem::take(&mut rest).split_at_mut(SLOT_BYTES);
            rest = behind;
            [IoSliceMut::new(slot)]
        });
        let received = recvmmsg(
            socket.as_fd().as_raw_fd(),
            &mut self.headers,
            &mut slices,
            MsgFlags::MSG_DONTWAIT,
            None,
        );
        let received = received.map_err(|error| Errno::from_raw_os_error(error as i32))?;
        let mut count = 0;
        for (place, datagram) in self.lens.iter_mut().zip(received) {
            *place = datagram.bytes;
            count += 1;
        }
        Ok((count, count == SLOTS))
    }

    /// One of the datagrams read last.
    pub fn datagram_mut(&mut self, index: usize) -> &mut [u8] {
        let start = index * SLOT_BYTES;
        &mut self.slots[start..start + self.lens[index]]
    }
}

/// What each datagram carries.
fn payloads<'a>(
    mut bytes: &'a [u8],
    lens: &'a [usize],
    gap: usize,
) -> impl Iterator<Item = &'a [u8]> {
    lens.iter().map(move |len| {
        let (datagram, behind) = bytes.split_at(*len);
        bytes = behind;
        &datagram[..len - gap]
    })
}

/// How many datagrams at the start form one GSO run: equal lengths, the last may be shorter.
fn equal_run(lens: &[usize], gap: usize) -> usize {
    let Some(len) = lens.first().copied().filter(|len| *len > gap) else {
        return 0;
    };
    let equal = lens.iter().take_while(|other| **other == len).count();
    let shorter = lens.get(equal).is_some_and(|other| *other > gap && *other < len);
    (equal + usize::from(shorter)).min(GSO_BYTES_MAX / (len - gap))
}

/// How many datagrams at the start stand before the next run that is sent by GSO.
fn until_next_run(lens: &[usize], gap: usize, gso_size_limit: usize) -> usize {
    let starts_run = |at: &usize| {
        lens[*at] - gap < gso_size_limit && equal_run(&lens[*at..], gap) >= GSO_RUN_MIN
    };
    (1..lens.len()).find(starts_run).unwrap_or(lens.len())
}

/// One GSO send: the kernel cuts what it is given into pieces of the first length.
fn send_segmented(
    socket: impl AsFd,
    bytes: &[u8],
    lens: &[usize],
    gap: usize,
) -> Result<usize, Errno> {
    let size = u16::try_from(lens[0] - gap).map_err(|_| Errno::INVAL)?;
    let mut slices = [IoSlice::new(&[]); BATCH_MAX];
    let slices = if gap == 0 {
        slices[0] = IoSlice::new(&bytes[..lens.iter().sum::<usize>()]);
        &slices[..1]
    } else {
        for (slice, payload) in slices.iter_mut().zip(payloads(bytes, lens, gap)) {
            *slice = IoSlice::new(payload);
        }
        &slices[..lens.len()]
    };
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    let sent = sendmsg::<()>(
        socket.as_fd().as_raw_fd(),
        slices,
        &[ControlMessage::UdpGsoSegments(&size)],
        flags,
        None,
    );
    sent.map(|_| lens.len()).map_err(|error| Errno::from_raw_os_error(error as i32))
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
        assert_eq!(equal_run(&[5, 5, 5, 6], 0), 3);
        assert_eq!(equal_run(&[5, 5, 3, 5], 0), 3);
        assert_eq!(equal_run(&[5, 5, 3, 5], 3), 2, "nothing but a separator is no datagram");
        assert_eq!(equal_run(&[5, 5, 0], 0), 2);
        assert_eq!(equal_run(&[0, 0], 0), 0);
        assert_eq!(equal_run(&[], 0), 0);
        assert_eq!(equal_run(&[40_000, 40_000], 0), 1);
        assert_eq!(until_next_run(&[1, 2, 3, 9, 9, 9, 9], 0, usize::MAX), 3);
        assert_eq!(until_next_run(&[1, 2, 3, 9, 9, 9, 9], 0, 9), 7, "too long for GSO here");
        assert_eq!(until_next_run(&[0], 0, usize::MAX), 1);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn every_message_arrives_as_one_datagram_in_order(
            messages in proptest::collection::vec(
                (prop_oneof![Just(8usize), 1usize..40], any::<u8>()), 1..100),
            gap in 0usize..3,
        ) {
            let sink = sink();
            let (socket, discard) = open(sink.local_addr().unwrap(), false).unwrap();
            prop_assert_eq!(discard, Discard::Filter);
            let messages: Vec<Vec<u8>> =
                messages.into_iter().map(|(len, byte)| vec![byte; len + gap]).collect();
            let lens: Vec<_> = messages.iter().map(Vec::len).collect();
            let bytes = messages.concat();
            let (mut sent, mut at, mut sender) = (0, 0, Sender::new(BATCH_MAX));
            let mut room = [0u8; 100];
            while sent < messages.len() {
                let batch = &lens[sent..messages.len().min(sent + BATCH_MAX)];
                let more = sender.send(&socket, &bytes[at..], batch, gap).unwrap();
                for message in &messages[sent..sent + more] {
                    let received = sink.recv(&mut room).unwrap();
                    prop_assert_eq!(&room[..received], &message[..message.len() - gap]);
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
        let mut sender = Sender::new(BATCH_MAX);
        assert_eq!(sender.send(&socket, &bytes, &lens, 0), Ok(1));
        assert_eq!(sender.send(&socket, &bytes[3..], &lens[1..], 0), Err(Unsent::TooBig));
    }

    #[test]
    fn a_size_that_the_route_refused_goes_one_by_one_until_the_route_is_forgotten() {
        let sink = sink();
        let (socket, _) = open(sink.local_addr().unwrap(), false).unwrap();
        let mut sender = Sender::new(BATCH_MAX);
        // What a refusal leaves behind.
        sender.gso_size_limit = 8;
        let bytes = [7u8; 64];
        // The run of eight is none any more, so the whole batch goes in one call.
        assert_eq!(sender.send(&socket, &bytes, &[1, 8, 8, 8, 8], 0), Ok(5));
        sender.forget_route();
        assert_eq!(sender.send(&socket, &bytes, &[1, 8, 8, 8, 8], 0), Ok(1));
        assert_eq!(sender.send(&socket, &bytes, &[8, 8, 8, 8, 9], 0), Ok(4));
    }

    #[test]
    fn a_sender_that_may_not_segment_sends_each_datagram_by_itself() {
        let sink = sink();
        let (socket, _) = open(sink.local_addr().unwrap(), false).unwrap();
        let bytes = [7u8; 64];
        for (segments_max, first) in [(64, 8), (5, 5), (3, 8), (1, 8)] {
            let mut sender = Sender::new(segments_max);
            assert_eq!(sender.send(&socket, &bytes, &[8; 8], 0), Ok(first));
            assert_eq!(sender.gso_size_limit == 0, segments_max < GSO_RUN_MIN);
        }
    }

    #[test]
    fn a_refusal_is_about_an_earlier_datagram() {
        let gone = sink();
        let (socket, _) = open(gone.local_addr().unwrap(), false).unwrap();
        drop(gone);
        let mut sender = Sender::new(BATCH_MAX);
        assert_eq!(sender.send(&socket, b"a", &[1], 0), Ok(1));
        assert_eq!(sender.send(&socket, b"b", &[1], 0), Err(Unsent::Refused));
        assert_eq!(sender.send(&socket, b"b", &[1], 0), Ok(1));
        assert!(drain_error_queue(&socket) >= 1);
    }

    #[test]
    fn datagrams_are_read_several_at_once_whole_and_in_order() {
        let peer = sink();
        let (socket, _) = open(peer.local_addr().unwrap(), true).unwrap();
        let ours = std::net::UdpSocket::from(socket);
        let lens: Vec<usize> = (1..=SLOTS + 3).chain([0, 9_000]).collect();
        for len in &lens {
            peer.send_to(&vec![*len as u8; *len], ours.local_addr().unwrap()).unwrap();
        }
        let mut receiver = Receiver::new();
        let mut read = Vec::new();
        for expected in [(SLOTS, true), (lens.len() - SLOTS, false)] {
            assert_eq!(receiver.receive(&ours), Ok(expected));
            read.extend((0..expected.0).map(|index| receiver.datagram_mut(index).to_vec()));
        }
        assert!(read.iter().map(Vec::len).eq(lens));
        assert!(read.iter().all(|body| body.iter().all(|byte| *byte == body.len() as u8)));
        assert_eq!(receiver.receive(&ours), Err(Errno::AGAIN));
    }
}
