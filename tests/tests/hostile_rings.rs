//! Clients that forge their rings: they lose their session, and nobody else notices anything.
//!
//! The memory is a file to its client, so every word can be written with pwrite(2); where they lie
//! stands in `proto/src/ring/header.rs`.

#![forbid(unsafe_code)]
#![allow(clippy::panic, clippy::unwrap_used, reason = "a failed step fails the test")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

use poolbroker_proto::frame::{FrameHeader, HEADER_BYTES, Kind};
use poolbroker_proto::message::ClientMessage;
use poolbroker_proto::reason::Reason;
use poolbroker_proto::ring::Urgency;
use poolbroker_tests::Broker;
use poolbroker_tests::broker::list;
use poolbroker_tests::peers::{TcpSink, UdpSink, unused_port};
use poolbroker_tests::raw::{RawClient, control, frame};
use poolbroker_tests::raw_ring::{CAPACITY, RawRing, Resumed};
use rustix::fs::{FallocateFlags, OFlags, fallocate, fcntl_setfl};
use rustix::io::Errno;

const MAGIC: u64 = 0;
const VERSION: u64 = 8;
const TAIL: u64 = 256;
const RELEASED: u64 = 384;
const READING: u64 = 392;
const REPLY_RELEASED: u64 = 1024;
const RECORDS: u64 = 4096;

/// A broker with a sink, a client to misbehave, and one that must not notice.
struct Scene {
    sink: UdpSink,
    broker: Broker,
    hostile: RawRing,
    handle: u16,
    neighbour: RawRing,
    neighbour_handle: u16,
    neighbour_sent: u64,
}

impl Scene {
    fn start() -> Scene {
        let sink = UdpSink::start();
        let broker = Broker::start(&[format!("sink={}", sink.url_write_only())]);
        let mut hostile = RawRing::connect(broker.runtime_dir());
        let handle = hostile.open_upstream("sink");
        let mut neighbour = RawRing::connect(broker.runtime_dir());
        let neighbour_handle = neighbour.open_upstream("sink");
        let neighbour_sent = 0;
        Scene { sink, broker, hostile, handle, neighbour, neighbour_handle, neighbour_sent }
    }

    /// The hostile client starts afresh.
    fn renew(&mut self) {
        self.hostile = RawRing::connect(self.broker.runtime_dir());
        self.handle = self.hostile.open_upstream("sink");
    }

    fn file(&self) -> File {
        self.hostile.memory.try_clone().unwrap().into()
    }

    fn forge(&self, at: u64, word: u64) {
        self.file().write_all_at(&word.to_ne_bytes(), at).unwrap();
        self.hostile.ring_doorbell();
    }

    /// Everything the neighbour sends is sent, and its totals say so.
    fn assert_neighbour_unharmed(&mut self) {
        for _ in 0..100 {
            self.neighbour.send(self.neighbour_handle, b"undisturbed");
        }
        self.neighbour_sent += 100;
        let outcomes = self.neighbour.flush(self.neighbour_handle);
        assert_eq!((outcomes.accepted, outcomes.sent), (self.neighbour_sent, self.neighbour_sent));
    }

    /// The session is closed for its ring, and told so on its socket.
    fn assert_thrown_out(&mut self) {
        let last = self.hostile.client.until_closed().pop().expect("a reason");
        assert_eq!(last.failure().reason, Reason::RingCorrupt);
        self.assert_neighbour_unharmed();
    }
}

#[test]
fn positions_that_make_no_sense_end_the_session() {
    let mut scene = Scene::start();
    for tail in [u64::MAX, CAPACITY as u64 + 8, 1 << 63, 4, 1, 12] {
        scene.forge(TAIL, tail);
        scene.assert_thrown_out();
        scene.renew();
    }
    // Jumping back, behind what was taken.
    for _ in 0..10 {
        scene.hostile.send(scene.handle, b"x");
    }
    assert_eq!(scene.hostile.flush(scene.handle).sent, 10);
    scene.forge(TAIL, 8);
    scene.assert_thrown_out();
}

#[test]
fn records_that_make_no_sense_end_the_session() {
    let mut scene = Scene::start();
    let word = |len: u64, kind: u64, upstream: u64| len | kind << 32 | upstream << 48;
    let padding = 0xff;
    for first in [
        0,
        u64::MAX,
        word(u64::from(u32::MAX), 3, 0),
        word(CAPACITY as u64, 3, 0),
        word(CAPACITY as u64 / 2, 3, 0),
        word(1000, 3, 0),
        word(8, 9, 0),
        word(8, padding, 0),
        word(CAPACITY as u64, padding, 0),
        word(u64::from(u32::MAX), padding, 0),
        word(8, 3, 0) | 1 << 40,
    ] {
        // Behind the records of the open, a header that announces more than is there.
        let at = scene.hostile.producer.position();
        scene.file().write_all_at(&first.to_ne_bytes(), RECORDS + at).unwrap();
        scene.forge(TAIL, at + 32);
        scene.assert_thrown_out();
        scene.renew();
    }
    let received = scene.sink.received();
    assert!(received.iter().all(|message| message == b"undisturbed"), "{received:?}");
}

#[test]
fn ten_thousand_random_forgeries_harm_nobody_else() {
    const FORGERIES_MIN: u32 = 10_000;
    const FORGERIES_MAX: u32 = 100_000;
    const ENDED_MIN: u32 = 100;
    let mut scene = Scene::start();
    let mut random = fastrand::Rng::with_seed(7);
    let (mut forgeries, mut renewed) = (0, 0);
    // How many it takes until a session ends depends on when the broker looks.
    while forgeries < FORGERIES_MIN || renewed < ENDED_MIN {
        assert!(forgeries < FORGERIES_MAX, "{renewed} sessions ended");
        forgeries += 1;
        let at = match random.u8(0..4) {
            0 => TAIL,
            1 => random.u64(0..RECORDS / 8) * 8,
            2 => RECORDS + random.u64(0..64) * 8,
            _ => RECORDS + random.u64(0..2 * CAPACITY as u64 / 8) * 8,
        };
        let word = match random.u8(0..4) {
            0 => random.u64(..),
            1 => random.u64(0..=CAPACITY as u64) & !7,
            2 => u64::from(random.u32(0..100)) | u64::from(random.u8(0..8)) << 32,
            _ => 0,
        };
        scene.forge(at, word);
        if random.u8(0..8) == 0 {
            scene.forge(TAIL, random.u64(0..4096) * 8);
        }
        if scene.hostile.client.is_closed() {
            scene.renew();
            renewed += 1;
        }
        if random.u8(..) == 0 {
            scene.assert_neighbour_unharmed();
        }
    }
    scene.assert_neighbour_unharmed();
    let status = scene.broker.status();
    scene.broker.assert_sums(&status);
}

/// M4: the length is read once; M5: what is checked is what is sent.
#[test]
fn words_that_change_while_they_are_read_are_read_once() {
    let sink = TcpSink::start();
    let broker = Broker::start(&[format!("sink={}", sink.url())]);
    let mut hostile = RawRing::connect(broker.runtime_dir());
    let handle = hostile.open_upstream("sink");
    let header = FrameHeader { upstream: handle, ..FrameHeader::new(Kind::Send) };
    let file: File = hostile.memory.try_clone().unwrap().into();
    let is_over = AtomicBool::new(false);
    let mut published = 0;
    // Records of 8 KiB at multiples of 8 KiB: a body takes long enough to copy that its last word
    // can change between two looks at it.
    const RECORD: u64 = 8192;
    let rest = RECORD - hostile.producer.position() % RECORD;
    hostile.write(header, &vec![b'x'; usize::try_from(rest).unwrap() - HEADER_BYTES]);
    let body = vec![b'x'; usize::try_from(RECORD).unwrap() - HEADER_BYTES];
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // A delimiter in and out of the last words of all records, and of nothing else.
            let mut random = fastrand::Rng::with_seed(1);
            while !is_over.load(Ordering::Relaxed) {
                let end = RECORDS + random.u64(1..=CAPACITY as u64 / RECORD) * RECORD;
                let word = if random.bool() { b"xxx\nxxxx" } else { b"xxxxxxxx" };
                let _ = file.write_all_at(word, end - 8);
            }
        });
        for _ in 0..5_000 {
            hostile.write(header, &body);
            published += 1;
        }
        is_over.store(true, Ordering::Relaxed);
    });
    let outcomes = hostile.flush(handle);
    let refused: u64 = outcomes.refused.iter().map(|(_, count)| count).sum();
    assert_eq!(outcomes.sent + refused, published + 1);
    assert!(refused > 0, "no delimiter was seen");
    let lines = sink.wait_for(usize::try_from(outcomes.sent).unwrap());
    assert_eq!(lines.len() as u64, outcomes.sent, "one message never becomes two");
    assert!(lines.iter().all(|line| !line.contains(&b'\n')));
}

/// M1, M22, E1: it cannot shrink, and holes in it are zeros, which are no record.
#[test]
fn a_ring_cannot_shrink_and_a_hole_in_it_ends_the_session() {
    let mut scene = Scene::start();
    for _ in 0..1_000 {
        assert_eq!(rustix::fs::ftruncate(scene.file(), 0), Err(Errno::PERM));
        assert_eq!(rustix::fs::ftruncate(scene.file(), 1 << 30), Err(Errno::PERM));
    }
    let header = FrameHeader { upstream: scene.handle, ..FrameHeader::new(Kind::Send) };
    for _ in 0..50 {
        scene.hostile.write_unpublished(header, b"gone before it was seen");
    }
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(scene.file(), flags, RECORDS, CAPACITY as u64).unwrap();
    let _ = scene.hostile.producer.publish(Urgency::Urgent);
    scene.hostile.ring_doorbell();
    scene.assert_thrown_out();
    // The header page as well: whatever the broker makes of it, it lives.
    scene.renew();
    scene.hostile.send(scene.handle, b"x");
    fallocate(scene.file(), flags, 0, RECORDS).unwrap();
    scene.hostile.ring_doorbell();
    scene.assert_neighbour_unharmed();
}

/// M7, E6: the broker neither reads nor writes what a client could make block.
#[test]
fn a_doorbell_that_is_full_and_blocks_stops_nobody() {
    let mut scene = Scene::start();
    // From zero, so that it is this process that does not block.
    let _ = rustix::io::read(&scene.hostile.doorbell, &mut [0; 8]);
    fcntl_setfl(&scene.hostile.doorbell, OFlags::empty()).unwrap();
    rustix::io::write(&scene.hostile.doorbell, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    for _ in 0..100 {
        let header = FrameHeader { upstream: scene.handle, ..FrameHeader::new(Kind::Send) };
        scene.hostile.write_unpublished(header, b"x");
        let _ = scene.hostile.producer.publish(Urgency::Relaxed);
    }
    scene.assert_neighbour_unharmed();
    // What it published is taken at its end at the latest.
    scene.renew();
    scene.sink.wait_for(200);
}

/// C8: a child that uses its parent's ring destroys that ring and no other.
#[test]
fn two_producers_of_one_ring_harm_only_themselves() {
    let mut scene = Scene::start();
    let mut second = scene.hostile.header.send_producer().unwrap();
    let header = FrameHeader { upstream: scene.handle, ..FrameHeader::new(Kind::Send) };
    for number in 0..10_000 {
        let body = vec![b'x'; number % 50 + 1];
        let first = scene.hostile.producer.push(&header, &body);
        let other = second.push(&header, &body[..body.len() / 2 + 1]);
        if first.is_err() && other.is_err() {
            break;
        }
        let _ = scene.hostile.producer.publish(Urgency::Urgent);
        let _ = second.publish(Urgency::Urgent);
        scene.hostile.ring_doorbell();
    }
    scene.assert_neighbour_unharmed();
    let status = scene.broker.status();
    scene.broker.assert_sums(&status);
}

#[test]
fn what_is_passed_as_the_ring_of_an_earlier_broker_is_not_believed() {
    let mut scene = Scene::start();
    for number in 0..10 {
        scene.hostile.send(scene.handle, format!("{number}").as_bytes());
    }
    assert_eq!(scene.hostile.flush(scene.handle).sent, 10);
    let memory: File = scene.file();
    let (tail, released) = (scene.hostile.producer.position(), scene.hostile.producer.position());
    scene.renew();
    scene.broker.wait_until(|status| list(status, "sessions").len() == 2);
    let mut word = [0; 8];
    memory.read_exact_at(&mut word, REPLY_RELEASED).unwrap();
    let reply_released = u64::from_ne_bytes(word);
    let put = |at, word: u64| memory.write_all_at(&word.to_ne_bytes(), at).unwrap();
    let reason = |scene: &Scene| match RawRing::resume(
        scene.broker.runtime_dir(),
        &memory,
        CAPACITY,
        &["sink"],
    ) {
        Resumed::Refused(failure) => failure.reason,
        other => panic!("{other:?}"),
    };
    let right: u64 = u64::from_ne_bytes(*b"PBRING\r\n");
    for (at, wrong, right) in [
        (MAGIC, 0, right),
        (VERSION, 2, 1),
        (RELEASED, tail + 8, released),
        (RELEASED, 4, released),
        (READING, tail + 8, tail),
        (READING, released.wrapping_sub(8), tail),
        (REPLY_RELEASED, 1 << 40, reply_released),
    ] {
        put(at, wrong);
        assert_eq!(reason(&scene), Reason::BadRing, "{wrong:#x} at {at}");
        put(at, right);
    }
    // A position far ahead is one that a broker never read: all of it "may have been sent".
    put(RELEASED, released.wrapping_sub(CAPACITY as u64 * 2));
    assert_eq!(reason(&scene), Reason::BadRing);
    scene.assert_neighbour_unharmed();
    let sessions = list(&scene.broker.status(), "sessions").len();
    assert!(sessions <= 2, "{sessions} sessions");
}

/// C6: replies that nobody reads are bounded, and the client that leaves them is not read either.
#[test]
fn a_client_that_reads_no_replies_fills_its_own_queue() {
    let mut scene = Scene::start();
    let (header, flush) = control(1, 99, &ClientMessage::Flush);
    let mut is_full = false;
    for _ in 0..200_000 {
        // Each is answered with a failure, since there is no handle 99.
        is_full = scene.hostile.producer.push(&header, &flush).is_err();
        if is_full {
            break;
        }
        scene.hostile.publish();
    }
    assert!(is_full, "the broker stops reading");
    scene.assert_neighbour_unharmed();
    let grown = scene.broker.rss_bytes();
    assert!(grown < 64 << 20, "{grown} bytes");
}

#[test]
fn two_rings_asked_for_at_once_are_one_ring_and_a_refusal() {
    let scene = Scene::start();
    let (client, _) = RawClient::welcomed(scene.broker.runtime_dir());
    let message = ClientMessage::OpenRing { bytes: CAPACITY as u64 };
    let (header, body) = control(1, 0, &message);
    client.duplicate().send_bytes(&frame(header, &body).repeat(2));
    let mut hostile = RawRing::opened(client, CAPACITY).unwrap();
    let refused = hostile.next_frame().unwrap().failure();
    assert_eq!(refused.reason, Reason::BadRing);
    let handle = hostile.open_upstream("sink");
    hostile.send(handle, b"works");
    assert_eq!(hostile.flush(handle).sent, 1);
}

#[test]
fn a_second_ring_for_one_session_is_refused_and_the_first_one_works_on() {
    let mut scene = Scene::start();
    let message = ClientMessage::OpenRing { bytes: CAPACITY as u64 };
    scene.hostile.client.send_control(3, 0, &message);
    let refused = scene.hostile.next_frame().unwrap();
    assert_eq!(refused.failure().reason, Reason::BadRing);
    scene.hostile.send(scene.handle, b"works on");
    assert_eq!(scene.hostile.flush(scene.handle).sent, 1);
}

#[test]
fn a_ring_is_opened_only_where_nothing_waits_for_its_outcome() {
    let broker = Broker::start(&[format!("down=tcp://127.0.0.1:{}", unused_port())]);
    let (mut client, _) = RawClient::welcomed(broker.runtime_dir());
    let handle = client.open("down");
    client.send(handle, b"by the socket");
    let refused = RawRing::open(client, CAPACITY).err().unwrap();
    assert_eq!(refused.reason, Reason::BadRing, "{refused:?}");
}
