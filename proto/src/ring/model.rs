//! The proof of the ring: loom runs each model under every interleaving and every value that a load
//! may give, and calls a deadlock what would be a lost wake-up.
//!
//! ```text
//! RUSTFLAGS="--cfg loom" cargo test --release -p poolbroker-proto --lib ring::model
//! ```
//!
//! What is modelled is the code of `mod.rs`, `header.rs` and `semaphore.rs` itself; only the memory
//! under it is another (`memory_model.rs`). Each model names the changes of that code under which it
//! was seen to fail. Loom's full fences order a little more than the language promises: they make
//! what stands before one visible behind the next. So do those of all processors.

use loom::model::Builder;
use loom::sync::atomic::AtomicU64;
use loom::sync::{Condvar, Mutex};
use loom::thread;

use super::*;
use crate::frame::Kind;

/// Four records of one word, or two of five.
const CAPACITY: usize = 128;

/// Explores with at most `preemptions` switches away from a thread that could go on; where a thread
/// must wait or ends, switches are free. Without a bound: everything.
fn explore(preemptions: Option<usize>, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = Builder::new();
    builder.preemption_bound = preemptions;
    builder.max_branches = 10_000;
    builder.check(model);
}

fn pair() -> Header {
    Header::write(Arc::new(Memory::new(Header::region_bytes(CAPACITY))), CAPACITY)
}

fn send_ring(pair: &Header) -> (Producer, Consumer) {
    (pair.send_producer().unwrap(), pair.send_consumer().unwrap().0)
}

fn reply_ring(pair: &Header) -> (Producer, Consumer) {
    (pair.reply_producer().unwrap(), pair.reply_consumer().unwrap())
}

/// Writes a record whose header and `words` words of body all say `number`.
fn push(producer: &mut Producer, number: u64, words: usize) -> Result<(), NotWritten> {
    let header = FrameHeader { correlation: number, ..FrameHeader::new(Kind::Send) };
    producer.push(&header, &number.to_ne_bytes().repeat(words))
}

/// Takes a record, if there is one, and looks whether it is whole.
fn take(consumer: &mut Consumer) -> Option<(u64, usize)> {
    let record = consumer.peek().unwrap()?;
    // The room of what was taken stays taken: it may be copied later.
    consumer.take(&record);
    let mut body = Vec::new();
    consumer.copy_body(&record, &mut body);
    let number = record.header.correlation;
    assert_eq!(body, number.to_ne_bytes().repeat(body.len() / WORD), "the body of {number}");
    assert!(!body.is_empty() && body.len() == record.body_bytes);
    Some((number, record.ring_bytes))
}

/// An eventfd watched edge-triggered: it tells that it was written to since it told last.
#[derive(Default)]
struct Doorbell {
    written: Mutex<u64>,
    changed: Condvar,
}

impl Doorbell {
    fn ring(&self) {
        *self.written.lock().unwrap() += 1;
        self.changed.notify_one();
    }

    fn wait(&self, told: &mut u64) {
        let mut written = self.written.lock().unwrap();
        while *written == *told {
            written = self.changed.wait(written).unwrap();
        }
        *told = *written;
    }
}

/// Takes until `last`, sleeping whenever there is nothing.
fn take_until(last: u64, consumer: &mut Consumer, bell: Bell, doorbell: &Doorbell) {
    let (mut expected, mut told) = (1, 0);
    while expected <= last {
        if let Some((number, _)) = take(consumer) {
            assert_eq!(number, expected);
            expected += 1;
        } else if consumer.arm(bell).unwrap() {
            doorbell.wait(&mut told);
        }
    }
}

/// Sends a record, waiting for room on the semaphore as often as it takes.
fn send_waiting(producer: &mut Producer, free: &Semaphore, number: u64, words: usize) {
    while push(producer, number, words) == Err(NotWritten::Full) {
        if producer.arm(words * WORD).unwrap() {
            assert!(free.wait(None));
        }
    }
    let _ = producer.publish(Urgency::Relaxed);
}

/// Fails with `tail` stored or loaded relaxed, or stored before the body is written.
#[test]
fn records_come_in_order_and_whole() {
    explore(None, || {
        let (mut producer, mut consumer) = send_ring(&pair());
        let sends = thread::spawn(move || {
            push(&mut producer, 1, 1).unwrap();
            let _ = producer.publish(Urgency::Relaxed);
            push(&mut producer, 2, 1).unwrap();
            push(&mut producer, 3, 1).unwrap();
            let _ = producer.publish(Urgency::Relaxed);
        });
        let mut got: Vec<u64> = (0..2).filter_map(|_| Some(take(&mut consumer)?.0)).collect();
        sends.join().unwrap();
        got.extend(std::iter::from_fn(|| Some(take(&mut consumer)?.0)));
        assert_eq!(got, [1, 2, 3]);
    });
}

/// Fails with `released` stored or loaded relaxed, stored as soon as a record is peeked or taken,
/// not asked for by a claim, and with padding that is not skipped.
#[test]
fn a_place_is_written_again_only_once_it_was_read_and_padding_leads_to_the_start() {
    explore(None, || {
        let (mut producer, mut consumer) = send_ring(&pair());
        // Of 48 bytes each: the third has its place at the start, behind 32 bytes of padding.
        push(&mut producer, 1, 3).unwrap();
        push(&mut producer, 2, 3).unwrap();
        let _ = producer.publish(Urgency::Relaxed);
        let sends = thread::spawn(move || {
            let written = (0..2).any(|_| push(&mut producer, 3, 3).is_ok());
            let _ = producer.publish(Urgency::Relaxed);
            (producer, written)
        });
        let mut got = Vec::new();
        for _ in 0..3 {
            if let Some((number, ring_bytes)) = take(&mut consumer) {
                got.push(number);
                let _ = consumer.release(ring_bytes);
            }
        }
        let (mut producer, written) = sends.join().unwrap();
        if !written {
            push(&mut producer, 3, 3).unwrap();
            let _ = producer.publish(Urgency::Relaxed);
        }
        got.extend(std::iter::from_fn(|| Some(take(&mut consumer)?.0)));
        assert_eq!(got, [1, 2, 3]);
    });
}

/// Fails without the fence in `release`, the one in `Producer::arm` or the look behind it, with a
/// bell that is cleared before enough is free, and with `released` as above.
#[test]
fn a_producer_that_waits_for_room_is_woken() {
    explore(None, || {
        let pair = pair();
        let (mut producer, mut consumer) = send_ring(&pair);
        for number in 1..=4 {
            push(&mut producer, number, 1).unwrap();
        }
        let _ = producer.publish(Urgency::Relaxed);
        let free = pair.free();
        let sends = thread::spawn(move || send_waiting(&mut producer, &free, 5, 1));
        for expected in 1..=4 {
            let (number, ring_bytes) = take(&mut consumer).unwrap();
            assert_eq!(number, expected);
            if consumer.release(ring_bytes) {
                pair.free().post();
            }
        }
        sends.join().unwrap();
        assert_eq!(take(&mut consumer).unwrap().0, 5);
    });
}

/// Fails as the model above, but for the bell, and without either fence of the semaphore.
#[test]
fn a_producer_that_needs_more_than_the_half_that_wakes_it_is_woken_again() {
    explore(Some(5), || {
        let pair = pair();
        let (mut producer, mut consumer) = send_ring(&pair);
        push(&mut producer, 1, 3).unwrap();
        push(&mut producer, 2, 3).unwrap();
        let _ = producer.publish(Urgency::Relaxed);
        let free = pair.free();
        // 64 bytes behind 32 of padding: all of the ring must be free.
        let sends = thread::spawn(move || send_waiting(&mut producer, &free, 3, 5));
        for expected in [1, 2] {
            let (number, ring_bytes) = take(&mut consumer).unwrap();
            assert_eq!(number, expected);
            if consumer.release(ring_bytes) {
                pair.free().post();
            }
        }
        sends.join().unwrap();
        assert_eq!(take(&mut consumer).unwrap(), (3, 96));
    });
}

/// Fails without the fence in `publish` (or with a weaker one), without the one in
/// `Consumer::arm` or the look behind it, with a bell that is read before `tail` is stored, and
/// with one that every publishing clears.
#[test]
fn a_consumer_that_sleeps_is_woken() {
    explore(None, || {
        let (mut producer, mut consumer) = send_ring(&pair());
        let doorbell = Arc::new(Doorbell::default());
        let rings = Arc::clone(&doorbell);
        let sends = thread::spawn(move || {
            for number in [1, 2] {
                push(&mut producer, number, 1).unwrap();
                if producer.publish(Urgency::Relaxed) {
                    rings.ring();
                }
            }
        });
        take_until(2, &mut consumer, Bell::Everything, &doorbell);
        sends.join().unwrap();
    });
}

/// Fails as the model above, and with urgent records that ring for sleepers only.
#[test]
fn a_consumer_that_naps_is_woken_by_what_is_urgent() {
    explore(None, || {
        let (mut producer, mut consumer) = send_ring(&pair());
        let doorbell = Arc::new(Doorbell::default());
        let rings = Arc::clone(&doorbell);
        let sends = thread::spawn(move || {
            for (number, urgency) in [(1, Urgency::Relaxed), (2, Urgency::Urgent)] {
                push(&mut producer, number, 1).unwrap();
                if producer.publish(urgency) {
                    rings.ring();
                }
            }
        });
        take_until(2, &mut consumer, Bell::Urgent, &doorbell);
        sends.join().unwrap();
    });
}

/// Fails if a relaxed publishing that saw `Everything` and then swaps out an `Urgent` does not
/// ring: nobody would ring for the urgent record that follows.
#[test]
fn a_consumer_that_slept_woke_for_another_reason_and_naps_is_woken_by_what_is_urgent() {
    explore(None, || {
        let (mut producer, mut consumer) = send_ring(&pair());
        let doorbell = Arc::new(Doorbell::default());
        let rings = Arc::clone(&doorbell);
        assert_eq!(consumer.arm(Bell::Everything), Ok(true));
        let sends = thread::spawn(move || {
            for (number, urgency) in [(1, Urgency::Relaxed), (2, Urgency::Urgent)] {
                push(&mut producer, number, 1).unwrap();
                if producer.publish(urgency) {
                    rings.ring();
                }
            }
        });
        take_until(2, &mut consumer, Bell::Urgent, &doorbell);
        sends.join().unwrap();
    });
}

/// Fails with `tail` stored or loaded relaxed, and with a commit or a claim that stores it.
#[test]
fn of_a_producer_that_died_what_it_published_is_seen_and_nothing_else() {
    explore(None, || {
        let (mut producer, mut consumer) = send_ring(&pair());
        let dies = thread::spawn(move || {
            push(&mut producer, 1, 1).unwrap();
            // Between the publishing and the ringing, with the next record under its hands.
            let _ = producer.publish(Urgency::Urgent);
            push(&mut producer, 2, 1).unwrap();
        });
        let mut got: Vec<u64> = (0..2).filter_map(|_| Some(take(&mut consumer)?.0)).collect();
        let _ = consumer.arm(Bell::Everything).unwrap();
        // The end of its socket, which comes behind everything it did.
        dies.join().unwrap();
        got.extend(std::iter::from_fn(|| Some(take(&mut consumer)?.0)));
        assert_eq!(got, [1]);
        assert_eq!(consumer.end().unwrap(), consumer.position());
    });
}

/// Fails without the fence in `post` or the one in `wait`, with sleepers that are counted behind
/// the futex or looked at before the count, and with a count that is relaxed on either side.
#[test]
fn each_v_of_two_ends_a_p_and_what_was_written_before_is_seen() {
    explore(Some(4), || {
        let free = pair().free();
        let written = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
        let posts = [0, 1].map(|index| {
            let (free, written) = (free.clone(), Arc::clone(&written));
            thread::spawn(move || {
                // ORDER: relaxed; that V and P order it is what is looked at.
                written[index].store(1, Ordering::Relaxed);
                free.post();
            })
        });
        assert!(free.wait(None) && free.wait(None));
        assert!(!free.try_wait());
        // ORDER: relaxed; as above.
        assert_eq!(written.iter().map(|word| word.load(Ordering::Relaxed)).sum::<u64>(), 2);
        posts.into_iter().for_each(|posts| posts.join().unwrap());
    });
}

/// Fails without either fence, as above, and if who wakes up clears the sleepers instead of
/// subtracting itself.
#[test]
fn two_that_wait_are_woken_by_two_v() {
    explore(Some(3), || {
        let free = pair().free();
        let waits = [0, 1].map(|_| {
            let free = free.clone();
            thread::spawn(move || assert!(free.wait(None)))
        });
        free.post();
        free.post();
        waits.into_iter().for_each(|waits| waits.join().unwrap());
        assert!(!free.try_wait());
    });
}

/// Fails without any of the four fences on its way, and with a count that is relaxed.
#[test]
fn a_client_that_waits_on_the_semaphore_gets_every_reply() {
    explore(Some(3), || {
        let pair = pair();
        let (mut producer, mut consumer) = reply_ring(&pair);
        let filled = pair.filled();
        let replies = thread::spawn(move || {
            for number in [1, 2] {
                push(&mut producer, number, 1).unwrap();
                if producer.publish(Urgency::Urgent) {
                    filled.post();
                }
            }
        });
        let mut expected = 1;
        while expected <= 2 {
            if let Some((number, _)) = take(&mut consumer) {
                assert_eq!(number, expected);
                expected += 1;
            } else if consumer.arm(Bell::Everything).unwrap() {
                assert!(pair.filled().wait(None));
            }
        }
        replies.join().unwrap();
    });
}

/// Fails without the fence in `ask_for_nudge` and without the one in `publish`.
#[test]
fn a_client_that_polls_its_socket_is_nudged() {
    explore(None, || {
        let pair = pair();
        let (mut producer, mut consumer) = reply_ring(&pair);
        let socket = Arc::new(Doorbell::default());
        let (header, writes) = (pair.clone(), Arc::clone(&socket));
        let replies = thread::spawn(move || {
            for number in [1, 2] {
                push(&mut producer, number, 1).unwrap();
                let _ = producer.publish(Urgency::Urgent);
                if header.take_nudge() {
                    writes.ring();
                }
            }
        });
        let (mut expected, mut told) = (1, 0);
        while expected <= 2 {
            if let Some((number, _)) = take(&mut consumer) {
                assert_eq!(number, expected);
                expected += 1;
                continue;
            }
            pair.ask_for_nudge();
            if !consumer.has_records().unwrap() {
                socket.wait(&mut told);
            }
        }
        replies.join().unwrap();
    });
}
