//! What a ring does for both of its sides, against a queue and step by step.

use std::collections::VecDeque;
use std::os::fd::AsFd;

use proptest::prelude::*;

use super::*;
use crate::frame::Kind;

const CAPACITY: usize = 4096;

/// Both sides of a pair, each over its own mapping.
fn pair() -> (Header, Header) {
    let bytes = Header::region_bytes(CAPACITY);
    let (ours, fd) = Memory::create(bytes).unwrap();
    let theirs = Memory::map(fd.as_fd(), bytes).unwrap();
    let ours = Header::write(Arc::new(ours), CAPACITY);
    (ours, Header::verify(Arc::new(theirs), CAPACITY).unwrap())
}

fn ring() -> (Producer, Consumer) {
    let (ours, theirs) = pair();
    (theirs.send_producer().unwrap(), ours.send_consumer().unwrap().0)
}

fn header(correlation: u64) -> FrameHeader {
    FrameHeader { correlation, upstream: 7, timeout_ms: 9, ..FrameHeader::new(Kind::Request) }
}

fn next(consumer: &mut Consumer) -> Option<(Record, Vec<u8>)> {
    let record = consumer.peek().unwrap()?;
    let mut body = Vec::new();
    consumer.copy_body(&record, &mut body);
    consumer.take(&record);
    Some((record, body))
}

#[derive(Debug, Clone)]
enum Op {
    Push(usize),
    Publish,
    Take,
    Release,
}

fn any_op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => prop_oneof![0..100usize, 0..=body_bytes_max(CAPACITY)].prop_map(Op::Push),
        2 => Just(Op::Publish),
        4 => Just(Op::Take),
        2 => Just(Op::Release),
    ]
}

proptest! {
    /// Against a queue: whatever the lengths, what is published comes out once, in order, whole,
    /// and nothing else does; a ring is full only while it holds something.
    #[test]
    fn a_ring_is_a_queue(ops in proptest::collection::vec(any_op(), 0..300)) {
        let (mut producer, mut consumer) = ring();
        let (mut written, mut published) = (VecDeque::new(), VecDeque::new());
        let mut taken = VecDeque::new();
        let mut count = 0;
        for op in ops {
            match op {
                Op::Push(len) => {
                    let body = vec![count as u8; len];
                    match producer.push(&header(count), &body) {
                        Ok(()) => {
                            written.push_back((count, body));
                            count += 1;
                        }
                        Err(NotWritten::Full) => {
                            let held = written.len() + published.len() + taken.len();
                            prop_assert!(held > 0, "an empty ring takes {len} bytes");
                        }
                        Err(error) => prop_assert!(false, "{error}"),
                    }
                }
                Op::Publish => {
                    let _ = producer.publish(Urgency::Relaxed);
                    published.append(&mut written);
                }
                Op::Take => match (next(&mut consumer), published.pop_front()) {
                    (None, None) => {}
                    (Some((record, body)), Some((correlation, expected))) => {
                        prop_assert_eq!(record.header, header(correlation));
                        prop_assert_eq!(body, expected);
                        taken.push_back(record.ring_bytes);
                    }
                    (got, expected) => prop_assert!(false, "{got:?} for {expected:?}"),
                },
                Op::Release => {
                    if let Some(bytes) = taken.pop_front() {
                        let _ = consumer.release(bytes);
                    }
                }
            }
        }
    }
}

#[test]
fn a_record_takes_at_most_half_of_a_ring() {
    let (mut producer, _) = ring();
    let longest = vec![0; body_bytes_max(CAPACITY)];
    assert_eq!(producer.push(&header(1), &longest), Ok(()));
    let longer = vec![0; longest.len() + 1];
    assert!(matches!(producer.push(&header(1), &longer), Err(NotWritten::TooLong { .. })));
}

#[test]
fn what_is_not_published_is_never_seen_and_a_dropped_claim_is_nothing() {
    let (mut producer, mut consumer) = ring();
    drop(producer.claim(&header(1), 10).unwrap());
    assert!(!producer.publish(Urgency::Urgent));
    assert_eq!(consumer.peek(), Ok(None));
    producer.push(&header(2), b"two").unwrap();
    assert_eq!(consumer.peek(), Ok(None));
    let _ = producer.publish(Urgency::Relaxed);
    assert_eq!(next(&mut consumer).unwrap().1, b"two");
}

#[test]
fn a_bell_rings_once_for_what_it_was_set_for() {
    let (mut producer, mut consumer) = ring();
    let mut send = |urgency| {
        producer.push(&header(1), b"x").unwrap();
        producer.publish(urgency)
    };
    assert!(!send(Urgency::Urgent), "nobody asked");
    assert_eq!(consumer.arm(Bell::Everything), Ok(false), "there is a record");
    while next(&mut consumer).is_some() {}
    assert_eq!(consumer.arm(Bell::Everything), Ok(true));
    assert!(send(Urgency::Relaxed));
    assert!(!send(Urgency::Urgent), "it rang");
    while next(&mut consumer).is_some() {}
    assert_eq!(consumer.arm(Bell::Urgent), Ok(true));
    assert!(!send(Urgency::Relaxed));
    assert!(send(Urgency::Urgent));
}

#[test]
fn a_producer_that_waits_is_woken_once_half_of_the_ring_is_free() {
    let (mut producer, mut consumer) = ring();
    assert_eq!(producer.arm(100), Ok(false), "there is room");
    while producer.push(&header(1), &[0; 488]).is_ok() {}
    let _ = producer.publish(Urgency::Relaxed);
    assert_eq!(producer.arm(488), Ok(true));
    let woken_at = (1..=8).find(|_| {
        let (record, _) = next(&mut consumer).unwrap();
        consumer.release(record.ring_bytes)
    });
    assert_eq!(woken_at, Some(4));
    assert_eq!(producer.push(&header(1), &[0; 488]), Ok(()));
}

#[test]
fn another_consumer_goes_on_where_the_last_one_released_and_knows_what_it_touched() {
    let (ours, theirs) = pair();
    let mut producer = theirs.send_producer().unwrap();
    for text in [b"one", b"two", b"six"] {
        producer.push(&header(1), text).unwrap();
    }
    let _ = producer.publish(Urgency::Relaxed);
    let (mut dies, touched) = ours.send_consumer().unwrap();
    assert_eq!(touched, 0);
    let (one, _) = next(&mut dies).unwrap();
    let _ = next(&mut dies).unwrap();
    dies.mark_reading();
    let _ = dies.release(one.ring_bytes);
    let (mut goes_on, touched) = ours.send_consumer().unwrap();
    assert_eq!(next(&mut goes_on).unwrap().1, b"two");
    assert_eq!((goes_on.position(), producer.touched()), (touched, touched));
    assert_eq!(next(&mut goes_on).unwrap().1, b"six");
    assert!(goes_on.position() > touched);
}

#[test]
fn a_region_of_another_layout_size_or_kind_is_refused() {
    let bytes = Header::region_bytes(CAPACITY);
    let (memory, _fd) = Memory::create(bytes).unwrap();
    let memory = Arc::new(memory);
    let verify = || Header::verify(Arc::clone(&memory), CAPACITY).map(|_| ());
    assert_eq!(verify(), Err(BadHeader::Magic), "zeros");
    Header::write(Arc::clone(&memory), CAPACITY);
    assert_eq!(verify(), Ok(()));
    memory.word(8).store(2, Ordering::Relaxed);
    assert_eq!(verify(), Err(BadHeader::Version { found: 2 }));
    memory.word(8).store(LAYOUT_VERSION, Ordering::Relaxed);
    memory.word(24).store(2 * CAPACITY as u64, Ordering::Relaxed);
    assert!(matches!(verify(), Err(BadHeader::Capacity { .. })));
}
